"""What dre_fast is compared with computes the same thing, gradients included."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.functional import normalize

from benchmarks import peers, peers_soft
from benchmarks.registry import CPU_ENCODE, GPU_ENCODE, Encode, make, offsets
from dre_fast import reference
from error_rule import within_error_rule

ONE_BAG = Encode("one bag", 700, 24, 5, 1, torch.float32)
SEVERAL = Encode("several bags", 700, 24, 5, 6, torch.float32, ragged=True)
EAGER = [
    *(f"gemm: {name}" for name in peers.GEMM_FORMS),
    *peers.OTHER_PEERS,
]


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("shape", [ONE_BAG, SEVERAL], ids=lambda shape: shape.id)
def test_hard_peers_agree_with_the_reference(shape: Encode, name: str, monkeypatch) -> None:
    monkeypatch.setitem(peers.RESIDUAL_VALUES, "cpu", 5 * 24 * 100)
    rows, codebook, cu_seqlens = make(shape)
    plain = reference.hard_encode(rows, codebook, cu_seqlens)[0]
    exact = reference.hard_encode(rows.double(), codebook.double(), cu_seqlens)[0]
    got = peers.resolve(name)(rows, codebook, cu_seqlens)
    assert got.dtype == torch.float32
    # sums that cancel against counts lose digits of their size; that is the peers' own weakness, within bounds
    within_error_rule(got, plain, exact, atol=1e-4, name=name)


@pytest.mark.parametrize("kind", list(peers.KINDS))
@pytest.mark.parametrize("bags", [1, 6])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_candidate_has_a_function(kind: str, bags: int, device: str) -> None:
    names = peers.candidates(kind, bags, device)
    assert names
    assert all(name.startswith(f"{kind}: ") and callable(peers.resolve(name)) for name in names)


def test_the_quickest_is_picked_and_failures_are_told() -> None:
    def fails() -> None:
        raise torch.OutOfMemoryError("1000 GB asked for")

    def slow() -> None:
        for _ in range(200):
            torch.zeros(1000)

    name, failed = peers.quickest({"slow": slow, "fails": fails, "quick": lambda: None}, "cpu")
    assert name == "quick"
    assert failed == {"fails": "1000 GB asked for"}
    with pytest.raises(RuntimeError, match="1000 GB"):
        peers.quickest({"fails": fails}, "cpu")


@pytest.mark.parametrize("assignment", ["Deep-TEN", "NetVLAD"])
@pytest.mark.parametrize("name", [name for name in peers_soft.SOFT_PEERS if name != "gemm, compiled"])
def test_soft_peers_and_their_gradients_agree_in_float64(name: str, assignment: str, monkeypatch) -> None:
    if not peers_soft.covers(name, assignment, 0, "cpu"):
        pytest.skip(f"{name} does not know {assignment}")
    # chunks of seven rows, the last one short
    monkeypatch.setitem(peers.RESIDUAL_VALUES, "cpu", 3 * 5 * 24 * 7)
    bags, n, dim, words = 3, 40, 24, 5
    x = normalize(torch.randn(bags * n, dim, dtype=torch.float64), dim=1)
    parameters = [torch.rand(words, dtype=torch.float64) + 3]
    if assignment == "NetVLAD":
        parameters = [torch.randn(words, dim, dtype=torch.float64), torch.randn(words, dtype=torch.float64)]
    leaves = [t.requires_grad_() for t in (x, torch.randn(words, dim, dtype=torch.float64), *parameters)]
    by = (
        peers_soft.Assignment(scale=leaves[2])
        if assignment == "Deep-TEN"
        else peers_soft.Assignment(weight=leaves[2], bias=leaves[3])
    )
    cu_seqlens = torch.arange(bags + 1) * n
    V = peers_soft.SOFT_PEERS[name](leaves[0], leaves[1], bags, by)
    expected, _ = reference.soft_encode(leaves[0], leaves[1], cu_seqlens, by.scale, by.weight, by.bias)
    grad = torch.randn_like(V)
    torch.testing.assert_close(V, expected)
    for got, right in zip(
        torch.autograd.grad(V, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(got, right)


@pytest.mark.parametrize("shape", [*GPU_ENCODE, *CPU_ENCODE], ids=lambda shape: shape.id)
def test_offsets_cover_every_row(shape: Encode) -> None:
    bounds = offsets(shape)
    sizes = [b - a for a, b in itertools.pairwise(bounds)]
    assert (bounds[0], bounds[-1], len(sizes)) == (0, shape.rows, shape.bags)
    assert min(sizes) > 0
    if shape.ragged:
        assert 7 <= max(sizes) / min(sizes) <= 9
        assert sizes != sorted(sizes)
