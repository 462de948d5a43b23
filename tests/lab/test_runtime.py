"""Where the course runs: the environment's wishes are followed, and a machine that lacks something is told what."""

import os
import random
import shlex
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from course_lib.lab import runtime

VARIABLES = (
    "COURSE_DEVICE",
    "COURSE_PROFILE",
    "COURSE_DATA",
    "COURSE_HOME",
    "COURSE_LEARNER",
    "COURSE_CORES",
    "COURSE_PROGRESS",
    "COURSE_VALIDATING",
    "CI",
)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


# Device, seed, profile


def test_device_prefers_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert runtime.device() == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runtime.device() == torch.device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert runtime.device() == torch.device("cpu")


def test_device_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for wanted in ("cpu", "cuda", "cuda:1", " CUDA:1 "):
        monkeypatch.setenv("COURSE_DEVICE", wanted)
        assert str(runtime.device()) == wanted.strip().lower()


@pytest.mark.parametrize("wanted", ["cuda:7", "gpu", "tpu", "cuda:"])
def test_device_refuses_what_is_not_there(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COURSE_DEVICE", wanted)
    with pytest.raises(ValueError, match=rf"COURSE_DEVICE='{wanted}' .* it has cpu"):
        runtime.device()


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def test_seed_everything_repeats_every_generator() -> None:
    runtime.seed_everything(3)
    first = draws()
    runtime.seed_everything(4)
    other = draws()
    runtime.seed_everything(3)
    assert draws() == first
    assert all(a != b for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, "3", True, None])
def test_seed_must_be_a_small_integer(seed: object) -> None:
    with pytest.raises(ValueError, match="seed must be an integer from 0"):
        runtime.seed_everything(seed)  # type: ignore[arg-type]


def test_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime.profile() == "quick"
    assert runtime.quick()
    monkeypatch.setenv("COURSE_PROFILE", "Full")
    assert runtime.profile() == "full"
    assert not runtime.quick()
    monkeypatch.setenv("COURSE_PROFILE", "fast")
    with pytest.raises(ValueError, match=r"COURSE_PROFILE='fast' .* 'quick' or 'full'"):
        runtime.profile()


# Who watches


def test_nobody_watches_a_test() -> None:
    assert not runtime.interactive()


def test_a_terminal_and_a_notebook_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_VERSION")
    monkeypatch.setattr(runtime, "in_notebook", lambda: False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    assert not runtime.interactive()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert runtime.interactive()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    monkeypatch.setattr(runtime, "in_notebook", lambda: True)
    assert runtime.interactive()


@pytest.mark.parametrize(
    ("name", "value"), [("COURSE_PROGRESS", "off"), ("CI", "true"), ("COURSE_VALIDATING", "1"), ("PYTEST_VERSION", "9")]
)
def test_silence_is_kept_in_a_notebook_too(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_VERSION")
    monkeypatch.setattr(runtime, "in_notebook", lambda: True)
    monkeypatch.setenv(name, value)
    assert not runtime.interactive()


# Folders


def test_data_folder_is_that_of_the_checkout() -> None:
    root = Path(__file__).resolve().parents[2]
    assert runtime.checkout() == root
    assert runtime.data_folder() == root / "data"


def test_data_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COURSE_DATA", str(tmp_path / "sets"))
    assert runtime.data_folder() == tmp_path / "sets"
    assert not (tmp_path / "sets").exists(), "it is named, not made"
    monkeypatch.setenv("COURSE_DATA", "~/sets")
    assert runtime.data_folder() == (Path.home() / "sets").resolve()


def test_data_folder_of_an_installed_package_is_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.course_lib, "__file__", str(tmp_path / "site-packages" / "course_lib" / "__init__.py"))
    assert runtime.data_folder() == Path.home() / ".craft-of-training"
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "pyproject.toml").write_text('[project]\nname = "another"\n')
    assert runtime.data_folder() == Path.home() / ".craft-of-training"


# The machine


