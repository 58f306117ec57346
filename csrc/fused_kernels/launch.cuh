// How the fused kernels start: one launch for all ranks that this device stands for.
#pragma once

#include <cstring>
#include <type_traits>

#include "flags.cuh"
#include "product.cuh"

namespace coterie::fused {

struct Launch {
  Rank rank[kMostHere];
  Maps maps[kMostHere];
};

inline void check_widths(const Rank& rank) {
  STD_TORCH_CHECK(
      rank.width > 0 && rank.width % 64 == 0 && rank.hidden > 0 && rank.hidden % 128 == 0,
      "coterie: fused experts need a width that is a multiple of 64 and a hidden width that is one "
      "of 128, not ", rank.width, " and ", rank.hidden);
  STD_TORCH_CHECK(
      rank.ranks <= kMostRanks && rank.slabs <= kMostSlabs,
      "coterie: the fused exchange is for up to ", kMostRanks, " ranks and ", kMostSlabs, " slabs, not ",
      rank.ranks, " and ", rank.slabs);
}

// Of a table (ranks here, words of a Rank) on the CPU.
template <class Task>
Launch launch_of(const Tensor& table) {
  constexpr int64_t kWords = sizeof(Rank) / 8;
  STD_TORCH_CHECK(
      !table.is_cuda() && table.dim() == 2 && table.is_contiguous() && table.size(1) == kWords &&
          table.size(0) >= 1 && table.size(0) <= kMostHere &&
          table.scalar_type() == ScalarType::Long,
      "coterie: a launch needs 1 to ", kMostHere, " rows of ", kWords, " int64 on the CPU");
  Launch launch{};
  std::memcpy(launch.rank, table.const_data_ptr(), table.size(0) * sizeof(Rank));
  for (int64_t here = 0; here < table.size(0); ++here) {
    check_widths(launch.rank[here]);
    launch.maps[here] = Task::maps(launch.rank[here]);
  }
  return launch;
}

#ifndef COTERIE_ON_HOST
inline int multiprocessors(const Tensor& like) {
  int count = 0;
  check_cuda(
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, like.get_device_index()),
      "multiprocessors");
  return count;
}
#else
inline int multiprocessors(const Tensor&) { return 3; }
#endif

// How many blocks each rank has, and how many of these move rows first.
struct Blocks {
  int64_t each, movers;
};

// each: 0: as many as the device runs at a time. Of one rank's at most half move rows first, so
// that others compute: where there is but one, it moves rows before or after it has computed.
inline Blocks blocks_for(const Tensor& table, const Tensor& like, int64_t each, int64_t movers) {
  if (each == 0) each = std::max<int64_t>(multiprocessors(like) / table.size(0), 1);
  STD_TORCH_CHECK(
      each > 0 && movers >= 0, "coterie: a launch of ", each, " blocks of which ", movers, " move rows");
  return {each, std::min(movers, each / 2)};
}

template <int kColumns, class... Parameters>
void start(
    void (*kernel)(const Launch, Parameters...), const Tensor& table, const Tensor& like,
    const Blocks& blocks, const Launch& launch, const std::type_identity_t<Parameters>&... others) {
  const Guard guard(like);
  const dim3 grid(static_cast<unsigned>(blocks.each), static_cast<unsigned>(table.size(0)));
  launch_together(kernel, grid, dim3(kThreads), sizeof(Storage<kColumns>), like, launch, others...);
}

}  // namespace coterie::fused
