"""Families of models, as plug-ins: one file each says what a picture of that family needs beside the loop.

Stable Diffusion 1.x and 2.x are one file, SDXL another. A family that is added is a file here, one in
``export/families/`` and a line in ``FAMILIES``; the loop, the sessions and the server know no family by name.
"""

from __future__ import annotations

import importlib

from calotype.runtime.bundle.manifest import CONTROLLED, PROMPTED, Manifest
from calotype.runtime.errors import BundleError, InputError
from calotype.runtime.families.base import Encoder, Family
from calotype.runtime.request import Request

__all__ = ["FAMILIES", "Encoder", "Family", "denoiser_of", "family_of"]

# By the name in a bundle's manifest: module and attribute, imported when a bundle of that family is opened.
FAMILIES: dict[str, str] = {
    "sd1": "calotype.runtime.families.sd:SD1",
    "sd2": "calotype.runtime.families.sd:SD2",
    "sdxl": "calotype.runtime.families.sdxl:SDXL",
    "flux2-klein": "calotype.runtime.families.flux2_klein:FLUX2_KLEIN",
}


def family_of(name: str) -> Family:
    """The family of that name.

    Raises:
        BundleError: this version runs no such family.
    """
    if name not in FAMILIES:
        raise BundleError(
            f"this Calotype cannot draw with the family {name!r}; valid: {', '.join(sorted(FAMILIES))}; install the "
            "Calotype that exported the bundle, or give an autoencoder's bundle as vae"
        )
    module, _, attribute = FAMILIES[name].partition(":")
    found: Family = getattr(importlib.import_module(module), attribute)
    return found


def denoiser_of(family: Family, manifest: Manifest, request: Request) -> str:
    """The denoising network that a picture takes.

    Raises:
        InputError: it has reference pictures, and the model takes none, or none beside ControlNets and image prompts.
    """
    if not request.references:
        return PROMPTED if request.image_prompts else CONTROLLED if request.controls else family.denoiser
    if family.editor is None or family.editor not in manifest.networks:
        raise InputError(
            f"{manifest.name} takes no reference pictures, as models that edit do; leave references out, or give one "
            "of them as image, to start from"
        )
    for other in ("controls", "image_prompts"):
        if getattr(request, other):
            raise InputError(f"references and {other} exclude each other; use one of them")
    return family.editor
