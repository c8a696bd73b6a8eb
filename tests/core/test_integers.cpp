// Integers: zero points, the ends of their ranges, sums beyond 32 bits, outputs of 8 bits.
#include "inputs.h"

namespace {

using namespace inputs;
using harness::check;

TEST(per_tensor_weights) {
  every_mode({5, 70, 66}, [](Problem p) {
    p.per_channel = false;
    p.w_scale = {0.013f};
    p.w_zero = {0};
    check(p, "per_tensor_weights");
    p.w_zero = {-7};
    check(p, "per_tensor_weights");
  });
}

TEST(unsigned_weights) {
  for (const int zero : {128, 0, 255, 100})
    every_mode({5, 70, 66}, [&](Problem p) {
      p.w_unsigned = true;
      for (int& w : p.w) w += 128;
      std::fill(p.w_zero.begin(), p.w_zero.end(), zero);
      check(p, "unsigned_weights");
    });
}

TEST(weight_zero_points) {
  for (const Shape& shape : {Shape{1, 64, 64}, {7, 70, 66}, {20, 131, 130}})
    every_mode(shape, [](Problem p) {
      Random random(2);
      for (int32_t& zero : p.w_zero) zero = random.integer(-128, 127);
      check(p, "weight_zero_points");
      for (int32_t& zero : p.w_zero) zero = random.integer(0, 1) ? -128 : 127;
      check(p, "weight_zero_points");
    });
}

TEST(integers_at_their_ends) {
  for (const Mode mode : {Integer, Quantized})
    for (const zp::Type type : kBytes)
      for (const int zero : {0, 255, 128})
        for (const Shape& shape : {Shape{4, 260, 66}, {1, 64, 64}}) {
          Problem p = make(mode, type, shape);
          Random random(3);
          const uint32_t high = type == U8 ? 255 : 127, low = type == U8 ? 0 : 128;
          for (uint32_t& x : p.x) x = high;
          for (int& w : p.w) w = -128;
          p.x_zero = zero - (type == S8 ? 128 : 0);
          p.dull = true;
          check(p, "integers_at_their_ends");
          for (int& w : p.w) w = 127;
          check(p, "integers_at_their_ends");
          for (uint32_t& x : p.x) x = random.integer(0, 1) ? high : low;
          for (int& w : p.w) w = random.integer(0, 1) ? 127 : -128;
          check(p, "integers_at_their_ends");
        }
}

TEST(k_beyond_32_bits) {
  for (const int64_t k : {32704, 32767, 32768, 33100, 66000, 131100})
    for (const Mode mode : {Dynamic, Static, Integer, Quantized})
      for (const bool zeros : {false, true}) {
        const zp::Type type = mode == Dynamic || mode == Static ? F32 : zeros ? S8 : U8;
        Problem p = make(mode, type, {2, k, 3});
        check(p, "k_beyond_32_bits");
        if (type == F32) continue;
        for (int64_t i = 0; i < p.k;
             i++) {  // every product of output 0 is 255 * -128, or 255 * 255
          p.w[i] = -128;
          p.x[i] = type == U8 ? 255 : 127;
        }
        p.x_zero = type == U8 ? 0 : -128;
        if (zeros) p.w_zero = {127, -128, 3};
        p.y_scale = 1e7f;
        check(p, "k_beyond_32_bits");
      }
}

TEST(outputs_clamp_to_8_bits) {
  for (const zp::Type type : kBytes)
    for (const float scale : {1e-3f, 0.5f, 40.0f, 1e30f, 1.2e-38f})
      for (const int zero : {0, 255, 77}) {
        Problem p = make(Quantized, type, {6, 50, 70});
        p.y_scale = scale;
        p.y_zero = zero - (type == S8 ? 128 : 0);
        for (int64_t n = 0; n < p.n; n += 5) p.w_scale[n] = 1.0f, p.bias[n] = 0.25f;  // ties
        p.dull = true;
        check(p, "outputs_clamp_to_8_bits");
        p.bias[3] = NAN;
        p.bias[4] = INFINITY;
        check(p, "outputs_clamp_to_8_bits");
      }
}

}  // namespace
