"""Pack the course onto a stick, for a room without a network.

    python -m classroom.bundle OUT                                        for this system and this Python
    python -m classroom.bundle OUT --platform windows-x86_64 macos-arm64 --python 3.11 3.12
    python -m classroom.bundle OUT --data FOLDER --docs ZIP --classroom

On the stick lie the committed files of the course, a wheel of every package for each system and Python, with the
versions of ``requirements.txt``, the data sets of the full profile that ``--data`` holds, the web site as one zip, and
``install.py``, which installs all of that on a learner's machine.

``uv`` decides which packages another system needs (pip would ask this one), pip fetches them. Both ask where pip's own
settings say. On Linux it is torch's build without CUDA: from there if it is there, else from torch's index. What a
stopped run has fetched is kept; ``MANIFEST`` is written last, and without it nothing is installed.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version
from uv import find_uv_bin

from classroom.stick import install
from course_lib.lab.files import replaced
from course_lib.lab.runtime import data_folder

ROOT = Path(__file__).resolve().parents[1]
INSTALLER = Path(install.__file__).parent
LAUNCHERS = ("install.py", "install.sh", "install.cmd")
DOCS = Path("docs", "_build", "craft-of-training.zip")
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
UNKNOWN_SIZE = 250_000_000  # bytes: what a wheel counts whose index does not tell its size
OLDEST_MACOS = 14  # that torch's own wheels run on
AT_ONCE = 16  # wheels that pip fetches before it puts them on the stick: what a stopped run loses at most
SPARE = 50_000_000  # bytes that a stick needs besides
REQUIREMENTS = {"learner": Path("requirements.txt"), "classroom": Path("classroom", "requirements-classroom.txt")}


class Refused(Exception):
    """The course cannot be packed like this; the words say why."""


# Systems


@dataclass(frozen=True)
class System:
    """A kind of machine: how people, uv and pip name it."""

    words: str
    uv: str
    tags: tuple[str, ...]
    torch_build: str = ""  # the local part of the version where the plain one brings gigabytes of CUDA


def _linux(processor: str, oldest: int, *legacy: str) -> tuple[str, ...]:
    newest = 28  # of glibc, which torch's own wheels need
    return (*(f"manylinux_2_{minor}_{processor}" for minor in range(newest, oldest - 1, -1)), *legacy)


SYSTEMS = {
    "linux-x86_64": System(
        "Linux on x86-64",
        "x86_64-manylinux_2_28",
        _linux("x86_64", 5, "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"),
        "cpu",
    ),
    "linux-aarch64": System(
        "Linux on ARM", "aarch64-manylinux_2_28", _linux("aarch64", 17, "manylinux2014_aarch64"), "cpu"
    ),
    "macos-arm64": System(
        f"macOS {OLDEST_MACOS} or newer on Apple's processors",
        "aarch64-apple-darwin",
        (f"macosx_{OLDEST_MACOS}_0_arm64",),
    ),
    "windows-x86_64": System("Windows on x86-64", "x86_64-pc-windows-msvc", ("win_amd64",)),
}


# Packages


@dataclass(frozen=True)
class Package:
    """One package at one version; SHA-256 and bytes of its wheels that fit, from which pip takes the best."""

    name: str
    version: str
    wheels: dict[str, int]

    def __str__(self) -> str:
        return " ".join([f"{self.name}=={self.version}", *(f"--hash=sha256:{digest}" for digest in self.wheels)])


@dataclass(frozen=True)
class Lock:
    """All packages for one system and Python, and where they come from."""

    kind: str  # learner or classroom
    system: str
    python: str
    packages: tuple[Package, ...]
    extra_index: str = ""

    @property
    def file(self) -> str:
        return f"locks/{self.kind}-{self.system}-{self.python}.txt"

    def __str__(self) -> str:
        return "".join(f"{package}\n" for package in self.packages)


def resolved(root: Path, kind: str, system: str, python: str) -> Lock:
    """Every package that a course needs on a system, exactly, with its wheels.

    Raises
    ------
    Refused : some package has no wheel for it, or no index answers; the words are uv's.
    """
    wanted = [*_requirements(root / REQUIREMENTS[kind]), *_build_requirements(root), "pip"]
    build = SYSTEMS[system].torch_build
    pinned = [line for line in wanted if re.match(r"torch==[^+]+$", line)]
    wanted += [f"{line}+{build}" for line in pinned if build]
    try:
        return Lock(kind, system, python, _packages(wanted, system, python, []))
    except Refused:
        if not (build and pinned):
            raise
    # pip's own sources have only the build with CUDA
    return Lock(kind, system, python, _packages(wanted, system, python, ["--torch-backend", build]), TORCH_INDEX)


def _requirements(path: Path) -> Iterator[str]:
    """The lines of a file of requirements and of those it names, without the course itself."""
    for line in path.read_text(encoding="utf-8").splitlines():
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if line.startswith("-r "):
            yield from _requirements(path.parent / line.removeprefix("-r ").strip())
        elif line and not line.startswith("-e "):
            yield line


def _build_requirements(root: Path) -> list[str]:
    """What pip needs to install the course itself."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    return [str(line) for line in project["build-system"]["requires"]]


