"""A bundle's graphs against each other: the float32 one on the CPU is what all others have to equal."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.manifest import ASIDE, MOST_VOCABULARY, Manifest
from calotype.runtime.bundle.parity import SIZES, Figures, Inputs, Outputs, Tokens, cases, judge
from calotype.runtime.errors import BundleError
from calotype.runtime.sessions import Session, choose_backend, open_session
from calotype.runtime.sessions.plans import has_plan

CLIP_TOKENS = 77  # of a prompt, in bundles without a tokenizer of their own


def verify_graphs(bundle: Bundle, backend: str) -> Iterator[tuple[str, Figures]]:
    """Run every network of ``bundle`` on ``backend`` and compare it with its float32 graph on the CPU.

    Where ``backend`` is the CPU itself, it is the float16 graphs that are run; its arithmetic is float32 even so, and
    only shows that they are sound.

    Yields:
        What was compared, and how far apart it is at worst.

    Raises:
        BundleError: a tolerance is missed, or a value is not finite.
        BackendError: the backend is unknown or cannot run here.
    """
    for what, figures, trouble in compare_graphs(bundle, backend):
        if trouble is not None:
            raise BundleError(f"{what} {trouble}; export the bundle again")
        yield what, figures


def compare_graphs(
    bundle: Bundle, backend: str, sizes: Mapping[str, int] | None = None
) -> Iterator[tuple[str, Figures, str | None]]:
    """As :func:`verify_graphs`, which is strict; here a third value says what is wrong, and the others come even so.

    ``sizes`` None are those of one guided image of the model's own size, and on the CPU small ones.
    """
    chosen = choose_backend(backend, bundle.path)
    if sizes is None:
        sizes = SIZES if chosen == "cpu" else image_sizes(bundle.manifest)
    for network, spec in bundle.manifest.networks.items():
        if chosen == "cpu" and "float16" not in spec.graphs:
            continue
        if network in ASIDE and chosen not in ("cpu", "cuda") and not has_plan(bundle.manifest, spec, chosen):
            continue  # calotype build leaves it out where it is not asked for
        candidate = spec
        if chosen == "cpu":
            candidate = dataclasses.replace(spec, graphs={"float32": spec.graphs["float16"]})
        tried = cases(network, spec.inputs, read_tokens(bundle, network), bundle.manifest.max_clip_skip, sizes)
        with open_session(bundle.path, spec, "cpu") as session:
            reference = _run(session, tried, sizes)
        with open_session(bundle.path, candidate, chosen) as session:
            got = _run(session, tried, sizes)
        what = f"{network}, float16 graph" if chosen == "cpu" else f"{network} on {chosen}"
        yield what, *judge("float16", spec.outputs, got, reference)


def read_tokens(bundle: Bundle, network: str) -> Tokens | None:
    """The special tokens of a text encoder's prompts; None for any other network."""
    spec = bundle.manifest.tokenizers.get(network.replace("text_encoder", "tokenizer"))
    return None if spec is None else Tokens.read(bundle.read(spec.vocab, MOST_VOCABULARY), spec)


def image_sizes(manifest: Manifest, height: int | None = None, width: int | None = None) -> dict[str, int]:
    """One guided image, in pixels; of the model's own size, which every plan takes, where nothing else is said."""
    length = max((tokenizer.max_length for tokenizer in manifest.tokenizers.values()), default=CLIP_TOKENS)
    pixels = {"height": height or manifest.defaults.height, "width": width or manifest.defaults.width}
    latents = {name: size // manifest.vae.downscale for name, size in pixels.items()}
    prompts = {"adapters": 1, "image_tokens": 4}
    return {"batch": 1, "rows": 2, "extra": 1, "tokens": length, **prompts, **latents}


def _run(session: Session, tried: Mapping[str, Inputs], sizes: Mapping[str, int]) -> Outputs:
    session.reserve(sizes)
    outputs: Outputs = {}
    for case, inputs in tried.items():
        for name, array in inputs.items():
            session.buffer(name, sizes)[:] = array
        session.run(sizes)
        outputs[case] = [session.buffer(spec.name, sizes).copy() for spec in session.outputs]
    return outputs
