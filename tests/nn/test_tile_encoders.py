"""Tile encoders: shapes and dtypes, DINO weights against a ViT written here, wrapping, what mixes a batch."""

from __future__ import annotations

import argparse
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dre_fast.nn.dino_weights import resize_positions
from dre_fast.nn.tile_encoders import (
    EncoderError,
    HFTileEncoder,
    TileEncoder,
    build_tile_encoder,
    cross_sample_modules,
    load_hipt_checkpoint,
    wrap_encoder,
)

SMALL = ("conv-tiny", "vit-tiny")


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("shape", [(5,), (2, 3), (), (0,)])
def test_shapes(name, shape):
    encoder = build_tile_encoder(name, dim=24).eval()
    images = torch.rand(*shape, 3, 64, 64)
    features = encoder(images)
    assert features.shape == (*shape, 24)
    assert encoder.dim == 24
    if features.numel():
        one = encoder(images.reshape(-1, 3, 64, 64)[-1])
        torch.testing.assert_close(features.reshape(-1, 24)[-1], one, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(64, 64), (96, 96), (72, 96)])
def test_sizes_and_gradients(name, size):
    encoder = build_tile_encoder(name)
    images = torch.rand(4, 3, *size, requires_grad=True)
    encoder(images).square().sum().backward()
    assert images.grad is not None
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in encoder.parameters())
    assert all(p.grad.abs().sum() > 0 for p in encoder.parameters() if p.ndim > 1)


@pytest.mark.parametrize("name", SMALL)
def test_bytes_are_the_same_as_fractions(name):
    encoder = build_tile_encoder(name).eval()
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(encoder(images), encoder(images.float() / 255))
    torch.testing.assert_close(
        encoder(images), encoder(images.contiguous(memory_format=torch.channels_last)), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("name", SMALL)
def test_the_encoder_normalises(name):
    encoder = build_tile_encoder(name).eval()
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(encoder(images), encoder.features((images - encoder.mean) / encoder.std))
    assert not {"mean", "std"} & set(encoder.state_dict())


@pytest.mark.parametrize("name", SMALL)
def test_half_precision_and_autocast(name):
    encoder = build_tile_encoder(name).eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    full = encoder(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.cosine_similarity(encoder(images).float(), full).min() > 0.99
    low = encoder.bfloat16()(images)
    assert low.dtype == torch.bfloat16
    assert F.cosine_similarity(low.float(), full).min() > 0.99


@pytest.mark.parametrize("name", SMALL)
def test_a_seed_gives_the_same_encoder(name):
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build_tile_encoder(name).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_conv_tiny_learns_a_texture():
    """Stripes along rows against stripes along columns, random phase, period and noise."""
    generator = torch.Generator().manual_seed(0)

    def batch(count: int) -> tuple[Tensor, Tensor]:
        label = torch.randint(2, (count,), generator=generator)
        phase, period = torch.rand(2, count, 1, generator=generator)
        wave = torch.sin(torch.arange(32) * 2 * math.pi / (4 + 4 * period) + 6.28 * phase)
        rows = wave[:, :, None].expand(-1, 32, 32)
        images = torch.where(label[:, None, None] == 1, rows, rows.transpose(1, 2))[:, None].expand(
            -1, 3, -1, -1
        )
        return (0.5 + 0.2 * images + 0.1 * torch.randn(images.shape, generator=generator)).clamp(0, 1), label

    encoder = build_tile_encoder("conv-tiny", dim=16)
    head = nn.Linear(16, 2)
    optimiser = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(40):
        images, label = batch(32)
        optimiser.zero_grad()
        F.cross_entropy(head(F.normalize(encoder(images), dim=1) * 8), label).backward()
        optimiser.step()
    images, label = batch(200)
    with torch.no_grad():
        correct = head(F.normalize(encoder(images), dim=1) * 8).argmax(1) == label
    assert correct.float().mean() > 0.9


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 64, 64, 3), r"\[\*, 3, height, width\], got \(2, 64, 64, 3\)"),
        (torch.rand(64, 64), "got \\(64, 64\\)"),
        (torch.zeros(2, 3, 64, 64, dtype=torch.int32), "uint8 or floating point .*int32"),
    ],
)
def test_faulty_images(images, message):
    with pytest.raises(EncoderError, match=message):
        build_tile_encoder("conv-tiny")(images)


def test_faulty_names_and_options(monkeypatch):
    with pytest.raises(
        EncoderError, match="unknown tile encoder 'resnet': use conv-tiny, vit-tiny, vit-s16, timm:"
    ):
        build_tile_encoder("resnet")
    with pytest.raises(EncoderError, match=r"'conv-tiny'.*unexpected keyword argument 'depth'"):
        build_tile_encoder("conv-tiny", depth=3)
    with pytest.raises(EncoderError, match="64 x 60 px are not whole patches of 8 px"):
        build_tile_encoder("vit-tiny")(torch.rand(1, 3, 64, 60))
    with pytest.raises(EncoderError, match="width 66"):
        build_tile_encoder("vit-tiny", width=66)
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(EncoderError, match="timm:resnet18 needs timm and a torchvision"):
        build_tile_encoder("timm:resnet18")


