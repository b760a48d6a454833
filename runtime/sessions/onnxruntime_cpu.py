"""ONNX Runtime on the CPU, with inputs and outputs bound to our own buffers.

Where ``calotype build`` has made an engine of a network for this processor, that is opened in place of the bundle's
graph: optimized before, its weights mapped from a file.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.bundle.manifest import Manifest
from calotype.runtime.bundle.spec import ModelSpec
from calotype.runtime.errors import BackendError, MissingPackageError
from calotype.runtime.graphs.files import initializer_names
from calotype.runtime.sessions.plans import WantedOnCpu, find_plans, list_plans, plan_trouble, read_plan
from calotype.runtime.sessions.processor import instruction_sets
from calotype.runtime.sessions.records import PlanRecord
from calotype.runtime.sessions.session import Sizes

try:
    import onnxruntime
except ModuleNotFoundError as error:
    raise MissingPackageError("onnxruntime", "cpu") from error

# Latents' pixels, of one guided picture of 256 x 256, up to which pictures share a run. Small runs spend their time
# between operators: eight pictures of talbot in runs of four took 1.13 times less than alone, decoded 1.14 times less,
# in runs of eight hardly more.
SHARED = 32 * 32
# Bytes of weights up to which an engine packs them when it opens: a private copy that costs little, and products of few
# rows are faster for it. Larger ones stay in the file's pages.
PACKED = 256 << 20
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
Overrides = Mapping[str, NDArray[np.floating[Any]]]
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Bound:
    """Every input and output at one set of sizes: the views, and ONNX Runtime's binding to them."""

    views: Mapping[str, NDArray[Any]]
    binding: Any


class OnnxRuntimeCpuSession:
    """See :class:`calotype.runtime.sessions.session.Session`.

    ``before_reading`` is called before the weights in ``folder`` are read, where they are. ``precision`` int8 is an
    engine's alone, and where there is none, that is a BackendError.

    Attributes:
        engine: the plan that was opened; None where it is the bundle's graph.
    """

    def __init__(
        self,
        folder: Path,
        spec: ModelSpec,
        overrides: Overrides | None = None,
        before_reading: Callable[[], None] = lambda: None,
        *,
        precision: str = "float32",
        profile: bool = False,
    ) -> None:
        self.inputs, self.outputs = spec.inputs, spec.outputs
        self._precision = precision
        self._profiles = tempfile.TemporaryDirectory(prefix="calotype-") if profile else None
        self.engine: Path | None = None
        session = None
        if not overrides:
            self.engine, session = _open_engine(folder, spec, precision, self._options())
        if session is None and precision != "float32":
            raise BackendError(
                f"{spec.graphs['float32']} has no engine in {precision} for this machine; build one with: "
                f"calotype build {folder} --backend cpu --precision {precision}"
            )
        if session is None:
            before_reading()
            session = _open_graph(folder / spec.graphs["float32"], overrides or {}, self._options())
        self._session = session
        self._memory: dict[str, NDArray[Any]] = {}
        self._bound: dict[tuple[tuple[str, int], ...], _Bound] = {}

    def takes(self, sizes: Sizes) -> bool:
        """See :meth:`Session.takes`. In float32, small ones, where it pays.

        A picture keeps its bytes: ONNX Runtime sums in one order whatever the rows, which ``tests/runtime/
        test_batches.py`` asserts. In int8 what a run holds has one scale.
        """
        pictures = sizes["rows"] / 2 if "rows" in sizes else sizes["batch"]
        return self._precision == "float32" and pictures * sizes["height"] * sizes["width"] <= SHARED

    def reserve(self, sizes: Sizes) -> None:
        """See :meth:`Session.reserve`."""
        for spec in (*self.inputs, *self.outputs):
            count = spec.count(sizes)
            if spec.name not in self._memory or self._memory[spec.name].size < count:
                self._memory[spec.name] = np.zeros(count, spec.dtype)
                self._bound.clear()

    def buffer(self, name: str, sizes: Sizes) -> NDArray[Any]:
        """See :meth:`Session.buffer`."""
        return self._at(sizes).views[name]

    def run(self, sizes: Sizes) -> None:
        """See :meth:`Session.run`."""
        bound = self._at(sizes)
        try:
            self._session.run_with_iobinding(bound.binding)
        except Exception as error:
            raise _explained(f"run at {', '.join(f'{name}={size}' for name, size in sizes.items())}", error) from error

    def operators(self) -> dict[str, float]:
        """Seconds that each kind of operator took in all runs; for a session opened to ``profile``, once."""
        seconds: dict[str, float] = {}
        if self._profiles is None:
            return seconds
        for event in json.loads(Path(self._session.end_profiling()).read_text()):
            if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
                operator = event["args"]["op_name"]
                seconds[operator] = seconds.get(operator, 0.0) + event["dur"] / 1e6
        self._profiles.cleanup()
        self._profiles = None
        return seconds

    def close(self) -> None:
        """See :meth:`Session.close`."""
        self.operators()  # or its file is left behind
        self._bound.clear()
        self._memory.clear()
        del self._session

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _options(self) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # A pattern lays all that a size takes into one piece, which the second run asks for beside the pieces that the
        # first one took: with engines of SD 1.5 that made 6.6 GB at 512 x 512, where it is 3.7 without.
        options.enable_mem_pattern = False
        if self._profiles is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(self._profiles.name) / "profile")
        return options

    def _at(self, sizes: Sizes) -> _Bound:
        # A step asks five times: shapes are resolved once for each set of sizes, not each time.
        key = tuple(sizes.items())
        bound = self._bound.get(key)
        if bound is None:
            bound = self._bound[key] = self._bind(sizes)
        return bound

    def _bind(self, sizes: Sizes) -> _Bound:
        binding = self._session.io_binding()
        views = {}
        for specs, bind in ((self.inputs, binding.bind_input), (self.outputs, binding.bind_output)):
            for spec in specs:
                view = self._memory[spec.name][: spec.count(sizes)].reshape(spec.resolve(sizes))
                bind(spec.name, "cpu", 0, view.dtype, view.shape, view.ctypes.data)
                views[spec.name] = view
        return _Bound(views=views, binding=binding)


