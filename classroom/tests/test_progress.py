"""The page of live progress: reading what others wrote, counting, invented names, the server, and how it looks."""

import dataclasses
import json
import os
import random
import re
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from classroom.progress import files, pseudonyms, server
from classroom.progress.board import Board, Cell, board, readable
from classroom.progress.files import Record, read
from classroom.progress.lesson import asked, lesson
from course_lib.lab import check, progress_file
from course_lib.lab.chapters import CHAPTERS
from course_lib.lab.predictions import Curve, Number, OneOf, Order, Prediction

ROOT = Path(__file__).resolve().parents[2]
NOW = 1_800_000_000.0
MALLORY = "<img src=x onerror=alert(1)>"


def progress(**exercises: tuple[int, bool]) -> str:
    """A progress file's text: ``e02_1=(3, False)`` says three attempts at 02.1, not passed."""
    entries = {
        name[1:].replace("_", "."): {"attempts": attempts, "passed": "2026-05-04" if passed else None}
        for name, (attempts, passed) in exercises.items()
    }
    return json.dumps({"exercises": entries, "predictions": {}, "races": {}})


def home(folder: Path, learner: str) -> Path:
    made = folder / "homes" / learner / ".craft-of-training"
    made.mkdir(parents=True)
    return made


def counted(*records: Record, chapter: str = "02", **options: Any) -> Board:
    return board(lesson(chapter), records, NOW, **options)


# What a chapter asks


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.nn)
def test_a_chapter_says_what_it_asks(chapter: Any) -> None:
    found = lesson(chapter.nn)
    assert len(found.exercises) >= 6
    assert all(number.startswith(f"{chapter.nn}.") and title for number, title in found.exercises.items())
    keys = [question.key for question in found.predictions]
    assert keys == [f"{chapter.nn}.{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"[: len(keys)]]
    assert keys


def test_what_a_call_only_names_is_read_from_its_output() -> None:
    assert lesson("02").predictions[0].form == OneOf(("SGD", "momentum", "Adagrad", "Adam", "Muon"))
    assert lesson("00").predictions[2].form == Order(("plain", "smoothed", "moved", "both"), 0)


def test_each_stored_question_is_that_of_the_chapter() -> None:
    for number in ("00", "01", "03", "11"):
        text = next((ROOT / "notebooks").glob(f"{number}_*.ipynb")).read_text(encoding="utf-8")
        for question in lesson(number).predictions:
            assert json.dumps(repr(question), ensure_ascii=False)[1:-1] in text


def test_a_question_that_stands_nowhere_is_an_error() -> None:
    cell = new_code_cell('predict("02.z", "Which?", choices=some)')
    with pytest.raises(ValueError, match="02.z: what it asks stands neither in its call nor in its stored output"):
        list(asked(new_notebook(cells=[cell])))
    cell.outputs = [new_output("execute_result", {"text/plain": "Predict 02.z: Which? (one / two)"})]
    assert [question.form for question in asked(new_notebook(cells=[cell]))] == [OneOf(("one", "two"))]


def test_a_chapter_that_does_not_exist() -> None:
    with pytest.raises(ValueError, match="chapter='99': there are 00 to 17"):
        lesson("99")


# Reading


