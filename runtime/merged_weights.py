"""The weights of a bundle with LoRAs merged in: which networks they change, and the changed tensors."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from calotype.runtime.adapters.lora import Lora, merged, read_changes
from calotype.runtime.adapters.merging import Merged
from calotype.runtime.adapters.names import Place, names_of
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.safetensors import SafetensorsFile
from calotype.runtime.errors import InputError
from calotype.runtime.picture import digest_of

Weights = tuple[Lora, ...]
MOST_SETS = 256  # of which is remembered what they change


class MergedWeights:
    """What LoRAs make of a bundle's weights, always from the bundle's own.

    Args:
        bundle: the model.
        networks: which of its networks LoRAs change.
    """

    def __init__(self, bundle: Bundle, networks: Sequence[str]) -> None:
        self._bundle, self._networks = bundle, tuple(networks)
        self._names: Mapping[str, Sequence[Place]] | None = None
        self._changed: OrderedDict[Weights, frozenset[str]] = OrderedDict()

    def changed(self, loras: Weights) -> frozenset[str]:
        """The networks that ``loras`` change.

        Raises:
            InputError: a file cannot be read, or does not fit the model.
        """
        if loras not in self._changed:
            _check_same(loras)
            own = self._own()
            self._changed[loras] = frozenset(network for network, _ in read_changes(loras, own, self._named(own)))
            if len(self._changed) > MOST_SETS:
                self._changed.popitem(last=False)
        self._changed.move_to_end(loras)
        return self._changed[loras]

    def merged(self, loras: Any) -> Mapping[str, Merged]:
        """The tensors that ``loras`` change, by network and name, in the bundle's dtypes; each is made when it is read.

        Raises:
            InputError: as in :meth:`changed`, or a file has changed since it was looked at.
        """
        if not loras:
            return {}
        _check_same(loras)
        own = self._own()
        return merged(loras, read_changes(loras, own, self._named(own)), own)

    def _named(self, own: Mapping[str, SafetensorsFile]) -> Mapping[str, Sequence[Place]]:
        if self._names is None:
            self._names = names_of(own)
        return self._names

    def _own(self) -> dict[str, SafetensorsFile]:
        """The bundle's weights, by network."""
        found = {}
        for name in self._networks:
            spec = self._bundle.manifest.networks[name]
            self._bundle.check_weights(spec)
            found[name] = SafetensorsFile(self._bundle.path / spec.weights[0])
        return found


def _check_same(loras: Weights) -> None:
    for lora in loras:
        try:
            same = lora.digest in (None, digest_of(lora.path))
        except OSError:
            same = False
        if not same:
            raise InputError(f"{lora.path} has changed since the picture was asked for; ask for it again")
