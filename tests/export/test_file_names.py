"""The names that converters give to the text encoders of one file, each against the folder of the same weights."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file as load_tensors
from torch import Tensor

from calotype.export.checkpoint import Checkpoint
from calotype.export.families import families, sdxl
from calotype.export.models.clip import TextEncoder, TextEncoderConfig
from calotype.export.single_file import SingleFile
from calotype.export.sources import load_checkpoint, load_file
from calotype.export.towers import find_towers
from calotype.runtime.errors import CheckpointError, UnsupportedArchitectureError
from tests.export.original_layout import original_openclip, prefixed

Maker = Callable[[str], Path]
State = dict[str, Tensor]
Rewriter = Callable[..., SingleFile]
TOWERS = ("cond_stage_model.", "conditioner.")


def tower(folder: Path, name: str = "text_encoder") -> State:
    """A text encoder's weights as transformers spells them on disk."""
    state = stored(folder / name / "model.safetensors")
    return {
        key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}": value
        for key, value in state.items()
    }


def with_unread_layer(state: State) -> State:
    """One layer more, which nothing reads."""
    return state | {
        name.replace("layers.2.", "layers.3."): tensor + 1 for name, tensor in state.items() if "layers.2." in name
    }


@pytest.fixture(scope="module")
def rewritten(single_file: Maker) -> Rewriter:
    """A family's file with other text encoders, as if it were read from a disk."""

    def make(family: str, **towers: State) -> SingleFile:
        state = {name: tensor for name, tensor in stored(single_file(family)).items() if not name.startswith(TOWERS)}
        for prefix, tower in towers.items():
            state |= prefixed(prefix, tower)
        metadata = {"modelspec.prediction_type": "epsilon"} if family == "sd2" else {}
        return SingleFile(path=Path("rewritten.safetensors"), state=state, metadata=metadata)

    return make


@functools.cache
def stored(path: Path) -> State:
    return load_tensors(path)


@functools.cache
def from_folder(folder: Path) -> Checkpoint:
    return load_checkpoint(folder)


