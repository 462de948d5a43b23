"""Adaptation: statistics by numpy, kernels by loops, an adversary by autograd, the bound by scikit-learn."""

from __future__ import annotations

import copy
import itertools
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import fractional_matrix_power
from scipy.stats import entropy
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from course_lib import transfer
from course_lib.lab.data import batches
from course_lib.lab.training import cross_entropy, fit, logits_of
from course_lib.regularization import Dropout, confidence_penalty, with_noise
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
    same_weights,
    split,
    untouched,
)

X, LABELS = batch(), torch.arange(6) % 4
TARGET = transfer.Pool(split(9, seed=5))

# --- Examples to draw -------------------------------------------------------------------------------------------------


def test_a_pool_draws_each_example_once_before_any_twice() -> None:
    rows = split(9, 3)
    rows = replace(rows, labels=torch.arange(9))
    pool = transfer.Pool(rows)
    torch.manual_seed(1)
    x, labels = pool.draw(9, normal(1))
    assert sorted(labels.tolist()) == [*range(9)]
    assert x.dtype == torch.float64
    close(x, rows.inputs[labels].double())
    _, more = pool.draw(21, normal(1))
    assert set(more.bincount().tolist()) == {2, 3}
    torch.manual_seed(1)
    assert torch.equal(pool.draw(9, normal(1))[1], labels)


def drawn(count: int, seed: int) -> Tensor:
    torch.manual_seed(seed)
    return TARGET.draw(count, X)[0]


# --- Statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convnet", "resnet"])
def test_batch_norm_takes_the_targets_statistics(name: str) -> None:
    model, held = network(name), split(30, seed=7)
    untouched(model, lambda: transfer.adabn(model, held))
    found: Any = transfer.adabn(model, held, batch_size=30)
    first: Any = found.features if name == "convnet" else found.stem
    x = next(batches(held, 30, dtype=torch.float64))[0]
    seen = first[0](x).detach().numpy()
    close(first[1].running_mean, torch.from_numpy(seen.mean((0, 2, 3))))
    close(first[1].running_var, torch.from_numpy(seen.var((0, 2, 3), ddof=1)))
    close(found.eval()(x), copy.deepcopy(found).train()(x), 0.02)  # exact but for n - 1
    assert all("running" in n or "batches" in n for n in moved(model, found))


def test_coral_is_the_distance_of_covariances() -> None:
    a, b = normal(12, 4), 2 * normal(9, 4, seed=1)
    expected = ((np.cov(a.T.numpy()) - np.cov(b.T.numpy())) ** 2).sum() / (4 * 16)
    assert transfer.coral_loss(a, b).item() == pytest.approx(expected)


def test_aligned_features_have_the_targets_covariance() -> None:
    a, b = normal(40, 4) @ normal(4, 4, seed=1), normal(30, 4, seed=2) @ normal(4, 4, seed=3)
    close(transfer.covariance(transfer.coral_align(a, b, ridge=1e-10)), transfer.covariance(b), 1e-6)
    one = np.eye(4)
    by_scipy = (
        a.numpy()
        @ fractional_matrix_power(np.cov(a.T.numpy()) + one, -0.5)
        @ fractional_matrix_power(np.cov(b.T.numpy()) + one, 0.5)
    )
    close(transfer.coral_align(a, b), torch.from_numpy(by_scipy))


# --- Kernels ----------------------------------------------------------------------------------------------------------


def by_loops(a: Tensor, b: Tensor, bandwidths: list[float], same: bool) -> float:
    values = [
        sum(math.exp(-(p - q).square().sum().item() / (2 * s * s)) for s in bandwidths) / len(bandwidths)
        for (i, p), (j, q) in itertools.product(enumerate(a), enumerate(b))
        if not (same and i == j)
    ]
    return sum(values) / len(values)


def test_mmd_is_a_mean_over_pairs() -> None:
    a, b, widths = normal(7, 3), normal(5, 3, seed=1) + 1, [0.5, 2.0]
    cross = by_loops(a, b, widths, False)
    biased = by_loops(a, a, widths, False) + by_loops(b, b, widths, False) - 2 * cross
    unbiased = by_loops(a, a, widths, True) + by_loops(b, b, widths, True) - 2 * cross
    assert transfer.mmd_biased(a, b, widths).item() == pytest.approx(biased)
    assert transfer.mmd_unbiased(a, b, widths).item() == pytest.approx(unbiased)


