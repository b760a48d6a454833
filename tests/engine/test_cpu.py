"""Engines of the CPU backend: built, opened, held against the bundle's own graphs, and passed over where unsound."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file

from calotype.engine import cpu, cpu_operators, winograd
from calotype.engine.cpu import build_engines
from calotype.runtime.adapters.lora import Lora
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.errors import BackendError, BuildError, BundleError, InputError
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.sessions import onnxruntime_cpu, open_session, processor
from calotype.runtime.sessions.plans import describe_plan, list_plans, sidecar, weights_of

SIZES = [{"rows": 2, "tokens": 5, "height": 8, "width": 12}, {"rows": 1, "tokens": 7, "height": 9, "width": 7}]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CALOTYPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "plans"


def outputs(folder: Path, spec: Any) -> list[np.ndarray[Any, Any]]:
    found = []
    with open_session(folder, spec, "cpu") as session:
        for sizes in SIZES:
            rng = np.random.default_rng(3)
            session.reserve(sizes)
            for item in session.inputs:
                session.buffer(item.name, sizes)[:] = rng.standard_normal(item.resolve(sizes))
            session.run(sizes)
            found.append(session.buffer("noise_pred", sizes).copy())
    return found


@pytest.mark.parametrize("network", ["vae_decoder", "text_encoder"])
def test_a_full_disk_is_what_is_said(tiny_bundle: Path, folder: Path, network: str) -> None:
    """The system's own limit on the size of a file stands for it. ONNX Runtime names a line of its sources instead.

    The tiny text encoder's weights would fit as the halves that they are stored as.
    """
    bundle = Bundle.open("talbot" if network == "vae_decoder" else tiny_bundle)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(BuildError) as caught:
            build_engines(bundle, networks=[network])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    advice = "free some space with calotype build --clean, or set CALOTYPE_CACHE"
    assert str(caught.value) == f"{folder} cannot be written: File too large; {advice}"
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("packed", [0, onnxruntime_cpu.PACKED])
def test_an_engine_computes_what_the_graph_does_at_every_size(
    tiny_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, packed: int
) -> None:
    """Odd sizes too, at which a UNet's upsamplings do not double."""
    monkeypatch.setattr(onnxruntime_cpu, "PACKED", packed)
    bundle, lines = Bundle.open(tiny_bundle), []
    spec = bundle.manifest.networks["unet"]
    plain = outputs(tiny_bundle, spec)
    path = build_engines(bundle, networks=["unet"], say=lines.append)["unet"]
    assert lines[0].startswith("disk: about")
    assert lines[1].endswith("not built before")
    for got, expected in zip(outputs(tiny_bundle, spec), plain, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())
        assert not np.array_equal(got, expected)  # it was not the graph that ran
    record = describe_plan(path)
    assert record.weights is not None
    assert 0 < record.figures["max_relative"] < 1e-5
    assert record.key["processor"] == processor.instruction_sets()
    assert [item["name"] for item in record.tensors["outputs"]] == ["noise_pred"]
    assert {item.stat().st_mode & 0o777 for item in (path, weights_of(path))} == {0o600}
    assert sorted(item.suffix for item in folder.iterdir()) == [".json", ".plan", ".weights"]
    assert build_engines(bundle, networks=["unet"], say=lines.append) == {"unet": path}
    assert lines[-1].endswith("taken from the cache")


def test_a_picture_is_the_same_alone_and_in_a_call_of_several(tiny_bundle: Path) -> None:
    build_engines(Bundle.open(tiny_bundle))
    arguments: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}
    with Pipeline.load(tiny_bundle, "cpu") as pipeline:
        together = pipeline(["red apple", "apple"], seed=4, **arguments).images
        alone = pipeline("apple", seed=5, **arguments).images
    np.testing.assert_array_equal(together[1], alone[0])


