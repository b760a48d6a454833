"""Pictures that share runs, as they do on a GPU and small ones on a CPU: which, how often, that they stay the same.

How many rows ONNX Runtime on the CPU takes is set here, but where that itself is tested. Pictures of a call are
compared with the same call one by one, and are the same to the byte: sums have one order, whatever else is in a run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from calotype.engine.cpu import build_engines
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.form import INT8
from calotype.runtime.denoising.acceleration import Acceleration
from calotype.runtime.denoising.denoiser import Denoiser
from calotype.runtime.denoising.guidance import Guidance
from calotype.runtime.denoising.job import Job
from calotype.runtime.diagnostics.benchmark import InstantSession
from calotype.runtime.picture import Output, StepEnd
from calotype.runtime.pictures.autoencoder import Tiles, Vae
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.schedulers import create_solver
from calotype.runtime.sessions.onnxruntime_cpu import OnnxRuntimeCpuSession
from calotype.runtime.sessions.traced import Trace
from tests.runtime.conftest import Model

LONG = "red apple " * 60  # more than one chunk of tokens
SETTINGS: dict[str, Any] = {"seed": 3, "num_inference_steps": 3, "output_type": "np"}
Allow = Callable[[int], None]


@pytest.fixture(scope="module")
def pipeline(tiny_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(tiny_bundle, "cpu") as opened:
        yield opened


@pytest.fixture
def allow(monkeypatch: pytest.MonkeyPatch) -> Allow:
    """Let the CPU take so many rows, or so many pictures in the decoder; of one picture to begin with."""

    def set_most(most: int) -> None:
        monkeypatch.setattr(OnnxRuntimeCpuSession, "capacity", lambda *_: most)

    set_most(1)
    return set_most


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(pictures, rows) of each run of the UNet."""
    seen: list[tuple[int, int]] = []
    original = Denoiser.run

    def record(self: Denoiser, jobs: Sequence[Job]) -> None:
        seen.append((len(jobs), sum(job.rows for job in jobs)))
        original(self, jobs)

    monkeypatch.setattr(Denoiser, "run", record)
    return seen


def check_equal(got: Output, wanted: Output) -> None:
    assert got.seeds == wanted.seeds
    for picture, alone in zip(got.images, wanted.images, strict=True):
        np.testing.assert_array_equal(picture, alone)
    assert len({picture.tobytes() for picture in got.images}) == len(got.images)


@pytest.mark.parametrize("scheduler", ["ddpm", "euler", "dpmpp-2m", "heun"])
def test_as_many_as_fit_share_a_run(
    scheduler: str, pipeline: Pipeline, allow: Allow, runs: list[tuple[int, int]]
) -> None:
    settings = SETTINGS | {"scheduler": scheduler, "negative_prompt": ["le", "a", "", "red", "le"]}
    prompts = ["red", "le", "apple", "a", "red apple"]
    wanted = pipeline(prompts, **settings)
    assert set(runs) == {(1, 2)}
    evaluations = len(runs) // 5
    runs.clear()
    allow(5)
    got = pipeline(prompts, **settings)
    assert runs == [(2, 4)] * evaluations + [(2, 4)] * evaluations + [(1, 2)] * evaluations
    assert len(got.timings.runs) == len(runs)
    check_equal(got, wanted)


def test_pictures_with_as_many_tokens_share_however_many_rows_they_take(
    pipeline: Pipeline, allow: Allow, runs: list[tuple[int, int]]
) -> None:
    prompts = ["red", LONG, "apple", "a", LONG, "le"]
    settings = SETTINGS | {"guidance_scale": [1, 4, 3, 0, 7.5, 2]}
    wanted = pipeline(prompts, **settings)
    runs.clear()
    allow(8)
    got = pipeline(prompts, **settings)
    # Red and a, without guidance, beside apple and le; the long ones.
    assert runs == [(4, 6)] * 3 + [(2, 4)] * 3
    check_equal(got, wanted)


