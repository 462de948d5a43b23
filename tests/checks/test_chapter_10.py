"""Checks of chapter 10: other right answers pass, mistakes that stand in no table are told too, solutions pass."""

import functools
import itertools
import math
import re
import sys

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_lib import partitioning as pt
from course_lib.checks import chapter_10
from course_lib.lab.exercises import check
from tests.checks import checking

pytestmark = pytest.mark.usefixtures("unknown_learner")

NOTEBOOK = "10_model_partitioning.ipynb"

METHODS = {f"10.{number}": getattr(chapter_10, f"exercise_{number}") for number in (1, 2, 3, 4, 6)}
gpipe_seconds, one_f_one_b, row_parallel, best_bottleneck, slots = (method.right for method in METHODS.values())


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def impatient(monkeypatch):
    """A loop without end is told sooner."""
    monkeypatch.setattr(chapter_10, "PATIENCE", 300_000)


# Other right answers


def by_the_clock(stages, m):
    """When each stage ends each pass, one after the other."""
    last = 0.0
    for times in ([f for f, _ in stages], [b for _, b in reversed(stages)]):
        free = [last] * len(stages)
        for _ in range(m):
            end = last
            for stage, seconds in enumerate(times):
                end = free[stage] = max(end, free[stage]) + seconds
        last = end
    return last


def by_the_course(stages, m):
    forward, backward = ([stage[which] for stage in stages] for which in (0, 1))
    return pt.timeline(pt.gpipe(len(stages), m), pt.Costs(forward, backward, 0.0)).makespan


def by_numpy(stages, m):
    return (np.sum(stages, axis=0) + (m - 1) * np.max(stages, axis=0)).sum()


def by_torch(stages, m):
    times = torch.tensor(stages)
    return times.sum() + (m - 1) * times.amax(0).sum()


def filled_up_first(rank, ranks, m):
    """One more at first, and then the backward pass first."""
    tasks, done = [], 0
    for b in range(m):
        tasks.append(f"F{b}")
        if b >= ranks - rank - 1:
            tasks.append(f"B{done}")
            done += 1
    return (*tasks, *(f"B{b}" for b in range(done, m)))


def from_the_course(rank, ranks, m):
    return [f"{task.kind}{task.batch}" for task in pt.one_f_one_b(ranks, m).ranks[rank]]


def parts_of_the_layer(x, linear, rank, ranks):
    return F.linear(x.chunk(ranks, dim=-1)[rank], linear.weight.chunk(ranks, dim=1)[rank])


def with_a_share_of_the_bias(x, linear, rank, ranks, all_reduce):
    bias = 0.0 if linear.bias is None else linear.bias / ranks
    return all_reduce(parts_of_the_layer(x, linear, rank, ranks) + bias)


def with_the_bias_on_rank_0(x, linear, rank, ranks, all_reduce):
    columns = linear.weight.chunk(ranks, dim=1)[rank]
    return all_reduce(F.linear(x.chunk(ranks, dim=-1)[rank], columns, linear.bias if rank == 0 else None))


def with_masked_columns(x, linear, rank, ranks, all_reduce):
    """Zeros for the other ranks' part of the input, and every rank-th column."""
    mine = torch.arange(x.shape[-1]) % ranks == rank
    total = all_reduce((x * mine) @ linear.weight.T)
    return total if linear.bias is None else total + linear.bias


def alone_on_a_single_rank(x, linear, rank, ranks, all_reduce):
    return linear(x) if ranks == 1 else with_the_bias_on_rank_0(x, linear, rank, ranks, all_reduce)


def with_two_sums(x, linear, rank, ranks, all_reduce):
    """The second needs the first."""
    total = all_reduce(parts_of_the_layer(x, linear, rank, ranks))
    bias = torch.zeros_like(total) if linear.bias is None or rank else linear.bias.expand(total.shape)
    return all_reduce(bias + total / ranks)


def halving(costs, parts):
    low, high = max(costs), sum(costs)
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        stages, stage = 1, 0.0
        for cost in costs:
            stages, stage = (stages + 1, cost) if stage + cost > middle else (stages, stage + cost)
        low, high = (low, middle) if stages <= parts else (middle, high)
    return high


