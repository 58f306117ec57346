// Gradients of the experts' weights: of each expert the product of two pools over its rows.
//
// K is the number of the expert's rows; an expert without rows gets zeros.
#pragma once

#include "launch.cuh"
#include "order.cuh"

namespace coterie::fused {

constexpr int kRun = 8;  // tiles of rows of a gradient that are computed side by side

template <int kOfTile>
struct WeightGradient {
  static constexpr int kColumns = kOfTile;
  static constexpr Along kLeft = Along::across, kRight = Along::across;
  static constexpr int kRightBoxes = kColumns / 64;
  static constexpr bool kTells = false;

  static Maps maps(const Rank& rank) {
    return {
        map_of(rank.left_PK, rank.pool_rows, rank.inner, kDepth, 64),
        map_of(rank.pool_PD, rank.pool_rows, rank.width, kDepth, 64)};
  }
  __device__ static int columns(const Rank& rank) { return columns_of<kColumns>(rank.width); }
  __device__ static int rows(const Rank& rank) { return static_cast<int>(rank.inner / kTile); }
  __device__ static int count(const Rank& rank) {
    return static_cast<int>(rank.experts) * rows(rank) * columns(rank);
  }

  struct Place {
    int expert, row, column;  // in tiles of its gradient
    int begin, steps;         // of its rows in the pool
  };
  __device__ static Place place(const Rank& rank, int i) {
    const int across = columns(rank), each = rows(rank) * across;
    const int expert = i / each, within = i % each;
    const int first = within / (kRun * across) * kRun;
    const int left = rows(rank) - first, length = left < kRun ? left : kRun;
    const int step = within - first * across;
    return {
        expert, first + step % length, step / length, rank.span_L2[2 * expert],
        (rank.span_L2[2 * expert + 1] + kDepth - 1) / kDepth};
  }

  __device__ WeightGradient(const Rank& rank, const Place& place) : rank_(rank), place_(place) {}
  __device__ int steps() const { return place_.steps; }
  __device__ void wait() const {}
  __device__ Box left(int step, int box) const {
    return {place_.row * kTile + box * 64, place_.begin + step * kDepth};
  }
  __device__ Box right(int step, int box) const {
    return {place_.column * kColumns + box * 64, place_.begin + step * kDepth};
  }
  __device__ __forceinline__ void store(int thread, const float (&sum)[kSums<kColumns>]) const {
    const int64_t row = place_.expert * rank_.inner + static_cast<int64_t>(place_.row) * kTile;
    const int64_t column = static_cast<int64_t>(place_.column) * kColumns;
    write_tile<kColumns>(
        thread, sum, rank_.weights + row * rank_.width + column, rank_.width,
        rank_.width - column);
  }

 private:
  const Rank& rank_;
  Place place_;
};

// By themselves.
template <int kColumns>
__global__ void __launch_bounds__(kThreads, 1)
    weight_gradient_kernel(const __grid_constant__ Launch launch) {
  using Task = WeightGradient<kColumns>;
  const Rank& rank = launch.rank[blockIdx.y];
  const Maps& maps = launch.maps[blockIdx.y];
  auto& storage = *shared_memory<Storage<kColumns>>();
  const int count = Task::count(rank);
  split(
      storage, [&](auto& line) { load_tiles<Task>(rank, maps, storage, line, count); },
      [&](auto& line) { multiply_tiles<Task>(rank, storage, line); });
}

template <int kColumns>
void weight_gradient(const Tensor& table, const Tensor& like, int64_t each) {
  start<kColumns>(
      weight_gradient_kernel<kColumns>, table, like, blocks_for(table, like, each, 0),
      launch_of<WeightGradient<kColumns>>(table));
}

}  // namespace coterie::fused
