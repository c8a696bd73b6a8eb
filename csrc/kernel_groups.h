// Weights in groups: rows of activations times panels of weights. Needs kernel_groups_int.h and
// kernel_groups_float.h.

// `count` groups of panel p from group g on, no rows yet.
template <class V>
ZP_INLINE GroupTile tile_of(const GroupBlock& b, int64_t p, int64_t g, int64_t count) {
  const PackedGroups& w = *b.w;
  GroupTile t{};
  t.groups = w.groups - g < count ? w.groups - g : count;
  t.record = w.record(p, g);
  t.record_bytes = w.record_bytes;
  t.k = w.group;
  t.last_k = w.size_of(g + t.groups - 1);
  t.bytes = w.bytes;
  t.x_stride = b.x_stride;
  t.start_stride = w.groups;
  t.zero = w.zero;
  t.scale_type = w.scale_type;
  return t;
}

// Rows in equal blocks of at most `most`.
struct RowBlocks {
  int64_t count, base, longer;
  RowBlocks(int64_t rows, int most)
      : count(ceil_div(rows, most)), base(rows / count), longer(rows % count) {}
  int rows(int64_t i) const { return int(base + (i < longer)); }
};

// The part that comes next lies behind this one: share i of `shares` of it, while this one
// multiplies.
template <class V>
ZP_INLINE void fetch_next(const GroupTile& t, int64_t i, int64_t shares) {
  const int64_t bytes = t.groups * t.record_bytes, end = bytes * (i + 1) / shares;
  for (int64_t at = bytes * i / shares; at < end; at += 64) V::prefetch_far(t.record + bytes + at);
}

// The part that comes next lies behind this one: it is fetched while this one multiplies, some
// lines with each group of each of `tiles` tiles.
template <class Tile>
struct Ahead {
  const char* end;
  Ahead(Tile& tile, const GroupTile& part, int64_t tiles) {
    const int64_t bytes = part.groups * part.record_bytes;
    tile.ahead = reinterpret_cast<const char*>(part.record) + bytes;
    tile.ahead_lines = ceil_div(bytes, 64 * tiles * part.groups);
    end = tile.ahead + bytes;
  }
  void next(Tile& tile) const {
    tile.ahead += 64 * tile.ahead_lines * tile.groups;
    if (tile.ahead >= end) tile.ahead_lines = 0;
  }
};

template <class V, Codes C, Zero Z, int R = V::group_rows>
ZP_INLINE void int_rows(int rows, GroupTile& t, int end, const Ahead<GroupTile>& ahead) {
  if constexpr (R > 1) {
    if (rows < R) return int_rows<V, C, Z, R - 1>(rows, t, end, ahead);
  }
  for (int lane = 0; lane < end; lane += V::group_vecs(R) * V::lanes) {
    group_int_tile<V, R, C, Z>(t, lane);
    ahead.next(t);
  }
}

// Integers as their codes lie. What several blocks of rows read in turn is to stay in the second
// cache.
template <class V, Codes C, Zero Z>
void int_panel(const GroupBlock& b, int64_t p, int end) {
  const PackedGroups& w = *b.w;
  const RowBlocks blocks(b.rows, V::group_rows);
  const int64_t part = blocks.count == 1 ? w.groups : w.part(kCodedPart);
  const int width = V::group_vecs(int(b.rows / blocks.count)) * V::lanes;
  for (int64_t g = 0; g < w.groups; g += part) {
    GroupTile t = tile_of<V>(b, p, g, part);
    const Ahead<GroupTile> ahead(t, t, blocks.count * ceil_div(end, width));
    if (blocks.count == 1) t.ahead_lines = 0;
    for (int64_t i = 0, m = 0; i < blocks.count; m += blocks.rows(i++)) {
      t.x = static_cast<const int8_t*>(b.x) + m * b.x_stride + g * w.group_padded;
      t.start = b.start + m * w.groups + g;
      t.sum = b.sum + m * kPanel;
      int_rows<V, C, Z>(blocks.rows(i), t, end, ahead);
    }
  }
}

template <class V, int R = V::group_rows>
ZP_INLINE void centered_rows(int rows, CenteredTile& t, int end, const Ahead<CenteredTile>& ahead) {
  if constexpr (R > 1) {
    if (rows < R) return centered_rows<V, R - 1>(rows, t, end, ahead);
  }
  constexpr int vecs = V::group_vecs(R), most = kStrip / V::lanes;
  constexpr int N = vecs < most ? vecs : most;
  for (int lane = 0; lane < end; lane += N * V::lanes) {
    centered_tile<V, R, N>(t, lane);
    ahead.next(t);
  }
}

