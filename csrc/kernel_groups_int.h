// Integer activations x weights in groups. Needs kernel_groups_tile.h.
//
// Few rows read codes as they lie, and activations are signed: an accumulator starts at -zero * sum
// of the row's activations. Many rows share weights that are made int8 beforehand, less their zero
// points, half a panel of them at a time; where V::unsigned_rows the hardware then wants the
// activations unsigned, as they are without the lowering by 128, and an accumulator starts at
// -128 * sum of the weights, which no row has for itself.

// Where V::keep_sums, the sums of floats are in registers while a tile multiplies.
template <class V, int R, int N>
ZP_INLINE void load_sums(const float* y, typename V::f32 (&sum)[R][N]) {
  if constexpr (V::keep_sums) {
    ZP_EACH(r, R)
      ZP_EACH(v, N) sum[r][v] = V::template load<F32>(y, r * kPanel + v * V::lanes);
  }
}

template <class V, int R, int N>
ZP_INLINE void store_sums(float* y, typename V::f32 (&sum)[R][N]) {
  if constexpr (V::keep_sums) {
    recompute_address(y);
    ZP_EACH(r, R)
      ZP_EACH(v, N) V::template store<F32>(y, r * kPanel + v * V::lanes, sum[r][v]);
  }
}

// R rows x group_vecs vectors of outputs from output `lane` of the panel on.
template <class V, int R, Codes C, Zero Z>
ZP_NOINLINE void group_int_tile(const GroupTile& tile, int lane) {
  const GroupTile t = tile;  // what is written to `sum` could otherwise be part of it
  constexpr int N = V::group_vecs(R);
  constexpr int64_t packed_bytes = C == Bytes ? 2 * kQuadBytes : kQuadBytes;  // of eight k
  const int8_t* a = static_cast<const int8_t*>(t.x);
  const uint8_t* record = t.record;
  const char* ahead = t.ahead;
  float* y = t.sum + lane;
  typename V::f32 sum[R][N];
  load_sums<V>(y, sum);
  for (int64_t g = 0; g < t.groups; g++, record += t.record_bytes) {
    const int64_t k = g == t.groups - 1 ? t.last_k : t.k;
    const uint8_t* scales = record + ceil_div(k, 8) * packed_bytes;
    typename V::i32 acc[R][N];
    if constexpr (Z == OneZero) {
      ZP_EACH(r, R) {
        const auto start = V::set1_i32(t.start[r * t.start_stride + g]);
        ZP_EACH(v, N) acc[r][v] = start;
      }
    } else {
      const uint8_t* zeros = zeros_of(t.scale_type, scales);
      ZP_EACH(v, N) {
        auto zero = V::load_u8(zeros + lane + v * V::lanes);
        if constexpr (C == Bytes && V::byte_offset != 0)
          zero = V::sub_i32(zero, V::set1_i32(V::byte_offset));
        ZP_EACH(r, R) {
          const auto start = V::set1_i32(t.start[r * t.start_stride + g]);
          if constexpr (Z == PairedZero)
            acc[r][v] = V::add_pairs(V::zero_i32(), V::twice(zero), start);
          else
            acc[r][v] = V::mul_i32(zero, start);
        }
      }
    }
    for (int64_t i = 0; i < t.ahead_lines; i++, ahead += 64) V::prefetch_far(ahead);
    const uint8_t* codes = record + 4 * lane;
    for (int64_t i = 0; i < k; i += 8) {
      V::prefetch(codes + 2048);
      if constexpr (C == Bytes) V::prefetch(codes + 2048 + kQuadBytes);
      ZP_EACH(h, 2) {
        typename V::i32 w[N];
        ZP_EACH(v, N) {
          if constexpr (C == Nibbles)
            w[v] = h ? V::high_codes(V::load_i32(codes + v * 4 * V::lanes))
                     : V::low_codes(V::load_i32(codes + v * 4 * V::lanes));
          else
            w[v] = V::load_i32(codes + h * kQuadBytes + v * 4 * V::lanes);
        }
        ZP_EACH(r, R) {
          int32_t quad;
          __builtin_memcpy(&quad, a + r * t.x_stride + 4 * h, 4);
          const auto av = V::set1_i32(quad);
          ZP_EACH(v, N) {
            if constexpr (C == Bytes)
              acc[r][v] = V::dot_bytes(acc[r][v], w[v], av);
            else
              acc[r][v] = V::dot_codes(acc[r][v], w[v], av);
          }
        }
      }
      codes += packed_bytes;
      a += 8;
    }
    typename V::f32 scale[N];
    load_scales<V, N>(t.scale_type, scales, lane, scale);
    ZP_EACH(v, N) {
      ZP_EACH(r, R) {
        const auto part = V::to_f32(acc[r][v]);
        if constexpr (V::keep_sums) {
          sum[r][v] = V::fma(part, scale[v], sum[r][v]);
        } else {
          const int64_t at = r * kPanel + v * V::lanes;
          V::template store<F32>(y, at, V::fma(part, scale[v], V::template load<F32>(y, at)));
        }
      }
    }
  }
  store_sums<V>(y, sum);
}

