"""The stick: what is packed, what is refused, and an installation from it without a network.

Most tests pack a course of a few lines, with wheels made here, by the same code, uv and pip. ``CLASS_BUNDLE_WHOLE=1``
packs and installs this course (a gigabyte, and some minutes; needs a network for the packing only).
"""

import ast
import base64
import ensurepip
import gzip
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from classroom import bundle as packing
from classroom.bundle import Refused, bundle, data_sets, fetch, pip_settings, resolved, table
from classroom.stick import install

THIS = "{}.{}".format(*sys.version_info[:2])
BACKEND = """
import zipfile
from pathlib import Path

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    name = "craft_of_training-0.1-py3-none-any.whl"
    with zipfile.ZipFile(Path(wheel_directory, name), "w") as wheel:
        wheel.writestr("craft_of_training.pth", str(Path.cwd()))
        info = "craft_of_training-0.1.dist-info/"
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: craft-of-training\\nVersion: 0.1\\n")
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "RECORD", "")
    return name
"""
PYPROJECT = """[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "craft-of-training"
version = "0.1"
"""
COURSE = {
    "pyproject.toml": PYPROJECT,
    "backend.py": BACKEND,
    "requirements.txt": "# what it needs\ntiny==1.0  # small\n-e .\n",
    "classroom/requirements-classroom.txt": '-r ../requirements.txt\nkit==2.0; sys_platform != "win32"\n',
    "course_lib/__init__.py": "import tiny\n",
    "notebooks/00_start_here.ipynb": '{"cells": []}',
    ".gitignore": "secret.txt\n",
}
TAGS = {
    "linux-x86_64": "manylinux_2_17_x86_64.manylinux2014_x86_64",
    "linux-aarch64": "manylinux_2_28_aarch64",
    "macos-arm64": "macosx_11_0_arm64",
    "windows-x86_64": "win_amd64",
}


def wheel(folder: Path, name: str, version: str, tag: str = "py3-none-any", requires: str = "") -> Path:
    """A wheel with one module, which holds its version and its tag."""
    path, info = folder / f"{name}-{version}-{tag}.whl", f"{name}-{version}.dist-info"
    needed = f"Requires-Dist: {requires}\n" if requires else ""
    tags = "".join(f"Tag: {'-'.join(tag.split('-')[:2])}-{each}\n" for each in tag.split("-")[2].split("."))
    files = {
        f"{name}.py": f"version, tag = {version!r}, {tag!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needed}",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\n{tags}",
    }
    record = "".join(f"{file},{_record(text)},{len(text)}\n" for file, text in files.items())
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            archive.writestr(file, text)
    return path


def _record(text: str) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
    return "sha256=" + digest.rstrip(b"=").decode()


def stock(folder: Path) -> Path:
    """A folder of wheels."""
    folder.mkdir()
    bundled = [Path(ensurepip.__file__).parent / "_bundled", Path(sysconfig.get_config_var("WHEEL_PKG_DIR") or ".")]
    shutil.copy(next(path for place in bundled for path in place.glob("pip-*.whl")), folder)
    wheel(folder, "tiny", "1.0")
    wheel(folder, "tiny", "2.0")
    wheel(folder, "kit", "2.0")
    return folder


def look_only_there(shelf: Path, patch: pytest.MonkeyPatch) -> None:
    """Let pip and uv know no other place."""
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_", "COURSE_"))]:
        patch.delenv(name)
    patch.setenv("PIP_CONFIG_FILE", os.devnull)
    patch.setenv("PIP_NO_INDEX", "1")
    patch.setenv("PIP_FIND_LINKS", str(shelf))


def clone(root: Path) -> Path:
    """A clone of a small course, with private files and a change that is not committed."""
    for name, text in COURSE.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    commit(root)
    (root / "secret.txt").write_text("ours")
    (root / "notes.txt").write_text("ours, and new")
    (root / "notebooks" / "00_start_here.ipynb").write_text("changed, and not committed")
    return root


