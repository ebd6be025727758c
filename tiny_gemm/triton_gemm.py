"""INT4 GEMM on the GPU: y = x @ W.T + bias, W packed as quantize_utils describes and dequantized in registers.

    y[m, n] = sum over groups g of scale[n, g] * (sum_k x[m, k] * (q[n, k] - 8) - (zero[n, g] - 8) * sum_k x[m, k])

The weights are the M operand of the tensor-core product and the activations its N operand, which need only be 8 wide: a
batch of 8 costs what a batch of 1 costs. One block owns BLOCK_N rows of W and all of K; its warps split K among them
(SLICES, a batched dot) and their partial sums are added in a fixed order. So there are no atomics, nothing depends on
the order of arrival, and a row's bits do not depend on its batch.

`int4_tile` is the one decoder of the format on the GPU; the fused FFN uses it too.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiny_gemm.device import DeviceFacts, device_facts, device_guard
from tiny_gemm.quantize_utils import TILE_N, unit_k

# ---------------------------------------------------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------------------------------------------------


def _unpack_asm(magic: str, subtract: str) -> tl.constexpr:
    """For each plane, PTX that turns two int16 into two 16-bit floats; `magic` is the high byte of 2^mantissa bits."""
    return tl.constexpr(
        tuple(
            f"{{ .reg .b32 t, one, c; shr.u32 t, $1, {4 * plane}; "
            f"lop3.b32 t, t, 0x000F000F, 0x{magic}00{magic}00, 0xEA; {subtract} }}"
            for plane in range(4)
        )
    )


# sub.bf16x2 exists from sm_90 on only; t * 1 - 136 is the same one instruction on every chip that has bf16.
_UNPACK_BF16 = _unpack_asm("43", "mov.b32 one, 0x3F803F80; mov.b32 c, 0xC308C308; fma.rn.bf16x2 $0, t, one, c;")
_UNPACK_FP16 = _unpack_asm("64", "mov.b32 c, 0x64086408; sub.f16x2 $0, t, c;")


@triton.jit
def _unpack_plane(packed, PLANE: tl.constexpr, DTYPE: tl.constexpr, USE_ASM: tl.constexpr):
    """Nibble PLANE (0 to 3) of every int16, minus 8, as bf16 or fp16: exact, for -8 to 7 fit either.

    On NVIDIA two at a time: or-ing a nibble into the bits of 128.0 (bf16) or 1024.0 (fp16) gives 128 + q or 1024 + q,
    and subtracting 136 or 1032 leaves q - 8. Shift, lop3 and subtraction are 1.5 instructions a weight; a conversion
    from int is more than the whole budget at full memory speed.
    """
    if USE_ASM and DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise(_UNPACK_BF16[PLANE], "=r,r", [packed], tl.bfloat16, is_pure=True, pack=2)
    elif USE_ASM:
        return tl.inline_asm_elementwise(_UNPACK_FP16[PLANE], "=r,r", [packed], tl.float16, is_pure=True, pack=2)
    else:
        return (((packed >> (4 * PLANE)) & 15) - 8).to(DTYPE)


@triton.jit
def int4_tile(
    x_ptr,  # [M, K] bf16 or fp16, rows stride_xm apart
    w_ptr,  # [N / 16, UNITS, 16, UNIT / 4] int16
    s_ptr,  # [N / 16, GROUPS, 16]
    z_ptr,  # like s_ptr
    block_n,  # which BLOCK_N rows of W
    offs_m,  # [BLOCK_M] rows of x
    M,
    N,
    K,
    stride_xm,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SLICES: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,  # -1: per-channel
    HAS_ZEROS: tl.constexpr,
    STAGES: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """W[block_n's rows] @ x[offs_m].T -> fp32 [BLOCK_N, BLOCK_M].

    Slice i of SLICES takes a contiguous run of units; units past the end are clamped to the last one and multiplied by
    x = 0, so that no load of weights has a mask. Rows past N repeat the last tile and are not stored by the caller.
    """
    COLS: tl.constexpr = UNIT // 4
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    units = tl.cdiv(K, UNIT)
    groups = 1 if GROUP_SIZE == -1 else units * UNIT // GROUP_SIZE
    per_slice = tl.cdiv(units, SLICES)

    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tl.minimum(offs_n // 16, tl.cdiv(N, 16) - 1).to(tl.int64)
    offs_c = tl.arange(0, COLS)
    slices = tl.arange(0, SLICES)
    w_rows = tile * units * (16 * COLS) + (offs_n % 16) * COLS  # [BLOCK_N]
    s_rows = tile * groups * 16 + offs_n % 16  # [BLOCK_N]
    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, None, :] * stride_xm + offs_c[None, :, None]  # [1, COLS, BLOCK_M]
    ones = tl.full([SLICES, BLOCK_N, COLS], 1.0, DTYPE)

    acc = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)
    x_sum = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)  # only per-channel zeros carry it from unit to unit
    for i in tl.range(0, per_slice, num_stages=STAGES):
        unit = slices * per_slice + i  # [SLICES]
        w_unit = tl.minimum(unit, units - 1)
        packed = tl.load(
            w_ptr + w_rows[None, :, None] + (w_unit * (16 * COLS))[:, None, None] + offs_c[None, None, :]
        )  # [SLICES, BLOCK_N, COLS] int16
        partial = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)
        for plane in tl.static_range(4):
            k = unit * UNIT + plane * COLS  # [SLICES]
            mask_x = (offs_m < M)[None, None, :] & (k[:, None, None] + offs_c[None, :, None] < K)
            x = tl.load(x_ptrs + k[:, None, None], mask=mask_x, other=0.0)  # [SLICES, COLS, BLOCK_M]
            partial = tl.dot(_unpack_plane(packed, plane, DTYPE, USE_ASM), x, partial)
            if HAS_ZEROS:
                x_sum = tl.dot(ones, x, x_sum)  # the sum over k, broadcast to every row, in the layout of partial
            if GROUP_SIZE != -1:
                if (plane + 1) * COLS % GROUP_SIZE == 0 or plane == 3:  # a group ends here
                    group = (w_unit * UNIT + plane * COLS) // GROUP_SIZE  # [SLICES]
                    s_offs = s_rows[None, :] + (group * 16)[:, None]  # [SLICES, BLOCK_N]
                    scale = tl.load(s_ptr + s_offs).to(tl.float32)
                    if HAS_ZEROS:
                        zero = tl.load(z_ptr + s_offs).to(tl.float32) - 8.0
                        partial -= zero[:, :, None] * x_sum
                        x_sum = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)
                    acc += scale[:, :, None] * partial
                    partial = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)
        if GROUP_SIZE == -1:
            acc += partial
    out = tl.sum(acc, 0)  # [BLOCK_N, BLOCK_M]
    if GROUP_SIZE == -1:
        if HAS_ZEROS:
            out -= (tl.load(z_ptr + s_rows).to(tl.float32) - 8.0)[:, None] * tl.sum(x_sum, 0)
        out *= tl.load(s_ptr + s_rows).to(tl.float32)[:, None]
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _int4_gemm_kernel(
    x_ptr,  # [M, K]
    w_ptr,  # [N / 16, UNITS, 16, UNIT / 4] int16
    s_ptr,  # [N / 16, GROUPS, 16]
    z_ptr,  # like s_ptr, or None
    bias_ptr,  # [N] or None
    y_ptr,  # [M, N], contiguous
    M,
    N,
    K,
    stride_xm,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SLICES: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    STAGES: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """Decode: few rows of x, K split over the warps of a block."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    block_n = tl.program_id(1)
    acc = int4_tile(
        x_ptr, w_ptr, s_ptr, z_ptr, block_n, offs_m, M, N, K, stride_xm,
        BLOCK_N, BLOCK_M, SLICES, UNIT, GROUP_SIZE, z_ptr is not None, STAGES, USE_ASM,
    )  # fmt: skip
    store_tile(acc, bias_ptr, y_ptr, block_n * BLOCK_N + tl.arange(0, BLOCK_N), offs_m, M, N)


@triton.jit
def store_tile(acc, bias_ptr, y_ptr, offs_n, offs_m, M, N):
    """y[offs_m, offs_n] = acc.T + bias; acc fp32 [BLOCK_N, BLOCK_M], y contiguous [M, N], bias_ptr [N] or None."""
    mask_n = offs_n < N
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + offs_m.to(tl.int64)[None, :] * N + offs_n[:, None]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_n[:, None] & (offs_m < M)[None, :])


