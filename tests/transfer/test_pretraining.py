"""Tasks without labels: each loss written out, what trains and what rests, and the bare network afterwards."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Adam

from course_lib import transfer
from course_lib.lab.data import random_shift
from course_lib.lab.training import evaluate, fit
from tests.transfer.small import (
    EXACT,
    NAMES,
    batch,
    close,
    data,
    generator,
    gradients,
    moved,
    network,
    normal,
    untouched,
)

X, NONE = batch(), torch.full((6,), -100)
VIEW = partial(random_shift, pixels=1)
WRAPPERS: dict[str, Any] = {
    "rotation": transfer.WithRotations,
    "simclr": transfer.WithProjection,
    "byol": transfer.WithTarget,
    "masked_patches": partial(transfer.MaskedAutoencoder, width=8, heads=2),
}
OBJECTIVES: dict[str, Any] = {
    "rotation": transfer.rotation,
    "simclr": partial(transfer.simclr, view=VIEW),
    "byol": partial(transfer.byol, view=VIEW),
    "masked_patches": transfer.masked_patches,
}
FITTING = [(kind, name) for kind in WRAPPERS for name in NAMES if kind != "masked_patches" or name == "vit"]


@pytest.mark.parametrize(("kind", "name"), FITTING)
def test_a_run_trains_the_network_within_and_not_its_head(kind: str, name: str) -> None:
    plain = network(name)
    untouched(plain, lambda: WRAPPERS[kind](plain, generator=generator()))
    model = WRAPPERS[kind](network(name), generator=generator())
    close(model(X), plain(X), 0)
    own = {n for n, _ in plain.named_parameters() if not n.startswith("head.")}
    recipe = replace(EXACT, objective=OBJECTIVES[kind])
    fit(model, data(40), recipe, seed=0)
    found = transfer.bare(model)
    assert type(found) is type(plain)
    assert not {"head.weight", "head.bias"} & moved(plain, found)
    assert len(own - moved(plain, found)) <= len(own) // 4, "nearly all weights move"
    again = WRAPPERS[kind](network(name), generator=generator())
    fit(again, data(40), recipe, seed=0)
    assert not moved(model, again), "the same run gives the same weights"


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_labels_are_not_looked_at_and_the_task_is_learned(kind: str) -> None:
    model = WRAPPERS[kind](network("vit"), generator=generator())
    task = data(40)
    recipe = replace(EXACT, epochs=6, optimizer=partial(Adam, lr=3e-3), objective=OBJECTIVES[kind])
    torch.manual_seed(0)
    before = evaluate(model, task.train, objective=OBJECTIVES[kind]).loss
    fit(model, replace(task, train=replace(task.train, labels=0 * task.train.labels)), recipe, seed=0)
    torch.manual_seed(0)
    assert evaluate(model, task.train, objective=OBJECTIVES[kind]).loss < before


# --- Rotations --------------------------------------------------------------------------------------------------------


def test_images_are_turned_by_quarters() -> None:
    turned, quarters = transfer.rotations(X)
    assert turned.shape == (24, 1, 8, 8)
    for image, k, source in zip(turned, quarters.tolist(), [*X] * 4, strict=True):
        assert np.array_equal(image[0].numpy(), np.rot90(source[0].numpy(), k))


def test_the_loss_of_rotations() -> None:
    model: Any = transfer.WithRotations(network("convnet"), generator=generator())
    losses = [
        -model.turn(model.network.embedding(X.rot90(k, (2, 3)))).log_softmax(1)[:, k].mean() for k in range(4)
    ]  # fmt: skip
    close(transfer.rotation(model, X, NONE), torch.stack(losses).mean())


# --- Two views --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_nt_xent_is_its_sum(temperature: float) -> None:
    a, b = normal(5, 3), normal(5, 3, seed=1)
    views = [*a, *b]

    def alike(i: int, k: int) -> float:
        return math.exp(F.cosine_similarity(views[i], views[k], dim=0).item() / temperature)

    losses = [
        -math.log(alike(i, (i + 5) % 10) / sum(alike(i, k) for k in range(10) if k != i)) for i in range(10)
    ]  # fmt: skip
    assert transfer.nt_xent(a, b, temperature).item() == pytest.approx(sum(losses) / 10)
    close(transfer.nt_xent(3 * a, b, temperature), transfer.nt_xent(b, a, temperature))


def views_of(seed: int) -> tuple[Tensor, Tensor]:
    """The two views that an objective draws when torch's generator stands at a seed."""
    torch.manual_seed(seed)
    drawing = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
    return VIEW(X, drawing), VIEW(X, drawing)


