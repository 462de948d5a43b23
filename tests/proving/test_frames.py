"""Frames are what the explorer draws, position by position; those that are stored are of the notebooks' explorers."""

import base64
import copy
import gzip
import json
import re
from itertools import product
from math import prod
from pathlib import Path
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from nbformat import v4

from course_lib.lab.widgets import Choice, choice, explorer, log_slider, slider
from course_lib.proving import frames
from course_lib.proving.compact_svg import drawn, pieces
from course_lib.proving.frames import Drawing, FramesFailed
from course_lib.proving.run_notebook import NotebookFailed

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = {
    path.name: path
    for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    if '"Explorer: ' in path.read_text(encoding="utf-8")
}


# The frames that are stored


@pytest.fixture(scope="module", params=NOTEBOOKS)
def chapter(request):
    path = NOTEBOOKS[request.param]
    kept = frames.frames_of(path)
    assert kept.exists(), frames.stale(path, kept)
    return path, kept, frames.read(kept)


def test_stored_frames_are_those_of_the_notebook(chapter) -> None:
    path, kept, _ = chapter
    assert frames.stale(path, kept) == ""


def test_stored_frames_are_whole(chapter) -> None:
    _, kept, explorers = chapter
    assert kept.stat().st_size <= frames.LARGEST
    for one in explorers:
        counts = [len(control["shown"]) for control in one["controls"]]
        assert len(one["grid"]) == prod(counts)
        assert set(one["grid"]) == set(range(len(one["frames"]))), "each frame is there, and is shown somewhere"
        assert {index for frame in one["frames"] for index in frame} == set(range(len(one["pieces"])))
        assert len(set(one["pieces"])) == len(one["pieces"])
        assert len(one["frames"]) <= frames.DRAWN
        for control in one["controls"]:
            assert len(set(control["shown"])) == len(control["shown"]), "positions are told apart"
            assert control["shown"][control["start"]]
            assert control["kind"] == "choice" or len(control["shown"]) >= 3


