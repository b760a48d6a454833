"""From a bundle's graphs to plans."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from calotype.engine.cache import Built, Say, is_kept, kept_file, obtain
from calotype.engine.memory import estimate_activations
from calotype.engine.profiles import Profile, Shapes, check_profiles, default_profile, network_shapes
from calotype.engine.targets import aim, check_targets
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.manifest import ASIDE, FileRecord
from calotype.runtime.errors import BackendError, BuildError, InputError, MissingPackageError
from calotype.runtime.sessions.cuda import Gpu, load_cuda
from calotype.runtime.sessions.libraries import Library, load_library
from calotype.runtime.sessions.plans import PORTABLE, cache_folder, sound_records

Progress = Callable[[str, float], None]
# Bytes of kernels for every GPU generation in a TensorRT-RTX 1.7 plan: 18 MB seen for a UNet of a few thousand weights.
KERNELS = 32 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a build is asked for besides its shapes.

    Attributes:
        precision: which variant of the graphs; None is float16 where there is one, else float32.
        version_compatible: later versions of the library, and its lean runtime, run the plan too; TensorRT alone.
        hardware_compatible: other GPUs of the same compute capability run it too. TensorRT-RTX's plans always do more.
        targets: the compute capabilities that one plan is for, as ``("sm86", "sm89")``; empty is TensorRT-RTX's own
            choice, and with TensorRT the GPU that it is built on.
        strip_weights: leave the weights out; the runtime puts a bundle's own in when it opens the plan, so that all
            models of one architecture share it. Needs a GPU.
        force: build also what the cache has.
    """

    precision: str | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    targets: tuple[str, ...] = ()
    strip_weights: bool = False
    force: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Job:
    network: str
    precision: str
    graph: str
    weights: tuple[str, ...]
    shapes: list[Shapes]


