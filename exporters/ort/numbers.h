// IEEE half and bfloat16, converted by hand: compilers of every age have float.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace freqopt {

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(Bfloat16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
inline float to_float(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const int exponent = (x.bits >> 10) & 0x1f, mantissa = x.bits & 0x3ff;
  if (exponent == 0) {
    const float value = std::ldexp(float(mantissa), -24);
    return sign ? -value : value;
  }
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | uint32_t(mantissa) << 13);
  return bits_to_float(sign | uint32_t(exponent + 112) << 23 | uint32_t(mantissa) << 13);
}

template <typename T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
  return x;
}

template <>
inline Bfloat16 from_float<Bfloat16>(float x) {
  uint32_t bits = float_to_bits(x);
  if (std::isnan(x)) return {uint16_t(bits >> 16 | 0x40)};
  bits += 0x7fff + ((bits >> 16) & 1);  // round to nearest, ties to even
  return {uint16_t(bits >> 16)};
}

template <>
inline Half from_float<Half>(float x) {
  const uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};           // NaN
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};          // rounds to infinity
  if (magnitude < 0x38800000) {                                          // subnormal
    const float scaled = std::nearbyint(std::ldexp(std::fabs(x), 24));
    return {uint16_t(sign | uint16_t(scaled))};
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return {uint16_t(sign | (rounded - 0x38000000) >> 13)};
}

}  // namespace freqopt
