// Float activations x weights that are floats, or integers made floats on the way. One chain of
// fused multiply-adds an output, k ascending from zero; lanes run over outputs, so that every
// vector width gives the same sum. Needs kernel_common.h.

// Beyond this many bytes times 64 weights come from memory.
constexpr int64_t kFarWeights = int64_t(64) << 23;

// Weights of V::lanes outputs for one k, as floats; [k][64] of a panel.
template <class V, Type W>
ZP_INLINE typename V::f32 load_weights(const void* w, int64_t k, int lane) {
  return V::template load<W>(w, k * kPanel + lane);
}

template <class V>
ZP_INLINE void finish_floats(const FloatBlock& b, int64_t m, int rows, int64_t n, int width,
                             int64_t acc_stride, const float* acc) {
  for (int r = 0; r < rows; r++)
    for (int v = 0; v < width; v += V::lanes) {
      const int64_t o = n + v, left = b.n - o;
      if (left <= 0) break;
      const int64_t count = left < V::lanes ? left : V::lanes;
      auto value = V::template load<F32>(acc, r * acc_stride + v);
      if (b.scale) value = V::mul(value, V::template load<F32>(b.scale, o));
      if (b.bias) value = V::add(value, V::template load<F32>(b.bias, o));
      if (b.post.any()) value = after<V>(b.post, b.y_type, m + r, o, count, value);
      store_as<V>(b.y_type, b.y, (m + r) * b.y_stride + o, count, value);
    }
}

// R rows x float_vecs vectors; partial sums come from and go to acc[R][acc_stride].
// `Ahead`: what is asked for before its time, in every step. kOwn: these weights, which come from
// memory; a number: so many cache lines from `ahead` on, for another tile.
constexpr int kOwn = -1;
template <class V, int R, Type W, int Ahead>
void float_tile(const float* x, int64_t stride, const void* w, int lane, int64_t k, float* acc,
                int64_t acc_stride, const char* ahead) {
  constexpr int N = V::float_vecs;
  typename V::f32 sum[R][N];
  ZP_EACH(r, R)
    ZP_EACH(v, N) sum[r][v] = V::template load<F32>(acc, r * acc_stride + v * V::lanes);
  for (int64_t i = 0; i < k; i++) {
    typename V::f32 wv[N];
    ZP_EACH(v, N) {
      constexpr int64_t size = W == F32 ? 4 : 2;
      const int64_t at = i * kPanel + lane + v * V::lanes;
      if (Ahead == kOwn) V::prefetch(static_cast<const char*>(w) + (at + 16 * kPanel) * size);
      wv[v] = load_weights<V, W>(w, i, lane + v * V::lanes);
    }
    ZP_EACH(j, Ahead) V::prefetch_far(ahead + (i * Ahead + j) * 64);
    ZP_EACH(r, R) {
      const auto xv = V::set1(x[r * stride + i]);
      ZP_EACH(v, N) sum[r][v] = V::fma(xv, wv[v], sum[r][v]);
    }
  }
  ZP_EACH(r, R)
    ZP_EACH(v, N) V::template store<F32>(acc, r * acc_stride + v * V::lanes, sum[r][v]);
}

