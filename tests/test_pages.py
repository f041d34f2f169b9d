"""Every Python block of the pages runs: a page's blocks in one namespace, in an empty folder or in one made for it.

A block right under a line ``<!-- fragment: why -->`` is left out: lines that stand inside a function of another program.
Hosts that are not installed are imitated as far as their documented call sequences go; torchmil is the real one.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
PAGES = sorted(str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md"))
FENCE = re.compile(r"(<!-- fragment: [^\n]+ -->\n)?^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
HOSTS = ("clam", "transmil", "torchmil", "mil_lab", "trident", "stamp", "slideflow", "mil_baseline", "eva")
WITH_OWN_TEST = {
    *(f"integrations/{host}.md" for host in HOSTS),
    *("integrations/index.md", "protocols.md"),
    *("encoding.md", "bank.md", "training.md", "aggregators.md", "hub-and-logging.md"),  # in test_readme.py
    *("mil.md", "bags.md"),  # in train/test_mil_page.py and data/test_bags_page.py
}
LENGTHS = (40, 25, 1, 30)

Space = dict[str, Any]


def blocks(page: str) -> list[str]:
    found = FENCE.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))
    return [code for fragment, code in found if not fragment]


def run(page: str, space: Space | None = None) -> Space:
    space = {"__name__": "page"} if space is None else space
    for number, code in enumerate(blocks(page)):
        exec(compile(code, f"{page}, block {number}", "exec"), space)
    return space


def some_bags() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 1024, generator=generator) + 1 for n in LENGTHS]


def feature_files(folder: Path) -> None:
    (folder / "pt_files").mkdir()
    for number, bag in enumerate(some_bags()):
        torch.save(bag, folder / "pt_files" / f"S{number}.pt")


def padded(filler: float) -> tuple[Tensor, Tensor]:
    x = torch.full((len(LENGTHS), max(LENGTHS), 1024), filler)
    valid = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    for number, bag in enumerate(some_bags()):
        x[number, : len(bag)] = bag
    return x, valid


def one_step(model: nn.Module, logits: Tensor) -> None:
    """A training step, as every host takes it."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    optimizer.zero_grad()
    nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64)).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    optimizer.step()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a page."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fitted(folder: Path) -> Space:
    """After the page that all hosts begin with: features in pt_files, a fitted model, codebook.safetensors."""
    feature_files(folder)
    space = run("integrations/index.md")
    assert (folder / "codebook.safetensors").is_file()
    return space


def same_codebook(mil: Any, fitted: Space) -> None:
    assert torch.equal(mil.encoding.codebook, fitted["model"].encoding.codebook)


def test_clam(fitted: Space) -> None:
    model = run("integrations/clam.md")["CLAM_SB"](
        dropout=0.25, n_classes=2, embed_dim=1024, size_arg="small", k_sample=8, subtyping=True
    )
    same_codebook(model.mil, fitted)
    for bag in some_bags():
        logits, _, _, _, results = model(bag, label=torch.tensor([1]), instance_eval=True)
        one_step(model, logits + 0 * results["instance_loss"])
    model.eval()
    with torch.inference_mode():
        A = model(some_bags()[0])[3]
    assert A.shape == (1, 40)


def test_transmil(fitted: Space) -> None:
    cls = run("integrations/transmil.md")["ResidualModel"]
    names = inspect.getfullargspec(cls.__init__)
    assert (names.args, names.kwonlyargs, names.annotations) == (["self", "n_classes"], [], {})
    model = cls(n_classes=2)
    same_codebook(model.mil, fitted)
    results = model(data=some_bags()[0][None], label=torch.tensor([1]))
    assert int(results["Y_hat"]) in (0, 1)
    one_step(model, results["logits"])


def test_torchmil(folder: Path) -> None:
    for name in ("features", "labels"):
        (folder / name).mkdir()
    for number, bag in enumerate(some_bags()):
        np.save(folder / "features" / f"S{number}.npy", bag.numpy())
        np.save(folder / "labels" / f"S{number}.npy", np.array(number % 2))
    space = run("integrations/torchmil.md")
    assert space["logits"].shape == (1,)
    assert space["scores"].shape == (1, 40)
    assert space["trainer"].best_obj_metric is not None


def test_mil_lab(fitted: Space) -> None:
    space = run("integrations/mil_lab.md")
    same_codebook(space["model"].mil, fitted)
    assert space["log"]["attention"].shape == (1, 1, 300)
    assert space["model"].mil.head.tokens.weight.grad.abs().sum() > 0
    x, valid = padded(0.0)
    assert space["model"](x, attn_mask=valid)[0]["logits"].shape == (4, 2)


