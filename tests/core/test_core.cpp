// The core without Python: every call on every instruction set that this machine runs, against the
// oracle of triple loops, bit for bit, named by hazard.
//
//   test_core [--isas=ISA,ISA...] [--only=PART OF A NAME]
//
// --isas fails unless these are what the machine runs, best first, so that a pass proves that they
// ran, and that no other was believed to be there.
#include <algorithm>
#include <cfenv>
#include <random>
#include <thread>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "harness.h"

namespace {

using harness::check;
using namespace oracle;
using zp::BF16;
using zp::F16;
using zp::F32;
using zp::S8;
using zp::U8;

constexpr Mode kFloatModes[] = {Dynamic, Static, WeightOnly, Float};
constexpr zp::Type kFloats[] = {F32, BF16, F16};
constexpr zp::Type kBytes[] = {U8, S8};

// ---- inputs -------------------------------------------------------------------------------------

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
Problem make(Mode mode, zp::Type type, const Shape& shape, uint32_t seed = 1) {
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

void set_row(Problem& p, int64_t m, float v) {
  for (int64_t k = 0; k < p.k; k++) p.x[m * p.k + k] = encode(p.type, v);
}

// ---- tests --------------------------------------------------------------------------------------

void codes_of_16_bits() {  // the oracle itself: every code is the nearest one to its own value
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

void shapes() {
  const Shape all[] = {{1, 1, 1},   {1, 64, 64},  {1, 63, 1},   {1, 200, 70},  {2, 65, 17},
                       {3, 4, 16},  {4, 5, 65},   {5, 1, 129},  {6, 130, 15},  {7, 3, 31},
                       {8, 66, 63}, {9, 128, 64}, {13, 67, 33}, {17, 257, 80}, {33, 12, 79}};
  for (const Shape& shape : all)
    every_mode(shape, [](Problem p) {
      check(p, "shapes");
      p.has_bias = false;
      check(p, "shapes");
    });
}

void rows_of_every_count() {
  for (int64_t m = 1; m <= 40; m++) {
    check(make(Dynamic, F32, {m, 30, 66}), "rows_of_every_count");
    check(make(WeightOnly, F32, {m, 10, 66}), "rows_of_every_count");
    check(make(Float, m % 2 ? F32 : BF16, {m, 10, 66}), "rows_of_every_count");
  }
}

void k_of_every_remainder() {
  for (int64_t k = 1; k <= 70; k++) {
    check(make(Dynamic, F32, {3, k, 20}), "k_of_every_remainder");
    check(make(Quantized, U8, {2, k, 20}), "k_of_every_remainder");
    check(make(WeightOnly, F32, {2, k, 20}), "k_of_every_remainder");
    check(make(Float, F32, {2, k, 20}), "k_of_every_remainder");
  }
}

void size_zero() {
  for (const Shape& shape : {Shape{0, 5, 3}, {3, 0, 5}, {3, 5, 0}, {0, 0, 0}, {1, 0, 1}})
    every_mode(shape, [](Problem p) {
      check(p, "size_zero");
      p.has_bias = false;
      check(p, "size_zero");
    });
}

void strided_input() {
  for (const Shape& shape : {Shape{5, 60, 20}, {9, 64, 64}, {40, 67, 65}})
    for (const int64_t extra : {1, 5, 64})
      every_mode(shape, [&](Problem p) {
        p.stride = p.k + extra;
        check(p, "strided_input");
      });
}

void same_row_again() {  // a stride of zero
  every_mode({4, 33, 20}, [](Problem p) {
    for (int64_t i = p.k; i < p.m * p.k; i++) p.x[i] = p.x[i % p.k];
    p.stride = 0;
    check(p, "same_row_again");
  });
}

void per_tensor_weights() {
  every_mode({5, 70, 66}, [](Problem p) {
    p.per_channel = false;
    p.w_scale = {0.013f};
    p.w_zero = {0};
    check(p, "per_tensor_weights");
    p.w_zero = {-7};
    check(p, "per_tensor_weights");
  });
}

void unsigned_weights() {
  for (const int zero : {128, 0, 255, 100})
    every_mode({5, 70, 66}, [&](Problem p) {
      p.w_unsigned = true;
      for (int& w : p.w) w += 128;
      std::fill(p.w_zero.begin(), p.w_zero.end(), zero);
      check(p, "unsigned_weights");
    });
}

void weight_zero_points() {
  for (const Shape& shape : {Shape{1, 64, 64}, {7, 70, 66}, {20, 131, 130}})
    every_mode(shape, [](Problem p) {
      Random random(2);
      for (int32_t& zero : p.w_zero) zero = random.integer(-128, 127);
      check(p, "weight_zero_points");
      for (int32_t& zero : p.w_zero) zero = random.integer(0, 1) ? -128 : 127;
      check(p, "weight_zero_points");
    });
}

// 255 * -128 throughout: sums of two products do not fit 16 bits.
void integers_at_their_ends() {
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

// Around the bound of the short correction, and where int32 accumulators overflow.
void k_beyond_32_bits() {
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

void rows_in_several_blocks() {  // more than half of a second-level cache holds
  for (const Mode mode : {Dynamic, Integer})
    check(make(mode, mode == Integer ? S8 : F32, {200, 16384, 2}), "rows_in_several_blocks");
  check(make(WeightOnly, BF16, {210, 300, 5}), "rows_in_several_blocks");
}

void rows_that_are_void() {
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

void rows_of_hazard() {
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

void all_codes_of_16_bits() {  // as inputs of the vector loads
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

void outputs_round_to_16_bits() {  // normal, denormal, overflowing, halfway
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

void outputs_clamp_to_8_bits() {
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

void weight_only_of_infinities() {  // inf * 0 and inf - inf are NaN in one chain, not in its
                                    // neighbor
  Problem p = make(WeightOnly, F32, {9, 21, 70});
  p.x[0] = encode(F32, INFINITY);
  p.x[3] = encode(F32, -INFINITY);
  p.x[p.k * 8 + 5] = encode(F32, INFINITY);
  for (int64_t n = 0; n < p.n; n += 2) p.w[n * p.k] = 0;
  check(p, "weight_only_of_infinities");
}

void row_alone_or_in_a_batch() {  // by the kernels alone, without the oracle
  every_mode({37, 130, 66}, [](const Problem& p) {
    const auto w = harness::pack(p, Guarded::AtEnd);
    harness::on_each_isa("row_alone_or_in_a_batch", [&](const char*) {
      const auto batch = harness::computed(p, w, Guarded::AtEnd, 2);
      for (int64_t m = 0; m < p.m; m++) {
        Problem alone = p;
        alone.m = 1;
        alone.x.assign(p.x.begin() + m * p.k, p.x.begin() + (m + 1) * p.k);
        harness::compare(alone, {batch.begin() + m * p.n, batch.begin() + (m + 1) * p.n},
                         harness::computed(alone, w, Guarded::AtEnd, 1));
      }
    });
  });
}

// Fused activations and residuals: of ordinary sums, of extreme ones, of NaN.
void activations_and_residuals() {
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

void float_weights() {  // either type of weights with each type of activations
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

void unpacked_as_packed() {
  for (const Shape& shape : {Shape{1, 1, 1}, {1, 64, 64}, {1, 67, 130}, {1, 0, 3}, {1, 33000, 2}})
    for (const bool is_unsigned : {false, true}) {
      Problem p = make(Dynamic, F32, shape);
      p.w_unsigned = is_unsigned;
      for (int& w : p.w) w += is_unsigned ? 128 : 0;
      const auto packed = harness::pack(p, Guarded::AtEnd);
      Guarded out(p.w.size(), Guarded::AtEnd);
      packed.integers->unpack(out.as());
      bool same = true;
      for (size_t i = 0; i < p.w.size(); i++) same &= out.as()[i] == uint8_t(p.w[i]);
      harness::count(same, "unpack gives other integers");
      harness::count(packed.integers->nbytes() >= size_t(p.n * p.k), "nbytes");
    }
  for (const zp::Type w_type : {F32, BF16}) {
    Problem p = make(Float, w_type, {1, 67, 130});
    const size_t size = harness::size_of(w_type);
    const auto packed = harness::pack(p, Guarded::AtEnd);
    Guarded out(p.float_w.size() * size, Guarded::AtEnd);
    packed.floats->unpack(out.as());
    bool same = true;
    for (size_t i = 0; i < p.float_w.size(); i++)
      same &= harness::get(out.as(), w_type, int64_t(i)) == p.float_w[i];
    harness::count(same, "unpack gives other floats");
    harness::count(packed.floats->nbytes() >= p.float_w.size() * size, "nbytes");
  }
}

// Flush-to-zero or another rounding mode in the caller changes nothing, and is there afterwards.
void float_environment_of_the_caller() {
  std::vector<Problem> problems;
  every_mode({9, 70, 66}, [&](Problem p) {
    p.x_scale = 1.3e-38f;
    if (p.mode == Static || p.mode == Dynamic)
      for (int64_t k = 0; k < p.k; k++) p.x[k] = encode(p.type, 1e-39f * float(k - 20));
    p.dull = true;
    problems.push_back(p);
  });
  for (const Problem& p : problems) {
    const auto want = expected(p);
    const auto w = harness::pack(p, Guarded::AtEnd);
    harness::on_each_isa("float_environment_of_the_caller", [&](const char*) {
      for (const int mode : {FE_UPWARD, FE_TOWARDZERO})
        for (int threads = 1; threads <= 2; threads++) {
          std::fesetround(mode);
          const auto got = harness::computed(p, w, Guarded::AtEnd, threads);
          const bool kept = std::fegetround() == mode;
          std::fesetround(FE_TONEAREST);
          harness::compare(p, want, got);
          harness::count(kept, "the rounding mode of the caller is not put back");
        }
#if defined(__x86_64__)
      const unsigned before = _mm_getcsr();
      _mm_setcsr(before | 0x8040);  // flush to zero, denormals are zero
#elif defined(__aarch64__)
      uint64_t before;
      __asm__ volatile("mrs %0, fpcr" : "=r"(before));
      __asm__ volatile("msr fpcr, %0" ::"r"(before | 1u << 24 | 1u << 19));  // and for 16 bits
#endif
#if defined(__x86_64__) || defined(__aarch64__)
      const auto got = harness::computed(p, w, Guarded::AtEnd, 2);
#endif
#if defined(__x86_64__)
      const bool kept = (_mm_getcsr() & 0x8040) == 0x8040;
      _mm_setcsr(before);
#elif defined(__aarch64__)
      uint64_t after;
      __asm__ volatile("mrs %0, fpcr" : "=r"(after));
      __asm__ volatile("msr fpcr, %0" ::"r"(before));
      const bool kept = after & 1u << 24;
#endif
#if defined(__x86_64__) || defined(__aarch64__)
      harness::compare(p, want, got);
      harness::count(kept, "flush-to-zero of the caller is not put back");
#endif
    });
  }
}

void several_callers_at_once() {
  std::vector<Problem> problems;
  every_mode({6, 130, 66}, [&](const Problem& p) { problems.push_back(p); });
  std::vector<std::vector<uint32_t>> want;
  std::vector<harness::Packed> packed;
  for (const Problem& p : problems) {
    want.push_back(expected(p));
    packed.push_back(harness::pack(p, Guarded::AtEnd));
  }
  harness::on_each_isa("several_callers_at_once", [&](const char*) {
    std::vector<std::vector<std::vector<uint32_t>>> got(4);
    std::vector<std::thread> callers;
    for (auto& mine : got)
      callers.emplace_back([&] {
        for (size_t i = 0; i < problems.size(); i++)
          mine.push_back(harness::computed(problems[i], packed[i], Guarded::AtEnd, 2));
      });
    for (std::thread& caller : callers) caller.join();
    for (const auto& mine : got)
      for (size_t i = 0; i < problems.size(); i++) harness::compare(problems[i], want[i], mine[i]);
  });
}

void forcing() {
  harness::count(!zp::force_isa("mmx") && !zp::force_isa(""), "an unknown name is accepted");
  std::set<std::string> names;
  for (int i = 0; i < zp::count_isas(); i++) names.insert(zp::isa_at(i).name);
  harness::count(int(names.size()) == zp::count_isas(), "two instruction sets of one name");
  harness::count(names.count("portable") == 1, "no portable kernel");
}

struct Test {
  const char* name;
  void (*run)();
};

#define TEST(name) {#name, name}
constexpr Test kTests[] = {
    TEST(codes_of_16_bits),
    TEST(forcing),
    TEST(shapes),
    TEST(rows_of_every_count),
    TEST(k_of_every_remainder),
    TEST(size_zero),
    TEST(strided_input),
    TEST(same_row_again),
    TEST(per_tensor_weights),
    TEST(unsigned_weights),
    TEST(weight_zero_points),
    TEST(integers_at_their_ends),
    TEST(k_beyond_32_bits),
    TEST(rows_in_several_blocks),
    TEST(rows_that_are_void),
    TEST(rows_of_hazard),
    TEST(all_codes_of_16_bits),
    TEST(outputs_round_to_16_bits),
    TEST(outputs_clamp_to_8_bits),
    TEST(weight_only_of_infinities),
    TEST(activations_and_residuals),
    TEST(float_weights),
    TEST(row_alone_or_in_a_batch),
    TEST(unpacked_as_packed),
    TEST(several_callers_at_once),
    TEST(float_environment_of_the_caller),
};

}  // namespace

int main(int argc, char** argv) {
  harness::explain_crashes();
  std::string only, wanted, isas;
  for (int i = 0; i < zp::count_isas(); i++)
    isas += (i ? "," : "") + std::string(zp::isa_at(i).name);
  for (int i = 1; i < argc; i++) {
    const std::string argument = argv[i];
    if (argument.rfind("--only=", 0) == 0)
      only = argument.substr(7);
    else if (argument.rfind("--isas=", 0) == 0)
      wanted = argument.substr(7);
    else
      return std::printf("usage: %s [--isas=ISA,...] [--only=PART]\n", argv[0]), 2;
  }
  std::printf("instruction sets: %s\n", isas.c_str());
  if (!wanted.empty() && wanted != isas) {
    std::printf("expected: %s\n", wanted.c_str());
    return 1;
  }
  int ran = 0;
  for (const Test& test : kTests) {
    if (!std::strstr(test.name, only.c_str())) continue;
    const int64_t before = harness::passed, failures = harness::failed;
    std::snprintf(harness::where, sizeof harness::where, "%s", test.name);
    test.run();
    std::printf("%-32s %7lld passed%s\n", test.name, (long long)(harness::passed - before),
                harness::failed > failures ? ", FAILED" : "");
    std::fflush(stdout);
    ran++;
  }
  std::printf("%lld passed, %lld failed\n", (long long)harness::passed, (long long)harness::failed);
  return harness::failed || ran == 0 ? 1 : 0;
}
