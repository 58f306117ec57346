// Fused top-k gating on CUDA, one warp per token: scores of all experts from logits, the k best by
// score + bias (inside the best groups), their combine weights; and the derivative.
//
// Of equal experts the lower id comes first, so equal inputs give equal choices. Numbers are
// compared as integers in the same order, NaN above all: whatever the logits, k different experts
// are chosen.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "device.cuh"

namespace coterie {
namespace {

constexpr int kWarps = 4;  // warps, hence tokens, per block
constexpr int kMaxExperts = 512;
constexpr int kMaxChoices = 64;
constexpr int kMaxGroups = 32;  // a lane each
constexpr int64_t kMaxBlocks = 1 << 20;  // beyond it, warps take several tokens
constexpr unsigned kNobody = ~0u;

template <class A>
using Key = std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t>;

// An integer that is the larger, the larger the number: never 0.
template <class A>
__device__ Key<A> key_of(A x) {
  using K = Key<A>;
  if (x != x) return ~K(0);
  x += A(0);  // -0 becomes 0
  K bits;
  memcpy(&bits, &x, sizeof bits);
  constexpr K kSign = K(1) << (8 * sizeof(K) - 1);
  return bits & kSign ? ~bits : bits | kSign;
}

template <class A>
__device__ A number_of(Key<A> key) {
  using K = Key<A>;
  constexpr K kSign = K(1) << (8 * sizeof(K) - 1);
  const K bits = key & kSign ? key & ~kSign : ~key;
  A x;
  memcpy(&x, &bits, sizeof x);
  return key == ~K(0) ? static_cast<A>(NAN) : x;
}

__device__ uint32_t warp_max(uint32_t x) { return __reduce_max_sync(kAllLanes, x); }

__device__ uint64_t warp_max(uint64_t x) {
  const uint32_t high = warp_max(static_cast<uint32_t>(x >> 32));
  const uint32_t low = warp_max(x >> 32 == high ? static_cast<uint32_t>(x) : 0u);
  return static_cast<uint64_t>(high) << 32 | low;
}

// An expert, or nobody with key 0.
template <class K>
struct Best {
  K key = 0;
  unsigned id = kNobody;
};

// The best of this lane's experts in [begin, end) but one.
template <class K>
__device__ Best<K> best_of(const K* keys, int begin, int end, unsigned but = kNobody) {
  Best<K> best;
  for (int e = begin + threadIdx.x; e < end; e += kWarp) {
    if (keys[e] > best.key && e != but) best = {keys[e], static_cast<unsigned>(e)};
  }
  return best;
}

// The best of all lanes; of equals, the lowest id.
template <class K>
__device__ Best<K> warp_best(Best<K> mine) {
  const K key = warp_max(mine.key);
  return {key, __reduce_min_sync(kAllLanes, mine.key == key ? mine.id : kNobody)};
}

// Scores of one token: to global memory in T, to shared memory as rounded to T.
template <class T>
__device__ void score_experts(
    const T* logits, int experts, bool sigmoid, Acc<T>* scores, T* score) {
  using A = Acc<T>;
  const int lane = threadIdx.x;
  A largest = 0, sum = 0;
  if (!sigmoid) {
    Key<A> key = 0;
    for (int e = lane; e < experts; e += kWarp) key = max(key, key_of(static_cast<A>(logits[e])));
    largest = number_of<A>(warp_max(key));
  }
  for (int e = lane; e < experts; e += kWarp) {
    const A x = static_cast<A>(logits[e]);
    scores[e] = sigmoid ? A(1) / (A(1) + std::exp(-x)) : std::exp(x - largest);
    sum += scores[e];
  }
  if (!sigmoid) sum = warp_sum(sum);
  for (int e = lane; e < experts; e += kWarp) {
    score[e] = static_cast<T>(sigmoid ? scores[e] : scores[e] / sum);
    scores[e] = static_cast<A>(score[e]);
  }
}

// Closes all groups of experts but the best: their keys become that of minus infinity. A group is
// as good as its two best experts together.
template <class T>
__device__ void close_groups(Key<Acc<T>>* keys, int experts, int groups, int top_groups) {
  using A = Acc<T>;
  using K = Key<A>;
  const int lane = threadIdx.x, width = experts / groups;
  Best<K> mine;
  for (int g = 0; g < groups; ++g) {
    const int begin = g * width, end = begin + width;
    const Best<K> first = warp_best(best_of(keys, begin, end));
    const Best<K> second = warp_best(best_of(keys, begin, end, first.id));
    const A both = static_cast<A>(
        static_cast<T>(number_of<A>(first.key) + number_of<A>(second.key)));
    if (lane == g) mine = {key_of(both), static_cast<unsigned>(g)};
  }
  bool open = false;
  for (int i = 0; i < top_groups; ++i) {
    if (warp_best(mine).id != lane) continue;
    open = true;
    mine = {};
  }
  const unsigned opened = __ballot_sync(kAllLanes, open);
  const K closed = key_of(-A(INFINITY));
  for (int e = lane; e < experts; e += kWarp) {
    if (!(opened >> (e / width) & 1)) keys[e] = closed;
  }
}

template <class T>
__global__ void gate_kernel(
    const T* __restrict__ logits, const T* __restrict__ bias, int64_t* __restrict__ expert,
    T* __restrict__ weight, T* __restrict__ score, int64_t tokens, int experts, int k,
    bool sigmoid, bool renormalise, Acc<T> scale, int groups, int top_groups) {
  using A = Acc<T>;
  using K = Key<A>;
  const int lane = threadIdx.x;
  A* scores = shared_memory<A>() + threadIdx.y * experts;
  K* keys = reinterpret_cast<K*>(shared_memory<A>() + kWarps * experts) + threadIdx.y * experts;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y; t < tokens;
       t += static_cast<int64_t>(gridDim.x) * kWarps) {
    score_experts(logits + t * experts, experts, sigmoid, scores, score + t * experts);
    for (int e = lane; e < experts; e += kWarp) {
      const A b = bias ? static_cast<A>(bias[e]) : A(0);
      keys[e] = key_of(static_cast<A>(static_cast<T>(scores[e] + b)));
    }
    __syncwarp();
    if (groups > top_groups) {
      close_groups<T>(keys, experts, groups, top_groups);
      __syncwarp();
    }
    A sum = 0;
    Best<K> mine = best_of(keys, 0, experts);
    for (int j = 0; j < k; ++j) {
      const Best<K> best = warp_best(mine);
      sum += scores[best.id];
      if (lane == j % kWarp) expert[t * k + j] = best.id;
      if (lane == best.id % kWarp) {
        keys[best.id] = 0;
        mine = best_of(keys, 0, experts);
      }
    }
    const A factor = renormalise ? scale / (sum + A(1e-20)) : scale;
    for (int j = lane; j < k; j += kWarp) {
      weight[t * k + j] = static_cast<T>(scores[expert[t * k + j]] * factor);
    }
    __syncwarp();
  }
}

// dlogits from the gradients of the weights and of the scores, either of which may be null.
template <class T>
__global__ void gate_backward_kernel(
    const T* __restrict__ dweight, const T* __restrict__ dscore, const T* __restrict__ score,
    const int64_t* __restrict__ expert, T* __restrict__ dlogits, int64_t tokens, int experts,
    int k, bool sigmoid, bool renormalise, Acc<T> scale) {
  using A = Acc<T>;
  const int lane = threadIdx.x;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y; t < tokens;
       t += static_cast<int64_t>(gridDim.x) * kWarps) {
    const T* s = score + t * experts;
    const T* ds = dscore ? dscore + t * experts : nullptr;
    T* dx = dlogits + t * experts;
    const int64_t* chosen = expert + t * k;
    const T* dw = dweight ? dweight + t * k : nullptr;

    // of the k chosen: the sum of their scores, and their part of <dweight, weight>
    A sum = 0, inner = 0;
    for (int j = lane; dw && j < k; j += kWarp) {
      const A own = static_cast<A>(s[in_range(chosen[j], experts)]);
      sum += own;
      inner += static_cast<A>(dw[j]) * own;
    }
    sum = warp_sum(sum) + A(1e-20);
    inner = warp_sum(inner);
    const A factor = renormalise ? scale / sum : scale;
    const A mean = renormalise ? inner / sum : A(0);

    // softmax: <gradient of the scores, scores>, in which all renormalised choices cancel out
    A dot = 0;
    if (!sigmoid) {
      for (int e = lane; ds && e < experts; e += kWarp) {
        dot += static_cast<A>(ds[e]) * static_cast<A>(s[e]);
      }
      for (int j = lane; dw && j < k; j += kWarp) {
        dot += factor * (static_cast<A>(dw[j]) - mean) * static_cast<A>(s[chosen[j]]);
      }
      dot = warp_sum(dot);
    }
    const auto derivative = [&](int64_t e, A by_choice) {
      const A own = static_cast<A>(s[e]);
      const A d = (ds ? static_cast<A>(ds[e]) : A(0)) + by_choice;
      return static_cast<T>(sigmoid ? d * own * (A(1) - own) : (d - dot) * own);
    };
    for (int e = lane; e < experts; e += kWarp) dx[e] = derivative(e, A(0));
    __syncwarp();  // another lane goes over the chosen ones again
    for (int j = lane; dw && j < k; j += kWarp) {
      dx[chosen[j]] = derivative(chosen[j], factor * (static_cast<A>(dw[j]) - mean));
    }
  }
}

