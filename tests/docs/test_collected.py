"""The pages that collect: what chapters hold is there once, in order, linked, safe, and read again when it changes."""

import html
import io
import re
import shutil
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbformat import NotebookNode, v4
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace

from course_lib.lab import Claims
from course_lib.lab.chapters import CHAPTERS, Chapter
from course_lib.lab.studies import Book, Part, Recorded, Study, StudyOutdated, declared, recorded, study_file
from site_builder import collected, collecting, notebooks, studies
from site_builder.notebooks import Reference
from tests.docs.elements import Elements

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("claims", "bibliography", "studies", "glossary", "verification")
OPTIMIZERS, PRUNING = CHAPTERS[2], CHAPTERS[8]
THERE = notebooks.chapters()
WITH_STUDY = [chapter for chapter in THERE if study_file(chapter.nn).is_file()]


# ---- building small sites --------------------------------------------------------------------------------------------


class Built:
    """A site in a folder of its own: `build` brings it up to date, and says which pages were read for that."""

    def __init__(self, folder: Path, **pages: str) -> None:
        self.source, self.out = folder / "source", folder / "out"
        for name, text in pages.items():
            self.write(name, text)
        shutil.copytree(ROOT / "docs" / "_static", self.source / "_static", ignore=shutil.ignore_patterns("katex"))
        self.warnings = ""

    def write(self, name: str, text: str) -> None:
        path = self.source / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def build(self) -> set[str]:
        read: set[str] = set()
        settings: dict[str, Any] = {
            "extensions": ["myst_parser", "site_builder.collected"],
            "myst_enable_extensions": ["dollarmath", "colon_fence"],
            "myst_heading_anchors": 3,
            "html_theme": "basic",
            "html_static_path": ["_static"],
            "root_doc": "claims",
            "suppress_warnings": ["toc.not_included"],
        }
        heard = io.StringIO()
        with docutils_namespace():
            app = Sphinx(
                *(self.source, None, self.out, self.out / "trees", "html", settings),
                status=None,
                warning=heard,
            )
            app.connect("source-read", lambda app, name, source: read.add(name))
            app.build()
        self.warnings = re.sub(r"\x1b\[[\d;]*m", "", heard.getvalue())
        return read

    def html(self, name: str) -> str:
        return (self.out / f"{name}.html").read_text(encoding="utf-8")


def write_notebook(
    root: Path, chapter: Chapter, *sentences: str, references: str = "- A (2000), [x](https://x.org)."
) -> None:
    """A notebook that claims these sentences."""
    cells = [v4.new_markdown_cell(f"# {chapter.title}")]
    for sentence in sentences:
        made = Claims().claim(sentence, "1 < gain < 3 and gain > 0", gain=2.0)
        output = v4.new_output("execute_result", data={"text/html": made._repr_html_()})
        cells.append(v4.new_code_cell("claims.claim(...)", outputs=[output]))
    cells.append(v4.new_markdown_cell(f"## References\n\n{references}"))
    (root / "notebooks").mkdir(exist_ok=True)
    nbformat.write(v4.new_notebook(cells=cells), root / "notebooks" / chapter.file)


STUB = "# Chapter\n\n## References\n"


