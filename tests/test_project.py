"""The project's own rules: lint, types, pins, who may import whom, what belongs to which chapter, and the commands."""

import ast
import base64
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib import metadata
from pathlib import Path

import nbformat
import pytest

from course_lib.lab.chapters import CHAPTERS, MODULES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "course_lib"

# One module a chapter, chapters 1 to 17 in order; 0 has none of its own
TECHNIQUES = MODULES
SHARED = {"lab", "proving", "checks", "studies", "_torchvision_mend"}
NOTEBOOKS = {path.name: path for path in sorted((ROOT / "notebooks").glob("*.ipynb")) if path.name[:3] != "my_"}


# Lint and types


def succeeds(*command: str) -> None:
    """Run a tool in the root; when it complains, its own words are the failure."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        pytest.fail(f"$ {' '.join(command[1:])}\n{done.stdout}{done.stderr}", pytrace=False)


def test_lint() -> None:
    succeeds(sys.executable, "-m", "ruff", "check", "--output-format=concise", "course_lib", "tests", "docs")


def test_format() -> None:
    succeeds(sys.executable, "-m", "ruff", "format", "--diff", "course_lib", "tests", "docs")


@pytest.mark.skipif(not NOTEBOOKS, reason="there are no notebooks yet")
def test_lint_of_notebooks() -> None:
    """Names that do not exist, imports that nobody uses, and what is no Python at all."""
    succeeds(sys.executable, "-m", "ruff", "check", "--output-format=concise", "--select=F,E9", "notebooks")


def test_types() -> None:
    succeeds(sys.executable, "-m", "mypy")


# Imports


def modules(folder: Path = PACKAGE) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


@cache
def imports(path: Path) -> list[tuple[int, str]]:
    """Line and full dotted name of all that a file imports, anywhere in it; ``from a import b`` is ``a.b``."""
    return list(_imports(path))


def _imports(path: Path) -> Iterator[tuple[int, str]]:
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def technique_of(path: Path) -> str | None:
    """The technique whose module or package a file of ``course_lib`` belongs to."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return first if first not in SHARED | {"__init__"} else None


def imported_techniques(path: Path) -> dict[str, int]:
    """The techniques that a file imports, with the line."""
    found = {}
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] == "course_lib" and len(parts) > 1 and parts[1] in TECHNIQUES:
            found[parts[1]] = line
    return found


def test_the_laboratory_imports_no_technique() -> None:
    wrong = []
    for path in modules(PACKAGE / "lab"):
        wrong += [f"{path.relative_to(ROOT)}:{line} imports {t}" for t, line in imported_techniques(path).items()]
        wrong += [
            f"{path.relative_to(ROOT)}:{line} imports {name}"
            for line, name in imports(path)
            if name.startswith("course_lib.checks.chapter_")  # they know techniques: imported by name, on demand
        ]
    assert not wrong, "\n".join(wrong)


def test_course_lib_imports_neither_tests_nor_notebooks() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules()
        for line, name in imports(path)
        if name.split(".")[0] in {"tests", "notebooks", "docs"}
    ]
    assert not wrong, "\n".join(wrong)


def test_techniques_import_each_other_in_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for path in modules():
        if technique := technique_of(path):
            graph.setdefault(technique, set()).update(imported_techniques(path).keys() - {technique})
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"technique modules import each other in a circle: {' -> '.join(error.args[1])}", pytrace=False)


# Pins


def pins(*files: str) -> dict[str, str]:
    """Package to version, as the files have them (by default requirements.txt, what a learner needs)."""
    files = files or ("requirements.txt",)
    lines = [line for file in files for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
    bare = [line.partition("#")[0].strip() for line in lines]
    # the course itself has no version to pin
    others = ("-e .", "-r requirements.txt", "-r requirements-docs.txt")
    wanted = [line for line in bare if line and line not in others]
    loose = [line for line in wanted if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)]
    assert not loose, f"{' and '.join(files)} must pin exact versions (name==1.2.3), got {loose}"
    return {canonical(name): version for name, version in (line.split("==") for line in wanted)}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def distributions_of_packages() -> Mapping[str, list[str]]:
    """What must be installed for an import; looked up once, for it reads all that is installed."""
    return metadata.packages_distributions()


