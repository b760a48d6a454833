"""Small IP-Adapters of random weights in the layout of the published files, and the image encoder that they read."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ENCODER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 20,
    "hidden_act": "gelu",
}
KINDS = ("plain", "plus", "full")


def image_encoder(seed: int = 0, **settings: Any) -> Any:
    """A ``CLIPVisionModelWithProjection`` of those settings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers

        torch.manual_seed(seed)
        config = transformers.CLIPVisionConfig(**{**ENCODER, **settings})
        made = transformers.CLIPVisionModelWithProjection(config)
        for parameter in made.parameters():  # those of transformers' own draw are small, and pictures look alike
            torch.nn.init.normal_(parameter, std=(parameter[0].numel() ** -0.5) if parameter.ndim > 1 else 0.3)
        for name, parameter in made.named_parameters():
            if "norm" in name and name.endswith("weight"):
                torch.nn.init.normal_(parameter, 1.0, 0.1)
        return made.eval()


def write_image_encoder(folder: Path, seed: int = 0, **settings: Any) -> Path:
    """The same in ``folder``, in float16."""
    import torch

    image_encoder(seed, **settings).to(torch.float16).save_pretrained(folder)
    return folder


def layers_of(unet: Any) -> list[int]:
    """Channels of the cross-attentions of diffusers' ``unet``, in its own order, which files have."""
    modules = dict(unet.named_modules())
    names = [name.removesuffix(".processor") for name in unet.attn_processors if name.endswith("attn2.processor")]
    return [modules[name].to_k.out_features for name in names]


def ip_adapter(seed: int, kind: str, layers: list[int], context: int, **settings: Any) -> dict[str, Any]:
    """The tensors of one of ``kind``, for cross-attentions of so many channels that read text of width ``context``."""
    import torch

    torch.manual_seed(seed)
    encoder = {**ENCODER, **settings}
    given = encoder["projection_dim" if kind == "plain" else "hidden_size"]
    shapes: dict[str, tuple[int, ...]]
    if kind == "plain":
        shapes = {"proj": (4 * context, given), "norm": (context,)}
    elif kind == "full":
        shapes = {"proj.0": (given, given), "proj.2": (context, given), "proj.3": (context,)}
    else:
        width, heads = 16, 2
        shapes = {"latents": (1, 6, width), "proj_in": (width, given), "proj_out": (context, width)}
        shapes |= {"norm_out": (context,)}
        for layer in range(4):  # as many as diffusers knows
            attention, forward = f"layers.{layer}.0", f"layers.{layer}.1"
            shapes |= {f"{attention}.norm1": (width,), f"{attention}.norm2": (width,)}
            shapes |= {f"{attention}.to_q": (heads * 64, width), f"{attention}.to_kv": (heads * 128, width)}
            shapes |= {f"{attention}.to_out": (width, heads * 64), f"{forward}.0": (width,)}
            shapes |= {f"{forward}.1": (4 * width, width), f"{forward}.3": (width, 4 * width)}
    found = {}
    for name, shape in shapes.items():
        norm = len(shape) == 1
        weight = torch.randn(shape) * (0.1 if norm else shape[-1] ** -0.5) + norm
        found["image_proj.latents" if name == "latents" else f"image_proj.{name}.weight"] = weight
        if norm or name in ("proj", "proj.0", "proj.2", "proj_in", "proj_out"):
            found[f"image_proj.{name}.bias"] = torch.randn(shape[0]) * 0.1
    for index, channels in enumerate(layers):
        for what in ("to_k_ip", "to_v_ip"):
            found[f"ip_adapter.{2 * index + 1}.{what}.weight"] = torch.randn(channels, context) * 2 * context**-0.5
    return {name: tensor.to(torch.float16) for name, tensor in found.items()}


def nested(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """As the published ``.bin`` files have it, and diffusers takes it."""
    parts: dict[str, dict[str, Any]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    return parts


def write_ip_adapter(path: Path, state: Mapping[str, Any]) -> Path:
    """``state`` in a file, in the layout that its suffix tells."""
    import torch
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(dict(state), path)
    else:
        torch.save(nested(state), path)
    return path
