"""The encoder's gradient does not decide how much of the head's is left."""

from __future__ import annotations

import torch
from torch import nn

from dre_fast.train.build import clip_gradients


def parts(encoder: float, rest: float) -> list[dict]:
    """Groups as the optimiser has them: two of the encoder, one of the rest, with gradients of these lengths."""
    groups = []
    for of_encoder, length in ((True, 0.6 * encoder), (True, 0.8 * encoder), (False, rest)):
        parameter = nn.Parameter(torch.zeros(4))
        parameter.grad = torch.full((4,), length / 2)
        groups.append({"params": [parameter], "encoder": of_encoder})
    return groups


def lengths(groups: list[dict]) -> list[float]:
    return [group["params"][0].grad.norm().item() for group in groups]


def test_each_part_by_itself() -> None:
    groups = parts(encoder=1000.0, rest=0.5)
    torch.testing.assert_close(clip_gradients(groups, 1.0), torch.tensor([1000.0, 0.5]))
    torch.testing.assert_close(lengths(groups), [0.6, 0.8, 0.5])


def test_no_limit_leaves_them() -> None:
    groups = parts(encoder=10.0, rest=20.0)
    torch.testing.assert_close(clip_gradients(groups, 0.0), torch.tensor([10.0, 20.0]))
    torch.testing.assert_close(lengths(groups), [6.0, 8.0, 20.0])


def test_a_frozen_encoder_has_none() -> None:
    groups = parts(encoder=1.0, rest=2.0)
    for group in groups[:2]:
        group["params"][0].grad = None
    torch.testing.assert_close(clip_gradients(groups, 1.0), torch.tensor([0.0, 2.0]))
    assert abs(lengths(groups[2:])[0] - 1.0) < 1e-5
