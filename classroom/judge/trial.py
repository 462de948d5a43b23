"""Inside a sandbox of its own, with the checks: judges an answer that has to be rebuilt, or trained.

No code of a learner runs here: a design arrives as names and values (see `wire`). A process of its own, for its
training must end at a deadline. Run as ``python -m classroom.judge.trial IN OUT``.
"""

import json
import os
import sys
from typing import Any

from classroom.judge import wire
from course_lib.lab.exercises import check


def judged(asked: dict[str, Any]) -> dict[str, Any]:
    """The outcome of ``asked["exercise"]`` for the encoded answer ``asked["value"]``, as a dict."""
    try:
        answer = wire.decode(asked["value"], designs=True)
    except (wire.Unfit, KeyError, TypeError, ValueError, RuntimeError, RecursionError) as error:
        return {"unfit": f"{type(error).__name__}: {error}"[:300]}
    outcome = check(asked["exercise"], answer, record=False)
    return {"outcome": {"title": outcome.title, "state": outcome.state, "message": outcome.message,
                        "hint": outcome.hint, "note": outcome.note}}  # fmt: skip


def main() -> None:
    """Judge one answer."""
    with os.fdopen(int(sys.argv[1]), "rb") as asked, os.fdopen(int(sys.argv[2]), "wb") as out:
        wire.send(out, {"do": "ready"})
        (size,) = wire.HEAD.unpack(asked.read(wire.HEAD.size))
        wire.send(out, {"do": "said", **judged(json.loads(asked.read(size)))})


if __name__ == "__main__":
    main()
