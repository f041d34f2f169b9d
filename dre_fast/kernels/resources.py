"""What every shipped kernel configuration compiles to, without a GPU: `python -m dre_fast.kernels.resources`.

Compiles for each architecture with the attributes the JIT would find (16-byte aligned pointers and row strides) and
reads registers, stack, shared memory and the instructions of interest from the cubin, with the tools triton brings.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dre_fast.kernels import config

# Every tile shape a plan can hold: one per kind of plan and dtype, sizes that fill the tiles and odd ones.
SHAPES = (
    (torch.bfloat16, 64, 384),
    (torch.bfloat16, 64, 1024),
    (torch.bfloat16, 16, 64),
    (torch.bfloat16, 64, 128),
    (torch.bfloat16, 64, 192),
    (torch.bfloat16, 64, 256),
    (torch.bfloat16, 128, 64),
    (torch.bfloat16, 128, 128),
    (torch.bfloat16, 128, 192),
    (torch.bfloat16, 7, 33),
    (torch.bfloat16, 60, 127),
    (torch.bfloat16, 100, 150),
    (torch.bfloat16, 256, 64),
    (torch.bfloat16, 1024, 2048),
    (torch.bfloat16, 1000, 2047),
    (torch.float16, 64, 384),
    (torch.float16, 64, 1024),
    (torch.float32, 64, 384),
    (torch.float32, 5, 17),
    (torch.float32, 1024, 2048),
)
# The shapes of P1 and P2 in benchmarks/registry.py.
_HEADLINE = SHAPES[:2]
# The codebook preparation and the sum of partials hardly depend on the shape: these three show them.
_HELPER_SHAPES = {(64, 384), (7, 33), (1024, 2048)}
_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Case:
    """One kernel as one plan launches it."""

    capability: int
    kernel: str
    dtype: str
    codewords: int
    dim: int
    constants: tuple[tuple[str, Any], ...]
    warps: int
    shared_limit: int
    passes: int
    matrix: bool

    @property
    def name(self) -> str:
        return f"sm_{self.capability} {self.kernel} {self.dtype} K={self.codewords} D={self.dim}"


@dataclass(frozen=True)
class Usage:
    """Read from one cubin: registers a thread, stack and shared bytes, and how often some instructions occur."""

    registers: int
    stack: int
    shared: int
    local: int
    wgmma: int
    mma: int
    wide_loads: int
    async_copies: int


def cases(capabilities: tuple[int, ...] = tuple(config.ARCHS), headline: bool = False) -> Iterator[Case]:
    """Every kernel of every plan of SHAPES, or of the two headline shapes, per architecture."""
    for capability in capabilities:
        arch = config.ARCHS[capability]
        for dtype, codewords, dim in _HEADLINE if headline else SHAPES:
            plan = config.plan(arch, dtype, codewords, dim, dim % 16 == 0)
            for kernel, warps, constants in _launches(plan, codewords, dim):
                helper = kernel in ("prepare", "reduce")
                if helper and (dtype == torch.float16 or (codewords, dim) not in _HELPER_SHAPES):
                    continue
                yield Case(
                    capability,
                    kernel,
                    _TYPES[dtype],
                    codewords,
                    dim,
                    tuple(constants.items()),
                    warps,
                    arch.shared,
                    plan.passes_over_rows,
                    dtype != torch.float32 and not helper,
                )


def _launches(plan: config.Plan, K: int, D: int) -> Iterator[tuple[str, int, dict[str, int]]]:
    """(kernel, warps, constexpr arguments) of each launch of ``plan``, as hard_encode makes them."""
    size = {"K": K, "D": D}
    padded = {**size, "KP": plan.codewords, "DP": plan.dim, "PARTS": plan.parts}
    yield "prepare", 4, {**padded, "DB": 1 << (plan.dim - 1).bit_length()}
    if plan.single is not None:
        one = plan.single
        tiles = {"KP": plan.codewords, "DT": one.dim, "TILES": plan.dim // one.dim, "ROWS": one.rows}
        yield "single", one.warps, {**size, **tiles, "PARTS": plan.parts, "STAGES": one.stages}
    if plan.assign is not None:
        first = plan.assign
        tiles = {"KT": first.codewords, "DT": first.dim, "ROWS": first.rows, "STAGES": first.stages}
        yield "assign", first.warps, {**padded, **tiles}
    if plan.aggregate is not None:
        second = plan.aggregate
        tiles = {"KT": second.codewords, "DT": second.dim, "ROWS": second.rows, "STAGES": second.stages}
        yield "aggregate", second.warps, {**size, **tiles}
    yield "reduce", 4, {**size, "BLOCK": 256, "AT_ONCE": 16}


def _signature(kernel: Any, dtype: str, constants: dict[str, Any]) -> dict[str, str]:
    pointers = {"x_ptr": dtype, "parts_ptr": dtype, "cu_ptr": "i64", "counts_ptr": "i64", "codes_ptr": "i64"}
    pointers["partial_counts_ptr"] = "i32"
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name.endswith("_ptr"):
            types[name] = "*" + pointers.get(name, "fp32")
        else:
            types[name] = "i32"
    return types


def measure(case: Case) -> Usage:
    """Compile one case for its architecture and read the cubin.

    Raises:
        RuntimeError: the kernels were imported under TRITON_INTERPRET, or a cubin could not be read.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dre_fast.kernels import hard_encode as _  # noqa: F401  (binds the submodule)

    module = sys.modules["dre_fast.kernels.hard_encode"]
    if module.INTERPRETED:
        raise RuntimeError("unset TRITON_INTERPRET: interpreted kernels do not compile")
    kernel = getattr(module, f"_{case.kernel}_kernel")
    constants = dict(case.constants)
    signature = _signature(kernel, case.dtype, constants)
    aligned_stride = case.dim % 16 == 0
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or (name == "stride" and aligned_stride)
    }
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": case.warps}
    compiled = triton.compile(source, target=GPUTarget("cuda", case.capability, 32), options=options)
    return _read(compiled.asm["cubin"], compiled.metadata.shared)


