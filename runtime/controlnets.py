"""The ControlNets and T2I-Adapters of an open model: bundles of the kind ``control``, and their sessions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from calotype.runtime.bundle.folder import Bundle, check_kind
from calotype.runtime.bundle.form import default_form
from calotype.runtime.bundle.manifest import CONTROLLED, Manifest
from calotype.runtime.bundle.spec import ModelSpec, TensorSpec
from calotype.runtime.denoising.controls import is_feature, is_residual
from calotype.runtime.denoising.job import SessionKey
from calotype.runtime.errors import BundleError, InputError, quoted
from calotype.runtime.networks import CONTROLNETS, T2I_ADAPTER, Networks
from calotype.runtime.sessions import Session


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ControlModel:
    """One that fits the model.

    Attributes:
        bundle: where it lies.
        key: names its session.
    """

    bundle: Bundle
    key: SessionKey

    @property
    def spec(self) -> ModelSpec:
        """Its network."""
        return self.bundle.manifest.networks[self.key.network]

    @property
    def identity(self) -> tuple[str, str]:
        """Its name, and the first ten digits of the SHA-256 of its weights."""
        manifest = self.bundle.manifest
        return manifest.name, manifest.files[self.spec.weights[0]].sha256[:10]


class ControlNet(ControlModel):
    """A network that runs before the denoising one."""

    @property
    def count(self) -> int:
        """How many residuals it makes."""
        return len(self.spec.outputs)

    @property
    def pooled(self) -> bool:
        """Whether each holds for every pixel; such a one acts on the row with the prompt alone."""
        return self.spec.outputs[0].shape[2:] == (1, 1)

    @property
    def kinds(self) -> int | None:
        """How many kinds of pictures it takes, several at once; None is one picture of one kind."""
        return _number(self.spec, "control_mode", 2)


class T2IAdapter(ControlModel):
    """A network that runs once a picture."""

    @property
    def channels(self) -> int:
        """Of the pictures that it reads."""
        return _number(self.spec, "control_image", 1) or 3

    @property
    def unit(self) -> int:
        """The sides of pictures are multiples of so many pixels: it puts the pixels of such squares into one."""
        halved = sum(str(size).endswith("/2") for size in self.spec.outputs[0].shape[2:3])
        return self.bundle.manifest.vae.downscale * (1 + halved)


class ControlNets:
    """What requests may name, and what they give by its folder; each is opened once, and stays open.

    Args:
        networks: the model's.
        named: bundles' folders, by the names that requests know them by.

    Raises:
        BundleError: a bundle is missing or corrupt, or no ControlNet, or the model's takes none.
        InputError: one is for another model.
    """

    def __init__(self, networks: Networks, named: Mapping[str, Path]) -> None:
        self._networks = networks
        self._by_folder: dict[Path, ControlNet | T2IAdapter] = {}
        self._by_key: dict[SessionKey, ControlNet | T2IAdapter] = {}
        self._sessions: dict[SessionKey, Session] = {}
        self.named = {name: self._read(folder) for name, folder in named.items()}

    def of(self, model: str | Path) -> ControlNet | T2IAdapter:
        """The ControlNet or the T2I-Adapter of that name, or in that folder; its session is opened."""
        if isinstance(model, Path):
            found = self._read(model)
        elif model in self.named:
            found = self.named[model]
        else:
            raise InputError(
                f"there is no control {quoted(model)}; known: {', '.join(self.named) or 'none'}; load the pipeline "
                "with controls={name: folder}, or give the folder as a path"
            )
        self.session(found.key)
        return found

    def session(self, key: SessionKey) -> Session:
        """The session of that key, opened where it is not."""
        if key not in self._sessions:
            session = self._sessions[key] = self._networks.open_session(self._by_key[key].bundle, key.network)
            if key.network in CONTROLNETS:
                session.defer_outputs()  # the denoising network takes them
        return self._sessions[key]

    def open(self) -> None:
        """Open those that have names."""
        for found in self.named.values():
            self.session(found.key)

    def trim(self) -> None:
        """See :meth:`Session.trim`."""
        for session in self._sessions.values():
            session.trim()

    def close(self) -> None:
        """Give everything back; may be called again."""
        while self._sessions:
            self._sessions.popitem()[1].close()

    def _read(self, folder: Path) -> ControlNet | T2IAdapter:
        if folder not in self._by_folder:
            bundle, network = read_control(folder, self._networks.bundle)
            spec = bundle.manifest.networks[network]
            key = SessionKey(network, default_form(spec, self._networks.backend), bundle.manifest.sha256)
            kind = ControlNet if network in CONTROLNETS else T2IAdapter
            self._by_folder[folder] = self._by_key[key] = kind(bundle=bundle, key=key)
        return self._by_folder[folder]


def read_control(folder: Path, model: Bundle) -> tuple[Bundle, str]:
    """The bundle of a control and the name of its network, checked against the ``model`` that it is for.

    Raises:
        BundleError: it is missing or corrupt, or holds none, or the model takes none.
        InputError: it is for another model.
    """
    bundle = Bundle.open(folder, weights=False)
    check_kind(bundle, "control")
    network = next((name for name in CHECKS if name in bundle.manifest.networks), None)
    if network is None:
        raise BundleError(f"{folder} has no {' or '.join(CHECKS)}; export the bundle again")
    CHECKS[network](bundle, bundle.manifest.networks[network], model)
    return bundle, network


def controlled_network(bundle: Bundle) -> ModelSpec:
    """The UNet with residual inputs of a model's bundle; raises BundleError where it has none."""
    spec = bundle.manifest.networks.get(CONTROLLED)
    if spec is None:
        raise BundleError(f"{bundle.path} has no {CONTROLLED}, which controls add to; export the bundle again")
    return spec


