"""Imports of optional packages that fail with the command that installs them."""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path
from typing import Any


def as_installed(command: str) -> str:
    """A pip command for an extra of dre_fast, as it works here: sources used without being installed have no name.

    ``pip install 'dre_fast[zarr]'`` becomes ``pip install '.[zarr]' in FOLDER`` there.
    """
    try:
        importlib.metadata.version("dre_fast")
    except importlib.metadata.PackageNotFoundError:
        if "'dre_fast[" in command:
            found = command.replace("'dre_fast[", "'.[")
            return f"{found} in {Path(__file__).parents[2]}"
    return command


def need(module: str, extra: str) -> Any:
    """Imports ``module``, a part of the extra ``extra``.

    Raises:
        ModuleNotFoundError: it does not import; says which pip command brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name, remedy = module.partition(".")[0], f"pip install 'dre_fast[{extra}]'"
        raise ModuleNotFoundError(
            f"this needs {name}, which does not import ({error}): {as_installed(remedy)}", name=name
        ) from error
