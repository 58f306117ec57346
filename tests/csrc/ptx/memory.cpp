// Loads, stores and atomics. Global memory is the host's own.
#include "machine.h"

namespace on_ptx {
namespace {

enum class Space { parameter, shared, global, strong };  // strong: global, ordered or not

template <Space kSpace>
char* where(const Thread& t, const Operand& memory, int64_t bytes) {
  const uint64_t address = t.address(memory);
  if constexpr (kSpace == Space::shared) {
    return t.shared_at(static_cast<uint32_t>(address), bytes, bytes);
  } else if constexpr (kSpace == Space::parameter) {
    return const_cast<char*>(t.parameters) + address;
  } else {
    if (address % bytes) t.fail("a global address is not aligned");
    return reinterpret_cast<char*>(address);
  }
}

template <class T, Space kSpace, int kCount>
void load(Thread& t, const Instruction& i) {
  T value[kCount];
  std::memcpy(value, where<kSpace>(t, i.operand[1], sizeof value), sizeof value);
  if (kSpace == Space::global && !t.order.load(t.address(i.operand[1]), sizeof value)) {
    t.fail("nothing orders it behind the last store there");
  }
  for (int n = 0; n < kCount; ++n) {
    // into a wider register with its sign
    using Wide = std::conditional_t<std::is_signed_v<T>, int64_t, T>;
    t.set(kCount == 1 ? i.operand[0] : i.operand[0].part[n], static_cast<Wide>(value[n]));
  }
}

template <class T, Space kSpace, int kCount>
void store(Thread& t, const Instruction& i) {
  T value[kCount];
  for (int n = 0; n < kCount; ++n) {
    value[n] = t.get<T>(kCount == 1 ? i.operand[1] : i.operand[1].part[n]);
  }
  std::memcpy(where<kSpace>(t, i.operand[0], sizeof value), value, sizeof value);
  if (kSpace == Space::shared) t.check_no_barrier(t.address(i.operand[0]), sizeof value);
  if (kSpace == Space::global) {
    t.stores.store(t.address(i.operand[0]), sizeof value);
    if (!t.order.store(t.address(i.operand[0]), sizeof value)) {
      t.fail("nothing orders it behind the last store there");
    }
  }
}

// Flags and counters: others go on before, at times, so that they are seen at any time.
template <class T>
void load_acquire(Thread& t, const Instruction& i) {
  perhaps_give_way();
  auto* at = reinterpret_cast<T*>(where<Space::global>(t, i.operand[1], sizeof(T)));
  t.set(i.operand[0], __atomic_load_n(at, __ATOMIC_SEQ_CST));
  t.stores.acquire();
  t.order.acquire(t.address(i.operand[1]));
}
template <class T>
void store_release(Thread& t, const Instruction& i) {
  perhaps_give_way();
  auto* at = reinterpret_cast<T*>(where<Space::global>(t, i.operand[0], sizeof(T)));
  t.order.release(t.address(i.operand[0]));
  __atomic_store_n(at, t.get<T>(i.operand[1]), __ATOMIC_SEQ_CST);
}
template <class T>
void atomic_add(Thread& t, const Instruction& i) {
  perhaps_give_way();
  t.order.relaxed_store(t.address(i.operand[1]));
  t.order.relaxed_load(t.address(i.operand[1]));
  auto* at = reinterpret_cast<T*>(where<Space::global>(t, i.operand[1], sizeof(T)));
  t.set(i.operand[0], __atomic_fetch_add(at, t.get<T>(i.operand[2]), __ATOMIC_SEQ_CST));
}
template <class T>
void atomic_max(Thread& t, const Instruction& i) {
  auto* at = reinterpret_cast<T*>(where<Space::global>(t, i.operand[1], sizeof(T)));
  t.set(i.operand[0], *at);
  *at = std::max(*at, t.get<T>(i.operand[2]));
}
template <class T, bool kRelease>
void reduce_add(Thread& t, const Instruction& i) {
  perhaps_give_way();
  if (kRelease) {
    t.order.release(t.address(i.operand[0]));
  } else {
    t.order.relaxed_store(t.address(i.operand[0]));
  }
  auto* at = reinterpret_cast<T*>(where<Space::global>(t, i.operand[0], sizeof(T)));
  __atomic_fetch_add(at, t.get<T>(i.operand[1]), __ATOMIC_SEQ_CST);
}

template <class T>
void of_type(Table& table, const std::string& type) {
  table["ld.param." + type] = load<T, Space::parameter, 1>;
  table["ld.shared." + type] = load<T, Space::shared, 1>;
  table["st.shared." + type] = store<T, Space::shared, 1>;
  // generic addresses, which are global ones in these kernels
  table["ld." + type] = load<T, Space::global, 1>;
  table["st." + type] = store<T, Space::global, 1>;
  table["ld.global." + type] = load<T, Space::global, 1>;
  table["st.global." + type] = store<T, Space::global, 1>;
  table["ld.volatile.global." + type] = load<T, Space::strong, 1>;
  table["st.volatile.global." + type] = store<T, Space::strong, 1>;
  for (const char* scope : {"gpu", "sys"}) {
    table[std::string("ld.acquire.") + scope + ".global." + type] = load_acquire<T>;
    table[std::string("st.release.") + scope + ".global." + type] = store_release<T>;
    table[std::string("red.release.") + scope + ".global.add." + type] = reduce_add<T, true>;
    table[std::string("red.relaxed.") + scope + ".global.add." + type] = reduce_add<T, false>;
  }
  table["atom.global.add." + type] = atomic_add<T>;
  table["atom.global.max." + type] = atomic_max<T>;
}

}  // namespace

void add_memory(Table& table) {
  for (const char* type : {"u32", "b32", "f32"}) of_type<uint32_t>(table, type);
  for (const char* type : {"u64", "b64"}) of_type<uint64_t>(table, type);
  of_type<int32_t>(table, "s32");
  of_type<int64_t>(table, "s64");
  for (const char* type : {"u32", "b32", "f32"}) {
    const std::string four = std::string("global.v4.") + type;
    table["ld." + four] = load<uint32_t, Space::global, 4>;
    table["st." + four] = store<uint32_t, Space::global, 4>;
  }
  // global memory is the host's, and generic addresses are its pointers
  table["cvta.to.global.u64"] = [](Thread& t, const Instruction& i) {
    t.set(i.operand[0], t.get<uint64_t>(i.operand[1]));
  };
  table["cvta.param.u64"] = [](Thread& t, const Instruction& i) {
    t.set(i.operand[0], t.parameters + t.get<uint64_t>(i.operand[1]));
  };
}

}  // namespace on_ptx
