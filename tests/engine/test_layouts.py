"""Engines of the CPU with changed weights: opened with them in place of their own, and the base's bytes come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from calotype.engine import winograd
from calotype.engine.cpu import build_engines
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.form import FLOAT32
from calotype.runtime.bundle.safetensors import SafetensorsFile
from calotype.runtime.graphs import layouts
from calotype.runtime.graphs.layouts import Layout, Layouts
from calotype.runtime.networks import Networks
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.sessions import Session, onnxruntime_cpu, open_session
from tests.runtime.lora_files import TEXT, UNET, write_lora

BUNDLE = Bundle.open("talbot")
SIZES = {"rows": 2, "tokens": 32, "height": 8, "width": 12}
POSITIONS = "text_model.embeddings.position_embedding.weight"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Engines of talbot's UNet and text encoder, with convolutions of few products."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CALOTYPE_CACHE", str(folder))
        patch.setattr(winograd, "FEWEST_CHANNELS", 96)
        build_engines(BUNDLE, networks=[UNET, TEXT])
    return folder


@pytest.fixture
def engines(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CALOTYPE_CACHE", str(cache))
    return cache / "plans"


def output(session: Session) -> np.ndarray[Any, Any]:
    rng, sizes = np.random.default_rng(3), SIZES
    session.reserve(sizes)
    for item in session.inputs:
        session.buffer(item.name, sizes)[:] = rng.standard_normal(item.resolve(sizes))
    session.run(sizes)
    return session.buffer("noise_pred", sizes).copy()


def every_tensor(network: str) -> dict[str, np.ndarray[Any, Any]]:
    """All weights of a network, each changed a little."""
    rng, found = np.random.default_rng(0), {}
    for name, value in SafetensorsFile(BUNDLE.path / f"{network}.safetensors").items():
        noise = 0.02 * np.abs(value).mean(dtype=np.float32) * rng.standard_normal(value.shape, np.float32)
        found[name] = (value + noise).astype(value.dtype)
    return found


@pytest.mark.parametrize("packed", [0, onnxruntime_cpu.PACKED])
def test_an_engine_with_every_tensor_changed_computes_what_the_graph_does(
    engines: Path, monkeypatch: pytest.MonkeyPatch, packed: int
) -> None:
    monkeypatch.setattr(onnxruntime_cpu, "PACKED", packed)
    spec, changes = BUNDLE.manifest.networks[UNET], every_tensor(UNET)
    plan = next(engines.glob("*.unet.*.plan"))
    read = Layouts.read(plan.read_bytes())
    assert read is not None
    assert {own.tensor for own in read.of.values()} == changes.keys()
    kinds = {step for own in read.of.values() for step, _ in own.steps}
    assert kinds >= {"transpose", "reshape", "spread"}
    with open_session(BUNDLE.path, spec, "cpu") as session:
        assert (session.engine, session.own_bytes) == (plan, 0)
        before = output(session)
        session.set_weights(changes)
        assert session.engine == plan
        assert session.own_bytes > sum(2 * value.nbytes for value in changes.values())
        changed = output(session)
        session.set_weights(None)
        assert output(session).tobytes() == before.tobytes()
    with open_session(BUNDLE.path, spec, "cpu", changes) as session:
        assert output(session).tobytes() == changed.tobytes()
    monkeypatch.setenv("CALOTYPE_CACHE", str(engines / "none"))
    with open_session(BUNDLE.path, spec, "cpu", changes) as session:
        assert session.engine is None
        wanted = output(session)
    np.testing.assert_allclose(changed, wanted, atol=1e-5 * np.abs(wanted).max())
    assert np.abs(changed - before).max() > 1e-3 * np.abs(wanted).max()


@pytest.mark.usefixtures("engines")
def test_engines_stay_with_loras_and_the_models_own_bytes_come_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = write_lora(tmp_path / "a.safetensors", 1), write_lora(tmp_path / "b.safetensors", 2, (UNET,))
    short: dict[str, Any] = {"seed": 1, "num_inference_steps": 1, "height": 64, "width": 64}

    def draw(pipeline: Pipeline, *loras: Path) -> bytes:
        return bytes(pipeline("red apple", loras=loras, **short).images[0].tobytes())

    with Pipeline.load("talbot", "cpu") as pipeline:
        first = [draw(pipeline, *loras) for loras in ((), (a,), (b,), (a, b))]
        assert [draw(pipeline, *loras) for loras in ((a, b), (b,), (a,), ())] == first[::-1]
        assert len(set(first)) == 4
        assert all(path is not None for name, path in pipeline.engines.items() if name in (UNET, TEXT))
        base = pipeline.networks.session(pipeline.networks.key(UNET, FLOAT32))
        assert base.own_bytes == 0
        held = pipeline.networks.kept_bytes
        assert 0 < held < 50 << 20
    monkeypatch.setattr(Networks, "_make_room", lambda *_: None)
    with Pipeline.load("talbot", "cpu", loras=[a]) as pipeline:
        assert draw(pipeline, a) == first[1]
        assert draw(pipeline) == first[0]
    assert not [own for own in caplog.records if "engine" in own.message]


@pytest.mark.usefixtures("engines")
def test_what_an_engine_cannot_change_is_said_and_runs_without(caplog: pytest.LogCaptureFixture) -> None:
    spec = BUNDLE.manifest.networks[TEXT]
    positions = SafetensorsFile(BUNDLE.path / "text_encoder.safetensors")[POSITIONS]
    with open_session(BUNDLE.path, spec, "cpu", {POSITIONS: positions * np.float16(2)}) as session:
        assert session.engine is None
        assert session.own_bytes > positions.nbytes
    assert [own.message.partition(".plan ")[2] for own in caplog.records] == [
        f"cannot change {POSITIONS}, so this LoRA runs without it"
    ]


@pytest.mark.usefixtures("engines")
def test_an_engine_of_before_runs_without_changes_alone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, changes = BUNDLE.manifest.networks[UNET], every_tensor(UNET)
    monkeypatch.setattr(layouts, "LAYOUTS", "another")
    with open_session(BUNDLE.path, spec, "cpu") as session:
        assert session.engine is not None
    assert not caplog.records
    with open_session(BUNDLE.path, spec, "cpu", changes) as session:
        assert session.engine is None
    assert "is of a version whose weights could not be changed, so LoRAs run without it" in caplog.text
    assert caplog.text.rstrip().endswith("build it again with: calotype build BUNDLE --backend cpu --force")


@pytest.mark.parametrize("text", ["{}", "[", '{"of": {"a": ["b", ["bend", 3]]}, "fixed": []}', '{"of": []}'])
def test_damaged_remarks_are_an_error(text: str) -> None:
    model = onnx.ModelProto()
    assert Layouts.read(model.SerializeToString()) is None
    model.metadata_props.add(key=layouts.LAYOUTS, value=text)
    with pytest.raises(ValueError, match=r"layouts|JSON|Expecting"):
        Layouts.read(model.SerializeToString())


def test_steps_are_what_they_say() -> None:
    kernel = np.random.default_rng(0).standard_normal((5, 8, 3, 2)).astype(np.float16)
    made = Layout(tensor="a", steps=(("blocks", 4),)).apply(kernel, {}.__getitem__)
    assert (made.shape, made.dtype) == ((8, 8, 3, 2), np.float32)
    blocks = made.reshape(2, 2, 3, 2, 4, 4)  # outputs, inputs, height, width, inputs of a block, outputs of a block
    outputs = Layout(tensor="a", steps=(("output_blocks", 4),)).apply(kernel, {}.__getitem__).reshape(2, 8, 3, 2, 4)
    for out, in_ in ((0, 0), (4, 7), (3, 5)):
        np.testing.assert_array_equal(blocks[out // 4, in_ // 4, :, :, in_ % 4, out % 4], kernel[out, in_])
        np.testing.assert_array_equal(outputs[out // 4, in_, :, :, out % 4], kernel[out, in_])
    assert not blocks[1, :, :, :, :, 1:].any()
    padded = Layout(tensor="a", steps=(("reshape", [-1]), ("pad", 300))).apply(kernel, {}.__getitem__)
    np.testing.assert_array_equal(padded, np.append(kernel.astype(np.float32), np.zeros(60, np.float32)))
    with pytest.raises(ValueError, match="240 values are more than 9"):
        Layout(tensor="a", steps=(("reshape", [-1]), ("pad", 9))).apply(kernel, {}.__getitem__)
