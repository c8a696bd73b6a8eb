// What the kernel files need of dispatch.cpp: the tests of the CPU, so that no file compiled with
// wide instructions holds code that runs before the test.
#pragma once

#include "zeropoint.h"

namespace zp {
bool cpu_has_avx2();
bool cpu_has_avxvnni();
bool cpu_has_avx512vnni();
bool cpu_has_amx();
bool cpu_has_neon();
bool cpu_has_neondot();
bool cpu_has_neoni8mm();
// For limits only: no kernel uses them.
bool cpu_has_avx512bf16();
bool cpu_has_amx_bf16();
}  // namespace zp
