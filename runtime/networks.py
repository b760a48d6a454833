"""The open networks of a bundle, by name, form and weights."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.adapters.lora import Lora, merge
from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.form import INT8, Form
from calotype.runtime.bundle.safetensors import SafetensorsFile
from calotype.runtime.denoising.feature_cache import DEEP, SHALLOW
from calotype.runtime.denoising.job import SessionKey
from calotype.runtime.errors import BundleError, InputError
from calotype.runtime.parallel import run_parallel
from calotype.runtime.sessions import Session, choose_backend, default_form, has_int8, open_session
from calotype.runtime.sessions.low_memory import Turn, TurnTakingSession
from calotype.runtime.sessions.traced import Trace

Weights = tuple[Lora, ...]
Overrides = Mapping[str, Mapping[str, NDArray[np.floating[Any]]]]
logger = logging.getLogger(__name__)


class Networks:
    """The sessions of one bundle on one backend. Those of one set of weights are open at a time.

    Args:
        bundle: the model.
        backend: a name in ``BACKENDS``, or ``"auto"``.
        denoiser: the denoising network's name.
        encoders: the text encoders' names; these and the denoising network are what LoRAs change.
        weights: the LoRAs that are merged to begin with.
        low_memory: keep the network that runs alone in memory.
        trace: is told where the time goes.
        threads: that the CPU backend computes with; None is as many as this process may use.
        device: the number of the GPU; None is the first, where one is used.

    Attributes:
        weights: the LoRAs that are merged.
        sessions: what is open, by network and form.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: str,
        *,
        denoiser: str,
        encoders: Sequence[str],
        weights: Weights = (),
        low_memory: bool = False,
        trace: Trace | None = None,
        threads: int | None = None,
        device: int | None = None,
    ) -> None:
        self.bundle, self.backend = bundle, choose_backend(backend, bundle.path, device)
        self.denoiser, self.encoders = denoiser, tuple(encoders)
        self.weights = weights
        self._turn = Turn() if low_memory else None
        self._trace, self._threads, self._device = trace, threads, device
        self.sessions: dict[tuple[str, Hashable], Session] = {}
        self._changed: frozenset[str] = frozenset()

    @property
    def engines(self) -> dict[str, Path | None]:
        """By open network: the plan that runs it, None where it is the bundle's own graph."""
        return {_label(*key): session.engine for key, session in self.sessions.items()}

    def session(self, key: SessionKey) -> Session:
        """The session of that network, form and weights; opened where it is not, with its weights merged."""
        if key.weights != self.weights:
            self.use(key.weights)  # type: ignore[arg-type]
        found = self.sessions.get((key.network, key.form))
        if found is None:
            self.open([key])
            found = self.sessions[key.network, key.form]
        return found

    def encoder(self, network: str) -> Session:
        """The session of a text encoder."""
        return self.session(SessionKey(network, self.form(network), self.weights))

    def encoding(self) -> list[SessionKey]:
        """The sessions of the text encoders."""
        return [SessionKey(network, self.form(network), self.weights) for network in self.encoders]

    def form(self, network: str, precision: str | None = None, *, whole: bool = True) -> Form:
        """What ``network`` is computed in.

        Args:
            network: its name.
            precision: ``"int8"``, ``"float16"`` or ``"float32"``; ``"auto"`` is int8 where an engine in it was built,
                and None what the backend is fast in.
            whole: whether it is evaluated whole; deep-feature caching takes networks that have no engines in int8.

        Raises:
            InputError: a LoRA is merged, and an engine in int8 was asked for.
        """
        if precision == "int8" and self.weights:
            raise InputError("an engine in int8 takes no LoRA: its weights were rounded when it was built; use float32")
        spec = self.bundle.manifest.networks[network]
        if precision == "auto":
            built = whole and not self.weights and has_int8(self.bundle.path, spec, self.backend)
            precision = "int8" if built else None
        return default_form(spec, self.backend) if precision is None else Form.parse(precision)

    def denoising(self, form: Form, *, caching: bool) -> list[SessionKey]:
        """The sessions that jobs of a form take, with deep-feature caching or without.

        Raises:
            BundleError: the bundle has not got them.
        """
        names = (DEEP, SHALLOW) if caching else (self.denoiser,)
        missing = sorted(set(names) - self.bundle.manifest.networks.keys())
        if missing:
            raise BundleError(
                f"{self.bundle.path} has no {', '.join(missing)}, which deep-feature caching takes; "
                "export the bundle again"
            )
        return [SessionKey(name, form, self.weights) for name in names]

    def open(self, keys: Iterable[SessionKey]) -> None:
        """Open what of ``keys`` is not open yet, at the same time; all of it or nothing."""
        missing = [key for key in keys if (key.network, key.form) not in self.sessions]
        if missing:
            overrides = self._merged(self.weights)
            self.sessions |= self._opened(missing, overrides)
            self._changed = frozenset(overrides)

    def use(self, loras: Weights) -> None:
        """Have ``loras`` merged into the weights in place of those before; () is the model's own weights, bit for bit.

        What changes is opened first, and takes the place of what is open when all of it is: an error leaves everything
        as it was.

        Raises:
            InputError: a file cannot be read, or does not fit the model.
        """
        if loras == self.weights:
            return
        overrides = self._merged(loras)
        changing = [key for key in self.sessions if weights_of(key[0]) in self._changed | overrides.keys()]
        # An engine in int8 takes no LoRA, and is opened again when one without is asked for.
        opened = self._opened([SessionKey(*key) for key in changing if key[1] != INT8], overrides)
        replaced = [self.sessions.pop(key) for key in changing]
        self.sessions |= opened
        self.weights, self._changed = loras, frozenset(overrides)
        for session in replaced:
            session.close()

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

    def _opened(self, keys: Sequence[SessionKey], overrides: Overrides) -> dict[tuple[str, Hashable], Session]:
        opened: dict[tuple[str, Hashable], Session] = {}

        def add(key: SessionKey) -> None:
            opened[key.network, key.form] = self._open(self.bundle, key, overrides.get(weights_of(key.network)))

        try:
            run_parallel(add, keys)
        except BaseException:
            for session in opened.values():
                session.close()
            raise
        return opened

    def _open(self, bundle: Bundle, key: SessionKey, overrides: Mapping[str, NDArray[Any]] | None) -> Session:
        trace, spec = self._trace, bundle.manifest.networks[key.network]
        label, form = _label(key.network, key.form), key.form
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
        # The shallow network is small, and every second evaluation would send the rest away.
        if self._turn is None or key.network == SHALLOW:
            return watched()
        return TurnTakingSession(spec, watched, self._turn)

    def _merged(self, loras: Weights) -> dict[str, dict[str, NDArray[Any]]]:
        """The weights that ``loras`` change, by network and name; always from the bundle's own."""
        if not loras:
            return {}
        return merge(loras, {name: self._weights(name) for name in (*self.encoders, self.denoiser)})

    def _weights(self, network: str) -> SafetensorsFile:
        spec = self.bundle.manifest.networks[network]
        self.bundle.check_weights(spec)
        return SafetensorsFile(self.bundle.path / spec.weights[0])


def weights_of(network: str) -> str:
    """The network whose weights ``network`` reads."""
    return "unet" if network in (DEEP, SHALLOW) else network


def _label(network: str, form: Hashable) -> str:
    return f"{network}_int8" if form == INT8 else network
