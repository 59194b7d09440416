// Every instruction of sm_90a that the kernels use, behind a name: nothing else in csrc/ knows the hardware. A second
// implementation of this header, tests/csrc/host_model/ptx.cuh, runs the same kernels on a CPU.
//
// Sections are those of the PTX ISA manual, version 9.0, chapter 9.7 "Instructions" unless said otherwise. A Shared is
// an address in the window of the CTA's own shared memory.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fastlora {

using Shared = uint32_t;
using TensorMap = CUtensorMap;

struct Words4 {
  uint32_t w[4];
};

// ---- Indices (chapter 10, "Special Registers")

__device__ __forceinline__ uint32_t thread_index() { return threadIdx.x; }

// A lane's value in the whole warp; the compiler keeps it in a register that lanes share.
__device__ __forceinline__ uint32_t shuffle(uint32_t value, uint32_t lane) { return __shfl_sync(~0u, value, lane); }

// By a shuffle, so that the compiler knows that all lanes have the same value.
__device__ __forceinline__ uint32_t warp_index() { return shuffle(threadIdx.x / 32, 0); }

__device__ __forceinline__ uint32_t block_index() { return blockIdx.x; }
__device__ __forceinline__ uint32_t block_index_y() { return blockIdx.y; }
__device__ __forceinline__ uint32_t grid_blocks() { return gridDim.x; }
__device__ __forceinline__ uint32_t grid_blocks_y() { return gridDim.y; }

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// True in one lane of a converged warp. elect.sync (9.7.14.8).
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n.reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, p;\n}\n"
      : "=r"(elected));
  return elected != 0;
}

// The CTA's dynamic shared memory. Its base is a multiple of 1024 bytes, the period of the 128-byte swizzle.
__device__ __forceinline__ Shared shared_memory() {
  extern __shared__ __align__(1024) uint8_t memory[];
  return static_cast<Shared>(__cvta_generic_to_shared(memory));
}

// ---- Generic loads and stores

__device__ __forceinline__ uint32_t load_shared(Shared address) {
  uint32_t value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}

__device__ __forceinline__ void store_shared(Shared address, uint32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" : : "r"(address), "r"(value) : "memory");
}

__device__ __forceinline__ Words4 load_shared4(Shared address) {
  Words4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.w[0]), "=r"(v.w[1]), "=r"(v.w[2]), "=r"(v.w[3])
               : "r"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ void store_shared4(Shared address, const Words4& v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "r"(address), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3])
               : "memory");
}

// Four 8x8 matrices of 16-bit elements, a row of 16 bytes at the address of each lane: lanes 8i to 8i + 7 for matrix i.
// Word i of lane l holds columns 2 (l % 4) and the next of row l / 4 of matrix i. stmatrix (9.7.14.5.16).
__device__ __forceinline__ void store_matrices4(Shared address, const Words4& v) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
               :
               : "r"(address), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3])
               : "memory");
}

// A word into the shared memory of a CTA of the cluster, at the address that it has here. Its 4 bytes count on the
// barrier there, as a copy's do: a thread that has waited for it sees the word. Undefined in a cluster of one CTA.
// mapa (9.7.9.23), st.async (9.7.9.13).
__device__ __forceinline__ void store_async(Shared address, uint32_t rank, uint32_t value, Shared barrier) {
  asm volatile(
      "{\n.reg .b32 remote, remote_barrier;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mapa.shared::cluster.u32 remote_barrier, %3, %1;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [remote], %2, [remote_barrier];\n}\n"
      :
      : "r"(address), "r"(rank), "r"(value), "r"(barrier)
      : "memory");
}

// ---- Global memory between CTAs (9.7.13, 9.7.9)

// A store that a launch after this one reads, once it has waited for this one. The host model keeps account of these.
template <class Value>
__device__ __forceinline__ void hand_over(Value* to, Value value) {
  *to = value;
}

