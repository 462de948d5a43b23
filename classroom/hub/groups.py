"""Memory and processes of a learner as a sum, by cgroups of version 2, where the hub may make some.

Most sessions may not. This one may, for example: ``systemd-run --user --scope -p Delegate=yes make hub``. Elsewhere the
limit holds for each process of a learner by itself. Written after the kernel's documentation, and tried on a folder
that looks like one only.
"""

import os
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
NEEDED = ("memory", "pids")
OF_HUB = "hub"  # a group that is divided may hold no process of its own: the hub moves here


def divide(root: Path = ROOT, own: str = "", family: frozenset[int] = frozenset()) -> tuple[str, str]:
    """The group that may be divided among learners, with ""; else "" and why there is none.

    Parameters
    ----------
    root : where cgroups are mounted.
    own : the group of this process below it; "" asks the kernel.
    family : the processes that may move with this one; empty for it and its ancestors.
    """
    if not (root / "cgroup.controllers").is_file():
        return "", "this system has no cgroups of version 2"
    group = root / (own or _own_group()).lstrip("/")
    try:
        absent = set(NEEDED) - set((group / "cgroup.controllers").read_text().split())
        if absent:
            return "", f"the cgroup {group} has no control of {' and '.join(sorted(absent))}"
        inside = [int(line) for line in (group / "cgroup.procs").read_text().split()]
        if not set(inside) <= (family or _ancestors()):
            return "", f"other programs run in the cgroup {group} as well"
        (group / OF_HUB).mkdir(exist_ok=True)
        for process in inside:
            (group / OF_HUB / "cgroup.procs").write_text(str(process))
        (group / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in NEEDED))
    except OSError as error:
        return "", f"the cgroup {group} is not ours to divide ({error.strerror})"
    return str(group), ""


def enter(group: str, learner: str, memory: int, processes: int) -> None:
    """Put this process, and all that it will start, into the learner's group, with at most ``memory`` bytes."""
    mine = Path(group) / f"learner-{learner}"
    mine.mkdir(exist_ok=True)
    (mine / "memory.max").write_text(str(memory))
    (mine / "pids.max").write_text(str(processes))
    (mine / "cgroup.procs").write_text(str(os.getpid()))


def _own_group() -> str:
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    return next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/")


def _ancestors() -> frozenset[int]:
    found, process = set(), os.getpid()
    while process > 0:
        found.add(process)
        try:
            status = Path(f"/proc/{process}/stat").read_text()
        except OSError:
            break
        process = int(status.rpartition(")")[2].split()[1])
    return frozenset(found)
