"""Paragraphs, as HTML whose formulas are still in TeX, in elements of the class ``tex``.

| function | what it makes of one |
| --- | --- |
| `plain` | its words on one line |
| `typeset`, `spoken` | the same with its formulas set, for a slide or for the notes |
| `sentences` | its sentences |
| `key`, `lead` | those that a slide shows of it: where it stands alone, and where it leads to a figure |
"""

import html
import re
from collections.abc import Callable
from itertools import pairwise

from classroom.slides.formulas import formula

ABBREVIATIONS = re.compile(r"(?:\bal|\be\.g|\bi\.e|\bvs|\bcf|\bFig|\bapprox|\bresp|\b[A-Z])\.$")
POINTS_ELSEWHERE = re.compile(r"\b(?:next cells?|cells? below|cell that|cell runs|[Hh]ints and solutions)\b")
KEPT_SHORT = 240  # characters that a paragraph may have on a slide before it is shortened
TITLE = 45  # characters of a first sentence that is too short to stand alone


def plain(fragment: str) -> str:
    """The words of a piece of HTML on one line, formulas as their letters."""
    flat = _with_formulas(fragment, lambda tex, display: html.escape(formula(tex, display).row))
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", flat)).split())


def typeset(fragment: str) -> str:
    """A piece of HTML with its formulas for the eye."""
    # a line must not begin with the comma after a formula
    held = re.sub(r'(<span class="tex">[^<]{1,40}</span>[.,;:?!)]+)', r'<span class="held">\1</span>', fragment)
    return _with_formulas(held, lambda tex, display: formula(tex, display).shown)


def spoken(fragment: str) -> str:
    """A piece of HTML with its formulas for the notes."""
    return _with_formulas(fragment, lambda tex, display: formula(tex, display).spoken)


def _with_formulas(fragment: str, make: Callable[[str, bool], str]) -> str:
    def one(match: re.Match[str]) -> str:
        return make(html.unescape(match[2]), match[1] == "div")

    return re.sub(r'<(span|div) class="tex">(.*?)</\1>', one, fragment, flags=re.DOTALL)


def sentences(fragment: str) -> list[str]:
    """A paragraph's sentences, each with its markup: it is cut only outside of elements."""
    parts = re.findall(r"<[^>]+>|[^<]+", fragment)
    cuts, at, depth, before = [0], 0, 0, ""  # before: the last words, without markup
    for part, following in pairwise([*parts, ""]):
        if part.startswith("<"):
            depth += 0 if part.endswith("/>") or part.startswith("<br") else -1 if part.startswith("</") else 1
        else:
            for space in re.finditer(r"\s+", part) if depth == 0 else ():
                sentence = fragment[cuts[-1] : at + space.start()]
                if _ends(sentence, before + part[: space.start()], part[space.end() :] or following):
                    cuts.append(at + space.end())
            before = (before + part)[-40:]
        at += len(part)
    cuts.append(at)
    return [fragment[low:high].strip() for low, high in pairwise(cuts) if fragment[low:high].strip()]


def _ends(sentence: str, words: str, following: str) -> bool:
    """Whether a sentence ends here; ``words`` are the last ones without markup, and what follows may begin with it."""
    return (
        sentence.count("(") <= sentence.count(")")
        and re.search(r"[.!?…][\"”’)]*$", words) is not None
        and not ABBREVIATIONS.search(words)
        and re.match(r"[A-Z“\"(<ÀÉÖ]", following) is not None
    )


def points_elsewhere(fragment: str) -> bool:
    """Whether it speaks of a cell, or of the solutions, which no slide shows."""
    return POINTS_ELSEWHERE.search(plain(fragment)) is not None


def key(fragment: str) -> str:
    """What a slide shows of a paragraph: all if it is short, else its first sentence and what is emphasised."""
    said = [sentence for sentence in sentences(fragment) if not points_elsewhere(sentence)]
    if len(plain(" ".join(said))) <= KEPT_SHORT:
        return " ".join(said)
    kept: list[str] = []
    used = 0
    for sentence in said:
        stressed = any(" " in plain(found) for found in re.findall(r"<(?:em|strong)>(.*?)</", sentence, re.DOTALL))
        # a first sentence that is a title or a question says nothing without the next
        if used < TITLE or kept[-1].endswith(("?", "?</strong>", "?</em>")) or (stressed and used <= KEPT_SHORT):
            kept.append(sentence)
            used += len(plain(sentence))
    return " ".join(kept)


def lead(fragment: str) -> str:
    """What a slide shows of a paragraph that leads to a figure: its last sentences, without asides in brackets."""
    kept: list[str] = []
    for sentence in reversed(sentences(fragment)):
        if points_elsewhere(sentence) or (sentence.startswith("(") and sentence.endswith(")")):
            continue
        if kept and len(plain(" ".join([sentence, *kept]))) > KEPT_SHORT:
            break
        kept.insert(0, sentence)
    return " ".join(kept)
