"""What the loop costs: ``fit`` against the same training by hand, ``python -m tests.benchmarks.bench_training``.

Both train the same networks on the digits with the same batches; the loop by hand does what such loops usually do (it
sums the losses on the device and evaluates after each epoch) and nothing else.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from course_lib.lab import Recipe, batches, compare_speed, convnet, device, fit, load, mlp
from course_lib.lab.data import Dataset

TARGET = 1.05
EPOCHS = 4


def by_hand(model: nn.Module, data: Dataset, epochs: int) -> list[tuple[float, float, float]]:
    """Train with SGD and momentum; (training loss, validation loss, validation accuracy) of each epoch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    found = []
    for epoch in range(epochs):
        order = torch.Generator().manual_seed(epoch)
        model.train()
        total = torch.zeros((), device=device())
        for x, y in batches(data.train, 64, generator=order):
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(y)
        model.eval()
        with torch.no_grad():
            x, y = next(batches(data.val, len(data.val)))
            logits = model(x)
            val_loss, right = F.cross_entropy(logits, y).item(), (logits.argmax(1) == y).sum().item()
        found.append((total.item() / len(data.train), val_loss, right / len(y)))
    return found


def main() -> int:
    """Prints the ratios; returns how many targets were missed."""
    data = load("digits").to(device())
    recipe = Recipe(epochs=EPOCHS, optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9))
    makers: dict[str, Callable[[], nn.Module]] = {
        "mlp": lambda: mlp(data.input_shape, 10),
        "convnet": lambda: convnet(data.input_shape, 10),
    }
    missed = 0
    for name, make in makers.items():
        ours, theirs = make().to(device()), make().to(device())
        speed = compare_speed(
            lambda: fit(ours, data, recipe, seed=0, progress=False),  # noqa: B023  called at once
            lambda: by_hand(theirs, data, EPOCHS),  # noqa: B023
            rounds=31 if name == "mlp" else 21,
        )
        ok = speed.ratio <= TARGET
        missed += not ok
        print(f"fit on the {name}: {speed.ratio:.3f}x of the loop by hand ({speed.low:.3f} to {speed.high:.3f}, "
              f"{speed.rounds} rounds; target <= {TARGET}) {'ok' if ok else 'MISSED'}")  # fmt: skip
    return missed


if __name__ == "__main__":
    raise SystemExit(main())
