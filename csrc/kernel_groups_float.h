// Float activations x weights in groups. Needs kernel_groups_tile.h.

// The zero points of a group: of Nibbles as floats, of Bytes as integers, lowered by 128 like the
// bytes themselves.
template <class V>
struct FloatZeros {
  typename V::f32 floats[V::float_vecs];
  typename V::i32 lowered[V::float_vecs];
};

// Code J of each lane, as a float less its zero point; with Nibbles and not Sub, `lut` subtracts
// it.
template <class V, Codes C, bool Sub, int J>
ZP_INLINE typename V::f32 float_code(const uint8_t* codes, typename V::lut_t lut,
                                     typename V::f32 zero, typename V::i32 lowered) {
  if constexpr (C == Bytes) {
    const auto quad = V::flip_bytes(V::load_i32(codes + J / 4 * kQuadBytes));
    return V::to_f32(V::template byte<J % 4>(quad, lowered));
  }
  const auto w = V::template nibble<J>(V::load_i32(codes), lut);
  return Sub ? V::sub(w, zero) : w;
}

// Eight k of activations times the codes of a lane, of which `left` count.
template <class V, int R, Codes C, bool Sub, int J = 0>
ZP_INLINE void float_octet(const uint8_t* codes, int64_t left, const float* x, int64_t stride,
                           typename V::lut_t lut, const FloatZeros<V>& zero,
                           typename V::f32 (&sum)[R][V::float_vecs]) {
  constexpr int N = V::float_vecs;
  if constexpr (J < 8) {
    if (J < left) {
      typename V::f32 w[N];
      ZP_EACH(v, N)
        w[v] = float_code<V, C, Sub, J>(codes + v * 4 * V::lanes, lut, zero.floats[v],
                                        zero.lowered[v]);
      ZP_EACH(r, R) {
        const auto xv = V::set1(x[r * stride + J]);
        ZP_EACH(v, N) sum[r][v] = V::fma(xv, w[v], sum[r][v]);
      }
      float_octet<V, R, C, Sub, J + 1>(codes, left, x, stride, lut, zero, sum);
    }
  }
}

template <class V>
ZP_INLINE typename V::i32 lowered_zeros(const GroupTile& t, const uint8_t* zeros) {
  const auto zero = t.zero >= 0 ? V::set1_i32(int32_t(t.zero)) : V::load_u8(zeros);
  return V::sub_i32(zero, V::set1_i32(128));
}

// R rows x float_vecs vectors of outputs from output `lane` of the panel on.
template <class V, int R, Codes C, bool Sub>
ZP_NOINLINE void group_float_tile(const GroupTile& tile, int lane) {
  const GroupTile t = tile;  // what is written to `sum` could otherwise be part of it
  constexpr int N = V::float_vecs;
  constexpr int64_t octet_bytes = C == Bytes ? 2 * kQuadBytes : kQuadBytes;
  const float* x = static_cast<const float*>(t.x);
  const float* floats = t.centered + lane;
  float* y = t.sum + lane;
  const uint8_t* record = t.record;
  const auto lut = V::make_lut(Sub ? 0 : int32_t(t.zero));
  for (int64_t g = 0; g < t.groups; g++, record += t.record_bytes) {
    const int64_t k = g == t.groups - 1 ? t.last_k : t.k;
    const uint8_t* scales = record + t.codes_bytes(k);
    typename V::f32 sum[R][N];
    ZP_EACH(r, R)
      ZP_EACH(v, N) sum[r][v] = V::zero_f32();
    if constexpr (C == Centered) {
      for (int64_t i = 0; i < k; i++, floats += kPanel) {
        typename V::f32 w[N];
        ZP_EACH(v, N) w[v] = V::template load<F32>(floats, v * V::lanes);
        ZP_EACH(r, R) {
          const auto xv = V::set1(x[r * t.x_stride + i]);
          ZP_EACH(v, N) sum[r][v] = V::fma(xv, w[v], sum[r][v]);
        }
      }
    } else {
      FloatZeros<V> zero;
      ZP_EACH(v, N) {
        const uint8_t* zeros = zeros_of(t.scale_type, scales) + lane + v * V::lanes;
        zero.floats[v] = C == Nibbles && Sub ? V::to_f32(V::load_u8(zeros)) : V::zero_f32();
        zero.lowered[v] = C == Bytes ? lowered_zeros<V>(t, zeros) : V::zero_i32();
      }
      const uint8_t* codes = record + 4 * lane;
      int64_t i = 0;
      for (; i + 8 <= k; i += 8, codes += octet_bytes) {
        V::prefetch(codes + 2048);
        if constexpr (C == Bytes) V::prefetch(codes + 2048 + kQuadBytes);
        float_octet<V, R, C, Sub>(codes, 8, x + i, t.x_stride, lut, zero, sum);
      }
      float_octet<V, R, C, Sub>(codes, k - i, x + i, t.x_stride, lut, zero, sum);
    }
    x += k;
    typename V::f32 scale[N];
    load_scales<V, N>(t.scale_type, scales, lane, scale);
    ZP_EACH(v, N) {
      ZP_EACH(r, R) {
        const int64_t at = r * kPanel + v * V::lanes;
        V::template store<F32>(y, at, V::fma(sum[r][v], scale[v], V::template load<F32>(y, at)));
      }
    }
  }
}

template <class V, Codes C, int J = 0>
ZP_INLINE void center_octet(const uint8_t* codes, int64_t left, typename V::lut_t lut,
                            typename V::f32 zero, typename V::i32 lowered, float* to) {
  if constexpr (J < 8) {
    if (J < left) {
      const auto w = float_code<V, C, true, J>(codes, lut, zero, lowered);
      V::template store<F32>(to, J * kPanel, w);
      center_octet<V, C, J + 1>(codes, left, lut, zero, lowered, to);
    }
  }
}

// Weights of some groups as Centered floats.
template <class V, Codes C>
void center_floats(const GroupTile& t, float* to) {
  const uint8_t* record = t.record;
  const auto lut = V::make_lut(0);
  for (int64_t g = 0; g < t.groups; g++, record += t.record_bytes) {
    const int64_t k = g == t.groups - 1 ? t.last_k : t.k;
    const uint8_t* zeros = zeros_of(t.scale_type, record + t.codes_bytes(k));
    for (int l = 0; l < kPanel; l += V::lanes) {
      const auto lowered = lowered_zeros<V>(t, zeros + l);
      const auto zero = V::to_f32(V::add_i32(lowered, V::set1_i32(128)));
      for (int64_t i = 0; i < k; i += 8)
        center_octet<V, C>(record + t.codes_bytes(i) + 4 * l, k - i, lut, zero, lowered,
                           to + i * kPanel + l);
    }
    to += k * kPanel;
  }
}
