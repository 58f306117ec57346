// What stands in for a CUtensorMap on the host: the same size, in plain words.
#pragma once

#include <cstdint>

namespace on_ptx {

struct alignas(128) TensorMap {
  const void* start;
  int64_t columns, rows;  // of 2 bytes
  int32_t box_columns, box_rows;
};

}  // namespace on_ptx