def test_of_one_distribution_the_unbiased_one_is_zero_on_average() -> None:
    """Over all ways to part eight rows in two fours it is exactly so up to what a finite sample leaves."""
    pairs = [(normal(6, 2, seed=2 * s), normal(6, 2, seed=2 * s + 1)) for s in range(300)]
    unbiased = torch.stack([transfer.mmd_unbiased(a, b, [1.0]) for a, b in pairs])
    biased = torch.stack([transfer.mmd_biased(a, b, [1.0]) for a, b in pairs])
    assert abs(unbiased.mean()) < 3 * unbiased.std() / 300**0.5
    assert unbiased.min() < 0 < biased.min()


def test_bandwidths_are_around_the_median_distance() -> None:
    a, b = normal(5, 3), normal(6, 3, seed=1)
    both = torch.cat([a, b])
    apart = sorted((p - q).norm().item() for p, q in itertools.combinations(both, 2))
    assert transfer.median_bandwidths(a, b, [1, 3]) == pytest.approx([apart[27], 3 * apart[27]])


# --- Objectives with a target -----------------------------------------------------------------------------------------


def distance(kind: str, source: Tensor, target: Tensor) -> Tensor:
    if kind == "coral":
        return transfer.coral_loss(source, target)
    return transfer.mmd_biased(source, target, transfer.median_bandwidths(source, target))


@pytest.mark.parametrize("kind", ["coral", "dan"])
@pytest.mark.parametrize("name", NAMES)
def test_an_objective_adds_the_distance_of_features(kind: str, name: str) -> None:
    model: Any = network(name)
    other = drawn(6, 11)
    expected = cross_entropy(model, X, LABELS) + 0.5 * distance(kind, model.embedding(X), model.embedding(other))
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(11)
    found = getattr(transfer, kind)(model, X, LABELS, target=TARGET, strength=0.5)
    close(found, expected)
    for key, slope in gradients(found, model).items():
        close(slope, gradients(expected, model)[key])
    assert len(calls) == 1, "the source passes once, the target needs no logits"


def test_objectives_of_other_chapters_go_around_and_within() -> None:
    model: Any = network("convnet")
    penalty = confidence_penalty(model, X, LABELS, beta=0.3)
    other = drawn(6, 2)
    apart = transfer.coral_loss(model.embedding(X), model.embedding(other))
    torch.manual_seed(2)
    within = transfer.coral(
        model, X, LABELS, target=TARGET, objective=partial(confidence_penalty, beta=0.3)
    )  # fmt: skip
    torch.manual_seed(2)
    around = confidence_penalty(
        model, X, LABELS, beta=0.3, objective=partial(transfer.coral, target=TARGET)
    )  # fmt: skip
    close(within, penalty + apart)
    close(around, penalty + apart)


def test_a_run_with_a_target_repeats_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    recipe = replace(EXACT, objective=partial(transfer.coral, target=TARGET))
    whole, parts = network("convnet"), network("convnet")
    fit(whole, data(40), recipe, seed=0)
    fit(network("convnet"), data(40), replace(recipe, epochs=1), seed=0, checkpoint=tmp_path / "run")
    fit(parts, data(40), recipe, seed=0, checkpoint=tmp_path / "run")
    same_weights(whole, parts)


# --- An adversary -----------------------------------------------------------------------------------------------------


def test_the_strength_of_the_reversal_rises_to_one() -> None:
    assert transfer.reversal_strength(0.0) == 0
    assert transfer.reversal_strength(0.5) == pytest.approx(2 / (1 + math.exp(-5)) - 1)
    assert 0.9999 < transfer.reversal_strength(1.0) < 1


@pytest.mark.parametrize("progress", [0.125, 1.0])
def test_an_adversary_pushes_the_features_the_other_way(progress: float) -> None:
    plain: Any = network("convnet")
    untouched(plain, lambda: transfer.WithDomains(plain, 5, generator=generator()))
    model: Any = transfer.WithDomains(plain, 5, generator=generator())
    model.progress.fill_(progress)
    close(model(X), plain(X), 0)
    other = drawn(6, 3)
    torch.manual_seed(3)
    found = transfer.dann(model, X, LABELS, target=TARGET, strength=0.7)
    logits = model.domains(torch.cat([plain.embedding(X), plain.embedding(other)]))[:, 0]
    truth = torch.tensor([0.0] * 6 + [1.0] * 6, dtype=torch.float64)
    told = F.binary_cross_entropy_with_logits(logits, truth)
    close(found, cross_entropy(plain, X, LABELS) + told)
    slopes = gradients(found, model)
    of_labels, of_domains = gradients(cross_entropy(model, X, LABELS), model), gradients(told, model)
    back = 0.7 * (2 / (1 + math.exp(-10 * progress)) - 1)
    for key, slope in slopes.items():
        sign = 1.0 if key.startswith("domains") else -back
        close(slope, of_labels[key] + sign * of_domains[key])


