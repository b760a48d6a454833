"""What the sessions of a process share on a GPU: one stream, one activation arena, one run at a time."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calotype.runtime.bundle.spec import TensorSpec
from calotype.runtime.sessions.cuda import Cuda, Pointer, load_cuda


class Device:
    """A GPU. Text encoder, UNet and VAE never run at once, so their activations lie in one arena.

    ``generation`` counts where the arena has lain: whoever holds its address compares it before using that. ``users``
    are the sessions that have it.
    """

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.gpu = cuda.gpu()
        self.lock = threading.RLock()
        self.stream = cuda.create_stream()
        self.arena: Pointer = 0
        self.generation = 0
        self.users = 0
        self._size = 0

    def grow(self, size: int) -> None:
        """Make the arena at least ``size`` bytes. When that fails there is none, and a smaller call makes its own.

        Raises:
            BackendError: the GPU has not got so much.
        """
        if size > self._size:
            with self.lock:
                self.cuda.synchronize(self.stream)
                self._drop()
                self.arena = self.cuda.malloc(size)
                self._size = size

    def close(self) -> None:
        """Give everything back."""
        self._drop()
        self.cuda.destroy_stream(self.stream)

    def _drop(self) -> None:
        self.generation += 1
        if self._size:
            pointer, self.arena, self._size = self.arena, 0, 0
            self.cuda.free(pointer)


_guard = threading.Lock()
_shared: dict[int, Device] = {}


def acquire(extra: str, number: int = 0) -> Device:
    """The process's device of that number, opened for the first who asks; each gives it back with :func:`release`.

    Raises:
        BackendError, MissingPackageError: see :func:`calotype.runtime.sessions.cuda.load_cuda`.
    """
    with _guard:
        if number not in _shared:
            _shared[number] = Device(load_cuda(extra, number))
        found = _shared[number]
        found.users += 1
        return found


def release(device: Device) -> None:
    """Give a device back; the last one closes it."""
    with _guard:
        device.users -= 1
        if device.users == 0:
            del _shared[device.cuda.number]
            device.close()


def _forget_parent() -> None:
    """In a forked child: what the parent had on its GPU cannot be used, nor given back."""
    global _guard
    _shared.clear()
    _guard = threading.Lock()


os.register_at_fork(after_in_child=_forget_parent)


class Staging:
    """Pinned host memory and GPU memory of tensors, side by side; ``counts`` are elements."""

    def __init__(self, device: Device, specs: Sequence[TensorSpec], counts: Mapping[str, int]) -> None:
        self._cuda, self._host, self._device = device.cuda, dict[str, Pointer](), dict[str, Pointer]()
        self._arrays: dict[str, NDArray[Any]] = {}
        try:
            for spec in specs:
                size = counts[spec.name] * np.dtype(spec.dtype).itemsize
                self._host[spec.name] = self._cuda.host_alloc(size)
                self._device[spec.name] = self._cuda.malloc(size)
                memory = (ctypes.c_byte * size).from_address(self._host[spec.name])
                self._arrays[spec.name] = np.frombuffer(memoryview(memory), np.dtype(spec.dtype))
                self._arrays[spec.name][:] = 0
        except BaseException:
            self.close()
            raise

    def view(self, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """The start of a tensor's host memory, in that shape."""
        return self._arrays[name][: int(np.prod(shape))].reshape(shape)

    def host(self, name: str) -> Pointer:
        """Where it lies on the host."""
        return self._host[name]

    def device(self, name: str) -> Pointer:
        """Where it lies on the GPU."""
        return self._device[name]

    def count(self, name: str) -> int:
        """Elements there is room for."""
        return self._arrays[name].size

    def close(self) -> None:
        """Give the memory back; views are void."""
        self._arrays.clear()
        while self._device:
            self._cuda.free(self._device.popitem()[1])
        while self._host:
            self._cuda.host_free(self._host.popitem()[1])
