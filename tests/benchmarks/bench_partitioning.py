"""What our partitions cost beside torch's: ``python -m tests.benchmarks.bench_partitioning``. Two processes.

A step of 1F1B by our pipeline may take at most 1.5 times as long as by ``torch.distributed.pipelining``, the two taking
turns on the same stages. All plans for 3,072 workers must be found in a fifth of a second, for a widget to use them.
Beside these, without a target: how a step grows shorter with more micro-batches, and how each way to share a job does
against its prediction.
"""

from __future__ import annotations

import sys
import time

from course_lib import parallel
from course_lib import partitioning as pt

SLOWER = 1.5
SECONDS = 0.2
PROCESSES = 2


def main() -> int:
    """Print one line a ratio; return how many targets were missed."""
    engines = parallel.launch(pt.measure_engines, PROCESSES, timeout=300)[0]
    ratio = engines["ours"] / engines["torch"]
    verdict = "ok" if ratio <= SLOWER else "TOO SLOW"
    times = f"{engines['ours'] * 1e3:.1f} ms against {engines['torch'] * 1e3:.1f} ms"
    print(f"a step of 1F1B: {ratio:.2f}x of torch's engine (target <= {SLOWER}x) {verdict}  {times}")

    largest = pt.PUBLISHED[9]
    pt.plans(largest.job, largest.cluster, largest.batch)
    started = time.perf_counter()
    found = pt.plans(largest.job, largest.cluster, largest.batch)
    seconds = time.perf_counter() - started
    fast = "ok" if seconds <= SECONDS else "TOO SLOW"
    print(f"{len(found)} plans for {largest.cluster.workers} workers: {seconds:.2f} s (target <= {SECONDS} s) {fast}")

    steps = parallel.launch(pt.measure_pipeline, PROCESSES, timeout=300)[0]
    alone = steps.pop(0)
    for m, spent in steps.items():
        said = 1 - pt.bubble_formula("one_f_one_b", PROCESSES, m)
        print(f"  {m} micro-batches: {alone / spent:.2f}x as fast as one process (without other costs {2 * said:.2f}x)")

    for name, job in (("wide", pt.Job(8, 512)), ("narrow", pt.Job(256, 64))):
        rows = parallel.launch(pt.measure_partitions, PROCESSES, [job], timeout=300)[0]
        alone = rows[0]["seconds"]
        ratios = ", ".join(f"{row['way']} {alone / row['seconds']:.2f}x" for row in rows[1:])
        print(f"  {name} (width {job.width}, {job.batch} images): {ratios}")
    return (ratio > SLOWER) + (seconds > SECONDS)


if __name__ == "__main__":
    sys.exit(main())
