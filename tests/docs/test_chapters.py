"""What becomes of a notebook: its words, exercises, questions, claims and pictures, case by case."""

from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
from nbformat import NotebookNode, v4

from course_lib.lab import Claims, plotting, predict
from course_lib.lab.chapters import CHAPTERS
from course_lib.lab.predictions import answered
from course_lib.lab.widgets import explorer, slider, to_png
from course_lib.proving.figures import FIGURE_MIME, describe_figure
from site_builder import chapters, notebooks

OPTIMIZERS = CHAPTERS[2]


@pytest.fixture(autouse=True)
def no_figure_left_open() -> Iterator[None]:
    yield
    plt.close("all")


def code(source: str, **data: object) -> NotebookNode:
    made = [v4.new_output("execute_result", data=data, metadata=dict(data.pop("meta", {})))] if data else []
    return v4.new_code_cell(source, outputs=made)


def shown(value: object, source: str = "x") -> NotebookNode:
    return code(source, **{"text/html": value._repr_html_(), "text/plain": repr(value)})  # type: ignore[attr-defined]


def page(root: Path, *cells: NotebookNode) -> chapters.Page:
    folder = root / "notebooks"
    folder.mkdir(exist_ok=True)
    title = v4.new_markdown_cell("# 2 · Optimizers")
    nbformat.write(v4.new_notebook(cells=[title, *cells]), folder / OPTIMIZERS.file)
    return chapters.page_of(OPTIMIZERS, root)


def html_of(cells: list[NotebookNode]) -> str:
    return "".join(o["data"].get("text/html", "") for cell in cells for o in cell.get("outputs", []))


def words(page: chapters.Page) -> list[str]:
    return [cell.source for cell in page.cells if cell.cell_type == "markdown"]


EXERCISES = (
    v4.new_markdown_cell("## 10. Exercises\n\nReplace the dots.\n\n**Exercise 1: one.** Do it."),
    v4.new_code_cell("one = ..."),
    v4.new_markdown_cell("**Exercise 2: two.** Do it as well."),
    v4.new_code_cell("two = ..."),
)


def test_each_hint_stands_folded_under_its_exercise(tmp_path: Path) -> None:
    hints = "<details><summary><b>Hints</b></summary>\n\n1. Think\n   of it.\n2. And $x^2$ too.\n</details>"
    made = page(tmp_path, *EXERCISES, v4.new_markdown_cell(hints), v4.new_markdown_cell("## 11. End"))
    folded = [(k, cell.source) for k, cell in enumerate(made.cells) if "class='hint'" in cell.source]
    assert [text.count("exercise 1") for _, text in folded] == [1, 0]
    assert "Think\n   of it." in folded[0][1]
    assert "$x^2$" in folded[1][1]
    assert [made.cells[k - 1].source for k, _ in folded] == ["one = ...", "two = ..."]
    assert not [text for text in words(made) if text.startswith("<details><summary><b>Hints")]


def test_hints_that_fit_no_exercise_stay_where_they_are(tmp_path: Path) -> None:
    hints = "<details><summary><b>Hints</b></summary>\n\n1. Think.\n7. Of what?\n</details>"
    made = page(tmp_path, *EXERCISES, v4.new_markdown_cell(hints))
    assert words(made)[-1] == hints


def test_solutions_go_to_a_page_of_their_own(tmp_path: Path) -> None:
    solution = (
        "<details><summary><b>Solutions</b> (when you have tried)</summary>\n\n```python\none = 1\n```\n</details>"
    )
    made = page(tmp_path, *EXERCISES, v4.new_markdown_cell(solution))
    assert made.solutions == "```python\none = 1\n```"
    assert not [text for text in words(made) if "one = 1" in text]
    assert "(../solutions/02.md)" in words(made)[-1]