__device__ __forceinline__ uint32_t atomic_add(uint32_t* address, uint32_t value) {
  uint32_t old;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(address), "r"(value) : "memory");
  return old;
}

// Adds. A thread that acquires the sum sees what this thread wrote or saw before.
__device__ __forceinline__ uint32_t add_acquire_release(uint32_t* address, uint32_t value) {
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(address), "r"(value) : "memory");
  return old;
}

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

// Between two reads of a flag: leaves the issue slots to other warps. nanosleep (9.7.19.5).
__device__ __forceinline__ void back_off() { asm volatile("nanosleep.u32 64;"); }

// ---- mbarriers (9.7.13.15). The host model reports a deadlock by their names.

__device__ __forceinline__ void barrier_init(Shared barrier, uint32_t arrivals, const char* name, int index = 0) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(barrier), "r"(arrivals) : "memory");
}

// Initialised barriers become visible to the cluster and to the copy engine; a cluster_sync or cta_sync follows.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
}

// Arrives, and expects that many bytes of copies before the phase ends.
__device__ __forceinline__ void barrier_arrive_expect(Shared barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" : : "r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(Shared barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" : : "r"(barrier) : "memory");
}

// Arrives on the barrier that lies at this address in a CTA of the cluster. It says that a slot may be overwritten, and
// hands over no data: at the scope of the cluster the release would be a fence of the whole GPU in every trip.
__device__ __forceinline__ void barrier_arrive_at(Shared barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n"
      :
      : "r"(barrier), "r"(rank)
      : "memory");
}

// Returns when the phase of this parity has ended. What copies and store_async brought is seen without a wider scope.
__device__ __forceinline__ void barrier_wait(Shared barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "AGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra AGAIN;\n}\n"
      :
      : "r"(barrier), "r"(parity)
      : "memory");
}

// The same where the phase hands over what another CTA of the cluster wrote.
__device__ __forceinline__ void barrier_wait_cluster(Shared barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "AGAIN:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra AGAIN;\n}\n"
      :
      : "r"(barrier), "r"(parity)
      : "memory");
}

// ---- Barriers of threads

__device__ __forceinline__ void cta_sync() { __syncthreads(); }

__device__ __forceinline__ void warp_sync() { __syncwarp(); }

// barrier.cluster (9.7.13.4).
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" : : : "memory");
}

// The same after a fence_barrier_init, which has released all that others need: without a fence of the whole GPU.
__device__ __forceinline__ void cluster_sync_initialised() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" : : : "memory");
}

// Named barrier of whole warps; 0 is cta_sync's. bar.sync (9.7.13.1).
__device__ __forceinline__ void named_barrier_sync(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" : : "r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ uint32_t shuffle_xor(uint32_t value, uint32_t mask) {
  return __shfl_xor_sync(~0u, value, mask);
}

// ---- Fences between the generic proxy (loads, stores) and the async proxy (copy engine, wgmma) (9.7.13.4)

// Shared memory that this thread wrote is seen by the async proxy, and the other way round.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" : : : "memory"); }

// The same for global memory.
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;" : : : "memory"); }

// ---- Copies of tensor tiles (9.7.9.27, "Tensor copy"). c0 is the contiguous coordinate. Outside the tensor: zeros.

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" : : "l"(map) : "memory");
}

__device__ __forceinline__ void tma_load(Shared to, const TensorMap* map, Shared barrier, int32_t c0, int32_t c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
      :
      : "r"(to), "l"(map), "r"(c0), "r"(c1), "r"(barrier)
      : "memory");
}

// The tile lands at the same address in every CTA of the mask, and its bytes count on the barrier there.
__device__ __forceinline__ void tma_load_multicast(Shared to, const TensorMap* map, Shared barrier, int32_t c0,
                                                   int32_t c1, uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;"
      :
      : "r"(to), "l"(map), "r"(c0), "r"(c1), "r"(barrier), "h"(ctas)
      : "memory");
}

