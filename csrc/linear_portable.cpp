// Portable C++: vectors of four as plain loops, which compilers turn into what the target has.
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

struct Portable {
  static constexpr int lanes = 4, quantize_width = 4;
  static constexpr int int_rows = 4, int_vecs = 2, int_chains = 0;
  static constexpr int float_rows = 4, float_vecs = 2, a_bytes = 1;
  static constexpr int group_rows = 4, coded_rows = 8;
  static constexpr int group_vecs(int) { return 2; }
  static constexpr bool keep_sums = false, unsigned_rows = false;
  static constexpr int byte_offset = 0;
  static constexpr int a_offset = 0;
  static constexpr bool own_tile = false;
  static constexpr void (*widen)(const uint8_t*, int64_t, uint8_t*) = nullptr;
  struct f32 {
    float v[lanes];
  };
  struct i32 {
    int32_t v[lanes];
  };
  // GNU vector extensions, which GCC and Clang turn into the target's own instructions. A product
  // of an unsigned and a signed byte fits int16: |255 * -128| = 32640.
  typedef int16_t words __attribute__((vector_size(16)));
  typedef int32_t pairs __attribute__((vector_size(16)));
  using a_t = words;
  struct w_t {
    words low, high;
  };

  template <class Out, class F>
  static ZP_INLINE Out each(F f) {
    Out out;
    for (int l = 0; l < lanes; l++) out.v[l] = f(l);
    return out;
  }
  static ZP_INLINE f32 zero_f32() { return set1(0.0f); }
  static ZP_INLINE i32 zero_i32() { return set1_i32(0); }
  static ZP_INLINE f32 set1(float v) {
    return each<f32>([&](int) { return v; });
  }
  static ZP_INLINE i32 set1_i32(int32_t v) {
    return each<i32>([&](int) { return v; });
  }
  static ZP_INLINE f32 add(f32 a, f32 b) {
    return each<f32>([&](int l) { return a.v[l] + b.v[l]; });
  }
  static ZP_INLINE f32 sub(f32 a, f32 b) {
    return each<f32>([&](int l) { return a.v[l] - b.v[l]; });
  }
  static ZP_INLINE f32 div(f32 a, f32 b) {
    return each<f32>([&](int l) { return a.v[l] / b.v[l]; });
  }
  static ZP_INLINE float least(f32 a) {
    float out = a.v[0];
    for (int l = 1; l < lanes; l++) out = a.v[l] < out ? a.v[l] : out;
    return out;
  }
  static ZP_INLINE float greatest(f32 a) {
    float out = a.v[0];
    for (int l = 1; l < lanes; l++) out = a.v[l] > out ? a.v[l] : out;
    return out;
  }
  static ZP_INLINE bool any_nan(f32 a) {
    bool out = false;
    for (int l = 0; l < lanes; l++) out |= a.v[l] != a.v[l];
    return out;
  }
  static ZP_INLINE f32 select_negative(f32 x, f32 a, f32 b) {
    return each<f32>([&](int l) { return x.v[l] < 0.0f ? a.v[l] : b.v[l]; });
  }
  static ZP_INLINE f32 power_of_two(i32 n) {
    return each<f32>([&](int l) { return bits_to_float(uint32_t(n.v[l] + 127) << 23); });
  }
  static ZP_INLINE f32 mul(f32 a, f32 b) {
    return each<f32>([&](int l) { return a.v[l] * b.v[l]; });
  }
  static ZP_INLINE f32 fma(f32 a, f32 b, f32 c) {
    return each<f32>([&](int l) { return __builtin_fmaf(a.v[l], b.v[l], c.v[l]); });
  }
  static ZP_INLINE f32 min(f32 a, f32 b) {
    return each<f32>([&](int l) { return a.v[l] < b.v[l] ? a.v[l] : b.v[l]; });
  }
  static ZP_INLINE f32 max(f32 a, f32 b) {
    return each<f32>([&](int l) { return a.v[l] > b.v[l] ? a.v[l] : b.v[l]; });
  }
  static ZP_INLINE f32 or_nan(f32 a, f32 v) {
    return each<f32>([&](int l) { return v.v[l] != v.v[l] ? v.v[l] : a.v[l]; });
  }
  // Wrapping arithmetic: unsigned, since signed overflow is undefined.
  static ZP_INLINE i32 add_i32(i32 a, i32 b) {
    return each<i32>([&](int l) { return int32_t(uint32_t(a.v[l]) + uint32_t(b.v[l])); });
  }
  static ZP_INLINE i32 sub_i32(i32 a, i32 b) {
    return each<i32>([&](int l) { return int32_t(uint32_t(a.v[l]) - uint32_t(b.v[l])); });
  }
  static ZP_INLINE i32 mul_i32(i32 a, i32 b) {
    return each<i32>([&](int l) { return int32_t(uint32_t(a.v[l]) * uint32_t(b.v[l])); });
  }
  static ZP_INLINE f32 to_f32(i32 a) {
    return each<f32>([&](int l) { return float(a.v[l]); });
  }
  static ZP_INLINE i32 to_i32(f32 a) {
    return each<i32>([&](int l) { return round_small(a.v[l]); });
  }
  // Lane l of the result is lane l ^ Distance.
  template <int Distance>
  static ZP_INLINE f32 swap(f32 v) {
    return each<f32>([&](int l) { return v.v[l ^ Distance]; });
  }
  static ZP_INLINE i32 load_i32(const void* p) {
    i32 out;
    __builtin_memcpy(&out, p, sizeof out);
    return out;
  }
  static ZP_INLINE void store_i32(int32_t* p, i32 a) {
    for (int l = 0; l < lanes; l++) p[l] = a.v[l];
  }
  static ZP_INLINE void store_bytes(uint8_t* p, i32 a) {
    for (int l = 0; l < lanes; l++) p[l] = uint8_t(a.v[l]);
  }
  static ZP_INLINE void prefetch(const void*) {}
  static ZP_INLINE void prefetch_far(const void*) {}

