"""Residual encoding of bags of tile features: the public function and the module around it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dre_fast.codebook import fit_codebook, row_chunks
from dre_fast.codebook_rows import CHUNK, chunks
from dre_fast.ops import encode as ops
from dre_fast.ops.normalize import normalize_residuals
from dre_fast.reference.encode import (
    l2_normalize,
    normalization_steps,
    squared_distances,
)
from dre_fast.reference.layout import as_ragged, bag_of_row

_TOO_LARGE = "; float16 ends at 65,504: larger features need bfloat16 or float32"
_ROW_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def residual_encode(
    x: Tensor,
    codebook: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    index: Tensor | None = None,
    assignment: str = "hard",
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    normalize: str | Sequence[str] = (),
    normalize_rows: bool = False,
    return_counts: bool = False,
    return_codes: bool = False,
    return_distances: bool = False,
    power: float = 0.5,
    check: bool = True,
) -> Any:
    """Encode each bag of features by its residuals to a codebook: V_bk = sum_i a_ik (x_i - c_k).

    ========================  =========================  ======================================
    bags                      x                          with
    ========================  =========================  ======================================
    one                       [N, D]
    ragged                    [N, D]                     ``cu_seqlens`` [B+1]
    padded                    [B, N, D]                  optional ``mask`` [B, N], True = valid
    rows of a larger store    [N, D]                     ``index`` [M], [M] + cu_seqlens, [B, M]
    ========================  =========================  ======================================

    Rows are used as given unless ``normalize_rows``; no layout copies them. An empty bag or codeword gives
    V = 0 and passes no gradient. Sums are fp32 (float64 for float64 x) also under autocast, the same on every
    run. Neither N x K x D nor N x K is kept. Differentiable once; under vmap it raises.

    Args:
        x: features, any float dtype, any strides.
        codebook: C [K, D], K >= 1.
        cu_seqlens: int32 or int64 [B+1] row offsets, from 0 to N, non-decreasing.
        mask: bool [B, N], True = valid. Masked rows are never read into a sum, whatever they hold.
        index: int64 rows of x to encode; -1 = skip. A row may be taken more than once.
        assignment: ``"hard"``: a_ik = 1 for the nearest codeword (ties: lowest k); ``"soft"``: with ``scale``
            a_ik = softmax_k(-s_k ||x_i - c_k||^2), with ``weight`` a_ik = softmax_k(w_k.x_i + b_k).
        scale: [K], > 0 (Deep-TEN). weight: [K, D] and bias: [K], optional (NetVLAD).
        normalize: any of ``"intra"``, ``"power"``, ``"l2"`` in that order.
        normalize_rows: divide each row by its L2 norm (at least 1e-12) as it is read.
        return_counts: also return the counts.
        return_codes: also return the codeword of each row (hard only).
        return_distances: also return the squared distance of each row to its codeword (hard only). Their sum
            over a bag is its inertia.
        power: exponent of ``"power"``.
        check: look at the values of offsets, index, scale and result (device synchronisations on a GPU). Skipped
            where nothing may depend on values: under torch.compile and CUDA-graph capture.

    Returns:
        V [B, K, D] fp32 (float64 for float64 x); B = 1 for one bag. What was asked for follows in this order:
        the counts [B, K], int64 for hard, the mass sum_i a_ik in the dtype of V (differentiable) for soft;
        the codes int64 and the squared distances in the dtype of V, both of the shape of the rows, [N],
        [B, N] or that of ``index``, without gradient, -1 and 0 where a row is skipped.

    Raises:
        TypeError: something that must be a tensor is not.
        ValueError: shapes, dtypes or options that do not fit; with ``check`` also offsets that are not
            ascending from 0 to N, an index outside x, a scale that is not positive, and NaN or Inf in a row,
            named by bag and row, or in the codebook.

    Source: DRE-SLCL, arXiv 2511.05034 (residual encoding, hard); Deep-TEN, Zhang et al. 2017, eq. 3-4;
    NetVLAD, Arandjelovic et al. 2016, eq. 3-4.
    """
    steps = normalization_steps(normalize)
    _check_types(
        x=x,
        codebook=codebook,
        cu_seqlens=cu_seqlens,
        mask=mask,
        index=index,
        scale=scale,
        weight=weight,
        bias=bias,
    )
    _check_arguments(x, codebook, assignment, scale, weight, bias)
    if assignment == "soft" and (return_codes or return_distances):
        raise ValueError("residual_encode: codes and distances belong to assignment='hard'")
    check = check and not torch.compiler.is_compiling()
    if check and x.is_cuda:
        check = not torch.cuda.is_current_stream_capturing()
    if check:
        ops.refuse_vmap(x, cu_seqlens, index, scale)  # before it stumbles over the values looked at here
        _check_offsets_and_index(x, cu_seqlens, index)
        if scale is not None and bool((scale <= 0).any()):
            raise ValueError(
                f"residual_encode: scale must be > 0, that of codeword {int((scale <= 0).nonzero()[0, 0])} is not"
            )
    rows, offsets, taken = as_ragged(x, cu_seqlens, mask, index)
    options: dict[str, bool] = {"unit": normalize_rows, "masked": index is None}
    extra: list[Tensor] = []
    if assignment == "hard":
        residuals, counts, codes, distances = ops.hard_encode(
            rows, codebook, offsets, taken, distances=return_distances, **options
        )
        shape = x.shape[:-1] if index is None else index.shape
        extra = [codes.view(shape)] if return_codes else []
        extra += [distances.view(shape)] if return_distances else []
    else:
        residuals, counts = ops.soft_encode(rows, codebook, offsets, scale, weight, bias, taken, **options)
    # V is small, and a bad row always shows in it: the rows are searched only once something is wrong. A codeword that
    # no row is near to does not.
    if check and not (torch.isfinite(residuals).all() & torch.isfinite(codebook).all()):
        _raise_not_finite(x, codebook, cu_seqlens, mask, index, (scale, weight, bias))
    residuals = normalize_residuals(residuals, steps, power=power)
    results = (residuals, *[counts] * return_counts, *extra)
    return results if len(results) > 1 else residuals


def _check_types(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) and (tensor is not None or name in ("x", "codebook")):
            raise TypeError(f"residual_encode: {name} must be a torch.Tensor, got {type(tensor).__name__}")


def _check_arguments(
    x: Tensor,
    codebook: Tensor,
    assignment: str,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    if codebook.dim() != 2 or codebook.shape[0] < 1 or not codebook.is_floating_point():
        raise ValueError(
            "residual_encode: codebook must be floating point [K, D] with K >= 1, "
            f"got {codebook.dtype} {tuple(codebook.shape)}"
        )
    words, dim = codebook.shape
    if x.dtype not in _ROW_DTYPES:
        raise ValueError(
            f"residual_encode: x must be floating point: float32, float16, bfloat16 or float64, got {x.dtype}"
        )
    if x.dim() not in (2, 3):
        how = "; of feature maps [B, D, H, W] pass x.flatten(2).transpose(1, 2)" if x.dim() == 4 else ""
        raise ValueError(f"residual_encode: x must be [N, D] or [B, N, D], got {tuple(x.shape)}{how}")
    if x.shape[-1] != dim:
        how = "encode with the codebook fitted on these features"
        if x.dim() == 3 and x.shape[1] == dim:
            how = "features come last: pass x.transpose(1, 2)"
        raise ValueError(
            f"residual_encode: x has D={x.shape[-1]} {tuple(x.shape)}, the codebook D={dim}; {how}"
        )
    if assignment == "hard":
        if scale is not None or weight is not None or bias is not None:
            raise ValueError("residual_encode: scale, weight and bias belong to assignment='soft'")
        return
    if assignment != "soft":
        raise ValueError(f"residual_encode: assignment must be 'hard' or 'soft', got {assignment!r}")
    if (scale is None) == (weight is None):
        raise ValueError(
            "residual_encode: assignment='soft' needs either scale [K] (Deep-TEN) or weight [K, D] (NetVLAD)"
        )
    if bias is not None and weight is None:
        raise ValueError("residual_encode: bias goes with weight (NetVLAD), not with scale")
    for name, tensor, shape in (
        ("scale", scale, (words,)),
        ("weight", weight, (words, dim)),
        ("bias", bias, (words,)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"residual_encode: {name} must be {shape}, got {tuple(tensor.shape)}")


def _check_offsets_and_index(x: Tensor, cu_seqlens: Tensor | None, index: Tensor | None) -> None:
    rows = x.shape[0] if index is None else index.numel()
    if cu_seqlens is not None and cu_seqlens.dim() == 1 and x.dim() == 2:
        offsets = cu_seqlens.tolist()
        if offsets[:1] != [0] or offsets[-1] != rows or offsets != sorted(offsets):
            shown = ", ".join(map(str, offsets[:8])) + (", ..." if len(offsets) > 8 else "")
            what = "rows" if index is None else "entries of index"
            how = (
                "; lengths [B] become offsets by F.pad(lengths.cumsum(0), (1, 0))"
                if offsets[:1] != [0]
                else ""
            )
            raise ValueError(
                f"residual_encode: cu_seqlens must ascend from 0 to the number of {what}, {rows}; got [{shown}]{how}"
            )
    if index is not None and index.numel() and x.dim() == 2:
        low, high = int(index.min()), int(index.max())
        if low < -1 or high >= x.shape[0]:
            wrong = low if low < -1 else high
            raise ValueError(
                f"residual_encode: index holds {wrong}; x has rows 0 to {x.shape[0] - 1}, and -1 means skip"
            )


def _raise_not_finite(
    x: Tensor,
    codebook: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    index: Tensor | None,
    parameters: tuple[Tensor | None, ...],
) -> None:
    bad = ~torch.isfinite(x).all(dim=-1)
    if mask is not None:
        bad &= mask.to(x.device)
    if index is not None:
        flat = index.to(x.device)
        bad = (flat >= 0) & bad[flat.clamp(min=0)]
    if bad.any():
        where = bad.nonzero()[0].tolist()
        if len(where) == 2:
            bag, row = where
        elif cu_seqlens is None:
            bag, row = 0, where[0]
        else:
            bag = int(bag_of_row(cu_seqlens.to(x.device, torch.int64), bad.shape[0])[where[0]])
            row = where[0] - int(cu_seqlens[bag])
        raise ValueError(
            f"residual_encode: row {row} of bag {bag} holds NaN or Inf ({int(bad.sum())} such rows in all); "
            f"drop these rows, or mask them{_TOO_LARGE if x.dtype == torch.float16 else ''}"
        )
    for name, tensor in (("codebook", codebook), *zip(("scale", "weight", "bias"), parameters)):
        if tensor is not None and not torch.isfinite(tensor).all():
            row = int((~torch.isfinite(tensor)).nonzero()[0, 0])
            raise ValueError(f"residual_encode: row {row} of {name} holds NaN or Inf")
    raise ValueError("residual_encode: the residuals overflow; scale the features down or L2-normalise them")


class ResidualEncoding(nn.Module):
    """Residual encoding with a codebook of its own.

    Args:
        dim: D, the feature dimension.
        codewords: K.
        assignment: ``"hard"``, ``"soft"`` (Deep-TEN: a scale s_k per codeword, kept as its logarithm) or
            ``"netvlad"`` (weight [K, D] and bias [K], independent of the codebook).
        normalize: any of ``"intra"``, ``"power"``, ``"l2"`` in that order.
        normalize_rows: divide each row by its L2 norm as it is read; :meth:`fit` does the same.
        learnable: train codebook and assignment parameters by gradient, as Deep-TEN and NetVLAD do. Otherwise, and by
            default, they are buffers that only :meth:`fit` sets, and the module has no parameters. Under hard
            assignment a codebook learns only through the values of the residuals.

    Shapes:
        ``forward(x, cu_seqlens=None, mask=None, index=None, return_counts=False, check=True)``: the layouts and results
        of :func:`residual_encode`; V [B, K, D] fp32.

    Raises:
        ValueError: an unknown assignment or normalisation, or ``dim`` or ``codewords`` below 1.

    The codebook starts as random rows of about unit norm; :meth:`fit` puts it on the data.

    Source: DRE-SLCL, arXiv 2511.05034; Deep-TEN, Zhang et al. 2017; NetVLAD, Arandjelovic et al. 2016.
    """

    def __init__(
        self,
        dim: int,
        codewords: int,
        assignment: str = "hard",
        normalize: str | Sequence[str] = ("intra", "l2"),
        learnable: bool = False,
        normalize_rows: bool = False,
    ) -> None:
        super().__init__()
        if assignment not in ("hard", "soft", "netvlad"):
            raise ValueError(
                f"ResidualEncoding: assignment must be 'hard', 'soft' or 'netvlad', got {assignment!r}"
            )
        if dim < 1 or codewords < 1:
            raise ValueError(
                f"ResidualEncoding: dim and codewords must be at least 1, got {dim} and {codewords}"
            )
        self.dim, self.codewords, self.assignment = dim, codewords, assignment
        self.normalize, self.learnable = normalization_steps(normalize), learnable
        self.normalize_rows = normalize_rows
        self.codebook: Tensor
        self.log_scale: Tensor | None
        self.weight: Tensor | None
        self.bias: Tensor | None
        self._hold("codebook", torch.randn(codewords, dim) / math.sqrt(dim))
        self._hold("log_scale", torch.zeros(codewords) if assignment == "soft" else None)
        self._hold("weight", torch.zeros(codewords, dim) if assignment == "netvlad" else None)
        self._hold("bias", torch.zeros(codewords) if assignment == "netvlad" else None)
        self._set_sharpness(1.0)

    def _hold(self, name: str, value: Tensor | None) -> None:
        if self.learnable and value is not None:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    @property
    def scale(self) -> Tensor | None:
        """s [K] of the Deep-TEN assignment, > 0; None for the others."""
        return None if self.log_scale is None else self.log_scale.exp()

    @torch.no_grad()
    def _set_sharpness(self, alpha: float) -> None:
        """Assignment softmax_k(-alpha ||x - c_k||^2), in whichever parametrisation."""
        if self.log_scale is not None:
            self.log_scale.fill_(math.log(alpha))
        if self.weight is not None and self.bias is not None:
            self.weight.copy_(2 * alpha * self.codebook)
            self.bias.copy_(-alpha * self.codebook.square().sum(dim=1))

    @torch.no_grad()
    def fit(self, rows: Any, *, iterations: int = 25, seed: int = 0, **options: Any) -> float:
        """Fit the codebook by k-means, and soft assignments so that they are clear but not hard.

        The sharpness alpha makes the nearest codeword 100 times as likely as the second on average (NetVLAD,
        section 3.1 and its code): alpha = ln(100) / mean(d2^2 - d1^2).

        Args:
            rows: [N, D] or a bank, as for :func:`dre_fast.fit_codebook`.
            iterations: Lloyd iterations.
            seed: seed of the start.
            options: of :func:`dre_fast.fit_codebook`: init, weights, batch_size, tolerance, warm_start, history. A
                codebook of your own goes in as ``warm_start=codebook, iterations=0``, with which soft assignments
                are set for it as well.

        Returns:
            Inertia: the sum of squared distances to the nearest codeword.

        Raises:
            ValueError: fewer rows than codewords, another D, NaN or Inf in a row, or options that do not fit.
        """
        first = next(chunks(rows), None)
        if first is not None and first.dim != self.dim:
            raise ValueError(f"ResidualEncoding.fit: rows have D={first.dim}, not {self.dim}")
        if self.normalize_rows:
            rows = _UnitRows(rows)
        codebook, inertia = fit_codebook(rows, self.codewords, iterations=iterations, seed=seed, **options)
        self.codebook.copy_(codebook)
        if self.assignment != "hard" and self.codewords > 1:
            gaps, total, middle = (
                0.0,
                0,
                codebook.mean(dim=0),
            )  # far from the origin the distances lose digits
            for chunk in row_chunks(rows):
                distances = squared_distances(chunk - middle, codebook - middle)
                nearest = distances.topk(2, dim=1, largest=False).values
                gaps += float((nearest[:, 1] - nearest[:, 0]).double().sum())
                total += len(chunk)
            self._set_sharpness(math.log(100.0) * total / gaps if gaps > 0 else 1.0)
        return inertia

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        index: Tensor | None = None,
        return_counts: bool = False,
        check: bool = True,
    ) -> Any:
        """V fp32 [B, K, D], and the counts where asked for: arguments and errors of :func:`residual_encode`."""
        return residual_encode(
            x,
            self.codebook,
            cu_seqlens=cu_seqlens,
            mask=mask,
            index=index,
            assignment="hard" if self.assignment == "hard" else "soft",
            scale=self.scale,
            weight=self.weight,
            bias=self.bias,
            normalize=self.normalize,
            normalize_rows=self.normalize_rows,
            return_counts=return_counts,
            check=check,
        )

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, codewords={self.codewords}, assignment={self.assignment!r}, "
            f"normalize={self.normalize}, learnable={self.learnable}, normalize_rows={self.normalize_rows}"
        )


class _UnitRows:
    """The rows of a tensor or bank with L2 norm one, a chunk at a time."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def iter_rows(self, chunk: int = CHUNK) -> Iterator[Tensor]:
        for part in row_chunks(self.rows):
            yield l2_normalize(part)
