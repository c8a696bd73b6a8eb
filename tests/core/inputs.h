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

// An ordinary problem of weights in groups: all codes of four bits, a zero point for each group.
inline Problem make_groups(Mode mode, zp::Type type, const Shape& shape, int64_t group,
                           zp::Type scale_type = F32, uint32_t seed = 1) {
  Problem p = make(mode, type, shape, seed);
  Random random(seed + 1);
  p.group = group;
  p.scale_type = scale_type;
  p.w_scale.clear();
  p.w_zero.clear();
  for (int& w : p.w) w = random.integer(0, 15);
  for (int64_t i = 0; i < p.n * p.groups(); i++) {
    p.group_scale.push_back(encode(scale_type, 0.001f + 0.02f * random.uniform()));
    p.w_zero.push_back(random.integer(0, 15));
  }
  return p;
}

inline Problem with_one_zero(Problem p, int zero = 8) {
  std::fill(p.w_zero.begin(), p.w_zero.end(), zero);
  return p;
}

// The same with codes of eight bits, of which the first are the old ones: outputs stay varied.
inline Problem with_bytes(Problem p, uint32_t seed = 3) {
  Random random(seed);
  p.bits = 8;
  for (int& w : p.w) w += 16 * random.integer(0, 15);
  for (auto& zero : p.w_zero) zero = random.integer(0, 255);
  return p;
}

// Every mode with every type that it takes; each type of scale with some of them.
template <class F>
void every_group_mode(const Shape& shape, int64_t group, const F& f) {
  int turn = int(group + shape[1]);
  for (const Mode mode : {Dynamic, Static, WeightOnly})
    for (const zp::Type type : kFloats)
      f(make_groups(mode, type, shape, group, kFloats[turn++ % 3]));
  for (const zp::Type type : kBytes)
    f(make_groups(Integer, type, shape, group, kFloats[turn++ % 3]));
}

inline void set_row(Problem& p, int64_t m, float v) {
  for (int64_t k = 0; k < p.k; k++) p.x[m * p.k + k] = encode(p.type, v);
}

}  // namespace inputs
