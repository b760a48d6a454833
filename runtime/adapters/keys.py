"""The keys of an adapter's file: which module each is of, what of it stands there, and what is no adapter at all."""

from __future__ import annotations

import re
from collections.abc import Iterable

from calotype.runtime.adapters.settings import SUPPORTED

# How a key ends -> what stands there, the longest first.
PARTS = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_up.bias": "up_bias",
    ".lora_B.bias": "up_bias",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_embedding_A": "embedding_down",
    ".lora_embedding_B": "embedding_up",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".oft_R.weight": "oft_R",
    ".weight": "value",
    ".bias": "value_bias",
    **{
        f".{part}": part
        for part in (
            "alpha",
            "scalar",
            "dora_scale",
            *(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
            *(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
            "diff",
            "diff_b",
            "w_norm",
            "b_norm",
            "oft_blocks",
            "rescale",
            "boft_R",
            "boft_s",
        )
    },
}
# PEFT's name of an adapter, which is in the keys of a state dict that PEFT itself has not written.
_ADAPTER = re.compile(
    r"(\.(?:lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|hada_\w+|lokr_\w+|b?oft_[Rs]))"
    r"\.(?!weight$|bias$)([^.]+)(\.weight|\.bias)?$"
)
# Before the name of a word whose vectors a trainer put into the same file.
BUNDLED = "bundle_emb."
# What is no such adapter, by a pattern in its keys, and the way out.
OTHERS = {
    r"\.[ab][12]\.weight$|\.bm\.weight$|\.glora_[A-Z]": f"is no LoRA but GLoRA, which is not supported; {SUPPORTED}",
    r"\.on_input$|\.ia3_l": f"is no LoRA but IA3, which is not supported; {SUPPORTED}",
    r"\.oft_diag$": f"is OFT in LyCORIS's first layout, which is not supported; {SUPPORTED}",
    r"\.oft_r$": "is OFT of before PEFT 0.14, which PEFT itself does not read any more; train it again",
    r"\.lora_E$": f"is no LoRA but AdaLoRA, which is not supported; {SUPPORTED}",
    r"^lora_controlnet$": "is a Control-LoRA, a ControlNet in a LoRA's form, which is not supported",
    r"\.base_layer\.weight$": "holds the model with the LoRA in it; save the LoRA alone (PEFT's save_pretrained)",
    r"^(model\.diffusion_model|cond_stage_model|conditioner|first_stage_model)\.": (
        "is a whole checkpoint and no LoRA; make a bundle of it with: calotype export"
    ),
    r"^(control_model|controlnet_cond_embedding|controlnet_down_blocks)\.": "is a ControlNet and no LoRA",
    r"^(image_proj|ip_adapter)\.": "is an IP-Adapter and no LoRA",
    r"^(emb_params|clip_[lg])$": "is a textual inversion and no LoRA; give it with: --embedding",
}


def other_kind(keys: Iterable[str]) -> tuple[str, str] | None:
    """A key that shows that a file is no adapter that is read, and what it is."""
    return next(
        ((key, what) for key in keys for pattern, what in OTHERS.items() if re.search(pattern, key)),
        None,
    )


def split(key: str) -> tuple[str, str, str]:
    """The module that a key names, the part of it, and the adapter's name where that is in it.

    The part is "" for a key that is of none.
    """
    match = _ADAPTER.search(key)
    adapter = match[2] if match else ""
    if match:
        key = f"{key[: match.start()]}{match[1]}{match[3] or ''}"
    ending = next((ending for ending in PARTS if key.endswith(ending)), "")
    module = key.removesuffix(ending).removeprefix("base_model.model.").removesuffix(".base_layer")
    return module, PARTS.get(ending, ""), adapter
