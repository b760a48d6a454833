"""ONNX Runtime on the CPU, with inputs and outputs bound to our own buffers.

Where ``calotype build`` has made an engine of a network for this processor, that is opened in place of the bundle's
graph: optimized before, its weights mapped from a file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.arguments import MOST_THREADS, between
from calotype.runtime.bundle.form import FLOAT32, INT8, Form
from calotype.runtime.bundle.manifest import Manifest
from calotype.runtime.bundle.safetensors import SafetensorsFile
from calotype.runtime.bundle.spec import ModelSpec
from calotype.runtime.errors import BackendError, InputError
from calotype.runtime.graphs.files import initializer_names
from calotype.runtime.graphs.layouts import TURNED, Layout, Layouts, turned
from calotype.runtime.graphs.remarks import PROBE, Inputs, read_inputs, read_remark
from calotype.runtime.onnx_runtime import import_onnxruntime
from calotype.runtime.parallel import run_parallel
from calotype.runtime.sessions.plans import WantedOnCpu, find_plans, list_plans, plan_trouble, read_plan, weights_of
from calotype.runtime.sessions.processor import instruction_sets, is_whole_machine, usable_threads
from calotype.runtime.sessions.records import PlanRecord
from calotype.runtime.sessions.session import Changes, SingleChanges, Sizes, read_all, single
from calotype.runtime.sessions.shapes import Shape, ShapedSession, allocate

onnxruntime = import_onnxruntime("onnxruntime", "cpu")

# Latents' pixels, of one guided picture of 256 x 256, up to which pictures share a run. Small runs spend their time
# between operators: eight pictures of talbot in runs of four took 1.13 times less than alone, decoded 1.14 times less,
# in runs of eight hardly more.
SHARED = 32 * 32
# Bytes of weights up to which an engine packs them when it opens: a private copy that costs little, and products of few
# rows are faster for it. Larger ones stay in the file's pages.
PACKED = 256 << 20
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
logger = logging.getLogger(__name__)


@dataclasses.dataclass(kw_only=True)
class _Bound(Shape):
    """Buffers, ONNX Runtime's binding to them, and whether a run takes more memory than is kept."""

    binding: Any
    large: bool


