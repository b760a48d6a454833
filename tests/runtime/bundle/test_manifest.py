"""The manifest: format 2 and format 1, its hash, and whatever else somebody may have written there."""

from __future__ import annotations

import copy
import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calotype.runtime.bundle.folder import BUNDLED, Bundle
from calotype.runtime.bundle.manifest import KINDS, Manifest, digest
from calotype.runtime.cli.main import run
from calotype.runtime.errors import BundleError, CalotypeError, InputError
from calotype.runtime.pipeline import Pipeline

TALBOT: dict[str, Any] = json.loads((BUNDLED / "talbot" / "calotype.json").read_text())
FORMAT1: dict[str, Any] = json.loads(
    zipfile.ZipFile(Path(__file__).parents[2] / "data" / "format1.zip").read("calotype.json")
)
FORMAT1_SHA256 = "5177e70cf7291a7b68389f9f9cb4dc28befb00890a9a257692a511ea14e20753"


def changed(*path: str | int, value: Any = None, drop: bool = False) -> dict[str, Any]:
    """Talbot's manifest without its hash and with one value changed."""
    manifest = copy.deepcopy(TALBOT)
    del manifest["sha256"]
    place: Any = manifest
    for key in path[:-1]:
        place = place[key]
    if drop:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return manifest


def places(value: Any) -> Iterator[tuple[str | int, ...]]:
    """Where a manifest has numbers and texts."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in pairs:
        if isinstance(item, dict | list):
            yield from ((key, *rest) for rest in places(item))
        else:
            yield (key,)


def refusal(value: Any) -> str:
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(value)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000 and message.isprintable()
    return message


def test_format_1_opens_and_draws_what_it_drew(format1: Path) -> None:
    assert json.loads((format1 / "calotype.json").read_text())["format_version"] == 1
    with Pipeline.load(format1, "cpu") as pipeline:
        assert pipeline.manifest.kind == "model"
        assert pipeline.manifest.sha256 == FORMAT1_SHA256
        latents = pipeline("a red apple", seed=0, num_inference_steps=2, output_type="latent").images[0]
    expected = [-0.49786505103111267, 0.13882280886173248, -3.5836029052734375, 0.4085457921028137]
    np.testing.assert_allclose(latents.ravel()[:4], expected, rtol=1e-3)
    assert latents.std() == pytest.approx(2.0105143, rel=1e-3)


def test_talbot_is_of_format_2_and_its_hash_is_that_of_its_contents() -> None:
    assert TALBOT["format_version"] == 2
    assert TALBOT["kind"] == "model"
    assert TALBOT["sha256"] == digest(TALBOT) == Manifest.read(BUNDLED / "talbot").sha256
    written = Manifest.read(BUNDLED / "talbot").dumps()
    assert written == (BUNDLED / "talbot" / "calotype.json").read_text(encoding="utf-8")


def test_the_hash_is_the_same_however_the_json_is_written() -> None:
    turned = json.loads(json.dumps(dict(reversed(TALBOT.items())), indent=7, ensure_ascii=True))
    assert digest(turned) == TALBOT["sha256"]


@pytest.mark.parametrize("path", [("scheduler", "beta_end"), ("vae", "scaling_factor"), ("defaults", "guidance_scale")])
def test_a_value_that_was_changed_is_noticed(path: tuple[str, str]) -> None:
    value = changed(*path, value=0.5) | {"sha256": TALBOT["sha256"]}
    assert "was changed after it was written" in refusal(value)
    assert Manifest.from_json({key: item for key, item in value.items() if key != "sha256"})


def test_a_change_in_any_section_is_noticed() -> None:
    """One number or text of each field, of each network and file."""
    for path in places(TALBOT):
        if path[-1] in ("sha256", "format_version") and len(path) == 1:
            continue
        value = copy.deepcopy(TALBOT)
        place: Any = value
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = -1 if isinstance(place[path[-1]], int | float) else "other"
        assert digest(value) != TALBOT["sha256"], path


@pytest.mark.parametrize("wrong", ["0" * 64, TALBOT["sha256"].upper(), TALBOT["sha256"][:63], "", 7, ["a"], {}])
def test_a_hash_that_is_not_the_manifests(wrong: Any) -> None:
    assert "was changed after it was written" in refusal(TALBOT | {"sha256": wrong})
    assert Manifest.from_json(TALBOT | {"sha256": None}).sha256 == TALBOT["sha256"]


@pytest.mark.parametrize("version", [0, 3, 2.0, True, "2", None, 10**30])
def test_a_format_to_come_is_one_line(version: Any) -> None:
    assert "this Calotype reads 1 and 2; export the bundle again" in refusal(TALBOT | {"format_version": version})


def test_the_new_fields_can_be_missing() -> None:
    manifest = Manifest.from_json(changed("kind", drop=True))
    assert manifest.kind == "model"
    assert Manifest.from_json(changed("kind", drop=True) | {"family": "vae"}).kind == "vae"


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_leaves_out_what_it_has_no_use_for(kind: str) -> None:
    needed = KINDS[kind] | {"format_version", "name", "family", "precision", "networks", "files"}
    whole = changed("kind", value=kind)
    assert Manifest.from_json({key: item for key, item in whole.items() if key in needed | {"kind"}}).kind == kind
    for name in KINDS[kind]:
        assert f"of a {kind} has no {name}" in refusal({key: item for key, item in whole.items() if key != name})


def test_families_and_networks_to_come_are_read() -> None:
    value = changed("family", value="flux.2-klein")
    value["networks"] |= {"transformer": value["networks"]["unet"], "control_canny": value["networks"]["vae_decoder"]}
    manifest = Manifest.from_json(value)
    assert manifest.family == "flux.2-klein"
    assert {"transformer", "control_canny"} <= manifest.networks.keys()


def test_a_pin(capsys: pytest.CaptureFixture[str]) -> None:
    pin = Manifest.read(BUNDLED / "talbot").sha256
    assert Bundle.open("talbot", weights=False, sha256=pin.upper()).manifest.name == "talbot"
    with pytest.raises(BundleError, match=f"its manifest's sha256 is {pin}, {'0' * 64} expected"):
        Bundle.open("talbot", weights=False, sha256="0" * 64)
    with pytest.raises(InputError, match="give the 64 digits"):
        Bundle.open("talbot", weights=False, sha256="abc")
    for wrong in (pin[:63], pin + "0", "z" * 64, f"sha512:{pin}", "", f"{pin}\n"):
        assert run(["verify", "talbot", "--sha256", wrong]) == 2
        assert "is no SHA-256; give the 64 digits that calotype info shows" in capsys.readouterr().err
    with pytest.raises(BundleError, match="is not the pinned bundle"):
        Pipeline.load("talbot", "cpu", sha256="0" * 64)
    assert run(["verify", "talbot", "--sha256", "0" * 64]) == 1
    assert "talbot is not the pinned bundle" in capsys.readouterr().err
    assert run(["info", "talbot"]) == 0
    assert f"sha256:    {pin}\n" in capsys.readouterr().out
    assert run(["info", "talbot", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sha256"] == pin


FIRST = ("networks", "unet", "inputs", 0)
ENCODER = ("networks", "text_encoder", "inputs", 2)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("vae", "downscale"), 0, "calotype.json.vae.downscale is 0; valid: 1..256"),
        (("vae", "downscale"), 4, "vae_decoder output image is (batch, 3, 8*height, 8*width); needed: (batch, 3, f*"),
        (("vae", "scaling_factor"), "0.18", "calotype.json.vae.scaling_factor is '0.18'; valid: a finite number"),
        (("scheduler",), [], "calotype.json.scheduler is []; valid: a table"),
        (("scheduler", "beta_end"), {"a": [[[[[[[[[]]]]]]]]]}, "valid: at most 8 levels of lists and tables"),
        (("parity", "unet"), 3, "calotype.json.parity.unet is 3; valid: a table"),
        (("parity", "unet", "float32"), {}, "valid: the numbers max_relative and min_cosine, and more"),
        (("parity", "unet", "float32", "max_relative"), "x", "valid: the numbers max_relative and min_cosine"),
        (("networks", "unet", "graphs"), {"float16": "unet.fp16.onnx"}, "valid: with float32"),
        (("networks", "unet", "graphs"), {"float32": "unet.ort"}, "valid: a file that ends with .onnx"),
        (("networks", "unet", "weights"), [], "valid: one or more"),
        (("networks", "unet", "weights"), ["unet.onnx"], "valid: a file that ends with .safetensors"),
        (("networks", "unet", "weights"), ["no.safetensors"], "has no checksum of no.safetensors; export the bundle"),
        (("networks", "unet", "inputs"), {}, "calotype.json.networks.unet.inputs is {}; valid: a list"),
        (("networks", "Unet\x1b[2J"), {}, r"a name in calotype.json.networks is 'Unet\x1b[2J'; valid: a name such as"),
        ((*FIRST, "dtype"), "bool", "inputs[0].dtype is 'bool'; valid: float16, float32, int32, int64"),
        ((*FIRST, "name"), "latents", "the manifest's unet input sample has none; needed: (rows, n, height, width)"),
        ((*FIRST, "shape"), ["rows", 4], "the manifest's unet input sample is (rows, 4); needed"),
        ((*FIRST, "shape", 1), 2**25, "the tensor 'sample' has more than 16777216 numbers at the least"),
        ((*ENCODER, "shape", 0), 7, "extra_embeddings is (7, 192); needed: (extra, n); export the bundle"),
        ((*FIRST, "shape", 1), True, "inputs[0].shape[1] is True; valid: a whole number"),
        ((*FIRST, "shape", 1), 0, "inputs[0].shape[1] is 0; valid: 1..2"),
        ((*FIRST, "shape", 1), "8*", "valid: a whole number or 4, 'height', '8*height'"),
        (("tokenizers", "tokenizer", "max_length"), 2, "valid: 3..65536"),
        (("tokenizers", "tokenizer", "max_length"), 77, "has max_length=77, and its text encoder takes 32"),
        (("defaults", "height"), 512.0, "calotype.json.defaults.height is 512.0; valid: a whole number"),
        (("defaults", "num_inference_steps"), 0, "valid: 1..1000"),
        (("files", "unet.safetensors", "sha256"), "0", "valid: 64 digits 0..9 and a..f"),
        (("files", "*/_ORT_MEM_ADDR_/*"), {"size": 0, "sha256": "0" * 64}, "valid: a path of letters, digits, dots"),
        (("files", "a/../b"), {"size": 0, "sha256": "0" * 64}, "points outside its bundle"),
        (("files", "./a"), {"size": 0, "sha256": "0" * 64}, "valid: a path of letters"),
        (("kind",), "movie", "calotype.json.kind is 'movie'; valid: model, vae, control, ip-adapter, upscaler"),
        (("name",), "a\x1b]0;owned\x07", r"calotype.json.name is 'a\x1b]0;owned\x07'; valid: one line"),
        (("license",), "\x9b31m", r"valid: at most 20,000 characters, none to steer a terminal"),
        (("source", "name"), "\x9b31m", r"none to steer a terminal"),
        (("name",), "x" * 5000, "valid: one line of at most 300 characters"),
        (("max_clip_skip",), True, "calotype.json.max_clip_skip is True; valid: a whole number"),
        (("surprise",), 1, "calotype.json has unknown fields: surprise"),
    ],
)
def test_every_field_is_checked(path: tuple[str | int, ...], value: Any, message: str) -> None:
    assert message in refusal(changed(*path, value=value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 100_000, "it is nested too deep"),
        (b'{"a":' * 100_000, "it is nested too deep"),
        (b'{"format_version": 2, "a": %s}' % (b"1" * 5000), "it has a whole number of 5000 digits"),
        (b'{"format_version": 2, "a": 1e999}', "it has the number 1e999, which is too large"),
        (b'{"format_version": 2, "a": NaN}', "it has NaN, which is no JSON"),
        (b'{"format_version": 2, "format_version": 1}', "it has 'format_version' twice"),
        (b"\xff\xfe", "can't decode byte 0xff"),
        (b"", "Expecting value"),
        (b" " * (17 << 20), "It is larger than 16 MiB"),
    ],
)
def test_a_text_that_is_no_manifest(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "calotype.json").write_bytes(text)
    with pytest.raises(BundleError) as caught:
        Manifest.read(tmp_path)
    assert message in str(caught.value) and len(str(caught.value)) < 1000


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("../x") | st.just(10**30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """The manifest of the bundle of format 1 as one of format 2, values replaced, taken out or given another name."""
    value = copy.deepcopy(FORMAT1) | {"format_version": 2}
    for _ in range(draw(st.integers(1, 3))):
        place: Any = value
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], dict | list) and draw(st.integers(0, 3)):
                place = place[key]
                continue
            match draw(st.sampled_from(["replace", "drop", "rename"])):
                case "replace":
                    place[key] = draw(JSON)
                case "drop":
                    del place[key]
                case _ if isinstance(place, dict):
                    place[draw(st.text(max_size=8))] = place.pop(key)
            break
    return value


def survives(folder: Path, value: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever is written there, reading is a manifest or one line."""
    (folder / "calotype.json").write_text(json.dumps(value))
    try:
        manifest = Manifest.read(folder)
    except CalotypeError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 1500 and message.isprintable(), message
    else:
        assert Manifest.from_json(json.loads(manifest.dumps())) == manifest
    assert run(["info", str(folder)]) in (0, 1)
    said = capsys.readouterr()
    assert said.err.count("\n") <= 1 and len(said.err) < 2000
    assert said.out.replace("\n", "").replace("\t", "").isprintable()


@pytest.fixture
def copied(format1: Path, tmp_path: Path) -> Path:
    shutil.copytree(format1, tmp_path / "copied")
    return tmp_path / "copied"


FUZZ = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


@settings(max_examples=60, derandomize=True, **FUZZ)
@given(value=mutated())
def test_any_manifest_is_read_or_refused_in_one_line(
    copied: Path, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    survives(copied, value, capsys)


@pytest.mark.slow
@settings(max_examples=5000, **FUZZ)
@given(value=mutated() | JSON)
def test_very_many_manifests(copied: Path, value: Any, capsys: pytest.CaptureFixture[str]) -> None:
    survives(copied, value, capsys)
