// The Python binding, and nothing else: addresses in, nothing out. zeropoint/kernels checks
// types, shapes and devices; here only what would crash is checked again.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "zeropoint.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Address = uintptr_t;

template <class T = void>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Lets other Python threads run, where the work is long enough to be worth the switch.
class ReleaseGil {
 public:
  explicit ReleaseGil(int64_t multiply_adds) {
    if (multiply_adds > (int64_t(1) << 20)) release_.emplace();
  }
  template <class W>
  ReleaseGil(const W& w, int64_t rows) : ReleaseGil(rows * w.n * w.k) {}

 private:
  std::optional<nb::gil_scoped_release> release_;
};

zp::Type float_type(int type) {
  if (type < zp::F32 || type > zp::F16) throw nb::value_error("type must be 0, 1 or 2");
  return zp::Type(type);
}

// From activation, residual's address and its stride, which come last and may be left out.
zp::Post post_of(int activation, Address residual, int64_t stride) {
  if (activation < zp::None || activation > zp::SiLU) throw nb::value_error("activation: 0 to 3");
  return {zp::Activation(activation), at<const void>(residual), stride};
}

const zp::Isa& isa_named(const std::string& name) {
  for (int i = 0; i < zp::count_isas(); i++)
    if (name == zp::isa_at(i).name) return zp::isa_at(i);
  throw nb::value_error("this machine cannot run that isa");
}

zp::Type integer_type(bool is_signed) { return is_signed ? zp::S8 : zp::U8; }

// The functions that PackedInt8 and PackedGroups have alike.
#define FLOAT_ARGUMENTS "x"_a, "type"_a, "rows"_a, "stride"_a, "bias"_a, "y"_a, "threads"_a
#define POST_ARGUMENTS "activation"_a = 0, "residual"_a = 0, "residual_stride"_a = 0

template <class W>
void dynamic(const W& w, Address x, int type, int64_t rows, int64_t stride, Address bias, Address y,
             int threads, int activation, Address residual, int64_t residual_stride) {
  const ReleaseGil release(w, rows);
  zp::linear_dynamic(w, {at(x), float_type(type), rows, stride}, at<const float>(bias),
                     post_of(activation, residual, residual_stride), at(y), threads);
}

template <class W>
void weight_only(const W& w, Address x, int type, int64_t rows, int64_t stride, Address bias,
                 Address y, int threads, int activation, Address residual,
                 int64_t residual_stride) {
  const ReleaseGil release(w, rows);
  zp::linear_weight_only(w, {at(x), float_type(type), rows, stride}, at<const float>(bias),
                         post_of(activation, residual, residual_stride), at(y), threads);
}

template <class W>
void static_(const W& w, Address x, int type, int64_t rows, int64_t stride, Address bias, Address y,
             int threads, float scale, int32_t zero_point, int activation, Address residual,
             int64_t residual_stride) {
  const ReleaseGil release(w, rows);
  zp::linear_static(w, {at(x), float_type(type), rows, stride}, scale, zero_point,
                    at<const float>(bias), post_of(activation, residual, residual_stride), at(y),
                    threads);
}

template <class W>
void integer(const W& w, Address q, bool is_signed, int64_t rows, int64_t stride, float scale,
             int32_t zero_point, Address bias, Address y, int threads, int activation,
             Address residual, int64_t residual_stride) {
  const ReleaseGil release(w, rows);
  zp::linear_integer(w, {at(q), integer_type(is_signed), rows, stride}, scale, zero_point,
                     at<const float>(bias), post_of(activation, residual, residual_stride),
                     at<float>(y), threads);
}

}  // namespace

