"""Tables: a line a case, a column an implementation; what was not measured says why below."""

from collections import Counter

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.cases import OURS
from benchmarks.results import IDENTITY, Change

LOOK = dict(title_justify="left", title_style="bold", pad_edge=False, box=box.SIMPLE_HEAD)
CASE = [key for key in IDENTITY if key != "impl"]


def by_case(rows: list[dict]) -> dict[tuple, list[dict]]:
    cases: dict[tuple, list[dict]] = {}
    for row in rows:
        cases.setdefault(tuple(row.get(key) for key in CASE), []).append(row)
    return cases


def is_ours(row: dict) -> bool:
    return row["impl"].startswith(OURS)


def best(rows: list[dict], *, ours: bool) -> dict | None:
    """The fastest row of this project, or of its peers; one timed by the wall clock only where there is no other."""
    timed = [row for row in rows if is_ours(row) == ours and row["us"] is not None]
    graphs = [row for row in timed if row.get("timing") == "graph"]
    return min(graphs or timed, key=lambda row: row["us"], default=None)


def speedup(rows: list[dict]) -> float | None:
    """The best peer's time over this project's best; None where one is missing."""
    ours, peer = best(rows, ours=True), best(rows, ours=False)
    return None if ours is None or peer is None else peer["us"] / ours["us"]


def suite_table(suite: str, rows: list[dict]) -> Table:
    """us a call of every arm; floor and roof are those of this project's fastest arm."""
    impls = [impl for impl in dict.fromkeys(row["impl"] for row in rows) if impl != "case"]
    table = Table(title=f"{suite}: microseconds", **LOOK)
    table.add_column("case")
    for column in [*impls, "floor", "roof", "x peer"]:
        table.add_column(column, justify="right", overflow="fold")
    for case in by_case(rows).values():
        first, cells = case[0], {row["impl"]: row for row in case}
        quickest, ours, ratio = best(case, ours=False), best(case, ours=True), speedup(case)
        line = [case_name(first)]
        for impl in impls:
            row = cells.get(impl, cells.get("case"))
            line.append(_time(row, bold=row is not None and row in (quickest, ours)))
        line += ["", "", ""] if ours is None else [number(ours["floor_us"]), f"{ours['roof_fraction']:.0%}", ""]
        if ratio is not None:
            line[-1] = Text(f"{ratio:.2f}", style="green" if ratio >= 1 else "red")
        table.add_row(*line)
    return table


def case_name(row: dict) -> str:
    """4096x4096 M 8 g128; a dtype other than bfloat16 is named."""
    parts = [row["model"], row["shape"]]
    parts += [f"{key} {row[key]}" for key in ("M", "B", "L") if row.get(key) is not None and row["suite"] != "decode"]
    if row["suite"] == "gemm":
        parts.append(f"g{row['group_size']}")
    return " ".join(str(part) for part in [*parts, "" if row.get("dtype") == "bfloat16" else row.get("dtype")] if part)


def number(value: float) -> str:
    """Three digits, or as many as are left of the point."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _time(row: dict | None, bold: bool) -> Text:
    if row is None:
        return Text("")
    if row["us"] is None:
        return Text(row["error"].split(":")[0], style="dim" if row["error"].startswith("absent") else "red")
    return Text(number(row["us"]), style="bold" if bold else "")


def unmeasured(rows: list[dict]) -> list[str]:
    """A line for each implementation and reason, with the number of cases."""
    reasons = Counter((row["impl"], row["error"]) for row in rows if row.get("error"))
    return [f"{impl}: {error} ({count} case{'s' * (count > 1)})" for (impl, error), count in reasons.items()]


def change_table(changes: list[Change]) -> Table:
    table = Table(title="against the older run (new / old)", **LOOK)
    for name in ("case", "implementation", "old us", "new us", "ratio", ""):
        table.add_column(name, justify="right" if "us" in name or name == "ratio" else "left")
    colours = {"faster": "green", "slower": "red", "no longer measured": "red"}
    for c in changes:
        times = [number(r["us"]) if r and r["us"] is not None else "" for r in (c.old, c.row)]
        ratio = "" if c.ratio is None else f"{c.ratio:.3f}"
        verdict = Text("" if c.verdict == "same" else c.verdict, style=colours.get(c.verdict, ""))
        table.add_row(case_name(c.row), c.row["impl"], *times, ratio, verdict)
    return table


def show(console: Console, suite: str, rows: list[dict]) -> None:
    console.print(suite_table(suite, rows))
    for line in unmeasured(rows):
        console.print(f"  {line}", style="dim", highlight=False, markup=False)
