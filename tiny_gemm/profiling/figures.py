"""The roofline plot and the timeline of one step, from a Report alone. Needs matplotlib."""

import math
from typing import TYPE_CHECKING

import numpy as np

from tiny_gemm.profiling.names import FAMILIES, shorten
from tiny_gemm.profiling.report import Report, Row, TimelineEvent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = dict(
    zip(FAMILIES, ("#0072b2", "#56b4e9", "#d55e00", "#009e73", "#e69f00", "#999999", "#444444"), strict=True)
)
_INK = "#222222"
SIZE = 8.0, 4.8  # inches, which is 800 pixels wide at 100 dots an inch
_LABELLED = 8
_BINS = 700  # of a strip: a pixel each
_ENLARGED = 20  # kernels


def roofline(report: Report) -> "Figure":
    """Each kernel of known cost by arithmetic intensity and flops, under the roofs; its area is its share of time."""
    from matplotlib.figure import Figure

    figure = Figure(SIZE, layout="constrained")
    axes = figure.add_subplot()
    named = [pair for pair in zip(report.rows, report.distinct_labels(), strict=True) if _is_drawn(pair[0])]
    rows = [row for row, _ in named]
    axes.set(xscale="log", yscale="log", xlabel="arithmetic intensity, flop/byte", ylabel="TFLOP/s")
    axes.set_title(f"Roofline: {report.device}", loc="left", fontsize=11)
    axes.grid(True, which="major", color="#e5e5e5", linewidth=0.6)
    if not rows:
        axes.text(
            0.5, 0.5, "no kernel with known bytes and flops", transform=axes.transAxes, ha="center", color="#777777"
        )
        return figure
    # Whole decades around the kernels and, if it is known, the ridge.
    intensities, speeds = [r.intensity for r in rows], [r.tflops for r in rows]
    if report.ridge:
        intensities, speeds = [*intensities, report.ridge], [*speeds, report.peak_tflops]
    (left, right), (bottom, top) = _decades(intensities), _decades(speeds)
    if report.roof_gbps:
        _draw_roofs(axes, report, left, right, bottom)
    for row in rows:
        size = 25 + 900 * row.share
        axes.scatter(row.intensity, row.tflops, s=size, color=_COLOURS[row.family], alpha=0.75, linewidth=0)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(lambda value, _: "")
    _label(axes, sorted(named, key=lambda pair: -pair[0].share)[:_LABELLED])
    _legend(axes, {r.family for r in rows}, loc="upper left")
    return figure


def _is_drawn(row: Row) -> bool:
    return bool(row.intensity and row.tflops)


def _decades(values: list[float]) -> tuple[float, float]:
    return 10 ** math.floor(math.log10(min(values) / 2)), 10 ** math.ceil(math.log10(max(values) * 2))


def _draw_roofs(axes, report: Report, left: float, right: float, bottom: float) -> None:
    style = {"textcoords": "offset points", "fontsize": 8, "color": _INK}
    roof, peak = report.roof_gbps / 1e3, report.peak_tflops  # TB/s, TFLOP/s
    end = report.ridge or right
    axes.plot([left, end], [left * roof, end * roof], color=_INK, linewidth=1.3)
    x = left * (end / left) ** 0.45
    text = f"{report.roof_gbps:,.0f} GB/s, {report.roof_source}"
    axes.annotate(text, (x, x * roof), xytext=(0, 5), ha="right", **style)
    if peak:
        axes.plot([end, right], [peak, peak], color=_INK, linewidth=1.3)
        axes.plot([end, end], [bottom, peak], color=_INK, linewidth=0.8, linestyle=":")
        axes.annotate(f"{peak:,.0f} TFLOP/s (datasheet)", (right, peak), xytext=(-4, 5), ha="right", **style)
        axes.annotate(f"ridge {end:,.0f}", (end, bottom), xytext=(4, 5), **style)


def _label(axes, rows: list[tuple[Row, str]]) -> None:
    """Names beside the points, towards the middle, moved apart until none covers another."""
    axes.figure.draw_without_rendering()
    place, middle = axes.transData.transform, axes.transAxes.transform((0.6, 0))[0]
    taken: list[float] = []
    for row, label in sorted(rows, key=lambda pair: -pair[0].tflops):
        x, y = place((row.intensity, row.tflops))
        wanted = y
        while any(abs(wanted - other) < 13 for other in taken):
            wanted -= 2
        taken.append(wanted)
        side = 1 if x < middle else -1
        axes.annotate(
            f"{shorten(label, 36)}  {row.share:.0%}", (row.intensity, row.tflops),
            xytext=(26 * side, (wanted - y) * 72 / axes.figure.dpi), textcoords="offset points", fontsize=7.5,
            va="center", ha="left" if side > 0 else "right",
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "#999999"},
        )  # fmt: skip


