"""Blocks of a cluster that send each other partial results, through each other's shared memory (Hopper).

Blocks that share an output tile could meet in device memory: partial sums to L2, a fence, a counter, and for the last
one to arrive the way back, some 0.9 us at the end of a kernel that takes four. The blocks of a cluster are on the chip
together and write into each other's shared memory. Each write tells a barrier there how many bytes came, so that no
fence and no round trip is left: whoever adds waits for its bytes.

    launcher = Launcher(_kernel, cluster=4, sends=cluster_sends(R * C, THREADS), ...)
                                                                clusters of 4 along the first dimension of the grid

    buffer = shared_buffer(cluster_words(SIZE, R * C))
    begin_cluster_sum(buffer, SIZE, R * C, THREADS)             first of all
    join_cluster()                                              before cluster_sum, where nobody waits for it
    total = cluster_sum(acc, buffer, rank, SIZE)                acc fp32 [R, C]

What is no plain sum is made of the same parts: begin_cluster; join_cluster; send, to an address 16 bytes or more behind
another block's buffer; expect_bytes, if not said at the beginning; receive, which waits for them.

Triton knows nothing of it, for which a block is a block: the instructions are PTX. Each is for all threads of a block,
so that all calls stand where all threads come by. A block may end when it has been sent what it expects.
"""

import torch
import triton
import triton.language as tl

from tiny_gemm.device import CLUSTER_BLOCKS, DeviceFacts
from tiny_gemm.triton_parts import load_shared


@triton.jit
def _nothing():
    pass


def cluster_room(device: torch.device, facts: DeviceFacts) -> tuple[int, ...]:
    """DeviceFacts.cluster_room, up to CLUSTER_BLOCKS, by the driver; () where it cannot be asked. A cluster's blocks
    lie in one part of the chip, and chips of one name differ in their parts: on an H200 30 clusters of four took 120 of
    132 SMs."""
    utils = triton.runtime.driver.active.utils
    with torch.cuda.device(device):
        kernel = _nothing.warmup(grid=(1,))
        if hasattr(kernel, "result"):  # it is being compiled by another thread
            kernel = kernel.result()
        if kernel is None or not hasattr(utils, "cuOccupancyMaxActiveClusters"):  # None: a hook of Triton's forbids it
            return ()
        kernel._init_handles()
        ask = utils.cuOccupancyMaxActiveClusters
        return tuple(ask(kernel.function, facts.shared_memory_bytes, blocks) for blocks in range(1, CLUSTER_BLOCKS + 1))


@triton.constexpr_function
def cluster_adders(size: int) -> int:
    """How many blocks of a cluster add up a part of the tile each: a power of two."""
    return 1 << (size.bit_length() - 1)


