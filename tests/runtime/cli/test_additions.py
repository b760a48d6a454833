"""LoRA, textual inversion and other autoencoders from the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from calotype.runtime.adapters.lora import Lora
from calotype.runtime.pictures.autoencoder import Tiles
from calotype.runtime.pictures.embedded import read_parameters
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.text.textual_inversion import Embedding
from tests.runtime.command_line import calotype


def test_they_reach_the_pipeline_and_the_file(tiny_bundle: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lora = {"down": rng.standard_normal((2, 4, 3, 3), np.float32), "up": rng.standard_normal((32, 2, 1, 1), np.float32)}
    save_file(
        {f"lora_unet_conv_in.lora_{part}.weight": value for part, value in lora.items()}, tmp_path / "a.safetensors"
    )
    save_file({"emb_params": rng.standard_normal((2, 32), np.float32)}, tmp_path / "b.safetensors")
    (tmp_path / "a.toml").write_text(f'lora = ["a.safetensors:-0.5"]\nmodel = "{tiny_bundle}"\nvae = "{tiny_bundle}"\n')
    size = ("--width", "70", "--height", "140", "--seed", "3", "--steps", "2")
    result = calotype(
        "generate",
        "red <b>",
        "--config",
        "a.toml",
        "--embedding",
        "b.safetensors:<b>",
        "--vae-tiling",
        *size,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    text = read_parameters(tmp_path / "calotype.png")
    for part in ('Lora: "a.safetensors:-0.5 ', 'TI: "b.safetensors:<b> ', "VAE: tiny", "VAE tiles: True"):
        assert part in text
    with Pipeline.load(
        tiny_bundle,
        loras=[Lora(path=tmp_path / "a.safetensors", scale=-0.5)],
        embeddings=[Embedding.read(tmp_path / "b.safetensors", "<b>")],
        vae_tiles=Tiles(),
    ) as pipeline:
        expected = pipeline("red <b>", width=70, height=140, seed=3, num_inference_steps=2).images[0]
        pipeline.set_loras([])
        without = pipeline("red <b>", width=70, height=140, seed=3, num_inference_steps=2).images[0]
    with Image.open(tmp_path / "calotype.png") as picture:
        assert picture.tobytes() == expected.tobytes() != without.tobytes()


def test_a_file_that_does_not_fit_is_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    save_file({"unet.no.lora_A.weight": np.ones((1, 1), np.float32)}, tmp_path / "a.safetensors")
    result = calotype("generate", "a", "-m", str(tiny_bundle), "--lora", "a.safetensors:0.8", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert "a.safetensors does not fit this model; 1 keys match nothing: unet.no;" in result.stderr
    assert len(result.stderr.splitlines()) == 1