def remembered(costs, parts):
    @functools.cache
    def best(n, k):
        if k == 1:
            return sum(costs[:n])
        return min(max(best(j, k - 1), sum(costs[j:n])) for j in range(k - 1, n))

    return best(len(costs), parts)


def in_plain_python(costs, parts):
    """A table, with a loop even for the sums of what is added to."""
    n = len(costs)
    best = [sum(costs[:end]) for end in range(n + 1)]
    for _ in range(parts - 1):
        new = [math.inf] * (n + 1)
        for end in range(1, n + 1):
            stage = 0.0
            for start in range(end - 1, -1, -1):
                stage += costs[start]
                new[end] = min(new[end], max(best[start], stage))
        best = new
    return best[n]


def cut_by_the_course(costs, parts):
    return pt.bottleneck(costs, pt.balanced_cuts(costs, parts))


def sorted_by_expert(experts, E, capacity):
    order = experts.argsort(stable=True)
    counts = experts.bincount(minlength=E)
    place = torch.empty_like(experts)
    place[order] = torch.arange(len(experts)) - (counts.cumsum(0) - counts)[experts[order]]
    return torch.where(place < capacity, experts * capacity + place, torch.tensor(-1))


def expert_by_expert(experts, E, capacity):
    """A loop over experts is none over tokens."""
    found = torch.full_like(experts, -1)
    for expert in range(E):
        tokens = (experts == expert).nonzero()[:capacity, 0]
        found[tokens] = expert * capacity + torch.arange(len(tokens))
    return found


def each_against_each(experts, E, capacity):
    place = (experts[:, None] == experts).tril(-1).sum(1)
    return (experts * capacity + place).masked_fill(place >= capacity, -1)


def slots_by_numpy(experts, E, capacity):
    e = experts.numpy()
    place = np.cumsum(np.eye(E, dtype=int)[e], axis=0)[np.arange(len(e)), e] - 1
    return np.where(place < capacity, e * capacity + place, -1)


def slots_by_the_course(experts, E, capacity):
    routes = pt.route(10.0 * F.one_hot(experts, E), 1, capacity)
    return torch.full_like(experts, -1).index_copy(0, routes.token, routes.places)


@pytest.mark.parametrize(
    ("exercise", "answer"),
    [
        ("10.1", by_the_clock),
        ("10.1", by_the_course),
        ("10.1", by_numpy),
        ("10.1", by_torch),
        ("10.2", filled_up_first),
        ("10.2", from_the_course),
        ("10.3", with_a_share_of_the_bias),
        ("10.3", with_the_bias_on_rank_0),
        ("10.3", with_masked_columns),
        ("10.3", alone_on_a_single_rank),
        ("10.3", with_two_sums),
        ("10.4", halving),
        ("10.4", remembered),
        ("10.4", in_plain_python),
        ("10.4", cut_by_the_course),
        ("10.4", lambda costs, parts: torch.tensor(best_bottleneck(costs, parts))),
        ("10.6", sorted_by_expert),
        ("10.6", expert_by_expert),
        ("10.6", each_against_each),
        ("10.6", slots_by_numpy),
        ("10.6", slots_by_the_course),
        ("10.6", lambda *case: slots(*case).int()),
    ],
)
def test_other_right_answers_pass(exercise, answer):
    found = check(exercise, answer)
    assert found.state == "passed", found


# Usual mistakes


def with_an_odd_end(rank, ranks, m):
    tasks = one_f_one_b(rank, ranks, m)
    return [*tasks[:-2], *tasks[:-3:-1]] if rank == 1 else tasks


def bias_taken_off(x, linear, rank, ranks, all_reduce):
    bias, linear.bias = linear.bias, None
    total = all_reduce(parts_of_the_layer(x, linear, rank, ranks))
    return total if bias is None else total + bias


def bias_divided_in_place(x, linear, rank, ranks, all_reduce):
    if linear.bias is not None:
        with torch.no_grad():
            linear.bias /= ranks
    return all_reduce(parts_of_the_layer(x, linear, rank, ranks) + (0 if linear.bias is None else linear.bias))


def always_a_bias(x, linear, rank, ranks, all_reduce):
    return all_reduce(parts_of_the_layer(x, linear, rank, ranks)) + linear.bias


def rank_0_alone_sums(x, linear, rank, ranks, all_reduce):
    own = parts_of_the_layer(x, linear, rank, ranks)
    return all_reduce(own) if rank == 0 else own