def test_what_check_and_predict_keep_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of two learners who share a folder, made by the course itself."""
    monkeypatch.setenv("COURSE_HOME", str(tmp_path))
    monkeypatch.delenv("COURSE_VALIDATING", raising=False)
    monkeypatch.setenv("COURSE_LEARNER", "ada")
    check("02.1", lambda w, g, v, lr, beta: (w - lr * (beta * v + g), beta * v + g))
    lesson("02").predictions[0].guess("Muon", 0.75)
    monkeypatch.setenv("COURSE_LEARNER", "bob lee")
    for _ in range(3):
        check("02.1", lambda w, g, v, lr, beta: (w - lr * g, v))
    monkeypatch.setenv("COURSE_LEARNER", "cy")
    progress_file.change("races", "16.6", lambda entry: entry.update(ratio=2.0, score=0.9))
    ada, bob, cy = read(tmp_path)
    assert (ada.learner, ada.exercises, ada.guesses) == ("ada", {"02.1": (1, True)}, {"02.a": "Muon"})
    assert (bob.learner, bob.exercises, bob.guesses) == ("bob_lee", {"02.1": (3, False)}, {})
    assert (cy.learner, cy.exercises, cy.trouble) == ("cy", {}, "")
    assert ada.changed == pytest.approx((tmp_path / "progress-ada.json").stat().st_mtime)


def test_files_set_aside_locks_and_halves_are_no_learners(tmp_path: Path) -> None:
    for name in ("progress-ada.damaged-1.json", "progress-ada.json.lock", "progress-ada.json.partial", "notes.json"):
        (tmp_path / name).write_text(progress())
    (tmp_path / "progress-ada.json").write_text(progress())
    assert [record.learner for record in read(tmp_path)] == ["ada"]


def test_in_a_hub_the_home_names_the_learner(tmp_path: Path) -> None:
    (home(tmp_path, "ada") / "progress-ada.json").write_text(progress(e02_1=(1, True)))
    (tmp_path / "homes/ada/.craft-of-training/progress-bob.json").write_text(progress(e02_2=(9, False)))
    (home(tmp_path, "bob") / "progress-jovyan.json").write_text(progress(e02_3=(2, False)))
    home(tmp_path, "cy")
    (tmp_path / "homes/dora").mkdir()
    (tmp_path / "homes/README").write_text("no home")
    (tmp_path / "homes/.hidden").mkdir()
    found = {record.learner: record.exercises for record in read(tmp_path)}
    assert found == {"ada": {"02.1": (1, True)}, "bob": {"02.3": (2, False)}, "cy": {}, "dora": {}}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "its content is damaged"),
        (b'{"exercises": {"02.1": ', "its content is damaged"),
        (b"[]", "its content is damaged"),
        (b'{"exercises": {"02.1": {"attempts": "3", "passed": null}}}', "its content is damaged"),
        (b'{"exercises": {"02.1": {"attempts": 1e999, "passed": null}}}', "its content is damaged"),
        (b'{"exercises": {"02.1": {"attempts": ' + b"9" * 5000 + b', "passed": null}}}', "its content is damaged"),
        (b'{"exercises": {}, "predictions": ' + b"[" * 100_000, "its content is damaged"),
        (b"\xff\xfe\x00", "its content is damaged"),
        (b'{"exercises": {}}' + b" " * files.LARGEST, "it has more than 256 kB"),
    ],
)
def test_a_file_that_cannot_be_read_is_shown_as_such(content: bytes, why: str, tmp_path: Path) -> None:
    (tmp_path / "progress-eve.json").write_bytes(content)
    (tmp_path / "progress-fay.json").write_text(progress(e02_1=(1, True)))
    eve, fay = read(tmp_path)
    assert (eve.learner, eve.trouble, eve.exercises, eve.guesses) == ("eve", why, {}, {})
    assert fay.exercises == {"02.1": (1, True)}
    assert (tmp_path / "progress-eve.json").read_bytes() == content


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "elsewhere" / ".craft-of-training"
    path.mkdir(parents=True)
    (path / "progress-eve.json").write_text(progress(e02_1=(1, True)))
    return path


def test_links_out_are_not_followed(tmp_path: Path, secret: Path) -> None:
    room = tmp_path / "room"
    (home(room, "eve") / "progress-eve.json").symlink_to(secret / "progress-eve.json")  # the file
    (room / "homes/fay").mkdir()
    (room / "homes/fay/.craft-of-training").symlink_to(secret)  # its folder
    (room / "homes/gus").symlink_to(secret.parent)  # the home
    eve, fay, gus = read(room)
    assert [record.exercises for record in (eve, fay, gus)] == [{}, {}, {}]
    assert eve.trouble == fay.trouble == "it is a link, or lies behind one"
    assert gus.trouble == "the home is a link"


def test_links_in_a_shared_folder_are_not_followed(tmp_path: Path, secret: Path) -> None:
    room = tmp_path / "room"
    room.mkdir()
    (room / "progress-eve.json").symlink_to(secret / "progress-eve.json")
    (eve,) = read(room)
    assert (eve.exercises, eve.trouble) == ({}, "it is a link, or lies behind one")


def test_a_pipe_and_a_folder_are_no_files_and_nothing_waits_for_them(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "progress-eve.json")
    (tmp_path / "progress-fay.json").mkdir()
    eve, fay = read(tmp_path)
    assert eve.trouble == fay.trouble == "it is no ordinary file"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nowhere")


def test_so_many_learners_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST", 2)
    for name in ("cy", "Bob", "ada"):
        (tmp_path / f"progress-{name}.json").write_text(progress())
    assert [record.learner for record in read(tmp_path)] == ["ada", "Bob"]


# Counting


def test_exercises_are_counted() -> None:
    made = counted(
        Record("cy", NOW - 700, exercises={"02.1": (2, True), "02.4": (4, False)}),
        Record("Ada", NOW - 59, exercises={"02.1": (1, True), "02.4": (3, True), "02.5": (2, False)}),
        Record("bob", None),
        Record("dora", NOW + 500, "damaged"),
    )
    assert [(row.name, row.ago) for row in made.rows] == [
        ("Ada", "now"),
        ("bob", ""),
        ("cy", "11 min"),
        ("dora", "now"),
    ]
    first, fourth, fifth = (made.columns[k] for k in (0, 3, 4))
    assert (first.passed, first.trying, first.tries, first.share) == (2, 0, 0, 0.5)
    assert (fourth.passed, fourth.trying, fourth.tries, fourth.share) == (1, 1, 4, 0.25)
    assert (fifth.passed, fifth.trying, fifth.tries, fifth.share) == (0, 1, 2, 0)
    assert made.hardest == fourth
    assert made.share == pytest.approx(3 / (4 * 8))
    assert made.at_work == 2
    assert [row.name for row in made.rows if row.may_need_help] == ["cy"]
    assert made.may_need_help == 1


def test_of_equal_tries_the_exercise_that_fewer_passed_holds_up() -> None:
    made = counted(
        Record("ada", exercises={"02.1": (2, False), "02.2": (2, False)}),
        Record("bob", exercises={"02.1": (1, True)}),
    )
    assert made.hardest is not None
    assert made.hardest.exercise == "02.2"


@pytest.mark.parametrize(
    ("cell", "state", "stuck"),
    [
        (Cell("02.1"), "not begun", False),
        (Cell("02.1", 2), "tried", False),
        (Cell("02.1", 3), "tried", True),
        (Cell("02.1", 7, True), "passed", False),
    ],
)
def test_the_state_of_an_exercise(cell: Cell, state: str, stuck: bool) -> None:
    assert (cell.state, cell.stuck) == (state, stuck)


@pytest.mark.parametrize(
    ("minutes", "said"), [(0, "now"), (1, "1 min"), (59, "59 min"), (60, "1 h"), (1439, "23 h"), (2880, "2 d")]
)
def test_how_long_ago(minutes: int, said: str) -> None:
    assert counted(Record("ada", NOW - 60 * minutes)).rows[0].ago == said


def test_an_empty_room() -> None:
    made = counted()
    assert (made.rows, made.share, made.hardest, made.at_work) == ((), 0, None, 0)
    assert all(column.share == 0 for column in made.columns)


def test_forged_figures_stay_small(tmp_path: Path) -> None:
    forged = {"attempts": 10**4000, "passed": None}, {"attempts": -5, "passed": ""}, {"attempts": True, "passed": "x"}
    entries = {f"02.{k}": entry for k, entry in enumerate(forged, 1)} | {"02.77": forged[0], "<b>": forged[0]}
    (tmp_path / "progress-eve.json").write_text(json.dumps({"exercises": entries}))
    cells = counted(*read(tmp_path)).rows[0].cells
    assert [(cell.attempts, cell.passed) for cell in cells[:3]] == [(999, False), (0, False), (1, True)]
    assert len(cells) == 8


def test_names_of_others_print_on_one_line() -> None:
    assert readable("Zoë-Ann_3.b") == "Zoë-Ann_3.b"
    assert readable("a\nb\u202ec\x07\udcff") == "a�b�c��"
    assert readable("x" * 100) == "x" * 31 + "…"


def guessed(form: Any, *guesses: Any) -> Any:
    question = Prediction("02.a", "Which?", form)
    records = [Record(f"learner {k}", guesses={"02.a": guess}) for k, guess in enumerate(guesses)]
    only = dataclasses.replace(lesson("02"), predictions=(question,))
    return board(only, [*records, Record("without")], NOW).guesses[0]


def test_guesses_at_one_of_a_few() -> None:
    found = guessed(OneOf(("SGD", "Adam")), "Adam", "SGD", "Adam", "<script>", None, ["Adam"], {"Adam": 1})
    assert (found.count, found.bars, found.words) == (3, (("SGD", 1), ("Adam", 2)), "SGD: 1; Adam: 2")


def test_guesses_at_an_order() -> None:
    found = guessed(Order(("a", "b", "c"), 0), ["a", "b", "c"], ["a", "c", "b"], ["a", "a", "b"], "abc", 7)
    assert (found.count, found.places) == (2, (("a", (2, 0, 0)), ("b", (0, 1, 1)), ("c", (0, 1, 1))))


def test_guesses_at_a_number_are_dots_above_each_other() -> None:
    found = guessed(Number(0, 20, 1, "points"), 5, 5.0, 10, 1e300, -3, "x", float("nan"), True, None, [5], 10**400)
    assert [(dot.x, dot.y) for dot in found.dots] == [(0, 0), (0.25, 0), (0.25, 0.5), (0.5, 0), (1, 0)]
    assert (found.count, found.tallest, found.ends) == (5, 2, ("0 points", "20 points"))
    assert "the middle one 5 points" in found.words


def test_guesses_at_a_curve() -> None:
    found = guessed(Curve((0, 50, 90), 0, 2, 0.1, ""), [0, 1, 2], [2, 2, 9], [1, 2], "abc", [1, 2, "x"])
    assert [[(dot.x, dot.y) for dot in line] for line in found.lines] == [
        [(0, 0), (0.5, 0.5), (1, 1)],
        [(0, 1), (0.5, 1), (1, 1)],
    ]
    assert (found.count, found.at, found.ends) == (2, ("0", "50", "90"), ("0", "2"))


# Invented names


def test_invented_names_stay_and_differ(tmp_path: Path) -> None:
    file = tmp_path / "kept" / "names.csv"
    first = pseudonyms.names([f"learner {k}" for k in range(200)], file)
    assert len(set(first.values())) == 200
    assert len({name.split()[1] for name in list(first.values())[:40]}) == 40  # animals do for a class
    again = pseudonyms.names(["new", "learner 7"], file)
    assert {name: again[name] for name in first} == first
    assert again["new"] not in first.values()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_invented_names_do_not_follow_from_the_learners(tmp_path: Path) -> None:
    learners = [f"learner {k}" for k in range(30)]
    one, other = (pseudonyms.names(learners, tmp_path / name / "names.csv") for name in ("one", "other"))
    assert one != other


def test_more_learners_than_names(tmp_path: Path) -> None:
    many = pseudonyms.names([f"learner {k}" for k in range(1200)], tmp_path / "names.csv")
    assert len(set(many.values())) == 1200


def test_any_learner_has_an_invented_name(tmp_path: Path) -> None:
    odd = ['comma, "quote"', "line\nbreak", "\udcff", MALLORY]
    first = pseudonyms.names(odd, tmp_path / "names.csv")
    assert pseudonyms.names(odd, tmp_path / "names.csv") == first


def test_a_damaged_file_of_names_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "names.csv").write_text("learner,shown as\nada\n")
    with pytest.raises(ValueError, match="names.csv: is damaged"):
        pseudonyms.names(["ada"], tmp_path / "names.csv")
    assert (tmp_path / "names.csv").read_text() == "learner,shown as\nada\n"


def test_the_names_lie_apart_from_the_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "instructor"))
    room = tmp_path / "room"
    assert pseudonyms.file_of(room).is_relative_to(tmp_path / "instructor")
    assert pseudonyms.file_of(room) == pseudonyms.file_of(tmp_path / "." / "room")
    assert pseudonyms.file_of(room) != pseudonyms.file_of(tmp_path / "other" / "room")


def test_rows_are_in_the_order_of_the_names_shown() -> None:
    invented = {"ada": "white owl", "bob": "amber fox", "cy": "teal lynx"}
    made = counted(*map(Record, invented), shown=invented.__getitem__)
    assert [row.name for row in made.rows] == ["amber fox", "teal lynx", "white owl"]


# The page


class Tags(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """Learners of a shared folder, good ones and others."""
    folder = tmp_path / "room"
    folder.mkdir()
    sure = {"02.a": {"guess": "Muon", "sure": 0.9, "hit": True}, "02.b": {"guess": "<script>", "sure": 0.9, "hit": 1}}
    ada = json.loads(progress(e02_1=(1, True), e02_4=(5, False))) | {"predictions": sure}
    (folder / "progress-ada.json").write_text(json.dumps(ada))
    (folder / f"progress-{MALLORY}.json").write_text(progress(e02_1=(2, False)))
    (folder / "progress-eve.json").write_text('{"exercises": ')
    return folder


def test_a_name_is_text_wherever_it_stands(room: Path) -> None:
    html = server.page(room, "02", None, NOW)
    assert MALLORY not in html
    found = Tags(html)
    assert "img" not in found.tags
    assert found.tags.count("script") == 1
    assert readable(MALLORY) in found.text
    assert "<script>" not in found.text


def test_the_page_says_what_is_counted_and_no_answer(room: Path) -> None:
    text = " ".join(Tags(server.page(room, "02", None, NOW)).text.split())
    assert "Holds most people up: 02.4" in text
    assert "5 tries without passing, by 1 of 3" in text
    assert "not read: its content is damaged" in text
    assert "02.a 1 of 3 guessed" in text


def test_the_page_does_not_know_which_guess_was_right(room: Path) -> None:
    pages = []
    for hit in (True, False, None):
        kept = json.loads((room / "progress-ada.json").read_text())
        kept["predictions"]["02.a"]["hit"] = hit
        (room / "progress-ada.json").write_text(json.dumps(kept))
        os.utime(room / "progress-ada.json", (NOW, NOW))
        pages.append(server.page(room, "02", None, NOW))
    assert pages[0] == pages[1] == pages[2]


def test_with_invented_names_no_learner_is_on_the_page(room: Path, tmp_path: Path) -> None:
    (room / "progress-unmistakable.json").write_text(progress())
    html = server.page(room, "02", lambda names: pseudonyms.names(names, tmp_path / "names.csv"), NOW)
    assert "unmistakable" not in html
    assert "Names are invented" in html
    for name in pseudonyms.names([], tmp_path / "names.csv").values():
        assert name in html


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.nn)
def test_every_chapter_has_its_page(chapter: Any, room: Path) -> None:
    text = Tags(server.page(room, chapter.nn, None, NOW)).text
    for asked_for in (*lesson(chapter.nn).exercises, *(question.key for question in lesson(chapter.nn).predictions)):
        assert asked_for in text


def test_what_cannot_be_shown_is_said_before_anything_is_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert server.main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert server.main([str(tmp_path), "--chapter", "99"]) == 2
    assert "chapter='99'" in capsys.readouterr().err


# The server

TOKEN = "a-token-for-the-test"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    for k, name in enumerate(("ada", "bob", "cy", MALLORY, *(f"learner-{k:02d}" for k in range(26)))):
        (folder / f"progress-{name}.json").write_text(
            progress(e02_1=(1, k % 3 > 0), e02_2=(k % 6, k % 2 > 0), e02_4=(3, False))
        )
    return folder


def free_port() -> int:
    """A free one, and none of those that the system gives to connections while the server starts."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no port is free")


