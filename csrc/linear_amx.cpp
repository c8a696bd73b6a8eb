// AMX: products of 16 rows x 64 k with 64 k x 16 outputs, one instruction (TDPBUSD), exact in
// int32. The packed layout is already that of the tiles: 16 outputs of a panel are 64 bytes, four k
// to the next are 256 bytes. Rows of 32 x outputs of 32 are computed in four accumulating tiles
// from two of activations and two of weights; up to 16 rows by 64 outputs from one and four.
// Quantizing and the epilogue are those of AVX-512.
#include <immintrin.h>

#include "dispatch.h"

namespace zp {
namespace {
#include "scalar.h"
#include "kernel_common.h"
#include "kernel_quantize.h"
#include "kernel_transform.h"
#include "kernel_int8.h"
#include "kernel_float.h"
#include "kernel_groups_tile.h"
#include "kernel_groups_int.h"
#include "kernel_groups_float.h"
#include "kernel_groups.h"
#include "avx512.h"
#include "isa_table.h"

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  // Tiles 0..3 accumulate, 4 and 5 hold activations, 6 and 7 weights. `first` and `second` are the
  // rows of the two groups; with one group, accumulators all have its rows.
  TileConfig(int first, int second) {
    const int group[8] = {first, first, second, second, first, second, 16, 16};
    for (int t = 0; t < 8; t++) {
      bytes[t] = 64;
      rows[t] = uint8_t(group[t]);
    }
  }
  // GCC 12's intrinsic names only the first 8 bytes as read: without the barrier, the stores of the
  // rest are dead to it.
  ZP_INLINE void load() const {
    keep(this);
    _tile_loadconfig(this);
  }
};

constexpr int64_t kStepBytes = int64_t(kStep) * kPanel;  // of a panel, for one step
constexpr int64_t kGroup = 128;                          // rows whose accumulators stay in L1
constexpr int64_t kStayBytes = 3 << 18;                  // weights that L2 keeps beside rows
constexpr int64_t kFarBytes = 1 << 21;                   // weights that it does not
constexpr int64_t kLongSteps = 16, kPartSteps = 6;       // k is cut into parts where it is longer

// Finished accumulators that wait for their epilogue, which is done in slices between the tile
// instructions of the next block: the tile unit and the vector units then work at the same time.
template <Type Y>
struct Waiting {
  const int32_t* acc = nullptr;
  int64_t m = 0, n = 0;
  int rows = 0, done = 0, width = 0;

  ZP_INLINE void finish_rows(const Int8Block& b, int64_t until) {
    if (Y != I32 && b.post.any()) {
      if (done < until)
        finish_post<Avx512>(b, m + done, int(until) - done, n, width, acc + done * width);
      if (done < until) done = int(until);
      return;
    }
    for (; done < until; done++) {
      if (width == 32)
        finish_row<Avx512, Y, 2>(b, m + done, n, reinterpret_cast<const __m512i*>(acc + done * 32));
      else
        finish_row<Avx512, Y, 4>(b, m + done, n, reinterpret_cast<const __m512i*>(acc + done * 64));
    }
  }
};

// Steps [begin, end) of 32 rows x 32 outputs. With a tile configuration of fewer rows (17 to 31),
// of those. Accumulators start from zero or continue from `acc`, and end in `acc`.
template <Type Y>
void tile_32(const Int8Block& b, int64_t m, const int8_t* w, int64_t begin, int64_t end,
             int32_t* acc, Waiting<Y>& waiting) {
  const uint8_t* a = b.a + m * b.a_stride + b.k_begin;
  const int64_t below = 16 * b.a_stride;
  const int64_t slice = ceil_div(waiting.rows, end - begin > 0 ? end - begin : 1);
  if (begin == 0) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, acc, 128);
    _tile_loadd(1, acc + 16, 128);
    _tile_loadd(2, acc + 512, 128);
    _tile_loadd(3, acc + 528, 128);
  }
  for (int64_t s = begin; s < end; s++) {
    _tile_loadd(6, w + s * kStepBytes, kQuadBytes);
    _tile_loadd(4, a + s * kStep, b.a_stride);
    _tile_dpbusd(0, 4, 6);
    _tile_loadd(7, w + s * kStepBytes + 64, kQuadBytes);
    _tile_dpbusd(1, 4, 7);
    _tile_loadd(5, a + s * kStep + below, b.a_stride);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
    const int64_t until = (s - begin + 1) * slice;
    waiting.finish_rows(b, until < waiting.rows ? until : waiting.rows);
  }
  waiting.finish_rows(b, waiting.rows);
  _tile_stored(0, acc, 128);
  _tile_stored(1, acc + 16, 128);
  _tile_stored(2, acc + 512, 128);
  _tile_stored(3, acc + 528, 128);
}