// The same for integer weights (Z: with zero points), which become floats in registers, four k at
// a time, once for all R rows.
template <class V, int R, bool Z>
void float_int8_tile(const float* x, int64_t stride, const int8_t* w, const int32_t* zero_point,
                     int64_t k, float* acc, int64_t acc_stride) {
  constexpr int N = V::float_vecs;
  typename V::f32 sum[R][N];
  typename V::i32 zero[N];
  ZP_EACH(v, N) {
    zero[v] = Z ? V::load_i32(zero_point + v * V::lanes) : V::zero_i32();
    ZP_EACH(r, R) sum[r][v] = V::template load<F32>(acc, r * acc_stride + v * V::lanes);
  }
  const int64_t whole = k / 4 * 4;
  for (int64_t q = 0; q < whole; q += 4, w += 4 * kPanel) {
    V::prefetch(w + 2048);
    ZP_EACH(v, N) {
      const auto quad = V::load_i32(w + v * 4 * V::lanes);
      const auto w0 = V::to_f32(V::template byte<0>(quad, zero[v]));
      const auto w1 = V::to_f32(V::template byte<1>(quad, zero[v]));
      const auto w2 = V::to_f32(V::template byte<2>(quad, zero[v]));
      const auto w3 = V::to_f32(V::template byte<3>(quad, zero[v]));
      ZP_EACH(r, R) {
        const float* xr = x + r * stride + q;
        sum[r][v] = V::fma(V::set1(xr[0]), w0, sum[r][v]);
        sum[r][v] = V::fma(V::set1(xr[1]), w1, sum[r][v]);
        sum[r][v] = V::fma(V::set1(xr[2]), w2, sum[r][v]);
        sum[r][v] = V::fma(V::set1(xr[3]), w3, sum[r][v]);
      }
    }
  }
  for (int64_t q = whole; q < k; q++)
    ZP_EACH(v, N) {
      auto quad = V::load_i32(w + v * 4 * V::lanes);
      for (int64_t j = whole; j < q; j++) quad = V::shift_byte(quad);
      const auto wv = V::to_f32(V::template byte<0>(quad, zero[v]));
      ZP_EACH(r, R) sum[r][v] = V::fma(V::set1(x[r * stride + q]), wv, sum[r][v]);
    }
  ZP_EACH(r, R)
    ZP_EACH(v, N) V::template store<F32>(acc, r * acc_stride + v * V::lanes, sum[r][v]);
}

template <class V, Type W, int Ahead, int R = V::float_rows>
ZP_INLINE void float_rows(int rows, const float* x, int64_t stride, const void* w, int lane,
                          int64_t k, float* acc, int64_t acc_stride, const char* ahead = nullptr) {
  if constexpr (R > 1) {
    if (rows < R)
      return float_rows<V, W, Ahead, R - 1>(rows, x, stride, w, lane, k, acc, acc_stride, ahead);
  }
  float_tile<V, R, W, Ahead>(x, stride, w, lane, k, acc, acc_stride, ahead);
}

template <class V, bool Z, int R = V::float_rows>
ZP_INLINE void float_int8_rows(int rows, const float* x, int64_t stride, const int8_t* w,
                               const int32_t* zero_point, int64_t k, float* acc,
                               int64_t acc_stride) {
  if constexpr (R > 1) {
    if (rows < R)
      return float_int8_rows<V, Z, R - 1>(rows, x, stride, w, zero_point, k, acc, acc_stride);
  }
  float_int8_tile<V, R, Z>(x, stride, w, zero_point, k, acc, acc_stride);
}

// Up to float_rows rows: straight from the packed weights, the whole of k at once.
template <class V, Type W>
void few_rows(const FloatBlock& b, int64_t p) {
  constexpr int width = V::float_vecs * V::lanes;
  const int rows = int(b.rows);
  for (int s = 0; s < kPanel && p * kPanel + s < b.n; s += width) {
    const int64_t n = p * kPanel + s;
    alignas(64) float acc[V::float_rows * width];
    for (int i = 0; i < rows * width; i += V::lanes) V::template store<F32>(acc, i, V::zero_f32());
    if constexpr (W == S8) {
      const int8_t* w = static_cast<const int8_t*>(b.w) + p * b.k_padded * kPanel + 4 * s;
      if (b.zero_point)
        float_int8_rows<V, true>(rows, b.x, b.x_stride, w, b.zero_point + n, b.k, acc, width);
      else
        float_int8_rows<V, false>(rows, b.x, b.x_stride, w, nullptr, b.k, acc, width);
    } else {
      const char* w = static_cast<const char*>(b.w) + p * b.k * kPanel * (W == F32 ? 4 : 2);
      float_rows<V, W, kOwn>(rows, b.x, b.x_stride, w, s, b.k, acc, width);
    }
    finish_floats<V>(b, 0, rows, n, width, width, acc);
  }
}

