"""Fits are held against laws that are known, against scipy's own least squares, and against brute force."""

import numpy as np
import pytest
from scipy import optimize

from course_lib.outlook.scaling_laws import JointLaw, extrapolate, fit_joint_law

CHINCHILLA = JointLaw(1.69, 406.4, 0.34, 410.7, 0.28)  # Hoffmann et al. 2022, section D.2
SIZES = np.array([1e6, 1e7, 1e8, 1e9])


def grid(sizes=SIZES, amounts=100 * SIZES):
    n, d = np.meshgrid(sizes, amounts)
    return n.ravel(), d.ravel()


def test_laws_are_their_formulas():
    assert JointLaw(1.0, 2.0, 0.5, 8.0, 1.0)(16, 4) == pytest.approx(1 + 2 / 4 + 8 / 4)


@pytest.mark.parametrize(
    "law",
    [CHINCHILLA, JointLaw(0.05, 400, 0.84, 410, 0.78), JointLaw(1e-3, 40, 0.5, 9e3, 0.9), JointLaw(2, 1, 0.1, 50, 0.6)],
)
def test_a_joint_law_is_found_again(law):
    n, d = grid(np.geomspace(2e3, 4e5, 5), np.geomspace(8e3, 3e5, 5))
    loss = law(n, d)
    found = fit_joint_law(n, d, loss)
    np.testing.assert_allclose(found(n, d), loss, rtol=1e-5)
    assert (found.alpha, found.beta) == pytest.approx((law.alpha, law.beta), rel=0.01)


def test_the_joint_fit_is_the_minimum_of_its_objective():
    """No search from the truth, with another method, finds anything better."""
    rng = np.random.default_rng(1)
    n, d = grid()
    loss = CHINCHILLA(n, d) * np.exp(rng.normal(0, 0.01, len(n)))

    def objective(theta):
        e, a, alpha, b, beta = theta
        error = np.log(np.exp(e) + np.exp(a) * n**-alpha + np.exp(b) * d**-beta) - np.log(loss)
        small = np.abs(error) <= 1e-3
        return np.where(small, error**2 / 2, 1e-3 * (np.abs(error) - 5e-4)).sum()

    found = fit_joint_law(n, d, loss)
    ours = np.array([np.log(found.E), np.log(found.A), found.alpha, np.log(found.B), found.beta])
    truth = np.array([np.log(1.69), np.log(406.4), 0.34, np.log(410.7), 0.28])
    for start in (ours, truth):
        search = optimize.minimize(objective, start, method="Nelder-Mead", options={"maxiter": 6000, "fatol": 1e-12})
        assert objective(ours) <= search.fun * 1.001


def test_a_run_that_went_wrong_does_not_decide():
    n, d = grid()
    loss = CHINCHILLA(n, d)
    loss[5] *= 3
    found = fit_joint_law(n, d, loss)
    assert found(1e10, 1e12) == pytest.approx(CHINCHILLA(1e10, 1e12), rel=1e-3)


def test_the_best_split_is_that_of_brute_force():
    for law in (CHINCHILLA, JointLaw(0.5, 30, 0.6, 700, 0.4)):
        for operations in (1e15, 1e20):
            n, d = law.best(operations)
            assert 6 * n * d == pytest.approx(operations)
            tried = np.geomspace(n / 100, n * 100, 4001)
            losses = law(tried, operations / 6 / tried)
            assert law(n, d) <= losses.min() * (1 + 1e-12)
            assert tried[losses.argmin()] == pytest.approx(n, rel=0.01)


def test_the_split_of_chinchilla_is_the_published_one():
    """70 billion parameters were chosen for 5.76e23 operations; their third approach says 40 billion (table A3)."""
    n, _ = CHINCHILLA.best(5.76e23)
    assert 3e10 < n < 5e10


def test_each_other_number_of_operations_moves_the_split():
    n, d = CHINCHILLA.best(1e20, each=2)
    assert 2 * n * d == pytest.approx(1e20)


def test_extrapolation_sees_only_the_cheap_runs():
    n, d = grid()
    loss = CHINCHILLA(n, d)
    wrong = np.where(6 * n * d > 6e16, 2 * loss, loss)  # whoever looked at the dear ones would notice
    found = extrapolate(n, d, wrong, largest=6e16)
    assert len(found.table) == (6 * n * d > 6e16 * (1 + 1e-9)).sum()
    np.testing.assert_allclose(found.table["predicted"], CHINCHILLA(found.table["parameters"], found.table["examples"]))
    np.testing.assert_allclose(found.table["error"], -0.5, rtol=1e-4)
    assert found.worst == pytest.approx(0.5, rel=1e-4)
    assert found.typical == pytest.approx(0.5, rel=1e-4)
    assert (found.table["operations"].diff().dropna() >= 0).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fit_joint_law([1, 2, 3], [1, 2, 3], [1, 0.5, -0.1]), "loss holds -0.1: every number must be above 0"),
        (lambda: fit_joint_law([1, 2, 3], [1, 2, 3], [1, 0.5]), "loss has shape"),
        (lambda: fit_joint_law([1, 2], [1, 2], [1, 0.5]), "loss holds 2 different values: the law needs at least 6"),
        (lambda: fit_joint_law([1] * 6, [1, 2, 3, 4, 5, 6], [1] * 6), "parameters holds 1 different"),
        (lambda: fit_joint_law([1, 2, 3] * 2, [1] * 6, [1] * 6), "examples holds 1 different"),
        (lambda: fit_joint_law(*grid(), CHINCHILLA(*grid()), delta=0), "delta=0: must be a number above 0"),
        (lambda: CHINCHILLA.best(0), "operations=0: must be a number above 0"),
        (lambda: extrapolate(*grid(), CHINCHILLA(*grid()), largest=1e30), "largest=1e"),
        (lambda: fit_joint_law([1, 2, float("nan")], [1, 2, 3], [1, 1, 1]), "parameters holds nan"),
    ],
)
def test_what_cannot_be_fitted_is_named(call, words):
    with pytest.raises(ValueError, match=words.replace("+", r"\+")):
        call()
