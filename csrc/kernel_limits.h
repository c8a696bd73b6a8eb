// What the hardware could do at best, for benchmarks to compare with: the instruction in which the
// kernels spend their time, on registers alone, and a loop that does nothing but read. Included by
// isa_table.h, over the same trait V as the kernels.

#if defined(__x86_64__)
#define ZP_IN_REGISTER "+v"
#elif defined(__aarch64__)
#define ZP_IN_REGISTER "+w"
#else
#define ZP_IN_REGISTER "+m"
#endif

// The compiler no longer knows the value, which stays where it is: products of it can neither be
// computed once for several uses nor moved out of a loop. A struct is a pair of vectors.
template <class T>
ZP_INLINE void forget(T& value) {
  if constexpr (__is_class(T)) {
    auto& [first, second] = value;
    forget(first);
    forget(second);
  } else {
    __asm__ volatile("" : ZP_IN_REGISTER(value));
  }
}

// Somebody may read what lies there, so that it has to be computed, or write there, so that nothing
// is known of it.
ZP_INLINE void keep(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

// Each of the following returns the work it did: multiply-adds, or bytes.
template <class V>
int64_t peak_int8(int64_t rounds) {
  constexpr int count = V::int_rows * V::int_vecs;
  uint8_t bytes[4 * V::lanes + 4 * V::a_bytes];
  for (unsigned i = 0; i < sizeof bytes; i++) bytes[i] = uint8_t(151 * i + 77);
  typename V::a_t a = V::load_a(bytes);
  const typename V::w_t w = V::load_w(reinterpret_cast<const int8_t*>(bytes));
  // Of unknown values: equal accumulators would be computed once for all.
  int32_t lane[count][V::lanes] = {};
  keep(lane);
  typename V::i32 acc[count];
  ZP_EACH(i, count) acc[i] = V::load_i32(lane[i]);
  for (int64_t r = 0; r < rounds; r++)
    ZP_EACH(i, count) {
      forget(a);
      acc[i] = V::dot(acc[i], a, w);
    }
  ZP_EACH(i, count) V::store_i32(lane[i], acc[i]);
  keep(lane);
  return rounds * count * V::lanes * 4;
}

template <class V>
int64_t peak_float32(int64_t rounds) {
  constexpr int count = V::float_rows * V::float_vecs;
  float one = 1.0009765625f, small = 0.0078125f;
  forget(one);
  forget(small);
  const auto a = V::set1(one), w = V::set1(small);
  float lane[count][V::lanes] = {};
  keep(lane);
  typename V::f32 acc[count];
  ZP_EACH(i, count) acc[i] = V::template load<F32>(lane[i], 0);
  for (int64_t r = 0; r < rounds; r++)
    ZP_EACH(i, count) acc[i] = V::fma(a, w, acc[i]);
  ZP_EACH(i, count) V::template store<F32>(lane[i], 0, acc[i]);
  keep(lane);
  return rounds * count * V::lanes;
}

template <class V, bool Prefetch>
int64_t read_memory(const void* data, int64_t bytes, int64_t rounds) {
  constexpr int count = 8;
  constexpr int64_t width = V::lanes * 4, step = count * width, ahead = 2048;
  typename V::i32 sum[count];
  ZP_EACH(i, count) sum[i] = V::zero_i32();
  bytes = bytes / step * step;
  for (int64_t r = 0; r < rounds; r++) {
    const char* p = static_cast<const char*>(data);
    __asm__ volatile("" : "+r"(p) : : "memory");  // each round reads anew
    for (const char* end = p + bytes; p < end; p += step) {
      if constexpr (Prefetch)
        for (int64_t line = 0; line < step; line += 64) V::prefetch(p + ahead + line);
      ZP_EACH(i, count) sum[i] = V::add_i32(sum[i], V::load_i32(p + i * width));
    }
  }
  int32_t lane[count][V::lanes];
  ZP_EACH(i, count) V::store_i32(lane[i], sum[i]);
  keep(lane);
  return rounds * bytes;
}
