"""INT4 GEMM on the GPU: y = x @ W.T + bias, W packed as quantize_utils describes and dequantized in registers.

    y[m, n] = sum over groups g of scale[n, g] * (sum_k x[m, k] * (q[n, k] - 8) - (zero[n, g] - 8) * sum_k x[m, k])

The weights are the M operand of the tensor-core product and the activations its N operand, which need only be 8 wide: a
batch of 8 costs what a batch of 1 costs. There are two kernels:

- `_int4_gemm_kernel`: the warps of a block own different rows of W and share x; K is split over SPLITS blocks, and the
  last of them to finish adds their partial sums in a fixed order. For all but the smallest weights, and for prefill.
- `_int4_gemm_slice_kernel`: one block owns BLOCK_N rows and all of K, which its warps split among them (a batched dot).
  For small weights, where a second pass over partial sums would be most of the time.

So there are no atomic sums, nothing depends on the order of arrival, and a row's bits do not depend on its batch.
`int4_tile`, the body of the second, is what the fused FFN uses too.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tiny_gemm.device import DeviceFacts, counters, device_facts, device_guard, tensor_bytes
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
def _load_pair(ptr, offs):
    """Two neighbouring 16- or 32-bit floats at element 2 * offs, as fp32, by one load: only loads of 4 bytes and more a
    thread are fetched ahead by the software pipeline."""
    DTYPE: tl.constexpr = ptr.dtype.element_ty
    if DTYPE.primitive_bitwidth == 32:
        pair = tl.load(ptr.to(tl.pointer_type(tl.int64)) + offs)
        return pair.to(tl.int32).to(DTYPE, bitcast=True), (pair >> 32).to(tl.int32).to(DTYPE, bitcast=True)
    else:
        pair = tl.load(ptr.to(tl.pointer_type(tl.int32)) + offs)
        low = pair.to(tl.int16).to(DTYPE, bitcast=True)
        high = (pair >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """With programmatic dependent launch: waits until the kernel before this one has ended and its results are here.

    Until then a kernel may write nothing and read nothing, but ask L2 for weights. It lets the next kernel start only
    after its own wait: earlier, kernels would pile up on the SMs and all get slower.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def prefetch_l2(ptr, num_bytes):
    """Asks L2 for num_bytes (a multiple of 16) at ptr; one thread of the block does. From sm_90 on."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred first;
        .reg .u32 tid;
        mov.u32 tid, %tid.x;
        setp.eq.u32 first, tid, 0;
        @first cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [ptr, num_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def int4_tile(
    x_ptr,  # [M, K] bf16 or fp16, rows stride_xm apart
    w_ptr,  # [N / 16, UNITS, 16, UNIT / 4] int16
    s_ptr,  # [N / 16, PAIRS, 16, 2]; per channel [N / 16, 1, 16, 1]
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

    Slice i of SLICES takes a contiguous run of steps (STEP units: two groups or more); what is past the end is clamped
    to the last one and multiplied by x = 0, so that no load of weights has a mask. Rows past N repeat the last tile and
    are not stored by the caller.
    """
    COLS: tl.constexpr = UNIT // 4
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    STEP: tl.constexpr = 2 if GROUP_SIZE == UNIT else 1
    PAIRS: tl.constexpr = STEP * UNIT // GROUP_SIZE // 2  # a step; unused per channel
    units = tl.cdiv(K, UNIT)
    steps = tl.cdiv(units, STEP)
    per_slice = tl.cdiv(steps, SLICES)

    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tl.minimum(offs_n // 16, tl.cdiv(N, 16) - 1).to(tl.int64)
    offs_c = tl.arange(0, COLS)
    slices = tl.arange(0, SLICES)
    w_rows = tile * units * (16 * COLS) + (offs_n % 16) * COLS  # [BLOCK_N]
    s_rows = (tile if GROUP_SIZE == -1 else tile * steps * PAIRS) * 16 + offs_n % 16  # [BLOCK_N]
    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, None, :] * stride_xm + offs_c[None, :, None]  # [1, COLS, BLOCK_M]
    ones = tl.full([SLICES, BLOCK_N, COLS], 1.0, DTYPE)

    acc = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)
    x_sum = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)  # only per-channel zeros carry it from unit to unit
    for i in tl.range(0, per_slice, num_stages=STAGES):
        step = slices * per_slice + i  # [SLICES]
        pair = tl.minimum(step, steps - 1) * PAIRS  # [SLICES]
        for u in tl.static_range(STEP):
            unit = step * STEP + u  # [SLICES]
            w_unit = tl.minimum(unit, units - 1) * (16 * COLS)
            packed = tl.load(
                w_ptr + w_rows[None, :, None] + w_unit[:, None, None] + offs_c[None, None, :]
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
                    if (plane + 1) * COLS % GROUP_SIZE == 0:  # a group ends here
                        if (u * UNIT + plane * COLS) // GROUP_SIZE % 2 == 0:  # the first of a pair
                            s_offs = (
                                s_rows[None, :] + ((pair + (u * UNIT + plane * COLS) // GROUP_SIZE // 2) * 16)[:, None]
                            )  # [SLICES, BLOCK_N]
                            scale, next_scale = _load_pair(s_ptr, s_offs)
                            if HAS_ZEROS:
                                zero, next_zero = _load_pair(z_ptr, s_offs)
                        else:
                            scale = next_scale
                            if HAS_ZEROS:
                                zero = next_zero
                        if HAS_ZEROS:
                            partial -= (zero - 8.0)[:, :, None] * x_sum
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


def _int4_gemm_cost(grid, kernel, args) -> dict:
    """Bytes that one launch reads and writes, each once, and its flops, for a launch hook (see profiling)."""
    tensors = (args[name] for name in ("x_ptr", "w_ptr", "s_ptr", "z_ptr", "bias_ptr", "y_ptr"))
    return {"bytes": tensor_bytes(*tensors), "flops16": 2 * args["M"] * args["N"] * args["K"]}


@triton.jit(launch_metadata=_int4_gemm_cost)
def _int4_gemm_slice_kernel(
    x_ptr,  # [M, K]
    w_ptr,  # [N / 16, UNITS, 16, UNIT / 4] int16
    s_ptr,  # [N / 16, PAIRS, 16, 2]
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
    PDL: tl.constexpr,
):
    """Few rows of x and a small W: K split over the warps of a block."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    block_n = tl.program_id(1)
    if PDL:
        TILES: tl.constexpr = BLOCK_N // 16
        units = tl.cdiv(K, UNIT)
        first = block_n * TILES
        tiles = tl.minimum(tl.cdiv(N, 16) - first, TILES)
        prefetch_l2(w_ptr + first.to(tl.int64) * units * (4 * UNIT), tiles * units * (8 * UNIT))
    wait_for_previous(PDL)
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


@triton.jit(launch_metadata=_int4_gemm_cost)
def _int4_gemm_kernel(
    x_ptr,  # [M, K]
    w_ptr,  # [N / 16, UNITS, 16, UNIT / 4] int16
    s_ptr,  # [N / 16, PAIRS, 16, 2]; per channel [N / 16, 1, 16, 1]
    z_ptr,  # like s_ptr, or None
    bias_ptr,  # [N] or None
    y_ptr,  # [M, N], contiguous
    partial_ptr,  # fp32 [blocks of M, blocks of N, SPLITS, BLOCK_N, BLOCK_M]; None with one split
    counter_ptr,  # int32 [blocks of M, blocks of N], zero before and after; None with one split
    M,
    N,
    K,
    stride_xm,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLITS: tl.constexpr,
    UNIT: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    STAGES: tl.constexpr,
    USE_ASM: tl.constexpr,
    PDL: tl.constexpr,
    PREFETCH: tl.constexpr,  # only with PDL
):
    """The warps of a block own rows of W and share x, K is split over blocks. Blocks that share rows of W are
    neighbours: in prefill W comes from L2."""
    COLS: tl.constexpr = UNIT // 4
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    HAS_ZEROS: tl.constexpr = z_ptr is not None
    STEP: tl.constexpr = 2 if GROUP_SIZE == UNIT else 1  # units at a time: two groups or more
    PAIRS: tl.constexpr = STEP * UNIT // GROUP_SIZE // 2  # a step; unused per channel
    units = tl.cdiv(K, UNIT)
    steps = tl.cdiv(units, STEP)
    per_split = tl.cdiv(steps, SPLITS)
    split = tl.program_id(0) % SPLITS
    block_m = tl.program_id(0) // SPLITS
    block_n = tl.program_id(1)

    if PREFETCH:
        first_unit = tl.minimum(split * per_split * STEP, units - 1)
        last_unit = tl.minimum(first_unit + per_split * STEP, units)
        for t in tl.static_range(BLOCK_N // 16):
            row_tile = tl.minimum(block_n * (BLOCK_N // 16) + t, tl.cdiv(N, 16) - 1).to(tl.int64)
            prefetch_l2(w_ptr + (row_tile * units + first_unit) * (4 * UNIT), (last_unit - first_unit) * (8 * UNIT))
    wait_for_previous(PDL)

    offs_m = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = tl.arange(0, COLS)
    tile = tl.minimum(offs_n // 16, tl.cdiv(N, 16) - 1).to(tl.int64)  # rows past N repeat the last tile
    w_ptrs = w_ptr + (tile * units * (16 * COLS) + (offs_n % 16) * COLS)[:, None] + offs_c[None, :]  # [BLOCK_N, COLS]
    s_rows = (tile if GROUP_SIZE == -1 else tile * steps * PAIRS) * 16 + offs_n % 16  # [BLOCK_N]
    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, :] * stride_xm + offs_c[:, None]  # [COLS, BLOCK_M]
    ones = tl.full([BLOCK_N, COLS], 1.0, DTYPE)

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    x_sum = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for i in tl.range(0, per_split, num_stages=STAGES):
        step = split * per_split + i  # past the end: clamped, and multiplied by x = 0
        pair = tl.minimum(step, steps - 1) * PAIRS
        for u in tl.static_range(STEP):
            unit = step * STEP + u
            packed = tl.load(w_ptrs + tl.minimum(unit, units - 1) * (16 * COLS))  # [BLOCK_N, COLS] int16
            partial = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for plane in tl.static_range(4):
                k = unit * UNIT + plane * COLS
                mask_x = (offs_m < M)[None, :] & (k + offs_c < K)[:, None]
                x = tl.load(x_ptrs + k, mask=mask_x, other=0.0)  # [COLS, BLOCK_M]
                partial = tl.dot(_unpack_plane(packed, plane, DTYPE, USE_ASM), x, partial)
                if HAS_ZEROS:
                    x_sum = tl.dot(ones, x, x_sum)
                if GROUP_SIZE != -1:
                    if (plane + 1) * COLS % GROUP_SIZE == 0:  # a group ends here
                        if (u * UNIT + plane * COLS) // GROUP_SIZE % 2 == 0:  # the first of a pair
                            s_offs = s_rows + (pair + (u * UNIT + plane * COLS) // GROUP_SIZE // 2) * 16  # [BLOCK_N]
                            scale, next_scale = _load_pair(s_ptr, s_offs)
                            if HAS_ZEROS:
                                zero, next_zero = _load_pair(z_ptr, s_offs)
                        else:
                            scale = next_scale
                            if HAS_ZEROS:
                                zero = next_zero
                        if HAS_ZEROS:
                            partial -= (zero - 8.0)[:, None] * x_sum
                            x_sum = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                        acc += scale[:, None] * partial
                        partial = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            if GROUP_SIZE == -1:
                acc += partial
    if GROUP_SIZE == -1:
        if HAS_ZEROS:
            acc -= (tl.load(z_ptr + s_rows).to(tl.float32) - 8.0)[:, None] * x_sum
        acc *= tl.load(s_ptr + s_rows).to(tl.float32)[:, None]

    if SPLITS == 1:
        store_tile(acc, bias_ptr, y_ptr, offs_n, offs_m, M, N)
    else:
        out_tile = block_m * tl.num_programs(1) + block_n
        partial_ptr += out_tile.to(tl.int64) * (SPLITS * BLOCK_N * BLOCK_M)
        offs = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        tl.store(partial_ptr + split * (BLOCK_N * BLOCK_M) + offs, acc)
        # All of the block's stores come before its arrival, which releases them; the last block's arrival acquires all
        # of them, and it reads past L1, which may hold lines from before.
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr + out_tile, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLITS - 1:
            total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for s in tl.static_range(SPLITS):  # in one order, whoever came last
                total += tl.load(partial_ptr + s * (BLOCK_N * BLOCK_M) + offs, cache_modifier=".cg")
            store_tile(total, bias_ptr, y_ptr, offs_n, offs_m, M, N)
            tl.store(counter_ptr + out_tile, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Configuration and launcher
# ---------------------------------------------------------------------------------------------------------------------

DECODE_ROWS = 16  # up to here a row's sums are added in one order, whatever the batch
SLICED_WEIGHTS = 6 * 2**20  # W of no more elements than this takes the slice kernel
MAX_BLOCKS = 65535  # along the second dimension of a grid
MAX_REGISTERS = 128  # a thread of the slice kernel: told nothing, ptxas aims lower and spills on sm_80


@dataclass(frozen=True)
class GemmConfig:
    """block_n rows of W and block_m rows of x a block; K split over `slices` warps of a block (0: not at all) and over
    `splits` blocks; `stages` tiles in flight."""

    block_n: int
    block_m: int
    slices: int
    splits: int
    num_warps: int
    stages: int


def units_per_step(unit: int, group_size: int) -> int:
    """Units that a kernel reads at a time: whole pairs of groups."""
    return 2 if group_size == unit else 1


def shared_memory_bytes(config, block_k: int, weight_bytes: float = 0.5) -> int:
    """What the software pipeline of a GemmConfig or FfnConfig keeps in flight: block_k columns a stage (and slice) of
    block_n weights of weight_bytes each, and of block_m 16-bit activations."""
    tile = config.block_n * weight_bytes + config.block_m * 2
    return int((config.stages - 1) * max(config.slices, 1) * block_k * tile)


def fit_shared_memory(config, block_k: int, facts: DeviceFacts, weight_bytes: float = 0.5):
    """The configuration with as many stages (2 at least) as one block may hold in shared memory."""
    while config.stages > 2 and shared_memory_bytes(config, block_k, weight_bytes) > facts.shared_memory_bytes - 8192:
        config = replace(config, stages=config.stages - 1)
    return config


def pick_config(m: int, n: int, k: int, group_size: int, symmetric: bool, facts: DeviceFacts) -> GemmConfig:
    """The configuration for x [m, k] and W [n, k]. Within the decode sizes slices and splits of K do not depend on m,
    so that a row's sums are added in one order whatever its batch."""
    # Swept on an H200, 2026-11-22, M = 1 to 16: see docs/notes/int4-gemm.md.
    unit = unit_k(k)
    step = unit * units_per_step(unit, group_size)
    steps = triton.cdiv(k, step)
    if m <= DECODE_ROWS:
        # NVIDIA's tensor cores take 8 columns at once, AMD's 16; a narrower tile of x still saves loads, unless it gets
        # too small for the pipeline.
        narrowest = 16 if not facts.is_nvidia else 8 if unit == 64 else 2
        block_m = max(narrowest, triton.next_power_of_2(m))
        stages = 4 if block_m == 16 else 3
        if n * k <= SLICED_WEIGHTS:
            slices = 8 if k > 4096 and facts.is_nvidia else 4  # AMD's shared memory holds no more
            return fit_shared_memory(GemmConfig(16, block_m, slices, 1, slices, stages), step, facts)
        splits = _splits(8 * facts.sm_count // triton.cdiv(n, 32), steps)
        block_n = 32 if block_m == 2 else 64
        return fit_shared_memory(GemmConfig(block_n, block_m, 0, splits, block_n // 32, stages), step, facts)
    # The products of 64 rows, two units and their sums of x overflow the registers, and on sm_100 the tensor memory.
    block_m = 32 if m <= 32 or (step > unit and not symmetric) else 64
    splits = _splits(2 * facts.sm_count // (triton.cdiv(n, 64) * triton.cdiv(m, block_m)), steps)
    return fit_shared_memory(GemmConfig(64, block_m, 0, splits, num_warps=4, stages=3), step, facts)


def _splits(wanted: int, steps: int) -> int:
    """The power of two below `wanted` that leaves each block two steps or more, and at most 8."""
    splits = 1
    while 2 * splits <= min(wanted, steps // 2, 8):
        splits *= 2
    return splits


def check_aligned(**tensors: Tensor | None) -> None:
    """ValueError unless the parts of a packed weight lie as the kernels load them, 16 bytes at a time."""
    for name, t in tensors.items():
        if t is not None and t.data_ptr() % 16:
            raise ValueError(f"{name} begins at address {t.data_ptr():#x}; it must be aligned to 16 bytes: clone() it")


def pdl_options(facts: DeviceFacts) -> dict:
    """Launch options of a kernel that calls wait_for_previous(PDL)."""
    return {"PDL": True, "launch_pdl": True} if facts.has_pdl else {"PDL": False}


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
    check_aligned(packed=packed, scales=scales, zeros=zeros)
    y = x.new_empty(m, n)
    if m == 0:
        return y
    facts = device_facts(x.device)
    config = config or pick_config(m, n, k, group_size, zeros is None, facts)
    blocks_m, blocks_n = triton.cdiv(m, config.block_m), triton.cdiv(n, config.block_n)
    if blocks_n > MAX_BLOCKS:
        raise ValueError(f"int4_gemm: N={n} must be at most {MAX_BLOCKS * config.block_n}: a launch has no more blocks")
    meta = {
        "BLOCK_N": config.block_n,
        "BLOCK_M": config.block_m,
        "UNIT": unit_k(k),
        "GROUP_SIZE": group_size,
        "STAGES": config.stages,
        "USE_ASM": facts.is_nvidia,
        "num_warps": config.num_warps,
        **pdl_options(facts),
    }
    args = x, packed, scales, zeros, bias, y
    with device_guard(x):
        if config.slices:
            grid = blocks_m, blocks_n
            if facts.is_nvidia:
                meta["maxnreg"] = MAX_REGISTERS
            _int4_gemm_slice_kernel[grid](*args, m, n, k, x.stride(0), SLICES=config.slices, **meta)
        else:
            grid = blocks_m * config.splits, blocks_n
            scratch = None, None
            if config.splits > 1:
                size = blocks_m * blocks_n * config.splits * config.block_n * config.block_m
                scratch = x.new_empty(size, dtype=torch.float32), counters(x.device, blocks_m * blocks_n, "int4_gemm")
            # Prefetching pays while the whole grid is resident at once.
            prefetch = facts.has_pdl and m <= DECODE_ROWS and packed.nbytes <= facts.sm_count * 80 * 1024
            _int4_gemm_kernel[grid](
                *args, *scratch, m, n, k, x.stride(0), SPLITS=config.splits, PREFETCH=prefetch, **meta
            )
    return y


assert TILE_N == 16, "the kernels are written for tiles of 16 rows"
