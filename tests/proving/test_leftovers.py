"""What a program left behind is found, whoever its parent is by now, and is cleared away."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from course_lib.proving.leftovers import Traces


@pytest.fixture
def traces() -> Iterator[Traces]:
    made = Traces()
    yield made
    made.clear()


def run(traces: Traces, program: str) -> str:
    """What a Python program prints that runs under the mark, and ends."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, **traces.environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.strip()


ORPHAN = """
    import subprocess, sys
    listen = "import socket, time; s = socket.create_server(('127.0.0.1', 0)); print(s.getsockname()[1]); "
    listen += "sys.stdout.flush(); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", "import sys; " + listen], stdout=-1, stderr=-3, text=True)
    print(child.pid, child.stdout.readline())
"""


def test_a_tidy_program_leaves_nothing(traces: Traces) -> None:
    run(traces, "import tempfile; tempfile.TemporaryDirectory(), tempfile.NamedTemporaryFile()")
    assert traces.left() == []


def test_an_orphan_is_found_with_its_port_and_ended(traces: Traces) -> None:
    pid, port = run(traces, ORPHAN).split()
    (found,) = traces.left(patience=0)
    assert f"the process {pid}, listening on port {port} (" in found
    traces.clear()
    # gone, or (where nobody reaps orphans) dead
    assert not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE


def test_a_process_that_is_about_to_end_is_waited_for(traces: Traces) -> None:
    run(traces, "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(0.3)'])")
    assert traces.left(patience=30) == []


def test_a_temporary_file_is_named_and_removed(traces: Traces) -> None:
    path = Path(run(traces, "import tempfile; print(tempfile.mkstemp(prefix='weights-')[1])"))
    assert traces.left() == [f"the temporary file {path.name}"]
    traces.clear()
    assert not path.exists()


def test_processes_of_others_are_left_alone(traces: Traces) -> None:
    other = Traces()
    pid = int(run(other, ORPHAN).split()[0])
    assert traces.left(patience=0) == []
    traces.clear()
    assert psutil.Process(pid).is_running()
    other.clear()
