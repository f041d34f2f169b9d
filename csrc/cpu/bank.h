#pragma once

#include "../common.h"
#include "row_kernels.h"

namespace dre_fast {

void bank_write_cpu(const BankWrite& w);

// V [bags, codewords, dim], of doubles or floats; counts [bags, codewords].
void bank_rest_cpu(const BankRest& r, double* V, int64_t* counts);
void bank_rest_cpu(const BankRest& r, float* V, int64_t* counts);

// out [rows, dim].
void bank_read_cpu(const BankRead& r, float* out);

// tiles [bags, count].
void bank_tiles_cpu(const BankTiles& t, int64_t* tiles);

// The row kernels of this processor.
const RowKernels& row_kernels_here();

// The instruction set the row kernels run with: "default", "avx2" or "avx512".
const char* cpu_level();

}  // namespace dre_fast
