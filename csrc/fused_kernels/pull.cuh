// Rows come from the windows of all ranks into the pool, in the order in which tiles are computed.
//
// A unit is 8 rows of a tile; each warp takes the next one. A row that several experts here need
// crosses once, for the tile that comes first, and goes to all its places. Padding is set to zero.
// When all rows of a tile are there, its counter says so.
#pragma once

#include "courier.cuh"
#include "flags.cuh"
#include "link.cuh"

namespace coterie::fused {

constexpr int kUnit = 8;
constexpr int kUnits = kTile / kUnit;

// What a unit does with one of its rows; each lane looks up one, and tells the others.
struct Parcel {
  int source;  // -1: padding
  int row;     // in the source's window
  Places to;   // none: the row comes with another one's unit

  __device__ Parcel of(int lane) const {
    const auto* places = reinterpret_cast<const int32_t*>(
        __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(to.row), lane));
    return {
        __shfl_sync(kAllLanes, source, lane), __shfl_sync(kAllLanes, row, lane),
        {places, __shfl_sync(kAllLanes, to.count, lane)}};
  }
};

// Tiles come round by round, in a round by place.
__device__ inline bool comes_before(const Rank& rank, int place, int other) {
  const int round = rank.round_Q[place / kTile], later = rank.round_Q[other / kTile];
  return round < later || (round == later && place < other);
}

// Of the row of the pool at `place`.
__device__ inline Parcel parcel_at(const Rank& rank, int place) {
  const int source = rank.source_P[place], row = rank.row_P[place];
  if (source < 0) return {source, row, {nullptr, 0}};
  const int64_t visit = rank.before_R1[source] + row - rank.begin_R[source];
  const int64_t first = rank.offset_V1[visit];
  const Places to{rank.place_N + first, static_cast<int>(rank.offset_V1[visit + 1] - first)};
  for (int n = 0; n < to.count; ++n) {
    if (comes_before(rank, to.row[n], place)) return {source, row, {nullptr, 0}};
  }
  return {source, row, to};
}

__device__ inline void clear_row(Number* row, int64_t width) {
  auto* words = reinterpret_cast<uint4*>(row);
  for (int64_t i = threadIdx.x % kWarp; i < width / 8; i += kWarp) words[i] = make_uint4(0, 0, 0, 0);
}

// By all threads of the blocks that take part.
__device__ inline void pull(const Rank& rank, CourierStorage* storage) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t bytes = rank.width * sizeof(Number);
  const unsigned units = static_cast<unsigned>(*rank.tiles) * kUnits;
  Courier courier(storage, warp, rank.pool_PD, rank.width);
  uint64_t filled = 0;  // sources that are known to have filled their windows
  for (;;) {
    unsigned unit = lane ? 0 : atomicAdd(&rank.counters[kNextPull], 1u);
    unit = __shfl_sync(kAllLanes, unit, 0);
    if (unit >= units) break;
    const int tile = rank.order_Q[unit / kUnits];
    const int first = tile * kTile + static_cast<int>(unit % kUnits) * kUnit;
    const Parcel mine = parcel_at(rank, first + lane % kUnit);
    int64_t remote = 0;
    for (int i = 0; i < kUnit; ++i) {
      const Parcel parcel = mine.of(i);
      if (parcel.source < 0) clear_row(rank.pool_PD + (first + i) * rank.width, rank.width);
      if (parcel.to.count == 0) continue;
      const int from = parcel.source;
      if (!(filled >> from & 1)) {
        if (lane == 0) wait_filled(rank, from);
        __syncwarp();
        fence_async();
        filled |= uint64_t{1} << from;
      }
      courier.bring(parcel.to, rank.window_R[from] + rank.rows_at + parcel.row * bytes);
      if (from != rank.rank) remote += bytes;
    }
    courier.finish();
    cross(rank, remote);
    __syncwarp();
    if (lane >= kUnit) continue;
    __threadfence();
    if (mine.source < 0) add_relaxed(&rank.counters[kReady + tile], 1);
    for (int n = 0; n < mine.to.count; ++n) {
      add_relaxed(&rank.counters[kReady + mine.to.row[n] / kTile], 1);
    }
  }
  courier.leave();
}

}  // namespace coterie::fused
