// AVX2, exact. VPMADDUBSW would saturate: it adds two products of up to 255 * 128 in int16. So
// even and odd bytes are widened to 16 bits and multiplied by VPMADDWD, which adds two products in
// int32: |sum| <= 2 * 255 * 128. A register tile is 4 rows x 16 outputs.
#include <immintrin.h>

#include "dispatch.h"

namespace zp {
namespace {
#include "scalar.h"
#include "kernel.h"
#include "avx2.h"

struct Avx2 : Avx2Base {
  struct a_t {
    __m256i even, odd;
  };
  using w_t = a_t;
  static constexpr int int_rows = 4, int_vecs = 2, int_chains = 5;

  static ZP_INLINE a_t load_a(const uint8_t* a) {
    int32_t quad;
    __builtin_memcpy(&quad, a, 4);
    const __m256i v = _mm256_set1_epi32(quad);
    return {_mm256_and_si256(v, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(v, 8)};
  }
  static ZP_INLINE w_t load_w(const int8_t* w) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    return {_mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), _mm256_srai_epi16(v, 8)};
  }
  static ZP_INLINE i32 add_pairs(i32 acc, i32 a, i32 b) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
  }
  static ZP_INLINE i32 dot(i32 acc, a_t a, w_t w) {
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(a.even, w.even));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(a.odd, w.odd));
  }
};

#include "isa_table.h"
}  // namespace

extern const Isa isa_avx2 = make_isa<Avx2>("avx2", cpu_has_avx2, 70.0f);
}  // namespace zp
