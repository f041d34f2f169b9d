"""Weights of DINO vision transformers (HIPT's ViT-256 among them) for the ViT of transformers."""

from __future__ import annotations

import argparse
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WRAPPERS = ("teacher", "state_dict", "model")  # tried in this order; a bare state dict has none of them
PREFIXES = re.compile(r"^(?:module\.|backbone\.|teacher\.)+")
# DINO name -> transformers name. Early 5.x releases call layer i "encoder.layer.i", later ones "layers.i".
STEM = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
OLD_LAYER = "encoder.layer.{}."
OLD = {
    "attn.q": "attention.attention.query",
    "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
NEW_LAYER = "layers.{}."
NEW = {
    "attn.q": "attention.q_proj",
    "attn.k": "attention.k_proj",
    "attn.v": "attention.v_proj",
    "attn.proj": "attention.o_proj",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


class EncoderError(ValueError):
    """A tile encoder that cannot be built, loaded or used; the message says why."""


def load_hipt_checkpoint(encoder: nn.Module, path: str | Path) -> None:
    """Load a DINO checkpoint, such as HIPT's ``vit256_small_dino.pth``, into a ``"vit-s16"`` tile encoder.

    The teacher's weights are taken where a training checkpoint has both, its projection head is left out,
    and the fused query-key-value matrices are split. A position table made for another tile size (HIPT's is
    14 x 14, from 224 px crops) is resized as DINO does when it runs (bicubic, Caron et al. 2021).

    Args:
        encoder: of ``build_tile_encoder("vit-s16")``, or a transformers ``ViTModel``.
        path: ``.pth`` / ``.pt`` (read with ``weights_only=True``) or ``.safetensors``.

    Raises:
        EncoderError: another kind of encoder or file, or weights missing, left over or of another shape;
            named.
    """
    path = Path(path)
    model = getattr(encoder, "model", encoder)
    state = model.state_dict()
    if "embeddings.position_embeddings" not in state:
        raise EncoderError(f"{path}: DINO weights fit the encoder vit-s16, not {type(encoder).__name__}")
    dino = {PREFIXES.sub("", name): tensor for name, tensor in _read(path).items()}
    dino = {name: tensor for name, tensor in dino.items() if not name.startswith("head.")}
    converted = {}
    unexpected = []
    for name, tensor in _split_qkv(dino).items():
        target = _target(name, state)
        if target is None:
            unexpected.append(name)
            continue
        if name == "pos_embed":
            tensor = resize_positions(tensor, state[target].shape[1] - 1, path)
        converted[target] = tensor
    missing = [name for name in state if name not in converted]
    if missing or unexpected:
        raise EncoderError(
            f"{path}: these weights are not those of this ViT: "
            f"missing {_some(missing)}; unexpected {_some(unexpected)}"
        )
    wrong = [name for name in state if converted[name].shape != state[name].shape]
    if wrong:
        raise EncoderError(
            f"{path}: {wrong[0]} has shape {tuple(converted[wrong[0]].shape)}, the encoder needs "
            f"{tuple(state[wrong[0]].shape)} ({len(wrong)} weights differ): another width or patch size?"
        )
    model.load_state_dict(converted)


def resize_positions(table: Tensor, patches: int, path: Path | str = "weights") -> Tensor:
    """Position table [1, 1 + g * g, D] -> [1, 1 + patches, D], bicubic, the class token's row kept.

    DINO adds 0.1 to the new grid's side before dividing, which shifts the sampling points a little; its
    features are met only by doing the same.

    Raises:
        EncoderError: a grid that is not square.
    """
    if table.ndim != 3:
        raise EncoderError(f"{path}: pos_embed has shape {tuple(table.shape)}, expected [1, positions, D]")
    old = table.shape[1] - 1
    if old == patches:
        return table
    side, wanted = math.isqrt(old), math.isqrt(patches)
    if side * side != old or wanted * wanted != patches:
        raise EncoderError(f"{path}: cannot resize {old} positions to {patches}: the grids are not square")
    grid = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = (wanted + 0.1) / side
    grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([table[:, :1], grid.permute(0, 2, 3, 1).reshape(1, patches, -1)], dim=1)


def _read(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, unwrapped."""
    content: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(str(path))
        else:
            # DINO saves its command line beside the weights; a Namespace holds plain values.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise EncoderError(f"{path}: no such file (tile encoder weights)") from None
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise EncoderError(f"{path}: cannot read these weights: {error}") from error
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise EncoderError(f"{path}: no state dict in it (looked under {', '.join(WRAPPERS)})")
    names = list(content)
    if any("backbone." in name for name in names):
        # Beside the backbone such a file holds training heads.
        names = [name for name in names if "backbone." in name]
    return {name: content[name] for name in names}


def _split_qkv(dino: dict[str, Tensor]) -> dict[str, Tensor]:
    """``blocks.i.attn.qkv`` [3D, ...] -> ``attn.q``, ``attn.k``, ``attn.v``."""
    split: dict[str, Tensor] = {}
    for name, tensor in dino.items():
        before, fused, after = name.partition(".attn.qkv.")
        if fused and len(tensor) % 3 == 0:
            for part, piece in zip("qkv", tensor.chunk(3)):
                split[f"{before}.attn.{part}.{after}"] = piece
        else:
            split[name] = tensor
    return split


def _target(name: str, state: Mapping[str, Tensor]) -> str | None:
    """The transformers name of a DINO weight, ``None`` when there is no such weight."""
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
    if block:
        new = any(key.startswith("layers.") for key in state)
        layer, names = (NEW_LAYER, NEW) if new else (OLD_LAYER, OLD)
        if block[2] not in names:
            return None
        target = f"{layer.format(block[1])}{names[block[2]]}.{block[3]}"
    else:
        stem, _, kind = name.rpartition(".")
        target = STEM.get(name) or (f"{STEM[stem]}.{kind}" if stem in STEM else "")
    return target if target in state else None


def _some(names: list[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
