// AVX2, exact. VPMADDUBSW would saturate: it adds two products of up to 255 * 128 in int16. So
// even and odd bytes are widened to 16 bits and multiplied by VPMADDWD, which adds two products in
// int32: |sum| <= 2 * 255 * 128. A register tile is 4 rows x 16 outputs.
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

struct Avx2 : Avx2Base {
  struct a_t {
    __m256i even, odd;
  };
  using w_t = a_t;
  static constexpr int int_rows = 4, int_vecs = 2, int_chains = 5, a_bytes = 2;

  // Activations are widened once a block of rows, not at every use: of each four, the even bytes as
  // int16, then the odd ones.
  static void widen(const uint8_t* q, int64_t k_padded, uint8_t* to) {
    for (int64_t i = 0; i < k_padded; i += 32) {
      const __m256i v = load_i32(q + i);
      const __m256i even = _mm256_and_si256(v, _mm256_set1_epi16(0xff));
      const __m256i odd = _mm256_srli_epi16(v, 8);
      const __m256i low = _mm256_unpacklo_epi32(even, odd);   // quads 0, 1 and 4, 5
      const __m256i high = _mm256_unpackhi_epi32(even, odd);  // quads 2, 3 and 6, 7
      __m256i* out = reinterpret_cast<__m256i*>(to + 2 * i);
      _mm256_storeu_si256(out, _mm256_permute2x128_si256(low, high, 0x20));
      _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(low, high, 0x31));
    }
  }
  static ZP_INLINE a_t load_a(const uint8_t* a) {
    int32_t even, odd;
    __builtin_memcpy(&even, a, 4);
    __builtin_memcpy(&odd, a + 4, 4);
    return {_mm256_set1_epi32(even), _mm256_set1_epi32(odd)};
  }
  static ZP_INLINE w_t signed_halves(__m256i v) {
    return {_mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), _mm256_srai_epi16(v, 8)};
  }
  static ZP_INLINE w_t load_w(const int8_t* w) {
    return signed_halves(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)));
  }
  static ZP_INLINE i32 add_pairs(i32 acc, i32 a, i32 b) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
  }
  // Two products of a code and a byte are at most 2 * 15 * 255: here VPMADDUBSW is exact.
  static ZP_INLINE i32 dot_codes(i32 acc, i32 codes, i32 a) {
    const i32 pairs = _mm256_maddubs_epi16(codes, a);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static ZP_INLINE i32 dot_bytes(i32 acc, i32 codes, i32 a) {
    const __m256i even = _mm256_and_si256(codes, _mm256_set1_epi16(0xff));
    const __m256i odd = _mm256_srli_epi16(codes, 8);
    return dot(acc, signed_halves(a), {even, odd});
  }
  static ZP_INLINE i32 dot(i32 acc, a_t a, w_t w) {
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(a.even, w.even));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(a.odd, w.odd));
  }
};

#include "isa_table.h"
}  // namespace

extern const Isa isa_avx2 = make_isa<Avx2>("avx2", cpu_has_avx2, 70.0f, 50.0f);
}  // namespace zp
