// Products of tiles on a Hopper GPU: one thread loads boxes, two warp groups multiply.
//
// CUTLASS's dense sm90 collective multiplies what lies in shared memory; which boxes come there,
// and when, is our own. The loading thread takes tile after tile from a counter in global memory,
// so that blocks that begin late, because they had rows to move, simply take fewer. Several tasks
// may follow each other in a launch: the line of stages between the two sides goes on, and the next
// task's boxes are loaded while the last one's sums are stored, or rows are put.
#pragma once

#include <cute/tensor.hpp>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cutlass/cutlass.h>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/pipeline/pipeline.hpp>

#include "courier.cuh"
#include "flags.cuh"
#include "fragment.cuh"
#include "product.cuh"

namespace coterie::fused {

constexpr int kItems = 8;  // tiles that the loading thread has told of: more than there are stages
constexpr int kLeftBytes = kTile * kDepth * sizeof(Number);
template <int kColumns>
constexpr int kRightBytes = kColumns * kDepth * sizeof(Number);
template <int kColumns>
constexpr int kStageBytes = kLeftBytes + kRightBytes<kColumns>;
// As many as fit beside what else a block holds: 4 of 256 columns, 6 of 128.
template <int kColumns>
constexpr int kStages = (192 << 10) / kStageBytes<kColumns>;

template <int kColumns>
using Pipeline = cutlass::PipelineTmaAsync<kStages<kColumns>>;

// Of a block. Whatever the factors' layouts, the stages of the left one lie before those of the
// right one.
template <int kColumns>
struct alignas(1024) Storage {
  union {
    unsigned char stage[kStages<kColumns> * kStageBytes<kColumns>];
    CourierStorage courier;  // before the first tile
  };
  typename Pipeline<kColumns>::SharedStorage pipeline;
  struct alignas(16) {
    int number;  // of the tile; -1: the task ends
    int place[7];
  } item[kItems];
  static_assert(kItems > kStages<kColumns>);
  // loads into stages leave alone what the courier keeps of its pieces
  static_assert(offsetof(CourierStorage, arrived) >= sizeof stage);
};
static_assert(sizeof(Storage<128>) <= 227 << 10 && sizeof(Storage<256>) <= 227 << 10);

template <int kColumns, Along kLeft, Along kRight>
struct Product {
  using Element = cutlass::bfloat16_t;
  using TileShape =
      cute::Shape<cute::Int<kTile>, cute::Int<kColumns>, cute::Int<kDepth>>;
  using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
  using LeftLayout = std::conditional_t<
      kLeft == Along::k, cutlass::layout::RowMajor, cutlass::layout::ColumnMajor>;
  using RightLayout = std::conditional_t<
      kRight == Along::k, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor>;
  using Collective = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, LeftLayout, 8, Element,
      RightLayout, 8, float, TileShape, Cluster,
      cutlass::gemm::collective::StageCount<kStages<kColumns>>,
      cutlass::gemm::KernelTmaWarpSpecializedCooperative>::CollectiveOp;
  using Tensors = typename Collective::TensorStorage;
  static_assert(std::is_same_v<typename Collective::MainloopPipeline, Pipeline<kColumns>>);

  // a step's boxes lie one after the other, as the collective's layouts want them
  static_assert(sizeof(Tensors) == kStages<kColumns> * kStageBytes<kColumns>);
  static_assert(
      typename Collective::SmemLayoutA{}(0, 0, 1) == kTile * kDepth &&
      typename Collective::SmemLayoutB{}(0, 0, 1) == kColumns * kDepth);
  static_assert(typename Collective::SmemLayoutA{}(64, 0, 0) == 64 * kDepth);
  static_assert(typename Collective::SmemLayoutB{}(64, 0, 0) == 64 * kDepth);
  static_assert(
      typename Collective::SmemLayoutB{}(kColumns / 2, 0, 0) == kColumns / 2 * kDepth);

  // the fragment of fragment.cuh is the collective's
  static constexpr auto kSumLayout =
      typename Collective::TiledMma{}.get_layoutC_TV();  // (thread, sum) -> row + column * kTile
  static constexpr bool same_sum(int thread, int sum) {
    const int block = sum / 4, half = sum / 2 % 2;
    const int row = row_of(thread, half), column = column_of(thread, block) + sum % 2;
    return kSumLayout(thread, sum) == row + column * kTile;
  }
  static_assert(same_sum(0, 1) && same_sum(0, 2) && same_sum(0, 4) && same_sum(1, 0));
  static constexpr int kLast = kSums<kColumns> - 1;
  static_assert(same_sum(37, kLast) && same_sum(128, 0) && same_sum(100, 9));
  static_assert(same_sum(255, kLast / 2 + 3) && same_sum(255, kLast));
};

// One side's place in the line of stages.
template <int kColumns>
struct Line {
  Pipeline<kColumns>& pipeline;
  cutlass::PipelineState<kStages<kColumns>> state;
  unsigned turn = 0;  // tiles so far, the ends of tasks included
};

__device__ __forceinline__ void load_box(
    const Map& map, uint64_t* barrier, unsigned char* to, Box box) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(box.x), "r"(box.y)
      : "memory");
}

