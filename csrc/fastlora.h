// The C ABI of the CUDA kernels: matrices by pointer and strides, sizes, dtype codes, the stream as a pointer.
//
// A verb returns NULL, or a static error message and has launched nothing then. The caller keeps every pointer alive
// until the stream has passed. ``device`` is the ordinal of the stream's device, which becomes the calling thread's.
// fastlora/backends/cuda_abi.py mirrors these structs field by field.
#pragma once

#include <stddef.h>
#include <stdint.h>

// The rest of the library is hidden.
#define FASTLORA_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

// Grows with every change of a struct or a function; fastlora/backends/cuda_abi.py refuses a library of another one.
#define FASTLORA_ABI 4
FASTLORA_API int32_t fastlora_abi(void);

// The device whose memory the calls take, as torch names it: "cuda", or "cpu" for a stand-in without a GPU.
FASTLORA_API const char* fastlora_device_type(void);

// The reason why no call can succeed on this machine, or NULL.
FASTLORA_API const char* fastlora_obstacle(void);

enum { FASTLORA_BF16 = 0, FASTLORA_FP16 = 1, FASTLORA_FP32 = 2 };
enum { FASTLORA_MASK_NONE = 0, FASTLORA_MASK_INPUT = 1, FASTLORA_MASK_PRODUCT = 2 };
enum { FASTLORA_Z_JOBS = 0, FASTLORA_SERIAL = 1 };

// Element (i, j) lies i * row_stride + j * column_stride elements after data.
typedef struct {
  void* data;
  int64_t row_stride, column_stride;
} fastlora_matrix;

// The dropout mask, as fastlora/backends/dropout.py defines it: seed is (key, offset) int64 [2] on the device.
typedef struct {
  int32_t kind;
  int32_t threshold;
  float rescale;
  const int64_t* seed;
} fastlora_mask;

// z = scale · D(x) aᵀ, y = x wᵀ + z bᵀ + bias (mask on the input), or y = x wᵀ + D(z bᵀ) + bias (mask on the product).
//
//   x [m, k], y [m, n], z [m, r]: dtype; rows contiguous, base and row stride multiples of 16 bytes. Rows of z are
//   written up to the next multiple of 8 columns
//   w [n, k]: dtype; as x, or the transposed view of such a matrix; data NULL: z alone, without b, bias, y and n
//   a [r, k], b [n, r]: adapter_dtype, which is dtype or FP32; any strides
//   bias [n] contiguous on a multiple of 4 bytes, dtype, or NULL
//   r <= 256
typedef struct {
  fastlora_matrix x, w, a, b, y, z;
  const void* bias;
  int64_t m, k, n, r;
  int32_t dtype, adapter_dtype;
  float scale;
  fastlora_mask mask;
  // Who makes z: jobs of its own beside the tiles, or a launch before them.
  int32_t design;
  // Columns of a tile, 128 or 256; 0 chooses.
  int32_t tile_columns;
} fastlora_lora_matmul;

// Bytes of device memory that a call needs beside its operands; aligned to 16.
FASTLORA_API size_t fastlora_lora_matmul_workspace(const fastlora_lora_matmul* call);

FASTLORA_API const char* fastlora_lora_matmul_sm90(const fastlora_lora_matmul* call, void* workspace, int32_t device,
                                                   void* stream);

// The tile that a call would be run by on this device, in words; NULL where it makes z alone or there is no such device.
// Valid until the thread asks again.
FASTLORA_API const char* fastlora_lora_matmul_tile(const fastlora_lora_matmul* call, int32_t device);

// g = pᵀ D(q), where wide and narrow are the wider and the narrower of p and q.
//
//   wide [m, c], narrow [m, r]: dtype; rows contiguous, base and row stride multiples of 16 bytes
//   grad [r, c]: grad_dtype, any of the three; any strides
//   the mask is NONE, or INPUT: on wide
//   r <= 256
typedef struct {
  fastlora_matrix wide, narrow, grad;
  int64_t m, c, r;
  int32_t dtype, grad_dtype;
  fastlora_mask mask;
} fastlora_rank_grad;

FASTLORA_API size_t fastlora_rank_grad_workspace(const fastlora_rank_grad* call);

FASTLORA_API const char* fastlora_rank_grad_sm90(const fastlora_rank_grad* call, void* workspace, int32_t device,
                                                 void* stream);

// One line per kernel of the library: its name without namespaces, where * stands for anything, its threads, its bytes
// of dynamic shared memory, 1 if it multiplies by wgmma, else 0, and the CTAs of its cluster. For
// tests/csrc/cuda_gate.py.
FASTLORA_API const char* fastlora_kernels(void);

#ifdef __cplusplus
}
#endif
