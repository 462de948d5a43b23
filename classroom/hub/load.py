"""What does a room need? N learners at once on a hub of this machine, each running a chapter's cells, measured.

    python -m classroom.hub.load --learners 30 --chapter 08 [--arrival staggered|together] [--cells 20] [--seconds 600]

First one learner runs the cells alone, then all of them. Everything happens in a folder of its own, which is gone
afterwards, on the loopback. The rows go to ``CLASS/load.csv``; two tables for planning follow from what was measured:
nothing in them is assumed but the length of a lesson.

| figure | what it is |
| --- | --- |
| ``login``, ``server``, ``kernel`` | seconds until logged in, until the server is ready (turn awaited), to a kernel |
| ``first cell`` | seconds from the request for the login to the end of the first cell |
| ``cells`` | seconds of all cells together; ``slower`` is the median of each cell's ratio to the same cell alone |
| ``server MB``, ``kernel MB`` | PSS: memory of its own, and its share of what is shared with others |
| ``CPU s`` | seconds of processor time of all of the learner's processes |
"""

import argparse
import os
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import pandas as pd
import requests

from classroom import course
from classroom.hub.__main__ import free_port
from classroom.hub.client import Failed, Hub, Learner, TookTooLong, running
from classroom.hub.room import GIB, Refused, Room, check_machine, find_bwrap
from classroom.hub.spawner import HOME, ISOLATED
from classroom.student_copy import exercise_of, write

LESSON = 90 * 60  # seconds
SIZES = (4, 8, 16, 24, 32, 64, 128)  # GiB of the machines in the table
LEFT = 0.10  # of a machine's memory for the system and its file cache
ENOUGH = GIB  # bytes: with less memory left nobody goes on
MB = 10**6


@dataclass
class Seen:
    """What one learner met."""

    name: str
    arrival: float
    login: float = float("nan")
    server: float = float("nan")
    kernel: float = float("nan")
    first: float = float("nan")
    cells: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    server_bytes: int = 0
    kernel_bytes: int = 0
    cpu: float = 0.0
    stopped_early: bool = False


# Processes, read from /proc -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """One process as ``/proc`` shows it."""

    number: int
    parent: int
    words: str
    cpu: float


