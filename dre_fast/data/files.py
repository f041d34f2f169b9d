"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from dre_fast.data.optional import need


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path in the folder of ``path``; on success it becomes ``path``, on failure it is
    removed.

    The folder is created when missing. The temporary name keeps the suffix of ``path``, because writers such
    as ``numpy.save`` and Pillow choose their format by it. Data and name are flushed to disk before the call
    returns, so a file that exists is whole even after a power cut.

    Raises:
        FileNotFoundError: the body ended without writing the temporary path.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = final.with_name(f".{final.stem}.{os.getpid()}-{secrets.token_hex(4)}{final.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(final.parent)


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that cannot be made or written into, before the work whose results go there. Makes nothing.

    Raises:
        ValueError: names the folder, or the one above it that is in the way.
    """
    there = Path(folder)
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ValueError(
            f"{folder}: {there} is no folder, so nothing can be written there; name another folder"
        )
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(
            f"{folder}: {there} may not be written into; name another folder, or change its rights"
        )


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 ``text`` to ``path`` with Unix line ends: all of it or nothing."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors (any device and strides) as safetensors: all of it or nothing.

    Not by ``safetensors.torch.save_file``, which makes files that only their owner can read. It also orders several
    metadata entries at random: give one, and equal contents make equal files.

    Raises:
        ImportError: safetensors is missing; says how to get it.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = need("safetensors.torch", "train").save(plain, metadata and dict(metadata))
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def _sync_folder(folder: Path) -> None:
    # Windows cannot open a folder; there os.replace is all there is.
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
