"""Arguments that no caller should give: each is used, or refused by one line that is an error of ours."""

from __future__ import annotations

import dataclasses
import decimal
import fractions
import inspect
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from calotype.runtime.adapters.lora import Lora
from calotype.runtime.denoising.acceleration import Acceleration
from calotype.runtime.errors import CalotypeError, InputError
from calotype.runtime.pictures.autoencoder import Tiles, Vae
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.request import Request, expand


class Unwritable:
    """A value that cannot be quoted."""

    def __repr__(self) -> str:
        raise RuntimeError("no")


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def blank(mode: str, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.new(mode, size)


HUGE = 10**5000  # of more digits than Python prints
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 3, 8, 2**31, 2**64, 10**400, -(10**400), HUGE, -HUGE),
    *(1.5, float("nan"), float("inf"), 1e308, 1j, fractions.Fraction(1, 2), decimal.Decimal("sNaN")),
    *("", "x", "\ud800", "a\0b", "\x1b[31m", "a" * 10**5, "ddim", "latent", b"x", bytearray(b"x"), memoryview(b"ab")),
    *([], [1], [2, 1], [None], ["a", "b"], [[1]], (1, 2), (8, 8), [0.0], [1e308, 0], range(2), range(10**9)),
    *({}, {"a": 1}, {1: 2}, {"x\ud800": 1}, {"eta": HUGE}, {"num_train_timesteps": 10**12}, {"trained_betas": [1, 2]}),
    *({"beta_end": float("nan")}, {"timestep_spacing": []}, {"sigma_spacing": {}}, {"steps_offset": 10**9}, {1}),
    *(object(), Unwritable(), Unwritable, len, NotImplemented, nested(100_000), iter([1])),
    *(np.float32(1), np.int64(3), np.complex64(1j), np.bool_(True), np.datetime64("2020-01-01"), np.ma.masked),
    *(np.array(1), np.array([]), np.array([1, 2]), np.array([1j]), np.array(["a"]), np.array([None])),
    *(np.zeros((16, 16, 3), np.uint8), np.full((16, 16), np.nan), np.zeros((0, 0, 3)), np.zeros((1, 4, 16, 16))),
    *(Path("x"), Path("/dev/zero"), Path("a\0b"), Path("/"), blank("RGB"), blank("L"), blank("F"), blank("LAB")),
    *(blank("RGB", (0, 0)), blank("RGB", (1, 9)), Acceleration(cache_interval=2), [Lora(path=Path("x"))]),
)
NUMBERS = st.integers(0, len(VALUES) - 1)  # of values: not all can be written where an example fails
FIELDS = tuple(field.name for field in dataclasses.fields(Request))
CALLED = (*(name for name in FIELDS if name not in ("prompt", "loras")), "num_images_per_prompt", "latents")
CALLED = (*CALLED, "output_type", "callback_on_step_end")
SETS = st.dictionaries(st.sampled_from(FIELDS), NUMBERS, min_size=1, max_size=3)
NEVER_MANY = settings(max_examples=100, deadline=None)
MORE = settings(max_examples=20_000, deadline=None)