// What lies outside the tensor is not written, but for the rest of the 16 bytes in which a row ends.
__device__ __forceinline__ void tma_store(const TensorMap* map, Shared from, int32_t c0, int32_t c1) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];"
               :
               : "l"(map), "r"(from), "r"(c0), "r"(c1)
               : "memory");
}

__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" : : : "memory"); }

// Of this thread's groups of stores at most PENDING have still to read their shared memory.
template <int PENDING>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" : : "n"(PENDING) : "memory");
}

// All of this thread's stores are done.
__device__ __forceinline__ void tma_store_wait_all() { asm volatile("cp.async.bulk.wait_group 0;" : : : "memory"); }

// ---- Dependent launches (9.7.13.13). Waits until the grid before has ended and its memory is visible to this grid.

__device__ __forceinline__ void grid_dependency_wait() { asm volatile("griddepcontrol.wait;" : : : "memory"); }

// Lets a dependent grid start once every CTA has called this, in one thread or more, or ended.
__device__ __forceinline__ void grid_dependency_launch() {
  asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
}

// ---- Registers of a warpgroup (9.7.19.6, setmaxnreg)

template <int REGISTERS>
__device__ __forceinline__ void registers_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void registers_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(REGISTERS));
}

// ---- 16-bit elements

struct BF16 {
  static constexpr bool IS_BF16 = true;
  static __device__ __forceinline__ uint16_t round(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
  static __device__ __forceinline__ float widen(uint16_t x) { return __bfloat162float(__ushort_as_bfloat16(x)); }
  // The high half of a word, in one instruction.
  static __device__ __forceinline__ float widen_high(uint32_t word) { return __uint_as_float(word & 0xFFFF0000); }
  // low and high half of a word, each rounded to nearest even.
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }
};

struct FP16 {
  static constexpr bool IS_BF16 = false;
  static __device__ __forceinline__ uint16_t round(float x) { return __half_as_ushort(__float2half_rn(x)); }
  static __device__ __forceinline__ float widen(uint16_t x) { return __half2float(__ushort_as_half(x)); }
  static __device__ __forceinline__ float widen_high(uint32_t word) { return widen(word >> 16); }
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }
};

// ---- wgmma (9.7.15, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate"): both operands from shared memory

// Before the first wgmma on registers that were touched since, and after ordinary writes to them.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory"); }

// At most PENDING committed groups of this warpgroup are still running.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(PENDING) : "memory");
}

