// csrc/layout.cuh is the same for both; only, here nobody else says what its __host__ and __device__ are.
#pragma once

#include "words.hpp"

#include_next <layout.cuh>
