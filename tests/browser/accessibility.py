"""What hinders a reader who sees little, or sees nothing, or has no mouse: the audit of axe, of one page at a time.

axe takes a millisecond to find the colours behind one element, and a chapter has 15,000: every word of its code, every
sign of its formulas. But what has the same look has the same contrast, and a chapter has 70 looks. So of each look the
contrast of a few elements is measured, and for all other rules the words of a line of code are one text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from axe_playwright_python.sync_playwright import Axe

if TYPE_CHECKING:
    from playwright.sync_api import Page

# A look is all that a contrast depends on: an element's colour and letters, and what is painted behind them. Elements
# on which axe does not decide stand for no other: what is out of sight, also in a box that scrolls; what has neither
# letters nor digits; and a single one of those stands for single ones only.
FEW = 3
A_FEW_OF_EACH_LOOK = """few => {
    const styles = new Map(), sheets = new Map(), frames = new Map();
    const style = part => styles.get(part) ?? styles.set(part, getComputedStyle(part)).get(part);
    const sheet = part => {  // what is behind it
        if (!part) return "";
        if (!sheets.has(part)) {
            const { backgroundColor, backgroundImage, opacity, filter, mixBlendMode, position } = style(part);
            const own = [backgroundColor, backgroundImage, opacity, filter, mixBlendMode, position].join();
            const plain = own === "rgba(0, 0, 0, 0),none,1,none,normal,static";
            sheets.set(part, sheet(part.parentElement) + (plain ? "" : `/${own}`));
        }
        return sheets.get(part);
    };
    const frame = part => {  // left, top, right and bottom of what is shown by the boxes that it scrolls in
        if (!part || part === document.body) return [-Infinity, -Infinity, Infinity, Infinity];
        if (!frames.has(part)) {
            const around = frame(part.parentElement);
            if (style(part).overflow === "visible") frames.set(part, around);
            else {
                const { left, top, right, bottom } = part.getBoundingClientRect();
                frames.set(part, [
                    Math.max(left, around[0]), Math.max(top, around[1]),
                    Math.min(right, around[2]), Math.min(bottom, around[3]),
                ]);
            }
        }
        return frames.get(part);
    };
    const seen = part => {
        const { left, top, right, bottom, width, height } = part.getBoundingClientRect();
        const [x, y, toX, toY] = frame(part.parentElement);
        const inside = left >= x && top >= y && right <= toX && bottom <= toY;
        return inside && width && height && part.checkVisibility({ opacityProperty: true, visibilityProperty: true });
    };
    const looks = new Map();
    for (const part of document.querySelectorAll("body *")) {
        const texts = [...part.childNodes].filter(child => child.nodeType === Node.TEXT_NODE).map(child => child.data);
        const { length } = texts.join("").replace(/[^\\p{L}\\p{N}]/gu, "");
        if (!length || part.matches("input, select, textarea, option")) continue;
        const { color, fontSize, fontWeight, textShadow } = style(part);
        const look = [length > 1, color, fontSize, fontWeight, textShadow, sheet(part)].join("|");
        const known = looks.get(look) ?? 0;
        if (known === few) part.dataset.looksLikeOthers = "";
        else if (seen(part)) looks.set(look, known + 1);
    }
    for (const word of document.querySelectorAll(".highlight pre span[data-looks-like-others]"))
        if (!word.children.length) word.replaceWith(word.textContent);
    axe.configure({ rules: [{ id: "color-contrast", selector: "*:not([data-looks-like-others])" }] });
}"""


def serious_violations(page: Page) -> list[str]:
    """What axe finds serious or critical in a page as it is shown now, a line each. Changes the page."""
    page.evaluate(Axe().axe_script)
    page.evaluate(A_FEW_OF_EACH_LOOK, FEW)
    found: list[dict[str, Any]] = page.evaluate("axe.run({ resultTypes: ['violations'] })")["violations"]
    return [
        f"{one['id']}: {one['help']}: {one['nodes'][0]['html'][:200]} (and {len(one['nodes']) - 1} more)"
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
