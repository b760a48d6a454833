"""The page, in Chromium and on a real socket, with a service that draws gradients."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from fastapi import FastAPI
from PIL import Image, PngImagePlugin

from calotype.runtime.adapters.named import NamedLora
from calotype.runtime.bundle.folder import BUNDLED
from calotype.runtime.bundle.manifest import Manifest
from calotype.serving import page
from calotype.serving.app import create_app
from calotype.serving.errors import DrawingError
from calotype.serving.http.drawing import Front, Settings
from calotype.serving.http.keys import Key
from calotype.serving.http.security import Access
from calotype.serving.page import offered
from calotype.serving.service import ModelState
from tests.serving.fakes import FakeService, picture, served

CHROMIUM = shutil.which("chromium")
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
PHONE = {"width": 375, "height": 740}
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


def application(service: FakeService, **keys: str) -> FastAPI:
    """With keys by their names."""
    known = tuple(Key(name=name, digest=hashlib.sha256(key.encode()).digest()) for name, key in keys.items())
    return create_app(Front(service, Settings(access=Access(keys=known))))


@pytest.fixture(scope="module")
def service() -> FakeService:
    return FakeService("talbot", "other")


@pytest.fixture(scope="module")
def url(service: FakeService) -> Iterator[str]:
    with served(application(service)) as found:
        yield found


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS.split())
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any, url: str) -> Iterator[Callable[..., Any]]:
    """Opens the page; whatever the browser complains of, such as a breach of the page's policy, is a failure."""
    contexts, wrong = [], []

    def opened(where: str = url, **options: Any) -> Any:
        contexts.append(chromium.new_context(**{"viewport": {"width": 1280, "height": 800}, **options}))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(60_000)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        # What the server refuses is said in the console, too.
        tab.on("console", lambda m: wrong.append(m.text) if m.type == "error" and "status of 4" not in m.text else None)
        tab.goto(where)
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert not wrong


@pytest.fixture(autouse=True)
def as_it_was(service: FakeService) -> Iterator[None]:
    yield
    service.held, service.failure, service.refusal, service.room, service.fails_after = False, None, None, None, 0
    service.step_seconds = 0.001
    until(lambda: service.load.running == 0 and service.load.waiting == 0)
    service.submitted.clear()
    service.cancelled.clear()
    for name in service.models:
        service.change(name, loras=())


def until(true: Callable[[], Any]) -> Any:
    """Wait until something is so."""
    end = time.monotonic() + 20
    while not (value := true()):
        assert time.monotonic() < end
        time.sleep(0.005)
    return value


def draw(tab: Any, prompt: str = "a cat", **fields: str) -> None:
    tab.wait_for_selector("#counts input", state="attached")
    tab.fill("#prompt", prompt)
    for name, value in fields.items():
        tab.fill(f"#{name}", value)
    tab.click("#submit")


def finished(tab: Any) -> None:
    tab.wait_for_selector("#caption:not([hidden])")
    tab.wait_for_selector("#submit:not([hidden])")


def said(tab: Any, name: str, text: str | re.Pattern[str]) -> None:
    """Wait until an element says something."""
    from playwright.sync_api import expect

    expect(tab.locator(f"#{name}")).to_have_text(text, timeout=60_000)


def png(image: Image.Image, text: str = "") -> bytes:
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    if text:
        info.add_text("parameters", text)
    image.save(file, format="PNG", pnginfo=info)
    return file.getvalue()


def bring(tab: Any, event: str, data: bytes, name: str = "photo.png", kind: str = "image/png") -> None:
    """Drop or paste a file."""
    tab.evaluate(
        """([event, data, name, kind]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([Uint8Array.from(atob(data), (c) => c.charCodeAt(0))], name, { type: kind }));
            const options = { bubbles: true, cancelable: true };
            document.body.dispatchEvent(event === "paste"
                ? new ClipboardEvent("paste", { ...options, clipboardData: transfer })
                : new DragEvent(event, { ...options, dataTransfer: transfer }));
        }""",
        [event, base64.b64encode(data).decode(), name, kind],
    )


def shown(tab: Any) -> Image.Image:
    """The picture in the middle."""
    data = tab.evaluate(
        """() => new Promise((resolve) => {
            const image = document.querySelector("#picture");
            const canvas = Object.assign(document.createElement("canvas"), {
                width: image.naturalWidth, height: image.naturalHeight });
            canvas.getContext("2d").drawImage(image, 0, 0);
            resolve(canvas.toDataURL("image/png").split(",")[1]);
        })"""
    )
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


