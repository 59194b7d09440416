// The functions of fastlora.h that belong to the library as a whole.

#include <cstdio>

#include <fastlora.h>
#include <kernels.cuh>

#include <launch.cuh>

extern "C" int32_t fastlora_abi(void) { return FASTLORA_ABI; }

extern "C" const char* fastlora_device_type(void) { return fastlora::DEVICE_TYPE; }

extern "C" const char* fastlora_obstacle(void) { return fastlora::driver_obstacle(); }

extern "C" const char* fastlora_kernels(void) {
  static char lines[1024];
  std::snprintf(lines, sizeof(lines), "%s%s", fastlora::lora_matmul::kernels(), fastlora::rank_grad::kernels());
  return lines;
}
