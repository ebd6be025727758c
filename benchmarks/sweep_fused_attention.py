"""Times configurations of fused_attention (prefill) on this GPU, beside the one that pick_config chooses and SDPA.

    python -m benchmarks.sweep_fused_attention --out times.json                          32 query, 8 KV heads; causal
    python -m benchmarks.sweep_fused_attention --heads 9x3x64 --lengths 300 256:2048 --masks full --out times.json

A length is Lq, or Lq:Lk for Lq new tokens that follow Lk - Lq cached ones. Each configuration is checked against the
float64 oracle first, in its first, middle and last queries, and refused if it is wrong; then it is one CUDA graph over
copies of q, k and v that exceed L2 together. SDPA's cuDNN and flash kernels are timed the same way; their causal mask
is aligned top-left, so they have none for Lq < Lk. The last line, JSON, names for each case the configuration that is
best over all --batch-sizes together (a row has the same bits in every batch, so the batch must not decide), and its
mean gain over pick_config's. The numbers of pick_config come from such runs; there is no table to install.
"""

import argparse
import functools
import itertools
import sys
import time
from dataclasses import fields

import torch
import triton
from torch import Tensor

from benchmarks.attention import peers, prefill_flops, prefill_inputs, prefill_oracle
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
from benchmarks.timing import Machine, measure_machine, time_us
from tiny_gemm.device import DeviceFacts, device_facts
from tiny_gemm.triton_fused_transformer import attention
from tiny_gemm.triton_fused_transformer.attention import AttentionConfig

Lengths = tuple[int, int]  # Lq, Lk
LENGTHS = [(n, n) for n in (128, 256, 512, 1024, 2048, 8192)]


def candidates(
    group: int, queries: int, head_dim: int, itemsize: int, device: DeviceFacts, *, quick: bool
) -> list[AttentionConfig]:
    """What pick_config chooses, then the others worth timing for that many queries."""
    found = [attention.pick_config(queries * group, head_dim, itemsize, False, device)]
    block_d = triton.next_power_of_2(head_dim)
    for block_m, block_n, num_warps, num_stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3)):
        if block_m < 16 * num_warps:  # rows of one tensor-core instruction
            continue
        held = block_m * (1.5 * block_n + block_d) / (32 * num_warps)  # registers of scores, probabilities and output
        shared = (block_m + 2 * block_n * num_stages) * block_d * itemsize
        if held > 160 or held < 64 or shared > device.shared_memory_bytes:  # spilled, or more steps than need be
            continue
        if quick and (block_n == 32 or num_stages == 3):
            continue
        found.append(AttentionConfig(block_m, block_n, num_warps, num_stages))
    return list(dict.fromkeys(found))


def attend(config: AttentionConfig, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """fused_attention with `config` in place of what pick_config chooses."""
    with choosing(attention, config):
        return attention.fused_attention(q, k, v, causal=causal)


def compile_one(job: tuple) -> str | None:
    """Compiles a configuration into Triton's cache by a call with few tokens; returns what went wrong."""
    device, heads, dtype, causal, config = job
    try:
        attend(config, *prefill_inputs(device, *heads, 1, 16, 16, dtype), causal=causal)
    except Exception as e:
        return one_line(config, e)
    return None


def sweep_case(
    heads: Heads, lengths: Lengths, causal: bool, dtype: torch.dtype, configs: list, machine: Machine, batch: int
) -> list[dict]:
    """A row for each configuration that computes the right thing, and one for each of SDPA's kernels."""
    tensors = q, k, v = prefill_inputs(machine.device, *heads, batch, *lengths, dtype)
    select, oracle = prefill_oracle(q, k, v, causal)
    nbytes, flops = 2 * q.nbytes + k.nbytes + v.nbytes, prefill_flops(q, k, causal)
    copies = [tensors, *(tuple(t.clone() for t in tensors) for _ in range(machine.copies(nbytes) - 1))]
    masked = functools.partial(attend, causal=causal)
    rows = time_configs(
        masked,
        configs,
        copies,
        lambda config: relative_error(select(masked(config, *tensors)), oracle),
        2 * BOUNDS[dtype],
        machine,
    )
    if machine.is_cuda and (q.shape[2] == k.shape[2] or not causal):
        calls = lambda function: [functools.partial(function, *copy) for copy in copies]  # noqa: E731
        for arm in peers(machine, calls, nbytes, flops, causal, with_compile=False):
            try:
                with arm.context():
                    rows.append({"us": time_us(arm.calls(), machine), "impl": arm.impl})
            except Exception as e:  # a head size that it does not know
                print(f"  {one_line(arm.impl, e)}", file=sys.stderr)
    floor = machine.floor_us(nbytes, flops)
    return [{"floor_us": floor, "tflops": flops / row["us"] / 1e6} | row for row in rows]


def lengths_of(text: str) -> Lengths:
    try:
        queries, keys = map(int, text.split(":") if ":" in text else (text, text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 512 or 256:2048") from None
    if not 1 <= queries <= keys:
        raise argparse.ArgumentTypeError(f"{text}: Lq is at least 1, and Lk at least Lq")
    return queries, keys


def main(arguments: list[str] | None = None) -> int:
    parser = attention_parser(__doc__, batch_sizes=[1])
    parser.add_argument("--lengths", type=lengths_of, nargs="+", default=LENGTHS, metavar="LQ[:LK]")
    parser.add_argument("--masks", nargs="+", choices=["causal", "full"], default=["causal"])
    args = parse(parser, arguments)
    if min(args.batch_sizes) < 1:
        parser.error("batch sizes are at least 1")

    begin, dtype, device = time.time(), getattr(torch, args.dtype), torch.device("cuda", 0)
    facts = device_facts(device)
    configs = {
        (heads, lengths): candidates(
            heads[0] // heads[1], lengths[0], heads[2], dtype.itemsize, facts, quick=args.quick
        )
        for heads, lengths in itertools.product(asked_heads(args), args.lengths)
    }
    masks = [mask == "causal" for mask in dict.fromkeys(args.masks)]
    pairs = [(heads, config) for (heads, _), found in configs.items() for config in found]
    jobs = [(device, heads, dtype, causal, config) for causal in masks for heads, config in dict.fromkeys(pairs)]
    compile_all(compile_one, jobs)

    machine = measure_machine(device)
    roofs = f"{machine.roof_gbps:,.0f} GB/s, {machine.roof_tflops:,.0f} TFLOPS"
    print(f"{torch.cuda.get_device_name()}: roofs {roofs}; {', '.join(f.name for f in fields(AttentionConfig))}")
    cases = []
    for ((heads, lengths), found), causal in itertools.product(configs.items(), masks):
        what = heads_facts(heads) | {"Lq": lengths[0], "Lk": lengths[1], "causal": causal}
        name = f"{heads_name(heads)} {lengths[0]}:{lengths[1]} {'causal' if causal else 'full'}"
        sweep = functools.partial(sweep_case, heads, lengths, causal, dtype, found, machine)
        cases.append(SweepCase(name, what, sweep))
    run_cases(cases, args, machine, begin)
    return 0


if __name__ == "__main__":
    sys.exit(main())
