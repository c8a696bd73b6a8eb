// What a layer does to its input before the product: a factor, then a rotation. Needs
// kernel_common.h. The sums are those of zeropoint/input_transform.py: butterflies (a, b) ->
// (a + b, a - b) over the distances 1, 2, 4, ..., each result rounded once.

// One distance within a vector. A product with 1 or -1 is exact.
template <class V, int Distance>
ZP_INLINE typename V::f32 butterflies(typename V::f32 v) {
  float signs[V::lanes];
  for (int l = 0; l < V::lanes; l++) signs[l] = l & Distance ? -1.0f : 1.0f;
  return V::add(V::template swap<Distance>(v), V::mul(v, V::template load<F32>(signs, 0)));
}

// All distances below `size` that lie within a vector.
template <class V>
ZP_INLINE typename V::f32 butterflies_within(int64_t size, typename V::f32 v) {
  if (size > 1) v = butterflies<V, 1>(v);
  if (size > 2) v = butterflies<V, 2>(v);
  if constexpr (V::lanes > 4)
    if (size > 4) v = butterflies<V, 4>(v);
  if constexpr (V::lanes > 8)
    if (size > 8) v = butterflies<V, 8>(v);
  return v;
}

// `distance` and the double of it in one pass over t.
template <class V>
ZP_INLINE void two_distances(float* t, int64_t size, int64_t distance) {
  for (int64_t run = 0; run < size; run += 4 * distance)
    for (int64_t i = run; i < run + distance; i += V::lanes) {
      const auto a = V::template load<F32>(t, i), b = V::template load<F32>(t, i + distance),
                 c = V::template load<F32>(t, i + 2 * distance),
                 d = V::template load<F32>(t, i + 3 * distance);
      const auto ab = V::add(a, b), a_b = V::sub(a, b), cd = V::add(c, d), c_d = V::sub(c, d);
      V::template store<F32>(t, i, V::add(ab, cd));
      V::template store<F32>(t, i + distance, V::add(a_b, c_d));
      V::template store<F32>(t, i + 2 * distance, V::sub(ab, cd));
      V::template store<F32>(t, i + 3 * distance, V::sub(a_b, c_d));
    }
}

template <class V>
ZP_INLINE void one_distance(float* t, int64_t size, int64_t distance) {
  for (int64_t run = 0; run < size; run += 2 * distance)
    for (int64_t i = run; i < run + distance; i += V::lanes) {
      const auto a = V::template load<F32>(t, i), b = V::template load<F32>(t, i + distance);
      V::template store<F32>(t, i, V::add(a, b));
      V::template store<F32>(t, i + distance, V::sub(a, b));
    }
}

template <class V, Type T>
void transform_row(const TransformRow& r) {
  // Runs are whole vectors, or vectors are whole runs: both are powers of two.
  const int64_t span = r.size > V::lanes ? r.size : V::lanes;
  int64_t begin = 0;
  if (r.size == 1)
    for (; begin + V::lanes <= r.k; begin += V::lanes) {
      const auto x = V::template load<T>(r.x, begin);
      V::template store<T>(r.y, begin, V::mul(x, V::template load<F32>(r.factor, begin)));
    }
  for (; begin + span <= r.k; begin += span) {
    float* t = T == F32 ? static_cast<float*>(r.y) + begin : r.room;
    for (int64_t i = 0; i < span; i += V::lanes) {
      const auto x = V::template load<T>(r.x, begin + i);
      const auto v = V::mul(x, V::template load<F32>(r.factor, begin + i));
      V::template store<F32>(t, i, butterflies_within<V>(r.size, v));
    }
    int64_t distance = V::lanes;
    for (; 4 * distance <= r.size; distance *= 4) two_distances<V>(t, r.size, distance);
    if (2 * distance <= r.size) one_distance<V>(t, r.size, distance);
    if (T != F32)
      for (int64_t i = 0; i < span; i += V::lanes)
        V::template store<T>(r.y, begin + i, V::template load<F32>(t, i));
  }
  for (; begin < r.k; begin += r.size) {  // less than a vector is left
    float t[V::lanes];
    for (int64_t i = 0; i < r.size; i++)
      t[i] = scalar_load<T>(r.x, begin + i) * r.factor[begin + i];
    for (int64_t distance = 1; distance < r.size; distance *= 2)
      for (int64_t i = 0; i < r.size; i++)
        if (!(i & distance)) {
          const float a = t[i], b = t[i + distance];
          t[i] = a + b;
          t[i + distance] = a - b;
        }
    for (int64_t i = 0; i < r.size; i++) scalar_store<T>(r.y, begin + i, t[i]);
  }
}
