// Products of warp groups (PTX ISA, "wgmma"): each thread computes its own sums, once it waits for
// them at the latest.
#include "machine.h"

namespace on_ptx {
namespace {

constexpr int kRows = 64, kDepth = 16;  // of one instruction

float number_at(const Thread& t, uint64_t address) {
  uint16_t half;
  std::memcpy(&half, t.shared_at(address, 2, 2), 2);
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// A factor in shared memory, swizzled in rows of 128 bytes (PTX ISA, "Matrix descriptor" and
// "Strides"); i: row of the left one or column of the right one.
struct Factor {
  uint64_t start, leading, stride;
  bool across;  // i is the inner index

  Factor(const Thread& t, uint64_t descriptor, bool across) : across(across) {
    const auto field = [&](int from) { return (descriptor >> from & 0x3fff) << 4; };
    start = field(0), leading = field(16), stride = field(32);
    if (descriptor >> 62 != 1) t.fail("a factor that is not swizzled by 128 bytes");
    if (descriptor >> 49 & 7) t.fail("a factor with a base offset");
  }
  float at(const Thread& t, int i, int k) const {
    const uint64_t linear =
        across ? start + i / 64 * leading + i % 64 * 2 + k / 8 * stride + k % 8 * 128
               : start + i / 8 * stride + i % 8 * 128 + k * 2;
    return number_at(t, linear ^ (linear >> 7 & 7) << 4);
  }
};

// {sums}, left, right, keep, sign, sign, across, across
template <int kColumns>
void multiply(Thread& t, const Instruction& i) {
  const auto& o = i.operand;
  meet_warp(t);
  if (o[0].part.size() != kColumns / 2) t.fail("it has not as many sums as it needs");
  if (t.get<int>(o[4]) != 1 || t.get<int>(o[5]) != 1) t.fail("a factor that is negated");
  const Factor left(t, t.get<uint64_t>(o[1]), t.get<int>(o[6]) == 1);
  const Factor right(t, t.get<uint64_t>(o[2]), t.get<int>(o[7]) == 1);
  const bool keep = t.get<bool>(o[3]);
  const int thread = static_cast<int>(on_host::number() % 128);
  t.products.open.push_back([&t, &sums = o[0].part, left, right, keep, thread] {
    const int row = thread / 32 * 16 + thread % 32 / 4;
    float a[2][kDepth];
    for (int half = 0; half < 2; ++half) {
      for (int k = 0; k < kDepth; ++k) a[half][k] = left.at(t, row + 8 * half, k);
    }
    for (int n = 0; n < kColumns / 4; ++n) {
      const int column = n / 2 * 8 + thread % 4 * 2 + n % 2;
      float sum[2] = {};
      for (int k = 0; k < kDepth; ++k) {
        const float b = right.at(t, column, k);
        sum[0] += a[0][k] * b;
        sum[1] += a[1][k] * b;
      }
      for (int half = 0; half < 2; ++half) {
        const Operand& to = sums[n / 2 * 4 + half * 2 + n % 2];
        t.set(to, (keep ? t.get<float>(to) : 0.0f) + sum[half]);
      }
    }
  });
}

}  // namespace

void add_products(Table& table) {
  table["wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16"] = multiply<256>;
  table["wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16"] = multiply<128>;
  table["wgmma.fence.sync.aligned"] = [](Thread& t, const Instruction&) { meet_warp(t); };
  table["wgmma.commit_group.sync.aligned"] = [](Thread& t, const Instruction&) {
    t.products.commit();
  };
  table["wgmma.wait_group.sync.aligned"] = [](Thread& t, const Instruction& i) {
    t.products.wait(t.get<uint32_t>(i.operand[0]));
  };
}

}  // namespace on_ptx
