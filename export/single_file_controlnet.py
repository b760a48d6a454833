"""A ControlNet in one file: its settings, read off the shapes of its tensors, and how the original names them."""

from __future__ import annotations

import dataclasses

from calotype.export.models.controlnet import ControlNetConfig
from calotype.export.models.controlnet_union import ControlNetUnionConfig
from calotype.export.single_file import SingleFile
from calotype.export.single_file_configs import HEAD_CHANNELS, Part, unet_levels
from calotype.export.single_file_keys import unet_table
from calotype.runtime.errors import CheckpointError

# The first tensor of what reads the control picture, in the original layout and in diffusers'.
ORIGINAL, DIFFUSERS = "input_hint_block.0.weight", "controlnet_cond_embedding.conv_in.weight"
KINDS = "task_embedding"  # of one for several kinds of pictures
SIZE_EMBEDDING = 256  # SDXL's width of each of six numbers, beside the pooled prompt
SD1_CONTEXT, SD2_CONTEXT = 768, 1024
SD1_HEADS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Layout:
    """What a layout calls the tensors that tell the settings; ``{}`` is a level."""

    picture: str
    sizes: str
    middle: str


_LAYOUTS = {
    ORIGINAL: _Layout(
        picture="input_hint_block", sizes="label_emb.0.0.weight", middle="middle_block.1.transformer_blocks."
    ),
    DIFFUSERS: _Layout(
        picture="controlnet_cond_embedding",
        sizes="add_embedding.linear_1.weight",
        middle="mid_block.attentions.0.transformer_blocks.",
    ),
}


def controlnet_part(file: SingleFile) -> tuple[Part, bool]:
    """The ControlNet's tensors, none where there is none, and whether they are in the original layout."""
    part = file.part(ORIGINAL)
    return (part, True) if part else (file.part(DIFFUSERS), False)


def controlnet_config(part: Part, *, original: bool, pooled: bool) -> ControlNetConfig:
    """The settings of a ControlNet.

    Args:
        part: its tensors.
        original: whether they are in the original layout.
        pooled: whether it is one whose residuals hold for every pixel, which no tensor tells.

    Raises:
        CheckpointError: it reads no prompt, or sizes that are not SDXL's.
    """
    layout = _LAYOUTS[ORIGINAL if original else DIFFUSERS]
    channels, depths = unet_levels(part) if original else _diffusers_levels(part)
    context, linear = _attention(part)
    sizes = part.size(layout.sizes, 1) if layout.sizes in part else None
    if sizes is not None and sizes <= 6 * SIZE_EMBEDDING:
        raise CheckpointError(f"the file's {part.prefix}{layout.sizes} reads {sizes} numbers; SDXL's reads 2816")
    family = controlnet_family(context=context, linear=linear, sizes=sizes is not None)
    blocks = [level[0] or 1 for level in depths]
    blocks[-1] = part.count(layout.middle) or blocks[-1]
    common = ControlNetConfig(
        in_channels=part.size("input_blocks.0.0.weight" if original else "conv_in.weight", 1),
        block_out_channels=tuple(channels),
        down_block_types=tuple("CrossAttnDownBlock2D" if any(level) else "DownBlock2D" for level in depths),
        layers_per_block=tuple(len(level) for level in depths),
        transformer_layers_per_block=tuple(blocks),
        attention_head_dim=tuple(
            SD1_HEADS if family == "sd1" else max(count // HEAD_CHANNELS, 1) for count in channels
        ),
        cross_attention_dim=context,
        use_linear_projection=linear,
        addition_embed_type=None if sizes is None else "text_time",
        projection_class_embeddings_input_dim=sizes,
        addition_time_embed_dim=None if sizes is None else SIZE_EMBEDDING,
        conditioning_embedding_out_channels=_picture_channels(part, original=original),
        global_pool_conditions=pooled,
    )
    if KINDS not in part:
        return common
    return ControlNetUnionConfig(
        **{field.name: getattr(common, field.name) for field in dataclasses.fields(common)},
        num_control_type=part.size(KINDS, 0),
        num_trans_channel=part.size(KINDS, 1),
        num_proj_channel=part.size("spatial_ch_projs.weight", 0),
        num_trans_layer=part.count("transformer_layes."),
    )


def controlnet_family(*, context: int, linear: bool, sizes: bool) -> str:
    """The family whose UNets it is for: by the width of its context, or of no published one by its projections."""
    if sizes:
        return "sdxl"
    second = linear if context not in (SD1_CONTEXT, SD2_CONTEXT) else context == SD2_CONTEXT
    return "sd2" if second else "sd1"


def controlnet_table(config: ControlNetConfig) -> dict[str, str]:
    """How the original names what diffusers names otherwise; between its convolutions it counts activations."""
    table = unet_table(config.half)
    own, picture = "controlnet_cond_embedding", "input_hint_block"
    between = 2 * (len(config.conditioning_embedding_out_channels) - 1)
    names = [f"{own}.conv_in", *(f"{own}.blocks.{index}" for index in range(between)), f"{own}.conv_out"]
    table |= {name: f"{picture}.{2 * index}" for index, name in enumerate(names)}
    count = 1 + sum(config.half.layers) + len(config.half.layers) - 1
    table |= {f"controlnet_down_blocks.{index}": f"zero_convs.{index}.0" for index in range(count)}
    return table | {"controlnet_mid_block": "middle_block_out.0"}


def _attention(part: Part) -> tuple[int, bool]:
    """The width of the context, and whether attention projects pixels with a linear layer."""
    context = next((tensor for name, tensor in part.items() if name.endswith(".attn2.to_k.weight")), None)
    projection = next((tensor for name, tensor in part.items() if name.endswith(".proj_in.weight")), None)
    if context is None or projection is None:
        raise CheckpointError(
            f"the ControlNet under {part.prefix or 'the file'} has no attention to a prompt; it is of no known model"
        )
    return int(context.shape[1]), projection.ndim == 2


def _diffusers_levels(part: Part) -> tuple[list[int], list[list[int]]]:
    """See :func:`unet_levels`."""
    channels, depths = [], []
    for level in range(part.count("down_blocks.")):
        block = f"down_blocks.{level}"
        channels.append(part.size(f"{block}.resnets.0.conv1.weight", 0))
        layers = range(part.count(f"{block}.resnets."))
        depths.append([part.count(f"{block}.attentions.{layer}.transformer_blocks.") for layer in layers])
    return channels, depths


def _picture_channels(part: Part, *, original: bool) -> tuple[int, ...]:
    """Channels of what reads the control picture: of its first convolution, and of each that halves it."""
    if original:
        first, halving = ORIGINAL, range(4, part.count("input_hint_block.") - 1, 4)
        names = [f"input_hint_block.{index}.weight" for index in halving]
    else:
        first, halving = DIFFUSERS, range(1, part.count("controlnet_cond_embedding.blocks."), 2)
        names = [f"controlnet_cond_embedding.blocks.{index}.weight" for index in halving]
    return tuple(part.size(name, 0) for name in (first, *names))