def test_simclr_contrasts_projections_of_two_views() -> None:
    model: Any = transfer.WithProjection(network("convnet"), 5, generator=generator())
    one, two = views_of(3)
    assert not torch.equal(one, two)
    a, b = (model.projection(model.network.embedding(view)) for view in (one, two))
    torch.manual_seed(3)
    close(transfer.simclr(model, X, NONE, view=VIEW, temperature=0.3), transfer.nt_xent(a, b, 0.3))
    assert a.shape == (6, 5)


def test_byol_predicts_what_the_target_says_of_the_other_view() -> None:
    model: Any = transfer.WithTarget(network("convnet"), 5, 7, generator=generator()).eval()
    for parameter in model.target_network.parameters():
        parameter.data.mul_(1.1)
    one, two = views_of(3)
    expected = torch.zeros((), dtype=torch.float64)
    for mine, other in ((one, two), (two, one)):
        q = F.normalize(model.prediction(model.projection(model.network.embedding(mine))), dim=1)
        t = F.normalize(model.target_projection(model.target_network.embedding(other)), dim=1)
        expected = expected + (q - t.detach()).square().sum(1).mean()  # 2 - 2 cos
    torch.manual_seed(3)
    found = transfer.byol(model, X, NONE, view=VIEW)
    close(found, expected)
    slopes = gradients(found, model)
    assert not any(key.startswith("target") for key in slopes)
    for key, slope in gradients(expected, model).items():
        close(slopes[key], slope)


def test_the_target_is_a_moving_average() -> None:
    model: Any = transfer.WithTarget(network("convnet"), 5, 7, decay=0.8, generator=generator())
    first = copy.deepcopy(model)
    recipe = transfer.following_target(replace(EXACT, epochs=1, objective=OBJECTIVES["byol"]), model)
    fit(model, data(20), recipe, seed=0)  # one step
    for mine, start, now in (
        (model.target_network, first.network, model.network),
        (model.target_projection, first.projection, model.projection),
    ):
        for name, value in mine.named_parameters():
            expected = 0.8 * start.get_parameter(name) + 0.2 * now.get_parameter(name)
            close(value, expected.detach())
    assert "network.features.0.weight" in moved(first, model)


# --- Masks ------------------------------------------------------------------------------------------------------------