@pytest.fixture
def course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A course of one chapter, in which everything that HTML might trip over is claimed and cited."""
    write_notebook(tmp_path, OPTIMIZERS, "`a_b` <script>alert(1)</script> & \"b\" 'c'", "Second")
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    return tmp_path


def small_site(course: Path, **more: str) -> Built:
    stubs = {collecting.page_of(chapter): STUB for chapter in (OPTIMIZERS, PRUNING)}
    return Built(course, claims="# Claims\n\n```{claims}\n```\n", plain="# Plain\n\nNothing.", **stubs, **more)


@lru_cache(maxsize=32)
def anchors(page: Path) -> set[str]:
    return {attributes.get("id", "") for _, attributes in Elements(page.read_text(encoding="utf-8")).found}


# ---- claims ----------------------------------------------------------------------------------------------------------


def test_what_is_claimed_is_shown_and_is_no_markup(course: Path) -> None:
    site = small_site(course)
    site.build()
    assert not site.warnings
    page = site.html("claims")
    assert '<code class="literal">a_b</code> &lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;b&quot;' in page
    assert "<script>alert" not in page
    assert "1 &lt; gain &lt; 3 and gain &gt; 0</code>" in page
    assert "<dd>gain = 2</dd>" in page
    links = [a["href"] for a in Elements(page).all("a") if "#claim-" in a.get("href", "")]
    assert links == ["chapters/02_optimizers.html#claim-1", "chapters/02_optimizers.html#claim-2"]


def test_html_of_an_output_becomes_words() -> None:
    assert collecting.escaped('<b>a</b> &lt; "b" & `c`') == 'a &lt; &quot;b&quot; &amp; <code class="literal">c</code>'


def test_only_pages_that_collect_carry_script_and_style(course: Path) -> None:
    site = small_site(course)
    site.build()
    assert "filter.js" in site.html("claims")
    assert "collected.css" in site.html("claims")
    assert "filter.js" not in site.html("plain")
    assert "collected.css" not in site.html("plain")


def test_a_page_is_read_again_when_a_notebook_changed_came_or_went(course: Path) -> None:
    site = small_site(course)
    assert "claims" in site.build()
    assert site.build() == set()
    write_notebook(course, OPTIMIZERS, "Another sentence")
    assert site.build() == {"claims"}
    assert "Another sentence" in site.html("claims")
    write_notebook(course, PRUNING, "A chapter that is new")
    assert site.build() == {"claims"}
    assert "A chapter that is new" in site.html("claims")
    assert site.build() == set()
    (course / "notebooks" / PRUNING.file).unlink()
    assert site.build() == {"claims"}
    assert "A chapter that is new" not in site.html("claims")


def test_a_link_that_leads_nowhere_is_a_warning(course: Path) -> None:
    write_notebook(course, CHAPTERS[3], "A chapter without a page")
    site = small_site(course, works="# Works\n\n```{bibliography}\n```\n")
    site.write(collecting.page_of(OPTIMIZERS), "# Chapter\n\n## Sources\n")
    site.build()
    assert "no page 'chapters/03_learning_rate'" in site.warnings
    assert "no section 'references' on the page 'chapters/02_optimizers'" in site.warnings


@pytest.mark.parametrize("text", ["{example-claim} 05", "{example-claim} 02\n:number: 3", "{example-figure} 02"])
def test_an_example_that_is_not_there_says_so(course: Path, text: str) -> None:
    site = small_site(course, examples=f"# Examples\n\n```{text}\n```\n")
    site.build()
    assert re.search(r"no chapter '05' yet|has 2 claims, and number 3|has 0 figures", site.warnings)


# ---- references ------------------------------------------------------------------------------------------------------


def test_every_reference_of_every_chapter_has_an_address() -> None:
    bare = [
        f"{chapter.file}: {entry.text}"
        for chapter in THERE
        for entry in notebooks.references(notebooks.stored(chapter))
        if not re.match(r"https://\S+$", entry.url)
    ]
    assert not bare, "\n".join(bare)


def test_a_work_is_listed_once_in_its_most_complete_wording() -> None:
    short = Reference('Ba et al. (2014), "Adam", [arXiv:1](https://arxiv.org/abs/1).', "https://arxiv.org/abs/1")
    longer = Reference('Ba et al. (2014), "Adam: A Method", *ICLR*, [arXiv:1v2](…).', "https://arxiv.org/abs/1v2")
    whole = Reference('Ba, Be and Bi (2014), "Adam", [arXiv:1](…).', "https://arxiv.org/abs/1/")
    (work,) = collected.works([(CHAPTERS[0], short), (OPTIMIZERS, longer), (OPTIMIZERS, short)])
    assert work == collected.Work(longer, (CHAPTERS[0], OPTIMIZERS))
    (work,) = collected.works([(CHAPTERS[0], longer), (OPTIMIZERS, whole)])
    assert work.reference == whole


def test_works_are_in_the_order_of_first_author_and_year() -> None:
    texts = ["Zhu and Gupta (2017), …", "Émile et al. (2020), …", "Eve (2021), …", "Zhu (1999), …", "de Boer (2001), b"]
    found = collected.works((OPTIMIZERS, Reference(text, "https://" + text[:5])) for text in texts)
    assert [work.reference.text for work in found] == [texts[4], texts[1], texts[2], texts[3], texts[0]]


def test_a_reference_without_an_address_is_a_warning_and_its_words_are_no_markup(course: Path) -> None:
    write_notebook(course, OPTIMIZERS, "One", references="- Knuth (1997), *The <b>Art</b>*.")
    site = small_site(course, works="# Works\n\n```{bibliography}\n```\n")
    site.build()
    assert "a reference without an address: Knuth (1997)" in site.warnings
    assert "<em>The &lt;b&gt;Art&lt;/b&gt;</em>" in site.html("works")


# ---- the course's own pages ------------------------------------------------------------------------------------------


def headings(notebook: NotebookNode) -> str:
    """A chapter's headings, and an anchor for each claim."""
    lines = [
        line
        for cell in notebook.cells
        if cell.cell_type == "markdown"
        for line in re.sub(r"^```.*?^```", "", cell.source, flags=re.M | re.S).splitlines()
        if re.match(r"#{1,4} ", line)
    ]
    anchors = "".join(f'<div id="{claim.anchor}"></div>\n' for claim in notebooks.claims(notebook))
    return "\n\n".join([lines[0], anchors, *lines[1:]])


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The course's pages that collect, with chapters of which only the headings are there."""
    site = Built(tmp_path_factory.mktemp("ours"), api="# Reference\n")
    for chapter in THERE:
        site.write(collecting.page_of(chapter), headings(notebooks.stored(chapter)))
        # a link to a notebook is one to its page where the file is a source, and here the source is another
    for name in PAGES:
        text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        site.write(name, text.replace(".ipynb", ".md"))
    site.build()
    return site


