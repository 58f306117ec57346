// What one multiplying thread holds of a tile of sums, and how it reads and writes rows.
//
// Of products of 64 rows (PTX ISA, wgmma) each thread has two rows, 8 apart, and of each block of 8
// columns the same pair. Four neighbouring lanes (a quad) share rows. A word is such a pair as
// bf16; transposed within the quad, four words are 8 neighbouring columns of a row: 16 bytes.
#pragma once

#include "../device.cuh"
#include "rank.h"

namespace coterie::fused {

template <int kColumns>
constexpr int kSums = kTile * kColumns / kMultipliers;  // of a thread
template <int kColumns>
constexpr int kGroups = kColumns / 32;  // of four blocks of 8 columns

// thread: 0 … kMultipliers - 1; half: 0, 1.
__host__ __device__ constexpr int row_of(int thread, int half) {
  return thread / kLoaders * 64 + thread % kLoaders / 32 * 16 + thread % 32 / 4 + 8 * half;
}
__host__ __device__ constexpr int column_of(int thread, int block) {
  return block * 8 + thread % 4 * 2;
}
// Which of a thread's sums is the first of a pair.
__host__ __device__ constexpr int sum_of(int block, int half) { return block * 4 + half * 2; }

struct Pair {
  float first, second;
};

union Word {
  Number number[2];
  uint32_t bits;
};

__device__ __forceinline__ uint32_t packed(float first, float second) {
#ifdef COTERIE_ON_HOST
  Word word;
  word.number[0] = static_cast<Number>(first);
  word.number[1] = static_cast<Number>(second);
  return word.bits;
#else
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
  return bits;
#endif
}

__device__ __forceinline__ Pair unpacked(uint32_t bits) {
#ifdef COTERIE_ON_HOST
  Word word;
  word.bits = bits;
  return {static_cast<float>(word.number[0]), static_cast<float>(word.number[1])};
#else
  return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
#endif
}

// word[i] of lane q of a quad becomes word[q] of lane i.
__device__ __forceinline__ void transpose(uint32_t (&word)[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t given = __shfl_xor_sync(kAllLanes, odd ? word[i] : word[i + 1], 1);
    (odd ? word[i] : word[i + 1]) = given;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t given = __shfl_xor_sync(kAllLanes, upper ? word[i] : word[i + 2], 2);
    (upper ? word[i] : word[i + 2]) = given;
  }
}

__device__ __forceinline__ uint4 load_16(const Number* at) {
  return *reinterpret_cast<const uint4*>(at);
}

// One store, whatever the compiler thinks of four.
__device__ __forceinline__ void store_16(Number* at, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#ifdef COTERIE_ON_HOST
  *reinterpret_cast<uint4*>(at) = make_uint4(a, b, c, d);
#else
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
#endif
}

// 32 columns of a row, from `row` on: each lane of the quad gives or gets its words.
__device__ __forceinline__ void write_words(Number* row, uint32_t (&word)[4]) {
  transpose(word);
  store_16(row + threadIdx.x % 4 * 8, word[0], word[1], word[2], word[3]);
}

// What a lane reads of them; the words, once it is needed.
__device__ __forceinline__ uint4 read_row(const Number* row) {
  return load_16(row + threadIdx.x % 4 * 8);
}

__device__ __forceinline__ void to_words(const uint4& read, uint32_t (&word)[4]) {
  word[0] = read.x, word[1] = read.y, word[2] = read.z, word[3] = read.w;
  transpose(word);
}

// Writes a thread's sums to rows of `width` numbers, at row 0 of the tile; columns beyond `end`
// (a multiple of 32, from the tile's first) are left out.
template <int kColumns>
__device__ __forceinline__ void write_tile(
    int thread, const float (&sum)[kSums<kColumns>], Number* tile, int64_t width, int64_t end) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Number* row = tile + row_of(thread, half) * width;
#pragma unroll
    for (int group = 0; group < kGroups<kColumns>; ++group) {
      if (group * 32 >= end) break;
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = sum_of(group * 4 + i, half);
        word[i] = packed(sum[at], sum[at + 1]);
      }
      write_words(row + group * 32, word);
    }
  }
}

}  // namespace coterie::fused
