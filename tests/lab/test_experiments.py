"""Comparisons: intervals against an independent reference, pairing, and arms that share their seeds."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from course_lib.lab.experiments import Comparison, Interval, Reach, compare, mean_interval
from course_lib.lab.training import Diverged, History, fit
from course_lib.proving.leftovers import Traces
from tests.lab.test_training import RECIPE, blobs, network, weights

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("COURSE_DEVICE", "cpu")


def test_interval_is_that_of_scipy():
    values = np.random.default_rng(0).normal(3, 2, 7)
    got = mean_interval(values)
    low, high = stats.t.interval(0.95, 6, loc=values.mean(), scale=stats.sem(values))
    assert (got.mean, got.low, got.high, got.n) == pytest.approx((values.mean(), low, high, 7))


def test_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(1)
    hits = [i.low < 3 < i.high for i in (mean_interval(generator.normal(3, 2, 5)) for _ in range(4000))]
    assert 0.94 < np.mean(hits) < 0.96  # a normal interval in place of Student's would give 0.88


@pytest.mark.parametrize("wrong", [{"values": [1.0]}, {"values": [1.0, 2.0], "confidence": 95}])
def test_interval_refuses(wrong):
    with pytest.raises(ValueError, match="values|confidence=95"):
        mean_interval(**wrong)


def test_nan_has_no_mean():
    assert np.isnan(mean_interval([1.0, np.nan]).mean)


def test_differences_are_paired_by_seed():
    luck = np.array([0.1, 0.3, 0.2, 0.5, 0.4])  # what a seed adds to both arms cancels out
    noise = np.array([0.001, -0.001, 0.0, 0.002, -0.002])
    measured = Comparison("score", (0, 1, 2, 3, 4), {"a": luck, "b": luck + 0.01 + noise}, {"a": [], "b": []})
    gap = measured.difference("b", "a")
    low, high = stats.t.interval(0.95, 4, loc=0.01, scale=stats.sem(noise))
    assert (gap.low, gap.high) == pytest.approx((low, high))
    assert gap.excludes_zero
    assert not Interval(0.0, -1.0, 1.0, 5).excludes_zero
    assert measured.interval("a").high > measured.interval("b").mean  # unpaired, nothing would be seen


def test_recipes_share_first_weights_and_batches():
    first = []

    def model() -> nn.Module:
        net = network_unseeded()
        first.append(weights(net))
        return net

    def network_unseeded() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))

    measured = compare({"a": RECIPE, "b": RECIPE}, model=model, data=blobs(), seeds=[4, 7])
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])
    assert np.array_equal(measured.values["a"], measured.values["b"])
    assert measured.seeds == (4, 7)


def test_value_is_the_last_epoch_or_the_test_split():
    recipes = {"a": RECIPE}
    by_val = compare(recipes, model=lambda: network(1), data=blobs(), seeds=2, metric="val_loss")
    assert by_val.values["a"][0] == by_val.histories["a"][0]["val_loss"][-1]
    by_test = compare(recipes, model=lambda: network(1), data=blobs(), seeds=2, metric="test_accuracy")
    net = network(1)
    fit(net, blobs(), RECIPE, seed=0)
    right = (net.eval()(normalised_test()).argmax(1) == blobs().test.labels).double().mean().item()
    assert by_test.values["a"][0] == pytest.approx(right)


def normalised_test() -> torch.Tensor:
    return (blobs().test.images / 255 - 0.3) / 0.2


def test_float64_arms_draw_their_weights_in_float64():
    seen = []

    def model() -> nn.Module:
        seen.append(torch.get_default_dtype())
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))

    compare({"a": replace(RECIPE, precision="float64")}, model=model, data=blobs(), seeds=2)
    assert seen == [torch.float64] * 2
    assert torch.get_default_dtype() == torch.float32


def test_runs_may_be_functions():
    history = History([{"epoch": 1, "val_accuracy": 0.5}])
    measured = compare({"number": lambda seed: seed * 2.0, "history": lambda seed: history}, seeds=3)
    assert measured.values["number"].tolist() == [0, 2, 4]
    assert measured.values["history"].tolist() == [0.5] * 3


def test_a_run_that_diverges_is_reported_not_hidden():
    def run(seed: int) -> float:
        if seed == 1:
            raise Diverged(float("nan"), 1, 1, 0.1)
        return 0.9

    measured = compare({"steady": lambda seed: 0.8 + seed / 100, "wild": run}, seeds=3)
    assert np.isnan(measured.interval("wild").mean)
    assert measured.frame()["diverged"].tolist() == [0, 1]
    assert "1 of 3" in measured.table().to_html()


def test_other_errors_are_not_swallowed():
    with pytest.raises(ZeroDivisionError):
        compare({"a": lambda seed: 1 / 0}, seeds=2)


def test_table_sets_clear_differences_in_bold():
    values = {"base": np.array([0.5, 0.6, 0.7]), "clear": np.array([0.7, 0.8, 0.901]), "odd": np.array([0.9, 0.6, 0.4])}
    measured = Comparison("score", (0, 1, 2), values, {})
    html = measured.table().to_html()
    assert html.count("font-weight: bold") == 1
    assert "+0.200 [+0.199, +0.202]" in html
    frame = measured.frame(baseline="clear")
    assert frame.loc["base", "minus clear"] == pytest.approx(-0.2003, abs=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"arms": {"a": RECIPE}, "seeds": 1}, r"seeds=\(0,\)"), ({"arms": {"a": RECIPE}, "seeds": [3, 3]}, "different"),
     ({"arms": {}}, "at least one arm"), ({"arms": {"a": RECIPE}}, "needs model=")],
)  # fmt: skip
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        compare(**arguments)


def test_unknown_arm_is_named():
    measured = compare({"a": partial(float)}, seeds=2)
    with pytest.raises(ValueError, match="arm='b'.*'a'"):
        measured.interval("b")


# --- on all cores -----------------------------------------------------------------------------------------------------


def wide() -> nn.Module:
    """Wide enough that its products are cut differently among one thread and two."""
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 3))


def test_workers_change_no_bit_whatever_the_threads_of_this_process():
    arms = {"a": RECIPE, "b": replace(RECIPE, batch_size=32), "by hand": lambda seed: seed + torch.get_num_threads()}
    one, two = (compare(arms, model=wide, data=blobs(), seeds=[3, 5], workers=w, metric="val_loss") for w in (1, 2))
    for arm in arms:
        assert one.values[arm].tolist() == two.values[arm].tolist()
        assert [h.losses for h in one.histories[arm]] == [h.losses for h in two.histories[arm]]
    assert one.values["by hand"].tolist() == [4, 6]  # each run has one thread


def test_the_threads_of_this_process_are_as_before():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        compare({"a": lambda seed: 1.0}, seeds=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_names_its_arm_and_seed(workers):
    def breaks(seed: int) -> float:
        if seed == 7:
            raise KeyError("a key of mine")
        return 0.0

    with pytest.raises(KeyError, match="a key of mine") as caught:
        compare({"good": float, "bad": breaks}, seeds=[6, 7], workers=workers)
    assert caught.value.__notes__ == ["This happened in the arm 'bad', with seed 7."]


PROGRAM = """
    import os, sys, time
    from course_lib.lab.experiments import compare
    def slow(seed, folder=sys.argv[1]):
        open(f"{folder}/{os.getpid()}", "w").close()
        time.sleep(600)
    compare({"slow": slow}, seeds=4, workers=2)
