"""The outer end of a talk with a process in the sandbox: questions with a deadline, and an end whatever it does."""

import contextlib
import inspect
import io
import json
import os
import select
import struct
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from classroom.judge import sandbox, wire

MADE_UP = (wire.Unfit, KeyError, TypeError, ValueError, IndexError, RuntimeError, AttributeError, RecursionError)


class Lost(BaseException):
    """The process is gone, or does not keep to the talk. A BaseException, so that no check takes it for an error."""


class Unjudged(BaseException):
    """Not to be decided by a program. A BaseException, so that no check takes it for an error."""


class Process:
    """A process in the sandbox; used as a context manager, at whose end it is killed.

    Parameters
    ----------
    module : "worker" or "trial".
    seconds : until it must be ready; `allow` gives more for what follows.

    Attributes
    ----------
    talking : whether something was asked and no answer has come; such a process can be asked nothing else.
    """

    talking = False

    def __init__(
        self, module: str, *, seconds: float = 120, limits: sandbox.Limits | None = None, with_checks: bool = False
    ) -> None:
        self._in, theirs_out = os.pipe()
        theirs_in, mine_out = os.pipe()
        self._out = os.fdopen(mine_out, "wb")
        self._log = os.memfd_create("log")
        try:
            self._process = sandbox.start(
                module, (theirs_in, theirs_out), log=self._log, limits=limits, with_checks=with_checks
            )
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        self._timer = threading.Timer(0, self._process.kill)
        self.allow(seconds)
        try:
            self._received()
        except Lost as lost:
            said = self._logged()
            self.close()
            raise Lost(f"{lost} {said}".strip()) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it, and with it all that runs in its namespaces."""
        self._process.kill()
        self._process.wait()
        self._timer.cancel()
        os.close(self._in)
        os.close(self._log)
        with contextlib.suppress(BrokenPipeError):
            self._out.close()

    def allow(self, seconds: float) -> None:
        """Set its deadline anew, counted from now."""
        self._until = time.monotonic() + seconds
        self._timer.cancel()
        self._timer = threading.Timer(seconds, self._process.kill)  # also ends our writing to one that does not read
        self._timer.daemon = True
        self._timer.start()

    def ask(self, message: dict[str, Any], functions: Sequence[Callable[..., Any]] = ()) -> dict[str, Any]:
        """What it says to a message; meanwhile it may call the ``functions`` that travelled with it.

        Raises
        ------
        Lost : it ended, took too long, or said what is no answer.
        """
        before, self.talking = self.talking, True
        try:
            wire.send(self._out, message)
            while (said := self._received()).get("do") == "back":
                function, wanted = functions[int(said["number"])], wire.decode(said["with"])
                wire.send(self._out, _called(function, wanted))
        except (BrokenPipeError, *MADE_UP) as error:
            raise Lost(f"{type(error).__name__}: {error}") from None
        self.talking = before
        return said

    def _received(self) -> dict[str, Any]:
        (size,) = wire.HEAD.unpack(self._read(wire.HEAD.size))
        if size > wire.LARGEST:
            raise Lost("it sent a message that is too long")
        try:
            said = json.loads(self._read(size))
        except (ValueError, RecursionError, struct.error) as error:
            raise Lost(f"it sent no message: {error}") from None
        if not isinstance(said, dict):
            raise Lost("it sent no message")
        return said

    def _read(self, count: int) -> bytes:
        parts = io.BytesIO()
        while parts.tell() < count:
            left = self._until - time.monotonic()
            if left <= 0 or not select.select([self._in], [], [], left)[0]:
                raise Lost("it took too long")
            part = os.read(self._in, min(count - parts.tell(), 2**20))
            if not part:
                raise Lost("it took too long" if time.monotonic() >= self._until else "its process ended")
            parts.write(part)
        return parts.getvalue()

    def _logged(self) -> str:
        return os.pread(self._log, 2**16, 0).decode(errors="replace")[-300:]


def _called(function: Callable[..., Any], arguments: Sequence[Any]) -> dict[str, Any]:
    """What a call of one of our functions gives, as a message."""
    try:
        result = function(*arguments)
    except Exception as error:  # wrong arguments: the learner's to hear of
        return {"raised": [type(error).__name__, str(error)[:300]]}
    try:
        return {"value": wire.encode(result)}
    except wire.Unfit as error:
        raise Unjudged(f"it is handed a function that returns what cannot travel: {error}") from None


def stand_in(process: Process, parameters: Sequence[str], name: str) -> Callable[..., Any]:
    """A function that calls the learner's, in ``process``; the checks cannot tell it from one.

    Its parameters have the learner's names, for what a check says of an argument that is changed in place.
    """

    def answer(*arguments: Any) -> Any:
        functions: list[Callable[..., Any]] = []
        try:
            packed = wire.encode(arguments, functions)
        except wire.Unfit as error:
            raise Unjudged(f"it takes an argument that cannot travel: {error}") from None
        said = process.ask({"do": "call", "with": packed}, functions)
        if "unfinished" in said:
            raise NotImplementedError(str(said["unfinished"])[:300])
        try:
            if "raised" in said:
                kind, words = map(str, said["raised"])
                raise _error(kind, words)
            _write_back(arguments, said.get("after"))
            return wire.decode(said["value"])
        except wire.Unfit as error:
            raise Unjudged(f"it returns what cannot travel: {error}") from None
        except MADE_UP as error:
            raise Lost(f"it sent no result: {type(error).__name__}: {error}") from None

    answer.__name__ = name[:80]
    names = [parameter for parameter in dict.fromkeys(parameters) if parameter.isidentifier()]
    if names:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(parameter, kind) for parameter in names])
        setattr(answer, "__signature__", signature)  # noqa: B010
    return answer


class Theirs(Exception):
    """What the learner's function raised; a class of its own name is derived for each."""


def _error(kind: str, words: str) -> BaseException:
    if kind == "Unfit":
        return Unjudged(f"it returns what cannot travel: {words}")
    return type(kind if kind.isidentifier() else "Error", (Theirs,), {})(words[:300])


def _write_back(arguments: Sequence[Any], after: Any) -> None:
    """Do to our arguments what the function did to its own, so that a check sees it."""
    if after is None:
        return
    for mine, theirs in zip(arguments, wire.decode(after, lambda number: None), strict=True):
        if isinstance(mine, torch.Tensor):
            if mine.shape == theirs.shape and not _same(mine, theirs):
                mine.data.copy_(theirs)
        elif isinstance(mine, np.ndarray):
            if mine.shape == theirs.shape:
                mine[...] = theirs
        elif isinstance(mine, list) and not any(map(callable, mine)):
            mine[:] = theirs
        elif isinstance(mine, dict):
            mine.clear()
            mine.update(theirs)


def _same(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.allclose(mine.detach(), theirs.detach().to(mine.dtype), rtol=0, atol=0, equal_nan=True)
