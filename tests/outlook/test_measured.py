"""Figures read from studies, against sums over the rows of their files written out."""

import json
import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
from scipy import stats

from course_lib.lab.experiments import Interval
from course_lib.lab.studies import StudyOutdated
from course_lib.outlook import measured
from course_lib.outlook.findings import FINDINGS
from course_lib.outlook.measured import Best, FromCurve, Points, Times, by_seed, verdict
from tests.outlook.rows import rows, values


def t_interval(numbers):
    """Mean and Student's interval, from scipy."""
    numbers = np.asarray(numbers)
    low, high = stats.t.interval(0.95, len(numbers) - 1, numbers.mean(), stats.sem(numbers))
    return [numbers.mean(), low, high]


def three(interval):
    return [interval.mean, interval.low, interval.high]


def finding(technique):
    (found,) = (f for f in FINDINGS if f.technique.startswith(technique))
    return found


def test_points_are_differences_within_a_seed():
    gaps = [100 * (a - b) for a, b in zip(values("12", "run", "plain mean", "mean"),
                                          values("12", "run", "cosine", "last"), strict=True)]  # fmt: skip
    found = Points("12", "run", "plain mean", "cosine", of="mean", other_of="last").interval
    assert three(found) == pytest.approx(t_interval(gaps), abs=1e-9)
    assert found.n == 5
    assert three(finding("Average the weights").gain.interval) == pytest.approx(t_interval(gaps), abs=1e-9)


def test_points_where_less_is_better_are_turned_round():
    measured_points = Points("14", "budget", "sixteen of 8", "sixteen of 8", of="ece, one temperature", other_of="ece")
    turned = Points(
        "14", "budget", "sixteen of 8", "sixteen of 8", of="ece, one temperature", other_of="ece", lower=True
    )
    assert turned.interval.mean == pytest.approx(-measured_points.interval.mean)
    assert turned.interval.low == pytest.approx(-measured_points.interval.high)


def test_ratios_are_averaged_in_logarithms():
    mine = values("16", "text", "one call for attention", "seconds")
    theirs = values("16", "text", "Muon", "seconds")
    logs = [math.log(b / a) for a, b in zip(mine, theirs, strict=True)]
    found = Times("16", "text", "one call for attention", "Muon", of="seconds").interval
    assert three(found) == pytest.approx(np.exp(t_interval(logs)), rel=1e-9)
    assert three(finding("Attention in one call").gain.interval) == pytest.approx(np.exp(t_interval(logs)), rel=1e-9)


def test_a_ratio_of_numbers_that_never_differ_has_no_interval_in_words():
    (student,) = {row["value"]["parameters"] for row in rows("15") if row["arm"] == "shuffle_unit"}
    (full,) = {row["value"]["parameters"] for row in rows("15") if row["arm"] == "full"}
    found = Times("15", "blocks", "shuffle_unit", "full", of="parameters", what="times fewer")
    assert three(found.interval) == pytest.approx([full / student] * 3)
    assert str(found) == f"{full / student:.3g} times fewer"


def test_two_parts_and_a_number_that_has_no_name():
    gaps = np.array(values("08", "criteria", "magnitude", "0.9")) - np.array(values("08", "sizes", "large"))
    assert three(finding("Prune single weights").price.interval) == pytest.approx(t_interval(100 * gaps), abs=1e-9)


def test_a_tuned_arm_is_the_candidate_that_its_tuning_chose():
    def tuned(arm):
        own = [row for row in rows("02") if row["part"] == "cifar10" and row["arm"] == arm and row["tuning"]]
        by_rate = {}
        for row in own:
            by_rate.setdefault(row["candidate"], []).append(-1 if row["value"] is None else row["value"])
        best = max(by_rate, key=lambda rate: sum(by_rate[rate]))
        return np.array(values("02", "cifar10", arm, candidate=best))

    gaps = 100 * (tuned("Adam") - tuned("momentum"))
    assert three(finding("Adam in place").gain.interval) == pytest.approx(t_interval(gaps), abs=1e-9)


def test_the_seeds_that_choose_a_strength_report_nothing():
    arms = sorted({row["arm"] for row in rows("05") if row["part"] == "noisy" and row["arm"].startswith("max-norm")})
    assert len(arms) == 3
    best = max(arms, key=lambda arm: sum(values("05", "noisy", arm, "val", seeds=(100, 101))))
    gaps = 100 * (np.array(values("05", "noisy", best, "test")) - np.array(values("05", "noisy", "nothing", "test")))
    found = finding("Hold the length").gain
    assert three(found.interval) == pytest.approx(t_interval(gaps), abs=1e-9)
    assert set(by_seed("05", "noisy", found.arm, "test")) == {0, 1, 2, 3, 4}


def test_seeds_that_chose_are_left_out_of_arms_without_a_choice():
    gaps = np.array(values("05", "clean", "flips and shifts", "test")) - np.array(
        values("05", "clean", "nothing", "test")
    )
    assert three(finding("Flip and shift").gain.interval) == pytest.approx(t_interval(100 * gaps), abs=1e-9)


