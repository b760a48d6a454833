"""Configurations that a single file does not carry, read off the shapes of its tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from calotype.export.models.autoencoder import AutoencoderConfig
from calotype.export.models.clip import TextEncoderConfig
from calotype.export.models.unet import UNetConfig
from calotype.runtime.errors import CheckpointError

HEAD_CHANNELS = 64  # of every attention that is not told otherwise: both CLIPs', SD 2.x's and SDXL's


class Part(dict[str, Tensor]):
    """The tensors of one component of a file, by their names without its ``prefix``."""

    def __init__(self, prefix: str, state: Mapping[str, Tensor]) -> None:
        super().__init__({name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)})
        self.prefix = prefix

    def __missing__(self, name: str) -> Tensor:
        raise CheckpointError(
            f"the file has no {self.prefix}{name}; it was lost when the file was converted: take the publisher's own"
        )

    def size(self, name: str, axis: int) -> int:
        """The length of one axis of a tensor."""
        return int(self[name].shape[axis])

    def count(self, stem: str) -> int:
        """One more than the highest number that follows ``stem`` in a name."""
        numbers = {name[len(stem) :].partition(".")[0] for name in self if name.startswith(stem)}
        return max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetMarks:
    """What tells the families apart: the width of the context, how attention projects pixels, what else is embedded."""

    context: int
    linear: bool
    pooled: bool


def unet_marks(part: Part) -> UNetMarks | None:
    """The marks of a UNet; None for one that reads no context."""
    context = next((tensor for name, tensor in part.items() if name.endswith(".attn2.to_k.weight")), None)
    projection = next((tensor for name, tensor in part.items() if name.endswith(".proj_in.weight")), None)
    if context is None or projection is None:
        return None
    return UNetMarks(context=int(context.shape[1]), linear=projection.ndim == 2, pooled="label_emb.0.0.weight" in part)


def unet_config(part: Part, *, heads: int | None, pooled_width: int | None) -> UNetConfig:
    """The UNet's settings.

    Args:
        part: its tensors.
        heads: of every attention; None where a head has 64 channels.
        pooled_width: of SDXL's pooled prompt embedding, beside which six numbers are embedded.

    Raises:
        CheckpointError: it reads no context.
    """
    marks = unet_marks(part)
    if marks is None:
        raise CheckpointError(f"the UNet under {part.prefix} has no attention to a prompt; it is of no known model")
    channels, depths = unet_levels(part)
    up_depths = _up_depths(part, [len(level) for level in depths])
    time_ids = None if pooled_width is None else (part.size("label_emb.0.0.weight", 1) - pooled_width) // 6
    # The deepest level shares its depth with the middle, which has attention even where that level has none.
    middle = part.count("middle_block.1.transformer_blocks.")
    blocks = [_collapsed(level) or 1 for level in depths]
    blocks[-1] = middle or blocks[-1]
    mirrored = [_collapsed(level) or 1 for level in up_depths] if _is_uneven(depths, up_depths) else None
    return UNetConfig(
        in_channels=part.size("input_blocks.0.0.weight", 1),
        out_channels=part.size("out.2.weight", 0),
        block_out_channels=tuple(channels),
        down_block_types=tuple("CrossAttnDownBlock2D" if any(level) else "DownBlock2D" for level in depths),
        up_block_types=tuple("CrossAttnUpBlock2D" if any(level) else "UpBlock2D" for level in up_depths),
        mid_block_type=_mid_block_type(part),
        layers_per_block=tuple(len(level) for level in depths),
        transformer_layers_per_block=tuple(blocks),
        reverse_transformer_layers_per_block=None if mirrored is None else tuple(mirrored),
        attention_head_dim=tuple(heads or max(count // HEAD_CHANNELS, 1) for count in channels),
        cross_attention_dim=marks.context,
        use_linear_projection=marks.linear,
        addition_embed_type=None if time_ids is None else "text_time",
        projection_class_embeddings_input_dim=None if time_ids is None else part.size("label_emb.0.0.weight", 1),
        addition_time_embed_dim=time_ids,
        time_cond_proj_dim=part.size("time_embed.cond_proj.weight", 1)
        if "time_embed.cond_proj.weight" in part
        else None,
    )


def _mid_block_type(part: Part) -> str | None:
    """Pruned models have lost the middle's attention, or all of the middle."""
    if part.count("middle_block.1.transformer_blocks."):
        return "UNetMidBlock2DCrossAttn"
    return "UNetMidBlock2D" if part.count("middle_block.") else None


