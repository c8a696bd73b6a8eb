// Memory between two pages that nobody may touch, hard against one of them: reading or writing one
// byte past that end crashes.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

class Guarded {
 public:
  enum Side { AtEnd, AtStart };

  Guarded(size_t bytes, Side side) : page_(size_t(sysconf(_SC_PAGESIZE))) {
    const size_t inner = (bytes + page_ - 1) / page_ * page_;
    total_ = inner + 2 * page_;
    void* p = mmap(nullptr, total_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) {
      std::perror("mmap");
      std::exit(2);
    }
    base_ = static_cast<uint8_t*>(p);
    if (mprotect(base_, page_, PROT_NONE) || mprotect(base_ + page_ + inner, page_, PROT_NONE)) {
      std::perror("mprotect");
      std::exit(2);
    }
    data_ = base_ + page_ + (side == AtEnd ? inner - bytes : 0);
  }
  ~Guarded() { munmap(base_, total_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  template <class T = uint8_t>
  T* as() {
    return reinterpret_cast<T*>(data_);
  }

 private:
  size_t page_, total_;
  uint8_t *base_, *data_;
};
