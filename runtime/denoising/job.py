"""A job: one picture on its way from noise to latents."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Hashable
from typing import NamedTuple

import numpy as np

from calotype.runtime.arrays import Array, Inputs
from calotype.runtime.denoising.feature_cache import FeatureCache
from calotype.runtime.denoising.guidance import Guidance
from calotype.runtime.denoising.known import Known
from calotype.runtime.errors import InputError
from calotype.runtime.schedulers import Solver, State

_serials = itertools.count(1)


# The name and the shape of each of a row's inputs.
Layout = tuple[tuple[str, tuple[int, ...]], ...]


class SessionKey(NamedTuple):
    """What names an open network: its name in the bundle, the form it is computed in, and the weights it has."""

    network: str
    form: Hashable = None
    weights: Hashable = ()


class Key(NamedTuple):
    """What jobs must have in common to share their next run: the session, and the shape of each of a row's inputs; and
    the same of every ControlNet that runs before it, in the order in which they are added up.
    """

    session: SessionKey
    layout: Layout
    controls: tuple[Key, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class JobControl:
    """What one ControlNet adds to a job; never changed, so that jobs may share it.

    Attributes:
        session: the ControlNet's.
        inputs: what a row of it is given beside the denoising network's own inputs, float32: its ``control_image``
            (3, H, W), ``conditioning_scale`` (R,), what each of its residuals is multiplied by, and what else it takes.
        evaluations: in which it is added.
        guess: whether to the row with the prompt alone.
    """

    session: SessionKey
    inputs: Inputs
    evaluations: range
    guess: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class JobFeatures:
    """What one T2I-Adapter adds to each row of a job; never changed, so that jobs may share it.

    Attributes:
        features: (C, h, w) float32 each, scaled, by the names of the denoising network's inputs.
        evaluations: in which they are added.
    """

    features: Inputs
    evaluations: range


@dataclasses.dataclass(kw_only=True, eq=False)
class Job:
    """One picture on its way. Nothing in it is shared with another job but what never changes.

    Attributes:
        latents: (C, h, w) float32, changed in place.
        conditional: the network's inputs for the prompt, one row of each; never changed.
        unconditional: the same for the negative prompt; None turns guidance off.
        guidance: how far a prediction follows the prompt.
        solver: the scheduler at the job's number of steps.
        state: the solver's history and scratch space.
        rng: the job's own random stream.
        context: (K, h, w) float32, more channels of the network's sample, the same at every step; None is none.
        known: what of the latents is given; None is nothing.
        cache: the deep feature that is kept between evaluations; None evaluates the whole network every time.
        controls: what ControlNets add, one after another; the denoising network takes residuals then.
        features: what T2I-Adapters add; the denoising network takes features then.
        network: the denoising network's name in the bundle.
        form: what it is computed in.
        weights: which changes of its weights are merged; () is none.
        index: the next model evaluation.
        rows: that it takes in a run: two where the job is guided, else one.
        key: what another job must have in common with this one to share it.
        step: how many steps are done; one of a solver of second order takes two evaluations.
        steps: how many there are in all; a picture to start from leaves fewer than the schedule has.
        evaluations_left: until the step at hand is done; 0 when all are.
        done: whether its schedule is through.
    """

    latents: Array
    conditional: Inputs
    unconditional: Inputs | None
    guidance: Guidance
    solver: Solver
    state: State
    rng: np.random.Generator
    context: Array | None = None
    known: Known | None = None
    cache: FeatureCache | None = None
    controls: tuple[JobControl, ...] = ()
    features: tuple[JobFeatures, ...] = ()
    network: str = "unet"
    form: Hashable = None
    weights: Hashable = ()
    index: int = 0

    def __post_init__(self) -> None:
        if self.unconditional is not None and _shapes(self.conditional) != _shapes(self.unconditional):
            raise InputError(
                f"the rows with and without the prompt differ: {_shapes(self.conditional)} and "
                f"{_shapes(self.unconditional)}; they need the same names and shapes"
            )
        channels = len(self.latents) + (0 if self.context is None else len(self.context))
        sample = ("sample", (channels, *self.latents.shape[1:]))
        self._layout = (sample, *_shapes(self.conditional))
        self._control_keys = [_control_key(control, self) for control in self.controls]
        self._control_stamps = [2 * next(_serials) for _ in self.controls]
        self._feature_stamps: dict[tuple[JobFeatures, ...], int] = {(): 0}
        self._ends = self.solver.step_ends(self.index)
        self._stamp = 2 * next(_serials)
        self.steps, self.step = len(self._ends), 0
        self.rows, self.key = 1, Key(SessionKey(self.network, self.form, self.weights), self._layout)
        self._look_ahead()

    @property
    def rows_to_come(self) -> frozenset[int]:
        """The numbers of rows that the job's evaluations to come take."""
        return frozenset(map(self._rows_at, range(self.index, self.index + self.evaluations_to_come)))

    @property
    def evaluations_to_come(self) -> int:
        """Evaluations until its schedule is through."""
        return 0 if self.done else self._ends[-1] - self.index

    def end_early(self) -> None:
        """Let its schedule end with the step at hand, or here where none has begun; of a new job one step is left."""
        begun = self.index > (self._ends[self.step - 1] if self.step else -1)
        self._ends = self._ends[: self.step + begun]
        self.steps = len(self._ends)
        self._look_ahead()

    def _look_ahead(self) -> None:
        """Find what the next evaluation needs, once: a step asks for it a dozen times."""
        self.done = self.step == self.steps
        if self.done:
            self.evaluations_left = 0
            return
        self.evaluations_left = self._ends[self.step] - self.index
        self.rows = self._rows_at(self.index)
        if self.controls:
            self.key = self.key._replace(controls=self._controls_at(self.index))
        if self.cache is not None:
            self.key = self.key._replace(session=self.key.session._replace(network=self.cache.network(self.rows)))

    def _controls_at(self, index: int) -> tuple[Key, ...]:
        pairs = zip(self.controls, self._control_keys, strict=True)
        return tuple(key for control, key in pairs if index in control.evaluations)

    @property
    def keys_to_come(self) -> list[Key]:
        """The keys of its evaluations to come, each once, where no feature is kept."""
        now = self.key
        to_come = range(self.index, self.index + self.evaluations_to_come)
        found = map(self._controls_at, to_come) if self.controls else [now.controls]
        return [now._replace(controls=controls) for controls in dict.fromkeys(found)]

    @property
    def active_controls(self) -> list[tuple[int, JobControl]]:
        """What ControlNets add at the next evaluation, each with the number of its first row; see :meth:`row`."""
        pairs = zip(self._control_stamps, self.controls, strict=True)
        return [(stamp, control) for stamp, control in pairs if self.index in control.evaluations]

    @property
    def active_features(self) -> tuple[int, tuple[JobFeatures, ...]]:
        """What T2I-Adapters add at the next evaluation, and a number that nothing else of any job has; 0 is none."""
        active = tuple(own for own in self.features if self.index in own.evaluations)
        if active not in self._feature_stamps:
            self._feature_stamps[active] = next(_serials)
        return self._feature_stamps[active], active

    def _rows_at(self, index: int) -> int:
        guided = self.unconditional is not None and self.guidance.active(self.solver.noise_level(index))
        return 2 if guided else 1

    def row(self, number: int) -> tuple[int, Inputs]:
        """A row's inputs, 0 with the prompt and 1 without, and a number that no other row of any job has."""
        inputs = self.conditional if number == 0 else self.unconditional
        assert inputs is not None
        return self._stamp + number, inputs

    def advance(self, noise_pred: Array) -> None:
        """Move the latents by one evaluation.

        Args:
            noise_pred: (rows, C, h, w) float32, what the network predicts of the job's rows; overwritten.
        """
        prediction = noise_pred[0]
        if len(noise_pred) == 2:
            self.guidance.apply(prediction, noise_pred[1])
        self.solver.step(self.state, self.index, prediction, self.latents, self.rng)
        self.index += 1
        if self.cache is not None:
            self.cache.grow_old()
        if self.known is not None:
            self.known.restore(self.latents, self.solver, self.index)
        if self.index == self._ends[self.step]:
            self.step += 1
        self._look_ahead()


def _control_key(control: JobControl, job: Job) -> Key:
    """Of a ControlNet's run: it is given the latents alone, and the rest of a row's inputs."""
    return Key(control.session, (("sample", job.latents.shape), *_shapes(job.conditional), *_shapes(control.inputs)))


def _shapes(inputs: Inputs) -> Layout:
    return tuple((name, inputs[name].shape) for name in sorted(inputs))
