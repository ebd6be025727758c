"""A small SVG canvas. Text becomes outlines of DejaVu, the font of the plots, so that it looks alike everywhere.

What is drawn is checked as it is saved: no text may cover another one, leave the canvas or cross the edge of a box.
"""

from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

import matplotlib
from matplotlib.font_manager import get_font
from matplotlib.textpath import text_to_path

from benchmarks.plots import THEMES

SIZE = 16  # of text, in pixels of the canvas; the smallest that can be read where a phone halves it
CAP_HEIGHT = 0.73  # of DejaVu, over its size


@dataclass(frozen=True)
class Style:
    """colour: a name in COLOURS; anchor: the end of the text that lies at x."""

    size: float = SIZE
    colour: str = "ink"
    anchor: str = "start"
    bold: bool = False
    mono: bool = False


def colours(theme: str) -> dict[str, str]:
    """The plots' colours by name, blue and orange for what is ours; surface lies behind a drawing's parts."""
    t = THEMES[theme]
    named = dict(zip(("gray", "blue", "orange", "green", "purple"), t["colours"], strict=True))
    muted, surface = {"light": ("#59636e", "#f6f8fa"), "dark": ("#9198a1", "#151b23")}[theme]
    return named | {"ink": t["ink"], "faint": t["faint"], "page": t["page"], "muted": muted, "surface": surface}


class Canvas:
    """width x height pixels, transparent; title and description are what a screen reader says of it."""

    def __init__(self, theme: str, width: int, height: int, title: str, description: str):
        self.size, self.title, self.description = (width, height), title, description
        self.colours = colours(theme)
        self._body: list[str] = []
        self._glyphs: dict[tuple, tuple[int, str]] = {}  # (font, glyph) -> its number and its outline
        self._frames: list[tuple[float, float, float, float]] = []  # of rectangles with an edge
        self._texts: list[tuple[str, float, float, float, float]] = []  # what is written, and the box around it

    # ------------------------------------------------------------------------------------------------------ shapes
    def rect(
        self, x, y, w, h, fill: str | None = None, stroke: str | None = None, *,
        opacity: float = 1.0, radius: float = 5, width: float = 1.5, dashed: bool = False,
    ) -> None:  # fmt: skip
        """opacity is that of the fill."""
        if stroke:
            self._frames.append((x, y, x + w, y + h))
        self._body.append(
            f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(w)}" height="{_n(h)}" rx="{_n(radius)}"'
            f"{self._paint(fill, stroke, opacity, width, dashed)}/>"
        )

    def line(self, *points, colour: str = "muted", width: float = 1.5, dashed: bool = False) -> None:
        d = "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in points)
        self._body.append(f'<path d="{d}"{self._paint(None, colour, 1, width, dashed)} stroke-linejoin="round"/>')

    def polygon(self, *points, fill: str, opacity: float = 1.0) -> None:
        d = "M" + "L".join(f"{_n(x)} {_n(y)}" for x, y in points) + "Z"
        self._body.append(f'<path d="{d}"{self._paint(fill, None, opacity, 0, False)}/>')

    def circle(self, x, y, r, fill: str, opacity: float = 1.0) -> None:
        self._body.append(
            f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(r)}"{self._paint(fill, None, opacity, 0, False)}/>'
        )

    def arrow(self, *points, colour: str = "muted", width: float = 1.5, dashed: bool = False, head: float = 8) -> None:
        """Along the points, with a head at the last one."""
        (x0, y0), (x, y) = points[-2:]
        length = ((x - x0) ** 2 + (y - y0) ** 2) ** 0.5
        ux, uy = (x - x0) / length, (y - y0) / length
        neck = x - head * ux, y - head * uy
        self.line(*points[:-1], neck, colour=colour, width=width, dashed=dashed)
        half = head / 2
        left, right = (neck[0] - half * uy, neck[1] + half * ux), (neck[0] + half * uy, neck[1] - half * ux)
        self.polygon((x, y), left, right, fill=colour)

    def cross(self, x, y, w, h, colour: str = "ink") -> None:
        """Crosses out what lies in this box; the middle stays free for its name."""
        for left, top in ((0, 0), (0, 1), (1, 0), (1, 1)):
            corner, inner = (x + left * w, y + top * h), (x + (0.34 + 0.32 * left) * w, y + (0.34 + 0.32 * top) * h)
            self.line(corner, inner, colour=colour, width=2)

    def _paint(self, fill, stroke, opacity, width, dashed) -> str:
        paint = f' fill="{self.colours[fill]}"' if fill else ' fill="none"'
        if fill and opacity != 1:
            paint += f' fill-opacity="{_n(opacity, 2)}"'
        if stroke:
            paint += f' stroke="{self.colours[stroke]}" stroke-width="{_n(width)}"'
        return paint + (' stroke-dasharray="5 4"' if dashed else "")

    # -------------------------------------------------------------------------------------------------------- text
    def text(self, x: float, y: float, text: str, style: Style | None = None, **changes) -> float:
        """Writes with the middle of its capitals at y; returns where it ends. changes: fields of Style."""
        style = style or Style(**changes)
        scale = style.size / text_to_path.FONT_SCALE
        width = text_width(text, style)
        x -= {"start": 0, "middle": width / 2, "end": width}[style.anchor]
        half = CAP_HEIGHT * style.size / 2
        self._texts.append((text, x, y - half, x + width, y + half))
        font = _font_name(style)
        glyphs, outlines = _layout(text, font)
        uses = []
        for glyph, at in glyphs:
            if not len(outlines[glyph][0]):
                continue  # a space
            new = len(self._glyphs), _outline(*outlines[glyph])
            number, _ = self._glyphs.setdefault((font, glyph), new)
            uses.append(f'<use xlink:href="#g{number}" x="{_n(at)}"/>')
        self._body.append(
            f'<g transform="translate({_n(x)} {_n(y + half)})scale({_n(scale, 4)} -{_n(scale, 4)})" '
            f'fill="{self.colours[style.colour]}" aria-label={quoteattr(text)}>{"".join(uses)}</g>'
        )
        return x + width

    def box(
        self, x, y, w, h, *lines: str, colour: str = "muted", opacity: float = 0.12, dashed: bool = False,
        crossed: bool = False, text: str = "ink", **changes,
    ) -> None:  # fmt: skip
        """A tinted box around centred lines; the first is bold where there are several. changes: fields of Style."""
        self.rect(x, y, w, h, colour, colour, opacity=opacity, dashed=dashed)
        size = changes.pop("size", SIZE)
        top = y + h / 2 - (len(lines) - 1) * 0.65 * size
        for i, line in enumerate(lines):
            style = Style(size, text, "middle", **({"bold": len(lines) > 1 and i == 0} | changes))
            if text_width(line, style) > w - 6:
                raise ValueError(f"{line!r} is {text_width(line, style):.0f} wide and its box {w}")
            self.text(x + w / 2, top + 1.3 * size * i, line, style)
        if crossed:
            self.cross(x, y, w, h)

    def heading(self, text: str, *lines: str) -> float:
        """The drawing's title and lines below it; returns where they end."""
        self.text(8, 18, text, size=21, bold=True)
        for i, line in enumerate(lines):
            self.text(8, 46 + 23 * i, line, colour="muted")
        return 46 + 23 * len(lines)

    def svg(self) -> str:
        """The picture; ValueError where text cannot be read."""
        w, h = self.size
        for text, left, top, right, bottom in self._texts:
            if left < 0 or top < 0 or right > w or bottom > h:
                raise ValueError(f"{text!r} leaves the canvas: {left:.0f} to {right:.0f}, {top:.0f} to {bottom:.0f}")
            for frame in self._frames:
                inside = left >= frame[0] and top >= frame[1] and right <= frame[2] and bottom <= frame[3]
                if not inside and _overlap((left, top, right, bottom), frame):
                    raise ValueError(f"{text!r} crosses the edge of a box at {frame[0]:.0f}, {frame[1]:.0f}")
        for (a, *box_a), (b, *box_b) in combinations(self._texts, 2):
            if _overlap(box_a, box_b):
                raise ValueError(f"{a!r} covers {b!r}")
        return "\n".join([
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{w}" height="{h}" viewBox="0 0 {w} {h}" role="img">',
            f"<title>{escape(self.title)}</title>",
            f"<desc>{escape(self.description)}</desc>",
            f"<!-- drawn with matplotlib {matplotlib.__version__} -->",
            "<defs>", *(f'<path id="g{i}" d="{d}"/>' for i, d in self._glyphs.values()), "</defs>",
            *self._body,
            "</svg>\n",
        ])  # fmt: skip