def unet_levels(part: Part) -> tuple[list[int], list[list[int]]]:
    """Channels of each level, and the transformer depth behind each of its resnets."""
    channels, depths = [0], [list[int]()]
    for number in range(1, part.count("input_blocks.")):
        block = f"input_blocks.{number}"
        if f"{block}.0.op.weight" in part:
            channels, depths = [*channels, 0], [*depths, []]
        else:
            channels[-1] = part.size(f"{block}.0.out_layers.3.weight", 0)
            depths[-1].append(part.count(f"{block}.1.transformer_blocks."))
    return channels, depths


def _up_depths(part: Part, layers: list[int]) -> list[list[int]]:
    """The transformer depth behind each resnet on the way up, the deepest level first; it has one resnet more."""
    numbers = iter(range(part.count("output_blocks.") + sum(layers) + len(layers)))
    return [
        [part.count(f"output_blocks.{next(numbers)}.1.transformer_blocks.") for _ in range(count + 1)]
        for count in reversed(layers)
    ]


def _collapsed(depths: list[int]) -> int | tuple[int, ...]:
    return depths[0] if len(set(depths)) == 1 else tuple(depths)


def _is_uneven(depths: list[list[int]], up_depths: list[list[int]]) -> bool:
    """Whether one level has several depths, or another on its way up than down, so that both are to be said."""
    return [[*set(level)] for level in reversed(depths)] != [[*set(level)] for level in up_depths] or any(
        len(set(level)) > 1 for level in depths
    )


def vae_config(part: Part, *, scaling_factor: float | None) -> AutoencoderConfig:
    """The autoencoder's settings."""
    levels = part.count("encoder.down.")
    return AutoencoderConfig(
        in_channels=part.size("encoder.conv_in.weight", 1),
        out_channels=part.size("decoder.conv_out.weight", 0),
        latent_channels=part.size("decoder.conv_in.weight", 1),
        block_out_channels=tuple(part.size(f"encoder.down.{level}.block.0.conv1.weight", 0) for level in range(levels)),
        layers_per_block=part.count("encoder.down.0.block."),
        scaling_factor=scaling_factor,
    )


def clip_config(part: Part, *, hidden_act: str) -> TextEncoderConfig:
    """The settings of a text encoder in transformers' layout."""
    stem = "text_model." if any(name.startswith("text_model.") for name in part) else ""
    vocabulary = f"{stem}embeddings.token_embedding.weight"
    return TextEncoderConfig(
        vocab_size=part.size(vocabulary, 0),
        hidden_size=part.size(vocabulary, 1),
        intermediate_size=part.size(f"{stem}encoder.layers.0.mlp.fc1.weight", 0),
        num_hidden_layers=part.count(f"{stem}encoder.layers."),
        num_attention_heads=max(part.size(vocabulary, 1) // HEAD_CHANNELS, 1),
        max_position_embeddings=part.size(f"{stem}embeddings.position_embedding.weight", 0),
        hidden_act=hidden_act,
        **_projection(part, part.size(vocabulary, 1)),
    )


def openclip_config(part: Part, *, hidden_act: str) -> TextEncoderConfig:
    """The settings of a text encoder in OpenCLIP's layout."""
    width = part.size("token_embedding.weight", 1)
    return TextEncoderConfig(
        vocab_size=part.size("token_embedding.weight", 0),
        hidden_size=width,
        intermediate_size=part.size("transformer.resblocks.0.mlp.c_fc.weight", 0),
        num_hidden_layers=part.count("transformer.resblocks."),
        num_attention_heads=max(width // HEAD_CHANNELS, 1),
        max_position_embeddings=part.size("positional_embedding", 0),
        hidden_act=hidden_act,
        **_projection(part, width),
    )


def _projection(part: Part, width: int) -> dict[str, Any]:
    """The settings that say whether there is a projection, and how wide it is."""
    if "text_projection.weight" not in part:
        return {"projection_dim": width, "with_projection": False}
    return {"projection_dim": part.size("text_projection.weight", 0), "with_projection": True}
