"""Where the course runs: device, seed, profile, folders, and a check of the reader's machine.

A few environment variables decide; each has a good default:

==================  ===================================================================================
``COURSE_DEVICE``   ``cpu``, ``cuda``, ``cuda:1`` or ``mps``; default: the fastest one that is there
``COURSE_PROFILE``  ``quick`` (default: small data, a minute a chapter) or ``full``
``COURSE_DATA``     the folder where data sets lie, which may be read-only; default: ``data/`` of the checkout
``COURSE_HOME``     the folder for what is yours: exercises and guesses; default: ``~/.craft-of-training``
``COURSE_LEARNER``  your name, where several people share that folder; default: the system's name of you
``COURSE_CORES``    how many processor cores to use at most, for a machine that others share; default: all
``COURSE_PROGRESS`` ``off`` silences progress bars
``CI``              set by build servers; silences progress bars too
==================  ===================================================================================
"""

import getpass
import os
import platform
import random
import re
import shlex
import shutil
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import course_lib
from course_lib.lab.files import replaced

PROJECT = "craft-of-training"
GIB = 2**30
_NEEDED_MEMORY = 4 * GIB
_NEEDED_DISK = 1 * GIB


# Device, seed, profile ------------------------------------------------------------------------------------------------


def device() -> torch.device:
    """The device to compute on: ``COURSE_DEVICE``, else CUDA, else Apple's MPS, else the CPU."""
    wanted = os.environ.get("COURSE_DEVICE", "").strip().lower()
    if wanted:
        if wanted not in available_devices():
            raise ValueError(
                f"COURSE_DEVICE={wanted!r} is not on this machine; it has {', '.join(available_devices())}"
            )
        return torch.device(wanted)
    return torch.device(next(name for name in ("cuda", "mps", "cpu") if name in available_devices()))


def available_devices() -> list[str]:
    """The names that ``COURSE_DEVICE`` may take on this machine."""
    names = ["cpu"]
    if torch.backends.mps.is_available():
        names.append("mps")
    if torch.cuda.is_available():
        names += ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return names


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators (torch's on all devices)."""
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer from 0 to 2**32 - 1, got {seed!r}")
    random.seed(int(seed))
    np.random.seed(int(seed))  # noqa: NPY002  the libraries we call draw from the legacy generator
    # torch.manual_seed would record a stack trace for each kind of device that is not there: ten times as slow.
    torch.default_generator.manual_seed(int(seed))
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(int(seed))
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(int(seed))


def profile() -> Literal["quick", "full"]:
    """``quick`` (small data, a minute a chapter) or ``full`` (the real sets, larger networks): ``COURSE_PROFILE``."""
    match os.environ.get("COURSE_PROFILE", "").strip().lower():
        case "" | "quick":
            return "quick"
        case "full":
            return "full"
        case other:
            raise ValueError(f"COURSE_PROFILE={other!r} is not a profile; it must be 'quick' or 'full'")


def quick() -> bool:
    """Whether the quick profile is on."""
    return profile() == "quick"


def interactive() -> bool:
    """Whether a person watches: a notebook or a terminal, not a test, a build server or a validation run."""
    environment = os.environ
    if environment.get("COURSE_PROGRESS", "").strip().lower() in {"off", "0", "no", "false"}:
        return False
    if any(environment.get(name) for name in ("CI", "PYTEST_VERSION", "COURSE_VALIDATING")):
        return False
    return in_notebook() or sys.stderr.isatty()


def in_notebook() -> bool:
    """Whether this is a notebook's kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and hasattr(shell, "kernel")


# Folders --------------------------------------------------------------------------------------------------------------


def checkout() -> Path | None:
    """The folder of the course's checkout, or None where ``course_lib`` was installed without one."""
    folder = Path(course_lib.__file__).resolve().parent.parent
    pyproject = folder / "pyproject.toml"
    if pyproject.is_file() and f'name = "{PROJECT}"' in pyproject.read_text(encoding="utf-8"):
        return folder
    return None


def data_folder() -> Path:
    """Where data sets lie: ``COURSE_DATA``, else ``data/`` of the checkout, else ``~/.craft-of-training``.

    The folder is named, not made: whoever writes into it makes it.
    """
    if chosen := os.environ.get("COURSE_DATA", "").strip():
        return Path(chosen).expanduser().resolve()
    root = checkout()
    return root / "data" if root is not None else Path.home() / ".craft-of-training"


def home_folder() -> Path:
    """Where a learner's progress lies: ``COURSE_HOME``, else ``~/.craft-of-training``. Apart from the data on purpose:
    those may be shared by a class, and read-only. The folder is named, not made."""
    chosen = os.environ.get("COURSE_HOME", "").strip()
    return Path(chosen).expanduser().resolve() if chosen else Path.home() / ".craft-of-training"


# Names that containers give to everybody
_NOBODYS = {"jovyan", "root", "user", "ubuntu", "debian", "student", "learner", "coder", "vscode", "codespace", "admin"}


def learner() -> str:
    """Whose progress it is, as part of a file's name: ``COURSE_LEARNER``, else the name of the system's user.

    Where many share a folder (``COURSE_HOME`` is set) and the user's name is everybody's, such as ``jovyan``, a person
    at a notebook is asked once; the answer is remembered in the home folder of that user.
    """
    if chosen := os.environ.get("COURSE_LEARNER", "").strip():
        return _file_name(chosen)
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container may run as a user without a name
        user = "learner"
    if user not in _NOBODYS or not os.environ.get("COURSE_HOME", "").strip():
        return _file_name(user)
    remembered = Path.home() / ".craft-of-training" / "learner.txt"
    if remembered.is_file():
        return _file_name(remembered.read_text(encoding="utf-8").strip()) or _file_name(user)
    if interactive() and in_notebook():
        try:
            answer = input("Your name, for your own progress in the folder of the class: ").strip()
        except (EOFError, RuntimeError):  # no keyboard behind this kernel
            answer = ""
        if answer:
            with replaced(remembered) as file:
                file.write(answer.encode())
            return _file_name(answer)
    return _file_name(user)


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)


