"""Plot reproduction: what a figure shows, as data that two runs can be compared by.

``register`` teaches IPython to store beside the PNG of every matplotlib figure its content (``describe_figure``): axes,
words, legends, and the data of every series. ``differences`` says in the reader's terms where two such descriptions
disagree. Authors do nothing: importing ``course_lib.lab`` in a notebook registers the formatter.

Columns of numbers are stored as one string each, rounded to 4 significant digits and thinned to 200 points:
``"0.91 0.934 nan"``, or ``"0:29:30"`` (from, to, how many) where they are evenly spaced. So they stay on one line of
the notebook file, and NaN needs no exception to JSON.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import collections as mpl_collections
from matplotlib import colors, contour, image, lines, patches, quiver, text
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.category import StrCategoryLocator
from matplotlib.container import BarContainer, ErrorbarContainer, StemContainer
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.path import Path
from matplotlib.table import Table
from matplotlib.ticker import FixedLocator, NullLocator

from course_lib.proving.agreement import pack
from course_lib.proving.figure_comparison import differences

__all__ = ["FIGURE_MIME", "describe_figure", "differences", "register"]

FIGURE_MIME = "application/vnd.craft.figure+json"

POINTS = 200  # kept of a series
THUMBNAIL = 8  # rows and columns kept of an image; one of up to 16 by 16 is a heat map and kept whole

Description = dict[str, Any]


def _thin(n: int) -> np.ndarray:
    """The indexes kept of ``n`` points: the first, the last, and evenly many between."""
    return np.arange(n) if n <= POINTS else np.unique(np.round(np.linspace(0, n - 1, POINTS)).astype(int))


def _colour(artist: Any) -> str:
    """The colour a reader sees, as hex; "" where an artist has many or none."""
    found: list[Any]
    if isinstance(artist, lines.Line2D):
        found = [artist.get_color() if artist.get_linestyle() != "None" else artist.get_markerfacecolor()]
    elif isinstance(artist, patches.Patch):
        face: Any = artist.get_facecolor()
        found = [face if face[3] > 0 else artist.get_edgecolor()]
    elif isinstance(artist, mpl_collections.Collection):
        if artist.get_array() is not None:
            return ""  # colours follow from values, which are compared
        faces: Any = artist.get_facecolor()
        edges: Any = artist.get_edgecolor()
        found = list(faces if len(faces) else edges)
    elif isinstance(artist, text.Text):
        found = [artist.get_color()]
    else:
        return ""
    names = {colors.to_hex(colour) for colour in found if str(colour) != "none"}
    return names.pop() if len(names) == 1 else ""


def _style(artist: Any) -> str:
    """What tells series of one colour apart: line style and marker, or the hatch."""
    if isinstance(artist, lines.Line2D):
        marker = artist.get_marker()
        name = marker if isinstance(marker, str | int | tuple) else type(marker).__name__
        return f"{artist.get_linestyle()} {name}".replace("None", "").strip()
    return str(getattr(artist, "get_hatch", lambda: None)() or "")


def _label(artist: Any) -> str:
    label = str(artist.get_label() or "")
    return "" if label.startswith("_") else label


def _series(kind: str, artist: Any, columns: Mapping[str, Any], label: str | None = None) -> Description:
    """One series; ``columns`` are its numbers, all of one length, the independent one first."""
    arrays: dict[str, np.ma.MaskedArray] = {
        name: np.ma.asarray(values, dtype=float).ravel() for name, values in columns.items()
    }
    points = max((len(array) for array in arrays.values()), default=0)
    kept = _thin(points)
    return {
        "kind": kind,
        "label": _label(artist) if label is None else label,
        "colour": _colour(artist),
        "style": _style(artist),
        "points": points,
        "data": {name: pack(array[kept]) for name, array in arrays.items()},
    }


def _in_data(artist: Artist, axes: Axes) -> Sequence[bool]:
    """Whether an artist's x and y are in the units of the axes."""
    return artist.get_transform().contains_branch_seperately(axes.transData)


