// Schemas of the compiled ops and their CPU implementations. The CUDA library adds its own.

#include <string>
#include <tuple>

#include "common.h"
#include "cpu/bank.h"
#include "cpu/encode.h"

namespace dre_fast {

void bank_write(
    const Tensor& payload, const Tensor& scale, const Tensor& code, const Tensor& age, const Tensor& drift,
    const Tensor& sums, const Tensor& counts, const Tensor& codebook, const Tensor& start,
    const Tensor& rows_slide, const Tensor& rows_tile, const Tensor& features, int64_t step) {
  bank_write_cpu(checked_write(
      payload, scale, code, age, drift, sums, counts, codebook, start, rows_slide, rows_tile, features, step));
}

std::tuple<Tensor, Tensor> bank_rest(
    const Tensor& payload, const Tensor& scale, const Tensor& code, const Tensor& sums, const Tensor& counts,
    const Tensor& codebook, const Tensor& start, const Tensor& slides, const Tensor& tiles, bool accurate) {
  const BankRest r = checked_rest(payload, scale, code, sums, counts, codebook, start, slides, tiles);
  const Tensor V = torch::stable::new_empty(
      codebook, {r.bags, r.codewords, r.dim}, accurate ? ScalarType::Double : ScalarType::Float);
  const Tensor n = torch::stable::new_empty(counts, {r.bags, r.codewords});
  auto* rows = static_cast<int64_t*>(n.mutable_data_ptr());
  if (accurate)
    bank_rest_cpu(r, static_cast<double*>(V.mutable_data_ptr()), rows);
  else
    bank_rest_cpu(r, static_cast<float*>(V.mutable_data_ptr()), rows);
  return {V, n};
}

Tensor bank_read(const Tensor& payload, const Tensor& scale, const Tensor& rows, int64_t dim) {
  const BankRead r = checked_read(payload, scale, rows, dim);
  const Tensor out = torch::stable::new_empty(scale, {r.rows, dim}, ScalarType::Float);
  bank_read_cpu(r, static_cast<float*>(out.mutable_data_ptr()));
  return out;
}

Tensor bank_tiles(
    const Tensor& lengths, const Tensor& slides, int64_t first, int64_t count, int64_t m, const Tensor& cycle,
    int64_t seed) {
  const BankTiles t = checked_tiles(lengths, slides, first, count, m, cycle, seed);
  const Tensor tiles = torch::stable::new_empty(slides, {t.bags, count});
  bank_tiles_cpu(t, static_cast<int64_t*>(tiles.mutable_data_ptr()));
  return tiles;
}

std::string cpu_level_op() { return cpu_level(); }

}  // namespace dre_fast

STABLE_TORCH_LIBRARY(dre_fast_native, m) {
  m.def(
      "bank_write(Tensor(a!) payload, Tensor(b!) scale, Tensor(c!) code, Tensor(d!) age, Tensor(e!) drift, "
      "Tensor(f!) sums, Tensor(g!) counts, Tensor codebook, Tensor start, Tensor rows_slide, Tensor rows_tile, "
      "Tensor features, int step) -> ()");
  m.def(
      "bank_rest(Tensor payload, Tensor scale, Tensor code, Tensor sums, Tensor counts, Tensor codebook, Tensor start, "
      "Tensor slides, Tensor tiles, bool accurate) -> (Tensor, Tensor)");
  m.def("bank_read(Tensor payload, Tensor scale, Tensor rows, int dim) -> Tensor");
  m.def(
      "bank_tiles(Tensor lengths, Tensor slides, int first, int count, int m, Tensor cycle, int seed) -> Tensor");
  m.def(
      "hard_encode(Tensor x, Tensor codebook, Tensor cu_seqlens, Tensor? index=None, Tensor? row_scale=None, "
      "Tensor? row_codes=None, bool unit=False, bool distances=False) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "hard_encode_backward(Tensor grad, Tensor codes, Tensor cu_seqlens, Tensor? x=None, Tensor? index=None, "
      "bool unit=False) -> Tensor");
  m.def(
      "soft_encode(Tensor x, Tensor codebook, Tensor cu_seqlens, Tensor? scale, Tensor? weight, Tensor? bias, "
      "Tensor? index=None, Tensor? row_scale=None, bool unit=False) -> (Tensor, Tensor)");
  m.def(
      "soft_encode_backward(Tensor grad, Tensor grad_mass, Tensor x, Tensor codebook, Tensor cu_seqlens, Tensor mass, "
      "Tensor? scale, Tensor? weight, Tensor? bias, Tensor? index=None, Tensor? row_scale=None, bool unit=False, "
      "bool rows=True) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("cpu_level() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(dre_fast_native, CPU, m) {
  m.impl("bank_write", TORCH_BOX(&dre_fast::bank_write));
  m.impl("bank_rest", TORCH_BOX(&dre_fast::bank_rest));
  m.impl("bank_read", TORCH_BOX(&dre_fast::bank_read));
  m.impl("bank_tiles", TORCH_BOX(&dre_fast::bank_tiles));
  m.impl("hard_encode", TORCH_BOX(&dre_fast::hard_encode_cpu));
  m.impl("hard_encode_backward", TORCH_BOX(&dre_fast::hard_encode_backward_cpu));
  m.impl("soft_encode", TORCH_BOX(&dre_fast::soft_encode_cpu));
  m.impl("soft_encode_backward", TORCH_BOX(&dre_fast::soft_encode_backward_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(dre_fast_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_level", TORCH_BOX(&dre_fast::cpu_level_op));
}
