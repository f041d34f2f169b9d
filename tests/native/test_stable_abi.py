"""The op libraries use only the stable C interface of torch, so one binary serves every torch >= 2.10."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import dre_fast
from dre_fast.ops import native
from native_build.check_wheel import UNSTABLE, undefined

if not native.available():
    pytest.skip(f"needs the C++ ops: {native.why_not()}", allow_module_level=True)
if shutil.which("nm") is None:
    pytest.skip("needs nm (binutils)", allow_module_level=True)

FOLDER = Path(dre_fast.__file__).parent
LIBRARIES = sorted(FOLDER.glob("_ops*.so"))


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name)
def test_no_unstable_symbol(library: Path) -> None:
    symbols = undefined(library)
    assert "torch_library_impl" in symbols  # of the stable interface as of torch 2.10
    assert [s for s in symbols if UNSTABLE.search(s)] == []


def test_the_scan_finds_unstable_symbols() -> None:
    for name in ("_ZN2at5emptyEv", "_ZNK3c1010TensorImpl5sizesEv", "_ZN5torch7LibraryD1Ev", "PyList_New"):
        assert UNSTABLE.search(name)
    for name in ("torch_parallel_for", "aoti_torch_get_data_ptr", "_ZNSt6vectorIfSaIfEED1Ev", "_Znwm"):
        assert not UNSTABLE.search(name)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name)
def test_only_the_loading_symbols_are_exported(library: Path) -> None:
    """Nothing of the row kernels leaks out to be mixed up with another library's."""
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    own = [line for line in listed.splitlines() if "dre_fast" in line]
    assert own == []


def test_no_macro_that_torch_2_10_lacks() -> None:
    """The build compiles against the headers that are installed; these came to them after 2.10."""
    newer = ("STABLE_TORCH_ERROR_CODE_CHECK",)
    root = Path(__file__).parents[2] / "csrc"
    for source in [*root.rglob("*.cpp"), *root.rglob("*.cu"), *root.rglob("*.h")]:
        found = [name for name in newer if name in source.read_text()]
        assert not found, f"{source.relative_to(root)}: {', '.join(found)}"
