"""The small benchmarks: ``python -m benchmarks.micro`` lists them, ``python -m benchmarks.micro NAME`` runs one.

Results are printed as JSON; ``--write`` puts them among those of ``benchmarks/results``, in the place of what was
measured before on the same machine. ``--rounds 1`` and ``--every N`` make a first look shorter.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.machine import RESULTS, machine, origin, results, slug, write
from benchmarks.micro.harness import Options, Result, Row

PROGRAM = "python -m benchmarks.micro"
PACKAGES = ("numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx", "tensorrt-cu13", "torch")


class Benchmark(NamedTuple):
    """A line of the list: what is measured, how often by default, how long that takes, and the module that does it."""

    about: str
    rounds: int
    takes: str
    module: str = ""


BENCHMARKS = {
    "attention": Benchmark("attention as one ONNX node or in parts, on the CPU", 5, "half a minute"),
    "attention-gpu": Benchmark("forms of attention on a GPU", 20, "two minutes and a GPU", "attention_gpu"),
    "attention-plans": Benchmark(
        "memory of TensorRT-RTX's plans of them", 1, "a minute; no GPU is needed", "attention_plans"
    ),
    "caching": Benchmark("whole and shallow steps of SD 1.5's UNet", 5, "three minutes"),
    "convolutions": Benchmark("convolutions with fewer products", 7, "a minute"),
    "fusions": Benchmark("operators put together in a UNet on CUDA", 20, "four minutes and a GPU"),
    "growth": Benchmark("time by pixels, steps and pictures", 5, "two minutes on talbot"),
    "int8-operators": Benchmark("operators in int8", 5, "half a minute", "int8_operators"),
    "int8-step": Benchmark("a UNet's step in int8, and its memory", 5, "minutes; needs a bundle", "int8_step"),
    "limit": Benchmark("a network's operations a second beside a matrix product's", 5, "a minute on talbot"),
    "shortcuts": Benchmark("a step of SD 1.5's UNet with less attention", 5, "ten minutes"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """List, or measure and print."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if not given:
        print(listing())
        return
    name, *rest = given
    if name in ("-h", "--help"):
        print(f"{__doc__}\n{listing()}")
        return
    if name not in BENCHMARKS:
        sys.exit(f"there is no small benchmark {name!r}; valid: {', '.join(BENCHMARKS)}")
    module = importlib.import_module(f"benchmarks.micro.{BENCHMARKS[name].module or name}")
    own = options(name, module, rest)
    asked = Options(rounds=own.rounds, every=own.every, own=own)
    command = shlex.join([*PROGRAM.split(), name, *(word for word in rest if word != "--write")])
    report = {
        **origin(command),
        "machine": machine() | versions(),
        "measurement": name,
        "rounds": asked.rounds,
        "rows": [],
    }
    path, found = own.output, {}
    for result in measured(module, asked):
        found[result.title] = result.to_json()  # one that has grown takes the place of what it was
        report["rows"] = list(found.values())
        print(f"{result.title}: {json.dumps(result.forms)}", file=sys.stderr)
        report |= asked.about
        if own.write and path is None:
            path = place(name, report)
        if path is not None:
            write(path, report)  # after every row: a crash leaves what was measured before it
    print(json.dumps(report, indent=2) if path is None else path)


def options(name: str, module: Any, rest: Sequence[str]) -> argparse.Namespace:
    """The options of all benchmarks and those that ``module`` adds."""
    parser = argparse.ArgumentParser(prog=f"{PROGRAM} {name}", description=module.__doc__)
    parser.add_argument("--rounds", type=int, default=BENCHMARKS[name].rounds, help="default: %(default)s")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of the rows, every N-th; default: all")
    parser.add_argument("--write", action="store_true", help="put the results among those of benchmarks/results")
    parser.add_argument("--output", type=Path, metavar="FILE", help="put the results into FILE")
    if hasattr(module, "arguments"):
        module.arguments(parser)
    found = parser.parse_args(rest)
    if found.rounds < 1 or found.every < 1:
        parser.error("--rounds and --every are 1 or more")
    return found


def measured(module: Any, asked: Options) -> Iterator[Result]:
    """Every row, timed where it is not yet."""
    for row in module.rows(asked):
        yield row.timed(asked.rounds) if isinstance(row, Row) else row


def place(name: str, report: Mapping[str, Any]) -> Path:
    """The file of results: ``micro-growth-sd1-amd-epyc.json``, or with the GPU's name where one was used."""
    stem = "-".join(["micro", name, *([report["variant"]] if "variant" in report else [])])
    return RESULTS / f"{stem}-{slug(report['gpu']['name'])}.json" if "gpu" in report else results(stem)


def versions() -> dict[str, str]:
    """Those of the packages that are installed and matter."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def listing() -> str:
    """One line for each small benchmark."""
    lines = [f"  {name:<16} {item.about}; {item.takes}" for name, item in BENCHMARKS.items()]
    return "\n".join([f"{PROGRAM} NAME [--rounds N] [--every N] [--write]; NAME is one of", *lines])


if __name__ == "__main__":
    main()
