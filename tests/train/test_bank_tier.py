"""Where the bank's rows lie does not show in a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_cohort import interrupt, timeless, tiny_config

from dre_fast.ops import native
from dre_fast.train.config import ConfigError
from dre_fast.train.loop import Trainer


@pytest.mark.skipif(bool(native.why_not("host")), reason="needs the compiled host part")
@pytest.mark.parametrize("mode", ["full", "sampled"])
def test_rows_in_a_file_give_the_same_run_also_when_resumed(
    tiny_cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    common = (f"memory.mode={mode}", "memory.retrieved=6")
    # 25 tiles a slide of 208 bytes (48 values, padded): two slides at a time
    there = ("memory.tier=file", f"memory.folder={tmp_path}", "memory.cache=6kB")
    Trainer(tiny_config(tiny_cohort, *common), tmp_path / "memory").fit()
    capsys.readouterr()
    Trainer(tiny_config(tiny_cohort, *common, *there), tmp_path / "file").fit()
    assert "of slides in memory when needed" in capsys.readouterr().err
    assert timeless(tmp_path / "file") == timeless(tmp_path / "memory")

    interrupt(tiny_config(tiny_cohort, *common, *there), tmp_path / "stopped", step=4)
    resumed = tiny_config(tiny_cohort, *common)  # with rows in memory again
    Trainer(resumed, tmp_path / "stopped", resume=True).fit()
    assert timeless(tmp_path / "stopped") == timeless(tmp_path / "memory")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("memory.tier=ram", r"memory\.tier"),
        ("memory.tier=file", r"memory\.tier=file needs memory\.folder"),
        ("memory.cache=lots", r"memory\.cache: a size in bytes"),
        ("memory.budget=-3", r"memory\.budget: a size in bytes"),
    ],
)
def test_bad_settings_are_named(tiny_cohort: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(tiny_cohort, override).validate()
