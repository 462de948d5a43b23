"""The script that moves explorers in a page, in a real browser: it shows exactly the frames that were drawn."""

import io
import re
from collections.abc import Iterator
from html import escape
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from course_lib.lab.widgets import choice, explorer, log_slider, slider, to_png
from course_lib.proving import frames
from course_lib.proving.compact_svg import drawn
from course_lib.proving.frames import Drawing

STATIC = Path(__file__).resolve().parents[2] / "docs" / "_static"
QUIET = ("no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update", "disable-sync")

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="needs playwright: pip install -r requirements-dev.txt", exc_type=ImportError
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        system = Path("/usr/bin/chromium")
        place = {"executable_path": str(system)} if system.exists() else {}
        try:
            opened = playwright.chromium.launch(args=[f"--{name}" for name in (*QUIET, "no-first-run")], **place)
        except sync_api.Error as error:
            pytest.skip(f"needs a browser (python -m playwright install chromium): {str(error).splitlines()[0]}")
        yield opened
        opened.close()


def draw(wave: str, frequency: int, scale: float) -> plt.Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
    x = np.linspace(0, 1, 60)
    left.plot(x, scale * getattr(np, wave)(frequency * x), marker="o", markersize=3)
    left.set(xlabel="time", ylabel="height", title=f"{wave} & <{frequency}>, $\\sigma$")
    right.imshow(np.arange(9).reshape(3, 3) % frequency, cmap="gray")
    right.set(title=f"scale {scale:g}", xticks=[], yticks=[])
    return figure


@pytest.fixture(scope="module")
def shown():
    return explorer(
        draw,
        wave=choice("wave", ["sin", "cos", "tan"], "cos"),
        frequency=slider("frequency", 1, 9, 3, 2),
        scale=log_slider("scale", 0.1, 1000, 1),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, shown) -> Path:
    """A site of one page: script, style, frames and the picture that stands there without them."""
    root = tmp_path_factory.mktemp("site")
    with plt.rc_context({"font.family": "DejaVu Sans", "figure.constrained_layout.use": True}):
        drawing = Drawing(shown, most=36)
        while not drawing.done:
            drawing.go_on()
        frames.write([drawing.result()] * 2, root / "02.json.gz")
        (root / "frame.png").write_bytes(to_png(shown()))
        (root / "raw.svg").write_text(drawn(shown(wave="tan", frequency=5, scale=0.1)))
    (root / "frames").mkdir()
    (root / "frames" / "02.js").write_text(frames.as_script(root / "02.json.gz", "02"))
    return root


@pytest.fixture(scope="module")
def made(folder: Path) -> dict[str, Any]:
    return frames.read(folder / "02.json.gz")[0]


def page_of(folder: Path, *, name: str = "02", above: int = 0, count: int = 1, dark: bool = False) -> Path:
    """The page as the site writes it, its figures ``above`` points from the top."""
    attributes = f'data-frames="frames/{name}.js" data-key="{name}" data-controls="3"'
    figures = "\n".join(
        f'<figure class="explorer" {attributes} data-index="{index}">'
        '<img src="frame.png" alt="waves" width="810" height="270" loading="lazy"></figure>'
        for index in range(count)
    )
    colours = "background:#131416;color:#eee;--color-foreground-primary:#ffffffcc;--color-background-primary:#131416;"
    colours += "--color-background-secondary:#1a1c1e;--color-foreground-secondary:#9ca0a5;--color-brand-primary:#3d94ff"
    path = folder / f"page-{name}-{above}-{count}-{dark}.html"
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>A page</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="stylesheet" href="{STATIC.as_uri()}/explorer.css">'
        f'<script src="{STATIC.as_uri()}/explorer.js" defer></script>'
        f'<body style="margin:0 auto;padding:0 16px;max-width:46rem;font-family:sans-serif;{colours if dark else ""}">'
        f'<div style="height:{above}px">Words above</div>{figures}<p id="after">Words below</p></body></html>'
    )
    return path


@pytest.fixture
def opened(browser, folder: Path):
    """Opens a page and gives it when its explorers move (or, where they cannot, when it is there)."""
    contexts = []

    def open_(path: Path, *, width: int = 1280, moves: bool = True, **options: Any) -> Any:
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **options))
        page = contexts[-1].new_page()
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.goto(path.as_uri())
        if moves:
            page.wait_for_selector(".explorer svg")
        return page

    yield open_
    for context in contexts:
        context.close()


