"""Tile encoders: images [*, 3, H, W] in, features [*, dim] out, colour normalisation inside."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dre_fast.nn.dino_weights import EncoderError, load_hipt_checkpoint

__all__ = [
    "ConvTiny",
    "EncoderError",
    "TileEncoder",
    "ViTTiny",
    "build_tile_encoder",
    "cross_sample_modules",
    "load_hipt_checkpoint",
    "wrap_encoder",
]

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # what HIPT was trained with


class TileEncoder(nn.Module):
    """Base of every tile encoder: checks and normalises images, calls :meth:`features`, checks its output.

    Args:
        dim: length D of a feature.
        mean, std: colour normalisation per channel, for images in [0, 1]; kept as buffers outside the state
            dict.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int, mean: Sequence[float] = HALF[0], std: Sequence[float] = HALF[1]) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def features(self, images: Tensor) -> Tensor:
        """Normalised images [N, 3, H, W] -> [N, D]."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Encode tiles.

        Args:
            images: uint8, or floating point in [0, 1], [*, 3, H, W] with any leading dimensions, in any
                memory format.

        Returns:
            floating point [*, D], not normalised.

        Raises:
            EncoderError: other shapes or dtypes, or an encoder that does not give [N, D].
        """
        if images.ndim < 3 or images.shape[-3] != 3:
            raise EncoderError(f"tile images must be [*, 3, height, width], got {tuple(images.shape)}")
        leading = images.shape[:-3]
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype) / 255
        elif not images.is_floating_point():
            raise EncoderError(f"tile images must be uint8 or floating point in [0, 1], got {images.dtype}")
        if images.ndim != 4:
            images = images.flatten(0, -4) if images.ndim > 4 else images[None]
        out = self.features((images.to(self.mean.dtype) - self.mean) / self.std)
        if out.shape != (len(images), self.dim):
            raise EncoderError(
                f"{type(self).__name__}: the encoder gives {tuple(out.shape)} for {len(images)} tiles, "
                f"expected [{len(images)}, {self.dim}]: pool over space, or give the right dim"
            )
        return out.reshape(*leading, self.dim)


class ConvTiny(TileEncoder):
    """A small convolutional encoder for demos and quick experiments; no layer mixes the tiles of a batch.

    Three stages at strides 4, 8, 16 with group normalisation (Wu & He 2018); the means over space of all
    three are joined, so that fine texture and larger shapes both reach the feature by a short path.

    Args:
        dim: length of the feature.
        width: channels of the first stage; the next two have twice and four times as many.
    """

    def __init__(self, dim: int = 64, width: int = 24) -> None:
        super().__init__(dim, *HALF)
        # The first stage is not normalised: the stain of a tile as a whole is information.
        self.stem = nn.Conv2d(3, width, 7, stride=4, padding=3)
        self.stages = nn.ModuleList([_conv_stage(width, 2 * width), _conv_stage(2 * width, 4 * width)])
        self.head = nn.Sequential(nn.LayerNorm(7 * width), nn.Linear(7 * width, dim))

    def features(self, images: Tensor) -> Tensor:
        x = F.relu(self.stem(images))
        pooled = [x.mean((2, 3))]
        for stage in self.stages:
            x = stage(x)
            pooled.append(x.mean((2, 3)))
        return self.head(torch.cat(pooled, dim=1))


def _conv_stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
        nn.GroupNorm(1, outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, groups=outputs, bias=False),
        nn.Conv2d(outputs, outputs, 1),
        nn.ReLU(),
    )


