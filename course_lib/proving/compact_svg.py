"""A figure as a small SVG in pieces, so that many frames of one explorer can share what they have in common.

``drawn`` has matplotlib's own SVG backend draw a figure, text as text and images as their own pixels; ``pieces`` takes
that SVG apart. Nothing that can be seen is lost but a twentieth of a point: what goes are metadata, groups that do
nothing, names that nothing refers to, and decimals.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator
from xml.etree import ElementTree

import matplotlib.pyplot as plt
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

ID = "{id}"  # stands before each name in a piece, for a word that no other picture of the page uses
MANY = 8  # markers
SHORT = 200  # characters; an element that is no longer, with all it holds, is one piece

# For the element that holds the pieces. matplotlib's SVG has a style sheet that says so for "*", which in a page would
# hold for all of it.
ROOT_STYLE = "stroke-linejoin:round;stroke-linecap:butt"

_STYLE = {
    "svg.fonttype": "none",  # text stays text: small, and sharp at every size
    "svg.hashsalt": "craft",  # the same names in every run
    "svg.image_inline": True,
}
_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_NUMBER = re.compile(r"-?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?")
_PLACES = frozenset(("x", "y", "width", "height", "cx", "cy", "r"))
_PLACING = re.compile(r"(translate|rotate)\(([^)]*)\)")  # not scale and matrix: of factors, digits count, not decimals
_NO_TURN = re.compile(r"rotate\(-?0(?: [^)]*)?\) ?")


def drawn(figure: Figure) -> str:
    """The figure as matplotlib's SVG, 72 units an inch, without date; its images then show their pixels."""
    for axes in figure.axes:
        for image in (image for one in (axes, *axes.child_axes) for image in one.images):
            image.set_interpolation("none")
    stream, canvas = io.StringIO(), figure.canvas
    try:
        with plt.rc_context(_STYLE):  # type: ignore[arg-type]
            # not savefig, which would lay the figure out twice
            FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None})
    finally:
        figure.set_canvas(canvas)
    return stream.getvalue()


def pieces(svg: str) -> tuple[str, list[str]]:
    """The ``viewBox`` of matplotlib's SVG, and what stands inside it, as pieces that make it up in their order.

    The names in it (of clips, markers, gradients) are ``{id}p0``, ``{id}p1``, ``{id}m0``, … by kind and order.

    Raises
    ------
    ValueError : the picture's own words hold ``{id}``.
    """
    if ID in svg:
        raise ValueError(f"the figure's words hold {ID!r}, which has a meaning of its own in a frame")
    root = ElementTree.fromstring(svg)
    wanted = {name for element in root.iter() for name in _references(element)}
    names: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for element in root.iter():
        name = element.get("id", "")
        if name in wanted and name not in names:
            kind = name[0]  # numbered by itself, so that a new marker gives no clip another name
            names[name] = f"{ID}{kind}{seen[kind]}"
            seen[kind] += 1
    return root.attrib["viewBox"], [piece for child in root for piece in _pieces(child, names)]


def path_data(data: str) -> str:
    """A path of matplotlib's (M, L, Q, C and z, absolute) in steps from point to point, which take half the bytes.

    Points are rounded to tenths, those of a small shape (a marker) to hundredths; rounding does not add up. A step that
    moves nothing is left out of a line, but for its first: a line of one point still has its dot.
    """
    parts = re.findall(r"([MLQCz])([^MLQCz]*)", data)
    numbers = [[float(number) for number in written.split()] for _, written in parts]
    scale = 100 if max((abs(x) for row in numbers for x in row), default=0) < 20 else 10
    here = start = (0, 0)
    out, before = [], ""
    for (command, _), row in zip(parts, numbers, strict=True):
        counts = [round(number * scale) for number in row]
        pairs = list(zip(counts[::2], counts[1::2], strict=True))
        if command == "z":
            out.append("z")
            here = start
        elif command == "M":
            out.append("M" + _joined(counts, scale))
            here = start = pairs[0]
        elif command != "L" or before != "L" or pairs[0] != here:
            steps = _joined([to - origin for pair in pairs for to, origin in zip(pair, here, strict=True)], scale)
            letter = command.lower() if command != before else "" if steps[0] == "-" else " "
            out.append(letter + steps)
            here = pairs[-1]
        before = command
    return "".join(out)


