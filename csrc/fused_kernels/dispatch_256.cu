// The kernel of dispatch.cuh in tiles of 256 columns.
#include "dispatch.cuh"

COTERIE_KERNELS(m) {
  m.impl("fused_dispatch_256", TORCH_BOX(&coterie::fused::dispatch<256>));
}
