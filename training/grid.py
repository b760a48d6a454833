"""``python -m training.grid OUTPUT``: the picture in the README, of fixed prompts at seed 0, none hand-picked."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw

from calotype.runtime.pipeline import Pipeline

SUBJECTS = ("red apple", "cat face", "grinning face", "evergreen tree", "hot dog", "fish")
STYLES = ("noto", "twemoji", "fluent")
CELL, LABEL = 128, 18


def main() -> None:
    """Draw every subject in every style, its prompt under it."""
    grid = Image.new("RGB", (CELL * len(SUBJECTS), (CELL + LABEL) * len(STYLES)), "white")
    draw = ImageDraw.Draw(grid)
    with Pipeline.load("talbot") as pipeline:
        for row, style in enumerate(STYLES):
            for column, subject in enumerate(SUBJECTS):
                prompt = f"{subject}, {style} style"
                picture = pipeline(prompt, seed=0).images[0].resize((CELL, CELL), Image.Resampling.LANCZOS)
                grid.paste(picture, (column * CELL, row * (CELL + LABEL)))
                middle = (column * CELL + CELL // 2, row * (CELL + LABEL) + CELL + 2)
                draw.text(middle, f"{subject}, {style}", fill="black", anchor="ma")
    grid.save(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
