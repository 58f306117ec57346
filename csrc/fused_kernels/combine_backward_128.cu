// The kernel of combine_backward.cuh in tiles of 128 columns.
#include "combine_backward.cuh"

COTERIE_KERNELS(m) {
  m.impl("fused_combine_backward_128", TORCH_BOX(&coterie::fused::combine_backward<128>));
}
