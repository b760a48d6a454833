"""What a request says of an IP-Adapter: checked, as JSON, as the command line spells it; and its pictures, as read."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from calotype.runtime.bundle.spec import ModelSpec, TensorSpec
from calotype.runtime.errors import BundleError, InputError
from calotype.runtime.image_prompt import ImagePrompt
from calotype.runtime.image_prompt_rows import NO_TOKEN, Block, blocks_of, layer_scales, rows_of
from calotype.runtime.pictures.clip_pictures import clip_pixels
from calotype.runtime.request import Request

BLOCKS = [
    Block(name="down_1", layers=2, channels=8),
    Block(name="mid", layers=1, channels=8),
    Block(name="up_0", layers=3, channels=4),
]


def picture(seed: int, height: int = 32, width: int = 48, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def test_a_request_is_json_both_ways_and_a_stranger_s_path_is_not_followed(tmp_path: Path) -> None:
    one = ImagePrompt(model="one", images=(picture(1), picture(2)), scale=0.5)
    two = ImagePrompt(model=tmp_path / "ip", images=(tmp_path / "a.png",), scale={"up": {"block_0": [0, 1]}, "mid": 2})
    value = Request(prompt="a", image_prompts=(one, two)).to_json()
    found = Request.from_json(value, files=True)
    assert found.to_json() == value
    assert (found.image_prompts[1], len(found.image_prompts[0].images)) == (two, 2)
    for own, what in (
        (value["image_prompts"][1], "an image prompt's model"),
        ({"model": "x", "images": [{"file": "/"}]}, "an image prompt's picture"),
    ):
        with pytest.raises(InputError, match=f"{what} names a file, and files of a request are not opened here"):
            Request.from_json({"prompt": "a", "image_prompts": [own]})
    for own in ({"images": []}, {"model": "x"}, {"model": "x", "images": [], "start": 1}):
        with pytest.raises(InputError, match="an image prompt needs a model and images, and may have a scale; nothing"):
            Request.from_json({"prompt": "a", "image_prompts": [own]})
    with pytest.raises(InputError, match="image_prompts is no list; give"):
        Request.from_json({"prompt": "a", "image_prompts": {"model": "x"}})
    with pytest.raises(InputError, match="images is no list; give"):
        Request.from_json({"prompt": "a", "image_prompts": [{"model": "x", "images": {"png": ""}}]})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale": float("nan")}, "an image prompt's scale=nan is not a finite number"),
        ({"scale": {"up": {"block_0": [0, float("inf")]}}}, "scale of 'up', block_0=inf is not a finite number"),
        ({"scale": {"upper": 1}}, "an image prompt's scale of 'upper' is of no part of a UNet; valid: down, mid, up"),
        (
            {"scale": {"mid": {"block_0": 1}}},
            "an image prompt's scale of mid has no 'block_0'; valid: block_0, block_1",
        ),
        ({"scale": {"up": {"0": 1}}}, "an image prompt's scale of up has no '0'; valid: block_0, block_1, …"),
        ({"scale": "much"}, "an image prompt's scale='much' is not a finite number"),
        ({"model": 3}, "an image prompt's model=3 is no name and no path; give one of them"),
        ({"images": ()}, "an image prompt has 0 pictures; give 1 to 16"),
        ({"images": (picture(1),) * 17}, "an image prompt has 17 pictures; give 1 to 16"),
        ({"images": 3}, "an image prompt's picture is of type int, not a picture"),
    ],
)
def test_values_out_of_range_get_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        ImagePrompt(**{"model": "one", "images": (picture(1),), **values})
    assert "\n" not in str(caught.value)


def test_the_command_line_s_spelling() -> None:
    assert ImagePrompt.parse("face=my-ip:a.png,b.png:0.6") == (
        "face", Path("my-ip"), ImagePrompt(model="face", images=("a.png", "b.png"), scale=0.6),
    )  # fmt: skip
    assert ImagePrompt.parse("x=a/b:c.png")[2] == ImagePrompt(model="x", images="c.png")  # type: ignore[arg-type]
    for text in ("a:b", "x=a", "x=:b", "x=a:b:1:2", "=a:b", "x=a:", "x=a:b,"):
        with pytest.raises(InputError, match=r"cannot be read; valid: NAME=BUNDLE:PICTURE\[,PICTURE…\]\[:SCALE\]"):
            ImagePrompt.parse(text)
    with pytest.raises(InputError, match="has no number where its scale is due"):
        ImagePrompt.parse("x=a:b:much")


@pytest.mark.parametrize(
    "given",
    [(224, 224, "RGB"), (300, 451, "RGB"), (517, 233, "RGB"), (31, 90, "RGB"), (225, 224, "L"), (64, 64, "P")],
)
@pytest.mark.parametrize("size", [224, 32])
def test_pictures_are_read_as_transformers_reads_them(given: tuple[int, int, str], size: int) -> None:
    height, width, mode = given
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size=size, crop_size=size)
    image = picture(1, height, width, mode)
    expected = np.asarray(processor(image, return_tensors="np").pixel_values)[0]
    got = clip_pixels(image, size)
    assert (got.shape, got.dtype, got.flags.c_contiguous) == ((3, size, size), np.float32, True)
    assert float(np.abs(got - expected).max()) < 1e-6


def test_scales_by_layer() -> None:
    assert layer_scales(0.5, BLOCKS) == (0.5,) * 6
    by_layer = ImagePrompt(model="x", images=(picture(1),), scale={"down": 1, "up": {"block_0": [0, 2, 3]}}).scale
    assert layer_scales(by_layer, BLOCKS) == (1, 1, 0, 0, 2, 3)
    two = ImagePrompt(model="x", images=(picture(1),), scale={"down": {"block_1": [4]}, "mid": 5}).scale
    assert layer_scales(two, BLOCKS) == (4, 4, 5, 0, 0, 0)


def test_rows_are_in_the_order_of_computing_and_filled_up() -> None:
    rng = np.random.default_rng(1)

    def read(tokens: int) -> list[tuple[Any, Any]]:
        channels = [8, 8, 4, 4, 4, 8]  # as a file has them, the middle last
        made = [rng.standard_normal((2, tokens, count), np.float32) for count in channels]
        return [(pair[0], pair[1]) for pair in made]

    first, second, third = read(2), read(2), read(3)
    rows = rows_of(BLOCKS, [[first, second], [third]], [(1.0,) * 6, (1, 1, 0.5, 0, 2, 3)])
    assert rows["down_1_image_keys"].shape == (2, 2, 4, 8)
    assert np.array_equal(rows["image_bias"], [[0, 0, 0, 0], [0, 0, 0, NO_TOKEN]])
    assert np.array_equal(rows["down_1_image_keys"][1, 0], np.concatenate([first[1][0], second[1][0]]))
    assert np.array_equal(rows["mid_image_keys"][0, 1, :3], third[5][0])
    assert np.array_equal(rows["mid_image_values"][0, 1, :3], third[5][1] * np.float32(0.5))
    assert np.array_equal(rows["up_0_image_values"][2, 1, :3], third[4][1] * 3)
    assert not rows["up_0_image_values"][0, 1].any()
    assert not rows["up_0_image_keys"][:, 1, 3].any()


def test_a_unet_whose_inputs_are_no_keys_and_values_is_refused() -> None:
    def spec(*inputs: tuple[str, tuple[int | str, ...]]) -> ModelSpec:
        tensors = tuple(TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in inputs)
        return ModelSpec(inputs=tensors, outputs=tensors, graphs={"float32": "a.onnx"}, weights=("a.safetensors",))

    good: tuple[int | str, ...] = ("rows", 2, "adapters", "image_tokens", 8)
    assert blocks_of(spec(("mid_image_keys", good), ("mid_image_values", good)))[0].layers == 2
    for keys, values in (
        (("rows",), good),
        (good, (*good[:4], 9)),
        (("rows", "n", *good[2:]), ("rows", "n", *good[2:])),
    ):
        with pytest.raises(BundleError, match="mid_image_keys and mid_image_values are no keys and values"):
            blocks_of(spec(("mid_image_keys", keys), ("mid_image_values", values)))