def frame_at(made: dict[str, Any], *positions: int) -> tuple[str, str]:
    """The description and the SVG of the frame for these positions, found another way than the script does."""
    combinations = product(*(range(len(control["shown"])) for control in made["controls"]))
    place = next(i for i, combination in enumerate(combinations) if combination == positions)
    words, *parts = (made["pieces"][index] for index in made["frames"][made["grid"][place]])
    return words, "".join(parts)


NORMALISED = """([figure, svg]) => {
  const expected = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  expected.innerHTML = svg;
  return [document.querySelectorAll(".explorer svg")[figure].innerHTML, expected.innerHTML];
}"""


def shows(page: Any, made: dict[str, Any], *positions: int, figure: int = 0) -> bool:
    """Whether a figure shows just the frame that was drawn for these positions, and says so."""
    words, svg = frame_at(made, *positions)
    found, expected = page.evaluate(NORMALISED, [figure, svg.replace("{id}", f"explorer{figure}-")])
    label = page.locator(".explorer svg").nth(figure).get_attribute("aria-label")
    return bool(found) and found == expected and label == words and page.problems == []


def test_the_first_frame_is_the_start(opened, folder: Path, made) -> None:
    page = opened(page_of(folder))
    starts = [control["start"] for control in made["controls"]]
    assert shows(page, made, *starts)
    assert page.locator("select").input_value() == "1"
    assert page.locator("svg[role=img]").count() == 1
    assert page.locator(".explorer img").count() == 0
    assert page.get_by_role("combobox", name="wave", exact=True).count() == 1
    assert page.get_by_role("slider", name="frequency", exact=True).count() == 1
    positions = np.prod([len(control["shown"]) for control in made["controls"]])
    assert page.locator(".explorer-note").inner_text().startswith(f"Drawn beforehand at {positions} positions")


def test_a_slider_shows_the_frame_of_its_position(opened, folder: Path, made) -> None:
    page = opened(page_of(folder))
    wave, frequency, scale = (control["start"] for control in made["controls"])
    for position, words in enumerate(made["controls"][2]["shown"]):
        page.get_by_role("slider", name="scale").fill(str(position))
        assert shows(page, made, wave, frequency, position)
        assert page.get_by_role("slider", name="scale").get_attribute("aria-valuetext") == words
        assert page.locator(".explorer-value").nth(1).inner_text() == words
    page.get_by_role("combobox", name="wave").select_option("tan")
    page.get_by_role("slider", name="frequency").fill("0")
    assert shows(page, made, 2, 0, position)
    assert frame_at(made, 2, 0, position) != frame_at(made, wave, frequency, scale)


def test_keys_move_the_controls(opened, folder: Path, made) -> None:
    page = opened(page_of(folder))
    wave, frequency, scale = (control["start"] for control in made["controls"])
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "SELECT", "in the order of the page"
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert shows(page, made, wave, frequency + 1, scale)
    page.keyboard.press("End")
    assert shows(page, made, wave, len(made["controls"][1]["shown"]) - 1, scale)
    page.keyboard.press("Home")
    assert shows(page, made, wave, 0, scale)
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowLeft")
    assert shows(page, made, wave, 0, scale - 1)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Reset"
    page.keyboard.press("Enter")
    assert shows(page, made, wave, frequency, scale)
    assert page.get_by_role("slider", name="frequency").get_attribute("aria-valuetext") == "3"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "BODY", "a picture that fits is no stop"


def test_a_movement_is_told_once_it_rests(opened, folder: Path, made) -> None:
    page = opened(page_of(folder))
    status = page.get_by_role("status")
    assert status.get_attribute("aria-live") == "polite"
    assert status.inner_text() == "", "nothing is said before a movement"
    page.evaluate("window.said = []; new MutationObserver(() => window.said.push(1)).observe("
                  "document.querySelector('[role=status]'), { childList: true })")  # fmt: skip
    wave, _, scale = (control["start"] for control in made["controls"])
    for position in range(len(made["controls"][1]["shown"])):
        page.get_by_role("slider", name="frequency").fill(str(position))
    page.wait_for_function("document.querySelector('[role=status]').textContent !== ''")
    assert status.inner_text() == frame_at(made, wave, position, scale)[0]
    assert page.evaluate("window.said.length") == 1


