"""``calotype serve talbot`` as people start it, and the clients that they have, unmodified."""

from __future__ import annotations

import base64
import io
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import webuiapi
from PIL import Image

from calotype.runtime.pipeline import Pipeline
from calotype.runtime.recall import recall
from tests.serving.running import TIMEOUT

ROOT = Path(__file__).parent.parent.parent
PROMPT = "red apple, noto style"
OURS: dict[str, Any] = {"seed": 7, "num_inference_steps": 4}


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Its address, ready, and its process."""
    command = [sys.executable, "-m", "calotype", "serve", "talbot", "--port", "0", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        end = time.monotonic() + TIMEOUT
        while not is_ready(url):
            assert time.monotonic() < end
            time.sleep(0.1)
        yield url, process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=10) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        return False


@pytest.fixture
def client(server: tuple[str, Any]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server[0]}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    ) as own:
        yield own


def file_of(drawn: Any) -> bytes:
    return base64.b64decode(drawn.b64_json)


def alone(tmp_path: Path, **given: Any) -> bytes:
    """The file that is written for a picture which is drawn by itself."""
    with Pipeline.load("talbot", "cpu", threads=1) as pipeline:
        picture = pipeline(PROMPT, **given).pictures[0]
        return picture.save(tmp_path / "alone.png").read_bytes()


def test_what_openai_s_client_gets_is_the_file_of_the_command_line_while_others_are_drawn(
    client: openai.OpenAI, tmp_path: Path
) -> None:
    done = []

    def other() -> None:
        asked = {"seed": 1, "num_inference_steps": 30, "scheduler": "euler"}
        done.append(client.images.generate(prompt="fish", extra_body=asked))

    thread = threading.Thread(target=other)
    thread.start()
    first, second = client.images.generate(prompt=PROMPT, n=2, extra_body=OURS).data or ()
    thread.join()
    assert file_of(first) == alone(tmp_path, **OURS)
    assert file_of(second) == alone(tmp_path, **OURS | {"seed": 8})
    assert len(done) == 1


def test_a_stream_shows_what_there_is_so_far_and_ends_with_the_same_picture(client: openai.OpenAI) -> None:
    events = list(client.images.generate(prompt=PROMPT, stream=True, partial_images=2, extra_body=OURS))
    assert [event.type.removeprefix("image_generation.") for event in events] == ["partial_image"] * 2 + ["completed"]
    (once,) = client.images.generate(prompt=PROMPT, extra_body=OURS).data or ()
    assert file_of(events[-1]) == file_of(once)
    final = np.asarray(Image.open(io.BytesIO(file_of(once))).convert("RGB"), float)
    shown = [Image.open(io.BytesIO(file_of(event))).convert("RGB").resize((128, 128)) for event in events[:-1]]
    likeness = [np.corrcoef(np.asarray(one, float).ravel(), final.ravel())[0, 1] for one in shown]
    assert 0 < likeness[0] < likeness[1]  # the first step of four shows little yet
    assert likeness[1] > 0.5
    assert events[-1].usage.input_tokens > 0


def test_an_edit_draws_inside_its_mask_alone(client: openai.OpenAI) -> None:
    source = Image.new("RGB", (128, 128), (20, 90, 200))
    hole = Image.new("RGBA", (128, 128), (0, 0, 0, 255))
    hole.paste((0, 0, 0, 0), (32, 32, 96, 96))
    files = [io.BytesIO(), io.BytesIO()]
    for image, data in zip((source, hole), files, strict=True):
        image.save(data, "PNG")
        data.seek(0)
    (edited,) = (
        client.images.edit(
            prompt=PROMPT, image=("a.png", files[0]), mask=("m.png", files[1]), size="128x128", extra_body=OURS
        ).data
        or ()
    )
    pixels = np.asarray(Image.open(io.BytesIO(file_of(edited))).convert("RGB"), int)
    outside = np.ones((128, 128), bool)
    outside[32:96, 32:96] = False
    assert (pixels[outside] == (20, 90, 200)).all()
    assert np.abs(pixels[~outside] - (20, 90, 200)).mean() > 5


def test_webuiapi_s_picture_can_be_drawn_again_from_its_settings(server: tuple[str, Any]) -> None:
    port = int(server[0].rsplit(":", 1)[1])
    drawn = webuiapi.WebUIApi(host="127.0.0.1", port=port).txt2img(
        prompt=PROMPT, seed=7, sampler_name="DPM++ 2M Karras", width=128, height=128, steps=4
    )
    recalled = recall(drawn.info["infotexts"][0])
    with Pipeline.load(recalled.model, "cpu", threads=1) as pipeline:
        ((_, picture),) = pipeline.draw([recalled.request])
    assert np.array_equal(np.asarray(drawn.image), np.asarray(picture.image))


def test_what_cannot_be_drawn_is_said_with_its_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt=PROMPT, size="100x101")
    assert refused.value.param in ("size", "width", "height")


def test_the_readme_s_clients_get_their_pictures(
    server: tuple[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"^```py\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code.replace("8000", server[0].rsplit(":", 1)[1]), names)
    assert Image.open(io.BytesIO(base64.b64decode(names["picture"]))).size == (128, 128)
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (128, 128)


def test_told_to_stop_it_ends_with_0(server: tuple[str, subprocess.Popen[str]]) -> None:
    url, process = server
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT) == 0
    with pytest.raises(urllib.error.URLError):
        is_ready(url)
