"""ControlNets over HTTP, with the clients that people have: pictures as ``calotype generate --control`` draws them."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import webuiapi
from PIL import Image

from calotype.serving.config import ServeConfig
from tests.kept import Kept
from tests.runtime.command_line import calotype
from tests.runtime.conftest import SMALL_CONTROLNET, save_controlnet
from tests.serving.running import TIMEOUT
from tests.serving.test_served import is_ready

SIZE = (48, 32)
OURS: dict[str, Any] = {"seed": 7, "num_inference_steps": 4, "guidance_scale": 3.0, "scheduler": "euler"}


@pytest.fixture(scope="module")
def control(kept: Kept) -> Path:
    return save_controlnet(kept, "served_controlnet", 0, SMALL_CONTROLNET).bundle


@pytest.fixture(scope="module")
def url(tiny_bundle: Path, control: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "calotype", "serve", f"tiny={tiny_bundle}", "--control", f"canny={control}"]
    process = subprocess.Popen([*command, "--port", "0", "--threads", "1"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = process.stdout.readline().split()[-1]
        end = time.monotonic() + TIMEOUT
        while not is_ready(found):
            assert time.monotonic() < end
            time.sleep(0.1)
        yield found
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, _strict_response_validation=True) as own:
        yield own


@pytest.fixture(scope="module")
def edges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A control picture of another size than what is drawn."""
    path = tmp_path_factory.mktemp("edges") / "edges.png"
    noise = np.random.default_rng(1).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


