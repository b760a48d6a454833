"""Original single files, against diffusers' layout of the same weights and against diffusers' own reading of them."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from calotype.export.checkpoint import Checkpoint
from calotype.export.models.autoencoder import Autoencoder, AutoencoderConfig
from calotype.export.models.clip import TextEncoder, TextEncoderConfig
from calotype.export.models.unet import UNet, UNetConfig
from calotype.export.prediction_type import likeness_to_noise, stated_prediction_type
from calotype.export.single_file import SingleFile
from calotype.export.single_file_configs import Part, unet_config, vae_config
from calotype.export.sources import load_checkpoint
from calotype.export.towers import find_towers
from calotype.export.weights import to_float32
from calotype.runtime.errors import CheckpointError, InputError, UnsupportedArchitectureError
from tests.export.original_layout import original_openclip, original_unet, original_vae

FAMILIES = ("sd1", "sd2", "sdxl")
Maker = Callable[[str], Path]


def modules(checkpoint: Checkpoint) -> dict[str, Any]:
    return dict(checkpoint.components)


def unet_of(source: Path, **options: Any) -> UNet:
    unet = load_checkpoint(source, **options).components["unet"]
    assert isinstance(unet, UNet)
    return unet


def inputs(checkpoint: Checkpoint) -> dict[str, tuple[Tensor, ...]]:
    unet = checkpoint.components["unet"]
    assert isinstance(unet, UNet)
    config = unet.config
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(2, 4, 8, 16, generator=generator), torch.tensor([3.0, 981.0])]
    given.append(torch.randn(2, 5, config.cross_attention_dim, generator=generator))
    if config.addition_embed_type is not None:
        given += [torch.randn(2, 64, generator=generator), torch.tensor([[64.0, 128, 0, 0, 64, 128]] * 2)]
    ids = torch.randint(0, 49406, (2, 77), generator=generator)
    return {"text_encoder": (ids,), "text_encoder_2": (ids,), "unet": tuple(given)}


@pytest.mark.parametrize("family", FAMILIES)
def test_both_layouts_of_the_same_weights_are_one_model(family: str, folder: Maker, single_file: Maker) -> None:
    one, other = load_checkpoint(folder(family)), load_checkpoint(single_file(family))
    assert one.family == other.family == family
    assert modules(one).keys() == modules(other).keys()
    for name, module in modules(one).items():
        mine, theirs = module.state_dict(), modules(other)[name].state_dict()
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), name
    for name, arguments in inputs(one).items():
        if name in modules(one):
            with torch.no_grad():
                expected, got = (modules(checkpoint)[name](*arguments) for checkpoint in (one, other))
            for wanted, given in zip(expected, got, strict=True):
                torch.testing.assert_close(given, wanted, rtol=0, atol=0)
    for name in ("tokenizers", "force_zeros_for_empty_prompt", "vae", "max_clip_skip"):
        assert getattr(one, name) == getattr(other, name)
    assert modules(one)["vae"].config == modules(other)["vae"].config


@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_reads_the_same_weights_from_the_file(family: str, folder: Maker, single_file: Maker) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers

        pipeline = diffusers.StableDiffusionXLPipeline if family == "sdxl" else diffusers.StableDiffusionPipeline
        reference = pipeline.from_single_file(
            str(single_file(family)), config=str(folder(family)), local_files_only=True
        )
    for name, module in modules(load_checkpoint(single_file(family))).items():
        wanted = {
            key.removeprefix("text_model."): value for key, value in getattr(reference, name).state_dict().items()
        }
        wanted.pop("embeddings.position_ids", None)
        got = {key.removeprefix("text_model."): value for key, value in module.state_dict().items()}
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[key], wanted[key]) for key in got), name


REAL_UNETS = {
    "sd1": {"attention_head_dim": 8, "cross_attention_dim": 768},
    "sd1-inpainting": {"attention_head_dim": 8, "cross_attention_dim": 768, "in_channels": 9},
    "sd2": {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True},
    "sdxl": {
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


@pytest.mark.parametrize("name", REAL_UNETS)
def test_settings_of_the_real_unets_follow_from_their_shapes(name: str) -> None:
    """The shapes are diffusers' own; nothing of the real sizes is allocated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
    with torch.device("meta"):
        reference = diffusers.UNet2DConditionModel(**REAL_UNETS[name])
    part = Part("", original_unet(reference.state_dict(), 2))
    config = unet_config(
        part, heads=8 if name.startswith("sd1") else None, pooled_width=1280 if name == "sdxl" else None
    )
    expected = UNetConfig(**REAL_UNETS[name])
    assert (config.heads, config.depths, config.layers) == (expected.heads, expected.depths, expected.layers)
    derived = ("attention_head_dim", "transformer_layers_per_block", "layers_per_block")
    assert {key: value for key, value in config.to_json().items() if key not in derived} == {
        key: value for key, value in expected.to_json().items() if key not in derived
    }
    with torch.device("meta"):
        module = UNet(config)
    assert {key: value.shape for key, value in module.state_dict().items()} == {
        key: value.shape for key, value in reference.state_dict().items()
    }