def _thumbnail(values: Any) -> np.ndarray:
    """Means of blocks, ``[rows, columns]`` or ``[rows, columns, channels]``; small images as they are."""
    array: np.ndarray = np.ma.filled(np.ma.asarray(values, dtype=float), np.nan)
    if max(array.shape[:2]) <= 2 * THUMBNAIL:
        return array
    for axis in (0, 1):
        blocks = np.array_split(array, min(THUMBNAIL, array.shape[axis]), axis=axis)
        with np.errstate(all="ignore"):
            array = np.stack([block.mean(axis=axis) for block in blocks], axis=axis)
    return array


def _picture(kind: str, artist: Any, values: Any, extent: Sequence[float]) -> Description:
    array = np.ma.asarray(values)
    shown = _series(kind, artist, {"value": _thumbnail(array)})
    shown["data"]["value"] = pack(_thumbnail(array))  # whole: a thumbnail is never thinned
    shown |= {"shape": list(array.shape), "thumbnail": list(_thumbnail(array).shape), "extent": pack(extent)}
    if array.ndim == 2:
        shown |= {"colours": artist.get_cmap().name, "norm": type(artist.norm).__name__}
        shown["range"] = pack(artist.get_clim())
    return shown


def _segments(kind: str, artist: Any, segments: Sequence[Any], label: str | None = None) -> Description:
    ends = np.array([[*segment[0], *segment[-1]] for segment in segments if len(segment)], dtype=float).reshape(-1, 4)
    return _series(kind, artist, {"x": ends[:, 0], "y": ends[:, 1], "x2": ends[:, 2], "y2": ends[:, 3]}, label)


def _error_bars(container: ErrorbarContainer) -> Iterator[Description]:
    line, _, bars = container.lines
    label = _label(container)
    if line is not None:
        yield _series("line", line, {"x": line.get_xdata(orig=False), "y": line.get_ydata(orig=False)}, label)
    directions = ["x"] * bool(container.has_xerr) + ["y"] * bool(container.has_yerr)
    for direction, bar in zip(directions, bars, strict=False):
        ends = np.array(bar.get_segments(), dtype=float).reshape(-1, 2, 2)
        start, stop = ends[:, 0], ends[:, 1]
        if direction == "y":
            yield _series("error bars", bar, {"x": start[:, 0], "low": start[:, 1], "high": stop[:, 1]}, label)
        else:
            yield _series("error bars", bar, {"y": start[:, 1], "left": start[:, 0], "right": stop[:, 0]}, label)


def _bars(container: BarContainer) -> Description:
    boxes = np.array([[b.get_x(), b.get_y(), b.get_width(), b.get_height()] for b in container.patches]).reshape(-1, 4)
    x, y, width, height = boxes.T
    first = container.patches[0] if container.patches else None
    if container.orientation == "horizontal":
        shown = _series("bars", first, {"y": y + height / 2, "base": x, "end": x + width}, _label(container))
    else:
        shown = _series("bars", first, {"x": x + width / 2, "bottom": y, "top": y + height}, _label(container))
    each = [_colour(patch) for patch in container.patches]
    if len(set(each)) > 1:
        shown["colour"] = " ".join(each[i] for i in _thin(len(each)))
    return shown


def _band(artist: Any) -> Description:
    # Each polygon runs along one edge and back along the other: start, n points, end, n points, start.
    halves: list[list[np.ndarray]] = [[np.empty((0, 2))], [np.empty((0, 2))]]
    for path in artist.get_paths():
        n = (len(path.vertices) - 3) // 2
        halves[0].append(path.vertices[1 : n + 1])
        halves[1].append(path.vertices[n + 2 : 2 * n + 2][::-1])
    one, other = (np.concatenate(half) for half in halves)
    if artist.t_direction == "x":
        return _series("band", artist, {"x": one[:, 0], "low": one[:, 1], "high": other[:, 1]})
    return _series("band", artist, {"y": one[:, 1], "left": one[:, 0], "right": other[:, 0]})


