"""What every shipped kernel configuration compiles to, without a GPU: `python -m dre_fast.kernels.resources`.

Compiles for each architecture with the attributes the JIT would find (16-byte aligned pointers and row strides, run-time row lengths T alike) and
reads registers, stack, shared memory and the instructions of interest from the cubin, with the tools triton brings.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dre_fast.kernels import config
from dre_fast.kernels.case import Case

# Modules of dre_fast.kernels with a function cases(arch).
MODULES = [
    "hard_encode",
    "hard_backward",
    "permute",
    "soft_encode",
    "soft_backward",
    "contrast_forward",
    "contrast_backward",
]


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


def cases(arch: config.Arch) -> Iterator[Case]:
    """Every configuration of every kernel on one architecture, in the order of MODULES."""
    for name in MODULES:
        # not an attribute of the package: functions of the same name hide the modules there
        yield from importlib.import_module(f"dre_fast.kernels.{name}").cases(arch)


def measure(case: Case) -> Usage:
    """Compile one case for its architecture and read the cubin.

    Raises:
        RuntimeError: the kernels were imported under TRITON_INTERPRET, or a cubin could not be read.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(case.kernel, triton.JITFunction):
        raise RuntimeError("unset TRITON_INTERPRET: interpreted kernels do not compile")
    constants, types = dict(case.constants), dict(case.types)
    # in the order of the arguments: positions are what the compiler goes by
    signature = {name: "constexpr" if name in constants else types[name] for name in case.kernel.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*")
        or ((name.endswith("stride") or name == "T") and kind != "constexpr" and case.dim % 16 == 0)
    }
    source = ASTSource(case.kernel, signature, constants, attributes)
    options = {"num_warps": case.warps}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", case.capability, 32), options=options)
    except Exception as error:
        raise RuntimeError(f"{case.name} does not compile: {error}") from error
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
        wgmma=count(r"\b(?:HGMMA|QGMMA)\b"),
        mma=count(r"\b(?:HMMA|UTCHMMA|OMMA)\b"),
        wide_loads=count(r"\b(?:LDG|LDGSTS)\S*\.128\b"),
        async_copies=count(r"\b(?:LDGSTS|UTMALDG|UBLKCP)\b"),
    )


def measure_all(capabilities: list[int], match: str = "", every: int = 1) -> list[tuple[Case, Usage]]:
    """Every case of the architectures (of names that contain ``match`` only), or every n-th of them."""
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        numbers = [
            (capability, i)
            for capability in capabilities
            for i, case in enumerate(cases(config.ARCHS[capability]))
            if i % every == 0 and match in case.name
        ]
        usages = list(pool.map(_measure_numbered, numbers))
    found = {capability: list(cases(config.ARCHS[capability])) for capability in capabilities}
    return [(found[arch][i], usage) for (arch, i), usage in zip(numbers, usages, strict=True)]


def _measure_numbered(number: tuple[int, int]) -> Usage:
    """By position, because JIT functions do not travel between processes."""
    capability, i = number
    return measure(list(cases(config.ARCHS[capability]))[i])


def table(rows: list[tuple[Case, Usage]]) -> str:
    """Markdown: one line per kernel and shape."""
    head = "| GPU | kernel | rows | K | D | registers | stack | shared KB | matrix unit | 16-byte loads | async copies | reads of the rows |"
    lines = [head, "|" + " --- |" * 12]
    for case, usage in rows:
        unit = "wgmma" if usage.wgmma else "mma" if usage.mma else "-"
        lines.append(
            f"| sm_{case.capability} | {case.label} | {case.dtype} | {case.codewords} | {case.dim} | {usage.registers} "
            f"| {usage.stack} | {usage.shared / 1024:.0f} | {unit} | {usage.wide_loads} | {usage.async_copies} "
            f"| {case.reads} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dre_fast.kernels.resources", description=__doc__)
    parser.add_argument("--arch", type=int, action="append", choices=list(config.ARCHS), help="default: all")
    parser.add_argument("--match", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th case")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="replace the table of this Markdown page")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of the table")
    arguments = parser.parse_args()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    rows = measure_all(list(arguments.arch or config.ARCHS), arguments.match, arguments.every)
    if arguments.json:
        entries = [{"name": case.name, **_plain(case), **dataclasses.asdict(usage)} for case, usage in rows]
        print(json.dumps(entries, indent=1))
    elif arguments.write:
        _replace_table(arguments.write, table(rows))
    else:
        print(table(rows))
    return 0


def _plain(case: Case) -> dict[str, object]:
    """The fields of a case but its kernel, types and constants."""
    hidden = ("kernel", "types", "constants")
    return {f.name: getattr(case, f.name) for f in dataclasses.fields(case) if f.name not in hidden}


def _replace_table(page: Path, text: str) -> None:
    """Put the table between the two marker lines of a Markdown page. Raises ValueError where they are missing."""
    before, start, rest = page.read_text().partition("<!-- resources: begin -->\n")
    _, end, after = rest.partition("<!-- resources: end -->\n")
    if not start or not end:
        raise ValueError(f"{page}: no lines <!-- resources: begin --> and <!-- resources: end -->")
    page.write_text(f"{before}{start}{text}\n{end}{after}")


if __name__ == "__main__":
    sys.exit(main())
