"""How fused_attention tiles a prompt: what stays on chip while tiles of K and V stream by."""

import facts
from svg import Canvas

from tiny_gemm.triton_fused_transformer.attention import pick_config

PROMPT = 2048  # tokens
ELEMENT = 2  # bytes of bfloat16


def draw(theme: str) -> str:
    m = facts.presets.model_config(facts.MODEL)
    group = m.num_heads // m.num_kv_heads
    config = pick_config(PROMPT * group, m.head_dim, ELEMENT, False, facts.gpu())
    rows, keys, d = config.block_m, config.block_n, m.head_dim
    description = (
        f"A block of fused_attention keeps {rows} rows of q, their running maximum and sum and their output on chip, "
        f"and streams tiles of {keys} keys and values from HBM, {config.num_stages} stages deep. The scores of a tile "
        "never leave the chip, and the output is written once."
    )
    c = Canvas(theme, 640, 642, "Attention in tiles", description)
    c.heading(
        "Attention in tiles: what stays on chip", f"fused_attention, {facts.MODEL}, a prompt of {PROMPT:,} tokens"
    )

    c.text(10, 92, "HBM", bold=True, colour="purple")
    c.rect(8, 108, 178, 372, "purple", opacity=0.1)
    for x, name in ((24, "K"), (106, "V")):
        c.text(x + 32, 128, name, bold=True, anchor="middle")
        _tiles(c, x, 146, 64, 318, current=3)
    c.text(208, 92, "on chip, one block", bold=True, colour="blue")
    c.rect(206, 108, 426, 372, "blue", "blue", opacity=0.08, width=2)

    c.box(222, 124, 118, 92, "Q", f"{rows} × {d}", facts.size(rows * d * ELEMENT), colour="green", opacity=0.2)
    c.text(356, 142, f"{rows} rows: queries of the", colour="muted")
    c.text(356, 165, f"{group} heads that share K, V;", colour="muted")
    c.text(356, 188, "loaded once", colour="muted")

    c.box(222, 256, 118, 70, "K tile", f"{keys} × {d}", colour="orange", opacity=0.25)
    c.box(222, 386, 118, 70, "V tile", f"{keys} × {d}", colour="orange", opacity=0.25)
    c.text(281, 356, f"{config.num_stages} stages deep", colour="muted", anchor="middle")
    y = 146 + 3 * 318 / 8
    c.arrow((56, y), (56, y - 4), (197, y - 4), (197, 291), (221, 291), colour="orange", width=2)
    c.arrow((170, y + 16), (188, y + 16), (188, 421), (221, 421), colour="orange", width=2)

    c.box(390, 256, 226, 70, "S = Q · Kᵀ · scale", f"{rows} × {keys}, never in HBM", colour="blue", opacity=0.25)
    c.box(390, 386, 226, 70, "acc, m, l", f"{rows} × {d}, and 2 × {rows}", colour="blue", opacity=0.25)
    c.arrow((340, 291), (389, 291), colour="blue", width=2)
    c.arrow((340, 421), (389, 421), colour="blue", width=2)
    c.arrow((470, 326), (470, 385), colour="blue", width=2)
    c.text(481, 356, "P = 2^(S−m)")
    c.arrow((281, 216), (281, 236), (430, 236), (430, 255), colour="green", width=2)

    c.text(8, 510, "for every tile of K and V", bold=True)
    lines = (
        "m ← max(m, rows of S)      r = 2^(m before − m)",
        "l ← l · r + sum of P       acc ← acc · r + P · V",
    )
    for i, line in enumerate(lines):
        c.text(8, 540 + 26 * i, line, mono=True)
    c.text(8, 598, "at the end", bold=True)
    c.text(118, 598, "out = acc / l", mono=True)
    c.text(260, 598, "is written to HBM, once", colour="muted")
    whole = facts.size(m.num_heads * PROMPT**2 * ELEMENT)
    blocks = f"{PROMPT * group // rows} × {m.num_kv_heads} blocks"
    c.text(8, 626, f"{blocks} do the prompt; in HBM, its S would take {whole} a layer.", colour="muted")
    return c.svg()


def _tiles(c: Canvas, x: float, y: float, w: float, h: float, current: int, count: int = 8) -> None:
    for i in range(count):
        top, tall = y + i * h / count, h / count - 8
        if i == current:
            c.rect(x, top, w, tall, "orange", "orange", opacity=0.6, width=2)
        else:
            c.rect(x, top, w, tall, "purple", "purple", opacity=0.35 if i < current else 0.12, width=1)
