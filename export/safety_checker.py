"""A checkpoint's own safety checker, as one more network of its bundle."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from calotype.export.checkpoint import Checkpoint
from calotype.export.components import TRANSFORMERS_NOISE
from calotype.export.folder import Folder
from calotype.export.graphs import GraphPlan, float_spec
from calotype.export.json_files import read_json
from calotype.export.models.clip_vision import ImageEncoderConfig
from calotype.export.models.safety_checker import CONCEPTS, SPECIAL, SafetyChecker
from calotype.export.weights import load_module
from calotype.runtime.bundle.manifest import SAFETY_CHECKER
from calotype.runtime.errors import CheckpointError, UnsupportedArchitectureError

CLASSES = ("StableDiffusionSafetyChecker",)
TOWER = "vision_model."  # of its weights' names; twice where an older transformers wrote them
# What is done to a picture before: the runtime does nothing else.
PREPROCESSING = {
    "do_resize": True,
    "do_center_crop": True,
    "do_normalize": True,
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def with_safety_checker(checkpoint: Checkpoint, folder: Folder) -> Checkpoint:
    """``checkpoint`` with the safety checker that lies in its ``folder``.

    Raises:
        CheckpointError: there is none, or it does not match its configuration.
        UnsupportedArchitectureError: it is of another kind, or is shown pictures in another way than CLIP.
    """
    if not (folder.path / SAFETY_CHECKER / "config.json").exists():
        raise CheckpointError(f"{folder.path} has no folder {SAFETY_CHECKER}; export without --safety-checker")
    settings = folder.config(SAFETY_CHECKER, CLASSES)
    vision = {key: own for key, own in settings.get("vision_config", {}).items() if key not in TRANSFORMERS_NOISE}
    projection = settings.get("projection_dim") or vision.get("projection_dim") or ImageEncoderConfig.projection_dim
    config = ImageEncoderConfig.from_json({**vision, "projection_dim": projection})
    _check_preprocessing(folder.path / "feature_extractor", config)
    weights = folder.weights(SAFETY_CHECKER, "model")
    state = {re.sub(f"^({TOWER}){{2}}", TOWER, name): own for name, own in weights.items()}
    checker = load_module(SafetyChecker, config, state, "safety checker")
    return dataclasses.replace(
        checkpoint,
        components={**checkpoint.components, SAFETY_CHECKER: checker},
        graphs=(*checkpoint.graphs, _plan(checker)),
    )


def _plan(checker: SafetyChecker) -> GraphPlan:
    size = checker.config.image_size
    return GraphPlan(
        network=SAFETY_CHECKER,
        component=SAFETY_CHECKER,
        module=checker,
        inputs=(float_spec("pixel_values", "batch", 3, size, size),),
        outputs=(float_spec("special_care", "batch", SPECIAL), float_spec("concepts", "batch", CONCEPTS)),
    )


def _check_preprocessing(folder: Path, config: ImageEncoderConfig) -> None:
    """Raises UnsupportedArchitectureError where pictures are made ready in another way; nothing said is CLIP's."""
    path = folder / "preprocessor_config.json"
    found = read_json(path) if path.exists() else {}
    for name, value in PREPROCESSING.items():
        if found.get(name, value) != value:
            raise UnsupportedArchitectureError(
                f"{path} has {name}={found[name]!r}, which is not supported; use {value}"
            )
    for name in ("size", "crop_size"):
        own = found.get(name, config.image_size)
        sides = set(own.values()) if isinstance(own, dict) else {own}
        if sides != {config.image_size}:
            raise UnsupportedArchitectureError(
                f"{path} has {name}={own!r}, and the safety checker takes {config.image_size} pixels"
            )
