"""``python -m training STAGE``: each stage goes on from its own checkpoint in ``.work/cpu`` or ``.work/gpu``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import torch

from training import autoencoder, checkpoint, colours, data, finetune, synonyms, text_encoder, tokenizer, unet
from training.config import CPU, GPU, Budget, TrainingConfig

STAGES = {
    "data": data.make,
    "tokenizer": tokenizer.make,
    "autoencoder": autoencoder.train,
    "text-encoder": text_encoder.train,
    "unet": unet.train,
    "colours": colours.train,
    "synonyms": synonyms.train,
    "finetune": finetune.train,
    "checkpoint": checkpoint.make,
}


# Stages that no device speeds up: their results are made beforehand and carried to the GPU.
WITHOUT_DEVICE = ("data", "tokenizer")


def shortened(config: TrainingConfig, steps: int) -> TrainingConfig:
    """The same networks and pictures for a few small steps on the CPU, beside the real run, to see that all works."""
    budget = Budget(steps=steps)
    return dataclasses.replace(
        config,
        work=config.work.with_name(f"{config.work.name}-try"),
        device="cpu",
        compile=False,
        autoencoder_batch=4,
        text_batch=16,
        unet_batch=4,
        colours_batch=4,
        synonyms_batch=16,
        finetune_batch=4,
        autoencoder_budget=budget,
        text_budget=budget,
        unet_budget=budget,
        colours_budget=budget,
        synonyms_budget=budget,
        finetune_budget=budget,
    )


def main() -> None:
    """Run one stage, or all in order."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("stage", choices=[*STAGES, "all"])
    parser.add_argument("--gpu", action="store_true", help="the configuration for a GPU: 128x128, all concepts")
    parser.add_argument("--cpu", action="store_true", help="train it on the CPU even so, which suits the small stages")
    parser.add_argument("--bfloat16", action="store_true", help="with --cpu: compute in bfloat16, for a CPU with AMX")
    parser.add_argument("--start", type=Path, metavar="BUNDLE", help="begin with the weights of this bundle")
    parser.add_argument("--try", dest="steps", type=int, metavar="STEPS", help="STEPS steps a stage on the CPU, only")
    arguments = parser.parse_args()
    config = dataclasses.replace(GPU if arguments.gpu else CPU, start=arguments.start)
    if arguments.bfloat16 and not arguments.cpu:
        parser.error("--bfloat16 goes with --cpu; without that the configuration chooses")
    if arguments.cpu:
        config = dataclasses.replace(config, device="cpu", bfloat16=arguments.bfloat16)
    if arguments.steps is not None:
        config = shortened(config, arguments.steps)
    if config.device == "cuda" and arguments.stage not in WITHOUT_DEVICE and not torch.cuda.is_available():
        parser.error("--gpu needs a CUDA device; PyTorch sees none (--cpu trains it on the CPU, slowly)")
    torch.backends.cudnn.benchmark = True  # a stage's shapes never change
    for name, stage in STAGES.items():
        if arguments.stage in (name, "all"):
            stage(config)


if __name__ == "__main__":
    main()
