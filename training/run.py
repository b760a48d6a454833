"""What every training stage shares: a budget, checkpoints to go on from, random streams, and a CSV of losses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from training.config import Budget, TrainingConfig


def begin(module: nn.Module, config: TrainingConfig, component: str) -> None:
    """Give ``module`` the weights of ``component`` in the bundle that ``config`` starts from, if it names one."""
    if config.start is not None:
        module.load_state_dict(load_file(config.start / f"{component}.safetensors"))


class Run:
    """One stage's training, kept across interruptions by the checkpoint ``<name>.pt``.

    The learning rate warms up over the first hundredth of the budget and falls to zero along a cosine. Every step draws
    from random streams of its own, made from the seed and the step's number, so a run that was interrupted is the run
    that was not, to the last bit on one machine, as long as the budget counts steps and not minutes.

    Attributes:
        rng: this step's random numbers; PyTorch's own generator is seeded with the step as well.
    """

    def __init__(self, name: str, config: TrainingConfig, budget: Budget) -> None:
        config.work.mkdir(parents=True, exist_ok=True)
        self.path, self.log = config.work / f"{name}.pt", config.work / f"{name}.csv"
        self.budget, self.seed, self.every = budget, config.seed, config.checkpoint_minutes * 60
        self.spent, self.step = 0.0, 0
        self.rng = np.random.default_rng(self.seed)

    @property
    def progress(self) -> float:
        """The share of the budget that is spent, 0..1."""
        steps = self.step / self.budget.steps
        return min(1.0, steps if self.budget.minutes is None else max(steps, self.spent / (60 * self.budget.minutes)))

    def resume(self, parts: dict[str, Any]) -> None:
        """Load the last checkpoint into ``parts`` (name: anything with ``load_state_dict``), if there is one."""
        if self.path.exists():
            saved = torch.load(self.path, weights_only=True)
            self.spent, self.step = saved["spent"], saved["step"]
            for name, part in parts.items():
                part.load_state_dict(saved[name])

    def save(self, parts: dict[str, Any]) -> None:
        """Write the checkpoint atomically."""
        temporary = self.path.with_suffix(".tmp")
        states = {name: part.state_dict() for name, part in parts.items()}
        torch.save({"spent": self.spent, "step": self.step, **states}, temporary)
        temporary.replace(self.path)

    def steps(self, optimizer: torch.optim.Optimizer, parts: dict[str, Any]) -> Iterator[Callable[[Tensor], None]]:
        """Yield once a step, until the budget is spent, a function that takes the loss and does the update."""
        start, since_save, since_log = time.monotonic() - self.spent, time.monotonic(), time.monotonic()
        compiling = True  # at the first step: its time is not the budget's, else a warm-up of minutes would be skipped
        losses: list[Tensor] = []
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])  # kept in the checkpoint
        parameters = [p for group in optimizer.param_groups for p in group["params"]]

        def update(loss: Tensor) -> None:
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(loss.detach())

        while self.progress < 1:
            share = min(1.0, self.progress * 100 + 0.02) * (0.5 + 0.5 * math.cos(math.pi * self.progress))
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * share
            self.rng = np.random.default_rng((self.seed, self.step))
            torch.manual_seed(int(self.rng.integers(2**63)))
            yield update
            self.step += 1
            if compiling:
                start, since_log, compiling = time.monotonic() - self.spent, time.monotonic(), False
            self.spent = time.monotonic() - start
            if time.monotonic() - since_log > 15 or self.progress >= 1:
                rate = len(losses) / (time.monotonic() - since_log)
                with self.log.open("a") as file:
                    file.write(f"{self.step},{self.spent:.0f},{float(torch.stack(losses).mean()):.5f},{rate:.3f}\n")
                losses.clear()
                since_log = time.monotonic()
            if time.monotonic() - since_save > self.every:
                self.save(parts)
                since_save = time.monotonic()
        self.save(parts)


class EMA:
    """An exponential moving average of a module's parameters, with a warm-up of the decay."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        self.shadow = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the module's parameters."""
        decay = min(self.decay, (1 + step) / (10 + step))
        shadow, current = list(self.shadow.values()), list(self.module.state_dict().values())
        torch._foreach_lerp_(shadow, current, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged parameters."""
        return self.shadow

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up averaged parameters."""
        for name, tensor in state.items():
            self.shadow[name].copy_(tensor)
