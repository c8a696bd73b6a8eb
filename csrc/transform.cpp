// What a layer does to its input, on rows: who does which, and where intermediate floats are kept.
#include "memory.h"
#include "threads.h"

namespace zp {
namespace {
#include "scalar.h"
#include "rows.h"

constexpr double kEntryNs = 0.15;  // roughly, of one core, with the levels of a usual rotation

thread_local Room<float> room;

}  // namespace

void transform_input(const Input& x, int64_t k, const float* factor, int64_t size, void* y,
                     int threads) {
  if (x.rows <= 0 || k <= 0) return;
  const Isa& isa = active_isa();
  const Grid grid = choose_grid(x.rows, 1, k, threads, {0.0, kEntryNs, 0.0, 1});
  parallel(grid, [&](int r, int) {
    const Range rows = part(x.rows, grid.rows, r);
    TransformRow row{nullptr, k, factor, size, nullptr, nullptr};
    // A run, or a vector of them where that is more.
    row.room = x.type == F32 ? nullptr : room.get(size > kPanel ? size : kPanel);
    for (int64_t m = rows.begin; m < rows.end; m++) {
      row.x = row_of(x, m);
      row.y = advance(y, m * k, x.type);
      isa.transform[x.type](row);
    }
  });
}

}  // namespace zp
