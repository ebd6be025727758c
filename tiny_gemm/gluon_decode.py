"""The INT4 product of few rows of x with a weight of many rows on Hopper, in Gluon and PTX.

One block an SM, of 16 warps, takes one tile of rows of W after the other. A warp owns two units of K for good: what of
x meets them stays in its registers, as operands of `mma.sync`, so that x is read once by each SM and not by each tile.
Of each tile a warp asks for its part of the weights, which is one piece of memory, by a bulk copy into shared memory,
waits for it by itself, multiplies, and leaves its sums. Teams of warps take turns to add up what all have left, a tile
later, when it is there. No warp waits for another otherwise.

Where K is more than a block can own, the blocks of a cluster share it. A block sends its sums of a tile, by `st.async`,
to the one that the tile falls to, which adds up those of all and stores them, while the next tiles are under way.

It adds up the same numbers in the same order as `_int4_decode_kernel` of triton_gemm.py does with as many splits of K,
each of one step of as many warps, of two units each, and so has the same bits. The interpreter knows no Gluon; what it
runs is that kernel, and tests on a GPU compare the two.

All tensors below have one number for each thread, unless said otherwise: what is written for a tensor is what a thread
does. Shared memory is addressed by number, since Gluon's own copies and loads come with barriers of the whole block.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from tiny_gemm.int4_unpack import UNPACKED, are_integers, unpack_words
from tiny_gemm.triton_cluster import join_cluster, send
from tiny_gemm.triton_parts import activate, int4_gemm_cost, wait_for_previous

UNIT = gl.constexpr(128)  # columns of a packed unit; 256 divides K
WARPS = gl.constexpr(16)
THREADS = gl.constexpr(32 * WARPS.value)
THREAD = gl.constexpr(gl.BlockedLayout([1], [32], [WARPS.value], [0]))  # a number for each
REGISTERS = 65536 // THREADS.value
PIECE = gl.constexpr(2 * UNIT.value * 16 // 2)  # bytes of weights of a warp in a tile: two units of 16 rows
STAGES = gl.constexpr(2)  # steps whose weights are in shared memory or on their way there
COLUMN = gl.constexpr(64)  # bytes of a column of a tile's sums, of 16 rows
MOST_SLOTS = gl.constexpr(10)  # the most that step_slots says
BARRIERS = gl.constexpr(8 * (MOST_SLOTS.value + 4 + WARPS.value * STAGES.value + 2))  # bytes; a multiple of 128

# ---------------------------------------------------------------------------------------------------------------------
# Shared memory: barriers (one for each slot of sums; of sums that are sent, 4 at most; one for each warp and stage),
# the ring, the sums, those that are sent. Sizes in bytes.
# ---------------------------------------------------------------------------------------------------------------------


@triton.constexpr_function
def group_bytes(group_size: int, ptr) -> int:
    """Bytes of scales, or of zeros, of a warp in a tile."""
    return 0 if ptr is None else 2 * UNIT.value // group_size * 16 * ptr.dtype.element_ty.primitive_bitwidth // 8


@triton.constexpr_function
def stage_bytes(group_size: int, s_ptr, z_ptr, gate_s_ptr, gate_z_ptr) -> int:
    """Bytes of a warp's part of a tile, of either weight."""
    one, other = ((s_ptr, z_ptr), (gate_s_ptr, gate_z_ptr))
    return PIECE.value + max(sum(group_bytes(group_size, ptr) for ptr in weight) for weight in (one, other))


@triton.constexpr_function
def step_numbers(k_warps: int, x_tiles: int) -> int:
    """How many numbers the sums of a step are, and threads to add up what warps have of them."""
    return WARPS.value // k_warps * 128 * x_tiles


