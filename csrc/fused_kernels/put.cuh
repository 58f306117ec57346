// Results go home: for each visit the sum over its rows here, weighted or not, is put into its own
// place in the window of the rank that it came from, slab after slab of columns.
//
// Sums are taken in fp32, in the order of experts: no two writers share a place, so equal inputs
// give equal bits. Each rank begins with the rank after it, so that not all write to one.
#pragma once

#include "flags.cuh"
#include "fragment.cuh"
#include "link.cuh"
#include "order.cuh"

namespace coterie::fused {

constexpr int kVisits = 8;  // of a unit; each warp takes the next unit

struct Visit {
  int64_t number;  // among all that this rank received
  int64_t source;
  int64_t row;  // in its source's window
};

// The i-th visit: those of rank - 1 first, then of rank - 2 and so on, this rank's own at last.
__device__ inline Visit visit_at(const Rank& rank, int64_t i) {
  for (int64_t turn = 1;; ++turn) {
    const int64_t source = (rank.rank + rank.ranks - turn % rank.ranks) % rank.ranks;
    const int64_t begin = rank.before_R1[source], count = rank.before_R1[source + 1] - begin;
    if (i < count) return {begin + i, source, rank.begin_R[source] + i};
    i -= count;
  }
}

// What a warp needs to know of a visit; each lane looks up one, and tells the others.
struct Errand {
  int64_t first, last;  // its rows in place_N
  Number* home;
  int remote;

  __device__ Errand of(int lane) const {
    return {
        __shfl_sync(kAllLanes, first, lane), __shfl_sync(kAllLanes, last, lane),
        reinterpret_cast<Number*>(
            __shfl_sync(kAllLanes, reinterpret_cast<unsigned long long>(home), lane)),
        __shfl_sync(kAllLanes, remote, lane)};
  }
};

__device__ inline Errand errand_at(const Rank& rank, int64_t i) {
  const Visit visit = visit_at(rank, i);
  auto* home = reinterpret_cast<Number*>(rank.window_R[visit.source] + rank.home_at);
  return {
      rank.offset_V1[visit.number], rank.offset_V1[visit.number + 1],
      home + visit.row * rank.width, visit.source != rank.rank};
}

constexpr int kAhead = 4;              // loads of a lane that are on the way together
constexpr int kPass = kWarp * 8;       // columns that a warp reads at a time

// By one warp: columns [begin, end) of one visit's sum.
__device__ inline void put_visit(
    const Rank& rank, const Errand& errand, int64_t begin, int64_t end) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t d = begin + lane * 8; d - lane * 8 < end; d += kAhead * kPass) {
    float sum[kAhead][8] = {};
    for (int64_t chunk = errand.first; chunk < errand.last; chunk += kWarp) {
      const int64_t j = chunk + lane;
      const int my_place = j < errand.last ? rank.place_N[j] : 0;
      const float my_weight = j < errand.last && rank.weight_P ? rank.weight_P[my_place] : 1.0f;
      const int count = errand.last - chunk < kWarp ? static_cast<int>(errand.last - chunk) : kWarp;
      for (int n = 0; n < count; ++n) {
        const int64_t place = __shfl_sync(kAllLanes, my_place, n);
        const float weight = __shfl_sync(kAllLanes, my_weight, n);
        uint4 y[kAhead];
#pragma unroll
        for (int c = 0; c < kAhead; ++c) {
          if (d + c * kPass < end) y[c] = load_16(rank.pool_PD + place * rank.width + d + c * kPass);
        }
#pragma unroll
        for (int c = 0; c < kAhead; ++c) {
          if (d + c * kPass >= end) continue;
          const uint32_t word[4] = {y[c].x, y[c].y, y[c].z, y[c].w};
#pragma unroll
          for (int w = 0; w < 4; ++w) {
            const Pair pair = unpacked(word[w]);
            sum[c][2 * w] += weight * pair.first;
            sum[c][2 * w + 1] += weight * pair.second;
          }
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kAhead; ++c) {
      if (d + c * kPass >= end) continue;
      store_16(
          errand.home + d + c * kPass, packed(sum[c][0], sum[c][1]), packed(sum[c][2], sum[c][3]),
          packed(sum[c][4], sum[c][5]), packed(sum[c][6], sum[c][7]));
    }
  }
}

// By the warps of all blocks that take part.
template <int kColumns>
__device__ void put(const Rank& rank) {
  const int lane = threadIdx.x % kWarp;
  const int columns = columns_of<kColumns>(rank.width), slabs = static_cast<int>(rank.slabs);
  const int64_t visits = rank.before_R1[rank.ranks];
  const int64_t units = (visits + kVisits - 1) / kVisits;
  const auto tiles = static_cast<uint32_t>(*rank.tiles);
  int there = -1;  // the last slab that is known to be there
  for (;;) {
    unsigned unit = lane ? 0 : atomicAdd(&rank.counters[kNextPut], 1u);
    unit = __shfl_sync(kAllLanes, unit, 0);
    if (unit >= units * slabs) break;
    const int slab = static_cast<int>(unit / units);
    const int first = slab_begin(columns, slabs, slab), last = slab_begin(columns, slabs, slab + 1);
    if (slab != there) {
      const uint32_t wanted = tiles * (last - first);
      if (lane == 0) wait<false>(rank, &rank.counters[kSlab + slab], wanted, kSlabDone, slab);
      __syncwarp();
      there = slab;
    }
    const int64_t begin = static_cast<int64_t>(first) * kColumns;
    const int64_t end = last == columns ? rank.width : static_cast<int64_t>(last) * kColumns;
    const int64_t from = unit % units * kVisits;
    const int count = static_cast<int>(visits - from < kVisits ? visits - from : kVisits);
    const Errand mine = errand_at(rank, from + (lane < count ? lane : 0));
    int64_t remote = 0;
    for (int n = 0; n < count; ++n) {
      const Errand errand = mine.of(n);
      put_visit(rank, errand, begin, end);
      remote += errand.remote * (end - begin) * static_cast<int64_t>(sizeof(Number));
    }
    cross(rank, remote);
  }
}

}  // namespace coterie::fused
