"""The packed INT4 format: which weights share a byte and an int16, and the order of the tiles in memory.

All of it is read from what tiny_gemm.quantize_utils.pack makes of a small weight.
"""

import facts
from svg import Canvas

from tiny_gemm.quantize_utils import TILE_N, packed_shapes, unit_k

N, K, GROUP = 32, 256, 128  # of the small weight
SHADES = ("blue", "orange", "green", "purple")  # a quarter of a unit each


def draw(theme: str) -> str:
    order, tiles, unit = facts.packed_order(N, K), facts.tile_order(N, K), unit_k(K)
    words = word_columns()
    packed, scales = packed_shapes(N, K, GROUP)
    tile_bytes = len(tiles[0, 0])
    description = (
        f"Weights {', '.join(map(str, words[0]))} of a row share the first int16, two in a byte; {unit // 4} of these "
        f"make a row of a unit of {unit} columns, {TILE_N} rows make a tile of {tile_bytes} bytes, and the tiles lie "
        "unit by unit along K, then by rows."
    )
    c = Canvas(theme, 640, 750, "The packed INT4 format", description)
    c.heading("The packed INT4 format: two weights in a byte", f"one row of W, {unit} columns along K: a unit")

    quarter, left, y = 156, 8, 74
    for j, shade in enumerate(SHADES):
        x = left + j * quarter
        c.rect(x, y, quarter - 2, 36, shade, shade, opacity=0.15, radius=2)
        c.rect(x, y, 34, 36, shade, shade, opacity=0.55, radius=2)
        first, last = words[0][j], words[-1][j]
        c.text(x + 17, y + 18, str(first), anchor="middle", bold=True)
        c.text(x + 94, y + 18, f"to {last}", anchor="middle")
        to, bend = 193 + 72 * j, y + (58 if j == 0 else 47)
        c.arrow((x + 17, y + 36), (x + 17, bend), (to, bend), (to, y + 70), colour=shade, width=2)
    y = 146
    for j, shade in enumerate(SHADES):
        place = order[0, words[0][j]]
        c.rect(157 + 72 * j, y, 72, 46, shade, shade, opacity=0.35, radius=2)
        c.text(193 + 72 * j, y + 23, f"k = {words[0][j]}", anchor="middle", bold=True)
        c.text(193 + 72 * j, y + 60, "high" if place.nibble % 2 else "low", anchor="middle", colour="muted")
    c.text(8, y + 23, "the first int16", bold=True)
    c.text(8, y + 60, "4 bits each", colour="muted")
    for byte in sorted({order[0, k].byte for k in words[0]}):
        x = 157 + 144 * byte
        c.line((x + 4, y + 74), (x + 4, y + 80), (x + 140, y + 80), (x + 140, y + 74), colour="ink")
        c.text(x + 72, y + 94, f"byte {byte}", anchor="middle")
    c.text(456, y + 12, "A load of 16 bytes", colour="muted")
    c.text(456, y + 35, "is 32 weights, with", colour="muted")
    c.text(456, y + 58, "no shuffle: nibble j", colour="muted")
    c.text(456, y + 81, "meets a slice of x.", colour="muted")

    y = 276
    c.text(8, y, f"{len(words)} int16 are one row of the unit: {2 * len(words)} bytes", bold=True)
    y += 18
    shown = (*range(4), None, len(words) - 1)
    for i, word in enumerate(shown):
        x = 8 + 104 * i
        if word is None:
            c.text(x + 50, y + 28, "…", anchor="middle", bold=True)
            continue
        for j, shade in enumerate(SHADES):
            c.rect(x + 50 * (j % 2), y + 28 * (j // 2), 50, 28, shade, shade, opacity=0.25, radius=2, width=1)
            c.text(x + 50 * (j % 2) + 25, y + 28 * (j // 2) + 14, str(words[word][j]), anchor="middle")

    y = 382
    c.text(8, y, f"{TILE_N} rows are a tile of {tile_bytes:,} bytes; those of W [{N}, {K}] in order:", bold=True)
    y += 22
    ordered = sorted(tiles, key=lambda tile: tiles[tile].start)
    width, height, left = 230, 96, 110
    middle = {}
    for number, (row, column) in enumerate(ordered):
        x, top = left + column * (width + 26), y + 26 + row * (height + 26)
        middle[number] = x + width / 2, top + height / 2
        c.rect(x, top, width, height, "orange", "orange", opacity=0.12)
        for line in range(TILE_N):
            c.rect(x + 5, top + 4 + line * 5.6, width - 10, 3.6, "orange", opacity=0.3, radius=1)
        c.rect(x + 20, top + 24, width - 40, 48, "page", "orange", radius=4)
        span = tiles[row, column]
        c.text(x + width / 2, top + 37, f"tile {number}", anchor="middle", bold=True)
        c.text(x + width / 2, top + 59, f"bytes {span.start:,} – {span.stop - 1:,}", anchor="middle")
    for column in range(K // unit):
        columns = f"k = {column * unit} to {(column + 1) * unit - 1}"
        c.text(left + column * (width + 26) + width / 2, y + 10, columns, anchor="middle", colour="muted")
    for row in range(N // TILE_N):
        top = y + 26 + row * (height + 26) + height / 2
        c.text(8, top - 11, "rows", colour="muted")
        c.text(8, top + 11, f"{row * TILE_N} to {(row + 1) * TILE_N - 1}", colour="muted")
    for number in range(len(ordered) - 1):
        (x0, y0), (x1, y1) = middle[number], middle[number + 1]
        if y0 == y1:
            c.arrow((x0 + width / 2, y0), (x1 - width / 2 - 1, y1), colour="ink", width=2)
        else:
            half, between = height / 2, (y0 + y1) / 2
            c.arrow((x0, y0 + half), (x0, between), (x1, between), (x1, y1 - half - 1), colour="ink", width=2)

    y += 26 + 2 * height + 26 + 28
    c.text(8, y, f"packed int16 {list(packed)}", mono=True)
    c.text(8, y + 28, f"scales float16 {list(scales)}", mono=True)
    c.text(
        8, y + 54, f"A scale for {GROUP} weights; those of two neighbouring groups lie side by side.", colour="muted"
    )
    return c.svg()


def word_columns() -> list[list[int]]:
    """Of the first row's first unit: the columns that each int16 holds, from its lowest nibble to its highest."""
    found: dict[int, dict[int, int]] = {}
    for (row, column), place in facts.packed_order(N, K).items():
        if row == 0 and column < unit_k(K):
            found.setdefault(place.word, {})[place.nibble] = column
    return [[nibbles[j] for j in range(4)] for _, nibbles in sorted(found.items())]
