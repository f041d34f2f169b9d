"""The same run in 1, 2 and 4 processes; going on in another number of them; what a process that dies leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from train_cohort import TILE, tiny_config, write_cohort

from dre_fast.data.coords import write_coords
from dre_fast.data.slides import open_slide
from dre_fast.data.tiling import tile_slide
from dre_fast.train.config import Config, ConfigError, load_config, save_config
from dre_fast.train.distributed import Group
from dre_fast.train.loop import Trainer
from dre_fast.train.samplers import steps_per_epoch, visits
from dre_fast.train.shards import deal_slides, shards_of, with_shards
from dre_fast.train.state import load_checkpoint, read_metrics

CLOCKS = {"seconds", "data_seconds"}


def command(processes: int, config: Path, out: Path) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    run = ["dre_fast.cli", "train", "--config", str(config), "--out", str(out), "--resume"]
    return [sys.executable, *(torchrun if processes > 1 else ["-m"]), *run]


def start(processes: int, config: Path, out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command(processes, config, out),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def finish(process: subprocess.Popen[bytes]) -> str:
    output = process.communicate(timeout=240)[0].decode()
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """13 slides, 9 to train on: over 4 shards one has three, so some processes have none in the last step."""
    root = tmp_path_factory.mktemp("distributed")
    table = write_cohort(root, slides=13)
    lines = table.read_text().splitlines()
    follow_up = [f",{(7 * i) % 11 + 1},{'1:DECEASED' if i % 3 else '0:LIVING'}" for i in range(13)]
    follow_up[2] = ",,"
    rows = [line + more for line, more in zip(lines, [",months,status", *follow_up], strict=True)]
    table.write_text("\n".join(rows) + "\n")
    for i in range(13):  # and 4 tiles of twice the pixel size
        with open_slide(root / f"s{i}.npy", mpp=1.0) as slide:
            write_coords(
                root / "coarse" / f"s{i}.h5", tile_slide(slide, tile_size=TILE, mpp=2.0, min_tissue=0.0)
            )
    return root


def config_of(cohort: Path, file: Path, *overrides: str) -> Path:
    config = tiny_config(
        cohort,
        "run.shards=4",
        "optim.batch_size=4",
        "optim.epochs=3",
        "optim.head_warmup_epochs=1",
        "model.dropout=0",
        "memory.dtype=float32",
        "memory.refresh=5",
        "memory.retrieved=6",
        "memory.drift_tiles=16",
        "memory.drift_limit=0.5",
        "run.probe_every=2",
        "run.checkpoint_every=1",
        *(override.replace("{root}", str(cohort)) for override in overrides),
    )
    save_config(config.validate(), file)
    return file


def log(out: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in read_metrics(out / "metrics.jsonl") if row["kind"] == kind]


def assert_same_run(one: Path, other: Path, rel: float = 2e-4) -> None:
    for kind in ("prefill", "codebook", "step", "drift", "fidelity", "epoch"):
        rows, others = log(one, kind), log(other, kind)
        assert len(rows) == len(others), kind
        assert rows or kind == "fidelity", kind  # an exact run has nothing to probe
        for row, there in zip(rows, others, strict=True):
            assert row.keys() == there.keys()
            for key in row.keys() - CLOCKS:
                if not isinstance(row[key], (int, float)):
                    assert row[key] == there[key], (kind, key)
                    continue
                near = row[key] == pytest.approx(there[key], rel=rel, abs=2e-5)
                # quantiles over several banks are means of each one's
                assert near or key.startswith("bank_drift_q"), (kind, key, row, there)


SURVIVAL = "{kind: survival, columns: [months, status]"
MODES = {
    "full": ["memory.mode=full", "loss.negatives=all"],
    "sampled": ["memory.mode=sampled", "memory.writer_decay=0.5", "loss.contrastive=siglip"],
    "exact": ["memory.mode=exact", "memory.refresh=0", "run.encode_chunk=11", "run.probe_every=0"],
    "soft": ["model.aggregator=soft", "memory.mode=full"],
    "survival": [
        "loss.contrastive=null",
        f"loss.tasks=[{SURVIVAL}, name: risk}}, {SURVIVAL}, name: hazard, method: hazard, bins: 3}}]",
    ],
    "guided": ["data.tiles=[{root}/tiles, {root}/coarse]", "memory.guided=0.5", "memory.candidates=12"],
    "by loss": ["memory.guided=0.5", "memory.candidates=12", "memory.guide=loss", "memory.mode=sampled"],
}
# several runs in one job: most of its time is that of starting
JOB = """
import gc
import sys
import torch.distributed
from dre_fast.train.config import load_config
from dre_fast.train.loop import Trainer
torch.distributed.init_process_group("gloo")
for config, out in zip(sys.argv[1::2], sys.argv[2::2]):
    Trainer(load_config(config), out).fit()
