// Vector operations of AVX-512 with VNNI, for kernel.h. Shared by linear_avx512vnni.cpp and
// linear_amx.cpp, each inside its anonymous namespace.

struct Avx512 {
  using f32 = __m512;
  using i32 = __m512i;
  using a_t = __m512i;
  using w_t = __m512i;
  static constexpr int lanes = 16, quantize_width = 64;
  static constexpr int int_rows = 6, int_vecs = 4, int_chains = 10;
  static constexpr int float_rows = 6, float_vecs = 4;
  static constexpr int group_rows = 6, coded_rows = 18;
  static constexpr int group_vecs(int rows) { return rows <= 3 ? 4 : 2; }
  static constexpr bool keep_sums = true, unsigned_rows = true;
  static constexpr int byte_offset = 0;
  static constexpr int a_offset = 0;
  static constexpr bool own_tile = false;
  static constexpr int a_bytes = 1;
  static constexpr void (*widen)(const uint8_t*, int64_t, uint8_t*) = nullptr;

  static ZP_INLINE f32 zero_f32() { return _mm512_setzero_ps(); }
  static ZP_INLINE i32 zero_i32() { return _mm512_setzero_si512(); }
  static ZP_INLINE f32 set1(float v) { return _mm512_set1_ps(v); }
  static ZP_INLINE i32 set1_i32(int32_t v) { return _mm512_set1_epi32(v); }
  static ZP_INLINE f32 add(f32 a, f32 b) { return _mm512_add_ps(a, b); }
  static ZP_INLINE f32 sub(f32 a, f32 b) { return _mm512_sub_ps(a, b); }
  static ZP_INLINE f32 mul(f32 a, f32 b) { return _mm512_mul_ps(a, b); }
  static ZP_INLINE f32 div(f32 a, f32 b) { return _mm512_div_ps(a, b); }
  static ZP_INLINE f32 fma(f32 a, f32 b, f32 c) { return _mm512_fmadd_ps(a, b, c); }
  static ZP_INLINE f32 min(f32 a, f32 b) { return _mm512_min_ps(a, b); }
  static ZP_INLINE f32 max(f32 a, f32 b) { return _mm512_max_ps(a, b); }
  static ZP_INLINE f32 or_nan(f32 a, f32 v) {
    return _mm512_mask_mov_ps(a, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), v);
  }
  static ZP_INLINE float least(f32 v) { return _mm512_reduce_min_ps(v); }
  static ZP_INLINE float greatest(f32 v) { return _mm512_reduce_max_ps(v); }
  static ZP_INLINE bool any_nan(f32 v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) != 0; }
  static ZP_INLINE f32 select_negative(f32 x, f32 a, f32 b) {  // x < 0 ? a : b
    return _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask(x, zero_f32(), _CMP_LT_OQ), a);
  }
  static ZP_INLINE f32 power_of_two(i32 n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(add_i32(n, set1_i32(127)), 23));
  }
  static ZP_INLINE i32 add_i32(i32 a, i32 b) { return _mm512_add_epi32(a, b); }
  static ZP_INLINE i32 sub_i32(i32 a, i32 b) { return _mm512_sub_epi32(a, b); }
  static ZP_INLINE i32 mul_i32(i32 a, i32 b) { return _mm512_mullo_epi32(a, b); }
  static ZP_INLINE f32 to_f32(i32 v) { return _mm512_cvtepi32_ps(v); }
  static ZP_INLINE i32 to_i32(f32 v) { return _mm512_cvtps_epi32(v); }
  // Lane l of the result is lane l ^ Distance.
  template <int Distance>
  static ZP_INLINE f32 swap(f32 v) {
    if constexpr (Distance == 1) return _mm512_permute_ps(v, 0xb1);
    if constexpr (Distance == 2) return _mm512_permute_ps(v, 0x4e);
    if constexpr (Distance == 4) return _mm512_shuffle_f32x4(v, v, 0xb1);
    return _mm512_shuffle_f32x4(v, v, 0x4e);
  }
  static ZP_INLINE i32 load_i32(const void* p) { return _mm512_loadu_si512(p); }
  static ZP_INLINE void store_i32(int32_t* p, i32 v) { _mm512_storeu_si512(p, v); }
  static ZP_INLINE void store_bytes(uint8_t* p, i32 v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
  }
  static ZP_INLINE void prefetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
  }
  static ZP_INLINE void prefetch_far(const void* p) {  // to the second level of cache
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1);
  }

  template <Type T>
  static ZP_INLINE f32 load(const void* x, int64_t i) {
    if constexpr (T == F32) return _mm512_loadu_ps(static_cast<const float*>(x) + i);
    const __m256i h =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(x) + i));
    if constexpr (T == BF16)
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
    return _mm512_cvtph_ps(h);
  }

  template <Type Y>
  static ZP_INLINE void store(void* y, int64_t i, f32 v) {
    if constexpr (Y == F32) {
      _mm512_storeu_ps(static_cast<float*>(y) + i, v);
    } else {
      __m256i h;
      if constexpr (Y == BF16) {
        const i32 bits = _mm512_castps_si512(v);
        const i32 odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), set1_i32(1));
        i32 top = _mm512_srli_epi32(add_i32(add_i32(bits, set1_i32(0x7fff)), odd), 16);
        top = _mm512_mask_mov_epi32(top, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), set1_i32(0x7fc0));
        h = _mm512_cvtepi32_epi16(top);
      } else {
        h = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(y) + i), h);
    }
  }

  static ZP_INLINE a_t load_a(const uint8_t* a) {
    int32_t quad;
    __builtin_memcpy(&quad, a, 4);
    return _mm512_set1_epi32(quad);
  }
  static ZP_INLINE w_t load_w(const int8_t* w) { return _mm512_loadu_si512(w); }
  static ZP_INLINE i32 dot(i32 acc, a_t a, w_t w) { return _mm512_dpbusd_epi32(acc, a, w); }

  // acc + the two products of 16-bit halves.
  static ZP_INLINE i32 add_pairs(i32 acc, i32 a, i32 b) { return _mm512_dpwssd_epi32(acc, a, b); }

  // Codes of four bits, eight a lane; see kernel_groups_tile.h.
  using lut_t = f32;
  static ZP_INLINE lut_t make_lut(int32_t zero) {
    const f32 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return sub(codes, set1(float(zero)));
  }
  template <int J>
  static ZP_INLINE f32 nibble(i32 octet, lut_t lut) {  // the permutation reads the low four bits
    constexpr int shift = 8 * (J % 4) + 4 * (J / 4);
    return _mm512_permutexvar_ps(shift ? _mm512_srli_epi32(octet, shift) : octet, lut);
  }
  static ZP_INLINE i32 load_u8(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static ZP_INLINE i32 low_codes(i32 octet) {
    return _mm512_and_si512(octet, _mm512_set1_epi8(15));
  }
  static ZP_INLINE i32 high_codes(i32 octet) { return low_codes(_mm512_srli_epi16(octet, 4)); }
  static ZP_INLINE i32 twice(i32 v) { return _mm512_or_si512(v, _mm512_slli_epi32(v, 16)); }
  static ZP_INLINE i32 dot_codes(i32 acc, i32 codes, i32 a) {
    return _mm512_dpbusd_epi32(acc, codes, a);
  }
  static ZP_INLINE i32 dot_bytes(i32 acc, i32 codes, i32 a) { return dot_codes(acc, codes, a); }
  static ZP_INLINE i32 sub_bytes(i32 a, i32 b) { return _mm512_sub_epi8(a, b); }
  static ZP_INLINE i32 flip_bytes(i32 v) {
    return _mm512_xor_si512(v, _mm512_set1_epi8(int8_t(0x80)));
  }

  // Byte J of each four, sign-extended, less the zero point.
  template <int J>
  static ZP_INLINE i32 byte(i32 quad, i32 zero) {
    if constexpr (J < 3) quad = _mm512_slli_epi32(quad, 24 - 8 * J);
    return sub_i32(_mm512_srai_epi32(quad, 24), zero);
  }

  static ZP_INLINE i32 shift_byte(i32 quad) { return _mm512_srli_epi32(quad, 8); }

  template <Type T, bool Static>
  static ZP_INLINE void quantize(const void* x, int64_t i, float inverse, int32_t zero_point,
                                 uint8_t* q) {
    i32 v[4];
    for (int j = 0; j < 4; j++) {
      const f32 real = load<T>(x, i + 16 * j);
      // Conversion gives INT_MIN beyond the range of int32, which saturates rightly only below.
      v[j] = to_i32(Static ? min(fma(real, set1(inverse), set1(float(zero_point))), set1(255.0f))
                           : mul(real, set1(inverse)));
    }
    // Saturate to int16, add the zero point, saturate to uint8: the clamping to 0 and 255.
    const i32 zero = _mm512_set1_epi16(int16_t(Static ? 0 : zero_point));
    const i32 first = _mm512_add_epi16(_mm512_packs_epi32(v[0], v[1]), zero);
    const i32 second = _mm512_add_epi16(_mm512_packs_epi32(v[2], v[3]), zero);
    // Packing works within 128-bit lanes; the permutation puts the groups of four back in order.
    const i32 words = _mm512_packus_epi16(first, second);
    const i32 order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(q, _mm512_permutexvar_epi32(order, words));
  }
};
