// Soft kernels for x86 with AVX-512; flags: setup.py.
#define SOFT_KERNELS soft_kernels_avx512
#include "soft_kernels_impl.h"
