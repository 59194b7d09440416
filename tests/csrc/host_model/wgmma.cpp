// wgmma: operands found by their descriptors, sums in the fragments of 128 threads. It runs at some time between its
// issue and the wait; until the wait, the threads' own sums are NaN.
#include <algorithm>

#include "model.hpp"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTLORA_MODEL_CLONES __attribute__((target_clones("avx2", "default")))
#else
#define FASTLORA_MODEL_CLONES
#endif

namespace fastlora {

namespace model {

namespace {

constexpr int K = 16;
constexpr uint32_t THREADS = 128;
constexpr uint32_t POISON = 0x7FD1E5A0;

struct Poison {
  uint32_t words[128];
  Poison() { std::fill(words, words + 128, POISON); }
};
const Poison poison;

alignas(32) float a_tile[64 * K];
alignas(32) float b_tile[K * 256];

// sums [64, n] += a_tile · b_tile, over k in order. A product of two 16-bit elements is exact in fp32: with or without
// fused additions, the bits are the same.
FASTLORA_MODEL_CLONES void multiply(float* __restrict__ sums, int n) {
  typedef float Vector __attribute__((vector_size(32)));
  const auto* b = reinterpret_cast<const Vector*>(b_tile);
  auto* d = reinterpret_cast<Vector*>(sums);
  const int width = n / 8;
  for (int column = 0; column < width; column += 2) {
    for (int row = 0; row < 64; row += 4) {
      const float* a = a_tile + row * K;
      Vector* to = d + row * width + column;
      Vector s00 = to[0], s01 = to[1], s10 = to[width], s11 = to[width + 1];
      Vector s20 = to[2 * width], s21 = to[2 * width + 1], s30 = to[3 * width], s31 = to[3 * width + 1];
      for (int k = 0; k < K; ++k) {
        const Vector b0 = b[k * width + column], b1 = b[k * width + column + 1];
        s00 += a[k] * b0;
        s01 += a[k] * b1;
        s10 += a[K + k] * b0;
        s11 += a[K + k] * b1;
        s20 += a[2 * K + k] * b0;
        s21 += a[2 * K + k] * b1;
        s30 += a[3 * K + k] * b0;
        s31 += a[3 * K + k] * b1;
      }
      to[0] = s00, to[1] = s01, to[width] = s10, to[width + 1] = s11;
      to[2 * width] = s20, to[2 * width + 1] = s21, to[3 * width] = s30, to[3 * width + 1] = s31;
    }
  }
}

// Calls take(i, k, elements) for each 8 elements of rows i (m or n) and columns k: along i where MN-major, else along
// k.
template <class Take>
void for_chunks(Cta& cta, const Operand& operand, Take take) {
  const uint32_t i_step = operand.mn_major ? 8 : 1, k_step = operand.mn_major ? 1 : 8;
  uint16_t elements[8];
  for (uint32_t k = 0; k < K; k += k_step) {
    for (uint32_t i = 0; i < operand.size; i += i_step) {
      const uint32_t place = operand.place(i, k);
      const uint8_t* memory = cta.at(place, 16, "wgmma");
      check_fenced(cta, place, 16, "wgmma");
      std::memcpy(elements, memory, 16);
      take(i, k, elements);
    }
  }
}

template <class T>
void fetch_operands(Cta& cta, const Wgmma& op) {
  const bool a_mn = op.a.mn_major, b_mn = op.b.mn_major;
  const int n = op.shape.n;
  for_chunks(cta, op.a, [&](uint32_t i, uint32_t k, const uint16_t* elements) {
    for (uint32_t j = 0; j < 8; ++j) a_tile[a_mn ? (i + j) * K + k : i * K + k + j] = T::widen(elements[j]);
  });
  for_chunks(cta, op.b, [&](uint32_t i, uint32_t k, const uint16_t* elements) {
    for (uint32_t j = 0; j < 8; ++j) b_tile[b_mn ? k * n + i + j : (k + j) * n + i] = T::widen(elements[j]);
  });
}

// A slot of shared memory may be written again when it is known, not only true, that its wgmma is done.
void forget_done(Warpgroup& group) {
  while (group.first < std::min(group.executed, group.awaited)) {
    group.queue.pop_front();
    ++group.first;
  }
}

// From now on runs by itself, if the next one is to run early.
void run_early(Warpgroup& group) {
  const bool due = group.may_execute() && group.queue[group.executed - group.first].early;
  if (due && group.slot == ~0u) grid->add(&group);
  if (!due && group.slot != ~0u) grid->remove(&group);
}

void execute_next(Warpgroup& group) {
  const Wgmma& op = group.queue[group.executed - group.first];
  if (!op.accumulate) std::fill(op.sums->values, op.sums->values + 64 * op.shape.n, 0.0f);
  if (op.shape.fp16) {
    fetch_operands<FP16>(*group.cta, op);
  } else {
    fetch_operands<BF16>(*group.cta, op);
  }
  multiply(op.sums->values, op.shape.n);
  ++group.executed;
  ++statistics[WGMMAS];
  forget_done(group);
  run_early(group);
}

// Copies between a thread's fragment and the matrix. PTX ISA 9.7.15.5.1, "Register Fragments": not by the Fragment of
// csrc/layout.cuh, which this is to check.
template <class Copy>
void for_fragment(uint32_t thread, Accumulator& sums, float* d, Copy copy) {
  const uint32_t row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
  for (int i = 0; i < sums.n / 2; ++i) {
    const uint32_t at = (row + i / 2 % 2 * 8) * sums.n + i / 4 * 8 + column + i % 2;
    copy(d[i], sums.values[at]);
  }
}

void check_untouched(const float* d, int n) {
  if (std::memcmp(d, poison.words, n / 2 * sizeof(float)) != 0) {
    fail("writes to the sums of a wgmma that is in flight: there was no wgmma_wait for it");
  }
}

Warpgroup& warpgroup() {
  const uint32_t index = current->index / THREADS;
  if (index >= grid->shape.threads / THREADS) fail("wgmma in warps that are no whole warpgroup");
  return current->cta->warpgroups[index];
}

Accumulator* take_sums(Warpgroup& group, int n) {
  if (group.spare.empty()) {
    group.pool.push_back(std::make_unique<Accumulator>());
    group.spare.push_back(group.pool.back().get());
  }
  Accumulator* sums = group.spare.back();
  group.spare.pop_back();
  sums->n = n;
  sums->restored = 0;
  return sums;
}

bool same(const WgmmaShape& a, const WgmmaShape& b) {
  return a.n == b.n && a.fp16 == b.fp16 && a.a_mn_major == b.a_mn_major && a.b_mn_major == b.b_mn_major;
}

}  // namespace

bool Warpgroup::step() {
  execute_next(*this);
  return slot == ~0u;
}

void issue_wgmma(const WgmmaShape& shape, float* d, uint64_t a, uint64_t b, bool accumulate) {
  breathe();
  Thread& thread = *current;
  Warpgroup& group = warpgroup();
  if (!thread.wgmma_fenced) fail("wgmma without a wgmma_fence since the last wgmma_commit");
  LiveAccumulator* live = nullptr;
  for (LiveAccumulator& other : thread.accumulators) {
    if (other.d == d) {
      live = &other;
    } else if (other.d < d + shape.n / 2 && d < other.d + other.sums->n / 2) {
      fail("wgmma on sums that overlap those of another in flight");
    }
  }
  const uint64_t sequence = thread.wgmma_issued++;
  const uint64_t commit_group = thread.wgmma_groups_done + thread.wgmma_groups.size();
  if (sequence == group.first + group.queue.size()) {
    Accumulator* sums = live != nullptr ? live->sums : take_sums(group, shape.n);
    const bool same_group = !group.queue.empty() && group.queue.back().group == commit_group;
    const bool early = same_group ? group.queue.back().early : grid->random.percent(50);
    group.queue.push_back({shape, a, b, Operand(a, 'A', shape.a_mn_major, 64),
                           Operand(b, 'B', shape.b_mn_major, shape.n), accumulate, early, commit_group, 0, sums});
  }
  Wgmma& op = group.queue[sequence - group.first];
  if (!same(op.shape, shape) || op.a_bits != a || op.b_bits != b || op.accumulate != accumulate ||
      op.group != commit_group) {
    fail("wgmma: the threads of its warpgroup disagree on shape, descriptors, accumulate or commit group");
  }
  if (live != nullptr) {
    if (live->sums != op.sums || live->sums->n != shape.n)
      fail("wgmma: the threads of its warpgroup disagree on the sums");
    check_untouched(d, shape.n);
  } else {
    thread.accumulators.push_back({d, op.sums, sequence});
    live = &thread.accumulators.back();
    for_fragment(thread.index % THREADS, *op.sums, d, [](float& mine, float& sum) { sum = mine; });
    std::memcpy(d, poison.words, shape.n / 2 * sizeof(float));
  }
  live->last = sequence;
  if (++op.issued == THREADS) {
    run_early(group);
    wake_all(group.waiters);
  }
}

void wait_wgmma(uint32_t pending) {
  breathe(false);
  Thread& thread = *current;
  Warpgroup& group = warpgroup();
  if (thread.wgmma_groups.size() <= pending) return;
  const size_t done = thread.wgmma_groups.size() - pending;
  const uint64_t end = thread.wgmma_groups[done - 1];
  while (group.executed < end) {
    if (group.may_execute()) {
      execute_next(group);
    } else {
      block(Wait::WGMMA, &group, 0, group.waiters);
    }
  }
  group.awaited = std::max(group.awaited, end);
  forget_done(group);
  thread.wgmma_groups.erase(thread.wgmma_groups.begin(), thread.wgmma_groups.begin() + done);
  thread.wgmma_groups_done += done;
  for (size_t i = thread.accumulators.size(); i-- > 0;) {
    const LiveAccumulator live = thread.accumulators[i];
    if (live.last >= end) continue;
    check_untouched(live.d, live.sums->n);
    for_fragment(thread.index % THREADS, *live.sums, live.d, [](float& mine, float& sum) { mine = sum; });
    if (++live.sums->restored == THREADS) group.spare.push_back(live.sums);
    thread.accumulators.erase(thread.accumulators.begin() + i);
  }
}

void end_wgmmas(Thread& thread) {
  if (!thread.accumulators.empty()) fail("a thread ends before its wgmma was waited for");
}

}  // namespace model

using namespace model;

void wgmma_fence() {
  breathe(false);
  current->wgmma_fenced = true;
}

void wgmma_commit() {
  breathe();
  current->wgmma_groups.push_back(current->wgmma_issued);
  current->wgmma_fenced = false;
}

}  // namespace fastlora
