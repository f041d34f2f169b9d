"""What a wheel of dre_fast may hold and ask for: ``python native_build/check_wheel.py WHEEL...`` lists what is wrong.

A compiled library must ask only for the C and C++ run times and for torch, none of them carried along, and of torch
only for the stable C interface, so that one binary serves every torch >= 2.10. Needs readelf and nm (binutils).
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# C++ names of torch, c10 and at, mangled; and Python's own interface.
UNSTABLE = re.compile(r"_Z\w*?(2at|3c10|5torch|6caffe2|5torch3jit)\w*|\bPy\w+|\b_Py\w+")
LIBRARIES = re.compile(r"dre_fast/(_ops|_ops_cuda|_host\.[\w-]+)\.so")
NEEDED = re.compile(
    r"lib(torch_cpu|torch_cuda|stdc\+\+|gcc_s|m|c|pthread|dl|rt)\.so(\.\d+)?|ld-linux[\w-]*\.so(\.\d+)?"
)


def undefined(library: Path) -> list[str]:
    """The symbols that ``library`` asks others for, without their versions."""
    command = ["nm", "-D", "--undefined-only", str(library)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.split()[-1].split("@")[0] for line in listed.splitlines()]


def dynamic(library: Path) -> dict[str, list[str]]:
    """The entries of the dynamic section that name libraries and run paths: "NEEDED", "RPATH", "RUNPATH"."""
    listed = subprocess.run(["readelf", "-dW", library], capture_output=True, text=True, check=True).stdout
    found: dict[str, list[str]] = {"NEEDED": [], "RPATH": [], "RUNPATH": []}
    for kind, name in re.findall(r"\((NEEDED|RPATH|RUNPATH)\).*\[(.*)\]", listed):
        found[kind].append(name)
    return found


def library_problems(library: Path) -> list[str]:
    """What a compiled library may not do."""
    entries = dynamic(library)
    problems = [f"needs {name}" for name in entries["NEEDED"] if not NEEDED.fullmatch(name)]
    problems += [f"has the run path {path}" for path in entries["RPATH"] + entries["RUNPATH"]]
    if library.name.startswith("_ops"):
        problems += [f"asks for {name}" for name in undefined(library) if UNSTABLE.search(name)]
    return [f"{library.name} {problem}" for problem in problems]


def problems(wheel: Path) -> list[str]:
    """What is wrong with a wheel; empty where nothing is."""
    found = []
    pure = wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        libraries = [name for name in names if re.search(r"\.so(\.|$)", name)]
        tops = {name.split("/")[0] for name in names}
        found += [f"holds {top}/" for top in tops if top != "dre_fast" and not top.endswith(".dist-info")]
        for part in ("licenses/LICENSE", "METADATA", "entry_points.txt"):
            if not any(name.endswith(f".dist-info/{part}") for name in names):
                found.append(f"lacks {part}")
        for name in ("dre_fast/py.typed", "dre_fast/_build_status.json"):
            if name not in names:
                found.append(f"lacks {name}")
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
        if "Requires-Dist: torch>=2.10\n" not in metadata:
            found.append("does not require torch>=2.10, as any of them serves")
        if pure == bool(libraries):
            found.append(
                f"is called {'pure' if pure else 'compiled'} and holds {len(libraries)} compiled libraries"
            )
        for name in libraries:
            if LIBRARIES.fullmatch(name):
                found += library_problems(Path(archive.extract(name, folder)))
            else:
                found.append(f"holds {name}, which is not ours")
    return [f"{wheel.name}: {problem}" for problem in found]


def main(wheels: list[str]) -> int:
    """Prints what is wrong with each wheel; returns 1 where anything is."""
    found = [problem for wheel in wheels for problem in problems(Path(wheel))]
    print("\n".join(found) or f"{len(wheels)} wheels are in order")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
