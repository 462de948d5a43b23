"""Names and passwords of a room: ``hub/roster.csv`` holds names, salts and scrypt's hashes, and no password.

    python -m classroom.hub.roster --folder class add ada bob        prints a password for each that is new
    python -m classroom.hub.roster --folder class add --names FILE   the same, one name a line
    python -m classroom.hub.roster --folder class add --instructor kim
    python -m classroom.hub.roster --folder class reset ada          a new password for one
    python -m classroom.hub.roster --folder class remove ada         the folder of hers stays
    python -m classroom.hub.roster --folder class list

A running hub reads the file at each login: all of this holds at once. A password is printed once and kept nowhere.
Whoever was reset or removed is logged out of the hub within five minutes.
"""

import argparse
import asyncio
import csv
import hashlib
import hmac
import io
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
from jupyterhub.auth import Authenticator
from tornado import web
from traitlets import Unicode

from classroom.hub.room import NAME, Refused, Room, checked_name

LETTERS = "abcdefghjkmnpqrstuvwxyz23456789"  # none that looks like another on paper: 31, so 59 bits in twelve
LONGEST = 200  # of a password that is looked at
FREE_TRIES, PAUSE = 5, 30.0  # wrong passwords in a row that cost nothing; then seconds between two tries


@dataclass(frozen=True)
class Entry:
    """One person of the roster."""

    name: str
    salt: str
    scrypt: str
    role: str = "learner"


def read(path: Path) -> dict[str, Entry]:
    """The roster; nobody where there is none yet.

    Raises
    ------
    Refused : a line is not one that `add` writes.
    """
    if not path.exists():
        return {}
    people: dict[str, Entry] = {}
    with open(path, encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.reader(file), 1):
            try:
                entry = Entry(*row)
                bytes.fromhex(entry.salt + entry.scrypt)
            except (TypeError, ValueError):
                raise Refused(f"{path}: line {number} is not name,salt,scrypt,role") from None
            if not NAME.fullmatch(entry.name) or entry.role not in ("learner", "instructor"):
                raise Refused(f"{path}: line {number} is not name,salt,scrypt,role")
            people[entry.name] = entry
    return people


def add(path: Path, names: Iterable[str], *, role: str = "learner") -> dict[str, str]:
    """Give a password to each name that has none yet; the new ones by name. All others stay as they are.

    Raises
    ------
    Refused : a name is not allowed, in which case nobody is added.
    """
    wanted = dict.fromkeys(checked_name(name) for name in names)
    return _change(path, lambda people: [(name, role) for name in wanted if name not in people])


def reset(path: Path, name: str) -> str:
    """Give a new password to somebody who is there; the password.

    Raises
    ------
    Refused : nobody has this name.
    """

    def who(people: Mapping[str, Entry]) -> list[tuple[str, str]]:
        return [(name, _there(path, people, name).role)]

    return _change(path, who)[name]


def remove(path: Path, name: str) -> None:
    """Take a name out; its folder stays.

    Raises
    ------
    Refused : nobody has this name.
    """
    with _lock(path):
        people = read(path)
        del people[_there(path, people, name).name]
        _write(path, people)


def hashed(password: str, salt: str) -> str:
    """What the roster holds of a password: scrypt with N = 2^14, r = 8, p = 1 (16 MiB, some 50 ms)."""
    return hashlib.scrypt(password.encode(), salt=bytes.fromhex(salt), n=2**14, r=8, p=1).hex()


def new_password() -> str:
    """Twelve letters and digits in three groups, to be read from paper."""
    return "-".join("".join(secrets.choice(LETTERS) for _ in range(4)) for _ in range(3))


def _there(path: Path, people: Mapping[str, Entry], name: str) -> Entry:
    if name not in people:
        raise Refused(f"{name!r} is not in {path}; there are {', '.join(sorted(people)) or 'no names'}")
    return people[name]


def _change(path: Path, who: Callable[[Mapping[str, Entry]], list[tuple[str, str]]]) -> dict[str, str]:
    given = {}
    with _lock(path):
        people = read(path)
        for name, role in who(people):
            given[name], salt = new_password(), secrets.token_hex(16)
            people[name] = Entry(name, salt, hashed(given[name], salt), role)
        if given or not path.exists():
            _write(path, people)
    return given


def _lock(path: Path) -> filelock.BaseFileLock:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return filelock.FileLock(f"{path}.lock", timeout=10)


def _write(path: Path, people: Mapping[str, Entry]) -> None:
    text = io.StringIO()
    rows = ([entry.name, entry.salt, entry.scrypt, entry.role] for entry in people.values())
    csv.writer(text, lineterminator="\n").writerows(rows)
    # As `course_lib.lab.files.replaced`, which would bring torch into the hub's memory
    beside = path.with_name(f"{path.name}.partial")
    with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(text.getvalue())
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


# Login ----------------------------------------------------------------------------------------------------------------


