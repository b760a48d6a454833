"""Profiles: reading them, and the shapes they mean for a graph."""

from __future__ import annotations

import pytest

from calotype.engine.profiles import Profile, Range, check_profiles, default_profile, network_shapes
from calotype.runtime.bundle.manifest import Defaults, FileRecord, Manifest, TokenizerSpec, VaeSpec
from calotype.runtime.bundle.spec import ModelSpec, TensorSpec
from calotype.runtime.errors import InputError


def tensor(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)


def network(*inputs: TensorSpec) -> ModelSpec:
    return ModelSpec(inputs=inputs, outputs=(), graphs={}, weights=())


UNET = network(tensor("sample", "rows", 4, "height", "width"), tensor("encoder_hidden_states", "rows", "tokens", 768))
IMAGE = network(tensor("image", "batch", 3, "8*height", "8*width"))
NO_FILE = FileRecord(size=0, sha256="0" * 64)


@pytest.fixture
def manifest() -> Manifest:
    return Manifest(
        name="m",
        family="sd1",
        precision="fp16",
        networks={},
        tokenizers={"tokenizer": TokenizerSpec(vocab="v", merges="m")},
        scheduler={},
        vae=VaeSpec(scaling_factor=0.18215),
        defaults=Defaults(height=512, width=768),
        files={"v": NO_FILE, "m": NO_FILE},
    )


def profile(batch: str, height: str = "512", width: str = "512", name: str = "p") -> Profile:
    return Profile(name=name, batch=Range.parse(batch), height=Range.parse(height), width=Range.parse(width))


def test_a_range_is_one_size_or_three() -> None:
    assert Range.parse("512") == Range(min=512, opt=512, max=512)
    assert Range.parse("1:2:8") == Range(min=1, opt=2, max=8)


@pytest.mark.parametrize("text", ["", "1:2", "1:2:3:4", "a", "-1", "1.5", "1::2", "²"])
def test_other_text_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="valid: SIZE or MIN:OPT:MAX"):
        Range.parse(text)


@pytest.mark.parametrize("text", ["0", "3:2:1", "1:4:2"])
def test_a_range_rises(text: str) -> None:
    with pytest.raises(InputError, match="does not rise"):
        Range.parse(text)


def test_pixels_become_latents(manifest: Manifest) -> None:
    shapes = network_shapes(profile("1:2:8", "512:512:1024", "256"), UNET, manifest)
    assert shapes["sample"] == ((1, 4, 64, 32), (2, 4, 64, 32), (8, 4, 128, 32))
    assert shapes["encoder_hidden_states"] == ((1, 77, 768), (2, 77, 768), (8, 308, 768))
    shapes = network_shapes(profile("1:2:8", "512:512:1024", "256"), IMAGE, manifest)
    assert shapes["image"] == ((1, 3, 512, 256), (1, 3, 512, 256), (1, 3, 1024, 256))


def test_a_prompt_is_encoded_alone_with_or_without_extra_embeddings(manifest: Manifest) -> None:
    text = network(tensor("input_ids", "batch", 77), tensor("extra_embeddings", "extra", 768))
    shapes = network_shapes(profile("1:2:8"), text, manifest)
    assert shapes["input_ids"] == ((1, 77), (1, 77), (1, 77))
    assert shapes["extra_embeddings"] == ((1, 768), (1, 768), (64, 768))


def test_a_profile_in_one_word(manifest: Manifest) -> None:
    base = default_profile(manifest)
    read = Profile.parse("portrait,height=768,width=512", base)
    assert (read.name, str(read.batch), str(read.height), str(read.width)) == (
        "portrait",
        "1:2:8",
        "768:768:768",
        "512:512:512",
    )


@pytest.mark.parametrize("text", ["", ",height=8", "p,depth=8", "p,height", "p,height=8,height=16", "p,height=x"])
def test_a_profile_that_cannot_be_read(manifest: Manifest, text: str) -> None:
    with pytest.raises(InputError, match="valid: "):
        Profile.parse(text, default_profile(manifest))


def test_a_static_profile_has_one_shape(manifest: Manifest) -> None:
    for spec in (UNET, IMAGE):
        for least, best, most in network_shapes(default_profile(manifest, static=True), spec, manifest).values():
            assert least == best == most


def test_the_default_is_around_the_models_own_size(manifest: Manifest) -> None:
    chosen = default_profile(manifest)
    assert (str(chosen.batch), str(chosen.height), str(chosen.width)) == ("1:2:8", "256:512:768", "384:768:1152")


def test_a_size_that_is_no_multiple_names_the_nearest(manifest: Manifest) -> None:
    with pytest.raises(InputError, match="height=500 is not a multiple of 8; the nearest that is: 496"):
        network_shapes(profile("1", "500"), UNET, manifest)


def test_an_unknown_symbol_is_named(manifest: Manifest) -> None:
    with pytest.raises(InputError, match="depends on frames"):
        network_shapes(profile("1"), network(tensor("video", "frames")), manifest)


def test_profiles_that_do_not_fit_each_other() -> None:
    with pytest.raises(InputError, match="two profiles are named 'p'"):
        check_profiles([profile("1"), profile("2")])
    with pytest.raises(InputError, match="'p' and 'q' are the same"):
        check_profiles([profile("1"), profile("1", name="q")])
    with pytest.raises(InputError, match="at least one"):
        check_profiles([])
    check_profiles([profile("1"), profile("2", name="q")])
