// Vector operations of NEON, which every 64-bit ARM has, for the kernels. Shared by
// linear_neon.cpp, linear_neondot.cpp and linear_neoni8mm.cpp, each inside its anonymous namespace;
// each adds its own products of bytes.

struct NeonBase {
  using f32 = float32x4_t;
  using i32 = int32x4_t;
  static constexpr int lanes = 4, quantize_width = 16, a_bytes = 1;
  static constexpr int float_rows = 6, float_vecs = 4;
  static constexpr int group_rows = 3, coded_rows = 6;
  static constexpr int group_vecs(int) { return 4; }
  static constexpr bool keep_sums = true, unsigned_rows = false;
  static constexpr void (*widen)(const uint8_t*, int64_t, uint8_t*) = nullptr;

  static ZP_INLINE f32 zero_f32() { return vdupq_n_f32(0.0f); }
  static ZP_INLINE i32 zero_i32() { return vdupq_n_s32(0); }
  static ZP_INLINE f32 set1(float v) { return vdupq_n_f32(v); }
  static ZP_INLINE i32 set1_i32(int32_t v) { return vdupq_n_s32(v); }
  static ZP_INLINE f32 add(f32 a, f32 b) { return vaddq_f32(a, b); }
  static ZP_INLINE f32 sub(f32 a, f32 b) { return vsubq_f32(a, b); }
  static ZP_INLINE f32 mul(f32 a, f32 b) { return vmulq_f32(a, b); }
  static ZP_INLINE f32 div(f32 a, f32 b) { return vdivq_f32(a, b); }
  static ZP_INLINE f32 fma(f32 a, f32 b, f32 c) { return vfmaq_f32(c, a, b); }
  // The second operand where either is NaN or both are zeros, as on x86. FMIN and FMAX do
  // otherwise.
  static ZP_INLINE f32 min(f32 a, f32 b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
  static ZP_INLINE f32 max(f32 a, f32 b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
  static ZP_INLINE f32 or_nan(f32 a, f32 v) { return vbslq_f32(vceqq_f32(v, v), a, v); }
  static ZP_INLINE float least(f32 v) { return vminvq_f32(v); }
  static ZP_INLINE float greatest(f32 v) { return vmaxvq_f32(v); }
  static ZP_INLINE bool any_nan(f32 v) { return vminvq_u32(vceqq_f32(v, v)) == 0; }
  static ZP_INLINE f32 select_negative(f32 x, f32 a, f32 b) {  // x < 0 ? a : b
    return vbslq_f32(vcltzq_f32(x), a, b);
  }
  static ZP_INLINE f32 power_of_two(i32 n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
  }
  static ZP_INLINE i32 add_i32(i32 a, i32 b) { return vaddq_s32(a, b); }
  static ZP_INLINE i32 sub_i32(i32 a, i32 b) { return vsubq_s32(a, b); }
  static ZP_INLINE i32 mul_i32(i32 a, i32 b) { return vmulq_s32(a, b); }
  static ZP_INLINE f32 to_f32(i32 v) { return vcvtq_f32_s32(v); }
  static ZP_INLINE i32 to_i32(f32 v) { return vcvtnq_s32_f32(v); }
  // Lane l of the result is lane l ^ Distance.
  template <int Distance>
  static ZP_INLINE f32 swap(f32 v) {
    return Distance == 1 ? vrev64q_f32(v) : vextq_f32(v, v, 2);
  }
  static ZP_INLINE i32 load_i32(const void* p) {
    return vreinterpretq_s32_u8(vld1q_u8(static_cast<const uint8_t*>(p)));
  }
  static ZP_INLINE void store_i32(int32_t* p, i32 v) { vst1q_s32(p, v); }
  static ZP_INLINE uint16x4_t low_words(uint32x4_t v) { return vmovn_u32(v); }
  static ZP_INLINE void store_bytes(uint8_t* p, i32 v) {
    const uint16x4_t words = low_words(vreinterpretq_u32_s32(v));
    const uint8x8_t bytes = vmovn_u16(vcombine_u16(words, words));
    const uint32_t four = vget_lane_u32(vreinterpret_u32_u8(bytes), 0);
    __builtin_memcpy(p, &four, 4);
  }
  static ZP_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }
  static ZP_INLINE void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }

  template <Type T>
  static ZP_INLINE f32 load(const void* x, int64_t i) {
    if constexpr (T == F32) return vld1q_f32(static_cast<const float*>(x) + i);
    const uint16x4_t h = vld1_u16(static_cast<const uint16_t*>(x) + i);
    if constexpr (T == BF16) return vreinterpretq_f32_u32(vshll_n_u16(h, 16));
    return vcvt_f32_f16(vreinterpret_f16_u16(h));
  }

