// Flags and counters between blocks and ranks, and what happens when one never comes.
#pragma once

#include "../device.cuh"
#include "rank.h"

namespace coterie::fused {

#ifdef COTERIE_ON_HOST

inline uint32_t acquire(const uint32_t* at) { return __atomic_load_n(at, __ATOMIC_SEQ_CST); }
inline uint32_t acquire_system(const uint32_t* at) { return acquire(at); }
inline void release_system(uint32_t* at, uint32_t value) { __atomic_store_n(at, value, __ATOMIC_SEQ_CST); }
inline void add_release(uint32_t* at, uint32_t value) { __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST); }
inline void add_relaxed(uint32_t* at, uint32_t value) { add_release(at, value); }
inline void fence_async() {}
inline int64_t nanoseconds() { return on_host::nanoseconds(); }
inline void rest() { on_host::spin(); }

#else

__device__ __forceinline__ uint32_t acquire(const uint32_t* at) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}

__device__ __forceinline__ uint32_t acquire_system(const uint32_t* at) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}

__device__ __forceinline__ void release_system(uint32_t* at, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}

__device__ __forceinline__ void add_release(uint32_t* at, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}

// After __threadfence() as good as add_release.
__device__ __forceinline__ void add_relaxed(uint32_t* at, uint32_t value) {
  asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
}

// What ordinary stores wrote is seen by bulk copies and TMA from here on.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

__device__ __forceinline__ int64_t nanoseconds() {
  int64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

__device__ __forceinline__ void rest() { __nanosleep(20); }

#endif

// Leaves word on the host of what was waited for in vain, and stops the launch.
__device__ inline void complain(
    const Rank& rank, Complaint what, int64_t index, uint32_t wanted, uint32_t seen) {
  volatile int64_t* word = rank.failure;
  word[1] = rank.rank;
  word[2] = index;
  word[3] = wanted;
  word[4] = seen;
  __threadfence_system();
  word[0] = what;
  __threadfence_system();
  __trap();
}

__device__ __forceinline__ bool reached(uint32_t value, uint32_t wanted) {
  return static_cast<int32_t>(value - wanted) >= 0;
}

// Waits until an epoch or a count is reached. `index`: the tile, slab or rank that is waited for.
// What waits for this rank's own work waits longer: the cause is to complain, not the consequence.
template <bool kSystem>
__device__ void wait(
    const Rank& rank, const uint32_t* at, uint32_t wanted, Complaint what, int64_t index) {
  auto seen = [&] { return kSystem ? acquire_system(at) : acquire(at); };
  uint32_t value = seen();
  if (reached(value, wanted)) return;
  const int64_t until = nanoseconds() + (kSystem ? 1 : 2) * rank.patience;
  while (!reached(value = seen(), wanted)) {
    if (nanoseconds() > until) complain(rank, what, index, wanted, value);
    rest();
  }
}

__device__ inline Flags* flags(const Rank& rank, int64_t of) {
  return reinterpret_cast<Flags*>(rank.window_R[of]);
}

// Tells all ranks that this one's rows are in its window; by all threads of one block.
__device__ inline void tell_filled(const Rank& rank) {
  for (int64_t peer = threadIdx.x; peer < rank.ranks; peer += blockDim.x) {
    release_system(&flags(rank, peer)->filled_R[rank.rank], static_cast<uint32_t>(rank.epoch));
  }
}

// Notes how long another rank was waited for: since `began`.
__device__ inline void note_wait(const Rank& rank, int64_t index, int64_t began) {
  auto* waits = reinterpret_cast<unsigned long long*>(rank.waits);
  atomicAdd(&waits[index], static_cast<unsigned long long>(nanoseconds() - began));
}

// By one thread of each warp that needs them; the first one to wait, which waits longest, notes it.
__device__ inline void wait_filled(const Rank& rank, int64_t source) {
  const uint32_t* at = &flags(rank, rank.rank)->filled_R[source];
  const auto epoch = static_cast<uint32_t>(rank.epoch);
  if (reached(acquire_system(at), epoch)) return;
  const bool first = rank.waits && atomicAdd(&rank.counters[kAwaited + source], 1u) == 0;
  const int64_t began = nanoseconds();
  wait<true>(rank, at, epoch, kFilled, source);
  if (first) note_wait(rank, source, began);
}

// Of the blocks that call it, the last one tells all ranks that this one is done with them, and
// waits until they are; by one thread of each block, after all of its threads have finished. What is
// noted of each rank counts from here, so that the last to come stands out.
__device__ inline void close(const Rank& rank, unsigned blocks) {
  __threadfence_system();
  if (atomicAdd(&rank.counters[kFinished], 1u) != blocks - 1) return;
  __threadfence_system();
  const auto epoch = static_cast<uint32_t>(rank.epoch);
  for (int64_t peer = 0; peer < rank.ranks; ++peer) {
    release_system(&flags(rank, peer)->done_R[rank.rank], epoch);
  }
  const int64_t began = nanoseconds();
  for (int64_t peer = 0; peer < rank.ranks; ++peer) {
    const uint32_t* at = &flags(rank, rank.rank)->done_R[peer];
    if (reached(acquire_system(at), epoch)) continue;
    wait<true>(rank, at, epoch, kDone, peer);
    if (rank.waits) note_wait(rank, rank.ranks + peer, began);
  }
}

}  // namespace coterie::fused
