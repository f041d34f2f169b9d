// Soft kernels for x86 with AVX2; flags: setup.py.
#define SOFT_KERNELS soft_kernels_avx2
#include "soft_kernels_impl.h"
