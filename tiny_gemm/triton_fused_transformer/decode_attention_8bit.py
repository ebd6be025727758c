"""The decode step of decode_attention.py over a KV cache of 8 bits: what it does is said there, what differs here.

    k_cache, v_cache int8 or e4m3 [B, Hkv, Lmax, D], kv_scale fp32 [B, Hkv, Lmax, 2]
    a cached key is kv_scale[..., 0] * k_cache, a value kv_scale[..., 1] * v_cache; the largest element is 127 or 448

The new token is quantized here, and its block attends to what it quantized, as all later steps will.

The queries are the tensor core's first operand, of 16 rows, and the keys its second: a thread holds the keys in
neighbouring registers as it loads them, and the scores come out where the second product wants the probabilities. As
groups of up to 8 heads leave half of the rows free, a query has two: what the first, of 8 or 11 bits, leaves of it is
in the second. A query is divided by its largest element, so that nothing overflows.

- int8: both rows are int8 and the product is of integers. It is exact, and the keys are not converted at all.
- e4m3: both rows are fp16, and the keys are converted to it, two by one instruction.

The values are converted to fp16. A probability times its value's scale may be of any size: the softmax is computed
relative to the largest such product that the warp has met, not to the largest probability. So none exceeds 1, and what
fp16 rounds to zero is less than 2^-24 of the largest. (With values above 1e32 or so exp2 flushes more of them to zero.)
"""

import triton
import triton.language as tl

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
from tiny_gemm.triton_gemm import add_warps, prefetch_l2, wait_for_previous

# PTX that turns the bytes of a word `t` into fp16: 0 and 1 into {lo}, 2 and 3 into {hi}.
_CONVERT = {
    # 1152 + v: the bits of 1024 with v + 128, to which the caller has turned v by its sign bit, below them
    "int8": "prmt.b32 {lo}, t, 0x64646464, 0x4140; prmt.b32 {hi}, t, 0x64646464, 0x4342;",
    "e4m3": "mov.b32 {{l, h}}, t; cvt.rn.f16x2.e4m3x2 {lo}, l; cvt.rn.f16x2.e4m3x2 {hi}, h;",
    # before sm_89: fp16 has exponent and mantissa one place lower, and an exponent larger by 8
    "e4m3_bits": " ".join(
        f"prmt.b32 u, t, t, {selector}; shr.u32 {out}, u, 1; and.b32 {out}, {out}, 0x3F803F80;"
        f" lop3.b32 {out}, u, 0x80008000, {out}, 0xEA; mul.f16x2 {out}, {out}, c;"
        for out, selector in (("{lo}", "0x1100"), ("{hi}", "0x3322"))
    ),
}
_DECLARE = "{ .reg .b32 a, b, t, u, c; .reg .b16 l, h; mov.b32 c, 0x5C005C00;"  # c: 256 and 256


@triton.constexpr_function
def _kind(is_fp8: bool, has_e4m3: bool) -> str:
    return "int8" if not is_fp8 else "e4m3" if has_e4m3 else "e4m3_bits"


@triton.constexpr_function
def _keys_asm(kind: str) -> str:
    return f"{_DECLARE} mov.b32 t, $2; {_CONVERT[kind].format(lo='$0', hi='$1')} }}"


@triton.constexpr_function
def _values_asm(kind: str) -> str:
    """From a word of one token's values and one of the next token's to four pairs."""
    flip = "0x80808080" if kind == "int8" else "0"
    lines = [_DECLARE, f"xor.b32 a, $4, {flip}; xor.b32 b, $5, {flip};"]
    for selector, lo, hi in (("0x5140", "$0", "$1"), ("0x7362", "$2", "$3")):
        lines += [f"prmt.b32 t, a, b, {selector};", _CONVERT[kind].format(lo=lo, hi=hi)]
    return " ".join([*lines, "}"])


@triton.jit
def _to_fp16(codes, FP8: tl.constexpr):
    """int8 plus 1152, or e4m3 (NaN as 480), by their bits."""
    wide = codes.to(tl.int16)
    if FP8:
        return ((wide & 0x7F) << 7 | (wide & 0x80) << 8).to(tl.float16, bitcast=True) * 256.0
    else:
        return ((wide & 0xFF) ^ 0x6480).to(tl.float16, bitcast=True)


