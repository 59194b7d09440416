// The order of work in a persistent launch. Clusters take jobs from one atomic counter, so that those which run make
// progress whatever else the GPU does.
//
//   jobs [0, z_jobs)         z for ``z_run`` row units each
//   jobs [z_jobs, jobs())    tiles, GROUP row units column by column, so that their w stays in L2
//
// A row unit is ``cluster`` blocks of TILE_M rows, one per CTA of a cluster. A z job has a smaller number than every
// tile that waits for it, and does not wait itself: a tile waits for a cluster that runs. So there is no deadlock.
#pragma once

#include <cstdint>

#include <layout.cuh>

namespace fastlora {

constexpr int TILE_M = 128;
constexpr int TILE_K = 64;

struct TilePosition {
  uint32_t row_unit, column;
};

struct Schedule {
  static constexpr uint32_t GROUP = 8;

  uint32_t row_units, columns;
  uint32_t z_jobs, z_run;

  __host__ __device__ constexpr uint32_t jobs() const { return z_jobs + row_units * columns; }
  __host__ __device__ constexpr bool makes_z(uint32_t job) const { return job < z_jobs; }
  __host__ __device__ constexpr uint32_t first_unit(uint32_t job) const { return job * z_run; }
  __host__ __device__ constexpr uint32_t last_unit(uint32_t job) const {
    return first_unit(job) + z_run < row_units ? first_unit(job) + z_run : row_units;
  }

  __host__ __device__ constexpr TilePosition tile(uint32_t job) const {
    const uint32_t tile = job - z_jobs;
    const uint32_t group = tile / (GROUP * columns);
    const uint32_t first = group * GROUP;
    const uint32_t rows = row_units - first < GROUP ? row_units - first : GROUP;
    const uint32_t within = tile - first * columns;
    return {first + within % rows, within / rows};
  }
};

// ``makes_z``, ``makes_tiles``: the jobs of the launch. A z job takes about 0.4 of a tile's time per unit, and in the
// last wave some clusters have no tile. Where they are half as many as the units, z jobs make two each: the clusters
// that would idle at the end are then the ones that are busy at the start (csrc/README.md has the predictions).
constexpr Schedule make_schedule(uint64_t m, uint64_t n, uint32_t tile_n, uint32_t cluster, bool makes_z,
                                 bool makes_tiles, uint32_t sms) {
  Schedule s = {};
  s.row_units = ceil_div(m, TILE_M * cluster);
  s.columns = makes_tiles ? ceil_div(n, tile_n) : 0;
  if (!makes_z) return s;
  const uint32_t clusters = sms / cluster > 0 ? sms / cluster : 1;
  const uint32_t idle = (clusters - s.row_units * s.columns % clusters) % clusters;
  s.z_run = makes_tiles && idle < s.row_units && 2 * idle >= s.row_units ? 2 : 1;
  s.z_jobs = ceil_div(s.row_units, s.z_run);
  return s;
}

}  // namespace fastlora
