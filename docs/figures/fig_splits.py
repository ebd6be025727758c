"""Where the splits of K meet: partial sums through L2, or a cluster of blocks and its shared memory."""

import facts
from svg import Canvas

from tiny_gemm.int4_config import Zeros, pick_decode_config
from tiny_gemm.triton_cluster import cluster_adders

N = K = 4096
GROUP_SIZE = 128
BOX, GAP = 138, 24
COLOURS = ("blue", "orange", "green", "purple")  # of the splits


def draw(theme: str) -> str:
    config = pick_decode_config(1, N, K, GROUP_SIZE, Zeros.NONE, facts.gpu())
    splits, rows = config.splits, 16 * config.row_tiles
    if not config.cluster or splits != len(COLOURS) or cluster_adders(splits) != splits:
        raise ValueError(f"{K} x {N} is no longer drawn as it runs: {config}")
    share = rows // splits
    description = (
        f"Each of {splits} blocks multiplies a part of K of the same {rows} rows of W. Through memory, all write their "
        "sums to L2, count themselves, and the last one reads all sums back and adds them up. In a cluster, each block "
        f"sends {share} rows of its sums into the shared memory of each block, which adds them up in the order of the "
        "splits."
    )
    c = Canvas(theme, 640, 712, "Where the splits of K meet", description)
    c.heading(
        "Where the splits of K meet", f"INT4, {K} × {N}, one token: {rows} rows of W and {K // splits} columns a block"
    )
    left = [8 + i * (BOX + GAP) for i in range(splits)]

    y = 96
    c.text(8, y, "through memory: any GPU", bold=True, colour="gray")
    y += 18
    for i, x in enumerate(left):
        c.box(x, y, BOX, 40, f"split {i + 1}", colour=COLOURS[i], opacity=0.2)
        c.arrow((x + BOX / 2, y + 40), (x + BOX / 2, y + 75), colour=COLOURS[i], width=2)
    c.rect(8, y + 76, 624, 44, "muted", "muted", opacity=0.06)
    c.text(20, y + 98, "L2", bold=True)
    for i, x in enumerate(left):
        c.rect(x + BOX / 2 - 20, y + 84, 40, 28, COLOURS[i], opacity=0.55, radius=2)
    c.box(8, y + 152, 300, 62, "counter", "every block, after a fence", colour="muted")
    c.box(332, y + 152, 300, 62, "the last to arrive", "reads all sums back, adds: y", colour="gray", opacity=0.2)
    c.arrow((482, y + 120), (482, y + 151), colour="gray", width=2)
    c.arrow((308, y + 183), (331, y + 183), colour="gray", width=2)

    y = 362
    c.line((8, y - 14), (632, y - 14), colour="faint")
    c.text(8, y + 8, "a cluster: Hopper", bold=True, colour="blue")
    y += 26
    c.rect(2, y - 4, 636, 196, "blue", "blue", opacity=0.04, dashed=True)
    for i, x in enumerate(left):
        c.box(x, y + 4, BOX, 40, f"split {i + 1}", colour=COLOURS[i], opacity=0.2)
    top = y + 118
    for i, x in enumerate(left):
        for j, to in enumerate(left):
            start, end = x + BOX * (j + 1) / (splits + 1), to + 8 + (BOX - 16) * (i + 0.5) / splits
            c.arrow((start, y + 44), (end, top + 3), colour=COLOURS[i], width=1.5, head=6)
    for x in left:
        c.rect(x, top - 4, BOX, 68, "muted", "muted", opacity=0.06)
        for i in range(splits):
            width = (BOX - 16) / splits
            c.rect(x + 8 + i * width + 1, top + 4, width - 2, 24, COLOURS[i], opacity=0.55, radius=2)
        c.text(x + BOX / 2, top + 46, "its memory", anchor="middle")
    for x in left:
        c.arrow((x + BOX / 2, top + 64), (x + BOX / 2, top + 97), colour="blue", width=2)
        c.box(x, top + 98, BOX, 40, f"y: {share} rows", colour="blue", opacity=0.14)
    c.text(8, top + 162, "Each write tells the barrier beside it how many bytes came: no fence, no", colour="muted")
    c.text(8, top + 185, "counter, no way through L2. Added in the same order: the same bits.", colour="muted")
    return c.svg()
