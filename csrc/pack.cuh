// A small kernel that casts, copies and pads adapters that the copy engine cannot read as they are.
#pragma once

#include <cstdint>

#include <fastlora.h>
#include <layout.cuh>
#include <pipeline.cuh>
#include <ptx.cuh>

namespace fastlora {

// One adapter's way into 16-bit rows of ``columns``, padded with zeros to ``padded``.
struct Packing {
  const void* from;
  uint16_t* to;
  uint32_t rows, columns, padded;
  int64_t row_stride, column_stride;
  int32_t is_float;
};

struct PackParameters {
  Packing packing[2];
};

constexpr uint32_t PACK_THREADS = 256;

template <class T>
__global__ void __launch_bounds__(PACK_THREADS) pack_kernel(const __grid_constant__ PackParameters p) {
  for (const Packing& q : p.packing) {
    const uint32_t size = q.rows * q.padded;
    for (uint32_t i = block_index() * PACK_THREADS + thread_index(); i < size; i += grid_blocks() * PACK_THREADS) {
      const uint32_t row = i / q.padded, column = i % q.padded;
      const int64_t at = row * q.row_stride + column * q.column_stride;
      if (column >= q.columns) {
        q.to[i] = 0;
      } else if (q.is_float) {
        q.to[i] = T::round(static_cast<const float*>(q.from)[at]);
      } else {
        q.to[i] = static_cast<const uint16_t*>(q.from)[at];
      }
    }
  }
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
