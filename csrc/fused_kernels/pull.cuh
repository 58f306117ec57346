// Rows come from the windows of all ranks into the pool, in the order in which tiles are computed.
//
// A unit is 8 rows of a tile; each warp takes the next one. Padding is set to zero. When all units
// of a tile are there, its counter says so.
#pragma once

#include "courier.cuh"
#include "flags.cuh"
#include "link.cuh"

namespace coterie::fused {

constexpr int kUnit = 8;
constexpr int kUnits = kTile / kUnit;

__device__ inline void clear_row(Number* row, int64_t width) {
  auto* words = reinterpret_cast<uint4*>(row);
  for (int64_t i = threadIdx.x % kWarp; i < width / 8; i += kWarp) words[i] = make_uint4(0, 0, 0, 0);
}

// By all threads of the blocks that take part.
__device__ inline void pull(const Rank& rank, CourierStorage* storage) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t bytes = rank.width * sizeof(Number);
  const unsigned units = static_cast<unsigned>(*rank.tiles) * kUnits;
  Courier courier(storage, warp);
  uint64_t filled = 0;  // sources that are known to have filled their windows
  for (;;) {
    unsigned unit = lane ? 0 : atomicAdd(&rank.counters[kNextPull], 1u);
    unit = __shfl_sync(kAllLanes, unit, 0);
    if (unit >= units) break;
    const int turn = static_cast<int>(unit / kUnits);
    const int tile = rank.order_Q ? rank.order_Q[turn] : turn;
    const int64_t first = static_cast<int64_t>(tile) * kTile + unit % kUnits * kUnit;
    const int source = lane < kUnit ? rank.source_P[first + lane] : -1;
    const int row = lane < kUnit ? rank.row_P[first + lane] : 0;
    int64_t remote = 0;
    for (int i = 0; i < kUnit; ++i) {
      const int from = __shfl_sync(kAllLanes, source, i);
      const int64_t at = __shfl_sync(kAllLanes, row, i);
      Number* to = rank.pool_PD + (first + i) * rank.width;
      if (from < 0) {
        clear_row(to, rank.width);
        continue;
      }
      if (!(filled >> from & 1)) {
        if (lane == 0) wait_filled(rank, from);
        __syncwarp();
        fence_async();
        filled |= uint64_t{1} << from;
      }
      courier.bring(to, rank.window_R[from] + rank.rows_at + at * bytes, bytes);
      if (from != rank.rank) remote += bytes;
    }
    courier.finish();
    cross(rank, remote);
    __syncwarp();
    if (lane == 0) add_release(&rank.counters[kReady + tile], 1);
  }
  courier.leave();
}

}  // namespace coterie::fused
