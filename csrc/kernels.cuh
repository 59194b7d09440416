// Each verb's lines of fastlora_kernels(), made beside its kernels.
#pragma once

namespace fastlora::lora_matmul {
const char* kernels();
}

namespace fastlora::rank_grad {
const char* kernels();
}
