// The table entry of an instruction set, made of the kernels instantiated over its trait. Included
// by each linear_<isa>.cpp after the kernels, inside its anonymous namespace.
#include "kernel_limits.h"

template <class V>
constexpr Isa make_isa(const char* name, bool (*supported)(), float gmacs, float float_gmacs) {
  return Isa{
      name,
      supported,
      4,
      1,
      V::a_offset,
      gmacs,
      float_gmacs,
      {quantize_dynamic<V, F32>, quantize_dynamic<V, BF16>, quantize_dynamic<V, F16>},
      {quantize_static<V, F32>, quantize_static<V, BF16>, quantize_static<V, F16>},
      {transform_row<V, F32>, transform_row<V, BF16>, transform_row<V, F16>},
      int8_block<V>,
      float_block<V>,
      group_block<V>,
      prepare_groups<V>,
      V::coded_rows,
      V::unsigned_rows,
      V::widen,
      {peak_int8<V>, peak_float32<V>, nullptr, {read_memory<V, false>, read_memory<V, true>}}};
}