unsigned blocks_for(int64_t tokens) {
  return static_cast<unsigned>(std::min<int64_t>((tokens + kWarps - 1) / kWarps, kMaxBlocks));
}

void check_gate(const Tensor& x, int64_t k, int64_t groups, int64_t top_groups) {
  check_rows(x, "logits_TE");
  const int64_t experts = x.size(1);
  STD_TORCH_CHECK(
      experts <= kMaxExperts && k <= kMaxChoices && groups <= kMaxGroups, "gate takes up to ",
      kMaxExperts, " experts, ", kMaxChoices, " choices and ", kMaxGroups, " groups");
  STD_TORCH_CHECK(
      groups >= 1 && experts % groups == 0 && 1 <= top_groups && top_groups <= groups,
      "groups must divide the ", experts, " experts, and top_groups be from 1 to groups");
  STD_TORCH_CHECK(
      groups == top_groups || experts / groups >= 2, "a group must have at least 2 experts");
  STD_TORCH_CHECK(
      1 <= k && k <= experts / groups * top_groups,
      "k must be from 1 to the number of experts a token may choose from");
}

std::tuple<Tensor, Tensor, Tensor> gate(
    const Tensor& logits_, const std::optional<Tensor>& bias_, int64_t k, bool sigmoid,
    bool renormalise, double scale, int64_t groups, int64_t top_groups) {
  check_gate(logits_, k, groups, top_groups);
  const int64_t tokens = logits_.size(0), experts = logits_.size(1);
  if (bias_.has_value()) {
    STD_TORCH_CHECK(
        bias_->dim() == 1 && bias_->size(0) == experts &&
            bias_->scalar_type() == logits_.scalar_type(),
        "bias_E must have one number per expert, of the dtype of logits_TE");
    check_same_device(*bias_, logits_, "bias_E");
  }
  const Guard guard(logits_);
  const Tensor logits = dense(logits_);
  const std::optional<Tensor> bias = dense(bias_);
  const Tensor expert = torch::stable::new_empty(logits, {tokens, k}, ScalarType::Long);
  const Tensor weight = torch::stable::new_empty(logits, {tokens, k});
  const Tensor score = torch::stable::new_empty(logits, {tokens, experts});
  dispatch(logits, [&](auto element) {
    using T = decltype(element);
    launch(
        gate_kernel<T>, blocks_for(tokens), dim3(kWarp, kWarps),
        2 * kWarps * experts * sizeof(Acc<T>), logits, data<T>(logits), data_or_null<T>(bias),
        mutable_data<int64_t>(expert), mutable_data<T>(weight), mutable_data<T>(score), tokens,
        experts, k, sigmoid, renormalise, scale, groups, top_groups);
  });
  return {expert, weight, score};
}

