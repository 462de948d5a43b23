"""Surfaces: minima and curvatures where the formulas say, and a descent that is plain gradient descent."""

from functools import partial

import pytest
import torch

from course_lib.lab.surfaces import descend, ravine, rosenbrock, saddle

SGD = partial(torch.optim.SGD, lr=0.03)


def curvatures(surface, at):
    hessian = torch.autograd.functional.hessian(surface, torch.tensor(at, dtype=torch.float64))
    return torch.linalg.eigvalsh(hessian).tolist()


@pytest.mark.parametrize("angle", [0, 30, 45])
def test_ravine_has_the_condition_it_was_asked_for(angle):
    assert curvatures(ravine(25, angle), [0.3, -0.2]) == pytest.approx([1, 25])


def test_minima_and_saddle():
    assert curvatures(saddle, [0.0, 0.0]) == pytest.approx([-1, 1])
    assert saddle(torch.tensor([0.0, -1.0])) == -0.25
    assert rosenbrock(torch.tensor([1.0, 1.0])) == 0
    assert curvatures(rosenbrock, [1.0, 1.0]) == pytest.approx([0.39936, 1001.60064], rel=1e-4)


def test_descent_on_a_quadratic_is_the_power_of_its_contraction():
    path = descend(ravine(25), (2.0, 1.0), SGD, 40)
    steps = torch.arange(41, dtype=torch.float64)
    expected = torch.stack([2.0 * (1 - 0.03) ** steps, (1 - 0.03 * 25) ** steps], dim=1)
    torch.testing.assert_close(path, expected)


def test_descent_ends_where_it_leaves_the_map():
    path = descend(ravine(25), (2.0, 1.0), partial(torch.optim.SGD, lr=1.0), 500)
    assert 2 < len(path) < 500
    assert torch.isfinite(path).all()


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"condition=0\.5"):
        ravine(0.5)
    with pytest.raises(ValueError, match="steps=0"):
        descend(saddle, (0, 0), SGD, 0)
