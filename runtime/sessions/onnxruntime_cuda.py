"""ONNX Runtime on an NVIDIA GPU, bound to our own GPU memory; a shape's second run is recorded as a CUDA graph."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np

from calotype.runtime.bundle.form import Form
from calotype.runtime.bundle.spec import ModelSpec
from calotype.runtime.errors import BackendError, install_line
from calotype.runtime.graphs.files import initializer_names, weight_bytes
from calotype.runtime.onnx_runtime import import_onnxruntime
from calotype.runtime.sessions.cuda_fusions import FUSIONS
from calotype.runtime.sessions.cuda_operators import for_cuda
from calotype.runtime.sessions.session import Changes, Sizes, read_all
from calotype.runtime.sessions.staged import StagedSession, StagedShape, most_rows

onnxruntime = import_onnxruntime("onnxruntime-gpu", "cuda")

PROVIDER = "CUDAExecutionProvider"
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
# Of runs with rows of several pictures. Eight guided pictures are the most that were measured: at 512x512 one of them
# took 0.66 of the time that it takes alone, where two took 0.79 and four 0.70 (SD 1.5's size, H200).
MOST_ROWS = 16
LATENT_BYTES = 8 << 10  # of activations a latent of one row, times the graph's item size; SD 1.5's size, by its tensors
SHARE_OF_MEMORY = 1 / 8  # that may go to them: weights, the autoencoder and other programs need the rest
# Whether group norms take the sums before them along; ``python -m benchmarks.micro fusions`` measures this and what
# follows.
SUMS = True
# Of ONNX Runtime's provider.
SETTINGS = {
    # The other search, and biases within convolutions, gain SD 1.5 a hundredth and cost a shape's first step seconds.
    "cudnn_conv_algo_search": "HEURISTIC",
    # SkipLayerNormalization else adds in half precision.
    "enable_skip_layer_norm_strict_mode": "1",
    # The other strategy takes the next power of two, and so up to twice the memory.
    "arena_extend_strategy": "kSameAsRequested",
}
# ONNX Runtime gives no graph back while its session is open.
MOST_GRAPHS = 64
NOT_RECORDED = -1
logger = logging.getLogger(__name__)


@dataclasses.dataclass(kw_only=True)
class _Bound(StagedShape):
    """Buffers, ONNX Runtime's binding to them, and options that hold the number of its graph."""

    binding: Any
    run_options: Any


