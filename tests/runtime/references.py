"""Diffusers' pipelines on a checkpoint's weights as the bundle stores them, with our random numbers."""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray


def psnr(got: NDArray[Any], expected: NDArray[Any]) -> float:
    """Decibels between pictures in 0..1."""
    assert got.shape == expected.shape
    return -10 * math.log10(max(float(np.mean((got.astype(np.float64) - expected) ** 2)), 1e-20))


def diffusers_pipeline(checkpoint: Path, class_name: str, scheduler: str | None = None, **components: Any) -> Any:
    """The pipeline of that class, fp16 weights computed in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import diffusers
        import torch

        pipeline = getattr(diffusers, class_name).from_pretrained(checkpoint, torch_dtype=torch.float16, **components)
        pipeline = pipeline.to(torch.float32)
        if scheduler is not None:
            pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draws(seed: int, shape: tuple[int, ...], count: int) -> list[NDArray[np.float32]]:
    """The first random numbers of the image of ``seed``."""
    rng = np.random.Generator(np.random.Philox(seed))
    return [rng.standard_normal(shape, np.float32) for _ in range(count)]


@contextlib.contextmanager
def injected(pipeline: Any, *, noise: NDArray[Any], posteriors: list[NDArray[Any]]) -> Iterator[None]:
    """Have ``pipeline`` draw ``noise`` (C, h, w), and its autoencoder ``posteriors``, one for each encoded picture."""
    import torch
    from diffusers.models.autoencoders import vae

    queue = list(posteriors)

    def first(*_: Any, **__: Any) -> Any:
        return torch.from_numpy(noise.copy())[None]

    def posterior(*_: Any, **__: Any) -> Any:
        return torch.from_numpy(queue.pop(0).copy())[None]

    module = sys.modules[type(pipeline).__module__]
    with (
        warnings.catch_warnings(),
        mock.patch.object(module, "randn_tensor", first),
        mock.patch.object(vae, "randn_tensor", posterior),
    ):
        warnings.simplefilter("ignore")
        yield
    assert not queue
