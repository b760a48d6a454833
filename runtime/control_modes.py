"""The kinds of control pictures that a ControlNet for several kinds knows (xinsir's union, and ProMax)."""

from __future__ import annotations

from collections.abc import Mapping

from calotype.runtime.errors import InputError, quoted

# Names that people give pictures of a kind -> its number; the last two are ProMax's.
# https://huggingface.co/docs/diffusers/api/pipelines/controlnet_union
MODES: Mapping[str, int] = {
    "openpose": 0,
    "pose": 0,
    "depth": 1,
    "hed": 2,
    "pidi": 2,
    "scribble": 2,
    "softedge": 2,
    "ted": 2,
    "canny": 3,
    "lineart": 3,
    "anime_lineart": 3,
    "mlsd": 3,
    "normal": 4,
    "segment": 5,
    "seg": 5,
    "tile": 6,
    "repaint": 7,
    "inpaint": 7,
}


def mode_number(mode: str | int, kinds: int) -> int:
    """The number of a mode, by its name or number, of a ControlNet that knows so many kinds.

    Raises:
        InputError: it knows no such mode.
    """
    number = MODES.get(mode.lower()) if isinstance(mode, str) else mode
    if number is None or not 0 <= number < kinds:
        names = ", ".join(name for name, own in MODES.items() if own < kinds)
        raise InputError(
            f"the ControlNet takes pictures of {kinds} kinds, and {quoted(mode)} is none of them; name the control by "
            f"its kind, or give mode: {names}, or 0 to {kinds - 1}"
        )
    return number
