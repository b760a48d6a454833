"""Adapters of a model's weights, LoRA and its kin, merged into them before a network opens.

Merging makes no step slower, and the bundle's files stay as they are: without the LoRA the weights are the old ones,
bit for bit. Read are the layouts of kohya's trainers and of LyCORIS, which name modules after diffusers or after the
original UNet, and of diffusers and PEFT, files and folders; :mod:`calotype.runtime.adapters.kinds` has the kinds.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from numpy.typing import NDArray

from calotype.runtime.adapters import keys, steps
from calotype.runtime.adapters.changes import Change, Module
from calotype.runtime.adapters.files import AdapterFile, read_adapter
from calotype.runtime.adapters.flux2_names import unpacked
from calotype.runtime.adapters.kinds import changes
from calotype.runtime.adapters.merging import Merged
from calotype.runtime.adapters.names import Place, Weights, names_of
from calotype.runtime.arguments import as_path, finite
from calotype.runtime.errors import InputError, quoted

logger = logging.getLogger(__name__)

Array = NDArray[Any]
# A network, and a tensor's name in it.
Target = tuple[str, str]
Parts = dict[str, Array]
ANOTHER = "take the publisher's own, or save it again"  # the file is whole: fetching the same one would not help


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """A LoRA, and how much of it: 1 is as trained, 0 nothing, a negative scale the opposite.

    Attributes:
        path: a ``.safetensors`` file, or a folder by PEFT or diffusers.
        scale: of what is added. A rotation (OFT, BOFT) is turned that part of the way, and so is DoRA, but in PEFT's
            layout: there the direction's change alone is scaled.
        digest: of what lies there, once that was looked at; see :func:`calotype.runtime.picture.digest_of`.
    """

    path: Path
    scale: float = 1.0
    digest: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", as_path("a LoRA's path", self.path))
        try:
            object.__setattr__(self, "scale", finite("scale", self.scale))
        except InputError:
            raise InputError(
                f"the LoRA {self.path} has the scale {quoted(self.scale)}; give a finite number, such as 0.8"
            ) from None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``FILE`` or ``FILE:SCALE``."""
        path, _, scale = text.rpartition(":")
        try:
            return cls(path=Path(path), scale=float(scale)) if path else cls(path=Path(text))
        except ValueError:
            return cls(path=Path(text))


def merge(loras: Sequence[Lora], weights: Weights) -> dict[str, dict[str, Array]]:
    """The weights that ``loras`` change, with all of them added, in the dtypes of ``weights``.

    Args:
        loras: any number; their order does not matter but for rounding.
        weights: the networks' own, by network (of ``NETWORKS``) and state-dict name.

    Returns:
        New arrays by network and name; what no LoRA changes is not among them.

    Raises:
        InputError: a file cannot be read, is of another kind (GLoRA, IA3 …) or for another model, or the merged
            weights are too large for their dtype.
    """
    found = read_changes(loras, weights, names_of(weights) if loras else {})
    return {network: dict(own) for network, own in merged(loras, found, weights).items()}


def read_changes(
    loras: Sequence[Lora], weights: Weights, names: Mapping[str, Sequence[Place]]
) -> dict[Target, list[Change]]:
    """What ``loras`` change, by network and name, and how; those of the scale 0 are looked at, and change nothing.

    Args:
        loras: any number.
        weights: see :func:`merge`; their shapes alone are read.
        names: see :func:`calotype.runtime.adapters.names.names_of`.

    Raises:
        InputError: a file cannot be read, is of another kind, or for another model.
    """
    found: dict[Target, list[Change]] = {}
    for lora in loras:
        for target, own in _Reader(lora, names, weights).read().items():
            if lora.scale != 0:
                found.setdefault(target, []).extend(own)
    return found


def merged(loras: Sequence[Lora], found: Mapping[Target, Sequence[Change]], weights: Weights) -> dict[str, Merged]:
    """The weights with the changes made that were ``found`` in ``loras``, by network; see :func:`merge`."""
    by_network: dict[str, dict[str, Sequence[Change]]] = {}
    for (network, name), changes_ in found.items():
        by_network.setdefault(network, {})[name] = changes_
    files = [lora.path for lora in loras]
    return {network: Merged(own, weights[network], files) for network, own in by_network.items()}