// The sums are final here: the compiler may not read them before, which a wait alone does not tell it.
template <int COUNT>
__device__ __forceinline__ void wgmma_settle(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define FASTLORA_ACCUMULATORS_8(C, i) \
  C(d[i]), C(d[i + 1]), C(d[i + 2]), C(d[i + 3]), C(d[i + 4]), C(d[i + 5]), C(d[i + 6]), C(d[i + 7])
#define FASTLORA_ACCUMULATORS_32(C) \
  FASTLORA_ACCUMULATORS_8(C, 0), FASTLORA_ACCUMULATORS_8(C, 8), FASTLORA_ACCUMULATORS_8(C, 16), \
      FASTLORA_ACCUMULATORS_8(C, 24)
#define FASTLORA_ACCUMULATORS_64(C) \
  FASTLORA_ACCUMULATORS_32(C), FASTLORA_ACCUMULATORS_8(C, 32), FASTLORA_ACCUMULATORS_8(C, 40), \
      FASTLORA_ACCUMULATORS_8(C, 48), FASTLORA_ACCUMULATORS_8(C, 56)
#define FASTLORA_ACCUMULATORS_128(C) \
  FASTLORA_ACCUMULATORS_64(C), FASTLORA_ACCUMULATORS_8(C, 64), FASTLORA_ACCUMULATORS_8(C, 72), \
      FASTLORA_ACCUMULATORS_8(C, 80), FASTLORA_ACCUMULATORS_8(C, 88), FASTLORA_ACCUMULATORS_8(C, 96), \
      FASTLORA_ACCUMULATORS_8(C, 104), FASTLORA_ACCUMULATORS_8(C, 112), FASTLORA_ACCUMULATORS_8(C, 120)
// Added to, or only set: with the latter the compiler needs no value before, and so no moves.
#define FASTLORA_ADD(x) "+f"(x)
#define FASTLORA_SET(x) "=f"(x)

#define FASTLORA_WGMMA_64(TYPE, C) \
  asm volatile( \
      "{\n.reg .pred p;\n" \
      "setp.ne.b32 p, %34, 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE \
      " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
      "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
      "}, %32, %33, p, 1, 1, %35, %36;\n}\n" \
      : FASTLORA_ACCUMULATORS_32(C) \
      : "l"(a), "l"(b), "r"(int(ADD)), "n"(int(A_MN_MAJOR)), "n"(int(B_MN_MAJOR)))

#define FASTLORA_WGMMA_128(TYPE, C) \
  asm volatile( \
      "{\n.reg .pred p;\n" \
      "setp.ne.b32 p, %66, 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." TYPE "." TYPE \
      " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
      "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
      "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, " \
      "%59, %60, %61, %62, %63" \
      "}, %64, %65, p, 1, 1, %67, %68;\n}\n" \
      : FASTLORA_ACCUMULATORS_64(C) \
      : "l"(a), "l"(b), "r"(int(ADD)), "n"(int(A_MN_MAJOR)), "n"(int(B_MN_MAJOR)))

#define FASTLORA_WGMMA_256(TYPE, C) \
  asm volatile( \
      "{\n.reg .pred p;\n" \
      "setp.ne.b32 p, %130, 0;\n" \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE \
      " {" \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
      "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
      "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, " \
      "%59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, " \
      "%78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, " \
      "%97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, " \
      "%113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127" \
      "}, %128, %129, p, 1, 1, %131, %132;\n}\n" \
      : FASTLORA_ACCUMULATORS_128(C) \
      : "l"(a), "l"(b), "r"(int(ADD)), "n"(int(A_MN_MAJOR)), "n"(int(B_MN_MAJOR)))

#define FASTLORA_WGMMA(C) \
  static_assert(N == 64 || N == 128 || N == 256, "an N in use"); \
  if constexpr (N == 64) { \
    if constexpr (T::IS_BF16) FASTLORA_WGMMA_64("bf16", C); \
    if constexpr (!T::IS_BF16) FASTLORA_WGMMA_64("f16", C); \
  } else if constexpr (N == 128) { \
    if constexpr (T::IS_BF16) FASTLORA_WGMMA_128("bf16", C); \
    if constexpr (!T::IS_BF16) FASTLORA_WGMMA_128("f16", C); \
  } else { \
    if constexpr (T::IS_BF16) FASTLORA_WGMMA_256("bf16", C); \
    if constexpr (!T::IS_BF16) FASTLORA_WGMMA_256("f16", C); \
  }

// d [64, N] += A [64, 16] · B [16, N], a and b matrix descriptors; asynchronous. Thread t of the warpgroup holds
//   d[4 j + 2 h + c] = D[16 (t / 32) + 8 h + (t % 32) / 4, 8 j + 2 (t % 4) + c]     j < N / 8, h < 2, c < 2
template <class T, int N, bool A_MN_MAJOR, bool B_MN_MAJOR>
__device__ __forceinline__ void wgmma_add(float (&d)[N / 2], uint64_t a, uint64_t b) {
  constexpr bool ADD = true;
  FASTLORA_WGMMA(FASTLORA_ADD)
}

// d = A · B.
template <class T, int N, bool A_MN_MAJOR, bool B_MN_MAJOR>
__device__ __forceinline__ void wgmma_set(float (&d)[N / 2], uint64_t a, uint64_t b) {
  constexpr bool ADD = false;
  FASTLORA_WGMMA(FASTLORA_SET)
}

}  // namespace fastlora