class _Processor:
    """Stands for TRIDENT's: finds the folder of tile features by the slide encoder's name, and calls the encoder."""

    def __init__(self, job_dir: str, wsi_source: str) -> None:
        self.job_dir = Path(job_dir)

    def run_slide_feature_extraction_job(self, slide_encoder: Any, coords_dir: str, device: str) -> None:
        names = sys.modules["trident.slide_encoder_models.load"].slide_to_patch_encoder_name  # type: ignore[attr-defined]
        slide_encoder.to(device).eval()
        self.found = {}
        for path in (self.job_dir / coords_dir / f"features_{names[slide_encoder.enc_name]}").glob("*.h5"):
            with h5py.File(path) as file, torch.inference_mode():
                batch = {"features": torch.from_numpy(file["features"][:])[None], "coords": None}
                self.found[path.stem] = slide_encoder(batch, device).float().cpu().numpy().squeeze()


def test_trident(fitted: Space, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(fitted["model"].state_dict(), folder / "residual_mil.pt")
    source = folder / "trident_processed" / "20x_256px_0px_overlap"
    (source / "features_uni_v1").mkdir(parents=True)
    for number, bag in enumerate(some_bags()):
        with h5py.File(source / "features_uni_v1" / f"S{number}.h5", "w") as file:
            file["features"], file["coords"] = bag.numpy(), np.zeros((len(bag), 2), np.int64)
    modules = {name: ModuleType(name) for name in ("trident", "trident.slide_encoder_models")}
    modules["trident"].Processor = _Processor  # type: ignore[attr-defined]
    load = modules["trident.slide_encoder_models.load"] = ModuleType("load")
    load.slide_to_patch_encoder_name = {"titan": "conch_v15"}  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    space = run("integrations/trident.md")
    assert set(space["processor"].found) == {"S0", "S1", "S2", "S3"}
    for name, embedding in space["processor"].found.items():
        with h5py.File(source / "slide_features_residual_mil" / f"{name}.h5") as file:
            np.testing.assert_allclose(file["features"][:], embedding, atol=1e-5)


def test_stamp(fitted: Space) -> None:
    cls = run("integrations/stamp.md")["ResidualModel"]
    settings = {"dim_input": 1024, "dim_output": 2, "total_steps": 5, "max_lr": 1e-4}
    known = inspect.signature(cls.__init__).parameters
    model = cls(**{name: value for name, value in settings.items() if name in known})
    same_codebook(model.mil, fitted)
    bags, _ = padded(0.0)
    one_step(model, model(bags, coords=torch.zeros(*bags.shape[:2], 2), mask=None))


def test_slideflow(fitted: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    models: dict[str, Callable[[], type]] = {}
    host, mil = ModuleType("slideflow"), ModuleType("slideflow.mil")
    host.mil = mil  # type: ignore[attr-defined]
    mil.register_model = lambda tag: lambda function: models.setdefault(tag, function)  # type: ignore[attr-defined]
    mil.mil_config = lambda name, **settings: SimpleNamespace(model_fn=models[name](), **settings)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "slideflow", host)
    monkeypatch.setitem(sys.modules, "slideflow.mil", mil)
    config = run("integrations/slideflow.md")["config"]
    model = config.model_fn(1024, 2)
    assert config.model_fn.use_lens
    same_codebook(model.mil, fitted)
    bags, _ = padded(0.0)
    one_step(model, model(bags, torch.tensor(LENGTHS)))


def test_mil_baseline(fitted: Space) -> None:
    cls = run("integrations/mil_baseline.md")["AB_MIL"]
    model = cls(512, 128, 2, 0.1, nn.ReLU(), 1024)
    same_codebook(model.mil, fitted)
    one_step(model, model(some_bags()[0][None])["logits"])
    assert model.eval()(some_bags()[0][None], return_WSI_attn=True)["WSI_attn"].shape == (40, 1)


def test_eva(fitted: Space) -> None:
    space = run("integrations/eva.md")
    same_codebook(space["head"].mil, fitted)
    assert space["logits"].shape == (2, 1)
    assert not space["scores"][0, 350:].any()


def test_protocols(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "train"))
    from train_cohort import tiny_config, write_cohort

    from dre_fast.train.config import save_config

    (folder / "cohort").mkdir()
    write_cohort(folder / "cohort", slides=10, side=64, reports=False)
    quick = ("loss.contrastive=null", "data.reports=null", "optim.epochs=1", "run.threads=0")
    save_config(tiny_config(folder / "cohort", *quick), folder / "config.yaml")
    assert run("protocols.md")["scores"]
    assert (folder / "cv" / "scores.md").is_file()


@pytest.mark.parametrize("page", [page for page in PAGES if page not in WITH_OWN_TEST and blocks(page)])
def test_blocks_of_other_pages_run_as_they_are(page: str, folder: Path) -> None:
    run(page)


@pytest.mark.parametrize("page", PAGES)
def test_fences_are_whole(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert text.count("```") % 2 == 0
    # every Python fence is seen by the expression above, so none is left out by a slip
    assert len(FENCE.findall(text)) == len(re.findall(r"^```(?:python|py)\b", text, re.MULTILINE))


def test_torchmil_is_the_real_one() -> None:
    spec = importlib.util.find_spec("torchmil")
    assert spec is not None, "pip install torchmil==1.0.2: the pages and the adapter are tested against it"
