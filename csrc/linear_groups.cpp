// The calls with weights in groups: who computes which rows and panels, in blocks of what size. As
// in linear.cpp, activations are quantized by the thread that multiplies them.
#include <algorithm>
#include <cstring>

#include "memory.h"
#include "threads.h"
#include "zeropoint.h"

namespace zp {
namespace {
#include "scalar.h"
#include "rows.h"

constexpr int64_t kBlockRows = 192;  // each block of rows unpacks all weights

thread_local struct {
  Room<uint8_t> integers;  // one quantized row
  Room<int8_t> prepared;   // rows as the kernel reads them
  Room<int32_t> start;
  Room<Row> row;
  Room<float> bias, floats, sum, scratch;
} rooms;

enum Source { Dynamic, Static, Integer, Float };

struct GroupCall {
  const PackedGroups& w;
  Input x;
  Source source;
  float scale;         // Static, Integer
  int32_t zero_point;  // likewise
  const float* bias;
  Post post;
  void* y;
  Type y_type;
};

// Rows [begin, begin + count) as bytes, signed or not, groups padded, with what the epilogue needs.
void prepare(const Isa& isa, const GroupCall& c, int64_t begin, int64_t count, bool is_signed,
             int64_t stride, int8_t* a, int32_t* start, Row* row) {
  uint8_t* integers = rooms.integers.get(round_up(c.w.k, kStep));
  for (int64_t i = 0; i < count; i++) {
    const void* x = row_of(c.x, begin + i);
    const QuantizeRow job{x, c.w.k, integers, c.scale, c.zero_point};
    const uint8_t* q = integers;
    int lower = 128;
    if (c.source == Dynamic) {
      isa.quantize_dynamic[c.x.type](job, row + i);
    } else if (c.source == Static) {
      isa.quantize_static[c.x.type](job, row + i);
    } else {
      row[i] = {c.scale, c.zero_point, 0};
      q = static_cast<const uint8_t*>(x);
      if (c.x.type == S8) lower = 0;
    }
    row[i].zero_point -= lower;
    const uint8_t flip = uint8_t(is_signed ? lower : 128 - lower);
    isa.prepare_groups(c.w, q, flip, a + i * stride, start ? start + i * c.w.groups : nullptr);
  }
}

void piece(const Isa& isa, const GroupCall& c, Range rows, Range panels) {
  const PackedGroups& w = c.w;
  const int64_t blocks = ceil_div(rows.end - rows.begin, kBlockRows);
  const int64_t most = ceil_div(rows.end - rows.begin, blocks);
  const bool integers = c.source != Float, convert = !integers && c.x.type != F32;
  // An odd number of cache lines: rows a power of two apart would share a few sets of L1.
  const int64_t stride = round_up(w.groups * w.group_padded, kStep) | kStep;
  int8_t* a = integers ? rooms.prepared.get(most * stride) : nullptr;
  float* floats = convert ? rooms.floats.get(most * w.k) : nullptr;
  GroupBlock b{};
  b.w = &w;
  b.panel_begin = panels.begin;
  b.panel_end = panels.end;
  b.bias = padded(rooms.bias, c.bias, w.n);
  b.y_stride = w.n;
  b.y_type = c.y_type;
  b.sum = rooms.sum.get(most * kPanel);
  b.scratch = rooms.scratch.get(group_scratch(w));
  b.x_stride = integers ? stride : convert ? w.k : c.x.stride;
  const bool centered = integers && !w.bytes && most > isa.coded_rows;
  int32_t* start = integers && !centered ? rooms.start.get(most * w.groups) : nullptr;
  Row* row = integers ? rooms.row.get(most) : nullptr;
  b.centered = centered;
  b.start = start;
  b.row = row;
  for (int64_t m = rows.begin; m < rows.end; m += most) {
    b.rows = std::min(most, rows.end - m);
    if (integers) {
      prepare(isa, c, m, b.rows, !(centered && isa.unsigned_rows), stride, a, start, row);
      b.x = a;
    } else {
      b.x = to_floats(c.x, m, b.rows, w.k, floats);
    }
    b.y = advance(c.y, m * w.n, c.y_type);
    b.post = from_row(c.post, m, c.y_type);
    isa.group_block(b);
  }
}

void run(const GroupCall& c, int threads) {
  const PackedGroups& w = c.w;
  if (c.x.rows == 0 || w.n == 0) return;
  const Isa& isa = active_isa();
  const bool integers = c.source != Float;
  // Groups are summed in vector registers, on AMX too.
  const double gmacs = integers ? std::min(isa.gmacs, 200.0f) : isa.float_gmacs;
  const Work work{1.0 / gmacs, integers ? 0.2 : 0.0, 0.01, 1};
  const Grid grid = choose_grid(c.x.rows, w.panels, w.k, threads, work);
  parallel(grid, [&](int row_part, int panel_part) {
    const Range rows = part(c.x.rows, grid.rows, row_part);
    const Range panels = part(w.panels, grid.panels, panel_part);
    if (rows.begin != rows.end && panels.begin != panels.end) piece(isa, c, rows, panels);
  });
}

}  // namespace

void linear_dynamic(const PackedGroups& w, const Input& x, const float* bias, const Post& post,
                    void* y, int threads) {
  run({w, x, Dynamic, 0.0f, 0, bias, post, y, x.type}, threads);
}

void linear_static(const PackedGroups& w, const Input& x, float scale, int32_t zero_point,
                   const float* bias, const Post& post, void* y, int threads) {
  run({w, x, Static, scale, zero_point, bias, post, y, x.type}, threads);
}

void linear_integer(const PackedGroups& w, const Input& q, float scale, int32_t zero_point,
                    const float* bias, const Post& post, float* y, int threads) {
  run({w, q, Integer, scale, zero_point, bias, post, y, F32}, threads);
}

void linear_weight_only(const PackedGroups& w, const Input& x, const float* bias, const Post& post,
                        void* y, int threads) {
  run({w, x, Float, 0.0f, 0, bias, post, y, x.type}, threads);
}

}  // namespace zp
