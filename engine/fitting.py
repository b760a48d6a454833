"""What of a bundle fits a device's memory, before anything is built: ``calotype info BUNDLE --device 6GB``."""

from __future__ import annotations

import dataclasses
import math
import re

from calotype.engine.memory import estimate_activations
from calotype.engine.profiles import default_profile, network_shapes
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.manifest import ASIDE
from calotype.runtime.diagnostics.memory import Need, most
from calotype.runtime.errors import InputError, quoted
from calotype.runtime.graphs.files import weight_bytes

UNITS = {"mb": 10**6, "gb": 10**9, "mib": 1 << 20, "gib": 1 << 30}
# What a CUDA context and a library take beside networks: 0.4 to 0.6 GB were seen.
DRIVER = 512 << 20
# Of TAESD's decoder, the usual tiny one: 1.2 million weights, and at most three tensors of 64 channels at full size.
TINY_WEIGHTS, TINY_CHANNELS = 1_222_532, 3 * 64
DECODER = "vae_decoder"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Way:
    """One way to run a bundle: what it computes in, options of ``calotype generate``, and the bytes that it takes."""

    precision: str
    options: tuple[str, ...]
    size: int


def parse_size(text: str) -> int:
    """Bytes in a text such as ``6GB``, ``7.5GiB`` or ``6144MB``.

    Raises:
        InputError: it is none.
    """
    found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?) ?(MB|GB|MiB|GiB)", text, re.IGNORECASE)
    if found is None or float(found[1]) == 0:
        raise InputError(f"the size {quoted(text)} cannot be read; valid: a number with MB, GB, MiB or GiB, as 6GB")
    return int(float(found[1]) * UNITS[found[2].lower()])


def ways(bundle: Bundle) -> list[Way]:
    """Every way to draw one guided picture of the model's own size on a GPU, from the most memory to the least.

    Weights are those that the graphs read; activations are estimated, see
    :func:`calotype.engine.memory.estimate_activations`, and so is a tiny decoder.
    """
    precisions = {precision for spec in bundle.manifest.networks.values() for precision in spec.graphs}
    found = []
    for precision in precisions:
        needs = _needs(bundle, precision)
        tiny = [_tiny(bundle, precision) if need.network == DECODER else need for need in needs]
        for low_memory in (False, True):
            for decoder, options in ((needs, ()), (tiny, ("a tiny decoder: --vae",))):
                given = ("--low-memory",) * low_memory + options
                if not options or tiny != needs:
                    size = most(decoder, low_memory=low_memory) + DRIVER
                    found.append(Way(precision=precision, options=given, size=size))
    return sorted(found, key=lambda way: -way.size)


def _needs(bundle: Bundle, precision: str) -> list[Need]:
    """Of each network, in ``precision`` where it has such a graph."""
    manifest, found = bundle.manifest, []
    profile = default_profile(manifest, static=True)
    for network, spec in manifest.networks.items():
        if network in ASIDE:
            continue
        own = precision if precision in spec.graphs else next(iter(spec.graphs))
        graph = bundle.path / spec.graphs[own]
        shapes = {name: bounds[1] for name, bounds in network_shapes(profile, spec, manifest).items()}
        activations = estimate_activations(graph, shapes)
        found.append(Need(network=network, precision=own, weights=weight_bytes(graph), activations=activations))
    return found


def _tiny(bundle: Bundle, precision: str) -> Need:
    defaults, itemsize = bundle.manifest.defaults, 2 if precision == "float16" else 4
    pixels = math.prod((defaults.height, defaults.width))
    return Need(
        network=DECODER,
        precision=precision,
        weights=TINY_WEIGHTS * itemsize,
        activations=TINY_CHANNELS * pixels * itemsize,
    )
