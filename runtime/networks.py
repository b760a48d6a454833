"""The open networks of a bundle, by name, form and weights."""

from __future__ import annotations

import functools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Container, Hashable, Iterable, Sequence
from pathlib import Path

from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.form import INT8, Form
from calotype.runtime.bundle.manifest import CONTROLLED, EDITING
from calotype.runtime.denoising.feature_cache import DEEP, SHALLOW
from calotype.runtime.denoising.job import SessionKey
from calotype.runtime.errors import BundleError, InputError
from calotype.runtime.merged_weights import MergedWeights, Weights
from calotype.runtime.parallel import run_parallel
from calotype.runtime.sessions import Session, choose_backend, default_form, has_int8, open_session
from calotype.runtime.sessions.low_memory import Turn, TurnTakingSession
from calotype.runtime.sessions.session import Changes
from calotype.runtime.sessions.traced import Trace

LORA_MEMORY = 2 << 30  # room for two of rank 32 at SD 1.5's size on a CPU with engines, beside the one in use
CONTROLNET = "controlnet"  # of a ControlNet's own bundle
# Networks over the weights of another.
PARTS = {DEEP: "unet", SHALLOW: "unet", CONTROLLED: "unet", EDITING: "transformer"}
logger = logging.getLogger(__name__)


class Networks:
    """The sessions of one bundle on one backend, those of several sets of LoRAs at a time.

    A set of LoRAs is a tuple of them, () the model's own weights. A network that a set leaves alone has one session for
    all of them. Those of the set that was opened last stay; of the others, those that were used last, up to
    ``lora_memory`` bytes.

    Args:
        bundle: the model.
        backend: a name in ``BACKENDS``, or ``"auto"``.
        denoiser: the denoising network's name.
        encoders: the text encoders' names; these and the denoising network are what LoRAs change.
        lora_memory: bytes of weights that sessions hold which are kept for their set to come again.
        low_memory: keep the network that runs alone in memory.
        trace: is told where the time goes.
        threads: that the CPU backend computes with; None is as many as this process may use.
        device: the number of the GPU; None is the first, where one is used.

    Attributes:
        sessions: what is open, that which was used last at the end.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: str,
        *,
        denoiser: str,
        encoders: Sequence[str],
        lora_memory: int = LORA_MEMORY,
        low_memory: bool = False,
        trace: Trace | None = None,
        threads: int | None = None,
        device: int | None = None,
    ) -> None:
        self.bundle, self.backend = bundle, choose_backend(backend, bundle.path, device)
        self.denoiser, self.encoders = denoiser, tuple(encoders)
        self._turn = Turn() if low_memory else None
        self._trace, self._threads, self._device = trace, threads, device
        self._weights = MergedWeights(bundle, (*self.encoders, denoiser))
        self._most = 0 if low_memory else lora_memory
        self.sessions: OrderedDict[SessionKey, Session] = OrderedDict()
        self._waiting: dict[SessionKey, int] = {}  # bytes of the changes of a network that takes turns

    @property
    def engines(self) -> dict[str, Path | None]:
        """By open network: the plan that runs it, None where it is the bundle's own graph."""
        return {_label(key): session.engine for key, session in self.sessions.items()}

    @property
    def kept_bytes(self) -> int:
        """Bytes of weights that the open sessions hold and share with nobody, those in use among them."""
        return sum(map(self._held, self.sessions))

    def key(self, network: str, form: Form, loras: Weights = ()) -> SessionKey:
        """What names the session of a network with a set of LoRAs; () are its weights where they leave it alone.

        Raises:
            InputError: a file cannot be read, or does not fit the model.
        """
        return SessionKey(network, form, loras if self._changes(network, loras) else ())

    def session(self, key: SessionKey) -> Session:
        """The session of that key, opened where it is not."""
        found = self.sessions.get(key)
        if found is None:
            self.open([key])
            found = self.sessions[key]
        elif len(self.sessions) > 1:
            self.sessions.move_to_end(key)
        return found

    def encoder(self, network: str, loras: Weights = ()) -> Session:
        """The session of a text encoder."""
        return self.session(self.key(network, self.form(network, loras=loras), loras))

    def encoding(self, loras: Weights = ()) -> list[SessionKey]:
        """The sessions of the text encoders."""
        return [self.key(network, self.form(network, loras=loras), loras) for network in self.encoders]

    def form(self, network: str, precision: str | None = None, *, whole: bool = True, loras: Weights = ()) -> Form:
        """What ``network`` is computed in.

        Args:
            network: its name.
            precision: ``"int8"``, ``"float16"`` or ``"float32"``; ``"auto"`` is int8 where an engine in it was built,
                and None what the backend is fast in.
            whole: whether it is evaluated whole; deep-feature caching takes networks that have no engines in int8.
            loras: what is merged into its weights.

        Raises:
            InputError: LoRAs change its weights, and an engine in int8 was asked for.
        """
        changed = self._changes(network, loras)
        if precision == "int8" and changed:
            files = ", ".join(lora.path.name for lora in loras)
            raise InputError(
                f"an engine in int8 takes no LoRA that changes its weights, which were rounded when it was built, as "
                f"{files} does; use float32"
            )
        spec = self.bundle.manifest.networks[network]
        if precision == "auto":
            built = whole and not changed and has_int8(self.bundle.path, spec, self.backend)
            precision = "int8" if built else None
        return default_form(spec, self.backend) if precision is None else Form.parse(precision)

    def denoising(self, network: str, form: Form, *, caching: bool, loras: Weights = ()) -> list[SessionKey]:
        """The sessions that jobs of a denoising network in a form take; with deep-feature caching, its two parts.

        Raises:
            BundleError: the bundle has not got them.
        """
        names = (DEEP, SHALLOW) if caching else (network,)
        missing = sorted(set(names) - self.bundle.manifest.networks.keys())
        if missing:
            raise BundleError(
                f"{self.bundle.path} has no {', '.join(missing)}, which "
                f"{'deep-feature caching' if caching else 'this picture'} takes; export the bundle again, or leave "
                "that out if its family has none"
            )
        return [self.key(name, form, loras) for name in names]

    def open(self, keys: Sequence[SessionKey]) -> None:
        """Open what of ``keys`` is not open yet, at the same time; all of it or nothing.

        Then sessions of other weights are closed, those that were used longest ago first, until the rest hold no more
        than ``lora_memory``.

        Raises:
            InputError: a file cannot be read, does not fit the model, or has changed since it was looked at.
        """
        missing = [key for key in keys if key not in self.sessions]
        if missing:
            self.sessions |= self._opened(missing)
        for key in keys:
            self.sessions.move_to_end(key)
        if missing:
            self._make_room(set(keys))

    def open_session(self, bundle: Bundle, network: str) -> Session:
        """Open a network of any bundle as these are, such as another autoencoder's; the caller closes it."""
        return self._open(
            bundle, SessionKey(network, default_form(bundle.manifest.networks[network], self.backend)), None
        )

    def trim(self) -> None:
        """Give back what runs at large sizes have taken and the next such run takes anew."""
        for session in self.sessions.values():
            session.trim()

    def close(self) -> None:
        """Give everything back; may be called again."""
        while self.sessions:
            self.sessions.popitem()[1].close()

    def _changes(self, network: str, loras: Weights) -> bool:
        return bool(loras) and weights_of(network) in self._weights.changed(loras)

    def _make_room(self, used: Container[SessionKey]) -> None:
        changing = (*self.encoders, self.denoiser)
        others = [key for key in self.sessions if key not in used and weights_of(key.network) in changing]
        held = {key: self._held(key) for key in others}
        for key in others:
            if sum(held.values()) <= self._most:
                break
            if held.pop(key):  # the others would come back slowly, and cost nothing
                self._waiting.pop(key, None)
                self.sessions.pop(key).close()

    def _held(self, key: SessionKey) -> int:
        """Bytes of weights that a session has to itself, between its turns too."""
        return self.sessions[key].own_bytes + self._waiting.get(key, 0)

    def _opened(self, keys: Sequence[SessionKey]) -> dict[SessionKey, Session]:
        opened: dict[SessionKey, Session] = {}
        sets = {key.weights for key in keys}
        merged = {weights: self._weights.merged(weights, _read(keys, weights)) for weights in sets}

        def add(key: SessionKey) -> None:
            overrides = merged[key.weights].get(weights_of(key.network))
            opened[key] = self._open(self.bundle, key, overrides)
            if self._turn is not None and overrides is not None:
                self._waiting[key] = sum(own.nbytes for own in overrides.values())

        try:
            run_parallel(add, keys)
        except BaseException:
            for key, session in opened.items():
                self._waiting.pop(key, None)
                session.close()
            raise
        return opened

    def _open(self, bundle: Bundle, key: SessionKey, overrides: Changes | None) -> Session:
        trace, spec = self._trace, bundle.manifest.networks[key.network]
        label, form = _label(key), key.form
        assert isinstance(form, Form)

        def opener() -> Session:
            begin = time.perf_counter()
            check = functools.partial(bundle.check_weights, spec)
            session = open_session(
                bundle.path,
                spec,
                self.backend,
                overrides,
                check,
                form=form,
                trace=trace is not None,
                threads=self._threads,
                device=self._device,
            )
            logger.debug(
                "%s of %s opened on %s from %s in %.2f s",
                label, bundle.path, self.backend, session.engine or "the bundle's graph", time.perf_counter() - begin,
            )  # fmt: skip
            return session

        watched: Callable[[], Session] = opener if trace is None else lambda: trace.open(label, opener)
        # The shallow network is small, and every second evaluation would send the rest away; so would a ControlNet.
        if self._turn is None or key.network in (SHALLOW, CONTROLNET):
            return watched()
        return TurnTakingSession(spec, watched, self._turn)


def weights_of(network: str) -> str:
    """The network whose weights ``network`` reads."""
    return PARTS.get(network, network)


def _read(keys: Iterable[SessionKey], weights: Hashable) -> set[str]:
    """The networks whose weights those of ``keys`` read that have ``weights``."""
    return {weights_of(key.network) for key in keys if key.weights == weights}


def _label(key: SessionKey) -> str:
    return f"{key.network}_int8" if key.form == INT8 else key.network
