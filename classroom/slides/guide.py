"""What the instructor's guide says of a section and of a question: a page of ``classroom/guide``, read line by line."""

import html
import re
from collections.abc import Sequence


class Guide:
    """The minutes of a chapter's plan by section, and its advice on each question, as HTML."""

    def __init__(self, text: str) -> None:
        self._plan: dict[str, list[str]] = {}
        self._advice: dict[str, str] = {}
        part = ""
        head: list[str] = []
        for line in text.splitlines():
            if line.startswith("## "):
                part, head = line.removeprefix("## "), []
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
            if cells and not head:
                head = cells
            elif part == "Plan" and len(cells) == 6:
                self._add_plan(head, cells)
            elif part == "The questions to ask":
                self._add_advice(head, cells, line)

    def minutes(self, section: str) -> str:
        """The minutes of a section, as the plan names it; empty where it does not."""
        return "".join(self._plan.get(section, []))

    def question(self, key: str) -> str:
        """The advice on a question; empty where there is none."""
        return self._advice.get(key, "")

    def _add_plan(self, head: Sequence[str], cells: Sequence[str]) -> None:
        *_, what, where, how = cells
        sections = re.findall(r"\[(\d+(?:\.\d+)?)", where)
        if not sections:
            return
        first, *others = sections
        times = "; ".join(f"{plan}: {cells[k]}" for k, plan in enumerate(head[:3]) if cells[k] not in ("–", ""))
        together = f", with {', '.join(others)}" if others else ""
        words = f"Minutes (in a plan of {times}){together}: {what}; {how}."
        self._plan.setdefault(first, []).append(_strong(words))

    def _add_advice(self, head: Sequence[str], cells: Sequence[str], line: str) -> None:
        if cells and (found := re.match(r"\d\d\.[a-z]", cells[0])):
            said = "; ".join(f"{name}: {cell}" for name, cell in zip(head[1:], cells[1:], strict=False))
            self._advice[found[0]] = _strong(said[:1].upper() + said[1:])
        elif found := re.match(r"- \*\*(\d\d\.[a-z])[^*]*\*\*\s*(.*)", line):
            self._advice[found[1]] = _strong(found[2].replace("*", ""))


def _strong(words: str) -> str:
    return f"<p><strong>{html.escape(words)}</strong></p>"
