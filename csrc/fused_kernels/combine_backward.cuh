// Gradients of rows, their sums and the way home, with the gradients of the weights, which nobody
// waits for, in the time that is left; in one launch.
//
// The first blocks put, as in combine.cuh; the others go on with the weights' gradients, and so do
// the first when all is put. Where a rank has but one block it does one after the other.
#pragma once

#include "combine.cuh"
#include "weight_gradient.cuh"

namespace coterie::fused {

struct Gradients {
  Launch out, in;  // of the second and of the first weights
};

template <int kColumns>
__global__ void __launch_bounds__(kThreads, 1) combine_backward_kernel(
    const __grid_constant__ Launch launch, const __grid_constant__ Gradients gradients,
    const int movers) {
  using Rows = Combine<kColumns>;
  using Weights = WeightGradient<kColumns>;
  const unsigned here = blockIdx.y;
  const Rank &rank = launch.rank[here], &out = gradients.out.rank[here], &in = gradients.in.rank[here];
  auto& storage = *shared_memory<Storage<kColumns>>();
  const bool moves = static_cast<int>(blockIdx.x) < movers;
  const int limit = moves ? Rows::of_first_slab(rank) : Rows::count(rank);
  split(
      storage,
      [&](auto& line) {
        load_tiles<Rows>(rank, launch.maps[here], storage, line, limit);
        load_tiles<Weights>(out, gradients.out.maps[here], storage, line, Weights::count(out));
        load_tiles<Weights>(in, gradients.in.maps[here], storage, line, Weights::count(in));
      },
      [&](auto& line) {
        multiply_tiles<Rows>(rank, storage, line);
        if (moves || movers == 0) put_and_close<kColumns>(rank, movers ? movers : gridDim.x);
        multiply_tiles<Weights>(out, storage, line);
        multiply_tiles<Weights>(in, storage, line);
      });
}

template <int kColumns>
void combine_backward(
    const Tensor& table, const Tensor& table_out, const Tensor& table_in, const Tensor& like,
    int64_t each, int64_t communication) {
  const Blocks blocks = blocks_for(table, like, each, communication);
  STD_TORCH_CHECK(
      table_out.size(0) == table.size(0) && table_in.size(0) == table.size(0),
      "coterie: a launch needs the same ranks for all that it does");
  using Weights = WeightGradient<kColumns>;
  start<kColumns>(
      combine_backward_kernel<kColumns>, table, like, blocks, launch_of<Combine<kColumns>>(table),
      Gradients{launch_of<Weights>(table_out), launch_of<Weights>(table_in)},
      static_cast<int>(blocks.movers));
}

}  // namespace coterie::fused
