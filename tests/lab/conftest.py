"""What several tests of the laboratory need."""

from pathlib import Path

import pytest

from course_lib.lab import predictions


@pytest.fixture
def prediction_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the guesses of a learner are kept, who has made none so far; in a kernel that has asked nothing yet."""
    monkeypatch.setenv("COURSE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COURSE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("COURSE_LEARNER", "ada")
    monkeypatch.delenv("COURSE_VALIDATING", raising=False)
    for name, empty in {"_asked": {}, "_unkept": {}, "_seen": set()}.items():
        monkeypatch.setattr(predictions, name, empty)
    return tmp_path / "home" / "progress-ada.json"
