// The plan of a fused exchange: where the rows that a rank receives lie in its pool, and in which
// order tiles of it are computed. csrc/fused_plan.py says what it means; comm/exchange/plan.py has the
// same rules for any number of ranks at once.
//
// Every block works out the few numbers of each expert and source by itself; rows are shared out,
// and the first block alone orders the tiles.
#include "device.cuh"

namespace coterie {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 128;

struct Plan {
  const int64_t* load_SL;
  const int64_t* visit_N;
  const int64_t* begin_S;
  const int64_t* before_S1;
  const float* weight_N;
  int rank, ranks, experts, group;
  int64_t rows;
  int32_t *place_N, *source_P, *row_P;
  float* weight_P;
  int64_t* global_N;
  int32_t *tiles, *expert_Q, *order_Q, *arrival_Q2, *run_Q2, *span_L2;
};

// The source of a round.
__device__ int source_of(const Plan& plan, int round) {
  return (plan.rank - round + plan.ranks) % plan.ranks;
}

// What a block keeps: sums of the counts, in the order of rows (source, expert), and in that of the
// pool (expert, round).
struct Sums {
  int* load_SL;
  int* first_SL1;  // of the rows as they are given
  int* start_LS;   // of the pool
  int* span_L2;    // first row and rows of each expert
};

__device__ Sums sums_at(const Plan& plan, int* memory) {
  const int pairs = plan.ranks * plan.experts;
  return {memory, memory + pairs, memory + 2 * pairs + 1, memory + 3 * pairs + 1};
}

__device__ void add_up(const Plan& plan, const Sums& sums) {
  const int pairs = plan.ranks * plan.experts;
  for (int i = threadIdx.x; i < pairs; i += kThreads) sums.load_SL[i] = static_cast<int>(plan.load_SL[i]);
  __syncthreads();
  if (threadIdx.x == 0) {
    int first = 0;
    for (int i = 0; i < pairs; ++i) {
      sums.first_SL1[i] = first;
      first += sums.load_SL[i];
    }
    sums.first_SL1[pairs] = first;
  }
  if (threadIdx.x == kWarp) {
    int start = 0;
    for (int expert = 0; expert < plan.experts; ++expert) {
      const int begin = start;
      for (int turn = 0; turn < plan.ranks; ++turn) {
        const int source = source_of(plan, turn);
        sums.start_LS[expert * plan.ranks + source] = start;
        start += sums.load_SL[source * plan.experts + expert];
      }
      sums.span_L2[2 * expert] = begin;
      sums.span_L2[2 * expert + 1] = start - begin;
      start = (start + kTile - 1) / kTile * kTile;
    }
  }
  __syncthreads();
}

// The last place in a rising row of numbers that is not above `value`; of equal ones the last.
__device__ int last_below(const int* rising, int count, int64_t value) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (rising[middle] <= value ? low : high) = middle;
  }
  return low;
}

__device__ void place_rows(const Plan& plan, const Sums& sums) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < plan.rows; i += step) {
    const int pair = last_below(sums.first_SL1, plan.ranks * plan.experts, i);
    const int source = pair / plan.experts, expert = pair % plan.experts;
    const auto place = static_cast<int32_t>(
        sums.start_LS[expert * plan.ranks + source] + (i - sums.first_SL1[pair]));
    const int64_t visit = plan.visit_N[i];
    plan.place_N[i] = place;
    plan.global_N[i] = plan.before_S1[source] + visit;
    plan.source_P[place] = source;
    plan.row_P[place] = static_cast<int32_t>(plan.begin_S[source] + visit);
    plan.weight_P[place] = plan.weight_N[i];
  }
}

// The rows between an expert's last and the next expert's first.
__device__ void mark_padding(const Plan& plan, const Sums& sums) {
  for (int expert = blockIdx.x; expert < plan.experts; expert += gridDim.x) {
    const int end = sums.span_L2[2 * expert] + sums.span_L2[2 * expert + 1];
    for (int place = end + threadIdx.x; place < (end + kTile - 1) / kTile * kTile; place += kThreads) {
      plan.source_P[place] = -1;
      plan.row_P[place] = 0;
      plan.weight_P[place] = 0;
    }
  }
}

// The round in which the last rows of a tile arrive.
__device__ int last_round(const Plan& plan, const Sums& sums, int tile, int expert) {
  const int end = sums.span_L2[2 * expert] + sums.span_L2[2 * expert + 1];
  const int last = ((tile + 1) * kTile < end ? (tile + 1) * kTile : end) - 1;
  for (int turn = plan.ranks - 1; turn > 0; --turn) {
    const int source = source_of(plan, turn);
    const int start = sums.start_LS[expert * plan.ranks + source];
    if (sums.load_SL[source * plan.experts + expert] > 0 && start <= last) return turn;
  }
  return 0;
}

// Of tiles in an order, those of one expert that follow each other, at most `group` together.
// `expert(i)`: of the tile that comes as the i-th.
template <class Expert>
__device__ void mark_runs(const Plan& plan, int tiles, const Expert& expert, int32_t* run_Q2) {
  for (int i = threadIdx.x; i < tiles; i += kThreads) {
    int begin = i, end = i + 1;
    while (begin > 0 && expert(begin - 1) == expert(i)) --begin;
    const int first = begin + (i - begin) / plan.group * plan.group;
    while (end < tiles && end < first + plan.group && expert(end) == expert(i)) ++end;
    run_Q2[2 * i] = first;
    run_Q2[2 * i + 1] = end - first;
  }
}

