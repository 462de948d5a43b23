"""Where two descriptions of a figure (``figures.describe_figure``) disagree, in the reader's terms."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib import colors

from course_lib.proving.agreement import TOLERANCE, shorten, text_differences, unpack, without_numbers

HALF_A_PIXEL = 1 / 800  # of the height of an axes
VISIBLE = 0.05  # of the axes: what a movement stays below by default, however large the number itself is

Description = dict[str, Any]

# The axis along which a column is measured; the others (value, size, u, v, length) have no axis.
_AXIS = dict.fromkeys(("x", "x2", "left", "right", "base", "end"), "x")
_AXIS |= dict.fromkeys(("y", "y2", "low", "high", "bottom", "top"), "y") | {"z": "z"}
# What the reader calls it; the columns not named here are the series itself.
_PART = {
    "low": "lower end, ", "high": "upper end, ", "left": "left end, ", "right": "right end, ", "bottom": "foot, ",
    "base": "foot, ", "x2": "far end, ", "y2": "far end, ", "value": "value, ", "size": "size, ",
}  # fmt: skip


def _scaled(values: np.ndarray, scale: str) -> np.ndarray:
    """Positions on the page: decades on a log axis, where zero and below lie under every limit."""
    if scale.startswith("symlog"):
        return np.sign(values) * np.log10(1 + np.abs(values) / float(scale.split()[1]))
    if scale != "log":
        return values
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(values > 0, np.log10(values), np.where(np.isnan(values), np.nan, -1e9))


def _allowed(stored: np.ndarray, span: float, tolerance: float, scale: str) -> np.ndarray:
    """How far each number may move, in positions on the page (decades on a log axis).

    A share ``tolerance`` of the number itself or of what the series spans, whichever is more. A share of the number
    counts up to ``VISIBLE`` of the axes only, so that a curve that is flat about a large offset must stay flat; and
    half a pixel is always allowed, so that rounding noise about zero is.
    """
    finite = stored[np.isfinite(stored)]
    spread = min(float(np.ptp(finite)), span) if len(finite) else 0.0
    share = tolerance * np.abs(np.nan_to_num(stored))
    if scale != "linear":
        share = np.full(len(stored), np.log10(1 + tolerance))
    return np.maximum(np.minimum(share, max(tolerance, VISIBLE) * span), max(tolerance * spread, HALF_A_PIXEL * span))


class _Comparison:
    """Collects what differs between one stored and one fresh axes."""

    def __init__(self, stored: Description, fresh: Description, tolerance: float | None, place: str) -> None:
        self.stored, self.fresh, self.tolerance, self.place = stored, fresh, tolerance, place
        self.found: list[str] = []

    def say(self, message: str) -> None:
        self.found.append(f"{self.place}{message}")

    def words(self, name: str, stored: str, fresh: str) -> None:
        if bool(stored) != bool(fresh):
            self.say(f"{name} is '{shorten(fresh)}', stored '{shorten(stored)}'")
            return
        for problem in text_differences(stored, fresh, self.tolerance):
            self.say(f"{name} {problem}")

    def exactly(self, name: str, stored: Any, fresh: Any) -> bool:
        if stored != fresh:
            self.say(f"{name} is {fresh or 'none'}, stored {stored or 'none'}")
        return bool(stored == fresh)

    def colour(self, name: str, stored: str, fresh: str) -> None:
        old, new = stored.split(), fresh.split()
        near = len(old) == len(new) and all(
            max(abs(a - b) for a, b in zip(colors.to_rgb(x), colors.to_rgb(y), strict=True)) < 0.04
            for x, y in zip(old, new, strict=True)
        )
        if not near:
            which = next((i for i, (x, y) in enumerate(zip(old, new, strict=False)) if x != y), 0)
            each = f" (number {which + 1})" if len(old) > 1 else ""
            self.say(f"{name}: colour{each} is {(new or ['none'])[which]}, stored {(old or ['none'])[which]}")

    # Where the reader sees a number: "epoch 7", a bar's name, or "x = 7".
    def at(self, axis: str, value: float) -> str:
        name = self.stored["ticks"].get(axis, {}).get(f"{value:.4g}")
        label = shorten(self.stored["label"].get(axis, ""), 40)
        return f"'{name}'" if name else f"{label or axis + ' ='} {value:.4g}"

    def span(self, axis: str | None, values: np.ndarray) -> tuple[float, float, str]:
        """Lower and upper limit of what can be seen along ``axis``, and its scale."""
        if axis in self.stored["limits"]:
            scale = self.stored["scale"][axis]
            low, high = sorted(_scaled(unpack(self.stored["limits"][axis]), scale))
            return low, high, scale
        finite = values[np.isfinite(values)]
        low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
        return (low, high, "linear") if high > low else (low - abs(low or 1) / 2, high + abs(high or 1) / 2, "linear")

    def moved(self, axis: str | None, stored: np.ndarray, fresh: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """How far each number moved, in units of what is allowed (above 1 is too far); and what is allowed."""
        assert self.tolerance is not None
        low, high, scale = self.span(axis, stored)
        a, b = _scaled(stored, scale), _scaled(fresh, scale)
        allowed = _allowed(a, high - low, self.tolerance, scale)
        alike = (stored == fresh) | (np.isnan(stored) & np.isnan(fresh))
        broken = ~alike & ~(np.isfinite(stored) & np.isfinite(fresh))
        if axis:  # far beyond the axes, where a diverged run goes, nothing can be seen
            a, b = (np.clip(values, 2 * low - high, 2 * high - low) for values in (a, b))
        with np.errstate(invalid="ignore"):
            far = np.abs(b - a) / allowed
        return np.where(broken, np.inf, np.where(alike, 0.0, far)), allowed

    def places(self, name: str, axis: str, stored: np.ndarray, fresh: np.ndarray) -> None:
        """Compares limits and the places of labels: they follow from data, and may move a little with them."""
        low, high, scale = self.span(axis, stored)
        far = np.abs(_scaled(fresh, scale) - _scaled(stored, scale)) / (high - low)
        if self.tolerance is not None and not (far <= max(self.tolerance, VISIBLE)).all():
            now, was = (" to ".join(f"{value:.4g}" for value in values) for values in (fresh, stored))
            self.say(f"{name}: {now}, stored {was}")

    def numbers(self, name: str, stored: str, fresh: str) -> None:
        """Compares numbers that belong to no series and no axis: levels, extents, ranges."""
        a, b = unpack(stored), unpack(fresh)
        if self.tolerance is None:
            if not np.isfinite(b).all():
                self.say(f"{name} has a number that is not finite")
        elif len(a) != len(b):
            self.say(f"{name}: {len(b)} numbers, stored {len(a)}")
        elif (self.moved(None, a, b)[0] > 1).any():
            now, was = (shorten(", ".join(f"{value:.4g}" for value in values)) for values in (b, a))
            self.say(f"{name}: {now}, stored {was}")

    def data(self, name: str, stored: Description, fresh: Description) -> None:
        made_of, was_made_of = (", ".join(sorted(side["data"])) for side in (fresh, stored))
        if not self.exactly(f"{name}: what it is made of", was_made_of, made_of):
            return
        # In the fresh order, whose first column is the position: on disk the keys of JSON are in alphabetical order.
        new = {key: unpack(column) for key, column in fresh["data"].items()}
        old = {key: unpack(stored["data"][key]) for key in new}
        if stored["points"] != fresh["points"]:
            self.say(f"{name} has {fresh['points']} points, stored {stored['points']}")
            return
        if not stored["points"]:
            return
        if self.tolerance is None:
            for key, values in new.items():
                if not np.isfinite(values).all():
                    point = int(np.argmin(np.isfinite(values))) + 1
                    self.say(f"{name}: {_PART.get(key, '')}point {point} is not finite")
                    return
            return
        moved = {key: self.moved(_AXIS.get(key), old[key], new[key]) for key in old}
        first, *rest = old
        if rest and moved[first][0].max() > 1 and first in "xy":
            # The places themselves moved (a path, a scatter, another x): name the point by its number.
            far = np.maximum.reduce([moved[key][0] for key in old])
            i = int(np.argmax(far))
            where, was = [", ".join(f"{columns[key][i]:.4g}" for key in columns) for columns in (new, old)]
            self.say(f"{name}: point {i + 1} of {len(far)} is at ({where}), stored ({was}){_others(far)}")
            return
        for key in rest or old:
            far, allowed = moved[key]
            if far.max() <= 1:
                continue
            i = int(np.argmax(far))
            axis = _AXIS.get(key)
            where = self.at(first, float(old[first][i])) if rest else self.stored["label"].get(key) or key
            limit = allowed[i]
            if axis and self.stored["scale"][axis] != "linear":
                limit = abs(old[key][i]) * (10**limit - 1)
            figures = f"{new[key][i]:.4g}, stored {old[key][i]:.4g}, tolerance {limit:.2g}"
            self.say(f"{name}: {_PART.get(key, '')}{where} is {figures}{_others(far)}")

    def picture(self, name: str, stored: Description, fresh: Description) -> None:
        if not self.exactly(f"{name}: shape", stored["shape"], fresh["shape"]):
            return
        self.exactly(f"{name}: colour map", stored.get("colours"), fresh.get("colours"))
        self.numbers(f"{name}: extent", stored["extent"], fresh["extent"])
        if "range" in stored and "range" in fresh:
            self.numbers(f"{name}: range of colours", stored["range"], fresh["range"])
        a, b = unpack(stored["data"]["value"]), unpack(fresh["data"]["value"])
        if self.tolerance is None:
            if not np.isfinite(b).all():
                self.say(f"{name} has a value that is not finite")
            return
        scale = "log" if stored.get("norm") == "LogNorm" else "linear"
        low, high, _ = self.span(None, _scaled(np.concatenate([a, unpack(stored.get("range", ""))]), scale))
        alike = np.isnan(a) & np.isnan(b)
        limit = self.tolerance * (high - low)
        far = np.where(alike, 0.0, np.nan_to_num(np.abs(_scaled(a, scale) - _scaled(b, scale)), nan=np.inf) / limit)
        if far.max(initial=0) > 1:
            i = int(np.argmax(far))
            rows, columns, *rest = stored["thumbnail"]
            channels = rest[0] if rest else 1
            row, column = divmod(i // channels, columns)
            where = f"row {row + 1} of {rows}, column {column + 1} of {columns}"
            self.say(f"{name}: {where} is {b[i]:.4g}, stored {a[i]:.4g}{_others(far)}")

    def named_beside(self, name: str, series: Description) -> str:
        """The name of a series without a label, with the words of the same colour in the legend or beside it."""
        words = [entry for legend in self.stored["legends"] for entry in legend["entries"]] + self.stored["texts"]
        colour = series.get("colour", "")
        matching = {entry["text"] for entry in words if entry["colour"] == colour}
        plain = not series["label"] and colour not in ("", "#000000") and len(matching) == 1
        return f"{name} ('{shorten(matching.pop(), 40)}')" if plain else name

    def series(self) -> None:
        old, new = self.stored["series"], self.fresh["series"]
        old_names, new_names = _names(old), _names(new)
        # A number in a label, such as a final accuracy, is compared as a number.
        old_keys, new_keys = _names(old, without_numbers), _names(new, without_numbers)
        gone, extra = Counter(old_keys) - Counter(new_keys), Counter(new_keys) - Counter(old_keys)
        for key in gone:
            self.say(f"{old_names[old_keys.index(key)]} is missing")
        for key in extra:
            self.say(f"{new_names[new_keys.index(key)]} is new")
        if not gone and not extra and old_keys != new_keys:
            self.say(f"the order is {', '.join(new_names)}, stored {', '.join(old_names)}")
        fresh_by_key = dict(zip(new_keys, new, strict=True))
        for key, old_name, a in zip(old_keys, old_names, old, strict=True):
            b = fresh_by_key.get(key)
            if b is None:
                continue
            name = self.named_beside(old_name, a)
            self.words(f"{name}: label", a["label"], b["label"])
            if a["label"] or self.tolerance is not None:  # of measured points the colour may say what was measured
                self.colour(name, a.get("colour", ""), b.get("colour", ""))
            self.exactly(f"{name}: style", a.get("style", ""), b.get("style", ""))
            if "words" in a:
                self.words(name, "\n".join(a["words"]), "\n".join(b["words"]))
            elif "shape" in a:
                self.picture(name, a, b)
            else:
                for part in ("levels", "length", "value"):
                    if part in a:
                        self.numbers(f"{name}: {part}", a[part], b.get(part, ""))
                self.exactly(f"{name}: colour map", a.get("colours"), b.get("colours"))
                self.data(name, a, b)

    def legends(self) -> None:
        old, new = self.stored["legends"], self.fresh["legends"]
        if len(old) != len(new):
            self.say(f"the legend is {'missing' if len(new) < len(old) else 'new'}")
            return
        for a, b in zip(old, new, strict=True):
            self.words("the legend's title", a["title"], b["title"])
            old_words, new_words = [[entry["text"] for entry in legend["entries"]] for legend in (a, b)]
            if len(old_words) != len(new_words):
                self.say(f"the legend has {', '.join(new_words) or 'no entries'}, stored {', '.join(old_words)}")
                continue
            for x, y in zip(a["entries"], b["entries"], strict=True):
                before = len(self.found)
                self.words("the legend", x["text"], y["text"])
                if len(self.found) == before:
                    self.colour(f"the legend: '{x['text']}'", x["colour"], y["colour"])
                    self.exactly(f"the legend: '{x['text']}': style", x["style"], y["style"])

    def texts(self) -> None:
        old, new = self.stored["texts"], self.fresh["texts"]
        if len(old) != len(new):
            gone = Counter(t["text"] for t in old) - Counter(t["text"] for t in new)
            extra = Counter(t["text"] for t in new) - Counter(t["text"] for t in old)
            for word in gone:
                self.say(f"the text '{shorten(word)}' is missing")
            for word in extra:
                self.say(f"the text '{shorten(word)}' is new")
            return
        for a, b in zip(old, new, strict=True):
            self.words("the text", a["text"], b["text"])
            name = f"the text '{shorten(a['text'], 40)}'"
            self.colour(name, a["colour"], b["colour"])
            for i, axis in enumerate("xy"):
                frame = axis if axis in a["in_data"] else ""
                self.places(f"{name}: place along {axis}", frame, unpack(a["at"])[[i]], unpack(b["at"])[[i]])


def _others(far: np.ndarray) -> str:
    n = int((far > 1).sum()) - 1
    return f" (and {n} more of {len(far)} points)" if n > 0 else ""


def _names(series: list[Description], label: Callable[[str], str] = str) -> list[str]:
    """Each series as the reader would call it: its kind and label, or its number among those of its kind."""
    seen: Counter[str] = Counter()
    names = []
    for one in series:
        name = f"{one['kind']} '{label(one['label'])}'" if one["label"] else one["kind"]
        seen[name] += 1
        names.append(f"{name} {seen[name]}" if not one["label"] or seen[name] > 1 else name)
    return names


def differences(stored: Description, fresh: Description, tolerance: float | None = TOLERANCE) -> list[str]:
    """What differs between two descriptions of a figure, in the reader's terms; empty where they agree.

    Structure and words must agree exactly, numbers within ``tolerance`` as ``_allowed`` applies it. A tolerance of
    None stands for measured times: the numbers of ``fresh`` only have to be finite, and points without a name may have
    another colour.
    """
    blank: Description = {"label": {}, "scale": {}, "limits": {}, "ticks": {}, "series": []}
    whole = _Comparison(blank | stored, blank | fresh, tolerance, "")
    whole.words("title", stored["title"], fresh["title"])
    whole.words("alternative text", stored.get("alt", ""), fresh.get("alt", ""))
    for name, a, b in zip(("x label", "y label"), stored["labels"], fresh["labels"], strict=True):
        whole.words(name, a, b)
    whole.exactly("size in inches", stored["size"], fresh["size"])
    whole.texts()
    whole.legends()
    found = whole.found
    if len(stored["axes"]) != len(fresh["axes"]):
        return [*found, f"{len(fresh['axes'])} axes, stored {len(stored['axes'])}"]
    for number, (a, b) in enumerate(zip(stored["axes"], fresh["axes"], strict=True), start=1):
        title = a["title"] or a["label"].get("y") or ""
        place = f"axes '{shorten(title, 50)}', " if title else f"axes {number}, " if len(stored["axes"]) > 1 else ""
        axes = _Comparison(a, b, tolerance, place)
        axes.words("title", a["title"], b["title"])
        if axes.exactly("dimensions", sorted(a["label"]), sorted(b["label"])):
            for name in a["label"]:
                axes.words(f"{name} label", a["label"][name], b["label"][name])
                axes.exactly(f"{name} scale", a["scale"][name], b["scale"][name])
                # By position: on disk "10" comes before "2".
                ticks = [
                    ", ".join(text for _, text in sorted(axis["ticks"][name].items(), key=_place)) for axis in (a, b)
                ]
                axes.words(f"{name} tick labels", *ticks)
        axes.legends()
        axes.series()
        axes.texts()
        if not axes.found:  # limits follow from data: where those moved, they say nothing more
            for name in a["limits"]:
                axes.places(f"{name} limits", name, unpack(a["limits"][name]), unpack(b["limits"][name]))
        found += axes.found
    return found


def _place(tick: tuple[str, str]) -> float:
    return float(tick[0])
