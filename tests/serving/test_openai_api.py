"""OpenAI's own clients, unmodified, over a real socket."""

from __future__ import annotations

import asyncio
import base64
import io
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from calotype.runtime.pictures.embedded import read_settings
from calotype.serving.http.drawing import Settings
from calotype.serving.http.limits import Limits
from tests.serving.conftest import Place, image_file, transparent
from tests.serving.fakes import picture

MEDIA = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}


def opened(datum: Any) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(datum.b64_json)))


def test_a_picture(place: Place, client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a red apple", model="talbot", extra_body={"seed": 7})
    assert answer.data is not None and len(answer.data) == 1
    image = opened(answer.data[0])
    assert image.format == "PNG"
    assert np.array_equal(np.asarray(image), picture(7, 128, 128))
    assert (answer.size, answer.output_format, answer.background) == ("128x128", "png", "opaque")
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens, answer.usage.total_tokens) == (5, 64, 69)
    assert answer._request_id is not None and answer._request_id.startswith("req_")
    assert place.service.submitted[0].id == f"{answer._request_id}-0"


@pytest.mark.parametrize("kind", MEDIA)
def test_formats_carry_settings_and_where_they_come_from(client: openai.OpenAI, kind: Any, tmp_path: Path) -> None:
    answer = client.images.generate(prompt="a red apple", output_format=kind, extra_body={"seed": 5})
    assert answer.data is not None and answer.output_format == kind
    image = opened(answer.data[0])
    assert image.format == MEDIA[kind]
    path = tmp_path / f"picture.{kind}"
    path.write_bytes(base64.b64decode(answer.data[0].b64_json or ""))
    settings = read_settings(path)
    assert isinstance(settings, str) and settings.startswith("a red apple\nSteps: 20, ") and "Seed: 5," in settings
    assert b"trainedAlgorithmicMedia" in path.read_bytes()


def test_compression_is_quality(client: openai.OpenAI) -> None:
    sizes = []
    for quality in (0, 60, 100):
        answer = client.images.generate(
            prompt="x", output_format="webp", output_compression=quality, extra_body={"seed": 5}
        )
        assert answer.data is not None
        sizes.append(len(answer.data[0].b64_json or ""))
    assert sizes == sorted(set(sizes))


def test_several_pictures_have_seeds_in_a_row(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="x", n=3, extra_body={"seed": 40})
    assert answer.data is not None
    assert [datum.model_extra for datum in answer.data] == [{"seed": 40}, {"seed": 41}, {"seed": 42}]
    for seed, datum in zip((40, 41, 42), answer.data, strict=True):
        assert np.array_equal(np.asarray(opened(datum)), picture(seed, 128, 128))
    assert answer.usage is not None and answer.usage.output_tokens == 3 * 64


def test_any_size_and_auto(client: openai.OpenAI) -> None:
    for size, expected in (("64x96", (64, 96)), ("auto", (128, 128)), (None, (128, 128))):
        answer = client.images.generate(prompt="x", size=size)
        assert answer.data is not None and opened(answer.data[0]).size == expected
        assert answer.size == "x".join(map(str, expected))


def test_everything_of_ours_reaches_the_service(place: Place, client: openai.OpenAI) -> None:
    place.service.change("talbot", loras=("ink",))
    ours = {
        "seed": 2**64 - 1,
        "negative_prompt": "blue",
        "num_inference_steps": 3,
        "guidance_scale": 0,
        "guidance_rescale": 0.5,
        "scheduler": "euler",
        "clip_skip": 1,
        "fast": True,
    }
    client.images.generate(prompt="x", extra_body={**ours, "loras": [{"name": "ink", "scale": -0.5}], "deadline": 30})
    (task,) = place.service.submitted
    assert {name: getattr(task.request, name) for name in ours} == ours
    assert task.request.loras is not None
    assert [(own.name, own.scale) for own in task.request.loras] == [("ink", -0.5)]
    assert task.deadline is not None and 0 < task.deadline - time.monotonic() <= 30


def test_what_openai_has_and_changes_nothing_here_is_taken(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        prompt="x",
        quality="high",
        background="opaque",
        moderation="low",
        style="vivid",
        user="me",
        response_format="b64_json",
    )
    assert answer.quality == "high" and answer.safety_identifier == "me"


