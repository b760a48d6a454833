"""Manifests that are valid, rightly hashed and wrong: a call draws a finite picture, or says why not in one line."""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calotype.runtime.bundle.manifest import MANIFEST_NAME, digest
from calotype.runtime.errors import CalotypeError
from calotype.runtime.pipeline import Pipeline

FEW = st.integers(0, 40)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
ODD = st.sampled_from(
    [0, 1, 2, -1, 3, 1000, 10**6, 10**30, 0.5, 1e-300, 1e300, True, None, "", "x", [], {}, [1], ["x"]]
)
NAMES = st.sampled_from(
    [
        *("euler", "heun", "pndm", "DDIMScheduler", "LCMScheduler", "EulerAncestralDiscreteScheduler", "no-such", ""),
        *("UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "TCDScheduler", "LMSDiscreteScheduler"),
        *("KDPM2DiscreteScheduler", "DEISMultistepScheduler", "HeunDiscreteScheduler", "DDPMScheduler"),
    ]
)
SOLVING: dict[str, st.SearchStrategy[Any]] = {
    "_class_name": NAMES,
    "beta_start": st.floats(1e-6, 0.999),
    "beta_end": st.floats(1e-6, 0.999),
    "beta_schedule": st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2", "exp"]),
    "num_train_timesteps": st.sampled_from([2, 3, 10, 999, 1000, 5000, 10**6]),
    "prediction_type": st.sampled_from(["epsilon", "v_prediction", "sample"]),
    "timestep_spacing": st.sampled_from(["leading", "trailing", "linspace"]),
    "trained_betas": st.lists(st.floats(1e-6, 0.999), max_size=3) | st.just([0.01] * 1000),
    "steps_offset": st.sampled_from([0, 1, 2, 999, 1000, 10**6]),
    "solver_order": st.integers(1, 3),
    "algorithm_type": st.sampled_from(["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver", "deis"]),
    "solver_type": st.sampled_from(["midpoint", "heun", "bh1", "bh2", "logrho"]),
    "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
    "variance_type": st.sampled_from(["fixed_small", "fixed_small_log", "fixed_large"]),
    "sigma_spacing": st.sampled_from(["karras", "exponential", "beta", "lu", "ays", "ays-sdxl"]),
    "disable_corrector": st.lists(st.integers(0, 3), max_size=3),
    **dict.fromkeys(["set_alpha_to_one", "skip_prk_steps", "clip_sample", "thresholding"], st.booleans()),
    **dict.fromkeys(
        ["use_karras_sigmas", "use_beta_sigmas", "use_exponential_sigmas", "use_lu_lambdas"], st.booleans()
    ),
    **dict.fromkeys(["rescale_betas_zero_snr", "lower_order_final", "euler_at_final", "predict_x0"], st.booleans()),
    **dict.fromkeys(["clip_sample_range", "sample_max_value", "lambda_min_clipped", "timestep_scaling"], NUMBERS),
    **dict.fromkeys(["dynamic_thresholding_ratio", "eta"], st.floats(0, 1)),
    **dict.fromkeys(["sigma_min", "sigma_max"], st.floats(1e-12, 1e6)),
    "original_inference_steps": st.sampled_from([1, 2, 3, 50, 1000, 10**6]),
}
# Path of a value in the manifest -> what else the schema lets stand there.
VALUES: dict[tuple[str, ...], st.SearchStrategy[Any]] = {
    ("scheduler",): st.dictionaries(st.sampled_from([*SOLVING, "x"]), ODD | NUMBERS, max_size=4),
    **{("scheduler", name): own | (ODD if name != "_class_name" else NAMES) for name, own in SOLVING.items()},
    ("vae", "scaling_factor"): st.floats(1e-6, 1e6) | st.none(),
    ("vae", "shift_factor"): st.floats(-1e6, 1e6),
    ("vae", "latent_channels"): st.integers(1, 4096),
    ("vae", "downscale"): st.integers(1, 256),
    ("defaults", "guidance_scale"): st.floats(-1000, 1000),
    ("defaults", "scheduler"): NAMES.filter(lambda name: name != "") | st.none(),
    ("defaults", "height"): st.integers(1, 65536),
    ("defaults", "width"): st.integers(1, 65536),
    ("defaults", "num_inference_steps"): st.integers(1, 1000),
    ("tokenizers", "tokenizer", "max_length"): st.integers(3, 65536),
    **{
        ("tokenizers", "tokenizer", name): st.sampled_from(["a", "a</w>", " ", "A", "é", "<|endoftext|>", "no", "!"])
        for name in ("bos_token", "eos_token", "pad_token")
    },
    **{
        ("tokenizers", "tokenizer", name): st.sampled_from(
            ["unet.safetensors", "tokenizer/vocab.json", "unet.fp32.onnx"]
        )
        for name in ("vocab", "merges")
    },
    ("max_clip_skip",): st.integers(0, 1000),
    ("force_zeros_for_empty_prompt",): st.booleans(),
    ("family",): st.sampled_from(["sd1", "sd2", "sdxl", "vae", "flux"]),
    ("kind",): st.sampled_from(["model", "vae", "control", "ip-adapter", "upscaler"]),
    ("precision",): st.sampled_from(["float16", "fp32", "int8"]),
    ("words",): st.sampled_from(["tokenizer/merges.txt", "unet.safetensors", "tokenizer/vocab.json"]),
    ("name",): st.sampled_from(["x", "{}", "%s", "é" * 300]),
}


Change = Callable[[dict[str, Any]], None]


def value_changed(path: tuple[str, ...], value: Any) -> Change:
    def change(manifest: dict[str, Any]) -> None:
        place = manifest
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


def left_out(path: tuple[str, ...]) -> Change:
    def change(manifest: dict[str, Any]) -> None:
        place = manifest
        for key in path[:-1]:
            place = place.get(key, {})
        place.pop(path[-1], None)

    return change


@st.composite
def values(draw: st.DrawFn) -> Change:
    path = draw(st.sampled_from(list(VALUES)))
    return value_changed(path, draw(VALUES[path]))


@st.composite
def tensors(draw: st.DrawFn) -> Change:
    """A tensor's size, name or type in the description of a network, or the tensor itself."""
    chosen = draw(st.tuples(FEW, FEW, FEW))
    way = draw(st.sampled_from(["inputs", "outputs"]))
    what = draw(st.sampled_from(["size", "dtype", "drop", "twice", "turn", "more"]))
    size = draw(st.integers(1, 2**31 - 1) | st.sampled_from([1, 2, 4, 5, 9, "rows", "tokens", "new", "3*height"]))
    dtype = draw(st.sampled_from(["float16", "float32", "int32", "int64"]))

    def change(manifest: dict[str, Any]) -> None:
        networks = manifest["networks"]
        specs = networks[sorted(networks)[chosen[0] % len(networks)]][way]
        spec = specs[chosen[1] % len(specs)]
        match what:
            case "size" if spec["shape"]:
                spec["shape"][chosen[2] % len(spec["shape"])] = size
            case "dtype":
                spec["dtype"] = dtype
            case "drop":
                specs.remove(spec)
            case "twice":
                specs.append(copy.deepcopy(spec))
            case "turn":
                specs.reverse()
            case _:
                specs.append({"name": "more", "dtype": dtype, "shape": [size]})

    return change


@st.composite
def exchanged(draw: st.DrawFn) -> Change:
    """Two networks, two files of graphs or two of weights stand for each other."""
    one, two = draw(st.tuples(FEW, FEW))
    what = draw(st.sampled_from([None, "graphs", "weights", "inputs", "outputs", "drop"]))

    def change(manifest: dict[str, Any]) -> None:
        networks = manifest["networks"]
        first, second = (sorted(networks)[number % len(networks)] for number in (one, two))
        if what is None:
            networks[first], networks[second] = networks[second], networks[first]
        elif what == "drop":
            del networks[first]
        else:
            networks[first][what], networks[second][what] = networks[second][what], networks[first][what]

    return change


def scaled(downscale: int) -> Change:
    """Another size of a latent's pixel, said everywhere alike."""

    def change(manifest: dict[str, Any]) -> None:
        text = json.dumps(manifest["networks"]).replace('"2*', f'"{downscale}*')
        manifest["networks"] = json.loads(text)
        manifest["vae"]["downscale"] = downscale

    return change


LEFT_OUT = st.sampled_from([*VALUES, ("defaults",), ("vae",), ("tokenizers",), ("parity",)]).map(left_out)
CHANGES = st.lists(
    values() | values() | tensors() | exchanged() | LEFT_OUT | st.sampled_from([1, 2, 3, 4, 16]).map(scaled),
    min_size=1,
    max_size=3,
)


@pytest.fixture(scope="module")
def linked(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tiny bundle, its files the same ones and its manifest another."""
    folder = tmp_path_factory.mktemp("altered") / "bundle"
    for file in sorted(tiny_bundle.rglob("*")):
        if file.is_file() and file.name != MANIFEST_NAME:
            target = folder / file.relative_to(tiny_bundle)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, target)
    yield folder


def write(folder: Path, tiny_bundle: Path, changes: list[Change]) -> None:
    manifest = json.loads((tiny_bundle / MANIFEST_NAME).read_bytes())
    for change in changes:
        try:
            change(manifest)
        except (KeyError, IndexError, ValueError, ZeroDivisionError):  # another change took its place away
            continue
    manifest["sha256"] = digest(manifest)
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))


def drawn(folder: Path) -> str | None:
    """The one line in which it is refused; None where a finite picture is drawn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            with Pipeline.load(folder, "cpu") as pipeline:
                side = 4 * pipeline.manifest.vae.downscale
                output = pipeline(
                    "a red apple", seed=0, height=side, width=side, num_inference_steps=2, output_type="np"
                )
        except CalotypeError as error:
            message = str(error)
            assert message.isprintable() and len(message) < 1500, message
            return message
    assert np.isfinite(output.images[0]).all()
    return None


FUZZ: dict[str, Any] = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}


@settings(max_examples=30, derandomize=True, **FUZZ)
@given(changes=CHANGES)
def test_an_altered_manifest_draws_or_is_refused_in_one_line(
    linked: Path, tiny_bundle: Path, changes: list[Change]
) -> None:
    write(linked, tiny_bundle, changes)
    drawn(linked)


@pytest.mark.slow
@settings(max_examples=2000, **FUZZ)
@given(changes=CHANGES)
def test_very_many_altered_manifests(linked: Path, tiny_bundle: Path, changes: list[Change]) -> None:
    write(linked, tiny_bundle, changes)
    drawn(linked)