# The machine ----------------------------------------------------------------------------------------------------------


def describe_machine() -> pd.DataFrame:
    """What this machine is, one fact a row: software, processor, memory, device."""
    there = available_devices()
    facts = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": _version("torchvision") or "not installed",
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor_name(),
        "cores": f"{usable_cores()} usable, torch uses {torch.get_num_threads()}",
        "memory": _gib(total_memory()),
        "device": _device_name(device()),
        "devices there": ", ".join(there),
        "profile": profile(),
    }
    return pd.DataFrame({"this machine": facts})


def usable_cores() -> int:
    """How many processor cores this process may use: what the system grants, and not more than ``COURSE_CORES``.

    Raises
    ------
    ValueError : ``COURSE_CORES`` is no whole number from 1.
    """
    granted = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("COURSE_CORES", "").strip()
    if not wanted:
        return granted
    if not wanted.isascii() or not wanted.isdigit() or int(wanted) < 1:
        raise ValueError(f"COURSE_CORES={wanted!r} is not a number of cores; it must be a whole number from 1")
    return min(granted, int(wanted))


def total_memory() -> int | None:
    """Bytes of main memory, or of the container's share of it; None where the system does not say."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return total


def _processor_name() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.processor() or platform.machine() or "unknown"


def _device_name(where: torch.device) -> str:
    if where.type == "cuda":
        properties = torch.cuda.get_device_properties(where)
        return f"{where} ({properties.name}, {_gib(properties.total_memory)})"
    return str(where)


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / GIB:.1f} GiB"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# Is the machine ready? ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what was found, what is needed, and how to mend it where it is not right."""

    what: str
    found: str
    needed: str
    ok: bool
    mend: str = ""
    essential: bool = True  # False: the course runs without it, a little worse


@dataclass(frozen=True)
class MachineCheck:
    """All that ``check_machine`` looked at; ``line`` is the verdict in one line."""

    checks: tuple[Check, ...]

    @property
    def ready(self) -> bool:
        """Whether the course runs here."""
        return all(check.ok for check in self.checks if check.essential)

    @property
    def line(self) -> str:
        """The verdict: the same words on each machine that is ready, else what is missing and what mends it."""
        wrong = [check for check in self.checks if not check.ok and (check.essential or self.ready)]
        if not wrong:
            return "Ready: this machine has everything the course needs."
        what = "; ".join(f"{check.what} ({check.found}, needed: {check.needed})" for check in wrong)
        mends = " && ".join(dict.fromkeys(check.mend for check in wrong if check.mend))
        return f"{'Ready, though not perfect' if self.ready else 'Missing'}: {what}. To mend it: {mends}"

    def frame(self) -> pd.DataFrame:
        """One row a check."""
        rows = [
            {"what": c.what, "found": c.found, "needed": c.needed, "ok": _mark(c), "mend": "" if c.ok else c.mend}
            for c in self.checks
        ]
        return pd.DataFrame(rows).set_index("what")

    def __repr__(self) -> str:
        return f"{self.frame().to_string()}\n\n{self.line}"

    def _repr_html_(self) -> str:
        return f"{self.frame().to_html()}<p><b>{escape(self.line)}</b></p>"


def _mark(check: Check) -> str:
    return "✓" if check.ok else "✗" if check.essential else "!"


def check_machine() -> MachineCheck:
    """Look whether this machine can run the course: Python, packages, torch at work, memory, data folder, widgets."""
    machine = (_check_torch(), _check_cores(), _check_memory())
    return MachineCheck((_check_python(), *_check_packages(), _check_widgets(), *machine, *_check_data_folder()))


