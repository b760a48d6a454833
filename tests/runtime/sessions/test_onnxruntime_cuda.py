"""ONNX Runtime's CUDA session over stand-ins for CUDA and ONNX Runtime: order, addresses, errors, no numbers."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.form import Form
from calotype.runtime.denoising.denoiser import Denoiser
from calotype.runtime.denoising.guidance import Guidance
from calotype.runtime.denoising.job import Job
from calotype.runtime.errors import BackendError
from calotype.runtime.schedulers import create_solver
from calotype.runtime.sessions import onnxruntime_cuda, open_session
from tests.runtime.cuda_standin import Cuda, Kind, Properties

BUNDLE = Bundle.open("talbot")
UNET = BUNDLE.manifest.networks["unet"]
SIZES = {"rows": 2, "tokens": 32, "height": 8, "width": 8}
LARGER = {**SIZES, "height": 16}


class Binding:
    def __init__(self) -> None:
        self.inputs: dict[str, tuple[Any, ...]] = {}
        self.outputs: dict[str, tuple[Any, ...]] = {}

    def bind_input(self, name: str, *where: Any) -> None:
        self.inputs[name] = where

    def bind_output(self, name: str, *where: Any) -> None:
        self.outputs[name] = where


class SessionOptions:
    def add_session_config_entry(self, name: str, value: str) -> None:
        assert (name, Path(value)) == ("session.model_external_initializers_file_folder_path", BUNDLE.path.resolve())


class RunOptions:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}

    def add_run_config_entry(self, name: str, value: str) -> None:
        self.entries[name] = value


class OnnxRuntime:
    """Doubles ``sample``. A graph's number stands for the addresses it was first run with, as in ONNX Runtime."""

    SessionOptions, RunOptions = SessionOptions, RunOptions

    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.opened = cuda, list[dict[str, str]]()
        self.graphs: dict[str, int] = {}
        self.runs = self.unrecorded = 0
        self.refuses_graphs = False
        self.fails: str | None = None
        self.providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]

    def get_available_providers(self) -> list[str]:
        return self.providers

    def get_providers(self) -> list[str]:
        return self.providers

    def InferenceSession(  # noqa: N802
        self, graph: bytes, options: Any, providers: Any, enable_fallback: int
    ) -> OnnxRuntime:
        assert enable_fallback == 0, "what CUDA refuses is opened on the CPU"
        settings = providers[0][1]
        self.opened.append(settings)
        if self.refuses_graphs and settings["enable_cuda_graph"] == "1":
            raise RuntimeError("not all nodes are on the GPU")
        return self

    def io_binding(self) -> Binding:
        return Binding()

    def array(self, binding: Binding, name: str) -> Any:
        """What lies where ``name`` is bound."""
        kind, number, dtype, shape, pointer = {**binding.inputs, **binding.outputs}[name]
        assert (kind, str(number)) == ("cuda", self.opened[-1]["device_id"])
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.cuda.check(self.cuda.device, pointer, size)
        return np.frombuffer(memoryview((ctypes.c_byte * size).from_address(pointer)), dtype).reshape(shape)

    def run_with_iobinding(self, binding: Binding, options: RunOptions) -> None:
        if self.fails is not None:
            raise RuntimeError(self.fails)
        self.runs += 1
        arrays = {name: self.array(binding, name) for name in (*binding.inputs, *binding.outputs)}
        number, address = options.entries["gpu_graph_id"], binding.inputs["sample"][-1]
        known = address if number == "-1" else self.graphs.setdefault(number, address)
        assert known == address, "a graph is launched with addresses it does not know"
        self.unrecorded += number == "-1"
        arrays["noise_pred"][...] = arrays["sample"] * 2


