// Lists the order in which a launch's clusters take their work, for tests/csrc/test_cuda_kernels.py.
#include <ptx.cuh>
#include <schedule.cuh>

// For each job in order: how many row units it makes z for (0: it is a tile), its first row unit, its column.
extern "C" uint32_t schedule_probe(uint64_t m, uint64_t n, uint32_t tile_n, uint32_t cluster, uint32_t makes_z,
                                   uint32_t makes_tiles, uint32_t sms, uint32_t* jobs, uint32_t most) {
  using namespace fastlora;
  const Schedule s = make_schedule(m, n, tile_n, cluster, makes_z, makes_tiles, sms);
  for (uint32_t job = 0; job < s.jobs() && job < most; ++job) {
    const bool z = s.makes_z(job);
    const TilePosition tile = z ? TilePosition{s.first_unit(job), 0} : s.tile(job);
    jobs[3 * job] = z ? s.last_unit(job) - s.first_unit(job) : 0;
    jobs[3 * job + 1] = tile.row_unit;
    jobs[3 * job + 2] = tile.column;
  }
  return s.jobs();
}
