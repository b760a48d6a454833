"""The open networks of a bundle, by name, form and weights."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.bundle.form import FLOAT32, INT8, Form
from calotype.runtime.bundle.manifest import CONTROLLED, EDITING, PROMPTED
from calotype.runtime.denoising.feature_cache import DEEP, SHALLOW
from calotype.runtime.denoising.job import SessionKey
from calotype.runtime.errors import BackendError, BundleError, InputError
from calotype.runtime.graphs.quantization import MAX_ROOT_MEAN_SQUARE, relative_error
from calotype.runtime.merged_weights import MOST_SETS, MergedWeights, Weights
from calotype.runtime.parallel import run_parallel
from calotype.runtime.sessions import Session, choose_backend, default_form, has_int8, int8_probe, open_session
from calotype.runtime.sessions.low_memory import Turn, TurnTakingSession
from calotype.runtime.sessions.session import Changes, run_once
from calotype.runtime.sessions.traced import Trace

LORA_MEMORY = 2 << 30  # room for one of every linear layer of SD 1.5 on a CPU with engines, beside the one in use
# The networks of ControlNets' own bundles, the second for several kinds of pictures; and of T2I-Adapters'.
CONTROLNETS, T2I_ADAPTER = ("controlnet", "controlnet_union"), "t2i_adapter"
# Networks over the weights of another.
PARTS = {DEEP: "unet", SHALLOW: "unet", CONTROLLED: "unet", PROMPTED: "unet", EDITING: "transformer"}
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
        self._lock = threading.Lock()
        self._errors: OrderedDict[SessionKey, float] = OrderedDict()  # of int8, with sets that were tried in it
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

        With LoRAs that change its weights, ``"auto"`` is never int8: what they lose in it is known when it is opened.
        """
        changed, spec = self._changes(network, loras), self.bundle.manifest.networks[network]
        if precision == "auto":
            built = whole and not changed and has_int8(self.bundle.path, spec, self.backend)
            precision = "int8" if built else None
        return default_form(spec, self.backend) if precision is None else Form.parse(precision)

    def entry(self, *, controls: bool, image_prompts: bool) -> str:
        """The denoising network of jobs with ControlNets, with image prompts and perhaps those, or with neither."""
        return PROMPTED if image_prompts else CONTROLLED if controls else self.denoiser

    def denoising(self, form: Form, *, network: str, caching: bool, loras: Weights = ()) -> list[SessionKey]:
        """The sessions that jobs of a form take: ``network`` alone, or with deep-feature caching two in its place.

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
        merged = {weights: self._weights.merged(weights) for weights in sets}

        def add(key: SessionKey) -> None:
            overrides: Changes | None = merged[key.weights].get(weights_of(key.network))
            if self._turn is not None and overrides is not None:  # it is opened often
                overrides = dict(overrides)
            opened[key] = self._refitted(key, keys, overrides) or self._open(self.bundle, key, overrides)
            if key.form == INT8 and overrides is not None:
                self._check_int8(key, opened[key], overrides)
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

    def _refitted(self, key: SessionKey, used: Container[SessionKey], changes: Changes | None) -> Session | None:
        """A session that is due to be closed, with these weights put in place of its own; None where there is none.

        Of the denoising network alone: what encoders have encoded is remembered by their sessions.
        """
        if key.network not in (self.denoiser, CONTROLLED):
            return None
        with self._lock:
            alike = [
                other
                for other, session in self.sessions.items()
                if other[:2] == key[:2] and other not in used and session.refits
            ]
            if not alike or sum(map(self._held, alike)) <= self._most:
                return None
            session = self.sessions.pop(alike[0])
        try:
            session.set_weights(changes)
        except BackendError as error:
            logger.warning("%s is opened anew for other weights: %s", _label(key), str(error))
            session.close()
            return None
        except BaseException:
            session.close()
            raise
        return session

    def _check_int8(self, key: SessionKey, session: Session, changes: Changes) -> None:
        """Refuse LoRAs with which an engine in int8 is further off than it may be without; one run is compared."""
        if key not in self._errors:
            probe = int8_probe(self.bundle.path, self.bundle.manifest.networks[key.network])
            if probe is None:
                raise InputError(
                    f"the engine in int8 of {key.network} is of a version that takes no LoRA; use float32, or build it "
                    f"again with: calotype build {self.bundle.path} --backend cpu --precision int8 --force"
                )
            got = run_once(session, probe)
            with self._open(self.bundle, key._replace(form=FLOAT32), changes) as exact:
                self._errors[key] = relative_error(got["noise_pred"], run_once(exact, probe)["noise_pred"])
            if len(self._errors) > MOST_SETS:
                self._errors.popitem(last=False)
        weights: Any = key.weights
        error, files = self._errors[key], ", ".join(lora.path.name for lora in weights)
        if not error <= MAX_ROOT_MEAN_SQUARE:
            raise InputError(
                f"with {files} the {key.network} in int8 is {error:.1%} off, {MAX_ROOT_MEAN_SQUARE:.1%} are allowed; "
                "use float32, or less of it"
            )
        logger.info("%s in int8 with %s is %.1f%% off float32", key.network, files, 100 * error)

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
        if self._turn is None or key.network in (SHALLOW, *CONTROLNETS):
            return watched()
        return TurnTakingSession(spec, watched, self._turn)


def weights_of(network: str) -> str:
    """The network whose weights ``network`` reads."""
    return PARTS.get(network, network)


def _label(key: SessionKey) -> str:
    return f"{key.network}_int8" if key.form == INT8 else key.network
