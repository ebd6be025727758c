"""Fused attention over whole sequences (prefill): softmax(q @ k.T * scale) @ v in one launch.

    q [B, Hq, Lq, D], k and v [B, Hkv, Lk, D] -> [B, Hq, Lq, D]; query head h reads KV head h // G, G = Hq / Hkv

The online softmax of FlashAttention-2 (Dao, 2023) with fp32 accumulation. A block owns BLOCK_M rows of one KV group,
where row r is query r // G of the group's head r % G: all heads of a group share each K and V tile that is read. G may
be any integer.

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

import triton
import triton.language as tl
from torch import Tensor

from tiny_gemm.device import DeviceFacts, device_facts, tensor_bytes
from tiny_gemm.launcher import Launcher
from tiny_gemm.triton_gemm import pdl_options, wait_for_previous

LOG2_E = 1.4426950408889634


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
    scale_log2,  # scale * log2(e): the softmax is computed with exp2
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
    wait_for_previous(PDL)
    block = tl.program_id(0)
    if CAUSAL:
        # The last rows see the most keys. They start first, so that short blocks fill the SMs that finish early.
        block = tl.num_programs(0) - 1 - block
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    Hq = tl.num_programs(1) * G

    offs_d = tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    query, head = row // G, row % G  # head within the group
    first_query = block * BLOCK_M // G
    mask_m = row < Lq * G
    mask_d = offs_d < D

    # Scalar bases take the large offsets, in int64; offsets within a tile fit in int32.
    q_ptr += batch * stride_qb + kv_head * G * stride_qh + tl.cast(first_query, tl.int64) * stride_qm
    offs_q = (query - first_query)[:, None] * stride_qm + head[:, None] * stride_qh + offs_d[None, :]
    q = tl.load(q_ptr + offs_q, mask=mask_m[:, None] & mask_d[None, :], other=0.0)  # [BLOCK_M, BLOCK_D]
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    offs_k = offs_n[:, None] * stride_kn + offs_d[None, :]
    offs_v = offs_n[:, None] * stride_vn + offs_d[None, :]

    # Keys [inner, full) are seen by every row of the block and need no mask; [begin, inner) and [full, end) need one.
    end = Lk
    full = Lk
    if CAUSAL:
        end = tl.minimum(Lk, tl.minimum((block * BLOCK_M + BLOCK_M - 1) // G, Lq - 1) + Lk - Lq + 1)
        full = tl.maximum(tl.minimum(Lk, first_query + Lk - Lq + 1), 0)
    full = full // BLOCK_N * BLOCK_N
    begin = 0
    inner = 0
    if WINDOW > 0:
        begin = tl.maximum(first_query + Lk - Lq + 1 - WINDOW, 0) // BLOCK_N * BLOCK_N
        inner = tl.minimum(tl.cdiv(tl.maximum(end - WINDOW, 0), BLOCK_N) * BLOCK_N, full)

    last_key = query + Lk - Lq  # [BLOCK_M], for CAUSAL
    if HAS_DROPOUT:
        probability_row = ((batch * Hq + kv_head * G + head) * Lq + query) * Lk  # [BLOCK_M] int64

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)  # running maximum of the scores, in units of log2
    total = tl.zeros([BLOCK_M], tl.float32)  # running sum of exp2(score - top)
    if sinks_ptr is not None:  # as if a key of that score and no value had been seen
        top = tl.load(sinks_ptr + kv_head * G + head).to(tl.float32) * 1.4426950408889634  # [BLOCK_M]
        total = tl.full([BLOCK_M], 1.0, tl.float32)
    for MASKED in tl.static_range(2):
        first = full - (inner - begin) if MASKED else inner
        last = end if MASKED else full
        for step in range(first, last, BLOCK_N):
            start = step
            if MASKED and WINDOW > 0:
                start = tl.where(step < full, step - (full - inner), step)
            key = start + offs_n
            mask_kv = (key < Lk)[:, None] & mask_d[None, :] if MASKED else mask_d[None, :]
            k_tile_ptr = k_ptr + tl.cast(start, tl.int64) * stride_kn
            v_tile_ptr = v_ptr + tl.cast(start, tl.int64) * stride_vn
            k = tl.load(k_tile_ptr + offs_k, mask=mask_kv, other=0.0)  # [BLOCK_N, BLOCK_D]
            s = tl.dot(q, k.T, input_precision="ieee") * scale_log2  # [BLOCK_M, BLOCK_N]
            if SOFTCAP > 0:  # tanh(x) = 1 - 2 / (1 + exp(2 x)); s has a factor log2(e)
                s = SOFTCAP * 1.4426950408889634 * (1.0 - 2.0 / (1.0 + tl.exp2(s * (2.0 / SOFTCAP))))
            if MASKED:
                visible = key[None, :] <= last_key[:, None] if CAUSAL else key[None, :] < Lk
                if WINDOW > 0:
                    visible &= key[None, :] > last_key[:, None] - WINDOW
                s = tl.where(visible, s, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            shift = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
            p = tl.exp2(s - shift[:, None])  # [BLOCK_M, BLOCK_N]
            rescale = tl.exp2(top - shift)
            total = total * rescale + tl.sum(p, 1)
            if HAS_DROPOUT:
                keep = tl.rand(seed, probability_row[:, None] + key[None, :]) >= dropout_p
                p = tl.where(keep, p, 0.0)
            v = tl.load(v_tile_ptr + offs_v, mask=mask_kv, other=0.0)  # [BLOCK_N, BLOCK_D]
            acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
            top = new_top

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


def pick_config(rows: int, head_dim: int, itemsize: int, has_dropout: bool, device: DeviceFacts) -> AttentionConfig:
    """rows: Lq * G, the rows of one KV group.

    Guessed on 2026-11-22 from registers (no spills on any target) and shared memory; no sweep on a GPU yet.
    """
    block_d = triton.next_power_of_2(head_dim)
    wgmma = device.is_nvidia and device.capability[0] in (9, 10)  # keeps scores and operands out of the registers
    if itemsize == 4:  # no tensor cores in full precision: small tiles, or the registers do not hold them
        return AttentionConfig(16, 32 if block_d <= 128 else 16, num_warps=4, num_stages=1)
    num_stages = 3 if device.shared_memory_bytes >= 160 * 1024 else 2
    if has_dropout:
        return AttentionConfig(64, 32, num_warps=8, num_stages=2)
    if rows <= 16:
        return AttentionConfig(16, 64 if block_d <= 128 else 32, num_warps=4, num_stages=2)
    if block_d > 128:
        return AttentionConfig(64, 32, num_warps=8, num_stages=2)
    if rows <= 64:
        return AttentionConfig(64, 64 if wgmma else 32, num_warps=4, num_stages=num_stages)
    if block_d <= 64:
        return AttentionConfig(128, 64, num_warps=4 if wgmma else 8, num_stages=num_stages)
    return AttentionConfig(128, 64 if wgmma else 32, num_warps=8, num_stages=num_stages)


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
    scale_log2 = (D**-0.5 if scale is None else scale) * LOG2_E
    _launcher(config, causal, window, softcap, dropout_p > 0, group, D, facts)(
        (triton.cdiv(Lq * group, config.block_m), kv_heads, batch),
        (q, k, v, None if sinks is None else sinks.contiguous(), out),
        (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], Lq, Lk, scale_log2, float(dropout_p), seed),
    )
    return out.transpose(1, 2)
