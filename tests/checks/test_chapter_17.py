"""Checks of chapter 17: other right answers pass, mistakes that stand in no table are told too, solutions pass."""

import json
import math
import re
from itertools import product
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from scipy import optimize, stats

from course_lib.checks import chapter_17
from course_lib.checks.chapter_17 import EXTRAPOLATIONS, SITUATIONS, TECHNIQUES
from course_lib.lab import mean_interval
from course_lib.lab.exercises import check
from course_lib.lab.studies import study_file
from tests.checks import checking

pytestmark = pytest.mark.usefixtures("unknown_learner")

NOTEBOOK = "17_trends_and_faq.ipynb"
needs_the_notebook = pytest.mark.skipif(not (checking.NOTEBOOKS / NOTEBOOK).exists(), reason="the notebook is to come")

READ = {
    "trust": "power law with floor",
    "best fit, fails": "polynomial of degree 4",
    "cannot tell": {"exponential with floor", "parabola in logarithms"},
}
PLAN = {
    "fitted": [(n, d) for n in (5e5, 1e6, 2e6, 4e6) for d in (1e7, 2e7, 4e7, 8e7)],
    "held out": [(8e6, 1.6e8)],
    "seeds": 3,
    "rates": 3,
    "schedule": "ends with each run",
}


# Other right answers


def by_scipy(n, loss, at):
    line = stats.linregress(np.log(n), np.log(loss))
    return np.exp(line.intercept), -line.slope, np.exp(line.intercept + line.slope * np.log(at))


def by_tens(n, loss, at):
    slope, start = np.polyfit(np.log10(n), np.log10(loss), 1)
    return [10**start, -slope, 10 ** (start + slope * np.log10(at))]


def by_torch(n, loss, at):
    """Normal equations."""
    x, y = torch.tensor(n).log(), torch.tensor(loss).log()
    design = torch.stack([torch.ones_like(x), x], 1)
    start, slope = torch.linalg.solve(design.T @ design, design.T @ y)
    return start.exp(), -slope, start.exp() * at**slope


def by_hours(operations, peak, utilisation, watts, pue):
    hours = operations / peak / utilisation / 3600
    return hours * pue * watts * 1e-3


def by_a_search(A, alpha, B, beta, operations):
    def loss(log_n):
        n = np.exp(log_n)
        return A * n**-alpha + B * (operations / (6 * n)) ** -beta

    n = np.exp(optimize.minimize_scalar(loss, bounds=(0, np.log(operations)), method="bounded").x)
    return n, operations / (6 * n)


def by_a_grid(A, alpha, B, beta, operations):
    n = np.geomspace(1, operations / 6, 20_000)
    d = operations / 6 / n
    best = np.argmin(A * n**-alpha + B * d**-beta)
    return np.array([n[best], d[best]])


def by_halving(A, alpha, B, beta, operations):
    """Where the slopes balance."""
    low, high = 1.0, operations / 6
    while high / low > 1.001:
        n = math.sqrt(low * high)
        d = operations / 6 / n
        low, high = (n, high) if alpha * A * n**-alpha > beta * B * d**-beta else (low, n)
    return low, operations / 6 / low


def by_two_calls(unique, passes, r_star=15.4):
    def effective(passes):
        again = max(passes - 1, 0)
        return min(passes, 1) * unique - unique * r_star * math.expm1(-again / r_star)

    now, before = effective(passes), effective(passes - 1)
    return now, (now - before) / unique


def by_numpy(unique, passes, r_star=15.4):
    """Both at once: now, and a pass ago."""
    read = np.array([passes, passes - 1])
    more = unique + unique * r_star * (1 - np.exp((1 - read) / r_star))
    now, before = np.where(read > 1, more, unique * read)
    return now, (now - before) / unique


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("17.1", by_scipy), ("17.1", by_tens), ("17.1", by_torch), ("17.2", by_hours), ("17.3", by_a_search),
        ("17.3", by_a_grid), ("17.3", by_halving), ("17.8", by_two_calls), ("17.8", by_numpy),
    ],
)  # fmt: skip
def test_another_right_answer_passes(exercise, answer):
    found = check(exercise, answer)
    assert found.state == "passed", found


# What stands in no table