def _references(element: ElementTree.Element) -> Iterator[str]:
    for name, value in element.attrib.items():
        if name == _XLINK and value.startswith("#"):
            yield value[1:]
        yield from _REFERENCE.findall(value)


def _pieces(element: ElementTree.Element, names: dict[str, str]) -> list[str]:
    tag = element.tag.removeprefix(_SVG)
    if tag in ("metadata", "style"):
        return []
    inside = _markers(element, names) or [piece for child in element for piece in _pieces(child, names)]
    attributes = _attributes(element, names)
    if tag in ("g", "defs") and (not inside or (tag == "g" and not attributes)):
        return inside
    words = _escaped(element.text) if element.text and element.text.strip() else ""
    if not inside and not words:
        return [f"<{tag}{attributes}/>"]
    parts = [f"<{tag}{attributes}>{words}", *inside, f"</{tag}>"]
    whole = "".join(parts)
    return [whole] if len(whole) <= SHORT or tag == "text" else parts


def _markers(element: ElementTree.Element, names: dict[str, str]) -> list[str]:
    """Many markers of one look as a path with a marker at each point, which takes a tenth of the bytes; [] if not so.

    Where a line goes through them, its own piece has the same steps. Markers that one can see through stay as they are:
    of two in one place only one would be left.
    """
    looks = {(child.tag, child.get(_XLINK), child.get("style", "")) for child in element}
    if (
        len(element) < MANY
        or len(looks) > 1
        or any(tag != f"{_SVG}use" or "opacity" in style for tag, _, style in looks)
    ):
        return []
    ((_, link, style),) = looks
    points = [f"{child.attrib['x']} {child.attrib['y']}" for child in element]
    # one each time: the same shape may come back filled otherwise
    name = names.setdefault(f"many {len(names)}", f"{ID}k{len(names)}")
    one = ElementTree.Element(f"{_SVG}use", {_XLINK: str(link), "style": style})
    ends = "".join(f' marker-{place}="url(#{name})"' for place in ("start", "mid", "end"))
    return [
        f'<marker id="{name}" markerUnits="userSpaceOnUse" overflow="visible">{"".join(_pieces(one, names))}</marker>',
        f'<path d="{path_data("M" + "L".join(points))}" fill="none"{ends}/>',
    ]


def _attributes(element: ElementTree.Element, names: dict[str, str]) -> str:
    written = []
    for name, value in element.attrib.items():
        if name == "id":
            value = names.get(value, "")
        elif name == "d":
            value = path_data(value)
        elif name == "transform":
            value = _NO_TURN.sub("", _PLACING.sub(lambda match: f"{match[1]}({_rounded(match[2])})", value)).strip()
        elif name == "style":
            value = re.sub(r"([;:,]) ", r"\1", value)
        elif name in _PLACES:
            value = _rounded(value)
        elif name == _XLINK:
            name = "href"
            value = f"#{names[value[1:]]}" if value.startswith("#") else value.replace(" ", "")  # base64 in lines
        value = _REFERENCE.sub(lambda match: f"url(#{names[match[1]]})", value)
        if value:
            written.append(f' {name}="{_escaped(value)}"')
    return "".join(written)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


def _rounded(numbers: str) -> str:
    """Numbers of two decimals at most; what stands between them stays."""
    return _NUMBER.sub(lambda match: _short(round(float(match[0]) * 100), 100), numbers)


def _short(count: int, parts: int) -> str:
    """``count / parts`` in as few characters as SVG allows: ``-.4``, ``12``."""
    text = f"{abs(count) / parts:.10g}"
    text = text[1:] if text.startswith("0.") else text
    return f"-{text}" if count < 0 else text


def _joined(counts: list[int], parts: int) -> str:
    """Numbers side by side; a minus sign needs no space before it."""
    return " ".join(_short(count, parts) for count in counts).replace(" -", "-")
