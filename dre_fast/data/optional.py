"""Imports of optional packages that fail with the command that installs them."""

from __future__ import annotations

import importlib
from typing import Any


def need(module: str, extra: str) -> Any:
    """Imports ``module``, a part of the extra ``extra``.

    Raises:
        ModuleNotFoundError: it does not import; says which pip command brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise ModuleNotFoundError(
            f"this needs {name}, which does not import ({error}): pip install 'dre_fast[{extra}]'", name=name
        ) from error