def commit(root: Path) -> None:
    git = ["git", "-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "as it is"]):
        subprocess.run([*git, *command], cwd=root, check=True)


@pytest.fixture(scope="session")
def packed(tmp_path_factory):
    """The small course, packed once for this machine."""
    folder = tmp_path_factory.mktemp("packed")
    with zipfile.ZipFile(folder / "site.zip", "w") as archive:
        archive.writestr("site/index.html", "<h1>The course</h1>")
    with pytest.MonkeyPatch.context() as patch:
        look_only_there(stock(folder / "shelf"), patch)
        course = clone(folder / "clone")
        bundle(
            course, folder / "out", systems=[install.here()], pythons=[THIS], docs=folder / "site.zip", classroom=True
        )
    return folder / "out"


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder of wheels, the only place where pip and uv look."""
    folder = stock(tmp_path / "shelf")
    look_only_there(folder, monkeypatch)
    return folder


@pytest.fixture
def course(tmp_path):
    """A clone of the small course."""
    return clone(tmp_path / "clone")


@pytest.fixture
def stick(tmp_path, packed):
    """A copy of the packed course, at a path with a space and letters beyond ASCII."""
    return shutil.copytree(packed, tmp_path / "Stick für Zoë")


@pytest.fixture(scope="session")
def without_network():
    """The start of a command line that runs what follows without a network; empty where the system cannot."""
    for command in (["unshare", "-rn"], ["bwrap", "--dev-bind", "/", "/", "--unshare-net"]):
        if shutil.which(command[0]) and not subprocess.run([*command, "true"], capture_output=True).returncode:
            return command
    return []


def run(stick: Path, *arguments: object, before: list[str] = (), **environment: str) -> subprocess.CompletedProcess:
    """Run a stick's installer as a learner does; settings of pip that it must not follow are set."""
    trap = {"PIP_INDEX_URL": "http://localhost:9/simple", "PIP_FIND_LINKS": "/nowhere", "PYTHONPATH": "/nowhere"}
    command = [*before, sys.executable, str(stick / "install.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **trap, **environment})


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def python_of(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def test_a_learner_installs_without_a_network_and_keeps_what_was_written(stick, tmp_path, without_network):
    before, to, home = tree(stick), tmp_path / "Cours d'été", tmp_path / "home"
    home.mkdir()
    subprocess.run(["chmod", "-R", "a-w", str(stick)], check=sys.platform != "win32")

    done = run(stick, "--to", to, before=without_network, HOME=str(home))

    assert done.returncode == 0, done.stdout + done.stderr
    assert str(to) in done.stdout
    assert "notebooks/00_start_here.ipynb" in done.stdout
    asked = [str(python_of(to / ".venv")), "-c", "import course_lib, tiny; print(tiny.version, course_lib.__file__)"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    said = subprocess.run(asked, capture_output=True, text=True, check=True, cwd=home, env=environment).stdout
    assert said.strip() == f"1.0 {to / 'course_lib' / '__init__.py'}"
    assert (to / "docs" / "_build" / "site" / "index.html").read_text() == "<h1>The course</h1>"
    assert not (to / ".venv-class").exists()
    stamp = to / ".venv" / ".installed"  # or make would want to install anew, from the network
    assert stamp.stat().st_mtime_ns >= (to / "requirements.txt").stat().st_mtime_ns

    notebook = to / "notebooks" / "00_start_here.ipynb"
    notebook.write_text("what a learner wrote")
    (to / "backend.py").unlink()
    (to / "mine.txt").write_text("mine")
    again = run(stick, "--to", to, "--classroom", before=without_network, HOME=str(home))

    assert again.returncode == 0, again.stdout + again.stderr
    assert notebook.read_text() == "what a learner wrote"
    assert "  notebooks/00_start_here.ipynb\n" in again.stdout
    assert (to / "backend.py").read_text() == BACKEND
    assert (to / "mine.txt").read_text() == "mine"
    assert f"into {to / '.venv'} " not in again.stdout, "what is installed is installed once"
    subprocess.run([str(python_of(to / ".venv-class")), "-c", "import kit, tiny"], check=True, env=environment)
    assert tree(stick) == before


def test_a_new_stick_replaces_what_was_not_changed(tmp_path):
    def copied(notebook: str, library: str) -> list[str]:
        with zipfile.ZipFile(tmp_path / "course.zip", "w") as archive:
            archive.writestr("notebooks/00.ipynb", notebook)
            archive.writestr("course_lib/a.py", library)
        return install._copy_course(tmp_path, to, install._own_folder(to))

    to = tmp_path / "to"
    assert copied("first", "first") == []
    (to / "notebooks" / "00.ipynb").write_text("what a learner wrote")
    assert copied("second", "second") == ["notebooks/00.ipynb"]
    assert copied("third", "third") == ["notebooks/00.ipynb"]
    assert tree(to / "notebooks") == {"00.ipynb": b"what a learner wrote"}
    assert tree(to / "course_lib") == {"a.py": b"third"}
    (to / "notebooks" / "00.ipynb").unlink()  # how a learner gets the chapter back
    assert copied("third", "third") == []
    assert tree(to / "notebooks") == {"00.ipynb": b"third"}


@pytest.mark.parametrize("name", ["../out.txt", "/out.txt", "a/../../out.txt"])
def test_an_archive_cannot_write_out_of_the_folder(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "course.zip", "w") as archive:
        archive.writestr(name, "out")
    with pytest.raises(install.Refused, match="points out of the course's folder"):
        install._copy_course(tmp_path, tmp_path / "to", {})
    assert not list(tmp_path.rglob("out.txt"))


def test_only_committed_files_are_packed_and_the_manifest_lists_all(stick):
    with zipfile.ZipFile(stick / "course.zip") as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        assert names == set(COURSE)
        assert archive.read("notebooks/00_start_here.ipynb") == b'{"cells": []}'
    manifest = install.read_manifest(stick)
    assert set(manifest) | {install.MANIFEST} == set(tree(stick))
    for name, contents in tree(stick).items():
        if name != install.MANIFEST:
            assert manifest[name] == (hashlib.sha256(contents).hexdigest(), len(contents))
    assert "tiny-1.0-py3-none-any.whl" in {Path(name).name for name in manifest}
    assert THIS in (stick / "README.txt").read_text()
    assert run(stick, "--check").returncode == 0


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "should have"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\1"), "its contents have changed"),
        (lambda path: path.unlink(), "it is missing"),
    ],
)
@pytest.mark.parametrize("name", ["wheels/tiny-1.0-py3-none-any.whl", "course.zip"])
def test_a_damaged_file_is_named_and_nothing_is_installed(stick, tmp_path, harm, words, name):
    harm(stick / name)
    for arguments in (["--to", tmp_path / "to"], ["--check"]):
        done = run(stick, *arguments)
        assert done.returncode == 1
        assert f"{name}: " in done.stderr
        assert words in done.stderr
    assert not list(tmp_path.glob("to/*/*"))


@pytest.mark.parametrize("keep", [0, 1, 3])
def test_a_stick_without_its_whole_manifest_is_refused(stick, tmp_path, keep):
    path = stick / install.MANIFEST
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:keep]))
    done = run(stick, "--to", tmp_path / "to")
    assert done.returncode == 1
    assert "MANIFEST is damaged" in done.stderr
    path.unlink()
    assert "not packed to its end" in run(stick, "--to", tmp_path / "to").stderr
    assert not (tmp_path / "to").exists()


