// The calls: who computes which rows and panels, on how many threads, and in blocks of what size.
// Activations are quantized by the thread that multiplies them, block by block, so that they are
// still in its cache and no thread waits for another.
#include <algorithm>
#include <cstring>

#include <unistd.h>

#include "memory.h"
#include "threads.h"
#include "zeropoint.h"

namespace zp {
namespace {
#include "scalar.h"
#include "rows.h"
#include "kernel_common.h"

thread_local struct {
  Room<uint8_t> integers;  // quantized rows
  Room<uint8_t> widened;   // the same, where the kernel reads 16 bits
  Room<Row> row;
  Room<float> bias;            // padded to whole panels
  Room<float> floats;          // activations as float32
  Room<float> parts;           // a part of a panel as floats, and partial sums
  Room<int32_t> accumulators;  // of the wide path
  Room<int64_t> totals, sums;  // likewise
} rooms;

int64_t l2_bytes() {
  static const int64_t bytes = [] {
#if defined(_SC_LEVEL2_CACHE_SIZE)
    const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);
    if (size > 0) return int64_t(size);
#endif
    return int64_t(1) << 20;
  }();
  return bytes;
}

enum Source { Dynamic, Static, Integer };

struct Int8Call {
  const PackedInt8& w;
  Input x;
  Source source;
  float scale;         // Static, Integer
  int32_t zero_point;  // likewise, of the integers as given
  const float* bias;
  Post post;
  void* y;
  Type y_type;
  float y_scale = 1;
  int32_t y_zero_point = 0;
};

int64_t sum_bytes(const uint8_t* q, int64_t k) {
  int64_t total = 0;
  for (int64_t i = 0; i < k; i++) total += q[i];
  return total;
}

// The unsigned integers of rows [begin, end), and what the epilogue needs of them. Where the
// caller's own memory will do, `a` points there.
struct Quantized {
  const uint8_t* a;
  int64_t stride;
};

// Rows of quantized activations lie an odd number of cache lines apart: rows a power of two apart
// would share a few sets of L1.
int64_t row_stride(const PackedInt8& w) { return w.k_padded | kStep; }

bool in_place(const Isa& isa, const Int8Call& c) {
  const bool spread = c.x.rows <= 8 || c.x.stride % 1024 != 0;
  return c.source == Integer && c.x.type == U8 && !isa.widen && c.w.k % isa.k_step == 0 && spread;
}

Quantized quantize_rows(const Isa& isa, const Int8Call& c, Range rows, uint8_t* room, Row* row,
                        int64_t* sums) {
  const int64_t k = c.w.k, stride = row_stride(c.w);
  Quantized out{room, stride};
  const bool stay = in_place(isa, c);
  if (stay) out = {static_cast<const uint8_t*>(c.x.x) + rows.begin * c.x.stride, c.x.stride};
  const bool is_signed = c.x.type == S8;
  for (int64_t m = rows.begin; m < rows.end; m++) {
    const int64_t i = m - rows.begin;
    const void* x = row_of(c.x, m);
    const QuantizeRow job{x, k, room ? room + i * stride : nullptr, c.scale, c.zero_point};
    switch (c.source) {
      case Dynamic: isa.quantize_dynamic[c.x.type](job, row + i); break;
      case Static: isa.quantize_static[c.x.type](job, row + i); break;
      case Integer:
        row[i] = {c.scale, c.zero_point + (is_signed ? 128 : 0), 0};
        if (!stay) {
          const uint8_t* from = static_cast<const uint8_t*>(x);
          const uint8_t flip = is_signed ? 0x80 : 0;  // int8 plus 128, as uint8
          if (is_signed)
            for (int64_t j = 0; j < k; j++) job.q[j] = from[j] ^ flip;
          else if (k)  // an empty tensor may lie at address 0, which memcpy does not take
            std::memcpy(job.q, from, size_t(k));
          std::memset(job.q + k, 0, size_t(c.w.k_padded - k));
        }
    }
    if (c.w.zero_point || sums) {
      const int64_t total = sum_bytes(out.a + i * out.stride, k);
      if (sums) sums[i] = total;
      row[i].centered = int32_t(uint32_t(uint64_t(total - k * row[i].zero_point)));
    }
  }
  if (!isa.widen) return out;
  const int64_t count = rows.end - rows.begin, wide = 2 * stride;
  uint8_t* widened = rooms.widened.get(count * wide);
  for (int64_t i = 0; i < count; i++)
    isa.widen(out.a + i * out.stride, c.w.k_padded, widened + i * wide);
  return {widened, wide};
}

// activation and residual of a single value, by the same steps as the kernels: their trait with one
// lane.
struct Scalar {
  using f32 = float;
  using i32 = int32_t;
  static constexpr int lanes = 1;
  static f32 zero_f32() { return 0.0f; }
  static f32 set1(float v) { return v; }
  static f32 add(f32 a, f32 b) { return a + b; }
  static f32 sub(f32 a, f32 b) { return a - b; }
  static f32 mul(f32 a, f32 b) { return a * b; }
  static f32 div(f32 a, f32 b) { return a / b; }
  static f32 min(f32 a, f32 b) { return a < b ? a : b; }
  static f32 max(f32 a, f32 b) { return a > b ? a : b; }
  static f32 select_negative(f32 x, f32 a, f32 b) { return x < 0.0f ? a : b; }
  static i32 to_i32(f32 v) { return round_small(v); }
  static f32 to_f32(i32 v) { return float(v); }
  static f32 power_of_two(i32 n) { return bits_to_float(uint32_t(n + 127) << 23); }
  template <Type T>
  static f32 load(const void* x, int64_t i) {
    return scalar_load<T>(x, i);
  }
  template <Type T>
  static void store(void* y, int64_t i, f32 v) {
    scalar_store<T>(y, i, v);
  }
};

float after_scalar(const Post& post, Type type, int64_t m, int64_t n, float value) {
  return after<Scalar>(post, type, m, n, 1, value);
}

// K beyond the bound of int32: parts of K by the kernel, their sums in int64, and the epilogue of
// zeropoint.h in scalar code.
void store_wide(const Int8Call& c, int64_t at, float value) {
  switch (c.y_type) {
    case F32: return scalar_store<F32>(c.y, at, value);
    case BF16: return scalar_store<BF16>(c.y, at, value);
    case F16: return scalar_store<F16>(c.y, at, value);
    default: break;
  }
  const int32_t qmin = c.y_type == U8 ? 0 : -128;
  const float low = float(qmin - c.y_zero_point), high = float(qmin + 255 - c.y_zero_point);
  value *= 1.0f / c.y_scale;
  value = value > low ? value : low;
  value = value < high ? value : high;
  static_cast<uint8_t*>(c.y)[at] = uint8_t(round_small(value) + c.y_zero_point);
}

void wide_piece(const Isa& isa, const Int8Call& c, Range rows, Range panels) {
  const PackedInt8& w = c.w;
  constexpr int64_t most = 8;  // rows at a time
  const int64_t first = panels.begin * kPanel, last = std::min(w.n, panels.end * kPanel);
  const int64_t lanes = last - first;
  uint8_t* integers = rooms.integers.get(most * row_stride(w));
  Row* row = rooms.row.get(most);
  int64_t* sums = rooms.sums.get(most);
  int64_t* totals = rooms.totals.get(most * lanes);
  int32_t* accumulators = rooms.accumulators.get(most * w.n);
  for (int64_t m = rows.begin; m < rows.end; m += most) {
    const Range block{m, std::min(rows.end, m + most)};
    const int64_t count = block.end - block.begin;
    const Quantized q = quantize_rows(isa, c, block, integers, row, sums);
    std::fill(totals, totals + count * lanes, int64_t(0));
    for (int64_t k = 0; k < w.k; k += kPartK) {
      Int8Block b{};
      b.w = &w;
      b.panel_begin = panels.begin;
      b.panel_end = panels.end;
      b.a = q.a;
      b.a_stride = q.stride;
      b.k_begin = k;
      b.k_end = std::min(w.k, k + kPartK);
      b.rows = count;
      b.y = accumulators;
      b.y_stride = w.n;
      b.y_type = I32;
      isa.int8_block(b);
      for (int64_t i = 0; i < count; i++)
        for (int64_t l = 0; l < lanes; l++)
          totals[i * lanes + l] += accumulators[i * w.n + first + l];
    }
    for (int64_t i = 0; i < count; i++)
      for (int64_t n = first; n < last; n++) {
        const int64_t zero = row[i].zero_point - isa.a_offset;
        int64_t exact = totals[i * lanes + n - first] - zero * w.sum64[n];
        if (w.zero_point) exact -= w.zero_point[n] * (sums[i] - w.k * row[i].zero_point);
        float value = float(exact) * (row[i].scale * w.scale[n]);
        if (c.bias) value += c.bias[n];
        if (c.post.any()) value = after_scalar(c.post, c.y_type, m + i, n, value);
        store_wide(c, (m + i) * w.n + n, value);
      }
  }
}

void int8_piece(const Isa& isa, const Int8Call& c, Range rows, Range panels) {
  const PackedInt8& w = c.w;
  // Quantized rows take half of L2, in blocks that every register tile divides.
  constexpr int64_t step = 96;
  const int64_t count = rows.end - rows.begin, stride = row_stride(w);
  const int64_t bytes = isa.widen ? 3 * stride : stride;
  const int64_t fit = std::max<int64_t>(1, l2_bytes() / 2 / bytes / step) * step;
  const int64_t blocks = ceil_div(count, fit), most = round_up(ceil_div(count, blocks), step);
  uint8_t* room = in_place(isa, c) ? nullptr : rooms.integers.get(std::min(most, count) * stride);
  Row* row = rooms.row.get(std::min(most, count));
  const float* bias = padded(rooms.bias, c.bias, w.n);
  for (int64_t m = rows.begin; m < rows.end; m += most) {
    const Range block{m, std::min(rows.end, m + most)};
    const Quantized q = quantize_rows(isa, c, block, room, row, nullptr);
    Int8Block b;
    b.w = &w;
    b.panel_begin = panels.begin;
    b.panel_end = panels.end;
    b.a = q.a;
    b.a_stride = q.stride;
    b.k_begin = 0;
    b.k_end = w.k;
    b.row = row;
    b.rows = block.end - block.begin;
    b.bias = bias;
    b.y = advance(c.y, block.begin * w.n, c.y_type);
    b.y_stride = w.n;
    b.y_type = c.y_type;
    b.y_inverse_scale = 1.0f / c.y_scale;
    b.y_zero_point = c.y_zero_point;
    b.post = from_row(c.post, block.begin, c.y_type);
    isa.int8_block(b);
  }
}

void run(const Int8Call& c, int threads) {
  if (c.x.rows == 0 || c.w.n == 0) return;
  const Isa& isa = active_isa();
  const Work work{1.0 / isa.gmacs, in_place(isa, c) ? 0.0 : 0.12, 0.015, isa.row_step};
  const Grid grid = choose_grid(c.x.rows, c.w.panels, c.w.k_padded, threads, work);
  parallel(grid, [&](int row_part, int panel_part) {
    const Range rows = part(c.x.rows, grid.rows, row_part, isa.row_step);
    const Range panels = part(c.w.panels, grid.panels, panel_part);
    if (rows.begin == rows.end || panels.begin == panels.end) return;
    if (c.w.narrow())
      int8_piece(isa, c, rows, panels);
    else
      wide_piece(isa, c, rows, panels);
  });
}

// `b` comes with what concerns the weights; the rest is filled in here.
void run_floats(FloatBlock b, int64_t panels, const Input& x, const float* bias, const Post& post,
                void* y, int threads) {
  if (x.rows == 0 || b.n == 0) return;
  const Isa& isa = active_isa();
  const double weight_bytes = double(b.w_type == S8 ? 1 : size_of(b.w_type));
  const Work work{1.0 / isa.float_gmacs, x.type == F32 ? 0.0 : 0.1, 0.015 * weight_bytes, 1};
  const Grid grid = choose_grid(x.rows, panels, b.k, threads, work);
  parallel(grid, [&](int row_part, int panel_part) {
    const Range rows = part(x.rows, grid.rows, row_part);
    const Range columns = part(panels, grid.panels, panel_part);
    if (rows.begin == rows.end || columns.begin == columns.end) return;
    // Each block of rows reads all weights, so blocks are large and of one size.
    const int64_t blocks = ceil_div(rows.end - rows.begin, 192);
    const int64_t most = ceil_div(rows.end - rows.begin, blocks);
    float* floats = x.type == F32 ? nullptr : rooms.floats.get(most * b.k);
    FloatBlock block = b;
    block.scratch = rooms.parts.get(float_scratch(most));
    block.panel_begin = columns.begin;
    block.panel_end = columns.end;
    block.bias = padded(rooms.bias, bias, b.n);
    block.x_stride = floats ? b.k : x.stride;
    block.y_stride = b.n;
    block.y_type = x.type;
    for (int64_t m = rows.begin; m < rows.end; m += most) {
      block.rows = std::min(most, rows.end - m);
      block.x = to_floats(x, m, block.rows, b.k, floats);
      block.y = advance(y, m * b.n, x.type);
      block.post = from_row(post, m, x.type);
      isa.float_block(block);
    }
  });
}

}  // namespace

