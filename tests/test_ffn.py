"""The fused FFN kernels: in the interpreter (with a real grid barrier), as compiled for every target, and on a GPU."""

import re

import aot
import pytest
import torch
from conftest import assert_close
from int4_weights import quantized

from tiny_gemm import ops
from tiny_gemm.int4_config import Zeros
from tiny_gemm.reference import fused_ffn_ref, int4_ffn_ref
from tiny_gemm.triton_fused_transformer import ffn

ACTIVATIONS = ["gelu", "gelu_tanh", "relu", "silu"]
SHAPES = [(1, 64, 96, 48), (3, 96, 64, 17), (9, 160, 96, 33)]  # m, d, h, n


def make(m, d, h, n, gated, dtype, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *s: torch.randn(*s, generator=generator)  # noqa: E731
    weight = lambda i, o: (randn(o, i) / i**0.5).to(dtype).to(device).t()  # noqa: E731
    x, b1, b2 = (t.to(dtype).to(device) for t in (randn(m, d), randn(2 * h)[::2], randn(n)))  # b1 is strided
    return x, weight(d, h), b1, weight(h, n), b2, weight(d, h) if gated else None


def int4(w, group_size, zeros):
    return None if w is None else quantized(w.t().float(), group_size, zeros)


@pytest.mark.interp
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("m", "d", "h", "n"), SHAPES)
def test_dense_matches_the_oracle_in_the_interpreter(m, d, h, n, activation, gated, poisoned):
    import interpreter

    args = make(m, d, h, n, gated, torch.bfloat16)
    with interpreter.threaded():
        y = ffn.fused_ffn(*args, activation)
    assert_close(y, fused_ffn_ref(*args, activation=activation), factor=2)  # the hidden activation is rounded too


@pytest.mark.interp
@pytest.mark.parametrize(("activation", "gated"), [("gelu", False), ("silu", True)], ids=["plain", "gated"])
@pytest.mark.parametrize(
    ("group_size", "zeros"), [(32, Zeros.NONE), (32, Zeros.REAL), (32, Zeros.INTEGER), (-1, Zeros.REAL)], ids=str
)
@pytest.mark.parametrize(("m", "d", "h", "n"), SHAPES)
def test_int4_matches_the_oracle_in_the_interpreter(m, d, h, n, group_size, zeros, activation, gated, poisoned):
    import interpreter

    x, w1, b1, w2, b2, gate = make(m, d, h, n, gated, torch.float16)
    w1, w2, gate = (int4(w, group_size, zeros) for w in (w1, w2, gate))
    parts = lambda w: (None, None, None) if w is None else (w.packed, w.scales, w.zeros)  # noqa: E731
    with interpreter.threaded():
        y = ffn.int4_ffn(
            x, *parts(w1), b1, *parts(w2), b2, *parts(gate), group_size, group_size, h, n, activation
        )  # fmt: skip
    assert_close(y, int4_ffn_ref(x, w1, b1, w2, b2, gate, activation=activation), factor=2)


@pytest.mark.interp
def test_barrier_leaves_no_arrivals_behind():
    """Launch after launch the arrivals are back at zero, whatever the number of programs."""
    import interpreter

    from tiny_gemm.device import counters

    for h in (16, 48, 200):
        args = make(2, 64, h, 32, False, torch.float16)
        for _ in range(2):
            with interpreter.threaded():
                y = ffn.fused_ffn(*args, "gelu")
            assert counters(torch.device("cpu"), 2, "barrier")[0] == 0
            assert_close(y, fused_ffn_ref(*args, activation="gelu"), factor=2)


@pytest.mark.interp
@pytest.mark.parametrize("groups", [(32, 64), (64, 32)])
@pytest.mark.parametrize(("d", "h"), [(64, 128), (128, 64)], ids=["units-64-128", "units-128-64"])
def test_int4_layers_of_different_units_and_groups(d, h, groups):
    """SmolLM2's 576 and 1536 have units of 64 and of 128 columns; group sizes may differ as well."""
    import interpreter

    x, w1, _, w2, _, gate = make(2, d, h, 32, True, torch.bfloat16)
    w1, gate, w2 = int4(w1, groups[0], False), int4(gate, groups[0], False), int4(w2, groups[1], False)
    with interpreter.threaded():
        y = ffn.int4_ffn(
            x, w1.packed, w1.scales, w1.zeros, None, w2.packed, w2.scales, w2.zeros, None, gate.packed, gate.scales,
            gate.zeros, *groups, h, 32, "silu",
        )  # fmt: skip
    assert_close(y, int4_ffn_ref(x, w1, None, w2, None, gate, activation="silu"), factor=2)