def test_stored_frames_are_pictures_with_words(chapter) -> None:
    _, _, explorers = chapter
    for one in explorers:
        for frame in one["frames"][:: max(1, len(one["frames"]) // 20)]:
            words, *parts = (one["pieces"][index] for index in frame)
            assert "<" not in words
            assert len(words) > 20
            body = "".join(parts).replace("{id}", "x-")
            tree = ElementTree.fromstring(f'<svg xmlns="http://www.w3.org/2000/svg">{body}</svg>')
            assert len(list(tree.iter())) > 20
            named = {element.get("id") for element in tree.iter() if element.get("id")}
            assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', body)) == named


def test_stored_frames_are_set_in_the_fonts_that_the_site_serves(chapter) -> None:
    assert frames.families(chapter[2]) <= {"DejaVu Sans", "DejaVu Sans oblique", "DejaVu Sans 700"}


# One explorer


@pytest.fixture
def calls():
    return []


@pytest.fixture
def waves(calls):
    """Momentum changes nothing but with one of the two methods."""

    def draw(method, frequency, momentum, scale):
        calls.append((method, frequency, momentum, scale))
        figure, (left, right) = plt.subplots(1, 2, figsize=(6, 2))
        x = np.linspace(0, 1, 20)
        shift = momentum if method == "heavy" else 0
        left.plot(x, scale * np.sin(frequency * x + shift))
        title = f"{method} {frequency}, $10^{{-2}}$ of {scale:g}"
        left.set(xlabel="time", ylabel="height", title=title, xticks=[], yticks=[])
        right.plot(x)
        right.set(xlabel="step", xticks=[], yticks=[])
        figure.suptitle("waves")
        return figure

    return explorer(
        draw,
        method=choice("method", ["light", "heavy"]),
        frequency=slider("frequency", 1, 9, 5, 1),
        momentum=slider("momentum", 0.0, 0.9, 0.5, 0.1),
        scale=log_slider("scale", 0.1, 10, 0.3),
    )


def finished(drawing: Drawing) -> Drawing:
    while not drawing.done:
        drawing.go_on()
    return drawing


def test_each_position_has_the_picture_that_the_explorer_draws_there(waves) -> None:
    made = finished(Drawing(waves, most=36)).result()
    values = [
        [option if control["kind"] == "choice" else float(option) for option in control["shown"]]
        for control in made["controls"]
    ]
    names = [control["name"] for control in made["controls"]]
    combinations = list(product(*values))
    assert len(combinations) == len(made["grid"])
    for place in [*range(0, len(combinations), 5), len(combinations) - 1]:
        at = dict(zip(names, combinations[place], strict=True))
        figure = waves(**{**at, "frequency": int(at["frequency"])})
        view, parts = pieces(drawn(figure))
        frame = [made["pieces"][index] for index in made["frames"][made["grid"][place]]]
        assert frame == [frames.description(figure), *parts], at
        assert made["view"] == view
    assert made["size"] == [540, 180], "points of the screen, as the widget shows it"
    assert made["said"] == repr(waves)


def test_what_changes_nothing_is_drawn_once(waves, calls) -> None:
    drawing = Drawing(waves, most=36)
    calls.clear()
    done, planned, over = 0, 0, False
    while not over:
        assert done <= frames.DRAWN
        done, planned, over = drawing.go_on(0.01)
    assert done == planned
    made = drawing.result()
    light, heavy = [{call[1:] for call in calls if call[0] == name} for name in ("light", "heavy")]
    f, m, s = (len(control["shown"]) for control in made["controls"][1:])
    assert f * s <= len(light) < f * s * m, "it is turned at the others' ends and start only"
    assert len(heavy) == f * s * m
    assert f * s + f * s * m <= 36 < len(made["grid"])
    assert len(calls) == len(light) + len(heavy) + 1, "none twice, but the start for its content"


def test_a_slider_that_matters_somewhere_else_is_varied() -> None:
    """Here the phase changes nothing while the scale stands at its low end or its start."""

    def draw(scale, phase):
        figure, axes = plt.subplots(figsize=(3, 2))
        axes.plot([0, max(0.0, scale - 1) * phase])
        axes.set(ylim=(0, 1), xticks=[], yticks=[])
        return figure

    show = explorer(draw, scale=slider("scale", 0.0, 2.0, 1.0, 0.5), phase=slider("phase", 0.0, 1.0, 0.5, 0.25))
    made = finished(Drawing(show)).result()
    grid = np.array(made["grid"]).reshape(5, 5)
    assert len(set(grid[-1])) == len(set(grid[-2])) == 5
    assert len(set(grid[:3].ravel())) == 1, "the same picture is kept once"


def test_what_was_only_drawn_to_find_out_is_left_out() -> None:
    """A slider that starts at its end is turned through its middle, which need not be a position."""
    made = frames.in_order(["unused", "a", "b", "c"], [(1, 2), (0, 1), (3, 2)], [2, 0, 2])
    assert made == {"pieces": ["c", "b", "a"], "frames": [[0, 1], [2, 1]], "grid": [0, 1, 0]}


def test_an_error_names_the_values(calls) -> None:
    def draw(n):
        calls.append(n)
        if n == 9:
            raise ZeroDivisionError("nine")
        return plt.figure()

    with pytest.raises(FramesFailed, match=r"at \{'n': 9\}: nine"):
        finished(Drawing(explorer(draw, n=slider("n", 1, 9, 5, 1))))


CONTROLS = {
    "one of each": [choice("c", ["a", "b"]), slider("n", 1, 9, 5, 1), log_slider("r", 0.1, 10, 0.3)],
    "many": [choice("c", "ab"), *(log_slider(f"s{i}", 1e-3, 10, 0.3) for i in range(5))],
    "few": [slider("n", 0, 4, 2, 2), slider("m", 0.0, 1.0, 0.5, 0.01)],
}


@pytest.mark.parametrize("most", [60, 500, 2000])
@pytest.mark.parametrize("name", CONTROLS)
def test_positions_fill_the_allowance_and_keep_to_it(name, most) -> None:
    controls = CONTROLS[name]
    sliders = {number for number, control in enumerate(controls) if not isinstance(control, Choice)}
    options = prod(len(control.options) for control in controls if isinstance(control, Choice))
    found = frames.positions(controls, [sliders] * options, most)
    counts = [len(stops) for stops in found]
    least = options * 3 ** len(sliders)
    assert prod(counts) <= max(most, least)
    for number in sliders:
        one_more = prod(counts) // counts[number] * (counts[number] + 1)
        assert one_more > most or counts[number] == len(controls[number].positions(frames.STOPS))
        assert counts[number] >= 3
        assert {controls[number].low, controls[number].value, controls[number].high} <= set(found[number])
    if name == "many":
        assert max(counts[1:]) - min(counts[1:]) <= 2, "about as many for each slider"


@pytest.mark.parametrize(
    ("value", "words"),
    [(8.0, "8"), (8, "8"), (0.0001, "0.0001"), (100000.0, "100,000"), (0.30000000000000004, "0.3"),
     ("single weights", "single weights"), (True, "True"), (None, "None")],
)  # fmt: skip
def test_positions_in_words(value, words) -> None:
    assert frames.in_words(value) == words


def test_a_picture_says_its_titles_and_axes(waves) -> None:
    words = "waves. light 5, 10^-2 of 0.3 (height against time). step"
    assert frames.description(waves()) == words


# One chapter

EXPLORER = """
from course_lib import lab
import matplotlib.pyplot as plt
factor = 2
def draw(kind, n):
    figure, axes = plt.subplots(figsize=(3, 2))
    axes.plot([0, factor * n], color="black" if kind == "a" else "red")
    axes.set(title=f"{kind} {n}", xlabel="x", ylabel="y")
    return figure
lab.explorer(draw, kind=lab.choice("kind", ["a", "b"]), n=lab.slider("n", 1, 5, 2, 1))
"""


def notebook_of(folder: Path, *sources: str) -> Path:
    path = folder / "notebooks" / "02_small.ipynb"
    path.parent.mkdir(parents=True)
    cells = [v4.new_markdown_cell("# A chapter"), *(v4.new_code_cell(source) for source in sources)]
    nbformat.write(v4.new_notebook(cells=cells), path)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory):
    """A notebook that has been run, and its frames."""
    path = notebook_of(tmp_path_factory.mktemp("course"), EXPLORER, "factor = 100")
    before = path.read_bytes()
    explorers = frames.draw(path)
    assert path.read_bytes() == before, "the notebook stays as it is"
    kept = frames.frames_of(path)
    frames.write(explorers, kept)
    notebook = nbformat.read(path, as_version=4)
    data = {"text/plain": explorers[0]["said"], frames.FIGURE_MIME: explorers[0]["content"]}
    notebook.cells[1].outputs = [v4.new_output("execute_result", data=data, execution_count=1)]
    nbformat.write(notebook, path)
    return path, kept


def test_an_explorer_is_drawn_with_what_its_cell_sees(small) -> None:
    """A later cell gives a name that its function uses another value."""
    (one,) = frames.read(small[1])
    assert one["said"].startswith("Explorer: kind = a (one of 'a', 'b'); n = 2")
    assert one["content"]["axes"][0]["series"][0]["data"]["y"] == "0 4"
    assert len(one["grid"]) == len(one["frames"]) == 10
    assert [control["start"] for control in one["controls"]] == [0, 1]
    assert one["controls"][1]["shown"] == ["1", "2", "3", "4", "5"]
    assert small[1].parts[-3:] == ("docs", "frames", "02.json.gz")


def test_the_file_is_the_same_each_time(small, capsys: pytest.CaptureFixture[str]) -> None:
    before = small[1].read_bytes()
    small[1].unlink()
    assert frames.main([str(small[0])]) == 0
    assert "02_small.ipynb: 10 positions, 10 pictures" in capsys.readouterr().out
    assert small[1].read_bytes() == before


def test_the_script_hands_over_the_file(small) -> None:
    script = frames.as_script(small[1], '02"')
    match = re.fullmatch(r'\(window\.explorerFrames \?\?= \{\}\)\["02\\""\] = "([A-Za-z0-9+/=]+)";\n', script)
    assert match is not None
    assert base64.b64decode(match[1]) == small[1].read_bytes()


def change(path: Path, kind: str) -> None:
    """Edit the explorer's stored output."""
    notebook = nbformat.read(path, as_version=4)
    cell = notebook.cells[1]
    data = cell.outputs[0].data
    line = data[frames.FIGURE_MIME]["axes"][0]["series"][0]["data"]
    if kind == "control":
        data["text/plain"] = data["text/plain"].replace("from 1 to 5", "from 1 to 6")
    elif kind == "curve":
        line["y"] = "0 4.2"
    elif kind == "noise":
        line["y"] = "0 4.02"
    elif kind == "tagged":
        line["y"], cell.metadata["tags"] = "0 4.2", ["tol:0.1"]
    elif kind == "second":
        notebook.cells.append(copy.deepcopy(cell))
        notebook.cells[-1].id = "another"
    elif kind == "gone":
        cell.outputs = []
    nbformat.write(notebook, path)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("nothing", ""),
        ("noise", ""),
        ("tagged", ""),
        ("control", "is now 'Explorer: .* from 1 to 6.*', its frames are of"),
        ("curve", "shows another picture than its frames .*4.2, stored 4"),
        ("second", "has 1 explorers, 02_small.ipynb 2"),
        ("gone", "has 1 explorers, 02_small.ipynb 0"),
    ],
)
def test_frames_are_stale_when_the_notebook_shows_something_else(small, tmp_path: Path, kind, why) -> None:
    path = tmp_path / small[0].name
    path.write_bytes(small[0].read_bytes())
    change(path, kind)
    found = frames.stale(path, small[1])
    assert re.search(why, found) if why else found == ""
    assert not why or "make frames NB=02" in found


