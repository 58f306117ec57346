// The kernel of combine.cuh in tiles of 128 columns.
#include "combine.cuh"

COTERIE_KERNELS(m) {
  m.impl("fused_combine_128", TORCH_BOX(&coterie::fused::combine<128>));
}
