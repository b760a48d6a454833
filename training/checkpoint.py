"""Write what was trained as a folder in diffusers' layout, which ``calotype export`` and diffusers both read."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training import data, finetune, unet
from training.config import TrainingConfig
from training.words import words

ATTRIBUTION = (
    "Noto Emoji, Google, Apache-2.0 (through @iconify-json/noto)",
    "Twemoji, Twitter, Inc. and other contributors, CC-BY-4.0 (through @iconify-json/twemoji)",
    "Fluent Emoji, Microsoft Corporation, MIT (through @iconify-json/fluent-emoji-flat)",
    "emojibase-data, Miles Johnson, MIT (names and keywords)",
)
# The stages that train a component, the last first, and the key of its weights in their checkpoints.
SOURCES = {
    "vae": (("autoencoder", "ema"),),
    "unet": (("unet", "ema"),),
    "text_encoder": (("synonyms", "model"), ("colours", "model"), ("unet", "text_ema")),
}
SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 0,
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "lower_order_final": True,
    "final_sigmas_type": "zero",
}
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def make(config: TrainingConfig) -> None:
    """Write ``talbot/`` in the work folder, with the averaged weights in fp16.

    What no stage of this run has trained is taken from the bundle that the run starts from.
    """
    states = {component: _state(config, component) for component in SOURCES}
    vae = dataclasses.replace(config.autoencoder, scaling_factor=unet.scaling_factor(config))
    levels = len(vae.block_out_channels)
    folder, temporary = config.work / "talbot", config.work / "talbot.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    _write(
        temporary / "unet",
        "UNet2DConditionModel",
        config.unet.to_json() | {"sample_size": config.image_size // vae.downscale},
        states["unet"][0],
    )
    _write(
        temporary / "vae",
        "AutoencoderKL",
        vae.to_json()
        | {
            "sample_size": config.image_size,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        },
        states["vae"][0],
    )
    text = config.text_encoder.to_json()
    del text["with_projection"]
    text |= {"model_type": "clip_text_model", "bos_token_id": config.text_encoder.vocab_size - 2}
    text |= {"pad_token_id": config.text_encoder.eos_token_id}
    _write(temporary / "text_encoder", "CLIPTextModel", text, states["text_encoder"][0], "model.safetensors")
    (temporary / "scheduler").mkdir()
    _json(temporary / "scheduler" / "scheduler_config.json", SCHEDULER)
    shutil.copytree(config.work / "tokenizer", temporary / "tokenizer")
    _json(temporary / "model_index.json", MODEL_INDEX)
    size = config.image_size
    _json(
        temporary / "model_card.json",
        {
            "name": "talbot",
            "words": words(data.load(config).concepts),
            "license": "Apache-2.0 AND CC-BY-4.0 AND MIT",
            "attribution": list(ATTRIBUTION),
            "defaults": {"height": size, "width": size, "num_inference_steps": 20, "guidance_scale": 5.0},
        },
    )
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)
    print(f"{folder}: {', '.join(f'{name} of {origin}' for name, (_, origin) in states.items())}")


def _state(config: TrainingConfig, component: str) -> tuple[dict[str, Tensor], str]:
    """Its weights and where they come from, finetuned if they were."""
    state, origin = _before(config, component)
    rounds = len(list(config.work.glob("finetune-*.pt")))
    if component not in finetune.TRAINED or not rounds:
        return state, origin
    return finetune.between(config, component, state, rounds), f"{origin}, finetuned {rounds} times"


def _before(config: TrainingConfig, component: str) -> tuple[dict[str, Tensor], str]:
    """Before finetuning: of the last stage that trained it, or of the bundle the run starts from."""
    for stage, key in SOURCES[component]:
        path = config.work / f"{stage}.pt"
        if path.exists():
            saved = torch.load(path, weights_only=True)
            return saved[key], f"{stage} after {saved['step']} steps"
    if config.start is None:
        raise SystemExit(f"there is no {component} in {config.work}: train it, or name a bundle with --start")
    return load_file(config.start / f"{component}.safetensors"), config.start.name


def _write(
    folder: Path,
    class_name: str,
    config: dict[str, Any],
    state: dict[str, Tensor],
    file: str = "diffusion_pytorch_model.safetensors",
) -> None:
    folder.mkdir(parents=True)
    _json(folder / "config.json", {"_class_name": class_name} | config)
    save_file({name: tensor.half().contiguous() for name, tensor in state.items()}, folder / file, {"format": "pt"})


def _json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
