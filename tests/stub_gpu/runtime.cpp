// The CUDA runtime as the objects of csrc/ use it, linked with them in its place: nothing runs, and what a runtime and
// its driver would refuse is refused.

#include <checks.hpp>

#include <cuda_runtime_api.h>

#include <cxxabi.h>
#include <cstdlib>
#include <cstring>
#include <map>

namespace {

// By the address of the host's function of the same name.
std::map<const void*, stub::Kernel>& kernels() {
  static std::map<const void*, stub::Kernel> known;
  return known;
}

std::string demangled(const char* name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  const std::string result = status == 0 ? text : name;
  free(text);
  return result;
}

cudaError_t error_of(CUresult result) { return static_cast<cudaError_t>(result); }

stub::Kernel* find(const void* function) {
  const auto found = kernels().find(function);
  return found == kernels().end() ? nullptr : &found->second;
}

}  // namespace

// What nvcc's objects call as they load: see the host code that `nvcc --keep` leaves.
extern "C" void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
extern "C" void __cudaRegisterFatBinaryEnd(void**) {}
extern "C" void __cudaUnregisterFatBinary(void**) {}
extern "C" void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*,
                                       dim3*, dim3*, int*) {
  kernels()[function].name = demangled(name);
}
extern "C" void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
extern "C" char __cudaInitModule(void**) { return 0; }

// Of the launches by <<< >>>, which csrc has none of.
extern "C" unsigned int __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { abort(); }
extern "C" cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { abort(); }
extern "C" cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { abort(); }
extern "C" cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { abort(); }
extern "C" cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { abort(); }

extern "C" cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

extern "C" cudaError_t cudaGetLastError() { return cudaSuccess; }

extern "C" const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : stub::reason_of(static_cast<CUresult>(error));
}

extern "C" cudaError_t cudaSetDevice(int device) {
  if (device == 0) return cudaSuccess;
  return error_of(stub::refuse(CUDA_ERROR_INVALID_DEVICE, "device %d of 1", device));
}

extern "C" cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = stub::MULTIPROCESSORS;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = stub::shared_limit();
      return cudaSuccess;
    default:
      return error_of(stub::refuse(CUDA_ERROR_INVALID_VALUE, "attribute %d is not known here", int(attribute)));
  }
}

extern "C" cudaError_t cudaMemsetAsync(void* memory, int, size_t bytes, cudaStream_t) {
  if (memory == nullptr && bytes > 0) return error_of(stub::refuse(CUDA_ERROR_INVALID_VALUE, "a memset at NULL"));
  stub::record_operation("memset", bytes);
  return cudaSuccess;
}

extern "C" cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  stub::Kernel* kernel = find(function);
  if (kernel == nullptr) return error_of(stub::refuse(CUDA_ERROR_INVALID_HANDLE, "the function is no kernel"));
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) kernel->non_portable_cluster = value;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  return error_of(stub::set_dynamic_shared(*kernel, value));
}

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned int,
                                                        unsigned long long, cudaDriverEntryPointQueryResult* found) {
  const bool known = strcmp(name, "cuTensorMapEncodeTiled") == 0;
  *function = known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

extern "C" cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  const stub::Kernel* kernel = find(function);
  if (kernel == nullptr) return error_of(stub::refuse(CUDA_ERROR_INVALID_HANDLE, "the function is no kernel"));
  // Each kernel of csrc takes one structure.
  if (arguments == nullptr || arguments[0] == nullptr) {
    return error_of(stub::refuse(CUDA_ERROR_INVALID_VALUE, "argument 1 of 1 is missing"));
  }
  stub::Launch launch;
  launch.grid[0] = config->gridDim.x, launch.grid[1] = config->gridDim.y, launch.grid[2] = config->gridDim.z;
  launch.block[0] = config->blockDim.x, launch.block[1] = config->blockDim.y, launch.block[2] = config->blockDim.z;
  if (config->dynamicSmemBytes > UINT32_MAX) {
    return error_of(stub::refuse(CUDA_ERROR_INVALID_VALUE, "%zu bytes of shared memory", config->dynamicSmemBytes));
  }
  launch.shared = config->dynamicSmemBytes;
  for (unsigned int i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      const auto& cluster = attribute.val.clusterDim;
      launch.cluster[0] = cluster.x, launch.cluster[1] = cluster.y, launch.cluster[2] = cluster.z;
    } else if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization) {
      launch.dependent = attribute.val.programmaticStreamSerializationAllowed;
    }
  }
  return error_of(stub::check_launch(*kernel, launch, arguments));
}
