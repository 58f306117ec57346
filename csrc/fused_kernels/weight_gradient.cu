// Gradients of the experts' weights by themselves.
#include "weight_gradient.cuh"

namespace coterie::fused {
namespace {

__global__ void __launch_bounds__(kThreads, 1)
    weight_gradient_kernel(const __grid_constant__ Launch launch) {
  const Rank& rank = launch.rank[blockIdx.y];
  const Maps& maps = launch.maps[blockIdx.y];
  auto& storage = *shared_memory<Storage>();
  const int count = WeightGradient::count(rank);
  split(
      storage, [&](Line& line) { load_tiles<WeightGradient>(rank, maps, storage, line, count); },
      [&](Line& line) { multiply_tiles<WeightGradient>(rank, storage, line); });
}

void weight_gradient(const Tensor& table, const Tensor& like, int64_t each) {
  start(
      weight_gradient_kernel, table, like, blocks_for(table, like, each, 0),
      launch_of<WeightGradient>(table));
}

}  // namespace
}  // namespace coterie::fused

COTERIE_KERNELS(m) {
  m.impl("fused_weight_gradient", TORCH_BOX(&coterie::fused::weight_gradient));
}
