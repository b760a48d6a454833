"""What all original single files of a family have in common, and no tensor of theirs tells."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

UNET = "model.diffusion_model."
VAE = "first_stage_model."
# Latents whose noise goes from 1e-4 to nothing but noise in 1000 steps, as all were trained; the scheduler is the one
# that diffusers' copies of these models name.
_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One family's single files.

    ``text_encoders`` are the prefixes of its text encoders' names; one that ends in ``.model.`` is in OpenCLIP's
    layout. ``pad_tokens`` has one for each. ``unread_layers`` are the text encoder's last, whose output the UNet never
    saw. ``heads`` None means heads of 64 channels.
    """

    name: str
    text_encoders: tuple[str, ...]
    pad_tokens: tuple[str, ...]
    unread_layers: int = 0
    heads: int | None
    scaling_factor: float
    sample_size: int
    scheduler: Mapping[str, Any]


FAMILIES = (
    Family(
        name="sd1",
        text_encoders=("cond_stage_model.transformer.",),
        pad_tokens=("<|endoftext|>",),
        heads=8,
        scaling_factor=0.18215,
        sample_size=64,
        scheduler=_SCHEDULER | {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
    ),
    Family(
        name="sd2",
        text_encoders=("cond_stage_model.model.",),
        pad_tokens=("!",),
        unread_layers=1,
        heads=None,
        scaling_factor=0.18215,
        sample_size=64,
        scheduler=_SCHEDULER | {"_class_name": "DDIMScheduler"},
    ),
    Family(
        name="sdxl",
        text_encoders=("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."),
        pad_tokens=("<|endoftext|>", "!"),
        heads=None,
        scaling_factor=0.13025,
        sample_size=128,
        scheduler=_SCHEDULER | {"_class_name": "EulerDiscreteScheduler"},
    ),
)
# Other things that come in one file, each known by the beginning of a name.
OTHERS = {
    "conditioner.embedders.0.model.": "the SDXL refiner",
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3",
    "model.diffusion_model.double_blocks.": "Flux",
    "double_blocks.": "Flux",
    "control_model.": "a ControlNet",
    "lora_unet_": "a LoRA, which is given to calotype generate beside a model",
    "lora_te": "a LoRA, which is given to calotype generate beside a model",
    "encoder.layers.": "a tiny autoencoder in diffusers' layout, which is read from the folder with its config.json",
    "3.conv.": "half of a tiny autoencoder (TAESD), which is read whole, from a folder in diffusers' layout",
    "decoder.": "an autoencoder alone in diffusers' layout, which is read from the folder with its config.json",
    "down_blocks.": "one component in diffusers' layout, which is read from the folder with the model_index.json",
    UNET: "a UNet without its text encoders",
}
# Tensors that real files carry and no forward pass reads.
STRAYS = (
    # The noise schedule, which follows from the family's settings.
    r"(model\.)?(alphas_cumprod(_prev)?|betas|sqrt_\w+|log_one_minus_\w+|posterior_\w+|lvlb_weights|logvar)",
    r"denoiser\.sigmas",
    # Marks of velocity prediction and of a schedule that ends in pure noise, read before the tensors are.
    r"v_pred|ztsnr",
    # Averaged weights, taken on request.
    r"(first_stage_model\.)?model_ema\..*",
    # The discriminator that the autoencoder was trained against.
    r"(first_stage_model\.)?loss\..*",
    # The image half of CLIP, what ties the two halves, and buffers of old versions.
    r"(cond_stage_model|conditioner\.embedders\.\d)\.((transformer|model)\.)?"
    r"(logit_scale|attn_mask|text_model\.embeddings\.position_ids|embeddings\.position_ids)",
    r"(cond_stage_model|conditioner\.embedders\.0)(\.transformer|\.model)?\.text_projection(\.weight)?",
    # Textual inversion, in files that were trained with it.
    r"embedding_manager\..*",
)
