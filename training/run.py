"""What every training stage shares: a wall-clock budget, checkpoints to go on from, and a CSV of losses."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Run:
    """A budget of minutes, kept across interruptions by the checkpoint ``<name>.pt``.

    The learning rate warms up over the first hundredth of the budget and falls to zero along a cosine.
    """

    def __init__(self, name: str, folder: Path, minutes: float, every: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.log = folder / f"{name}.pt", folder / f"{name}.csv"
        self.budget, self.every = minutes * 60, every * 60
        self.spent, self.step = 0.0, 0

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

    def steps(
        self, optimizer: torch.optim.Optimizer, lr: float, parts: dict[str, Any]
    ) -> Iterator[Callable[[Tensor], None]]:
        """Yield once a step, until the budget is spent, a function that takes the loss and does the update."""
        start, since_save, since_log = time.monotonic() - self.spent, time.monotonic(), time.monotonic()
        losses: list[float] = []
        steps_at_log = self.step
        parameters = [p for group in optimizer.param_groups for p in group["params"]]

        def update(loss: Tensor) -> None:
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            losses.append(loss.item())

        while self.spent < self.budget:
            progress = self.spent / self.budget
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, progress * 100 + 0.02) * (0.5 + 0.5 * math.cos(math.pi * progress))
            yield update
            self.step += 1
            self.spent = time.monotonic() - start
            if time.monotonic() - since_log > 15:
                rate = (self.step - steps_at_log) / (time.monotonic() - since_log)
                with self.log.open("a") as file:
                    file.write(f"{self.step},{self.spent:.0f},{sum(losses) / len(losses):.5f},{rate:.3f}\n")
                losses.clear()
                since_log, steps_at_log = time.monotonic(), self.step
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
        for name, tensor in self.module.state_dict().items():
            self.shadow[name].lerp_(tensor, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged parameters."""
        return self.shadow

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up averaged parameters."""
        for name, tensor in state.items():
            self.shadow[name].copy_(tensor)