def test_settings_of_the_real_autoencoder_and_tower_follow_from_their_shapes() -> None:
    with torch.device("meta"):
        vae, wide = Autoencoder(AutoencoderConfig()), {"hidden_act": "gelu", "num_attention_heads": 20}
        wide |= {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "projection_dim": 1280}
        tower = TextEncoder(TextEncoderConfig(**wide, with_projection=True))
    part = Part("", original_vae(vae.state_dict(), 4))
    assert vae_config(part, scaling_factor=0.18215) == AutoencoderConfig()
    (found,) = find_towers(original_openclip(tower.state_dict()))
    assert (found.width, found.layers, found.openclip) == (1280, 32, True)
    assert found.load(hidden_act="gelu", layers=32, with_projection=True).config == tower.config


@pytest.fixture
def changed(single_file: Maker, tmp_path: Path) -> Callable[..., Path]:
    """The file of a family with tensors added, or taken away where they are None, and metadata."""

    def make(family: str, tensors: dict[str, Tensor | None], **metadata: str) -> Path:
        state = load_file(single_file(family))
        for name, tensor in tensors.items():
            if tensor is None:
                del state[name]
            else:
                state[name] = tensor
        path = tmp_path / f"{family}.safetensors"
        save_file(state, path, {name.replace("_", ".", 1): value for name, value in metadata.items()})
        return path

    return make


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "model.diffusion_model.input_blocks.2.0.in_layers.0.bias",
            r"1 missing: input_blocks\.2\.0\.in_layers\.0\.bias",
        ),
        (
            "model.diffusion_model.out.2.weight",
            r"\.safetensors: the file has no model\.diffusion_model\.out\.2\.weight",
        ),
        ("first_stage_model.decoder.mid.attn_1.q.bias", r"1 missing: decoder\.mid\.attn_1\.q\.bias"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", r"1 missing: text_model\.final_layer_norm"),
    ],
)
def test_a_missing_key_is_named_as_the_file_spells_it(changed: Callable[..., Path], name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(changed("sd1", {name: None}))


def test_unexpected_and_mis_shaped_keys_are_listed(changed: Callable[..., Path]) -> None:
    odd = {
        "model.diffusion_model.out.3.weight": torch.ones(1),
        "model.diffusion_model.time_embed.0.bias": torch.ones(7),
    }
    with pytest.raises(
        CheckpointError, match=r"1 unexpected: out\.3\.weight; 1 mis-shaped: time_embed\.0\.bias \(7,\)"
    ):
        load_checkpoint(changed("sd1", odd))
    with pytest.raises(
        CheckpointError, match=r"sd1\.safetensors has 1 unexpected tensors: more; .* take the publisher's own"
    ):
        load_checkpoint(changed("sd1", {"more": torch.ones(1)}))


def test_averaged_weights_are_taken_on_request(single_file: Maker, changed: Callable[..., Path]) -> None:
    prefix = "model.diffusion_model."
    unet = {name: tensor for name, tensor in load_file(single_file("sd1")).items() if name.startswith(prefix)}
    averaged = {"model_ema." + name.removeprefix("model.").replace(".", ""): unet[name] + 1 for name in unet}
    path = changed("sd1", averaged)
    plain, ema = unet_of(path), unet_of(path, ema=True)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor + 1, ema.state_dict()[name])
    with pytest.raises(CheckpointError, match=r"for 0 of the UNet's \d+ tensors; export without --ema"):
        load_checkpoint(single_file("sd1"), ema=True)