@triton.jit
def _int4_gemm_prefill_kernel(
    x_ptr,  # [M, K]
    w_ptr,  # [N / 16, UNITS, 16, UNIT / 4] int16
    s_ptr,  # [N / 16, GROUPS, 16]
    z_ptr,  # like s_ptr, or None
    bias_ptr,  # [N] or None
    y_ptr,  # [M, N], contiguous
    M,
    N,
    K,
    stride_xm,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    STAGES: tl.constexpr,
    USE_ASM: tl.constexpr,
):
    """Prefill: many rows of x, a plain tiled product. Blocks that share rows of W are neighbours: W comes from L2."""
    COLS: tl.constexpr = UNIT // 4
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    HAS_ZEROS: tl.constexpr = z_ptr is not None
    units = tl.cdiv(K, UNIT)
    groups = 1 if GROUP_SIZE == -1 else units * UNIT // GROUP_SIZE

    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, COLS)
    tile = tl.minimum(offs_n // 16, tl.cdiv(N, 16) - 1).to(tl.int64)
    w_ptrs = w_ptr + (tile * units * (16 * COLS) + (offs_n % 16) * COLS)[:, None] + offs_c[None, :]  # [BLOCK_N, COLS]
    s_rows = tile * groups * 16 + offs_n % 16  # [BLOCK_N]
    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, :] * stride_xm + offs_c[:, None]  # [COLS, BLOCK_M]
    ones = tl.full([BLOCK_N, COLS], 1.0, DTYPE)

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    x_sum = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for unit in tl.range(0, units, num_stages=STAGES):
        packed = tl.load(w_ptrs + unit * (16 * COLS))  # [BLOCK_N, COLS] int16
        partial = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for plane in tl.static_range(4):
            k = unit * UNIT + plane * COLS
            mask_x = (offs_m < M)[None, :] & (k + offs_c < K)[:, None]
            x = tl.load(x_ptrs + k, mask=mask_x, other=0.0)  # [COLS, BLOCK_M]
            partial = tl.dot(_unpack_plane(packed, plane, DTYPE, USE_ASM), x, partial)
            if HAS_ZEROS:
                x_sum = tl.dot(ones, x, x_sum)
            if GROUP_SIZE != -1:
                if (plane + 1) * COLS % GROUP_SIZE == 0 or plane == 3:  # a group ends here
                    s_offs = s_rows + k // GROUP_SIZE * 16
                    scale = tl.load(s_ptr + s_offs).to(tl.float32)  # [BLOCK_N]
                    if HAS_ZEROS:
                        partial -= (tl.load(z_ptr + s_offs).to(tl.float32) - 8.0)[:, None] * x_sum
                        x_sum = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                    acc += scale[:, None] * partial
                    partial = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        if GROUP_SIZE == -1:
            acc += partial
    if GROUP_SIZE == -1:
        if HAS_ZEROS:
            acc -= (tl.load(z_ptr + s_rows).to(tl.float32) - 8.0)[:, None] * x_sum
        acc *= tl.load(s_ptr + s_rows).to(tl.float32)[:, None]
    store_tile(acc, bias_ptr, y_ptr, offs_n, offs_m, M, N)


