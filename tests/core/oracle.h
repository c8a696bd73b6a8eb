// The definition of every call of the core, as triple loops that anyone can check by eye. Slow, and
// shares no code with what it judges: integers are summed in int64, floats are rounded once an
// operation (this is compiled with -ffp-contract=off), 16-bit floats are taken apart by arithmetic.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "zeropoint.h"

namespace oracle {

using zp::Type;

enum Mode { Dynamic, Static, Integer, Quantized, WeightOnly, Float };

// ---- numbers as their bits ("codes") ------------------------------------------------------------

struct Format {
  int exponent_bits, mantissa_bits;
};
inline Format format(Type type) { return type == zp::BF16 ? Format{8, 7} : Format{5, 10}; }

inline uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

// The float that a code means.
inline float decode(Type type, uint32_t code) {
  if (type == zp::F32) return float_of(code);
  if (type == zp::U8) return float(code);
  if (type == zp::S8) return float(int8_t(code));
  const Format f = format(type);
  const int bias = (1 << (f.exponent_bits - 1)) - 1, top = (1 << f.exponent_bits) - 1;
  const int sign = code >> 15, exponent = int(code >> f.mantissa_bits) & top;
  const int mantissa = int(code) & ((1 << f.mantissa_bits) - 1);
  double v;
  if (exponent == top)
    v = mantissa ? NAN : INFINITY;
  else if (exponent == 0)
    v = std::ldexp(double(mantissa), 1 - bias - f.mantissa_bits);
  else
    v = std::ldexp(double(mantissa + (1 << f.mantissa_bits)), exponent - bias - f.mantissa_bits);
  return float(sign ? -v : v);
}

// The code of the nearest number, ties to even.
inline uint32_t encode(Type type, float v) {
  if (type == zp::F32) return bits_of(v);
  const Format f = format(type);
  const int bias = (1 << (f.exponent_bits - 1)) - 1;
  const uint32_t infinity = uint32_t((1 << f.exponent_bits) - 1) << f.mantissa_bits;
  const uint32_t sign = std::signbit(v) ? 0x8000 : 0;
  if (std::isnan(v)) return infinity | (1u << (f.mantissa_bits - 1));
  if (std::isinf(v)) return sign | infinity;
  const double magnitude = std::fabs(double(v));
  const int exponent = magnitude == 0 ? 1 - bias : std::max(std::ilogb(magnitude), 1 - bias);
  // How many of the smallest steps at this exponent. 2^(mantissa_bits + 1) carries into the next.
  const double steps = std::nearbyint(std::ldexp(magnitude, f.mantissa_bits - exponent));
  const uint32_t code = (uint32_t(exponent + bias - 1) << f.mantissa_bits) + uint32_t(steps);
  return sign | std::min(code, infinity);
}

inline bool is_nan(Type type, uint32_t code) {
  return type <= zp::F16 && std::isnan(decode(type, code));
}

// ---- the calls ----------------------------------------------------------------------------------

struct Problem {
  Mode mode = Dynamic;
  int64_t m = 0, k = 0, n = 0;
  Type type = zp::F32;      // of x; of y too, but for Integer, whose y is F32
  std::vector<uint32_t> x;  // codes, [m][k]
  int64_t stride = -1;      // elements from row to row of x as it lies in memory; -1: k
  std::vector<int> w;       // [n][k]
  bool w_unsigned = false, per_channel = true;
  Type w_type = zp::F32;          // of Float
  std::vector<uint32_t> float_w;  // likewise: codes, [n][k]
  std::vector<float> w_scale;     // [n], or [1]
  std::vector<int32_t> w_zero;
  int bits = 4;  // of the codes, with groups
  int64_t group =
      0;  // 0: none. Else w are codes, and there is a w_zero for each group, [n][groups]
  Type scale_type = zp::F32;
  std::vector<uint32_t> group_scale;  // codes of scale_type, [n][groups]
  bool has_bias = true;
  std::vector<float> bias;
  float x_scale = 0.02f, y_scale = 0.5f;
  int32_t x_zero = 0, y_zero = 0;
  zp::Activation activation = zp::None;
  std::vector<uint32_t> residual;  // codes of y's type, [m][n], or empty
  int64_t residual_stride = 0;
  bool dull = false;  // inputs or outputs that do not vary are meant

