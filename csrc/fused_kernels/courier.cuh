// A warp's copies from one place in global memory to another, through its share of shared memory:
// several on the way at a time, without passing through registers.
#pragma once

#include "../device.cuh"
#include "rank.h"

namespace coterie::fused {

constexpr int kSlots = 4;        // pieces of a warp in shared memory
constexpr int kPiece = 4 << 10;  // bytes

#ifdef COTERIE_ON_HOST

struct CourierStorage {};

class Courier {
 public:
  Courier(CourierStorage*, int) {}
  void bring(void* to, const void* from, int64_t bytes) {
    for (int64_t i = threadIdx.x % kWarp * 16; i < bytes; i += kWarp * 16) {
      std::memcpy(static_cast<char*>(to) + i, static_cast<const char*>(from) + i, 16);
    }
  }
  void finish() {}
  void leave() {}
};

#else

struct CourierStorage {
  static constexpr int kWarps = kThreads / kWarp;
  alignas(128) unsigned char piece[kWarps][kSlots][kPiece];
  uint64_t arrived[kWarps][kSlots];
  struct {
    void* to;
    uint32_t bytes;
  } bound[kWarps][kSlots];
};

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Its first lane does the work; all lanes of the warp call it alike. Loads run up to kSlots - 1
// pieces ahead of stores: one slot's store may still be reading.
class Courier {
 public:
  __device__ Courier(CourierStorage* storage, int warp) : storage_(storage), warp_(warp) {
    if (!leads()) return;
    for (int slot = 0; slot < kSlots; ++slot) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(arrived(slot)) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }

  __device__ void bring(void* to, const void* from, int64_t bytes) {
    if (!leads()) return;
    for (int64_t done = 0; done < bytes; done += kPiece) {
      const auto size = static_cast<uint32_t>(bytes - done < kPiece ? bytes - done : kPiece);
      load(static_cast<char*>(to) + done, static_cast<const char*>(from) + done, size);
    }
  }

  // Until all that was brought is there, for whoever is told by this thread.
  __device__ void finish() {
    if (!leads()) return;
    while (stored_ < loaded_) store();
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    asm volatile("fence.proxy.async.global;" ::: "memory");
  }

  // Gives the shared memory back for other uses; after finish().
  __device__ void leave() {
    if (!leads()) return;
    for (int slot = 0; slot < kSlots; ++slot) {
      asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(arrived(slot)) : "memory");
    }
  }

 private:
  __device__ bool leads() const { return threadIdx.x % kWarp == 0; }
  __device__ uint32_t arrived(uint32_t slot) const {
    return shared_address(&storage_->arrived[warp_][slot]);
  }

  __device__ void load(void* to, const void* from, uint32_t bytes) {
    if (loaded_ - stored_ == kSlots - 1) store();
    // all stores but the youngest have left their slots
    asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
    const uint32_t slot = loaded_ % kSlots;
    storage_->bound[warp_][slot] = {to, bytes};
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(arrived(slot)), "r"(bytes)
        : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(shared_address(storage_->piece[warp_][slot])),
        "l"(from), "r"(bytes), "r"(arrived(slot))
        : "memory");
    ++loaded_;
  }

  __device__ void store() {
    const uint32_t slot = stored_ % kSlots, parity = stored_ / kSlots & 1;
    uint32_t there = 0;
    while (!there) {
      asm volatile(
          "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
          : "=r"(there)
          : "r"(arrived(slot)), "r"(parity)
          : "memory");
    }
    asm volatile(
        "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
            storage_->bound[warp_][slot].to),
        "r"(shared_address(storage_->piece[warp_][slot])), "r"(storage_->bound[warp_][slot].bytes)
        : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    ++stored_;
  }

  CourierStorage* storage_;
  int warp_;
  uint32_t loaded_ = 0, stored_ = 0;
};

#endif

}  // namespace coterie::fused
