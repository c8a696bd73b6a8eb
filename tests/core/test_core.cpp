// The core without Python: every call on every instruction set that this machine runs, against the
// oracle of triple loops, bit for bit, named by hazard.
//
//   test_core [--isas=ISA,ISA...] [--only=PART OF A NAME] [--every=N]
//
// --isas fails unless these are what the machine runs, best first, so that a pass proves that they
// ran, and that no other was believed to be there. --every solves the first problem of a test and
// each Nth after it; with a prime N, some of every mode and type.
#include <ctime>

#include "harness.h"

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
    else if (argument.rfind("--every=", 0) == 0 && std::atoi(argument.c_str() + 8) > 0)
      harness::every = std::atoi(argument.c_str() + 8);
    else
      return std::printf("usage: %s [--isas=ISA,...] [--only=PART] [--every=N]\n", argv[0]), 2;
  }
  std::printf("instruction sets: %s\n", isas.c_str());
  if (!wanted.empty() && wanted != isas) {
    std::printf("expected: %s\n", wanted.c_str());
    return 1;
  }
  int ran = 0;
  for (const harness::Test& test : harness::tests()) {
    if (!std::strstr(test.name, only.c_str())) continue;
    const int64_t before = harness::passed, failures = harness::failed;
    harness::problems = 0;  // the first of a test is always solved
    std::snprintf(harness::where, sizeof harness::where, "%s", test.name);
    const std::clock_t start = std::clock();  // of all threads: a busy machine changes little
    test.run();
    const double seconds = double(std::clock() - start) / CLOCKS_PER_SEC;
    std::printf("%-32s %7lld passed %6.1f s%s\n", test.name, (long long)(harness::passed - before),
                seconds, harness::failed > failures ? ", FAILED" : "");
    std::fflush(stdout);
    ran++;
  }
  std::printf("calls:");
  bool alike = true;
  for (int i = 0; i < zp::count_isas(); i++) {
    std::printf(" %s %lld", zp::isa_at(i).name, (long long)harness::calls[i]);
    alike &= harness::calls[i] == harness::calls[0];
  }
  std::printf("%s\n", alike ? "" : " - not all ran the same: FAILED");
  std::printf("%lld passed, %lld failed\n", (long long)harness::passed, (long long)harness::failed);
  return harness::failed || ran == 0 || !alike ? 1 : 0;
}