def answered(call: Callable[[], Any]) -> str | None:
    """What was refused, in one line; None where nothing was. Warnings of others' code are errors here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            call()
        except CalotypeError as error:
            message = str(error)
            assert message
            assert message.isprintable(), message
            return message
    return None


def refused(name: str, call: Callable[[], Any]) -> None:
    """What is refused is called by its name."""
    message = answered(call)
    assert message is None or name in message, message


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_of_a_request_takes_a_value_or_refuses_it_by_name(name: str) -> None:
    shown = {"loras": "LoRA", "scheduler_config": "scheduler"}.get(name, name)
    for value in VALUES:
        for given_ in ({}, {"image": blank("RGB")}, {"image": blank("RGB"), "mask_image": blank("L")}):
            fields = {"prompt": "a", **given_, name: value}
            refused(shown, lambda own=fields: Request(**own))
            answered(lambda own=fields: Request.from_json(own))
            answered(lambda own=fields: expand(**own))


@given(fields=SETS)
@NEVER_MANY
def test_any_arguments_make_requests_or_one_line(fields: dict[str, int]) -> None:
    check_arguments(fields)


@pytest.mark.slow
@given(fields=SETS)
@MORE
def test_many_more_arguments_make_requests_or_one_line(fields: dict[str, int]) -> None:
    check_arguments(fields)


def check_arguments(numbers: dict[str, int]) -> None:
    fields = {name: VALUES[number] for name, number in numbers.items()}
    answered(lambda: Request(**{"prompt": "a", **fields}))
    answered(lambda: Request.from_json(fields))
    answered(lambda: Request.from_json(fields, files=True))
    answered(lambda: expand(**{"prompt": ["a", "b"], **fields}))


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_what_requests_are_made_of_takes_a_value_or_refuses_it(value: Any) -> None:
    for name in ("images", "guidance_scale", "seed", "negative_prompt"):
        answered(lambda own=name: expand("a", **{own: value}))
    for field in dataclasses.fields(Acceleration):
        refused(
            "form" if field.name == "precision" and isinstance(value, str) else field.name,
            lambda own=field.name: Acceleration(**{own: value}),
        )
        answered(lambda own=field.name: Request.from_json({"prompt": "a", "fast": {own: value}}))
    refused("path", lambda: Lora(path=value))
    refused("scale", lambda: Lora(path=Path("x"), scale=value))
    refused("size", lambda: Tiles(size=value))
    refused("overlap", lambda: Tiles(size=64, overlap=value))
    for item in (value, {"file": value}, {"file": "x", "scale": value}):
        answered(lambda own=item: Request.from_json({"prompt": "a", "loras": [own]}, files=True))
    for item in ({"png": value}, {"file": value}, {"png": "", "file": value}):
        answered(lambda own=item: Request.from_json({"prompt": "a", "image": own}, files=True))
    answered(lambda: Request.from_json(value))


@pytest.fixture(scope="module")
def pipeline(format1: Path) -> Iterator[Pipeline]:
    with Pipeline.load(format1, backend="cpu", threads=1) as opened:
        yield opened


CALLS = st.dictionaries(st.sampled_from(CALLED), NUMBERS, min_size=1, max_size=2)


@given(fields=CALLS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_call_draws_or_says_one_line(pipeline: Pipeline, fields: dict[str, int]) -> None:
    check_call(pipeline, fields)


@pytest.mark.slow
@given(fields=CALLS)
@settings(max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_many_more_calls_draw_or_say_one_line(pipeline: Pipeline, fields: dict[str, int]) -> None:
    check_call(pipeline, fields)


def check_call(pipeline: Pipeline, numbers: dict[str, int]) -> None:
    usual = {"prompt": "a", "height": 16, "width": 16, "num_inference_steps": 1, "output_type": "latent"}
    fields = {name: VALUES[number] for name, number in numbers.items()}
    if callable(fields.get("callback_on_step_end")):  # what it raises is its own
        del fields["callback_on_step_end"]
    answered(lambda: pipeline(**{**usual, **fields}))


# What has the right type is called by its value.
SHOWN = {
    "name_or_folder": ("name_or_folder", "bundle"),
    "vae": ("vae", "bundle"),
    "loras": ("loras", "x does not exist", "LoRA"),
}


@pytest.mark.parametrize("name", list(inspect.signature(Pipeline.load).parameters))
def test_a_pipeline_opens_with_a_value_or_refuses_it_by_name(format1: Path, name: str) -> None:
    usual = {"name_or_folder": format1, "backend": "cpu", "threads": 1}
    for value in VALUES:
        message = answered(lambda own=value: Pipeline.load(**{**usual, name: own}).close())
        assert message is None or any(shown in message for shown in SHOWN.get(name, (name,))), message


def test_other_loras_are_taken_or_refused_by_name(pipeline: Pipeline) -> None:
    for value in VALUES:
        message = answered(lambda own=value: pipeline.set_loras(own))
        assert message is None or any(shown in message for shown in SHOWN["loras"]), message
    pipeline.set_loras(())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": HUGE}, "seed=a whole number of 16610 bits is more than 64 bits hold"),
        ({"guidance_scale": 10**400}, "guidance_scale=a whole number of 1329 bits is not a finite number"),
        ({"guidance_scale": np.complex64(1j)}, "guidance_scale=.* is not a finite number"),
        ({"timesteps": np.array(1)}, r"timesteps=array\(1\) is not a list of finite numbers"),
        ({"sigmas": range(10**9)}, "sigmas has 1000000000 numbers; valid: up to 10000"),
        ({"guidance_interval": np.array(1)}, r"guidance_interval=array\(1\) is not a pair of noise levels"),
        ({"image": blank("RGB"), "mask_image": blank("L"), "feather": 10**9}, r"feather=1000000000 is outside 0\.\.16"),
    ],
)
def test_numbers_that_floats_and_messages_do_not_hold(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Request(prompt="a", **arguments)


def test_as_many_prompts_as_memory_does_not_hold_are_refused_before_they_are_listed() -> None:
    with pytest.raises(InputError, match="1000000000 pictures in one call are more than 10000"):
        expand(range(10**9))


NOTHING: tuple[Any, ...] = (b"x", [None], "x", 7, object())
OPENED: dict[str, tuple[Any, ...]] = {
    "loras": (*NOTHING, Lora(path=Path("x"))),
    "embeddings": NOTHING,
    "vae": (b"x", [None], 7, object()),
    "vae_tiles": (*NOTHING, True),
    "controls": (*NOTHING, True, {1: "x"}, {"": "x"}, {"a\n": 7}, {"a": b"x"}, {"a": None}),
    "image_prompts": (*NOTHING, True, {1: "x"}, {"": "x"}, {"a\n": 7}, {"a": b"x"}, {"a": None}),
    "trace": (*NOTHING, True),
    "fast": NOTHING,
    "threads": (*NOTHING[:3], True, 2.0),
    "name_or_folder": (None, b"talbot", [None], 7, object()),
    "backend": (b"cpu", [None], 7, object()),
}


@pytest.mark.parametrize("name", OPENED)
def test_what_a_pipeline_is_opened_with_is_none_or_refused_by_name(name: str) -> None:
    for value in OPENED[name]:
        with pytest.raises(CalotypeError) as caught:
            Pipeline.load(**{"name_or_folder": "talbot", name: value})
        assert {"name_or_folder": "bundle", "vae": "bundle"}.get(name, name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_none_is_the_default_of_what_a_pipeline_is_opened_with_and_told() -> None:
    with Pipeline.load("talbot", loras=None, embeddings=None, vae=None, vae_tiles=None, trace=None) as pipeline:
        pipeline.set_loras(None)
        for wrong in ("x", [None], Lora(path=Path("x")), 7):
            with pytest.raises(InputError, match=r"^loras=.* is no list of LoRAs; give \[\("):
                pipeline.set_loras(wrong)  # type: ignore[arg-type]
        for wrong in (None, "an apple", {"prompt": "a"}):
            with pytest.raises(InputError, match=r"^request=.*; give Request\(prompt=…\)"):
                pipeline.prepare(wrong)  # type: ignore[arg-type]
        for wrong in (None, [], "x"):
            with pytest.raises(InputError, match=r"^job=.*; give what prepare\(\) made"):
                pipeline.finish(wrong)  # type: ignore[arg-type]
        request = Request(prompt="a", height=32, width=32, num_inference_steps=1)
        for latents in (b"x", "x", np.zeros((16, 4, 4), complex), [None], object()):
            with pytest.raises(InputError, match=r"^latents have the shape \(0,\); \(16, 4, 4\) is needed"):
                pipeline.prepare(request, latents=latents)  # type: ignore[arg-type]


def test_a_pair_may_be_an_array_and_no_bytes() -> None:
    assert Request(prompt="a", original_size=np.array([32, 48])).original_size == (32, 48)  # type: ignore[arg-type]
    for wrong in (b"ab", bytearray(b"ab"), memoryview(b"ab"), np.array(3), np.array([[1, 2]]), range(3)):
        with pytest.raises(InputError, match=r"^target_size=.* is not a pair; give \(height, width\)"):
            Request(prompt="a", target_size=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("factor", [0, -1, float("nan"), "x", b"1", True])
def test_a_scale_of_latents_that_is_none_is_refused(factor: Any) -> None:
    with pytest.raises(InputError, match=r"^scaling_factor=.* is not"):
        Vae.load("talbot", "cpu", None, factor)
