// Which row kernels run here.

#include "row_kernels.h"

#include <cstdlib>
#include <string>

#include "bank.h"

namespace dre_fast {
namespace {

const RowKernels& choose_row_kernels() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  // Lowers the level, for tests and for finding faults: a level that the processor lacks is never chosen.
  const char* asked = std::getenv("DRE_FAST_CPU");
  const std::string level = asked ? asked : "avx512";
  if (avx512 && level == "avx512") return row_kernels_avx512;
  if (avx2 && level != "default") return row_kernels_avx2;
#endif
  return row_kernels_default;
}

}  // namespace

const RowKernels& row_kernels_here() {
  static const RowKernels& chosen = choose_row_kernels();
  return chosen;
}

const char* cpu_level() { return row_kernels_here().name; }

}  // namespace dre_fast
