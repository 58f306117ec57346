// Reads PTX (PTX ISA, "Syntax"): what nvcc writes, inline assembly with scopes of its own included.
#include "program.h"

#include <algorithm>
#include <cctype>
#include <stdexcept>

namespace on_ptx {
namespace {

using Strings = std::vector<std::string>;

bool begins(const std::string& text, const std::string& with) { return text.rfind(with, 0) == 0; }

std::string trimmed(const std::string& text) {
  const auto first = text.find_first_not_of(" \t\n");
  if (first == std::string::npos) return "";
  return text.substr(first, text.find_last_not_of(" \t\n") - first + 1);
}

// Splits at commas that no bracket encloses.
Strings split(const std::string& text) {
  Strings parts{""};
  int depth = 0;
  for (const char c : text) {
    depth += (c == '{' || c == '[') - (c == '}' || c == ']');
    if (c == ',' && depth == 0) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  for (auto& part : parts) part = trimmed(part);
  if (parts.size() == 1 && parts[0].empty()) parts.clear();
  return parts;
}

// Comments and notes of lines go; their line breaks stay, so that lines can be counted.
std::string without_remarks(const std::string& text) {
  std::string kept;
  for (size_t at = 0; at < text.size();) {
    const size_t end = std::min(text.find('\n', at), text.size());
    std::string line = text.substr(at, end - at);
    line = line.substr(0, line.find("//"));
    const std::string bare = trimmed(line);
    if (!begins(bare, ".loc") && !begins(bare, ".file")) kept += line;
    kept += '\n';
    at = end + 1;
  }
  return kept;
}

class Parser {
 public:
  Parser(const std::string& text, size_t entry) : text_(text), at_(entry) {
    line_ = 1 + static_cast<int>(std::count(text.begin(), text.begin() + entry, '\n'));
  }

  Program program() {
    head();
    scopes_.emplace_back();
    ++at_;  // the body's brace
    body();
    for (auto& [instruction, wanted] : branches_) resolve(program_.code[instruction], wanted);
    return std::move(program_);
  }

 private:
  // A name means what the innermost scope says that declares it.
  struct Scope {
    std::map<std::string, int> slot;
    std::map<std::string, int> label;
    int outside = 0;
  };
  struct Branch {
    std::string label;
    int scope;
  };

  [[noreturn]] void fail(const std::string& why) const {
    throw std::runtime_error("PTX, line " + std::to_string(line_) + ": " + why);
  }

  std::string until(char end) {
    std::string taken;
    while (at_ < text_.size() && text_[at_] != end) taken += take();
    if (at_ == text_.size()) fail(std::string("no ") + end);
    return taken;
  }

  char take() {
    if (text_[at_] == '\n') ++line_;
    return text_[at_++];
  }

  void head() {
    const std::string name = trimmed(until('('));
    program_.name = trimmed(name.substr(name.find(".entry") + 6));
    take();
    int64_t offset = 0;
    for (const auto& parameter : split(until(')'))) {
      int64_t align = 1, bytes = 0;
      std::string last;
      for (size_t i = 0; i < parameter.size();) {
        const size_t end = std::min(parameter.find_first_of(" \t", i), parameter.size());
        const std::string word = parameter.substr(i, end - i);
        if (last == ".align") align = std::stoll(word);
        if (word == ".u32" || word == ".b32" || word == ".f32") align = bytes = 4;
        if (word == ".u64" || word == ".b64") align = bytes = 8;
        if (!word.empty()) last = word;
        i = end + 1;
      }
      if (const auto bracket = last.find('['); bracket != std::string::npos) {
        bytes = std::stoll(last.substr(bracket + 1));
        last = last.substr(0, bracket);
      }
      if (bytes == 0) fail("a parameter without a size: " + parameter);
      offset = (offset + align - 1) / align * align;
      program_.parameter.push_back({last, offset, bytes});
      offset += bytes;
    }
    until('{');
  }

  void body() {
    for (int depth = 1; depth > 0;) {
      while (std::isspace(static_cast<unsigned char>(text_[at_]))) take();
      if (text_[at_] == '{') {
        take();
        scopes_.push_back({{}, {}, now_});
        now_ = static_cast<int>(scopes_.size()) - 1;
        ++depth;
      } else if (text_[at_] == '}') {
        take();
        now_ = scopes_[now_].outside;
        --depth;
      } else if (const size_t colon = text_.find_first_of(":;{", at_); text_[colon] == ':' && is_name(colon)) {
        scopes_[now_].label[trimmed(until(':'))] = static_cast<int>(program_.code.size());
        take();
      } else {
        const int line = line_;
        const std::string statement = trimmed(until(';'));
        take();
        if (begins(statement, ".")) {
          declare(statement);
        } else {
          instruction(statement, line);
        }
      }
    }
  }

  bool is_name(size_t end) const {
    return std::all_of(text_.begin() + at_, text_.begin() + end, [](unsigned char c) {
      return std::isalnum(c) || c == '_' || c == '$' || c == ' ';
    });
  }

  // .reg .b32 %r<10>, or .reg .pred p
  void declare(const std::string& statement) {
    if (begins(statement, ".pragma")) return;
    if (!begins(statement, ".reg")) fail("not known: " + statement);
    const size_t type = statement.find('.', 4);
    const size_t names = statement.find_first_of(" \t", type);
    for (const auto& name : split(statement.substr(names))) {
      const size_t bracket = name.find('<');
      if (bracket == std::string::npos) {
        scopes_[now_].slot[name] = program_.slots++;
        continue;
      }
      const int count = std::stoi(name.substr(bracket + 1));
      for (int i = 0; i < count; ++i) {
        scopes_[now_].slot[name.substr(0, bracket) + std::to_string(i)] = program_.slots++;
      }
    }
  }

  void instruction(std::string statement, int line) {
    Instruction made;
    made.line = line;
    if (statement[0] == '@') {
      const size_t end = statement.find_first_of(" \t");
      made.unless = statement[1] == '!';
      made.guard = slot_of(statement.substr(1 + made.unless, end - 1 - made.unless));
      statement = trimmed(statement.substr(end));
    }
    const size_t end = std::min(statement.find_first_of(" \t\n"), statement.size());
    made.opcode = statement.substr(0, end);
    if (const size_t clock = statement.find(", %globaltimer"); clock != std::string::npos) {
      made.opcode = "%globaltimer";
      statement = statement.substr(0, clock);
    }
    made.run = handler_of(made.opcode);
    if (!made.run) fail("nothing carries out " + made.opcode);
    for (const auto& text : split(statement.substr(end))) {
      if (begins(made.opcode, "bra")) {
        branches_.push_back({program_.code.size(), {text, now_}});
        made.operand.push_back({Operand::label, -1, 0, {}});
      } else {
        made.operand.push_back(operand(text));
      }
    }
    program_.code.push_back(std::move(made));
  }

  void resolve(Instruction& made, const Branch& wanted) {
    for (int scope = wanted.scope;; scope = scopes_[scope].outside) {
      const auto found = scopes_[scope].label.find(wanted.label);
      if (found != scopes_[scope].label.end()) {
        made.operand[0].value = found->second;
        return;
      }
      if (scope == 0) fail("no label " + wanted.label);
    }
  }

  Operand operand(const std::string& text) {
    if (text == "_") return {};
    if (text[0] == '[') return memory(split(text.substr(1, text.size() - 2)));
    if (text[0] == '{') return list(split(text.substr(1, text.size() - 2)));
    if (const size_t bar = text.find('|'); bar != std::string::npos) {
      return list({trimmed(text.substr(0, bar)), trimmed(text.substr(bar + 1))});
    }
    int64_t value = 0;
    if (number(text, value)) return {Operand::number, -1, value, {}};
    return {Operand::slot, slot_of(text), 0, {}};
  }

  Operand list(const Strings& parts) {
    Operand made{Operand::list, -1, 0, {}};
    for (const auto& part : parts) made.part.push_back(operand(part));
    return made;
  }

  // [base+offset], or [base, {x, y}]
  Operand memory(const Strings& parts) {
    Operand made{Operand::memory, -1, 0, {}};
    std::string base = parts[0];
    if (const size_t plus = base.find('+'); plus != std::string::npos) {
      made.value = std::stoll(base.substr(plus + 1));
      base = trimmed(base.substr(0, plus));
    }
    int64_t value = 0;
    if (number(base, value)) {
      made.value += value;
    } else {
      made.at = slot_of(base);
    }
    if (parts.size() > 1) made.part = operand(parts[1]).part;
    return made;
  }

  // Numbers, and names that stand for addresses.
  bool number(const std::string& text, int64_t& value) const {
    if (begins(text, "0f")) {
      value = static_cast<int64_t>(std::stoull(text.substr(2), nullptr, 16));
      return true;
    }
    if (std::isdigit(static_cast<unsigned char>(text[0])) || text[0] == '-') {
      value = begins(text, "0x") ? static_cast<int64_t>(std::stoull(text, nullptr, 16))
                                 : std::stoll(text);
      return true;
    }
    for (const auto& parameter : program_.parameter) {
      if (parameter.name == text) {
        value = parameter.offset;
        return true;
      }
    }
    if (text.find("coterie_shared_memory") != std::string::npos) {
      value = kShared;
      return true;
    }
    return false;
  }

  int slot_of(const std::string& name) {
    for (int scope = now_;; scope = scopes_[scope].outside) {
      const auto found = scopes_[scope].slot.find(name);
      if (found != scopes_[scope].slot.end()) return found->second;
      if (scope == 0) break;
    }
    if (!begins(name, "%") || name.find('.') == std::string::npos) fail("not known: " + name);
    auto [found, is_new] = program_.special.try_emplace(name, program_.slots);
    program_.slots += is_new;
    return found->second;
  }

  const std::string& text_;
  size_t at_;
  int line_, now_ = 0;
  Program program_;
  std::vector<Scope> scopes_;
  std::vector<std::pair<size_t, Branch>> branches_;
};

}  // namespace

std::vector<Program> parse(const std::string& text) {
  const std::string kept = without_remarks(text);
  std::vector<Program> programs;
  for (size_t at = kept.find(".entry"); at != std::string::npos; at = kept.find(".entry", at + 1)) {
    programs.push_back(Parser(kept, at).program());
  }
  return programs;
}

}  // namespace on_ptx
