"""What else comes as a file or a folder, and is refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NoReturn

from calotype.export.single_file import SingleFile
from calotype.export.weights import listed
from calotype.runtime.errors import CheckpointError, UnsupportedArchitectureError

_LORA = "a LoRA, which is given to calotype generate beside a model"
_EMBEDDING = "a textual inversion embedding, which is given to calotype generate beside a model"
_FROM_FOLDER = "which is read from the folder with its config.json"
_REFINER = "the SDXL refiner"
# By the width of their context, UNets that embed more than the time and read one text encoder.
POOLED = {1024: "Stable unCLIP, which reads a picture", 1280: _REFINER}
# Models that have a supported UNet and need more than it, and what changes one; each is known by one name's pattern.
FIRST = {
    r"edm_vpred\..*": "an EDM model that predicts velocity (as CosXL), whose noise schedule is not supported",
    r"edm_(mean|std)": "an EDM model (as Playground 2.5), whose noise schedule is not supported",
    r".*\.(time_stack|time_mixer)\..*": "Stable Video Diffusion",
    r".*motion_modules\..*": "a motion module (AnimateDiff)",
    r"lora_controlnet": "a Control-LoRA, which changes a UNet into a ControlNet",
    r"lllite_unet_.*": "a ControlNet-LLLite",
    r"ip_adapter\.\d+\.to_\w+_lora\..*|image_proj\.perceiver_resampler\..*": "an IP-Adapter FaceID, which reads the "
    "embedding of another library's face recognition; take an IP-Adapter, Plus, Plus-face or Full-face",
    r"difference": "the difference of a ControlNet to a model; take the whole ControlNet",
    r"(base_model\.model\.)?.*([._]lora(_linear_layer)?\.(up|down)|[._]lora_([AB]|up|down|mid)(\.\w+)?)\.weight": _LORA,
    r"lora_(unet|te\d?)_.*": _LORA,
    r".*\.(hada_w\d_[ab]|lokr_w\d(_[ab])?|oft_blocks|oft_diag|ia3_l|dora_scale)": _LORA,
}
# Anything else; the first that fits counts.
OTHERS = {
    r"control_model\..*": "a ControlNet without what reads its picture",
    r"(model\.diffusion_model\.)?joint_blocks\..*": "Stable Diffusion 3",
    r"(model\.diffusion_model\.)?(double_stream_modulation_img|single_stream_modulation)\..*": (
        "FLUX.2's transformer alone; give klein's folder in diffusers' layout, and this file as its --transformer"
    ),
    r"(model\.diffusion_model\.)?double_blocks\..*": "FLUX.1",
    r"(model\.diffusion_model\.)?(noise_refiner|context_refiner)\..*": "Z-Image",
    r"(model\.diffusion_model\.)?transformer_blocks\.0\.(img|txt)_mod\..*": "Qwen-Image",
    r"emb_params|string_to_param.*|<.*>": _EMBEDDING,
    r"encoder\.layers\..*": f"a tiny autoencoder in diffusers' layout, {_FROM_FOLDER}",
    r"3\.conv\..*": "half of a tiny autoencoder (TAESD), which is read whole, from a folder in diffusers' layout",
    r"decoder\..*": f"an autoencoder alone in diffusers' layout, {_FROM_FOLDER}",
    r"down_blocks\..*": "one component in diffusers' layout, which is read from the folder with the model_index.json",
    r"(text_model|transformer\.resblocks)\..*": "a text encoder alone",
    r"conv_first\.weight|model\.0\.weight|body\.0\.weight": "an upscaler of pictures (as ESRGAN)",
    r"style_embedding": "a T2I-Adapter of style, which reads what CLIP makes of a picture",
    r"(model\.diffusion_model\.|input_blocks\.).*": "a UNet without its text encoders",
}
# Files that tell what a folder is which is no checkpoint.
FOLDERS = {
    "adapter_config.json": "a LoRA as PEFT writes it, which is given to calotype generate beside a model",
    "pytorch_lora_weights.safetensors": _LORA,
    "pytorch_lora_weights.bin": _LORA,
    "learned_embeds.safetensors": _EMBEDDING,
    "learned_embeds.bin": _EMBEDDING,
    "calotype.json": "a bundle already, which calotype generate takes as it is",
}


def refuse_alike(file: SingleFile, known: str) -> None:
    """Raise UnsupportedArchitectureError for what could be taken for a model, or for what a model needs more for."""
    _refuse(file, FIRST, known)
    marks = file.marks
    if marks is not None and marks.pooled and marks.context in POOLED:
        raise UnsupportedArchitectureError(f"{file.path} holds {POOLED[marks.context]}; supported: {known}")


def refuse(file: SingleFile, known: str) -> NoReturn:
    """Raise UnsupportedArchitectureError for a file of no family: what it is, and what is ``known``."""
    if file.marks is not None and file.marks.pooled:
        raise UnsupportedArchitectureError(f"{file.path} holds {_REFINER}; supported: {known}")
    _refuse(file, OTHERS, known)
    raise UnsupportedArchitectureError(
        f"{file.path} is not a checkpoint of a known family; supported: {known}; it has {listed(sorted(file.state), 3)}"
    )


def refuse_folder(folder: Path) -> None:
    """Raise for a folder that is something else, by its files' names.

    Raises:
        CheckpointError: it holds a single file, which is given itself.
        UnsupportedArchitectureError: it holds something that is no checkpoint.
    """
    for name, what in FOLDERS.items():
        if (folder / name).is_file():
            raise UnsupportedArchitectureError(f"{folder} holds {what}")
    files = sorted(path for path in folder.glob("*") if path.suffix.lower() in (".safetensors", ".ckpt"))
    if files and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has no model_index.json, so it is not a folder in diffusers' layout; "
            f"give one of its files itself: {listed(map(str, files), 3)}"
        )


def _refuse(file: SingleFile, kinds: dict[str, str], known: str) -> None:
    for pattern, what in kinds.items():
        if any(re.fullmatch(pattern, name) for name in file.state):
            raise UnsupportedArchitectureError(f"{file.path} holds {what}; supported: {known}")
