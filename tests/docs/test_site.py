"""The built site, without a browser: what is linked is there, what the notebooks hold is shown, and it is light."""

import json
import re
import zipfile
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from filelock import FileLock

from site_builder import archive, notebooks
from tests.docs.building import MADE, ROOT, build
from tests.docs.elements import Elements

CHAPTERS = notebooks.chapters()
MEGABYTE = 1e6


def elements(path: Path) -> Elements:
    return Elements(path.read_text(encoding="utf-8"))


@cache
def joints(page: Path) -> tuple[list[tuple[str, str]], set[str]]:
    """What a page loads or leads to (the attribute and the address), and the anchors at which it can be entered."""
    found = elements(page).found
    out = [
        (f"{tag} {name}", attributes[name])
        for tag, attributes in found
        for name in ("href", "src", "data-frames", "poster")
        if name in attributes and not (tag == "link" and attributes.get("rel") == "canonical")
    ]
    return list(dict.fromkeys(out)), {attributes["id"] for _, attributes in found if "id" in attributes}


def page_of(site: Path, chapter: notebooks.Chapter) -> Path:
    return site / "chapters" / f"{Path(chapter.file).stem}.html"


def pages(site: Path) -> list[Path]:
    return sorted(site.rglob("*.html"))


def test_every_link_picture_and_anchor_is_there(site: Path) -> None:
    @cache  # the pages of a folder lead to the same places
    def place(folder: Path, path: str) -> Path | None:
        target = (folder / unquote(path)).resolve()
        target = target / "index.html" if target.is_dir() else target
        return target if target.is_file() else None

    missing = []
    for page in pages(site):
        for what, address in joints(page)[0]:
            scheme, _, path, _, anchor = urlsplit(address)
            if scheme in ("http", "https", "mailto", "data"):
                continue
            target = place(page.parent, path) if path else page
            if target is None:
                missing.append(f"{page.relative_to(site)}: {what}={address}")
                continue
            held = anchor and target.suffix == ".html" and page.name != "genindex.html"
            if held and unquote(anchor) not in joints(target)[1]:
                missing.append(f"{page.relative_to(site)}: no anchor {address}")
    assert not missing, "\n".join(missing[:40])


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    """Scripts, styles, pictures and fonts; links may lead out, and a reader has to follow them."""
    outside = re.compile(r"^(https?:)?//")
    loaded = [
        f"{page.relative_to(site)}: {what}={address}"
        for page in pages(site)
        for what, address in joints(page)[0]
        if outside.match(address) and not what.startswith("a ")
    ]
    for sheet in site.rglob("*.css"):
        urls = re.findall(r"""(?:url\(|@import\s+)["']?((?:https?:)?//[^"')\s]+)""", sheet.read_text(encoding="utf-8"))
        loaded += [f"{sheet.relative_to(site)}: {url}" for url in urls]
    assert not loaded, "\n".join(loaded)


def test_nothing_leads_to_somebodys_machine(site: Path) -> None:
    ours = [path for path in pages(site) if path.parent.name != "_modules"]
    bad = re.compile(r"(?:file:///|/home/\w|/root/|/Users/\w|[A-Z]:\\\\Users)")
    found = [
        f"{path.relative_to(site)}: {m[0]}" for path in ours for m in bad.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found[:20])
    assert str(ROOT) not in "".join(path.read_text(encoding="utf-8") for path in ours)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.nn)
def test_a_chapter_is_shown_whole(site: Path, chapter: notebooks.Chapter) -> None:
    notebook, page = notebooks.stored(chapter), elements(page_of(site, chapter))
    stored = notebooks.figures(notebook)
    shown = [image for image in page.all("img") if "/figures/" in image["src"]]
    assert len(shown) == len(stored)
    for image, figure in zip(shown, stored, strict=True):
        assert (page_of(site, chapter).parent / image["src"]).read_bytes() == figure.png
        assert (image["width"], image["height"], image["loading"]) == (str(figure.width), str(figure.height), "lazy")
        assert len(image["alt"]) > 15
    claims = [part["id"] for part in page.all("div") if part.get("class") == "claim"]
    assert claims == [claim.anchor for claim in notebooks.claims(notebook)]
    moving = [part for part in page.all("figure") if "explorer" in part.get("class", "")]
    assert len(moving) == sum(figure.moves for figure in stored)
    assert all((page_of(site, chapter).parent / part["data-frames"]).is_file() for part in moving)
    questions = [part["data-key"] for part in page.all("div") if part.get("class") == "prediction"]
    answers = [part["data-key"] for part in page.all("div") if part.get("class") == "answer"]
    assert len(questions) == len(set(questions))
    assert sorted(set(answers)) == sorted(questions), "each question is answered"


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.nn)
def test_each_claim_of_the_table_stands_where_it_was_made(chapter: notebooks.Chapter) -> None:
    """A claim that is not its cell's last line is tested, and shown nowhere but in the table."""
    stored = list(notebooks.outputs(notebooks.stored(chapter)))
    table = max((k for k, output in enumerate(stored) if ">claim</th>" in notebooks.html_of(output)), default=-1)
    assert sum(map(notebooks.is_claim, stored[:table])) == notebooks.html_of(stored[table]).count("<tr>") - 1


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: chapter.nn)
def test_a_chapters_page_is_light(site: Path, chapter: notebooks.Chapter) -> None:
    """With all its pictures, its explorer's frames, and every style sheet, script and font of the site's."""
    path = page_of(site, chapter)
    needed = {path, *site.glob("_static/katex/fonts/*.woff2"), *(site / "fonts").glob("*")}
    for what, address in joints(path)[0]:
        target = (path.parent / unquote(urlsplit(address).path)).resolve()
        if not what.startswith("a ") and target.suffix != ".html" and target.is_file():
            needed.add(target)
    assert sum(one.stat().st_size for one in needed) < 3 * MEGABYTE


