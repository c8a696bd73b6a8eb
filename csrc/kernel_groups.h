// Weights of up to four bits in groups along k, each group with a scale and a zero point of its
// own. A group is summed first, by itself; the sums times their scales are added in the order of
// the groups. Needs kernel_common.h.
//
// V provides, besides: lut_t and make_lut(zero); nibble<J>(quad, lut), code J of eight as a float,
// less the zero of the table; load_u8; low_codes and high_codes, the eight codes of a lane as two
// times four bytes; dot_codes, four products of unsigned codes below 16 and signed bytes; and
// group_rows x group_vecs, the register tile of integers, with keep_sums: whether there is room for
// the sums of floats beside those of integers. Where there is not, they are read and written once a
// group, and with many registers to a group the loads that follow wait for stores to addresses that
// only look alike.

// How zero points come into the sum of codes times activations.
enum Zero {
  OneZero,     // all weights have the same: it starts at -zero * sum of activations
  PairedZero,  // one for each group; the sum of activations is two int16
  ScaledZero,  // the same, where groups are too long for that
};

constexpr int64_t kOctetBytes = 4 * kPanel;  // codes of a panel for eight k

// Some groups of a panel times R rows.
struct GroupTile {
  const uint8_t* record;  // of the first group
  int64_t record_bytes;   // to the next
  int64_t k, groups;      // of a full group; how many groups
  int64_t last_k;         // of the last of them
  const void* unpacked;   // codes as bytes, or weights as floats, where they are made beforehand
  const void* x;          // activations: int8, each group padded to octets; or floats
  int64_t x_stride;
  const int32_t* start;  // of integers: [rows][start_stride], what the accumulators start at
  int64_t start_stride;
  int64_t zero;  // OneZero: it
  Type scale_type;
  float* sum;  // [rows][sum_stride]
  int64_t sum_stride;
};

template <class V, int N>
ZP_INLINE void load_scales(Type type, const uint8_t* scales, int lane, typename V::f32 (&to)[N]) {
  switch (type) {
    case BF16:
      ZP_EACH(v, N) to[v] = V::template load<BF16>(scales, lane + v * V::lanes);
      break;
    case F16:
      ZP_EACH(v, N) to[v] = V::template load<F16>(scales, lane + v * V::lanes);
      break;
    default:
      ZP_EACH(v, N) to[v] = V::template load<F32>(scales, lane + v * V::lanes);
      break;
  }
}

// Where a group's zero points lie: behind its scales.
ZP_INLINE const uint8_t* zeros_of(Type scale_type, const uint8_t* scales) {
  return scales + kPanel * (scale_type == F32 ? 4 : 2);
}

// R rows x group_vecs vectors of outputs from output `lane` of the panel on.
template <class V, int R, Zero Z, bool Unpacked>
void group_int_tile(const GroupTile& tile, int lane) {
  const GroupTile t = tile;  // what is written to `sum` could otherwise be part of it
  constexpr int N = V::group_vecs;
  const int8_t* a = static_cast<const int8_t*>(t.x);
  const uint8_t* bytes = static_cast<const uint8_t*>(t.unpacked) + 4 * lane;
  const uint8_t* record = t.record;
  typename V::f32 sum[R][N];
  if constexpr (V::keep_sums) {
    ZP_EACH(r, R)
      ZP_EACH(v, N)
        sum[r][v] = V::template load<F32>(t.sum + r * t.sum_stride + lane, v * V::lanes);
  }
  for (int64_t g = 0; g < t.groups; g++, record += t.record_bytes) {
    const bool last = g == t.groups - 1;
    const int64_t octets = ceil_div(last ? t.last_k : t.k, 8), codes_bytes = octets * kOctetBytes;
    typename V::i32 acc[R][N];
    if constexpr (Z == OneZero) {
      ZP_EACH(r, R) {
        const auto start = V::set1_i32(t.start[r * t.start_stride + g]);
        ZP_EACH(v, N) acc[r][v] = start;
      }
    } else {
      const uint8_t* zeros = zeros_of(t.scale_type, record + codes_bytes);
      ZP_EACH(v, N) {
        const auto zero = V::load_u8(zeros + lane + v * V::lanes);
        ZP_EACH(r, R) {
          const auto start = V::set1_i32(t.start[r * t.start_stride + g]);
          if constexpr (Z == PairedZero)
            acc[r][v] = V::add_pairs(V::zero_i32(), V::twice(zero), start);
          else
            acc[r][v] = V::mul_i32(zero, start);
        }
      }
    }
    const uint8_t* codes = record + 4 * lane;
    for (int64_t o = 0; o < octets; o++) {
      if (!Unpacked) V::prefetch(codes + 2048);
      ZP_EACH(h, 2) {
        typename V::i32 w[N];
        ZP_EACH(v, N) {
          if constexpr (Unpacked)
            w[v] = V::load_i32(bytes + h * kOctetBytes + v * 4 * V::lanes);
          else
            w[v] = h ? V::high_codes(V::load_i32(codes + v * 4 * V::lanes))
                     : V::low_codes(V::load_i32(codes + v * 4 * V::lanes));
        }
        ZP_EACH(r, R) {
          int32_t quad;
          __builtin_memcpy(&quad, a + r * t.x_stride + 4 * h, 4);
          const auto av = V::set1_i32(quad);
          ZP_EACH(v, N) acc[r][v] = V::dot_codes(acc[r][v], w[v], av);
        }
      }
      codes += kOctetBytes;
      bytes += 2 * kOctetBytes;
      a += 8;
    }
    typename V::f32 scale[N];
    load_scales<V, N>(t.scale_type, record + codes_bytes, lane, scale);
    ZP_EACH(v, N) {
      ZP_EACH(r, R) {
        const auto part = V::to_f32(acc[r][v]);
        if constexpr (V::keep_sums) {
          sum[r][v] = V::fma(part, scale[v], sum[r][v]);
        } else {
          float* at = t.sum + r * t.sum_stride + lane + v * V::lanes;
          V::template store<F32>(at, 0, V::fma(part, scale[v], V::template load<F32>(at, 0)));
        }
      }
    }
  }
  if constexpr (V::keep_sums) {
    ZP_EACH(r, R)
      ZP_EACH(v, N)
        V::template store<F32>(t.sum + r * t.sum_stride + lane, v * V::lanes, sum[r][v]);
  }
}

