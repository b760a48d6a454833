"""Keys and values of image prompts as a UNet's rows: by block, with their scales, filled up to one length."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from calotype.runtime.arrays import Array, Inputs
from calotype.runtime.bundle.spec import ModelSpec
from calotype.runtime.errors import BundleError, InputError, quoted
from calotype.runtime.image_prompt import Scale

KEYS, VALUES, BIAS = "_image_keys", "_image_values", "image_bias"
GROUPS = ("rows", "adapters", "image_tokens")  # the symbols of their dimensions
NO_TOKEN = -1000.0  # added to a score: its share is 0 in float16, too, and the number is far from float16's end
# Of one picture, keys and values (tokens, C) of each cross-attention, in the order of an IP-Adapter's file.
Read = list[tuple[Array, Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """A block of a UNet that attends to the prompt: its name, how many times, and with how many channels."""

    name: str
    layers: int
    channels: int

    @property
    def way(self) -> str:
        """``down``, ``mid`` or ``up``."""
        return self.name.partition("_")[0]


def blocks_of(unet: ModelSpec) -> list[Block]:
    """The blocks that take image prompts, in the order of computing.

    Raises:
        BundleError: an input for them has another shape than it should.
    """
    found = []
    for spec in unet.inputs:
        if not spec.name.endswith(KEYS):
            continue
        name = spec.name.removesuffix(KEYS)
        rows, layers, *groups, channels = spec.shape if len(spec.shape) == 5 else (0,) * 5
        values = unet.input(f"{name}{VALUES}")
        known = isinstance(layers, int) and isinstance(channels, int) and (rows, *groups) == GROUPS
        if not known or values is None or values.shape != spec.shape:
            raise BundleError(f"the UNet's {spec.name} and {name}{VALUES} are no keys and values; export again")
        found.append(Block(name=name, layers=int(layers), channels=int(channels)))
    return found


def layer_scales(scale: Scale, blocks: Sequence[Block]) -> tuple[float, ...]:
    """The scale of each cross-attention, in the order of computing.

    Raises:
        InputError: it is of a block that there is not, or says of another number of layers than that has.
    """
    if not isinstance(scale, Mapping):
        return (scale,) * sum(block.layers for block in blocks)
    named = {block.name for block in blocks}
    asked = {
        f"{way}_{name.removeprefix('block_')}" for way, own in scale.items() if isinstance(own, dict) for name in own
    }
    if asked - named:
        unknown, known = ", ".join(sorted(asked - named)), ", ".join(sorted(named - {"mid"}))
        raise InputError(f"an image prompt's scale is of {unknown}, which reads no prompt in this UNet; valid: {known}")
    found: list[float] = []
    for block in blocks:
        own = scale.get(block.way, 0.0)
        if isinstance(own, dict):
            own = own.get(f"block_{block.name.rpartition('_')[2]}", 0.0)
        listed = own if isinstance(own, tuple) else (own,)
        each, rest = divmod(block.layers, len(listed))
        if rest:
            raise InputError(
                f"an image prompt's scale has {quoted(list(listed))} for {block.name}, which attends to the prompt "
                f"{block.layers} times; give one number for all of them, or one for each of its attentions"
            )
        found += [float(number) for number in listed for _ in range(each)]
    return tuple(found)


def rows_of(blocks: Sequence[Block], adapters: Sequence[Sequence[Read]], scales: Sequence[Sequence[float]]) -> Inputs:
    """One row's inputs.

    Args:
        blocks: of the UNet, in the order of computing.
        adapters: for each IP-Adapter, what it has read of each of its pictures, whose tokens are attended to together.
        scales: for each IP-Adapter, that of each cross-attention, in the order of computing; values are multiplied by
            it, in which attention is linear.

    Returns:
        For each block keys and values of its L cross-attentions, (L, A, N, C) float32, where N is the most tokens of an
        adapter; and the bias of their scores, (A, N) float32, that leaves out what the others are filled up with.
    """
    counts = [sum(len(read[0][0]) for read in pictures) for pictures in adapters]
    bias = np.zeros((len(adapters), max(counts)), np.float32)
    for number, count in enumerate(counts):
        bias[number, count:] = NO_TOKEN
    rows: dict[str, Array] = {BIAS: bias}
    places = _places(blocks)
    computed = 0
    for block in blocks:
        shape = (block.layers, *bias.shape, block.channels)
        keys, values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        for layer in range(block.layers):
            for number, pictures in enumerate(adapters):
                own = [read[places[block.name] + layer] for read in pictures]
                scale = np.float32(scales[number][computed])
                keys[layer, number, : counts[number]] = np.concatenate([key for key, _ in own])
                values[layer, number, : counts[number]] = np.concatenate([value for _, value in own]) * scale
            computed += 1
        rows[f"{block.name}{KEYS}"], rows[f"{block.name}{VALUES}"] = keys, values
    return rows


def file_order(blocks: Sequence[Block]) -> list[Block]:
    """As IP-Adapters count blocks: down, up, and the middle last."""
    return sorted(blocks, key=lambda block: block.way == "mid")


def _places(blocks: Sequence[Block]) -> dict[str, int]:
    """Where in an IP-Adapter's file the cross-attentions of each block begin."""
    found, count = {}, 0
    for block in file_order(blocks):
        found[block.name], count = count, count + block.layers
    return found