@pytest.mark.interp
def test_barrier_holds_when_programs_dawdle(monkeypatch):
    """Every atomic is preceded by a random pause, so that programs meet the barrier in all possible ways."""
    import random
    import time

    import interpreter

    builder = interpreter.InterpreterBuilder
    atomic, pause = builder.create_atomic_rmw, random.Random(0)

    def dawdling(self, *args, **kwargs):
        time.sleep(pause.random() * 2e-3)
        return atomic(self, *args, **kwargs)

    monkeypatch.setattr(builder, "create_atomic_rmw", dawdling)
    args = make(1, 64, 64, 64, False, torch.float16)
    expected = fused_ffn_ref(*args, activation="relu")
    for _ in range(5):
        with interpreter.threaded(timeout_s=20):
            y = ffn.fused_ffn(*args, "relu")
        assert_close(y, expected, factor=2)


COMPILED = {  # d, h, n, rows, group size (None: 16 bits), dtype of zeros
    "dense": (2048, 8192, 2048, 1, None, None),
    "dense-16-rows": (2048, 8192, 2048, 16, None, None),
    "g128": (4096, 14336, 4096, 1, 128, None),
    "g128-8-rows": (2048, 8192, 2048, 8, 128, None),
    "g128-zeros": (4096, 14336, 4096, 8, 128, "*fp16"),
    "g128-integer-zeros": (4096, 14336, 4096, 1, 128, "*i16"),
    "smollm2": (576, 1536, 576, 1, 32, "*fp32"),
    "g32-16-rows": (2048, 8192, 2048, 16, 32, "*fp32"),
}


def compile_ffn(target, name):
    """The gated kernel that the launcher would run on a large chip of this target."""
    d, h, n, rows, group_size, zeros = COMPILED[name]
    facts = aot.device_facts(target)
    signature = {name: "*bf16" for name in ("x_ptr", "hidden_ptr", "y_ptr")} | {"barrier_ptr": "*i32"}
    signature |= dict.fromkeys(("M", "D", "H", "N", "stride_xm"), "i32")
    group_sizes = None if group_size is None else (group_size, group_size)
    launcher, _ = ffn.plan(rows, d, h, n, "silu", group_sizes, facts)
    weights = ("w1_ptr", "wg_ptr", "w2_ptr")
    if group_size is None:
        signature |= dict.fromkeys(weights, "*bf16") | dict.fromkeys(("stride_w1n", "stride_wgn", "stride_w2n"), "i32")
        ones = dict.fromkeys(("stride_w1k", "stride_wgk", "stride_w2k"), 1)
    else:
        signature |= dict.fromkeys(weights, "*i16") | dict.fromkeys(("s1_ptr", "sg_ptr", "s2_ptr"), "*fp16")
        signature |= dict.fromkeys(("z1_ptr", "zg_ptr", "z2_ptr"), zeros)
        ones = {}
    return aot.compile_launch(launcher, target, signature, ones, unaligned=("M",))


@pytest.mark.aot
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("target", aot.TARGETS)
def test_compiles_for_every_target(target, name):
    # On AMD a unit of 64 columns, 32 bytes a row, is loaded in narrower pieces. With zeros and two units at a time
    # ptxas spills a few registers of 255 on sm_90.
    compiled = compile_ffn(target, name)
    few_spills = target == "sm_90" and "zeros" in name and compiled.spills <= 4
    aot.check(compiled, vector_loads=not (target == "gfx942" and name == "smollm2"), may_spill=few_spills)