class _Reader:
    """Reads one LoRA, and gathers what of it does not fit the model."""

    def __init__(self, lora: Lora, names: Mapping[str, Sequence[Place]], weights: Weights) -> None:
        self._lora, self._names, self._weights = lora, names, weights
        self._found: dict[Target, list[Change]] = {}
        self._strangers: list[str] = []
        self._misfits: list[str] = []

    def read(self) -> dict[Target, list[Change]]:
        """What it changes, and in which tensors."""
        for file in read_adapter(self._lora.path):
            steps.announce(file.path, file.tensors.metadata)
            modules = unpacked(_modules(file))
            if not file.settings and not any("alpha" in parts for parts in modules.values()):
                logger.info("%s does not state its alpha; its rank is taken for it", file.path)
            taken: set[Place] = set()
            for key, parts in modules.items():
                place = self._take(file, key, parts)
                if place in taken:
                    raise InputError(f"{file.path} changes {quoted(key)} twice, under two names; {ANOTHER}")
                taken |= {place} if place else set()
        self._check()
        return self._found

    def _take(self, file: AdapterFile, key: str, parts: Parts) -> Place | None:
        """Add one module's changes, where the model has the module."""
        places = [place for place in self._names.get(key, ()) if file.network in (None, place[0])]
        # Under a name that SDXL's text encoders share, the one whose shapes fit is meant.
        for place in places:
            own = self._changes(file, place, key, parts)
            misfits = [text for target, change in own for text in self._misfit(target, change)]
            if own and not (misfits and place != places[-1]):
                self._misfits += [f"{key} of {text}" for text in misfits]
                if not misfits and not all(part.size for part in parts.values()):
                    raise InputError(f"{file.path} has the rank 0 in {key}, so it changes nothing; use another")
                for target, change in own:
                    self._found.setdefault(target, []).append(change)
                return place
        self._strangers.append(key)
        return None

    def _changes(self, file: AdapterFile, place: Place, key: str, parts: Parts) -> list[tuple[Target, Change]]:
        """What a module's tensors do to it there; nothing where the model would have to be another."""
        settings = file.settings_for(place[0])
        if not parts.keys().isdisjoint(("", "value", "value_bias")) and not (settings and settings.replaces):
            return []
        if any(parts[name].size != 1 for name in ("alpha", "scalar") if name in parts):
            raise InputError(f"{file.path} has an alpha or scalar of {key} that is not one number; {ANOTHER}")
        module = Module(name=place[1], parts=parts, scale=self._lora.scale, settings=settings)
        try:
            return [((place[0], f"{place[1]}.{parameter}"), change) for parameter, change in changes(module)]
        except KeyError:
            raise InputError(f"{file.path} lacks some of the tensors of {quoted(key)}; {ANOTHER}") from None
        except (ValueError, OverflowError) as error:
            raise InputError(f"{file.path} cannot be merged: {error}; {ANOTHER}") from None

    def _misfit(self, target: Target, change: Change) -> Iterator[str]:
        """Why a change does not fit its tensor, if it does not."""
        own = self._weights[target[0]]
        name = target[1]
        if name not in own:
            yield f"{change.described} on a layer without {name.rpartition('.')[2]}"
        elif not change.fits(own[name].shape):
            yield f"{change.described} on {own[name].shape}"

    def _check(self) -> None:
        found = [
            f"{len(items)} {what}: {_listed(items)}"
            for what, items in (("keys match nothing", self._strangers), ("have other shapes", self._misfits))
            if items
        ]
        if found:
            raise InputError(
                f"{self._lora.path} does not fit this model; {'; '.join(found)}; use one made for its family"
            )


def _modules(file: AdapterFile) -> dict[str, Parts]:
    """The tensors of each module that the file names; the part "" is of none."""
    other = keys.other_kind(file.tensors)
    if other is not None:
        raise InputError(f"{file.path} {other[1]} ({other[0]})")
    modules: dict[str, Parts] = {}
    adapters, words = set(), set()
    for key in file.tensors:
        if key.startswith(keys.BUNDLED):
            words.add(key.split(".")[1])
            continue
        module, part, adapter = keys.split(key)
        modules.setdefault(module, {})[part] = file.tensors[key]
        adapters.add(adapter)
    adapters.discard("")
    if len(adapters) > 1:
        raise InputError(f"{file.path} holds several adapters: {_listed(sorted(adapters))}; save each alone")
    if not modules:
        raise InputError(f"{file.path} holds no tensors; {ANOTHER}")
    if words:
        logger.warning(
            "%s also holds the words %s, which are not used; give their files with --embedding",
            file.path,
            _listed(sorted(words)),
        )
    return modules


def _listed(items: Sequence[str], most: int = 8) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
