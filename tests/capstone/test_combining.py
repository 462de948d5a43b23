"""How rungs combine, against sums over every order written out."""

from itertools import permutations

import numpy as np
import pytest

from course_lib.capstone.combining import Combinations, every_set, subsets

RUNGS = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def found():
    dice = np.random.default_rng(0)
    seconds = {names: np.exp(dice.normal(3 - len(names), 0.5, 5)) for names in subsets(RUNGS)}
    return Combinations(RUNGS, seconds, {names: np.ones(5, bool) for names in seconds}, seconds)


def independent():
    """Rungs that do not care for one another: speeds 2, 3, 5 and a half."""
    speeds = dict(zip(RUNGS, (2.0, 3.0, 5.0, 0.5), strict=True))
    start = np.array([60.0, 90.0, 70.0])
    seconds = {names: start / np.prod([speeds[n] for n in names]) for names in subsets(RUNGS)}
    return Combinations(RUNGS, seconds, {names: np.ones(3, bool) for names in seconds}, seconds), speeds


def test_all_sets_are_there():
    assert len(list(subsets(RUNGS))) == len(set(subsets(RUNGS))) == 16
    assert next(subsets(RUNGS)) == frozenset()


def test_shapley_is_the_mean_over_every_order(found):
    for rung in RUNGS:
        logs = [np.log(found.gain(rung, order[: order.index(rung)]).ratio) for order in permutations(RUNGS)]
        assert np.log(found.shapley(rung).ratio) == pytest.approx(np.mean(logs), abs=1e-12)


def test_the_shares_multiply_to_the_whole(found):
    product = np.prod([found.shapley(rung).ratio for rung in RUNGS])
    assert product == pytest.approx(found.speedup(RUNGS).ratio, rel=1e-12)


def test_rungs_that_do_not_care_for_one_another():
    whole, speeds = independent()
    for rung in RUNGS:
        assert whole.shapley(rung).ratio == pytest.approx(speeds[rung])
        assert whole.gain(rung).ratio == pytest.approx(speeds[rung])
        assert whole.gain(rung, RUNGS).ratio == pytest.approx(speeds[rung])
    assert whole.predicted(RUNGS).ratio == pytest.approx(15.0)
    assert whole.speedup(RUNGS).ratio == pytest.approx(15.0)
    assert whole.interaction("a", "c").ratio == pytest.approx(1.0)
    assert whole.interaction("a", "c", given=("b", "d")).ratio == pytest.approx(1.0)
    assert whole.ladder() == ["c", "b", "a", "d"]


def test_an_interaction_is_together_over_the_product(found):
    a, b, both = (np.log(found.speedup(names).ratio) for names in (("a",), ("b",), ("a", "b")))
    assert np.log(found.interaction("a", "b").ratio) == pytest.approx(both - a - b, abs=1e-12)
    rest = ("c", "d")
    a, b, both = (np.log(found.speedup({*rest, *names}, rest).ratio) for names in (("a",), ("b",), ("a", "b")))
    assert np.log(found.interaction("a", "b", given=RUNGS).ratio) == pytest.approx(both - a - b, abs=1e-12)
    assert found.interaction("a", "b").ratio == pytest.approx(found.interaction("b", "a").ratio)


def test_the_ladder_takes_the_largest_gain_first(found):
    order = found.ladder()
    assert sorted(order) == sorted(RUNGS)
    for k, rung in enumerate(order):
        assert found.gain(rung, order[:k]).ratio == max(found.gain(other, order[:k]).ratio for other in order[k:])


def test_ratios_are_taken_within_a_seed():
    """A seed that is slow throughout makes no interval wide."""
    whole, _ = independent()
    assert whole.speedup(("a",)).low == pytest.approx(2.0)
    assert whole.predicted(RUNGS).high == pytest.approx(15.0)


def test_what_is_refused(found):
    few = {names: values for names, values in found.seconds.items() if names != frozenset("ab")}
    with pytest.raises(ValueError, match=r"seconds=\['a \+ b'\]: must be there for all 16 sets of rungs"):
        Combinations(RUNGS, few, found.reached, found.epochs)
    with pytest.raises(ValueError, match=r"names=\['x'\]: must be among a, b, c, d"):
        found.speedup({"x"})
    with pytest.raises(ValueError, match="rung='x': must be one of a, b, c, d"):
        found.shapley("x")


def test_a_length_is_the_median_rounded_up(found):
    epochs = {names: np.array([2.0, 9.0, 3.0, 4.0]) for names in found.seconds}
    assert Combinations(RUNGS, found.seconds, found.reached, epochs).length(("a",)) == 4


def test_sets_have_names():
    assert every_set(("x", "y")) == {
        "first script": frozenset(), "x": {"x"}, "y": {"y"}, "x + y": {"x", "y"},
    }  # fmt: skip
