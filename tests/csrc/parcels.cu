// Of each row of a pool, to how many places the unit that looks at it brings it.
#include "fused_kernels/pull.cuh"

namespace coterie {
namespace {

__global__ void parcels_kernel(const fused::Rank rank, int64_t* count_P) {
  const int place = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (place < *rank.tiles * fused::kTile) count_P[place] = fused::parcel_at(rank, place).to.count;
}

Tensor parcels(const Tensor& words) {
  fused::Rank rank;
  std::memcpy(&rank, words.const_data_ptr(), sizeof rank);
  Tensor count_P = torch::stable::new_zeros(words, {rank.pool_rows});
  const auto blocks = static_cast<unsigned>(rank.pool_rows / fused::kTile);
  launch(parcels_kernel, blocks, fused::kTile, 0, words, rank, mutable_data<int64_t>(count_P));
  return count_P;
}

}  // namespace
}  // namespace coterie

STABLE_TORCH_LIBRARY_FRAGMENT(COTERIE_LIBRARY, m) { m.def("parcels(Tensor words) -> Tensor"); }

COTERIE_KERNELS(m) { m.impl("parcels", TORCH_BOX(&coterie::parcels)); }
