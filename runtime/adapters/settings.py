"""What PEFT notes beside an adapter's weights: its kind, and what each module is scaled by.

It stands in ``adapter_config.json`` of a folder by PEFT, or in the header of a file by diffusers, there for a whole
pipeline ("unet.r", "text_encoder.r") or for one network ("r").
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

from calotype.runtime.errors import InputError

KINDS = ("LORA", "LOHA", "LOKR", "OFT", "BOFT")
# PEFT's own, for settings that leave them out.
DEFAULT_RANK = 8
DEFAULT_ALPHA = 8
# Ways to begin a training that leave the model as it is; the others move a part of it into the adapter.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "lycoris")
# Settings under which an adapter is more than its tensors, or other tensors.
UNREAD = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)
MAX_PATTERN_LENGTH = 300
# A pattern is matched with each module's name: what could make that take for ever is bounded.
MAX_PATTERNS = 4096
MAX_WILDCARDS = 2
MAX_BRANCHES = 4096

Patterns = Sequence[tuple[re.Pattern[str], float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotation:
    """How PEFT's OFT makes rotations of its vectors."""

    constrained: bool = False
    eps: float = 6e-5
    # None is Cayley's transform itself, a number that many terms of its Neumann series.
    terms: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """An adapter's settings for one network.

    Attributes:
        replaces: whether the file also holds weights or biases that take the place of the model's own.
    """

    rank: float = DEFAULT_RANK
    alpha: float = DEFAULT_ALPHA
    rank_pattern: Patterns = ()
    alpha_pattern: Patterns = ()
    rank_stabilised: bool = False
    replaces: bool = False
    rotation: Rotation = dataclasses.field(default_factory=Rotation)

    @classmethod
    def read(cls, table: Mapping[str, Any]) -> Self:
        """Check PEFT's own table.

        Raises:
            InputError: the adapter is of a kind that is not read; the message lacks the file.
            ValueError, TypeError, OverflowError, AttributeError: a value is of another type.
        """
        kind = str(table.get("peft_type") or "LORA").upper()
        if kind not in KINDS:
            raise InputError(f"is a PEFT adapter of the kind {kind[:40]}, which is not supported; {SUPPORTED}")
        start = table.get("init_lora_weights", True)
        if start not in PLAIN_STARTS:
            raise InputError(
                f"was trained from another base (init_lora_weights={str(start)[:40]!r}); save it with PEFT's "
                "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
            )
        unread = [name for name in UNREAD if table.get(name)]
        if unread:
            raise InputError(f"was trained with {', '.join(unread)}, which is not supported; {SUPPORTED}")
        series = table.get("use_cayley_neumann", False)
        return cls(
            rank=_number(table.get("r", DEFAULT_RANK)),
            alpha=_number(table.get("lora_alpha" if kind == "LORA" else "alpha", DEFAULT_ALPHA)),
            rank_pattern=_patterns(table.get("rank_pattern") or {}),
            alpha_pattern=_patterns(table.get("alpha_pattern") or {}),
            rank_stabilised=bool(table.get("use_rslora")),
            replaces=bool(table.get("modules_to_save")) or table.get("bias", "none") != "none",
            rotation=Rotation(
                constrained=bool(table.get("coft")),
                eps=_number(table.get("eps", Rotation.eps)),
                terms=min(int(table.get("num_cayley_neumann_terms", 5)), 100) if series else None,
            ),
        )

    def factor(self, module: str, rank: int | None) -> float:
        """Alpha / rank of a module; ``rank`` is that of its tensors, None where they do not show it."""
        alpha = _matched(self.alpha_pattern, module, self.alpha)
        own = float(rank or _matched(self.rank_pattern, module, self.rank))
        if not own > 0:
            raise ValueError(f"the rank of {module} is {own:g}")
        return alpha / (math.sqrt(own) if self.rank_stabilised else own)


SUPPORTED = "supported: LoRA, LoCon, DoRA, LoHa, LoKr, OFT, BOFT and full differences"


def by_network(table: Mapping[str, Any], networks: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """The settings of each network, by its name; "" is for whichever the file is for."""
    prefixed: dict[str, dict[str, Any]] = {}
    for key, value in table.items():
        network, dot, name = key.partition(".")
        if dot and network in networks:
            prefixed.setdefault(network, {})[name] = value
    return {**prefixed} if prefixed else {"": table}


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is not finite")
    return number


def _patterns(table: Mapping[str, Any]) -> Patterns:
    if len(table) > MAX_PATTERNS:
        raise ValueError(f"{len(table)} patterns, {MAX_PATTERNS} at most")
    return [(_compiled(text), _number(value)) for text, value in table.items()]


def _compiled(text: str) -> re.Pattern[str]:
    """PEFT's: a regular expression for a name's end, from a dot on."""
    bare = re.sub(r"\\d\+|\\.|\[[^\]]*\]", "x", text)
    wildcards = len(re.findall(r"[*+]", bare))
    groups = [1 + part.count("|") for part in bare.split("(")]
    branches = math.prod(groups[:MAX_PATTERN_LENGTH]) * 2 ** bare.replace("(?", "").count("?")
    if (
        len(text) > MAX_PATTERN_LENGTH
        or wildcards > MAX_WILDCARDS
        or branches > MAX_BRANCHES
        or re.search(r"\)[*+]|[{]", bare)
    ):
        raise ValueError(f"the pattern {text[:60]!r} is too intricate")
    try:
        return re.compile(rf"(.*\.)?({text})$")
    except re.error as error:
        raise ValueError(f"the pattern {text[:60]!r} is no regular expression: {error}") from None


def _matched(patterns: Patterns, module: str, otherwise: float) -> float:
    """The value of the first pattern that fits; transformers has named text encoders with and without a prefix."""
    names = (module, module.removeprefix("text_model."))
    for pattern, value in patterns:
        if any(pattern.match(name) for name in names):
            return value
    return otherwise
