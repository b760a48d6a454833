"""Checkpoints in the original layout, one ``.safetensors`` or ``.ckpt`` file for all components."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from calotype.export.checkpoint import Checkpoint
from calotype.export.models.autoencoder import Autoencoder
from calotype.export.models.clip import TextEncoder
from calotype.export.models.unet import UNet
from calotype.export.pickles import read_pickle
from calotype.export.prediction_type import PREDICTS_NOISE, likeness_to_noise
from calotype.export.single_file_configs import Part, clip_config, openclip_config, unet_config, vae_config
from calotype.export.single_file_families import FAMILIES, OTHERS, STRAYS, UNET, VAE, Family
from calotype.export.single_file_keys import openclip_table, unet_table, vae_table
from calotype.export.tokenizer import Tokenizer
from calotype.export.weights import listed, load_module, read_safetensors, to_float32
from calotype.runtime.errors import CheckpointError, InputError, UnsupportedArchitectureError

logger = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".ckpt")
CLIP_VOCABULARY = 49408
MODELSPEC_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction"}


def load_from_standard_weights(path: Path, *, ema: bool = False, prediction_type: str | None = None) -> Checkpoint:
    """Load an original Stable Diffusion 1.x, 2.x or XL file, or an autoencoder of theirs alone.

    Args:
        path: the file.
        ema: take the averaged UNet that some files carry beside the last one.
        prediction_type: what the UNet predicts; None takes it from the file (a ``v_pred`` tensor, or the metadata
            ``modelspec.prediction_type``). Where that says nothing it is the noise, but Stable Diffusion 2.x has models
            of both kinds: there the UNet is tried on noise, and a warning says what was found.

    Raises:
        CheckpointError: it cannot be read, holds more than tensors, or its tensors are not exactly the family's.
        UnsupportedArchitectureError: it is of another family.
        InputError: averaged weights of an autoencoder alone.
    """
    everything, metadata = _read(path)
    card = {"license": metadata["modelspec.license"]} if "modelspec.license" in metadata else {}
    source = {"layout": "single-file", "name": path.stem}
    alone = _autoencoder_alone(everything)
    if alone is not None:
        if ema:
            raise InputError(
                f"{path} is an autoencoder alone, whose averaged weights are not read; export without --ema"
            )
        return Checkpoint(family="vae", vae=_vae_alone(everything, alone, path), card=card, source=source)
    family = _recognised(everything, path)
    state = _without_strays(everything, (UNET, VAE, *family.text_encoders))
    towers = [_text_encoder(Part(prefix, state), family) for prefix in family.text_encoders]
    tokenizers = [Tokenizer.clip(pad_token) for pad_token in family.pad_tokens]
    unet = _unet(Part(UNET, _averaged(everything, path) if ema else state), family, towers[-1])
    vae_part = Part(VAE, state)
    if not vae_part:
        raise CheckpointError(f"{path} has no autoencoder; fetch this model with its autoencoder (VAE) baked in")
    prediction = prediction_type or _prediction_type(everything, metadata)
    if prediction is None:
        prediction = _measured_prediction_type(towers[0], unet, path) if family.name == "sd2" else "epsilon"
    return Checkpoint(
        family=family.name,
        text_encoder=towers[0],
        text_encoder_2=towers[1] if len(towers) > 1 else None,
        unet=unet,
        vae=_vae(vae_part, family.scaling_factor),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1] if len(tokenizers) > 1 else None,
        scheduler={
            **family.scheduler,
            "prediction_type": prediction,
            "rescale_betas_zero_snr": "ztsnr" in everything,
        },
        card=card,
        sample_size=96 if family.name == "sd2" and prediction == "v_prediction" else family.sample_size,
        force_zeros_for_empty_prompt=family.name == "sdxl",
        source=source,
    )


def _read(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The tensors and the metadata of a file."""
    if path.suffix == ".ckpt":
        return read_pickle(path), {}
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} is of an unknown kind; valid: a folder, {', '.join(SUFFIXES)}")
    state = read_safetensors(path)
    with safe_open(path, framework="pt") as file:
        return state, file.metadata() or {}


def _recognised(state: Mapping[str, Tensor], path: Path) -> Family:
    """The family whose text encoders the file has."""
    for family in FAMILIES:
        if all(any(name.startswith(prefix) for name in state) for prefix in (UNET, *family.text_encoders)):
            return family
    known = "Stable Diffusion 1.x, 2.x and XL checkpoints with their text encoders"
    for beginning, what in OTHERS.items():
        if any(name.startswith(beginning) for name in state):
            raise UnsupportedArchitectureError(f"{path} holds {what}; supported: {known}")
    raise UnsupportedArchitectureError(
        f"{path} is not a checkpoint of a known family; supported: {known}; it has {listed(sorted(state), 3)}"
    )


