// A matrix descriptor of wgmma, decoded: where an operand lies in shared memory.
#pragma once

#include <cstdint>

namespace fastlora::model {

// The 128-byte swizzle: bits 7-9 of an absolute address onto bits 4-6. Its own inverse.
constexpr uint32_t swizzled(uint32_t address) { return address ^ (address >> 3 & 0x70); }

// ``size`` rows (m of A, n of B) of 16 k.
struct Operand {
  uint32_t start, leading, stride;
  bool mn_major;
  uint32_t size;

  Operand(uint64_t descriptor, char name, bool mn_major, uint32_t size);

  // Where element (i, k) lies; k a multiple of 8 where K-major, i of 8 where MN-major. The canonical layouts are
  // ((8,i),(T,2k)) : ((8T,stride),(1,T)) and, in units of 16 bytes, ((8,i),(8,k)) : ((1,leading),(8,stride)), counted
  // from the start before the swizzle, which permutes the bits of the absolute address.
  uint32_t place(uint32_t i, uint32_t k) const {
    return swizzled(mn_major ? start + i / 64 * leading + i % 64 * 2 + k / 8 * stride + k % 8 * 128
                             : start + i / 8 * stride + i % 8 * 128 + k * 2);
  }

  // Whether any of these bytes is read; several rows at once only from the first to the last byte of each.
  bool reads(uint32_t address, uint32_t bytes) const;
};

}  // namespace fastlora::model
