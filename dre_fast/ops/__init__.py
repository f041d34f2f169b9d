"""Registered operations: schemas, fakes, autograd, and the only place that chooses what runs them."""

from __future__ import annotations


def backends() -> dict[str, str]:
    """What runs each operation, by device: name -> for instance "CPU: C++, CUDA: Triton".

    "reference" is plain torch (:mod:`dre_fast.reference`). Encoding in float64 always runs the reference.
    """
    from dre_fast.ops import bank, contrast, encode, normalize, planes

    chosen = {}
    for module in (encode, normalize, bank, contrast):
        for name in module.NAMES:
            chosen[name] = f"CPU: {module.backend(name, 'cpu')}, CUDA: {module.backend(name, 'cuda')}"
    chosen["put_planar"] = f"CPU: {planes.backend()}"
    return chosen
