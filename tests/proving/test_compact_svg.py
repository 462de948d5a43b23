"""A figure's pieces make up the picture that matplotlib draws, and nothing of it gets lost but decimals."""

import base64
import io
import re
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.backends.backend_svg import FigureCanvasSVG
from PIL import Image

from course_lib.proving.compact_svg import ID, SHORT, drawn, path_data, pieces

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def rich():
    """A figure with what explorers draw: lines, bands, markers, contours, images, dashes, mathematics."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained")
    x = np.linspace(0, 1, 50)
    axes[0, 0].plot(x, np.sin(9 * x), "--o", label=r"$\sigma^2$ of <b> & \"c\"")
    axes[0, 0].fill_between(x, x, 1 - x, alpha=0.2, linewidth=0)
    axes[0, 0].legend()
    axes[0, 0].set(title="η & <i>", xlabel=r"$\sqrt{x}$", ylabel="up", yscale="symlog")
    axes[0, 1].imshow(np.arange(12).reshape(3, 4) % 5, cmap="gray")
    axes[0, 1].imshow(np.ones((2, 2, 3)) * (1, 0.5, 0), extent=(4, 5, 0, 1))
    axes[0, 0].plot(x[::5], x[::5], "o", markerfacecolor="white", ls="")
    axes[0, 0].plot(x[:9], x[:9] + 0.2, "o", alpha=0.5, ls="")
    axes[1, 0].contourf(x, x, np.add.outer(x**2, x), levels=6)
    axes[1, 0].errorbar([0.2, 0.6], [0.3, 0.5], yerr=[0.1, 0.2], fmt="s", capsize=4)
    axes[1, 1].scatter(x, x**2, c=x, s=30 * x + 5)
    axes[1, 1].bar([0.2, 0.5], [0.5, 1], width=0.2, hatch="//")
    yield figure
    plt.close(figure)


def whole(parts):
    """What the page makes of pieces; many markers along a path as what the browser makes of them."""
    body = "".join(parts).replace(ID, "one-")
    tree = ElementTree.fromstring(f'<svg xmlns="http://www.w3.org/2000/svg">{body}</svg>')
    for group in tree.iter(f"{SVG}g"):
        if group[0].tag == f"{SVG}marker":
            marker, path = group
            assert {path.get(f"marker-{place}") for place in ("start", "mid", "end")} == {f"url(#{marker.get('id')})"}
            group[:] = [ElementTree.Element(f"{SVG}use", marker[0].attrib | {"x": str(x), "y": str(y)})
                        for _, (x, y) in absolute(path.get("d"))]  # fmt: skip
    return tree


def absolute(data):
    """The points of a path, as SVG's rules for steps give them: the letter, and each pair in absolute numbers."""
    here = start = np.zeros(2)
    found = []
    for letter, numbers in re.findall(r"([MLQCZmlqcz])([^A-Za-z]*)", data):
        rows = np.array([float(n) for n in re.findall(r"-?(?:\d+\.?\d*|\.\d+)", numbers)]).reshape(-1, 2)
        if letter in "Zz":
            here = start
            found.append(("Z", start))
            continue
        each = {"M": 1, "L": 1, "Q": 2, "C": 3}[letter.upper()]
        for group in rows.reshape(-1, each, 2):
            points = group + here if letter.islower() else group
            here = points[-1]
            found += [(letter.upper(), point) for point in points]
        if letter == "M":
            start = here
    return found


def test_every_element_that_is_drawn_is_kept_in_order(rich) -> None:
    raw = ElementTree.fromstring(drawn(rich))
    view, parts = pieces(drawn(rich))
    assert view == raw.get("viewBox") == "0 0 648 432"
    kinds = ("path", "use", "text", "tspan", "image", "rect", "clipPath", "pattern")
    shown = [[e.tag for e in tree.iter() if e.tag.removeprefix(SVG) in kinds] for tree in (raw, whole(parts))]
    assert shown[0] == shown[1]
    assert {tag.removeprefix(SVG) for tag in shown[0]} == set(kinds), "the figure has one of each"
    words = [[e.text for e in tree.iter() if e.tag in (f"{SVG}text", f"{SVG}tspan")] for tree in (raw, whole(parts))]
    plain, kept = [[(word or "").strip() for word in side] for side in words]
    assert plain == kept
    assert "η & <i>" in kept


