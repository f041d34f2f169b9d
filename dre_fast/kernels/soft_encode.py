"""Soft residual encoding of ragged bags in Triton: Deep-TEN and NetVLAD assignments, sums of weighted residuals.

    Deep-TEN (Zhang et al. 2017, eq. 3 and 4)              a_i = softmax_k(-s_k ||x~_i - c_k||^2)
    NetVLAD (Arandjelovic et al. 2016, eq. 3 and 4)        a_i = softmax_k(w_k.x~_i + b_k)
    V_k = sum over rows i of the bag of a_ik (x~_i - c_k)  mass_k = sum of a_ik

Rows are taken a chunk at a time. Of one chunk the distances or logits, then the assignments, lie in scratch of a bounded
size (2^22 numbers of 4 bytes each, whatever N and K) which stays in the L2 cache; so do the chunk's
rows, which are asked for twice. N x K is never in memory. The kernels are in ``soft_kernels``, tiles in ``soft_config``.

Exactness. fp32 rows are computed in fp32 throughout. Other rows go through the matrix units as they are (8-bit rows as
fp16, which holds them), accumulating in fp32: against the codewords (or w) in two parts, which keep 2^-18 (bf16) or
2^-22 of their size; then against the assignments (times the weight of scaled or normalised rows) in two parts, which keep
2^-17 or 2^-22 of them. The mass is that of the assignments as they were kept, so what is lost of one weighs x~_i - c_k.

A row that holds NaN makes V and mass of its own bag NaN; other bags are untouched.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import triton

from dre_fast.kernels import config, soft_config
from dre_fast.kernels.case import Case
from dre_fast.kernels.config import Launch
from dre_fast.kernels.inputs import check_inputs
from dre_fast.kernels.soft_config import SoftPlan
from dre_fast.kernels.soft_kernels import (
    assign_kernel,
    gather_kernel,
    parts_kernel,
    products_kernel,
    sums_kernel,
)

INTERPRETED = not isinstance(sums_kernel, triton.JITFunction)
WARPS = 8  # of the kernels that take a softmax
_GATHER = {"BLOCK": 256, "AT_ONCE": 16}
_PARTS = 4096  # numbers that one program prepares as operands


@dataclass(frozen=True)
class Rows:
    """The M rows an encoding reads, as the kernels want them: 8-bit e4m3 as bytes, unit stride within a row."""

    x: torch.Tensor
    index: torch.Tensor | None
    scale: torch.Tensor | None
    cu_seqlens: torch.Tensor
    unit: bool

    def __len__(self) -> int:
        return self.x.shape[0] if self.index is None else self.index.shape[0]

    @property
    def pointers(self) -> tuple[torch.Tensor, int, torch.Tensor | None, torch.Tensor | None]:
        """Leading arguments of the kernels."""
        return self.x, self.x.stride(0), self.index, self.scale

    def chunks(self, size: int) -> Iterator[tuple[int, Rows]]:
        """(first row, rows) of at most ``size`` rows at a time, with the offsets of the bags over them."""
        count = len(self)
        for start in range(0, count, size):
            stop = min(start + size, count)
            if stop - start == count:
                yield start, self
                continue
            part = slice(start, stop)
            bounds = (self.cu_seqlens - start).clamp_(0, stop - start)
            if self.index is not None:
                yield start, replace(self, index=self.index[part], cu_seqlens=bounds)
            else:
                scale = None if self.scale is None else self.scale[part]
                yield start, replace(self, x=self.x[part], scale=scale, cu_seqlens=bounds)


@dataclass(frozen=True)
class Parts:
    """Vectors prepared as operands of products: see ``parts_kernel``."""

    values: torch.Tensor
    narrow: torch.Tensor | None
    scale: torch.Tensor
    extra: torch.Tensor


def soft_encode(
    x: torch.Tensor,
    codebook: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    row_scale: torch.Tensor | None = None,
    unit: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """V and mass of ragged bags with soft assignment; deterministic, no host synchronisation.

    M rows are read: row i is row r = index[i] of x (r = i without an index), times row_scale[r] if there is one, and
    divided by max(its L2 norm, 1e-12) if ``unit``.

    Args:
        x: [R, P] rows, P >= D: fp32, fp16 or bf16; int8 or float8_e4m3fn with ``row_scale``. Any row stride (a strided
            last dimension is copied first). Columns from D on are not read.
        codebook: [K, D] fp32 (other float dtypes are converted), 1 <= K <= 1024, 1 <= D <= 2048.
        cu_seqlens: int32 or int64 [B + 1], offsets of the bags over the M rows: from 0, never falling; rows past the
            last belong to no bag. Its values are not read on the host; offsets are clamped to [0, M].
        scale: [K], the s of Deep-TEN; or weight: [K, D] and bias: [K] or None, those of NetVLAD. Float dtypes.
        index: int64 [M], rows of x to read; -1 (and all else outside [0, R), which is not followed) skips.
        row_scale: fp32 [R], from 0 to below 16.
        unit: normalise the rows.

    Returns:
        V [B, K, D] and mass [B, K], fp32; zeros for empty bags.

    Raises:
        ValueError: wrong shape, dtype, device, or a GPU older than compute capability 8.0.

    Source: Deep-TEN, Zhang et al. 2017, eq. 3 and 4; NetVLAD, Arandjelovic et al. 2016, eq. 3 and 4.
    """
    check(x, codebook, cu_seqlens, scale, weight, bias, index, row_scale)
    (K, D), bags = codebook.shape, cu_seqlens.shape[0] - 1
    V = torch.zeros((bags, K, D), dtype=torch.float32, device=x.device)
    mass = torch.zeros((bags, K), dtype=torch.float32, device=x.device)
    rows, plan = prepare(x, codebook, cu_seqlens, index, row_scale, unit)
    if len(rows) == 0 or bags == 0:
        return V, mass
    with torch.cuda.device_of(x):
        words = codebook.float().contiguous()
        slopes, points = assignment(words, scale, weight, bias, plan)
        _launch(rows, words, slopes, points, plan, V, mass)
    return V, mass


def check(
    x: torch.Tensor,
    codebook: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    index: torch.Tensor | None,
    row_scale: torch.Tensor | None,
) -> None:
    """Raise ValueError for arguments that soft encoding does not take."""
    check_inputs(x, codebook, cu_seqlens, index, row_scale, (scale, weight, bias), INTERPRETED)
    config.check(x.dtype, *codebook.shape)
    if (scale is None) == (weight is None) or (bias is not None and weight is None):
        raise ValueError("soft assignment takes either scale, or weight and perhaps bias")
    words = codebook.shape[:1]
    for name, given, shape in (
        ("scale", scale, words),
        ("weight", weight, codebook.shape),
        ("bias", bias, words),
    ):
        if given is not None and given.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, not {list(given.shape)}")


def prepare(
    x: torch.Tensor,
    codebook: torch.Tensor,
    cu_seqlens: torch.Tensor,
    index: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    unit: bool,
) -> tuple[Rows, SoftPlan]:
    """The rows as the kernels want them, and the plan for them."""
    arch = config.INTERPRETER if INTERPRETED else config.arch_of(torch.cuda.get_device_capability(x.device))
    if x.shape[1] > 1 and x.stride(1) != 1:
        x = x.contiguous()
    if INTERPRETED and x.dtype == torch.bfloat16:  # the interpreter misreads bf16
        x = x.float()
    plan = soft_config.plan(arch, x.dtype, *codebook.shape)
    if x.dtype == torch.float8_e4m3fn:
        x = x.view(torch.uint8)
    index, row_scale = (None if t is None else t.contiguous() for t in (index, row_scale))
    return Rows(x, index, row_scale, cu_seqlens.contiguous(), unit), plan


def assignment(
    codebook: torch.Tensor,
    scale: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    plan: SoftPlan,
    narrow: bool = False,
) -> tuple[torch.Tensor | None, Parts]:
    """Slopes of the logits over distances (None: NetVLAD), and what rows are multiplied by to be assigned."""
    if scale is not None:
        return scale.float().contiguous(), parts(codebook[None], plan, narrow, squares=True)
    assert weight is not None
    bias = None if bias is None else bias.float().contiguous()
    return None, parts(weight.float().contiguous()[None], plan, narrow, add=bias)


def parts(
    vectors: torch.Tensor,
    plan: SoftPlan,
    narrow: bool = False,
    squares: bool = False,
    add: torch.Tensor | None = None,
    codebook: torch.Tensor | None = None,
) -> Parts:
    """Prepare vectors [B, K, D] as operands; ``narrow``: also as factors of the rows' gradient."""
    bags, K, D = vectors.shape
    values = vectors.new_empty((bags, plan.parts * plan.codewords, plan.dim), dtype=plan.operand)
    scale, extra = (vectors.new_empty((bags, plan.codewords)) for _ in range(2))
    short = None
    if narrow and plan.parts == 2:
        short = vectors.new_empty((bags, plan.codewords, plan.dim), dtype=plan.narrow)
    constants = parts_constants(plan, K, D, squares)
    grid = (bags, plan.codewords // constants["KB"])
    parts_kernel[grid](vectors, codebook, add, values, short, scale, extra, **constants)
    return Parts(values, values if narrow and short is None else short, scale, extra)


def parts_constants(plan: SoftPlan, K: int, D: int, squares: bool) -> dict[str, Any]:
    """The constexpr arguments of ``parts_kernel``."""
    sizes = {"K": K, "D": D, "KP": plan.codewords, "DP": plan.dim, "PARTS": plan.parts}
    wide = triton.next_power_of_2(plan.dim)
    return {**sizes, "SQUARES": squares, "KB": max(min(_PARTS // wide, 16), 1), "DB": wide}


def products_constants(plan: SoftPlan, K: int, D: int, unit: bool, distance: bool) -> dict[str, Any]:
    """The constexpr arguments of ``products_kernel``."""
    tile = plan.products
    sizes = {"K": K, "D": D, "KP": plan.codewords, "DP": plan.dim, "KT": tile.codewords, "DT": tile.dim}
    return {
        **sizes, "ROWS": tile.rows, "PARTS": plan.parts, "UNIT": unit, "DISTANCE": distance, "STAGES": tile.stages,
    }  # fmt: skip


def _constants(plan: SoftPlan, K: int, D: int, unit: bool, distance: bool) -> dict[str, dict[str, Any]]:
    """The constexpr arguments of the other kernels of the forward."""
    sums = plan.sums
    return {
        "products": products_constants(plan, K, D, unit, distance),
        "assign": {"K": K, "KP": plan.codewords, "ROWS": plan.softmax, "UNIT": unit},
        "sums": {
            "K": K, "D": D, "KP": plan.codewords, "KT": sums.codewords, "DT": sums.dim, "ROWS": sums.rows, "UNIT": unit,
            "STAGES": sums.stages,
        },
        "gather": {"K": K, "D": D, **_GATHER},
    }  # fmt: skip


def scratch_pitch(plan: SoftPlan, rows: int) -> int:
    """Columns of scratch: those of the largest chunk, in whole tiles."""
    return triton.cdiv(min(rows, plan.chunk), soft_config.PITCH) * soft_config.PITCH


def _launch(
    rows: Rows,
    codebook: torch.Tensor,
    slopes: torch.Tensor | None,
    points: Parts,
    plan: SoftPlan,
    V: torch.Tensor,
    mass: torch.Tensor,
) -> None:
    """Chunk by chunk: products, softmax, sums of segments, ordered sum of partials."""
    bags, K, D = V.shape
    pitch = scratch_pitch(plan, len(rows))
    z = codebook.new_empty((plan.codewords, pitch))
    a = codebook.new_empty((plan.parts, plan.codewords, pitch), dtype=plan.operand)
    weights = codebook.new_empty(pitch) if rows.unit else None
    constants = _constants(plan, K, D, rows.unit, slopes is not None)
    sums = plan.sums
    tiles = (plan.dim // sums.dim, plan.codewords // sums.codewords)
    for _, part in rows.chunks(plan.chunk):
        N, X = len(part), part.x.shape[0]
        grid = (triton.cdiv(N, plan.products.rows), plan.codewords // plan.products.codewords)
        products_kernel[grid](
            *part.pointers, points.values, points.scale, points.extra, None, None, None, z, None, weights, None,
            N, X, 0, 0, 0, pitch, **constants["products"], num_warps=plan.products.warps,
        )  # fmt: skip
        assign_kernel[(triton.cdiv(N, plan.softmax),)](
            part.x, part.index, part.scale, z, slopes, weights, a, N, X, pitch, **constants["assign"], num_warps=WARPS
        )  # fmt: skip
        ranges = min(triton.cdiv(plan.programs, tiles[0] * tiles[1]), triton.cdiv(N, sums.rows))
        height = triton.cdiv(triton.cdiv(N, ranges), sums.rows) * sums.rows
        partial = codebook.new_empty((ranges, 2, K, D) if ranges > 1 else (0,))
        partial_mass = codebook.new_empty((ranges, 2, K) if ranges > 1 else (0,))
        sums_kernel[(ranges + bags + 1, *tiles)](
            *part.pointers, a, weights, codebook, part.cu_seqlens, V, mass, partial, partial_mass,
            N, X, bags, ranges, height, pitch, **constants["sums"], num_warps=sums.warps,
        )  # fmt: skip
        if ranges > 1:
            gather_kernel[(bags, triton.cdiv(K * D, _GATHER["BLOCK"]))](
                part.cu_seqlens, V, mass, partial, partial_mass, N, height, **constants["gather"]
            )


_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.float8_e4m3fn: "u8",
}
# Rows, K, D and what is asked of them: every tile shape a plan of 16-bit, 8-bit and fp32 rows can hold, with all options.
SHAPES: tuple[tuple[torch.dtype, int, int, str], ...] = (
    (torch.bfloat16, 64, 384, ""),
    (torch.bfloat16, 64, 1024, "index unit weight"),
    (torch.int8, 1000, 2047, "index unit"),
    (torch.float32, 64, 384, "index"),
)


def case_of(
    arch: config.Arch,
    dtype: torch.dtype,
    K: int,
    D: int,
    plan: SoftPlan,
    kernel: Any,
    label: str,
    constants: dict[str, Any],
    options: Collection[str] = (),
    absent: Collection[str] = (),
    narrow: Collection[str] = (),
    tile: Launch | None = None,
) -> Case:
    """A case: ``absent`` pointers are None, ``narrow`` ones have the plan's narrow dtype; ``tile`` if it reads rows."""
    missing = {*absent, *(() if "index" in options else ("index_ptr",))}
    if dtype not in config.SCALED_DTYPES:
        missing.add("row_scale_ptr")
    constants = {**constants, **dict.fromkeys(name for name in kernel.arg_names if name in missing)}
    rows, operand = _TYPES[dtype], _TYPES[plan.operand]
    pointers = {
        "x_ptr": rows,
        "parts_ptr": operand,
        "grad_parts_ptr": operand,
        "cu_ptr": "i64",
        "index_ptr": "i64",
    }
    if label in ("assign", "sums"):
        pointers["a_ptr"] = operand
    if label == "backward rows":
        pointers["out_ptr"] = "fp32" if dtype in config.SCALED_DTYPES else rows
    pointers |= dict.fromkeys(narrow, _TYPES[plan.narrow])
    types = tuple(
        (n, "*" + pointers.get(n, "fp32") if n.endswith("_ptr") else "i32")
        for n in kernel.arg_names
        if n not in constants
    )
    matrix = tile is not None and dtype != torch.float32
    wide = matrix and D % 16 == 0
    softmax = label in ("assign", "backward logits")
    return Case(
        arch.capability, kernel, " ".join(["soft", label, *sorted(options)]),
        "e4m3" if dtype == torch.float8_e4m3fn else rows, K, D, types, tuple(constants.items()),
        tile.warps if tile is not None else WARPS if softmax else 4, arch.shared,
        reads="2" if tile is not None else "-", matrix=matrix, wide=wide, asynchronous=wide and constants["STAGES"] > 1,
    )  # fmt: skip


def cases(arch: config.Arch) -> Iterator[Case]:
    """Every kernel of every plan on ``arch``, as the launcher launches them."""
    for dtype, K, D, asked in SHAPES:
        options = set(asked.split())
        unit, distance = "unit" in options, "weight" not in options
        plan = soft_config.plan(arch, dtype, K, D)
        absent = {"grad_parts_ptr", "grad_scale_ptr", "cu_ptr", "e_ptr", "squares_ptr"}
        bare = (set() if unit else {"weights_ptr"}) | (set() if distance else {"slope_ptr"})
        constants = _constants(plan, K, D, unit, distance)
        one = partial(case_of, arch, dtype, K, D, plan)
        yield one(
            products_kernel, "products", constants["products"], options, bare | absent, tile=plan.products
        )
        yield one(assign_kernel, "assign", constants["assign"], options, bare)
        yield one(sums_kernel, "sums", constants["sums"], options, bare, tile=plan.sums)
        if helpers_shown(dtype, options):
            yield one(gather_kernel, "gather", constants["gather"])
            plain = {**parts_constants(plan, K, D, distance), "narrow_ptr": None, "c_ptr": None}
            yield one(parts_kernel, "parts", plain)


def helpers_shown(dtype: torch.dtype, options: set[str]) -> bool:
    """Whether the kernels that hardly depend on the rows are among the cases of a shape."""
    return "index" not in options and dtype != torch.float16
