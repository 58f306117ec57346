// The kernel of dispatch_backward.cuh in tiles of 128 columns.
#include "dispatch_backward.cuh"

COTERIE_KERNELS(m) {
  m.impl("fused_dispatch_backward_128", TORCH_BOX(&coterie::fused::dispatch_backward<128>));
}