def _autoencoder_alone(state: Mapping[str, Tensor]) -> str | None:
    """What the names of an autoencoder begin with in a file that has no UNet; None for any other file."""
    if any(name.startswith(UNET) for name in state):
        return None
    return next((prefix for prefix in ("", VAE) if f"{prefix}decoder.mid.block_1.conv1.weight" in state), None)


def _without_strays(state: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of components under ``prefixes``; one of none, that is no known stray, is an error."""
    strays = re.compile("|".join(STRAYS))
    kept = {name: tensor for name, tensor in state.items() if not strays.fullmatch(name)}
    strangers = sorted(name for name in kept if not name.startswith(prefixes))
    if strangers:
        raise CheckpointError(f"the file has {len(strangers)} unexpected tensors: {listed(strangers)}")
    return kept


def _averaged(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The UNet's tensors from ``model_ema``, where names are spelt without their dots."""
    averaged = {
        name: state.get("model_ema." + name.removeprefix("model.").replace(".", ""))
        for name in state
        if name.startswith(UNET)
    }
    found = {name: tensor for name, tensor in averaged.items() if tensor is not None}
    if len(found) < len(averaged):
        raise CheckpointError(
            f"{path} has averaged weights for {len(found)} of the UNet's {len(averaged)} tensors; export without --ema"
        )
    return found


def _unet(part: Part, family: Family, last_tower: TextEncoder) -> UNet:
    pooled_width = last_tower.config.projection_dim if last_tower.config.with_projection else None
    config = unet_config(part, heads=family.heads, pooled_width=pooled_width)
    return load_module(UNet, config, part, "UNet", unet_table(config))


def _vae(part: Part, scaling_factor: float | None) -> Autoencoder:
    config = vae_config(part, scaling_factor=scaling_factor)
    return load_module(Autoencoder, config, part, "autoencoder", vae_table(config))


def _vae_alone(state: Mapping[str, Tensor], prefix: str, path: Path) -> Autoencoder:
    """Autoencoders of SD 1.x, 2.x and XL are of one shape, and their latents of two scales."""
    logger.warning(
        "%s does not say the scale of its latents (0.18215 in Stable Diffusion 1.x and 2.x, 0.13025 in SDXL); "
        "with generate --vae it is that of the model",
        path.name,
    )
    return _vae(Part(prefix, _without_strays(state, (prefix,))), None)


def _text_encoder(part: Part, family: Family) -> TextEncoder:
    if part.prefix.endswith(".model."):
        config = openclip_config(part, unread_layers=family.unread_layers)
        state = _unfused(part, config.num_hidden_layers)
        tower = load_module(TextEncoder, config, state, "text encoder", openclip_table(config))
    else:
        tower = load_module(TextEncoder, clip_config(part), part, "text encoder")
    if tower.config.vocab_size < CLIP_VOCABULARY:
        raise UnsupportedArchitectureError(
            f"the text encoder knows {tower.config.vocab_size} tokens; a single file carries no tokenizer, "
            f"and CLIP's has {CLIP_VOCABULARY}: export this model from a folder in diffusers' layout"
        )
    return tower


def _unfused(part: Part, layers: int) -> dict[str, Tensor]:
    """OpenCLIP's tensors of the first ``layers``, with queries, keys and values apart."""
    state: dict[str, Tensor] = {}
    for name, tensor in part.items():
        stem, fused, kind = name.rpartition(".in_proj_")
        if name.startswith("transformer.resblocks.") and int(name.split(".")[2]) >= layers:
            continue
        if fused:
            thirds = zip("qkv", tensor.tensor_split(3), strict=True)
            state |= {f"{stem}.{letter}_proj.{kind}": third for letter, third in thirds}
        elif name == "text_projection":
            state["text_projection.weight"] = tensor.T.contiguous()
        else:
            state[name] = tensor
    return state


def _prediction_type(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str | None:
    """What the file says that its UNet predicts."""
    if "v_pred" in state:
        return "v_prediction"
    return MODELSPEC_PREDICTIONS.get(metadata.get("modelspec.prediction_type", ""))


def _measured_prediction_type(tower: TextEncoder, unet: UNet, path: Path) -> str:
    """SD 2.x models of 768 pixels predict velocity, the others noise, and their tensors are alike."""
    ids = torch.zeros(1, tower.config.max_position_embeddings, dtype=torch.int64)  # padded with "!", which is 0
    ids[:, :2] = torch.tensor([CLIP_VOCABULARY - 2, CLIP_VOCABULARY - 1])
    to_float32(tower)
    to_float32(unet)
    with torch.no_grad():
        context, _, _ = tower(ids)
    likeness = likeness_to_noise(unet, context)
    prediction = "epsilon" if likeness > PREDICTS_NOISE else "v_prediction"
    logger.warning(
        "%s does not say what it predicts; its UNet gives back %.0f%% of pure noise, so it is taken for %s; "
        "if pictures are noise, export with the other --prediction-type",
        path.name,
        100 * likeness,
        prediction,
    )
    return prediction
