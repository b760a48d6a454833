"""Small checkpoints of every family, random weights: as diffusers and transformers write them, and as single files."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from calotype.export.tokenizer import Tokenizer
from tests.export.original_layout import original_openclip, original_unet, original_vae, prefixed

LAYERS = 2
TOWER = {
    "vocab_size": 49408,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 1,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
}
VAE = {
    "block_out_channels": (32, 64, 96),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": LAYERS,
    "norm_num_groups": 32,
}
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {
        "block_out_channels": (32, 64, 96),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 8,
        "cross_attention_dim": 64,
    },
    "sd2": {
        "block_out_channels": (64, 128, 128),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (1, 2, 2),
        "cross_attention_dim": 64,
        "use_linear_projection": True,
    },
    "sdxl": {
        "block_out_channels": (32, 64, 128),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (1, 1, 2),
        "transformer_layers_per_block": (1, 2, 3),
        "cross_attention_dim": 64 + 128,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 16,
        "projection_class_embeddings_input_dim": 64 + 6 * 16,
    },
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
}
PIPELINES = {"sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}
PADS = {"sd1": ("<|endoftext|>",), "sd2": ("!",), "sdxl": ("<|endoftext|>", "!")}


def write_json(path: Path, value: object) -> None:
    """Write ``value``, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_folder(folder: Path, family: str, **unet: Any) -> Path:
    """A checkpoint in diffusers' layout, every component written by its own library."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        import transformers

        torch.manual_seed(0)
        size = {"sample_size": 8, "layers_per_block": LAYERS}
        diffusers.UNet2DConditionModel(**size, **UNETS[family] | unet).save_pretrained(folder / "unet")
        scaling = 0.13025 if family == "sdxl" else 0.18215
        diffusers.AutoencoderKL(**VAE, scaling_factor=scaling).save_pretrained(folder / "vae")
        act = "gelu" if family == "sd2" else "quick_gelu"
        tower = transformers.CLIPTextConfig(**TOWER, hidden_act=act)
        transformers.CLIPTextModel(tower).save_pretrained(folder / "text_encoder")
        if family == "sdxl":
            second = {"hidden_size": 128, "num_attention_heads": 2, "hidden_act": "gelu", "projection_dim": 64}
            tower = transformers.CLIPTextConfig(**TOWER | second)
            transformers.CLIPTextModelWithProjection(tower).save_pretrained(folder / "text_encoder_2")
    index = {
        "_class_name": PIPELINES[family],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    if family != "sdxl":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    for pad, suffix in zip(PADS[family], ("", "_2"), strict=False):
        index[f"text_encoder{suffix}"] = ["transformers", "CLIPTextModelWithProjection" if suffix else "CLIPTextModel"]
        index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
        write_json(folder / f"tokenizer{suffix}" / "tokenizer_config.json", {"model_max_length": 77})
        write_json(folder / f"tokenizer{suffix}" / "special_tokens_map.json", {"pad_token": pad})
        tokenizer = Tokenizer.clip(pad)
        (folder / f"tokenizer{suffix}" / "vocab.json").write_bytes(tokenizer.vocab)
        (folder / f"tokenizer{suffix}" / "merges.txt").write_bytes(tokenizer.merges)
    write_json(folder / "model_index.json", index)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    return folder


def original_state(folder: Path, family: str) -> dict[str, Tensor]:
    """The weights of ``folder`` under the names of an original single file, with the strays that such files carry."""

    def component(name: str, stem: str) -> dict[str, Tensor]:
        return load_file(folder / name / f"{stem}.safetensors")

    def tower(name: str) -> dict[str, Tensor]:
        state = component(name, "model")
        bare = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
        return {key if key.startswith("text_projection.") else f"text_model.{key}": bare[key] for key in bare}

    state = prefixed(
        "model.diffusion_model.", original_unet(component("unet", "diffusion_pytorch_model"), LAYERS)
    ) | prefixed(
        "first_stage_model.", original_vae(component("vae", "diffusion_pytorch_model"), len(VAE["block_out_channels"]))
    )
    positions = torch.arange(77)[None]
    if family == "sd1":
        state |= prefixed("cond_stage_model.transformer.", tower("text_encoder"))
        state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = positions
        state["alphas_cumprod"] = state["betas"] = state["sqrt_one_minus_alphas_cumprod"] = torch.ones(1000)
        state["model_ema.decay"] = torch.ones(())
    elif family == "sd2":
        layers = tower("text_encoder")
        # The original has one layer more, which diffusers' copies leave out since nothing reads it.
        layers |= {name.replace("layers.2.", "layers.3."): layers[name] + 1 for name in layers if "layers.2." in name}
        state |= prefixed("cond_stage_model.model.", original_openclip(layers))
        state["cond_stage_model.model.text_projection"] = torch.ones(64, 64)
        state["cond_stage_model.model.logit_scale"] = torch.ones(())
    else:
        state |= prefixed("conditioner.embedders.0.transformer.", tower("text_encoder"))
        state["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = positions
        state |= prefixed("conditioner.embedders.1.model.", original_openclip(tower("text_encoder_2")))
        state["conditioner.embedders.1.model.logit_scale"] = torch.ones(())
        state["denoiser.sigmas"] = torch.ones(1000)
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's name to its checkpoint in diffusers' layout, not to be changed."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = write_folder(tmp_path_factory.mktemp("folders") / f"small-{family}", family)
        return made[family]

    return make


@pytest.fixture(scope="session")
def single_file(folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's name to the same weights in one original file, not to be changed."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("files") / f"small-{family}.safetensors"
            save_file(original_state(folder(family), family), made[family])
        return made[family]

    return make


@pytest.fixture
def copied(folder: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A family's checkpoint, to be changed."""

    def make(family: str) -> Path:
        shutil.copytree(folder(family), tmp_path / family)
        return tmp_path / family

    return make
