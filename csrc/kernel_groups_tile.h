// Weights in groups along k, each group with a scale and a zero point of its own: what the kernels
// of integers and of floats (kernel_groups_int.h, kernel_groups_float.h) share. A group is summed
// first, by itself; the sums times their scales are added in the order of the groups. Needs
// kernel_common.h.
//
// V provides, besides: group_rows rows at most, times group_vecs(rows) vectors: the register tile
// of integers, with keep_sums: whether there is room for the sums of floats beside those of
// integers. Where there is not, they are read and written once a group. coded_rows: the most rows
// that are quicker without centering the codes first. load_u8 and flip_bytes;
// low_codes and high_codes, the eight 4-bit codes of a lane as two times four bytes; dot_codes,
// four products of bytes of which the first are unsigned, the second signed, and those that were
// codes within -15..15; dot_bytes, the same of any bytes; lut_t and make_lut(zero);
// nibble<J>(octet, lut), code J of eight as a float, less the zero of the table.

// How weights lie before the kernel.
enum Codes {
  Nibbles,   // in records, two codes a byte
  Bytes,     // in records, a code a byte
  Centered,  // made floats beforehand for many rows, less their zero points
};

// How zero points come into the sum of codes times activations.
enum Zero {
  OneZero,     // all weights have the same: it starts at -zero * sum of activations
  PairedZero,  // one for each group; the sum of activations is two int16
  ScaledZero,  // the same, where groups are too long for that
};

constexpr int64_t kQuadBytes = 4 * kPanel;  // of a panel: four k as bytes, or eight as nibbles

// Some groups of a panel times R rows.
struct GroupTile {
  const uint8_t* record;  // of the first group
  int64_t record_bytes;   // to the next
  int64_t k, groups;      // of a full group; how many groups
  int64_t last_k;         // of the last of them
  bool bytes;             // codes lie a byte each
  const float* centered;  // of Centered: [k][64]
  const void* x;          // activations: int8, each group padded to octets; or floats
  int64_t x_stride;
  const int32_t* start;  // of integers: [rows][start_stride], what the accumulators start at
  int64_t start_stride;
  int64_t zero;  // OneZero: it
  Type scale_type;
  float* sum;           // [rows][64]
  const char* ahead;    // of integers: what to fetch meanwhile,
  int64_t ahead_lines;  // and how much of it a group

  // Of `count` k.
  int64_t codes_bytes(int64_t count) const {
    return ceil_div(count, 8) * kQuadBytes * (bytes ? 2 : 1);
  }
};

// Many rows of integers are multiplied with half a panel at a time: with more k of it than of a
// whole one, for the same room in the first cache, and so fewer visits to their sums.
constexpr int kStrip = kPanel / 2;

// What a strip has for each group.
struct CenteredGroup {
  int32_t first[kStrip];  // what accumulators start at
  float scale[kStrip];
};

// Some groups of a strip, less their zero points, times R rows.
struct CenteredTile {
  const int8_t* w;  // [k/4][32][4], groups padded to octets
  const CenteredGroup* group;
  int64_t k, groups, last_k;  // as in GroupTile
  const int8_t* x;            // activations, each group padded to octets
  int64_t x_stride;
  float* sum;           // [rows][64]
  const char* ahead;    // what to fetch meanwhile,
  int64_t ahead_lines;  // and how much of it a group
};

// Hides where an address comes from: the compiler would keep all that it once computed from it in
// registers, of vectors too, which accumulators need.
ZP_INLINE void recompute_address(float*& p) { __asm__("" : "+r"(p)); }

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
