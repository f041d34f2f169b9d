"""Small and single runs of every kernel, for other programs to watch: compute-sanitizer and ncu."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks import retrieval, test_encode, test_soft
from benchmarks.gpu_bank import filled
from benchmarks.gpu_sections import device_of
from benchmarks.registry import GPU_ENCODE, GPU_RETRIEVAL, GPU_SOFT, SMALL_RETRIEVAL, make

EPS = 1e-12


def sanitize() -> None:
    """Every Triton kernel and the bank's CUDA ops at odd sizes, every source of rows; interpreted on a CPU."""
    device = device_of(dry=True)
    on_gpu = device == "cuda"
    for dtype in (torch.bfloat16, torch.float32) if on_gpu else (torch.float16,):
        for dim, words in ((64, 16), (33, 7), (520, 9)) if on_gpu else ((64, 16), (33, 7)):
            _rows(700 if on_gpu else 150, dim, words, dtype, device)
    for stored in (torch.int8, torch.float8_e4m3fn) if on_gpu else (torch.int8,):
        _stored_rows(300 if on_gpu else 90, 40, 6, stored, device)
    _others(device)
    for dtype in (torch.float32, torch.bfloat16):
        _contrast(40, 700 if on_gpu else 150, 100 if on_gpu else 33, dtype, device)
    bank = filled(3, 100, 32, 8, "int8", device)
    bank.rebuild()
    ids, tiles = torch.tensor([2, 0], device=device), torch.tensor([[1, 5, -1], [0, 99, 7]], device=device)
    bank.encode(ids, tiles, normalize(torch.randn(2, 3, 32, device=device), dim=2), memory="full")
    bank.read(ids.repeat_interleave(3), tiles.reshape(-1))
    if on_gpu:
        given = retrieval.fill(SMALL_RETRIEVAL[0], device)
        retrieval.bank_encode(given)
        retrieval.op(given)
        torch.cuda.synchronize()


def _rows(count: int, dim: int, words: int, dtype: torch.dtype, device: str) -> None:
    """Dense and indexed rows, hard and soft, forward and backward; bags that are empty or end before the rows do."""
    from dre_fast import kernels

    codebook = normalize(torch.randn(words, dim, device=device), dim=1)
    x = torch.randn(count, dim, device=device).to(dtype)
    bounds = torch.tensor([0, count // 3, count // 3, count - 10], device=device)
    index = torch.randint(-1, count, (count,), device=device)
    scale = torch.rand(words, device=device) + 1
    weight, bias = torch.randn(words, dim, device=device), torch.randn(words, device=device)
    for picked, unit in ((None, False), (index, True)):
        V, _, codes, _ = kernels.hard_encode(x, codebook, bounds, index=picked, unit=unit, distances=unit)
        grad = torch.randn_like(V)
        kernels.hard_encode_backward(grad, codes, bounds, x=x if unit else None, index=picked, unit=unit)
        for by in ((scale, None, None), (None, weight, bias)):
            V, mass = kernels.soft_encode(x, codebook, bounds, *by, index=picked, unit=unit)
            grad_mass = torch.randn_like(mass)
            kernels.soft_encode_backward(
                grad, grad_mass, x, codebook, bounds, mass, *by, index=picked, unit=unit
            )


def _stored_rows(count: int, dim: int, words: int, dtype: torch.dtype, device: str) -> None:
    """Rows of a bank, padded and with a scale each: codes found, codes known, soft."""
    from dre_fast import kernels

    rows = normalize(torch.randn(count, dim, device=device), dim=1)
    largest = 127.0 if dtype == torch.int8 else 448.0
    scale = rows.abs().amax(1) / largest
    payload = torch.zeros(count, -(-dim // 16) * 16, device=device, dtype=dtype)
    scaled = rows / scale[:, None]
    payload[:, :dim] = (scaled.round() if dtype == torch.int8 else scaled).to(dtype)
    codebook = normalize(torch.randn(words, dim, device=device), dim=1)
    index = torch.randint(-1, count, (count,), device=device)
    bounds = torch.tensor([0, count // 2, count], device=device)
    _, _, codes, _ = kernels.hard_encode(payload, codebook, bounds, index=index, row_scale=scale, unit=True)
    known = torch.zeros(count, dtype=torch.int16, device=device)
    kept = index >= 0
    known[index[kept]] = codes[kept].to(torch.int16)
    kernels.hard_encode(payload, codebook, bounds, index=index, row_scale=scale, row_codes=known)
    assignment = torch.rand(words, device=device) + 1
    kernels.soft_encode(payload, codebook, bounds, assignment, None, None, index=index, row_scale=scale)


def _others(device: str) -> None:
    """Normalisation of V forward and backward, and permutation positions."""
    from dre_fast import kernels

    V = torch.randn(3, 7, 33, device=device)
    V[1] = 0
    for intra, power, l2 in ((True, False, True), (True, True, True), (False, False, True)):
        kernels.normalize_residuals(V, intra, power, l2, 0.5, EPS)
        kernels.normalize_residuals_backward(torch.randn_like(V), V, intra, power, l2, 0.5, EPS)
    lengths = torch.tensor([1, 40, 1000], device=device)
    slides, cycle = torch.arange(3, device=device), torch.tensor([0, 3, 9], device=device)
    kernels.bank_tiles(lengths, slides, 4, 16, 4, cycle, 7)


def _contrast(count: int, reports: int, dim: int, dtype: torch.dtype, device: str) -> None:
    """Both losses of slides against all reports, forward and backward."""
    from dre_fast import kernels

    x = normalize(torch.randn(count, dim, device=device), dim=1)
    r = normalize(torch.randn(reports, dim, device=device), dim=1).to(dtype)
    cases = torch.arange(count, device=device), torch.arange(reports, device=device)
    scale, grad = torch.tensor(10.0, device=device), torch.ones(count, device=device)
    _, lse, positives = kernels.info_nce_rows(x, r, *cases, scale)
    kernels.info_nce_rows_backward(grad, x, r, *cases, scale, lse, positives)
    kernels.siglip_rows(x, r, *cases, scale, -scale)
    kernels.siglip_rows_backward(grad, x, r, *cases, scale, -scale)


def profile() -> None:
    """One launch each of what P1, P2, P3 and P4 time, between cudaProfilerStart and Stop. Needs a GPU."""
    device = device_of(dry=False)
    for shape in (shape for shape in GPU_ENCODE if shape.id in ("P1", "P2")):
        _once(partial(test_encode.ours, *make(shape, device)))
    for assignment in test_soft.ASSIGNMENTS:
        given = test_soft.inputs(GPU_SOFT[0], device, assignment)
        _once(partial(test_soft.step, given, "dre_fast"))
    stored = retrieval.fill(GPU_RETRIEVAL[0], device)
    _once(partial(retrieval.op, stored, rows=stored.rows))


def _once(run: partial[Tensor] | partial[tuple[Tensor, ...]]) -> None:
    run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    run()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()
