"""Tables: a line a case, a column an implementation; what was not measured says why below."""

import textwrap
from collections import Counter

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.attention import CACHES_8_BIT
from benchmarks.cases import OURS
from benchmarks.results import IDENTITY, Change

LOOK = dict(title_justify="left", title_style="bold", pad_edge=False, box=box.SIMPLE_HEAD)
CASE = [key for key in IDENTITY if key != "impl"]
LOSSY = {f"{OURS}-{name}" for name in CACHES_8_BIT}  # over a KV cache of 8 bits: not what the peers compute
EXPLAINED = (
    "floor, roof: of the fastest tiny-gemm arm, by its bytes or its arithmetic; "
    "x peer: the time of the fastest peer, which is named, over that arm's"
)


def case_of(row: dict) -> tuple:
    return tuple(row.get(key) for key in CASE)


def by_case(rows: list[dict]) -> dict[tuple, list[dict]]:
    cases: dict[tuple, list[dict]] = {}
    for row in rows:
        cases.setdefault(case_of(row), []).append(row)
    return cases


def is_ours(row: dict) -> bool:
    return row["impl"].startswith(OURS)


def best(rows: list[dict], *, ours: bool) -> dict | None:
    """The fastest row of this project, or of its peers; one over a cache of 8 bits, or timed by the wall clock, only
    where there is no other."""
    timed = [row for row in rows if is_ours(row) == ours and row["us"] is not None]
    timed = [row for row in timed if row["impl"] not in LOSSY] or timed
    graphs = [row for row in timed if row.get("timing") == "graph"]
    return min(graphs or timed, key=lambda row: row["us"], default=None)


def speedup(rows: list[dict]) -> float | None:
    """The best peer's time over this project's best; None where one is missing."""
    ours, peer = best(rows, ours=True), best(rows, ours=False)
    return None if ours is None or peer is None else peer["us"] / ours["us"]


def suite_table(suite: str, rows: list[dict]) -> Table:
    """us a call of every arm; floor and roof are those of this project's fastest arm."""
    impls = [impl for impl in dict.fromkeys(row["impl"] for row in rows) if impl != "case"]
    by_clock = _by_wall_clock(rows)
    explained = EXPLAINED + ("; (wall): timed by the wall clock, the others as CUDA graphs" if by_clock else "")
    table = Table(title=f"{suite}: microseconds", caption=explained, caption_justify="left", **LOOK)
    table.add_column("case", vertical="bottom")
    for column in [*impls, "floor", "roof", "x peer"]:
        heading = textwrap.wrap(column, 14, break_long_words=False) + ["(wall)"] * (column in by_clock)
        table.add_column("\n".join(heading), justify="right", vertical="bottom", no_wrap=True)
    for case in by_case(rows).values():
        first, cells = case[0], {row["impl"]: row for row in case}
        quickest, ours, ratio = best(case, ours=False), best(case, ours=True), speedup(case)
        line = [case_name(first), *(_time(cells.get(impl), cells.get(impl) in (quickest, ours)) for impl in impls)]
        if "case" in cells and impls:  # none of its arms was begun
            line[1] = _time(cells["case"], bold=False)
        line += ["", "", ""] if ours is None else [number(ours["floor_us"]), f"{ours['roof_fraction']:.0%}", ""]
        if ratio is not None:
            line[-1] = Text(f"{quickest['impl']} {ratio:.2f}", style="green" if ratio >= 1 else "red")
        table.add_row(*line)
    return table


def _by_wall_clock(rows: list[dict]) -> set[str]:
    """The arms that were, where others were not."""
    clocks = {row["impl"]: row["timing"] for row in rows if row.get("timing")}
    return {impl for impl, clock in clocks.items() if clock == "wall"} if "graph" in clocks.values() else set()


def case_name(row: dict) -> str:
    """4096x4096 M 8 g128; a dtype other than bfloat16 is named."""
    parts = [row["model"], row["shape"]]
    parts += [f"{key} {row[key]}" for key in ("M", "B", "L") if row.get(key) is not None and row["suite"] != "decode"]
    if row["suite"] == "gemm":
        parts.append(f"g{row['group_size']}")
    return " ".join(str(part) for part in [*parts, "" if row.get("dtype") == "bfloat16" else row.get("dtype")] if part)


