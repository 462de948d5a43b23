"""Letters and digits drawn from matplotlib's own fonts: as many as wanted, always there, as hard as wanted.

A glyph is drawn once for each font, as a map of distances to its outline; every image then samples such a map under its
own affine and elastic distortion, and paints it with its own stroke width, contrast, light and noise. Whole batches are
drawn at once (5,000 images of 28×28 in about a second on one core).

What is random is drawn first and scaled by the knobs afterwards. So, for one ``seed``:
- the same call gives the same images, bit for bit;
- a larger ``count`` begins with the images of a smaller one;
- another ``difficulty`` or ``domain`` shows the same characters in the same pose, only more distorted or drawn
  otherwise.

Outlines are filled, and images sampled and painted, by the few numpy steps below rather than by a graphics library:
those steps give the same pixels whatever the processor and the number of threads.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from course_lib.lab.arguments import at_least

Array = NDArray[Any]

FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic"),
    *("cmr10", "cmb10", "cmss10", "cmtt10", "cmti10"),
)
CLASSES = {
    "digits": string.digits,
    "letters": string.ascii_uppercase,
    "all": string.digits + string.ascii_uppercase,
}
DOMAINS = ("print", "chalk", "outline", "colour")
SIZES = (16, 64)

MASTER = 96  # pixels a side of a distance map
CHUNK = 256  # images painted at once: the working set stays in the processor's cache


def generate(
    count: int,
    *,
    size: int = 28,
    seed: int | tuple[int, ...] = 0,
    difficulty: float = 0.3,
    domain: str = "print",
    classes: str = "all",
) -> tuple[Array, Array]:
    """Draws ``count`` characters; the classes are balanced to within one image.

    Parameters
    ----------
    size : pixels a side, 16 to 64
    seed : one number, or several for independent streams such as ``(seed, split)``
    difficulty : 0 (upright, clean) to 1 (turned, bent, faint, noisy, crossed out)
    domain : "print" (dark ink on paper), "chalk" (bright and grainy on a dark board), "outline" (a thin bright
        contour on black) or "colour" (coloured ink on coloured paper, the only one with three channels)
    classes : "digits", "letters" or "all" (36 classes; O and 0, I and 1 are hard to tell apart in some fonts)

    Returns
    -------
    images : uint8 [count, C, size, size], C = 3 for "colour" and 1 otherwise
    labels : int64 [count], positions in ``CLASSES[classes]``
    """
    check_knobs(count=count, size=size, difficulty=difficulty, domain=domain, classes=classes)
    streams = iter(np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(8))
    maps = distance_maps(CLASSES[classes])  # [K, F, M, M]

    labels = _balanced_labels(count, len(maps), next(streams))
    fonts = next(streams).integers(0, maps.shape[1], count)
    pose = Pose.draw(count, difficulty, next(streams))
    bends = next(streams).uniform(-1, 1, (count, 2, 4, 4)).astype(np.float32) * np.float32(0.055 * difficulty)
    look = next(streams).random((count, 16), dtype=np.float32)
    grain, clouds, noise = streams

    images = np.empty((count, 3 if domain == "colour" else 1, size, size), np.uint8)
    for start in range(0, count, CHUNK):
        rows = slice(start, min(start + CHUNK, count))
        n = rows.stop - rows.start
        u, v = _source_coordinates(size, pose.rows(rows), bends[rows])
        # Distances in output pixels, positive inside the stroke.
        distance = _sample(maps, labels[rows], fonts[rows], u, v) * _column(pose.scale[rows] * size)
        strokes = _strokes(distance, look[rows], size, difficulty)
        texture = grain.standard_normal((n, size, size), dtype=np.float32)
        light = _upsample(clouds.uniform(-1, 1, (n, 4, 4)).astype(np.float32), size)
        painted = _PAINTERS[domain](strokes, texture, light, look[rows], difficulty)
        painted += noise.standard_normal(painted.shape, dtype=np.float32) * np.float32(0.01 + 0.14 * difficulty)
        images[rows] = np.rint(np.clip(painted, 0, 1) * 255).astype(np.uint8)
    return images, labels


def check_knobs(*, count: int, size: int, difficulty: float, domain: str, classes: str) -> None:
    """Raises ``ValueError`` naming the argument, the value and what is allowed."""
    at_least(1, count=count)
    if not SIZES[0] <= size <= SIZES[1]:
        raise ValueError(f"size is {size}; glyphs are drawn at {SIZES[0]} to {SIZES[1]} pixels")
    if not 0 <= difficulty <= 1:
        raise ValueError(f"difficulty is {difficulty}; it must be between 0 and 1")
    if domain not in DOMAINS:
        raise ValueError(f"domain is {domain!r}; it must be one of {', '.join(map(repr, DOMAINS))}")
    if classes not in CLASSES:
        raise ValueError(f"classes is {classes!r}; it must be one of {', '.join(map(repr, CLASSES))}")


def _balanced_labels(count: int, classes: int, rng: np.random.Generator) -> Array:
    rounds = np.tile(np.arange(classes), (-(-count // classes), 1))
    return rng.permuted(rounds, axis=1).reshape(-1)[:count]


# --- The glyphs: outline -> filled shape -> distance map --------------------------------------------------------------


@lru_cache(maxsize=4)
def distance_maps(characters: str) -> Array:
    """float32 [characters, fonts, M, M]: signed distance to the outline, in sides of the map, positive inside."""
    return np.stack([[_distance_map(_edges(font, c)) for font in FONTS] for c in characters])


def _edges(font_name: str, character: str) -> Array:
    """The outline as directed straight edges, float64 [E, 4] = (x0, y0, x1, y1), centred in the unit square, y down."""
    import matplotlib
    from matplotlib.ft2font import FT2Font, LoadFlags

    font = FT2Font(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font_name}.ttf"))
    font.set_size(100, 72)
    font.load_char(ord(character), flags=LoadFlags.NO_HINTING)  # hinting would depend on the library's version
    contours = _flatten(*font.get_path())
    points = np.concatenate(contours)
    low, high = points.min(0), points.max(0)
    scale = 0.62 / (high - low).max()
    centred = [(contour - (low + high) / 2) * scale * (1, -1) + 0.5 for contour in contours]
    return np.concatenate([np.hstack([contour, np.roll(contour, -1, axis=0)]) for contour in centred])


_T = np.linspace(0, 1, 9)[1:]
_BERNSTEIN = {  # weights of a curve's control points at 8 points along it
    1: np.array([[0.0], [1.0]]),
    2: np.array([(1 - _T) ** 2, 2 * _T * (1 - _T), _T**2]),
    3: np.array([(1 - _T) ** 3, 3 * _T * (1 - _T) ** 2, 3 * _T**2 * (1 - _T), _T**3]),
}


def _flatten(vertices: Array, codes: Array) -> list[Array]:
    """Outline with Bézier curves (matplotlib path codes) -> one polygon [P, 2] for each contour."""
    contours: list[list[Array]] = []
    i = 0
    while i < len(codes):
        code = codes[i]
        if code == 1:  # MOVETO
            contours.append([vertices[i]])
            i += 1
        elif code == 79:  # CLOSEPOLY; its vertex means nothing
            i += 1
        else:  # LINETO, CURVE3, CURVE4: code - 1 points, the last of them on the outline
            degree = int(code) - 1
            control = [contours[-1][-1], *vertices[i : i + degree]]
            contours[-1].extend(sum(w[:, None] * p for w, p in zip(_BERNSTEIN[degree], control, strict=True)))
            i += degree
    return [np.array(contour) for contour in contours]


def _distance_map(edges: Array) -> Array:
    from scipy.ndimage import distance_transform_edt

    inside = _filled(edges, MASTER)
    distance = distance_transform_edt(inside) - distance_transform_edt(~inside)
    distance -= np.where(inside, 0.5, -0.5)  # from the outline, not from the next pixel's centre
    for axis in (0, 1):  # the staircase of pixels is no part of the letter
        padded = np.pad(distance, [(1, 1) if a == axis else (0, 0) for a in (0, 1)], mode="edge")
        before, after = (padded.take(range(k, k + MASTER), axis) for k in (0, 2))
        distance = (before + 2 * distance + after) / 4
    return (distance / MASTER).astype(np.float32)


def _filled(edges: Array, side: int) -> Array:
    """bool [side, side]: which pixel centres lie inside the outline, by the non-zero winding rule of TrueType fonts."""
    x0, y0, x1, y1 = (edges * side - 0.5).T[:, :, None]  # [E, 1], in pixel centres
    row = np.arange(side)[None]
    crosses = (np.minimum(y0, y1) <= row) & (row < np.maximum(y0, y1))  # [E, side]
    edge, crossed = np.nonzero(crosses)
    x0, y0, x1, y1 = (a[edge, 0] for a in (x0, y0, x1, y1))
    column = np.ceil(x0 + (crossed - y0) / (y1 - y0) * (x1 - x0)).astype(int).clip(0, side)
    winding = np.zeros((side, side + 1), int)
    np.add.at(winding, (crossed, column), np.where(y1 > y0, 1, -1))
    return winding.cumsum(1)[:, :-1] != 0


# --- Where each output pixel looks in the distance map ----------------------------------------------------------------


@dataclass(frozen=True)
class Pose:
    """Affine distortion of each image; arrays [N]. ``scale`` is the mean of both axes."""

    inverse: Array  # [N, 2, 2], output -> source
    offset: Array  # [N, 2]
    scale: Array  # [N]

    @classmethod
    def draw(cls, count: int, difficulty: float, rng: np.random.Generator) -> Pose:
        turn, shear, wide, large, right, down = rng.uniform(-1, 1, (count, 6)).T
        angle = np.deg2rad((4 + 26 * difficulty) * turn)
        slant = (0.03 + 0.27 * difficulty) * shear
        scale = 1.18 - 0.06 * (1 + large) - 0.2 * difficulty * (1 + large)
        stretch = 1 + (0.05 + 0.15 * difficulty) * wide
        # output = rotation @ slant @ stretch @ source, so the inverse is built back to front
        cos, sin = np.cos(angle), np.sin(angle)
        upright = np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], -2)
        x_row = (upright[:, 0] - slant[:, None] * upright[:, 1]) / (scale * stretch)[:, None]
        y_row = upright[:, 1] * (stretch / scale)[:, None]
        offset = np.stack([right, down], -1) * (0.02 + 0.08 * difficulty)
        return cls(*(a.astype(np.float32) for a in (np.stack([x_row, y_row], 1), offset, scale)))

    def rows(self, rows: slice) -> Pose:
        return Pose(self.inverse[rows], self.offset[rows], self.scale[rows])


def _source_coordinates(size: int, pose: Pose, bends: Array) -> tuple[Array, Array]:
    """Map coordinates (u, v) in [0, 1] that each output pixel shows; two arrays [n, size, size]."""
    centres = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size) - np.float32(0.5)
    x = centres[None, None, :] - _column(pose.offset[:, 0]) + _upsample(bends[:, 0], size)
    y = centres[None, :, None] - _column(pose.offset[:, 1]) + _upsample(bends[:, 1], size)
    a, b, c, d = (_column(pose.inverse[:, i, j]) for i in (0, 1) for j in (0, 1))
    return a * x + b * y + np.float32(0.5), c * x + d * y + np.float32(0.5)


def _sample(maps: Array, labels: Array, fonts: Array, u: Array, v: Array) -> Array:
    """Bilinear look-up of ``maps[label, font]`` at (u, v): float32 [n, size, size]."""
    last = np.float32(MASTER - 1.001)
    x = np.clip(u * np.float32(MASTER) - np.float32(0.5), 0, last)
    y = np.clip(v * np.float32(MASTER) - np.float32(0.5), 0, last)
    left, top = x.astype(np.int32), y.astype(np.int32)
    x -= left
    y -= top
    flat = maps.reshape(-1)
    corner = _column((labels * maps.shape[1] + fonts).astype(np.int32) * (MASTER * MASTER)) + top * MASTER + left
    upper = flat[corner] * (1 - x) + flat[corner + 1] * x
    lower = flat[corner + MASTER] * (1 - x) + flat[corner + MASTER + 1] * x
    return upper * (1 - y) + lower * y


def _upsample(grid: Array, size: int) -> Array:
    """Smooth field [n, size, size] through a coarse grid [n, k, k] (linear between points, eased at them)."""
    k = grid.shape[-1]
    at = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size) * np.float32(k - 1)
    weight = np.clip(1 - np.abs(at[:, None] - np.arange(k, dtype=np.float32)), 0, 1)  # [size, k]
    weight = weight * weight * (3 - 2 * weight)
    # Sums over k points written out: a matrix product may round otherwise on another processor.
    tall = sum(weight[:, i, None] * grid[:, i, None, :] for i in range(k))  # [n, size, k]
    return sum(tall[:, :, i, None] * weight[:, i] for i in range(k))


# --- Paint ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Strokes:
    distance: Array  # [n, S, S], output pixels, positive inside; stroke width already varied
    lines: Array  # [n, S, S], cover of the lines that cross the character out, 0 to 1
    softness: Array  # [n, 1, 1], pixels over which an edge fades

    def cover(self, distance: Array) -> Array:
        return np.maximum(np.clip(distance / self.softness + np.float32(0.5), 0, 1), self.lines)


def _strokes(distance: Array, look: Array, size: int, difficulty: float) -> _Strokes:
    weight, blur, on, angle, where, width, *_ = (look[:, i, None, None] for i in range(look.shape[1]))
    pixel = np.float32(size / 28)
    bold = (weight * np.float32(0.9) - np.float32(0.25)) * np.float32(0.4 + 0.6 * difficulty) * pixel
    softness = (1 + blur * np.float32(1.6 * difficulty)) * np.maximum(pixel, 1)
    centres = np.arange(size, dtype=np.float32) - np.float32((size - 1) / 2)
    # A direction without sines: any point of the square will do, once its length is divided out.
    nx, ny = angle * 2 - 1, np.where(angle > 0.5, np.float32(1), np.float32(-1)) * (1 - np.abs(angle * 2 - 1))
    length = np.sqrt(nx * nx + ny * ny)
    away = np.abs(centres * nx / length + centres[:, None] * ny / length - (where - np.float32(0.5)) * 10 * pixel)
    lines = np.clip((np.float32(0.4) + width * np.float32(0.6)) * pixel - away + np.float32(0.5), 0, 1)
    return _Strokes(distance + bold, lines * (on < 0.7 * difficulty), softness)


def _contrast(look: Array, difficulty: float) -> Array:
    """How much of the full contrast is left, [n, 1, 1]."""
    return 1 - look[:, 6, None, None] * np.float32(0.1 + 0.45 * difficulty)


def _print(strokes: _Strokes, texture: Array, light: Array, look: Array, difficulty: float) -> Array:
    paper = np.float32(0.9) + light * np.float32(0.03 + 0.1 * difficulty)
    ink = strokes.cover(strokes.distance) * _contrast(look, difficulty)
    return (paper * (1 - ink * np.float32(0.92)))[:, None]


def _chalk(strokes: _Strokes, texture: Array, light: Array, look: Array, difficulty: float) -> Array:
    board = np.float32(0.2) + light * np.float32(0.06) + np.roll(texture, 1, axis=2) * np.float32(0.02)
    rough = strokes.distance + np.float32(0.35) + texture * np.float32(0.3)  # chalk skips along its edges …
    cover = strokes.cover(rough) * np.clip(np.float32(0.72) + texture * np.float32(0.26), 0, 1)  # … and in the grain
    return (board + cover * _contrast(look, difficulty) * np.float32(0.75))[:, None]


def _outline(strokes: _Strokes, texture: Array, light: Array, look: Array, difficulty: float) -> Array:
    grown = np.float32(0.8) + strokes.distance  # grown a little: the contours of a thin stroke would run together
    contour = strokes.cover(np.float32(0.55) - np.abs(grown))
    return (np.float32(0.04) + contour * _contrast(look, difficulty) * np.float32(0.92))[:, None]


def _colour(strokes: _Strokes, texture: Array, light: Array, look: Array, difficulty: float) -> Array:
    paper, ink = look[:, 8:11], look[:, 11:14]
    # The paper is light and the ink dark, or the other way round; hues are free.
    swap = look[:, 7, None] < 0.5
    pale, deep = np.float32(0.6) + paper * np.float32(0.38), ink * np.float32(0.4)
    back, front = (np.where(swap, a, b)[:, :, None, None] for a, b in ((deep, pale), (pale, deep)))
    cover = (strokes.cover(strokes.distance) * _contrast(look, difficulty))[:, None]
    shade = 1 + light[:, None] * np.float32(0.1 + 0.2 * difficulty)
    return back * shade * (1 - cover) + front * cover


_PAINTERS = {"print": _print, "chalk": _chalk, "outline": _outline, "colour": _colour}


def _column(values: Array) -> Array:
    return values[:, None, None]
