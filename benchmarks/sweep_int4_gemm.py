"""Finds the fastest DecodeConfig of the INT4 GEMM for each shape on this GPU, and writes a table of them.

    python -m benchmarks.sweep_int4_gemm --shapes 2048x2048 4096x4096 --out my-gpu.json       K x N
    python -m benchmarks.sweep_int4_gemm --model Llama-3.2-1B --out my-gpu.json               a preset's projections
    TINY_GEMM_TABLE=my-gpu.json tiny-gemm generate ...                                         the library reads it

Kernels are compiled by all processors side by side, then timed as in benchmarks/timing.py: CUDA graphs of calls over
copies of the weight that exceed L2. The split of K must not depend on the number of rows (a row has the same bits in
every batch), so for each shape the (warp_units, warps) is taken that is best over all --rows together, and within it
the best block for up to 8 and for up to 16 rows. Where what pick_config chooses is as fast, the table has no entry.
Symmetric weights; needs an NVIDIA GPU.
"""

import itertools
import json
import math
import sys
import time
from dataclasses import asdict, replace

import torch

from benchmarks.presets import clone, group_size, projections, random_weight
from benchmarks.sweeps import compile_all, one_line, parse, sweep_parser
from benchmarks.timing import Machine, measure_machine, time_us
from tiny_gemm import triton_gemm
from tiny_gemm.device import device_facts
from tiny_gemm.quantize_utils import Int4Weight, unit_k
from tiny_gemm.triton_gemm import DecodeConfig, units_per_step


def candidates(k: int, group: int, *, quick: bool) -> list[DecodeConfig]:
    """Configurations worth timing for a weight with k columns."""
    unit = unit_k(k)
    units = math.ceil(k / unit)
    found = []
    for row_tiles, warp_units, warps in itertools.product((1, 2, 4), (1, 2, 4), (2, 4, 8, 16)):
        if warp_units < units_per_step(unit, group) or warp_units * warps >= 2 * units > 4:
            continue
        if row_tiles * warp_units > (4 if quick else 8):  # more registers than a thread has
            continue
        if quick and (warps == 2 or row_tiles == 4):
            continue
        for registers in (128,) if warps == 16 else (128, 168) if quick else (96, 128, 168, 255):
            config = DecodeConfig(row_tiles, warp_units, warps, registers)
            found.append(config)
            if not config.is_one_step(k):
                found.append(replace(config, prefetch=True))
    return found


def compile_one(job: tuple) -> str | None:
    """Compiles a configuration into Triton's cache; returns what went wrong."""
    m, n, k, group, dtype, config = job
    try:
        device = torch.device("cuda")
        launcher = triton_gemm.plan(m, n, k, group, True, device_facts(device), config).launcher
        tensors = dtype, torch.int16, torch.float16, *(None,) * 5, dtype  # x, w, s; no zeros, gate or bias; y
        launcher.kernel.warmup(*tensors, m, n, k, k, grid=(1, 1), **launcher.meta)
    except Exception as e:
        return one_line(config, e)
    return None


Found = list[tuple[int, DecodeConfig | None, float]]  # m, configuration (None: pick_config's), microseconds


def sweep_shape(
    weight: Int4Weight, configs: list[DecodeConfig], rows: list[int], dtype: torch.dtype, machine: Machine
) -> Found:
    """The time of each configuration that gives what pick_config's does."""
    n, k = weight.shape
    copies = [weight, *(clone(weight) for _ in range(machine.copies(weight.nbytes) - 1))]
    found: Found = []
    for m in rows:
        x = torch.randn(m, k, device=machine.device, dtype=dtype)

        def call(w: Int4Weight, config: DecodeConfig | None, x: torch.Tensor = x):
            return triton_gemm.int4_gemm(x, w.packed, w.scales, w.zeros, None, w.group_size, n, config)

        expected = call(weight, None).float()
        for config in [None, *configs]:
            try:
                error = (call(weight, config).float() - expected).norm() / expected.norm()
                if not error < 1e-2:
                    print(f"  {config} is wrong by {error:.2g}", file=sys.stderr)
                    continue
                found.append((m, config, time_us([lambda w=w, c=config: call(w, c) for w in copies], machine)))
            except Exception as e:  # one that the GPU cannot launch
                print(f"  {one_line(config, e)}", file=sys.stderr)
    return found


