"""Families of models, as plug-ins: one file each says what a picture of that family needs beside the loop.

Stable Diffusion 1.x and 2.x are one file, SDXL another. A family that is added is a file here, one in
``export/families/`` and a line in ``FAMILIES``; the loop, the sessions and the server know no family by name.
"""

from __future__ import annotations

import importlib

from calotype.runtime.errors import BundleError
from calotype.runtime.families.base import Encoder, Family

__all__ = ["FAMILIES", "Encoder", "Family", "family_of"]

# By the name in a bundle's manifest: module and attribute, imported when a bundle of that family is opened.
FAMILIES: dict[str, str] = {
    "sd1": "calotype.runtime.families.sd:SD1",
    "sd2": "calotype.runtime.families.sd:SD2",
    "sdxl": "calotype.runtime.families.sdxl:SDXL",
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
