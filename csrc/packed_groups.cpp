// Weights in groups: from rows of codes to the layout of the hardware, and back.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "memory.h"
#include "zeropoint.h"

namespace zp {
namespace {
#include "scalar.h"

float scale_at(const void* scales, Type type, int64_t i) {
  switch (type) {
    case BF16: return scalar_load<BF16>(scales, i);
    case F16: return scalar_load<F16>(scales, i);
    default: return scalar_load<F32>(scales, i);
  }
}

}  // namespace

PackedGroups::PackedGroups(const uint8_t* codes, int bits, int64_t n, int64_t k, int64_t group,
                           const void* scale, Type scale_type, const int32_t* zero_point)
    : n(n),
      k(k),
      group(std::min(group, std::max(k, int64_t(1)))),  // kernels make room for a whole group
      groups(ceil_div(k, group)),
      panels(ceil_div(n, kPanel)),
      group_padded(round_up(this->group, 8)),
      scale_type(scale_type),
      bytes(bits > 4) {
  const int64_t size = scale_type == F32 ? 4 : 2, all = n * groups;
  bool one_zero = true;
  for (int64_t i = 1; i < all; i++) one_zero &= zero_point[i] == zero_point[0];
  if (one_zero) zero = all ? zero_point[0] : 0;
  const int64_t behind = kPanel * (size + (one_zero ? 0 : 1));  // scales and zero points
  record_bytes = codes_bytes(group_padded) + behind;
  const int64_t last = groups ? size_of(groups - 1) : 0;
  panel_bytes = groups ? (groups - 1) * record_bytes + codes_bytes(last) + behind : 0;
  try {
    weight = allocate<uint8_t>(panels * panel_bytes);
    sum = allocate<float>(panels * kPanel);
  } catch (...) {
    this->~PackedGroups();
    throw;
  }
  std::memset(weight, 0, size_t(panels * panel_bytes));
  for (int64_t i = 0; i < panels * kPanel; i++) {
    const int64_t lane = i % kPanel;
    float total = 0.0f;
    for (int64_t g = 0; g < groups && i < n; g++) {
      uint8_t* to = const_cast<uint8_t*>(record(i / kPanel, g));
      const int64_t count = size_of(g), at = i * groups + g;
      const uint8_t* from = codes + i * k + g * group;
      int64_t exact = -count * zero_point[at];
      for (int64_t j = 0; j < count; j++) {
        to[place(j, lane)] |= uint8_t(from[j] << shift(j));
        exact += from[j];
      }
      for (int64_t j = count; j < round_up(count, 8); j++)  // stands for no weight
        to[place(j, lane)] |= uint8_t(zero_point[at] << shift(j));
      to += codes_bytes(count);
      std::memcpy(to + lane * size, static_cast<const char*>(scale) + at * size, size_t(size));
      if (!one_zero) to[kPanel * size + lane] = uint8_t(zero_point[at]);
      total = std::fmaf(float(exact), scale_at(scale, scale_type, at), total);
    }
    sum[i] = total;
  }
}

PackedGroups::~PackedGroups() {
  std::free(weight);
  std::free(sum);
}

void PackedGroups::unpack(uint8_t* codes) const {
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < k; j++) {
      const int64_t in = j % group;
      const uint8_t* from = record(i / kPanel, j / group);
      codes[i * k + j] = from[place(in, i % kPanel)] >> shift(in) & (bytes ? 255 : 15);
    }
}

size_t PackedGroups::nbytes() const { return size_t(panels * (panel_bytes + kPanel * 4)); }

}  // namespace zp
