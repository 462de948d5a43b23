"""The reference: what becomes of docstrings case by case, what has an entry, what a signature says, what is written."""

import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from functools import lru_cache
from io import StringIO
from pathlib import Path
from types import ModuleType

import pytest
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import docutils_namespace

from course_lib import lab
from course_lib.lab.chapters import CHAPTERS, MODULES
from site_builder import api, docstrings, sources
from site_builder.sources import Index

ROOT = Path(__file__).resolve().parents[2]
THERE = [name for name in MODULES if (ROOT / "course_lib" / name / "__init__.py").is_file()]


def text(source: str, **names: str) -> str:
    """A docstring as it is converted, where only ``names`` stand for anything."""
    lines = textwrap.dedent(source).strip("\n").splitlines()
    return "\n".join(docstrings.converted(lines, lambda name: names.get(name))).strip()


# ---- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("What `fit` does.", "What :py:obj:`fit` does."),
        ("What ``fit`` does.", "What :py:obj:`fit` does."),
        ("What `torch.optim.SGD` does.", "What ``torch.optim.SGD`` does."),
        ("A tensor ``[N, D]``, or ``x.fit``.", "A tensor ``[N, D]``, or ``x.fit``."),
        ("As in `a + b`, say.", "As in ``a + b``, say."),
        ("A formula :math:`fit`.", "A formula :math:`fit`."),
        ("Already :py:obj:`fit <x.fit>`.", "Already :py:obj:`fit <x.fit>`."),
        ("Two lines ``a +\nb`` long.", "Two lines ``a +\nb`` long."),
        ("Frantar 2022, arXiv:2208.11580.", "Frantar 2022, `arXiv:2208.11580 <https://arxiv.org/abs/2208.11580>`__."),
        ("The literal ``arXiv:2208.11580``.", "The literal ``arXiv:2208.11580``."),
        ("θ ← θ − η·g, *in italics*", "θ ← θ − η·g, *in italics*"),
    ],
)
def test_text(source: str, expected: str) -> None:
    assert text(source, fit=":py:obj:`fit`") == expected


def test_an_argument_is_no_link_but_where_it_is_meant_as_one() -> None:
    lines = ["``data`` and `data` are two."]
    found = docstrings.converted(lines, lambda name: f":py:mod:`{name}`", frozenset({"data"}))
    assert found[0] == "``data`` and :py:mod:`data` are two."


# ---- tables ----------------------------------------------------------------------------------------------------------


HAN = "`arXiv:1506.02626 <https://arxiv.org/abs/1506.02626>`__"


def rows(converted: str) -> list[list[str]]:
    found: list[list[str]] = []
    for line in converted.splitlines():
        if match := re.match(r"   (\* | {2})- ?(.*)$", line):
            if match[1] == "* ":
                found.append([])
            found[-1].append(match[2])
    return found


def test_a_markdown_table() -> None:
    found = text(
        r"""
        Kinds of it:

        | kind | what it is |
        | --- | :---: |
        | `Method` | a ``rule``, a \| b |
        | Reading |

        And more.
        """,
        Method=":py:obj:`Method`",
        Reading=":py:obj:`Reading`",
        kind="no link in a head",
    )
    assert found.startswith("Kinds of it:\n\n.. list-table::\n   :header-rows: 1\n")
    assert found.endswith("\n\nAnd more.")
    expected = [["kind", "what it is"], [":py:obj:`Method`", "a ``rule``, a | b"], [":py:obj:`Reading`", ""]]
    assert rows(found) == expected


def test_a_table_between_rulers() -> None:
    """A line without a first cell goes on, and so does one below a comma; names of the first column are links."""
    found = text(
        """
        =========================  ===================  ======================
        name                       what it does         source
        =========================  ===================  ======================
        *criteria*                 *what matters*
        magnitude, …               its size; a wanda    Han et al. 2015,
                                                        arXiv:1506.02626
        obs,                       curvature            Hassibi & Stork
        wanda                                           1992
        SGD(momentum)              a sum                Polyak
        measure, …_threads         no name of ours      –
        =========================  ===================  ======================
        """,
        **{name: f":x:`{name}`" for name in ("criteria", "magnitude", "obs", "wanda", "SGD", "momentum", "_threads")},
    )
    assert ":header-rows: 1" in found
    assert rows(found)[1:] == [
        [":x:`criteria`", "*what matters*", ""],
        [
            ":x:`magnitude`, …",
            "its size; a wanda",
            "Han et al. 2015, `arXiv:1506.02626 <https://arxiv.org/abs/1506.02626>`__",
        ],
        [":x:`obs`, :x:`wanda`", "curvature", "Hassibi & Stork 1992"],
        [":x:`SGD`\\ (:x:`momentum`)", "a sum", "Polyak"],
        ["measure, …_threads", "no name of ours", "–"],
    ]


