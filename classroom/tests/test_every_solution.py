"""Every exercise of the course through the judge: as it is handed out, nearly right, and as its printed solution.

Exercises whose check trains networks take minutes each: they are left out, but with ``CLASS_EVERY_SOLUTION=1``.
"""

import os

import pytest

from classroom.course import NOTEBOOKS
from classroom.judge.judge import Answer, Patience, Verdict, _Submission
from classroom.judge.sandbox import Limits
from classroom.judge.slices import needed
from classroom.student_copy import Exercise, exercise_of, exercises
from classroom.student_copy import test_of as check_of
from classroom.tests.helping import chapter, needs_sandbox, solutions
from course_lib.lab.judging import Method, OpenProject

pytestmark = needs_sandbox

NETWORK = "it takes an argument that cannot travel"
CODE = "the answer is code or an object"
RESULT = "it returns what cannot travel"
HANDED = "it is handed a function that returns what cannot travel"
BY_HAND = {
    "00.5": NETWORK, "00.6": NETWORK, "02.7": CODE, "05.7": CODE, "06.5": NETWORK, "07.7": RESULT, "08.7": CODE,
    "09.5": NETWORK, "10.3": NETWORK, "10.7": RESULT, "12.7": NETWORK, "13.5": NETWORK, "14.5": HANDED,
}  # fmt: skip
"""What the instructor decides, and the judge's reason."""

TRAINS = ("00.7", "01.7", "03.7", "04.7", "06.7", "09.7", "13.7", "14.7", "16.6")

