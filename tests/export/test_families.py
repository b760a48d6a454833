"""A family that is defined here alone: what is to be written to add one, and nothing else."""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from calotype.export.bundle import export_checkpoint
from calotype.export.checkpoint import Checkpoint
from calotype.export.families import FAMILIES, families
from calotype.export.folder import Folder
from calotype.export.graphs import GraphPlan, float_spec, vae_plans, vae_spec
from calotype.export.models.tiny_autoencoder import TinyAutoencoder, TinyAutoencoderConfig
from calotype.export.single_file import SingleFile
from calotype.export.sources import load_checkpoint
from calotype.export.weights import load_module
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.errors import UnsupportedArchitectureError
from tests.export.conftest import write_json


class Denoiser(nn.Module):
    """One linear layer over the channels, and what the prompt adds to it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pixels, self.prompt = nn.Linear(4, 4), nn.Linear(width, 4)

    def forward(self, sample: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
        # (B, 4, H, W), (B,), (B, D) -> (B, 4, H, W)
        moved = self.pixels(sample.movedim(1, -1)) * (timestep / 1000)[:, None, None, None]
        out: Tensor = (moved + self.prompt(prompt_embeds)[:, None, None]).movedim(-1, 1)
        return out


class DenoiserGraph(nn.Module):
    def __init__(self, model: Denoiser) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor, prompt_embeds: Tensor) -> Tensor:
        out: Tensor = self.model(sample, timestep, prompt_embeds)
        return out


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyFamily:
    name: str = "toy"
    known_as: str = "the toy"
    pipelines: tuple[str, ...] = ("ToyPipeline",)
    folders: tuple[str, ...] = ("transformer",)

    def has_folder(self, folder: Folder) -> bool:
        return not folder.alone

    def load_folder(self, folder: Folder) -> Checkpoint:
        width = folder.config("transformer", ("ToyTransformer",))["width"]
        state = folder.weights("transformer", "diffusion_pytorch_model")
        return self._checkpoint(load_module(Denoiser, width, state, "transformer"), folder)

    def has_file(self, file: SingleFile) -> bool:
        return "toy.prompt.weight" in file.state

    def load_file(self, file: SingleFile) -> Checkpoint:
        state = {name.removeprefix("toy."): tensor for name, tensor in file.state.items()}
        return self._checkpoint(load_module(Denoiser, state["prompt.weight"].shape[1], state, "transformer"), file)

    def _checkpoint(self, denoiser: Denoiser, source: Folder | SingleFile) -> Checkpoint:
        vae = TinyAutoencoder(
            TinyAutoencoderConfig(
                encoder_block_out_channels=(8, 8),
                decoder_block_out_channels=(8, 8),
                num_encoder_blocks=(1, 1),
                num_decoder_blocks=(1, 1),
            )
        ).eval()
        sample = ("rows", 4, "height", "width")
        plan = GraphPlan(
            network="transformer",
            component="transformer",
            module=DenoiserGraph(denoiser),
            inputs=(
                float_spec("sample", *sample),
                float_spec("timestep", "rows"),
                float_spec("prompt_embeds", "rows", denoiser.prompt.in_features),
            ),
            outputs=(float_spec("noise_pred", *sample),),
        )
        return Checkpoint(
            family=self.name,
            components={"transformer": denoiser, "vae": vae},
            graphs=(plan, *vae_plans(vae)),
            scheduler={"_class_name": "ToyScheduler"},
            vae=vae_spec(vae),
            sample_size=16,
            card=source.card,
            source=source.source,
        )


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    """Register the family: one line in the table, and a module for it to name."""
    module = types.ModuleType("toy_family")
    module.TOY = ToyFamily()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_family", module)
    monkeypatch.setitem(FAMILIES, "toy", "toy_family:TOY")
    return "toy"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Its checkpoint in diffusers' layout."""
    torch.manual_seed(0)
    write_json(tmp_path / "toy" / "model_index.json", {"_class_name": "ToyPipeline"})
    write_json(tmp_path / "toy" / "transformer" / "config.json", {"_class_name": "ToyTransformer", "width": 6})
    save_file(Denoiser(6).state_dict(), tmp_path / "toy" / "transformer" / "diffusion_pytorch_model.safetensors")
    return tmp_path / "toy"


def test_every_family_has_the_name_that_it_is_found_by() -> None:
    assert [family.name for family in families()] == list(FAMILIES)


def test_a_family_is_one_file_and_one_line(toy: str, source: Path, tmp_path: Path) -> None:
    manifest = export_checkpoint(source, tmp_path / "bundle", precision="fp32")
    assert Bundle.open(tmp_path / "bundle").manifest == manifest
    assert (manifest.family, list(manifest.networks)) == (toy, ["transformer", "vae_decoder", "vae_encoder"])
    assert (manifest.defaults.height, manifest.scheduler, manifest.tokenizers) == (
        32,
        {"_class_name": "ToyScheduler"},
        {},
    )
    assert manifest.parity["transformer"]["float32"]["max_relative"] <= 1e-4


def test_it_is_recognised_in_a_file_too(toy: str, tmp_path: Path) -> None:
    save_file({f"toy.{name}": tensor for name, tensor in Denoiser(6).state_dict().items()}, tmp_path / "t.safetensors")
    assert load_checkpoint(tmp_path / "t.safetensors").family == toy


def test_without_its_line_it_is_unknown(source: Path) -> None:
    with pytest.raises(
        UnsupportedArchitectureError, match=r"holds a ToyPipeline, .* supported: StableDiffusionPipeline"
    ):
        load_checkpoint(source)
