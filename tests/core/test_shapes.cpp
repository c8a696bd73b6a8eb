// Sizes: every remainder, nothing, strides, more rows than fit a cache.
#include "inputs.h"

namespace {

using namespace inputs;
using harness::check;

TEST(shapes) {
  const Shape all[] = {{1, 1, 1},   {1, 64, 64},  {1, 63, 1},   {1, 200, 70},  {2, 65, 17},
                       {3, 4, 16},  {4, 5, 65},   {5, 1, 129},  {6, 130, 15},  {7, 3, 31},
                       {8, 66, 63}, {9, 128, 64}, {13, 67, 33}, {17, 257, 80}, {33, 12, 79},
                       {3, 64, 16}, {7, 48, 10}};
  for (const Shape& shape : all)
    every_mode(shape, [](Problem p) {
      check(p, "shapes");
      p.has_bias = false;
      check(p, "shapes");
    });
}

TEST(rows_of_every_count) {
  for (int64_t m = 1; m <= 40; m++) {
    check(make(Dynamic, F32, {m, 30, 66}), "rows_of_every_count");
    check(make(WeightOnly, F32, {m, 10, 66}), "rows_of_every_count");
    check(make(Float, m % 2 ? F32 : BF16, {m, 10, 66}), "rows_of_every_count");
  }
}

TEST(k_of_every_remainder) {
  for (int64_t k = 1; k <= 70; k++) {
    check(make(Dynamic, F32, {3, k, 20}), "k_of_every_remainder");
    check(make(Quantized, U8, {2, k, 20}), "k_of_every_remainder");
    check(make(WeightOnly, F32, {2, k, 20}), "k_of_every_remainder");
    check(make(Float, F32, {2, k, 20}), "k_of_every_remainder");
  }
}

TEST(size_zero) {
  for (const Shape& shape : {Shape{0, 5, 3}, {3, 0, 5}, {3, 5, 0}, {0, 0, 0}, {1, 0, 1}})
    every_mode(shape, [](Problem p) {
      check(p, "size_zero");
      p.has_bias = false;
      check(p, "size_zero");
    });
}

TEST(strided_input) {
  for (const Shape& shape : {Shape{5, 60, 20}, {9, 64, 64}, {40, 67, 65}})
    for (const int64_t extra : {1, 5, 64})
      every_mode(shape, [&](Problem p) {
        p.stride = p.k + extra;
        check(p, "strided_input");
      });
}

TEST(same_row_again) {  // a stride of zero
  every_mode({4, 33, 20}, [](Problem p) {
    for (int64_t i = p.k; i < p.m * p.k; i++) p.x[i] = p.x[i % p.k];
    p.stride = 0;
    check(p, "same_row_again");
  });
}

TEST(rows_in_several_blocks) {  // 96 are more than half of a second-level cache of 2 MB holds
  check(make(Dynamic, F32, {200, 11000, 2}), "rows_in_several_blocks", 1);
  check(make(Integer, S8, {100, 11000, 2}), "rows_in_several_blocks");
  check(make(WeightOnly, BF16, {210, 300, 5}), "rows_in_several_blocks");
}

TEST(row_alone_or_in_a_batch) {  // by the kernels alone, without the oracle
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

TEST(unpacked_as_packed) {
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

}  // namespace
