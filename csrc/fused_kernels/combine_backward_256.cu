// The kernel of combine_backward.cuh in tiles of 256 columns.
#include "combine_backward.cuh"

COTERIE_KERNELS(m) {
  m.impl("fused_combine_backward_256", TORCH_BOX(&coterie::fused::combine_backward<256>));
}