NEARLY = {
    "00.1": ("labels).float", "labels).logical_not().float"),
    "00.2": ("0.975", "0.95"),
    "00.3": ("a - b", "b - a"),
    "00.4": ('"c"', '"a"'),
    "00.7": ("replace(shifted, ema=0.98)", "shifted"),
    "01.1": ("correction=0", "correction=1"),
    "01.2": (" * inside[:, None]", ""),
    "01.3": ("lam[:, None] * labels + (1 - lam[:, None]) * labels[partner]", "labels"),
    "01.4": ("len(train)", "(len(train) - 1)"),
    "01.5": ('"c"', '"a"'),
    "01.6": ("correlations(x[~held_out], y[~held_out])", "correlations(x, y)"),
    "01.7": ("translate=(0.06, 0.06)", "translate=(0.4, 0.4)"),
    "02.1": ("beta * v + g", "beta * v + (1 - beta) * g"),
    "02.2": ("((v / (1 - betas[1] ** t)).sqrt() + eps)", "(v.sqrt() + eps)"),
    "02.3": ("1 - lr * weight_decay", "1 - weight_decay"),
    "02.4": ("3.4445 * x + (-4.7750 * A + 2.0315 * A @ A) @ x", "1.5 * x - 0.5 * A @ x"),
    "02.5": ('"b"', '"a"'),
    "02.6": ("betas[1] * m + (1 - betas[1]) * g", "update"),
    "03.1": ("(step + 1) / warmup", "step / warmup"),
    "03.2": ("(v @ product(v)).item()", "product(v).norm().item()"),
    "03.3": ("2 * (2 - lr * h)", "4"),
    "03.4": ('"b"', '"a"'),
    "03.5": ("            scheduler.step()", "        scheduler.step()"),
    "03.6": ("gradient(y)", "gradient(x)"),
    "03.7": ("lr=0.05", "lr=0.0005"),
    "04.1": ("len(a) / len(x) * gradient(a, b)", "gradient(a, b) / parts"),
    "04.2": ("trace.mean() / gradient_sq.mean()", "(trace / gradient_sq).mean()"),
    "04.3": ("e_min / s_min", "s_min / e_min"),
    "04.4": ('"c"', '"a"'),
    "04.5": ("values[drawn] / (len(values) * p[drawn])", "values[drawn]"),
    "04.6": ("correction=0", "correction=1"),
    "04.7": ("lr=0.16", "lr=0.0016"),
    "05.1": ("(w.abs() - t).clamp(min=0)", "w.abs() * (w.abs() > t)"),
    "05.2": (" / (1 - p)", ""),
    "05.3": ("svdvals(X) ** 2", "svdvals(X)"),
    "05.4": ('"d"', '"a"'),
    "05.5": ("+= 1 - eps", "= 1 - eps"),
    "05.6": ("dim=1", "dim=0"),
    "06.1": ("waited >= patience", "waited > patience"),
    "06.2": ("100 * ", ""),
    "06.3": ("1 - (1", "(1"),
    "06.4": ('"b"', '"a"'),
    "06.6": ("len(left) // eta)]", "-(-len(left) // eta))]"),
    "06.7": ('keep="val_loss"', "keep=None"),
    "07.1": ("(rank - step) % world_size, (rank - step - 1)", "(rank + step) % world_size, (rank + step + 1)"),
    "07.2": ("2 * (workers", "(workers"),
    "07.3": (" if n)", ")"),
    "07.4": ("whole - sent", "gradient - sent"),
    "07.5": ('"c"', '"a"'),
    "07.6": ("(variances + (means - mean) ** 2)", "variances"),
    "08.1": ("weight.flatten().abs()", "weight.flatten()"),
    "08.2": ("topk(2, dim=2)", "topk(1, dim=2)"),
    "08.3": ("** 3", "** 2"),
    "08.4": (".relu()", ""),
    "08.5": ('"c"', '"a"'),
    "08.6": ('.masked_fill(~mask, float("inf"))', ""),
    "09.1": ("logits / T", "logits * T"),
    "09.2": ("mix * T**2 * apart", "mix * apart"),
    "09.3": ("T * ((z / T)", "((z / T)"),
    "09.4": ('"c"', '"a"'),
    "09.6": ("zip(logs(v), logs(z))", "zip(logs(z), logs(v))"),
    "09.7": ("mix=0.9", "mix=0.0"),
    "10.1": ("(m - 1) * max(times)", "m * max(times)"),
    "10.2": ("ranks - rank - 1, m", "ranks - rank, m"),
    "10.4": ("range(parts - 1)", "range(parts)"),
    "10.5": ('"a"', '"b"'),
    "10.6": ("place < capacity", "place <= capacity"),
    "11.1": ("2**bits - 1", "2**bits"),
    "11.2": ("16 + bits * affine", "16"),
    "11.3": ("- z *", "+ z *"),
    "11.4": (" if count]", "]"),
    "11.5": ('"b"', '"a"'),
    "11.6": ("(w[q] - rounded) / inverse[q, q]", "w[q] - rounded"),
    "11.7": ("np.logspace(-9, 1, 2000)", "np.logspace(-9, 1, 4)"),
    "12.1": ("share * state[name]", "state[name] / len(states)"),
    "12.2": ("(n + 1)", "n"),
    "12.3": ("((1 - t) * losses[0] + t * losses[-1])", "losses[0]"),
    "12.4": ('"c"', '"a"'),
    "12.5": ("W2[:, order]", "W2"),
    "12.6": ("trimmed.sum(0).sign()", "trimmed.sign().sum(0).sign()"),
    "13.1": ("alpha / len(A)", "alpha"),
    "13.2": ("x - x.mean(0), y - y.mean(0)", "x, y"),
    "13.3": ("(len(x) - 1)", "len(x)"),
    "13.4": ('"c"', '"a"'),
    "13.6": ("- 2 * k(x, y)", "- k(x, y)"),
    "13.7": ('source="outline letters"', 'source="print digits"'),
    "14.1": ("log_softmax(2)", "log_softmax(1)"),
    "14.2": ("apart.mean()", "apart.sum() / answers[1:].numel()"),
    "14.3": (".abs().sum()", ".sum().abs()"),
    "14.4": ('"c"', '"a"'),
    "14.6": ("((1 - error) / error * (classes - 1))", "((1 - error) / error)"),
    "14.7": ("members=4", "members=1"),
    "15.1": ("2 * batch", "batch"),
    "15.2": ("(start - mean) * scale", "start - mean * scale"),
    "15.3": ("total * shrink", "total"),
    "15.4": ("good + 1 == interval", "good == interval"),
    "15.5": ('"b"', '"a"'),
    "15.6": ("kept(0, k, most)", "kept(0, k + 1, most)"),
    "15.7": ("max_wait + fixed + each * n <= limit", "max_wait + fixed <= limit"),
    "16.1": (">= target", "> target"),
    "16.2": ("before / after", "after / before"),
    "16.3": ("np.prod(", "sum("),
    "16.4": ("math.ceil(examples / batch)", "(examples // batch)"),
    "16.5": ('"SGD with momentum", "one cycle"', '"SGD with momentum"'),
    "16.6": ("lasting(6)", "lasting(1)"),
    "16.8": ("confidence, n - 1", "(1 + confidence) / 2, n - 1"),
    "17.1": ("-slope", "slope"),
    "17.2": (" / 1000", ""),
    "17.3": ("operations / 6", "operations"),
    "17.4": ('"exponential with floor", ', ""),
    "17.5": ("max-norm", "label smoothing"),
    "17.6": ('"seeds": 3', '"seeds": 2'),
    "17.8": ("-(passes - 1) / r_star", "-passes / r_star"),
}  # fmt: skip
"""What of a printed solution to put another thing for, to make a mistake that its check knows."""

