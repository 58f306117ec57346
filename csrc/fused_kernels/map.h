// A matrix in global memory as the tensor memory accelerator reads it, box by box.
//
// Beyond the edges of the matrix a box is filled with zeros.
#pragma once

#include "rank.h"

#ifdef COTERIE_ON_HOST
namespace coterie::fused {
struct alignas(128) Map {  // as large as CUtensorMap
  const Number* start;
  int64_t columns, rows;
  int32_t box_columns, box_rows;
};
// What the driver wants of a map is wanted here too.
inline Map map_of(
    const Number* start, int64_t rows, int64_t columns, int box_rows, int box_columns) {
  STD_TORCH_CHECK(
      box_columns * sizeof(Number) == 128 && box_rows <= 256 && columns * sizeof(Number) % 16 == 0 &&
          reinterpret_cast<uintptr_t>(start) % 16 == 0 && rows < int64_t{1} << 32,
      "coterie: no tensor map for ", rows, " rows of ", columns, " numbers in boxes of ", box_rows,
      " x ", box_columns);
  return {start, columns, rows, box_columns, box_rows};
}
}  // namespace coterie::fused
#else
#include <cuda.h>
#include <cuda_runtime.h>

namespace coterie::fused {

using Map = CUtensorMap;

// The driver's function, found without linking libcuda.
inline decltype(&cuTensorMapEncodeTiled) encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    const auto error = cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    STD_TORCH_CHECK(
        error == cudaSuccess && function != nullptr,
        "coterie: this CUDA driver has no tensor maps; it must be 12.0 or newer");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return found;
}

// Boxes of box_rows x box_columns, 128 bytes wide, swizzled.
inline Map map_of(
    const Number* start, int64_t rows, int64_t columns, int box_rows, int box_columns) {
  if (rows == 0) return Map{};  // no tile loads through it
  Map map;
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride[1] = {static_cast<cuuint64_t>(columns) * sizeof(Number)};
  const cuuint32_t box[2] = {
      static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t step[2] = {1, 1};
  const CUresult error = encoder()(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<Number*>(start), size, stride, box,
      step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  STD_TORCH_CHECK(
      error == CUDA_SUCCESS, "coterie: no tensor map for ", rows, " rows of ", columns,
      " numbers (CUDA error ", static_cast<int>(error), ")");
  return map;
}

}  // namespace coterie::fused
#endif
