// Which tile of a product comes as the i-th: slab after slab, and within a slab runs of tiles of
// one expert, column after column, so that blocks that work at a time share rows and weights.
#pragma once

#include "rank.h"

namespace coterie::fused {

struct Tile {
  int number;  // by place in the pool
  int expert;
  int column;  // in units of a tile's columns
  int slab;
};

// Tiles of kColumns side by side.
template <int kColumns>
__host__ __device__ int columns_of(int64_t width) {
  return static_cast<int>((width + kColumns - 1) / kColumns);
}

// The first column tile of a slab.
__host__ __device__ inline int slab_begin(int columns, int slabs, int slab) {
  return columns * slab / slabs;
}

__host__ __device__ inline int slab_of(int columns, int slabs, int column) {
  int slab = column * slabs / columns;
  while (slab_begin(columns, slabs, slab + 1) <= column) ++slab;
  return slab;
}

// The i-th of *rank.tiles * columns.
__device__ inline Tile tile_at(const Rank& rank, int columns, int slabs, int i) {
  const int tiles = *rank.tiles;
  const int slab = slab_of(columns, slabs, i / tiles);
  const int begin = slab_begin(columns, slabs, slab);
  const int wide = slab_begin(columns, slabs, slab + 1) - begin;
  const int within = i - begin * tiles;
  const int turn = within / wide;  // lies in the run that is worked on
  const int first = rank.run_Q2[2 * turn], length = rank.run_Q2[2 * turn + 1];
  const int step = within - first * wide;
  const int place = first + step % length;
  const int number = rank.order_Q ? rank.order_Q[place] : place;
  return {number, rank.expert_Q[number], begin + step / length, slab};
}

}  // namespace coterie::fused