def test_averaged_weights_of_a_folder_are_refused(folder: Maker) -> None:
    with pytest.raises(InputError, match="holds one set of weights"):
        load_checkpoint(folder("sd1"), ema=True)


@pytest.mark.parametrize(
    ("family", "tensors", "metadata", "option", "expected"),
    [
        ("sd1", {}, {}, None, "epsilon"),
        ("sd1", {}, {"modelspec_prediction_type": "v"}, None, "v_prediction"),
        ("sd1", {}, {"modelspec_prediction_type": "v_prediction"}, None, "v_prediction"),
        ("sdxl", {}, {"modelspec_prediction_type": "v_prediction"}, None, "v_prediction"),
        ("sd2", {}, {"modelspec_prediction_type": "v_prediction"}, None, "v_prediction"),
        ("sd1", {}, {}, "sample", "sample"),
        ("sdxl", {"v_pred": torch.ones(0)}, {}, None, "v_prediction"),
        ("sdxl", {"v_pred": torch.ones(0)}, {}, "epsilon", "epsilon"),
        ("sd2", {}, {"modelspec_prediction_type": "epsilon"}, None, "epsilon"),
        ("sd2", {}, {}, "epsilon", "epsilon"),
    ],
)
def test_what_the_unet_predicts(
    changed: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    family: str,
    tensors: dict[str, Tensor | None],
    metadata: dict[str, str],
    option: str | None,
    expected: str,
) -> None:
    with caplog.at_level(logging.WARNING, "calotype"):
        scheduler = load_checkpoint(changed(family, tensors, **metadata), prediction_type=option).scheduler
    assert scheduler["prediction_type"] == expected
    # What a family does not usually predict is said in a line, but not what the caller asked for.
    said = option is None and family != "sd2" and expected != "epsilon"
    assert [f"is taken to predict {expected}, by its " in line for line in caplog.messages] == [True] * said


V1 = "model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n    parameterization: {}\n"
SGM = "model: {{params: {{denoiser_config: {{params: {{scaling_config: {{target: sgm.x.denoiser_scaling.{}}}}}}}}}}}\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (V1.format('"v"'), "v_prediction"),
        ("parameterization: v\n", "v_prediction"),
        (V1.format("'eps'"), "epsilon"),
        (V1.format("x0"), "sample"),
        (SGM.format("VScaling"), "v_prediction"),
        (SGM.format("EpsScaling"), "epsilon"),
        (V1.format('"v"').replace("    para", "    # para") + "parameterization: eps\n", "epsilon"),
    ],
)
def test_settings_beside_the_file_say_what_it_predicts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, expected: str
) -> None:
    (tmp_path / "model.yaml").write_text(text)
    file = SingleFile(path=tmp_path / "model.safetensors", state={}, metadata={})
    with caplog.at_level(logging.WARNING, "calotype"):
        assert stated_prediction_type(file, "epsilon") == stated_prediction_type(file, None) == expected
    assert len(caplog.records) == (expected != "epsilon")


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"modelspec.predict_key": "v"}, "v_prediction"),  # as ComfyUI writes it
        ({"modelspec.predict_key": "epsilon"}, "epsilon"),
        ({"modelspec.prediction_type": "V-Prediction"}, "v_prediction"),
        ({"modelspec.prediction_type": " vpred "}, "v_prediction"),
        ({"modelspec.prediction_type": "EPSILON", "modelspec.predict_key": "v"}, "epsilon"),
    ],
)
def test_the_header_says_what_it_predicts_in_every_spelling(metadata: dict[str, str], expected: str) -> None:
    file = SingleFile(path=Path("model.safetensors"), state={}, metadata=metadata)
    assert stated_prediction_type(file, "epsilon") == stated_prediction_type(file, None) == expected


