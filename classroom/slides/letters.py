"""Letters: how wide they are, how many lines a text takes, and the fonts of a deck, cut to the letters that it has."""

import base64
import io
from functools import cache
from pathlib import Path

import matplotlib
from fontTools import subset
from fontTools.ttLib import TTFont

SANS = Path(__file__).with_name("reveal") / "fonts"
DEJAVU = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
FACES = {  # family, weight, style -> file of the font
    ("Deck Sans", 400, "normal"): SANS / "source-sans-pro-regular.woff",
    ("Deck Sans", 600, "normal"): SANS / "source-sans-pro-semibold.woff",
    ("Deck Sans", 400, "italic"): SANS / "source-sans-pro-italic.woff",
    ("Deck Signs", 400, "normal"): DEJAVU / "DejaVuSans.ttf",
    ("Deck Mono", 400, "normal"): DEJAVU / "DejaVuSansMono.ttf",
}
USUAL = frozenset(  # letters that most chapters use: a deck has others besides only if they occur
    code for low, high in ((0x20, 0x7F), (0xA0, 0x180), (0x391, 0x3CA), (0x2010, 0x2027), (0x2070, 0x208F),
                           (0x2190, 0x2194), (0x2200, 0x2266), (0x2713, 0x2718)) for code in range(low, high)
)  # fmt: skip


def width(text: str, size: float, weight: int = 400) -> float:
    """The width of a text on one line, in pixels."""
    sans, signs = _advances("Deck Sans", weight), _advances("Deck Signs")
    return size * sum(sans.get(ord(letter)) or signs.get(ord(letter), 1.0) for letter in text)


def lines(text: str, size: float, wide: float, weight: int = 400) -> int:
    """How many lines a text takes, broken at its spaces and, where a word is wider than the line, within it."""
    count, used, space = 1, 0.0, width(" ", size, weight)
    for word in text.split():
        taken = width(word, size, weight)
        if used and used + space + taken > wide:
            count, used = count + 1, 0.0
        used += taken + (space if used else 0)
        count, used = count + int(used // wide), used % wide if used > wide else used
    return count


def font_faces(text: str) -> str:
    """The rules of CSS that carry the fonts for a text."""
    return _font_faces(USUAL | frozenset(map(ord, text)))


@cache
def _advances(family: str, weight: int = 400) -> dict[int, float]:
    """The width of each letter of a font, in em."""
    font = TTFont(FACES[family, weight, "normal"])
    widths, em = font["hmtx"], font["head"].unitsPerEm
    return {code: widths[name][0] / em for code, name in font.getBestCmap().items()}


@cache
def _font_faces(letters: frozenset[int]) -> str:
    """The fonts, cut to the letters that occur, under names of their own as their licence asks."""
    rules = []
    for (family, weight, style), path in FACES.items():
        font = TTFont(path, recalcTimestamp=False)
        options = subset.Options(notdef_outline=True, layout_features=["kern", "tnum"], name_IDs=[0, 13, 14])
        options.drop_tables += ["FFTM", "webf"]
        cutter = subset.Subsetter(options)
        cutter.populate(unicodes=sorted(letters))
        cutter.subset(font)
        font.flavor, stream = "woff", io.BytesIO()
        font.save(stream)
        data = base64.b64encode(stream.getvalue()).decode()
        rules.append(
            f'@font-face{{font-family:"{family}";font-weight:{weight};font-style:{style};'
            f'src:url(data:font/woff;base64,{data}) format("woff")}}'
        )
    return "\n".join(rules)