def test_the_pages_build_without_a_warning(ours: Built) -> None:
    assert not ours.warnings


@pytest.mark.parametrize("name", PAGES)
def test_what_is_linked_is_there(ours: Built, name: str) -> None:
    for link in Elements(ours.html(name)).all("a"):
        path, _, anchor = link.get("href", "https:").partition("#")
        if path.startswith("http") or path.startswith("_"):
            continue
        target = ours.out / path if path else ours.out / f"{name}.html"
        assert not anchor or anchor in anchors(target), link["href"]


def test_every_claim_is_listed(ours: Built) -> None:
    page = ours.html("claims")
    count = 0
    for chapter in THERE:
        claims = notebooks.claims(notebooks.stored(chapter))
        count += len(claims)
        for claim in claims:
            assert f'href="chapters/{Path(chapter.file).stem}.html#{claim.anchor}"' in page
        assert f'#claims-{chapter.nn}">{collecting.named(chapter)}</a></th><td>{len(claims)}</td>' in page
    assert f'<th scope="row">all chapters</th><td>{count}</td>' in page
    assert len(re.findall(r'<li value="\d+" data-chapter', page)) == count


def test_every_work_is_listed_and_says_who_cites_it(ours: Built) -> None:
    page = html.unescape(ours.html("bibliography"))
    hrefs = {link.get("href") for link in Elements(ours.html("bibliography")).all("a")}
    for chapter in THERE:
        for entry in notebooks.references(notebooks.stored(chapter)):
            assert entry.url in hrefs or entry.url.rstrip("/") in hrefs
    goyal = re.search(r'<li data-chapter="([\d ]+)">Goyal et al\. \(2017\), “Accurate, Large Minibatch SGD[^<]*', page)
    assert goyal is not None, "a work that two chapters cite"
    assert goyal[1] == "04 07"
    assert "Training ImageNet in 1 Hour" in goyal[0]
    assert page.count("arxiv.org/abs/1706.02677") == 1


def test_every_part_of_every_study_is_shown(ours: Built) -> None:
    page = Elements(ours.html("studies"))
    sections = {part.get("id") for part in page.all("section")}
    for chapter in WITH_STUDY:
        parts = declared(chapter.nn).parts
        assert {f"study-{chapter.nn}-{name.replace('_', '-')}" for name in parts} <= sections
    assert "of other code" not in ours.html("studies")
    repeated = [Book(study_file(chapter.nn), read_only=True).confirmations for chapter in WITH_STUDY]
    assert ("was repeated and found the same" in ours.html("studies")) == any(repeated)
    assert len(page.all("details")) >= len(WITH_STUDY)
    downloads = [link["href"] for link in page.all("a") if link.get("href", "").endswith(".jsonl")]
    assert len(downloads) == len(WITH_STUDY)
    assert all((ours.out / path).is_file() for path in downloads)


def test_the_numbers_of_a_study_are_those_of_its_chapter(ours: Built) -> None:
    page = html.unescape(re.sub(r"</?strong>", "", ours.html("studies")))
    chapter_two = recorded("02", "mnist")
    for arm, shown in chapter_two.table().data.iterrows():
        gap = shown.iloc[1]
        cells = f'<th scope="row">{arm}</th><td>{shown.iloc[0]}</td><td>{gap}</td><td>{chapter_two.chosen[arm]}</td>'
        assert cells in page
    by_labels = recorded("01", "convnet", of="300")
    assert f"<td>{by_labels.table().data.loc['affine'].iloc[0]}</td>" in page


