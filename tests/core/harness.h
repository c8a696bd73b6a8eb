// Runs a problem on every instruction set, thread count and placement in memory, and counts.
#pragma once

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include <unistd.h>

#include "guarded.h"
#include "oracle.h"

namespace harness {

using oracle::Mode;
using oracle::Problem;

inline const char* const kModes[] = {"dynamic",   "static",      "integer",
                                     "quantized", "weight-only", "float"};
inline const char* const kActivations[] = {"", " relu", " gelu", " silu"};
inline const char* const kTypes[] = {"float32", "bfloat16", "float16", "uint8", "int8"};

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& tests() {
  static std::vector<Test> list;
  return list;
}

// A function that runs with the others; named by the hazard.
#define TEST(name)                                                                               \
  void name();                                                                                   \
  [[maybe_unused]] const bool name##_listed = (harness::tests().push_back({#name, name}), true); \
  void name()

inline int64_t passed = 0, failed = 0;
inline int64_t problems = 0, every = 1;  // seen by check; each which of them is solved
inline char where[256] = "start";        // what runs now, for the handler of crashes

inline size_t size_of(zp::Type type) {
  return type == zp::F32 ? 4 : type == zp::U8 || type == zp::S8 ? 1 : 2;
}

inline void count(bool good, const std::string& note) {
  good ? passed++ : failed++;
  if (!good && failed <= 20) std::printf("FAILED %s: %s\n", where, note.c_str());
}

// Codes to memory, and back. Little-endian, as all targets are.
inline void put(void* to, zp::Type type, int64_t i, uint32_t code) {
  std::memcpy(static_cast<uint8_t*>(to) + size_t(i) * size_of(type), &code, size_of(type));
}
inline uint32_t get(const void* from, zp::Type type, int64_t i) {
  uint32_t code = 0;
  std::memcpy(&code, static_cast<const uint8_t*>(from) + size_t(i) * size_of(type), size_of(type));
  return code;
}

// The weights, packed from guarded memory that is gone when the kernels run.
struct Packed {
  std::unique_ptr<zp::PackedInt8> integers;
  std::unique_ptr<zp::PackedFloat> floats;
  std::unique_ptr<zp::PackedGroups> groups;
};

inline Packed pack(const Problem& p, Guarded::Side side) {
  Packed packed;
  if (p.mode == oracle::Float) {
    Guarded w(p.float_w.size() * size_of(p.w_type), side);
    for (size_t i = 0; i < p.float_w.size(); i++) put(w.as(), p.w_type, int64_t(i), p.float_w[i]);
    packed.floats =
        std::make_unique<zp::PackedFloat>(p.float_w.empty() ? nullptr : w.as(), p.w_type, p.n, p.k);
    return packed;
  }
  Guarded w(p.w.size(), side), scale(p.w_scale.size() * 4, side), zero(p.w_zero.size() * 4, side);
  for (size_t i = 0; i < p.w.size(); i++) w.as()[i] = uint8_t(p.w[i]);
  for (size_t i = 0; i < p.w_scale.size(); i++) scale.as<float>()[i] = p.w_scale[i];
  for (size_t i = 0; i < p.w_zero.size(); i++) zero.as<int32_t>()[i] = p.w_zero[i];
  if (p.group) {
    Guarded scales(p.group_scale.size() * size_of(p.scale_type), side);
    for (size_t i = 0; i < p.group_scale.size(); i++)
      put(scales.as(), p.scale_type, int64_t(i), p.group_scale[i]);
    packed.groups =
        std::make_unique<zp::PackedGroups>(p.w.empty() ? nullptr : w.as(), p.bits, p.n, p.k,
                                           p.group, scales.as(), p.scale_type, zero.as<int32_t>());
    return packed;
  }
  packed.integers =
      std::make_unique<zp::PackedInt8>(p.w.empty() ? nullptr : w.as(), p.w_unsigned, p.n, p.k,
                                       scale.as<float>(), zero.as<int32_t>(), p.per_channel);
  return packed;
}

// How often each instruction set, as zp::isa_at counts them, was called.
inline std::atomic<int64_t> calls[16];

inline void count_call() {
  for (int i = 0; i < zp::count_isas(); i++)
    if (&zp::isa_at(i) == &zp::active_isa()) calls[i]++;
}

// The calls that weights of 8 bits and weights in groups have alike.
template <class W>
void call(const Problem& p, const W& w, const zp::Input& x, const float* bias, const zp::Post& post,
          void* y, int threads) {
  switch (p.mode) {
    case oracle::Dynamic: return zp::linear_dynamic(w, x, bias, post, y, threads);
    case oracle::Static:
      return zp::linear_static(w, x, p.x_scale, p.x_zero, bias, post, y, threads);
    case oracle::Integer:
      return zp::linear_integer(w, x, p.x_scale, p.x_zero, bias, post, static_cast<float*>(y),
                                threads);
    case oracle::WeightOnly: return zp::linear_weight_only(w, x, bias, post, y, threads);
    default: return count(false, "there is no such call");
  }
}

// What the active instruction set computes.
inline std::vector<uint32_t> computed(const Problem& p, const Packed& packed, Guarded::Side side,
                                      int threads) {
  const size_t size = size_of(p.type), y_size = size_of(p.y_type());
  const int64_t stride = p.stride >= 0 ? p.stride : p.k;
  const int64_t elements = p.m == 0 ? 0 : (p.m - 1) * stride + p.k;
  Guarded x(size_t(elements) * size, side), bias(size_t(p.n) * 4, side);
  std::memset(x.as(), 0xff, size_t(elements) * size);  // NaN, or 255, between the rows
  for (int64_t m = 0; m < p.m; m++)
    for (int64_t k = 0; k < p.k; k++) put(x.as(), p.type, m * stride + k, p.x[m * p.k + k]);
  for (int64_t n = 0; n < p.n && p.has_bias; n++) bias.as<float>()[n] = p.bias[n];
  const int64_t rest = p.residual.empty() ? 0 : (p.m - 1) * p.residual_stride + p.n;
  Guarded residual(size_t(rest) * y_size, side);
  std::memset(residual.as(), 0xff, size_t(rest) * y_size);
  for (int64_t m = 0; m < p.m && rest; m++)
    for (int64_t n = 0; n < p.n; n++)
      put(residual.as(), p.y_type(), m * p.residual_stride + n, p.residual[m * p.n + n]);
  Guarded y(size_t(p.m * p.n) * y_size, side);
  std::memset(y.as(), 0xa5, size_t(p.m * p.n) * y_size);
  const zp::Input input{elements ? x.as() : nullptr, p.type, p.m, stride};  // as torch has it
  const float* b = p.has_bias ? bias.as<float>() : nullptr;
  const zp::Post post{p.activation, rest ? residual.as() : nullptr, p.residual_stride};
  count_call();
  if (packed.groups)
    call(p, *packed.groups, input, b, post, y.as(), threads);
  else if (p.mode == oracle::Quantized)
    zp::linear_quantized(*packed.integers, input, p.x_scale, p.x_zero, b, p.activation, y.as(),
                         p.y_scale, p.y_zero, threads);
  else if (p.mode == oracle::Float)
    zp::linear_float(*packed.floats, input, b, post, y.as(), threads);
  else
    call(p, *packed.integers, input, b, post, y.as(), threads);
  std::vector<uint32_t> codes(size_t(p.m * p.n));
  for (int64_t i = 0; i < p.m * p.n; i++) codes[i] = get(y.as(), p.y_type(), i);
  return codes;
}

inline std::string text(zp::Type type, uint32_t code) {
  char buffer[64];
  std::snprintf(buffer, sizeof buffer, "0x%x (%g)", code, double(oracle::decode(type, code)));
  return buffer;
}

inline void compare(const Problem& p, const std::vector<uint32_t>& want,
                    const std::vector<uint32_t>& got) {
  for (size_t i = 0; i < want.size(); i++) {
    const zp::Type type = p.y_type();
    if (want[i] == got[i] || (oracle::is_nan(type, want[i]) && oracle::is_nan(type, got[i])))
      continue;
    return count(false, "row " + std::to_string(int64_t(i) / p.n) + " output " +
                            std::to_string(int64_t(i) % p.n) + ": expected " + text(type, want[i]) +
                            ", got " + text(type, got[i]));
  }
  count(true, "");
}

// A comparison of constants would prove little: inputs and expected outputs must vary.
inline void check_not_dull(const Problem& p, const std::vector<uint32_t>& want) {
  if (p.dull || p.m * p.n < 8 || p.k < 4) return;
  std::set<uint32_t> x(p.x.begin(), p.x.end()), y(want.begin(), want.end());
  std::set<int64_t> w(p.w.begin(), p.w.end());
  if (p.mode == oracle::Float) w = std::set<int64_t>(p.float_w.begin(), p.float_w.end());
  const size_t nans = size_t(std::count_if(
      want.begin(), want.end(), [&](uint32_t code) { return oracle::is_nan(p.y_type(), code); }));
  count(x.size() > 3 && w.size() > 1 && y.size() > 3 && nans < want.size(),
        "the problem is degenerate: " + std::to_string(x.size()) + " different inputs, " +
            std::to_string(w.size()) + " weights, " + std::to_string(y.size()) + " outputs, " +
            std::to_string(nans) + " of them NaN");
}

template <class F>
void on_each_isa(const std::string& name, const F& f) {
  for (int i = 0; i < zp::count_isas(); i++) {
    const char* isa = zp::isa_at(i).name;
    std::snprintf(where, sizeof where, "%s on %s", name.c_str(), isa);
    count(zp::force_isa(isa) && !std::strcmp(zp::active_isa().name, isa), "cannot be forced");
    f(isa);
  }
}

inline std::string groups_of(const Problem& p) {
  if (!p.group) return "";
  return " groups of " + std::to_string(p.group) + " " + kTypes[p.scale_type] + " " +
         std::to_string(p.bits) + " bits";
}

// On every instruction set, with each number of threads up to `most`.
inline void check(const Problem& p, const std::string& name, int most = 2) {
  if (problems++ % every) return;
  const std::string full = name + " " + kModes[p.mode] + " " + kTypes[p.type] + " " +
                           std::to_string(p.m) + "x" + std::to_string(p.k) + "x" +
                           std::to_string(p.n) + groups_of(p) + (p.has_bias ? " bias" : "") +
                           kActivations[p.activation] + (p.residual.empty() ? "" : " residual");
  std::snprintf(where, sizeof where, "%s by the oracle", full.c_str());
  const std::vector<uint32_t> want = oracle::expected(p);
  check_not_dull(p, want);
  for (const Guarded::Side side : {Guarded::AtEnd, Guarded::AtStart}) {
    std::snprintf(where, sizeof where, "%s, packing", full.c_str());
    const Packed w = pack(p, side);
    on_each_isa(full, [&](const char*) {
      for (int threads = 1; threads <= most; threads++)
        compare(p, want, computed(p, w, side, threads));
    });
  }
}

// Says which case crashed, then dies. A sanitizer has a handler of its own, which says more.
inline void explain_crashes() {
#if !defined(__SANITIZE_ADDRESS__)
  struct sigaction action{};
  action.sa_handler = [](int number) {
    const char text[] = "CRASHED in ";
    if (write(1, text, sizeof text - 1) < 0 || write(1, where, std::strlen(where)) < 0 ||
        write(1, "\n", 1) < 0)
      _exit(3);
    std::signal(number, SIG_DFL);
    raise(number);
  };
  for (const int number : {SIGSEGV, SIGBUS, SIGILL, SIGFPE}) sigaction(number, &action, nullptr);
#endif
}

}  // namespace harness