@triton.constexpr_function
def cluster_words(size: int, elements: int) -> int:
    """Words of shared memory for cluster_sum: a barrier of two words, on 16 bytes, and a part of each block's tile."""
    return 4 + size * (elements // cluster_adders(size))


@triton.constexpr_function
def _begin_asm(num_bytes: int, size: int) -> str:
    expect = f"@first mbarrier.arrive.expect_tx.shared::cta.b64 state, [$1], {num_bytes};" if num_bytes else ""
    return f"""{{
        .reg .pred first, alone;
        .reg .u32 tid, size;
        .reg .b64 state;
        mov.u32 size, %cluster_nctarank;
        setp.ne.u32 alone, size, {size};
        @alone trap;
        mov.u32 tid, %tid.x;
        setp.eq.u32 first, tid, 0;
        @first mbarrier.init.shared::cta.b64 [$1], 1;
        @first fence.mbarrier_init.release.cluster;
        {expect}
        barrier.cluster.arrive.relaxed.aligned;
        mov.u32 $0, 0;
        }}"""


@triton.constexpr_function
def cluster_sends(elements: int, threads: int) -> int:
    """How often a thread sends. Of fewer elements than threads Triton gives each to several threads, and all send."""
    return max(elements // threads, 1)


@triton.constexpr_function
def _expected_bytes(size: int, elements: int, threads: int) -> int:
    """What an adder is sent."""
    return 4 * size * threads * cluster_sends(elements, threads) // cluster_adders(size)


@triton.jit
def begin_cluster(buffer, SIZE: tl.constexpr, NUM_BYTES: tl.constexpr):
    """Makes the barrier, the first two words of the buffer, and says to the others that it is there. NUM_BYTES: what
    this block will be sent; 0: expect_bytes will say, which may be said once, in one of the two ways."""
    ASM: tl.constexpr = _begin_asm(NUM_BYTES, SIZE)
    tl.inline_asm_elementwise(ASM, "=r,r", [buffer], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def begin_cluster_sum(buffer, SIZE: tl.constexpr, ELEMENTS: tl.constexpr, THREADS: tl.constexpr):
    """begin_cluster, of cluster_sum."""
    begin_cluster(buffer, SIZE, _expected_bytes(SIZE, ELEMENTS, THREADS))


@triton.jit
def join_cluster():
    """Waits until the other blocks are there too: before, nothing may be written to their memory. (Not in a branch that
    threads take differently, of which LLVM is not told.)"""
    tl.inline_asm_elementwise(
        "barrier.cluster.wait.aligned; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def expect_bytes(buffer, num_bytes):
    """Says what this block will be sent, once, where begin_cluster did not know."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred first;
        .reg .u32 tid;
        .reg .b64 state;
        mov.u32 tid, %tid.x;
        setp.eq.u32 first, tid, 0;
        @first mbarrier.arrive.expect_tx.shared::cta.b64 state, [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,r,r",
        [buffer, num_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def send(x, to, buffer, block):
    """Sends x, fp32, to addresses `to` in the memory of blocks `block`, where `buffer` lies as here; all of one shape,
    but for the buffer. Of elements that several threads have each sends its own: see cluster_sends. They may arrive
    before the other block has said what it expects: until then its barrier waits for it to say so."""
    tl.inline_asm_elementwise(
        """{
        .reg .b32 there, barrier;
        mapa.shared::cluster.u32 there, $1, $3;
        mapa.shared::cluster.u32 barrier, $2, $3;
        st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [there], $4, [barrier];
        mov.u32 $0, 0;
        }""",
        "=r,r,r,r,f",
        [to, buffer, block, x],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def receive(buffer):
    """Waits until all is there that this block is sent, and gives the address at which it begins."""
    # Acquired for the block only: what was sent is in its own memory, which no cache stands before.
    return tl.inline_asm_elementwise(
        """{
        .reg .pred done;
        wait: mbarrier.try_wait.parity.shared::cta.b64 done, [$1], 0;
        @!done bra wait;
        add.u32 $0, $1, 16;
        }""",
        "=r,r",
        [buffer],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def cluster_sum(acc, buffer, rank, SIZE: tl.constexpr):
    """The sum of acc, fp32 [R, C], over the blocks of a cluster, in the order of their ranks.

    Block `rank` of the first cluster_adders(SIZE), A, gets rows rank * R / A and on, [R / A, C]; the others get zeros.
    """
    ADDERS: tl.constexpr = cluster_adders(SIZE)
    R: tl.constexpr = acc.shape[0]
    C: tl.constexpr = acc.shape[1]
    ROWS: tl.constexpr = R // ADDERS
    row = tl.arange(0, R)[:, None]
    col = tl.arange(0, C)[None, :]
    to = buffer + 16 + ((rank * ROWS + row % ROWS) * C + col) * 4
    send(acc, to, buffer, (row // ROWS).broadcast_to(R, C))
    total = tl.zeros([ROWS, C], tl.float32)
    if rank < ADDERS:
        parts = receive(buffer)
        offs = (tl.arange(0, ROWS)[:, None] * C + col) * 4
        for i in tl.static_range(SIZE):
            total += load_shared(parts + (offs + i * (ROWS * C * 4)))
    return total
