"""The feed-forward block in one launch, for decode.

    Y = act(X W1 + b1) W2 + b2, or gated Y = (act(X Wg) * (X W1 + b1)) W2 + b2

A persistent cooperative grid, one block an SM, in two phases:

    1. each block computes tiles of the hidden activation and writes them to a scratch that only this launch reads
       (at most 16 rows, so it stays in L2);
    2. after a grid barrier each block computes tiles of Y.

Both phases stream weights as the INT4 GEMM does: weights are the M operand, K is split over the warps of a block and
added in a fixed order. W1, W2 and Wg are 16 bit or packed INT4.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from tiny_gemm.device import INTERPRETED, DeviceFacts, counters, device_facts, tensor_bytes
from tiny_gemm.launcher import Launcher
from tiny_gemm.quantize_utils import TILE_N, unit_k
from tiny_gemm.triton_gemm import check_aligned, int4_tile, store_tile
from tiny_gemm.triton_parts import activate

FUSED_ROWS = 16  # more rows than this no longer fit the tile, and the general GEMMs are faster
MAX_REGISTERS = 255  # a thread: there is one block an SM; told nothing, ptxas aims at 128 and spills on sm_100

# ---------------------------------------------------------------------------------------------------------------------
# Helpers
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def grid_barrier(barrier_ptr, USE_ASM: tl.constexpr):
    """Waits until every program of a cooperative launch is here; what they stored before is visible after.

    barrier_ptr: int32 [2], arrivals (left at 0) and a generation that only counts up, so nothing is ever cleared. The
    last to arrive starts the next generation. On NVIDIA one thread a block waits with acquire loads; elsewhere, and in
    the interpreter, atomics that add 0 do.
    """
    n = tl.num_programs(0)
    tl.debug_barrier()
    if USE_ASM:
        tl.inline_asm_elementwise(
            """{
            .reg .pred p, q;
            .reg .u32 tid, generation, arrived, now;
            mov.u32 tid, %tid.x;
            setp.ne.u32 p, tid, 0;
            @p bra DONE_${:uid};
            ld.acquire.gpu.global.u32 generation, [$1 + 4];
            atom.acq_rel.gpu.global.add.u32 arrived, [$1], 1;
            add.u32 arrived, arrived, 1;
            setp.ne.u32 q, arrived, $2;
            @q bra WAIT_${:uid};
            st.relaxed.gpu.global.u32 [$1], 0;
            red.release.gpu.global.add.u32 [$1 + 4], 1;
            bra DONE_${:uid};
            WAIT_${:uid}:
            ld.acquire.gpu.global.u32 now, [$1 + 4];
            setp.eq.u32 q, now, generation;
            @q bra WAIT_${:uid};
            DONE_${:uid}:
            bar.sync 0;
            mov.u32 $0, 0;
            }""",
            "=r,l,r",
            [barrier_ptr, n],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        generation = tl.atomic_add(barrier_ptr + 1, 0, sem="acquire")
        arrived = tl.atomic_add(barrier_ptr, 1, sem="acq_rel")
        if arrived == n - 1:
            tl.atomic_xchg(barrier_ptr, 0, sem="relaxed")
            tl.atomic_add(barrier_ptr + 1, 1, sem="release")
        else:
            now = generation
            while now == generation:
                now = tl.atomic_add(barrier_ptr + 1, 0, sem="acquire")
        tl.debug_barrier()


@triton.jit
def _dense_tile(
    x_ptr,  # [M, K], rows stride_xm apart
    w_ptr,  # element (k, n) at k * stride_wk + n * stride_wn
    offs_n,  # [BLOCK_N] columns
    offs_m,  # [BLOCK_M] rows of x
    M,
    N,
    K,
    stride_xm,
    stride_wk,
    stride_wn,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """(x[offs_m] @ w[:, offs_n]).T -> fp32 [BLOCK_N, BLOCK_M], K split over SLICES as in int4_tile."""
    steps = tl.cdiv(K, SLICES * BLOCK_K)
    slices = tl.arange(0, SLICES)
    offs_k = tl.arange(0, BLOCK_K)
    w_ptrs = w_ptr + offs_n.to(tl.int64)[None, :, None] * stride_wn  # [1, BLOCK_N, 1]
    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, None, :] * stride_xm  # [1, 1, BLOCK_M]
    acc = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)
    for i in tl.range(0, steps, num_stages=STAGES):
        k = ((slices * steps + i) * BLOCK_K)[:, None] + offs_k[None, :]  # [SLICES, BLOCK_K]
        mask_w = (offs_n < N)[None, :, None] & (k < K)[:, None, :]
        w = tl.load(
            w_ptrs + k.to(tl.int64)[:, None, :] * stride_wk, mask=mask_w, other=0.0
        )  # [SLICES, BLOCK_N, BLOCK_K]
        mask_x = (offs_m < M)[None, None, :] & (k < K)[:, :, None]
        x = tl.load(x_ptrs + k[:, :, None], mask=mask_x, other=0.0)  # [SLICES, BLOCK_K, BLOCK_M]
        acc = tl.dot(w, x, acc)
    return tl.sum(acc, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------------------------------


def _ffn_cost(grid, kernel, args) -> dict:
    """Bytes and flops of one launch, for a launch hook; the hidden activation stays in L2 and is not counted."""
    scratch = ("hidden_ptr", "barrier_ptr")
    tensors = (t for name, t in args.items() if name.endswith("_ptr") and name not in scratch)
    products = args["N"] + args["D"] * (1 if args["wg_ptr"] is None else 2)
    return {"bytes": tensor_bytes(*tensors), "flops16": 2 * args["M"] * args["H"] * products}


@triton.jit(launch_metadata=_ffn_cost)
def _dense_ffn_kernel(
    x_ptr,  # [M, D]
    w1_ptr,  # [D, H]
    wg_ptr,  # [D, H] or None
    b1_ptr,  # [H] or None
    w2_ptr,  # [H, N]
    b2_ptr,  # [N] or None
    hidden_ptr,  # [M, H] scratch, contiguous
    y_ptr,  # [M, N] contiguous
    barrier_ptr,  # int32 [2]
    M,
    D,
    H,
    N,
    stride_xm,
    stride_w1k,
    stride_w1n,
    stride_wgk,
    stride_wgn,
    stride_w2k,
    stride_w2n,
    ACTIVATION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    USE_ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    offs_m = tl.arange(0, BLOCK_M)
    for tile in range(tl.program_id(0), tl.cdiv(H, BLOCK_N), tl.num_programs(0)):
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        up = _dense_tile(
            x_ptr, w1_ptr, offs_n, offs_m, M, H, D, stride_xm, stride_w1k, stride_w1n,
            BLOCK_N, BLOCK_M, SLICES, BLOCK_K, STAGES,
        )  # fmt: skip
        if b1_ptr is not None:
            up += tl.load(b1_ptr + offs_n, mask=offs_n < H, other=0.0).to(tl.float32)[:, None]
        if wg_ptr is not None:
            gate = _dense_tile(
                x_ptr, wg_ptr, offs_n, offs_m, M, H, D, stride_xm, stride_wgk, stride_wgn,
                BLOCK_N, BLOCK_M, SLICES, BLOCK_K, STAGES,
            )  # fmt: skip
            up *= activate(gate, ACTIVATION)
        else:
            up = activate(up, ACTIVATION)
        store_tile(up, None, hidden_ptr, offs_n, offs_m, M, H)
    grid_barrier(barrier_ptr, USE_ASM)
    if PDL:  # launched the ordinary way, as cooperative launches are; but the next kernel may start
        gdc_launch_dependents()
    for tile in range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = _dense_tile(
            hidden_ptr, w2_ptr, offs_n, offs_m, M, N, H, H, stride_w2k, stride_w2n,
            BLOCK_N, BLOCK_M, SLICES, BLOCK_K, STAGES,
        )  # fmt: skip
        store_tile(acc, b2_ptr, y_ptr, offs_n, offs_m, M, N)


@triton.jit(launch_metadata=_ffn_cost)
def _int4_ffn_kernel(
    x_ptr,  # [M, D]
    w1_ptr,  # [H / 16, UNITS, 16, UNIT1 / 4] int16, and its scales, zeros (or None), bias (or None)
    s1_ptr,
    z1_ptr,
    b1_ptr,
    wg_ptr,  # like w1, or None
    sg_ptr,
    zg_ptr,
    w2_ptr,  # [N / 16, UNITS, 16, UNIT2 / 4] int16, and so on
    s2_ptr,
    z2_ptr,
    b2_ptr,
    hidden_ptr,  # [M, H] scratch, contiguous
    y_ptr,  # [M, N] contiguous
    barrier_ptr,  # int32 [2]
    M,
    D,
    H,
    N,
    stride_xm,
    ACTIVATION: tl.constexpr,
    UNIT1: tl.constexpr,
    UNIT2: tl.constexpr,
    GROUP_SIZE1: tl.constexpr,
    GROUP_SIZE2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SLICES: tl.constexpr,
    STAGES: tl.constexpr,
    USE_ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    offs_m = tl.arange(0, BLOCK_M)
    for tile in range(tl.program_id(0), tl.cdiv(H, BLOCK_N), tl.num_programs(0)):
        offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        up = int4_tile(
            x_ptr, w1_ptr, s1_ptr, z1_ptr, tile, offs_m, M, H, D, stride_xm,
            BLOCK_N, BLOCK_M, SLICES, UNIT1, GROUP_SIZE1, z1_ptr is not None, STAGES, USE_ASM,
        )  # fmt: skip
        if b1_ptr is not None:
            up += tl.load(b1_ptr + offs_n, mask=offs_n < H, other=0.0).to(tl.float32)[:, None]
        if wg_ptr is not None:
            gate = int4_tile(
                x_ptr, wg_ptr, sg_ptr, zg_ptr, tile, offs_m, M, H, D, stride_xm,
                BLOCK_N, BLOCK_M, SLICES, UNIT1, GROUP_SIZE1, zg_ptr is not None, STAGES, USE_ASM,
            )  # fmt: skip
            up *= activate(gate, ACTIVATION)
        else:
            up = activate(up, ACTIVATION)
        store_tile(up, None, hidden_ptr, offs_n, offs_m, M, H)
    grid_barrier(barrier_ptr, USE_ASM)
    if PDL:  # launched the ordinary way, as cooperative launches are; but the next kernel may start
        gdc_launch_dependents()
    for tile in range(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.num_programs(0)):
        acc = int4_tile(
            hidden_ptr, w2_ptr, s2_ptr, z2_ptr, tile, offs_m, M, N, H, H,
            BLOCK_N, BLOCK_M, SLICES, UNIT2, GROUP_SIZE2, z2_ptr is not None, STAGES, USE_ASM,
        )  # fmt: skip
        store_tile(acc, b2_ptr, y_ptr, tile * BLOCK_N + tl.arange(0, BLOCK_N), offs_m, M, N)


# ---------------------------------------------------------------------------------------------------------------------
# Configuration and launchers
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FfnConfig:
    """block_n columns and block_m rows a tile; K split over `slices` warps, block_k at a time (INT4: at most);
    `stages` tiles in flight; `programs` blocks, which must all be resident at once."""

    block_n: int
    block_m: int
    block_k: int
    slices: int
    stages: int
    programs: int


def pick_config(m: int, d: int, h: int, n: int, weight_bytes: float, facts: DeviceFacts) -> FfnConfig:
    """The configuration for x [m, d], hidden size h, output n; the slices of K do not depend on m: see int4_gemm."""
    # Swept on an H200, 2026-11-22, INT4: h 1536 and 8192, M = 1 and 8: see docs/notes/int4-gemm.md.
    # INT4 with more than 8 rows runs out of registers with a larger tile or a third stage.
    block_n = 32 if m <= 8 and max(h, n) > 32 * facts.sm_count else 16
    stages = 2 if m > 8 and weight_bytes == 0.5 else 3
    block_m = 8 if m <= 8 and facts.is_nvidia else 16
    slices = (4 if facts.is_nvidia else 2) if weight_bytes == 0.5 else 8  # AMD's shared memory holds no more
    block_k = 64 if weight_bytes == 2 else 2 * max(unit_k(d), unit_k(h))
    programs = min(facts.sm_count, triton.cdiv(max(h, n), block_n))
    config = FfnConfig(block_n, block_m, block_k, slices, stages, programs)
    while config.stages > 2 and shared_memory_bytes(config, weight_bytes) > facts.shared_memory_bytes - 8192:
        config = replace(config, stages=config.stages - 1)
    return config


def shared_memory_bytes(config: FfnConfig, weight_bytes: float) -> int:
    """What the software pipeline keeps in flight: weights of weight_bytes each and 16-bit activations."""
    tile = config.block_n * weight_bytes + config.block_m * 2
    return int((config.stages - 1) * config.slices * config.block_k * tile)


@lru_cache(maxsize=1024)
def plan(
    m: int, d: int, h: int, n: int, activation: str, group_sizes: tuple[int, int] | None, facts: DeviceFacts
) -> tuple[Launcher, int]:
    """(launcher, programs) for x [m, d], hidden size h, output n; packed weights of these group sizes, or 16-bit."""
    config = pick_config(m, d, h, n, 2 if group_sizes is None else 0.5, facts)
    meta = {"BLOCK_N": config.block_n, "BLOCK_M": config.block_m, "SLICES": config.slices, "STAGES": config.stages}
    meta |= {"ACTIVATION": activation, "USE_ASM": facts.is_nvidia, "PDL": facts.has_pdl, "num_warps": config.slices}
    if facts is not INTERPRETED:
        meta["launch_cooperative_grid"] = True
    if facts.is_nvidia:
        meta["maxnreg"] = MAX_REGISTERS
    if group_sizes is None:
        return Launcher(_dense_ffn_kernel, BLOCK_K=config.block_k, **meta), config.programs
    units = {"UNIT1": unit_k(d), "UNIT2": unit_k(h), "GROUP_SIZE1": group_sizes[0], "GROUP_SIZE2": group_sizes[1]}
    return Launcher(_int4_ffn_kernel, **units, **meta), config.programs


def _launch(
    x: Tensor, h: int, n: int, activation: str, group_sizes: tuple | None, weights: tuple, strides: tuple = ()
) -> Tensor:
    """Allocates hidden and y, launches kernel(x, *weights, hidden, y, barrier, m, d, h, n, stride, *strides) -> y."""
    m, d = x.shape
    y = x.new_empty(m, n)
    if m == 0:
        return y
    launcher, programs = plan(m, d, h, n, activation, group_sizes, device_facts(x.device))
    tensors = x, *weights, x.new_empty(m, h), y, counters(x.device, 2, "barrier")
    launcher((programs, 1, 1), tensors, (m, d, h, n, x.stride(0), *strides))
    return y


def _check(x: Tensor, b1: Tensor | None, b2: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x, b1 and b2 as the kernels read them: rows and biases without gaps."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"the fused FFN kernel takes bfloat16 or float16, got {x.dtype}")
    assert x.shape[0] <= FUSED_ROWS
    b1, b2 = (None if b is None else b.contiguous() for b in (b1, b2))
    return x if x.stride(1) == 1 else x.contiguous(), b1, b2


def fused_ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w_gate: Tensor | None,
    activation: str,
) -> Tensor:
    """x [M <= 16, d], w1 and w_gate [d, h], w2 [h, n], any strides -> [M, n]; see ops.fused_ffn."""
    x, b1, b2 = _check(x, b1, b2)
    h, n = w2.shape
    strides = *w1.stride(), *((0, 0) if w_gate is None else w_gate.stride()), *w2.stride()
    return _launch(x, h, n, activation, None, (w1, w_gate, b1, w2, b2), strides)


def int4_ffn(
    x: Tensor,
    w1_packed: Tensor,
    w1_scales: Tensor,
    w1_zeros: Tensor | None,
    b1: Tensor | None,
    w2_packed: Tensor,
    w2_scales: Tensor,
    w2_zeros: Tensor | None,
    b2: Tensor | None,
    wg_packed: Tensor | None,
    wg_scales: Tensor | None,
    wg_zeros: Tensor | None,
    group_size1: int,
    group_size2: int,
    hidden: int,
    out_features: int,
    activation: str,
) -> Tensor:
    """x [M <= 16, d] through Int4Weights given by their parts -> [M, out_features]; see ops.int4_ffn."""
    x, b1, b2 = _check(x, b1, b2)
    check_aligned(w1_packed, w1_scales, w1_zeros, "w1_")
    check_aligned(w2_packed, w2_scales, w2_zeros, "w2_")
    if wg_packed is not None:
        check_aligned(wg_packed, wg_scales, wg_zeros, "wg_")
    weights = (
        w1_packed, w1_scales, w1_zeros, b1, wg_packed, wg_scales, wg_zeros, w2_packed, w2_scales, w2_zeros, b2
    )  # fmt: skip
    return _launch(x, hidden, out_features, activation, (group_size1, group_size2), weights)


assert TILE_N == 16, "tiles of BLOCK_N rows are whole tiles of the packed format"