def other_shapes(x, linear, rank, ranks, all_reduce):
    own = parts_of_the_layer(x, linear, rank, ranks)
    all_reduce(own[rank:])
    return own


def a_number_to_sum(x, linear, rank, ranks, all_reduce):
    return all_reduce(1.0) * parts_of_the_layer(x, linear, rank, ranks)


def averaged_whole(x, linear, rank, ranks, all_reduce):
    return all_reduce(linear(x)) / ranks


def all_cuts(costs, parts):
    n = len(costs)
    cuts = itertools.combinations(range(1, n), parts - 1)
    return min(max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *each, n))) for each in cuts)


def asked_again_and_again(costs, parts):
    if parts == 1:
        return sum(costs)
    last = range(parts - 1, len(costs))
    return min(max(asked_again_and_again(costs[:j], parts - 1), sum(costs[j:])) for j in last)


def for_ever(costs, parts):
    while parts:
        costs = costs[:]
    return 0.0


def token_by_token(experts, E, capacity):
    count, found = [0] * E, []
    for expert in experts.tolist():
        found.append(expert * capacity + count[expert] if count[expert] < capacity else -1)
        count[expert] += 1
    return torch.tensor(found)


def counted_for_each(experts, E, capacity):
    place = torch.stack([(experts[:t] == expert).sum() for t, expert in enumerate(experts)])
    return torch.where(place < capacity, experts * capacity + place, -1)


MISTAKES = [
    ("10.1", lambda stages, m: gpipe_seconds(stages, m) * 1e3, "the time is not right", "last stage begin its first"),
    ("10.1", lambda stages, m: np.max(stages, axis=0) * m, r"the time should have shape \[\]", "last stage"),
    ("10.2", with_an_odd_end, "rank 1 does B7 as its task number 15, too early", "come"),
    ("10.2", lambda *case: [*one_f_one_b(*case), "F0"], "rank 0 does F0 2 times", "one F and one B"),
    ("10.2", lambda *case: one_f_one_b(*case)[:-1], "rank 0 never does B7", "one F and one B"),
    ("10.2", lambda *case: [*one_f_one_b(*case), "B8"], "rank 0 is to do B8, and the micro-batches are 0 to 7", "only"),
    ("10.2", lambda *case: one_f_one_b(*case)[::-1], "rank 0 does B0 before F0", "backward pass need"),
    ("10.2", lambda *case: " ".join(one_f_one_b(*case)), "a list of strings, and this is of type str", "For instance"),
    ("10.2", lambda *case: [each.lower() for each in one_f_one_b(*case)], "'f0', and that is no task", "For instance"),
    ("10.2", lambda rank, *case: pt.one_f_one_b(*case).ranks[rank], "one is of type Task", "For instance"),
    ("10.2", lambda rank, *case: pt.one_f_one_b(*case), "and this is of type Schedule", "For instance"),
    ("10.3", bias_taken_off, r"changes the layer that it was handed \(on 3 ranks\)", "writes into linear"),
    ("10.3", bias_divided_in_place, "changes the layer", "writes into linear"),
    ("10.3", always_a_bias, r"raised TypeError.*\(on 2 ranks, and a layer without a bias\)", "takes None for a bias"),
    ("10.3", rank_0_alone_sums, "call all_reduce as often: rank 0 1×, rank 1 0×", "needs all of them"),
    ("10.3", other_shapes, "cannot be added up", "tensors of one shape"),
    ("10.3", a_number_to_sum, "cannot be added up", "tensors of one shape"),
    ("10.3", averaged_whole, "each rank computes the whole layer: nothing is shared out", "its own columns"),
    ("10.3", lambda *case: 2 * row_parallel(*case), "what rank 0 returns is not right", "a bias of 1"),
    ("10.3", lambda *case: row_parallel(*case)[0], r"what rank 0 returns should have shape \[4, 6\]", "a bias of 1"),
    ("10.3", lambda *case: row_parallel(*case) * (case[2] < 2), "what rank 2 returns is not right", "a bias of 1"),
    ("10.4", lambda costs, parts: pt.balanced_cuts(costs, parts), "should have shape", "closed a layer earlier"),
    ("10.4", lambda costs, parts: 1.1 * best_bottleneck(costs, parts), "whose dearest stage is cheaper", "earlier"),
    ("10.4", lambda costs, parts: 0.9 * best_bottleneck(costs, parts), "no cut makes the dearest stage", "Which cut"),
    ("10.4", lambda costs, parts: math.nan, "is not finite", "closed a layer earlier"),
    ("10.4", lambda costs, parts: cut_by_the_course([*map(round, costs)], parts), "no cut makes", "Which cut"),
    ("10.4", lambda costs, parts: best_bottleneck(sorted(costs), parts), "sorted first", "Print its stages"),
    ("10.4", lambda costs, parts: best_bottleneck(costs.sort() or costs, parts), "sorted first", "Print its stages"),
    ("10.6", lambda *case: slots(*case).float(), "no whole numbers", "makes a float"),
    ("10.6", lambda e, E, c: 2 * slots(e, E, c), "8 is no slot: there are 0 to 7, and -1 for", "first of expert 1"),
    ("10.6", lambda e, E, c: slots(e, E, c).clamp(max=6), "two tokens are sent to the same slot", "before this one"),
    ("10.6", lambda e, E, c: slots(e.flip(0), E, c), "token 2, which asks for expert 2, is sent to slot 2", "before"),
    ("10.6", lambda e, E, c: slots(e, E, c)[:, None], r"should have shape \[10\], and has \[10, 1\]", "before this"),
    ("10.6", token_by_token, r"3,000 tokens take more than 3,000 lines of Python.*\(on 3,000 tokens\)", "before this"),
    ("10.6", counted_for_each, "there is a loop over tokens", "before this one"),
    ("10.6", lambda e, E, c: slots(e, E, c).masked_fill_(e < 0, 0).clamp(min=0), "sent to slot 0", "no place"),
]  # fmt: skip


