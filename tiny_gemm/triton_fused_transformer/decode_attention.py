"""One decode step of attention in one launch: RoPE, append to the KV cache, attention over it, and the reduction.

    q [B, Hq, D], k, v [B, Hkv, D] of one new token a sequence; k_cache, v_cache [B, Hkv, Lmax, D]; lengths int32 [B]
    token b stands at position lengths[b]: q and k are rotated for it, k and v stored there, and q attends to
    positions 0 .. lengths[b] -> [B, Hq, D]

Flash-decoding (Dao et al., 2023). The tokens of a sequence are cut into tiles, 16 * TILES tokens for each of a block's
WARPS warps; up to NUM_SPLITS splits take the tiles in turn, from the last to the first. A block does one split of one
KV head, or, where not all fit on the chip at once, several one after the other (decode_work.py says which); the query
heads of a group (G = Hq / Hkv) share what it reads. K and V go from global memory straight into the registers from
which the tensor core reads them, 16 bytes a thread, with no shared memory in between (decode_tiles.py says how, and
what differs over a cache of 8 bits). Every warp keeps a softmax of its own, so that no warp waits for another before
the end of a split, where they meet once. At these sizes instructions are time: a block lives for a few microseconds,
with one or two warps for each scheduler.

Where the splits lie depends on the sequence's own length, on Lmax and on the chip, never on the batch, and partial
results are added in a fixed order: a row has the same bits alone and in any batch, by whichever block and loop a split
was done (which is why the kernel writes its fused multiply-adds out, and the compiler may add none). The blocks of a
(sequence, KV head) count the splits that they have done; the last one adds the partials up and zeroes the counter
again. Nobody waits for anybody. Or, where is_cluster says so, they are a cluster of Hopper's, a block for each split,
and send their partials into each other's shared memory (triton_cluster.py), with the same bits and without the way
through L2.

The first split has the last tile, and with it the new token: it uses k and v from its registers, rounded as the cache
rounds them, and stores them; nobody reads that position.

With programmatic dependent launch a block reads the lengths, finds what it has to do, and asks L2 for its first tile,
while the kernel before it still runs. Lengths may be out of date: once that kernel has ended they are read again,
together with everything else, and if they differ the block begins once more.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiny_gemm.device import CLUSTERS_FILL, DeviceFacts, counters, device_facts, scratch, set_up_counters
from tiny_gemm.launcher import Launcher, launches_clusters
from tiny_gemm.triton_cluster import begin_cluster, join_cluster
from tiny_gemm.triton_fused_transformer.decode_parts import (
    EXCHANGE_WORDS,
    decode_attention_cost,
    exchange_buffer,
    exchange_words,
    finish,
    finish_in_cluster,
    insert,
    load_pairs,
    load_vectors,
    norm_pairs,
    partial_floats,
    prefetch_row,
    rope_row,
    rotate,
    sends_of_split,
    start_softmax,
    store_partial,
    words_of_splits,
)
from tiny_gemm.triton_fused_transformer.decode_tiles import (
    attend,
    load_tile,
    quantize_token,
    queries_operand,
    tile_pointers,
)
from tiny_gemm.triton_fused_transformer.decode_work import (
    differ,
    first_tile,
    num_splits,
    read_lengths,
    read_lengths_early,
    splits_of_block,
    tokens,
    window_begin,
)
from tiny_gemm.triton_parts import pdl_options, prefetch_l2, shared_buffer, wait_for_previous

LOG2_E = 1.4426950408889634
MOST_SPLITS = 64  # of a sequence and KV head: the last block adds up what all have


@triton.jit
def _prefetch_tile(k_ptr, v_ptr, scale_ptr, start, rows, D: tl.constexpr):
    """Asks L2 for `rows` tokens from `start` on, a multiple of 16, of one sequence and KV head, if there are any and
    they lie where it takes them."""
    is_aligned = (k_ptr.to(tl.int64) | v_ptr.to(tl.int64)) % 16 == 0
    if scale_ptr is not None:
        is_aligned &= scale_ptr.to(tl.int64) % 16 == 0
    if is_aligned & (rows > 0) & (start >= 0):
        tile = tl.cast(start, tl.int64) * D
        num_bytes = rows * (D * (k_ptr.dtype.element_ty.primitive_bitwidth // 8))
        prefetch_l2(k_ptr + tile, num_bytes)
        prefetch_l2(v_ptr + tile, num_bytes)
        if scale_ptr is not None:
            prefetch_l2(scale_ptr + tl.cast(start, tl.int64) * 2, (rows + 1) // 2 * 16)


@triton.jit(do_not_specialize=["B", "Lmax"], launch_metadata=decode_attention_cost)
def _decode_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_cache_ptr,  # of 16 or 32 bits; int8, or the bits of e4m3 as int8
    v_cache_ptr,
    kv_scale_ptr,  # [B, Hkv, Lmax, 2] fp32 of a cache of 8 bits, else None
    lengths_ptr,
    cos_ptr,  # [>= Lmax, ROPE_HALF]
    sin_ptr,
    q_norm_ptr,  # [D], or None
    k_norm_ptr,
    sinks_ptr,  # [Hq], or None
    partial_ptr,  # [B, Hkv] of what partial_floats says, None if CLUSTER
    counter_ptr,  # [B, Hkv] int32, zero before and after, None if CLUSTER
    out_ptr,  # [B, Hq, D]
    lse_ptr,  # [B, Hq] fp32, or None
    stride_qb,
    stride_qh,
    stride_kb,  # of k and v
    stride_kh,
    stride_cb,  # of k_cache and v_cache
    stride_ch,
    stride_sb,  # of kv_scale
    stride_sh,
    B,
    Lmax,
    scale_log2,  # scale * log2(e): the softmax is computed with exp2
    STRIDE: tl.constexpr,  # from one cached token to the next
    ROPE_HALF: tl.constexpr,
    KV_HEADS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    EPS: tl.constexpr,  # of the norms
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_B: tl.constexpr,  # 0: a block for each split; else at least B, and blocks take splits in turn
    CLUSTER: tl.constexpr,  # the blocks of a sequence and KV head, one for each split, are a cluster
    WARPS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    E: tl.constexpr,  # elements in 16 bytes
    MERGE_IN_SHARED: tl.constexpr,  # see _merge_warps
    FP8: tl.constexpr,  # 8 bits are e4m3
    HAS_E4M3: tl.constexpr,  # there are instructions that convert it
    USE_ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    STEP: tl.constexpr = 16 * TILES * WARPS  # tokens of a tile
    CACHED: tl.constexpr = k_cache_ptr.dtype.element_ty
    IS_8_BIT: tl.constexpr = kv_scale_ptr is not None
    E_V: tl.constexpr = min(E, BLOCK_D // 8)
    PAIR_IN_THREAD: tl.constexpr = 2 * ROPE_HALF == BLOCK_D and ROPE_HALF % (4 * E) == 0
    tl.static_assert(not CLUSTER or (BLOCK_B == 0 and MERGE_IN_SHARED))
    if CLUSTER:
        buffer = shared_buffer(words_of_splits(NUM_SPLITS, 32 * WARPS, triton.next_power_of_2(G), BLOCK_D))
        begin_cluster(buffer, NUM_SPLITS, 0)
    if PDL and q_norm_ptr is not None:
        prefetch_row(q_norm_ptr, D)
        prefetch_row(k_norm_ptr, D)
    if PDL:
        lengths = read_lengths_early(lengths_ptr, B, BLOCK_B, WARPS)
    else:
        lengths = read_lengths(lengths_ptr, B, BLOCK_B)

    lane = tl.arange(0, 32)[:, None, None, None]
    warp = tl.arange(0, WARPS)[None, :, None, None]
    d = tl.arange(0, BLOCK_D // (4 * E))[None, None, None, :] * (4 * E) + lane % 4 * E + warp * 0  # as keys are loaded
    d_v = tl.arange(0, BLOCK_D // (8 * E_V))[None, None, None, :] * (8 * E_V) + lane // 4 * E_V + warp * 0  # as values
    d_rope = d
    if PAIR_IN_THREAD:  # the other half has the same angles
        d_rope = tl.arange(0, BLOCK_D // (8 * E))[None, None, None, :] * (4 * E) + lane % 4 * E + warp * 0
    head = lane // 4 + 8 * tl.arange(0, BLOCK_G // 8)[None, None, :, None]
    q_scale = scale_log2
    if IS_8_BIT:
        q = tl.zeros([WARPS, 2 * BLOCK_G, BLOCK_D], tl.float16 if FP8 else tl.int8)
        q_scale = tl.zeros([WARPS, BLOCK_G], tl.float32)
    elif E == 4:
        q = tl.zeros([WARPS, BLOCK_G, BLOCK_D], CACHED)
    else:
        q = tl.zeros([32, WARPS, BLOCK_G // 8, 2 if BLOCK_G == 8 else 1, BLOCK_D // 32, 4], tl.int32)
    top = tl.full([WARPS, BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([WARPS, BLOCK_G], tl.float32)
    acc = tl.zeros([WARPS, BLOCK_D, BLOCK_G], tl.float32)

    batch, kv_head, split, blocks, length = tl.cast(0, tl.int64), tl.cast(0, tl.int64), 0, 1, 0
    is_stale = tl.full([], 1, tl.int1)
    while is_stale:  # once, or twice if a length was read before its time
        batch, kv_head, split, blocks, length = splits_of_block(
            lengths, Lmax, B, KV_HEADS, STEP, WINDOW, NUM_SPLITS, BLOCK_B
        )
        start = first_tile(length, split, Lmax, STEP)
        at_k = k_cache_ptr + (batch * stride_cb + kv_head * stride_ch)
        at_v = v_cache_ptr + (batch * stride_cb + kv_head * stride_ch)
        at_scale = None
        if IS_8_BIT:
            at_scale = kv_scale_ptr + (batch * stride_sb + kv_head * stride_sh)
        if PDL and STRIDE == D:
            _prefetch_tile(at_k, at_v, at_scale, start, tl.minimum(tl.minimum(length, Lmax) - start, STEP), D)
        there = tl.maximum(start, 0)  # a block without a tile loads another's, for nothing
        last = tl.maximum(tl.minimum(length, Lmax) - 1, 0) - there
        # Before the wait: behind it instructions are time, and ptxas asks for part of the tile when q has arrived.
        pointers = tile_pointers(at_k, at_v, at_scale, there, last, STRIDE, BLOCK_D, WARPS, TILES, E, E_V, False)
        wait_for_previous(PDL)

        # What the first tile needs, all asked for before any of it is used.
        k, even, odd, scales = load_tile(pointers, IS_8_BIT, D, BLOCK_D, E, E_V, False)
        q_row = batch * stride_qb + (kv_head * G + head) * stride_qh
        q_new, q_pair = load_pairs(q_ptr + q_row, d, (head < G) & (d < D), ROPE_HALF, PAIR_IN_THREAD, E)
        new_row = batch * stride_kb + kv_head * stride_kh + lane * 0
        k_new, k_pair = load_pairs(k_ptr + new_row, d, (d < D) & (split == 0), ROPE_HALF, PAIR_IN_THREAD, E)
        v_new = load_vectors(v_ptr + new_row + d_v, (d_v < D) & (split == 0), E_V)
        cos = 1.0
        sin = 0.0
        position = tl.minimum(length, Lmax - 1)
        if ROPE_HALF > 0:
            cos = rope_row(cos_ptr, d_rope, position, ROPE_HALF, E, False)
            sin = rope_row(sin_ptr, d_rope, position, ROPE_HALF, E, False)
        now = lengths
        if PDL:
            now = read_lengths(lengths_ptr, B, BLOCK_B)
        is_stale = differ(now, lengths, BLOCK_B)
        lengths = now
        q, q_scale = queries_operand(
            q_new, q_pair, d, cos, sin, q_norm_ptr, scale_log2, D, EPS, ROPE_HALF, PAIR_IN_THREAD, CACHED, FP8, USE_ASM
        )
        begin = window_begin(length, Lmax, WINDOW)
        # over 8 bits as of a small value
        top, total = start_softmax(sinks_ptr, kv_head, split, G, WARPS, BLOCK_G, 90.0 if IS_8_BIT else 0.0)
        acc = tl.zeros([WARPS, BLOCK_D, BLOCK_G], tl.float32)
        if split == 0:  # this block has the last tile, and the new token with it
            k_token = k_new, k_pair
            if k_norm_ptr is not None:  # here, as weights and angles would fill registers that the tile needs
                k_token = norm_pairs(k_new, k_pair, k_norm_ptr, d, D, EPS, ROPE_HALF, PAIR_IN_THREAD, E)
                if ROPE_HALF > 0:
                    cos = rope_row(cos_ptr, d_rope, position, ROPE_HALF, E, True)
                    sin = rope_row(sin_ptr, d_rope, position, ROPE_HALF, E, True)
            k_rotated = rotate(k_token[0], k_token[1], d, cos, sin, ROPE_HALF, PAIR_IN_THREAD, E)
            if IS_8_BIT:
                k_token, v_token, scales_token = quantize_token(k_rotated, v_new, FP8, HAS_E4M3)
            else:
                k_token, v_token = k_rotated.to(CACHED), v_new.to(CACHED)
            if (length < Lmax) & (not is_stale):
                cache_row = tl.cast(length, tl.int64)
                to_k = at_k + (cache_row * STRIDE + d)[:, :, :, :, None] + tl.arange(0, E)
                tl.store(to_k, k_token, mask=((lane < 4) & (warp == 0) & (d < D))[:, :, :, :, None])
                to_v = at_v + (cache_row * STRIDE + d_v)[:, :, :, :, None] + tl.arange(0, E_V)
                tl.store(to_v, v_token, mask=((lane % 4 == 0) & (warp == 0) & (d_v < D))[:, :, :, :, None])
                if IS_8_BIT:
                    to_scale = at_scale + cache_row * 2 + tl.arange(0, 2) + (lane + warp) * 0
                    tl.store(to_scale, scales_token, mask=(lane == 0) & (warp == 0))
            # Later tokens of the tile do not count, but what is multiplied by 0 must be a number: the new token's.
            eighth = warp * (16 * TILES) + tl.arange(0, 2 * TILES)[None, None, :, None] * 8
            token, new = eighth + lane % 4 * 2, tl.minimum(length, Lmax) - start
            k = insert(k, k_token, (eighth + lane // 4 >= new)[:, :, :, :, None], USE_ASM)
            even = insert(even, v_token, (token >= new)[:, :, :, :, None], USE_ASM)
            odd = insert(odd, v_token, (token + 1 >= new)[:, :, :, :, None], USE_ASM)
            if IS_8_BIT:
                is_new = (token + tl.arange(0, 2) >= new)[:, :, :, :, None]
                scales = tl.where(is_new, scales_token[:, :, :, None, :], scales)
            top, total, acc = attend(
                q, q_scale, k, even, odd, scales, top, total, None, begin - start, tokens(length, Lmax) - start,
                SOFTCAP, WINDOW, IS_8_BIT, FP8, HAS_E4M3, USE_ASM,
            )  # fmt: skip
        elif start >= 0:  # all its tokens exist
            top, total, acc = attend(
                q, q_scale, k, even, odd, scales, top, total, None, begin - start, STEP,
                SOFTCAP, WINDOW, IS_8_BIT, FP8, HAS_E4M3, USE_ASM,
            )  # fmt: skip

    begin = window_begin(length, Lmax, WINDOW)
    splits = num_splits(length, Lmax, begin, STEP, NUM_SPLITS)
    if CLUSTER:
        join_cluster()
    elif split >= splits:
        return
    group = batch * KV_HEADS + kv_head
    at_k = k_cache_ptr + (batch * stride_cb + kv_head * stride_ch)
    at_v = v_cache_ptr + (batch * stride_cb + kv_head * stride_ch)
    at_scale = None
    if IS_8_BIT:
        at_scale = kv_scale_ptr + (batch * stride_sb + kv_head * stride_sh)
    exchange = None
    if MERGE_IN_SHARED:
        exchange = exchange_buffer(WARPS, BLOCK_G, BLOCK_D, E_V)
    done = 1
    start = first_tile(length, split, Lmax, STEP) - splits * STEP
    go_on = split < splits  # of a cluster a block without a split may have to add up others
    while go_on:  # a split; only one if not BLOCK_B
        while start >= begin // STEP * STEP:  # from its second tile from the end to its first; all tokens exist
            pointers = tile_pointers(at_k, at_v, at_scale, start, STEP, STRIDE, BLOCK_D, WARPS, TILES, E, E_V, True)
            k, even, odd, scales = load_tile(pointers, IS_8_BIT, D, BLOCK_D, E, E_V, True)
            top, total, acc = attend(
                q, q_scale, k, even, odd, scales, top, total, acc, begin - start, STEP,
                SOFTCAP, WINDOW, IS_8_BIT, FP8, HAS_E4M3, USE_ASM,
            )  # fmt: skip
            start -= splits * STEP
        go_on = (BLOCK_B > 0) & (split + blocks < splits)
        if BLOCK_B > 0:
            if go_on:
                start = first_tile(length, split + blocks, Lmax, STEP)
                pointers = tile_pointers(at_k, at_v, at_scale, start, STEP, STRIDE, BLOCK_D, WARPS, TILES, E, E_V, True)
                k, even, odd, scales = load_tile(pointers, IS_8_BIT, D, BLOCK_D, E, E_V, True)
                # While the next split's first tile is on its way, the warps meet over this one.
                store_partial(top, total, acc, exchange, partial_ptr, group, split, G, NUM_SPLITS, E_V, USE_ASM)
                tl.debug_barrier()  # what they met through is free again
                top, total = start_softmax(None, kv_head, split, G, WARPS, BLOCK_G, 0.0)
                top, total, acc = attend(
                    q, q_scale, k, even, odd, scales, top, total, None, begin - start, STEP,
                    SOFTCAP, WINDOW, IS_8_BIT, FP8, HAS_E4M3, USE_ASM,
                )  # fmt: skip
                start -= splits * STEP
                split += blocks
                done += 1

    if CLUSTER:
        finish_in_cluster(
            top, total, acc, exchange, buffer, out_ptr, lse_ptr, group, split, splits, G, D, NUM_SPLITS, E_V, USE_ASM
        )
    else:
        finish(
            top, total, acc, exchange, partial_ptr, counter_ptr, out_ptr, lse_ptr, group, split, splits, done,
            G, D, NUM_SPLITS, E_V, USE_ASM,
        )  # fmt: skip


@dataclass(frozen=True)
class DecodeAttentionConfig:
    num_splits: int  # the most parts into which a sequence and KV head are cut
    num_warps: int
    tiles: int  # of 16 tokens that a warp takes at once


@cache
def pick_config(
    kv_heads: int, group: int, max_length: int, head_dim: int, itemsize: int, device: DeviceFacts
) -> DecodeAttentionConfig:
    """Up to one or two splits an SM at batch 1. The batch must not be asked: a row has the same bits in every batch.
    max_length is the cache's, or the window if that is less.

    Swept on an H200, 2026-11-29 and 30 (docs/notes/attention.md; benchmarks/sweep_decode_attention.py does it again):
    32 query and 8 KV heads of size 64 and 128, 128 to 32,768 tokens, batches of 1 to 8, caches of 16 and 8 bits; 9 and
    3 heads of size 64, 28 and 4 and 12 and 2 of size 128. Other chips, head sizes and numbers of heads take after it.
    """
    block_d = triton.next_power_of_2(head_dim)
    splits = max(1, device.sm_count // kv_heads)
    num_warps, tiles = 4, 2  # large tiles: few partial results, and all bytes in flight at once
    if itemsize == 4 or block_d > 128:
        tiles = 1
    elif itemsize == 1:
        tiles = 4 if block_d <= 64 and max_length > 1024 else 2
        splits *= 2 if max_length > 16384 else 1
    elif block_d > 64:
        if max_length >= min(256 * splits, 4096):
            num_warps, tiles = 8, 1
            splits = min(splits, triton.cdiv(max_length, 256))
        elif 128 < max_length <= min(512, 32 * splits):
            tiles = 1
    elif 4096 < max_length <= 16384 and kv_heads >= 8:
        num_warps = 8
    elif max_length > 4096:
        splits *= 2
        tiles = 4
    elif max_length > 1024 and max_length >= min(128 * splits, 4096):
        tiles = 4
    elif 512 < max_length <= min(1024, 64 * splits):
        tiles = 1
    elif 128 < max_length <= min(512, 64 * splits) and device.has_clusters:
        num_warps = 2  # more splits: in clusters they cost little (through memory, up to 8 % more time than 4 warps)
    if not device.is_nvidia or group > 8:  # more rows of queries fill registers
        tiles = min(tiles, 1 if itemsize == 1 else 2)
    if group > 16:
        tiles = 1
    while num_warps > 1 and _exchange(num_warps, group, head_dim, itemsize) > EXCHANGE_WORDS:
        num_warps //= 2
    splits = min(splits, triton.cdiv(max_length, 16 * tiles * num_warps), MOST_SPLITS)
    return DecodeAttentionConfig(splits, num_warps, tiles)


def _exchange(num_warps: int, group: int, head_dim: int, itemsize: int) -> int:
    """Words of shared memory through which the warps of a block meet on NVIDIA."""
    block_d = triton.next_power_of_2(head_dim)
    return exchange_words(num_warps, max(8, triton.next_power_of_2(group)), block_d, min(16 // itemsize, block_d // 8))


def _meets_in_shared(
    config: DecodeAttentionConfig, group: int, head_dim: int, itemsize: int, aligned: bool, device: DeviceFacts,
    more_words: int = 0,
) -> bool:  # fmt: skip
    """Whether a block's warps meet in shared memory of the kernel's own, of which it takes more_words besides. Of rows
    that begin elsewhere, and of float32, Triton brings the tiles into order through much shared memory itself."""
    fits = _exchange(config.num_warps, group, head_dim, itemsize) + more_words <= EXCHANGE_WORDS
    return device.is_nvidia and aligned and itemsize <= 2 and fits


def blocks_per_sm(
    config: DecodeAttentionConfig, group: int, head_dim: int, itemsize: int, plain: bool
) -> int:  # fmt: skip
    """How many fit an SM at once, by their registers. plain: without what takes more of them, which are a norm, sinks,
    a window, a softcap, or the lengths of more than 32 sequences."""
    of_4_warps = 2
    if plain and triton.next_power_of_2(head_dim) <= 64 and itemsize == 2 and config.tiles <= 2 and group <= 8:
        of_4_warps = 5 - config.tiles
    return of_4_warps * 4 // config.num_warps


@cache
def blocks_of(
    config: DecodeAttentionConfig, heads: int, group: int, head_dim: int, itemsize: int, aligned: bool, plain: bool,
    device: DeviceFacts,
) -> int:  # fmt: skip
    """How many blocks do the splits of `heads` full pairs of a sequence and a KV head: one each where all have room on
    the chip at once; else as many as have room, if that is two for a pair, and half as many as splits if it is not. The
    bits are the same.

    A block that goes on is faster than another that begins: its next loads are on their way while its warps meet. (Not
    where they would meet through Triton's shared memory: that takes twice as much then.)
    """
    splits = config.num_splits * heads
    if not _meets_in_shared(config, group, head_dim, itemsize, aligned, device):
        return splits
    room = blocks_per_sm(config, group, head_dim, itemsize, plain) * device.sm_count
    if splits <= room:
        return splits
    return room if 2 * heads <= room else triton.cdiv(config.num_splits, 2) * heads


@cache
def is_cluster(
    config: DecodeAttentionConfig, heads: int, group: int, head_dim: int, itemsize: int, aligned: bool, plain: bool,
    device: DeviceFacts,
) -> bool:  # fmt: skip
    """Whether the splits of each of `heads` full pairs of a sequence and a KV head are a cluster of blocks, which find
    room on the chip together. The bits are the same.

    Not where there is a block for nearly each SM and it reads much at once: clusters do not come to lie so evenly, and
    an SM with two takes longer than what the meeting saves.
    """
    size, threads = config.num_splits, 32 * config.num_warps
    if not device.has_clusters or size == 1 or (size > 8 and size != 16):  # sizes that Triton's launcher can ask for
        return False
    per_sm = blocks_per_sm(config, group, head_dim, itemsize, plain)
    if size == 16 and per_sm == 1 and device.sm_count < 132:  # parts of the chip may have fewer SMs than that
        return False
    if group > threads:  # a thread would have several heads
        return False
    words = words_of_splits(size, threads, *map(triton.next_power_of_2, (group, head_dim)))
    if not _meets_in_shared(config, group, head_dim, itemsize, aligned, device, words):
        return False
    an_sm = size * heads / device.sm_count
    tile_bytes = 16 * config.tiles * config.num_warps * 2 * head_dim * itemsize
    if 0.75 < an_sm <= 1 and tile_bytes > 32 * 1024:
        return False
    return an_sm <= CLUSTERS_FILL * per_sm


@cache
def _partial_floats(num_splits: int, group: int, head_dim: int) -> int:
    """Of a sequence and KV head. (A function that kernels call takes its time when the host does.)"""
    return partial_floats(num_splits, triton.next_power_of_2(group), triton.next_power_of_2(head_dim))


@cache
def _launcher(
    config: DecodeAttentionConfig,
    block_b: int,
    cluster: bool,
    stride: int,
    aligned: bool,
    rope_half: int,
    kv_heads: int,
    group: int,
    head_dim: int,
    cached: torch.dtype,
    window: int,
    softcap: float,
    eps: float,
    facts: DeviceFacts,
) -> Launcher:
    meta = {
        "STRIDE": stride,
        "ROPE_HALF": rope_half,
        "KV_HEADS": kv_heads,
        "G": group,
        "D": head_dim,
        "EPS": eps,
        "SOFTCAP": softcap,
        "WINDOW": window,
        "NUM_SPLITS": config.num_splits,
        "BLOCK_B": block_b,
        "CLUSTER": cluster,
        "WARPS": config.num_warps,
        "TILES": config.tiles,
        "BLOCK_G": max(8 if facts.is_nvidia else 16, triton.next_power_of_2(group)),  # what the tensor core takes
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "E": 16 // cached.itemsize,
        "MERGE_IN_SHARED": _meets_in_shared(config, group, head_dim, cached.itemsize, aligned, facts),
        "FP8": cached == torch.float8_e4m3fn,
        "HAS_E4M3": facts.is_nvidia and facts.capability >= (8, 9),
        "USE_ASM": facts.is_nvidia and cached.itemsize <= 2,
        "enable_fp_fusion": False,  # see the module
        "num_warps": config.num_warps,
        **pdl_options(facts),
    }
    if cluster:
        sends = sends_of_split(32 * config.num_warps, *map(triton.next_power_of_2, (group, head_dim)))
        meta |= {"cluster": config.num_splits, "sends": sends}
    return Launcher(_decode_attention_kernel, **meta)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None,
    *,
    kv_scale: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Attention of one new token a sequence, q [B, Hq, D], k and v [B, Hkv, D], appended to the caches in place.

    q, k, v may be views of one QKV row (last dimension contiguous). k_cache, v_cache: [B, Hkv, Lmax, D], of one layout;
    with 8 bits kv_scale: fp32 [B, Hkv, Lmax, 2], written too. lengths: int32 [B]; rope_cos, rope_sin: contiguous fp32
    [>= Lmax, R / 2]. q_norm, k_norm: contiguous [D], an RMSNorm of each head before RoPE. window: 0, or how many tokens
    count, the new one included. softcap: 0, or scores become softcap * tanh(score / softcap). sinks: contiguous [Hq],
    lse: contiguous fp32 [B, Hq], written. Returns [B, Hq, D] in q's dtype.
    A row whose lengths[b] >= Lmax appends nothing and attends to the Lmax cached tokens, rotated for position Lmax - 1.
    """
    batch, heads, D = q.shape
    _, kv_heads, Lmax, _ = k_cache.shape
    q_strides, k_strides, cache_strides = q.stride(), k.stride(), k_cache.stride()
    if k_strides != v.stride():
        k, v = k.contiguous(), v.contiguous()  # not so for views of one QKV row
        k_strides = k.stride()
    group = heads // kv_heads
    assert D <= 256 and heads % kv_heads == 0
    assert q_strides[2] == k_strides[2] == v.stride(2) == cache_strides[3] == 1
    rope_half = 0 if rope_cos is None else rope_cos.shape[1]
    facts = device_facts(q.device)
    window = window if window < Lmax else 0  # then it is no limit
    cached = k_cache.dtype
    config = pick_config(kv_heads, group, window or Lmax, D, cached.itemsize, facts)
    out = q.new_empty(batch, heads, D)
    if cached == torch.float8_e4m3fn:  # Triton knows e4m3 only where the GPU does
        k_cache, v_cache = k_cache.view(torch.int8), v_cache.view(torch.int8)
    scale_strides = (0, 0) if kv_scale is None else kv_scale.stride()[:2]
    stride = cache_strides[2] if Lmax > 1 else D
    eps = 0.0 if q_norm is None else norm_eps
    low_bits = stride * cached.itemsize
    for t in (q, k, v, k_cache, v_cache):
        low_bits |= t.data_ptr()
    for n in (*q_strides[:2], *k_strides[:2], *cache_strides[:2]):
        low_bits |= n
    aligned = low_bits % 16 == 0
    plain = batch <= 32 and q_norm is None and sinks is None and not window and not softcap
    shape = config, batch * kv_heads, group, D, cached.itemsize, aligned, plain, facts
    block_b, grid, partial, arrivals = 0, (config.num_splits, kv_heads, batch), None, None
    cluster = launches_clusters() and is_cluster(*shape)
    if cluster:
        grid = 1, kv_heads, batch
        set_up_counters(q.device)
    else:
        blocks = blocks_of(*shape)
        if blocks < config.num_splits * kv_heads * batch:
            block_b, grid = max(32, 1 << (batch - 1).bit_length()), (blocks, 1, 1)
        partial = scratch(q, batch * kv_heads * _partial_floats(config.num_splits, group, D))
        arrivals = counters(q.device, batch * kv_heads)
    _launcher(
        config, block_b, cluster, stride, aligned, rope_half, kv_heads, group, D, cached, window, softcap, eps, facts
    )(
        grid,
        (
            q, k, v, k_cache, v_cache, kv_scale, lengths, rope_cos, rope_sin, q_norm, k_norm, sinks,
            partial, arrivals, out, lse,
        ),
        (
            *q_strides[:2], *k_strides[:2], *cache_strides[:2], *scale_strides, batch, Lmax,
            (D**-0.5 if scale is None else scale) * LOG2_E,
        ),
    )  # fmt: skip
    return out