// Eight k of float activations times the codes of a lane, of which `left` count.
template <class V, int R, bool Sub, int J = 0>
ZP_INLINE void float_octet(const uint8_t* codes, int64_t left, const float* x, int64_t stride,
                           typename V::lut_t lut, const typename V::f32 (&zero)[V::float_vecs],
                           typename V::f32 (&sum)[R][V::float_vecs]) {
  constexpr int N = V::float_vecs;
  if constexpr (J < 8) {
    if (J < left) {
      typename V::f32 w[N];
      ZP_EACH(v, N) {
        w[v] = V::template nibble<J>(V::load_i32(codes + v * 4 * V::lanes), lut);
        if constexpr (Sub) w[v] = V::sub(w[v], zero[v]);
      }
      ZP_EACH(r, R) {
        const auto xv = V::set1(x[r * stride + J]);
        ZP_EACH(v, N) sum[r][v] = V::fma(xv, w[v], sum[r][v]);
      }
      float_octet<V, R, Sub, J + 1>(codes, left, x, stride, lut, zero, sum);
    }
  }
}

// The same of float activations, float_vecs vectors.
template <class V, int R, Zero Z, bool Unpacked>
void group_float_tile(const GroupTile& tile, int lane) {
  const GroupTile t = tile;
  constexpr int N = V::float_vecs;
  constexpr bool sub = Z != OneZero;
  const float* x = static_cast<const float*>(t.x);
  const float* floats = static_cast<const float*>(t.unpacked) + lane;
  const uint8_t* record = t.record;
  const auto lut = V::make_lut(sub ? 0 : int32_t(t.zero));
  for (int64_t g = 0; g < t.groups; g++, record += t.record_bytes) {
    const int64_t k = g == t.groups - 1 ? t.last_k : t.k;
    const int64_t codes_bytes = ceil_div(k, 8) * kOctetBytes;
    typename V::f32 sum[R][N], zero[N];
    ZP_EACH(v, N) {
      zero[v] = V::zero_f32();
      if constexpr (sub && !Unpacked)
        zero[v] = V::to_f32(
            V::load_u8(zeros_of(t.scale_type, record + codes_bytes) + lane + v * V::lanes));
      ZP_EACH(r, R) sum[r][v] = V::zero_f32();
    }
    if constexpr (Unpacked) {
      for (int64_t i = 0; i < k; i++, floats += kPanel) {
        typename V::f32 w[N];
        ZP_EACH(v, N) w[v] = V::template load<F32>(floats, v * V::lanes);
        ZP_EACH(r, R) {
          const auto xv = V::set1(x[r * t.x_stride + i]);
          ZP_EACH(v, N) sum[r][v] = V::fma(xv, w[v], sum[r][v]);
        }
      }
    } else {
      const uint8_t* codes = record + 4 * lane;
      int64_t i = 0;
      for (; i + 8 <= k; i += 8, codes += kOctetBytes) {
        V::prefetch(codes + 2048);
        float_octet<V, R, sub>(codes, 8, x + i, t.x_stride, lut, zero, sum);
      }
      float_octet<V, R, sub>(codes, k - i, x + i, t.x_stride, lut, zero, sum);
    }
    x += k;
    typename V::f32 scale[N];
    load_scales<V, N>(t.scale_type, record + codes_bytes, lane, scale);
    ZP_EACH(v, N) {
      ZP_EACH(r, R) {
        float* y = t.sum + r * t.sum_stride + lane + v * V::lanes;
        V::template store<F32>(y, 0, V::fma(sum[r][v], scale[v], V::template load<F32>(y, 0)));
      }
    }
  }
}