def check_stream(events: list[Any], partial: int, kind: str) -> None:
    assert [event.type for event in events] == [f"{kind}.partial_image"] * partial + [f"{kind}.completed"]
    assert [event.partial_image_index for event in events[:-1]] == list(range(partial))
    last = events[-1]
    assert np.array_equal(np.asarray(opened(last)), picture(9, 128, 128))
    assert (last.size, last.output_format, last.background, last.quality) == ("128x128", "png", "opaque", "auto")
    assert last.usage.total_tokens == last.usage.input_tokens + last.usage.output_tokens
    assert all(opened(event).size == (32, 32) and event.size == "32x32" for event in events[:-1])


def test_asynchronously_and_in_a_stream(place: Place) -> None:
    async def several() -> tuple[list[Any], list[Any]]:
        async with openai.AsyncOpenAI(
            base_url=f"{place.url}/v1", api_key="x", max_retries=0, _strict_response_validation=True
        ) as client:
            plain = [client.images.generate(prompt="x", extra_body={"seed": seed}) for seed in range(5)]
            answers = await asyncio.gather(*plain)
            stream = await client.images.generate(prompt="x", stream=True, partial_images=1, extra_body={"seed": 9})
            return answers, [event async for event in stream]

    answers, events = asyncio.run(several())
    for seed, answer in enumerate(answers):
        assert np.array_equal(np.asarray(opened(answer.data[0])), picture(seed, 128, 128))
    check_stream(events, 1, "image_generation")


@pytest.mark.parametrize("partial", range(4))
def test_a_stream_has_as_many_partial_pictures_as_were_asked_for(client: openai.OpenAI, partial: int) -> None:
    with client.images.generate(prompt="x", stream=True, partial_images=partial, extra_body={"seed": 9}) as stream:
        check_stream(list(stream), partial, "image_generation")


def test_a_stream_of_several_says_which_picture_an_event_is_of(client: openai.OpenAI) -> None:
    with client.images.generate(prompt="x", n=3, stream=True, output_format="jpeg", extra_body={"seed": 1}) as stream:
        events = list(stream)
    assert sorted(event.model_extra["index"] for event in events if event.model_extra) == [0, 1, 2]
    assert sorted(event.model_extra["seed"] for event in events if event.model_extra) == [1, 2, 3]
    assert all(event.output_format == "jpeg" for event in events)


def test_an_edit(place: Place, client: openai.OpenAI) -> None:
    image = Image.effect_noise((96, 64), 80).convert("RGB")
    mask = image_file(transparent(96, 64, (0, 0, 48, 64)))
    extra = {"seed": 4, "feather": 3, "strength": 0.9}
    answer = client.images.edit(image=image_file(image), mask=mask, prompt="a hat", n=2, extra_body=extra)
    assert answer.data is not None and [opened(datum).size for datum in answer.data] == [(96, 64)] * 2
    first, second = (task.request for task in place.service.submitted)
    assert (first.seed, second.seed) == (4, 5)
    assert (first.width, first.height, first.feather, first.strength) == (96, 64, 3, 0.9)
    assert isinstance(first.image, Image.Image) and first.image.tobytes() == image.tobytes()
    assert isinstance(first.mask_image, Image.Image)
    drawn = np.asarray(first.mask_image.convert("L")) == 255
    assert drawn[:, :48].all() and not drawn[:, 48:].any()
    assert answer.usage is not None and answer.usage.input_tokens_details.image_tokens == 6 * 4


@pytest.mark.parametrize(
    ("loras", "expected"),
    [
        ('[{"name": "ink", "scale": 2}, {"name": "wash"}]', [("ink", 2), ("wash", 1)]),
        ([{"name": "ink", "scale": 2}, {"name": "wash", "scale": -1}], [("ink", 2), ("wash", -1)]),
        ([{"name": "ink"}], [("ink", 1)]),
    ],
)
def test_loras_and_words_of_a_form(place: Place, client: openai.OpenAI, loras: Any, expected: Any) -> None:
    place.service.change("talbot", loras=("ink", "wash"))
    extra = {"loras": loras, "fast": True, "num_inference_steps": 2, "seed": None, "negative_prompt": ""}
    client.images.edit(image=image_file(Image.new("RGB", (64, 64))), prompt="x", size=None, extra_body=extra)
    request = place.service.submitted[0].request
    assert request.loras is not None and [(own.name, own.scale) for own in request.loras] == expected
    assert request.fast is True and request.num_inference_steps == 2