def processes() -> dict[int, Process]:
    """All processes that can be seen; those that end meanwhile are passed over."""
    ticks, found = os.sysconf("SC_CLK_TCK"), {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
            words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        # its own time and that of children which have ended
        found[int(folder.name)] = Process(int(folder.name), int(fields[1]), words, sum(map(int, fields[11:15])) / ticks)
    return found


def tree(root: int, there: Mapping[int, Process]) -> list[Process]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for process in there.values():
        children.setdefault(process.parent, []).append(process.number)
    found, open_ends = [], [root]
    while open_ends:
        number = open_ends.pop()
        if number in there:
            found.append(there[number])
        open_ends += children.get(number, [])
    return found


def pss(number: int) -> int:
    """Bytes of a process: those of its own, and its share of the others; 0 when it has ended.

    Raises
    ------
    Refused : the kernel does not tell this user.
    """
    try:
        lines = Path(f"/proc/{number}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    except PermissionError:
        raise Refused(f"/proc/{number}/smaps_rollup cannot be read, so that memory cannot be measured here") from None
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def available() -> int:
    """Bytes of memory that the machine has left."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def of_learners(hub: Hub, there: Mapping[int, Process]) -> dict[str, list[Process]]:
    """The processes of each learner by name, and those of the hub itself by ""."""
    found: dict[str, list[Process]] = {}
    all_of_hub = tree(hub.process.pid, there)
    taken: set[int] = set()
    for process in all_of_hub:
        before, mark, _ = process.words.partition(f" {HOME} --chdir")
        if mark and process.number not in taken:  # the parent comes before its children
            mine = tree(process.number, there)
            found[Path(before.rpartition(" ")[2]).name] = mine
            taken |= {each.number for each in mine}
    found[""] = [process for process in all_of_hub if process.number not in taken]
    return found


# Learners -------------------------------------------------------------------------------------------------------------


def cells_of(path: Path, most: int) -> list[str]:
    """The code cells of a chapter before its first exercise; at most ``most`` of them, 0 for all."""
    notebook, found = nbformat.read(path, as_version=4), []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            if exercise_of(cell.source):
                break
            found.append(cell.source)
    return found[:most] if most else found


def visit(
    seen: Seen, hub: Hub, password: str, path: str, cells: Sequence[str], seconds: float, over: threading.Event
) -> None:
    """Log in, open the notebook and run its cells; what happens is written into ``seen``."""
    begin = time.monotonic()
    learner = None
    try:
        learner = Learner(hub.url, seen.name, password)
        seen.login = time.monotonic() - begin
        learner.start(900)
        seen.server = time.monotonic() - begin - seen.login
        learner.open(path)
        learner.run("")
        seen.kernel = time.monotonic() - begin - seen.login - seen.server
        started = time.monotonic()
        for number, source in enumerate(cells, 1):
            left = started + seconds - time.monotonic()
            if over.is_set() or left <= 0:
                seen.stopped_early = True
                break
            output = learner.run(source, max(left, 60))
            seen.cells.append(output.seconds)
            if number == 1:
                seen.first = time.monotonic() - begin
            if output.error:
                seen.failures.append(f"cell {number}: {output.error[:200]}")
    except TookTooLong:
        seen.stopped_early = True  # the cell counts as not run
    except (Failed, requests.RequestException) as error:
        seen.failures.append(str(error)[:300])
    finally:
        if learner is not None:
            learner.close()


def together(
    hub: Hub, arrivals: Mapping[str, float], path: str, cells: Sequence[str], seconds: float
) -> tuple[list[Seen], int]:
    """All learners, each from its time of arrival on; what they met, with their memory when all have finished.

    The number is the most bytes that hub and learners together were seen to have, looked at every 15 seconds.
    """
    over, begin = threading.Event(), time.monotonic()
    met = [Seen(name, arrival) for name, arrival in arrivals.items()]

    def come(seen: Seen) -> None:
        if not over.wait(max(0.0, begin + seen.arrival - time.monotonic())):
            visit(seen, hub, hub.passwords[seen.name], path, cells, seconds, over)

    threads = [threading.Thread(target=come, args=(seen,), daemon=True) for seen in met]
    for thread in threads:
        thread.start()
    looked, peak = time.monotonic(), 0
    try:
        while alive := [thread for thread in threads if thread.is_alive()]:
            alive[0].join(1)
            if available() < ENOUGH and not over.is_set():
                print(f"less than {ENOUGH / GIB:g} GiB of memory are left: nobody begins a further cell", flush=True)
                over.set()
            if time.monotonic() - looked > 15:
                peak = max(peak, sum(pss(process.number) for process in tree(hub.process.pid, processes())))
                looked = time.monotonic()
                done = sum(len(seen.cells) for seen in met)
                print(f"{looked - begin:5.0f} s: {len(met) - len(alive)} of {len(met)} finished, {done} cells run, "
                      f"at most {peak / MB:.0f} MB", flush=True)  # fmt: skip
    finally:
        over.set()
    there = processes()
    found = of_learners(hub, there)
    for seen in met:
        mine = found.get(seen.name, [])
        kernels = {p.number for root in mine if "ipykernel" in root.words for p in tree(root.number, there)}
        for process in mine:
            size = pss(process.number)
            if process.number in kernels:
                seen.kernel_bytes += size
            else:
                seen.server_bytes += size
            seen.cpu += process.cpu
    return met, max(peak, sum(pss(process.number) for process in tree(hub.process.pid, there)))


# Tables ---------------------------------------------------------------------------------------------------------------


def table(met: Sequence[Seen], alone: Seen) -> pd.DataFrame:
    """One row a learner."""
    rows = []
    for seen in met:
        ratios = [now / before for now, before in zip(seen.cells, alone.cells, strict=False) if before > 0.05]
        rows.append({
            "learner": seen.name, "arrival s": seen.arrival, "login s": seen.login, "server s": seen.server,
            "kernel s": seen.kernel, "first cell s": seen.first, "cells": len(seen.cells),
            "cells s": sum(seen.cells), "slower": statistics.median(ratios) if ratios else float("nan"),
            "server MB": seen.server_bytes / MB, "kernel MB": seen.kernel_bytes / MB, "CPU s": seen.cpu,
            "stopped early": seen.stopped_early, "failures": "; ".join(seen.failures),
        })  # fmt: skip
    return pd.DataFrame(rows)


def plan(met: Sequence[Seen], alone: Seen, hub_bytes: int, peak: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """How many learners fit into a memory, and what numbers of learners need, from what was measured."""
    complete = [seen for seen in met if seen.kernel_bytes]
    if not complete:
        return pd.DataFrame(), pd.DataFrame()
    # The one who was alone had time for all cells; pages that a room would share are counted as that one's own
    largest = max(seen.server_bytes + seen.kernel_bytes for seen in (alone, *complete))
    each = max(largest, (peak - hub_bytes) // len(complete))  # cells may need more than what is left of them
    work = statistics.median(seen.cpu for seen in complete)
    busy = min(1.0, alone.cpu / max(sum(alone.cells) + alone.server + alone.kernel, 1e-9))
    fit = [{"GiB": size, "learners": max(0, int((size * GIB * (1 - LEFT) - hub_bytes) // each))} for size in SIZES]
    need = [
        {"learners": n, "GiB": (n * each + hub_bytes) / (1 - LEFT) / GIB, "cores, all compute at once": n * busy,
         "cores, spread over a lesson": n * work / LESSON}
        for n in (5, 10, 20, 30, 40)
    ]  # fmt: skip
    return pd.DataFrame(fit).set_index("GiB"), pd.DataFrame(need).set_index("learners")


# The command line -----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m classroom.hub.load", description="What does a room need?")
    add = made.add_argument
    add("--folder", type=Path, default=Path("class"), help="the class's folder, for load.csv")
    add("--learners", type=int, default=5, help="how many (5)")
    add("--chapter", default="08", help="whose cells they run (08)")
    add("--arrival", choices=("staggered", "together"), default="staggered", help="one after the other, or at once")
    add("--spread", type=float, default=120, help="seconds over which they arrive, if staggered (120)")
    add("--cells", type=int, default=0, help="only the first of the chapter's cells (0: up to the first exercise)")
    add("--seconds", type=float, default=1200, help="after which a learner begins no further cell (1200)")
    add("--memory", type=float, default=Room.memory, help="GiB that each process may use (4)")
    return made


def measure(given: argparse.Namespace, folder: Path) -> tuple[list[Seen], Seen, int, int, float]:
    """Run the load test in ``folder``: what the learners met, one alone; bytes of the hub, at most of all; seconds."""
    name = course.chapter_of(given.chapter)
    (folder / "release" / name).mkdir(parents=True)
    write(course.NOTEBOOKS / f"{name}.ipynb", folder / "release" / name / f"{name}.ipynb")
    cells = cells_of(course.NOTEBOOKS / f"{name}.ipynb", given.cells)
    names = [f"learner-{number:02d}" for number in range(1, given.learners + 1)]
    (folder / "names.txt").write_text("\n".join(["alone", *names]))
    path = f"course/{name}.ipynb"
    words = ["--names", str(folder / "names.txt"), "--memory", str(given.memory)]
    with running(folder, free_port(), *words) as hub:
        print(f"{len(cells)} cells of {name}, first by one learner alone", flush=True)
        (alone,), _ = together(hub, {"alone": 0.0}, path, cells, given.seconds)
        print(f"alone: {sum(alone.cells):.1f} s; now {given.learners}, {given.arrival}", flush=True)
        Learner(hub.url, "alone", hub.passwords["alone"]).stop()
        step = given.spread / max(1, given.learners - 1) if given.arrival == "staggered" else 0.0
        begin = time.monotonic()
        met, peak = together(
            hub, {name: number * step for number, name in enumerate(names)}, path, cells, given.seconds
        )
        seconds = time.monotonic() - begin
        own = sum(pss(process.number) for process in of_learners(hub, processes())[""])
    return met, alone, own, peak, seconds


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables, and write ``load.csv``."""
    given = parser().parse_args(arguments)
    if given.learners < 1 or given.spread < 0 or given.cells < 0 or given.seconds <= 0:
        print("--learners must be 1 or more, --spread and --cells 0 or more, --seconds above 0", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the hub is ended and the folder removed
    folder = Path(tempfile.mkdtemp(prefix="load-"))
    try:
        check_machine()
        find_bwrap(ISOLATED)
        met, alone, own, peak, seconds = measure(given, folder)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (Refused, course.Refused, Failed, ValueError, requests.RequestException) as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report(given, met, alone, own, peak, seconds)


def report(given: argparse.Namespace, met: Sequence[Seen], alone: Seen, own: int, peak: int, seconds: float) -> int:
    """Print and keep what was measured; 1 if something failed."""
    rows = table([alone, *met], alone)
    given.folder.mkdir(parents=True, exist_ok=True)
    rows.to_csv(given.folder / "load.csv", index=False)
    with pd.option_context("display.width", 200, "display.max_columns", 20):
        print(rows.to_string(index=False, float_format="{:.1f}".format))
        failed, early = sum(bool(seen.failures) for seen in met), sum(seen.stopped_early for seen in met)
        print(f"\n{len(met)} learners, {given.arrival}: {seconds:.0f} s; failed: {failed}; out of time before the last "
              f"cell: {early}; the hub itself: "
              f"{own / MB:.0f} MB; at most {peak / MB:.0f} MB in all; rows: {given.folder / 'load.csv'}")  # fmt: skip
        fit, need = plan(met, alone, own, peak)
        if not need.empty:
            print(f"\nFrom the largest learner measured; {LEFT:.0%} of the memory are left to the system\n")
            print(fit.to_string(), need.to_string(float_format="{:.2f}".format), sep="\n\n")
    return 1 if failed or alone.failures else 0


if __name__ == "__main__":
    sys.exit(main())
