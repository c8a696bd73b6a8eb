// NEON with the dot product (ARMv8.2, Cortex-A75 and newer, Apple M1): SDOT adds four products of
// int8 to each of four int32, without saturation. Both operands are signed, so activations are
// lowered by 128 (a_offset). A register tile is 4 rows x 16 outputs.
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

struct NeonDot : NeonBase {
  using a_t = int8x16_t;
  using w_t = int8x16_t;
  using lane_t = int8x16_t;
  static constexpr int int_rows = 4, int_vecs = 4, int_chains = 0, a_offset = 128;
  static constexpr int byte_offset = 128;  // there is no product of unsigned and signed
  static constexpr bool own_tile = true;

  static ZP_INLINE a_t load_a(const uint8_t* a) { return lowered(four_bytes(a)); }
  static ZP_INLINE w_t load_w(const int8_t* w) { return vld1q_s8(w); }
  static ZP_INLINE i32 dot(i32 acc, a_t a, w_t w) { return vdotq_s32(acc, w, a); }

  static ZP_INLINE i32 dot_codes(i32 acc, i32 codes, i32 a) {
    return vdotq_s32(acc, vreinterpretq_s8_s32(codes), vreinterpretq_s8_s32(a));
  }
  static ZP_INLINE i32 dot_bytes(i32 acc, i32 codes, i32 a) {
    return dot_codes(acc, flip_bytes(codes), a);
  }

  static ZP_INLINE lane_t load_lanes(const uint8_t* a) { return lowered(vld1q_u8(a)); }
  static ZP_INLINE i32 dot_lane(i32 acc, int8x16_t w, lane_t a, int lane) {
    switch (lane) {  // a constant once the loop around is unrolled, which the instruction needs
      case 0: return vdotq_laneq_s32(acc, w, a, 0);
      case 1: return vdotq_laneq_s32(acc, w, a, 1);
      case 2: return vdotq_laneq_s32(acc, w, a, 2);
      default: return vdotq_laneq_s32(acc, w, a, 3);
    }
  }
  template <int R, Type Y>
  static void tile(const Int8Block& b, const int8_t* w, int64_t m, int64_t n) {
    lane_tile<NeonDot, R, Y>(b, w, m, n);
  }
};

#include "isa_table.h"

constexpr Isa make_neondot() {
  Isa isa = make_isa<NeonDot>("neondot", cpu_has_neondot, 60.0f, 20.0f);
  isa.k_step = 16;
  return isa;
}
}  // namespace

extern const Isa isa_neondot = make_neondot();
}  // namespace zp
