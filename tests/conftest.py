"""Settings that all tests share."""

import gc
import os
import sys
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from typing import Any

import matplotlib
import pytest
import torch

from course_lib.lab import exercises
from course_lib.proving.emulated_cuda import emulated_cuda

matplotlib.use("Agg")
os.environ["COURSE_PROGRESS"] = "off"
pytest.register_assert_rewrite("tests.checks.checking")

if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
    torch.set_num_threads(1)  # the workers share the cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if (marked := _on_a_gpu(item)) and not marked.kwargs.get("emulated", True):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, not one that is emulated"))


def pytest_collection_finish() -> None:
    """What stands for the tests stays for the whole run, and a search for garbage, of which a measurement of time or
    memory makes several, would go through a million objects of it."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """A test marked ``gpu`` runs on the GPU, or else on one that is emulated."""
    with emulated_cuda() if _on_a_gpu(item) else nullcontext():
        return (yield)


def _on_a_gpu(item: pytest.Item) -> pytest.Mark | None:
    return None if torch.cuda.is_available() else item.get_closest_marker("gpu")


@pytest.fixture(autouse=True, scope="module")
def no_worker_stays() -> Iterator[None]:
    """The processes of a comparison wait for the next one; to tests that count processes they would be left behind."""
    yield
    if loky := sys.modules.get("joblib.externals.loky"):
        loky.get_reusable_executor().shutdown(wait=True)


@pytest.fixture
def unknown_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check then knows of no earlier attempt, and stores none."""
    monkeypatch.setenv("COURSE_VALIDATING", "1")
    monkeypatch.setattr(exercises, "_hints_given", {})
