"""A chapter as a deck of slides: one HTML file that needs no network, out of the stored notebook.

    python -m classroom.slides 02 [--out FOLDER] [--pdf]     ->  FOLDER/02_optimizers.slides.html, and .slides.pdf

Nothing is executed. What a slide shows is chosen by rule:

| in the chapter | on the slides |
| --- | --- |
| a heading | a new column of slides; a part with sections first lists them |
| a figure, a table, a formula, a list | stands there, with the words that lead to it |
| other paragraphs | their first sentence, and what their author emphasised |
| a prediction | a slide that asks, with what may be answered; its answer comes later, and only after one more key |
| a claim | its sentence; its figures and its condition are notes |
| code | the functions of "The code" and the library's source where it is printed, if short |
| an exercise | its task and the code to start from |
| set-up, hints, solutions, references | nothing |

All prose is in the speaker notes (key S), under the minutes and the advice of ``classroom/guide``. Heights are counted
here, with the widths of the very letters that the deck carries, so that nothing runs over the edge of 1280 by 720.

| module | what it does |
| --- | --- |
| `writing` | a chapter's number -> its deck, the HTML file, the PDF: what others call |
| `blocks` | a notebook -> its blocks: headings, paragraphs, figures, questions, answers … |
| `guide` | what the instructor's guide says of a section and of a question |
| `deck` | the rules: blocks -> columns of slides |
| `looks` | how a block looks on a slide, a function for each kind |
| `tables`, `listings` | the same for tables and for code, which are measured, and cut where they are long |
| `slide` | a slide, what stands on it, and how much room there is |
| `words` | a paragraph: its text, its sentences, and those of them that a slide shows |
| `formulas`, `letters` | how wide and how high they are; the fonts of a deck |
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "docs"))  # site_builder, whose formulas, figures and claims are those of the slides too


class Refused(Exception):
    """What was asked for cannot be made; the words say why."""
