// A launch that begins with rows from all ranks: the first blocks pull them into the pool, the others
// compute tiles whose rows are there, in the order in which they come; when all rows are there, the
// first ones help.
#pragma once

#include "launch.cuh"
#include "order.cuh"
#include "pull.cuh"

namespace coterie::fused {

// Until all rows of a tile are there, for boxes that are loaded from now on.
__device__ inline void wait_rows(const Rank& rank, const Tile& tile) {
  if (!rank.pulls) return;
  wait<false>(rank, &rank.counters[kReady + tile.number], kTile, kReadyTile, tile.number);
  fence_async();
}

// By all threads, before anything else.
__device__ inline void pull_first(const Rank& rank, int movers, CourierStorage& storage) {
  if (!rank.pulls) return;
  if (blockIdx.x == 0) tell_filled(rank);
  if (static_cast<int>(blockIdx.x) >= movers) return;
  pull(rank, &storage);
  __syncthreads();
  if (rank.closes && threadIdx.x == 0) close(rank, movers);
  __syncthreads();
}

// The whole of such a kernel.
template <class Task>
__device__ __forceinline__ void receive_and_compute(const Launch& launch, int movers) {
  const Rank& rank = launch.rank[blockIdx.y];
  const Maps& maps = launch.maps[blockIdx.y];
  auto& storage = *shared_memory<Storage<Task::kColumns>>();
  pull_first(rank, movers, storage.courier);
  split(
      storage,
      [&](auto& line) { load_tiles<Task>(rank, maps, storage, line, Task::count(rank)); },
      [&](auto& line) { multiply_tiles<Task>(rank, storage, line); });
}

template <class Task>
void start_receiving(
    void (*kernel)(const Launch, const int), const Tensor& table, const Tensor& like, int64_t each,
    int64_t communication) {
  const Blocks blocks = blocks_for(table, like, each, communication);
  const int movers = static_cast<int>(std::max<int64_t>(blocks.movers, 1));
  start<Task::kColumns>(kernel, table, like, blocks, launch_of<Task>(table), movers);
}

}  // namespace coterie::fused
