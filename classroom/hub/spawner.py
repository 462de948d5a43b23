"""Starts a learner's server where it sees the course, read-only, and the learner's own folder, and no more. Linux only.

bubblewrap gives it user, process, mount, IPC and UTS namespaces of its own. The network is shared, as the hub has to
reach the server; kernels are therefore spoken to over sockets in the learner's private ``/tmp`` and not over TCP, where
anybody on the machine could listen.

| inside | outside |
| --- | --- |
| ``/home/learner`` | ``homes/NAME`` |
| ``/course/course_lib``, ``/course/data`` | the course's library and data, read-only |
| ``/course/handed-out.git`` | what has been handed out, read-only |
| ``/course/inside``, ``/course/etc`` | what runs at the start, settings of git and Jupyter, read-only |
| the interpreter, ``/usr``, ``/lib``, … | the same, read-only |

Two things are not held: a bug in the Linux kernel, and what the machine itself offers on its loopback or on abstract
sockets to every program of this user (a desktop does). So the hub gets a user of its own, without a desktop.
"""

import asyncio
import functools
import json
import os
import resource
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from jupyterhub.spawner import LocalProcessSpawner
from traitlets import Instance, Integer

from classroom.hub import groups
from classroom.hub.publish import BRANCH, INSIDE, TARGET
from classroom.hub.room import GIB, NAME, ROOT, Refused, Room

HERE = Path(__file__).resolve().parent
HOME = "/home/learner"
PROCESSES = 512  # of one learner, threads counted: a server and two kernels that train have some 100
SCRATCH = GIB // 2  # bytes of /tmp, and of /dev/shm, which lie in memory
LARGEST_FILE = 2 * GIB
SYSTEM = (
    "/usr", "/lib", "/lib64", "/bin", "/etc/ssl", "/etc/fonts", "/etc/localtime", "/etc/ld.so.cache", "/etc/hosts",
    "/etc/resolv.conf", "/etc/nsswitch.conf", "/etc/alternatives",
)  # fmt: skip
ISOLATED = (
    "--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try", "--disable-userns",
    "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--uid", "1000", "--gid", "1000", "--hostname", "course",
)  # fmt: skip
# For a shell, inside a line of git's settings: the interpreter's path may have spaces
MERGE = f"{shlex.quote(sys.executable)} -I -S /course/inside/merge_notebook.py %O %A %B %P"
MERGE = MERGE.replace("\\", "\\\\").replace('"', '\\"')
# Without renames: where git takes a new file for an old one with another name, nbgitpuller does not see that it is new,
# and an edit lands in the other file. (git before 2.50 heeds this in its strategy "recursive" only.)
GIT = f"""[core]
	attributesFile = /course/etc/gitattributes
[merge "notebook"]
	name = a notebook in which the learner's lines stay
	driver = "{MERGE}"
[diff]
	renames = false
[merge]
	renames = false
[pull]
	twohead = recursive
"""
ETC = {
    "gitconfig": GIT,
    "gitattributes": "*.ipynb merge=notebook\n",
    "passwd": f"learner:x:1000:1000:learner:{HOME}:/bin/bash\n",
    "group": "learner:x:1000:\n",
    # What is for the instructor does not stand in a learner's JupyterLab
    "jupyter/labconfig/page_config.json": json.dumps({"disabledExtensions": {"@jupyter/nbgrader": True}}),
    # nobody is asked about news from the network
    "jupyter/labconfig/default_setting_overrides.json": json.dumps(
        {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}
    ),
    "jupyter/jupyter_server_config.json": json.dumps(
        {"ServerApp": {"jpserver_extensions": {f"nbgrader.server_extensions.{name}": False for name in (
            "assignment_list", "course_list", "formgrader", "validate_assignment")}}}
    ),
}  # fmt: skip