class OnnxRuntimeCpuSession(ShapedSession[_Bound]):
    """See :class:`calotype.runtime.sessions.session.Session`.

    ``before_reading`` is called before the weights in ``folder`` are read, where they are. The form ``int8`` is an
    engine's alone, and where there is none, that is a BackendError.
    """

    def __init__(
        self,
        folder: Path,
        spec: ModelSpec,
        overrides: Changes | None = None,
        before_reading: Callable[[], None] = lambda: None,
        *,
        form: Form = FLOAT32,
        trace: bool = False,
        threads: int | None = None,
    ) -> None:
        super().__init__(spec.inputs, spec.outputs, spec.graphs[FLOAT32.graph])
        self._folder, self._spec, self._form, self._before_reading = folder, spec, form, before_reading
        if form not in (FLOAT32, INT8):
            raise BackendError(f"the CPU computes in float32, or in int8 with an engine; {form} was asked for")
        self._threads = usable_threads() if threads is None else between("threads", threads, 1, MOST_THREADS)
        self._traces = tempfile.TemporaryDirectory(prefix="calotype-") if trace else None
        self._engine, self._session, self._held, self._own_bytes = self._open(overrides or {})
        self._traced, self._seconds = not trace, dict[str, float]()
        self._ran_large = False

    @property
    def engine(self) -> Path | None:
        """See :attr:`Session.engine`."""
        return self._engine

    @property
    def own_bytes(self) -> int:
        """See :attr:`Session.own_bytes`. An engine's weights are mapped, all but those that took their place."""
        return self._own_bytes

    @property
    def keeps_bytes(self) -> bool:
        """See :attr:`Session.keeps_bytes`.

        In float32 ONNX Runtime sums in one order whatever the rows, which
        ``tests/runtime/denoising/test_batches.py`` asserts.
        """
        return self._form == FLOAT32

    def capacity(self, sizes: Sizes) -> int:
        """See :meth:`Session.capacity`. One picture; in float32 several small ones, where it pays."""
        rows = 2 if "rows" in self._symbols else 1  # of a picture, which may be guided
        if self._form != FLOAT32 or "height" not in self._symbols:
            return rows
        return max(rows, rows * SHARED // (sizes["height"] * sizes["width"]))

    def run(self, sizes: Sizes) -> None:
        """See :meth:`Session.run`."""
        bound = self._at(sizes)
        self._ran_large |= bound.large
        try:
            self._session.run_with_iobinding(bound.binding)
        except Exception as error:
            raise _explained(f"run at {', '.join(f'{name}={size}' for name, size in sizes.items())}", error) from error

    def set_weights(self, changes: Changes | None) -> None:
        """See :meth:`Session.set_weights`."""
        self._check_usable()
        opened = self._open(changes or {})  # before the other is given up: this may fail
        self._read_profile()
        self._engine, self._session, self._held, self._own_bytes = opened
        self._traced = self._traces is None
        for shape in self._shapes.values():
            shape.binding = self._bind(shape.views)

    def operators(self) -> dict[str, float]:
        """See :meth:`Session.operators`. Of the runs until the first call."""
        self._read_profile()
        return dict(self._seconds)

    def trim(self) -> None:
        """See :meth:`Session.trim`. What runs of ``SHARED`` latents' pixels take is kept.

        ONNX Runtime keeps what its runs took until one is told to give it back, which also one does that is ended
        before it begins.
        """
        self._check_usable()
        if not self._ran_large:
            return
        options = onnxruntime.RunOptions()
        options.terminate = True
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        with contextlib.suppress(Exception):  # that it was ended
            self._session.run_with_iobinding(next(reversed(self._shapes.values())).binding, options)
        for key, bound in list(self._shapes.items()):
            if bound.large:
                self._drop(key)
        self._ran_large = False

    def _close(self) -> None:
        self._read_profile()
        super()._close()
        del self._session, self._held
        if self._traces is not None:
            self._traces.cleanup()

    def _read_profile(self) -> None:
        """Add up what ONNX Runtime has noted, which ends its noting."""
        if self._traced:
            return
        self._traced = True
        for event in json.loads(Path(self._session.end_profiling()).read_text()):
            if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
                operator = event["args"]["op_name"]
                self._seconds[operator] = self._seconds.get(operator, 0.0) + event["dur"] / 1e6

    def _open(self, overrides: Changes) -> tuple[Path | None, Any, list[Any], int]:
        """The plan that is opened, None for the bundle's graph; ONNX Runtime's session, the weights that it reads in
        place, and the bytes of all that are its own.
        """
        engine = _open_engine(self._folder, self._spec, self._form, self._options(), overrides, self._own_weights)
        if engine is not None:
            path, session, held = engine
            own = sum(value.tensor_size_in_bytes() for value in held)
            if held and self._form == INT8:  # of which kernels arrange all anew, for each session
                own += weights_of(path).stat().st_size
            return path, session, held, own
        if self._form != FLOAT32:
            changed = " whose weights can be changed as a LoRA needs" if overrides else ""
            raise BackendError(
                f"{self._name} has no engine in {self._form} for this machine{changed}; build one with: calotype build "
                f"{self._folder} --backend cpu --precision {self._form}{' --force' if overrides else ''}"
            )
        self._before_reading()
        session = _open_graph(self._folder / self._name, overrides, self._options())
        return None, session, [], _float32_bytes(self._folder / self._spec.weights[0])

    def _own_weights(self) -> Changes:
        self._before_reading()
        return SafetensorsFile(self._folder / self._spec.weights[0])

    def _options(self) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what is wrong is in the exception, and said in one line
        if not is_whole_machine(self._threads):  # else it pins them to the cores, which it does only unasked
            options.intra_op_num_threads = self._threads
        # A pattern lays all that a size takes into one piece, which the second run asks for beside the pieces that the
        # first one took: with engines of SD 1.5 that made 6.6 GB at 512 x 512, where it is 3.7 without.
        options.enable_mem_pattern = False
        if self._traces is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(self._traces.name) / "trace")
        return options

    def _prepare(self, sizes: Sizes) -> _Bound:
        views = allocate(self._tensors, sizes, self._links)
        rows = sizes.get("rows", 2 * sizes.get("batch", 1))
        large = rows * sizes.get("height", 0) * sizes.get("width", 0) > 2 * SHARED
        return _Bound(views=views, binding=self._bind(views), large=large)

    def _bind(self, views: Mapping[str, NDArray[Any]]) -> Any:
        binding = self._session.io_binding()
        for specs, bind in ((self.inputs, binding.bind_input), (self.outputs, binding.bind_output)):
            for spec in specs:
                view = views[spec.name]
                bind(spec.name, "cpu", 0, view.dtype, view.shape, view.ctypes.data)
        return binding


def _open_graph(graph: Path, overrides: Changes, options: Any) -> Any:
    # Copied or packed while the session opens: the arrays need not outlive this call.
    arrays = read_all(overrides, initializer_names(graph)) if overrides else {}
    try:
        if arrays:
            values = list(map(onnxruntime.OrtValue.ortvalue_from_numpy, arrays.values()))
            options.add_external_initializers(list(arrays), values)
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's own exceptions have no common class but this
        raise _explained(f"open {graph.name}", error) from error


def _float32_bytes(weights: Path) -> int:
    """Bytes of all weights in the file, in float32."""
    file = SafetensorsFile(weights)
    return sum(4 * math.prod(file.shape(name)) for name in file)


