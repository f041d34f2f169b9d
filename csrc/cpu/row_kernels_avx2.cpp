// Row kernels for x86 with AVX2 (compiled with the flags named in setup.py).
#define ROW_KERNELS row_kernels_avx2
#define ROW_KERNELS_NAME "avx2"
#include "row_kernels_impl.h"