def _contours(artist: Any) -> Description:
    """Each level's length and centre: vertices move along a contour from run to run, these do not."""
    rows = []
    for path in artist.get_paths():
        codes = np.full(len(path.vertices), Path.LINETO) if path.codes is None else path.codes
        start, stop = path.vertices[:-1], path.vertices[1:]
        drawn = codes[1:] != Path.MOVETO
        length = np.linalg.norm(stop - start, axis=1)[drawn]
        middle = ((start + stop) / 2)[drawn]
        total = length.sum()
        rows.append([total, *(length @ middle / total if total > 0 else (0.0, 0.0))])
    table = np.array(rows).reshape(-1, 3)
    centre = dict(zip("xy", table.T[1:], strict=True))
    shown = _series("filled contours" if artist.filled else "contours", artist, centre)
    return shown | {"levels": pack(artist.levels), "length": pack(table[:, 0]), "colours": artist.get_cmap().name}


def _scatter(artist: Any) -> Description:
    offsets: Any = np.ma.asarray(getattr(artist, "_offsets3d", None) or artist.get_offsets().T, dtype=float)
    columns = dict(zip("xyz", offsets, strict=False))
    values, sizes = artist.get_array(), artist.get_sizes()
    if values is not None and len(values) == offsets.shape[1]:
        columns["value"] = values
    if len(sizes) == offsets.shape[1] and len(set(sizes)) > 1:
        columns["size"] = sizes
    shown = _series("points", artist, columns)
    if "value" in columns:
        shown |= {"colour": "", "colours": artist.get_cmap().name}
    elif not shown["colour"] and len(artist.get_facecolor()) == offsets.shape[1]:
        shown["colour"] = " ".join(colors.to_hex(artist.get_facecolor()[i]) for i in _thin(offsets.shape[1]))
    return shown


def _line(artist: Any, axes: Axes) -> Description:
    if hasattr(artist, "get_data_3d"):
        return _series("line", artist, dict(zip("xyz", artist.get_data_3d(), strict=True)))
    in_data = dict(zip("xy", _in_data(artist, axes), strict=True))
    columns = {"x": artist.get_xdata(orig=False), "y": artist.get_ydata(orig=False)}
    # axhline and axvline: the coordinate that spans the axes says nothing.
    return _series("line", artist, {name: values for name, values in columns.items() if in_data[name]})


def _shape(artist: Any) -> Description:
    if isinstance(artist, patches.FancyArrowPatch):
        ends: Any = getattr(artist, "_posA_posB", None)
        if isinstance(artist, patches.ConnectionPatch):
            ends = artist.xy1, artist.xy2
        return _segments("arrow", artist, [ends] if ends and ends[0] is not None else [])
    if isinstance(artist, patches.FancyBboxPatch):
        x, y = artist.get_x(), artist.get_y()
        corners = np.array([[x, y], [x + artist.get_width(), y + artist.get_height()]])
    else:
        corners = artist.get_patch_transform().transform(artist.get_path().vertices)
    return _series("shape", artist, {"x": corners[:, 0], "y": corners[:, 1]})


