"""The GPU sessions over stand-ins for CUDA and TensorRT: order, addresses, errors. See ``cuda_standin.py``."""

from __future__ import annotations

import dataclasses
import functools
import logging
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from calotype.engine.build import Options, _job, _key
from calotype.engine.cache import Built, obtain
from calotype.engine.profiles import Profile, Range, default_profile
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.form import Form, default_form
from calotype.runtime.bundle.manifest import CACHING
from calotype.runtime.denoising.denoiser import Denoiser
from calotype.runtime.denoising.guidance import Guidance
from calotype.runtime.denoising.job import Job
from calotype.runtime.errors import BackendError, BuildError, InputError, MissingPackageError
from calotype.runtime.pipeline import Pipeline
from calotype.runtime.schedulers import create_solver
from calotype.runtime.sessions import choose_backend, libraries, open_session, tensorrt
from calotype.runtime.sessions.cuda import load_cuda
from calotype.runtime.sessions.session import Session
from calotype.runtime.sessions.tensorrt import TensorRtSession
from tests.runtime import cuda_standin
from tests.runtime.cuda_standin import Cuda, Status

BUNDLE = Bundle.open("talbot")
UNET = BUNDLE.manifest.networks["unet"]
SIZES = {"rows": 2, "tokens": 32, "height": 8, "width": 8}
ONE_ROW = {**SIZES, "rows": 1}
UP, DOWN = cuda_standin.Kind.cudaMemcpyHostToDevice, cuda_standin.Kind.cudaMemcpyDeviceToHost


