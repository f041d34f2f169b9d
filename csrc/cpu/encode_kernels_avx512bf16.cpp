// Encode kernels for x86 with AVX-512 and its bfloat16 products; flags: setup.py.
#define ENCODE_KERNELS encode_kernels_avx512bf16
#define ENCODE_KERNELS_NAME "avx512bf16"
#include "encode_kernels_impl.h"
