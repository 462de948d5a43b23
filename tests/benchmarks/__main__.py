"""Run the benchmarks one after another: ``python -m tests.benchmarks``, or only some: ``… tests.benchmarks training``.

Each ``bench_NAME.py`` has a ``main()`` that prints its ratios beside their targets and returns how many were missed
(or None). They run one at a time, each in a process of its own, so that none disturbs another.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
_CRASHED = 101
_CALL = f"""
import importlib, sys, traceback
try:
    missed = importlib.import_module(sys.argv[1]).main() or 0
except Exception:
    traceback.print_exc()
    sys.exit({_CRASHED})
sys.exit(min(missed, {_CRASHED - 1}))
"""


def main(arguments: list[str] | None = None) -> int:
    """Run what was named, or all; the exit status says whether a target was missed."""
    there = {path.stem.removeprefix("bench_"): path for path in sorted(FOLDER.glob("bench_*.py"))}
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="Speed, as ratios.")
    parser.add_argument("name", nargs="*", help=f"one of: {', '.join(there) or 'none yet'}; all by default")
    names = parser.parse_args(arguments).name or list(there)
    if unknown := sorted(set(names) - set(there)):
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are: {', '.join(there) or 'none yet'}")
    missed = {name: run(name) for name in names}
    bad = [f"{name} ({'crashed' if count == _CRASHED else count})" for name, count in missed.items() if count]
    print(f"\nmissed: {', '.join(bad)}" if bad else f"\nall targets met by {len(missed)} benchmarks")
    return int(bool(bad))


def run(name: str) -> int:
    """Run one benchmark; how many of its targets were missed, or 101 when it crashed."""
    print(f"\n== {name} ==", flush=True)
    started = time.perf_counter()
    module = f"tests.benchmarks.bench_{name}"
    status = subprocess.run([sys.executable, "-c", _CALL, module], cwd=FOLDER.parents[1], check=False).returncode
    print(f"({time.perf_counter() - started:.0f} s)", flush=True)
    return status if status >= 0 else _CRASHED


if __name__ == "__main__":
    sys.exit(main())
