"""The page about bags to scores: its Python runs as printed, its commands are commands."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from dre_fast.cli import build_parser
from mil_study import write_study

PAGE = (Path(__file__).parent.parent.parent / "docs" / "mil.md").read_text(encoding="utf-8")


def test_python_of_the_page(tmp_path):
    write_study(tmp_path)
    write_study(tmp_path / "other", cases=8, first=100, seed=1)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 2
    check = "\nassert logits.shape == (19, 1) and len(found.predictions) == 10 and scores[0].metric == 'auc'"
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks) + check],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "deployed" / "scores.md").exists()


def test_commands_of_the_page():
    parser = build_parser()
    commands = re.findall(r"^dre-fast (.*)$", PAGE, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        parser.parse_args(shlex.split(command))
    options = set(re.findall(r"--[a-z][a-z-]*", PAGE))
    mil = next(a.choices["mil"] for a in parser._actions if a.choices and "mil" in a.choices)
    known = {option for action in mil._actions for option in action.option_strings} | {"--labels"}
    assert options <= known
