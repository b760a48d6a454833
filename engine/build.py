"""From a bundle's graphs to plans."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from calotype.engine.backends import Backend, load_backend, target
from calotype.engine.cache import Say, cache_folder, obtain
from calotype.engine.profiles import Profile, Shapes, check_profiles, default_profile, network_shapes
from calotype.runtime.bundle import Bundle
from calotype.runtime.errors import BuildError, InputError

Progress = Callable[[str, float], None]
# Bytes of kernels for every GPU generation in a TensorRT-RTX 1.7 plan: 18 MB seen for a UNet of a few thousand weights.
KERNELS = 32 << 20


def build_bundle(
    bundle: Bundle,
    *,
    backend: str,
    profiles: Sequence[Profile] | None = None,
    precision: str = "float32",
    version_compatible: bool = False,
    networks: Sequence[str] | None = None,
    say: Say = lambda _: None,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Build, or take from the cache, a plan of each network of ``bundle``; all profiles lie in each plan.

    Args:
        bundle: an opened, checked bundle.
        backend: ``tensorrt`` or ``tensorrt-rtx``.
        profiles: the default one of the bundle where None.
        precision: which variant of the graphs.
        version_compatible: build for the lean runtime of later versions too.
        networks: these alone.
        say: is told in one line what happens.
        progress: is told the builder's phase and how much of it is done, 0 to 1.

    Raises:
        BuildError: an operator is not supported, the build fails, or the disk is too small.
        InputError: profiles do not fit, or the bundle has no such network or precision.
        BackendError, MissingPackageError: the backend cannot be loaded.
    """
    manifest = bundle.manifest
    profiles = [default_profile(manifest)] if profiles is None else profiles
    check_profiles(profiles)
    jobs = {}
    for name in manifest.networks if networks is None else networks:
        if name not in manifest.networks:
            raise InputError(f"the bundle has no network {name!r}; valid: {', '.join(manifest.networks)}")
        spec = manifest.networks[name]
        if precision not in spec.graphs:
            raise InputError(f"{name} has no {precision} graph; valid: {', '.join(spec.graphs)}")
        jobs[name] = [network_shapes(profile, spec, manifest) for profile in profiles]
    library = load_backend(backend)
    need = estimate_disk(bundle, jobs)
    free = shutil.disk_usage(cache_folder()).free
    say(f"plans need about {need / 2**20:.0f} MiB of disk, {free / 2**20:.0f} MiB are free")
    if need > free:
        raise BuildError(
            f"{cache_folder()} has {free / 2**20:.0f} MiB free and the plans need about {need / 2**20:.0f}; "
            "free some space with calotype build --clean, or set CALOTYPE_CACHE"
        )
    machine, plans = target(), {}
    for name, shapes in jobs.items():
        graph = manifest.networks[name].graphs[precision]
        key = {
            "bundle": manifest.name,
            "network": name,
            "backend": backend,
            "version": library.version,
            "graph": manifest.files[graph].sha256,
            "weights": [manifest.files[path].sha256 for path in manifest.networks[name].weights],
            "precision": precision,
            "profiles": [profile.to_json() for profile in profiles],
            "version_compatible": version_compatible,
            **machine,
        }

        def build(graph: str = graph, shapes: list[Shapes] = shapes) -> tuple[Any, Mapping[str, Any]]:
            return build_plan(
                library, bundle.path / graph, shapes, version_compatible=version_compatible, progress=progress
            )

        plans[name] = obtain(key, build, say)
    return plans


def estimate_disk(bundle: Bundle, networks: Mapping[str, Any]) -> int:
    """Bytes, on the high side: each network's weights files twice (fp16 may be kept as fp32), and its kernels."""
    manifest = bundle.manifest
    weights = sum(manifest.files[path].size for name in networks for path in manifest.networks[name].weights)
    return 2 * weights + KERNELS * len(networks)


def build_plan(
    backend: Backend,
    graph: Path,
    profiles: Sequence[Shapes],
    *,
    version_compatible: bool = False,
    progress: Progress | None = None,
) -> tuple[Any, dict[str, Any]]:
    """Parse and build one graph.

    Returns:
        The plan, an object with the buffer protocol, and its inputs and outputs with every profile's shapes.

    Raises:
        BuildError: with operator and node where the parser refuses one, else with the library's first message.
    """
    api = backend.api
    logger = _logger(api)
    builder = api.Builder(logger)
    flags = 0
    if hasattr(api.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        flags = 1 << int(api.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = api.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        raise BuildError(_refusal(backend, parser, graph, logger))
    _let_attention_decompose(api, network)
    config = builder.create_builder_config()
    if version_compatible:
        config.set_flag(api.BuilderFlag.VERSION_COMPATIBLE)
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, (least, best, most) in shapes.items():
            profile.set_shape(name, least, best, most)
        config.add_optimization_profile(profile)
    monitor = _monitor(api, progress)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if monitor.stopped is not None:
        raise monitor.stopped
    if plan is None:
        raise BuildError(f"{backend.name} {backend.version} cannot build {graph.name}: {logger.first()}")
    tensors = {
        "inputs": [_tensor(network.get_input(index)) for index in range(network.num_inputs)],
        "outputs": [_tensor(network.get_output(index)) for index in range(network.num_outputs)],
        "profiles": [{name: [list(shape) for shape in bounds] for name, bounds in item.items()} for item in profiles],
    }
    return plan, tensors


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


def _refusal(backend: Backend, parser: Any, graph: Path, logger: Any) -> str:
    if not parser.num_errors:
        return f"{backend.name} cannot read {graph.name}: {logger.first()}"
    error = parser.get_error(0)
    return (
        f"{backend.name} {backend.version} does not support the operator {error.node_operator()} "
        f"(node {error.node_name()!r} of {graph.name}): {error.desc()}"
    )


def _logger(api: Any) -> Any:
    class Logger(api.ILogger):  # type: ignore[misc]
        """Keeps errors; the rest is the library talking to itself."""

        def __init__(self) -> None:
            api.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (api.ILogger.Severity.ERROR, api.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))

        def first(self) -> str:
            return self.errors[0] if self.errors else "it gives no reason"

    return Logger()


def _monitor(api: Any, progress: Progress | None) -> Any:
    class Monitor(api.IProgressMonitor):  # type: ignore[misc]
        """Tells ``progress``; Python's signals arrive here too, and stop the build."""

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
