// Counts and stable sort on CUDA: choices by expert, and rows by token (the inverse of a gather).
//
// A counting sort in three launches: every block counts the keys of its tile; of every key, the
// blocks' counts become the places where the blocks begin; every block puts its tile there. Many
// keys are sorted digit by digit, the lowest first. The place of an item depends on nothing but
// the items before it, so equal inputs give equal orders.
#include "device.cuh"

namespace coterie {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kRounds = 8;  // items that a lane takes
constexpr int kTile = kThreads * kRounds;
constexpr int kMaxBins = 1025;  // of a digit; 36 KB of counters for each block
constexpr int kDigitBits = 10;
constexpr unsigned kMaxBlocks = 1024;  // that look for tokens' first rows; they take several each

// What is sorted: item i is number order[i] (null: i) of `key`, and falls into the bin of its
// digit; what is not kept, into the last bin.
struct Items {
  const int64_t* key;
  const bool* keep;  // null: all
  const int64_t* order;
  int64_t count, limit;  // keys are below the limit
  int shift, mask, bins;

  __device__ int64_t number(int64_t i) const { return order ? order[i] : i; }

  __device__ int bin(int64_t i) const {
    const int64_t n = number(i), k = in_range(key[n], limit);
    return keep && !keep[n] ? bins - 1 : static_cast<int>(k >> shift) & mask;
  }
};

// count[bin, block]: the items of each bin in the block's tile.
__global__ void count_kernel(Items items, int* __restrict__ count) {
  int* counts = shared_memory<int>();
  for (int b = threadIdx.x; b < items.bins; b += kThreads) counts[b] = 0;
  __syncthreads();
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t end = min(begin + kTile, items.count);
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    atomicAdd(&counts[items.bin(i)], 1);
  }
  __syncthreads();
  for (int b = threadIdx.x; b < items.bins; b += kThreads) {
    count[static_cast<int64_t>(b) * gridDim.x + blockIdx.x] = counts[b];
  }
}

// One warp for each bin: its count in a block becomes that in all blocks before; total[bin].
__global__ void scan_kernel(
    int* __restrict__ count, int* __restrict__ total, int bins, int blocks) {
  const int lane = threadIdx.x, b = blockIdx.x * kWarps + threadIdx.y;
  if (b >= bins) return;
  int* own = count + static_cast<int64_t>(b) * blocks;
  int before = 0;
  for (int first = 0; first < blocks; first += kWarp) {
    const int here = first + lane < blocks ? own[first + lane] : 0;
    int sum = here;
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += other;
    }
    if (first + lane < blocks) own[first + lane] = before + sum - here;
    before += __shfl_sync(kAllLanes, sum, kWarp - 1);
  }
  if (lane == 0) total[b] = before;
}

// Where the block's items of each bin go: start[bin] = items of all bins before, by one warp, and
// of the bin in the blocks before.
__device__ void begin_bins(const int* count, const int* total, int bins, int* start) {
  const int lane = threadIdx.x % kWarp;
  int before = 0;
  for (int first = 0; first < bins; first += kWarp) {
    const int b = first + lane;
    const int here = b < bins ? total[b] : 0;
    int sum = here;
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += other;
    }
    if (b < bins) {
      start[b] = before + sum - here + count[static_cast<int64_t>(b) * gridDim.x + blockIdx.x];
    }
    before += __shfl_sync(kAllLanes, sum, kWarp - 1);
  }
}

__global__ void __launch_bounds__(kThreads) place_kernel(
    Items items, const int* __restrict__ count, const int* __restrict__ total,
    int64_t* __restrict__ order) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, bins = items.bins;
  int* next = shared_memory<int>();         // where each warp's next item of each bin goes
  int* start = next + kWarps * bins;        // where the block's items of each bin go
  int* own = next + warp * bins;
  const unsigned lower = (1u << lane) - 1;  // lanes before this one
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kTile + warp * kWarp * kRounds;

  for (int b = lane; b < bins; b += kWarp) own[b] = 0;
  __syncwarp();
  int bin[kRounds];  // -1: beyond the last item
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int64_t i = begin + r * kWarp + lane;
    bin[r] = i < items.count ? items.bin(i) : -1;
    const unsigned equal = __match_any_sync(kAllLanes, bin[r]);
    if (bin[r] >= 0 && !(equal & lower)) own[bin[r]] += __popc(equal);
    __syncwarp();
  }
  if (warp == 0) begin_bins(count, total, bins, start);
  __syncthreads();
  for (int b = threadIdx.x; b < bins; b += kThreads) {
    int at = start[b];
    for (int w = 0; w < kWarps; ++w) {
      const int here = next[w * bins + b];
      next[w * bins + b] = at;
      at += here;
    }
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const unsigned equal = __match_any_sync(kAllLanes, bin[r]);
    if (bin[r] >= 0) {
      const int64_t i = begin + r * kWarp + lane;
      order[own[bin[r]] + __popc(equal & lower)] = items.number(i);
    }
    __syncwarp();
    if (bin[r] >= 0 && !(equal & lower)) own[bin[r]] += __popc(equal);
    __syncwarp();
  }
}

