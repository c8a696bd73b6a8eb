// What surrounds a call: the choice of the instruction set, the caller's threads and float
// settings.
#include <cfenv>
#include <thread>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "inputs.h"

namespace {

using namespace inputs;
using harness::check;

TEST(forcing) {
  harness::count(!zp::force_isa("mmx") && !zp::force_isa(""), "an unknown name is accepted");
  std::set<std::string> names;
  for (int i = 0; i < zp::count_isas(); i++) names.insert(zp::isa_at(i).name);
  harness::count(int(names.size()) == zp::count_isas(), "two instruction sets of one name");
  harness::count(names.count("portable") == 1, "no portable kernel");
}

TEST(several_callers_at_once) {
  std::vector<Problem> problems;
  const auto add = [&](const Problem& p) { problems.push_back(p); };
  every_mode({6, 130, 66}, add);
  every_group_mode({6, 130, 66}, 32, add);
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

TEST(float_environment_of_the_caller) {
  std::vector<Problem> problems;
  const auto add = [&](Problem p) {
    p.x_scale = 1.3e-38f;
    if (p.mode == Static || p.mode == Dynamic)
      for (int64_t k = 0; k < p.k; k++) p.x[k] = encode(p.type, 1e-39f * float(k - 20));
    p.dull = true;
    problems.push_back(p);
  };
  every_mode({9, 70, 66}, add);
  every_group_mode({9, 70, 66}, 32, add);
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

}  // namespace