def _open_graph(graph: Path, overrides: Overrides, options: Any) -> Any:
    try:
        if overrides:
            names = sorted(initializer_names(graph) & overrides.keys())
            # Copied or packed while the session opens: the arrays need not outlive this call.
            values = [onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(overrides[n])) for n in names]
            options.add_external_initializers(names, values)
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's own exceptions have no common class but this
        raise _explained(f"open {graph.name}", error) from error


def _explained(what: str, error: Exception) -> BackendError:
    text = " ".join(str(error).split())
    if any(words in text for words in ("allocate memory", "bad allocation", "bad_alloc")):
        return BackendError(
            f"there is not enough memory to {what}; use a smaller size, --vae-tiling or --low-memory, or engines, "
            "which need less: calotype build --backend cpu"
        )
    return BackendError(f"ONNX Runtime cannot {what}: {text}")


def _open_engine(folder: Path, spec: ModelSpec, precision: str, options: Any) -> tuple[Path | None, Any]:
    """The engine that serves ``spec`` here, and its session; None and None where there is none that is sound."""
    found = serving_engine(folder, spec, precision)
    if found is None:
        return None, None
    path, record = found
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # it was done before
    # Large weights in float32 stay in the file's pages. In int8 kernels would arrange theirs anew in every run.
    if precision == "float32" and record.weights is not None and record.weights.size > PACKED:
        options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry(WEIGHTS_FOLDER, str(path.parent))
    try:
        data = read_plan(path, record)
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        logger.info("%s: its engine in %s", spec.graphs["float32"], precision)
        return path, session
    except Exception as error:
        logger.warning("the engine %s cannot be opened: %s; build it again with: calotype build", path.name, error)
        return None, None


def serving_engine(folder: Path, spec: ModelSpec, precision: str) -> tuple[Path, PlanRecord] | None:
    """The newest sound engine of the network for this processor and ONNX Runtime."""
    processor = instruction_sets()
    if processor is None or not any(".cpu." in path.name for path in list_plans()):
        return None
    files = Manifest.read(folder).files
    wanted = WantedOnCpu(
        version=onnxruntime.__version__,
        graphs=(files[spec.graphs["float32"]].sha256,),
        weights=tuple(files[path].sha256 for path in spec.weights),
        processor=processor,
        precision=precision,
    )
    found, refusal = find_plans(wanted)
    for path, record in found:
        trouble = plan_trouble(path, thoroughly=False)
        if trouble is None:
            return path, record
        refusal = f"{path.name}: {trouble}"
    if refusal:
        logger.warning(
            "%s runs without its engine: %s; build it again with: calotype build", spec.graphs["float32"], refusal
        )
    return None