def test_settings_beside_the_file_count_in_a_checkpoint(changed: Callable[..., Path]) -> None:
    path = changed("sd2", {})
    path.with_suffix(".yaml").write_text(V1.format('"v"') + "    rescale_betas_zero_snr: true\n")
    checkpoint = load_checkpoint(path)
    assert (checkpoint.scheduler["prediction_type"], checkpoint.sample_size) == ("v_prediction", 96)
    assert checkpoint.scheduler["rescale_betas_zero_snr"] is True


def test_statements_that_disagree_are_said_and_the_strongest_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "model.yml").write_text("parameterization: eps\n")
    said = {"modelspec.prediction_type": "v"}
    file = SingleFile(path=tmp_path / "model.safetensors", state={}, metadata=said)
    with caplog.at_level(logging.WARNING, "calotype"):
        assert stated_prediction_type(file, "epsilon") == "epsilon"
    assert caplog.messages == [
        "model.safetensors is taken to predict epsilon, by the settings beside it, though its "
        "modelspec.prediction_type says v; --prediction-type sets another"
    ]


def test_a_statement_of_nothing_known_is_an_error_that_the_option_lifts(changed: Callable[..., Path]) -> None:
    path = changed("sd1", {}, modelspec_prediction_type="flow")
    with pytest.raises(
        CheckpointError, match=r"predicts 'flow', which is not known; say .* --prediction-type epsilon or v_"
    ):
        load_checkpoint(path)
    assert load_checkpoint(path, prediction_type="epsilon").scheduler["prediction_type"] == "epsilon"


class Echo(torch.nn.Module):
    """A stand-in that gives back ``share`` of the noise, and a picture that has nothing to do with it."""

    def __init__(self, share: float, in_channels: int = 4) -> None:
        super().__init__()
        self.share, self.config = share, UNetConfig(in_channels=in_channels)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        assert sample.shape == (1, self.config.in_channels, 32, 32)
        assert (float(timestep), tuple(encoder_hidden_states.shape)) == (999.0, (1, 77, 8))
        picture = torch.linspace(-1, 1, 32).expand(1, 4, 32, 32)
        return self.share * sample[:, :4] - (1 - self.share**2) ** 0.5 * picture * 3**0.5


@pytest.mark.parametrize("in_channels", [4, 9])
@pytest.mark.parametrize("share", [0.07, 0.5, 0.998])
def test_the_noise_that_a_unet_gives_back_is_measured(share: float, in_channels: int) -> None:
    echo: Any = Echo(share, in_channels)
    assert likeness_to_noise(echo, torch.zeros(1, 77, 8)) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize(("likeness", "expected", "size"), [(0.98, "epsilon", 64), (0.2, "v_prediction", 96)])
def test_a_stable_diffusion_2_file_that_does_not_say_is_tried(
    single_file: Maker,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    likeness: float,
    expected: str,
    size: int,
) -> None:
    monkeypatch.setattr("calotype.export.families.sd.likeness_to_noise", lambda *_: likeness)
    with caplog.at_level(logging.WARNING, "calotype"):
        checkpoint = load_checkpoint(single_file("sd2"))
    assert (checkpoint.scheduler["prediction_type"], checkpoint.sample_size) == (expected, size)
    assert f"gives back {100 * likeness:.0f}% of pure noise, so it is taken for {expected}" in caplog.text


def test_an_inpainting_file_of_stable_diffusion_2(changed: Callable[..., Path]) -> None:
    nine = {"model.diffusion_model.input_blocks.0.0.weight": torch.ones(64, 9, 3, 3)}
    assert unet_of(changed("sd2", nine)).config.in_channels == 9


def test_the_mark_of_a_schedule_that_ends_in_noise(changed: Callable[..., Path]) -> None:
    marks = {"v_pred": torch.ones(0), "ztsnr": torch.ones(0)}
    assert load_checkpoint(changed("sdxl", marks)).scheduler["rescale_betas_zero_snr"] is True


def test_an_unknown_prediction_type_names_the_valid_ones(single_file: Maker) -> None:
    with pytest.raises(InputError, match="'noise' is not known; valid: epsilon, v_prediction, sample"):
        load_checkpoint(single_file("sd1"), prediction_type="noise")


