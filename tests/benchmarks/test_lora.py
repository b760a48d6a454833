"""The benchmark of switched LoRAs: its files fit the model, and both sides are measured alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

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


ABOUT = {
    "command": "x",
    "commit": "y",
    "date": "z",
    "machine": {"processor": "p", "load": 1},
    "model": "talbot",
    "size": 64,
    "rank": 2,
    "rounds": 2,
}


def measured(folder: Path, asked: dict[str, list[Any]], settings: dict[str, Any]) -> dict[str, Any]:
    sides = {name: Side(own) for name, own in asked.items()}
    files = iter([Path(str(number)) for number in range(9)])
    return lora.Measures(sides, files, 2, lora.Checkpoint(folder / "kept.json", settings)).report()


def test_both_sides_are_given_new_files_and_old_ones_in_turns(tmp_path: Path) -> None:
    asked: dict[str, list[Any]] = {"calotype": [], "diffusers": []}
    found = measured(tmp_path, asked, {"rank": 2})
    assert asked["calotype"] == asked["diffusers"]
    used = [path.name for path in asked["calotype"] if path != "step"]
    assert used == ["0", "1", "2", "3", *("3", "0") * 3]  # what is kept; new ones; away and back
    assert asked["calotype"].count("step") == 6
    page = report.lora("lora-x", {**ABOUT, **json.loads(json.dumps(found))}, tmp_path)
    assert "| calotype |" in page
    assert "| diffusers |" in page
    assert "| times diffusers' |" in page
    assert "held 5 MB" in page


def test_what_was_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(_: Any) -> None:
        raise KeyboardInterrupt

    asked: dict[str, list[Any]] = {"calotype": [], "diffusers": []}
    with monkeypatch.context() as patch:
        patch.setattr(lora.Measures, "_again", ended)
        with pytest.raises(KeyboardInterrupt):
            measured(tmp_path, asked, {"rank": 2})
    later: dict[str, list[Any]] = {"calotype": [], "diffusers": []}
    found = measured(tmp_path, later, {"rank": 2})
    assert later["calotype"].count("step") == 3  # with a LoRA, alone
    assert [path.name for path in later["calotype"] if path != "step"] == ["0", *("1", "0") * 3]
    assert found["calotype"]["first_s"]["median"] >= 0
    other: dict[str, list[Any]] = {"calotype": [], "diffusers": []}
    measured(tmp_path, other, {"rank": 4})
    assert len(other["calotype"]) > len(later["calotype"])