@pytest.mark.parametrize(
    "acceleration",
    [
        Acceleration(guidance_interval=(0.5, 3)),
        Acceleration(cache_interval=2),
        Acceleration(cache_interval=3, guidance_interval=(0.5, 3)),
    ],
)
def test_with_caching_and_where_guidance_comes_and_goes(
    acceleration: Acceleration, pipeline: Pipeline, allow: Allow, runs: list[tuple[int, int]]
) -> None:
    settings = SETTINGS | {"num_inference_steps": 7, "fast": acceleration, "guidance_scale": [3, 1, 7.5, 4]}
    wanted = pipeline("red apple", num_images_per_prompt=4, **settings)
    alone = [rows for _, rows in runs[:7]]
    assert set(alone) == ({2} if acceleration.guidance_interval is None else {1, 2})
    runs.clear()
    allow(6)
    got = pipeline("red apple", num_images_per_prompt=4, **settings)
    if acceleration.caches:
        # The unguided one shares the runs of the same network, as long as rows are left.
        assert sum(rows for _, rows in runs) == sum(3 * rows for rows in alone) + 7
        assert len(runs) < 4 * 7
    else:
        assert max(rows for _, rows in runs) <= 6
        assert len(runs) <= 2 * 7
    check_equal(got, wanted)


def test_a_deep_feature_serves_its_own_picture_in_a_batch(tiny_bundle: Path, allow: Allow) -> None:
    """Runs of the two graphs, counted where they run: 2 whole ones and 4 shallow ones for all three."""
    trace, fast = Trace(), Acceleration(cache_interval=3)
    allow(6)
    with Pipeline(Bundle.open(tiny_bundle), "cpu", trace=trace, fast=fast) as watched:
        watched("red", num_images_per_prompt=3, **SETTINGS | {"num_inference_steps": 6})
    assert {name: trace.networks[name].runs for name in ("unet_deep", "unet_shallow")} == {
        "unet_deep": 2,
        "unet_shallow": 4,
    }


def test_with_one_network_in_memory_at_a_time(tiny_bundle: Path, pipeline: Pipeline, allow: Allow) -> None:
    wanted, trace = pipeline("red", num_images_per_prompt=3, **SETTINGS), Trace()
    allow(6)
    with Pipeline(Bundle.open(tiny_bundle), "cpu", low_memory=True, trace=trace) as turns:
        got = turns("red", num_images_per_prompt=3, **SETTINGS)
    assert trace.networks["unet"].runs == 3
    check_equal(got, wanted)


@pytest.mark.parametrize("kind", ["masked", "inpainting", "sdxl", "lcm"])
def test_every_kind_of_input_is_each_picture_s_own(
    kind: str, tiny_bundle: Path, request: pytest.FixtureRequest, allow: Allow, runs: list[tuple[int, int]]
) -> None:
    fixtures = {"inpainting": "sd2_inpainting", "sdxl": "sdxl", "lcm": "lcm"}
    settings = SETTINGS | {"guidance_scale": [3, 5, 7]}
    if kind in ("masked", "inpainting"):
        pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
        mask = Image.new("L", (32, 32))
        mask.paste(255, (8, 8, 32, 24))
        settings |= {"image": Image.fromarray(pixels), "mask_image": mask, "num_inference_steps": 4, "strength": 0.75}
    model: Model | None = request.getfixturevalue(fixtures[kind]) if kind in fixtures else None
    with Pipeline.load(tiny_bundle if model is None else model.bundle, "cpu") as opened:
        wanted = opened(["red", "le", "apple"], **settings)
        single = len(runs)
        runs.clear()
        allow(6)
        check_equal(opened(["red", "le", "apple"], **settings), wanted)
    assert single == 3 * len(runs)
    assert {pictures for pictures, _ in runs} == {3}


def test_a_callback_sees_each_picture_s_steps_and_stops_all(pipeline: Pipeline, allow: Allow) -> None:
    """What is finished then is returned with its own seed, whatever was to be drawn between."""
    allow(4)
    seen: list[tuple[int, int, int]] = []

    def until(count: int) -> Callable[[StepEnd], bool]:
        seen.clear()

        def see(end: StepEnd) -> bool:
            seen.append((end.image, end.step, end.steps))
            return len(seen) < count

        return see

    settings, prompts = SETTINGS | {"num_inference_steps": 2}, ["a", LONG, "a"]
    output = pipeline(prompts, callback_on_step_end=until(9), **settings)
    assert seen == [(0, 1, 2), (2, 1, 2), (0, 2, 2), (2, 2, 2), (1, 1, 2), (1, 2, 2)]
    assert output.seeds == [3, 4, 5]
    stopped = pipeline(prompts, callback_on_step_end=until(5), **settings)
    assert stopped.seeds == [3, 5]
    for picture, number in zip(stopped.images, (0, 2), strict=True):
        np.testing.assert_array_equal(picture, output.images[number])
    assert pipeline(prompts, callback_on_step_end=until(2), **settings).images == []


