"""A chapter's slides: what goes on a slide, and where the next one begins, by the rules of the package's table."""

import html
import re
from collections.abc import Iterator, Sequence
from typing import assert_never

from bs4.element import Tag
from nbformat import NotebookNode

from classroom.slides import listings, looks
from classroom.slides.blocks import Block, blocks
from classroom.slides.guide import Guide
from classroom.slides.slide import GAP, SLIM, WIDE, Figure, Item, Slide, together
from classroom.slides.tables import Table, table_html, table_items
from classroom.slides.words import KEPT_SHORT, key, lead, plain, points_elsewhere
from course_lib.lab.chapters import Chapter
from site_builder.notebooks import Picture

LEADING = 175  # pixels of words above a figure at most
SHORT_LIST = 900  # characters of a list whose entries are not shortened
EXERCISE = re.compile(r"<strong>Exercise (\d+)")
EXPLORED = re.compile(r"(?:Explorer: |; )([^=;()]+?) = ")  # the name of a control
LED_TO = ("formula", "picture", "table", "list", "code", "printed")  # what the words before belong to


class Deck:
    """A chapter's slides, in columns: built block by block."""

    def __init__(self, chapter: Chapter, notebook: NotebookNode, guide: Guide) -> None:
        self.chapter, self.guide = chapter, guide
        self.columns: list[list[Slide]] = []
        self._pending: list[Item] = []  # of the slide that is being filled
        self._title = ""
        self._part = ""  # the title of the part, without its number
        self._said_first: list[str] = []  # on the next slide, before all else
        self._offered: dict[str, str] = {}  # what may be answered, by question
        found = list(blocks(notebook))
        for k, block in enumerate(found):
            self._add(block, found[k + 1 :])
        self._flush()

    @property
    def slides(self) -> list[Slide]:
        """All slides, in order."""
        return [slide for column in self.columns for slide in column]

    # Blocks

    def _add(self, block: Block, following: Sequence[Block]) -> None:
        next_kind = following[0].kind if following else ""
        match block.kind:
            case "words" | "list" if self._part == "References":
                self._last.said.append(f"<p>{block.content}</p>" if block.kind == "words" else str(block.content))
            case "heading":
                self._add_heading(block, following)
            case "words":
                self._add_words(block.content, next_kind)
            case "list":
                self._add_list(block.content, next_kind)
            case "formula":
                self._stack(looks.formula(block.content))
            case "picture":
                self._add_picture(*block.content)
            case "table":
                self._add_table(block.content)
            case "question":
                self._add_question(*block.content)
            case "answer":
                self._add_answer(*block.content)
            case "claim":
                self._attach(looks.claim(block.content))
            case "code":
                self._add_code(block.content)
            case "stub":
                self._add_stub(block.content)
            case "printed":
                self._add_printed(block.content)
            case _:
                assert_never(block.kind)

    def _add_heading(self, block: Block, following: Sequence[Block]) -> None:
        self._flush()
        words = plain(block.content)
        if block.level == 1:
            self._start_of_chapter(block.content)
            return
        self._title = block.content
        if block.level == 2:
            self._part = re.sub(r"^\d+\.\s*", "", words)
        number = re.match(r"(\d+(?:\.\d+)?)\.?\s", words)
        minutes = self.guide.minutes(number[1]) if number else ""
        self._said_first = [minutes] if minutes else []
        if block.level <= 3:
            self.columns.append([])
        if self._part == "References":
            where = f"They are listed, with their addresses, at the end of <code>notebooks/{self.chapter.file}</code>."
            self._show(Slide(self._title, [looks.remark(where)]))
        elif self._part == "Exercises":
            self._add_agenda([_title_of_exercise(one.content) for one in _until_part(following) if _is_exercise(one)])
        elif block.level == 2 and following and _is_section(following[0]):
            self._add_agenda([one.content for one in _until_part(following) if _is_section(one)])

    def _start_of_chapter(self, heading: str) -> None:
        found = re.match(r"(\d+) · (.*)", heading, re.DOTALL)
        number, title = (found[1], found[2]) if found else ("", heading)
        self._title, self._said_first = "", []
        self.columns.append([])
        self._show(Slide("", [looks.chapter_title(number, title)], kind="title"))

    def _add_agenda(self, titles: Sequence[str]) -> None:
        if titles:
            self._show(Slide(self._title, [looks.agenda(titles)], kind="part"))

    def _add_words(self, content: str, next_kind: str) -> None:
        if self._on_first and content.startswith("<em>"):
            self._last.above.append(looks.promise(content))
            return
        self._leave_first()
        if EXERCISE.match(content):
            self._flush()
            self._title = _title_of_exercise(content)
            task = content.partition("</strong>")[2].strip()
            self._stack(looks.task(task, content, leads=next_kind in ("table", "list")))
        elif self._part == "Exercises" and points_elsewhere(content):
            self._last.said.append(f"<p>{content}</p>")
        elif self._part == "Exercises":
            self._stack(looks.task(content, content))
        elif self._part == "What we showed":
            self._stack(looks.paragraph(content, content))
        elif next_kind in LED_TO:
            whole = next_kind in ("formula", "list") and len(plain(content)) <= KEPT_SHORT
            self._stack(looks.paragraph(content if whole else lead(content), content, leads=True))
        else:
            self._attach(looks.paragraph(key(content), content))

    def _add_list(self, content: Tag, next_kind: str) -> None:
        self._leave_first()
        whole = len(plain(str(content))) <= SHORT_LIST or self._part == "Exercises"
        for item in looks.listed(content, whole=whole):
            self._stack(item)
        if next_kind == "formula":
            self._pending[-1].leads = True

    def _add_picture(self, picture: Picture, explorer: str) -> None:
        figure = Figure(picture)
        if self._on_first:
            self._last.figure = figure
            return
        slide = Slide(self._title, figure=figure, kind="figure")
        wide, scale, most = float(WIDE), 1.0, float(LEADING)
        if figure.beside:
            wide, scale = WIDE - GAP - figure.beside, SLIM
            most = slide.free if self._part == "Exercises" else LEADING * 2
        while self._pending:
            run = _last_run(self._pending)  # a list is not torn apart
            if not all(item.words for item in run) or together([*run, *slide.above], wide, scale) > most:
                break
            slide.above[:0] = run
            del self._pending[-len(run) :]
        self._flush()
        if explorer:
            moved = ", ".join(EXPLORED.findall(explorer))
            slide.below.append(looks.hint(f"In the notebook this figure moves: {moved}."))
        self._show(slide)

    def _add_table(self, table: Table) -> None:
        if table.says("time to read"):
            self.columns[0][0].said.append(table_html(table, table.rows))
        elif table.says("exercise", "title", "state"):
            return  # the learner's own progress
        elif table.says("claim", "condition", "measured"):
            for claim, condition, measured in ([cell.html for cell in row] for row in table.rows):
                self._stack(looks.proven(plain(claim), f"{condition} · {measured}"))
        else:
            leading = together([item for item in self._pending if item.leads])
            items = table_items(table.upright(), Slide(self._title).free, leading)
            put = self._attach if len(items) == 1 else self._stack
            for item in items:
                put(item)

    def _add_question(self, name: str, words: str, offered: str) -> None:
        self._flush()
        self._offered[name] = offered
        self._show(Slide(self._title, looks.question(name, words, offered, self.guide.question(name)), kind="question"))

    def _add_answer(self, name: str, words: str, measured: str) -> None:
        self._flush()
        again = looks.question_again(name, words, self._offered.get(name, ""))
        self._show(Slide(self._title, again, below=[looks.answer(measured)], kind="answer"))

    def _add_code(self, code: str) -> None:
        for piece in filter(str.strip, listings.pieces(listings.without_docstrings(code))):
            self._stack(listings.code_item(piece))

    def _add_stub(self, code: str) -> None:
        item = listings.code_item(code)
        alone = not self._pending and not self._last.has_room(item)
        if len(code.splitlines()) <= listings.MOST_LINES and ("def " in code or not alone):
            self._attach(item)  # a name to fill in needs no slide of its own

    def _add_printed(self, text: str) -> None:
        if "tuning included" in text:  # of a recorded study: when and where it ran
            self._pending.append(looks.paragraph("", html.escape(text)))
        elif listings.line_count(text) <= listings.MOST_LINES:
            self._attach(listings.printed_item(text))

    # Where a block goes

    @property
    def _last(self) -> Slide:
        return self.columns[-1][-1]

    @property
    def _on_first(self) -> bool:
        """Whether nothing came yet but the title and what is said about the chapter."""
        return len(self.columns) == 1 and len(self.columns[0]) == 1 and not self._pending and self._title == ""

    def _leave_first(self) -> None:
        if self._on_first:
            self._title = "Before we start"

    def _stack(self, item: Item) -> None:
        """Put an item on the slide that is being filled; what leads to it goes with it to the next where it must."""
        full = not Slide(self._title, self._pending).has_room(item)
        if full and any(one.html for one in self._pending):
            carried: list[Item] = []
            while self._pending and self._pending[-1].leads:
                carried.insert(0, self._pending.pop())
            self._flush()
            self._pending = carried
            if not Slide(self._title, carried).has_room(item):
                self._flush()
        self._pending.append(item)

    def _attach(self, item: Item) -> None:
        """Put an item below the last figure or answer if it fits there."""
        last = self._last if self.columns and self.columns[-1] else None
        goes_on = last and not self._pending and last.kind in ("figure", "answer") and last.title == self._title
        if last and goes_on and last.has_room(item):
            last.below.append(item)
        else:
            self._stack(item)

    def _flush(self) -> None:
        """Show the slide that is being filled; what is only said goes to the last slide, else to the next."""
        said = [item.said for item in self._pending]
        if any(item.html for item in self._pending):
            slide = Slide(self._title, self._pending)
            for k, item in enumerate(slide.above):  # a slide with a lone sentence does better with the paragraph
                with_it = [*slide.above[:k], item.longer or item, *slide.above[k + 1 :]]
                if together(with_it) <= slide.free * 0.5:
                    slide.above = with_it
            self._show(slide)
        elif self.columns and self.columns[-1]:
            self._last.said += said
        else:
            self._said_first += said
        self._pending = []

    def _show(self, slide: Slide) -> None:
        slide.said = [*self._said_first, *slide.said]
        self._said_first = []
        self.columns[-1].append(slide)


def _until_part(following: Sequence[Block]) -> Iterator[Block]:
    for block in following:
        if block.kind == "heading" and block.level <= 2:
            return
        yield block


def _is_section(block: Block) -> bool:
    return block.kind == "heading" and block.level == 3


def _is_exercise(block: Block) -> bool:
    return block.kind == "words" and bool(EXERCISE.match(block.content))


def _title_of_exercise(content: str) -> str:
    return re.sub(r"^<strong>", "", content.partition("</strong>")[0]).rstrip(".: ")


def _last_run(items: Sequence[Item]) -> list[Item]:
    """The last item, with all others of its list and what leads to it."""
    count = 1
    while count < len(items):
        before, tag = items[-count - 1], items[-count].html[:3]
        if not before.leads and not (tag in ("<ul", "<ol") and before.html.startswith(tag)):
            break
        count += 1
    return list(items[-count:])
