// NEON without the dot product (Cortex-A53 to A73): SMULL makes eight products of int8, SADALP adds
// them in pairs to int32. Both take signed bytes, so activations are lowered by 128 (a_offset):
// |product| <= 128 * 128 fits int16, but the sum of two would not: 2^15. So each SMULL has its own
// SADALP, and no SMLAL. A register tile is 4 rows x 16 outputs.
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

struct Neon : NeonBase {
  // Of four k: the first two and the last two, each for four outputs, so that the pairs which
  // SADALP adds are of one output.
  struct a_t {
    int8x8_t first, second;
  };
  using w_t = a_t;
  static constexpr int int_rows = 4, int_vecs = 4, int_chains = 0, a_offset = 128;
  static constexpr int byte_offset = 128;  // there is no product of unsigned and signed
  static constexpr bool own_tile = false;

  static ZP_INLINE a_t load_a(const uint8_t* a) {
    const int16x8_t v = vreinterpretq_s16_s8(lowered(four_bytes(a)));
    return {vreinterpret_s8_s16(vdup_laneq_s16(v, 0)), vreinterpret_s8_s16(vdup_laneq_s16(v, 1))};
  }
  static ZP_INLINE w_t load_w(const int8_t* w) {
    const int16x8_t v = vreinterpretq_s16_s8(vld1q_s8(w));
    return {vreinterpret_s8_s16(vget_low_s16(vuzp1q_s16(v, v))),
            vreinterpret_s8_s16(vget_low_s16(vuzp2q_s16(v, v)))};
  }
  // Codes are below 16, so that here the sum of two products fits int16.
  static ZP_INLINE i32 dot_codes(i32 acc, i32 codes, i32 a) {
    const int8x16_t w = vreinterpretq_s8_s32(codes), x = vreinterpretq_s8_s32(a);
    const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x)), high = vmull_high_s8(w, x);
    return vpadalq_s16(acc, vpaddq_s16(low, high));
  }
  static ZP_INLINE i32 dot_bytes(i32 acc, i32 codes, i32 a) {
    const int8x16_t w = vreinterpretq_s8_s32(flip_bytes(codes)), x = vreinterpretq_s8_s32(a);
    // Twos of products do not fit int16: each is widened before it is added.
    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x)));
    const int32x4_t high = vpaddlq_s16(vmull_high_s8(w, x));
    return vaddq_s32(acc, vpaddq_s32(low, high));
  }
  static ZP_INLINE i32 dot(i32 acc, a_t a, w_t w) {
    acc = vpadalq_s16(acc, vmull_s8(a.first, w.first));
    return vpadalq_s16(acc, vmull_s8(a.second, w.second));
  }
};

#include "isa_table.h"
}  // namespace

extern const Isa isa_neon = make_isa<Neon>("neon", cpu_has_neon, 12.0f, 12.0f);
}  // namespace zp
