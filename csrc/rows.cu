// Row gather (permute) and weighted row sum (unpermute) on CUDA: one warp per output row.
//
// Rows are read and written 16 bytes per lane where their address and width allow. No atomics, so
// equal inputs give equal bits.
#include <initializer_list>

#include "device.cuh"

namespace coterie {
namespace {

constexpr int kWarps = 8;  // warps, hence rows, per block
constexpr int64_t kMaxBlocks = 1 << 20;  // beyond it, warps take several rows

// N neighbouring numbers of a row, moved by one load or store.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

template <class T>
__device__ Acc<T> up(T x) {
  return static_cast<Acc<T>>(x);
}

__device__ int64_t first_row() {
  return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.y;
}

__device__ int64_t row_stride() {
  return static_cast<int64_t>(gridDim.x) * kWarps;
}

// y[a] = weight[a] * x[token[a]]; width in packs; a null weight copies.
template <class T, int N>
__global__ void permute_kernel(
    const Pack<T, N>* __restrict__ x, const int64_t* __restrict__ token,
    const Acc<T>* __restrict__ weight, Pack<T, N>* __restrict__ y, int64_t tokens, int64_t rows,
    int64_t width) {
  for (int64_t a = first_row(); a < rows; a += row_stride()) {
    const Pack<T, N>* from = x + in_range(token[a], tokens) * width;
    const Acc<T> w = weight ? weight[a] : Acc<T>(1);
    for (int64_t d = threadIdx.x; d < width; d += kWarp) {
      Pack<T, N> p = from[d];
      if (weight) {
#pragma unroll
        for (int i = 0; i < N; ++i) p.at[i] = static_cast<T>(w * up(p.at[i]));
      }
      y[a * width + d] = p;
    }
  }
}

// y[t] = sum of weight[row[j]] * x[row[j]], j ascending in [offset[t], offset[t + 1])
template <class T, int N>
__global__ void unpermute_kernel(
    const Pack<T, N>* __restrict__ x, const Acc<T>* __restrict__ weight,
    const int64_t* __restrict__ row, const int64_t* __restrict__ offset,
    Pack<T, N>* __restrict__ y, int64_t rows, int64_t entries, int64_t tokens, int64_t width) {
  for (int64_t t = first_row(); t < tokens; t += row_stride()) {
    const int64_t begin = in_range(offset[t], entries + 1);
    const int64_t end = in_range(offset[t + 1], entries + 1);
    for (int64_t d = threadIdx.x; d < width; d += kWarp) {
      Acc<T> sum[N] = {};
      for (int64_t j = begin; j < end; ++j) {
        const int64_t r = in_range(row[j], rows);
        const Pack<T, N> p = x[r * width + d];
        const Acc<T> w = weight ? weight[r] : Acc<T>(1);
#pragma unroll
        for (int i = 0; i < N; ++i) sum[i] += w * up(p.at[i]);
      }
      Pack<T, N> out;
#pragma unroll
      for (int i = 0; i < N; ++i) out.at[i] = static_cast<T>(sum[i]);
      y[t * width + d] = out;
    }
  }
}

// dx[a] = weight[a] * dy[token[a]] and dweight[a] = <x[a], dy[token[a]]>
template <class T, int N>
__global__ void unpermute_backward_kernel(
    const Pack<T, N>* __restrict__ dy, const Pack<T, N>* __restrict__ x,
    const Acc<T>* __restrict__ weight, const int64_t* __restrict__ token,
    Pack<T, N>* __restrict__ dx, Acc<T>* __restrict__ dweight, int64_t tokens, int64_t rows,
    int64_t width) {
  for (int64_t a = first_row(); a < rows; a += row_stride()) {
    const Pack<T, N>* from = dy + in_range(token[a], tokens) * width;
    const Acc<T> w = weight[a];
    Acc<T> dot = 0;
    for (int64_t d = threadIdx.x; d < width; d += kWarp) {
      const Pack<T, N> g = from[d], p = x[a * width + d];
      Pack<T, N> out;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        dot += up(p.at[i]) * up(g.at[i]);
        out.at[i] = static_cast<T>(w * up(g.at[i]));
      }
      dx[a * width + d] = out;
    }
    dot = warp_sum(dot);
    if (threadIdx.x == 0) dweight[a] = dot;
  }
}

// One warp for each row.
template <class Kernel, class... Arguments>
void launch_rows(Kernel* kernel, const Tensor& x, int64_t rows, Arguments... arguments) {
  const int64_t blocks = std::min<int64_t>((rows + kWarps - 1) / kWarps, kMaxBlocks);
  launch(kernel, static_cast<unsigned>(blocks), dim3(kWarp, kWarps), 0, x, arguments...);
}

bool aligned(const void* p, int64_t bytes) {
  return reinterpret_cast<std::uintptr_t>(p) % bytes == 0;
}

// Calls f(element, pack size): 16-byte packs where width and every pointer allow it, else single.
template <class F>
void dispatch_pack(const Tensor& x, std::initializer_list<const void*> pointers, const F& f) {
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    constexpr int N = 16 / sizeof(T);
    bool wide = x.size(1) % N == 0;
    for (const void* p : pointers) wide = wide && aligned(p, 16);
    wide ? f(element, std::integral_constant<int, N>{})
         : f(element, std::integral_constant<int, 1>{});
  });
}

