// A warp's copies of rows from one place in global memory to several others, through its share of
// shared memory: read once, several on the way at a time, without passing through registers.
#pragma once

#include "../device.cuh"
#include "rank.h"

namespace coterie::fused {

constexpr int kSlots = 4;        // pieces of a warp in shared memory
constexpr int kPiece = 4 << 10;  // bytes

// Rows of a matrix, the numbers of which lie in memory.
struct Places {
  const int32_t* row;
  int count;
};

#ifdef COTERIE_ON_HOST

struct CourierStorage {};

class Courier {
 public:
  Courier(CourierStorage*, int, Number* matrix, int64_t width) : matrix_(matrix), width_(width) {}
  void bring(const Places& to, const void* from) {
    for (int n = 0; n < to.count; ++n) {
      Number* row = matrix_ + to.row[n] * width_;
      for (int64_t i = threadIdx.x % kWarp * 8; i < width_; i += kWarp * 8) {
        std::memcpy(row + i, static_cast<const Number*>(from) + i, 16);
      }
    }
  }
  void finish() {}
  void leave() {}

 private:
  Number* matrix_;
  int64_t width_;
};

#else

struct CourierStorage {
  static constexpr int kWarps = kThreads / kWarp;
  alignas(128) unsigned char piece[kWarps][kSlots][kPiece];
  uint64_t arrived[kWarps][kSlots];
  struct {
    Places to;
    int64_t at;  // in each of these rows
    uint32_t bytes;
  } bound[kWarps][kSlots];
};

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// To rows of a matrix `width` wide. Its first lane does the work; all lanes of the warp call it
// alike. Loads run up to kSlots - 1 pieces ahead of stores: one slot's store may still be reading.
class Courier {
 public:
  __device__ Courier(CourierStorage* storage, int warp, Number* matrix, int64_t width)
      : storage_(storage),
        warp_(warp),
        matrix_(reinterpret_cast<char*>(matrix)),
        bytes_(width * static_cast<int64_t>(sizeof(Number))) {
    if (!leads()) return;
    for (int slot = 0; slot < kSlots; ++slot) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(arrived(slot)) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }

  __device__ void bring(const Places& to, const void* from) {
    if (!leads()) return;
    for (int64_t done = 0; done < bytes_; done += kPiece) {
      const auto size = static_cast<uint32_t>(bytes_ - done < kPiece ? bytes_ - done : kPiece);
      load(to, done, static_cast<const char*>(from) + done, size);
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

  __device__ void load(const Places& to, int64_t at, const void* from, uint32_t bytes) {
    if (loaded_ - stored_ == kSlots - 1) store();
    // all stores but the youngest have left their slots
    asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
    const uint32_t slot = loaded_ % kSlots;
    storage_->bound[warp_][slot] = {to, at, bytes};
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
    const auto& bound = storage_->bound[warp_][slot];
    for (int n = 0; n < bound.to.count; ++n) {
      asm volatile(
          "cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
              matrix_ + bound.to.row[n] * bytes_ + bound.at),
          "r"(shared_address(storage_->piece[warp_][slot])), "r"(bound.bytes)
          : "memory");
    }
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    ++stored_;
  }

  CourierStorage* storage_;
  int warp_;
  char* matrix_;
  int64_t bytes_;  // of a row
  uint32_t loaded_ = 0, stored_ = 0;
};

#endif

}  // namespace coterie::fused