// 16 rows x 64 outputs, or of fewer rows by the tile configuration.
template <Type Y>
void tile_16(const Int8Block& b, int64_t m, const int8_t* w, int64_t steps, int32_t* acc,
             Waiting<Y>& waiting) {
  const uint8_t* a = b.a + m * b.a_stride + b.k_begin;
  const int64_t slice = ceil_div(waiting.rows, steps > 0 ? steps : 1);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; s++, w += kStepBytes) {
    _tile_loadd(4, a + s * kStep, b.a_stride);
    _tile_loadd(6, w, kQuadBytes);
    _tile_dpbusd(0, 4, 6);
    _tile_loadd(7, w + 64, kQuadBytes);
    _tile_dpbusd(1, 4, 7);
    _tile_loadd(6, w + 128, kQuadBytes);
    _tile_dpbusd(2, 4, 6);
    _tile_loadd(7, w + 192, kQuadBytes);
    _tile_dpbusd(3, 4, 7);
    const int64_t until = (s + 1) * slice;
    waiting.finish_rows(b, until < waiting.rows ? until : waiting.rows);
  }
  waiting.finish_rows(b, waiting.rows);
  _tile_stored(0, acc, 256);
  _tile_stored(1, acc + 16, 256);
  _tile_stored(2, acc + 32, 256);
  _tile_stored(3, acc + 48, 256);
}

// One block of up to 32 rows by one panel. A last block of fewer rows than the tiles is moved up
// over its neighbour, whose rows it computes again to the same bits.
struct Blocks {
  int64_t count, rows;
  int64_t begin(int64_t i, int64_t height) const {
    const int64_t m = i * 32;
    return m + height > rows ? rows - height : m;
  }
  int height(int64_t i) const {
    const int64_t left = rows - i * 32;
    if (rows < 32) return int(rows);
    return left > 16 ? 32 : 16;
  }
};

