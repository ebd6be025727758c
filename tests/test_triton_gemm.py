"""The INT4 GEMM kernels: in the interpreter, as compiled for every target, and on a GPU."""

import ast
import dataclasses
import json
import re
from pathlib import Path
from types import MappingProxyType

import aot
import interpreter
import pytest
import torch
from conftest import INTERPRETED, assert_close
from int4_weights import every_kind_of_zeros, quantized
from test_int4_config import H100, SMALL_CHIP

from tiny_gemm import device as device_module
from tiny_gemm import int4_config, triton_cluster, triton_gemm
from tiny_gemm.device import device_facts
from tiny_gemm.int4_config import DecodeConfig, PrefillConfig, SplitConfig, Zeros, pick_decode_config
from tiny_gemm.quantize_utils import LARGEST_ZERO, Int4Weight, dequantize, pack, quantize, unit_k
from tiny_gemm.reference import ACTIVATIONS, int4_gated_linear_ref, int4_gemm_ref


def run(m, n, k, group_size, zeros, dtype, device="cpu", seed=0, with_bias=True, scale_dtype=torch.float16):
    """(kernel's output, oracle) on random data; x is a strided view, so that its row stride is not K."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator).to(device)
    weight = quantized(w, group_size, zeros, scale_dtype=scale_dtype)
    x = torch.randn(m, k + 16, generator=generator).to(dtype).to(device)[:, :k]
    bias = torch.randn(2 * n, generator=generator).to(dtype).to(device)[::2] if with_bias else None  # strided, too
    y = triton_gemm.int4_gemm(x, weight.packed, weight.scales, weight.zeros, bias, group_size, n)
    return y, int4_gemm_ref(x, weight, bias)


@pytest.mark.interp
@every_kind_of_zeros
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k", "group_size"),
    [
        *[(1, 48, 256, 128), (3, 17, 576, 32), (9, 33, 96, 32), (2, 20, 100, -1), (5, 16, 192, 64)],
        *[(40, 40, 320, 32), (17, 20, 256, 128), (33, 70, 192, 64), (20, 16, 384, -1)],
    ],
    ids=["decode", "k576", "m9", "per-channel", "g64", "prefill", "prefill-g128", "prefill-g64", "prefill-channel"],
)
def test_matches_the_oracle_in_the_interpreter(m, n, k, group_size, zeros, dtype, poisoned):
    assert_close(*run(m, n, k, group_size, zeros, dtype))


@pytest.mark.interp
@pytest.mark.parametrize(
    ("rows", "config"),
    [(9, None), (17, None), (17, PrefillConfig(16, 16, 1, 4, 2, max_registers=128))],
    ids=["decode", "split", "prefill"],
)
def test_offsets_beyond_32_bits(rows, config):
    """Rows of x 2^28 elements apart, as hidden[:, -1] of a long prompt: the last ones are past 2^31."""
    weight = quantize(torch.randn(16, 64, generator=torch.Generator().manual_seed(0)), 64)
    x = torch.empty(rows << 28, dtype=torch.float16).as_strided((rows, 64), (2**28, 1))  # only the rows are touched
    x.copy_(torch.randn(rows, 64, generator=torch.Generator().manual_seed(1)))
    y = triton_gemm.int4_gemm(x, weight.packed, weight.scales, None, None, 64, 16, config)
    assert_close(y, int4_gemm_ref(x, weight))


@pytest.mark.interp
@pytest.mark.parametrize(
    ("m", "config"),
    [
        (2, DecodeConfig(4, 2, 1, 2, 128)),
        (20, SplitConfig(64, 16, splits=1, num_warps=4, stages=2)),
        (20, PrefillConfig(64, 16, splits=1, num_warps=4, stages=2, max_registers=128)),
    ],
    ids=["decode", "split", "prefill"],
)
def test_reads_no_row_past_the_last_tile(m, config):
    """N = 17 needs two tiles; blocks of 64 rows would reach two more, which here hold scales of NaN."""
    whole = quantize(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), 128)
    whole.scales[2:] = float("nan")
    part = Int4Weight(whole.packed[:2], whole.scales[:2], None, 128, (17, 128))
    x = torch.randn(m, 128, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
    y = triton_gemm.int4_gemm(x, part.packed, part.scales, None, None, 128, 17, config)
    assert_close(y, int4_gemm_ref(x, part))


@pytest.mark.interp
@every_kind_of_zeros
@pytest.mark.parametrize(("k", "group_size"), [(576, 32), (640, 128), (1152, 64), (320, -1)], ids=str)
def test_splits_of_k_are_added_in_one_order(k, group_size, zeros):
    """K that leaves the last of 4 splits little or nothing, an odd number of groups, and any order of arrival."""
    generator = torch.Generator().manual_seed(0)
    weight = quantized(torch.randn(33, k, generator=generator), group_size, zeros)
    x = torch.randn(3, k, generator=generator).half()
    config = SplitConfig(32, 4, splits=4, num_warps=1, stages=3)
    args = weight.packed, weight.scales, weight.zeros, None, group_size, 33, config
    ys = []
    for seed in range(4):
        with interpreter.shuffled(seed):
            ys.append(triton_gemm.int4_gemm(x, *args))
    assert_close(ys[0], int4_gemm_ref(x, weight))
    assert all(torch.equal(y, ys[0]) for y in ys), "the order of arrival changed the bits"


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.interp), pytest.param("cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("zero", [None, 0, 1, 8, 16, LARGEST_ZERO])
@pytest.mark.parametrize("rows", [1, 17], ids=["decode", "prefill"])
@pytest.mark.parametrize("plane", range(4))
def test_unpack_gives_every_value(plane, rows, zero, dtype, device):
    """All 16 nibbles through a weight whose only column that x meets is in one plane."""
    q = torch.full((16, 128), 8, dtype=torch.uint8)
    q[:, 32 * plane + 5] = torch.arange(16, dtype=torch.uint8)
    zeros = None if zero is None else torch.full((16, 1), zero, dtype=torch.int16)
    weight = pack(q, torch.ones(16, 1), zeros, 128).to(device)
    x = torch.zeros(rows, 128, dtype=dtype, device=device)
    x[:, 32 * plane + 5] = 1.0
    y = triton_gemm.int4_gemm(x, weight.packed, weight.scales, weight.zeros, None, 128, 16)
    assert y.tolist() == [[float(v - (8 if zero is None else zero)) for v in range(16)]] * rows


@pytest.mark.interp
@pytest.mark.parametrize(
    "config",
    [(1, 2, 1, 1), (1, 2, 2, 1), (2, 2, 4, 4), (4, 2, 1, 2), (1, 2, 16, 1), (1, 2, 16, 3), (2, 1, 2, 1), (1, 1, 2, 4)]
    + [(4, 1, 2, 6)],
    ids=str,
)
@pytest.mark.parametrize(
    ("k", "group_size"), [(576, 32), (1280, 32), (640, 128), (768, 128), (1152, 64), (320, -1), (2560, 128)], ids=str
)
@pytest.mark.parametrize("zeros", [Zeros.REAL, Zeros.INTEGER], ids=lambda z: z.value)
def test_every_shape_of_a_block(k, group_size, config, zeros, poisoned):
    """More steps than one and a last one that is not whole, warps and splits with nothing to do, tiles past N."""
    generator = torch.Generator().manual_seed(0)
    weight = quantized(torch.randn(50, k, generator=generator), group_size, zeros)
    x = torch.randn(9, k, generator=generator).bfloat16()
    config = DecodeConfig(*config[:3], stages=2, max_registers=128, splits=config[3])
    y = triton_gemm.int4_gemm(x, weight.packed, weight.scales, weight.zeros, None, group_size, 50, config)
    assert_close(y, int4_gemm_ref(x, weight))


@pytest.mark.parametrize(
    ("k", "config", "is_even"),
    [
        (14336, (1, 2, 16, 4), True),  # 28 units each, where whole steps would be 32, 32, 32 and 16
        (16384, (1, 2, 16, 4), False),
        (14336, (1, 2, 8, 4), False),  # of several steps
        (3584, (2, 2, 4, 4), False),  # an even number of units leaves three with 8 and one with 4 either way
        (2816, (2, 1, 8, 4), True),
        (2816, (2, 2, 16, 1), False),
    ],
)
def test_splits_of_one_step_are_even(k, config, is_even):
    config = DecodeConfig(*config[:3], stages=2, max_registers=128, splits=config[3])
    launch = triton_gemm.plan(1, 64, k, 128, Zeros.NONE, aot.device_facts("sm_90"), config)
    assert launch.launcher.meta["EVEN_SPLITS"] == is_even


@pytest.mark.interp
@pytest.mark.parametrize(
    ("k", "group_size", "config"), [(576, 32, (2, 2, 2)), (1280, 32, (1, 2, 2)), (1152, 64, (1, 2, 2))]
)
@every_kind_of_zeros
def test_lanes_that_do_not_share_scales(k, group_size, config, zeros, monkeypatch):
    """As on AMD: a ring of two units a warp in small groups; both ways give the same but for the order of sums."""
    generator = torch.Generator().manual_seed(0)
    weight = quantized(torch.randn(50, k, generator=generator), group_size, zeros)
    x = torch.randn(9, k, generator=generator).bfloat16()
    args = weight.packed, weight.scales, weight.zeros, None, group_size, 50
    monkeypatch.setattr(triton_gemm, "INTERPRETED", None)
    monkeypatch.setattr(triton_gemm, "_fixed_launch", triton_gemm._fixed_launch.__wrapped__)
    monkeypatch.setattr(triton_gemm, "_decode_launcher", triton_gemm._decode_launcher.__wrapped__)
    launch = triton_gemm.plan(9, 50, k, group_size, zeros, device_facts(x.device), DecodeConfig(*config, 2, 128))
    assert not launch.launcher.meta["LANES_SHARE"]
    assert_close(triton_gemm.int4_gemm(x, *args, DecodeConfig(*config, 2, 128)), int4_gemm_ref(x, weight))


def run_gated(m, n, k, group_size, zeros, dtype, device="cpu", activation="silu", config=None):
    """(kernel's output, oracle) of act(x @ gate.T) * (x @ W.T)."""
    generator = torch.Generator().manual_seed(0)
    up, gate = (
        quantized((torch.randn(n, k, generator=generator) / k**0.5).to(device), group_size, zeros) for _ in range(2)
    )
    x = torch.randn(m, k + 16, generator=generator).to(dtype).to(device)[:, :k]
    parts = up.packed, up.scales, up.zeros, gate.packed, gate.scales, gate.zeros
    y = triton_gemm.int4_gated_linear(x, *parts, group_size, n, activation, config)
    return y, int4_gated_linear_ref(x, up, gate, activation=activation)


@pytest.mark.interp
@pytest.mark.parametrize(("of_up", "of_gate"), [(Zeros.INTEGER, Zeros.REAL), (Zeros.REAL, Zeros.INTEGER)], ids=str)
def test_gate_and_up_may_have_zeros_of_two_kinds(of_up, of_gate):
    generator = torch.Generator().manual_seed(0)
    up, gate = (quantized(torch.randn(33, 640, generator=generator) / 25, 128, zeros) for zeros in (of_up, of_gate))
    x = torch.randn(3, 640, generator=generator).half()
    parts = up.packed, up.scales, up.zeros, gate.packed, gate.scales, gate.zeros
    y = triton_gemm.int4_gated_linear(x, *parts, 128, 33, "silu")
    assert_close(y, int4_gated_linear_ref(x, up, gate, activation="silu"))


def rows_and_dtypes(rows, of_float16):
    """bfloat16 for all of `rows`, float16 for a number of rows of each kernel: most of a GPU test is compiling."""
    return [(m, torch.bfloat16) for m in rows] + [(m, torch.float16) for m in of_float16]


@pytest.mark.interp
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("m", "n", "k", "group_size", "zeros"),
    [(1, 40, 576, 32, Zeros.NONE), (9, 33, 640, 128, Zeros.INTEGER), (3, 16, 320, -1, Zeros.REAL)],
    ids=str,
)
def test_gated_matches_the_oracle_in_the_interpreter(m, n, k, group_size, zeros, activation, poisoned):
    assert_close(*run_gated(m, n, k, group_size, zeros, torch.float16, activation=activation))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("group_size", "zeros"),
    [(32, Zeros.REAL), (64, Zeros.NONE), (64, Zeros.INTEGER), (128, Zeros.NONE), (128, Zeros.INTEGER)]
    + [(128, Zeros.REAL), (-1, Zeros.NONE)],
    ids=str,
)
@pytest.mark.parametrize(("m", "dtype"), rows_and_dtypes([1, 8, 9, 16], of_float16=[1]), ids=str)
def test_gated_matches_the_oracle_on_a_gpu(m, group_size, zeros, dtype, poisoned):
    for n, k in [(17, 1152), (1536, 576 if group_size == 32 else 640), (2048, 2048), (8960, 1536)]:
        assert_close(*run_gated(m, n, k, group_size, zeros, dtype, "cuda"))


