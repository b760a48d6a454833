"""What made a picture, as a text and back: whatever is asked for, to the last digit."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from calotype.runtime.errors import InputError
from calotype.runtime.pictures.parameters import Parameters, parse_parameters

PARAMETERS = Parameters(
    prompt="a red apple, noto style",
    negative_prompt="blue",
    steps=20,
    sampler="dpmpp-2m",
    guidance_scale=7.0,
    seed=42,
    width=64,
    height=32,
    model="a, b",
    model_hash="0123456789",
    further={"Eta": 0.1 + 0.2, "Crop": (1, 2), "Sigmas": (14.6, 1e-5, 0.0), "Scheduler": {"beta_end": 0.012}},
)
TEXT = (
    "a red apple, noto style\nNegative prompt: blue\n"
    'Steps: 20, Sampler: dpmpp-2m, CFG scale: 7, Seed: 42, Size: 64x32, Model hash: 0123456789, Model: "a, b", '
    'Eta: 0.30000000000000004, Crop: 1 2, Sigmas: 14.6 1e-05 0, Scheduler: "{\\"beta_end\\": 0.012}", '
    "Version: calotype 0.1.0"
)


def test_the_text_is_what_other_programs_read() -> None:
    assert str(PARAMETERS) == TEXT


def test_every_number_comes_back_whole() -> None:
    found = parse_parameters(TEXT)
    assert dataclasses.replace(found, further=PARAMETERS.further) == PARAMETERS
    assert float(found.further["Eta"]) == 0.1 + 0.2
    assert tuple(map(float, found.further["Sigmas"].split())) == (14.6, 1e-5, 0.0)
    assert json.loads(found.further["Scheduler"]) == {"beta_end": 0.012}


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "\n",
        "two\nlines\n\n",
        " spaces ",
        "Negative prompt: is what it says",
        "a\nNegative prompt: b",
        "a\nSteps: 3, Sampler: b",
        "Steps: 3",
        "null\0 and escape\x1b[31m",
        "half \udc80",
        "a\r\nb\rc\u2028d",
        '"quoted", with: colons',
        "🍎 Äpfel",
    ],
)
def test_prompts_that_the_form_was_not_made_for(prompt: str) -> None:
    for parameters in (
        dataclasses.replace(PARAMETERS, prompt=prompt),
        dataclasses.replace(PARAMETERS, negative_prompt=prompt),
        dataclasses.replace(PARAMETERS, prompt=prompt, negative_prompt=prompt),
    ):
        text = str(parameters)
        text.encode()
        assert not any(character in text for character in "\0\x1b\r")
        found = parse_parameters(text)
        assert (found.prompt, found.negative_prompt) == (parameters.prompt, parameters.negative_prompt)
        assert found.further.keys() == PARAMETERS.further.keys()


words = st.text(st.characters(codec=None), max_size=30) | st.sampled_from(["Negative prompt: a", "x\nSteps: 3, a: b"])
labels = st.text("abcXYZ -/", min_size=1).map(str.strip).filter(bool)
numbers = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=100, deadline=None)
@given(
    prompt=words,
    negative=words,
    steps=st.integers(1, 1000),
    scale=st.none() | numbers,
    seed=st.none() | st.integers(0, 2**64 - 1),
    texts=st.none() | words,
    further=st.dictionaries(labels, words | st.lists(numbers, min_size=1).map(tuple) | st.integers()),
)
@example(prompt="", negative="\n", steps=1, scale=1e22, seed=0, texts='"', further={"A": "[1", "B": "{}", "C": " "})
def test_everything_comes_back(
    prompt: str,
    negative: str,
    steps: int,
    scale: float | None,
    seed: int | None,
    texts: str | None,
    further: dict[str, Any],
) -> None:
    parameters = Parameters(
        prompt=prompt,
        negative_prompt=negative,
        steps=steps,
        sampler=texts,
        guidance_scale=scale,
        seed=seed,
        width=None if seed is None else 512,
        height=None if seed is None else 768,
        model=texts,
        further=further,
    )
    text = str(parameters)
    text.encode()
    found = parse_parameters(text)
    assert str(found) == text
    for label, value in further.items():
        if isinstance(value, tuple):
            assert tuple(map(float, found.further[label].split())) == value
        else:
            assert found.further[label] == str(value)
    assert dataclasses.replace(found, further=further) == parameters


@settings(max_examples=100, deadline=None)
@given(st.text() | st.text(st.sampled_from('Steps: 1,"[]{}\\\n')).map(lambda text: f"Steps: 1, {text}"))
def test_any_text_is_settings_or_an_input_error(text: str) -> None:
    try:
        found = parse_parameters(text)
    except InputError as error:
        assert str(error).startswith("the text has no settings: ")
    else:
        assert math.isfinite(found.guidance_scale or 0)
        assert parse_parameters(str(found)) == found


AUTOMATIC1111 = (
    "masterpiece, (best:1.2)\n<lora:detail:0.8>\nNegative prompt: low quality,\nblurry\n"
    "Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5.5, Seed: 2896452351, Size: 832x1216, "
    "Model hash: 67ab2fd8ec, Model: ponyDiffusionV6XL, VAE hash: 235745af8d, Denoising strength: 0.4, Clip skip: 2, "
    'Hires upscaler: 4x_NMKD, Lora hashes: "detail: 9f8a2b, other: 77aa", '
    'ControlNet 0: "Module: canny, Model: control_v11 [d14c016b], Weight: 1.0", '
    'Hashes: {"model": "67ab2fd8ec", "lora:detail": "9f8a2b"}, Version: v1.10.1'
)
CIVITAI = (
    "a cat\nNegative prompt: bad\nSteps: 30, CFG scale: 7, Sampler: Euler a, Seed: 17, Size: 1024x1024, "
    "Created Date: 2024-09-20T08:31:58.4061842Z, "
    'Civitai resources: [{"type":"checkpoint","modelVersionId":128713,"modelName":"Dream, Shaper"},'
    '{"type":"lora","weight":0.8}], Civitai metadata: {"remixOfId":1}'
)


def test_what_automatic1111_writes() -> None:
    found = parse_parameters(AUTOMATIC1111)
    assert found.prompt == "masterpiece, (best:1.2)\n<lora:detail:0.8>"
    assert found.negative_prompt == "low quality,\nblurry"
    assert (found.steps, found.sampler, found.guidance_scale, found.seed) == (28, "DPM++ 2M", 5.5, 2896452351)
    assert (found.width, found.height, found.model_hash) == (832, 1216, "67ab2fd8ec")
    assert (found.model, found.version) == ("ponyDiffusionV6XL", "v1.10.1")
    assert found.further["Lora hashes"] == "detail: 9f8a2b, other: 77aa"
    assert found.further["ControlNet 0"] == "Module: canny, Model: control_v11 [d14c016b], Weight: 1.0"
    assert json.loads(found.further["Hashes"]) == {"model": "67ab2fd8ec", "lora:detail": "9f8a2b"}
    assert found.further["Clip skip"] == "2"


def test_what_civitai_writes() -> None:
    found = parse_parameters(CIVITAI)
    assert (found.prompt, found.negative_prompt, found.steps, found.model) == ("a cat", "bad", 30, None)
    assert found.further["Created Date"] == "2024-09-20T08:31:58.4061842Z"
    assert json.loads(found.further["Civitai resources"])[0]["modelName"] == "Dream, Shaper"
    assert json.loads(found.further["Civitai metadata"]) == {"remixOfId": 1}


@pytest.mark.parametrize("text", ["", "a cat", "Steps: many", "Steps: " + "9" * 5000, "a\nSteps:", "Step: 3, Seed: 1"])
def test_what_is_no_settings(text: str) -> None:
    with pytest.raises(InputError, match="the text has no settings"):
        parse_parameters(text)


@pytest.mark.parametrize("start", ["[", "{", '"', '["', ":", ": ", '{"a":', ","])
def test_long_texts_take_no_long_time(start: str) -> None:
    parse_parameters("Steps: 1, a: " + start * 100_000)
