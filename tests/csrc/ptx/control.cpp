// Branches, and what lanes of a warp or threads of a block do together.
#include "machine.h"

namespace on_ptx {
namespace {

constexpr uint32_t kAll = ~0u;

void check_all_lanes(Thread& t, const Operand& mask) {
  if (t.get<uint32_t>(mask) != kAll) t.fail("not by all lanes of a warp");
}

// d|p, a, b, c, mask: among lanes of the whole warp
template <auto other>
void shuffle(Thread& t, const Instruction& i) {
  const auto& o = i.operand;
  check_all_lanes(t, o[4]);
  if (t.get<uint32_t>(o[3]) != 31) t.fail("not among all lanes of a warp");
  const Operand& to = o[0].kind == Operand::list ? o[0].part[0] : o[0];
  const int lane = other(on_host_lane(), static_cast<int>(t.get<uint32_t>(o[2])));
  const uint64_t mine = t.get<uint32_t>(o[1]) | static_cast<uint64_t>(t.pc) << 32;
  const uint64_t theirs = on_host::exchange(mine, lane);
  if (theirs >> 32 != t.pc) t.fail("the other lane is elsewhere");
  t.set(to, static_cast<uint32_t>(theirs));
  if (o[0].kind == Operand::list) t.set(o[0].part[1], true);
}

void barrier(Thread& t, const Instruction& i) {
  const auto number = t.get<uint32_t>(i.operand[0]);
  if (number >= on_host::kBarriers) t.fail("there is no barrier " + std::to_string(number));
  const auto threads = on_host::grid->threads;
  const bool some = i.operand.size() > 1;
  const uint32_t among = some ? t.get<uint32_t>(i.operand[1]) : threads.x * threads.y * threads.z;
  if (among % on_host::kLanes) t.fail("not a whole number of warps");
  t.order.release(t.block.name_of(number));
  named_barrier(static_cast<int>(number), static_cast<int>(among));
  t.order.acquire(t.block.name_of(number));
}

// The first lane is it.
void elect(Thread& t, const Instruction& i) {
  check_all_lanes(t, i.operand[1]);
  meet_warp(t);
  t.set(i.operand[0].part[0], uint32_t{0});
  t.set(i.operand[0].part[1], on_host_lane() == 0);
}

// A warp gives registers back, or waits until there are as many as it wants.
template <int kSign>
void registers(Thread& t, const Instruction& i) {
  meet_warp(t);
  if (on_host_lane() == 0) {
    int& has = t.block.registers[on_host::number() / on_host::kLanes];
    const int wanted = t.get<int>(i.operand[0]), more = (wanted - has) * on_host::kLanes;
    if (more * kSign < 0) t.fail("it has " + std::to_string(has));
    while (more > t.block.free_registers) {
      on_host::spin();
      if (is_stuck()) t.fail("it waits in vain for registers");
    }
    t.block.free_registers -= more;
    has = wanted;
  }
  meet_warp(t);
}

}  // namespace

void add_control(Table& table) {
  const Handler branch = [](Thread& t, const Instruction& i) { t.pc = i.operand[0].value; };
  const Handler nothing = [](Thread&, const Instruction&) {};
  table["bra"] = table["bra.uni"] = branch;
  table["ret"] = table["exit"] = [](Thread& t, const Instruction&) { t.done = true; };
  table["trap"] = [](Thread&, const Instruction&) { on_host::fail("trap"); };
  table["shfl.sync.bfly.b32"] = shuffle<[](int lane, int by) { return (lane ^ by) & 31; }>;
  table["shfl.sync.idx.b32"] = shuffle<[](int, int from) { return from & 31; }>;
  table["bar.sync"] = barrier;
  table["bar.warp.sync"] = [](Thread& t, const Instruction& i) {
    check_all_lanes(t, i.operand[0]);
    meet_warp(t);
  };
  table["elect.sync"] = elect;
  table["setmaxnreg.dec.sync.aligned.u32"] = registers<-1>;
  table["setmaxnreg.inc.sync.aligned.u32"] = registers<1>;
  table["nanosleep.u32"] = [](Thread&, const Instruction&) {
    on_host::give_way(on_host::State::ready);
  };
  table["fence.proxy.async.global"] = [](Thread& t, const Instruction&) { t.stores.fence(); };
  for (const char* fence : {"membar.sys", "membar.gl", "fence.acq_rel.gpu", "fence.acq_rel.sys"}) {
    table[fence] = [](Thread& t, const Instruction&) { t.order.fence(); };
  }
  table["fence.proxy.async.shared::cta"] = table["fence.mbarrier_init.release.cluster"] = nothing;
}

}  // namespace on_ptx
