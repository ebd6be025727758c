"""Figures from the results of one GPU, from the JSON alone: SVG and PNG, each for a light and a dark page.

latency     one decode step against batch size and against sequence length: PyTorch, fused, fused + INT4
roof        how much of the memory roof each INT4 product reaches, by shape
speedup     Tiny-GEMM's time against each peer's, by shape
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks import report, results

WIDTH = 8.3  # inches: at 100 dots each, what a README is wide
THEMES = {
    "light": dict(
        page="#ffffff", ink="#1f2328", faint="#d1d9e0", colours=("#6e7781", "#0969da", "#cf5b0a", "#1a7f37", "#8250df")
    ),
    "dark": dict(
        page="#0d1117", ink="#e6edf3", faint="#3d444d", colours=("#9198a1", "#4493f8", "#f0883e", "#3fb950", "#ab7df8")
    ),
}
LINES = {
    "pytorch": "PyTorch, 16 bit",
    "tiny-gemm": "Tiny-GEMM fused, 16 bit",
    "tiny-gemm-int4": "Tiny-GEMM fused, INT4",
}
MARKS = {  # of a product: colour and marker
    "pytorch": (0, "o"), "aten-int4": (1, "s"), "tiny-gemm-int4": (2, "D"), "gemlite-int4": (3, "^"),
    "torch.compile": (4, "v"),
}  # fmt: skip


class TooLittle(Exception):
    """What the results lack for a figure."""


def draw(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """Draws what the results in `directory` have the rows for, into directory/plots: (the files that were written, why
    each other figure was not drawn).

    ValueError if there is nothing that any could be drawn from.
    """
    import matplotlib

    matplotlib.use("Agg")
    runs = [results.load(path) for path in sorted(Path(directory).glob("*.json")) if _is_result(path)]
    written, left_out = [], {}
    for name, (suite, figure) in FIGURES.items():
        found = [(env, row) for env, cases in runs for row in cases if row["suite"] == suite and row["us"] is not None]
        try:
            if not found:
                raise TooLittle(f"the suite {suite} has no times")
            for theme in THEMES:
                rows = [row for _, row in found]
                written += _save(Path(directory) / "plots", f"{name}-{theme}", theme, figure, rows, found[0][0])
        except TooLittle as e:
            left_out[name] = str(e)
    if not written:
        raise ValueError(f"{directory} has no results that a figure can be drawn from: {'; '.join(left_out.values())}")
    return written, left_out


def _is_result(path: Path) -> bool:
    return path.stem.partition("-")[0] in {suite for suite, _ in FIGURES.values()}


def _save(directory: Path, name: str, theme: str, figure: Callable, rows: list[dict], environment: dict) -> list[Path]:
    import matplotlib.pyplot as plt

    with _style(theme) as colours:
        drawn = figure(rows, colours)
        caption = f"{environment['gpu']}, torch {environment['torch']}, {environment['date']}"
        below_title = 1 - 0.27 / drawn.get_figheight()
        drawn.text(0.01, below_title, caption, ha="left", va="top", fontsize=8, alpha=0.75)
        directory.mkdir(parents=True, exist_ok=True)
        paths = [directory / f"{name}.{kind}" for kind in ("svg", "png")]
        for path in paths:  # no date inside, so that a figure changes only with its data
            drawn.savefig(path, dpi=200, metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(drawn)
    return paths


@contextmanager
def _style(theme: str) -> Iterator[tuple[str, ...]]:
    import matplotlib

    t = THEMES[theme]
    ink = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor")
    settings = dict.fromkeys(ink, t["ink"]) | dict.fromkeys(("axes.edgecolor", "grid.color"), t["faint"])
    settings |= dict.fromkeys(
        ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), t["page"]
    )
    settings |= {"font.size": 10, "axes.titlesize": 10.5, "axes.grid": True, "axes.axisbelow": True}
    settings |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "svg.hashsalt": "tiny"}
    with matplotlib.rc_context(settings):
        yield t["colours"]


def latency(rows: list[dict], colours: tuple[str, ...]):
    """Milliseconds a decode step of the model with the most points, the band from p20 to p80; a panel for each sweep
    that has two points or more."""
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["impl"] in LINES]
    counts = {model: sum(row["model"] == model for row in rows) for model in {row["model"] for row in rows}}
    if not counts:
        raise TooLittle(f"the suite decode has no times of {', '.join(LINES)}")
    model = max(sorted(counts), key=counts.get)
    rows = [row for row in rows if row["model"] == model]
    panels = []
    for label, x, fixed in (("batch size", "B", "L"), ("sequence length (tokens attended to)", "L", "B")):
        at = _most_common(rows, fixed, x)
        points = [row for row in rows if row[fixed] == at]
        if len({row[x] for row in points}) > 1:
            panels.append((label, x, f"{'sequence length' if fixed == 'L' else 'batch size'} {at}", points))
    if not panels:
        raise TooLittle(f"the suite decode has one batch size and one sequence length of {model}, and a line needs two")
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, 3.6), sharey=True, squeeze=False, layout="constrained")
    for axis, (label, x, title, points) in zip(axes[0], panels, strict=True):
        for colour, (impl, name) in zip(colours, LINES.items(), strict=False):
            line = {row[x]: row for row in points if row["impl"] == impl}
            xs = sorted(line)
            axis.plot(xs, [line[i]["us"] / 1e3 for i in xs], marker="o", ms=4, color=colour, label=name)
            low, high = ([line[i][key] / 1e3 for i in xs] for key in ("us_p20", "us_p80"))
            axis.fill_between(xs, low, high, color=colour, alpha=0.2, lw=0)
        axis.set_xscale("log", base=2)
        ticks = sorted({row[x] for row in points})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set_xlabel(label)
        axis.set_title(title, loc="left")
    axes[0][0].set_ylim(bottom=0)
    axes[0][0].set_ylabel("milliseconds a step")
    _title(figure, f"One decode step of {model}: lower is better")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower left", ncols=3)
    return figure


def _title(figure, text: str) -> None:
    figure.suptitle(f"{text}\n", x=0.01, ha="left", fontsize=12, weight="bold")  # the caption stands on the second line


def _most_common(rows: list[dict], key: str, over: str) -> int:
    """The value of `key` at which the most values of `over` were measured; the smallest of several."""
    values = {row[key] for row in rows}
    return min(values, key=lambda value: (-len({row[over] for row in rows if row[key] == value}), value))


def roof(rows: list[dict], colours: tuple[str, ...]):
    """A line a shape, a mark an implementation: the fraction of the streaming-read roof, at 1 and 8 rows."""
    return _by_shape(
        rows,
        colours,
        lambda case, row: row["roof_fraction"] * 100 if row["impl"].endswith("int4") else None,
        "INT4 products, y = x Wᵀ: how much of the memory roof they reach",
        "% of the roof: higher is better",
        (0, 100),
    )


def speedup(rows: list[dict], colours: tuple[str, ...]):
    """A line a shape, a mark a peer: its time over Tiny-GEMM's, at 1 and 8 rows."""

    def ratio(case: list[dict], row: dict) -> float | None:
        ours = report.best(case, ours=True)
        return None if ours is None or report.is_ours(row) else row["us"] / ours["us"]

    title = "INT4 product of Tiny-GEMM: how many times faster than its peers"
    return _by_shape(rows, colours, ratio, title, "a peer's time / Tiny-GEMM's; 1: the same", None)


