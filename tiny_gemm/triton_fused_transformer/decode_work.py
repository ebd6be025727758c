"""Which tokens a block of the decode attention kernel takes.

The tokens of a sequence that count are cut into tiles of STEP tokens, and up to NUM_SPLITS splits take the tiles in
turn, from the last to the first. Where there are more splits than blocks, the blocks of a (sequence, KV head) take its
splits in turn, and how many blocks it has depends on the lengths of all sequences: see splits_of_block.
"""

import triton
import triton.language as tl


@triton.jit
def tokens(length, Lmax):
    """How many the cache holds with the new one, if it still fits."""
    return tl.minimum(length, Lmax - 1) + 1


@triton.jit
def first_tile(length, split, Lmax, STEP: tl.constexpr):
    """Where the first tile of split `split` starts. Tiles are taken from the last on, which has the new token."""
    return (tl.cdiv(tokens(length, Lmax), STEP) - 1 - split) * STEP


@triton.jit
def window_begin(length, Lmax, WINDOW: tl.constexpr):
    """The first token that counts."""
    if WINDOW > 0:
        return tl.maximum(tokens(length, Lmax) - WINDOW, 0)
    else:
        return 0


@triton.jit
def num_splits(length, Lmax, begin, STEP: tl.constexpr, NUM_SPLITS: tl.constexpr):
    """How many splits of a sequence and KV head have a tile, of those whose tokens count from `begin` on."""
    return tl.minimum(tl.cdiv(tokens(length, Lmax), STEP) - begin // STEP, NUM_SPLITS)


@triton.jit
def read_lengths(lengths_ptr, B, BLOCK_B: tl.constexpr):
    """The length of the block's sequence, or, if BLOCK_B, of all: [BLOCK_B]."""
    if BLOCK_B == 0:
        lengths = tl.load(lengths_ptr + tl.program_id(2).to(tl.int64), cache_modifier=".cg")
    else:
        offs_b = tl.arange(0, BLOCK_B)
        lengths = tl.load(lengths_ptr + offs_b, mask=offs_b < B, other=0, cache_modifier=".cg")
    return tl.maximum(lengths, 0)


@triton.jit
def read_lengths_early(lengths_ptr, B, BLOCK_B: tl.constexpr, WARPS: tl.constexpr):
    """read_lengths while the kernel ahead may still change them. All warps have what one of them has read: they might
    load at different times, and part ways later."""
    if BLOCK_B == 0:
        lengths = tl.max(tl.load(lengths_ptr + tl.program_id(2).to(tl.int64) + tl.arange(0, 32 * WARPS) * 0), 0)
    else:
        offs_b = tl.arange(0, BLOCK_B)[None, :]
        mask = (tl.arange(0, WARPS)[:, None] == 0) & (offs_b < B)
        lengths = tl.max(tl.load(lengths_ptr + offs_b, mask=mask, other=0), 0)
    return tl.maximum(lengths, 0)


@triton.jit
def differ(lengths, others, BLOCK_B: tl.constexpr):
    if BLOCK_B == 0:
        return lengths != others
    else:
        return tl.max((lengths != others).to(tl.int32), 0) > 0


@triton.jit
def splits_of_block(
    lengths,  # as read_lengths reads them
    Lmax,
    B,
    KV_HEADS: tl.constexpr,
    STEP: tl.constexpr,
    WINDOW: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """(sequence, KV head, first of its splits, how far apart they are, the sequence's length). A block without work
    gets a split that there is not.

    If BLOCK_B, a block takes at most `turns` splits of one sequence and KV head, the fewest with which the blocks
    suffice: at least B * KV_HEADS, whatever the lengths are.
    """
    if BLOCK_B == 0:
        return tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(0), NUM_SPLITS, lengths
    else:
        block, num_blocks = tl.program_id(0), tl.num_programs(0)
        offs_b = tl.arange(0, BLOCK_B)
        splits = num_splits(lengths, Lmax, window_begin(lengths, Lmax, WINDOW), STEP, NUM_SPLITS)
        splits = tl.where(offs_b < B, splits, 0)
        turns = tl.cdiv(tl.sum(splits, 0) * KV_HEADS, num_blocks)
        while tl.sum(tl.cdiv(splits, turns), 0) * KV_HEADS > num_blocks:
            turns += 1
        blocks = tl.cdiv(splits, turns)  # of each sequence and KV head
        end = tl.cumsum(blocks * KV_HEADS, 0)
        is_before = end <= block
        batch = tl.minimum(tl.sum(is_before.to(tl.int32), 0), B - 1)
        has_work = block < tl.max(end, 0)
        block -= tl.max(tl.where(is_before, end, 0), 0)
        is_mine = offs_b == batch
        length = tl.sum(tl.where(is_mine, lengths, 0), 0)
        blocks = tl.sum(tl.where(is_mine, blocks, 0), 0)
        kv_head = tl.where(has_work, block // blocks, 0)
        split = tl.where(has_work, block % blocks, NUM_SPLITS)
        return batch.to(tl.int64), kv_head.to(tl.int64), split, blocks, length
