#include <checks.hpp>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace stub {
namespace {

// The first words of a tensor map that was made here.
constexpr uint64_t MAP_MARK = 0x50414D524F534E54;

std::vector<std::string> operations, refusals;
uint64_t maps = 0;
std::string last_reason;

uint32_t element_bytes(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32_FTZ:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32:
    case CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ:
      return 4;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64:
      return 8;
    default:
      return 0;
  }
}

// The bytes that the first side of a box may have; 0 where the swizzle is none that is known here.
uint32_t swizzle_span(CUtensorMapSwizzle swizzle) {
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_NONE:
      return UINT32_MAX;
    case CU_TENSOR_MAP_SWIZZLE_32B:
      return 32;
    case CU_TENSOR_MAP_SWIZZLE_64B:
      return 64;
    case CU_TENSOR_MAP_SWIZZLE_128B:
      return 128;
    default:
      return 0;
  }
}

template <class Item>
std::string listed(const Item* items, size_t count) {
  std::string text = "[";
  for (size_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(items[i]);
  return text + "]";
}

std::string joined(const std::vector<std::string>& items) {
  std::string text = "[";
  for (size_t i = 0; i < items.size(); ++i) text += (i ? ", " : "") + items[i];
  return text + "]";
}

CUresult check_arguments(const Kernel& kernel, void** arguments) {
  // The last two pointers of Triton's kernels are for scratch memory, and NULL where none is needed.
  const size_t count = kernel.parameters.size(), named = count > 2 ? count - 2 : 0;
  if (count > 0 && arguments == nullptr) return refuse(CUDA_ERROR_INVALID_VALUE, "no arguments, expected %zu", count);
  for (size_t i = 0; i < count; ++i) {
    const uint32_t bytes = kernel.parameters[i];
    if (arguments[i] == nullptr) {
      return refuse(CUDA_ERROR_INVALID_VALUE, "argument %zu of %zu is missing", i + 1, count);
    }
    uint64_t value = 0;
    memcpy(&value, arguments[i], bytes < sizeof(value) ? bytes : sizeof(value));
    if (bytes == sizeof(CUtensorMap) && value != MAP_MARK) {
      return refuse(CUDA_ERROR_INVALID_VALUE, "argument %zu of %zu is no encoded tensor map", i + 1, count);
    }
    if (bytes == sizeof(void*) && value == 0 && i < named) {
      return refuse(CUDA_ERROR_INVALID_VALUE, "argument %zu of %zu is a NULL pointer", i + 1, count);
    }
  }
  return CUDA_SUCCESS;
}

}  // namespace

int capability() {
  const char* text = getenv("STUB_GPU_CAPABILITY");
  return text == nullptr ? 90 : atoi(text);
}

uint32_t shared_limit() {
  switch (capability()) {
    case 80:
    case 87:
      return 163 << 10;
    case 86:
    case 89:
    case 120:
    case 121:
      return 99 << 10;
    default:
      return 227 << 10;
  }
}

CUresult refuse(CUresult code, const char* format, ...) {
  char text[512];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof(text), format, values);
  va_end(values);
  last_reason = text;
  refusals.push_back("\"" + last_reason + "\"");
  return code;
}

const char* reason_of(CUresult code) {
  static std::string text;
  text = "error " + std::to_string(code) + " of the stub: " + last_reason;
  return text.c_str();
}

CUresult set_dynamic_shared(Kernel& kernel, int64_t bytes) {
  if (bytes < 0 || bytes + kernel.static_shared > shared_limit()) {
    return refuse(CUDA_ERROR_INVALID_VALUE, "%s asks for %lld bytes of dynamic shared memory, limit %u",
                  kernel.name.c_str(), static_cast<long long>(bytes), shared_limit() - kernel.static_shared);
  }
  kernel.opted_in = bytes > SHARED_WITHOUT_OPT_IN ? bytes : SHARED_WITHOUT_OPT_IN;
  return CUDA_SUCCESS;
}

