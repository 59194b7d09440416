// csrc/launch.cuh for a machine without a GPU: a launch runs the grid to its end before it returns.
#pragma once

#include <layout.cuh>
#include <ptx.cuh>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace fastlora {

constexpr const char* DEVICE_TYPE = "cpu";

// Few, so that a small product has more tiles than CTAs.
constexpr uint32_t MULTIPROCESSORS = 4;

struct LaunchShape {
  uint32_t blocks_x;
  uint32_t blocks_y = 1;
  uint32_t threads = 1;
  uint32_t cluster = 1;
  uint32_t shared_bytes = 0;
  bool dependent = false;
};

namespace model {

// One thread of the kernel: enter(call) runs it.
struct Body {
  void (*enter)(const void* call);
  const void* call;
};

const char* run_grid(const LaunchShape& shape, const Body& body);

constexpr uint32_t MADE = 0x7E45;

}  // namespace model

inline const char* make_map(TensorMap* map, const void* base, uint64_t rows, uint64_t columns, uint64_t row_bytes,
                            uint32_t box_rows) {
  if (base == nullptr || reinterpret_cast<uintptr_t>(base) % 16 != 0) {
    return "make_map: the base of a tensor map is not a multiple of 16 bytes";
  }
  if (row_bytes % 16 != 0 || row_bytes >= uint64_t(1) << 40) {
    return "make_map: the row stride of a tensor map is not a multiple of 16 bytes below 2^40";
  }
  if (rows == 0 || columns == 0 || rows > uint64_t(1) << 32 || columns > uint64_t(1) << 32) {
    return "make_map: the sizes of a tensor map are not in 1 .. 2^32";
  }
  if (box_rows == 0 || box_rows > 256) return "make_map: the rows of a box are not in 1 .. 256";
  *map = {static_cast<uint8_t*>(const_cast<void*>(base)), rows, columns, row_bytes, box_rows, model::MADE};
  return nullptr;
}

template <class Arguments>
const char* launch(void (*kernel)(Arguments), const Arguments& arguments, const LaunchShape& shape, void*) {
  struct Call {
    void (*kernel)(Arguments);
    const Arguments* arguments;
  };
  const Call call{kernel, &arguments};
  const auto enter = [](const void* opaque) {
    const Call& call = *static_cast<const Call*>(opaque);
    call.kernel(*call.arguments);
  };
  return model::run_grid(shape, {enter, &call});
}

inline const char* use_device(int32_t) { return nullptr; }

inline const char* count_multiprocessors(int32_t, uint32_t* count) {
  *count = MULTIPROCESSORS;
  return nullptr;
}

inline const char* driver_obstacle() { return nullptr; }

}  // namespace fastlora
