"""Decode attention as textbook kernels, with what each leaves in HBM, and as the one kernel decode_attention."""

import facts
from svg import Canvas

ELEMENT = 2  # bytes of bfloat16
PROMPT = 2048  # tokens, of the example of prefill
STEPS = (  # kernel, what it leaves in HBM
    ("RoPE", "q, k rotated"),
    ("append", "K, V cache"),
    ("Q · Kᵀ", "scores"),
    ("softmax", "probabilities"),
    ("P · V", "output"),
)


def draw(theme: str) -> str:
    m = facts.presets.model_config(facts.MODEL)
    scores = m.num_heads * facts.CONTEXT * ELEMENT
    prefill = m.num_heads * PROMPT * PROMPT * ELEMENT
    launches = {which: facts.launches_per_layer(which)["attention"] for which in facts.TRACES}
    description = (
        "Left: textbook attention is a chain of kernels, RoPE, append, Q Kᵀ, softmax and P V, and each writes its "
        "result to HBM for the next one to read. Right: decode_attention is one launch; each block rotates q, streams "
        "the K and V tiles of its part through an online softmax in registers, and the last block to arrive adds the "
        "parts up."
    )
    c = Canvas(theme, 640, 668, "Attention: five kernels, or one", description)
    c.heading("Attention: a chain of kernels, or one", f"one new token of {facts.MODEL} attends to {facts.CONTEXT}")

    c.text(8, 92, "textbook", bold=True, colour="gray")
    c.text(176, 92, "HBM", bold=True, colour="purple")
    top, step = 112, 88
    c.rect(164, top, 142, step * 4 + 52, "purple", None, opacity=0.1)
    for i, (kernel, left_behind) in enumerate(STEPS):
        y = top + i * step
        c.box(8, y, 104, 52, kernel, colour="gray", opacity=0.2, bold=True)
        c.arrow((112, y + 18), (166, y + 18), colour="gray", width=2)
        kept = left_behind in ("K, V cache", "output")
        c.box(170, y + 2, 130, 34, left_behind, colour="purple", opacity=0.3 if kept else 0, dashed=not kept)
        if i + 1 < len(STEPS):
            c.arrow((212, y + 36), (212, y + 62), (60, y + 62), (60, y + step - 1), colour="gray", width=2)

    x, right = 334, 300
    c.text(x, 92, "decode_attention", bold=True, mono=True, colour="blue")
    c.rect(x, top, right, step * 4 + 52, "blue", "blue", opacity=0.08, width=2)
    c.text(x + 14, top + 22, "one launch", bold=True)
    c.text(x + 14, top + 45, "KV heads × parts of the cache", colour="muted")
    left, y = x + 14, top + 82
    c.rect(left, y, 250, 186, "blue", "blue", opacity=0.12)
    for i in (1, 2):  # blocks behind it
        x0, y0 = left + 10 * i, y - 8 * i
        edge = (x0, y0 + 8), (x0, y0), (x0 + 250, y0), (x0 + 250, y0 + 186), (x0 + 240, y0 + 186)
        c.line(*edge, colour="blue")
    lines = ("RoPE on q", "for each tile of K, V:", "  q · kᵀ, online softmax,", "  rescale, add p · v")
    c.text(left + 14, y + 25, "a block, on chip", bold=True)
    for i, line in enumerate(lines):
        c.text(left + 14 + 12 * line.startswith(" "), y + 53 + 25 * i, line.strip())
    c.text(left + 14, y + 160, "the first one appends k, v", colour="muted")
    c.arrow((300, top + step + 13), (left - 1, top + step + 13), colour="blue", width=2)
    c.arrow((left, top + step + 27), (301, top + step + 27), colour="blue", width=2)
    c.arrow((left + 60, y + 186), (left + 60, top + 4 * step - 15), colour="blue", width=2)
    c.text(left + 74, y + 217, "partial sums, in L2", colour="muted")
    c.box(left, top + 4 * step - 13, right - 28, 56, "last block to arrive", "adds them, in order", colour="blue")
    c.arrow((left, top + 4 * step + 19), (301, top + 4 * step + 19), colour="blue", width=2)

    y = top + step * 4 + 72
    c.line((8, y), (632, y), colour="faint")
    c.text(8, y + 22, "a layer", bold=True)
    c.text(282, y + 22, "textbook", bold=True, colour="gray")
    c.text(x + 156, y + 22, "Tiny-GEMM", bold=True, colour="blue")
    rows = (
        (f"scores, {facts.CONTEXT} keys", facts.size(scores), "none"),
        (f"scores, prompt of {PROMPT:,}", facts.size(prefill), "none"),
        ("launches, as traced", f"{launches['eager']}, eager cuDNN", str(launches["ours"])),
    )
    for i, (what, theirs, ours) in enumerate(rows):
        c.text(8, y + 48 + 25 * i, what, colour="muted")
        c.text(282, y + 48 + 25 * i, theirs)
        c.text(x + 156, y + 48 + 25 * i, ours)
    return c.svg()
