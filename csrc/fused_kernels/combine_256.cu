// The kernel of combine.cuh in tiles of 256 columns.
#include "combine.cuh"

COTERIE_KERNELS(m) {
  m.impl("fused_combine_256", TORCH_BOX(&coterie::fused::combine<256>));
}