def test_describe_machine() -> None:
    facts = runtime.describe_machine()["this machine"]
    assert facts["torch"] == torch.__version__
    assert facts["torchvision"] == metadata.version("torchvision")
    assert facts["Python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["device"].startswith(str(runtime.device()))
    assert f"torch uses {torch.get_num_threads()}" in facts["cores"]
    assert "GiB" in facts["memory"] or facts["memory"] == "unknown"


def wrong(result: runtime.MachineCheck) -> dict[str, runtime.Check]:
    return {check.what: check for check in result.checks if not check.ok}


def test_this_machine_is_ready() -> None:
    result = runtime.check_machine()
    assert result.ready, result
    assert {"Python", "torch at work", "memory", "cores", "widgets", "data folder", "free disk"} <= set(
        result.frame().index
    )
    assert result._repr_html_().count(result.line) == 1
    assert repr(result).splitlines()[-1] == result.line


def test_the_line_of_a_good_machine_names_nothing_of_it() -> None:
    """Its words are stored in a notebook that other machines validate."""
    good = [
        runtime.Check("memory", "64.0 GiB", "4.0 GiB or more", True, "buy some"),
        runtime.Check("torch at work", "a gradient on cuda", "a gradient", True),
    ]
    line = runtime.MachineCheck(tuple(good)).line
    assert line == "Ready: this machine has everything the course needs."
    assert runtime.MachineCheck(tuple(good[:1])).line == line


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_version", lambda name: None if name == "scikit-learn" else metadata.version(name))
    result = runtime.check_machine()
    assert not result.ready
    assert set(wrong(result)) == {"scikit-learn"}
    assert result.line.startswith("Missing: scikit-learn (not installed, needed: ")
    requirements = runtime.checkout() / "requirements.txt"  # type: ignore[operator]
    mend = shlex.join([sys.executable, "-m", "pip", "install", "-r", str(requirements)])  # a path may hold a space
    assert result.line.endswith(mend)


def test_another_version_does_not_stop_a_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"pandas": "3.0.0"}
    monkeypatch.setattr(runtime, "_version", lambda name: other.get(name) or metadata.version(name))
    result = runtime.check_machine()
    assert result.ready
    assert set(wrong(result)) == set(other)
    assert result.line.startswith("Ready, though not perfect: pandas (3.0.0, needed: ")


def test_a_local_build_of_the_pinned_version_is_the_pinned_version(monkeypatch: pytest.MonkeyPatch) -> None:
    pins = {r.name: next(iter(r.specifier)).version for r in runtime.requirements()}
    assert len(pins) > 15
    monkeypatch.setattr(runtime, "_version", lambda name: f"{pins[name]}+cu130")
    assert [check.found for check in runtime._check_packages()] == [f"{len(pins)} as pinned"]


def test_without_a_checkout_the_declared_ranges_count(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = ["torch>=2.13", "numpy>=99", 'colorama>=9; sys_platform == "amiga"', 'ruff>=0.1; extra == "dev"']
    monkeypatch.setattr(runtime, "checkout", lambda: None)
    monkeypatch.setattr(runtime.metadata, "requires", lambda name: declared)
    assert [check.what for check in runtime._check_packages()] == ["numpy"]


def test_a_torch_that_does_not_work_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COURSE_DEVICE", "cuda:9")
    monkeypatch.setattr(runtime, "describe_machine", lambda: None)
    result = runtime.check_machine()
    assert not result.ready
    assert "COURSE_DEVICE='cuda:9'" in result.line
    assert "set COURSE_DEVICE=cpu" in result.line


def test_a_wrong_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    true_ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, **options: 2 * true_ones(*size, **options))
    check = runtime._check_torch()
    assert not check.ok
    assert check.found.startswith("a wrong gradient")


def test_a_data_folder_that_can_only_be_read_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(dir: Path) -> Any:
        if dir.name == "sets":
            raise PermissionError("read-only")
        return real(dir=dir)

    real = tempfile.TemporaryFile
    monkeypatch.setenv("COURSE_HOME", str(tmp_path / "mine"))
    monkeypatch.setenv("COURSE_DATA", str(tmp_path / "sets"))
    assert not wrong(runtime.check_machine())
    assert not (tmp_path / "sets").exists(), "a check leaves nothing behind"
    (tmp_path / "sets").mkdir()
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    result = runtime.check_machine()
    assert result.line == "Ready: this machine has everything the course needs."
    (found,) = (check.found for check in result.checks if check.what == "data folder")
    assert found == "can be read (nothing will be downloaded into it)"


