"""Parts of the decode attention kernel: RoPE, and the sums at the end.

Tensors in registers are of shape [32, WARPS, registers ..., E]: the first dimension is the lane, the second the warp,
and a thread holds E neighbouring columns.
"""

import torch
import triton
import triton.language as tl

from tiny_gemm.device import tensor_bytes
from tiny_gemm.triton_cluster import cluster_adders, expect_bytes, receive, send
from tiny_gemm.triton_parts import add_warps, arrive, load_shared, prefetch_l2, shared_buffer


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
def rope_row(ptr, d, position, ROPE_HALF: tl.constexpr, E: tl.constexpr, AGAIN: tl.constexpr):
    """The cosines (or sines) of `position` for columns d and E - 1 more, of shape [..., E]; anything past what rotates.

    Loaded in fours, 16 bytes: the layout of other loads, E elements a thread, is then had without a move. AGAIN: what
    has been loaded before is not kept in registers for it.
    """
    d = d[:, :, :, :, None] + tl.arange(0, E // 4) * 4
    ptr += tl.cast(position, tl.int64) * ROPE_HALF
    if ROPE_HALF % 4 == 0:
        cols = first_of_pair(d, ROPE_HALF)[:, :, :, :, :, None] + tl.arange(0, 4)
    else:
        cols = first_of_pair(d[:, :, :, :, :, None] + tl.arange(0, 4), ROPE_HALF)
    # The mask is always true, but the compiler does not know that; without one it moves the load behind a branch.
    row = tl.load(ptr + cols, mask=position >= 0, volatile=AGAIN)
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
        return tl.fma(halves, cos, tl.where(first, -pairs, pairs) * sin).reshape(x.shape)
    else:
        y = y.to(tl.float32)
        cols = d[:, :, :, :, None] + tl.arange(0, E)
        return tl.where(cols < 2 * ROPE_HALF, tl.fma(x, cos, tl.where(cols < ROPE_HALF, -y, y) * sin), x)


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

    With sinks the first warp of the first split has seen a token of that score and no value, SHIFT above its top.
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
def fast_log2(x, USE_ASM: tl.constexpr):
    """Nearly. (tl.log2 is a polynomial of some twenty instructions.)"""
    if USE_ASM:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)


# At the end every thread has R neighbouring columns of one head, [R, GROUP * LANES]: the default layout of that shape
# gives the last dimension to the threads.


