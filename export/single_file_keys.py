"""How the original single files name what diffusers and transformers name otherwise.

Each table maps the beginnings of diffusers' names to the original ones; what follows a beginning, and what has none, is
spelt alike in both. The originals: CompVis/latent-diffusion, Stability-AI/stablediffusion and generative-models, and
mlfoundations/open_clip.
"""

from __future__ import annotations

from calotype.export.models.autoencoder import AutoencoderConfig
from calotype.export.models.clip import TextEncoderConfig
from calotype.export.models.unet import UNetConfig

UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.attentions.0": "middle_block.1",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE = {
    "encoder.conv_norm_out": "encoder.norm_out",
    "decoder.conv_norm_out": "decoder.norm_out",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPENCLIP = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
}
OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn": "attn",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def unet_table(config: UNetConfig) -> dict[str, str]:
    """The original numbers its blocks through all levels; a change of resolution is a block, or ends one."""
    table = dict(UNET)
    table |= _under("mid_block.resnets.0", "middle_block.0", UNET_RESNET)
    table |= _under("mid_block.resnets.1", "middle_block.2", UNET_RESNET)
    last, number = len(config.layers) - 1, 1
    for level, layers in enumerate(config.layers):
        for layer in range(layers):
            table |= _under(f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{number}.0", UNET_RESNET)
            table[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        table[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
        number += 1
    number = 0
    for level, (layers, kind) in enumerate(zip(reversed(config.layers), config.up_block_types, strict=True)):
        for layer in range(layers + 1):
            table |= _under(f"up_blocks.{level}.resnets.{layer}", f"output_blocks.{number}.0", UNET_RESNET)
            table[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{number}.1"
            number += 1
        if level < last:
            place = 2 if kind == "CrossAttnUpBlock2D" else 1
            table[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{number - 1}.{place}"
    return table


def vae_table(config: AutoencoderConfig) -> dict[str, str]:
    """The original counts the decoder's levels from the image, diffusers from the latents."""
    table, levels = dict(VAE), len(config.block_out_channels)
    for half in ("encoder", "decoder"):
        for index in (0, 1):
            table |= _resnet(f"{half}.mid_block.resnets.{index}", f"{half}.mid.block_{index + 1}")
        table |= _under(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", VAE_ATTENTION)
    for level in range(levels):
        down, up = f"encoder.down.{level}", f"decoder.up.{levels - 1 - level}"
        table[f"encoder.down_blocks.{level}.downsamplers.0"] = f"{down}.downsample"
        table[f"decoder.up_blocks.{level}.upsamplers.0"] = f"{up}.upsample"
        for layer in range(config.layers_per_block + 1):
            table |= _resnet(f"encoder.down_blocks.{level}.resnets.{layer}", f"{down}.block.{layer}")
            table |= _resnet(f"decoder.up_blocks.{level}.resnets.{layer}", f"{up}.block.{layer}")
    return table


def openclip_table(config: TextEncoderConfig) -> dict[str, str]:
    """OpenCLIP's names, where its fused projections have been taken apart."""
    table = dict(OPENCLIP)
    for layer in range(config.num_hidden_layers):
        table |= _under(f"text_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}", OPENCLIP_LAYER)
    return table


def _resnet(name: str, original: str) -> dict[str, str]:
    return {name: original, f"{name}.conv_shortcut": f"{original}.nin_shortcut"}


def _under(name: str, original: str, names: dict[str, str]) -> dict[str, str]:
    return {f"{name}.{part}": f"{original}.{spelt}" for part, spelt in names.items()}
