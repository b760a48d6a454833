"""Small safety checkers of random weights, as diffusers writes them, and what diffusers' class decides with them."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIZE = 28  # pixels that it reads


def processor() -> Any:
    """CLIP's own preparation of pictures, for that size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import CLIPImageProcessor

        return CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})


def write_checkpoint(tiny: Path, folder: Path) -> Path:
    """A copy of the checkpoint ``tiny`` in ``folder``, with a safety checker whose thresholds lie among its cosines."""
    import torch

    checker = _checker()
    rng = np.random.default_rng(1)
    noise = [Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8)).resize((48, 48)) for _ in range(64)]
    pixels = torch.from_numpy(processor()(noise, return_tensors="np")["pixel_values"])
    with torch.no_grad():
        embeddings = checker.visual_projection(checker.vision_model(pixels)[1])
        for name, share in (("special_care", 0.9), ("concept", 0.99)):
            cosines = torch.nn.functional.cosine_similarity(
                embeddings[:, None], getattr(checker, f"{name}_embeds")[None], dim=-1
            )
            getattr(checker, f"{name}_embeds_weights").copy_(torch.quantile(cosines, share, dim=0))
    shutil.copytree(tiny, folder)
    checker.save_pretrained(folder / "safety_checker")
    processor().save_pretrained(folder / "feature_extractor")
    return folder


def reference(checkpoint: Path, images: Sequence[Image.Image]) -> tuple[NDArray[np.float32], list[bool]]:
    """Each picture's cosines less thresholds, (N, 3 + 17), and whether diffusers' class takes exception to it."""
    import torch
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker, cosine_distance

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checker = StableDiffusionSafetyChecker.from_pretrained(checkpoint / "safety_checker").eval()
    given = [processor()(image, return_tensors="pt")["pixel_values"] for image in images]
    pixels = torch.cat(given)
    with torch.no_grad():
        embeddings = checker.visual_projection(checker.vision_model(pixels)[1])
        scores = [
            cosine_distance(embeddings, getattr(checker, f"{name}_embeds")) - getattr(checker, f"{name}_embeds_weights")
            for name in ("special_care", "concept")
        ]
        _, flagged = checker(clip_input=pixels, images=[np.zeros((2, 2, 3))] * len(images))
    return torch.cat(scores, dim=1).numpy(), flagged


def _checker() -> Any:
    import torch
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    torch.manual_seed(3)
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "image_size": SIZE, "patch_size": 7,
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=24)).eval()
    with torch.no_grad():
        for name, parameter in checker.named_parameters():  # else biases are zero, and pictures make no difference
            torch.nn.init.normal_(parameter, std=0.02 if name.endswith("bias") else 0.4)
    return checker.requires_grad_(False)
