#pragma once

#include "../common.h"

namespace dre_fast {

void bank_write_cpu(const BankWrite& w);

// The instruction set the row kernels run with: "default", "avx2" or "avx512".
const char* cpu_level();

}  // namespace dre_fast
