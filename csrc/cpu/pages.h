// Large pages for large results: a fresh one costs a page fault for every 4 KB otherwise, many times what is written.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace elle_fast {

// Asks for them where `bytes` of memory will be written next. Memory that is there already stays as it is.
inline void want_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kLarge = int64_t{1} << 21;
  // What is smaller may lie in the heap, beside other things.
  if (bytes < int64_t{1} << 25) return;
  const int64_t from = reinterpret_cast<intptr_t>(memory), begin = (from + kLarge - 1) / kLarge * kLarge;
  const int64_t end = (from + bytes) / kLarge * kLarge;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), static_cast<size_t>(end - begin), MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}

}  // namespace elle_fast
