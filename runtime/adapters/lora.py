"""LoRA files: low-rank changes of a model's weights, merged into them before a network opens.

Hu et al. 2021, "LoRA" (arXiv 2106.09685); its convolutions as in LoCon, Yeh et al. 2023 (arXiv 2309.14859). Merging
makes no step slower, and the bundle's files stay as they are: without the LoRA the weights are the old ones, bit for
bit. Read are the layouts of kohya's trainers, which name modules after diffusers or after the original UNet, and of
diffusers and PEFT.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.bundle.safetensors import SafetensorsFile
from calotype.runtime.errors import InputError

Array = NDArray[Any]
# Weights by name for each network that a LoRA can change.
Weights = Mapping[str, Mapping[str, Array]]
# A network, and a weight's name in it.
Place = tuple[str, str]

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
KOHYA_PREFIXES = {"unet": ("unet",), "text_encoder": ("te", "te1"), "text_encoder_2": ("te2",)}
# How a key of a file ends -> what stands there.
PARTS = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".alpha": "alpha",
}
# What is no LoRA though it comes in the same files, by a pattern in its keys.
OTHERS = {
    r"\.dora_scale$|\.lora_magnitude_vector": "DoRA",
    r"\.hada_": "LoHa",
    r"\.lokr_": "LoKr",
    r"\.oft_": "OFT",
    r"\.diff(_b)?$": "full differences",
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
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
ORIGINAL_RESNET = {
    "conv1": "in_layers.2",
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
_ONE = np.ones(1)
_IN_BLOCK = re.compile(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA file, and how much of it: 1 is as trained, 0 nothing, a negative scale the opposite."""

    path: Path
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise InputError(f"the LoRA {self.path} has the scale {self.scale}; give a finite number, such as 0.8")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``FILE`` or ``FILE:SCALE``."""
        path, _, scale = text.rpartition(":")
        try:
            return cls(path=Path(path), scale=float(scale)) if path else cls(path=Path(text))
        except ValueError:
            return cls(path=Path(text))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Change:
    """What one LoRA adds to one weight, (out, in) or (out, in, kh, kw): factor · up · mid · down.

    ``down`` is (rank, in) or (rank, in, kh, kw), ``up`` (out, rank) or (out, rank, 1, 1). ``mid`` is there in LoCon's
    Tucker form: (rank, rank, kh, kw), and ``down`` is 1×1.
    """

    down: Array
    up: Array
    mid: Array | None
    factor: float

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of that shape can take it; 1×1 convolutions and linear layers are the same to it."""
        if self.up.ndim < 2 or self.down.ndim < 2:
            return False
        ranks, kernel = (self.up.shape[1], self.down.shape[0]), self.down.shape[2:]
        if self.mid is not None:
            ranks_of_mid, kernel = self.mid.shape[:2], self.mid.shape[2:]
            sound = ranks == ranks_of_mid and math.prod(self.down.shape[2:]) == 1
        else:
            sound = ranks[0] == ranks[1]
        whole = (self.up.shape[0], self.down.shape[1], *kernel)
        return sound and math.prod(self.up.shape[2:]) == 1 and _trimmed(whole) == _trimmed(shape)

    def add_to(self, weight: Array) -> None:
        """Change ``weight``, float32, in place."""
        up = self.up.astype(np.float32).reshape(self.up.shape[:2]) * np.float32(self.factor)
        down = self.down.astype(np.float32)
        if self.mid is not None:
            inner = np.tensordot(self.mid.astype(np.float32), down.reshape(down.shape[:2]), axes=(1, 0))
            down = np.moveaxis(inner, -1, 1)  # (rank, kh, kw, in) -> (rank, in, kh, kw)
        weight += (up @ down.reshape(len(down), -1)).reshape(weight.shape)


def merge(loras: Sequence[Lora], weights: Weights) -> dict[str, dict[str, Array]]:
    """The weights that ``loras`` change, with all of them added, in the dtypes of ``weights``.

    Args:
        loras: any number; their order does not matter but for rounding.
        weights: the networks' own, by network (of ``COMPONENTS``) and state-dict name.

    Returns:
        New arrays by network and name; what no LoRA changes is not among them.

    Raises:
        InputError: a file cannot be read, is of another kind (DoRA, LoHa, LoKr …) or for another model, or the merged
            weights are too large for their dtype.
    """
    names = _names(weights)
    changes: dict[tuple[str, str], list[_Change]] = {}
    for lora in loras:
        for place, change in _read(lora, names, weights).items():
            changes.setdefault(place, []).append(change)
    merged: dict[str, dict[str, Array]] = {}
    for (component, name), own in changes.items():
        old = weights[component][name]
        new = old.astype(np.float32)
        for change in own:
            change.add_to(new)
        with np.errstate(over="ignore", invalid="ignore"):
            stored = new.astype(old.dtype)
        if not np.isfinite(stored).all():
            files = ", ".join(str(lora.path) for lora in loras)
            raise InputError(f"with {files} the weight {name} is beyond what {old.dtype} holds; use a smaller scale")
        merged.setdefault(component, {})[name] = stored
    return merged


