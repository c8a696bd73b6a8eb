// The kernels, written once over a trait V of vector operations (avx512.h, avx2.h, ...). Included
// by each linear_<isa>.cpp inside its anonymous namespace, so that every instruction set gets
// instances of its own and the linker cannot mix them up. Plain structs only: a std template
// compiled here with wide instructions could be the copy the linker keeps for everyone.
//
// Include scalar.h first. V provides: f32, i32, a_t, w_t, lanes; int_rows x int_vecs and float_rows
// x float_vecs, the register tiles; int_chains, the accumulators below which k is unrolled;
// quantize_width; and the operations used below.

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

// ---- quantizing a row ---------------------------------------------------------------------------

// q = clamp(round(x * inverse), -zero, 255 - zero) + zero. Bounds come before the conversion to
// int; rounding is monotonic, so that the order does not change the result.
template <class V, Type T>
ZP_INLINE void quantize_with(const QuantizeRow& r, float inverse, int32_t zero_point) {
  const float low = float(-zero_point), high = float(255 - zero_point);
  int64_t i = 0;
  for (; i + V::quantize_width <= r.k; i += V::quantize_width)
    V::template quantize<T>(r.x, i, inverse, low, high, zero_point, r.q + i);
  for (; i + V::lanes <= r.k; i += V::lanes) {
    auto v = V::mul(V::template load<T>(r.x, i), V::set1(inverse));
    v = V::min(V::max(v, V::set1(low)), V::set1(high));
    V::store_bytes(r.q + i, V::add_i32(V::to_i32(v), V::set1_i32(zero_point)));
  }
  for (; i < r.k; i++) {
    float v = scalar_load<T>(r.x, i) * inverse;
    v = v > low ? v : low;
    v = v < high ? v : high;
    r.q[i] = uint8_t(round_small(v) + zero_point);
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
    float lane[3][V::lanes];
    V::template store<F32>(lane[0], 0, V::min(vlo[0], vlo[1]));
    V::template store<F32>(lane[1], 0, V::max(vhi[0], vhi[1]));
    V::template store<F32>(lane[2], 0, V::add(vbad[0], vbad[1]));
    for (int l = 0; l < V::lanes; l++) {
      lo = lane[0][l] < lo ? lane[0][l] : lo;
      hi = lane[1][l] > hi ? lane[1][l] : hi;
      bad += lane[2][l];
    }
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
  quantize_with<V, T>(r, inverse, row->zero_point);
}

template <class V, Type T>
void quantize_static(const QuantizeRow& r, Row* row) {
  using f32 = typename V::f32;
  f32 vbad = V::zero_f32();
  int64_t i = 0;
  for (; i + V::lanes <= r.k; i += V::lanes) vbad = V::or_nan(vbad, V::template load<T>(r.x, i));
  float lane[V::lanes];
  V::template store<F32>(lane, 0, vbad);
  bool nan = false;
  for (int l = 0; l < V::lanes; l++) nan |= lane[l] != lane[l];
  for (; i < r.k; i++) {
    float v = scalar_load<T>(r.x, i);
    nan |= v != v;
  }
  if (nan) return void_row(r, row);
  *row = {r.scale, r.zero_point, 0};
  quantize_with<V, T>(r, 1.0f / r.scale, r.zero_point);
}

// ---- int8 x int8 --------------------------------------------------------------------------------

// From accumulators to outputs: N vectors of one row from output `n` on. `acc` lies in memory, or
// in registers once this is inlined.
template <class V, Type Y, int N>
ZP_INLINE void finish_row(const Int8Block& b, int64_t m, int64_t n, const typename V::i32* acc) {
  const int64_t left = b.w->n - n, at = m * b.y_stride + n;
  if constexpr (Y == I32) {
    int32_t* y = static_cast<int32_t*>(b.y) + at;
    if (left >= N * V::lanes) {
      ZP_EACH(v, N) V::store_i32(y + v * V::lanes, acc[v]);
    } else {
      int32_t lane[N * V::lanes];
      ZP_EACH(v, N) V::store_i32(lane + v * V::lanes, acc[v]);
      for (int l = 0; l < left; l++) y[l] = lane[l];
    }
  } else {
    const Row& row = b.row[m];
    const auto scale = V::set1(row.scale);
    // -zero_point and -128 zero_point, the factors of the two halves of sum_w.
    const auto zero = V::set1_i32(
        int32_t(uint32_t(uint16_t(-row.zero_point)) | uint32_t(-128 * row.zero_point) << 16));
    typename V::f32 value[N];
    ZP_EACH(v, N) {
      const int64_t o = n + v * V::lanes;
      auto sum = V::add_pairs(acc[v], V::load_i32(b.w->sum + 2 * o), zero);
      if (b.w->zero_point)
        sum = V::sub_i32(sum,
                         V::mul_i32(V::load_i32(b.w->zero_point + o), V::set1_i32(row.centered)));
      value[v] = V::mul(V::to_f32(sum), V::mul(scale, V::template load<F32>(b.w->scale, o)));
      if (b.bias) value[v] = V::add(value[v], V::template load<F32>(b.bias, o));
    }
    if constexpr (Y == U8 || Y == S8) {
      constexpr int qmin = Y == U8 ? 0 : -128, qmax = qmin + 255;
      uint8_t* y = static_cast<uint8_t*>(b.y) + at;
      uint8_t lane[N * V::lanes];
      uint8_t* to = left >= N * V::lanes ? y : lane;
      ZP_EACH(v, N) {
        auto q = V::mul(value[v], V::set1(b.y_inverse_scale));
        // max(q, low) gives low for a NaN, by the order of its operands.
        q = V::max(q, V::set1(float(qmin - b.y_zero_point)));
        q = V::min(q, V::set1(float(qmax - b.y_zero_point)));
        V::store_bytes(to + v * V::lanes, V::add_i32(V::to_i32(q), V::set1_i32(b.y_zero_point)));
      }
      if (to == lane)
        for (int l = 0; l < left; l++) y[l] = lane[l];
    } else if (left >= N * V::lanes) {
      ZP_EACH(v, N) V::template store<Y>(b.y, at + v * V::lanes, value[v]);
    } else {
      ZP_EACH(v, N) {
        const int64_t count = left - v * V::lanes;
        if (count > 0) store_floats<V, Y>(b.y, at + v * V::lanes, count, value[v]);
      }
    }
  }
}

// R rows x int_vecs vectors of outputs, accumulators in registers. With few rows two steps of k go
// to accumulators of their own, which hides the latency of the dot product. Every loop over the
// accumulators is unrolled: a variable index would put them all in memory.
template <class V, int R, Type Y>
void int8_tile(const Int8Block& b, const int8_t* w, int64_t m, int64_t n) {
  using i32 = typename V::i32;
  constexpr int N = V::int_vecs, U = R * N < V::int_chains ? 2 : 1;
  constexpr int quad = 4 * kPanel;  // bytes of a panel for four k
  i32 acc[U][R][N];
  ZP_EACH(u, U)
    ZP_EACH(r, R)
      ZP_EACH(v, N) acc[u][r][v] = V::zero_i32();
  const uint8_t* a = b.a + m * b.a_stride + b.k_begin;
  const int64_t stride = b.a_stride, quads = ceil_div(b.k_end - b.k_begin, 4);
  int64_t q = 0;
  for (; q + U <= quads; q += U) {
    V::prefetch(w + 2048);
    ZP_EACH(u, U) {
      typename V::w_t wv[N];
      ZP_EACH(v, N) wv[v] = V::load_w(w + u * quad + v * 4 * V::lanes);
      ZP_EACH(r, R) {
        typename V::a_t av = V::load_a(a + r * stride + 4 * (q + u));
        ZP_EACH(v, N) acc[u][r][v] = V::dot(acc[u][r][v], av, wv[v]);
      }
    }
    w += U * quad;
  }
  if (U == 2 && q < quads) {
    ZP_EACH(r, R) {
      typename V::a_t av = V::load_a(a + r * stride + 4 * q);
      ZP_EACH(v, N) acc[0][r][v] = V::dot(acc[0][r][v], av, V::load_w(w + v * 4 * V::lanes));
    }
  }
  ZP_EACH(r, R) {
    i32 out[N];  // a copy, so that no address of an accumulator is taken and all stay in registers
    ZP_EACH(v, N) {
      out[v] = acc[0][r][v];
      if constexpr (U == 2) out[v] = V::add_i32(out[v], acc[U - 1][r][v]);
    }
    finish_row<V, Y, N>(b, m + r, n, out);
  }
}

template <class V, Type Y, int R = V::int_rows>
ZP_INLINE void int8_rows(int rows, const Int8Block& b, const int8_t* w, int64_t m, int64_t n) {
  if constexpr (R > 1) {
    if (rows < R) return int8_rows<V, Y, R - 1>(rows, b, w, m, n);
  }
  int8_tile<V, R, Y>(b, w, m, n);
}

template <class V, Type Y>
void int8_block_to(const Int8Block& b) {
  constexpr int width = V::int_vecs * V::lanes;
  const int64_t blocks = ceil_div(b.rows, V::int_rows);
  if (blocks == 0) return;
  const int64_t base = b.rows / blocks, longer = b.rows % blocks;  // balanced blocks of rows
  for (int64_t p = b.panel_begin; p < b.panel_end; p++)
    for (int s = 0; s < kPanel; s += width) {
      const int64_t n = p * kPanel + s;
      if (n >= b.w->n) break;
      const int8_t* w = b.w->panel(p) + b.k_begin * kPanel + 4 * s;
      for (int64_t i = 0, m = 0; i < blocks; i++) {
        const int rows = int(base + (i < longer));
        int8_rows<V, Y>(rows, b, w, m, n);
        m += rows;
      }
    }
}

template <class V>
void int8_block(const Int8Block& b) {
  switch (b.y_type) {
    case F32: return int8_block_to<V, F32>(b);
    case BF16: return int8_block_to<V, BF16>(b);
    case F16: return int8_block_to<V, F16>(b);
    case U8: return int8_block_to<V, U8>(b);
    case S8: return int8_block_to<V, S8>(b);
    case I32: return int8_block_to<V, I32>(b);
  }
}

// ---- float x int8 -------------------------------------------------------------------------------

// One chain of fused multiply-adds an output, k ascending; lanes run over outputs.

template <class V>
ZP_INLINE void finish_weight_only(const WeightOnlyBlock& b, int64_t m, int64_t n,
                                  typename V::f32 acc) {
  const int64_t left = b.w->n - n;
  if (left <= 0) return;
  const int64_t count = left < V::lanes ? left : V::lanes;
  auto value = V::mul(acc, V::template load<F32>(b.w->scale, n));
  if (b.bias) value = V::add(value, V::template load<F32>(b.bias, n));
  const int64_t at = m * b.y_stride + n;
  switch (b.y_type) {
    case BF16: return store_floats<V, BF16>(b.y, at, count, value);
    case F16: return store_floats<V, F16>(b.y, at, count, value);
    default: return store_floats<V, F32>(b.y, at, count, value);
  }
}

// Few rows: weights become floats in registers, once for all R rows.
template <class V, int R, bool Z>
void weight_only_tile(const WeightOnlyBlock& b, const int8_t* w, int64_t m, int64_t n) {
  constexpr int N = V::float_vecs;
  typename V::f32 acc[R][N];
  ZP_EACH(r, R)
    ZP_EACH(v, N) acc[r][v] = V::zero_f32();
  const float* x = b.x + m * b.x_stride;
  const int64_t k = b.w->k, stride = b.x_stride;
  typename V::i32 zero[N];
  ZP_EACH(v, N) zero[v] = Z ? V::load_i32(b.w->zero_point + n + v * V::lanes) : V::zero_i32();
  const int64_t whole = k / 4 * 4;
  for (int64_t q = 0; q < whole; q += 4, w += 4 * kPanel) {
    V::prefetch(w + 2048);
    ZP_EACH(v, N) {
      const auto quad = V::load_i32(reinterpret_cast<const int32_t*>(w) + v * V::lanes);
      const auto w0 = V::to_f32(V::template byte<0>(quad, zero[v]));
      const auto w1 = V::to_f32(V::template byte<1>(quad, zero[v]));
      const auto w2 = V::to_f32(V::template byte<2>(quad, zero[v]));
      const auto w3 = V::to_f32(V::template byte<3>(quad, zero[v]));
      ZP_EACH(r, R) {
        const float* xr = x + r * stride + q;
        acc[r][v] = V::fma(V::set1(xr[0]), w0, acc[r][v]);
        acc[r][v] = V::fma(V::set1(xr[1]), w1, acc[r][v]);
        acc[r][v] = V::fma(V::set1(xr[2]), w2, acc[r][v]);
        acc[r][v] = V::fma(V::set1(xr[3]), w3, acc[r][v]);
      }
    }
  }
  for (int64_t q = whole; q < k; q++)
    ZP_EACH(v, N) {
      auto quad = V::load_i32(reinterpret_cast<const int32_t*>(w) + v * V::lanes);
      for (int64_t j = whole; j < q; j++) quad = V::shift_byte(quad);
      const auto wv = V::to_f32(V::template byte<0>(quad, zero[v]));
      ZP_EACH(r, R) acc[r][v] = V::fma(V::set1(x[r * stride + q]), wv, acc[r][v]);
    }
  ZP_EACH(r, R)
    ZP_EACH(v, N) finish_weight_only<V>(b, m + r, n + v * V::lanes, acc[r][v]);
}

// Many rows: R rows x a part of a panel dequantized to w[k][64]; partial sums wait in c[rows][64].
template <class V, int R>
void float_tile(const float* x, int64_t stride, const float* w, int64_t k, float* c) {
  constexpr int N = V::float_vecs;
  typename V::f32 acc[R][N];
  ZP_EACH(r, R)
    ZP_EACH(v, N) acc[r][v] = V::template load<F32>(c, r * kPanel + v * V::lanes);
  for (int64_t i = 0; i < k; i++, w += kPanel) {
    typename V::f32 wv[N];
    ZP_EACH(v, N) wv[v] = V::template load<F32>(w, v * V::lanes);
    ZP_EACH(r, R) {
      const auto xv = V::set1(x[r * stride + i]);
      ZP_EACH(v, N) acc[r][v] = V::fma(xv, wv[v], acc[r][v]);
    }
  }
  ZP_EACH(r, R)
    ZP_EACH(v, N) V::template store<F32>(c, r * kPanel + v * V::lanes, acc[r][v]);
}

template <class V, int R = V::float_rows>
ZP_INLINE void float_rows(int rows, const float* x, int64_t stride, const float* w, int64_t k,
                          float* c) {
  if constexpr (R > 1) {
    if (rows < R) return float_rows<V, R - 1>(rows, x, stride, w, k, c);
  }
  float_tile<V, R>(x, stride, w, k, c);
}

template <class V, bool Z, int R = V::float_rows>
ZP_INLINE void weight_only_rows(int rows, const WeightOnlyBlock& b, const int8_t* w, int64_t m,
                                int64_t n) {
  if constexpr (R > 1) {
    if (rows < R) return weight_only_rows<V, Z, R - 1>(rows, b, w, m, n);
  }
  weight_only_tile<V, R, Z>(b, w, m, n);
}

template <class V>
void weight_only_panel(const WeightOnlyBlock& b, int64_t p) {
  constexpr int width = V::float_vecs * V::lanes;
  float* dequantized = b.scratch;
  float* c = b.scratch + kWeightOnlyPart * kPanel;
  for (int64_t i = 0; i < b.rows * kPanel; i++) c[i] = 0.0f;
  const int64_t blocks = ceil_div(b.rows, V::float_rows), base = b.rows / blocks,
                longer = b.rows % blocks;
  for (int64_t k0 = 0; k0 < b.w->k; k0 += kWeightOnlyPart) {
    const int64_t k = b.w->k - k0 < kWeightOnlyPart ? b.w->k - k0 : kWeightOnlyPart;
    const int8_t* w = b.w->panel(p) + k0 * kPanel;
    for (int64_t q = 0; q < k; q += 4, w += 4 * kPanel)
      for (int l = 0; l < kPanel; l += V::lanes) {
        auto zero = b.w->zero_point ? V::load_i32(b.w->zero_point + p * kPanel + l) : V::zero_i32();
        auto quad = V::load_i32(reinterpret_cast<const int32_t*>(w) + l);
        float* to = dequantized + q * kPanel + l;
        V::template store<F32>(to, 0, V::to_f32(V::template byte<0>(quad, zero)));
        V::template store<F32>(to, kPanel, V::to_f32(V::template byte<1>(quad, zero)));
        V::template store<F32>(to, 2 * kPanel, V::to_f32(V::template byte<2>(quad, zero)));
        V::template store<F32>(to, 3 * kPanel, V::to_f32(V::template byte<3>(quad, zero)));
      }
    for (int s = 0; s < kPanel && p * kPanel + s < b.w->n; s += width)
      for (int64_t i = 0, m = 0; i < blocks; i++) {
        const int rows = int(base + (i < longer));
        float_rows<V>(rows, b.x + m * b.x_stride + k0, b.x_stride, dequantized + s, k,
                      c + m * kPanel + s);
        m += rows;
      }
  }
  for (int64_t m = 0; m < b.rows; m++)
    for (int l = 0; l < kPanel; l += V::lanes)
      finish_weight_only<V>(b, m, p * kPanel + l, V::template load<F32>(c, m * kPanel + l));
}

template <class V>
void weight_only_block(const WeightOnlyBlock& b) {
  constexpr int width = V::float_vecs * V::lanes;
  for (int64_t p = b.panel_begin; p < b.panel_end; p++) {
    if (b.rows > V::float_rows) {
      weight_only_panel<V>(b, p);
      continue;
    }
    for (int s = 0; s < kPanel; s += width) {
      const int64_t n = p * kPanel + s;
      if (n >= b.w->n) break;
      const int8_t* w = b.w->panel(p) + 4 * s;
      if (b.w->zero_point)
        weight_only_rows<V, true>(int(b.rows), b, w, 0, n);
      else
        weight_only_rows<V, false>(int(b.rows), b, w, 0, n);
    }
  }
}
