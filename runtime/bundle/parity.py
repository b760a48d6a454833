"""Does a network compute what it should? The inputs it is tried on, and how two sets of outputs are compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.bundle.manifest import TokenizerSpec
from calotype.runtime.bundle.spec import TensorSpec
from calotype.runtime.errors import BundleError, quoted
from calotype.runtime.untrusted import parse_json, why

Inputs = dict[str, NDArray[Any]]
Outputs = dict[str, Sequence[NDArray[Any]]]  # by the name of a case
# Other sizes than graphs are traced with, so that nothing of those is frozen in.
SIZES = {
    "batch": 1, "rows": 3, "extra": 2, "tokens": 11, "pictures": 3, "height": 16, "width": 8, "adapters": 2,
    "image_tokens": 5, "references": 6,
}  # fmt: skip
MAX_RELATIVE = 1e-4  # largest error over largest magnitude, of a float32 graph
MIN_COSINE = 0.9995  # of a float16 graph, and of engines in it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
    """What a prompt is made of: how many ids there are, and which start, end and pad it."""

    count: int
    bos: int
    eos: int
    pad: int

    @classmethod
    def read(cls, vocab: bytes, spec: TokenizerSpec) -> Self:
        """Look the special tokens of ``spec`` up in the contents of a ``vocab.json``.

        Raises:
            BundleError: it has not got them.
        """
        try:
            ids = parse_json(vocab)
            if not isinstance(ids, dict) or not all(type(number) is int for number in ids.values()):
                raise ValueError("it is no table of whole numbers")
            missing = [quoted(token) for token in (spec.bos_token, spec.eos_token, spec.pad_token) if token not in ids]
            if missing:
                raise ValueError(f"it has no {missing[0]}")
        except ValueError as error:
            message = f"{spec.vocab} is not the vocabulary of a CLIP tokenizer: {why(error)}"
            raise BundleError(f"{message}; take the publisher's own") from error
        return cls(count=len(ids), bos=ids[spec.bos_token], eos=ids[spec.eos_token], pad=ids[spec.pad_token])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """How far outputs are from their reference, at worst."""

    max_absolute: float = 0.0
    max_relative: float = 0.0
    min_cosine: float = 1.0

    def worse(self, other: Figures) -> Figures:
        """The worse of each."""
        return Figures(
            max_absolute=max(self.max_absolute, other.max_absolute),
            max_relative=max(self.max_relative, other.max_relative),
            min_cosine=min(self.min_cosine, other.min_cosine),
        )

    def miss(self, precision: str) -> str | None:
        """What is wrong with a graph that computes in ``precision``, or None."""
        if precision == "float32" and self.max_relative > MAX_RELATIVE:
            return f"is off by {self.max_relative:.1e} of the largest value; {MAX_RELATIVE:.0e} is allowed"
        if self.min_cosine < MIN_COSINE:
            return f"has a cosine of {self.min_cosine:.6f} to the reference; {MIN_COSINE} is the least"
        return None


def compare(reference: NDArray[Any], got: NDArray[Any]) -> Figures | None:
    """Figures of one output, cosines by row (the first axis); None where ``got`` is not finite throughout."""
    if not np.isfinite(got).all():
        return None
    wanted = reference.astype(np.float64).reshape(len(reference), -1)  # (rows, n)
    found = got.astype(np.float64).reshape(wanted.shape)
    error = float(np.abs(wanted - found).max())
    norms = np.linalg.norm(wanted, axis=1) * np.linalg.norm(found, axis=1)
    cosines = np.divide((wanted * found).sum(axis=1), norms, out=np.ones_like(norms), where=norms > 0)
    return Figures(
        max_absolute=error,
        max_relative=error / max(float(np.abs(wanted).max()), 1e-12),
        min_cosine=float(cosines.min()),
    )


def judge(
    precision: str, specs: Sequence[TensorSpec], outputs: Outputs, references: Outputs
) -> tuple[Figures, str | None]:
    """Figures of all outputs of all cases, and the first thing that is wrong, if any, with its place."""
    worst = Figures()
    for case, reference in references.items():
        for spec, wanted, got in zip(specs, reference, outputs[case], strict=True):
            where = f"in {spec.name!r} on {case!r} inputs"
            figures = compare(wanted, got)
            if figures is None:
                return worst, f"gives values that are not finite {where}"
            worst = worst.worse(figures)
            if (miss := figures.miss(precision)) is not None:
                return worst, f"{miss}, {where}"
    return worst, None


def cases(
    network: str,
    inputs: Sequence[TensorSpec],
    tokens: Tokens | None,
    max_clip_skip: int,
    sizes: Mapping[str, int] = SIZES,
) -> dict[str, Inputs]:
    """Inputs to try ``network`` on, by a name for each: random ones and those at the edges."""
    random = random_inputs(inputs, sizes, tokens, seed=1)
    found = {"random": random}
    if network.startswith("text_encoder") and tokens is not None:
        ids = random["input_ids"]
        empty = np.full_like(ids, tokens.pad)
        empty[:, :2] = tokens.bos, tokens.eos
        found["empty prompt"] = {**random, "input_ids": empty}
    if "attention_mask" in random:
        found["no padding"] = {**random, "attention_mask": np.ones_like(random["attention_mask"])}
    if "clip_skip" in random and tokens is not None:
        found["clip_skip"] = {**random, "clip_skip": np.array([max_clip_skip])}
        extra = ids.copy()
        extra[:, 1 : 1 + sizes["extra"]] = tokens.count + np.arange(sizes["extra"])
        found["textual inversion"] = {**random, "input_ids": extra}
    if network.startswith("controlnet"):
        found["black"] = {**random, "control_image": np.zeros_like(random["control_image"])}
    if "timestep" in random:
        found["large"] = {**random, "sample": random["sample"] * 10}
        for timestep in (0, 999):
            found[f"timestep {timestep}"] = {**random, "timestep": np.full_like(random["timestep"], timestep)}
    if network == "vae_decoder":
        found["large"] = {"latents": random["latents"] * 10}
        found["zero"] = {"latents": np.zeros_like(random["latents"])}
    if network == "vae_encoder":
        # One colour all over has no variance to normalise by: with a channel a group, rounding is all that is left.
        halves = np.full_like(random["image"], -1)
        halves[..., halves.shape[-1] // 2 :] = 1
        found["black and white"] = {"image": halves}
    return found


def random_inputs(
    inputs: Sequence[TensorSpec], sizes: Mapping[str, int], tokens: Tokens | None, seed: int = 0
) -> Inputs:
    """Normal latents, pictures in -1..1, timesteps over the whole range, prompts from the whole vocabulary."""
    rng = np.random.default_rng(seed)
    found: Inputs = {}
    for spec in inputs:
        shape = spec.resolve(sizes)
        if spec.name == "input_ids":
            assert tokens is not None
            found[spec.name] = _prompt(rng, shape, tokens)
        elif spec.name == "attention_mask":
            found[spec.name] = (np.arange(shape[1]) <= shape[1] * 3 // 4).astype(np.int64) + np.zeros(shape, np.int64)
        elif spec.name == "reference_positions":
            found[spec.name] = rng.integers(0, 30, shape).astype(np.float32)
        elif spec.name == "clip_skip":
            found[spec.name] = np.zeros(shape, np.int64)
        elif spec.name == "timestep":
            found[spec.name] = np.linspace(0, 999, shape[0], dtype=np.float32)
        elif spec.name == "time_ids":
            found[spec.name] = rng.integers(0, 2048, shape).astype(np.float32)
        elif spec.name == "control_mode":
            found[spec.name] = np.eye(shape[-1], dtype=np.float32)[rng.integers(0, shape[-1], shape[:-1])]
        elif spec.name in ("image", "control_image"):
            found[spec.name] = rng.uniform(-1, 1, shape).astype(np.float32)
        else:
            found[spec.name] = rng.standard_normal(shape, np.float32)
    return found


def _prompt(rng: np.random.Generator, shape: tuple[int, ...], tokens: Tokens) -> NDArray[np.int64]:
    """Start, random ids, and from three quarters on the end and padding; (B, T)."""
    ids = rng.integers(0, tokens.count, shape)
    end = shape[1] * 3 // 4
    ids[ids == tokens.eos] = tokens.bos  # the first end is where a prompt is pooled
    ids[:, 0], ids[:, end], ids[:, end + 1 :] = tokens.bos, tokens.eos, tokens.pad
    return ids
