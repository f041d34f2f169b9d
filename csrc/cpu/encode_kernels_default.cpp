// Encode kernels for any processor (the compiler's own flags); flags: setup.py.
#define ENCODE_KERNELS encode_kernels_default
#define ENCODE_KERNELS_NAME "default"
#include "encode_kernels_impl.h"
