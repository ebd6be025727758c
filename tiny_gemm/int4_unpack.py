"""How the kernels turn packed INT4 weights into 16-bit floats, in registers: two at a time by PTX on NVIDIA, elsewhere,
and in the interpreter, by plain arithmetic."""

import triton
import triton.language as tl

UNPACKED = tl.constexpr(4.0)  # what a sum over unpacked weights is to be multiplied by: see unpack_plane


Recipe = tuple[str, str, str, str]  # mask, bits to or to what it leaves, factor, summand


def _unpack_asm(fma: str, even: Recipe, odd: Recipe, summands: tuple[str, str] = ("", "")) -> tl.constexpr:
    """For each plane, PTX that turns two int16 into two 16-bit floats: of bits 0 to 3 of a byte in even planes, and of
    bits 4 to 7 in odd ones. summands: PTX that makes of `b`, of even and of odd planes, what is added."""
    return tl.constexpr(
        tuple(
            f"{{ .reg .b32 t, a, b, c, d; shr.u32 t, $1, {8 * (plane // 2)}; lop3.b32 t, t, {mask}, {bits}, 0xEA; "
            f"mov.b32 a, {factor}; mov.b32 b, {summand}; {summands[plane % 2]} {fma} $0, t, a, b; }}"
            for plane, (mask, bits, factor, summand) in enumerate(2 * (even, odd))
        )
    )


_BF16 = (
    "fma.rn.bf16x2",
    ("0x000F000F", "0x43004300", "0x3E803E80", "0xC208C208"),  # (128 + q) / 4 - 34
    ("0x00F000F0", "0", "0x7F007F00", "0xC000C000"),  # 16 q * 2^-133, a subnormal number or a small one, * 2^127 - 2
)
_FP16 = (
    "fma.rn.f16x2",
    ("0x000F000F", "0x64006400", "0x34003400", "0xDC08DC08"),  # (1024 + q) / 4 - 258
    ("0x00F000F0", "0x64006400", "0x24002400", "0xCC80CC80"),  # (1024 + 16 q) / 64 - 18
)
_UNPACK_BF16, _UNPACK_FP16 = _unpack_asm(*_BF16), _unpack_asm(*_FP16)
# With integer zeros, $2: their bits, added to those of -32 or -256, make -(32 + z / 4) or -(256 + z / 4).
_UNPACK_BF16_Z = _unpack_asm(
    *_BF16,
    (
        "add.u32 b, $2, 0xC200C200;",
        "add.u32 b, $2, 0xC200C200; mov.b32 c, 0x3F803F80; mov.b32 d, 0x42004200; fma.rn.bf16x2 b, b, c, d;",  # + 32
    ),
)
_UNPACK_FP16_Z = _unpack_asm(
    *_FP16,
    (
        "add.u32 b, $2, 0xDC00DC00;",
        "add.u32 b, $2, 0xDC00DC00; mov.b32 c, 0x3C003C00; mov.b32 d, 0x5B805B80; fma.rn.f16x2 b, b, c, d;",  # + 240
    ),
)


def _affine_asm(convert: str) -> tl.constexpr:
    """For each plane, PTX that turns two int16 into (128 + nibble) * scale + summand, $2, $3 and $4, $5 in fp32. A word
    of 0x43, a nibble alone in its byte, and zeros is 128 + nibble in fp32."""
    return tl.constexpr(
        tuple(
            f"{{ .reg .b32 t, l, h; .reg .f32 x, y; shr.u32 t, $1, {4 * (plane % 2)}; and.b32 t, t, 0x0F0F0F0F; "
            f"prmt.b32 l, t, 0x43000000, 0x7{plane // 2}44; prmt.b32 h, t, 0x43000000, 0x7{2 + plane // 2}44; "
            f"mov.b32 x, l; mov.b32 y, h; fma.rn.f32 x, x, $2, $4; fma.rn.f32 y, y, $3, $5; {convert} $0, y, x; }}"
            for plane in range(4)
        )
    )


