// The kernel of weight_gradient.cuh in tiles of 128 columns.
#include "weight_gradient.cuh"

COTERIE_KERNELS(m) {
  m.impl("fused_weight_gradient_128", TORCH_BOX(&coterie::fused::weight_gradient<128>));
}
