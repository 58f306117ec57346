// Barriers in shared memory, bulk copies and tensor loads: they end late, and in any order.
#include <array>

#include "machine.h"
#include "tensor_map.h"

namespace on_ptx {
namespace {

constexpr int kRow = 128;  // bytes of a row of a box, which are swizzled

void complete_if_all_came(Barrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) {
    ++barrier.phase;
    barrier.pending = barrier.expected;
  }
}

void arrive(const Thread& t, Barrier& barrier, int64_t bytes) {
  if (barrier.pending == 0) t.fail("more threads arrive than are expected");
  barrier.bytes += bytes;
  --barrier.pending;
  complete_if_all_came(barrier);
}

void initialise(Thread& t, const Instruction& i) {
  const auto at = static_cast<uint32_t>(t.address(i.operand[0]));
  t.shared_at(at, 8, 8);
  const auto count = t.get<uint32_t>(i.operand[1]);
  if (!t.block.barrier.try_emplace(at, Barrier{count, count}).second) {
    t.fail("there is a barrier already");
  }
}

void invalidate(Thread& t, const Instruction& i) {
  const auto at = static_cast<uint32_t>(t.address(i.operand[0]));
  t.barrier_at(at);
  t.block.barrier.erase(at);
}

template <bool kBytes>
void arrive_at(Thread& t, const Instruction& i) {
  perhaps_give_way();
  auto& barrier = t.barrier_at(static_cast<uint32_t>(t.address(i.operand[1])));
  t.order.release(t.block.name_of(t.address(i.operand[1])));
  arrive(t, barrier, kBytes ? t.get<uint32_t>(i.operand[2]) : 0);
}

// Lets some load of the block end.
void go_on(Block& block) {
  auto& loads = block.under_way;
  if (loads.empty() || chance(2)) return;
  std::swap(loads[on_host::random()() % loads.size()], loads.back());
  const auto load = std::move(loads.back());
  loads.pop_back();
  load();
}

void try_wait(Thread& t, const Instruction& i) {
  go_on(t.block);
  const auto& barrier = t.barrier_at(static_cast<uint32_t>(t.address(i.operand[1])));
  bool done = (barrier.phase & 1) != (t.get<uint32_t>(i.operand[2]) & 1);
  if (done && chance(8)) done = false;  // it may always say so
  if (!done) on_host::spin();
  if (!done && is_stuck()) {
    t.fail(
        "it waits in vain for " + std::to_string(barrier.pending) + " threads and " +
        std::to_string(barrier.bytes) + " bytes");
  }
  if (done) t.order.acquire(t.block.name_of(t.address(i.operand[1])));
  t.set(i.operand[0], done);
}

void check_fence(const Thread& t, const void* from, int64_t bytes) {
  if (!t.stores.behind_fence(reinterpret_cast<uint64_t>(from), bytes)) {
    t.fail("it reads what was stored without a fence between");
  }
  if (!t.order.load(reinterpret_cast<uint64_t>(from), bytes)) {
    t.fail("nothing orders it behind the last store there");
  }
}

// `bytes` of a load have come.
void came(Block& block, uint32_t at, int64_t bytes) {
  const auto found = block.barrier.find(at);
  if (found == block.barrier.end()) on_host::fail("a load's barrier is gone before it ends");
  found->second.bytes -= bytes;
  complete_if_all_came(found->second);
}

// The box at {x, y} of a tensor, zeros beyond its edges; rows of 128 bytes, whose 16-byte pieces
// are swizzled by bits 7 to 9 of the address (CUDA driver API, CU_TENSOR_MAP_SWIZZLE_128B).
void load_box(Thread& t, const Instruction& i) {
  const auto& from = i.operand[1];
  const auto* map = reinterpret_cast<const TensorMap*>(t.address(from));
  if (reinterpret_cast<uintptr_t>(map) % 64) t.fail("a tensor map that is not aligned");
  if (map->box_columns * 2 != kRow) t.fail("a box that is not 128 bytes wide");
  const int x = t.get<int>(from.part[0]), y = t.get<int>(from.part[1]);
  const auto to = static_cast<uint32_t>(t.address(i.operand[0]));
  const auto barrier = static_cast<uint32_t>(t.address(i.operand[2]));
  const int64_t bytes = int64_t{kRow} * map->box_rows;
  char* const start = t.shared_at(to, bytes, 1024);
  t.check_no_barrier(to, bytes);
  t.barrier_at(barrier);
  const auto* const matrix = static_cast<const uint16_t*>(map->start);
  for (int64_t row = std::max(y, 0); row < std::min<int64_t>(y + map->box_rows, map->rows); ++row) {
    const int64_t columns = std::min<int64_t>(map->box_columns, map->columns - x);
    if (columns > 0) check_fence(t, matrix + row * map->columns + x, columns * 2);
  }
  t.block.under_way.push_back([&block = t.block, matrix, map, x, y, to, start, barrier, bytes] {
    for (int64_t row = 0; row < map->box_rows; ++row) {
      for (int64_t column = 0; column < map->box_columns; ++column) {
        const int64_t r = y + row, c = x + column;
        const bool inside = r >= 0 && r < map->rows && c >= 0 && c < map->columns;
        uint16_t number = 0;
        if (inside) number = matrix[r * map->columns + c];
        const uint64_t linear = to + row * kRow + column * 2;
        const uint64_t swizzled = linear ^ (linear >> 7 & 7) << 4;
        std::memcpy(start + (swizzled - to), &number, 2);
      }
    }
    came(block, barrier, bytes);
  });
}

char* global_at(const Thread& t, uint64_t address, uint32_t bytes) {
  if (address % 16 || bytes % 16) t.fail("not a multiple of 16 bytes");
  return reinterpret_cast<char*>(address);
}

// [shared], [global], bytes, [barrier]
void load_bulk(Thread& t, const Instruction& i) {
  const auto bytes = t.get<uint32_t>(i.operand[2]);
  const auto to = static_cast<uint32_t>(t.address(i.operand[0]));
  const auto barrier = static_cast<uint32_t>(t.address(i.operand[3]));
  const char* from = global_at(t, t.address(i.operand[1]), bytes);
  char* const start = t.shared_at(to, bytes, 16);
  t.check_no_barrier(to, bytes);
  check_fence(t, from, bytes);
  t.barrier_at(barrier);
  t.block.under_way.push_back([&block = t.block, start, from, bytes, barrier] {
    std::memcpy(start, from, bytes);
    came(block, barrier, bytes);
  });
}

// [global], [shared], bytes: it is read, and some time later written.
void store_bulk(Thread& t, const Instruction& i) {
  const auto bytes = t.get<uint32_t>(i.operand[2]);
  char* const to = global_at(t, t.address(i.operand[0]), bytes);
  const char* from = t.shared_at(static_cast<uint32_t>(t.address(i.operand[1])), bytes, 16);
  const auto piece = std::make_shared<std::vector<char>>();
  const auto read = [piece, from, bytes] {
    if (piece->empty()) piece->assign(from, from + bytes);
  };
  t.reads.open.push_back(read);
  t.writes.open.push_back([&t, piece, read, to, bytes] {
    read();
    std::memcpy(to, piece->data(), bytes);
    t.stores.store(reinterpret_cast<uint64_t>(to), bytes);
  });
  t.stored.emplace_back(reinterpret_cast<uint64_t>(to), bytes);
}

void wait_reads(Thread& t, const Instruction& i) { t.reads.wait(t.get<uint32_t>(i.operand[0])); }

void wait_writes(Thread& t, const Instruction& i) {
  const auto but = t.get<uint32_t>(i.operand[0]);
  t.reads.wait(but);
  t.writes.wait(but);
  if (but > 0) return;
  for (const auto& [to, bytes] : t.stored) {
    if (!t.order.store(to, bytes)) t.fail("nothing orders it behind the last store there");
  }
  t.stored.clear();
}

}  // namespace