def test_a_folder_that_no_stick_made_is_left_alone(stick, tmp_path):
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "thesis.txt").write_text("mine")
    done = run(stick, "--to", tmp_path / "to")
    assert done.returncode == 1
    assert "no stick has made it" in done.stderr
    assert tree(tmp_path / "to") == {"thesis.txt": b"mine"}


def test_another_system_and_another_python_are_told(stick, monkeypatch):
    about = json.loads((stick / install.ABOUT).read_text())
    lock = about["locks"][0]
    assert install._lock_for_here(about, "learner") == lock
    monkeypatch.setattr(install, "here", lambda: "plan9-mips")
    with pytest.raises(install.Refused, match=f"This machine is plan9-mips, .* for {lock['platform']}"):
        install._lock_for_here(about, "learner")
    monkeypatch.undo()
    lock["python"] = "3.99"
    with pytest.raises(install.Refused, match=rf"This is Python {THIS}, .* for Python 3\.99, which was not found"):
        install._lock_for_here(about, "learner")


@pytest.mark.skipif(sys.platform == "win32", reason="a Python of another version is played by a shell script")
def test_another_python_of_the_machine_goes_on(stick, tmp_path, monkeypatch):
    about = json.loads((stick / install.ABOUT).read_text())
    about["locks"][0]["python"] = "3.99"
    played = tmp_path / "python3.99"
    played.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo 3.99 && exit\necho "$@" > "{tmp_path}/asked"\nexit 7\n')
    played.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), os.environ["PATH"]]))
    monkeypatch.setattr(sys, "argv", ["install.py", "--to", "there"])
    with pytest.raises(SystemExit) as ended:
        install._lock_for_here(about, "learner")
    assert ended.value.code == 7
    assert (tmp_path / "asked").read_text() == f"{install.__file__} --to there\n"


