// 8-bit activations x 8-bit weights. Needs kernel_common.h.

// -zero and -128 zero, the factors of the two halves of sum_w, where `zero` is the zero point as
// the accumulators have it: of activations that V lowers by a_offset.
template <class V>
ZP_INLINE int32_t sum_factors(const Row& row) {
  const int32_t zero = row.zero_point - V::a_offset;
  return int32_t(uint32_t(uint16_t(-zero)) | uint32_t(-128 * zero) << 16);
}

// What a row multiplies its accumulators with.
template <class V>
struct RowFactors {
  typename V::f32 scale;
  typename V::i32 zero, centered;

  explicit ZP_INLINE RowFactors(const Row& row)
      : scale(V::set1(row.scale)),
        zero(V::set1_i32(sum_factors<V>(row))),
        centered(V::set1_i32(row.centered)) {}

  // The real numbers that accumulators of the outputs from n on stand for, bias included.
  ZP_INLINE typename V::f32 real(const Int8Block& b, int64_t n, typename V::i32 acc) const {
    acc = V::add_pairs(acc, V::load_i32(b.w->sum + 2 * n), zero);
    if (b.w->zero_point)
      acc = V::sub_i32(acc, V::mul_i32(V::load_i32(b.w->zero_point + n), centered));
    auto value = V::mul(V::to_f32(acc), V::mul(scale, V::template load<F32>(b.w->scale, n)));
    return b.bias ? V::add(value, V::template load<F32>(b.bias, n)) : value;
  }
};

// To the integers of the output type: clamped, rounded half to even. max(q, low) gives low for a
// NaN, by the order of its operands.
template <class V>
ZP_INLINE typename V::i32 requantize(const Int8Block& b, int qmin, typename V::f32 value) {
  auto q = V::mul(value, V::set1(b.y_inverse_scale));
  q = V::max(q, V::set1(float(qmin - b.y_zero_point)));
  q = V::min(q, V::set1(float(qmin + 255 - b.y_zero_point)));
  return V::add_i32(V::to_i32(q), V::set1_i32(b.y_zero_point));
}

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
    const RowFactors<V> row(b.row[m]);
    typename V::f32 value[N];
    ZP_EACH(v, N) value[v] = row.real(b, n + v * V::lanes, acc[v]);
    if constexpr (Y == U8 || Y == S8) {
      uint8_t* y = static_cast<uint8_t*>(b.y) + at;
      uint8_t lane[N * V::lanes];
      uint8_t* to = left >= N * V::lanes ? y : lane;
      ZP_EACH(v, N)
        V::store_bytes(to + v * V::lanes, requantize<V>(b, Y == U8 ? 0 : -128, value[v]));
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

// The way with an activation or a residual: `rows` x `width` accumulators from memory to outputs.
// Not inlined, since the call of it must not crowd the registers of the multiplication.
template <class V>
ZP_NOINLINE void finish_post(const Int8Block& b, int64_t m, int rows, int64_t n, int width,
                             const int32_t* acc) {
  for (int r = 0; r < rows; r++) {
    const RowFactors<V> row(b.row[m + r]);
    for (int v = 0; v < width; v += V::lanes) {
      const int64_t o = n + v, left = b.w->n - o, at = (m + r) * b.y_stride + o;
      if (left <= 0) break;
      const int64_t count = left < V::lanes ? left : V::lanes;
      auto value = row.real(b, o, V::load_i32(acc + r * width + v));
      value = after<V>(b.post, b.y_type, m + r, o, count, value);
      if (b.y_type == U8 || b.y_type == S8) {
        uint8_t lane[V::lanes];
        V::store_bytes(lane, requantize<V>(b, b.y_type == U8 ? 0 : -128, value));
        for (int l = 0; l < count; l++) static_cast<uint8_t*>(b.y)[at + l] = lane[l];
      } else {
        store_as<V>(b.y_type, b.y, at, count, value);
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
  constexpr int quad = 4 * kPanel;        // bytes of a panel for four k
  constexpr int a_quad = 4 * V::a_bytes;  // and of a row of activations
  i32 acc[U][R][N];
  ZP_EACH(u, U)
    ZP_EACH(r, R)
      ZP_EACH(v, N) acc[u][r][v] = V::zero_i32();
  const uint8_t* a = b.a + m * b.a_stride + b.k_begin * V::a_bytes;
  const int64_t stride = b.a_stride, quads = ceil_div(b.k_end - b.k_begin, 4);
  int64_t q = 0;
  for (; q + U <= quads; q += U) {
    V::prefetch(w + 2048);
    ZP_EACH(u, U) {
      typename V::w_t wv[N];
      ZP_EACH(v, N) wv[v] = V::load_w(w + u * quad + v * 4 * V::lanes);
      ZP_EACH(r, R) {
        typename V::a_t av = V::load_a(a + r * stride + a_quad * (q + u));
        ZP_EACH(v, N) acc[u][r][v] = V::dot(acc[u][r][v], av, wv[v]);
      }
    }
    w += U * quad;
  }
  if (U == 2 && q < quads) {
    ZP_EACH(r, R) {
      typename V::a_t av = V::load_a(a + r * stride + a_quad * q);
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
  if constexpr (V::own_tile)
    V::template tile<R, Y>(b, w, m, n);
  else
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
        if constexpr (Y == I32) {
          int8_rows<V, I32>(rows, b, w, m, n);
        } else if (b.post.any()) {
          alignas(64) int32_t acc[V::int_rows * width];
          Int8Block raw = b;  // whose output (m, n) is acc[0]
          raw.y_stride = width;
          raw.y = acc - (m * width + n);
          int8_rows<V, I32>(rows, raw, w, m, n);
          finish_post<V>(b, m, rows, n, width, acc);
        } else {
          int8_rows<V, Y>(rows, b, w, m, n);
        }
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