@pytest.mark.parametrize(("exercise", "answer", "message", "hint"), MISTAKES)
def test_other_mistakes_get_a_hint_of_their_own(exercise, answer, message, hint):
    checking.assert_hinted(exercise, answer, message, hint)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("answer", [all_cuts, asked_again_and_again])
def test_all_cuts_of_a_long_chain_take_too_long(answer):
    """They are right on the short ones."""
    told = r"not come to an end after 0\.3 million lines of Python \(on 200 layers, 8 stages\)"
    checking.assert_hinted("10.4", answer, told, "How many cuts of 200 layers")


@pytest.mark.usefixtures("impatient")
def test_a_loop_without_end_comes_to_one():
    before = sys.gettrace()
    checking.assert_hinted("10.4", for_ever, r"not come to an end.*\(on 10 layers, 3 stages\)", "How many cuts")
    assert sys.gettrace() is before


def test_the_bug_of_the_notebook_is_named():
    (code,) = [cell.source for cell in cells() if cell.cell_type == "code" and "def row_parallel" in cell.source]
    names = {"F": F, "check": lambda *handed: None}
    exec(code, names)
    told = "each rank brings the bias, and the sum has it as many times as there are ranks"
    checking.assert_hinted("10.3", names["row_parallel"], told, "a bias of 1")


def cells():
    return nbformat.read(checking.NOTEBOOKS / NOTEBOOK, as_version=4).cells


@pytest.mark.parametrize("exercise", METHODS)
@pytest.mark.parametrize(
    "odd",
    [
        lambda value: [value, None],
        lambda value: {"result": value},
        lambda value: "0.5",
        lambda value: math.nan,
        lambda value: [],
        lambda value: torch.zeros(2, 3, dtype=torch.bool),
    ],
    ids=["a ragged list", "a dict", "a string", "NaN", "nothing", "bool"],
)
def test_an_odd_result_gets_a_readable_remark(exercise, odd):
    found = check(exercise, lambda *inputs: odd(METHODS[exercise].right(*inputs)))
    assert found.state == "not yet right"
    assert len(found.message) > 20
    assert not re.search(r"raised|Traceback|object at", found.message), found


# What is right here


@pytest.mark.parametrize("seed", range(5))
def test_the_time_that_is_right_here_is_that_of_the_timeline(seed):
    draw = generator(seed)
    stages = [tuple(pair) for pair in torch.rand(3 + seed, 2, generator=draw, dtype=torch.float64).tolist()]
    for m in (1, 2, 7):
        assert gpipe_seconds(stages, m) == pytest.approx(by_the_course(stages, m))


