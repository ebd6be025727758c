"""A tile of the KV cache between memory and the tensor core: how it is loaded, and what the softmax does with it.

The caches are of 16 or 32 bits as they are, or of 8 bits with a scale for each token, of its key and of its value:

    k_cache, v_cache int8 or e4m3 [B, Hkv, Lmax, D], kv_scale fp32 [B, Hkv, Lmax, 2]
    a cached key is kv_scale[..., 0] * k_cache, a value kv_scale[..., 1] * v_cache; the largest element is 127 or 448

Tensors in registers are of shape [32, WARPS, registers ..., E], as in decode_parts.py. The queries are the tensor
core's first operand, of 16 rows, and the keys its second: a thread holds the keys in neighbouring registers as it loads
them, and the scores come out where the second product wants the probabilities.

Over 8 bits the 8 rows that a group of up to 8 heads leaves free are used too: what a query's first row, of 8 or 11
bits, leaves of it is in the second. A query is divided by its largest element, so that nothing overflows.

- int8: both rows are int8 and the product is of integers. It is exact, and the keys are not converted at all.
- e4m3: both rows are fp16, and the keys are converted to it, two by one instruction.

The values are converted to fp16. A probability times its value's scale may be of any size: the softmax is computed
relative to the largest such product that the warp has met, not to the largest probability. So none exceeds 1, and what
fp16 rounds to zero is less than 2^-24 of the largest. (With values above 1e32 or so exp2 flushes more of them to zero.)
"""

import triton
import triton.language as tl

from tiny_gemm.triton_fused_transformer.decode_parts import fast_log2, norm_pairs, rotate, soft_cap

