"""INT4 GEMM on the GPU: y = x @ W.T + bias, W packed as quantize_utils describes and dequantized in registers.

    y[m, n] = sum over groups g of scale[n, g] * (sum_k x[m, k] * (q[n, k] - 8) - (zero[n, g] - 8) * sum_k x[m, k])

or, where zeros are integers, sum over g of scale[n, g] * sum_k x[m, k] * (q[n, k] - zero[n, g]).

The weights are the M operand of the tensor-core product and the activations its N operand, which need only be 8 wide: a
batch of 8 costs what a batch of 1 costs. There are five kernels:

- `_int4_decode_kernel`, up to DECODE_ROWS rows: the warps of a block split K. Weights stream through a ring of stages
  in shared memory, each thread reading back what it fetched itself. What is fetched first does not depend on x, so it
  is on its way, or there, before the kernel waits for the one that computes x.
- `int4_stream_kernel` (gluon_decode.py), on Hopper, for as many rows of x and many of W: one block an SM keeps its x.
- `_int4_gemm_kernel`, more rows: the warps of a block own different rows of W and share x through shared memory.
- `_int4_prefill_kernel`, still more, on Hopper: likewise, with weights that are scaled before the product.
- `int4_hopper_kernel` (gluon_gemm.py) does the same sums, faster, where 128 divides K and Triton is 3.6.

Where one block a row tile is too few, K is split over SPLITS blocks, and the last of them to finish adds their partial
sums; on Hopper they are a cluster where each has one step, and add up in shared memory. Where `dequantizes` says so W
is dequantized once, and the product is cuBLAS's.

Sums are added in a fixed order, whoever comes last: a row's bits do not depend on its batch, up to DECODE_ROWS rows.
`int4_tile` is what the fused FFN is made of: K split over the warps of a block.
"""

import dataclasses
import os
from functools import cache, lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from tiny_gemm.device import INTERPRETED, DeviceFacts, counters, device_facts, scratch, set_up_counters, tensor_bytes
from tiny_gemm.int4_config import (
    DECODE_ROWS,
    STREAM_GROUPS,
    DecodeConfig,
    HopperConfig,
    PrefillConfig,
    SplitConfig,
    StreamConfig,
    Zeros,
    dequantizes,
    pick_config,
    pick_decode_config,
    read_table,
)
from tiny_gemm.int4_unpack import UNPACKED, are_integers, scaled_plane, unpack_plane
from tiny_gemm.launcher import FixedLaunch, Launcher, launches_clusters
from tiny_gemm.quantize_utils import TILE_N, unit_k
from tiny_gemm.triton_cluster import (
    begin_cluster_sum,
    cluster_adders,
    cluster_room,
    cluster_sends,
    cluster_sum,
    cluster_words,
    join_cluster,
)
from tiny_gemm.triton_parts import (
    activate,
    add_warps,
    arrive,
    int4_gemm_cost,
    pdl_options,
    shared_buffer,
    wait_for_previous,
)

# ---------------------------------------------------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _pair_ptr(ptr):
    """`ptr` to numbers of 16 or 32 bits as one to words that hold two: a pair of neighbours comes by one load."""
    if ptr.dtype.element_ty.primitive_bitwidth == 32:
        return ptr.to(tl.pointer_type(tl.int64))
    else:
        return ptr.to(tl.pointer_type(tl.int32))


@triton.jit
def _split_pairs(pairs, DTYPE: tl.constexpr):
    """The two numbers of each word: floats as fp32, int16 as they are."""
    if DTYPE == tl.int16:
        return pairs.to(tl.int16), (pairs >> 16).to(tl.int16)
    elif DTYPE.primitive_bitwidth == 32:
        return pairs.to(tl.int32).to(DTYPE, bitcast=True), (pairs >> 32).to(tl.int32).to(DTYPE, bitcast=True)
    else:
        low = pairs.to(tl.int16).to(DTYPE, bitcast=True)
        high = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _load_pair(ptr, offs):
    """Pairs number `offs`, split. The software pipeline fetches ahead only loads of 4 bytes and more a thread."""
    return _split_pairs(tl.load(_pair_ptr(ptr) + offs), ptr.dtype.element_ty)


# What a thread fetches of a weight is in the order in which it will be an operand of mma.sync, so that it comes back
# from shared memory 16 bytes at a time and needs no other thread. Triton gives the dimension without gaps of a tensor
# to a thread and spreads the other over lanes, warps and registers, in that order. Of each half tile (8 rows) lane
# 4 r + t fetches UNIT / 16 neighbouring int16 of row r: stored columns t * UNIT / 16 and on. What it needs for the
# product is columns 8 b + 2 t and 8 b + 2 t + 1 for each b; so stored column t * UNIT / 16 + 2 b + p is called column
# 8 b + 2 t + p, of W and of x alike.


@triton.jit
def _row_tile(block_n, half, N, ROW_TILES: tl.constexpr):
    """Number of the row tile, int64, that half tile `half` of a block is in: one number where there is one (each thread
    would compute it for itself). Tiles past N repeat the last one."""
    tile = block_n if ROW_TILES == 1 else block_n * ROW_TILES + half // 2
    return tl.minimum(tile, tl.cdiv(N, 16) - 1).to(tl.int64)


@triton.jit
def _row_tile_offset(tile, parts, PART: tl.constexpr, ROW_TILES: tl.constexpr):
    """Offset of a row tile, of `parts` times PART elements each. No compiler changes the order of these products: where
    a thread has several tiles, one of the products serves all; a single tile's are no thread's own in either order."""
    return tile * parts * PART if ROW_TILES == 1 else tile * (parts * PART)