@triton.constexpr_function
def step_slots(k_warps: int, x_tiles: int, weights: int) -> int:
    """Steps whose sums have room: see _add_up."""
    return (THREADS.value // step_numbers(k_warps, x_tiles) - 1) * weights + 4


@triton.constexpr_function
def sent_slots(cluster: int, weights: int) -> int:
    """Own steps of a block whose sums have room: see _slot."""
    return 2 if 2 * cluster >= 6 + (cluster - 1) * weights else 4


@triton.constexpr_function
def x_sums_bytes(group_size: int, x_tiles: int, *zeros) -> int:
    """Of two columns of a warp's x, for its sums over groups, which real zeros are multiplied by."""
    has_real_zeros = any(z is not None and not are_integers(z, group_size) for z in zeros)
    return 2 * UNIT.value // group_size * x_tiles * 8 if has_real_zeros else 0


@triton.constexpr_function
def sent_bytes(k_warps: int, x_tiles: int, cluster: int, weights: int) -> int:
    """What a block is sent, in all slots."""
    return 0 if cluster == 1 else sent_slots(cluster, weights) * cluster * 4 * step_numbers(k_warps, x_tiles)


@triton.constexpr_function
def shared_bytes(stage: int, k_warps: int, x_tiles: int, x_sums: int, cluster: int, weights: int) -> int:
    """All of it, with a last barrier that nobody waits for."""
    sums = step_slots(k_warps, x_tiles, weights) * WARPS.value * 8 * x_tiles * COLUMN.value
    sums += sent_bytes(k_warps, x_tiles, cluster, weights)
    return BARRIERS.value + WARPS.value * (STAGES.value * stage + 4 * x_sums) + sums + 8


# ---------------------------------------------------------------------------------------------------------------------
# PTX
# ---------------------------------------------------------------------------------------------------------------------


@triton.constexpr_function
def _begin_asm(slots: int, sent: int, cluster: int) -> str:
    """Makes the barriers, and says to the blocks of a cluster that they are there."""
    inits = [f"@first mbarrier.init.shared::cta.b64 [$1 + {8 * i}], {WARPS.value};" for i in range(slots)]
    inits += [f"@leads mbarrier.init.shared::cta.b64 [$2 + {8 * WARPS.value * i}], 1;" for i in range(STAGES.value)]
    says = ""
    if cluster > 1:
        inits += [f"@first mbarrier.init.shared::cta.b64 [$1 + {8 * (MOST_SLOTS.value + i)}], 1;" for i in range(sent)]
        says = f"""
        mov.u32 size, %cluster_nctarank;
        setp.ne.u32 alone, size, {cluster};
        @alone trap;
        @first fence.mbarrier_init.release.cluster;
        barrier.cluster.arrive.relaxed.aligned;"""
    return f"""{{
        .reg .pred first, leads, alone;
        .reg .u32 size;
        setp.eq.u32 first, $3, 0;
        setp.eq.u32 leads, $4, 0;
        {" ".join(inits)}
        fence.proxy.async.shared::cta;{says}
        mov.u32 $0, 0;
        }}"""


@triton.constexpr_function
def _clear_asm(stage: int) -> str:
    """Where $2 is zero, zeros in place of a warp's scales and zeros, in each of its stages; $1 is 16 bytes on for each
    lane, $3."""
    size = stage - PIECE.value
    stores = ""
    for at in range(0, size, 512):
        stores += f"setp.lt.and.u32 clears, $3, {min(size - at, 512) // 16}, rests;\n"
        for i in range(STAGES.value):
            stores += f"@clears st.shared.v4.b32 [$1 + {i * stage + PIECE.value + at}], {{zero, zero, zero, zero}};\n"
    return f"""{{
        .reg .pred rests, clears;
        .reg .b32 zero;
        mov.b32 zero, 0;
        setp.eq.u32 rests, $2, 0;
        {stores}
        mov.u32 $0, 0;
        }}"""


@triton.constexpr_function
def _fetch_asm(sizes: tuple[int, ...]) -> str:
    """Copies of so many bytes, from $5, $6, ... one behind the other to $2. $3 times a size are twice the bytes from
    there to a warp's own. Where $4 is zero the barrier is only told that nothing comes."""
    copy = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
    copies, to = "", 0
    for i, size in enumerate(sizes):
        copies += (
            f"mad.wide.u32 from, $3, {size // 2}, ${5 + i}; add.u32 to, $2, {to}; {copy} [to], [from], {size}, [$1];\n"
        )
        to += size
    return f"""{{
        .reg .pred follows, rests;
        .reg .u32 to, lane;
        .reg .b64 from, state;
        mov.u32 lane, %laneid;
        setp.ne.u32 follows, lane, 0;
        setp.eq.u32 rests, $4, 0;
        bar.warp.sync 0xffffffff;
        @follows bra done;
        @rests mbarrier.arrive.shared::cta.b64 state, [$1];
        @rests bra done;
        mbarrier.arrive.expect_tx.shared::cta.b64 state, [$1], {to};
        {copies}
        done: mov.u32 $0, 0;
        }}"""


_WAIT = gl.constexpr("""{
    .reg .pred done;
    wait: mbarrier.try_wait.parity.shared::cta.b64 done, [$1], $2;
    @!done bra wait;
    mov.u32 $0, 0;
    }""")
_ARRIVE = gl.constexpr("""{
    .reg .pred leads;
    .reg .b64 state;
    setp.eq.u32 leads, $2, 0;
    bar.warp.sync 0xffffffff;
    @leads mbarrier.arrive.shared::cta.b64 state, [$1];
    mov.u32 $0, 0;
    }""")
_LOAD_X = gl.constexpr("""{
    .reg .pred there;
    setp.ne.u32 there, $5, 0;
    mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0;
    @there ld.global.v4.b32 {$0, $1, $2, $3}, [$4];
    }""")
_PRODUCT_BF16, _PRODUCT_FP16 = (
    gl.constexpr(
        f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    for dtype in ("bf16", "f16")
)


@triton.constexpr_function
def _load_asm(offset: int, bits: int) -> str:
    return {
        16: f"{{ .reg .b16 h; ld.shared.b16 h, [$1 + {offset}]; cvt.u32.u16 $0, h; }}",
        32: f"ld.shared.b32 $0, [$1 + {offset}];",
        64: f"ld.shared.v2.b32 {{$0, $1}}, [$2 + {offset}];",
        128: f"ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$4 + {offset}];",
    }[bits]


@triton.constexpr_function
def _permute_asm(order: int) -> str:
    return f"prmt.b32 $0, $1, $1, {order};"


@triton.constexpr_function
def _put_asm(offset: int) -> str:
    """Sums of rows r and r + 8 and of two columns, whose second is two places on: see _place_of_sum."""
    first, second = offset, offset + 2 * COLUMN.value
    stores = [f"[$1 + {first}], $3", f"[$1 + {second}], $4", f"[$2 + {first}], $5", f"[$2 + {second}], $6"]
    return " ".join(f"st.shared.f32 {store};" for store in stores) + " mov.u32 $0, 0;"


@triton.constexpr_function
def _expect_asm(numbers: int, cluster: int) -> str:
    """Tells barrier $1 how much will have come, by a team's first thread, where block $2 is its own."""
    return f"""{{
        .reg .pred expects;
        .reg .u32 thread, rank;
        .reg .b64 state;
        mov.u32 thread, %tid.x;
        and.b32 thread, thread, {numbers - 1};
        mov.u32 rank, %cluster_ctarank;
        setp.eq.u32 expects, thread, 0;
        setp.eq.and.u32 expects, rank, $2, expects;
        @expects mbarrier.arrive.expect_tx.shared::cta.b64 state, [$1], {4 * cluster * numbers};
        mov.u32 $0, 0;
        }}"""


@triton.constexpr_function
def _team_asm(numbers: int) -> str:
    return f"mov.u32 $0, %tid.x; shr.u32 $0, $0, {numbers.bit_length() - 1};"


@triton.constexpr_function
def _put_pair_asm(offset: int) -> str:
    return f"st.shared.v2.f32 [$1 + {offset}], {{$2, $3}}; mov.u32 $0, 0;"


@gluon.jit
def _wait(barrier, parity):
    """Until a barrier's phase of this parity is over."""
    gl.inline_asm_elementwise(_WAIT, "=r,r,r", [barrier, parity], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _load_four(at, OFFSET: gl.constexpr):
    return gl.inline_asm_elementwise(
        _load_asm(OFFSET, 128),
        "=r,=r,=r,=r,r",
        [at],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _load_pair(at, OFFSET: gl.constexpr):
    """Two fp32."""
    return gl.inline_asm_elementwise(
        _load_asm(OFFSET, 64), "=f,=f,r", [at], dtype=(gl.float32, gl.float32), is_pure=False, pack=1
    )


@gluon.jit
def _product(w, x0, x1, sums, DTYPE: gl.constexpr):
    """sums + w @ x: 16 rows, 8 columns, 16 of K."""
    return gl.inline_asm_elementwise(
        _PRODUCT_BF16 if DTYPE == gl.bfloat16 else _PRODUCT_FP16,
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [w[0], w[1], w[2], w[3], x0, x1, sums[0], sums[1], sums[2], sums[3]],
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32),
        is_pure=True,
        pack=1,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The kernel
# ---------------------------------------------------------------------------------------------------------------------


@gluon.jit(launch_metadata=int4_gemm_cost, do_not_specialize=["M"])
def int4_stream_kernel(
    x_ptr,  # [M, K], rows at multiples of 16 bytes
    w_ptr,  # [N / 16, UNITS, 16, UNIT / 4] int16, fewer than 2**31
    s_ptr,  # [N / 16, PAIRS, 16, 2]
    z_ptr,  # like s_ptr, or None
    gate_ptr,  # a second weight in the same form, or None: y = act(x @ gate.T) * (x @ W.T)
    gate_s_ptr,
    gate_z_ptr,
    bias_ptr,  # [N] or None; not with a gate
    y_ptr,  # [M, N], contiguous
    M,
    N,
    K,  # a multiple of 2 * UNIT, at most 2 * UNIT * K_WARPS * CLUSTER
    stride_xm,
    K_WARPS: gl.constexpr,  # share what a block has of K: 16, or 8 where two times 8 take a tile each
    CLUSTER: gl.constexpr,  # blocks that share K; the grid is a multiple of it
    X_TILES: gl.constexpr,  # of 8 rows of x
    GROUP_SIZE: gl.constexpr,
    ACTIVATION: gl.constexpr,  # of the gate
    PDL: gl.constexpr,
):
    """Cluster c takes row tiles c, c + the number of clusters, and so on; of each the gate's first. Such a tile, of one
    weight, is a step."""
    gl.static_assert(K_WARPS == 8 or K_WARPS == 16)
    WEIGHTS: gl.constexpr = 1 if gate_ptr is None else 2
    gl.static_assert(STAGES % WEIGHTS == 0)
    TILES: gl.constexpr = WARPS // K_WARPS  # at once
    STAGE: gl.constexpr = stage_bytes(GROUP_SIZE, s_ptr, z_ptr, gate_s_ptr, gate_z_ptr)
    X_SUMS: gl.constexpr = x_sums_bytes(GROUP_SIZE, X_TILES, z_ptr, gate_z_ptr)
    BYTES: gl.constexpr = shared_bytes(STAGE, K_WARPS, X_TILES, X_SUMS, CLUSTER, WEIGHTS)
    SENT: gl.constexpr = sent_bytes(K_WARPS, X_TILES, CLUSTER, WEIGHTS)
    NUMBERS: gl.constexpr = step_numbers(K_WARPS, X_TILES)
    TEAMS: gl.constexpr = THREADS // NUMBERS
    SLOTS: gl.constexpr = step_slots(K_WARPS, X_TILES, WEIGHTS)
    gl.static_assert(SLOTS <= MOST_SLOTS)
    IN_TURN: gl.constexpr = CLUSTER > 1 and GROUP_SIZE < UNIT  # as in _int4_decode_kernel
    SUMS: gl.constexpr = 8 * X_TILES * COLUMN  # bytes of a warp
    DTYPE: gl.constexpr = x_ptr.dtype.element_ty
    weights = ((w_ptr, s_ptr, z_ptr),)
    if gate_ptr is not None:
        weights = ((gate_ptr, gate_s_ptr, gate_z_ptr), (w_ptr, s_ptr, z_ptr))
    units = K // UNIT
    row_tiles = (N + 15) // 16
    rank, cluster, clusters = gl.program_id(0) % CLUSTER, gl.program_id(0) // CLUSTER, gl.num_programs(0) // CLUSTER
    count = ((row_tiles + TILES - 1) // TILES - cluster + clusters - 1) // clusters * WEIGHTS  # steps

    # All of shared memory is this, from its beginning. By a barrier that is made here and ends with the kernel Triton
    # knows that it is in use so long, and puts nothing else there.
    memory = gl.allocate_shared_memory(gl.int64, [BYTES // 8, 1], mbarrier.MBarrierLayout())
    mbarrier.init(memory.index(BYTES // 8 - 1), count=1)
    slots = gl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    thread = gl.arange(0, THREADS, THREAD)
    warp, lane = thread // 32, thread % 32
    stages = slots + 8 * (MOST_SLOTS + 4) + warp * 8
    ring = slots + BARRIERS + warp * (STAGES * STAGE)
    x_sums = slots + BARRIERS + WARPS * (STAGES * STAGE) + (warp * 4 + lane % 4) * X_SUMS
    sums = slots + BARRIERS + WARPS * (STAGES * STAGE + 4 * X_SUMS)
    BEGIN: gl.constexpr = _begin_asm(SLOTS, sent_slots(CLUSTER, WEIGHTS), CLUSTER)
    gl.inline_asm_elementwise(
        BEGIN, "=r,r,r,r,r", [gl.zeros_like(thread) + slots, stages, thread, lane], gl.int32, is_pure=False, pack=1
    )

    # Warps whose units are past K ask for nothing, and multiply whatever there is by zeros and scales that are zeros;
    # tiles past N repeat the last one.
    share = (units // 2 + CLUSTER - 1) // CLUSTER * 2  # units of a block
    unit = rank * share + warp % K_WARPS * 2
    has_units = (warp % K_WARPS * 2 < share) & (unit < units)
    first_unit, works = gl.where(has_units, unit, 0), has_units.to(gl.int32)
    last_unit = first_unit + (row_tiles - 1) * units
    unit = first_unit + (cluster * TILES + warp // K_WARPS) * units  # of the tile that is asked for next
    gl.inline_asm_elementwise(
        _clear_asm(STAGE), "=r,r,r,r", [ring + lane * 16, works, lane], dtype=gl.int32, is_pure=False, pack=1
    )
    room = (stages, ring, works)
    for i in gl.static_range(STAGES):
        _fetch(weights[i % WEIGHTS], unit, last_unit, i < count, i, room, STAGE, GROUP_SIZE)
        if i % WEIGHTS == WEIGHTS - 1:
            unit += clusters * TILES * units
    gl.thread_barrier()
    if CLUSTER > 1:
        join_cluster()
    wait_for_previous(PDL)
    x = _load_x(x_ptr, first_unit, lane, works, M, stride_xm, X_TILES)
    if X_SUMS > 0:
        _put_x_sums(x, x_sums, GROUP_SIZE, X_TILES, DTYPE)

    to = sums + warp * SUMS + _place_of_sum(lane % 4 * 2, lane // 4)
    out = (bias_ptr, y_ptr, M, N)
    mailbox = (slots + 8 * MOST_SLOTS, slots + (BYTES - 8 - SENT), rank)
    # What a thread adds up, when it is its team's turn: row and column of a tile, and which of TILES. Of two columns
    # that are two apart the numbers are in different banks.
    team = gl.inline_asm_elementwise(_team_asm(NUMBERS), "=r", [], dtype=gl.int32, is_pure=True, pack=1)
    number = thread % NUMBERS
    row = number % 16
    column = number // 16 % 2 * 2 + number // 32 % 2 + number // 64 % 2 * 4 + number // 128 % X_TILES * 8
    which = number // (128 * X_TILES)
    parts = sums + which * (K_WARPS * SUMS) + _place_of_sum(column, row)
    place = ((cluster * TILES + which) * 16 + row, clusters * TILES * 16, column)
    gate = gl.zeros_like(number).to(gl.float32)
    slot, phase, last_slot, last_phase = 0, 0, 0, 0
    for first in range(0, count, WEIGHTS):
        for w in gl.static_range(WEIGHTS):
            step = first + w
            stage = step % STAGES
            at = ring + stage * STAGE
            _wait(stages + stage * (8 * WARPS), gl.zeros_like(thread) + (step // STAGES & 1))
            packed, scales, zeros = _read(weights[w], at, lane, GROUP_SIZE, X_TILES)
            if X_TILES == 1:
                _fetch(weights[w], unit, last_unit, step + STAGES < count, stage, room, STAGE, GROUP_SIZE)
            total = _multiply(x, x_sums, packed, scales, zeros, weights[w], IN_TURN, GROUP_SIZE, X_TILES, DTYPE)
            if X_TILES > 1:  # so many registers are in use that not all has been read before
                _fetch(weights[w], unit, last_unit, step + STAGES < count, stage, room, STAGE, GROUP_SIZE)
            if w == WEIGHTS - 1:
                unit += clusters * TILES * units
            for t in gl.static_range(X_TILES):
                at = to + slot * (WARPS * SUMS)
                numbers = [at, at ^ 32, total[t][0], total[t][1], total[t][2], total[t][3]]
                gl.inline_asm_elementwise(
                    _put_asm(t * 8 * COLUMN), "=r,r,r,f,f,f,f", numbers, dtype=gl.int32, is_pure=False, pack=1
                )
            gl.inline_asm_elementwise(
                _ARRIVE, "=r,r,r", [gl.zeros_like(thread) + (slots + slot * 8), lane], gl.int32, is_pure=False, pack=1
            )
            if step > 0 and _is_turn(step - 1, team, WEIGHTS, TEAMS):
                acc = _add_up(slots, parts, last_slot, last_phase, K_WARPS, X_TILES)
                if CLUSTER == 1:
                    gate = _finish(acc, gate, out, step - 1, w == 1, place, WEIGHTS, ACTIVATION)
                else:
                    _send(acc, mailbox, step - 1, number, NUMBERS, WEIGHTS, CLUSTER)
            if CLUSTER > 1:
                sent = step - 2
                if step > 1 and _is_turn(sent, team, WEIGHTS, TEAMS) and _is_own(sent, rank, WEIGHTS, CLUSTER):
                    acc = _receive(mailbox, sent, number, NUMBERS, WEIGHTS, CLUSTER)
                    gate = _finish(acc, gate, out, sent, w < WEIGHTS - 1, place, WEIGHTS, ACTIVATION)
            last_slot, last_phase = slot, phase
            slot += 1
            if slot == SLOTS:
                slot = 0
                phase ^= 1
    if count > 0 and _is_turn(count - 1, team, WEIGHTS, TEAMS):
        acc = _add_up(slots, parts, last_slot, last_phase, K_WARPS, X_TILES)
        if CLUSTER == 1:
            _finish(acc, gate, out, count - 1, False, place, WEIGHTS, ACTIVATION)
        else:
            _send(acc, mailbox, count - 1, number, NUMBERS, WEIGHTS, CLUSTER)
    if CLUSTER > 1:
        for left in gl.static_range(2, 0, -1):
            sent = count - left
            if sent >= 0 and _is_turn(sent, team, WEIGHTS, TEAMS) and _is_own(sent, rank, WEIGHTS, CLUSTER):
                acc = _receive(mailbox, sent, number, NUMBERS, WEIGHTS, CLUSTER)
                gate = _finish(acc, gate, out, sent, left > 3 - WEIGHTS, place, WEIGHTS, ACTIVATION)
    mbarrier.invalidate(memory.index(BYTES // 8 - 1))


@gluon.jit
def _fetch(weight, unit, last_unit, is_there, stage, room, STAGE: gl.constexpr, GROUP_SIZE: gl.constexpr):
    """Asks for a warp's part of a tile, from unit `unit` of the weight on or the last one, if there is such a tile and
    the warp has units. It has read what was in its stage: bar.warp.sync in the PTX is for that. (No fence stands
    between such reads and a copy, as in CUTLASS's pipelines.)"""
    w_ptr, s_ptr, z_ptr = weight
    stages, ring, works = room
    if is_there:
        unit = gl.minimum(unit, last_unit)
        barrier, to = stages + stage * (8 * WARPS), ring + stage * STAGE
        w_from, s_from = _address(w_ptr, unit), _address(s_ptr, unit)
        if z_ptr is None:
            ASM: gl.constexpr = _fetch_asm((PIECE, group_bytes(GROUP_SIZE, s_ptr)))
            sources = [barrier, to, unit, works, w_from, s_from]
            gl.inline_asm_elementwise(ASM, "=r,r,r,r,r,l,l", sources, dtype=gl.int32, is_pure=False, pack=1)
        else:
            ASM: gl.constexpr = _fetch_asm((PIECE, group_bytes(GROUP_SIZE, s_ptr), group_bytes(GROUP_SIZE, z_ptr)))
            sources = [barrier, to, unit, works, w_from, s_from, _address(z_ptr, unit)]
            gl.inline_asm_elementwise(ASM, "=r,r,r,r,r,l,l,l", sources, dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _address(ptr, like):
    return gl.zeros_like(like).to(gl.int64) + ptr.to(gl.int64)


@gluon.jit
def _load_x(x_ptr, first_unit, lane, works, M, stride_xm, X_TILES: gl.constexpr):
    """What a warp's units meet: for each unit, plane and tile of x four words, in the order of columns that weights
    have, which see: triton_gemm.py."""
    x = ()
    for u in gl.static_range(2):
        for plane in gl.static_range(4):
            for t in gl.static_range(X_TILES):
                row = t * 8 + lane // 4
                column = (first_unit + u) * UNIT + plane * (UNIT // 4) + lane % 4 * 8
                at = (x_ptr + (row.to(gl.int64) * stride_xm + column)).to(gl.int64)
                is_there = works * (row < M).to(gl.int32)
                words = gl.inline_asm_elementwise(
                    _LOAD_X, "=r,=r,=r,=r,l,r", [at, is_there],
                    dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1,
                )  # fmt: skip
                x = x + (words,)
    return x


@gluon.jit
def _read(weight, at, lane, GROUP_SIZE: gl.constexpr, X_TILES: gl.constexpr):
    """(packed, scales, zeros) of a warp's part of a tile: for each unit and half of its rows four words; of scales and
    zeros what _group asks for, where they are and those that have been read."""
    w_ptr, s_ptr, z_ptr = weight
    packed = ()
    for i in gl.static_range(4):
        packed = packed + (_load_four(at + lane * 16, i * 512),)
    s_at = at + PIECE + lane // 4 * (2 * s_ptr.dtype.element_ty.primitive_bitwidth // 8)
    z_at = s_at
    if z_ptr is not None:
        z_at = at + (PIECE + group_bytes(GROUP_SIZE, s_ptr))
        z_at += lane // 4 * (2 * z_ptr.dtype.element_ty.primitive_bitwidth // 8)
    scales, zeros = (), ()
    if X_TILES == 1 or GROUP_SIZE == UNIT or z_ptr is None:  # else they are too many to hold: each is read when needed
        scales, zeros = _read_groups(s_ptr, s_at, GROUP_SIZE), _read_groups(z_ptr, z_at, GROUP_SIZE)
    return packed, (s_at, scales), (z_at, zeros)


@gluon.jit
def _read_groups(ptr, at, GROUP_SIZE: gl.constexpr):
    """The scales, or zeros, of all groups of a warp, of its first unit and then of its second, as _read_group has them:
    by pairs, in half as many words."""
    found = ()
    if ptr is not None:
        SIZE: gl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
        for pair in gl.static_range(UNIT // GROUP_SIZE):
            if SIZE == 4:
                found = found + (_read_group(ptr, at, 2 * pair), _read_group(ptr, at, 2 * pair + 1))
            else:
                top, top_2 = _split(_load(at, pair * 64, gl.int32), ptr.dtype.element_ty)
                low, low_2 = _split(_load(at, pair * 64 + 32, gl.int32), ptr.dtype.element_ty)
                found = found + ((top, low), (top_2, low_2))
    return found


@gluon.jit
def _read_group(ptr, at, GROUP: gl.constexpr):
    """The scales, or zeros, of a group for rows r and r + 8: floats as fp32, of an int16 two in a word."""
    SIZE: gl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    OFFSET: gl.constexpr = GROUP // 2 * (32 * SIZE) + GROUP % 2 * SIZE
    return _load(at, OFFSET, ptr.dtype.element_ty), _load(at, OFFSET + 16 * SIZE, ptr.dtype.element_ty)


@gluon.jit
def _load(at, OFFSET: gl.constexpr, DTYPE: gl.constexpr):
    """A number: floats as fp32, of an int16 two in a word."""
    ASM: gl.constexpr = _load_asm(OFFSET, DTYPE.primitive_bitwidth)
    if DTYPE == gl.float32:
        return gl.inline_asm_elementwise(ASM, "=f,r", [at], dtype=gl.float32, is_pure=False, pack=1)
    else:
        word = gl.inline_asm_elementwise(ASM, "=r,r", [at], dtype=gl.int32, is_pure=False, pack=1)
        return word if DTYPE == gl.int32 else _split(word, DTYPE)[0]


@gluon.jit
def _split(word, DTYPE: gl.constexpr):
    """The lower and the upper half of a word: floats as fp32, of an int16 two in a word."""
    if DTYPE == gl.int16:
        return _permute(word, 0x1010), _permute(word, 0x3232)
    elif DTYPE == gl.bfloat16:
        return (word << 16).to(gl.float32, bitcast=True), (word & -65536).to(gl.float32, bitcast=True)
    else:
        low, high = word.to(gl.int16), (word >> 16).to(gl.int16)
        return low.to(DTYPE, bitcast=True).to(gl.float32), high.to(DTYPE, bitcast=True).to(gl.float32)


@gluon.jit
def _permute(word, BYTES: gl.constexpr):
    return gl.inline_asm_elementwise(_permute_asm(BYTES), "=r,r", [word], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _put_x_sums(x, x_sums, GROUP_SIZE: gl.constexpr, X_TILES: gl.constexpr, DTYPE: gl.constexpr):
    """Sums of x over each group, made as products with ones: two columns for each group of a warp and tile of x."""
    zero = gl.zeros_like(x[0][0]).to(gl.float32)
    one = gl.full_like(x[0][0], 0x3F803F80 if DTYPE == gl.bfloat16 else 0x3C003C00)
    PLANES: gl.constexpr = GROUP_SIZE // (UNIT // 4)  # a group
    for group in gl.static_range(2 * UNIT // GROUP_SIZE):
        for t in gl.static_range(X_TILES):
            sums = (zero, zero, zero, zero)
            for plane in gl.static_range(PLANES):
                words = x[(group * PLANES + plane) * X_TILES + t]
                sums = _product((one, one, one, one), words[0], words[1], sums, DTYPE)
                sums = _product((one, one, one, one), words[2], words[3], sums, DTYPE)
            gl.inline_asm_elementwise(
                _put_pair_asm((group * X_TILES + t) * 8), "=r,r,f,f", [x_sums, sums[0], sums[1]], dtype=gl.int32,
                is_pure=False, pack=1,
            )  # fmt: skip


@gluon.jit
def _multiply(
    x, x_sums, packed, scales, zeros, weight, IN_TURN: gl.constexpr, GROUP_SIZE: gl.constexpr, X_TILES: gl.constexpr,
    DTYPE: gl.constexpr,
):  # fmt: skip
    """A warp's part of a tile, over UNPACKED: for each tile of x the sums of rows r and r + 8, of two columns each. Its
    units side by side, or IN_TURN, which is another order of sums in small groups."""
    zero = gl.zeros_like(x_sums).to(gl.float32)
    nothing = (zero, zero, zero, zero)
    total = (nothing,) if X_TILES == 1 else (nothing, nothing)
    operands = (x, x_sums, packed, scales, zeros, weight)
    if IN_TURN:
        total = _multiply_units(total, operands, 0, 1, GROUP_SIZE, X_TILES, DTYPE)
        return _multiply_units(total, operands, 1, 2, GROUP_SIZE, X_TILES, DTYPE)
    else:
        return _multiply_units(total, operands, 0, 2, GROUP_SIZE, X_TILES, DTYPE)


@gluon.jit
def _multiply_units(
    total, operands, FIRST: gl.constexpr, END: gl.constexpr, GROUP_SIZE: gl.constexpr, X_TILES: gl.constexpr,
    DTYPE: gl.constexpr,
):  # fmt: skip
    """total, and to it what units FIRST to END of a warp make."""
    x, x_sums, packed, scales, zeros, weight = operands
    w_ptr, s_ptr, z_ptr = weight
    GROUPS: gl.constexpr = UNIT // GROUP_SIZE  # a unit
    INTEGER_ZEROS: gl.constexpr = are_integers(z_ptr, GROUP_SIZE)
    zero = gl.zeros_like(x_sums).to(gl.float32)
    nothing = ((zero, zero, zero, zero),)
    for _ in gl.static_range(1, (END - FIRST) * X_TILES):
        nothing = nothing + ((zero, zero, zero, zero),)
    sums = nothing  # of each unit
    for plane in gl.static_range(4):
        new = ()
        for u in gl.static_range(FIRST, END):
            subtracted = (None, None)
            if INTEGER_ZEROS:
                subtracted = _group(zeros, z_ptr, u * GROUPS + plane * 32 // GROUP_SIZE)
            of_unit = ()
            for t in gl.static_range(X_TILES):
                of_unit = of_unit + (sums[(u - FIRST) * X_TILES + t],)
            for half in gl.static_range(2):  # of a plane
                w = ()
                for i in gl.static_range(4):
                    words = packed[2 * u + i % 2][2 * half + i // 2]
                    w = w + (unpack_words(words, subtracted[i % 2], plane, DTYPE),)
                products = ()
                for t in gl.static_range(X_TILES):
                    words = x[(4 * u + plane) * X_TILES + t]
                    products = products + (_product(w, words[2 * half], words[2 * half + 1], of_unit[t], DTYPE),)
                of_unit = products
            new = new + of_unit
        sums = new
        if (plane + 1) * 32 % GROUP_SIZE == 0:  # a group ends
            for u in gl.static_range(FIRST, END):
                scale = _group(scales, s_ptr, u * GROUPS + plane * 32 // GROUP_SIZE)
                if z_ptr is not None and not INTEGER_ZEROS:
                    z = _group(zeros, z_ptr, u * GROUPS + plane * 32 // GROUP_SIZE)
                    z = (8.0 - z[0]) * (1.0 / UNPACKED), (8.0 - z[1]) * (1.0 / UNPACKED)
                new = ()
                for t in gl.static_range(X_TILES):
                    part = sums[(u - FIRST) * X_TILES + t]
                    if z_ptr is not None and not INTEGER_ZEROS:
                        of_x = _load_pair(x_sums, ((u * GROUPS + plane * 32 // GROUP_SIZE) * X_TILES + t) * 8)
                        part = (
                            gl.fma(of_x[0], z[0], part[0]), gl.fma(of_x[1], z[0], part[1]),
                            gl.fma(of_x[0], z[1], part[2]), gl.fma(of_x[1], z[1], part[3]),
                        )  # fmt: skip
                    scaled = ()
                    for i in gl.static_range(4):
                        scaled = scaled + (gl.fma(part[i], scale[i // 2], total[t][i]),)
                    new = new + (scaled,)
                total = new
            sums = nothing
    return total


@gluon.jit
def _group(groups, ptr, GROUP: gl.constexpr):
    """What _read_group gives, of what _read says of scales or zeros."""
    at, found = groups
    return found[GROUP] if len(found) > 0 else _read_group(ptr, at, GROUP)


@gluon.jit
def _place_of_sum(column, row):
    """Where a warp's sum of a row and column is, in bytes. Columns 1 and 2 change places, and 5 and 6, and from the
    fourth on rows with those eight on, so that neither a warp's writes, of every other column and half of the rows, nor
    its reads, of two columns two apart, meet in a bank."""
    place = column // 8 * 8 + column // 4 % 2 * 4 + column % 2 * 2 + column // 2 % 2
    return place * COLUMN + (row ^ column // 4 % 2 * 8) * 4


@gluon.jit
def _add_up(slots, parts, slot, phase, K_WARPS: gl.constexpr, X_TILES: gl.constexpr):
    """What the warps have of a step, added up when all have arrived, as add_warps would: a number for each thread of
    the team whose turn it is.

    Why step_slots are enough: a warp that writes sums of step i has last, when it was its team's turn, seen all arrive
    at step i - 2 - (TEAMS - 1) * WEIGHTS or later, and who arrived there had read those of two steps before.
    """
    _wait(gl.zeros_like(parts) + (slots + slot * 8), gl.zeros_like(parts) + phase)
    at = parts + slot * (WARPS * (8 * X_TILES * COLUMN))
    found = ()
    for i in gl.static_range(K_WARPS):
        found = found + (_load(at, i * (8 * X_TILES * COLUMN), gl.float32),)
    return _tree(found) * UNPACKED


@gluon.jit
def _is_turn(step, team, WEIGHTS: gl.constexpr, TEAMS: gl.constexpr):
    """Whether it is a team's turn to add up a step: of each tile all is one team's."""
    return (step >> (WEIGHTS - 1) & (TEAMS - 1)) == team


@gluon.jit
def _is_own(step, rank, WEIGHTS: gl.constexpr, CLUSTER: gl.constexpr):
    """Whether block `rank` of its cluster adds up a step: blocks take tiles in turn."""
    return step // WEIGHTS % CLUSTER == rank


@gluon.jit
def _slot(mailbox, step, NUMBERS: gl.constexpr, WEIGHTS: gl.constexpr, CLUSTER: gl.constexpr):
    """(barrier, address, how often there were others before) of the sums of a step, in the block whose own it is.

    Why sent_slots are enough, which is sent_slots * CLUSTER >= 6 + (CLUSTER - 1) * WEIGHTS: who sends the sums of step
    i, in place of those of step i - sent_slots * CLUSTER, has seen all warps of its block arrive there, which had
    received those of a step u of the block's own, i - 3 - (CLUSTER - 1) * WEIGHTS or later; and who sent these had seen
    all of its block arrive at step u, which had received what they had to of step u - 3.
    """
    SLOTS: gl.constexpr = sent_slots(CLUSTER, WEIGHTS)
    barriers, sent, rank = mailbox
    own = step // (WEIGHTS * CLUSTER) * WEIGHTS + step % WEIGHTS  # how many of that block's come before
    slot = own % SLOTS
    return barriers + slot * 8, sent + slot * (CLUSTER * 4 * NUMBERS), own // SLOTS


@gluon.jit
def _send(acc, mailbox, step, number, NUMBERS: gl.constexpr, WEIGHTS: gl.constexpr, CLUSTER: gl.constexpr):
    """Sends what _add_up gives to the block of the cluster whose step it is."""
    barrier, to, _ = _slot(mailbox, step, NUMBERS, WEIGHTS, CLUSTER)
    to = number * 4 + (to + mailbox[2] * (4 * NUMBERS))
    barrier, owner = gl.zeros_like(number) + barrier, gl.zeros_like(number) + step // WEIGHTS % CLUSTER
    gl.inline_asm_elementwise(
        _expect_asm(NUMBERS, CLUSTER), "=r,r,r", [barrier, owner], dtype=gl.int32, is_pure=False, pack=1
    )
    send(acc, to, barrier, owner)


@gluon.jit
def _receive(mailbox, step, number, NUMBERS: gl.constexpr, WEIGHTS: gl.constexpr, CLUSTER: gl.constexpr):
    """The sum of what the blocks of the cluster have sent of this block's step, in the order of their ranks."""
    barrier, at, before = _slot(mailbox, step, NUMBERS, WEIGHTS, CLUSTER)
    _wait(gl.zeros_like(number) + barrier, gl.zeros_like(number) + (before & 1))
    at = number * 4 + at
    total = _load(at, 0, gl.float32)
    for i in gl.static_range(1, CLUSTER):
        total += _load(at, i * 4 * NUMBERS, gl.float32)
    return total


@gluon.jit
def _tree(found):
    """The sum of a power of two of tensors, neighbours first."""
    if len(found) == 1:
        return found[0]
    else:
        pairs = ()
        for i in gl.static_range(len(found) // 2):
            pairs = pairs + (found[2 * i] + found[2 * i + 1],)
        return _tree(pairs)


@gluon.jit
def _finish(acc, gate, out, step, IS_GATE: gl.constexpr, place, WEIGHTS: gl.constexpr, ACTIVATION: gl.constexpr):
    """Stores the sums of a step, or gives them as the gate's."""
    if IS_GATE:
        gate = acc
    else:
        bias_ptr, y_ptr, M, N = out
        first, rows_on, m = place
        n = first + step // WEIGHTS * rows_on
        if ACTIVATION is not None:
            acc *= activate(gate, ACTIVATION)
        if bias_ptr is not None:
            acc += gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)
        gl.store(y_ptr + m.to(gl.int64) * N + n, acc.to(y_ptr.dtype.element_ty), mask=(n < N) & (m < M))
    return gate