def test_a_split_that_overspends_is_told():
    def overspends(*law):
        parameters, examples = by_halving(*law)
        return parameters, 3 * examples

    checking.assert_hinted("17.3", overspends, r"6 N D is 3 times the operations .* \(on a law in which", "All of the")


def test_a_split_is_wanted_to_one_percent():
    def off(share):
        def split(*law):
            parameters, examples = chapter_17.exercise_3.right(*law)
            return parameters * share, examples / share

        return split

    assert check("17.3", off(1.008)).state == "passed"
    checking.assert_hinted("17.3", off(1.03), "N is not right", "one number is left")


def test_a_line_and_its_prediction_are_three_numbers():
    checking.assert_hinted("17.1", lambda n, loss, at: by_scipy(n, loss, at)[2], "should return 3 values", "logarithm")
    checking.assert_hinted("17.8", lambda *given: 1.0, "should return 2 values", "passes = 1")


def test_the_runs_are_left_as_they_are():
    def sorts(n, loss, at):
        result = by_scipy(n, loss, at)
        n.sort()
        return result

    checking.assert_hinted("17.1", sorts, "changes its argument n in place", "caller still needs")


def test_an_average_pass_is_not_the_last_one():
    """One pass and a half: the wrong and the right way to look back."""
    effective, share = by_two_calls(100, 1.5)
    assert effective == pytest.approx(100 + 1540 * (1 - math.exp(-0.5 / 15.4)))
    assert share == pytest.approx(effective / 100 - 0.5)


def test_the_thirteenth_pass_is_the_first_that_adds_less_than_half():
    shares = [chapter_17.exercise_8.right(1, passes)[1] for passes in range(1, 20)]
    assert shares[0] == 1
    assert sorted(shares, reverse=True) == shares
    assert next(passes for passes, share in enumerate(shares, 1) if share < 0.5) == 13


# The table of extrapolations


def errors_at_ten_times():
    return {law: np.array([row[f"seed {k}"] for k in range(1, 6)]) for law, row in EXTRAPOLATIONS.items()}


def test_the_table_says_what_the_check_says():
    found = {law: mean_interval(errors) for law, errors in errors_at_ten_times().items()}
    enough = chapter_17.ENOUGH
    within = {law for law, each in found.items() if -enough <= each.low and each.high <= enough}
    outside = {law for law, each in found.items() if each.low > enough or each.high < -enough}
    assert within == {READ["trust"]}
    assert set(found) - within - outside == READ["cannot tell"]
    seen = {law: row["seen"] for law, row in EXTRAPOLATIONS.items()}
    assert min(seen, key=seen.get) == READ["best fit, fails"]
    assert READ["best fit, fails"] in outside
    assert found["parabola in logarithms"].mean == pytest.approx(abs(found[READ["trust"]].mean)), "whoever forgets it"
    shown = [f"{each.mean:.2f} [{each.low:.2f}, {each.high:.2f}]" for each in found.values()]
    source = re.sub(r"\s+", " ", Path(chapter_17.__file__).read_text())
    assert all(figures in source for figures in shown), shown


@pytest.mark.parametrize(
    "answer",
    [
        READ,
        {
            "trust": ["Power law with floor"],
            "best fit, fails": {"polynomial of degree 4"},
            "cannot tell": ["parabola in logarithms", "Exponential with floor"],
        },
    ],
)
def test_the_table_is_read_right(answer):
    assert check("17.4", answer).state == "passed"


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        ({"trust": "parabola in logarithms"}, "not to be trusted .* mean is nearly 0", "mean with its 95%"),
        ({"trust": "polynomial of degree 4"}, "not to be trusted .* begins nearly four", "mean with its 95%"),
        ({"trust": "power law"}, "not to be trusted .* without a floor", "mean with its 95%"),
        ({"best fit, fails": "power law"}, "fails, and it did not fit best", "column seen"),
        ({"best fit, fails": "parabola in logarithms"}, "is not known to fail", "mean with its 95%"),
        ({"best fit, fails": "power law with floor"}, "is not known to fail", "mean with its 95%"),
        ({"cannot tell": "exponential with floor"}, "parabola .* cannot be told yet", "mean with its 95%"),
        ({"cannot tell": {"parabola in logarithms"}}, "exponential .* cannot be told yet", "mean with its 95%"),
        ({"cannot tell": {*READ["cannot tell"], "power law"}}, "power law can be told, and you say", "mean with"),
        ({"trust": {"power law", "power law with floor"}}, "'trust' should be one law", "For instance"),
        ({"trust": "cubic"}, "there is no law 'cubic'", "There are power law; "),
        ({"cannot tell": 3}, "'cannot tell' should be names of laws", "For instance"),
        ({"other": 3}, "expected a dict with 'trust', 'best fit, fails', 'cannot tell'", "For instance"),
    ],
)
def test_a_wrong_reading_is_told_what_is_wrong(change, message, hint):
    checking.assert_hinted("17.4", {**READ, **change}, message, hint)


