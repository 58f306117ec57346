// Row gather (permute) and weighted row sum (unpermute) on the CPU.
//
// Every output number is computed by one thread in a fixed order, without fused multiply-add, so
// the bits do not depend on the number of threads or on the CPU's vector width.
#include "cpu.h"
#include "rows.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

namespace coterie {
namespace {

constexpr int64_t kBlock = 64;  // columns summed at a time: the sums stay in registers or L1
constexpr int64_t kLanes = 16;  // partial sums of a dot product, whatever the vector width

// y[d] = sum of weight[row[j]] * x[row[j], d] over j in [0, rows); weight may be null (all ones).
template <class T>
COTERIE_MULTIVERSION void sum_rows(
    const T* __restrict__ x, const Acc<T>* __restrict__ weight, const int64_t* __restrict__ row,
    int64_t rows, int64_t width, T* __restrict__ y) {
  for (int64_t start = 0; start < width; start += kBlock) {
    const int64_t n = std::min(kBlock, width - start);
    Acc<T> sum[kBlock] = {};
    for (int64_t j = 0; j < rows; ++j) {
      const T* p = x + row[j] * width + start;
      const Acc<T> w = weight ? weight[row[j]] : Acc<T>(1);
      if (n == kBlock) {
        for (int64_t i = 0; i < kBlock; ++i) sum[i] += w * static_cast<Acc<T>>(p[i]);
      } else {
        for (int64_t i = 0; i < n; ++i) sum[i] += w * static_cast<Acc<T>>(p[i]);
      }
    }
    for (int64_t i = 0; i < n; ++i) y[start + i] = static_cast<T>(sum[i]);
  }
}

template <class T>
COTERIE_MULTIVERSION void scale_row(
    const T* __restrict__ x, Acc<T> weight, int64_t width, T* __restrict__ y) {
  for (int64_t i = 0; i < width; ++i) y[i] = static_cast<T>(weight * static_cast<Acc<T>>(x[i]));
}

// dx = weight * dy; returns <x, dy>.
template <class T>
COTERIE_MULTIVERSION Acc<T> scale_and_dot(
    const T* __restrict__ x, const T* __restrict__ dy, Acc<T> weight, int64_t width,
    T* __restrict__ dx) {
  Acc<T> lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      const Acc<T> g = static_cast<Acc<T>>(dy[i + l]);
      lane[l] += static_cast<Acc<T>>(x[i + l]) * g;
      dx[i + l] = static_cast<T>(weight * g);
    }
  }
  for (int64_t l = 0; i < width; ++i, ++l) {
    const Acc<T> g = static_cast<Acc<T>>(dy[i]);
    lane[l] += static_cast<Acc<T>>(x[i]) * g;
    dx[i] = static_cast<T>(weight * g);
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t l = 0; l < half; ++l) lane[l] += lane[l + half];
  }
  return lane[0];
}

void check_range(const Tensor& index, int64_t size, const char* name, const char* what) {
  const int64_t* p = data<int64_t>(index);
  const int64_t n = index.numel();
  const uint64_t limit = static_cast<uint64_t>(size);  // a negative index becomes a huge one
  bool bad = false;
  for (int64_t i = 0; i < n; ++i) bad |= static_cast<uint64_t>(p[i]) >= limit;
  for (int64_t i = 0; bad && i < n; ++i) {
    STD_TORCH_CHECK(
        static_cast<uint64_t>(p[i]) < limit,
        name, "[", i, "] is ", p[i], ", but there are ", size, " ", what, ": accepted are 0 to ", size - 1);
  }
}

void check_offsets(const Tensor& offset, int64_t rows) {
  const int64_t* p = data<int64_t>(offset);
  const int64_t last = offset.size(0) - 1;
  STD_TORCH_CHECK(
      p[0] == 0 && p[last] == rows && std::is_sorted(p, p + last + 1),
      "offset_T1 must rise from 0 to the length of row_A (", rows, ")");
}

// y[a] = weight[a] * x[token[a]]
Tensor permute(const Tensor& x_, const Tensor& token_, const std::optional<Tensor>& weight_) {
  check_rows(x_, "x_TD");
  check_index(token_, x_, "token_A");
  check_weight(weight_, x_, token_.size(0));
  const Tensor x = dense(x_), token = dense(token_);
  const std::optional<Tensor> weight = dense(weight_);
  const int64_t rows = token.size(0), width = x.size(1);
  check_range(token, x.size(0), "token_A", "tokens");
  Tensor y = torch::stable::new_empty(x, {rows, width});
  const int64_t* from = data<int64_t>(token);
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    const T* px = data<T>(x);
    const Acc<T>* w = data_or_null<Acc<T>>(weight);
    T* py = mutable_data<T>(y);
    torch::stable::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t a = begin; a < end; ++a) {
        const T* source = px + from[a] * width;
        if (w) {
          scale_row<T>(source, w[a], width, py + a * width);
        } else {
          std::memcpy(py + a * width, source, width * sizeof(T));
        }
      }
    });
  });
  return y;
}

