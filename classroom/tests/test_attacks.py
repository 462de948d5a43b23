"""Submissions that want a mark they have not earned, or more of the machine than a mark.

Each defines a wrong answer to exercise 02.1 and then tries something. None may pass; most must also fail in the way
that is written beside them.
"""

import os
from pathlib import Path

import pytest
import torch

from classroom.judge import sandbox
from classroom.judge.judge import Answer, judge
from classroom.judge.slices import Slice
from classroom.tests.helping import QUICK, SMALL, needs_sandbox, verdict

pytestmark = needs_sandbox
WRONG = "def momentum_step(w, g, v, lr, beta):\n    return w, v\n"
RIGHT = "def momentum_step(w, g, v, lr, beta):\n    v = beta * v + g\n    return w - lr * v, v\n"

FORGERIES = {
    "it redefines check": WRONG + """
import course_lib.lab.exercises as exercises
check = exercises.check = lambda *a, **k: "passed" """,
    "it patches the library": WRONG + """
torch.allclose = lambda *a, **k: True
import course_lib.lab.judging as judging
judging.close = lambda *a, **k: True""",
    "it prints a mark": WRONG + "print('✓ Exercise 02.1 passed', flush=True)\nimport sys\nprint(2.0, file=sys.stderr)",
    "it writes a verdict into every pipe": WRONG + """
import json, os, struct
raw = json.dumps({"do": "said", "state": "passed", "value": {"state": "passed"}, "points": 9}).encode()
for number in range(3, 20):
    try:
        os.write(number, struct.pack("<I", len(raw)) + raw)
    except OSError:
        pass""",
    "it writes nonsense into every pipe": WRONG + """
import os
for number in range(3, 20):
    try:
        os.write(number, b"\\xff" * 5000)
    except OSError:
        pass""",
    "it hopes to be unpickled": WRONG + """
class Owned:
    def __reduce__(self):
        return print, ("owned",)
momentum_step = lambda *a: Owned()""",
    "it equals everything": """
class Equal(tuple):
    def __eq__(self, other):
        return True
def momentum_step(*a):
    return Equal((a[0], a[1]))""",
    "it nests deeply": """
def momentum_step(*a):
    x = []
    for _ in range(100_000):
        x = [x]
    return x""",
    "it returns 240 MB": "def momentum_step(w, *a):\n    return torch.zeros(60_000_000), w",
    "it reads the checks": "from course_lib.checks.chapter_02 import _momentum\nmomentum_step = _momentum",
}  # fmt: skip


@pytest.mark.parametrize("source", FORGERIES.values(), ids=FORGERIES)
def test_a_forgery_earns_nothing(source: str) -> None:
    found = verdict(source)
    assert found.outcome.state != "passed"
    assert not found.points(2)


RAISES = {
    "it forks": ("import os\nos.fork()", "PermissionError"),
    "it starts a program": ("import subprocess\nsubprocess.run(['/usr/bin/id'])", "PermissionError"),
    "it makes a namespace": (
        "import ctypes\nif ctypes.CDLL(None).unshare(0x10000000) != 0:\n    raise RuntimeError('refused')", "refused"),
    "it writes into the library": ("open('/course/course_lib/lab/x.py', 'w')", "Read-only file system"),
    "it writes outside": ("open('/usr/x', 'w')", "Read-only file system"),
    "it calls out": ("import socket\nsocket.create_connection(('127.0.0.1', 22), 2)", "Error"),
    "it takes 8 GB": ("x = bytearray(8 << 30)", "MemoryError"),
    "it takes a tensor of 8 GB": ("x = torch.ones(2 << 30)", "RuntimeError"),
    "it fills the disk": (
        "for k in range(5000):\n    open(f'/tmp/{k}', 'wb').write(b'x' * 60_000)", "No space left on device"),
    "it writes a large file": ("open('/tmp/x', 'wb').write(b'x' * 10**6)", "File too large"),
}  # fmt: skip


@pytest.mark.parametrize(("source", "says"), RAISES.values(), ids=RAISES)
def test_what_is_forbidden_raises(source: str, says: str) -> None:
    raised = f"""
try:
{chr(10).join("    " + line for line in source.splitlines())}
    said = "nothing"
except BaseException as error:
    said = f"{{type(error).__name__}}: {{error}}"
def momentum_step(*a):
    raise ValueError(said.replace(chr(10), " "))"""
    found = verdict(raised)
    assert found.outcome.state == "not yet right"
    assert says in found.outcome.message, found.outcome.message


def test_it_sees_no_files_processes_or_environment_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OF_THE_INSTRUCTOR", "secret")
    other = tmp_path / "another.ipynb"
    other.write_text("another's submission")
    home = Path.home()
    ours = [other, home / ".ssh", home / ".bashrc", Path("/etc/passwd"), Path(__file__).parents[2] / "notebooks"]
    found = verdict(f"""
import os
def momentum_step(*a):
    seen = [path for path in {[str(path) for path in ours]} if os.path.exists(path)]
    checks = os.listdir('/course/course_lib/checks')
    others = [name for name in os.listdir('/proc') if name.isdigit() and int(name) not in (1, os.getpid())]
    ours = 'OF_THE_INSTRUCTOR' in os.environ
    raise ValueError(f"{{seen}} {{checks}} {{others}} {{ours}} {{os.getuid()}}")""")
    assert "ValueError: [] [] [] False 65534" in found.outcome.message


@pytest.mark.parametrize(("source", "says"), {
    "it kills its parent, all others and itself": (RIGHT + """
import os
for number in (os.getppid(), -1):
    try:
        os.kill(number, 9)
    except OSError:
        pass
os._exit(1)""", "ended"),
    "it exits": (RIGHT + "import os\nos._exit(0)", "ended"),
    "it never ends": ("while True:\n    pass", "too long"),
    "its function never ends": ("def momentum_step(*a):\n    while True:\n        pass", "too long"),
    "it prints for ever": ("while True:\n    print('x' * 1000)", "too long"),
}.values())  # fmt: skip
def test_what_ends_or_does_not_end_costs_only_its_own_mark(source: str, says: str) -> None:
    chapter = Slice(("import torch",), frozenset())
    answers = [Answer("02.1", source, "momentum_step"), Answer("02.3", RIGHT, "momentum_step")]
    found = judge(answers, chapter, patience=QUICK, limits=SMALL)
    assert says in found["02.1"].outcome.message
    assert found["02.1"].points(2) == 0
    assert "raised TypeError" in found["02.3"].outcome.message, "the next is asked all the same"


def test_threads_are_bounded_and_end_with_it() -> None:
    before = len(os.listdir("/proc/self/task"))
    found = verdict(WRONG + """
import threading, time
try:
    for _ in range(20_000):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
except RuntimeError:
    pass""")  # fmt: skip
    assert found.outcome.state != "passed"
    assert len(os.listdir("/proc/self/task")) <= before + 1


def test_where_no_sandbox_runs_marking_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise sandbox.NoSandbox("not here")

    monkeypatch.setattr(sandbox, "bwrap", refuse)
    with pytest.raises(sandbox.NoSandbox, match="not here"):
        verdict(RIGHT)


def test_the_judge_itself_is_as_it_was() -> None:
    verdict(FORGERIES["it patches the library"])
    assert not torch.allclose(torch.zeros(1), torch.ones(1))
    assert verdict(RIGHT).outcome.state == "passed"