def test_no_point_moves_by_more_than_a_twentieth(rich) -> None:
    raw, small = ElementTree.fromstring(drawn(rich)), whole(pieces(drawn(rich))[1])
    compared = 0
    for a, b in zip(raw.iter(f"{SVG}path"), small.iter(f"{SVG}path"), strict=True):
        old, new = absolute(a.get("d")), absolute(b.get("d"))
        old_points, new_points = [np.array([p for _, p in side]) for side in (old, new)]
        if len(old) == len(new):  # else steps that moved nothing were left out: their points lie on the line
            assert [letter for letter, _ in old] == [letter for letter, _ in new]
            assert np.abs(old_points - new_points).max() <= 0.0500001
        else:
            gaps = np.abs(old_points[:, None] - new_points[None]).max(-1).min(1)
            assert gaps.max() <= 0.0500001
        compared += len(old)
    assert compared > 1000
    for tag in ("use", "text", "tspan", "rect"):
        for a, b in zip(raw.iter(SVG + tag), small.iter(SVG + tag), strict=True):
            near = 0.0501 if tag == "use" else 0.006
            for name in ("x", "y", "width", "height"):
                assert float(b.get(name, 0)) == pytest.approx(float(a.get(name, 0)), abs=near)


def looks(tree):
    """Of each thing drawn: its style, what it refers to, the frames it is cut by, and how it is turned."""
    parents = {child: parent for parent in tree.iter() for child in parent}
    named = {element.get("id"): element for element in tree.iter() if element.get("id")}
    for element in tree.iter():
        if element.tag.removeprefix(SVG) not in ("path", "use", "text", "image"):
            continue
        link = element.get("{http://www.w3.org/1999/xlink}href") or element.get("href") or ""
        target = named[link[1:]].tag if link.startswith("#") else re.sub(r"\s", "", link)
        style, edges, turned, above = element.get("style", ""), [], element.get("transform", ""), element
        while above is not None:
            if cut := above.get("clip-path"):
                rect = named[cut.removeprefix("url(#").removesuffix(")")][0]
                edges.append([round(float(rect.get(name, 0)), 2) for name in ("x", "y", "width", "height")])
            above = parents.get(above)
        style = re.sub(r"url\(#.*?\)", "url", re.sub(r"([;:,]) ", r"\1", style))
        yield style, target, edges, "rotate(-90" in turned, re.findall(r"matrix\(.*\)", turned)


def test_looks_and_references_stay(rich) -> None:
    raw, small = [list(looks(tree)) for tree in (ElementTree.fromstring(drawn(rich)), whole(pieces(drawn(rich))[1]))]
    assert raw == small
    assert any(edges for _, _, edges, _, _ in small)
    assert any(matrix for *_, matrix in small), "an image is placed by factors, which keep their digits"


def test_names_are_marked_numbered_and_all_there(rich) -> None:
    text = "".join(pieces(drawn(rich))[1])
    named = re.findall(r'\bid="([^"]+)"', text)
    assert len(named) == len(set(named))
    assert all(re.fullmatch(r"\{id\}[A-Za-z]\d+", name) for name in named)
    referred = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
    assert referred == set(named), "no name is missing, and none is there for nothing"


def test_nothing_reaches_beyond_the_picture(rich) -> None:
    text = "".join(pieces(drawn(rich))[1])
    for tag in ("style", "metadata", "script", "title", "a"):
        assert f"<{tag}" not in text
    assert not re.search(r"https?:|\son\w+=|\d{4}-\d\d-\d\dT", text)
    assert "<b>" not in text, "words are words, not elements"


