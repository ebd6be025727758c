"""What the kernels of decode attention share: RoPE, where the tiles of a sequence lie, and the sums at the end.

Tensors in registers are of shape [32, WARPS, registers ..., E]: the first dimension is the lane, the second the warp,
and a thread holds E neighbouring columns.
"""

import torch
import triton
import triton.language as tl

from tiny_gemm.device import tensor_bytes
from tiny_gemm.triton_gemm import prefetch_l2


def decode_attention_cost(grid, kernel, args) -> dict:
    """Bytes and flops of one launch, for a launch hook; the partial results stay in L2 and are not counted.

    They depend on lengths in device memory, which are read here, and the read waits for the GPU. In a stream that is
    being captured nothing can be read, and nothing is declared.
    """
    lengths, Lmax, D = args["lengths_ptr"], args["Lmax"], args["D"]
    if lengths.is_cuda and torch.cuda.is_current_stream_capturing():
        return {}
    q, k, k_cache = args["q_ptr"], args["k_ptr"], args["k_cache_ptr"]
    lengths, window = lengths.tolist(), args["WINDOW"] or Lmax
    attended = sum(min(max(n, 0) + 1, Lmax, window) for n in lengths)  # the new token is written, the others read
    scale_bytes = 4 if args.get("kv_scale_ptr") is not None else 0
    row = 2 * k.shape[1] * (D * k_cache.element_size() + scale_bytes)  # K and V of one token
    rope = 2 * len(lengths) * args["ROPE_HALF"] * 4
    flops = "flops32" if q.element_size() == 4 else "flops16"
    small = (args.get(f"{name}_ptr") for name in ("v", "lengths", "out", "sinks", "lse", "q_norm", "k_norm"))
    return {"bytes": tensor_bytes(q, k, *small) + rope + row * attended, flops: 4 * q.shape[1] * attended * D}


@triton.jit
def load_columns(ptrs, d, is_there, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """What is at ptrs [.., E], where columns d [..] and on are at least D zero."""
    if D == BLOCK_D:
        return tl.load(ptrs, mask=is_there)
    else:
        return tl.load(ptrs, mask=((d < D) & is_there)[:, :, :, :, None], other=0.0)


@triton.jit
def insert(old, new, is_new, USE_ASM: tl.constexpr):
    """`new` where is_new [..., 1], `old` elsewhere. Triton selects numbers one by one; the asm does a word of them."""
    if USE_ASM:
        BITS: tl.constexpr = old.dtype.primitive_bitwidth
        mask = tl.where(is_new, -1, 0).to(tl.int16 if BITS == 16 else tl.int8).broadcast_to(old.shape)
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xCA;",  # mask & new | ~mask & old
            "=r,r,r,r",
            [mask, new.broadcast_to(old.shape), old],
            dtype=old.dtype,
            is_pure=True,
            pack=32 // BITS,
        )
    else:
        return tl.where(is_new, new, old)


@triton.jit
def first_of_pair(d, ROPE_HALF: tl.constexpr):
    """d or d - ROPE_HALF, and 0 for what is not rotated. (Of a remainder Triton would not know that 4 divides it.)"""
    return tl.where(d < ROPE_HALF, d, tl.where(d < 2 * ROPE_HALF, d - ROPE_HALF, 0))