# Without a browser


def test_files_have_their_types_a_policy_and_a_tag(url: str) -> None:
    for path, kind in (("/", "text/html"), ("/page/app.js", "text/javascript"), ("/page/style.css", "text/css")):
        response = requests.get(url + path, timeout=20)
        assert response.headers["Content-Type"] == f"{kind}; charset=utf-8"
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert response.headers["Cache-Control"] == "no-cache"
        again = requests.get(url + path, headers={"If-None-Match": response.headers["ETag"]}, timeout=20)
        assert (again.status_code, again.content) == (304, b"")
    for path in ("/page/", "/page/../page.py", "/page/%2e%2e/page.py", "/page/index.html", "/page/nothing.js"):
        assert requests.get(url + path, timeout=20).status_code == 404


def test_nothing_comes_from_anywhere_else() -> None:
    for path in page.FOLDER.iterdir():
        found = re.findall(r"https?://[^\s\"')]+", path.read_text("utf-8"))
        assert set(found) <= {"http://www.w3.org/2000/svg"}, path.name  # the name of a format, which nobody asks for


def test_every_file_is_in_the_wheel_and_short() -> None:
    assert {path.suffix for path in page.FOLDER.iterdir()} <= set(page.TYPES)
    for path in page.FOLDER.iterdir():
        assert len(path.read_text("utf-8").splitlines()) <= 300


def test_settings_and_pictures_need_a_key_where_the_server_wants_one(service: FakeService) -> None:
    with served(application(service, ann="k" * 20)) as url:
        assert requests.get(url, timeout=20).status_code == 200
        assert requests.get(f"{url}/ui/settings", timeout=20).status_code == 401
        assert requests.post(f"{url}/ui/read", json={"image": ""}, timeout=20).status_code == 401


def test_sizes_are_of_the_models_area_and_fit_it() -> None:
    manifest = Manifest.read(BUNDLED / "talbot")
    found = offered(ModelState(name="talbot", manifest=manifest, digest="0", ready=True))
    own, *others = ((size["width"], size["height"]) for size in found["sizes"])
    assert own == (manifest.defaults.width, manifest.defaults.height)
    for width, height in others:
        assert width != height and not width % found["downscale"] and not height % found["downscale"]
        assert 0.8 < width * height / (own[0] * own[1]) < 1.25


def test_what_a_picture_carries(url: str) -> None:
    def read(data: bytes) -> Any:
        body = {"image": f"data:image/png;base64,{base64.b64encode(data).decode()}"}
        response = requests.post(f"{url}/ui/read", json=body, timeout=20)
        return response.json()["settings"] if response.ok else response.status_code

    image = Image.new("RGB", (8, 8))
    theirs = "a cat\nNegative prompt: a dog\nSteps: 9, Sampler: DPM++ 2M Karras, CFG scale: 4.5, Seed: 3, Size: 64x32"
    assert read(png(image, theirs)) == {
        "prompt": "a cat",
        "negative_prompt": "a dog",
        "seed": 3,
        "steps": 9,
        "guidance_scale": 4.5,
        "width": 64,
        "height": 32,
        "model": None,
        "scheduler": "dpmpp-2m",
    }
    assert read(png(image, "a cat\nSteps: 9, Sampler: Restart"))["scheduler"] is None
    for data in (png(image), b"no picture", b""):
        assert read(data) is None
    assert requests.post(f"{url}/ui/read", json={"image": "https://example.com"}, timeout=20).status_code == 400


# With one


@pytest.mark.browser
@needs_chromium
def test_pictures_are_drawn_with_previews_and_kept(visit: Callable[..., Any], service: FakeService) -> None:
    service.step_seconds = 0.02
    tab = visit()
    tab.wait_for_selector("#counts input", state="attached")
    assert tab.evaluate("document.activeElement.id") == "prompt"
    tab.locator("#counts label").nth(1).click()
    draw(tab, "a cat", seed="7")
    tab.wait_for_selector("#picture.preview")
    assert 0 < int(tab.get_attribute("#progress", "aria-valuenow")) < 100
    assert tab.locator("#strip button").count() == 2
    finished(tab)
    assert np.array_equal(np.asarray(shown(tab)), picture(7, 128, 128))
    assert [task.request.seed for task in service.submitted] == [7, 8]
    assert tab.inner_text("#title").splitlines() == ["a cat", "seed 7 · 128 × 128 · talbot"]
    assert tab.text_content("#said") == "2 pictures are finished."
    tab.locator("#strip button").nth(1).click()
    assert "seed 8" in tab.inner_text("#title")
    with tab.expect_download() as download:
        tab.click("#download")
    assert download.value.suggested_filename == "a-cat-8.png"
    with Image.open(download.value.path()) as image:
        assert "Seed: 8" in image.info["parameters"]
    tab.fill("#seed", "")
    tab.click("#use-seed")
    assert tab.input_value("#seed") == "8"


