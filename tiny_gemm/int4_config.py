"""Which blocks the INT4 GEMM takes for a shape, a batch and a GPU; also from a table that a sweep has written."""

import dataclasses
import enum
import json
import math
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import triton

from tiny_gemm.device import CLUSTER_BLOCKS, CLUSTERS_FILL, DeviceFacts
from tiny_gemm.quantize_utils import TILE_N, unit_k

DECODE_ROWS = 16  # up to here a row's sums are added in one order, whatever the batch
DECODE_WEIGHTS = 2**28  # W of more elements than this, a large vocabulary's, takes the prefill kernel, which shares x


class Zeros(enum.Enum):
    """The zeros of a weight, by what they cost a kernel."""

    NONE = "none"  # symmetric
    INTEGER = "integer"  # subtracted from the weights: a little
    REAL = "real"  # multiplied by sums of x: a second product


@dataclass(frozen=True)
class DecodeConfig:
    """A block takes 16 * row_tiles rows of W and a `splits`-th of K; a step is `warp_units` units of K for each of its
    `warps` warps. stages: one more than the steps whose weights are on their way in shared memory.
    max_registers: a thread may have so many. How K is cut, which is warp_units, warps and splits, decides the bits.
    cluster: the splits of a row tile, of one step each, are a cluster of blocks, where the chip has those."""

    row_tiles: int
    warp_units: int
    warps: int
    stages: int
    max_registers: int
    splits: int = 1
    cluster: bool = False

    @property
    def cut(self) -> tuple[int, int, int]:
        return self.warp_units, self.warps, self.splits

    def is_one_step(self, units: int) -> bool:
        """Whether one step of each split takes all of K, which has so many units: no ring then."""
        return self.splits * self.warps * self.warp_units >= units


STREAM_GROUPS = 32, 64, 128  # sizes that StreamConfig's kernel knows


@dataclass(frozen=True)
class StreamConfig:
    """One block an SM, of 16 warps, takes one tile of rows of W after the other (gluon_decode.py), or the blocks of a
    cluster do together, which share K; of what a block has of it `k_warps` of its warps have two units each."""

    k_warps: int
    cluster: int = 1

    def __post_init__(self):
        if self.k_warps not in (8, 16) or not 1 <= self.cluster <= CLUSTER_BLOCKS:
            raise ValueError(f"{self}: k_warps must be 8 or 16, and cluster 1 to {CLUSTER_BLOCKS}")

    @property
    def in_triton(self) -> DecodeConfig:
        """What has the same bits."""
        return DecodeConfig(1, 2, self.k_warps, 2, 128, self.cluster)

    @property
    def cut(self) -> tuple[int, int, int]:
        return self.in_triton.cut


@dataclass(frozen=True)
class SplitConfig:
    """block_n rows of W and block_m rows of x a block; K split over `splits` blocks; `stages` tiles in flight."""

    block_n: int
    block_m: int
    splits: int
    num_warps: int
    stages: int


@dataclass(frozen=True)
class PrefillConfig(SplitConfig):
    """The same of the kernel that scales weights before the product; a thread may have max_registers."""

    max_registers: int


@dataclass(frozen=True)
class HopperConfig(SplitConfig):
    """The same of the kernel in Gluon: block_n is 128 or 256, num_warps 4, those of one of its three parts."""


IN_GLUON = triton.__version__.startswith("3.6.")  # for which gluon_decode.py and gluon_gemm.py were written


def runs_in_gluon(k: int, facts: DeviceFacts) -> bool:
    """Whether the kernels in Gluon may take weights of k columns on this chip."""
    return IN_GLUON and facts.is_nvidia and facts.capability == (9, 0) and unit_k(k) == 128


