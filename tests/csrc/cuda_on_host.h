// Runs CUDA kernels on the host: every thread of a launch is a fiber, which gives way at barriers,
// shuffles, some atomics and while it spins. Warps take turns in an order drawn at random, some
// fall behind, and a warp begins with any lane: what no barrier or flag orders comes in any order.
//
// Blocks of an ordinary launch run one after the other, in any order, those of a cooperative one
// together. Shared memory is poisoned. What it has not: memory that is seen late (fences do
// nothing), TMA, wgmma.
//
// Environment: COTERIE_ON_HOST_SEED (of the order; default 0), COTERIE_ON_HOST_PTX (see
// launch_together).
#pragma once

#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "ptx/run.h"
#include "stack_switch.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
using std::max;
using std::min;

namespace on_host {

constexpr int kLanes = 32;
constexpr int kBarriers = 16;  // named ones of a block
#ifdef __SANITIZE_ADDRESS__
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif

enum class State { ready, spinning, at_warp, at_block, at_named, done };

struct Block;

struct Fiber {
  Stack stack = nullptr;
  State state = State::ready;
  int barrier = 0, among = 0;  // a named barrier, and how many threads meet there
  uint64_t value = 0;          // what a shuffle gives to the others
  dim3 thread;
  Block* block = nullptr;
};

struct Block {
  dim3 index;
  std::vector<Fiber> fibers;
  std::unique_ptr<void, decltype(&std::free)> shared{nullptr, std::free};
};

struct Grid {
  dim3 blocks, threads;
  std::function<void()> body;
  Stack scheduler = nullptr;
  std::string failure;
  int still = 0;  // rounds, up to now, in which all threads waited or spun
};

inline thread_local Grid* grid = nullptr;
inline thread_local Fiber* now = nullptr;
inline std::mt19937& random() {
  static const char* const seed = std::getenv("COTERIE_ON_HOST_SEED");
  static std::mt19937 generator(seed ? std::atoi(seed) : 0);
  return generator;
}

// What was left on a stack by frames that never returned.
#ifdef __SANITIZE_ADDRESS__
inline void forget_frames(void* start, size_t bytes) {
  __asan_unpoison_memory_region(start, bytes);
}
#else
inline void forget_frames(void*, size_t) {}
#endif

inline void give_way(State state) {
  now->state = state;
  switch_stack(&now->stack, grid->scheduler);
}

inline void start() {
  grid->body();
  give_way(State::done);
}

[[noreturn]] inline void fail(const std::string& why) {
  grid->failure = why;
  for (;;) give_way(State::done);
}

// One allocation for the stacks of all fibers; pages that nobody touches cost nothing.
class Stacks {
 public:
  explicit Stacks(size_t count) : bytes_(count * kStack) {
    start_ = static_cast<char*>(mmap(
        nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
        0));
    if (start_ == MAP_FAILED) throw std::runtime_error("no memory for the stacks of fibers");
  }
  ~Stacks() {
    forget_frames(start_, bytes_);
    munmap(start_, bytes_);
  }
  char* of(size_t number) { return start_ + number * kStack; }

