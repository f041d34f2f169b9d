// Row kernels for any processor.
#define ROW_KERNELS row_kernels_default
#define ROW_KERNELS_NAME "default"
#include "row_kernels_impl.h"
