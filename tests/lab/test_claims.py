"""Claims: what holds is kept and shown, what does not hold stops the notebook."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from course_lib.lab.claims import ClaimFailed, Claims

NAN = float("nan")


@dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float
    n: int = 5


@pytest.fixture
def claims(monkeypatch):
    monkeypatch.setenv("COURSE_DEVICE", "cpu")
    return Claims()


def test_a_claim_that_holds_is_one_line(claims):
    made = claims.claim("momentum is faster", "ratio > 3", ratio=12.4)
    assert repr(made) == "✓ momentum is faster (ratio = 12.4; ratio > 3)"
    assert "momentum is faster" in made._repr_html_()
    assert "ratio &gt; 3" in made._repr_html_()


def test_a_claim_that_fails_says_sentence_condition_and_figures(claims):
    with pytest.raises(ClaimFailed, match=r"'it is faster' asks for ratio > 3, measured ratio = 2\.9996"):
        claims.claim("it is faster", "ratio > 3", ratio=2.9996)
    assert issubclass(ClaimFailed, AssertionError)
    assert len(claims) == 0


@pytest.mark.parametrize(
    ("condition", "figures", "holds"),
    [
        ("a > b", {"a": 2, "b": 1}, True),
        ("a > b", {"a": 1, "b": 1}, False),
        ("a >= b", {"a": 1, "b": 1}, True),
        ("1 < a < 3", {"a": 2}, True),
        ("1 < a < 3", {"a": 3}, False),
        ("a == 'Adam'", {"a": "Adam"}, True),
        ("a != 'Adam'", {"a": "Adam"}, False),
        ("a and not b", {"a": True, "b": False}, True),
        ("a and not b", {"a": True, "b": True}, False),
        ("a > 9 or b > 9", {"a": 1, "b": 10}, True),
        ("a > 9 or b > 9", {"a": 1, "b": 2}, False),
        ("abs(a - b) < 0.1 * max(a, b)", {"a": 10.0, "b": 10.5}, True),
        ("a ** 2 + b // 2 - b % 2 == -(-6) / 1", {"a": 2, "b": 5}, False),
        ("a ** 2 + b // 2 - b % 2 == 5", {"a": 2, "b": 5}, True),
        ("max(losses) < 2 and len(losses) == 3", {"losses": [0.1, 1.0, 1.9]}, True),
        ("all(flags)", {"flags": [True, False]}, False),
        ("gain.low > 0", {"gain": Interval(0.02, 0.01, 0.03)}, True),
        ("gain.low > 0", {"gain": Interval(0.02, -0.01, 0.05)}, False),
        ("gain.n >= 5", {"gain": Interval(0.02, -0.01, 0.05)}, True),
        ("x > 1", {"x": torch.tensor(1.5)}, True),
        ("x > 1", {"x": np.float32(0.5)}, False),
        ("max(x) > 1", {"x": torch.tensor([0.5, 1.5])}, True),
        ("a > 1", {"a": NAN}, False),
        ("not (a > 1)", {"a": NAN}, False),
        ("a != 1", {"a": NAN}, False),
        ("not (max(x) > 1)", {"x": [0.0, NAN]}, False),
        ("not (gain.low > 0)", {"gain": Interval(0.0, NAN, 0.1)}, False),
        ("not (a - a > 0)", {"a": float("inf")}, False),
        ("not (1 / a > 0)", {"a": 0}, False),
        ("a > 1", {"a": 2, "shown": NAN}, False),
    ],
)
def test_condition(claims, condition, figures, holds):
    if holds:
        claims.claim("it holds", condition, **figures)
    else:
        with pytest.raises(ClaimFailed):
            claims.claim("it holds", condition, **figures)


@pytest.mark.parametrize(
    ("condition", "figures", "message"),
    [
        ("ratoi > 3", {"ratio": 4}, r"names ratoi; the figures given are: ratio"),
        ("ratio >", {"ratio": 4}, r"is not an expression"),
        ("ratio", {"ratio": 4}, r"must say what to compare"),
        ("1 > 0", {"ratio": 4}, r"depends on no figure"),
        ("__import__('os').getcwd() == ratio", {"ratio": 4}, r"calls __import__"),
        ("open(ratio) > 1", {"ratio": 4}, r"calls open; allowed are abs"),
        ("ratio.real > 1", {"ratio": 4}, r"reads \.real; allowed are \.mean"),
        ("ratio.__class__ == 1", {"ratio": 4}, r"reads \.__class__"),
        ("(lambda: ratio > 3)()", {"ratio": 4}, r"uses Lambda|calls"),
        ("[r for r in ratio] == 1", {"ratio": [4]}, r"uses ListComp"),
        ("ratio[0] > 3", {"ratio": [4]}, r"uses Subscript"),
        ("gain > 0", {"gain": Interval(1, 0, 2)}, r"of an interval, compare \.low"),
        ("abs > 0", {"ratio": 1}, r"names abs"),
    ],
)
def test_a_condition_that_cannot_be_used(claims, condition, figures, message):
    with pytest.raises(ValueError, match=message):
        claims.claim("it holds", condition, **figures)
    assert len(claims) == 0


def test_a_comparison_is_not_short_cut_into_a_pass(claims):
    """`a < b < c` must test both halves."""
    with pytest.raises(ClaimFailed):
        claims.claim("ordered", "a < b < c", a=5, b=2, c=9)


def test_the_table_keeps_the_order_and_replaces_a_claim_made_twice(claims):
    claims.claim("first", "a > 0", a=1)
    claims.claim("second", "b.mean > 0.5", b=Interval(0.91, 0.9, 0.92))
    claims.claim("first", "a > 1", a=12345.678)
    table = claims.table()
    assert list(table.columns) == ["claim", "condition", "measured"]
    assert table.to_numpy().tolist() == [
        ["first", "a > 1", "a = 12,346"],
        ["second", "b.mean > 0.5", "b = 0.91 (0.9 to 0.92, n = 5)"],
    ]
    assert repr(claims) == "2 claims, all of which hold"


def test_a_claim_that_fails_when_its_cell_runs_again_leaves_the_table(claims):
    claims.claim("first", "a > 0", a=1)
    with pytest.raises(ClaimFailed):
        claims.claim("first", "a > 0", a=-1)
    assert len(claims.table()) == 0
    assert repr(claims.table()) == "(none)"


def test_the_table_shows_long_sentences_whole_and_escapes_html(claims):
    sentence = "a very long sentence " * 10
    claims.claim(sentence, "a < 2", a=1)
    assert sentence in claims.table()._repr_html_()
    assert "a &lt; 2" in claims.table()._repr_html_()
    assert sentence.strip() in repr(claims.table())


@pytest.mark.gpu
def test_on_a_gpu_a_claim_that_fails_is_marked_and_the_notebook_goes_on(claims, monkeypatch):
    monkeypatch.setenv("COURSE_DEVICE", "cuda")
    made = claims.claim("bringing the images takes little", "spent < 0.5", spent=0.8)
    assert repr(made).startswith("✗ does not hold on this device: bringing the images takes little")
    assert "✗" in claims.table()["claim"][0]


def test_in_the_full_profile_a_claim_that_fails_is_marked_and_the_notebook_goes_on(claims, monkeypatch):
    monkeypatch.setenv("COURSE_PROFILE", "full")
    held, failed = claims.claim("Holds", "a > 1", a=2.0), claims.claim("Fails", "a > 1", a=0.5)
    assert (held.holds, failed.holds) == (True, False)
    assert repr(failed) == "✗ does not hold in this profile: Fails (a = 0.5; a > 1)"
    assert "✗" in failed._repr_html_()
    assert list(claims.table()["claim"]) == ["Holds", "✗ does not hold in this profile: Fails"]
    assert repr(claims) == "2 claims, 1 of which do not hold in this profile"
    monkeypatch.setenv("COURSE_PROFILE", "quick")
    with pytest.raises(AssertionError, match="does not hold: 'Fails'"):
        claims.claim("Fails", "a > 1", a=0.5)
