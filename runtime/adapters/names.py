"""What the files of many trainers call the modules of a model, and what those are called in it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from calotype.runtime.adapters.flux2_names import flux2_names

# Weights by name for each network that an adapter can change.
Weights = Mapping[str, Mapping[str, Any]]
# A network, and a module's name in it.
Place = tuple[str, str]

NETWORKS = ("unet", "transformer", "text_encoder", "text_encoder_2")
# Before a module's name with underscores: kohya's trainers; kohya's older OFT; LyCORIS's own wrapper.
KOHYA_PREFIXES = {
    "unet": ("lora_unet_", "oft_unet_", "lycoris_"),
    "transformer": ("lora_unet_", "lora_transformer_", "lycoris_"),
    "text_encoder": ("lora_te_", "lora_te1_", "oft_te_", "lycoris_"),
    "text_encoder_2": ("lora_te2_", "lycoris_"),
}
# Before a module's name with dots: diffusers; ComfyUI; OneTrainer; PEFT, which saves one network.
DOTTED_PREFIXES = {
    "unet": ("unet.", "diffusion_model.", ""),
    "transformer": ("transformer.", "diffusion_model.", ""),
    "text_encoder": ("text_encoder.", "clip_l.", "text_encoders.clip_l.", "clip_h.", "text_encoders.clip_h.", ""),
    "text_encoder_2": ("text_encoder_2.", "clip_g.", "text_encoders.clip_g.", ""),
}
# Module names of today -> what diffusers called them when attention had processors.
OLD_NAMES = (
    (r"\.(attn\d)\.(to_[qkv])$", r".\1.processor.\2"),
    (r"\.(attn\d)\.to_out\.0$", r".\1.processor.to_out"),
    (r"\.self_attn\.([qkv]|out)_proj$", r".self_attn.to_\1"),
)
# The same of the UNet -> what the original code calls them.
ORIGINAL_NAMES = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
ORIGINAL_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
ORIGINAL_BLOCKS = {
    ("down", "resnets"): ("input_blocks.{index}.0.{rest}",),
    ("down", "attentions"): ("input_blocks.{index}.1.{rest}",),
    ("down", "downsamplers"): ("input_blocks.{last}.0.op",),
    ("mid", "resnets"): ("middle_block.{index}.{rest}",),
    ("mid", "attentions"): ("middle_block.1.{rest}",),
    ("up", "resnets"): ("output_blocks.{index}.0.{rest}",),
    ("up", "attentions"): ("output_blocks.{index}.1.{rest}",),
    # It stands behind the attention where there is one.
    ("up", "upsamplers"): ("output_blocks.{last}.1.{rest}", "output_blocks.{last}.2.{rest}"),
}
_IN_BLOCK = re.compile(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def names_of(weights: Weights) -> dict[str, list[Place]]:
    """Every name that a file can have for each module, and the modules that it can mean: SDXL's text encoders share
    the names that are without a prefix.
    """
    names: dict[str, list[Place]] = {}
    for network, own in weights.items():
        layers = sum(bool(re.fullmatch(r"down_blocks\.0\.resnets\.\d+\.conv1\.weight", name)) for name in own)
        modules = dict.fromkeys(name.rpartition(".")[0] for name in own if name.endswith((".weight", ".bias")))
        for module in modules:
            for alias in dict.fromkeys(_aliases(network, module, layers)):
                names.setdefault(alias, []).append((network, module))
    return names


def _aliases(network: str, module: str, layers: int) -> Iterator[str]:
    if network == "unet":
        others = _original_names(module, layers)
    elif network == "transformer":
        others = flux2_names(module)
    else:
        others = [module.removeprefix("text_model."), f"transformer.{module}"]
    for name in (module, *others):
        for prefix in KOHYA_PREFIXES[network]:
            yield f"{prefix}{name.replace('.', '_')}"
    for name in (module, *others):
        for prefix in DOTTED_PREFIXES[network]:
            yield f"{prefix}{name}"
            for pattern, old in OLD_NAMES:
                yield f"{prefix}{re.sub(pattern, old, name)}"


def _original_names(module: str, layers: int) -> list[str]:
    """The UNet's module in the original code's naming, which counts ``layers`` and a resampling for each block."""
    if module in ORIGINAL_NAMES:
        return [ORIGINAL_NAMES[module]]
    match = _IN_BLOCK.fullmatch(module)
    if match is None:
        return []
    side, block, kind, index, rest = match.groups()
    first = int(block or 0) * (layers + 1)
    return [
        template.format(
            index=2 * int(index) if side == "mid" else first + int(index) + (side == "down"),
            last=first + layers + (side == "down"),
            rest=ORIGINAL_RESNET.get(rest, rest),
        )
        for template in ORIGINAL_BLOCKS[side, kind]
    ]
