// What a launch knows of one rank: fields of 8 bytes, filled in this order by csrc/fused_launch.py.
//
// Legend: R ranks, P rows of this rank's pool (sorted by local expert, each expert's rows at a
// multiple of kTile), Q tiles of kTile rows of it, L local experts, D width, F hidden width, V
// visits (tokens that this rank has received: each comes once, for all its experts here), N rows
// (a visit has one for each of its experts). Word: 8 bytes.
#pragma once

#include <cstdint>

#include "../rows.h"

namespace coterie::fused {

constexpr int kTile = 128;       // rows of a tile
constexpr int kDepth = 64;       // what a step of a product takes of K
constexpr int kMostRanks = 64;   // flags of each kind in a window
constexpr int kMostHere = 8;     // ranks of one launch
constexpr int kMostSlabs = 16;
constexpr int kThreads = 384;    // of a block: one group that loads, two that multiply
constexpr int kLoaders = 128;
constexpr int kMultipliers = 256;

using Number = BFloat16;

struct Rank {
  int64_t rank;
  int64_t ranks;
  int64_t epoch;                    // number of this dispatch, from 1
  unsigned char* const* window_R;   // every rank's window, where this rank reaches it
  int64_t rows_at, home_at;         // bytes from a window's start: rows sent, results returned
  const int64_t* begin_R;           // in each source's window, the first row that is for this rank
  const int64_t* before_R1;         // visits received from ranks below; the last: V

  // the plan (csrc/plan.cu)
  const int32_t* source_P;          // the rank that each row comes from; -1: padding
  const int32_t* row_P;             // its row in that rank's window
  const float* weight_P;            // its combine weight; 0 in padding. null: results are summed
  const int32_t* tiles;             // Q
  const int32_t* expert_Q;          // of each tile, by place
  const int32_t* order_Q;           // tiles in the order in which they can start; null: by place
  const int32_t* round_Q;           // by place: the source, counted from this rank down, it waits for
  const int32_t* run_Q2;            // in that order: first and length of the run of one expert
  const int32_t* span_L2;           // of each expert the first row and the number of rows
  const int64_t* offset_V1;         // of each visit, the first of its rows in place_N
  const int32_t* place_N;           // places of rows in the pool, by visit

  int64_t pool_rows;                // P
  int64_t experts;                  // L
  int64_t width;                    // D
  int64_t hidden;                   // F
  int64_t inner;                    // combine: K; weight_gradient: rows of a gradient

  Number* pool_PD;                  // rows that were pulled; combine: results
  const Number* left_PK;            // combine, weight_gradient: the first factor
  Number* weights;                  // of the experts; weight_gradient: their gradient
  Number* hidden_PH;                // gate, then up; may be null in dispatch
  Number* act_PF;                   // activations; dispatch_backward: weighted
  Number* grad_PH;                  // gradient of hidden_PH
  float* partial_PN;                // of rows' weights' gradients, what each tile contributes

  uint32_t* counters;               // all 0; kReady or kSlab + Q or kMostSlabs of them
  int64_t* failure;                 // what a wait in vain was for, on the host (5 words)
  int64_t patience;                 // ns that a flag may take
  int64_t pulls;                    // dispatch: 0: the pool is there already
  int64_t closes;                   // dispatch: wait until all ranks have pulled
  int64_t slabs;                    // combine: runs of columns, one after the other
  int64_t pace;                     // bytes per us that cross; 0: as fast as it goes
  uint64_t* waits;                  // ns waited for each rank's rows (R), for its end (R); may be null
};

// Of the counters.
constexpr int kNextTile = 0, kNextPull = 1, kNextPut = 2, kFinished = 3;
constexpr int kLinkBusy = 4;  // two of them
constexpr int kAwaited = 16;  // of each rank, how many warps have begun to wait for its rows
constexpr int kReady = kAwaited + kMostRanks, kSlab = kReady;

// At the start of a window: for each other rank the epoch in which its rows are there, and that in
// which it has put (or pulled) everything.
struct Flags {
  uint32_t filled_R[kMostRanks];
  uint32_t done_R[kMostRanks];
};

// What a rank waited for in vain; failure[0].
enum Complaint : int64_t { kNone, kFilled, kReadyTile, kSlabDone, kDone };

}  // namespace coterie::fused