// By the first block: a counting sort of tiles by the round in which they can start.
__device__ void order_tiles(const Plan& plan, const Sums& sums, int* round_Q, int* before_S) {
  int tiles = 0;
  for (int expert = 0; expert < plan.experts; ++expert) {
    const int each = (sums.span_L2[2 * expert + 1] + kTile - 1) / kTile;
    for (int i = threadIdx.x; i < each; i += kThreads) {
      plan.expert_Q[tiles + i] = expert;
      round_Q[tiles + i] = last_round(plan, sums, tiles + i, expert);
    }
    tiles += each;
  }
  __syncthreads();
  // one warp counts, then places, the tiles of one round
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int round = warp; round < plan.ranks; round += kThreads / kWarp) {
    int count = 0;
    for (int i = lane; i - lane < tiles; i += kWarp) {
      count += __popc(__ballot_sync(kAllLanes, i < tiles && round_Q[i] == round));
    }
    if (lane == 0) before_S[round] = count;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int before = 0;
    for (int round = 0; round < plan.ranks; ++round) {
      const int count = before_S[round];
      before_S[round] = before;
      before += count;
    }
    *plan.tiles = tiles;
  }
  __syncthreads();
  for (int round = warp; round < plan.ranks; round += kThreads / kWarp) {
    int at = before_S[round];
    for (int i = lane; i - lane < tiles; i += kWarp) {
      const bool mine = i < tiles && round_Q[i] == round;
      const unsigned votes = __ballot_sync(kAllLanes, mine);
      if (mine) plan.order_Q[at + __popc(votes & ((1u << lane) - 1))] = i;
      at += __popc(votes);
    }
  }
  for (int i = threadIdx.x; i < 2 * plan.experts; i += kThreads) plan.span_L2[i] = sums.span_L2[i];
  __syncthreads();
  mark_runs(plan, tiles, [&](int i) { return plan.expert_Q[plan.order_Q[i]]; }, plan.arrival_Q2);
  mark_runs(plan, tiles, [&](int i) { return plan.expert_Q[i]; }, plan.run_Q2);
}

__global__ void __launch_bounds__(kThreads) plan_kernel(const Plan plan, int32_t* round_Q) {
  int* memory = shared_memory<int>();
  const Sums sums = sums_at(plan, memory);
  add_up(plan, sums);
  place_rows(plan, sums);
  mark_padding(plan, sums);
  if (blockIdx.x == 0) order_tiles(plan, sums, round_Q, sums.span_L2 + 2 * plan.experts);
}

void check(const Tensor& x, ScalarType type, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == type && x.is_contiguous(), name, " has the wrong dtype or is not contiguous");
  check_same_device(x, like, name);
}

// Fills place_N … span_L2; see csrc/fused_plan.py.
void fused_plan(
    const Tensor& load_SL, const Tensor& visit_N, const Tensor& begin_S, const Tensor& before_S1,
    const Tensor& weight_N, int64_t rank, int64_t group, const Tensor& place_N,
    const Tensor& global_N, const Tensor& source_P, const Tensor& row_P, const Tensor& weight_P,
    const Tensor& tile_7Q, const Tensor& span_L2) {
  const Guard guard(load_SL);
  for (const Tensor* x : {&load_SL, &visit_N, &begin_S, &before_S1, &global_N}) {
    check(*x, ScalarType::Long, load_SL, "an int64 argument of the plan");
  }
  for (const Tensor* x : {&place_N, &source_P, &row_P, &tile_7Q, &span_L2}) {
    check(*x, ScalarType::Int, load_SL, "an int32 argument of the plan");
  }
  check(weight_N, ScalarType::Float, load_SL, "weight_N");
  check(weight_P, ScalarType::Float, load_SL, "weight_P");
  const int64_t ranks = load_SL.size(0), experts = load_SL.size(1), rows = visit_N.size(0);
  const int64_t most = tile_7Q.size(1) - 1;
  STD_TORCH_CHECK(
      most >= rows / kTile + std::min(rows, experts) && source_P.size(0) == most * kTile,
      "the plan needs room for ", rows / kTile + std::min(rows, experts), " tiles, not ", most);
  // rows: order, expert, round; two pairs of runs; the last column: the number of tiles
  int32_t* tile = mutable_data<int32_t>(tile_7Q);
  const int64_t wide = most + 1;
  const Plan plan{
      data<int64_t>(load_SL), data<int64_t>(visit_N), data<int64_t>(begin_S),
      data<int64_t>(before_S1), data<float>(weight_N), static_cast<int>(rank),
      static_cast<int>(ranks), static_cast<int>(experts), static_cast<int>(group), rows,
      mutable_data<int32_t>(place_N), mutable_data<int32_t>(source_P),
      mutable_data<int32_t>(row_P), mutable_data<float>(weight_P), mutable_data<int64_t>(global_N),
      tile + most, tile + wide, tile, tile + 3 * wide, tile + 5 * wide,
      mutable_data<int32_t>(span_L2)};
  const int64_t words = 3 * ranks * experts + 1 + 2 * experts + ranks;
  const auto blocks = static_cast<unsigned>(
      std::clamp<int64_t>((rows + kThreads - 1) / kThreads, 1, 128));
  launch(
      plan_kernel, dim3(blocks), dim3(kThreads), words * sizeof(int), load_SL, plan,
      tile + 2 * wide);
}

}  // namespace
}  // namespace coterie

COTERIE_KERNELS(m) { m.impl("fused_plan", TORCH_BOX(&coterie::fused_plan)); }