def _describe_artist(artist: Any, axes: Axes) -> Description | None:
    match artist:
        case lines.Line2D():
            return _line(artist, axes)
        case contour.ContourSet():
            return _contours(artist)
        case mpl_collections.FillBetweenPolyCollection():
            return _band(artist)
        case mpl_collections.PathCollection():
            return _scatter(artist)
        case mpl_collections.LineCollection():
            return _segments("segments", artist, getattr(artist, "_segments3d", None) or artist.get_segments())
        case mpl_collections.QuadMesh():
            grid: np.ndarray = np.asarray(artist.get_coordinates())  # [rows + 1, columns + 1, 2]
            corners, values = grid.reshape(-1, 2), np.ma.MaskedArray(artist.get_array())
            values = values if values.ndim > 1 else values.reshape(grid.shape[0] - 1, grid.shape[1] - 1)
            return _picture("colour mesh", artist, values, [*corners.min(0), *corners.max(0)])
        case quiver.Quiver():
            return _series("arrows", artist, {"x": artist.X, "y": artist.Y, "u": artist.U, "v": artist.V})
        case mpl_collections.Collection():
            faces = getattr(artist, "_faces", None)  # a surface in 3D
            if faces is not None:
                corners = np.ma.asarray(faces, dtype=float).reshape(-1, 3)
                return _series("surface", artist, dict(zip("xyz", corners.T, strict=True)))
            stacked = np.concatenate([np.empty((0, 2)), *(path.vertices for path in artist.get_paths())])
            shown = _series("shapes", artist, {"x": stacked[:, 0], "y": stacked[:, 1]})
            if artist.get_array() is not None:
                values = np.ma.MaskedArray(artist.get_array()).ravel()
                shown["value"] = pack(values[_thin(len(values))])
            return shown
        case image.AxesImage():
            return _picture("image", artist, artist.get_array(), artist.get_extent())
        case patches.Patch():
            return _shape(artist)
        case _:  # a table, a box of text
            texts = [cell.get_text() for cell in artist.get_celld().values()] if isinstance(artist, Table) else []
            words = [t.get_text() for t in [*texts, *artist.findobj(text.Text)] if t.get_text()]
            return {"kind": type(artist).__name__, "label": "", "words": words, "data": {}} if words else None


def _describe_legend(legend: Legend) -> Description:
    entries = [
        {"text": entry.get_text(), "colour": _colour(handle), "style": _style(handle)}
        for entry, handle in zip(legend.get_texts(), legend.legend_handles, strict=False)
    ]
    return {"title": legend.get_title().get_text(), "entries": entries}


def _describe_text(artist: Any, axes: Axes | None) -> Description:
    in_data = _in_data(artist, axes) if axes is not None else (False, False)
    position = artist.xy if isinstance(artist, text.Annotation) else artist.get_position()
    if isinstance(artist, text.Annotation):
        in_data = (artist.xycoords == "data",) * 2
    return {
        "text": artist.get_text(),
        "colour": _colour(artist),
        "at": pack(position[:2]),
        "in_data": "".join(name for name, yes in zip("xy", in_data, strict=True) if yes),
    }


def _tick_words(axis: Axis) -> dict[str, str]:
    """Tick labels that are words, by position; those that matplotlib chose are numbers and follow from the limits."""
    locator = axis.get_major_locator()
    if not isinstance(locator, FixedLocator | StrCategoryLocator) or isinstance(locator, NullLocator):
        return {}
    places: Any = axis.get_ticklocs()
    labels = [str(label) for label in axis.get_major_formatter().format_ticks(places)]
    worded = any(character.isalpha() for label in labels for character in label)
    return {f"{place:.4g}": label for place, label in zip(places, labels, strict=True)} if worded else {}


def _scale(axis: Axis) -> str:
    name = axis.get_scale()
    threshold: Any = getattr(axis.get_transform(), "linthresh", 1.0)
    return f"symlog {threshold:.4g}" if name == "symlog" else name


