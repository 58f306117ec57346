// Small kernels that need what cuda_on_host.h has beyond shuffles: barriers, blocks that wait.
#include "device.cuh"

namespace coterie {
namespace {

// Warp 0 hands numbers over to warp 1, one slot, two named barriers; the block's others look on.
__global__ void relay_kernel(const int64_t* x, int64_t* y, int64_t count) {
  int64_t* slot = shared_memory<int64_t>();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int64_t i = 0; warp < 2 && i < count; ++i) {
    if (warp == 0) {
      slot[lane] = x[i * kWarp + lane];
      named_barrier(1, 2 * kWarp);
    } else {
      named_barrier(1, 2 * kWarp);
      y[i * kWarp + lane] = slot[kWarp - 1 - lane];
    }
    named_barrier(2, 2 * kWarp);
  }
  __syncthreads();
}

// Each block adds its number to the sum of those before, once their flag is up.
__global__ void chain_kernel(const int64_t* x, int64_t* y, int64_t* flag, int64_t patience) {
  const int block = blockIdx.x;
  if (threadIdx.x == 0) {
    for (int64_t i = 0; block > 0 && atomicAdd(&flag[block - 1], 0) == 0; ++i) {
      if (i > patience) __trap();
      on_host::spin();
    }
    y[block] = x[block] + (block ? y[block - 1] : 0);
    atomicAdd(&flag[block], 1);
  }
}

// Half of the block comes to a barrier that needs all.
__global__ void stuck_kernel(int64_t* x) {
  if (threadIdx.x < kWarp) {
    named_barrier(1, 2 * kWarp);
  } else {
    __syncthreads();
  }
  x[0] = 0;
}

Tensor relay(const Tensor& x) {
  Tensor y = torch::stable::new_empty(x, {x.numel()});
  launch(
      relay_kernel, 1, 3 * kWarp, kWarp * sizeof(int64_t), x, data<int64_t>(x),
      mutable_data<int64_t>(y), x.numel() / kWarp);
  return y;
}

Tensor chain(const Tensor& x, const Tensor& flag, bool together, int64_t patience) {
  Tensor y = torch::stable::new_empty(x, {x.numel()});
  const unsigned blocks = static_cast<unsigned>(x.numel());
  int64_t *up = mutable_data<int64_t>(flag), *sum = mutable_data<int64_t>(y);
  if (together) {
    launch_together(chain_kernel, blocks, 64, 0, x, data<int64_t>(x), sum, up, patience);
  } else {
    launch(chain_kernel, blocks, 64, 0, x, data<int64_t>(x), sum, up, patience);
  }
  return y;
}

Tensor stuck(const Tensor& x) {
  launch(stuck_kernel, 1, 2 * kWarp, 0, x, mutable_data<int64_t>(x));
  return x;
}

}  // namespace
}  // namespace coterie

STABLE_TORCH_LIBRARY_FRAGMENT(COTERIE_LIBRARY, m) {
  m.def("relay(Tensor x) -> Tensor");
  m.def("chain(Tensor x, Tensor flag, bool together, int patience) -> Tensor");
  m.def("stuck(Tensor x) -> Tensor");
}

COTERIE_KERNELS(m) {
  m.impl("relay", TORCH_BOX(&coterie::relay));
  m.impl("chain", TORCH_BOX(&coterie::chain));
  m.impl("stuck", TORCH_BOX(&coterie::stuck));
}
