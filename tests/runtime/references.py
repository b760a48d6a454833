"""Diffusers' pipelines on a checkpoint's weights as the bundle stores them, with our random numbers."""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray


def psnr(got: NDArray[Any], expected: NDArray[Any]) -> float:
    """Decibels between pictures in 0..1."""
    assert got.shape == expected.shape
    return -10 * math.log10(max(float(np.mean((got.astype(np.float64) - expected) ** 2)), 1e-20))


def diffusers_pipeline(checkpoint: Path, class_name: str, scheduler: str | None = None, **settings: Any) -> Any:
    """The pipeline of that class, fp16 weights computed in float32; ``settings`` are the scheduler's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        import torch

        pipeline = getattr(diffusers, class_name).from_pretrained(checkpoint, torch_dtype=torch.float16)
        pipeline = pipeline.to(torch.float32)
        if scheduler is not None:
            pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config, **settings)
        pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draws(seed: int, shape: tuple[int, ...], count: int) -> list[NDArray[np.float32]]:
    """The first random numbers of the image of ``seed``."""
    rng = np.random.Generator(np.random.Philox(seed))
    return [rng.standard_normal(shape, np.float32) for _ in range(count)]


@contextlib.contextmanager
def injected(
    pipeline: Any, *, noise: NDArray[Any], posteriors: Sequence[NDArray[Any]] = (), steps: Sequence[NDArray[Any]] = ()
) -> Iterator[None]:
    """Have ``pipeline`` draw ``noise`` (C, h, w) first, its autoencoder ``posteriors``, and its scheduler ``steps``."""
    import torch
    from diffusers.models.autoencoders import vae

    def drawing(arrays: Iterator[NDArray[Any]]) -> Any:
        return lambda *_, **__: torch.from_numpy(next(arrays).copy())[None]

    left = {"posteriors": iter(posteriors), "steps": iter(steps)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for module, arrays in (
            (sys.modules[type(pipeline).__module__], itertools.repeat(noise)),
            (vae, left["posteriors"]),
            (sys.modules[type(pipeline.scheduler).__module__], left["steps"]),
        ):
            if hasattr(module, "randn_tensor"):
                stack.enter_context(mock.patch.object(module, "randn_tensor", drawing(arrays)))
        yield
    assert {name: len(list(arrays)) for name, arrays in left.items()} == {"posteriors": 0, "steps": 0}
