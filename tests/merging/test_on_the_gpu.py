"""What no other test of the chapter takes to a GPU: the numbers of the CPU, from networks over there.

Data sets stay here, and so does now and then one of the networks; generators are on the CPU.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from course_lib import merging
from course_lib.lab.training import Recipe, evaluate, fit, logits_of
from tests.merging.small import Case, Move, batch, data, generator, network, normal, on_the_gpu_as_here, split

SHORT = Recipe(epochs=1, batch_size=40, precision="float64")
SMALL = data()
A, B = normal(6, seed=1), normal(6, seed=2)


def answer(model: nn.Module) -> Tensor:
    """What a network over there says of images that stay here."""
    return logits_of(model, SMALL.val)


def vectors(to: Move) -> list[merging.State]:
    return [merging.task_vector(to(network()), to(network(seed=seed))) for seed in (1, 2)]


def updated(to: Move) -> Any:
    found = []
    for update in (partial(merging.swa_update, n=2), partial(merging.ema_update, decay=0.9)):
        average = [to(A.clone()), to(B.clone())]
        update(average, [to(B), to(A)])
        found.append(average)
    return found


def followed(to: Move) -> Any:
    found = []
    for kind in (merging.SWA, partial(merging.EMA, decay=0.5, use_buffers=True)):
        model = to(kind(network("convnet").train()))
        fit(model, SMALL, merging.following(SHORT, model), seed=0)
        found.append((answer(merging.refresh_batch_norm(model.average, SMALL.train)), int(model.n_averaged)))
    return found


def soups(to: Move) -> Any:
    models = [to(network(seed=1)), network(seed=2)]  # the soup lies with the first
    greedy = merging.greedy_soup(models, lambda model: evaluate(model, SMALL.val).accuracy)
    return answer(merging.uniform_soup(models)), answer(greedy.network), greedy.ingredients, greedy.score


def mixed(to: Move) -> Any:
    """Of two networks one lies there and one here."""
    a, b = to(network()), network(seed=1)
    path = merging.loss_along(a, b, SMALL.val, 3)
    return [
        (path, merging.barrier(path), merging.instability(path)),
        *(answer(way(a, b, 0.3)) for way in (merging.interpolate, merging.slerp, merging.slerp_by_tensor)),
        answer(merging.permute(b, merging.match_weights(a, b, generator=generator()))),
        answer(merging.add(b, [merging.task_vector(b, a)], 0.5)),
    ]


def spanned(to: Move) -> Any:
    return merging.plane(to(network()), network(seed=1), to(network(seed=2)), SMALL.val, 2)


def branched(to: Move) -> Any:
    parts = merging.split_by_dirichlet(SMALL, 2, 1.0, generator=generator())
    made = merging.branch_train_merge(to(network()), parts, SHORT, seed=0)
    x = batch()
    beside = x.to(made.router.weight.device)
    return answer(made), answer(made.merged(beside)), made.shares(beside).cpu()


def grown(to: Move) -> Any:
    model = to(network())
    return answer(merging.stack(model, "hidden", 2)), answer(merging.deeper(model, "hidden.1", batch=batch()))


def near_the_server(to: Move) -> Tensor:
    """The anchor lies there or here."""
    model, x, y = to(network()), to(batch()), to(torch.zeros(6).long())
    anchors = [merging.parameters_of(each) for each in (network(seed=1), to(network(seed=1)))]
    return torch.stack([merging.proximal(model, x, y, anchor=anchor, strength=0.3) for anchor in anchors])


def balanced(to: Move) -> Any:
    model = merging.upcycle(to(network()), "hidden", 2, generator=generator(), top_k=1)
    x, y = to(batch()), to(torch.zeros(6).long())
    return merging.balanced(model, x, y), model(x)


def swapped(to: Move) -> Any:
    return [to(each)(to(torch.linspace(-2, 2, 5)[:, None].double())) for each in merging.swapped_units()]


CASES: dict[str, Case] = {
    "slerp_vectors": lambda to: merging.slerp_vectors(to(A), to(B), 0.3),
    "updates": updated,
    "negate": lambda to: merging.negate(vectors(to)[0]),
    "similarities": lambda to: merging.similarities(vectors(to)),
    "ties": lambda to: [merging.trim(vectors(to)[0], 0.3), merging.elect(vectors(to)), merging.ties(vectors(to), 0.3)],
    "dare": lambda to: merging.dare(vectors(to)[0], 0.5, generator=generator()),
    "empirical_fisher": lambda to: merging.empirical_fisher(to(network()), split(5)),
    "proximal": near_the_server,
    "balanced": balanced,
    "swapped_units": swapped,
    "weight_similarity": lambda to: merging.weight_similarity(to(network()), network(seed=1).to(to(A).dtype)),
}
WITH_A_DATA_SET: dict[str, Case] = {
    "following": followed,
    "soups": soups,
    "two places": mixed,
    "plane": spanned,
    "join": lambda to: answer(merging.join([to(network()), network(seed=1)])),
    "branch_train_merge": branched,
    "stack": grown,
    "expand": lambda to: answer(merging.expand(to(network("vit")), 2)),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_on_the_gpu_as_here(name: str, dtype: torch.dtype) -> None:
    on_the_gpu_as_here(CASES[name], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", WITH_A_DATA_SET)
def test_answers_lie_where_the_labels_do(name: str) -> None:
    on_the_gpu_as_here(WITH_A_DATA_SET[name], lies="cpu")


@pytest.mark.gpu
def test_data_that_lie_there_are_shared_out() -> None:
    for made in (
        merging.split_evenly(SMALL.to("cuda"), 2, generator=generator()),
        merging.split_by_dirichlet(SMALL.to("cuda"), 2, 1.0, generator=generator()),
    ):
        assert {part.train.labels.device.type for part in made} == {"cuda"}
        assert len(merging.united(made).train) == len(SMALL.train)
