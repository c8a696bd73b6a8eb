// Problems to solve: ordinary ones, which the tests make extreme.
#pragma once

#include <random>

#include "harness.h"

namespace inputs {

using namespace oracle;
using zp::BF16;
using zp::F16;
using zp::F32;
using zp::S8;
using zp::U8;

constexpr Mode kFloatModes[] = {Dynamic, Static, WeightOnly, Float};
constexpr zp::Type kFloats[] = {F32, BF16, F16};
constexpr zp::Type kBytes[] = {U8, S8};

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  int integer(int low, int high) {
    return low + int(engine_() % uint32_t(int64_t(high) - low + 1));
  }
  float uniform() { return float(engine_() >> 8) / 16777216.0f; }
  float gaussian() {  // nearly
    float sum = 0;
    for (int i = 0; i < 12; i++) sum += uniform();
    return sum - 6.0f;
  }

 private:
  std::mt19937 engine_;  // the same numbers everywhere
};

using Shape = std::vector<int64_t>;  // m, k, n

// An ordinary problem: weights over the full range, activations gaussian or over the full range.
inline Problem make(Mode mode, zp::Type type, const Shape& shape, uint32_t seed = 1) {
  Random random(seed);
  Problem p;
  p.mode = mode;
  p.type = type;
  p.m = shape[0];
  p.k = shape[1];
  p.n = shape[2];
  for (int64_t i = 0; i < p.m * p.k; i++)
    p.x.push_back(type == U8 || type == S8 ? uint32_t(random.integer(0, 255))
                                           : encode(type, random.gaussian()));
  for (int64_t i = 0; i < p.n * p.k; i++) p.w.push_back(random.integer(-128, 127));
  for (int64_t i = 0; i < p.n; i++) {
    p.w_scale.push_back(0.001f + 0.02f * random.uniform());
    p.w_zero.push_back(0);
    p.bias.push_back(random.gaussian());
  }
  p.w_type = type == F32 ? F32 : BF16;
  for (int64_t i = 0; mode == Float && i < p.n * p.k; i++)
    p.float_w.push_back(encode(p.w_type, random.gaussian()));
  p.x_scale = 0.02f;
  p.x_zero = type == S8 ? -28 : 100;
  p.y_scale = 0.3f * std::sqrt(float(p.k + 1));
  p.y_zero = type == S8 ? -38 : 90;
  return p;
}

// Every mode with every type that it takes.
template <class F>
void every_mode(const Shape& shape, const F& f) {
  for (const Mode mode : kFloatModes)
    for (const zp::Type type : kFloats) f(make(mode, type, shape));
  for (const Mode mode : {Integer, Quantized})
    for (const zp::Type type : kBytes) f(make(mode, type, shape));
}

inline void set_row(Problem& p, int64_t m, float v) {
  for (int64_t k = 0; k < p.k; k++) p.x[m * p.k + k] = encode(p.type, v);
}

}  // namespace inputs
