"""Times configurations of decode attention on this GPU, beside the one that pick_config chooses.

    python -m benchmarks.sweep_decode_attention --out times.json                           32 query, 8 KV heads
    python -m benchmarks.sweep_decode_attention --heads 64x8x128 --out times.json          query heads x KV heads x D
    python -m benchmarks.sweep_decode_attention --model SmolLM2-135M --lengths 512 --out times.json
    python -m benchmarks.sweep_decode_attention --cache int8 --out times.json              or fp8: a cache of 8 bits

A cache of L tokens is timed with L - 1 in it, or with --filled of them: pick_config knows of a sequence only how long
its cache is. RoPE and append are included. Each configuration is checked against the float64 oracle first, output and
appended token, and refused if it is wrong; then it is one CUDA graph over copies of the caches that exceed L2 together.
The last line, JSON, names for each heads and length the configuration that is best over all --batch-sizes together (a
row has the same bits in every batch, so the batch must not decide), and its mean gain over pick_config's. The numbers
of pick_config come from such runs; there is no table to install.
"""

import functools
import itertools
import math
import sys
import time

import torch
import triton
from torch import Tensor

from benchmarks.attention import CACHES_8_BIT, DECODE_LENGTHS, decode_inputs, in_8_bits
from benchmarks.cases import BOUNDS, relative_error
from benchmarks.sweeps import (
    Heads,
    SweepCase,
    asked_heads,
    attention_parser,
    choosing,
    compile_all,
    heads_facts,
    heads_name,
    one_line,
    parse,
    run_cases,
    time_configs,
)
from benchmarks.timing import Machine, measure_machine
from tiny_gemm.device import DeviceFacts, device_facts, tensor_bytes
from tiny_gemm.reference import decode_attention_ref
from tiny_gemm.triton_fused_transformer import decode_attention as decode
from tiny_gemm.triton_fused_transformer.decode_attention import DecodeAttentionConfig


