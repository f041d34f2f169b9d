"""The call sequence of TRIDENT's extraction of slide features."""

from __future__ import annotations

import pytest
import torch
from mil_bags import DIM, fitted, some_bags
from torch import Tensor

from dre_fast.integrations.trident import ResidualSlideEncoder


def batch(bag: Tensor) -> dict[str, object]:
    coords = torch.zeros(1, len(bag), 2, dtype=torch.int64)
    return {"features": bag[None], "coords": coords, "attributes": {"patch_size_level0": 512}}


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_slide_features_as_they_are_extracted(precision: torch.dtype) -> None:
    mil = fitted()
    encoder = ResidualSlideEncoder(mil, "residual_mil", precision).to("cpu")
    encoder.eval()
    assert (encoder.enc_name, encoder.precision, encoder.embedding_dim) == ("residual_mil", precision, 32)
    for bag in some_bags():
        with torch.inference_mode():
            expected = mil.embed(bag)[0]
            with torch.autocast("cpu", enabled=encoder.precision != torch.float32):
                features = encoder(batch(bag), "cpu")
        assert features.shape == (32,)
        if precision == torch.float32:
            assert torch.equal(features, expected)
            with torch.inference_mode():
                torch.testing.assert_close(mil.classifier(features[None]), mil(bag))
        assert features.float().cpu().numpy().squeeze().shape == (32,)
        torch.testing.assert_close(features.float(), expected, atol=0.1, rtol=0.1)


def test_several_slides_are_refused() -> None:
    encoder = ResidualSlideEncoder(fitted())
    assert torch.equal(
        encoder({"features": some_bags()[0]}, "cpu"), encoder(batch(some_bags()[0]), torch.device("cpu"))
    )
    with pytest.raises(ValueError, match="one slide"):
        encoder({"features": torch.randn(2, 4, DIM)}, "cpu")