_AFFINE_BF16, _AFFINE_FP16 = _affine_asm("cvt.rn.bf16x2.f32"), _affine_asm("cvt.rn.f16x2.f32")
# $1 * $2, and $1 * ($2 + $3) rounded once; 0x80008000: -0, twice.
_TIMES_BF16, _TIMES_FP16 = (
    tl.constexpr(f"{{ .reg .b32 z; mov.b32 z, 0x80008000; {fma} $0, $1, $2, z; }}") for fma, *_ in (_BF16, _FP16)
)
_TIMES_2_BF16, _TIMES_2_FP16 = (
    tl.constexpr(f"{{ .reg .b32 t, z; mov.b32 z, 0x80008000; {fma} t, $1, $3, z; {fma} $0, $1, $2, t; }}")
    for fma, *_ in (_BF16, _FP16)
)


@triton.jit
def unpack_plane(packed, zero, PLANE: tl.constexpr, DTYPE: tl.constexpr, USE_ASM: tl.constexpr):
    """Nibble PLANE (0 to 3) of every int16, minus 8 and over UNPACKED, as bf16 or fp16: exact. zero: None, or an int16
    for each of `packed`, 0 to LARGEST_ZERO, to subtract in place of 8.

    On NVIDIA two at a time, 1.1 instructions a weight: a mask leaves the nibbles where they are, in the mantissa's low
    bits of a float, and an fma does the rest; only the upper two planes are shifted, together. The bits 4 to 7 of a
    bf16 reach into its exponent; with all other bits zero they still are a number that is proportional to them. A
    conversion from int is more than the whole budget at full memory speed.
    """
    if zero is not None and USE_ASM and DTYPE == tl.bfloat16:
        asm: tl.constexpr = _UNPACK_BF16_Z[PLANE]
        return tl.inline_asm_elementwise(asm, "=r,r,r", [packed, zero], tl.bfloat16, is_pure=True, pack=2)
    elif zero is not None and USE_ASM:
        asm: tl.constexpr = _UNPACK_FP16_Z[PLANE]
        return tl.inline_asm_elementwise(asm, "=r,r,r", [packed, zero], tl.float16, is_pure=True, pack=2)
    elif zero is not None:
        return ((((packed >> (4 * PLANE)) & 15) - zero).to(tl.float32) * (1.0 / UNPACKED)).to(DTYPE)
    elif USE_ASM and DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(_UNPACK_BF16[PLANE], "=r,r", [packed], tl.bfloat16, is_pure=True, pack=2)
    elif USE_ASM:
        return tl.inline_asm_elementwise(_UNPACK_FP16[PLANE], "=r,r", [packed], tl.float16, is_pure=True, pack=2)
    else:
        return ((((packed >> (4 * PLANE)) & 15) - 8).to(tl.float32) * (1.0 / UNPACKED)).to(DTYPE)


@triton.jit
def unpack_words(words, zeros, PLANE: tl.constexpr, DTYPE: tl.constexpr):
    """unpack_plane on NVIDIA, of int32 of two int16 each, as int32 of two floats. zeros: likewise, or None."""
    if zeros is not None:
        asm: tl.constexpr = _UNPACK_BF16_Z[PLANE] if DTYPE == tl.bfloat16 else _UNPACK_FP16_Z[PLANE]
        return tl.inline_asm_elementwise(asm, "=r,r,r", [words, zeros], tl.int32, is_pure=True, pack=1)
    else:
        asm: tl.constexpr = _UNPACK_BF16[PLANE] if DTYPE == tl.bfloat16 else _UNPACK_FP16[PLANE]
        return tl.inline_asm_elementwise(asm, "=r,r", [words], tl.int32, is_pure=True, pack=1)


