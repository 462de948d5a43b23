"""nbgrader's autograding, with the judge in place of its execution of the submission in a kernel.

nbgrader keeps the books: who handed in what, points, comments, what is still to be looked at. These preprocessors are
named in the settings that `classroom.course` makes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode
from nbgrader import utils
from nbgrader.api import Gradebook
from nbgrader.preprocessors import NbGraderPreprocessor, OverwriteCells, SaveAutoGrades
from traitlets import Float, Unicode

from classroom.judge.judge import Answer, Patience, Verdict, judge
from classroom.judge.slices import needed
from classroom.student_copy import HIDDEN, exercise_in, exercise_of, exercises

EARNED = "classroom_earned"  # in the resources, from `Judge` to `SaveMarks`: points by grade_id, None if by hand
Resources = dict


class RestoreCells(OverwriteCells):
    """As nbgrader's, but for all that a submission may say of its own cells.

    What a cell is (a check, an answer, worth so many points) is taken from the gradebook, by its name; a cell that the
    gradebook does not know, or that is there twice, is an ordinary one. A check that was deleted comes back, even
    where the cell before it is gone, too.
    """

    def preprocess(self, nb: NotebookNode, resources: Resources) -> tuple[NotebookNode, Resources]:
        """Put the cells right, then their sources."""
        about = resources["nbgrader"]
        with Gradebook(about["db_url"]) as book:
            known = _known_cells(book.find_notebook(about["notebook"], about["assignment"]))
        for cell in reversed(nb.cells):  # of two with one name the last counts, as in nbgrader
            said = cell.metadata.pop("nbgrader", None)
            name = said.get("grade_id") if isinstance(said, dict) else None
            if isinstance(name, str) and name in known:
                cell.metadata["nbgrader"] = NotebookNode(known.pop(name))
        return super().preprocess(nb, resources)

    def add_missing_grade_cells(self, nb: NotebookNode, resources: Resources) -> tuple[NotebookNode, Resources]:
        """Add them at the end."""
        ours = self.gradebook.find_notebook(self.notebook_id, self.assignment_id)
        sources = {cell.name: cell for cell in ours.source_cells}
        editable = {cell.name for cell in ours.solution_cells}
        there = {cell.metadata.nbgrader["grade_id"] for cell in nb.cells if utils.is_grade(cell)}
        for cell in ours.grade_cells:
            if cell.name not in there:
                source, solution = sources[cell.name], cell.name in editable
                restored = self.missing_cell_transform(source, cell.max_score, is_solution=solution)
                nb.cells.append(NotebookNode(restored, id=f"restored-{cell.name}"))
        return nb, resources


def _known_cells(ours: Any) -> dict[str, dict[str, Any]]:
    """What nbgrader's metadata says of each cell of a notebook, by its name, as the gradebook has it."""
    worth = {cell.name: cell.max_score for cell in ours.grade_cells}
    solutions = {cell.name for cell in ours.solution_cells}
    known = {}
    for cell in ours.source_cells:
        known[cell.name] = {
            "schema_version": 3, "grade_id": cell.name, "cell_type": cell.cell_type, "checksum": cell.checksum,
            "locked": cell.locked, "grade": cell.name in worth, "solution": cell.name in solutions, "task": False,
        }  # fmt: skip
        if cell.name in worth:
            known[cell.name]["points"] = worth[cell.name]
    return known


class Judge(NbGraderPreprocessor):
    """Judges the cells with a check; nothing of a submission runs in this process, nor in a kernel."""

    chapters = Unicode("notebooks", help="The folder with the course's own notebooks").tag(config=True)
    exercise_seconds = Float(30, help="How long one exercise may take").tag(config=True)
    design_seconds = Float(180, help="How long a design may be trained").tag(config=True)

    def preprocess(self, nb: NotebookNode, resources: Resources) -> tuple[NotebookNode, Resources]:
        """Put a verdict under each check, and what it earned into the resources."""
        path = Path(self.chapters) / f"{resources['nbgrader']['notebook']}.ipynb"
        patience = Patience(exercise=self.exercise_seconds, design=self.design_seconds)
        verdicts = verdicts_on(nb, nbformat.read(path, as_version=4), patience=patience)
        earned: dict[str, float | None] = {}
        for cell in nb.cells:
            if utils.is_grade(cell) and not utils.is_solution(cell):
                about = cell.metadata.nbgrader
                verdict = verdicts.get(exercise_in(about["grade_id"])[0])
                earned[about["grade_id"]] = verdict.points(float(about["points"])) if verdict else 0.0
                cell.source = cell.source.partition(HIDDEN.splitlines()[1])[0].rstrip()  # no news to a learner
                cell.outputs = _shown(verdict) if verdict else []
                cell.execution_count = None
        resources[EARNED] = earned
        return nb, resources


def verdicts_on(
    submission: NotebookNode, chapter: NotebookNode, *, patience: Patience | None = None
) -> Mapping[str, Verdict]:
    """The verdicts on a submitted notebook by exercise, as the chapter asks for them; none on cells that are gone."""
    sources = {}
    for cell in submission.cells:
        exercise, part = exercise_in(cell.metadata.get("nbgrader", {}).get("grade_id", ""))
        if part == "answer" and cell.cell_type == "code":
            sources[exercise] = cell.source
    asked = [exercise for exercise in exercises(chapter) if exercise.number in sources]
    answers = [Answer(each.number, sources[each.number], each.answer, each.stub) for each in asked]
    code = [cell.source for cell in chapter.cells if cell.cell_type == "code" and not exercise_of(cell.source)]
    return judge(answers, needed(code, sources.values()), patience=patience)


def _shown(verdict: Verdict) -> list[NotebookNode]:
    said = {"text/plain": str(verdict)}
    if not verdict.by_hand:
        said["text/html"] = verdict.outcome._repr_html_()
    return [nbformat.v4.new_output("display_data", said)]


class SaveMarks(SaveAutoGrades):
    """As nbgrader's, but points come from `Judge` alone, a guess needs no look, and what is left by hand needs one."""

    def _add_score(self, cell: NotebookNode, resources: Resources) -> None:
        super()._add_score(cell, resources)
        name = cell.metadata["nbgrader"]["grade_id"]
        grade = self.gradebook.find_grade(name, self.notebook_id, self.assignment_id, self.student_id)
        if name.startswith("guess-"):
            grade.auto_score, grade.needs_manual_grade = 0.0, False
        elif name in resources[EARNED]:
            grade.auto_score = resources[EARNED][name]
            grade.needs_manual_grade = grade.auto_score is None or grade.manual_score is not None
        self.gradebook.db.commit()
