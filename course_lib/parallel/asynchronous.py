"""Training without waiting: what stale gradients do, simulated and for real.

====================  =====================================================  ==========================================
name                  what it does                                           source
====================  =====================================================  ==========================================
stale_gradients       SGD with gradients that are some steps old,            the delay of a parameter server's workers:
                      simulated                                              Dean et al., NeurIPS 2012
staleness_aware       the learning rate divided by the staleness             Zhang et al. 2015, arXiv:1511.05950
largest_stable_rate   the learning rate beyond which a delay diverges        Levin & May, Theor. Popul. Biol. 9, 1976
hogwild               processes write to one network without any lock        Recht et al. 2011, arXiv:1106.5730
====================  =====================================================  ==========================================

``stale_gradients`` gives the same result every time. ``hogwild`` does not: the operating system decides who writes
when.
"""

from __future__ import annotations

import math
from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from course_lib.lab.arguments import at_least
from course_lib.lab.data import Dataset, batches
from course_lib.lab.training import evaluate
from course_lib.parallel.launching import launch, process_group

# --- Simulated staleness ----------------------------------------------------------------------------------------------


def staleness_aware(lr: float, delay: int) -> float:
    r"""The learning rate for a gradient ``delay`` steps old: :math:`\eta / \max(1, \tau)`.

    Source: Zhang, Gupta, Lian & Liu 2015, arXiv:1511.05950.
    """
    _check_delay(delay)
    return lr / max(1, delay)


def largest_stable_rate(curvature: float, delay: int) -> float:
    r"""The learning rate up to which descent on a parabola of this curvature settles, its gradients ``delay`` old.

    .. math:: \eta_{\max} = \frac{2}{h}\,\sin\frac{\pi}{2(2\tau + 1)}

    for :math:`x_{t+1} = x_t - \eta h\,x_{t-\tau}`: the usual :math:`2/h` without delay, half of that with a delay of
    1, about :math:`\pi / (2 h \tau)` with a long one. Source: Levin & May, Theor. Popul. Biol. 9, 1976.
    """
    _check_delay(delay)
    if not 0 < curvature < math.inf:
        raise ValueError(f"curvature={curvature!r}: must be a positive number")
    return 2 / curvature * math.sin(math.pi / (2 * (2 * delay + 1)))


def stale_gradients(
    model: nn.Module,
    data: Dataset,
    *,
    delay: int,
    epochs: int = 6,
    batch_size: int = 100,
    lr: float = 0.05,
    momentum: float = 0.9,
    seed: int,
) -> list[float]:
    r"""Train ``model`` in place by gradients computed ``delay`` steps ago; return validation accuracy after each epoch.

    .. math:: v \leftarrow \mu v + \nabla L_t(\theta_{t-\tau}), \qquad \theta_{t+1} = \theta_t - \eta v

    with delay :math:`\tau` and :math:`L_t` the loss of step t's batch. N workers that each fetch the weights, compute,
    and hand in their gradient in turn make a delay of N - 1. All of them start from the first weights, so early steps
    look back no further than that. A delay of 0 is SGD; the order of the examples is that of
    ``course_lib.lab.training.fit``. A run that diverges goes on, and its accuracy shows it.

    Raises
    ------
    ValueError : a setting out of range.
    """
    _check(epochs, batch_size, lr, momentum)
    _check_delay(delay)
    parameters = list(model.parameters())
    data = data.to(parameters[0].device)
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=momentum)
    past: deque[list[Tensor]] = deque(maxlen=delay + 1)  # weights of the last steps, oldest first
    curve = []
    for epoch in range(1, epochs + 1):
        order = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        model.train()
        for x, y in batches(data.train, batch_size, generator=order, dtype=parameters[0].dtype):
            newest = [p.detach().clone() for p in parameters]
            past.append(newest)
            _set(parameters, past[0])
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            _set(parameters, newest)
            optimizer.step()
        curve.append(evaluate(model, data.val).accuracy)
    return curve


@torch.no_grad()
def _set(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


# --- Hogwild: real processes, one memory ------------------------------------------------------------------------------


def hogwild(
    model: nn.Module,
    data: Dataset,
    *,
    workers: int = 2,
    epochs: int = 6,
    batch_size: int = 100,
    lr: float = 0.05,
    momentum: float = 0.0,
    seed: int,
) -> float:
    """Train ``model`` in place by processes that read and write its weights without any lock; return val accuracy.

    In each epoch every process takes its share of the examples and steps whenever it is ready, on weights that the
    others change under its hands; together they take as many steps as one process would. A process keeps its own
    momentum. **Not reproducible**, even with the same seed.

    Raises
    ------
    ValueError : a setting out of range, a model that does not lie on the CPU, or one with buffers.
    """
    _check(epochs, batch_size, lr, momentum)
    at_least(1, workers=workers)
    if any(True for _ in model.buffers()):
        raise ValueError("model has buffers (batch norm's?), which the processes do not share: use one without")
    flat = parameters_to_vector(model.parameters()).detach()
    if flat.device.type != "cpu":
        raise ValueError(f"model lies on {flat.device}: processes share the memory of the CPU only")
    shared = flat.clone().share_memory_()
    settings = (epochs, batch_size, lr, momentum, seed)
    launch(hogwild_worker, workers, shared, model, data.to("cpu"), *settings, timeout=600)
    vector_to_parameters(shared.clone(), model.parameters())
    return evaluate(model, data.val).accuracy


def hogwild_worker(
    shared: Tensor, model: nn.Module, data: Dataset, epochs: int, batch_size: int, lr: float, momentum: float, seed: int
) -> None:
    """What each process of ``hogwild`` runs: ordinary SGD, on weights [n] that happen to be everyone's."""
    vector_to_parameters(shared, model.parameters())  # each parameter is now a window on the shared memory
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    with process_group() as world:
        dist.barrier()  # all begin together; a step takes less time than a process needs to start
        for epoch in range(1, epochs + 1):
            order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
            mine = data.train.subset(order[world.rank :: world.size])
            for x, y in batches(mine, batch_size, dtype=shared.dtype):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()


# --- Checks at the door -----------------------------------------------------------------------------------------------


def _check(epochs: int, batch_size: int, lr: float, momentum: float) -> None:
    at_least(1, epochs=epochs, batch_size=batch_size)
    if not 0 < lr < math.inf:
        raise ValueError(f"lr={lr!r}: must be a positive number")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum!r}: must be at least 0 and below 1")


def _check_delay(delay: int) -> None:
    if isinstance(delay, bool) or not isinstance(delay, int) or delay < 0:
        raise ValueError(f"delay={delay!r}: must be a whole number of steps, 0 or more")