@dataclass
class Guard:
    """Slows down guessing: after some wrong passwords in a row a name has to wait before each further try.

    The wait is short, as a neighbour can bring it about; that the passwords are drawn does the rest.
    """

    clock: Callable[[], float] = time.monotonic
    wrong: dict[str, tuple[int, float]] = field(default_factory=dict)  # how many in a row, and when the last was

    def wait(self, name: str) -> float:
        """Seconds until this name may try again; 0 if now."""
        count, last = self.wrong.get(name, (0, 0.0))
        return max(0.0, last + PAUSE - self.clock()) if count >= FREE_TRIES else 0.0

    def tried(self, name: str, right: bool) -> None:
        """Remember how a try ended."""
        if right:
            self.wrong.pop(name, None)
        else:
            self.wrong[name] = (self.wrong.get(name, (0, 0.0))[0] + 1, self.clock())


class RosterAuthenticator(Authenticator):
    """Lets in whom the roster knows."""

    roster = Unicode("roster.csv", help="The file that `add` writes.").tag(config=True)

    def __init__(self, **words: Any):
        super().__init__(**words)
        self.guard = Guard()
        self._hashing = asyncio.Semaphore(2)
        self._salts: dict[str, str] = {}  # of those who logged in, to notice a reset

    async def authenticate(self, handler: Any, data: Mapping[str, str]) -> dict[str, Any] | None:
        """The person who gave the right password; None for all others."""
        name, password = data["username"], data["password"][:LONGEST]
        entry = read(Path(self.roster)).get(name)
        if entry and (seconds := self.guard.wait(name)):
            self.log.warning("%s waits after %d wrong passwords", name, self.guard.wrong[name][0])
            raise web.HTTPError(429, f"Too many wrong passwords: try again in {seconds:.0f} seconds.")
        salt, wanted = (entry.salt, entry.scrypt) if entry else (secrets.token_hex(16), "")
        async with self._hashing:  # an unknown name takes as long
            found = await asyncio.to_thread(hashed, password, salt)
        right = entry is not None and hmac.compare_digest(found, wanted)
        if entry:
            self.guard.tried(name, right)
        if entry is None or not right:
            return None
        self._salts[name] = salt
        return {"name": name, "admin": entry.role == "instructor"}

    async def refresh_user(self, user: Any, handler: Any = None) -> bool:
        """Whether somebody who is logged in still may be: not after a reset or a removal."""
        entry = read(Path(self.roster)).get(user.name)
        return entry is not None and self._salts.setdefault(user.name, entry.salt) == entry.salt


# The command line -----------------------------------------------------------------------------------------------------


def names_in(file: Path) -> list[str]:
    """The names in a file, one a line; what follows ``#`` is passed over.

    Raises
    ------
    Refused : it cannot be read, or holds none.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"{file}: {error}") from None
    names = [bare for line in lines if (bare := line.partition("#")[0].strip())]
    if not names:
        raise Refused(f"{file}: there is no name in it; write one a line")
    return names


def paper(given: Mapping[str, str]) -> str:
    """Names and passwords as they are printed, once."""
    if not given:
        return "nobody is new: all keep their passwords"
    width = max(len(name) for name in given)
    lines = [f"{name.ljust(width)}  {password}" for name, password in given.items()]
    return "\n".join([f"{len(given)} new; their passwords are shown this once:", *lines])


def main(arguments: list[str] | None = None) -> int:
    """Change the roster as the command line says."""
    parser = argparse.ArgumentParser(prog="python -m classroom.hub.roster", description="Names and passwords.")
    parser.add_argument("--folder", type=Path, default=Path("class"), help="the class's folder")
    steps = parser.add_subparsers(dest="step", required=True)
    adding = steps.add_parser("add", help="give passwords to names that have none")
    adding.add_argument("name", nargs="*")
    adding.add_argument("--names", type=Path, help="a file with one name a line")
    adding.add_argument("--instructor", action="store_true", help="they may administer the hub")
    for step in ("reset", "remove"):
        steps.add_parser(step, help=f"{step} one").add_argument("name")
    steps.add_parser("list", help="who is there")
    given = parser.parse_args(arguments)
    room = Room(str(given.folder.resolve()))
    try:
        if given.step == "add":
            names = given.name + (names_in(given.names) if given.names else [])
            if not names:
                raise Refused("add: name somebody, or a file with --names")
            room.make_folders()
            print(paper(add(room.roster, names, role="instructor" if given.instructor else "learner")))
        elif given.step == "reset":
            print(f"{given.name}  {reset(room.roster, given.name)}")
        elif given.step == "remove":
            remove(room.roster, given.name)
            print(f"{given.name} is out; {room.homes / given.name} stays as it is")
        else:
            for entry in read(room.roster).values():
                print(f"{entry.name}{' (instructor)' if entry.role == 'instructor' else ''}")
    except Refused as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