def test_edits_are_streamed(client: openai.OpenAI) -> None:
    image = image_file(Image.new("RGB", (128, 128), "red"), "JPEG")
    with client.images.edit(image=image, prompt="x", stream=True, partial_images=2, extra_body={"seed": 9}) as stream:
        check_stream(list(stream), 2, "image_edit")


def test_of_several_pictures_each_is_edited_and_the_mask_is_of_the_first(place: Place, client: openai.OpenAI) -> None:
    sizes = ((64, 96), (128, 128))
    pictures = [image_file(Image.new("RGB", size)) for size in sizes]
    mask = image_file(transparent(64, 96, (8, 8, 24, 24)))
    answer = client.images.edit(image=pictures, mask=mask, prompt="x", n=2)
    assert answer.data is not None and [opened(datum).size for datum in answer.data] == [sizes[0]] * 2 + [sizes[1]] * 2
    assert [task.request.mask_image is not None for task in place.service.submitted] == [True, True, False, False]


def test_a_large_picture_is_drawn_in_the_models_own_number_of_pixels(place: Place, client: openai.OpenAI) -> None:
    answer = client.images.edit(image=image_file(Image.new("RGB", (800, 200))), prompt="x")
    assert answer.data is not None and opened(answer.data[0]).size == (256, 64)
    client.images.edit(image=image_file(Image.new("RGB", (800, 200))), prompt="x", size="256x128")
    assert isinstance(place.service.submitted[1].request.image, Image.Image)
    assert place.service.submitted[1].request.image.size == (256, 128)


def test_fidelity_is_a_strength(place: Place, client: openai.OpenAI) -> None:
    client.images.edit(image=image_file(Image.new("RGB", (64, 64))), prompt="x", input_fidelity="high")
    client.images.edit(image=image_file(Image.new("RGB", (64, 64))), prompt="x", input_fidelity="low")
    assert [task.request.strength for task in place.service.submitted] == [0.5, None]


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("talbot", "model", "calotype")
    assert client.models.retrieve("talbot") == model
    with pytest.raises(openai.NotFoundError, match="there is no model 'mona'; valid: talbot"):
        client.models.retrieve("mona")


def test_pictures_by_their_urls(place: Place, client: openai.OpenAI) -> None:
    place.front.settings = Settings(limits=Limits(kept_seconds=60))
    answer = client.images.generate(prompt="x", response_format="url", extra_body={"seed": 6})
    assert answer.data is not None and answer.data[0].b64_json is None
    url = answer.data[0].url or ""
    assert url.startswith(place.url)
    with urllib.request.urlopen(url) as response:
        assert response.headers["Content-Type"] == "image/png"
        assert np.array_equal(np.asarray(Image.open(response)), picture(6, 128, 128))
    for other in (url.replace("expires=1", "expires=2"), url[:-1] + ("0" if url[-1] != "0" else "1")):
        with pytest.raises(urllib.error.HTTPError, match="404") as refused:
            urllib.request.urlopen(other)
        refused.value.close()


def test_a_stream_says_its_steps_in_comments_which_clients_pass_over(place: Place, client: openai.OpenAI) -> None:
    place.service.step_seconds = 0.05
    body = b'{"prompt": "x", "num_inference_steps": 3, "stream": true, "n": 2}'
    _, _, text = place.ask("POST", "/v1/images/generations", body, content_type="application/json")
    comments = [line for line in text.splitlines() if line.startswith(":")]
    assert {": step 2/3 of 0", ": step 2/3 of 1"} <= set(comments)
    events = client.images.generate(prompt="x", stream=True, extra_body={"num_inference_steps": 3})
    assert [event.type for event in events] == ["image_generation.completed"]