"""


def test_ctrl_c_ends_every_worker(tmp_path):
    traces = Traces()
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path)]
    running = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | traces.environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    left = traces.left()
    traces.clear()
    assert "KeyboardInterrupt" in said
    assert not left


@pytest.mark.parametrize("workers", [0, -1, 1.5, "two"])
def test_a_bad_number_of_workers_is_named(workers):
    with pytest.raises(ValueError, match=f"workers={workers!r}: must be a whole number of at least 1"):
        compare({"a": float}, seeds=2, workers=workers)


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_any_function_of_the_trained_network_is_a_metric():
    def largest_weight(model: nn.Module, data) -> float:
        assert len(data.test) == 67
        return max(p.abs().max().item() for p in model.parameters())

    measured = compare({"a": RECIPE}, model=lambda: network(1), data=blobs(), seeds=2, metric=largest_weight)
    net = network(1)
    fit(net, blobs(), RECIPE, seed=0)
    assert measured.values["a"][0] == pytest.approx(max(p.abs().max().item() for p in net.parameters()), rel=1e-5)
    assert measured.metric == "largest weight"
    with pytest.raises(ValueError, match="needs the trained network"):
        compare({"a": lambda seed: History([{"epoch": 1}])}, seeds=2, metric=largest_weight)


def test_another_column_of_the_same_runs():
    recipe = replace(RECIPE, watch={"twice": lambda model, data: 2.0})
    measured = compare({"a": recipe}, model=lambda: network(1), data=blobs(), seeds=2)
    assert measured.by("twice").values["a"].tolist() == [2.0, 2.0]
    assert measured.by("val_loss").values["a"][1] == measured.histories["a"][1]["val_loss"][-1]
    with pytest.raises(ValueError, match="not every run of 'b' has a history"):
        compare({"b": float}, seeds=2).by("val_loss")


def run_of(accuracies: list[float]) -> History:
    rows = [{"epoch": k, "val_accuracy": a, "examples": 100.0 * k, "seconds": 2.0} for k, a in enumerate(accuracies, 1)]
    return History(rows)


@pytest.mark.parametrize(("cost", "spent"), [("examples", 300), ("seconds", 6), ("epoch", 3)])
def test_what_it_costs_to_reach_a_target(cost, spent):
    reach = Reach(0.9, cost=cost)
    assert reach(run_of([0.1, 0.85, 0.9, 0.7])) == (spent, True)
    assert reach(run_of([0.1, 0.2, 0.3])) == (spent, False)
    falling = History([{"epoch": 1, "val_loss": 0.5}, {"epoch": 2, "val_loss": 0.1}])
    assert Reach(0.2, column="val_loss", cost="epoch")(falling) == (2, True)


def test_a_target_that_was_not_reached_leaves_the_interval_open():
    runs = {"quick": [0.95, 0.95], "slow": [0.1, 0.95], "never": [0.1, 0.2]}
    arms = {name: lambda seed, accuracies=accuracies: run_of(accuracies) for name, accuracies in runs.items()}
    measured = compare(arms, seeds=2, metric=Reach(0.9))
    assert measured.metric == "examples to val accuracy 0.9"
    assert measured.interval("quick").high == 100
    assert measured.censored["never"].tolist() == [True, True]
    assert measured.interval("never").high == np.inf
    assert measured.difference("never", "slow").high == np.inf
    assert measured.difference("slow", "never").low == -np.inf
    assert measured.difference("slow", "never").high != np.inf
    html = measured.table().to_html()
    assert "&gt; " in html or "> " in html
    assert "not reached" in html


def test_an_unknown_cost_is_named():
    with pytest.raises(ValueError, match="cost='steps': must be 'examples', 'seconds' or 'epoch'"):
        Reach(0.9, cost="steps")


def test_a_metric_that_nobody_measured_is_named_after_one_run():
    with pytest.raises(KeyError, match=r"test_acc.*a history has the columns .*val_accuracy"):
        compare({"a": replace(RECIPE, epochs=1)}, model=network, data=blobs(), seeds=2, metric="test_acc", workers=1)


def test_curves_leave_out_an_arm_with_a_run_that_diverged_and_refuse_several_lengths():
    history = History([{"epoch": 1.0, "val_accuracy": 0.5}, {"epoch": 2.0, "val_accuracy": 0.6}], epochs=2)
    short = History([{"epoch": 1.0, "val_accuracy": 0.5}], epochs=1)
    values = {arm: np.array([0.5, 0.6]) for arm in ("whole", "broken")}
    found = Comparison("val accuracy", (0, 1), values, {"whole": [history] * 2, "broken": [history, History()]})
    assert len(found.curves().lines) == 1
    with pytest.raises(ValueError, match="not every run of 'broken' has a history"):
        found.by("val_accuracy")
    uneven = Comparison("val accuracy", (0, 1), values, {"whole": [history, short]})
    with pytest.raises(ValueError, match=r"column='val_accuracy': must be of runs of one length; 'whole' has \[1, 2\]"):
        uneven.curves()
