// Gradients of results from all ranks, and the gradient of the hidden activations, in one launch.
//
// Of a row with weight p and result y = A W2, and dy the gradient of the token's sum: dA' = dy W2^T,
// the gradient of p is <dy, y> = <dA', A> (no result need be kept), and dA = p dA' goes through
// SwiGLU's derivative. What the second weights' gradient needs, p A, is written too.
#pragma once

#include "receive.cuh"
#include "swiglu.cuh"

namespace coterie::fused {

template <int kOfTile>
struct DispatchBackward {
  static constexpr int kColumns = kOfTile;
  static constexpr Along kLeft = Along::k, kRight = Along::k;
  static constexpr int kRightBoxes = 1;
  static constexpr bool kTells = false;

  static Maps maps(const Rank& rank) {
    return {
        map_of(rank.pool_PD, rank.pool_rows, rank.width, kTile, kDepth),
        map_of(rank.weights, rank.experts * rank.hidden, rank.width, kColumns, kDepth)};
  }
  __device__ static int columns(const Rank& rank) { return columns_of<kColumns>(rank.hidden); }
  __device__ static int count(const Rank& rank) { return *rank.tiles * columns(rank); }

  using Place = Tile;
  __device__ static Place place(const Rank& rank, int i) {
    return tile_at(rank, columns(rank), 1, i);
  }

  __device__ DispatchBackward(const Rank& rank, const Place& place) : rank_(rank), tile_(place) {}
  __device__ int steps() const { return static_cast<int>(rank_.width / kDepth); }
  __device__ void wait() const { wait_rows(rank_, tile_); }
  __device__ Box left(int step, int) const { return {step * kDepth, tile_.number * kTile}; }
  __device__ Box right(int step, int) const {
    return {step * kDepth, tile_.expert * static_cast<int>(rank_.hidden) + tile_.column * kColumns};
  }

  __device__ __forceinline__ void store(int thread, const float (&sum)[kSums<kColumns>]) const {
    const bool whole = (tile_.column + 1) * static_cast<int64_t>(kColumns) <= rank_.hidden;
    // the hidden width is a multiple of 128: so many columns are there at least
    constexpr int kThere = kGroups<128>;
    whole ? store_groups<kGroups<kColumns>>(thread, sum) : store_groups<kThere>(thread, sum);
  }

 private:
  // The first columns; what the next group of them needs is on its way while one is worked on.
  template <int kCount>
  __device__ __forceinline__ void store_groups(
      int thread, const float (&sum)[kSums<kColumns>]) const {
    const int64_t hidden = rank_.hidden, first = static_cast<int64_t>(tile_.column) * kColumns;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = static_cast<int64_t>(tile_.number) * kTile + row_of(thread, half);
      const Number* h = rank_.hidden_PH + row * 2 * hidden + first;
      Number* dh = rank_.grad_PH + row * 2 * hidden + first;
      const float weight = rank_.weight_P[row];
      float dot = 0;
      uint4 next_gate = read_row(h), next_up = read_row(h + hidden);
#pragma unroll
      for (int group = 0; group < kCount; ++group) {
        const int at = group * 32;
        uint32_t gate[4], up[4], act[4];
        to_words(next_gate, gate);
        to_words(next_up, up);
        if (group + 1 < kCount) {
          next_gate = read_row(h + at + 32);
          next_up = read_row(h + hidden + at + 32);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int d = sum_of(group * 4 + i, half);
          const Pair g = unpacked(gate[i]), u = unpacked(up[i]);
          const auto one = swiglu_gradient(weight * sum[d], g.first, u.first);
          const auto two = swiglu_gradient(weight * sum[d + 1], g.second, u.second);
          dot += sum[d] * one.act + sum[d + 1] * two.act;
          gate[i] = packed(one.gate, two.gate);
          up[i] = packed(one.up, two.up);
          act[i] = packed(weight * one.act, weight * two.act);
        }
        write_words(dh + at, gate);
        write_words(dh + hidden + at, up);
        write_words(rank_.act_PF + row * hidden + first + at, act);
      }
      dot += __shfl_xor_sync(kAllLanes, dot, 1);
      dot += __shfl_xor_sync(kAllLanes, dot, 2);
      if (thread % 4 == 0) {
        rank_.partial_PN[row * columns(rank_) + tile_.column] = dot;
      }
    }
  }

  const Rank& rank_;
  Tile tile_;
};

template <int kColumns>
__global__ void __launch_bounds__(kThreads, 1)
    dispatch_backward_kernel(const __grid_constant__ Launch launch, const int movers) {
  receive_and_compute<DispatchBackward<kColumns>>(launch, movers);
}

template <int kColumns>
void dispatch_backward(
    const Tensor& table, const Tensor& like, int64_t each, int64_t communication) {
  start_receiving<DispatchBackward<kColumns>>(
      dispatch_backward_kernel<kColumns>, table, like, each, communication);
}

}  // namespace coterie::fused
