// The layout of tiles in shared memory and their descriptors for wgmma. Plain arithmetic, the same on GPU and host.
//
// A panel has rows of 64 contiguous 16-bit elements (128 bytes), as one tensor copy writes them: row r at byte 128 r,
// and inside a row the 16-byte chunks permuted by the 128-byte swizzle, which repeats every 8 rows.
#pragma once

#include <cstdint>

namespace fastlora {

__host__ __device__ constexpr uint32_t ceil_div(uint64_t a, uint64_t b) {
  return static_cast<uint32_t>((a + b - 1) / b);
}

constexpr int PANEL = 64;
constexpr int PANEL_ROW_BYTES = 128;
constexpr int SWIZZLE_BYTES = 1024;

// Byte of 16-byte chunk ``chunk`` (of 8) of a row in a panel.
__host__ __device__ constexpr uint32_t panel_chunk(uint32_t row, uint32_t chunk) {
  return row * PANEL_ROW_BYTES + ((chunk ^ (row & 7)) << 4);
}

// A matrix descriptor of 128-byte swizzled panels. PTX ISA 9.7.15.5.1, "Shared Memory Matrix Layout":
//   bits 0-13   start address / 16
//   bits 16-29  leading dimension byte offset / 16
//   bits 32-45  stride dimension byte offset / 16: from one group of 8 rows to the next
//   bits 62-63  1: 128-byte swizzle
//
// K-major (a row of the panel is one m or n, contiguous in k): the leading offset is not used; 16 further k are 32
// bytes on. MN-major (a row of the panel is one k, contiguous in m or n): the leading offset is that from one panel to
// the next, 64 further m or n; 16 further k are 16 rows on.
__host__ __device__ constexpr uint64_t panel_descriptor(uint32_t address, uint32_t panel_bytes) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t((panel_bytes & 0x3FFFF) >> 4) << 16 |
         uint64_t(SWIZZLE_BYTES >> 4) << 32 | uint64_t(1) << 62;
}

// Bytes from 16 k to the next 16 k.
template <bool MN_MAJOR>
__host__ __device__ constexpr uint32_t k16_bytes() {
  return MN_MAJOR ? 16 * PANEL_ROW_BYTES : 32;
}

// The part of an accumulator that a thread of a warpgroup holds: rows row() and row() + 8, columns column() + 8 j and
// the next, for each j. See wgmma in ptx.cuh.
struct Fragment {
  uint32_t lane, warp;

  __host__ __device__ constexpr explicit Fragment(uint32_t thread) : lane(thread % 32), warp(thread / 32 % 4) {}
  __host__ __device__ constexpr uint32_t row() const { return 16 * warp + lane / 4; }
  __host__ __device__ constexpr uint32_t column() const { return 2 * (lane % 4); }
};

}  // namespace fastlora
