// Encode kernels for x86 with AVX-512; flags: setup.py.
#define ENCODE_KERNELS encode_kernels_avx512
#define ENCODE_KERNELS_NAME "avx512"
#include "encode_kernels_impl.h"
