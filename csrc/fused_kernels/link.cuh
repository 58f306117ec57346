// An emulated link: rows that come from or go to other ranks take as long as at rank.pace.
#pragma once

#include "flags.cuh"

namespace coterie::fused {

// Waits until the link, which all warps of a rank share, has carried `bytes` more; by a warp.
__device__ inline void cross(const Rank& rank, int64_t bytes) {
  if (!rank.pace || !bytes) return;
  if (threadIdx.x % kWarp == 0) {
    auto* busy_until = reinterpret_cast<unsigned long long*>(&rank.counters[kLinkBusy]);
    const unsigned long long cost = bytes * 1000 / rank.pace;
    atomicMax(busy_until, static_cast<unsigned long long>(nanoseconds()));  // no credit for idling
    const auto until = static_cast<int64_t>(atomicAdd(busy_until, cost) + cost);
    while (nanoseconds() < until) rest();
  }
  __syncwarp();
}

}  // namespace coterie::fused
