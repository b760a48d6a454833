"""The process that serves: HTTP on one side, the dispatcher on the other, signals, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import uvicorn

from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.errors import BackendError, CalotypeError, InputError, OutputError
from calotype.runtime.sessions import choose_backend
from calotype.runtime.sessions.processor import usable_threads
from calotype.serving.app import create_app
from calotype.serving.config import ServeConfig
from calotype.serving.http.connections import connections
from calotype.serving.http.drawing import Front
from calotype.serving.workers.dispatcher import Dispatcher
from calotype.serving.workers.served import Served
from calotype.serving.workers.supervisor import COMMAND

CONNECTION_SECONDS = 5  # for answers that are being sent when everything is finished
BACKLOG = 2048
logger = logging.getLogger(__name__)


class Server:
    """A server that runs until it is told to stop.

    Args:
        read: reads the configuration, once at the beginning and whenever SIGHUP asks for it.
        announce: is told where it listens.
        command: what starts a worker.
    """

    def __init__(
        self,
        read: Callable[[], ServeConfig],
        announce: Callable[[str], None],
        *,
        command: Sequence[str] = COMMAND,
    ) -> None:
        self._read, self._announce, self._command = read, announce, command
        self.config = read()
        # What is wrong with a bundle or a key is said before anything is started.
        self._served, self._settings = self.config.served(), self.config.settings()
        self._failure: str | None = None
        self._stops = 0
        self._finishing: asyncio.Task[None] | None = None

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT; a second one does not wait for what is being drawn.

        Raises:
            OutputError: it cannot listen there.
            BackendError: a model cannot be opened.
        """
        with listening(self.config) as (listener, where):
            asyncio.run(self._run(listener, where))
        if self._failure is not None:
            raise BackendError(self._failure)

    async def _run(self, listener: socket.socket, where: str) -> None:
        config, loop = self.config, asyncio.get_running_loop()
        self.dispatcher = Dispatcher(
            self._served.values(),
            config.bounds,
            devices=config.devices or (None,) * config.workers,
            threads=_share(config),
            command=self._command,
        )
        self._front = Front(self.dispatcher, self._settings)
        self._http = Http(
            uvicorn.Config(
                create_app(self._front),
                http=connections(self._front),
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_graceful_shutdown=CONNECTION_SECONDS,
            )
        )
        for number, act in ((signal.SIGTERM, self._stop), (signal.SIGINT, self._stop), (signal.SIGHUP, self._reload)):
            loop.add_signal_handler(number, act)
        opening = asyncio.create_task(self._open())
        try:
            self._announce(where)
            await self._http.serve(sockets=[listener])
        finally:
            opening.cancel()
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)
            await self.dispatcher.stop()
            await asyncio.gather(opening, *filter(None, [self._finishing]), return_exceptions=True)

    async def _open(self) -> None:
        """Build what is to be built, start the workers, and end everything where a model cannot be opened."""
        try:
            if self.config.build:
                for model in self._served.values():
                    model.why = "its engines are being built"
                    await build(model)
                    model.why = ""
            self.dispatcher.start()
            await self.dispatcher.opened()
            for name, state in self.dispatcher.models.items():
                if failure := self.dispatcher.failure(name):
                    raise BackendError(f"{name} cannot be opened: {failure}")
                if state.ready:
                    logger.info("%s is ready", name)
        except CalotypeError as error:
            self._failure = str(error)
            self._http.should_exit = True

    def _stop(self) -> None:
        """Not ready at once; what is accepted is finished, once. Told again, nothing is waited for."""
        self._stops += 1
        if self._stops == 1:
            self.dispatcher.refuse()
            self._finishing = asyncio.create_task(self._finish())
        else:
            self._http.should_exit = self._http.force_exit = True

    async def _finish(self) -> None:
        await self.dispatcher.finish(self.config.stop_seconds)
        self._http.should_exit = True

    def _reload(self) -> None:
        """Take what the configuration says now, where it is sound: keys, limits, bounds and models."""
        try:
            config = self._read()
            served, settings = config.served(), config.settings()
        except (CalotypeError, OSError) as error:
            logger.error("the configuration stays as it was: %s", error)
            return
        before, self.config = self.config, config
        self.dispatcher.bounds, self._front.settings = config.bounds, settings
        for name in before.models.keys() - config.models.keys():
            self.dispatcher.unload(name)
        opened = before.whole_models
        for name, model in config.whole_models.items():
            if opened.get(name) != model or before.backend != config.backend:
                self.dispatcher.open(served[name])
        logger.info("the configuration was read again")


class Http(uvicorn.Server):
    """Uvicorn's server, whose signals are handled elsewhere."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them alone."""
        yield


@contextlib.contextmanager
def listening(config: ServeConfig) -> Iterator[tuple[socket.socket, str]]:
    """A socket at the address, or the socket file, of the configuration, and its URL.

    Raises:
        OutputError: it is taken, or there is no such address.
    """
    try:
        listener, where = _at_file(config.uds) if config.uds is not None else _at_address(config.host, config.port)
    except OSError as error:
        place = config.uds if config.uds is not None else f"{config.host}:{config.port}"
        way = "--uds" if config.uds is not None else "--host or --port"
        raise OutputError(f"{place} cannot be listened at: {error.strerror or error}; give another {way}") from None
    with listener:
        listener.listen(BACKLOG)  # whoever comes before the loop runs waits, and is not turned away
        try:
            yield listener, where
        finally:
            if config.uds is not None:
                config.uds.unlink(missing_ok=True)


def _at_address(host: str, port: int) -> tuple[socket.socket, str]:
    family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    name = f"[{host.strip('[]')}]" if family == socket.AF_INET6 else host
    return listener, f"http://{name}:{listener.getsockname()[1]}"


def _at_file(path: Path) -> tuple[socket.socket, str]:
    """A socket file that this user and its group may use; one that nobody listens at is replaced."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
            with socket.socket(socket.AF_UNIX) as other, contextlib.suppress(ConnectionRefusedError):
                other.connect(str(path))
                raise OSError(0, "another server listens there")
            path.unlink()
        before = os.umask(0o117)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
    except OSError:
        listener.close()
        raise
    return listener, f"unix:{path}"


async def build(model: Served) -> None:
    """Build the plans, or the engines, of a model as ``calotype build`` does, in a process of its own.

    What is built already is kept; a backend that takes no plans, as ONNX Runtime's CUDA, has nothing to build.

    Raises:
        InputError: it failed; its own line says why.
    """
    order = model.open
    bundle = Bundle.open(order.bundle, weights=False, sha256=order.sha256)
    backend = await asyncio.to_thread(choose_backend, order.backend, bundle.path)
    if backend == "cuda":
        return
    command = [sys.executable, "-P", "-m", "calotype", "build", str(order.bundle), "--backend", backend]
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    try:
        _, said = await process.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    if process.returncode:
        lines = said.decode(errors="replace").strip().splitlines()
        raise InputError(f"{model.name} cannot be built: {lines[-1] if lines else f'code {process.returncode}'}")


def _share(config: ServeConfig) -> int | None:
    """The threads of each worker: those there are, shared among them."""
    count = len(config.devices) or config.workers
    if config.threads is None and count == 1:
        return None
    return max(1, (usable_threads() if config.threads is None else config.threads) // count)