// Nibbles of some groups, of the strip from output `lane` on, as weights for many rows.
template <class V>
void center_codes(const GroupTile& t, int lane, int8_t* to, CenteredGroup* group) {
  constexpr int64_t quad_bytes = 4 * kStrip;
  const uint8_t* record = t.record;
  for (int64_t g = 0; g < t.groups; g++, record += t.record_bytes, group++) {
    const int64_t k = g == t.groups - 1 ? t.last_k : t.k, octets = ceil_div(k, 8);
    const uint8_t* scales = record + t.codes_bytes(k);
    const uint8_t* zeros = zeros_of(t.scale_type, scales);
    for (int l = 0; l < kStrip; l += V::lanes) {
      typename V::f32 scale[1];
      load_scales<V, 1>(t.scale_type, scales, lane + l, scale);
      V::template store<F32>(group->scale, l, scale[0]);
      const auto one = V::set1_i32(0x01010101);
      auto zero = t.zero >= 0 ? V::set1_i32(int32_t(t.zero)) : V::load_u8(zeros + lane + l);
      zero = V::mul_i32(zero, one);
      const uint8_t* codes = record + 4 * (lane + l);
      int8_t* w = to + 4 * l;
      auto low_sum = V::zero_i32(), high_sum = V::zero_i32();
      for (int64_t o = 0; o < octets; o++, codes += kQuadBytes, w += 2 * quad_bytes) {
        const auto octet = V::load_i32(codes);
        const auto low = V::sub_bytes(V::low_codes(octet), zero);
        const auto high = V::sub_bytes(V::high_codes(octet), zero);
        V::store_i32(reinterpret_cast<int32_t*>(w), low);
        V::store_i32(reinterpret_cast<int32_t*>(w + quad_bytes), high);
        if constexpr (V::unsigned_rows) {
          low_sum = V::dot_codes(low_sum, one, low);
          high_sum = V::dot_codes(high_sum, one, high);
        }
      }
      const auto first = V::mul_i32(V::add_i32(low_sum, high_sum), V::set1_i32(-128));
      V::store_i32(group->first + l, first);
    }
    to += octets * 2 * quad_bytes;
  }
}

// R rows x N vectors of outputs from output `lane` of the strip on.
template <class V, int R, int N>
ZP_NOINLINE void centered_tile(const CenteredTile& tile, int lane) {
  const CenteredTile t = tile;
  const int8_t *a = t.x, *w = t.w + 4 * lane;
  const CenteredGroup* group = t.group;
  const char* ahead = t.ahead;
  float* y = t.sum + lane;
  typename V::f32 sum[R][N];
  load_sums<V>(y, sum);
  for (int64_t g = 0; g < t.groups; g++, group++) {
    for (int64_t i = 0; i < t.ahead_lines; i++, ahead += 64) V::prefetch_far(ahead);
    typename V::i32 acc[R][N];
    ZP_EACH(v, N) {
      const auto first = V::load_i32(group->first + lane + v * V::lanes);
      ZP_EACH(r, R) acc[r][v] = first;
    }
    const int64_t k = g == t.groups - 1 ? t.last_k : t.k;
    for (int64_t i = 0; i < k; i += 8, a += 8, w += 8 * kStrip)
      ZP_EACH(h, 2) {
        typename V::i32 wv[N];
        ZP_EACH(v, N) wv[v] = V::load_i32(w + h * 4 * kStrip + v * 4 * V::lanes);
        ZP_EACH(r, R) {
          int32_t quad;
          __builtin_memcpy(&quad, a + r * t.x_stride + 4 * h, 4);
          const auto av = V::set1_i32(quad);
          ZP_EACH(v, N)
            acc[r][v] = V::unsigned_rows ? V::dot_codes(acc[r][v], av, wv[v])
                                         : V::dot_codes(acc[r][v], wv[v], av);
        }
      }
    ZP_EACH(v, N) {
      const auto scale = V::template load<F32>(group->scale, lane + v * V::lanes);
      ZP_EACH(r, R) {
        const auto part = V::to_f32(acc[r][v]);
        const int64_t at = r * kPanel + v * V::lanes;
        if constexpr (V::keep_sums)
          sum[r][v] = V::fma(part, scale, sum[r][v]);
        else
          V::template store<F32>(y, at, V::fma(part, scale, V::template load<F32>(y, at)));
      }
    }
  }
  store_sums<V>(y, sum);
}

// A row of integers to what the kernel reads, `flip` (0x80 or 0) making signed ones unsigned or the
// other way round, each group padded with zeros to octets; and what accumulators start at, unless
// that is null.
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
  if (!start) return;
  // Sums of four, a vector at a time, then of groups.
  constexpr int64_t some = 256;
  int32_t fours[some];
  const int64_t quads = w.group_padded / 4, all = (to - a) / 4;
  const int32_t zero = int32_t(w.zero) - (w.bytes ? V::byte_offset : 0);
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
        start[g] = int32_t(uint32_t(-zero) * uint32_t(total));
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
