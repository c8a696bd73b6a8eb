// Floats of a row to unsigned 8-bit integers. Needs kernel_common.h.

// Static: q = clamp(round(fma(x, inverse, zero_point)), 0, 255), for any x that is not NaN.
// Dynamic: q = clamp(round(x * inverse) + zero_point, 0, 255), where x * inverse is known to be
// within [-256, 256], since the scale is that of the row.
template <class V, Type T, bool Static>
ZP_INLINE void quantize_with(const QuantizeRow& r, float inverse, int32_t zero_point) {
  const float zero = float(zero_point);
  int64_t i = 0;
  for (; i + V::quantize_width <= r.k; i += V::quantize_width)
    V::template quantize<T, Static>(r.x, i, inverse, zero_point, r.q + i);
  for (; i + V::lanes <= r.k; i += V::lanes) {
    auto v = V::template load<T>(r.x, i);
    v = Static ? V::fma(v, V::set1(inverse), V::set1(zero)) : V::mul(v, V::set1(inverse));
    const auto low = V::set1(Static ? 0.0f : -zero),
               high = V::set1(Static ? 255.0f : 255.0f - zero);
    const auto q = V::to_i32(V::min(V::max(v, low), high));
    V::store_bytes(r.q + i, Static ? q : V::add_i32(q, V::set1_i32(zero_point)));
  }
  for (; i < r.k; i++) {
    float v = scalar_load<T>(r.x, i);
    v = Static ? __builtin_fmaf(v, inverse, zero) : v * inverse;
    const float low = Static ? 0.0f : -zero, high = Static ? 255.0f : 255.0f - zero;
    v = v > low ? v : low;
    v = v < high ? v : high;
    r.q[i] = uint8_t(round_small(v) + (Static ? 0 : zero_point));
  }
  for (int64_t end = round_up(r.k, kStep); i < end; i++) r.q[i] = 0;
}

ZP_INLINE void void_row(const QuantizeRow& r, Row* row) {
  for (int64_t i = 0, end = round_up(r.k, kStep); i < end; i++) r.q[i] = 0;
  *row = {__builtin_nanf(""), 0, 0};
}

template <class V, Type T>
void quantize_dynamic(const QuantizeRow& r, Row* row) {
  using f32 = typename V::f32;
  float lo = 0.0f, hi = 0.0f, bad = 0.0f;  // bad: NaN once an element is NaN or +-Inf
  int64_t i = 0;
  if (r.k >= V::lanes) {
    f32 vlo[2], vhi[2], vbad[2];
    for (int u = 0; u < 2; u++) vlo[u] = vhi[u] = vbad[u] = V::zero_f32();
    for (; i + 2 * V::lanes <= r.k; i += 2 * V::lanes)
      for (int u = 0; u < 2; u++) {
        f32 v = V::template load<T>(r.x, i + u * V::lanes);
        vlo[u] = V::min(vlo[u], v);
        vhi[u] = V::max(vhi[u], v);
        vbad[u] = V::fma(v, V::zero_f32(), vbad[u]);
      }
    lo = V::least(V::min(vlo[0], vlo[1]));
    hi = V::greatest(V::max(vhi[0], vhi[1]));
    if (V::any_nan(V::add(vbad[0], vbad[1]))) return void_row(r, row);
  }
  for (; i < r.k; i++) {
    float v = scalar_load<T>(r.x, i);
    lo = v < lo ? v : lo;
    hi = v > hi ? v : hi;
    bad += v * 0.0f;
  }
  if (!is_finite(bad)) return void_row(r, row);
  float scale = hi / 255.0f - lo / 255.0f;
  if (!(scale > 1.17549435e-38f)) scale = 1.17549435e-38f;
  const float inverse = 1.0f / scale;
  const int32_t zero = round_small(-lo * inverse);
  *row = {scale, zero < 255 ? zero : 255, 0};
  quantize_with<V, T, false>(r, inverse, row->zero_point);
}

template <class V, Type T>
void quantize_static(const QuantizeRow& r, Row* row) {
  using f32 = typename V::f32;
  f32 vbad = V::zero_f32();
  int64_t i = 0;
  for (; i + V::lanes <= r.k; i += V::lanes) vbad = V::or_nan(vbad, V::template load<T>(r.x, i));
  bool nan = V::any_nan(vbad);
  for (; i < r.k; i++) {
    float v = scalar_load<T>(r.x, i);
    nan |= v != v;
  }
  if (nan) return void_row(r, row);
  *row = {r.scale, r.zero_point, 0};
  quantize_with<V, T, true>(r, 1.0f / r.scale, r.zero_point);
}
