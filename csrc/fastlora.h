// The C ABI of the CUDA kernels: raw pointers, sizes, strides in elements, dtype codes, the stream as a pointer.
//
// A function returns NULL, or what went wrong, in words that live as long as the program. Nothing is launched then. The
// caller keeps every pointer alive until the stream has passed. ``device`` is the ordinal of the stream's device, which
// becomes the calling thread's.
// fastlora/backends/cuda.py mirrors these structs field by field. Both verbs are called alike; rank_grad ignores ``sms``, since
// its sums must be the same on every GPU.
#pragma once

#include <stddef.h>
#include <stdint.h>

// The rest of the library is hidden.
#define FASTLORA_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

// Grows with every change of a struct below; fastlora/backends/cuda.py refuses a library of another one.
#define FASTLORA_ABI 2
FASTLORA_API int32_t fastlora_abi(void);

// Why no call can succeed on this machine, or NULL.
FASTLORA_API const char* fastlora_obstacle(void);

enum { FASTLORA_BF16 = 0, FASTLORA_FP16 = 1, FASTLORA_FP32 = 2 };
enum { FASTLORA_MASK_NONE = 0, FASTLORA_MASK_INPUT = 1, FASTLORA_MASK_PRODUCT = 2 };
enum { FASTLORA_Z_JOBS = 0, FASTLORA_SERIAL = 1 };

// The dropout mask, as fastlora/backends/dropout.py defines it: seed is (key, offset) int64 [2] on the device.
typedef struct {
  int32_t kind;
  int32_t threshold;
  float rescale;
  const int64_t* seed;
} fastlora_mask;

// z = scale · D(x) aᵀ, y = x wᵀ + z bᵀ + bias (mask on the input), or y = x wᵀ + D(z bᵀ) + bias (mask on the product).
//
//   x [m, k], y [m, n], z [m, r]: rows contiguous, base and row stride multiples of 16 bytes; dtype. Rows of z are
//   written up to the next multiple of 8 columns
//   w [n, k]: w_stride is that of its rows; where w_transposed, it is stored as [k, n] and w_stride is that of k
//   a [r, k], b [n, r]: adapter_dtype, which is dtype or FP32; any strides
//   bias [n] contiguous on a multiple of 4 bytes, dtype, or NULL
//   w, b, bias and y NULL: z alone
//   r <= 256
typedef struct {
  const void *x, *w, *a, *b, *bias;
  void *y, *z;
  int64_t m, k, n, r;
  int64_t x_stride, w_stride, y_stride, z_stride;
  int64_t a_stride_r, a_stride_k, b_stride_n, b_stride_r;
  int32_t w_transposed, dtype, adapter_dtype;
  float scale;
  fastlora_mask mask;
  // Who makes z: jobs of its own beside the tiles, or a launch before them.
  int32_t design;
  // Columns of a tile, 128 or 256; 0 chooses.
  int32_t tile_columns;
} fastlora_lora_matmul;

// Bytes of device memory that a call needs beside its operands; aligned to 256.
FASTLORA_API size_t fastlora_lora_matmul_workspace(const fastlora_lora_matmul* call);

FASTLORA_API const char* fastlora_lora_matmul_sm90(const fastlora_lora_matmul* call, void* workspace, int32_t device,
                                                   int32_t sms, void* stream);

// g = pᵀ D(q), where wide and narrow are the wider and the narrower of p and q.
//
//   wide [m, c], narrow [m, r]: rows contiguous, base and row stride multiples of 16 bytes; dtype
//   grad: element (i of r, j of c) at i * grad_stride_r + j * grad_stride_c; grad_dtype, any of the three
//   the mask is NONE, or INPUT: on wide
//   r <= 256
typedef struct {
  const void *wide, *narrow;
  void* grad;
  int64_t m, c, r;
  int64_t wide_stride, narrow_stride, grad_stride_r, grad_stride_c;
  int32_t dtype, grad_dtype;
  fastlora_mask mask;
} fastlora_rank_grad;

FASTLORA_API size_t fastlora_rank_grad_workspace(const fastlora_rank_grad* call);

FASTLORA_API const char* fastlora_rank_grad_sm90(const fastlora_rank_grad* call, void* workspace, int32_t device,
                                                 int32_t sms, void* stream);

// Every kernel of the library, a line each: its name without namespaces, where * stands for anything, its threads, its
// bytes of dynamic shared memory, and 1 if it multiplies by wgmma, else 0. For tests/csrc/cuda_gate.py.
FASTLORA_API const char* fastlora_kernels(void);

#ifdef __cplusplus
}
#endif