def test_a_table_of_one_row_has_no_head() -> None:
    found = text("====  ======\n``a``  b\n====  ======".replace("``a``  b", "a     b"))
    assert ":header-rows: 0" in found
    assert rows(found) == [["a", "b"]]


# ---- examples and lists ----------------------------------------------------------------------------------------------


def test_an_indented_example_is_a_block_of_code() -> None:
    found = text("Call it:\n\n    x = f(`y`)\n\n    g(…)\n\nThen more.".replace("f(`y`)", "f('`y`')"), y="a link")
    assert found == "Call it:\n\n.. code-block:: python\n\n   x = f('`y`')\n\n   g(…)\n\nThen more."


def test_what_is_no_python_is_a_block_of_text() -> None:
    assert text("Start it:\n\n    make study NB=02  # all of it").splitlines()[2] == ".. code-block:: text"


@pytest.mark.parametrize(
    "source",
    [
        "So::\n\n    a = `b`",
        "So\n\n.. math:: a_{`b`}\n\n    c `b`\n\nand on.",
        ">>> a = '`b`'\n'`b`'",
        "- one;\n- two\n  goes on\n\n  and on.",
    ],
)
def test_what_sphinx_reads_anyway_stays(source: str) -> None:
    assert text(source, b="a link") == source


def test_a_list_may_begin_below_its_sentence() -> None:
    assert text("So, for one seed:\n- the same;\n- a larger one\n  begins alike.\n\nOn.") == (
        "So, for one seed:\n\n- the same;\n- a larger one\n  begins alike.\n\nOn."
    )


# ---- sections --------------------------------------------------------------------------------------------------------


def test_sections_are_fields_and_text_goes_on_after_them() -> None:
    found = text(
        """
        What it does.

        Parameters
        ----------
        x, y : a batch, ``[B]``
            of both.
        *args
            Further `fit`.
        ask : ``(rule) -> result``
            How it is put.

        Source: Gupta 2018.

        Returns
        -------
        A table, one row
        for each.

        Raises
        ------
        Diverged : the loss became NaN.
        ValueError, TypeError : something else: see there.
        """,
        fit=":py:obj:`fit`",
        Diverged=":py:obj:`Diverged`",
    )
    assert found == inspect.cleandoc(
        r"""
        What it does.

        :Parameters:
           * **x**, **y** – a batch, ``[B]``
             of both.
           * **\*args** – Further :py:obj:`fit`.
           * **ask** (``(rule) -> result``) – How it is put.

        Source: Gupta 2018.

        :Returns:
           A table, one row
           for each.

        :Raises:
           * :py:obj:`Diverged` – the loss became NaN.
           * :py:exc:`ValueError`, :py:exc:`TypeError` – something else: see there.
        """
    )


def test_returned_values_with_names_are_a_list() -> None:
    found = text("Returns\n-------\nimages : uint8\nlabels : int64")
    assert found == ":Returns:\n   * **images** – uint8\n   * **labels** – int64"


# ---- what has an entry -----------------------------------------------------------------------------------------------


def homes(index: Index) -> dict[tuple[str, str], str]:
    return {(file, entry.name): entry.path for file in index.sources for entry in index.entries_of(file)}


@pytest.mark.parametrize("name", THERE)
def test_every_name_that_a_technique_exports_has_an_entry(name: str) -> None:
    index = api.index_of()
    module = importlib.import_module(f"course_lib.{name}")
    documented = set(homes(index).values())
    for exported in module.__all__:
        origin = index.origin(module.__name__, exported)
        entry = origin and index.entry(*origin)
        assert entry, f"{name}.{exported}"
        assert entry.path in documented
        assert getattr(importlib.import_module(entry.path.rpartition(".")[0]), exported) is getattr(module, exported)


def test_every_name_that_the_laboratory_exports_has_an_entry() -> None:
    index = api.index_of()
    documented = set(homes(index).values())
    for name in lab.__all__:
        if isinstance(getattr(lab, name), ModuleType):
            assert f"course_lib.lab.{name}" in index.modules
        else:
            assert f"course_lib.lab.{name}" in documented, name


