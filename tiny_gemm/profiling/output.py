"""What a profile leaves on disk: report, figures and TensorBoard log, in a directory that appears when it is whole."""

import importlib.util
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tiny_gemm.profiling.figures import FIGURES
from tiny_gemm.profiling.report import Report

_CONTENTS = {
    "trace.json.gz", "report.json", "tensorboard", "roofline.svg", "roofline.png", "timeline.svg", "timeline.png",
}  # fmt: skip
_HOW = "pip install 'tiny-gemm[profile]'"


def check_replaceable(directory: Path) -> None:
    """ValueError unless a profile may be put there: there is nothing, an empty directory, or an earlier profile."""
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise ValueError(f"{directory} exists and is not a directory")
    if directory.exists():
        contents = {path.name for path in directory.iterdir()}
        if contents and not {"report.json"} <= contents <= _CONTENTS:
            raise ValueError(f"{directory} is not empty and not an earlier profile; name another directory")


@contextmanager
def beside(directory: Path) -> Iterator[Path]:
    """A new directory to write into, which takes the place of `directory` if all goes well and vanishes if not."""
    check_replaceable(directory)
    final = directory.absolute()
    final.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    old = new.with_name(new.name + ".old")
    try:
        yield new
        check_replaceable(directory)
        umask = os.umask(0)
        os.umask(umask)
        new.chmod(0o777 & ~umask)
        if final.exists():
            final.rename(old)
        new.rename(final)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_all(report: Report, directory: Path) -> list[str]:
    """report.json, figures, TensorBoard's log. Returns what could not be written, and what to install for it."""
    (directory / "report.json").write_text(json.dumps(report.to_json()) + "\n")
    missing = []
    figures = {}
    if is_installed("matplotlib"):
        figures = {name: draw(report) for name, draw in FIGURES.items()}
        for name, figure in figures.items():
            for kind in ("svg", "png"):
                figure.savefig(directory / f"{name}.{kind}", dpi=150)
    else:
        missing.append(f"no figures: matplotlib is not installed; {_HOW}")
    if not write_tensorboard(report, figures, directory / "tensorboard"):
        missing.append(f"no scalars and figures for TensorBoard: tensorboard is not installed; {_HOW}")
    return missing


def write_tensorboard(report: Report, figures: dict, directory: Path) -> bool:
    """Scalars, text and figures for plain TensorBoard; False, and nothing written, where it is not installed."""
    if not is_installed("tensorboard"):
        return False
    from torch.utils.tensorboard import SummaryWriter

    step = report.step
    scalars = {
        "step/unprofiled_us": step.unprofiled_us,
        "step/tokens_per_s": step.tokens_per_s,
        "step/busy_percent": 100 * step.busy_fraction,
        "step/idle_us": step.idle_us,
        "step/kernels": step.kernels,
        "step/floor_us": step.floor_us,
    }
    for row in report.rows:
        verdict, kernel = f"verdict_percent/{row.verdict}", f"kernel_us_per_step/{row.label}"
        scalars[verdict] = scalars.get(verdict, 0) + 100 * row.share
        if kernel in scalars or len(scalars) < 40:
            scalars[kernel] = scalars.get(kernel, 0) + row.total_us / step.steps
    with SummaryWriter(str(directory)) as writer:
        for i, microseconds in enumerate(report.step_times_us):
            writer.add_scalar("step/time_us", microseconds, i)
        for name, value in scalars.items():
            if value is not None:
                writer.add_scalar(name, value, 0)
        writer.add_text("report", "```\n" + as_text(report) + "\n```")
        for name, figure in figures.items():
            writer.add_figure(name, figure)
    return True


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def as_text(report: Report, width: int = 132) -> str:
    """The report's table as plain text."""
    from rich.console import Console

    console = Console(width=width, color_system=None, file=io.StringIO())
    console.print(report.table())
    return console.file.getvalue()
