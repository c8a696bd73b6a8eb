// AVX-VNNI: the dot product of AVX-512-VNNI on 256-bit registers, for CPUs without AVX-512. A
// register tile is 6 rows x 16 outputs.
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
#include "avx2.h"

struct AvxVnni : Avx2Base {
  using a_t = __m256i;
  using w_t = __m256i;
  static constexpr int int_rows = 6, int_vecs = 2, int_chains = 5, a_bytes = 1;
  static constexpr void (*widen)(const uint8_t*, int64_t, uint8_t*) = nullptr;

  static ZP_INLINE a_t load_a(const uint8_t* a) {
    int32_t quad;
    __builtin_memcpy(&quad, a, 4);
    return _mm256_set1_epi32(quad);
  }
  static ZP_INLINE w_t load_w(const int8_t* w) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
  }
  static ZP_INLINE i32 add_pairs(i32 acc, i32 a, i32 b) {
    return _mm256_dpwssd_avx_epi32(acc, a, b);
  }
  static ZP_INLINE i32 dot_codes(i32 acc, i32 codes, i32 a) {
    return _mm256_dpbusd_avx_epi32(acc, codes, a);
  }
  static ZP_INLINE i32 dot_bytes(i32 acc, i32 codes, i32 a) { return dot_codes(acc, codes, a); }
  static ZP_INLINE i32 dot(i32 acc, a_t a, w_t w) { return _mm256_dpbusd_avx_epi32(acc, a, w); }
};

#include "isa_table.h"
}  // namespace

extern const Isa isa_avxvnni = make_isa<AvxVnni>("avxvnni", cpu_has_avxvnni, 120.0f, 50.0f);
}  // namespace zp
