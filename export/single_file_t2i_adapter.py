"""A T2I-Adapter in one file: its settings, read off the shapes of its tensors, and how the original names them."""

from __future__ import annotations

from calotype.export.models.t2i_adapter import FULL, FULL_XL, LIGHT, T2IAdapterConfig
from calotype.export.single_file import SingleFile
from calotype.export.single_file_configs import Part
from calotype.runtime.errors import CheckpointError

# The first tensor behind what reads the control picture: of full and of light adapters, in the original layout and in
# diffusers'.
ORIGINAL_FULL, ORIGINAL_LIGHT = "body.0.block1.weight", "body.0.body.0.block1.weight"
DIFFUSERS = "adapter.body.0.resnets.0.block1.weight"
# Pixels of the control picture that are put into one, each way, by the channels that this makes of one or three.
SHUFFLED = {64: (1, 8), 192: (3, 8), 256: (1, 16), 768: (3, 16)}


def t2i_adapter_part(file: SingleFile) -> tuple[Part, bool]:
    """The adapter's tensors, none where there is none, and whether they are in the original layout."""
    for mark, original in ((DIFFUSERS, False), (ORIGINAL_LIGHT, True), (ORIGINAL_FULL, True)):
        part = file.part(mark)
        if part:
            return part, original
    return Part(DIFFUSERS, {}), False


def t2i_adapter_config(part: Part, *, original: bool) -> T2IAdapterConfig:
    """The settings of an adapter.

    Args:
        part: its tensors.
        original: whether they are in the original layout.

    Raises:
        CheckpointError: it reads a picture in another way than the published ones.
    """
    body = "body" if original else "adapter.body"
    light = f"{body}.0.out_conv.weight" in part
    blocks = part.count(f"{body}.")
    first = f"{body}.0.in_conv.weight" if light else ("conv_in.weight" if original else "adapter.conv_in.weight")
    shuffled = part.size(first, 1)
    if shuffled not in SHUFFLED:
        known = ", ".join(map(str, SHUFFLED))
        raise CheckpointError(
            f"the T2I-Adapter's {part.prefix}{first} reads {shuffled} channels; published ones {known}"
        )
    channels, factor = SHUFFLED[shuffled]
    if light:
        resnets = part.count(f"{body}.0.body." if original else f"{body}.0.resnets.")
        counts = [part.size(f"{body}.{index}.out_conv.weight", 0) for index in range(blocks - 1)]
    else:
        # The original counts resnets alone, as many to a block.
        resnets = _run(part, blocks) if original else part.count(f"{body}.0.resnets.")
        inner = "block1" if original else "resnets.0.block1"
        step = resnets if original else 1
        counts = [part.size(f"{body}.{index}.{inner}.weight", 0) for index in range(0, blocks, step)]
    return T2IAdapterConfig(
        in_channels=channels,
        channels=tuple(counts),
        num_res_blocks=resnets,
        downscale_factor=factor,
        adapter_type=LIGHT if light else FULL_XL if factor == 16 else FULL,
    )


def t2i_adapter_table(config: T2IAdapterConfig) -> dict[str, str]:
    """How the original names what diffusers names otherwise."""
    blocks, count = range(len(config.halving)), config.num_res_blocks
    if config.adapter_type == LIGHT:
        table = {f"adapter.body.{block}.resnets": f"body.{block}.body" for block in blocks}
        for name in ("in_conv", "out_conv"):
            table |= {f"adapter.body.{block}.{name}": f"body.{block}.{name}" for block in blocks}
        return table
    table = {"adapter.conv_in": "conv_in"}
    for block in blocks:
        first = block * count
        table |= {f"adapter.body.{block}.resnets.{index}": f"body.{first + index}" for index in range(count)}
        table[f"adapter.body.{block}.in_conv"] = f"body.{first}.in_conv"
    return table


def _run(part: Part, blocks: int) -> int:
    """Resnets of a block: as many as lie before the first that makes its picture wider."""
    wider = (index for index in range(1, blocks) if f"body.{index}.in_conv.weight" in part)
    return next(wider, blocks)
