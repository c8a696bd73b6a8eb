// Packed weights: from rows to the layout of the hardware, and back.
#include <cstdlib>
#include <cstring>

#include "memory.h"
#include "zeropoint.h"

namespace zp {
PackedInt8::PackedInt8(const void* integers, bool is_unsigned, int64_t n, int64_t k,
                       const float* scales, const int32_t* zero_points, bool per_channel)
    : n(n),
      k(k),
      k_padded(round_up(k, kStep)),
      panels(ceil_div(n, kPanel)),
      is_unsigned(is_unsigned) {
  const int64_t lanes = panels * kPanel, shift = is_unsigned ? 128 : 0;
  bool any_zero_point = false;
  for (int64_t i = 0; i < n; i++) any_zero_point |= zero_points[per_channel ? i : 0] != shift;
  try {
    weight = allocate<int8_t>(lanes * k_padded);
    scale = allocate<float>(lanes);
    sum = allocate<int16_t>(2 * lanes);
    if (any_zero_point) zero_point = allocate<int32_t>(lanes);
    if (!narrow()) sum64 = allocate<int64_t>(lanes);
  } catch (...) {
    this->~PackedInt8();
    throw;
  }
  const uint8_t flip = is_unsigned ? 0x80 : 0;  // uint8 less 128, as int8, is the top bit flipped
  const uint8_t* from = static_cast<const uint8_t*>(integers);
  for (int64_t p = 0; p < panels; p++) {
    uint8_t* to = reinterpret_cast<uint8_t*>(weight) + p * k_padded * kPanel;
    for (int64_t lane = 0; lane < kPanel; lane++) {
      const int64_t i = p * kPanel + lane;
      const bool real = i < n;  // not of the padding; an empty tensor may lie at address 0
      const uint8_t* row = from + i * k;
      int64_t total = 0;
      for (int64_t q = 0; q < k_padded; q += 4) {
        uint8_t quad[4] = {0, 0, 0, 0};
        for (int64_t j = q; real && j < q + 4 && j < k; j++) {
          quad[j - q] = row[j] ^ flip;
          total += int8_t(quad[j - q]);
        }
        std::memcpy(to + q * kPanel + lane * 4, quad, 4);
      }
      scale[i] = real ? scales[per_channel ? i : 0] : 0.0f;
      const int64_t high = (total + 64) >> 7;  // floor: total = 128 * high + low, |low| <= 64
      sum[2 * i] = int16_t(total - 128 * high);
      sum[2 * i + 1] = narrow() ? int16_t(high) : int16_t(0);
      if (sum64) sum64[i] = total;
      if (zero_point) zero_point[i] = real ? zero_points[per_channel ? i : 0] - int32_t(shift) : 0;
    }
  }
}

PackedInt8::~PackedInt8() {
  std::free(weight);
  std::free(scale);
  std::free(sum);
  std::free(sum64);
  std::free(zero_point);
}

void PackedInt8::unpack(void* integers) const {
  const uint8_t flip = is_unsigned ? 0x80 : 0;
  uint8_t* to = static_cast<uint8_t*>(integers);
  for (int64_t i = 0; i < n; i++) {
    const uint8_t* lane = reinterpret_cast<const uint8_t*>(panel(i / kPanel)) + (i % kPanel) * 4;
    for (int64_t j = 0; j < k; j++) to[i * k + j] = lane[j / 4 * (4 * kPanel) + j % 4] ^ flip;
  }
}

size_t PackedInt8::nbytes() const {
  const size_t lanes = size_t(panels) * kPanel;
  return lanes * (size_t(k_padded) + 8 + (sum64 ? 8 : 0) + (zero_point ? 4 : 0));
}

PackedFloat::PackedFloat(const void* weights, Type type, int64_t n, int64_t k)
    : n(n), k(k), panels(ceil_div(n, kPanel)), type(type) {
  const int64_t size = type == F32 ? 4 : 2;
  char* to = allocate<char>(panels * kPanel * k * size);
  weight = to;
  const char* from = static_cast<const char*>(weights);
  for (int64_t p = 0; p < panels; p++)
    for (int64_t j = 0; j < k; j++)
      for (int64_t lane = 0; lane < kPanel; lane++, to += size) {
        const int64_t i = p * kPanel + lane;
        if (i < n)
          std::memcpy(to, from + (i * k + j) * size, size_t(size));
        else
          std::memset(to, 0, size_t(size));
      }
}

PackedFloat::~PackedFloat() { std::free(weight); }

void PackedFloat::unpack(void* weights) const {
  const int64_t size = type == F32 ? 4 : 2;
  const char* from = static_cast<const char*>(weight);
  for (int64_t i = 0; i < n; i++)
    for (int64_t j = 0; j < k; j++)
      std::memcpy(static_cast<char*>(weights) + (i * k + j) * size,
                  from + ((i / kPanel * k + j) * kPanel + i % kPanel) * size, size_t(size));
}

size_t PackedFloat::nbytes() const { return size_t(panels * kPanel * k) * (type == F32 ? 4 : 2); }

}  // namespace zp
