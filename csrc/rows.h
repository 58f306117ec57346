// What the CPU and CUDA row ops share: the arithmetic type, argument checks, dispatch on dtype.
//
// Only torch's stable ABI is used, so one binary serves torch 2.11 and later.
// Shapes: x_TD tokens x width, x_AD rows x width; A rows were gathered from T tokens.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>

namespace coterie {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Products and sums of fp32, bf16 and fp16 rows are taken in fp32; those of fp64 rows in fp64.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType acc_dtype(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls f with a value of x's element type: f(float{}), f(double{}), f(BFloat16{}) or f(Half{}).
template <class F>
void dispatch(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    default: STD_TORCH_CHECK(false, "rows must be float32, float64, bfloat16 or float16");
  }
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& t) {
  return t.has_value() ? data<T>(*t) : nullptr;
}

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  return t.has_value() ? std::optional<Tensor>(dense(*t)) : std::nullopt;
}

inline void check_same_device(const Tensor& t, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(
      t.is_cuda() == x.is_cuda() && t.get_device_index() == x.get_device_index(),
      name, " is on another device than the rows");
}

inline void check_rows(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.dim() == 2, name, " must have 2 dimensions, not ", x.dim());
}

inline void check_index(const Tensor& i, const Tensor& x, const char* name) {
  STD_TORCH_CHECK(
      i.dim() == 1 && i.scalar_type() == ScalarType::Long, name, " must be int64 with 1 dimension");
  check_same_device(i, x, name);
}

inline void check_weight(const std::optional<Tensor>& weight, const Tensor& x, int64_t rows) {
  if (!weight.has_value()) return;
  STD_TORCH_CHECK(
      weight->dim() == 1 && weight->size(0) == rows,
      "weight_A must have 1 dimension with one number per row (", rows, ")");
  STD_TORCH_CHECK(
      weight->scalar_type() == acc_dtype(x),
      "weight_A must be float64 for float64 rows and float32 for all others");
  check_same_device(*weight, x, "weight_A");
}

inline void check_unpermute(
    const Tensor& x, const std::optional<Tensor>& weight, const Tensor& row, const Tensor& offset) {
  check_rows(x, "x_AD");
  check_index(row, x, "row_A");
  check_index(offset, x, "offset_T1");
  check_weight(weight, x, x.size(0));
  STD_TORCH_CHECK(offset.size(0) >= 1, "offset_T1 must hold at least one number");
}

inline void check_backward(
    const Tensor& dy, const Tensor& x, const Tensor& weight, const Tensor& token) {
  check_rows(dy, "dy_TD");
  check_rows(x, "x_AD");
  check_index(token, x, "token_A");
  check_weight(weight, x, x.size(0));
  check_same_device(dy, x, "dy_TD");
  STD_TORCH_CHECK(
      dy.size(1) == x.size(1) && dy.scalar_type() == x.scalar_type(),
      "dy_TD must have the width and dtype of x_AD");
  STD_TORCH_CHECK(token.size(0) == x.size(0), "token_A must have one entry per row of x_AD");
}

}  // namespace coterie