def test_every_path_can_be_imported_and_none_is_there_twice() -> None:
    found = homes(api.index_of())
    assert len(set(found.values())) == len(found)
    for path in found.values():
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name), path


def test_every_page_is_reached_from_the_landing_page() -> None:
    chapters = {chapter.module: chapter for chapter in CHAPTERS if chapter.module}
    index = api.index_of()
    found = api.pages(index, chapters, {chapter.number for chapter in CHAPTERS})
    landing = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    lists = [name for name in found if name.endswith(".txt")]
    assert sorted(re.findall(r"\{include\} api/(\S+)", landing)) == sorted(lists)
    reached = {name for name in lists for name in re.findall(r" </api/(\S+)>$", found[name], re.MULTILINE)}
    reached |= {
        below
        for name in tuple(reached)
        for below in re.findall(r"^   \S.* <(\S+)>$", found[f"{name}.rst"], re.MULTILINE)
    }
    assert reached == {name.removesuffix(".rst") for name in found if name.endswith(".rst")}
    for name in THERE:
        chapter = chapters[name]
        for page in (page for page in reached if page.split(".")[0] == name):
            assert f"</chapters/{chapter.nn}_{chapter.name}>" in found[f"{page}.rst"]


# ---- a package made for the purpose ----------------------------------------------------------------------------------

FILES = {
    "__init__.py": "",
    "lab/__init__.py": """
        \"\"\"The laboratory.\"\"\"
        from toy_lib.lab.training import fit
        __all__ = ["fit"]
    """,
    "lab/training.py": '''
        """The loop that all share."""
        from __future__ import annotations
        from collections.abc import Callable
        from dataclasses import dataclass, field
        import os.path
        import collections.abc as abstract
        from pathlib import Path

        Objective = Callable[[float], float]
        """``x -> loss``."""

        Inner = Path | os.PathLike | abstract.Sized | None

        class Diverged(RuntimeError):
            """The loss became NaN."""

        class Row:
            """One of a history, which nothing but it speaks of."""

        @dataclass(frozen=True)
        class History:
            """What a run leaves behind."""

            losses: list[float] = field(default_factory=list)
            epochs: int = 0
            """How many `fit` finished."""

            def frame(self) -> dict[str, Row]:
                """The history as a table; ``losses`` are in it, and `missing` is not."""
                return {}

        def tell(history: History) -> None:
            """Nothing for a reader."""

        def fit(x: float, objective: Objective, *, path: Inner = None, tell: Callable[..., None] = print) -> History:
            """Train; see ``History.frame``, and ``magnitude`` nowhere.

            Raises
            ------
            Diverged : it became NaN.
            """
            return History()
    ''',
    "lab/files.py": '''
        """Files."""
        def replaced(path: str) -> None:
            """Written beside, then put in place."""
        def undocumented() -> None: ...
    ''',
    "lab/doors.py": '''
        """For the laboratory alone."""
        def check() -> None:
            """Check."""
    ''',
    "pruning/__init__.py": '''
        """Pruning: fewer weights. Chapter 8.

        ==========  ============
        name        what it does
        ==========  ============
        *masks*     *which*
        mask        zeros
        magnitude   size
        ==========  ============
        """
        from toy_lib.lab.training import History
        from toy_lib.pruning.criteria import criteria, magnitude
        from toy_lib.pruning.masks import mask
        __all__ = ["History", "criteria", "magnitude", "mask"]
    ''',
    "pruning/criteria.py": '''
        """Criteria: how much a weight matters."""
        from toy_lib.lab.training import History, fit

        def magnitude(w: float) -> History:
            """The size, as `mask`, ``fit`` and `torch.abs` have it."""
            return fit(w, abs)

        def criteria() -> None:
            """Named as its file."""
    ''',
    "pruning/masks.py": '''
        """Masks."""
        def mask(w: float) -> float:
            """Zero, or ``magnitude``; ``w`` itself."""
            return w

        def helper() -> None:
            """Not exported."""
    ''',
    "checks/__init__.py": "raise RuntimeError",
}


def make(folder: Path, **files: str) -> Path:
    for name, source in files.items():
        path = folder / "toy_lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source).lstrip("\n"), encoding="utf-8")
    return folder / "toy_lib"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return make(tmp_path, **FILES)


def index_at(package: Path) -> Index:
    return Index(package, ("schedules", "pruning"), "lab", frozenset({"doors"}))


