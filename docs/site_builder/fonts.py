"""The letters of the explorers' pictures: matplotlib's own, cut to what occurs, served from the site.

The frames hold text as text (`course_lib.proving.frames`), so a browser needs the font that they were laid out with.
"""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path

import matplotlib
from fontTools import subset
from fontTools.ttLib import TTFont

NAMES = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique")
_RANGES = ((0x20, 0x7F), (0xA0, 0x180), (0x370, 0x400), (0x2010, 0x2027), (0x2070, 0x20A0), (0x2190, 0x21A0),
           (0x2200, 0x2270), (0x2212, 0x2213), (0x25A0, 0x2600), (0x2713, 0x2718))  # fmt: skip


@lru_cache
def cut(name: str) -> bytes:
    """A font of matplotlib's with Latin and Greek letters, arrows and signs only, as WOFF."""
    font = TTFont(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", recalcTimestamp=False)
    options = subset.Options(notdef_outline=True, layout_features=["kern"])
    options.drop_tables += ["FFTM"]  # when its letters were drawn
    cutter = subset.Subsetter(options)
    cutter.populate(unicodes=[code for low, high in _RANGES for code in range(low, high)])
    cutter.subset(font)
    font.flavor, stream = "woff", io.BytesIO()
    font.save(stream)
    return stream.getvalue()
