"""One decode step of attention in one launch: RoPE, append to the KV cache, attention over it, and the reduction.

    q [B, Hq, D], k, v [B, Hkv, D] of one new token a sequence; k_cache, v_cache [B, Hkv, Lmax, D]; lengths int32 [B]
    token b stands at position lengths[b]: q and k are rotated for it, k and v stored there, and q attends to
    positions 0 .. lengths[b] -> [B, Hq, D]

Flash-decoding (Dao et al., 2023): the tokens of a sequence are cut into chunks, a block a chunk and KV head, and the
query heads of a group (G = Hq / Hkv) share a block's K and V. Where the chunks lie depends on the sequence's own
length, on Lmax and on the chip, never on the batch, and partial results are added in the order of the chunks, so that a
row has the same bits alone and in any batch. The blocks of a (sequence, KV head) count their arrival; the last one adds
the partials up and zeroes the counter again. Nobody waits for anybody.

The block of the last chunk owns the new token: it uses k and v from its registers, rounded as the cache rounds them,
and stores them; no other block reads that position.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiny_gemm.device import DeviceFacts, counters, device_facts, scratch, tensor_bytes
from tiny_gemm.launcher import Launcher
from tiny_gemm.triton_gemm import pdl_options, wait_for_previous

LOG2_E = 1.4426950408889634


@triton.jit
def _load_rotated(x_ptr, offs_d, mask, cos, sin, ROPE_HALF: tl.constexpr):
    """x + offs_d as fp32, with RoPE over the first 2 * ROPE_HALF dimensions: d is paired with d + ROPE_HALF."""
    x = tl.load(x_ptr + offs_d, mask=mask, other=0.0).to(tl.float32)
    if ROPE_HALF > 0:
        pair = tl.where(offs_d < ROPE_HALF, offs_d + ROPE_HALF, offs_d - ROPE_HALF)
        rotates = offs_d < 2 * ROPE_HALF
        y = tl.load(x_ptr + pair, mask=mask & rotates, other=0.0).to(tl.float32)
        x = x * cos + tl.where(offs_d < ROPE_HALF, -y, y) * sin
    return x


def _decode_attention_cost(grid, kernel, args) -> dict:
    """Bytes and flops of one launch, for a launch hook; the partial results stay in L2 and are not counted.

    They depend on lengths in device memory, which are read here, and the read waits for the GPU. In a stream that is
    being captured nothing can be read, and nothing is declared.
    """
    lengths, Lmax, D = args["lengths_ptr"], args["Lmax"], args["D"]
    if lengths.is_cuda and torch.cuda.is_current_stream_capturing():
        return {}
    q, k, k_cache = args["q_ptr"], args["k_ptr"], args["k_cache_ptr"]
    seen = [min(max(n, 0), Lmax) for n in lengths.tolist()]  # tokens of each row that the cache holds
    row = 2 * k.shape[1] * D * k_cache.element_size()  # K and V of one token
    rope = 2 * len(seen) * args["ROPE_HALF"] * 4
    appended = sum(row for n in seen if n < Lmax)
    attended = sum(min(n + 1, Lmax) for n in seen)
    flops = "flops32" if q.element_size() == 4 else "flops16"
    return {
        "bytes": tensor_bytes(q, k, args["v_ptr"], lengths, args["out_ptr"]) + rope + appended + row * sum(seen),
        flops: 4 * q.shape[1] * attended * D,
    }


@triton.jit(do_not_specialize=["Lmax"], launch_metadata=_decode_attention_cost)
def _decode_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    lengths_ptr,
    cos_ptr,  # [>= Lmax, ROPE_HALF]
    sin_ptr,
    partial_ptr,  # [B, Hkv, NUM_SPLITS, G, D] fp32 outputs, then [B, Hkv, NUM_SPLITS, G] fp32 log2 of their weights
    counter_ptr,  # [B, Hkv] int32, zero before and after
    out_ptr,  # [B, Hq, D]
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
    NUM_SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    split = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)

    length = tl.maximum(tl.load(lengths_ptr + batch), 0)
    cached = tl.minimum(length, Lmax)  # tokens to read from the cache
    tokens = tl.minimum(length + 1, Lmax)  # and with the new one, if it still fits
    chunk = tl.cdiv(tl.cdiv(tokens, NUM_SPLITS), BLOCK_N) * BLOCK_N
    num_chunks = tl.cdiv(tokens, chunk)
    if split >= num_chunks:
        return

    offs_g = tl.arange(0, BLOCK_G)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    offs_n = tl.arange(0, BLOCK_N)
    mask_d = offs_d < D
    mask_gd = (offs_g < G)[:, None] & mask_d

    cos = 1.0
    sin = 0.0
    if ROPE_HALF > 0:
        rope_row = tl.minimum(length, Lmax - 1).to(tl.int64) * ROPE_HALF
        rotates = offs_d < 2 * ROPE_HALF
        cos = tl.load(cos_ptr + rope_row + offs_d % ROPE_HALF, mask=rotates, other=1.0)  # [1, BLOCK_D]
        sin = tl.load(sin_ptr + rope_row + offs_d % ROPE_HALF, mask=rotates, other=0.0)
    q_ptr += batch * stride_qb + kv_head * G * stride_qh
    q = _load_rotated(q_ptr + offs_g[:, None] * stride_qh, offs_d, mask_gd, cos, sin, ROPE_HALF)
    q = q.to(k_cache_ptr.dtype.element_ty)  # [BLOCK_G, BLOCK_D]

    top = tl.full([BLOCK_G], float("-inf"), tl.float32)  # running maximum of the scores, in units of log2
    total = tl.zeros([BLOCK_G], tl.float32)  # running sum of exp2(score - top)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    k_cache_ptr += batch * stride_cb + kv_head * stride_ch
    v_cache_ptr += batch * stride_cb + kv_head * stride_ch
    if (split == num_chunks - 1) & (length < Lmax):
        new_row = batch * stride_kb + kv_head * stride_kh
        k_new = _load_rotated(k_ptr + new_row, offs_d, mask_d, cos, sin, ROPE_HALF)
        k_new = k_new.to(k_cache_ptr.dtype.element_ty)  # [1, BLOCK_D]
        v_new = tl.load(v_ptr + new_row + offs_d, mask=mask_d, other=0.0).to(v_cache_ptr.dtype.element_ty)
        cache_row = tl.cast(length, tl.int64) * stride_cn
        tl.store(k_cache_ptr + cache_row + offs_d, k_new, mask=mask_d)
        tl.store(v_cache_ptr + cache_row + offs_d, v_new, mask=mask_d)
        top = tl.sum(q.to(tl.float32) * k_new.to(tl.float32), 1) * scale_log2
        total += 1.0
        acc += v_new.to(tl.float32)

    offs_kv = offs_n[:, None] * stride_cn + offs_d  # [BLOCK_N, BLOCK_D]
    end = tl.minimum((split + 1) * chunk, cached)
    for start in range(split * chunk, end, BLOCK_N):
        mask_n = start + offs_n < end
        tile = tl.cast(start, tl.int64) * stride_cn
        k = tl.load(k_cache_ptr + tile + offs_kv, mask=mask_n[:, None] & mask_d, other=0.0)  # [BLOCK_N, BLOCK_D]
        v = tl.load(v_cache_ptr + tile + offs_kv, mask=mask_n[:, None] & mask_d, other=0.0)  # [BLOCK_N, BLOCK_D]
        s = tl.dot(q, k.T, input_precision="ieee") * scale_log2  # [BLOCK_G, BLOCK_N]
        s = tl.where(mask_n[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])  # [BLOCK_G, BLOCK_N]
        rescale = tl.exp2(top - new_top)
        total = total * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        top = new_top

    acc /= total[:, None]
    out_ptr += (batch * tl.num_programs(1) + kv_head) * G * D
    if num_chunks == 1:
        tl.store(out_ptr + offs_g[:, None] * D + offs_d, acc.to(out_ptr.dtype.element_ty), mask=mask_gd)
        return

    group = batch * tl.num_programs(1) + kv_head
    weight_ptr = partial_ptr + tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * NUM_SPLITS * G * D
    weight_ptr += group * NUM_SPLITS * G
    partial_ptr += group * NUM_SPLITS * G * D
    tl.store(partial_ptr + split * G * D + offs_g[:, None] * D + offs_d, acc, mask=mask_gd)
    tl.store(weight_ptr + split * G + offs_g, top + tl.log2(total), mask=offs_g < G)

    # All of the block's stores come before its arrival, which releases them; the last block's arrival acquires all of
    # them, and it reads past L1, which may hold lines from before.
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr + group, 1, sem="acq_rel", scope="gpu")
    if arrived == num_chunks - 1:
        _reduce_partials(partial_ptr, weight_ptr, out_ptr, num_chunks, G, D, NUM_SPLITS, BLOCK_D)
        tl.store(counter_ptr + group, 0)


@triton.jit
def _reduce_partials(
    partial_ptr,  # [NUM_SPLITS, G, D] fp32
    weight_ptr,  # [NUM_SPLITS, G] fp32
    out_ptr,  # [G, D]
    num_chunks,
    G: tl.constexpr,
    D: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = sum over chunks of partial * 2 ** weight, over sum of 2 ** weight; the sums always run in one order."""
    GROUP: tl.constexpr = triton.next_power_of_2(G)
    ALL: tl.constexpr = triton.next_power_of_2(NUM_SPLITS)
    STEP: tl.constexpr = max(1, min(ALL, 4096 // (GROUP * BLOCK_D)))  # chunks at once: 4096 values in registers
    offs_g = tl.arange(0, GROUP)
    mask_g = offs_g < G
    offs_d = tl.arange(0, BLOCK_D)

    offs_s = tl.arange(0, ALL)[:, None]
    mask_sg = (offs_s < num_chunks) & mask_g[None, :]
    weights = tl.load(
        weight_ptr + offs_s * G + offs_g[None, :], mask=mask_sg, other=float("-inf"), cache_modifier=".cg"
    )
    top = tl.where(mask_g, tl.max(weights, 0), 0.0)
    total = tl.where(mask_g, tl.sum(tl.exp2(weights - top[None, :]), 0), 1.0)

    offs_gd = offs_g[:, None] * D + offs_d[None, :]
    mask_gd = mask_g[:, None] & (offs_d < D)[None, :]
    acc = tl.zeros([GROUP, BLOCK_D], tl.float32)
    for start in range(0, num_chunks, STEP):
        split = start + tl.arange(0, STEP)
        mask_s = split < num_chunks
        weight = tl.load(
            weight_ptr + split[:, None] * G + offs_g[None, :],
            mask=mask_s[:, None] & mask_g[None, :],
            other=float("-inf"),
            cache_modifier=".cg",
        )  # [STEP, GROUP]
        partial = tl.load(
            partial_ptr + split[:, None, None] * (G * D) + offs_gd[None, :, :],
            mask=mask_s[:, None, None] & mask_gd[None, :, :],
            other=0.0,
            cache_modifier=".cg",
        )  # [STEP, GROUP, BLOCK_D]
        acc += tl.sum(partial * tl.exp2(weight - top[None, :])[:, :, None], 0)
    tl.store(out_ptr + offs_gd, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask_gd)


@dataclass(frozen=True)
class DecodeAttentionConfig:
    num_splits: int  # the most chunks that a sequence is cut into
    block_n: int  # tokens a step; a chunk is a multiple of it
    num_warps: int
    num_stages: int


@cache
def pick_config(
    kv_heads: int, max_length: int, head_dim: int, itemsize: int, device: DeviceFacts
) -> DecodeAttentionConfig:
    """About one block an SM at batch 1. The batch must not be asked: a row has the same bits in every batch.

    Swept on an H200, 2026-11-22, at D 64 and length 512 only, where two warps beat four; the rest is guessed.
    """
    block_d = triton.next_power_of_2(head_dim)
    block_n = 16 if itemsize == 4 else 64 if block_d <= 128 else 32
    num_splits = max(1, min(device.sm_count // kv_heads, triton.cdiv(max_length, block_n), 64))
    if itemsize == 4:  # no tensor cores in full precision
        return DecodeAttentionConfig(num_splits, block_n, num_warps=8, num_stages=1)
    num_warps = 2 if block_d <= 64 and device.is_nvidia else 4
    return DecodeAttentionConfig(num_splits, block_n, num_warps, num_stages=3 if device.is_nvidia else 2)


@cache
def _launcher(config: DecodeAttentionConfig, rope_half: int, group: int, head_dim: int, facts: DeviceFacts) -> Launcher:
    return Launcher(
        _decode_attention_kernel,
        ROPE_HALF=rope_half,
        G=group,
        D=head_dim,
        NUM_SPLITS=config.num_splits,
        BLOCK_N=config.block_n,
        BLOCK_G=max(16, triton.next_power_of_2(group)),
        BLOCK_D=triton.next_power_of_2(head_dim),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **pdl_options(facts),
    )


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
    scale: float | None = None,
) -> Tensor:
    """Attention of one new token a sequence, q [B, Hq, D], k and v [B, Hkv, D], appended to the caches in place.

    q, k, v may be views of one QKV row (last dimension contiguous). k_cache, v_cache: [B, Hkv, Lmax, D], of one layout;
    lengths: int32 [B]; rope_cos, rope_sin: contiguous fp32 [>= Lmax, R / 2]. Returns [B, Hq, D] in q's dtype.
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
    config = pick_config(kv_heads, Lmax, D, k_cache.element_size(), facts)
    out = q.new_empty(batch, heads, D)
    partial = scratch(q, batch * heads * config.num_splits * (D + 1))
    arrivals = counters(q.device, batch * kv_heads)
    _launcher(config, rope_half, heads // kv_heads, D, facts)(
        (config.num_splits, kv_heads, batch),
        (q, k, v, k_cache, v_cache, lengths, rope_cos, rope_sin, partial, arrivals, out),
        (
            *q_strides[:2],
            *k_strides[:2],
            *cache_strides[:3],
            Lmax,
            (D**-0.5 if scale is None else scale) * LOG2_E,
        ),
    )
    return out
