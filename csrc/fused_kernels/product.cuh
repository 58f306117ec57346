// What a product of two matrices in tiles is made of, for both places where it runs: where the
// boxes of a step lie, and in which order a thread's sums come out.
//
// A task (dispatch.cuh and so on) says which boxes, and how many columns a tile has: kColumns. A
// step takes kDepth of K. Of each factor it needs kTile rows (left) or kColumns columns (right).
// Along K: boxes are kDepth of K wide, and hold up to 256 of the factor's rows. Across K: boxes
// hold kDepth rows of K, 64 numbers wide.
#pragma once

#include "map.h"

namespace coterie::fused {

enum class Along { k, across };  // which index of a factor is the inner one in memory

struct Box {
  int x, y;  // the inner and the outer index where it begins
};

struct Maps {
  Map left, right;
};

template <int kColumns>
struct Storage;  // of a block, in shared memory

template <Along kAlong, int kRows>
constexpr int boxes_of() {
  return kAlong == Along::k ? 1 : kRows / 64;
}

}  // namespace coterie::fused

#ifdef COTERIE_ON_HOST
#include "product_on_host.h"
#else
#include "product_on_gpu.cuh"
#endif
