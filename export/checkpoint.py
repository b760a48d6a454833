"""A checkpoint in diffusers' layout: a folder with a ``model_index.json`` and one folder for each component."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calotype.export.models.autoencoder import Autoencoder, AutoencoderConfig
from calotype.export.models.clip import TextEncoder, TextEncoderConfig
from calotype.export.models.unet import UNet, UNetConfig
from calotype.export.weights import load_strictly, read_component
from calotype.runtime.errors import CheckpointError, UnsupportedArchitectureError

# Settings that transformers writes into every configuration and that no text tower reads.
_TRANSFORMERS_NOISE = frozenset(
    {
        "chunk_size_feed_forward",
        "id2label",
        "is_encoder_decoder",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "problem_type",
        "return_dict",
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Loaded components and what the manifest needs to know of them."""

    family: str
    text_encoder: TextEncoder
    unet: UNet
    vae: Autoencoder
    tokenizer: Path
    tokenizer_config: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    card: Mapping[str, Any]
    sample_size: int | None


def load_diffusers(folder: Path) -> Checkpoint:
    """Load a Stable Diffusion 1.x or 2.x checkpoint.

    Raises:
        CheckpointError: when something is missing or does not match.
        UnsupportedArchitectureError: for any other pipeline.
    """
    index = _json(folder / "model_index.json")
    pipeline = index.get("_class_name")
    if pipeline != "StableDiffusionPipeline":
        raise UnsupportedArchitectureError(
            f"{folder} holds a {pipeline}, which is not supported yet; supported: StableDiffusionPipeline"
        )
    unet_json = _json(folder / "unet" / "config.json")
    text_json = _json(folder / "text_encoder" / "config.json")
    unet = UNet(UNetConfig.from_json(unet_json)).eval()
    load_strictly(unet, read_component(folder / "unet", "diffusion_pytorch_model"), "unet")
    vae = Autoencoder(AutoencoderConfig.from_json(_json(folder / "vae" / "config.json"))).eval()
    load_strictly(vae, read_component(folder / "vae", "diffusion_pytorch_model"), "vae")
    text = {key: value for key, value in text_json.items() if key not in _TRANSFORMERS_NOISE}
    text_encoder = TextEncoder(TextEncoderConfig.from_json(text)).eval()
    load_strictly(text_encoder, read_component(folder / "text_encoder", "model"), "text encoder")
    card = folder / "model_card.json"
    for name in ("vocab.json", "merges.txt"):
        if not (folder / "tokenizer" / name).is_file():
            raise CheckpointError(
                f"{folder / 'tokenizer'} has no {name}; a CLIP tokenizer is vocab.json and merges.txt"
            )
    return Checkpoint(
        family="sd2" if unet.config.cross_attention_dim == 1024 else "sd1",
        text_encoder=text_encoder,
        unet=unet,
        vae=vae,
        tokenizer=folder / "tokenizer",
        tokenizer_config=_tokenizer_config(folder / "tokenizer"),
        scheduler=_json(folder / "scheduler" / "scheduler_config.json"),
        card=_json(card) if card.exists() else {},
        sample_size=unet_json.get("sample_size"),
    )


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    """Both files that name special tokens; transformers lets ``special_tokens_map.json`` win (SD 2.x pads by it)."""
    config = _json(folder / "tokenizer_config.json")
    special = folder / "special_tokens_map.json"
    return config | _json(special) if special.exists() else config


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; a checkpoint folder in diffusers' layout has it") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return value
