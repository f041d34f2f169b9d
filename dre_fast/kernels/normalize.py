"""Normalisation of residual encodings in Triton, forward and backward: intra L2, signed power, global L2, fused.

Per bag, V [K, D] -> y_k = V_k / ||V_k|| (intra), z = sign(y) |y|^p (power), out = z / ||z|| (l2), each where asked for;
the backward recomputes all of it from V. Formulas, eps and sources: :func:`dre_fast.reference.encode.normalize_residuals`
and :mod:`dre_fast.reference.normalize`.

A program holds whole codewords, so only the global norm (and in the backward the sum of g.z) crosses programs. How a bag
is read depends on its size alone (``Layout``):

- tile:  no global L2, or a bag that fits one program's registers. V is read once.
- bag:   one program takes the bag a block of codewords at a time, first for the sums, then to write. V is read twice, the
         second time from the L2 cache.
- split: a bag is spread over programs: one launch leaves the sums of every block, the next one adds them in order and
         writes. V is read twice.

In the backward the same holds for the gradient. The output is written once. No atomics: the same bits every time.
"""

# Kernel arguments are Triton's own kinds of values, which annotations other than constexpr cannot name.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from dre_fast.kernels import config
from dre_fast.kernels.case import Case

# POWER: no power, the square root, or any other exponent
_NONE: tl.constexpr = tl.constexpr(0)
_ROOT: tl.constexpr = tl.constexpr(1)


