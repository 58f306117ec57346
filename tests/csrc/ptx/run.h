// Runs a kernel as nvcc compiled it, in place of its source.
#pragma once

#include <cstddef>
#include <vector>

struct dim3;

namespace on_ptx {

struct Argument {
  const void* at;
  size_t bytes;
};

// kernel: the host's function of that name; folder: where *.ptx lie. Blocks run together.
// Throws std::runtime_error. Weak: in libraries of kernels that do not need it, it is not there.
__attribute__((weak)) void launch(
    const char* folder, const void* kernel, const dim3& grid, const dim3& threads,
    const std::vector<Argument>& arguments);

}  // namespace on_ptx