@triton.jit
def _quantize(x, largest, FP8: tl.constexpr, HAS_E4M3: tl.constexpr):
    """fp32 x / largest * 127 as int8, or x / largest * 448 as the bits of e4m3, to nearest even."""
    if not FP8:
        return (x * (127.0 / largest) + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)  # 1.5 * 2^23
    x *= 448.0 / largest
    if HAS_E4M3:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, $2, $1; cvt.rn.satfinite.e4m3x2.f32 h, $4, $3;"
            " mov.b32 $0, {l, h}; }",
            "=r,f,f,f,f",
            [x],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1) >> 20) - (120 << 3)  # exponent bias 127 -> 7
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000  # multiples of 2^-9 below 2^-6
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (tl.where(size < 0.015625, small, normal) | sign).to(tl.int8)


@triton.jit
def _log2(x, USE_ASM: tl.constexpr):
    """Nearly. (tl.log2 is a polynomial of some twenty instructions.)"""
    if USE_ASM:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.log2(x)


@triton.jit
def _largest(x, OVER: tl.constexpr):
    """Of x [32, WARPS, N, C, E], whose lanes are [8, 4], the largest size over a thread's columns and over the lanes'
    dimension OVER: [4 or 8, WARPS, N]. At least 2^-90: below, scales, and what the softmax makes of them, leave fp32.
    NaN if there is one: its bits are above those of all numbers. A thread compares by fours, in 6 steps and not in 15.
    """
    sizes = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    sizes = sizes.reshape(8, 4, x.shape[1], x.shape[2], x.shape[3], x.shape[4] // 4, 4)
    most = tl.max(tl.max(tl.max(tl.max(sizes, 4), 4), 4), OVER)
    return tl.maximum(most, 0x12800000).to(tl.float32, bitcast=True)  # 2^-90


@triton.jit
def _split_queries(q, FP8: tl.constexpr):
    """q fp32 [32, WARPS, BLOCK_G / 8, C, E] as (operand [WARPS, 2 * BLOCK_G, BLOCK_D], its scale [WARPS, BLOCK_G])."""
    WARPS: tl.constexpr = q.shape[1]
    N: tl.constexpr = q.shape[2]
    C: tl.constexpr = q.shape[3]
    E: tl.constexpr = q.shape[4]
    scale = _largest(q, 1)  # [8, WARPS, N]
    inverse = (1.0 / scale)[:, None].broadcast_to(8, 4, WARPS, N).reshape(32, WARPS, N)[:, :, :, None, None]
    if FP8:
        q *= inverse
        first = q.to(tl.float16)
        second = (q - first.to(tl.float32)).to(tl.float16)
    else:  # an integer of 16 bits, 256 * first + second
        bits = (q * (inverse * 32512.0) + 12582912.0).to(tl.int32, bitcast=True)
        first = (bits + 128 >> 8).to(tl.int8)
        second = bits.to(tl.int8)
        scale *= 1.0 / 32512.0
    is_first = tl.arange(0, 2)[None, None, None, :, None, None] == 0
    first = first.reshape(32, WARPS, N, 1, C, E).broadcast_to(32, WARPS, N, 2, C, E)
    second = second.reshape(32, WARPS, N, 1, C, E).broadcast_to(32, WARPS, N, 2, C, E)
    planes = tl.where(is_first, first, second)
    planes = planes.reshape(8, 4, WARPS, N, 2, C, E // 8, 2, 4)  # r t warp n plane c s h e
    operand = planes.permute(2, 3, 4, 0, 5, 6, 7, 1, 8).reshape(WARPS, 16 * N, 4 * C * E)
    return operand, scale.permute(1, 2, 0).reshape(WARPS, 8 * N)


@triton.jit
def _add_planes(s, BLOCK_G: tl.constexpr, FP8: tl.constexpr):
    """The products of both rows of each query, [WARPS, 2 * BLOCK_G, T], as fp32 [WARPS, BLOCK_G, T]."""
    WARPS: tl.constexpr = s.shape[0]
    T: tl.constexpr = s.shape[2]
    first, second = tl.split(s.reshape(WARPS, BLOCK_G // 8, 2, 8, T).permute(0, 1, 3, 4, 2))
    s = first + second if FP8 else (first * 256 + second).to(tl.float32)
    return s.reshape(WARPS, BLOCK_G, T)


@triton.jit
def _load_keys(
    ptr,  # int8, of token `start` of one sequence and KV head
    last,
    is_there,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WARPS: tl.constexpr,
    TILES: tl.constexpr,
    E: tl.constexpr,
    ALL: tl.constexpr,
):
    """Codes of tokens 0 .. 16 * TILES * WARPS, [32, WARPS, 2 * TILES, BLOCK_D / 4 E, E]; unless ALL, those of `last` in
    the place of later ones, and nothing where not is_there.

    Lane 4 r + t loads of each eight tokens token r, columns 4 E c + E t and E - 1 more for each c. What it needs for
    the product are columns 32 s + 16 h + 4 t + e; so stored column 4 E c + E t + 8 s + 4 h + e is called 4 E c + 32 s +
    16 h + 4 t + e, of k and of q alike, and nothing moves between threads.
    """
    lane = tl.arange(0, 32)[:, None, None, None]
    warp = tl.arange(0, WARPS)[None, :, None, None]
    eighth = tl.arange(0, 2 * TILES)[None, None, :, None]
    chunk = tl.arange(0, BLOCK_D // (4 * E))[None, None, None, :]
    token = warp * (16 * TILES) + lane // 4
    return _load_codes(ptr, token, eighth * 8, lane % 4 * E, chunk * (4 * E), last, is_there, D, BLOCK_D, E, ALL)


@triton.jit
def _load_values(
    ptr,
    last,
    is_there,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WARPS: tl.constexpr,
    TILES: tl.constexpr,
    E: tl.constexpr,
    ALL: tl.constexpr,
):
    """The tokens that _load_keys loads, the even ones and the odd ones: twice [32, WARPS, 2 * TILES, BLOCK_D / 8 E, E].

    Lane 4 r + t loads of each eight tokens 2 t and 2 t + 1, the columns 8 E c + E r and E - 1 more for each c; stored
    column 8 E c + E r + j is called 8 E c + 8 j + r.
    """
    lane = tl.arange(0, 32)[:, None, None, None]
    warp = tl.arange(0, WARPS)[None, :, None, None]
    eighth = tl.arange(0, 2 * TILES)[None, None, :, None] * 8
    chunk = tl.arange(0, BLOCK_D // (8 * E))[None, None, None, :] * (8 * E)
    token = warp * (16 * TILES) + lane % 4 * 2
    even = _load_codes(ptr, token, eighth, lane // 4 * E, chunk, last, is_there, D, BLOCK_D, E, ALL)
    odd = _load_codes(ptr, token, eighth + 1, lane // 4 * E, chunk, last, is_there, D, BLOCK_D, E, ALL)
    return even, odd


@triton.jit
def _load_codes(
    ptr,
    token,  # of lane and warp; those of a thread lie token_more behind it
    token_more,
    d,  # columns, likewise
    d_more,
    last,
    is_there,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    E: tl.constexpr,
    ALL: tl.constexpr,
):
    if ALL:  # what differs between the loads of a thread is a constant in the instruction
        ptrs = (ptr + (token * D + d))[:, :, :, :, None] + (token_more * D + d_more)[:, :, :, :, None]
    else:
        ptrs = (ptr + (tl.minimum(token + token_more, last) * D + d + d_more))[:, :, :, :, None]
    ptrs += tl.arange(0, E)
    if ALL and D == BLOCK_D:
        return tl.load(ptrs)
    else:
        return load_columns(ptrs, d + d_more, is_there, D, BLOCK_D)


@triton.jit
def _load_scales(ptr, last, is_there, WARPS: tl.constexpr, TILES: tl.constexpr, ALL: tl.constexpr):
    """Scales of the same tokens, [32, WARPS, 2 * TILES, 2, 2]: lane 4 r + t has of each eight tokens 2 t and 2 t + 1
    that of the key and that of the value."""
    lane = tl.arange(0, 32)[:, None, None, None]
    warp = tl.arange(0, WARPS)[None, :, None, None]
    token = warp * (16 * TILES) + tl.arange(0, 2 * TILES)[None, None, :, None] * 8 + lane % 4 * 2
    if ALL:
        scales = tl.load(ptr + token * 2 + tl.arange(0, 4))
        return scales.reshape(32, WARPS, 2 * TILES, 2, 2)
    else:
        token = tl.minimum(token + tl.arange(0, 2), last)
        return tl.load(ptr + (token * 2)[:, :, :, :, None] + tl.arange(0, 2), mask=is_there, other=1.0)


@triton.jit
def _keys_operand(k, FP8: tl.constexpr, HAS_E4M3: tl.constexpr, USE_ASM: tl.constexpr):
    """What _load_keys loaded, transposed: [WARPS, BLOCK_D, 16 * TILES], columns renamed; int8, or fp16 of e4m3."""
    WARPS: tl.constexpr = k.shape[1]
    EIGHTHS: tl.constexpr = k.shape[2]
    C: tl.constexpr = k.shape[3]
    E: tl.constexpr = k.shape[4]
    if FP8 and USE_ASM:
        asm: tl.constexpr = _keys_asm(_kind(FP8, HAS_E4M3))
        k = tl.inline_asm_elementwise(asm, "=&r,=&r,r", [k], dtype=tl.float16, is_pure=True, pack=4)
    elif FP8:
        k = _to_fp16(k, FP8)
    k = k.reshape(8, 4, WARPS, EIGHTHS, C, E // 8, 2, 4)  # r t warp eighth c s h e
    return k.permute(2, 4, 5, 6, 1, 7, 3, 0).reshape(WARPS, 4 * C * E, 8 * EIGHTHS)


@triton.jit
def _values_operand(even, odd, FP8: tl.constexpr, HAS_E4M3: tl.constexpr, USE_ASM: tl.constexpr):
    """What _load_values loaded as fp16 (int8 plus 1152), transposed: [WARPS, BLOCK_D, 16 * TILES], columns renamed."""
    WARPS: tl.constexpr = even.shape[1]
    EIGHTHS: tl.constexpr = even.shape[2]
    C: tl.constexpr = even.shape[3]
    E: tl.constexpr = even.shape[4]
    is_even = tl.arange(0, 2) == 0
    if USE_ASM:  # a word for each pair
        asm: tl.constexpr = _values_asm(_kind(FP8, HAS_E4M3))
        # It is pure, but if Triton knew, it would see through it that bytes are loaded, and choose a layout for bytes.
        pairs = tl.inline_asm_elementwise(
            asm, "=&r,=&r,=&r,=&r,r,r", [even, odd], dtype=tl.int32, is_pure=False, pack=4
        )
        pairs = pairs.reshape(32, WARPS, EIGHTHS, C, E, 1).broadcast_to(32, WARPS, EIGHTHS, C, E, 2)
        v = tl.where(is_even, pairs, pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        v = tl.where(is_even, _to_fp16(even, FP8)[:, :, :, :, :, None], _to_fp16(odd, FP8)[:, :, :, :, :, None])
    v = v.reshape(8, 4, WARPS, EIGHTHS, C, E, 2)  # r t warp eighth c j e
    return v.permute(2, 4, 5, 0, 3, 1, 6).reshape(WARPS, 8 * C * E, 8 * EIGHTHS)


@triton.jit
def _scales_of_scores(scales, BLOCK_G: tl.constexpr):
    """What _load_scales loaded, as (of the keys, of the values), each [WARPS, BLOCK_G, 16 * TILES]."""
    WARPS: tl.constexpr = scales.shape[1]
    EIGHTHS: tl.constexpr = scales.shape[2]
    scales = scales.reshape(8, 4, WARPS, EIGHTHS, 2, 2).permute(2, 0, 3, 1, 4, 5)  # warp r eighth t e, key or value
    scales = scales.reshape(WARPS, 1, 8, 8 * EIGHTHS, 2).broadcast_to(WARPS, BLOCK_G // 8, 8, 8 * EIGHTHS, 2)
    return tl.split(scales.reshape(WARPS, BLOCK_G, 8 * EIGHTHS, 2))


@triton.jit
def _attend(
    q,  # [WARPS, 2 * BLOCK_G, BLOCK_D]
    q_scale,  # [WARPS, BLOCK_G]
    k,  # as _load_keys loads it
    v,  # as _load_values loads them
    scales,  # as _load_scales loads them
    top,
    total,
    acc,  # None of the first tile
    begin,  # first and past the last of the tile's tokens that count
    end,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    FP8: tl.constexpr,
    HAS_E4M3: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """The running softmax with one more tile. top [WARPS, BLOCK_G]: the largest log2 of exp(score) times the value's
    scale; total [WARPS, BLOCK_G], acc [WARPS, BLOCK_D, BLOCK_G]: the sums, over 2 ** top."""
    WARPS: tl.constexpr = k.shape[1]
    T: tl.constexpr = 8 * k.shape[2]
    BLOCK_G: tl.constexpr = top.shape[1]
    k_scale, v_scale = _scales_of_scores(scales, BLOCK_G)
    s = _add_planes(tl.dot(q, _keys_operand(k, FP8, HAS_E4M3, USE_ASM)), BLOCK_G, FP8)
    s *= q_scale[:, :, None] * k_scale  # [WARPS, BLOCK_G, T]; the two scales first: their product cannot overflow alone
    if SOFTCAP > 0:
        s = soft_cap(s, SOFTCAP)
    offs_n = tl.arange(0, T * WARPS).reshape(WARPS, T)[:, None, :]
    counts = offs_n < end
    if WINDOW > 0:
        counts &= offs_n >= begin
    s = tl.where(counts, s, float("-inf"))
    v_scale = tl.where(counts, v_scale, 1.0)
    size = (s + _log2(v_scale, USE_ASM)).reshape(WARPS, BLOCK_G, T // 8, 8)  # a thread's before those of other lanes
    new_top = tl.maximum(top, tl.max(tl.max(size, 2), 2))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a warp may have seen no token yet
    p = tl.exp2(s - base[:, :, None])
    # In two steps: a total that counts may have to shrink by more than the smallest float32.
    rescale = tl.exp2((top - base) * 0.5)
    total = total * rescale * rescale + tl.sum(tl.sum(p.reshape(WARPS, BLOCK_G, T // 8, 8), 2), 2)
    p = (p * v_scale).to(tl.float16).permute(0, 2, 1)
    v = _values_operand(v[0], v[1], FP8, HAS_E4M3, USE_ASM)
    if FP8:
        product = tl.dot(v, p)
    else:  # the bias goes with what each probability adds
        bias = tl.dot(tl.full([WARPS, 16, T], -1152.0, tl.float16), p)  # [WARPS, 16, BLOCK_G]
        D: tl.constexpr = v.shape[1]
        bias = bias[:, None].broadcast_to(WARPS, D // 16, 16, BLOCK_G).reshape(WARPS, D, BLOCK_G)
        product = tl.dot(v, p, bias)
    if acc is not None:
        product += acc * (rescale * rescale)[:, None, :]
    return new_top, total, product


@triton.jit(do_not_specialize=["Lmax"], launch_metadata=decode_attention_cost)
def _decode_attention_8bit_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_cache_ptr,  # int8, or the bits of e4m3 as int8
    v_cache_ptr,
    kv_scale_ptr,  # [B, Hkv, Lmax, 2] fp32
    lengths_ptr,
    cos_ptr,  # [>= Lmax, ROPE_HALF]
    sin_ptr,
    q_norm_ptr,  # [D], or None
    k_norm_ptr,
    sinks_ptr,  # [Hq], or None
    partial_ptr,  # as in decode_attention.py
    counter_ptr,
    out_ptr,  # [B, Hq, D]
    lse_ptr,  # [B, Hq] fp32, or None
    stride_qb,
    stride_qh,
    stride_kb,  # of k and v
    stride_kh,
    stride_cb,  # of k_cache and v_cache, whose rows follow each other
    stride_ch,
    stride_sb,  # of kv_scale
    stride_sh,
    Lmax,
    scale_log2,  # scale * log2(e): the softmax is computed with exp2
    ROPE_HALF: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    EPS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    WARPS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
    FP8: tl.constexpr,  # e4m3
    HAS_E4M3: tl.constexpr,  # instructions that convert it
    USE_ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    STEP: tl.constexpr = 16 * TILES * WARPS  # tokens of a tile
    E: tl.constexpr = 16  # elements in 16 bytes
    E_V: tl.constexpr = min(E, BLOCK_D // 8)
    LARGEST: tl.constexpr = 448.0 if FP8 else 127.0
    PAIR_IN_THREAD: tl.constexpr = 2 * ROPE_HALF == BLOCK_D and ROPE_HALF % (4 * E) == 0
    split = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    k_cache_ptr += batch * stride_cb + kv_head * stride_ch
    v_cache_ptr += batch * stride_cb + kv_head * stride_ch
    kv_scale_ptr += batch * stride_sb + kv_head * stride_sh

    length = early_length(lengths_ptr, batch, WARPS, PDL)
    if PDL:
        start = first_tile(length, split, Lmax, STEP)
        rows = tl.minimum(tl.minimum(length, Lmax) - start, STEP)
        first_k = k_cache_ptr + tl.cast(start, tl.int64) * D
        first_v = v_cache_ptr + tl.cast(start, tl.int64) * D
        first_scale = kv_scale_ptr + tl.cast(start, tl.int64) * 2
        is_aligned = (first_k.to(tl.int64) | first_v.to(tl.int64) | first_scale.to(tl.int64)) % 16 == 0
        if (rows > 0) & (start >= 0) & is_aligned:
            prefetch_l2(first_k, rows * D)
            prefetch_l2(first_v, rows * D)
            prefetch_l2(first_scale, (rows + 1) // 2 * 16)
        if q_norm_ptr is not None:
            prefetch_row(q_norm_ptr, D)
            prefetch_row(k_norm_ptr, D)
    wait_for_previous(PDL)

    lane = tl.arange(0, 32)[:, None, None, None]
    warp = tl.arange(0, WARPS)[None, :, None, None]
    d = tl.arange(0, BLOCK_D // (4 * E))[None, None, None, :] * (4 * E) + lane % 4 * E + warp * 0  # as keys are loaded
    d_v = tl.arange(0, BLOCK_D // (8 * E_V))[None, None, None, :] * (8 * E_V) + lane // 4 * E_V + warp * 0  # as values
    d_rope = d
    if PAIR_IN_THREAD:  # the other half has the same angles
        d_rope = tl.arange(0, BLOCK_D // (8 * E))[None, None, None, :] * (4 * E) + lane % 4 * E + warp * 0
    head = lane // 4 + 8 * tl.arange(0, BLOCK_G // 8)[None, None, :, None]
    q_row = batch * stride_qb + (kv_head * G + head) * stride_qh
    new_row = batch * stride_kb + kv_head * stride_kh + lane * 0
    q = tl.zeros([WARPS, 2 * BLOCK_G, BLOCK_D], tl.float16 if FP8 else tl.int8)
    q_scale = tl.zeros([WARPS, BLOCK_G], tl.float32)
    top = tl.full([WARPS, BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([WARPS, BLOCK_G], tl.float32)
    acc = tl.zeros([WARPS, BLOCK_D, BLOCK_G], tl.float32)

    read_early = -1
    while read_early != length:  # once, or twice if `length` was read before its time
        # What the first tile needs, all asked for before any of it is used.
        start = first_tile(length, split, Lmax, STEP)
        begin = window_begin(length, Lmax, WINDOW)
        last = tl.maximum(tl.minimum(length, Lmax) - 1, 0) - start
        row = tl.cast(start, tl.int64)
        k = _load_keys(k_cache_ptr + row * D, last, start >= 0, D, BLOCK_D, WARPS, TILES, E, False)
        v = _load_values(v_cache_ptr + row * D, last, start >= 0, D, BLOCK_D, WARPS, TILES, E_V, False)
        scales = _load_scales(kv_scale_ptr + row * 2, last, start >= 0, WARPS, TILES, False)
        q_new, q_pair = load_pairs(q_ptr + q_row, d, (head < G) & (d < D), ROPE_HALF, PAIR_IN_THREAD, E)
        k_new, k_pair = load_pairs(k_ptr + new_row, d, d < D, ROPE_HALF, PAIR_IN_THREAD, E)
        v_new = load_vectors(v_ptr + new_row + d_v, d_v < D, E_V)
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
        q, q_scale = _split_queries(rotate(q_new, q_pair, d, cos, sin, ROPE_HALF, PAIR_IN_THREAD, E), FP8)
        q_scale *= scale_log2
        top, total = start_softmax(sinks_ptr, kv_head, split, G, WARPS, BLOCK_G, 90.0)  # as of a small value
        acc = tl.zeros([WARPS, BLOCK_D, BLOCK_G], tl.float32)
        if (split == 0) & (read_early < Lmax):  # this block has the last tile, and the new token with it
            k_rotated = k_new, k_pair
            if k_norm_ptr is not None:  # here, as its weights would fill registers that the tile needs
                k_rotated = norm_pairs(k_new, k_pair, k_norm_ptr, d, D, EPS, ROPE_HALF, PAIR_IN_THREAD, E)
            k_rotated = rotate(k_rotated[0], k_rotated[1], d, cos, sin, ROPE_HALF, PAIR_IN_THREAD, E)
            largest_k = _largest(k_rotated, 1)[:, None].broadcast_to(8, 4, WARPS, 1).reshape(32, WARPS, 1)
            k_codes = _quantize(k_rotated, largest_k[:, :, :, None, None], FP8, HAS_E4M3)
            v_wide = v_new.to(tl.float32)
            largest_v = _largest(v_wide, 0)[None].broadcast_to(8, 4, WARPS, 1).reshape(32, WARPS, 1)
            v_codes = _quantize(v_wide, largest_v[:, :, :, None, None], FP8, HAS_E4M3)
            is_key = tl.arange(0, 2)[None, None, None, :] == 0
            new_scales = tl.where(is_key, largest_k[:, :, :, None], largest_v[:, :, :, None]) * (1.0 / LARGEST)
            if read_early == length:
                cache_row = tl.cast(length, tl.int64)
                at_k = k_cache_ptr + (cache_row * D + d)[:, :, :, :, None] + tl.arange(0, E)
                tl.store(at_k, k_codes, mask=((lane < 4) & (warp == 0) & (d < D))[:, :, :, :, None])
                at_v = v_cache_ptr + (cache_row * D + d_v)[:, :, :, :, None] + tl.arange(0, E_V)
                tl.store(at_v, v_codes, mask=((lane % 4 == 0) & (warp == 0) & (d_v < D))[:, :, :, :, None])
                at_scale = kv_scale_ptr + cache_row * 2 + tl.arange(0, 2) + (lane + warp) * 0
                tl.store(at_scale, new_scales, mask=(lane == 0) & (warp == 0))
            # Later tokens of the tile do not count, but what is multiplied by 0 must be a number: the new token's.
            k_row = warp * (16 * TILES) + tl.arange(0, 2 * TILES)[None, None, :, None] * 8 + lane // 4
            k = insert(k, k_codes, (k_row >= read_early - start)[:, :, :, :, None], USE_ASM)
            even = warp * (16 * TILES) + tl.arange(0, 2 * TILES)[None, None, :, None] * 8 + lane % 4 * 2
            is_new = even + tl.arange(0, 2) >= read_early - start
            scales = tl.where(is_new[:, :, :, :, None], new_scales[:, :, :, None, :], scales)
            is_new = (even >= read_early - start)[:, :, :, :, None], (even + 1 >= read_early - start)[:, :, :, :, None]
            v = insert(v[0], v_codes, is_new[0], USE_ASM), insert(v[1], v_codes, is_new[1], USE_ASM)
            top, total, acc = _attend(
                q, q_scale, k, v, scales, top, total, None, begin - start, read_early + 1 - start,
                SOFTCAP, WINDOW, FP8, HAS_E4M3, USE_ASM,
            )  # fmt: skip
        elif start >= 0:
            top, total, acc = _attend(
                q, q_scale, k, v, scales, top, total, None, begin - start, Lmax - start,
                SOFTCAP, WINDOW, FP8, HAS_E4M3, USE_ASM,
            )  # fmt: skip

    begin = window_begin(length, Lmax, WINDOW)
    splits = tl.minimum(tl.cdiv(tokens(length, Lmax), STEP) - begin // STEP, NUM_SPLITS)
    if split >= splits:
        return
    start = first_tile(length, split, Lmax, STEP) - splits * STEP
    while start >= begin // STEP * STEP:  # from the last tile to the first; all of their tokens exist
        row = tl.cast(start, tl.int64)
        k = _load_keys(k_cache_ptr + row * D, STEP, True, D, BLOCK_D, WARPS, TILES, E, True)
        v = _load_values(v_cache_ptr + row * D, STEP, True, D, BLOCK_D, WARPS, TILES, E_V, True)
        scales = _load_scales(kv_scale_ptr + row * 2, STEP, True, WARPS, TILES, True)
        top, total, acc = _attend(
            q, q_scale, k, v, scales, top, total, acc, begin - start, STEP, SOFTCAP, WINDOW, FP8, HAS_E4M3, USE_ASM
        )
        start -= splits * STEP

    block_top = tl.max(top, 0)
    weight = tl.exp2((top - block_top[None, :]) * 0.5)  # see _attend
    block_total = tl.sum(total * weight * weight, 0)
    acc = add_warps(acc * (weight * weight)[:, None, :], WARPS) * (1.0 / block_total)[None, :]  # [BLOCK_D, BLOCK_G]
    finish(
        acc, block_top, block_total, partial_ptr, counter_ptr, out_ptr, lse_ptr, batch, kv_head, split, splits,
        G, D, NUM_SPLITS, BLOCK_G, BLOCK_D, E_V,
    )  # fmt: skip
