// What of threads.h is no template: the shares, and the handling of fork().
#include "threads.h"

#include <atomic>
#include <chrono>

#include <dirent.h>
#include <pthread.h>
#include <sched.h>

namespace zp {
namespace {

// GNU OpenMP's workers do not survive fork(): a child whose parent had any, ours or those of
// another library, would wait for them forever. It computes on its own thread instead. A parent
// that had no thread but its own had no workers.
bool had_workers = true;
std::atomic<bool> pool_lost{false};

void before_fork() {
#if defined(__linux__)
  if (DIR* tasks = opendir("/proc/self/task")) {
    int threads = 0;
    while (const dirent* entry = readdir(tasks)) threads += entry->d_name[0] != '.';
    closedir(tasks);
    had_workers = threads > 1;
  }
#endif
}

void after_fork_in_child() {
  if (had_workers) pool_lost.store(true);
}

[[maybe_unused]] const int fork_handler = pthread_atfork(before_fork, nullptr, after_fork_in_child);

constexpr double kForkNs = 2000;  // waking the pool and waiting for it

}  // namespace

#if defined(__linux__)
namespace {
// Workers that had nothing to do go on looking for work for longer than this.
constexpr int64_t kAwakeNs = 1000000;

std::atomic<int64_t> last_end{0};

int64_t steady_ns() {
  return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}
}  // namespace

Spread::Spread()
    : cpu_(sched_getcpu()),
      rested_(steady_ns() - last_end.load(std::memory_order_relaxed) > kAwakeNs) {}

Spread::~Spread() { last_end.store(steady_ns(), std::memory_order_relaxed); }

// The caller lets go of its CPU for a moment, so that who waits there can leave it. No thread's
// affinity is another afterwards.
void Spread::begin(int thread) const {
  if (thread == 0) {
    if (rested_) sched_yield();
    return;
  }
  cpu_set_t all, others;
  if (cpu_ < 0 || sched_getcpu() != cpu_ || sched_getaffinity(0, sizeof all, &all) != 0) return;
  others = all;
  CPU_CLR(cpu_, &others);
  if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof others, &others) != 0) return;
  sched_setaffinity(0, sizeof all, &all);
}
#else
Spread::Spread() : cpu_(-1), rested_(false) {}
Spread::~Spread() = default;
void Spread::begin(int) const {}
#endif

bool workers_lost() { return pool_lost.load(std::memory_order_relaxed); }

Grid choose_grid(int64_t rows, int64_t panels, int64_t k, int threads, const Work& work) {
  Grid best;
  double best_ns = 0;
  for (int by_rows = 1; by_rows <= threads; by_rows++) {
    const int by_panels = threads / by_rows;
    for (int panel_parts : {1, by_panels}) {
      const double r = double(ceil_div(rows, by_rows)),
                   lanes = double(ceil_div(panels, panel_parts)) * kPanel;
      const double stepped = double(round_up(ceil_div(rows, by_rows), work.row_step));
      const double ns =
          r * double(k) * work.input_ns +
          std::max(stepped * lanes * double(k) * work.mac_ns, lanes * double(k) * work.weight_ns) +
          (by_rows * panel_parts > 1 ? kForkNs : 0.0);
      if ((by_rows == 1 && panel_parts == 1) || ns < best_ns) {
        best_ns = ns;
        best.rows = by_rows;
        best.panels = panel_parts;
      }
    }
  }
  return best;
}

}  // namespace zp
