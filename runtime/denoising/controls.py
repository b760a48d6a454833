"""What is added inside the denoising network: by ControlNets, which run before it, and by T2I-Adapters.

Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models" (arXiv 2302.05543). Each is given the
rows that it controls alone: where guidance is off that is one row of a job, and where its share of the schedule is over
none. What several make is added up in the input buffers of the denoising network. What a T2I-Adapter adds is made once
a picture, so it is written there when it sets in and when it is over.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from calotype.runtime.arrays import Array, Inputs
from calotype.runtime.bundle.spec import TensorSpec
from calotype.runtime.denoising.buffers import Pool, Run
from calotype.runtime.denoising.job import Job, JobControl, Key
from calotype.runtime.sessions.session import Session

# Row of the denoising network's run, the number of what stands in it, its inputs, and what controls it.
Controlled = tuple[int, int, Inputs, JobControl]


def add_controls(pool: Pool, session: Session, run: Run, jobs: Sequence[Job]) -> None:
    """Fill the inputs of ``session`` that are added inside it for a run of ``jobs``, whose other inputs are written."""
    _write_features(session, run, jobs)
    controls = jobs[0].key.controls
    if not controls and not run.residuals:
        return  # zeros stand there
    run.residuals = True  # until zeros stand there
    names = [spec.name for spec in session.inputs if is_residual(spec.name)]
    count, channels = sum(job.rows for job in jobs), len(jobs[0].latents)
    samples, timesteps = session.buffer("sample", run.sizes)[:, :channels], session.buffer("timestep", run.sizes)
    for number, key in enumerate(controls):
        rows = _controlled(jobs, number)
        network, own = _filled(pool, key, rows, samples, timesteps)
        network.run(own.sizes)
        if (
            len(controls) == 1
            and len(rows) == count
            and _shapes(session.inputs, run, names) == _shapes(network.outputs, own, names)
        ):
            for name in names:  # it is all that is added, so it need not pass through the host
                session.take(name, run.sizes, network, name, own.sizes)
            return
        if number == 0:
            _clear(session, run, names)
        for name in names:
            residual, made = session.buffer(name, run.sizes), network.buffer(name, own.sizes)
            for place, (row, *_) in enumerate(rows):
                residual[row] += made[place]
    if not controls:
        _clear(session, run, names)
        run.residuals = False


def _shapes(specs: Sequence[TensorSpec], run: Run, names: Sequence[str]) -> list[tuple[int, ...]]:
    return [spec.resolve(run.sizes) for name in names for spec in specs if spec.name == name]


def _clear(session: Session, run: Run, names: Sequence[str]) -> None:
    for name in names:
        session.buffer(name, run.sizes)[:] = 0


def _write_features(session: Session, run: Run, jobs: Sequence[Job]) -> None:
    """Write what T2I-Adapters add, where it does not stand there; it is the same in every evaluation of its share."""
    row = 0
    for job in jobs:
        stamp, active = job.active_features
        for place in range(row, row + job.rows):
            if run.features[place] != stamp:
                run.features[place] = -1  # until all of it is written
                for name in (spec.name for spec in session.inputs if is_feature(spec.name)):
                    value = session.buffer(name, run.sizes)[place]
                    value[:] = 0
                    for own in active:
                        if name in own.features:
                            value += own.features[name]
                run.features[place] = stamp
        row += job.rows


def is_residual(name: str) -> bool:
    """Whether an input is what ControlNets add."""
    return name.endswith("_residual") or "_residual_" in name


def is_feature(name: str) -> bool:
    """Whether an input is what T2I-Adapters add."""
    return name.startswith("adapter_feature_")


def guess_scales(scale: float, count: int) -> Array:
    """What each of ``count`` residuals is multiplied by in guess mode, (count,): less further out, as in diffusers."""
    return (np.logspace(-1, 0, count) * scale).astype(np.float32)


def _controlled(jobs: Sequence[Job], number: int) -> list[Controlled]:
    """The rows that the ControlNet of that number is given."""
    found: list[Controlled] = []
    row = 0
    for job in jobs:
        first, control = job.active_controls[number]
        for own in range(1 if control.guess else job.rows):
            _, inputs = job.row(own)
            found.append((row + own, first + own, inputs, control))
        row += job.rows
    return found


def _filled(pool: Pool, key: Key, rows: Sequence[Controlled], samples: Array, timesteps: Array) -> tuple[Session, Run]:
    """The ControlNet of ``key``, its inputs written for these rows; of those that stay, what does not stand there."""
    session, buffers = pool.of(key)
    run = buffers.run(session, key.layout, session.padded(len(rows)))
    sizes, stamps = run.sizes, run.stamps
    sample, timestep = session.buffer("sample", sizes), session.buffer("timestep", sizes)
    for place, (row, stamp, inputs, control) in enumerate(rows):
        if stamps[place] != stamp:
            stamps[place] = 0  # until all of it is written
            own = {**inputs, **control.inputs}
            for spec in session.inputs:
                if spec.name in own:
                    session.write(spec.name, sizes, own[spec.name], place)
            stamps[place] = stamp
        sample[place], timestep[place] = samples[row], timesteps[row]
    return session, run
