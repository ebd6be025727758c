#!/usr/bin/env python
"""Benchmarks Tiny-GEMM beside what exists: INT4 GEMM, attention, feed-forward, norm, and the whole decode step.

    python benchmark_fused_transformer.py                               all suites; results/<gpu>/<suite>.json
    python benchmark_fused_transformer.py --suite gemm --model Llama-3.1-8B
    python benchmark_fused_transformer.py --suite decode --mode batch_size --batch-sizes 1 2 4 8
    python benchmark_fused_transformer.py --suite gemm --compare benchmarks/results/nvidia-h100-80gb-hbm3/gemm.json
    python benchmark_fused_transformer.py --load NEW.json --compare OLD.json
    python benchmark_fused_transformer.py --plot benchmarks/results/nvidia-h100-80gb-hbm3

Tables go to stdout, progress to stderr; the last line of stdout is one JSON object. Ctrl-C keeps what was measured.
Exit code 1: one of this project's own arms was wrong or failed, or a case could not be built; 2: a mistake in the
arguments; 130: interrupted. benchmarks/ has the parts, docs/benchmarks.md the method.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import attention, decode, ffn, gemm, norm, report, results
from benchmarks.cases import DTYPES, Case, Options, run_case
from benchmarks.presets import PRESETS
from benchmarks.timing import Machine, measure_machine

SUITES: dict[str, Callable[[Options, Machine], list[Case]]] = {
    suite.__name__.rpartition(".")[2]: suite.cases for suite in (gemm, norm, ffn, attention, decode)
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--suite", nargs="+", default=["all"], choices=["all", *SUITES], help="default: all")
    add("--model", nargs="+", default=[], choices=PRESETS, metavar="PRESET", help=f"shapes of {', '.join(PRESETS)}")
    add("--mode", choices=["seq_length", "batch_size"], help="sweep one of them")
    add("--seq-lengths", type=positive, nargs="+", default=[], metavar="L")
    add("--batch-sizes", type=positive, nargs="+", default=[], metavar="B", help="for gemm, ffn and norm: rows M")
    add("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    add("--impl", nargs="+", default=["*"], metavar="PATTERN", help="only these arms, such as 'tiny-gemm*' pytorch")
    add("--quick", action="store_true", help="a few small cases; what a CPU gets unless --model says otherwise")
    add("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, metavar="DIR", help="where the JSON goes; default, for a whole run on a GPU: results/<gpu>")
    add("--deadline", type=float, metavar="SECONDS", help="cases not begun by then become rows that say so")
    add("--compare", type=Path, metavar="OLD", help="a result, or a directory of them, to compare with")
    add("--load", type=Path, metavar="NEW", help="show, and compare, a result or a directory of them; measures nothing")
    add("--plot", type=Path, metavar="DIR", help="draw figures from the results in DIR; measures nothing")
    add("--git-sha", help="the commit, for a copy of the code that is no git checkout")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not (args.load or args.plot or torch.cuda.is_available()):
        parser.error("--device cuda: torch finds no GPU here")
    return args


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)
    try:  # what is to be read, and where it is to be written: before anything is measured
        if args.plot:
            from benchmarks import plots

            drawn, left_out = plots.draw(args.plot)
            for name, why in left_out.items():
                print(f"no figure {name!r}: {why}", file=sys.stderr)
            print(json.dumps({"plots": [str(path) for path in drawn], "not_drawn": left_out}))
            return 0
        old = load(args.compare) if args.compare else {}
        loaded = load(args.load) if args.load else {}
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError, ImportError) as e:
        return mistake(str(e))
    summary = {}
    if args.load:
        runs = rows_of(loaded)
        for name, rows in runs.items():
            report.show(console, name, rows)
    else:
        with torch.no_grad():
            runs, summary = run(args, console)
    rows, interrupted = together(runs), summary.get("interrupted", False)
    if not rows and not interrupted:
        return mistake(f"no arm has a name like {' or '.join(args.impl)}")
    summary["suites"] = {name: digest(run_rows) for name, run_rows in runs.items()}
    if args.compare:
        before, after = rows_of(old), runs
        if not args.load:
            after = {stem(suite, args): run_rows for suite, run_rows in runs.items()}
            if args.compare.is_dir():  # which may have suites that nobody asked for
                before = {name: found for name, found in before.items() if name.partition("-")[0] in runs}
        new = [environment for environment, _ in loaded.values()] or [summary["environment"]]
        name_runs(console, [environment for environment, _ in old.values()], new)
        summary["compared"] = compare(console, after, before)
    print(json.dumps(summary))
    if interrupted:
        return 130
    bad = [row for row in rows if row.get("error", "").startswith(("failed", "refused"))]
    return int(any(report.is_ours(row) or row["impl"] == "case" for row in bad))


def mistake(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def run(args: argparse.Namespace, console: Console) -> tuple[dict[str, list[dict]], dict]:
    """(rows of each suite, summary); each suite is shown and saved as soon as it is finished, or interrupted."""
    begin = time.perf_counter()
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    torch.manual_seed(0)
    quick = args.quick or (device.type == "cpu" and not args.model)
    options = Options(
        models=tuple(args.model),
        mode=args.mode,
        seq_lengths=tuple(args.seq_lengths),
        batch_sizes=tuple(args.batch_sizes),
        dtype=DTYPES[args.dtype],
        quick=quick,
    )
    machine = measure_machine(device)
    environment = results.environment(machine, args.git_sha)
    console.print(headline(environment), highlight=False, markup=False)
    out = args.out
    whole = args.impl == ["*"] and args.dtype == "bfloat16" and not quick
    if not args.mode and (args.batch_sizes or args.seq_lengths):
        whole = False
    if out is None and machine.is_cuda and whole:  # a part must not replace the whole's file
        out = results.DIRECTORY / results.slug(environment)
    runs, files, interrupted = {}, [], False
    for suite in SUITES if "all" in args.suite else dict.fromkeys(args.suite):
        cases, found = SUITES[suite](options, machine), []
        try:
            for case in progress(suite, cases):
                if args.deadline is not None and time.perf_counter() - begin > args.deadline:
                    found.append([case.row("case", error=f"not reached: {args.deadline:g} s had passed")])
                else:
                    found.append(run_case(case, machine, args.impl))
        except KeyboardInterrupt:
            interrupted = True
        rows = [row for case_rows in found for row in case_rows]
        if interrupted and not any(row["us"] for row in rows):
            break  # nothing to keep: an older result of this suite stays as it is
        rows += [case.row("case", error="not reached: interrupted") for case in cases[len(found) :]]
        runs[suite] = rows
        report.show(console, suite, rows)
        if out is not None:
            files.append(out / f"{stem(suite, args)}.json")
            results.save(files[-1], environment, rows)
        if interrupted:
            break
        release(machine)  # last: after an illegal access on the device it raises, and the rows that say so are saved
    seconds = round(time.perf_counter() - begin, 1)
    summary = {"environment": environment, "files": [str(path) for path in files], "seconds": seconds}
    return runs, summary | ({"interrupted": True} if interrupted else {})


def stem(suite: str, args: argparse.Namespace) -> str:
    """What a suite's result is called."""
    return "-".join([suite, *args.model, *([args.mode] if args.mode else [])])


