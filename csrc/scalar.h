// Single floats of each type in and out. Included inside anonymous namespaces, like kernel.h, so
// that code compiled for one instruction set never serves another.

#define ZP_INLINE inline __attribute__((always_inline))
// For micro-kernels: inlined, they would share the registers with their caller.
#define ZP_NOINLINE __attribute__((noinline))
#if defined(__clang__)
#define ZP_UNROLL _Pragma("clang loop unroll(full)")
#else
#define ZP_UNROLL _Pragma("GCC unroll 64")
#endif
#define ZP_EACH(i, count) ZP_UNROLL for (int i = 0; i < (count); i++)

ZP_INLINE float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
ZP_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}
ZP_INLINE bool is_finite(float value) {
  return (float_to_bits(value) & 0x7f800000u) != 0x7f800000u;
}

// To the nearest integer, ties to even, for |value| <= 2^22: beyond 2^23 a float has no fraction.
ZP_INLINE int32_t round_small(float value) {
  constexpr float shift = 12582912.0f;  // 1.5 * 2^23
  return int32_t((value + shift) - shift);
}

template <Type T>
ZP_INLINE float scalar_load(const void* x, int64_t i) {
  if constexpr (T == F32) return static_cast<const float*>(x)[i];
  uint16_t h = static_cast<const uint16_t*>(x)[i];
  if constexpr (T == BF16) return bits_to_float(uint32_t(h) << 16);
  // float16 to float32 is exact: rescale the shifted bits; infinities and NaN keep their exponent.
  uint32_t sign = uint32_t(h & 0x8000u) << 16, rest = uint32_t(h & 0x7fffu) << 13;
  if (rest >= 0x0f800000u) return bits_to_float(sign | rest | 0x70000000u);
  float magnitude = bits_to_float(rest) * bits_to_float(0x77800000u);  // 2^112
  return bits_to_float(sign | float_to_bits(magnitude));
}

ZP_INLINE uint16_t to_bf16(float value) {
  uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

ZP_INLINE uint16_t to_f16(float value) {
  uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000u,
           magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to infinity
  if (magnitude <
      0x38800000u) {  // denormal: adding 0.5 leaves the rounded mantissa in the low bits
    float shifted = bits_to_float(magnitude) + 0.5f;
    return uint16_t(sign | (float_to_bits(shifted) - 0x3f000000u));
  }
  return uint16_t(sign | ((magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13));
}

template <Type Y>
ZP_INLINE void scalar_store(void* y, int64_t i, float value) {
  if constexpr (Y == F32) static_cast<float*>(y)[i] = value;
  if constexpr (Y == BF16) static_cast<uint16_t*>(y)[i] = to_bf16(value);
  if constexpr (Y == F16) static_cast<uint16_t*>(y)[i] = to_f16(value);
}