@pytest.fixture
def library(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> OnnxRuntime:
    standin = OnnxRuntime(cuda)
    monkeypatch.setattr(onnxruntime_cuda, "onnxruntime", standin)
    return standin


def test_buffers_follow_the_largest_size_and_graphs_their_addresses(cuda: Cuda, library: OnnxRuntime) -> None:
    with open_session(BUNDLE.path, UNET, "cuda") as session:
        for sizes in (SIZES, LARGER, SIZES, LARGER, SIZES):
            session.reserve(sizes)
            session.buffer("sample", sizes)[:] = 1.5
            session.run(sizes)
            assert (session.buffer("noise_pred", sizes) == 3).all()
        before = cuda.calls["cudaMalloc"] + cuda.calls["cudaMallocHost"]
        for _ in range(10):
            session.run(SIZES)
        assert cuda.calls["cudaMalloc"] + cuda.calls["cudaMallocHost"] == before
        assert len(library.graphs) == 2
    assert [settings["enable_cuda_graph"] for settings in library.opened] == ["1"]
    assert library.opened[0]["user_compute_stream"] == "7"


@pytest.mark.parametrize(("device", "number"), [(None, 0), (1, 1)])
def test_a_session_is_on_the_gpu_of_that_number(
    cuda: Cuda, library: OnnxRuntime, device: int | None, number: int
) -> None:
    cuda.count = 2
    with open_session(BUNDLE.path, UNET, "cuda", device=device) as session:
        session.buffer("sample", SIZES)[:] = 2
        session.run(SIZES)
        assert (session.buffer("noise_pred", SIZES) == 4).all()
        assert set(cuda.owners.values()) == {number}
    assert library.opened[0]["device_id"] == str(number)
    assert library.opened[0]["user_compute_stream"] == str(7 + number)


@pytest.mark.usefixtures("library")
def test_only_what_was_written_is_copied(cuda: Cuda) -> None:
    text, sample, timesteps = (4 * 2 * count for count in (32 * 192, 16 * 8 * 8, 1))
    with open_session(BUNDLE.path, UNET, "cuda") as session:
        for sizes in (SIZES, LARGER):  # each has buffers of its own, and keeps what was written there
            session.write("encoder_hidden_states", sizes, np.ones((2, 32, 192), np.float32))
            session.run(sizes)
        cuda.copied.clear()
        for value in range(5):
            for sizes in (SIZES, LARGER):
                session.write("sample", sizes, np.full((2, 16, sizes["height"], 8), value, np.float32))
                session.write("timestep", sizes, np.float32(value), row=1)
                session.run(sizes)
        up = {size: count for (kind, size), count in cuda.copied.items() if kind is Kind.cudaMemcpyHostToDevice}
        assert up == {sample: 5, 2 * sample: 5, timesteps: 10}
        assert text not in up


def test_graphs_are_recorded_for_so_many_sizes_and_no_more(
    library: OnnxRuntime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(onnxruntime_cuda, "MOST_GRAPHS", 3)
    with open_session(BUNDLE.path, UNET, "cuda") as session:
        for _ in range(2):
            for height in range(1, 6):
                session.buffer("sample", {**SIZES, "height": height})[:] = height
                session.run({**SIZES, "height": height})
                assert (session.buffer("noise_pred", {**SIZES, "height": height}) == 2 * height).all()
    assert (len(library.graphs), library.unrecorded) == (3, 4)
    assert caplog.messages == ["unet.fp16.onnx has run at 3 sizes; more run without a CUDA graph, and slower"]


@pytest.mark.usefixtures("library")
def test_rows_are_of_a_few_numbers() -> None:
    with open_session(BUNDLE.path, UNET, "cuda") as session:
        assert [session.padded(rows) for rows in (1, 2, 3, 5, 6, 9, 12, 13)] == [1, 2, 4, 6, 6, 12, 12, 16]
        assert not session.keeps_bytes
    with open_session(BUNDLE.path, BUNDLE.manifest.networks["vae_decoder"], "cuda") as session:
        assert session.capacity({"height": 8, "width": 8}) == 1


@pytest.mark.parametrize(("form", "graph"), [(None, "fp16"), ("float16", "fp16"), ("float32", "fp32")])
def test_the_form_that_was_named_is_opened(
    form: str | None, graph: str, library: OnnxRuntime, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def for_cuda(path: Path, *_: Any, **__: Any) -> tuple[bytes, Path]:
        opened.append(path.name)
        return b"", BUNDLE.path

    monkeypatch.setattr(onnxruntime_cuda, "for_cuda", for_cuda)
    open_session(BUNDLE.path, UNET, "cuda", form=None if form is None else Form.parse(form)).close()
    assert opened == [f"unet.{graph}.onnx"]
    assert len(library.opened) == 1
    with pytest.raises(BackendError, match="cuda cannot compute in int8; this bundle has graphs in float32, float16"):
        open_session(BUNDLE.path, UNET, "cuda", form=Form.parse("int8"))


def new_job(number: int, interval: tuple[float, float] | None = None) -> Job:
    """A guided picture of 8 x 8 latents, its embeddings its number."""
    width = next(item.shape[-1] for item in UNET.inputs if item.name == "encoder_hidden_states")
    row, shape = np.full((32, int(width)), number, np.float32), (BUNDLE.manifest.vae.latent_channels, 8, 8)
    solver = create_solver("euler", {}, 12)
    return Job(
        latents=np.full(shape, number, np.float32),
        conditional={"encoder_hidden_states": row},
        unconditional={"encoder_hidden_states": -row},
        guidance=Guidance(scale=3.0, interval=interval),
        solver=solver,
        state=solver.new_state(shape),
        rng=np.random.default_rng(number),
    )


@pytest.mark.parametrize("interval", [None, (3.0, 1e9)])
def test_a_batch_and_the_rest_take_turns_at_graphs_that_stay(
    interval: tuple[float, float] | None, cuda: Cuda, library: OnnxRuntime
) -> None:
    """Also where guidance ends on the way, which makes the rows fewer."""
    with open_session(BUNDLE.path, UNET, "cuda") as session:
        denoiser, jobs = Denoiser(lambda _: session), [new_job(number, interval) for number in range(11)]
        batches = [denoiser.pick(jobs), jobs[8:]]
        assert batches[0] == jobs[:8]
        for batch in batches:
            denoiser.reserve(batch)
        before = cuda.calls["cudaMalloc"] + cuda.calls["cudaMallocHost"]
        while not jobs[0].done:
            for batch in batches:
                denoiser.step(batch)
        assert cuda.calls["cudaMalloc"] + cuda.calls["cudaMallocHost"] == before
        assert len(library.graphs) == (2 if interval is None else 4)
        assert library.runs == 2 * 12
        for number, job in enumerate(jobs):
            alone = new_job(number, interval)
            while not alone.done:
                denoiser.step([alone])
            np.testing.assert_array_equal(job.latents, alone.latents)


@pytest.mark.parametrize(
    ("memory_gib", "side", "most"), [(24, 64, 16), (24, 128, 12), (8, 64, 16), (8, 128, 4), (4, 64, 8), (1, 64, 2)]
)
@pytest.mark.usefixtures("library")
def test_so_many_rows_are_taken_as_the_memory_has_room_for(
    memory_gib: int, side: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Properties, "totalGlobalMem", memory_gib << 30)
    with open_session(BUNDLE.path, UNET, "cuda") as session:
        sizes = {**SIZES, "height": side, "width": side}
        assert session.capacity(sizes) == most


@pytest.mark.usefixtures("cuda")
def test_a_network_that_cannot_be_a_graph_is_opened_without(
    library: OnnxRuntime, caplog: pytest.LogCaptureFixture
) -> None:
    library.refuses_graphs = True
    with open_session(BUNDLE.path, UNET, "cuda"):
        assert [settings["enable_cuda_graph"] for settings in library.opened] == ["1", "0"]
    assert "runs without a CUDA graph, and slower: not all nodes are on the GPU" in caplog.text


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("cuDNN is gone", "ONNX Runtime cannot run unet.fp16.onnx at rows=2, .*: cuDNN is gone"),
        ("Out of memory", "MiB are free: use a smaller size, fewer images in a call, or --low-memory"),
    ],
)
def test_a_failing_run(library: OnnxRuntime, reason: str, message: str) -> None:
    with open_session(BUNDLE.path, UNET, "cuda") as session:
        session.reserve(SIZES)
        library.fails = reason
        with pytest.raises(BackendError, match=message):
            session.run(SIZES)
        library.fails = None
        session.run(SIZES)


def test_an_onnxruntime_without_cuda_says_how_to_get_the_other(library: OnnxRuntime) -> None:
    library.providers = ["CPUExecutionProvider"]
    with pytest.raises(
        BackendError, match=r"pip uninstall onnxruntime, then .* -m pip install --force-reinstall .*\[cuda\]"
    ):
        open_session(BUNDLE.path, UNET, "cuda")