void check_gradient(
    const std::optional<Tensor>& d, const Tensor& score, int64_t columns, const char* name) {
  if (!d.has_value()) return;
  STD_TORCH_CHECK(
      d->dim() == 2 && d->size(0) == score.size(0) && d->size(1) == columns &&
          d->scalar_type() == score.scalar_type(),
      name, " must be ", score.size(0), " x ", columns, " and of the dtype of score_TE");
  check_same_device(*d, score, name);
}

Tensor gate_backward(
    const std::optional<Tensor>& dweight_, const std::optional<Tensor>& dscore_,
    const Tensor& score_, const Tensor& expert_, bool sigmoid, bool renormalise, double scale) {
  check_rows(score_, "score_TE");
  check_rows(expert_, "expert_TK");
  STD_TORCH_CHECK(
      expert_.scalar_type() == ScalarType::Long && expert_.size(0) == score_.size(0),
      "expert_TK must be int64 with a row for each of score_TE");
  check_same_device(expert_, score_, "expert_TK");
  check_gradient(dweight_, score_, expert_.size(1), "dweight_TK");
  check_gradient(dscore_, score_, score_.size(1), "dscore_TE");
  const Guard guard(score_);
  const Tensor score = dense(score_), expert = dense(expert_);
  const std::optional<Tensor> dweight = dense(dweight_), dscore = dense(dscore_);
  const int64_t tokens = score.size(0);
  const Tensor dlogits = torch::stable::new_empty(score, {tokens, score.size(1)});
  dispatch(score, [&](auto element) {
    using T = decltype(element);
    launch(
        gate_backward_kernel<T>, blocks_for(tokens), dim3(kWarp, kWarps), 0, score,
        data_or_null<T>(dweight), data_or_null<T>(dscore), data<T>(score), data<int64_t>(expert),
        mutable_data<T>(dlogits), tokens, score.size(1), expert.size(1), sigmoid, renormalise,
        scale);
  });
  return dlogits;
}

}  // namespace
}  // namespace coterie

COTERIE_KERNELS(m) {
  m.impl("gate", TORCH_BOX(&coterie::gate));
  m.impl("gate_backward", TORCH_BOX(&coterie::gate_backward));
}