void add_async(Table& table) {
  table["mbarrier.init.shared::cta.b64"] = initialise;
  table["mbarrier.inval.shared::cta.b64"] = invalidate;
  table["mbarrier.arrive.shared::cta.b64"] = arrive_at<false>;
  table["mbarrier.arrive.shared::cluster.b64"] = arrive_at<false>;
  table["mbarrier.arrive.expect_tx.shared::cta.b64"] = arrive_at<true>;
  table["mbarrier.try_wait.parity.shared::cta.b64"] = try_wait;
  table["mapa.shared::cluster.u32"] = [](Thread& t, const Instruction& i) {
    if (t.get<uint32_t>(i.operand[2]) != 0) t.fail("there is one block in a cluster");
    t.set(i.operand[0], t.get<uint32_t>(i.operand[1]));
  };
  table["prefetch.tensormap"] = [](Thread&, const Instruction&) {};
  const std::string told = ".mbarrier::complete_tx::bytes";
  table["cp.async.bulk.tensor.2d.shared::cluster.global" + told] = load_box;
  table["cp.async.bulk.shared::cluster.global" + told] = load_bulk;
  table["cp.async.bulk.global.shared::cta.bulk_group"] = store_bulk;
  table["cp.async.bulk.commit_group"] = [](Thread& t, const Instruction&) {
    t.reads.commit();
    t.writes.commit();
  };
  table["cp.async.bulk.wait_group.read"] = wait_reads;
  table["cp.async.bulk.wait_group"] = wait_writes;
}

}  // namespace on_ptx