def test_progress_moves_with_the_run_and_survives_it(tmp_path: Path) -> None:
    def run(epochs: int, path: Path | None) -> Any:
        model = transfer.WithDomains(network("convnet"), 5, generator=generator())
        recipe = replace(EXACT, objective=partial(transfer.dann, target=TARGET))
        recipe = transfer.with_progress(recipe, model, data(40))
        assert model.progress == 0
        fit(model, data(40), replace(recipe, epochs=epochs), seed=0, checkpoint=path)
        return model

    whole = run(2, None)
    assert whole.progress == 1
    assert run(1, tmp_path / "run").progress == 0.5
    same_weights(whole, run(2, tmp_path / "run"))


# --- Sure answers -----------------------------------------------------------------------------------------------------


def test_entropy_is_scipys() -> None:
    logits = normal(5, 4)
    close(transfer.entropies(logits), torch.from_numpy(entropy(logits.softmax(1).numpy(), axis=1)))
    model = network()
    close(transfer.entropy(model, X, LABELS), transfer.entropies(model(X)).mean())


@pytest.mark.parametrize("name", ["convnet", "resnet", "vit"])
def test_tent_is_its_algorithm(name: str) -> None:
    model, held = network(name), split(20, seed=4)
    untouched(model, lambda: transfer.tent(model, held, batch_size=8))
    found = transfer.tent(model, held, lr=0.01, steps=2, batch_size=8)
    # written out, with batch norm by its formula
    work = copy.deepcopy(model)
    norms = [part for part in work.modules() if isinstance(part, nn.BatchNorm2d | nn.LayerNorm)]
    own = [p for part in norms for p in part.parameters()]
    for part in norms:
        if isinstance(part, nn.BatchNorm2d):
            part.forward = partial(by_batch, part)  # type: ignore[method-assign]
    adam, said = torch.optim.Adam(own, lr=0.01), []
    for x, _ in batches(held, 8, dtype=torch.float64):
        for _ in range(2):
            logits = work(x)
            p = logits.softmax(1)
            adam.zero_grad()
            (-(p * p.log()).sum(1).mean()).backward()
            adam.step()
        said.append(logits.detach())
    close(found.logits, torch.cat(said))
    for mine, theirs in zip(found.network.parameters(), work.parameters(), strict=True):
        close(mine.detach(), theirs.detach())
    assert transfer.trainable(found.network) == transfer.trainable(model)
    last = next(batches(held.subset(torch.arange(16, 20)), 4, dtype=torch.float64))[0]
    close(found.network(last), work(last))
    assert moved(model, work) == {n for n, p in work.named_parameters() if any(p is q for q in own)}


def by_batch(part: nn.BatchNorm2d, x: Tensor) -> Tensor:
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    shape = (1, -1, 1, 1)
    return (x - mean) / (variance + part.eps).sqrt() * part.weight.view(shape) + part.bias.view(shape)


def test_tent_lets_dropout_rest_and_repeats() -> None:
    model = with_noise(network("convnet"), lambda: nn.Dropout(0.5))
    held = split(16)
    assert torch.equal(transfer.tent(model, held).logits, transfer.tent(model, held).logits)


def test_only_norms_train() -> None:
    model = transfer.norms_only(network("resnet"))
    own = {n for n, p in model.named_parameters() if p.requires_grad}
    assert own == {n for n, p in model.named_parameters() if p.ndim == 1 and not n.startswith("head")}
    before = copy.deepcopy(model)
    fit(model, data(40), replace(EXACT, objective=transfer.entropy), seed=0)
    assert {n for n in moved(before, model) if "running" not in n and "batches" not in n} <= own


# --- What limits it ---------------------------------------------------------------------------------------------------


def test_the_proxy_distance_is_a_held_out_error() -> None:
    a, b = normal(41, 3), normal(60, 3, seed=1) + 0.7
    drawing = generator(4)
    found = transfer.proxy_a_distance(a, b, generator=generator(4), C=0.5)
    rows = [x[torch.randperm(len(x), generator=drawing)[:41]] for x in (a, b)]
    seen, held = (np.concatenate([x[k : k + 20] for x in rows]) for k in (0, 20))
    domain = np.repeat([0, 1], 20)
    theirs = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(seen, domain)
    assert found == pytest.approx(2 * (2 * theirs.score(held, domain) - 1))


def test_the_distance_is_two_where_domains_lie_apart_and_near_zero_where_they_do_not() -> None:
    a, b = normal(400, 3), normal(400, 3, seed=1)
    assert transfer.proxy_a_distance(a, b + 20, generator=generator()) == 2
    assert abs(transfer.proxy_a_distance(a, b, generator=generator())) < 0.3