def test_a_chapter_says_when_and_on_what_it_was_run(site: Path) -> None:
    for chapter in CHAPTERS:
        run, text = notebooks.last_run(notebooks.stored(chapter)), page_of(site, chapter).read_text(encoding="utf-8")
        assert run, f"{chapter.file} was not run by `make run` since it keeps when: make run NB={chapter.nn}"
        assert f"<time>{run['date']}</time>" in text
        assert f"torch {run['versions']['torch']}" in text
        assert (site / "notebooks" / chapter.file).read_bytes() == notebooks.path_of(chapter).read_bytes()


def test_solutions_are_apart_and_not_found_by_the_search(site: Path) -> None:
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    found = json.loads(index.removeprefix("Search.setIndex(").removesuffix(")"))
    pages_of = {page for of in ("terms", "titleterms") for at in found[of].values() for page in np.atleast_1d(at)}
    known = {name for number, name in enumerate(found["docnames"]) if number in pages_of}
    assert "chapters/02_optimizers" in known
    assert not [name for name in known if name.startswith("solutions")]
    for chapter in CHAPTERS:
        text = page_of(site, chapter).read_text(encoding="utf-8")
        assert f'href="../solutions/{chapter.nn}.html"' in text
        folded = elements(site / "solutions" / f"{chapter.nn}.html").all("details")
        assert any(part.get("class") == "solutions" for part in folded)
        assert text.count("class='hint'") + text.count('class="hint"') >= 6


def test_formulas_are_set_in_the_page(site: Path) -> None:
    for chapter in CHAPTERS[1:]:
        text = page_of(site, chapter).read_text(encoding="utf-8")
        assert text.count('class="katex"') > (20 if chapter.slot else 5)  # the capstone derives little
        assert text.count("<math ") == text.count('class="katex"'), "each formula is there for screen readers too"
        assert "katex-error" not in text


def test_a_second_build_changes_nothing(site: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (site / "chapters").glob("*.html")}
    with FileLock(MADE / "lock"):
        build()
    assert {path: path.stat().st_mtime_ns for path in (site / "chapters").glob("*.html")} == before


def test_the_archive_opens_anywhere(site: Path, tmp_path: Path) -> None:
    target = tmp_path / "course.zip"
    number = archive.pack(site, target)
    with zipfile.ZipFile(target) as packed:
        names = packed.namelist()
        assert len(names) == number
        assert "course/index.html" in names
        assert packed.testzip() is None
    assert not [name for name in names if not name.startswith("course/") or ".doctrees" in name]
    first = target.read_bytes()
    archive.pack(site, target)
    assert target.read_bytes() == first


def test_no_archive_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be a folder with a built site"):
        archive.pack(tmp_path, tmp_path / "course.zip")
    assert not (tmp_path / "course.zip").exists()


def test_what_is_published_is_what_the_archive_holds() -> None:
    """The workflow builds by `make docs-archive`, so the zip and the pages are one site."""
    text = (ROOT / ".github" / "workflows" / "pages.yml").read_text(encoding="utf-8")
    assert text.count("run: make ") == 1
    assert "run: make docs-archive" in text
    assert re.findall(r"\bpath: (docs\S+)", text) == ["docs/_build/html", "docs/_build/craft-of-training.zip"]
    pinned = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert all(pin in pinned for pin in re.findall(r"torch\w*==[\d.]+", text)), "the versions are those of the course"


def test_how_to_cite_names_this_version() -> None:
    cited = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert version is not None
    assert f"\nversion: {version[1]}\n" in cited
    assert re.search(r"^cff-version: 1\.2\.0$", cited, re.MULTILINE)
