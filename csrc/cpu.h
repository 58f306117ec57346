// What the CPU ops share: code for several instruction sets in one binary, and task sizes.
#pragma once

#include <algorithm>
#include <cstdint>

// The compiler makes one version of a function per instruction set; the loader picks at run time.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__)
#define COTERIE_MULTIVERSION \
  __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define COTERIE_MULTIVERSION
#endif

namespace coterie {

constexpr int64_t kGrain = 16384;  // numbers per task of the thread pool, at least

inline int64_t grain(int64_t numbers_per_item) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, numbers_per_item));
}

}  // namespace coterie
