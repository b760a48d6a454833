"""What is promised of every session: buffers of each set of sizes, checks on what is written, links, weights, ends."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.form import Form
from calotype.runtime.bundle.safetensors import SafetensorsFile
from calotype.runtime.diagnostics.benchmark import InstantSession
from calotype.runtime.errors import BackendError, InputError
from calotype.runtime.sessions import onnxruntime_cpu, open_session
from calotype.runtime.sessions.low_memory import Turn, TurnTakingSession
from calotype.runtime.sessions.onnxruntime_cpu import OnnxRuntimeCpuSession
from calotype.runtime.sessions.session import Session
from calotype.runtime.sessions.traced import Trace

TALBOT = Bundle.open("talbot")
SPECS = TALBOT.manifest.networks
SMALL = "unet_shallow"  # the smallest of the networks, with every kind of input
SIZES = {"rows": 2, "tokens": 32, "height": 4, "width": 4}
LARGER = {**SIZES, "height": 8}


def opened(network: str = SMALL, **options: Any) -> OnnxRuntimeCpuSession:
    session = open_session(TALBOT.path, SPECS[network], "cpu", **options)
    assert isinstance(session, OnnxRuntimeCpuSession)
    return session


@pytest.fixture
def unet() -> Iterator[OnnxRuntimeCpuSession]:
    with opened() as session:
        yield session


def predicted(session: Session, sizes: dict[str, int] = SIZES) -> NDArray[Any]:
    """What it makes of random inputs."""
    rng = np.random.default_rng(0)
    for spec in session.inputs:
        session.write(spec.name, sizes, rng.standard_normal(spec.resolve(sizes), np.float32))
    session.run(sizes)
    return session.buffer("noise_pred", sizes).copy()


def test_each_set_of_sizes_has_buffers_that_stay(unet: OnnxRuntimeCpuSession) -> None:
    unet.reserve(SIZES)
    view = unet.buffer("sample", SIZES)
    assert unet.buffer("sample", dict(reversed(SIZES.items()))) is view
    assert unet.buffer("sample", {**SIZES, "of_another_network": 3}) is view
    view[:] = 1.5
    unet.buffer("sample", LARGER)[:] = 2.5
    assert unet.buffer("sample", SIZES) is view
    assert (view == 1.5).all()
    assert unet.generation == 0
    for height in range(8, 8 + unet.most_shapes):
        unet.reserve({**SIZES, "height": height})
    assert unet.generation == 1
    assert unet.buffer("sample", SIZES) is not view
    assert (unet.buffer("sample", SIZES) == 0).all()


def test_large_buffers_are_kept_for_fewer_sizes(monkeypatch: pytest.MonkeyPatch, unet: OnnxRuntimeCpuSession) -> None:
    unet.reserve(SIZES)
    (shape,) = unet._shapes.values()
    monkeypatch.setattr(OnnxRuntimeCpuSession, "kept_bytes", 2 * sum(view.nbytes for view in shape.views.values()))
    for tokens in (31, 30, 29):
        unet.reserve({**SIZES, "tokens": tokens})
    assert [dict(key)["tokens"] for key in unet._shapes] == [31, 30, 29]
    unet.reserve({**SIZES, "height": 32})  # more than is kept, but in use
    assert [dict(key)["height"] for key in unet._shapes] == [4, 4, 32]
    unet.reserve(SIZES)
    assert [dict(key)["height"] for key in unet._shapes] == [4]


@pytest.mark.parametrize(
    ("value", "row", "message"),
    [
        (
            np.zeros((1, 16, 4, 4), np.float32),
            None,
            r"sample takes float32 of the shape \(2, 16, 4, 4\); float32 of \(1,",
        ),
        (np.zeros((2, 16, 4, 4)), None, r"sample takes float32 of .*; float64 of \(2, 16, 4, 4\) was given"),
        (np.zeros((4, 4), np.float32), 1, r"sample takes float32 of the shape \(16, 4, 4\); float32 of \(4, 4\)"),
        (np.zeros((16, 4, 4), np.float32), 2, "sample has no row 2; valid: 0 to 1"),
        (np.zeros((16, 4, 4), np.float32), -1, "sample has no row -1; valid: 0 to 1"),
    ],
)
def test_what_does_not_fit_is_not_written(
    value: NDArray[Any], row: int | None, message: str, unet: OnnxRuntimeCpuSession
) -> None:
    with pytest.raises(InputError, match=message):
        unet.write("sample", SIZES, value, row)
    assert (unet.buffer("sample", SIZES) == 0).all()


def test_rows_are_written_alone(unet: OnnxRuntimeCpuSession) -> None:
    unet.write("sample", SIZES, np.ones((16, 4, 4), np.float32), 1)
    unet.write("timestep", SIZES, np.float32(7), 0)
    assert unet.buffer("sample", SIZES)[:, 0, 0, 0].tolist() == [0, 1]
    assert unet.buffer("timestep", SIZES).tolist() == [7, 0]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"rows": 2, "tokens": 32, "height": 4}, r"needs 1 or more of width; .*'height': 4} was given"),
        ({**SIZES, "rows": 0, "width": -1}, "needs 1 or more of rows, width; "),
    ],
)
def test_sizes_that_are_none(sizes: dict[str, int], message: str, unet: OnnxRuntimeCpuSession) -> None:
    for call in (unet.reserve, unet.run, lambda sizes: unet.buffer("sample", sizes)):
        with pytest.raises(InputError, match=message):
            call(sizes)
    with pytest.raises(
        InputError, match="has no 'latents'; valid: sample, timestep, encoder_hidden_states, deep_feature, noise_pred"
    ):
        unet.buffer("latents", SIZES)


def wrapped(kind: str) -> Session:
    """A session of each kind, without a GPU."""
    if kind == "cpu":
        return opened()
    if kind == "instant":
        return InstantSession(16, 192)
    if kind == "profiled":
        return Trace().open("unet", opened)
    return TurnTakingSession(SPECS[SMALL], opened, Turn())


@pytest.mark.parametrize("kind", ["cpu", "instant", "profiled", "turns"])
def test_close_may_be_called_twice_and_a_call_after_it_says_so(kind: str) -> None:
    with wrapped(kind) as session:
        session.reserve(SIZES)
        session.close()
        session.close()
        for call in (session.run, session.reserve, lambda sizes: session.buffer("sample", sizes)):
            with pytest.raises(
                BackendError, match=r"^(unet_shallow\.fp32\.onnx|the instant UNet) is closed; open it again$"
            ):
                call(SIZES)
    session.close()


@pytest.mark.parametrize("kind", ["cpu", "profiled", "turns"])
def test_wrappers_answer_as_what_they_wrap(kind: str, unet: OnnxRuntimeCpuSession) -> None:
    with wrapped(kind) as session:
        assert (session.engine, session.keeps_bytes, session.padded(5)) == (None, True, 5)
        assert session.capacity({**SIZES, "height": 16, "width": 16}) == 8
        np.testing.assert_array_equal(predicted(session), predicted(unet))
        base, generation = predicted(session), session.generation
        session.set_weights(changes())
        assert np.abs(predicted(session) - base).max() > 1e-4
        session.set_weights(None)
        np.testing.assert_array_equal(predicted(session), base)
        session.trim()
        assert session.generation == generation == 0


def test_a_turn_s_end_empties_the_buffers() -> None:
    turn = Turn()
    first, second = (
        TurnTakingSession(SPECS[name], lambda name=name: opened(name), turn) for name in ("unet", "unet_deep")
    )
    generations = [first.generation]
    first.buffer("sample", SIZES)[:] = 1
    generations.append(first.generation)
    assert generations == [0, 0]
    second.reserve(SIZES)  # waits for its turn
    assert (first.buffer("sample", SIZES) == 1).all()
    second.buffer("sample", SIZES)
    assert first.generation == 1
    assert first.keeps_bytes
    assert first.capacity(SIZES) == 2 * 1024 // 16
    assert first.engine is None
    with first, second, pytest.raises(BackendError, match="takes turns with others"):
        first.link("sample", second, "noise_pred")


def changes() -> dict[str, NDArray[Any]]:
    weights = SafetensorsFile(TALBOT.path / SPECS[SMALL].weights[0])
    return {"conv_in.weight": (weights["conv_in.weight"].astype(np.float32) * 1.5).astype(np.float16)}


def test_weights_change_in_place_and_come_back(unet: OnnxRuntimeCpuSession) -> None:
    base = predicted(unet)
    view = unet.buffer("noise_pred", SIZES)
    with opened(overrides=changes()) as other:
        wanted = predicted(other)
    for _ in range(2):
        unet.set_weights(changes())
        np.testing.assert_array_equal(predicted(unet), wanted)
        with pytest.raises(BackendError, match=r"cannot open unet_shallow\.fp32\.onnx"):
            unet.set_weights({"conv_in.weight": np.zeros(3, np.float16)})
        np.testing.assert_array_equal(predicted(unet), wanted)
        unet.set_weights(None)
        np.testing.assert_array_equal(predicted(unet), base)
    assert unet.buffer("noise_pred", SIZES) is view


def test_int8_without_an_engine_takes_no_weights_and_one_picture_a_run(unet: OnnxRuntimeCpuSession) -> None:
    unet._form = Form.parse("int8")
    with pytest.raises(BackendError, match="no engine in int8 for this machine whose weights can be changed"):
        unet.set_weights(changes())
    with pytest.raises(
        BackendError, match=r"the CPU computes in float32, or in int8 with an engine; float16 was asked"
    ):
        opened(form=Form.parse("fp16"))
    with pytest.raises(
        BackendError, match=r"has no engine in int8 for this machine; build one with: .*--precision int8"
    ):
        opened(form=Form.parse("int8"))


def test_a_linked_input_is_the_other_s_output() -> None:
    with opened("unet_deep") as deep, opened("unet_shallow") as shallow, opened("unet_shallow") as plain:
        predicted(deep)
        feature = deep.buffer("deep_feature", SIZES)
        plain.write("deep_feature", SIZES, feature)
        shallow.link("deep_feature", Trace().open("deep", lambda: deep), "deep_feature")
        assert np.shares_memory(shallow.buffer("deep_feature", SIZES), feature)
        for session in (plain, shallow):
            for name in ("sample", "timestep", "encoder_hidden_states"):
                session.write(name, SIZES, deep.buffer(name, SIZES))
            session.run(SIZES)
        wanted = plain.buffer("noise_pred", SIZES)
        np.testing.assert_array_equal(shallow.buffer("noise_pred", SIZES), wanted)
        generation = shallow.generation
        deep._forget_all()  # as when it has run at many other sizes
        predicted(deep)
        assert np.shares_memory(shallow.buffer("deep_feature", SIZES), deep.buffer("deep_feature", SIZES))
        assert shallow.generation == generation + 1
        for name, output in (("sample", "deep_feature"), ("nothing", "deep_feature"), ("sample", "nothing")):
            with pytest.raises(BackendError, match=f"the input {name} .* cannot be linked to the output {output}"):
                shallow.link(name, deep, output)


def test_what_another_made_is_taken() -> None:
    with opened("unet_deep") as deep, opened("unet_shallow") as shallow:
        traced = Trace().open("deep", lambda: deep)
        traced.defer_outputs()
        predicted(deep)
        shallow.take("deep_feature", SIZES, traced, "deep_feature", SIZES)
        feature = deep.buffer("deep_feature", SIZES)
        np.testing.assert_array_equal(shallow.buffer("deep_feature", SIZES), feature)
        assert not np.shares_memory(shallow.buffer("deep_feature", SIZES), feature)
        with pytest.raises(InputError, match="deep_feature takes float32 of the shape"):
            shallow.take("deep_feature", {**SIZES, "rows": 1}, deep, "deep_feature", SIZES)


def test_what_was_written_is_lost_when_large_runs_are_given_back(
    monkeypatch: pytest.MonkeyPatch, unet: OnnxRuntimeCpuSession
) -> None:
    monkeypatch.setattr(onnxruntime_cpu, "SHARED", 16)
    large = {**SIZES, "height": 24, "width": 24}
    wanted, drawn = predicted(unet), predicted(unet, large)
    unet.trim()
    assert unet.generation == 1
    np.testing.assert_array_equal(predicted(unet), wanted)
    unet.trim()  # nothing large has run since
    assert unet.generation == 1
    np.testing.assert_array_equal(predicted(unet, large), drawn)


def test_memory_that_large_pictures_took_is_given_back() -> None:
    """In a process of its own, which has nothing else that it could have given back."""
    program = """
from pathlib import Path
from calotype.runtime.call import Call
from calotype.runtime.pipeline import Pipeline

def own():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) // 1024

with Pipeline.load("talbot", "cpu") as pipeline:
    pipeline("apple", num_inference_steps=1)
    before, trim = own(), Pipeline.trim
    Pipeline.trim = lambda self: (print(own() - before), trim(self))
    pipeline("apple", num_inference_steps=1, height=512, width=512)
    print(own() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=True)
    took, kept = map(int, done.stdout.split())
    assert took > 200
    assert kept < took / 4


def test_a_profile_holds_the_runs_before_and_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with opened(trace=True) as session:
        predicted(session)
        session.set_weights(changes())
        before = session._seconds["Conv"]
        predicted(session)
        assert session.operators()["Conv"] > before > 0
        assert session.operators() == session.operators()
    assert not list(tmp_path.iterdir())