def test_what_answers_a_question_is_marked_up_to_the_next_heading(tmp_path: Path) -> None:
    question = predict("02.z", "Which one?", choices=["this <one>", "that"])
    claims = Claims()
    claim = claims.claim("It is that", "x == 1", x=1)
    made = page(
        tmp_path,
        shown(question, 'predict("02.z", "Which one?", choices=[])'),
        shown(answered("02.z", "that"), 'answered("02.z", "that")'),
        shown(claim, 'claims.claim("It is that")'),
        v4.new_markdown_cell("So it is.\n\n## 2. Next\n\nMore."),
        code("after = 1"),
    )
    tags = [cell.metadata.tags for cell in made.cells if cell.cell_type == "code"]
    assert tags == [["hide-input"], ["asked-02-z"], ["hide-input", "asked-02-z", "answers-in-source"], []]
    assert words(made)[-2:] == ["::::::{container} told asked-02-z\nSo it is.\n::::::", "## 2. Next\n\nMore."]
    text = html_of(made.cells)
    assert 'data-options="[&quot;this &lt;one&gt;&quot;, &quot;that&quot;]"' in text
    assert '<span class="offered"><br>this &lt;one&gt; / that</span>' in text
    assert '<div class="answer" data-key="02.z" data-measured="that">' in text
    assert '<div class="claim" id="claim-1">' in text


def test_pictures_become_files_with_sizes_and_words(tmp_path: Path) -> None:
    figure, axes = plt.subplots(figsize=(4, 2))
    axes.plot([1, 2], label="Adam")
    axes.legend()
    axes.set(title="Adam is $\\alpha$ ahead", xlabel="step", ylabel="loss")
    data = {"image/png": b64encode(to_png(figure)).decode(), FIGURE_MIME: describe_figure(figure)}
    made = page(tmp_path, code("fig", **data, **{"text/plain": "<Figure>"}))
    text = html_of(made.cells)
    (path,) = made.files
    assert path.startswith("figures/02/01-")
    assert f'src="../{path}"' in text
    assert 'width="360" height="180"' in text
    assert 'alt="Adam is alpha ahead: loss against step: Adam."' in text
    plotting.describe(figure, 'Adam, "ahead"')
    data[FIGURE_MIME] = describe_figure(figure)
    assert 'alt="Adam, &quot;ahead&quot;"' in html_of(page(tmp_path, code("fig", **data)).cells)


def test_numbers_in_the_cells_of_a_map_are_not_read_out() -> None:
    panel = {"title": "Accuracy", "label": {}, "legends": [], "texts": [{"text": "81.1"}, {"text": "best"}]}
    assert notebooks.alternative_text({"axes": [panel]}) == "Accuracy: best."


def test_an_explorer_names_its_frames(tmp_path: Path) -> None:
    def draw(level: int) -> plt.Figure:
        figure, axes = plt.subplots(figsize=(4, 2))
        axes.plot([level])
        return figure

    bundle, metadata = explorer(draw, level=slider("level", 1, 3, 2, 1))._repr_mimebundle_()
    cell = v4.new_code_cell("explorer()", outputs=[v4.new_output("execute_result", data=bundle, metadata=metadata)])
    text = html_of(page(tmp_path, cell).cells)
    assert '<figure class="picture explorer" id="explorer-1" data-frames="../frames/02.js"' in text
    assert 'data-key="02" data-index="0"' in text
    assert "widget-view" not in text


def test_only_what_changed_is_written_and_what_is_gone_is_removed(tmp_path: Path) -> None:
    kept, changed, gone = (tmp_path / "made" / name for name in ("kept", "sub/changed", "old/gone"))
    chapters.bring_up_to_date([tmp_path / "made"], {kept: b"1", changed: b"1", gone: b"1"})
    before = kept.stat().st_mtime_ns
    chapters.bring_up_to_date([tmp_path / "made"], {kept: b"1", changed: b"2"})
    assert (kept.stat().st_mtime_ns, changed.read_bytes()) == (before, b"2")
    assert not gone.exists()
    assert not gone.parent.exists()


def test_a_formula_that_is_none_is_named() -> None:
    from site_builder.formulas import typeset

    assert "<math" in typeset(r"\frac{1}{B}", True)
    with pytest.raises(ValueError, match=r"KaTeX parse error: Unexpected end of input"):
        typeset(r"\frac{1", False)


def test_a_link_in_a_table_leads_to_the_other_chapter_s_page(tmp_path: Path) -> None:
    there = '<a href="08_pruning.ipynb#52-which">8</a>, <a href="https://example.org/a.ipynb#b">outside</a>'
    made = page(tmp_path, code("x", **{"text/html": f"<table><tr><td>{there}</td></tr></table>"}))
    text = html_of(made.cells)
    assert "08_pruning.html#52-which" in text
    assert "a.ipynb#b" in text
