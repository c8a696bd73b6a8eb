// Floats: special rows, 16-bit types, what is fused behind the sum, float weights.
#include "inputs.h"

namespace {

using namespace inputs;
using harness::check;

TEST(codes_of_16_bits) {  // the oracle itself: every code is the nearest one to its own value
  for (const zp::Type type : {BF16, F16}) {
    bool same = true;
    for (uint32_t code = 0; code < 65536; code++)
      same &= is_nan(type, code) || encode(type, decode(type, code)) == code;
    harness::count(same, "a number does not encode to its own code");
  }
  harness::count(encode(F16, 65519.99f) == 0x7bff && encode(F16, 65520.0f) == 0x7c00, "overflow");
  harness::count(encode(F16, 1.0f + 1.0f / 2048) == 0x3c00, "a tie goes to even");
  harness::count(encode(F16, 1.0f + 3.0f / 2048) == 0x3c02, "a tie goes to even");
  harness::count(encode(BF16, 1.0f + 1.0f / 256) == 0x3f80, "a tie goes to even");
}

TEST(rows_that_are_void) {
  for (const Mode mode : kFloatModes)
    for (const zp::Type type : kFloats)
      for (const int64_t k : {1, 3, 40, 67}) {
        Problem p = make(mode, type, {7, k, 66});
        p.x[1 * k + k / 2] = encode(type, NAN);
        p.x[2 * k] = encode(type, INFINITY);
        p.x[4 * k + k - 1] = encode(type, -INFINITY);
        p.x[5 * k + k - 1] = type == F32    ? 0xff800001
                             : type == BF16 ? 0xff81
                                            : 0xfc01;  // signaling
        check(p, "rows_that_are_void");
      }
}

TEST(rows_of_hazard) {
  for (const Mode mode : kFloatModes)
    for (const zp::Type type : kFloats) {
      Problem p = make(mode, type, {12, 70, 66});
      Random random(4);
      set_row(p, 0, 0.0f);
      set_row(p, 1, -0.0f);
      set_row(p, 2, 3.0f);
      set_row(p, 3, -3.0f);
      for (int64_t k = 0; k < p.k; k++) {
        const auto put = [&](int64_t m, float v) { p.x[m * p.k + k] = encode(type, v); };
        put(4, 1e-40f * random.gaussian());  // denormal
        put(5, 1e-36f * random.gaussian());
        put(6, std::min(3e38f, std::max(-3e38f, 1e38f * random.gaussian())));
        put(7, std::ldexp(random.gaussian(), random.integer(-60, 60)));
        put(8, float(random.integer(-127, 126)) + 0.5f);  // halfway, with the ends below
        put(9, std::fabs(random.gaussian()) + 1);
        put(10, -std::fabs(random.gaussian()) - 1);
        put(11, 60000.0f * random.gaussian());
      }
      p.x[8 * p.k] = encode(type, -128.0f);
      p.x[8 * p.k + 1] = encode(type, 127.0f);
      for (const float scale : {0.02f, 1.0f, 1.3e-38f, 2.1e38f})
        for (const int zero : {0, 128, 255}) {
          p.x_scale = scale;
          p.x_zero = zero;
          check(p, "rows_of_hazard");
          if (mode != Static) break;
        }
    }
}

TEST(all_codes_of_16_bits) {  // as inputs of the vector loads
  for (const zp::Type type : {BF16, F16}) {
    Problem p = make(Static, type, {1, 65536, 2});
    for (uint32_t code = 0; code < 65536; code++) p.x[code] = is_nan(type, code) ? 0 : code;
    p.x_scale = type == F16 ? 300.0f : 1.0f;
    check(p, "all_codes_of_16_bits");
    p.x_scale = 1e-3f;
    check(p, "all_codes_of_16_bits");
    Problem rows = make(WeightOnly, type, {1024, 1, 64});
    for (uint32_t code = 0; code < 1024; code++) rows.x[code] = code * 64 + code % 64;
    check(rows, "all_codes_of_16_bits");
  }
}

TEST(outputs_round_to_16_bits) {  // normal, denormal, overflowing, halfway
  for (const zp::Type type : {BF16, F16})
    for (const Mode mode : {Dynamic, WeightOnly}) {
      Problem p = make(mode, type, {40, 9, 130});
      Random random(5);
      for (float& scale : p.w_scale)
        scale = std::ldexp(1.0f + random.uniform(), random.integer(-30, 6));
      for (int64_t n = 0; n < p.n; n += 3) p.w_scale[n] = std::ldexp(1.0f, random.integer(-30, 6));
      p.has_bias = false;
      check(p, "outputs_round_to_16_bits");
    }
}

TEST(weight_only_of_infinities) {  // inf * 0 and inf - inf are NaN in one chain, not in its
                                   // neighbor
  Problem p = make(WeightOnly, F32, {9, 21, 70});
  p.x[0] = encode(F32, INFINITY);
  p.x[3] = encode(F32, -INFINITY);
  p.x[p.k * 8 + 5] = encode(F32, INFINITY);
  for (int64_t n = 0; n < p.n; n += 2) p.w[n * p.k] = 0;
  check(p, "weight_only_of_infinities");
}

TEST(activations_and_residuals) {
  for (const zp::Activation activation : {zp::None, zp::ReLU, zp::GELU, zp::SiLU})
    for (const Shape& shape : {Shape{1, 33, 66}, {7, 20, 130}, {14, 5, 63}})
      every_mode(shape, [&](Problem p) {
        Random random(6);
        p.activation = activation;
        const float special[] = {0.0f,    -0.0f, 1e-42f, -1e-42f,  88.0f,     -88.0f, 300.0f,
                                 -300.0f, 3e38f, -3e38f, INFINITY, -INFINITY, NAN};
        check(p, "activations_and_residuals");
        for (int64_t n = 0; n < p.n && n < 13; n++) p.bias[n] = special[n];
        for (int64_t n = 13; n < p.n; n++) p.bias[n] = 8.0f * random.gaussian();
        for (int64_t n = 0; n < p.n; n += 3) p.w_scale[n] = 1e-9f;  // leaves the bias as it is
        check(p, "activations_and_residuals");
        if (p.mode == Quantized) return;
        p.residual_stride = p.n + 3;
        for (int64_t i = 0; i < p.m * p.n; i++)
          p.residual.push_back(encode(p.y_type(), random.gaussian()));
        check(p, "activations_and_residuals");
      });
  for (const Mode mode : {Dynamic, Integer}) {  // beyond 32 bits, and in several blocks of rows
    Problem p = make(mode, mode == Integer ? S8 : F32, {2, 33100, 3});
    p.activation = zp::GELU;
    p.residual_stride = p.n;
    for (int64_t i = 0; i < p.m * p.n; i++) p.residual.push_back(encode(F32, float(i)));
    check(p, "activations_and_residuals");
  }
  Problem p = make(Float, BF16, {200, 20, 66});
  p.activation = zp::SiLU;
  p.residual_stride = p.n + 1;
  for (int64_t i = 0; i < p.m * p.n; i++) p.residual.push_back(encode(BF16, float(i % 100)));
  check(p, "activations_and_residuals");
}

TEST(float_weights) {  // either type of weights with each type of activations
  for (const zp::Type type : kFloats)
    for (const zp::Type w_type : {F32, BF16})
      for (const Shape& shape : {Shape{1, 64, 64}, {5, 70, 66}, {20, 600, 130}, {120, 9, 5}}) {
        Problem p = make(Float, type, shape);
        Random random(7);
        p.w_type = w_type;
        for (uint32_t& w : p.float_w)
          w = encode(w_type, std::ldexp(random.gaussian(), random.integer(-10, 10)));
        check(p, "float_weights");
        p.float_w[0] = encode(w_type, INFINITY);
        p.float_w[1] = encode(w_type, 1e-40f);
        p.float_w[p.k] = encode(w_type, NAN);
        check(p, "float_weights");
      }
}

}  // namespace
