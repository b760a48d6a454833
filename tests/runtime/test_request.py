"""A request: checked once, complete at one place, and the same as JSON."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from calotype.runtime.adapters.lora import Lora
from calotype.runtime.bundle.folder import BUNDLED
from calotype.runtime.bundle.manifest import Manifest
from calotype.runtime.denoising.acceleration import EXACT, FAST, Acceleration
from calotype.runtime.errors import InputError
from calotype.runtime.request import Request, expand
from calotype.runtime.schedulers import SCHEDULERS

FINITE = st.floats(allow_nan=False, allow_infinity=False)
REQUESTS = st.builds(
    Request,
    prompt=st.text(max_size=20),
    negative_prompt=st.none() | st.text(max_size=20),
    seed=st.none() | st.integers(0, 2**64 - 1),
    height=st.none() | st.integers(8, 4096),
    num_inference_steps=st.none() | st.integers(1, 1000),
    sigmas=st.none() | st.lists(FINITE, min_size=1, max_size=4),
    scheduler=st.none() | st.sampled_from(sorted(SCHEDULERS)),
    scheduler_config=st.none() | st.dictionaries(st.sampled_from(["eta", "solver_order"]), st.integers(0, 3)),
    guidance_scale=st.none() | FINITE,
    guidance_rescale=st.floats(0, 1),
    guidance_interval=st.none() | st.tuples(st.floats(0, 1), st.floats(2, 3)),
    fast=st.sampled_from([None, True, False, FAST, Acceleration(cache_interval=3, guidance_interval=(0.5, 2.0))]),
    clip_skip=st.none() | st.integers(0, 3),
    target_size=st.none() | st.tuples(st.integers(1, 99), st.integers(1, 99)),
    loras=st.none() | st.just((Lora(path=Path("a.safetensors"), scale=0.8),)),
)


@given(request=REQUESTS)
@settings(max_examples=40, deadline=None)
def test_json_gives_the_request_back(request: Request) -> None:
    value = json.loads(json.dumps(request.to_json()))
    assert Request.from_json(value, files=True) == request
    assert pickle.loads(pickle.dumps(request)) == request


def test_pictures_travel_in_json_and_paths_are_followed_only_where_that_is_asked_for(tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8))
    request = Request(prompt="a", image=image, strength=0.5)
    again = Request.from_json(json.loads(json.dumps(request.to_json())))
    assert isinstance(again.image, Image.Image)
    np.testing.assert_array_equal(np.asarray(again.image), np.asarray(image))
    value = Request(prompt="a", image=str(tmp_path / "secret.png")).to_json()
    with pytest.raises(InputError, match="image names a file, and files of a request are not opened here"):
        Request.from_json(value)
    assert Request.from_json(value, files=True).image == tmp_path / "secret.png"
    with pytest.raises(InputError, match="loras names a file"):
        Request.from_json({"prompt": "a", "loras": [{"file": "a.safetensors"}]})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "a request is of type list; give an object with fields such as prompt"),
        ({}, "a request needs a prompt; an empty string is one"),
        ({"prompt": "a", "stepz": 3}, "a request has no field 'stepz'; valid: clip_skip,"),
        ({"prompt": 5}, "prompt=5 is of type int; give a text, which may be empty"),
        ({"prompt": "a" * 20_001}, "prompt has 20001 characters; valid: up to 20000; shorten it"),
        ({"prompt": "a", "negative_prompt": ":" * 10**6}, "negative_prompt has 1000000 characters; valid: up to 20000"),
        ({"prompt": "a", "seed": "7"}, "seed='7' is not a whole number"),
        ({"prompt": "a", "seed": 2**64}, r"seed=18446744073709551616 is outside 0\.\.2\*\*64-1"),
        ({"prompt": "a", "image": "x.png"}, 'image is no picture; give {"png": "…"} in base64'),
        ({"prompt": "a", "image": {"png": "§"}}, "image is not base64"),
        ({"prompt": "a", "image": {"png": "AAAA"}}, "image is not a picture that can be read"),
        ({"prompt": "a", "fast": {"speed": 9}}, "fast has fields that are not known; valid: true, false, or cache_int"),
        ({"prompt": "a", "loras": "a"}, "loras is no list"),
        ({"prompt": "a", "scheduler_config": [1]}, r"scheduler_config=\[1\] is no mapping of settings"),
        ({"prompt": "a", "scheduler": "eulr"}, "there is no scheduler 'eulr'; valid: ddim"),
        ({"prompt": "a", "guidance_interval": [3, 1]}, "is no range of noise levels"),
        ({"prompt": "a", "timesteps": [[1]]}, r"timesteps=\[1\] is not a finite number"),
        ({"prompt": "a", "strength": 0.5}, "strength is about a picture, and there is none"),
        ({"prompt": "a", "timesteps": [9, 1], "sigmas": [2, 1]}, "timesteps and sigmas were both given"),
    ],
)
def test_a_wrong_request_gets_one_line(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        Request.from_json(value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("field", [name for name in Request.__dataclass_fields__ if name != "prompt"])
def test_none_is_the_default_everywhere(field: str) -> None:
    assert Request(prompt="a", **{field: None}) == Request(prompt="a")


def test_numbers_of_numpy_are_numbers() -> None:
    request = Request(prompt="a", seed=np.int64(3), guidance_scale=np.float32(2.5), sigmas=np.array([3.0, 1.0, 0.0]))
    assert request == Request(prompt="a", seed=3, guidance_scale=2.5, sigmas=(3.0, 1.0, 0.0))
    assert json.dumps(request.to_json())


def test_every_default_is_filled_in_once() -> None:
    manifest = Manifest.read(BUNDLED / "talbot")
    whole = Request(prompt="a").resolved(manifest)
    assert {name for name, value in vars(whole).items() if value is None} == {
        "timesteps",
        "sigmas",
        "guidance_interval",
        "image",
        "mask_image",
        "strength",
        "original_size",
        "crops_coords_top_left",
        "target_size",
    }
    assert whole.resolved(manifest) == whole
    assert (whole.num_inference_steps, whole.scheduler) == (manifest.defaults.num_inference_steps, "dpmpp-2m")
    assert whole.fast == EXACT
    fast = Request(prompt="a", fast=True).resolved(manifest)
    assert fast.num_inference_steps == round(manifest.defaults.num_inference_steps * FAST.steps)
    assert Request(prompt="a", sigmas=[9, 3, 1, 0]).resolved(manifest).num_inference_steps == 3
    assert Request(prompt="a", seed=0).resolved(manifest).seed == 0


def test_a_call_is_expanded_into_a_request_for_each_picture() -> None:
    found = expand(["a", "b"], ["x", None], images=2, guidance_scale=[1, None, 3, 4], seed=7, num_inference_steps=3)
    assert [(item.prompt, item.negative_prompt, item.guidance_scale, item.seed) for item in found] == [
        ("a", "x", 1.0, 7),
        ("a", "x", None, 8),
        ("b", "", 3.0, 9),
        ("b", "", 4.0, 10),
    ]
    for arguments, message in (
        ({"prompt": None}, "prompt is None; give a text, which may be empty"),
        ({"prompt": ["a", None]}, "prompt=None is of type NoneType; give a text"),
        ({"prompt": b"a"}, "prompt=b'a' is of type bytes; give a text"),
        ({"prompt": "a", "images": 10**9}, "1000000000 pictures in one call are more than 10000; make several calls"),
        ({"prompt": "a", "seed": 2**64 - 1, "images": 2}, r"seed=18446744073709551615 is outside 0\.\.2\*\*64-1 for 2"),
    ):
        with pytest.raises(InputError, match=message):
            expand(**arguments)  # type: ignore[arg-type]
