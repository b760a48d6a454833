"""Our modules against diffusers' and transformers': random weights of small odd shapes, float32.

Tolerance: the largest error is at most 1e-5 of the largest magnitude.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calotype.export.models.autoencoder import Autoencoder, AutoencoderConfig
from calotype.export.models.clip import TextEncoder, TextEncoderConfig
from calotype.export.models.layers import sinusoidal_embedding
from calotype.export.models.tiny_autoencoder import LOGVAR, TinyAutoencoder, TinyAutoencoderConfig
from calotype.export.models.unet import UNet, UNetConfig
from calotype.export.weights import load_module
from calotype.runtime.errors import UnsupportedArchitectureError

TOLERANCE = 1e-5
DOWN, CROSS_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
UP, CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {
        "block_out_channels": (20, 40, 60),
        "down_block_types": (CROSS_DOWN, CROSS_DOWN, DOWN),
        "up_block_types": (UP, CROSS_UP, CROSS_UP),
        "attention_head_dim": 4,
        "cross_attention_dim": 24,
    },
    "sd2": {
        "block_out_channels": (20, 40),
        "down_block_types": (CROSS_DOWN, DOWN),
        "up_block_types": (UP, CROSS_UP),
        "attention_head_dim": (1, 2),
        "cross_attention_dim": 24,
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "sdxl": {
        "block_out_channels": (10, 20, 40),
        "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN),
        "up_block_types": (CROSS_UP, CROSS_UP, UP),
        "attention_head_dim": (1, 2, 4),
        "transformer_layers_per_block": (1, 2, 3),
        "cross_attention_dim": 36,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 12 + 6 * 8,
    },
}
UNETS["inpainting"] = UNETS["sd1"] | {"in_channels": 9}
UNETS["lcm"] = UNETS["sd1"] | {"time_cond_proj_dim": 14}
UNETS["lcm-sdxl"] = UNETS["sdxl"] | {"time_cond_proj_dim": 14, "layers_per_block": (1, 2, 3)}
UNETS["sixteen channels"] = UNETS["sd2"] | {"in_channels": 16, "out_channels": 16, "flip_sin_to_cos": False}


def randomised(reference: nn.Module) -> nn.Module:
    """All parameters away from their start: a norm's weight is one there, and its bias nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return reference.eval()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def assert_equal(got: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.shape == theirs.shape
        assert float((mine - theirs).abs().max() / theirs.abs().max()) <= TOLERANCE