def test_the_terms_of_the_bound() -> None:
    model, source = network("convnet"), data(80)
    darker = [replace(part, inputs=255 - part.images) for part in (source.train, source.val, source.test)]
    target = replace(source, train=darker[0], val=darker[1], test=darker[2])
    found = transfer.adaptation_bound(model, source, target, generator=generator(), C=2.0)
    x, other, held, other_held = (
        transfer.features(model, part).numpy() for part in (source.train, target.train, source.test, target.test)
    )
    y, y_held = source.train.labels.numpy(), source.test.labels.numpy()
    make = partial(LogisticRegression, C=2.0, tol=1e-10, max_iter=10_000)
    first, joint = make().fit(x, y), make().fit(np.concatenate([x, other]), np.concatenate([y, y]))
    assert found.source_error == pytest.approx(1 - first.score(held, y_held))
    assert found.target_error == pytest.approx(1 - first.score(other_held, y_held))
    assert found.joint_error == pytest.approx(2 - joint.score(held, y_held) - joint.score(other_held, y_held))
    both = [transfer.features(model, part) for part in (source.train, target.train)]
    assert found.distance == transfer.proxy_a_distance(*both, generator=generator(), C=2.0)
    assert found.bound == pytest.approx(found.source_error + found.distance / 2 + found.joint_error)
    assert found.source_error < found.target_error <= found.bound


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    model, a, b = network("convnet"), normal(6, 3), normal(6, 3, seed=1)
    noisy = with_noise(network("mlp"), partial(Dropout, 0.5))
    cases: list[tuple[str, Any]] = [
        ("must be a split with examples", lambda: transfer.Pool(split(5).subset(torch.arange(0)))),
        ("count=0: must be", lambda: TARGET.draw(0, X)),
        ("model='ViT': must be a network with batch norm", lambda: transfer.adabn(network("vit"), split(5))),
        ("batch_size=0: must be", lambda: transfer.adabn(model, split(5), batch_size=0)),
        ("source=[6]: must be features", lambda: transfer.coral_loss(a[:, 0], b)),
        ("target=[1, 3]: must be features [N, D], N > 1", lambda: transfer.mmd_biased(a, b[:1], [1.0])),
        ("target=[6, 2]: must be of 3 columns", lambda: transfer.mmd_unbiased(a, b[:, :2], [1.0])),
        ("ridge=0: must be", lambda: transfer.coral_align(a, b, ridge=0)),
        ("bandwidths=[]: must be", lambda: transfer.mmd_biased(a, b, [])),
        ("bandwidths[1]=0: must be", lambda: transfer.mmd_biased(a, b, [1.0, 0])),
        ("must be features that are not all equal", lambda: transfer.median_bandwidths(0 * a, 0 * a)),
        ("strength=-1: must be", lambda: transfer.coral(model, X, LABELS, target=TARGET, strength=-1)),
        ("strength=-1: must be", lambda: transfer.dan(model, X, LABELS, target=TARGET, strength=-1)),
        ("strength=-1: must be", lambda: transfer.dann(model, X, LABELS, target=TARGET, strength=-1)),
        ("model=ConvNet: must be a network WithDomains", lambda: transfer.dann(model, X, LABELS, target=TARGET)),
        ("width=0: must be", lambda: transfer.WithDomains(model, 0, generator=generator())),
        ("model='MLP': must be a network with norms", lambda: transfer.norms_only(noisy)),
        ("lr=0: must be", lambda: transfer.tent(model, split(5), lr=0)),
        ("steps=0: must be", lambda: transfer.tent(model, split(5), steps=0)),
        ("must be at least 4 rows", lambda: transfer.proxy_a_distance(a[:3], b, generator=generator())),
        ("C=0: must be", lambda: transfer.proxy_a_distance(a, b, generator=generator(), C=0)),
    ]
    for words, call in cases:
        with pytest.raises(ValueError, match=re.escape(words)):
            call()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adaptation_on_the_gpu(dtype: torch.dtype) -> None:
    tolerance = 1e-7 if dtype == torch.float64 else 2e-3
    here = transfer.WithDomains(network("convnet"), 5, generator=generator()).to(dtype)
    there = copy.deepcopy(here).cuda()
    x, y = X.to(dtype), LABELS
    for objective in (transfer.coral, transfer.dan, transfer.dann):
        found = []
        for model, place in ((here, "cpu"), (there, "cuda")):
            torch.manual_seed(1)
            found.append(objective(model, x.to(place), y.to(place), target=TARGET).cpu())
        close(found[1], found[0], tolerance)
    assert not there.progress.is_cuda
    held = split(20)
    close(
        logits_of(transfer.adabn(there.network, held), held).cpu(),
        logits_of(transfer.adabn(here.network, held), held),
        tolerance,
    )
    adapted = [transfer.tent(model.network, held, lr=0.01).logits.cpu() for model in (there, here)]
    close(adapted[0], adapted[1], tolerance)
