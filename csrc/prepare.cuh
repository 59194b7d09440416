// A small kernel in front of the others: it clears their counters, and casts, copies and pads adapters that the copy
// engine cannot read as they are. The launch after is a dependent one: it starts beside this, and waits for it inside.
#pragma once

#include <cstdint>

#include <fastlora.h>
#include <layout.cuh>
#include <pipeline.cuh>
#include <ptx.cuh>

#include <launch.cuh>

namespace fastlora {

// One adapter's way into 16-bit rows of ``columns``, padded with zeros to ``padded``.
struct Packing {
  const void* from;
  uint16_t* to;
  uint32_t rows, columns, padded;
  int64_t row_stride, column_stride;
  int32_t is_float;
};

struct Preparation {
  Packing packing[2];
  // Counters and flags, to become zero.
  uint32_t* words;
  uint32_t count;
};

constexpr uint32_t PREPARE_THREADS = 256;

template <class T>
__global__ void __launch_bounds__(PREPARE_THREADS) prepare_kernel(const __grid_constant__ Preparation p) {
  grid_dependency_launch();
  const uint32_t first = block_index() * PREPARE_THREADS + thread_index(), step = grid_blocks() * PREPARE_THREADS;
  for (uint32_t i = first; i < p.count; i += step) hand_over(p.words + i, 0u);
  for (const Packing& q : p.packing) {
    const uint32_t size = q.rows * q.padded;
    for (uint32_t i = first; i < size; i += step) {
      const uint32_t row = i / q.padded, column = i % q.padded;
      const int64_t at = row * q.row_stride + column * q.column_stride;
      uint16_t element = 0;
      if (column < q.columns) {
        element =
            q.is_float ? T::round(static_cast<const float*>(q.from)[at]) : static_cast<const uint16_t*>(q.from)[at];
      }
      hand_over(q.to + i, element);
    }
  }
}

template <class T>
const char* prepare(const Preparation& p, void* stream) {
  uint32_t most = 4 * p.count;
  for (const Packing& q : p.packing) most = q.rows * q.padded > most ? q.rows * q.padded : most;
  LaunchShape shape = {};
  shape.blocks_x = ceil_div(most, 4 * PREPARE_THREADS);
  shape.threads = PREPARE_THREADS;
  return launch(+prepare_kernel<T>, p, shape, stream);
}

constexpr uint64_t round_up(uint64_t size, uint64_t step) { return (size + step - 1) / step * step; }

inline fastlora_matrix transposed(const fastlora_matrix& q) { return {q.data, q.column_stride, q.row_stride}; }

// An adapter as the kernel will read it: ``rows`` of ``columns`` contiguous 16-bit elements.
struct Adapter {
  fastlora_matrix matrix;
  uint32_t rows, columns;
  bool is_float, packed;

  Adapter(const fastlora_matrix& matrix, int64_t rows, int64_t columns, bool is_float)
      : matrix(matrix),
        rows(rows),
        columns(columns),
        is_float(is_float),
        packed(is_float || !has_aligned_rows(matrix) || matrix.row_stride < columns) {}

  uint32_t padded() const { return round_up(columns, 8); }
  size_t bytes() const { return packed ? round_up(size_t(rows) * padded() * 2, 256) : 0; }
};

}  // namespace fastlora
