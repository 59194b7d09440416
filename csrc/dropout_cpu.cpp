// The dropout mask applied on a CPU: the same bits as fastlora/backends/dropout.py, whose docstring defines them.
//
//     out[i][j] = keep(seed, first_row + i, j) ? x[i][j] : 0
//
// x and out [rows, columns], elements of 2, 4 or 8 bytes, row strides in elements; out may be x. Bytes: one read of x and
// one write of out, below the cost of Philox's fourteen multiplications for eight elements, which the compiler makes
// vectors of. A second pair of x and out may share the bits: in the backward the mask is on t a and on x. Used by the
// library kernel wherever it masks on a CPU.
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#define FASTLORA_API extern "C" __attribute__((visibility("default")))

// The widest vectors that the machine has, picked when the library is loaded.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define FASTLORA_VECTORS __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FASTLORA_VECTORS
#endif
#define FASTLORA_INLINE inline __attribute__((always_inline))

namespace {

constexpr int COLUMNS_PER_CALL = 8;
constexpr int ROUNDS = 7;
// Calls made side by side: two of the widest vectors.
constexpr int CALLS = 16;
constexpr int COLUMNS = CALLS * COLUMNS_PER_CALL;
// Starting a thread takes about what masking this many elements does.
constexpr int64_t ELEMENTS_PER_THREAD = 1 << 18;

struct Pair {
  const char* x;
  int64_t x_stride;
  char* out;
  int64_t out_stride;

  Pair from_row(int64_t row, int32_t element) const {
    return {x + row * x_stride * element, x_stride, out + row * out_stride * element, out_stride};
  }
};

struct Task {
  const int64_t* seed;
  int32_t threshold;
  uint32_t first_row;
  int64_t rows, columns;
  int pairs;
  Pair pair[2];
};

// The lanes of columns 8 call to 8 call + COLUMNS - 1 of a row. Each 32-bit word in 64 bits, whose low half multiplies
// into a whole product without a shuffle.
FASTLORA_INLINE void make_lanes(const int64_t* seed, uint32_t row, uint32_t call, int16_t* lanes) {
  const uint64_t key = static_cast<uint64_t>(seed[0]), offset = static_cast<uint64_t>(seed[1]);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint64_t c0[CALLS], c1[CALLS], c2[CALLS], c3[CALLS];
  for (int i = 0; i < CALLS; ++i) {
    c0[i] = call + static_cast<uint32_t>(i);
    c1[i] = row;
    c2[i] = static_cast<uint32_t>(offset);
    c3[i] = offset >> 32;
  }
  for (int round = 0; round < ROUNDS; ++round) {
    for (int i = 0; i < CALLS; ++i) {
      const uint64_t product0 = uint64_t(static_cast<uint32_t>(c0[i])) * 0xD2511F53u;
      const uint64_t product1 = uint64_t(static_cast<uint32_t>(c2[i])) * 0xCD9E8D57u;
      c0[i] = (product1 >> 32) ^ c1[i] ^ k0;
      c1[i] = product1 & 0xFFFFFFFFu;
      c2[i] = (product0 >> 32) ^ c3[i] ^ k1;
      c3[i] = product0 & 0xFFFFFFFFu;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  uint64_t words[CALLS][2];
  for (int i = 0; i < CALLS; ++i) {
    words[i][0] = c0[i] | c1[i] << 32;
    words[i][1] = c2[i] | c3[i] << 32;
  }
  std::memcpy(lanes, words, sizeof words);
}

template <class Bits, int PAIRS>
FASTLORA_INLINE void mask_rows(const Task& task) {
  const int16_t threshold = static_cast<int16_t>(task.threshold);
  // All bits set, or none.
  const auto kept = [=](int16_t lane) { return static_cast<Bits>(-static_cast<int16_t>(lane >= threshold)); };
  for (int64_t i = 0; i < task.rows; ++i) {
    for (int64_t first = 0; first < task.columns; first += COLUMNS) {
      int16_t lanes[COLUMNS];
      make_lanes(task.seed, task.first_row + static_cast<uint32_t>(i), static_cast<uint32_t>(first / COLUMNS_PER_CALL),
                 lanes);
      const int64_t left = task.columns - first;
      for (int of = 0; of < PAIRS; ++of) {
        const Pair& pair = task.pair[of];
        const Bits* x = reinterpret_cast<const Bits*>(pair.x) + i * pair.x_stride + first;
        Bits* out = reinterpret_cast<Bits*>(pair.out) + i * pair.out_stride + first;
        // The whole block apart: its length is known, so it becomes vectors.
        if (left >= COLUMNS) {
          for (int j = 0; j < COLUMNS; ++j) out[j] = x[j] & kept(lanes[j]);
        } else {
          for (int j = 0; j < left; ++j) out[j] = x[j] & kept(lanes[j]);
        }
      }
    }
  }
}

template <class Bits>
FASTLORA_INLINE void mask(const Task& task) {
  if (task.pairs == 1) {
    mask_rows<Bits, 1>(task);
  } else {
    mask_rows<Bits, 2>(task);
  }
}

FASTLORA_VECTORS void mask2(const Task& task) { mask<uint16_t>(task); }
FASTLORA_VECTORS void mask4(const Task& task) { mask<uint32_t>(task); }
FASTLORA_VECTORS void mask8(const Task& task) { mask<uint64_t>(task); }

}  // namespace

// Grows with every change of a function; fastlora/backends/dropout_cpu.py refuses a library of another one.
FASTLORA_API int32_t fastlora_cpu_abi() { return 2; }

// ``element`` is 2, 4 or 8 bytes; ``x2`` and ``out2`` null without a second pair; ``threads`` the most to use. Returns when
// out is written.
FASTLORA_API void fastlora_cpu_mask(const int64_t* seed, int32_t threshold, int64_t first_row, int64_t rows,
                                    int64_t columns, int32_t element, const void* x, int64_t x_stride, void* out,
                                    int64_t out_stride, const void* x2, int64_t x2_stride, void* out2,
                                    int64_t out2_stride, int32_t threads) {
  const auto mask = element == 2 ? mask2 : element == 4 ? mask4 : mask8;
  const int pairs = x2 == nullptr ? 1 : 2;
  const Pair one{static_cast<const char*>(x), x_stride, static_cast<char*>(out), out_stride};
  const Pair two{static_cast<const char*>(x2), x2_stride, static_cast<char*>(out2), out2_stride};
  const auto rows_from = [&](int64_t first, int64_t last) {
    return Task{seed,
                threshold,
                static_cast<uint32_t>(first_row + first),
                last - first,
                columns,
                pairs,
                {one.from_row(first, element), pairs == 1 ? two : two.from_row(first, element)}};
  };
  int64_t parts = rows * columns / ELEMENTS_PER_THREAD;
  parts = parts < threads ? parts : threads;
  std::vector<std::thread> helpers;
  int64_t done = 0;
  for (int64_t part = 1; part < parts; ++part) {
    const int64_t last = rows * part / parts;
    try {
      helpers.emplace_back(mask, rows_from(done, last));
    } catch (...) {  // no more threads to be had: the rest is this one's
      break;
    }
    done = last;
  }
  mask(rows_from(done, rows));
  for (std::thread& helper : helpers) helper.join();
}
