"""Checkpoints in diffusers' layout: ``model_index.json`` and a folder for each component, or one autoencoder alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calotype.export.checkpoint import Checkpoint
from calotype.export.json_files import read_json
from calotype.export.models.autoencoder import Autoencoder, AutoencoderConfig
from calotype.export.models.clip import TextEncoder, TextEncoderConfig
from calotype.export.models.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig
from calotype.export.models.unet import UNet, UNetConfig
from calotype.export.tokenizer import Tokenizer
from calotype.export.weights import load_module, read_component
from calotype.runtime.errors import UnsupportedArchitectureError

SD_PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
)
SDXL_PIPELINES = (
    "StableDiffusionXLPipeline",
    "StableDiffusionXLImg2ImgPipeline",
    "StableDiffusionXLInpaintPipeline",
)
UNETS = ("UNet2DConditionModel",)
TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny")
# Settings that versions of transformers write into every configuration and that no text tower reads.
_TRANSFORMERS_NOISE = frozenset(
    {
        "add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "chunk_size_feed_forward",
        "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping",
        "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
        "forced_eos_token_id", "id2label", "is_decoder", "is_encoder_decoder", "label2id", "length_penalty",
        "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_return_sequences",
        "output_attentions", "output_hidden_states", "output_scores", "prefix", "problem_type", "pruned_heads",
        "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id",
        "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
        "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torchscript", "typical_p", "use_bfloat16",
    }
)  # fmt: skip


def load_folder(folder: Path) -> Checkpoint:
    """Load a Stable Diffusion 1.x, 2.x or XL checkpoint, or an autoencoder whose ``config.json`` lies at the top.

    Raises:
        CheckpointError: when something is missing or does not match.
        UnsupportedArchitectureError: for any other pipeline or component.
    """
    source = {"layout": "diffusers", "name": folder.resolve().name}
    if not (folder / "model_index.json").exists() and (folder / "config.json").exists():
        return Checkpoint(family="vae", vae=_vae(folder), card=_card(folder), source=source)
    index = read_json(folder / "model_index.json")
    pipeline = index.get("_class_name")
    if pipeline not in (*SD_PIPELINES, *SDXL_PIPELINES):
        raise UnsupportedArchitectureError(
            f"{folder} holds a {pipeline}, which is not supported; supported: "
            f"{', '.join((*SD_PIPELINES, *SDXL_PIPELINES, *AUTOENCODERS))}"
        )
    xl = pipeline in SDXL_PIPELINES
    if xl and not (folder / "text_encoder").is_dir():
        raise UnsupportedArchitectureError(f"{folder} holds the SDXL refiner, which is not supported; use the base")
    text_encoder = _text_encoder(folder / "text_encoder")
    unet, sample_size = _unet(folder / "unet")
    return Checkpoint(
        # OpenCLIP's towers, of SD 2.x, compute the exact GELU; OpenAI's, of SD 1.x, an approximation of it.
        family="sdxl" if xl else "sd2" if text_encoder.config.hidden_act == "gelu" else "sd1",
        text_encoder=text_encoder,
        text_encoder_2=_text_encoder(folder / "text_encoder_2") if xl else None,
        unet=unet,
        vae=_vae(folder / "vae"),
        tokenizer=Tokenizer.from_folder(folder / "tokenizer"),
        tokenizer_2=Tokenizer.from_folder(folder / "tokenizer_2") if xl else None,
        scheduler=read_json(folder / "scheduler" / "scheduler_config.json"),
        card=_card(folder),
        sample_size=sample_size,
        force_zeros_for_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", xl)),
        source=source,
    )


def _unet(folder: Path) -> tuple[UNet, int | None]:
    config = _config(folder, UNETS)
    size = config.get("sample_size")
    unet = load_module(UNet, UNetConfig.from_json(config), read_component(folder, "diffusion_pytorch_model"), "UNet")
    return unet, max(size) if isinstance(size, list) else size


def _text_encoder(folder: Path) -> TextEncoder:
    config = _config(folder, TEXT_ENCODERS)
    settings = {key: value for key, value in config.items() if key not in _TRANSFORMERS_NOISE}
    settings["with_projection"] = config.get("architectures") == ["CLIPTextModelWithProjection"]
    what = folder.name.replace("_", " ")
    return load_module(TextEncoder, TextEncoderConfig.from_json(settings), read_component(folder, "model"), what)


def _vae(folder: Path) -> Autoencoder | TinyAutoencoder:
    config = _config(folder, AUTOENCODERS)
    state = read_component(folder, "diffusion_pytorch_model")
    if config.get("_class_name") == "AutoencoderTiny":
        return load_module(TinyAutoencoder, TinyAutoencoderConfig.from_json(config), state, "tiny autoencoder")
    return load_module(Autoencoder, AutoencoderConfig.from_json(config), state, "autoencoder")


def _config(folder: Path, supported: tuple[str, ...]) -> dict[str, Any]:
    """A component's configuration; a class that is not ``supported`` is refused, none named is the first of them."""
    config = read_json(folder / "config.json")
    found = config.get("_class_name", (config.get("architectures") or supported)[0])
    if found not in supported:
        raise UnsupportedArchitectureError(
            f"{folder} holds a {found}, which is not supported; supported: {', '.join(supported)}"
        )
    return config


def _card(folder: Path) -> Mapping[str, Any]:
    card = folder / "model_card.json"
    return read_json(card) if card.exists() else {}
