"""Several inputs: against torch's bilinear layer and attention, and the papers' formulas written out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib import fusion
from course_lib.lab.models import convnet, mlp
from course_lib.lab.training import evaluate, fit, fresh, logits_of
from tests.fusion.small import EXACT, close, data, generator, normal

TWO = data(40).with_inputs(lambda x: (x[..., :4], x[..., 4:]))
HALF = (1, 8, 4)
FEATURES = [normal(7, 5), normal(7, 3, seed=1)]
THREE = [*FEATURES, normal(7, 2, seed=2)]


def views(count: int = 6) -> tuple[Tensor, Tensor]:
    return normal(count, *HALF), normal(count, *HALF, seed=1)


def intermediate(combine: str = "concatenated") -> fusion.IntermediateFusion:
    made = {
        "concatenated": lambda: fusion.Concatenated([6, 12]),
        "gated": lambda: fusion.Gated([6, 12], 5),
        "attended": lambda: fusion.Attended([6, 12], 5),
        "bilinear": lambda: fusion.Bilinear([6, 12], 5, 4),
    }

    def make() -> fusion.IntermediateFusion:
        branches = [mlp(HALF, 4, width=6), convnet(HALF, 4, width=3)]
        return fusion.IntermediateFusion(branches, made[combine](), 4)

    return fresh(make, EXACT, seed=0)  # type: ignore[return-value]


def late() -> fusion.LateFusion:
    return fresh(lambda: fusion.LateFusion([mlp(HALF, 4, width=6), mlp(HALF, 4, width=6)]), EXACT, seed=0)  # type: ignore[return-value]


def early() -> fusion.EarlyFusion:
    return fresh(lambda: fusion.EarlyFusion(partial(mlp, width=6), TWO.input_shape, 4), EXACT, seed=0)  # type: ignore[return-value]


def test_early_fusion_is_one_network_on_all_numbers() -> None:
    model, x = early(), views()
    close(model(x), model.model(torch.cat([x[0].flatten(1), x[1].flatten(1)], 1)), 0)


def test_intermediate_fusion_puts_features_before_the_head() -> None:
    model, x = intermediate().eval(), views()
    branches = [*model.branches]
    side_by_side = torch.cat([branch.embedding(part) for branch, part in zip(branches, x, strict=True)], 1)
    close(model(x), model.head(side_by_side), 1e-12)
    close(model.embedding(x), side_by_side, 1e-12)


def test_late_fusion_is_the_mean_of_answers() -> None:
    model, x = late().eval(), views()
    q = torch.stack([net(part).softmax(1) for net, part in zip(model.networks, x, strict=True)])
    close(model(x), q.mean(0).log(), 1e-12)
    close(model.only([1])(x), q[1].log(), 1e-12)
    assert model.only([1]).networks[0] is model.networks[0]
    assert not model.only([0]).training


def test_the_gated_unit_is_the_papers() -> None:
    torch.manual_seed(0)
    unit = fusion.Gated([5, 3], 4).double()
    w1, w2, v = unit.inner[0].weight, unit.inner[1].weight, unit.gates[0].weight
    z = torch.sigmoid(torch.cat(FEATURES, 1) @ v.T)
    close(unit(FEATURES), z * torch.tanh(FEATURES[0] @ w1.T) + (1 - z) * torch.tanh(FEATURES[1] @ w2.T), 1e-12)
    three = fusion.Gated([5, 3, 2], 4).double()
    expected = sum(
        torch.sigmoid(torch.cat(THREE, 1) @ three.gates[k].weight.T) * torch.tanh(THREE[k] @ three.inner[k].weight.T)
        for k in range(3)
    )
    close(three(THREE), expected, 1e-12)


def test_attention_over_inputs_is_torchs() -> None:
    torch.manual_seed(0)
    unit = fusion.Attended([5, 3, 2], 4).double()
    keys = torch.stack([key(each) for key, each in zip(unit.keys, THREE, strict=True)], 1)  # [B, inputs, width]
    values = torch.stack([value(each) for value, each in zip(unit.values, THREE, strict=True)], 1)
    expected = F.scaled_dot_product_attention(unit.query.expand(7, 1, 4), keys, values)[:, 0]
    close(unit(THREE), expected, 1e-12)
    close(unit.shares(THREE).sum(0), torch.ones(7, dtype=torch.float64), 1e-12)


def test_bilinear_pooling_is_a_bilinear_layer_of_low_rank() -> None:
    torch.manual_seed(0)
    unit = fusion.Bilinear([5, 3], 4, rank=2).double()
    u, v, p = unit.factors[0].weight, unit.factors[1].weight, unit.out.weight
    x, y = FEATURES
    close(unit(FEATURES), (torch.tanh(x @ u.T) * torch.tanh(y @ v.T)) @ p.T + unit.out.bias, 1e-12)
    plain = nn.Bilinear(5, 3, 4).double()
    with torch.no_grad():
        plain.weight.copy_(torch.einsum("or,ri,rj->oij", p, u, v))
        plain.bias.copy_(unit.out.bias)
    small = [1e-4 * x, 1e-4 * y]  # where tanh is the identity
    close((unit(small) - unit.out.bias) / 1e-8, (plain(*small) - plain.bias) / 1e-8, 1e-5)


@pytest.mark.parametrize("name", ["early", "late", "concatenated", "gated", "attended", "bilinear"])
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_all_train_in_fit(name: str, precision: str) -> None:
    model: nn.Module = {"early": early, "late": late}.get(name, partial(intermediate, name))()
    start = {key: p.detach().clone() for key, p in model.named_parameters()}
    dropped = partial(fusion.modality_dropout, p=0.3)
    fit(model, TWO, replace(EXACT, epochs=1, augment=dropped, precision=precision), seed=0)  # type: ignore[arg-type]
    assert all(not torch.equal(p, start[key].to(p)) for key, p in model.named_parameters())
    assert 0 <= evaluate(fusion.Missing(model, [1]), TWO.test).accuracy <= 1


def test_dropout_of_inputs_leaves_one() -> None:
    x = (torch.ones(2000, 3), torch.ones(2000, 1, 2, 2), torch.ones(2000, 2))
    found = fusion.modality_dropout(x, generator(), p=0.6)
    kept = torch.stack([part.flatten(1)[:, 0] for part in found])
    for part, mask in zip(found, kept, strict=True):
        assert torch.equal(part, torch.ones_like(part) * mask.view(-1, *[1] * (part.ndim - 1)))
    assert kept.any(0).all()
    expected = 0.4 + 0.6**3 / 3  # kept, or the one that stays
    close(kept.mean(1), torch.full((3,), expected), 0.04)
    again = fusion.modality_dropout(x, generator(), p=0.6)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(fusion.modality_dropout(x, generator(), p=0.0), x, strict=True))


def test_a_missing_input_is_its_mean() -> None:
    model, x = late().eval(), views()
    close(fusion.Missing(model, [0])(x), model((0 * x[0], x[1])), 0)
    close(logits_of(fusion.Missing(model, [1]), TWO.test)[:2], logits_of(fusion.Missing(model, [1]), TWO.test)[:2], 0)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: fusion.EarlyFusion(mlp, [], 4), "input_shapes="),
        (lambda: early()(views()[0]), "x=Tensor"),
        (lambda: late()(views()[:1]), "x=1 parts"),
        (lambda: late().only([2]), "present="),
        (lambda: fusion.LateFusion([]), "networks="),
        (lambda: fusion.IntermediateFusion([], fusion.Concatenated([1, 1]), 4), "branches="),
        (lambda: fusion.Concatenated([3]), "sizes="),
        (lambda: fusion.Gated([3, 3], 0), "width="),
        (lambda: fusion.Attended([3, 0], 2), "sizes="),
        (lambda: fusion.Bilinear([3, 3], 2, 0), "rank="),
        (lambda: fusion.modality_dropout(views(), generator(), p=1.0), "p="),
        (lambda: fusion.modality_dropout(torch.ones(2), generator()), "x=Tensor"),  # type: ignore[arg-type]
        (lambda: fusion.Missing(late(), []), "places="),
        (lambda: fusion.Missing(late(), [2])(views()), "places="),
    ],
)
def test_bad_arguments_are_named(call: object, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        call()  # type: ignore[operator]
