"""``python -m training STAGE``: each stage goes on from its own checkpoint in ``.work/cpu`` or ``.work/gpu``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from training import autoencoder, checkpoint, data, text_encoder, tokenizer, unet
from training.config import CPU, GPU

STAGES = {
    "data": data.make,
    "tokenizer": tokenizer.make,
    "autoencoder": autoencoder.train,
    "text-encoder": text_encoder.train,
    "unet": unet.train,
    "checkpoint": checkpoint.make,
}


def main() -> None:
    """Run one stage, or all in order."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--gpu", action="store_true", help="the configuration for a GPU: 128x128, all concepts")
    parser.add_argument("--start", type=Path, metavar="BUNDLE", help="begin with the weights of this bundle")
    arguments = parser.parse_args()
    config = dataclasses.replace(GPU if arguments.gpu else CPU, start=arguments.start)
    if config.device == "cuda" and not torch.cuda.is_available():
        parser.error("--gpu needs a CUDA device; PyTorch sees none")
    for name, stage in STAGES.items():
        if arguments.stage in (name, "all"):
            stage(config)


if __name__ == "__main__":
    main()