# ---------------------------------------------------------------------------------------------------------------------
# Configuration and launcher
# ---------------------------------------------------------------------------------------------------------------------

DECODE_ROWS = 16  # up to here the rows of x fit one or two tensor-core tiles, and the warps of a block split K


@dataclass(frozen=True)
class GemmConfig:
    """block_n rows of W and block_m rows of x a block; K split over `slices` warps (0: the prefill kernel); `stages`
    tiles in flight."""

    block_n: int
    block_m: int
    slices: int
    num_warps: int
    stages: int


def shared_memory_bytes(config: GemmConfig, unit: int) -> int:
    """What the software pipeline keeps in flight."""
    weights = config.block_n * unit // 2  # a unit of one row is unit / 2 bytes
    return (config.stages - 1) * max(config.slices, 1) * (weights + config.block_m * unit * 2)


def fit_shared_memory(config: GemmConfig, unit: int, facts: DeviceFacts) -> GemmConfig:
    """The configuration with as many stages (2 at least) as one block may hold in shared memory."""
    while config.stages > 2 and shared_memory_bytes(config, unit) > facts.shared_memory_bytes - 4096:
        config = replace(config, stages=config.stages - 1)
    return config


def pick_config(m: int, n: int, k: int, facts: DeviceFacts) -> GemmConfig:
    """The configuration for x [m, k] and W [n, k]. Within the decode sizes the slices of K do not depend on m, so that
    a row's sums are added in one order whatever its batch."""
    unit = unit_k(k)
    if m <= DECODE_ROWS:
        # Swept on an H200, 2026-11-22, M = 1 and 8: see docs/notes/int4-gemm.md.
        block_m = 8 if m <= 8 and facts.is_nvidia else 16  # AMD's matrix instructions are 16 wide, NVIDIA's 8
        block_n = 32 if m <= 8 and n > 64 * facts.sm_count else 16  # 32 x 16 runs out of registers
        slices = 4 if k <= 4096 else 8
        config = GemmConfig(block_n, block_m, slices, slices, stages=3)
    else:
        config = GemmConfig(64, 64 if m > 32 else 32, slices=0, num_warps=4, stages=3)
    return fit_shared_memory(config, unit, facts)


def int4_gemm(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    group_size: int,
    out_features: int,
    config: GemmConfig | None = None,
) -> Tensor:
    """x [M, K] (bf16 or fp16) times the Int4Weight given by its parts -> [M, out_features]; see ops.int4_gemm."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"int4_gemm: x is {x.dtype}, on a GPU it must be bfloat16 or float16")
    m, k = x.shape
    n = out_features
    if x.stride(1) != 1:
        x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(m, n)
    if m == 0:
        return y
    facts = device_facts(x.device)
    config = config or pick_config(m, n, k, facts)
    meta = {
        "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m,
        "UNIT": unit_k(k),
        "GROUP_SIZE": group_size,
        "STAGES": config.stages,
        "USE_ASM": facts.is_nvidia,
        "num_warps": config.num_warps,
    }
    kernel = _int4_gemm_prefill_kernel
    if config.slices:
        kernel, meta["SLICES"] = _int4_gemm_kernel, config.slices
    grid = (triton.cdiv(m, config.block_m), triton.cdiv(n, config.block_n))
    with device_guard(x):
        kernel[grid](x, packed, scales, zeros, bias, y, m, n, k, x.stride(0), **meta)
    return y


assert TILE_N == 16, "the kernels are written for tiles of 16 rows"