@contextmanager
def served(folder: Path, home: Path, *options: str) -> Iterator[str]:
    """The page, served by its own command; the address before the token."""
    port = free_port()
    others = re.compile(r"JUPYTER|COURSE_")
    environment = {name: value for name, value in os.environ.items() if not others.match(name)}
    jupyter = {f"JUPYTER_{kind}_DIR": str(home / "jupyter" / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    # What an instructor has set for a Jupyter of their own must not open the page
    (home / "jupyter" / "config").mkdir(parents=True)
    for name in ("jupyter_config", "jupyter_server_config"):
        own = {"ServerApp": {"allow_remote_access": True}, "IdentityProvider": {"token": ""}}
        (home / "jupyter" / "config" / f"{name}.json").write_text(json.dumps(own))
    command = [sys.executable, "-m", "classroom.progress", str(folder), "--chapter", "02", "--no-browser"]
    with (
        (home / "log").open("w") as log,
        subprocess.Popen(
            [*command, "--port", str(port), *options], cwd=ROOT, stdout=log, stderr=log,
            env={**environment, **jupyter, "HOME": str(home), "JUPYTER_TOKEN": TOKEN},
        ) as process,
    ):  # fmt: skip
        try:
            base = f"http://localhost:{port}"
            for _ in range(600):
                if process.poll() is not None:
                    pytest.fail(f"the server has ended: {(home / 'log').read_text()}")
                try:
                    urllib.request.urlopen(f"{base}/static/page.css", timeout=30).close()
                    break
                except urllib.error.URLError:
                    time.sleep(0.5)
            yield base
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="module")
def address(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(shared, tmp_path_factory.mktemp("instructor")) as base:
        yield base


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def get(url: str, **headers: str) -> tuple[int, Any, str]:
    """Status, headers and text of an answer; redirections are not followed."""
    request = urllib.request.Request(url, headers={name.replace("_", "-"): value for name, value in headers.items()})
    try:
        answer = urllib.request.build_opener(NoRedirect).open(request, timeout=60)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        return answer.status, answer.headers, answer.read().decode()


def test_without_the_token_there_is_no_page(address: str) -> None:
    for wrong in ({}, {"Authorization": "token wrong"}, {"Authorization": "token "}, {"Cookie": "username=me"}):
        status, headers, text = get(f"{address}/progress/02", **wrong)
        assert (status, headers["Location"]) == (302, "/login?next=%2Fprogress%2F02")
        assert "ada" not in text
    assert get(f"{address}/progress/02?token=wrong")[0] == 302


def test_with_the_token_there_is(address: str) -> None:
    status, headers, text = get(f"{address}/progress/02", Authorization=f"token {TOKEN}")
    assert status == 200
    assert "ada" in text
    assert MALLORY not in text
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert headers["Cache-Control"] == "no-store"


def test_the_token_leaves_the_address(address: str) -> None:
    status, headers, _ = get(f"{address}/progress/02?token={TOKEN}")
    assert (status, headers["Location"]) == (302, "/progress/02")
    cookie = headers["Set-Cookie"].partition(";")[0]
    assert get(f"{address}/progress/02", Cookie=cookie)[0] == 200


def test_another_host_is_refused(address: str) -> None:
    assert get(f"{address}/progress/02", Authorization=f"token {TOKEN}", Host="evil.example")[0] == 403


@pytest.mark.parametrize(
    "path", ["/api/kernels", "/api/contents", "/api/terminals", "/lab", "/tree", "/progress/99", "/progress/../x"]
)
def test_nothing_else_is_served(path: str, address: str) -> None:
    assert get(address + path, Authorization=f"token {TOKEN}")[0] == 404


@pytest.mark.skipif(sys.platform != "linux", reason="the other address of this machine is Linux's")
def test_no_other_machine_is_listened_to(address: str) -> None:
    port = int(address.rpartition(":")[2])
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", port), timeout=10)


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from tests.browser.chromium import launched

    with launched() as found:
        yield found


@contextmanager
def opened(browser: Any, address: str, **settings: Any) -> Iterator[tuple[Any, Any]]:
    from tests.browser.chromium import watched

    context = browser.new_context(**settings)
    page = context.new_page()
    seen = watched(page, f"{address}/")
    page.goto(f"{address}/progress/02?token={TOKEN}")
    try:
        yield page, seen
    finally:
        context.close()


SCREENS = {"projector": {"width": 1280, "height": 720}, "phone": {"width": 390, "height": 844}}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", SCREENS)
def test_the_page_can_be_read_by_everybody(browser: Any, address: str, screen: str, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install axe-playwright-python")
    with opened(browser, address, viewport=SCREENS[screen], color_scheme=scheme) as (page, seen):
        page.locator("section > details").evaluate_all("all => all.forEach(one => one.open = true)")
        found = axe.Axe().run(page).response["violations"]
        assert [(rule["id"], rule["nodes"][0]["html"]) for rule in found] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= SCREENS[screen]["width"]
        assert seen.complaints == []
        assert TOKEN not in page.url


def test_the_page_follows_the_files_and_stays_where_it_is(browser: Any, address: str, shared: Path) -> None:
    from playwright.sync_api import expect

    with opened(browser, address, viewport=SCREENS["projector"]) as (page, seen):
        row = page.get_by_role("row", name="bob")
        expect(row.locator("td").nth(1)).to_have_text("passed✓")
        page.locator("summary", has_text="02.c").click()
        page.locator("section[aria-labelledby=guesses]").scroll_into_view_if_needed()
        page.evaluate("window.kept = document.querySelector('.people tbody tr'); scrollTo(0, 700)")
        new = shared / "progress-aaron.json"
        try:
            new.write_text(progress(e02_1=(7, False)))
            expect(page.get_by_role("row", name="aaron").locator("td.stuck")).to_have_text("tried 7×", timeout=60_000)
            assert page.evaluate("scrollY") == 700
            assert page.evaluate("window.kept.isConnected")
            expect(page.locator("details[open] summary")).to_contain_text("02.c")
            expect(page.get_by_role("row", name="bob").locator("td").nth(1)).to_have_text("passed✓")
        finally:
            new.unlink()
        expect(page.get_by_role("row", name="aaron")).to_have_count(0, timeout=60_000)
        assert seen.complaints == []


def test_a_server_that_is_gone_is_said(browser: Any, address: str) -> None:
    from playwright.sync_api import expect

    with opened(browser, address) as (page, _):
        page.route("**/progress/02", lambda route: route.abort())
        expect(page.get_by_role("alert")).to_have_text(re.compile("what is shown is old"), timeout=60_000)
        expect(page.get_by_role("row", name="bob")).to_be_visible()
        page.unroute("**/progress/02")
        expect(page.get_by_role("alert")).to_have_text("", timeout=60_000)