@triton.jit
def _weight_tile(
    block_n,  # which ROW_TILES * 16 rows of W
    N,
    K,
    ROW_TILES: tl.constexpr,
    WARP_UNITS: tl.constexpr,
    WARPS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """(offsets int64 [T, UNIT / 16], number of the unit [T, 1]) of the int16 that a step reads, those of step 0; T runs
    over halves of tiles, units of a warp, warps and lanes, the last ones fastest."""
    i = tl.arange(0, 2 * ROW_TILES * WARP_UNITS * WARPS * 32)[:, None]
    unit = i // 32 % WARPS * WARP_UNITS + i // (32 * WARPS) % WARP_UNITS
    half = i // (32 * WARPS * WARP_UNITS)
    offs = unit * (4 * UNIT) + half % 2 * (2 * UNIT) + i % 32 * (UNIT // 16) + tl.arange(0, UNIT // 16)[None, :]
    tile = _row_tile(block_n, half, N, ROW_TILES)
    return _row_tile_offset(tile, tl.cdiv(K, UNIT), 4 * UNIT, ROW_TILES) + offs, unit


@triton.jit
def _pairs_tile(
    block_n,
    N,
    K,
    ROW_TILES: tl.constexpr,
    WARPS: tl.constexpr,
    PAIRS: tl.constexpr,  # a warp; 0: half a one
    SHARED: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """(offsets int64 [T], number of the pair [T]) of the pairs of scales, or zeros, that a step reads, those of step 0;
    T runs over halves of tiles, pairs of a warp, warps and lanes. The four lanes of a row read the same; if SHARED
    each reads one of the warp's, lane t of them pair t or, of two, t % 2, and T does not run over pairs."""
    EACH: tl.constexpr = 1 if SHARED else max(PAIRS, 1)
    i = tl.arange(0, 2 * ROW_TILES * EACH * WARPS * 32)
    warp = i // 32 % WARPS
    half = i // (32 * WARPS * EACH)
    if PAIRS == 0:
        pair = warp // 2
    else:
        pair = warp * PAIRS + (i % PAIRS if SHARED else i // (32 * WARPS) % PAIRS)
    offs = pair * 16 + half % 2 * 8 + i % 32 // 4
    tile = _row_tile(block_n, half, N, ROW_TILES)
    return _row_tile_offset(tile, tl.cdiv(tl.cdiv(K, GROUP_SIZE), 2), 16, ROW_TILES) + offs, pair


_FROM_LANE = tl.constexpr(tuple(f"shfl.sync.idx.b32 $0, $1, {lane}, 0x1c1f, 0xffffffff;" for lane in range(4)))


@triton.jit
def _from_lane(pairs, LANE: tl.constexpr, DTYPE: tl.constexpr, USE_ASM: tl.constexpr):
    """Of every four lanes, a row's, what lane LANE has of `pairs`, [T] as _pairs_tile reads them."""
    T: tl.constexpr = pairs.shape[0]
    if DTYPE == tl.int16 and USE_ASM:
        # No gather may lead to a tl.dot: it has a layout of its own. This instruction has any in which lanes are the
        # last dimension, as in what is loaded, and looks into segments of four of them (0x1c); all threads come by.
        return tl.inline_asm_elementwise(_FROM_LANE[LANE], "=r,r", [pairs], tl.int32, is_pure=True, pack=1)
    else:
        return tl.gather(pairs.reshape(T // 4, 4), tl.full([T // 4, 4], LANE, tl.int32), 1).reshape(T)


@triton.jit
def _of_group(
    pairs,  # as _pairs_tile reads them
    group: tl.constexpr,
    GROUPS: tl.constexpr,
    PAIRS: tl.constexpr,
    SHARED: tl.constexpr,
    DTYPE: tl.constexpr,
    ROW_TILES: tl.constexpr,
    WARP_UNITS: tl.constexpr,
    WARPS: tl.constexpr,
    OF_UNIT: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """The scale (or zero) of group `group` of GROUPS in every unit, as _split_pairs gives it: [2 * ROW_TILES *
    WARP_UNITS * WARPS * 32], in the order of _weight_tile. OF_UNIT: as in _multiply_units."""
    if SHARED:  # handed over by the lane of the row that has it: four times as many words would fill registers
        UNIT_0: tl.constexpr = 0 if OF_UNIT is None else OF_UNIT
        first = _from_lane(pairs, (UNIT_0 * GROUPS + group) // 2, DTYPE, USE_ASM)
        if WARP_UNITS == 2:
            second = _from_lane(pairs, (GROUPS + group) // 2, DTYPE, USE_ASM)
            first = first.reshape(2 * ROW_TILES, 1, WARPS, 32)
            first = tl.where(tl.arange(0, 2)[None, :, None, None] == 0, first, second.reshape(first.shape))
        pairs = first.reshape(2 * ROW_TILES * WARP_UNITS * WARPS * 32)
    elif GROUPS == 4:
        pairs = pairs.reshape(2 * ROW_TILES, WARP_UNITS, 2, WARPS, 32).permute(0, 1, 3, 4, 2)
        first, second = tl.split(pairs)
        pairs = first if group < 2 else second
    low, high = _split_pairs(pairs, DTYPE)
    if PAIRS == 0:  # one group a warp: the first or the second of a pair
        is_first = tl.arange(0, 2 * ROW_TILES * WARPS * 32) // 32 % 2 == 0
        return tl.where(is_first, low, high)
    elif GROUPS > 1:
        return low if group % 2 == 0 else high
    elif OF_UNIT is not None:  # a pair is that of the two units
        return low if OF_UNIT == 0 else high
    elif DTYPE == tl.int16:  # no join may lead to a tl.dot
        low = low.reshape(2 * ROW_TILES, 1, WARPS, 32)
        return tl.where(tl.arange(0, 2)[None, :, None, None] == 0, low, high.reshape(low.shape))
    else:
        return tl.join(low, high).reshape(2 * ROW_TILES, WARPS, 32, 2).permute(0, 3, 1, 2)


@triton.jit
def _group_factor(factor, ROW_TILES: tl.constexpr, WARP_UNITS: tl.constexpr, WARPS: tl.constexpr):
    """What _of_group gives, as [WARP_UNITS, WARPS, ROW_TILES, 2, 8, 1, 4, 1]: as sums lie."""
    factor = factor.reshape(ROW_TILES, 2, WARP_UNITS, WARPS, 8, 4).permute(2, 3, 0, 1, 4, 5)
    return factor[:, :, :, :, :, None, :, None]


@triton.jit
def _weights_operand(
    packed, ROW_TILES: tl.constexpr, WARP_UNITS: tl.constexpr, WARPS: tl.constexpr, UNIT: tl.constexpr
):
    """What is in the order of _weight_tile as [WARP_UNITS * WARPS, 16 * ROW_TILES, UNIT / 4]."""
    packed = packed.reshape(2 * ROW_TILES, WARP_UNITS, WARPS, 8, 4, UNIT // 32, 2)  # half, unit, warp, r, t, b, p
    return packed.permute(1, 2, 0, 3, 5, 4, 6).reshape(WARP_UNITS * WARPS, 16 * ROW_TILES, UNIT // 4)


@triton.jit
def _split_units(values, ROW_TILES: tl.constexpr):
    """What is [T, C] in the order of _weight_tile, of two units a warp, as two tensors [T / 2, C], of one each."""
    T: tl.constexpr = values.shape[0]
    C: tl.constexpr = values.shape[1]
    units = values.reshape(2 * ROW_TILES, 2, T // (4 * ROW_TILES), C).permute(0, 2, 3, 1)
    first, second = tl.split(units)
    return first.reshape(T // 2, C), second.reshape(T // 2, C)


@triton.jit
def _load_units(
    x_ptr,
    block_m,
    step,
    first_unit,  # of step 0
    M,
    K,  # from which on x counts as 0
    stride_xm,
    UNITS_AT_ONCE: tl.constexpr,
    WARP_UNITS: tl.constexpr,
    WARPS: tl.constexpr,
    X_TILES: tl.constexpr,
    WHOLE_STEPS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """What meets the weights of a step: a tuple of _load_planes of all units of a warp at once, or of each."""
    warp = step * WARPS + tl.arange(0, WARPS)[None, :, None, None, None]
    unit = first_unit + warp * WARP_UNITS + tl.arange(0, UNITS_AT_ONCE)[None, None, None, :, None]
    first = _load_planes(x_ptr, block_m, unit, M, K, stride_xm, X_TILES, WHOLE_STEPS, UNIT)
    if UNITS_AT_ONCE == WARP_UNITS:
        return (first,)
    else:
        return first, _load_planes(x_ptr, block_m, unit + 1, M, K, stride_xm, X_TILES, WHOLE_STEPS, UNIT)


@triton.jit
def _load_planes(
    x_ptr,
    block_m,
    unit,  # [1, WARPS, 1, UNITS, 1]
    M,
    K,
    stride_xm,
    X_TILES: tl.constexpr,
    WHOLE_STEPS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """_load_plane of all four planes."""
    return (
        _load_plane(x_ptr, block_m, unit, 0, M, K, stride_xm, X_TILES, WHOLE_STEPS, UNIT),
        _load_plane(x_ptr, block_m, unit, 1, M, K, stride_xm, X_TILES, WHOLE_STEPS, UNIT),
        _load_plane(x_ptr, block_m, unit, 2, M, K, stride_xm, X_TILES, WHOLE_STEPS, UNIT),
        _load_plane(x_ptr, block_m, unit, 3, M, K, stride_xm, X_TILES, WHOLE_STEPS, UNIT),
    )


@triton.jit
def _load_plane(
    x_ptr,  # [M, K] bf16 or fp16, rows stride_xm apart
    block_m,
    unit,  # [1, WARPS, 1, UNITS, 1]
    PLANE: tl.constexpr,
    M,
    K,
    stride_xm,
    X_TILES: tl.constexpr,
    WHOLE_STEPS: tl.constexpr,
    UNIT: tl.constexpr,
):
    """What meets nibble PLANE of the weights of these units: [UNITS * WARPS, UNIT / 4, 8 * X_TILES], columns renamed as
    those of W, and zero from K on."""
    WARPS: tl.constexpr = unit.shape[1]
    UNITS: tl.constexpr = unit.shape[3]
    E: tl.constexpr = UNIT // 16
    lane = tl.arange(0, 32)[:, None, None, None, None]
    row = block_m * (8 * X_TILES) + lane // 4 + 8 * tl.arange(0, X_TILES)[None, None, :, None, None]
    k = unit * UNIT + PLANE * (UNIT // 4) + lane % 4 * E + tl.arange(0, E)
    is_there = row < M if WHOLE_STEPS else (row < M) & (k < K)
    x = tl.load(x_ptr + row.to(tl.int64) * stride_xm + k, mask=is_there, other=0.0)
    x = x.reshape(8, 4, WARPS, X_TILES, UNITS, E // 2, 2)  # r, t, warp, tile, unit, b, p
    return x.permute(4, 2, 5, 1, 6, 3, 0).reshape(UNITS * WARPS, UNIT // 4, 8 * X_TILES)


@triton.jit
def _fma(x, y, z, AT_ONCE: tl.constexpr):
    """x * y + z with one rounding; shapes are broadcast to that of z.

    LLVM makes vectors of these where the sums are stored as vectors, and computes them behind all products of a step:
    that hides how long a product takes, and holds the sums of all its groups. AT_ONCE: it is kept from it, by PTX.
    """
    x, y = x.broadcast_to(z.shape), y.broadcast_to(z.shape)
    if AT_ONCE:
        return tl.inline_asm_elementwise("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [x, y, z], tl.float32, True, 1)
    else:
        return tl.fma(x, y, z)


@triton.jit
def _halves(x):
    """x[0] and x[1] of a tensor whose first dimension is 2; it has eight."""
    return tl.split(x.permute(1, 2, 3, 4, 5, 6, 7, 0))


@triton.jit
def _multiply_units(
    planes,  # as _load_planes gives them
    packed,  # as _weight_tile and _pairs_tile read them
    scales,
    zeros,
    s_ptr,
    z_ptr,
    total,
    x_total,
    ROW_TILES: tl.constexpr,
    WARP_UNITS: tl.constexpr,
    WARPS: tl.constexpr,
    X_TILES: tl.constexpr,
    PAIRS: tl.constexpr,
    SHARED: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    USE_ASM: tl.constexpr,
    SCALE_AT_ONCE: tl.constexpr,  # see _fma
    OF_UNIT: tl.constexpr,  # None, or which of a warp's two units the only one here is: scales and zeros are of both
):
    """Adds x times the weights of these units, over UNPACKED, to `total`, fp32 [WARPS, ROW_TILES, 2, 8, X_TILES, 4, 2],
    and for zeros per channel the sums of x to `x_total`, the same in every row of its only tile."""
    COLS: tl.constexpr = UNIT // 4
    ROWS: tl.constexpr = 16 * ROW_TILES
    BATCH: tl.constexpr = WARP_UNITS * WARPS
    BLOCK_M: tl.constexpr = 8 * X_TILES
    GROUP: tl.constexpr = UNIT if GROUP_SIZE == -1 else GROUP_SIZE
    DTYPE: tl.constexpr = planes[0].dtype
    INTEGER_ZEROS: tl.constexpr = are_integers(z_ptr, GROUP_SIZE)
    OTHER_ZEROS: tl.constexpr = z_ptr is not None and not INTEGER_ZEROS
    packed = _weights_operand(packed, ROW_TILES, WARP_UNITS, WARPS, UNIT)
    ones = tl.full([BATCH, 16, COLS], 1.0, DTYPE)

    partial = tl.zeros([BATCH, ROWS, BLOCK_M], tl.float32)
    x_sum = tl.zeros([BATCH, 16, BLOCK_M], tl.float32)
    for plane in tl.static_range(4):
        x = planes[plane]
        subtracted = None
        if INTEGER_ZEROS:
            zero = _of_group(
                zeros, plane * COLS // GROUP, UNIT // GROUP, PAIRS, SHARED, tl.int16,
                ROW_TILES, WARP_UNITS, WARPS, OF_UNIT, USE_ASM,
            ).reshape(2 * ROW_TILES * WARP_UNITS * WARPS * 32, 1)  # fmt: skip
            zero = zero.broadcast_to(2 * ROW_TILES * WARP_UNITS * WARPS * 32, UNIT // 16)
            subtracted = _weights_operand(zero, ROW_TILES, WARP_UNITS, WARPS, UNIT)
        partial = tl.dot(unpack_plane(packed, subtracted, plane, DTYPE, USE_ASM), x, partial)
        if OTHER_ZEROS:
            x_sum = tl.dot(ones, x, x_sum)  # the sum over k, in the layout of a tile of partial
        if (plane + 1) * COLS % GROUP == 0:  # a group ends here
            sums = partial.reshape(WARP_UNITS, WARPS, ROW_TILES, 2, 8, X_TILES, 4, 2)
            x_sums = x_sum.reshape(WARP_UNITS, WARPS, 1, 2, 8, X_TILES, 4, 2)
            # In one form and order, whether a warp's units come together or one after the other: a compiler that sees a
            # sum of products may fuse either of them with the sum, and does so differently for each row of x.
            if GROUP_SIZE == -1 and WARP_UNITS == 1:
                total += sums.reshape(total.shape)
                x_total += x_sums.reshape(x_total.shape)
            elif GROUP_SIZE == -1:
                first, second = _halves(sums)
                total = total + first + second
                first, second = _halves(x_sums)
                x_total = x_total + first + second
            else:
                if OTHER_ZEROS:
                    zero = _of_group(
                        zeros, plane * COLS // GROUP, UNIT // GROUP, PAIRS, SHARED, z_ptr.dtype.element_ty,
                        ROW_TILES, WARP_UNITS, WARPS, OF_UNIT, USE_ASM,
                    )  # fmt: skip
                    zero = _group_factor(zero, ROW_TILES, WARP_UNITS, WARPS)
                    sums = _fma(x_sums, (8.0 - zero) * (1.0 / UNPACKED), sums, SCALE_AT_ONCE)
                scale = _of_group(
                    scales, plane * COLS // GROUP, UNIT // GROUP, PAIRS, SHARED, s_ptr.dtype.element_ty,
                    ROW_TILES, WARP_UNITS, WARPS, OF_UNIT, USE_ASM,
                )  # fmt: skip
                scale = _group_factor(scale, ROW_TILES, WARP_UNITS, WARPS)
                if WARP_UNITS == 1:
                    scale = scale.reshape(scale.shape[1:])
                    total = _fma(sums.reshape(total.shape), scale, total, SCALE_AT_ONCE)
                else:
                    first, second = _halves(sums)
                    first_scale, second_scale = _halves(scale)
                    total = _fma(first, first_scale, total, SCALE_AT_ONCE)
                    total = _fma(second, second_scale, total, SCALE_AT_ONCE)
            partial = tl.zeros([BATCH, ROWS, BLOCK_M], tl.float32)
            x_sum = tl.zeros([BATCH, 16, BLOCK_M], tl.float32)
    return total, x_total


@triton.jit
def _multiply_step(
    x_units,  # as _load_units gives it
    packed,
    scales,
    zeros,
    s_ptr,
    z_ptr,
    total,
    x_total,
    ROW_TILES: tl.constexpr,
    WARP_UNITS: tl.constexpr,
    WARPS: tl.constexpr,
    X_TILES: tl.constexpr,
    PAIRS: tl.constexpr,
    SHARED: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    USE_ASM: tl.constexpr,
    SCALE_AT_ONCE: tl.constexpr,
):
    """_multiply_units of all units of a step, or of a warp's two, one after the other."""
    COUNT: tl.constexpr = len(x_units)
    packed_of = _split_units(packed, ROW_TILES) if COUNT == 2 else (packed,)
    for u in tl.static_range(COUNT):
        total, x_total = _multiply_units(
            x_units[u], packed_of[u], scales, zeros, s_ptr, z_ptr, total, x_total,
            ROW_TILES, WARP_UNITS // COUNT, WARPS, X_TILES, PAIRS, SHARED, UNIT, GROUP_SIZE, USE_ASM, SCALE_AT_ONCE,
            u if COUNT == 2 else None,
        )  # fmt: skip
    return total, x_total


@triton.jit
def _sum_of_block(
    total,  # of all steps
    x_total,
    s_ptr,
    z_ptr,
    block_n,
    N,
    WARPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
):
    """What the warps of a block have, added up: fp32 [ROWS, BLOCK_M]."""
    acc = add_warps(total.reshape(WARPS, ROWS, BLOCK_M), WARPS) * UNPACKED
    if GROUP_SIZE == -1:
        rows = tl.minimum(block_n * ROWS + tl.arange(0, ROWS), N - 1)  # one scale a row, so in the order of the rows
        if z_ptr is not None:
            zero = tl.load(z_ptr + rows).to(tl.float32)[:, None]
            x_sum = tl.max(add_warps(x_total.reshape(WARPS, 16, BLOCK_M), WARPS), 0)  # its rows are alike
            acc = _fma(8.0 - zero, x_sum[None, :], acc, False)
        acc *= tl.load(s_ptr + rows).to(tl.float32)[:, None]
    return acc


@triton.jit
def _row_offsets(offs_n, N, units, pairs, COLS: tl.constexpr, GROUP_SIZE: tl.constexpr):
    """(offsets of the first int16 of rows offs_n of W, of their first pair of scales), int64. A row has `units` units
    and `pairs` pairs; per channel it has one scale in place of pairs. Rows past N repeat the last tile."""
    tile = tl.minimum(offs_n // 16, tl.cdiv(N, 16) - 1).to(tl.int64)
    w_rows = tile * units * (16 * COLS) + offs_n % 16 * COLS
    return w_rows, (tile if GROUP_SIZE == -1 else tile * pairs) * 16 + offs_n % 16


@triton.jit
def int4_tile(
    x_ptr,  # [M, K] bf16 or fp16, rows stride_xm apart
    w_ptr,  # [N / 16, UNITS, 16, UNIT / 4] int16
    s_ptr,  # [N / 16, PAIRS, 16, 2]; per channel [N / 16, 1, 16, 1]
    z_ptr,  # like s_ptr
    block_n,  # which BLOCK_N rows of W
    offs_m,  # [BLOCK_M] rows of x
    M,
    N,
    K,
    stride_xm,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SLICES: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,  # -1: per-channel
    HAS_ZEROS: tl.constexpr,
    STAGES: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """W[block_n's rows] @ x[offs_m].T -> fp32 [BLOCK_N, BLOCK_M], through shared memory: what the fused FFN is made of.

    Slice i of SLICES takes a contiguous run of steps (STEP units: two groups or more); what is past the end is clamped
    to the last one and multiplied by x = 0, so that no load of weights has a mask. Rows past N repeat the last tile and
    are not stored by the caller.
    """
    COLS: tl.constexpr = UNIT // 4
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    STEP: tl.constexpr = 2 if GROUP_SIZE == UNIT else 1
    PAIRS: tl.constexpr = STEP * UNIT // GROUP_SIZE // 2  # a step; unused per channel
    units = tl.cdiv(K, UNIT)
    steps = tl.cdiv(units, STEP)
    per_slice = tl.cdiv(steps, SLICES)

    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, COLS)
    slices = tl.arange(0, SLICES)
    w_rows, s_rows = _row_offsets(offs_n, N, units, steps.to(tl.int64) * PAIRS, COLS, GROUP_SIZE)  # [BLOCK_N]
    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, None, :] * stride_xm + offs_c[None, :, None]  # [1, COLS, BLOCK_M]
    ones = tl.full([SLICES, BLOCK_N, COLS], 1.0, DTYPE)

    acc = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)
    x_sum = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)  # only per-channel zeros carry it from unit to unit
    for i in tl.range(0, per_slice, num_stages=STAGES):
        step = slices * per_slice + i  # [SLICES]
        pair = tl.minimum(step, steps - 1) * PAIRS  # [SLICES]
        for u in tl.static_range(STEP):
            unit = step * STEP + u  # [SLICES]
            w_unit = tl.minimum(unit, units - 1) * (16 * COLS)
            packed = tl.load(
                w_ptr + w_rows[None, :, None] + w_unit[:, None, None] + offs_c[None, None, :]
            )  # [SLICES, BLOCK_N, COLS] int16
            partial = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)
            for plane in tl.static_range(4):
                k = unit * UNIT + plane * COLS  # [SLICES]
                mask_x = (offs_m < M)[None, None, :] & (k[:, None, None] + offs_c[None, :, None] < K)
                x = tl.load(x_ptrs + k[:, None, None], mask=mask_x, other=0.0)  # [SLICES, COLS, BLOCK_M]
                partial = tl.dot(unpack_plane(packed, None, plane, DTYPE, USE_ASM), x, partial)
                if HAS_ZEROS:
                    x_sum = tl.dot(ones, x, x_sum)  # the sum over k, broadcast to every row, in the layout of partial
                if GROUP_SIZE != -1:
                    if (plane + 1) * COLS % GROUP_SIZE == 0:  # a group ends here
                        if (u * UNIT + plane * COLS) // GROUP_SIZE % 2 == 0:  # the first of a pair
                            s_offs = (
                                s_rows[None, :] + ((pair + (u * UNIT + plane * COLS) // GROUP_SIZE // 2) * 16)[:, None]
                            )  # [SLICES, BLOCK_N]
                            scale, next_scale = _load_pair(s_ptr, s_offs)
                            if HAS_ZEROS:
                                zero, next_zero = _load_pair(z_ptr, s_offs)
                        else:
                            scale = next_scale
                            if HAS_ZEROS:
                                zero = next_zero
                        if HAS_ZEROS:
                            partial -= ((zero - 8.0) * (1.0 / UNPACKED))[:, :, None] * x_sum
                            x_sum = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)
                        acc += scale[:, :, None] * partial
                        partial = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)
            if GROUP_SIZE == -1:
                acc += partial
    out = tl.sum(acc, 0) * UNPACKED  # [BLOCK_N, BLOCK_M]
    if GROUP_SIZE == -1:
        if HAS_ZEROS:
            out -= (tl.load(z_ptr + s_rows).to(tl.float32) - 8.0)[:, None] * tl.sum(x_sum, 0)
        out *= tl.load(s_ptr + s_rows).to(tl.float32)[:, None]
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit(launch_metadata=int4_gemm_cost, do_not_specialize=["M"])
def _int4_decode_kernel(
    x_ptr,  # [M, K]
    w_ptr,  # [N / 16, UNITS, 16, UNIT / 4] int16
    s_ptr,  # [N / 16, PAIRS, 16, 2]; per channel [N / 16, 1, 16, 1]
    z_ptr,  # like s_ptr, or None
    gate_ptr,  # a second weight in the same form, or None: y = act(x @ gate.T) * (x @ W.T)
    gate_s_ptr,
    gate_z_ptr,
    bias_ptr,  # [N] or None; not with a gate
    y_ptr,  # [M, N], contiguous
    partial_ptr,  # as in store_split; None with one split or a cluster
    counter_ptr,
    M,
    N,
    K,
    stride_xm,
    ROW_TILES: tl.constexpr,
    WARP_UNITS: tl.constexpr,
    WARPS: tl.constexpr,
    X_TILES: tl.constexpr,
    SPLITS: tl.constexpr,  # 1 with a gate
    CLUSTER: tl.constexpr,  # the splits of a tile add up in shared memory, not in partial_ptr
    ONE_STEP: tl.constexpr,  # is all that a split has of K: its weights go straight into registers
    WHOLE_STEPS: tl.constexpr,  # K ends with a step, and each split has as many
    EVEN_SPLITS: tl.constexpr,  # of one step, in which not all warps have work, so that each split has as many units
    STAGES: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    LANES_SHARE: tl.constexpr,  # pairs of scales, and of zeros: see _of_group
    MANY_REGISTERS: tl.constexpr,  # a thread has 128 or more
    ACTIVATION: tl.constexpr,  # of the gate
    USE_ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Few rows of x: a block owns 16 * ROW_TILES rows of W and a SPLITS-th of K, which its warps split among them."""
    tl.static_assert(WARPS * WARP_UNITS * UNIT >= 2 * GROUP_SIZE, "a step is two groups or more")
    tl.static_assert(WARP_UNITS <= 2 and (SPLITS == 1 or gate_ptr is None))
    tl.static_assert(not CLUSTER or (ONE_STEP and 1 < SPLITS and SPLITS <= 8))
    ROWS: tl.constexpr = 16 * ROW_TILES
    BLOCK_M: tl.constexpr = 8 * X_TILES
    PAIRS: tl.constexpr = WARP_UNITS * UNIT // GROUP_SIZE // 2  # a warp and step; 0: half a one; unused per channel
    STEP_PAIRS: tl.constexpr = WARPS * WARP_UNITS * UNIT // GROUP_SIZE // 2
    # The units of a warp: one after the other they hold fewer registers, side by side more products are under way. In
    # small groups this decides the order of sums, so it must not depend on X_TILES.
    ONE_GROUP: tl.constexpr = GROUP_SIZE == -1 or GROUP_SIZE == UNIT
    IN_TURN: tl.constexpr = ROW_TILES * X_TILES == 8 if ONE_GROUP else SPLITS > 1
    MAY_TURN: tl.constexpr = ONE_GROUP or LANES_SHARE  # pairs that lanes do not share are of both units, in one tensor
    UNITS_AT_ONCE: tl.constexpr = 1 if MAY_TURN and (IN_TURN or not ONE_STEP) else WARP_UNITS
    # Lanes that share pairs hold and load less, and have to hand them over: where one step of one block is all, which
    # has registers to spare, that is slower. Sums of groups are scaled at once in one step, where that spares most
    # registers, and where it was faster in a ring: with zeros and registers enough, but for the many sums of a pair.
    IS_ALL: tl.constexpr = ONE_STEP and SPLITS == 1
    SHARED: tl.constexpr = PAIRS > 1 and LANES_SHARE and not IS_ALL
    MANY_SUMS: tl.constexpr = gate_ptr is not None and WARP_UNITS * X_TILES == 4
    IN_A_RING: tl.constexpr = MANY_REGISTERS and z_ptr is not None and not MANY_SUMS
    SCALE_AT_ONCE: tl.constexpr = USE_ASM and not ONE_GROUP and not IS_ALL and (ONE_STEP or IN_A_RING)
    NOTHING: tl.constexpr = None if WHOLE_STEPS else 0  # what stands past K where it ends within a step
    split = tl.program_id(0) % SPLITS
    block_m = tl.program_id(0) // SPLITS
    block_n = tl.program_id(1)
    if CLUSTER:
        buffer = shared_buffer(cluster_words(SPLITS, ROWS * BLOCK_M))
        begin_cluster_sum(buffer, SPLITS, ROWS * BLOCK_M, 32 * WARPS)
    units = tl.cdiv(K, UNIT)
    steps = tl.cdiv(units, WARPS * WARP_UNITS)
    per_split = tl.cdiv(steps, SPLITS)
    first, last = split * per_split, tl.minimum(split * per_split + per_split, steps)
    from_step = 0
    if ONE_STEP:  # a loop of a known length of one is none
        first, last, from_step = 0, 1, split
    first_unit, end = 0, K
    if EVEN_SPLITS:
        share = tl.cdiv(units, 2 * SPLITS) * 2
        first_unit, from_step = split * share, 0
        end = tl.minimum(K, (first_unit + share) * UNIT)
    w_offs, w_unit = _weight_tile(block_n, N, K, ROW_TILES, WARP_UNITS, WARPS, UNIT)
    if GROUP_SIZE != -1:
        s_offs, s_pair = _pairs_tile(block_n, N, K, ROW_TILES, WARPS, PAIRS, SHARED, GROUP_SIZE)
        pairs = tl.cdiv(tl.cdiv(K, GROUP_SIZE), 2)
    if EVEN_SPLITS:  # from here on they are of this split
        w_offs, units = w_offs + first_unit * (4 * UNIT), tl.minimum(units - first_unit, share)
        if GROUP_SIZE != -1:
            first_pair = first_unit * UNIT // GROUP_SIZE // 2
            s_offs, pairs = s_offs + first_pair * 16, tl.minimum(pairs - first_pair, share * UNIT // GROUP_SIZE // 2)
    total = tl.zeros([WARPS, ROW_TILES, 2, 8, X_TILES, 4, 2], tl.float32)
    x_total = tl.zeros([WARPS, 1, 2, 8, X_TILES, 4, 2], tl.float32)
    gate_total, gate_x_total = total, x_total
    for i in tl.range(first, last, num_stages=STAGES):
        step = from_step + i
        in_w, in_s = None, None
        if not WHOLE_STEPS:
            in_w = step * (WARPS * WARP_UNITS) + w_unit < units
        w_step = w_offs + step * (WARPS * WARP_UNITS * 4 * UNIT)
        packed = tl.load(w_ptr + w_step, mask=in_w, other=NOTHING)
        scales, zeros, gate_packed, gate_scales, gate_zeros = packed, packed, packed, packed, packed
        if gate_ptr is not None:
            gate_packed = tl.load(gate_ptr + w_step, mask=in_w, other=NOTHING)
        if GROUP_SIZE != -1:
            if not WHOLE_STEPS:
                in_s = step * STEP_PAIRS + s_pair < pairs
            s_step = s_offs + step * (STEP_PAIRS * 16)
            scales = tl.load(_pair_ptr(s_ptr) + s_step, mask=in_s, other=NOTHING)
            if z_ptr is not None:
                zeros = tl.load(_pair_ptr(z_ptr) + s_step, mask=in_s, other=NOTHING)
            if gate_ptr is not None:
                gate_scales = tl.load(_pair_ptr(gate_s_ptr) + s_step, mask=in_s, other=NOTHING)
                if z_ptr is not None:
                    gate_zeros = tl.load(_pair_ptr(gate_z_ptr) + s_step, mask=in_s, other=NOTHING)
        # The pipeline fetches the loads above ahead, those of the first stages before the loop and so before the wait.
        # It does not look into a branch: what is read in here is read when its turn comes, after the wait.
        if i < last:
            if i == first:
                if CLUSTER:
                    join_cluster()
                wait_for_previous(PDL)
            x_units = _load_units(
                x_ptr, block_m, step, first_unit, M, end, stride_xm,
                UNITS_AT_ONCE, WARP_UNITS, WARPS, X_TILES, WHOLE_STEPS, UNIT,
            )  # fmt: skip
            total, x_total = _multiply_step(
                x_units, packed, scales, zeros, s_ptr, z_ptr, total, x_total,
                ROW_TILES, WARP_UNITS, WARPS, X_TILES, PAIRS, SHARED, UNIT, GROUP_SIZE, USE_ASM, SCALE_AT_ONCE,
            )  # fmt: skip
            if gate_ptr is not None:
                gate_total, gate_x_total = _multiply_step(
                    x_units, gate_packed, gate_scales, gate_zeros, gate_s_ptr, gate_z_ptr, gate_total, gate_x_total,
                    ROW_TILES, WARP_UNITS, WARPS, X_TILES, PAIRS, SHARED, UNIT, GROUP_SIZE, USE_ASM, SCALE_AT_ONCE,
                )  # fmt: skip

    acc = _sum_of_block(total, x_total, s_ptr, z_ptr, block_n, N, WARPS, ROWS, BLOCK_M, GROUP_SIZE)
    if gate_ptr is not None:
        gate = _sum_of_block(
            gate_total, gate_x_total, gate_s_ptr, gate_z_ptr, block_n, N, WARPS, ROWS, BLOCK_M, GROUP_SIZE
        )
        acc *= activate(gate, ACTIVATION)
    if SPLITS > 1 and not ONE_STEP:  # one that has no step must not write early either
        wait_for_previous(PDL)
    out_tile = block_m * tl.num_programs(1) + block_n
    first_n = block_n * ROWS
    offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    if CLUSTER:
        total = cluster_sum(acc, buffer, split, SPLITS)
        if split < cluster_adders(SPLITS):
            offs_n = first_n + split * total.shape[0] + tl.arange(0, total.shape[0])
            store_tile(total, bias_ptr, y_ptr, offs_n, offs_m, M, N)
    else:
        store_split(acc, bias_ptr, y_ptr, partial_ptr, counter_ptr, out_tile, split, first_n, offs_m, M, N, SPLITS)


@triton.jit
def store_tile(acc, bias_ptr, y_ptr, offs_n, offs_m, M, N):
    """y[offs_m, offs_n] = acc.T + bias; acc fp32 [BLOCK_N, BLOCK_M], y contiguous [M, N], bias_ptr [N] or None."""
    mask_n = offs_n < N
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + offs_m.to(tl.int64)[None, :] * N + offs_n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_n[:, None] & (offs_m < M)[None, :])


@triton.jit
def store_split(
    acc,  # fp32 [BLOCK_N, BLOCK_M], of one split of K
    bias_ptr,
    y_ptr,
    partial_ptr,  # fp32 [output tiles, SPLITS, BLOCK_N, BLOCK_M]; None with one split
    counter_ptr,  # int32 [output tiles], zero before and after; None with one split
    out_tile,
    split,
    first_n,  # of the tile's rows of W
    offs_m,
    M,
    N,
    SPLITS: tl.constexpr,
):
    """store_tile of the sum over all SPLITS blocks of an output tile, by the last of them to arrive."""
    BLOCK_N: tl.constexpr = acc.shape[0]
    BLOCK_M: tl.constexpr = acc.shape[1]
    if SPLITS == 1:
        store_tile(acc, bias_ptr, y_ptr, first_n + tl.arange(0, BLOCK_N), offs_m, M, N)
    else:
        partial_ptr += out_tile.to(tl.int64) * (SPLITS * BLOCK_N * BLOCK_M)
        offs_acc = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        tl.store(partial_ptr + split * (BLOCK_N * BLOCK_M) + offs_acc, acc)
        if arrive(counter_ptr + out_tile) == SPLITS - 1:
            ROWS: tl.constexpr = BLOCK_N if BLOCK_N * BLOCK_M < 128 * 128 else 32  # so few that registers hold them
            for first in tl.range(0, BLOCK_N, ROWS, num_stages=1):
                rows = first + tl.arange(0, ROWS)
                offs = rows[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
                total = tl.zeros([ROWS, BLOCK_M], tl.float32)
                for s in tl.static_range(SPLITS):  # in one order, whoever came last
                    total += tl.load(partial_ptr + s * (BLOCK_N * BLOCK_M) + offs, cache_modifier=".cg")
                store_tile(total, bias_ptr, y_ptr, first_n + rows, offs_m, M, N)
            tl.store(counter_ptr + out_tile, 0)


@triton.jit(launch_metadata=int4_gemm_cost, do_not_specialize=["M"])
def _int4_gemm_kernel(
    x_ptr,  # [M, K]
    w_ptr,  # [N / 16, UNITS, 16, UNIT / 4] int16
    s_ptr,  # [N / 16, PAIRS, 16, 2]; per channel [N / 16, 1, 16, 1]
    z_ptr,  # like s_ptr, or None
    bias_ptr,  # [N] or None
    y_ptr,  # [M, N], contiguous
    partial_ptr,  # as in store_split; None with one split
    counter_ptr,
    M,
    N,
    K,
    stride_xm,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLITS: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    STAGES: tl.constexpr,
    USE_ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """Many rows of x: the warps of a block own rows of W and share x, K is split over blocks. Blocks that share rows of
    W are neighbours: in prefill W comes from L2."""
    COLS: tl.constexpr = UNIT // 4
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    INTEGER_ZEROS: tl.constexpr = are_integers(z_ptr, GROUP_SIZE)
    OTHER_ZEROS: tl.constexpr = z_ptr is not None and not INTEGER_ZEROS
    GROUPS: tl.constexpr = UNIT // GROUP_SIZE  # a unit; unused per channel
    units = tl.cdiv(K, UNIT)
    per_split = tl.cdiv(units, SPLITS)
    split = tl.program_id(0) % SPLITS
    block_m = tl.program_id(0) // SPLITS
    block_n = tl.program_id(1)

    wait_for_previous(PDL)

    offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, COLS)
    w_rows, s_rows = _row_offsets(offs_n, N, units, tl.cdiv(units * GROUPS, 2), COLS, GROUP_SIZE)  # [BLOCK_N]
    w_ptrs = w_ptr + w_rows[:, None] + offs_c[None, :]  # [BLOCK_N, COLS]
    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, :] * stride_xm + offs_c[:, None]  # [COLS, BLOCK_M]
    ones = tl.full([BLOCK_N, COLS], 1.0, DTYPE)

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    x_sum = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for i in tl.range(0, per_split, num_stages=STAGES):
        unit = split * per_split + i
        there = tl.minimum(unit, units - 1)  # past the end: the last, multiplied by x = 0
        packed = tl.load(w_ptrs + there * (16 * COLS))  # [BLOCK_N, COLS] int16
        partial = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for plane in tl.static_range(4):
            k = unit * UNIT + plane * COLS
            mask_x = (offs_m < M)[None, :] & (k + offs_c < K)[:, None]
            x = tl.load(x_ptrs + k, mask=mask_x, other=0.0)  # [COLS, BLOCK_M]
            subtracted = None
            if INTEGER_ZEROS:
                if plane * COLS % GROUP_SIZE == 0:  # a group begins here
                    pairs = _pair_ptr(z_ptr) + (s_rows + (there * GROUPS + plane * COLS // GROUP_SIZE) // 2 * 16)
                    if GROUPS == 1:
                        # One of two loads counts: Triton brings what leads to a product into the product's layout where
                        # it is loaded, but for a choice by `there`, and else through shared memory.
                        zero, _ = _split_pairs(tl.load(pairs, mask=there % 2 == 0, other=0), tl.int16)
                        _, odd_zero = _split_pairs(tl.load(pairs, mask=there % 2 == 1, other=0), tl.int16)
                        zero += odd_zero
                    elif plane * COLS // GROUP_SIZE % 2 == 0:
                        zero, next_zero = _split_pairs(tl.load(pairs), tl.int16)
                    else:
                        zero = next_zero
                subtracted = zero[:, None].broadcast_to(BLOCK_N, COLS)
            partial = tl.dot(unpack_plane(packed, subtracted, plane, DTYPE, USE_ASM), x, partial)
            if OTHER_ZEROS:
                x_sum = tl.dot(ones, x, x_sum)
            if GROUP_SIZE != -1:
                if (plane + 1) * COLS % GROUP_SIZE == 0:  # a group ends here
                    if GROUPS == 1 or plane * COLS // GROUP_SIZE % 2 == 0:
                        s_offs = s_rows + (there * GROUPS + plane * COLS // GROUP_SIZE) // 2 * 16  # [BLOCK_N]
                        scale, next_scale = _load_pair(s_ptr, s_offs)
                        if OTHER_ZEROS:
                            zero, next_zero = _load_pair(z_ptr, s_offs)
                        if GROUPS == 1:  # which of the pair
                            scale = tl.where(there % 2 == 0, scale, next_scale)
                            if OTHER_ZEROS:
                                zero = tl.where(there % 2 == 0, zero, next_zero)
                    else:
                        scale = next_scale
                        if OTHER_ZEROS:
                            zero = next_zero
                    if OTHER_ZEROS:
                        partial -= ((zero - 8.0) * (1.0 / UNPACKED))[:, None] * x_sum
                        x_sum = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                    acc += scale[:, None] * partial
                    partial = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        if GROUP_SIZE == -1:
            acc += partial
    acc *= UNPACKED
    if GROUP_SIZE == -1:
        if OTHER_ZEROS:
            acc -= (tl.load(z_ptr + s_rows).to(tl.float32) - 8.0)[:, None] * x_sum
        acc *= tl.load(s_ptr + s_rows).to(tl.float32)[:, None]

    out_tile = block_m * tl.num_programs(1) + block_n
    first_n = block_n * BLOCK_N
    store_split(acc, bias_ptr, y_ptr, partial_ptr, counter_ptr, out_tile, split, first_n, offs_m, M, N, SPLITS)


@triton.jit
def _load_of_group(ptr, rows, group, GROUP_SIZE: tl.constexpr):
    """The scales, or zeros, of a group, for offsets of the first pair of each row, per channel of its scale.

    They are not fetched ahead: in shared memory numbers of 32 bits would take the place of a second block on an SM. So
    these come as two of 16 bits, of which the pipeline takes none.
    """
    offs = rows
    if GROUP_SIZE != -1:
        offs = (rows + group // 2 * 16) * 2 + group % 2
    if ptr.dtype.element_ty.primitive_bitwidth == 32:
        halves = ptr.to(tl.pointer_type(tl.uint16)) + offs * 2
        bits = tl.load(halves).to(tl.uint32) | (tl.load(halves + 1).to(tl.uint32) << 16)
        return bits.to(ptr.dtype.element_ty, bitcast=True)
    else:
        return tl.load(ptr + offs)


@triton.jit
def _load_of_rows(ptr, s_rows, group, GROUP_SIZE: tl.constexpr):
    """What _load_of_group gives for all rows of a block: [BLOCK_N]; s_rows as in _scaled_plane."""
    first, second = s_rows
    found = _load_of_group(ptr, first, group, GROUP_SIZE)
    if second is not None:
        both = tl.join(found, _load_of_group(ptr, second, group, GROUP_SIZE))
        found = both.permute(1, 0).reshape(2 * first.shape[0])
    return found


@triton.jit
def _plane_of_rows(
    packed,  # [BLOCK_N, COLS] int16
    s_ptr,
    z_ptr,
    s_rows,  # (offsets of the first pair of each row, per channel of its scale, None), or of each half of the rows
    unit,
    PLANE: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    DTYPE: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """scaled_plane, with its scales and zeros from memory."""
    COLS: tl.constexpr = UNIT // 4
    INTEGER_ZEROS: tl.constexpr = are_integers(z_ptr, GROUP_SIZE)
    group = 0 if GROUP_SIZE == -1 else unit * (UNIT // GROUP_SIZE) + PLANE * COLS // GROUP_SIZE
    scale, zero = None, None
    if z_ptr is not None:
        zero = _load_of_rows(z_ptr, s_rows, group, GROUP_SIZE)
    if GROUP_SIZE != -1 or z_ptr is not None:
        scale = _load_of_rows(s_ptr, s_rows, group, GROUP_SIZE)
    return scaled_plane(packed, scale, zero, PLANE, INTEGER_ZEROS, DTYPE, USE_ASM)


@triton.jit(launch_metadata=int4_gemm_cost, do_not_specialize=["M"])
def _int4_prefill_kernel(
    x_ptr,  # [M, K]
    w_ptr,  # [N / 16, UNITS, 16, UNIT / 4] int16
    s_ptr,  # [N / 16, PAIRS, 16, 2]; per channel [N / 16, 1, 16, 1]
    z_ptr,  # like s_ptr, or None
    bias_ptr,  # [N] or None
    y_ptr,  # [M, N], contiguous
    partial_ptr,  # as in store_split; None with one split
    counter_ptr,
    M,
    N,
    K,
    stride_xm,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLITS: tl.constexpr,
    IN_HALVES: tl.constexpr,  # scales are loaded by two loads: see _prefill_launcher
    WHOLE_UNITS: tl.constexpr,  # K ends with a unit
    UNIT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    STAGES: tl.constexpr,
    USE_ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    """As _int4_gemm_kernel, with weights that are scaled, and so rounded, before the product: with many rows of x that
    costs less than scaling the sums of each group outside of the tensor core, and waiting for them."""
    COLS: tl.constexpr = UNIT // 4
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    units = tl.cdiv(K, UNIT)
    per_split = tl.cdiv(units, SPLITS)
    split = tl.program_id(0) % SPLITS
    block_m = tl.program_id(0) // SPLITS
    block_n = tl.program_id(1)

    wait_for_previous(PDL)

    offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, 2 * COLS)
    pairs = tl.cdiv(K, 2 * GROUP_SIZE)  # unused per channel
    w_rows, s_rows = _row_offsets(offs_n, N, units, pairs, COLS, GROUP_SIZE)
    w_ptrs = w_ptr + w_rows[:, None] + tl.arange(0, COLS)[None, :]  # [BLOCK_N, COLS]
    if IN_HALVES:
        half_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
        _, first_half = _row_offsets(half_n, N, units, pairs, COLS, GROUP_SIZE)
        _, second_half = _row_offsets(half_n + BLOCK_N // 2, N, units, pairs, COLS, GROUP_SIZE)
        s_rows = first_half, second_half
    else:
        s_rows = s_rows, None
    # In place of rows past M the first ones, which needs no mask (one row many times takes half as long again).
    rows = tl.where(offs_m < M, offs_m, tl.minimum(offs_m - M, M - 1)).to(tl.int64)
    x_ptrs = x_ptr + rows[None, :] * stride_xm + offs_k[:, None]  # [2 * COLS, BLOCK_M]

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for unit in tl.range(split * per_split, tl.minimum(split * per_split + per_split, units), num_stages=STAGES):
        packed = tl.load(w_ptrs + unit * (16 * COLS))  # [BLOCK_N, COLS] int16
        for half in tl.static_range(2):
            even = _plane_of_rows(packed, s_ptr, z_ptr, s_rows, unit, 2 * half, UNIT, GROUP_SIZE, DTYPE, USE_ASM)
            odd = _plane_of_rows(packed, s_ptr, z_ptr, s_rows, unit, 2 * half + 1, UNIT, GROUP_SIZE, DTYPE, USE_ASM)
            w = tl.join(even, odd).permute(0, 2, 1).reshape(BLOCK_N, 2 * COLS)  # within a thread's registers
            k = unit * UNIT + half * (2 * COLS)
            if WHOLE_UNITS:
                x = tl.load(x_ptrs + k)
            else:
                x = tl.load(x_ptrs + k, mask=(k + offs_k < K)[:, None], other=0.0)  # [2 * COLS, BLOCK_M]
            acc = tl.dot(w, x, acc)
        if USE_ASM:
            # Triton waits for the products where their sums are used. Without this it would go on to the next step, and
            # unpack its weights into registers that wgmma still reads: it looks after sums and shared memory only.
            acc = tl.inline_asm_elementwise("// sums", "=f,0", [acc], tl.float32, is_pure=False, pack=1)
    if GROUP_SIZE == -1 and z_ptr is None:
        acc *= _load_of_rows(s_ptr, s_rows, 0, GROUP_SIZE).to(tl.float32)[:, None] * UNPACKED

    out_tile = block_m * tl.num_programs(1) + block_n
    first_n = block_n * BLOCK_N
    store_split(acc, bias_ptr, y_ptr, partial_ptr, counter_ptr, out_tile, split, first_n, offs_m, M, N, SPLITS)


def _dequantize_cost(grid, kernel, args) -> dict:
    return {"bytes": tensor_bytes(*(args[name] for name in ("w_ptr", "s_ptr", "z_ptr", "y_ptr")))}


@triton.jit(launch_metadata=_dequantize_cost)
def _dequantize_kernel(
    w_ptr,  # [N / 16, UNITS, 16, UNIT / 4] int16
    s_ptr,  # [N / 16, PAIRS, 16, 2]; per channel [N / 16, 1, 16, 1]
    z_ptr,  # like s_ptr, or None
    y_ptr,  # [N, K], contiguous
    N,
    K,
    UNIT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """W itself, for so many rows of x that a 16-bit product earns back what writing W costs."""
    COLS: tl.constexpr = UNIT // 4
    units = tl.cdiv(K, UNIT)
    row_tile = tl.program_id(0).to(tl.int64)
    unit = tl.program_id(1) * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)[:, None, None]  # [BLOCK_UNITS, 1, 1]
    row = tl.arange(0, 16)[None, :, None]
    col = tl.arange(0, COLS)[None, None, :]
    packed = tl.load(w_ptr + (row_tile * units + unit) * (16 * COLS) + row * COLS + col, mask=unit < units, other=0)
    pairs = tl.cdiv(tl.cdiv(K, GROUP_SIZE), 2)  # unused per channel
    for plane in tl.static_range(4):
        if GROUP_SIZE == -1:
            s_offs = row_tile * 16 + row
        else:
            group = tl.minimum((unit * UNIT + plane * COLS) // GROUP_SIZE, 2 * pairs - 1)
            s_offs = (row_tile * pairs + group // 2) * 32 + row * 2 + group % 2
        w = unpack_plane(packed, None, plane, y_ptr.dtype.element_ty, USE_ASM).to(tl.float32) * UNPACKED
        if z_ptr is not None:
            w = w + 8.0 - tl.load(z_ptr + s_offs).to(tl.float32)
        w *= tl.load(s_ptr + s_offs).to(tl.float32)
        k = unit * UNIT + plane * COLS + col
        n = row_tile * 16 + row
        tl.store(y_ptr + n * K + k, w.to(y_ptr.dtype.element_ty), mask=(n < N) & (k < K))


# ---------------------------------------------------------------------------------------------------------------------
# Configuration and launcher
# ---------------------------------------------------------------------------------------------------------------------

DEQUANTIZE_K = 256  # columns of 16 rows a block
MAX_BLOCKS = 65535  # along the second dimension of a grid

_TABLE: dict[tuple, DecodeConfig] = {}  # (gpu, k, n, group size, gated, most rows) -> what a sweep found


def kind_of_zeros(dtype: torch.dtype | None, group_size: int) -> Zeros:
    """What the kernels do with zeros of a dtype; None: there are none. Per channel they are met once, at the end."""
    if dtype is None:
        return Zeros.NONE
    return Zeros.INTEGER if dtype == torch.int16 and group_size != -1 else Zeros.REAL


def load_table(path: str | os.PathLike) -> None:
    """Takes the configurations that benchmarks/sweep_int4_gemm.py found for a GPU, where it is this one, before those
    of pick_config. The environment variable TINY_GEMM_TABLE does the same. ValueError for a file that is no table."""
    _TABLE.update(read_table(path))
    _fixed_launch.cache_clear()


class Launch(NamedTuple):
    """What int4_gemm does for one shape: launcher(grid, ...), with scratch of `partials` fp32 and `arrivals` int32."""

    launcher: Launcher
    grid: tuple[int, int, int]
    partials: int = 0
    arrivals: int = 0

    @property
    def streams(self) -> bool:
        """Whether it is int4_stream_kernel."""
        return "K_WARPS" in self.launcher.meta


def plan(
    m: int,
    n: int,
    k: int,
    group_size: int,
    zeros: Zeros,
    facts: DeviceFacts,
    config: DecodeConfig | StreamConfig | SplitConfig | None = None,
    activation: str | None = None,
) -> Launch:
    """The launch for x [m, k] and W [n, k]: by the configuration given, else that of a table, else pick_config's. With
    an activation it is that of int4_gated_linear."""
    gated = activation is not None
    if config is None and zeros is Zeros.NONE and m <= DECODE_ROWS:
        config = _TABLE.get((facts.name, k, n, group_size, gated, 8 if m <= 8 else DECODE_ROWS))
    if config is None:
        if gated:
            config = pick_decode_config(m, n, k, group_size, zeros, facts, gated=True)
        else:
            config = pick_config(m, n, k, group_size, zeros, facts)
    if isinstance(config, StreamConfig):
        most_k = 256 * config.k_warps * config.cluster
        if m > DECODE_ROWS or k % 256 or k > most_k or group_size not in STREAM_GROUPS:
            raise ValueError(
                f"int4_gemm: M={m}, K={k}, group_size={group_size}: for {config} M must be at most {DECODE_ROWS}, K a "
                f"multiple of 256 and at most {most_k}, and a group of {STREAM_GROUPS}"
            )
        clusters = facts.clusters_of(config.cluster)
        if clusters == 0:
            raise ValueError(f"int4_gemm: {facts.name} has no room for a cluster of {config.cluster} blocks: {config}")
        launcher = _stream_launcher(config, 1 if m <= 8 else 2, group_size, activation, facts)
        return Launch(launcher, (min(-(-n * config.k_warps // 256), clusters), 1, 1))
    unit = unit_k(k)
    splits = config.splits
    if isinstance(config, DecodeConfig):
        if config.cluster and not (facts.has_clusters and launches_clusters()):
            config = dataclasses.replace(config, cluster=False)  # the bits are the same
        if config.cluster:
            splits = 1
        block_m = 8 if m <= 8 and facts.is_nvidia else 16  # NVIDIA's tensor cores take 8 columns at once, AMD's 16
        block_n = 16 * config.row_tiles
        step = config.warps * config.warp_units * unit
        one_step = config.is_one_step(triton.cdiv(k, unit))
        whole_steps = k % (step * config.splits if one_step else step) == 0
        share = triton.cdiv(triton.cdiv(k, unit), 2 * config.splits) * 2  # units of a split
        even_splits = one_step and config.splits > 1 and share < config.warps * config.warp_units
        launcher = _decode_launcher(
            config, block_m // 8, one_step, whole_steps, even_splits, unit, group_size, activation, facts
        )
    else:
        block_m, block_n = config.block_m, config.block_n
        if isinstance(config, HopperConfig):
            if unit != 128:
                raise ValueError(f"int4_gemm: K={k} must be a multiple of 128 for {config}")
            launcher = _hopper_launcher(config, group_size, facts)
        elif isinstance(config, PrefillConfig):
            launcher = _prefill_launcher(config, k % unit == 0, unit, group_size, facts)
        else:
            launcher = _split_launcher(config, unit, group_size, facts)
    blocks_m, blocks_n = triton.cdiv(m, block_m), triton.cdiv(n, block_n)
    tiles = blocks_m * blocks_n if splits > 1 else 0  # whose partial sums meet in memory
    arrivals = 2 * tiles if isinstance(config, HopperConfig) else tiles  # there each half of a block counts its own
    launch = Launch(launcher, (blocks_m * splits, blocks_n, 1), tiles * splits * block_n * block_m, arrivals)
    if launch.grid[1] > MAX_BLOCKS:
        raise ValueError(f"int4_gemm: N={n} must be at most {MAX_BLOCKS * block_n}: a launch has no more blocks")
    return launch


class Fixed(NamedTuple):
    """A Launch of one shape. streams: it is int4_stream_kernel."""

    launch: FixedLaunch
    partials: int
    arrivals: int
    streams: bool


def _is_misread(x: Tensor, stride: int) -> bool:
    """Whether int4_stream_kernel, which reads rows of x 16 bytes at a time, cannot read these."""
    return (x.data_ptr() | 2 * stride) % 16 != 0


@cache
def _facts_with_room(device: torch.device) -> DeviceFacts:
    """device_facts, with cluster_room."""
    facts = device_facts(device)
    return dataclasses.replace(facts, cluster_room=cluster_room(device, facts))


@lru_cache(maxsize=4096)
def _fixed_launch(
    m: int,
    n: int,
    k: int,
    stride_xm: int,
    zero_dtypes: tuple[torch.dtype | None, ...],  # of each weight
    dtypes: tuple[torch.dtype | None, ...],  # of all else that may differ
    group_size: int,
    device: torch.device,
    config: DecodeConfig | StreamConfig | SplitConfig | None,
    activation: str | None = None,
) -> Fixed:
    """The plan's launch for tensors of these dtypes."""
    kinds = [kind_of_zeros(dtype, group_size) for dtype in zero_dtypes]
    zeros = Zeros.REAL if Zeros.REAL in kinds else kinds[0]
    launch = plan(m, n, k, group_size, zeros, device_facts(device), config, activation)
    if launch.streams and launch.launcher.cluster > 1:  # to ask how many find room takes a compilation: only now
        launch = plan(m, n, k, group_size, zeros, _facts_with_room(device), config, activation)
    set_up_counters(device, "int4_gemm")  # a launch of another shape that is captured later may count
    fixed = FixedLaunch(launch.launcher, launch.grid, (m, n, k, stride_xm))
    return Fixed(fixed, launch.partials, launch.arrivals, launch.streams)


@cache
def _decode_launcher(
    config: DecodeConfig, x_tiles: int, one_step: bool, whole_steps: bool, even_splits: bool, unit: int,
    group_size: int, activation: str | None, facts: DeviceFacts,
) -> Launcher:  # fmt: skip
    meta = {"maxnreg": config.max_registers} if facts.is_nvidia else {}
    if config.cluster:
        sends = cluster_sends(16 * config.row_tiles * 8 * x_tiles, 32 * config.warps)
        meta |= {"cluster": config.splits, "sends": sends}
    return Launcher(
        _int4_decode_kernel, ROW_TILES=config.row_tiles, WARP_UNITS=config.warp_units, WARPS=config.warps,
        X_TILES=x_tiles, SPLITS=config.splits, CLUSTER=config.cluster, ONE_STEP=one_step, WHOLE_STEPS=whole_steps,
        EVEN_SPLITS=even_splits, STAGES=config.stages, UNIT=unit, GROUP_SIZE=group_size,
        LANES_SHARE=facts.is_nvidia or facts == INTERPRETED, MANY_REGISTERS=config.max_registers >= 128,
        ACTIVATION=activation, USE_ASM=facts.is_nvidia, num_warps=config.warps, **pdl_options(facts), **meta,
    )  # fmt: skip


@cache
def _stream_launcher(
    config: StreamConfig, x_tiles: int, group_size: int, activation: str | None, facts: DeviceFacts
) -> Launcher:
    from tiny_gemm import gluon_decode  # only where Triton is one that it was written for

    return Launcher(
        gluon_decode.int4_stream_kernel, cluster=config.cluster, sends=None, K_WARPS=config.k_warps,
        CLUSTER=config.cluster, X_TILES=x_tiles, GROUP_SIZE=group_size, ACTIVATION=activation,
        num_warps=gluon_decode.WARPS.value, maxnreg=gluon_decode.REGISTERS, **pdl_options(facts),
    )  # fmt: skip


@cache
def _split_launcher(config: SplitConfig, unit: int, group_size: int, facts: DeviceFacts) -> Launcher:
    return Launcher(
        _int4_gemm_kernel, BLOCK_N=config.block_n, BLOCK_M=config.block_m, SPLITS=config.splits, UNIT=unit,
        GROUP_SIZE=group_size, STAGES=config.stages, USE_ASM=facts.is_nvidia, num_warps=config.num_warps,
        **pdl_options(facts),
    )  # fmt: skip


@cache
def _prefill_launcher(
    config: PrefillConfig, whole_units: bool, unit: int, group_size: int, facts: DeviceFacts
) -> Launcher:
    # A load of fewer elements than there are threads Triton repeats where they are needed; what a larger one loads goes
    # through shared memory, with a barrier in each step.
    in_halves = config.block_n >= 32 * config.num_warps
    return Launcher(
        _int4_prefill_kernel, BLOCK_N=config.block_n, BLOCK_M=config.block_m, SPLITS=config.splits,
        IN_HALVES=in_halves, WHOLE_UNITS=whole_units, UNIT=unit, GROUP_SIZE=group_size,
        STAGES=config.stages, USE_ASM=facts.is_nvidia,
        num_warps=config.num_warps, maxnreg=config.max_registers, **pdl_options(facts),
    )  # fmt: skip


@cache
def _hopper_launcher(config: HopperConfig, group_size: int, facts: DeviceFacts) -> Launcher:
    from tiny_gemm import gluon_gemm  # only where Triton is one that it was written for

    return Launcher(
        gluon_gemm.int4_hopper_kernel, BLOCK_N=config.block_n, BLOCK_M=config.block_m, SPLITS=config.splits,
        GROUP_SIZE=group_size, STAGES=config.stages, num_warps=gluon_gemm.WARPS.value, maxnreg=gluon_gemm.REGISTERS,
        **pdl_options(facts),
    )  # fmt: skip


def check_aligned(packed: Tensor, scales: Tensor, zeros: Tensor | None, name: str = "") -> None:
    """ValueError unless the parts of a packed weight lie as the kernels load them, 16 bytes at a time."""
    if (packed.data_ptr() | scales.data_ptr() | (0 if zeros is None else zeros.data_ptr())) % 16 == 0:
        return
    for part, t in (("packed", packed), ("scales", scales), ("zeros", zeros)):
        if t is not None and t.data_ptr() % 16:
            where = f"begins at address {t.data_ptr():#x}; it must be aligned to 16 bytes: clone() it"
            raise ValueError(f"{name}{part} {where}")


def _readable(x: Tensor) -> Tensor:
    """x as the kernels read it: 16-bit floats, rows without gaps."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"the INT4 GEMM: x is {x.dtype}, on a GPU it must be bfloat16 or float16")
    return x if x.is_contiguous() or x.stride(1) == 1 else x.contiguous()  # to ask for strides takes longer


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy whose rows begin at multiples of 32 bytes, which Triton knows of (others are not fetched ahead), and
    so near to each other that 32 bits count the elements between any of a block."""
    is_aligned = x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0 and x.stride(0) <= 2**24
    return x if is_aligned or x.shape[1] % 16 else x.clone(memory_format=torch.contiguous_format)


def int4_gemm(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    out_features: int,
    config: DecodeConfig | StreamConfig | SplitConfig | None = None,
) -> Tensor:
    """x [M, K] (bf16 or fp16) times the Int4Weight given by its parts -> [M, out_features]; see ops.int4_gemm."""
    m, k = x.shape
    x = _readable(x)
    if bias is not None:
        bias = bias.contiguous()
    check_aligned(packed, scales, zeros)
    zero_dtype = None if zeros is None else zeros.dtype
    device = x.device
    if config is None and m > DECODE_ROWS:
        kind = kind_of_zeros(zero_dtype, group_size)
        if dequantizes(m, out_features, k, group_size, kind, device_facts(device)):
            set_up_counters(device, "int4_gemm")
            return F.linear(x, dequantize_weight(packed, scales, zeros, group_size, out_features, k, x.dtype), bias)
        x = _aligned(x)
    elif isinstance(config, HopperConfig):
        x = _aligned(x)
    y = x.new_empty(m, out_features)
    if m == 0:
        return y
    dtypes = x.dtype, scales.dtype, None if bias is None else bias.dtype
    stride = x.stride(0) if m > 1 else k  # of one row it is any
    found = _fixed_launch(m, out_features, k, stride, (zero_dtype,), dtypes, group_size, device, config)
    if found.streams and _is_misread(x, stride):
        x = x.clone(memory_format=torch.contiguous_format)
        return int4_gemm(x, packed, scales, zeros, bias, group_size, out_features, config)
    launch = found.launch
    partials = arrivals = None
    if found.partials:
        partials, arrivals = scratch(x, found.partials), counters(device, found.arrivals, "int4_gemm")
    if found.streams:
        launch((x, packed, scales, zeros, None, None, None, bias, y))
    elif launch.launcher.kernel is _int4_decode_kernel:
        launch((x, packed, scales, zeros, None, None, None, bias, y, partials, arrivals))
    else:
        launch((x, packed, scales, zeros, bias, y, partials, arrivals))
    return y


def dequantize_weight(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, n: int, k: int, dtype: torch.dtype
) -> Tensor:
    """The Int4Weight given by its parts as a matrix [n, k] of bf16 or fp16."""
    facts = device_facts(packed.device)
    y = packed.new_empty(n, k, dtype=dtype)
    grid = -(-n // TILE_N), -(-k // DEQUANTIZE_K), 1
    _dequantize_launcher(unit_k(k), group_size, facts)(grid, (packed, scales, zeros, y), (n, k))
    return y


@cache
def _dequantize_launcher(unit: int, group_size: int, facts: DeviceFacts) -> Launcher:
    return Launcher(
        _dequantize_kernel, UNIT=unit, GROUP_SIZE=group_size, BLOCK_UNITS=DEQUANTIZE_K // unit, USE_ASM=facts.is_nvidia,
        num_warps=4 if facts.is_nvidia else 2,  # 128 threads
    )  # fmt: skip


def int4_gated_linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    gate_packed: Tensor,
    gate_scales: Tensor,
    gate_zeros: Tensor | None,
    group_size: int,
    out_features: int,
    activation: str,
    config: DecodeConfig | StreamConfig | None = None,
) -> Tensor:
    """act(x @ gate.T) * (x @ W.T) for x [M <= DECODE_ROWS, K]; see ops.int4_gated_linear."""
    m, k = x.shape
    x = _readable(x)
    check_aligned(packed, scales, zeros)
    check_aligned(gate_packed, gate_scales, gate_zeros, "gate_")
    y = x.new_empty(m, out_features)
    if m == 0:
        return y
    zero_dtypes = tuple([None if z is None else z.dtype for z in (zeros, gate_zeros)])
    dtypes = x.dtype, scales.dtype, gate_scales.dtype
    stride = x.stride(0) if m > 1 else k
    found = _fixed_launch(m, out_features, k, stride, zero_dtypes, dtypes, group_size, x.device, config, activation)
    if found.streams and _is_misread(x, stride):
        x = x.clone(memory_format=torch.contiguous_format)
        gate = gate_packed, gate_scales, gate_zeros
        return int4_gated_linear(x, packed, scales, zeros, *gate, group_size, out_features, activation, config)
    sums = () if found.streams else (None, None)
    found.launch((x, packed, scales, zeros, gate_packed, gate_scales, gate_zeros, None, y, *sums))
    return y


assert TILE_N == 16, "the kernels are written for tiles of 16 rows"

if os.environ.get("TINY_GEMM_TABLE"):
    load_table(os.environ["TINY_GEMM_TABLE"])
