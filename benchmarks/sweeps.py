"""What the sweeps share: options, compilation by all processors side by side."""

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Collection
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks.presets import PRESETS

WORKERS = 16  # at most: each has a CUDA context, half a gigabyte


def sweep_parser(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=[], choices=PRESETS, metavar="PRESET")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="a third of the configurations or less")
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
