"""`python -m benchmarks.race`: each method against the package that a user would pick instead."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.measure import Result, run
from benchmarks.models import SIZES
from benchmarks.parts import Part, parts
from benchmarks.races import RACES
from benchmarks.report import as_json, render


def main(arguments: list[str] | None = None) -> int:
    """Run the requested races; returns 1 if one is lost or fails, 0 if not."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    size = SIZES[options.model]
    results, measured, failed = list[Result](), list[Part](), list[str]()
    for name in options.methods:
        race = RACES[name]
        if race.installed:
            say(f"{name} against {race.peer} ...")
            with noting_failure(name, failed):
                results.append(run(name, race, size, options.steps, options.warm_up))
        else:
            print(f"{name}: skipped, {race.peer} is not installed (pip install '.[peers]')")
    for name, measure in parts(size, SIZES["small" if options.model == "100m" else "tiny"]).items():
        if name.partition(".")[0] in options.methods:
            say(f"{name} ...")
            with noting_failure(name, failed):
                measured.append(measure())
    settings = {name: getattr(options, name) for name in ("model", "steps", "warm_up", "threads")}
    print(render(results, measured, settings))
    if options.json:
        options.json.write_text(json.dumps(as_json(results, measured, settings), indent=1) + "\n")
    if failed:
        print(f"\nFailed: {', '.join(failed)}; see above for why")
    return int(bool(failed) or any(result.lost() for result in results) or not all(part.holds for part in measured))


@contextmanager
def noting_failure(name: str, failed: list[str]) -> Iterator[None]:
    """Whatever happens within this context, what was measured before, in many minutes, is still printed."""
    try:
        yield
    except Exception:
        traceback.print_exc()
        failed.append(name)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.race", description=__doc__)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(RACES)} (default: all)")
    parser.add_argument("--model", choices=SIZES, default="100m", help="a Llama of this size (default: 100m)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps on each side (default: 20)")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before them (default: 3)")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.methods if name not in RACES]
    if unknown:
        parser.error(f"unknown method {unknown[0]!r}; there are {', '.join(RACES)}")
    if options.steps < 1 or options.warm_up < 0 or options.threads < 1:
        parser.error("--steps and --threads must be at least 1, and --warm-up at least 0")
    options.methods = options.methods or list(RACES)
    return options


def say(text: str) -> None:
    """Print progress to stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