def timeline(report: Report) -> "Figure":
    """One step: a strip over all of it, and a few kernels of it enlarged, where the gaps can be seen."""
    from matplotlib.figure import Figure

    figure = Figure((SIZE[0], 3.6), layout="constrained")
    events = report.timeline
    end = max((e.start_us + e.duration_us for e in events), default=0.0) or 1.0
    views = [(0.0, end)] if len(events) < 2 * _ENLARGED else [(0.0, end), _typical(events)]
    lanes = {s: n for n, s in enumerate(sorted({e.stream for e in events}))}
    noun, label = ("kernels", "stream") if report.processor == "gpu" else ("calls", "thread")
    for i, (first, last) in enumerate(views):
        axes = figure.add_subplot(len(views), 1, i + 1)
        shown = [e for e in events if e.start_us < last and e.start_us + e.duration_us > first]
        pixel = (last - first) / _BINS
        draw = _draw_shares if len(shown) > _ENLARGED and _median(e.duration_us for e in shown) < pixel else _draw_bars
        for stream, lane in lanes.items():
            draw(axes, report, [e for e in shown if e.stream == stream], lane, first, last)
        axes.set(
            xlim=(first, last), ylim=(len(lanes) - 0.4, -0.6), xlabel="microseconds" if i == len(views) - 1 else ""
        )
        axes.set_yticks(range(len(lanes)), [f"{label} {s}" for s in lanes], fontsize=8)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        title = f"{len(shown)} {noun} of it"
        if i == 0:
            s = report.step
            title = f"One step on {report.device}: busy {s.busy_fraction:.0%}, {s.kernels:,.0f} {noun}"
        what = "height: share of the time" if draw is _draw_shares else "white is idle"
        axes.set_title(f"{title}; {what}", loc="left", fontsize=9 if i else 11)
    _legend(figure, {report.rows[e.row].family for e in events}, loc="outside lower center", ncols=len(FAMILIES))
    return figure


def _median(values) -> float:
    return float(np.median(list(values)))


def _typical(events: list[TimelineEvent]) -> tuple[float, float]:
    """Where a stretch of _ENLARGED kernels begins and ends that is neither the quickest nor the slowest of the step."""
    starts = sorted(e.start_us for e in events)
    stretches = [(starts[i + _ENLARGED] - starts[i], i) for i in range(len(starts) - _ENLARGED)]
    _, i = sorted(stretches)[len(stretches) // 2]
    return starts[i], starts[i + _ENLARGED]


def _draw_bars(axes, report: Report, events: list[TimelineEvent], lane: int, first: float, last: float) -> None:
    for family in FAMILIES:
        bars = [(e.start_us, e.duration_us) for e in events if report.rows[e.row].family == family]
        axes.broken_barh(bars, (lane - 0.4, 0.8), color=_COLOURS[family], linewidth=0, snap=False)


def _draw_shares(axes, report: Report, events: list[TimelineEvent], lane: int, first: float, last: float) -> None:
    """For kernels shorter than a pixel: how much of each pixel's time they take, stacked by family."""
    edges = np.linspace(first, last, _BINS + 1)
    base = np.full(_BINS, lane + 0.4)
    for family in FAMILIES:
        its = [e for e in events if report.rows[e.row].family == family and e.duration_us]
        spans = sorted((e.start_us, e.start_us + e.duration_us) for e in its)  # of one stream: they do not overlap
        if not spans:
            continue
        times = np.array(spans).ravel()  # start, end, start, end, ...
        worked = np.repeat(np.cumsum(times[1::2] - times[::2]), 2)
        worked[::2] -= times[1::2] - times[::2]
        share = np.diff(np.interp(edges, times, worked)) / (edges[1] - edges[0])
        axes.fill_between(edges[:-1], base, base - 0.8 * share, step="post", color=_COLOURS[family], linewidth=0)
        base = base - 0.8 * share


def _legend(on, families: set[str], **place) -> None:
    from matplotlib.patches import Patch

    patches = [Patch(color=_COLOURS[f], label=f) for f in FAMILIES if f in families]
    if patches:
        on.legend(handles=patches, fontsize=7.5, frameon=False, handlelength=1, **place)


FIGURES = {"roofline": roofline, "timeline": timeline}
