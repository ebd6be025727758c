"""From a call in user code to a Triton kernel, by the example of int4_gemm. Names and schema are the code's own."""

import re
import textwrap

import torch
from svg import SIZE, Canvas

from tiny_gemm import ops, triton_gemm

OP = "int4_gemm"


def draw(theme: str) -> str:
    schema = str(getattr(torch.ops.tiny_gemm, OP).default._schema)
    implementations = {key: _implementation(key) for key in ("Meta", "CPU", "CUDA")}
    checks, decode, general = ops._check_int4_gemm, triton_gemm._int4_decode_kernel, triton_gemm._int4_gemm_kernel
    description = (
        f"User code calls tiny_gemm.ops.{OP}. Under torch.compile, torch.export, autocast or a profiler the call goes "
        "through torch.library and the dispatcher, which has a fake, a CPU and a CUDA implementation; plain eager "
        "tensors with a weight that was checked when it was made go straight to the kernels."
    )
    c = Canvas(theme, 640, 776, "From a call to a Triton kernel", description)
    c.heading("From a call to a Triton kernel")

    c.box(8, 44, 624, 44, f"y = {OP}(x, weight)", colour="ink", opacity=0.05, mono=True, bold=True)
    c.arrow((200, 88), (200, 117), width=2)
    c.box(8, 118, 440, 66, "torch.compile, torch.export", "autocast, profiler, function transforms", colour="purple")
    c.arrow((200, 184), (200, 213), width=2)
    for i, line in enumerate(("plain, eager:", "straight to", "the kernels")):
        c.text(598, 128 + 23 * i, line, anchor="end", colour="green", bold=i == 0)

    lines = _wrapped(schema, 46)
    bottom = 256 + 21 * len(lines)
    c.rect(8, 214, 560, bottom - 214, "purple", "purple", opacity=0.12)
    c.text(20, 233, "torch.library: schema, dispatcher", bold=True)
    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        c.text(20 + 0.6 * SIZE * indent, 260 + 21 * i, line.strip(), mono=True)

    y = bottom + 26
    c.rect(8, y, 584, 214, "surface", "faint", width=1)
    c.text(20, y + 18, "ops.py", mono=True, bold=True)
    keys = (
        ("Meta", 180, "purple", "shapes only"),
        ("CPU", 180, "gray", "torch's kernels"),
        ("CUDA", 184, "blue", "Triton"),
    )
    x = 20
    for key, width, colour, what in keys:
        middle = x + width / 2
        c.arrow((middle, bottom), (middle, y + 33), width=2)
        c.box(x, y + 34, width, 82, key, implementations[key], what, colour=colour, opacity=0.14)
        c.arrow((middle, y + 116), (middle, y + 141), width=2)
        x += width + 8
    c.box(20, y + 142, 560, 60, checks.__name__, "ValueError, TypeError: names the value and the rule", colour="orange")

    y += 214
    c.arrow((488, y - 12), (488, y + 25), colour="blue", width=2)
    c.arrow((614, 88), (614, y + 25), colour="green", width=2, dashed=True)
    launcher = "int4_config.py: pick_config → launcher.py", "keeps the compiled kernel for each kind of arguments"
    c.box(8, y + 26, 624, 56, *launcher, colour="blue", opacity=0.1)
    c.arrow((164, y + 82), (164, y + 107), colour="blue", width=2)
    c.arrow((476, y + 82), (476, y + 107), colour="blue", width=2)
    c.box(8, y + 108, 306, 46, decode.fn.__name__, colour="blue", opacity=0.28, mono=True)
    c.box(326, y + 108, 306, 46, general.fn.__name__, colour="blue", opacity=0.28, mono=True)
    c.text(8, y + 176, "The same for every op of torch.ops.tiny_gemm.", colour="muted")
    return c.svg()


def _wrapped(schema: str, width: int) -> list[str]:
    """The schema in lines; a type stays with its name."""
    glued = re.sub(r"(Tensor\??|int|->) ", "\\1\u00a0", schema)
    return [line.replace("\u00a0", " ") for line in textwrap.wrap(glued, width, subsequent_indent="    ")]


def _implementation(key: str) -> str:
    """The function of ops.py that has this dispatcher key of OP; ValueError where none is registered."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"tiny_gemm::{OP}", key):
        raise ValueError(f"tiny_gemm::{OP} has no implementation for {key}")
    return getattr(ops, f"_{OP}_{'fake' if key == 'Meta' else key.lower()}").__name__
