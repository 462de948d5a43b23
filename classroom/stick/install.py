"""Install the course from this stick, without a network; it needs Python and nothing else.

    python install.py                     into the folder craft-of-training of your home
    python install.py --to FOLDER         into another folder
    python install.py --check             only look whether the stick is whole
    python install.py --classroom         for the instructor: what handing out and marking need as well

Each file is compared with its SHA-256 in MANIFEST before it is used. Nothing is written on the stick, which may be
read-only, and nothing that you wrote is replaced: a file of the course that you changed stays as it is. Running it
again goes on where it was stopped, and puts back what was deleted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

# Written for older Pythons than the course needs too, so that they can say what is missing
STICK = Path(__file__).resolve().parent
MANIFEST, ABOUT = "MANIFEST", "stick.json"
RECORD = ".from-stick.json"  # in the course's folder: the SHA-256 of each file as a stick put it there
SPARE = 300_000_000  # bytes to be left on the disk
ENVIRONMENTS = {"learner": ".venv", "classroom": ".venv-class"}


class Refused(Exception):
    """The course cannot be installed; the words say why."""


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line says; 1 if it cannot be done."""
    parser = argparse.ArgumentParser(description="Install the course from this stick, without a network.")
    parser.add_argument("--to", type=Path, default=Path.home() / "craft-of-training", help="the folder to install into")
    parser.add_argument("--check", action="store_true", help="only look whether each file of the stick is whole")
    parser.add_argument("--classroom", action="store_true", help="also what handing out and marking need")
    given = parser.parse_args(arguments)
    try:
        manifest = read_manifest(STICK)
        _check(STICK, manifest, [ABOUT])
        about = json.loads((STICK / ABOUT).read_text(encoding="utf-8"))
        if given.check:
            _check(STICK, manifest, list(manifest))
            print("The stick is whole.")
            return 0
        kinds = ["learner", "classroom"] if given.classroom else ["learner"]
        install(STICK, given.to.expanduser().resolve(), manifest, about, kinds)
    except Refused as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. Run it again: it goes on from here.", file=sys.stderr)
        return 1
    return 0


def install(
    stick: Path, folder: Path, manifest: dict[str, tuple[str, int]], about: dict[str, Any], kinds: list[str]
) -> None:
    """Install the course into ``folder``, and say how to open it."""
    locks = [_lock_for_here(about, kind) for kind in kinds]
    record = _own_folder(folder)
    used = ["course.zip", *about["data"], *filter(None, [about["docs"]])]
    for lock in locks:
        used += [lock["file"], *(f"wheels/{wheel}" for wheel in lock["wheels"])]
    _check(stick, manifest, list(dict.fromkeys(used)))
    new = [lock for lock in locks if not _installed(folder, lock, manifest)]
    contents = sum(manifest[name][1] for name in used if not name.startswith("wheels/"))
    _require_room(folder, sum(lock["installed_bytes"] for lock in new) + 2 * contents * bool(new))

    print(f"Copying the course to {folder}", flush=True)
    kept = _copy_course(stick, folder, record)
    for name in about["data"]:
        if not _copied(stick / name, folder / name, manifest[name][0]):
            kept.append(name)
    if about["docs"]:
        _unpack_docs(stick / about["docs"], folder)
    for lock in new:
        _make_environment(stick, folder, lock)
    for lock in locks:
        _stamp(folder, lock).write_text(manifest[lock["file"]][0])  # newer than the course's files: make asks for that
    _say_what_next(folder, about, kept)


# The stick


def read_manifest(stick: Path) -> dict[str, tuple[str, int]]:
    """SHA-256 and bytes of each file of a stick.

    Raises
    ------
    Refused : it is not there, or not whole.
    """
    again = "Pack the stick again, or copy it again from one that is whole."
    try:
        head, *lines = (stick / MANIFEST).read_text(encoding="utf-8").splitlines()
        rows = [line.split(maxsplit=2) for line in lines]
        found = {name: (digest, int(size)) for digest, size, name in rows}
    except FileNotFoundError:
        raise Refused(f"{stick / MANIFEST} is not there: the stick was not packed to its end. {again}") from None
    except (OSError, ValueError) as error:
        raise Refused(f"{stick / MANIFEST} is damaged ({error}). {again}") from None
    if head != f"# {len(found)} files" or ABOUT not in found:
        raise Refused(f"{stick / MANIFEST} is damaged: it does not list as many files as it says. {again}")
    return found