  template <Type T>
  static ZP_INLINE f32 load(const void* x, int64_t i) {
    return each<f32>([&](int l) { return scalar_load<T>(x, i + l); });
  }
  template <Type Y>
  static ZP_INLINE void store(void* y, int64_t i, f32 a) {
    for (int l = 0; l < lanes; l++) scalar_store<Y>(y, i + l, a.v[l]);
  }

  static ZP_INLINE a_t load_a(const uint8_t* a) {
    return words{a[0], a[1], a[2], a[3], a[0], a[1], a[2], a[3]};
  }
  static ZP_INLINE w_t load_w(const int8_t* w) {
    typedef int8_t bytes __attribute__((vector_size(8)));
    bytes low, high;
    __builtin_memcpy(&low, w, 8);
    __builtin_memcpy(&high, w + 8, 8);
    return {__builtin_convertvector(low, words), __builtin_convertvector(high, words)};
  }
  static ZP_INLINE i32 add_pairs(i32 acc, i32 a, i32 b) {
    return each<i32>([&](int l) {
      const int32_t low = int16_t(a.v[l]) * int16_t(b.v[l]), high = (a.v[l] >> 16) * (b.v[l] >> 16);
      return int32_t(uint32_t(acc.v[l]) + uint32_t(low) + uint32_t(high));
    });
  }
  static ZP_INLINE pairs add_halves(words products) {
    const pairs p = reinterpret_cast<pairs>(products);
    return ((p << 16) >> 16) + (p >> 16);
  }
  static ZP_INLINE i32 dot(i32 acc, a_t a, w_t w) {
    const pairs low = add_halves(a * w.low), high = add_halves(a * w.high);
    const pairs sum = __builtin_shufflevector(low, high, 0, 2, 4, 6) +
                      __builtin_shufflevector(low, high, 1, 3, 5, 7);
    return each<i32>([&](int l) { return int32_t(uint32_t(acc.v[l]) + uint32_t(sum[l])); });
  }
  // Codes of four bits, eight a lane; see kernel_groups_tile.h.
  using lut_t = i32;
  static ZP_INLINE lut_t make_lut(int32_t zero) { return set1_i32(zero); }
  template <int J>
  static ZP_INLINE f32 nibble(i32 octet, lut_t zero) {
    constexpr int shift = 8 * (J % 4) + 4 * (J / 4);
    return each<f32>(
        [&](int l) { return float(int32_t(uint32_t(octet.v[l]) >> shift & 15) - zero.v[l]); });
  }
  static ZP_INLINE i32 load_u8(const uint8_t* p) {
    return each<i32>([&](int l) { return int32_t(p[l]); });
  }
  static ZP_INLINE i32 low_codes(i32 octet) {
    return each<i32>([&](int l) { return octet.v[l] & 0x0f0f0f0f; });
  }
  static ZP_INLINE i32 high_codes(i32 octet) {
    return each<i32>([&](int l) { return int32_t(uint32_t(octet.v[l]) >> 4 & 0x0f0f0f0f); });
  }
  static ZP_INLINE i32 twice(i32 v) {
    return each<i32>([&](int l) { return int32_t(uint32_t(v.v[l]) | uint32_t(v.v[l]) << 16); });
  }
  template <class Codes>
  static ZP_INLINE i32 dot_four(i32 acc, i32 codes, i32 a) {
    Codes w[16];
    int8_t x[16];
    __builtin_memcpy(w, &codes, 16);
    __builtin_memcpy(x, &a, 16);
    return each<i32>([&](int l) {
      int32_t sum = acc.v[l];
      for (int j = 4 * l; j < 4 * l + 4; j++) sum += w[j] * x[j];
      return sum;
    });
  }
  static ZP_INLINE i32 dot_codes(i32 acc, i32 codes, i32 a) {
    return dot_four<int8_t>(acc, codes, a);
  }
  static ZP_INLINE i32 dot_bytes(i32 acc, i32 codes, i32 a) {
    return dot_four<uint8_t>(acc, codes, a);
  }
  static ZP_INLINE i32 sub_bytes(i32 a, i32 b) {
    uint8_t x[16], y[16];
    __builtin_memcpy(x, &a, 16);
    __builtin_memcpy(y, &b, 16);
    for (int i = 0; i < 16; i++) x[i] = uint8_t(x[i] - y[i]);
    return load_i32(x);
  }
  static ZP_INLINE i32 flip_bytes(i32 v) {
    return each<i32>([&](int l) { return int32_t(uint32_t(v.v[l]) ^ 0x80808080u); });
  }

  template <int J>
  static ZP_INLINE i32 byte(i32 quad, i32 zero) {
    return each<i32>([&](int l) { return int8_t(uint32_t(quad.v[l]) >> (8 * J)) - zero.v[l]; });
  }
  static ZP_INLINE i32 shift_byte(i32 quad) {
    return each<i32>([&](int l) { return int32_t(uint32_t(quad.v[l]) >> 8); });
  }
  template <Type T, bool Static>
  static ZP_INLINE void quantize(const void* x, int64_t i, float inverse, int32_t zero_point,
                                 uint8_t* q) {
    const f32 real = load<T>(x, i), zero = set1(float(zero_point));
    const f32 v = Static ? fma(real, set1(inverse), zero) : mul(real, set1(inverse));
    const f32 low = Static ? set1(0.0f) : sub(set1(0.0f), zero);
    const f32 high = Static ? set1(255.0f) : sub(set1(255.0f), zero);
    store_bytes(q, add_i32(to_i32(min(max(v, low), high)), set1_i32(Static ? 0 : zero_point)));
  }
};

#include "isa_table.h"

bool always() { return true; }
}  // namespace

extern const Isa isa_portable = make_isa<Portable>("portable", always, 10.0f, 2.0f);
}  // namespace zp
