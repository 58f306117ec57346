// The kernel of dispatch.cuh in tiles of 128 columns.
#include "dispatch.cuh"

COTERIE_KERNELS(m) {
  m.impl("fused_dispatch_128", TORCH_BOX(&coterie::fused::dispatch<128>));
}