// Integers less their zero points, some groups of a strip at a time.
template <class V>
void centered_panel(const GroupBlock& b, int64_t p, int end) {
  const PackedGroups& w = *b.w;
  const RowBlocks blocks(b.rows, V::group_rows);
  const int64_t part = w.part(kIntPart);
  CenteredGroup* group = reinterpret_cast<CenteredGroup*>(b.scratch);
  int8_t* centered = reinterpret_cast<int8_t*>(group + part);
  for (int64_t g = 0; g < w.groups; g += part) {
    const GroupTile from = tile_of<V>(b, p, g, part);
    CenteredTile t{};
    t.w = centered;
    t.group = group;
    t.k = from.k;
    t.groups = from.groups;
    t.last_k = from.last_k;
    t.x_stride = b.x_stride;
    const Ahead<CenteredTile> ahead(t, from, blocks.count * ceil_div(end, kStrip));
    for (int strip = 0; strip < end; strip += kStrip) {
      center_codes<V>(from, strip, centered, group);
      const int width = end - strip < kStrip ? end - strip : kStrip;
      for (int64_t i = 0, m = 0; i < blocks.count; m += blocks.rows(i++)) {
        t.x = static_cast<const int8_t*>(b.x) + m * b.x_stride + g * w.group_padded;
        t.sum = b.sum + m * kPanel + strip;
        centered_rows<V>(blocks.rows(i), t, width, ahead);
      }
    }
  }
}

template <class V, Codes C, bool Sub, int R = V::float_rows>
ZP_INLINE void float_rows(int rows, const GroupTile& t, int lane) {
  if constexpr (R > 1) {
    if (rows < R) return float_rows<V, C, Sub, R - 1>(rows, t, lane);
  }
  group_float_tile<V, R, C, Sub>(t, lane);
}

template <class V, Codes C, bool Sub>
void float_panel(const GroupBlock& b, int64_t p, int end) {
  const PackedGroups& w = *b.w;
  const RowBlocks blocks(b.rows, V::float_rows);
  const int64_t part = blocks.count == 1 ? w.groups : w.part(kFloatPart);
  for (int64_t g = 0; g < w.groups; g += part) {
    GroupTile t = tile_of<V>(b, p, g, part);
    if constexpr (C == Centered) {
      w.bytes ? center_floats<V, Bytes>(t, b.scratch) : center_floats<V, Nibbles>(t, b.scratch);
      t.centered = b.scratch;
    }
    for (int lane = 0; lane < end; lane += V::float_vecs * V::lanes)
      for (int64_t i = 0, m = 0; i < blocks.count; m += blocks.rows(i++)) {
        t.x = static_cast<const float*>(b.x) + m * b.x_stride + g * w.group;
        t.sum = b.sum + m * kPanel;
        if constexpr (C == Centered)
          if (lane == 0) fetch_next<V>(t, i, blocks.count);
        float_rows<V, C, Sub>(blocks.rows(i), t, lane);
      }
  }
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

template <class V, Codes C>
ZP_INLINE void int_panel_with(const GroupBlock& b, int64_t p, int end) {
  if (b.w->zero >= 0) return int_panel<V, C, OneZero>(b, p, end);
  b.w->paired() ? int_panel<V, C, PairedZero>(b, p, end) : int_panel<V, C, ScaledZero>(b, p, end);
}

template <class V>
ZP_INLINE void panel_with(const GroupBlock& b, int64_t p, int end) {
  if (b.row) {
    if (b.centered) return centered_panel<V>(b, p, end);
    return b.w->bytes ? int_panel_with<V, Bytes>(b, p, end) : int_panel_with<V, Nibbles>(b, p, end);
  }
  if (b.rows > V::float_rows) return float_panel<V, Centered, false>(b, p, end);
  if (b.w->bytes) return float_panel<V, Bytes, true>(b, p, end);
  b.w->zero >= 0 ? float_panel<V, Nibbles, false>(b, p, end)
                 : float_panel<V, Nibbles, true>(b, p, end);
}

template <class V>
void group_block(const GroupBlock& b) {
  for (int64_t p = b.panel_begin; p < b.panel_end; p++) {
    for (int64_t i = 0; i < b.rows * kPanel; i += V::lanes)
      V::template store<F32>(b.sum, i, V::zero_f32());
    panel_with<V>(b, p, int(b.w->n - p * kPanel < kPanel ? b.w->n - p * kPanel : kPanel));
    switch (b.y_type) {
      case BF16: finish_groups<V, BF16>(b, p, b.sum); break;
      case F16: finish_groups<V, F16>(b, p, b.sum); break;
      default: finish_groups<V, F32>(b, p, b.sum); break;
    }
  }
}
