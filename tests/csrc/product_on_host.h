// Products of tiles on the host: the boxes that the GPU's loader would fetch are copied, with zeros
// beyond the edges, and each multiplying thread adds up its own sums from them. Between the two
// sides there is one stage.
#pragma once

#include "fused_kernels/courier.cuh"
#include "fused_kernels/flags.cuh"
#include "fused_kernels/fragment.cuh"
#include "fused_kernels/product.cuh"

namespace coterie::fused {

template <int kColumns>
struct Storage {
  float left[kTile][kDepth];
  float right[kColumns][kDepth];
  CourierStorage courier;
  int item;
  alignas(16) int place[7];
  int loaded, used;  // stages so far
};

// One side's place in the line of stages.
template <int kColumns>
struct Line {
  Storage<kColumns>& storage;
  int stage = 0;
};

// Of a box that is `rows` x `columns`, calls set(inner, outer, number).
template <class Set>
void load_box(const Map& map, Box box, int rows, int columns, const Set& set) {
  for (int outer = 0; outer < rows; ++outer) {
    for (int inner = 0; inner < columns; ++inner) {
      const int64_t x = box.x + inner, y = box.y + outer;
      const bool inside = x >= 0 && x < map.columns && y >= 0 && y < map.rows;
      set(inner, outer, inside ? static_cast<float>(map.start[y * map.columns + x]) : 0.0f);
    }
  }
}

template <Along kAlong, int kRows, int kBoxes, class Where>
void load_factor(const Map& map, float (*to)[kDepth], const Where& where) {
  for (int box = 0; box < kBoxes; ++box) {
    if constexpr (kAlong == Along::k) {
      const int first = box * (kRows / kBoxes);
      load_box(map, where(box), kRows / kBoxes, kDepth, [&](int k, int row, float x) {
        to[first + row][k] = x;
      });
    } else {
      load_box(map, where(box), kDepth, 64, [&](int row, int k, float x) {
        to[box * 64 + row][k] = x;
      });
    }
  }
}

inline float dot(const float* a, const float* b) {
  float lane[8] = {};
  for (int k = 0; k < kDepth; k += 8) {
    for (int i = 0; i < 8; ++i) lane[i] += a[k + i] * b[k + i];
  }
  return ((lane[0] + lane[1]) + (lane[2] + lane[3])) + ((lane[4] + lane[5]) + (lane[6] + lane[7]));
}

template <int kColumns>
void acquire_stage(Line<kColumns>& line) {
  while (line.storage.used < line.stage) on_host::spin();
}

template <int kColumns>
void hand_on(Line<kColumns>& line) { line.storage.loaded = ++line.stage; }

template <int kColumns>
void wait_stage(Line<kColumns>& line) {
  while (line.storage.loaded <= line.stage) on_host::spin();
}

template <int kColumns>
void release_stage(Line<kColumns>& line) {
  named_barrier(9, kMultipliers);
  ++line.stage;
  line.storage.used = line.stage;
}

template <class Task>
void load_tiles(
    const Rank& rank, const Maps& maps, Storage<Task::kColumns>& storage,
    Line<Task::kColumns>& line, int limit) {
  const int count = Task::count(rank);
  for (bool more = true;;) {
    const int i = more ? static_cast<int>(atomicAdd(&rank.counters[kNextTile], 1u)) : count;
    more = i < limit;
    acquire_stage(line);
    storage.item = i < count ? i : -1;
    if (i < count) reinterpret_cast<typename Task::Place&>(storage.place) = Task::place(rank, i);
    if (i >= count) {
      hand_on(line);
      return;
    }
    const Task task(rank, reinterpret_cast<const typename Task::Place&>(storage.place));
    if (task.steps() == 0) {
      hand_on(line);
      continue;
    }
    task.wait();
    for (int step = 0; step < task.steps(); ++step) {
      acquire_stage(line);
      load_factor<Task::kLeft, kTile, boxes_of<Task::kLeft, kTile>()>(
          maps.left, storage.left, [&](int box) { return task.left(step, box); });
      load_factor<Task::kRight, Task::kColumns, Task::kRightBoxes>(
          maps.right, storage.right, [&](int box) { return task.right(step, box); });
      hand_on(line);
    }
  }
}

template <class Task>
void multiply_tiles(
    const Rank& rank, Storage<Task::kColumns>& storage, Line<Task::kColumns>& line) {
  constexpr int kOfThread = kSums<Task::kColumns>;
  const int thread = static_cast<int>(threadIdx.x) - kLoaders;
  for (;;) {
    wait_stage(line);
    const int i = storage.item;
    if (i < 0) {
      release_stage(line);
      return;
    }
    const Task task(rank, reinterpret_cast<const typename Task::Place&>(storage.place));
    float sum[kOfThread] = {};
    if (task.steps() == 0) release_stage(line);
    for (int step = 0; step < task.steps(); ++step) {
      wait_stage(line);
      for (int at = 0; at < kOfThread; ++at) {
        const int row = row_of(thread, at / 2 % 2), column = column_of(thread, at / 4) + at % 2;
        sum[at] += dot(storage.left[row], storage.right[column]);
      }
      release_stage(line);
    }
    task.store(thread, sum);
    if constexpr (Task::kTells) {
      named_barrier(8, kMultipliers);
      if (thread == 0) task.tell();
    }
  }
}

template <int kColumns, class Load, class Multiply>
void split(Storage<kColumns>& storage, const Load& load, const Multiply& multiply) {
  storage.loaded = storage.used = 0;
  __syncthreads();
  Line<kColumns> line{storage};
  if (threadIdx.x == 0) load(line);
  if (threadIdx.x >= kLoaders) multiply(line);
}

inline void meet_multipliers() { named_barrier(8, kMultipliers); }

}  // namespace coterie::fused
