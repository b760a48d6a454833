"""LoRAs that make few steps enough, recognised by their names, and what each was trained to be drawn with."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

logger = logging.getLogger(__name__)

# A word in a file's or its folder's name, or in what the header calls it -> scheduler, steps, guidance, and whether the
# timesteps end where training's do (diffusers' "trailing").
STEP_LORAS = {
    "lightning": ("euler", "4", "1", True),
    "hyper-?sd(?:xl)?": ("ddim", "8", "1", True),
    "dmd2?": ("lcm", "4", "1", False),
    "tcd": ("tcd", "4", "1", False),
    "lcm": ("lcm", "4", "1 to 2", False),
    "turbo": ("euler", "4", "1", True),
}
TITLES = ("modelspec.title", "ss_output_name")


def advice(path: Path, metadata: Mapping[str, str]) -> str | None:
    """What a LoRA that was trained for few steps is to be drawn with; None where it does not look like one."""
    for text in (path.stem, path.absolute().parent.name, *(metadata.get(title, "") for title in TITLES)):
        for word, (scheduler, steps, guidance, trailing) in STEP_LORAS.items():
            if not re.search(rf"(?<![a-z]){word}(?![a-z])", text.lower()):
                continue
            said = re.search(r"([1-9]\d?)[-_ ]?steps?(?![a-z])", text.lower())
            count = int(said[1] if said else steps)
            spacing = ",".join(str(round(1000 - 1000 * step / count) - 1) for step in range(count))
            chosen = f"--timesteps {spacing}" if trailing else f"--steps {count}"
            return f"--scheduler {scheduler} {chosen} and --guidance-scale {guidance}"
    return None


def announce(path: Path, metadata: Mapping[str, str]) -> None:
    """Say it in one line."""
    settings = advice(path, metadata)
    if settings is not None:
        logger.warning("%s is a LoRA for few steps, by its name; draw with %s", path, settings)
