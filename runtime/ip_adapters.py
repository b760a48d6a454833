"""The IP-Adapters of an open model: bundles of the kind ``ip-adapter``, checked against it, and what they make.

Ye et al. 2023, "IP-Adapter" (arXiv 2308.06721). What they make of a picture are keys and values for the UNet's
cross-attentions: rows by name, computed once a picture.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from calotype.runtime.arrays import Array, Inputs
from calotype.runtime.bundle.folder import Bundle, check_kind
from calotype.runtime.bundle.manifest import PROMPTED
from calotype.runtime.bundle.spec import ModelSpec, TensorSpec
from calotype.runtime.errors import BundleError, InputError, quoted
from calotype.runtime.image_prompt import ImagePrompt
from calotype.runtime.image_prompt_rows import Read, blocks_of, file_order, layer_scales, rows_of
from calotype.runtime.networks import Networks
from calotype.runtime.pictures.clip_pictures import clip_pixels
from calotype.runtime.sessions import Session

ENCODER, PROJECTION, KEYS_VALUES = "image_encoder", "image_projection", "image_keys_values"
# A picture's way: each network's one input, the output of the one before.
NEEDED = {ENCODER: "pixel_values", PROJECTION: "image_embedding", KEYS_VALUES: "image_tokens"}
MOST_READ = 32  # pictures whose keys and values are kept
MOST_ROWS = 4  # sets of image prompts whose rows are kept


class IpAdapter:
    """One that fits the model, with its open networks."""

    def __init__(self, bundle: Bundle, networks: Networks) -> None:
        self.bundle, self._networks = bundle, networks
        self._sessions: dict[str, Session] = {}
        self._read: OrderedDict[bytes, Read] = OrderedDict()
        spec = bundle.manifest.networks[ENCODER]
        self.size = int(spec.inputs[0].shape[-1])
        self._whole = len(spec.outputs[0].shape) == 2  # one embedding of all of a picture

    @property
    def identity(self) -> tuple[str, str]:
        """Its name, and the first ten digits of the SHA-256 of its weights."""
        manifest = self.bundle.manifest
        return manifest.name, manifest.files[manifest.networks[KEYS_VALUES].weights[0]].sha256[:10]

    def open(self) -> None:
        """Open its networks, where they are not."""
        for network in NEEDED:
            if network not in self._sessions:
                self._sessions[network] = self._networks.open_session(self.bundle, network)

    def read(self, pixels: Array) -> Read:
        """Keys and values of a picture (3, size, size), see :func:`clip_pixels`."""
        return self._kept(pixels.tobytes(), pixels)

    def read_nothing(self) -> Read:
        """Those of the picture that stands for none: no embedding, or a picture of zeros where its parts are read."""
        return self._kept(b"", None if self._whole else np.zeros((3, self.size, self.size), np.float32))

    def trim(self) -> None:
        """See :meth:`Session.trim`."""
        for session in self._sessions.values():
            session.trim()

    def close(self) -> None:
        """Give everything back; may be called again."""
        while self._sessions:
            self._sessions.popitem()[1].close()

    def _kept(self, content: bytes, pixels: Array | None) -> Read:
        key = hashlib.blake2b(content).digest()
        if key not in self._read:
            if pixels is None:
                embedding = np.zeros(self._shape(PROJECTION), np.float32)
            else:
                (embedding,) = self._run(ENCODER, pixels)
            (tokens,) = self._run(PROJECTION, embedding)
            made = self._run(KEYS_VALUES, tokens)
            self._read[key] = list(zip(made[::2], made[1::2], strict=True))
            if len(self._read) > MOST_READ:
                self._read.popitem(last=False)
        self._read.move_to_end(key)
        return self._read[key]

    def _shape(self, network: str) -> tuple[int, ...]:
        return self.bundle.manifest.networks[network].inputs[0].resolve({"batch": 1})[1:]

    def _run(self, network: str, value: Array) -> list[Array]:
        """The outputs for one item, always alone: what else is in a batch can change the last bits."""
        session, sizes = self._sessions[network], {"batch": 1}
        session.reserve(sizes)
        session.write(session.inputs[0].name, sizes, value, row=0)
        session.run(sizes)
        return [session.buffer(spec.name, sizes)[0].copy() for spec in session.outputs]


class IpAdapters:
    """What requests may name, and what they give by its folder; each is opened once, and stays open.

    Args:
        networks: the model's.
        named: bundles' folders, by the names that requests know them by.

    Raises:
        BundleError: a bundle is missing or corrupt, or no IP-Adapter, or the model's takes none.
        InputError: one is for another model.
    """

    def __init__(self, networks: Networks, named: Mapping[str, Path]) -> None:
        self._networks = networks
        self._by_folder: dict[Path, IpAdapter] = {}
        self._rows: OrderedDict[object, tuple[Inputs, Inputs]] = OrderedDict()
        self.named = {name: self._opened(folder) for name, folder in named.items()}

    def of(self, model: str | Path) -> IpAdapter:
        """The IP-Adapter of that name, or in that folder; its networks are opened."""
        if isinstance(model, Path):
            found = self._opened(model)
        elif model in self.named:
            found = self.named[model]
        else:
            raise InputError(
                f"there is no image prompt {quoted(model)}; known: {', '.join(self.named) or 'none'}; load the "
                "pipeline with image_prompts={name: folder}, or give the folder as a path"
            )
        found.open()
        return found

    def rows(self, prompts: Sequence[ImagePrompt]) -> tuple[Inputs, Inputs]:
        """The denoising network's rows of a request's image prompts, and those of none in their place.

        Raises:
            InputError: a picture cannot be read, or a scale is of a layer that the UNet has not got.
        """
        blocks = blocks_of(prompted_network(self._networks.bundle))
        adapters = [self.of(prompt.model) for prompt in prompts]
        scales = [layer_scales(prompt.scale, blocks) for prompt in prompts]
        pixels = [
            [clip_pixels(image, adapter.size) for image in prompt.images]
            for prompt, adapter in zip(prompts, adapters, strict=True)
        ]
        digests = [hashlib.blake2b(b"".join(map(np.ndarray.tobytes, own))).digest() for own in pixels]
        key = tuple(
            (adapter.bundle.path, len(own), digest, scale)
            for adapter, own, digest, scale in zip(adapters, pixels, digests, scales, strict=True)
        )
        if key not in self._rows:
            shown = [
                [adapter.read(own) for own in pictures] for adapter, pictures in zip(adapters, pixels, strict=True)
            ]
            hidden = [[adapter.read_nothing()] * len(own) for adapter, own in zip(adapters, pixels, strict=True)]
            self._rows[key] = rows_of(blocks, shown, scales), rows_of(blocks, hidden, scales)
            if len(self._rows) > MOST_ROWS:
                self._rows.popitem(last=False)
        self._rows.move_to_end(key)
        return self._rows[key]

    def open(self) -> None:
        """Open those that have names."""
        for found in self.named.values():
            found.open()

    def trim(self) -> None:
        """See :meth:`Session.trim`."""
        for found in self._by_folder.values():
            found.trim()

    def close(self) -> None:
        """Give everything back; may be called again."""
        for found in self._by_folder.values():
            found.close()

    def _opened(self, folder: Path) -> IpAdapter:
        if folder not in self._by_folder:
            bundle = Bundle.open(folder, weights=False)
            check_kind(bundle, "ip-adapter")
            _check_whole(bundle)
            _check_fits(bundle, self._networks.bundle)
            self._by_folder[folder] = IpAdapter(bundle, self._networks)
        return self._by_folder[folder]


def prompted_network(bundle: Bundle) -> ModelSpec:
    """The UNet with inputs for image prompts of a model's bundle; raises BundleError where it has none."""
    spec = bundle.manifest.networks.get(PROMPTED)
    if spec is None:
        raise BundleError(f"{bundle.path} has no {PROMPTED}, which image prompts take; export the bundle again")
    return spec