def _by_shape(rows: list[dict], colours, value: Callable, title: str, label: str, limits: tuple[float, float] | None):
    """Shapes from the smallest to the largest, of each group size and dtype by themselves."""
    import matplotlib.pyplot as plt

    panels = {m: [row for row in rows if row["M"] == m] for m in (1, 8)}
    panels = {m: report.by_case(panel) for m, panel in panels.items() if panel}
    if not panels:
        raise TooLittle("the suite gemm has no times at M = 1 or 8")
    drawn = [case for cases in panels.values() for case in cases.values()]
    names = list(dict.fromkeys(_shape(case) for case in sorted(drawn, key=_order)))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(WIDTH, 1.7 + 0.24 * len(names)), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    seen = {}
    for axis, (m, cases) in zip(axes[0], panels.items(), strict=True):
        for case in cases.values():
            for row in case:
                x = value(case, row)
                if x is None:
                    continue
                colour, marker = MARKS.get(row["impl"], (4, "x"))
                y = names.index(_shape(case))
                seen[row["impl"]] = axis.scatter(
                    x, y, color=colours[colour], marker=marker, s=34, label=row["impl"], lw=0.7,
                    edgecolor=plt.rcParams["axes.facecolor"], zorder=4 if report.is_ours(row) else 3,
                )  # fmt: skip
        axis.set_yticks(range(len(names)), names, fontsize=8.5)
        axis.tick_params(axis="y", length=0)
        axis.set_title(f"M = {m}", loc="left")
        axis.set_xlabel(label, fontsize=9)
        axis.grid(alpha=0.6)
        if limits:
            axis.set_xlim(*limits)
        else:
            axis.axvline(1, color=plt.rcParams["text.color"], lw=1)
            axis.set_xlim(0, 1.04 * axis.dataLim.x1)
    axes[0][0].set_ylim(len(names) - 0.4, -0.6)
    axes[0][0].set_ylabel("K × N, group size", fontsize=9)
    _title(figure, title)
    marks = [impl for impl in dict.fromkeys((*MARKS, *seen)) if impl in seen]
    figure.legend([seen[impl] for impl in marks], marks, loc="outside lower left", ncols=len(marks), handletextpad=0.1)
    return figure


def _order(case: list[dict]) -> tuple:
    row = case[0]
    return row["dtype"] != "bfloat16", "zeros" in row["shape"], -row["group_size"], row["K"] * row["N"], row["shape"]


def _shape(case: list[dict]) -> str:
    row = case[0]
    dtype = "" if row["dtype"] == "bfloat16" else f" {row['dtype']}"
    return f"{row['model'] or ''} {row['shape'].replace('x', ' × ')}, g{row['group_size']}{dtype}".strip()


FIGURES = {"latency": ("decode", latency), "roof": ("gemm", roof), "speedup": ("gemm", speedup)}  # name: suite, drawing