@triton.constexpr_function
def _lanes(threads: int, group: int, block_d: int) -> int:
    """How many threads share a head."""
    return min(max(threads // group, 1), block_d)


@triton.constexpr_function
def _exchange_row(block_d: int, e: int) -> int:
    """Words of shared memory for a head's columns: with a gap behind each 32, and one at the end, no two lanes write to
    the same bank, nor do those of one head read from it."""
    words = block_d + block_d // 32
    return words + (e // 8 - words) % 16


@triton.constexpr_function
def exchange_words(warps: int, block_g: int, block_d: int, e: int) -> int:
    """Words of shared memory through which the warps of a block merge what they have."""
    return warps * block_g * (_exchange_row(block_d, e) + 2)


# At most: a kernel may take 48 KiB that it does not ask the driver for, and Triton takes up to 4 of them, where it does
# not have to bring what it loads into another order.
EXCHANGE_WORDS = 11 * 1024


@triton.jit
def exchange_buffer(WARPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, E: tl.constexpr):
    """The address of the shared memory for _merge_warps. (Each call takes more of it.)"""
    return shared_buffer(exchange_words(WARPS, BLOCK_G, BLOCK_D, E))


@triton.jit
def _store_shared(address, x):
    """x, fp32, to shared memory."""
    tl.inline_asm_elementwise(
        "st.shared.f32 [$1], $2; mov.u32 $0, 0;", "=r,r,f", [address, x], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _merge_warps(
    top,  # [WARPS, BLOCK_G]
    total,
    acc,  # [WARPS, BLOCK_D, BLOCK_G]
    exchange,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    E: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """A split's output, fp32 [R, GROUP * LANES], and log2 of the sum of its softmax, [GROUP * LANES]; with one
    exchange through what exchange_buffer gave or, where that is None, through Triton's shared memory, with many.

    Factors are squares of what exp2 gives: over 8 bits a total that counts may have to shrink by more than the
    smallest float32.
    """
    WARPS: tl.constexpr = acc.shape[0]
    BLOCK_D: tl.constexpr = acc.shape[1]
    BLOCK_G: tl.constexpr = acc.shape[2]
    R: tl.constexpr = BLOCK_D // LANES
    ROW: tl.constexpr = _exchange_row(BLOCK_D, E)
    if exchange is not None:
        warp = tl.arange(0, WARPS)[:, None]
        head = tl.arange(0, BLOCK_G)[None, :]
        # Column 8 E c + E r + j, with a gap behind each 32, which the loads of values call 8 E c + 8 j + r.
        col = tl.arange(0, BLOCK_D)[None, :, None]
        r = col % 8 * E
        col = col // (8 * E) * (8 * E + E // 4) + (r + r // 32) + col % (8 * E) // 8
        _store_shared(exchange + ((warp * BLOCK_G + head)[:, None, :] * ROW + col) * 4, acc)
        stats = exchange + (WARPS * BLOCK_G * ROW + (warp * BLOCK_G + head) * 2) * 4
        _store_shared(stats, top)
        _store_shared(stats + 4, total)
        base = tl.inline_asm_elementwise(
            "bar.sync 0; mov.u32 $0, $1;", "=r,r", [exchange], dtype=tl.int32, is_pure=False, pack=1
        )
        offs_n = tl.arange(0, GROUP * LANES)[None, :]
        head, col = offs_n // LANES, offs_n % LANES * R + tl.arange(0, R)[:, None]
        stats = base + (WARPS * BLOCK_G * ROW + head * 2) * 4  # [1, GROUP * LANES]
        block_top = load_shared(stats)
        for w in tl.static_range(1, WARPS):
            block_top = tl.maximum(block_top, load_shared(stats + w * (BLOCK_G * 8)))
        block_total = tl.zeros([1, GROUP * LANES], tl.float32)
        out = tl.zeros([R, GROUP * LANES], tl.float32)
        for w in tl.static_range(WARPS):
            half = tl.exp2((load_shared(stats + w * (BLOCK_G * 8)) - block_top) * 0.5)
            total = load_shared(stats + (w * (BLOCK_G * 8) + 4))
            block_total = tl.fma(total * half, half, block_total)
            acc = load_shared(base + ((w * BLOCK_G + head) * ROW + col + col // 32) * 4)
            out = tl.fma(acc, (half * half).broadcast_to(acc.shape), out)
        weight = (block_top + fast_log2(block_total, USE_ASM)).reshape(GROUP * LANES)
        return out * (1.0 / block_total), weight
    else:
        block_top = tl.max(top, 0)
        half = tl.exp2((top - block_top[None, :]) * 0.5)
        block_total = tl.sum(total * half * half, 0)
        acc = add_warps(acc * (half * half)[:, None, :], WARPS) * (1.0 / block_total)[None, :]  # [BLOCK_D, BLOCK_G]
        acc = acc.reshape(BLOCK_D // (8 * E), E, 8, BLOCK_G).permute(3, 0, 2, 1)  # stored columns, as above
        out = _first(acc.reshape(BLOCK_G // GROUP, GROUP, BLOCK_D)).reshape(GROUP * LANES, R).permute(1, 0)
        weight = _first((block_top + tl.log2(block_total)).reshape(BLOCK_G // GROUP, GROUP))
        return out, weight[:, None].broadcast_to(GROUP, LANES).reshape(GROUP * LANES)


@triton.jit
def _first(x):
    """x[0]"""
    index = tl.arange(0, x.shape[0])[:, None] if len(x.shape) == 2 else tl.arange(0, x.shape[0])[:, None, None]
    return tl.sum(tl.where(index == 0, x, 0.0), 0)


@triton.jit
def store_partial(
    top,  # [WARPS, BLOCK_G]
    total,  # the sum of a warp's softmax is total * 2 ** top
    acc,  # [WARPS, BLOCK_D, BLOCK_G]
    exchange,  # see _merge_warps
    partial_ptr,  # see partial_floats
    group,
    split,
    G: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    E: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """Stores what a block has of a split, for the last of the blocks to add up."""
    GROUP: tl.constexpr = triton.next_power_of_2(G)
    LANES: tl.constexpr = _lanes(32 * acc.shape[0], GROUP, acc.shape[1])
    out, weight = _merge_warps(top, total, acc, exchange, GROUP, LANES, E, USE_ASM)
    out_at, weight_at = _partials(partial_ptr, group, NUM_SPLITS, GROUP, acc.shape[1])
    _store_split(out_at, weight_at, out, weight, split, G, NUM_SPLITS)


@triton.constexpr_function
def _weights_of(num_splits: int) -> int:
    """Places for the weights of a head's splits, in fours: what lies behind them is loaded 16 bytes at a time."""
    return max(4, triton.next_power_of_2(num_splits))


@triton.constexpr_function
def partial_floats(num_splits: int, group: int, block_d: int) -> int:
    """What the blocks of a sequence and KV head leave for the last of them, [NUM_SPLITS, GROUP, BLOCK_D] fp32, and
    log2 of their weights, [GROUP, _weights_of(NUM_SPLITS)]."""
    return group * (num_splits * block_d + _weights_of(num_splits))


@triton.jit
def _partials(partial_ptr, group, NUM_SPLITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_D: tl.constexpr):
    """Where the partial outputs of a sequence and KV head lie, and their weights."""
    partial_ptr += group * partial_floats(NUM_SPLITS, GROUP, BLOCK_D)
    return partial_ptr, partial_ptr + NUM_SPLITS * GROUP * BLOCK_D


@triton.jit
def _threads_of_heads(out, G: tl.constexpr):
    """Of the threads that have what _merge_warps gives, [R, GROUP * LANES]: (head, lane of it, whether it is the first
    of a head that is there)."""
    LANES: tl.constexpr = out.shape[1] // triton.next_power_of_2(G)
    offs_n = tl.arange(0, out.shape[1])
    head = offs_n // LANES
    return head, offs_n % LANES, (offs_n % LANES == 0) & (head < G)


@triton.jit
def _store_split(partial_ptr, weight_ptr, out, weight, split, G: tl.constexpr, NUM_SPLITS: tl.constexpr):
    """What _merge_warps gives, to where _partials says."""
    R: tl.constexpr = out.shape[0]
    N: tl.constexpr = out.shape[1]
    tl.store(partial_ptr + (split * N + tl.arange(0, N))[None, :] * R + tl.arange(0, R)[:, None], out)
    head, _, is_first = _threads_of_heads(out, G)
    tl.store(weight_ptr + head * _weights_of(NUM_SPLITS) + split, weight, mask=is_first)


@triton.jit
def finish(
    top,  # [WARPS, BLOCK_G]
    total,  # the sum of a warp's softmax is total * 2 ** top
    acc,  # [WARPS, BLOCK_D, BLOCK_G]
    exchange,  # see _merge_warps
    partial_ptr,  # [B * Hkv] of what partial_floats says
    counter_ptr,  # [B * Hkv]
    out_ptr,
    lse_ptr,
    group,  # which pair of a sequence and a KV head
    split,
    splits,
    done,  # how many of them this block has done
    G: tl.constexpr,
    D: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    E: tl.constexpr,  # of the values
    USE_ASM: tl.constexpr,
):
    """Stores the output of the only split of a sequence and KV head, or a partial one; the last block adds them up."""
    GROUP: tl.constexpr = triton.next_power_of_2(G)
    BLOCK_D: tl.constexpr = acc.shape[1]
    LANES: tl.constexpr = _lanes(32 * acc.shape[0], GROUP, BLOCK_D)
    out_ptr += group * (G * D)
    out, weight = _merge_warps(top, total, acc, exchange, GROUP, LANES, E, USE_ASM)
    if splits == 1:
        _store_output(out_ptr, lse_ptr, out, weight, group, G, D)
        return

    partial_ptr, weight_ptr = _partials(partial_ptr, group, NUM_SPLITS, GROUP, BLOCK_D)
    _store_split(partial_ptr, weight_ptr, out, weight, split, G, NUM_SPLITS)
    if arrive(counter_ptr + group, done) == splits - done:
        ALL: tl.constexpr = _weights_of(NUM_SPLITS)
        out, weight = _add_partials(partial_ptr, weight_ptr, splits, GROUP, LANES, BLOCK_D // LANES, ALL)
        _store_output(out_ptr, lse_ptr, out, weight, group, G, D)
        tl.store(counter_ptr + group, 0)


@triton.constexpr_function
def _cluster_part(threads: int, group: int, block_d: int, size: int) -> int:
    """Of how many of a block's threads each block that adds up gets what they have of a split."""
    return group * _lanes(threads, group, block_d) // cluster_adders(size)


@triton.constexpr_function
def words_of_splits(size: int, threads: int, group: int, block_d: int) -> int:
    """Words of shared memory for finish_in_cluster: what send asks for, and what each split's threads send."""
    columns = block_d // _lanes(threads, group, block_d)
    return 4 + size * (columns + 1) * _cluster_part(threads, group, block_d, size)


@triton.constexpr_function
def sends_of_split(threads: int, group: int, block_d: int) -> int:
    """How often a thread sends: its columns, and the weight of its head."""
    return block_d // _lanes(threads, group, block_d) + 1


@triton.constexpr_function
def _bytes_of_split(threads: int, group: int, block_d: int, size: int) -> int:
    """What each block that adds up is sent of a split. Of fewer heads and lanes than threads several threads have each,
    and all send."""
    senders = max(threads // cluster_adders(size), _cluster_part(threads, group, block_d, size))
    return 4 * sends_of_split(threads, group, block_d) * senders


@triton.jit
def finish_in_cluster(
    top,  # [WARPS, BLOCK_G]
    total,
    acc,  # [WARPS, BLOCK_D, BLOCK_G]
    exchange,  # see _merge_warps
    buffer,  # of words_of_splits; begin_cluster and join_cluster are behind us
    out_ptr,
    lse_ptr,
    group,
    split,
    splits,
    G: tl.constexpr,
    D: tl.constexpr,
    SIZE: tl.constexpr,
    E: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """finish where the splits of a sequence and KV head are a cluster of SIZE blocks, and each a block's only one; to
    the bit what that gives. Some of the blocks, with a split or without, add up a part of the columns each."""
    GROUP: tl.constexpr = triton.next_power_of_2(G)
    BLOCK_D: tl.constexpr = acc.shape[1]
    THREADS: tl.constexpr = 32 * acc.shape[0]
    LANES: tl.constexpr = _lanes(THREADS, GROUP, BLOCK_D)
    R: tl.constexpr = BLOCK_D // LANES
    ADDERS: tl.constexpr = cluster_adders(SIZE)
    PART: tl.constexpr = _cluster_part(THREADS, GROUP, BLOCK_D, SIZE)
    BYTES: tl.constexpr = _bytes_of_split(THREADS, GROUP, BLOCK_D, SIZE)
    out_ptr += group * (G * D)
    is_adder = (splits > 1) & (split < ADDERS)
    if is_adder:
        expect_bytes(buffer, splits * BYTES)
    if split < splits:
        out, weight = _merge_warps(top, total, acc, exchange, GROUP, LANES, E, USE_ASM)
        if splits == 1:
            _store_output(out_ptr, lse_ptr, out, weight, group, G, D)
        else:  # a split is [R + 1, PART] in the memory of each that adds up: columns, and the weights
            thread = tl.arange(0, GROUP * LANES)[None, :]
            at = buffer + 16 + (split * ((R + 1) * PART) + thread % PART) * 4
            block = thread // PART
            send(out, at + tl.arange(0, R)[:, None] * (PART * 4), buffer, block.broadcast_to(out.shape))
            send(weight[None, :], at + R * PART * 4, buffer, block)
    if is_adder:
        parts = receive(buffer)
        offs = tl.arange(0, PART * R)
        out, weight = _add_sent(parts + offs // R * 4, offs % R, splits, PART, R, SIZE, _at_once(SIZE, R))
        column = split * (PART * R) + offs
        head, column = column // BLOCK_D, column % BLOCK_D
        mask = (head < G) & (column < D)
        tl.store(out_ptr + head * D + column, out.to(out_ptr.dtype.element_ty), mask=mask)
        if lse_ptr is not None:
            tl.store(lse_ptr + group * G + head, weight * 0.6931471805599453, mask=mask & (column == 0))


@triton.jit
def _add_sent(
    parts,  # [C]: address of the first of the thread's words, of the first split
    r,  # [C]: which of its columns
    splits,
    PART: tl.constexpr,
    R: tl.constexpr,
    SIZE: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """_add_partials of what finish_in_cluster sends: (sums, log2 of the weights) [C]."""
    top = tl.full(parts.shape, float("-inf"), tl.float32)
    total = tl.zeros(parts.shape, tl.float32)
    acc = tl.zeros(parts.shape, tl.float32)
    for start in tl.static_range(0, SIZE, AT_ONCE):
        weights, partials = (), ()
        for i in tl.static_range(start, min(start + AT_ONCE, SIZE)):
            split = parts + i * ((R + 1) * PART * 4)
            weights += (tl.where(i < splits, load_shared(split + R * PART * 4), float("-inf")),)
            partials += (tl.where(i < splits, load_shared(split + r * (PART * 4)), 0.0),)
        top, total, acc = _add_weighted(weights, partials, top, total, acc)
    return acc * (1.0 / total), top + tl.log2(total)


@triton.jit
def _store_output(out_ptr, lse_ptr, out, weight, group, G: tl.constexpr, D: tl.constexpr):
    """What _merge_warps gives: out to out_ptr [G, D], weight, as a natural logarithm, to lse_ptr [B * Hkv, G]."""
    R: tl.constexpr = out.shape[0]
    head, lane, is_first = _threads_of_heads(out, G)
    col = (lane * R)[None, :] + tl.arange(0, R)[:, None]
    mask = (head < G)[None, :] & (col < D)
    tl.store(out_ptr + head[None, :] * D + col, out.to(out_ptr.dtype.element_ty), mask=mask)
    if lse_ptr is not None:
        tl.store(lse_ptr + group * G + head, weight * 0.6931471805599453, mask=is_first)


@triton.constexpr_function
def _at_once(splits: int, columns: int) -> int:
    """How many partial results of `columns` columns a thread loads at once."""
    return max(1, min(_weights_of(splits), 64 // columns))


@triton.jit
def _add_partials(
    partial_ptr,  # [NUM_SPLITS, GROUP * LANES, R] fp32
    weight_ptr,  # [GROUP, ALL] fp32
    splits,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    R: tl.constexpr,
    ALL: tl.constexpr,
):
    """sum over splits of partial * 2 ** weight, over sum of 2 ** weight, [R, GROUP * LANES], and log2 of the latter.

    Every thread adds up its own columns and none waits for another. The sums always run in one order.
    """
    AT_ONCE: tl.constexpr = _at_once(ALL, R)
    V: tl.constexpr = min(4, R)
    N: tl.constexpr = GROUP * LANES
    offs_n = tl.arange(0, N)[:, None, None]
    offs_r = tl.arange(0, R // V)[:, None] * V + tl.arange(0, V)[None, :]
    top = tl.full([N, 1, 1], float("-inf"), tl.float32)
    total = tl.zeros([N, 1, 1], tl.float32)
    acc = tl.zeros([N, R // V, V], tl.float32)
    for start in tl.range(0, splits, AT_ONCE, num_stages=1):
        weights, partials = (), ()
        for i in tl.static_range(AT_ONCE):
            split = start + i
            weight = tl.load(
                weight_ptr + (offs_n // LANES * ALL + split),
                mask=split < splits,
                other=float("-inf"),
                cache_modifier=".cg",
            )
            weights += (weight,)
            partial = tl.load(
                partial_ptr + ((split * N + offs_n) * R + offs_r[None]),
                mask=split < splits,
                other=0.0,
                cache_modifier=".cg",
            )
            partials += (partial,)
        top, total, acc = _add_weighted(weights, partials, top, total, acc)
    out = (acc * (1.0 / total)).reshape(N, R).permute(1, 0)
    return out, (top + tl.log2(total)).reshape(N)


@triton.jit
def _add_weighted(weights, partials, top, total, acc):
    """(top, total, acc) with more partial results: total is the sum of 2 ** (weight - top), acc that of the partial
    results times it. One after the other, so that the bits do not depend on how the tensors lie in registers."""
    new_top = top
    for i in tl.static_range(len(weights)):
        new_top = tl.maximum(new_top, weights[i])
    rescale = tl.exp2(top - new_top)
    total *= rescale
    acc *= rescale
    for i in tl.static_range(len(weights)):
        factor = tl.exp2(weights[i] - new_top)
        total += factor
        acc = tl.fma(partials[i], factor.broadcast_to(acc.shape), acc)
    return new_top, total, acc