@pytest.mark.aot
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_barrier_orders_memory(target):
    """In this order: all threads meet, one arrives with an acquire-release atomic at GPU scope, waits with acquire
    loads that invalidate L1, and all meet again before the second phase loads anything."""
    code = [line for line in compile_ffn(target, "smollm2").assembly.splitlines() if "/*" in line]
    at = lambda pattern, start=0: next(i for i in range(start, len(code)) if re.search(pattern, code[i]))  # noqa: E731
    arrive = at(r"ATOMG?\.E\.ADD.*STRONG\.GPU")
    assert any("BAR.SYNC" in line for line in code[:arrive])
    assert "MEMBAR" in "".join(code[arrive - 12 : arrive]), "what was stored before is released"
    wait = at(r"LDG?\.E.*STRONG\.GPU", arrive)
    meet = at(r"BAR\.SYNC", wait)
    assert any("CCTL.IVALL" in line for line in code[wait:meet]), "stale lines of L1 are dropped after the wait"
    assert any(re.search(r"LDGSTS|LDG\.E", line) for line in code[meet:])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("activation", "gated", "dtype"),
    [
        ("gelu", False, torch.bfloat16),
        ("gelu_tanh", False, torch.float16),
        ("relu", False, torch.bfloat16),
        ("silu", True, torch.bfloat16),
        ("gelu", True, torch.float16),
    ],
    ids=lambda v: str(v).removeprefix("torch."),
)
@pytest.mark.parametrize("m", [1, 16, 17])
def test_matches_the_oracle_on_a_gpu(m, activation, gated, dtype, poisoned):
    for d, h, n in [(64, 96, 48), (576, 1536, 576), (2048, 8192, 2048), (100, 333, 77)]:
        args = make(m, d, h, n, gated, dtype, "cuda")
        assert_close(ops.fused_ffn(*args, activation=activation), fused_ffn_ref(*args, activation=activation), factor=2)


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize(
    ("group_size", "zeros"),
    [(32, Zeros.REAL), (64, Zeros.NONE), (64, Zeros.INTEGER), (128, Zeros.NONE), (-1, Zeros.REAL)],
    ids=str,
)
@pytest.mark.parametrize("m", [1, 16, 17])
def test_int4_matches_the_oracle_on_a_gpu(m, group_size, zeros, gated, poisoned):
    for d, h, n in [(128, 256, 48), (576 if group_size == 32 else 512, 1536, 576), (2048, 8192, 2048)]:
        x, w1, b1, w2, b2, gate = make(m, d, h, n, gated, torch.float16, "cuda")
        w1, w2, gate = (int4(w, group_size, zeros) for w in (w1, w2, gate))
        y = ops.int4_ffn(x, w1, b1, w2, b2, gate, activation="silu")
        assert_close(y, int4_ffn_ref(x, w1, b1, w2, b2, gate, activation="silu"), factor=2)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 16])
def test_is_one_launch_at_decode_sizes(rows):
    """Counted by the profiler: the hidden activation is never a tensor that another launch reads."""
    x, w1, b1, w2, b2, gate = make(rows, 512, 1536, 512, True, torch.bfloat16, "cuda")
    q1, q2, q_gate = (int4(w, 128, Zeros.NONE) for w in (w1, w2, gate))
    calls = {
        "fused_ffn": lambda: ops.fused_ffn(x, w1, b1, w2, b2, gate, activation="silu"),
        "int4_ffn": lambda: ops.int4_ffn(x, q1, b1, q2, b2, q_gate, activation="silu"),
    }
    for name, call in calls.items():
        call()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
        kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        assert len(kernels) == 1 and "ffn_kernel" in kernels[0], f"{name}: {kernels}"


@pytest.mark.gpu
def test_barrier_survives_many_launches_of_many_sizes():
    """Different grids take turns on one barrier; each result is still right."""
    cases = [make(m, d, h, n, True, torch.bfloat16, "cuda") for m, d, h, n in [(1, 64, 96, 48), (8, 512, 4096, 512)]]
    expected = [ops.fused_ffn(*args, activation="silu") for args in cases]
    for _ in range(300):
        actual = [ops.fused_ffn(*args, activation="silu") for args in cases]
    for y, e in zip(actual, expected, strict=True):
        assert torch.equal(y, e)
