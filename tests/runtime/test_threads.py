"""A pipeline in threads, after a fork, while it is closed, after an interrupt: right pictures, or one clear line."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calotype.runtime.adapters.lora import Lora
from calotype.runtime.errors import BackendError, InputError
from calotype.runtime.networks import Networks
from calotype.runtime.picture import StepEnd
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.request import Request
from calotype.runtime.sessions.onnxruntime_cpu import OnnxRuntimeCpuSession

CALLS: list[dict[str, Any]] = [
    {"prompt": prompt, "seed": seed, "num_inference_steps": steps, "guidance_scale": scale}
    for prompt, seed, steps, scale in (
        ("red", 1, 3, 4.0),
        ("apple", 2, 4, 1.0),
        ("red apple " * 30, 3, 2, 4.0),
        ("le", 4, 3, 7.5),
        ("a", 5, 5, 1.0),
        ("red", 6, 3, 2.0),
    )
]


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(tiny_bundle, "cpu") as opened:
        yield opened


@pytest.fixture(scope="module")
def wanted(pipeline: Pipeline) -> list[bytes]:
    return [pipeline(**call).images[0].tobytes() for call in CALLS]


def test_calls_from_several_threads_are_right(pipeline: Pipeline, wanted: list[bytes]) -> None:
    with ThreadPoolExecutor(6) as pool:
        for _ in range(2):
            drawn = list(pool.map(lambda call: pipeline(**call).images[0].tobytes(), CALLS))
            assert drawn == wanted


def test_calls_from_a_loop_of_asyncio_are_right(pipeline: Pipeline, wanted: list[bytes]) -> None:
    async def draw() -> list[Any]:
        return await asyncio.gather(*(asyncio.to_thread(pipeline, **call) for call in CALLS))

    assert [output.images[0].tobytes() for output in asyncio.run(draw())] == wanted


def test_jobs_are_moved_from_several_threads(pipeline: Pipeline, wanted: list[bytes]) -> None:
    def draw(call: dict[str, Any]) -> bytes:
        job = pipeline.prepare(Request(**call))
        while not job.done:
            pipeline.step([job])
        return bytes(pipeline.finish(job).image.tobytes())

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(draw, CALLS)) == wanted


def test_a_call_inside_a_callback_is_right(pipeline: Pipeline, wanted: list[bytes]) -> None:
    inside = []

    def draw(end: StepEnd) -> None:
        if end.step == 2:
            inside.append(pipeline(**CALLS[1]).images[0].tobytes())

    assert pipeline(**CALLS[0], callback_on_step_end=draw).images[0].tobytes() == wanted[0]
    assert inside == [wanted[1]]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_exception_in_a_callback_leaves_the_pipeline_as_it_was(
    pipeline: Pipeline, wanted: list[bytes], error: type[BaseException]
) -> None:
    def fail(_: StepEnd) -> None:
        raise error

    with pytest.raises(error):
        pipeline(**CALLS[0], callback_on_step_end=fail)
    assert pipeline(**CALLS[0]).images[0].tobytes() == wanted[0]


def test_an_interrupt_in_a_run_leaves_the_next_picture_right(
    pipeline: Pipeline, wanted: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, count = OnnxRuntimeCpuSession.run, [0]

    def interrupted(self: OnnxRuntimeCpuSession, sizes: Any) -> None:
        count[0] += 1
        if count[0] == 2:
            raise KeyboardInterrupt
        original(self, sizes)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(OnnxRuntimeCpuSession, "run", interrupted)
        pipeline(**CALLS[3] | {"prompt": "never seen before"})
    assert pipeline(**CALLS[3]).images[0].tobytes() == wanted[3]


def test_what_a_callback_sees_cannot_be_written_to(pipeline: Pipeline) -> None:
    def write(end: StepEnd) -> None:
        with pytest.raises(ValueError, match="read-only"):
            end.latents[:] = 0

    pipeline(**CALLS[0], callback_on_step_end=write)


def test_closing_while_a_call_runs_ends_it_with_a_line(tiny_bundle: Path) -> None:
    pipeline = Pipeline.load(tiny_bundle, "cpu")
    began, go_on = threading.Event(), threading.Event()

    def wait(_: StepEnd) -> None:
        began.set()
        go_on.wait(30)

    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(pipeline, "red", num_inference_steps=4, callback_on_step_end=wait)
        began.wait(30)
        pipeline.close()
        go_on.set()
        with pytest.raises(BackendError, match="the pipeline is closed; load it again"):
            call.result(30)
    pipeline.close()  # a second time does nothing
    with pipeline, pytest.raises(BackendError, match="the pipeline is closed; load it again"):
        pipeline("red")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
def test_a_forked_child_is_told_what_to_do_and_ends(pipeline: Pipeline) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        text = b"nothing was raised"
        try:
            pipeline("red")
        except BackendError as error:
            text = str(error).encode()
        os.write(writing, text)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert b"opened before the process was forked" in pipe.read()
    assert os.waitpid(child, 0)[1] == 0


def test_loras_that_cannot_be_opened_leave_the_pipeline_as_it_was(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first round sessions were closed before those that take their place were open."""
    from safetensors.numpy import save_file

    name = "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    pair = {f"{name}.lora_A.weight": (2, 32), f"{name}.lora_B.weight": (32, 2)}
    rng = np.random.default_rng(0)
    save_file({key: rng.standard_normal(shape, np.float32) for key, shape in pair.items()}, tmp_path / "a.safetensors")
    lora = Lora(path=tmp_path / "a.safetensors")
    with Pipeline.load(tiny_bundle, "cpu") as pipeline:
        before = pipeline(**CALLS[0]).images[0].tobytes()
        with monkeypatch.context() as patch:
            patch.setattr(Networks, "_open", _fail)
            with pytest.raises(BackendError, match="no memory"):
                pipeline.set_loras([lora])
        assert pipeline(**CALLS[0]).images[0].tobytes() == before
        with pytest.raises(InputError):
            pipeline.set_loras([Lora(path=tmp_path / "missing.safetensors")])
        assert pipeline(**CALLS[0]).images[0].tobytes() == before
        pipeline.set_loras([lora])
        assert pipeline(**CALLS[0]).images[0].tobytes() != before
        once = pipeline.draw([Request(**CALLS[0], loras=[])])
        assert next(iter(once))[1].image.tobytes() == before
        pipeline.set_loras([])
        assert pipeline(**CALLS[0]).images[0].tobytes() == before


def _fail(*_: Any) -> None:
    raise BackendError("there is no memory")
