// The kernel of dispatch_backward.cuh in tiles of 256 columns.
#include "dispatch_backward.cuh"

COTERIE_KERNELS(m) {
  m.impl("fused_dispatch_backward_256", TORCH_BOX(&coterie::fused::dispatch_backward<256>));
}