CUresult check_launch(const Kernel& kernel, const Launch& launch, void** arguments) {
  const char* name = kernel.name.c_str();
  const uint32_t (&grid)[3] = launch.grid, (&block)[3] = launch.block, (&cluster)[3] = launch.cluster;
  if (grid[0] < 1 || grid[1] < 1 || grid[2] < 1 || grid[0] > INT32_MAX || grid[1] > 65535 || grid[2] > 65535) {
    return refuse(CUDA_ERROR_INVALID_VALUE, "%s: grid %u x %u x %u, expected 1 to 2^31 - 1, 65535 and 65535", name,
                  grid[0], grid[1], grid[2]);
  }
  const uint64_t threads = uint64_t(block[0]) * block[1] * block[2];
  if (threads < 1 || threads > kernel.most_threads || block[2] > 64) {
    return refuse(CUDA_ERROR_INVALID_VALUE, "%s: block %u x %u x %u, expected 1 to %u threads", name, block[0],
                  block[1], block[2], kernel.most_threads);
  }
  // Registers are handed out to a warp, eight for each thread at a time.
  const uint64_t warps = (threads + 31) / 32, registers = (kernel.registers + 7) / 8 * 8 * 32 * warps;
  if (registers > REGISTERS) {
    return refuse(CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES, "%s: %u registers for each of %llu threads", name,
                  kernel.registers, static_cast<unsigned long long>(threads));
  }
  if (launch.shared > kernel.opted_in || launch.shared + kernel.static_shared > shared_limit()) {
    return refuse(CUDA_ERROR_INVALID_VALUE, "%s: %u bytes of dynamic shared memory, asked for %u", name, launch.shared,
                  kernel.opted_in);
  }
  const uint64_t ctas = uint64_t(cluster[0]) * cluster[1] * cluster[2];
  if (ctas > 1 && capability() < 90) {
    return refuse(CUDA_ERROR_INVALID_CLUSTER_SIZE, "%s: sm_%d has no clusters", name, capability());
  }
  if (ctas < 1 || ctas > (kernel.non_portable_cluster ? LARGEST_CLUSTER : PORTABLE_CLUSTER)) {
    return refuse(CUDA_ERROR_INVALID_CLUSTER_SIZE, "%s: a cluster of %llu CTAs", name,
                  static_cast<unsigned long long>(ctas));
  }
  for (int i = 0; i < 3; ++i) {
    if (grid[i] % cluster[i] != 0) {
      return refuse(CUDA_ERROR_INVALID_CLUSTER_SIZE, "%s: a grid of %u is no multiple of the cluster of %u", name,
                    grid[i], cluster[i]);
    }
  }
  if (const CUresult wrong = check_arguments(kernel, arguments)) return wrong;
  operations.push_back("{\"kernel\": \"" + kernel.name + "\", \"grid\": " + listed(grid, 3) +
                       ", \"block\": " + listed(block, 3) + ", \"cluster\": " + listed(cluster, 3) +
                       ", \"shared\": " + std::to_string(launch.shared) +
                       ", \"dependent\": " + (launch.dependent ? "true" : "false") + "}");
  return CUDA_SUCCESS;
}

void record_operation(const char* name, uint64_t bytes) {
  operations.push_back("{\"operation\": \"" + std::string(name) + "\", \"bytes\": " + std::to_string(bytes) + "}");
}

}  // namespace stub

// By the rules of the driver's reference manual.
STUB_API CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                                         const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                         const cuuint32_t* steps, CUtensorMapInterleave interleave,
                                         CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  using stub::refuse;
  constexpr CUresult WRONG = CUDA_ERROR_INVALID_VALUE;
  const uint32_t bytes = stub::element_bytes(type), span = stub::swizzle_span(swizzle);
  if (stub::capability() < 90) return refuse(CUDA_ERROR_NOT_SUPPORTED, "tensor maps need sm_90 or newer");
  if (bytes == 0) return refuse(WRONG, "tensor map: element type %d is not known", int(type));
  if (rank < 1 || rank > 5) return refuse(WRONG, "tensor map: rank %u, expected 1 to 5", rank);
  if (reinterpret_cast<uintptr_t>(map) % 64) return refuse(WRONG, "tensor map: it does not start on 64 bytes itself");
  if (base == nullptr) return refuse(WRONG, "tensor map: the matrix is at NULL");
  if (reinterpret_cast<uintptr_t>(base) % 16) return refuse(WRONG, "tensor map: the matrix does not start on 16 bytes");
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) return refuse(WRONG, "tensor map: interleave %d", int(interleave));
  for (uint32_t i = 0; i < rank; ++i) {
    if (sizes[i] < 1 || sizes[i] > 1ull << 32) {
      return refuse(WRONG, "tensor map: side %u is %llu, expected 1 to 2^32", i,
                    static_cast<unsigned long long>(sizes[i]));
    }
    if (box[i] < 1 || box[i] > 256) return refuse(WRONG, "tensor map: side %u of the box is %u of 256", i, box[i]);
    if (steps[i] < 1 || steps[i] > 8) return refuse(WRONG, "tensor map: step %u of side %u", steps[i], i);
  }
  for (uint32_t i = 0; i + 1 < rank; ++i) {
    if (strides[i] % 16 || strides[i] >= 1ull << 40) {
      return refuse(WRONG, "tensor map: stride %u is %llu bytes, expected a multiple of 16 below 2^40", i,
                    static_cast<unsigned long long>(strides[i]));
    }
  }
  if (box[0] * bytes % 16) return refuse(WRONG, "tensor map: rows of the box are %u bytes of 16", box[0] * bytes);
  if (box[0] * bytes > span) {
    return refuse(WRONG, "tensor map: rows of the box are %u bytes, the swizzle spans %u", box[0] * bytes, span);
  }
  memset(map, 0, sizeof(*map));
  memcpy(map, &stub::MAP_MARK, sizeof(stub::MAP_MARK));
  ++stub::maps;
  return CUDA_SUCCESS;
}

STUB_API const char* stub_take() {
  static std::string text;
  text = "{\"operations\": " + stub::joined(stub::operations) + ", \"maps\": " + std::to_string(stub::maps) +
         ", \"refusals\": " + stub::joined(stub::refusals) + "}";
  stub::operations.clear();
  stub::refusals.clear();
  stub::maps = 0;
  return text.c_str();
}
