"""The INT4 product in Gluon: as compiled for Hopper, and on it. The interpreter knows no Gluon, and no other chip takes
it: what the interpreter runs is `_int4_prefill_kernel`, whose bits these are."""

import dataclasses
import re

import aot
import pytest
import torch
from conftest import assert_close
from int4_weights import every_kind_of_zeros, quantized
from test_int4_config import H100
from test_triton_gemm import compile_planned, steps_of_products

from tiny_gemm import int4_config, triton_gemm
from tiny_gemm.device import counters, device_facts
from tiny_gemm.int4_config import HOPPER_BLOCKS, HopperConfig, Zeros
from tiny_gemm.quantize_utils import dequantize
from tiny_gemm.reference import int4_gemm_ref

pytestmark = pytest.mark.skipif(not int4_config.IN_GLUON, reason="the kernel in Gluon was written for Triton 3.6")

blocks = pytest.mark.parametrize("block", HOPPER_BLOCKS, ids=lambda b: f"{b.block_n}x{b.block_m}")


@pytest.mark.aot
@pytest.mark.parametrize(
    ("group_size", "scales", "zeros", "dtype", "splits", "n"),
    [
        (128, "*fp16", None, "bf16", 1, 4096),
        (128, "*bf16", None, "bf16", 4, 4096),
        (128, "*fp16", "*i16", "bf16", 2, 4096),
        (128, "*fp16", "*fp32", "fp16", 1, 4096),
        (64, "*fp32", None, "fp16", 1, 4096),
        (32, "*fp16", None, "bf16", 1, 4097),
        (32, "*fp16", "*i16", "fp16", 8, 4096),
        (32, "*fp16", "*fp16", "bf16", 1, 4096),
        (32, "*fp32", "*fp32", "bf16", 4, 4097),
        (-1, "*fp16", None, "bf16", 2, 4096),
        (-1, "*fp16", "*fp32", "fp16", 1, 4096),
    ],
    ids=str,
)
@blocks
def test_the_tensor_core_waits_once_a_step(block, group_size, scales, zeros, dtype, splits, n):
    """All products of a step are under way before any is waited for, with weights unpacked between them."""
    of_zeros = {None: None, "*i16": torch.int16}.get(zeros, torch.float32)
    kind = triton_gemm.kind_of_zeros(of_zeros, group_size)
    config = dataclasses.replace(block, splits=splits)
    launch = triton_gemm.plan(512, n, 4096, group_size, kind, aot.device_facts("sm_90"), config)
    compiled = compile_planned(launch, "sm_90", n, 4096, scales, zeros, dtype, {"bias_ptr": "*bf16"})
    aot.check(compiled, may_spill=splits > 1)
    assert compiled.spills <= 40, "where the last block adds up the sums of others"
    steps = steps_of_products(compiled)
    assert len(steps) == 2, "of each part that multiplies"
    for step in steps:
        products = [i for i, line in enumerate(step) if " HGMMA" in line]
        waits = [i for i, line in enumerate(step) if "WARPGROUP.DEPBAR" in line]
        assert len(products) == block.block_n // 128 * 8, "half a unit is four products, for each 64 rows of a part"
        assert len(waits) == 1 and waits[0] > products[-1]
        unpacking = [i for i, line in enumerate(step) if re.search(r" (HFMA2|FFMA)\b", line)]
        assert unpacking and sum(products[0] < i < products[-1] for i in unpacking) >= len(unpacking) / 4
        shared = [
            line for line in step if re.search(r" (SHFL|STS|LDS)\b", line) and "@!PT" not in line
        ]  # those: a fence
        assert not shared, "weights and scales stay in a thread's registers"
        assert not any(re.search(r" (LDL|STL)\b", line) for line in step)


def test_both_kinds_of_parts_fit_a_block():
    """Registers are handed from those that fetch to those that multiply: no more than the block began with."""
    from tiny_gemm import gluon_gemm

    threads = 32 * gluon_gemm.WARPS.value
    multiplying = gluon_gemm.MULTIPLIERS.value * gluon_gemm.MULTIPLIERS_REGISTERS.value
    assert multiplying + gluon_gemm.FETCHERS_REGISTERS.value <= 3 * gluon_gemm.REGISTERS
    assert 3 * threads * gluon_gemm.REGISTERS <= 65536