Tensor permute(const Tensor& x_, const Tensor& token_, const std::optional<Tensor>& weight_) {
  check_rows(x_, "x_TD");
  check_index(token_, x_, "token_A");
  check_weight(weight_, x_, token_.size(0));
  const Guard guard(x_);
  const Tensor x = dense(x_), token = dense(token_);
  const std::optional<Tensor> weight = dense(weight_);
  const int64_t rows = token.size(0);
  Tensor y = torch::stable::new_empty(x, {rows, x.size(1)});
  dispatch_pack(x, {x.const_data_ptr(), y.const_data_ptr()}, [&](auto element, auto n) {
    using T = decltype(element);
    using P = Pack<T, n.value>;
    launch_rows(
        permute_kernel<T, n.value>, x, rows, data<P>(x), data<int64_t>(token),
        data_or_null<Acc<T>>(weight), mutable_data<P>(y), x.size(0), rows, x.size(1) / n.value);
  });
  return y;
}

Tensor unpermute(
    const Tensor& x_, const std::optional<Tensor>& weight_, const Tensor& row_,
    const Tensor& offset_) {
  check_unpermute(x_, weight_, row_, offset_);
  const Guard guard(x_);
  const Tensor x = dense(x_), row = dense(row_), offset = dense(offset_);
  const std::optional<Tensor> weight = dense(weight_);
  const int64_t tokens = offset.size(0) - 1;
  Tensor y = torch::stable::new_empty(x, {tokens, x.size(1)});
  dispatch_pack(x, {x.const_data_ptr(), y.const_data_ptr()}, [&](auto element, auto n) {
    using T = decltype(element);
    using P = Pack<T, n.value>;
    launch_rows(
        unpermute_kernel<T, n.value>, x, tokens, data<P>(x), data_or_null<Acc<T>>(weight),
        data<int64_t>(row), data<int64_t>(offset), mutable_data<P>(y), x.size(0), row.size(0),
        tokens, x.size(1) / n.value);
  });
  return y;
}

std::tuple<Tensor, Tensor> unpermute_backward(
    const Tensor& dy_, const Tensor& x_, const Tensor& weight_, const Tensor& token_) {
  check_backward(dy_, x_, weight_, token_);
  const Guard guard(x_);
  const Tensor dy = dense(dy_), x = dense(x_), weight = dense(weight_), token = dense(token_);
  const int64_t rows = x.size(0);
  Tensor dx = torch::stable::new_empty(x, {rows, x.size(1)});
  Tensor dweight = torch::stable::new_empty(weight, {rows});
  const auto pointers = {dy.const_data_ptr(), x.const_data_ptr(), dx.const_data_ptr()};
  dispatch_pack(x, pointers, [&](auto element, auto n) {
    using T = decltype(element);
    using P = Pack<T, n.value>;
    launch_rows(
        unpermute_backward_kernel<T, n.value>, x, rows, data<P>(dy), data<P>(x),
        data<Acc<T>>(weight), data<int64_t>(token), mutable_data<P>(dx),
        mutable_data<Acc<T>>(dweight), dy.size(0), rows, x.size(1) / n.value);
  });
  return {dx, dweight};
}

}  // namespace
}  // namespace coterie

COTERIE_KERNELS(m) {
  m.impl("permute", TORCH_BOX(&coterie::permute));
  m.impl("unpermute", TORCH_BOX(&coterie::unpermute));
  m.impl("unpermute_backward", TORCH_BOX(&coterie::unpermute_backward));
}