__device__ __forceinline__ void prefetch(const Map& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Hands on a stage without boxes.
template <int kColumns>
__device__ __forceinline__ void pass_stage(Line<kColumns>& line) {
  line.pipeline.producer_acquire(line.state);
  cutlass::arch::ClusterBarrier::arrive(
      reinterpret_cast<cutlass::arch::ClusterBarrier::ValueType const*>(
          line.pipeline.producer_get_barrier(line.state)));
  ++line.state;
}

// Loads what tiles need until there are none, or one at or beyond `limit` was taken. By one thread.
template <class Task>
__device__ __forceinline__ void load_tiles(
    const Rank& rank, const Maps& maps, Storage<Task::kColumns>& storage,
    Line<Task::kColumns>& line, int limit) {
  constexpr int kRight = kRightBytes<Task::kColumns>;
  constexpr int kLeftBoxes = boxes_of<Task::kLeft, kTile>();
  unsigned char* left = storage.stage;
  unsigned char* right = storage.stage + kStages<Task::kColumns> * kLeftBytes;
  using Place = typename Task::Place;
  static_assert(sizeof(Place) <= sizeof(storage.item[0].place));
  const int count = Task::count(rank);
  prefetch(maps.left);
  prefetch(maps.right);
  auto take = [&] { return static_cast<int>(atomicAdd(&rank.counters[kNextTile], 1u)); };
  for (int i = take(), next;; i = next, ++line.turn) {
    next = i < limit ? take() : count;  // known before it is needed
    const bool last = i >= count;
    // the item is seen by whoever waits for the stage
    auto& item = storage.item[line.turn % kItems];
    item.number = last ? -1 : i;
    if (last) {
      pass_stage(line);
      ++line.turn;
      return;
    }
    const Place place = Task::place(rank, i);
    reinterpret_cast<Place&>(item.place) = place;
    const Task task(rank, place);
    const int steps = task.steps();
    if (steps == 0) {
      pass_stage(line);
      continue;
    }
    task.wait();
    for (int step = 0; step < steps; ++step) {
      line.pipeline.producer_acquire(line.state);
      auto* barrier = reinterpret_cast<uint64_t*>(line.pipeline.producer_get_barrier(line.state));
      asm volatile(
          "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
          "r"(kLeftBytes + kRight)
          : "memory");
      unsigned char* to = left + line.state.index() * kLeftBytes;
#pragma unroll
      for (int box = 0; box < kLeftBoxes; ++box) {
        load_box(maps.left, barrier, to + box * (kLeftBytes / kLeftBoxes), task.left(step, box));
      }
      to = right + line.state.index() * kRight;
#pragma unroll
      for (int box = 0; box < Task::kRightBoxes; ++box) {
        load_box(
            maps.right, barrier, to + box * (kRight / Task::kRightBoxes),
            task.right(step, box));
      }
      ++line.state;
    }
  }
}

// CUTLASS keeps the first 8 of the hardware's 16 barriers for itself, and counts from there.
__device__ __forceinline__ void meet_multipliers() {
  cutlass::arch::NamedBarrier::sync(kMultipliers, 0);
}

// Multiplies what is loaded, until the task ends; each thread has its sums of every tile. By all
// multiplying threads.
template <class Task>
__device__ __forceinline__ void multiply_tiles(
    const Rank& rank, Storage<Task::kColumns>& storage, Line<Task::kColumns>& line) {
  constexpr int kOfThread = kSums<Task::kColumns>;
  using P = Product<Task::kColumns, Task::kLeft, Task::kRight>;
  const int thread = threadIdx.x - kLoaders;
  auto& tensors = reinterpret_cast<typename P::Tensors&>(storage.stage);
  typename P::Collective collective;
  typename P::Collective::TiledMma mma;
  // its parameters are only used to load
  const auto& none = reinterpret_cast<const typename P::Collective::Params&>(storage);
  for (;; ++line.turn) {
    line.pipeline.consumer_wait(line.state);
    const auto& item = storage.item[line.turn % kItems];
    if (item.number < 0) {
      line.pipeline.consumer_release(line.state);
      ++line.state;
      ++line.turn;
      return;
    }
    const Task task(rank, reinterpret_cast<const typename Task::Place&>(item.place));
    const int steps = task.steps();
    auto sums = cute::partition_fragment_C(mma, cute::take<0, 2>(typename P::TileShape{}));
    static_assert(decltype(cute::size(sums))::value == kOfThread);
    if (steps == 0) {
      cute::clear(sums);
      line.pipeline.consumer_release(line.state);
      ++line.state;
    } else {
      collective.mma(line.pipeline, line.state, sums, steps, thread, tensors, none);
      collective.mma_tail(line.pipeline, line.state, steps);
      line.state.advance(steps);
    }
    task.store(thread, *reinterpret_cast<const float(*)[kOfThread]>(sums.data()));
    if constexpr (Task::kTells) {
      meet_multipliers();
      if (thread == 0) task.tell();
    }
  }
}

// Splits a block, for the rest of the launch: one thread loads, 256 multiply. The others of the
// first warp group have nothing to do, and give their registers away.
template <int kColumns, class Load, class Multiply>
__device__ __forceinline__ void split(
    Storage<kColumns>& storage, const Load& load, const Multiply& multiply) {
  using Stages = Pipeline<kColumns>;
  const bool loads = threadIdx.x < kLoaders;
  typename Stages::Params parameters;
  parameters.role = loads ? Stages::ThreadCategory::Producer : Stages::ThreadCategory::Consumer;
  parameters.is_leader = 0;  // the loading thread itself says how many bytes it expects
  parameters.num_consumers = kMultipliers;
  Stages pipeline(storage.pipeline, parameters, cute::Shape<cute::_1, cute::_1, cute::_1>{});
  __syncthreads();
  if (loads) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    Line<kColumns> line{pipeline, cutlass::make_producer_start_state<Stages>()};
    if (threadIdx.x == 0) load(line);
  } else {
    cutlass::arch::warpgroup_reg_alloc<232>();
    Line<kColumns> line{pipeline, {}};
    multiply(line);
  }
}

}  // namespace coterie::fused