NB_MODULE(_core, m) {
  // Packed weights that live until the interpreter ends are no leak.
  nb::set_leak_warnings(false);
  m.doc() = "The C++ core of zeropoint. Private: use zeropoint.kernels.";

  m.def("available_isas", [] {
    std::vector<std::string> names;
    for (int i = 0; i < zp::count_isas(); i++) names.emplace_back(zp::isa_at(i).name);
    return names;
  });
  m.def("active_isa", [] { return std::string(zp::active_isa().name); });
  m.def("force_isa", [](const std::string& name) {
    if (!zp::force_isa(name.c_str())) throw nb::value_error("this machine cannot run that isa");
  });

  // For zeropoint/limits.py. Returns the work done: multiply-adds, or bytes; 0 where this CPU has
  // no such instruction.
  m.def("limit_compute", [](const std::string& isa, int type, int64_t rounds) -> int64_t {
    const zp::Limits& limits = isa_named(isa).limits;
    const auto run = type == zp::U8    ? limits.int8
                     : type == zp::F32 ? limits.float32
                                       : limits.bfloat16;
    const nb::gil_scoped_release release;
    return run ? run(rounds) : 0;
  });
  m.def("limit_read",
        [](const std::string& isa, Address data, int64_t bytes, int64_t rounds, bool prefetch) {
          const zp::Limits& limits = isa_named(isa).limits;
          const nb::gil_scoped_release release;
          return limits.read[prefetch](at<const void>(data), bytes, rounds);
        });

  m.def("transform_input", [](Address x, int type, int64_t rows, int64_t stride, int64_t k,
                              Address factor, int64_t size, Address y, int threads) {
    if (size < 1 || size & (size - 1) || k % size) throw nb::value_error("size does not fit");
    const ReleaseGil release(16 * rows * k);  // what an entry takes, in multiply-adds
    zp::transform_input({at(x), float_type(type), rows, stride}, k, at<const float>(factor), size,
                        at(y), threads);
  });

  nb::class_<zp::PackedInt8>(m, "PackedInt8")
      .def("__init__",
           [](zp::PackedInt8* self, Address integers, bool is_unsigned, int64_t n, int64_t k,
              Address scale, Address zero_point, bool per_channel) {
             if (n < 0 || k < 0) throw nb::value_error("negative size");
             new (self)
                 zp::PackedInt8(at<const void>(integers), is_unsigned, n, k, at<const float>(scale),
                                at<const int32_t>(zero_point), per_channel);
           })
      .def_ro("out_features", &zp::PackedInt8::n)
      .def_ro("in_features", &zp::PackedInt8::k)
      .def_prop_ro("nbytes", &zp::PackedInt8::nbytes)
      .def("unpack", [](const zp::PackedInt8& w, Address integers) { w.unpack(at(integers)); })
      .def("linear_dynamic", dynamic<zp::PackedInt8>, FLOAT_ARGUMENTS, POST_ARGUMENTS)
      .def("linear_weight_only", weight_only<zp::PackedInt8>, FLOAT_ARGUMENTS, POST_ARGUMENTS)
      .def("linear_static", static_<zp::PackedInt8>, FLOAT_ARGUMENTS, "scale"_a, "zero_point"_a,
           POST_ARGUMENTS)
      .def("linear_integer", integer<zp::PackedInt8>)
      .def("linear_quantized", [](const zp::PackedInt8& w, Address q, bool is_signed, int64_t rows,
                                  int64_t stride, float scale, int32_t zero_point, Address bias,
                                  Address y, float y_scale, int32_t y_zero_point, int threads,
                                  int activation) {
        const ReleaseGil release(w, rows);
        zp::linear_quantized(w, {at(q), integer_type(is_signed), rows, stride}, scale, zero_point,
                             at<const float>(bias), post_of(activation, 0, 0).activation, at(y),
                             y_scale, y_zero_point, threads);
      });

  nb::class_<zp::PackedGroups>(m, "PackedGroups")
      .def("__init__",
           [](zp::PackedGroups* self, Address codes, int bits, int64_t n, int64_t k, int64_t group,
              Address scale, int scale_type, Address zero_point) {
             if (n < 0 || k < 0) throw nb::value_error("negative size");
             const int64_t most = bits > 4 ? zp::kMaxBytesGroup : zp::kMaxGroup;
             if (group < 1 || group > most) throw nb::value_error("group: 1 to 2^20 or 2^16");
             new (self) zp::PackedGroups(at<const uint8_t>(codes), bits, n, k, group, at(scale),
                                         float_type(scale_type), at<const int32_t>(zero_point));
           })
      .def_ro("out_features", &zp::PackedGroups::n)
      .def_ro("in_features", &zp::PackedGroups::k)
      .def_prop_ro("nbytes", &zp::PackedGroups::nbytes)
      .def("unpack", [](const zp::PackedGroups& w, Address codes) { w.unpack(at<uint8_t>(codes)); })
      .def("linear_dynamic", dynamic<zp::PackedGroups>, FLOAT_ARGUMENTS, POST_ARGUMENTS)
      .def("linear_weight_only", weight_only<zp::PackedGroups>, FLOAT_ARGUMENTS, POST_ARGUMENTS)
      .def("linear_static", static_<zp::PackedGroups>, FLOAT_ARGUMENTS, "scale"_a, "zero_point"_a,
           POST_ARGUMENTS)
      .def("linear_integer", integer<zp::PackedGroups>);

  nb::class_<zp::PackedFloat>(m, "PackedFloat")
      .def("__init__",
           [](zp::PackedFloat* self, Address weights, int type, int64_t n, int64_t k) {
             if (n < 0 || k < 0) throw nb::value_error("negative size");
             if (type == zp::F16) throw nb::value_error("weights are float32 or bfloat16");
             new (self) zp::PackedFloat(at<const void>(weights), float_type(type), n, k);
           })
      .def_ro("out_features", &zp::PackedFloat::n)
      .def_ro("in_features", &zp::PackedFloat::k)
      .def_prop_ro("nbytes", &zp::PackedFloat::nbytes)
      .def("unpack", [](const zp::PackedFloat& w, Address weights) { w.unpack(at(weights)); })
      .def(
          "linear_float",
          [](const zp::PackedFloat& w, Address x, int type, int64_t rows, int64_t stride,
             Address bias, Address y, int threads, int activation, Address residual,
             int64_t residual_stride) {
            const ReleaseGil release(w, rows);
            zp::linear_float(w, {at(x), float_type(type), rows, stride}, at<const float>(bias),
                             post_of(activation, residual, residual_stride), at(y), threads);
          },
          FLOAT_ARGUMENTS, POST_ARGUMENTS);
}
