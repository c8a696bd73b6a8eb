// The contract of the core: arguments, layouts, ranges, rounding, overflow bounds.
//
// The core knows no Python and no torch: it takes addresses, shapes and strides. Every function
// returns, on every instruction set and at every thread count, the bits of zeropoint/reference.py.
//
//   real = scale * (q - zero_point)
//   y[m][n] = float(acc - correction) * (scale_x[m] * scale_w[n]) + bias[n]
//   acc = sum over k of q_x[m][k] * q_w[n][k]        q_x unsigned, q_w signed, both 8 bits
//   correction = zero_x[m] * sum_w[n] + zero_w[n] * (sum_x[m] - K * zero_x[m])
//
// Rounding: to nearest, ties to even, once an operation; no contraction of multiply and add. The
// floating-point environment of the caller (flush-to-zero, rounding mode) is put aside meanwhile.
//
// Overflow: with |q_x| <= 255 and |q_w| <= 128, |acc| <= 32640 K, which fits int32 up to K = 65793;
// the true sum with weight zero points is within 255 * 255 * K, which fits up to K = 33025. The
// correction multiplies pairs of int16 (sum_w = 128 p + r with |r| <= 64), which needs |p| <= K <=
// 32767: that is the bound kNarrowMaxK of the kernels. Intermediate int32 arithmetic may wrap; the
// result is exact because the true value fits. Beyond, K is cut into parts, added in int64.
#pragma once

#include <cstddef>
#include <cstdint>

namespace zp {

enum Type : int { F32 = 0, BF16 = 1, F16 = 2, U8 = 3, S8 = 4, I32 = 5 };

constexpr int kPanel = 64;  // outputs whose weights lie together
constexpr int kStep = 64;   // k is padded with zeros to a multiple of this
constexpr int64_t kNarrowMaxK = 32767;
constexpr int64_t kPartK = 32704;  // the largest multiple of kStep within it

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
inline int64_t ceil_div(int64_t value, int64_t step) { return (value + step - 1) / step; }

// Weights for the hardware, one layout for every instruction set: [N/64][K/4][64 lanes][4 bytes],
// N padded to 64 and K to kStep with zeros. Scales, sums and zero points are padded alike.
struct PackedInt8 {
  int64_t n = 0, k = 0, k_padded = 0, panels = 0;
  bool is_unsigned = false;  // the integers came as uint8; packed as int8, lowered by 128
  int8_t* weight = nullptr;
  float* scale = nullptr;         // [panels * 64]
  int16_t* sum = nullptr;         // [panels * 64][2] r and p, sum over k of q_w = 128 p + r
  int64_t* sum64 = nullptr;       // the sum itself; only where k is beyond kNarrowMaxK
  int32_t* zero_point = nullptr;  // [panels * 64], or null if all are zero

  PackedInt8(const void* integers, bool is_unsigned, int64_t n, int64_t k, const float* scale,
             const int32_t* zero_point, bool per_channel);
  ~PackedInt8();
  PackedInt8(const PackedInt8&) = delete;
  PackedInt8& operator=(const PackedInt8&) = delete;

  void unpack(void* integers) const;
  size_t nbytes() const;
  bool narrow() const { return k <= kNarrowMaxK; }
  const int8_t* panel(int64_t p) const { return weight + p * k_padded * kPanel; }
};

// Float weights for the hardware: [N/64][K][64 lanes], float32 or bfloat16, N padded with zeros.
struct PackedFloat {
  int64_t n = 0, k = 0, panels = 0;
  Type type = F32;
  void* weight = nullptr;

  PackedFloat(const void* weights, Type type, int64_t n, int64_t k);
  ~PackedFloat();
  PackedFloat(const PackedFloat&) = delete;
  PackedFloat& operator=(const PackedFloat&) = delete;

  void unpack(void* weights) const;
  size_t nbytes() const;
};

// Weights in groups along k for the hardware. A code is the integer less the smallest one: 0..15
// for weights of up to four bits, else 0..255. Panels of 64 outputs; in each, for each group in
// turn, a record: codes [k/8][64 lanes][4 bytes], of eight k the first four in the low halves of
// the bytes, or [k/4][64 lanes][4 bytes] where a code takes a byte, k padded to eight by zero
// points; then 64 scales; then 64 zero points (as codes, a byte each), unless all weights have one.
//
//   integers: y[m][n] = fma(-zero_x[m], C[n], sum over g, in order, fma(float(acc[g]), scale[n][g],
//             sum)) * scale_x[m] + bias[n]
//             acc[g] = sum over k in g of q_x[m][k] * (code[n][k] - zero[n][g]), q_x signed
//             C[n] the same sum with q_x = 1
//   floats:   y[m][n] = sum over g, in order, fma(p[g], scale[n][g], sum) + bias[n]
//             p[g] = chain over k in g of fma(x[m][k], float(code[n][k] - zero[n][g]), p)
//
// Overflow: |q_x| <= 128 and codes below 16, so |acc| <= 1920 k, within int32 up to k = 1118481:
// the bound kMaxGroup. Codes below 256: 32640 k, up to 65793: kMaxBytesGroup.
constexpr int64_t kMaxGroup = 1 << 20, kMaxBytesGroup = 1 << 16;

// k that many rows are multiplied with at a time. So that the weights stay in the first cache: of
// half a panel of integers, and of a panel of floats. In the second: of a panel of codes.
constexpr int64_t kIntPart = 384, kFloatPart = 128, kCodedPart = 2048;

struct PackedGroups {
  int64_t n = 0, k = 0, group = 0, groups = 0, panels = 0;
  int64_t group_padded = 0;  // to octets
  int64_t record_bytes = 0, panel_bytes = 0;
  Type scale_type = F32;  // F32, BF16 or F16
  bool bytes = false;     // codes take a byte each
  int32_t zero = -1;      // the zero point of all weights, or -1: each group has its own
  uint8_t* weight = nullptr;
  float* sum = nullptr;  // C, [panels * 64]