@triton.jit
def rope_row(ptr, d, position, ROPE_HALF: tl.constexpr, E: tl.constexpr):
    """The cosines (or sines) of `position` for columns d and E - 1 more, of shape [..., E]; anything past what rotates.

    Loaded in fours, 16 bytes: the layout of other loads, E elements a thread, is then had without a move.
    """
    d = d[:, :, :, :, None] + tl.arange(0, E // 4) * 4
    ptr += tl.cast(position, tl.int64) * ROPE_HALF
    if ROPE_HALF % 4 == 0:
        cols = first_of_pair(d, ROPE_HALF)[:, :, :, :, :, None] + tl.arange(0, 4)
    else:
        cols = first_of_pair(d[:, :, :, :, :, None] + tl.arange(0, 4), ROPE_HALF)
    # The mask is always true, but the compiler does not know that; without one it moves the load behind a branch.
    row = tl.load(ptr + cols, mask=position >= 0)
    return row.reshape(row.shape[0], row.shape[1], row.shape[2], row.shape[3], E)


@triton.jit
def load_vectors(ptrs, mask, E: tl.constexpr):
    """What is at ptrs [32, WARPS, N, C] and the E - 1 places behind: [32, WARPS, N, C, E]; 0 where not mask.

    A load gives a thread 16 bytes; where that is less than E elements, several follow each other.
    """
    V: tl.constexpr = min(E, 128 // ptrs.dtype.element_ty.primitive_bitwidth)
    if V == E:
        return tl.load(ptrs[:, :, :, :, None] + tl.arange(0, E), mask=mask[:, :, :, :, None], other=0.0)
    else:
        ptrs = ptrs[:, :, :, :, None, None] + tl.arange(0, E // V)[:, None] * V + tl.arange(0, V)
        x = tl.load(ptrs, mask=mask[:, :, :, :, None, None], other=0.0)
        return x.reshape(x.shape[0], x.shape[1], x.shape[2], x.shape[3], E)


@triton.jit
def load_pairs(ptr, d, mask, ROPE_HALF: tl.constexpr, IN_THREAD: tl.constexpr, E: tl.constexpr):
    """Columns d and E - 1 more at ptr, of shape [..., E], and what RoPE pairs each with (anything if IN_THREAD)."""
    x = load_vectors(ptr + d, mask, E)
    y = x
    if ROPE_HALF > 0 and not IN_THREAD:
        V: tl.constexpr = min(E, 128 // ptr.dtype.element_ty.primitive_bitwidth)
        mask = mask[:, :, :, :, None]
        if V < E and ROPE_HALF % V == 0:  # whole vectors pair up, as load_vectors loads them
            cols = d[:, :, :, :, None] + tl.arange(0, E // V) * V
            pair = tl.where(cols < ROPE_HALF, cols + ROPE_HALF, cols - ROPE_HALF)[:, :, :, :, :, None] + tl.arange(0, V)
            mask = (mask & (cols < 2 * ROPE_HALF))[:, :, :, :, :, None]
            y = tl.load(ptr[:, :, :, :, None, None] + pair, mask=mask, other=0.0).reshape(x.shape)
        else:
            cols = d[:, :, :, :, None] + tl.arange(0, E)
            if ROPE_HALF % E == 0:
                pair = tl.where(d < ROPE_HALF, d + ROPE_HALF, d - ROPE_HALF)[:, :, :, :, None] + tl.arange(0, E)
            else:
                pair = tl.where(cols < ROPE_HALF, cols + ROPE_HALF, cols - ROPE_HALF)
            y = tl.load(ptr[:, :, :, :, None] + pair, mask=mask & (cols < 2 * ROPE_HALF), other=0.0)
    return x, y


@triton.jit
def prefetch_row(ptr, D: tl.constexpr):
    """Asks L2 for a row of weights, which may be done before the wait for the kernel ahead."""
    if ptr.to(tl.int64) % 16 == 0:
        prefetch_l2(ptr, D * (ptr.dtype.element_ty.primitive_bitwidth // 8))


@triton.jit
def norm_pairs(
    x,
    y,
    weight_ptr,  # [D]
    d,
    D: tl.constexpr,
    EPS: tl.constexpr,
    ROPE_HALF: tl.constexpr,
    IN_THREAD: tl.constexpr,
    E: tl.constexpr,
):
    """RMSNorm of each head of what load_pairs loaded as keys are, lane 4 r + t a part of row r; rounded as that was."""
    w, w_pair = load_pairs(weight_ptr + d * 0, d, d < D, ROPE_HALF, IN_THREAD, E)
    wide = x.to(tl.float32)
    squares = tl.sum(tl.sum(wide * wide, 4), 3).reshape(8, 4, x.shape[1], x.shape[2])
    squares = tl.sum(squares, 1, keep_dims=True).broadcast_to(squares.shape)
    inverse = tl.rsqrt(squares.reshape(x.shape[0], x.shape[1], x.shape[2]) * (1.0 / D) + EPS)[:, :, :, None, None]
    x = (wide * inverse * w.to(tl.float32)).to(x.dtype)
    if ROPE_HALF > 0 and not IN_THREAD:
        y = (y.to(tl.float32) * inverse * w_pair.to(tl.float32)).to(y.dtype)
    else:
        y = x
    return x, y


@triton.jit
def rotate(x, y, d, cos, sin, ROPE_HALF: tl.constexpr, IN_THREAD: tl.constexpr, E: tl.constexpr):
    """RoPE on what load_pairs loaded, as fp32: column i with column i + ROPE_HALF."""
    x = x.to(tl.float32)
    if ROPE_HALF == 0:
        return x
    elif IN_THREAD:
        halves = x.reshape(x.shape[0], x.shape[1], x.shape[2], 2, x.shape[3] // 2, E)
        pairs = tl.flip(halves, 3)
        first = tl.arange(0, 2)[None, None, None, :, None, None] == 0
        cos, sin = cos[:, :, :, None, :, :], sin[:, :, :, None, :, :]
        return (halves * cos + tl.where(first, -pairs, pairs) * sin).reshape(x.shape)
    else:
        y = y.to(tl.float32)
        cols = d[:, :, :, :, None] + tl.arange(0, E)
        return tl.where(cols < 2 * ROPE_HALF, x * cos + tl.where(cols < ROPE_HALF, -y, y) * sin, x)


@triton.jit
def soft_cap(s, SOFTCAP: tl.constexpr):
    """SOFTCAP * tanh(score / SOFTCAP) of scores in units of log2, like the result; near 0 by its series, because the
    difference that gives tanh elsewhere, 1 - 2 / (1 + exp(2 x)), would cancel."""
    CAP: tl.constexpr = SOFTCAP * 1.4426950408889634
    x = s * (1.0 / CAP)
    near = x - x * (x * x) * (0.33333333 - (x * x) * 0.13333333)
    far = 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268))
    return CAP * tl.where(tl.abs(x) < 0.1, near, far)


@triton.jit
def tokens(length, Lmax):
    """How many the cache holds with the new one, if it still fits."""
    return tl.minimum(length, Lmax - 1) + 1


@triton.jit
def first_tile(length, split, Lmax, STEP: tl.constexpr):
    """Where the first tile of block `split` starts. Tiles are taken from the last on, which has the new token."""
    return (tl.cdiv(tokens(length, Lmax), STEP) - 1 - split) * STEP


@triton.jit
def early_length(lengths_ptr, batch, WARPS: tl.constexpr, PDL: tl.constexpr):
    """A sequence's length, which with PDL the kernel ahead may still change."""
    if PDL:  # one number for all warps, which else might load it at different times and part ways later
        length = tl.max(tl.load(lengths_ptr + batch + tl.arange(0, 32 * WARPS) * 0), 0)
    else:
        length = tl.load(lengths_ptr + batch)
    return tl.maximum(length, 0)


@triton.jit
def start_softmax(
    sinks_ptr,  # [Hq], or None
    kv_head,
    split,
    G: tl.constexpr,
    WARPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """(top, total) [WARPS, BLOCK_G] before the first tile: the running maximum, in units of log2, and sum over
    2 ** top.

    With sinks the first warp of the first block has seen a token of that score and no value, SHIFT above its top.
    """
    top = tl.full([WARPS, BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([WARPS, BLOCK_G], tl.float32)
    if sinks_ptr is not None:
        offs_g = tl.arange(0, BLOCK_G)
        sink = tl.load(sinks_ptr + kv_head * G + offs_g, mask=(offs_g < G) & (split == 0), other=float("-inf"))
        is_first = (tl.arange(0, WARPS) == 0)[:, None]
        top = tl.where(is_first, sink.to(tl.float32)[None, :] * 1.4426950408889634 - SHIFT, top)
        total = tl.where(top > float("-inf"), 2.0**SHIFT, 0.0)
    return top, total


@triton.jit
def window_begin(length, Lmax, WINDOW: tl.constexpr):
    """The first token that counts."""
    if WINDOW > 0:
        return tl.maximum(tokens(length, Lmax) - WINDOW, 0)
    else:
        return 0


@triton.jit
def finish(
    acc,  # [BLOCK_D, BLOCK_G], the block's output
    top,  # [BLOCK_G]; the sum of its softmax is total * 2 ** top
    total,
    partial_ptr,  # [B, Hkv, NUM_SPLITS, G, D] fp32 outputs, then [B, Hkv, NUM_SPLITS, G] fp32 weights
    counter_ptr,  # [B, Hkv]
    out_ptr,
    lse_ptr,
    batch,
    kv_head,
    split,
    splits,
    G: tl.constexpr,
    D: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    E: tl.constexpr,  # of the values
):
    """Stores the output of the only block of a sequence and KV head, or a partial one; the last block adds them up."""
    col = tl.arange(0, BLOCK_D)[:, None]
    col = col // (8 * E) * (8 * E) + col % 8 * E + col % (8 * E) // 8  # what the loads of values called `col`
    offs_g = tl.arange(0, BLOCK_G)
    offs_gd = offs_g[None, :] * D + col
    mask_gd = (offs_g < G)[None, :] & (col < D)
    group = batch * tl.num_programs(1) + kv_head
    out_ptr += group * G * D
    weight = top + tl.log2(total)
    if splits == 1:
        tl.store(out_ptr + offs_gd, acc.to(out_ptr.dtype.element_ty), mask=mask_gd)
        if lse_ptr is not None:
            tl.store(lse_ptr + group * G + offs_g, weight * 0.6931471805599453, mask=offs_g < G)
        return

    weights_ptr = partial_ptr + tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * NUM_SPLITS * G * D
    weights_ptr += group * NUM_SPLITS * G
    partial_ptr += group * NUM_SPLITS * G * D
    tl.store(partial_ptr + split * G * D + offs_gd, acc, mask=mask_gd)
    tl.store(weights_ptr + split * G + offs_g, weight, mask=offs_g < G)

    # All of the block's stores come before its arrival, which releases them; the last block's arrival acquires all of
    # them, and it reads past L1, which may hold lines from before.
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr + group, 1, sem="acq_rel", scope="gpu")
    if arrived == splits - 1:
        reduce_partials(partial_ptr, weights_ptr, out_ptr, lse_ptr, group, splits, G, D, NUM_SPLITS, BLOCK_D)
        tl.store(counter_ptr + group, 0)


@triton.jit
def reduce_partials(
    partial_ptr,  # [NUM_SPLITS, G, D] fp32
    weight_ptr,  # [NUM_SPLITS, G] fp32
    out_ptr,  # [G, D]
    lse_ptr,
    group,
    splits,
    G: tl.constexpr,
    D: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out = sum over splits of partial * 2 ** weight, over sum of 2 ** weight; the sums always run in one order."""
    GROUP: tl.constexpr = triton.next_power_of_2(G)
    ALL: tl.constexpr = triton.next_power_of_2(NUM_SPLITS)
    AT_ONCE: tl.constexpr = max(1, min(ALL, 8192 // (GROUP * BLOCK_D)))  # partials in flight
    offs_g = tl.arange(0, GROUP)[:, None]
    offs_d = tl.arange(0, BLOCK_D)
    offs_gd = offs_g * D + offs_d[None, :]
    mask_gd = (offs_g < G) & (offs_d < D)[None, :]

    top = tl.full([GROUP], float("-inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    acc = tl.zeros([GROUP, BLOCK_D], tl.float32)
    for start in tl.range(0, splits, AT_ONCE, num_stages=1):
        split = start + tl.arange(0, AT_ONCE)[None, :]
        partial = tl.load(
            partial_ptr + split[:, :, None] * (G * D) + offs_gd[:, None, :],
            mask=(split < splits)[:, :, None] & mask_gd[:, None, :],
            other=0.0,
            cache_modifier=".cg",
        )  # [GROUP, AT_ONCE, BLOCK_D]
        weight = tl.load(
            weight_ptr + split * G + offs_g,
            mask=(split < splits) & (offs_g < G),
            other=float("-inf"),
            cache_modifier=".cg",
        )  # [GROUP, AT_ONCE]
        new_top = tl.maximum(top, tl.max(weight, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # of rows past G
        factor = tl.exp2(weight - base[:, None])
        rescale = tl.exp2(top - base)
        total = total * rescale + tl.sum(factor, 1)
        acc = acc * rescale[:, None] + tl.sum(partial * factor[:, :, None], 1)
        top = new_top
    tl.store(out_ptr + offs_gd, (acc * (1.0 / total)[:, None]).to(out_ptr.dtype.element_ty), mask=mask_gd)
    if lse_ptr is not None:
        offs = tl.arange(0, GROUP)
        tl.store(lse_ptr + group * G + offs, (top + tl.log2(total)) * 0.6931471805599453, mask=offs < G)