@pytest.mark.parametrize(
    ("names", "what"),
    [
        (["model.diffusion_model.joint_blocks.0.x"], "Stable Diffusion 3"),
        (["lora_unet_down_blocks_0.lora_up.weight"], "a LoRA"),
        (["control_model.input_blocks.0.0.bias"], "a ControlNet without what reads its picture"),
        (["lora_controlnet", "input_blocks.0.0.down"], "a Control-LoRA"),
        (["lllite_unet_input_blocks_4_1.depth"], "a ControlNet-LLLite"),
        (["difference", "control_model.input_hint_block.0.weight"], "the difference of a ControlNet to a model"),
        (["style_embedding", "ln_post.weight"], "a T2I-Adapter of style"),
        (["decoder.conv_in.weight"], "an autoencoder alone"),
        (["model.diffusion_model.out.0.bias"], "a UNet without its text encoders"),
        (["down_blocks.0.resnets.0.norm1.bias"], "one component in diffusers' layout"),
        (["encoder.layers.0.weight", "decoder.layers.0.weight"], "a tiny autoencoder in diffusers' layout"),
        (["1.weight", "3.conv.0.weight"], r"half of a tiny autoencoder \(TAESD\)"),
    ],
)
def test_another_kind_of_file_is_refused_by_name(tmp_path: Path, names: list[str], what: str) -> None:
    save_file({name: torch.ones(1) for name in names}, tmp_path / "other.safetensors")
    with pytest.raises(
        UnsupportedArchitectureError,
        match=f"holds {what}.*supported: Stable Diffusion 1.x, Stable Diffusion 2.x, Stable Diffusion XL",
    ):
        load_checkpoint(tmp_path / "other.safetensors")


def test_a_file_of_nothing_known_says_what_it_holds(tmp_path: Path) -> None:
    save_file({"a.b": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UnsupportedArchitectureError, match=r"not a checkpoint of a known family.*it has a\.b"):
        load_checkpoint(tmp_path / "other.safetensors")


def test_a_vocabulary_smaller_than_clips_is_refused(changed: Callable[..., Path]) -> None:
    name = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    with pytest.raises(UnsupportedArchitectureError, match="knows 50 tokens; a single file carries no tokenizer"):
        load_checkpoint(changed("sd1", {name: torch.ones(50, 64)}))


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_an_autoencoder_alone(
    folder: Maker, single_file: Maker, tmp_path: Path, caplog: pytest.LogCaptureFixture, prefix: str
) -> None:
    """As ``vae-ft-mse-840000-ema-pruned`` is spelt, and as it lies in a whole checkpoint."""
    state = {
        prefix + name.removeprefix("first_stage_model."): tensor
        for name, tensor in load_file(single_file("sd1")).items()
        if name.startswith("first_stage_model.")
    }
    state[f"{prefix}loss.logvar"] = torch.zeros(())
    torch.save({"state_dict": state}, tmp_path / "vae.ckpt")
    with caplog.at_level(logging.WARNING, "calotype"):
        checkpoint = load_checkpoint(tmp_path / "vae.ckpt")
    assert "vae.ckpt does not say the scale of its latents (0.18215 in Stable Diffusion 1.x and 2.x, 0." in caplog.text
    assert (checkpoint.family, list(checkpoint.components), checkpoint.source["name"]) == ("vae", ["vae"], "vae")
    expected, got = (modules(made)["vae"] for made in (load_checkpoint(folder("sd1")), checkpoint))
    assert got.config == dataclasses.replace(expected.config, scaling_factor=None)
    assert all(torch.equal(tensor, got.state_dict()[name]) for name, tensor in expected.state_dict().items())
    with pytest.raises(InputError, match="is an autoencoder alone, whose averaged weights are not read"):
        load_checkpoint(tmp_path / "vae.ckpt", ema=True)
    torch.save({"state_dict": state | {f"{prefix}decoder.more": torch.ones(1)}}, tmp_path / "vae.ckpt")
    with pytest.raises(CheckpointError, match=r"1 unexpected: decoder\.more"):
        load_checkpoint(tmp_path / "vae.ckpt")


def test_a_file_without_its_autoencoder(single_file: Maker, tmp_path: Path) -> None:
    state = {name: value for name, value in load_file(single_file("sd1")).items() if "first_stage" not in name}
    save_file(state, tmp_path / "pruned.safetensors")
    with pytest.raises(CheckpointError, match=r"pruned\.safetensors has no autoencoder; fetch this model with its"):
        load_checkpoint(tmp_path / "pruned.safetensors")


def test_a_truncated_file(single_file: Maker, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(single_file("sd1").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"cannot be read.*download it again"):
        load_checkpoint(broken)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_a_pickle_of_tensors_is_the_same_model(single_file: Maker, tmp_path: Path, zipped: bool, wrapped: bool) -> None:
    state = load_file(single_file("sd1"))
    saved: Any = {"state_dict": state, "global_step": 840000} if wrapped else state
    torch.save(saved, tmp_path / "small.ckpt", _use_new_zipfile_serialization=zipped)
    one, other = load_checkpoint(single_file("sd1")), load_checkpoint(tmp_path / "small.ckpt")
    for name, module in modules(one).items():
        theirs = modules(other)[name].state_dict()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in module.state_dict().items())


class Canary:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_in_it_is_refused_and_nothing_runs(tmp_path: Path, zipped: bool) -> None:
    canary, path = tmp_path / "canary", tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "callbacks": Canary(canary)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"holds more than tensors, posix\.mkdir, .*safetensors"):
        load_checkpoint(path)
    assert not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists()  # so the canary would have sung


