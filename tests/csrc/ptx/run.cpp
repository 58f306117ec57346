// Runs a kernel's threads, instruction by instruction.
#include "run.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <filesystem>
#include <fstream>
#include <sstream>

#include "machine.h"

namespace on_ptx {
namespace {

constexpr int kRegisters = 64 << 10;  // of a multiprocessor
constexpr uint64_t kPoison = 0xCDCDCDCDCDCDCDCD;  // what a register holds before it is written

std::string text_of(const std::filesystem::path& path) {
  std::ostringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

const std::vector<Program>& programs_in(const std::string& folder) {
  static std::map<std::string, std::vector<Program>> known;
  auto [found, is_new] = known.try_emplace(folder);
  if (!is_new) return found->second;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (entry.path().extension() != ".ptx") continue;
    for (auto& program : parse(text_of(entry.path()))) found->second.push_back(std::move(program));
  }
  return found->second;
}

// The mangled name of a function of this library, whatever its linkage, as nm knows it.
std::string name_of(const void* function) {
  Dl_info info;
  if (!dladdr(function, &info)) throw std::runtime_error("a kernel that no library has");
  static std::map<uint64_t, std::string> names = [&] {
    std::map<uint64_t, std::string> read;
    FILE* pipe = popen(("nm '" + std::string(info.dli_fname) + "'").c_str(), "r");
    char line[4096], name[4000], kind;
    unsigned long long at;
    while (pipe && std::fgets(line, sizeof line, pipe)) {
      if (std::sscanf(line, "%llx %c %3999s", &at, &kind, name) == 3) read[at] = name;
    }
    if (!pipe || pclose(pipe)) throw std::runtime_error("nm cannot read this library");
    return read;
  }();
  return names.at(static_cast<const char*>(function) - static_cast<const char*>(info.dli_fbase));
}

// Compilers name unnamed namespaces as they like; what follows is the same.
const Program& program_of(const std::string& folder, const void* kernel) {
  std::string name = name_of(kernel);
  constexpr std::string_view kUnnamed = "_GLOBAL__N_1";
  if (const auto at = name.find(kUnnamed); at != std::string::npos) {
    name = name.substr(at + kUnnamed.size());
  }
  for (const auto& program : programs_in(folder)) {
    const auto& known = program.name;
    if (known.size() >= name.size() && known.substr(known.size() - name.size()) == name) {
      return program;
    }
  }
  throw std::runtime_error("no PTX of " + name + " in " + folder);
}

std::vector<char> bytes_of(const Program& program, const std::vector<Argument>& arguments) {
  const auto& parameters = program.parameter;
  if (parameters.size() != arguments.size()) throw std::runtime_error("other parameters in PTX");
  const auto& last = parameters.back();
  std::vector<char> bytes(last.offset + last.bytes);
  for (size_t i = 0; i < arguments.size(); ++i) {
    if (parameters[i].bytes != static_cast<int64_t>(arguments[i].bytes)) {
      throw std::runtime_error(
          "parameter " + parameters[i].name + " has " + std::to_string(parameters[i].bytes) +
          " bytes in PTX, not " + std::to_string(arguments[i].bytes));
    }
    std::memcpy(bytes.data() + parameters[i].offset, arguments[i].at, arguments[i].bytes);
  }
  return bytes;
}

// Clusters are of one block.
void set_special(Thread& thread) {
  const dim3 kFirst(0, 0, 0), kOne(1, 1, 1);
  const auto& now = *on_host::now;
  const auto& grid = *on_host::grid;
  const std::map<std::string, const dim3&> values{
      {"%tid", now.thread},       {"%ntid", grid.threads},
      {"%ctaid", now.block->index}, {"%nctaid", grid.blocks},
      {"%cluster_ctaid", kFirst}, {"%cluster_nctaid", kOne}};
  for (const auto& [name, slot] : thread.program.special) {
    const auto dot = name.find('.');
    const dim3& value = values.at(name.substr(0, dot));
    thread.slot[slot] = name[dot + 1] == 'x' ? value.x : name[dot + 1] == 'y' ? value.y : value.z;
  }
}

void run(Thread& thread) {
  set_special(thread);
  while (!thread.done) {
    const Instruction& next = thread.program.code[thread.pc++];
    if (next.guard >= 0 && static_cast<bool>(thread.slot[next.guard] & 1) == next.unless) {
      continue;
    }
    thread.now = &next;
    next.run(thread, next);
  }
  for (const auto* groups : {&thread.products, &thread.reads, &thread.writes}) {
    if (!groups->open.empty() || !groups->group.empty()) thread.fail("work that nobody waits for");
  }
}

}  // namespace

Handler handler_of(const std::string& opcode) {
  static const Table table = [] {
    Table made;
    add_arithmetic(made);
    add_memory(made);
    add_control(made);
    add_async(made);
    add_products(made);
    return made;
  }();
  const auto found = table.find(opcode);
  return found == table.end() ? nullptr : found->second;
}

void launch(
    const char* folder, const void* kernel, const dim3& grid, const dim3& threads,
    const std::vector<Argument>& arguments) {
  const Program& program = program_of(folder, kernel);
  const std::vector<char> given = bytes_of(program, arguments);
  const std::unique_ptr<char, decltype(&std::free)> parameters(
      static_cast<char*>(std::aligned_alloc(128, (given.size() + 127) / 128 * 128)), std::free);
  std::memcpy(parameters.get(), given.data(), given.size());
  const int count = static_cast<int>(threads.x * threads.y * threads.z);
  const int each = kRegisters / count / 8 * 8;
  std::map<const on_host::Block*, Block> blocks;
  Stores stores;
  Order order(static_cast<int>(grid.x * grid.y) * count / on_host::kLanes);
  on_host::launch(grid, threads, kSharedBytes, true, [&] {
    Block& block = blocks[on_host::now->block];
    if (block.registers.empty()) {
      block.registers.assign(count / on_host::kLanes, each);
      block.free_registers = kRegisters - each * count;
    }
    Thread thread{
        program, block, stores, order, static_cast<char*>(on_host::shared_memory()), parameters.get(),
        std::vector<uint64_t>(program.slots, kPoison)};
    run(thread);
  });
  for (const auto& [_, block] : blocks) {
    if (!block.under_way.empty()) throw std::runtime_error("a block ended before its loads");
  }
}

}  // namespace on_ptx
