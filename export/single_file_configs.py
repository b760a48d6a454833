"""Configurations that a single file does not carry, read off the shapes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping

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
        raise CheckpointError(f"the file has no {self.prefix}{name}; it is incomplete, download it again")

    def size(self, name: str, axis: int) -> int:
        """The length of one axis of a tensor."""
        return int(self[name].shape[axis])

    def count(self, stem: str) -> int:
        """One more than the highest number that follows ``stem`` in a name."""
        numbers = {name[len(stem) :].partition(".")[0] for name in self if name.startswith(stem)}
        return max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1


def unet_config(part: Part, *, heads: int | None, pooled_width: int | None) -> UNetConfig:
    """The UNet's settings.

    Args:
        part: its tensors.
        heads: of every attention; None where a head has 64 channels.
        pooled_width: of SDXL's pooled prompt embedding, beside which six numbers are embedded.
    """
    channels, layers, depths = _unet_levels(part)
    time_ids = None if pooled_width is None else (part.size("label_emb.0.0.weight", 1) - pooled_width) // 6
    return UNetConfig(
        in_channels=part.size("input_blocks.0.0.weight", 1),
        out_channels=part.size("out.2.weight", 0),
        block_out_channels=tuple(channels),
        down_block_types=tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths),
        up_block_types=tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)),
        layers_per_block=tuple(layers),
        # The deepest level shares its depth with the middle, which has attention even where that level has none.
        transformer_layers_per_block=(
            *(depth or 1 for depth in depths[:-1]),
            part.count("middle_block.1.transformer_blocks."),
        ),
        attention_head_dim=tuple(heads or max(count // HEAD_CHANNELS, 1) for count in channels),
        cross_attention_dim=part.size("middle_block.1.transformer_blocks.0.attn2.to_k.weight", 1),
        use_linear_projection=part["middle_block.1.proj_in.weight"].ndim == 2,
        addition_embed_type=None if time_ids is None else "text_time",
        projection_class_embeddings_input_dim=None if time_ids is None else part.size("label_emb.0.0.weight", 1),
        addition_time_embed_dim=time_ids,
        time_cond_proj_dim=part.size("time_embed.cond_proj.weight", 1)
        if "time_embed.cond_proj.weight" in part
        else None,
    )


def _unet_levels(part: Part) -> tuple[list[int], list[int], list[int]]:
    """Channels, resnets and transformer depth of each level."""
    channels, layers, depths = [0], [0], [0]
    for number in range(1, part.count("input_blocks.")):
        block = f"input_blocks.{number}"
        if f"{block}.0.op.weight" in part:
            channels, layers, depths = [*channels, 0], [*layers, 0], [*depths, 0]
        else:
            channels[-1] = part.size(f"{block}.0.out_layers.3.weight", 0)
            layers[-1] += 1
            depths[-1] = part.count(f"{block}.1.transformer_blocks.")
    return channels, layers, depths


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


def clip_config(part: Part) -> TextEncoderConfig:
    """The settings of a text encoder in transformers' layout, OpenAI's."""
    stem = "text_model." if any(name.startswith("text_model.") for name in part) else ""
    vocabulary = f"{stem}embeddings.token_embedding.weight"
    return TextEncoderConfig(
        vocab_size=part.size(vocabulary, 0),
        hidden_size=part.size(vocabulary, 1),
        intermediate_size=part.size(f"{stem}encoder.layers.0.mlp.fc1.weight", 0),
        num_hidden_layers=part.count(f"{stem}encoder.layers."),
        num_attention_heads=max(part.size(vocabulary, 1) // HEAD_CHANNELS, 1),
        max_position_embeddings=part.size(f"{stem}embeddings.position_embedding.weight", 0),
        hidden_act="quick_gelu",
    )


def openclip_config(part: Part, *, unread_layers: int) -> TextEncoderConfig:
    """The settings of a text encoder in OpenCLIP's layout without its last ``unread_layers``."""
    width, with_projection = part.size("token_embedding.weight", 1), "text_projection" in part
    return TextEncoderConfig(
        vocab_size=part.size("token_embedding.weight", 0),
        hidden_size=width,
        intermediate_size=part.size("transformer.resblocks.0.mlp.c_fc.weight", 0),
        num_hidden_layers=part.count("transformer.resblocks.") - unread_layers,
        num_attention_heads=max(width // HEAD_CHANNELS, 1),
        max_position_embeddings=part.size("positional_embedding", 0),
        hidden_act="gelu",
        projection_dim=part.size("text_projection", 1) if with_projection else width,
        with_projection=with_projection,
    )