def test_steps_to_a_loss_at_the_best_rate_of_each_batch_size():
    def steps(size):
        arm = f"momentum, {size}"
        rates = [name for name in values("04", "momentum", arm, seeds=(0,))[0] if name.startswith("0.2 at ")]
        at = {rate: values("04", "momentum", arm, rate, seeds=(100, 101)) for rate in rates}
        best = min(rates, key=lambda rate: sum(at[rate]))
        return np.array(values("04", "momentum", arm, best))

    few, many = steps(256), steps(32)
    found = finding("Larger batches")
    assert three(found.gain.interval) == pytest.approx(np.exp(t_interval(np.log(many / few))), rel=1e-9)
    examples = np.log(256 * few / (32 * many))
    assert three(found.price.interval) == pytest.approx(np.exp(t_interval(examples)), rel=1e-9)


def test_a_number_chosen_on_another_arm():
    rates = list(values("03", "width", "usual, 64", seeds=(0,))[0])
    best = max(rates, key=lambda rate: sum(values("03", "width", "usual, 64", rate)))
    gaps = np.array(values("03", "width", "muP, 1024", best)) - np.array(values("03", "width", "usual, 1024", best))
    assert three(finding("Tune the rate on a narrow").gain.interval) == pytest.approx(t_interval(100 * gaps), abs=1e-9)


def test_patience_by_hand_on_the_curves_of_the_file():
    saved, accuracy = [], []
    for run in values("06", "cifar10", "plain"):
        losses, best, epoch = run["val_loss"], 0, 0
        for epoch, loss in enumerate(losses):
            best = epoch if loss < losses[best] else best
            if epoch - best == 3:
                break
        saved.append(math.log(len(losses) / (epoch + 1)))
        accuracy.append(100 * (run["test_accuracy"][best] - run["test_accuracy"][-1]))
    found = finding("Stop when validation loss")
    assert three(found.gain.interval) == pytest.approx(np.exp(t_interval(saved)), rel=1e-9)
    assert three(found.price.interval) == pytest.approx(t_interval(accuracy), abs=1e-9)


def test_a_choice_takes_the_lowest_where_that_is_best_and_never_what_did_not_arrive(monkeypatch):
    found = {"a": {0: 1.0, 1: 5.0}, "b": {0: math.inf, 1: 2.0}, "c": {0: 3.0, 1: 4.0}}
    choose = measured._first
    assert choose(Best(("a", "b", "c"), (0,), lowest=True), found) == "a"
    assert choose(Best(("a", "b", "c"), (0,)), found) == "c"
    assert choose(Best(("a", "b", "c"), (0, 1)), found) == "c"


@dataclass(frozen=True)
class Known:
    """A measured number that is known beforehand."""

    low: float
    high: float
    nothing: float

    @property
    def interval(self):
        return Interval((self.low + self.high) / 2, self.low, self.high, 5)


@pytest.mark.parametrize(
    ("low", "high", "nothing", "said"),
    [
        (0.1, 2.0, 0.0, "gain"),
        (-2.0, -0.1, 0.0, "loss"),
        (-0.1, 2.0, 0.0, "cannot be told"),
        (1.1, 2.0, 1.0, "gain"),
        (0.5, 0.9, 1.0, "loss"),
        (0.9, 1.1, 1.0, "cannot be told"),
        (math.nan, math.nan, 0.0, "cannot be told"),
    ],
)
def test_verdict(low, high, nothing, said):
    assert verdict(Known(low, high, nothing)) == said


def test_words_have_signs_and_no_signed_zero():
    assert [measured._signed(number) for number in (1.26, -0.34, 0.04, -0.04)] == ["+1.3", "−0.3", "0.0", "0.0"]
    assert [measured._ratio(number) for number in (0.7061, 5.0, 11.91, 117.58)] == ["0.706", "5", "11.9", "118"]


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="part='cifar'.*'mnist', 'cifar10'"):
        Points("02", "cifar", "Adam", "momentum").values()
    with pytest.raises(ValueError, match="arm='Adamant'.*'Adam'"):
        Points("02", "cifar10", "Adamant", "momentum").values()
    with pytest.raises(ValueError, match="of='accurracy'.*'accuracy'"):
        Points("15", "blocks", "full", "bottleneck", of="accurracy").values()
    with pytest.raises(ValueError, match="no study"):
        Points("00", "mnist", "a", "b").values()
    with pytest.raises(ValueError, match="seeds=.*at least two"):
        Points("02", "cifar10", "Adam", "momentum", leave_out=(0, 1, 2, 3)).values()


def test_what_other_code_found_is_refused(monkeypatch, tmp_path):
    file = tmp_path / "chapter_08.jsonl"
    spoiled = [row | {"fingerprint": "other"} if row["arm"] == "cut down" else row for row in rows("08")]
    file.write_text("".join(json.dumps(row) + "\n" for row in ({"session": 1, "date": "", "device": "", "torch": "",
                    "threads": 1}, *spoiled)), encoding="utf-8")  # fmt: skip
    monkeypatch.setattr(measured, "study_file", lambda chapter: file)
    measured._recorded.cache_clear()
    try:
        with pytest.raises(StudyOutdated, match="other code"):
            Points("08", "sizes", "cut down", "large").values()
        assert len(Points("08", "sizes", "small from the start", "large").values()[0]) == 5
    finally:
        measured._recorded.cache_clear()


def test_the_caption_is_the_studys():
    assert Points("08", "sizes", "cut down", "large").caption.startswith("ResNets on CIFAR-10 with 10,000 labels")
    curve = FromCurve(partial(max, key=None), beside="test")
    assert Times("06", "cifar10", "plain", "plain", of=curve).caption.startswith("Convolutional network on CIFAR-10")