def _read(lora: Lora, names: Mapping[str, Place], weights: Weights) -> dict[Place, _Change]:
    """What a file changes, and of which weights."""
    file = SafetensorsFile(lora.path)
    strangers, misfits, changes = [], [], {}
    for module, parts in _modules(lora.path, file).items():
        place = names.get(module)
        if place is None:
            strangers.append(module)
            continue
        if not {"down", "up"} <= parts.keys() or place in changes or parts.get("alpha", _ONE).size != 1:
            raise InputError(f"{lora.path} has half of {module}, or has it twice; download it again")
        change = changes[place] = _change(lora, file, place, parts)
        shape = weights[place[0]][place[1]].shape
        if not change.fits(shape):
            misfits.append(f"{module} of {change.up.shape} by {change.down.shape} on {shape}")
    found = [
        f"{len(items)} {what}: {_listed(items)}"
        for what, items in (("keys match nothing", strangers), ("have other shapes", misfits))
        if items
    ]
    if found:
        raise InputError(f"{lora.path} does not fit this model; {'; '.join(found)}; use one made for its family")
    return changes


def _modules(path: Path, file: SafetensorsFile) -> dict[str, dict[str, Array]]:
    """The tensors of each module that the file names."""
    modules: dict[str, dict[str, Array]] = {}
    for key in file:
        other = next((kind for pattern, kind in OTHERS.items() if re.search(pattern, key)), None)
        if other is not None:
            raise InputError(
                f"{path} is no LoRA but {other} ({key}), which is not supported; supported: LoRA and LoCon"
            )
        ending = next((ending for ending in PARTS if key.endswith(ending)), "")
        module = key.removesuffix(ending).removeprefix("base_model.model.")
        modules.setdefault(module, {})[PARTS.get(ending, "")] = file[key]
    if not modules:
        raise InputError(f"{path} is empty; download it again")
    return modules


def _change(lora: Lora, file: SafetensorsFile, place: Place, parts: Mapping[str, Array]) -> _Change:
    """Scaled by alpha / rank; without an alpha as PEFT noted in the header, and without that by one."""
    rank = max(parts["down"].shape[:1], default=1) or 1
    factor = float(parts["alpha"].item()) / rank if "alpha" in parts else _noted_factor(lora.path, file, place, rank)
    return _Change(down=parts["down"], up=parts["up"], mid=parts.get("mid"), factor=lora.scale * factor)


def _noted_factor(path: Path, file: SafetensorsFile, place: Place, rank: int) -> float:
    """What PEFT's settings of a network, which diffusers writes into the header, scale a module by."""
    component, module = place[0], place[1].removesuffix(".weight")
    try:
        settings = json.loads(file.metadata.get("lora_adapter_metadata", "{}"))
        alpha = settings.get(f"{component}.lora_alpha", rank)
        for name, other in settings.get(f"{component}.alpha_pattern", {}).items():
            if f".{module}".endswith(f".{name}"):
                alpha = other
        return float(alpha) / (math.sqrt(rank) if settings.get(f"{component}.use_rslora") else rank)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path} has a damaged header: {error}; download it again") from None


def _names(weights: Weights) -> dict[str, Place]:
    """Every name that a LoRA file can have for each of the weights."""
    names: dict[str, Place] = {}
    for component, own in weights.items():
        layers = sum(bool(re.fullmatch(r"down_blocks\.0\.resnets\.\d+\.conv1\.weight", name)) for name in own)
        for name in own:
            if name.endswith(".weight"):
                for alias in _aliases(component, name.removesuffix(".weight"), layers):
                    names[alias] = (component, name)
    return names


def _aliases(component: str, module: str, layers: int) -> Iterator[str]:
    originals = _original_names(module, layers) if component == "unet" else []
    for name in (module, *originals):
        for prefix in KOHYA_PREFIXES[component]:
            yield f"lora_{prefix}_{name.replace('.', '_')}"
    for name in (module, *originals, *(re.sub(pattern, old, module) for pattern, old in OLD_NAMES)):
        yield f"{component}.{name}"
        yield f"{component}.{name.removeprefix('text_model.')}"
        if component == "unet":
            yield name
            yield f"diffusion_model.{name}"


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


def _trimmed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the ones at its end."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _listed(items: Sequence[str], most: int = 8) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
