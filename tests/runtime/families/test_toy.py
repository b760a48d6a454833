"""The recipe "add a family" of docs/architecture.md, tried once: a network that is no UNet, with words of its own.

Nothing outside this file knows the family: it has another denoising network, other rows, no text encoder's network and
no CLIP tokenizer. What draws, batches and saves it is what draws Stable Diffusion.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest
from safetensors.numpy import save_file

from calotype.runtime.arrays import Array, Inputs
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.manifest import FileRecord, Manifest
from calotype.runtime.bundle.spec import ModelSpec, TensorSpec
from calotype.runtime.errors import BundleError
from calotype.runtime.families import FAMILIES, Encoder
from calotype.runtime.families.base import Conditioner
from calotype.runtime.pictures.canvas import Canvas
from calotype.runtime.pictures.embedded import read_parameters
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.recall import recall
from calotype.runtime.request import Request
from calotype.runtime.sessions.session import Session
from calotype.runtime.text.textual_inversion import Embedding


class Letters:
    """Each letter of a prompt is a row of three numbers; see :class:`Conditioner`."""

    def encode(self, prompt: str, negative_prompt: str | None, clip_skip: int) -> tuple[Inputs, Inputs | None]:
        texts = [prompt] if negative_prompt is None else [prompt, negative_prompt]
        length = max(1, *map(len, texts))
        codes = [np.array([ord(letter) % 32 for letter in text.ljust(length)], np.float32) for text in texts]
        rows = [{"letters": np.stack([np.sin(own), np.cos(own), own / 32], axis=1)} for own in codes]
        return rows[0], rows[1] if len(rows) > 1 else None


@dataclasses.dataclass(frozen=True)
class Toy:
    """See :class:`calotype.runtime.families.base.Family`."""

    name: str = "toy"
    denoiser: str = "mixer"
    encoders: tuple[Encoder, ...] = ()
    editor: str | None = None
    flow: bool = False

    def check(self, manifest: Manifest) -> None:
        if "mixer" not in manifest.networks:
            raise BundleError("a toy needs a mixer")

    def conditioner(self, _: Bundle, __: Callable[[str], Session], ___: Sequence[Embedding]) -> Letters:
        return Letters()

    def rows(
        self, manifest: Manifest, conditioner: Conditioner, request: Request, canvas: Canvas
    ) -> tuple[Inputs, Inputs | None]:
        assert request.guidance_scale is not None
        guided = self.guided(manifest, request.guidance_scale)
        return conditioner.encode(request.prompt, request.negative_prompt if guided else None, 0)

    def reference_rows(self, latents: Sequence[Array]) -> Inputs:
        raise NotImplementedError

    def latent_shape(self, manifest: Manifest, canvas: Canvas) -> tuple[int, int, int]:
        return manifest.vae.latent_channels, canvas.height // manifest.vae.downscale, canvas.width // 2

    def context_channels(self, manifest: Manifest) -> int:
        return 0

    def guided(self, manifest: Manifest, guidance_scale: float) -> bool:
        return guidance_scale > 1

    def solver_settings(self, settings: Mapping[str, Any], area: int, steps: int) -> Mapping[str, Any]:
        return settings


TOY = Toy()
MIXER = """
<ir_version: 10, opset_import: ["": 20]>
mixer (
    float[rows, 4, height, width] sample, float[rows] timestep, float[rows, count, 3] letters
) => (float[rows, 4, height, width] noise_pred) <int64[2] axes = {1, 2}, int64[4] places = {-1, 1, 1, 1}>
{
    mean = ReduceMean <keepdims = 0> (letters, axes)
    slow = Constant <value_float = 0.001> ()
    share = Constant <value_float = 0.5> ()
    time = Mul (timestep, slow)
    both = Add (mean, time)
    shift = Reshape (both, places)
    half = Mul (sample, share)
    noise_pred = Add (half, shift)
}
"""


def tensor(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)


@pytest.fixture(scope="module")
def toy(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle's autoencoder behind a network that adds letters and time to its sample."""
    folder = tmp_path_factory.mktemp("toy") / "toy"
    shutil.copytree(tiny_bundle, folder)
    inputs = (
        tensor("sample", "rows", 4, "height", "width"),
        tensor("timestep", "rows"),
        tensor("letters", "rows", "count", 3),
    )
    outputs = (tensor("noise_pred", "rows", 4, "height", "width"),)
    (folder / "mixer.onnx").write_bytes(onnx.parser.parse_model(MIXER).SerializeToString())
    save_file({"nothing": np.zeros(1, np.float32)}, folder / "mixer.safetensors")
    manifest = Manifest.read(folder)
    mixer = ModelSpec(inputs=inputs, outputs=outputs, graphs={"float32": "mixer.onnx"}, weights=("mixer.safetensors",))
    kept = {name: spec for name, spec in manifest.networks.items() if name.startswith("vae")}
    files = dict(manifest.files) | {name: FileRecord.of(folder / name) for name in ("mixer.onnx", "mixer.safetensors")}
    changed = dataclasses.replace(
        manifest, name="toy", family="toy", networks={**kept, "mixer": mixer}, tokenizers={}, files=files, parity={}
    )
    (folder / "calotype.json").write_text(changed.dumps(), encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line that a family adds to what is there."""
    monkeypatch.setitem(FAMILIES, "toy", f"{__name__}:TOY")


def test_a_family_of_its_own_is_drawn_by_the_same_loop(toy: Path, tmp_path: Path) -> None:
    calls: list[dict[str, Any]] = [
        {"prompt": "cat", "seed": 1, "guidance_scale": 4.0, "scheduler": "heun"},
        {"prompt": "dog", "seed": 2, "guidance_scale": 1.0, "scheduler": "euler"},
        {"prompt": "elephant", "seed": 3, "guidance_scale": 2.0, "scheduler": "dpmpp-2m"},
    ]
    requests = [Request(num_inference_steps=4, height=32, width=32, **call) for call in calls]
    with Pipeline.load(toy, "cpu") as pipeline:
        together = dict(pipeline.draw(requests))
        for number, request in enumerate(requests):
            alone = next(iter(pipeline.draw([request])))[1]
            assert together[number].image.tobytes() == alone.image.tobytes()
        assert len({picture.image.tobytes() for picture in together.values()}) == 3
        path = together[0].save(tmp_path / "cat.png")
        found = recall(read_parameters(path), [toy])
        assert found.model == toy
        again = next(iter(pipeline.draw([found.request])))[1]
        assert again.image.tobytes() == together[0].image.tobytes()


def test_a_family_that_is_not_known_is_named(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FAMILIES, "toy")
    with pytest.raises(
        BundleError, match="this Calotype cannot draw with the family 'toy'; valid: flux2-klein, sd1, sd2, sdxl"
    ):
        Pipeline.load(toy, "cpu")
