// The shape that the kernels share: one producer and two consumer warpgroups around a ring of stages in shared memory.
#pragma once

#include <cstdint>

#include <layout.cuh>
#include <ptx.cuh>

namespace fastlora {

constexpr uint32_t WARPGROUP = 128;
constexpr uint32_t CONSUMERS = 2;
constexpr uint32_t THREADS = (1 + CONSUMERS) * WARPGROUP;

// Bytes of a panel of 64 rows.
constexpr uint32_t PANEL_64 = 64 * PANEL_ROW_BYTES;

// What a CTA may have on sm_90.
constexpr uint32_t MOST_SHARED_BYTES = 232448;

// At entry 65536 / 384 = 168 registers a thread; the producer needs few, and the accumulators take what it leaves.
constexpr int PRODUCER_REGISTERS = 40;
constexpr int CONSUMER_REGISTERS = 232;

// A place in a ring of SLOTS, and the parity of the lap.
template <uint32_t SLOTS>
struct Cursor {
  uint32_t slot = 0, parity = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == SLOTS) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// Whether a tensor copy can start at every row.
inline bool is_aligned(const void* base, int64_t stride) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride % 8 == 0;
}

// The lines of rank_grad_sm90.cu in fastlora_kernels().
const char* rank_grad_kernels();

}  // namespace fastlora
