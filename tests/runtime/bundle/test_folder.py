"""Bundles that are not what they claim to be: one clear line for each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest

from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.manifest import FileRecord
from calotype.runtime.errors import BundleError
from calotype.runtime.graphs.files import external_locations
from calotype.runtime.pipeline import Pipeline
from tests.runtime.hub_cache import in_hub_cache


@pytest.fixture
def bundle(format1: Path, tmp_path: Path) -> Path:
    shutil.copytree(format1, tmp_path / "bundle")
    return tmp_path / "bundle"


def edit(bundle: Path, **changes: Any) -> None:
    path = bundle / "calotype.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(bundle: Path, message: str) -> None:
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.open(bundle)
    assert "\n" not in str(caught.value)


def test_a_sound_one_opens(bundle: Path) -> None:
    assert Bundle.open(bundle).manifest.family == "sd1"


def test_missing(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "there is no bundle")
    refused(tmp_path, "has no calotype.json; a checkpoint becomes one with: calotype export")


def test_truncated_weights(bundle: Path) -> None:
    path = bundle / "unet.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(bundle, r"unet\.safetensors has \d+ bytes, \d+ expected")


def test_one_flipped_byte(bundle: Path) -> None:
    path = bundle / "vae.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(bundle, r"vae\.safetensors is corrupt")


def test_a_missing_file(bundle: Path) -> None:
    (bundle / "unet.fp32.onnx").unlink()
    refused(bundle, r"unet\.fp32\.onnx is missing")


@pytest.mark.parametrize("version", [0, 3, "1", None, True])
def test_another_format_version(bundle: Path, version: Any) -> None:
    edit(bundle, format_version=version)
    refused(bundle, "format version .* this Calotype reads 1 and 2")


def test_not_json(bundle: Path) -> None:
    (bundle / "calotype.json").write_text("{")
    refused(bundle, "cannot be read")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": 1}, r"calotype\.json has unknown fields: extra; "),
        ({"networks": {}, "vae": {}}, r"calotype\.json\.networks is \{\}; valid: one or more; "),
        ({"family": "../x"}, r"calotype\.json\.family is '\.\./x'; valid: a word such as float16, sd1 or ip-adapter; "),
        ({"files": []}, r"calotype\.json\.files is \[\]; valid: a table; "),
    ],
)
def test_a_manifest_of_another_shape(bundle: Path, changes: dict[str, Any], message: str) -> None:
    edit(bundle, **changes)
    refused(bundle, f"^{message}it is not a valid manifest: export the bundle again, or install the Calotype that")


@pytest.mark.parametrize("path", ["../weights.safetensors", "/etc/passwd", "a/../../b"])
def test_a_manifest_that_points_outside(bundle: Path, path: str) -> None:
    edit(bundle, files={path: {"size": 1, "sha256": "0" * 64}})
    refused(bundle, "points outside its bundle")


@pytest.mark.parametrize("location", ["../outside.bin", "/etc/passwd", "vae.safetensors"])
def test_a_graph_that_reads_other_files(bundle: Path, location: str) -> None:
    path = bundle / "unet.fp32.onnx"
    model = onnx.load(path, load_external_data=False)
    outside = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in outside.external_data if entry.key == "location").value = location
    path.write_bytes(model.SerializeToString())
    files = json.loads((bundle / "calotype.json").read_text())["files"]
    record = FileRecord.of(path)
    edit(bundle, files=files | {path.name: {"size": record.size, "sha256": record.sha256}})
    refused(bundle, "is not one of its weights files")


def test_a_link_out_of_the_bundle_is_not_followed(bundle: Path, tmp_path: Path) -> None:
    weights = bundle / "unet.safetensors"
    weights.rename(tmp_path / "elsewhere.safetensors")
    weights.symlink_to(tmp_path / "elsewhere.safetensors")
    refused(bundle, r"unet\.safetensors is a link out of the bundle, to .*elsewhere\.safetensors; do not use")


def test_links_are_followed_inside_the_cache_of_the_hub_and_to_the_bundle(format1: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(in_hub_cache(format1, tmp_path))
    with Pipeline.load(tmp_path / "link") as pipeline:
        assert len(pipeline("a", seed=0, num_inference_steps=1).images) == 1


def test_locations_are_those_the_onnx_package_sees(format1: Path) -> None:
    for path in format1.glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        expected = {
            entry.value
            for tensor in model.graph.initializer
            for entry in tensor.external_data
            if entry.key == "location"
        }
        assert external_locations(path) == expected != set()


def test_a_graph_that_is_no_graph(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    path.write_bytes(b"\x3a\xff\xff\xff\xff\x0f")
    with pytest.raises(BundleError, match="not an ONNX file"):
        external_locations(path)
