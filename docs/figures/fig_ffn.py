"""The gated feed-forward block three ways: eager, as the model runs INT4 weights, and in one cooperative launch."""

import facts
from svg import Canvas

from tiny_gemm.int4_config import DecodeConfig, Zeros, pick_config
from tiny_gemm.triton_fused_transformer.ffn import FUSED_ROWS

BOX, GAP, CHIP = 100, 32, 62
LEFT = [8 + i * (BOX + GAP) for i in range(5)]
BUFFERS = ("g", "s", "u", "h")  # what gate, SiLU, up and × leave


def draw(theme: str) -> str:
    m = facts.presets.model_config(facts.MODEL)
    eager, ours = (facts.launches_per_layer(which)["ffn"] for which in ("eager", "ours"))
    buffer = facts.size(2 * m.intermediate_size)
    group_size = facts.presets.group_size(facts.MODEL)
    down = pick_config(1, m.hidden_size, m.intermediate_size, group_size, Zeros.NONE, facts.gpu())
    if not isinstance(down, DecodeConfig):  # whose kernel loads weights before it waits for the kernel in front of it
        raise ValueError(f"the down projection of {facts.MODEL} is no longer drawn as it runs: {down}")
    description = (
        f"Eager PyTorch runs gate, SiLU, up, multiply and down as {eager} kernels with four buffers between them. "
        f"Tiny-GEMM's model runs {ours}: int4_gated_linear, which leaves only h, and int4_gemm, which fetches its "
        "weights while the first still runs. fused_ffn and int4_ffn are one cooperative launch, in which h is a "
        "scratch in L2."
    )
    c = Canvas(theme, 640, 664, "Feed-forward: GEMM, activation, GEMM", description)
    c.heading("Feed-forward: GEMM → activation → GEMM", f"{facts.MODEL}, one token; each buffer between: {buffer}")

    y = 90
    c.text(8, y, f"eager PyTorch: {eager} launches", bold=True, colour="gray")
    y += 18
    for left, kernel in zip(LEFT, ("gate", "SiLU", "up", "×", "down"), strict=True):
        c.box(left, y, BOX, 46, kernel, colour="gray", opacity=0.2, bold=True)
    chips = y + 72
    for i, name in enumerate(BUFFERS):
        right = LEFT[i] + BOX
        _chip(c, right - CHIP, chips, name)
        c.arrow((right - CHIP / 2, y + 46), (right - CHIP / 2, chips - 1), colour="gray", width=2)
        target = LEFT[i + 1] + 15
        if name == "s":  # over to ×, below what up leaves
            low, target = chips + 44, LEFT[3] + 8
            c.arrow((right - CHIP / 2, chips + 30), (right - CHIP / 2, low), (target, low), (target, y + 47),
                    colour="gray", width=2)  # fmt: skip
        else:
            target += 10 * (name == "u")
            c.arrow((right, chips + 15), (target, chips + 15), (target, y + 47), colour="gray", width=2)

    y = 264
    c.line((8, y - 22), (632, y - 22), colour="faint")
    c.text(8, y, f"the model with INT4 weights: {ours} launches that overlap", bold=True, colour="blue")
    y += 18
    c.box(8, y, 480, 58, "int4_gated_linear", "gate and up in registers, SiLU and × on the sums", colour="blue")
    for i in range(3):
        _chip(c, LEFT[i] + BOX - CHIP, y + 78, BUFFERS[i], crossed=True)
    _chip(c, 537, y + 14, "h", solid=True)
    c.arrow((488, y + 29), (536, y + 29), colour="blue", width=2)
    c.arrow((568, y + 44), (568, y + 69), colour="blue", width=2)
    c.box(388, y + 70, 112, 46, "weights", colour="orange", opacity=0.25)
    c.box(500, y + 70, 132, 46, "int4_gemm", colour="blue", bold=True)
    c.text(8, y + 138, "The second kernel fetches weights while the first one still runs.", colour="muted")

    y = 464
    c.line((8, y - 22), (632, y - 22), colour="faint")
    c.text(8, y, "fused_ffn, int4_ffn: 1 cooperative launch", bold=True, colour="blue")
    y += 18
    c.rect(8, y, 624, 74, "blue", "blue", opacity=0.06, width=2)
    c.box(18, y + 9, 350, 56, "every block: its tiles of h", "gate, up, SiLU, ×", colour="blue", opacity=0.14)
    c.box(378, y + 9, 84, 56, "grid", "barrier", colour="ink", opacity=0.1)
    c.box(472, y + 9, 150, 56, "its tiles of y", "down", colour="blue", opacity=0.14)
    for i in range(3):
        _chip(c, 46 + 104 * i, y + 94, BUFFERS[i], crossed=True)
    c.rect(378, y + 94, 244, 30, "purple", "purple", opacity=0.06, dashed=True)
    c.text(500, y + 109, "h: scratch, stays in L2", anchor="middle")
    c.arrow((344, y + 65), (344, y + 109), (377, y + 109), colour="blue", width=2)
    c.arrow((546, y + 94), (546, y + 66), colour="blue", width=2)
    c.text(8, y + 146, f"Up to {FUSED_ROWS} rows; the model takes it for 16-bit weights.", colour="muted")
    c.text(8, y + 172, "Crossed out: never written to HBM.", colour="muted")
    return c.svg()


def _chip(c: Canvas, x: float, y: float, name: str, crossed: bool = False, solid: bool = False) -> None:
    c.box(x, y, CHIP, 30, name, colour="purple", opacity=0.3 if solid else 0.08, dashed=not solid, crossed=crossed)
