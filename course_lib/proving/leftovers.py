"""What a program left behind when it ended: processes (and the ports they listen on) and temporary files.

    run = Traces()
    subprocess.run(command, env=os.environ | run.environment)
    left = run.left()   # one line for each thing; empty where there is nothing
    run.clear()

A process hands its environment on to all that it starts, so a mark in it finds them, whoever their parent is by now.
"""

import shutil
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "COURSE_TRACES"
CACHES = ("torchinductor_",)  # torch keeps what it compiled for the next run, on purpose
PATIENCE = 5.0  # seconds for processes that are about to end: a parent's helpers notice only then that it has gone


class Traces:
    """A folder for temporary files and a mark for processes; ``environment`` hands both to a program."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self.folder = Path(tempfile.mkdtemp(prefix="course-run-"))

    @property
    def environment(self) -> Mapping[str, str]:
        return {MARK: self.mark, "TMPDIR": str(self.folder), "TEMP": str(self.folder), "TMP": str(self.folder)}

    def left(self, patience: float = PATIENCE) -> list[str]:
        """What is still there, after waiting up to ``patience`` seconds for processes to end."""
        until = time.monotonic() + patience
        while (running := self._processes()) and time.monotonic() < until:
            time.sleep(0.05)
        there = [path.name for path in sorted(self.folder.iterdir()) if not path.name.startswith(CACHES)]
        files = [f"the temporary file {name}" for name in there]
        return [_in_words(process) for process in running] + files

    def clear(self) -> None:
        """End what still runs and remove the folder."""
        running = self._processes()
        for process in running:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(running, timeout=PATIENCE)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _processes(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if _environment(process).get(MARK) == self.mark]


def _environment(process: psutil.Process) -> Mapping[str, str]:
    try:
        # one that has ended and waits for its parent to notice does nothing any more, and holds nothing
        return {} if process.status() == psutil.STATUS_ZOMBIE else process.environ()
    except (psutil.Error, OSError):  # it ended meanwhile, or is not ours
        return {}


def _in_words(process: psutil.Process) -> str:
    try:
        ports = [c.laddr.port for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        command = " ".join(process.cmdline())[:120]
    except (psutil.Error, OSError):
        ports, command = [], "already gone again"
    listening = f", listening on port {', '.join(map(str, sorted(set(ports))))}" if ports else ""
    return f"the process {process.pid}{listening} ({command})"
