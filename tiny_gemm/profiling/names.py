"""Kernels by name: what is worth showing of it, and what sort of work it does."""

import re

FAMILIES = ("int4", "gemm", "attention", "norm", "elementwise", "copy", "other")
_WORDS = {  # the first family with a word that the name of kernel or op contains
    "int4": ("int4", "w4a16", "marlin", "gptq", "awq"),
    "attention": ("attention", "fmha", "flash_fwd", "flash_attn", "sdpa"),
    "gemm": (
        "gemm", "gemv", "cutlass", "cublas", "matmul", "nvjet", "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm",
        "aten::mv", "aten::addmv", "aten::linear", "splitk", "linear_dynamic", "ffn", "_mm_",
    ),
    "norm": ("norm",),
    "copy": ("memcpy", "memset", "copy", "fill", "aten::cat", "catarray", "aten::clone"),
    "elementwise": ("elementwise", "pointwise", "reduce", "softmax", "index", "gather", "scatter", "arange", "aten::"),
}  # fmt: skip


def family(name: str, op: str | None, kind: str) -> str:
    """What sort of work a kernel does, for colours and sums, by its name and its op's."""
    if kind in ("memcpy", "memset"):
        return "copy"
    # Not every op of this project's is a product; on a CPU the op is the name.
    text = " ".join(part.removeprefix("tiny_gemm::") for part in (name, op or "")).lower()
    return next((f for f, words in _WORDS.items() if any(w in text for w in words)), "other")


def shorten(text: str, width: int) -> str:
    """At most `width` characters. First an op's library goes (aten::mm: kernel), then the middle: names that begin
    alike tend to end differently."""
    if len(text) > width:
        text = re.sub(r"^\w+::(?=\w+: )", "", text)
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def short_name(name: str) -> str:
    """A kernel's name without return type, namespaces, template and call arguments."""
    if name.startswith(("Memcpy", "Memset")) or "(" not in name and "<" not in name:
        return name
    bare, depth = [], 0
    for character in name.replace("(anonymous namespace)", "").replace("<unnamed>", ""):
        depth += character in "<("
        if not depth:
            bare.append(character)
        depth -= character in ">)" and depth > 0
    return "".join(bare).split(" ")[-1].split("::")[-1].strip() or name
