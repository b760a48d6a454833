"""Sets of LoRAs for talbot, and a program that draws with one after another until it is killed.

``python -m tests.runtime.lora_switching FOLDER SEED`` says the number of each set that it has drawn with, in ``SETS``,
and what came out; the model's own weights come first.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from calotype.runtime.pipeline import Pipeline
from tests.runtime.lora_files import TEXT, UNET, write_lora

SHORT: dict[str, Any] = {"seed": 3, "num_inference_steps": 2, "guidance_scale": 1.0, "height": 64, "width": 64}
TALBOT = "talbot"
SETS: list[tuple[tuple[str, float], ...]] = [
    *((), (("style", 0.8),), (("style", 0.4),), (("lines", 1.0),), (("words", 1.0),)),
    *((("lines", 1.0), ("words", 0.5)), (("pad", -0.5),)),
]
MEMORY = 1 << 20  # for sets that are not in use: few are kept


def write_loras(path: Path) -> Path:
    """``style`` changes both networks, ``lines`` and ``pad``, by PEFT, the UNet, ``words`` the text encoder."""
    write_lora(path / "style.safetensors", 1)
    write_lora(path / "lines.safetensors", 2, (UNET,))
    write_lora(path / "words.safetensors", 3, (TEXT,))
    (path / "pad").mkdir()
    state = load_file(write_lora(path / "pad" / "adapter_model.safetensors", 4, (UNET,)))
    own = {f"base_model.model.{key.removeprefix('unet.')}": value for key, value in state.items()}
    save_file(own, path / "pad" / "adapter_model.safetensors")
    (path / "pad" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    (path / "notes.txt").write_text("no LoRA")
    return path


def drawn(pipeline: Pipeline, loras: Sequence[Any] | None, prompt: str = "red apple", **fields: Any) -> bytes:
    """The pixels of a picture."""
    return bytes(pipeline(prompt, loras=loras, **{**SHORT, **fields}).images[0].tobytes())


def digest(pixels: bytes) -> str:
    """What stands for a picture in a line."""
    return hashlib.sha256(pixels).hexdigest()


def main() -> None:
    """Draw without end."""
    folder, seed = sys.argv[1:]
    rng = random.Random(seed)
    with Pipeline.load(TALBOT, "cpu", lora_folder=folder, lora_memory=MEMORY) as pipeline:
        for number in itertools.chain([0], iter(lambda: rng.randrange(len(SETS)), None)):
            print(number, digest(drawn(pipeline, SETS[number])), flush=True)


if __name__ == "__main__":
    main()
