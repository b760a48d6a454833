"""A model that is served: what opens it, and what the HTTP side knows of it without opening it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from calotype.runtime.adapters.files import read_adapter
from calotype.runtime.adapters.named import NamedLora, chosen
from calotype.runtime.bundle.folder import Bundle, check_kind
from calotype.runtime.bundle.manifest import Manifest
from calotype.runtime.controlnets import read_control
from calotype.runtime.errors import InputError, quoted
from calotype.runtime.families import family_of
from calotype.runtime.picture import Model
from calotype.runtime.pictures.canvas import Canvas
from calotype.runtime.pictures.safety import check_has_checker
from calotype.runtime.request import Request
from calotype.serving.workers.messages import Open, Size


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
            InputError: it cannot draw at a size that is to be warmed, or a LoRA cannot be read, or a
                ControlNet is for another model, or the pin is none.
        """
        bundle = Bundle.open(order.bundle, weights=False, sha256=order.sha256)
        check_kind(bundle, "model")
        digest = Model.of(bundle.manifest, family_of(bundle.manifest.family).denoiser).digest
        found = cls(name=order.name, open=order, manifest=bundle.manifest, digest=digest, loras=loras or {})
        found.check_sizes(order.sizes)
        if order.safety_checker:
            check_has_checker(bundle)
        for folder in order.controls.values():
            read_control(folder, bundle)
        for path in found.loras.values():
            read_adapter(path)
        if order.vae is not None:
            check_kind(Bundle.open(order.vae, weights=False), "vae", "model")
        return found

    def check_sizes(self, sizes: Sequence[Size]) -> None:
        """Raises InputError where the model cannot draw at one of ``sizes``, width and height in pixels."""
        for width, height in sizes:
            request = Request(prompt="", width=width, height=height)
            try:
                Canvas.open(self.manifest, request.resolved(self.manifest))
            except InputError as error:
                raise InputError(f"{self.name} cannot be warmed at {width}x{height}: {error}") from None

    def resolved(self, request: Request) -> Request:
        """``request`` with the files of the LoRAs that it names.

        Raises:
            InputError: there is no such LoRA or ControlNet, or one is asked for by its file.
        """
        for control in request.controls:
            if not isinstance(control.model, str) or control.model not in self.open.controls:
                valid = ", ".join(self.open.controls) or "none"
                raise InputError(f"there is no control {quoted(str(control.model))}; valid: {valid}")
        if not request.loras:
            return request
        if not all(isinstance(lora, NamedLora) for lora in request.loras):
            raise InputError("a LoRA is asked for by its name here, not by its file")
        return dataclasses.replace(request, loras=tuple(chosen(lora, self.loras) for lora in request.loras))
