// What a layer does to its input: the factor and the rotation, against loops over single entries.
#include "inputs.h"

namespace {

using namespace inputs;

struct Transform {
  zp::Type type;
  int64_t rows, k, size, stride;
  std::vector<uint32_t> x;
  std::vector<float> factor;
};

Transform transform(zp::Type type, int64_t rows, int64_t k, int64_t size, int64_t gap = 0) {
  Transform t{type, rows, k, size, k + gap, {}, {}};
  Random random(uint32_t(rows * 1000003 + k * 1009 + size * 3 + type));
  for (int64_t i = 0; i < rows * k; i++) t.x.push_back(encode(type, random.gaussian()));
  for (int64_t i = 0; i < k; i++) t.factor.push_back(random.gaussian() + (i % 3 ? 2.0f : -2.0f));
  return t;
}

std::vector<uint32_t> by_loops(const Transform& t) {
  std::vector<uint32_t> y;
  for (int64_t m = 0; m < t.rows; m++) {
    std::vector<float> v;
    for (int64_t k = 0; k < t.k; k++)
      v.push_back(decode(t.type, t.x[size_t(m * t.k + k)]) * t.factor[size_t(k)]);
    for (int64_t distance = 1; distance < t.size; distance *= 2) {
      std::vector<float> next;
      for (int64_t k = 0; k < t.k; k++) {
        const bool upper = k & distance;  // runs begin at multiples of a power of two
        const float a = v[size_t(upper ? k - distance : k)];
        const float b = v[size_t(upper ? k : k + distance)];
        next.push_back(upper ? a - b : a + b);
      }
      v = next;
    }
    for (const float value : v) y.push_back(encode(t.type, value));
  }
  return y;
}

std::vector<uint32_t> by_the_core(const Transform& t, Guarded::Side side, int threads) {
  const size_t size = harness::size_of(t.type);
  const int64_t elements = t.rows ? (t.rows - 1) * t.stride + t.k : 0;
  Guarded x(size_t(elements) * size, side), factor(size_t(t.k) * 4, side);
  Guarded y(size_t(t.rows * t.k) * size, side);
  std::memset(x.as(), 0xff, size_t(elements) * size);
  std::memset(y.as(), 0xa5, size_t(t.rows * t.k) * size);
  for (int64_t m = 0; m < t.rows; m++)
    for (int64_t k = 0; k < t.k; k++)
      harness::put(x.as(), t.type, m * t.stride + k, t.x[size_t(m * t.k + k)]);
  for (int64_t k = 0; k < t.k; k++) factor.as<float>()[k] = t.factor[size_t(k)];
  harness::count_call();
  zp::transform_input({x.as(), t.type, t.rows, t.stride}, t.k, factor.as<float>(), t.size, y.as(),
                      threads);
  std::vector<uint32_t> got;
  for (int64_t i = 0; i < t.rows * t.k; i++) got.push_back(harness::get(y.as(), t.type, i));
  return got;
}

void check(const Transform& t, const std::string& name) {
  if (harness::problems++ % harness::every) return;
  const std::vector<uint32_t> want = by_loops(t);
  for (const Guarded::Side side : {Guarded::AtEnd, Guarded::AtStart})
    harness::on_each_isa(name, [&](const char*) {
      for (int threads = 1; threads <= 2; threads++) {
        const std::vector<uint32_t> got = by_the_core(t, side, threads);
        bool same = got.size() == want.size();
        for (size_t i = 0; same && i < want.size(); i++)
          same = want[i] == got[i] || (is_nan(t.type, want[i]) && is_nan(t.type, got[i]));
        harness::count(same, "another transform of " + std::to_string(t.rows) + " x " +
                                 std::to_string(t.k) + ", runs of " + std::to_string(t.size));
      }
    });
}

TEST(transform_of_every_size) {
  for (const zp::Type type : kFloats)
    for (int64_t size = 1; size <= 2048; size *= 2)
      for (const int64_t runs : {1, 3, 7}) check(transform(type, 3, size * runs, size), "size");
}

TEST(transform_of_many_rows) {  // several threads, and rows that lie apart
  for (const zp::Type type : kFloats)
    for (const int64_t size : {1, 64}) check(transform(type, 301, 192, size, 5), "rows");
}

TEST(transform_of_nothing) {
  for (const zp::Type type : kFloats) {
    check(transform(type, 0, 8, 8), "no rows");
    check(transform(type, 3, 0, 1), "no columns");
  }
}

TEST(transform_of_hazards) {
  for (const zp::Type type : kFloats)
    for (const int64_t size : {1, 4, 32, 256}) {
      Transform t = transform(type, 6, 256, size);
      for (int64_t k = 0; k < t.k; k++) {
        const auto put = [&](int64_t m, float v) { t.x[size_t(m * t.k + k)] = encode(type, v); };
        put(0, k % 2 ? -0.0f : 0.0f);
        put(1, 1e-40f * float(k));  // denormal
        put(2, 3e38f);              // sums overflow
        if (k == 40) put(3, NAN);
        if (k == 41) put(4, INFINITY);
      }
      check(t, "hazards");
    }
}

}  // namespace