def test_every_import_is_pinned() -> None:
    files = ("requirements.txt", "requirements-docs.txt", "requirements-dev.txt")
    distributions, pinned = distributions_of_packages(), pins(*files)
    brought = {"docutils", "markdown_it", "myst_parser", "fontTools"}  # by sphinx, myst-nb and matplotlib
    own = {
        "course_lib",
        "classroom",
        "tests",
        "site_builder",
        *(path.stem for path in modules(ROOT / "tests")),
    } | brought
    wrong = set()
    for path in (*modules(), *modules(ROOT / "tests"), *modules(ROOT / "docs" / "site_builder")):
        for line, name in imports(path):
            top = name.split(".")[0]
            if top in own or top in sys.stdlib_module_names:
                continue
            if not {canonical(d) for d in distributions.get(top, [])} & pinned.keys():
                wrong.add(f"{path.relative_to(ROOT)}:{line} imports {top}, which no requirements file pins")
    assert not wrong, "\n".join(sorted(wrong))


def test_what_course_lib_imports_is_declared() -> None:
    """``pip install`` of the package alone must give a package that can be imported."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)
    assert block is not None
    declared = {canonical(name) for name in re.findall(r'"([A-Za-z0-9._-]+?)>=', block[1])}
    distributions = distributions_of_packages()
    only_under_pytest = {"pytest", "nbval", "xdist", "psutil"}
    tops = {name.split(".")[0] for path in modules() for _, name in imports(path)}
    third_party = tops - set(sys.stdlib_module_names) - {"course_lib"} - only_under_pytest
    missing = [top for top in third_party if not {canonical(d) for d in distributions.get(top, [top])} & declared]
    assert not missing, f"course_lib imports {missing}, which pyproject.toml's dependencies do not name"
    assert declared <= pins().keys(), f"declared but not pinned: {declared - pins().keys()}"


def test_a_learner_installs_no_tools_of_authors() -> None:
    """What tests and benchmarks need besides stands in requirements-dev.txt, and what the site needs by itself."""
    dev, docs = pins("requirements-dev.txt"), pins("requirements-docs.txt")
    for name, builds_on in (("dev", ("requirements.txt", "requirements-docs.txt")), ("docs", ("requirements.txt",))):
        lines = (ROOT / f"requirements-{name}.txt").read_text(encoding="utf-8").splitlines()
        assert {f"-r {other}" for other in builds_on} <= set(lines)
    assert {"pytest", "ruff", "mypy", "nbval", "psutil", "torch-pruning", "playwright"} <= dev.keys()
    assert {"sphinx", "furo", "myst-nb"} <= docs.keys()
    assert not dev.keys() & pins().keys()
    assert not docs.keys() & (pins().keys() | dev.keys())


def test_conda_gets_the_same() -> None:
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    assert "- -r requirements.txt" in text
    assert "==" not in text, "a version stands once, in requirements.txt"


# Chapters


@cache
def stored(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS[name], as_version=4)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_has_its_module_and_its_tests(name: str) -> None:
    chapter = next((chapter for chapter in CHAPTERS if chapter.file == name), None)
    assert chapter, f"{name} is no chapter's notebook; those are {', '.join(c.file for c in CHAPTERS)}"
    if chapter.module:
        assert technique_files(chapter.module), f"{name} teaches course_lib/{chapter.module}, which is not there"
    cells = stored(name).cells
    if any(re.search(r"\bcheck\(['\"]\d\d\.\d", cell.source) for cell in cells if cell.cell_type == "code"):
        assert (PACKAGE / "checks" / f"chapter_{name[:2]}.py").is_file(), f"{name} uses check(): its checks are missing"


WIDTH, HEIGHT = 88, 24  # a column of the docs, half a laptop's screen


def cells_of(name: str, kind: str) -> list[tuple[int, nbformat.NotebookNode]]:
    cells = stored(name).cells
    return [(number, cell) for number, cell in enumerate(cells) if cell.cell_type == kind]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_code_fits_a_column_of_the_docs(name: str) -> None:
    wrong = []
    for number, cell in cells_of(name, "code"):
        lines = cell.source.splitlines()
        wrong += [f"cell {number}: {len(lines)} lines, {HEIGHT} at most"] * (len(lines) > HEIGHT)
        wrong += [
            f"cell {number}, {len(line)} characters, {WIDTH} at most: {line}" for line in lines if len(line) > WIDTH
        ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_cell_is_empty(name: str) -> None:
    empty = [
        number for kind in ("code", "markdown") for number, cell in cells_of(name, kind) if not cell.source.strip()
    ]
    assert not empty


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_figures_are_sharp(name: str) -> None:
    """Stored at twice the size at which they are shown: the picture says so in its metadata."""
    wrong = []
    for number, cell in cells_of(name, "code"):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                shown = output.get("metadata", {}).get("image/png", {}).get("width", 0)
                stored = int.from_bytes(base64.b64decode(output.data["image/png"])[16:20], "big")
                if not shown or abs(stored / shown - 2) > 0.02:
                    wrong.append(f"cell {number}: {stored} pixels wide, shown at {shown or 'no stated width'}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_number_of_a_paper_is_a_link(name: str) -> None:
    wrong = []
    for number, cell in cells_of(name, "markdown"):
        bare = re.sub(r"\[[^\]]*\]\(https?://[^)]*\)", "", cell.source)
        found = re.findall(r"(?:arXiv:|arxiv\.org/|doi:|doi\.org/)\S+", bare)
        wrong += [f"cell {number}: {what} is no link" for what in found]
    assert not wrong, "\n".join(wrong)


def technique_files(module: str) -> list[Path]:
    return [path for path in (PACKAGE / f"{module}.py", PACKAGE / module / "__init__.py") if path.is_file()]


def test_every_technique_is_the_module_or_the_package_of_a_chapter() -> None:
    wrong = []
    for technique in sorted({name for path in modules() if (name := technique_of(path))}):
        if technique not in TECHNIQUES:
            wrong.append(f"course_lib/{technique}: not the module of a chapter; those are {', '.join(TECHNIQUES)}")
        elif len(technique_files(technique)) != 1:
            wrong.append(f"course_lib/{technique}: is either a module or a package, not both")
    assert not wrong, "\n".join(wrong)


def test_the_tests_mirror_course_lib_folder_for_folder() -> None:
    """``course_lib/NAME`` (or ``NAME.py``) is tested in ``tests/NAME/``; there are no other folders and no strays."""
    parts = {name.removesuffix(".py") for name in top_level(PACKAGE) if not name.startswith("_")}
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert folders == parts | {"benchmarks", "docs", "browser"}
    assert not [part for part in parts if not list((ROOT / "tests" / part).rglob("test_*.py"))]
    loose = {path.name for path in (ROOT / "tests").glob("*.py")}
    assert loose == {"__init__.py", "conftest.py", "test_project.py", "test_torchvision_mend.py"}


def top_level(package: Path) -> list[str]:
    return [path.name for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]


@pytest.mark.parametrize("folder", ["lab", "proving"])
def test_every_public_file_of_the_laboratory_has_tests(folder: str) -> None:
    tested_elsewhere = {"agreement", "figure_comparison"}  # by test_figures.py, through the checker that they make up
    names = {name.removesuffix(".py") for name in top_level(PACKAGE / folder) if not name.startswith("_")}
    there = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / folder).glob("test_*.py")}
    assert not names - there - tested_elsewhere, f"tests/{folder}/ has no test_NAME.py for these"


def test_nothing_names_a_folder_of_somebodys_machine() -> None:
    personal = re.compile(r"(?<![\w.])/(?:home|Users|root|work)/\w[^\s\"']*|[A-Z]:\\{1,2}Users\\")
    folders = ("course_lib", "tests", "notebooks", "docs", ".ci")
    paths = [p for p in ROOT.iterdir() if p.is_file()] + [p for f in folders for p in (ROOT / f).rglob("*")]
    suffixes = {"", ".py", ".ipynb", ".md", ".txt", ".toml", ".yml", ".yaml", ".cfg", ".json", ".html"}
    wrong = []
    for path in paths:
        hidden = {"__pycache__", ".ipynb_checkpoints"} & set(path.parts)
        if path.is_file() and path.suffix in suffixes and not hidden and path.name != ".git":
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                if match := personal.search(line):
                    wrong.append(f"{path.relative_to(ROOT)}:{number} names {match[0]}")
    assert not wrong, "\n".join(wrong)


# Commands

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(folder: Path, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """GNU make as a reader calls it: without what this test run's own make has put into the environment."""
    environment = {k: v for k, v in os.environ.items() if k not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON"}}
    if path is not None:
        environment["PATH"] = f"{path}{os.pathsep}{environment['PATH']}"
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A checkout whose environment has been made: each command there only writes down how it was called."""
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt", "requirements-docs.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
        os.utime(tmp_path / name, (1_000_000, 1_000_000))
    for name in ("python", "pip", "jupyter"):
        script(tmp_path / ".venv" / "bin" / name, f'echo "{name} $@"')
    (tmp_path / ".venv" / ".installed").touch()
    (tmp_path / ".venv" / ".installed-docs").touch()
    (tmp_path / ".venv" / ".installed-dev").touch()
    return tmp_path


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@needs_make
def test_help_lists_every_target() -> None:
    done = make(ROOT)
    assert done.returncode == 0, done.stderr
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    declared = re.search(r"^\.PHONY: (.+)$", text, re.MULTILINE)
    assert declared is not None
    assert re.findall(r"^  make ([\w-]+) +\S", done.stdout, re.MULTILINE) == declared[1].split()
    assert make(ROOT, "help").stdout == done.stdout, "help is what plain `make` does"
    site = {"frames", "docs", "docs-serve", "docs-archive"}
    marking = {"class-setup", "class-release", "class-autograde", "class-feedback", "class-test"}
    room = {"hub", "class-passwords", "class-publish", "class-load", "class-progress", "class-bundle"}
    classroom = marking | room | {"class-slides", "class-timings"}
    course = {"lab", "test", "run", "reset", "study", "confirm", "bench", "clean", "help"}
    assert course | site | classroom == set(declared[1].split())


@needs_make
def test_a_second_call_installs_nothing(installed: Path) -> None:
    assert make(installed, "test").stdout == "python -m pytest\n"
    assert make(installed, "-n", "test").stdout.split() == [".venv/bin/python", "-m", "pytest"]
    assert make(installed, "bench").stdout == "python -m tests.benchmarks\n"
    assert make(installed, "run", "NB=02").stdout == "python -m course_lib.proving.run_notebook 02\n"
    assert make(installed, "run").stdout == "python -m course_lib.proving.run_notebook\n"
    assert make(installed, "reset", "NB=02").stdout == "python -m course_lib.lab.reset 02\n"
    assert make(installed, "study", "NB=02").stdout == "python -m course_lib.lab.studies 02\n"
    assert make(installed, "frames", "NB=02").stdout == "python -m course_lib.proving.frames 02\n"


@needs_make
def test_the_site_is_built_served_and_packed(installed: Path) -> None:
    build = "python -m sphinx --builder html --nitpicky --fail-on-warning --quiet docs docs/_build/html\n"
    assert make(installed, "docs").stdout == f"{build}The site is docs/_build/html/index.html\n"
    served = make(installed, "docs-serve").stdout
    assert "http://localhost:8000/" in served
    assert served.endswith("python -m http.server --bind localhost --directory docs/_build/html 8000\n")
    assert "http://localhost:9001/" in make(installed, "docs-serve", "PORT=9001").stdout
    (installed / "docs").mkdir()
    packed = "python -m site_builder.archive ../docs/_build/html _build/craft-of-training.zip\n"
    assert make(installed, "docs-archive").stdout.endswith(packed)


@needs_make
@pytest.mark.parametrize("newer", ["requirements.txt", "pyproject.toml"])
def test_a_changed_pin_installs_once(installed: Path, newer: str) -> None:
    os.utime(installed / ".venv" / ".installed", (2_000_000, 2_000_000))
    os.utime(installed / newer, (3_000_000, 3_000_000))
    first, second = make(installed, "test").stdout, make(installed, "test").stdout
    assert "pip install --quiet --disable-pip-version-check --requirement requirements.txt\n" in first
    assert first.endswith("python -m pytest\n")
    assert second == "python -m pytest\n"


@needs_make
def test_an_install_that_failed_is_tried_again(installed: Path) -> None:
    (installed / ".venv" / ".installed").unlink()
    script(installed / ".venv" / "bin" / "python", 'echo "python $@"; exit 1')
    for _ in range(2):
        done = make(installed, "test")
        assert done.returncode != 0
        assert "pip install" in done.stdout
        assert "pytest" not in done.stdout


@needs_make
def test_a_python_that_does_not_do_is_named(installed: Path) -> None:
    shutil.rmtree(installed / ".venv")
    old = script(installed / "old" / "python3.9", 'if [ "$1" = -V ]; then echo Python 3.9.18; else exit 1; fi')
    done = make(installed, "test", f"PYTHON={old}")
    assert done.returncode != 0
    assert f"{old} (Python 3.9.18) cannot make the environment" in done.stdout
    assert "3.11" in done.stdout
    done = make(installed, "test", "PYTHON=")
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stdout
    assert not (installed / ".venv").exists()


@needs_make
def test_a_python_on_the_path_that_does_not_run_is_passed_over(installed: Path) -> None:
    (installed / ".venv" / ".installed").unlink()
    shims = installed / "shims"
    script(shims / "python3.11", "exit 127")
    script(shims / "python3.12", f'echo "chosen: $0" >> {installed}/log')
    make(installed, "test", path=shims)
    assert "python3.12" in (installed / "log").read_text()


@needs_make
def test_lab_opens_the_first_chapter(installed: Path) -> None:
    plain = make(installed, "lab").stdout
    assert "http://localhost:8888/lab/tree/notebooks/00_start_here.ipynb" in plain
    assert re.search(r"^jupyter lab --port=8888 .*url=/lab/tree/notebooks/00_start_here\.ipynb$", plain, re.MULTILINE)
    assert f"--ServerApp.root_dir={installed}" in plain, "the address is relative to the folder that is served"
    assert "--no-browser" not in plain
    server = make(installed, "lab", "PORT=9001", "BROWSER=no").stdout
    assert "http://localhost:9001/lab" in server
    assert re.search(r"^jupyter lab --port=9001 .*--no-browser", server, re.MULTILINE)


@needs_make
def test_clean_keeps_the_data(installed: Path) -> None:
    (installed / "data").mkdir()
    (installed / "data" / "mnist.bin").touch()
    (installed / "course_lib" / "__pycache__").mkdir(parents=True)
    assert make(installed, "clean").returncode == 0
    assert sorted(path.name for path in installed.iterdir()) == [
        *(
            "Makefile",
            "course_lib",
            "data",
            "pyproject.toml",
            "requirements-dev.txt",
            "requirements-docs.txt",
            "requirements.txt",
        )
    ]
    assert (installed / "data" / "mnist.bin").exists()
    assert not any((installed / "course_lib").iterdir())


@pytest.mark.parametrize("shared", [True, False])
def test_the_build_server_runs_make_test(tmp_path: Path, shared: bool) -> None:
    checkout = tmp_path / "checkout"
    (checkout / ".ci").mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", checkout / ".ci" / "run")
    script(tmp_path / "bin" / "make", 'echo "make $@ in $PWD shared=$COURSE_SHARED"')
    script(tmp_path / "bin" / "chromium", "true")  # there, so nothing is installed
    if shared:
        (tmp_path / "shared" / "data").mkdir(parents=True)
    environment = {k: v for k, v in os.environ.items() if k != "COURSE_SHARED"}
    environment["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(checkout / ".ci" / "run")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    expected = tmp_path / "shared" if shared else ""
    assert (done.returncode, done.stdout) == (0, f"make test in {checkout} shared={expected}\n"), done.stderr


def test_a_missing_package_is_named_with_the_command_that_mends_it() -> None:
    hide = "import sys; sys.modules['tqdm'] = None; sys.modules['tqdm.auto'] = None; import course_lib.lab"
    found = subprocess.run([sys.executable, "-c", hide], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode != 0
    assert re.search(r"tqdm.* is not installed\. Run 'pip install -r requirements\.txt'", found.stderr)
