// What a thread, a block and a launch of a kernel in PTX are made of.
//
// Threads are the fibers of cuda_on_host.h, which draws the order in which they go on.
#pragma once

#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../cuda_on_host.h"
#include "order.h"
#include "program.h"

namespace on_ptx {

// A barrier in shared memory (PTX ISA, "mbarrier").
struct Barrier {
  uint32_t expected, pending;  // arrivals of a phase, and how many are still to come
  int64_t bytes = 0;           // that loads are still to bring
  uint32_t phase = 0;
};

struct Block {
  std::map<uint32_t, Barrier> barrier;          // by address
  std::vector<std::function<void()>> under_way;  // loads; they end in any order
  std::vector<int> registers;                    // of a thread of each warp (setmaxnreg)
  int free_registers = 0;

  // Of a barrier, among all that threads meet or tell each other at.
  uint64_t name_of(uint64_t barrier) const { return reinterpret_cast<uint64_t>(this) << 20 | barrier; }
};

inline bool chance(unsigned one_in) { return on_host::random()() % one_in == 0; }

// Asynchronous operations of one thread: done in order, at any time until it has waited for them.
struct Groups {
  using Operations = std::vector<std::function<void()>>;
  std::deque<Operations> group;
  Operations open;  // not yet committed

  void commit() {
    group.push_back(std::move(open));
    open.clear();
    if (chance(4)) wait(0);
  }
  // Until at most `but` of the groups are left.
  void wait(size_t but) {
    while (group.size() > but) {
      for (const auto& operation : group.front()) operation();
      group.pop_front();
    }
  }
};

// Stores to global memory, for what reads past them: bulk copies and tensor loads see them behind a
// fence.proxy.async only, by the thread that stored or, once it knows of them, by the one that loads.
class Stores {
 public:
  void store(uint64_t address, int64_t bytes) {
    for (uint64_t piece = address / kPiece; piece <= (address + bytes - 1) / kPiece; ++piece) {
      stored_[piece] = {on_host::now, ++clock_};
    }
  }
  void fence() { fenced_[on_host::now] = ++clock_; }
  void acquire() { acquired_[on_host::now] = ++clock_; }

  bool behind_fence(uint64_t address, int64_t bytes) const {
    if (stored_.empty()) return true;
    for (uint64_t piece = address / kPiece; piece <= (address + bytes - 1) / kPiece; ++piece) {
      const auto found = stored_.find(piece);
      if (found == stored_.end()) continue;
      const auto& [by, when] = found->second;
      const uint64_t known = std::max(when, last(acquired_, on_host::now));
      if (last(fenced_, by) < when && last(fenced_, on_host::now) < known) return false;
    }
    return true;
  }

 private:
  static constexpr uint64_t kPiece = 16;  // bytes

  using Times = std::unordered_map<const on_host::Fiber*, uint64_t>;
  static uint64_t last(const Times& times, const on_host::Fiber* thread) {
    const auto found = times.find(thread);
    return found == times.end() ? 0 : found->second;
  }

  std::unordered_map<uint64_t, std::pair<const on_host::Fiber*, uint64_t>> stored_;
  Times fenced_, acquired_;
  uint64_t clock_ = 0;
};

struct Thread {
  const Program& program;
  Block& block;
  Stores& stores;              // the launch's
  Order& order;                // the launch's
  char* shared;                // the block's
  const char* parameters;
  std::vector<uint64_t> slot;
  size_t pc = 0;
  bool done = false;
  const Instruction* now = nullptr;
  Groups products;
  Groups reads, writes;        // of bulk stores: of the source, and of the destination
  std::vector<std::pair<uint64_t, int64_t>> stored;  // by bulk stores that are not waited for yet

  template <class T>
  T get(const Operand& from) const {
    const uint64_t bits =
        from.kind == Operand::slot ? slot[from.at] : static_cast<uint64_t>(from.value);
    T value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  template <class T>
  void set(const Operand& to, T value) {
    if (to.kind == Operand::sink) return;
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    slot[to.at] = bits;
  }
  uint64_t address(const Operand& memory) const {
    return (memory.at < 0 ? 0 : slot[memory.at]) + static_cast<uint64_t>(memory.value);
  }

  [[noreturn]] void fail(const std::string& why) const {
    on_host::fail(now->opcode + ", line " + std::to_string(now->line) + " of the PTX: " + why);
  }

  // Where `bytes` of shared memory lie, from an address that is a multiple of `align`.
  char* shared_at(uint64_t address, int64_t bytes, int64_t align) const {
    if (address % align) fail("address " + std::to_string(address) + " is not aligned");
    if (address < kShared || address + bytes > kShared + kSharedBytes) {
      fail("address " + std::to_string(address) + " is not in shared memory");
    }
    return shared + (address - kShared);
  }
  // No barrier may lie where something is written.
  void check_no_barrier(uint64_t from, int64_t bytes) const {
    const auto found = block.barrier.lower_bound(static_cast<uint32_t>(from));
    if (found != block.barrier.end() && found->first < from + bytes) {
      fail("it overwrites the barrier at " + std::to_string(found->first));
    }
  }
  Barrier& barrier_at(uint32_t address) const {
    const auto found = block.barrier.find(address);
    if (found == block.barrier.end()) fail("there is no barrier at " + std::to_string(address));
    return found->second;
  }
};

// Lets others go on, at times: between any two threads there is no order but what they make.
inline void perhaps_give_way() {
  if (chance(8)) on_host::give_way(on_host::State::ready);
}

// Whether nobody has done anything but look for long. (Who waits for another rank does something.)
inline bool is_stuck() { return on_host::grid->still > 1000; }

// All lanes of a warp must be at the same instruction.
inline void meet_warp(Thread& thread) {
  on_host_all(static_cast<uint64_t>(thread.pc), [&](int, uint64_t pc) {
    if (pc != thread.pc) thread.fail("other lanes of the warp are elsewhere");
  });
}

using Table = std::map<std::string, Handler>;

void add_arithmetic(Table& table);
void add_memory(Table& table);
void add_control(Table& table);
void add_async(Table& table);
void add_products(Table& table);

}  // namespace on_ptx
