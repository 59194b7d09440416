// Small kernels about threads, clusters and grids, for tests/csrc/test_host_model.py: each with faults planted by name.
#include <cstring>

#include <ptx.cuh>

#include <launch.cuh>

namespace fastlora {
namespace {

struct Fault {
  const char* name;

  bool is(const char* other) const { return std::strcmp(name, other) == 0; }
};

// ---- Each CTA of a pair brings half of a 64 x 64 box to both: raw [clusters, 2 CTAs, 2048 words]

struct PairParameters {
  TensorMap from;
  uint32_t* raw;
  Fault fault;
};

__global__ void pair_kernel(const __grid_constant__ PairParameters p) {
  constexpr uint32_t BYTES = 64 * 128;
  const Fault& fault = p.fault;
  const Shared box = shared_memory(), landed = box + BYTES, word = landed + 8;
  const uint32_t rank = cluster_rank(), cluster = block_index() / 2;
  const bool elected = elect_one();
  if (elected) {
    // Its own arrival with the bytes, and its peer's.
    barrier_init(landed, 2, "landed");
    if (!fault.is("barrier not fenced")) fence_barrier_init();
  }
  if (!fault.is("no cluster_sync before")) cluster_sync_initialised();
  if (elected) {
    store_async(word, rank ^ 1, 100 * cluster + rank, landed);
    barrier_arrive_expect(landed, BYTES + 4);
    barrier_arrive_at(landed, rank ^ 1);
    tma_load_multicast(box + rank * BYTES / 2, &p.from, landed, 0, 64 * cluster + 32 * rank, 3);
  }
  warp_sync();
  if (fault.is("ends before its peer") && rank == 1) return;
  barrier_wait(landed, 0);
  for (uint32_t i = thread_index(); i < BYTES / 4; i += 32) {
    p.raw[block_index() * BYTES / 4 + i] = load_shared(box + 4 * i);
  }
  if (load_shared(word) != 100 * cluster + (rank ^ 1)) p.raw[block_index() * BYTES / 4] = 0xDEAD;
  cluster_sync();
  if (fault.is("arrives at one that has ended") && rank == 0 && elected) {
    for (int i = 0; i < 500; ++i) back_off();
    barrier_arrive_at(landed, 1);
  }
}

// ---- CTA 0 waits for a flag that the last one sets; order [blocks]: who came when

struct FlagParameters {
  uint32_t *flag, *counter, *order;
  Fault fault;
};

__global__ void flag_kernel(const __grid_constant__ FlagParameters p) {
  const Fault& fault = p.fault;
  if (!fault.is("no grid_dependency_wait")) grid_dependency_wait();
  if (fault.is("lanes part")) {
    if (thread_index() < 16) warp_sync();
    if (thread_index() >= 16) shuffle_xor(0, 1);
  }
  if (fault.is("a lane ends")) {
    if (thread_index() == 3) return;
    warp_sync();
  }
  if (fault.is("named barrier for more threads")) named_barrier_sync(3, 64);
  if (fault.is("more registers than there are")) registers_increase<256>();
  if (elect_one()) {
    p.order[atomic_add(p.counter, 1)] = block_index();
    if (block_index() == grid_blocks() - 1 && !fault.is("flag never set")) add_acquire_release(p.flag, 1);
    while (block_index() == 0 && load_acquire(p.flag) == 0) {
      if (!fault.is("no back_off")) back_off();
    }
  }
}

// ---- Word i of lane l is 100 i + l; row l of the four matrices lies at 16 l

__global__ void matrices_kernel(uint32_t* raw) {
  const uint32_t lane = thread_index();
  store_matrices4(shared_memory() + 16 * lane, {{lane, 100 + lane, 200 + lane, 300 + lane}});
  warp_sync();
  for (uint32_t i = 0; i < 4; ++i) raw[4 * lane + i] = load_shared(shared_memory() + 16 * lane + 4 * i);
}

// ---- cta_sync, named barriers and shuffles between four warps: sums [128] of what others wrote

__global__ void sync_kernel(uint32_t* sums) {
  const Shared words = shared_memory();
  const uint32_t thread = thread_index();
  store_shared(words + 4 * thread, thread);
  cta_sync();
  uint32_t sum = load_shared(words + 4 * (127 - thread));
  for (uint32_t mask = 1; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
  // Two pairs of warps, each at its own barrier.
  store_shared(words + 512 + 4 * thread, sum);
  named_barrier_sync(1 + thread / 64, 64);
  sums[thread] = sum + load_shared(words + 512 + 4 * (thread ^ 32));
}

}  // namespace
}  // namespace fastlora

using namespace fastlora;

// from [64 clusters, 64]
extern "C" const char* unit_pair(const void* from, uint32_t* raw, uint32_t clusters, const char* fault) {
  PairParameters p = {};
  if (const char* error = make_map(&p.from, from, 64 * clusters, 64, 128, 32)) return error;
  p.raw = raw, p.fault = {fault};
  return launch(+pair_kernel, p, {2 * clusters, 1, 32, 2, 64 * 128 + 16}, nullptr);
}

// words: the flag, the counter, the order
extern "C" const char* unit_flag(uint32_t* words, uint32_t blocks, bool dependent, const char* fault) {
  const FlagParameters p = {words, words + 1, words + 2, {fault}};
  return launch(+flag_kernel, p, {blocks, 1, 32, 1, 0, dependent}, nullptr);
}

extern "C" const char* unit_matrices(uint32_t* raw) {
  return launch(+matrices_kernel, raw, {1, 1, 32, 1, 512}, nullptr);
}

extern "C" const char* unit_sync(uint32_t* sums) { return launch(+sync_kernel, sums, {1, 1, 128, 1, 1024}, nullptr); }