@triton.constexpr_function
def are_integers(z_ptr, group_size: int) -> bool:
    """Whether there are zeros to subtract from the weights as integers, as kind_of_zeros says; per channel none are."""
    return group_size != -1 and z_ptr is not None and z_ptr.dtype.element_ty == tl.int16


@triton.jit
def scaled_plane(
    packed,  # [BLOCK_N, COLS] int16
    scale,  # of each row, [BLOCK_N], or None
    zero,  # likewise, int16 where INTEGER_ZEROS
    PLANE: tl.constexpr,
    INTEGER_ZEROS: tl.constexpr,
    DTYPE: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """The weights of plane PLANE themselves, [BLOCK_N, COLS] of DTYPE, rounded once; without a scale they are those of
    unpack_plane, over UNPACKED. A scale of another dtype than x is two numbers, high + low; with zeros that are not
    subtracted as integers it is fp32, as the zeros are. In fp16 four times a scale must be finite."""
    subtracted = None
    if INTEGER_ZEROS:
        subtracted = zero[:, None].broadcast_to(packed.shape)
    elif zero is not None:
        scale = scale.to(tl.float32)
        summand = -(zero.to(tl.float32) + 128.0) * scale
        return _unpack_affine(
            packed, scale[:, None].broadcast_to(packed.shape), summand[:, None].broadcast_to(packed.shape),
            PLANE, DTYPE, USE_ASM,
        )  # fmt: skip
    w = unpack_plane(packed, subtracted, PLANE, DTYPE, USE_ASM)
    if scale is None:
        return w
    else:
        factor = scale.to(tl.float32) * UNPACKED
        high = factor.to(DTYPE)
        if scale.dtype == DTYPE:
            return _times(w, high[:, None].broadcast_to(w.shape), None, USE_ASM)
        else:
            low = (factor - high.to(tl.float32)).to(DTYPE)
            return _times(w, high[:, None].broadcast_to(w.shape), low[:, None].broadcast_to(w.shape), USE_ASM)


@triton.jit
def _unpack_affine(packed, scale, summand, PLANE: tl.constexpr, DTYPE: tl.constexpr, USE_ASM: tl.constexpr):
    """(128 + nibble PLANE) * scale + summand of every int16, in fp32 and then rounded to DTYPE."""
    if USE_ASM and DTYPE == tl.bfloat16:
        asm: tl.constexpr = _AFFINE_BF16[PLANE]
        return tl.inline_asm_elementwise(
            asm, "=r,r,r,r,r,r", [packed, scale, summand], tl.bfloat16, is_pure=True, pack=2
        )
    elif USE_ASM:
        asm: tl.constexpr = _AFFINE_FP16[PLANE]
        return tl.inline_asm_elementwise(
            asm, "=r,r,r,r,r,r", [packed, scale, summand], tl.float16, is_pure=True, pack=2
        )
    else:
        return ((((packed >> (4 * PLANE)) & 15).to(tl.float32) + 128.0) * scale + summand).to(DTYPE)


@triton.jit
def _times(w, high, low, USE_ASM: tl.constexpr):
    """w * (high + low) in 16-bit floats; low None: 0. Triton multiplies bf16 one at a time."""
    if not USE_ASM:
        factor = high.to(tl.float32) if low is None else high.to(tl.float32) + low.to(tl.float32)
        return (w.to(tl.float32) * factor).to(w.dtype)
    elif low is None and w.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(_TIMES_BF16, "=r,r,r", [w, high], tl.bfloat16, is_pure=True, pack=2)
    elif low is None:
        return tl.inline_asm_elementwise(_TIMES_FP16, "=r,r,r", [w, high], tl.float16, is_pure=True, pack=2)
    elif w.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(_TIMES_2_BF16, "=r,r,r,r", [w, high, low], tl.bfloat16, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(_TIMES_2_FP16, "=r,r,r,r", [w, high, low], tl.float16, is_pure=True, pack=2)