def test_loras_are_merged_into_the_bundles_own_weights(tiny_bundle: Path, tmp_path: Path) -> None:
    rng, name = np.random.default_rng(0), "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    pair = {f"{name}.lora_A.weight": (2, 32), f"{name}.lora_B.weight": (32, 2)}
    path = tmp_path / "lora.safetensors"
    save_file({key: rng.standard_normal(size, np.float32) for key, size in pair.items()}, path)
    arguments: dict[str, Any] = {"seed": 0, "num_inference_steps": 1, "output_type": "np"}

    def draw(loras: list[Lora]) -> Any:
        with Pipeline.load(tiny_bundle, "cpu", loras=loras) as pipeline:
            return pipeline("apple", **arguments).images[0]

    plain, changed = draw([]), draw([Lora(path=path)])
    build_engines(Bundle.open(tiny_bundle))
    np.testing.assert_allclose(draw([]), plain, atol=1e-5)
    np.testing.assert_allclose(draw([Lora(path=path)]), changed, atol=1e-5)
    assert np.abs(changed - plain).max() > 1e-3


def test_weights_that_an_engine_stands_for_are_not_read(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    build_engines(Bundle.open(copy), networks=["unet"])
    for name in ("unet", "vae"):
        data = bytearray((copy / f"{name}.safetensors").read_bytes())
        data[-1] ^= 1
        (copy / f"{name}.safetensors").write_bytes(data)
        if name == "unet":
            Pipeline.load(copy, "cpu").close()
            with pytest.raises(BundleError, match=r"unet\.safetensors is corrupt"):
                Bundle.open(copy)
        else:
            with pytest.raises(BundleError, match=r"vae\.safetensors is corrupt"):
                Pipeline.load(copy, "cpu")


def test_links_of_a_hub_cache_are_followed(tiny_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "0", tmp_path / "models--x" / "blobs"
    shutil.copytree(tiny_bundle, snapshot)
    blobs.mkdir()
    for number, path in enumerate(path for path in snapshot.iterdir() if path.is_file()):
        path.rename(blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    bundle = Bundle.open(snapshot)
    build_engines(bundle, networks=["unet"])
    outputs(snapshot, bundle.manifest.networks["unet"])
    assert caplog.text == ""


@pytest.mark.parametrize("what", ["graph", "weights cut", "weights changed", "weights gone", "record", "library"])
def test_an_unsound_engine_is_passed_over_with_a_line_and_built_again(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    bundle = Bundle.open(tiny_bundle)
    spec = bundle.manifest.networks["unet"]
    plain = outputs(tiny_bundle, spec)
    path = build_engines(bundle, networks=["unet"])["unet"]
    weights = weights_of(path)
    if what == "graph":
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    elif what == "weights cut":
        os.truncate(weights, weights.stat().st_size - 1)
    elif what == "weights changed":
        weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    elif what == "weights gone":
        weights.unlink()
    elif what == "record":
        record = json.loads(sidecar(path).read_text())
        record["key"]["processor"] = "x86_64 sse4_1"
        sidecar(path).write_text(json.dumps(record))
    else:
        monkeypatch.setattr(onnxruntime_cpu.onnxruntime, "__version__", "0.1")
    for got, expected in zip(outputs(tiny_bundle, spec), plain, strict=True):
        np.testing.assert_array_equal(got, expected)
    assert "runs without its engine" in caplog.text
    assert caplog.text.rstrip().endswith("build it again with: calotype build BUNDLE --backend cpu")
    if what not in ("record", "library"):
        lines: list[str] = []
        build_engines(bundle, networks=["unet"], say=lines.append)
        assert "built again, since" in lines[-1]
        caplog.clear()
        outputs(tiny_bundle, spec)
        assert caplog.text == ""


def test_weights_that_were_only_touched_are_read_and_serve(tiny_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundle = Bundle.open(tiny_bundle)
    path = build_engines(bundle, networks=["unet"])["unet"]
    os.utime(weights_of(path), (0, 0))
    outputs(tiny_bundle, bundle.manifest.networks["unet"])
    assert caplog.text == ""


def test_an_engine_that_computes_something_else_is_not_kept(
    tiny_bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(graph: Any, node: onnx.NodeProto) -> bool:
        made = onnx.helper.make_node("Sigmoid", [node.input[0]], list(node.output))
        graph.replace(node, [made])
        return True

    monkeypatch.setitem(cpu_operators.REWRITERS, "GroupNormalization", wrong)
    with pytest.raises(BuildError, match=r"the engine of unet is off by .* in 'noise_pred' on 'random' inputs"):
        build_engines(Bundle.open(tiny_bundle), networks=["unet"])
    assert not list(folder.iterdir())


def test_convolutions_of_few_products_that_round_too_coarsely_are_taken_back(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "FEWEST_CHANNELS", 8)
    bundle, lines = Bundle.open(tiny_bundle), []
    path = build_engines(bundle, networks=["unet"], say=lines.append)["unet"]
    assert not any("tiles" in line for line in lines)
    assert "FusedMatMul" in {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
    monkeypatch.setitem(winograd.POINTS, 4, (0, 8, -8, 16, -16))
    build_engines(bundle, networks=["unet"], say=lines.append, force=True)
    assert [line for line in lines if "tiles" in line] == [lines[-1]]
    assert lines[-1].startswith("with convolutions by tiles of 4 x 4 pixels it is off by")
    assert describe_plan(path).figures["max_relative"] < 1e-5
    with open_session(tiny_bundle, bundle.manifest.networks["unet"], "cpu") as session:
        assert session.inputs


def test_a_decoder_that_works_in_bands_opens_from_the_cache(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """ONNX Runtime may keep weights in the graph of a band, which lie in the same file."""
    monkeypatch.setattr(winograd, "FEWEST_CHANNELS", 8)
    monkeypatch.setattr(winograd, "BAND", 4)
    bundle = Bundle.open(tiny_bundle)
    spec, sizes = bundle.manifest.networks["vae_decoder"], {"batch": 2, "height": 5, "width": 6}

    def decoded() -> np.ndarray[Any, Any]:
        with open_session(tiny_bundle, spec, "cpu") as session:
            session.reserve(sizes)
            latents = session.buffer("latents", sizes)
            latents[:] = np.random.default_rng(3).standard_normal(latents.shape)
            session.run(sizes)
            return session.buffer("image", sizes).copy()

    plain = decoded()
    path = build_engines(bundle, networks=["vae_decoder"])["vae_decoder"]
    assert "Scan" in {node.op_type for node in onnx.load(path, load_external_data=False).graph.node}
    got = decoded()
    assert not caplog.messages
    assert not np.array_equal(got, plain)
    np.testing.assert_allclose(got, plain, atol=1e-5 * np.abs(plain).max())


def test_what_an_engine_will_need_counts_convolutions_of_few_products(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(tiny_bundle)
    graph = tiny_bundle / bundle.manifest.networks["unet"].graphs["float32"]
    before = cpu.weights_size(graph)
    monkeypatch.setattr(winograd, "FEWEST_CHANNELS", 8)
    path = build_engines(bundle, networks=["unet"])["unet"]
    assert cpu.weights_size(graph) > 2 * before
    assert weights_of(path).stat().st_size == pytest.approx(cpu.weights_size(graph), rel=0.2)


def test_what_cannot_be_built_says_why(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(tiny_bundle)
    with pytest.raises(InputError, match="no network 'unett'; valid: text_encoder"):
        build_engines(bundle, networks=["unett"])
    with monkeypatch.context() as patched:
        patched.setattr(cpu, "weights_size", lambda _: 1 << 60)
        with pytest.raises(BuildError, match="free some space"):
            build_engines(bundle)
    monkeypatch.setattr(cpu, "instruction_sets", lambda: None)
    with pytest.raises(BackendError, match="does not say what its processor can do"):
        build_engines(bundle)
    assert list_plans() == []