@pytest.mark.browser
@needs_chromium
def test_all_settings_are_asked_for(visit: Callable[..., Any], service: FakeService) -> None:
    service.change("other", loras=("ink", "wash"))
    tab = visit()
    tab.wait_for_selector("#counts input", state="attached")
    assert tab.locator("#lora-field").is_hidden()
    tab.select_option("#model", "other")
    tab.click("#without summary")
    tab.fill("#negative_prompt", "a dog")
    tab.select_option("#size", "own")
    tab.click("#more summary")
    for name, value in (("num_inference_steps", "7"), ("guidance_scale", "2.5")):
        tab.evaluate("([id, value]) => { document.getElementById(id).value = value; }", [name, value])
    tab.select_option("#scheduler", "euler")
    tab.select_option("#loras", "ink")
    tab.evaluate("document.getElementById('lora-scale').value = 0.5")
    draw(tab, "a cat", width="64", height="96")
    finished(tab)
    (task,) = service.submitted
    request = task.request
    assert request.loras == (NamedLora(name="ink", scale=0.5),)
    assert (task.model, request.negative_prompt, request.scheduler) == ("other", "a dog", "euler")
    assert (request.width, request.height, request.num_inference_steps, request.guidance_scale) == (64, 96, 7, 2.5)
    tab.click("#defaults")
    assert tab.input_value("#scheduler") == "" and tab.input_value("#size") == "128x128"


@pytest.mark.browser
@needs_chromium
def test_steps_are_said_between_previews(visit: Callable[..., Any], service: FakeService) -> None:
    """Previews come at 5, 10 and 15 of 20 steps."""
    service.step_seconds = 0.1
    tab = visit()
    draw(tab)
    tab.wait_for_function(
        "() => { const found = /step (\\d+) of 20/i.exec(document.getElementById('status').textContent);"
        " return found && Number(found[1]) % 5; }"
    )
    finished(tab)


@pytest.mark.browser
@needs_chromium
def test_cancelling_ends_the_work(visit: Callable[..., Any], service: FakeService) -> None:
    service.held = True
    tab = visit()
    draw(tab)
    until(lambda: service.submitted)
    assert tab.evaluate("document.activeElement.id") == "cancel"
    tab.keyboard.press("Escape")
    until(lambda: len(service.cancelled) == 1)
    tab.wait_for_selector("#submit:not([hidden])")
    assert tab.locator("#strip button").count() == 0
    assert tab.is_visible("#blank")


@pytest.mark.browser
@needs_chromium
def test_errors_are_said_in_words_at_their_field(visit: Callable[..., Any], service: FakeService) -> None:
    tab = visit()
    tab.wait_for_selector("#counts input", state="attached")
    draw(tab, seed="-1")
    assert tab.inner_text("#error") == "A seed is a whole number. Leave it empty for any."
    assert tab.evaluate("document.activeElement.id") == "seed"
    assert tab.get_attribute("#seed", "aria-invalid") == "true"
    service.room = 0
    draw(tab, seed="1")
    said(tab, "error", "The queue is full. Try again in 7 s.")
    assert tab.get_attribute("#seed", "aria-invalid") is None
    service.room, service.failure = None, DrawingError("the engine failed")
    draw(tab)
    said(tab, "error", "The engine failed.")
    service.failure = None
    draw(tab, "a" * 5000)
    said(tab, "error", re.compile("at most 4000"))
    assert tab.evaluate("document.activeElement.id") == "prompt"
    draw(tab)
    finished(tab)
    assert tab.text_content("#error") == ""