def test_progress_that_cannot_be_kept_is_said_and_does_not_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv("COURSE_HOME", str(tmp_path / "a file"))
    real = tempfile.TemporaryFile

    def refuse(dir: Path) -> Any:
        if dir == tmp_path:
            raise PermissionError("read-only")
        return real(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    result = runtime.check_machine()
    assert result.ready
    assert set(wrong(result)) == {"your progress"}
    assert "export COURSE_HOME=" in result.line


def test_what_is_yours_lies_at_home_or_where_you_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runtime.home_folder() == Path.home() / ".craft-of-training"
    monkeypatch.setenv("COURSE_HOME", str(tmp_path / "mine"))
    assert runtime.home_folder() == tmp_path / "mine"


def test_the_learner_is_who_says_so_else_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "ada")
    assert runtime.learner() == "ada"
    monkeypatch.setenv("COURSE_LEARNER", " Grace Hopper/1 ")
    assert runtime.learner() == "Grace_Hopper_1"


def test_a_user_without_a_name_is_a_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr("getpass.getuser", nameless)
    assert runtime.learner() == "learner"


def test_everybodys_name_in_a_shared_folder_is_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(question: str) -> str:
        asked.append(question)
        return "Ada Lovelace"

    monkeypatch.setattr("getpass.getuser", lambda: "jovyan")
    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert runtime.learner() == "jovyan", "a home of one's own needs no name"
    monkeypatch.setenv("COURSE_HOME", str(tmp_path / "class"))
    assert runtime.learner() == "jovyan", "nobody watches"
    monkeypatch.setattr(runtime, "interactive", lambda: True)
    monkeypatch.setattr(runtime, "in_notebook", lambda: True)
    assert [runtime.learner() for _ in range(3)] == ["Ada_Lovelace"] * 3
    assert len(asked) == 1


def test_cores_are_those_granted_and_at_most_those_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    granted = runtime.usable_cores()
    assert 1 <= granted <= (os.cpu_count() or 1)
    for wanted, found in (("1", 1), (f" {granted} ", granted), ("9999", granted), ("", granted)):
        monkeypatch.setenv("COURSE_CORES", wanted)
        assert runtime.usable_cores() == found
    for wrong_value in ("0", "two", "-1", "1.5", "\u00b2"):
        monkeypatch.setenv("COURSE_CORES", wrong_value)
        with pytest.raises(ValueError, match=rf"COURSE_CORES='{wrong_value}' .* whole number from 1"):
            runtime.usable_cores()


def test_little_memory_and_a_full_disk_are_said_but_do_not_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "total_memory", lambda: 2 * runtime.GIB)
    monkeypatch.setattr(runtime, "usable_cores", lambda: 1)
    monkeypatch.setattr(runtime.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10**6}))
    result = runtime.check_machine()
    assert result.ready
    assert set(wrong(result)) == {"memory", "cores", "free disk"}


def test_an_unknown_amount_of_memory_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "total_memory", lambda: None)
    assert runtime._check_memory().ok
    assert runtime._check_memory().found == "unknown"


def test_importing_course_lib_is_light() -> None:
    code = "import sys, course_lib; print(*({'pandas', 'matplotlib', 'torchvision'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


@pytest.mark.gpu
def test_the_gpu_is_found_and_works() -> None:
    assert runtime.device().type == "cuda"
    assert "GiB" in runtime.describe_machine().loc["device", "this machine"]
    assert runtime._check_torch().ok


def test_importing_the_laboratory_imports_nothing_heavy_that_it_may_not_need() -> None:
    """Each kernel and each test worker pays for it: half a second for one quantile, once."""
    heavy = {"scipy", "scipy.stats", "sklearn", "torchvision", "ipywidgets", "IPython", "jinja2", "joblib", "nbformat"}
    script = "import sys, course_lib.lab; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not heavy & set(done.stdout.split())