def test_what_trainers_left_beside_the_weights_is_passed_over(
    single_file: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The originals were saved by PyTorch Lightning with its callbacks and numpy's numbers; neither is called."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    checkpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = checkpoint  # type: ignore[attr-defined]
    state = load_file(single_file("sd1"))
    beside = {"callbacks": {checkpoint: {"best_model_score": np.float64(1.5)}}, "instance": checkpoint()}
    with monkeypatch.context() as patched:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
            patched.setitem(sys.modules, name, module)
        torch.save({"state_dict": state, **beside, "epoch": 3}, tmp_path / "small.ckpt")
    unet = unet_of(tmp_path / "small.ckpt")
    assert torch.equal(unet.conv_in.weight, state["model.diffusion_model.input_blocks.0.0.weight"])


def test_a_broken_pickle_is_one_line(tmp_path: Path) -> None:
    whole = tmp_path / "whole.ckpt"
    torch.save({"a": torch.ones(1000)}, whole)
    for content in (b"", b"not a pickle", whole.read_bytes()[:-200]):
        (tmp_path / "broken.ckpt").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"broken\.ckpt") as caught:
            load_checkpoint(tmp_path / "broken.ckpt")
        assert "\n" not in str(caught.value)


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    for source in (tmp_path / "nothing", tmp_path / "model.safetensors", Path("models/model.ckpt")):
        with pytest.raises(CheckpointError, match="does not exist; give a folder in diffusers' layout, a single file"):
            load_checkpoint(source)


def test_half_precision_weights_are_the_same_numbers(single_file: Maker, tmp_path: Path) -> None:
    state = {name: tensor.half() for name, tensor in load_file(single_file("sd1")).items()}
    save_file(state, tmp_path / "half.safetensors")
    unet = unet_of(tmp_path / "half.safetensors")
    to_float32(unet)
    got = unet.conv_in.weight
    np.testing.assert_array_equal(
        got.detach().numpy(), state["model.diffusion_model.input_blocks.0.0.weight"].float().numpy()
    )


def test_text_towers_of_old_files_have_no_text_model_in_their_names(single_file: Maker, tmp_path: Path) -> None:
    state = load_file(single_file("sd1"))
    tower = "cond_stage_model.transformer."
    old = {name.replace(f"{tower}text_model.", tower): tensor for name, tensor in state.items()}
    save_file(old, tmp_path / "old.safetensors")
    one, other = (
        load_checkpoint(path).components["text_encoder"] for path in (single_file("sd1"), tmp_path / "old.safetensors")
    )
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