PATIENCE = Patience(exercise=120, design=1200)  # what is slow here is the machine
NAMES = sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))


@pytest.mark.parametrize("name", NAMES)
def test_a_chapter(name: str) -> None:
    each_is_judged_right(name, [each for each in judged(name) if each.number not in TRAINS])


@pytest.mark.skipif(not os.environ.get("CLASS_EVERY_SOLUTION"), reason="minutes of training; CLASS_EVERY_SOLUTION=1")
@pytest.mark.parametrize("exercise", TRAINS)
def test_a_design_that_is_trained(exercise: str) -> None:
    name = next(name for name in NAMES if name.startswith(exercise[:2]))
    each_is_judged_right(name, [each for each in judged(name) if each.number == exercise])


def judged(name: str) -> list[Exercise]:
    """The exercises of a chapter that a program judges, or has to leave to the instructor."""
    return [each for each in exercises(chapter(name)) if not isinstance(check_of(each.number), OpenProject)]


def each_is_judged_right(name: str, asked: list[Exercise]) -> None:
    """In one submission: of each exercise the stub, the mistake, and at last the solution, which the next may need."""
    notebook = chapter(name)
    solved = solutions(notebook)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code" and not exercise_of(cell.source)]
    wrong: dict[str, str] = {}
    with _Submission(needed(code, [solved[each.number] for each in asked]), PATIENCE, Limits()) as submission:
        for each in asked:
            said = [submission.verdict(Answer(each.number, source, each.answer, each.stub))
                    for source in sources(each, solved[each.number])]  # fmt: skip
            if trouble := what_is_wrong(each.number, said):
                wrong[each.number] = trouble
    assert asked
    assert wrong == {}


def sources(exercise: Exercise, solution: str) -> list[str]:
    """Its stub, the solution, and between them the mistake unless the instructor would decide."""
    if exercise.number in BY_HAND:
        return [exercise.stub, solution]
    old, new = NEARLY[exercise.number]
    begin, printed = solution[: len(exercise.stub)], solution[len(exercise.stub) :]
    assert old in printed, f"{exercise.number}: the printed solution has no {old!r}"
    return [exercise.stub, begin + printed.replace(old, new), solution]


def what_is_wrong(exercise: str, said: list[Verdict]) -> str:
    """What is amiss with the verdicts on the stub, on the mistake and on the solution; nothing if all is well."""
    stub, *nearly, solution = said
    if stub.points(1) != 0:
        return f"the stub: {stub}"
    for verdict in nearly:
        if verdict.by_hand or verdict.outcome.state != "not yet right" or not is_known(exercise, verdict):
            return f"the mistake: {verdict}"
    if exercise in BY_HAND:
        return "" if solution.by_hand and BY_HAND[exercise] in solution.outcome.message else f"by hand: {solution}"
    return "" if solution.points(1) == 1 else f"the solution: {solution}"


def is_known(exercise: str, verdict: Verdict) -> bool:
    """Whether the learner hears what the check has to say of this very mistake."""
    test = check_of(exercise)
    if not isinstance(test, Method):
        return "raised" not in verdict.outcome.message
    return any(verdict.outcome.message.startswith(mistake.message) for mistake in test.mistakes)
