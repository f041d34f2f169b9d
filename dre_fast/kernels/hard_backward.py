"""Backward of hard residual encoding in Triton: every row gets the gradient of the codeword it went to.

    d_i = grad[bag_i, code_i], 0 where code_i = -1;   of unit rows u = x / ||x||:   d_i = (g - (g.u) u) / ||x||

A gather of rows: codes and offsets are read, one row of ``grad`` comes in (from the L2 cache: grad is small) and one
goes out. Unit rows read x once more. The bag of a row is found by bisection of the offsets, so nothing waits for the
host and a block of rows may span any number of bags.
"""

# Kernel arguments are Triton's own kinds of values, which annotations other than constexpr cannot name.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from dre_fast.kernels import config
from dre_fast.kernels.case import Case

_RUN_TIME = ["M", "B", "R", "steps"]
_ELEMENTS = 2048  # of the rows one program holds at a time: 16 a thread, many programs a multiprocessor
_WARPS = 4
_COLUMNS = 256  # a plain gather takes rows this many columns at a time


@triton.jit
def _gradient_rows(codes_ptr, cu_ptr, M, B, steps, K: tl.constexpr, ROWS: tl.constexpr):
    """Row numbers of this program's ROWS rows, the row of grad [B * K, D] each takes, and whether it takes one."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    code = tl.load(codes_ptr + i, mask=i < M, other=-1)
    # the bag of row i: how many of the bag ends cu[1 .. B] are at most i
    low = tl.zeros((ROWS,), tl.int64)
    high = low + B
    for _ in range(steps):
        middle = (low + high) // 2
        going = low < high
        past = tl.load(cu_ptr + 1 + middle, mask=going, other=0).to(tl.int64) <= i
        low = tl.where(going & past, middle + 1, low)
        high = tl.where(going & (past == 0), middle, high)
    takes = (code >= 0) & (code < K) & (low < B)
    return i, low * K + code, takes


@triton.jit(do_not_specialize=_RUN_TIME)
def _gather_kernel(grad_ptr, codes_ptr, cu_ptr, out_ptr, M, B, steps, K: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
                   DT: tl.constexpr):  # fmt: skip
    """ROWS rows, DT columns at a time."""
    i, source, takes = _gradient_rows(codes_ptr, cu_ptr, M, B, steps, K, ROWS)
    d = tl.arange(0, DT)
    from_row = grad_ptr + (source * D)[:, None] + d[None, :]
    to_row = out_ptr + (i * D)[:, None] + d[None, :]
    for d0 in range(0, D, DT):
        inside = (d + d0 < D)[None, :]
        g = tl.load(from_row + d0, mask=takes[:, None] & inside, other=0.0)
        tl.store(to_row + d0, g, mask=(i < M)[:, None] & inside)


@triton.jit(do_not_specialize=_RUN_TIME)
def _unit_kernel(grad_ptr, codes_ptr, cu_ptr, x_ptr, index_ptr, out_ptr, M, B, R, steps, x_stride, K: tl.constexpr,
                 D: tl.constexpr, ROWS: tl.constexpr, DP: tl.constexpr):  # fmt: skip
    """ROWS whole rows of unit rows: gradient and row meet in registers. R rows of x; index_ptr may be None."""
    i, source, takes = _gradient_rows(codes_ptr, cu_ptr, M, B, steps, K, ROWS)
    if index_ptr is None:
        row = i
    else:
        row = tl.load(index_ptr + i, mask=takes, other=-1)
    takes = takes & (row >= 0) & (row < R)
    d = tl.arange(0, DP)
    inside = takes[:, None] & (d < D)[None, :]
    g = tl.load(grad_ptr + (source * D)[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + (row * x_stride)[:, None] + d[None, :], mask=inside, other=0.0).to(tl.float32)
    # Rows of large values are shrunk before anything is squared; how exactly does not matter, u has norm one anyway.
    shrink = 1.0 / tl.maximum(tl.max(tl.abs(x), 1), 1.0)
    x = x * shrink[:, None]
    square = tl.sum(x * x, 1)
    usable = (square > 1e-24) & (D > 1)  # not for NaN; one column keeps its sign only, of gradient 0
    # One division a row, not one an element: a division is a call with registers to save around it.
    inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.where(usable, square, 1.0)))
    u = x * inverse[:, None]
    along = tl.sum(g * u, 1)
    d_x = (g - along[:, None] * u) * (shrink * inverse)[:, None]
    d_x = tl.where(usable[:, None], d_x, 0.0)
    out = out_ptr + (i * D)[:, None] + d[None, :]
    tl.store(out, d_x.to(out_ptr.dtype.element_ty), mask=(i < M)[:, None] & (d < D)[None, :])


INTERPRETED = not isinstance(_gather_kernel, triton.JITFunction)


def hard_encode_backward(
    grad: torch.Tensor,
    codes: torch.Tensor,
    cu_seqlens: torch.Tensor,
    x: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    unit: bool = False,
) -> torch.Tensor:
    """Gradient of the M rows an encoding read, from that of V: a gather, with ``unit`` through the normalisation.

    Deterministic, no host synchronisation. Formula: top of this file.

    Args:
        grad: [B, K, D], fp32, fp16 or bf16.
        codes: int64 [M], codeword of each row; -1 gives a zero gradient.
        cu_seqlens: int32 or int64 [B + 1], row offsets of the bags, ascending from 0. Its values are not checked;
            rows past the last offset get zeros.
        x: [R, P >= D] the rows, fp32, fp16 or bf16, only needed with ``unit``. Rows of norm at most
            1e-12 get zeros, and so do rows with NaN or Inf.
        index: int64 [M], the row of x that was read, -1 = none; only looked at with ``unit``.
        unit: the rows were divided by their norm as they were read.

    Returns:
        [M, D] in the dtype of ``grad``; with ``unit`` in that of x, whose norm divides a gradient that need not lie
        in its range.

    Raises:
        ValueError: wrong shape, dtype or device; ``unit`` without x.
    """
    _check(grad, codes, cu_seqlens, x, index, unit)
    bags, words, dim = grad.shape
    rows, dtype = codes.shape[0], x.dtype if unit and x is not None else grad.dtype
    out = grad.new_empty((rows, dim), dtype=dtype)
    if rows == 0 or bags == 0:
        return out.zero_()
    if INTERPRETED and torch.bfloat16 in (dtype, grad.dtype):  # the interpreter misreads bf16, and truncates
        grad, out = grad.float(), out.float()
    sizes = (rows, bags)
    steps = bags.bit_length()
    with torch.cuda.device_of(grad):
        codes, cu_seqlens, grad = codes.contiguous(), cu_seqlens.contiguous(), grad.contiguous()
        if not unit:
            high, wide = _gather_tile(dim)
            _gather_kernel[(triton.cdiv(rows, high),)](
                grad, codes, cu_seqlens, out, *sizes, steps, words, dim, high, wide, num_warps=_WARPS
            )
            return out.to(dtype)
        assert x is not None
        if dim > 1 and x.stride(1) != 1:
            x = x.contiguous()
        if INTERPRETED and x.dtype == torch.bfloat16:
            x = x.float()
        high, wide = _unit_tile(dim)
        _unit_kernel[(triton.cdiv(rows, high),)](
            grad, codes, cu_seqlens, x, None if index is None else index.contiguous(), out, *sizes, x.shape[0], steps,
            x.stride(0), words, dim, high, wide, num_warps=_WARPS,
        )  # fmt: skip
    return out.to(dtype)


def _gather_tile(dim: int) -> tuple[int, int]:
    """(rows, columns) a program of the plain gather takes at a time."""
    wide = min(max(triton.next_power_of_2(dim), 16), _COLUMNS)
    return min(_ELEMENTS // wide, 64), wide


def _unit_tile(dim: int) -> tuple[int, int]:
    """(rows, columns) of whole rows a program holds."""
    wide = max(triton.next_power_of_2(dim), 16)
    return min(_ELEMENTS // wide, 64), wide


def _check(
    grad: torch.Tensor,
    codes: torch.Tensor,
    cu_seqlens: torch.Tensor,
    x: torch.Tensor | None,
    index: torch.Tensor | None,
    unit: bool,
) -> None:
    if grad.dim() != 3 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] != grad.shape[0] + 1:
        raise ValueError(
            "grad must be [B, K, D] and cu_seqlens [B + 1]; "
            f"got {list(grad.shape)} and {list(cu_seqlens.shape)}"
        )
    config.check(grad.dtype, grad.shape[1], grad.shape[2])
    if codes.dtype != torch.int64 or codes.dim() != 1:
        raise ValueError(f"codes must be int64 [M], not {codes.dtype} {list(codes.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64, not {cu_seqlens.dtype}")
    if unit:
        if x is None or x.dim() != 2 or x.shape[1] < grad.shape[2]:
            shape = None if x is None else list(x.shape)
            raise ValueError(f"unit rows need x [R, {grad.shape[2]} or more], not {shape}")
        config.check(x.dtype, grad.shape[1], grad.shape[2])
        if index is None and x.shape[0] != codes.shape[0]:
            raise ValueError(f"x has {x.shape[0]} rows for {codes.shape[0]} codes and no index")
        if index is not None and (index.dtype != torch.int64 or index.shape != codes.shape):
            raise ValueError(f"index must be int64 [M], not {index.dtype} {list(index.shape)}")
    used = (codes, cu_seqlens, *((x, index) if unit else ()))
    if any(t is not None and t.device != grad.device for t in used):
        raise ValueError("grad, codes, cu_seqlens, x and index must share a device")
    if grad.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"the Triton kernels need a CUDA device, not {grad.device} (TRITON_INTERPRET=1 interprets them)"
        )


_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_DIMS = (1, 17, 64, 127, 192, 384, 513, 768, 1024, 2047, 2048)


def cases(arch: config.Arch) -> Iterator[Case]:
    """Both kernels at sizes that fill the tiles and odd ones; unit rows take an fp32 gradient."""
    for dtype in config.DTYPES:
        for dim in _DIMS if dtype == torch.bfloat16 else (384, 1024, 2047):
            yield _case(arch, _TYPES[dtype], dim, "gather")
            yield _case(arch, _TYPES[dtype], dim, "gather unit")
            if dim == 384:
                yield _case(arch, _TYPES[dtype], dim, "gather unit index")


def _case(arch: config.Arch, dtype: str, dim: int, label: str) -> Case:
    words = 64
    unit = label != "gather"
    high, wide = _unit_tile(dim) if unit else _gather_tile(dim)
    constants: dict[str, int | None] = {"K": words, "D": dim, "ROWS": high, "DP" if unit else "DT": wide}
    kernel = _unit_kernel if unit else _gather_kernel
    if label == "gather unit":
        constants["index_ptr"] = None
    pointers = {"grad_ptr": "fp32" if unit else dtype, "out_ptr": dtype, "x_ptr": dtype}
    types = tuple(
        (name, "*" + pointers.get(name, "i64") if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
        if name not in constants
    )
    return Case(
        arch.capability, kernel, label, dtype, words, dim, types, tuple(constants.items()), _WARPS, arch.shared,
        reads="1" if unit else "-", wide=dim % 16 == 0,
    )  # fmt: skip
