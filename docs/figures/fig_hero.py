"""The idea: weights in 4 bits stream from memory into fused kernels, and tokens come out.

The shades of the stream are integers that quantize makes; the speed is decode.json's, graph and sampling included.
"""

import facts
import torch
from svg import Canvas

from tiny_gemm.quantize_utils import quantize, unpack

ROWS, CELL, GAP = 6, 17, 3
TOP, SPLIT, CHIP = 152, 212, 506  # where the stream begins, where 16 bits become 4, and where they meet the chip


def draw(theme: str) -> str:
    row = facts.decode_row("tiny-gemm-int4-generate")
    speed = f"{row['tokens_per_s']:,.0f}"
    gpu = facts.short(facts.measured("decode")[0]["gpu"])
    kernels = sum(facts.launches_per_layer("ours").values())
    description = (
        "Tiny-GEMM: weights packed into 4 bits stream from memory into fused kernels. "
        f"{facts.MODEL} writes {speed} tokens a second on an {gpu}, batch 1, {facts.CONTEXT} tokens of context."
    )
    c = Canvas(theme, 840, 330, "Tiny-GEMM", description)
    c.text(10, 34, "Tiny-GEMM", size=50, bold=True)
    c.text(10, 84, "4-bit weights, streamed from memory", size=24, colour="muted")
    c.text(10, 115, "into fused Triton kernels", size=24, colour="muted")

    pitch = CELL + GAP
    height = ROWS * pitch - GAP
    for i, values in enumerate(_integers(ROWS, (CHIP - SPLIT - 10) // pitch)):
        y = TOP + i * pitch
        for j, opacity in enumerate((0.55, 0.4, 0.25)):  # weights of 16 bits, each as wide as four of 4 bits
            right = SPLIT - 10 - j * 4 * pitch
            left = max(right - 4 * pitch + GAP, 4 + 9 * (i % 3))
            c.rect(left, y, right - left, CELL, "gray", opacity=opacity, radius=3)
        for j, value in enumerate(values):
            c.rect(SPLIT + 8 + j * pitch, y, CELL, CELL, "orange", opacity=0.2 + 0.8 * value / 15, radius=3)
    y = TOP + height + 24
    c.text(SPLIT - 10, y, "16 bits", size=22, colour="muted", anchor="end")
    c.text(SPLIT + 8, y, "4 bits", size=22, colour="orange", bold=True)
    c.line((SPLIT - 1, TOP - 4), (SPLIT - 1, y + 10), colour="muted", dashed=True)

    width = 130
    for i in range(7):  # pins
        pin = CHIP + 14 + i * (width - 28) / 6
        c.line((pin, TOP - 22), (pin, TOP - 12), colour="blue", width=4)
        c.line((pin, TOP + height + 12), (pin, TOP + height + 22), colour="blue", width=4)
    c.rect(CHIP, TOP - 12, width, height + 24, "blue", "blue", opacity=0.15, radius=12, width=3)
    bar = (height - 4) / kernels
    for i in range(kernels):
        c.rect(CHIP + 16, TOP + 2 + i * bar, width - 32, bar - 5, "blue", opacity=0.85, radius=3)
    c.text(CHIP + width / 2, y + 16, f"{kernels} kernels a layer", size=22, colour="blue", anchor="middle", bold=True)

    x, middle = CHIP + width, TOP + height / 2
    c.arrow((x + 8, middle), (x + 36, middle), colour="blue", width=4, head=14)
    c.text(x + 44, middle - 24, speed, size=46, bold=True)
    c.text(x + 44, middle + 14, "tokens/s", size=24)
    c.text(x + 44, middle + 46, facts.MODEL, size=21, colour="muted")
    c.text(x + 44, middle + 72, f"one {gpu.split()[-1]}", size=21, colour="muted")
    return c.svg()


def _integers(rows: int, columns: int) -> list[list[int]]:
    """What quantize makes of a wave, 0 to 15."""
    wave = torch.sin(torch.arange(rows * 128, dtype=torch.float64) * 2.4).view(rows, 128).float()
    return unpack(quantize(wave))[0][:, :columns].tolist()
