"""``python -m training.grid OUTPUT``: the picture in the README, of fixed prompts at seed 0, none picked by hand.

The prompts were written down before any was drawn and cycle through the three styles. With ``--few`` only the first
rows are drawn.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

from calotype.runtime.pipeline import Pipeline
from training.config import STYLES

SUBJECTS = (
    """
a red apple, a grinning face, cat face, an evergreen tree, a hot dog, a fish, a red heart, a ghost,
a tomato, smiling face with sunglasses, panda, a sunflower, a hamburger, penguin, blue heart, skull,
a lemon, crying face, fox, a cactus, a slice of pizza, a whale, green heart, an alien,
strawberry, angry face, a frog, a tulip, a doughnut, an octopus, broken heart, a robot,
a carrot, smiling face with hearts, tiger face, a palm tree, cookie, a snail, a beer mug, clown face,
banana, sleeping face, a koala, maple leaf, french fries, a butterfly, two hearts, pile of poo,
grapes, thinking face, unicorn, cherry blossom, soft ice cream, lady beetle, collision, ogre,
a green apple, cold face, a pig, a mushroom, birthday cake, a crab, purple heart, a rose
""".replace("\n", " ")
    .strip()
    .split(", ")
)
COLUMNS, CELL, LABEL = 8, 96, 26


def prompts() -> list[str]:
    """The 64 prompts."""
    # Each row starts with another style, so that a column shows all three.
    return [
        f"{subject}, {STYLES[(index + index // COLUMNS) % len(STYLES)]} style" for index, subject in enumerate(SUBJECTS)
    ]


def main() -> None:
    """Draw every prompt, its text under it."""
    parser = argparse.ArgumentParser(prog="python -m training.grid", description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="talbot")
    parser.add_argument("--few", type=int, default=len(SUBJECTS) // COLUMNS, metavar="ROWS")
    arguments = parser.parse_args()
    chosen = prompts()[: arguments.few * COLUMNS]
    grid = Image.new("RGB", (CELL * COLUMNS, (CELL + LABEL) * arguments.few), "white")
    draw = ImageDraw.Draw(grid)
    with Pipeline.load(arguments.model) as pipeline:
        for index, prompt in enumerate(chosen):
            row, column = divmod(index, COLUMNS)
            picture = pipeline(prompt, seed=0).images[0].resize((CELL - 8, CELL - 8), Image.Resampling.LANCZOS)
            grid.paste(picture, (column * CELL + 4, row * (CELL + LABEL)))
            subject, _, style = prompt.rpartition(", ")
            middle = (column * CELL + CELL // 2, row * (CELL + LABEL) + CELL - 7)
            draw.multiline_text(middle, f"{subject},\n{style}", fill="black", anchor="ma", align="center", font_size=9)
    grid.save(arguments.output, optimize=True)


if __name__ == "__main__":
    main()