// Codes of some groups as bytes, [k/4][64 outputs][4], for many rows to use.
template <class V>
void unpack_codes(const GroupTile& t, uint8_t* to) {
  const uint8_t* record = t.record;
  for (int64_t g = 0; g < t.groups; g++, record += t.record_bytes) {
    const int64_t octets = ceil_div(g == t.groups - 1 ? t.last_k : t.k, 8);
    for (const uint8_t *codes = record, *end = record + octets * kOctetBytes; codes < end;
         codes += kOctetBytes, to += 2 * kOctetBytes)
      for (int i = 0; i < kOctetBytes; i += 4 * V::lanes) {
        const auto octet = V::load_i32(codes + i);
        V::store_i32(reinterpret_cast<int32_t*>(to + i), V::low_codes(octet));
        V::store_i32(reinterpret_cast<int32_t*>(to + kOctetBytes + i), V::high_codes(octet));
      }
  }
}

template <class V, int J = 0>
ZP_INLINE void unpack_octet(const uint8_t* codes, int64_t left, typename V::lut_t lut,
                            typename V::f32 zero, float* to) {
  if constexpr (J < 8) {
    if (J < left) {
      V::template store<F32>(to, J * kPanel,
                             V::sub(V::template nibble<J>(V::load_i32(codes), lut), zero));
      unpack_octet<V, J + 1>(codes, left, lut, zero, to);
    }
  }
}

// Weights of some groups as floats less their zero points, [k][64 outputs].
template <class V>
void unpack_floats(const GroupTile& t, bool one_zero, float* to) {
  const uint8_t* record = t.record;
  const auto lut = V::make_lut(0);
  for (int64_t g = 0; g < t.groups; g++, record += t.record_bytes) {
    const int64_t k = g == t.groups - 1 ? t.last_k : t.k;
    const uint8_t* zeros = zeros_of(t.scale_type, record + ceil_div(k, 8) * kOctetBytes);
    for (int l = 0; l < kPanel; l += V::lanes) {
      const auto zero = one_zero ? V::set1(float(t.zero)) : V::to_f32(V::load_u8(zeros + l));
      for (int64_t i = 0; i < k; i += 8)
        unpack_octet<V>(record + i / 8 * kOctetBytes + 4 * l, k - i, lut, zero,
                        to + i * kPanel + l);
    }
    to += k * kPanel;
  }
}

template <class V, Zero Z, bool Floats, bool Unpacked,
          int R = Floats ? V::float_rows : V::group_rows>
ZP_INLINE void group_rows(int rows, const GroupTile& t, int lane) {
  if constexpr (R > 1) {
    if (rows < R) return group_rows<V, Z, Floats, Unpacked, R - 1>(rows, t, lane);
  }
  if constexpr (Floats)
    group_float_tile<V, R, Z, Unpacked>(t, lane);
  else
    group_int_tile<V, R, Z, Unpacked>(t, lane);
}

// acc -> y: of integers (acc - zero_x * C) * scale_x; then bias and what follows.
template <class V, Type Y>
ZP_INLINE void finish_groups(const GroupBlock& b, int64_t p, const float* sum) {
  for (int64_t m = 0; m < b.rows; m++)
    for (int l = 0; l < kPanel; l += V::lanes) {
      const int64_t n = p * kPanel + l, left = b.w->n - n;
      if (left <= 0) break;
      const int64_t count = left < V::lanes ? left : V::lanes;
      auto value = V::template load<F32>(sum, m * kPanel + l);
      if (b.row) {
        const auto zero = V::set1(float(-b.row[m].zero_point));
        value = V::fma(zero, V::template load<F32>(b.w->sum, n), value);
        value = V::mul(value, V::set1(b.row[m].scale));
      }
      if (b.bias) value = V::add(value, V::template load<F32>(b.bias, n));
      if (b.post.any()) value = after<V>(b.post, Y, m, n, count, value);
      store_floats<V, Y>(b.y, m * b.y_stride + n, count, value);
    }
}

