"""One kernel configuration that is shipped: what to compile to check it, and what it must come out as."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """One kernel as a launcher launches it.

    Every kernel module has ``cases(arch: config.Arch) -> Iterator[Case]`` over all it ships;
    ``dre_fast.kernels.resources`` compiles them. A case may not spill; what else it must show:

    capability: 80, 90, 100 or 120. kernel: the JIT function. label: its name in tables, with what sets it apart.
    dtype: of the rows, as Triton writes it ("bf16"). codewords, dim: K and D.
    types: Triton type of every argument that is not constexpr ("*bf16", "i64"). constants: the constexpr arguments,
        an absent pointer being the constant None.
    warps: per program. shared_limit: bytes of shared memory a program may use.
    reads: how often the rows are read from memory by all kernels of the plan together ("1", "2"; "-": not rows).
    matrix: must use the matrix units (wgmma on sm_90). wide: must load 16 bytes at a time.
    asynchronous: must copy to shared memory asynchronously.
    """

    capability: int
    kernel: Any
    label: str
    dtype: str
    codewords: int
    dim: int
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    warps: int
    shared_limit: int
    reads: str = "-"
    matrix: bool = False
    wide: bool = False
    asynchronous: bool = False

    @property
    def name(self) -> str:
        return f"sm_{self.capability} {self.label} {self.dtype} K={self.codewords} D={self.dim}"