def damaged(stick: Path, manifest: dict[str, tuple[str, int]], names: list[str]) -> list[str]:
    """What is wrong with the files ``names`` of a stick, a line a file."""
    wrong = []
    for name in names:
        if name not in manifest:
            wrong.append(f"{name}: MANIFEST does not list it")
            continue
        digest, size = manifest[name]
        try:
            there = (stick / name).stat().st_size
            if there != size:
                wrong.append(f"{name}: it has {there} bytes, and should have {size}")
            elif sha256(stick / name) != digest:
                wrong.append(f"{name}: its contents have changed")
        except FileNotFoundError:
            wrong.append(f"{name}: it is missing")
        except OSError as error:
            wrong.append(f"{name}: it cannot be read ({error.strerror})")
    return wrong


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
    return digest.hexdigest()


def _check(stick: Path, manifest: dict[str, tuple[str, int]], names: list[str]) -> None:
    size = sum(manifest[name][1] for name in names if name in manifest)
    if size > 1e6:
        print(f"Checking {len(names)} files of the stick, {size / 1e6:.0f} MB", flush=True)
    wrong = damaged(stick, manifest, names)
    if wrong:
        listed = "\n".join(f"  {line}" for line in wrong)
        raise Refused(
            f"The stick is damaged, and nothing was installed from it:\n{listed}\n"
            "Copy these files again from a stick that is whole, or take another stick."
        )


# This machine


def here() -> str:
    """This system and processor, as the stick names them."""
    if sys.platform == "win32":
        return f"windows-{'x86_64' if sysconfig.get_platform() == 'win-amd64' else platform.machine().lower()}"
    system = "macos" if sys.platform == "darwin" else platform.system().lower()
    return f"{system}-{platform.machine().lower()}"


def _lock_for_here(about: dict[str, Any], kind: str) -> dict[str, Any]:
    """What to install on this system with this Python; goes over to another Python of this machine where one fits."""
    locks = [lock for lock in about["locks"] if lock["kind"] == kind]
    if not locks:
        raise Refused("--classroom: this stick was packed without the classroom kit")
    fitting = [lock for lock in locks if lock["platform"] == here()]
    if not fitting:
        listed = ", ".join(sorted({lock["platform"] for lock in locks}))
        raise Refused(f"This machine is {here()}, and this stick was packed for {listed}.")
    version = "{}.{}".format(*sys.version_info[:2])
    for lock in fitting:
        if lock["python"] == version and sys.implementation.name == "cpython":
            return lock
    for lock in fitting:
        command = _another_python(lock["python"])
        if command and "CRAFT_OF_TRAINING_PYTHON" not in os.environ:
            print(f"This is Python {version}; going on with Python {lock['python']}", flush=True)
            environment = dict(os.environ, CRAFT_OF_TRAINING_PYTHON=lock["python"])
            sys.exit(subprocess.call([*command, __file__, *sys.argv[1:]], env=environment))
    listed = " or ".join(lock["python"] for lock in fitting)
    raise Refused(
        f"This is Python {version}, and what lies on this stick is for Python {listed}, which was not found. "
        "Install it (python.org has it), then run this again."
    )


def _another_python(version: str) -> list[str]:
    """The command of a Python of this machine that has this version and runs; empty if there is none."""
    commands = [["py", f"-{version}"]] if sys.platform == "win32" else [[f"python{version}"]]
    for command in commands:
        asked = 'import sys; print("{}.{}".format(*sys.version_info[:2]))'
        try:
            said = subprocess.check_output([*command, "-c", asked], stderr=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError):
            continue
        if said.decode().strip() == version:
            return command
    return []


def _require_room(folder: Path, needed: int) -> None:
    there = next(parent for parent in [folder, *folder.parents] if parent.exists())
    free = shutil.disk_usage(there).free
    if needed and free < needed + SPARE:
        raise Refused(
            f"{there} has {free / 1e9:.1f} GB left, and the course needs {(needed + SPARE) / 1e9:.1f} GB. "
            "Make room, or install on another disk: --to FOLDER"
        )


# The course's folder


def _own_folder(folder: Path) -> dict[str, str]:
    """What a stick has put into ``folder``; it is made, or must be one that a stick has made."""
    path = folder / RECORD
    if path.is_file():
        record: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
        return record
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise Refused(
            f"--to {folder}: it is there already, and no stick has made it. Nothing in it was changed; "
            "name a folder that is new or empty: --to FOLDER"
        )
    folder.mkdir(parents=True, exist_ok=True)
    _write(path, b"{}")
    return {}


def _copy_course(stick: Path, folder: Path, record: dict[str, str]) -> list[str]:
    """Put the course's files in place; the names of those that stay because they were changed after a stick put them.

    A file is replaced only if it is as a stick has left it.
    """
    kept = []
    with zipfile.ZipFile(stick / "course.zip") as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            contents = archive.read(info)
            digest = hashlib.sha256(contents).hexdigest()
            path = _inside(folder, info.filename)
            if path.exists() and sha256(path) not in (digest, record.get(info.filename)):
                kept.append(info.filename)
                continue
            if not path.exists() or sha256(path) != digest:
                _write(path, contents)
            record[info.filename] = digest
    _write(folder / RECORD, json.dumps(record, indent=0, sort_keys=True).encode())
    return kept


