"""Finds the fastest DecodeConfig of the INT4 GEMM for each shape on this GPU, and writes a table of them.

    python -m benchmarks.sweep_int4_gemm --shapes 2048x2048 4096x4096 --out my-gpu.json       K x N
    python -m benchmarks.sweep_int4_gemm --shapes 2048x8192 --gated --out my-gpu.json         of int4_gated_linear
    python -m benchmarks.sweep_int4_gemm --model Llama-3.2-1B --out my-gpu.json               a preset's projections
    python -m benchmarks.sweep_int4_gemm --shapes 4096x4096 --rows 32 64 128 --out rows.json  SplitConfigs; only times
    TINY_GEMM_TABLE=my-gpu.json tiny-gemm generate ...                                         the library reads it

Kernels are compiled by all processors side by side, then timed as in benchmarks/timing.py: CUDA graphs of calls over
copies of the weight that exceed L2. How K is cut must not depend on the number of rows (a row has the same bits in
every batch), so for each shape the cut is taken that is best over all --rows together, and with it the best block for
up to 8 and for up to 16 rows. Where what pick_config chooses is as fast, the table has no entry. Symmetric weights,
unless --zeros asks for others, which get no entries, as more than 16 rows do not; needs an NVIDIA GPU.
"""

import itertools
import json
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, fields, replace

import torch

from benchmarks.presets import clone, group_size, projections, random_weight
from benchmarks.sweeps import compile_all, one_line, parse, sweep_parser
from benchmarks.timing import Machine, measure_machine, time_us
from tiny_gemm import triton_gemm
from tiny_gemm.device import CLUSTERS_FILL, DeviceFacts, device_facts
from tiny_gemm.int4_config import (
    DECODE_ROWS,
    HOPPER_BLOCKS,
    PREFILL_BLOCKS,
    DecodeConfig,
    SplitConfig,
    Zeros,
    groups_a_unit,
    registers_for,
    registers_needed,
    runs_in_gluon,
    stage_bytes,
)
from tiny_gemm.launcher import launches_clusters
from tiny_gemm.quantize_utils import Int4Weight, unit_k
from tiny_gemm.triton_gemm import kind_of_zeros

ZEROS = {"integer": torch.int16, "real": torch.float32}
REGISTERS = (64, 80, 96, 112, 128, 168, 255)


def candidates(
    k: int,
    n: int,
    group: int,
    m: int,
    facts: DeviceFacts,
    *,
    zeros: Zeros = Zeros.NONE,
    gated: bool = False,
    quick: bool = False,
) -> list[DecodeConfig] | list[SplitConfig]:
    """Configurations worth timing for m rows and a weight of n rows and k columns."""
    if m > DECODE_ROWS:
        return _many_rows_candidates(k, n, m, facts, quick)
    groups = groups_a_unit(group, k)
    unit = unit_k(k)
    units = math.ceil(k / unit)
    x_tiles = 1 if m <= 8 else 2
    found = []
    for row_tiles, warp_units, warps, stages in itertools.product((1, 2, 4), (1, 2), (4, 8, 16), (2, 3)):
        units_a_step = warp_units * warps
        steps = math.ceil(units / units_a_step)
        if units_a_step * unit < 2 * group or units_a_step >= 2 * units > 8:
            continue
        stage = row_tiles * units_a_step * stage_bytes(unit, group, zeros, gated)
        if (stages - 1) * stage > facts.shared_memory_bytes - 4096 or (quick and stages == 3 and row_tiles > 1):
            continue
        needed = registers_needed(row_tiles, warp_units, x_tiles, groups, zeros, gated)
        for splits in (1,) if gated else sorted({1, 2, 3, 4, 6, 8, min(steps, 8)}):
            a_split = math.ceil(steps / splits)
            if (splits - 1) * a_split >= steps or stages > max(2, a_split):  # one without a step, or more than it takes
                continue
            limits = [r for r in REGISTERS if r >= needed - 24 and r * warps * 32 <= 65536]
            limits = limits[1:2] or limits[:1] if quick else limits[:2]
            if splits == 1:
                found += [DecodeConfig(row_tiles, warp_units, warps, stages, limit) for limit in limits]
                continue
            blocks_per_sm = math.ceil(n / (16 * row_tiles)) * splits / facts.sm_count
            may_be_clusters = a_split == 1 and facts.has_clusters and launches_clusters()
            for cluster in (False, True) if may_be_clusters else (False,):
                # With so many registers all fit the chip at once.
                full = math.ceil(blocks_per_sm / CLUSTERS_FILL if cluster else blocks_per_sm)
                fits = registers_for(full * warps)
                if fits >= needed - 96:
                    limit = min(fits, max(needed, 128))
                    found.append(DecodeConfig(row_tiles, warp_units, warps, stages, limit, splits, cluster))
    return found