class ViTTiny(TileEncoder):
    """A small vision transformer for demos (Dosovitskiy et al. 2021), at any size that its patch divides.

    Positions are fixed sines and cosines of row and column, so no table ties it to one tile size. The
    feature is a linear map of the mean over patch tokens.

    Args:
        dim: length of the feature.
        patch: side of a patch in pixels.
        width: of a token, a multiple of 4 and of ``heads``.
        depth: transformer layers.
        heads: attention heads.
    """

    def __init__(
        self, dim: int = 64, patch: int = 8, width: int = 64, depth: int = 3, heads: int = 2
    ) -> None:
        super().__init__(dim, *HALF)
        if width % 4 or width % heads:
            raise EncoderError(f"vit-tiny: width {width} must be a multiple of 4 and of heads={heads}")
        self.patch = patch
        self.embed = nn.Conv2d(3, width, patch, stride=patch)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, dim)

    def features(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if height % self.patch or width % self.patch:
            raise EncoderError(
                f"vit-tiny: tiles of {height} x {width} px are not whole patches of {self.patch} px"
            )
        x = self.embed(images)
        tokens = x.flatten(2).transpose(1, 2) + _positions(x.shape[2], x.shape[3], x.shape[1], x.device).to(
            x.dtype
        )
        return self.head(self.blocks(tokens).mean(1))


def _positions(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """Fixed positions fp32 [rows * columns, width]: a quarter each of sin and cos of row and of column
    (Vaswani et al. 2017, section 3.5, once per axis)."""
    rates = 100.0 ** -torch.linspace(0, 1, width // 4, device=device)
    row = torch.arange(rows, device=device)[:, None] * rates
    column = torch.arange(columns, device=device)[:, None] * rates
    row = torch.cat([row.sin(), row.cos()], 1)[:, None].expand(-1, columns, -1)
    column = torch.cat([column.sin(), column.cos()], 1)[None].expand(rows, -1, -1)
    return torch.cat([row, column], dim=2).reshape(rows * columns, width)


class HFTileEncoder(TileEncoder):
    """A transformers vision model, at any tile size its position table can be interpolated to.

    Args:
        model: gives ``last_hidden_state``, [N, L, D] or, when convolutional, [N, D, h, w].
        dim: D.
        pooling: ``"cls"``: the first token; ``"mean"``: over all tokens. Convolutional models: mean over
            space.
    """

    def __init__(
        self,
        model: nn.Module,
        dim: int,
        pooling: str = "cls",
        mean: Sequence[float] = HALF[0],
        std: Sequence[float] = HALF[1],
    ) -> None:
        super().__init__(dim, mean, std)
        if pooling not in ("cls", "mean"):
            raise EncoderError(f"pooling must be cls or mean, got {pooling!r}")
        self.model, self.pooling = model, pooling
        accepted = inspect.signature(model.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepted else {}

    def features(self, images: Tensor) -> Tensor:
        states = self.model(pixel_values=images, **self._options).last_hidden_state
        if states.ndim == 4:
            return states.mean((2, 3))
        return states[:, 0] if self.pooling == "cls" else states.mean(1)


class WrappedEncoder(TileEncoder):
    """Any module that maps images [N, 3, H, W] to [N, D]; see :func:`wrap_encoder`."""

    def __init__(self, module: nn.Module, dim: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__(dim, mean, std)
        self.module = module

    def features(self, images: Tensor) -> Tensor:
        out = self.module(images)
        if not isinstance(out, Tensor):
            raise EncoderError(
                f"{type(self.module).__name__} gives {type(out).__name__}; a tile encoder gives a tensor"
            )
        return out


def wrap_encoder(
    module: nn.Module, dim: int, mean: Sequence[float] = IMAGENET[0], std: Sequence[float] = IMAGENET[1]
) -> TileEncoder:
    """Make a tile encoder of any module.

    Args:
        module: normalised images [N, 3, H, W] -> [N, D]. Its output is checked at every call.
        dim: D.
        mean, std: colour normalisation it was trained with; zeros and ones if it normalises by itself.
    """
    return WrappedEncoder(module, dim, mean, std)


def build_tile_encoder(name: str, **options: Any) -> TileEncoder:
    """A tile encoder by name.

    - ``"conv-tiny"``: :class:`ConvTiny`; ``"vit-tiny"``: :class:`ViTTiny`.
    - ``"vit-s16"``: ViT-S/16 (384 features, 12 layers, 6 heads) for 256 px tiles through transformers,
    random weights:
      give HIPT's to :func:`load_hipt_checkpoint`. Options ``pooling="cls"``, ``image_size=256``,
      ``dropout=0.0``.
    - ``"timm:NAME"``: any timm model, its own normalisation. Options go to ``timm.create_model``
      (``pretrained=True``, ``img_size=256`` ...).
    - ``"hf:NAME"``: any transformers vision model by name or local folder, with the normalisation of its
    image
      processor unless ``mean`` and ``std`` are given. Options ``pooling="cls"`` | ``"mean"``, and those of
      ``AutoModel.from_pretrained`` (``revision`` ...); code that comes with a model runs only under its
      ``trust_remote_code=True``.

    Returns:
        a module: uint8, or floating point in [0, 1], [*, 3, H, W] -> [*, ``module.dim``].

    Raises:
        EncoderError: unknown name or option, missing package, or a model that cannot be loaded.
    """
    kind, _, model = name.partition(":")
    builders: dict[str, Callable[..., TileEncoder]] = {
        "conv-tiny": ConvTiny,
        "vit-tiny": ViTTiny,
        "vit-s16": _vit_s16,
    }
    if name in builders:
        try:
            return builders[name](**options)
        except TypeError as error:
            raise EncoderError(f"tile encoder {name!r}: {error}") from error
    if kind == "timm" and model:
        return _timm(model, options)
    if kind == "hf" and model:
        return _huggingface(model, **options)
    raise EncoderError(f"unknown tile encoder {name!r}: use {', '.join(builders)}, timm:NAME or hf:NAME")


def cross_sample_modules(encoder: nn.Module) -> list[str]:
    """Names of the batch normalisation layers of an encoder: those that mix the tiles of a batch.

    With them a tile's feature in training depends on the tiles beside it, so it cannot be recomputed in
    chunks; an exact whole-slide gradient needs an empty list.
    """
    mixing = nn.modules.batchnorm._BatchNorm
    return [name or type(m).__name__ for name, m in encoder.named_modules() if isinstance(m, mixing)]


def _vit_s16(pooling: str = "cls", image_size: int = 256, dropout: float = 0.0) -> TileEncoder:
    transformers = _transformers("vit-s16")
    config = transformers.ViTConfig(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1536,
        patch_size=16,
        image_size=image_size,
        layer_norm_eps=1e-6,  # DINO's; transformers' own default is 1e-12
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return HFTileEncoder(transformers.ViTModel(config, add_pooling_layer=False), 384, pooling)


def _timm(name: str, options: dict[str, Any]) -> TileEncoder:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # a torchvision made for another torch raises RuntimeError
        raise EncoderError(f"timm:{name} needs timm and a torchvision that fits torch: {error}") from error
    try:
        model = timm.create_model(name, **{"num_classes": 0, **options})
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        raise EncoderError(f"timm:{name}: {error}") from error
    config = model.default_cfg
    return WrappedEncoder(model, model.num_features, config["mean"], config["std"])


def _huggingface(
    name: str,
    pooling: str = "cls",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **options: Any,
) -> TileEncoder:
    transformers = _transformers(f"hf:{name}")
    try:
        model = transformers.AutoModel.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise EncoderError(f"hf:{name}: {error}") from error
    sizes = getattr(model.config, "hidden_sizes", None)
    dim = sizes[-1] if sizes else getattr(model.config, "hidden_size", None)
    if dim is None:
        raise EncoderError(
            f"hf:{name}: a {type(model).__name__} has no hidden_size; wrap_encoder takes any module"
        )
    if mean is None or std is None:
        from transformers.image_processing_base import ImageProcessingMixin

        try:
            processor, _ = ImageProcessingMixin.get_image_processor_dict(
                name, revision=options.get("revision")
            )
            mean, std = processor["image_mean"], processor["image_std"]
        except (OSError, KeyError) as error:
            raise EncoderError(
                f"hf:{name}: no colour normalisation comes with it ({error}); give mean=[...] and std=[...]"
            ) from error
    return HFTileEncoder(model, dim, pooling, mean, std)


def _transformers(what: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise EncoderError(f"{what} needs transformers: pip install 'dre_fast[train]'") from error
    return transformers