def diffusers_model(name: str, **config: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers

        return randomised(getattr(diffusers, name)(**config))


def check_unet(config: dict[str, Any], height: int, width: int) -> None:
    reference = diffusers_model("UNet2DConditionModel", **config)
    mine = load_module(UNet, UNetConfig.from_json(dict(reference.config)), reference.state_dict(), "UNet")
    sample, timestep = normal(3, mine.config.in_channels, height, width), torch.tensor([0.0, 421.0, 999.0])
    context = normal(3, 11, mine.config.cross_attention_dim)
    more: dict[str, Tensor] = {}
    if mine.config.addition_embed_type is not None:
        sizes = torch.tensor([[512.0, 768, 0, 16, 1024, 1024]]).repeat(3, 1)
        more = {"text_embeds": normal(3, 12), "time_ids": sizes}
    condition = None if mine.config.time_cond_proj_dim is None else normal(3, mine.config.time_cond_proj_dim)
    with torch.no_grad():
        expected = reference(
            sample, timestep, context, timestep_cond=condition, added_cond_kwargs=more or None, return_dict=False
        )
        got = mine(sample, timestep, context, **more, timestep_cond=condition)
    assert_equal([got], expected)


def test_timestep_embedding_of_real_width() -> None:
    """Bit for bit: at late timesteps the angles are so large that another order of rounding is seen in the output."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers.models.embeddings import get_timestep_embedding
    timesteps = torch.tensor([0.0, 1.0, 421.5, 999.0])
    for flip, shift in ((True, 0), (False, 1)):
        expected = get_timestep_embedding(timesteps, 320, flip_sin_to_cos=flip, downscale_freq_shift=shift)
        got = sinusoidal_embedding(timesteps, 320, flip_sin_to_cos=flip, freq_shift=shift)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", UNETS)
def test_the_shallow_unet_on_its_own_deep_feature_is_the_whole_one(name: str) -> None:
    torch.manual_seed(0)
    config = UNetConfig.from_json({"norm_num_groups": 5, "layers_per_block": 1} | UNETS[name])
    model = UNet(config).eval()
    sample, timestep = torch.randn(2, config.in_channels, 8, 12), torch.tensor([999.0, 3.0])
    context = torch.randn(2, 7, config.cross_attention_dim)
    rest: list[Tensor | None] = [None, None, None]
    if config.addition_embed_type is not None:
        rest[:2] = torch.randn(2, 12), torch.randint(0, 1024, (2, 6)).float()
    if config.time_cond_proj_dim is not None:
        rest[2] = torch.randn(2, config.time_cond_proj_dim)
    with torch.no_grad():
        noise_pred, feature = model.deep(sample, timestep, context, *rest)
        assert feature.shape == (2, config.block_out_channels[0], 8, 12)
        assert torch.equal(noise_pred, model(sample, timestep, context, *rest))
        assert torch.equal(noise_pred, model.shallow(sample, timestep, context, feature, *rest))
        assert not torch.equal(noise_pred, model.shallow(sample, timestep, context, feature * 0.9, *rest))


@pytest.mark.parametrize("name", UNETS)
def test_unet(name: str) -> None:
    check_unet({"norm_num_groups": 5, "layers_per_block": 1} | UNETS[name], 8, 12)


def test_unet_of_odd_latents() -> None:
    check_unet({"norm_num_groups": 5} | UNETS["sd1"], 9, 15)


@pytest.mark.slow
def test_unet_of_real_size() -> None:
    """Stable Diffusion 1.5's: 859.5 million parameters, which the two share; 4.5 GB."""
    check_unet({"cross_attention_dim": 768}, 32, 32)


def autoencoder(**config: Any) -> tuple[nn.Module, Autoencoder]:
    levels = len(config["block_out_channels"])
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    reference = diffusers_model("AutoencoderKL", **blocks, norm_num_groups=4, **config)
    return reference, load_module(
        Autoencoder, AutoencoderConfig.from_json(dict(reference.config)), reference.state_dict(), "autoencoder"
    )


@pytest.mark.parametrize(
    "config",
    [
        {"block_out_channels": (8, 12, 20), "layers_per_block": 2},
        {"block_out_channels": (12, 8), "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
        {"block_out_channels": (8, 8), "mid_block_add_attention": False},
    ],
)
def test_autoencoder(config: dict[str, Any]) -> None:
    reference, mine = autoencoder(**config)
    latents, image = normal(2, mine.config.latent_channels, 5, 7), normal(2, 3, 24, 16)
    with torch.no_grad():
        assert_equal([mine.decode(latents)], reference.decode(latents, return_dict=False))
        posterior = reference.encode(image).latent_dist
        assert_equal(mine.encode(image), [posterior.mean, posterior.logvar])


def test_tiny_autoencoder() -> None:
    config = {
        "encoder_block_out_channels": (12,) * 3,
        "decoder_block_out_channels": (20,) * 3,
        "num_encoder_blocks": (1, 2, 1),
        "num_decoder_blocks": (2, 1, 1),
        "latent_channels": 5,
    }
    reference = diffusers_model("AutoencoderTiny", **config)
    settings = TinyAutoencoderConfig.from_json(dict(reference.config))
    mine = load_module(TinyAutoencoder, settings, reference.state_dict(), "tiny autoencoder")
    assert settings.downscale == 4
    latents, image = normal(2, 5, 6, 7), normal(2, 3, 24, 16)
    with torch.no_grad():
        assert_equal([mine.decode(latents)], reference.decode(latents, return_dict=False))
        mean, logvar = mine.encode(image)
        assert_equal([mean], reference.encode(image, return_dict=False))
    assert logvar.shape == mean.shape and bool((logvar == LOGVAR).all())


def text_encoder(**config: Any) -> tuple[nn.Module, TextEncoder]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
    settings = {
        "vocab_size": 99,
        "hidden_size": 36,
        "intermediate_size": 52,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "max_position_embeddings": 13,
        "projection_dim": 20,
        "hidden_act": "quick_gelu",
        "eos_token_id": 98,
    } | {key: value for key, value in config.items() if key != "with_projection"}
    kind = "CLIPTextModelWithProjection" if config.get("with_projection") else "CLIPTextModel"
    reference = randomised(getattr(transformers, kind)(transformers.CLIPTextConfig(**settings)))
    mine = TextEncoderConfig(**settings, with_projection=config.get("with_projection", False))
    return reference, load_module(TextEncoder, mine, reference.state_dict(), "text encoder")


@pytest.mark.parametrize(
    "config",
    [{}, {"hidden_act": "gelu"}, {"hidden_act": "gelu", "with_projection": True}, {"eos_token_id": 2}],
    ids=["openai", "openclip", "projection", "legacy end token"],
)
def test_text_encoder(config: dict[str, Any]) -> None:
    reference, mine = text_encoder(**config)
    ids = torch.tensor([[97, 5, 9, 98] + [98] * 9, [97] + [7, 11] * 5 + [98, 1], [97, 98] + [0] * 11])
    with torch.no_grad():
        expected = reference(ids, output_hidden_states=True)
        last, pooled, states = mine(ids)
    assert_equal([last, *states], [expected.last_hidden_state, *expected.hidden_states])
    assert_equal([pooled], [expected.text_embeds if config.get("with_projection") else expected.pooler_output])


@pytest.mark.parametrize("eos_token_id", [98, 2])
def test_extra_embeddings_are_a_longer_table(eos_token_id: int) -> None:
    """As textual inversion does it in diffusers, where the embedding table grows; the end token stays where it is."""
    _, mine = text_encoder(eos_token_id=eos_token_id)
    extra = normal(2, 36)
    longer = mine.state_dict()
    name = "text_model.embeddings.token_embedding.weight"
    longer[name] = torch.cat([longer[name], extra])
    config = TextEncoderConfig(**mine.config.to_json() | {"vocab_size": 101, "eos_token_id": 98})
    reference = load_module(TextEncoder, config, longer, "text encoder")
    ids = torch.tensor([[97, 100, 5, 99, 98] + [98] * 8])
    with torch.no_grad():
        expected, got = reference(ids), mine(ids, extra)
    assert_equal([got[0], got[1], *got[2]], [expected[0], expected[1], *expected[2]])


@pytest.mark.parametrize(
    ("build", "values", "message"),
    [
        (UNetConfig, {"norm_num_groups": 7}, "the UNet's norm_num_groups=7 does not divide the channels 320, 640"),
        (AutoencoderConfig, {"norm_num_groups": 7}, "the autoencoder's norm_num_groups=7 does not divide"),
        (UNetConfig, {"attention_head_dim": 7}, "attention_head_dim=7 does not divide the channels 320"),
        (UNetConfig, {"attention_head_dim": [8, 8]}, r"attention_head_dim=\(8, 8\).*4 whole numbers, or one"),
        (UNetConfig, {"layers_per_block": [2]}, r"layers_per_block=\(2,\) is not supported"),
        (UNetConfig, {"transformer_layers_per_block": [1, 1, 1, [2]]}, "transformer_layers_per_block.*whole numbers"),
        (UNetConfig, {"down_block_types": ["AttnDownBlock2D"] * 4}, "'AttnDownBlock2D' is not supported; supported: D"),
        (UNetConfig, {"block_out_channels": [320]}, "4 down blocks, 4 up blocks and 1 channel counts"),
        (UNetConfig, {"addition_embed_type": "image"}, "supported: None, 'text_time'"),
        (UNetConfig, {"addition_embed_type": "text_time"}, "needs projection_class_embeddings_input_dim"),
        (UNetConfig, {"class_embed_type": "timestep"}, "class_embed_type='timestep'.*supported: None"),
        (
            UNetConfig,
            {"new_setting": 1},
            "checkpoint's UNet says new_setting=1, which is not known here and may change",
        ),
        (TextEncoderConfig, {"hidden_act": "relu"}, "hidden_act='relu'.*supported: quick_gelu, gelu"),
        (TextEncoderConfig, {"num_attention_heads": 7}, "num_attention_heads=7 does not divide the channels 512"),
        (TinyAutoencoderConfig, {"act_fn": "gelu"}, "act_fn='gelu'.*supported: 'relu'"),
        (TinyAutoencoderConfig, {"num_decoder_blocks": [1]}, r"num_decoder_blocks=\(1,\); supported: equally many"),
    ],
)
def test_an_architecture_that_is_not_here_is_refused_by_name(build: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=message):
        build.from_json(values)
