// AVX-512 with VNNI: 64 products an instruction (VPDPBUSD), accumulated in int32 without
// saturation. A register tile is 6 rows x 64 outputs.
#include <immintrin.h>

#include "dispatch.h"

namespace zp {
namespace {
#include "scalar.h"
#include "kernel_common.h"
#include "kernel_quantize.h"
#include "kernel_int8.h"
#include "kernel_float.h"
#include "avx512.h"
#include "isa_table.h"
}  // namespace

extern const Isa isa_avx512vnni =
    make_isa<Avx512>("avx512vnni", cpu_has_avx512vnni, 200.0f, 100.0f);
}  // namespace zp
