// A kernel in PTX as nvcc wrote it, read into instructions whose registers are numbered slots.
//
// Shared memory begins at address kShared, as on the GPU; addresses of parameters are offsets.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace on_ptx {

constexpr uint32_t kShared = 1024;          // where a block's dynamic shared memory begins
constexpr uint32_t kSharedBytes = 227 << 10;  // the most that a block of sm_90 can have

struct Operand {
  enum Kind { sink, slot, number, list, memory, label } kind = sink;
  int at = -1;               // slot; of memory: of the base address, -1: none
  int64_t value = 0;         // number; of memory: added to the base; label: where it is
  std::vector<Operand> part;  // list: {a, b} or a|b; memory: coordinates
};

struct Thread;
struct Instruction;
using Handler = void (*)(Thread&, const Instruction&);

struct Instruction {
  Handler run = nullptr;
  int guard = -1;  // slot of the predicate
  bool unless = false;
  std::string opcode;
  std::vector<Operand> operand;
  int line = 0;
};

struct Parameter {
  std::string name;
  int64_t offset, bytes;
};

struct Program {
  std::string name;
  std::vector<Instruction> code;
  std::vector<Parameter> parameter;
  int slots = 0;
  // registers that hold the same all along
  std::map<std::string, int> special;
};

// The kernels of a PTX file. Throws std::runtime_error, which names the line, where it meets what
// it does not know.
std::vector<Program> parse(const std::string& text);

// What carries out an instruction; null where nothing does.
Handler handler_of(const std::string& opcode);

}  // namespace on_ptx
