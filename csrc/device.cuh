// One source for kernels on two machines: a GPU, and the host, where tests run them thread by
// thread (tests/csrc/compile_on_host.py, which defines COTERIE_ON_HOST and COTERIE_LIBRARY).
//
// Kernels keep to what both have: dynamic shared memory (shared_memory<T>()), barriers and shuffles
// of whole warps, atomics. Ops are registered by COTERIE_KERNELS, and launched by launch().
#pragma once

#ifdef COTERIE_ON_HOST
#include "cuda_on_host.h"
#else
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

// In libtorch_cuda only; weak, so that this library also loads where torch has no CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**)
    __attribute__((weak));
#endif

#include <algorithm>
#include <cstdint>

#include "rows.h"

namespace coterie {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

#ifdef COTERIE_ON_HOST

#define COTERIE_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(COTERIE_LIBRARY, CPU, m)

template <class T>
T* shared_memory() {
  return static_cast<T*>(on_host::shared_memory());
}

struct Guard {
  explicit Guard(const Tensor&) {}
};

template <class... Parameters, class... Arguments>
void launch(
    void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, const Tensor&,
    Arguments... arguments) {
  on_host::launch(
      grid, block, shared, false, [&] { kernel(static_cast<Parameters>(arguments)...); });
}

template <class... Parameters, class... Arguments>
void launch_together(
    void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, const Tensor&,
    Arguments... arguments) {
  on_host::launch_together(kernel, grid, block, shared, static_cast<Parameters>(arguments)...);
}

#else

#define COTERIE_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(coterie, CUDA, m)

// The block's dynamic shared memory.
template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(1024) unsigned char coterie_shared_memory[];
  return reinterpret_cast<T*>(coterie_shared_memory);
}

// Makes a tensor's device the current one, as long as it lives.
struct Guard : torch::stable::accelerator::DeviceGuard {
  explicit Guard(const Tensor& x) : DeviceGuard(x.get_device_index()) {}
};

inline cudaStream_t current_stream(const Tensor& x) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "coterie: ", what, ": ", cudaGetErrorString(error));
}

// More shared memory than 48 KB has to be asked for.
template <class Kernel>
void allow_shared_memory(Kernel* kernel, size_t bytes) {
  if (bytes <= 48 << 10) return;
  check_cuda(
      cudaFuncSetAttribute(
          kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
      "shared memory of a kernel");
}

// Starts a kernel on the current stream of x's device; an empty grid is no launch.
template <class... Parameters, class... Arguments>
void launch(
    void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, const Tensor& x,
    Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  allow_shared_memory(kernel, shared);
  kernel<<<grid, block, shared, current_stream(x)>>>(static_cast<Parameters>(arguments)...);
  check_cuda(cudaGetLastError(), "a kernel's launch");
}

// The same, of a kernel whose blocks wait for each other: all run at a time, or it is refused.
template <class... Parameters, class... Arguments>
void launch_together(
    void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, const Tensor& x,
    const Arguments&... arguments) {
  allow_shared_memory(kernel, shared);
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  check_cuda(
      cudaLaunchCooperativeKernel(
          reinterpret_cast<const void*>(kernel), grid, block, pointers, shared, current_stream(x)),
      "a cooperative kernel's launch");
}

#endif

// The index itself; one out of range stops the kernel: to check it on the host would make the host
// wait for the device.
__device__ __forceinline__ int64_t in_range(int64_t i, int64_t size) {
  if (i < 0 || i >= size) __trap();
  return i;
}

// The sum over the lanes of a warp, the same bits in each.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(kAllLanes, x, lane);
  return x;
}

}  // namespace coterie
