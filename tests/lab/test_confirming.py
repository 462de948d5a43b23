"""Rows of older code are believed on where a run, repeated, finds the same to the last bit, and only there."""

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from course_lib.lab import confirming, runtime, studies
from course_lib.lab.confirming import confirm, main, outdated
from course_lib.lab.studies import Book, StudyOutdated, read, run_study

BEFORE = """
from course_lib.lab.data import load
from course_lib.lab.studies import Part, Study


def data():
    return load("glyphs", classes="digits", size=16, train_size=20, val_size=10, test_size=10)


def kept(data, seed):
    return seed / 3 + len(data.train)


def altered(data, seed):
    return {"third": seed / 3, "curve": [1.0, seed / 7]}


def untouched(data, seed):
    return seed / 7


ARMS = {"kept": kept, "altered": altered, "untouched": untouched}
STUDY = Study("97", "Does it hold?", {"only": Part("Drawn digits", data, ARMS, (1, 2, 3, 4, 5))})
"""
SAME = BEFORE.replace("seed / 3 + len(data.train)", "len(data.train) + seed / 3")
AFTER = SAME.replace('"third": seed / 3', '"third": seed / 3 * (1 + 2**-52)')
FURTHER = BEFORE.replace("seed / 3 + len(data.train)", "(seed + 1) / 3 + len(data.train)")


class Checkout:
    """A checkout with a study of its own, of which this process knows what its file says at the time."""

    def __init__(self, root, monkeypatch):
        self.root, self.file = root, root / "data" / "studies" / "chapter_97.jsonl"
        here = runtime.checkout()
        shutil.copytree(here / "course_lib" / "lab", root / "course_lib" / "lab")
        for name in ("course_lib/__init__.py", "course_lib/_torchvision_mend.py", "course_lib/studies/__init__.py"):
            (root / name).parent.mkdir(exist_ok=True)
            shutil.copy(here / name, root / name)
        monkeypatch.setattr(runtime, "checkout", lambda: root)
        monkeypatch.setattr(confirming, "declared", lambda chapter: self.study)
        monkeypatch.setenv("COURSE_DATA", str(root / "data"))
        monkeypatch.setenv("COURSE_DEVICE", "cpu")

    def write(self, text):
        """Declare the study anew."""
        path = self.root / "course_lib" / "studies" / "chapter_97.py"
        path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("course_lib.studies.chapter_97", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # classes and functions are digested by their module's names
        spec.loader.exec_module(module)
        self.study = module.STUDY

    def commit(self):
        who = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.com")
        for words in (("init", "-q"), ("add", "course_lib"), (*who, "commit", "-q", "-m", "as it was")):
            subprocess.run(["git", *words], cwd=self.root, check=True)

    def run(self):
        run_study(self.study, self.file, workers=1, progress=False)

    def rounded(self, arm):
        """Its rows as another processor finds them: the last bit is another."""
        rows = [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            if row.get("arm") == arm:
                row["value"] *= 1 + 2**-52
        self.file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    made = Checkout(tmp_path / "a checkout", monkeypatch)
    made.write(BEFORE)
    yield made
    sys.modules.pop("course_lib.studies.chapter_97", None)


def words(verdicts):
    return {verdict.arm.row["arm"]: verdict.by for verdict in verdicts}


def test_what_finds_the_same_is_believed_and_what_does_not_is_not(checkout, capsys):
    checkout.run()
    rows = checkout.file.read_bytes()
    checkout.write(AFTER)
    with pytest.raises(StudyOutdated):
        read(checkout.study, checkout.file, "only", "third")
    assert {each.row["arm"] for each in outdated(checkout.study, Book(checkout.file))} == {"kept", "altered"}

    found = words(confirm(checkout.study, checkout.file, workers=1, progress=False))
    assert found == {"kept": "the recorded run", "altered": None}

    assert checkout.file.read_bytes().startswith(rows), "the rows themselves stay as they were recorded"
    book = Book(checkout.file, read_only=True)
    assert [entry["run"][1] for entry in book.confirmations] == ["kept"]
    assert [each.row["arm"] for each in outdated(checkout.study, book)] == ["altered"]
    without = replace(checkout.study.parts["only"], arms={"kept": checkout.study.parts["only"].arms["kept"]})
    found = read(replace(checkout.study, parts={"only": without}), checkout.file)
    assert found.values["kept"].tolist() == [seed / 3 + 20 for seed in (1, 2, 3, 4, 5)]
    with pytest.raises(StudyOutdated):
        read(checkout.study, checkout.file, "only", "third")

    assert main(["97"]) == 1
    said = capsys.readouterr().out
    assert "0 of 1 outdated arms find the same" in said
    assert "finds something else: only, altered: run it again" in said
    assert run_study(checkout.study, checkout.file, workers=1, progress=False) == 5, "those of the altered arm alone"


def test_on_another_processor_the_older_code_runs_beside(checkout):
    checkout.run()
    checkout.commit()
    checkout.rounded("kept")
    checkout.write(AFTER)
    verdicts = words(confirm(checkout.study, checkout.file, "HEAD", workers=1, progress=False))
    assert verdicts["altered"] is None
    assert verdicts["kept"].startswith("the code of ")
    assert [each.row["arm"] for each in outdated(checkout.study, Book(checkout.file))] == ["altered"]
    listed = subprocess.run(["git", "worktree", "list"], cwd=checkout.root, capture_output=True, text=True, check=True)
    assert len(listed.stdout.splitlines()) == 1, "the older code is put away again"


def test_the_older_code_must_be_that_of_the_rows(checkout, capsys):
    checkout.run()
    checkout.write(FURTHER)
    checkout.commit()
    checkout.write(AFTER)
    checkout.rounded("kept")
    with pytest.raises(ValueError, match="since='HEAD'.*a commit with the code of the rows of only, kept"):
        confirm(checkout.study, checkout.file, "HEAD", workers=1, progress=False)
    assert not Book(checkout.file, read_only=True).confirmations
    assert main(["97", "--since", "nowhere"]) == 2
    assert "since='nowhere'" in capsys.readouterr().err


def test_other_data_and_timed_studies_are_refused(checkout):
    checkout.run()
    with pytest.raises(ValueError, match="study='97'.*one that does not time its runs"):
        confirm(replace(checkout.study, alone=True), checkout.file)
    checkout.write(AFTER.replace("train_size=20", "train_size=30"))
    with pytest.raises(ValueError, match="data='only'.*the data that were recorded"):
        confirm(checkout.study, checkout.file)
    checkout.write(BEFORE)
    assert confirm(checkout.study, checkout.file) == [], "nothing is outdated, and nothing is run"


def test_code_that_changes_back_is_followed(tmp_path):
    file = tmp_path / "rows.jsonl"
    row = {"part": "p", "arm": "a", "candidate": None, "seed": 0, "tuning": False, "value": 1.0, "fingerprint": "A"}
    entries = [{"session": 1}, row, row | {"arm": "b", "fingerprint": "X"}]
    entries += [{"confirmed": "A", "as": "B"}, {"confirmed": "B", "as": "A"}, {"confirmed": "A", "as": "C"}]
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    assert [held["fingerprint"] for held in Book(file, read_only=True).rows] == ["C", "X"]
    assert studies.job_of(row).key == ("p", "a", None, 0, False)
