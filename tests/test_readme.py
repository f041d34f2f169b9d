"""The Python of the README and of the pages runs as printed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


BLOCKS = blocks("README.md")


def run(code: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_bank_block(tmp_path):
    run(BLOCKS[0] + "\nassert V.shape == (2, 16, 64) and encoder[1].weight.grad.abs().sum() > 0", tmp_path)


def test_bags_block_on_real_bags(tmp_path, test_data):
    (tmp_path / "features").mkdir()
    for file in (test_data / "bags").glob("*.h5"):
        shutil.copy(file, tmp_path / "features")
    run(
        BLOCKS[1] + "\nassert slides.shape == (2, 16 * 512) and (slides.norm(dim=1) - 1).abs().max() < 1e-5",
        tmp_path,
    )


def test_encoding_page(tmp_path):
    page = blocks("docs/encoding.md")
    assert len(page) == 2
    check = "\nassert V.shape == (3, 16, 128) and int(counts.sum()) == len(codes) == len(distances) == 740"
    run("\n".join(page) + check, tmp_path)


def test_bank_page(tmp_path):
    page = blocks("docs/bank.md")
    assert len(page) == 3
    check = (
        "\nassert there.tier == 'file' and int(rows.sum()) == 40000 and V.shape == (2, 16, 64)"
        "\nassert part.num_slides == 2 and numbers.tolist() == [5, 2]"
    )
    run("\n".join(page) + check, tmp_path)


def test_training_page(tmp_path):
    page = blocks("docs/training.md")
    assert len(page) == 1
    run(
        page[0] + "\nassert encoder[1].weight.grad.abs().sum() > 0 and out.logits['subtype'].shape == (2, 2)",
        tmp_path,
    )


@pytest.mark.parametrize("name", ["training", "data-path"])
def test_lines_of_a_page_are_settings(name):
    from dre_fast.train.config import load_config

    page = (ROOT / f"docs/{name}.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(lines) > 7
    for line in lines:
        load_config(None, line.split())


def test_aggregators_page(tmp_path):
    page = blocks("docs/aggregators.md")
    assert len(page) == 1
    run(page[0] + "\nassert encoder[1].weight.grad.abs().sum() > 0 and out.residuals is None", tmp_path)


def test_hub_page(tmp_path):
    pytest.importorskip("huggingface_hub", reason="needs huggingface_hub: pip install 'dre_fast[train]'")
    page = blocks("docs/hub-and-logging.md")
    assert len(page) == 2
    check = (
        "\nassert torch.equal(again(bags[0]), model.eval()(bags[0]))"
        "\nassert '| test | 201 | 190 |' in open('lung/README.md').read()"
    )
    run(page[0] + check, tmp_path)


def test_lightning_block(tmp_path):
    pytest.importorskip("lightning", reason="needs lightning, which is no part of the project's environment")
    run(blocks("docs/hub-and-logging.md")[1] + "\nassert 'val_auc' in trainer.callback_metrics", tmp_path)


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
