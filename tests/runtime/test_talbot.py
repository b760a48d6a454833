"""The bundled model: it is whole, of the promised size, and its prompt steers the picture."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from calotype.runtime.bundle.folder import BUNDLED, Bundle
from calotype.runtime.pipeline import Pipeline
from tests.runtime.references import psnr
from training.checkpoint import SCHEDULER
from training.config import TALBOT


def test_it_is_whole_and_small() -> None:
    manifest = Bundle.open("talbot").manifest
    weights = sum(record.size for name, record in manifest.files.items() if name.endswith(".safetensors"))
    assert weights <= 32 * 2**20
    assert any("CC-BY-4.0" in line for line in manifest.attribution)
    assert all(report["float32"]["max_relative"] <= 1e-4 for report in manifest.parity.values())


def test_an_apple_is_red_and_a_tree_is_green() -> None:
    with Pipeline.load("talbot") as pipeline:
        apple, tree = pipeline(["red apple, noto style", "evergreen tree, noto style"], seed=0, output_type="np").images
    # Mean colour of the middle, where the object is: (R, G, B) in 0..1.
    apple_rgb, tree_rgb = (np.asarray(image)[32:96, 32:96].mean(axis=(0, 1)) for image in (apple, tree))
    assert apple_rgb[0] > apple_rgb[1] + 0.2
    assert apple_rgb[0] > apple_rgb[2] + 0.2
    assert tree_rgb[1] > tree_rgb[0] + 0.1


def test_its_weights_draw_the_same_in_diffusers() -> None:
    """The modules of diffusers and transformers, loaded strictly: the names and shapes are theirs, and the picture."""
    folder = BUNDLED / "talbot"
    manifest = Bundle.open(folder).manifest
    text = TALBOT.text_encoder.to_json()
    levels = len(TALBOT.autoencoder.block_out_channels)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    settings: dict[str, Any] = {"num_inference_steps": 6, "guidance_scale": 3.0, "output_type": "np"}
    prompt, latents = "red apple, noto style", np.random.default_rng(1).standard_normal((1, 16, 16, 16), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        import torch
        import transformers
        from safetensors.torch import load_file

        del text["with_projection"]
        autoencoder = TALBOT.autoencoder.to_json() | kinds | {"scaling_factor": manifest.vae.scaling_factor}
        vocabulary = {"vocab": str(folder / "tokenizer/vocab.json"), "merges": str(folder / "tokenizer/merges.txt")}
        reference = diffusers.StableDiffusionPipeline(
            vae=diffusers.AutoencoderKL.from_config(autoencoder),
            unet=diffusers.UNet2DConditionModel.from_config(TALBOT.unet.to_json()),
            text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)),
            tokenizer=transformers.CLIPTokenizer(**vocabulary, model_max_length=32),
            scheduler=diffusers.DPMSolverMultistepScheduler.from_config(SCHEDULER),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        for name in ("vae", "unet", "text_encoder"):
            weights = {key: value.float() for key, value in load_file(folder / f"{name}.safetensors").items()}
            if name == "text_encoder":  # transformers 5 leaves the prefix out in memory
                weights = {key.removeprefix("text_model."): value for key, value in weights.items()}
            getattr(reference, name).load_state_dict(weights)
        reference.set_progress_bar_config(disable=True)
        given = torch.from_numpy(latents.copy())
        expected = reference(prompt, height=128, width=128, latents=given, **settings).images[0]
    with Pipeline.load(folder) as pipeline:
        got = pipeline(prompt, latents=latents, **settings).images[0]
    assert got.std() > 0.05
    assert psnr(got, expected) >= 50
