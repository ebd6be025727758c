"""Fused attention over whole sequences (prefill): softmax(q @ k.T * scale) @ v in one launch.

    q [B, Hq, Lq, D], k and v [B, Hkv, Lk, D] -> [B, Hq, Lq, D]; query head h reads KV head h // G, G = Hq / Hkv

The online softmax of FlashAttention-2 (Dao, 2023) with fp32 accumulation. A block owns BLOCK_M rows of one KV group,
where row r is query r // G of the group's head r % G: all heads of a group share each K and V tile that is read. G may
be any integer. One loop walks the tiles; those that some row does not see whole are masked behind a branch that the
whole block takes or leaves. Scores stay unscaled until one fma gives exp2 its argument, s * scale * log2(e) - top.

causal is aligned bottom-right: query i sees keys j <= i + Lk - Lq, so that Lq new tokens follow Lk - Lq cached ones; a
row that sees no key is zero. Dropout keeps probability (b, h, i, j) where the number that tl.rand(seed, ...) gives for
((b * Hq + h) * Lq + i) * Lk + j is >= dropout_p (reference.dropout_keep_mask is the same in torch), and scales what it
keeps by 1 / (1 - dropout_p); the softmax is normalised before dropout.

window, with causal: query i sees of its keys only the last `window`, and tiles that no row of a block sees are not
read. softcap: a score s becomes softcap * tanh(s / softcap) (Gemma 2). sinks [Hq]: a score that joins each row's
softmax and that no value belongs to (StreamingLLM, Xiao et al., 2023; as a learned number in gpt-oss).
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiny_gemm.device import DeviceFacts, device_facts, tensor_bytes
from tiny_gemm.launcher import Launcher
from tiny_gemm.triton_parts import pdl_options, wait_for_previous

LOG2_E = 1.4426950408889634
SMALLEST_SCALE = 2.0**-120  # below it scores count as 0; a scale that underflows turns a masked score, -inf, into NaN


def _sum_to(n: int) -> int:
    """1 + 2 + ... + n; 0 for n < 0."""
    return n * (n + 1) // 2 if n > 0 else 0


def _fused_attention_cost(grid, kernel, args) -> dict:
    """Bytes and flops of one launch, for a launch hook; only the keys and the pairs of query and key that are seen."""
    q, k, Lq, Lk = args["q_ptr"], args["k_ptr"], args["Lq"], args["Lk"]
    keys, pairs = Lk, Lq * Lk
    if args["CAUSAL"]:
        rows = min(Lq, Lk)  # those that see a key at all; they see Lk - rows + 1, ... Lk of them, or the window's
        window = args["WINDOW"] or Lk
        keys = min(Lk, rows + window - 1)
        pairs = _sum_to(Lk) - _sum_to(Lk - rows) - _sum_to(Lk - window) + _sum_to(Lk - rows - window)
    flops = "flops32" if q.element_size() == 4 else "flops16"
    return {
        "bytes": tensor_bytes(q, args["out_ptr"], args["sinks_ptr"]) + tensor_bytes(k, args["v_ptr"]) // Lk * keys,
        flops: 4 * q.shape[0] * q.shape[1] * pairs * args["D"],
    }


@triton.jit(do_not_specialize=["Lq", "Lk", "seed"], launch_metadata=_fused_attention_cost)
def _fused_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    sinks_ptr,  # [Hq], or None
    out_ptr,  # contiguous [B, Lq, Hq, D]
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    Lq,
    Lk,
    scale_log2,  # scale * log2(e), above 0: the softmax is computed with exp2
    dropout_p,
    seed,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    SOFTCAP: tl.constexpr,  # 0: none
    HAS_DROPOUT: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    # Programs start in the order of their ids. The last rows of all heads come first: with a causal mask they see the
    # most keys, and short blocks fill the SMs that finish early. (The grid's first size is the number of blocks because
    # its second may not exceed 65,535.)
    kv_heads = tl.num_programs(1)
    place = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    block = tl.num_programs(0) - 1 - place // kv_heads
    kv_head = (place % kv_heads).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    Hq = kv_heads * G

    offs_d = tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    query, head = row // G, row % G  # head within the group
    first_query = block * BLOCK_M // G
    last_key = query + Lk - Lq  # [BLOCK_M], for CAUSAL
    mask_m = row < Lq * G
    mask_d = offs_d < D

    # Scalar bases take the large offsets, in int64; offsets within a tile fit in int32.
    q_ptr += batch * stride_qb + kv_head * G * stride_qh + tl.cast(first_query, tl.int64) * stride_qm
    offs_q = (query - first_query)[:, None] * stride_qm + head[:, None] * stride_qh + offs_d[None, :]
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh

    # The block reads keys [begin, end); every row sees all of [inner, full), and tiles that reach beyond are masked.
    begin = 0
    inner = 0
    full = Lk
    end = Lk
    if CAUSAL:
        full = tl.minimum(Lk, first_query + Lk - Lq + 1)
        end = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // G, Lq - 1) + Lk - Lq + 1
    if WINDOW > 0:
        begin = tl.maximum(first_query + Lk - Lq + 1 - WINDOW, 0) // BLOCK_N * BLOCK_N
        inner = end - WINDOW

    wait_for_previous(PDL)
    q = tl.load(q_ptr + offs_q, mask=mask_m[:, None] & mask_d[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)  # running maximum of the scores, in units of log2
    # Running sums of exp2(score - top), one for every eighth key: on a tensor core's accumulator they lie in the lanes
    # that hold the scores, so that no step adds up over lanes.
    sums = tl.zeros([BLOCK_M, 8], tl.float32)
    if sinks_ptr is not None:  # as if a key of that score and no value had been seen
        top = tl.load(sinks_ptr + kv_head * G + head).to(tl.float32) * 1.4426950408889634  # [BLOCK_M]
        sums = tl.full([BLOCK_M, 8], 1 / 8, tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    to_log2 = 1.0 if SOFTCAP > 0 else scale_log2  # what a score is still to be multiplied by; a cap scales it before
    if HAS_DROPOUT:
        probability_row = ((batch * Hq + kv_head * G + head) * Lq + query) * Lk  # [BLOCK_M] int64

    for start in range(begin, end, BLOCK_N):
        key = start + offs_n
        kv_row = tl.minimum(offs_n, Lk - 1 - start)[:, None]  # past the end the last row again: its p is 0
        k_tile_ptr = k_ptr + tl.cast(start, tl.int64) * stride_kn
        v_tile_ptr = v_ptr + tl.cast(start, tl.int64) * stride_vn
        k = tl.load(k_tile_ptr + (kv_row * stride_kn + offs_d[None, :]), mask=mask_d[None, :], other=0.0)
        s = tl.dot(q, k.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]; k [BLOCK_N, BLOCK_D]
        if SOFTCAP > 0:  # tanh(x) = 1 - 2 / (1 + exp(2 x)); s gets a factor log2(e)
            s = SOFTCAP * 1.4426950408889634 * (1.0 - 2.0 / (1.0 + tl.exp2(s * (scale_log2 * (2.0 / SOFTCAP)))))
        masked = start + BLOCK_N > full
        if WINDOW > 0:
            masked = masked | (start < inner)
        if masked:
            visible = key[None, :] <= last_key[:, None] if CAUSAL else key[None, :] < Lk
            if WINDOW > 0:
                visible &= key[None, :] > last_key[:, None] - WINDOW
            s = tl.where(visible, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1) * to_log2)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s * to_log2 - shift[:, None])  # [BLOCK_M, BLOCK_N]
        rescale = tl.exp2(top - shift)
        sums = sums * rescale[:, None] + tl.sum(tl.reshape(p, [BLOCK_M, BLOCK_N // 8, 8]), 1)
        if HAS_DROPOUT:
            keep = tl.rand(seed, probability_row[:, None] + key[None, :]) >= dropout_p
            p = tl.where(keep, p, 0.0)
        v = tl.load(v_tile_ptr + (kv_row * stride_vn + offs_d[None, :]), mask=mask_d[None, :], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")  # v [BLOCK_N, BLOCK_D]
        top = new_top

    total = tl.sum(sums, 1)
    if HAS_DROPOUT:
        acc /= 1.0 - dropout_p
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_ptr += ((batch * Lq + first_query) * Hq + kv_head * G) * D
    offs_out = ((query - first_query)[:, None] * Hq + head[:, None]) * D + offs_d[None, :]
    tl.store(out_ptr + offs_out, out.to(out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_d[None, :])


@dataclass(frozen=True)
class AttentionConfig:
    block_m: int  # rows (query positions x heads of a group) a block
    block_n: int  # keys a step
    num_warps: int
    num_stages: int


@cache
def pick_config(rows: int, head_dim: int, itemsize: int, has_dropout: bool, device: DeviceFacts) -> AttentionConfig:
    """rows: Lq * G, the rows of one KV group.

    Swept on an H200, 2026-11-28: 16 bits, heads of 64 and 128, G 4, 128 to 8,192 tokens (docs/notes/attention.md).
    Other chips follow by analogy: 4 warps with 16 rows each, and shared memory for two blocks an SM. Dropout, float32,
    larger heads and up to 16 rows: guessed on 2026-11-22 from registers (no spills) and shared memory.
    """
    block_d = triton.next_power_of_2(head_dim)
    wgmma = device.is_nvidia and device.capability[0] in (9, 10)  # keeps scores and operands out of the registers
    if itemsize == 4:  # no tensor cores in full precision: small tiles, or the registers do not hold them
        return AttentionConfig(16, 32 if block_d <= 128 else 16, num_warps=4, num_stages=1)
    if has_dropout:
        return AttentionConfig(64, 32, num_warps=8, num_stages=2)
    if rows <= 16:
        return AttentionConfig(16, 64 if block_d <= 128 else 32, num_warps=4, num_stages=2)
    if block_d > 128:
        return AttentionConfig(64, 32, num_warps=8, num_stages=2)
    if not wgmma:
        small = device.shared_memory_bytes < 160 * 1024
        return AttentionConfig(64, 32 if small and block_d > 64 else 64, num_warps=4, num_stages=2)
    if block_d > 64:
        return AttentionConfig(64, 64, num_warps=4, num_stages=3)
    if rows < 6 * 1024:  # that is 1,536 tokens at G 4
        return AttentionConfig(64, 128, num_warps=4, num_stages=2)
    return AttentionConfig(128, 64, num_warps=8, num_stages=3)


@cache
def _launcher(
    config: AttentionConfig,
    causal: bool,
    window: int,
    softcap: float,
    has_dropout: bool,
    group: int,
    head_dim: int,
    facts: DeviceFacts,
) -> Launcher:
    return Launcher(
        _fused_attention_kernel,
        CAUSAL=causal,
        WINDOW=window,
        SOFTCAP=softcap,
        HAS_DROPOUT=has_dropout,
        G=group,
        D=head_dim,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=triton.next_power_of_2(head_dim),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **pdl_options(facts),
    )


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """q [B, Hq, Lq, D], k, v [B, Hkv, Lk, D] -> [B, Hq, Lq, D] in q's dtype, laid out as [B, Lq, Hq, D].

    Any strides with the last dimension contiguous; bf16, fp16, or fp32 (exact products, slow). scale: D ** -0.5.
    window, with causal: 0, or how many keys a query sees, its own included. softcap: 0, or scores become softcap *
    tanh(score / softcap). sinks: [Hq].
    """
    batch, heads, Lq, D = q.shape
    kv_heads, Lk = k.shape[1], k.shape[2]
    assert (
        D <= 256
        and heads % kv_heads == 0
        and 0 <= dropout_p < 1
        and q.dtype == k.dtype == v.dtype
        and k.shape == v.shape
        and (causal or not window)
    )
    assert q.stride(3) == k.stride(3) == v.stride(3) == 1
    group = heads // kv_heads
    facts = device_facts(q.device)
    config = pick_config(Lq * group, D, q.element_size(), dropout_p > 0, facts)
    window = window if window < Lk else 0  # then it is no limit
    out = q.new_empty(batch, Lq, heads, D)
    scale = D**-0.5 if scale is None else scale
    if scale < 0:  # the kernel takes the maximum of unscaled scores
        q, scale = -q, -scale
    if scale < SMALLEST_SCALE:
        q, scale = torch.zeros_like(q), 1.0
    _launcher(config, causal, window, softcap, dropout_p > 0, group, D, facts)(
        (-(-Lq * group // config.block_m), kv_heads, batch),
        (q, k, v, None if sinks is None else sinks.contiguous(), out),
        (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], Lq, Lk, scale * LOG2_E, float(dropout_p), seed),
    )
    return out.transpose(1, 2)