def _explained(what: str, error: Exception) -> BackendError:
    text = " ".join(str(error).split())
    if any(words in text for words in ("allocate memory", "bad allocation", "bad_alloc")):
        return BackendError(
            f"there is not enough memory to {what}; use a smaller size, --vae-tiling or --low-memory, or engines, "
            "which need less: calotype build BUNDLE --backend cpu"
        )
    return BackendError(f"ONNX Runtime cannot {what}: {text}")


def _open_engine(
    folder: Path, spec: ModelSpec, form: Form, options: Any, overrides: Changes, own: Callable[[], Changes]
) -> tuple[Path, Any, list[Any]] | None:
    """The engine that serves ``spec`` here, its session, and its own weights; None where none is sound and fits."""
    found = serving_engine(folder, spec, form)
    if found is None:
        return None
    path, record = found
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # it was done before
    # Large weights in float32 stay in the file's pages. In int8 kernels would arrange theirs anew in every run.
    if form == FLOAT32 and record.weights is not None and record.weights.size > PACKED:
        options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry(WEIGHTS_FOLDER, str(path.parent))
    try:
        data = read_plan(path, record)
        weights = _laid_out(path, data, overrides, own, logger.warning if form == FLOAT32 else logger.info)
        if weights is None:
            return None
        held = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
        for name, value in zip(weights, held, strict=True):
            options.add_initializer(name, value)  # read where it lies, not copied
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        logger.info("%s: its engine in %s", spec.graphs[form.graph], form)
        return path, session, held
    except InputError:  # of the changes
        raise
    except Exception as error:
        logger.warning(
            "the engine %s cannot be opened: %s; build it again with: calotype build BUNDLE --backend cpu",
            path.name,
            error,
        )
        return None


def _laid_out(
    path: Path, data: bytes, overrides: Changes, own: Callable[[], Changes], say: Callable[..., None]
) -> dict[str, NDArray[Any]] | None:
    """What takes the place of an engine's weights, by their names there; None where it cannot be.

    ``own`` gives the bundle's weights, for what is made from several tensors; ``say`` is told why not.
    """
    if not overrides:
        return {}
    layouts = Layouts.read(data)
    if layouts is None:
        say(
            "the engine %s is of a version whose weights could not be changed, so LoRAs run without it, and slower; "
            "build it again with: calotype build BUNDLE --backend cpu --force",
            path.name,
        )
        return None
    fixed = sorted(layouts.fixed & overrides.keys())
    if fixed:
        say("the engine %s cannot change %s, so this LoRA runs without it", path.name, ", ".join(fixed[:3]))
        return None

    def read(name: str) -> NDArray[np.float32]:
        return single(overrides, name) if name in overrides else single(own(), name)

    by_tensor: dict[str, dict[str, Layout]] = {}  # so that each is made once
    for name, layout in layouts.affected(list(overrides)).items():
        by_tensor.setdefault(layout.tensor, {})[name] = layout

    def laid_out(tensor: str) -> dict[str, NDArray[Any]]:
        simple = all(layout.steps == TURNED for layout in by_tensor[tensor].values())
        if simple and isinstance(overrides, SingleChanges) and tensor in overrides:  # most; need not be made whole
            made = turned(overrides.shape(tensor), overrides.pieces(tensor))
            return dict.fromkeys(by_tensor[tensor], made)
        value = read(tensor)
        return {name: layout.apply(value, read) for name, layout in by_tensor[tensor].items()}

    made = run_parallel(laid_out, by_tensor, most=usable_threads())
    return {name: value for part in made for name, value in part.items()}


def int8_probe(folder: Path, spec: ModelSpec) -> Inputs | None:
    """Inputs that the network met when its engine in int8 was calibrated; None where there is none, or it has none.

    Raises:
        BuildError, ValueError: the engine is damaged.
    """
    found = serving_engine(folder, spec, INT8)
    text = None if found is None else read_remark(read_plan(*found), PROBE)
    return None if text is None else read_inputs(text)


def serving_engine(folder: Path, spec: ModelSpec, form: Form) -> tuple[Path, PlanRecord] | None:
    """The newest sound engine of the network for this processor and ONNX Runtime."""
    processor = instruction_sets()
    if processor is None or not any(".cpu." in path.name for path in list_plans()):
        return None
    files = Manifest.read(folder).files
    wanted = WantedOnCpu(
        version=onnxruntime.__version__,
        graphs=(files[spec.graphs[form.graph]].sha256,),
        weights=tuple(files[path].sha256 for path in spec.weights),
        processor=processor,
        precision=str(form),
    )
    found, refusal = find_plans(wanted)
    for path, record in found:
        trouble = plan_trouble(path, thoroughly=False)
        if trouble is None:
            return path, record
        refusal = f"{path.name}: {trouble}"
    if refusal:
        logger.warning(
            "%s runs without its engine: %s; build it again with: calotype build BUNDLE --backend cpu",
            spec.graphs[form.graph],
            refusal,
        )
    return None
