"""The INT4 product of many rows of x on Hopper, in Gluon, Triton's language of layouts and barriers.

What Triton makes of such a kernel waits: in each step for the tensor core, before weights are unpacked into registers
that `wgmma` may still read, and for all warps, before a stage of shared memory is filled again. Here the warps of a
block have parts to play:

- four fetch x and packed weights into a ring of stages in shared memory (`_fetch`), the first weights before the wait
  for the kernel ahead;
- twice four multiply (`_multiply`), each four rows of W of their own: they unpack and scale weights in registers, which
  are the first operand of `wgmma`, while their last product and those of the other four go on.

They meet in barriers in shared memory: a stage is full, a stage is empty. Which sums are added in which order is as in
`_int4_prefill_kernel` of triton_gemm.py, and so are the bits. The interpreter knows no Gluon; what it runs is that
kernel, and tests on a GPU compare the two.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tiny_gemm.int4_unpack import UNPACKED, are_integers, scaled_plane
from tiny_gemm.triton_parts import arrive, int4_gemm_cost, wait_for_previous

UNIT = gl.constexpr(128)  # columns of a packed unit: 128 divides K
COLS = gl.constexpr(UNIT.value // 4)  # int16 of a row of a unit
ROWS = gl.constexpr(64)  # of W, in one wgmma of four warps
WARPS = gl.constexpr(4)  # of each part
MULTIPLIERS = gl.constexpr(2)
FETCHERS = gl.constexpr(32 * WARPS.value)  # threads, each of which says that its part of a stage is there
REGISTERS = 168  # a thread, when a block of 12 warps begins
MULTIPLIERS_REGISTERS, FETCHERS_REGISTERS = gl.constexpr(232), gl.constexpr(40)  # and then


@gluon.jit(launch_metadata=int4_gemm_cost, do_not_specialize=["M"])
def int4_hopper_kernel(
    x_ptr,  # [M, K]
    w_ptr,  # [N / 16, UNITS, 16, UNIT / 4] int16
    s_ptr,  # [N / 16, PAIRS, 16, 2], fewer than 2**31; per channel [N / 16, 1, 16, 1]
    z_ptr,  # like s_ptr, or None
    bias_ptr,  # [N] or None
    y_ptr,  # [M, N], contiguous
    partial_ptr,  # fp32 [output tiles, MULTIPLIERS, SPLITS, BLOCK_N / MULTIPLIERS * BLOCK_M]; None with one split
    counter_ptr,  # int32 [output tiles, MULTIPLIERS], zero before and after; None with one split
    M,
    N,
    K,  # a multiple of UNIT
    stride_xm,  # a multiple of 16, at most 2**24
    BLOCK_N: gl.constexpr,  # 128 or 256
    BLOCK_M: gl.constexpr,
    SPLITS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
):
    """Blocks that share rows of W are neighbours: in prefill W comes from L2."""
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    TILES: gl.constexpr = BLOCK_N // (MULTIPLIERS * ROWS)
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    units = K // UNIT
    per_split = (units + SPLITS - 1) // SPLITS
    split = gl.program_id(0) % SPLITS
    first = split * per_split
    count = gl.minimum(per_split, units - first)  # 0 or less: nothing for this split to multiply
    block_m = gl.program_id(0) // SPLITS
    block_n = gl.program_id(1)
    out_tile = block_m * gl.num_programs(1) + block_n

    x_shared = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, UNIT], SWIZZLED)
    # Of 64 bytes a row; 8 rows of 16 bytes, which one instruction reads, are on different banks.
    w_shared = gl.allocate_shared_memory(gl.int16, [STAGES, BLOCK_N, COLS], gl.SwizzledSharedLayout(8, 2, 4, [1, 0]))
    y_shared = gl.allocate_shared_memory(DTYPE, [MULTIPLIERS, BLOCK_M, ROWS], SWIZZLED)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=FETCHERS)
        mbarrier.init(empty.index(stage), count=MULTIPLIERS)

    place = (first, count, units, split, block_n * BLOCK_N, block_m * BLOCK_M, out_tile)
    ring = (x_shared, w_shared, full, empty)
    weight = (s_ptr, z_ptr)
    out = (bias_ptr, y_ptr, partial_ptr, counter_ptr)
    gl.warp_specialize(
        [
            (_multiply, (ring, weight, out, y_shared.index(0), place, M, N, 0, TILES, SPLITS, GROUP_SIZE, PDL)),
            (_multiply, (ring, weight, out, y_shared.index(1), place, M, N, 1, TILES, SPLITS, GROUP_SIZE, PDL)),
            (_fetch, (ring, x_ptr, w_ptr, place, M, N, stride_xm, PDL)),
        ],
        [WARPS, WARPS],
        [MULTIPLIERS_REGISTERS, FETCHERS_REGISTERS],
    )


@gluon.jit
def _fetch(ring, x_ptr, w_ptr, place, M, N, stride_xm, PDL: gl.constexpr):
    """Fills the ring, a unit of K a stage."""
    x_shared, w_shared, full, empty = ring
    first, count, units, split, first_n, first_m, out_tile = place
    STAGES: gl.constexpr = x_shared.shape[0]
    BLOCK_M: gl.constexpr = x_shared.shape[1]
    BLOCK_N: gl.constexpr = w_shared.shape[1]
    X_COPY: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    W_COPY: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [WARPS, 1], [1, 0])

    # Offsets of 32 bits: addresses would take twice the registers. Rows of W past N repeat the last tile.
    n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, W_COPY))
    tile = gl.minimum(n // 16, (N + 15) // 16 - 1 - first_n // 16)
    w_offs = (tile * units * (16 * COLS) + n % 16 * COLS)[:, None]
    w_offs += gl.arange(0, COLS, gl.SliceLayout(0, W_COPY))[None, :]
    w_ptr += ((first_n // 16).to(gl.int64) * units + first) * (16 * COLS)
    for ahead in gl.static_range(STAGES):
        if ahead < count:
            async_copy.async_copy_global_to_shared(w_shared.index(ahead), w_ptr + ahead * (16 * COLS) + w_offs)
    wait_for_previous(PDL)

    CHUNK: gl.constexpr = 32  # rows
    m = gl.arange(0, CHUNK, gl.SliceLayout(1, X_COPY))
    k = gl.arange(0, UNIT, gl.SliceLayout(0, X_COPY))
    x_ptr += first_m.to(gl.int64) * stride_xm + first * UNIT
    for i in range(count):
        stage = i % STAGES
        if i >= STAGES:
            mbarrier.wait(empty.index(stage), (i // STAGES + 1) & 1)
            async_copy.async_copy_global_to_shared(w_shared.index(stage), w_ptr + i * (16 * COLS) + w_offs)
        # In place of rows past M the first ones (one row many times takes half as long again). The offsets are made
        # anew for each unit, as there are no registers to keep them.
        there = _opaque(M - first_m)
        for chunk in gl.static_range(BLOCK_M // CHUNK):
            row = m + chunk * CHUNK
            row = gl.where(row < there, row, gl.minimum(row - there, there - 1))
            x_part = x_shared.index(stage).slice(chunk * CHUNK, CHUNK, 0)
            async_copy.async_copy_global_to_shared(x_part, x_ptr + i * UNIT + (row[:, None] * stride_xm + k[None, :]))
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)


@gluon.jit
def _opaque(x):
    """x, of which the compiler does not know that it is the same in each step of a loop."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _multiply(
    ring,
    weight,
    out,
    y_shared,
    place,
    M,
    N,
    WHO: gl.constexpr,  # of the MULTIPLIERS
    TILES: gl.constexpr,  # of ROWS rows of W
    SPLITS: gl.constexpr,
    GROUP_SIZE: gl.constexpr,
    PDL: gl.constexpr,
):
    """Multiplies what comes by the ring, and stores it."""
    x_shared, w_shared, full, empty = ring
    s_ptr, z_ptr = weight
    bias_ptr, y_ptr, partial_ptr, counter_ptr = out
    first, count, units, split, first_n, first_m, out_tile = place
    STAGES: gl.constexpr = x_shared.shape[0]
    BLOCK_M: gl.constexpr = x_shared.shape[1]
    DTYPE: gl.constexpr = x_shared.dtype
    FIRST: gl.constexpr = WHO * TILES * ROWS
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
    W: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    first_n += FIRST

    nothing = gl.zeros([ROWS, BLOCK_M], gl.float32, ACC)
    accs = (nothing,) if TILES == 1 else (nothing, nothing)
    scales, zeros = _groups_of_unit(weight, first_n, gl.minimum(first, units - 1), units, N, TILES, GROUP_SIZE, W)
    for i in range(count):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), i // STAGES & 1)
        fence_async_shared()  # x came by cp.async, and wgmma is another proxy
        unit = first + gl.minimum(i + 1, count - 1)
        next_scales, next_zeros = _groups_of_unit(weight, first_n, unit, units, N, TILES, GROUP_SIZE, W)
        products, operands = (), ()
        for half in gl.static_range(2):
            x = x_shared.index(stage).slice(half * 2 * COLS, 2 * COLS, 1).permute((1, 0))
            for t in gl.static_range(TILES):
                packed = w_shared.index(stage).slice(FIRST + t * ROWS, ROWS, 0).load(W)
                w = _half_unit(packed, scales[t], zeros[t], z_ptr, half, GROUP_SIZE, DTYPE, W)
                acc = accs[t] if half == 0 else products[t]
                products = products + (warpgroup_mma(w, x, acc, is_async=True),)
                operands = operands + (w,)  # which must not change before the wait
        if TILES == 1:
            done = warpgroup_mma_wait(0, [products[1], operands[0], operands[1]])
            accs = (done[0],)
        else:
            done = warpgroup_mma_wait(0, [products[2], products[3], operands[0], operands[1], operands[2], operands[3]])
            accs = (done[0], done[1])
        scales, zeros = next_scales, next_zeros
        mbarrier.arrive(empty.index(stage), count=1)

    if GROUP_SIZE == -1 and z_ptr is None:
        unscaled, accs = accs, ()
        for t in gl.static_range(TILES):
            rows = gl.minimum(first_n + t * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, ACC)), N - 1)
            accs = accs + (unscaled[t] * (gl.load(s_ptr + rows).to(gl.float32)[:, None] * UNPACKED),)
    if SPLITS == 1:
        for t in gl.static_range(TILES):
            _store(accs[t], y_shared, bias_ptr, y_ptr, first_n + t * ROWS, first_m, M, N)
    else:
        wait_for_previous(PDL)  # a split without work, which has waited for no x, must not write early
        out_part = out_tile * MULTIPLIERS + WHO
        partial_ptr += out_part.to(gl.int64) * (SPLITS * TILES * ROWS * BLOCK_M)
        for t in gl.static_range(TILES):
            part = _by_thread(accs[t])
            gl.store(partial_ptr + (split * TILES + t) * (ROWS * BLOCK_M) + _offsets_by_thread(part), part)
        if arrive(counter_ptr + out_part) == SPLITS - 1:
            for t in gl.static_range(TILES):
                total = gl.zeros_like(_by_thread(accs[t]))
                offs = _offsets_by_thread(total)
                for s in gl.static_range(SPLITS):  # in one order, whoever came last
                    part_ptr = partial_ptr + (s * TILES + t) * (ROWS * BLOCK_M)
                    total += gl.load(part_ptr + offs, cache_modifier=".cg")
                acc = _from_thread(total, ACC, BLOCK_M)
                _store(acc, y_shared, bias_ptr, y_ptr, first_n + t * ROWS, first_m, M, N)
            gl.store(counter_ptr + out_part, 0)