 private:
  size_t bytes_;
  char* start_;
};

// Lets those go on who wait at a barrier that all have reached (or left for good).
inline void release(Block& block) {
  auto& fibers = block.fibers;
  const size_t count = fibers.size();
  for (size_t first = 0; first < count; first += kLanes) {
    const size_t end = std::min(first + kLanes, count);
    bool all = true, any = false;
    for (size_t i = first; i < end; ++i) {
      any |= fibers[i].state == State::at_warp;
      all &= fibers[i].state == State::at_warp || fibers[i].state == State::done;
    }
    for (size_t i = first; any && all && i < end; ++i) {
      if (fibers[i].state == State::at_warp) fibers[i].state = State::ready;
    }
  }
  bool all = true;
  for (auto& fiber : fibers) all &= fiber.state == State::at_block || fiber.state == State::done;
  if (all) {
    for (auto& fiber : fibers) {
      if (fiber.state == State::at_block) fiber.state = State::ready;
    }
  }
  int waiting[kBarriers] = {}, among[kBarriers] = {};
  for (auto& fiber : fibers) {
    if (fiber.state != State::at_named) continue;
    ++waiting[fiber.barrier];
    int& wanted = among[fiber.barrier];
    if (wanted && wanted != fiber.among) grid->failure = "threads disagree who meets at a barrier";
    wanted = fiber.among;
  }
  for (auto& fiber : fibers) {
    const int b = fiber.barrier;
    if (fiber.state == State::at_named && waiting[b] >= among[b]) fiber.state = State::ready;
  }
}

// Runs blocks until all their threads are done.
inline void run(std::vector<Block>& blocks) {
  struct Warp {
    Block* block;
    size_t first;
  };
  std::vector<Warp> warps;
  for (auto& block : blocks) {
    for (size_t i = 0; i < block.fibers.size(); i += kLanes) warps.push_back({&block, i});
  }
  // lanes in order, from any of them on
  auto lanes = [](const Warp& warp, auto&& visit) {
    const size_t count = std::min<size_t>(kLanes, warp.block->fibers.size() - warp.first);
    const size_t begin = random()() % count;
    for (size_t i = 0; i < count; ++i) visit(warp.block->fibers[warp.first + (begin + i) % count]);
  };
  // in some launches one warp is far behind all others
  const Warp slow = random()() % 4 == 0 ? warps[random()() % warps.size()] : Warp{};
  while (grid->failure.empty()) {
    std::shuffle(warps.begin(), warps.end(), random());
    const bool behind = random()() % 4 != 0;  // in most rounds some warps are left out
    bool left = false, ran = false, moved = false, skipped = false;
    for (auto& warp : warps) {
      const bool lags = warp.block == slow.block && warp.first == slow.first;
      if ((behind && random()() % 3 == 0) || (lags && random()() % 16 != 0)) {
        skipped = true;
        continue;
      }
      lanes(warp, [&](Fiber& fiber) {
        if (fiber.state != State::ready && fiber.state != State::spinning) return;
        const bool spun = fiber.state == State::spinning;
        now = &fiber;
        switch_stack(&grid->scheduler, fiber.stack);
        ran = true;
        moved |= !(spun && fiber.state == State::spinning);
      });
      release(*warp.block);
      if (!grid->failure.empty()) break;
    }
    for (auto& block : blocks) {
      for (auto& fiber : block.fibers) left |= fiber.state != State::done;
    }
    if (!left) return;
    if (!ran && !skipped) {
      throw std::runtime_error("threads wait at barriers that others never reach");
    }
    grid->still = moved ? 0 : grid->still + 1;
    if (!moved && !skipped) sched_yield();  // all spin: for another process, perhaps
  }
}

inline void prepare(Block& block, dim3 index, dim3 threads, size_t shared, char* stacks) {
  const size_t count = static_cast<size_t>(threads.x) * threads.y * threads.z;
  block.index = index;
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, std::max<size_t>(shared, 1))) throw std::bad_alloc();
  block.shared.reset(memory);
  std::memset(memory, 0xCD, shared);  // poison
  block.fibers.resize(count);
  for (size_t i = 0; i < count; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.block = &block;
    fiber.thread = dim3(i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y);
    forget_frames(stacks + i * kStack, kStack);
    fiber.stack = new_stack(stacks + i * kStack, kStack, start);
  }
}

inline void launch(
    dim3 blocks, dim3 threads, size_t shared, bool together, std::function<void()> body) {
  const size_t count = static_cast<size_t>(threads.x) * threads.y * threads.z;
  std::vector<dim3> order;
  for (unsigned z = 0; z < blocks.z; ++z)
    for (unsigned y = 0; y < blocks.y; ++y)
      for (unsigned x = 0; x < blocks.x; ++x) order.emplace_back(x, y, z);
  std::shuffle(order.begin(), order.end(), random());
  const size_t at_a_time = together ? order.size() : 1;
  Stacks stacks(count * std::max<size_t>(at_a_time, 1));
  Grid here{blocks, threads, std::move(body)};
  Grid* outside = grid;
  grid = &here;
  std::string failure;
  try {
    for (size_t begin = 0; begin < order.size() && here.failure.empty(); begin += at_a_time) {
      std::vector<Block> running(at_a_time);
      for (size_t b = 0; b < at_a_time; ++b) {
        prepare(running[b], order[begin + b], threads, shared, stacks.of(b * count));
      }
      run(running);
    }
  } catch (const std::exception& error) {
    here.failure = error.what();
  }
  grid = outside;
  if (!here.failure.empty()) throw std::runtime_error("kernel on the host: " + here.failure);
}