@pytest.mark.parametrize("name", PAGES)
def test_tables_have_captions_and_scopes_and_scroll_by_themselves(ours: Built, name: str) -> None:
    page = ours.html(name)
    for box in re.findall(r'<div class="scrolls"[^>]*>', page):
        assert re.search(r'tabindex="0" role="region" aria-label="[^"]+"', box)
    tables = re.findall(r"(<div [^>]*>)<table[^>]*>(.*?)</table>", page, re.DOTALL)
    assert len(tables) == page.count('class="scrolls"')
    for box, table in tables:
        assert 'class="scrolls"' in box
        assert table.startswith("<caption>")
        assert not re.search(r"<th(?! scope)[ >]", table)


def test_no_count_is_typed_in() -> None:
    for name in PAGES:
        text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        assert not re.search(r"\b\d+ (?:claims|figures|works|references|chapters|studies|terms)\b", text), name


def test_the_glossary_speaks_of_chapters_that_are_there_and_in_order() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    terms = re.findall(r"^(\S.*)\n  \S", text, re.MULTILINE)
    assert len(terms) >= 80
    assert terms == sorted(terms, key=str.lower)
    linked = set(re.findall(r"\]\(chapters/([^#)]+)", text))
    assert linked <= {chapter.file for chapter in THERE}
    bare = [block for block in text.split("\n\n")[3:] if "](" not in block]
    assert not bare, "every term leads to where it is taught"


# ---- studies ---------------------------------------------------------------------------------------------------------


def comparison(**values: list[float]) -> Recorded:
    seeds = tuple(range(len(next(iter(values.values())))))
    return Recorded("steps", seeds, {arm: np.array(v) for arm, v in values.items()}, {}, {}, "Title: caption.", {})


def test_a_number_that_not_every_run_has_is_counted() -> None:
    found = comparison(plain=[10, 11, 12], some=[20, np.inf, 21], none=[np.inf] * 3, other=[30, 31, 33])
    assert [studies.number_cell(found, arm, "plain") for arm in found.values] == [
        "11 [9, 13]", "in 2 of 3 runs", "in no run", "<strong>31 [28, 35]</strong>"
    ]  # fmt: skip
    assert studies.number_cell(found, "other", "some") == "31 [28, 35]"  # no difference to speak of


def test_accuracies_have_three_decimals() -> None:
    found = comparison(a=[0.5, 0.51], b=[0.5, 0.52])
    assert studies.number_cell(found, "b", "a").startswith("0.510 [")


def test_a_single_run_has_a_number_and_no_interval() -> None:
    assert studies.number_cell(comparison(a=[0.95125]), "a", "a") == "0.951 (one run)"
    assert studies.number_cell(comparison(a=[3541.6], b=[1200.0]), "b", "a") == "1,200 (one run)"


def test_a_run_that_diverged_is_said() -> None:
    found = comparison(a=[0.5, 0.51], b=[0.5, np.nan])
    part = Part("Title", lambda: None, {}, (0, 1))  # type: ignore[arg-type, return-value]
    table = studies.comparison_table(studies.Found(part, [], [], {"steps": found}))
    assert '<th scope="row">b</th><td>a run diverged</td><td>a run diverged</td>' in table


@pytest.mark.parametrize(
    ("rows", "columns", "folded"), [(12, 6, False), (13, 2, True), (2, 7, True)], ids=["short", "long", "wide"]
)
def test_long_tables_are_folded(rows: int, columns: int, folded: bool) -> None:
    made = studies.table("Title", ["arm", *map(str, range(columns))], [("<a>", ["1"] * columns)] * rows)
    assert made.startswith("<details>") == folded
    assert "<a>" not in made


def code(source: str) -> NotebookNode:
    return v4.new_code_cell(source)


CELLS = [
    v4.new_markdown_cell("# 2 · Title\n\n## 1. One"),
    code('recorded("03", "mnist")'),
    v4.new_markdown_cell("### 5.1 Same\n\n```\n# no heading\n```\n\nWords."),
    code('[recorded("02", name, of="3") for name in ("many", "others")]'),
    v4.new_markdown_cell("### 5.1 Same"),
    code('recorded(\n    "02", f"epochs_{n}")'),
    v4.new_markdown_cell("### 5.3 Of $N$ `x`"),
    code("recorded('02', 'mnist')"),
]


@pytest.mark.parametrize(
    ("part", "number", "slug"),
    [
        ("mnist", "5.3", "53-of--x"),
        ("epochs_15", "5.1", "51-same-1"),
        ("others", "5.1", "51-same"),
        ("by a variable", "5.1", "51-same"),
    ],
)
def test_the_section_that_shows_a_part_is_found(part: str, number: str, slug: str) -> None:
    assert studies.shown_in(v4.new_notebook(cells=CELLS), "02", part) == studies.Place(number, slug)