@gluon.jit
def _groups_of_unit(weight, first_n, unit, units, N, TILES: gl.constexpr, GROUP_SIZE: gl.constexpr, W: gl.constexpr):
    """(scales, zeros) of a unit: for each tile of rows a tuple of [ROWS], one for each group; empty if not needed."""
    s_ptr, z_ptr = weight
    GROUPS: gl.constexpr = 1 if GROUP_SIZE == -1 else UNIT // GROUP_SIZE
    pairs = (units * GROUPS + 1) // 2
    scales, zeros = (), ()
    for t in gl.static_range(TILES):
        rows = first_n + t * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, W))
        rows = gl.minimum(rows, (N + 15) // 16 * 16 - 1)
        offsets = ()
        if GROUP_SIZE == -1:
            offsets = (rows,)
        else:
            for g in gl.static_range(GROUPS):
                group = unit * GROUPS + g
                offsets = offsets + (((rows // 16 * pairs + group // 2) * 16 + rows % 16) * 2 + group % 2,)
        # per channel without zeros they are scaled once, at the end
        scales = scales + (_load_each(s_ptr if GROUP_SIZE != -1 or z_ptr is not None else None, offsets),)
        zeros = zeros + (_load_each(z_ptr, offsets),)
    return scales, zeros


@gluon.jit
def _load_each(ptr, offsets):
    found = ()
    if ptr is not None:
        for i in gl.static_range(len(offsets)):
            found = found + (gl.load(ptr + offsets[i]),)
    return found


@gluon.jit
def _half_unit(
    packed, scales, zeros, z_ptr, HALF: gl.constexpr, GROUP_SIZE: gl.constexpr, DTYPE: gl.constexpr, W: gl.constexpr
):
    """Half a unit of weights, [ROWS, UNIT / 2], ready for wgmma."""
    even = _plane_of_unit(packed, scales, zeros, z_ptr, 2 * HALF, GROUP_SIZE, DTYPE)
    odd = _plane_of_unit(packed, scales, zeros, z_ptr, 2 * HALF + 1, GROUP_SIZE, DTYPE)
    joined = gl.join(even, odd).permute(0, 2, 1).reshape(ROWS, 2 * COLS)
    return gl.convert_layout(joined, W, assert_trivial=True)  # within a thread's registers


@gluon.jit
def _plane_of_unit(packed, scales, zeros, z_ptr, PLANE: gl.constexpr, GROUP_SIZE: gl.constexpr, DTYPE: gl.constexpr):
    GROUP: gl.constexpr = 0 if GROUP_SIZE == -1 else PLANE * COLS // GROUP_SIZE
    scale = scales[GROUP] if len(scales) > 0 else None
    zero = zeros[GROUP] if len(zeros) > 0 else None
    return scaled_plane(packed, scale, zero, PLANE, are_integers(z_ptr, GROUP_SIZE), DTYPE, True)


@gluon.jit
def _store(acc, y_shared, bias_ptr, y_ptr, first_n, first_m, M, N):
    """y[first_m:, first_n:] = acc.T + bias, for acc fp32 [ROWS, BLOCK_M], by way of y_shared [BLOCK_M, ROWS]."""
    BLOCK_M: gl.constexpr = y_shared.shape[0]
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    if bias_ptr is not None:
        rows = first_n + gl.arange(0, ROWS, gl.SliceLayout(1, acc.type.layout))
        acc += gl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(gl.float32)[:, None]
    gl.thread_barrier()  # all have read the tile before
    y_shared.store(acc.to(y_shared.dtype).permute(1, 0))
    gl.thread_barrier()
    n = first_n + gl.arange(0, ROWS, gl.SliceLayout(0, OUT))
    m = first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, OUT))
    ptrs = y_ptr + m.to(gl.int64)[:, None] * N + n[None, :]
    gl.store(ptrs, y_shared.load(OUT), mask=(n < N)[None, :] & (m < M)[:, None])


@gluon.jit
def _by_thread(acc):
    """acc [ROWS, BLOCK_M], of the layout of wgmma, as [BLOCK_M / 8, threads, 4]: each thread's own, four at a time."""
    BLOCK_M: gl.constexpr = acc.shape[1]
    parts = acc.reshape(WARPS, 2, 8, BLOCK_M // 8, 4, 2)  # warp, half, lane / 4; columns, lane % 4, pair
    return parts.permute(3, 0, 2, 4, 1, 5).reshape(BLOCK_M // 8, 32 * WARPS, 4)


@gluon.jit
def _from_thread(parts, ACC: gl.constexpr, BLOCK_M: gl.constexpr):
    """_by_thread, undone."""
    parts = parts.reshape(BLOCK_M // 8, WARPS, 8, 4, 2, 2).permute(1, 4, 2, 0, 3, 5)
    return gl.convert_layout(parts.reshape(ROWS, BLOCK_M), ACC, assert_trivial=True)


@gluon.jit
def _offsets_by_thread(parts):
    """Offsets of parts, of _by_thread, in memory."""
    L: gl.constexpr = parts.type.layout
    column = gl.arange(0, parts.shape[0], gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None, None]
    thread = gl.arange(0, parts.shape[1], gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :, None]
    value = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    return (column * parts.shape[1] + thread) * 4 + value
