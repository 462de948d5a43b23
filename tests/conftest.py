"""Settings that all tests share."""

import os
import sys
from collections.abc import Iterator

import matplotlib
import pytest
import torch

from course_lib.lab import exercises

matplotlib.use("Agg")
os.environ["COURSE_PROGRESS"] = "off"
pytest.register_assert_rewrite("tests.checks.checking")

if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
    torch.set_num_threads(1)  # the workers share the cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


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