def test_the_tables_that_are_right_here_are_the_course_s():
    for ranks, m in itertools.product(range(1, 6), range(1, 8)):
        assert [one_f_one_b(rank, ranks, m) for rank in range(ranks)] == [
            from_the_course(rank, ranks, m) for rank in range(ranks)
        ]


@pytest.mark.parametrize("on", chapter_10.exercise_3.cases)
def test_the_ranks_return_what_the_whole_layer_does(on):
    x, linear, ranks = chapter_10.exercise_3.cases[on]
    results, differ = chapter_10._on_all_ranks(row_parallel, x, linear, ranks)
    assert differ
    assert len(results) == ranks
    for result in results:
        torch.testing.assert_close(result, linear(x))


def test_layers_with_and_without_a_bias_are_seen():
    layers = [case[1] for case in chapter_10.exercise_3.cases.values()]
    assert {layer.bias is None for layer in layers} == {True, False}
    assert all(isinstance(layer, nn.Linear) for layer in layers)


@pytest.mark.parametrize("on", chapter_10.exercise_4.cases)
def test_the_cut_that_is_right_here_is_the_course_s(on):
    costs, parts = chapter_10.exercise_4.cases[on]
    assert best_bottleneck(costs, parts) == pytest.approx(cut_by_the_course(costs, parts))
    if len(costs) < 20:
        assert best_bottleneck(costs, parts) == pytest.approx(all_cuts(costs, parts))


@pytest.mark.parametrize("on", chapter_10.exercise_6.cases)
def test_the_slots_that_are_right_here_are_those_of_a_loop(on):
    case = chapter_10.exercise_6.cases[on]
    assert torch.equal(slots(*case), token_by_token(*case))
    assert ((slots(*case) < 0).any()) == (on != "room for all")


# A figure to read


def halved(stage):
    return chapter_10._figure(stage).makespan


def test_the_stage_that_is_right_is_the_one_that_shortens_the_step_most():
    gains = [halved(None) - halved(stage) for stage in range(4)]
    assert chapter_10.exercise_5.right == (str(gains.index(max(gains))), "a") == ("2", "a")
    assert max(gains) > 5 * sorted(gains)[-2]


def test_each_reason_is_true_of_one_rank_and_a_of_the_right_one():
    times, table = chapter_10._figure(), pt.one_f_one_b(4, 6)
    starts, ahead = [], []
    for rank in range(4):
        own = [span for span in times.spans if span.rank == rank]
        first = next(place for place, span in enumerate(own) if span.task.kind == "B")
        starts.append(own[0].start)
        ahead.append(sum(span.end - span.start for span in own[:first]))
    of = {"a": times.busy, "b": ahead, "c": starts, "d": pt.in_flight(table)}
    assert {letter: max(range(4), key=values.__getitem__) for letter, values in of.items()} == {
        "a": 2, "b": 0, "c": 3, "d": 0,
    }  # fmt: skip


def test_the_figure_is_the_notebook_s():
    (code,) = [cell.source for cell in cells() if cell.cell_type == "code" and "slow = pt.Costs(" in cell.source]
    drawn = {"pt": pt}
    exec(code, drawn)
    plt.close("all")
    costs = drawn["slow"]
    assert list(costs.forward) == list(costs.inputs) == list(costs.weights) == list(chapter_10._SECONDS)
    assert "pt.one_f_one_b(4, 6)" in code


@pytest.mark.parametrize("rank", [2, np.int64(2), torch.tensor(2), "2", " 2."])
def test_a_rank_may_be_a_number(rank):
    assert check("10.5", (rank, "a")).state == "passed"
    assert check("10.5", [rank, "A)"]).state == "passed"