# ---- any module


def test_any_module_is_an_encoder():
    module = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5))
    encoder = wrap_encoder(module, 5, mean=(0.1, 0.2, 0.3), std=(1, 2, 4))
    images = torch.rand(2, 4, 3, 16, 16)
    expected = (images.mean((3, 4)) - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([1.0, 2.0, 4.0])
    torch.testing.assert_close(encoder(images), module[2](expected))
    assert isinstance(encoder, TileEncoder)
    with pytest.raises(EncoderError, match=r"gives \(8, 5\) for 8 tiles, expected \[8, 6\].*the right dim"):
        wrap_encoder(module, 6)(images)
    with pytest.raises(EncoderError, match=r"gives \(8, 3, 1, 1\).*pool over space"):
        wrap_encoder(module[0], 3)(images)

    class Two(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return images, images

    with pytest.raises(EncoderError, match="Two gives tuple"):
        wrap_encoder(Two(), 3)(images)


def test_layers_that_mix_a_batch():
    assert cross_sample_modules(build_tile_encoder("conv-tiny")) == []
    assert cross_sample_modules(build_tile_encoder("vit-tiny")) == []
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(1, 4), nn.Sequential(nn.SyncBatchNorm(4))
    )
    assert cross_sample_modules(wrap_encoder(module, 4)) == ["module.1", "module.3.0"]
    assert cross_sample_modules(nn.BatchNorm1d(4)) == ["BatchNorm1d"]


@pytest.mark.parametrize("name", SMALL)
def test_a_tile_does_not_depend_on_its_batch(name):
    encoder = build_tile_encoder(name)  # in training mode
    images = torch.rand(6, 3, 64, 64)
    chunked = torch.cat([encoder(images[:1]), encoder(images[1:])])
    torch.testing.assert_close(encoder(images), chunked, atol=1e-5, rtol=1e-4)


# ---- DINO weights, against a ViT in DINO's own layout


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        count, length, dim = x.shape
        q, k, v = self.qkv(x).view(count, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / math.sqrt(dim // self.heads)).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(count, length, dim))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class DinoViT(nn.Module):
    """ViT-S/16 under DINO's names; ``grid`` positions per side are stored, as many as the image has are used."""

    def __init__(self, dim: int = 384, depth: int = 12, heads: int = 6, grid: int = 16) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + grid * grid, dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, 16, stride=16)})
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.grid = grid

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](images)
        side = patches.shape[-1]
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
        x = x + self._positions(side)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]

    def _positions(self, side: int) -> Tensor:
        if side == self.grid:
            return self.pos_embed
        grid = self.pos_embed[0, 1:].T.reshape(1, -1, self.grid, self.grid)
        grid = F.interpolate(grid, scale_factor=(side + 0.1) / self.grid, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).mT], 1)


@pytest.fixture(scope="module")
def vit() -> HFTileEncoder:
    pytest.importorskip("transformers", reason="needs transformers")
    encoder = build_tile_encoder("vit-s16").eval()
    assert isinstance(encoder, HFTileEncoder)
    return encoder


def compare(vit: HFTileEncoder, dino: DinoViT) -> None:
    images = torch.rand(2, 3, 256, 256)
    with torch.no_grad():
        expected = dino((images - 0.5) / 0.5)  # HIPT's normalisation
        torch.testing.assert_close(vit(images), expected, atol=2e-4, rtol=1e-3)


def randomised(dino: DinoViT) -> DinoViT:
    """Every weight away from its symmetric start, so that no exchanged pair goes unseen."""
    with torch.no_grad():
        for parameter in dino.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return dino.eval()


def test_dino_training_checkpoint(vit, tmp_path):
    """As DINO saves it: student and teacher, heads, prefixes, optimiser and its command line."""
    torch.manual_seed(1)
    student, teacher = randomised(DinoViT(depth=12)), randomised(DinoViT(depth=12))
    head = {"head.mlp.0.weight": torch.zeros(2, 384), "head.last_layer.weight_v": torch.zeros(2, 2)}
    content = {
        "student": {
            **{f"module.backbone.{k}": v for k, v in student.state_dict().items()},
            **{f"module.{k}": v for k, v in head.items()},
        },
        "teacher": {**{f"backbone.{k}": v for k, v in teacher.state_dict().items()}, **head},
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small", patch_size=16, local_crops_scale=(0.05, 0.4)),
    }
    torch.save(content, tmp_path / "vit256_small_dino.pth")
    load_hipt_checkpoint(vit, tmp_path / "vit256_small_dino.pth")
    compare(vit, teacher)


