// Gradients of rows, their sums and the way home, with the gradients of the weights, which nobody
// waits for, in the time that is left; in one launch.
//
// The first blocks put, as in combine.cu; the others go on with the weights' gradients, and so do
// the first when all is put. Where a rank has but one block it does one after the other.
#include "combine.cuh"
#include "weight_gradient.cuh"

namespace coterie::fused {
namespace {

struct Gradients {
  Launch out, in;  // of the second and of the first weights
};

__global__ void __launch_bounds__(kThreads, 1) combine_backward_kernel(
    const __grid_constant__ Launch launch, const __grid_constant__ Gradients gradients,
    const int movers) {
  const unsigned here = blockIdx.y;
  const Rank &rank = launch.rank[here], &out = gradients.out.rank[here], &in = gradients.in.rank[here];
  auto& storage = *shared_memory<Storage>();
  const bool moves = static_cast<int>(blockIdx.x) < movers;
  const int limit = moves ? Combine::of_first_slab(rank) : Combine::count(rank);
  split(
      storage,
      [&](Line& line) {
        load_tiles<Combine>(rank, launch.maps[here], storage, line, limit);
        load_tiles<WeightGradient>(
            out, gradients.out.maps[here], storage, line, WeightGradient::count(out));
        load_tiles<WeightGradient>(
            in, gradients.in.maps[here], storage, line, WeightGradient::count(in));
      },
      [&](Line& line) {
        multiply_tiles<Combine>(rank, storage, line);
        if (moves || movers == 0) put_and_close(rank, movers ? movers : gridDim.x);
        multiply_tiles<WeightGradient>(out, storage, line);
        multiply_tiles<WeightGradient>(in, storage, line);
      });
}

void combine_backward(
    const Tensor& table, const Tensor& table_out, const Tensor& table_in, const Tensor& like,
    int64_t each, int64_t communication) {
  const Blocks blocks = blocks_for(table, like, each, communication);
  STD_TORCH_CHECK(
      table_out.size(0) == table.size(0) && table_in.size(0) == table.size(0),
      "coterie: a launch needs the same ranks for all that it does");
  start(
      combine_backward_kernel, table, like, blocks, launch_of<Combine>(table),
      Gradients{launch_of<WeightGradient>(table_out), launch_of<WeightGradient>(table_in)},
      static_cast<int>(blocks.movers));
}

}  // namespace
}  // namespace coterie::fused

COTERIE_KERNELS(m) {
  m.impl("fused_combine_backward", TORCH_BOX(&coterie::fused::combine_backward));
}