def test_an_installer_on_a_full_disk_says_so(stick, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**8, 10**8))
    manifest, about = install.read_manifest(stick), json.loads((stick / install.ABOUT).read_text())
    with pytest.raises(install.Refused, match=r"has 0\.1 GB left, and the course needs 0\.3 GB"):
        install.install(stick, tmp_path / "to", manifest, about, ["learner"])
    assert not (tmp_path / "to" / "requirements.txt").exists()


def test_the_installer_speaks_to_old_pythons_too():
    ast.parse(Path(install.__file__).read_text(), feature_version=(3, 7))


# Packing


@pytest.mark.parametrize(
    ("system", "python"),
    [("linux-x86_64", "3.11"), ("linux-aarch64", "3.13"), ("macos-arm64", "3.13"), ("windows-x86_64", "3.11")],
)
def test_another_system_gets_its_own_wheels_and_dependencies(shelf, course, tmp_path, system, python):
    abi = f"cp{python.replace('.', '')}"
    for tag in TAGS.values():
        for each in ("cp311", "cp313"):
            wheel(shelf, "native", "1.0", f"{each}-{each}-{tag}", 'only_windows; sys_platform == "win32"')
    wheel(shelf, "only_windows", "1.0")
    (course / "requirements.txt").write_text("native==1.0\n")

    lock = resolved(course, "learner", system, python)
    found = {path.name for path in fetch(lock, tmp_path / "wheels")}

    expected = {f"native-1.0-{abi}-{abi}-{TAGS[system]}.whl"}
    expected |= {"only_windows-1.0-py3-none-any.whl"} if system.startswith("windows") else set()
    assert {name for name in found if not name.startswith("pip-")} == expected


@pytest.mark.parametrize(("system", "version"), [("linux-x86_64", "1.0+cpu"), ("windows-x86_64", "1.0")])
def test_linux_gets_the_build_of_torch_without_cuda(shelf, course, tmp_path, system, version):
    for each in ("1.0", "1.0+cpu", "1.0+cu130"):
        wheel(shelf, "torch", each)
    (course / "requirements.txt").write_text("torch==1.0\n")
    if system.startswith("windows"):
        for each in ("1.0+cpu", "1.0+cu130"):
            (shelf / f"torch-{each}-py3-none-any.whl").unlink()
    lock = resolved(course, "learner", system, "3.11")
    assert {package.name: package.version for package in lock.packages}["torch"] == version
    assert f"torch-{version}-py3-none-any.whl" in {path.name for path in fetch(lock, tmp_path / "wheels")}


def test_a_package_without_a_wheel_is_named(shelf, course):
    (shelf / "onlysource-1.0.tar.gz").write_bytes(gzip.compress(b""))
    (course / "requirements.txt").write_text("onlysource==1.0\n")
    with pytest.raises(Refused, match=r"macos-arm64, Python 3\.12: .*(?s:.*)onlysource==1\.0 has no usable wheels"):
        resolved(course, "learner", "macos-arm64", "3.12")


