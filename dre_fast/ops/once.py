"""Gradients in closed form, which have none of their own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


class _Gradient(torch.autograd.Function):
    """A gradient as it is, which knows what it depends on."""

    generate_vmap_rule = True  # torch.func.jacrev runs backward under vmap

    @staticmethod
    def forward(gradient: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise RuntimeError(
            "dre_fast operations are differentiable once: their gradients are closed forms without one of their own"
        )


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward of an autograd function whose result cannot be differentiated again, and says so.

    torch's own ``once_differentiable`` raises only where the incoming gradient is differentiated; a gradient penalty on
    a loss that is linear in the result would be ignored in silence.

    Raises:
        RuntimeError: when a gradient is differentiated, with respect to whatever it depends on.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *grads: torch.Tensor) -> Any:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return found
        inputs = [t for t in (*ctx.saved_tensors, *grads) if t is not None and t.requires_grad]
        if not inputs:
            return found
        results = found if isinstance(found, tuple) else (found,)
        return tuple(None if t is None else _Gradient.apply(t, *inputs) for t in results)

    return wrapped