@pytest.mark.parametrize(
    ("answer", "message", "hint"),
    [
        ((0, "a"), r"rank 0 is busy first.* from 41\.6 to 40\.1 only", "no white"),
        ((1, "b"), r"rank 1 is the second dearest.* from 41\.6 to 39\.8 only", "no white"),
        ((3, "c"), r"rank 3 waits most.* from 41\.6 to 40\.8 only", "no white"),
        ((2, "b"), "the rank is right, the reason is not: that holds for rank 0", "Try each reason"),
        ((2, "e"), "there is no reason 'e'", "a, b, c, d"),
        ((4, "a"), "there is no rank '4'", "There are 0, 1, 2, 3"),
        ((2.5, "a"), "the rank and the letter of a reason are wanted", 'For instance: 0, "a"'),
        ((2,), "the rank and the letter of a reason are wanted", 'For instance: 0, "a"'),
        ((), "the rank and the letter of a reason are wanted", 'For instance: 0, "a"'),
        ((torch.ones(2), "a"), "the rank and the letter of a reason are wanted", 'For instance: 0, "a"'),
    ],
)
def test_a_wrong_reading_is_told_what_halving_brings(answer, message, hint):
    checking.assert_hinted("10.5", answer, message, hint)


# The schedule


def greedy(*order):
    return lambda *case: chapter_10._greedy(*case, order)


def table(rule):
    """A schedule of what each rank does."""

    def schedule(ranks, m, held):
        tasks = ([pt.Task(kind, r, b) for kind, b in rule(r, ranks, m, held)] for r in range(ranks))
        return pt.Schedule("mine", ranks, m, tuple(map(tuple, tasks)))

    return schedule


@table
def as_1f1b(rank, ranks, m, held):
    """Fewer ahead, and each W at once."""
    ahead = min(ranks - rank - 1, m, held - 1)
    tasks = [("F", b) for b in range(ahead)]
    for b in range(m):
        tasks += [("F", b + ahead)] * (b + ahead < m) + [("I", b), ("W", b)]
    return tasks


@table
def in_groups(rank, ranks, m, held):
    """GPipe, as many at a time as may be held."""
    groups = [range(first, min(first + held, m)) for first in range(0, m, held)]
    return [(kind, b) for group in groups for kind in "FIW" for b in group]


@table
def one_by_one(rank, ranks, m, held):
    return [(kind, b) for b in range(m) for kind in "FIW"]


@table
def all_at_once(rank, ranks, m, held):
    return [(kind, b) for kind in "FIW" for b in range(m)]


def whole_backward(ranks, m, held):
    return pt.one_f_one_b(ranks, m)


def too_many_once(ranks, m, held):
    """Right but on one case."""
    return chapter_10._greedy(ranks, m, held + (held == 2 and ranks == 3))


def upside_down(ranks, m, held):
    found = chapter_10._greedy(ranks, m, held)
    return pt.Schedule("mine", ranks, m, found.ranks[::-1])


def test_the_greedy_schedule_passes():
    assert check("10.7", greedy("I", "F", "W")).state == "passed"


def test_lists_will_do():
    def listed(*case):
        found = chapter_10._greedy(*case)
        return pt.Schedule("mine", case[0], case[1], [list(rank) for rank in found.ranks])

    assert check("10.7", listed).state == "passed"


def told(answer):
    """The mean ratio, and what is said of each case."""
    found = check("10.7", answer)
    assert found.state == "not yet right"
    pattern = r"your step takes (.*) times as long as ours on average, the limit is 1\.05; by \(ranks, m, held\), "
    said = re.match(pattern, found.message)
    assert said, found
    return float(said[1]), found.message[said.end() :].split("; "), found.hint


@pytest.mark.parametrize(
    ("answer", "low", "high", "hint"),
    [
        (as_1f1b, 1.33, 1.39, r"With 4 ranks, .* 2 held, at t = \d+ rank \d (waits|does W\d) and could do"),
        (in_groups, 1.32, 1.38, r"at t = \d+ rank \d (waits|does F\d) and could do"),
        (one_by_one, 2.0, 3.0, r"at t = 1 rank 0 waits and could do F1\."),
        (greedy("F", "I", "W"), 1.06, 1.1, r"at t = \d+ rank \d does F\d and could do I\d"),
        (greedy("I", "W", "F"), 1.06, 1.1, r"at t = \d+ rank \d does W\d and could do F\d"),
        (greedy("W", "I", "F"), 1.06, 1.1, r"at t = \d+ rank \d does W\d and could do (I|F)\d"),
    ],
)
def test_other_schedules_are_told_how_long_they_take(answer, low, high, hint):
    mean, each, hinted = told(answer)
    assert low < mean < high
    assert [text.rpartition(": ")[0] for text in each] == [str(case) for case in chapter_10.HIDDEN]
    ratios = [float(text.rpartition(": ")[2]) for text in each]
    assert np.mean(ratios) == pytest.approx(mean, abs=0.005)
    assert re.search(hint, hinted), hinted