def test_what_was_fetched_is_kept_and_a_damaged_wheel_is_fetched_anew(shelf, course, tmp_path, monkeypatch):
    lock, wheels = resolved(course, "learner", install.here(), THIS), tmp_path / "wheels"
    first = fetch(lock, wheels)
    tiny = next(path for path in first if path.name.startswith("tiny"))
    whole = tiny.read_bytes()
    tiny.write_bytes(whole[:-9])
    assert fetch(lock, wheels) == first
    assert tiny.read_bytes() == whole

    monkeypatch.setattr(subprocess, "call", lambda *_, **__: pytest.fail("pip was asked for what is there"))
    assert fetch(lock, wheels) == first


def test_a_wheel_that_its_source_has_changed_is_not_taken(shelf, course, tmp_path):
    lock = resolved(course, "learner", install.here(), THIS)
    with zipfile.ZipFile(shelf / "tiny-1.0-py3-none-any.whl", "a") as archive:
        archive.writestr("more.py", "print('not what was looked up')")
    with pytest.raises(Refused, match="pip could not fetch all"):
        fetch(lock, tmp_path / "wheels")


def test_too_little_room_is_told_before_anything_is_fetched(shelf, course, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**7, 0, 10**7))
    with pytest.raises(Refused, match=r"has 10 MB left, and 5\d MB are needed"):
        bundle(course, tmp_path / "out", systems=[install.here()], pythons=[THIS])
    assert set(tree(tmp_path / "out")) == {install.ABOUT}


def test_a_run_that_stops_leaves_no_manifest(stick, course, shelf, monkeypatch):
    (stick / "wheels" / "tiny-1.0-py3-none-any.whl").unlink()
    monkeypatch.setattr(subprocess, "call", lambda *_, **__: 1)  # pip
    with pytest.raises(Refused, match="pip could not fetch all; run this again to go on"):
        bundle(course, stick, systems=[install.here()], pythons=[THIS])
    with pytest.raises(install.Refused, match="not packed to its end"):
        install.read_manifest(stick)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"systems": ["macos-x86_64"]}, r"--platform 'macos-x86_64': must be one of linux-x86_64, .*windows-x86_64"),
        ({"pythons": ["3.10"]}, r"--python '3\.10': must be 3\.11 or newer"),
        ({"pythons": ["three"]}, r"--python 'three'"),
        ({"docs": Path("nowhere.zip")}, r"--docs nowhere\.zip: .*make docs-archive"),
    ],
)
def test_what_cannot_be_packed_is_refused_with_its_name(course, tmp_path, given, words):
    with pytest.raises(Refused, match=words):
        bundle(course, tmp_path / "out", **{"systems": [install.here()], "pythons": [THIS], **given})
    assert not (tmp_path / "out" / "course.zip").exists()


def test_a_folder_with_other_things_is_not_written_over(course, tmp_path):
    (tmp_path / "README.txt").write_text("mine")
    with pytest.raises(Refused, match=r"README\.txt lies there and is not of a bundle"):
        bundle(course, tmp_path, systems=[install.here()], pythons=[THIS])
    with pytest.raises(Refused, match="it is a file"):
        bundle(course, tmp_path / "README.txt", systems=[install.here()], pythons=[THIS])
    assert (tmp_path / "README.txt").read_text() == "mine"


