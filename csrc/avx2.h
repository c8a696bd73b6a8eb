// Vector operations of AVX2 with FMA and F16C, for kernel.h. Shared by linear_avx2.cpp and
// linear_avxvnni.cpp, each inside its anonymous namespace; each adds its own dot product.

struct Avx2Base {
  using f32 = __m256;
  using i32 = __m256i;
  static constexpr int lanes = 8, quantize_width = 32;
  static constexpr int float_rows = 6, float_vecs = 2;
  static constexpr int group_rows = 4, coded_rows = 8;
  static constexpr int group_vecs(int) { return 2; }
  static constexpr bool keep_sums = false, unsigned_rows = true;
  static constexpr int byte_offset = 0;
  static constexpr int a_offset = 0;
  static constexpr bool own_tile = false;

  static ZP_INLINE f32 zero_f32() { return _mm256_setzero_ps(); }
  static ZP_INLINE i32 zero_i32() { return _mm256_setzero_si256(); }
  static ZP_INLINE f32 set1(float v) { return _mm256_set1_ps(v); }
  static ZP_INLINE i32 set1_i32(int32_t v) { return _mm256_set1_epi32(v); }
  static ZP_INLINE f32 add(f32 a, f32 b) { return _mm256_add_ps(a, b); }
  static ZP_INLINE f32 sub(f32 a, f32 b) { return _mm256_sub_ps(a, b); }
  static ZP_INLINE f32 mul(f32 a, f32 b) { return _mm256_mul_ps(a, b); }
  static ZP_INLINE f32 div(f32 a, f32 b) { return _mm256_div_ps(a, b); }
  static ZP_INLINE f32 fma(f32 a, f32 b, f32 c) { return _mm256_fmadd_ps(a, b, c); }
  static ZP_INLINE f32 min(f32 a, f32 b) { return _mm256_min_ps(a, b); }
  static ZP_INLINE f32 max(f32 a, f32 b) { return _mm256_max_ps(a, b); }
  static ZP_INLINE f32 or_nan(f32 a, f32 v) {
    return _mm256_or_ps(a, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  }
  static ZP_INLINE float least(f32 v) {
    __m128 m = _mm_min_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_min_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_min_ss(m, _mm_movehdup_ps(m)));
  }
  static ZP_INLINE float greatest(f32 v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }
  static ZP_INLINE bool any_nan(f32 v) {
    return _mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)) != 0;
  }
  static ZP_INLINE f32 select_negative(f32 x, f32 a, f32 b) {  // x < 0 ? a : b
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(x, zero_f32(), _CMP_LT_OQ));
  }
  static ZP_INLINE f32 power_of_two(i32 n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(add_i32(n, set1_i32(127)), 23));
  }
  static ZP_INLINE i32 add_i32(i32 a, i32 b) { return _mm256_add_epi32(a, b); }
  static ZP_INLINE i32 sub_i32(i32 a, i32 b) { return _mm256_sub_epi32(a, b); }
  static ZP_INLINE i32 mul_i32(i32 a, i32 b) { return _mm256_mullo_epi32(a, b); }
  static ZP_INLINE f32 to_f32(i32 v) { return _mm256_cvtepi32_ps(v); }
  static ZP_INLINE i32 to_i32(f32 v) { return _mm256_cvtps_epi32(v); }
  // Lane l of the result is lane l ^ Distance.
  template <int Distance>
  static ZP_INLINE f32 swap(f32 v) {
    if constexpr (Distance == 1) return _mm256_permute_ps(v, 0xb1);
    if constexpr (Distance == 2) return _mm256_permute_ps(v, 0x4e);
    return _mm256_permute2f128_ps(v, v, 1);
  }
  static ZP_INLINE i32 load_i32(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  static ZP_INLINE void store_i32(int32_t* p, i32 v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v);
  }
  static ZP_INLINE __m128i low_words(i32 v) {  // the low 16 bits of each lane
    const i32 masked = _mm256_and_si256(v, set1_i32(0xffff));
    return _mm_packus_epi32(_mm256_castsi256_si128(masked), _mm256_extracti128_si256(masked, 1));
  }
  static ZP_INLINE void store_bytes(uint8_t* p, i32 v) {
    const __m128i words = low_words(_mm256_and_si256(v, set1_i32(0xff)));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
  }
  static ZP_INLINE void prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
  }
  static ZP_INLINE void prefetch_far(const void* p) {  // to the second level of cache
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
  }

  template <Type T>
  static ZP_INLINE f32 load(const void* x, int64_t i) {
    if constexpr (T == F32) return _mm256_loadu_ps(static_cast<const float*>(x) + i);
    const __m128i h =
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(x) + i));
    if constexpr (T == BF16)
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
    return _mm256_cvtph_ps(h);
  }

  template <Type Y>
  static ZP_INLINE void store(void* y, int64_t i, f32 v) {
    if constexpr (Y == F32) {
      _mm256_storeu_ps(static_cast<float*>(y) + i, v);
    } else {
      __m128i h;
      if constexpr (Y == BF16) {
        const i32 bits = _mm256_castps_si256(v);
        const i32 odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), set1_i32(1));
        const i32 top = _mm256_srli_epi32(add_i32(add_i32(bits, set1_i32(0x7fff)), odd), 16);
        const f32 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
        h = low_words(_mm256_castps_si256(_mm256_blendv_ps(
            _mm256_castsi256_ps(top), _mm256_castsi256_ps(set1_i32(0x7fc0)), nan)));
      } else {
        h = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      }
      _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(y) + i), h);
    }
  }

  // Codes of four bits, eight a lane; see kernel_groups_tile.h.
  using lut_t = i32;
  static ZP_INLINE lut_t make_lut(int32_t zero) { return set1_i32(zero); }
  template <int J>
  static ZP_INLINE f32 nibble(i32 octet, lut_t zero) {
    constexpr int shift = 8 * (J % 4) + 4 * (J / 4);
    const i32 code = _mm256_and_si256(_mm256_srli_epi32(octet, shift), set1_i32(15));
    return to_f32(sub_i32(code, zero));
  }
  static ZP_INLINE i32 load_u8(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static ZP_INLINE i32 low_codes(i32 octet) {
    return _mm256_and_si256(octet, _mm256_set1_epi8(15));
  }
  static ZP_INLINE i32 high_codes(i32 octet) { return low_codes(_mm256_srli_epi16(octet, 4)); }
  static ZP_INLINE i32 sub_bytes(i32 a, i32 b) { return _mm256_sub_epi8(a, b); }
  static ZP_INLINE i32 flip_bytes(i32 v) {
    return _mm256_xor_si256(v, _mm256_set1_epi8(int8_t(0x80)));
  }
  static ZP_INLINE i32 twice(i32 v) { return _mm256_or_si256(v, _mm256_slli_epi32(v, 16)); }

  template <int J>
  static ZP_INLINE i32 byte(i32 quad, i32 zero) {
    if constexpr (J < 3) quad = _mm256_slli_epi32(quad, 24 - 8 * J);
    return sub_i32(_mm256_srai_epi32(quad, 24), zero);
  }

  static ZP_INLINE i32 shift_byte(i32 quad) { return _mm256_srli_epi32(quad, 8); }

  template <Type T, bool Static>
  static ZP_INLINE void quantize(const void* x, int64_t i, float inverse, int32_t zero_point,
                                 uint8_t* q) {
    i32 v[4];
    for (int j = 0; j < 4; j++) {
      const f32 real = load<T>(x, i + 8 * j);
      // Conversion gives INT_MIN beyond the range of int32, which saturates rightly only below.
      v[j] = to_i32(Static ? min(fma(real, set1(inverse), set1(float(zero_point))), set1(255.0f))
                           : mul(real, set1(inverse)));
    }
    // Saturate to int16, add the zero point, saturate to uint8: the clamping to 0 and 255.
    const i32 zero = _mm256_set1_epi16(int16_t(Static ? 0 : zero_point));
    const i32 first = _mm256_add_epi16(_mm256_packs_epi32(v[0], v[1]), zero);
    const i32 second = _mm256_add_epi16(_mm256_packs_epi32(v[2], v[3]), zero);
    // Packing works within 128-bit lanes; the permutation puts the groups of four back in order.
    const i32 words = _mm256_packus_epi16(first, second);
    const i32 order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    store_i32(reinterpret_cast<int32_t*>(q), _mm256_permutevar8x32_epi32(words, order));
  }
};
