"""An IP-Adapter with its image encoder, which is used beside a model of its family."""

from __future__ import annotations

import dataclasses

from calotype.export.checkpoint import Checkpoint
from calotype.export.families.sd import SD1_CONTEXT, SD2_CONTEXT
from calotype.export.folder import Folder
from calotype.export.graphs import ip_adapter_plans
from calotype.export.models.ip_adapter import IPAdapter
from calotype.export.single_file import SingleFile
from calotype.export.single_file_ip_adapter import (
    has_ip_adapter,
    ip_adapter_config,
    ip_adapter_table,
    load_image_encoder,
)
from calotype.export.weights import load_module
from calotype.runtime.bundle.manifest import VaeSpec
from calotype.runtime.errors import CheckpointError, InputError

# By the width of its tokens, which is that of the text embeddings; of no published model, it is of its own.
CONTEXTS = {SD1_CONTEXT: "sd1", SD2_CONTEXT: "sd2", 2048: "sdxl"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class IPAdapterFile:
    """A file of one as its authors publish them, beside the folder of the image encoder."""

    name: str = "ip-adapter"
    known_as: str = "an IP-Adapter of theirs"
    pipelines: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()

    def has_folder(self, folder: Folder) -> bool:
        """None: it is a file."""
        return False

    def load_folder(self, folder: Folder) -> Checkpoint:
        """Of no kind: see :meth:`has_folder`."""
        raise CheckpointError(f"{folder.path} is a folder; give the file of an IP-Adapter")

    def has_file(self, file: SingleFile) -> bool:
        """One with keys of image tokens."""
        return has_ip_adapter(file)

    def load_file(self, file: SingleFile) -> Checkpoint:
        """With settings that are read off its tensors, and the image encoder that fits them."""
        if file.ema:
            raise InputError(f"{file.path} is an IP-Adapter, which has no averaged weights; export without --ema")
        config = ip_adapter_config(file)
        encoder = load_image_encoder(file, config)
        if config.kind == "full":
            config = dataclasses.replace(config, tokens=encoder.config.tokens)
        adapter = load_module(IPAdapter, config, file.state, "IP-Adapter", ip_adapter_table(file))
        return Checkpoint(
            family=CONTEXTS.get(config.cross_attention_dim, self.name),
            kind="ip-adapter",
            components={"image_encoder": encoder, "ip_adapter": adapter},
            graphs=tuple(ip_adapter_plans(encoder, adapter)),
            vae=VaeSpec(scaling_factor=None),
            card=file.card,
            source=file.source,
        )


IP_ADAPTER = IPAdapterFile()
