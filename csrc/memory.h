// Memory: of packed weights, and of threads.
#pragma once

#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "zeropoint.h"

namespace zp {

template <class T>
T* allocate(int64_t count) {
  constexpr size_t huge = size_t(2) << 20;
  const size_t bytes = size_t(round_up(count ? count * int64_t(sizeof(T)) : 1, 64));
  const size_t alignment = bytes >= 2 * huge ? huge : 64;
  const size_t whole = size_t(round_up(int64_t(bytes), int64_t(alignment)));
  void* p = std::aligned_alloc(alignment, whole);
  if (!p) throw std::bad_alloc();
#if defined(__linux__)
  // Streaming many megabytes over small pages costs a tenth of the bandwidth in page walks, and
  // more where rows multiply meanwhile. Memory that was in use before has small pages: they are
  // given back, and come anew.
  if (alignment == huge && madvise(p, whole, MADV_HUGEPAGE) == 0) madvise(p, whole, MADV_DONTNEED);
#endif
  return static_cast<T*>(p);
}

// Memory of one thread, kept from call to call. Growing forgets what was there.
template <class T>
class Room {
 public:
  ~Room() { std::free(p_); }
  T* get(int64_t count) {
    if (count > count_) {
      std::free(p_);
      count_ = 0;
      p_ =
          static_cast<T*>(std::aligned_alloc(64, size_t(round_up(count * int64_t(sizeof(T)), 64))));
      if (!p_) throw std::bad_alloc();
      count_ = count;
    }
    return p_;
  }

 private:
  T* p_ = nullptr;
  int64_t count_ = 0;
};

}  // namespace zp
