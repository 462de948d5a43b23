r"""Data that stay where they are: clients train the network, a server averages what comes back.

==========================  ==============================================  ===========================================
name                        what it does                                    source
==========================  ==============================================  ===========================================
``split_evenly``            clients with like shares of every class         –
``split_by_dirichlet``      clients with classes of their own, the more     Hsu, Qi & Brown 2019, arXiv:1909.06335
                            so the smaller alpha
``federated_averaging``     rounds of local training and averaging          McMahan et al. 2016 (FedAvg),
                                                                            arXiv:1602.05629
``proximal``                an objective that holds the weights near the    Li et al. 2018 (FedProx), arXiv:1812.06127
                            server's
==========================  ==============================================  ===========================================

With one local step on all of a client's examples a round is one step of gradient descent on the data of all clients.
More local steps save communication, and let clients with other data run apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from course_lib.lab.arguments import at_least, is_number, require
from course_lib.lab.data import Dataset
from course_lib.lab.training import Inputs, Objective, Recipe, cross_entropy, evaluate, fit, fresh
from course_lib.merging.averaging import average
from course_lib.merging.states import State, check_not_negative, check_positive, parameters_of, state_of

MOST_SEEDS = 4_000
"""Local runs take seeds below this: ``fit`` makes one of each seed and epoch, in 32 bits."""

# --- Clients ----------------------------------------------------------------------------------------------------------


def split_evenly(data: Dataset, clients: int, *, generator: torch.Generator) -> list[Dataset]:
    """Return a data set for each client: a share of the training split with every class in proportion.

    All together they are the training split, each example once; sizes differ by one at most. Validation and test split
    are shared.

    Raises
    ------
    ValueError : ``clients`` is not from 1 to the number of training examples.
    """
    labels = _checked_clients(data, clients)
    # sorted by class, at random within one: every client-th example is a share of each class
    shuffled = torch.randperm(len(labels), generator=generator)
    order = shuffled[torch.argsort(labels[shuffled], stable=True)]
    return [_client(data, order[client::clients]) for client in range(clients)]


def split_by_dirichlet(data: Dataset, clients: int, alpha: float, *, generator: torch.Generator) -> list[Dataset]:
    r"""Return a data set for each client, its classes in the proportions :math:`q\sim\text{Dir}(\alpha p)`.

    p are the shares of the classes in the training split: a large ``alpha`` gives every client these, a small one a
    class or two. Of K balanced classes ``alpha=K`` draws q uniformly from all proportions that there are. Each client
    draws its examples without replacement, class by class; where a class is used up, from the others in their
    proportions. All together they are the training split; sizes differ by one at most.

    Raises
    ------
    ValueError : ``clients`` is not from 1 to the number of training examples, or ``alpha`` not above 0.
    """
    check_positive(alpha=alpha)
    labels = _checked_clients(data, clients)
    # numpy draws from the Dirichlet distribution, seeded by torch's generator
    drawing = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
    present, counts = labels.unique(return_counts=True)
    prior = (counts / counts.sum()).double().numpy()
    left = [drawing.permutation((labels == label).nonzero().flatten().numpy()).tolist() for label in present]
    sizes = [len(labels) // clients + (client < len(labels) % clients) for client in range(clients)]
    shared = []
    for size in sizes:
        q, chosen = drawing.dirichlet(alpha * prior), list[int]()
        while len(chosen) < size:  # what was drawn of a class that is used up is drawn again
            chances = np.where([bool(each) for each in left], q + 1e-300, 0.0)
            for label in drawing.choice(len(left), size - len(chosen), p=chances / chances.sum()):
                if left[label]:
                    chosen.append(left[label].pop())
        shared.append(_client(data, torch.tensor(chosen)))
    return shared


def _checked_clients(data: Dataset, clients: int) -> Tensor:
    count = len(data.train)
    require("clients", clients, lambda n: isinstance(n, int) and 1 <= n <= count, f"a whole number from 1 to {count}")
    return data.train.labels.cpu()


def _client(data: Dataset, indices: Tensor) -> Dataset:
    return replace(data, train=data.train.subset(indices))


# --- FedProx ----------------------------------------------------------------------------------------------------------


def proximal(
    model: nn.Module,
    x: Inputs,
    y: Tensor,
    *,
    anchor: Mapping[str, Tensor],
    strength: float,
    objective: Objective = cross_entropy,
) -> Tensor:
    r"""Return the objective and :math:`\tfrac\mu2\|\theta-\theta^\text{server}\|^2`; :math:`\mu` is ``strength``.

    ``anchor`` are the server's weights by name, as ``parameters_of(network)`` gives them.

    Raises
    ------
    ValueError : ``strength`` is negative, or the anchor lacks a weight.
    """
    check_not_negative(strength=strength)
    own = dict(model.named_parameters())
    if lacking := sorted(own.keys() - anchor.keys()):
        raise ValueError(f"anchor lacks {lacking[0]!r}: must have each of the model's weights")
    apart = torch.stack([(value - anchor[name].to(value)).square().sum() for name, value in own.items()]).sum()
    return objective(model, x, y) + strength / 2 * apart


# --- Rounds -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Federation:
    """The server's ``network`` after the last round, and a row a round.

    The columns are ``round`` (from 1), ``val_loss``, ``val_accuracy``, ``clients`` (how many took part), ``examples``
    (seen by all since the start) and ``bytes`` (sent since the start, both ways).
    """

    network: nn.Module
    rows: list[dict[str, float]] = field(default_factory=list)

    def frame(self) -> pd.DataFrame:
        """The rounds as a table, indexed by their number."""
        return pd.DataFrame(self.rows).set_index("round")


def federated_averaging(
    factory: Callable[[], nn.Module],
    clients: Sequence[Dataset],
    recipe: Recipe,
    rounds: int,
    *,
    seed: int,
    fraction: float = 1.0,
    strength: float = 0.0,
) -> Federation:
    r"""Train a network on data that stay with their clients: :math:`\theta\leftarrow\sum_k\frac{n_k}n\,\theta_k`.

    In each round ``fraction`` of the clients, drawn anew, train the server's network by the recipe, whose epochs are
    the local ones and whose optimizer begins anew; the server averages weights and statistics by their numbers of
    examples. A ``strength`` above 0 adds the ``proximal`` term to the objective. The first weights are those of
    ``seed``. Measured on the first client's validation split.

    Raises
    ------
    ValueError : there are no clients, ``rounds`` is below 1, ``fraction`` not above 0 and at most 1, ``strength``
        negative.
    """
    require("clients", list(clients), bool, "at least one data set")
    at_least(1, rounds=rounds)
    require("fraction", fraction, lambda f: is_number(f) and 0 < f <= 1, "a number above 0 and at most 1")
    check_not_negative(strength=strength)
    generator = torch.Generator().manual_seed(seed)
    server = fresh(factory, recipe, seed=seed)
    result, sent, seen = Federation(server), 0, 0
    taking_part = max(1, round(fraction * len(clients)))
    for number in range(1, rounds + 1):
        chosen = torch.randperm(len(clients), generator=generator)[:taking_part].tolist()
        seeds = torch.randperm(MOST_SEEDS, generator=generator)[:taking_part].tolist()
        local = _local_recipe(recipe, parameters_of(server), strength)
        trained = []
        for client, of_client in zip(chosen, seeds, strict=True):
            trained.append(copy.deepcopy(server))
            seen += int(fit(trained[-1], clients[client], local, seed=of_client)["examples"][-1])
        sizes = [len(clients[client].train) for client in chosen]
        server = average(trained, [size / sum(sizes) for size in sizes])
        sent += 2 * taking_part * sum(value.numel() * value.element_size() for value in state_of(server).values())
        found = evaluate(server, clients[0].val)
        row = {"round": number, "val_loss": found.loss, "val_accuracy": found.accuracy}
        result.rows.append(row | {"clients": taking_part, "examples": seen, "bytes": sent})
    return replace(result, network=server)


def _local_recipe(recipe: Recipe, server: State, strength: float) -> Recipe:
    """The recipe of one round: near the server's weights, and measured only where it asks for that."""
    found = recipe if recipe.stop or recipe.keep else replace(recipe, validate_every=recipe.epochs)
    if strength == 0:
        return found
    held = {name: value.clone() for name, value in server.items()}
    return replace(found, objective=partial(proximal, anchor=held, strength=strength, objective=recipe.objective))
