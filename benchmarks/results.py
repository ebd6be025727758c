"""The JSON of a run: {"environment": {...}, "cases": [row, ...]}, one file a suite, and the comparison of two."""

import datetime
import importlib.metadata
import json
import math
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.timing import Machine

DIRECTORY = Path(__file__).resolve().parent / "results"
IDENTITY = ("suite", "model", "shape", "impl", "M", "B", "L", "K", "N", "group_size", "dtype")
REQUIRED = ("suite", "model", "shape", "impl", "dtype")  # of every row
TIMED = ("us", "us_p20", "us_p80", "floor_us", "roof_fraction")  # of every row that was timed: positive
SMALLEST_CHANGE = 0.02  # of a time; less is noise, however narrow the percentiles


def environment(machine: Machine, git_sha: str | None = None) -> dict:
    """What a figure depends on besides the code."""
    on_gpu = machine.is_cuda
    clocks = _nvidia_smi("clocks.sm,clocks.max.sm,clocks.mem,power.limit") if on_gpu else None
    return {
        "gpu": torch.cuda.get_device_name(machine.device) if on_gpu else f"none; CPU: {_cpu_name()}",
        "driver": (_nvidia_smi("driver_version") or [None])[0] if on_gpu else None,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "gemlite": _version("gemlite"),
        "python": platform.python_version(),
        "clocks": None if not clocks else dict(zip(("sm", "sm_max", "memory", "power_limit"), clocks, strict=False)),
        "git_sha": git_sha or _git_sha(),
        "date": datetime.date.today().isoformat(),
        "roof_gbps": round(machine.roof_gbps, 1),
        "roof_tflops": round(machine.roof_tflops, 2),
        "l2_bytes": machine.l2_bytes,
    }


def slug(environment: dict) -> str:
    """The name of a GPU's directory: nvidia-h200 for NVIDIA H200."""
    return re.sub(r"[^a-z0-9]+", "-", environment["gpu"].lower()).strip("-")


def save(path: Path, environment: dict, cases: list[dict]) -> None:
    """One case a line, so that a diff of two runs can be read. An older file stays whole until it is replaced. An
    infinite max_rel_err, which JSON cannot say, becomes null: the row's error has it in words."""
    rounded = [{k: _rounded(v) if isinstance(v, float) else v for k, v in row.items()} for row in cases]
    lines = ",\n".join("  " + json.dumps(row) for row in rounded)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(f'{{"environment": {json.dumps(environment, indent=1)},\n "cases": [\n{lines}\n]}}\n')
    beside.replace(path)


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None


def load(path: Path) -> tuple[dict, list[dict]]:
    """(environment, cases); a file that is not a result is a ValueError."""
    try:
        data = json.loads(Path(path).read_text(), parse_constant=_refuse_constant)
        rows = data["cases"]
        data["environment"].items()
        for row in rows:
            for key in REQUIRED if row["us"] is None else REQUIRED + TIMED:
                row[key]
            if row["us"] is not None and not all(0 < row[key] < math.inf for key in TIMED):
                raise ValueError(f"a time or a floor of {row['impl']} is not a positive number")
        return data["environment"], rows
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise ValueError(f"{path} is not a benchmark result: {type(e).__name__}: {e}") from e


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


@dataclass(frozen=True)
class Change:
    """One arm of one case that two runs have. ratio: new over old; None where one of them has no time."""

    row: dict
    old: dict
    ratio: float | None
    verdict: str  # "same", "faster", "slower"; "no longer measured", "now measured"


def identity(row: dict) -> tuple:
    return tuple(row.get(key) for key in IDENTITY)


def compare(new: list[dict], old: list[dict]) -> list[Change]:
    """What both have; report.only_in says what one of them has alone. A time has moved if it did so by more than the
    noise: the wider of both runs' p20 to p80, and at least 2 %."""
    before = {identity(row): row for row in old}
    changes = []
    for row in new:
        was = before.get(identity(row))
        if was is None:
            continue
        if row["us"] is None or was["us"] is None:
            verdict = "same" if row["us"] == was["us"] else "now measured" if row["us"] else "no longer measured"
            changes.append(Change(row, was, None, verdict))
        else:
            spread = max(r["us_p80"] - r["us_p20"] for r in (row, was))
            moved = row["us"] - was["us"]
            still = abs(moved) <= max(spread, SMALLEST_CHANGE * was["us"])
            verdict = "same" if still else "slower" if moved > 0 else "faster"
            changes.append(Change(row, was, row["us"] / was["us"], verdict))
    return changes


def _nvidia_smi(fields: str) -> list[str] | None:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", "0"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return [part.strip() for part in run.stdout.strip().split(",")] if run.returncode == 0 else None


def _git_sha() -> str | None:
    """The commit, with "-dirty" where tracked files differ from it; None outside a git checkout."""
    git = ["git", "-C", str(DIRECTORY.parent)]
    try:
        sha = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=20)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if sha.returncode else sha.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