template <Type Y>
void amx_block_to(const Int8Block& b) {
  if (b.rows == 0) return;
  const int first = b.rows < 16 ? int(b.rows) : 16;
  const int second = b.rows <= 16 ? first : b.rows < 32 ? int(b.rows) - 16 : 16;
  const TileConfig config(first, second);
  config.load();
  alignas(64) int32_t acc[kGroup / 32][32 * 32];
  const int64_t steps = ceil_div(b.k_end - b.k_begin, kStep);
  const Blocks blocks{ceil_div(b.rows, 32), b.rows};
  const auto panel = [&](int64_t p) { return b.w->panel(p) + b.k_begin * kPanel; };
  Waiting<Y> waiting;
  const auto multiply = [&](int64_t i, int64_t p, int half, int64_t begin, int64_t end,
                            int32_t* to) {
    const int height = blocks.height(i);
    const int64_t m = blocks.begin(i, height), n = p * kPanel + 32 * half;
    if (height <= 16 && (half == 1 || end < steps)) return;
    if (height > 16)
      tile_32(b, m, panel(p) + 128 * half, begin, end, to, waiting);
    else
      tile_16(b, m, panel(p), steps, to, waiting);
    waiting = Waiting<Y>();
    if (end == steps && n < b.w->n) waiting = {to, m, n, height, 0, height > 16 ? 32 : 64};
  };
  const int64_t weight_bytes = (b.panel_end - b.panel_begin) * steps * kStepBytes;
  if (weight_bytes <= kStayBytes && steps <= kLongSteps) {
    // Rows stay in L1 while weights pass by from L2.
    for (int64_t i = 0; i < blocks.count; i++)
      for (int64_t p = b.panel_begin; p < b.panel_end; p++)
        for (int half = 0; half < 2; half++) multiply(i, p, half, 0, steps, acc[0]);
  } else if (weight_bytes > kFarBytes && b.rows == 32) {
    // Weights come from afar: whole panels in order, which halves would read with gaps.
    for (int64_t p = b.panel_begin; p < b.panel_end; p++)
      for (int64_t m = 0; m < 32; m += 16) {
        int32_t* to = acc[m / 16];
        tile_16(b, m, panel(p), steps, to, waiting);
        waiting = {to, m, p * kPanel, 16, 0, 64};
      }
  } else {
    // Weights, or a part of them, stay in L1 while rows pass by.
    const int64_t part = steps <= kLongSteps ? steps : kPartSteps;
    for (int64_t group = 0; group < blocks.count; group += kGroup / 32)
      for (int64_t p = b.panel_begin; p < b.panel_end; p++)
        for (int half = 0; half < 2; half++)
          for (int64_t s = 0; s < steps || s == 0; s += part)
            for (int64_t i = group; i < blocks.count && i < group + kGroup / 32; i++)
              multiply(i, p, half, s, s + part < steps ? s + part : steps, acc[i - group]);
  }
  waiting.finish_rows(b, waiting.rows);
  _tile_release();
}

void amx_block(const Int8Block& b) {
  switch (b.y_type) {
    case F32: return amx_block_to<F32>(b);
    case BF16: return amx_block_to<BF16>(b);
    case F16: return amx_block_to<F16>(b);
    case U8: return amx_block_to<U8>(b);
    case S8: return amx_block_to<S8>(b);
    case I32: return amx_block_to<I32>(b);
  }
}

// For limits. Four accumulating tiles hide the latency of the products.
void all_tiles() {
  const TileConfig config(16, 16);
  config.load();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  alignas(64) uint8_t bytes[2048];
  for (int i = 0; i < 2048; i++) bytes[i] = uint8_t(151 * i + 77) & 0xbf;  // as bfloat16: finite
  keep(bytes);
  _tile_loadd(4, bytes, 64);
  _tile_loadd(6, bytes + 1024, 64);
}

int64_t peak_tiles(int64_t rounds) {
  all_tiles();
  for (int64_t r = 0; r < rounds; r++) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 6);
    _tile_dpbusd(2, 4, 6);
    _tile_dpbusd(3, 4, 6);
  }
  _tile_release();
  return rounds * 4 * 16 * 16 * 64;
}

__attribute__((target("amx-bf16"))) int64_t peak_tiles_bf16(int64_t rounds) {
  if (!cpu_has_amx_bf16()) return 0;
  all_tiles();
  for (int64_t r = 0; r < rounds; r++) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 6);
    _tile_dpbf16ps(2, 4, 6);
    _tile_dpbf16ps(3, 4, 6);
  }
  _tile_release();
  return rounds * 4 * 16 * 16 * 32;
}

constexpr Isa make_amx() {
  Isa isa = make_isa<Avx512>("amx", cpu_has_amx, 1500.0f, 100.0f);
  isa.k_step = kStep;
  isa.row_step = 16;
  isa.int8_block = amx_block;
  isa.limits.int8 = peak_tiles;
  isa.limits.bfloat16 = peak_tiles_bf16;
  return isa;
}
}  // namespace

extern const Isa isa_amx = make_amx();
}  // namespace zp