def _packages(wanted: list[str], system: str, python: str, options: list[str]) -> tuple[Package, ...]:
    settings = pip_settings()
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "wanted.txt"), Path(folder, "pylock.toml")
        source.write_text("\n".join(wanted) + "\n", encoding="utf-8")
        command = [find_uv_bin(), "pip", "compile", str(source), "--output-file", str(target), "--format"]
        command += ["pylock.toml", "--python", sys.executable, "--python-version", python, "--python-platform"]
        command += [
            SYSTEMS[system].uv,
            "--only-binary",
            ":all:",
            "--no-config",
            "--quiet",
            *_sources(settings),
            *options,
        ]
        environment = {**os.environ, "MACOSX_DEPLOYMENT_TARGET": f"{OLDEST_MACOS}.0"}
        if certificates := settings.get("cert"):
            environment["SSL_CERT_FILE"] = certificates[-1]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise Refused(f"{system}, Python {python}: the packages cannot be had as wheels.\n{done.stderr.strip()}")
        found = tomllib.loads(target.read_text(encoding="utf-8"))["packages"]
    return tuple(_package(entry) for entry in found)


def _package(entry: dict[str, Any]) -> Package:
    wheels = {wheel["hashes"]["sha256"]: _bytes(wheel) for wheel in entry.get("wheels", [])}
    if not wheels:
        raise Refused(f"{entry['name']} {entry.get('version', '')}: there is no wheel of it")
    return Package(entry["name"], entry["version"], wheels)


def _bytes(wheel: dict[str, Any]) -> int:
    if wheel.get("url", "").startswith("file:"):
        return Path(url2pathname(urlsplit(wheel["url"]).path)).stat().st_size
    return int(wheel.get("size", UNKNOWN_SIZE))


def _sources(settings: dict[str, list[str]]) -> list[str]:
    """Where pip looks for packages, in uv's words."""
    options = ["--index-strategy", "unsafe-best-match"]
    options += ["--no-index"] * (settings.get("no-index", ["0"])[-1].lower() in ("1", "true", "yes", "on"))
    for name, option in {"index-url": "--default-index", "extra-index-url": "--index"}.items():
        for url in settings.get(name, [])[-1 if name == "index-url" else 0 :]:
            options += [option, url]
    for place in settings.get("find-links", []):
        options += ["--find-links", place]
    return options


