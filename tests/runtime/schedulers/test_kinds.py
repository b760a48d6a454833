"""A model whose latents are noised in another way is refused, whatever scheduler is asked for."""

from __future__ import annotations

from typing import Any

import pytest

from calotype.runtime.errors import InputError
from calotype.runtime.schedulers import SCHEDULERS, create_solver

# As diffusers writes them for SD 3 and FLUX, Playground 2.5 and CosXL.
OTHERS: list[dict[str, Any]] = [
    {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
    {"num_train_timesteps": 1000, "shift": 1.15, "use_dynamic_shifting": True},
    {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"},
    {"_class_name": "EDMEulerScheduler", "sigma_data": 0.5},
    {"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5},
]


@pytest.mark.parametrize("config", OTHERS)
@pytest.mark.parametrize("name", ["euler", "ddim", "unipc", None])
def test_a_scheduler_of_another_kind_does_not_open_as_epsilon(name: str | None, config: dict[str, Any]) -> None:
    """In the first round ``create_solver("euler", <a flow-matching configuration>)`` opened, and drew noise."""
    with pytest.raises(InputError, match="for another kind of noise than any of these takes away: ddim, ddpm, deis"):
        create_solver(name, config, 4)


def test_what_diffusers_writes_for_models_of_this_kind_opens() -> None:
    import diffusers

    for scheduler in (
        diffusers.UniPCMultistepScheduler(),
        diffusers.DPMSolverMultistepScheduler(),
        diffusers.DEISMultistepScheduler(),
        diffusers.EulerDiscreteScheduler(),
        diffusers.DDIMScheduler(),
    ):
        for name in SCHEDULERS:
            assert len(create_solver(name, dict(scheduler.config), 4)) >= 4
