// Encode kernels for x86 with AVX2; flags: setup.py.
#define ENCODE_KERNELS encode_kernels_avx2
#define ENCODE_KERNELS_NAME "avx2"
#include "encode_kernels_impl.h"
