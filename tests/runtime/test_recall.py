"""A picture is drawn again from what it carries, byte for byte; and what it names is only ever looked for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from calotype.runtime.adapters.lora import Lora
from calotype.runtime.denoising.acceleration import Acceleration
from calotype.runtime.errors import InputError
from calotype.runtime.picture import Picture
from calotype.runtime.pictures.embedded import read_parameters
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.recall import recall
from calotype.runtime.request import Request

NAME = "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, rng = tmp_path_factory.mktemp("loras") / "my style (v2).safetensors", np.random.default_rng(0)
    shapes = {f"{NAME}.lora_A.weight": (2, 32), f"{NAME}.lora_B.weight": (32, 2)}
    save_file({key: rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}, path)
    return path


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(tiny_bundle, "cpu") as opened:
        yield opened


def drawn(pipeline: Pipeline, request: Request) -> Picture:
    return next(iter(pipeline.draw([request])))[1]


KINDS: list[dict[str, Any]] = [
    {"scheduler": "euler", "num_inference_steps": 3},
    {"guidance_scale": 0.1 + 0.2, "guidance_rescale": 1 / 3, "negative_prompt": "le\nNegative prompt: x"},
    {"guidance_interval": (0.1, 7.123456789012345), "scheduler": "dpmpp-2m", "scheduler_config": {"solver_order": 3}},
    {"sigmas": (9.123456789, 2.0, 1 / 3, 0.0), "scheduler": "euler"},
    {"timesteps": (900, 500, 100), "scheduler": "ddim", "scheduler_config": {"eta": 0.7}},
    {"scheduler_config": {"sigma_spacing": "karras"}, "scheduler": "heun", "seed": 2**64 - 1},
    {"fast": Acceleration(cache_interval=2), "clip_skip": 1, "width": 40},
    {"prompt": 'a "quoted", (word:1.3): \\ <lora:x:1>\nSteps: 99, ', "seed": 0},
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_drawn_again_from_its_settings(
    pipeline: Pipeline, tiny_bundle: Path, tmp_path: Path, kind: dict[str, Any]
) -> None:
    usual: dict[str, Any] = {"prompt": "red", "seed": 7}
    if not {"sigmas", "timesteps"} & kind.keys():
        usual["num_inference_steps"] = 4
    picture = drawn(pipeline, Request(**{**usual, **kind}))
    path = picture.save(tmp_path / "a.png")
    found = recall(read_parameters(path), [tiny_bundle.parent])
    assert found.model == tiny_bundle
    again = drawn(pipeline, found.request)
    assert again.image.tobytes() == picture.image.tobytes()
    assert again.settings.parameters() == picture.settings.parameters()


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_other_kinds_of_files_carry_them_too(
    pipeline: Pipeline, tiny_bundle: Path, tmp_path: Path, suffix: str
) -> None:
    picture = drawn(pipeline, Request(prompt="röd äpple", seed=3, num_inference_steps=2))
    found = recall(read_parameters(picture.save(tmp_path / f"a{suffix}")), [tiny_bundle])
    assert drawn(pipeline, found.request).image.tobytes() == picture.image.tobytes()


def test_loras_and_pictures_are_found_by_their_hashes(
    pipeline: Pipeline, tiny_bundle: Path, tmp_path: Path, lora: Path
) -> None:
    source = tmp_path / "source.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(source)
    request = Request(
        prompt="red",
        seed=1,
        num_inference_steps=4,
        image=source,
        strength=0.55,
        loras=[Lora(path=lora, scale=0.3), Lora(path=lora, scale=-0.1)],
    )
    picture = drawn(pipeline, request)
    text = read_parameters(picture.save(tmp_path / "a.png"))
    with pytest.raises(InputError, match=r"started from 'source\.png'; give that file as --image"):
        recall(text, [tiny_bundle, lora.parent])
    other = tmp_path / "other.png"
    Image.new("RGB", (32, 32)).save(other)
    with pytest.raises(InputError, match="is not the image that the picture started from"):
        recall(text, [tiny_bundle, lora.parent], image=other)
    with pytest.raises(
        InputError, match=r"needs the file 'my style \(v2\)\.safetensors', and there is no file of that name"
    ):
        recall(text, [tiny_bundle], image=source)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    shutil.copy(lora, moved / lora.name)
    found = recall(text, [tiny_bundle, moved], image=source)
    assert drawn(pipeline, found.request).image.tobytes() == picture.image.tobytes()
    (moved / lora.name).write_bytes(b"another")
    with pytest.raises(InputError, match="1 of that name, none with its hash"):
        recall(text, [tiny_bundle, moved], image=source)


def test_no_path_in_a_picture_is_opened(tiny_bundle: Path, tmp_path: Path, lora: Path) -> None:
    """What a picture names is compared with the names in the user's folders, and never looked up as a path."""
    text = (
        f"red\nSteps: 2, Sampler: ddim, CFG scale: 7.5, Seed: 3, Size: 32x32, Model hash: 0123456789, "
        f'Model: {tiny_bundle}, Lora: "{lora}:1 0123456789", Version: calotype 9'
    )
    with pytest.raises(InputError, match=r"the picture needs the file '.*my style \(v2\)\.safetensors'; name"):
        recall(text)
    with pytest.raises(InputError, match=r"the picture needs the model .* with the hash 0123456789, which is not in"):
        recall(text.replace(f'Lora: "{lora}:1 0123456789", ', ""), [tmp_path])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "red\nSteps: 2, Sampler: Euler a, Seed: 3, Version: v1.9.0",
            "made by .v1.9.0., whose pictures cannot be",
        ),
        ("red\nSteps: 2, Sampler: Euler a, Seed: 3", "made by another program"),
        ("red\nSteps: 2, Clip skip: x, Version: calotype 1", "the picture's settings are damaged"),
        ("red\nSteps: 2, Scheduler settings: {}}}, Version: calotype 1", "the picture's settings are damaged"),
        ('red\nSteps: 2, Lora: "a b c", Version: calotype 1', "the picture's settings are damaged at Lora"),
    ],
)
def test_what_cannot_be_drawn_again_is_said_in_a_line(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        recall(text)
    assert "\n" not in str(caught.value)
