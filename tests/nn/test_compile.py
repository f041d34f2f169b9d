"""Registered operations pass opcheck, and the public functions compile to one graph, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from dre_fast import (
    DRESLCL,
    MemoryBank,
    ResidualEncoding,
    SlideEncoder,
    SlideReportLoss,
    ops,
    reference,
    residual_encode,
)
from dre_fast.ops import contrast, encode, native, normalize

OPS = torch.ops.dre_fast
CU = torch.tensor([0, 3, 3, 20])
SOFT = {
    "scale": (torch.rand(4), None, None),
    "weight": (None, torch.randn(4, 6), None),
    "weight+bias": (None, torch.randn(4, 6), torch.randn(4)),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_hard_ops(dtype: torch.dtype) -> None:
    x, codebook = torch.randn(20, 6).to(dtype), torch.randn(4, 6)
    torch.library.opcheck(OPS.hard_encode.default, (x, codebook, CU))
    torch.library.opcheck(OPS.hard_encode.default, (x[:0], codebook, CU[:1]))
    residuals, _, codes, _ = OPS.hard_encode(x, codebook, CU)
    torch.library.opcheck(OPS.hard_encode_backward.default, (residuals, codes, CU))


@pytest.mark.parametrize("kind", SOFT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_soft_ops(kind: str, dtype: torch.dtype) -> None:
    x, codebook = torch.randn(20, 6).to(dtype), torch.randn(4, 6)
    torch.library.opcheck(OPS.soft_encode.default, (x, codebook, CU, *SOFT[kind]))
    residuals, mass = OPS.soft_encode(x, codebook, CU, *SOFT[kind])
    torch.library.opcheck(
        OPS.soft_encode_backward.default, (residuals, mass, x, codebook, CU, mass, *SOFT[kind])
    )


def test_contrast_ops() -> None:
    slides, reports = torch.randn(5, 6), torch.randn(11, 6)
    cases, report_cases = torch.arange(5), torch.arange(11)
    scale, bias, grad = torch.tensor(3.0), torch.tensor(-1.0), torch.randn(5)
    torch.library.opcheck(OPS.info_nce_rows.default, (slides, reports, cases, report_cases, scale, 4))
    _, lse, positives = OPS.info_nce_rows(slides, reports, cases, report_cases, scale, 4)
    torch.library.opcheck(
        OPS.info_nce_rows_backward.default,
        (grad, slides, reports, cases, report_cases, scale, lse, positives, 4),
    )
    torch.library.opcheck(OPS.siglip_rows.default, (slides, reports, cases, report_cases, scale, bias, 4))
    torch.library.opcheck(
        OPS.siglip_rows_backward.default, (grad, slides, reports, cases, report_cases, scale, bias, 4)
    )


def grads(fn, *leaves: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
    fresh = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = fn(*fresh)
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), fresh)]


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_ragged_bags_compile_to_one_graph(kind: str) -> None:
    torch._dynamo.reset()

    def encode_bags(x: Tensor, codebook: Tensor, cu: Tensor, scale: Tensor) -> Tensor:
        options = {} if kind == "hard" else {"assignment": "soft", "scale": scale}
        return residual_encode(x, codebook, cu_seqlens=cu, normalize=("intra", "l2"), **options)

    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(encode_bags, fullgraph=True, dynamic=True, backend=backend)
    codebook, scale = torch.randn(4, 7), torch.rand(4)
    # all sizes of the first call differ: torch.compile takes equal ones for one size
    for lengths in ([5, 0, 9, 1], [3, 30], [17, 2, 2, 6, 8]):
        cu = torch.tensor([0, *lengths]).cumsum(0)
        x = torch.randn(int(cu[-1]), 7)

        def run(fn, x: Tensor = x, cu: Tensor = cu) -> list[Tensor]:  # type: ignore[no-untyped-def]
            return grads(lambda a, c: fn(a, c, cu, scale), x, codebook)

        for one, other in zip(run(compiled), run(encode_bags), strict=True):
            torch.testing.assert_close(one, other)
    assert backend.frame_count == 1  # ragged shapes are dynamic: nothing is compiled again


@pytest.mark.parametrize("layout", ["mask", "index", "index+cu", "padded"])
def test_every_layout_compiles(layout: str) -> None:
    torch._dynamo.reset()
    codebook = torch.randn(4, 6)
    extra = {
        "mask": {"mask": torch.rand(3, 7) > 0.4},
        "index": {"index": torch.tensor([[0, 5, -1], [2, 2, 3]])},
        "index+cu": {"index": torch.tensor([0, 5, -1, 2]), "cu_seqlens": torch.tensor([0, 1, 4])},
        "padded": {},
    }[layout]
    x = torch.randn(3, 7, 6) if layout in ("mask", "padded") else torch.randn(9, 6)

    def run(x: Tensor) -> Tensor:
        return residual_encode(x, codebook, normalize="l2", **extra)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for one, other in zip(grads(compiled, x), grads(run, x), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
def test_module_in_a_network_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(10, 6), ResidualEncoding(6, 4, "soft", learnable=True))
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    for rows in (11, 40):
        x = torch.randn(rows, 10)
        expected = torch.autograd.grad(net(x).sin().sum(), list(net.parameters()))
        found = torch.autograd.grad(compiled(x).sin().sum(), list(net.parameters()))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["full", 3, "none"])
def test_the_training_forward_compiles_to_one_graph(memory: str | int) -> None:
    torch._dynamo.reset()
    bank = MemoryBank([10, 7], 6, codebook=torch.randn(4, 6) / 2)
    for slide, n in enumerate((10, 7)):
        bank.write(slide, torch.arange(n), torch.randn(n, 6), step=0)
    tile_encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    slide_encoder = SlideEncoder(6, 4, width=8, depth=1, heads=2)
    model = DRESLCL(tile_encoder, bank, slide_encoder, tasks={"t": 2}, memory=memory, grad_scale="unbiased")
    slides, images = torch.tensor([0, 1]), torch.rand(2, 3, 3, 2, 2)
    tiles = bank.sample(slides, 3, cycle=1, seed=5)

    def run(images: Tensor, slides: Tensor, tiles: Tensor) -> Tensor:
        return model(images, slides, tiles, visit=1, seed=5).logits["t"]

    found = []
    for fn in (run, torch.compile(run, fullgraph=True)):
        logits = fn(images, slides, tiles)
        found.append([logits, *torch.autograd.grad(logits.sin().sum(), list(model.parameters()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("negatives", ["batch", "all"])
@pytest.mark.parametrize("kind", ["infonce", "siglip"])
def test_loss_compiles(kind: str, negatives: str) -> None:
    torch._dynamo.reset()
    loss = SlideReportLoss(kind, negatives)
    reports = torch.randn(9, 6)
    loss.set_reports(reports, torch.arange(9))
    cases = torch.tensor([2, 5, 5])

    def run(slides: Tensor) -> Tensor:
        return loss(slides, reports[cases], cases)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    slides = torch.randn(3, 6)
    for one, other in zip(grads(compiled, slides), grads(run, slides), strict=True):
        torch.testing.assert_close(one, other)


def test_backends_are_named() -> None:
    chosen = ops.backends()
    compiled = "C++" if native.provides("hard_encode") else "reference"
    assert chosen["hard_encode"] == f"CPU: {compiled}, CUDA: Triton"
    assert chosen["normalize_residuals"] == "CPU: reference, CUDA: Triton"
    assert set(encode.NAMES) | set(contrast.NAMES) | set(normalize.NAMES) <= set(chosen)
    assert encode.backend("hard_encode", "cuda", torch.float64) == "reference"
    for module in (encode, contrast, normalize):
        with pytest.raises(ValueError, match="called 'nothing'"):
            module.backend("nothing")


def test_sizes_beyond_the_kernels_run_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="needs triton: pip install triton (Linux only)")
    monkeypatch.setattr(encode, "backend", lambda *_: "Triton")  # as on a GPU
    for words, dim in ((1025, 3), (2, 2049)):
        x, codebook = torch.randn(20, dim), torch.randn(words, dim)
        found = OPS.hard_encode(x, codebook, CU)
        for one, other in zip(found, reference.hard_encode(x, codebook, CU), strict=True):
            assert torch.equal(one, other)