void linear_dynamic(const PackedInt8& w, const Input& x, const float* bias, const Post& post,
                    void* y, int threads) {
  run({w, x, Dynamic, 0.0f, 0, bias, post, y, x.type}, threads);
}

void linear_static(const PackedInt8& w, const Input& x, float scale, int32_t zero_point,
                   const float* bias, const Post& post, void* y, int threads) {
  run({w, x, Static, scale, zero_point, bias, post, y, x.type}, threads);
}

void linear_integer(const PackedInt8& w, const Input& q, float scale, int32_t zero_point,
                    const float* bias, const Post& post, float* y, int threads) {
  run({w, q, Integer, scale, zero_point, bias, post, y, F32}, threads);
}

void linear_quantized(const PackedInt8& w, const Input& q, float scale, int32_t zero_point,
                      const float* bias, Activation activation, void* y, float y_scale,
                      int32_t y_zero_point, int threads) {
  const Post post{activation, nullptr, 0};
  run({w, q, Integer, scale, zero_point, bias, post, y, q.type, y_scale, y_zero_point}, threads);
}

void linear_weight_only(const PackedInt8& w, const Input& x, const float* bias, const Post& post,
                        void* y, int threads) {
  FloatBlock b{};
  b.w = w.weight;
  b.w_type = S8;
  b.n = w.n;
  b.k = w.k;
  b.k_padded = w.k_padded;
  b.zero_point = w.zero_point;
  b.scale = w.scale;
  run_floats(b, w.panels, x, bias, post, y, threads);
}

void linear_float(const PackedFloat& w, const Input& x, const float* bias, const Post& post,
                  void* y, int threads) {
  FloatBlock b{};
  b.w = w.weight;
  b.w_type = w.type;
  b.n = w.n;
  b.k = b.k_padded = w.k;
  run_floats(b, w.panels, x, bias, post, y, threads);
}

}  // namespace zp