@pytest.mark.parametrize("answer", [..., None, dict.fromkeys(READ, ...), {**READ, "cannot tell": {...}}])
def test_a_table_that_is_not_read_is_not_attempted(answer):
    checking.assert_not_attempted("17.4", answer)


# Which technique first


@pytest.mark.parametrize("answer", [SITUATIONS, {s: f" {t.upper()}. " for s, t in SITUATIONS.items()}])
def test_the_right_technique_for_each_situation_passes(answer):
    assert check("17.5", answer).state == "passed"


@pytest.mark.parametrize(("situation", "technique"), list(product(SITUATIONS, TECHNIQUES)))
def test_each_wrong_technique_is_told_why_and_where_that_is_taught(situation, technique):
    found = check("17.5", {**SITUATIONS, situation: technique})
    if technique == SITUATIONS[situation]:
        assert found.state == "passed"
        return
    assert found.message.startswith(f"{situation!r}: {technique} is not the first thing to try: "), found
    assert re.search(r"chapters? \d", found.message), "which chapter?"
    assert "What hurts" in found.hint


def test_reasons_are_given_for_wrong_choices_alone():
    for situation, reasons in chapter_17._UNFIT.items():
        assert set(reasons) <= set(TECHNIQUES) - {SITUATIONS[situation]}
    assert set(chapter_17._UNFIT) == set(SITUATIONS)
    assert set(SITUATIONS.values()) < set(TECHNIQUES)


@pytest.mark.parametrize(
    ("answer", "message", "hint"),
    [
        ({**SITUATIONS, "phone": "hope"}, "there is no technique 'hope'", "There are accumulate gradients; "),
        ({**SITUATIONS, "phone": 3}, "'phone' should have the name of one technique", "There are accumulate"),
        ({"phone": "ensemble"}, "expected a dict with 'few labels', 'phone', ", "For instance"),
        ("ensemble", "expected a dict", "For instance"),
    ],
)
def test_what_is_no_choice_is_told(answer, message, hint):
    checking.assert_hinted("17.5", answer, message, hint)


@pytest.mark.parametrize("answer", [..., dict.fromkeys(SITUATIONS, ...), {**SITUATIONS, "batch": ...}])
def test_a_choice_that_is_not_made_is_not_attempted(answer):
    checking.assert_not_attempted("17.5", answer)


def measured(chapter, part, arm, of):
    """What the runs of an arm measured, by seed; that the rows are up to date is tested with the studies."""
    lines = study_file(chapter).read_text().splitlines()
    rows = [json.loads(line) for line in lines if f'"part": "{part}", "arm": "{arm}", ' in line]
    return np.array([row["value"][of] for row in sorted(rows, key=lambda row: row["seed"]) if not row["tuning"]])


@pytest.mark.parametrize(
    ("chapter", "part", "better", "worse"),
    [
        ("13", "labels", ("all weights", "10"), ("from scratch", "10")),
        ("13", "sources", ("none", "tuned, 10"), ("contrast", "tuned, 10")),
        ("09", "sizes", ("cut down, taught", "test"), ("cut down, labels", "test")),
        ("12", "halves", ("tuned apart", "average"), ("tuned apart", "first half")),
        ("12", "halves", ("tuned apart", "average"), ("tuned apart", "second half")),
        ("03", "stopped", ("schedule-free", "5"), ("cosine for 15", "5")),
        ("05", "noisy", ("max-norm 0.5", "test"), ("nothing", "test")),
        ("05", "noisy", ("max-norm 0.5", "test"), ("label smoothing 0.6", "test")),
    ],
)
def test_what_is_called_right_was_measured(chapter, part, better, worse):
    """The recorded studies bear it out. Accumulation is exact, which chapter 4 shows."""
    gains = measured(chapter, part, *better) - measured(chapter, part, *worse)
    assert mean_interval(gains).low > 0


