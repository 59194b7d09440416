// What a CUDA driver refuses of a launch, and a record of what it would run: for the stub driver and the stub runtime.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <string>
#include <vector>

// The rest of a stub is hidden.
#define STUB_API extern "C" __attribute__((visibility("default")))

namespace stub {

// An H100's, by the CUDA C++ Programming Guide, technical specifications.
constexpr int MULTIPROCESSORS = 132;
constexpr int REGISTERS = 65536;
constexpr uint32_t SHARED_WITHOUT_OPT_IN = 48 << 10;
constexpr uint32_t PORTABLE_CLUSTER = 8, LARGEST_CLUSTER = 16;

// Compute capability as a number, 90 for sm_90: STUB_GPU_CAPABILITY, or 90.
int capability();

// Bytes of shared memory a CTA may have once it has asked for them.
uint32_t shared_limit();

// One kernel as a driver knows it. ``parameters`` holds their sizes in bytes where the machine code tells them.
struct Kernel {
  std::string name;
  std::vector<uint32_t> parameters;
  uint32_t registers = 0;
  uint32_t most_threads = 1024;
  uint32_t static_shared = 0;
  uint32_t opted_in = SHARED_WITHOUT_OPT_IN;
  bool non_portable_cluster = false;
};

struct Launch {
  uint32_t grid[3] = {1, 1, 1};
  uint32_t block[3] = {1, 1, 1};
  uint32_t cluster[3] = {1, 1, 1};
  uint32_t shared = 0;
  // Programmatic dependent launch.
  bool dependent = false;
};

// Notes the reason for reason_of and the record, and returns the code.
CUresult refuse(CUresult code, const char* format, ...) __attribute__((format(printf, 2, 3)));

// What the code means, with the reason of the last refusal.
const char* reason_of(CUresult code);

CUresult set_dynamic_shared(Kernel& kernel, int64_t bytes);

// Checks a launch, and records it where nothing is wrong.
CUresult check_launch(const Kernel& kernel, const Launch& launch, void** arguments);

// Records anything else that goes into a stream.
void record_operation(const char* name, uint64_t bytes);

}  // namespace stub

// Everything since the last call, as JSON: {"operations": [...], "maps": n, "refusals": [...]}.
STUB_API const char* stub_take();