def test_without_git_nothing_is_packed(course, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    shutil.rmtree(course / ".git")
    with pytest.raises(Refused, match="nothing private slips in"):
        bundle(course, tmp_path / "out", systems=[install.here()], pythons=[THIS])


def test_pips_own_settings_are_read(monkeypatch, tmp_path):
    (tmp_path / "pip.conf").write_text(
        "[global]\nindex-url = https://a/simple\nextra-index-url = https://b https://c\n"
    )
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("PIP_INDEX_URL", "https://d/simple")
    found = pip_settings()
    assert found["index-url"][-1] == "https://d/simple"
    assert {"https://b", "https://c"} <= set(found["extra-index-url"])
    options = packing._sources(found)
    assert options[options.index("--default-index") + 1] == "https://d/simple"
    assert "https://a/simple" not in options


def test_the_table_adds_up():
    assert table({"course": 1_500_000, "wheels: learner": 250_000_000}).splitlines() == [
        "course                1.5 MB",
        "wheels: learner     250.0 MB",
        "all                 251.5 MB",
    ]


# Data


def idx(path: Path, shape: tuple[int, ...], values: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + values)


def test_what_is_not_there_is_not_packed_and_its_command_is_told(tmp_path):
    assert {item.name: item.files for item in data_sets(tmp_path)} == {"mnist": (), "fashion_mnist": (), "cifar10": ()}
    assert "load('cifar10')" in packing.how_to_get("cifar10", tmp_path)
    assert f'COURSE_DATA="{tmp_path}"' in packing.how_to_get("cifar10", tmp_path)


def test_archives_are_held_against_their_checksums(tmp_path):
    for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / "MNIST" / "raw").mkdir(parents=True, exist_ok=True)
        (tmp_path / "MNIST" / "raw" / f"{part}-ubyte.gz").write_bytes(gzip.compress(b"not the original"))
    with pytest.raises(Refused, match=r"train-images-idx3-ubyte\.gz is damaged"):
        data_sets(tmp_path)


@pytest.mark.parametrize(("cut", "words"), [(0, r"has \(3, 3\) images"), (1, "is damaged")])
def test_unpacked_files_must_be_whole(tmp_path, cut, words):
    for prefix in ("train", "t10k"):
        idx(tmp_path / f"MNIST/raw/{prefix}-images-idx3-ubyte", (3, 28, 28), bytes(3 * 28 * 28 - cut))
        idx(tmp_path / f"MNIST/raw/{prefix}-labels-idx1-ubyte", (3,), bytes(3))
    with pytest.raises(Refused, match=words):
        data_sets(tmp_path)


def test_data_travels_to_where_the_course_looks(course, shelf, tmp_path, monkeypatch):
    source, out, to = tmp_path / "sets", tmp_path / "out", tmp_path / "to"
    (source / "MNIST" / "raw").mkdir(parents=True)
    (source / "MNIST" / "raw" / "images").write_bytes(b"12345")
    files = (Path("MNIST", "raw", "images"),)
    monkeypatch.setattr(packing, "data_sets", lambda folder: [packing.Data("mnist", files)])
    parts = bundle(course, out, systems=[install.here()], pythons=[THIS], data=source)
    assert parts["data: mnist"] == 5

    monkeypatch.setattr(install, "_make_environment", lambda stick, folder, lock: (folder / ".venv").mkdir())
    install.install(out, to, install.read_manifest(out), json.loads((out / install.ABOUT).read_text()), ["learner"])
    assert (to / "data" / "MNIST" / "raw" / "images").read_bytes() == b"12345"


# All of it


@pytest.mark.skipif(os.environ.get("CLASS_BUNDLE_WHOLE") != "1", reason="CLASS_BUNDLE_WHOLE=1 packs the whole course")
def test_the_whole_course_packed_and_installed(tmp_path, without_network):
    out, to, home = tmp_path / "Stick für Zoë", tmp_path / "Cours d'été", tmp_path / "home"
    home.mkdir()
    assert packing.main([str(out)]) == 0
    done = run(out, "--to", to, before=without_network, HOME=str(home))
    assert done.returncode == 0, done.stdout + done.stderr
    asked = "import torch, course_lib; from course_lib.lab import load; print(torch.__version__, load('digits'))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COURSE"))}
    commands = [["-c", asked], ["-m", "course_lib.proving.run_notebook", "00"]]
    for command in commands:
        subprocess.run(
            [*without_network, str(python_of(to / ".venv")), *command], cwd=to, check=True,
            env={**environment, "HOME": str(home)},
        )  # fmt: skip