def pick_config(
    m: int, n: int, k: int, group_size: int, zeros: Zeros, facts: DeviceFacts
) -> DecodeConfig | StreamConfig | SplitConfig:
    """The configuration for x [m, k] and W [n, k]. Within the decode sizes K is cut in a way that does not depend on m,
    so that a row's sums are added in one order whatever its batch."""
    if m <= DECODE_ROWS and n * k <= DECODE_WEIGHTS:
        return pick_decode_config(m, n, k, group_size, zeros, facts)
    unit = unit_k(k)
    if m <= DECODE_ROWS:
        stream = _stream_config(n, k, group_size, zeros, facts, False)
        if stream is not None:
            return stream
        # A narrower tile of x saves loads, unless it gets too small for the pipeline.
        narrowest = 16 if not facts.is_nvidia else 8 if unit == 64 else 2
        block_m = max(narrowest, triton.next_power_of_2(m))
        if not facts.is_nvidia:
            return SplitConfig(64, block_m, 1, 2, 2)
        block_n = 32 if block_m == 2 else 64
        if block_m >= 8 and facts.capability == (9, 0):  # by wgmma from 16 rows on, with the same bits: tested there
            block_n = 128
        return SplitConfig(block_n, block_m, 1, block_n // 32, {8: 4, 16: 3}.get(block_m, 5))
    return _many_rows_config(m, n, k, groups_a_unit(group_size, k), zeros, facts)


def _stream_config(
    n: int, k: int, group_size: int, zeros: Zeros, facts: DeviceFacts, gated: bool
) -> StreamConfig | None:
    """Where W has so many rows that a block, or a cluster, takes many tiles of them; None where it has not, where K
    leaves more than an eighth of the warps without work, and where the chip has no room for such a cluster. Whatever
    the batch, as it cuts K in one way.

    Swept on an H200, 2026-12-01: see docs/notes/int4-gemm.md.
    """
    if not runs_in_gluon(k, facts) or k % 256 or group_size not in STREAM_GROUPS or n * k >= 2**32:
        return None
    pairs, tiles = k // 256, -(-n // TILE_N) * (1 + gated)
    tiles_per_sm = tiles / facts.sm_count
    if pairs <= 16:
        k_warps, cluster = 8 if pairs <= 8 else 16, 1
        few = 4.5 if k_warps == 16 else 7.5 if group_size == 128 and gated else 10
        if pairs < 7 / 8 * k_warps or tiles_per_sm < few:
            return None
        if k_warps == 16 and tiles_per_sm > 30:  # a vocabulary, of which two blocks read pieces twice as long
            k_warps, cluster = 8, 2
    else:
        k_warps, cluster = 16, _stream_cluster(pairs, tiles, zeros is Zeros.REAL and group_size < 128, facts.sm_count)
    return StreamConfig(k_warps, cluster) if cluster and facts.clusters_of(cluster) > 0 else None


def _stream_cluster(pairs: int, tiles: int, has_many_sums: bool, sms: int) -> int:
    """How many blocks are to share K, of more than 16 pairs of units; 0 for none. has_many_sums: real zeros in small
    groups.

    Of clusters of three and more some SMs are left: the blocks of one are in one part of the chip, which has 16 to 18.
    (How many this chip has room for is not asked, so that two of one name cut K in one way.) Shares of 13 pairs leave
    few warps idle.
    """
    if pairs <= 32:
        return 2 if pairs >= 28 and tiles >= (7.5 if has_many_sums else 3.5) * sms / 2 else 0
    if has_many_sums:
        return 0
    best, best_time = 0, math.inf
    for cluster in range(3, CLUSTER_BLOCKS + 1):
        share = -(-pairs // cluster)
        time = share * -(-tiles // max(1, int(sms / 17 * (16 // cluster))))
        if 13 <= share <= 16 and time < best_time:
            best, best_time = cluster, time
    return best if tiles * pairs >= 0.8 * best_time * sms else 0


def groups_a_unit(group_size: int, k: int) -> int:
    """How many groups a unit of K has; per channel it counts as one."""
    return 1 if group_size == -1 else unit_k(k) // group_size


def _many_rows_config(m: int, n: int, k: int, groups: int, zeros: Zeros, facts: DeviceFacts) -> SplitConfig:
    """For more than DECODE_ROWS rows. Swept on an H200, 2026-11-29 and 30: see docs/notes/int4-gemm.md; the --rows of
    benchmarks/sweep_int4_gemm.py do it again.

    Two kinds of blocks: narrow ones, of which three or four fit an SM, and wide ones, which read x half as often. The
    sums of 64 rows with zeros do not fit sm_100's tensor memory, nor do those of 128; those of 128 rows in small groups
    do not fit registers.
    """
    scaled = _scaled_config(m, n, k, groups, zeros, facts)
    if scaled is not None:
        return scaled
    units = triton.cdiv(k, unit_k(k))
    sms, in_registers = facts.sm_count, facts.capability[0] != 10
    rows = 32 if m <= 32 or (zeros is Zeros.REAL and not in_registers) else 64
    stages = 3 if facts.is_nvidia else 2  # AMD's shared memory holds no more
    narrow = _cut_k(SplitConfig(64, rows, 1, 4, stages), m, n, units, 3 * sms)
    fits = _blocks(narrow, m, n) <= 3 * sms
    if not facts.is_nvidia:
        return narrow
    if m <= 32:
        return narrow if fits else _cut_k(SplitConfig(128, 32, 1, 8, 3), m, n, units, 4 * sms)
    wide = _cut_k(SplitConfig(128, rows, 1, 8, 4 if m <= 64 else 3), m, n, units, sms)
    if 64 < m <= 128 and zeros is not Zeros.REAL and in_registers and groups == 1:
        tall = _cut_k(SplitConfig(128, 128, 1, 8, 3), m, n, units, sms)  # unpacks W once
        wide = tall if units >= 16 * tall.splits else wide
    filled = _filled(wide, m, n, sms if m <= 128 or _blocks(wide, m, n) <= sms else 2 * sms)
    return narrow if fits and (filled < 0.75 or _filled(narrow, m, n, 3 * sms) > filled) else wide


def _scaled_config(
    m: int, n: int, k: int, groups: int, zeros: Zeros, facts: DeviceFacts
) -> HopperConfig | PrefillConfig | None:
    """A block that scales weights before the product, where it is faster than what else there is: on Hopper."""
    if runs_in_gluon(k, facts):
        return _hopper_config(m, n, k // 128, groups, zeros, facts.sm_count)
    if not facts.is_nvidia or facts.capability != (9, 0):
        return None
    return _prefill_config(m, n, triton.cdiv(k, unit_k(k)), groups, zeros, facts.sm_count)


# Blocks of the kernel in Gluon, one an SM, and the us that one takes for a unit of K: of one group, of several.
# Measured on an H200, 2026-12-01: see docs/notes/int4-gemm.md.
HOPPER_BLOCKS = {
    HopperConfig(256, 128, 1, 4, 4): {Zeros.NONE: (1.47, 1.69), Zeros.INTEGER: (1.64, 2.1), Zeros.REAL: (1.79, 2.28)},
    HopperConfig(128, 128, 1, 4, 4): {Zeros.NONE: (0.78, 0.95), Zeros.INTEGER: (0.87, 1.08), Zeros.REAL: (0.94, 1.13)},
    HopperConfig(256, 64, 1, 4, 5): {Zeros.NONE: (1.07, 1.29), Zeros.INTEGER: (1.17, 1.65), Zeros.REAL: (1.24, 1.72)},
    HopperConfig(128, 64, 1, 4, 6): {Zeros.NONE: (0.62, 0.76), Zeros.INTEGER: (0.69, 0.98), Zeros.REAL: (0.76, 1.0)},
}


def _hopper_config(m: int, n: int, units: int, groups: int, zeros: Zeros, sms: int) -> HopperConfig | None:
    """The block of HOPPER_BLOCKS, and the splits, that take the least time; None where dequantizing W takes less, or
    for so few rows that other kernels do. (It is asked for each new m: no triton.cdiv, which takes microseconds.)"""
    if m <= (32 if groups == 1 and zeros is Zeros.NONE else 64):
        return None
    best, best_us = None, math.inf
    for block, unit_us in HOPPER_BLOCKS.items():
        if block.block_m >= 2 * m:
            continue
        tiles = -(-m // block.block_m) * -(-n // block.block_n)
        for splits in (1, 2, 4, 8):
            a_split = -(-units // splits)
            if splits > 1 and (a_split < 4 or splits * tiles > sms):
                break
            if (splits - 1) * a_split >= units:  # the last would have none
                continue
            us = a_split * unit_us[zeros][groups > 1] + 2.5  # to begin and to end
            if splits > 1:  # to write sums, and for the last block to read those of all
                us += 1.0 + block.block_n * block.block_m / 2**15 * (4 + splits)
            us = us * -(-tiles * splits // sms) + 1.0
            if us < best_us:
                best, best_us = (block, splits), us
    if m > _most_rows(groups, zeros) and best_us > _dequantized_us(m, n, units * 128):
        return None
    return dataclasses.replace(best[0], splits=best[1])


def _dequantized_us(m: int, n: int, k: int) -> float:
    """What it takes to write W [n, k] in 16 bits and to multiply that."""
    return n * k / 1e9 * max(1130 + 1.75 * m, 750 + 2.5 * m) + 3.0


# Blocks of the kernel that scales weights first, in Triton. Two fit an SM, by their registers and their shared memory.
TALL = PrefillConfig(128, 128, 1, 8, 3, max_registers=128)
FEW_WARPS = PrefillConfig(128, 128, 1, 4, 3, max_registers=255)  # each has more products under way
HALF = PrefillConfig(64, 128, 1, 4, 3, max_registers=255)
PREFILL_BLOCKS = TALL, FEW_WARPS, HALF


def _prefill_config(m: int, n: int, units: int, groups: int, zeros: Zeros, sms: int) -> PrefillConfig | None:
    """One of PREFILL_BLOCKS where it is faster than what else there is. Measured on an H200, 2026-11-30: the numbers
    below are of the tables in docs/notes/int4-gemm.md."""
    if m <= 64:
        return None
    small_groups, real_zeros = groups > 1, zeros is Zeros.REAL
    sums_cost_little = not small_groups and not real_zeros

    def filled(config: PrefillConfig) -> float:  # an SM that has one block left is half as fast
        return _filled(config, m, n, 2 * sms if _blocks(config, m, n) <= 2 * sms else sms)

    config = _cut_k(TALL, m, n, units, 2 * sms, least_units=24)
    half = _cut_k(HALF, m, n, units, 2 * sms, least_units=8)
    half_can_win = m > 128 if sums_cost_little else real_zeros or n * units >= 2**18
    if half_can_win and filled(half) > 1.2 * filled(config):
        config = half
    elif sums_cost_little and filled(config) > 0.9 and _blocks(config, m, n) <= 4 * sms:
        config = dataclasses.replace(FEW_WARPS, splits=config.splits)
    used = filled(config) * m / (128 * triton.cdiv(m, 128))  # of what the chip could do meanwhile
    if m <= _most_rows(groups, zeros):
        is_faster = used >= (0.45 if not sums_cost_little else 0.65 if m <= 128 else 0.8)
    else:  # in ns for a million weights: against writing them in 16 bits and multiplying those
        if config.block_n == HALF.block_n:
            a_row = 8.0 if small_groups else 4.4
        elif small_groups:
            a_row = 4.5 if real_zeros else 3.6 if config.splits == 1 else 4.2
        else:
            a_row = 3.6 if real_zeros else 3.3
        is_faster = a_row * m / used < max(1130 + 1.75 * m, 750 + 2.5 * m)
    return config if is_faster else None


def _most_rows(groups: int, zeros: Zeros) -> int:
    """With more rows of x than this the sums of groups cost more than dequantizing W. Found on an H200, 2026-11-29."""
    if groups > 1:  # more scales, more sums
        return 64 if zeros is Zeros.REAL else 192
    return 128 if zeros is Zeros.REAL else 256


@lru_cache(maxsize=4096)
def dequantizes(m: int, n: int, k: int, group_size: int, zeros: Zeros, facts: DeviceFacts) -> bool:
    """Whether for m rows of x W [n, k] is to be dequantized once, for a product in 16 bits."""
    groups = groups_a_unit(group_size, k)
    if m <= _most_rows(groups, zeros):
        return False
    return _scaled_config(m, n, k, groups, zeros, facts) is None


def _blocks(config: SplitConfig, m: int, n: int) -> int:
    return triton.cdiv(n, config.block_n) * triton.cdiv(m, config.block_m) * config.splits


def _cut_k(config: SplitConfig, m: int, n: int, units: int, room: int, least_units: int = 4) -> SplitConfig:
    """With as many splits, a power of two up to 8, as leave `room` for all blocks at once and each some least_units."""
    blocks, splits = _blocks(config, m, n), 1
    while 2 * splits <= min(room // blocks, units // least_units, 8):
        splits *= 2
    return dataclasses.replace(config, splits=splits)


def _filled(config: SplitConfig, m: int, n: int, room: int) -> float:
    """How much of the waves, of `room` blocks each, the blocks fill."""
    blocks = _blocks(config, m, n)
    return blocks / (triton.cdiv(blocks, room) * room)


def pick_decode_config(
    m: int, n: int, k: int, group_size: int, zeros: Zeros, facts: DeviceFacts, *, gated: bool = False
) -> DecodeConfig | StreamConfig:
    """As pick_config, among blocks of kernels for few rows; for a gated pair two weights [n, k]."""
    stream = _stream_config(n, k, group_size, zeros, facts, gated)
    if stream is not None:
        return stream
    unit = unit_k(k)
    units = triton.cdiv(k, unit)
    groups = groups_a_unit(group_size, k)
    tiles = triton.cdiv(n, TILE_N)
    if not facts.is_nvidia:
        warps = min(4, triton.next_power_of_2(triton.cdiv(units, 2)))
        return DecodeConfig(1, 2, warps, 2, registers_needed(1, 2, 1 if m <= 8 else 2, groups, zeros, gated))
    tiles_per_sm = tiles / facts.sm_count
    if gated:
        return _fit_ring(_pair_config(m, unit, units, tiles_per_sm, groups, zeros), k, group_size, zeros, gated, facts)
    config = _cluster_config(m, tiles, unit, units, groups, zeros, facts.sm_count) if facts.has_clusters else None
    if config is not None:
        return config
    warp_units, warps, splits, row_tiles = _decode_blocks(m, unit, units, tiles_per_sm, groups, zeros)
    config = DecodeConfig(row_tiles, warp_units, warps, 2, 0, splits)
    config = _fit_ring(config, k, group_size, zeros, gated, facts)
    limit = _register_limit(config, m, tiles, config.is_one_step(units), groups, zeros, facts.sm_count)
    return dataclasses.replace(config, max_registers=limit)


def _fit_ring(
    config: DecodeConfig, k: int, group_size: int, zeros: Zeros, gated: bool, facts: DeviceFacts
) -> DecodeConfig:
    """With fewer row tiles, where a stage of so many would be more than the shared memory of a block."""
    unit, row_tiles = unit_k(k), config.row_tiles
    tile_bytes = stage_bytes(unit, group_size, zeros, gated) * config.warps * config.warp_units
    one_group_a_warp = config.warp_units == 1 and groups_a_unit(group_size, k) == 1
    if zeros is Zeros.INTEGER and one_group_a_warp and not config.is_one_step(triton.cdiv(k, unit)):
        tile_bytes *= 2  # Triton keeps two stages of these
    while row_tiles > 1 and row_tiles * tile_bytes > facts.shared_memory_bytes:
        row_tiles //= 2
    return dataclasses.replace(config, row_tiles=row_tiles)


def _register_limit(
    config: DecodeConfig, m: int, tiles: int, one_step: bool, groups: int, zeros: Zeros, sms: int
) -> int:
    """How many registers a thread may have: what it needs, or a little less where all blocks then fit the chip at once
    (a few moves to memory cost less than a second wave)."""
    x_tiles = 1 if m <= 8 else 2
    needed = registers_needed(config.row_tiles, config.warp_units, x_tiles, groups, zeros, False)
    limit = 128 if needed == 136 else needed
    blocks_per_sm = triton.cdiv(triton.cdiv(tiles, config.row_tiles) * config.splits, sms)
    fits = registers_for(blocks_per_sm * config.warps)
    if config.splits > 1:  # 64: 16 rows of 9728 x 2560, 128 for 184, the fastest of those timed
        little = 64 if zeros is Zeros.NONE and (groups == 1 or config.splits > 4) else 48
    elif x_tiles == 2 and config.warp_units == 2 and not one_step:  # registers_needed thinks of units side by side
        if groups == 1:
            little = 40 if zeros is Zeros.REAL else 72
        else:
            little = 80 if zeros is Zeros.INTEGER else 40
    elif one_step or groups == 1:
        little = 24
    elif x_tiles == 2:
        little = 24 if zeros is Zeros.NONE else 40
    else:
        little = 32 if (config.row_tiles, config.warp_units) == (1, 2) else 16
    if limit - little <= fits < limit:
        limit = fits
    if config.splits > 1 and one_step:
        limit = min(limit, max(fits, 128))
    elif config.splits > 1:  # what is to spare lets ptxas ask for x sooner
        limit = max(limit, min(fits, 128))
    if groups > 1 and not one_step:  # all that leave room for as many blocks
        if config.splits > 1:
            room = max(1, min(blocks_per_sm, 65536 // (32 * config.warps * limit)))
        else:  # or for as many as fill the chip best, of 12 warps or more
            limit = needed - little
            blocks = triton.cdiv(tiles, config.row_tiles) / sms
            rooms = [r for r in range(1, 17) if registers_for(r * config.warps) >= limit]
            rooms = [r for r in rooms if r >= blocks or r * config.warps >= 12]
            room = max(rooms, key=lambda r: (_fill(blocks, r), r >= blocks, -r), default=1)
        limit = max(limit, min(registers_for(room * config.warps), max(needed, 168)))
    limit = min(limit, registers_for(config.warps))
    if one_step and m <= 8 and groups == 1:  # what counts is how soon the next kernel's blocks find room
        if config.warps == 16:
            limit = min(limit, 64)
        elif config.warps == 8 and zeros is Zeros.NONE:
            limit = min(limit, 88)
    return limit


def _cluster_config(
    m: int, tiles: int, unit: int, units: int, groups: int, zeros: Zeros, sms: int
) -> DecodeConfig | None:
    """One step of each split of K, with all weights in registers when x comes, and the splits of a row tile a cluster.
    None where K is one step of one block or more than 8 steps, and where the blocks would not find room together.

    Whether there is one, and how K is cut, does not depend on m. Swept on an H200, 2026-11-30 and 2026-12-01: see
    docs/notes/int4-gemm.md.
    """
    if units * unit <= 2048:
        return None
    small_groups, real_zeros = groups > 1 and unit == 128, zeros is Zeros.REAL
    splits, warp_units, warps = triton.cdiv(units, 8), 2, 4
    of_one_unit = triton.cdiv(units, 4)  # how many splits, where a warp has one unit
    spares_warps = 8 * splits >= 1.1 * 4 * of_one_unit and (units % 4 == 0 or real_zeros)  # that would have no work
    if unit == 128 and of_one_unit <= 8 and spares_warps and tiles * of_one_unit > 8 * sms:  # K of 2560 and 3584
        splits, warp_units = of_one_unit, 1
    scales_only = small_groups and zeros is Zeros.NONE
    of_eight = splits > 8 and not real_zeros and (groups == 1 or scales_only)
    if unit == 128 and (of_eight or (scales_only and units % 16 == 0 and tiles * splits > 6 * sms)):
        splits, warps = triton.cdiv(units, 16), 8
    if splits > 8:
        return None
    work = tiles * splits / sms
    row_tiles = 2 if 2 < work <= 6 or warps == 8 else 1 if work <= 2 else 4  # one to three blocks an SM
    few_tiles = row_tiles
    if small_groups and row_tiles == 4 and warp_units == 2 and not real_zeros:  # with more scales: five half as large
        few_tiles = 2

    def registers(row_tiles: int, x_tiles: int, filled: float, little: int) -> int | None:
        """With how many the blocks fill so much of the chip; None where that is more than a little less than needed."""
        needed = registers_needed(row_tiles, warp_units, x_tiles, groups, zeros, False)
        blocks_per_sm = triton.cdiv(tiles, row_tiles) * splits / sms
        fits = registers_for(math.ceil(blocks_per_sm / filled) * warps)
        return min(needed, fits) if needed - little <= fits else None

    # registers_needed thinks of units of 128 side by side, and of integer zeros too little.
    if unit == 64:
        little = 64
    elif warp_units == 1:
        little = {Zeros.NONE: (24, 32), Zeros.INTEGER: (24, 40), Zeros.REAL: (56, 32)}[zeros][small_groups]
    else:
        little = {Zeros.NONE: (56, 56), Zeros.INTEGER: (24, 40), Zeros.REAL: (24, 56)}[zeros][small_groups]
    limit = registers(few_tiles, 1, CLUSTERS_FILL, little)
    if limit is None:
        return None
    if units <= 32 and unit == 128 and warp_units == 2 and few_tiles == 4 and limit < 168:
        return None  # 4096 x 6144: all of K in a block is faster
    if m <= 8:
        return DecodeConfig(few_tiles, warp_units, warps, 2, limit, splits, cluster=True)
    little = 96 if unit == 64 else 88 if warp_units == 2 and groups == 1 else 56
    limit = registers(row_tiles, 2, CLUSTERS_FILL, little)
    if limit is not None:
        return DecodeConfig(row_tiles, warp_units, warps, 2, limit, splits, cluster=True)
    # So many registers leave no room for clusters: the same splits, through memory, if need be in two waves.
    if warp_units == 1 or (real_zeros and small_groups):  # whatever is moved to memory
        limit, least = registers(row_tiles, 2, 1.0, 255), 168 if real_zeros and small_groups else 128
    else:
        limit, least = registers(row_tiles, 2, 1.0, little), 0
    if limit is None or limit < least:
        limit = min(registers_needed(row_tiles, warp_units, 2, groups, zeros, False), registers_for(2 * warps))
    return DecodeConfig(row_tiles, warp_units, warps, 2, limit, splits)


def _fill(blocks_per_sm: float, room: int) -> float:
    """How much of the time the average SM has work, if it holds `room` blocks at once."""
    if blocks_per_sm <= room:
        return blocks_per_sm / math.ceil(blocks_per_sm)
    return blocks_per_sm / (math.ceil(blocks_per_sm / room) * room)


def _pair_config(m: int, unit: int, units: int, tiles_per_sm: float, groups: int, zeros: Zeros) -> DecodeConfig:
    """For a gated pair: all of K in a block, of four warps but for narrow units. Swept on an H200, 2026-11-30 and
    2026-12-01.

    Two units a warp are fewer steps, one takes fewer registers, two row tiles read x half as often: that of which the
    blocks fill the chip best.
    """
    few, real_zeros = m <= 8, zeros is Zeros.REAL
    x_tiles = 1 if few else 2
    if unit == 64:
        needed = registers_needed(1, 2, x_tiles, groups, zeros, True)
        return DecodeConfig(1, 2, 8, 2, min(needed, 128) if needed <= 144 else needed)
    small_groups = groups > 2

    def registers(row_tiles: int, warp_units: int, room: int) -> tuple[int, int]:
        """(how many a thread may have for `room` blocks an SM, how many less than it needs that is)"""
        needed = registers_needed(row_tiles, warp_units, x_tiles, groups, zeros, True)
        if groups > 1 or row_tiles == 2:  # all that leave room for as many blocks
            limit = min(registers_for(4 * min(room, math.ceil(tiles_per_sm / row_tiles))), max(needed, 168))
        else:
            limit = min(needed, registers_for(4 * room))
        return limit, needed - limit

    def filled(row_tiles: int, room: int) -> float:
        return _fill(tiles_per_sm / row_tiles, room)

    is_deep = tiles_per_sm > 6  # four blocks of two row tiles an SM have work
    # (row tiles, units a warp, blocks an SM) -> how fast for up to 8 rows, beside how they fill the chip
    if small_groups and tiles_per_sm <= 3:
        speeds = {(1, 2, 4 if zeros is Zeros.NONE else 3): 1.0}
    elif small_groups:
        of_two = units / (8 * math.ceil(units / 8))  # of a step of two units a warp, how much has work
        if zeros is Zeros.NONE:
            speeds = {(1, 1, 5): 1.0, (1, 2, 4): 0.9 * of_two, (1, 1, 6): 0.85, (2, 1, 4): 1.0 if is_deep else 0.9}
        else:
            speeds = {(1, 1, 4): 1.15, (2, 1, 3): 1.0, (1, 2, 3): 0.97 * of_two, (1, 1, 5): 0.9}
    elif real_zeros:  # so few warps must not have several waves
        speeds = {(1, 1, 4) if tiles_per_sm > 3 else (1, 2, 3): 1.1, (1, 1, 5): 1.0}
    else:
        speeds = {(1, 2, 4): 1.1, (1, 1, 5): 1.0}
        if zeros is Zeros.NONE:
            speeds[1, 1, 6] = 1.0
            if is_deep:
                speeds[2, 1, 4] = 1.17
    row_tiles, warp_units, room = max(speeds, key=lambda b: speeds[b] * filled(b[0], b[2]))
    if not few:
        if warp_units == 2:
            blocks = {(1, 3): filled(1, 3)}  # (row tiles, blocks an SM) -> how good
            if groups == 1 and not real_zeros or groups == 2 and zeros is Zeros.NONE:
                blocks[2, 2] = filled(2, 2)
        elif real_zeros:
            blocks = {(1, 3): filled(1, 3), (1, 4): 0.7 * filled(1, 4)}
        else:
            blocks = {(1, 4): filled(1, 4), (1, 5): filled(1, 5) * (0.8 if small_groups else 1)}
            if small_groups:
                blocks[1, 3] = filled(1, 3)
            else:
                blocks[2, 3] = filled(2, 3)
        few_moves = {b: good for b, good in blocks.items() if registers(b[0], warp_units, b[1])[1] <= 48}
        row_tiles, room = max(few_moves or blocks, key=blocks.__getitem__)
    return DecodeConfig(row_tiles, warp_units, 4, 2, registers(row_tiles, warp_units, room)[0])


def _decode_blocks(
    m: int, unit: int, units: int, tiles_per_sm: float, groups: int, zeros: Zeros
) -> tuple[int, int, int, int]:
    """(warp_units, warps, splits, row_tiles), the first three the same for every m.

    Swept on an H200, 2026-11-28 to 12-01: see docs/notes/int4-gemm.md. What decides is that all blocks fit the chip at
    once, scales and zeros taking registers, and that they are many.
    """
    few, real_zeros, small_groups = m <= 8, zeros is Zeros.REAL, groups > 2
    if unit == 64:
        return _blocks_of_narrow_units(few, units, tiles_per_sm, groups, zeros)
    if units <= 16 and tiles_per_sm <= 3:  # one step
        wide = tiles_per_sm > (0.75 if groups == 1 and zeros is Zeros.NONE else 1)
        return 2, 8, 1, 2 if wide or not few else 1
    if units <= 16 and 4 < tiles_per_sm <= 8 and not real_zeros:
        # One wave: eight blocks fit an SM, or four of twice as many rows.
        return 1, 4, 1, 1 if m == 1 and groups <= 2 and zeros is Zeros.NONE else 2
    if 24 < units <= 32 and tiles_per_sm <= 2 and not real_zeros and groups == 1:  # one step
        return 2, 16, 1, 1 if few else 2
    if units > 16 and small_groups and real_zeros and tiles_per_sm * triton.cdiv(units, 8) <= 6 and units <= 64:
        return 2, 4, triton.cdiv(units, 8), 2  # one step of each split, three blocks an SM
    if 32 < units <= 128 and tiles_per_sm * triton.cdiv(units, 16) <= 4:
        return 2, 8, triton.cdiv(units, 16), 2  # one step of each split, two blocks an SM
    if small_groups and real_zeros and tiles_per_sm <= 2 and units > 32 and (units < 64 or tiles_per_sm > 1.5):
        return 1, 4, _even_splits(triton.cdiv(units, 4), 4), 4 if not few and tiles_per_sm > 1.5 else 2
    if units >= 64 and tiles_per_sm <= 2:  # long rows, few of them: reading x is what a block that has all of K does
        return _blocks_of_long_rows(m, units, tiles_per_sm, groups, zeros)
    if tiles_per_sm <= 2:
        return 2, 8, 1, 1 if few else 2
    if tiles_per_sm <= 3 and not real_zeros and groups == 1:
        return 2, 8, 1, 2 if tiles_per_sm > 2.5 or not few else 1
    if tiles_per_sm <= 3 and (zeros is Zeros.NONE or (zeros is Zeros.INTEGER and not small_groups)):
        return 1, 8, 1, 1 if few else 2
    if tiles_per_sm <= 3 and small_groups and units == 28:  # half of the last step of 8 units would be empty
        return 1, 4, 7, 4 if few else 2
    if tiles_per_sm <= 3:
        return 2, 4, 1, 1 if few else 2
    one = tiles_per_sm <= 5 and _fill(tiles_per_sm, 5) > 1.05 * _fill(tiles_per_sm / 2, 4)  # five of one tile fit an SM
    needs_registers = small_groups and (tiles_per_sm > 5 if zeros is Zeros.NONE else not one)
    warp_units = 1 if needs_registers else 2
    if few:
        return warp_units, 4, 1, 1 if one else 2
    of_four = groups == 1 and not real_zeros  # where two blocks of four tiles an SM have registers
    tall = 4 if of_four and (tiles_per_sm > 4 or zeros is Zeros.NONE) else 2
    if _fill(tiles_per_sm / 2, 3) > 1.1 * _fill(tiles_per_sm / tall, 2):
        tall = 2
    return warp_units, 4, 1, tall


def _blocks_of_long_rows(
    m: int, units: int, tiles_per_sm: float, groups: int, zeros: Zeros
) -> tuple[int, int, int, int]:
    """_decode_blocks where K is 8,192 or more and N at most two row tiles an SM."""
    few, small_groups = m <= 8, groups > 2
    steps = triton.cdiv(units, 8)
    if zeros is Zeros.REAL or (small_groups and tiles_per_sm <= 1.5 and (zeros is Zeros.INTEGER or tiles_per_sm > 1)):
        splits = _even_splits(steps, min(int(6 / tiles_per_sm), 8))  # three blocks of two tiles an SM
        if not small_groups or units >= 0.85 * 8 * splits * triton.cdiv(steps, splits):
            return 2, 4, splits, 1 if few and small_groups and tiles_per_sm * splits <= 3 else 2
    if small_groups or (groups > 1 and units > 96):
        return 1, 4, *_long_rows(few, triton.cdiv(units, 4), tiles_per_sm)
    if tiles_per_sm > 1:  # as few steps a split as fit the chip at once, four blocks of two tiles an SM
        splits = _even_splits(steps, int(8 / tiles_per_sm))
        fills = tiles_per_sm * splits > 6.4  # two blocks of four tiles each SM too
        return 2, 4, splits, 2 if few or groups > 1 or not fills else 4
    return 2, 4, _even_splits(steps, 4), 1 if m == 1 else 2


def _blocks_of_narrow_units(
    few: bool, units: int, tiles_per_sm: float, groups: int, zeros: Zeros
) -> tuple[int, int, int, int]:
    """_decode_blocks of units of 64 columns."""
    if units >= 32 and tiles_per_sm <= 2:
        steps = triton.cdiv(units, 8)
        if steps <= 8:  # one step of each split
            return 2, 4, steps, 4 if 6 < tiles_per_sm * steps <= 12 else 2
        splits, row_tiles = _long_rows(few, steps, tiles_per_sm)
        return 2, 4, splits, row_tiles if few else 4
    if units <= 12 and groups > 1 and zeros is Zeros.NONE and tiles_per_sm > 4:  # a small vocabulary
        return 1, 4, 1, 4
    # all of K in one step, if it is at most 1,024
    return 2, 8, 1, 1 if tiles_per_sm <= 4 else 2


def _even_splits(steps: int, most: int) -> int:
    """The fewest splits of which none has more steps than with `most`: none is left without a step."""
    return triton.cdiv(steps, triton.cdiv(steps, most))


def _long_rows(few: bool, steps: int, tiles_per_sm: float) -> tuple[int, int]:
    """(splits, row_tiles) where K is more than 8 steps of 512 columns, of 4 warps each, and N at most two row tiles an
    SM: four blocks fit an SM, or of one row tile more, and those are taken that fill it better."""
    splits = _even_splits(steps, 8 if tiles_per_sm <= 1 else 4)
    blocks_per_sm = tiles_per_sm * splits  # of one row tile
    return splits, 1 if few and _fill(blocks_per_sm, 8) > 1.1 * _fill(blocks_per_sm / 2, 8) else 2


def stage_bytes(unit: int, group_size: int, zeros: Zeros, gated: bool) -> int:
    """Bytes at most of shared memory that a stage of the decode kernel takes for a unit of a row tile. For either half
    of the tile a lane fetches a pair of scales, and one of zeros, of up to 8 bytes."""
    pairs = 0 if group_size == -1 else 1 if zeros is Zeros.NONE else 2
    return (1 + gated) * (8 * unit + pairs * 2 * 32 * 8)


def registers_for(warps: int) -> int:
    """How many registers a thread may have at most, for so many warps to be on an NVIDIA SM at once."""
    return min(2048 // warps // 8 * 8, 255)


def registers_needed(row_tiles: int, warp_units: int, x_tiles: int, groups: int, zeros: Zeros, gated: bool) -> int:
    """About how many registers a thread of the decode kernel needs: x, a step's weights, pairs of scales and sums."""
    if x_tiles == 2 and row_tiles == 4 and groups > 1:
        return 255
    weights = (1 + gated) * row_tiles * 8 * warp_units
    pairs = 0 if groups == 1 else (1 + gated) * row_tiles * 2 * (1 if zeros is Zeros.NONE else 2)
    sums = (1 + gated) * row_tiles * 4 * x_tiles + (16 if zeros is Zeros.REAL else 0)
    if zeros is Zeros.INTEGER and x_tiles == 2:
        sums += 16  # what is added to weights
    held = 16 * warp_units * x_tiles + weights + pairs + sums
    return min(255, (held + 56 + 8 * row_tiles * (x_tiles - 1)) // 8 * 8)


def read_table(path: str | os.PathLike) -> dict[tuple, DecodeConfig]:
    """What benchmarks/sweep_int4_gemm.py found: (gpu, k, n, group size, gated, most rows) -> configuration. ValueError
    for a file that is no table."""
    try:
        table = json.loads(Path(path).read_text())
        found = {_table_key(table["gpu"], e): _table_config(e) for e in table["entries"]}
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is no table of benchmarks/sweep_int4_gemm.py: {type(e).__name__}: {e}") from e
    for gpu, k, n, group_size, gated, _ in found:
        both = [found.get((gpu, k, n, group_size, gated, rows)) for rows in (8, DECODE_ROWS)]
        if None in both or len({c.cut for c in both}) > 1:  # K cut in two ways: a row's bits differ
            raise ValueError(
                f"{path}: {k}x{n} needs entries of one (warp_units, warps, splits) for 8 and {DECODE_ROWS} rows"
            )
        warp_units, warps, splits = both[0].cut
        if any(c.cluster for c in both) and not 1 < splits <= 8 * both[0].is_one_step(triton.cdiv(k, unit_k(k))):
            raise ValueError(f"{path}: {k}x{n} has {both[0]}; a cluster is of splits of one step each")
        if warp_units * warps * unit_k(k) < 2 * group_size or (gated and splits > 1):
            raise ValueError(f"{path}: {k}x{n} has {both[0]}; a step is two groups or more, a gated pair is not split")
    return found


def _table_key(gpu: str, entry: dict) -> tuple:
    key = tuple(entry[name] for name in ("k", "n", "group_size", "gated", "rows"))
    if [type(value) for value in key] != [int, int, int, bool, int] or min(key[:2]) < 1:
        raise ValueError(f"{entry} must have whole numbers k, n, group_size, rows, and gated true or false")
    return gpu, *key


def _table_config(entry: dict) -> DecodeConfig:
    values = {f.name: entry[f.name] for f in dataclasses.fields(DecodeConfig) if f.name != "cluster"}
    allowed = {"row_tiles": (1, 2, 4), "warp_units": (1, 2), "warps": (1, 2, 4, 8, 16)}
    allowed |= {"stages": range(1, 9), "max_registers": range(16, 256), "splits": range(1, 9)}
    for name, values_of in allowed.items():
        if type(values[name]) is not int or values[name] not in values_of:
            raise ValueError(f"{name}={values[name]!r} must be one of {list(values_of)[:5]} ...")
    cluster = entry.get("cluster", False)
    if type(cluster) is not bool:
        raise ValueError(f"cluster={cluster!r} must be true or false")
    return DecodeConfig(**values, cluster=cluster)