@pytest.mark.browser
@needs_chromium
def test_a_picture_to_begin_with_and_a_mask(visit: Callable[..., Any], service: FakeService) -> None:
    tab = visit()
    tab.wait_for_selector("#counts input", state="attached")
    bring(tab, "drop", png(Image.new("RGB", (96, 64), "red")))
    tab.wait_for_selector("#begun:not([hidden])")
    assert tab.input_value("#size") == "96x64"
    tab.click("#paint")
    box = tab.locator("#canvas").bounding_box()
    x, y, width, height = (box[name] for name in ("x", "y", "width", "height"))
    tab.mouse.move(x + width / 4, y + height / 4)
    tab.mouse.down()
    tab.mouse.move(x + width / 4, y + 3 * height / 4, steps=4)
    tab.mouse.up()
    for _ in range(2):  # a stroke on the right, taken back
        tab.mouse.click(x + 3 * width / 4, y + height / 2)
    tab.keyboard.press("Control+z")
    tab.click("#undo")
    tab.locator("#mask label", has_text="Eraser").click()
    tab.mouse.click(x + width / 4, y + height / 2)
    tab.click("#mask-done")
    said(tab, "paint", "Change the mask")
    draw(tab)
    finished(tab)
    (task,) = service.submitted
    request = task.request
    assert (request.strength, request.feather) == (0.6, 4)
    assert np.asarray(request.image)[0, 0].tolist() == [255, 0, 0]
    mask = np.asarray(request.mask_image) > 0
    assert mask.shape == (64, 96)
    assert mask[16, 24] and mask[48, 24]
    assert not mask[32, 24] and not mask[32, 72] and not mask[0, 0]
    tab.click("#remove")
    draw(tab)
    until(lambda: len(service.submitted) == 2)
    assert service.submitted[1].request.image is None


@pytest.mark.browser
@needs_chromium
def test_a_mask_by_keyboard_alone(visit: Callable[..., Any], service: FakeService) -> None:
    tab = visit()
    tab.wait_for_selector("#counts input", state="attached")
    bring(tab, "paste", png(Image.new("RGB", (64, 64), "blue")))
    tab.wait_for_selector("#begun:not([hidden])")
    tab.focus("#paint")
    tab.keyboard.press("Enter")
    for key in ("ArrowLeft", "Shift+ArrowUp", "Space", "Space", "z", "Escape"):
        tab.keyboard.press(key)
    until(lambda: tab.evaluate("document.activeElement.id") == "paint")
    tab.focus("#prompt")
    tab.keyboard.type("a cat")
    tab.keyboard.press("Control+Enter")
    finished(tab)
    mask = np.asarray(service.submitted[0].request.mask_image) > 0
    assert mask[27, 31] and not mask[50, 50]


@pytest.mark.browser
@needs_chromium
def test_the_settings_of_a_picture_come_back(visit: Callable[..., Any], service: FakeService) -> None:
    tab = visit()
    draw(tab, "a cat, noto style", seed="11")
    finished(tab)
    with tab.expect_download() as download:
        tab.click("#download")
    data = Path(download.value.path()).read_bytes()
    tab.reload()
    tab.wait_for_selector("#counts input", state="attached")
    bring(tab, "drop", data)
    tab.click("#use-found")
    assert tab.input_value("#prompt") == "a cat, noto style" and tab.input_value("#seed") == "11"
    assert tab.is_hidden("#begun")
    tab.click("#submit")
    finished(tab)
    first, second = (task.request for task in service.submitted)
    assert (first.seed, first.width, first.num_inference_steps) == (
        second.seed,
        second.width,
        second.num_inference_steps,
    )
    bring(tab, "drop", b"no picture", "notes.txt", "text/plain")
    said(tab, "error", "That is not a picture. PNG, JPEG and WebP are.")
    bring(tab, "drop", b"no picture", "broken.png")
    said(tab, "error", re.compile("^broken.png is not a picture"))