def release(machine: Machine) -> None:
    """Gives back what a suite has left on the device, compiled models included."""
    torch._dynamo.reset()
    for cached in (gemm.weights, ffn.weights, decode.models):
        cached.cache_clear()
    gc.collect()
    if machine.is_cuda:
        torch.cuda.empty_cache()


def headline(environment: dict) -> str:
    if environment["driver"] is None:
        what = "No GPU: these are the CPU implementations, timed by the wall clock, on few and small cases."
    else:
        clocks = environment["clocks"] or {}
        clocks = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in clocks.items())
        what = f"NVIDIA driver {environment['driver']}; at the start: {clocks or 'clocks not known'}."
    roof = f"Roof, measured now: {environment['roof_gbps']:,.0f} GB/s read, {environment['roof_tflops']:,.1f} TFLOP/s."
    return f"{environment['gpu']}, torch {environment['torch']}, triton {environment['triton']}. {what}\n{roof}"


def progress(suite: str, cases: list[Case]) -> Iterator[Case]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(suite, total=len(cases))
        for case in cases:
            bar.update(task, description=case.label)
            yield case
            bar.advance(task)


def digest(rows: list[dict]) -> dict:
    """What a script wants to know of a suite: how many cases and gaps, and the speed against the best peer."""
    ratios = sorted(filter(None, map(report.speedup, report.by_case(rows).values())))
    return {
        "cases": len(report.by_case(rows)),
        "rows": len(rows),
        "not_measured": sum("error" in row for row in rows),
        "median_speedup_over_best_peer": round(ratios[len(ratios) // 2], 3) if ratios else None,
    }


def result_files(path: Path) -> Iterable[Path]:
    """The results in a directory (other JSON files are passed over), or the one file."""
    if not path.is_dir():
        return [path]
    return [file for file in sorted(path.glob("*.json")) if file.stem.partition("-")[0] in SUITES]


def together(runs: dict[str, list[dict]]) -> list[dict]:
    return [row for rows in runs.values() for row in rows]


def load(path: Path) -> dict[str, tuple[dict, list[dict]]]:
    """(environment, rows) of each result in a directory, or of the one file."""
    found = {file.stem: results.load(file) for file in result_files(path)}
    if not any(rows for _, rows in found.values()):
        raise ValueError(f"{path} has no results")
    return found


def rows_of(found: dict[str, tuple[dict, list[dict]]]) -> dict[str, list[dict]]:
    return {stem: rows for stem, (_, rows) in found.items()}


def name_runs(console: Console, old: list[dict], new: list[dict]) -> None:
    """Says what is compared with what, and where the ratios are not those of two versions of the code."""
    for which, environments in (("old", old), ("new", new)):
        for line in dict.fromkeys(map(origin, environments)):
            console.print(f"{which}: {line}", highlight=False, markup=False)
    for what in ("gpu", "torch"):
        values = sorted({str(e.get(what)) for e in (*old, *new)})
        if len(values) > 1:
            console.print(f"Not of one {what}: {', '.join(values)}. The ratios are also theirs.", style="yellow")


def origin(environment: dict) -> str:
    facts = (f"commit {environment.get('git_sha')}", f"torch {environment.get('torch')}", environment.get("date"))
    return ", ".join(str(fact) for fact in (environment.get("gpu"), *facts))


def compare(console: Console, runs: dict[str, list[dict]], before: dict[str, list[dict]]) -> dict:
    """Prints what moved, and what only one of them has; returns how often each verdict was found.

    A result is compared with the old one of its name, and where there is none with all old ones: two of a suite, a
    sweep beside the whole, have cases in common.
    """
    changes = [
        change for name, rows in runs.items() for change in results.compare(rows, before.get(name) or together(before))
    ]
    console.print(report.change_table(changes))
    new, old = together(runs), together(before)
    for line in report.only_in("old run", old, new) + report.only_in("new run", new, old):
        console.print(f"  {line}", style="dim", highlight=False, markup=False)
    verdicts = [change.verdict for change in changes]
    return {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before the first case, or a second time
        sys.exit(130)
