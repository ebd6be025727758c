"""Which blocks the INT4 GEMM takes: rules that hold for every shape and chip, and tables that a sweep has written."""

import itertools
import json
import math
from dataclasses import replace

import aot
import pytest
from int4_weights import every_kind_of_zeros

from tiny_gemm import int4_config
from tiny_gemm.device import DeviceFacts
from tiny_gemm.int4_config import (
    FEW_WARPS,
    HALF,
    TALL,
    DecodeConfig,
    HopperConfig,
    PrefillConfig,
    SplitConfig,
    StreamConfig,
    Zeros,
    dequantizes,
    groups_a_unit,
    pick_config,
    pick_decode_config,
    read_table,
    registers_needed,
    stage_bytes,
)
from tiny_gemm.quantize_utils import unit_k

H100 = DeviceFacts("NVIDIA H100", (9, 0), 132, 227 * 1024, is_nvidia=True)
SMALL_CHIP = DeviceFacts("RTX 4060", (8, 9), 24, 99 * 1024, is_nvidia=True)
AMD_CHIP = aot.device_facts("gfx942")
MI250X = DeviceFacts("AMD Instinct MI250X", (9, 0), 104, 64 * 1024, is_nvidia=False)  # gfx90a: not Hopper


@pytest.fixture(params=[True, False], ids=["gluon", "triton"])
def in_gluon(request, monkeypatch):
    """Whether there is a kernel in Gluon, as with Triton 3.6, or none."""
    monkeypatch.setattr(int4_config, "IN_GLUON", request.param)
    dequantizes.cache_clear()
    yield request.param
    dequantizes.cache_clear()


@pytest.mark.parametrize("facts", [H100, SMALL_CHIP, AMD_CHIP], ids=lambda f: f.name)
@pytest.mark.parametrize("n", [192, 896, 4096, 28672, 128256])
@pytest.mark.parametrize("k", [576, 2048, 4864, 14336])
def test_pick_config_sums_in_one_order(n, k, facts, in_gluon):
    for group_size in (32, 64, 128, -1) if k % 128 == 0 else (32, 64, -1):
        for zeros in Zeros:
            configs = [pick_config(m, n, k, group_size, zeros, facts) for m in (1, 2, 4, 8, 9, 16)]
            cuts = {c.cut if isinstance(c, (DecodeConfig, StreamConfig)) else c.splits for c in configs}
            assert len(cuts) == 1  # how K is cut must not depend on the batch