def test_a_part_that_no_section_shows_is_not_linked() -> None:
    assert studies.shown_in(v4.new_notebook(cells=CELLS), "07", "mnist") == studies.Place()


def test_numbers_of_other_code_are_not_shown(course: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def outdated(study: Study, name: str, file: Path) -> studies.Found:
        raise StudyOutdated("other code")

    monkeypatch.setattr(studies, "found_of", outdated)
    site = small_site(course, studies="# Studies\n\n```{studies}\n```\n", verification="# V\n\n## Recorded studies\n")
    site.build()
    assert "study 02, part mnist: other code" in site.warnings
    page = site.html("studies")
    assert "Recorded with other code" in page
    assert "95% interval" not in page


# ---- the filter, in a browser ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install -r requirements-dev.txt")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("chromium is not installed")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=chromium, args=quiet)
        yield found
        found.close()


@pytest.fixture
def claims_page(browser: Any, ours: Built) -> Iterator[Any]:
    page = browser.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address(ours))
    yield page
    page.close()
    assert not errors


def address(ours: Built, name: str = "claims", asked: str = "") -> str:
    return (ours.out / f"{name}.html").as_uri() + asked


def shown(page: Any) -> list[str]:
    return page.locator(".filtered > li:visible").all_inner_texts()


def test_words_and_chapter_filter_the_claims(claims_page: Any) -> None:
    everything = shown(claims_page)
    claims_page.get_by_label("Words").fill("  MOMENTUM  rate")
    found = shown(claims_page)
    expected = [text for text in everything if "momentum" in text.lower() and "rate" in text.lower()]
    assert found == expected
    assert 0 < len(found) < len(everything)
    claims_page.get_by_label("Chapter", exact=True).select_option("02")
    in_chapter = shown(claims_page)
    assert 0 < len(in_chapter) < len(found)
    assert claims_page.locator("section section:visible").count() == 1, "chapters without a match have no heading"
    status = claims_page.get_by_role("status")
    wanted = f"{len(in_chapter)} of {len(everything)} claims"
    claims_page.wait_for_function("words => document.querySelector('[role=status]').textContent === words", arg=wanted)
    assert status.text_content() == wanted
    assert claims_page.evaluate("location.hash") == "#words=MOMENTUM++rate&chapter=02"
    claims_page.get_by_role("button", name="Show all").click()
    claims_page.wait_for_function("() => !location.hash")
    assert shown(claims_page) == everything


def test_an_address_that_was_kept_filters_at_once(claims_page: Any, ours: Built) -> None:
    claims_page.get_by_label("Words").fill("momentum & <b>")
    kept = claims_page.evaluate("location.href")
    claims_page.goto("about:blank")
    claims_page.goto(kept)
    assert claims_page.get_by_label("Words").input_value() == "momentum & <b>"
    assert shown(claims_page) == []
    claims_page.evaluate("location.hash = 'words=momentum'")
    claims_page.wait_for_function("() => document.querySelector('.filtered > li:not([hidden])')")
    assert shown(claims_page)


def test_the_address_of_a_chapter_shows_it_though_it_was_filtered_away(claims_page: Any) -> None:
    claims_page.get_by_label("Chapter", exact=True).select_option("02")
    claims_page.locator("table.counts a").last.click()
    last = f"#claims-{THERE[-1].nn}"
    claims_page.wait_for_function("id => !document.querySelector(id).hidden", arg=last)
    assert claims_page.locator(last).is_visible()
    assert claims_page.evaluate("location.hash") == last, "the address that was asked for stays"


def test_accents_are_no_matter(browser: Any, ours: Built) -> None:
    page = browser.new_page()
    page.goto(address(ours, "bibliography", "#words=muller"))
    assert any("Müller" in text for text in shown(page))
    page.close()


def test_without_a_script_all_is_shown_and_no_form(browser: Any, ours: Built) -> None:
    page = browser.new_page(java_script_enabled=False)
    page.goto(address(ours, "claims", "#words=momentum"))
    assert len(shown(page)) == sum(len(notebooks.claims(notebooks.stored(chapter))) for chapter in THERE)
    assert not page.locator("form.filter").is_visible()
    page.close()


@pytest.mark.parametrize("name", PAGES)
def test_a_phone_never_scrolls_sideways(browser: Any, ours: Built, name: str) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(address(ours, name))
    page.evaluate("document.querySelectorAll('details').forEach(fold => { fold.open = true; })")
    wide = page.evaluate(
        """() => [...document.querySelectorAll('.scrolls, .filter, .filter *, .filtered > li')]
            .filter(box => box.getBoundingClientRect().right > innerWidth + 1).map(box => box.className)"""
    )
    assert not wide
    page.close()