def test_what_is_documented_and_how_it_is_imported(package: Path) -> None:
    index = index_at(package)
    assert index.modules == ["toy_lib.pruning", "toy_lib.lab.files", "toy_lib.lab.training"]
    assert homes(index) == {
        ("toy_lib.lab.files", "replaced"): "toy_lib.lab.files.replaced",
        ("toy_lib.lab.training", "Objective"): "toy_lib.lab.training.Objective",
        ("toy_lib.lab.training", "Diverged"): "toy_lib.lab.training.Diverged",
        ("toy_lib.lab.training", "Row"): "toy_lib.lab.training.Row",
        ("toy_lib.lab.training", "History"): "toy_lib.lab.training.History",
        ("toy_lib.lab.training", "fit"): "toy_lib.lab.fit",
        ("toy_lib.pruning.criteria", "magnitude"): "toy_lib.pruning.magnitude",
        ("toy_lib.pruning.criteria", "criteria"): "toy_lib.pruning.criteria",
        ("toy_lib.pruning.masks", "mask"): "toy_lib.pruning.mask",
    }
    in_order = [entry.name for entry in index.entries_of("toy_lib.lab.training")]
    assert in_order == ["Objective", "Diverged", "Row", "History", "fit"]


def test_what_names_stand_for(package: Path) -> None:
    link = index_at(package).link
    criteria, training = "toy_lib.pruning.criteria", "toy_lib.lab.training"
    assert link("mask", criteria) == ":py:obj:`mask <toy_lib.pruning.mask>`"
    assert link("mask()", criteria) == ":py:obj:`mask() <toy_lib.pruning.mask>`"
    assert link("fit", "toy_lib.pruning.masks") == ":py:obj:`fit <toy_lib.lab.fit>`"
    assert link("History.frame", training) == ":py:obj:`History.frame <toy_lib.lab.training.History.frame>`"
    assert link("frame", training, "History") == ":py:obj:`frame <toy_lib.lab.training.History.frame>`"
    assert link("pruning.mask", training) == ":py:obj:`pruning.mask <toy_lib.pruning.mask>`"
    assert link("masks", "toy_lib.pruning") == ":py:mod:`masks <toy_lib.pruning.masks>`"
    assert link("criteria", "toy_lib.pruning") == ":py:obj:`criteria <toy_lib.pruning.criteria>`"
    assert link("Diverged", criteria) == ":py:obj:`Diverged <toy_lib.lab.training.Diverged>`"
    for name, module, within in [
        ("mask", "toy_lib.pruning.masks", "mask"),  # itself
        ("magnitude", training, ""),  # of a technique, in the laboratory
        ("helper", "toy_lib.pruning.masks", ""),  # has no entry
        ("training", training, ""),  # a file, but rather a word
        ("torch.abs", criteria, ""),
        ("missing", criteria, ""),
    ]:
        assert link(name, module, within) is None, name


def test_signatures_are_those_of_the_source(package: Path) -> None:
    index, training = index_at(package), "toy_lib.lab.training"
    assert sources.signature(index, training, "fit") == (
        "(x: float, objective: ~toy_lib.lab.training.Objective, *, "
        "path: ~pathlib.Path | ~os.PathLike | ~collections.abc.Sized | None=None, "
        "tell: Callable[..., None]=print)",
        "~toy_lib.lab.training.History",
    )
    assert sources.signature(index, training, "History") == ("(losses: list[float] = [], epochs: int = 0)", "")
    assert sources.signature(index, training, "History.frame") == ("()", "dict[str, ~toy_lib.lab.training.Row]")
    assert sources.signature(index, training, "Diverged") == ("", "")
    assert sources.signature(index, training, "fit.<locals>.f") is None
    assert sources.parameters(index, training, "fit") == {"x", "objective", "path", "tell"}
    assert {"losses", "epochs"} <= sources.parameters(index, training, "History.frame")


def states(folder: Path) -> dict[str, tuple[int, str]]:
    return {p.name: (p.stat().st_mtime_ns, p.read_text(encoding="utf-8")) for p in folder.iterdir()}