  // codes [n][k] of `bits` bits; scale [n][groups] of scale_type; zero_point [n][groups], as codes.
  PackedGroups(const uint8_t* codes, int bits, int64_t n, int64_t k, int64_t group,
               const void* scale, Type scale_type, const int32_t* zero_point);
  ~PackedGroups();
  PackedGroups(const PackedGroups&) = delete;
  PackedGroups& operator=(const PackedGroups&) = delete;

  void unpack(uint8_t* codes) const;
  size_t nbytes() const;
  int64_t size_of(int64_t g) const { return g < groups - 1 ? group : k - g * group; }
  const uint8_t* record(int64_t p, int64_t g) const {
    return weight + p * panel_bytes + g * record_bytes;
  }
  int64_t codes_bytes(int64_t count) const {  // of so many k
    return round_up(count, 8) * (bytes ? kPanel : kPanel / 2);
  }
  // Code i of a group: in which byte of its record, and how far up in it.
  int64_t place(int64_t i, int64_t lane) const {
    return i / (bytes ? 4 : 8) * (4 * kPanel) + lane * 4 + i % 4;
  }
  int shift(int64_t i) const { return bytes ? 0 : int(i % 8 / 4 * 4); }
  bool paired() const { return group <= 480; }  // half the sum of a group fits int16
  int64_t part(int64_t k) const { return group >= k ? 1 : k / group; }  // groups of some k
};

// What follows the sum and the bias: y = activation(x A^T + b) + residual, in float32.
enum Activation : int { None = 0, ReLU = 1, GELU = 2, SiLU = 3 };

struct Post {
  Activation activation = None;
  const void* residual =
      nullptr;  // [rows][residual_stride] of y's type (float types only), or null
  int64_t residual_stride = 0;
  bool any() const { return activation != None || residual; }
};

// What the epilogue needs of a row of quantized activations.
struct Row {
  float scale;         // NaN for a row that holds NaN (or, dynamic, +-Inf): makes all outputs NaN
  int32_t zero_point;  // 0..255
  int32_t centered;    // sum_x - K * zero_point, modulo 2^32; only where weights have zero points
};

// Rows of quantized activations times panels of packed weights.
struct Int8Block {
  const PackedInt8* w;
  int64_t panel_begin, panel_end;
  const uint8_t* a;  // [rows][a_stride]; readable up to a multiple of the kernel's k_step
  int64_t a_stride;
  int64_t k_begin, k_end;  // k_begin a multiple of kStep; the whole of k but for the wide path
  const Row* row;
  int64_t rows;
  const float* bias;  // [panels * 64], or null
  void* y;            // [rows][y_stride], Type y_type; column 0 is output 0
  int64_t y_stride;
  Type y_type;            // I32: raw accumulators (of a - a_offset), no epilogue
  float y_inverse_scale;  // for U8 and S8
  int32_t y_zero_point;
  Post post;
};

// Rows of float activations times panels of packed weights: float32, bfloat16, or 8-bit integers
// that become floats on the way.
struct FloatBlock {
  const void* w;  // of PackedFloat or PackedInt8
  Type w_type;    // F32, BF16 or S8
  int64_t n, k, k_padded;
  const int32_t* zero_point;  // of integer weights, or null
  const float* scale;         // of integer weights, else null
  int64_t panel_begin, panel_end;
  const float* x;  // [rows][x_stride]
  int64_t x_stride;
  int64_t rows;
  const float* bias;  // [panels * 64], or null
  void* y;
  int64_t y_stride;
  Type y_type;
  float* scratch;  // float_scratch(rows) floats
  Post post;
};

// Rows of activations, signed integers or floats, times panels of weights in groups.
struct GroupBlock {
  const PackedGroups* w;
  int64_t panel_begin, panel_end;
  const void* x;  // bytes, each group padded to octets; or float32, where `row` is null
  int64_t x_stride;
  bool centered;         // bytes: weights are made less their zero points first, for many rows
  const int32_t* start;  // [rows][groups], by Isa::prepare_groups; unless centered
  const Row* row;        // of bytes; zero_point is that of signed ones
  int64_t rows;
  const float* bias;  // [panels * 64], or null
  void* y;
  int64_t y_stride;
  Type y_type;     // F32, BF16 or F16
  float* sum;      // [rows][64]
  float* scratch;  // group_scratch(*w) floats
  Post post;
};

inline int64_t group_scratch(const PackedGroups& w) {
  const int64_t floats = w.part(kFloatPart) * w.group_padded;
  const int64_t ints = w.part(kIntPart) * (w.group_padded / 8 + 1);
  return kPanel * (floats > ints ? floats : ints);
}

// One row of floats to unsigned 8-bit integers. `q` has room for k rounded up to kStep; what lies
// beyond k is filled with zeros.
struct QuantizeRow {
  const void* x;
  int64_t k;
  uint8_t* q;
  float scale;         // given for static quantization, else unused
  int32_t zero_point;  // likewise
};

// One row of floats times `factor`, then rotated.
struct TransformRow {
  const void* x;
  int64_t k;
  const float* factor;  // [k]
  int64_t size;         // of the runs that are rotated, a power of two that divides k; 1 for none
  float* room;          // for a run, or a vector of them; null where y is float32
  void* y;              // of x's type
};

// What the hardware could do at best (kernel_limits.h). Each runs `rounds` rounds and returns the
// work done: multiply-adds, or bytes.
struct Limits {
  int64_t (*int8)(int64_t rounds);
  int64_t (*float32)(int64_t rounds);
  int64_t (*bfloat16)(int64_t rounds);  // null, or 0 where this CPU has no instruction for it
  int64_t (*read[2])(const void* data, int64_t bytes, int64_t rounds);  // without, with prefetch
};

// What an instruction set provides. One object of this type in each linear_<isa>.cpp.
struct Isa {
  const char* name;
  bool (*supported)();  // the CPU has it and the operating system enabled it
  int k_step;           // activations must be readable up to a multiple of this
  int row_step;         // rows are split among threads in multiples of this
  int a_offset;         // 0, or 128: the kernel lowers activations to int8 before it multiplies
  float gmacs;          // rough speed of one core, int8, billions of multiply-adds a second
  float float_gmacs;    // the same with float activations
  void (*quantize_dynamic[3])(const QuantizeRow&, Row*);  // by Type of x
  void (*quantize_static[3])(const QuantizeRow&, Row*);
  void (*transform[3])(const TransformRow&);  // by Type of x
  void (*int8_block)(const Int8Block&);
  void (*float_block)(const FloatBlock&);
  void (*group_block)(const GroupBlock&);
  void (*prepare_groups)(const PackedGroups& w, const uint8_t* q, uint8_t flip, int8_t* a,
                         int32_t* start);
  int coded_rows;      // of integers: the most that read weights as they are packed
  bool unsigned_rows;  // beyond, with `centered`: whether they are to be unsigned
  // Null, or: a row of quantized activations to the form the kernel reads, of 2 bytes each.
  void (*widen)(const uint8_t* q, int64_t k_padded, uint8_t* to);
  Limits limits;
};

inline int64_t float_scratch(int64_t rows) { return (kFloatPart + rows) * kPanel; }

// dispatch.cpp
const Isa& active_isa();
int count_isas();
const Isa& isa_at(int index);  // supported here, best first
bool force_isa(const char* name);

// linear.cpp. `threads` is an upper bound. A null bias means none.
struct Input {
  const void* x;
  Type type;
  int64_t rows, stride;
};
void linear_dynamic(const PackedInt8& w, const Input& x, const float* bias, const Post& post,
                    void* y, int threads);
void linear_static(const PackedInt8& w, const Input& x, float scale, int32_t zero_point,
                   const float* bias, const Post& post, void* y, int threads);
// Integer activations (U8 or S8) to float32.
void linear_integer(const PackedInt8& w, const Input& q, float scale, int32_t zero_point,
                    const float* bias, const Post& post, float* y, int threads);
// Integer activations to integers of the same type.
void linear_quantized(const PackedInt8& w, const Input& q, float scale, int32_t zero_point,
                      const float* bias, Activation activation, void* y, float y_scale,
                      int32_t y_zero_point, int threads);
void linear_weight_only(const PackedInt8& w, const Input& x, const float* bias, const Post& post,
                        void* y, int threads);
// The same with weights in groups (linear_groups.cpp).
void linear_dynamic(const PackedGroups& w, const Input& x, const float* bias, const Post& post,
                    void* y, int threads);
void linear_static(const PackedGroups& w, const Input& x, float scale, int32_t zero_point,
                   const float* bias, const Post& post, void* y, int threads);
void linear_integer(const PackedGroups& w, const Input& q, float scale, int32_t zero_point,
                    const float* bias, const Post& post, float* y, int threads);
void linear_weight_only(const PackedGroups& w, const Input& x, const float* bias, const Post& post,
                        void* y, int threads);
void linear_float(const PackedFloat& w, const Input& x, const float* bias, const Post& post,
                  void* y, int threads);

// transform.cpp: y[m][...] = the Walsh-Hadamard transform, in float32, of each run of `size`
// entries of x[m][...] * factor[...], rounded to x's type. Not scaled; `size` 1 leaves it out.
void transform_input(const Input& x, int64_t k, const float* factor, int64_t size, void* y,
                     int threads);

}  // namespace zp
