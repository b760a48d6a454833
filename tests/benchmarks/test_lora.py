"""The benchmark of switched LoRAs: its files fit the model, and both sides are measured alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import lora, report
from calotype.runtime.bundle.folder import BUNDLED


def test_its_loras_change_what_calotype_draws_with(tmp_path: Path) -> None:
    files = lora.lora_files(BUNDLED / "talbot", tmp_path, 2)
    side = lora.Calotype(BUNDLED / "talbot", 64)
    with side.pipeline:
        side.step()
        plain = {key.network for key in side.pipeline.networks.sessions}
        side.use(next(files))
        side.step()
        changed = {key.network for key in side.pipeline.networks.sessions if key.weights}
        assert changed == plain == {"unet", "text_encoder"}
        assert side._job.index == 1


class Side:
    """Notes what it is asked for."""

    def __init__(self, asked: list[Any]) -> None:
        self.asked, self.pipeline = asked, self
        self.networks, self.kept_bytes = self, 5_000_000

    def use(self, path: Path) -> None:
        self.asked.append(path)

    def step(self) -> None:
        self.asked.append("step")


def test_both_sides_are_given_new_files_and_old_ones_in_turns(tmp_path: Path) -> None:
    asked: dict[str, list[Any]] = {"calotype": [], "diffusers": []}
    files = iter([Path(str(number)) for number in range(9)])
    found = lora.measured({name: Side(own) for name, own in asked.items()}, files, 2, 64)
    assert asked["calotype"] == asked["diffusers"]
    used = [path.name for path in asked["calotype"] if path != "step"]
    assert used == ["0", "1", "2", "3", *("3", "0") * 3]  # what is kept; new ones; away and back
    about = {"command": "x", "commit": "y", "date": "z", "machine": {"processor": "p", "load": 1}, "model": "talbot"}
    page = report.lora(
        "lora-x", {**about, "size": 64, "rank": 2, "rounds": 2, **json.loads(json.dumps(found))}, tmp_path
    )
    assert "| calotype |" in page
    assert "| diffusers |" in page
    assert "held 5 MB" in page