def test_missing_frames_and_frames_of_another_version_are_stale(small, tmp_path: Path) -> None:
    assert "there are no frames of 02_small.ipynb's 1 explorers" in frames.stale(small[0], tmp_path / "02.json.gz")
    other = tmp_path / "03.json.gz"
    other.write_bytes(gzip.compress(json.dumps({"version": 0, "explorers": []}).encode()))
    assert "03.json.gz has version 0, not 1" in frames.stale(small[0], other)
    plain = notebook_of(tmp_path, "1")
    assert frames.stale(plain, frames.frames_of(plain)) == "", "nothing to draw"


@pytest.mark.parametrize(
    ("sources", "why"),
    [
        (("1 / 0",), r"code cell \[1\] failed.*ZeroDivisionError"),
        ((EXPLORER.replace("return figure", "return figure if n < 5 else 1 / 0"),), r"cell \[1\].*'n': 5.*division"),
        (("1", f"{EXPLORER.replace('lab.explorer(', 'display(lab.explorer(')})"), r"cell \[2\] must be the result"),
    ],
)
def test_what_fails_is_named_and_the_file_stays(
    tmp_path: Path, sources, why, capsys: pytest.CaptureFixture[str]
) -> None:
    path = notebook_of(tmp_path, *sources)
    kept = frames.frames_of(path)
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"as it was")
    with pytest.raises((NotebookFailed, FramesFailed)) as caught:
        frames.draw(path)
    assert re.search(why, str(caught.value), re.DOTALL)
    assert "02_small.ipynb" in str(caught.value)
    if sources == ("1 / 0",):
        assert frames.main([str(path)]) == 1
        assert "ZeroDivisionError" in capsys.readouterr().err
    assert kept.read_bytes() == b"as it was"
    assert [file.name for file in kept.parent.iterdir()] == [kept.name]


def test_a_file_that_is_too_large_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "LARGEST", 20)
    with pytest.raises(FramesFailed, match=r"02\.json\.gz would take \d+ bytes; 20 are allowed"):
        frames.write([], tmp_path / "02.json.gz")
    assert not list(tmp_path.iterdir())


def test_an_unknown_chapter_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert frames.main(["77"]) == 2
    assert "'77'" in capsys.readouterr().err