def build_bundle(
    bundle: Bundle,
    *,
    backend: str,
    profiles: Sequence[Profile] | None = None,
    options: Options | None = None,
    networks: Sequence[str] | None = None,
    say: Say = lambda _: None,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Build, or take from the cache, a plan of each network of ``bundle``; all profiles lie in each plan.

    Args:
        bundle: an opened, checked bundle.
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        profiles: the default one of the bundle where None.
        options: see :class:`Options`.
        networks: these alone; None is all but those of deep-feature caching, a second UNet that few will use.
        say: is told in one line what happens.
        progress: is told the builder's phase and how much of it is done, 0 to 1.

    Raises:
        BuildError: an operator is not supported, the build fails, or the disk or the GPU is too small.
        InputError: profiles do not fit, or the bundle has no such network or precision.
        BackendError, MissingPackageError: the backend cannot be loaded, or needs a GPU that is not there.
    """
    options = options or Options()
    if options.version_compatible and backend == "tensorrt-rtx":
        raise InputError(
            "plans for later versions are TensorRT's: tensorrt-rtx comes without the lean runtime that goes into them; "
            "leave --version-compatible out, and build again after an update"
        )
    profiles = [default_profile(bundle.manifest)] if profiles is None else profiles
    check_profiles(profiles)
    names = [name for name in bundle.manifest.networks if name not in ASIDE] if networks is None else networks
    jobs = [_job(bundle, name, profiles, options.precision) for name in names]
    library = load_library(backend)
    if not library.builds:
        raise MissingPackageError("tensorrt", "tensorrt")  # its lean runtime alone is there
    gpu = _gpu(backend, options)
    if options.targets:
        check_targets(library, options.targets, gpu)
    keys = {job.network: _key(bundle, library, job, profiles, options, gpu) for job in jobs}
    missing = [name for name, key in keys.items() if options.force or not is_kept(key)]
    state_needs(bundle, backend, jobs, missing, gpu, say)
    plans = {}
    for job in jobs:

        def build(job: _Job = job) -> Built:
            path = bundle.path / job.graph
            return build_plan(library, path, job.shapes, options=options, gpu=gpu, progress=progress)

        plans[job.network] = obtain(keys[job.network], build, say, force=options.force)
    return plans


def _job(bundle: Bundle, name: str, profiles: Sequence[Profile], precision: str | None) -> _Job:
    manifest = bundle.manifest
    if name not in manifest.networks:
        raise InputError(f"the bundle has no network {name!r}; valid: {', '.join(manifest.networks)}")
    spec = manifest.networks[name]
    if precision is None:
        precision = "float16" if "float16" in spec.graphs else "float32"
    if precision not in spec.graphs:
        raise InputError(f"{name} has no {precision} graph; valid: {', '.join(spec.graphs)}")
    shapes = [network_shapes(profile, spec, manifest) for profile in profiles]
    return _Job(network=name, precision=precision, graph=spec.graphs[precision], weights=spec.weights, shapes=shapes)


def _gpu(backend: str, options: Options) -> Gpu | None:
    """The GPU to build for; None for a plan of TensorRT-RTX, which is for all it knows and needs none."""
    if backend == "tensorrt-rtx" and not options.strip_weights:
        return None
    try:
        return load_cuda(backend).gpu()
    except BackendError as error:
        what = "building without weights" if options.strip_weights else f"building for {backend}"
        raise BackendError(f"{what} needs a GPU: {error}") from error


def _key(
    bundle: Bundle, library: Library, job: _Job, profiles: Sequence[Profile], options: Options, gpu: Gpu | None
) -> dict[str, Any]:
    files = bundle.manifest.files
    return {
        "bundle": "shared" if options.strip_weights else bundle.manifest.name,
        "network": job.network,
        "backend": library.name,
        "version": library.version,
        "builder": FileRecord.of(Path(__file__)).sha256,
        "graph": files[job.graph].sha256,
        "weights": [] if options.strip_weights else [files[path].sha256 for path in job.weights],
        "precision": job.precision,
        "profiles": [profile.to_json() for profile in profiles],
        "version_compatible": options.version_compatible,
        "hardware_compatible": options.hardware_compatible,
        "stripped": options.strip_weights,
        **_machine(library, options, gpu),
    }


def _machine(library: Library, options: Options, gpu: Gpu | None) -> dict[str, Any]:
    """The part of a key that says where the plan runs."""
    named: dict[str, Any] = {"targets": list(options.targets)} if options.targets else {}
    if gpu is None or library.name == "tensorrt-rtx":
        return {**PORTABLE, **named}
    if options.targets:
        return {"gpu": PORTABLE["gpu"], "driver": gpu.driver, **named}
    return {"gpu": gpu.capability if options.hardware_compatible else gpu.identity, "driver": gpu.driver}


def state_needs(
    bundle: Bundle, backend: str, jobs: Sequence[_Job], missing: Sequence[str], gpu: Gpu | None, say: Say
) -> None:
    """Say what the plans will need, before anything is built; disk and time those of the networks ``missing`` alone.

    Raises:
        BuildError: the disk, or the GPU they are built on, clearly lacks it.
    """
    files, weights, largest, alone, disk = bundle.manifest.files, 0, 0, 0, 0
    for job in jobs:
        # A graph that computes in float32 may hold its fp16 weights so.
        size = sum(files[path].size for path in job.weights) * (2 if job.precision == "float32" else 1)
        most = max(
            estimate_activations(bundle.path / job.graph, {name: bounds[2] for name, bounds in shapes.items()})
            for shapes in job.shapes
        )
        say(
            f"{job.network}: {job.precision}, weights at most {_mib(size)}, "
            f"activations about {_mib(most)} at the largest shape"
        )
        weights, largest, alone = weights + size, max(largest, most), max(alone, size + most)
        disk += size + KERNELS if job.network in missing else 0
    free = shutil.disk_usage(cache_folder()).free
    say(
        f"disk: about {_mib(disk)}, {_mib(free)} are free; GPU memory to run: about {_mib(weights + largest)}, "
        f"with --low-memory {_mib(alone)}"
    )
    say(_expected_time(backend, disk))
    if disk > free:
        raise BuildError(
            f"{cache_folder()} has {_mib(free)} free and the plans need about {_mib(disk)}; "
            "free some space with calotype build --clean, or set CALOTYPE_CACHE"
        )
    if gpu is not None and alone > gpu.memory:
        raise BuildError(
            f"{gpu.name} has {_mib(gpu.memory)} of memory and the largest plan alone needs about {_mib(alone)}; "
            "use smaller profiles: --batch, --height, --width or --static"
        )


def _expected_time(backend: str, disk: int) -> str:
    """From the largest plan that this backend built here, for ``disk`` bytes of plans."""
    if not disk:
        return "time: none, all plans are there"
    records = [record for _, record in sound_records()]
    built = [item for item in records if item.key["backend"] == backend and item.figures.get("seconds")]
    if not built:
        return f"time: not known, since {backend} has built nothing here yet"
    largest = max(built, key=lambda item: item.size)
    seconds = largest.figures["seconds"] * disk / max(1, largest.size)
    return f"time: about {max(1, round(seconds))} s, by the largest plan here"


def _mib(size: float) -> str:
    return f"{size / 2**20:.0f} MiB"


def build_plan(
    library: Library,
    graph: Path,
    profiles: Sequence[Shapes],
    *,
    options: Options | None = None,
    gpu: Gpu | None = None,
    progress: Progress | None = None,
) -> Built:
    """Parse and build one graph.

    Raises:
        BuildError: with operator and node where the parser refuses one, else with the library's first message.
    """
    options, logger, start = options or Options(), library.logger, time.perf_counter()
    monitor, mark = _monitor(library.api, progress), logger.mark()
    builder = library.api.Builder(logger)
    with _interrupts(monitor):
        network = _parse(library, builder, graph, mark)
        config = _config(library, builder, profiles, options)
        config.progress_monitor = monitor
        with _timing_cache(library, config, gpu):
            plan = None if monitor.stopped is not None else builder.build_serialized_network(network, config)
            if monitor.stopped is not None:
                raise monitor.stopped
            if plan is None:
                raise BuildError(f"{library.name} {library.version} cannot build {graph.name}: {logger.first(mark)}")
    tensors = {
        "inputs": [_tensor(network.get_input(index)) for index in range(network.num_inputs)],
        "outputs": [_tensor(network.get_output(index)) for index in range(network.num_outputs)],
        "profiles": [{name: [list(shape) for shape in bounds] for name, bounds in item.items()} for item in profiles],
    }
    memory = logger.memory(mark)
    figures = {
        "seconds": time.perf_counter() - start,
        "weights": memory.get("Weights Memory", 0),
        "activations": memory.get("Activation Memory", 0),
    }
    return Built(plan=plan, tensors=tensors, figures=figures)


def _parse(library: Library, builder: Any, graph: Path, mark: int) -> Any:
    api, flags = library.api, 0
    if hasattr(api.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        flags = 1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = api.OnnxParser(network, library.logger)
    if not parser.parse_from_file(str(graph)):
        raise BuildError(_refusal(library, parser, graph, mark))
    _let_attention_decompose(api, network)
    return network


def _config(library: Library, builder: Any, profiles: Sequence[Shapes], options: Options) -> Any:
    api, config = library.api, builder.create_builder_config()
    if options.version_compatible:
        config.set_flag(api.BuilderFlag.VERSION_COMPATIBLE)
    if options.targets:
        aim(library, config, options.targets)
    elif options.hardware_compatible and library.name == "tensorrt":
        config.hardware_compatibility_level = api.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    if hasattr(api.BuilderFlag, "REQUIRE_USER_ALLOCATION"):
        # The runtime gives it all its memory: what it took for itself while running no CUDA graph could hold.
        config.set_flag(api.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if options.strip_weights:
        config.set_flag(api.BuilderFlag.STRIP_PLAN)
        config.set_flag(api.BuilderFlag.REFIT)
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, (least, best, most) in shapes.items():
            profile.set_shape(name, least, best, most)
        config.add_optimization_profile(profile)
    return config


@contextlib.contextmanager
def _timing_cache(library: Library, config: Any, gpu: Gpu | None) -> Iterator[None]:
    """What earlier builds on this GPU measured. TensorRT-RTX measures nothing, and its calls for it need a GPU."""
    if library.name != "tensorrt" or gpu is None:
        yield
        return
    name = f"{library.name}-{library.version}-{gpu.identity.replace(' ', '_')}.timing"
    with kept_file(cache_folder() / name) as (data, replace):
        # A file that is refused, as another library's would be, is made anew.
        known = config.create_timing_cache(data)
        if known is None or not config.set_timing_cache(known, ignore_mismatch=False):
            config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
        yield
        replace(config.get_timing_cache().serialize())


def _let_attention_decompose(api: Any, network: Any) -> None:
    """Where no fused kernel fits (float32, head size 512), attention is built from its parts, not refused."""
    if not hasattr(api, "IAttentionInputLayer"):
        return  # TensorRT before 10.14 has no attention layer
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == api.LayerType.ATTENTION_INPUT:
            layer.__class__ = api.IAttentionInputLayer  # the bindings' way of casting
            layer.attention.decomposable = True


def _tensor(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype.name.lower(), "shape": list(tensor.shape)}


def _refusal(library: Library, parser: Any, graph: Path, mark: int) -> str:
    if not parser.num_errors:
        return f"{library.name} cannot read {graph.name}: {library.logger.first(mark)}"
    error = parser.get_error(0)
    return (
        f"{library.name} {library.version} does not support the operator {error.node_operator()} "
        f"(node {error.node_name()!r} of {graph.name}): {error.desc()}"
    )


@contextlib.contextmanager
def _interrupts(monitor: Any) -> Iterator[None]:
    """Let Ctrl-C stop the build: raised inside one of the library's calls back, the library would swallow it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        monitor.stopped = KeyboardInterrupt()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _monitor(api: Any, progress: Progress | None) -> Any:
    class Monitor(api.IProgressMonitor):  # type: ignore[misc]
        """Tells ``progress``, and stops the build when it is told to."""

        def __init__(self) -> None:
            api.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.stopped: BaseException | None = None

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = steps

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

        def step_complete(self, phase: str, step: int) -> bool:
            try:
                if self.stopped is not None:
                    return False
                if progress is not None:
                    progress(phase, (step + 1) / max(1, self.steps.get(phase, 1)))
            except BaseException as error:  # an exception must not cross the library's C++ frames
                self.stopped = error
                return False
            return True

    return Monitor()
