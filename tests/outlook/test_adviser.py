"""The adviser: what is asked decides what is answered."""

import re
import sys
from itertools import pairwise, product

import matplotlib.pyplot as plt
import pytest
from myst_parser.slugs import github_slugify

from course_lib.lab.chapters import CHAPTERS
from course_lib.outlook.adviser import COLUMNS, GIVES, advice_table, advise, adviser, draw, relieving
from course_lib.outlook.findings import FINDINGS, HURTS, TAKES
from course_lib.outlook.links import address
from course_lib.outlook.measured import Points
from tests.outlook.rows import headings


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def explorer():
    return adviser()


def labels(figure):
    """The rows of a figure: its labels, without line breaks."""
    return [" ".join(text.get_text().split()) for ax in figure.axes for text in ax.get_yticklabels()]


@pytest.mark.parametrize("hurt", HURTS)
def test_all_that_relieves_a_complaint_is_answered(hurt):
    assert set(advise([hurt])["technique"]) == {f.technique for f in FINDINGS if hurt in f.relieves}


def test_a_row_says_what_the_finding_says():
    table = advise(["memory"]).set_index("technique")
    (finding,) = (f for f in FINDINGS if f.technique == "LoRA of rank 4")
    row = table.loc[finding.technique]
    assert row["gain"] == str(finding.gain)
    assert row["price"] == str(finding.price)
    assert (row["setting"], row["effort"], row["risk"]) == (finding.setting, finding.effort, finding.risk)
    assert row["shows"] == "gain"
    assert list(advise(["memory"]).columns) == list(COLUMNS)
    assert advise(["labels"]).set_index("technique").loc["Turn, shift and stretch the images a little", "price"] == ""


def test_what_is_shown_is_what_the_interval_says():
    shows = advise(HURTS).set_index("technique")["shows"]
    assert shows["bfloat16 on a processor"] == "loss"
    assert shows["Adam in place of SGD with momentum"] == "cannot be told"
    assert shows["Weight decay"] == "gain"


def test_who_relieves_more_comes_first_and_then_who_is_made_for_it():
    asked = ["size", "memory", "time"]
    ranks = []
    for finding in relieving(asked):
        places = [finding.relieves.index(hurt) for hurt in asked if hurt in finding.relieves]
        ranks.append((-len(places), min(places)))
    assert ranks == sorted(ranks)
    assert len(set(ranks)) > 2
    assert advise(asked)["technique"][0] == "Stay small at an equal budget"
    assert [f.relieves[0] == "labels" for f in relieving(["labels"])] == sorted(
        (f.relieves[0] == "labels" for f in relieving(["labels"])), reverse=True
    )


def test_the_order_of_the_question_and_repetitions_do_not_matter():
    assert advise(["time", "size"]).equals(advise(["size", "time", "size"]))
    assert advise(key for key in ("time",)).equals(advise(["time"]))


def test_only_some_chapters_or_prices():
    assert {f.chapter for f in relieving(HURTS, chapters=[5, 11])} == {5, 11}
    assert {f.takes for f in relieving(HURTS, takes=["data"])} == {"data"}
    assert advise(["memory"], chapters=[2]).empty
    assert list(advise(["memory"], chapters=[2]).columns) == list(COLUMNS)


def test_bad_questions_are_refused():
    with pytest.raises(ValueError, match="hurts='money'.*'time'.*'accuracy'"):
        advise(["time", "money"])
    with pytest.raises(ValueError, match="hurts='time'.*a collection"):
        advise("time")
    with pytest.raises(ValueError, match=r"hurts=\[\].*at least one"):
        advise([])
    with pytest.raises(ValueError, match="chapters=99.*from 0 to 17"):
        advise(["time"], chapters=[99])
    with pytest.raises(ValueError, match="takes='patience'.*'settings'"):
        advise(["time"], takes=["patience"])
    with pytest.raises(ValueError, match="hurts='money'"):
        draw("money")
    with pytest.raises(ValueError, match="ax=.*two axes"):
        draw("time", plt.subplots(1, 3)[1])