  Type y_type() const { return mode == Integer ? zp::F32 : type; }
  int64_t groups() const { return (k + group - 1) / group; }
};

inline int clamp_round(float v, int zero, int low, int high) {
  if (std::isnan(v)) return low;
  const float steps = std::nearbyint(v);
  if (steps < float(low - zero)) return low;
  if (steps > float(high - zero)) return high;
  return int(steps) + zero;
}

struct QuantizedRow {
  std::vector<int> q;
  float scale;
  int zero;
  bool valid;  // else all outputs of the row are NaN
};

inline QuantizedRow quantize(const Problem& p, int64_t m) {
  QuantizedRow row{std::vector<int>(size_t(p.k)), p.x_scale, p.x_zero, true};
  std::vector<float> x(size_t(p.k));
  float lowest = 0, highest = 0;
  for (int64_t k = 0; k < p.k; k++) {
    const float v = x[k] = decode(p.type, p.x[m * p.k + k]);
    if (std::isnan(v) || (p.mode == Dynamic && std::isinf(v))) row.valid = false;
    if (v < lowest) lowest = v;
    if (v > highest) highest = v;
  }
  if (!row.valid) return row;
  if (p.mode == Integer || p.mode == Quantized) {
    for (int64_t k = 0; k < p.k; k++) row.q[k] = int(x[k]);
    return row;
  }
  if (p.mode == Dynamic) {
    const float high_part = highest / 255.0f, low_part = lowest / 255.0f;
    row.scale = high_part - low_part;
    if (row.scale < 1.17549435e-38f) row.scale = 1.17549435e-38f;  // the smallest normal
    const float inverse = 1.0f / row.scale;
    row.zero = clamp_round(-lowest * inverse, 0, 0, 255);
  }
  const float inverse = 1.0f / row.scale;
  for (int64_t k = 0; k < p.k; k++)
    row.q[k] = p.mode == Static ? clamp_round(std::fma(x[k], inverse, float(row.zero)), 0, 0, 255)
                                : clamp_round(x[k] * inverse, row.zero, 0, 255);
  return row;
}

// exp(x), x clamped to [-87, 87], after Cephes' expf.
inline float exponential(float x) {
  if (!(x > -87.0f)) x = -87.0f;
  if (!(x < 87.0f)) x = 87.0f;
  const float n = std::nearbyint(x * 1.44269504f);
  float r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  for (const float coefficient :
       {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    p = p * r + coefficient;
  p = p * (r * r) + r + 1.0f;
  return p * std::ldexp(1.0f, int(n));
}

inline float activate(zp::Activation activation, float x) {
  if (activation == zp::ReLU) return x < 0 ? 0.0f : x;
  if (activation == zp::SiLU) {
    const float numerator = x < -87.0f ? -87.0f : x;
    return numerator / (exponential(0.0f - x) + 1.0f);
  }
  if (activation == zp::GELU) {  // x times the normal distribution, Abramowitz and Stegun 7.1.26
    const float z = (x > 0.0f - x ? x : 0.0f - x) * 0.707106781f;
    const float t = 1.0f / (z * 0.3275911f + 1.0f);
    float p = 1.061405429f;
    for (const float coefficient : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f})
      p = p * t + coefficient;
    const float tail = p * t * exponential(0.0f - z * z) * 0.5f;
    const float bounded = x < -64.0f ? -64.0f : x > 64.0f ? 64.0f : x;
    const float part = bounded * tail;
    return x < 0 ? part : x - part;
  }
  return x;
}

// Output n of a row before its bias, of weights in groups.
inline float of_groups(const Problem& p, const QuantizedRow& row, int64_t m, int64_t n) {
  const int lower = p.mode == Integer && p.type == zp::S8 ? 0 : 128;  // to signed integers
  float total = 0, ones = 0;
  for (int64_t g = 0; g < p.groups(); g++) {
    const float scale = decode(p.scale_type, p.group_scale[n * p.groups() + g]);
    float chain = 0;
    int64_t sum = 0, sum_of_ones = 0;
    for (int64_t k = g * p.group; k < std::min(p.k, (g + 1) * p.group); k++) {
      const int w = p.w[n * p.k + k] - p.w_zero[n * p.groups() + g];
      if (p.mode == WeightOnly) {
        chain = std::fma(decode(p.type, p.x[m * p.k + k]), float(w), chain);
      } else {
        sum += int64_t(row.q[k] - lower) * w;
        sum_of_ones += w;
      }
    }
    total = std::fma(p.mode == WeightOnly ? chain : float(sum), scale, total);
    ones = std::fma(float(sum_of_ones), scale, ones);
  }
  if (p.mode == WeightOnly) return total;
  return std::fma(-float(row.zero - lower), ones, total) * row.scale;
}

// Output n of a row before its bias, of other weights.
inline float of_channel(const Problem& p, const QuantizedRow& row, int64_t m, int64_t n) {
  if (p.mode == Float) {
    float sum = 0;
    for (int64_t k = 0; k < p.k; k++)
      sum =
          std::fma(decode(p.type, p.x[m * p.k + k]), decode(p.w_type, p.float_w[n * p.k + k]), sum);
    return sum;
  }
  const int w_zero = p.w_zero[p.per_channel ? n : 0];
  const float w_scale = p.w_scale[p.per_channel ? n : 0];
  if (p.mode == WeightOnly) {
    float sum = 0;
    for (int64_t k = 0; k < p.k; k++)
      sum = std::fma(decode(p.type, p.x[m * p.k + k]), float(p.w[n * p.k + k] - w_zero), sum);
    return sum * w_scale;
  }
  int64_t sum = 0;
  for (int64_t k = 0; k < p.k; k++)
    sum += int64_t(row.q[k] - row.zero) * (p.w[n * p.k + k] - w_zero);
  const float scale = row.scale * w_scale;
  return float(sum) * scale;
}

// Codes of y, [m][n].
inline std::vector<uint32_t> expected(const Problem& p) {
  const bool floats = p.mode == WeightOnly || p.mode == Float;
  std::vector<uint32_t> y(size_t(p.m * p.n));
  for (int64_t m = 0; m < p.m; m++) {
    QuantizedRow row;
    if (!floats) row = quantize(p, m);
    for (int64_t n = 0; n < p.n; n++) {
      float value = p.group ? of_groups(p, row, m, n) : of_channel(p, row, m, n);
      if (p.has_bias) value = value + p.bias[n];
      if (!floats && !row.valid) value = NAN;
      value = activate(p.activation, value);
      if (!p.residual.empty()) value = value + decode(p.y_type(), p.residual[m * p.n + n]);
      uint32_t& code = y[m * p.n + n];
      if (p.mode == Quantized) {
        const float inverse = 1.0f / p.y_scale;
        const int low = p.type == zp::U8 ? 0 : -128;
        code = uint8_t(clamp_round(value * inverse, p.y_zero, low, low + 255));
      } else {
        code = encode(p.y_type(), value);
      }
    }
  }
  return y;
}

}  // namespace oracle