@pytest.mark.interp
@pytest.mark.parametrize("config", [SplitConfig(128, 128, 2, 8, 3), SplitConfig(64, 64, 4, 4, 3)], ids=str)
def test_blocks_of_many_rows(config, poisoned):
    weight = quantize(torch.randn(140, 1152, generator=torch.Generator().manual_seed(0)), 128)  # 9 units
    x = torch.randn(150, 1152, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
    y = triton_gemm.int4_gemm(x, weight.packed, weight.scales, None, None, 128, 140, config)
    assert_close(y, int4_gemm_ref(x, weight))


@pytest.mark.interp
@pytest.mark.parametrize("num_warps", [4, 1], ids=["scales-at-once", "scales-in-halves"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("k", "group_size", "zeros", "splits"),
    [(576, 32, Zeros.NONE, 2), (640, 128, Zeros.INTEGER, 4), (384, 64, Zeros.INTEGER, 1), (96, 32, Zeros.NONE, 1)]
    + [(100, -1, Zeros.NONE, 1), (1152, 32, Zeros.INTEGER, 2), (576, 32, Zeros.REAL, 1), (640, 128, Zeros.REAL, 2)]
    + [(100, -1, Zeros.REAL, 1)],
    ids=str,
)
def test_weights_scaled_before_the_product(k, group_size, zeros, splits, scale_dtype, dtype, num_warps, poisoned):
    """Scales of the dtype of x and of others; K that ends within a unit; rows past M and past the last tile."""
    generator = torch.Generator().manual_seed(0)
    weight = quantized(torch.randn(33, k, generator=generator), group_size, zeros, scale_dtype=scale_dtype)
    x = torch.full((25, k + 16), float("nan")).to(dtype)  # what is past K is no number
    x[:, :k] = torch.randn(25, k, generator=generator)
    config = PrefillConfig(32, 16, splits, num_warps, stages=3, max_registers=128)
    y = triton_gemm.int4_gemm(x[:, :k], weight.packed, weight.scales, weight.zeros, None, group_size, 33, config)
    assert_close(y, int4_gemm_ref(x[:, :k], weight))


@pytest.mark.interp
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_kind_of_zeros
@pytest.mark.parametrize(
    ("n", "k", "group_size", "scale_dtype"),
    [
        (33, 576, 32, torch.float16),
        (16, 640, 128, torch.float32),
        (40, 1152, 64, torch.bfloat16),
        (50, 100, -1, torch.float16),
        (17, 192, 64, torch.float16),
    ],
    ids=str,
)
def test_dequantized_weights_are_rounded_once(n, k, group_size, scale_dtype, zeros, dtype, poisoned):
    generator = torch.Generator().manual_seed(0)
    weight = quantized(torch.randn(n, k, generator=generator), group_size, zeros, scale_dtype=scale_dtype)
    parts = weight.packed, weight.scales, weight.zeros, group_size
    assert torch.equal(triton_gemm.dequantize_weight(*parts, n, k, dtype), dequantize(weight).to(dtype))


@pytest.mark.interp
@pytest.mark.parametrize("zero", [1e-8, 8.000001, 15.0])
@pytest.mark.parametrize("scale", [1.0, 2.0**126])
def test_dequantized_weights_are_what_they_are_far_out(scale, zero):
    """Near a zero that is near 0 or 8, and with scales of which four times one is infinite."""
    q = torch.arange(16, dtype=torch.uint8).repeat(16, 4)
    weight = pack(q, torch.full((16, 2), scale), torch.full((16, 2), zero), 32)
    y = triton_gemm.dequantize_weight(weight.packed, weight.scales, weight.zeros, 32, 16, 64, torch.bfloat16)
    assert torch.equal(y, dequantize(weight).bfloat16())


@pytest.mark.interp
def test_many_rows_take_a_product_in_16_bits(monkeypatch):
    monkeypatch.setattr(triton_gemm, "dequantizes", lambda m, *_: m > 20)
    monkeypatch.setattr(triton_gemm, "_fixed_launch", None)  # what the other kernels would need
    assert_close(*run(21, 33, 576, 32, Zeros.REAL, torch.bfloat16))


SHAPES = {  # name: (m, n, k, group_size, dtype of scales, dtype of zeros)
    "gated-g128": (8, 14336, 4096, 128, "*fp16", None),
    "gated-g32": (1, 1536, 576, 32, "*fp16", "*fp32"),
    "gated-m16": (16, 8192, 2048, 128, "*fp16", "*fp16"),
    "gated-m16-pairs": (16, 8192, 2048, 128, "*fp16", None),
    "decode-g128": (1, 4096, 4096, 128, "*fp16", None),
    "decode-ring": (1, 6144, 4096, 128, "*fp16", None),
    "decode-ring-g32": (1, 6144, 4096, 32, "*fp16", None),
    "decode-ring-g32-m16": (16, 6144, 4096, 32, "*fp16", None),
    "decode-ring-g64-m16": (16, 16384, 2048, 64, "*fp16", None),
    "decode-ring-g32-zeros": (1, 6144, 4096, 32, "*fp16", "*fp16"),
    "gated-ring-g32": (1, 14336, 4096, 32, "*fp16", None),
    "decode-m8": (8, 6144, 4096, 128, "*bf16", None),
    "split-m1": (1, 28672, 4096, 128, "*fp16", None),
    "split-m8": (8, 28672, 4096, 128, "*bf16", None),
    "decode-m16": (16, 2048, 8192, 128, "*fp16", None),
    "split-g64": (16, 28672, 8192, 64, "*fp16", "*fp16"),
    "split-per-channel": (8, 4096, 14336, -1, "*fp16", "*fp16"),
    "decode-g64": (16, 2048, 8192, 64, "*fp16", "*fp16"),
    "decode-per-channel": (8, 2048, 4096, -1, "*fp16", "*fp16"),
    "decode-fp32": (8, 2048, 2048, 128, "*fp32", None),
    "decode-split-step": (8, 2048, 8192, 128, "*fp16", None),
    "decode-split-step-part": (1, 2048, 6144, 128, "*fp16", None),
    "decode-split-step-g32-m16": (16, 2048, 8192, 32, "*fp16", None),
    "decode-split-step-narrow": (8, 2880, 2880, 32, "*fp16", None),
    "decode-split-step-narrow-zeros-m16": (16, 2880, 2880, 32, "*fp16", "*fp16"),
    "decode-wide": (1, 16384, 2048, 128, "*fp16", None),
    "decode-long-m16": (16, 2560, 9728, 128, "*fp16", None),
    "decode-long-g32": (8, 4096, 14336, 32, "*fp16", None),
    "decode-long-narrow": (8, 2048, 10944, 32, "*fp16", None),
    "decode-long-narrow-m16": (16, 2048, 10944, 32, "*fp16", None),
    "decode-g32": (1, 1536, 576, 32, "*fp16", "*fp32"),
    "decode-one-unit-m16": (16, 6144, 2560, 128, "*fp16", None),
    "decode-five-blocks": (8, 9216, 3072, 128, "*fp16", None),
    "decode-five-blocks-g32-m16": (16, 9216, 3072, 32, "*fp16", None),
    "decode-long-g32-m16": (16, 2304, 9216, 32, "*fp16", None),
    "decode-long-zeros": (8, 2304, 9216, 128, "*fp16", "*fp16"),
    "decode-split-step-zeros": (8, 2048, 6144, 32, "*fp16", "*fp16"),
    "gated-five-blocks": (8, 8960, 1536, 128, "*fp16", None),
    "gated-five-blocks-g32": (8, 8960, 1536, 32, "*fp16", None),
    "gated-six-blocks": (1, 12288, 4096, 128, "*fp16", None),
    "gated-three-blocks-m16": (16, 12288, 4096, 128, "*fp16", None),
    "decode-integers": (1, 4096, 4096, 128, "*fp16", "*i16"),
    "decode-integers-ring": (8, 6144, 4096, 128, "*fp16", "*i16"),
    "decode-integers-g32-m16": (16, 6144, 4096, 32, "*fp16", "*i16"),
    "decode-integers-split": (8, 4096, 14336, 128, "*fp16", "*i16"),
    "decode-integers-fp32": (16, 6144, 4096, 128, "*fp32", "*i16"),
    "decode-integers-g32-fp32": (16, 4096, 4096, 32, "*fp32", "*i16"),
    "gated-integers": (1, 14336, 4096, 128, "*fp16", "*i16"),
    "gated-integers-g64-m16": (16, 14336, 4096, 64, "*fp16", "*i16"),
    "vocabulary-integers": (1, 128256, 4096, 128, "*fp16", "*i16"),
    "prefill-integers": (64, 4096, 4096, 128, "*fp16", "*i16"),
    "prefill-integers-m128": (128, 4096, 14336, 128, "*fp16", "*i16"),
    "vocabulary-narrow-m16": (16, 49152, 576, 32, "*fp16", None),
    "vocabulary-m1": (1, 128256, 4096, 128, "*fp16", None),
    "vocabulary-m8": (8, 128256, 4096, 128, "*fp16", None),
    "vocabulary-m16": (16, 128256, 4096, 32, "*fp16", "*fp16"),
    "prefill-m32": (32, 4096, 4096, 128, "*fp16", None),
    "prefill-m32-wide": (32, 28672, 4096, 128, "*fp16", None),
    "prefill-m64": (64, 16384, 2048, 64, "*fp16", None),
    "prefill-m96": (96, 4096, 4096, 128, "*bf16", None),
    "prefill-m128": (128, 4096, 14336, 128, "*fp16", None),
    "prefill-m192": (192, 4096, 4096, 128, "*fp16", None),
    "prefill-g32": (200, 1536, 576, 32, "*fp16", "*fp32"),
    "prefill-g128-zeros": (128, 1024, 4096, 128, "*fp16", "*fp16"),
    "prefill-per-channel": (128, 1024, 4096, -1, "*fp16", "*fp16"),
    "gated-ragged": (8, 14337, 4096, 128, "*fp16", None),
    "decode-ragged": (1, 4097, 4096, 128, "*fp16", None),
    "decode-integers-ragged": (8, 6145, 4096, 128, "*fp16", "*i16"),
    "decode-zeros-ragged": (16, 2049, 8192, 64, "*fp16", "*fp16"),
    "split-ragged": (8, 28673, 4096, 128, "*bf16", None),
    "prefill-ragged": (128, 4097, 4096, 128, "*bf16", None),
}


def config_of(name, target):
    """What is chosen for a shape on a large chip of this target; of few rows, among kernels in Triton: the one in Gluon
    has tests of its own."""
    m, n, k, group_size, _, zeros = SHAPES[name]
    dtype_of_zeros = {None: None, "*i16": torch.int16}.get(zeros, torch.float16)
    shape = m, n, k, group_size, triton_gemm.kind_of_zeros(dtype_of_zeros, group_size), aot.device_facts(target)
    with pytest.MonkeyPatch.context() as patch:
        if m <= int4_config.DECODE_ROWS:
            patch.setattr(int4_config, "IN_GLUON", False)
        return pick_decode_config(*shape, gated=True) if "gated" in name else int4_config.pick_config(*shape)


def compile_gemm(target, name, dtype="bf16"):
    """The kernel of config_of."""
    m, n, k, group_size, scales, zeros = SHAPES[name]
    activation = "silu" if "gated" in name else None
    config = config_of(name, target)
    launch = triton_gemm.plan(m, n, k, group_size, Zeros.NONE, aot.device_facts(target), config, activation)
    gate = {"gate_ptr": "*i16", "gate_s_ptr": scales, "gate_z_ptr": zeros} if activation else {}
    return compile_planned(launch, target, n, k, scales, zeros, dtype, gate)


def compile_planned(launch, target, n, k, scales, zeros, dtype="bf16", others=MappingProxyType({})):
    """What `launch`, a plan for W [n, k], is on this target; others: types of further arguments."""
    signature = {"x_ptr": f"*{dtype}", "w_ptr": "*i16", "s_ptr": scales, "z_ptr": zeros, "y_ptr": f"*{dtype}"}
    signature |= {"M": "i32", "N": "i32", "K": "i32", "stride_xm": "i32"} | others
    signature |= {"partial_ptr": "*fp32", "counter_ptr": "*i32"} if launch.partials else {}
    odd = [name for name, size in (("N", n), ("K", k), ("stride_xm", k)) if size % 16]
    return aot.compile_launch(launch.launcher, target, signature, unaligned=["M", *odd])


@pytest.mark.aot
@pytest.mark.parametrize(
    ("n", "k", "group_size", "m", "zeros", "block"),
    [
        (4096, 4096, 128, 1, Zeros.NONE, None),
        (4096, 4096, 128, 16, Zeros.NONE, None),
        (2048, 8192, 32, 8, Zeros.NONE, None),
        (2048, 8192, 128, 8, Zeros.INTEGER, None),
        (1536, 8960, 128, 1, Zeros.NONE, None),
        (6144, 2560, 128, 8, Zeros.NONE, None),
        (3584, 3584, 32, 1, Zeros.REAL, None),
        (3072, 3072, 64, 1, Zeros.REAL, None),
        (896, 4864, 128, 9, Zeros.NONE, None),
        (512, 2880, 32, 1, Zeros.NONE, None),
        (2880, 2880, 32, 16, Zeros.REAL, None),
        (100, 2500, -1, 1, Zeros.REAL, (1, 2, 8, 3)),  # fewer elements than threads
        (100, 7000, 64, 1, Zeros.NONE, (1, 1, 16, 7)),
        (100, 900, 32, 16, Zeros.INTEGER, (1, 1, 16, 2)),
        (100, 2048, 128, 1, Zeros.NONE, (4, 2, 1, 8)),
    ],
    ids=str,
)
def test_clusters_send_what_is_waited_for(n, k, group_size, m, zeros, block):
    """Bytes that never come would be waited for for ever: how often a thread sends depends on Triton's layouts."""
    config = block and DecodeConfig(*block[:3], 2, 255 if block[2] < 16 else 128, block[3], cluster=True)
    facts = aot.device_facts("sm_90")
    launch = triton_gemm.plan(m, n, k, group_size, zeros, facts, config)
    assert launch.launcher.cluster > 1 and not launch.partials and not launch.arrivals
    of_zeros = {Zeros.NONE: None, Zeros.INTEGER: "*i16", Zeros.REAL: "*fp32"}[zeros]
    compiled = compile_planned(launch, "sm_90", n, k, "*fp16", of_zeros, others={"bias_ptr": "*bf16"})
    aot.check(compiled, vector_loads=k % 128 == 0, may_spill=True)
    assert compiled.spills <= (56 if zeros is Zeros.REAL else 16)
    meta, size = launch.launcher.meta, launch.launcher.cluster
    elements, threads = 16 * meta["ROW_TILES"] * 8 * meta["X_TILES"], 32 * meta["num_warps"]
    sends = len(re.findall(r"\bSTAS\b", compiled.assembly))
    assert sends == launch.launcher.sends == triton_cluster.cluster_sends(elements, threads)
    expected = triton_cluster.cluster_adders(size) * triton_cluster._expected_bytes(size, elements, threads)
    assert expected == size * 4 * threads * sends
    assert compiled.static_shared_memory == 4 * triton_cluster.cluster_words(size, elements)


# How many moves of registers to memory there may be: where they cost less than a block less on an SM.
MOVES = {
    "decode-ring-g32-m16": 16,
    "decode-long-m16": 36,
    "decode-split-step-g32-m16": 40,
    "decode-split-step-narrow-zeros-m16": 56,
    "decode-g64": 24,
    "decode-zeros-ragged": 20,
    "decode-integers-fp32": 80,
    "gated-m16": 4,
    "decode-one-unit-m16": 12,
    "decode-five-blocks-g32-m16": 60,
    "decode-long-g32-m16": 32,
    "gated-integers-g64-m16": 68,
    "split-g64": 44,
    "gated-ring-g32": 20,
    "decode-long-narrow-m16": 16,
}
# Of those in Gluon, before the first step and behind the last.
MOVES_IN_GLUON = {"prefill-g128-zeros": 4, "prefill-per-channel": 4, "prefill-ragged": 8}


@pytest.mark.aot
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("target", aot.TARGETS)
def test_compiles_for_every_target(target, name):
    # Of a unit of 64 columns a lane loads 8 bytes at a time, and on AMD, where it is 32 bytes a row, so it does for
    # prefill.
    compiled = compile_gemm(target, name)
    narrow = SHAPES[name][2] % 128 and (target == "gfx942" or not name.startswith("prefill"))
    aot.check(compiled, vector_loads=not narrow, may_spill=True)
    in_gluon = compiled.name == "int4_hopper_kernel"
    assert compiled.spills <= (MOVES_IN_GLUON if in_gluon else MOVES).get(name, 16 if "integers" in name else 0)


@pytest.mark.aot
@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize(
    ("unit", "group_size", "zeros"),
    [(128, 128, None), (64, 32, "*fp32"), (128, 64, "*i16")],
    ids=["g128", "g32", "integers"],
)
def test_dequantizing_compiles_for_every_target(target, unit, group_size, zeros):
    launcher = triton_gemm._dequantize_launcher(unit, group_size, aot.device_facts(target))
    signature = {"w_ptr": "*i16", "s_ptr": "*fp16", "z_ptr": zeros, "y_ptr": "*bf16", "N": "i32", "K": "i32"}
    compiled = aot.compile_launch(launcher, target, signature)
    aot.check(compiled, tensor_cores=False, vector_loads=(target, unit) != ("gfx942", 64))


@pytest.mark.aot
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_unpacking_costs_no_conversions(target, dtype):
    """The nibbles become floats by lop3 and one packed operation; a conversion from int would be I2F in the SASS."""
    compiled = compile_gemm(target, "decode-g128", dtype)
    assert "I2F" not in compiled.assembly and "LOP3" in compiled.assembly
    assert compiled.count("LDG.128") > 0 == compiled.count("LDGSTS"), "all of K in one step: straight into registers"
    assert compiled.count("LDSM") == 0
    operations = compiled.instructions["HMMA"] * 4  # 8 weights a lane each, two an operation
    assert len(re.findall(r"HFMA2[.A-Z0-9_]* ", compiled.assembly)) in range(operations, operations + 8)
    assert len(re.findall(r"SHF\.R\.U32\.HI", compiled.assembly)) < operations / 2, "a shift for two planes"


@pytest.mark.aot
@pytest.mark.parametrize(
    ("name", "in_one_step"),
    [("decode-g128", True), ("decode-g32", True), ("gated-g32", True), ("decode-split-step", True)]
    + [
        (name, False)
        for name in ("decode-ring", "decode-m8", "gated-g128", "split-m1", "split-g64", "split-per-channel")
    ],
)
def test_x_is_read_after_the_wait_and_weights_before(name, in_one_step):
    """A pipeline that took x along, or that moved the wait to the end of the loop, would read x too early."""
    lines = compile_gemm("sm_90", name).assembly.splitlines()

    def where(op):
        return [i for i, line in enumerate(lines) if re.search(rf" {op}", line)]

    wait, products = where("ACQBULK")[0], where("HMMA")
    before = [i for i in where(r"LDG\.E") if i < wait]
    if in_one_step:
        after = [i for i in where(r"LDG\.E") if wait < i < products[-1]]
        assert len(before) > 0 and len(after) == 8, "all weights before, 4 planes of 2 units of x after"
    else:
        assert where("LDGSTS")[0] < wait < where(r"LDG\.E")[0] and not before
        assert any(i < wait for i in where("LDS.(128|64)")), "those of the first stage are in registers"
    assert wait < products[0]
    assert len([i for i in where("SHFL") if i < products[-1]]) == handed_over(name), (
        "nothing else moves between threads"
    )


def handed_over(name):
    """How many words the lanes of a row hand to one another in a step: of small groups each has a part of the pairs,
    but where one step of one block is all."""
    _, _, k, group_size, scales, zeros = SHAPES[name]
    config, gated = config_of(name, "sm_90"), "gated" in name
    pairs = 0 if group_size == -1 else config.warp_units * unit_k(k) // group_size // 2
    if config.splits == 1 and config.is_one_step(-(-k // unit_k(k))):
        return 0
    words = sum(2 if dtype == "*fp32" else 1 for dtype in (scales, zeros) if dtype)
    return 2 * config.row_tiles * pairs * words * (1 + gated) if pairs > 1 else 0


def steps_of_products(compiled):
    """The lines of SASS of each loop around products of wgmma, which all end before the step does.

    wgmma reads weights from registers while it runs, and Triton does not see that they are unpacked anew. (With seven
    products left running sums of a step were wrong, in some blocks.)
    """
    lines = compiled.assembly.splitlines()
    loops = aot.loops(compiled.assembly)
    products = [i for i, line in enumerate(lines) if " HGMMA" in line]
    waits = [i for i, line in enumerate(lines) if "WARPGROUP.DEPBAR.LE gsb0, 0x0" in line]
    around = [[(end - begin, begin, end) for begin, end in loops if begin < i < end] for i in products]
    assert products and all(around), "a loop around each product"
    steps = sorted({min(sizes)[1:] for sizes in around})
    for _begin, end in steps:
        last = max(i for i in products if i < end)
        assert any(last < i < end for i in waits), "all products end before the step does"
    assert not re.search(r"gsb0, 0x[1-9]", compiled.assembly)
    return [lines[begin:end] for begin, end in steps]


@pytest.mark.aot
@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith("prefill") or name == "vocabulary-m16"])
def test_no_product_runs_on_into_the_next_step(name):
    assert steps_of_products(compile_gemm("sm_90", name))


@pytest.mark.aot
@pytest.mark.parametrize(
    ("group_size", "scales", "zeros", "unit", "splits"),
    [
        (128, "*fp16", None, 128, 1),
        (128, "*bf16", None, 128, 2),
        (128, "*fp32", None, 128, 1),
        (64, "*fp16", None, 128, 1),
        (32, "*fp16", None, 128, 4),
        (32, "*fp16", None, 64, 1),
        (-1, "*fp16", None, 128, 1),
        (128, "*fp16", "*i16", 128, 4),
        (32, "*fp16", "*i16", 128, 1),
        (128, "*fp16", "*fp16", 128, 1),
        (32, "*fp16", "*fp16", 128, 1),
        (128, "*fp16", "*fp32", 128, 1),
        (32, "*fp16", "*fp32", 128, 1),
        (32, "*fp16", "*fp32", 64, 4),
        (-1, "*fp16", "*fp32", 128, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("block", int4_config.PREFILL_BLOCKS, ids=["tall", "few-warps", "half"])
def test_weights_are_scaled_where_they_are_unpacked(block, dtype, group_size, scales, zeros, unit, splits):
    """Within a thread, two weights at a time: nothing but the ring goes through shared memory, and two blocks fit an SM
    of Hopper."""
    config = dataclasses.replace(block, splits=splits)
    launcher = triton_gemm._prefill_launcher(config, True, unit, group_size, aot.device_facts("sm_90"))
    signature = {"x_ptr": f"*{dtype}", "w_ptr": "*i16", "s_ptr": scales, "z_ptr": zeros, "y_ptr": f"*{dtype}"}
    signature |= {"M": "i32", "N": "i32", "K": "i32", "stride_xm": "i32"}
    signature |= {"partial_ptr": "*fp32", "counter_ptr": "*i32"} if splits > 1 else {}
    compiled = aot.compile_launch(launcher, "sm_90", signature, unaligned=("M",))
    may_spill = zeros is not None and group_size == 32
    aot.check(compiled, may_spill=may_spill)
    [step] = steps_of_products(compiled)
    assert sum(" HGMMA" in line for line in step) == block.block_n // 64 // (block.num_warps // 4) * unit // 16
    assert not re.search(r" (SHFL|I2F|STS)\b", compiled.assembly.rpartition(" HGMMA")[0])
    assert sum(" BAR" in line for line in step) == 2
    # With zeros in float32, in small groups, a few moves to memory cost less than a block less on an SM.
    assert sum(bool(re.search(r" (LDL|STL)\b", line)) for line in step) <= (2 if may_spill else 0)
    assert 2 * (compiled.shared_memory + aot.KIB) <= 228 * aot.KIB
    assert 2 * compiled.registers * 32 * block.num_warps <= 65536


def test_what_a_mask_leaves_out_is_a_number():
    """x is 0 past K, but a scale that nobody loaded may be NaN, on a GPU and not in the interpreter."""
    calls = [node for node in ast.walk(ast.parse(Path(triton_gemm.__file__).read_text())) if isinstance(node, ast.Call)]
    loads = [{k.arg for k in node.keywords} for node in calls if ast.unparse(node.func) == "tl.load"]
    assert len(loads) > 15 and all("other" in keywords for keywords in loads if "mask" in keywords)


@pytest.mark.aot
def test_integer_zeros_take_one_stage():
    """Where a warp's two units come one after the other: Triton kept two of each, and fewer blocks fitted an SM."""
    of_both, of_weights = (compile_gemm("sm_90", name).shared_memory for name in ("decode-integers-ring", "decode-m8"))
    assert of_both <= 1.2 * of_weights


@pytest.mark.aot
@pytest.mark.parametrize("name", ["decode-g128", "decode-ring", "decode-m16", "decode-g64", "decode-ring-g32-zeros"])
def test_sums_are_fused_in_one_form(name):
    """Of a * b + c * d a compiler may round either product first, and it chose by the row of x."""
    assembly = compile_gemm("sm_90", name).assembly
    fused, products = (len(re.findall(rf" {op} ", assembly)) for op in ("FFMA", "FMUL"))
    of_zeros = fused // 2 if SHAPES[name][5] else 0
    assert fused >= 8 and products <= 8 + of_zeros, "a product that is not fused is one with 4, at the end"


@pytest.fixture
def no_table(monkeypatch):
    monkeypatch.setattr(triton_gemm, "_TABLE", {})
    triton_gemm._fixed_launch.cache_clear()
    yield
    triton_gemm._fixed_launch.cache_clear()


@pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel has no launch to compare")
def test_a_table_comes_before_pick_config_on_its_own_gpu(tmp_path, no_table):
    config = {"row_tiles": 2, "warp_units": 2, "warps": 16, "stages": 3, "max_registers": 96, "splits": 1}
    entries = [{"k": 2048, "n": 4096, "group_size": 128, "gated": False, "rows": rows, **config} for rows in (8, 16)]
    (tmp_path / "t.json").write_text(json.dumps({"gpu": H100.name, "entries": entries}))
    elsewhere = triton_gemm.plan(1, 4096, 2048, 128, Zeros.NONE, SMALL_CHIP)
    triton_gemm.load_table(tmp_path / "t.json")
    for m in (1, 9):
        after = triton_gemm.plan(m, 4096, 2048, 128, Zeros.NONE, H100)
        assert [after.launcher.meta[name] for name in ("WARPS", "maxnreg", "STAGES")] == [16, 96, 3]
        assert after.grid == (1, 128, 1)
    for m, group_size, zeros in ((17, 128, Zeros.NONE), (1, 128, Zeros.REAL), (1, 64, Zeros.NONE)):
        assert triton_gemm.plan(m, 4096, 2048, group_size, zeros, H100).launcher.meta.get("WARPS") != 16
    assert triton_gemm.plan(1, 4096, 2048, 128, Zeros.NONE, H100, None, "silu").launcher.meta["WARPS"] != 16
    assert triton_gemm.plan(1, 4096, 2048, 128, Zeros.NONE, SMALL_CHIP) == elsewhere


def test_x_of_many_rows_is_copied_unless_its_rows_are_aligned():
    whole = torch.randn(3, 48).half()
    assert triton_gemm._aligned(whole) is whole and triton_gemm._aligned(whole[:, :36]).stride() == (48, 1)
    far = torch.empty(2**24 + 64, dtype=torch.float16).as_strided((2, 32), (2**24 + 16, 1)).fill_(1.0)
    for x in (torch.randn(3, 52).half()[:, :48], torch.randn(145).half()[1:].view(3, 48), far):
        copy = triton_gemm._aligned(x)
        assert torch.equal(copy, x) and copy.stride() == (x.shape[1], 1) and copy.data_ptr() % 16 == 0
    for x in (torch.randn(3, 44).half()[:, :40], torch.randn(3, 50).half()[:, :36]):
        assert triton_gemm._aligned(x) is x, "a copy's rows would not lie better"


@pytest.mark.interp
def test_misaligned_parts_are_refused_in_words():
    weight = quantize(torch.randn(16, 128), 64)
    scales = torch.empty(weight.scales.numel() + 1, dtype=torch.float16)[1:].view(weight.scales.shape)
    with pytest.raises(ValueError, match="scales begins at address .* must be aligned to 16 bytes"):
        triton_gemm.int4_gemm(torch.randn(1, 128).half(), weight.packed, scales, None, None, 64, 16)


@pytest.mark.interp
def test_more_rows_than_a_launch_has_blocks_are_refused_in_words(monkeypatch):
    monkeypatch.setattr(triton_gemm, "MAX_BLOCKS", 2)
    with pytest.raises(ValueError, match="N=48 must be at most 32"):
        run(1, 48, 64, 64, Zeros.NONE, torch.float16)


def test_float32_is_refused_in_words():
    with pytest.raises(TypeError, match="float32, on a GPU it must be bfloat16 or float16"):
        run(1, 16, 64, 64, Zeros.NONE, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@every_kind_of_zeros
@pytest.mark.parametrize(("m", "dtype"), rows_and_dtypes([1, 8, 9, 17, 100, 500], of_float16=[1, 9, 100]), ids=str)
def test_matches_the_oracle_on_a_gpu(m, zeros, group_size, dtype, poisoned):
    for n, k in [(17, 1152), (2048, 2048)]:
        assert_close(*run(m, n, k, group_size, zeros, dtype, "cuda"))


@pytest.mark.gpu
@every_kind_of_zeros
@pytest.mark.parametrize("m", [1, 8, 16])
@pytest.mark.parametrize(
    ("n", "k", "group_size"),
    [
        (2880, 2880, 32),
        (2560, 9728, 128),
        (2048, 10944, 32),
        (2048, 8192, 32),
        (1536, 8960, 32),
        (2304, 9216, 32),
        (2304, 9216, 128),
        (9216, 3072, 32),
        (4096, 14336, 64),
        (16384, 2048, 128),
        (49152, 576, 32),
    ],
    ids=str,
)
def test_blocks_by_the_shape_on_a_gpu(n, k, group_size, m, zeros, poisoned):
    """What pick_config takes for long rows, small groups and wide weights: many splits, most registers in use."""
    assert_close(*run(m, n, k, group_size, zeros, torch.bfloat16, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "n", "k", "group_size", "zeros"),
    [
        (32, 28672, 1024, 128, Zeros.NONE),
        (64, 4096, 4096, 128, Zeros.NONE),
        (64, 6144, 4096, 128, Zeros.INTEGER),
        (96, 4096, 4096, 64, Zeros.NONE),
        (128, 4096, 14336, 128, Zeros.NONE),
        (128, 4096, 4096, 128, Zeros.INTEGER),
        (128, 4000, 2944, 128, Zeros.REAL),
        (192, 4096, 4096, -1, Zeros.NONE),
        (192, 1536, 576, 32, Zeros.NONE),
        (192, 4096, 4096, 32, Zeros.INTEGER),
        (256, 16384, 2048, 128, Zeros.NONE),
        (125, 28600, 2048, 128, Zeros.NONE),  # from here on weights are scaled before the product
        (128, 28672, 1024, 128, Zeros.INTEGER),
        (250, 4096, 14336, 128, Zeros.INTEGER),
        (190, 28672, 1024, 32, Zeros.NONE),
        (100, 28672, 1024, 64, Zeros.INTEGER),
        (500, 28672, 1024, 128, Zeros.INTEGER),
        (256, 49152, 576, 32, Zeros.NONE),
        (256, 28672, 1024, -1, Zeros.NONE),
        (128, 28672, 1024, -1, Zeros.REAL),
        (128, 28672, 1024, 32, Zeros.REAL),
        (120, 4096, 14336, 128, Zeros.REAL),
    ],
    ids=str,
)
def test_many_rows_on_a_gpu(m, n, k, group_size, zeros, poisoned):
    """Narrow blocks and wide ones, with all of K and with a part of it; the same bits each time."""
    ys = [run(m, n, k, group_size, zeros, torch.bfloat16, "cuda") for _ in range(3)]
    assert_close(*ys[0])
    assert all(torch.equal(y, ys[0][0]) for y, _ in ys)


@pytest.mark.gpu
@every_kind_of_zeros
@pytest.mark.parametrize("group_size", [128, 32])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("block", "splits"),
    [(int4_config.TALL, 1), (int4_config.FEW_WARPS, 1), (int4_config.FEW_WARPS, 4), (int4_config.HALF, 4)],
    ids=["tall", "few-warps", "few-warps-splits", "half-splits"],
)
def test_weights_scaled_before_the_product_on_a_gpu(
    block, splits, dtype, scale_dtype, group_size, zeros, poisoned, monkeypatch
):
    """As exact as the product with weights that were dequantized, and the same bits in 200 launches."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("weights are scaled before the product on Hopper only")
    n, k, m = 28688, 2048, 253  # two blocks on each SM, and a last one that is not whole
    weight = quantized(torch.randn(n, k, device="cuda"), group_size, zeros, scale_dtype=scale_dtype)
    x = torch.randn(m, k, device="cuda", dtype=dtype)
    args = weight.packed, weight.scales, weight.zeros, None, group_size, n, dataclasses.replace(block, splits=splits)
    monkeypatch.setattr(int4_config, "IN_GLUON", False)
    assert isinstance(int4_config.pick_config(m, n, k, group_size, zeros, device_facts(x.device)), PrefillConfig)
    y, oracle = triton_gemm.int4_gemm(x, *args), int4_gemm_ref(x, weight)
    error = lambda y: ((y.double() - oracle).norm() / oracle.norm()).item()  # noqa: E731
    assert error(y) <= 1.01 * error(x @ dequantize(weight, dtype).T)
    assert all(torch.equal(triton_gemm.int4_gemm(x, *args), y) for _ in range(200))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n", "k", "group_size", "scale_dtype"),
    [
        (192, 576, 32, torch.float16),
        (1536, 576, 32, torch.float32),
        (576, 1536, 32, torch.float16),
        (49152, 576, 32, torch.float16),
        (100, 2880, 32, torch.bfloat16),
        (33, 7392, 32, torch.float32),
        (48, 100, -1, torch.float16),
    ],
    ids=lambda v: str(v).removeprefix("torch."),
)
@pytest.mark.parametrize("m", [1, 70])
def test_odd_shapes_of_real_models(m, n, k, group_size, scale_dtype, poisoned):
    options = {"device": "cuda", "with_bias": False, "scale_dtype": scale_dtype}
    assert_close(*run(m, n, k, group_size, Zeros.REAL, torch.bfloat16, **options))


@pytest.mark.gpu
def test_error_is_no_worse_than_cublas():
    """Against float64, on the same dequantized weights (which cuBLAS gets rounded to 16 bit)."""
    weight = quantize(torch.randn(4096, 4096, device="cuda"), 128)
    x = torch.randn(8, 4096, device="cuda", dtype=torch.bfloat16)
    oracle = int4_gemm_ref(x, weight)
    error = lambda y: ((y.double() - oracle).norm() / oracle.norm()).item()  # noqa: E731
    ours = triton_gemm.int4_gemm(x, weight.packed, weight.scales, None, None, 128, 4096)
    assert error(ours) <= error(x @ dequantize(weight, torch.bfloat16).T)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("n", "k", "group_size", "decode_weights"),
    [(n, k, 128, int4_config.DECODE_WEIGHTS) for n, k in ((4096, 4096), (2048, 14336), (2048, 8192), (2048, 6144))]
    + [(n, k, 32, int4_config.DECODE_WEIGHTS) for n, k in ((960, 576), (2880, 2880), (2048, 10944), (2048, 8192))]
    + [(n, k, 64, int4_config.DECODE_WEIGHTS) for n, k in ((28672, 2048), (4096, 14336), (2880, 2880))]
    + [(9216, 3072, group_size, int4_config.DECODE_WEIGHTS) for group_size in (128, 64, 32)]
    + [(1536, 8960, group_size, int4_config.DECODE_WEIGHTS) for group_size in (128, 64, 32)]
    + [(16384, 2048, 128, int4_config.DECODE_WEIGHTS), (6144, 2560, 128, int4_config.DECODE_WEIGHTS)]
    + [(8192, 4096, 128, 0), (960, 576, 32, 0)],  # as a large vocabulary's
    ids=str,
)
def test_a_row_has_the_same_bits_in_every_batch(n, k, group_size, decode_weights, monkeypatch):
    monkeypatch.setattr(int4_config, "DECODE_WEIGHTS", decode_weights)
    monkeypatch.setattr(triton_gemm, "_fixed_launch", triton_gemm._fixed_launch.__wrapped__)  # it remembers
    weight = quantize(torch.randn(n, k, device="cuda"), group_size, symmetric=group_size != 32)
    args = weight.packed, weight.scales, weight.zeros, None, group_size, n
    x = torch.randn(16, k, device="cuda", dtype=torch.bfloat16)
    whole = triton_gemm.int4_gemm(x, *args)
    for m in (1, 2, 3, 4, 5, 8, 9):
        assert torch.equal(triton_gemm.int4_gemm(x[:m], *args), whole[:m]), f"batch of {m}"
    for _ in range(1000):
        assert torch.equal(triton_gemm.int4_gemm(x, *args), whole)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decode_weights", [int4_config.DECODE_WEIGHTS, 0], ids=["decode", "prefill-kernel"])
@pytest.mark.parametrize(
    ("n", "k", "group_size", "zeros"),
    [
        (4096, 4096, 128, Zeros.NONE),
        (6144, 4096, 128, Zeros.NONE),
        (6144, 4096, 128, Zeros.INTEGER),
        (2048, 2048, 64, Zeros.NONE),
        (2048, 2048, 64, Zeros.INTEGER),
        (2048, 8192, 128, Zeros.REAL),
        (4096, 1024, 32, Zeros.REAL),
        (4096, 1024, 32, Zeros.INTEGER),
        (2048, 2048, -1, Zeros.REAL),
        (4096, 4096, -1, Zeros.REAL),
        (4096, 4096, 32, Zeros.NONE),
        (9216, 3072, 32, Zeros.NONE),
        (9216, 3072, 64, Zeros.INTEGER),
    ],
    ids=str,
)
def test_a_row_has_the_same_bits_at_every_place(n, k, group_size, zeros, decode_weights, dtype, monkeypatch):
    """Sixteen equal rows, and batches of 1, 8 and 9 of them."""
    monkeypatch.setattr(int4_config, "DECODE_WEIGHTS", decode_weights)
    monkeypatch.setattr(triton_gemm, "_fixed_launch", triton_gemm._fixed_launch.__wrapped__)  # it remembers
    weight = quantized(torch.randn(n, k, device="cuda"), group_size, zeros)
    x = torch.randn(1, k, device="cuda", dtype=dtype).expand(16, -1).contiguous()
    args = weight.packed, weight.scales, weight.zeros, None, group_size, n
    row = triton_gemm.int4_gemm(x[:1], *args)
    equal = [torch.equal(triton_gemm.int4_gemm(x[:m], *args), row.expand(m, -1)) for m in (8, 9, 16)]
    assert equal == [True, True, True]


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k"), [(8960, 1536), (12288, 1024), (6144, 2048), (3072, 576)], ids=str)
@pytest.mark.parametrize("group_size", [32, 128])
@every_kind_of_zeros
def test_a_row_of_a_gated_pair_has_the_same_bits_in_every_batch(n, k, group_size, zeros):
    group_size = min(group_size, unit_k(k))
    up, gate = (quantized(torch.randn(n, k, device="cuda") / k**0.5, group_size, zeros) for _ in range(2))
    args = up.packed, up.scales, up.zeros, gate.packed, gate.scales, gate.zeros, group_size, n, "silu"
    x = torch.randn(16, k, device="cuda", dtype=torch.bfloat16)
    whole = triton_gemm.int4_gated_linear(x, *args)
    equal = [torch.equal(triton_gemm.int4_gated_linear(x[:m], *args), whole[:m]) for m in (1, 2, 7, 8, 9, 15)]
    assert equal == [True] * 6
    assert all(torch.equal(triton_gemm.int4_gated_linear(x, *args), whole) for _ in range(20))


@pytest.mark.gpu
def test_a_capture_after_a_launch_that_counts_nothing(monkeypatch):
    """An op that has run may be captured, also at a shape whose splits count arrivals where those before did not."""
    monkeypatch.setattr(device_module, "_CAPTURED", {})
    monkeypatch.setattr(device_module, "_COUNTERS", {})
    monkeypatch.setattr(triton_gemm, "_fixed_launch", triton_gemm._fixed_launch.__wrapped__)  # it remembers
    small, long = (quantize(torch.randn(n, k, device="cuda"), 128) for n, k in ((1024, 1024), (2304, 9216)))
    facts = device_facts(torch.device("cuda", 0))
    arrivals = [triton_gemm.plan(1, *w.shape, 128, Zeros.NONE, facts).arrivals for w in (small, long)]
    assert arrivals[0] == 0 < arrivals[1]
    x = torch.randn(1, 9216, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        triton_gemm.int4_gemm(x[:, :1024], small.packed, small.scales, None, None, 128, 1024)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = triton_gemm.int4_gemm(x, long.packed, long.scales, None, None, 128, 2304)
        graph.replay()
    torch.cuda.synchronize()
    assert_close(y, int4_gemm_ref(x, long))


def check_graph_of(chain, x):
    """A graph of chain(x, wait) gives what its kernels give one at a time, `wait` being called after each. x changes
    from replay to replay, so that a stale read shows."""
    chain(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain(x)
    for _ in range(50):
        x.normal_()
        graph.replay()
        assert torch.equal(out, chain(x.clone(), torch.cuda.synchronize))


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [(2048, 2048), (4096, 4096), (2048, 8192), (2048, 4096, 3072)], ids=str)
def test_each_kernel_of_a_chain_waits_for_the_one_before(sizes):
    """Dependent launch: in a graph of GEMMs that feed each other, none may read x before it is written. From 4096 on
    they are clusters on Hopper."""
    sizes = (sizes * 8)[:9]
    weights = [quantize(torch.randn(n, k, device="cuda") / k**0.5, 128) for k, n in zip(sizes, sizes[1:], strict=False)]
    x = torch.zeros(1, sizes[0], device="cuda", dtype=torch.bfloat16)

    def chain(y, wait=lambda: None):
        for w in weights:
            y = triton_gemm.int4_gemm(y, w.packed, w.scales, None, None, 128, w.shape[0])
            wait()
        return y

    check_graph_of(chain, x)


CLUSTERS = [  # n, k, group_size, zeros, m; at 9 rows and more some take too many registers
    (*shape, zeros, m)
    for shape in [
        *[(4096, 4096, 128), (4096, 4096, 32), (2048, 8192, 128), (2048, 6144, 64), (3072, 3072, 128)],
        *[(1536, 8960, 128), (2880, 2880, 32), (512, 2880, 32), (1000, 4864, 128), (33, 4064, 32), (5120, 5120, 128)],
        *[(6144, 2560, 128), (3584, 3584, 32), (3072, 3072, 32), (4096, 4096, 64)],
    ]
    for zeros in Zeros
    for m in (1, 3, 8, 9, 16)
    if int4_config.pick_decode_config(m, *shape, zeros, H100).cluster
]


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k", "group_size", "zeros", "m"), CLUSTERS, ids=str)
def test_a_cluster_gives_the_bits_that_memory_gives(n, k, group_size, zeros, m, poisoned):
    """The sum over splits in shared memory and in L2; and the oracle."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("clusters are for Hopper")
    config = int4_config.pick_decode_config(m, n, k, group_size, zeros, H100)
    y, oracle = run(m, n, k, group_size, zeros, torch.bfloat16, "cuda")
    assert_close(y, oracle)
    weight = quantized(torch.randn(n, k, device="cuda"), group_size, zeros)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    args = x, weight.packed, weight.scales, weight.zeros, None, group_size, n
    y = triton_gemm.int4_gemm(*args, config)
    assert torch.equal(y, triton_gemm.int4_gemm(*args, dataclasses.replace(config, cluster=False)))
    assert all(torch.equal(y, triton_gemm.int4_gemm(*args, config)) for _ in range(100))


@pytest.mark.gpu
@pytest.mark.parametrize("zeros", [Zeros.NONE, Zeros.REAL], ids=lambda z: z.value)
@pytest.mark.parametrize(
    ("n", "k", "block"),
    [(100, 2496, (1, 2, 8, 3)), (100, 7040, (1, 1, 16, 7)), (100, 2048, (4, 2, 1, 8)), (16, 640, (2, 1, 4, 3))],
    ids=str,
)
def test_clusters_that_only_a_table_has(n, k, block, zeros, poisoned):
    """Fewer elements than threads, of which several send one; on two streams at once."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("clusters are for Hopper")
    config = DecodeConfig(*block[:3], 2, 128, block[3], cluster=True)
    weight = quantized(torch.randn(n, k, device="cuda"), 64, zeros)
    parts = weight.packed, weight.scales, weight.zeros, torch.randn(n, device="cuda").bfloat16(), 64, n
    for m in (1, 9):
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        y = triton_gemm.int4_gemm(x, *parts, config)
        assert_close(y, int4_gemm_ref(x, weight, parts[3]))
        assert torch.equal(y, triton_gemm.int4_gemm(x, *parts, dataclasses.replace(config, cluster=False)))
        torch.cuda.synchronize()
        streams, found = [torch.cuda.Stream() for _ in range(2)], []
        for i in range(100):
            with torch.cuda.stream(streams[i % 2]):
                found.append(triton_gemm.int4_gemm(x, *parts, config))
        torch.cuda.synchronize()
        assert all(torch.equal(y, other) for other in found)


@pytest.mark.gpu
def test_a_cluster_is_one_in_front_of_a_launch_hook_too():
    """A profiler's hook has each launch go by Triton, which is told of the cluster as well."""
    from triton import knobs

    weight = quantize(torch.randn(2048, 8192, device="cuda"), 128)
    x = torch.randn(4, 8192, device="cuda", dtype=torch.bfloat16)
    args = x, weight.packed, weight.scales, None, None, 128, 2048
    y, names = triton_gemm.int4_gemm(*args), []
    hook = lambda metadata: names.append(metadata.get()["name"])  # noqa: E731
    knobs.runtime.launch_enter_hook.add(hook)
    try:
        watched = triton_gemm.int4_gemm(*args)
    finally:
        knobs.runtime.launch_enter_hook.remove(hook)
    assert names == ["_int4_decode_kernel"] and torch.equal(y, watched)


@pytest.mark.gpu
def test_dependent_launch_around_the_cooperative_ffn():
    """norm -> GEMM -> FFN -> norm -> ..., in a graph and one at a time: the FFN lets the next kernel start early."""
    from tiny_gemm import ops

    w = quantize(torch.randn(2048, 2048, device="cuda") / 45, 128)
    up, gate = (quantize(torch.randn(4096, 2048, device="cuda") / 45, 128) for _ in range(2))
    down = quantize(torch.randn(2048, 4096, device="cuda") / 64, 128)
    ones = torch.ones(2048, device="cuda")
    x = torch.zeros(2, 2048, device="cuda", dtype=torch.bfloat16)

    def chain(y, wait=lambda: None):
        residual = y.float()
        for _ in range(4):
            y = ops.int4_gemm(y, w)
            wait()
            y, residual = ops.rms_norm(y, ones, residual)
            wait()
            y = ops.int4_ffn(y, up, None, down, None, gate, activation="silu")
            wait()
            y, residual = ops.rms_norm(y, ones, residual)
            wait()
        return y

    check_graph_of(chain, x)