@pytest.mark.browser
@needs_chromium
def test_everything_is_reached_and_named_by_keyboard(visit: Callable[..., Any]) -> None:
    tab = visit()
    tab.wait_for_selector("#counts input", state="attached")
    tab.keyboard.type("a cat")
    reached = []
    for _ in range(14):
        tab.keyboard.press("Tab")
        reached.append(
            tab.evaluate("document.activeElement.id || document.activeElement.name || document.activeElement.tagName")
        )
        focused = tab.evaluate("""() => {
            const own = document.activeElement;
            const shown = own.matches(".choices input") ? own.nextElementSibling : own;
            return own === document.body || getComputedStyle(shown).outlineStyle !== "none";
        }""")
        assert focused, reached
    assert {"SUMMARY", "submit", "choose", "model", "n", "size", "seed", "any-seed"} <= set(reached)
    nameless = tab.evaluate("""() => [...document.querySelectorAll("input, select, textarea, button, a, canvas, img")]
        .filter((own) => own.tagName === "IMG" ? own.getAttribute("alt") === null
            : !(own.labels?.length || own.getAttribute("aria-label") || own.textContent.trim()))
        .map((own) => own.id || own.outerHTML)""")
    assert nameless == []
    tab.focus("#prompt")
    tab.keyboard.press("Control+Enter")
    finished(tab)


@pytest.mark.browser
@needs_chromium
def test_on_a_phone_nothing_is_cut_off(visit: Callable[..., Any]) -> None:
    tab = visit(viewport=PHONE, has_touch=True, is_mobile=True, device_scale_factor=2)
    tab.wait_for_selector("#counts input", state="attached")
    tab.locator("#counts label").nth(3).tap()
    draw(tab, "a cat with a very long description, " * 4)
    finished(tab)
    tab.click("#more summary")
    bring(tab, "drop", png(Image.new("RGB", (900, 600), "red")))
    tab.wait_for_selector("#begun:not([hidden])")
    too_wide = """() => document.documentElement.scrollWidth > innerWidth
        || [...document.querySelectorAll("main *:not(#strip *), dialog[open] *")]
            .some((own) => own.getBoundingClientRect().right > innerWidth + 1)"""
    assert not tab.evaluate(too_wide)
    small = tab.evaluate("""() => [...document.querySelectorAll("button, select, a.button")]
        .filter((own) => own.offsetParent && !own.matches(".link") && own.getBoundingClientRect().height < 40)
        .map((own) => own.id)""")
    assert small == []
    tab.click("#paint")
    box = tab.locator("#canvas").bounding_box()
    tab.touchscreen.tap(box["x"] + 50, box["y"] + 50)
    assert not tab.evaluate(too_wide)
    tab.click("#mask-done")
    said(tab, "paint", "Change the mask")


def contrast(first: str, second: str) -> float:
    """Of two colours ``rgb(r, g, b)``, by WCAG 2."""

    def light(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    low, high = sorted((light(first), light(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read_by_day_and_by_night(visit: Callable[..., Any], scheme: str) -> None:
    tab = visit(color_scheme=scheme, reduced_motion="reduce")
    tab.wait_for_selector("#counts input", state="attached")
    colour = "(id) => getComputedStyle(document.querySelector(id)).color"
    back = "(id) => getComputedStyle(document.querySelector(id)).backgroundColor"
    page_colour, card = tab.evaluate(back, "body"), tab.evaluate(back, "#frame")
    assert (contrast(page_colour, "rgb(0, 0, 0)") < 2) == (scheme == "dark")
    for name, behind in (("body", page_colour), (".quiet", card), ("label", page_colour), ("#error", page_colour)):
        assert contrast(tab.evaluate(colour, name), behind) >= 4.5, name
    assert contrast(tab.evaluate(colour, "#submit"), tab.evaluate(back, "#submit")) >= 4.5
    assert tab.evaluate("getComputedStyle(document.querySelector('#bar')).transitionDuration") == "0s"


@pytest.mark.browser
@needs_chromium
def test_a_key_is_asked_for_and_a_model_waited_for(visit: Callable[..., Any], service: FakeService) -> None:
    service.change("talbot", ready=False, why="its networks are being opened")
    try:
        with served(application(service, ann="k" * 20)) as url:
            tab = visit(url)
            tab.wait_for_selector("#entry:not([hidden])")
            tab.fill("#key", "wrong")
            tab.keyboard.press("Enter")
            said(tab, "entry-error", "This key is not known here.")
            tab.fill("#key", "k" * 20)
            tab.keyboard.press("Enter")
            tab.wait_for_selector("#main:not([hidden])")
            said(tab, "server", "talbot is not open yet: its networks are being opened.")
            service.change("talbot", ready=True, why="")
            said(tab, "server", "talbot")
            draw(tab)
            finished(tab)
            assert service.submitted[0].client == "ann"
            tab.close()
    finally:
        service.change("talbot", ready=True, why="")
