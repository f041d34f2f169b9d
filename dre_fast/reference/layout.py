"""One layout behind the three ways to pass bags: rows [N, D] and row offsets [B+1]."""

from __future__ import annotations

import torch
from torch import Tensor


def bag_of_row(cu_seqlens: Tensor, rows: int) -> Tensor:
    """Bag of each row, int64 [N]; B for rows past ``cu_seqlens[-1]``, which belong to no bag."""
    positions = torch.arange(rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:].contiguous(), positions, right=True)


def as_ragged(
    x: Tensor,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    index: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Any accepted layout -> rows [R, D], cu_seqlens int64 [B+1], and int64 [M] which rows to read, or None.

    No row is copied (but for [B, N, D] that is not contiguous), and the shapes depend on no value, so a layout
    costs no device synchronisation and traces into one graph. A mask becomes an index: row i is read as i, or
    -1 where it is masked.

    Args:
        x: [N, D], or [B, N, D] for padded bags.
        cu_seqlens: int32/int64 [B+1] row offsets of ragged bags, over the rows of x or, when given, of
            ``index``.
        mask: bool [B, N], True = valid; only for [B, N, D].
        index: int64 rows of x [N, D] to take, -1 = skip: [M] (one bag, or with cu_seqlens) or [B, M] (one row
            a bag).

    Raises:
        ValueError: shapes or dtypes that fit none of the layouts.
    """
    if x.dim() not in (2, 3):
        raise ValueError(f"residual_encode: x must be [N, D] or [B, N, D], got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"residual_encode: x must be floating point, got {x.dtype}")
    if x.dim() == 3:
        if cu_seqlens is not None or index is not None:
            raise ValueError(
                "residual_encode: x [B, N, D] takes only a mask; flatten it to use cu_seqlens or index"
            )
        return _padded(x, mask)
    if mask is not None:
        raise ValueError(
            "residual_encode: mask belongs to x [B, N, D]; for x [N, D] drop the rows or pass index with -1"
        )
    if index is None:
        if cu_seqlens is None:
            return x, torch.arange(2, device=x.device) * x.shape[0], None
        return x, _offsets(cu_seqlens, x.device), None
    if index.dtype != torch.int64 or index.dim() not in (1, 2):
        raise ValueError(
            f"residual_encode: index must be int64 [M] or [B, M], got {index.dtype} {tuple(index.shape)}"
        )
    if index.dim() == 2:
        if cu_seqlens is not None:
            raise ValueError("residual_encode: index [B, M] already says the bags; leave cu_seqlens out")
        cu = torch.arange(index.shape[0] + 1, device=x.device) * index.shape[1]
    elif cu_seqlens is None:
        cu = torch.arange(2, device=x.device) * index.shape[0]
    else:
        cu = _offsets(cu_seqlens, x.device)
    return x, cu, index.reshape(-1).to(x.device)


def _offsets(cu_seqlens: Tensor, device: torch.device) -> Tensor:
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "residual_encode: cu_seqlens must be int32 or int64 [B+1], "
            f"got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    return cu_seqlens.to(device=device, dtype=torch.int64)


def _padded(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    rows = x.reshape(-1, x.shape[2])
    cu = torch.arange(x.shape[0] + 1, device=x.device) * x.shape[1]
    if mask is None:
        return rows, cu, None
    if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
        raise ValueError(
            f"residual_encode: mask must be bool {tuple(x.shape[:2])} (True = valid), "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    return rows, cu, kept_rows(mask.reshape(-1).to(x.device))


def kept_rows(valid: Tensor) -> Tensor:
    """bool [N] -> index int64 [N]: every row in its place, -1 where it is not valid."""
    return torch.where(valid, torch.arange(valid.shape[0], device=valid.device), -1)
