"""A checkpoint, loaded: what a family turns every source of its own into before it is exported."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import nn

from calotype.export.graphs import GraphPlan
from calotype.export.tokenizer import Tokenizer
from calotype.runtime.bundle.manifest import VaeSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Components as they are stored, the graphs to be made of them, and what the manifest says of the model.

    Attributes:
        family: its name in the table of families.
        kind: what its bundle is, one of the manifest's kinds.
        components: the modules whose weights are stored, by the names of their files.
        graphs: what is traced, and which component's weights each reads.
        tokenizers: by the names of their folders.
        scheduler: the settings that diffusers writes; empty for an autoencoder alone.
        vae: how latents relate to pixels.
        sample_size: the latents' height and width that the model was trained with; None where nothing tells.
        max_clip_skip: how many of their last layers the text encoders can leave out.
        force_zeros_for_empty_prompt: whether an empty negative prompt stands for zeros.
        distilled: whether it was taught to draw in few steps, and without guidance.
        defaults: what a call uses where it says nothing, and the card neither.
        card: what ``model_card.json`` says: name, license, attribution, defaults.
        source: where the checkpoint came from: ``layout`` is diffusers or single-file.
    """

    family: str
    kind: str = "model"
    components: Mapping[str, nn.Module]
    graphs: tuple[GraphPlan, ...]
    tokenizers: Mapping[str, Tokenizer] = dataclasses.field(default_factory=dict)
    scheduler: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    vae: VaeSpec
    sample_size: int | None = None
    max_clip_skip: int = 0
    force_zeros_for_empty_prompt: bool = False
    distilled: bool = False
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    card: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    source: Mapping[str, Any]