// A cooperative launch: of the kernel's source, or, where COTERIE_ON_HOST_PTX names a folder, of what
// nvcc made of it.
template <class... Parameters>
void launch_together(
    void (*kernel)(Parameters...), dim3 blocks, dim3 threads, size_t shared,
    std::type_identity_t<Parameters>... arguments) {
  const char* ptx = std::getenv("COTERIE_ON_HOST_PTX");
  if (!ptx) return launch(blocks, threads, shared, true, [&] { kernel(arguments...); });
  if (!on_ptx::launch) throw std::runtime_error("this library runs no PTX");
  on_ptx::launch(
      ptx, reinterpret_cast<const void*>(kernel), blocks, threads,
      {{&arguments, sizeof arguments}...});
}

inline void* shared_memory() { return now->block->shared.get(); }

inline size_t number() { return static_cast<size_t>(now - now->block->fibers.data()); }

// The value that lane gives; all lanes of the warp take part.
template <class T>
T exchange(T mine, int lane) {
  static_assert(sizeof(T) <= 8);
  std::memcpy(&now->value, &mine, sizeof mine);
  give_way(State::at_warp);
  const size_t from = number() / kLanes * kLanes + lane;
  auto& fibers = now->block->fibers;
  if (from >= fibers.size() || fibers[from].state == State::done) fail("a shuffle from no lane");
  T theirs;
  std::memcpy(&theirs, &fibers[from].value, sizeof theirs);
  give_way(State::at_warp);
  return theirs;
}

inline int64_t nanoseconds() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

// How a thread waits for what another one does.
inline void spin() { give_way(State::spinning); }

}  // namespace on_host

#define threadIdx (on_host::now->thread)
#define blockIdx (on_host::now->block->index)
#define blockDim (on_host::grid->threads)
#define gridDim (on_host::grid->blocks)

inline void __syncthreads() { on_host::give_way(on_host::State::at_block); }
inline void __syncwarp(unsigned = ~0u) { on_host::give_way(on_host::State::at_warp); }
inline void __threadfence() {}
inline void __threadfence_system() {}
[[noreturn]] inline void __trap() { on_host::fail("trap"); }

// bar.sync barrier, among
inline void named_barrier(int barrier, int among) {
  on_host::now->barrier = barrier;
  on_host::now->among = among;
  on_host::give_way(on_host::State::at_named);
}

inline int on_host_lane() { return static_cast<int>(on_host::number() % on_host::kLanes); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return on_host::exchange(value, lane & 31);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return on_host::exchange(value, (on_host_lane() ^ mask) & 31);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int delta) {
  const int lane = on_host_lane();
  return on_host::exchange(value, lane + delta < 32 ? lane + delta : lane);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int delta) {
  const int lane = on_host_lane();
  return on_host::exchange(value, lane >= delta ? lane - delta : lane);
}
// f of the values of the lanes that are there: f(lane, value), in order.
template <class T, class F>
void on_host_all(T value, const F& f) {
  std::memcpy(&on_host::now->value, &value, sizeof value);
  on_host::give_way(on_host::State::at_warp);
  const size_t first = on_host::number() / on_host::kLanes * on_host::kLanes;
  auto& fibers = on_host::now->block->fibers;
  for (size_t i = first; i < std::min(first + on_host::kLanes, fibers.size()); ++i) {
    if (fibers[i].state == on_host::State::done) continue;
    std::memcpy(&value, &fibers[i].value, sizeof value);
    f(static_cast<int>(i - first), value);
  }
  on_host::give_way(on_host::State::at_warp);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  unsigned votes = 0;
  on_host_all(predicate, [&](int lane, int vote) { votes |= (vote ? 1u : 0u) << lane; });
  return votes;
}
// Bits of the lanes that hold the same value.
template <class T>
unsigned __match_any_sync(unsigned, T mine) {
  unsigned equal = 0;
  on_host_all(mine, [&](int lane, T value) { equal |= (value == mine ? 1u : 0u) << lane; });
  return equal;
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  unsigned most = 0;
  on_host_all(value, [&](int, unsigned other) { most = std::max(most, other); });
  return most;
}
inline unsigned __reduce_min_sync(unsigned, unsigned value) {
  unsigned least = ~0u;
  on_host_all(value, [&](int, unsigned other) { least = std::min(least, other); });
  return least;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }

// Between processes too: windows are files there.
template <class T>
T atomicAdd(T* at, std::type_identity_t<T> value) {
  if (on_host::random()() % 4 == 0) on_host::give_way(on_host::State::ready);
  if constexpr (std::is_integral_v<T>) {
    return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);
  } else {
    const T before = *at;
    *at = before + value;
    return before;
  }
}
template <class T>
T atomicMax(T* at, std::type_identity_t<T> value) {
  const T before = *at;
  *at = std::max(before, value);
  return before;
}
template <class T>
T __ldg(const T* at) {
  return *at;
}
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
