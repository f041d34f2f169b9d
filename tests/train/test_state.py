from __future__ import annotations

import json

import pytest
import torch

from dre_fast.train.state import (
    MetricsLog,
    load_checkpoint,
    load_model,
    read_metrics,
    save_checkpoint,
    save_model,
)


def test_checkpoint_round_trip_and_damage(tmp_path):
    file = tmp_path / "last.pt"
    save_checkpoint(file, {"x": torch.arange(5), "step": 3})
    assert load_checkpoint(file)["x"].equal(torch.arange(5))
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"last\.pt"):
        load_checkpoint(file)
    torch.save({"other": 1}, file)
    with pytest.raises(ValueError, match="not a dre_fast checkpoint"):
        load_checkpoint(file)


def test_a_pickle_with_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"format": "dre_fast-checkpoint-2", "x": Evil()}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "last.pt")


def test_a_failed_write_leaves_the_former_checkpoint(tmp_path):
    file = tmp_path / "last.pt"
    save_checkpoint(file, {"step": 1})
    with pytest.raises(AttributeError):
        save_checkpoint(file, {"step": lambda: None})
    assert load_checkpoint(file)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_model_file_holds_no_bank_rows(tmp_path):
    state = {"bank.payload": torch.zeros(3), "bank.codebook": torch.ones(2, 2), "head.weight": torch.ones(1)}
    save_model(tmp_path / "best.safetensors", state, {"tasks": {}})
    loaded, card = load_model(tmp_path / "best.safetensors")
    assert set(loaded) == {"bank.codebook", "head.weight"}
    assert card == {"tasks": {}, "format": 1}
    save_model(tmp_path / "newer.safetensors", state, {"tasks": {}, "format": 2})
    with pytest.raises(ValueError, match=r"newer\.safetensors: written by a newer dre_fast \(format 2"):
        load_model(tmp_path / "newer.safetensors")
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        load_model(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"bad\.safetensors"):
        load_model(tmp_path / "bad.safetensors")


def test_log_is_cut_back_to_the_checkpoint(tmp_path):
    file = tmp_path / "metrics.jsonl"
    log = MetricsLog(file)
    log.write(kind="step", step=0)
    size = log.size
    log.write(kind="step", step=1)
    log.close()
    with open(file, "ab") as stream:
        stream.write(b'{"kind": "st')  # killed in the middle of a line
    assert [row["step"] for row in read_metrics(file)] == [0, 1]
    log = MetricsLog(file, size)
    log.write(kind="step", step=7)
    log.close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [0, 7]
    with pytest.raises(ValueError, match="shorter than its checkpoint"):
        MetricsLog(file, 10_000)