def _check_whole(adapter: Bundle) -> None:
    """Raises BundleError where a network is missing, or does not take what the one before it gives."""
    given: tuple[TensorSpec, ...] | None = None
    for network, name in NEEDED.items():
        spec = adapter.manifest.networks.get(network)
        if spec is None:
            raise BundleError(f"{adapter.path} has no {network}; export the bundle again")
        if [own.name for own in spec.inputs] != [name] or given not in (None, spec.inputs):
            raise BundleError(f"{adapter.path} has an {network} that does not take {name} alone; export it again")
        given = spec.outputs


def _check_fits(adapter: Bundle, model: Bundle) -> None:
    """Raises InputError where an IP-Adapter is for another model."""
    own, its = adapter.manifest, model.manifest
    unet = prompted_network(model)
    blocks, text = blocks_of(unet), unet.input("encoder_hidden_states")
    keys = own.networks[KEYS_VALUES]
    makes = [spec.shape[2:] for spec in keys.outputs]
    width, wanted = keys.inputs[0].shape[-1], None if text is None else text.shape[-1]
    takes = [(block.channels,) for block in file_order(blocks) for _ in range(2 * block.layers)]  # keys and values
    if width != wanted or makes != takes:
        raise InputError(
            f"{adapter.path} is an IP-Adapter for models of {len(makes) // 2} cross-attentions to text of width "
            f"{width}, as {own.family}, and {its.name} has {len(takes) // 2} of {wanted}, as {its.family}; use one of "
            "its family"
        )
