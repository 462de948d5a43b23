"""Inside the sandbox: runs what a learner handed in and answers calls. It decides nothing.

Run as ``python -m classroom.judge.worker IN OUT``, with the two ends of pipes; stdout and stderr are no part of the
talk. What is asked, and what is answered (or what was raised meanwhile):

| asked | answered |
| --- | --- |
| ``run``: a cell's source | nothing |
| ``answer``: an expression | the value, or the names of its parameters if it is a function that stays here |
| ``call``: arguments | the function's result, and the arguments as they are afterwards |
"""

import inspect
import json
import os
import sys
from collections.abc import Callable
from typing import Any

from classroom.judge import wire

LONGEST = 300  # characters of an error's words


class Raised(Exception):
    """What a function on the other side raised."""


class Worker:
    """The learner's names, and the pipe."""

    def __init__(self, incoming: int, outgoing: int) -> None:
        self._in, self._out = os.fdopen(incoming, "rb"), os.fdopen(outgoing, "wb")
        self._names: dict[str, Any] = {"__name__": "__main__"}
        self._answer: Any = None

    def serve(self) -> None:
        """Answer until the pipe closes."""
        wire.send(self._out, {"do": "ready"})
        while asked := self._received():
            self._say(self._said(asked))

    def _say(self, said: dict[str, Any]) -> None:
        try:
            wire.send(self._out, {"do": "said", **said})
        except (wire.Unfit, TypeError, ValueError, RecursionError) as error:  # nothing of it was written
            wire.send(self._out, {"do": "said", "raised": ["Unsendable", str(error)[:LONGEST]]})

    def _said(self, asked: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"run": self._run, "answer": self._evaluate, "call": self._call}[asked["do"]](asked)
        except NotImplementedError as error:
            return {"unfinished": str(error)[:LONGEST]}
        except BaseException as error:  # SystemExit too: a learner's code may end in any way, and the next is asked
            return {"raised": [type(error).__name__, str(error)[:LONGEST]]}

    def _run(self, asked: dict[str, Any]) -> dict[str, Any]:
        exec(compile(asked["source"], asked["name"], "exec"), self._names)
        return {"value": None}

    def _evaluate(self, asked: dict[str, Any]) -> dict[str, Any]:
        self._answer = eval(asked["source"], self._names)
        try:
            return {"value": wire.encode(self._answer)}
        except wire.Unfit:
            if not callable(self._answer):
                raise
        return {"callable": _parameters(self._answer), "name": getattr(self._answer, "__name__", "your function")}

    def _call(self, asked: dict[str, Any]) -> dict[str, Any]:
        given = wire.decode(asked["with"], self._far)
        said = {"value": wire.encode(self._answer(*given))}
        try:
            said["after"] = wire.encode(given, [])
        except wire.Unfit:
            said["after"] = None
        return said

    def _far(self, number: int) -> Callable[..., Any]:
        """A function that lives on the other side."""

        def function(*arguments: Any) -> Any:
            wire.send(self._out, {"do": "back", "number": number, "with": wire.encode(arguments)})
            said = self._received()
            if "raised" in said:
                raise Raised(": ".join(said["raised"]))
            return wire.decode(said["value"])

        return function

    def _received(self) -> dict[str, Any]:
        head = self._in.read(wire.HEAD.size)
        return json.loads(self._in.read(*wire.HEAD.unpack(head))) if len(head) == wire.HEAD.size else {}


def _parameters(function: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []


if __name__ == "__main__":
    Worker(int(sys.argv[1]), int(sys.argv[2])).serve()
