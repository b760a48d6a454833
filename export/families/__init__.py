"""The families of models that are exported: one file each, found through a table that imports it when it is asked."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

from calotype.export.families.base import Family

# A family's name in the manifest to the module and the object that know it; a new family is one file and one line here.
# Of those that know a file, the last is taken: the original ones of a ControlNet hold a model, too.
FAMILIES = {
    "sd1": "calotype.export.families.sd:SD1",
    "sd2": "calotype.export.families.sd:SD2",
    "sdxl": "calotype.export.families.sdxl:SDXL",
    "flux2-klein": "calotype.export.families.flux2_klein:FLUX2_KLEIN",
    "vae": "calotype.export.families.vae:VAE",
    "control": "calotype.export.families.control:CONTROL",
    "t2i_adapter": "calotype.export.families.t2i_adapter:T2I_ADAPTER",
    "ip-adapter": "calotype.export.families.ip_adapter:IP_ADAPTER",
}


def families() -> Iterator[Family]:
    """Every family of the table, in its order."""
    for place in FAMILIES.values():
        module, _, name = place.partition(":")
        family: Family = getattr(import_module(module), name)
        yield family
