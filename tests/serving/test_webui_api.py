"""AUTOMATIC1111's API over a real socket, for its client ``webuiapi`` from the package index, unmodified."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests
import webuiapi
from fastapi import FastAPI
from PIL import Image

from calotype.runtime.pictures.parameters import parse_parameters
from calotype.serving.app import create_app
from calotype.serving.errors import DeadlineError, DrawingError
from calotype.serving.http.drawing import Front, Settings
from calotype.serving.http.keys import Key
from calotype.serving.http.security import Access
from tests.serving.fakes import FakeService, picture, served

SMALL = {"width": 64, "height": 48, "steps": 4}
T = "txt2img"


def application(service: FakeService, **keys: str) -> FastAPI:
    """With keys by their names."""
    known = tuple(Key(name=name, digest=hashlib.sha256(key.encode()).digest()) for name, key in keys.items())
    return create_app(Front(service, Settings(access=Access(keys=known))))


class Served:
    """A server, what it draws with, and a client."""

    def __init__(self, url: str, service: FakeService) -> None:
        self.url, self.service = url, service
        self.api = self.client()

    def client(self, **options: Any) -> webuiapi.WebUIApi:
        where = urlsplit(self.url)
        return webuiapi.WebUIApi(host=where.hostname, port=where.port, **options)

    def post(self, name: str, body: Any) -> requests.Response:
        return requests.post(f"{self.url}/sdapi/v1/{name}", json=body, timeout=20)

    def refused(self, name: str, **body: Any) -> tuple[str, str]:
        """Field and message of what is refused."""
        response = self.post(name, {**SMALL, **body})
        assert response.status_code == 422, response.text
        (wrong,) = response.json()["detail"]
        assert not self.service.running
        return wrong["loc"][-1], wrong["msg"]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    service = FakeService("talbot", "other")
    with served(application(service)) as url:
        yield Served(url, service)


@pytest.fixture(autouse=True)
def as_it_was(server: Served) -> Iterator[None]:
    yield
    service = server.service
    service.held, service.failure, service.refusal, service.room, service.fails_after = False, None, None, None, 0
    service.step_seconds = 0.001
    service.change("talbot", loras=())
    until(lambda: service.load.running == 0 and service.load.waiting == 0)
    server.api.set_options({"sd_model_checkpoint": "talbot"})
    service.submitted.clear()
    service.cancelled.clear()


def until(true: Callable[[], Any]) -> Any:
    """Wait until something is so."""
    end = time.monotonic() + 20
    while not (value := true()):
        assert time.monotonic() < end
        time.sleep(0.005)
    return value


@pytest.fixture
def beside() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def test_a_picture_with_its_settings(server: Served) -> None:
    found = server.api.txt2img(
        prompt="a cat", negative_prompt="a dog", seed=7, cfg_scale=3, sampler_name="DDIM", **SMALL
    )
    image = found.image
    assert image.format == "PNG"
    assert np.array_equal(np.asarray(image), picture(7, 64, 48))
    (task,) = server.service.submitted
    request = task.request
    assert (request.prompt, request.negative_prompt, request.seed) == ("a cat", "a dog", 7)
    assert (request.width, request.height, request.num_inference_steps) == (64, 48, 4)
    assert (request.guidance_scale, request.scheduler) == (3.0, "ddim")
    assert image.info["parameters"] == found.info["infotexts"][0]
    assert parse_parameters(image.info["parameters"]).seed == 7
    assert found.parameters["prompt"] == "a cat" and found.parameters["steps"] == 4
    told = {name: found.info[name] for name in ("prompt", "seed", "all_seeds", "width", "height", "steps", "cfg_scale")}
    numbers = {"seed": 7, "all_seeds": [7], "width": 64, "height": 48, "steps": 4, "cfg_scale": 3}
    assert told == {"prompt": "a cat", **numbers}
    assert found.info["sampler_name"] == "DDIM" and found.info["sd_model_name"] == "talbot"


def test_all_of_what_the_client_sends_of_its_own_accord_is_taken(server: Served) -> None:
    found = server.api.txt2img(prompt="a cat", steps=2)
    assert found.image.size == (512, 512)
    assert server.service.submitted[0].request.scheduler == "euler-a"
    image = Image.new("RGB", (40, 40), "white")
    found = server.api.img2img(images=[image], mask_image=image, prompt="a cat", steps=2)
    assert found.image.size == (40, 40)  # "only masked": put back where it came from


def test_iterations_and_batches_are_pictures_with_seeds_that_follow(server: Served) -> None:
    found = server.api.txt2img(prompt="a cat", seed=5, n_iter=2, batch_size=3, **SMALL)
    assert found.info["all_seeds"] == [5, 6, 7, 8, 9, 10]
    for seed, image in zip(range(5, 11), found.images, strict=True):
        assert np.array_equal(np.asarray(image), picture(seed, 64, 48))


def test_any_seed_is_told(server: Served) -> None:
    seeds = {server.api.txt2img(prompt="a cat", **SMALL).info["seed"] for _ in range(2)}
    assert len(seeds) == 2 and min(seeds) >= 0


def test_defaults_are_the_models_where_nobody_says(server: Served) -> None:
    answer = server.post(T, {"prompt": "a cat", "seed": 1, "steps": 1}).json()
    (task,) = server.service.submitted
    assert (task.request.scheduler, task.request.guidance_scale) == (None, None)
    assert json.loads(answer["info"])["width"] == 128


def test_a_picture_to_begin_with(server: Served) -> None:
    image = Image.new("RGB", (96, 48), "red")
    server.api.img2img(images=[image], prompt="a cat", denoising_strength=0.4, **SMALL)
    (task,) = server.service.submitted
    assert isinstance(task.request.image, Image.Image)
    assert (task.request.image.size, task.request.strength) == ((64, 48), 0.4)


def test_a_mask(server: Served) -> None:
    image, mask = Image.new("RGB", (64, 48), "red"), Image.new("L", (64, 48))
    mask.paste(255, (0, 0, 32, 48))
    common = dict(images=[image], mask_image=mask, prompt="a cat", inpaint_full_res=False, inpainting_fill=1, **SMALL)
    found = server.api.img2img(mask_blur=3, **common)
    server.api.img2img(inpainting_mask_invert=1, **common)
    plain, turned = (task.request for task in server.service.submitted)
    assert plain.feather == 3
    assert np.asarray(plain.mask_image)[0, 0] == 255 and np.asarray(turned.mask_image)[0, 0] == 0
    assert found.parameters["init_images"] is None and found.parameters["mask"] is None


def test_loras_are_named_in_the_prompt(server: Served) -> None:
    server.service.change("talbot", loras=("ink", "wash"))
    assert [own["name"] for own in server.api.get_loras()] == ["ink", "wash"]
    server.api.txt2img(prompt="a cat <lora:ink:0.5> <lora:wash>", **SMALL)
    (task,) = server.service.submitted
    assert task.request.prompt == "a cat"
    assert [(own.name, own.scale) for own in task.request.loras or ()] == [("ink", 0.5), ("wash", 1.0)]
    field, message = server.refused(T, prompt="<lora:../../secret:1>")
    assert (field, message) == ("prompt", "there is no LoRA '../../secret'; valid: ink, wash")


def test_settings_for_one_request(server: Served) -> None:
    server.api.txt2img(
        prompt="a cat", override_settings={"sd_model_checkpoint": "other", "CLIP_stop_at_last_layers": 2}, **SMALL
    )
    (task,) = server.service.submitted
    assert (task.model, task.request.clip_skip) == ("other", 1)
    assert server.api.util_get_current_model() == "talbot [0123456789]"


def test_models_can_be_chosen_among_those_that_are_served(server: Served) -> None:
    assert server.api.util_get_model_names() == ["other [0123456789]", "talbot [0123456789]"]
    server.api.util_set_model("other [0123456789]")
    server.api.txt2img(prompt="a cat", **SMALL)
    assert server.service.submitted[0].model == "other"
    assert server.api.get_options()["sd_model_checkpoint"] == "other [0123456789]"
    assert all("/" not in own["filename"] for own in server.api.get_sd_models())


def test_nothing_else_can_be_set(server: Served) -> None:
    api = server.api
    api.set_options(api.get_options())  # as it is anyway
    for changes in ({"sd_model_checkpoint": "/etc/passwd"}, {"samples_save": True}, {"outdir_samples": "/tmp"}):
        assert server.post("options", changes).status_code == 422
    assert api.get_options()["samples_save"] is False


def test_samplers_and_schedules_are_those_that_are_taken(server: Served) -> None:
    assert {"Euler a", "DPM++ 2M", "DDIM"} <= set(server.api.util_get_sampler_names())
    assert {"automatic", "karras"} <= set(server.api.util_get_scheduler_names())
    server.api.txt2img(prompt="a cat", sampler_name="DPM++ 2M", scheduler="Karras", **SMALL)
    server.api.txt2img(prompt="a cat", sampler_name="DDIM", eta=0.5, **SMALL)
    first, second = (task.request for task in server.service.submitted)
    assert (first.scheduler, first.scheduler_config) == ("dpmpp-2m", {"sigma_spacing": "karras"})
    assert (second.scheduler, second.scheduler_config) == ("ddim", {"eta": 0.5})


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({"sampler_name": "Restart"}, "sampler_name", "there is no sampler 'Restart'; valid: DPM"),
        (
            {"sampler_name": "Euler", "scheduler": "Turbo"},
            "scheduler",
            "there is no schedule 'Turbo'; valid: Automatic",
        ),
        ({"sampler_name": "DDIM", "scheduler": "Karras"}, "scheduler", "ddim has no sigma_spacing"),
        ({"scheduler": "Karras"}, "scheduler", "give sampler_name too"),
        ({"sampler_name": "Euler a", "eta": 0.3}, "eta", "eta=0.3 is not supported with Euler a"),
        ({"enable_hr": True}, "enable_hr", "enable_hr=True is not supported here; leave it out, or give False"),
        ({"tiling": True}, "tiling", "tiling=True"),
        ({"restore_faces": True}, "restore_faces", "restore_faces=True"),
        ({"styles": ["ink"]}, "styles", "styles="),
        ({"subseed_strength": 0.1}, "subseed_strength", "subseed_strength=0.1"),
        ({"save_images": True}, "save_images", "save_images=True"),
        ({"script_name": "x/y plot"}, "script_name", "script_name='x/y plot'"),
        ({"refiner_checkpoint": "sdxl"}, "refiner_checkpoint", "refiner_checkpoint="),
        (
            {"alwayson_scripts": {"ControlNet": {"args": [{"a": 1}]}}},
            "alwayson_scripts",
            "a unit of ControlNet is wrong",
        ),
        ({"override_settings": {"sd_vae": "x"}}, "override_settings", "override_settings has 'sd_vae'"),
        ({"override_settings": {"sd_model_checkpoint": "/x"}}, "sd_model_checkpoint", "there is no model '/x'"),
        ({"n_iter": 5, "batch_size": 5}, "batch_size", "batch_size is 25 pictures, and this server takes at most 10"),
        ({"batch_size": 0}, "batch_size", "batch_size=0 is less than 1"),
        ({"steps": 1000}, "steps", "steps is 1000 steps, and this server takes at most 150"),
        ({"steps": 0}, "steps", "steps=0 is outside 1..1000"),
        ({"width": 8192, "height": 8192}, "width", "8192x8192"),
        ({"width": 63}, "width", "width=63 is not a positive multiple of"),
        ({"seed": -2}, "seed", "seed=-2 is outside"),
        ({"prompt": "a" * 5000}, "prompt", "prompt is 5000 characters, and this server takes at most 4000"),
        ({"misspelt": 1}, "misspelt", "Extra inputs are not permitted"),
        ({"steps": "many"}, "steps", "valid integer"),
    ],
)
def test_what_cannot_be_is_refused_by_name(server: Served, body: dict[str, Any], field: str, message: str) -> None:
    found = server.refused(T, **body)
    assert found[0] == field and message in found[1], found
    assert not server.service.submitted


@pytest.mark.parametrize(
    ("body", "field", "message"),
    [
        ({}, "init_images", "init_images has 0 pictures; give one"),
        ({"init_images": ["http://localhost/a.png"]}, "init_images", "is an address, and none is followed"),
        ({"init_images": ["/etc/passwd1"]}, "init_images", "init_images is not a picture"),
        ({"init_images": ["PNG"], "resize_mode": 2}, "resize_mode", "valid: 0, 1"),
        ({"init_images": ["PNG"], "mask": "PNG", "inpainting_fill": 2}, "inpainting_fill", "valid: 0, 1"),
        ({"init_images": ["PNG"], "mask": "PNG", "mask_blur": 900}, "mask_blur", "mask_blur=900 is outside 0..64"),
        ({"init_images": ["PNG"], "mask": "PNG", "inpainting_mask_invert": 1}, "mask", "the mask draws nothing"),
        ({"init_images": ["PNG"], "denoising_strength": 2}, "denoising_strength", "denoising_strength=2"),
        ({"init_images": ["PNG"], "initial_noise_multiplier": 0.5}, "initial_noise_multiplier", "0.5"),
    ],
)
def test_what_cannot_be_drawn_over(server: Served, body: dict[str, Any], field: str, message: str) -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), "white").save(file, format="PNG")
    text = base64.b64encode(file.getvalue()).decode()
    sent = json.loads(json.dumps(body).replace("PNG", text))
    found = server.refused("img2img", **sent)
    assert found[0] == field and message in found[1], found


def test_how_far_it_is(server: Served, beside: ThreadPoolExecutor) -> None:
    server.service.step_seconds = 0.01
    drawing = beside.submit(server.api.txt2img, prompt="a cat", seed=3, width=64, height=48, steps=60, n_iter=2)
    found = until(lambda: (own := server.api.get_progress())["current_image"] and own)
    assert 0 < found["progress"] < 1 and found["eta_relative"] > 0
    state = found["state"]
    assert (state["job"], state["job_count"], state["sampling_steps"]) == ("Batch 1 out of 2", 2, 60)
    assert 0 < state["sampling_step"] <= 60
    preview = Image.open(io.BytesIO(base64.b64decode(found["current_image"])))
    assert preview.size == (16, 12)
    skipped = requests.get(f"{server.url}/sdapi/v1/progress?skip_current_image=true", timeout=20).json()
    assert skipped["current_image"] is None
    server.api.interrupt()
    drawing.result(20)
    server.api.util_wait_for_ready(check_interval=0.01)
    idle = server.api.get_progress()
    assert idle["progress"] == 0 and idle["state"]["job_count"] == 0 and idle["current_image"] is None


def started(server: Served, beside: ThreadPoolExecutor, number: int, **fields: Any) -> Future[Any]:
    """A request of which ``number`` pictures have begun."""
    server.service.step_seconds = 0.01
    found = beside.submit(server.api.txt2img, prompt="a cat", seed=3, width=64, height=48, steps=140, **fields)
    until(lambda: len(server.service.running) == number)
    until(lambda: server.api.get_progress()["state"]["sampling_step"])
    return found


def test_interrupting_gives_what_there_is(server: Served, beside: ThreadPoolExecutor) -> None:
    drawing = started(server, beside, 3, batch_size=3)
    server.api.interrupt()
    assert len(drawing.result(20).images) == 3


def test_what_has_not_begun_is_left_out(server: Served, beside: ThreadPoolExecutor) -> None:
    server.service.held = True
    drawing = beside.submit(server.api.txt2img, prompt="a cat", n_iter=2, **SMALL)
    until(lambda: server.api.get_progress()["state"]["job_count"])
    server.api.interrupt()
    assert drawing.result(20).images == []
    assert len(server.service.cancelled) == 2


def test_skipping_ends_the_iteration_at_hand(server: Served, beside: ThreadPoolExecutor) -> None:
    drawing = started(server, beside, 4, n_iter=2, batch_size=2)
    server.api.skip()
    second = until(lambda: (own := server.api.get_progress()["state"])["job"] == "Batch 2 out of 2" and own)
    assert second["skipped"] and not drawing.done()
    server.api.interrupt()
    assert len(drawing.result(20).images) == 4


def test_a_client_that_leaves_is_not_drawn_for(server: Served) -> None:
    server.service.held = True
    with pytest.raises(requests.exceptions.ReadTimeout):
        requests.post(f"{server.url}/sdapi/v1/txt2img", json={"prompt": "a cat", "n_iter": 2, **SMALL}, timeout=0.3)
    until(lambda: len(server.service.cancelled) == 2)
    assert until(lambda: server.api.get_progress()["state"]["job_count"] == 0)


def test_what_fails_is_said_with_its_status(server: Served) -> None:
    service = server.service
    service.room = 1
    response = server.post(T, {"prompt": "a cat", "n_iter": 2, **SMALL})
    assert (response.status_code, response.headers["Retry-After"]) == (429, "7")
    assert response.json()["detail"] == "the queue is full"
    service.room = None
    for failure, status in ((DeadlineError("too late"), 504), (DrawingError("it failed"), 500)):
        service.failure = failure
        response = server.post(T, {"prompt": "a cat", "n_iter": 3, **SMALL})
        assert response.status_code == status
        assert response.json()["detail"] == str(failure)
        until(lambda: not service.running)
    with pytest.raises(RuntimeError, match="it failed"):
        server.api.txt2img(prompt="a cat", **SMALL)


def test_the_settings_in_a_picture(server: Served) -> None:
    image = server.api.txt2img(prompt="a cat, a hat", negative_prompt="a dog", seed=9, **SMALL).image
    found = server.api.png_info(image)
    assert found.info == image.info["parameters"]
    told = {name: found.parameters[name] for name in ("Prompt", "Negative prompt", "Seed", "Steps", "Size-1", "Size-2")}
    assert told == {
        "Prompt": "a cat, a hat",
        "Negative prompt": "a dog",
        "Seed": "9",
        "Steps": "4",
        "Size-1": "64",
        "Size-2": "48",
    }
    assert server.api.png_info(Image.new("RGB", (4, 4))).info == ""
    assert server.post("png-info", {"image": "/etc/passwd."}).status_code == 422


def test_what_is_not_here_is_empty_or_refused(server: Served) -> None:
    api = server.api
    assert not (api.has_controlnet or api.has_adetailer or api.has_animatediff)
    for ask in (
        api.get_upscalers,
        api.get_hypernetworks,
        api.get_face_restorers,
        api.get_prompt_styles,
        api.get_sd_vae,
    ):
        assert ask() == []
    assert api.get_embeddings() == {"loaded": {}, "skipped": {}}
    assert api.refresh_checkpoints() is None
    for name in ("interrogate", "extra-single-image", "server-kill", "memory"):
        response = server.post(name, {})
        assert (response.status_code, response.json()) == (404, {"detail": f"{name} is not supported here"})


def test_no_pictures_where_none_are_wanted(server: Served) -> None:
    found = server.api.txt2img(prompt="a cat", send_images=False, seed=1, **SMALL)
    assert found.images == [] and found.info["all_seeds"] == [1]


def test_one_key_neither_sees_nor_ends_what_another_asked_for(beside: ThreadPoolExecutor) -> None:
    service = FakeService(step_seconds=0.01)
    with served(application(service, alice="a" * 20, bob="b" * 20)) as url:
        server = Served(url, service)
        alice, bob = (server.client(username=name, password=name[0] * 20) for name in ("alice", "bob"))
        assert server.post(T, {"prompt": "a cat"}).status_code == 401
        drawing = beside.submit(alice.txt2img, prompt="a cat", width=64, height=48, steps=100)
        until(lambda: service.running)
        assert bob.get_progress()["state"]["job_count"] == 0
        bob.interrupt()
        bob.skip()
        time.sleep(0.05)
        assert not drawing.done() and not service.cancelled
        until(lambda: alice.get_progress()["state"]["sampling_step"])
        alice.interrupt()
        assert len(drawing.result(20).images) == 1
