"""The models that are measured, as checkpoints in diffusers' layout that every peer reads, and as bundles.

``sd1`` and ``sdxl`` have random weights from a seed, since speed does not depend on their values, with Euler's method
on evenly spaced timesteps, which all peers have. ``talbot`` is the bundled model: its weights are taken out of its
bundle, whose tensors have the names of the checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calotype.export.models.autoencoder import Autoencoder, AutoencoderConfig
from calotype.export.models.clip import TextEncoder, TextEncoderConfig
from calotype.export.models.config import ModelConfig
from calotype.export.models.unet import UNet, UNetConfig
from calotype.export.tokenizer import Tokenizer
from calotype.runtime.bundle.folder import BUNDLED
from calotype.runtime.bundle.manifest import Manifest
from training.config import TALBOT

EULER = {
    "_class_name": "EulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "linspace",
    "steps_offset": 1,  # diffusers insists on it; evenly spaced timesteps make no use of it
}
CLIP_L = TextEncoderConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
BIG_G = TextEncoderConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    projection_dim=1280,
)
SDXL_UNET = UNetConfig(
    block_out_channels=(320, 640, 1280),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
SIZES: dict[str, dict[str, tuple[type[nn.Module], ModelConfig]]] = {
    "sd1": {
        "text_encoder": (TextEncoder, CLIP_L),
        "unet": (UNet, UNetConfig(cross_attention_dim=768)),
        "vae": (Autoencoder, AutoencoderConfig()),
    },
    "sdxl": {
        "text_encoder": (TextEncoder, CLIP_L),
        "text_encoder_2": (TextEncoder, dataclasses.replace(BIG_G, with_projection=True)),
        "unet": (UNet, SDXL_UNET),
        "vae": (Autoencoder, AutoencoderConfig(scaling_factor=0.13025)),
    },
}
LATENTS = {"sd1": 64, "sdxl": 128}  # of a side, as the released models have them: 512 and 1024 pixels
PIPELINES = {"sd1": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
LIBRARIES = {
    "scheduler": ("diffusers", "EulerDiscreteScheduler"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "CLIPTokenizer"),
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}
MODELS = ("talbot", "sd1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model on disk in both forms, and the pixels of a side of the pictures it makes."""

    name: str
    checkpoint: Path
    bundle: Path
    size: int


def model(name: str, work: Path) -> Model:
    """The model of that name, made in the folder ``work`` where it is not there yet."""
    if name != "talbot" and name not in SIZES:
        raise SystemExit(f"there is no model {name!r}; valid: talbot, {', '.join(SIZES)}")
    checkpoint = work / name / "checkpoint"
    if not checkpoint.exists():
        partial = checkpoint.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        write = f"import benchmarks.checkpoints as c; c.make({name!r}, {str(partial)!r})"
        subprocess.run([sys.executable, "-c", write], check=True)  # its memory goes with it
        partial.rename(checkpoint)
    bundle = BUNDLED / name if name == "talbot" else work / name / "bundle"
    if not bundle.exists():
        subprocess.run([sys.executable, "-m", "calotype.runtime", "export", checkpoint, bundle], check=True)
    return Model(name=name, checkpoint=checkpoint, bundle=bundle, size=Manifest.read(bundle).defaults.height)


def make(name: str, folder: str) -> None:
    """Write the checkpoint of the model ``name`` to ``folder``."""
    (_talbot if name == "talbot" else _random)(name, Path(folder))


def _random(family: str, folder: Path) -> None:
    torch.manual_seed(0)
    for name, (build, config) in SIZES[family].items():
        torch.set_default_dtype(torch.float16)
        module = build(config)
        torch.set_default_dtype(torch.float32)
        _write_component(folder / name, config, module.state_dict(), sample_size=LATENTS[family])
    for name in ("tokenizer", "tokenizer_2")[: 2 if family == "sdxl" else 1]:
        _write_tokenizer(folder / name, Tokenizer.clip("!" if name == "tokenizer_2" else "<|endoftext|>"), 77)
    _write_pipeline(folder, PIPELINES[family], EULER)


def _talbot(name: str, folder: Path) -> None:
    bundle = BUNDLED / name
    manifest = Manifest.read(bundle)
    vae = dataclasses.replace(TALBOT.autoencoder, scaling_factor=manifest.vae.scaling_factor)
    sample_size = manifest.defaults.height // manifest.vae.downscale
    for component, config in {"text_encoder": TALBOT.text_encoder, "unet": TALBOT.unet, "vae": vae}.items():
        weights = load_file(bundle / f"{component}.safetensors")
        _write_component(folder / component, config, weights, sample_size=sample_size)
    spec = manifest.tokenizers["tokenizer"]
    tokenizer = Tokenizer(vocab=(bundle / spec.vocab).read_bytes(), merges=(bundle / spec.merges).read_bytes())
    _write_tokenizer(folder / "tokenizer", tokenizer, spec.max_length)
    shared = {key: value for key, value in manifest.scheduler.items() if key in EULER}
    _write_pipeline(
        folder,
        PIPELINES["sd1"],
        EULER | shared | {"_class_name": EULER["_class_name"]} | {"timestep_spacing": EULER["timestep_spacing"]},
    )


def _write_component(folder: Path, config: ModelConfig, weights: dict[str, Tensor], *, sample_size: int) -> None:
    """One network in float16, with the settings that diffusers and transformers need to know what it is."""
    folder.mkdir(parents=True)
    settings = {"_class_name": LIBRARIES[folder.name][1], **config.to_json()}
    if isinstance(config, TextEncoderConfig):
        architecture = "CLIPTextModelWithProjection" if settings.pop("with_projection") else "CLIPTextModel"
        settings |= {
            "architectures": [architecture],
            "model_type": "clip_text_model",
            "bos_token_id": config.vocab_size - 2,
            "pad_token_id": config.eos_token_id,
        }
    elif isinstance(config, AutoencoderConfig):
        levels = len(config.block_out_channels)
        settings |= {
            "sample_size": sample_size * config.downscale,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        }
    else:
        settings["sample_size"] = sample_size
    _write_json(folder / "config.json", settings)
    stem = "model" if isinstance(config, TextEncoderConfig) else "diffusion_pytorch_model"
    halves = {name: tensor.half().contiguous() for name, tensor in weights.items()}
    save_file(halves, folder / f"{stem}.safetensors", {"format": "pt"})


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, length: int) -> None:
    folder.mkdir()
    (folder / "vocab.json").write_bytes(tokenizer.vocab)
    (folder / "merges.txt").write_bytes(tokenizer.merges)
    special = {
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "pad_token": tokenizer.pad_token,
        "unk_token": tokenizer.eos_token,
    }
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, **special},
    )


def _write_pipeline(folder: Path, name: str, scheduler: dict[str, Any]) -> None:
    (folder / "scheduler").mkdir()
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    parts = {part: list(LIBRARIES[part]) for part in LIBRARIES if (folder / part).is_dir()}
    absent = {part: [None, None] for part in ("safety_checker", "feature_extractor", "image_encoder")}
    index = parts if name == "StableDiffusionXLPipeline" else parts | absent | {"requires_safety_checker": False}
    _write_json(folder / "model_index.json", {"_class_name": name, **index})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
