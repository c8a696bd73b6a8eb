// The one file that names instruction sets: which this CPU has and its operating system enabled,
// the order of preference, and the override. To add one: its file, its line in kTable.
#include "dispatch.h"

#include <atomic>
#include <cstring>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace zp {

extern const Isa isa_portable;

#if defined(__x86_64__)
namespace {

struct Leaf {
  unsigned a = 0, b = 0, c = 0, d = 0;
};

Leaf cpuid(unsigned leaf, unsigned subleaf = 0) {
  Leaf l;
  __get_cpuid_count(leaf, subleaf, &l.a, &l.b, &l.c, &l.d);
  return l;
}

bool bit(unsigned word, int index) { return (word >> index) & 1u; }

// Which register states the operating system saves (XGETBV): without it, wide registers would be
// lost at a context switch, whatever the CPU offers.
bool os_saves(unsigned mask) {
  if (!bit(cpuid(1).c, 27)) return false;  // OSXSAVE
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & mask) == mask;
}

constexpr unsigned kYmm = 0x6, kZmm = 0xe6, kTiles = 0x60000;

// Linux hands out tile registers on request, once for the process.
bool tiles_permitted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int request = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, request, tile_data) == 0;
  return granted;
#else
  return false;
#endif
}

}  // namespace

bool cpu_has_avx2() {
  const Leaf one = cpuid(1), seven = cpuid(7);
  return os_saves(kYmm) && bit(one.c, 12) && bit(one.c, 29) && bit(seven.b, 5);  // FMA, F16C, AVX2
}

bool cpu_has_avxvnni() { return cpu_has_avx2() && bit(cpuid(7, 1).a, 4); }

bool cpu_has_avx512vnni() {
  const Leaf seven = cpuid(7);
  return cpu_has_avx2() && os_saves(kZmm) && bit(seven.b, 16) && bit(seven.b, 17) &&
         bit(seven.b, 30) && bit(seven.b, 31) && bit(seven.c, 11);  // F, DQ, BW, VL, VNNI
}

bool cpu_has_amx() {
  const Leaf seven = cpuid(7);
  return cpu_has_avx512vnni() && os_saves(kTiles) && bit(seven.d, 24) && bit(seven.d, 25) &&
         tiles_permitted();
}

bool cpu_has_avx512bf16() { return cpu_has_avx512vnni() && bit(cpuid(7, 1).a, 5); }

bool cpu_has_amx_bf16() { return cpu_has_amx() && bit(cpuid(7).d, 22); }

extern const Isa isa_avx2, isa_avxvnni, isa_avx512vnni, isa_amx;
#endif

#if defined(__aarch64__)
namespace {

#if defined(__linux__)
// Bits of the kernel's own (asm/hwcap.h), which it sets only for what it enabled.
bool os_says(unsigned long type, int bit) { return (getauxval(type) >> bit) & 1u; }
bool has_dot_product() { return os_says(AT_HWCAP, 20); }      // HWCAP_ASIMDDP
bool has_matrix_product() { return os_says(AT_HWCAP2, 13); }  // HWCAP2_I8MM
#elif defined(__APPLE__)
bool os_says(const char* name) {
  int value = 0;
  size_t size = sizeof value;
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value;
}
bool has_dot_product() { return os_says("hw.optional.arm.FEAT_DotProd"); }
bool has_matrix_product() { return os_says("hw.optional.arm.FEAT_I8MM"); }
#else
bool has_dot_product() { return false; }
bool has_matrix_product() { return false; }
#endif

}  // namespace

bool cpu_has_neon() { return true; }  // part of every 64-bit ARM

bool cpu_has_neondot() { return has_dot_product(); }

bool cpu_has_neoni8mm() { return has_dot_product() && has_matrix_product(); }

extern const Isa isa_neon, isa_neondot, isa_neoni8mm;
#endif

namespace {

const Isa* const kTable[] = {
// Best first.
#if defined(__x86_64__)
    &isa_amx,      &isa_avx512vnni, &isa_avxvnni, &isa_avx2,
#elif defined(__aarch64__)
    &isa_neoni8mm,
    &isa_neondot,
    &isa_neon,
#endif
    &isa_portable,
};

struct Supported {
  const Isa* isa[sizeof kTable / sizeof *kTable];
  int count = 0;
  Supported() {
    for (const Isa* candidate : kTable)
      if (candidate->supported()) isa[count++] = candidate;
  }
};

const Supported& supported() {
  static const Supported list;
  return list;
}

std::atomic<const Isa*> active{nullptr};

}  // namespace

int count_isas() { return supported().count; }

const Isa& isa_at(int index) { return *supported().isa[index]; }

const Isa& active_isa() {
  const Isa* isa = active.load(std::memory_order_relaxed);
  return isa ? *isa : isa_at(0);
}

bool force_isa(const char* name) {
  for (int i = 0; i < count_isas(); i++)
    if (!std::strcmp(isa_at(i).name, name)) {
      active.store(&isa_at(i), std::memory_order_relaxed);
      return true;
    }
  return false;
}

}  // namespace zp