def _check_python() -> Check:
    found = platform.python_version()
    mend = "install Python 3.11 or newer from https://www.python.org/downloads/, then: make clean lab"
    return Check("Python", found, "3.11 or newer", sys.version_info >= (3, 11), mend)


def requirements() -> list[Requirement]:
    """What the course asks for: the exact pins of the checkout, else the ranges that the installed package declares."""
    root = checkout()
    if root is not None and (root / "requirements.txt").is_file():
        lines = (root / "requirements.txt").read_text(encoding="utf-8").splitlines()
    else:
        lines = metadata.requires(PROJECT) or []
    bare = (line.partition("#")[0].strip() for line in lines)
    wanted = [Requirement(line) for line in bare if line and not line.startswith("-")]
    return [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]


def _needed_at_run_time() -> set[str]:
    """The packages that the course itself imports; the other pins serve its tests."""
    root = checkout()
    if root is None:
        lines = metadata.requires(PROJECT) or []
    else:
        lines = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    return {canonicalize_name(Requirement(line).name) for line in lines}


def _check_packages() -> list[Check]:
    root = checkout()
    asked = ["-r", str(root / "requirements.txt")] if root is not None else ["--upgrade", PROJECT]
    mend = shlex.join([sys.executable, "-m", "pip", "install", *asked])
    checks, as_pinned = [], 0
    wanted, at_run_time = requirements(), _needed_at_run_time()
    for requirement in wanted:
        found = _version(requirement.name)
        if found is not None and requirement.specifier.contains(found, prereleases=True):
            as_pinned += 1
            continue
        needed = str(requirement.specifier).replace("==", "")
        # another version mostly works, though the stored outputs were made with the pinned one
        essential = found is None and canonicalize_name(requirement.name) in at_run_time
        checks.append(Check(requirement.name, found or "not installed", needed, False, mend, essential))
    return checks or [Check("packages", f"{as_pinned} as pinned", f"{len(wanted)} as pinned", True)]


def _check_torch() -> Check:
    """Whether torch computes on the chosen device: a small product forwards and backwards."""
    mend = (
        "set COURSE_DEVICE=cpu, or install the torch build for this machine: https://pytorch.org/get-started/locally/"
    )
    try:
        where = device()
        weight = torch.full((4, 4), 0.5, device=where, requires_grad=True)
        (torch.ones(4, 4, device=where) @ weight).sum().backward()
        assert weight.grad is not None
        right = bool((weight.grad == 4).all())
    except Exception as error:  # whatever a broken driver raises is the finding
        return Check("torch at work", f"{type(error).__name__}: {error}", "a gradient", False, mend)
    return Check("torch at work", f"{'a' if right else 'a wrong'} gradient on {where}", "a gradient", right, mend)


def _check_widgets() -> Check:
    """Whether the notebook can draw sliders: the package in the kernel, and its other half in JupyterLab."""
    absent = [name for name in ("ipywidgets", "jupyterlab_widgets") if _version(name) is None]
    mend = shlex.join([sys.executable, "-m", "pip", "install", "ipywidgets"])
    found = f"{' and '.join(absent)} not installed" if absent else "there"
    return Check("widgets", found, "there", not absent, mend, essential=False)


def _check_cores() -> Check:
    found = f"{usable_cores()} usable, torch uses {torch.get_num_threads()}"
    return Check("cores", found, "2 or more", usable_cores() >= 2, "nothing to do: each chapter takes longer", False)


def _check_memory() -> Check:
    found, needed = total_memory(), f"{_gib(_NEEDED_MEMORY)} or more"
    mend = "close other programs, and run one notebook at a time"
    return Check("memory", _gib(found), needed, found is None or found >= _NEEDED_MEMORY, mend, essential=False)


def _check_data_folder() -> list[Check]:
    folder, home = data_folder(), home_folder()
    mend = "export COURSE_DATA=<a folder on a disk with room>  (then start again)"
    free = shutil.disk_usage(_nearest_existing(folder)).free
    # Data that somebody else laid out serve as well: what is not there cannot be downloaded, and the error will say so
    found = "writable" if _can_write(folder) else "can be read (nothing will be downloaded into it)"
    kept = _can_write(home)
    where = "writable" if kept else f"{home} cannot be written"
    home_mend = "export COURSE_HOME=<a folder you may write into>  (then start again)"
    return [
        Check("data folder", found, "there, or writable", folder.is_dir() or _can_write(folder), mend),
        Check("your progress", where, "writable", kept, home_mend, essential=False),
        Check("free disk", _gib(free), f"{_gib(_NEEDED_DISK)} or more", free >= _NEEDED_DISK, mend, essential=False),
    ]


def _can_write(folder: Path) -> bool:
    try:  # os.access lies on network drives and on Windows: only a real file proves it
        with tempfile.TemporaryFile(dir=_nearest_existing(folder)):
            return True
    except OSError:
        return False


def _nearest_existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.is_dir())
