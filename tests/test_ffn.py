"""The fused FFN kernels: in the interpreter (with a real grid barrier), as compiled for every target, and on a GPU."""

import pytest
import torch
from conftest import assert_close

from tiny_gemm import ops
from tiny_gemm.quantize_utils import quantize
from tiny_gemm.reference import fused_ffn_ref, int4_ffn_ref
from tiny_gemm.triton_fused_transformer import ffn

ACTIVATIONS = ["gelu", "gelu_tanh", "relu", "silu"]
SHAPES = [(1, 64, 96, 48), (3, 96, 64, 17), (9, 160, 96, 33)]  # m, d, h, n


def make(m, d, h, n, gated, dtype, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *s: torch.randn(*s, generator=generator)  # noqa: E731
    weight = lambda i, o: (randn(o, i) / i**0.5).to(dtype).to(device).t()  # noqa: E731
    x, b1, b2 = (t.to(dtype).to(device) for t in (randn(m, d), randn(h), randn(n)))
    return x, weight(d, h), b1, weight(h, n), b2, weight(d, h) if gated else None


def int4(w, group_size, symmetric):
    return None if w is None else quantize(w.t().float(), group_size, symmetric=symmetric)


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
@pytest.mark.parametrize(("group_size", "symmetric"), [(32, True), (32, False), (-1, False)])
@pytest.mark.parametrize(("m", "d", "h", "n"), SHAPES)
def test_int4_matches_the_oracle_in_the_interpreter(m, d, h, n, group_size, symmetric, activation, gated, poisoned):
    import interpreter

    x, w1, b1, w2, b2, gate = make(m, d, h, n, gated, torch.float16)
    w1, w2, gate = (int4(w, group_size, symmetric) for w in (w1, w2, gate))
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


INT4_KERNELS = {"g128": (128, 128, None, 8), "g32": (64, 32, "*fp32", 4)}  # unit, group_size, zeros, slices


def compile_ffn(target, name):
    import aot

    amd = target.startswith("gfx")
    small = target in ("sm_86", "sm_89", "sm_120")
    pointers = {name: "*bf16" for name in ("x_ptr", "hidden_ptr", "y_ptr")} | {"barrier_ptr": "*i32"}
    sizes = dict.fromkeys(("M", "D", "H", "N", "stride_xm"), "i32")
    constants = {"b1_ptr": None, "b2_ptr": None, "ACTIVATION": "silu", "BLOCK_N": 16, "BLOCK_M": 16 if amd else 8}
    constants |= {"USE_ASM": not amd, "STAGES": 2 if amd else 3 if small else 4}
    if name == "dense":
        weights = dict.fromkeys(("w1_ptr", "wg_ptr", "w2_ptr"), "*bf16")
        weights |= dict.fromkeys(("stride_w1n", "stride_wgn", "stride_w2n"), "i32")
        constants |= {"stride_w1k": 1, "stride_wgk": 1, "stride_w2k": 1, "BLOCK_K": 64, "SLICES": 8}
        kernel = ffn._dense_ffn_kernel
    else:
        unit, group_size, zeros, slices = INT4_KERNELS[name]
        weights = dict.fromkeys(("w1_ptr", "wg_ptr", "w2_ptr"), "*i16")
        weights |= dict.fromkeys(("s1_ptr", "sg_ptr", "s2_ptr"), "*fp16")
        z_ptrs = ("z1_ptr", "zg_ptr", "z2_ptr")
        weights |= dict.fromkeys(z_ptrs, zeros) if zeros else {}
        constants |= {} if zeros else dict.fromkeys(z_ptrs)
        constants |= {"UNIT1": unit, "UNIT2": unit, "GROUP_SIZE1": group_size, "GROUP_SIZE2": group_size}
        constants |= {"SLICES": slices}
        kernel = ffn._int4_ffn_kernel
    options = {"num_warps": constants["SLICES"]} | ({} if amd else {"maxnreg": ffn.MAX_REGISTERS})
    return aot.compile_kernel(kernel, target, pointers | sizes | weights, constants, unaligned=("M",), **options)


@pytest.mark.aot
@pytest.mark.parametrize("name", ["dense", *INT4_KERNELS])
@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_compiles_for_every_target(target, name):
    import aot

    # On AMD a unit of 64 columns, 32 bytes a row, is loaded in narrower pieces.
    aot.check(compile_ffn(target, name), vector_loads=not (target == "gfx942" and name == "g32"))


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
@pytest.mark.parametrize(("group_size", "symmetric"), [(32, False), (64, True), (128, True), (-1, False)])
@pytest.mark.parametrize("m", [1, 16, 17])
def test_int4_matches_the_oracle_on_a_gpu(m, group_size, symmetric, gated, poisoned):
    for d, h, n in [(128, 256, 48), (512, 1536, 576), (2048, 8192, 2048)]:
        x, w1, b1, w2, b2, gate = make(m, d, h, n, gated, torch.float16, "cuda")
        w1, w2, gate = (int4(w, group_size, symmetric) for w in (w1, w2, gate))
        y = ops.int4_ffn(x, w1, b1, w2, b2, gate, activation="silu")
        assert_close(y, int4_ffn_ref(x, w1, b1, w2, b2, gate, activation="silu"), factor=2)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 16])
def test_is_one_launch_at_decode_sizes(rows):
    """Counted by the profiler: the hidden activation is never a tensor that another launch reads."""
    x, w1, b1, w2, b2, gate = make(rows, 512, 1536, 512, True, torch.bfloat16, "cuda")
    q1, q2, q_gate = (int4(w, 128, True) for w in (w1, w2, gate))
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