def test_many_markers_are_one_path_unless_one_sees_through_them(rich) -> None:
    text = "".join(pieces(drawn(rich))[1])
    markers = re.findall(
        r'<marker id="([^"]+)"[^>]*><use href="([^"]+)" style="([^"]+)"/></marker><path d="([^"]+)"', text
    )
    assert [len(absolute(data)) for *_, data in markers] == [50, 10]
    assert markers[0][0] != markers[1][0]
    assert "fill:#ffffff" in markers[1][2] != markers[0][2]
    assert len(re.findall(r"<use [^>]*opacity:0\.5", text)) == 9


def test_images_are_their_own_pixels() -> None:
    figure, axes = plt.subplots(1, 2, figsize=(4, 2))
    values = np.random.default_rng(0).integers(0, 256, (5, 7))
    for ax in axes:
        ax.imshow(values, cmap="gray", vmin=0, vmax=255)
    text = "".join(pieces(drawn(figure))[1])
    plt.close(figure)
    images = re.findall(r'href="data:image/png;base64,([^"]+)"', text)
    assert len(images) == 2, "images of one axes each are not drawn into one"
    for image in images:
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(image))).convert("L"))
        assert shown.shape == values.shape
        assert (shown == values).all()
    assert "image-rendering:pixelated" in text


def test_the_same_figure_gives_the_same_pieces_and_a_like_one_shares_them() -> None:
    def waves(frequency):
        figure, axes = plt.subplots(figsize=(4, 3))
        axes.plot(np.linspace(0, 1, 50), np.sin(frequency * np.linspace(0, 1, 50)))
        axes.set(xlim=(0, 1), ylim=(-1, 1), title="waves")
        try:
            return pieces(drawn(figure))[1]
        finally:
            plt.close(figure)

    assert waves(5) == waves(5)
    differ = [(a, b) for a, b in zip(waves(5), waves(6), strict=True) if a != b]
    assert len(differ) == 1, "only the line"


def test_short_elements_are_one_piece_with_what_they_hold(rich) -> None:
    parts = pieces(drawn(rich))[1]
    opened = [part for part in parts if part.startswith("<") and not part.startswith("</") and part.count("<") == 1]
    assert any(part.endswith("</defs>") and part.startswith("<defs>") for part in parts)
    assert all(len(part) <= SHORT or part.startswith("<text") for part in parts if part.count("<") > 2)
    assert opened


def test_drawing_leaves_the_figure_its_canvas(rich) -> None:
    canvas = rich.canvas
    drawn(rich)
    assert rich.canvas is canvas
    assert not isinstance(canvas, FigureCanvasSVG)


def test_words_that_would_be_taken_for_a_name_are_refused() -> None:
    figure = plt.figure()
    figure.suptitle("an {id} of mine")
    with pytest.raises(ValueError, match=r"\{id\}"):
        pieces(drawn(figure))
    plt.close(figure)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("M 100 200 \nL 101.26 199.5 \nL 101.26 190 \nz", "M100 200l1.3-.5 0-9.5z"),
        ("M 100 200 L 100 200", "M100 200l0 0"),  # a dot
        ("M 100 200 L 130 200 L 130.01 200.02 L 140 200", "M100 200l30 0 10 0"),
        ("M 0 3 C 0.795609 3 1.55874 2.683901 2.12132 2.12132", "M0 3c.8 0 1.56-.32 2.12-.88"),
        ("M 10 50 Q 20 60 30 50 z M 40 50 L 40 60", "M10 50q10 10 20 0zM40 50l0 10"),
        ("M 0.4 60 L 0.84 60 L 1.28 60 L 1.72 60", "M.4 60l.4 0 .5 0 .4 0"),  # rounding does not add up: 1.7 at the end
        ("", ""),
    ],
)
def test_paths_in_steps(data, expected) -> None:
    assert path_data(data) == expected
