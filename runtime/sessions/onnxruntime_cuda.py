"""ONNX Runtime on an NVIDIA GPU, bound to our own GPU memory; a shape's second run is recorded as a CUDA graph."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.bundle.spec import ModelSpec
from calotype.runtime.errors import BackendError, MissingPackageError
from calotype.runtime.graphs.files import initializer_names
from calotype.runtime.sessions.cuda_fusions import FUSIONS
from calotype.runtime.sessions.cuda_operators import for_cuda
from calotype.runtime.sessions.device import Staging, acquire, release
from calotype.runtime.sessions.session import Sizes

try:
    import onnxruntime
except ModuleNotFoundError as error:
    raise MissingPackageError("onnxruntime-gpu", "cuda") from error

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
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Bound:
    """Every input and output at one set of sizes, with their bytes; ``run_options`` hold the number of its graph."""

    views: Mapping[str, NDArray[Any]]
    inputs: list[tuple[str, int]]
    outputs: list[tuple[str, int]]
    binding: Any
    run_options: Any


class OnnxRuntimeCudaSession:
    """See :class:`calotype.runtime.sessions.session.Session`. Computes in float16 where the bundle has such a graph.

    Raises:
        BackendError: there is no GPU, the installed ONNX Runtime has no CUDA, or it refuses the graph.
    """

    def __init__(
        self, folder: Path, spec: ModelSpec, overrides: Mapping[str, NDArray[np.floating[Any]]] | None = None
    ) -> None:
        self.inputs, self.outputs = spec.inputs, spec.outputs
        self._staging: Staging | None = None
        self._bound: dict[tuple[tuple[str, int], ...], _Bound] = {}
        self._graphs = 0
        if PROVIDER not in onnxruntime.get_available_providers():
            raise BackendError(
                "the installed onnxruntime has no CUDA; both packages own one name, so: "
                "pip uninstall onnxruntime, then pip install --force-reinstall 'calotype[cuda]'"
            )
        self._device = acquire("cuda")
        try:
            precision = "float16" if "float16" in spec.graphs else "float32"
            graph, latent = folder / spec.graphs[precision], LATENT_BYTES * np.dtype(precision).itemsize
            self._most_latents = int(self._device.gpu.memory * SHARE_OF_MEMORY) // latent
            self._session = self._open(graph, overrides or {})
        except BaseException:
            release()
            raise

    def takes(self, sizes: Sizes) -> bool:
        """See :meth:`Session.takes`. Up to ``MOST_ROWS``, and a share of the GPU's memory that grows with the picture.

        Each number of rows is a shape with a graph of its own. Runs of several pictures are compared with runs of one
        in ``tests/gpu``, which have passed on a GPU only with the runs of one.
        """
        rows = sizes.get("rows", MOST_ROWS + 1)  # an autoencoder has pictures, and takes one
        return rows <= MOST_ROWS and rows * sizes["height"] * sizes["width"] <= self._most_latents

    def reserve(self, sizes: Sizes) -> None:
        """See :meth:`Session.reserve`."""
        specs = (*self.inputs, *self.outputs)
        counts = {spec.name: spec.count(sizes) for spec in specs}
        if self._staging is not None:
            if all(self._staging.count(name) >= count for name, count in counts.items()):
                return
            counts = {name: max(count, self._staging.count(name)) for name, count in counts.items()}
            self._drop()
        self._staging = Staging(self._device, specs, counts)

    def buffer(self, name: str, sizes: Sizes) -> NDArray[Any]:
        """See :meth:`Session.buffer`."""
        return self._at(sizes).views[name]

    def run(self, sizes: Sizes) -> None:
        """See :meth:`Session.run`."""
        bound, cuda, stream = self._at(sizes), self._device.cuda, self._device.stream
        staging = self._staging
        assert staging is not None
        with self._device.lock:
            for name, size in bound.inputs:
                cuda.copy_to_device(staging.device(name), staging.host(name), size, stream)
            try:
                self._session.run_with_iobinding(bound.binding, bound.run_options)
            except Exception as error:  # the library's own exceptions have no common class but this
                raise BackendError(self._explain(f"failed at {dict(sizes)}", error)) from error
            for name, size in bound.outputs:
                cuda.copy_to_host(staging.host(name), staging.device(name), size, stream)
            cuda.synchronize(stream)

    def close(self) -> None:
        """See :meth:`Session.close`."""
        self._drop()
        del self._session
        release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, graph: Path, overrides: Mapping[str, NDArray[np.floating[Any]]]) -> Any:
        """With CUDA graphs, or where a node runs on the CPU, without: such a session refuses to be opened."""
        if hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()  # finds CUDA and cuDNN where pip put them
        names, (model, folder) = (
            sorted(initializer_names(graph) & overrides.keys()),
            for_cuda(graph, FUSIONS, sums=SUMS),
        )
        for captured in ("1", "0"):
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            if names:
                values = [onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(overrides[n])) for n in names]
                options.add_external_initializers(names, values)
            options.add_session_config_entry(WEIGHTS_FOLDER, str(folder))  # a graph in memory lies nowhere
            settings = {
                **SETTINGS,
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

    def _at(self, sizes: Sizes) -> _Bound:
        key = tuple(sizes.items())
        bound = self._bound.get(key)
        if bound is None:
            bound = self._bound[key] = self._bind(sizes)
        return bound

    def _bind(self, sizes: Sizes) -> _Bound:
        self.reserve(sizes)
        staging = self._staging
        assert staging is not None
        binding, views = self._session.io_binding(), {}
        for specs, bind in ((self.inputs, binding.bind_input), (self.outputs, binding.bind_output)):
            for spec in specs:
                view = views[spec.name] = staging.view(spec.name, spec.resolve(sizes))
                bind(spec.name, "cuda", 0, view.dtype, view.shape, staging.device(spec.name))
        self._graphs += 1  # never used again: a graph holds the addresses it was recorded with
        run_options = onnxruntime.RunOptions()
        run_options.add_run_config_entry("gpu_graph_id", str(self._graphs))
        run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return _Bound(
            views=views,
            inputs=[(spec.name, views[spec.name].nbytes) for spec in self.inputs],
            outputs=[(spec.name, views[spec.name].nbytes) for spec in self.outputs],
            binding=binding,
            run_options=run_options,
        )

    def _drop(self) -> None:
        self._bound.clear()
        if self._staging is not None:
            self._staging.close()
            self._staging = None
