from __future__ import annotations

import pytest
import torch
from train_cohort import tiny_config

from dre_fast.data.cohort import Cohort
from dre_fast.nn.tile_encoders import build_tile_encoder
from dre_fast.train.build import build_model, load_encoder_weights, slide_set
from dre_fast.train.pretrain import pretrain_encoder, save_encoder


def test_warm_up_learns_to_tell_tiles_apart_and_repeats(tiny_cohort):
    cohort = Cohort.read(tiny_cohort / "cohort.csv").subset("train")
    slides = slide_set(cohort, cohort.records, tiny_cohort / "tiles", mpp=1.0)

    def warm_up():
        torch.manual_seed(0)
        encoder = build_tile_encoder("conv-tiny", dim=8)
        losses = pretrain_encoder(encoder, slides.reader, steps=80, slides_per_step=4, tiles_per_slide=4)
        return losses, encoder.state_dict()

    losses, state = warm_up()
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    again, same = warm_up()
    assert losses == again
    assert all(state[key].equal(same[key]) for key in state)


def test_saved_weights_start_a_model_and_foreign_ones_are_refused(tiny_cohort, tmp_path):
    file = tmp_path / "encoder.safetensors"
    encoder = build_tile_encoder("conv-tiny", dim=8)
    save_encoder(encoder, file)
    config = tiny_config(tiny_cohort, "model.encoder_args={dim: 8}", f"model.encoder_weights={file}")
    model = build_model(config, [3], None, {}, torch.device("cpu"))
    for a, b in zip(encoder.parameters(), model.tile_encoder.parameters()):
        assert a.equal(b)
    with pytest.raises(ValueError, match=r"encoder\.safetensors"):
        load_encoder_weights(build_tile_encoder("conv-tiny", dim=9), file)
    with pytest.raises(ValueError, match=r"encoder\.safetensors"):
        load_encoder_weights(build_tile_encoder("vit-tiny"), file)