def test_bare_weights_with_positions_of_224_px(vit, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")
    torch.manual_seed(2)
    dino = randomised(DinoViT(depth=12, grid=14))
    safetensors.save_file(dino.state_dict(), tmp_path / "dino.safetensors")
    load_hipt_checkpoint(vit, tmp_path / "dino.safetensors")
    compare(vit, dino)


def test_positions_are_resized_square_to_square():
    table = torch.randn(1, 1 + 14 * 14, 8)
    resized = resize_positions(table, 256)
    assert resized.shape == (1, 257, 8)
    assert torch.equal(resized[:, 0], table[:, 0])
    assert resize_positions(table, 196) is table
    with pytest.raises(EncoderError, match="cannot resize 15 positions to 256"):
        resize_positions(torch.randn(1, 16, 8), 256)


def test_faulty_weights_are_named(vit, tmp_path):
    def load(state: dict[str, Tensor]) -> None:
        torch.save(state, tmp_path / "w.pth")
        load_hipt_checkpoint(vit, tmp_path / "w.pth")

    before = {key: value.clone() for key, value in vit.model.state_dict().items()}
    state = DinoViT().state_dict()
    with pytest.raises(EncoderError, match=r"w\.pth.*missing embeddings.cls_token; unexpected extra\.weight"):
        load({**{k: v for k, v in state.items() if k != "cls_token"}, "extra.weight": torch.zeros(1)})
    with pytest.raises(EncoderError, match=r"missing .*11.*; unexpected none"):
        load({k: v for k, v in state.items() if not k.startswith("blocks.11.")})
    with pytest.raises(
        EncoderError, match=r"cls_token has shape \(1, 1, 192\), the encoder needs \(1, 1, 384\)"
    ):
        load(DinoViT(dim=192).state_dict())
    with pytest.raises(EncoderError, match="no state dict in it"):
        load({"student": state, "epoch": 1})
    with pytest.raises(EncoderError, match=r"none\.pth: no such file"):
        load_hipt_checkpoint(vit, tmp_path / "none.pth")
    (tmp_path / "bad.pth").write_bytes(b"not weights")
    with pytest.raises(EncoderError, match=r"bad\.pth: cannot read these weights"):
        load_hipt_checkpoint(vit, tmp_path / "bad.pth")
    with pytest.raises(EncoderError, match="DINO weights fit the encoder vit-s16, not ConvTiny"):
        load_hipt_checkpoint(build_tile_encoder("conv-tiny"), tmp_path / "w.pth")
    assert all(torch.equal(before[key], value) for key, value in vit.model.state_dict().items())


class Harmful:
    def __reduce__(self):
        return (print, ("code from a checkpoint ran",))


def test_code_in_a_checkpoint_is_not_run(vit, tmp_path, capsys):
    torch.save({"teacher": {"cls_token": Harmful()}}, tmp_path / "w.pth")
    with pytest.raises(EncoderError, match="cannot read these weights"):
        load_hipt_checkpoint(vit, tmp_path / "w.pth")
    assert "ran" not in capsys.readouterr().out


def test_vit_s16_size_and_other_tile_sizes(vit):
    assert 21e6 < sum(p.numel() for p in vit.parameters()) < 22.5e6
    with torch.no_grad():
        assert vit(torch.zeros(1, 3, 256, 256, dtype=torch.uint8)).shape == (1, 384)
        assert vit(torch.rand(1, 3, 224, 224)).shape == (1, 384)
    with pytest.raises(EncoderError, match="pooling must be cls or mean"):
        HFTileEncoder(vit.model, 384, "max")


# ---- transformers models by folder


def test_transformers_model_from_a_folder(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=16,
    )
    transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    with pytest.raises(
        EncoderError, match=r"no colour normalisation comes with it.*give mean=\[...\] and std"
    ):
        build_tile_encoder(f"hf:{tmp_path}")
    given = build_tile_encoder(
        f"hf:{tmp_path}", mean=[0.7, 0.5, 0.7], std=[0.2, 0.2, 0.2], pooling="mean"
    ).eval()
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0.7, 0.5, 0.7], "image_std": [0.2, 0.2, 0.2]}'
    )
    found = build_tile_encoder(f"hf:{tmp_path}", pooling="mean").eval()
    images = torch.rand(2, 3, 32, 32)
    assert found.dim == 16
    torch.testing.assert_close(found(images), given(images))
    states = found.model(pixel_values=(images - found.mean) / found.std).last_hidden_state
    torch.testing.assert_close(found(images), states.mean(1))
    assert found(torch.rand(1, 3, 64, 64)).shape == (1, 16)
    with pytest.raises(EncoderError, match=r"hf:.*nothing"):
        build_tile_encoder(f"hf:{tmp_path / 'nothing'}")


def test_convolutional_transformers_model(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.ConvNextConfig(hidden_sizes=[8, 8, 8, 12], depths=[1, 1, 1, 1])
    transformers.ConvNextModel(config).save_pretrained(tmp_path)
    encoder = build_tile_encoder(f"hf:{tmp_path}", mean=[0.5] * 3, std=[0.5] * 3)
    assert encoder(torch.rand(2, 3, 64, 64)).shape == (2, 12)
