// NEON with 8-bit matrix products (ARMv8.6, Neoverse V1 and N2, Apple M2): USMMLA multiplies 2 rows
// x 8 k of unsigned activations with 8 k x 2 outputs of signed weights, 32 products an instruction,
// added to int32 without saturation. A register tile is 8 rows x 8 outputs; one row alone takes
// SUDOT, the dot product of signed weights and unsigned activations.
#include <arm_neon.h>

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
#include "neon.h"

struct NeonI8mm : NeonBase {
  using a_t = uint8x16_t;
  using w_t = int8x16_t;
  using lane_t = uint8x16_t;
  static constexpr int int_rows = 8, int_vecs = 2, int_chains = 0, a_offset = 0;
  static constexpr int byte_offset = 0;
  static constexpr bool own_tile = true;

  static ZP_INLINE a_t load_a(const uint8_t* a) { return four_bytes(a); }
  static ZP_INLINE w_t load_w(const int8_t* w) { return vld1q_s8(w); }
  static ZP_INLINE i32 dot(i32 acc, a_t a, w_t w) { return vusdotq_s32(acc, a, w); }

  static ZP_INLINE i32 dot_codes(i32 acc, i32 codes, i32 a) {
    return vdotq_s32(acc, vreinterpretq_s8_s32(codes), vreinterpretq_s8_s32(a));
  }
  static ZP_INLINE i32 dot_bytes(i32 acc, i32 codes, i32 a) {
    return vusdotq_s32(acc, vreinterpretq_u8_s32(codes), vreinterpretq_s8_s32(a));
  }

  static ZP_INLINE lane_t load_lanes(const uint8_t* a) { return vld1q_u8(a); }
  static ZP_INLINE i32 dot_lane(i32 acc, int8x16_t w, lane_t a, int lane) {
    switch (lane) {  // a constant once the loop around is unrolled, which the instruction needs
      case 0: return vsudotq_laneq_s32(acc, w, a, 0);
      case 1: return vsudotq_laneq_s32(acc, w, a, 1);
      case 2: return vsudotq_laneq_s32(acc, w, a, 2);
      default: return vsudotq_laneq_s32(acc, w, a, 3);
    }
  }

  static ZP_INLINE int64x2_t pair(int32x4_t v) { return vreinterpretq_s64_s32(v); }

  // Rows in pairs; a last row without a partner is its own partner, whose results are dropped.
  // acc[p][v][h]: of pair p the outputs 4 v + 2 h and the next, first for one row, then the other.
  template <int R, Type Y>
  static ZP_INLINE void matrix_tile(const Int8Block& b, const int8_t* w, int64_t m, int64_t n) {
    constexpr int N = int_vecs, P = (R + 1) / 2;
    int32x4_t acc[P][N][2];
    ZP_EACH(p, P)
      ZP_EACH(v, N) acc[p][v][0] = acc[p][v][1] = vdupq_n_s32(0);
    const uint8_t* a = b.a + m * b.a_stride + b.k_begin;
    const int64_t stride = b.a_stride, k = b.k_end - b.k_begin;
    for (int64_t i = 0; i < k; i += 16) {
      uint8x16_t av[P][2];  // 8 k of the two rows of a pair, then the next 8
      ZP_EACH(p, P) {
        const int64_t partner = 2 * p + 1 < R ? 2 * p + 1 : 2 * p;
        const uint64x2_t one = vreinterpretq_u64_u8(vld1q_u8(a + 2 * p * stride + i));
        const uint64x2_t two = vreinterpretq_u64_u8(vld1q_u8(a + partner * stride + i));
        av[p][0] = vreinterpretq_u8_u64(vzip1q_u64(one, two));
        av[p][1] = vreinterpretq_u8_u64(vzip2q_u64(one, two));
      }
      prefetch(w + 2048);
      ZP_EACH(s, 2) {
        ZP_EACH(v, N) {
          // Four k of four outputs, twice, become eight k of two outputs, twice.
          const int32x4_t first = load_i32(w + 16 * v), next = load_i32(w + 4 * kPanel + 16 * v);
          const int8x16_t low = vreinterpretq_s8_s32(vzip1q_s32(first, next));
          const int8x16_t high = vreinterpretq_s8_s32(vzip2q_s32(first, next));
          ZP_EACH(p, P) {
            acc[p][v][0] = vusmmlaq_s32(acc[p][v][0], av[p][s], low);
            acc[p][v][1] = vusmmlaq_s32(acc[p][v][1], av[p][s], high);
          }
        }
        w += 8 * kPanel;
      }
    }
    ZP_EACH(r, R) {
      int32x4_t out[N];
      ZP_EACH(v, N) {
        const int64x2_t low = pair(acc[r / 2][v][0]), high = pair(acc[r / 2][v][1]);
        out[v] = vreinterpretq_s32_s64(r % 2 ? vzip2q_s64(low, high) : vzip1q_s64(low, high));
      }
      finish_row<NeonI8mm, Y, N>(b, m + r, n, out);
    }
  }

  template <int R, Type Y>
  static void tile(const Int8Block& b, const int8_t* w, int64_t m, int64_t n) {
    if constexpr (R == 1)
      lane_tile<NeonI8mm, R, Y>(b, w, m, n);
    else
      matrix_tile<R, Y>(b, w, m, n);
  }
};

#include "isa_table.h"

constexpr Isa make_neoni8mm() {
  Isa isa = make_isa<NeonI8mm>("neoni8mm", cpu_has_neoni8mm, 90.0f, 20.0f);
  isa.k_step = 16;
  return isa;
}
}  // namespace

extern const Isa isa_neoni8mm = make_neoni8mm();
}  // namespace zp
