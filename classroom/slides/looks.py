"""How a block looks on a slide: for each kind a function that makes its items (tables and code have their own modules).

A fragment is HTML whose formulas are still in TeX; the slide sets them.
"""

import html
import re
from collections.abc import Iterator, Sequence

from bs4.element import Tag

from classroom.slides import formulas
from classroom.slides.letters import lines
from classroom.slides.slide import FREE, WIDE, WORDS, Item, fixed, lined
from classroom.slides.words import key, plain
from site_builder.notebooks import Claim

LARGE, SMALL = 31 / WORDS, 20 / WORDS  # sizes of a formula in em of the words
IN_ORDER = "order these: "  # how a prediction of an order begins what may be answered


def chapter_title(number: str, title: str) -> Item:
    """What stands on the first slide."""
    shown = f'<p class="number">The Craft of Training · chapter {number}</p><h1>{title}</h1>'
    return Item(shown, lined(title, 54, pad=80, weight=600))


def promise(content: str) -> Item:
    """The line below a chapter's title."""
    return Item(f'<p class="promise">{content}</p>', lined(content, 28), f"<p>{content}</p>")


def agenda(titles: Sequence[str]) -> Item:
    """The sections of a part."""
    many = " many" if len(titles) > 8 else ""
    listed = "".join(f"<li>{title}</li>" for title in titles)
    return Item(f'<ul class="agenda{many}">{listed}</ul>', fixed(FREE / 2), words=False)


def paragraph(shown: str, whole: str, *, leads: bool = False) -> Item:
    """What a slide shows of a paragraph, which may be nothing; the whole of it is said."""
    said = f"<p>{whole}</p>"
    if not plain(shown):
        return Item("", fixed(0), said, leads)
    longer = Item(said, lined(whole), said, leads) if shown != whole else None
    return Item(f"<p>{shown}</p>", lined(shown), said, leads, longer)


def task(shown: str, said: str, *, leads: bool = False) -> Item:
    """A paragraph of an exercise, with each of its choices, a) to d), on a line of its own."""
    if re.search(r"\ba\) .* b\) ", shown, re.DOTALL):
        shown = re.sub(r"\s(?=[a-h]\)\s)", "<br>", shown)
    return Item(f"<p>{shown}</p>", lined(shown), f"<p>{said}</p>", leads)


def remark(fragment: str) -> Item:
    """A sentence of the deck's own, which the notes need not repeat."""
    return Item(f"<p>{fragment}</p>", lined(fragment))


def hint(words: str) -> Item:
    """The same in small print; plain words, no HTML."""
    fragment = html.escape(words)
    return Item(f'<p class="hint">{fragment}</p>', lined(fragment, 22))


def listed(element: Tag, *, whole: bool) -> Iterator[Item]:
    """The entries of a list, ``whole`` or shortened as a paragraph is; the first leads to the others."""
    name, start = element.name, int(str(element.get("start") or 1))
    for k, entry in enumerate(element.find_all("li", recursive=False)):
        inner = entry.decode_contents().strip()
        if "<ul" not in inner and "<ol" not in inner:
            inner = re.sub(r"</?p>", " ", inner).strip()
        opening = f'<ol start="{start + k}">' if name == "ol" else "<ul>"
        shown = inner if whole else key(inner)
        short, long = (f"{opening}<li>{words}</li></{name}>" for words in (shown, inner))
        longer = Item(long, lined(inner, inset=30, pad=12), long, k == 0) if shown != inner else None
        yield Item(short, lined(shown, inset=30, pad=12), long, k == 0, longer)


def formula(tex: str) -> Item:
    """A formula by itself: smaller, or on several lines, where it is wide."""
    rows = formulas.formula_lines(tex, WIDE / (WORDS * LARGE))
    widest = max(map(formulas.formula_width, rows)) * WORDS
    size = min(LARGE, max(SMALL, WIDE / widest))
    tall = sum(formulas.formula(row, True).height * formulas.EM * size * WORDS + 26 for row in rows)

    def height(wide: float, scale: float) -> float:
        return tall * scale if widest * size * scale <= wide else float("inf")

    shown = "".join(
        f'<div class="formula" style="font-size:{size:.3f}em"><div class="tex">{html.escape(row)}</div></div>'
        for row in rows
    )
    said = "".join(f"<p>{formulas.formula(row, True).spoken}</p>" for row in rows)
    return Item(shown, height if widest * size <= WIDE else fixed(tall), said)


def question(name: str, words: str, offered: str, advice: str) -> list[Item]:
    """A prediction, which fills its slide."""
    long = " long" if len(plain(words)) > 130 else ""
    return [
        Item(f'<p class="badge">Predict {name}</p>', fixed(50), words=False),
        Item(f'<p class="asked{long}">{words}</p>', fixed(150)),
        Item(_options(offered, large=True), fixed(150), advice),
    ]


def question_again(name: str, words: str, offered: str) -> list[Item]:
    """The same above its answer."""
    rows = lines(plain(offered) + " m" * 4 * offered.count(" / "), 26, WIDE - 40)
    return [
        Item(f'<p class="badge">Answer to {name}</p>', fixed(52), words=False),
        Item(f'<p class="asked">{words}</p>', lined(words, pad=30)),
        Item(_options(offered, large=False), fixed(rows * 58 + 22)),
    ]


def answer(measured: str) -> Item:
    """What was measured."""
    long = len(plain(measured)) > 60
    shown = f'<p class="measured{" long" if long else ""}"><small>Measured</small> {measured}</p>'
    return Item(shown, lined(measured, 32 if long else 44, pad=60, weight=600))


def claim(found: Claim) -> Item:
    """A claim: on the slide its sentence, in the notes its figures and its condition."""
    sentence, condition, figures = map(html.unescape, (found.sentence, found.condition, found.figures))
    return proven(plain(sentence), f"{html.escape(figures)}; {html.escape(condition)}", holds=found.holds)


def proven(sentence: str, proof: str, *, holds: bool = True) -> Item:
    """A sentence with the sign of whether it holds, and its proof, as HTML, in the notes."""
    mark, kind = ("✓", "claim") if holds else ("✗", "claim fails")
    words = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(sentence))
    shown = f'<div class="{kind}"><span class="mark">{mark}</span><span>{words}</span></div>'
    return Item(shown, lined(words, WORDS * 0.9, inset=75, pad=26), f"<p>{mark} {words} ({proof})</p>")


def _options(offered: str, *, large: bool) -> str:
    """What may be answered: a row or a column of choices, or a sentence."""
    choices = offered.removeprefix(IN_ORDER).split(" / ")
    if len(choices) == 1:
        return f'<p class="range">{offered[:1].upper()}{offered[1:]}.</p>' if offered else ""
    order = offered.startswith(IN_ORDER)
    named = [one if order else f"<strong>{chr(ord('A') + k)}</strong>&ensp;{one}" for k, one in enumerate(choices)]
    kind = " column" if large and len(choices) <= 5 and not order else " many" if not large or len(choices) > 8 else ""
    head = '<p class="range">Put these in order.</p>' if order else ""
    return f'{head}<ul class="options{kind}">{"".join(f"<li>{one}</li>" for one in named)}</ul>'