@pytest.fixture(scope="module")
def wanted(tiny_bundle: Path, control: Path, edges: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file that the command line draws."""
    out = tmp_path_factory.mktemp("out") / "wanted.png"
    options = ["--seed", "7", "--steps", "4", "--guidance-scale", "3", "--scheduler", "euler", "--threads", "1"]
    given = f"canny={control}:{edges}:0.8:0:0.6"
    drawn = calotype(
        *("generate", "a red apple", "--model", tiny_bundle, "--width", SIZE[0], "--height", SIZE[1]),
        *(*options, "--control", given, "--output", out),
    )
    assert drawn.returncode == 0, drawn.stderr
    return out.read_bytes()


def sent(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def shown(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def pixels(file: bytes) -> bytes:
    return Image.open(io.BytesIO(file)).convert("RGB").tobytes()


def test_openai_s_client_gets_the_picture_of_the_command_line(
    client: openai.OpenAI, edges: Path, wanted: bytes
) -> None:
    asked = {**OURS, "control": [{"model": "canny", "image": sent(edges), "scale": 0.8, "start": 0.0, "end": 0.6}]}
    (drawn,) = client.images.generate(prompt="a red apple", size="48x32", extra_body=asked).data or ()
    found = base64.b64decode(drawn.b64_json or "")
    assert pixels(found) == pixels(wanted)
    (without,) = client.images.generate(prompt="a red apple", size="48x32", extra_body=OURS).data or ()
    assert pixels(base64.b64decode(without.b64_json or "")) != pixels(wanted)
    (model,) = client.models.list().data
    assert model.model_dump()["controls"] == ["canny"]


def test_webuiapi_s_units_are_taken(url: str, edges: Path, wanted: bytes) -> None:
    api = webuiapi.WebUIApi(host="127.0.0.1", port=int(url.rsplit(":", 1)[1]))
    assert api.controlnet_version() >= 2
    assert api.controlnet_model_list() == ["canny"]
    assert "none" in api.controlnet_module_list()
    unit = webuiapi.ControlNetUnit(
        image=shown(edges), model="canny", weight=0.8, guidance_end=0.6, resize_mode="Crop and Resize"
    )

    def drawn(*units: webuiapi.ControlNetUnit, **more: Any) -> bytes:
        asked = {"prompt": "a red apple", "seed": 7, "steps": 4, "cfg_scale": 3.0, "sampler_name": "Euler"}
        # The client writes into its own default for alwayson_scripts, so a call without them has those of the last.
        asked |= {"width": SIZE[0], "height": SIZE[1], "controlnet_units": [*units], "alwayson_scripts": {}, **more}
        return (api.img2img if "images" in more else api.txt2img)(**asked).image.convert("RGB").tobytes()

    assert drawn(unit) == pixels(wanted)
    assert drawn(webuiapi.ControlNetUnit(image=shown(edges), model="canny", enabled=False)) != pixels(wanted)
    over = {"images": [shown(edges).resize(SIZE)], "denoising_strength": 0.8}
    # A unit without a picture takes the one that is drawn over.
    assert drawn(webuiapi.ControlNetUnit(model="canny"), **over) != drawn(**over)
    for wrong, said in (
        ({"model": "nix"}, "there is no control 'nix'; valid: canny"),
        ({"module": "openpose"}, "there is no preprocessor 'openpose' here; valid: none, canny, grayscale"),
        ({"control_mode": "My prompt is more important"}, "control_mode='My prompt is more important' is not"),
        ({"resize_mode": "Zoom"}, "resize_mode='Zoom' is not supported here; valid: Just Resize"),
        ({"guidance_start": 0.9, "guidance_end": 0.1}, "no share of the steps"),
        ({"image": None}, "a unit of ControlNet has no image"),
    ):
        given = {"image": shown(edges), "model": "canny", **wrong}
        with pytest.raises(RuntimeError) as refused:
            drawn(webuiapi.ControlNetUnit(**given))
        assert said in str(refused.value.args[1])


def test_edits_take_controls_as_a_list_and_as_json(client: openai.OpenAI, edges: Path) -> None:
    def edited(extra: dict[str, Any]) -> bytes:
        file = ("edges.png", edges.read_bytes(), "image/png")
        answer = client.images.edit(prompt="a red apple", image=file, size="48x32", extra_body={**OURS, **extra})
        return pixels(base64.b64decode((answer.data or [])[0].b64_json or ""))

    plain = edited({})
    control = [
        {"model": "canny", "image": sent(edges), "scale": 0.5},
        {"model": "canny", "image": sent(edges), "scale": 1},
    ]
    listed = edited({"control": control})
    assert listed == edited({"control": json.dumps(control)}) != plain
    assert edited({"control": [{"model": "canny"}]}) not in (plain, listed)  # it follows the picture itself


@pytest.mark.parametrize(
    ("controls", "said"),
    [
        ([{"model": "nix", "image": ""}], "control is not a picture that can be read"),
        ([{"model": "/etc/passwd"}], "no image"),
        ([{"model": "canny"}], "a control has no image; send it in base64"),
        ([{"model": "canny", "image": "http://x/y.png"}], "is an address, and none is followed"),
        ([{"model": "canny", "image": "/etc/passwd"}], "base64|no picture"),
        ([{"model": "canny", "image": "", "file": "/etc/passwd"}], "extra"),
        ([{"model": "canny", "image": "", "scale": 1e30}], "less than or equal to 10"),
        ([{"model": "canny", "image": "PICTURE", "start": 0.5, "end": 0.5}], "no share of the steps"),
        ([{"model": "canny", "image": "PICTURE", "resize": "zoom"}], "resize='zoom' is not known"),
        ([{"model": "canny", "image": "PICTURE", "preprocess": "inpaint"}], "takes the mask"),
        ([{"model": "canny", "image": "PICTURE"}] * 5, "takes at most 4"),
        ([{"model": {"file": "/etc/passwd"}}], "string"),
        (3, "list"),
    ],
)
def test_what_is_wrong_with_a_control_is_named(client: openai.OpenAI, edges: Path, controls: Any, said: str) -> None:
    for own in controls if isinstance(controls, list) else []:
        if own.get("image") == "PICTURE":
            own["image"] = sent(edges)
    with pytest.raises(openai.BadRequestError, match=said):
        client.images.generate(prompt="x", size="48x32", extra_body={**OURS, "control": controls})


def test_controls_are_read_from_the_file_and_from_the_command_line(
    tmp_path: Path, tiny_bundle: Path, control: Path
) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(f"[models.tiny]\nbundle = '{tiny_bundle}'\ncontrols = {{ own = '{control}' }}")
    config = ServeConfig.read(file, {}, {"controls": {"canny": str(control)}})
    assert dict(config.served()["tiny"].open.controls) == {"canny": control, "own": control}
    refused = calotype("serve", "talbot", "--control", f"canny={control}")
    assert refused.returncode == 1
    assert "talbot" in refused.stderr and refused.stderr.count("\n") == 1
