"""The safety checker against diffusers' own, on small random weights, its pictures made ready as transformers does."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from calotype.export.bundle import export_checkpoint
from calotype.export.sources import load_checkpoint
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.errors import BundleError, CheckpointError, InputError, UnsupportedArchitectureError
from calotype.runtime.pictures.safety import SafetyChecker
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.sessions import open_session
from tests.kept import Kept
from tests.runtime.command_line import calotype
from tests.safety_checkers import processor, reference, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tiny_checkpoint, tmp_path_factory.mktemp("checked") / "tiny")


@pytest.fixture(scope="module")
def bundle(kept: Kept, checkpoint: Path) -> Path:
    def make(folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            export_checkpoint(checkpoint, folder / "tiny", precision="fp32", safety_checker=True)

    return kept("checked", make) / "tiny"


def pictures() -> list[Image.Image]:
    """Of several shapes and kinds, none of the size that is read."""
    rng = np.random.default_rng(0)
    found = [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for h, w in ((40, 64), (64, 40), (33, 33))]
    for number in range(21):
        low = rng.integers(0, 256, (3, 4, 3), np.uint8)
        found.append(Image.fromarray(low).resize((48 + number, 64 - number), Image.Resampling.BICUBIC))
    return found


def test_decisions_and_scores_are_those_of_diffusers(checkpoint: Path, bundle: Path) -> None:
    images, manifest = pictures(), Bundle.open(bundle).manifest
    scores, expected = reference(checkpoint, images)
    with open_session(bundle, manifest.networks["safety_checker"], "cpu") as session:
        checker = SafetyChecker(session)
        flagged = []
        for image, wanted in zip(images, scores, strict=True):
            flagged += checker.flagged([image])
            got = np.concatenate([session.buffer(name, {"batch": 1})[0] for name in ("special_care", "concepts")])
            assert np.abs(got - wanted).max() < 1e-5
    assert flagged == expected
    assert 3 < sum(expected) < len(images) - 3  # else thresholds say nothing
    lowered = [score[3:].max() <= 0.0005 for score in scores]
    assert any(flag and low for flag, low in zip(flagged, lowered, strict=True))  # special care alone decides


def test_published_names_of_weights_are_read(checkpoint: Path, tmp_path: Path) -> None:
    """Those that transformers wrote before its version 5, and the positions that it stored with them."""
    other = shutil.copytree(checkpoint, tmp_path / "other")
    file = other / "safety_checker" / "model.safetensors"
    own = load_file(file)
    published = {name.replace("vision_model.", "vision_model.vision_model.", 1): value for name, value in own.items()}
    published["vision_model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(published, file)
    one, two = (load_checkpoint(path, safety_checker=True).components["safety_checker"] for path in (checkpoint, other))
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name])


def test_pictures_are_made_ready_as_transformers_does() -> None:
    from calotype.runtime.pictures.clip_pictures import clip_pixels

    for image in pictures():
        wanted = processor()(image, return_tensors="np")["pixel_values"][0]
        assert np.abs(clip_pixels(image, wanted.shape[-1]) - wanted).max() < 1e-5


def test_a_picture_that_is_taken_exception_to_is_black(bundle: Path, checkpoint: Path) -> None:
    draw: dict[str, Any] = {"width": 32, "height": 32, "num_inference_steps": 2}
    with Pipeline.load(bundle, "cpu") as plain, Pipeline.load(bundle, "cpu", safety_checker=True) as checked:
        before = plain("a", seed=0, num_images_per_prompt=8, **draw).pictures
        after = checked("a", seed=0, num_images_per_prompt=8, **draw).pictures
        _, expected = reference(checkpoint, [picture.image for picture in before])
        arrays = checked("a", seed=0, num_images_per_prompt=8, output_type="np", **draw).pictures
    assert [picture.flagged for picture in before] == [None] * 8
    assert [picture.flagged for picture in after] == [picture.flagged for picture in arrays] == expected
    for was, now, array in zip(before, after, arrays, strict=True):
        assert np.asarray(now).any() != now.flagged
        assert np.asarray(array.image).any() != now.flagged
        assert now.flagged or np.array_equal(np.asarray(was), np.asarray(now))


def test_the_command_line_says_so(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    draw = ["--model", bundle, "--width", 32, "--height", 32, "--steps", 2, "--images", 8, "--json"]
    told = calotype("generate", "a", *draw, "--seed", 0, "--safety-checker", "--output", tmp_path / "a.png")
    assert told.returncode == 0, told.stderr
    flags = [image["flagged"] for image in json.loads(told.stdout)["images"]]
    assert told.stderr.count("is black: the safety checker takes exception") == sum(flags)
    exported = calotype("export", checkpoint, tmp_path / "plain", "--precision", "float32")
    assert exported.returncode == 0, exported.stderr
    refused = calotype("generate", "a", "--model", tmp_path / "plain", "--safety-checker")
    assert refused.returncode == 1 and "export the checkpoint again with --safety-checker" in refused.stderr


def test_what_cannot_be_exported_is_said(checkpoint: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no folder safety_checker; export without --safety-checker"):
        export_checkpoint(tiny_checkpoint, tmp_path / "a", safety_checker=True)
    (tmp_path / "file.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="is one file, which has no safety checker"):
        export_checkpoint(tmp_path / "file.safetensors", tmp_path / "a", safety_checker=True)
    other = shutil.copytree(checkpoint, tmp_path / "other")
    file = other / "feature_extractor" / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    wrong = (({"image_mean": [0.5] * 3}, "image_mean="), ({"crop_size": {"height": 9, "width": 9}}, "crop_size="))
    for change, said in wrong:
        file.write_text(json.dumps(settings | change))
        with pytest.raises(UnsupportedArchitectureError, match=said):
            export_checkpoint(other, tmp_path / "a", safety_checker=True)
    with pytest.raises(BundleError, match="has no safety_checker"):
        Pipeline.load("talbot", "cpu", safety_checker=True)
