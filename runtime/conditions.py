"""What a request's controls come to: pictures for ControlNets, and features that T2I-Adapters make once a picture."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from calotype.runtime.arrays import Array, Inputs
from calotype.runtime.control import Control
from calotype.runtime.control_modes import mode_number
from calotype.runtime.controlnets import ControlNet, ControlNets, T2IAdapter
from calotype.runtime.denoising.controls import guess_scales
from calotype.runtime.denoising.job import JobControl, JobFeatures, SessionKey
from calotype.runtime.errors import InputError
from calotype.runtime.pictures.canvas import Canvas
from calotype.runtime.pictures.control_pictures import control_pixels

MOST_FEATURES = 8  # of T2I-Adapters' pictures, kept


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Conditions:
    """What is added to a job.

    Attributes:
        controls: by ControlNets.
        features: by T2I-Adapters.
        models: name and hash of what each of the request's controls is of.
    """

    controls: tuple[JobControl, ...] = ()
    features: tuple[JobFeatures, ...] = ()
    models: tuple[tuple[str, str], ...] = ()


class Conditioning:
    """Makes conditions of controls; a T2I-Adapter's features of a picture are kept for the next that asks for them."""

    def __init__(self, models: ControlNets) -> None:
        self._models = models
        self._features: OrderedDict[tuple[SessionKey, bytes], Inputs] = OrderedDict()

    def conditions(self, controls: Sequence[Control], canvas: Canvas, evaluations: range) -> Conditions:
        """What ``controls`` add in a job's ``evaluations``; their models are opened.

        Raises:
            InputError: one cannot be had, or its picture, or it does not fit the size.
        """
        models = [self._models.of(control.model) for control in controls]
        added, features = list[JobControl](), list[JobFeatures]()
        unions: dict[SessionKey, list[Control]] = {}
        for control, model in zip(controls, models, strict=True):
            acting = control.evaluations(evaluations.start, evaluations.stop)
            if isinstance(model, T2IAdapter):
                features.append(self._adapted(control, model, canvas, acting))
            elif model.kinds is None:
                added.append(_controlled(control, model, canvas, acting))
            else:  # all of its pictures go through it together, where the first of them stands
                unions.setdefault(model.key, []).append(control)
                if len(unions[model.key]) == 1:
                    own = [other for other, its in zip(controls, models, strict=True) if its is model]
                    added += _united(own, model, canvas, evaluations)
        return Conditions(
            controls=tuple(added), features=tuple(features), models=tuple(model.identity for model in models)
        )

    def _adapted(self, control: Control, adapter: T2IAdapter, canvas: Canvas, acting: range) -> JobFeatures:
        if control.guess:
            raise InputError(f"guess mode is of ControlNets, and {adapter.bundle.path} is a T2I-Adapter; leave it out")
        if canvas.height % adapter.unit or canvas.width % adapter.unit:
            raise InputError(
                f"{adapter.bundle.path} takes pictures whose sides are multiples of {adapter.unit}; "
                f"{canvas.width}x{canvas.height} was asked for"
            )
        pixels = _pixels(control, canvas, adapter.channels)
        key = adapter.key, hashlib.blake2b(pixels.tobytes() + str(pixels.shape).encode()).digest()
        if key not in self._features:
            self._features[key] = self._run(adapter, pixels)
            if len(self._features) > MOST_FEATURES:
                self._features.popitem(last=False)
        self._features.move_to_end(key)
        scale = np.float32(control.scale)
        return JobFeatures(
            features={name: scale * value for name, value in self._features[key].items()}, evaluations=acting
        )

    def _run(self, adapter: T2IAdapter, pixels: Array) -> Inputs:
        """The features of a picture (C, H, W), by their names."""
        session, downscale = self._models.session(adapter.key), adapter.bundle.manifest.vae.downscale
        sizes = {"rows": 1, "height": pixels.shape[1] // downscale, "width": pixels.shape[2] // downscale}
        session.reserve(sizes)
        session.write("control_image", sizes, pixels, 0)
        session.run(sizes)
        return {spec.name: session.buffer(spec.name, sizes)[0].copy() for spec in session.outputs}


def _controlled(control: Control, model: ControlNet, canvas: Canvas, acting: range) -> JobControl:
    guess, scales = _scales(control, model, control.scale)
    inputs = {"control_image": _pixels(control, canvas), "conditioning_scale": scales}
    return JobControl(session=model.key, inputs=inputs, evaluations=acting, guess=guess)


def _united(controls: Sequence[Control], model: ControlNet, canvas: Canvas, evaluations: range) -> list[JobControl]:
    """Of pictures that go through one ControlNet together, for each stretch of evaluations in which the same ones act.

    As in diffusers, the scale of one picture is that of what comes out, and the scales of several are of what goes in;
    one that does not act has a scale of 0. Where none acts, nothing is added.
    """
    assert model.kinds is not None
    if len({control.guess for control in controls}) > 1:
        raise InputError(f"{model.bundle.path} takes its pictures together; give guess to all of them or to none")
    numbers = [mode_number(_mode(control), model.kinds) for control in controls]
    pixels = np.stack([_pixels(control, canvas) for control in controls])
    modes = np.eye(model.kinds, dtype=np.float32)[numbers]  # (N, K)
    acting = [control.evaluations(evaluations.start, evaluations.stop) for control in controls]
    guess, scales = _scales(controls[0], model, controls[0].scale if len(controls) == 1 else 1.0)
    found = []
    edges = sorted({edge for own in acting for edge in (own.start, own.stop)})
    for start, stop in itertools.pairwise(edges):
        own = [control.scale * (start in its) for control, its in zip(controls, acting, strict=True)]
        if any(start in its for its in acting):
            inputs = {
                "control_image": pixels,
                "conditioning_scale": scales,
                "control_mode": modes,
                "picture_scale": np.array(own if len(own) > 1 else [1], np.float32),
            }
            found.append(JobControl(session=model.key, inputs=inputs, evaluations=range(start, stop), guess=guess))
    return found


def _scales(control: Control, model: ControlNet, scale: float) -> tuple[bool, Array]:
    """Whether a ControlNet acts on the row with the prompt alone, and what each of its residuals is multiplied by."""
    guess = control.guess or model.pooled
    if guess and not model.pooled:
        return guess, guess_scales(scale, model.count)
    return guess, np.full(model.count, scale, np.float32)


def _mode(control: Control) -> str | int:
    """What says of which kind a control's picture is: its mode, or its name."""
    if control.mode is not None:
        return control.mode
    return control.model if isinstance(control.model, str) else control.model.name


def _pixels(control: Control, canvas: Canvas, channels: int = 3) -> Array:
    return control_pixels(
        control.image, canvas, preprocess=control.preprocess, resize=control.resize, channels=channels
    )
