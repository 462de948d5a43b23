"""Judges a submission: asks a process in the sandbox for the answers, and decides here with the course's own `check`.

One process serves all exercises of a submission, for most of an exercise's time is the import of torch. One that is
lost (killed, out of time) costs its exercise; a fresh one goes on with what follows.

The three ways of an answer:

- a function stays in the sandbox, and `check` gets a stand-in, whose arguments and results travel;
- what a figure says travels, and `check` gets it;
- a design travels as names and values, and `check` trains it in a sandbox of its own (`trial`).

What fits none of these is "for the instructor".
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

from classroom.judge import sandbox, wire
from classroom.judge.process import Lost, Process, Unjudged, stand_in
from classroom.judge.slices import Slice
from classroom.student_copy import test_of
from course_lib.lab import exercises
from course_lib.lab.exercises import Outcome, check
from course_lib.lab.judging import Reading

BY_HAND = "for the instructor"
UNTOUCHED = (wire.encode(None), wire.encode(...))
FOR_TRIALS = sandbox.Limits(file=64 * 2**20, scratch=256 * 2**20)  # no code of a learner runs there


@dataclass(frozen=True)
class Patience:
    """How long is waited, in seconds: for a process to start, for an exercise, for a design to be trained."""

    start: float = 120
    exercise: float = 30
    design: float = 180


@dataclass(frozen=True)
class Answer:
    """An exercise as it was handed in.

    Attributes
    ----------
    source : the learner's cell.
    expression : what the check wants of it.
    stub : the cell as it was handed out; whoever left it so need not be looked at by the instructor.
    """

    exercise: str
    source: str
    expression: str
    stub: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What the judge found; ``by_hand`` where it could not decide."""

    outcome: Outcome
    by_hand: bool = False

    def points(self, worth: float) -> float | None:
        """What is earned of ``worth`` points; None where the instructor must say."""
        if self.by_hand:
            return None
        return worth if self.outcome.state == "passed" else 0.0

    def __str__(self) -> str:
        return f"○ Exercise {self.outcome.exercise} is {self.outcome.message}" if self.by_hand else repr(self.outcome)


def judge(
    answers: Sequence[Answer], chapter: Slice, *, patience: Patience | None = None, limits: sandbox.Limits | None = None
) -> dict[str, Verdict]:
    """The verdicts on a submission, by exercise.

    Parameters
    ----------
    answers : in the chapter's order; one may use what those before it define.
    chapter : what they need of the chapter.

    Raises
    ------
    NoSandbox : nothing of a submission may run here.
    """
    sandbox.bwrap()  # refuse before anything runs
    exercises._hints_given.clear()  # or a learner's hint would depend on how many were marked before
    with _Submission(chapter, patience or Patience(), limits or sandbox.Limits()) as submission:
        return {answer.exercise: submission.verdict(answer) for answer in answers}


