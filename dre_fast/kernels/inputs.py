"""What every encoding kernel asks of the rows, codebook, offsets, index and scales it is given."""

from __future__ import annotations

import torch

from dre_fast.kernels import config


def check_inputs(
    x: torch.Tensor,
    codebook: torch.Tensor,
    cu_seqlens: torch.Tensor,
    index: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    others: tuple[torch.Tensor | None, ...],
    interpreted: bool,
) -> None:
    """Raise ValueError for shapes, dtypes or devices that do not fit; ``others`` are only to share the device."""
    if x.dim() != 2 or codebook.dim() != 2 or x.shape[1] < codebook.shape[1]:
        raise ValueError(
            f"rows must be [R, P] and codebook [K, D] with P >= D; got {list(x.shape)} and {list(codebook.shape)}"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be int32 or int64 [B + 1], not {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    if index is not None and (index.dim() != 1 or index.dtype != torch.int64):
        raise ValueError(f"index must be int64 [M], not {index.dtype} {list(index.shape)}")
    if (row_scale is not None) != (x.dtype in config.SCALED_DTYPES):
        raise ValueError(
            f"int8 and float8_e4m3fn rows, and only they, come with row_scale; rows are {x.dtype}"
        )
    check_per_row("row_scale", row_scale, x, torch.float32)
    devices = {t.device for t in (x, codebook, cu_seqlens, index, row_scale, *others) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"all tensors must share a device; got {', '.join(sorted(map(str, devices)))}")
    if x.device.type != "cuda" and not interpreted:
        raise ValueError(
            f"the Triton kernels need a CUDA device, not {x.device} (TRITON_INTERPRET=1 interprets them)"
        )


def check_per_row(name: str, values: torch.Tensor | None, x: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise ValueError unless ``values``, where given, hold one number of ``dtype`` a stored row."""
    if values is not None and (values.shape != x.shape[:1] or values.dtype != dtype):
        raise ValueError(f"{name} must be {dtype} [{x.shape[0]}], not {values.dtype} {list(values.shape)}")