def pip_settings() -> dict[str, list[str]]:
    """The settings of pip's files and environment, the strongest last, each split at its spaces."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, list[str]] = {}
    for line in sorted(done.stdout.splitlines(), key=_strength):
        name, _, value = line.partition("=")
        found.setdefault(name.rpartition(".")[2], []).extend(ast.literal_eval(value).split())
    return found


def _strength(line: str) -> int:
    section = line.split(".")[0]
    return {":env:": 2, "download": 1}.get(section, 0)


def fetch(lock: Lock, wheels: Path) -> list[Path]:
    """The wheels of a lock in a folder, those that are missing fetched by pip; each agrees with its hash.

    Raises
    ------
    Refused : pip could not fetch one.
    """
    # -qq: of pip's words those on errors
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-qq",
        "--no-deps",
        "--require-hashes",
        "--only-binary",
        ":all:",
    ]
    command += ["--disable-pip-version-check", "--dest", str(wheels), "--implementation", "cp"]
    command += ["--python-version", lock.python]
    for tag in SYSTEMS[lock.system].tags:
        command += ["--platform", tag]
    if lock.extra_index:
        command += ["--extra-index-url", lock.extra_index]
    missing = [package for package in lock.packages if _wheel_of(package, wheels) is None]
    for start in range(0, len(missing), AT_ONCE):
        print(f"  {len(missing) - start} still to fetch", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            needed = Path(folder, "missing.txt")
            needed.write_text("".join(f"{package}\n" for package in missing[start : start + AT_ONCE]), encoding="utf-8")
            if subprocess.call([*command, "--requirement", str(needed)]):
                raise Refused(f"{lock.system}, Python {lock.python}: pip could not fetch all; run this again to go on")
    found = [(package, _wheel_of(package, wheels)) for package in lock.packages]
    lost = [package.name for package, path in found if path is None]
    if lost:
        raise Refused(f"{', '.join(lost)}: not in {wheels} after pip has fetched them")
    return [path for _, path in found if path is not None]


def _wheel_of(package: Package, wheels: Path) -> Path | None:
    """The wheel of a package that lies in a folder, whole: one that is damaged is none, and pip fetches it anew."""
    wanted = (canonicalize_name(package.name), Version(package.version))
    for path in sorted(wheels.glob("*.whl")):
        if parse_wheel_filename(path.name)[:2] == wanted and install.sha256(path) in package.wheels:
            return path
    return None


# Data


@dataclass(frozen=True)
class Data:
    """A data set for the stick: its files, none where it is not there."""

    name: str
    files: tuple[Path, ...]


def data_sets(folder: Path) -> list[Data]:
    """The data sets that the course would download, as they lie in ``folder``, each looked at.

    Archives are held against torchvision's checksums, and so is CIFAR-10 unpacked. MNIST and Fashion-MNIST unpacked
    have none: they are read as the course reads them, and must have as many images as the original.

    Raises
    ------
    Refused : a file is damaged.
    """
    from torchvision.datasets.utils import check_md5

    from course_lib.lab.data import DataDamaged, downloads

    found = []
    for name, real in downloads.REAL.items():
        files: list[Path] = []
        archives = downloads._archives(name, folder)
        if downloads._complete(name, folder):
            try:
                train, test = downloads.read_real(name, folder)
            except DataDamaged as error:
                raise Refused(f"--data {folder}: {error}") from None
            counts = (len(train[1]), len(test[1]))
            if counts != OFFICIAL[name]:
                raise Refused(f"--data {folder}: {name} has {counts} images, and should have {OFFICIAL[name]}")
            home = downloads._home(name, folder)
            files = [home / file for file in downloads._file_names(name)]
        elif all(path.is_file() for path in archives):
            sums = [real.source.tgz_md5] if name == "cifar10" else [md5 for _, md5 in real.source.resources]
            for path, md5 in zip(archives, sums, strict=True):
                if not check_md5(path, md5):
                    raise Refused(f"--data {folder}: {path} is damaged: its md5 is not that of the original")
            files = archives
        found.append(Data(name, tuple(path.relative_to(folder) for path in files)))
    return found


OFFICIAL = {"mnist": (60_000, 10_000), "fashion_mnist": (60_000, 10_000), "cifar10": (50_000, 10_000)}


def how_to_get(name: str, folder: Path) -> str:
    """The command that downloads a data set."""
    python = Path(sys.executable)
    return f"""COURSE_DATA="{folder}" "{python}" -c "from course_lib.lab import load; load('{name}')\""""


# The stick