def candidates(
    kv_heads: int, group: int, max_length: int, head_dim: int, itemsize: int, device: DeviceFacts, *, quick: bool
) -> list[DecodeAttentionConfig]:
    """What pick_config chooses, then the others worth timing for a cache of that length."""
    found = [decode.pick_config(kv_heads, group, max_length, head_dim, itemsize, device)]
    block_d = triton.next_power_of_2(head_dim)
    blocks = max(1, device.sm_count // kv_heads)  # a KV head, for one on each SM at batch 1
    for tiles, num_warps, share in itertools.product((1, 2, 4), (2, 4, 8), (1,) if quick else (0.5, 1, 2)):
        held = (tiles * itemsize + 1.5) * block_d / 4  # registers of K and V of a tile, the output and q, at least
        most = math.ceil(max_length / (16 * tiles * num_warps))  # a block without a tile only costs
        splits = max(1, min(int(blocks * share), most, decode.MOST_SPLITS))
        if held < 255:
            found.append(DecodeAttentionConfig(splits, num_warps, tiles))
    return list(dict.fromkeys(found))


def attend(config: DecodeAttentionConfig, *inputs: Tensor, **options) -> Tensor:
    """decode_attention with `config` in place of what pick_config chooses."""
    with choosing(decode, config):
        return decode.decode_attention(*inputs, **options)


def inputs_of(device, heads: Heads, batch: int, length: int, dtype, cached, filled=None) -> tuple[tuple, dict]:
    """The arguments of decode_attention; `cached`: None, or the dtype of a cache of 8 bits."""
    inputs = decode_inputs(device, *heads, batch, length, dtype, filled)
    if cached is None:
        return inputs, {}
    inputs, kv_scale = in_8_bits(inputs, cached)
    return inputs, {"kv_scale": kv_scale}


def compile_one(job: tuple) -> str | None:
    """Compiles a configuration into Triton's cache by a call with a small cache; returns what went wrong."""
    device, heads, dtype, cached, config = job
    try:
        for batch in (1, 2, 4, 8, 32):  # clusters, a block for each split, and blocks that take splits in turn
            inputs, options = inputs_of(device, heads, batch, 16, dtype, cached)
            attend(config, *inputs, **options)
    except Exception as e:
        return one_line(config, e)
    return None


def error_of(
    config: DecodeAttentionConfig, inputs: tuple[Tensor, ...], options: dict, oracle: tuple[Tensor, ...]
) -> float:
    """The relative error of the output, or of the k or v that was appended; what the caches hold behind is NaN."""
    filled, scales = int(inputs[5][0]), options.get("kv_scale")
    for cache in (*inputs[3:5], scales):
        if cache is not None and cache.dtype != torch.int8:
            cache[:, :, filled:] = math.nan
    got = attend(config, *inputs, **options), *_token(*inputs[3:5], scales, filled)
    wanted = oracle[0], *_token(*oracle[1:3], oracle[3] if len(oracle) > 3 else None, filled)
    return max(relative_error(*pair) for pair in zip(got, wanted, strict=True))


def _token(k_cache: Tensor, v_cache: Tensor, scales: Tensor | None, position: int) -> list[Tensor]:
    """Its k and v as float64."""
    pair = [cache[:, :, position].double() for cache in (k_cache, v_cache)]
    return pair if scales is None else [t * scales[:, :, position, i, None] for i, t in enumerate(pair)]


def sweep_case(
    heads: Heads,
    length: int,
    filled: int,
    dtype: torch.dtype,
    cached: torch.dtype | None,
    configs: list,
    machine: Machine,
    batch: int,
) -> list[dict]:
    """A row for each configuration that computes the right thing."""
    inputs, options = inputs_of(machine.device, heads, batch, length, dtype, cached, filled)
    oracle = decode_attention_ref(*inputs, **options)
    q, _, _, k_cache, v_cache, *rest = inputs
    cache_bytes = tensor_bytes(k_cache, v_cache, *options.values())
    nbytes = 2 * q.nbytes + cache_bytes // length * (filled + 1)  # read and written
    count = machine.copies(nbytes)
    if machine.is_cuda:  # a cache that is mostly empty takes more memory than is read of it
        count = max(2, min(count, int(0.8 * torch.cuda.mem_get_info()[0]) // cache_bytes))
    copies = [(inputs, options)]
    for _ in range(count - 1):
        copy = {name: t.clone() for name, t in options.items()}
        copies.append(((*(t.clone() for t in inputs[:5]), *rest), copy))
    if count * nbytes < 2 * machine.l2_bytes:
        print(f"  {count} caches of {length} tokens with {filled} in them: part of them stays in L2", file=sys.stderr)
    rows = time_configs(
        lambda config, tensors, more: attend(config, *tensors, **more),
        configs,
        copies,
        lambda config: error_of(config, inputs, options, oracle),
        2 * BOUNDS[dtype] if cached is None else dict(CACHES_8_BIT.values())[cached],  # halves may round either way
        machine,
    )
    return [{"floor_us": machine.floor_us(nbytes)} | row for row in rows]


def main(arguments: list[str] | None = None) -> int:
    parser = attention_parser(__doc__, batch_sizes=[1, 8])
    parser.add_argument("--lengths", type=int, nargs="+", default=DECODE_LENGTHS, metavar="L", help="of the caches")
    parser.add_argument("--cache", choices=["auto", *CACHES_8_BIT], default="auto", help="its dtype; auto: --dtype")
    parser.add_argument("--filled", type=int, metavar="N", help="tokens in each cache, if not L - 1 or that is less")
    args = parse(parser, arguments)
    if min(*args.lengths, *args.batch_sizes) < 1 or (args.filled or 0) < 0:
        parser.error("lengths and batch sizes are at least 1, and --filled is not negative")

    begin, dtype, device = time.time(), getattr(torch, args.dtype), torch.device("cuda", 0)
    cached = None if args.cache == "auto" else CACHES_8_BIT[args.cache][0]
    itemsize = (cached or dtype).itemsize
    facts = device_facts(device)
    configs = {
        (heads, length): candidates(heads[1], heads[0] // heads[1], length, heads[2], itemsize, facts, quick=args.quick)
        for heads, length in itertools.product(asked_heads(args), args.lengths)
    }
    jobs = {(device, heads, dtype, cached, c): None for (heads, _), found in configs.items() for c in found}
    compile_all(compile_one, jobs)

    machine = measure_machine(device)
    print(f"{torch.cuda.get_device_name()}: roof {machine.roof_gbps:,.0f} GB/s; splits, warps, tiles")
    cases = []
    for (heads, length), found in configs.items():
        filled = length - 1 if args.filled is None else min(args.filled, length - 1)
        name = f"{heads_name(heads)} L {length} filled {filled}"
        what = heads_facts(heads) | {"L": length, "filled": filled, "cache": args.cache}
        sweep = functools.partial(sweep_case, heads, length, filled, dtype, cached, found, machine)
        cases.append(SweepCase(name, what, sweep))
    run_cases(cases, args, machine, begin)
    return 0


if __name__ == "__main__":
    sys.exit(main())