@dataclass
class _Submission(AbstractContextManager["_Submission"]):
    chapter: Slice
    patience: Patience
    limits: sandbox.Limits
    _before: list[Answer] = field(default_factory=list)  # those whose process was not lost
    _process: Process | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._drop()

    def verdict(self, answer: Answer) -> Verdict:
        """What is found; an untouched stub earns nothing, whoever would have had to decide."""
        found = self._found(answer)
        if found.by_hand and answer.stub is not None and answer.source.strip() == answer.stub.strip():
            return Verdict(Outcome(answer.exercise, "", "not attempted yet", "your cell is as it was handed out"))
        return found

    def _found(self, answer: Answer) -> Verdict:
        try:
            outcome = self._judged(answer)
            self._before.append(answer)
            return self._excused(outcome) or Verdict(outcome)
        except Lost as lost:
            self._drop()
            return Verdict(Outcome(answer.exercise, "", "not yet right", f"no mark: {lost}"))
        except Unjudged as error:
            if self._process is None or self._process.talking:
                self._drop()
            self._before.append(answer)
            return _by_hand(answer.exercise, str(error))
        except Exception as error:  # ours, or a check that meets what it did not expect: no mark for, none against
            self._drop()
            return _by_hand(answer.exercise, f"marking failed: {type(error).__name__}: {error}")

    def _judged(self, answer: Answer) -> Outcome:
        process = self._ready()
        process.allow(self.patience.exercise)
        trouble = _raised(_run(process, answer))
        outcome = self._answered(process, answer, trouble)
        if outcome.state == "not attempted yet" and trouble and not trouble.startswith("NotImplementedError"):
            return replace(outcome, state="not yet right", message=f"the cell raised {trouble}")  # below its stub
        return outcome

    def _answered(self, process: Process, answer: Answer, trouble: str) -> Outcome:
        said = process.ask({"do": "answer", "source": answer.expression})
        if raised := _raised(said):
            if raised.startswith("Unfit: "):
                raise Unjudged(f"the answer is code or an object ({raised.removeprefix('Unfit: ')})")
            return Outcome(answer.exercise, "", "not yet right", f"the cell raised {trouble or raised}")
        if "callable" in said:
            stub = stand_in(process, [str(name) for name in said["callable"]], str(said.get("name")))
            return check(answer.exercise, stub, record=False)
        if said["value"] in UNTOUCHED or isinstance(test_of(answer.exercise), Reading):
            return check(answer.exercise, wire.decode(said["value"]), record=False)
        process.allow(self.patience.start + self.patience.design + self.patience.exercise)  # it has to wait meanwhile
        return self._tried(answer.exercise, said["value"])

    def _excused(self, outcome: Outcome) -> Verdict | None:
        """For an answer that fails by a name of the chapter that was left out here."""
        for name in self.chapter.left_out:
            if outcome.state == "not yet right" and f"name '{name}' is not defined" in outcome.message:
                return _by_hand(outcome.exercise, f"it needs {name}, which the chapter makes and marking does not")
        return None

    def _tried(self, exercise: str, value: Any) -> Outcome:
        """The outcome in a sandbox of its own, which has a deadline for all that the check does."""
        try:
            with Process("trial", seconds=self.patience.start, limits=FOR_TRIALS, with_checks=True) as trial:
                trial.allow(self.patience.design)
                said = trial.ask({"do": "check", "exercise": exercise, "value": value})
        except Lost as lost:
            raise Unjudged(f"its trial came to no end: {lost}") from None
        if "unfit" in said:
            raise Unjudged(f"the answer cannot be rebuilt ({said['unfit']})")
        return Outcome(exercise, **said["outcome"])

    def _ready(self) -> Process:
        """The process that knows all answers so far; a fresh one where the last was lost."""
        if self._process is None:
            self._process = self._started()
            try:
                for earlier in self._before:
                    self._process.allow(self.patience.exercise)
                    _run(self._process, earlier)
            except Lost:  # one of them undoes it, late or in a new surrounding
                self._drop()
                self._before.clear()
                self._process = self._started()
        return self._process

    def _started(self) -> Process:
        process = Process("worker", seconds=self.patience.start, limits=self.limits)
        try:
            for statement in self.chapter.statements:
                process.ask({"do": "run", "name": "the chapter", "source": statement})
        except Lost:
            process.close()
            raise
        return process

    def _drop(self) -> None:
        if self._process is not None:
            self._process.close()
            self._process = None


def _run(process: Process, answer: Answer) -> dict[str, Any]:
    return process.ask({"do": "run", "name": f"your answer to {answer.exercise}", "source": answer.source})


def _raised(said: Mapping[str, Any]) -> str:
    if "unfinished" in said:
        return f"NotImplementedError: {said['unfinished']}"
    return ": ".join(map(str, said["raised"])) if "raised" in said else ""


def _by_hand(exercise: str, why: str) -> Verdict:
    return Verdict(Outcome(exercise, "", "not attempted yet", f"{BY_HAND}: {why}"), by_hand=True)