def network(inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """What the stand-in's plans compute: something that depends on every row of two inputs."""
    if "deep_feature" in inputs:
        return {"noise_pred": inputs["deep_feature"][:, :16] + inputs["timestep"][:, None, None, None]}
    if "sample" in inputs:
        noise_pred = inputs["sample"] * 2 + inputs["timestep"][:, None, None, None]
        return {"noise_pred": noise_pred, "deep_feature": noise_pred.repeat(6, 1)}
    if "latents" in inputs:
        return {"image": inputs["latents"][:, :3].repeat(8, 2).repeat(8, 3)}
    return {"hidden_states": np.repeat(inputs["input_ids"][..., None], 192, 2).astype(np.float32)}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CALOTYPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "plans"


@pytest.fixture
def library(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> cuda_standin.Library:
    specs = [spec for item in BUNDLE.manifest.networks.values() for spec in (*item.inputs, *item.outputs)]
    standin = cuda_standin.Library(cuda, network, {spec.name: spec.dtype for spec in specs})
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", standin)  # type: ignore[arg-type]
    monkeypatch.setitem(libraries.MODULES, "tensorrt", ("no_such_module",))
    monkeypatch.setattr("calotype.runtime.sessions._onnxruntime_has_cuda", lambda: False)
    return standin


def keep_plan(
    name: str = "unet",
    options: Options | None = None,
    profiles: list[Profile] | None = None,
    precision: str = "float32",
) -> Path:
    """Put a record into the cache as a build would, of a plan that is a few bytes."""
    profiles = profiles or [default_profile(BUNDLE.manifest)]
    options, job = options or Options(precision=precision), _job(BUNDLE, name, profiles, precision)
    key = _key(BUNDLE, libraries.load_library("tensorrt-rtx"), job, profiles, options, None)
    tensors = {
        "profiles": [
            {tensor: [list(shape) for shape in bounds] for tensor, bounds in shapes.items()} for shapes in job.shapes
        ]
    }
    return obtain(key, lambda: Built(plan=b"a plan", tensors=tensors, figures={}), lambda _: None)


def open_unet(**options: Any) -> Session:
    return open_session(BUNDLE.path, UNET, "tensorrt-rtx", **options)


def step(session: Session, sizes: dict[str, int], timestep: float) -> None:
    """One run, compared with what the network computes."""
    sample = session.buffer("sample", sizes)
    sample[:] = np.arange(sample.size).reshape(sample.shape)
    session.buffer("timestep", sizes)[:] = timestep
    session.run(sizes)
    np.testing.assert_array_equal(session.buffer("noise_pred", sizes), sample * 2 + np.float32(timestep))


def test_a_step_is_one_launch_copies_what_was_written_and_allocates_nothing(
    cuda: Cuda, library: cuda_standin.Library
) -> None:
    keep_plan()
    with open_unet() as session:
        session.reserve(SIZES)
        step(session, SIZES, 1)
        before, copied = Counter(cuda.calls), Counter(cuda.copied)
        for timestep in range(20):
            step(session, SIZES, timestep)
        copies = Counter({"cudaMemcpyAsync": 2 * 20})  # those of the output are in the graph
        assert cuda.calls - before == Counter({"cudaGraphLaunch": 20, "cudaStreamSynchronize": 20}) + copies
        sample, timesteps = 4 * 2 * 16 * 8 * 8, 4 * 2
        assert cuda.copied - copied == Counter({(UP, sample): 20, (UP, timesteps): 20, (DOWN, sample): 20})
        assert library.contexts == 1


def test_one_graph_a_shape_and_the_oldest_is_given_back(
    cuda: Cuda, library: cuda_standin.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TensorRtSession, "most_shapes", 8)
    keep_plan()
    with open_unet() as session:
        for sizes in (SIZES, ONE_ROW, SIZES, ONE_ROW):
            step(session, sizes, 3)
        assert (len(cuda.graphs), library.contexts, session.generation) == (2, 2, 0)
        for rows in range(1, 9):
            for tokens in (32, 64):
                step(session, {**SIZES, "rows": rows, "tokens": tokens}, 5)
        assert len(cuda.graphs) == 8
        assert session.generation == 8


def test_buffers_that_are_large_are_kept_for_fewer_sizes(
    cuda: Cuda, library: cuda_standin.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TensorRtSession, "kept_bytes", 200_000)
    keep_plan()
    with open_unet() as session:
        for rows in range(1, 9):
            step(session, {**SIZES, "rows": rows}, 5)
        pinned = sum(len(memory) for memory in cuda.host.values())
        assert pinned < 200_000 + 8 * 40_000  # the one in use beside
        assert len(cuda.graphs) == library.contexts - session.generation < 8


def new_job(number: int, interval: tuple[float, float] | None = None) -> Job:
    """A guided picture of 8 x 8 latents, its embeddings its number."""
    solver, row = create_solver("euler", {}, 12), np.full((32, 192), number, np.float32)
    return Job(
        latents=np.full((16, 8, 8), number, np.float32),
        conditional={"encoder_hidden_states": row},
        unconditional={"encoder_hidden_states": -row},
        guidance=Guidance(scale=3.0, interval=interval),
        solver=solver,
        state=solver.new_state((16, 8, 8)),
        rng=np.random.default_rng(number),
    )


@pytest.mark.parametrize("guided_from", [None, 3.0])
def test_a_step_of_several_pictures_is_one_launch_and_allocates_nothing(
    guided_from: float | None, cuda: Cuda, library: cuda_standin.Library
) -> None:
    """Also where guidance ends on the way and the rows become fewer: that shape was made ready before."""
    keep_plan()
    interval = None if guided_from is None else (guided_from, 1e9)
    with open_unet() as session:
        denoiser, jobs = Denoiser(lambda _: session), [new_job(number, interval) for number in range(6)]
        assert jobs[0].rows_to_come == ({2} if interval is None else {1, 2})
        batch = denoiser.pick(jobs)
        assert batch == jobs[:4]  # the profile has eight rows
        denoiser.reserve(batch)
        before, contexts = Counter(cuda.calls), library.contexts
        for _ in range(12):
            denoiser.step(batch)
        assert all(job.done for job in batch)
        calls = cuda.calls - before
        assert calls.pop("cudaMemcpyAsync") <= 3 * 12
        assert calls == Counter({"cudaGraphLaunch": 12, "cudaStreamSynchronize": 12})
        assert library.contexts == contexts == (1 if interval is None else 2)
        for job in batch:
            alone = new_job(jobs.index(job), interval)
            while not alone.done:
                denoiser.step([alone])
            np.testing.assert_array_equal(job.latents, alone.latents)


@pytest.mark.parametrize(
    ("ranges", "most"), [("1:2:8", 8), ("2", 2), ("8", 8), ("1:2:2 8", 8), ("3:4:6", 6), ("3", 2), ("1:8:20", 16)]
)
@pytest.mark.usefixtures("library")
def test_so_many_rows_are_taken_as_a_profile_has(ranges: str, most: int) -> None:
    """Fewer than a profile has are filled up, and the number is one of the few that runs have."""
    base = default_profile(BUNDLE.manifest)
    keep_plan(
        profiles=[
            dataclasses.replace(base, name=text.replace(":", "-"), batch=Range.parse(text)) for text in ranges.split()
        ]
    )
    with open_unet() as session:
        sizes = {name: size for name, size in SIZES.items() if name != "rows"}
        assert session.capacity(sizes) == most
        assert session.capacity({**sizes, "height": 99}) == 0
        for rows in range(1, most + 1):
            step(session, {**SIZES, "rows": rows}, rows)


def test_sessions_share_one_arena_and_follow_it_when_it_grows(cuda: Cuda, library: cuda_standin.Library) -> None:
    keep_plan()
    keep_plan("vae_decoder")
    with open_unet() as unet, open_session(BUNDLE.path, BUNDLE.manifest.networks["vae_decoder"], "tensorrt-rtx") as vae:
        step(unet, SIZES, 1)
        library.activations = 1 << 20  # of the context that is made next
        sizes = {"batch": 1, "height": 8, "width": 8}
        vae.buffer("latents", sizes)[:] = 0.25
        before = cuda.used()
        vae.run(sizes)
        assert (vae.buffer("image", sizes) == 0.25).all()
        assert cuda.used() - before == (1 << 20) - 4096
        library.activations = 4096
        before_graphs = len(cuda.graphs)
        step(unet, SIZES, 2)  # its graph knew the old arena, which is freed
        assert len(cuda.graphs) == before_graphs


@pytest.mark.usefixtures("cuda")
def test_after_an_out_of_memory_the_next_smaller_call_works(library: cuda_standin.Library) -> None:
    keep_plan()
    with open_unet() as session:
        step(session, SIZES, 1)
        library.activations = 2 << 30
        with pytest.raises(
            BackendError, match=r"out of memory: 2048 MiB were asked for .* of the GPU's 1024 MiB are free; use a"
        ):
            session.run(ONE_ROW)
        library.activations = 4096
        step(session, SIZES, 2)


def test_a_gpu_too_small_for_the_buffers_leaves_nothing_behind(cuda: Cuda, library: cuda_standin.Library) -> None:
    keep_plan()
    with open_unet() as session:
        cuda.limit = 1000
        for _ in range(2):
            with pytest.raises(BackendError, match="out of memory"):
                session.reserve(SIZES)
            assert (cuda.host, cuda.device) == ({}, {})
    assert library.open == 0


def test_a_network_that_cannot_be_captured_runs_without_a_graph(cuda: Cuda, library: cuda_standin.Library) -> None:
    keep_plan()
    library.capturable = False
    with open_unet() as session:
        step(session, SIZES, 1)
        step(session, SIZES, 2)
        assert cuda.graphs == {}


@pytest.mark.usefixtures("library")
def test_the_tightest_profile_and_the_tuned_one_win() -> None:
    base = default_profile(BUNDLE.manifest)
    wide = Profile.parse("wide,batch=1:4:8,height=64:64:256,width=64:64:256", base)
    small = Profile.parse("small,batch=1:1:2,height=64:64:128,width=64:64:128", base)
    keep_plan(profiles=[wide, small])
    with open_unet() as session:
        assert session._choose(SIZES)[:2] == (0, 1)  # type: ignore[attr-defined]
        assert session._choose({**SIZES, "rows": 4})[:2] == (0, 0)  # type: ignore[attr-defined]
        step(session, SIZES, 1)
        step(session, {**SIZES, "height": 32, "width": 32}, 1)


@pytest.mark.usefixtures("library")
def test_a_shape_outside_every_profile_names_them() -> None:
    keep_plan()
    with (
        open_unet() as session,
        pytest.raises(InputError, match=r"height=99.*\(default: batch 1:2:8, 64:128:192 x 64:128:192"),
    ):
        session.reserve({**SIZES, "height": 99})


def two_plans() -> tuple[dict[str, int], dict[str, int]]:
    """A size of each of two plans that are kept."""
    keep_plan()
    keep_plan(profiles=[Profile.parse("large,height=128,width=128", default_profile(BUNDLE.manifest))])
    return SIZES, {**SIZES, "height": 16, "width": 16}


def test_sizes_that_alternate_open_each_plan_once(cuda: Cuda, library: cuda_standin.Library) -> None:
    with_small, with_large = two_plans()
    with open_unet() as session:
        for timestep in range(4):
            step(session, with_small, timestep)
            step(session, with_large, timestep)
        assert (library.open, library.deserialized, len(cuda.graphs), session.generation) == (2, 2, 2, 0)


@pytest.mark.usefixtures("cuda")
def test_plans_that_do_not_fit_beside_each_other_take_turns(
    library: cuda_standin.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = two_plans()
    monkeypatch.setattr(cuda_standin.Properties, "totalGlobalMem", 2 * len(b"a plan"))
    with open_unet() as session:
        for number in (0, 1, 0):
            step(session, sizes[number], 1)
            assert library.open == 1
        assert library.deserialized >= 3
        assert session.generation >= 2


def test_where_another_plan_does_not_open_beside_the_first_that_makes_way(
    library: cuda_standin.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Crowded(tensorrt.OpenedPlan):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            if library.open > 0:
                raise BackendError("out of memory")
            super().__init__(*arguments, **options)

    monkeypatch.setattr(tensorrt, "OpenedPlan", Crowded)
    sizes = two_plans()
    with open_unet() as session:
        for number in (0, 1, 0):
            step(session, sizes[number], 1)
            assert library.open == 1


@pytest.mark.usefixtures("library")
def test_plans_are_chosen_by_their_form() -> None:
    half = keep_plan(precision="float16")
    with open_unet() as session:
        assert session.engine == half
    single = keep_plan()
    for form, plan in ((None, half), (Form.parse("fp16"), half), (Form.parse("fp32"), single)):
        with open_unet(form=form) as session:
            step(session, SIZES, 1)
            assert session.engine == plan
    half.unlink()
    half.with_name(half.name + ".json").unlink()
    with open_unet() as session:
        assert session.engine == single
    with pytest.raises(BackendError, match=r"has no plan of unet\.fp32\.onnx in float16 .* --precision float16$"):
        open_unet(form=Form.parse("float16"))
    with pytest.raises(BackendError, match=r"tensorrt-rtx cannot compute in int8; .* graphs in float32, float16"):
        open_unet(form=Form.parse("int8"))


@pytest.mark.usefixtures("library")
def test_a_linked_input_is_read_where_the_other_left_it(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes cross to the host in neither direction; and where the other's buffers move, it follows."""
    monkeypatch.setattr(TensorRtSession, "most_shapes", 1)
    keep_plan("unet_deep")
    keep_plan("unet_shallow")
    specs, sizes = BUNDLE.manifest.networks, {**SIZES, "tokens": 64}
    feature = 4 * 2 * 96 * 8 * 8
    with (
        open_session(BUNDLE.path, specs["unet_deep"], "tensorrt-rtx") as deep,
        open_session(BUNDLE.path, specs["unet_shallow"], "tensorrt-rtx") as shallow,
    ):
        shallow.reserve(sizes)
        shallow.link("deep_feature", deep, "deep_feature")
        for round_ in range(3):
            cuda.copied.clear()
            for session in (deep, shallow):
                session.buffer("sample", sizes)[:] = round_ + 1
                session.buffer("timestep", sizes)[:] = 10
                session.run(sizes)
            assert (shallow.buffer("noise_pred", sizes) == 2 * (round_ + 1) + 20).all()
            assert {size for _, size in cuda.copied}.isdisjoint({feature})
            deep.reserve({**sizes, "rows": 1})  # which takes the place of the other size
        with pytest.raises(BackendError, match=r"sample \(float32 .*cannot be linked to the output deep_feature"):
            shallow.link("sample", deep, "deep_feature")
    with (
        open_session(BUNDLE.path, specs["unet_deep"], "cpu") as elsewhere,
        open_session(BUNDLE.path, specs["unet_shallow"], "tensorrt-rtx") as shallow,
        pytest.raises(BackendError, match=r"runs on the GPU and unet_deep\.fp32\.onnx does not; copy"),
    ):
        shallow.link("deep_feature", elsewhere, "deep_feature")


@pytest.mark.usefixtures("library")
def test_rows_that_are_filled_up_cannot_be_linked() -> None:
    """The other session has no such rows to read."""
    keep_plan("unet_deep")
    keep_plan("unet_shallow", profiles=[dataclasses.replace(default_profile(BUNDLE.manifest), batch=Range.parse("8"))])
    specs = BUNDLE.manifest.networks
    with (
        open_session(BUNDLE.path, specs["unet_deep"], "tensorrt-rtx") as deep,
        open_session(BUNDLE.path, specs["unet_shallow"], "tensorrt-rtx") as shallow,
    ):
        shallow.reserve(SIZES)
        shallow.link("deep_feature", deep, "deep_feature")
        shallow.reserve({**SIZES, "rows": 8})
        with pytest.raises(BackendError, match=r"has no plan for rows=2, and what it is linked to has no more; build"):
            shallow.reserve(SIZES)


def test_kernels_compiled_while_running_are_kept(library: cuda_standin.Library) -> None:
    plan = keep_plan()
    open_unet().close()
    kept = plan.with_name(plan.name + ".jit")
    assert kept.stat().st_mode & 0o777 == 0o600
    open_unet().close()
    assert library.kernels == [b"kernels"]
    kept.write_bytes(kept.read_bytes()[:-1] + b"!")
    open_unet().close()
    assert library.kernels == [b"kernels"]


def test_a_corrupt_plan_is_not_deserialized(library: cuda_standin.Library) -> None:
    keep_plan().write_bytes(b"a plaN")
    library.refuses = "must not be asked"
    with pytest.raises(BuildError, match="sha256 is not the recorded one"):
        open_unet()


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("engine was built for sm80", "calotype build BUNDLE --backend tensorrt-rtx --force"),
        ("could not allocate Memory", "1024 MiB are free; use a smaller"),
    ],
)
def test_a_plan_that_the_library_refuses(library: cuda_standin.Library, reason: str, advice: str) -> None:
    keep_plan()
    library.refuses = reason
    with pytest.raises(BackendError, match=f"cannot open .*: {reason}; .*{advice}"):
        open_unet()


@pytest.mark.usefixtures("library")
def test_a_lost_context_says_what_to_do(cuda: Cuda) -> None:
    keep_plan()
    with open_unet() as session:
        session.reserve(SIZES)
        cuda.fail_launch = True
        with pytest.raises(
            BackendError, match=r"cudaGraphLaunch failed: cudaErrorIllegalAddress; .*start the process again"
        ):
            session.run(SIZES)


def test_weights_are_put_into_a_plan_without(library: cuda_standin.Library) -> None:
    keep_plan(options=Options(precision="float32", strip_weights=True))
    keep_plan()  # newer, but its weights are fixed
    weights = np.ones((4, 4), np.float32)
    open_unet(overrides={"conv_in.weight": weights, "of.another.network": weights}).close()
    assert library.refitted["from"] == str(BUNDLE.path / UNET.graphs["float32"])
    np.testing.assert_array_equal(library.refitted["conv_in.weight"], weights)
    assert "of.another.network" not in library.refitted


@pytest.mark.usefixtures("library")
def test_fixed_weights_cannot_be_overridden() -> None:
    keep_plan()
    with pytest.raises(BackendError, match="calotype build BUNDLE --backend tensorrt-rtx --strip-weights"):
        open_unet(overrides={"conv_in.weight": np.ones(1, np.float32)})


@pytest.mark.usefixtures("library")
def test_without_a_plan_the_line_that_builds_one() -> None:
    with pytest.raises(
        BackendError, match=r"has no plan of unet\.fp32\.onnx .* calotype build .* --backend tensorrt-rtx$"
    ):
        open_unet()


def test_a_plan_of_another_version_says_so(library: cuda_standin.Library) -> None:
    keep_plan()
    library.__version__ = "1.8"
    with pytest.raises(BackendError, match=r"it was built by tensorrt-rtx 1\.7, here is 1\.8"):
        open_unet()


@pytest.mark.parametrize(
    ("status", "driver", "message"),
    [
        (Status.cudaErrorInsufficientDriver, 0, "there is no NVIDIA driver; install one"),
        (Status.cudaErrorInsufficientDriver, 12040, r"too old: it supports CUDA 12\.4, 13\.0 is needed; update"),
        (Status.cudaErrorInitializationError, 13000, "in use before this process was forked, .*spawn"),
        (Status.cudaErrorNoDevice, 13000, r"no usable NVIDIA GPU \(cudaErrorNoDevice\); see nvidia-smi"),
    ],
)
def test_a_machine_that_cannot(cuda: Cuda, status: Status, driver: int, message: str) -> None:
    cuda.status, cuda.driver = status, driver
    with pytest.raises(BackendError, match=message):
        load_cuda("tensorrt")


def test_a_missing_binding_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)  # type: ignore[arg-type]
    with pytest.raises(MissingPackageError, match=r"-m pip install .*\[cuda\]"):
        load_cuda("cuda")


@pytest.mark.usefixtures("library")
def test_a_gpu_that_the_library_has_no_kernels_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BUNDLE.manifest.networks:
        keep_plan(name)
    monkeypatch.setattr(cuda_standin.Properties, "major", 9)
    monkeypatch.setattr(cuda_standin.Properties, "minor", 0)
    with pytest.raises(BackendError, match=r"tensorrt-rtx 1\.7 does not run on Stand-in sm90; use --backend cuda"):
        open_unet()
    assert choose_backend("auto", BUNDLE.path) == "cpu"


@pytest.mark.usefixtures("library")
def test_auto_takes_what_runs_and_says_why_not_the_others(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert choose_backend("auto", BUNDLE.path) == "cpu"
    assert caplog.messages == [
        "backend: cpu; passed over tensorrt (tensorrt is not installed), tensorrt-rtx (it has built no plan here), "
        "cuda (onnxruntime-gpu is not installed)"
    ]
    keep_plan()
    assert choose_backend("auto", BUNDLE.path) == "cpu"
    assert "has no plan of text_encoder.fp32.onnx" in caplog.messages[1]
    for name in BUNDLE.manifest.networks.keys() - {"unet_deep", "unet_shallow"}:
        keep_plan(name)
    assert choose_backend("auto", BUNDLE.path) == "tensorrt-rtx"
    assert caplog.messages[2] == "backend: tensorrt-rtx; passed over tensorrt (tensorrt is not installed)"


def keep_all_plans() -> None:
    for name, spec in BUNDLE.manifest.networks.items():
        if name not in CACHING:
            keep_plan(name, precision=str(default_form(spec, "tensorrt-rtx")))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("first", [0, 1])
def test_pipelines_on_two_gpus_draw_side_by_side(cuda: Cuda, first: int) -> None:
    """Whatever thread calls them; the stand-ins raise where a GPU's things are used and another is current."""
    cuda.count = 2
    keep_all_plans()
    opened = [Pipeline.load("talbot", "tensorrt-rtx", device=number) for number in (first, 1 - first)]
    try:
        assert cuda.streams == {7, 8}
        draw = functools.partial(Pipeline.__call__, prompt="cat", seed=1, num_inference_steps=2)
        with ThreadPoolExecutor(4) as pool:
            drawn = [output.images[0].tobytes() for output in pool.map(draw, opened * 3)]
        assert len(set(drawn)) == 1
        drawn = [draw(pipeline, height=64, width=64).images[0].tobytes() for pipeline in (*opened, *opened)]
        assert len(set(drawn)) == 1
    finally:
        for pipeline in opened:
            pipeline.close()


@pytest.mark.usefixtures("library")
def test_auto_takes_the_gpu_of_that_number_or_none(cuda: Cuda) -> None:
    keep_all_plans()
    cuda.count = 2
    assert choose_backend("auto", BUNDLE.path, 1) == "tensorrt-rtx"
    for number, said in ((2, "there is no GPU 2; valid: 0, 1; see nvidia-smi"), (-1, "device=-1")):
        with pytest.raises((BackendError, InputError), match=said):
            Pipeline.load("talbot", "tensorrt-rtx", device=number)
    with pytest.raises(BackendError, match=r"device=5 can run none of the backends of a GPU: .*there is no GPU 5"):
        Pipeline.load("talbot", device=5)
    with pytest.raises(BackendError, match="device=0 is the number of a GPU, and the backend cpu uses none"):
        Pipeline.load("talbot", "cpu", device=0)
