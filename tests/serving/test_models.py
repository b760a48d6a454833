"""Several workers and several models: who draws, what is opened and closed at run time, what does not fit."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from calotype.runtime.errors import InputError
from calotype.runtime.pipeline import Pipeline
from calotype.serving.errors import ConflictError, NotReadyError, OutOfMemoryError, UnknownModelError
from calotype.serving.workers.costs import Costs
from tests.serving.running import FAULTY, SIZE, Running, running, talbot


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(talbot(), talbot("other"), devices=(None, None), command=FAULTY) as started:
        yield started


def test_workers_share_what_there_is_to_do_and_draw_the_same(server: Running) -> None:
    async def draw() -> list[Any]:
        for place in server.dispatcher._places:  # what pictures take is measured, and here it is to be the same
            place.costs = Costs()
            for model in ("talbot", "other"):
                place.costs.observe(model, "unet float32", SIZE * SIZE // 64, 2, 0.1)
        tasks = [server.task("slow", model=model, seed=seed) for seed in range(3) for model in ("talbot", "other")]
        tickets = server.dispatcher.submit(tasks)
        assert sorted(ticket.worker or 0 for ticket in tickets) == [0, 0, 0, 1, 1, 1]
        return [await server.outcome(ticket) for ticket in tickets]

    with Pipeline.load("talbot", "cpu", threads=1) as pipeline:
        draw_it = {"width": SIZE, "height": SIZE, "num_inference_steps": 3}
        wanted = [pipeline("slow", seed=seed, **draw_it).images[0].tobytes() for seed in range(3) for _ in range(2)]
    assert server.run(draw()) == wanted


def test_a_task_goes_to_the_worker_with_the_least_work(server: Running) -> None:
    async def submit() -> None:
        (long,) = server.dispatcher.submit([server.task("slow", num_inference_steps=200)])
        shorts = server.dispatcher.submit([server.task(num_inference_steps=1) for _ in range(4)])
        assert {ticket.worker for ticket in shorts} == {1 - (long.worker or 0)}
        long.cancel()
        await asyncio.gather(*map(server.outcome, [long, *shorts]))

    server.run(submit())


def test_a_model_is_unloaded_and_opened_again(server: Running) -> None:
    async def use() -> None:
        dispatcher = server.dispatcher
        (task,) = dispatcher.submit([server.task("slow", model="other", num_inference_steps=500)])
        dispatcher.unload("other")
        assert isinstance(await server.outcome(task), NotReadyError)
        with pytest.raises(UnknownModelError, match="valid: talbot"):
            dispatcher.submit([server.task(model="other")])
        with pytest.raises(UnknownModelError, match="names no model 'third'; valid: talbot, other"):
            dispatcher.open_named("third")
        dispatcher.open_named("other")
        with pytest.raises(ConflictError, match="being opened"):
            dispatcher.open_named("other")
        await dispatcher.opened()
        with pytest.raises(InputError, match="other cannot be warmed at 65x64: width=65"):
            dispatcher.warm("other", [(65, 64)])
        dispatcher.warm("other", [(SIZE, 2 * SIZE)])
        (task,) = dispatcher.submit([server.task(model="other")])
        assert isinstance(await server.outcome(task), bytes)

    server.run(use())


def test_tasks_of_a_model_that_is_opened_anew_are_drawn_by_it(server: Running) -> None:
    async def use() -> Any:
        (task,) = server.dispatcher.submit([server.task("slow", num_inference_steps=10)])
        await server.until(lambda: task.step > 1)
        server.dispatcher.warm("other", [(SIZE, SIZE)])  # is answered while the other model is being opened
        server.dispatcher.open(talbot())
        assert not server.dispatcher.models["talbot"].ready
        (other,) = server.dispatcher.submit([server.task()])  # waits for it, too
        return [await server.outcome(task), await server.outcome(other)]

    assert [type(found) for found in server.run(use())] == [bytes, bytes]


def test_a_picture_that_does_not_fit_into_memory_is_refused(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    async def submit() -> None:
        monkeypatch.setattr("calotype.serving.workers.admission.available", lambda: 1 << 30)
        with pytest.raises(OutOfMemoryError, match=r"would take about \d+\.\d GiB of memory, and 1\.0 are left"):
            server.dispatcher.submit([server.task(width=4096, height=4096)])
        assert isinstance(await server.outcome(server.dispatcher.submit([server.task()])[0]), bytes)

    server.run(submit())


def test_a_model_that_does_not_fit_into_memory_is_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALOTYPE_TEST_FREE", "1000")
    with running(command=FAULTY) as started:
        state = started.dispatcher.models["talbot"]
        assert not state.ready
        assert state.why == "talbot takes 0.1 GiB, and 0.0 are free; unload another model, or open it with low_memory"


def test_a_model_that_cannot_be_opened_says_why_and_leaves_the_others_alone() -> None:
    with running(talbot(), talbot("gpu", backend="tensorrt-rtx", threads=None)) as started:
        models = started.dispatcher.models
        assert models["talbot"].ready
        assert not models["gpu"].ready
        assert models["gpu"].why
        assert "/" not in models["gpu"].why.replace("http://", "")

        async def submit() -> None:
            with pytest.raises(NotReadyError):
                started.dispatcher.submit([started.task(model="gpu")])
            assert isinstance(await started.outcome(started.dispatcher.submit([started.task()])[0]), bytes)

        started.run(submit())
