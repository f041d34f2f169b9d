// Soft kernels for any processor (the compiler's own flags); flags: setup.py.
#define SOFT_KERNELS soft_kernels_default
#include "soft_kernels_impl.h"
