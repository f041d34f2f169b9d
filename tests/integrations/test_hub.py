"""Models in folders and on the Hub: the same logits after loading, what would be uploaded, faults by name."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mil_bags import ASSIGNMENTS, CODEWORDS, DIM, fitted, plain_logits

pytest.importorskip("huggingface_hub", reason="needs huggingface_hub: pip install 'dre_fast[train]'")
sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

from safetensors.torch import load_file, save_file
from train_cohort import tiny_config, write_cohort

from dre_fast import ResidualMIL
from dre_fast.cli import main
from dre_fast.data.embeddings import SlideEmbeddings
from dre_fast.integrations.hub import Card, export_run, load_exported
from dre_fast.train.inference import load_run
from dre_fast.train.loop import Trainer

THREE = ["README.md", "config.json", "model.safetensors"]


class FakeApi:
    """The Hub's client: keeps what is uploaded."""

    made: list[dict[str, Any]]
    uploaded: dict[str, dict[str, bytes]]

    def __init__(self, token: str | None = None) -> None:
        assert token is None

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> Any:
        assert exist_ok
        self.made.append({"repo": repo_id, "private": private})
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, repo_id: str, folder_path: Path, **options: Any) -> str:
        files = [file for file in Path(folder_path).rglob("*") if file.is_file()]
        self.uploaded[repo_id] = {
            file.relative_to(folder_path).as_posix(): file.read_bytes() for file in files
        }
        return f"https://huggingface.co/{repo_id}/commit/1"


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    FakeApi.made, FakeApi.uploaded = [], {}
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", FakeApi)
    return FakeApi


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names asked of the Hub, which does not answer."""
    asked: list[str] = []

    def download(name: str, **options: Any) -> str:
        asked.append(name)
        raise ConnectionError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return asked


@pytest.mark.parametrize("head", ["transformer", "light"])
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_a_folder_gives_the_same_logits(assignment: str, head: str, tmp_path: Path) -> None:
    model = fitted(assignment, head=head, dropout=0.1, normalize=("intra", "power", "l2"), depth=1)
    assert model.save_pretrained(tmp_path / "m") == tmp_path / "m"
    assert sorted(file.name for file in (tmp_path / "m").iterdir()) == THREE
    again = ResidualMIL.from_pretrained(tmp_path / "m")
    assert not again.training
    assert again.fitted
    assert again.options == model.options
    assert torch.equal(plain_logits(again), plain_logits(model))


def test_a_new_classifier_and_a_subclass(tmp_path: Path) -> None:
    class Mine(ResidualMIL):
        pass

    model = fitted()
    model.reset_classifier(5)
    model.save_pretrained(str(tmp_path))
    again = Mine.from_pretrained(str(tmp_path))
    assert type(again) is Mine
    assert torch.equal(plain_logits(again), plain_logits(model))


def test_the_card_says_what_is_known_and_what_is_not(tmp_path: Path) -> None:
    fitted().save_pretrained(tmp_path / "bare")
    bare = (tmp_path / "bare" / "README.md").read_text()
    for title in ("Intended use", "How to use it", "Data", "Splits", "Metrics", "Model"):
        assert f"\n## {title}\n" in bare
    assert bare.count("Not stated by the author") == 3
    assert "no medical device" in bare
    assert (
        f'ResidualMIL.from_pretrained("bare")\nlogits = model(features)  # one slide, [tiles, {DIM}]' in bare
    )
    card = Card(
        title="Lung",
        data="TCGA-LUAD and TCGA-LUSC.",
        features="UNI, 256 px at 0.5 um/px",
        splits={"train": {"slides": 96, "cases": 81}, "test": {"slides": 32}},
        metrics={"AUC, test slides": 0.91234},
        license="apache-2.0",
    )
    fitted().save_pretrained(tmp_path / "full", card=card)
    full = (tmp_path / "full" / "README.md").read_text()
    for said in (
        "# Lung\n",
        "TCGA-LUAD and",
        "UNI, 256 px",
        "| train | 96 | 81 |",
        "| AUC, test slides | 0.912 |",
    ):
        assert said in full
    assert "license: apache-2.0" in full.split("---")[1]
    assert "library_name: dre_fast" in full.split("---")[1]
    assert "Not stated" not in full
    (tmp_path / "full" / "README.md").write_text("by hand")
    with pytest.warns(UserWarning, match=r"README\.md was there and stays as it is"):
        fitted().save_pretrained(tmp_path / "full", card=card)
    assert (tmp_path / "full" / "README.md").read_text() == "by hand"
    with warnings.catch_warnings():  # the same once more
        warnings.simplefilter("error")
        fitted().save_pretrained(tmp_path / "bare")


def test_pushing_uploads_three_files(api: type[FakeApi], tmp_path: Path) -> None:
    model = fitted()
    assert model.push_to_hub("me/lung", private=True).endswith("me/lung/commit/1")
    assert api.made == [{"repo": "me/lung", "private": True}]
    assert sorted(api.uploaded["me/lung"]) == THREE
    for name, content in api.uploaded["me/lung"].items():
        (tmp_path / name).write_bytes(content)
    assert torch.equal(plain_logits(ResidualMIL.from_pretrained(tmp_path)), plain_logits(model))
    assert 'from_pretrained("me/lung")' in api.uploaded["me/lung"]["README.md"].decode()


def test_a_repository_is_fetched_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = fitted()
    model.save_pretrained(tmp_path)
    asked: list[Any] = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, sorted(options.pop("allow_patterns")), options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    again = ResidualMIL.from_pretrained("me/lung", revision="v1")
    assert asked == [("me/lung", THREE, {"revision": "v1"})]
    assert torch.equal(plain_logits(again), plain_logits(model))


def test_bad_folders_are_named(no_network: list[str], tmp_path: Path) -> None:
    def refused(name: Any, match: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=match):
            ResidualMIL.from_pretrained(name)

    refused(tmp_path / "gone", "gone: no such folder, and no name of a repository", FileNotFoundError)
    assert no_network == []
    refused(
        "me/gone", r"me/gone: no such folder, and the Hub does not give it \(no network\)", FileNotFoundError
    )
    assert no_network == ["me/gone"]
    refused(tmp_path, "holds no config.json")
    with pytest.raises(ValueError, match="not fitted"):
        ResidualMIL(DIM, 2).save_pretrained(tmp_path)
    fitted().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "config.json").write_text(json.dumps({**config, "codewords": CODEWORDS + 1}))
    refused(tmp_path, r"(?s)model\.safetensors: does not fit config\.json.*encoding\.codebook")
    (tmp_path / "config.json").write_text(json.dumps({**config, "colour": 1}))
    refused(tmp_path, r"config\.json: not the config of a dre_fast\.ResidualMIL .*colour")
    for key, value in (("dim", -1), ("dropout", 3.0), ("head", "heavy"), ("width", 33)):
        (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
        refused(tmp_path, r"config\.json: not the config of a dre_fast\.ResidualMIL")
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "heads": 2 * config["heads"]})
    )  # fits as well
    refused(tmp_path, r"config\.json: heads is 8, and model\.safetensors was saved with 4")
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = load_file(tmp_path / "model.safetensors")
    save_file(state, tmp_path / "model.safetensors")  # of an older version: no options in the header
    assert ResidualMIL.from_pretrained(tmp_path).fitted
    state["classifier.bias"][0] = float("nan")
    save_file(state, tmp_path / "model.safetensors")
    refused(tmp_path, r"model\.safetensors: classifier\.bias holds NaN or Inf")
    (tmp_path / "model.safetensors").write_bytes(weights)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    refused(tmp_path, r"config\.json: of model_type 'bert', not dre_fast\.ResidualMIL")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, r"config\.json: not readable")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(weights[:100])
    refused(tmp_path, r"model\.safetensors: damaged")
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, r"holds no model\.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    (root / "cohort").mkdir()
    write_cohort(root / "cohort", side=64)
    Trainer(tiny_config(root / "cohort", "optim.epochs=1"), root / "run").fit()
    return root


def test_a_run_is_exported_and_pushed(
    trained: Path, tmp_path: Path, api: type[FakeApi], capsys: pytest.CaptureFixture[str]
) -> None:
    tables, out = trained / "cohort" / "cohort.csv", tmp_path / "out"
    applied = ["--cohort", str(tables), "--tiles", str(trained / "cohort" / "tiles"), "--mpp", "1.0"]
    encode = [*applied, "--split", "val", "--out"]
    assert main(["encode", str(trained / "run"), *encode, str(tmp_path / "a.safetensors")]) == 0
    judged = [
        "--cohort",
        str(tables),
        "--split",
        "val",
        "--bootstrap",
        "0",
        "--out",
        str(tmp_path / "scores"),
    ]
    assert main(["evaluate", str(tmp_path / "a.safetensors"), *judged]) == 0
    said = [
        "--scores",
        str(tmp_path / "scores"),
        "--data",
        "Made up.",
        "--license",
        "mit",
        "--push",
        "me/run",
    ]
    capsys.readouterr()
    assert main(["export", str(trained / "run"), "--out", str(out), *said]) == 0
    printed = capsys.readouterr().out.split()
    assert printed == [
        *(str(out / name) for name in ("config.json", "README.md", "model.safetensors")),
        printed[-1],
    ]
    assert sorted(api.uploaded["me/run"]) == THREE
    for name, content in api.uploaded["me/run"].items():
        assert (out / name).read_bytes() == content
        assert str(trained).encode() not in content  # no path of this machine
    card = (out / "README.md").read_text()
    for part in (
        "Made up.",
        "license: mit",
        "| train | 6 | 6 | 6 | 24 |",
        "AUC: kind",
        "Unseen slides",
        "Training cost",
    ):
        assert part in card
    assert "Not stated" not in card

    # and a command takes the folder as it takes the run
    assert main(["encode", str(out), *encode, str(tmp_path / "b.safetensors")]) == 0
    one, other = (SlideEmbeddings.load(tmp_path / f"{name}.safetensors") for name in "ab")
    assert torch.equal(one.logits["kind"], other.logits["kind"])
    loaded, own = load_exported(out), load_run(trained / "run")
    assert [task.name for task in loaded.tasks] == ["kind", "EGFR"]
    assert all(torch.equal(a, b) for a, b in zip(loaded.model.parameters(), own.model.parameters()))
    with pytest.raises(ValueError, match=r"load it with dre_fast\.integrations\.hub\.load_exported"):
        ResidualMIL.from_pretrained(out)


def test_faults_of_an_export(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="the run's own folder"):
        export_run(trained / "run", trained / "run")
    assert main(["export", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "no trained model there" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    nothing = ["--scores", str(trained / "cohort")]
    assert main(["export", str(trained / "run"), "--out", str(tmp_path / "out"), *nothing]) == 2
    assert "holds no metrics.json" in capsys.readouterr().err
    fitted().save_pretrained(tmp_path / "mil")
    with pytest.raises(ValueError, match=r"load it with ResidualMIL\.from_pretrained"):
        load_exported(tmp_path / "mil")