# A plan of small runs

SMALL_GRID = [(n, d) for n in (2.5e5, 5e5, 2e6) for d in (5e6, 1e7, 4e7)]


@pytest.mark.parametrize(
    "answer",
    [
        PLAN,
        {**PLAN, "rates": "Transferred", "seeds": 5},
        {**PLAN, "fitted": np.array(PLAN["fitted"]), "held out": ((8e6, 1.6e8),), "seeds": np.int64(3)},
        {**PLAN, "fitted": SMALL_GRID, "held out": [(4e6, 8e7), (8e6, 8e7)], "rates": 4, "seeds": 5.0},
        {**PLAN, "fitted": product((5e5, 1e6, 4e6), (1e7, 2e7, 8e7))},
        {**PLAN, "schedule": "Ends with each run."},
    ],
)
def test_a_good_plan_passes(answer):
    found = check("17.6", answer)
    assert found.state == "passed", found


DIAGONAL = [(5e5 * 2**k, 1e7 * 2**k) for k in range(6)]
COUNTER = [(5e5 * 2**k, 3.2e8 / 2**k) for k in range(6)]


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        ({"fitted": DIAGONAL}, "the more examples it sees .*1.00", "Hold one fixed"),
        ({"fitted": COUNTER}, "the fewer examples it sees .*-1.00", "Hold one fixed"),
        ({"fitted": PLAN["fitted"][:5]}, "5 different runs are fitted", "Hold one fixed"),
        ({"fitted": PLAN["fitted"][:5] * 2}, "5 different runs are fitted", "Hold one fixed"),
        ({"fitted": list(product((1e6, 2e6, 4e6), (1e7, 2e7, 8e7)))}, "parameters .* by a factor of 4", "slope"),
        ({"fitted": list(product((1e6, 2e6, 8e6), (1e7, 2e7, 7e7)))}, "examples .* by a factor of 7", "slope"),
        ({"fitted": list(product((5e5, 4e6), (1e7, 2e7, 8e7)))}, "only two different numbers of parameters", "Two"),
        ({"fitted": list(product((5e5, 1e6, 4e6), (1e7, 8e7)))}, "only two different numbers of examples", "Two"),
        ({"fitted": [*PLAN["fitted"], (100, 1e7)]}, "'fitted' has a run of 100 parameters: .* thousandth", "little"),
        ({"fitted": [*PLAN["fitted"], (1e6, 1e3)]}, "'fitted' has a run of 1000 examples: .* thousandth", "little"),
        ({"fitted": [*PLAN["fitted"], (1e6, -1e7)]}, "should be above 0", "For instance"),
        ({"fitted": [*PLAN["fitted"], (1e6, math.nan)]}, "should be above 0", "For instance"),
        ({"fitted": "all of them"}, "'fitted' should be a list of runs", "For instance"),
        ({"fitted": [1e6, 2e6]}, "'fitted' should be a list of runs", "For instance"),
        ({"held out": (8e6, 1.6e8)}, "'held out' should be a list of runs", "For instance"),
        ({"held out": []}, "no run is held out", "not be fitted, but foretold"),
        ({"held out": [(4e6, 8e7)]}, "takes 1 times the operations of the largest .* at least 2", "Where will the law"),
        ({"held out": [(8e6, 1.6e8), (1e6, 2e7)]}, "takes 0.062 times the operations", "Where will the law"),
        ({"seeds": 1}, "1 seed a size", "two runs"),
        ({"seeds": 2}, "2 seeds a size", "two runs"),
        ({"seeds": 2.5}, "'seeds' should be a whole number", "For instance"),
        ({"seeds": True}, "'seeds' should be a whole number", "For instance"),
        ({"seeds": "many"}, "'seeds' should be a whole number", "For instance"),
        ({"rates": 1}, "1 rate at each size", "Chapter 3"),
        ({"rates": 2}, "2 rates at each size", "Chapter 3"),
        ({"rates": "guessed"}, "'rates' should be a whole number", "For instance"),
        ({"schedule": "one long run, read on the way"}, "half of a long run is not", "cosine for 15"),
        ({"schedule": "constant"}, "wherever its noise happens to be", "cosine for 15"),
        ({"schedule": "cosine"}, "there is no schedule 'cosine'", "'ends with each run', 'one long run"),
        ({"schedule": 1}, "there is no schedule 1", "'ends with each run', 'one long run"),
        ({"held out": [(1.6e7, 1.6e8)]}, "operations, and a tenth of the large run's are 1.2e.17", "four times"),
        ({"seeds": 6}, "operations, and a tenth of the large run's", "four times"),
        ({"rates": 6}, "operations, and a tenth of the large run's", "four times"),
        ({"other": 3}, "expected a dict with 'fitted', 'held out', 'seeds', 'rates', 'schedule'", "For instance"),
    ],
)
def test_what_is_wrong_with_a_plan_is_told(change, message, hint):
    checking.assert_hinted("17.6", {**PLAN, **change}, message, hint)


