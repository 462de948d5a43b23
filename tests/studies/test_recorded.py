"""Each recorded study was found by the code as it stands, and its first epochs can be repeated where the data are."""

import pytest

from course_lib.lab.data import DataUnavailable
from course_lib.lab.experiments import one_thread
from course_lib.lab.fingerprints import fingerprint
from course_lib.lab.studies import (
    Book,
    Job,
    Tuned,
    arm_fingerprint,
    declared,
    final_jobs,
    read,
    repeat_first_epoch,
    study_file,
    tuning_jobs,
)
from course_lib.studies import chapter_01, chapter_03, chapter_17

CHAPTERS = tuple(sorted(path.stem.removeprefix("chapter_") for path in study_file("02").parent.glob("*.jsonl")))


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_run_is_recorded_and_by_this_code(chapter):
    study, file = declared(chapter), study_file(chapter)
    rows = Book(file, read_only=True).rows
    recorded = {(Job(r["part"], r["arm"], r["candidate"], r["seed"], r["tuning"]), r["fingerprint"]) for r in rows}
    for job in (*tuning_jobs(study), *final_jobs(study, rows)):
        assert (job, arm_fingerprint(study, job)) in recorded, job


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_numbers_are_numbers(chapter):
    study = declared(chapter)
    for name, part in study.parts.items():
        rows = [row for row in Book(study_file(chapter), read_only=True).rows if row["part"] == name]
        several = next((list(row["value"]) for row in rows if isinstance(row["value"], dict)), [None])
        found = read(study, study_file(chapter), name, next(iter(several)))
        assert set(found.values) <= set(part.arms)
        assert len(part.seeds) >= 5 or (chapter, name) == ("16", "hour"), "an hour was spent once, and says so"


@pytest.fixture
def data_at_hand(monkeypatch):
    """The study's data from the data folder; on a machine without them the test is skipped."""

    def load(part):
        try:
            return part.data()
        except DataUnavailable as error:
            pytest.skip(f"the data are not here: {str(error).splitlines()[0]}")

    return load


@pytest.mark.parametrize(
    ("chapter", "part", "arm"),
    [
        ("01", "cifar10", "… and mixup"),
        ("02", "mnist", "momentum"),
        ("02", "cifar10", "momentum"),
        ("03", "epochs_2", "stable, then decay"),
        ("04", "equal_epochs", "256"),
    ],
)
def test_a_first_epoch_is_repeated(chapter, part, arm, data_at_hand, monkeypatch):
    monkeypatch.setenv("COURSE_DEVICE", "cpu")
    monkeypatch.setattr("course_lib.lab.data.loading.read_real", offline)
    study, book = declared(chapter), Book(study_file(chapter), read_only=True)
    data = data_at_hand(study.parts[part])
    assert fingerprint(data) == book.sessions[-1]["data"][part]
    (row, *_) = (r for r in book.rows if r["part"] == part and not r["tuning"] and r["arm"] == arm)
    again = repeat_first_epoch(study, Job(part, arm, row["candidate"], row["seed"], False))
    assert again["mean_loss"] == pytest.approx(row["first_epoch"]["mean_loss"], rel=0.01)


@pytest.mark.parametrize("arm", ["none", "affine"])
def test_a_run_on_drawn_digits_is_repeated_anywhere(arm, monkeypatch):
    """Their data are drawn, so a run is repeated whole; in float32 another processor may differ by a few images."""
    monkeypatch.setenv("COURSE_DEVICE", "cpu")
    book = Book(study_file("01"), read_only=True)
    assert fingerprint(chapter_01.glyphs()) == book.sessions[-1]["data"]["mlp"]
    (row, *_) = (r for r in book.rows if r["part"] == "mlp" and r["arm"] == arm)
    few = chapter_01.with_labels(chapter_01.glyphs(), 100)
    with one_thread():
        again = chapter_01.accuracy(few, row["seed"], chapter_01.MLP, chapter_01.ONE_AT_A_TIME[arm])
    assert again == pytest.approx(row["value"]["100"], abs=0.01)


@pytest.mark.parametrize("name", ["constant", "line to zero"])
def test_a_schedule_on_drawn_digits_is_repeated_anywhere(name, monkeypatch):
    monkeypatch.setenv("COURSE_DEVICE", "cpu")
    book = Book(study_file("03"), read_only=True)
    data = chapter_03.glyphs()
    assert fingerprint(data) == book.sessions[-1]["data"]["sensitivity"]
    (row, *_) = (r for r in book.rows if r["part"] == "sensitivity" and r["arm"] == name)
    with one_thread():
        _, again = chapter_03.scores(data, row["seed"], chapter_03.digits_recipe(0.02, chapter_03.SHAPES[name]))
    assert again == pytest.approx(row["value"]["0.02"], abs=0.002)


