#include "operand.hpp"

#include "model.hpp"

namespace fastlora::model {

// PTX ISA 9.7.15.5.1.2, "Matrix Descriptor Format".
Operand::Operand(uint64_t bits, char name, bool mn_major, uint32_t size)
    : start(uint32_t(bits & 0x3FFF) << 4),
      leading(uint32_t(bits >> 16 & 0x3FFF) << 4),
      stride(uint32_t(bits >> 32 & 0x3FFF) << 4),
      mn_major(mn_major),
      size(size) {
  if (bits >> 62 != 1) fail("wgmma: descriptor of %c: swizzle mode %u, not 1 (128 bytes)", name, uint32_t(bits >> 62));
  if (bits >> 49 & 7) fail("wgmma: descriptor of %c: base offset %u, not 0", name, uint32_t(bits >> 49 & 7));
  if (bits & (uint64_t(3) << 14 | uint64_t(3) << 30 | uint64_t(7) << 46 | uint64_t(0x3FF) << 52)) {
    fail("wgmma: descriptor of %c: 0x%016llx has bits set that mean nothing", name,
         static_cast<unsigned long long>(bits));
  }
  // With a base offset of 0 the pattern of 8 rows starts on its own period.
  if (start & 0x380)
    fail("wgmma: descriptor of %c: start %u is not in the first row of a swizzle pattern", name, start);
  if (mn_major ? start & 0x70 : (start & 0x7F) > 96) {
    fail("wgmma: descriptor of %c: start %u, from where the rows do not fit the swizzle's 128 bytes", name, start);
  }
}

bool Operand::reads(uint32_t address, uint32_t bytes) const {
  const auto in_block = [&](uint32_t block) {
    if (address >= block + 1024 || block >= address + bytes) return false;
    if (mn_major || bytes > 16) return true;
    // A step of 16 k takes 32 bytes of each row of 128.
    return ((swizzled(address) ^ start) & 0x60) == 0;
  };
  for (uint32_t i = 0; i < size; i += mn_major ? 64 : 8) {
    if (mn_major) {
      const uint32_t panel = start + i / 64 * leading;
      if (in_block(panel) || in_block(panel + stride)) return true;
    } else if (in_block((start & ~0x7Fu) + i / 8 * stride)) {
      return true;
    }
  }
  return false;
}

}  // namespace fastlora::model
