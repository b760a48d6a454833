"""A model that is served: what opens it, and what the HTTP side knows of it without opening it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from calotype.runtime.adapters.named import NamedLora, chosen
from calotype.runtime.bundle.folder import Bundle, check_kind
from calotype.runtime.bundle.manifest import Manifest
from calotype.runtime.errors import InputError
from calotype.runtime.families import family_of
from calotype.runtime.picture import Model
from calotype.runtime.request import Request
from calotype.serving.workers.messages import Open


@dataclasses.dataclass(kw_only=True, eq=False)
class Served:
    """See the module.

    Attributes:
        name: under which it is served.
        open: what a worker is told.
        manifest: the bundle's.
        digest: the first ten digits of the SHA-256 of its denoising network's weights.
        loras: files by the names that requests use.
        created: when it was named here, in seconds since 1970.
        why: what keeps it from being opened; "" where nothing does.
        was_open: whether a worker had it open.
    """

    name: str
    open: Open
    manifest: Manifest
    digest: str
    loras: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))
    why: str = ""
    was_open: bool = False

    @classmethod
    def of(cls, order: Open, loras: Mapping[str, Path] | None = None) -> Self:
        """What the bundle that ``order`` opens says of itself; its weights are not read.

        Raises:
            BundleError: there is no such bundle, or it is no model, or not the one that is pinned.
            InputError: the pin is none.
        """
        bundle = Bundle.open(order.bundle, weights=False, sha256=order.sha256)
        check_kind(bundle, "model")
        digest = Model.of(bundle.manifest, family_of(bundle.manifest.family).denoiser).digest
        return cls(name=order.name, open=order, manifest=bundle.manifest, digest=digest, loras=loras or {})

    def resolved(self, request: Request) -> Request:
        """``request`` with the files of the LoRAs that it names.

        Raises:
            InputError: there is no such LoRA, or one is asked for by its file.
        """
        if not request.loras:
            return request
        if not all(isinstance(lora, NamedLora) for lora in request.loras):
            raise InputError("a LoRA is asked for by its name here, not by its file")
        return dataclasses.replace(request, loras=tuple(chosen(lora, self.loras) for lora in request.loras))