def test_two_explorers_of_a_page_do_not_meddle(opened, folder: Path, made) -> None:
    page = opened(page_of(folder, count=2))
    page.wait_for_function("document.querySelectorAll('.explorer svg').length === 2")
    starts = [control["start"] for control in made["controls"]]
    page.get_by_role("combobox", name="wave").nth(1).select_option("sin")
    assert shows(page, made, *starts, figure=0)
    assert shows(page, made, 0, *starts[1:], figure=1)
    names = page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(names) == len(set(names))
    assert page.evaluate("document.querySelectorAll('script[src$=\"02.js\"]').length") == 1, "loaded once"


def test_frames_are_loaded_when_a_reader_comes_near(opened, folder: Path) -> None:
    page = opened(page_of(folder, above=3000), moves=False)
    page.wait_for_timeout(300)
    assert page.locator(".explorer svg").count() == 0
    assert page.evaluate("window.explorerFrames") is None
    page.mouse.wheel(0, 1700)  # the figure is 500 points below the screen
    page.wait_for_selector(".explorer svg", state="attached")
    page = opened(page_of(folder, above=3000), moves=False)
    page.evaluate("document.querySelector('.explorer').dispatchEvent(new FocusEvent('focusin'))")
    page.wait_for_selector(".explorer svg", state="attached")


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_jumps_when_the_picture_moves_in(browser, folder: Path, width) -> None:
    """From the moment the script runs: the picture and what stands below it stay where they are."""
    context = browser.new_context(viewport={"width": width, "height": 800})
    page = context.new_page()
    page.route("**/frames/02.js", lambda route: None)  # the frames do not come yet
    page.goto(page_of(folder).as_uri())
    page.wait_for_selector(".explorer-picture img")
    where = "['.explorer-picture', '#after'].map((s) => document.querySelector(s).getBoundingClientRect().toJSON())"
    before = page.evaluate(where)
    picture = page.locator(".explorer-picture img").bounding_box()
    page.unroute("**/frames/02.js")
    page.add_script_tag(path=str(folder / "frames" / "02.js"))
    page.evaluate("document.querySelector('script[src$=\"02.js\"]').onload()")
    page.wait_for_selector(".explorer svg")
    for old, new in zip(before, page.evaluate(where), strict=True):
        assert {side: new[side] for side in new} == pytest.approx(old, abs=0.5)
    assert page.locator(".explorer svg").bounding_box() == pytest.approx(picture, abs=0.5)
    context.close()