def bundle(
    root: Path,
    out: Path,
    *,
    systems: Iterable[str],
    pythons: Iterable[str],
    data: Path | None = None,
    docs: Path | None = None,
    classroom: bool = False,
) -> dict[str, int]:
    """Pack the course whose checkout is ``root`` into ``out``; the bytes of each part.

    Parameters
    ----------
    systems, pythons : names in ``SYSTEMS``, and versions such as "3.11"; wheels for each pair are packed
    data : the folder with data sets; nothing of it is packed if None
    docs : the zip of the web site
    classroom : pack what the classroom kit needs as well

    Raises
    ------
    Refused : something is missing, damaged or not possible; what was fetched stays in ``out``.
    """
    systems, pythons = _checked(systems, pythons)
    _require_ours(out)
    if docs is not None and not zipfile.is_zipfile(docs):
        raise Refused(f"--docs {docs}: there is no such zip; `make docs-archive` makes {DOCS.as_posix()}")
    course = _committed(root)
    sets = data_sets(data) if data is not None else []
    sources = {f"data/{file.as_posix()}": data / file for item in sets for file in item.files if data is not None}
    sources |= {name: INSTALLER / name for name in LAUNCHERS} | ({docs.name: docs} if docs is not None else {})
    kinds = ["learner", "classroom"] if classroom else ["learner"]
    locks = []
    for kind, system, python in ((k, s, p) for s in systems for p in pythons for k in kinds):
        print(f"Looking for the packages of {system}, Python {python} ({kind})", flush=True)
        locks.append(resolved(root, kind, system, python))
    _require_room(out, _missing_bytes(locks, sources, out) + len(course))

    (out / install.MANIFEST).unlink(missing_ok=True)
    wheels = out / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    written = {"course.zip": hashlib.sha256(course).hexdigest()}
    _place(out / "course.zip", course)
    parts, packed, told = {"course": len(course)}, set[str](), []
    for lock in locks:
        print(f"Fetching {len(lock.packages)} wheels for {lock.system}, Python {lock.python}", flush=True)
        names = sorted(path.name for path in fetch(lock, wheels))
        sizes = {name: (wheels / name).stat().st_size for name in names if name not in packed}
        packed |= set(names)
        parts[f"wheels: {lock.kind}, {lock.system}, Python {lock.python}"] = sum(sizes.values())
        written[lock.file] = _place(out / lock.file, str(lock).encode())
        unpacked = sum(_unpacked(wheels / name) for name in names)
        told.append({"kind": lock.kind, "platform": lock.system, "python": lock.python, "file": lock.file,
                     "wheels": names, "installed_bytes": unpacked})  # fmt: skip
    written |= {f"wheels/{name}": install.sha256(wheels / name) for name in packed}
    for name, source in sources.items():
        written[name] = _copied(source, out / name)
    for item in sets:
        if item.files:
            parts[f"data: {item.name}"] = sum((data / file).stat().st_size for file in item.files if data is not None)
    if docs is not None:
        parts["web site"] = docs.stat().st_size
    about = {"made by": "class-bundle", "locks": told, "docs": docs.name if docs is not None else None,
             "data": [name for name in sources if name.startswith("data/")]}  # fmt: skip
    written[install.ABOUT] = _place(out / install.ABOUT, json.dumps(about, indent=1).encode())
    written["README.txt"] = _place(out / "README.txt", _readme(about, locks, parts).encode())
    _write_manifest(out, written)
    if others := [path.name for path in wheels.iterdir() if path.name not in packed]:
        print(f"in {wheels} lie {len(others)} files of another bundle, which nobody reads: {others[0]}, …")
    return parts


def _checked(systems: Iterable[str], pythons: Iterable[str]) -> tuple[list[str], list[str]]:
    systems, pythons = list(dict.fromkeys(systems)), list(dict.fromkeys(pythons))
    for system in systems:
        if system not in SYSTEMS:
            raise Refused(f"--platform {system!r}: must be one of {', '.join(SYSTEMS)} (torch has wheels for no other)")
    for python in pythons:
        if not re.fullmatch(r"3\.\d+", python) or int(python[2:]) < 11:
            raise Refused(f"--python {python!r}: must be 3.11 or newer, written like that")
    return systems, pythons


def _require_ours(out: Path) -> None:
    """Refuses a folder in which something lies that packing would write over and has not made."""
    if out.exists() and not out.is_dir():
        raise Refused(f"OUT={out}: it is a file; name a folder")
    ours = [*LAUNCHERS, "README.txt", install.MANIFEST, "course.zip", "wheels", "locks", "data"]
    theirs = [name for name in ours if (out / name).exists()]
    if theirs and not (out / install.ABOUT).is_file():
        raise Refused(f"OUT={out}: {theirs[0]} lies there and is not of a bundle; name an empty folder")
    out.mkdir(parents=True, exist_ok=True)
    if not (out / install.ABOUT).exists():
        _place(out / install.ABOUT, b"{}")


def _committed(root: Path) -> bytes:
    """The course as one zip, from its last commit: nothing of what lies beside it in the folder."""
    try:
        done = subprocess.run(["git", "archive", "--format=zip", "HEAD"], cwd=root, capture_output=True)
        if done.returncode:
            raise Refused(
                f"{root} is not a clone with a commit ({done.stderr.decode(errors='replace').strip()}). Packing takes "
                "the committed files from git, so that nothing private slips in: clone the repository, and pack there"
            )
        status = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, check=True)
    except FileNotFoundError:
        raise Refused("git is not installed: packing takes the committed files from it") from None
    if changed := len(status.stdout.splitlines()):
        print(f"{changed} files are changed or new since the last commit; the stick has them as committed, or not")
    return done.stdout


def _missing_bytes(locks: list[Lock], sources: dict[str, Path], out: Path) -> int:
    """Bytes still to be written, at most."""
    wheels: dict[tuple[str, str], int] = {}
    for lock in locks:
        for package in lock.packages:
            if _wheel_of(package, out / "wheels") is None:
                best = max(package.wheels, key=package.wheels.__getitem__)
                wheels[package.name, best] = package.wheels[best]
    there = {name for name in sources if (out / name).exists()}
    return sum(wheels.values()) + sum(path.stat().st_size for name, path in sources.items() if name not in there)