gc.collect()  # gloo's threads must be gone before the process ends
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_the_same_run_in_1_2_and_4_processes(cohort: Path, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    configs = {mode: config_of(cohort, tmp_path / f"{mode}.yaml", *more) for mode, more in MODES.items()}
    for mode, config in configs.items():
        Trainer(load_config(config), tmp_path / f"{mode}-1").fit()
    for n in (2, 4):
        runs = [str(path) for mode, config in configs.items() for path in (config, tmp_path / f"{mode}-{n}")]
        job = subprocess.Popen(
            [*torchrun, f"--nproc-per-node={n}", str(tmp_path / "job.py"), *runs],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        finish(job)
    for mode in configs:
        assert_same_run(tmp_path / f"{mode}-1", tmp_path / f"{mode}-2")
        assert_same_run(tmp_path / f"{mode}-1", tmp_path / f"{mode}-4")
        steps = log(tmp_path / f"{mode}-1", "step")
        assert len(steps) == 9
        assert len({row["loss"] for row in steps}) == 9


@pytest.mark.slow
def test_half_precision_where_a_process_has_no_slides(cohort: Path, tmp_path: Path) -> None:
    """Its empty outputs are fp32 and those of the others bf16: they are gathered as one dtype."""
    (tmp_path / "job.py").write_text(JOB)
    more = ("optim.amp=bf16", "run.shards=2", "optim.batch_size=2", "optim.epochs=1", "run.probe_every=0")
    config = config_of(cohort, tmp_path / "c.yaml", *more)
    Trainer(load_config(config), tmp_path / "one").fit()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    job = subprocess.Popen(
        [sys.executable, *torchrun, str(tmp_path / "job.py"), str(config), str(tmp_path / "two")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    finish(job)
    one, two = log(tmp_path / "one", "step"), log(tmp_path / "two", "step")
    assert [row["tiles"] for row in one] == [
        8,
        8,
        8,
        8,
        4,
    ]  # one slide in the last step, of the first process
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=2e-2)


NORMALISED = """
import gc
import sys
import torch
from torch import nn
import dre_fast.train.build
from dre_fast.nn.tile_encoders import TileEncoder
from dre_fast.train.config import load_config
from dre_fast.train.loop import Trainer

def build(name):
    encoder = TileEncoder(8)
    encoder.body = nn.Sequential(
        nn.Conv2d(3, 8, 8, stride=8), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    encoder.forward = lambda images: encoder.body(images.float() / 255)
    return encoder

dre_fast.train.build.build_tile_encoder = build
torch.distributed.init_process_group("gloo")
trainer = Trainer(load_config(sys.argv[1]), sys.argv[2])
start = trainer.model.tile_encoder.body[1].running_var.clone()
trainer.fit()
own = {name: value for name, value in trainer.model.tile_encoder.named_buffers() if value.is_floating_point()}
assert not own["body.1.running_var"].equal(start)
first, second = trainer.group.everyones(own)
for name in own:
    assert first[name].equal(second[name]), name
gc.collect()
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_running_statistics_of_batch_normalisation_are_the_same_in_all_processes(
    cohort: Path, tmp_path: Path
) -> None:
    (tmp_path / "job.py").write_text(NORMALISED)
    more = ("run.shards=2", "optim.epochs=1", "optim.head_warmup_epochs=0", "run.probe_every=0")
    config = config_of(cohort, tmp_path / "c.yaml", *more)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    job = subprocess.Popen(
        [sys.executable, *torchrun, str(tmp_path / "job.py"), str(config), str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    finish(job)


@pytest.mark.slow
def test_a_run_goes_on_in_another_number_of_processes_and_after_a_process_died(
    cohort: Path, tmp_path: Path
) -> None:
    config = config_of(cohort, tmp_path / "config.yaml")
    expected, out = tmp_path / "whole", tmp_path / "run"
    finish(start(1, config, expected))
    process = start(2, config, out)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "metrics.jsonl").exists() and len(log(out, "step")) >= 4:
            break
        time.sleep(0.005)
    worker = _workers(process.pid)[-1]
    os.kill(worker, signal.SIGKILL)
    output = process.communicate(timeout=120)[0].decode()  # the others end by themselves
    assert process.returncode != 0, output
    assert not _workers(process.pid)
    state = load_checkpoint(out / "last.pt")
    assert 3 <= state["step"] < 9
    assert len(list((out / state["bank"]).glob("*.safetensors"))) == 2
    finish(start(4, config, out))
    assert_same_run(expected, out)
    assert [p.name for p in out.glob("bank-*")] == [load_checkpoint(out / "last.pt")["bank"]]


def _workers(launcher: int) -> list[int]:
    """The processes that torchrun started."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, ProcessLookupError):
            continue
        if parent == launcher:
            found.append(int(entry.name))
    return sorted(found)


def test_summed_gradients_lie_in_memory_as_their_parameters_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused optimiser of the loop pairs numbers by their place in memory."""
    group = Group(torch.device("cpu"))
    group.world = 2
    monkeypatch.setattr("torch.distributed.all_reduce", lambda message: None)
    p = torch.nn.Parameter(torch.randn(5, 3, 2, 2).contiguous(memory_format=torch.channels_last))
    grad = torch.randn(5, 3, 2, 2)
    p.grad = grad.clone()
    before = p.detach().clone()
    group.add_gradients([p], [])
    torch.optim.AdamW([p], lr=0.1, weight_decay=0.0, fused=True).step()
    assert (p.detach() - before).sign().equal(-grad.sign())


def test_processes_wait_for_one_that_fills_its_cache_or_bank(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own patience is half an hour with gloo and ten minutes with NCCL; a cohort takes longer to decode."""
    asked: list[timedelta] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, timeout: asked.append(timeout))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert Group(torch.device("cpu")).world == 2
    assert asked[0] >= timedelta(days=1)


def test_slides_are_dealt_evenly_and_for_good() -> None:
    tiles = [int(n) for n in torch.randint(1, 5000, (103,), generator=torch.Generator().manual_seed(0))]
    dealt = deal_slides(tiles, 8, seed=3)
    assert torch.cat(dealt).sort().values.tolist() == list(range(103))
    assert {len(slides) for slides in dealt} == {12, 13}
    loads = [sum(tiles[s] for s in slides.tolist()) for slides in dealt]
    assert max(loads) - min(loads) <= max(tiles)
    assert all(a.equal(b) for a, b in zip(dealt, deal_slides(tiles, 8, seed=3), strict=True))
    assert deal_slides(tiles, 1, seed=0)[0].tolist() == list(range(103))
    with pytest.raises(ValueError, match="3 slides cannot be dealt to 4 shards"):
        deal_slides([1, 2, 3], 4, seed=0)


def test_batches_depend_on_the_shards_alone() -> None:
    dealt = deal_slides([5] * 9, 4, seed=0)
    steps = steps_per_epoch([len(slides) for slides in dealt], per_shard=1)
    assert steps == 3
    whole, sizes = visits(dict(enumerate(dealt)), per_shard=1, steps=steps, seed=1, epoch=2)
    assert whole.sort().values.tolist() == list(range(9))
    assert sizes == [4, 4, 1]
    together: list[set[int]] = [set(), set(), set()]
    for rank in range(2):
        mine = {shard: dealt[shard] for shard in shards_of(rank, 2, 4)}
        slides, own = visits(mine, per_shard=1, steps=steps, seed=1, epoch=2)
        for step, part in enumerate(slides.split(own)):
            together[step] |= set(part.tolist())
    assert together == [set(part.tolist()) for part in whole.split(sizes)]


def test_numbers_of_processes_that_do_not_fit_are_told(cohort: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"run\.shards=4 cannot be shared out to 3 processes"):
        shards_of(0, 3, 4)
    with pytest.raises(ConfigError, match=r"optim\.batch_size=2 must be a multiple of run\.shards=4"):
        Trainer(tiny_config(cohort, "run.shards=4"), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"run\.shards=0"):
        tiny_config(cohort, "run.shards=0").validate()


def test_the_shards_of_a_run_stay_those_of_its_start(tmp_path: Path, cohort: Path) -> None:
    written = tmp_path / "config.yaml"
    first: Config = with_shards(tiny_config(cohort, "optim.batch_size=4"), None, world=4)
    assert first.run.shards == 4
    save_config(first, written)
    assert with_shards(tiny_config(cohort, "optim.batch_size=4"), written, world=2).run.shards == 4