def assert_same(got: SingleFile, family: str, folder: Path) -> None:
    """Every component has the bits of the folder's."""
    one, other = from_folder(folder), load_file(got)
    assert (other.family, one.components.keys()) == (family, other.components.keys())
    assert one.tokenizers == other.tokenizers and one.max_clip_skip == other.max_clip_skip
    for name, module in one.components.items():
        mine, theirs = module.state_dict(), other.components[name].state_dict()
        assert list(mine) == list(theirs), name
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items()), name


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_the_last_text_encoder_of_a_file_computes_what_transformers_does(
    rewritten: Rewriter, folder: Maker, family: str
) -> None:
    name = "text_encoder_2" if family == "sdxl" else "text_encoder"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        kinds = (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)
        reference = kinds[family == "sdxl"].from_pretrained(folder(family) / name).eval()
    last_tower = original_openclip(tower(folder(family), name))
    first = {"te1.": tower(folder(family))} if family == "sdxl" else {}
    encoder: Any = load_file(rewritten(family, **first, **{"te2.": last_tower})).components[name]
    ids = torch.randint(0, 49406, (2, 77), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 49407
    with torch.no_grad():
        last, pooled, _ = encoder(ids)
        expected = reference(ids)
    torch.testing.assert_close(last, expected.last_hidden_state, rtol=0, atol=1e-5)
    if family == "sdxl":
        torch.testing.assert_close(pooled, expected.text_embeds, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("prefix", "openclip"),
    [("conditioner.embedders.0.transformer.", False), ("text_encoders.clip_l.transformer.", False), ("te.", True)],
)
def test_the_text_encoder_of_stable_diffusion_1(
    rewritten: Rewriter, folder: Maker, prefix: str, openclip: bool
) -> None:
    state = tower(folder("sd1"))
    projected = {"text_projection.weight": torch.ones(64, 64)}
    path = rewritten("sd1", **{prefix: (original_openclip(state) if openclip else state) | projected})
    assert_same(path, "sd1", folder("sd1"))


@pytest.mark.parametrize("unread", [True, False])
@pytest.mark.parametrize(
    ("prefix", "openclip"),
    [
        ("cond_stage_model.model.", True),
        ("conditioner.embedders.0.model.", True),  # SD-Turbo's own file
        ("conditioner.embedders.0.transformer.", False),
        ("text_encoders.clip_h.transformer.", False),
    ],
)
def test_the_text_encoder_of_stable_diffusion_2(
    rewritten: Rewriter,
    folder: Maker,
    caplog: pytest.LogCaptureFixture,
    prefix: str,
    openclip: bool,
    unread: bool,
) -> None:
    state = tower(folder("sd2"))
    if unread:
        state = with_unread_layer(state) | {"text_projection.weight": torch.ones(64, 64)}
    path = rewritten("sd2", **{prefix: original_openclip(state) if openclip else state})
    with caplog.at_level(logging.WARNING, "calotype"):
        assert_same(path, "sd2", folder("sd2"))
    assert not caplog.records


def test_a_last_layer_that_may_be_read_or_not_is_said(
    rewritten: Rewriter, folder: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    state = tower(folder("sd2"))
    cases: list[tuple[State, str]] = [
        (with_unread_layer(state), "the last of its text encoder's 4 layers; it is exported as if it does not"),
        (
            state | {"logit_scale": torch.ones(())},
            "the last of its text encoder's 3 layers; it is exported as if it does",
        ),
    ]
    for tensors, line in cases:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "calotype"):
            assert_same(rewritten("sd2", **{"cond_stage_model.transformer.": tensors}), "sd2", folder("sd2"))
        assert line in caplog.text


@pytest.mark.parametrize(
    ("first", "second", "layer", "openclip"),
    [
        ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.transformer.", True, False),
        ("conditioner.embedders.0.transformer.", "conditioner.embedders.1.model.", True, True),
        ("text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer.", False, False),
        ("conditioner.embedders.1.model.", "conditioner.embedders.0.model.", False, True),
    ],
)
def test_the_text_encoders_of_sdxl(
    rewritten: Rewriter, folder: Maker, first: str, second: str, layer: bool, openclip: bool
) -> None:
    """The projection is a parameter, multiplied with from the right, or a layer, multiplied with from the left."""
    wide = tower(folder("sdxl"), "text_encoder_2")
    projection = wide.pop("text_projection.weight")
    wide = original_openclip(wide) if openclip else wide
    wide |= {"text_projection.weight": projection} if layer else {"text_projection": projection.T}
    path = rewritten("sdxl", **{first: tower(folder("sdxl")) | {"logit_scale": torch.ones(())}, second: wide})
    assert_same(path, "sdxl", folder("sdxl"))


def test_a_projection_beside_the_tower_and_clips_other_half(rewritten: Rewriter, folder: Maker) -> None:
    first, second = "conditioner.embedders.0.", "conditioner.embedders.1."
    wide = tower(folder("sdxl"), "text_encoder_2")
    projection = {"text_projection": wide.pop("text_projection.weight").T, "logit_scale": torch.ones(())}
    path = rewritten(
        "sdxl",
        **{
            f"{first}transformer.": tower(folder("sdxl")) | {"vision_model.post_layernorm.bias": torch.ones(3)},
            first: {"logit_scale": torch.ones(()), "text_projection": torch.ones(64, 64)},
            f"{second}model.": original_openclip(wide) | {"visual.proj": torch.ones(3, 3)},
            second: projection,
        },
    )
    assert_same(path, "sdxl", folder("sdxl"))


@pytest.mark.parametrize("unread", [True, False])
def test_the_first_text_encoder_of_sdxl_with_or_without_its_unread_layer(
    rewritten: Rewriter, folder: Maker, monkeypatch: pytest.MonkeyPatch, unread: bool
) -> None:
    """Either way the UNet is given what diffusers gives it: the last but one of all hidden states that there were."""
    monkeypatch.setattr(sdxl, "WIDTHS", (64, 128))
    whole = with_unread_layer(tower(folder("sdxl")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        settings = transformers.CLIPTextConfig.from_pretrained(folder("sdxl") / "text_encoder", num_hidden_layers=4)
        reference = transformers.CLIPTextModel(settings).eval()
        names = reference.state_dict().keys()
        reference.load_state_dict({name: whole[name if name in whole else f"text_model.{name}"] for name in names})
    second = with_unread_layer(tower(folder("sdxl"), "text_encoder_2"))
    checkpoint = load_file(rewritten("sdxl", **{"te1.": whole if unread else tower(folder("sdxl")), "te2.": second}))
    plan = checkpoint.graphs[0]
    ids = torch.randint(0, 49406, (2, 77), generator=torch.Generator().manual_seed(1))
    for skip in (0, 1):
        with torch.no_grad():
            got = plan.module(ids, torch.tensor([skip]), torch.zeros(1, 64))
            expected = reference(ids, output_hidden_states=True).hidden_states[-(skip + 2)]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert checkpoint.max_clip_skip == plan.max_clip_skip == 3
    with pytest.raises(CheckpointError, match=r"under te2\. has 3 layers; the one after .* the publisher's own"):
        load_file(rewritten("sdxl", **{"te1.": whole, "te2.": tower(folder("sdxl"), "text_encoder_2")}))


@pytest.mark.parametrize(
    ("width", "layers", "unread"), [(768, 12, 1), (768, 11, 0), (1280, 32, 1), (64, 3, 1), (1280, 31, None)]
)
def test_which_layers_of_the_published_text_encoders_of_sdxl_are_unread(
    width: int, layers: int, unread: int | None
) -> None:
    with torch.device("meta"):
        made = TextEncoder(TextEncoderConfig(hidden_size=width, num_hidden_layers=layers, with_projection=width > 768))
    (found,) = find_towers(prefixed("te.", made.state_dict()))
    reader = sdxl.SDXL.readers[width > 768]
    if unread is None:
        with pytest.raises(CheckpointError, match=r"under te\. has 31 layers"):
            sdxl.SDXL.layers_unread(found, reader)
    else:
        assert sdxl.SDXL.layers_unread(found, reader) == unread


def test_a_second_text_encoder_without_its_projection(rewritten: Rewriter, folder: Maker) -> None:
    wide = tower(folder("sdxl"), "text_encoder_2")
    del wide["text_projection.weight"]
    path = rewritten("sdxl", **{"te1.": tower(folder("sdxl")), "te2.": wide})
    with pytest.raises(CheckpointError, match=r"the text encoder under te2\. has no text_projection"):
        load_file(path)


def test_a_text_encoder_of_another_model(rewritten: Rewriter, folder: Maker) -> None:
    wide = tower(folder("sdxl"), "text_encoder_2")
    with pytest.raises(CheckpointError, match=r"of width 64, the text encoders give 128; .* different models"):
        load_file(rewritten("sd1", **{"cond_stage_model.transformer.": wide}))


def test_a_unet_with_too_few_or_too_many_text_encoders(rewritten: Rewriter, folder: Maker) -> None:
    state = tower(folder("sd1"))
    for towers, count in (
        ({}, r"reads 1, the file has 0 \(none\)"),
        ({"a.": state, "b.": state}, r"has 2 \(a\., b\.\)"),
    ):
        with pytest.raises(CheckpointError, match=f"Stable Diffusion 1.x without its text encoders: .*{count}"):
            load_file(rewritten("sd1", **towers))
    with pytest.raises(CheckpointError, match=r"Stable Diffusion XL without .* reads 2, the file has 1 \(a\.\)"):
        load_file(rewritten("sdxl", **{"a.": tower(folder("sdxl"))}))


def test_a_tensor_beside_a_tower_that_is_no_known_stray(rewritten: Rewriter, folder: Maker) -> None:
    more = {"cond_stage_model.": {"more": torch.ones(1)}, "cond_stage_model.transformer.": tower(folder("sd1"))}
    with pytest.raises(CheckpointError, match=r"1 unexpected tensors: cond_stage_model\.more"):
        load_file(rewritten("sd1", **more))


@pytest.mark.parametrize(("context", "family"), [(768, "sd1"), (1024, "sd2")])
def test_the_width_of_a_published_model_decides_before_the_projections(
    single_file: Maker, context: int, family: str
) -> None:
    """A linear projection and a convolution of one pixel are the same; converters have written both."""
    for other in ("sd1", "sd2"):
        state = {
            name: torch.ones(tensor.shape[0], context) if re.search(r"attn2\.to_[kv]\.weight", name) else tensor
            for name, tensor in stored(single_file(other)).items()
        }
        file = SingleFile(path=Path("file.safetensors"), state=state, metadata={})
        assert [known.name for known in families() if known.has_file(file)] == [family]


def test_the_refiner_is_one_text_encoder_as_wide_as_the_context(rewritten: Rewriter, folder: Maker) -> None:
    wide = tower(folder("sdxl"), "text_encoder_2")
    file = rewritten("sdxl", **{"conditioner.embedders.0.model.": original_openclip(wide)})
    narrow = {
        name: tensor[:, :128] if re.search(r"attn2\.to_[kv]\.weight", name) else tensor
        for name, tensor in file.state.items()
    }
    with pytest.raises(UnsupportedArchitectureError, match="holds the SDXL refiner"):
        load_file(dataclasses.replace(file, state=narrow))
