// Weights in groups, each with a scale and a zero point of its own.
#include <thread>

#include "inputs.h"

namespace {

using namespace inputs;

constexpr int64_t kGroups[] = {1, 3, 8, 20, 32, 64, 480, 481, 1000, zp::kMaxGroup};
constexpr Mode kGroupModes[] = {Dynamic, Static, WeightOnly, Integer};

// With a zero point for each group, then with one for all; of four bits and of eight.
void check(const Problem& p, const std::string& name, int threads = 2) {
  harness::check(p, name, threads);
  harness::check(with_one_zero(p), name + " of one zero point", threads);
  if (p.bits > 4 || p.group > zp::kMaxBytesGroup) return;
  check(with_bytes(p), name, threads);
}

zp::Type some_type(Mode mode) { return mode == Integer ? U8 : F32; }

TEST(
    groups_of_every_size) {  // k a multiple of the group, of eight, of neither, less than one group
  int turn = 0;
  for (const int64_t group : kGroups)
    for (const int64_t k : {77, 160, 1003})
      for (const int64_t rows : {1, 9, 19})
        for (const Mode mode : kGroupModes)
          check(make_groups(mode, some_type(mode), {rows, k, 17}, group, kFloats[turn++ % 3]),
                "groups_of_every_size", 1);
}

TEST(groups_every_type) {
  for (const Shape& shape : {Shape{2, 70, 66}, {19, 60, 130}})
    for (const Mode mode : kGroupModes)
      for (const zp::Type scale_type : kFloats)
        for (int i = 0; i < (mode == Integer ? 2 : 3); i++) {
          const zp::Type type = mode == Integer ? kBytes[i] : kFloats[i];
          Problem p = make_groups(mode, type, shape, 24, scale_type);
          check(p, "groups_every_type");
          p.has_bias = false;
          check(p, "groups_every_type", 3);
        }
}

TEST(groups_rows_of_every_count) {
  for (int64_t m = 1; m <= 26; m++)
    for (const Mode mode : kGroupModes)
      harness::check(make_groups(mode, some_type(mode), {m, 22, 67}, 8), "groups_rows");
}

TEST(groups_n_of_every_remainder) {
  for (int64_t n = 1; n <= 66; n++) {
    harness::check(make_groups(Dynamic, F32, {2, 20, n}, 8), "groups_n_of_every_remainder");
    harness::check(make_groups(WeightOnly, F16, {1, 20, n}, 8), "groups_n_of_every_remainder");
  }
}

TEST(groups_k_of_every_remainder) {
  for (int64_t k = 1; k <= 70; k++)
    for (const int64_t group : {20, 32}) {
      harness::check(make_groups(Dynamic, F32, {3, k, 20}, group), "groups_k_of_every_remainder");
      harness::check(make_groups(Integer, S8, {19, k, 20}, group), "groups_k_of_every_remainder");
      harness::check(make_groups(WeightOnly, F32, {2, k, 20}, group),
                     "groups_k_of_every_remainder");
      harness::check(make_groups(WeightOnly, BF16, {9, k, 20}, group),
                     "groups_k_of_every_remainder");
    }
}

TEST(groups_size_zero) {
  for (const Shape& shape :
       {Shape{0, 5, 3}, {3, 0, 5}, {3, 5, 0}, {0, 0, 0}, {1, 0, 1}, {19, 0, 70}})
    every_group_mode(shape, 4, [](Problem p) {
      check(p, "groups_size_zero");
      p.has_bias = false;
      check(p, "groups_size_zero");
    });
}

TEST(groups_strided_input) {
  for (const Shape& shape : {Shape{5, 60, 20}, {9, 67, 65}})
    for (const int64_t extra : {1, 64})
      every_group_mode(shape, 20, [&](Problem p) {
        p.stride = p.k + extra;
        check(p, "groups_strided_input");
      });
  every_group_mode({8, 33, 20}, 16, [](Problem p) {  // the same row again
    for (int64_t i = p.k; i < p.m * p.k; i++) p.x[i] = p.x[i % p.k];
    p.stride = 0;
    check(p, "groups_strided_input");
  });
}

TEST(groups_of_bytes_at_their_extremes) {
  for (const int64_t group : {480, 481, 2000})
    for (const int code : {0, 255})
      for (const int64_t rows : {2, 9}) {
        Problem p = with_bytes(make_groups(Integer, S8, {rows, 2000, 9}, group));
        p.dull = true;
        std::fill(p.w.begin(), p.w.end(), code);
        for (size_t i = 0; i < p.w_zero.size(); i++) p.w_zero[i] = i % 2 ? 0 : 255;
        for (size_t i = 0; i < p.x.size(); i++) p.x[i] = i / 2000 % 2 ? 0x80 : 0x7f;
        check(p, "groups_of_bytes_at_their_extremes");
        harness::check(with_one_zero(p, 255 - code), "groups_of_bytes_at_their_extremes");
      }
}

TEST(groups_of_many) {  // more k than is multiplied at a time, more rows than lie in a block
  for (const Mode mode : kGroupModes) {
    for (const int64_t rows : {8, 20})
      check(make_groups(mode, some_type(mode), {rows, 1100, 70}, 32), "groups_of_many");
    check(make_groups(mode, some_type(mode), {8, 4200, 9}, 32), "groups_of_many");
    check(make_groups(mode, some_type(mode), {7, 1100, 9}, 1), "groups_of_many");
    Problem p = make_groups(mode, mode == Integer ? S8 : BF16, {400, 30, 67}, 12);
    p.stride = p.k + 3;
    p.residual_stride = p.n + 2;
    for (int64_t i = 0; i < p.m * p.n; i++)
      p.residual.push_back(encode(p.y_type(), float(i % 100)));
    check(p, "groups_of_many");
  }
}

TEST(groups_split_among_threads) {  // enough work that it is worth it: by outputs, by rows
  for (const Mode mode : {Dynamic, WeightOnly})
    for (const Shape& shape : {Shape{1, 200, 3000}, {70, 500, 66}}) {
      Problem p = make_groups(mode, F32, shape, 64);
      p.residual_stride = p.n + 1;
      for (int64_t i = 0; i < p.m * p.n; i++) p.residual.push_back(encode(F32, float(i % 100)));
      harness::check(p, "groups_split_among_threads", 3);
    }
}

TEST(groups_in_new_threads) {  // whose rooms are as small as can be: a sanitizer sees their ends
  for (const Shape& shape : {Shape{1, 5, 3}, {9, 77, 66}, {5, 64, 64}, {8, 40, 1}})
    for (const int64_t group : {1, 7, 32, 100})
      every_group_mode(shape, group, [](const Problem& p) {
        const auto want = expected(p);
        const auto w = harness::pack(p, Guarded::AtEnd);
        harness::on_each_isa("groups_in_new_threads", [&](const char*) {
          std::vector<uint32_t> got;
          std::thread([&] { got = harness::computed(p, w, Guarded::AtEnd, 1); }).join();
          harness::compare(p, want, got);
        });
      });
}

TEST(groups_row_alone_or_in_a_batch) {  // by the kernels alone, without the oracle
  every_group_mode({20, 130, 66}, 32, [](const Problem& p) {
    const auto w = harness::pack(p, Guarded::AtEnd);
    harness::on_each_isa("groups_row_alone_or_in_a_batch", [&](const char*) {
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

TEST(groups_rows_that_are_void) {
  for (const Mode mode : {Dynamic, Static, WeightOnly})
    for (const zp::Type type : kFloats)
      for (const int64_t k : {1, 3, 40, 67}) {
        Problem p = make_groups(mode, type, {7, k, 66}, 16);
        p.x[1 * k + k / 2] = encode(type, NAN);
        p.x[2 * k] = encode(type, INFINITY);
        p.x[4 * k + k - 1] = encode(type, -INFINITY);
        p.x[5 * k + k - 1] = encode(type, NAN) | (type == F32 ? 1u << 31 : 1u << 15);
        check(p, "groups_rows_that_are_void");
        p.m = 3;  // the same in the tile of few rows
        p.x.resize(size_t(p.m * p.k));
        check(p, "groups_rows_that_are_void");
      }
}

TEST(groups_rows_of_hazard) {
  for (const Mode mode : {Dynamic, Static, WeightOnly})
    for (const zp::Type type : kFloats) {
      Problem p = make_groups(mode, type, {10, 70, 66}, 32);
      Random random(4);
      set_row(p, 0, 0.0f);
      set_row(p, 1, -0.0f);
      set_row(p, 2, 3.0f);
      for (int64_t k = 0; k < p.k; k++) {
        const auto put = [&](int64_t m, float v) { p.x[m * p.k + k] = encode(type, v); };
        put(4, 1e-40f * random.gaussian());  // denormal
        put(5, 1e-36f * random.gaussian());
        put(6, std::min(3e38f, std::max(-3e38f, 1e38f * random.gaussian())));
        put(7, std::ldexp(random.gaussian(), random.integer(-60, 60)));
        put(8, std::fabs(random.gaussian()) + 1);
        put(9, 60000.0f * random.gaussian());
      }
      for (const float scale : {0.02f, 1.3e-38f, 2.1e38f})
        for (const int zero : {0, 128, 255}) {
          p.x_scale = scale;
          p.x_zero = zero;
          p.dull = scale != 0.02f;  // all at the ends
          check(p, "groups_rows_of_hazard");
          if (mode != Static) break;
        }
    }
}

TEST(groups_scales_of_hazard) {  // huge, denormal, none; outputs overflow, cancel, are NaN
  const float special[] = {3e38f, -3e38f, 1e-45f, 3e-39f, 0.0f,     -0.0f,
                           -0.5f, 65504,  6e-8f,  1e30f,  INFINITY, NAN};
  for (const Mode mode : kGroupModes)
    for (const zp::Type scale_type : kFloats)
      for (const int64_t rows : {2, 8, 19}) {
        Problem p = make_groups(mode, some_type(mode), {rows, 50, 70}, 8, scale_type);
        for (int64_t n = 1; n < p.n; n++)  // by itself among ordinary ones, then among others
          for (int64_t g = 0; g < p.groups(); g++)
            if (g == n % p.groups() || n > 40)
              p.group_scale[n * p.groups() + g] = encode(scale_type, special[(n + g) % 12]);
        check(p, "groups_scales_of_hazard");
      }
}

TEST(groups_sign_of_zero) {
  for (const Mode mode : kGroupModes)
    for (const zp::Type scale_type : {F32, BF16})
      for (const int64_t rows : {3, 9})
        for (const bool has_bias : {false, true}) {
          Problem p = make_groups(mode, some_type(mode), {rows, 20, 66}, 8, scale_type);
          Random random(8);
          p.has_bias = has_bias;
          p.dull = true;
          std::fill(p.bias.begin(), p.bias.end(), -0.0f);
          p.x_scale = 2e-38f;
          for (size_t i = 0; i < p.x.size() && mode != Integer; i++)
            p.x[i] = encode(F32, 1e-30f * random.gaussian());
          for (size_t i = 0; i < p.group_scale.size(); i++)  // products of both signs vanish
            p.group_scale[i] = encode(scale_type, i % 3 ? 1e-20f : 0.0f);
          if (mode != Integer) set_row(p, 1, -0.0f);
          check(p, "groups_sign_of_zero");
          for (const int zero : {0, 128, -128}) {  // activations that are all zero, or their sums
            if (mode != Integer || (p.type == U8) != (zero >= 0)) continue;
            p.x_zero = zero;
            std::fill(p.x.begin(), p.x.end(), uint32_t(zero));
            check(p, "groups_sign_of_zero");
          }
        }
}

TEST(groups_zero_points_at_their_ends) {
  for (const Mode mode : kGroupModes)
    for (const int64_t rows : {1, 8}) {
      Problem p = make_groups(mode, some_type(mode), {rows, 90, 66}, 16);
      for (const int zero : {0, 15}) harness::check(with_one_zero(p, zero), "groups_zero_points");
      for (const int64_t other : {int64_t(0), int64_t(p.w_zero.size()) - 1}) {
        Problem q = with_one_zero(p, 0);  // one zero point for all but one group
        q.w_zero[other] = 15;
        harness::check(q, "groups_zero_points");
      }
    }
}

TEST(groups_sums_at_their_ends) {  // all products alike, as far from zero as they can be
  for (const int64_t group : {480, 481, 512, 600, int(zp::kMaxGroup)})
    for (const zp::Type type : kBytes)
      for (const bool high : {false, true})
        for (const int64_t rows : {1, 7}) {
          if (group > 1000 && (rows > 1 || type == U8)) continue;  // slow
          Problem p = make_groups(Integer, type, {rows, group, 4}, group);
          for (int64_t i = 0; i < p.n * p.k; i++) p.w[i] = i / p.k % 2 ? 15 : 0;
          p.w_zero = {15, 0, 0, 15};  // the first at one end, the second at the other
          std::fill(p.x.begin(), p.x.end(), type == U8 ? high * 255u : high ? 127u : 128u);
          p.x_zero = (high ? 0 : 255) - (type == S8 ? 128 : 0);
          p.dull = true;
          harness::check(p, "groups_sums_at_their_ends");
          for (const int zero : {0, 15})
            harness::check(with_one_zero(p, zero), "groups_sums_at_their_ends");
        }
}

TEST(groups_activations_and_residuals) {
  for (const zp::Activation activation : {zp::None, zp::ReLU, zp::GELU, zp::SiLU})
    for (const Shape& shape : {Shape{1, 33, 66}, {9, 20, 63}})
      every_group_mode(shape, 16, [&](Problem p) {
        Random random(6);
        p.activation = activation;
        const float special[] = {0.0f,    -0.0f, 1e-42f, -1e-42f,  88.0f,     -88.0f, 300.0f,
                                 -300.0f, 3e38f, -3e38f, INFINITY, -INFINITY, NAN};
        for (int64_t n = 0; n < p.n; n++)
          p.bias[n] = n < 13 ? special[n] : 8.0f * random.gaussian();
        for (int64_t i = 0; i < p.n * p.groups(); i += 3) p.group_scale[i] = 0;
        harness::check(p, "groups_activations_and_residuals");
        p.residual_stride = p.n + 3;
        for (int64_t i = 0; i < p.m * p.n; i++)
          p.residual.push_back(encode(p.y_type(), random.gaussian()));
        harness::check(p, "groups_activations_and_residuals");
      });
}

TEST(groups_unpacked_as_packed) {
  for (const int64_t group : kGroups)
    for (const Shape& shape : {Shape{1, 1, 1}, {1, 67, 130}, {1, 128, 64}, {1, 0, 3}, {1, 9, 0}})
      for (const Guarded::Side side : {Guarded::AtEnd, Guarded::AtStart}) {
        const Problem p = make_groups(Dynamic, F32, shape, group);
        const auto packed = harness::pack(p, side);
        Guarded out(p.w.size(), side);
        packed.groups->unpack(out.as());
        bool same = true;
        for (size_t i = 0; i < p.w.size(); i++) same &= out.as()[i] == uint8_t(p.w[i]);
        harness::count(same, "unpack gives other codes");
        harness::count(packed.groups->nbytes() >= size_t(p.n * p.k / 2), "nbytes");
        harness::count(
            zp::group_scratch(*packed.groups) <= zp::kPanel * std::max<int64_t>(p.k, 4096),
            "a group longer than k takes room as if it were full");
      }
}

TEST(groups_kernels_are_their_own) {  // that one kernel is not tested under several names
  std::set<void (*)(const zp::GroupBlock&)> kernels;
  for (int i = 0; i < zp::count_isas(); i++) kernels.insert(zp::isa_at(i).group_block);
  harness::count(int(kernels.size()) == zp::count_isas() && !kernels.count(nullptr),
                 "two instruction sets have one kernel");
}

}  // namespace
