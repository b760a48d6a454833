"""More tiny checkpoints of random weights, made from the first one's parts, and their bundles."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calotype.export.bundle import export_checkpoint
from tests.controlnets import write_controlnet
from tests.ip_adapters import ip_adapter, layers_of, write_image_encoder, write_ip_adapter
from tests.kept import Kept
from tests.t2i_adapters import write_adapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A checkpoint in diffusers' layout and the bundle made from it."""

    checkpoint: Path
    bundle: Path


class FinishedError(BaseException):
    """Ends an export where it has what is wanted of it."""


@pytest.fixture(scope="session")
def finished_vae(kept: Kept, tiny_checkpoint: Path) -> Path:
    """An export that goes on from here has the autoencoder, which all these models share."""

    def stop(_: str, what: str, __: float) -> None:
        if what == "done":
            raise FinishedError

    def write(folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import diffusers
            import torch

            vae = diffusers.AutoencoderKL.from_pretrained(tiny_checkpoint, subfolder="vae")
            vae.to(torch.float16).save_pretrained(folder / "checkpoint")
            with contextlib.suppress(FinishedError):
                export_checkpoint(folder / "checkpoint", folder / "bundle", precision="fp32", progress=stop)

    return kept("vae", write) / ".bundle.partial"


def save(kept: Kept, vae: Path, name: str, make: Callable[[dict[str, Any]], Any], base: Path) -> Model:
    """``make`` a pipeline from the components of the checkpoint ``base``; write it in float16, export it in float32.

    The two are equal, and an export in float32 takes half the time; less where ``vae`` is that of the checkpoint.
    """

    def write(folder: Path) -> None:
        checkpoint = folder / "checkpoint"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import diffusers
            import torch

            torch.manual_seed(0)
            pipeline = make(diffusers.StableDiffusionPipeline.from_pretrained(base).components)
            pipeline.to(torch.float16).save_pretrained(checkpoint)
            for tokenizer in checkpoint.glob("tokenizer*"):
                for file in ("vocab.json", "merges.txt"):
                    shutil.copyfile(base / "tokenizer" / file, tokenizer / file)
            shutil.copytree(vae, folder / ".bundle.partial")
            export_checkpoint(checkpoint, folder / "bundle", precision="fp32")

    folder = kept(name, write)
    return Model(checkpoint=folder / "checkpoint", bundle=folder / "bundle")


def unet(**settings: Any) -> Any:
    """Two levels, cross-attention in the first."""
    import diffusers

    usual = {
        "sample_size": 16,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": 32,
    }
    return diffusers.UNet2DConditionModel(**{**usual, **settings})


@pytest.fixture(scope="session")
def sd2_inpainting(kept: Kept, finished_vae: Path, tiny_checkpoint: Path) -> Model:
    """Stable Diffusion 2 for inpainting: OpenCLIP's activation, linear projections, v-prediction, nine channels."""

    def make(parts: dict[str, Any]) -> Any:
        import diffusers
        import transformers

        text = {**parts["text_encoder"].config.to_dict(), "hidden_act": "gelu"}
        parts["text_encoder"] = transformers.CLIPTextModel(transformers.CLIPTextConfig(**text))
        parts["unet"] = unet(in_channels=9, use_linear_projection=True, attention_head_dim=(2, 4))
        parts["scheduler"] = diffusers.DDIMScheduler.from_config(
            parts["scheduler"].config, prediction_type="v_prediction"
        )
        return diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)

    return save(kept, finished_vae, "sd2_inpainting", make, tiny_checkpoint)


@pytest.fixture(scope="session")
def lcm(kept: Kept, finished_vae: Path, tiny_checkpoint: Path) -> Model:
    """A latent consistency model: the guidance scale is an input of the UNet."""

    def make(parts: dict[str, Any]) -> Any:
        import diffusers

        parts["unet"] = unet(time_cond_proj_dim=24)
        parts["scheduler"] = diffusers.LCMScheduler()
        return diffusers.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)

    return save(kept, finished_vae, "lcm", make, tiny_checkpoint)


@pytest.fixture(scope="session")
def sdxl(kept: Kept, finished_vae: Path, tiny_checkpoint: Path) -> Model:
    """SDXL: two text encoders, the second's tokenizer padding with "!", pooled embedding and sizes as inputs."""
    return save_sdxl(kept, finished_vae, "sdxl", "StableDiffusionXLPipeline", 4, tiny_checkpoint)


@pytest.fixture(scope="session")
def sdxl_inpainting(kept: Kept, finished_vae: Path, tiny_checkpoint: Path) -> Model:
    """SDXL for inpainting, with nine channels."""
    return save_sdxl(kept, finished_vae, "sdxl_inpainting", "StableDiffusionXLInpaintPipeline", 9, tiny_checkpoint)


def save_sdxl(kept: Kept, vae: Path, name: str, class_name: str, in_channels: int, base: Path) -> Model:
    """A checkpoint of that pipeline whose UNet reads so many channels."""

    def make(parts: dict[str, Any]) -> Any:
        import diffusers
        import transformers

        second = {**parts["text_encoder"].config.to_dict(), "hidden_act": "gelu", "hidden_size": 24}
        second |= {"intermediate_size": 40, "num_attention_heads": 3, "projection_dim": 16}
        return getattr(diffusers, class_name)(
            vae=parts["vae"],
            text_encoder=parts["text_encoder"],
            text_encoder_2=transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**second)),
            tokenizer=parts["tokenizer"],
            tokenizer_2=parts["tokenizer"].from_pretrained(base / "tokenizer", pad_token="!"),
            unet=unet(
                in_channels=in_channels,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                attention_head_dim=(2, 4),
                transformer_layers_per_block=(1, 2),
                cross_attention_dim=32 + 24,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=16 + 6 * 8,
            ),
            scheduler=diffusers.EulerDiscreteScheduler(
                beta_schedule="scaled_linear",
                beta_start=0.00085,
                beta_end=0.012,
                timestep_spacing="leading",
                steps_offset=1,
            ),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )

    return save(kept, vae, name, make, base)


