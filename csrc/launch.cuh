// The CUDA runtime as the launchers use it. tests/csrc/host_model/launch.cuh stands in for it where there is no GPU.
//
// A function here returns nullptr, or a static error message.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <layout.cuh>
#include <ptx.cuh>

#include <cstddef>
#include <cstdint>

namespace fastlora {

constexpr const char* DEVICE_TYPE = "cuda";

struct LaunchShape {
  uint32_t blocks_x;
  uint32_t blocks_y = 1;
  uint32_t threads = 1;
  uint32_t cluster = 1;
  uint32_t shared_bytes = 0;
  // Programmatic dependent launch: may start before the launch before it has ended, and then waits for it inside.
  bool dependent = false;
};

inline const char* error_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

// The driver's entry point, found at run time: the library must load where no driver is installed.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(
        error == cudaSuccess && found == cudaDriverEntryPointSuccess ? function : nullptr);
  }();
  return encoder;
}

// The reason why no kernel of this library can be launched on this machine, or nullptr.
inline const char* driver_obstacle() {
  int version = 0;
  if (cudaDriverGetVersion(&version) != cudaSuccess || version == 0) return "there is no CUDA driver";
  if (version / 1000 < CUDART_VERSION / 1000) {
    return "the CUDA driver is older than the toolkit that built the kernels: update the driver, or build with an "
           "older nvcc";
  }
  return tensor_map_encoder() == nullptr ? "the CUDA driver has no cuTensorMapEncodeTiled: update it" : nullptr;
}

// A matrix of 16-bit elements for tensor copies: boxes of ``box_rows`` x PANEL columns, 128-byte swizzle, zeros
// outside. Base and row stride are multiples of 16 bytes.
inline const char* make_map(TensorMap* map, const void* base, uint64_t rows, uint64_t columns, uint64_t row_bytes,
                            uint32_t box_rows) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) return driver_obstacle();
  const cuuint64_t sizes[2] = {columns, rows};
  const cuuint64_t strides[1] = {row_bytes};
  const cuuint32_t box[2] = {PANEL, box_rows};
  const cuuint32_t steps[2] = {1, 1};
  // The copy engine moves bits: one 16-bit type serves both of ours.
  const CUresult result = encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(base), sizes, strides, box,
                                 steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refused a tensor map";
}

template <class Arguments>
const char* launch(void (*kernel)(Arguments), const Arguments& arguments, const LaunchShape& shape, void* stream) {
  if (shape.shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, shape.shared_bytes);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {shape.cluster, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.blocks_x, shape.blocks_y);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = shape.dependent ? 2 : 1;
  return error_of(cudaLaunchKernelEx(&config, kernel, arguments));
}

// Makes it this thread's device: a thread that has used no GPU yet, such as autograd's, has no context before.
inline const char* use_device(int32_t device) { return error_of(cudaSetDevice(device)); }

inline const char* count_multiprocessors(int32_t device, uint32_t* count) {
  int found = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&found, cudaDevAttrMultiProcessorCount, device);
  *count = found;
  return error_of(error);
}

}  // namespace fastlora