// y[t] = sum of weight[row[j]] * x[row[j]] over j in [offset[t], offset[t + 1])
Tensor unpermute(
    const Tensor& x_, const std::optional<Tensor>& weight_, const Tensor& row_,
    const Tensor& offset_) {
  check_unpermute(x_, weight_, row_, offset_);
  const Tensor x = dense(x_), row = dense(row_), offset = dense(offset_);
  const std::optional<Tensor> weight = dense(weight_);
  const int64_t tokens = offset.size(0) - 1, width = x.size(1);
  check_offsets(offset, row.size(0));
  check_range(row, x.size(0), "row_A", "rows");
  Tensor y = torch::stable::new_empty(x, {tokens, width});
  const int64_t *r = data<int64_t>(row), *o = data<int64_t>(offset);
  const int64_t per_token = tokens ? (row.size(0) / tokens + 1) * width : 0;
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    const T* px = data<T>(x);
    const Acc<T>* w = data_or_null<Acc<T>>(weight);
    T* py = mutable_data<T>(y);
    torch::stable::parallel_for(0, tokens, grain(per_token), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        sum_rows<T>(px, w, r + o[t], o[t + 1] - o[t], width, py + t * width);
      }
    });
  });
  return y;
}

// dx[a] = weight[a] * dy[token[a]] and dweight[a] = <x[a], dy[token[a]]>
std::tuple<Tensor, Tensor> unpermute_backward(
    const Tensor& dy_, const Tensor& x_, const Tensor& weight_, const Tensor& token_) {
  check_backward(dy_, x_, weight_, token_);
  const Tensor dy = dense(dy_), x = dense(x_), weight = dense(weight_), token = dense(token_);
  const int64_t rows = x.size(0), width = x.size(1);
  check_range(token, dy.size(0), "token_A", "tokens");
  Tensor dx = torch::stable::new_empty(x, {rows, width});
  Tensor dweight = torch::stable::new_empty(weight, {rows});
  const int64_t* from = data<int64_t>(token);
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    const T *px = data<T>(x), *pdy = data<T>(dy);
    const Acc<T>* w = data<Acc<T>>(weight);
    T* pdx = mutable_data<T>(dx);
    Acc<T>* dw = mutable_data<Acc<T>>(dweight);
    torch::stable::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t a = begin; a < end; ++a) {
        const int64_t to = a * width;
        dw[a] = scale_and_dot<T>(px + to, pdy + from[a] * width, w[a], width, pdx + to);
      }
    });
  });
  return {dx, dweight};
}

// The rows of each token in ascending order, by counting: token t owns
// row[offset[t]] ... row[offset[t + 1] - 1].
std::tuple<Tensor, Tensor> invert(const Tensor& token_, int64_t tokens) {
  check_index(token_, token_, "token_A");
  STD_TORCH_CHECK(tokens >= 0, "num_tokens must not be negative");
  const Tensor token = dense(token_);
  const int64_t rows = token.size(0);
  check_range(token, tokens, "token_A", "tokens");
  Tensor row = torch::stable::new_empty(token, {rows});
  Tensor offset = torch::stable::new_empty(token, {tokens + 1});
  const int64_t* from = data<int64_t>(token);
  int64_t *r = mutable_data<int64_t>(row), *o = mutable_data<int64_t>(offset);
  std::fill(o, o + tokens + 1, 0);
  for (int64_t a = 0; a < rows; ++a) ++o[from[a] + 1];
  std::partial_sum(o, o + tokens + 1, o);
  std::vector<int64_t> next(o, o + tokens);
  for (int64_t a = 0; a < rows; ++a) r[next[from[a]]++] = a;
  return {row, offset};
}

}  // namespace
}  // namespace coterie

STABLE_TORCH_LIBRARY_IMPL(coterie, CPU, m) {
  m.impl("permute", TORCH_BOX(&coterie::permute));
  m.impl("unpermute", TORCH_BOX(&coterie::unpermute));
  m.impl("unpermute_backward", TORCH_BOX(&coterie::unpermute_backward));
  m.impl("invert", TORCH_BOX(&coterie::invert));
}
