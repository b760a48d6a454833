"""How a server is set up: ``serve.toml`` and the command line, as values that were checked."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from calotype.runtime.adapters.named import MOST_NAME
from calotype.runtime.arguments import MOST_THREADS
from calotype.runtime.errors import InputError, quoted
from calotype.runtime.pictures.autoencoder import Tiles
from calotype.runtime.pictures.canvas import MAX_SIZE
from calotype.runtime.sessions import check_backend
from calotype.runtime.text.textual_inversion import Embedding
from calotype.runtime.untrusted import read_toml
from calotype.serving.http.drawing import Settings
from calotype.serving.http.keys import read_keys
from calotype.serving.http.limits import Limits
from calotype.serving.http.security import Access
from calotype.serving.workers.admission import Bounds
from calotype.serving.workers.messages import Open, Size
from calotype.serving.workers.served import Served

T = TypeVar("T")
CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
# What numbers may be; a day is long for what is waited for.
BOUNDS = {
    "port": (0, 65535),
    "workers": (1, 256),
    "max_running": (1, 1 << 16),
    "max_queue": (0, 1 << 20),
    "threads": (1, MOST_THREADS),
    "max_seconds": (0, 86400),
    "hang_seconds": (0.1, 86400),
    "stop_seconds": (0, 86400),
}
KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A table ``[models.NAME]``.

    Attributes:
        bundle: a bundled model's name, or a folder.
        sha256: a pin: the bundle's hash as ``calotype info`` shows it; another bundle is not opened. None is any.
        backend: a name in ``BACKENDS``, or ``"auto"``; None is the server's.
        low_memory: keep one network in memory at a time.
        fast: whether requests that say nothing of it are drawn fast.
        loras: files by the names that requests may use.
        controls: ControlNets' bundles by the names that requests may use.
        safety_checker: whether pictures that the model's own safety checker takes exception to are refused.
        output_filter: ``module:function``, a Python callable that every picture has to pass; "" is none.
        embeddings: textual inversions, ``FILE`` or ``FILE:WORD``.
        vae: a bundle whose autoencoder takes the place of the model's own.
        vae_tiling: whether large pictures go through the autoencoder in tiles.
        warm: sizes that are drawn once before the model is ready, such as ``512x512``; none is its own.
    """

    bundle: str
    sha256: str | None = None
    backend: str | None = None
    low_memory: bool = False
    fast: bool = False
    loras: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    controls: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    safety_checker: bool = False
    output_filter: str = ""
    embeddings: tuple[str, ...] = ()
    vae: str | None = None
    vae_tiling: bool = False
    warm: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.backend is not None:
            check_backend(self.backend)
        if self.output_filter and not CALLABLE.fullmatch(self.output_filter):
            raise InputError(f"output_filter={quoted(self.output_filter)} names nothing; write module:function")
        for text in self.warm:
            size_of(text)

    def served(self, name: str, backend: str) -> Served:
        """The model, read as far as that goes without opening it.

        Raises:
            BundleError: there is no such bundle, or it is not the one that is pinned.
            InputError: a textual inversion or a LoRA cannot be read, or what belongs to the model does not fit it, or
                the pin is none.
        """
        order = Open(
            name=name,
            bundle=self.bundle,
            sha256=self.sha256,
            backend=self.backend or backend,
            low_memory=self.low_memory,
            fast=self.fast,
            controls=self.controls,
            safety_checker=self.safety_checker,
            output_filter=self.output_filter,
            embeddings=tuple(Embedding.parse(text) for text in self.embeddings),
            vae=self.vae,
            tiles=Tiles() if self.vae_tiling else None,
            sizes=tuple(map(size_of, self.warm)),
        )
        return Served.of(order, self.loras)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """All of it. Every attribute but ``models`` and ``limits`` is an option of the command line, too.

    Attributes:
        models: by the name under which each is served; the first is the default.
        host: the address to listen at; another than this machine's own needs keys.
        port: 0 is any that is free.
        uds: the path of a socket file to listen at, in place of an address.
        api_key_file: the keys that clients have; None lets this machine's programs in.
        admin_key_file: the keys that operators have; None lets nobody in there.
        hosts: names that requests may come under; None is this machine's without keys, and any with keys.
        origins: of pages of other sites that may ask, such as ``https://example.com``.
        proxies: addresses or networks whose ``X-Forwarded-For`` is believed.
        log_prompts: whether the log has prompts.
        devices: the GPUs that are used, a worker for each; none is what the backend takes.
        workers: how many share the processor where there are no devices.
        threads: that all workers together compute with on a CPU; None is as many as may be used.
        backend: of models that name none.
        max_running: pictures that share the workers' runs.
        max_queue: pictures that may wait beside them.
        max_seconds: of predicted work that may wait.
        hang_seconds: a worker that is silent for less does not hang.
        stop_seconds: that what is accepted has to be finished in once the server is told to stop.
        build: whether plans and engines are built before their model is opened, where there are none.
        controls: ControlNets' bundles by the names that requests may use, of every model beside its own.
        safety_checker: whether pictures that a model's own safety checker takes exception to are refused; all models
            have to have one then.
        output_filter: of models that name none.
        limits: the table ``[limits]``, what one request may ask for; see :class:`calotype.serving.http.limits.Limits`.
    """

    models: Mapping[str, ModelConfig]
    host: str = "127.0.0.1"
    port: int = 8000
    uds: Path | None = None
    api_key_file: Path | None = None
    admin_key_file: Path | None = None
    hosts: tuple[str, ...] | None = None
    origins: tuple[str, ...] = ()
    proxies: tuple[str, ...] = ()
    log_prompts: bool = False
    devices: tuple[int, ...] = ()
    workers: int = 1
    threads: int | None = None
    backend: str = "auto"
    max_running: int = 16
    max_queue: int = 64
    max_seconds: float = 600.0
    hang_seconds: float = 30.0
    stop_seconds: float = 30.0
    build: bool = False
    controls: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    safety_checker: bool = False
    output_filter: str = ""
    limits: Limits = dataclasses.field(default_factory=Limits)

    def __post_init__(self) -> None:
        check_backend(self.backend)
        if not self.models:
            raise InputError("there is no model to serve; name one, such as talbot")
        for name, model in self.models.items():
            names = [("a model", name), *(("a LoRA", own) for own in model.loras)]
            for what, own in (*names, *(("a control", own) for own in model.controls)):
                if not 0 < len(own) <= MOST_NAME:
                    raise InputError(f"{what} has the name {quoted(own)}; give one of 1 to {MOST_NAME} letters")
        if self.uds is None and self.api_key_file is None and not _is_local(self.host):
            raise InputError(
                f"host={quoted(self.host)} can be reached from other machines, and there are no keys; give "
                "--api-key-file, or listen at 127.0.0.1"
            )
        for name, (low, high) in BOUNDS.items():
            self._check(name, low, high)
        if len(set(self.devices)) < len(self.devices) or min(self.devices, default=0) < 0:
            raise InputError(f"devices={list(self.devices)} are no numbers of different GPUs; give such as 0,1")
        if self.devices and self.workers != 1:
            raise InputError("each device has one worker; give devices or workers, not both")

    def _check(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if value is not None and not low <= value <= high:
            raise InputError(f"{name}={value} is out of range; give {low} to {high}")

    @classmethod
    def read(cls, path: Path | None, models: Mapping[str, str], options: Mapping[str, Any]) -> Self:
        """What the file at ``path`` says, and over it what the command line says.

        Args:
            path: of a TOML file; None is none.
            models: bundles by the names under which they are served; where there are any, tables of other names are
                not served.
            options: attributes of this class; None is not given.

        Raises:
            InputError: the file cannot be read, a name in it is not known, or a value is of a wrong type.
        """
        where = "the command line" if path is None else str(path)
        table = {} if path is None else read_toml(path)
        limits = from_table(Limits, typed(table.pop("limits", {}), Mapping[str, Any], "limits"), f"[limits] of {where}")
        tables = table.pop("models", {})
        if not isinstance(tables, dict) or not all(isinstance(own, dict) for own in tables.values()):
            raise InputError(f"{where} has models that are no tables; write [models.NAME] and bundle = …")
        chosen = {name: {**tables.get(name, {}), "bundle": bundle} for name, bundle in models.items()} or tables
        given = {name: value for name, value in options.items() if value is not None}
        found = {
            name: from_table(ModelConfig, own, f"[models.{name}] of {where}", bundle=name)
            for name, own in chosen.items()
        }
        return from_table(cls, {**table, **given}, where, models=found, limits=limits)

    @property
    def bounds(self) -> Bounds:
        """How much is accepted."""
        return Bounds(
            max_running=self.max_running,
            max_queue=self.max_queue,
            max_seconds=self.max_seconds,
            hang_seconds=self.hang_seconds,
        )

    def settings(self) -> Settings:
        """What the HTTP side is told; the files of keys are read.

        Raises:
            InputError: one cannot be read, or has a line that is no key.
        """
        keys, admin_keys = (
            () if path is None else read_keys(path) for path in (self.api_key_file, self.admin_key_file)
        )
        access = Access(keys=keys, admin_keys=admin_keys, hosts=self.hosts, origins=self.origins, proxies=self.proxies)
        return Settings(limits=self.limits, access=access, log_prompts=self.log_prompts)

    def served(self) -> dict[str, Served]:
        """The models, see :meth:`ModelConfig.served`."""
        return {name: model.served(name, self.backend) for name, model in self.whole_models.items()}

    @property
    def whole_models(self) -> dict[str, ModelConfig]:
        """The models with what they have of all of them."""
        return {
            name: dataclasses.replace(
                own,
                controls={**self.controls, **own.controls},
                safety_checker=self.safety_checker or own.safety_checker,
                output_filter=own.output_filter or self.output_filter,
            )
            for name, own in self.models.items()
        }


def from_table(kind: type[T], table: Mapping[str, Any], where: str, **more: Any) -> T:
    """A frozen dataclass from a table of plain values, as TOML or a command line has them.

    Args:
        kind: the class.
        table: values by its fields' names; ``-`` in a name is ``_``.
        where: the table is, for messages.
        more: fields that the table does not have to name; what is in it wins.

    Raises:
        InputError: a name is not known, or a value is of another type than its field.
    """
    assert dataclasses.is_dataclass(kind)
    fields = [field.name for field in dataclasses.fields(kind) if field.init]
    values = {name.replace("-", "_"): value for name, value in table.items()}
    unknown = sorted(values.keys() - set(fields))
    if unknown:
        names = ", ".join(quoted(name)[1:-1] for name in unknown[:8])
        raise InputError(f"{where} has unknown settings: {names}; valid: {', '.join(sorted(fields))}")
    hints = typing.get_type_hints(kind)
    read = {name: typed(value, hints[name], f"{name} in {where}") for name, value in values.items()}
    return kind(**{**more, **read})


def typed(value: Any, hint: Any, where: str) -> Any:
    """``value`` as a field of that type has it: lists become tuples, texts paths, whole numbers floats.

    Raises:
        InputError: it is of another type.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return value if value is None else typed(value, next(own for own in arguments if own is not type(None)), where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise InputError(f"{where} is {quoted(value)}, no list; write [ … ]")
        return tuple(typed(own, arguments[0], where) for own in value)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise InputError(f"{where} is {quoted(value)}, no table")
        return {name: typed(own, arguments[1], f"{name} of {where}") for name, own in value.items()}
    if hint not in KINDS:
        return value
    wanted = {float: int | float, Path: str | Path}.get(hint, hint)
    if not isinstance(value, wanted) or (isinstance(value, bool) and hint is not bool):
        raise InputError(f"{where} is {quoted(value)}; give {KINDS[hint]}")
    return hint(value)


def size_of(text: str) -> Size:
    """Width and height of ``512x768``; raises InputError where it is no such text, or a side that none has."""
    found = re.fullmatch("([0-9]{1,5})x([0-9]{1,5})", text)
    if found is None or not all(1 <= int(side) <= MAX_SIZE for side in found.groups()):
        raise InputError(
            f"the size {quoted(text)} is none; write WIDTHxHEIGHT in pixels from 1 to {MAX_SIZE}, such as 512x512"
        )
    return int(found[1]), int(found[2])


def model_names(arguments: Sequence[str], what: str = "model") -> dict[str, str]:
    """Bundles by name, of ``NAME=BUNDLE`` or ``BUNDLE``, whose name is its folder's; ``what`` they are, for messages.

    Raises:
        InputError: two have one name.
    """
    found: dict[str, str] = {}
    for text in arguments:
        name, equals, bundle = text.partition("=")
        if not equals:
            name, bundle = Path(text).resolve().name if Path(text).exists() else Path(text).name, text
        if not name or not bundle:
            raise InputError(f"{quoted(text)} is no {what}; write NAME=BUNDLE, or a bundle alone")
        if name in found:
            raise InputError(f"two {what}s have the name {name}; give them others: NAME={bundle}")
        found[name] = bundle
    return found


def _is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
