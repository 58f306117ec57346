// Arithmetic, comparisons, conversions and moves.
#include <bit>
#include <cmath>
#include <limits>

#include "rows.h"
#include "machine.h"

namespace on_ptx {
namespace {

template <class T>
using Bits = std::make_unsigned_t<T>;

// Calls f with what operands 1, 2 and 3 hold.
template <class T, auto f>
void one(Thread& t, const Instruction& i) {
  t.set(i.operand[0], f(t.get<T>(i.operand[1])));
}
template <class T, auto f>
void two(Thread& t, const Instruction& i) {
  t.set(i.operand[0], f(t.get<T>(i.operand[1]), t.get<T>(i.operand[2])));
}
template <class T, auto f>
void three(Thread& t, const Instruction& i) {
  const auto& o = i.operand;
  t.set(o[0], f(t.get<T>(o[1]), t.get<T>(o[2]), t.get<T>(o[3])));
}

template <class T>
void comparisons(Table& table, const std::string& type) {
  table["setp.eq." + type] = two<T, [](T a, T b) { return a == b; }>;
  table["setp.ne." + type] = two<T, [](T a, T b) { return a != b; }>;
  table["setp.lt." + type] = two<T, [](T a, T b) { return a < b; }>;
  table["setp.le." + type] = two<T, [](T a, T b) { return a <= b; }>;
  table["setp.gt." + type] = two<T, [](T a, T b) { return b < a; }>;
  table["setp.ge." + type] = two<T, [](T a, T b) { return b <= a; }>;
}

template <class T>
void integers(Table& table, const std::string& type) {
  using B = Bits<T>;  // wraps around
  constexpr int width = sizeof(T) * 8;
  comparisons<T>(table, type);
  table["add." + type] = two<T, [](T a, T b) { return static_cast<T>(B(a) + B(b)); }>;
  table["sub." + type] = two<T, [](T a, T b) { return static_cast<T>(B(a) - B(b)); }>;
  table["mul.lo." + type] = two<T, [](T a, T b) { return static_cast<T>(B(a) * B(b)); }>;
  table["mad.lo." + type] =
      three<T, [](T a, T b, T c) { return static_cast<T>(B(a) * B(b) + B(c)); }>;
  table["div." + type] = two<T, [](T a, T b) { return b ? static_cast<T>(a / b) : T(-1); }>;
  table["rem." + type] = two<T, [](T a, T b) { return b ? static_cast<T>(a % b) : a; }>;
  table["min." + type] = two<T, [](T a, T b) { return std::min(a, b); }>;
  table["max." + type] = two<T, [](T a, T b) { return std::max(a, b); }>;
  table["neg." + type] = one<T, [](T a) { return static_cast<T>(-B(a)); }>;
  table["shr." + type] = [](Thread& t, const Instruction& i) {
    const T a = t.get<T>(i.operand[1]);
    const uint32_t by = t.get<uint32_t>(i.operand[2]);
    t.set(i.operand[0], by < width ? static_cast<T>(a >> by) : static_cast<T>(a < 0 ? -1 : 0));
  };
}

template <class T>
void bits(Table& table, const std::string& type) {
  table["and." + type] = two<T, [](T a, T b) { return static_cast<T>(a & b); }>;
  table["or." + type] = two<T, [](T a, T b) { return static_cast<T>(a | b); }>;
  table["xor." + type] = two<T, [](T a, T b) { return static_cast<T>(a ^ b); }>;
  if constexpr (std::is_same_v<T, bool>) {
    table["not." + type] = one<T, [](T a) { return !a; }>;
  } else {
    comparisons<T>(table, type);
    table["not." + type] = one<T, [](T a) { return static_cast<T>(~a); }>;
    table["shl." + type] = [](Thread& t, const Instruction& i) {
      const uint32_t by = t.get<uint32_t>(i.operand[2]);
      t.set(i.operand[0], by < sizeof(T) * 8 ? t.get<T>(i.operand[1]) << by : T(0));
    };
  }
}

template <class T>
void moves(Table& table, const std::string& type) {
  table["mov." + type] = one<T, [](T a) { return a; }>;
  table["selp." + type] = [](Thread& t, const Instruction& i) {
    const bool first = t.get<bool>(i.operand[3]);
    t.set(i.operand[0], t.get<T>(i.operand[first ? 1 : 2]));
  };
}

// mov.b64 also packs and unpacks pairs.
void move_64(Thread& t, const Instruction& i) {
  const auto &to = i.operand[0], &from = i.operand[1];
  if (from.kind == Operand::list) {
    t.set(
        to, t.get<uint32_t>(from.part[0]) | uint64_t{t.get<uint32_t>(from.part[1])} << 32);
  } else if (to.kind == Operand::list) {
    const auto whole = t.get<uint64_t>(from);
    t.set(to.part[0], static_cast<uint32_t>(whole));
    t.set(to.part[1], static_cast<uint32_t>(whole >> 32));
  } else {
    t.set(to, t.get<uint64_t>(from));
  }
}

template <class From>
void convert_from(Table& table, const std::string& type) {
  table["cvt.u32." + type] = one<From, [](From a) { return static_cast<uint32_t>(a); }>;
  table["cvt.s32." + type] = one<From, [](From a) { return static_cast<int32_t>(a); }>;
  table["cvt.u64." + type] = one<From, [](From a) { return static_cast<uint64_t>(a); }>;
  table["cvt.s64." + type] = one<From, [](From a) { return static_cast<int64_t>(a); }>;
  table["cvt.rn.f32." + type] = one<From, [](From a) { return static_cast<float>(a); }>;
}

template <class T, class Wide>
void wide_products(Table& table, const std::string& type) {
  table["mul.wide." + type] = two<T, [](T a, T b) { return static_cast<Wide>(a) * b; }>;
  table["mad.wide." + type] = [](Thread& t, const Instruction& i) {
    const auto& o = i.operand;
    t.set(o[0], static_cast<Wide>(Wide(t.get<T>(o[1])) * t.get<T>(o[2]) + t.get<Wide>(o[3])));
  };
}

void floats(Table& table) {
  comparisons<float>(table, "f32");
  table["add.f32"] = two<float, [](float a, float b) { return a + b; }>;
  table["sub.f32"] = two<float, [](float a, float b) { return a - b; }>;
  table["mul.f32"] = two<float, [](float a, float b) { return a * b; }>;
  table["neg.f32"] = one<float, [](float a) { return -a; }>;
  table["fma.rn.f32"] = three<float, [](float a, float b, float c) { return std::fma(a, b, c); }>;
  table["ex2.approx.f32"] = one<float, [](float a) { return std::exp2(a); }>;
  // of a divisor beyond 2^126 it gives 0 (PTX ISA, div)
  table["div.approx.f32"] = two<float, [](float a, float b) {
    return 0x1p126f < std::fabs(b) && std::isfinite(a) ? 0.0f : a / b;
  }>;
  table["cvt.rn.bf16x2.f32"] = two<float, [](float high, float low) {
    const auto half = [](float x) {
      return uint32_t{std::bit_cast<uint16_t>(static_cast<coterie::BFloat16>(x))};
    };
    return half(high) << 16 | half(low);
  }>;
}

}  // namespace

void add_arithmetic(Table& table) {
  integers<uint32_t>(table, "u32");
  integers<int32_t>(table, "s32");
  integers<uint64_t>(table, "u64");
  integers<int64_t>(table, "s64");
  bits<uint32_t>(table, "b32");
  bits<uint64_t>(table, "b64");
  bits<bool>(table, "pred");
  for (const char* type : {"u32", "s32", "b32", "f32"}) moves<uint32_t>(table, type);
  for (const char* type : {"u64", "s64", "b64"}) moves<uint64_t>(table, type);
  moves<bool>(table, "pred");
  table["mov.b64"] = move_64;
  convert_from<uint32_t>(table, "u32");
  convert_from<int32_t>(table, "s32");
  convert_from<uint64_t>(table, "u64");
  convert_from<int64_t>(table, "s64");
  wide_products<uint32_t, uint64_t>(table, "u32");
  wide_products<int32_t, int64_t>(table, "s32");
  floats(table);
  table["%globaltimer"] = [](Thread& t, const Instruction& i) {
    t.set(i.operand[0], on_host::nanoseconds());
  };
}

}  // namespace on_ptx