def test_small_pictures_share_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Talbot's, by default, with engines too: as many as have the pixels of one of 256 x 256 share every network's."""
    monkeypatch.setenv("CALOTYPE_CACHE", str(tmp_path))
    settings: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}
    for built in (False, True):
        if built:
            build_engines(Bundle.open("talbot"), networks=["unet", "vae_decoder"])
        trace = Trace()
        with Pipeline.load("talbot", "cpu") as plain, Pipeline.load("talbot", "cpu", trace=trace) as watched:
            assert (plain.engines["unet"] is not None) == built
            together = watched("red apple", num_images_per_prompt=5, seed=7, **settings)
            counts = {name: trace.networks[name].runs for name in ("unet", "vae_decoder")}
            assert counts == {"unet": 2 * 2, "vae_decoder": 2}  # four, and the fifth
            for number, picture in enumerate(together.images):
                np.testing.assert_array_equal(plain("red apple", seed=7 + number, **settings).images[0], picture)


def test_large_pictures_and_int8_keep_their_runs(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    specs = bundle.manifest.networks
    side = {"height": 16, "width": 16}
    with OnnxRuntimeCpuSession(bundle.path, specs["unet"]) as unet:
        assert unet.capacity({"tokens": 77, **side}) == 8
        assert unet.capacity({"tokens": 77, "height": 64, "width": 64}) == 2
        unet._form = INT8
        assert unet.capacity({"tokens": 77, **side}) == 2
        assert not unet.keeps_bytes
    with OnnxRuntimeCpuSession(bundle.path, specs["vae_decoder"]) as decoder:
        assert decoder.capacity(side) == 4


def test_in_int8_no_two_pictures_share_a_run() -> None:
    """The values of a run share one scale there: rows of two pictures would change each other."""

    class Int8(InstantSession):
        keeps_bytes = False

    unet = Int8(4, 768, capacity=2)
    denoiser = Denoiser(lambda _: unet)
    jobs = [dataclasses.replace(new_job(value, "ddim", scale=1.0), form=INT8) for value in (1, 2)]
    assert denoiser.pick(jobs) == jobs[:1]


def test_pictures_in_tiles_share_no_run(tiny_bundle: Path, allow: Allow) -> None:
    allow(8)
    latents = list(np.random.default_rng(0).standard_normal((3, 4, 12, 12), np.float32))
    with Vae.load(tiny_bundle, "cpu", Tiles(size=8, overlap=4)) as vae:
        for picture, own in zip(vae.decode_all(latents), latents, strict=True):
            np.testing.assert_array_equal(picture, vae.decode(own))


def new_job(value: float, scheduler: str, steps: int = 20, side: int = 8, scale: float = 7.5) -> Job:
    """A job of embeddings and latents that are ``value``; for the negative prompt minus that."""
    solver, shape = create_solver(scheduler, {}, steps), (4, side, side)
    row = np.full((77, 768), value, np.float32)
    return Job(
        latents=np.full(shape, value, np.float32),
        conditional={"encoder_hidden_states": row},
        unconditional={"encoder_hidden_states": -row} if scale > 1 else None,
        guidance=Guidance(scale=scale),
        solver=solver,
        state=solver.new_state(shape),
        rng=np.random.default_rng(0),
    )


def test_a_timestep_is_each_row_s_own() -> None:
    unet = InstantSession(4, 768, capacity=4)
    denoiser, jobs = Denoiser(lambda _: unet), [new_job(1, "ddim"), new_job(2, "dpmpp-2m")]
    assert denoiser.pick(jobs) == jobs
    denoiser.run(jobs)
    sizes = {"rows": 4, "height": 8, "width": 8, "tokens": 77}
    one, other = (float(job.solver.timesteps[0]) for job in jobs)
    assert one != other
    assert unet.buffer("timestep", sizes).tolist() == [one, one, other, other]
    assert unet.buffer("encoder_hidden_states", sizes)[:, 0, 0].tolist() == [1, -1, 2, -2]
    assert unet.buffer("sample", sizes)[:, 0, 0, 0].tolist() == [1, 1, 2, 2]


def test_jobs_of_other_sizes_run_apart_and_of_other_steps_together() -> None:
    kinds: list[dict[str, Any]] = [{}, {"steps": 9}, {"side": 16}, {}, {"side": 16}, {}]
    jobs = [new_job(1, "euler", **kind) for kind in kinds]
    denoiser = Denoiser(lambda _: InstantSession(4, 768, capacity=4))
    assert [jobs.index(job) for job in denoiser.pick(jobs)] == [0, 1]
    assert [jobs.index(job) for job in denoiser.pick(jobs[2:])] == [2, 4]
    single = Denoiser(lambda _: InstantSession(4, 768))
    assert single.pick(jobs) == jobs[:1]