def _check_controlnet(control: Bundle, spec: ModelSpec, model: Bundle) -> None:
    """Raises InputError where a ControlNet is for another model."""
    own, its = control.manifest, model.manifest
    unet = controlled_network(model)
    residuals = [tensor for tensor in unet.inputs if is_residual(tensor.name)]
    makes = [(tensor.name, tensor.shape[1]) for tensor in spec.outputs]
    if own.family != its.family or makes != [(tensor.name, tensor.shape[1]) for tensor in residuals]:
        raise InputError(
            f"{control.path} is a ControlNet for models as {_kind(own, spec)}, and {its.name} is {_kind(its, unet)}; "
            "use one of its family"
        )
    taken = {tensor.name: tensor.shape for tensor in unet.inputs}
    others = [tensor.name for tensor in spec.inputs if not _is_given(tensor, taken.get(tensor.name))]
    if others or own.vae.downscale != its.vae.downscale or own.vae.latent_channels != its.vae.latent_channels:
        wrong = ", ".join(others) or "its latents"
        raise InputError(f"{control.path} is a ControlNet for another model than {its.name}: {wrong} differ")


def _check_adapter(control: Bundle, spec: ModelSpec, model: Bundle) -> None:
    """Raises InputError where a T2I-Adapter is for another model; BundleError where the model's bundle is older."""
    own, its = control.manifest, model.manifest
    taken = {tensor.name: tensor.shape for tensor in controlled_network(model).inputs if is_feature(tensor.name)}
    if not taken:
        raise BundleError(f"{model.path} takes no T2I-Adapters; export the bundle again")
    fits = all(taken.get(tensor.name) == tensor.shape for tensor in spec.outputs)
    alike = own.vae.downscale == its.vae.downscale
    if own.family != its.family or not fits or not alike:
        raise InputError(
            f"{control.path} is a T2I-Adapter for models as {own.family}, and {its.name} is {its.family} or of other "
            "widths; use one of its family"
        )


# What a bundle may hold -> what checks whether it fits.
CHECKS = {**dict.fromkeys(CONTROLNETS, _check_controlnet), T2I_ADAPTER: _check_adapter}


def _number(spec: ModelSpec, name: str, axis: int) -> int | None:
    """The size of an input's axis, where it has a number."""
    tensor = spec.input(name)
    size = None if tensor is None or len(tensor.shape) <= axis else tensor.shape[axis]
    return size if isinstance(size, int) else None


def _is_given(tensor: TensorSpec, shape: tuple[int | str, ...] | None) -> bool:
    """Whether the UNet's own input of a name is what the ControlNet takes; inpainting models have more channels."""
    if tensor.name in ("sample", "control_image", "conditioning_scale", "control_mode", "picture_scale"):
        return True
    return shape == tensor.shape


def _kind(manifest: Manifest, spec: ModelSpec) -> str:
    """A family with the width of its text embeddings, by which its models differ."""
    text = spec.input("encoder_hidden_states")
    return f"{manifest.family} ({'no text' if text is None else text.shape[-1]})"
