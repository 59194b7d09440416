// The dropout mask's bits: the same as fastlora/backends/dropout.py, whose docstring defines them. Philox4x32-7 (Salmon
// et al., SC 2011); one call decides eight neighbouring columns of a row: word i holds columns 2 i (low half) and
// 2 i + 1.
#pragma once

#include <cstdint>

#include <ptx.cuh>

namespace fastlora {

struct Mask {
  const int64_t* seed;
  int32_t threshold;
  float rescale;
};

struct MaskBits {
  uint32_t key[2], offset[2];
  int32_t threshold;

  __device__ __forceinline__ explicit MaskBits(const Mask& mask) : threshold(mask.threshold) {
    const uint64_t k = static_cast<uint64_t>(mask.seed[0]), o = static_cast<uint64_t>(mask.seed[1]);
    key[0] = static_cast<uint32_t>(k);
    key[1] = static_cast<uint32_t>(k >> 32);
    offset[0] = static_cast<uint32_t>(o);
    offset[1] = static_cast<uint32_t>(o >> 32);
  }

  // The lanes of columns 8 call to 8 call + 7.
  __device__ __forceinline__ Words4 lanes(uint32_t row, uint32_t call) const {
    Words4 c = {{call, row, offset[0], offset[1]}};
    uint32_t k0 = key[0], k1 = key[1];
#pragma unroll
    for (int round = 0; round < 7; ++round) {
      const uint64_t product0 = uint64_t(c.w[0]) * 0xD2511F53u, product1 = uint64_t(c.w[2]) * 0xCD9E8D57u;
      c.w[0] = static_cast<uint32_t>(product1 >> 32) ^ c.w[1] ^ k0;
      c.w[1] = static_cast<uint32_t>(product1);
      c.w[2] = static_cast<uint32_t>(product0 >> 32) ^ c.w[3] ^ k1;
      c.w[3] = static_cast<uint32_t>(product0);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return c;
  }

  __device__ __forceinline__ bool keeps_low(uint32_t word) const {
    return static_cast<int16_t>(word & 0xFFFF) >= threshold;
  }
  __device__ __forceinline__ bool keeps_high(uint32_t word) const {
    return static_cast<int16_t>(word >> 16) >= threshold;
  }

  // A word of two 16-bit elements with the dropped ones zero.
  __device__ __forceinline__ uint32_t kept(uint32_t elements, uint32_t lanes) const {
    return elements & ((keeps_low(lanes) ? 0x0000FFFFu : 0u) | (keeps_high(lanes) ? 0xFFFF0000u : 0u));
  }
};

// Masks rows [first, first + 64) of a panel in place, by 128 threads: one Philox call per 16-byte chunk.
// ``row`` and ``column`` are the matrix's at the panel's first element; column is a multiple of 8.
__device__ __forceinline__ void mask_panel(const MaskBits& mask, uint32_t panel, uint32_t first, uint32_t row,
                                           uint32_t column, uint32_t thread) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t item = thread + 128 * i;
    const uint32_t r = first + item / 8, chunk = item % 8;
    const uint32_t address = panel + panel_chunk(r, chunk);
    const Words4 lanes = mask.lanes(row + r, column / 8 + chunk);
    Words4 x = load_shared4(address);
#pragma unroll
    for (int j = 0; j < 4; ++j) x.w[j] = mask.kept(x.w[j], lanes.w[j]);
    store_shared4(address, x);
  }
}

// Transposes 4 x 4 words in a quad: lane q passes its four words and gets word q of each lane.
__device__ __forceinline__ Words4 quad_transpose(Words4 v, uint32_t lane) {
  const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = shuffle_xor(odd ? v.w[i] : v.w[i + 1], 1);
    (odd ? v.w[i] : v.w[i + 1]) = other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = shuffle_xor(upper ? v.w[i] : v.w[i + 2], 2);
    (upper ? v.w[i] : v.w[i + 2]) = other;
  }
  return v;
}

}  // namespace fastlora
