"""The pairs of techniques: what they point at is there, what was measured says so, and the matrix counts them all."""

import json
import re
from functools import lru_cache

import matplotlib.pyplot as plt
import numpy as np
import pytest

from course_lib.capstone import measured
from course_lib.lab.chapters import CHAPTERS
from course_lib.lab.runtime import checkout
from course_lib.outlook import pairs
from course_lib.outlook.pairs import PAIRS, TECHNIQUES, VERDICTS


@lru_cache
def headings(chapter: int) -> frozenset[str]:
    """The sections of a chapter's notebook, as they stand."""
    root = checkout()
    assert root
    notebook = json.loads((root / "notebooks" / CHAPTERS[chapter].file).read_text(encoding="utf-8"))
    text = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    outside = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return frozenset(re.findall(r"^#{2,3} +(.+?)\s*$", outside, re.MULTILINE))


def test_names_are_unlike():
    assert len({(pair.name, pair.origin) for pair in PAIRS}) == len({pair.name for pair in PAIRS}) == len(PAIRS)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_a_pair_is_whole(pair):
    assert 1 <= pair.first < pair.second <= TECHNIQUES
    assert pair.verdict in VERDICTS
    assert pair.why.endswith(".")
    assert pair.why == pair.why.strip()
    assert "|" not in pair.why + pair.source
    if pair.measured:
        assert pair.shown in (pair.first, pair.second, 16)
        assert not pair.source
        assert not pair.url
        assert pair.section in headings(pair.shown)
    else:
        assert not pair.section
        assert re.search(r" (19|20)\d\d \(.+\), \S", pair.source)
        assert re.fullmatch(r"https://\S+", pair.url)


def test_links_lead_to_the_anchors_of_the_web_site():
    slugs = pytest.importorskip("myst_parser.slugs", reason="comes with requirements-docs.txt")
    for pair in PAIRS:
        if pair.shown is not None:
            file, anchor = re.search(r'href="(.+)#(.+)">', pair.origin).groups()
            assert file == CHAPTERS[pair.shown].file
            assert anchor == slugs.github_slugify(pair.section)


def test_what_the_capstone_measured_is_what_its_study_found():
    """Where a pair helps, both rungs bring more than their product; where it is neutral, that cannot be told."""
    rungs = {1: ["whole batches"], 2: ["SGD with momentum"], 3: ["one cycle"], 15: ["quick network"]}
    found = measured()
    checked = [pair for pair in PAIRS if pair.shown == 16]
    for pair in checked:
        others = rungs[pair.second]
        if pair.verdict == "neutral" and pair.second == 15:
            others = [*others, "channels last, bf16"]
        for other in others:
            speedup = found.interaction(rungs[pair.first][0], other)
            assert (speedup.low > 1) == (pair.verdict == "helps"), pair.name
            assert (speedup.low <= 1 <= speedup.high) == (pair.verdict == "neutral"), pair.name
    assert len(checked) == 4


def test_the_matrix_is_symmetric_and_has_every_pair():
    cells = pairs.matrix()
    assert cells.shape == (TECHNIQUES, TECHNIQUES)
    assert list(cells.index) == list(cells.columns)
    assert cells.index[0] == "data preprocessing"
    assert (cells == cells.T).all(axis=None)
    assert all(cells.iloc[n, n] == "" for n in range(TECHNIQUES))
    assert (cells != "").to_numpy().sum() == 2 * len({(pair.first, pair.second) for pair in PAIRS})
    for pair in PAIRS:
        letter = pair.verdict[0].upper() if pair.measured else pair.verdict[0]
        shown = cells.iloc[pair.first - 1, pair.second - 1].split("/")
        assert letter in shown or (not pair.measured and letter.upper() in shown)


def test_letters_of_the_matrix():
    cells = pairs.matrix()
    assert cells.loc["optimizers", "learning rate"] == "H"
    assert cells.loc["pruning", "compression"] == "H/c"  # measured one way, cited the other
    assert cells.loc["transfer", "learning rate"] == "C"  # measured and cited, with one verdict
    assert cells.loc["pruning", "transfer"] == "h"
    assert cells.loc["optimizers", "pruning"] == ""


def test_pairs_of_a_chapter():
    assert all(4 in (pair.first, pair.second) for pair in pairs.pairs_of(4))
    assert sum(len(pairs.pairs_of(chapter)) for chapter in range(1, 16)) == 2 * len(PAIRS)
    assert {pair.shown for pair in pairs.pairs_of(16)} == {16}


@pytest.mark.parametrize("chapter", [0, 17, 2.0, True, "4", None])
def test_a_chapter_that_is_none_is_named(chapter):
    with pytest.raises(ValueError, match="chapter="):
        pairs.pairs_of(chapter)
    if chapter is not None:
        with pytest.raises(ValueError, match="chapter="):
            pairs.table(chapter)


def test_the_table_links_to_where_it_comes_from():
    whole = pairs.table()
    assert list(whole.columns) == ["pair", "verdict", "why", "measured or cited"]
    assert len(whole) == len(PAIRS)
    one = pairs.table(4).set_index("pair")["measured or cited"]
    assert one["batch size × regularization"] == (
        'measured: <a href="04_batch_size.ipynb#59-the-two-ends">4, section 5.9</a>'
    )
    assert one["batch size × parallel training"].startswith('cited: <a href="https://arxiv.org/abs/2503.09799">Charles')
    assert set(pairs.table(verdict="conflicts")["verdict"]) == {"conflicts"}
    assert len(pairs.table(verdict="conflicts")) == sum(pair.verdict == "conflicts" for pair in PAIRS)
    with pytest.raises(ValueError, match="verdict='helpful': must be one of 'helps', 'neutral', 'conflicts'"):
        pairs.table(verdict="helpful")


def test_the_listing_keeps_its_links_and_nothing_else_as_html():
    text = pairs.listing(4).to_html()
    assert '<a href="04_batch_size.ipynb#59-the-two-ends">4, section 5.9</a>' in text
    assert text.count("<tr>") == len(pairs.pairs_of(4)) + 1
    assert pairs.listing(4).to_html() == text  # the same identifiers each time


def test_the_figure_shows_every_verdict():
    ax = pairs.draw()
    cells = pairs.matrix().to_numpy()[np.tril_indices(TECHNIQUES, -1)]
    signs = [text.get_text() for text in ax.texts if text.get_text() in "+0−"]
    marks = sum(len(cell.split("/")) for cell in cells if cell)
    assert len(signs) == len(ax.patches) == marks + 6  # six in the key
    assert "pairs" in ax.figure.get_label()
    assert sum("H" in cell.upper() for cell in cells) > sum(cell != "" for cell in cells) / 2  # as its title says
    plt.close(ax.figure)


def test_the_figure_goes_into_axes_that_are_there():
    figure, axes = plt.subplots(1, 2)
    assert pairs.draw(axes[1]) is axes[1]
    assert not axes[0].patches
    plt.close(figure)