def _many_rows_candidates(k: int, n: int, m: int, facts: DeviceFacts, quick: bool) -> list[SplitConfig]:
    units, found = math.ceil(k / unit_k(k)), []
    for (block_n, warps), block_m, splits, stages in itertools.product(
        ((64, 4), (128, 8)), (32, 64, 128), (1, 2, 4, 8), (3,) if quick else (3, 4)
    ):
        blocks = math.ceil(n / block_n) * math.ceil(m / block_m) * splits
        stage = unit_k(k) * (2 * block_m + block_n // 2)  # x and W
        if block_m >= 2 * max(m, 32) or (splits > 1 and (units < 2 * splits or blocks > 5 * facts.sm_count)):
            continue
        if stages * stage <= facts.shared_memory_bytes:
            found.append(SplitConfig(block_n, block_m, splits, warps, stages))
            of_this_size = [b for b in PREFILL_BLOCKS if (b.block_n, b.block_m, b.stages) == (block_n, block_m, stages)]
            found += [replace(b, splits=splits) for b in of_this_size]
    if runs_in_gluon(k, facts):
        for block, splits in itertools.product(HOPPER_BLOCKS, (1, 2, 4, 8)):
            blocks = math.ceil(n / block.block_n) * math.ceil(m / block.block_m) * splits
            has_work = (splits - 1) * math.ceil(units / splits) < units
            if block.block_m < 2 * m and has_work and (splits == 1 or blocks <= facts.sm_count):
                found.append(replace(block, splits=splits))
    return found


def compile_one(job: tuple) -> str | None:
    """Compiles a configuration into Triton's cache; returns what went wrong."""
    m, n, k, group, zeros, gated, dtype, config = job
    try:
        device = torch.device("cuda")
        activation = "silu" if gated else None
        kind = kind_of_zeros(zeros, group)
        launch = triton_gemm.plan(m, n, k, group, kind, device_facts(device), config, activation)
        weight = torch.int16, torch.float16, zeros
        scratch = (torch.float32, torch.int32) if launch.partials else (None, None)
        gate = () if isinstance(config, SplitConfig) else weight if gated else (None,) * 3
        tensors = dtype, *weight, *gate, None, dtype, *scratch
        launch.launcher.kernel.warmup(*tensors, m, n, k, k, grid=(1, 1), **launch.launcher.meta)
    except Exception as e:
        return one_line(config, e)
    return None


# m, configuration (None: pick_config's), microseconds
Found = list[tuple[int, DecodeConfig | SplitConfig | None, float]]


def sweep_shape(weights: list[Int4Weight], configs: dict[int, list], dtype: torch.dtype, machine: Machine) -> Found:
    """The time of each configuration for each number of rows that gives what pick_config's does. Two weights are those
    of a gated pair."""
    n, k = weights[0].shape
    count = machine.copies(sum(w.nbytes for w in weights))
    copies = [tuple(weights), *(tuple(map(clone, weights)) for _ in range(count - 1))]
    found: Found = []
    for m, for_m in configs.items():
        x = torch.randn(m, k, device=machine.device, dtype=dtype)

        def call(weights: tuple[Int4Weight, ...], config: DecodeConfig | None, x: torch.Tensor = x):
            w = weights[0]
            parts = w.packed, w.scales, w.zeros
            if len(weights) == 1:
                return triton_gemm.int4_gemm(x, *parts, None, w.group_size, n, config)
            gate = weights[1].packed, weights[1].scales, weights[1].zeros
            return triton_gemm.int4_gated_linear(x, *parts, *gate, w.group_size, n, "silu", config)

        expected = call(copies[0], None).float()
        for config in [None, *for_m]:
            try:
                error = (call(copies[0], config).float() - expected).norm() / expected.norm()
                if not error < 1e-2:
                    print(f"  {config} is wrong by {error:.2g}", file=sys.stderr)
                    continue
                found.append((m, config, time_us([lambda w=w, c=config: call(w, c) for w in copies], machine)))
            except Exception as e:  # one that the GPU cannot launch
                print(f"  {one_line(config, e)}", file=sys.stderr)
    return found


def best_of(found: Found) -> list[tuple[int, DecodeConfig]]:
    """[(largest m, configuration)] by the rule in this module's docstring; nothing where pick_config's is as fast."""
    found = [(m, config, us) for m, config, us in found if m <= DECODE_ROWS]
    if not found:
        return []
    times: dict[DecodeConfig | None, dict[int, float]] = {}
    for m, config, us in found:
        times.setdefault(config, {})[m] = us
    rows = sorted({m for m, _, _ in found})
    limits = {8: [m for m in rows if m <= 8] or rows, 16: [m for m in rows if m > 8] or rows}
    default = times.pop(None, {})
    if default.keys() != set(rows):
        return []
    best, best_cost = [], math.prod(default[m] for members in limits.values() for m in members)
    for cut in {c.cut for c in times}:
        chosen, cost = [], 1.0
        for limit, members in limits.items():
            costs = {
                config: math.prod(us[m] for m in members)
                for config, us in times.items()
                if config.cut == cut and us.keys() >= set(members)
            }
            if not costs:
                cost = math.inf
                break
            chosen.append((limit, min(costs, key=costs.__getitem__)))
            cost *= min(costs.values())
        if cost < best_cost:
            best, best_cost = chosen, cost
    return best


def names_of(configs: Iterable[DecodeConfig | SplitConfig]) -> list[str]:
    """What the numbers of each kind of configuration are, in their order."""
    return [f"{kind.__name__}: {', '.join(f.name for f in fields(kind))}" for kind in dict.fromkeys(map(type, configs))]


def main(arguments: list[str] | None = None) -> int:
    parser = sweep_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", default=[], metavar="KxN")
    parser.add_argument("--group-size", type=int, default=128, choices=(32, 64, 128, -1), help="of --shapes")
    parser.add_argument("--gated", action="store_true", help="the shapes are of both weights of int4_gated_linear")
    parser.add_argument("--zeros", choices=ZEROS, help="asymmetric weights; no table, only times")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16], metavar="M")
    args = parse(parser, arguments)
    shapes = {tuple(map(int, s.split("x"))): args.group_size for s in args.shapes}
    for model in args.model:
        shapes |= {shape: group_size(model) for shape in projections(model).values()}
    if not shapes:
        parser.error("name --shapes or a --model")
    if args.gated and max(args.rows) > DECODE_ROWS:
        parser.error(f"--gated is for up to {DECODE_ROWS} rows")

    begin, dtype, zeros = time.time(), getattr(torch, args.dtype), ZEROS.get(args.zeros)
    facts = device_facts(torch.device("cuda"))
    configs = {
        (k, n): {
            m: candidates(k, n, g, m, facts, zeros=kind_of_zeros(zeros, g), gated=args.gated, quick=args.quick)
            for m in args.rows
        }
        for (k, n), g in shapes.items()
    }
    jobs = {}  # one for each kernel, not for each shape
    for (k, n), group in shapes.items():
        for m, for_m in configs[k, n].items():
            for config in for_m:
                activation = "silu" if args.gated else None
                launch = triton_gemm.plan(m, n, k, group, kind_of_zeros(zeros, group), facts, config, activation)
                jobs[launch.launcher] = m, n, k, group, zeros, args.gated, dtype, config
    compile_all(compile_one, jobs.values())

    machine = measure_machine(torch.device("cuda"))
    print(f"{facts.name}: roof {machine.roof_gbps:,.0f} GB/s; {'; '.join(names_of(job[-1] for job in jobs.values()))}")
    table = {"gpu": facts.name, "entries": []}
    timings = []
    for (k, n), group in shapes.items():
        if time.time() - begin > args.deadline:
            print(f"{k}x{n} and what follows: not reached", file=sys.stderr)
            break
        weights = [random_weight(n, k, group, machine.device, zeros=zeros).int4 for _ in range(1 + args.gated)]
        found = sweep_shape(weights, configs[k, n], dtype, machine)
        torch.cuda.empty_cache()  # of the graphs' pools
        timings += [
            {"k": k, "n": n, "group_size": group, "m": m, "us": us, **(asdict(c) if c else {"default": True})}
            for m, c, us in found
        ]
        for limit, config in [] if args.zeros else best_of(found):
            entry = {"k": k, "n": n, "group_size": group, "gated": args.gated, "rows": limit}
            table["entries"].append(entry | asdict(config))
        floor = machine.floor_us(sum(w.nbytes for w in weights))
        for m in args.rows:
            best = sorted((us, str(tuple(asdict(c).values())) if c else "now") for rows, c, us in found if rows == m)
            print(f"{k}x{n} M {m}: floor {floor:.2f} |", "; ".join(f"{us:.2f} {c}" for us, c in best[:4]), flush=True)
        args.out.write_text(json.dumps(table, indent=1) + "\n")
        args.out.with_suffix(".timings.json").write_text(json.dumps(timings) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
