"""What the adapters share: a model from the host's arguments, and codebook files that configurations can name."""

from __future__ import annotations

import importlib
import os
from typing import Any

from dre_fast.data.files import write_tensors
from dre_fast.data.optional import need
from dre_fast.nn.residual_mil import ResidualMIL

CodebookFile = str | os.PathLike[str]


def build_model(
    dim: int, classes: int, model: ResidualMIL | None, codebook: CodebookFile | None, **options: Any
) -> ResidualMIL:
    """The model of an adapter: ``model`` itself, or a new one.

    Args:
        dim, classes: what the host says of its features and labels.
        model: an existing model; ``options`` are then not looked at.
        codebook: file of :func:`save_codebook` to take the codebook from.
        options: of a new :class:`~dre_fast.ResidualMIL`.

    Raises:
        ValueError: ``model`` is of other sizes, ``codebook`` does not fit, or options that do not.
    """
    if model is None:
        model = ResidualMIL(dim, classes, **options)
    elif (model.dim, model.classes) != (dim, classes):
        raise ValueError(
            f"the model given has dim={model.dim} and classes={model.classes}, the host asks for {dim} and {classes}"
        )
    if codebook is not None:
        load_codebook(model, codebook)
    return model


def save_codebook(model: ResidualMIL, path: CodebookFile) -> None:
    """Write the fitted codebook of a model, with what its assignment needs, as safetensors: all of it or nothing.

    Raises:
        ValueError: the codebook is not fitted.
        ImportError: safetensors is missing; says how to get it.
    """
    if not model.fitted:
        raise ValueError("save_codebook: the codebook is not fitted; call model.fit_codebook(bags) first")
    write_tensors(path, model.encoding.state_dict(), {"assignment": model.encoding.assignment})


def load_codebook(model: ResidualMIL, path: CodebookFile) -> None:
    """Take the codebook from a file of :func:`save_codebook`.

    Raises:
        ValueError: it is of another K, D or assignment than the model's; the file is named.
        FileNotFoundError: no such file.
    """
    state = need("safetensors.torch", "train").load_file(path)
    try:
        model.load_codebook(state)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None


def need_host(module: str, package: str) -> Any:
    """Imports ``module`` of the host ``package``.

    Raises:
        ModuleNotFoundError: it does not import; says which pip command brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ModuleNotFoundError(
            f"this adapter builds on {package}, which does not import ({error}): pip install {package}",
            name=module,
        ) from error