def test_patches_are_squares_row_by_row() -> None:
    x = normal(2, 3, 4, 6)
    found = transfer.patches(x, 2)
    assert found.shape == (2, 6, 12)
    for token in range(6):
        row, column = 2 * (token // 3), 2 * (token % 3)
        close(found[:, token], x[:, :, row : row + 2, column : column + 2].flatten(1), 0)


def autoencoder() -> Any:
    return transfer.MaskedAutoencoder(network("vit"), 8, heads=2, generator=generator())


def test_hidden_patches_are_not_seen() -> None:
    model = autoencoder()
    order = torch.rand(6, 16, generator=generator(2)).argsort(1)
    assert model.kept == 4
    painted = model.painted(X, order)
    assert painted.shape == (6, 16, 4)
    altered = transfer.patches(X, 2).clone()
    hidden = order[:, 4:, None].expand(-1, -1, 4)
    altered.scatter_(1, hidden, 99.0)
    close(model.painted(F.fold(altered.mT, (8, 8), 2, stride=2), order), painted, 0)
    altered = transfer.patches(X, 2).scatter(1, order[:, :4, None].expand(-1, -1, 4), 99.0)
    assert (model.painted(F.fold(altered.mT, (8, 8), 2, stride=2), order) - painted).abs().max() > 1e-3
    # in which order the seen ones come does not matter
    swapped = torch.cat([order[:, :4].flip(1), order[:, 4:]], 1)
    close(model.painted(X, swapped), painted)


def test_the_loss_is_of_hidden_patches_alone() -> None:
    model = autoencoder()
    torch.manual_seed(5)
    order = torch.rand(6, 16).argsort(1)
    torch.manual_seed(5)
    found = transfer.masked_patches(model, X, NONE)
    painted, true = model.painted(X, order), transfer.patches(X, 2)
    squares = [(painted[n, t] - true[n, t]).square().mean() for n in range(6) for t in order[n, 4:].tolist()]
    assert len(squares) == 6 * 12
    close(found, torch.stack(squares).mean())


def test_it_trains_under_autocast() -> None:
    model = autoencoder().float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = transfer.masked_patches(model, X.float(), NONE)
    loss.backward()
    assert all(p.grad is not None for p in model.network.blocks.parameters())


def test_the_encoder_works_on_what_is_seen() -> None:
    model, seen = autoencoder(), []
    model.network.blocks[0].register_forward_hook(lambda part, inputs, output: seen.append(output.shape))
    transfer.masked_patches(model, X, NONE)
    assert seen == [(6, 4, 8)]


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    model: Any = network("convnet")
    vit: Any = network("vit")
    draw = generator()
    cases: list[tuple[str, Any]] = [
        ("model=ConvNet: must be a network WithRotations", lambda: transfer.rotation(model, X, NONE)),
        ("model=ConvNet: must be a network WithProjection", lambda: transfer.simclr(model, X, NONE, view=VIEW)),
        ("model=ConvNet: must be a network WithTarget", lambda: transfer.byol(model, X, NONE, view=VIEW)),
        ("model=ViT: must be a network MaskedAutoencoder", lambda: transfer.masked_patches(vit, X, NONE)),
        ("x=[6, 1, 8, 4]: must be square", lambda: transfer.rotations(X[..., :4])),
        ("width=0: must be", lambda: transfer.WithProjection(model, 0, generator=draw)),
        ("temperature=0: must be", lambda: transfer.nt_xent(normal(3, 2), normal(3, 2), 0)),
        ("a=[1, 2]: must be", lambda: transfer.nt_xent(normal(1, 2), normal(1, 2))),
        ("a=[3, 2]: must be", lambda: transfer.nt_xent(normal(3, 2), normal(2, 2))),
        ("hidden=0: must be", lambda: transfer.WithTarget(model, 3, 0, generator=draw)),
        ("decay=1: must be", lambda: transfer.WithTarget(model, decay=1, generator=draw)),
        ("network=ConvNet: must be a vit", lambda: transfer.MaskedAutoencoder(model, generator=draw)),
        ("share=1: must be", lambda: transfer.MaskedAutoencoder(vit, share=1, generator=draw)),
        ("share=0.01: must be", lambda: transfer.MaskedAutoencoder(vit, share=0.01, generator=draw)),
        ("width=6: must be a multiple of heads", lambda: transfer.MaskedAutoencoder(vit, 6, generator=draw)),
        ("depth=-1: must be", lambda: transfer.MaskedAutoencoder(vit, depth=-1, generator=draw)),
        ("size=3: must be a divisor", lambda: transfer.patches(X, 3)),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_pretraining_on_the_gpu(kind: str, dtype: torch.dtype) -> None:
    here = WRAPPERS[kind](network("vit").to(dtype), generator=generator())
    there = WRAPPERS[kind](network("vit").to(dtype).cuda(), generator=generator())
    losses = []
    for model, place in ((here, "cpu"), (there, "cuda")):
        torch.manual_seed(1)
        losses.append(OBJECTIVES[kind](model, X.to(place, dtype), NONE.to(place)).cpu())
    close(losses[1], losses[0], 1e-8 if dtype == torch.float64 else 1e-3)
