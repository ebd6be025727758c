"""One decode step of attention in one launch: RoPE, append to the KV cache, attention over it, and the reduction.

    q [B, Hq, D], k, v [B, Hkv, D] of one new token a sequence; k_cache, v_cache [B, Hkv, Lmax, D]; lengths int32 [B]
    token b stands at position lengths[b]: q and k are rotated for it, k and v stored there, and q attends to
    positions 0 .. lengths[b] -> [B, Hq, D]

Flash-decoding (Dao et al., 2023). The tokens of a sequence are cut into tiles, 16 * TILES tokens for each of a block's
WARPS warps; up to NUM_SPLITS blocks a KV head take the tiles in turn, from the last to the first, and the query heads
of a group (G = Hq / Hkv) share what a block reads. K and V go from global memory straight into the registers from
which the tensor core reads them, 16 bytes a thread, with no shared memory in between (`_load_keys` and `_load_values`
say how). Every warp keeps a softmax of its own, so that no warp waits for another before the end. At these sizes
instructions are time: a block lives for a few microseconds, with one or two warps for each scheduler.

Where the tiles lie depends on the sequence's own length, on Lmax and on the chip, never on the batch, and partial
results are added in a fixed order: a row has the same bits alone and in any batch. The blocks of a (sequence, KV head)
count their arrival; the last one adds the partials up and zeroes the counter again. Nobody waits for anybody.

The first block has the last tile, and with it the new token: it uses k and v from its registers, rounded as the cache
rounds them, and stores them; nobody reads that position.

With programmatic dependent launch a block reads its sequence's length, and asks L2 for its first tile, while the kernel
before it still runs. That length may be out of date: once that kernel has ended it is read again, together with
everything else, and if the two differ the first tile is done once more.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiny_gemm.device import DeviceFacts, counters, device_facts, scratch
from tiny_gemm.launcher import Launcher
from tiny_gemm.triton_fused_transformer.decode_attention_8bit import _decode_attention_8bit_kernel
from tiny_gemm.triton_fused_transformer.decode_parts import (
    decode_attention_cost,
    early_length,
    finish,
    first_tile,
    insert,
    load_columns,
    load_pairs,
    load_vectors,
    norm_pairs,
    prefetch_row,
    rope_row,
    rotate,
    soft_cap,
    start_softmax,
    tokens,
    window_begin,
)
from tiny_gemm.triton_gemm import add_warps, pdl_options, prefetch_l2, wait_for_previous

LOG2_E = 1.4426950408889634


@triton.jit
def _load_keys(
    ptr,  # k of one sequence and KV head, rows stride_cn apart
    start,
    last,
    stride_cn,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WARPS: tl.constexpr,
    TILES: tl.constexpr,
    E: tl.constexpr,
):
    """Tokens start .. start + 16 * TILES * WARPS, `last` in the place of later ones: [32, WARPS, 2 * TILES, BLOCK_D /
    4 E, E]. Nothing where start < 0.

    The first dimension is the lane, the second the warp, the rest are registers. Lane
    4 r + t loads of each eight tokens token r, columns 4 E c + E t and E - 1 more for each c. What it needs for the
    product are columns 16 s + 8 h + 2 t + e; so stored column 4 E c + E t + 4 s + 2 h + e is called 4 E c + 16 s + 8 h
    + 2 t + e, of k and of q alike, and nothing moves between threads.
    """
    lane = tl.arange(0, 32)[:, None, None, None]
    warp = tl.arange(0, WARPS)[None, :, None, None]
    eighth = tl.arange(0, 2 * TILES)[None, None, :, None]
    token = tl.minimum(start + warp * (16 * TILES) + eighth * 8 + lane // 4, last)
    d = tl.arange(0, BLOCK_D // (4 * E))[None, None, None, :] * (4 * E) + lane % 4 * E
    offs = (tl.cast(token, tl.int64) * stride_cn + d)[:, :, :, :, None] + tl.arange(0, E)
    return load_columns(ptr + offs, d, start >= 0, D, BLOCK_D)


@triton.jit
def _keys_operand(k, BLOCK_D: tl.constexpr, WARPS: tl.constexpr, TILES: tl.constexpr, E: tl.constexpr):
    """What _load_keys loaded as [WARPS, 16 * TILES, BLOCK_D], columns renamed."""
    k = k.reshape(8, 4, WARPS, 2 * TILES, BLOCK_D // (4 * E), E // 4, 2, 2)  # r t warp eighth c s h e
    return k.permute(2, 3, 0, 4, 5, 6, 1, 7).reshape(WARPS, 16 * TILES, BLOCK_D)


@triton.jit
def _queries_operand(q, BLOCK_D: tl.constexpr, WARPS: tl.constexpr, BLOCK_G: tl.constexpr, E: tl.constexpr):
    """q [32, WARPS, BLOCK_G / 8, BLOCK_D / 4 E, E], loaded as keys are with heads for tokens, as [WARPS, BLOCK_D,
    BLOCK_G], columns renamed alike."""
    q = q.reshape(8, 4, WARPS, BLOCK_G // 8, BLOCK_D // (4 * E), E // 4, 2, 2)  # r t warp eighth c s h e
    return q.permute(2, 4, 5, 6, 1, 7, 3, 0).reshape(WARPS, BLOCK_D, BLOCK_G)


@triton.jit
def _load_values(
    ptr,  # v of one sequence and KV head, rows stride_cn apart
    start,
    last,
    stride_cn,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WARPS: tl.constexpr,
    TILES: tl.constexpr,
    E: tl.constexpr,
):
    """The tokens that _load_keys loads: [32, WARPS, 4 * TILES, BLOCK_D / 8 E, E].

    Lane 4 r + t loads of each sixteen tokens those that the product wants of it, 8 h + 2 t + e, and of each columns
    8 E c + E r and E - 1 more; stored column 8 E c + E r + j is called 8 E c + 8 j + r.
    """
    lane = tl.arange(0, 32)[:, None, None, None]
    warp = tl.arange(0, WARPS)[None, :, None, None]
    part = tl.arange(0, 4 * TILES)[None, None, :, None]
    token = tl.minimum(start + warp * (16 * TILES) + part // 2 * 8 + part % 2 + lane % 4 * 2, last)
    d = tl.arange(0, BLOCK_D // (8 * E))[None, None, None, :] * (8 * E) + lane // 4 * E
    offs = (tl.cast(token, tl.int64) * stride_cn + d)[:, :, :, :, None] + tl.arange(0, E)
    return load_columns(ptr + offs, d, start >= 0, D, BLOCK_D)


@triton.jit
def _values_operand(v, BLOCK_D: tl.constexpr, WARPS: tl.constexpr, TILES: tl.constexpr, E: tl.constexpr):
    """What _load_values loaded, transposed: [WARPS, BLOCK_D, 16 * TILES], columns renamed."""
    v = v.reshape(8, 4, WARPS, 2 * TILES, 2, BLOCK_D // (8 * E), E)  # r t warp eighth e c j
    return v.permute(2, 5, 6, 0, 3, 1, 4).reshape(WARPS, BLOCK_D, 16 * TILES)


@triton.jit
def _attend(
    q,  # [WARPS, BLOCK_D, BLOCK_G]
    k,  # as _load_keys loads it
    v,  # as _load_values loads it
    top,
    total,
    acc,
    begin,  # first and past the last of the tile's tokens that count
    end,
    scale_log2,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WARPS: tl.constexpr,
    TILES: tl.constexpr,
    E: tl.constexpr,
):
    """The running softmax (top, total [WARPS, BLOCK_G], acc [WARPS, BLOCK_D, BLOCK_G]) with one more tile."""
    s = tl.dot(_keys_operand(k, BLOCK_D, WARPS, TILES, E), q, input_precision="ieee") * scale_log2
    if SOFTCAP > 0:
        s = soft_cap(s, SOFTCAP)
    offs_n = tl.arange(0, 16 * TILES * WARPS).reshape(WARPS, 16 * TILES)[:, :, None]
    counts = offs_n < end
    if WINDOW > 0:
        counts &= offs_n >= begin
    s = tl.where(counts, s, float("-inf"))  # [WARPS, 16 * TILES, BLOCK_G]
    new_top = tl.maximum(top, tl.max(s, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a warp may have seen no token yet
    p = tl.exp2(s - base[:, None, :])
    rescale = tl.exp2(top - base)
    total = total * rescale + tl.sum(p, 1)
    v = _values_operand(v, BLOCK_D, WARPS, TILES, E)
    return new_top, total, tl.dot(v, p.to(v.dtype), acc * rescale[:, None, :], input_precision="ieee")


@triton.jit(do_not_specialize=["Lmax"], launch_metadata=decode_attention_cost)
def _decode_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    lengths_ptr,
    cos_ptr,  # [>= Lmax, ROPE_HALF]
    sin_ptr,
    q_norm_ptr,  # [D], or None
    k_norm_ptr,
    sinks_ptr,  # [Hq], or None
    partial_ptr,  # [B, Hkv, NUM_SPLITS, G, D] fp32 outputs, then [B, Hkv, NUM_SPLITS, G] fp32 log2 of their weights
    counter_ptr,  # [B, Hkv] int32, zero before and after
    out_ptr,  # [B, Hq, D]
    lse_ptr,  # [B, Hq] fp32, or None
    stride_qb,
    stride_qh,
    stride_kb,  # of k and v
    stride_kh,
    stride_cb,  # of k_cache and v_cache
    stride_ch,
    stride_cn,
    Lmax,
    scale_log2,  # scale * log2(e): the softmax is computed with exp2
    ROPE_HALF: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    EPS: tl.constexpr,  # of the norms
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    WARPS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    E: tl.constexpr,  # elements in 16 bytes
    USE_ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    STEP: tl.constexpr = 16 * TILES * WARPS  # tokens of a tile
    CACHED: tl.constexpr = k_cache_ptr.dtype.element_ty
    PAIR_IN_THREAD: tl.constexpr = 2 * ROPE_HALF == BLOCK_D and ROPE_HALF % (4 * E) == 0
    split = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    k_cache_ptr += batch * stride_cb + kv_head * stride_ch
    v_cache_ptr += batch * stride_cb + kv_head * stride_ch

    length = early_length(lengths_ptr, batch, WARPS, PDL)
    if PDL:
        start = first_tile(length, split, Lmax, STEP)
        rows = tl.minimum(tl.minimum(length, Lmax) - start, STEP)
        first_k = k_cache_ptr + tl.cast(start, tl.int64) * D
        first_v = v_cache_ptr + tl.cast(start, tl.int64) * D
        is_aligned = (first_k.to(tl.int64) | first_v.to(tl.int64)) % 16 == 0
        if (rows > 0) & (start >= 0) & (stride_cn == D) & is_aligned:
            num_bytes = rows * (D * (CACHED.primitive_bitwidth // 8))
            prefetch_l2(first_k, num_bytes)
            prefetch_l2(first_v, num_bytes)
        if q_norm_ptr is not None:
            prefetch_row(q_norm_ptr, D)
            prefetch_row(k_norm_ptr, D)
    wait_for_previous(PDL)

    lane = tl.arange(0, 32)[:, None, None, None]
    warp = tl.arange(0, WARPS)[None, :, None, None]
    d = tl.arange(0, BLOCK_D // (4 * E))[None, None, None, :] * (4 * E) + lane % 4 * E + warp * 0  # as keys are loaded
    d_v = tl.arange(0, BLOCK_D // (8 * E))[None, None, None, :] * (8 * E) + lane // 4 * E + warp * 0  # as values are
    d_rope = d
    if PAIR_IN_THREAD:  # the other half has the same angles
        d_rope = tl.arange(0, BLOCK_D // (8 * E))[None, None, None, :] * (4 * E) + lane % 4 * E + warp * 0
    head = lane // 4 + 8 * tl.arange(0, BLOCK_G // 8)[None, None, :, None]
    q_row = batch * stride_qb + (kv_head * G + head) * stride_qh
    new_row = batch * stride_kb + kv_head * stride_kh + lane * 0
    q = tl.zeros([WARPS, BLOCK_D, BLOCK_G], CACHED)
    top = tl.full([WARPS, BLOCK_G], float("-inf"), tl.float32)  # running maximum of the scores, in units of log2
    total = tl.zeros([WARPS, BLOCK_G], tl.float32)  # running sum of exp2(score - top)
    acc = tl.zeros([WARPS, BLOCK_D, BLOCK_G], tl.float32)

    read_early = -1
    while read_early != length:  # once, or twice if `length` was read before its time
        # What the first tile needs, all asked for before any of it is used.
        start = first_tile(length, split, Lmax, STEP)
        begin = window_begin(length, Lmax, WINDOW)
        last = tl.maximum(tl.minimum(length, Lmax) - 1, 0)
        k = _load_keys(k_cache_ptr, start, last, stride_cn, D, BLOCK_D, WARPS, TILES, E)
        v = _load_values(v_cache_ptr, start, last, stride_cn, D, BLOCK_D, WARPS, TILES, E)
        q_new, q_pair = load_pairs(q_ptr + q_row, d, (head < G) & (d < D), ROPE_HALF, PAIR_IN_THREAD, E)
        k_new, k_pair = load_pairs(k_ptr + new_row, d, d < D, ROPE_HALF, PAIR_IN_THREAD, E)
        v_new = load_vectors(v_ptr + new_row + d_v, d_v < D, E)
        cos = 1.0
        sin = 0.0
        if ROPE_HALF > 0:
            position = tl.minimum(length, Lmax - 1)
            cos = rope_row(cos_ptr, d_rope, position, ROPE_HALF, E)
            sin = rope_row(sin_ptr, d_rope, position, ROPE_HALF, E)
        read_early = length
        if PDL:
            length = tl.maximum(tl.load(lengths_ptr + batch, cache_modifier=".cg"), 0)
        if q_norm_ptr is not None:
            q_new, q_pair = norm_pairs(q_new, q_pair, q_norm_ptr, d, D, EPS, ROPE_HALF, PAIR_IN_THREAD, E)
        q_new = rotate(q_new, q_pair, d, cos, sin, ROPE_HALF, PAIR_IN_THREAD, E).to(CACHED)
        q = _queries_operand(q_new, BLOCK_D, WARPS, BLOCK_G, E)
        top, total = start_softmax(sinks_ptr, kv_head, split, G, WARPS, BLOCK_G, 0.0)
        acc = tl.zeros([WARPS, BLOCK_D, BLOCK_G], tl.float32)
        if (split == 0) & (read_early < Lmax):  # this block has the last tile, and the new token with it
            if k_norm_ptr is not None:  # here, as its weights would fill registers that the tile needs
                k_new, k_pair = norm_pairs(k_new, k_pair, k_norm_ptr, d, D, EPS, ROPE_HALF, PAIR_IN_THREAD, E)
            k_new = rotate(k_new, k_pair, d, cos, sin, ROPE_HALF, PAIR_IN_THREAD, E).to(CACHED)
            v_new = v_new.to(CACHED)
            if read_early == length:
                cache_row = tl.cast(length, tl.int64) * stride_cn
                at_k = k_cache_ptr + (cache_row + d)[:, :, :, :, None] + tl.arange(0, E)
                tl.store(at_k, k_new, mask=((lane < 4) & (warp == 0) & (d < D))[:, :, :, :, None])
                at_v = v_cache_ptr + (cache_row + d_v)[:, :, :, :, None] + tl.arange(0, E)
                tl.store(at_v, v_new, mask=((lane % 4 == 0) & (warp == 0) & (d_v < D))[:, :, :, :, None])
            # Later tokens of the tile do not count, but their v must be a number: the new token's.
            k_row = warp * (16 * TILES) + tl.arange(0, 2 * TILES)[None, None, :, None] * 8 + lane // 4
            k = insert(k, k_new, (k_row >= read_early - start)[:, :, :, :, None], USE_ASM)
            part = tl.arange(0, 4 * TILES)[None, None, :, None]
            v_row = warp * (16 * TILES) + part // 2 * 8 + part % 2 + lane % 4 * 2
            v = insert(v, v_new, (v_row >= read_early - start)[:, :, :, :, None], USE_ASM)
            top, total, acc = _attend(
                q, k, v, top, total, acc, begin - start, read_early + 1 - start, scale_log2,
                SOFTCAP, WINDOW, BLOCK_D, WARPS, TILES, E,
            )  # fmt: skip
        elif start >= 0:
            top, total, acc = _attend(
                q, k, v, top, total, acc, begin - start, Lmax - start, scale_log2,
                SOFTCAP, WINDOW, BLOCK_D, WARPS, TILES, E,
            )  # fmt: skip

    begin = window_begin(length, Lmax, WINDOW)
    splits = tl.minimum(tl.cdiv(tokens(length, Lmax), STEP) - begin // STEP, NUM_SPLITS)
    if split >= splits:
        return
    start = first_tile(length, split, Lmax, STEP) - splits * STEP
    while start >= begin // STEP * STEP:  # from the last tile to the first; all of their tokens exist
        k = _load_keys(k_cache_ptr, start, start + STEP, stride_cn, D, BLOCK_D, WARPS, TILES, E)
        v = _load_values(v_cache_ptr, start, start + STEP, stride_cn, D, BLOCK_D, WARPS, TILES, E)
        top, total, acc = _attend(
            q, k, v, top, total, acc, begin - start, STEP, scale_log2, SOFTCAP, WINDOW, BLOCK_D, WARPS, TILES, E
        )
        start -= splits * STEP

    block_top = tl.max(top, 0)
    weight = tl.exp2(top - block_top[None, :])
    block_total = tl.sum(total * weight, 0)
    acc = add_warps(acc * weight[:, None, :], WARPS) * (1.0 / block_total)[None, :]  # [BLOCK_D, BLOCK_G]
    finish(
        acc, block_top, block_total, partial_ptr, counter_ptr, out_ptr, lse_ptr, batch, kv_head, split, splits,
        G, D, NUM_SPLITS, BLOCK_G, BLOCK_D, E,
    )  # fmt: skip


@dataclass(frozen=True)
class DecodeAttentionConfig:
    num_splits: int  # the most blocks that share a sequence and KV head
    num_warps: int
    tiles: int  # of 16 tokens that a warp takes at once


@cache
def pick_config(
    kv_heads: int, group: int, max_length: int, head_dim: int, itemsize: int, device: DeviceFacts
) -> DecodeAttentionConfig:
    """About one block an SM at batch 1. The batch must not be asked: a row has the same bits in every batch. max_length
    is the cache's, or the window if that is less.

    For 16 bits swept on an H100, 2026-11-24 (docs/notes/attention.md; benchmarks/sweep_decode_attention.py does it
    again): 32 query and 8 KV heads of size 64 and 128, 128 to 32,768 tokens, batch 1 to 8; for 8 bits on an H200,
    2026-11-28, 512 to 32,768 tokens, batch 1 and 8. Other chips, head sizes and numbers of heads take after it.
    """
    block_d = triton.next_power_of_2(head_dim)
    splits = max(1, device.sm_count // kv_heads)
    if itemsize == 4 or block_d > 128:
        num_warps, tiles = 4, 1
    elif max_length <= 128:  # one block, no partial results
        num_warps, tiles = 4, 2
    elif max_length <= (1024 if block_d <= 64 else 512):  # many small blocks: one tile each, of as many bytes
        num_warps, tiles = 2, 2 if itemsize == 1 else 1
        splits = max(1, splits // 2) if itemsize == 1 else splits
    elif max_length <= 4096:  # large tiles: few partial results, and all bytes in flight at once
        num_warps, tiles = 4, 2
    elif itemsize == 1:
        num_warps, tiles = 4, 2
        splits *= 2 if max_length > 16384 else 1
    else:
        num_warps, tiles = 8, 1
        splits *= 2 if block_d <= 64 else 1
    if itemsize == 1 and (group > 8 or not device.is_nvidia):  # two rows a query head: these fill registers
        num_warps, tiles = min(num_warps, 4), 1
    if group > 16:  # the warps' outputs fill registers, and meet in shared memory
        tiles = 1
        while num_warps > 1 and num_warps * block_d * triton.next_power_of_2(group) * 4 > device.shared_memory_bytes:
            num_warps //= 2
    splits = min(splits, triton.cdiv(max_length, 16 * tiles * num_warps), 64)
    return DecodeAttentionConfig(splits, num_warps, tiles)


@cache
def _launcher(
    config: DecodeAttentionConfig,
    rope_half: int,
    group: int,
    head_dim: int,
    cached: torch.dtype,
    window: int,
    softcap: float,
    eps: float,
    facts: DeviceFacts,
) -> Launcher:
    meta = {
        "ROPE_HALF": rope_half,
        "G": group,
        "D": head_dim,
        "EPS": eps,
        "SOFTCAP": softcap,
        "WINDOW": window,
        "NUM_SPLITS": config.num_splits,
        "WARPS": config.num_warps,
        "TILES": config.tiles,
        "BLOCK_G": max(8 if facts.is_nvidia else 16, triton.next_power_of_2(group)),  # what the tensor core takes
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "USE_ASM": facts.is_nvidia and cached.itemsize <= 2,
        "num_warps": config.num_warps,
        **pdl_options(facts),
    }
    if cached.itemsize == 1:
        meta["FP8"] = cached == torch.float8_e4m3fn
        meta["HAS_E4M3"] = facts.is_nvidia and facts.capability >= (8, 9)
        return Launcher(_decode_attention_8bit_kernel, **meta)
    return Launcher(_decode_attention_kernel, E=16 // cached.itemsize, **meta)


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
    assert D <= 256 and heads % kv_heads == 0
    assert q_strides[2] == k_strides[2] == v.stride(2) == cache_strides[3] == 1
    rope_half = 0 if rope_cos is None else rope_cos.shape[1]
    facts = device_facts(q.device)
    window = window if window < Lmax else 0  # then it is no limit
    cached = k_cache.dtype
    config = pick_config(kv_heads, heads // kv_heads, window or Lmax, D, cached.itemsize, facts)
    out = q.new_empty(batch, heads, D)
    partial = scratch(q, batch * heads * config.num_splits * (D + 1))
    arrivals = counters(q.device, batch * kv_heads)
    new, caches, strides = (q, k, v), (k_cache, v_cache), (*q_strides[:2], *k_strides[:2])
    if cached.itemsize == 1:
        assert Lmax == 1 or cache_strides[2] == D
        if cached != torch.int8:  # Triton knows e4m3 only where the GPU does
            caches = k_cache.view(torch.int8), v_cache.view(torch.int8)
        caches = *caches, kv_scale
        strides = *strides, *cache_strides[:2], *kv_scale.stride()[:2]
    else:
        strides = *strides, *cache_strides[:3]
    eps = 0.0 if q_norm is None else norm_eps
    _launcher(config, rope_half, heads // kv_heads, D, cached, window, softcap, eps, facts)(
        (config.num_splits, kv_heads, batch),
        (*new, *caches, lengths, rope_cos, rope_sin, q_norm, k_norm, sinks, partial, arrivals, out, lse),
        (*strides, Lmax, (D**-0.5 if scale is None else scale) * LOG2_E),
    )
    return out
