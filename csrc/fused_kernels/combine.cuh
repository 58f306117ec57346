// The experts' second product, the sum over a token's rows here and the way home in one launch
// (Comet, layer 1).
//
// Results are computed slab after slab of columns, of all rows, so that the first ones leave
// early. The first blocks begin to put once the first slab is taken; the others help when no tile
// is left. The launch ends when all ranks have put everything.
#pragma once

#include "launch.cuh"
#include "order.cuh"
#include "put.cuh"

namespace coterie::fused {

template <int kOfTile>
struct Combine {
  static constexpr int kColumns = kOfTile;
  static constexpr Along kLeft = Along::k, kRight = Along::across;
  static constexpr int kRightBoxes = kColumns / 64;
  static constexpr bool kTells = true;

  static Maps maps(const Rank& rank) {
    STD_TORCH_CHECK(
        rank.slabs >= 1 && rank.slabs <= columns(rank), "coterie: ", columns(rank),
        " tiles side by side cannot be put in ", rank.slabs, " slabs");
    return {
        map_of(rank.left_PK, rank.pool_rows, rank.inner, kTile, kDepth),
        map_of(rank.weights, rank.experts * rank.inner, rank.width, kDepth, 64)};
  }
  __host__ __device__ static int columns(const Rank& rank) { return columns_of<kColumns>(rank.width); }
  __device__ static int count(const Rank& rank) { return *rank.tiles * columns(rank); }
  __device__ static int of_first_slab(const Rank& rank) {
    return *rank.tiles * slab_begin(columns(rank), static_cast<int>(rank.slabs), 1);
  }

  using Place = Tile;
  __device__ static Place place(const Rank& rank, int i) {
    return tile_at(rank, columns(rank), static_cast<int>(rank.slabs), i);
  }

  __device__ Combine(const Rank& rank, const Place& place) : rank_(rank), tile_(place) {}
  __device__ int steps() const { return static_cast<int>(rank_.inner / kDepth); }
  __device__ void wait() const {}
  __device__ Box left(int step, int) const { return {step * kDepth, tile_.number * kTile}; }
  __device__ Box right(int step, int box) const {
    const auto inner = static_cast<int>(rank_.inner);
    return {tile_.column * kColumns + box * 64, tile_.expert * inner + step * kDepth};
  }
  __device__ __forceinline__ void store(int thread, const float (&sum)[kSums<kColumns>]) const {
    const int64_t column = static_cast<int64_t>(tile_.column) * kColumns;
    write_tile<kColumns>(
        thread, sum, rank_.pool_PD + static_cast<int64_t>(tile_.number) * kTile * rank_.width + column,
        rank_.width, rank_.width - column);
  }
  // after a barrier of those whose sums it counts
  __device__ void tell() const {
    add_release(&rank_.counters[kSlab + tile_.slab], 1);
  }

 private:
  const Rank& rank_;
  Tile tile_;
};

// All results of a rank's rows here, by its multiplying threads; `blocks` take part.
template <int kColumns>
__device__ void put_and_close(const Rank& rank, unsigned blocks) {
  put<kColumns>(rank);
  meet_multipliers();
  if (threadIdx.x == kLoaders) close(rank, blocks);
}

template <int kColumns>
__global__ void __launch_bounds__(kThreads, 1)
    combine_kernel(const __grid_constant__ Launch launch, const int movers) {
  using Task = Combine<kColumns>;
  const Rank& rank = launch.rank[blockIdx.y];
  const Maps& maps = launch.maps[blockIdx.y];
  auto& storage = *shared_memory<Storage<kColumns>>();
  const bool moves = static_cast<int>(blockIdx.x) < movers;
  const int limit = moves ? Task::of_first_slab(rank) : Task::count(rank);
  split(
      storage, [&](auto& line) { load_tiles<Task>(rank, maps, storage, line, limit); },
      [&](auto& line) {
        multiply_tiles<Task>(rank, storage, line);
        put_and_close<kColumns>(rank, gridDim.x);
      });
}

template <int kColumns>
void combine(const Tensor& table, const Tensor& like, int64_t each, int64_t communication) {
  const Blocks blocks = blocks_for(table, like, each, communication);
  start<kColumns>(
      combine_kernel<kColumns>, table, like, blocks, launch_of<Combine<kColumns>>(table),
      static_cast<int>(blocks.movers));
}

}  // namespace coterie::fused
