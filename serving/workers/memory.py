"""Memory: what there is, what a process takes of it, and what a model and a picture will take before they do."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path

from calotype.runtime.bundle.folder import Bundle
from calotype.runtime.diagnostics.memory import most, needs
from calotype.runtime.errors import CalotypeError

KIB = 1024
DOUBT = 1.5  # a picture larger than any that was measured may take so many times what it is predicted to


@dataclasses.dataclass(frozen=True, kw_only=True)
class Footprint:
    """What pictures of a model take of the machine's memory while they are drawn, by their pixels.

    Activations grow with the pixels, and those of attention with their square; so bytes a pixel lie on a line, which is
    drawn through the two largest sizes that were measured.

    Attributes:
        points: pixels and bytes of pictures that were measured; none is nothing known.
    """

    points: Sequence[tuple[int, int]] = ()

    def bytes_of(self, pixels: int) -> int:
        """What a picture of so many pixels takes; 0 where nothing is known, and never less than a smaller one."""
        known = sorted({own: taken for own, taken in self.points if own > 0}.items())
        if not known:
            return 0
        if pixels <= known[-1][0]:
            return next(taken for own, taken in known if pixels <= own)
        largest, taken = known[-1]
        each, slope = taken / largest, 0.0
        if len(known) > 1:
            smaller, less = known[-2]
            slope = max(0.0, (each - less / smaller) / (largest - smaller))
        return int(DOUBT * pixels * (each + slope * (pixels - largest)))

    def joined(self, other: Footprint) -> Footprint:
        """What both have measured; of a size that both have, what ``other`` has."""
        return Footprint(points=tuple({**dict(self.points), **dict(other.points)}.items()))


class Gauge:
    """What the parts of one thing take of this process's memory together, while others work between them.

    Attributes:
        most: bytes at their peak.
    """

    def __init__(self) -> None:
        self.most = self._kept = 0

    @contextlib.contextmanager
    def part(self) -> Iterator[None]:
        """Watch one part."""
        forget_peak()
        before, _ = resident()
        yield
        now, peak = resident()
        self.most = max(self.most, self._kept + peak - before)
        self._kept += now - before


def available(
    machine: Path = Path("/proc/meminfo"),
    processes: Path = Path("/proc/self/cgroup"),
    groups: Path = Path("/sys/fs/cgroup"),
) -> int | None:
    """Bytes that this machine, and the control group of this process, have left; None where that is not known."""
    found = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        found.append(_lines(machine)["MemAvailable"] * KIB)
    with contextlib.suppress(OSError, ValueError, KeyError):
        group = next(line for line in processes.read_text().splitlines() if line.startswith("0::"))[3:]
        for folder in (groups, groups / group.lstrip("/")):
            with contextlib.suppress(OSError, ValueError, KeyError):
                limit, taken = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
                found.append(limit - taken + _lines(folder / "memory.stat")["inactive_file"])
    return max(0, min(found)) if found else None


def resident() -> tuple[int, int]:
    """Bytes of the machine's memory that this process takes now, and at most since :func:`forget_peak`."""
    try:
        lines = _lines(Path("/proc/self/status"))
        return lines["VmRSS"] * KIB, lines["VmHWM"] * KIB
    except (OSError, KeyError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
        return peak, peak


def forget_peak() -> None:
    """Let the peak count from now on, where the system lets."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def model_bytes(bundle: Bundle, backend: str, *, low_memory: bool) -> int:
    """What opening a bundle takes, as ``calotype info`` predicts it; a CPU computes in twice the bytes of float16."""
    found = needs(bundle)
    widened = [
        dataclasses.replace(
            need, weights=2 * need.weights if need.precision == "float16" else need.weights, activations=None
        )
        for need in found
    ]
    return most(widened if backend == "cpu" else found, low_memory=low_memory)


def free_of_device(backend: str, device: int | None) -> int | None:
    """Bytes that are free where a backend keeps its models; None where that is not known."""
    if backend == "cpu":
        return available()
    from calotype.runtime.sessions.cuda import load_cuda

    try:
        return load_cuda(backend, device or 0).free_memory()
    except CalotypeError:  # opening the model says what is wrong
        return None


def _lines(path: Path) -> dict[str, int]:
    """The numbers of lines such as ``MemAvailable:  123 kB`` or ``inactive_file 123``."""
    found = {}
    for line in path.read_text().splitlines():
        label, *values = line.replace(":", " ").split()
        if values and values[0].isdecimal():
            found[label] = int(values[0])
    return found
