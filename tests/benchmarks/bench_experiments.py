"""What comparisons on all cores gain: 30 runs of an MLP by two workers, against one after the other.

The workers start once (some seconds, given apart) and serve all later comparisons.
"""

import time
from dataclasses import replace
from functools import partial

import torch

from course_lib.lab import Recipe, compare, compare_speed, load, mlp
from course_lib.lab.runtime import usable_cores

TARGET = 1.7


def main() -> int:
    """Prints the ratio; returns how many targets were missed."""
    if usable_cores() < 2:
        print("comparisons on all cores: this machine has one, nothing to measure")
        return 0
    data = load("digits")
    base = Recipe(epochs=20, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9))
    arms = {f"batches of {size}": replace(base, batch_size=size) for size in (32, 40, 48, 56, 64, 72)}
    model = partial(mlp, data.input_shape, 10)

    def runs(workers: int) -> None:
        compare(arms, model=model, data=data, seeds=5, workers=workers, progress=False)

    started = time.perf_counter()
    compare({"nothing": float}, seeds=2, workers=2, progress=False)
    start_up = time.perf_counter() - started
    speed = compare_speed(lambda: runs(1), lambda: runs(2), rounds=5, warmup=1)
    ok = speed.ratio >= TARGET
    print(f"30 runs of an MLP by 2 workers: {speed.ratio:.2f}x as fast as one after the other ({speed.low:.2f} to "
          f"{speed.high:.2f}, {speed.rounds} rounds; target >= {TARGET}) {'ok' if ok else 'MISSED'}; the workers "
          f"started in {start_up:.1f} s, once")  # fmt: skip
    return int(not ok)


if __name__ == "__main__":
    raise SystemExit(main())
