"""What our messages cost beside torch's own, between two processes of this machine.

Run ``python -m tests.benchmarks.bench_parallel``. The all-reduces have no target: ours are there to be read, and are
built from Python. A gradient with bucketing and overlap must take at most 1.5 times as long as one of torch's
``DistributedDataParallel``, the two taking turns on the same network.
"""

from __future__ import annotations

import os
import sys
import time

from course_lib.parallel import launch, measure_collectives, measure_overlap

TARGET = 1.5
PROCESSES = 2
MEGABYTE = 10**6


def main() -> int:
    """Print one line a ratio; return how many targets were missed."""
    rounds = int(os.environ.get("BENCH_ROUNDS", 15))
    for which in ("first", "second"):
        started = time.perf_counter()
        launch(os.getpid, PROCESSES)
        print(f"the {which} launch of {PROCESSES} processes: {time.perf_counter() - started:.2f} s")

    print(f"\nall-reduce, {PROCESSES} processes")
    rows = launch(measure_collectives, PROCESSES, [MEGABYTE, 10 * MEGABYTE], rounds, timeout=300)[0]
    seconds = {(row["bytes"], row["algorithm"]): row["seconds"] for row in rows}
    for (size, name), ours in seconds.items():
        if name != "torch":
            theirs = seconds[size, "torch"]
            figures = f"{ours / theirs:.2f}x of dist.all_reduce"
            times = f"{ours * 1e3:8.2f} ms against {theirs * 1e3:8.2f} ms"
            print(f"  {name}, {size // MEGABYTE:2} MB:  {figures:50}  {times}")

    print(f"\none gradient, {PROCESSES} processes, a perceptron of 4 layers of 1024 units")
    step = launch(measure_overlap, PROCESSES, rounds=rounds, timeout=300)[0]
    theirs = step["DistributedDataParallel"]
    for name in ("one by one", "in buckets", "overlapped"):
        ratio = step[name] / theirs
        verdict = f" (target <= {TARGET}x) {'ok' if ratio <= TARGET else 'TOO SLOW'}" if name == "overlapped" else ""
        figures = f"{ratio:.2f}x of DistributedDataParallel{verdict}"
        print(f"  {name + ':':12} {figures:57}  {step[name] * 1e3:8.2f} ms against {theirs * 1e3:8.2f} ms")
    return int(step["overlapped"] / theirs > TARGET)


if __name__ == "__main__":
    sys.exit(main())