def _describe_axes(axes: Axes) -> Description:
    title = " | ".join(filter(None, (axes.get_title(loc) for loc in ("left", "center", "right"))))
    names = [name for name in "xyz" if hasattr(axes, f"get_{name}label")]
    described: Description = {"title": title, "label": {}, "scale": {}, "limits": {}, "ticks": {}}
    for name in names:
        described["label"][name] = getattr(axes, f"get_{name}label")()
        described["scale"][name] = _scale(getattr(axes, f"{name}axis"))
        described["limits"][name] = pack(getattr(axes, f"get_{name}lim")())
        described["ticks"][name] = _tick_words(getattr(axes, f"{name}axis"))
    legends = [child for child in axes.get_children() if isinstance(child, Legend)]
    described["legends"] = [_describe_legend(legend) for legend in legends]
    described["texts"], described["series"] = [], []
    if axes.get_label() == "<colorbar>":
        return described  # its content is its limits
    titles = {id(getattr(axes, name, None)) for name in ("title", "_left_title", "_right_title")}
    done: set[int] = {id(axes.patch)} | {id(spine) for spine in axes.spines.values()} | {id(axes.xaxis), id(axes.yaxis)}
    done |= {id(legend) for legend in legends} | titles | {id(getattr(axes, "zaxis", None))}
    done |= {id(inset) for inset in axes.child_axes}  # described as axes of their own
    for container in axes.containers:
        match container:
            case ErrorbarContainer():
                line, caps, bars = container.lines
                done |= {id(part) for part in (line, *caps, *bars)}
                described["series"] += _error_bars(container)
            case BarContainer():
                done |= {id(patch) for patch in container.patches}
                described["series"].append(_bars(container))
            case StemContainer():
                done |= {id(part) for part in (container.markerline, container.stemlines, container.baseline)}
                line = container.markerline
                columns = {"x": line.get_xdata(orig=False), "y": line.get_ydata(orig=False)}
                described["series"].append(_series("stems", line, columns, _label(container)))
    for artist in axes.get_children():
        if id(artist) in done or not artist.get_visible():
            continue
        if isinstance(artist, text.Text):
            if artist.get_text():
                described["texts"].append(_describe_text(artist, axes))
            if isinstance(artist, text.Annotation) and artist.arrow_patch is not None and not artist.get_text():
                ends = (artist.xy, artist.get_position())
                described["series"].append(_segments("arrow", artist.arrow_patch, [ends]))
            continue
        series = _describe_artist(artist, axes)
        if series is not None:
            described["series"].append(series)
    return described


def describe_figure(fig: Figure) -> Description:
    """What a figure shows, as JSON: words, scales, limits, legends, and the data of each series.

    ``alt`` is there if the author wrote an alternative text (`course_lib.lab.plotting.describe`).
    """
    titles = [getattr(fig, name, None) for name in ("_suptitle", "_supxlabel", "_supylabel")]
    texts = [one for part in (fig, *fig.subfigs) for one in part.texts if one not in titles and one.get_text()]
    panels = [one for axes in fig.axes for one in (axes, *axes.child_axes) if one.get_visible()]
    alt = {"alt": str(fig.get_label())} if fig.get_label() else {}
    return {
        **alt,
        "title": fig.get_suptitle(),
        "labels": [fig.get_supxlabel(), fig.get_supylabel()],
        "size": pack(fig.get_size_inches()),  # inches
        "legends": [_describe_legend(legend) for legend in fig.legends],
        "texts": [_describe_text(one, None) for one in texts],
        "axes": [_describe_axes(axes) for axes in panels if isinstance(axes, Axes)],
    }


def register(ipython: Any = None) -> None:
    """Make IPython store ``describe_figure`` beside every figure it displays; does nothing outside IPython."""
    if ipython is None and "IPython" in sys.modules:
        ipython = sys.modules["IPython"].get_ipython()
    formatter = getattr(ipython, "display_formatter", None)
    if formatter is None or FIGURE_MIME in formatter.formatters:
        return
    from IPython.core.formatters import BaseFormatter, catch_format_error
    from traitlets import ObjectName, Unicode

    class FigureFormatter(BaseFormatter):
        format_type = Unicode(FIGURE_MIME)
        print_method = ObjectName("_repr_craft_figure_")  # no class has it
        _return_type = dict

        # Not for_type: the inline backend removes Figure from every formatter when it starts, which is after this.
        @catch_format_error
        def __call__(self, obj: Any) -> Description | None:
            return describe_figure(obj) if isinstance(obj, Figure) else None

    formatter.formatters[FIGURE_MIME] = FigureFormatter(parent=formatter)
    if "image/png" in formatter.active_types and FIGURE_MIME not in formatter.active_types:
        formatter.active_types = [*formatter.active_types, FIGURE_MIME]
