// The kernels are written once, over a trait V of vector operations (avx512.h, avx2.h, ...). They
// are included by each linear_<isa>.cpp inside its anonymous namespace, so that every instruction
// set gets instances of its own and the linker cannot mix them up. Plain structs only: a std
// template compiled here with wide instructions could be the copy the linker keeps for everyone.
//
// V provides: f32, i32, a_t, w_t, lanes; int_rows x int_vecs and float_rows x float_vecs, the
// register tiles; int_chains, the accumulators below which k is unrolled; a_bytes, the size of a
// staged activation; a_offset, what the products lower activations by; own_tile, whether V has a
// `tile` of its own instead of int8_tile; quantize_width; and the operations used below.
//
// This file: what kernel_quantize.h, kernel_int8.h and kernel_float.h share. Needs scalar.h.

// The first `count` lanes to y[i...].
template <class V, Type Y>
ZP_INLINE void store_floats(void* y, int64_t i, int64_t count, typename V::f32 value) {
  if (count >= V::lanes) {
    V::template store<Y>(y, i, value);
  } else {
    float lane[V::lanes];
    V::template store<F32>(lane, 0, value);
    for (int l = 0; l < count; l++) scalar_store<Y>(y, i + l, lane[l]);
  }
}

// The same to the type that is asked for at run time.
template <class V>
ZP_INLINE void store_as(Type type, void* y, int64_t i, int64_t count, typename V::f32 value) {
  switch (type) {
    case BF16: return store_floats<V, BF16>(y, i, count, value);
    case F16: return store_floats<V, F16>(y, i, count, value);
    default: return store_floats<V, F32>(y, i, count, value);
  }
}

template <class V>
ZP_INLINE typename V::f32 load_as(Type type, const void* x, int64_t i, int64_t count) {
  if (count >= V::lanes) {
    switch (type) {
      case BF16: return V::template load<BF16>(x, i);
      case F16: return V::template load<F16>(x, i);
      default: return V::template load<F32>(x, i);
    }
  }
  float lane[V::lanes] = {};
  for (int l = 0; l < count; l++)
    lane[l] = type == BF16  ? scalar_load<BF16>(x, i + l)
              : type == F16 ? scalar_load<F16>(x, i + l)
                            : scalar_load<F32>(x, i + l);
  return V::template load<F32>(lane, 0);
}

// exp(x), x clamped to [-87, 87]: 2^n times a polynomial of the rest (Cephes, expf), each
// operation rounded once. zeropoint/reference.py has the same steps.
template <class V>
ZP_INLINE typename V::f32 exponential(typename V::f32 x) {
  x = V::min(V::max(x, V::set1(-87.0f)), V::set1(87.0f));
  const auto n = V::to_i32(V::mul(x, V::set1(1.44269504f)));
  const auto whole = V::to_f32(n);
  auto r = V::sub(x, V::mul(whole, V::set1(0.693359375f)));
  r = V::sub(r, V::mul(whole, V::set1(-2.12194440e-4f)));
  auto p = V::set1(1.9875691500e-4f);
  p = V::add(V::mul(p, r), V::set1(1.3981999507e-3f));
  p = V::add(V::mul(p, r), V::set1(8.3334519073e-3f));
  p = V::add(V::mul(p, r), V::set1(4.1665795894e-2f));
  p = V::add(V::mul(p, r), V::set1(1.6666665459e-1f));
  p = V::add(V::mul(p, r), V::set1(5.0000001201e-1f));
  p = V::add(V::add(V::mul(p, V::mul(r, r)), r), V::set1(1.0f));
  return V::mul(p, V::power_of_two(n));
}

template <class V>
ZP_INLINE typename V::f32 activate(Activation activation, typename V::f32 x) {
  const auto one = V::set1(1.0f);
  switch (activation) {
    case None: return x;
    case ReLU: return V::max(V::zero_f32(), x);  // the second operand where x is NaN
    case SiLU: {
      const auto negative = V::sub(V::zero_f32(), x);
      // The numerator stops where the exponential does. max gives its second operand for a NaN.
      return V::div(V::max(V::set1(-87.0f), x), V::add(one, exponential<V>(negative)));
    }
    case GELU: {
      // x times the normal distribution function, whose tail is 1/2 erfc(|x|/sqrt 2) by Abramowitz
      // and Stegun 7.1.26 (absolute error below 1.5e-7).
      const auto z = V::mul(V::max(x, V::sub(V::zero_f32(), x)), V::set1(0.707106781f));
      const auto t = V::div(one, V::add(one, V::mul(V::set1(0.3275911f), z)));
      auto p = V::set1(1.061405429f);
      p = V::add(V::mul(p, t), V::set1(-1.453152027f));
      p = V::add(V::mul(p, t), V::set1(1.421413741f));
      p = V::add(V::mul(p, t), V::set1(-0.284496736f));
      p = V::add(V::mul(p, t), V::set1(0.254829592f));
      const auto gauss = exponential<V>(V::sub(V::zero_f32(), V::mul(z, z)));
      const auto tail = V::mul(V::set1(0.5f), V::mul(V::mul(p, t), gauss));
      // The tail is nothing beyond 64, where infinity times nothing must not become NaN.
      const auto part = V::mul(V::min(V::max(x, V::set1(-64.0f)), V::set1(64.0f)), tail);
      return V::select_negative(x, part, V::sub(x, part));
    }
  }
  return x;
}

// activation(value) + residual, for `count` outputs of row m from output n on.
template <class V>
ZP_INLINE typename V::f32 after(const Post& post, Type type, int64_t m, int64_t n, int64_t count,
                                typename V::f32 value) {
  value = activate<V>(post.activation, value);
  if (post.residual)
    value = V::add(value, load_as<V>(type, post.residual, m * post.residual_stride + n, count));
  return value;
}
