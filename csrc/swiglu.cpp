// SwiGLU and its derivative on the CPU, each in one pass over memory: a = silu(gate) * up.
//
// h_AH holds gate then up in each row, H = 2F. PyTorch's own ops make two passes forward and five
// backward, each writing a tensor as large as the rows.
#include "cpu.h"
#include "rows.h"

#include <cmath>
#include <cstring>

namespace coterie {
namespace {

// exp to 2 units in the last place, without branches or calls, so that loops vectorise: the
// argument is split into k ln 2 + r with |r| <= ln 2 / 2, and exp(r) is a polynomial (Cephes expf).
// Beyond +-87 the result stays finite and nonzero; NaN stays NaN.
inline __attribute__((always_inline)) float fast_exp(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 87.0f ? 87.0f : x;
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  float n = x * 1.44269504088896341f + kShift;
  int32_t k;
  std::memcpy(&k, &n, sizeof k);
  n -= kShift;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // the low bits of the shifted number are k; as an exponent they make 2^k
  const uint32_t bits = (static_cast<uint32_t>(k) + 127u - 0x4B400000u) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

inline __attribute__((always_inline)) double fast_exp(double x) { return std::exp(x); }

template <class T>
COTERIE_MULTIVERSION void forward_row(const T* __restrict__ h, int64_t width, T* __restrict__ a) {
  const T* gate = h;
  const T* up = h + width;
  for (int64_t i = 0; i < width; ++i) {
    const Acc<T> g = static_cast<Acc<T>>(gate[i]);
    a[i] = static_cast<T>(g / (Acc<T>(1) + fast_exp(-g)) * static_cast<Acc<T>>(up[i]));
  }
}

template <class T>
COTERIE_MULTIVERSION void backward_row(
    const T* __restrict__ da, const T* __restrict__ h, int64_t width, T* __restrict__ dgate,
    T* __restrict__ dup, T* __restrict__ a) {
  const T* gate = h;
  const T* up = h + width;
  for (int64_t i = 0; i < width; ++i) {
    const Acc<T> g = static_cast<Acc<T>>(gate[i]), u = static_cast<Acc<T>>(up[i]);
    const Acc<T> d = static_cast<Acc<T>>(da[i]);
    const Acc<T> sigmoid = Acc<T>(1) / (Acc<T>(1) + fast_exp(-g));
    const Acc<T> silu = g * sigmoid;
    a[i] = static_cast<T>(silu * u);
    dup[i] = static_cast<T>(d * silu);
    dgate[i] = static_cast<T>(d * u * (sigmoid + silu * (Acc<T>(1) - sigmoid)));
  }
}

void check_gated(const Tensor& h) {
  check_rows(h, "h_AH");
  STD_TORCH_CHECK(h.size(1) % 2 == 0, "h_AH must have an even width, not ", h.size(1));
}

Tensor swiglu(const Tensor& h_) {
  check_gated(h_);
  const Tensor h = dense(h_);
  const int64_t rows = h.size(0), width = h.size(1) / 2;
  Tensor a = torch::stable::new_empty(h, {rows, width});
  dispatch(h, [&](auto element) {
    using T = decltype(element);
    const T* from = data<T>(h);
    T* to = mutable_data<T>(a);
    torch::stable::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) forward_row<T>(from + r * 2 * width, width, to + r * width);
    });
  });
  return a;
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& da_, const Tensor& h_) {
  check_gated(h_);
  const Tensor da = dense(da_), h = dense(h_);
  const int64_t rows = h.size(0), width = h.size(1) / 2;
  STD_TORCH_CHECK(
      da.dim() == 2 && da.size(0) == rows && da.size(1) == width &&
          da.scalar_type() == h.scalar_type(),
      "da_AF must be ", rows, " x ", width, " and of h_AH's dtype");
  Tensor dh = torch::stable::new_empty(h, {rows, 2 * width});
  Tensor a = torch::stable::new_empty(h, {rows, width});
  dispatch(h, [&](auto element) {
    using T = decltype(element);
    const T* pda = data<T>(da);
    const T* ph = data<T>(h);
    T* pdh = mutable_data<T>(dh);
    T* pa = mutable_data<T>(a);
    torch::stable::parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        T* dgate = pdh + r * 2 * width;
        backward_row<T>(
            pda + r * width, ph + r * 2 * width, width, dgate, dgate + width, pa + r * width);
      }
    });
  });
  return {dh, a};
}

}  // namespace
}  // namespace coterie

STABLE_TORCH_LIBRARY_IMPL(coterie, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&coterie::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&coterie::swiglu_backward));
}