def multiply(x, weight, config=None, bias=None):
    parts = weight.packed, weight.scales, weight.zeros, bias, weight.group_size, weight.shape[0]
    return triton_gemm.int4_gemm(x, *parts, config)


@pytest.mark.gpu
@every_kind_of_zeros
@pytest.mark.parametrize(
    ("dtype", "scale_dtype", "group_size", "cuts"),
    [
        (torch.bfloat16, torch.float16, 128, (1, 1, 4, 4)),
        (torch.bfloat16, torch.float16, 32, (4, 4, 1, 1)),
        (torch.bfloat16, torch.bfloat16, 64, (2, 1, 1, 2)),
        (torch.float16, torch.float32, 128, (1, 2, 2, 1)),
        (torch.float16, torch.float16, -1, (2, 1, 2, 1)),
    ],
    ids=lambda v: str(v).removeprefix("torch."),
)
def test_bits_are_those_of_the_kernel_in_triton(dtype, scale_dtype, group_size, cuts, zeros, poisoned, hopper):
    """Of each block, with all of K and with parts of it; the last block of x and of W is not whole."""
    n, k, m = 1064, 1920, 200
    weight = quantized(torch.randn(n, k, device="cuda"), group_size, zeros, scale_dtype=scale_dtype)
    x, bias = torch.randn(m, k, device="cuda", dtype=dtype), torch.randn(n, device="cuda", dtype=dtype)
    oracle = int4_gemm_ref(x, weight, bias)
    for block, splits in zip(HOPPER_BLOCKS, cuts, strict=True):
        config = dataclasses.replace(block, splits=splits)
        y = multiply(x, weight, config, bias)
        assert_close(y, oracle)
        assert torch.equal(y, multiply(x, weight, dataclasses.replace(int4_config.TALL, splits=splits), bias)), config


@pytest.mark.gpu
@blocks
@pytest.mark.parametrize(
    ("m", "n", "k", "splits"),
    [(1, 16, 128, 1), (33, 17, 128, 1), (64, 2000, 640, 1), (65, 100, 1152, 8), (300, 4097, 512, 2), (129, 300, 256, 1)]
    + [(128, 128, 896, 4)],
    ids=str,
)
def test_few_units_and_ragged_ends(block, m, n, k, splits, poisoned, hopper):
    """Fewer units than stages, splits without one, rows past M and N; x is a view of a wider matrix."""
    weight = quantized(torch.randn(n, k, device="cuda"), 32, Zeros.INTEGER)
    x = torch.full((m, k + 48), float("nan"), device="cuda", dtype=torch.bfloat16)
    x[:, 32 : k + 32] = torch.randn(m, k, device="cuda")
    y = multiply(x[:, 32 : k + 32], weight, dataclasses.replace(block, splits=splits))
    assert_close(y, int4_gemm_ref(x[:, 32 : k + 32], weight))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "n", "k", "zeros", "group_size"),
    [(512, 28672, 4096, Zeros.NONE, 128), (128, 4096, 14336, Zeros.INTEGER, 32), (250, 4096, 4096, Zeros.REAL, 128)],
    ids=str,
)
def test_exact_and_the_same_each_time(m, n, k, zeros, group_size, poisoned, hopper):
    """As exact as the product with weights that were dequantized, and the same bits in 300 launches, of which 100 run
    beside those of another stream."""
    facts = device_facts(torch.device("cuda", 0))
    config = int4_config.pick_config(m, n, k, group_size, zeros, facts)
    assert isinstance(config, HopperConfig)
    weight = quantized(torch.randn(n, k, device="cuda"), group_size, zeros)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    y, oracle = multiply(x, weight, None), int4_gemm_ref(x, weight)
    error = lambda y: ((y.double() - oracle).norm() / oracle.norm()).item()  # noqa: E731
    assert error(y) <= 1.01 * error(x @ dequantize(weight, torch.bfloat16).T)
    assert all(torch.equal(multiply(x, weight, None), y) for _ in range(200))
    streams, ys = [torch.cuda.Stream() for _ in range(2)], []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for i in range(100):
        with torch.cuda.stream(streams[i % 2]):
            ys.append(multiply(x, weight, None))
    torch.cuda.synchronize()
    assert all(torch.equal(other, y) for other in ys)
    for stream in [torch.cuda.current_stream(), *streams]:
        with torch.cuda.stream(stream):
            assert not counters(x.device, 1, "int4_gemm").any(), "arrivals are at zero again"


