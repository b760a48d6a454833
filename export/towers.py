"""The text encoders of a single file, under whatever name and in whichever of two layouts a converter wrote them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from torch import Tensor

from calotype.export.models.clip import TextEncoder
from calotype.export.single_file_configs import Part, clip_config, openclip_config
from calotype.export.single_file_keys import openclip_table
from calotype.export.weights import load_module
from calotype.runtime.errors import CheckpointError, UnsupportedArchitectureError

CLIP_VOCABULARY = 49408
PROJECTION = "text_projection"
_TRANSFORMERS = re.compile(r"(.*?)(?:text_model\.)?embeddings\.token_embedding\.weight")
_OPENCLIP = re.compile(r"(.*?)token_embedding\.weight")
# The image half of CLIP, what ties the two halves, and buffers of old versions.
_STRAYS = re.compile(
    r"logit_scale|attn_mask|(text_model\.)?(embeddings\.)?position_ids"
    r"|(visual|vision_model|visual_projection)\..*|text_projection(\.weight)?"
)
# What the originals call the module that holds the tower, inside the one that also holds what goes with it.
_HOLDERS = ("transformer.", "model.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tower:
    """One text encoder of a file.

    Attributes:
        prefix: what its names begin with.
        openclip: whether it is in OpenCLIP's layout; otherwise it is in transformers'.
        part: its tensors, without strays and without its projection.
        projection: what the pooled prompt is multiplied with, (out, in); None where the file has none.
        whole: whether the file has what only a whole CLIP has, beside the text encoder's layers.
    """

    prefix: str
    openclip: bool
    part: Part
    projection: Tensor | None
    whole: bool

    def claims(self, name: str) -> bool:
        """Whether a tensor of the file is of this tower, or a stray that goes with it."""
        return name.startswith(self.prefix) or _STRAYS.fullmatch(_short(name, self.prefix)) is not None

    @property
    def width(self) -> int:
        """Of its hidden states."""
        return self.part.size(_embedding(self.part), 1)

    @property
    def layers(self) -> int:
        """How many the file has."""
        stem = "text_model." if any(name.startswith("text_model.") for name in self.part) else ""
        return self.part.count("transformer.resblocks." if self.openclip else f"{stem}encoder.layers.")

    def load(self, *, hidden_act: str, layers: int, with_projection: bool) -> TextEncoder:
        """The first ``layers`` of it, and its projection where that is read.

        Raises:
            CheckpointError: tensors are missing, or there are others.
            UnsupportedArchitectureError: it reads other tokens than CLIP's.
        """
        state = Part("", _first_layers(self.part, layers))
        state.prefix = self.prefix
        if with_projection:
            if self.projection is None:
                raise CheckpointError(
                    f"the text encoder under {self.prefix} has no {PROJECTION}, which the model's pooled prompt is "
                    "made with; it was lost when this file was written: take the publisher's own"
                )
            state[f"{PROJECTION}.weight"] = self.projection
        if self.openclip:
            config = openclip_config(state, hidden_act=hidden_act)
            tower = load_module(TextEncoder, config, _unfused(state), "text encoder", openclip_table(config))
        else:
            tower = load_module(TextEncoder, clip_config(state, hidden_act=hidden_act), state, "text encoder")
        if tower.config.vocab_size < CLIP_VOCABULARY:
            raise UnsupportedArchitectureError(
                f"the text encoder knows {tower.config.vocab_size} tokens; a single file carries no tokenizer, "
                f"and CLIP's has {CLIP_VOCABULARY}: export this model from a folder in diffusers' layout"
            )
        return tower


def find_towers(state: Mapping[str, Tensor]) -> list[Tower]:
    """Every text encoder of a file; that with a pooled prompt, or else the wider one, last."""
    found = []
    for name in state:
        transformers, openclip = _TRANSFORMERS.fullmatch(name), _OPENCLIP.fullmatch(name)
        if transformers is not None:
            found.append(_tower(state, transformers[1], openclip=False))
        elif openclip is not None:
            found.append(_tower(state, openclip[1], openclip=True))
    return sorted(found, key=lambda tower: (tower.projection is not None, tower.width, tower.prefix))


def _tower(state: Mapping[str, Tensor], prefix: str, *, openclip: bool) -> Tower:
    beside = {_short(name, prefix): name for name in state if name.startswith(_outer(prefix))}
    part = Part(prefix, {name: state[name] for short, name in beside.items() if not _STRAYS.fullmatch(short)})
    layer, parameter = beside.get(f"{PROJECTION}.weight"), beside.get(PROJECTION)
    # As a parameter it is multiplied with from the right, as a layer from the left.
    projection = state[layer] if layer is not None else state[parameter].T.contiguous() if parameter else None
    whole = projection is not None or not beside.keys().isdisjoint(("logit_scale", "attn_mask"))
    return Tower(prefix=prefix, openclip=openclip, part=part, projection=projection, whole=whole)


def _outer(prefix: str) -> str:
    """What the names of all begin with that goes with a tower."""
    holder = next((holder for holder in _HOLDERS if prefix.endswith(f".{holder}")), "")
    return prefix.removesuffix(holder)


def _short(name: str, prefix: str) -> str:
    """A name without the beginning that it has in common with the names of a tower."""
    outer = _outer(prefix)
    return name.removeprefix(prefix if name.startswith(prefix) else outer)


def _embedding(part: Part) -> str:
    return next(name for name in part if name.endswith("token_embedding.weight"))


def _first_layers(part: Part, layers: int) -> dict[str, Tensor]:
    numbered = re.compile(r"(?:transformer\.resblocks|(?:text_model\.)?encoder\.layers)\.(\d+)\..*")
    numbers = {name: numbered.fullmatch(name) for name in part}
    return {name: part[name] for name, found in numbers.items() if found is None or int(found[1]) < layers}


def _unfused(part: Part) -> dict[str, Tensor]:
    """OpenCLIP's tensors with queries, keys and values apart."""
    state: dict[str, Tensor] = {}
    for name, tensor in part.items():
        stem, fused, kind = name.rpartition(".in_proj_")
        if fused:
            thirds = zip("qkv", tensor.tensor_split(3), strict=True)
            state |= {f"{stem}.{letter}_proj.{kind}": third for letter, third in thirds}
        else:
            state[name] = tensor
    return state
