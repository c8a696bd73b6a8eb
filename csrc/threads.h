// Who computes what: how a product is cut into pieces, and threads for them. OpenMP, so that the
// process has one pool, shared with torch.
#pragma once

#include <omp.h>

#include <algorithm>
#include <new>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "zeropoint.h"

namespace zp {

// Round to nearest, keep denormals: whatever the caller set is put back at the end.
class FloatEnvironment {
 public:
#if defined(__x86_64__)
  FloatEnvironment() : saved_(_mm_getcsr()) {
    if ((saved_ & ~0x3fu) != 0x1f80u) _mm_setcsr(0x1f80u);
  }
  ~FloatEnvironment() {
    if ((saved_ & ~0x3fu) != 0x1f80u) _mm_setcsr(saved_);
  }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  FloatEnvironment() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    if (saved_) __asm__ volatile("msr fpcr, %0" ::"r"(uint64_t(0)));
  }
  ~FloatEnvironment() {
    if (saved_) __asm__ volatile("msr fpcr, %0" ::"r"(saved_));
  }

 private:
  uint64_t saved_;
#endif
};

// Whether this process was forked from one with worker threads, which are not here any more.
bool workers_lost();

// How threads share rows and panels. Splitting rows has every thread read all weights; splitting
// panels has every thread quantize all rows. The estimate of either, in nanoseconds, decides.
struct Grid {
  int rows = 1, panels = 1;
};

struct Work {
  double mac_ns;     // one multiply-add
  double input_ns;   // preparing one activation
  double weight_ns;  // streaming one byte of weights
  int64_t row_step;  // rows computed at a time
};

Grid choose_grid(int64_t rows, int64_t panels, int64_t k, int threads, const Work& work);

// Sees to it that threads which begin together run at the same time. A worker that slept is woken,
// on virtual machines above all, where it ran last, be it the caller's own CPU while another is
// idle. There it would wait for the end of the caller's time slice, which is milliseconds.
class Spread {
 public:
  Spread();  // by the caller, before the others begin
  ~Spread();
  Spread(const Spread&) = delete;
  Spread& operator=(const Spread&) = delete;
  void begin(int thread) const;  // by each, 0 being the caller

 private:
  [[maybe_unused]] int cpu_;      // the caller's
  [[maybe_unused]] bool rested_;  // workers may sleep
};

// Call f(row part, panel part) for every cell of the grid, one thread each where they can be had.
template <class F>
void parallel(const Grid& grid, const F& f) {
  const int cells = grid.rows * grid.panels;
  if (cells == 1 || omp_in_parallel() || workers_lost()) {
    const FloatEnvironment environment;
    for (int i = 0; i < cells; i++) f(i / grid.panels, i % grid.panels);
    return;
  }
  bool out_of_memory = false;
  const Spread spread;
#pragma omp parallel num_threads(cells)
  {
    spread.begin(omp_get_thread_num());
    const FloatEnvironment environment;
    try {
      for (int i = omp_get_thread_num(); i < cells; i += omp_get_num_threads())
        f(i / grid.panels, i % grid.panels);
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
      out_of_memory = true;
    }
  }
  if (out_of_memory) throw std::bad_alloc();
}

struct Range {
  int64_t begin, end;
};

// Part i of `parts` of [0, count), cut at multiples of `step` and balanced.
inline Range part(int64_t count, int64_t parts, int64_t i, int64_t step = 1) {
  const int64_t steps = ceil_div(count, step);
  return {std::min(count, steps * i / parts * step),
          std::min(count, steps * (i + 1) / parts * step)};
}

}  // namespace zp
