"""An IP-Adapter in one file: its settings, read off the shapes of its tensors, and the image encoder that it needs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from calotype.export.components import TRANSFORMERS_NOISE
from calotype.export.folder import Folder
from calotype.export.models.clip_vision import ImageEncoder, ImageEncoderConfig
from calotype.export.models.ip_adapter import HEAD, IPAdapterConfig
from calotype.export.single_file import SingleFile
from calotype.export.weights import load_module
from calotype.runtime.errors import CheckpointError, UnsupportedArchitectureError

KEYS = re.compile(r"ip_adapter\.(\d+)\.to_k_ip\.weight")
PLAIN, FULL, PLUS = "image_proj.proj.weight", "image_proj.proj.3.weight", "image_proj.latents"
ENCODERS = ("CLIPVisionModelWithProjection",)
FOLDER = "image_encoder"
# Beside the file, and where the published ones have the encoder that those for SDXL with "vit-h" in their names share.
BESIDE = (FOLDER, f"../models/{FOLDER}", f"../sdxl_models/{FOLDER}")


def has_ip_adapter(file: SingleFile) -> bool:
    """Whether it has an adapter's keys."""
    return bool(_numbers(file.state))


def ip_adapter_config(file: SingleFile) -> IPAdapterConfig:
    """The settings of the adapter in ``file``, but how many tokens one with a token for each part makes.

    Raises:
        UnsupportedArchitectureError: it projects something else than what an image encoder gives.
        CheckpointError: a tensor is missing.
    """
    state, numbers = file.state, _numbers(file.state)
    keys = [state[f"ip_adapter.{number}.to_k_ip.weight"] for number in numbers]
    layers, context = tuple(int(key.shape[0]) for key in keys), int(keys[0].shape[1])

    def size(name: str, axis: int) -> int:
        tensor = state.get(f"image_proj.{name}")
        if tensor is None or tensor.ndim <= axis:
            raise CheckpointError(f"{file.path} is an IP-Adapter without image_proj.{name}; take the publisher's own")
        return int(tensor.shape[axis])

    if PLAIN in state:
        tokens, rest = divmod(size("proj.weight", 0), context)
        if rest or not tokens:
            raise CheckpointError(f"{file.path} is an IP-Adapter whose tokens are not {context} wide, as its keys read")
        return IPAdapterConfig(
            kind="plain", image_dim=size("proj.weight", 1), cross_attention_dim=context, layers=layers, tokens=tokens
        )
    if FULL in state:
        return IPAdapterConfig(
            kind="full", image_dim=size("proj.0.weight", 1), cross_attention_dim=context, layers=layers
        )
    if PLUS not in state:
        raise UnsupportedArchitectureError(
            f"{file.path} holds an IP-Adapter FaceID, or one that is not known; supported: IP-Adapter, Plus, Plus-face "
            "and Full-face, which read pictures through CLIP's image encoder"
        )
    return IPAdapterConfig(
        kind="plus",
        image_dim=size("proj_in.weight", 1),
        cross_attention_dim=context,
        layers=layers,
        tokens=size("latents", 1),
        width=size("latents", 2),
        heads=size("layers.0.0.to_q.weight", 0) // HEAD,
        depth=len({name.split(".")[2] for name in state if name.startswith("image_proj.layers.")}),
        hidden=size("layers.0.1.1.weight", 0),
    )


def ip_adapter_table(file: SingleFile) -> dict[str, str]:
    """How the file numbers its layers: self-attentions, which it leaves alone, count too."""
    return {f"ip_adapter.{index}": f"ip_adapter.{number}" for index, number in enumerate(_numbers(file.state))}


def load_image_encoder(file: SingleFile, config: IPAdapterConfig) -> ImageEncoder:
    """The image encoder in the folder that was given, or in one beside ``file`` whose width fits.

    Raises:
        CheckpointError: there is none, or none fits.
    """
    given = file.image_encoder
    places = [file.path.parent / place for place in BESIDE] if given is None else [given, given / FOLDER]
    there = [place for place in places if (place / "config.json").is_file()]
    if not there:
        raise CheckpointError(
            f"{file.path} is an IP-Adapter, and {given or file.path.parent / FOLDER} holds no image encoder; name its "
            "folder, with config.json and model.safetensors, with --image-encoder"
        )
    found = {place: _config(place) for place in there}
    fitting = [place for place, own in found.items() if _width(own, config) == config.image_dim]
    if not fitting:
        widths = ", ".join(f"{place} gives {_width(own, config)}" for place, own in found.items())
        raise CheckpointError(
            f"{file.path} reads image embeddings of width {config.image_dim}, and {widths}; name the folder of the "
            "encoder that it was trained with by --image-encoder"
        )
    folder = Folder.open(fitting[0])
    encoder = load_module(ImageEncoder, found[fitting[0]], folder.weights("", "model"), "image encoder")
    if config.kind != "plain":
        encoder.leave_last_layer_out()
    return encoder


def _config(place: Path) -> ImageEncoderConfig:
    config: Mapping[str, Any] = Folder.open(place).config("", ENCODERS)
    return ImageEncoderConfig.from_json({key: own for key, own in config.items() if key not in TRANSFORMERS_NOISE})


def _width(encoder: ImageEncoderConfig, adapter: IPAdapterConfig) -> int:
    """Of what the adapter reads: all of a picture, or its parts."""
    return encoder.projection_dim if adapter.kind == "plain" else encoder.hidden_size


def _numbers(state: Mapping[str, Tensor]) -> list[int]:
    return sorted(int(match[1]) for match in map(KEYS.fullmatch, state) if match)