class RoomSpawner(LocalProcessSpawner):
    """A learner's server in namespaces of its own."""

    room = Instance(Room, help="The settings of the class.").tag(config=True)
    at_once = Integer(4, min=1, help="Servers that start at the same time; the others wait.").tag(config=True)

    _turns: asyncio.Semaphore | None = None  # of all spawners together

    async def start(self) -> tuple[str, int]:
        """Start the server when it is its turn; where it listens."""
        self.cmd = self._command()
        self.env_keep = ["LANG", "LC_ALL"]
        async with self._turn():
            with open(self.room.hub / "logs" / f"{_checked(self.user.name)}.log", "wb") as log:
                self.popen_kwargs = {"stdout": log, "stderr": log}
                where = await super().start()
            await self._answers(where)
        return where

    async def stop(self, now: bool = False) -> None:
        """End the server, and with it all that runs in its namespaces."""
        # bubblewrap hands no signal on: whichever comes, what is inside is killed. So no time is spent on asking
        await super().stop(now=True)

    def get_state(self) -> dict[str, Any]:
        """What is kept for the next hub: not the process, which dies with this one."""
        state = super().get_state()
        state.pop("pid", None)
        return state

    def user_env(self, env: dict[str, str]) -> dict[str, str]:
        """The environment of the server."""
        return env | {
            "HOME": HOME, "USER": self.user.name, "LOGNAME": self.user.name, "SHELL": "/bin/bash",
            "PATH": f"{sys.prefix}/bin:/usr/local/bin:/usr/bin:/bin", "PYTHONPATH": "/course",
            "COURSE_DATA": "/course/data", "COURSE_LEARNER": self.user.name,
            "JUPYTER_RUNTIME_DIR": "/tmp/jupyter", "JUPYTER_CONFIG_PATH": "/course/etc/jupyter",
            "GIT_CONFIG_SYSTEM": "/course/etc/gitconfig", "NBGITPULLER_DEPTH": "0",
            "OMP_NUM_THREADS": str(self.room.threads), "COURSE_CORES": str(self.room.threads),
            "MALLOC_ARENA_MAX": "2", "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip

    def make_preexec_fn(self, name: str) -> Callable[[], None]:
        """What happens between fork and exec."""
        return functools.partial(_limit, self.room, _checked(name))

    async def move_certs(self, paths: dict[str, str]) -> dict[str, str]:
        """Certificates between hub and servers are not used: both are on this machine."""
        return paths

    def _command(self) -> list[str]:
        home = self.room.homes / _checked(self.user.name)
        home.mkdir(mode=0o700, exist_ok=True)
        return [
            self.room.bwrap, *ISOLATED, "--size", str(SCRATCH), "--tmpfs", "/tmp",
            *(word for seen, inside in self._seen() for word in ("--ro-bind", seen, inside)),
            "--proc", "/proc", "--dev", "/dev", "--size", str(SCRATCH), "--tmpfs", "/dev/shm",
            "--bind", str(home), HOME, "--chdir", HOME, "--",
            sys.executable, "/course/inside/start.py", INSIDE, BRANCH, TARGET, str(PROCESSES),
        ]  # fmt: skip

    def _seen(self) -> Iterator[tuple[str, str]]:
        packages = {path for path in sys.path if path.endswith("site-packages")}
        for path in dict.fromkeys([sys.base_prefix, sys.prefix, *sorted(packages), *SYSTEM]):
            if os.path.exists(path):
                yield path, path
        for name in ("course_lib", "data", "pyproject.toml", "requirements.txt"):
            if (ROOT / name).exists():
                yield str(ROOT / name), f"/course/{name}"
        yield str(self.room.repository), "/course/handed-out.git"
        yield str(HERE / "inside"), "/course/inside"
        yield str(self.room.hub / "etc"), "/course/etc"
        for name in ("passwd", "group"):
            yield str(self.room.hub / "etc" / name), f"/etc/{name}"

    @asynccontextmanager
    async def _turn(self) -> Any:
        cls = type(self)
        cls._turns = cls._turns or asyncio.Semaphore(self.at_once)
        async with cls._turns:
            yield

    async def _answers(self, where: tuple[str, int]) -> None:
        """Wait until the server listens, has ended, or has had a minute."""
        for _ in range(300):
            if await self.poll() is not None:
                return
            try:
                _, writer = await asyncio.open_connection(*where)
            except OSError:
                await asyncio.sleep(0.2)
            else:
                writer.close()
                return


def write_settings(folder: Path) -> None:
    """Write the settings that servers see as ``/course/etc``."""
    for name, text in ETC.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _checked(name: str) -> str:
    # Another authenticator may bring other names than the roster's: an address is one, a path is not
    if not NAME.fullmatch(name.replace("@", "_").replace("+", "_")):
        raise Refused(f"{name!r} cannot be the name of a learner's folder")
    return name


def _limit(room: Room, name: str) -> None:
    """Between fork and exec: what the learner may use."""
    memory = int(room.memory * GIB)
    if room.group:
        groups.enter(room.group, name, memory, PROCESSES)
    else:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    os.nice(5)  # so that the hub itself, and who logs in, is served first
