// The experts' second product, the sum over a token's rows here and the way home in one launch
// (Comet, layer 1).
//
// Results are computed slab after slab of columns, so that the first ones leave early. The first
// blocks begin to put once the first slab is taken; the others help when no tile is left. The
// launch ends when all ranks have put everything.
#include "combine.cuh"

namespace coterie::fused {
namespace {

__global__ void __launch_bounds__(kThreads, 1)
    combine_kernel(const __grid_constant__ Launch launch, const int movers) {
  const Rank& rank = launch.rank[blockIdx.y];
  const Maps& maps = launch.maps[blockIdx.y];
  auto& storage = *shared_memory<Storage>();
  const bool moves = static_cast<int>(blockIdx.x) < movers;
  const int limit = moves ? Combine::of_first_slab(rank) : Combine::count(rank);
  split(
      storage, [&](Line& line) { load_tiles<Combine>(rank, maps, storage, line, limit); },
      [&](Line& line) {
        multiply_tiles<Combine>(rank, storage, line);
        put_and_close(rank, gridDim.x);
      });
}

void combine(const Tensor& table, const Tensor& like, int64_t each, int64_t communication) {
  const Blocks blocks = blocks_for(table, like, each, communication);
  start(
      combine_kernel, table, like, blocks, launch_of<Combine>(table),
      static_cast<int>(blocks.movers));
}

}  // namespace
}  // namespace coterie::fused

COTERIE_KERNELS(m) { m.impl("fused_combine", TORCH_BOX(&coterie::fused::combine)); }