@pytest.mark.parametrize(
    ("chapter", "part", "arm"),
    [("05", "digits", "label smoothing 0.7"), ("06", "search", "setting 5"), ("09", "map", "T 4, mix 0.9")],
)
def test_a_whole_run_on_drawn_digits_is_repeated_anywhere(chapter, part, arm, monkeypatch):
    monkeypatch.setenv("COURSE_DEVICE", "cpu")
    book, declared_part = Book(study_file(chapter), read_only=True), declared(chapter).parts[part]
    data = declared_part.data()
    assert fingerprint(data) == book.sessions[-1]["data"][part]
    (row, *_) = (r for r in book.rows if r["part"] == part and r["arm"] == arm)
    with one_thread():
        again = declared_part.arms[arm](data, row["seed"])
    assert again == {name: pytest.approx(value, rel=0.005, abs=0.005) for name, value in row["value"].items()}


@pytest.mark.parametrize(
    ("chapter", "part", "arm", "names", "within"),
    [
        ("07", "messages", "sign, feedback", ("test accuracy", "kB sent a worker"), 0.02),
        ("12", "width", "16", ("alone", "plain_middle", "weights_middle", "activations_middle"), 0.03),
        ("13", "domains", "target's labels", ("target", "target, own statistics"), 0.01),
    ],
)
def test_a_whole_run_on_mnist_is_repeated_where_it_lies(chapter, part, arm, names, within, data_at_hand, monkeypatch):
    """In float32 another processor may differ by a little."""
    monkeypatch.setenv("COURSE_DEVICE", "cpu")
    monkeypatch.setattr("course_lib.lab.data.loading.read_real", offline)
    book, declared_part = Book(study_file(chapter), read_only=True), declared(chapter).parts[part]
    data = data_at_hand(declared_part)
    assert fingerprint(data) == next(own["data"][part] for own in reversed(book.sessions) if part in own["data"])
    (row, *_) = (r for r in book.rows if r["part"] == part and r["arm"] == arm and not r["tuning"])
    what = declared_part.arms[arm]
    run = what.candidates[row["candidate"]] if isinstance(what, Tuned) else what
    with one_thread():
        again = run(data, row["seed"])
    for name in names:
        assert again[name] == pytest.approx(row["value"][name], abs=within), name


def test_a_run_of_the_scaling_laws_is_repeated_anywhere(monkeypatch):
    """The first seed's smallest runs need the first block of examples alone."""
    monkeypatch.setenv("COURSE_DEVICE", "cpu")
    book, width = Book(study_file("17"), read_only=True), 32
    name = chapter_17.arm(width, chapter_17.BLOCK)
    (row,) = (r for r in book.rows if r["arm"] == name and r["seed"] == 0 and not r["tuning"])
    with one_thread():
        data = chapter_17.glyphs(blocks=1)
        lr = float(row["candidate"])
        again = chapter_17.trained(data, 0, width=width, examples=chapter_17.BLOCK, lr=lr)
    assert again == {name: pytest.approx(value, rel=0.02, abs=0.01) for name, value in row["value"].items()}


def offline(name, folder):
    from course_lib.lab.data import downloads

    if not downloads._complete(name, folder):
        raise DataUnavailable(f"{name} is not in the data folder, and a test downloads nothing")
    return downloads.read_real(name, folder)


def test_a_race_on_mnist_is_repeated(data_at_hand, monkeypatch):
    """Bfloat16 and the number of threads round otherwise on other machines: the accuracy may differ by a few images."""
    monkeypatch.setenv("COURSE_DEVICE", "cpu")
    monkeypatch.setattr("course_lib.lab.data.loading.read_real", offline)
    study, book = declared("16"), Book(study_file("16"), read_only=True)
    data = data_at_hand(study.parts["mnist"])
    assert fingerprint(data) == book.sessions[-1]["data"]["mnist"]
    (row,) = (r for r in book.rows if r["part"] == "mnist" and r["arm"] == "one epoch" and r["seed"] == 0)
    again = study.parts["mnist"].arms["one epoch"](data, 0)
    assert again["accuracy"] == pytest.approx(row["value"]["accuracy"], abs=0.003)