def test_a_page_is_written_only_if_it_changed(package: Path, tmp_path: Path) -> None:
    folder = tmp_path / "api"
    api.write(folder, index_at(package))
    first = states(folder)
    there = ("pruning", "pruning.criteria", "pruning.masks", "lab.training", "lab.files")
    assert {f"{name}.rst" for name in there} < set(first)
    assert not {"lab.doors.rst", "checks.rst"} & set(first)
    assert "chapter 8, pruning </chapters/08_pruning>" in first["pruning.rst"][1]
    assert first["pruning.rst"][1].index("<pruning.masks>") < first["pruning.rst"][1].index("<pruning.criteria>")
    assert "Also exported here: :py:obj:`History <toy_lib.lab.training.History>`." in first["pruning.rst"][1]
    assert ":canonical: Callable[[float], float]" in first["lab.training.rst"][1]
    api.write(folder, index_at(package))
    assert states(folder) == first

    make(package.parent, **{"schedules.py": '"""Schedules: when."""\ndef cosine() -> None:\n    """Down."""\n'})
    (package / "lab" / "files.py").unlink()
    api.write(folder, index_at(package))
    second = states(folder)
    assert "autofunction:: toy_lib.schedules.cosine" in second["schedules.rst"][1]
    assert second["techniques.txt"][1].startswith("- [`schedules`](/api/schedules.rst) (chapter 3) – When\n")
    assert set(first) - set(second) == {"lab.files.rst"}
    changed = {name for name in second if second[name] != first.get(name)}
    assert changed == {"schedules.rst", "techniques.txt", "authors.txt"}


@pytest.fixture
def site(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project that documents the package made for the purpose."""

    @lru_cache(maxsize=1)
    def index() -> Index:
        return index_at(package)

    monkeypatch.setattr(api, "index_of", index)
    monkeypatch.syspath_prepend(str(tmp_path))
    docs = tmp_path / "docs"
    (docs / "chapters").mkdir(parents=True)
    (docs / "chapters" / "08_pruning.md").write_text("# Chapter\n", encoding="utf-8")
    (docs / "chapters" / "03_learning_rate.md").write_text("# Chapter\n", encoding="utf-8")
    (docs / "api.md").write_text((ROOT / "docs" / "api.md").read_text(encoding="utf-8"), encoding="utf-8")
    (docs / "index.md").write_text("# Toy\n\n```{toctree}\n:glob:\napi\nchapters/*\n```\n", encoding="utf-8")
    yield docs
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy_lib"]:
        del sys.modules[name]


def build(docs: Path) -> tuple[str, list[str]]:
    """Warnings, and the documents that were read."""
    warnings, read = StringIO(), []
    settings = {
        "extensions": ["myst_parser", "sphinx.ext.autodoc", "site_builder.api"],
        "autodoc_member_order": "bysource",
        "nitpick_ignore_regex": [("py:.*", r"(pathlib|os|collections)\..*")],
        "nitpicky": True,
    }
    with docutils_namespace():
        app = Sphinx(docs, None, docs / "_build", docs / "_trees", "html", settings, StringIO(), warnings)
        app.connect("source-read", lambda app, name, content: read.append(name))
        app.build()
    return warnings.getvalue(), sorted(read)


def test_a_site_is_built_cleanly_and_read_again_only_where_it_changed(site: Path, package: Path) -> None:
    warnings, read = build(site)
    assert warnings == ""
    assert "api/pruning.criteria" in read
    criteria = (site / "_build" / "api" / "pruning.criteria.html").read_text(encoding="utf-8")
    assert 'href="pruning.masks.html#toy_lib.pruning.mask"' in criteria
    assert 'href="lab.training.html#toy_lib.lab.fit"' in criteria
    assert '<span class="pre">torch.abs</span>' in criteria
    training = (site / "_build" / "api" / "lab.training.html").read_text(encoding="utf-8")
    [signature] = re.findall(r'<dt class="sig[^>]*id="toy_lib\.lab\.fit">(.*?)</dt>', training, re.DOTALL)
    shown = re.sub(r"<[^>]+>|\s", "", signature)
    assert shown.startswith("fit(x:float,objective:Objective,*,path:Path|PathLike|Sized|None=None,")
    assert 'href="#toy_lib.lab.training.Diverged"' in training
    assert re.search(r'How many <a[^>]*href="#toy_lib\.lab\.fit"', training)  # an attribute's docstring too

    assert build(site) == ("", [])

    masks = package / "pruning" / "masks.py"
    masks.write_text(masks.read_text(encoding="utf-8").replace("Zero, or", "Nought, or"), encoding="utf-8")
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy_lib"]:
        del sys.modules[name]
    assert build(site) == ("", ["api/pruning.masks"])


def test_a_module_that_cannot_be_imported_ends_the_build(site: Path, package: Path) -> None:
    make(package.parent, **{"schedules.py": '"""Schedules: when."""\nimport no_such_package\n'})
    with pytest.raises(ExtensionError, match=r"toy_lib\.schedules cannot be imported.*no_such_package"):
        build(site)