template <class V, Zero Z, bool Floats>
void group_panel(const GroupBlock& b, int64_t p) {
  constexpr int most = Floats ? V::float_rows : V::group_rows;
  constexpr int width = (Floats ? V::float_vecs : V::group_vecs) * V::lanes;
  constexpr int64_t x_size = Floats ? 4 : 1;
  const PackedGroups& w = *b.w;
  for (int64_t i = 0; i < b.rows * kPanel; i += V::lanes)
    V::template store<F32>(b.sum, i, V::zero_f32());
  const int64_t blocks = ceil_div(b.rows, most), base = b.rows / blocks, longer = b.rows % blocks;
  const int64_t part = blocks == 1 ? w.groups : w.part();
  for (int64_t g = 0; g < w.groups; g += part) {
    GroupTile t{};
    t.groups = w.groups - g < part ? w.groups - g : part;
    t.record = w.record(p, g);
    t.record_bytes = w.record_bytes;
    t.k = w.group;
    t.last_k = w.size_of(g + t.groups - 1);
    t.x_stride = b.x_stride;
    t.start_stride = w.groups;
    t.zero = w.zero;
    t.scale_type = w.scale_type;
    t.sum_stride = kPanel;
    t.unpacked = b.scratch;
    if (blocks > 1) {
      if constexpr (Floats)
        unpack_floats<V>(t, Z == OneZero, b.scratch);
      else
        unpack_codes<V>(t, reinterpret_cast<uint8_t*>(b.scratch));
    }
    const int64_t step = Floats ? w.group : w.group_padded;
    for (int s = 0; s < kPanel && p * kPanel + s < w.n; s += width)
      for (int64_t i = 0, m = 0; i < blocks; i++) {
        const int rows = int(base + (i < longer));
        t.x = static_cast<const char*>(b.x) + (m * b.x_stride + g * step) * x_size;
        t.start = b.start + m * w.groups + g;
        t.sum = b.sum + m * kPanel;
        if (blocks > 1)
          group_rows<V, Z, Floats, true>(rows, t, s);
        else
          group_rows<V, Z, Floats, false>(rows, t, s);
        m += rows;
      }
  }
  switch (b.y_type) {
    case BF16: return finish_groups<V, BF16>(b, p, b.sum);
    case F16: return finish_groups<V, F16>(b, p, b.sum);
    default: return finish_groups<V, F32>(b, p, b.sum);
  }
}

template <class V>
ZP_INLINE void group_panel_with(const GroupBlock& b, int64_t p) {
  const PackedGroups& w = *b.w;
  if (!b.row)
    return w.zero >= 0 ? group_panel<V, OneZero, true>(b, p)
                       : group_panel<V, PairedZero, true>(b, p);
  if (w.zero >= 0) return group_panel<V, OneZero, false>(b, p);
  return w.paired() ? group_panel<V, PairedZero, false>(b, p)
                    : group_panel<V, ScaledZero, false>(b, p);
}

template <class V>
void group_block(const GroupBlock& b) {
  for (int64_t p = b.panel_begin; p < b.panel_end; p++) group_panel_with<V>(b, p);
}

// A row of integers to what the kernel reads: signed (uint8 lowered by 128: `flip` 0x80, else 0),
// each group padded with zeros to octets; and what its accumulators start at.
template <class V>
void prepare_groups(const PackedGroups& w, const uint8_t* __restrict q, uint8_t flip,
                    int8_t* __restrict a, int32_t* start) {
  const int64_t together = w.group == w.group_padded ? w.k : w.group;  // k without padding between
  int8_t* to = a;
  for (int64_t k = 0; k < w.k; k += together) {
    const int64_t count = w.k - k < together ? w.k - k : together, padded = round_up(count, 8);
    for (int64_t i = 0; i < count; i++) to[i] = int8_t(q[k + i] ^ flip);
    for (int64_t i = count; i < padded; i++) to[i] = 0;
    to += padded;
  }
  // Sums of four, a vector at a time, then of groups.
  constexpr int64_t some = 256;
  int32_t fours[some];
  const int64_t quads = w.group_padded / 4, all = (to - a) / 4;
  int64_t left = quads, g = 0;
  int32_t total = 0;
  for (int64_t at = 0; at < all; at += some) {
    const int64_t count = all - at < some ? all - at : some;
    for (int64_t i = 0; i < count; i += V::lanes)  // rows are padded to kStep
      V::store_i32(fours + i, V::dot_codes(V::zero_i32(), V::set1_i32(0x01010101),
                                           V::load_i32(a + 4 * (at + i))));
    for (int64_t i = 0; i < count;) {
      const int64_t run = left < count - i ? left : count - i;
      for (int64_t j = 0; j < run; j++) total += fours[i + j];
      i += run;
      left -= run;
      if (left && at + i < all) continue;
      if (w.zero >= 0) {
        start[g] = int32_t(uint32_t(-w.zero) * uint32_t(total));
      } else if (w.paired()) {
        const int32_t half = -total / 2, rest = -total - half;
        start[g] = int32_t(uint32_t(half) << 16 | (uint32_t(rest) & 0xffffu));
      } else {
        start[g] = -total;
      }
      g++;
      left = quads;
      total = 0;
    }
  }
}
