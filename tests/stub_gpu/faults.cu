// Launches through csrc/launch.cuh that are wrong on purpose, and one that is right: fault(name) gives the error, or
// NULL where nobody minds.

#include <launch.cuh>

#include <cstring>

namespace {

struct Nothing {
  int32_t value;
};

__global__ void nothing(const __grid_constant__ Nothing) {}

// Never asks for more shared memory.
__global__ void modest(const __grid_constant__ Nothing) {}

const char* encode(uint64_t row_bytes, uint32_t box_rows, size_t shift = 0) {
  alignas(64) static uint8_t matrix[1024];
  fastlora::TensorMap map;
  return fastlora::make_map(&map, matrix + shift, 4, 64, row_bytes, box_rows);
}

const char* run(const fastlora::LaunchShape& shape) { return fastlora::launch(+nothing, Nothing{}, shape, nullptr); }

// Without the opt-in of fastlora::launch, or without arguments.
const char* run_bare(uint32_t shared_bytes, bool arguments) {
  Nothing p = {};
  void* list[] = {&p};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(32);
  config.dynamicSmemBytes = shared_bytes;
  return fastlora::error_of(
      cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(+modest), arguments ? list : nullptr));
}

}  // namespace

extern "C" __attribute__((visibility("default"))) const char* fault(const char* name) {
  fastlora::LaunchShape shape = {};
  shape.blocks_x = 4, shape.threads = 128;
  const auto is = [name](const char* other) { return strcmp(name, other) == 0; };
  if (is("none")) {
    shape.cluster = 2, shape.shared_bytes = 232448;
    const char* error = encode(128, 4);
    return error ? error : run(shape);
  }
  if (is("map_stride")) return encode(136, 4);
  if (is("map_base")) return encode(128, 4, 8);
  if (is("map_box")) return encode(128, 257);
  if (is("cluster_of_the_grid")) {
    shape.blocks_x = 3, shape.cluster = 2;
    return run(shape);
  }
  if (is("cluster_too_large")) {
    shape.blocks_x = 16, shape.cluster = 16;
    return run(shape);
  }
  if (is("shared_over_the_limit")) {
    shape.shared_bytes = 232449;
    return run(shape);
  }
  if (is("shared_without_opt_in")) return run_bare(64 << 10, true);
  if (is("argument_missing")) return run_bare(0, false);
  if (is("grid")) {
    shape.blocks_y = 65536;
    return run(shape);
  }
  if (is("block")) {
    shape.threads = 1056;
    return run(shape);
  }
  return "there is no fault of this name";
}