  template <Type Y>
  static ZP_INLINE void store(void* y, int64_t i, f32 v) {
    if constexpr (Y == F32) {
      vst1q_f32(static_cast<float*>(y) + i, v);
    } else if constexpr (Y == BF16) {
      const uint32x4_t bits = vreinterpretq_u32_f32(v);
      const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
      const uint32x4_t top = vshrq_n_u32(vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd), 16);
      const uint32x4_t kept = vbslq_u32(vceqq_f32(v, v), top, vdupq_n_u32(0x7fc0));
      vst1_u16(static_cast<uint16_t*>(y) + i, low_words(kept));
    } else {
      vst1_u16(static_cast<uint16_t*>(y) + i, vreinterpret_u16_f16(vcvt_f16_f32(v)));
    }
  }

  // acc + the two products of 16-bit halves.
  static ZP_INLINE i32 add_pairs(i32 acc, i32 a, i32 b) {
    const int16x8_t x = vreinterpretq_s16_s32(a), y = vreinterpretq_s16_s32(b);
    const i32 low = vmull_s16(vget_low_s16(x), vget_low_s16(y)), high = vmull_high_s16(x, y);
    return vaddq_s32(acc, vpaddq_s32(low, high));
  }

  // Codes of four bits, eight a lane; see kernel_groups_tile.h.
  using lut_t = i32;
  static ZP_INLINE lut_t make_lut(int32_t zero) { return vdupq_n_s32(zero); }
  template <int J>
  static ZP_INLINE f32 nibble(i32 octet, lut_t zero) {
    constexpr int shift = 8 * (J % 4) + 4 * (J / 4);
    uint32x4_t code = vreinterpretq_u32_s32(octet);
    if constexpr (shift > 0) code = vshrq_n_u32(code, shift);
    code = vandq_u32(code, vdupq_n_u32(15));
    return to_f32(vsubq_s32(vreinterpretq_s32_u32(code), zero));
  }
  static ZP_INLINE i32 load_u8(const uint8_t* p) {
    uint32_t four;
    __builtin_memcpy(&four, p, 4);
    const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(four));
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes))));
  }
  static ZP_INLINE i32 low_codes(i32 octet) {
    return vreinterpretq_s32_u8(vandq_u8(vreinterpretq_u8_s32(octet), vdupq_n_u8(15)));
  }
  static ZP_INLINE i32 high_codes(i32 octet) {
    return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(octet), 4));
  }
  static ZP_INLINE i32 twice(i32 v) { return vsliq_n_s32(v, v, 16); }
  static ZP_INLINE i32 sub_bytes(i32 a, i32 b) {
    return vreinterpretq_s32_u8(vsubq_u8(vreinterpretq_u8_s32(a), vreinterpretq_u8_s32(b)));
  }
  static ZP_INLINE i32 flip_bytes(i32 v) {
    return vreinterpretq_s32_u8(veorq_u8(vreinterpretq_u8_s32(v), vdupq_n_u8(0x80)));
  }

  // Byte J of each four, sign-extended, less the zero point.
  template <int J>
  static ZP_INLINE i32 byte(i32 quad, i32 zero) {
    if constexpr (J < 3) quad = vshlq_n_s32(quad, 24 - 8 * J);
    return vsubq_s32(vshrq_n_s32(quad, 24), zero);
  }

  static ZP_INLINE i32 shift_byte(i32 quad) {
    return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(quad), 8));
  }

  template <Type T, bool Static>
  static ZP_INLINE void quantize(const void* x, int64_t i, float inverse, int32_t zero_point,
                                 uint8_t* q) {
    // Conversion and narrowing saturate, the last to uint8: the clamping to 0 and 255.
    const int16x8_t zero = vdupq_n_s16(int16_t(Static ? 0 : zero_point));
    int16x4_t words[4];
    for (int j = 0; j < 4; j++) {
      const f32 real = load<T>(x, i + 4 * j);
      words[j] = vqmovn_s32(to_i32(Static ? fma(real, set1(inverse), set1(float(zero_point)))
                                          : mul(real, set1(inverse))));
    }
    const int16x8_t first = vaddq_s16(vcombine_s16(words[0], words[1]), zero);
    const int16x8_t second = vaddq_s16(vcombine_s16(words[2], words[3]), zero);
    vst1q_u8(q, vcombine_u8(vqmovun_s16(first), vqmovun_s16(second)));
  }

  // Four unsigned bytes lowered by 128, as int8, in every lane.
  static ZP_INLINE int8x16_t lowered(uint8x16_t a) {
    return vreinterpretq_s8_u8(veorq_u8(a, vdupq_n_u8(0x80)));
  }
  static ZP_INLINE uint8x16_t four_bytes(const uint8_t* a) {
    uint32_t quad;
    __builtin_memcpy(&quad, a, 4);
    return vreinterpretq_u8_u32(vdupq_n_u32(quad));
  }
};

// R rows x int_vecs vectors of outputs, for the instruction that multiplies four bytes of weights
// in every lane with four bytes of one lane of the activations: a load of 16 activations serves
// four steps of k, which for one row or two go to two sets of accumulators.
template <class V, int R, Type Y>
ZP_INLINE void lane_tile(const Int8Block& b, const int8_t* w, int64_t m, int64_t n) {
  constexpr int N = V::int_vecs, U = R * N <= 8 ? 2 : 1;
  int32x4_t acc[U][R][N];
  ZP_EACH(u, U)
    ZP_EACH(r, R)
      ZP_EACH(v, N) acc[u][r][v] = vdupq_n_s32(0);
  const uint8_t* a = b.a + m * b.a_stride + b.k_begin;
  const int64_t stride = b.a_stride, k = b.k_end - b.k_begin;
  for (int64_t i = 0; i < k; i += 16) {
    typename V::lane_t av[R];
    ZP_EACH(r, R) av[r] = V::load_lanes(a + r * stride + i);
    V::prefetch(w + 2048);
    ZP_EACH(s, 4) {
      ZP_EACH(v, N) {
        const int8x16_t wv = vld1q_s8(w + v * 16);
        ZP_EACH(r, R) acc[s % U][r][v] = V::dot_lane(acc[s % U][r][v], wv, av[r], s);
      }
      w += 4 * kPanel;
    }
  }
  ZP_EACH(r, R) {
    int32x4_t out[N];
    ZP_EACH(v, N) {
      out[v] = acc[0][r][v];
      if constexpr (U == 2) out[v] = vaddq_s32(out[v], acc[1][r][v]);
    }
    finish_row<V, Y, N>(b, m + r, n, out);
  }
}
