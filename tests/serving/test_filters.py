"""What every picture has to pass: an operator's filter, and the model's safety checker."""

from __future__ import annotations

import base64
import io
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from calotype.export.bundle import export_checkpoint
from calotype.runtime.errors import CalotypeError, InputError
from calotype.runtime.pipeline import Pipeline
from calotype.serving.config import ServeConfig
from calotype.serving.errors import FilteredError
from calotype.serving.workers.filters import load_filter
from calotype.serving.workers.messages import Open
from calotype.serving.workers.served import Served
from tests.kept import Kept
from tests.runtime.command_line import calotype
from tests.safety_checkers import write_checkpoint
from tests.serving.running import TIMEOUT, running
from tests.serving.test_served import ROOT, is_ready

FILTER = "tests.serving.example_filters:check"
OURS: dict[str, Any] = {"seed": 7, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    """Of a server with a filter."""
    command = [sys.executable, "-m", "calotype", "serve", "talbot", "--output-filter", FILTER, "--port", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        process = subprocess.Popen([*command, "--threads", "1"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        end = time.monotonic() + TIMEOUT
        while not is_ready(url):
            assert time.monotonic() < end
            time.sleep(0.1)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as own:
            yield own
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def pixels(datum: Any) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(datum.b64_json))).convert("RGB"))


def test_a_filter_passes_and_changes_pictures(client: openai.OpenAI) -> None:
    with Pipeline.load("talbot", "cpu", threads=1) as pipeline:
        for prompt in ("pass apple", "invert apple"):
            (drawn,) = client.images.generate(prompt=prompt, extra_body=OURS).data or ()
            expected = np.asarray(pipeline(prompt, **OURS).images[0])
            assert np.array_equal(pixels(drawn), 255 - expected if prompt.startswith("invert") else expected)


def test_a_filter_refuses_with_its_reason_and_the_others_are_drawn(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="it shows no apple") as refused:
        client.images.generate(prompt="refuse apple", extra_body=OURS)
    assert refused.value.code == "moderation_blocked"
    assert client.images.generate(prompt="pass apple", extra_body=OURS).data


@pytest.mark.parametrize(
    ("prompt", "said"), [("fail", r"failed \(RuntimeError\)"), ("nothing", "no picture"), ("crop", "of the same size")]
)
def test_what_a_filter_does_wrong_is_said_and_nothing_is_shown(client: openai.OpenAI, prompt: str, said: str) -> None:
    with pytest.raises(openai.InternalServerError, match=said) as failed:
        client.images.generate(prompt=prompt, extra_body=OURS)
    assert "secret" not in str(failed.value)
    events = []
    with pytest.raises(openai.APIError, match=said):
        events += list(client.images.generate(prompt=prompt, stream=True, partial_images=2, extra_body=OURS))
    assert not events


def test_a_stream_shows_nothing_before_the_filter_has_seen_it(client: openai.OpenAI) -> None:
    asked = {**OURS, "num_inference_steps": 8}
    events = list(client.images.generate(prompt="invert apple", stream=True, partial_images=3, extra_body=asked))
    assert [event.type for event in events] == ["image_generation.completed"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nix.nix:check", "No module named 'nix'"),
        ("tests.serving.example_filters:nix", "has no attribute 'nix'"),
        ("tests.serving.example_filters:NUMBER", "is a int, and cannot be called"),
    ],
)
def test_a_filter_that_there_is_not_is_named(name: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_filter(name)


def test_a_filter_is_checked_before_anything_is_drawn() -> None:
    with pytest.raises(InputError, match="names nothing; write module:function"):
        ServeConfig.read(None, {"talbot": "talbot"}, {"output_filter": "nix"}).served()
    refused = calotype("serve", "talbot", "--output-filter", "nix:check", "--port", "0")
    assert refused.returncode == 1
    assert "talbot cannot be opened: the output filter 'nix:check' cannot be loaded" in refused.stderr
    with pytest.raises(CalotypeError, match="has no safety_checker"):
        ServeConfig.read(None, {"talbot": "talbot"}, {"safety_checker": True}).served()


def test_the_safety_checker_s_decisions_are_refusals(kept: Kept, tiny_checkpoint: Path, tmp_path: Path) -> None:
    def make(folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = write_checkpoint(tiny_checkpoint, tmp_path / "tiny")
            export_checkpoint(checkpoint, folder / "tiny", precision="fp32", safety_checker=True)

    bundle = kept("served_checked", make) / "tiny"
    draw: dict[str, Any] = {"width": 32, "height": 32, "num_inference_steps": 2}
    with Pipeline.load(bundle, "cpu", threads=1, safety_checker=True) as pipeline:
        pictures = pipeline("a", seed=0, num_images_per_prompt=12, **draw).pictures
    expected = [None if own.flagged else np.asarray(own).tobytes() for own in pictures]
    assert None in expected and any(expected)
    order = Open(name="tiny", bundle=bundle, backend="cpu", threads=1, sizes=((32, 32),), safety_checker=True)
    with running(Served.of(order)) as started:

        async def use() -> list[Any]:
            tasks = [started.task("a", model="tiny", seed=seed, **draw) for seed in range(12)]
            return [await started.outcome(ticket) for ticket in started.dispatcher.submit(tasks)]

        found = started.run(use())
    assert [None if isinstance(own, FilteredError) else own for own in found] == expected
