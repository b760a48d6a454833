"""Models that are opened while others draw: nobody waits for them, and what kills a worker meanwhile is found."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from calotype.runtime.pipeline import Pipeline
from calotype.serving.errors import NotReadyError
from tests.serving.running import FAULTY, SIZE, Running, running, talbot


@pytest.fixture(scope="module")
def go(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file without which the model ``late`` is not loaded."""
    path = tmp_path_factory.mktemp("late") / "go"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CALOTYPE_TEST_LATE", str(path))
        yield path


@pytest.fixture(scope="module")
def server(go: Path) -> Iterator[Running]:
    assert not go.exists()
    with running(command=FAULTY) as started:
        yield started


@pytest.fixture
def opening(server: Running, go: Path) -> Iterator[Running]:
    """The server, while it opens the model ``late``."""
    go.unlink(missing_ok=True)

    async def begin() -> None:
        server.dispatcher.open(talbot("late"))
        await server.until(lambda: server.dispatcher._places[0].link.running.what == "open late")

    server.run(begin())
    yield server
    go.touch()
    server.run(server.dispatcher.opened())
    if "late" in server.dispatcher.models:
        server.dispatcher.unload("late")


def test_a_model_is_opened_beside_what_is_drawn_which_keeps_its_bytes(opening: Running, go: Path) -> None:
    async def draw() -> list[Any]:
        dispatcher = opening.dispatcher
        found = [await opening.outcome(dispatcher.submit([opening.task("cat face", seed=7)])[0])]
        assert not dispatcher.models["late"].ready
        with pytest.raises(NotReadyError, match="it is being opened") as refused:
            dispatcher.submit([opening.task(model="late")])
        assert refused.value.retry_after is not None
        (slow,) = dispatcher.submit([opening.task("slow cat", seed=8, num_inference_steps=1000)])
        await opening.until(lambda: slow.step)
        go.touch()
        await dispatcher.opened()  # warmed between the steps of the other
        assert not slow.ended
        slow.cancel()
        found += [await opening.outcome(dispatcher.submit([opening.task("cat face", model="late", seed=7)])[0])]
        return found

    with Pipeline.load("talbot", "cpu", threads=1) as pipeline:
        picture = pipeline("cat face", seed=7, width=SIZE, height=SIZE, num_inference_steps=3).images[0].tobytes()
    assert opening.run(draw()) == [picture, picture]


def test_one_that_is_unloaded_while_it_is_opened_is_given_back_and_can_be_opened_again(
    opening: Running, go: Path
) -> None:
    async def use() -> Any:
        dispatcher = opening.dispatcher
        dispatcher.unload("late")
        assert "late" not in dispatcher.models
        dispatcher.open_named("late")
        dispatcher.open(talbot("late"))  # the last order alone is answered
        go.touch()
        await dispatcher.opened()
        return await opening.outcome(dispatcher.submit([opening.task(model="late")])[0])

    assert isinstance(opening.run(use()), bytes)


def test_what_was_in_a_run_when_a_worker_died_is_not_drawn_beside_an_opening(
    opening: Running, go: Path, tmp_path: Path
) -> None:
    """Which of the two killed it is not known; the others are drawn at once."""

    async def use() -> Any:
        (place,) = opening.dispatcher._places
        (suspect,) = opening.dispatcher.submit([opening.task(f"wait {tmp_path}/never")])
        await opening.until(lambda: place.link is not None and place.link.running.what == "denoise")
        os.kill(opening.dispatcher.snapshot()["workers"][0]["pid"], signal.SIGKILL)
        await opening.until(lambda: suspect.deaths)
        (tmp_path / "never").touch()
        await opening.until(lambda: "talbot" in place.ready)
        assert "late" in place.opening
        (other,) = opening.dispatcher.submit([opening.task()])
        assert isinstance(await opening.outcome(other), bytes)
        assert suspect.worker is None
        go.touch()
        return await opening.outcome(suspect)

    assert isinstance(opening.run(use()), bytes)