def test_links_lead_to_a_heading_of_the_web_site():
    for finding in FINDINGS:
        file, anchor = address(finding.chapter, finding.section).split("#")
        assert file == CHAPTERS[finding.chapter].file
        slugs = [github_slugify(re.sub(r"\$[^$]*\$|[`*]", "", title)) for title in headings(finding.chapter)]
        assert slugs.count(anchor) == 1, finding.section


def test_the_table_is_html_with_links_and_without_stray_signs():
    made = advice_table(["latency", "time"])
    html = made.to_html()
    assert html == advice_table(["latency", "time"]).to_html()  # no random names: the same output each time
    assert 'href="16_capstone.ipynb#56-what-carries-over-a-text"' in html
    assert "A teacher&#x27;s soft labels" in advice_table(["size"]).to_html()
    assert HURTS["latency"] in html
    assert html.count("<tr>") == len(advise(["latency", "time"])) + 1


@pytest.mark.parametrize("hurt", HURTS)
def test_the_figure_has_each_finding_once_sorted_points_and_ratios_apart(hurt):
    figure = draw(hurt)
    found = relieving([hurt])
    assert len(labels(figure)) == len(found)
    for finding in found:
        assert sum(label.startswith(finding.technique) for label in labels(figure)) == 1
    kinds = {isinstance(finding.gain, Points) for finding in found}
    assert len(figure.axes) == len(kinds)
    assert [ax.get_xscale() for ax in figure.axes] == ["linear", "log"][: len(kinds)]
    for ax in figure.axes:
        dots = sorted((y, x) for line in ax.lines for x, y in line.get_xydata() if line.get_marker() in "ov")
        assert len(dots) == len(ax.get_yticks())
        assert all(upper[1] >= lower[1] for upper, lower in pairwise(dots))


def test_a_dot_lies_where_the_study_says():
    figure = draw("memory")
    (finding,) = (f for f in FINDINGS if f.technique == "Smaller batches")
    means = [x for line in figure.axes[0].lines for x, _ in line.get_xydata() if line.get_marker() == "o"]
    assert any(x == pytest.approx(finding.gain.interval.mean) for x in means)
    assert "Smaller batches" in figure.get_label()  # in words, for who does not see it


def test_it_draws_in_axes_that_are_given():
    figure, axes = plt.subplots(2, 1)
    assert draw("time", axes) is figure
    assert len(labels(figure)) == len(relieving(["time"]))


def test_all_combinations_can_be_drawn_beforehand(explorer):
    positions = [control.positions(25) for control in explorer.controls.values()]
    assert positions == [list(HURTS), list(GIVES)]
    assert len(list(product(*positions))) < 64


def test_every_price_is_in_reach_of_some_answer():
    assert {key for keys in GIVES.values() for key in keys} == set(TAKES)
    assert GIVES["whatever it takes"] == tuple(TAKES)


def test_the_controls_change_the_answer(explorer):
    widget = explorer.widget
    hurts, gives = widget.children[0].children
    image = widget.children[2]
    shown = [image.value]
    hurts.value = "robustness"
    shown.append(image.value)
    gives.value = "nothing but settings"
    shown.append(image.value)
    assert len(set(shown)) == 3
    assert widget.children[1].value == ""  # no error
    assert set(labels(explorer(hurts="robustness", gives="more data"))) > set(
        labels(explorer(hurts="robustness", gives="nothing but settings"))
    )


def test_where_there_is_nothing_it_says_so(monkeypatch):
    monkeypatch.setattr(sys.modules[draw.__module__], "FINDINGS", ())  # the package has a function of its name
    figure = draw("time")
    assert not figure.axes
    assert any("measured nothing" in text.get_text() for text in figure.texts)


def test_the_stored_picture_has_its_content(explorer):
    bundle = explorer._repr_mimebundle_()[0]
    assert "image/png" in bundle
    assert "what hurts = time" in bundle["text/plain"]