@pytest.mark.gpu
def test_a_split_without_work_does_not_write_early(poisoned, hopper):
    """42 units in 8 splits of 6: one has none, and nothing to wait for. Two products share sums and counters, and the
    second one's blocks may start while the first one's multiply."""
    weights = [quantized(torch.randn(2048, 5376, device="cuda"), 128, Zeros.NONE) for _ in range(2)]
    x = torch.randn(64, 5376, device="cuda", dtype=torch.bfloat16)
    config = HopperConfig(128, 64, 8, 4, 6)
    expected = [int4_gemm_ref(x, weight) for weight in weights]
    ys = [multiply(x, weights[i % 2], config) for i in range(400)]
    for i in range(2):
        assert_close(ys[i], expected[i])
        assert all(torch.equal(y, ys[i]) for y in ys[i::2])


@pytest.mark.gpu
def test_rows_of_x_that_lie_far_apart(poisoned, hopper):
    """Offsets within a block are of 32 bits: rows further apart are copied."""
    stride, m, k = 2**24 + 16, 130, 256
    weight = quantized(torch.randn(200, k, device="cuda"), 128, Zeros.NONE)
    x = torch.zeros(m * stride, device="cuda", dtype=torch.bfloat16).as_strided((m, k), (stride, 1))
    x.copy_(torch.randn(m, k, device="cuda"))
    assert_close(multiply(x, weight, HopperConfig(256, 128, 1, 4, 4)), int4_gemm_ref(x, weight))


def test_columns_that_128_does_not_divide_are_refused():
    with pytest.raises(ValueError, match="K=576 must be a multiple of 128"):
        triton_gemm.plan(100, 64, 576, 64, Zeros.NONE, H100, HopperConfig(256, 128, 1, 4, 4))


@pytest.mark.gpu
def test_in_a_graph(poisoned, hopper):
    weight = quantized(torch.randn(2048, 4096, device="cuda"), 128, Zeros.NONE)
    x = torch.randn(200, 4096, device="cuda", dtype=torch.bfloat16)
    config = int4_config.pick_config(200, 2048, 4096, 128, Zeros.NONE, device_facts(x.device))
    assert isinstance(config, HopperConfig) and config.splits > 1
    expected = multiply(x, weight, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ys = [multiply(x, weight, None) for _ in range(8)]
    for _ in range(20):
        for y in ys:
            y.zero_()
        graph.replay()
        assert all(torch.equal(y, expected) for y in ys)


def test_blocks_in_gluon_are_chosen_by_the_time_they_take():
    """Of the sweep in docs/notes/int4-gemm.md: what was fastest, or within 3 % of it."""
    for m, n, k, group_size, zeros, block_n, block_m, splits in (
        (64, 16384, 2048, 128, Zeros.NONE, 128, 64, 1),
        (64, 28672, 4096, 128, Zeros.NONE, 256, 64, 1),
        (64, 2048, 8192, 128, Zeros.NONE, 128, 64, 8),
        (128, 28672, 4096, 128, Zeros.NONE, 256, 128, 1),
        (128, 28672, 4096, 32, Zeros.REAL, 256, 128, 1),
        (128, 4096, 14336, 128, Zeros.INTEGER, 128, 128, 4),
        (256, 4096, 4096, 128, Zeros.REAL, 128, 128, 2),
        (512, 4096, 4096, 128, Zeros.NONE, 128, 128, 1),
        (512, 6144, 4096, 128, Zeros.NONE, 256, 128, 1),
        (1024, 4096, 14336, 128, Zeros.NONE, 256, 128, 1),
    ):
        config = int4_config.pick_config(m, n, k, group_size, zeros, H100)
        assert type(config) is HopperConfig
        assert (config.block_n, config.block_m, config.splits) == (block_n, block_m, splits)
        assert not int4_config.dequantizes(m, n, k, group_size, zeros, H100)