# ---------------------------------------------------------------------------------------------------------------------
# Loads
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def tile_pointers(
    k_ptr,  # of one sequence and KV head
    v_ptr,
    scale_ptr,  # None: no scales
    start,  # the tile's first token
    last,  # what comes after it, counted from `start`, does not exist
    STRIDE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WARPS: tl.constexpr,
    TILES: tl.constexpr,
    E: tl.constexpr,
    E_V: tl.constexpr,
    ALL: tl.constexpr,
):
    """Where load_tile finds 16 * TILES * WARPS tokens: (keys, values of even tokens, of odd ones, scales); unless ALL
    exist, those of `last` in the place of later ones.

    Keys [32, WARPS, 2 * TILES, BLOCK_D / 4 E]: lane 4 r + t loads of each eight tokens token r, columns 4 E c + E t and
    E - 1 more for each c. What it needs for the product are columns 4 P s + 2 P h + P t + e, where P elements, 2 of 16
    or 4 of 8 bits, fill a register; so stored column 4 E c + E t + 2 P s + P h + e is called 4 E c + 4 P s + 2 P h +
    P t + e, of k and of q alike, and nothing moves between threads.

    Values, twice [32, WARPS, 2 * TILES, BLOCK_D / 8 E]: lane 4 r + t loads of each eight tokens 2 t and 2 t + 1, the
    columns 8 E c + E r and E - 1 more for each c; stored column 8 E c + E r + j is called 8 E c + 8 j + r.

    Scales, of the key and behind it of the value, of the same tokens as the values: [32, WARPS, 2 * TILES, 2], or, if
    ALL, of the even tokens, [32, WARPS, 2 * TILES, 1], as the next token's are behind.
    """
    row = tl.cast(start, tl.int64)
    lane = tl.arange(0, 32)[:, None, None, None]
    warp = tl.arange(0, WARPS)[None, :, None, None] * (16 * TILES)
    eighth = tl.arange(0, 2 * TILES)[None, None, :, None] * 8
    chunk = tl.arange(0, BLOCK_D // (4 * E))[None, None, None, :] * (4 * E)
    chunk_v = tl.arange(0, BLOCK_D // (8 * E_V))[None, None, None, :] * (8 * E_V)
    k = _rows(k_ptr + row * STRIDE, warp + lane // 4, eighth, lane % 4 * E, chunk, last, STRIDE, ALL)
    token = warp + lane % 4 * 2
    even = _rows(v_ptr + row * STRIDE, token, eighth, lane // 4 * E_V, chunk_v, last, STRIDE, ALL)
    odd = _rows(v_ptr + row * STRIDE, token, eighth + 1, lane // 4 * E_V, chunk_v, last, STRIDE, ALL)
    scales = even
    if scale_ptr is not None:
        token += eighth
        if not ALL:
            token = tl.minimum(token + tl.arange(0, 2), last)
        scales = scale_ptr + row * 2 + token * 2
    return k, even, odd, scales


@triton.jit
def _rows(
    ptr,
    token,  # of lane and warp; those of a thread lie token_more behind it
    token_more,
    d,  # columns, likewise
    d_more,
    last,
    STRIDE: tl.constexpr,
    ALL: tl.constexpr,
):
    if STRIDE > 2**22:  # a pool of all layers and sequences, token by token
        token, token_more = token.to(tl.int64), token_more.to(tl.int64)
    if ALL:  # what differs between the loads of a thread is a constant in the instruction
        return ptr + (token * STRIDE + d) + (token_more * STRIDE + d_more)
    else:
        return ptr + (tl.minimum(token + token_more, last) * STRIDE + d + d_more)


@triton.jit
def load_tile(
    pointers, IS_8_BIT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, E: tl.constexpr, E_V: tl.constexpr,
    ALL: tl.constexpr,
):  # fmt: skip
    """What is at tile_pointers, asked for at once: keys and values with E or E_V columns behind each other, scales
    [32, WARPS, 2 * TILES, 2, 2]."""
    k_ptrs, even_ptrs, odd_ptrs, scale_ptrs = pointers
    lane = tl.arange(0, 32)[:, None, None, None]
    d = lane % 4 * E + tl.arange(0, BLOCK_D // (4 * E))[None, None, None, :] * (4 * E)
    d_v = lane // 4 * E_V + tl.arange(0, BLOCK_D // (8 * E_V))[None, None, None, :] * (8 * E_V)
    # In a loop ptxas would ask for the values when the keys have arrived. It keeps the order of volatile loads, and the
    # keys, which are needed first, are the last of them.
    LATE: tl.constexpr = ALL and E > 4
    if not LATE:  # in the order of use
        k = _load_columns(k_ptrs, d, D, BLOCK_D, E, LATE)
    even = _load_columns(even_ptrs, d_v, D, BLOCK_D, E_V, LATE)
    odd = _load_columns(odd_ptrs, d_v, D, BLOCK_D, E_V, LATE)
    scales = even
    if IS_8_BIT:
        scales = tl.load(scale_ptrs[:, :, :, :, None] + tl.arange(0, 4 if ALL else 2), volatile=LATE)
        scales = scales.reshape(scales.shape[0], scales.shape[1], scales.shape[2], 2, 2)
    if LATE:
        k = _load_columns(k_ptrs, d, D, BLOCK_D, E, LATE)
    return k, even, odd, scales


@triton.jit
def _load_columns(ptrs, d, D: tl.constexpr, BLOCK_D: tl.constexpr, E: tl.constexpr, VOLATILE: tl.constexpr):
    ptrs = ptrs[:, :, :, :, None] + tl.arange(0, E)
    if D == BLOCK_D:
        return tl.load(ptrs, volatile=VOLATILE)
    else:
        return tl.load(ptrs, mask=(d < D)[:, :, :, :, None], other=0.0, volatile=VOLATILE)


# ---------------------------------------------------------------------------------------------------------------------
# Operands
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _two_planes(first, second):
    """Twice [32, WARPS, N, C, E] as [32, WARPS, N, 2, C, E]."""
    SHAPE: tl.constexpr = first.shape
    first = first.reshape(SHAPE[0], SHAPE[1], SHAPE[2], 1, SHAPE[3], SHAPE[4])
    second = second.reshape(first.shape)
    is_first = tl.arange(0, 2)[None, None, None, :, None, None] == 0
    return tl.where(is_first, first, second)


@triton.jit
def _planes_operand(planes, P: tl.constexpr):
    """[32, WARPS, N, PLANES, C, E], loaded as keys are with heads for tokens, as [WARPS, 8 * N * PLANES, 4 * C * E],
    columns renamed; P as tile_pointers says."""
    WARPS: tl.constexpr = planes.shape[1]
    N: tl.constexpr = planes.shape[2]
    PLANES: tl.constexpr = planes.shape[3]
    C: tl.constexpr = planes.shape[4]
    E: tl.constexpr = planes.shape[5]
    planes = planes.reshape(8, 4, WARPS, N, PLANES, C, E // (2 * P), 2, P)  # r t warp n plane c s h e
    return planes.permute(2, 3, 4, 0, 5, 6, 7, 1, 8).reshape(WARPS, 8 * N * PLANES, 4 * C * E)


@triton.jit
def queries_operand(
    q,  # what load_pairs loaded, as keys are with heads for tokens
    q_pair,
    d,
    cos,
    sin,
    norm_ptr,  # [D], or None
    scale_log2,
    D: tl.constexpr,
    EPS: tl.constexpr,
    ROPE_HALF: tl.constexpr,
    PAIR_IN_THREAD: tl.constexpr,
    CACHED: tl.constexpr,
    FP8: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """The queries, normed and rotated, as attend wants them, and what a score is to be multiplied by."""
    E: tl.constexpr = 16 // (CACHED.primitive_bitwidth // 8)
    if norm_ptr is not None:
        q, q_pair = norm_pairs(q, q_pair, norm_ptr, d, D, EPS, ROPE_HALF, PAIR_IN_THREAD, E)
    q = rotate(q, q_pair, d, cos, sin, ROPE_HALF, PAIR_IN_THREAD, E)
    if CACHED == tl.int8:
        q, scale = _split_queries(q, FP8)
        return q, scale * scale_log2
    elif E == 4:
        q = q.to(CACHED)
        q = q.reshape(q.shape[0], q.shape[1], q.shape[2], 1, q.shape[3], q.shape[4])
        return _planes_operand(q, 2), scale_log2
    else:
        return _words_of_queries(q, CACHED, USE_ASM), scale_log2


@triton.jit
def _words_of_queries(q, CACHED: tl.constexpr, USE_ASM: tl.constexpr):
    """q fp32 [32, WARPS, BLOCK_G / 8, C, E], loaded as keys are with heads for tokens, rounded to 16 bits, two in a
    word: int32 [32, WARPS, BLOCK_G / 8, PLANES, C, E / 2]. Of 8 heads there are two planes: each stands there twice.

    (A tensor of 16 bits that crosses the edge of a branch or a loop is taken apart there.)
    """
    even, odd = tl.split(q.reshape(q.shape[0], q.shape[1], q.shape[2], q.shape[3], q.shape[4] // 2, 2))
    if USE_ASM:
        asm: tl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if CACHED == tl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
        words = tl.inline_asm_elementwise(asm, "=r,f,f", [even, odd], dtype=tl.int32, is_pure=True, pack=1)
    else:
        even, odd = even.to(CACHED).to(tl.uint16, bitcast=True), odd.to(CACHED).to(tl.uint16, bitcast=True)
        words = (even.to(tl.uint32) | odd.to(tl.uint32) << 16).to(tl.int32, bitcast=True)
    if q.shape[2] > 1:
        return words.reshape(words.shape[0], words.shape[1], words.shape[2], 1, words.shape[3], words.shape[4])
    else:
        second = words
        if USE_ASM:
            # The product wants neighbouring registers; one for both planes would be copied into them for each product.
            # An exchange of each lane with itself: ptxas neither sees that nothing changes nor does it again in a loop.
            second = tl.inline_asm_elementwise(
                "shfl.sync.bfly.b32 $0, $1, 0, 31, -1;", "=r,r", [words], dtype=tl.int32, is_pure=False, pack=1
            )
        return _two_planes(words, second)


@triton.jit
def _queries_of_words(words, CACHED: tl.constexpr):
    """What _words_of_queries gives as [WARPS, 8 * N * PLANES, BLOCK_D]."""
    SHAPE: tl.constexpr = words.shape
    words = words.reshape(SHAPE[0], SHAPE[1], SHAPE[2], SHAPE[3], SHAPE[4], SHAPE[5], 1)
    words = words.broadcast_to(SHAPE[0], SHAPE[1], SHAPE[2], SHAPE[3], SHAPE[4], SHAPE[5], 2)
    planes = tl.where(tl.arange(0, 2) == 0, words, words >> 16).to(tl.int16).to(CACHED, bitcast=True)
    return _planes_operand(planes.reshape(SHAPE[0], SHAPE[1], SHAPE[2], SHAPE[3], SHAPE[4], 2 * SHAPE[5]), 2)


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
def _split_queries(q, FP8: tl.constexpr):
    """q fp32 [32, WARPS, BLOCK_G / 8, C, E] as (operand [WARPS, 2 * BLOCK_G, BLOCK_D], its scale [WARPS, BLOCK_G])."""
    WARPS: tl.constexpr = q.shape[1]
    N: tl.constexpr = q.shape[2]
    scale = _largest(q, 1)  # [8, WARPS, N]
    inverse = (1.0 / scale)[:, None].broadcast_to(8, 4, WARPS, N).reshape(32, WARPS, N)[:, :, :, None, None]
    if FP8:
        q *= inverse
        first = q.to(tl.float16)
        second = (q - first.to(tl.float32)).to(tl.float16)
    else:  # an integer of 16 bits, 256 * first + second
        bits = tl.fma(q, (inverse * 32512.0).broadcast_to(q.shape), 12582912.0).to(tl.int32, bitcast=True)
        first = (bits + 128 >> 8).to(tl.int8)
        second = bits.to(tl.int8)
        scale *= 1.0 / 32512.0
    operand = _planes_operand(_two_planes(first, second), 4)
    return operand, scale.permute(1, 2, 0).reshape(WARPS, 8 * N)


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
def _add_planes(s, BLOCK_G: tl.constexpr, FP8: tl.constexpr):
    """The products of both rows of each query, [WARPS, 2 * BLOCK_G, T], as fp32 [WARPS, BLOCK_G, T]."""
    WARPS: tl.constexpr = s.shape[0]
    T: tl.constexpr = s.shape[2]
    first, second = tl.split(s.reshape(WARPS, BLOCK_G // 8, 2, 8, T).permute(0, 1, 3, 4, 2))
    s = first + second if FP8 else (first * 256 + second).to(tl.float32)
    return s.reshape(WARPS, BLOCK_G, T)


@triton.jit
def _heads(s, BLOCK_G: tl.constexpr):
    """The products of the queries of _queries_of_words, [WARPS, .., T], as [WARPS, BLOCK_G, T]."""
    if s.shape[1] > BLOCK_G:
        s, _ = tl.split(s.reshape(s.shape[0], 2, BLOCK_G, s.shape[2]).permute(0, 2, 3, 1))
    return s


@triton.jit
def _keys_operand(k, IS_8_BIT: tl.constexpr, FP8: tl.constexpr, HAS_E4M3: tl.constexpr, USE_ASM: tl.constexpr):
    """The keys that load_tile loaded, transposed: [WARPS, BLOCK_D, 16 * TILES], columns renamed; e4m3 as fp16."""
    WARPS: tl.constexpr = k.shape[1]
    EIGHTHS: tl.constexpr = k.shape[2]
    C: tl.constexpr = k.shape[3]
    E: tl.constexpr = k.shape[4]
    P: tl.constexpr = 4 if IS_8_BIT else 2
    if IS_8_BIT and FP8:
        if USE_ASM:
            asm: tl.constexpr = _keys_asm(_kind(FP8, HAS_E4M3))
            k = tl.inline_asm_elementwise(asm, "=&r,=&r,r", [k], dtype=tl.float16, is_pure=True, pack=4)
        else:
            k = _to_fp16(k, FP8)
    k = k.reshape(8, 4, WARPS, EIGHTHS, C, E // (2 * P), 2, P)  # r t warp eighth c s h e
    return k.permute(2, 4, 5, 6, 1, 7, 3, 0).reshape(WARPS, 4 * C * E, 8 * EIGHTHS)


@triton.jit
def _values_operand(
    even, odd, IS_8_BIT: tl.constexpr, FP8: tl.constexpr, HAS_E4M3: tl.constexpr, USE_ASM: tl.constexpr
):
    """The values that load_tile loaded, transposed: [WARPS, BLOCK_D, 16 * TILES], columns renamed; of 8 bits as fp16,
    where an int8 is 1152 more than it was."""
    WARPS: tl.constexpr = even.shape[1]
    EIGHTHS: tl.constexpr = even.shape[2]
    C: tl.constexpr = even.shape[3]
    E: tl.constexpr = even.shape[4]
    is_even = tl.arange(0, 2) == 0
    if IS_8_BIT and USE_ASM:  # a word for each pair
        asm: tl.constexpr = _values_asm(_kind(FP8, HAS_E4M3))
        # It is pure, but if Triton knew, it would see through it that bytes are loaded, and choose a layout for bytes.
        pairs = tl.inline_asm_elementwise(
            asm, "=&r,=&r,=&r,=&r,r,r", [even, odd], dtype=tl.int32, is_pure=False, pack=4
        )
        pairs = pairs.reshape(32, WARPS, EIGHTHS, C, E, 1).broadcast_to(32, WARPS, EIGHTHS, C, E, 2)
        v = tl.where(is_even, pairs, pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        if IS_8_BIT:
            even, odd = _to_fp16(even, FP8), _to_fp16(odd, FP8)
        even = even.reshape(32, WARPS, EIGHTHS, C, E, 1).broadcast_to(32, WARPS, EIGHTHS, C, E, 2)
        odd = odd.reshape(32, WARPS, EIGHTHS, C, E, 1).broadcast_to(32, WARPS, EIGHTHS, C, E, 2)
        v = tl.where(is_even, even, odd)
    v = v.reshape(8, 4, WARPS, EIGHTHS, C, E, 2)  # r t warp eighth c j e
    return v.permute(2, 4, 5, 0, 3, 1, 6).reshape(WARPS, 8 * C * E, 8 * EIGHTHS)


@triton.jit
def _scales_of_scores(scales, BLOCK_G: tl.constexpr):
    """The scales that load_tile loaded, as (of the keys, of the values), each [WARPS, BLOCK_G, 16 * TILES]."""
    WARPS: tl.constexpr = scales.shape[1]
    EIGHTHS: tl.constexpr = scales.shape[2]
    scales = scales.reshape(8, 4, WARPS, EIGHTHS, 2, 2).permute(2, 0, 3, 1, 4, 5)  # warp r eighth t e, key or value
    scales = scales.reshape(WARPS, 1, 8, 8 * EIGHTHS, 2).broadcast_to(WARPS, BLOCK_G // 8, 8, 8 * EIGHTHS, 2)
    return tl.split(scales.reshape(WARPS, BLOCK_G, 8 * EIGHTHS, 2))


@triton.jit
def _quantize(x, largest, FP8: tl.constexpr, HAS_E4M3: tl.constexpr):
    """fp32 x / largest * 127 as int8, or x / largest * 448 as the bits of e4m3, to nearest even."""
    if not FP8:
        scale = (127.0 / largest).broadcast_to(x.shape)
        return tl.fma(x, scale, 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)  # 1.5 * 2^23
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
def quantize_token(k, v, FP8: tl.constexpr, HAS_E4M3: tl.constexpr):
    """(codes of k, of v, their scales [32, WARPS, 1, 2]) of one token, loaded as keys and as values are; k is fp32."""
    WARPS: tl.constexpr = k.shape[1]
    v = v.to(tl.float32)
    largest_k = _largest(k, 1)[:, None].broadcast_to(8, 4, WARPS, 1).reshape(32, WARPS, 1)
    largest_v = _largest(v, 0)[None].broadcast_to(8, 4, WARPS, 1).reshape(32, WARPS, 1)
    k = _quantize(k, largest_k[:, :, :, None, None], FP8, HAS_E4M3)
    v = _quantize(v, largest_v[:, :, :, None, None], FP8, HAS_E4M3)
    is_key = tl.arange(0, 2)[None, None, None, :] == 0
    scales = tl.where(is_key, largest_k[:, :, :, None], largest_v[:, :, :, None])
    return k, v, scales * (1.0 / (448.0 if FP8 else 127.0))


# ---------------------------------------------------------------------------------------------------------------------
# Softmax
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def attend(
    q,  # and q_scale, as queries_operand gives them: [WARPS, 16 or more, BLOCK_D], or, of 16 bits, words
    q_scale,  # in units of log2; without scales of the cache one number, else [WARPS, BLOCK_G]
    k,  # as load_tile loads them
    even,
    odd,
    scales,
    top,
    total,
    acc,  # None of the first tile
    begin,  # first and past the last of the tile's tokens that count
    end,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    IS_8_BIT: tl.constexpr,
    FP8: tl.constexpr,
    HAS_E4M3: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """The running softmax with one more tile. top [WARPS, BLOCK_G]: the largest score, in units of log2, over 8 bits
    the largest log2 of exp(score) times the value's scale; total [WARPS, BLOCK_G], acc [WARPS, BLOCK_D, BLOCK_G]: the
    sums, over 2 ** top."""
    WARPS: tl.constexpr = k.shape[1]
    T: tl.constexpr = 8 * k.shape[2]
    BLOCK_G: tl.constexpr = top.shape[1]
    keys = _keys_operand(k, IS_8_BIT, FP8, HAS_E4M3, USE_ASM)
    if IS_8_BIT:
        k_scale, v_scale = _scales_of_scores(scales, BLOCK_G)
        # The two scales first: their product cannot overflow alone.
        s = _add_planes(tl.dot(q, keys), BLOCK_G, FP8) * (q_scale[:, :, None] * k_scale)
    elif k.dtype == tl.float32:  # without tensor cores; this way round it takes fewer registers
        s = tl.dot(keys.permute(0, 2, 1), q.permute(0, 2, 1), input_precision="ieee").permute(0, 2, 1) * q_scale
    else:
        s = _heads(tl.dot(_queries_of_words(q, k.dtype), keys), BLOCK_G) * q_scale  # [WARPS, BLOCK_G, T]
    if SOFTCAP > 0:
        s = soft_cap(s, SOFTCAP)
    offs_n = tl.arange(0, T * WARPS).reshape(WARPS, T)[:, None, :]
    counts = offs_n < end
    if WINDOW > 0:
        counts &= offs_n >= begin
    s = tl.where(counts, s, float("-inf"))
    size = s
    if IS_8_BIT:
        v_scale = tl.where(counts, v_scale, 1.0)
        size = s + fast_log2(v_scale, USE_ASM)
    size = size.reshape(WARPS, BLOCK_G, T // 8, 8)  # a thread's before those of other lanes
    new_top = tl.maximum(top, tl.max(tl.max(size, 2), 2))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # a warp may have seen no token yet
    p = tl.exp2(s - base[:, :, None])
    sums = tl.sum(tl.sum(p.reshape(WARPS, BLOCK_G, T // 8, 8), 2), 2)
    values = _values_operand(even, odd, IS_8_BIT, FP8, HAS_E4M3, USE_ASM)
    if IS_8_BIT:
        p *= v_scale
        # In two steps: a total that counts may have to shrink by more than the smallest float32.
        rescale = tl.exp2((top - base) * 0.5)
        total = total * rescale * rescale + sums
        rescale *= rescale
    else:
        rescale = tl.exp2(top - base)
        total = total * rescale + sums
    p = p.to(values.dtype).permute(0, 2, 1)
    if IS_8_BIT and not FP8:  # the bias goes with what each probability adds
        bias = tl.dot(tl.full([WARPS, 16, T], -1152.0, tl.float16), p)  # [WARPS, 16, BLOCK_G]
        D: tl.constexpr = values.shape[1]
        bias = bias[:, None].broadcast_to(WARPS, D // 16, 16, BLOCK_G).reshape(WARPS, D, BLOCK_G)
        product = tl.dot(values, p, bias)
        if acc is not None:
            product = tl.fma(acc, rescale[:, None, :].broadcast_to(acc.shape), product)
        return new_top, total, product
    else:
        if acc is not None:
            acc *= rescale[:, None, :]
        return new_top, total, tl.dot(values, p, acc, input_precision="ieee")