def test_on_a_phone_the_picture_scrolls_and_the_page_does_not(opened, folder: Path) -> None:
    page = opened(page_of(folder), width=390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    picture = page.locator(".explorer-picture")
    assert page.locator(".explorer svg").bounding_box()["width"] == pytest.approx(0.72 * 810, abs=1)
    assert picture.get_attribute("tabindex") == "0"
    assert picture.get_attribute("aria-label")
    picture.focus()
    for _ in range(8):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("document.querySelector('.explorer-picture').scrollLeft > 100")
    sizes = page.evaluate("[...document.querySelectorAll('.explorer :is(input, select, button)')]"
                          ".map((e) => e.getBoundingClientRect().toJSON())")  # fmt: skip
    assert all(size["height"] >= 24 and size["left"] >= 0 and size["right"] <= 390 for size in sizes)


def test_without_the_frames_the_picture_stays_and_a_line_says_so(opened, folder: Path) -> None:
    page = opened(page_of(folder, name="77"), moves=False)
    page.wait_for_function("document.querySelector('.explorer-note')?.textContent.includes('could not be loaded')")
    assert page.locator(".explorer img").is_visible()
    assert page.locator("select, input, button").count() == 0
    assert page.problems == []


def test_damaged_frames_are_as_none(opened, folder: Path) -> None:
    (folder / "frames" / "66.js").write_text('(window.explorerFrames ??= {})["66"] = "H4sIAAAA";\n')
    page = opened(page_of(folder, name="66"), moves=False)
    page.wait_for_function("document.querySelector('.explorer-note')?.textContent.includes('could not be loaded')")
    assert page.locator(".explorer img").is_visible()


@pytest.mark.parametrize("lacking", ["JavaScript", "DecompressionStream"])
def test_without_what_it_needs_the_page_is_as_it_was(opened, browser, folder: Path, lacking) -> None:
    if lacking == "JavaScript":
        page = opened(page_of(folder), moves=False, java_script_enabled=False, width=390)
    else:
        context = browser.new_context(viewport={"width": 390, "height": 800})
        context.add_init_script("delete window.DecompressionStream")
        page = context.new_page()
        page.goto(page_of(folder).as_uri())
    assert page.locator(".explorer img").is_visible()
    assert page.locator(".explorer :is(select, input, button, p)").count() == 0
    if lacking == "DecompressionStream":
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, "the figure scrolls by itself"
        context.close()


def test_the_picture_is_that_of_matplotlib(opened, folder: Path, made) -> None:
    """Pixel by pixel: the frame that the page puts together beside the SVG as matplotlib wrote it."""
    page = opened(page_of(folder))
    page.get_by_role("combobox", name="wave").select_option("tan")
    page.get_by_role("slider", name="frequency").fill(str(made["controls"][1]["shown"].index("5")))
    page.get_by_role("slider", name="scale").fill("0")
    at_origin = "position:fixed;left:0;top:0;width:810px;height:270px;max-width:none"
    page.locator(".explorer svg").evaluate(f"e => e.style = '{at_origin}'")
    ours = page.locator(".explorer svg").screenshot()
    raw = (folder / "raw.svg").read_text()
    raw = raw[raw.index("<svg") :].replace("<svg", f'<svg style="{at_origin}"', 1)
    page.set_content(f"<body>{raw}</body>")
    theirs = page.locator("svg").screenshot()
    a, b = (np.asarray(Image.open(io.BytesIO(png)).convert("L"), dtype=float) for png in (ours, theirs))
    assert a.shape == b.shape == (270, 810)
    assert abs(a - b).mean() < 1
    assert (abs(a - b) > 100).mean() < 0.002
    assert (a < 128).mean() > 0.01, "there is something to see"


@pytest.mark.parametrize("dark", [False, True])
def test_words_stand_out_from_what_is_behind_them(opened, folder: Path, dark) -> None:
    page = opened(page_of(folder, dark=dark))

    def light(selector: str, what: str) -> float:
        colour = page.locator(selector).first.evaluate(f"e => getComputedStyle(e).{what}")
        *rgb, alpha = [float(n) for n in re.findall(r"[\d.]+", colour)][:4] + ([1.0] if "rgba" not in colour else [])
        below = 0x13 if dark else 0xFF
        linear = [((alpha * c + (1 - alpha) * below) / 255 + 0.055) / 1.055 for c in rgb]
        return float(np.dot([0.2126, 0.7152, 0.0722], [c**2.4 for c in linear]))

    def contrast(a: float, b: float) -> float:
        return (max(a, b) + 0.05) / (min(a, b) + 0.05)

    behind = light(".explorer-controls", "backgroundColor")
    assert contrast(light(".explorer-label", "color"), behind) > 4.5
    assert contrast(light(".explorer-value", "color"), behind) > 4.5
    page_behind = light("body", "backgroundColor") if dark else 1.0
    assert contrast(light(".explorer-note", "color"), page_behind) > 4.5
    assert (
        page.locator(".explorer-picture").evaluate("e => getComputedStyle(e).backgroundColor") == "rgb(255, 255, 255)"
    )


def test_words_of_controls_are_words(opened, folder: Path, made, tmp_path: Path) -> None:
    """Labels and options of the notebook's author may hold any sign."""
    wave, *others = made["controls"]
    wave = {**wave, "label": escape("<b>&") + "<i>", "shown": ["<u>", "&amp;", "'\""]}
    one = {**made, "controls": [wave, *others]}
    frames.write([one], tmp_path / "55.json.gz")
    (folder / "frames" / "55.js").write_text(frames.as_script(tmp_path / "55.json.gz", "55"))
    page = opened(page_of(folder, name="55"))
    assert page.locator(".explorer-label").first.text_content() == "&lt;b&gt;&amp;<i>"
    assert page.locator("option").all_text_contents() == ["<u>", "&amp;", "'\""]