@triton.jit
def _raised(a, exponent):
    """a ** exponent for a > 0 and exponent > 0, to about one unit in the last place.

    The hardware's exp2(exponent * log2(a)) loses what log2(a) has before the point. Here a = 2^n m with m around 1; the
    exponent times n is exact in its leading part, and both functions are series on short intervals.
    """
    exponent = tl.full((), 0.0, tl.float32) + exponent
    small = a < 1e-30
    bits = tl.where(small, a * 18446744073709551616.0, a).to(tl.int32, bitcast=True)
    n = (bits - 0x3F3504F3) >> 23  # m in [sqrt(1/2), sqrt(2))
    m = (bits - (n << 23)).to(tl.float32, bitcast=True)
    n = tl.where(small, n - 64, n).to(tl.float32)
    s = (m - 1.0) / (m + 1.0)
    t = s * s
    log2 = s * (2.8853900817779268 * (1.0 + t * (1.0 / 3 + t * (1.0 / 5 + t * (1.0 / 7 + t * (1.0 / 9))))))
    leading = (exponent.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    exact = leading * n
    whole = tl.floor(exact + 0.5)
    rest = (exact - whole) + ((exponent - leading) * n + exponent * log2)
    more = tl.floor(rest + 0.5)
    rest -= more
    e = 1.0178086e-7
    e = 1.3215487e-6 + rest * e
    e = 1.5252734e-5 + rest * e
    e = 1.5403530e-4 + rest * e
    e = 1.3333558e-3 + rest * e
    e = 9.6181291e-3 + rest * e
    e = 5.5504109e-2 + rest * e
    e = 2.4022651e-1 + rest * e
    e = 6.9314718e-1 + rest * e
    e = 1.0 + rest * e
    # 2^(whole + more) in two factors: one alone would overflow before the product does
    scale = tl.minimum(tl.maximum(whole + more, -252.0), 254.0).to(tl.int32)
    first = ((scale >> 1) + 127) << 23
    second = ((scale - (scale >> 1)) + 127) << 23
    e = e * first.to(tl.float32, bitcast=True) * second.to(tl.float32, bitcast=True)
    return tl.where(a < float("inf"), e, a)


@triton.jit
def _root(a):
    """The square root of a > 0 and its reciprocal: a first guess and one correction, without sqrt_rn's slow path."""
    inverse = tl.rsqrt(a)
    r = a * inverse
    r = tl.where(a < float("inf"), tl.fma(tl.fma(-r, r, a), 0.5 * inverse, r), a)
    return r, inverse


@triton.jit
def _over(a, norm):
    """a / norm, correctly rounded or nearly, from the reciprocal of a norm that many entries share."""
    inverse = tl.broadcast_to(1.0 / norm, a.shape)
    q = a * inverse
    return tl.fma(tl.fma(-q, tl.broadcast_to(norm, a.shape), a), inverse, q)


@triton.jit
def _intra(v, eps):
    """Rows divided by their norms, and the two factors of their gradients: the first is 0 for rows that pass none.

    Two, because the inverse of a large norm on its own is too small a number to be accurate.
    """
    shrink = 1.0 / tl.maximum(tl.max(tl.abs(v), 1), 1.0)  # so that no square overflows
    w = v * shrink[:, None]
    square = tl.sum(w * w, 1)
    norm = tl.where(square <= eps * eps, eps, tl.sqrt_rn(square))
    return _over(w, norm[:, None]), tl.where(square > eps * eps, 1.0 / norm, 0.0), shrink


@triton.jit
def _power(y, exponent, eps, POWER: tl.constexpr):
    """sign(y) |y|^exponent and its derivative; both 0 where |y| <= eps."""
    usable = tl.abs(y) > eps
    a = tl.where(usable, tl.abs(y), 1.0)
    if POWER == _ROOT:
        r, inverse = _root(a)
        slope = 0.5 * inverse
    else:
        r = _raised(a, exponent)
        slope = exponent * r / a
    return tl.where(usable, tl.where(y < 0, -r, r), 0.0), tl.where(usable, slope, 0.0)


@triton.jit
def _local(v, exponent, eps, INTRA: tl.constexpr, POWER: tl.constexpr):
    """All that stays inside a codeword: y and z, the factors of the intra gradient, the slope of the power."""
    y = v
    step = tl.full((v.shape[0],), 1.0, tl.float32)
    shrink = step
    if INTRA:
        y, step, shrink = _intra(v, eps)
    z = y
    slope = y
    if POWER != _NONE:
        z, slope = _power(y, exponent, eps, POWER)
    return y, z, step, shrink, slope


@triton.jit
def _sums(z, g, INTRA: tl.constexpr):
    """A block's share of the global norm: its largest entry (1 at least), and over that the sums of z^2 and g.z.

    After intra normalisation no entry exceeds 1. ``g`` is anything in the forward, whose third sum goes unused.
    """
    largest = tl.full((), 1.0, tl.float32)
    if not INTRA:
        largest = tl.maximum(tl.max(tl.max(tl.abs(z), 1), 0), 1.0)
    w = z * (1.0 / largest)
    return largest, tl.sum(tl.sum(w * w, 1), 0), tl.sum(tl.sum(w * g, 1), 0)


@triton.jit
def _norm(square, eps):
    return tl.where(square <= eps * eps, eps, tl.sqrt_rn(square))


@triton.jit
def _result(y, z, step, shrink, slope, g, largest, square, along, eps, INTRA: tl.constexpr, POWER: tl.constexpr, L2: tl.constexpr,
            BACKWARD: tl.constexpr, WHOLE: tl.constexpr):  # fmt: skip
    """The normalised block or its gradient, from the sums over the bag. WHOLE: the block is all of the bag."""
    d = g
    if L2:
        norm = _norm(square, eps)
        u = _over(z * (1.0 / largest), norm)
        if BACKWARD:
            # of the whole bag at hand u is exact to the last bit where a product g.z is not: one entry passes exactly 0
            along = tl.sum(tl.sum(g * u, 1), 0) if WHOLE else along / norm
            d = tl.where(square > eps * eps, (g - along * u) * (1.0 / norm) * (1.0 / largest), 0.0)
        else:
            d = u
    elif not BACKWARD:
        d = z
    if BACKWARD:
        if POWER != _NONE:
            d = d * slope
        if INTRA:
            d = (d - tl.sum(d * y, 1)[:, None] * y) * step[:, None] * shrink[:, None]
            d = tl.where(step[:, None] > 0, d, 0.0)
    return d


@triton.jit
def _block(bag, k0, K: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, DP: tl.constexpr):
    """Places and mask of the codewords k0 .. k0 + ROWS - 1 of a bag."""
    k = k0 + tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    return bag * (K * D) + (k[:, None] * D + d[None, :]), (k[:, None] < K) & (d[None, :] < D)


@triton.jit
def _tile_kernel(v_ptr, g_ptr, sums_ptr, out_ptr, exponent, eps, K: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
                 DP: tl.constexpr, BLOCKS: tl.constexpr, BLOCKS_PADDED: tl.constexpr, INTRA: tl.constexpr,
                 POWER: tl.constexpr, L2: tl.constexpr, BACKWARD: tl.constexpr):  # fmt: skip
    """One of the BLOCKS blocks of a bag. The sums over the bag are its own (one block) or those of _sums_kernel."""
    program = tl.program_id(0).to(tl.int64)
    bag = program // BLOCKS
    place, inside = _block(bag, (program % BLOCKS).to(tl.int32) * ROWS, K, D, ROWS, DP)
    v = tl.load(v_ptr + place, mask=inside, other=0.0)
    g = v
    if BACKWARD:
        g = tl.load(g_ptr + place, mask=inside, other=0.0)
    y, z, step, shrink, slope = _local(v, exponent, eps, INTRA, POWER)
    largest = tl.full((), 1.0, tl.float32)
    square = largest
    along = largest
    if L2:
        if BLOCKS == 1:
            largest, square, along = _sums(z, g, INTRA)
        else:
            b = tl.arange(0, BLOCKS_PADDED)
            at = sums_ptr + (bag * BLOCKS + b) * 3
            each = tl.load(at, mask=b < BLOCKS, other=0.0)
            largest = tl.maximum(tl.max(each, 0), 1.0)
            ratio = each * (1.0 / largest)
            square = tl.sum(tl.load(at + 1, mask=b < BLOCKS, other=0.0) * ratio * ratio, 0)
            along = tl.sum(tl.load(at + 2, mask=b < BLOCKS, other=0.0) * ratio, 0)
    d = _result(
        y, z, step, shrink, slope, g, largest, square, along, eps, INTRA, POWER, L2, BACKWARD, BLOCKS == 1
    )
    tl.store(out_ptr + place, d, mask=inside)


@triton.jit
def _sums_kernel(v_ptr, g_ptr, sums_ptr, exponent, eps, K: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
                 DP: tl.constexpr, BLOCKS: tl.constexpr, INTRA: tl.constexpr, POWER: tl.constexpr,
                 BACKWARD: tl.constexpr):  # fmt: skip
    """The sums of one block, for _tile_kernel."""
    program = tl.program_id(0).to(tl.int64)
    place, inside = _block(program // BLOCKS, (program % BLOCKS).to(tl.int32) * ROWS, K, D, ROWS, DP)
    v = tl.load(v_ptr + place, mask=inside, other=0.0)
    g = v
    if BACKWARD:
        g = tl.load(g_ptr + place, mask=inside, other=0.0)
    _, z, _, _, _ = _local(v, exponent, eps, INTRA, POWER)
    largest, square, along = _sums(z, g, INTRA)
    tl.store(sums_ptr + program * 3, largest)
    tl.store(sums_ptr + program * 3 + 1, square)
    tl.store(sums_ptr + program * 3 + 2, along)


@triton.jit
def _bag_kernel(v_ptr, g_ptr, out_ptr, exponent, eps, K: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, DP: tl.constexpr,
                INTRA: tl.constexpr, POWER: tl.constexpr, BACKWARD: tl.constexpr):  # fmt: skip
    """A bag, ROWS codewords at a time: once for the sums, once to write."""
    bag = tl.program_id(0).to(tl.int64)
    largest = tl.full((), 1.0, tl.float32)
    square = tl.zeros((), tl.float32)
    along = tl.zeros((), tl.float32)
    for k0 in range(0, K, ROWS):
        place, inside = _block(bag, k0, K, D, ROWS, DP)
        v = tl.load(v_ptr + place, mask=inside, other=0.0)
        g = v
        if BACKWARD:
            g = tl.load(g_ptr + place, mask=inside, other=0.0)
        _, z, _, _, _ = _local(v, exponent, eps, INTRA, POWER)
        block_largest, block_square, block_along = _sums(z, g, INTRA)
        both = tl.maximum(largest, block_largest)
        before = largest / both
        now = block_largest / both
        square = square * before * before + block_square * now * now
        along = along * before + block_along * now
        largest = both
    for k0 in range(0, K, ROWS):
        place, inside = _block(bag, k0, K, D, ROWS, DP)
        v = tl.load(v_ptr + place, mask=inside, other=0.0)
        g = v
        if BACKWARD:
            g = tl.load(g_ptr + place, mask=inside, other=0.0)
        y, z, step, shrink, slope = _local(v, exponent, eps, INTRA, POWER)
        d = _result(
            y, z, step, shrink, slope, g, largest, square, along, eps, INTRA, POWER, True, BACKWARD, False
        )
        tl.store(out_ptr + place, d, mask=inside)


INTERPRETED = not isinstance(_tile_kernel, triton.JITFunction)

# Entries that do not spill: of a bag one program of 16 warps holds, of a block of a bag it reads twice (8 warps), of a
# block of a bag that is spread over programs (8 warps).
_HELD, _BLOCK, _BLOCK_SPLIT = 32_768, 8_192, 8_192
# A bag that one program reads twice has at most these bytes, so that the bags of all programs running at once (one or two
# on each of up to 148 multiprocessors, half of them past their first pass) stay in an L2 cache of 40 MB or more.
_BAG_BYTES = 1 << 18


class Layout(NamedTuple):
    """How one bag is read: ``kind`` "tile", "bag" or "split", codewords and padded D of a block, blocks, warps."""

    kind: str
    rows: int
    wide: int
    blocks: int
    warps: int


def layout(codewords: int, dim: int, power: bool, l2: bool, backward: bool) -> Layout:
    """The layout of bags [codewords, dim]: see the top of this file."""
    wide = max(triton.next_power_of_2(dim), 16)
    padded = triton.next_power_of_2(codewords)
    if not l2:
        rows = min(padded, 4096 // wide)
        return Layout("tile", rows, wide, triton.cdiv(codewords, rows), 4)
    # rows that do not start at 16 bytes take twice the registers, for addresses
    entries = padded * wide * (1 if dim % 4 == 0 else 2)
    if entries * (4 if backward else 2 if power else 1) <= _HELD:
        return Layout("tile", padded, wide, 1, 16 if entries > 16_384 else 8 if entries > 4_096 else 4)
    if codewords * dim * (8 if backward else 4) <= _BAG_BYTES:
        rows = min(_BLOCK // (entries // padded) // ((4 if power else 2) if backward else 1), padded)
        return Layout("bag", rows, wide, triton.cdiv(codewords, rows), 8)
    rows = min(_BLOCK_SPLIT // wide, padded)
    return Layout("split", rows, wide, triton.cdiv(codewords, rows), 8)


def normalize_residuals(
    V: torch.Tensor, intra: bool, power: bool, l2: bool, exponent: float, eps: float
) -> torch.Tensor:
    """Normalised residuals; deterministic, no host synchronisation.

    Args:
        V: fp32 [B, K, D], K up to 1024, D up to 2048.
        intra: L2 of each codeword.
        power: sign(y) |y|^exponent, 0 where |y| <= eps.
        l2: L2 of all K D entries of a bag.
        exponent: > 0.
        eps: > 0; norms at or below it are taken as eps.

    Returns:
        fp32 [B, K, D].

    Raises:
        ValueError: wrong shape, dtype, device, exponent or eps.

    Formulas and sources: :func:`dre_fast.reference.encode.normalize_residuals`.
    """
    return _launch(V, None, intra, power, l2, exponent, eps)


def normalize_residuals_backward(
    grad: torch.Tensor, V: torch.Tensor, intra: bool, power: bool, l2: bool, exponent: float, eps: float
) -> torch.Tensor:
    """Gradient of :func:`normalize_residuals`: of its result, fp32 [B, K, D], to that of V, fp32 [B, K, D].

    Norms at or below eps pass no gradient, nor do entries at or below eps through the power. Raises ValueError as the
    forward does. Formulas: :func:`dre_fast.reference.normalize.normalize_residuals_backward`.
    """
    return _launch(V, grad, intra, power, l2, exponent, eps)


def _launch(
    V: torch.Tensor,
    grad: torch.Tensor | None,
    intra: bool,
    power: bool,
    l2: bool,
    exponent: float,
    eps: float,
) -> torch.Tensor:
    _check(V, grad, exponent, eps)
    bags, codewords, dim = V.shape
    backward = grad is not None
    out = V.new_empty(V.shape)
    if bags == 0:
        return out
    how = layout(codewords, dim, power, l2, backward)
    V, grad = V.contiguous(), grad if grad is None else grad.contiguous()
    sums = V.new_empty((bags, how.blocks, 3)) if how.kind == "split" else None
    floats = (float(exponent), float(eps))
    with torch.cuda.device_of(V):
        for kernel, constants in _launches(codewords, dim, how, intra, power, l2, exponent, backward):
            tensors = {"v_ptr": V, "g_ptr": grad, "sums_ptr": sums, "out_ptr": out}
            pointers = [tensors[name] for name in kernel.arg_names if name in tensors]
            programs = bags if kernel is _bag_kernel else bags * how.blocks
            kernel[(programs,)](*pointers, *floats, **constants, num_warps=how.warps)
    return out


def _launches(
    K: int, D: int, how: Layout, intra: bool, power: bool, l2: bool, exponent: float, backward: bool
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """(kernel, constexpr arguments) of each launch."""
    steps = {"INTRA": intra, "POWER": 0 if not power else 1 if exponent == 0.5 else 2, "BACKWARD": backward}
    size = {"K": K, "D": D, "ROWS": how.rows, "DP": how.wide, **steps}
    if how.kind == "bag":
        yield _bag_kernel, size
        return
    if how.kind == "split":
        yield _sums_kernel, {**size, "BLOCKS": how.blocks}
    blocks = {"BLOCKS": how.blocks, "BLOCKS_PADDED": triton.next_power_of_2(how.blocks)}
    yield _tile_kernel, {**size, **blocks, "L2": l2}


def _check(V: torch.Tensor, grad: torch.Tensor | None, exponent: float, eps: float) -> None:
    if V.dim() != 3 or V.dtype != torch.float32:
        raise ValueError(f"residuals must be float32 [B, K, D], not {V.dtype} {list(V.shape)}")
    config.check(V.dtype, V.shape[1], V.shape[2])
    if grad is not None and (grad.shape != V.shape or grad.dtype != V.dtype or grad.device != V.device):
        raise ValueError(
            f"the gradient must be like the residuals, not {grad.dtype} {list(grad.shape)} on {grad.device}"
        )
    if not (exponent > 0 and eps > 0):
        raise ValueError(f"exponent and eps must be above 0, not {exponent} and {eps}")
    if V.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"the Triton kernels need a CUDA device, not {V.device} (TRITON_INTERPRET=1 interprets them)"
        )


_STEPS = {
    "intra l2": (True, False, True, 0.5),
    "intra root l2": (True, True, True, 0.5),
    "power l2": (False, True, True, 0.3),
    "intra": (True, False, False, 0.5),
    "intra power": (True, True, False, 0.3),
}
_SIZES = ((64, 384), (64, 768), (64, 1024), (64, 256), (16, 64), (7, 33), (63, 255), (63, 257), (60, 510), (128, 2048),
          (1000, 2047), (1024, 1))  # fmt: skip
_ALL_STEPS = ((64, 384), (64, 1024), (64, 256), (63, 257), (1000, 2047))


def cases(arch: config.Arch) -> Iterator[Case]:
    """Every kernel for steps and sizes that reach every layout, forward and backward."""
    for codewords, dim in _SIZES:
        for label, (intra, power, l2, exponent) in _STEPS.items():
            if label != "intra l2" and (codewords, dim) not in _ALL_STEPS:
                continue
            for backward in (False, True):
                how = layout(codewords, dim, power, l2, backward)
                for kernel, constants in _launches(codewords, dim, how, intra, power, l2, exponent, backward):
                    yield _case(arch, kernel, constants, how, f"{label}{' backward' * backward}")


def _case(arch: config.Arch, kernel: Any, constants: dict[str, Any], how: Layout, steps: str) -> Case:
    absent = {"g_ptr": None} if not constants["BACKWARD"] else {}
    if kernel is _tile_kernel and how.kind != "split":
        absent["sums_ptr"] = None
    constants = {**constants, **absent}
    names = [name for name in kernel.arg_names if name not in constants]
    types = tuple((name, "*fp32" if name.endswith("_ptr") else "fp32") for name in names)
    label = f"{kernel.__name__.strip('_').removesuffix('_kernel')} {steps}"
    size = (constants["K"], constants["D"])
    return Case(
        arch.capability, kernel, label, "fp32", *size, types, tuple(constants.items()), how.warps, arch.shared,
        wide=size[1] % 16 == 0,
    )  # fmt: skip
