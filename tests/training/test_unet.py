"""The latents that the UNet is trained on belong to the autoencoder that will decode them."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from calotype.export.models.autoencoder import Autoencoder
from training import autoencoder, data, unet
from training.config import CPU

TINY = dataclasses.replace(
    CPU, image_size=16, autoencoder=dataclasses.replace(CPU.autoencoder, block_out_channels=(8, 8, 8, 8))
)


@pytest.fixture
def config(tmp_path):
    config = dataclasses.replace(TINY, work=tmp_path)
    pictures = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    concept = {"slug": "red-apple", "name": "red apple", "keywords": ["fruit"], "group": 4}
    np.savez(
        data.data_path(config), pictures=pictures, concepts=json.dumps([concept] * 4), styles=json.dumps(["noto"] * 4)
    )
    return config


def save_autoencoder(work, seed, step):
    torch.manual_seed(seed)
    model = Autoencoder(TINY.autoencoder)
    torch.save({"step": step, "ema": model.state_dict()}, work / "autoencoder.pt")
    return model


@pytest.mark.parametrize("step", [1, 2])
def test_latents_follow_the_autoencoder(config, step):
    save_autoencoder(config.work, seed=0, step=0)
    before, _ = unet.latents(config)
    model = save_autoencoder(config.work, seed=step, step=step)
    after, scaling_factor = unet.latents(config)
    expected = autoencoder.encode_all(model, data.load(config).pictures)
    torch.testing.assert_close(after / scaling_factor, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(before, after)
    assert float(after.std()) == pytest.approx(1.0, abs=1e-4)


def test_latents_are_encoded_once(config, monkeypatch):
    save_autoencoder(config.work, seed=0, step=0)
    first, _ = unet.latents(config)
    monkeypatch.setattr(autoencoder, "encode_all", lambda *_: pytest.fail("the cache was not used"))
    second, _ = unet.latents(config)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