def _require_room(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if free < needed + SPARE:
        raise Refused(
            f"OUT={out}: its disk has {free / 1e6:.0f} MB left, and {(needed + SPARE) / 1e6:.0f} MB are needed. "
            "Take a larger one, or fewer systems"
        )


def _unpacked(wheel: Path) -> int:
    """Bytes of an installed wheel, roughly: its files, and its Python compiled."""
    with zipfile.ZipFile(wheel) as archive:
        return sum(info.file_size * (2 if info.filename.endswith(".py") else 1) for info in archive.infolist())


def _place(path: Path, contents: bytes) -> str:
    """Write a file; its SHA-256."""
    with replaced(path) as file:
        file.write(contents)
    return hashlib.sha256(contents).hexdigest()


def _copied(source: Path, to: Path) -> str:
    """Copy a file unless it is there already; its SHA-256, read from the source."""
    digest = install.sha256(source)
    if not (to.is_file() and install.sha256(to) == digest):
        with open(source, "rb") as file, replaced(to) as target:
            shutil.copyfileobj(file, target, 2**20)
    return digest


def _readme(about: dict[str, Any], locks: list[Lock], parts: dict[str, int]) -> str:
    learners = [lock for lock in locks if lock.kind == "learner"]
    docs = f"\nOnly to read: unpack {about['docs']}, and open index.html in it.\n" if about["docs"] else ""
    needed = max(entry["installed_bytes"] for entry in about["locks"]) + 3 * parts["course"]
    needed += sum(size for part, size in parts.items() if not part.startswith("wheels")) + install.SPARE
    text = (INSTALLER / "README.txt").read_text(encoding="utf-8")
    return text.format(
        pythons=" or ".join(dict.fromkeys(lock.python for lock in learners)),
        gigabytes=needed / 1e9,
        platforms=",\n".join(dict.fromkeys(SYSTEMS[lock.system].words for lock in learners)),
        docs=docs,
    )


def _write_manifest(out: Path, written: dict[str, str]) -> None:
    """List all files with SHA-256 and bytes; last of all, so that a stick without it is known to be half packed."""
    lines = [f"# {len(written)} files"]
    for name, digest in sorted(written.items()):
        lines.append(f"{digest} {(out / name).stat().st_size} {name}")
    _place(out / install.MANIFEST, ("\n".join(lines) + "\n").encode())
    if wrong := install.damaged(out, install.read_manifest(out), list(written)):
        (out / install.MANIFEST).unlink()
        raise Refused(f"OUT={out} was not written as it should be, the disk may be failing: {'; '.join(wrong)}")


# The command line


def main(arguments: list[str] | None = None) -> int:
    """Pack what the command line says; 2 if it cannot be done."""
    parser = argparse.ArgumentParser(description="Pack the course onto a stick, for a room without a network.")
    parser.add_argument("out", type=Path, help="the folder, such as that of a memory stick")
    names = ", ".join(SYSTEMS)
    parser.add_argument("--platform", nargs="+", default=[install.here()], help=f"of {names}; default: this one")
    this = "{}.{}".format(*sys.version_info[:2])
    parser.add_argument("--python", nargs="+", default=[this], help="versions such as 3.12; default: this one")
    parser.add_argument("--data", type=Path, help="the folder of data sets; default: COURSE_DATA, else data")
    parser.add_argument("--docs", type=Path, help=f"the zip of the web site; default: {DOCS.as_posix()}, if there")
    parser.add_argument("--classroom", action="store_true", help="pack what handing out and marking need as well")
    given = parser.parse_args(arguments)
    data = (given.data or data_folder()).expanduser().resolve()
    docs = given.docs or (ROOT / DOCS if (ROOT / DOCS).is_file() else None)
    try:
        if not data.is_dir():
            raise Refused(f"--data {data}: there is no such folder")
        parts = bundle(
            ROOT, given.out, systems=given.platform, pythons=given.python, data=data, docs=docs,
            classroom=given.classroom,
        )  # fmt: skip
    except Refused as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 2
    print(table(parts))
    for name in OFFICIAL:
        if f"data: {name}" not in parts:
            print(f"not on the stick: {name} (only the full profile reads it). To have it there:")
            print(f"  {how_to_get(name, data)}")
    if docs is None:
        print("not on the stick: the web site. To have it there: make docs-archive")
    print(f'Eject it, plug it in again, and see whether it is whole: python "{given.out / "install.py"}" --check')
    return 0


def table(parts: dict[str, int]) -> str:
    """MB of each part, and of all."""
    rows = [*parts.items(), ("all", sum(parts.values()))]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}} {size / 1e6:9.1f} MB" for name, size in rows)


if __name__ == "__main__":
    sys.exit(main())