SMALL_CONTROLNET = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
    "conditioning_embedding_out_channels": (4, 8),
}


SDXL_CONTROLNET = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "attention_head_dim": (2, 4),
    "transformer_layers_per_block": (1, 2),
    "cross_attention_dim": 32 + 24,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 16 + 6 * 8,
}


@pytest.fixture(scope="session")
def controlnets(kept: Kept) -> tuple[Model, ...]:
    """Two ControlNets of the tiny model, and one whose residuals hold for every pixel."""
    changes: tuple[dict[str, Any], ...] = ({}, {}, {"global_pool_conditions": True})
    return tuple(
        save_controlnet(kept, f"controlnet{seed}", seed, {**SMALL_CONTROLNET, **change})
        for seed, change in enumerate(changes)
    )


@pytest.fixture(scope="session")
def sdxl_controlnet(kept: Kept) -> Model:
    """A ControlNet of the tiny SDXL."""
    return save_controlnet(kept, "sdxl_controlnet", 3, {**SMALL_CONTROLNET, **SDXL_CONTROLNET})


@pytest.fixture(scope="session")
def sd2_controlnet(kept: Kept) -> Model:
    """A ControlNet of the tiny Stable Diffusion 2."""
    change = {"use_linear_projection": True, "attention_head_dim": (2, 4)}
    return save_controlnet(kept, "sd2_controlnet", 5, {**SMALL_CONTROLNET, **change})


@pytest.fixture(scope="session")
def sdxl_union(kept: Kept) -> Model:
    """A ControlNet of the tiny SDXL for six kinds of pictures."""
    union = {"union": True, "num_trans_channel": 32, "num_proj_channel": 32, "num_trans_head": 4}
    return save_controlnet(kept, "sdxl_union", 4, {**SMALL_CONTROLNET, **SDXL_CONTROLNET, **union})


@pytest.fixture(scope="session")
def adapters(kept: Kept) -> tuple[Model, ...]:
    """Two T2I-Adapters of the tiny model, one of them for greys."""
    usual: dict[str, Any] = {"channels": [32, 64], "downscale_factor": 2}
    settings = ({**usual, "in_channels": 1}, usual)
    return tuple(save_control(kept, f"adapter{seed}", write_adapter, seed, own) for seed, own in enumerate(settings))


@pytest.fixture(scope="session")
def sdxl_adapter(kept: Kept) -> Model:
    """A T2I-Adapter of the tiny SDXL."""
    settings = {"channels": [32, 64], "downscale_factor": 4, "adapter_type": "full_adapter_xl"}
    return save_control(kept, "sdxl_adapter", write_adapter, 2, settings)


def save_controlnet(kept: Kept, name: str, seed: int, settings: dict[str, Any]) -> Model:
    """A checkpoint of a ControlNet whose zero convolutions have values, and its bundle in float32."""
    return save_control(kept, name, write_controlnet, seed, settings)


def save_control(kept: Kept, name: str, make: Callable[..., Path], seed: int, settings: dict[str, Any]) -> Model:
    """What ``make`` writes of those settings, and its bundle in float32."""

    def write(folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make(folder / "checkpoint", seed, **settings)
            export_checkpoint(folder / "checkpoint", folder / "bundle", precision="fp32")

    folder = kept(name, write)
    return Model(checkpoint=folder / "checkpoint", bundle=folder / "bundle")


@pytest.fixture(scope="session")
def ip_adapters(kept: Kept, tiny_checkpoint: Path) -> dict[str, Model]:
    """IP-Adapters of the tiny model, one of each kind, by that: their files and bundles."""
    return {
        kind: save_ip_adapter(kept, f"ip_adapter_{kind}", seed, kind, tiny_checkpoint)
        for seed, kind in enumerate(("plain", "plus", "full"))
    }


@pytest.fixture(scope="session")
def sdxl_ip_adapters(kept: Kept, sdxl: Model) -> dict[str, Model]:
    """The same of the tiny SDXL, without a full one, which nobody published."""
    return {
        kind: save_ip_adapter(kept, f"sdxl_ip_adapter_{kind}", seed, kind, sdxl.checkpoint)
        for seed, kind in enumerate(("plain", "plus"))
    }


def save_ip_adapter(kept: Kept, name: str, seed: int, kind: str, base: Path) -> Model:
    """A file of an IP-Adapter for the UNet of the checkpoint ``base``, the image encoder beside it, and its bundle."""

    def write(folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import diffusers

            model = diffusers.UNet2DConditionModel.from_pretrained(base, subfolder="unet")
            state = ip_adapter(seed, kind, layers_of(model), model.config.cross_attention_dim)
            write_image_encoder(folder / "image_encoder", 7)
            path = write_ip_adapter(folder / f"{name}.safetensors", state)
            export_checkpoint(path, folder / "bundle", precision="fp32")

    folder = kept(name, write)
    return Model(checkpoint=folder / f"{name}.safetensors", bundle=folder / "bundle")
