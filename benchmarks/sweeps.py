"""What the sweeps share: options, compilation by all processors side by side; of those of attention, how configurations
are timed, compared and printed."""

import argparse
import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch

from benchmarks.attention import HEADS
from benchmarks.presets import PRESETS, model_config
from benchmarks.results import environment, save
from benchmarks.timing import Machine, time_us
from tiny_gemm.ops import HEAD_SIZES

WORKERS = 16  # at most: each has a CUDA context, half a gigabyte


def sweep_parser(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=[], choices=PRESETS, metavar="PRESET")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="fewer configurations")
    parser.add_argument("--deadline", type=float, default=math.inf, metavar="SECONDS", help="begin no case after it")
    parser.add_argument("--out", type=Path, required=True, help="what was found, JSON")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("needs a GPU: torch finds none here")
    return args


def compile_all(compile_one: Callable[[tuple], str | None], jobs: Collection[tuple]) -> None:
    """compile_one(job) fills Triton's cache and returns what went wrong, which is printed."""
    begin = time.time()
    with get_context("spawn").Pool(min(len(jobs), os.cpu_count() or 1, WORKERS)) as pool:
        for i, error in enumerate(pool.imap_unordered(compile_one, jobs), 1):
            print(f"\rcompiled {i} of {len(jobs)} kernels", end="", file=sys.stderr)
            if error:
                print(f"\n  {error}", file=sys.stderr)
    print(f", {time.time() - begin:.0f} s", file=sys.stderr)


def one_line(config: object, e: Exception) -> str:
    """What went wrong with a configuration."""
    return f"{config}: {type(e).__name__}: {(str(e).splitlines() or [''])[0][:150]}"


Heads = tuple[int, int, int]  # query heads, KV heads, head size


def heads_of(text: str) -> Heads:
    try:
        heads, kv_heads, d = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 32x8x128") from None
    if min(heads, kv_heads) < 1 or heads % kv_heads or d not in HEAD_SIZES:
        raise argparse.ArgumentTypeError(f"{text}: KV heads must divide query heads, and D be one of {HEAD_SIZES}")
    return heads, kv_heads, d


def attention_parser(doc: str, batch_sizes: list[int]) -> argparse.ArgumentParser:
    parser = sweep_parser(doc)
    parser.add_argument("--heads", nargs="+", default=[], type=heads_of, metavar="HQxHKVxD")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=batch_sizes, metavar="B")
    return parser


def asked_heads(args: argparse.Namespace) -> list[Heads]:
    """Those of --heads and of --model, or else HEADS."""
    models = [model_config(model) for model in args.model]
    return list(dict.fromkeys([*args.heads, *((c.num_heads, c.num_kv_heads, c.head_dim) for c in models)] or HEADS))


def heads_facts(heads: Heads) -> dict:
    return dict(zip(("heads", "kv_heads", "D"), heads, strict=True))


def heads_name(heads: Heads) -> str:
    return f"{heads[0]}/{heads[1]} D{heads[2]}"


def choosing(module: ModuleType, config: object) -> AbstractContextManager:
    """In this context `module`'s pick_config chooses `config`."""
    return mock.patch.object(module, "pick_config", lambda *args, **kwargs: config)


def time_configs(
    attend: Callable, configs: Sequence, copies: Sequence[tuple], error_of: Callable, bound: float, machine: Machine
) -> list[dict]:
    """A row for each configuration for which error_of(config) is within `bound`; the first of them, pick_config's, is
    `picked`. Timed is attend(config, *copy) for all copies."""
    rows = []
    for config in configs:
        try:
            error = error_of(config)
            if not error <= bound:
                print(f"  {config} is wrong by {error:.2g}", file=sys.stderr)
                continue
            us = time_us([functools.partial(attend, config, *copy) for copy in copies], machine)
        except Exception as e:  # one that the GPU cannot launch
            print(f"  {one_line(config, e)}", file=sys.stderr)
            continue
        rows.append({"us": us, "max_rel_err": error, "picked": config == configs[0], "config": asdict(config)})
    return rows


@dataclass(frozen=True)
class SweepCase:
    """What one configuration has to serve in all batches. name and facts say what it is; sweep(batch) -> rows, those of
    time_configs and, with "impl" in place of "config", of others that were timed beside them."""

    name: str
    facts: dict
    sweep: Callable[[int], list[dict]]


def run_cases(cases: Sequence[SweepCase], args: argparse.Namespace, machine: Machine, begin: float) -> None:
    """Sweeps the cases in all --batch-sizes until --deadline. Prints a line for each and saves all rows in --out; the
    last line, JSON, has the best configuration of each case."""
    about = environment(machine)
    rows: list[dict] = []
    best = []
    for case in cases:
        of_all_batches: list[dict] = []
        for batch in args.batch_sizes:
            if time.time() - begin > args.deadline:
                print(f"{case.name} B {batch}: not reached", file=sys.stderr)
                continue
            found = [case.facts | {"B": batch, "dtype": args.dtype} | row for row in case.sweep(batch)]
            torch.cuda.empty_cache()  # of the graphs' pools
            of_all_batches += found
            print(f"{case.name} B {batch}: {summary(found)}", flush=True)
            save(args.out, about, rows + of_all_batches)
        rows += of_all_batches
        over_all = best_over_batches(of_all_batches)
        if over_all:
            sizes = sorted({row["B"] for row in of_all_batches})
            best.append(case.facts | {"batch_sizes": sizes} | over_all)
    print(json.dumps({"file": str(args.out), "seconds": round(time.time() - begin), "best": best}))


def best_over_batches(rows: list[dict]) -> dict | None:
    """Of the rows of one case: {"config", "picked", "gain"}, the gain over pick_config's in the geometric mean over
    batches. None where pick_config's was not timed in all of them."""
    batches = {row["B"] for row in rows}
    times: dict[str, dict] = {}
    for row in rows:
        if "config" in row:
            found = times.setdefault(json.dumps(row["config"]), {"picked": row["picked"], "us": {}})
            found["us"][row["B"]] = row["us"]
    means = {
        key: math.exp(sum(map(math.log, found["us"].values())) / len(batches))
        for key, found in times.items()
        if found["us"].keys() == batches
    }
    picked = next((key for key in means if times[key]["picked"]), None)
    if picked is None:
        return None
    best = min(means, key=means.__getitem__)
    gain = means[picked] / means[best] - 1
    return {"config": json.loads(best), "picked": json.loads(picked), "gain": round(gain, 3)}


def summary(rows: list[dict]) -> str:
    """Floor, the others' times, pick_config's, and the best four."""
    ours = [row for row in rows if "config" in row]
    if not ours:
        return "nothing could be timed"
    said = [f"{row['us']:.2f} {tuple(row['config'].values())}" for row in ours]
    others = [f"{row['impl']} {row['us']:.2f}" for row in rows if "config" not in row]
    now = said[0] if ours[0]["picked"] else "failed"
    best = sorted(range(len(ours)), key=lambda i: ours[i]["us"])[:4]
    return " | ".join([f"floor {rows[0]['floor_us']:.2f}", *others, f"now {now}", "; ".join(said[i] for i in best)])
