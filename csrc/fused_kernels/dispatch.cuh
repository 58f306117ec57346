// Rows from all ranks, the experts' first product and SwiGLU in one launch (Comet, layer 0).
#pragma once

#include "receive.cuh"
#include "swiglu.cuh"

namespace coterie::fused {

template <int kOfTile>
struct Dispatch {
  static constexpr int kColumns = kOfTile;
  static constexpr Along kLeft = Along::k, kRight = Along::k;
  static constexpr int kRightBoxes = 2;  // columns of the gate, and of what it opens
  static constexpr int kPairs = kColumns / 2;
  static constexpr bool kTells = false;

  static Maps maps(const Rank& rank) {
    return {
        map_of(rank.pool_PD, rank.pool_rows, rank.width, kTile, kDepth),
        map_of(rank.weights, rank.experts * 2 * rank.hidden, rank.width, kPairs, kDepth)};
  }
  __device__ static int columns(const Rank& rank) { return static_cast<int>(rank.hidden / kPairs); }
  __device__ static int count(const Rank& rank) { return *rank.tiles * columns(rank); }

  using Place = Tile;
  __device__ static Place place(const Rank& rank, int i) {
    return tile_at(rank, columns(rank), 1, i);
  }

  __device__ Dispatch(const Rank& rank, const Place& place) : rank_(rank), tile_(place) {}
  __device__ int steps() const { return static_cast<int>(rank_.width / kDepth); }
  __device__ void wait() const { wait_rows(rank_, tile_); }
  __device__ Box left(int step, int) const { return {step * kDepth, tile_.number * kTile}; }
  __device__ Box right(int step, int part) const {
    const auto hidden = static_cast<int>(rank_.hidden);
    return {step * kDepth, (2 * tile_.expert + part) * hidden + tile_.column * kPairs};
  }

  __device__ __forceinline__ void store(int thread, const float (&sum)[kSums<kColumns>]) const {
    const int64_t hidden = rank_.hidden;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = static_cast<int64_t>(tile_.number) * kTile + row_of(thread, half);
      const int64_t column = static_cast<int64_t>(tile_.column) * kPairs;
#pragma unroll
      for (int group = 0; group < kGroups<kPairs>; ++group) {
        uint32_t gate[4], up[4], act[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int g = sum_of(group * 4 + i, half), u = sum_of(group * 4 + i + kPairs / 8, half);
          gate[i] = packed(sum[g], sum[g + 1]);
          up[i] = packed(sum[u], sum[u + 1]);
          act[i] = packed(swiglu(sum[g], sum[u]), swiglu(sum[g + 1], sum[u + 1]));
        }
        const int64_t at = column + group * 32;
        if (rank_.hidden_PH) {
          write_words(rank_.hidden_PH + row * 2 * hidden + at, gate);
          write_words(rank_.hidden_PH + row * 2 * hidden + hidden + at, up);
        }
        write_words(rank_.act_PF + row * hidden + at, act);
      }
    }
  }

 private:
  const Rank& rank_;
  Tile tile_;
};

template <int kColumns>
__global__ void __launch_bounds__(kThreads, 1)
    dispatch_kernel(const __grid_constant__ Launch launch, const int movers) {
  receive_and_compute<Dispatch<kColumns>>(launch, movers);
}

template <int kColumns>
void dispatch(const Tensor& table, const Tensor& like, int64_t each, int64_t communication) {
  start_receiving<Dispatch<kColumns>>(dispatch_kernel<kColumns>, table, like, each, communication);
}

}  // namespace coterie::fused