def test_a_tenth_of_the_operations_may_be_spent_and_no_more(monkeypatch):
    runs = PLAN["fitted"] + PLAN["held out"]
    by_hand = sum(6 * n * d for n, d in runs) * (3 + 3)
    monkeypatch.setattr(chapter_17, "BUDGET", by_hand)
    assert check("17.6", PLAN).state == "passed"
    monkeypatch.setattr(chapter_17, "BUDGET", by_hand * 0.999)
    assert check("17.6", PLAN).state == "not yet right"
    transferred = sum(6 * n * d for n, d in runs) * 3 + 3 * 6 * 5e5 * 1e7
    monkeypatch.setattr(chapter_17, "BUDGET", transferred)
    assert check("17.6", {**PLAN, "rates": "transferred"}).state == "passed"
    monkeypatch.setattr(chapter_17, "BUDGET", transferred * 0.9999)
    assert check("17.6", {**PLAN, "rates": "transferred"}).state == "not yet right"


@pytest.mark.parametrize("answer", [..., dict.fromkeys(PLAN, ...), {**PLAN, "rates": ...}, {**PLAN, "fitted": [...]}])
def test_a_plan_that_is_not_made_is_not_attempted(answer):
    checking.assert_not_attempted("17.6", answer)


@pytest.mark.parametrize("exercise", ["17.4", "17.5", "17.6"])
@pytest.mark.parametrize("answer", [3, "a", [1, 2], {}, {"a": 1}, len])
def test_an_answer_of_another_kind_is_told_what_is_wanted(exercise, answer):
    checking.assert_hinted(exercise, answer, "expected a dict", "For instance")


# The notebook's own


@needs_the_notebook
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6, 8])
def test_the_printed_solutions_pass(number):
    exercise = f"17.{number}"
    assert exercise in checking.asked(NOTEBOOK)
    checking.assert_printed_solution_passes(NOTEBOOK, exercise, np=np, math=math)


@needs_the_notebook
def test_the_buggy_function_of_the_notebook_has_the_bug():
    read = nbformat.read(checking.NOTEBOOKS / NOTEBOOK, as_version=4)
    (cell,) = [cell.source for cell in read.cells if cell.cell_type == "code" and "def energy" in cell.source]
    names = {}
    exec(cell.split("check(")[0], names)
    assert check("17.2", names["energy"]).message.startswith("the operations are multiplied by the utilisation")
    assert [round(energy(1e20, 1e15, 0.4, 1000, 1.2)) for energy in (names["energy"], by_hours)] == [13, 83]


@needs_the_notebook
def test_the_notebook_names_what_there_is_to_choose_from():
    read = nbformat.read(checking.NOTEBOOKS / NOTEBOOK, as_version=4)
    (text,) = [cell.source for cell in read.cells if "which technique first?**" in cell.source]
    assert all(technique in text for technique in TECHNIQUES)
    assert all(f"| {situation} |" in text for situation in SITUATIONS)
