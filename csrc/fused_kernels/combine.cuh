// The second product of rows and experts, with a slab's columns of all tiles before the next's.
#pragma once

#include "launch.cuh"
#include "order.cuh"
#include "put.cuh"

namespace coterie::fused {

struct Combine {
  static constexpr Along kLeft = Along::k, kRight = Along::across;
  static constexpr int kRightBoxes = 4;
  static constexpr bool kTells = true;

  static Maps maps(const Rank& rank) {
    return {
        map_of(rank.left_PK, rank.pool_rows, rank.inner, kTile, kDepth),
        map_of(rank.weights, rank.experts * rank.inner, rank.width, kDepth, 64)};
  }
  __device__ static int count(const Rank& rank) { return *rank.tiles * columns_of(rank.width); }
  __device__ static int of_first_slab(const Rank& rank) {
    return *rank.tiles * slab_begin(columns_of(rank.width), static_cast<int>(rank.slabs), 1);
  }

  using Place = Tile;
  __device__ static Place place(const Rank& rank, int i) {
    return tile_at(rank, columns_of(rank.width), static_cast<int>(rank.slabs), i);
  }

  __device__ Combine(const Rank& rank, const Place& place) : rank_(rank), tile_(place) {}
  __device__ int steps() const { return static_cast<int>(rank_.inner / kDepth); }
  __device__ void wait() const {}
  __device__ Box left(int step, int) const { return {step * kDepth, tile_.number * kTile}; }
  __device__ Box right(int step, int box) const {
    const auto inner = static_cast<int>(rank_.inner);
    return {tile_.column * kColumns + box * 64, tile_.expert * inner + step * kDepth};
  }
  __device__ __forceinline__ void store(int thread, const float (&sum)[kSums]) const {
    const int64_t column = static_cast<int64_t>(tile_.column) * kColumns;
    write_tile(
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
__device__ inline void put_and_close(const Rank& rank, unsigned blocks) {
  put(rank);
  meet_multipliers();
  if (threadIdx.x == kLoaders) close(rank, blocks);
}

}  // namespace coterie::fused