@pytest.mark.parametrize("facts", [H100, SMALL_CHIP, AMD_CHIP], ids=lambda f: f.name)
@pytest.mark.parametrize("gated", [False, True], ids=["single", "gated"])
@every_kind_of_zeros
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("in_gluon", [False], indirect=True)
def test_decode_blocks_keep_the_rules(group_size, zeros, gated, facts, in_gluon):
    """What the kernel asserts, and what the chip has; for shapes on either side of every limit."""
    for k in (64, 576, 1024, 1536, 2048, 2880, 3072, 4096, 7392, 8192, 14336):
        unit = unit_k(k)
        if k % 128 and group_size == 128:
            continue
        for tiles in (1, 23, 24, 25, 48, 72, 73, 131, 132, 198, 199, 264, 265, 396, 397, 528, 530, 1792):
            rows = (1, 2, 8, 9, 16)
            configs = [pick_decode_config(m, 16 * tiles, k, group_size, zeros, facts, gated=gated) for m in rows]
            assert len({c.cut for c in configs}) == 1
            for m, c in zip(rows, configs, strict=True):
                blocks_per_sm = math.ceil(tiles / c.row_tiles) * c.splits / facts.sm_count
                if c.cluster:
                    assert c.is_one_step(-(-k // unit)) and 1 < c.splits <= 8
                    assert blocks_per_sm < 0.8 * (2048 // (c.warps * c.max_registers)), "clusters find room"
                if facts.is_nvidia and c.max_registers < 255:
                    needed = registers_needed(
                        c.row_tiles, c.warp_units, 1 if m <= 8 else 2, groups_a_unit(group_size, k), zeros, gated
                    )
                    assert needed - c.max_registers <= (72 if m <= 8 else 127), "few registers are moved to memory"
                assert c.warps * c.warp_units * unit >= 2 * group_size and not (gated and c.splits > 1)
                if facts.is_nvidia:
                    stage = stage_bytes(unit, group_size, zeros, gated) * c.warps * c.warp_units * c.row_tiles
                    in_a_ring = c.row_tiles > 1 and not c.is_one_step(-(-k // unit))
                    if zeros is Zeros.INTEGER and in_a_ring and c.warp_units == 1 and group_size in (-1, unit):
                        stage *= 2
                    assert stage <= facts.shared_memory_bytes and c.max_registers * c.warps * 32 <= 2**16


@pytest.mark.parametrize(
    ("n", "k", "group_size", "zeros", "gated", "at_1", "at_8", "at_16"),
    [
        (16384, 2048, 128, Zeros.NONE, False, (1, 1, 4, 64, 1), (2, 1, 4, 96, 1), (2, 1, 4, 128, 1)),
        (16384, 2048, 128, Zeros.INTEGER, False, (2, 1, 4, 96, 1), (2, 1, 4, 96, 1), (2, 1, 4, 128, 1)),
        (8192, 2048, 128, Zeros.NONE, False, (2, 2, 4, 128, 1), (2, 2, 4, 128, 1), (4, 2, 4, 248, 1)),
        (6144, 4096, 128, Zeros.NONE, False, (2, 2, 8, 128, 1), (2, 2, 8, 128, 1), (2, 2, 8, 128, 1)),
        (6144, 4096, 32, Zeros.NONE, False, (1, 1, 8, 80, 1), (1, 1, 8, 80, 1), (2, 1, 8, 128, 1)),
        (2048, 8192, 32, Zeros.REAL, False, (4, 2, 4, 168, 8, True), (4, 2, 4, 168, 8, True), (4, 2, 4, 255, 8)),
        (2048, 6144, 32, Zeros.REAL, False, (2, 2, 4, 128, 6, True), (2, 2, 4, 128, 6, True), (2, 2, 4, 168, 6)),
        (9216, 3072, 128, Zeros.NONE, False, (1, 2, 4, 96, 1), (1, 2, 4, 96, 1), (2, 2, 4, 168, 1)),
        (9216, 3072, 32, Zeros.NONE, False, (1, 2, 4, 96, 1), (1, 2, 4, 96, 1), (2, 2, 4, 168, 1)),
        (9216, 3072, 32, Zeros.REAL, False, (1, 2, 4, 96, 1), (1, 2, 4, 96, 1), (2, 2, 4, 168, 1)),
        (28672, 4096, 32, Zeros.NONE, False, (2, 1, 4, 128, 1), (2, 1, 4, 128, 1), (2, 1, 4, 128, 1)),
        (6144, 4096, 32, Zeros.REAL, False, (1, 2, 4, 168, 1), (1, 2, 4, 168, 1), (2, 2, 4, 208, 1)),
        (4608, 3584, 32, Zeros.INTEGER, False, (4, 1, 4, 96, 7, True), (4, 1, 4, 96, 7, True), (4, 1, 4, 128, 7)),
        (4608, 3584, 32, Zeros.REAL, False, (4, 1, 4, 128, 7), (4, 1, 4, 128, 7), (2, 1, 4, 128, 7)),
        (4096, 4096, 32, Zeros.REAL, False, (4, 2, 4, 168, 4, True), (4, 2, 4, 168, 4, True), (4, 2, 4, 255, 4)),
        (2304, 9216, 32, Zeros.REAL, False, (2, 2, 4, 168, 5), (2, 2, 4, 168, 5), (2, 2, 4, 168, 5)),
        (2560, 9728, 32, Zeros.REAL, False, (1, 1, 4, 96, 4), (1, 1, 4, 96, 4), (2, 1, 4, 168, 4)),
        (4096, 14336, 128, Zeros.NONE, False, (2, 2, 4, 128, 4), (2, 2, 4, 128, 4), (4, 2, 4, 248, 4)),
        (4096, 14336, 32, Zeros.NONE, False, (2, 1, 4, 128, 4), (2, 1, 4, 128, 4), (2, 1, 4, 128, 4)),
        (2560, 9728, 128, Zeros.NONE, False, (2, 2, 4, 128, 5), (2, 2, 4, 128, 5), (2, 2, 4, 128, 5)),
        (2304, 9216, 128, Zeros.NONE, False, (2, 2, 4, 128, 5), (2, 2, 4, 128, 5), (2, 2, 4, 168, 5)),
        (3584, 18944, 32, Zeros.NONE, False, (1, 1, 4, 72, 4), (1, 1, 4, 72, 4), (2, 1, 4, 128, 4)),
        (1536, 8960, 32, Zeros.NONE, False, (2, 2, 8, 80, 5, True), (2, 2, 8, 80, 5, True), (2, 2, 8, 128, 5)),
        (1536, 8960, 128, Zeros.INTEGER, False, (2, 2, 8, 128, 5), (2, 2, 8, 128, 5), (2, 2, 8, 128, 5)),
        (2304, 9216, 32, Zeros.NONE, False, (2, 2, 4, 168, 5), (2, 2, 4, 168, 5), (2, 2, 4, 168, 5)),
        (2048, 10944, 32, Zeros.NONE, False, (2, 2, 4, 128, 8), (2, 2, 4, 128, 8), (4, 2, 4, 255, 8)),
        (2048, 10944, 32, Zeros.INTEGER, False, (2, 2, 4, 128, 8), (2, 2, 4, 128, 8), (4, 2, 4, 255, 8)),
        (49152, 576, 32, Zeros.NONE, False, (4, 1, 4, 168, 1), (4, 1, 4, 168, 1), (4, 1, 4, 255, 1)),
        (49152, 960, 32, Zeros.NONE, False, (2, 2, 8, 128, 1), (2, 2, 8, 128, 1), (2, 2, 8, 184, 1)),
        (8192, 2048, 128, Zeros.NONE, True, (1, 2, 4, 128, 1), (1, 2, 4, 128, 1), (2, 2, 4, 232, 1)),
        (18944, 3584, 128, Zeros.NONE, True, (1, 1, 4, 96, 1), (1, 1, 4, 96, 1), (1, 1, 4, 96, 1)),
        (12288, 4096, 128, Zeros.NONE, True, (1, 1, 4, 80, 1), (1, 1, 4, 80, 1), (2, 1, 4, 168, 1)),
        (12288, 4096, 128, Zeros.INTEGER, True, (1, 2, 4, 128, 1), (1, 2, 4, 128, 1), (1, 2, 4, 168, 1)),
        (18944, 3584, 128, Zeros.REAL, True, (1, 1, 4, 96, 1), (1, 1, 4, 96, 1), (1, 1, 4, 144, 1)),
        (18944, 3584, 32, Zeros.REAL, True, (1, 1, 4, 128, 1), (1, 1, 4, 128, 1), (1, 1, 4, 168, 1)),
        (14336, 4096, 128, Zeros.NONE, True, (2, 1, 4, 128, 1), (2, 1, 4, 128, 1), (1, 1, 4, 128, 1)),
        (14336, 4096, 32, Zeros.NONE, True, (2, 1, 4, 128, 1), (2, 1, 4, 128, 1), (1, 1, 4, 128, 1)),
        (12288, 4096, 32, Zeros.NONE, True, (2, 1, 4, 168, 1), (2, 1, 4, 168, 1), (1, 1, 4, 168, 1)),
        (12288, 4096, 32, Zeros.INTEGER, True, (2, 1, 4, 168, 1), (2, 1, 4, 168, 1), (1, 1, 4, 168, 1)),
        (12288, 4096, 32, Zeros.REAL, True, (2, 1, 4, 168, 1), (2, 1, 4, 168, 1), (1, 1, 4, 168, 1)),
        (8960, 1536, 32, Zeros.NONE, True, (1, 1, 4, 96, 1), (1, 1, 4, 96, 1), (1, 1, 4, 168, 1)),
        (8960, 1536, 32, Zeros.REAL, True, (1, 1, 4, 96, 1), (1, 1, 4, 96, 1), (1, 1, 4, 168, 1)),
        # clusters
        (4096, 4096, 128, Zeros.NONE, False, (4, 2, 4, 168, 4, True), (4, 2, 4, 168, 4, True), (4, 2, 4, 168, 4, True)),
        (4096, 4096, 32, Zeros.NONE, False, (2, 2, 8, 80, 2, True), (2, 2, 8, 80, 2, True), (2, 2, 8, 128, 2)),
        (2048, 8192, 128, Zeros.NONE, False, (4, 2, 4, 168, 8, True), (4, 2, 4, 168, 8, True), (4, 2, 4, 168, 8, True)),
        (2048, 8192, 32, Zeros.NONE, False, (2, 2, 8, 80, 4, True), (2, 2, 8, 80, 4, True), (2, 2, 8, 128, 4)),
        (2048, 6144, 128, Zeros.NONE, False, (2, 2, 4, 128, 6, True), (2, 2, 4, 128, 6, True), (2, 2, 4, 128, 6, True)),
        (3072, 3072, 128, Zeros.NONE, False, (2, 2, 4, 128, 3, True), (2, 2, 4, 128, 3, True), (2, 2, 4, 168, 3, True)),
        (6144, 2560, 128, Zeros.NONE, False, (4, 1, 4, 96, 5, True), (4, 1, 4, 96, 5, True), (4, 1, 4, 128, 5)),
        (3584, 3584, 32, Zeros.NONE, False, (4, 1, 4, 128, 7, True), (4, 1, 4, 128, 7, True), (4, 1, 4, 168, 7)),
        (2048, 8192, 32, Zeros.INTEGER, False, (2, 2, 4, 96, 8, True), (2, 2, 4, 96, 8, True), (4, 2, 4, 255, 8)),
        (3072, 3072, 32, Zeros.REAL, False, (2, 2, 4, 152, 3, True), (2, 2, 4, 152, 3, True), (2, 2, 4, 168, 3, True)),
        (5120, 5120, 128, Zeros.NONE, False, (4, 2, 4, 128, 5, True), (4, 2, 4, 128, 5, True), (4, 2, 4, 248, 5)),
        (1536, 8960, 128, Zeros.NONE, False, (2, 2, 8, 80, 5, True), (2, 2, 8, 80, 5, True), (2, 2, 8, 128, 5)),
        (896, 4864, 128, Zeros.NONE, False, (2, 2, 4, 128, 5, True), (2, 2, 4, 128, 5, True), (2, 2, 4, 184, 5, True)),
        (512, 2880, 32, Zeros.NONE, False, (1, 2, 4, 104, 6, True), (1, 2, 4, 104, 6, True), (1, 2, 4, 152, 6, True)),
        (2880, 2880, 32, Zeros.NONE, False, (4, 2, 4, 168, 6, True), (4, 2, 4, 168, 6, True), (4, 2, 4, 168, 6, True)),
        (2880, 2880, 32, Zeros.REAL, False, (4, 2, 4, 168, 6, True), (4, 2, 4, 168, 6, True), (4, 2, 4, 168, 6, True)),
    ],
    ids=str,
)
@pytest.mark.parametrize("in_gluon", [False], indirect=True)
def test_decode_blocks_that_were_fastest(n, k, group_size, zeros, gated, at_1, at_8, at_16, in_gluon):
    """Of the sweeps in docs/notes/int4-gemm.md: (row_tiles, warp_units, warps, max_registers, splits, cluster). Among
    kernels in Triton."""
    for m, expected in ((1, at_1), (8, at_8), (16, at_16)):
        row_tiles, warp_units, warps, registers, *splits = expected
        c = pick_decode_config(m, n, k, group_size, zeros, H100, gated=gated)
        assert c == DecodeConfig(row_tiles, warp_units, warps, 2, registers, *splits)
        assert not pick_decode_config(m, n, k, group_size, zeros, SMALL_CHIP, gated=gated).cluster


@pytest.mark.parametrize(
    ("n", "k", "gated", "group_size", "config"),
    [
        (28672, 4096, False, 128, (16,)),
        (28672, 4096, False, 32, (16,)),
        (14336, 4096, False, 128, (16,)),
        (14336, 4096, True, 32, (16,)),
        (6144, 4096, True, 128, (16,)),
        (18944, 3584, True, 64, (16,)),
        (128256, 4096, False, 128, (8, 2)),
        (152064, 3584, False, 32, (8, 2)),
        (151936, 2048, False, 128, (8,)),
        (8192, 2048, True, 128, (8,)),
        (11008, 2048, True, 32, (8,)),
        (11008, 4096, False, 128, (16,)),
        (9728, 4096, False, 32, (16,)),
        (6144, 4096, False, 128, None),  # too few tiles
        (8192, 2048, True, 32, None),
        (16384, 2048, False, 128, None),
        (8192, 3072, True, 128, None),  # a quarter of the warps without work
        (28672, 4096, False, -1, None),
        (32768, 4224, False, 128, None),  # K is no multiple of 256
        (28672, 8192, False, 128, (16, 2)),
        (28672, 8192, True, 32, (16, 2)),
        (18432, 7168, True, 128, (16, 2)),
        (4096, 8192, False, 128, (16, 2)),
        (3072, 8192, False, 128, None),
        (24576, 6144, True, 128, None),  # a quarter of the warps without work
        (4096, 12288, False, 128, (16, 3)),
        (4096, 11008, False, 128, None),  # the last of its steps would be half empty
        (4096, 14336, False, 128, (16, 4)),
        (5120, 17408, False, 128, (16, 5)),
        (8192, 28672, False, 128, (16, 8)),
        (16384, 53248, False, 128, None),  # thirteen blocks
        (2**20, 4096, False, 128, None),  # more bytes than its offsets reach
    ],
    ids=str,
)
def test_weights_that_stream_through_one_block_an_sm(n, k, gated, group_size, config, in_gluon):
    """On Hopper, whatever the zeros and the batch."""
    for zeros, m in itertools.product(Zeros, (1, 8, 9, 16)):
        expected = StreamConfig(*config) if config and in_gluon else None
        for facts in (H100, SMALL_CHIP, AMD_CHIP, MI250X):
            c = pick_decode_config(m, n, k, group_size, zeros, facts, gated=gated)
            assert (c if isinstance(c, StreamConfig) else None) == (expected if facts is H100 else None)
        if not gated:
            c = pick_config(m, n, k, group_size, zeros, H100)
            assert (c if isinstance(c, StreamConfig) else None) == expected
    assert not isinstance(pick_config(17, n, k, group_size, Zeros.NONE, H100), StreamConfig)


def test_what_a_chip_has_no_room_for_is_not_chosen(monkeypatch):
    """And in small groups with real zeros some clusters are slower."""
    monkeypatch.setattr(int4_config, "IN_GLUON", True)
    assert pick_config(1, 4096, 14336, 32, Zeros.INTEGER, H100) == StreamConfig(16, cluster=4)
    assert isinstance(pick_config(1, 4096, 14336, 32, Zeros.REAL, H100), DecodeConfig)
    assert isinstance(pick_config(1, 4096, 8192, 64, Zeros.REAL, H100), DecodeConfig)
    assert pick_config(1, 8192, 8192, 64, Zeros.REAL, H100) == StreamConfig(16, cluster=2)
    part = replace(H100, cluster_room=(132, 66, 0, 0, 0, 0, 0, 0))
    assert isinstance(pick_config(1, 28672, 8192, 128, Zeros.NONE, replace(part, cluster_room=(132, 0))), DecodeConfig)
    assert isinstance(pick_config(1, 4096, 14336, 32, Zeros.INTEGER, part), DecodeConfig)


@pytest.mark.parametrize("facts", [H100, SMALL_CHIP, AMD_CHIP, MI250X], ids=lambda f: f.name)
@every_kind_of_zeros
def test_blocks_of_many_rows_keep_the_rules(zeros, facts, in_gluon):
    """Sums fit the registers, every split has work, and what splits K fits the chip at once."""
    for k in (100, 576, 2048, 4096, 5376, 14336):
        for n in (17, 1536, 4096, 28672, 128256):
            for m, group_size in itertools.product((17, 33, 64, 65, 128, 129, 256, 300, 512, 4096), (32, 64, 128, -1)):
                c = pick_config(m, n, k, group_size if group_size <= unit_k(k) else 32, zeros, facts)
                multiplying = 2 * c.num_warps if isinstance(c, HopperConfig) else c.num_warps
                has_all = isinstance(c, HopperConfig) or (isinstance(c, PrefillConfig) and c.max_registers == 255)
                assert c.block_n * c.block_m / (32 * multiplying) <= (128 if has_all else 64), "sums of a thread"
                assert c.block_m < 2 * max(m, 32)
                blocks = -(-n // c.block_n) * -(-m // c.block_m)
                if c.splits > 1:
                    units = -(-k // unit_k(k))
                    assert units >= 4 * c.splits and blocks * c.splits <= 4 * facts.sm_count
                    assert not isinstance(c, HopperConfig) or (c.splits - 1) * -(-units // c.splits) < units
                if isinstance(c, (HopperConfig, PrefillConfig)):
                    assert facts is H100 and m > (32 if isinstance(c, HopperConfig) else 64)
                    assert isinstance(c, HopperConfig) == (in_gluon and k % 128 == 0)


@pytest.mark.parametrize(
    ("m", "n", "k", "group_size", "zeros", "block", "splits"),
    [
        (128, 28672, 4096, 128, Zeros.NONE, TALL, 1),
        (512, 28672, 4096, 128, Zeros.NONE, TALL, 1),
        (128, 28672, 4096, 32, Zeros.INTEGER, TALL, 1),
        (128, 28672, 4096, 32, Zeros.REAL, TALL, 1),
        (128, 28672, 4096, -1, Zeros.REAL, TALL, 1),
        (256, 28672, 4096, -1, Zeros.NONE, TALL, 1),
        (256, 49152, 576, 32, Zeros.NONE, TALL, 1),
        (512, 4096, 14336, 128, Zeros.NONE, FEW_WARPS, 2),
        (256, 4096, 14336, 128, Zeros.INTEGER, FEW_WARPS, 4),
        (512, 16384, 2048, 128, Zeros.NONE, FEW_WARPS, 1),
        (256, 2048, 8192, 128, Zeros.NONE, HALF, 4),
        (128, 4096, 4096, 128, Zeros.REAL, HALF, 4),
        (128, 14336, 4096, 32, Zeros.NONE, HALF, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("in_gluon", [False], indirect=True)
def test_weights_are_scaled_first_where_that_was_faster(m, n, k, group_size, zeros, block, splits, in_gluon):
    """By the kernel in Triton, where there is none in Gluon."""
    assert pick_config(m, n, k, group_size, zeros, H100) == replace(block, splits=splits)
    assert not dequantizes(m, n, k, group_size, zeros, H100)
    assert type(pick_config(m, n, k, group_size, zeros, SMALL_CHIP)) is SplitConfig


@every_kind_of_zeros
def test_rows_from_which_weights_are_dequantized(zeros, in_gluon):
    """A weight of few rows: from some number of rows of x on. One of many, which fills the chip: later, on Hopper. In
    Gluon one of few rows, too, may be worth scaling."""
    for group_size, real, other in ((128, 128, 256), (32, 64, 192)):
        most = real if zeros is Zeros.REAL else other
        for m in (1, 16, 17, most, most + 1, 4096):
            if not in_gluon or m <= most or m == 4096:
                assert dequantizes(m, 1024, 4096, group_size, zeros, H100) == (m > most)
            assert dequantizes(m, 28672, 4096, group_size, zeros, SMALL_CHIP) == (m > most)
        assert dequantizes(4096, 28672, 4096, group_size, zeros, H100)
    assert not dequantizes(512, 28672, 4096, 128, zeros, H100)
    slow = {Zeros.REAL, Zeros.INTEGER} if in_gluon else {Zeros.REAL}
    assert dequantizes(512, 28672, 4096, 32, zeros, H100) == (zeros in slow)
    assert dequantizes(512, 2048, 2048, 128, zeros, H100), "too few blocks for the chip"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{}], r"2048x4096 needs entries of one \(warp_units, warps, splits\) for 8 and 16 rows"),
        ([{}, {"warps": 4}], r"2048x4096 needs entries of one"),
        ([{}, {"splits": 2}], r"2048x4096 needs entries of one"),
        ([{"warp_units": 1, "warps": 1}] * 2, "a step is two groups or more"),
        ([{"gated": True, "splits": 2}] * 2, "a gated pair is not split"),
        ([{}, {"cluster": True}], "a cluster is of splits of one step each"),
        ([{"warp_units": 1, "warps": 4, "splits": 3, "cluster": True}] * 2, "a cluster is of splits of one step each"),
    ],
    ids=["no-16", "two-cuts", "two-splits", "half-a-pair", "gated-split", "no-splits", "two-steps"],
)
def test_a_table_that_would_cut_k_in_two_ways_is_refused(changes, message, tmp_path):
    config = {"row_tiles": 1, "warp_units": 2, "warps": 8, "stages": 2, "max_registers": 96, "splits": 1}
    shape = {"k": 2048, "n": 4096, "group_size": 128, "gated": False}
    entries = [{**shape, "rows": rows, **config, **change} for rows, change in zip((8, 16), changes)]  # noqa: B905
    (tmp_path / "t.json").write_text(json.dumps({"gpu": H100.name, "entries": entries}))
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / "t.json")


def test_a_table_may_have_clusters(tmp_path):
    block = {"row_tiles": 4, "warp_units": 2, "warps": 4, "stages": 2, "max_registers": 168, "splits": 4}
    shape = {"k": 4096, "n": 4096, "group_size": 128, "gated": False}
    entries = [{**shape, **block, "rows": 8, "cluster": True}, {**shape, **block, "rows": 16}]
    (tmp_path / "t.json").write_text(json.dumps({"gpu": H100.name, "entries": entries}))
    found = [DecodeConfig(**block, cluster=True), DecodeConfig(**block)]
    assert list(read_table(tmp_path / "t.json").values()) == found


@pytest.mark.parametrize(
    "change",
    [{"splits": 0}, {"splits": 9}, {"warps": "8"}, {"warps": 32}, {"row_tiles": -1}, {"warp_units": 4}, {"stages": 0}]
    + [
        {"max_registers": 1000},
        {"gated": "no"},
        {"k": None},
        {"n": 0},
        {"group_size": [128]},
        {"warps": True},
        {"cluster": 1},
    ],
    ids=str,
)
def test_a_table_of_blocks_that_do_not_exist_is_refused(change, tmp_path):
    config = {"row_tiles": 1, "warp_units": 2, "warps": 8, "stages": 2, "max_registers": 96, "splits": 1}
    shape = {"k": 2048, "n": 4096, "group_size": 128, "gated": False}
    entries = [{**shape, "rows": rows, **config, **change} for rows in (8, 16)]
    (tmp_path / "t.json").write_text(json.dumps({"gpu": H100.name, "entries": entries}))
    with pytest.raises(ValueError, match=rf"is no table of .*{next(iter(change))}"):
        read_table(tmp_path / "t.json")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"gpu": "x", "entries": [{"k": 1}]}'])
def test_what_is_no_table_is_refused_in_words(text, tmp_path):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=r"t\.json is no table of benchmarks/sweep_int4_gemm\.py"):
        read_table(tmp_path / "t.json")
