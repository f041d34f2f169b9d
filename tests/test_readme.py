"""The README's Python runs as printed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def run(code: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_bank_block(tmp_path):
    run(BLOCKS[0] + "\nassert V.shape == (2, 16, 64) and encoder[1].weight.grad.abs().sum() > 0", tmp_path)


def test_bag_block_on_a_real_bag(tmp_path, test_data):
    shutil.copy(test_data / "bags" / "TCGA-AD-6964-01Z-00-DX1.h5", tmp_path)
    run(BLOCKS[1] + "\nassert slide.shape == (1, 16 * 512) and abs(slide.norm() - 1) < 1e-5", tmp_path)


def test_every_block_is_tested():
    assert len(BLOCKS) == 2


def test_commands_of_the_readme_exist():
    from dre_fast.cli import build_parser

    commands = set(
        re.findall(r"^dre-fast ([a-z-]+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    )
    parser = build_parser()
    choices = next(
        action.choices for action in parser._actions if action.choices and "train" in action.choices
    )
    assert commands <= set(choices)
    for name in choices:
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args([name, "--help"])
        assert stopped.value.code == 0
