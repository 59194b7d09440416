// 16-bit floating-point formats in software, as the conversions of the GPU round them.
#pragma once

#include <cstdint>
#include <cstring>

namespace fastlora {

namespace model {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace model

struct BF16 {
  static constexpr bool IS_BF16 = true;
  static uint16_t round(float x) {
    const uint32_t bits = model::bits_of(x);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FFF;
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
  static float widen(uint16_t x) { return model::float_of(uint32_t(x) << 16); }
  static float widen_high(uint32_t word) { return widen(word >> 16); }
  static uint32_t pack(float low, float high) { return round(low) | uint32_t(round(high)) << 16; }
};

struct FP16 {
  static constexpr bool IS_BF16 = false;
  static uint16_t round(float x) {
    const uint32_t bits = model::bits_of(x);
    const uint32_t sign = bits >> 16 & 0x8000;
    const uint32_t size = bits & 0x7FFFFFFF;
    if (size > 0x7F800000) return 0x7FFF;
    // From 65520 on, halfway past the largest, infinity is the nearest.
    if (size >= 0x477FF000) return static_cast<uint16_t>(sign | 0x7C00);
    // Subnormal: the addition rounds at 2^-24, the last place of one half.
    if (size < 0x38800000) {
      return static_cast<uint16_t>(sign | (model::bits_of(model::float_of(size) + 0.5f) - 0x3F000000));
    }
    return static_cast<uint16_t>(sign | ((size - (112u << 23) + 0xFFF + (size >> 13 & 1)) >> 13));
  }
  static float widen(uint16_t x) {
    const uint32_t sign = uint32_t(x & 0x8000) << 16;
    const uint32_t exponent = x >> 10 & 31;
    const uint32_t mantissa = x & 0x3FF;
    if (exponent == 0) {
      return model::float_of(sign | model::bits_of(static_cast<float>(mantissa) * model::float_of(0x33800000)));
    }
    if (exponent == 31) return model::float_of(sign | 0x7F800000 | mantissa << 13);
    return model::float_of(sign | (exponent + 112) << 23 | mantissa << 13);
  }
  static float widen_high(uint32_t word) { return widen(word >> 16); }
  static uint32_t pack(float low, float high) { return round(low) | uint32_t(round(high)) << 16; }
};

}  // namespace fastlora
