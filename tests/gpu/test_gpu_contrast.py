"""What only a GPU shows of the loss against all reports: full sizes, memory, graphs, torch.compile, registered ops."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install triton (Linux only)")

from contrast_check import KINDS, check, make
from dre_fast import SlideReportLoss
from dre_fast.kernels import contrast_kernels, info_nce_rows, info_nce_rows_backward, siglip_rows
from dre_fast.ops import contrast
from dre_fast.reference.encode import l2_normalize

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("slides", "reports", "dim"),
    [(1, 1, 64), (3, 63, 100), (32, 20_000, 768), (65, 1000, 384), (512, 30_001, 512), (17, 5000, 4096)],
)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_sizes(slides: int, reports: int, dim: int, kind: str, dtype: torch.dtype, scale: float) -> None:
    check(*make(slides, reports, dim, dtype, "cuda"), kind, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_sums_of_like_vectors(dtype: torch.dtype) -> None:
    """Cosines near 1 over 4096 numbers: where sums that are not rounded to nearest would drift."""
    slides, reports, *cases = make(40, 300, 4096, dtype, "cuda")
    shared = l2_normalize(torch.rand(1, 4096, device="cuda"))
    near = [l2_normalize(10 * shared + t.float()) for t in (slides, reports)]
    for kind in KINDS:
        check(near[0], near[1].to(dtype), *cases, kind, 100.0)


def test_more_than_two_to_the_31_numbers() -> None:
    reports, dim = 2_200_000, 1024
    r = torch.randn(reports, dim, device="cuda", dtype=torch.bfloat16).div_(dim**0.5)
    slides = r[-2:].float()
    report_cases = torch.arange(reports, device="cuda")
    one, grad = torch.tensor(1.0, device="cuda"), torch.ones(2, device="cuda")
    given = (slides, r, report_cases[-2:].clone(), report_cases, one)
    loss, lse, positives = info_nce_rows(*given)
    assert positives.tolist() == [1, 1]
    d_slides, _ = info_nce_rows_backward(grad, *given, lse, positives)
    double = [t.double() for t in (grad, slides, one)]
    total = torch.zeros(2, device="cuda", dtype=torch.float64)
    pulled = torch.zeros(2, dim, device="cuda", dtype=torch.float64)
    for part in r.split(1 << 17):
        weights = (double[1] @ part.double().T).exp()
        total += weights.sum(1)
        pulled += weights @ part.double()
    own = slides.double().square().sum(1)
    torch.testing.assert_close(loss.double(), total.log() - own, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        d_slides.double(), pulled / total[:, None] - slides.double(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["infonce", "siglip"])
def test_peak_memory_does_not_grow_with_the_reports(kind: str) -> None:
    peaks = []
    for count in (50_000, 400_000):
        loss = SlideReportLoss(kind, "all").cuda()
        loss.set_reports(torch.randn(count, 128), torch.arange(count))
        x = torch.randn(256, 128, device="cuda", requires_grad=True)
        cases = torch.arange(256, device="cuda")
        for _ in range(2):  # the first call compiles
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            value = mean_loss(loss, x, cases)
            value.backward()
            torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del loss, value
    assert peaks[1] <= peaks[0] + (1 << 20), peaks
    assert peaks[1] < 256 * 400_000 * 4 / 4


def mean_loss(loss: SlideReportLoss, x: torch.Tensor, cases: torch.Tensor) -> torch.Tensor:
    """The registered operation of a loss module alone. (The module's own look for missing reports sees all pairs.)"""
    assert loss.reports is not None
    assert loss.report_cases is not None
    given = (l2_normalize(x), loss.reports, cases, loss.report_cases, loss.scale)
    if loss.bias is None:
        return contrast.info_nce_rows(*given)[0].mean()
    return contrast.siglip_rows(*given, loss.bias).mean()


def test_cuda_graph_replays_with_new_slides() -> None:
    slides, reports, slide_cases, report_cases = make(40, 5000, 384, torch.bfloat16, "cuda")
    scale, grad = torch.tensor(20.0, device="cuda"), torch.full((40,), 1 / 40, device="cuda")

    def both() -> tuple[torch.Tensor, ...]:
        given = (slides, reports, slide_cases, report_cases, scale)
        loss, lse, positives = info_nce_rows(*given)
        sigmoid = siglip_rows(*given, -scale)
        return loss, lse, positives, sigmoid, *info_nce_rows_backward(grad, *given, lse, positives)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        both()  # compiles outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    new = make(40, 5000, 384, torch.bfloat16, "cuda", seed=1)
    for old, other in zip((slides, reports, slide_cases, report_cases), new, strict=True):
        old.copy_(other)
    scale.fill_(50.0)
    graph.replay()
    for replayed, eager in zip(captured, both(), strict=True):
        assert torch.equal(replayed, eager)


def test_many_sizes_compile_nothing_new() -> None:
    kernels = [k for k in vars(contrast_kernels).values() if hasattr(k, "device_caches")]

    def compiled() -> int:
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    slides, reports, slide_cases, report_cases = make(32, 2000, 64, torch.bfloat16, "cuda")
    scale = torch.tensor(5.0, device="cuda")
    counts = []
    for count in [2000, 1, 16, *range(17, 317)]:
        few = 1 + count % 32
        given = (slides[:few], reports[:count], slide_cases[:few], report_cases[:count], scale)
        found = info_nce_rows(*given)
        info_nce_rows_backward(torch.ones(few, device="cuda"), *given, *found[1:])
        counts.append(compiled())
    assert counts[0] == counts[-1] > 0


def test_registered_operations() -> None:
    slides, reports, *cases = make(5, 300, 64, torch.float32, "cuda")
    given = (slides, reports, *cases, torch.tensor(5.0, device="cuda"))
    found, bias = info_nce_rows(*given), torch.tensor(-1.0, device="cuda")
    for name, arguments in (
        ("info_nce_rows", (*given, 64)),
        ("info_nce_rows_backward", (found[0], *given, *found[1:], 64)),
        ("siglip_rows", (*given, bias, 64)),
        ("siglip_rows_backward", (found[0], *given, bias, 64)),
    ):
        assert contrast.backend(name, "cuda") == "Triton"
        torch.library.opcheck(getattr(torch.ops.dre_fast, name).default, arguments)


@pytest.mark.parametrize("kind", ["infonce", "siglip"])
def test_module_in_float64_and_compiled(kind: str) -> None:
    reports, x = torch.randn(3000, 96), torch.randn(20, 96, device="cuda")
    cases = torch.arange(20, device="cuda") // 2

    def run(dtype: torch.dtype, compiled: bool) -> list[torch.Tensor]:
        loss = SlideReportLoss(kind, "all").cuda().to(dtype)
        loss.set_reports(reports.to(dtype), torch.arange(3000))
        leaf = x.to(dtype).requires_grad_()
        own = loss.reports[cases]
        forward = torch.compile(loss, fullgraph=True) if compiled else loss
        value = forward(leaf, own, cases)
        return [value.detach(), *torch.autograd.grad(value, [leaf, *loss.parameters()])]

    exact = run(torch.float64, False)
    for compiled in (False, True):
        for one, right in zip(run(torch.float32, compiled), exact, strict=True):
            torch.testing.assert_close(one.double(), right, rtol=1e-4, atol=1e-5)


def test_wrong_devices_are_refused() -> None:
    slides, reports, *cases = make(3, 9, 16, torch.float32, "cuda")
    scale = torch.tensor(1.0, device="cuda")
    with pytest.raises(ValueError, match="share a device"):
        info_nce_rows(slides, reports.cpu(), *cases, scale)
    with pytest.raises(ValueError, match="need a CUDA device"):
        info_nce_rows(slides.cpu(), reports.cpu(), *(c.cpu() for c in cases), scale.cpu())
