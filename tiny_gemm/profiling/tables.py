"""A Report, and the comparison of two, as tables for a terminal."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

import tiny_gemm.profiling.roofline as roofline
from tiny_gemm.profiling.names import FAMILIES, shorten

if TYPE_CHECKING:
    from tiny_gemm.profiling.report import Report, Row

_COLOURS = {
    roofline.LAUNCH: "red",
    roofline.LATENCY: "yellow",
    roofline.BANDWIDTH: "green",
    roofline.COMPUTE: "green",
    roofline.UNKNOWN: "dim",
}
_WIDE, _NARROW = 120, 76  # from the one on every figure has its place, from the other on what a small terminal shows
_SMALLEST_SHARE = 0.005  # of the time, that is worth a line of advice


@dataclass(frozen=True)
class ReportTable:
    """What Report.table gives rich to print; a narrow terminal gets fewer columns."""

    report: "Report"
    shown: int | None

    def __rich_console__(self, console, options) -> Iterator:
        report = self.report
        rows = report.rows if self.shown is None else report.rows[: self.shown]
        yield Text("\n".join(_headline(report)))
        yield _kernel_table(report, rows, options.max_width)
        if len(rows) < len(report.rows):
            rest = report.rows[len(rows) :]
            yield Text(f"and {len(rest)} more with {sum(r.share for r in rest):.1%} of the time", "dim")
        yield _advice(report.rows)
        for note in report.notes:
            yield Text(note, "dim")


def _kernel_table(report: "Report", rows: "list[Row]", width: int) -> Table:
    on_gpu, steps, wide, middling = report.processor == "gpu", report.step.steps, width >= _WIDE, width >= _NARROW
    columns = [  # heading, whether it is shown, cell
        ("calls", wide, lambda r: str(r.calls)),
        ("us each", middling, lambda r: f"{r.median_us:,.1f}"),
        ("us/step", True, lambda r: f"{r.total_us / steps:,.0f}"),
        ("share", wide, lambda r: f"{r.share:.1%}"),
        ("MB", wide, lambda r: _number(r.bytes and r.bytes / 1e6)),
        ("GB/s", wide, lambda r: _number(r.gbps)),
        ("% roof", True, lambda r: _percent(r.roof_fraction)),
        ("flop/B", wide, lambda r: _number(r.intensity)),
        ("gap us", True, lambda r: f"{r.gap_us if r.gap_us >= r.overlap_us else -r.overlap_us:,.1f}"),
        ("grid", wide and on_gpu, lambda r: r.grid_text or "-"),
        ("waves", on_gpu and middling, lambda r: _number(r.waves)),
    ]
    cells = {heading: [cell(row) for row in rows] for heading, shown, cell in columns if shown}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("kernel" if on_gpu else "op", no_wrap=True)
    for heading in cells:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    taken = sum(2 + max(map(len, (heading, *column))) for heading, column in cells.items())
    taken += 2 + max(map(len, ("verdict", *(row.verdict for row in rows))))
    distinct = report.distinct_labels()
    for i, row in enumerate(rows):
        name = shorten(row.label if wide else distinct[i], max(16, width - taken))
        table.add_row(Text(name), *(column[i] for column in cells.values()), Text(row.verdict, _COLOURS[row.verdict]))
    return table


def _headline(report: "Report") -> list[str]:
    s = report.step
    what = f"{s.steps} steps" if report.marked_steps else "no steps marked, all of it is one window"
    unit = "kernels" if report.processor == "gpu" else "calls"
    roof = f"{report.roof_gbps:,.0f} GB/s" if report.roof_gbps else "-"
    ridge = f", ridge {report.ridge:.0f} flop/B" if report.ridge else ""

    def rate(microseconds: float) -> str:
        if not report.marked_steps or not microseconds:
            return ""
        return f"{(s.tokens or 1) * 1e6 / microseconds:,.1f} {'tokens' if s.tokens else 'steps'}/s"

    lines = [
        f"{report.source}: {report.device}, {what}",
        f"memory roof {roof} ({report.roof_source}){ridge}",
        f"{'step' if report.marked_steps else 'window'} {s.step_us:,.1f} us: busy {s.busy_fraction:.0%}, "
        f"idle {s.idle_us:,.1f} us between {s.kernels:,.0f} {unit}",
    ]
    if s.unprofiled_us:
        lines[-1] += f"; {rate(s.step_us)} under the profiler, {rate(s.unprofiled_us)} without"
    elif report.marked_steps:
        lines[-1] += f"; {rate(s.step_us)}"
    if s.floor_us:
        reached = s.floor_us / (s.unprofiled_us or s.step_us)
        at_best = f", {rate(s.floor_us)}" if report.marked_steps else ""
        whose = f" (bytes known for {s.known_bytes:.0%} of the {unit}' time)" if s.floor_is_partial else ""
        lines.append(
            f"floor: {s.bytes / 1e6:,.1f} MB take {s.floor_us:,.1f} us at the roof{at_best}; "
            f"{reached:.1%} of that speed reached{whose}"
        )
    if s.longest_gap_us > 0.1 * s.step_us:
        lines.append(
            f"longest wait {s.longest_gap_us:,.1f} us, {s.longest_gap_us / s.step_us:.0%} of the "
            f"{'step' if report.marked_steps else 'window'}, before {shorten(s.longest_gap_before, 52)}"
        )
    lines.append(f"{s.verdict}: {s.reason}. {s.advice[:1].upper()}{s.advice[1:]}.\n")
    return lines


def _advice(rows: "list[Row]") -> Text:
    """One line for each different thing to do, with the kernels that it is about."""
    about: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        about[row.verdict, row.advice].append(row)
    text = Text("\n")
    for i, ((kind, advice), group) in enumerate(sorted(about.items(), key=lambda item: -sum(r.share for r in item[1]))):
        share, others = sum(r.share for r in group), len(group) - 1
        if i and share < _SMALLEST_SHARE:
            break
        text.append(f"{share:4.0%} ")
        text.append(kind, _COLOURS[kind])
        more = f", and {others} more" if others else ""
        text.append(f"  {shorten(group[0].label, 60)} ({group[0].reason}){more}\n      -> {advice}\n")
    return text


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if 0 < value < 0.01:
        return "<0.01"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def comparison(before: "Report", after: "Report") -> Table:
    """What changed from one report to the other: the step, then the kernels' time by family and by verdict."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("a step", overflow="fold")
    for heading in ("before", "after", "before / after"):
        table.add_column(heading, justify="right")

    def line(what: str, old: float | None, new: float | None, form: str = "{:,.1f}", ratio: bool = True) -> None:
        cells = ["-" if v is None else form.format(v) for v in (old, new)]
        table.add_row(what, *cells, f"{old / new:.2f}x" if ratio and old and new else "")

    if before.processor != after.processor:
        table.add_row(f"({before.processor.upper()} before, {after.processor.upper()} after: not of one kind)")
    a, b = before.step, after.step
    line("time, us", a.step_us, b.step_us)
    line("tokens/s", a.tokens_per_s, b.tokens_per_s, ratio=False)  # it would read the other way round
    line("busy", a.busy_fraction, b.busy_fraction, "{:.0%}", ratio=False)
    line("idle, us", a.idle_us, b.idle_us)
    line("kernels" if before.processor == "gpu" else "calls", a.kernels, b.kernels, "{:,.0f}")
    line("floor of its bytes, us", a.floor_us, b.floor_us, ratio=not (a.floor_is_partial or b.floor_is_partial))
    for when, step in (("before", a), ("after", b)):
        if step.floor_is_partial:
            table.add_row(f"  ({when}: bytes known for {step.known_bytes:.0%} of the time)")
    for heading, names, key in (
        ("kernels' time by work, us", FAMILIES, lambda r: r.family),
        ("kernels' time by verdict, us", roofline.VERDICTS, lambda r: r.verdict),
    ):
        table.add_row(Text(heading, "bold"))
        for name in names:
            old, new = (sum(r.total_us for r in x.rows if key(r) == name) / x.step.steps for x in (before, after))
            if old or new:
                line(f"  {name}", old, new)
    return table