def number(value: float) -> str:
    """Three digits, or as many as are left of the point."""
    return f"{value:#.3g}".rstrip(".") if value < 99.95 else f"{value:,.0f}"


def _time(row: dict | None, bold: bool) -> Text:
    if row is None:
        return Text("")
    if row["us"] is None:
        return Text(row["error"].split(":")[0], style="dim" if row["error"].startswith("absent") else "red")
    return Text(number(row["us"]), style="bold" if bold else "")


def unmeasured(rows: list[dict]) -> list[str]:
    """A line for each implementation and reason, with the number of cases."""
    reasons = Counter((row["impl"], row["error"]) for row in rows if row.get("error"))
    return [
        f"{_cases(count)} {error}" if impl == "case" else f"{impl}: {error} ({_cases(count)})"
        for (impl, error), count in reasons.items()
    ]


def notes(rows: list[dict]) -> list[str]:
    """A line for each implementation that has something to say about its times."""
    return list(dict.fromkeys(f"{row['impl']}: {row['note']}" for row in rows if row.get("note") and row["us"]))


def _cases(count: int) -> str:
    return f"{count} case{'s' * (count > 1)}"


def only_in(which: str, rows: list[dict], others: list[dict]) -> list[str]:
    """A line for each suite, arm of a suite and case that `rows` have and `others` have not, with what `others` say of
    it. A case of which no arm was begun counts as not there."""
    wanted = [row for row in rows if row["impl"] != "case"]
    there = {(row["suite"], row["impl"]) for row in others}
    found = {(case_of(row), row["impl"]) for row in others}
    cases = {case_of(row) for row in others if row["impl"] != "case"}
    reasons = {case_of(row): f" ({row['error']})" for row in others if row["impl"] == "case"}
    arms = Counter((row["suite"], row["impl"]) for row in wanted if case_of(row) in cases)
    missing = {key: count for key, count in arms.items() if key not in there}
    suites = {row["suite"] for row in others}
    whole = Counter(members[0]["suite"] for members in by_case(wanted).values())
    whole = {suite: count for suite, count in whole.items() if suite not in suites}
    lines = [f"only in the {which}: the suite {suite} ({_cases(count)})" for suite, count in whole.items()]
    lines += [f"only in the {which}: {suite} {impl} ({_cases(count)})" for (suite, impl), count in missing.items()]
    wanted = [row for row in wanted if row["suite"] in suites]
    for case, members in by_case(wanted).items():
        name = f"only in the {which}: {members[0]['suite']} {case_name(members[0])}"
        if case not in cases:
            lines.append(name + reasons.get(case, ""))
            continue
        rest = [row["impl"] for row in members if (case, row["impl"]) not in found]
        rest = [impl for impl in rest if (members[0]["suite"], impl) not in missing]
        if rest:
            lines.append(f"{name}: {', '.join(rest)}")
    return lines


def change_table(changes: list[Change]) -> Table:
    table = Table(title="against the old run (new / old)", **LOOK)
    for name in ("case", "implementation", "old us", "new us", "ratio", ""):
        table.add_column(name, justify="right" if "us" in name or name == "ratio" else "left")
    colours = {"faster": "green", "slower": "red", "no longer measured": "red"}
    for c in changes:
        times = [number(r["us"]) if r and r["us"] is not None else "" for r in (c.old, c.row)]
        ratio = "" if c.ratio is None else f"{c.ratio:.3f}"
        verdict = Text("" if c.verdict == "same" else c.verdict, style=colours.get(c.verdict, ""))
        table.add_row(case_name(c.row), c.row["impl"], *times, ratio, verdict)
    return table


def _print(console: Console, table: Table) -> None:
    """Whole, however narrow the terminal is: rich would cut figures off."""
    needed = console.measure(table, options=console.options.update(max_width=1000)).maximum
    if needed > console.width:
        table.width = needed
    console.print(table, crop=False)


def show(console: Console, suite: str, rows: list[dict]) -> None:
    _print(console, suite_table(suite, rows))
    for line in notes(rows) + unmeasured(rows):
        console.print(f"  {line}", style="dim", highlight=False, markup=False)