// A part of a panel as floats [k][64]: where it lies, or made in scratch once for all rows.
template <class V, Type W>
ZP_INLINE const float* panel_part(const FloatBlock& b, int64_t p, int64_t k0, int64_t k) {
  if constexpr (W == F32) return static_cast<const float*>(b.w) + (p * b.k + k0) * kPanel;
  float* to = b.scratch;
  if constexpr (W == S8) {
    const int8_t* w = static_cast<const int8_t*>(b.w) + (p * b.k_padded + k0) * kPanel;
    for (int64_t q = 0; q < k; q += 4, w += 4 * kPanel, to += 4 * kPanel)
      for (int l = 0; l < kPanel; l += V::lanes) {
        const auto zero = b.zero_point ? V::load_i32(b.zero_point + p * kPanel + l) : V::zero_i32();
        const auto quad = V::load_i32(w + 4 * l);
        V::template store<F32>(to, l, V::to_f32(V::template byte<0>(quad, zero)));
        V::template store<F32>(to, kPanel + l, V::to_f32(V::template byte<1>(quad, zero)));
        V::template store<F32>(to, 2 * kPanel + l, V::to_f32(V::template byte<2>(quad, zero)));
        V::template store<F32>(to, 3 * kPanel + l, V::to_f32(V::template byte<3>(quad, zero)));
      }
  } else {
    for (int64_t i = 0; i < k * kPanel; i += V::lanes)
      V::template store<F32>(to, i, V::template load<W>(b.w, (p * b.k + k0) * kPanel + i));
  }
  return b.scratch;
}

template <class V, Type W>
void many_rows(const FloatBlock& b, int64_t p) {
  constexpr int width = V::float_vecs * V::lanes;
  float* acc = b.scratch + kFloatPart * kPanel;
  for (int64_t i = 0; i < b.rows * kPanel; i += V::lanes)
    V::template store<F32>(acc, i, V::zero_f32());
  const int64_t blocks = ceil_div(b.rows, V::float_rows), base = b.rows / blocks,
                longer = b.rows % blocks;
  constexpr int64_t row_bytes = kPanel * (W == F32 ? 4 : W == S8 ? 1 : 2);
  // The part that comes next, which lies behind this one, is fetched while this one multiplies, so
  // many lines a step that the first tiles see to all of it. Where the weights come from cache,
  // with few rows, the hardware's own prefetching does better.
  const int64_t tiles = blocks * (kPanel / width);
  const bool far = blocks >= 8 || b.n * b.k_padded * row_bytes >= kFarWeights;
  const int lines = !far ? 0 : tiles * 64 < 2 * row_bytes ? 2 : 1;
  const char* next = static_cast<const char*>(b.w) + (p * b.k_padded + kFloatPart) * row_bytes;
  for (int64_t k0 = 0; k0 < b.k; k0 += kFloatPart, next += kFloatPart * row_bytes) {
    const int64_t k = b.k - k0 < kFloatPart ? b.k - k0 : kFloatPart;
    const float* w = panel_part<V, W>(b, p, k0, k);
    const char *ahead = next, *end = lines ? next + kFloatPart * row_bytes : next;
    for (int s = 0; s < kPanel && p * kPanel + s < b.n; s += width)
      for (int64_t i = 0, m = 0; i < blocks; i++) {
        const int rows = int(base + (i < longer));
        const float* x = b.x + m * b.x_stride + k0;
        float* sum = acc + m * kPanel + s;
        if (ahead >= end)
          float_rows<V, F32, 0>(rows, x, b.x_stride, w, s, k, sum, kPanel);
        else if (lines == 1)
          float_rows<V, F32, 1>(rows, x, b.x_stride, w, s, k, sum, kPanel, ahead);
        else
          float_rows<V, F32, 2>(rows, x, b.x_stride, w, s, k, sum, kPanel, ahead);
        ahead += lines * k * 64;
        m += rows;
      }
  }
  finish_floats<V>(b, 0, int(b.rows), p * kPanel, kPanel, kPanel, acc);
}

template <class V, Type W>
void float_block_of(const FloatBlock& b) {
  for (int64_t p = b.panel_begin; p < b.panel_end; p++) {
    if (b.rows > V::float_rows)
      many_rows<V, W>(b, p);
    else if (b.rows > 0)
      few_rows<V, W>(b, p);
  }
}

template <class V>
void float_block(const FloatBlock& b) {
  switch (b.w_type) {
    case BF16: return float_block_of<V, BF16>(b);
    case S8: return float_block_of<V, S8>(b);
    default: return float_block_of<V, F32>(b);
  }
}