def _copied(source: Path, to: Path, digest: str) -> bool:
    """Copy a file unless there is one already; whether what is there is the stick's."""
    if not to.exists():
        to.parent.mkdir(parents=True, exist_ok=True)
        beside = to.with_name(to.name + ".partial")
        shutil.copyfile(source, beside)
        os.replace(beside, to)
    return sha256(to) == digest


def _unpack_docs(archive_path: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive_path) as archive:
        for info in archive.infolist():
            path = _inside(folder / "docs" / "_build", info.filename)
            if not info.is_dir() and not (path.is_file() and path.stat().st_size == info.file_size):
                _write(path, archive.read(info))


def _inside(folder: Path, name: str) -> Path:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in name:
        raise Refused(f"{name!r} in an archive of this stick points out of the course's folder")
    return folder.joinpath(*parts)


def _write(path: Path, contents: bytes) -> None:
    """Write a file in one step: it is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    beside.write_bytes(contents)
    os.replace(beside, path)


# The environment


def _stamp(folder: Path, lock: dict[str, Any]) -> Path:
    return folder / ENVIRONMENTS[lock["kind"]] / ".installed"  # the name that the Makefile looks for


def _python(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def _installed(folder: Path, lock: dict[str, Any], manifest: dict[str, tuple[str, int]]) -> bool:
    """Whether just this was installed to its end, and its Python still runs."""
    stamp = _stamp(folder, lock)
    if not stamp.is_file() or stamp.read_text() != manifest[lock["file"]][0]:
        return False
    return _run(_python(stamp.parent), ["-c", ""], folder, quiet=True) == 0


def _make_environment(stick: Path, folder: Path, lock: dict[str, Any]) -> None:
    environment = folder / ENVIRONMENTS[lock["kind"]]
    print(f"Installing {len(lock['wheels'])} packages into {environment} (some minutes)", flush=True)
    settings = environment / "pyvenv.cfg"
    if settings.is_file() and f"version = {lock['python']}." not in settings.read_text(encoding="utf-8"):
        raise Refused(f"{environment} is of another Python than {lock['python']}: move it away, then run this again")
    # Without ensurepip, which some systems lack: the stick's own pip installs itself, then the rest
    venv.EnvBuilder(with_pip=False, symlinks=sys.platform != "win32").create(str(environment))
    wheels = stick / "wheels"
    pip = next(wheels / name for name in lock["wheels"] if name.startswith("pip-"))
    offline = ["install", "--quiet", "--no-index", "--no-cache-dir", "--no-deps", "--disable-pip-version-check"]
    steps = [
        [str(pip / "pip"), *offline, str(pip)],
        ["-m", "pip", *offline, "--find-links", str(wheels), "--require-hashes", "-r", str(stick / lock["file"])],
        ["-m", "pip", *offline, "--no-build-isolation", "--editable", str(folder)],
        ["-c", "import course_lib"],
    ]
    for step in steps:
        if _run(_python(environment), step, folder):
            raise Refused(
                f"The packages could not be installed; the words above say why. This is {platform.platform()}; "
                "Linux must have glibc 2.28 or newer, a Mac macOS 14 or newer."
            )


def _run(python: Path, arguments: list[str], folder: Path, *, quiet: bool = False) -> int:
    """Run a Python that sees no settings of pip or Python but our own, so that it asks no network."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    environment.update(PIP_CONFIG_FILE=os.devnull, PYTHONNOUSERSITE="1", PYTHONUTF8="1")
    output = subprocess.DEVNULL if quiet else None
    try:
        command = [str(python), *arguments]
        return subprocess.call(command, cwd=str(folder), env=environment, stdout=output, stderr=output)
    except OSError:
        return 1


def _say_what_next(folder: Path, about: dict[str, Any], kept: list[str]) -> None:
    if kept:
        print("\nThese differ from the stick's, and were left as they are:")
        print("\n".join(f"  {name}" for name in kept))
    jupyter = folder / ".venv" / ("Scripts/jupyter.exe" if sys.platform == "win32" else "bin/jupyter")
    print(f"\nThe course is in {folder}. To open it:\n")
    print(f'  cd "{folder}"')
    print(f'  {"& " if sys.platform == "win32" else ""}"{jupyter}" lab notebooks/00_start_here.ipynb')
    if about["docs"]:
        index = folder / "docs" / "_build" / Path(about["docs"]).stem / "index.html"
        print(f"\nTo read it without running anything, open {index}")
    if "COURSE_DATA" in os.environ and about["data"]:
        print("\nCOURSE_DATA is set here, so the course looks for data there, not in its folder data.")


if __name__ == "__main__":
    sys.exit(main())