def best_of(found: Found) -> list[tuple[int, DecodeConfig]]:
    """[(largest m, configuration)] by the rule in this module's docstring; nothing where pick_config's is as fast."""
    times: dict[DecodeConfig | None, dict[int, float]] = {}
    for m, config, us in found:
        times.setdefault(config, {})[m] = us
    rows = sorted({m for m, _, _ in found})
    limits = {8: [m for m in rows if m <= 8] or rows, 16: [m for m in rows if m > 8] or rows}
    default = times.pop(None, {})
    if default.keys() != set(rows):
        return []
    best, best_cost = [], math.prod(default[m] for members in limits.values() for m in members)
    for split in {(c.warp_units, c.warps) for c in times}:
        chosen, cost = [], 1.0
        for limit, members in limits.items():
            costs = {
                config: math.prod(us[m] for m in members)
                for config, us in times.items()
                if (config.warp_units, config.warps) == split and us.keys() >= set(members)
            }
            if not costs:
                cost = math.inf
                break
            chosen.append((limit, min(costs, key=costs.__getitem__)))
            cost *= min(costs.values())
        if cost < best_cost:
            best, best_cost = chosen, cost
    return best


def main(arguments: list[str] | None = None) -> int:
    parser = sweep_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", default=[], metavar="KxN")
    parser.add_argument("--group-size", type=int, default=128, choices=(32, 64, 128, -1), help="of --shapes")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16], metavar="M")
    args = parse(parser, arguments)
    shapes = {tuple(map(int, s.split("x"))): args.group_size for s in args.shapes}
    for model in args.model:
        shapes |= {shape: group_size(model) for shape in projections(model).values()}
    if not shapes:
        parser.error("name --shapes or a --model")

    begin, dtype = time.time(), getattr(torch, args.dtype)
    configs = {shape: candidates(shape[0], group, quick=args.quick) for shape, group in shapes.items()}
    jobs = {}  # one for each kernel, not for each shape
    for (k, n), group in shapes.items():
        for m, config in itertools.product(args.rows, configs[k, n]):
            jobs[config, m > 8, config.is_one_step(k), unit_k(k), group] = m, n, k, group, dtype, config
    compile_all(compile_one, jobs.values())

    machine = measure_machine(torch.device("cuda"))
    print(f"{torch.cuda.get_device_name()}: roof {machine.roof_gbps:,.0f} GB/s")
    table = {"gpu": torch.cuda.get_device_name(), "entries": []}
    timings = []
    for (k, n), group in shapes.items():
        if time.time() - begin > args.deadline:
            print(f"{k}x{n} and what follows: not reached", file=sys.stderr)
            break
        weight = random_weight(n, k, group, machine.device).int4
        found = sweep_shape(weight, configs[k, n], args.rows, dtype, machine)
        torch.cuda.empty_cache()  # of the graphs' pools
        timings += [
            {"k": k, "n": n, "group_size": group, "m": m, "us": us, **(asdict(c) if c else {"default": True})}
            for m, c, us in found
        ]
        for limit, config in best_of(found):
            table["entries"].append({"k": k, "n": n, "group_size": group, "rows": limit, **asdict(config)})
        floor = machine.floor_us(weight.nbytes)
        for m in args.rows:
            best = sorted((us, str(tuple(asdict(c).values())) if c else "now") for rows, c, us in found if rows == m)
            print(f"{k}x{n} M {m}: floor {floor:.2f} |", "; ".join(f"{us:.2f} {c}" for us, c in best[:4]), flush=True)
        args.out.write_text(json.dumps(table, indent=1) + "\n")
        args.out.with_suffix(".timings.json").write_text(json.dumps(timings) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
