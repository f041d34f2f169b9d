// Row kernels for x86 with AVX512 (compiled with the flags named in setup.py).
#define ROW_KERNELS row_kernels_avx512
#define ROW_KERNELS_NAME "avx512"
#include "row_kernels_impl.h"
