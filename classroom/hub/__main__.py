"""Start the hub of a class: ``python -m classroom.hub --folder class [--names names.txt] [--host 0.0.0.0 …]``."""

import argparse
import os
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path

from classroom.hub import groups, roster
from classroom.hub.publish import link, publish
from classroom.hub.room import ADDRESS, ROOT, Refused, Room, check_machine, find_bwrap
from classroom.hub.spawner import ISOLATED, write_settings

CONFIG = Path(__file__).with_name("jupyterhub_config.py")
AS_ROOT = "Warning: you are root. What breaks out of a learner's namespaces is root as well: give the hub its own user."
NO_TLS = "Warning: without --cert and --key all that is sent, passwords too, can be read by whoever is in this network."
PER_PROCESS = "Memory: {memory:g} GiB for each process of a learner, not for all of one together: {why}."
SUM = "Memory: {memory:g} GiB for each learner, all processes together."


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m classroom.hub", description="One server for the room.")
    add = made.add_argument
    add("--folder", type=Path, default=Path("class"), help="the class's folder (class)")
    add("--names", type=Path, help="a file with one name a line: who is new gets a password, printed once")
    add("--instructor", action="append", default=[], metavar="NAME", help="a name that may administer the hub")
    add("--host", default=Room.host, help="0.0.0.0 for the room (127.0.0.1: this machine only)")
    add("--port", type=int, default=Room.port, help="(8000)")
    add("--cert", default="", help="a certificate, for TLS")
    add("--key", default="", help="its key")
    add("--memory", type=float, default=Room.memory, help="GiB that a learner may use (4)")
    add(
        "--threads",
        type=int,
        default=Room.threads,
        help="of one operation of torch, and processes of one comparison (1)",
    )
    add("--at-once", type=int, default=0, help="servers that start at the same time (twice the cores)")
    add("--most", type=int, default=Room.most, help="servers that may run (0: no limit)")
    add("--kernel-idle", type=float, default=Room.kernel_idle, help="minutes until an idle kernel is ended (45)")
    add("--server-idle", type=float, default=Room.server_idle, help="minutes until an idle server is ended (120)")
    return made


def prepared(given: argparse.Namespace) -> Room:
    """The room of the command line, with its folders, roster and repository; says what there is to know.

    Raises
    ------
    Refused : the hub cannot run like this.
    """
    room = Room(
        folder=str(given.folder.resolve()), host=given.host, port=given.port, memory=given.memory,
        threads=given.threads, at_once=given.at_once or 2 * len(os.sched_getaffinity(0)), most=given.most,
        kernel_idle=given.kernel_idle, server_idle=given.server_idle,
        key=os.path.abspath(given.key) if given.key else "", cert=os.path.abspath(given.cert) if given.cert else "",
    )  # fmt: skip
    check_machine()
    room = replace(room, bwrap=find_bwrap(ISOLATED), hub_port=free_port(), proxy_port=free_port())
    _check_port(room)
    print(publish(room))
    write_settings(room.hub / "etc")
    new = roster.add(room.roster, given.instructor, role="instructor")
    if given.names:
        new |= roster.add(room.roster, roster.names_in(given.names))
    people = roster.read(room.roster)
    if learners := [name for name in given.instructor if people[name.strip().lower()].role != "instructor"]:
        raise Refused(f"--instructor {learners[0]}: the roster knows this name as a learner; remove it first")
    if not people and not (Path(room.folder) / "hub_config.py").exists():
        raise Refused("nobody could log in: name a file with one name a line, --names names.txt")
    if new:
        print(roster.paper(new))
    group, why = groups.divide()
    print((SUM if group else PER_PROCESS).format(memory=room.memory, why=why))
    return replace(room, group=group)


def free_port() -> int:
    """A port of the loopback that nobody uses."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _check_port(room: Room) -> None:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((room.host, room.port))
        except OSError as error:
            raise Refused(f"{room.host}:{room.port} cannot be used ({error.strerror}); --port names another") from None


def main(arguments: list[str] | None = None) -> int:
    """Prepare the class, and become its hub."""
    given = parser().parse_args(arguments)
    try:
        room = prepared(given)
    except Refused as error:
        print(error, file=sys.stderr)
        return 2
    if os.geteuid() == 0:
        print(AS_ROOT)
    if room.host not in ("127.0.0.1", "localhost", "::1") and not room.cert:
        print(NO_TLS)
    print(f"The hub starts at {room.address} (Ctrl-C ends it, and all servers)")
    print(f"what you hand out while it runs is taken in by this link: {link(room.address)}", flush=True)
    (room.hub / ADDRESS).write_text(room.address, encoding="utf-8")
    here = str(Path(sys.executable).parent)
    environment = os.environ | room.to_environment()
    environment["PATH"] = os.pathsep.join([here, environment.get("PATH", os.defpath)])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
    os.chdir(room.hub)
    # A shell that starts it in the background has Ctrl-C ignored; the hub's parts would inherit that, and end late
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.execve(sys.executable, [sys.executable, "-m", "jupyterhub", "--config", str(CONFIG)], environment)


if __name__ == "__main__":
    sys.exit(main())
