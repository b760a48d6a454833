"""The LoRAs of requests: which names are registered, what a request that says nothing gets, what a prompt names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from calotype.runtime.adapters.files import read_adapter
from calotype.runtime.adapters.lora import Lora
from calotype.runtime.adapters.named import Asked, NamedLora, asked_all, chosen, registered
from calotype.runtime.errors import InputError
from calotype.runtime.merged_weights import Weights
from calotype.runtime.picture import digest_of
from calotype.runtime.request import Request
from calotype.runtime.text.syntax import take_loras
from calotype.runtime.untrusted import why


class Loras:
    """Finds the LoRAs of requests.

    Args:
        default: what a request that says nothing of them gets.
        folder: whose LoRAs requests may name; None is none.
        in_prompts: whether ``<lora:NAME:SCALE>`` in a prompt names one of those, rather than being words.

    Attributes:
        default: see above.
        registered: the LoRAs of the folder by name.

    Raises:
        InputError: the folder is none, or a LoRA cannot be read.
    """

    def __init__(self, default: Sequence[Asked] = (), folder: Path | None = None, in_prompts: bool = False) -> None:
        self.registered: Mapping[str, Path] = registered(folder)
        self._in_prompts = in_prompts
        self.default = self.files(default)

    def files(self, loras: Sequence[Asked]) -> Weights:
        """Files and folders in place of names, each with the digest of what lies there.

        Raises:
            InputError: none of a name is registered, or what lies there is no LoRA.
        """
        return tuple(_looked_at(chosen(lora, self.registered)) for lora in loras)

    def resolved(self, request: Request) -> Request:
        """A request with files in place of names, and with what its prompt names.

        Raises:
            InputError: see :meth:`files`.
        """
        prompt, named = take_loras(request.prompt) if self._in_prompts else (request.prompt, [])
        loras = (*(request.loras or ()), *(NamedLora(name=name, scale=scale) for name, scale in named))
        return dataclasses.replace(request, prompt=prompt, loras=self.files(asked_all("loras", loras)))


def merged_into(request: Request) -> Weights:
    """The LoRAs of a resolved request."""
    return tuple(lora for lora in request.loras or () if isinstance(lora, Lora))


def _looked_at(lora: Lora) -> Lora:
    read_adapter(lora.path)  # what is no LoRA is said to be none, before all of it is read
    try:
        return dataclasses.replace(lora, digest=digest_of(lora.path))
    except OSError as error:
        raise InputError(f"{lora.path} cannot be read: {why(error)}; see that all of it is there") from error
