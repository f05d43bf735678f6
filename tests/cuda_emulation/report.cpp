// Messages for people.

#include <dlfcn.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <map>

#include "scheduler.h"

namespace leaf::emulation {

// A compiler may make several copies of one call.
bool same_place(const Call& a, const Call& b) {
  if (a.code == b.code) return true;
  return a.where.line() == b.where.line() &&
         std::strcmp(a.where.file_name(), b.where.file_name()) == 0;
}

std::string describe(const Thread& thread) {
  const uint3& block = thread.block->index;
  return "block (" + std::to_string(block.x) + ", " + std::to_string(block.y) + "), thread " +
         std::to_string(thread.index);
}

std::string describe(const void* code) {
  static std::map<const void*, std::string> known;
  std::string& text = known[code];
  Dl_info module;
  if (!text.empty() || dladdr(code, &module) == 0) return text;
  const auto offset = static_cast<const char*>(code) - static_cast<const char*>(module.dli_fbase);
  constexpr char kInlined[] = " (inlined by) ";
  char line[4096];
  std::snprintf(line, sizeof line, "addr2line -Cfip -e '%s' %#tx", module.dli_fname, offset - 1);
  if (FILE* pipe = popen(line, "r"); pipe != nullptr) {
    while (std::fgets(line, sizeof line, pipe) != nullptr) {
      // Frames of the replacement headers are left out.
      if (std::strstr(line, "/cuda_runtime.h:") != nullptr) continue;
      std::string entry(line, std::strcspn(line, "\n"));
      entry.resize(std::min(entry.size(), entry.find(" (discriminator")));
      if (entry.starts_with(kInlined)) entry.erase(0, sizeof kInlined - 1);
      text += "\n    " + entry;
    }
    pclose(pipe);
  }
  return text;
}

// Does not call abort: AddressSanitizer checks the stack before a function that does not return,
// and does not know this stack.
void fail(const std::string& message) {
  std::fprintf(stderr, "CUDA emulation: %s\n", message.c_str());
  if (active->running != nullptr) {
    std::fprintf(stderr, "  in %s\n", describe(*active->running).c_str());
  }
  const auto* kernel = static_cast<const char*>(active->kernel);
  std::fprintf(stderr, "  of the kernel%s\n", describe(kernel + 1).c_str());
  std::raise(SIGABRT);
}

void fail(const std::string& message, const Call& call) {
  fail(message + "\n  at" + describe(call.code));
}

}  // namespace leaf::emulation
