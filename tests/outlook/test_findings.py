"""What the adviser knows: every finding stands in its chapter, and no figure is typed."""

import re
from collections import Counter

import numpy as np
import pytest

from course_lib.lab.studies import study_file
from course_lib.outlook.findings import FINDINGS, HURTS, TAKES
from course_lib.outlook.measured import VERDICTS, Points, Times, verdict
from tests.outlook.rows import ROOT, headings

ALLOWED = r"\d bits|\d×\d|chapter \d+"
RESULT = r"\d[\d.,]* ?(?:points|times|seconds)|\d[\d.,]*%"
OF_THE_SETTING = ("90% of the weights", "90% of each layer", "to 93%")


def test_every_section_stands_in_its_notebook():
    lost = [
        (finding.chapter, finding.section) for finding in FINDINGS if finding.section not in headings(finding.chapter)
    ]
    assert lost == []


def test_the_fields_are_known():
    for finding in FINDINGS:
        assert finding.relieves
        assert len(set(finding.relieves)) == len(finding.relieves)
        assert set(finding.relieves) <= set(HURTS)
        assert finding.takes in TAKES
        assert isinstance(finding.gain, Points | Times)
        assert int(finding.gain.chapter) == finding.chapter


@pytest.mark.parametrize("finding", FINDINGS, ids=lambda finding: finding.technique)
def test_it_has_a_number_over_five_seeds_and_words(finding):
    for figure in filter(None, (finding.gain, finding.price)):
        found = figure.interval
        assert np.isfinite([found.mean, found.low, found.high]).all()
        assert found.low <= found.mean <= found.high
        assert found.n >= 5
        assert figure.what in str(figure)
        # a difference of shares lies within 100 points; seconds or bytes taken for shares would not
        assert not isinstance(figure, Points) or abs(found.mean) < 60


def test_what_takes_accuracy_says_how_much():
    for finding in FINDINGS:
        if finding.takes == "accuracy":
            assert finding.price is not None or verdict(finding.gain) == "loss", finding.technique


def test_no_result_is_typed():
    for finding in FINDINGS:
        for words in (finding.technique, finding.effort, finding.risk):
            assert not re.search(r"\d", re.sub(ALLOWED + r"|rank \d|bfloat16|1F1B", "", words)), words
        setting = finding.setting
        for phrase in OF_THE_SETTING:
            setting = setting.replace(phrase, "")
        assert not re.search(RESULT, setting), setting


def test_sentences_are_short_and_ended():
    for finding in FINDINGS:
        assert len(finding.technique.split()) <= 12
        for words in (finding.effort, finding.risk):
            assert words.endswith("."), words
            assert words[0].isupper(), words
            assert len(words.split()) <= 35, words
        assert re.search("against|each|both", finding.setting), finding.setting


def test_every_complaint_has_an_answer():
    count = Counter(hurt for finding in FINDINGS for hurt in finding.relieves)
    assert {hurt: count[hurt] for hurt in HURTS if count[hurt] < 4} == {}


def test_every_kind_of_price_is_taken():
    assert {finding.takes for finding in FINDINGS} == set(TAKES)


@pytest.mark.parametrize("chapter", [1, 2, 3, 4, 5, 6, 8, 9, 11, 12, 13, 14, 15, 16])
def test_every_chapter_with_a_study_has_a_finding(chapter):
    assert study_file(f"{chapter:02d}").is_relative_to(ROOT)
    assert any(finding.chapter == chapter for finding in FINDINGS)


def test_the_order_is_that_of_the_chapters_and_nothing_stands_twice():
    chapters = [finding.chapter for finding in FINDINGS]
    assert chapters == sorted(chapters)
    assert len({finding.technique for finding in FINDINGS}) == len(FINDINGS)
    assert len({(finding.gain, finding.price) for finding in FINDINGS}) == len(FINDINGS)


def test_what_did_not_help_is_there_as_well():
    count = Counter(verdict(finding.gain) for finding in FINDINGS)
    assert set(count) == set(VERDICTS)
    assert count["loss"] + count["cannot be told"] >= len(FINDINGS) / 5