class OnnxRuntimeCudaSession(StagedSession[_Bound]):
    """See :class:`calotype.runtime.sessions.session.Session`. ``form`` says which of the bundle's graphs is opened.

    Raises:
        BackendError: there is no GPU, the installed ONNX Runtime has no CUDA, or it refuses the graph.
    """

    most_shapes = MOST_GRAPHS

    def __init__(
        self,
        folder: Path,
        spec: ModelSpec,
        overrides: Changes | None = None,
        *,
        form: Form,
        device: int | None = None,
    ) -> None:
        if PROVIDER not in onnxruntime.get_available_providers():
            way_out = install_line("cuda")
            raise BackendError(
                f"the installed ONNX Runtime is the one without CUDA; put the other in its place: {way_out}"
            )
        super().__init__(spec.inputs, spec.outputs, spec.graphs[form.graph], backend="cuda", device=device)
        self._graphs = 0
        self._own_bytes = weight_bytes(folder / self._name)  # of a float32 graph of halves it is twice as much
        self._session: Any = None
        latent = LATENT_BYTES * np.dtype(form.compute).itemsize
        self._most_latents = int(self._device.gpu.memory * SHARE_OF_MEMORY) // latent
        try:
            self._session = self._open(folder / self._name, overrides or {})
        except BaseException:
            self.close()
            raise

    @property
    def own_bytes(self) -> int:
        """See :attr:`Session.own_bytes`. On the GPU."""
        return self._own_bytes

    def capacity(self, sizes: Sizes) -> int:
        """See :meth:`Session.capacity`. As many rows as a share of the GPU's memory has room for.

        A guided picture always; an autoencoder, whose runs take more and gain less, takes one picture. Runs of several
        pictures are compared with runs of one in ``tests/gpu``, which have passed on a GPU only with the runs of one.
        """
        if "rows" not in self._symbols:
            return 1
        return max(2, most_rows(min(MOST_ROWS, self._most_latents // (sizes["height"] * sizes["width"]))))

    def run(self, sizes: Sizes) -> None:
        """See :meth:`Session.run`."""
        bound = self._at(sizes)
        with self._device.lock:
            self._copy_in(bound)
            try:
                self._session.run_with_iobinding(bound.binding, bound.run_options)
            except Exception as error:  # the library's own exceptions have no common class but this
                raise BackendError(self._explain(f"cannot run {self._name} at {_sizes(sizes)}", error)) from error
            self._copy_out(bound)
            self._device.cuda.synchronize(self._device.stream)

    def _close(self) -> None:
        self._session = None
        super()._close()

    def _open(self, graph: Path, overrides: Changes) -> Any:
        """With CUDA graphs, or where a node runs on the CPU, without: such a session refuses to be opened."""
        if hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # finds CUDA and cuDNN where pip put them
        arrays = read_all(overrides, initializer_names(graph)) if overrides else {}
        model, folder = for_cuda(graph, FUSIONS, sums=SUMS)
        for captured in ("1", "0"):
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4  # what is wrong is in the exception, and said in one line
            if arrays:
                values = list(map(onnxruntime.OrtValue.ortvalue_from_numpy, arrays.values()))
                options.add_external_initializers(list(arrays), values)
            options.add_session_config_entry(WEIGHTS_FOLDER, str(folder))  # a graph in memory lies nowhere
            settings = {
                **SETTINGS,
                "device_id": str(self._device.cuda.number),
                "enable_cuda_graph": captured,
                "user_compute_stream": str(self._device.stream),
            }
            try:
                providers = [(PROVIDER, settings), "CPUExecutionProvider"]
                # Without the fallback, which opens on the CPU what CUDA has refused, and hides why.
                session = onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=0)
            except Exception as error:
                if captured == "0":
                    raise BackendError(self._explain(f"cannot open {graph.name}", error)) from error
                logger.warning("%s runs without a CUDA graph, and slower: %s", graph.name, error)
                continue
            if PROVIDER not in session.get_providers():
                raise BackendError(
                    f"ONNX Runtime could not load its CUDA provider for {graph.name}; CUDA 13 and cuDNN 9 are needed: "
                    "pip install 'onnxruntime-gpu[cuda,cudnn]'"
                )
            return session
        raise AssertionError

    def _explain(self, what: str, error: Exception) -> str:
        text = " ".join(str(error).split())
        if "memory" in text.lower():
            free = self._device.cuda.free_memory() / 2**20
            text += f"; {free:.0f} MiB are free: use a smaller size, fewer images in a call, or --low-memory"
        return f"ONNX Runtime {what}: {text}"

    def _prepare(self, sizes: Sizes) -> _Bound:
        staged, binding = self._stage(sizes), self._session.io_binding()
        for specs, bind in ((self.inputs, binding.bind_input), (self.outputs, binding.bind_output)):
            for spec in specs:
                view = staged.views[spec.name]
                bind(spec.name, "cuda", self._device.cuda.number, view.dtype, view.shape, staged.addresses[spec.name])
        run_options = onnxruntime.RunOptions()
        run_options.add_run_config_entry("gpu_graph_id", str(self._next_graph()))
        run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return _Bound(**vars(staged), binding=binding, run_options=run_options)

    def _next_graph(self) -> int:
        """A number for a graph, never used again: a graph holds the addresses that it was recorded with."""
        self._graphs += 1
        if self._graphs <= MOST_GRAPHS:
            return self._graphs
        if self._graphs == MOST_GRAPHS + 1:
            logger.warning("%s has run at %d sizes; more run without a CUDA graph, and slower", self._name, MOST_GRAPHS)
        return NOT_RECORDED


def _sizes(sizes: Sizes) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())
