// libcuda.so.1 as Triton's driver and launcher use it: nothing runs, and what a driver would refuse is refused.

#include <checks.hpp>

#include <elf.h>
#include <cstring>
#include <map>

namespace {

// Attributes of .nv.info, as cuobjdump -elf prints them.
enum : uint8_t { FORMAT_SIZED = 4, MAX_THREADS = 0x05, PARAMETER_INFO = 0x17 };

struct Module {
  std::map<std::string, stub::Kernel> kernels;
};

bool starts_with(const char* text, const char* prefix) { return strncmp(text, prefix, strlen(prefix)) == 0; }

// One attribute is its format, its code, and 16 bits: the value, or the bytes that follow.
void read_attributes(stub::Kernel& kernel, const uint8_t* data, uint64_t bytes) {
  for (const uint8_t* end = data + bytes; data + 4 <= end;) {
    const uint8_t format = data[0], attribute = data[1];
    uint16_t size;
    memcpy(&size, data + 2, sizeof(size));
    data += 4;
    if (format != FORMAT_SIZED) continue;
    if (attribute == PARAMETER_INFO) {
      uint16_t ordinal;
      uint32_t flags;
      memcpy(&ordinal, data + 4, sizeof(ordinal));
      memcpy(&flags, data + 8, sizeof(flags));
      if (kernel.parameters.size() <= ordinal) kernel.parameters.resize(ordinal + 1);
      kernel.parameters[ordinal] = flags >> 18;
    } else if (attribute == MAX_THREADS) {
      uint32_t sides[3];
      memcpy(sides, data, sizeof(sides));
      kernel.most_threads = sides[0] * sides[1] * sides[2];
    }
    data += size;
  }
}

// The kernels of a cubin, which is an ELF file.
bool read_cubin(Module& module, const uint8_t* image) {
  Elf64_Ehdr header;
  memcpy(&header, image, sizeof(header));
  if (memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 || header.e_ident[EI_CLASS] != ELFCLASS64) return false;
  const Elf64_Shdr* sections = reinterpret_cast<const Elf64_Shdr*>(image + header.e_shoff);
  const char* names = reinterpret_cast<const char*>(image + sections[header.e_shstrndx].sh_offset);
  for (int i = 0; i < header.e_shnum; ++i) {
    const Elf64_Shdr& section = sections[i];
    const char* name = names + section.sh_name;
    if (starts_with(name, ".text.")) {
      stub::Kernel& kernel = module.kernels[name + strlen(".text.")];
      kernel.name = name + strlen(".text.");
      kernel.registers = section.sh_info >> 24;
    } else if (starts_with(name, ".nv.info.")) {
      read_attributes(module.kernels[name + strlen(".nv.info.")], image + section.sh_offset, section.sh_size);
    } else if (starts_with(name, ".nv.shared.") && !starts_with(name, ".nv.shared.reserved.")) {
      module.kernels[name + strlen(".nv.shared.")].static_shared = section.sh_size;
    }
  }
  return !module.kernels.empty();
}

stub::Kernel& kernel_of(CUfunction function) { return *reinterpret_cast<stub::Kernel*>(function); }

}  // namespace

STUB_API CUresult cuInit(unsigned int) { return CUDA_SUCCESS; }

STUB_API CUresult cuGetErrorString(CUresult code, const char** text) {
  *text = stub::reason_of(code);
  return CUDA_SUCCESS;
}

STUB_API CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  *device = ordinal;
  return ordinal == 0 ? CUDA_SUCCESS : stub::refuse(CUDA_ERROR_INVALID_DEVICE, "device %d of 1", ordinal);
}

STUB_API CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  static int one;
  *context = reinterpret_cast<CUcontext>(&one);
  return CUDA_SUCCESS;
}

STUB_API CUresult cuCtxGetCurrent(CUcontext* context) { return cuDevicePrimaryCtxRetain(context, 0); }

STUB_API CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }

STUB_API CUresult cuCtxGetLimit(size_t* value, CUlimit) {
  *value = 1 << 20;
  return CUDA_SUCCESS;
}

STUB_API CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }

STUB_API CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN:
      *value = stub::shared_limit();
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR:
      *value = stub::shared_limit() + 1024;
      break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT:
      *value = stub::MULTIPROCESSORS;
      break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK:
      *value = stub::REGISTERS;
      break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE:
      *value = 32;
      break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR:
      *value = stub::capability() / 10;
      break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR:
      *value = stub::capability() % 10;
      break;
    default:
      *value = 1;
  }
  return CUDA_SUCCESS;
}

// Modules stay for the life of the process: Triton unloads none.
STUB_API CUresult cuModuleLoadData(CUmodule* loaded, const void* image) {
  auto* module = new Module;
  *loaded = reinterpret_cast<CUmodule>(module);
  if (image != nullptr && read_cubin(*module, static_cast<const uint8_t*>(image))) return CUDA_SUCCESS;
  return stub::refuse(CUDA_ERROR_INVALID_IMAGE, "the image is no cubin with a kernel");
}

STUB_API CUresult cuModuleGetFunction(CUfunction* function, CUmodule loaded, const char* name) {
  auto& kernels = reinterpret_cast<Module*>(loaded)->kernels;
  const auto found = kernels.find(name);
  if (found == kernels.end()) return stub::refuse(CUDA_ERROR_NOT_FOUND, "the module has no kernel %s", name);
  *function = reinterpret_cast<CUfunction>(&found->second);
  return CUDA_SUCCESS;
}

STUB_API CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  const stub::Kernel& kernel = kernel_of(function);
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      *value = kernel.most_threads;
      break;
    case CU_FUNC_ATTRIBUTE_NUM_REGS:
      *value = kernel.registers;
      break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
      *value = kernel.static_shared;
      break;
    default:
      *value = 0;
  }
  return CUDA_SUCCESS;
}

STUB_API CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute == CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED)
    kernel_of(function).non_portable_cluster = value;
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
  return stub::set_dynamic_shared(kernel_of(function), value);
}

STUB_API CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }

STUB_API CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction, const CUlaunchConfig*) {
  *clusters = 1;
  return CUDA_SUCCESS;
}

STUB_API CUresult cuPointerGetAttribute(void* data, CUpointer_attribute, CUdeviceptr pointer) {
  memcpy(data, &pointer, sizeof(pointer));
  return CUDA_SUCCESS;
}

STUB_API CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void**) {
  stub::Launch launch;
  launch.grid[0] = config->gridDimX, launch.grid[1] = config->gridDimY, launch.grid[2] = config->gridDimZ;
  launch.block[0] = config->blockDimX, launch.block[1] = config->blockDimY, launch.block[2] = config->blockDimZ;
  launch.shared = config->sharedMemBytes;
  for (unsigned int i = 0; i < config->numAttrs; ++i) {
    const CUlaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION) {
      const auto& cluster = attribute.value.clusterDim;
      launch.cluster[0] = cluster.x, launch.cluster[1] = cluster.y, launch.cluster[2] = cluster.z;
    } else if (attribute.id == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION) {
      launch.dependent = attribute.value.programmaticStreamSerializationAllowed;
    }
  }
  return stub::check_launch(kernel_of(function), launch, arguments);
}