def _overlap(a, b) -> bool:
    """Of two boxes (left, top, right, bottom)."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def text_width(text: str, style: Style) -> float:
    """In pixels, with the last character's margin."""
    glyphs, _ = _layout(text + "|", _font_name(style))
    return glyphs[-1][1] * style.size / text_to_path.FONT_SCALE


def _font_name(style: Style) -> str:
    return f"DejaVuSans{'Mono' * style.mono}{'-Bold' * style.bold}.ttf"


@cache
def _layout(text: str, font_name: str) -> tuple[list[tuple[object, float]], dict]:
    """(glyph, x) of each character and glyph -> (vertices, codes), at FONT_SCALE. A character that the font lacks is a
    ValueError: it would be drawn as a box."""
    font = get_font(str(Path(matplotlib.get_data_path(), "fonts", "ttf", font_name)))
    if missing := {c for c in text if not font.get_char_index(ord(c))}:
        raise ValueError(f"{font_name} lacks {missing} of {text!r}")
    font.set_size(text_to_path.FONT_SCALE, text_to_path.DPI)
    glyphs, outlines, _ = text_to_path.get_glyphs_with_font(font, text)
    return [(glyph, x) for glyph, x, *_ in glyphs], dict(outlines)


_COMMANDS = {1: "M", 2: "L", 3: "Q", 4: "C", 79: "Z"}  # of matplotlib's path codes


def _outline(vertices, codes) -> str:
    points = [f"{_n(x)} {_n(y)}" for x, y in vertices]
    d, i = [], 0
    while i < len(codes):
        code = int(codes[i])
        count = {3: 2, 4: 3, 79: 0}.get(code, 1)
        d.append(_COMMANDS[code] + " ".join(points[i : i + count]))
        i += max(count, 1)
    return "".join(d)


def _n(value: float, digits: int = 1) -> str:
    """A number as short as it can be written."""
    text = f"{value:.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("-0", "") else text
