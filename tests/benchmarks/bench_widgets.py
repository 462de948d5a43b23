"""How long an explorer takes to redraw after a control was turned; the course's target is 200 ms.

python tests/benchmarks/bench_widgets.py
"""

import time

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np

from course_lib.lab.timing import measure
from course_lib.lab.widgets import explorer, slider

TARGET = 0.2


def draw(frequency: float) -> plt.Figure:
    """Three labelled curves, as in a chapter."""
    figure, axes = plt.subplots()
    x = np.linspace(0, 1, 200)
    for harmonic in (1, 2, 3):
        axes.plot(x, np.sin(frequency * harmonic * x), label=f"harmonic {harmonic}")
    axes.set(title="harmonics", xlabel="time (s)", ylabel="amplitude")
    axes.legend()
    return figure


def main() -> None:
    show = explorer(draw, frequency=slider("frequency", 1.0, 20.0, 5.0, 0.1))
    control = show.widget.children[0].children[0]
    steps = iter(np.linspace(1, 20, 1000))

    def turn() -> None:
        control.value = float(next(steps))

    processor = measure(turn, warmup=5, repeats=30, device="cpu", clock=time.process_time)
    redraw = measure(turn, warmup=0, repeats=30, device="cpu")
    verdict = "within" if redraw.median < TARGET else "OVER"
    print(f"explorer redraw: {redraw}; {verdict} the target of {TARGET * 1e3:.0f} ms")
    print(f"  of processor time (which other programs disturb less): {processor}")


if __name__ == "__main__":
    main()
