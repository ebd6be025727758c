"""What a decode step costs: bytes from HBM (16 bits, INT4) and kernel launches, by part of the network."""

import facts
from svg import Canvas

PARTS = {  # part: (label, second line, what of step_bytes it reads)
    "norm 1": ("norm", "+ residual", ()),
    "qkv": ("Q, K, V", "projection", ("qkv",)),
    "attention": ("attention", "RoPE, KV cache", ("attention",)),
    "out": ("output", "projection", ("out",)),
    "norm 2": ("norm", "+ residual", ()),
    "ffn": ("feed-forward", "gate, up, down", ("gate+up", "down")),
}
BLOCKS = (
    ("attention block", "blue", ("norm 1", "qkv", "attention", "out")),
    ("MLP block", "purple", ("norm 2", "ffn")),
)
BARS, BAR_WIDTH, DOTS, ROW = 178, 190, 472, 52


def draw(theme: str) -> str:
    byte, eager, ours = facts.step_bytes(), facts.launches_per_layer("eager"), facts.launches_per_layer("ours")
    dense, int4 = (sum(pair[i] for pair in byte.values()) for i in (0, 1))
    layers = facts.presets.model_config(facts.MODEL).num_layers
    description = (
        f"One decode step of {facts.MODEL}, batch 1, {facts.CONTEXT} tokens of context, reads {facts.size(dense)} in 16"
        f" bits, most of it in the feed-forward block, and {facts.size(int4)} with INT4 weights. A layer takes "
        f"{sum(eager.values())} kernel launches in eager PyTorch, most of them in attention and norms, and "
        f"{sum(ours.values())} in Tiny-GEMM."
    )
    c = Canvas(theme, 640, 680, "What a decode step costs", description)
    c.heading("What a decode step costs", f"{facts.MODEL}, batch 1, {facts.CONTEXT} tokens of context")
    c.text(BARS, 88, "bytes from HBM a token", bold=True)
    c.rect(BARS, 102, 14, 14, "gray", radius=2)
    c.text(BARS + 20, 109, "16 bits", colour="muted")
    c.rect(BARS + 108, 102, 14, 14, "orange", radius=2)
    c.text(BARS + 128, 109, "Tiny-GEMM, INT4", colour="muted")
    c.text(DOTS, 88, "launches a layer", bold=True)
    c.circle(DOTS + 7, 109, 5, "gray")
    c.text(DOTS + 20, 109, "eager", colour="muted")
    c.circle(DOTS + 84, 109, 5, "blue")
    c.text(DOTS + 97, 109, "ours", colour="muted")

    most = max(sum(byte[name][0] for name in names) for _, _, names in PARTS.values())
    y = 126
    for block, colour, parts in BLOCKS:
        h = 30 + ROW * len(parts)
        c.rect(2, y, 636, h, "surface", "faint", width=1)
        c.rect(2, y, 6, h, colour, radius=2)
        c.text(18, y + 19, block, colour=colour, bold=True)
        for i, part in enumerate(parts):
            label, second, names = PARTS[part]
            _row(c, y + 30 + i * ROW, label, second, [byte[name] for name in names], most)
            _dots(c, y + 30 + i * ROW, eager[part], ours[part])
        y += h + 6
    _row(c, y, "head", "16 bits in both", [byte["head"]], most)

    y += ROW + 4
    c.line((8, y), (632, y), colour="faint")
    c.text(18, y + 24, "a token", bold=True)
    c.text(18, y + 46, f"{layers} layers", colour="muted")
    c.text(BARS, y + 24, facts.size(dense), bold=True)
    end = c.text(BARS, y + 46, facts.size(int4), bold=True, colour="orange")
    c.text(end + 10, y + 46, f"the head is {byte['head'][1] / int4:.0%} of it", colour="muted")
    c.text(DOTS, y + 24, f"{sum(eager.values())} a layer", bold=True)
    c.text(DOTS, y + 46, f"{sum(ours.values())} a layer", bold=True, colour="blue")
    c.text(
        18, y + 78, f"Launches: traces of {facts.TRACED_MODEL} on an {facts.short(facts.gpu().name)}.", colour="muted"
    )
    return c.svg()


def _row(c: Canvas, y: float, label: str, second: str, reads: list[tuple[int, int]], most: int) -> None:
    c.text(18, y + 15, label, bold=True)
    c.text(18, y + 36, second, colour="muted")
    if not reads:
        c.text(BARS, y + 25, "kilobytes", colour="muted")
        return
    for dy, i, colour in ((7, 0, "gray"), (28, 1, "orange")):
        count = sum(read[i] for read in reads)
        width = max(BAR_WIDTH * count / most, 2)
        c.rect(BARS, y + dy, width, 16, colour, radius=2)
        c.text(BARS + width + 7, y + dy + 8, facts.size(count), colour="muted")


def _dots(c: Canvas, y: float, eager: int, ours: int) -> None:
    for dy, count, colour in ((15, eager, "gray"), (36, ours, "blue")):
        for i in range(count):
            c.circle(DOTS + 5 + 9 * i, y + dy, 4, colour)
        c.text(DOTS + 7 + 9 * count, y + dy, str(count), colour="muted")
