"""A slide: what stands on it, and how much room that takes.

Heights and widths are pixels of a page of 1280 by 720. They are counted before anything is drawn, with the sizes that
``deck.css`` has.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from classroom.slides.letters import lines
from classroom.slides.words import plain, spoken, typeset
from site_builder.notebooks import Picture

WIDE, FREE = 1152, 636  # between the margins
WORDS = 27  # size of letters
SCALES = (1.3, 1.2, 1.1, 1.0)  # of the words on a slide that has little else
ROOMY = 0.8  # how much smaller a figure may get for what stands below it
BESIDE, GAP, SLIM = 2.3, 36, 24 / 27  # words stand beside a figure that is less wide than this times its height
LARGEST = 2.0  # how far a figure is enlarged

Height = Callable[[float, float], float]


@dataclass
class Item:
    """What stands on a slide.

    Attributes
    ----------
    height : its pixels, by the width that it has and by the scale of the words.
    said : what is said about it, as HTML.
    leads : whether it belongs to what comes next.
    longer : the same at more length, for a slide that has the room.
    words : whether it can be enlarged, and stand in a narrow column.
    """

    html: str
    height: Height
    said: str = ""
    leads: bool = False
    longer: Item | None = None
    words: bool = True


def fixed(height: float) -> Height:
    """The height of what no width and no scale changes."""
    return lambda wide, scale: height


def lined(fragment: str, size: float = WORDS, inset: float = 0, pad: float = 14, weight: int = 400) -> Height:
    """The height of words of a size, with ``inset`` pixels less for them in a line and ``pad`` of margin below."""
    parts = [plain(part) for part in fragment.split("<br>")]

    def height(wide: float, scale: float) -> float:
        at = size * scale
        count = sum(lines(part, at * 1.03, wide - inset * scale, weight) for part in parts)
        return count * at * 1.37 + pad * scale + 1

    return height


def together(items: Sequence[Item], wide: float = WIDE, scale: float = 1.0) -> float:
    """The height of items one below the other."""
    return sum(item.height(wide, scale) for item in items)


@dataclass(frozen=True)
class Figure:
    """A figure on a slide."""

    picture: Picture

    @property
    def beside(self) -> float:
        """How wide it is with words beside it; 0 where they do better above and below."""
        shape = self.picture.width / self.picture.height
        return 0.0 if shape > BESIDE else min(WIDE * 0.62, 545 * shape, LARGEST * self.picture.width)

    @property
    def enlarged(self) -> float:
        """How many times its own size it can have."""
        return min(LARGEST, WIDE / self.picture.width)

    @property
    def tall(self) -> float:
        """How high it is where it takes all of the width that it can use."""
        return self.enlarged * self.picture.height

    def html(self, style: str = "") -> str:
        """Its element, which holds the picture itself."""
        wide, high = self.picture.width * self.enlarged, self.picture.height * self.enlarged
        return (
            f"<figure{style}>"
            f'<img src="data:image/png;base64,{base64.b64encode(self.picture.png).decode()}" '
            f'alt="{html.escape(self.picture.alt, quote=True)}" '
            f'style="max-width:{wide:.0f}px;max-height:{high:.0f}px"></figure>'
        )


@dataclass
class Slide:
    """One slide. What is ``above`` and ``below`` a figure stands in a column beside it if it is not a wide one."""

    title: str
    above: list[Item] = field(default_factory=list)
    figure: Figure | None = None
    below: list[Item] = field(default_factory=list)
    kind: Literal["words", "figure", "question", "answer", "title", "part"] = "words"
    said: list[str] = field(default_factory=list)

    @property
    def items(self) -> list[Item]:
        """All that stands on it but its title and its figure."""
        return [*self.above, *self.below]

    @property
    def free(self) -> float:
        """The height below the title, its margins and the rule under it."""
        return FREE - (lines(plain(self.title), 36, WIDE, 600) * 41.4 + 34 if self.title else 0)

    def has_room(self, item: Item) -> bool:
        """Whether an item fits."""
        items = [*self.items, item]
        if self.figure is None:
            return together(items) <= self.free
        if self.figure.beside:
            return item.words and together(items, WIDE - GAP - self.figure.beside, SLIM) <= self.free
        return together(items) + min(self.figure.tall, self.free) * ROOMY <= self.free

    def html(self) -> str:
        """What is inside of the slide."""
        title = f"<h2>{typeset(self.title)}</h2>" if self.title else ""
        above, below = _joined(self.above), _joined(self.below)
        if self.figure is None:
            below = f'<div class="fragment">{below}</div>' if self.kind == "answer" else below
            return f'{title}<div class="body" style="font-size:{WORDS * self._scale():.1f}px">{above}{below}</div>'
        if self.figure.beside and (above or below) and self.kind == "figure":
            beside = f'<div class="body" style="font-size:{WORDS * SLIM:.0f}px">{above}{below}</div>'
            figure = self.figure.html(f' style="flex:0 0 {self.figure.beside:.0f}px"')
            return f'{title}<div class="beside">{beside}{figure}</div>'
        above, below = (f'<div class="body">{part}</div>' if part else "" for part in (above, below))
        return f"{title}{above}{self.figure.html()}{below}"

    def _scale(self) -> float:
        if self.kind != "words":
            return 1.0
        return next((scale for scale in SCALES if together(self.items, WIDE, scale) <= self.free * 0.94), 1.0)

    def notes(self) -> str:
        """What is said about it, as HTML."""
        return spoken("\n".join(part for part in [*self.said, *(item.said for item in self.items)] if part))


def _joined(items: Sequence[Item]) -> str:
    """The items' HTML; those of one list become one list."""
    made = typeset("\n".join(item.html for item in items if item.html))
    return re.sub(r"</(ul|ol)>\s*<\1(?: start=\"\d+\")?>", "", made)