__global__ void load_kernel(const int* __restrict__ total, int64_t* __restrict__ load, int bins) {
  const int b = blockIdx.x * kThreads + threadIdx.x;
  if (b < bins) load[b] = total[b];
}

// offset[t]: the first of the rows, sorted by token, whose token is t or more; t = 0 … tokens
__global__ void offset_kernel(
    const int64_t* __restrict__ token, const int64_t* __restrict__ row,
    int64_t* __restrict__ offset, int64_t rows, int64_t tokens) {
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; t <= tokens;
       t += static_cast<int64_t>(gridDim.x) * kThreads) {
    int64_t low = 0, high = rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (token[row[middle]] < t) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    offset[t] = low;
  }
}

unsigned blocks_for(int64_t count, int64_t each) {
  return static_cast<unsigned>((count + each - 1) / each);
}

// One digit: the stable order of the items by bin; returns the items of each bin, int32.
Tensor sort_digit(const Items& items, const Tensor& key, const Tensor& order) {
  const unsigned blocks = blocks_for(items.count, kTile);
  const int bins = items.bins;
  const Tensor count = torch::stable::new_empty(key, {bins, blocks}, ScalarType::Int);
  const Tensor total = torch::stable::new_empty(key, {bins}, ScalarType::Int);
  launch(count_kernel, blocks, kThreads, bins * sizeof(int), key, items, mutable_data<int>(count));
  launch(
      scan_kernel, blocks_for(bins, kWarps), dim3(kWarp, kWarps), 0, key,
      mutable_data<int>(count), mutable_data<int>(total), bins, blocks);
  launch(
      place_kernel, blocks, kThreads, (kWarps + 1) * bins * sizeof(int), key, items,
      data<int>(count), data<int>(total), mutable_data<int64_t>(order));
  return total;
}

void check_count(const Tensor& key) {
  STD_TORCH_CHECK(key.numel() < int64_t(1) << 31, "at most 2^31 - 1 items are sorted");
}

std::tuple<Tensor, Tensor> sort_by_expert(
    const Tensor& expert_, int64_t num_experts, const std::optional<Tensor>& keep_) {
  check_index(expert_, expert_, "expert_A");
  check_count(expert_);
  STD_TORCH_CHECK(
      num_experts >= 1 && num_experts < kMaxBins, "sort_by_expert takes 1 to ", kMaxBins - 1,
      " experts, not ", num_experts);
  if (keep_.has_value()) {
    STD_TORCH_CHECK(
        keep_->dim() == 1 && keep_->size(0) == expert_.size(0) &&
            keep_->scalar_type() == ScalarType::Bool,
        "keep_A must be bool with one entry per entry of expert_A");
    check_same_device(*keep_, expert_, "keep_A");
  }
  const Guard guard(expert_);
  const Tensor expert = dense(expert_);
  const std::optional<Tensor> keep = dense(keep_);
  const Tensor order = torch::stable::new_empty(expert, {expert.size(0)});
  const Tensor load = torch::stable::new_empty(expert, {num_experts});
  const int experts = static_cast<int>(num_experts);
  const Items items{
      data<int64_t>(expert), data_or_null<bool>(keep), nullptr, expert.size(0), num_experts, 0,
      ~0, experts + keep.has_value()};
  const Tensor total = sort_digit(items, expert, order);
  launch(
      load_kernel, blocks_for(experts, kThreads), kThreads, 0, expert, data<int>(total),
      mutable_data<int64_t>(load), experts);
  return {order, load};
}

int bits_of(int64_t numbers) {  // of the largest number below
  int bits = 0;
  while (bits < 63 && (int64_t(1) << bits) < numbers) ++bits;
  return bits;
}

std::tuple<Tensor, Tensor> invert(const Tensor& token_, int64_t tokens) {
  check_index(token_, token_, "token_A");
  check_count(token_);
  STD_TORCH_CHECK(tokens >= 0, "num_tokens must not be negative");
  const Guard guard(token_);
  const Tensor token = dense(token_);
  const int64_t rows = token.size(0);
  const int bits = std::max(1, bits_of(tokens));
  const int digits = (bits + kDigitBits - 1) / kDigitBits;
  const int each = (bits + digits - 1) / digits;
  Tensor row = torch::stable::new_empty(token, {rows});
  Tensor before = row;
  for (int digit = 0; digit < digits; ++digit) {
    const int64_t* order = digit ? data<int64_t>(before) : nullptr;
    if (digit) row = torch::stable::new_empty(token, {rows});
    const Items items{
        data<int64_t>(token), nullptr, order, rows, tokens, digit * each, (1 << each) - 1,
        1 << each};
    sort_digit(items, token, row);
    before = row;
  }
  const Tensor offset = torch::stable::new_empty(token, {tokens + 1});
  launch(
      offset_kernel, std::min(kMaxBlocks, blocks_for(tokens + 1, kThreads)), kThreads, 0, token,
      data<int64_t>(token), data<int64_t>(row), mutable_data<int64_t>(offset), rows, tokens);
  return {row, offset};
}

}  // namespace
}  // namespace coterie

COTERIE_KERNELS(m) {
  m.impl("sort_by_expert", TORCH_BOX(&coterie::sort_by_expert));
  m.impl("invert", TORCH_BOX(&coterie::invert));
}