def test_each_ratio_is_that_of_the_timelines():
    for case in chapter_10.HIDDEN:
        ratio, why = chapter_10._step(as_1f1b(*case), *case)
        assert not why
        ours = pt.timeline(chapter_10._greedy(*case)).makespan
        assert ratio == pytest.approx(pt.timeline(as_1f1b(*case)).makespan / ours)


def test_ours_has_no_place_where_a_rank_could_do_better():
    for case in chapter_10.HIDDEN:
        found = chapter_10._greedy(*case)
        assert not list(chapter_10._slips(found, case[2]))
        assert max(pt.in_flight(found)) == case[2]


@pytest.mark.parametrize(
    ("answer", "mean", "place", "why", "hint"),
    [
        (all_at_once, 2.0, 0, "broken, rank 0 holds 8", "one fewer with each W"),
        (too_many_once, 8 / 7, 6, "broken, rank 0 holds 3", "one fewer with each W"),
        (whole_backward, 2.0, 1, "broken, its backward passes are whole (B)", "F, I and W"),
        (upside_down, 2.0, 2, "broken, stage 0 is on rank 4", "Stage s is on rank s"),
        (lambda ranks, m, held: chapter_10._greedy(ranks - 1, m, held), 2.0, 0,
         "broken, it is for 3 stages, 8 micro-batches and 3 ranks", "Stage s is on rank s"),
        (lambda ranks, m, held: pt.interleaved(ranks, 4 * ranks), 2.0, 0,
         "broken, it is for 8 stages, 16 micro-batches and 4 ranks", "Stage s is on rank s"),
    ],
)  # fmt: skip
def test_a_table_that_breaks_the_rule_counts_twice(answer, mean, place, why, hint):
    found, each, hinted = told(answer)
    assert found == pytest.approx(mean, abs=0.001)
    assert each[place].endswith(f": {why}")
    assert hint in hinted


def test_a_broken_table_may_be_made_good_elsewhere(monkeypatch):
    """By the rule that the text sets: the mean decides."""
    monkeypatch.setattr(chapter_10, "LONGEST", 1.2)
    assert check("10.7", too_many_once).state == "passed"


def stuck(ranks, m, held):
    """No rank may begin: each waits for a W that never comes."""
    done = 0
    while done < m:
        done += 0
    return chapter_10._greedy(ranks, m, held)


@pytest.mark.usefixtures("impatient")
def test_a_loop_in_which_nothing_happens_comes_to_an_end():
    told = r"not come to an end after 0\.3 million lines of Python \(on 4 ranks, 8 micro-batches, 2 held\)"
    checking.assert_hinted("10.7", stuck, told, "in which none does anything")


@table
def in_the_wrong_order(rank, ranks, m, held):
    return [(kind, b) for b in range(m) for kind in "WIF"]


@pytest.mark.parametrize(
    ("answer", "message", "hint"),
    [
        (3, "a function is wanted here", ""),
        (lambda: 1, "raised TypeError", ""),
        (lambda *case: "a", "should return a pt.Schedule, and returns a str", "pt.Schedule"),
        (lambda *case: chapter_10._greedy(*case).ranks, "should return a pt.Schedule, and returns a tuple", "pt.Task"),
        (lambda *case: pt.timeline(chapter_10._greedy(*case)), "and returns a Timeline", "pt.Task"),
        (in_the_wrong_order, r"raised ValueError: .*wait for one another \(on 4 ranks, 8 micro-batches, 2 held\)", ""),
        (table(lambda *case: [("F", 0)]), "raised ValueError: .*every task once", ""),
    ],
)
def test_what_is_no_schedule_is_told_what_is_wanted(answer, message, hint):
    checking.assert_hinted("10.7", answer, message, hint)


@pytest.mark.parametrize("answer", checking.STUBS)
def test_a_schedule_that_is_still_a_stub_is_not_attempted(answer):
    checking.assert_not_attempted("10.7", answer)


# The notebook's own


@pytest.mark.parametrize("exercise", checking.asked(NOTEBOOK))
def test_the_printed_solutions_pass(exercise):
    checking.assert_printed_solution_passes(NOTEBOOK, exercise, np=np, torch=torch, F=F, pt=pt)
