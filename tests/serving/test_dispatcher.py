"""From a task to its picture, over a real worker: bytes, order of events, admission, deadlines, cancels."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from calotype.runtime.pipeline import Pipeline
from calotype.serving.errors import (
    CancelledError,
    DeadlineError,
    NotReadyError,
    QueueFullError,
    RequestRefusedError,
    UnknownModelError,
)
from calotype.serving.tasks import Drawn, Started, Stepped
from calotype.serving.workers.admission import Bounds
from tests.serving.running import FAULTY, SIZE, Running, request, running

MIXED: list[dict[str, Any]] = [
    {"prompt": "a red apple", "seed": 1, "num_inference_steps": 3},
    {"prompt": "cat face", "seed": 2, "num_inference_steps": 5, "scheduler": "euler-a"},
    {"prompt": "a red apple " * 40, "seed": 3, "num_inference_steps": 2},
    {"prompt": "rocket", "seed": 4, "guidance_scale": 1.0, "num_inference_steps": 4, "scheduler": "heun"},
    {"prompt": "sun", "seed": 5, "width": 96, "num_inference_steps": 2},
    {"prompt": "moon", "seed": 6, "image": Image.new("RGB", (SIZE, SIZE), (200, 30, 30)), "num_inference_steps": 4},
]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(bounds=Bounds(max_running=4, max_queue=8), command=FAULTY) as started:
        yield started


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Pipeline]:
    with Pipeline.load("talbot", "cpu", threads=1) as opened:
        yield opened


def test_pictures_and_their_settings_are_those_of_the_pipeline_whatever_else_runs(
    server: Running, pipeline: Pipeline
) -> None:
    async def draw() -> list[Drawn]:
        tickets = server.dispatcher.submit([server.task(**mixed) for mixed in MIXED])
        return await asyncio.gather(*(ticket.drawn() for ticket in tickets))

    for mixed, drawn in zip(MIXED, server.run(draw()), strict=True):
        ((_, picture),) = pipeline.draw([request(**mixed)])
        assert np.array_equal(drawn.pixels, np.asarray(picture.image))
        assert drawn.parameters == str(picture.settings.parameters())
        assert drawn.request["seed"] == mixed["seed"]
    assert drawn.tokens == 1


def test_no_prompt_is_in_the_log(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    """Also of those that a warning would quote: words that the model was not taught, and prompts that are too long."""

    async def draw() -> None:
        await server.outcome(server.dispatcher.submit([server.task("zyzzyva " * 2000)])[0])
        os.kill(server.dispatcher.snapshot()["workers"][0]["pid"], signal.SIGKILL)  # all that it said is read then
        await server.until(lambda: not server.dispatcher.models["talbot"].ready)
        await server.until(lambda: server.dispatcher.models["talbot"].ready)

    server.run(draw())
    assert "signal 9" in caplog.text
    assert "zyzzyva" not in caplog.text


def test_events_come_in_order_with_previews(server: Running) -> None:
    async def listen() -> list[Any]:
        (ticket,) = server.dispatcher.submit([server.task(num_inference_steps=4, previews=1)])
        return [event async for event in ticket.events()]

    events = server.run(listen())
    assert isinstance(events[-1], Drawn)
    steps = [event for event in events if isinstance(event, Stepped)]
    assert [step.step for step in steps] == sorted({step.step for step in steps})
    shown = [step.preview for step in steps if step.preview is not None]
    assert [preview.shape for preview in shown] == [(SIZE // 8, SIZE // 8, 3)]
    assert set(events[-1].seconds) == {"queue", "encode", "denoise", "decode", "total"}


def test_a_slow_listener_gets_the_last_preview_alone(server: Running) -> None:
    async def listen() -> list[Any]:
        (ticket,) = server.dispatcher.submit([server.task(num_inference_steps=6, previews=5)])
        found = []
        async for event in ticket.events():
            found.append(event)
            await server.until(lambda: ticket.ended)
        return found

    first, *rest = server.run(listen())
    assert isinstance(first, Started)
    assert len([event for event in rest if isinstance(event, Stepped)]) <= 1


def test_exactly_what_is_too_much_is_refused_while_the_engine_is_held(server: Running) -> None:
    pid = server.dispatcher.snapshot()["workers"][0]["pid"]
    bounds = server.dispatcher.bounds

    async def flood() -> tuple[int, list[QueueFullError]]:
        accepted, refused = [], []
        os.kill(pid, signal.SIGSTOP)
        try:
            for _ in range(bounds.max_running + bounds.max_queue + 12):
                try:
                    accepted += server.dispatcher.submit([server.task(num_inference_steps=1)])
                except QueueFullError as error:
                    refused.append(error)
        finally:
            os.kill(pid, signal.SIGCONT)
        await asyncio.gather(*(ticket.drawn() for ticket in accepted))
        return len(accepted), refused

    accepted, refused = server.run(flood())
    assert (accepted, len(refused)) == (bounds.max_running + bounds.max_queue, 12)
    assert all(error.retry_after is not None and error.retry_after > 0 for error in refused)


def test_all_pictures_of_a_request_are_accepted_or_none(server: Running) -> None:
    bounds = server.dispatcher.bounds

    async def submit() -> None:
        with pytest.raises(QueueFullError):
            server.dispatcher.submit([server.task() for _ in range(bounds.max_running + bounds.max_queue + 1)])
        with pytest.raises(UnknownModelError, match="valid: talbot"):
            server.dispatcher.submit([server.task(), server.task(model="missing")])
        assert server.dispatcher.load.waiting == 0

    server.run(submit())


def test_a_deadline_that_cannot_be_met_is_refused_at_once(server: Running) -> None:
    async def submit() -> None:
        with pytest.raises(DeadlineError, match="alone"):
            server.dispatcher.submit([server.task(num_inference_steps=900, deadline=time.monotonic() + 0.01)])

    server.run(submit())


def test_a_deadline_that_passes_ends_the_task_and_no_other(server: Running, tmp_path: Path) -> None:
    async def draw() -> list[Any]:
        (held,) = server.dispatcher.submit([server.task(f"wait {tmp_path}/go")])
        await server.until(lambda: held.steps)
        (late,) = server.dispatcher.submit([server.task(deadline=time.monotonic() + 2)])
        found = await server.outcome(late)
        (tmp_path / "go").touch()
        return [found, await server.outcome(held)]

    late, held = server.run(draw())
    assert isinstance(late, DeadlineError)
    assert isinstance(held, bytes)


def test_a_cancelled_task_ends_within_a_step_and_the_others_are_untouched(server: Running, pipeline: Pipeline) -> None:
    async def draw() -> list[Any]:
        slow, other = server.dispatcher.submit(
            [server.task("slow", num_inference_steps=1000), server.task("cat face", seed=7)]
        )
        async for event in slow.events():
            if isinstance(event, Stepped):
                break
        slow.cancel()
        return [await server.outcome(slow), await server.outcome(other)]

    cancelled, other = server.run(draw())
    assert isinstance(cancelled, CancelledError)
    assert other == pipeline("cat face", seed=7, width=SIZE, height=SIZE, num_inference_steps=3).images[0].tobytes()
    assert server.dispatcher.load.running == server.dispatcher.load.waiting == 0


def test_a_worker_whose_last_task_is_cancelled_says_that_it_is_idle(server: Running) -> None:
    """Else its silence would be taken for a hang."""
    (place,) = server.dispatcher._places

    async def cancel() -> None:
        (ticket,) = server.dispatcher.submit([server.task("slow", num_inference_steps=100)])
        await server.until(lambda: ticket.step)
        ticket.cancel()
        await server.until(lambda: place.link is not None and place.link.running.what == "idle")

    server.run(cancel())


def test_a_skipped_task_gives_what_there_is(server: Running) -> None:
    async def draw() -> Drawn:
        (ticket,) = server.dispatcher.submit([server.task("slow", num_inference_steps=1000)])
        async for event in ticket.events():
            if isinstance(event, Stepped):
                ticket.skip()
                break
        return await ticket.drawn()

    assert server.run(draw()).pixels.shape == (SIZE, SIZE, 3)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"width": 65}, "width=65"),
        ({"strength": 0.001, "image": Image.new("RGB", (SIZE, SIZE))}, "leaves no step"),
        ({"scheduler_config": {"eta": 0.5}, "scheduler": "euler"}, "eta"),
    ],
)
def test_a_request_that_does_not_fit_is_refused_alone(server: Running, given: dict[str, Any], said: str) -> None:
    async def draw() -> list[Any]:
        try:
            bad, good = server.dispatcher.submit([server.task(**given), server.task()])
        except RequestRefusedError as error:
            return [error, await server.outcome(server.dispatcher.submit([server.task()])[0])]
        return [await server.outcome(bad), await server.outcome(good)]

    bad, good = server.run(draw())
    assert isinstance(bad, RequestRefusedError)
    assert said in str(bad)
    assert isinstance(good, bytes)


def test_any_exception_fails_its_task_alone_and_names_no_path(server: Running) -> None:
    async def draw() -> list[Any]:
        return [
            await server.outcome(ticket)
            for ticket in server.dispatcher.submit(
                [server.task("boom"), server.task("memory"), server.task("a red apple")]
            )
        ]

    boom, memory, good = server.run(draw())
    assert str(boom) == "RuntimeError: no kernel in kernels.so"
    assert "not enough memory" in str(memory)
    assert isinstance(good, bytes)


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_cancels_at_random_points_leave_nothing_behind(server: Running, pipeline: Pipeline, count: int) -> None:
    """The pictures between them are those of the pipeline; no task, thread or descriptor stays, here or there."""
    rng = np.random.default_rng(count)
    pid, dispatcher = server.dispatcher.snapshot()["workers"][0]["pid"], server.dispatcher
    kept = {seed: pipeline("cat", seed=seed, width=SIZE, height=SIZE, num_inference_steps=3) for seed in range(3)}

    def open_things() -> tuple[int, ...]:
        places = ("/proc/self/fd", "/proc/self/task", f"/proc/{pid}/fd", f"/proc/{pid}/task")
        return tuple(len(list(Path(place).iterdir())) for place in places)

    async def cancelled(room: asyncio.Semaphore) -> Any:
        async with room:
            steps, previews = int(rng.integers(1, 30)), int(rng.integers(0, 3))
            (ticket,) = dispatcher.submit([server.task(num_inference_steps=steps, previews=previews)])
            at, seconds = int(rng.integers(-1, steps + 1)), float(rng.exponential(0.01))
            await server.until(lambda: ticket.ended or ticket.step >= at)
            await asyncio.sleep(seconds)
            ticket.cancel()
            return await server.outcome(ticket)

    async def undisturbed(room: asyncio.Semaphore, seed: int) -> bool:
        async with room:
            (ticket,) = dispatcher.submit([server.task("cat", seed=seed)])
            return bool((await ticket.drawn()).pixels.tobytes() == kept[seed].images[0].tobytes())

    async def draw() -> None:
        await server.outcome(dispatcher.submit([server.task()])[0])
        before, room = open_things(), asyncio.Semaphore(10)
        found = await asyncio.gather(
            *(undisturbed(room, number % 3) if number % 6 == 0 else cancelled(room) for number in range(count))
        )
        assert all(own is True for own in found[::6])
        others = [own for number, own in enumerate(found) if number % 6]
        assert {type(own) for own in others} == {CancelledError, bytes}
        (place,) = dispatcher._places
        await server.until(lambda: place.link is not None and place.link.running.what == "idle")
        assert not (dispatcher._tickets or dispatcher._held or place.tickets)
        assert all(now <= then for now, then in zip(open_things(), before, strict=True))

    server.run(draw())


def test_nothing_is_accepted_once_it_is_told_to_stop() -> None:
    with running() as started:

        async def stop() -> bytes:
            (ticket,) = started.dispatcher.submit([started.task()])
            stopping = asyncio.ensure_future(started.dispatcher.stop(60))
            await asyncio.sleep(0)
            with pytest.raises(NotReadyError, match="stopping"):
                started.dispatcher.submit([started.task()])
            assert not started.dispatcher.models["talbot"].ready
            drawn = await ticket.drawn()
            await stopping
            return drawn.pixels.tobytes()

        assert started.run(stop())
