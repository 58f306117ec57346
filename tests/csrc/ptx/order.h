// What a warp may know of what others stored: only what came before in some order that it can rely
// on, by release and acquire, fences, and barriers (PTX ISA, "Memory Consistency Model"). On the host
// all stores are seen at once; here a load that relies on luck fails.
//
// Clocks are vectors over the warps of a launch; lanes of a warp count as one.
#pragma once

#include <algorithm>
#include <map>
#include <unordered_map>
#include <vector>

#include "../cuda_on_host.h"

namespace on_ptx {

class Order {
 public:
  explicit Order(int warps) : warps_(warps), warp_(warps, Warp{Clock(warps), {}, Clock(warps)}) {
    for (int i = 0; i < warps; ++i) warp_[i].now[i] = 1;
  }

  // Ordinary accesses to global memory; false: nothing orders it behind the last store there.
  bool load(uint64_t address, int64_t bytes) const {
    for (uint64_t word = address / kWord; word <= (address + bytes - 1) / kWord; ++word) {
      const auto found = stored_.find(word);
      if (found != stored_.end() && mine().now[found->second.by] < found->second.when) return false;
    }
    return true;
  }
  bool store(uint64_t address, int64_t bytes) {
    const bool ordered = load(address, bytes);
    for (uint64_t word = address / kWord; word <= (address + bytes - 1) / kWord; ++word) {
      stored_[word] = {number(), mine().now[number()]};
    }
    return ordered;
  }

  // At a flag, a counter, or a barrier.
  void release(uint64_t at) {
    join(told_[at], mine().now);
    ++mine().now[number()];
  }
  void acquire(uint64_t at) { join(mine().now, told_[at]); }

  // Without an order of their own: fences before and behind make one.
  void relaxed_store(uint64_t at) { join(told_[at], mine().fenced); }
  void relaxed_load(uint64_t at) { join(mine().seen, told_[at]); }
  void fence() {
    join(mine().now, mine().seen);
    mine().fenced = mine().now;
    ++mine().now[number()];
  }

 private:
  static constexpr uint64_t kWord = 4;  // bytes
  using Clock = std::vector<uint32_t>;
  struct Warp {
    Clock now;
    Clock fenced;  // as it was at the last fence
    Clock seen;    // what relaxed loads told of, up to the next fence
  };
  struct Store {
    int by;
    uint32_t when;
  };

  int number() const {
    const auto& block = on_host::now->block->index;
    const auto& grid = on_host::grid->blocks;
    const size_t each = on_host::now->block->fibers.size() / on_host::kLanes;
    return static_cast<int>(
        (block.y * grid.x + block.x) * each + on_host::number() / on_host::kLanes);
  }
  Warp& mine() { return warp_[number()]; }
  const Warp& mine() const { return warp_[number()]; }
  void join(Clock& to, const Clock& from) const {
    to.resize(warps_);
    for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
  }

  int warps_;
  std::vector<Warp> warp_;
  std::unordered_map<uint64_t, Store> stored_;  // by word
  std::unordered_map<uint64_t, Clock> told_;
};

}  // namespace on_ptx