def _read(cubin: bytes, shared: int) -> Usage:
    import triton.backends.nvidia as nvidia

    tool = Path(next(iter(nvidia.__path__))) / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, code = (
            subprocess.run([str(tool), flag, str(path)], capture_output=True, text=True, check=True)
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    if found is None:
        raise RuntimeError(f"{tool} printed no register usage: {usage.stdout}{usage.stderr}")

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code.stdout))

    return Usage(
        registers=int(found[1]),
        stack=int(found[2]),
        shared=shared,
        local=count(r"\b(?:LDL|STL)\b"),
        wgmma=count(r"\bHGMMA\b"),
        mma=count(r"\b(?:HMMA|UTCHMMA|OMMA)\b"),
        wide_loads=count(r"\b(?:LDG|LDGSTS)\S*\.128\b"),
        async_copies=count(r"\b(?:LDGSTS|UTMALDG|UBLKCP)\b"),
    )


def table(rows: list[tuple[Case, Usage]]) -> str:
    """Markdown: one line per kernel and shape."""
    head = "| GPU | kernel | rows | K | D | registers | stack | shared KB | matrix unit | 16-byte loads | async copies | reads of the rows |"
    lines = [head, "|" + " --- |" * 12]
    for case, usage in rows:
        unit = "wgmma" if usage.wgmma else "mma" if usage.mma else "-"
        reads = str(case.passes) if case.kernel in ("single", "assign", "aggregate") else "-"
        lines.append(
            f"| sm_{case.capability} | {case.kernel} | {case.dtype} | {case.codewords} | {case.dim} | {usage.registers} "
            f"| {usage.stack} | {usage.shared / 1024:.0f} | {unit} | {usage.wide_loads} | {usage.async_copies} | {reads} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dre_fast.kernels.resources", description=__doc__)
    parser.add_argument("--arch", type=int, action="append", choices=list(config.ARCHS), help="default: all")
    parser.add_argument("--headline", action="store_true", help="only the bf16 shapes K=64, D=384 and D=1024")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the table of this Markdown page")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of the table")
    arguments = parser.parse_args()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    chosen = tuple(arguments.arch or config.ARCHS)
    rows = [(case, measure(case)) for case in cases(chosen, arguments.headline)]
    if arguments.json:
        fields = ("capability", "kernel", "dtype", "codewords", "dim", "warps", "shared_limit", "matrix")
        entries = [
            {"name": c.name, **{f: getattr(c, f) for f in fields}, **dataclasses.asdict(u)} for c, u in rows
        ]
        print(json.dumps(entries, indent=1))
    elif arguments.write:
        _replace_table(arguments.write, table(rows))
    else:
        print(table(rows))
    return 0


def _replace_table(page: Path, text: str) -> None:
    """Put the table between the two marker lines of a Markdown page. Raises ValueError where they are missing."""
    before, start, rest = page.read_text().partition("<!-- resources: begin -->\n")
    _, end, after = rest.partition("<!-- resources: end -->\n")
    if not start or not end:
        raise ValueError(f"{page}: no lines <!-- resources: begin --> and <!-- resources: end -->")
    page.write_text(f"{before}{start}{text}\n{end}{after}")


if __name__ == "__main__":
    sys.exit(main())
