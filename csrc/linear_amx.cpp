// AMX: products of 16 rows x 64 k with 64 k x 16 outputs, one instruction (TDPBUSD), exact in
// int32. The packed layout is already that of the tiles: 16 outputs of a panel are 64 bytes, four k
// to the next are 256 bytes. Rows of 32 x outputs of 32 are computed in four accumulating tiles from
// two of activations and two of weights; up to 16 rows by 64 outputs from one and four. Quantizing
// and the epilogue are those of AVX-512.
#include <immintrin.h>

#include "dispatch.h"

namespace zp {
namespace {
#include "scalar.h"
#include "kernel.h"
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
};

constexpr int64_t kQuadBytes = 4 * kPanel;            // of a panel, for four k
constexpr int64_t kStepBytes = int64_t(kStep) * kPanel;  // of a panel, for one step

template <Type Y>
ZP_INLINE void finish_tile(const Int8Block& b, int64_t m, int rows, int64_t n, int width,
                           const int32_t* acc) {
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < width; v += 16)
      finish<Avx512, Y>(b, m + r, n + v, _mm512_load_si512(acc + r * width + v));
}

// 17 to 32 rows x 64 outputs, in two halves.
template <Type Y>
void tile_32(const Int8Block& b, int64_t m, int rows, int64_t p) {
  alignas(64) int32_t acc[32 * 32];
  const uint8_t* a = b.a + m * b.a_stride + b.k_begin;
  const int64_t steps = ceil_div(b.k_end - b.k_begin, kStep), below = 16 * b.a_stride;
  for (int half = 0; half < 2; half++) {
    const int64_t n = p * kPanel + 32 * half;
    if (n >= b.w->n) return;
    const int8_t* w = b.w->panel(p) + b.k_begin * kPanel + 128 * half;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t s = 0; s < steps; s++) {
      _tile_loadd(6, w + s * kStepBytes, kQuadBytes);
      _tile_loadd(4, a + s * kStep, b.a_stride);
      _tile_dpbusd(0, 4, 6);
      _tile_loadd(7, w + s * kStepBytes + 64, kQuadBytes);
      _tile_dpbusd(1, 4, 7);
      _tile_loadd(5, a + s * kStep + below, b.a_stride);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    }
    _tile_stored(0, acc, 128);
    _tile_stored(1, acc + 16, 128);
    _tile_stored(2, acc + 16 * 32, 128);
    _tile_stored(3, acc + 16 * 32 + 16, 128);
    finish_tile<Y>(b, m, rows, n, 32, acc);
  }
}

// Up to 16 rows x 64 outputs.
template <Type Y>
void tile_16(const Int8Block& b, int64_t m, int rows, int64_t p) {
  alignas(64) int32_t acc[16 * 64];
  const uint8_t* a = b.a + m * b.a_stride + b.k_begin;
  const int8_t* w = b.w->panel(p) + b.k_begin * kPanel;
  const int64_t steps = ceil_div(b.k_end - b.k_begin, kStep);
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
  }
  _tile_stored(0, acc, 256);
  _tile_stored(1, acc + 16, 256);
  _tile_stored(2, acc + 32, 256);
  _tile_stored(3, acc + 48, 256);
  finish_tile<Y>(b, m, rows, p * kPanel, 64, acc);
}

template <Type Y>
void amx_block_to(const Int8Block& b) {
  const int64_t whole = b.rows / 32 * 32, left = b.rows - whole;
  if (whole) {
    const TileConfig config(16, 16);
    _tile_loadconfig(&config);
    for (int64_t p = b.panel_begin; p < b.panel_end; p++)
      for (int64_t m = 0; m < whole; m += 32) tile_32<Y>(b, m, 32, p);
  }
  if (left) {
    const int first = left < 16 ? int(left) : 16, second = left > 16 ? int(left) - 16 : first;
    const TileConfig config(first, second);
    _tile_loadconfig(&config);
    for (int64_t p = b.panel_begin; p < b.panel_end; p++) {
      if (left > 16)
        tile_32<Y>(b, whole, int(left), p);
      else
        tile_16<Y>(b, whole, int(left), p);
    }
  }
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

constexpr Isa make_amx() {
  Isa isa = make_isa<Avx512>("amx", cpu_has_amx, 1500.0f);
  isa.k_step = kStep;
  isa.row_step = 16;
  isa.int8_block = amx_block;
  return isa;
}
}  // namespace

extern const Isa isa_amx = make_amx();
}  // namespace zp
