// AVX-512 with VNNI: 64 products an instruction (VPDPBUSD), accumulated in int32 without
// saturation. A register tile is 6 rows x 64 outputs.
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

__attribute__((target("avx512bf16"))) int64_t peak_bfloat16(int64_t rounds) {
  if (!cpu_has_avx512bf16()) return 0;
  constexpr int count = 16;
  __m512i one = _mm512_set1_epi16(0x3f80);
  float lane[count][16] = {};
  keep(lane);
  __m512 acc[count];
  ZP_EACH(i, count) acc[i] = _mm512_loadu_ps(lane[i]);
  for (int64_t r = 0; r < rounds; r++) {
    forget(one);
    ZP_EACH(i, count) acc[i] = _mm512_dpbf16_ps(acc[i], (__m512bh)one, (__m512bh)one);
  }
  ZP_EACH(i, count) _mm512_storeu_ps(lane[i], acc[i]);
  keep(lane);
  return rounds * count * 32;
}

constexpr Isa make_avx512vnni() {
  Isa isa = make_isa<Avx512>("avx512vnni", cpu_has_avx512vnni, 200.0f, 100.0f);
  isa.limits.bfloat16 = peak_bfloat16;
  return isa;
}
}  // namespace

extern const Isa isa_avx512vnni = make_avx512vnni();
}  // namespace zp
