"""From a bundle's graphs to engines for this processor: ONNX Runtime's own optimizations, made once and kept.

Opening a graph of SD 1.5's size costs ONNX Runtime ten seconds of a processor, and a private copy of all weights in the
layout of its kernels. An engine is the graph as it stands after that, and the weights so laid out in a file that is
mapped into memory: it opens at once, and processes that run it share its pages.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx

from calotype.engine import bands, calibration, cpu_operators, graph, int8, layouts, winograd
from calotype.engine.cache import Built, Say, obtain, plan_path
from calotype.engine.calibration import Evaluation, evaluations
from calotype.engine.graph import Arrays
from calotype.runtime.bundle import parity
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.manifest import ASIDE, FileRecord
from calotype.runtime.bundle.parity import SIZES, Figures, Inputs, cases, compare
from calotype.runtime.bundle.safetensors import SafetensorsFile
from calotype.runtime.bundle.spec import ModelSpec
from calotype.runtime.diagnostics.verification import read_tokens
from calotype.runtime.errors import BackendError, BuildError, InputError
from calotype.runtime.graphs import layouts as runtime_layouts
from calotype.runtime.graphs import quantization
from calotype.runtime.graphs import winograd as runtime_winograd
from calotype.runtime.graphs.quantization import MAX_ROOT_MEAN_SQUARE, relative_error
from calotype.runtime.graphs.remarks import PROBE, write_inputs
from calotype.runtime.onnx_runtime import import_onnxruntime
from calotype.runtime.sessions.plans import cache_folder, weights_of
from calotype.runtime.sessions.processor import instruction_sets, multiplies_bytes, usable_threads
from calotype.runtime.untrusted import why

onnxruntime = import_onnxruntime("onnxruntime", "cpu")

# Largest difference from the bundle's graph, over the largest magnitude; on inputs made to be extreme, where rounding
# grows in any order of operations, what an export is allowed.
MAX_RELATIVE = 1e-5
PROBE_SIDE = 32  # latents of a side of the inputs that are kept
PROMPTS = 4  # drawn to see what values an int8 engine meets; the last is kept for the comparison
PRECISIONS = ("float32", "int8")
INT8_NETWORK = "unet"  # where nearly all the time goes
OPERATORS = tuple(
    str(own.__file__) for own in (graph, cpu_operators, winograd, bands, layouts, runtime_layouts, runtime_winograd)
)
ROUNDING = (int8.__file__, calibration.__file__, quantization.__file__)
WEIGHTS_FILE = "session.optimized_model_external_initializers_file_name"
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


def build_engines(
    bundle: Bundle,
    *,
    networks: Sequence[str] | None = None,
    precision: str = "float32",
    force: bool = False,
    say: Say = lambda _: None,
) -> dict[str, Path]:
    """Build, or take from the cache, an engine of each network of ``bundle``; one takes every size.

    Args:
        bundle: an opened, checked bundle.
        networks: these alone; None is all but those of deep-feature caching, a second UNet that few will use. In int8
            there is the UNet alone.
        precision: ``float32`` or ``int8``; see :mod:`calotype.engine.int8`.
        force: build also what the cache has.
        say: is told in one line what happens.

    Raises:
        BuildError: the disk is too small, or an engine does not compute what the bundle's graph does.
        InputError: the bundle has no such network.
        BackendError: the system does not say what the processor can do.
    """
    manifest = bundle.manifest
    if precision not in PRECISIONS:
        raise InputError(f"precision={precision!r} has no engines for the CPU; valid: {', '.join(PRECISIONS)}")
    valid = [name for name in manifest.networks if precision == "float32" or name == INT8_NETWORK]
    names = [name for name in valid if name not in ASIDE] if networks is None else networks
    for name in names:
        if name not in manifest.networks:
            raise InputError(f"the bundle has no network {name!r}; valid: {', '.join(valid)}")
        if name not in valid:
            raise InputError(f"{name} is not built in {precision}; valid: {', '.join(valid)}")
    _state_needs({name: weights_size(bundle.path / manifest.networks[name].graphs["float32"]) for name in names}, say)
    plans = {}
    for name in names:
        key = _key(bundle, name, precision)
        build = functools.partial(build_engine, bundle, name, plan_path(key), precision=precision, say=say)
        plans[name] = obtain(key, build, say, force=force)
    return plans


def build_engine(
    bundle: Bundle, network: str, path: Path, *, precision: str = "float32", say: Say = lambda _: None
) -> Built:
    """The engine of one network, to be kept as ``path``; its weights are written there, under another name.

    Raises:
        BuildError: it does not compute what the bundle's graph does, or ONNX Runtime cannot build it.
    """
    start, spec = time.perf_counter(), bundle.manifest.networks[network]
    weights = weights_of(path).with_name(weights_of(path).name + ".partial")
    try:
        if precision == "int8":
            model, figures = _int8(bundle, spec, weights, say)
        else:
            model, figures = _float32(bundle, network, weights, say)
        _relocate(model.graph, weights_of(path).name)
        with weights.open("ab") as file:  # ONNX Runtime has none where all weights are small
            os.fchmod(file.fileno(), 0o600)
            os.fsync(file.fileno())
    except BaseException:
        weights.unlink(missing_ok=True)
        raise
    return Built(
        plan=model.SerializeToString(),
        tensors={way: [item.to_json() for item in getattr(spec, way)] for way in ("inputs", "outputs")},
        figures={"seconds": time.perf_counter() - start, **figures},
        weights=weights,
    )


def weights_size(path: Path) -> int:
    """Bytes of the weights of a float32 engine of the graph ``path``."""
    model = onnx.load(path, load_external_data=False)
    stored: int = sum(4 * math.prod(tensor.dims) for tensor in model.graph.initializer)
    return stored + winograd.growth(graph.Graph(model.graph))


def _key(bundle: Bundle, network: str, precision: str) -> dict[str, Any]:
    files, spec, processor = bundle.manifest.files, bundle.manifest.networks[network], instruction_sets()
    if processor is None:
        raise BackendError(
            "the system does not say what its processor can do, so no engine can be made; run without one"
        )
    return {
        "bundle": bundle.manifest.name,
        "network": network,
        "backend": "cpu",
        "version": onnxruntime.__version__,
        "graph": files[spec.graphs["float32"]].sha256,
        "weights": [files[path].sha256 for path in spec.weights],
        "precision": precision,
        "processor": processor,
        "operators": [FileRecord.of(Path(item)).sha256 for item in OPERATORS],
        **({} if precision == "float32" else {"rounding": [FileRecord.of(Path(item)).sha256 for item in ROUNDING]}),
    }


def _state_needs(sizes: dict[str, int], say: Say) -> None:
    """Say what will be needed; raises BuildError where the disk clearly lacks it."""
    disk, free = sum(sizes.values()), shutil.disk_usage(cache_folder()).free
    say(
        f"disk: about {_mib(disk)}, {_mib(free)} are free; memory while building: about {_mib(3 * max(sizes.values()))}"
    )
    if disk > free:
        raise BuildError(
            f"{cache_folder()} has {_mib(free)} free and the engines need about {_mib(disk)}; "
            "free some space with calotype build --clean, or set CALOTYPE_CACHE"
        )


def _prepare(folder: Path, spec: ModelSpec) -> tuple[onnx.ModelProto, Arrays]:
    """The network in the operators that suit, and its weights by name."""
    model = onnx.load(folder / spec.graphs["float32"], load_external_data=False)
    cpu_operators.rewrite(model)
    return model, {name: array for path in spec.weights for name, array in SafetensorsFile(folder / path).items()}


def _optimize(model: onnx.ModelProto, stored: Arrays, weights: Path) -> tuple[onnx.ModelProto, Any]:
    """Let ONNX Runtime write the graph as its kernels want it, and the weights as ``weights``; and open the two."""
    optimized = weights.with_name(weights.name + ".graph")
    options = _options()
    options.optimized_model_filepath = str(optimized)
    options.add_session_config_entry(WEIGHTS_FILE, weights.name)
    try:
        _session(model, stored, options)
        found = onnx.load(optimized, load_external_data=False)
    except BuildError:
        _check_room(weights, sum(4 * array.size for array in stored.values()))  # halves are written as floats
        raise
    finally:
        optimized.unlink(missing_ok=True)
    return found, _open(found, weights.parent)


def _check_room(weights: Path, size: int) -> None:
    """Raises BuildError where the disk is full: ONNX Runtime says where in its sources it failed, and not why."""
    try:
        with weights.open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise BuildError(
            f"{weights.parent} cannot be written: {why(error)}; free some space with calotype build --clean, or set "
            "CALOTYPE_CACHE"
        ) from error


def _session(model: onnx.ModelProto, stored: Arrays, options: Any) -> Any:
    # Given as arrays: weights in a cache of the Hugging Face Hub are links, which a graph in memory may not follow.
    names = [tensor.name for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(stored[name]) for name in names]
    options.add_external_initializers(names, values)
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library's own exceptions have no common class but this
        raise BuildError(f"ONNX Runtime cannot build the graph: {error}") from error


def _float32(bundle: Bundle, network: str, weights: Path, say: Say) -> tuple[onnx.ModelProto, dict[str, float]]:
    """The engine in float32, its convolutions in as few products as round finely enough; and how far it strays."""
    spec = bundle.manifest.networks[network]
    for largest in (4, 2, 1):
        weights.unlink(missing_ok=True)
        model, stored = _prepare(bundle.path, spec)
        uses = layouts.Uses(model.graph, stored)
        spread = winograd.rewrite(model, stored, largest)
        model, engine = _optimize(model, {**stored, **spread}, weights)
        figures, miss = _check(bundle, network, engine)
        if miss is None:
            fixed = layouts.annotate(model, weights, uses, stored).fixed
            return model, {"max_relative": figures.max_relative, "fixed": float(len(fixed))}
        if not spread:
            break
        say(f"with convolutions by tiles of {largest} x {largest} pixels it is {miss}; smaller ones round less")
    raise BuildError(f"the engine of {network} is {miss}; run without one")


def _int8(bundle: Bundle, spec: ModelSpec, weights: Path, say: Say) -> tuple[onnx.ModelProto, dict[str, float]]:
    """The engine in int8, its convolutions in float32 where it strays too far with them; and how far it strays."""
    if not multiplies_bytes():
        raise BuildError(
            "this processor has no instructions that multiply bytes exactly; build with --precision float32"
        )
    say(f"drawing {PROMPTS} pictures exactly, to see what values it meets")
    *seen, unseen = evaluations(bundle, PROMPTS)
    ranges = _ranges(bundle.path, spec, [own for drawn in seen for own in drawn])
    for operators in dict.fromkeys((int8.OPERATORS, ("MatMul",))):
        weights.unlink(missing_ok=True)
        model, stored = _prepare(bundle.path, spec)
        uses = layouts.Uses(model.graph, stored)
        added, rounded = int8.quantize(model, stored, ranges, operators)
        every = {**stored, **added}
        every |= winograd.rewrite(model, every)
        found, engine = _optimize(model, every, weights)
        errors = [_root_mean_square(engine, own) for own in unseen]
        error = max(errors)
        how = f"{100 * error:.2f}% off its float32 graph at worst, with {' and '.join(operators)} in int8"
        if error <= MAX_ROOT_MEAN_SQUARE:
            say(how)
            layouts.annotate(found, weights, uses, stored, rounded)
            found.metadata_props.add(key=PROBE, value=write_inputs(_probe(spec, unseen[errors.index(error)])))
            return found, {"root_mean_square": error, "convolutions": float("Conv" in operators)}
        say(f"{how}: {MAX_ROOT_MEAN_SQUARE:.0%} are allowed")
    raise BuildError(f"{spec.graphs['float32']} loses too much in int8: {how}; build with --precision float32")


def _ranges(folder: Path, spec: ModelSpec, met: Sequence[Evaluation]) -> int8.Ranges:
    """Least and largest of what the convolutions read and write."""
    model, stored = _prepare(folder, spec)
    watched, names = int8.observed(model)
    session = _session(watched, stored, _options())
    outputs = [f"{name}.{edge}" for name in names for edge in int8.EDGES]
    return int8.widest((session.run(outputs, own.inputs) for own in met), names)


def _root_mean_square(engine: Any, own: Evaluation) -> float:
    """Of the difference in noise_pred, over that of the exact one."""
    (got,) = engine.run(["noise_pred"], own.inputs)
    return relative_error(got, own.noise_pred)


def _probe(spec: ModelSpec, own: Evaluation) -> Inputs:
    """The inputs of an evaluation at a small size: a part of a picture on its way is one, too."""
    most = {"height": PROBE_SIDE, "width": PROBE_SIDE}
    return {
        item.name: own.inputs[item.name][tuple(slice(most.get(str(length))) for length in item.shape)]
        for item in spec.inputs
    }


def _open(model: onnx.ModelProto, folder: Path) -> Any:
    options = _options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry(WEIGHTS_FOLDER, str(folder))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _options() -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = usable_threads()
    options.enable_mem_pattern = False  # as where engines run: it takes a size's memory twice
    # Packed copies of the weights would be private memory, for half a per cent of a step's time.
    options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def _check(bundle: Bundle, network: str, engine: Any) -> tuple[Figures, str | None]:
    """Compare ``engine`` with the bundle's graph as it stands, on the inputs that exports are checked with.

    Returns the worst figures until it is too far off, and then where.
    """
    spec = bundle.manifest.networks[network]
    tried = cases(network, spec.inputs, read_tokens(bundle, network), bundle.manifest.max_clip_skip, SIZES)
    graph, options = bundle.path / spec.graphs["float32"], _options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain, worst = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"]), Figures()
    for case, inputs in tried.items():
        for item, wanted, got in zip(spec.outputs, _run(plain, spec, inputs), _run(engine, spec, inputs), strict=True):
            figures = compare(wanted, got)
            most = MAX_RELATIVE if case == "random" else parity.MAX_RELATIVE
            if figures is None or figures.max_relative > most:
                how = "not finite" if figures is None else f"off by {figures.max_relative:.1e} of the largest value"
                return worst, f"{how} in {item.name!r} on {case!r} inputs"
            worst = worst.worse(figures)
    return worst, None


def _run(session: Any, spec: ModelSpec, inputs: Inputs) -> Any:
    return session.run([item.name for item in spec.outputs], inputs)


def _relocate(graph: onnx.GraphProto, location: str) -> None:
    """Let the weights of ``graph`` lie in the file ``location``."""
    for tensor in graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _relocate(attribute.g, location)


def _mib(size: float) -> str:
    return f"{size / 2**20:.0f} MiB"
