"""From a trace to a report: a row a kernel with its verdict, and the step as a whole."""

from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, replace

import numpy as np

import tiny_gemm.profiling.roofline as roofline
from tiny_gemm.profiling.names import family, short_name
from tiny_gemm.profiling.roofline import Verdict
from tiny_gemm.profiling.trace import KINDS, Span, Trace, TraceError

TIMELINE_EVENTS = 20_000


@dataclass(frozen=True)
class Row:
    """Launches of one kernel with one grid (on a CPU: calls of one op). Bytes and flops are of one call; None: unknown.

    total_us, median_us and what follows from them count a launch from the end of what began before it on its stream:
    with programmatic dependent launch it begins earlier, by overlap_us (the median), and waits inside. gap_us: median
    idle time of the whole device before a launch. share: of all rows' time. waves: how often the grid fills the chip.
    """

    name: str
    op: str | None
    family: str
    calls: int
    total_us: float
    share: float
    median_us: float
    gap_us: float
    overlap_us: float
    grid: tuple[int, int, int] | None
    block: tuple[int, int, int] | None
    waves: float | None
    bytes: float | None
    flops: float | None
    gbps: float | None
    roof_fraction: float | None
    tflops: float | None
    peak_fraction: float | None
    intensity: float | None
    verdict: str
    reason: str
    advice: str

    @property
    def label(self) -> str:
        """The kernel's name, after its op's where that says more: int4_gemm and _int4_gemm_kernel are one."""
        library, _, op = (self.op or "").rpartition("::")
        if not op or (library != "aten" and op in self.name):
            return self.name
        return f"{self.op}: {self.name}"

    @property
    def grid_text(self) -> str:
        return "x".join(map(str, self.grid)) if self.grid else ""


@dataclass(frozen=True)
class Step:
    """One step (or, in a trace without marked steps, the whole of it) on the average.

    step_us: from one step's first kernel to the next one's. known_bytes: share of the kernels' time whose bytes are
    known. bytes_told: whether the trace says what a step's bytes are; otherwise they are the sum of the known ones.
    tokens: those that a step makes, where the trace says so. floor_us: what the step's bytes take at the roof.
    unprofiled_us: the same step timed without a profiler. longest_gap_us: the longest of a step's idle times, of the
    median step; longest_gap_before: the label of the kernel that came after it.
    """

    steps: int
    step_us: float
    busy_fraction: float
    idle_us: float
    kernels: float
    kernel_us: float
    tokens: int | None
    tokens_per_s: float | None
    bytes: float | None
    known_bytes: float
    bytes_told: bool
    floor_us: float | None
    floor_tokens_per_s: float | None
    unprofiled_us: float | None
    longest_gap_us: float
    longest_gap_before: str
    verdict: str
    reason: str
    advice: str

    @property
    def floor_is_partial(self) -> bool:
        """Whether the floor is that of the known bytes only, and more than a twentieth of the time has unknown ones."""
        return self.floor_us is not None and not self.bytes_told and self.known_bytes <= 0.95


@dataclass(frozen=True)
class TimelineEvent:
    """A kernel of the shown step; start_us counts from the step's first kernel, and a kernel that overlaps another on
    its stream starts at that one's end; row: index into Report.rows."""

    start_us: float
    duration_us: float
    row: int
    stream: int


@dataclass(frozen=True)
class Report:
    """What a trace says. processor: "gpu" or "cpu". roof: GB/s; roof_source tells where that comes from.
    step_times_us: of each step (on a GPU, where a step ends when the next begins, of all but the last)."""

    source: str
    processor: str
    device: str
    roof_gbps: float | None
    roof_source: str
    peak_tflops: float | None
    marked_steps: bool
    step: Step
    step_times_us: list[float]
    rows: list[Row]
    timeline: list[TimelineEvent] = field(repr=False)
    notes: list[str] = field(default_factory=list)

    @property
    def ridge(self) -> float | None:
        """Flops a byte at which a kernel needs the whole memory and all the flops."""
        return self.peak_tflops * 1e3 / self.roof_gbps if self.peak_tflops and self.roof_gbps else None

    def to_json(self) -> dict:
        """Everything, ready for json.dumps; fractions are of 1, times in microseconds."""
        return asdict(self)

    def table(self, rows: int | None = 15):
        """Something for rich to print: the step, the kernels that take longest (None: all of them), what to do."""
        from tiny_gemm.profiling.tables import ReportTable

        return ReportTable(self, rows)

    def against(self, before: "Report"):
        """Something for rich to print: what changed from `before` to this report."""
        from tiny_gemm.profiling.tables import comparison

        return comparison(before, self)

    def distinct_labels(self) -> list[str]:
        """A label for each row; those that several rows have get the row's grid."""
        count = Counter(row.label for row in self.rows)
        return [f"{r.label} {r.grid_text}".strip() if count[r.label] > 1 else r.label for r in self.rows]

    def share_of(self, verdict: str) -> float:
        return sum(row.share for row in self.rows if row.verdict == verdict)


# ---------------------------------------------------------------------------------------------------------------------
# Analysis
# ---------------------------------------------------------------------------------------------------------------------


def analyse(trace: Trace, *, roof_gbps: float | None = None, name: str | None = None) -> Report:
    """The report of a trace: of its GPU kernels, or of its CPU ops where there are none. roof_gbps: instead of the roof
    that the trace carries or the datasheet's. name: what the report calls itself instead of the file."""
    if roof_gbps is not None and not 0 < roof_gbps < float("inf"):
        raise ValueError(f"roof_gbps={roof_gbps} must be a finite number above 0")
    if name is not None:
        trace = replace(trace, source=name)
    if len(trace.kernels["start"]):
        return _analyse_gpu(trace, roof_gbps)
    if len(trace.ops["start"]):
        return _analyse_cpu(trace, roof_gbps)
    raise TraceError(
        f"{trace.source} has neither kernels nor CPU ops: record with torch.profiler.profile(activities=[CPU, CUDA])"
        " and run something inside"
    )


def _analyse_gpu(trace: Trace, roof_gbps: float | None) -> Report:
    notes = []
    k = trace.kernels
    times = {int(d): float(k["dur"][k["device"] == d].sum()) for d in np.unique(k["device"])}
    device = max(times, key=times.get)
    if len(times) > 1:
        notes.append(f"GPU {device} is shown, the busiest of {len(times)}.")
        k = {name: column[k["device"] == device] for name, column in k.items()}
    k = _with_own_times(k)
    facts = trace.devices.get(device) or {}
    name = str(facts.get("name") or trace.metadata.get("device") or "unknown GPU")
    sheet = roofline.datasheet(name)
    roof, roof_source = _roof(trace, roof_gbps, sheet)
    peak = sheet.tflops if sheet else None

    end = k["start"] + k["dur"]
    ended = np.concatenate(([-np.inf], np.maximum.accumulate(end)[:-1]))
    gaps = np.maximum(k["start"] - ended, 0.0)
    gaps[0] = 0.0  # nothing is known of the time before
    step_of, marked = _assign_steps(k, trace)
    if not marked and (trace.steps or trace.gpu_steps):
        notes.append("No kernel belongs to a marked step: the whole trace is shown as one.")
    outside = int((step_of < 0).sum())
    if outside:
        notes.append(f"{outside} kernels outside the marked steps are left out.")
    costs, op_names = _gpu_costs(k, step_of, trace)

    inside = np.flatnonzero(step_of >= 0)
    used = np.unique(step_of[inside])
    starts = np.array([k["start"][step_of == s].min() for s in used])
    order = np.argsort(starts)
    used, starts = used[order], starts[order]
    window = (starts[0], starts[-1] if len(used) > 1 else float(end[inside].max()))
    busy = _union(k["start"], end, *window)
    step_us = float(window[1] - window[0]) / max(len(used) - 1, 1)

    groups: dict[tuple, list[int]] = defaultdict(list)
    for i in inside:
        key = int(k["name"][i]), op_names[i], int(k["grid_x"][i]), int(k["grid_y"][i]), int(k["grid_z"][i])
        groups[key].append(i)
    total = float(k["own"][inside].sum()) or 1.0
    rows, row_of = [], {}
    ordered = sorted(groups.items(), key=lambda item: -float(k["own"][item[1]].sum()))
    sms = facts.get("numSms") or None
    for (name_id, op, *grid), members in ordered:
        m = np.array(members)
        first = m[0]
        block = tuple(int(k[f"block_{axis}"][first]) for axis in "xyz")
        is_kernel = KINDS[k["kind"][first]] == "kernel" and min(grid) > 0
        blocks = int(np.prod(grid)) if is_kernel else None
        waves = None
        if blocks and sms:
            resident = roofline.resident_blocks(
                facts, int(np.prod(block)), int(k["registers"][first]), int(k["shared_memory"][first])
            )
            waves = blocks / (resident * sms) if resident else None
        row_of.update((int(i), len(rows)) for i in members)
        rows.append(
            _row(
                trace.names[name_id], op, KINDS[k["kind"][first]], k["own"][m], gaps[m], total, costs[m],
                roof, peak, overlap_us=float(np.median(k["early"][m])), grid=tuple(grid) if is_kernel else None,
                block=block if is_kernel else None, waves=waves, blocks=blocks, sms=sms,
            )
        )  # fmt: skip

    shown = used[len(used) // 2 if len(used) < 3 else (len(used) - 1) // 2]
    events = inside[step_of[inside] == shown][:TIMELINE_EVENTS]
    origin = float(k["start"][events].min())
    begin = k["start"] + k["early"] - origin
    timeline = [
        TimelineEvent(round(float(begin[i]), 3), round(float(k["own"][i]), 3), row_of[int(i)], int(k["stream"][i]))
        for i in events
    ]
    busy_fraction = busy / max(float(window[1] - window[0]), 1e-9)
    longest = _longest_gap(gaps, step_of, inside)
    step = _step(
        trace, rows, len(used), step_us, busy_fraction, len(inside), total, roof, gaps[longest], row_of[longest]
    )
    step_times = [round(float(t), 3) for t in np.diff(starts)] or [step_us]
    return Report(trace.source, "gpu", name, roof, roof_source, peak, marked, step, step_times, rows, timeline, notes)


def _assign_steps(k: dict, trace: Trace) -> tuple[np.ndarray, bool]:
    """The number of each kernel's step, -1 for none, by when it was launched: the GPU runs late. And whether any is
    marked; where none is, all are step 0."""
    step_of = np.full(len(k["start"]), -1)
    launches = trace.launches
    if trace.steps and len(launches["start"]):
        at = np.searchsorted(launches["correlation"], k["correlation"])
        at = np.minimum(at, len(launches["correlation"]) - 1)
        found = launches["correlation"][at] == k["correlation"]
        step_of[found] = _within(launches["start"][at[found]], trace.steps)
    if trace.gpu_steps and (step_of < 0).all():
        step_of = _within(k["start"], trace.gpu_steps)
    if (step_of < 0).all():
        return np.zeros_like(step_of), False
    return step_of, True


def _within(times: np.ndarray, spans: list[Span]) -> np.ndarray:
    """The index of the span that each time lies in, or -1; the spans do not overlap."""
    starts, ends = np.array([s.start for s in spans]), np.array([s.end for s in spans])
    at = np.searchsorted(starts, times, side="right") - 1
    return np.where((at >= 0) & (times < ends[np.maximum(at, 0)]), at, -1)


def _with_own_times(k: dict) -> dict:
    """With two more columns: "early", how long before the end of what began before it on its stream a kernel begins,
    and "own", its duration without that.

    With programmatic dependent launch kernels of one stream overlap: the later one waits inside for the earlier one,
    and counting both in full would count that time twice. `k` is ordered by start.
    """
    end, early = k["start"] + k["dur"], np.zeros(len(k["start"]))
    order = np.argsort(k["stream"], kind="stable")
    for on in np.split(order, np.flatnonzero(np.diff(k["stream"][order])) + 1):
        ended = np.maximum.accumulate(end[on])[:-1]
        early[on[1:]] = np.clip(ended - k["start"][on[1:]], 0.0, k["dur"][on[1:]])
    return k | {"early": early, "own": k["dur"] - early}


def _longest_gap(gaps: np.ndarray, step_of: np.ndarray, inside: np.ndarray) -> int:
    """The index of the kernel with the longest gap before it in its step; of the steps, the median one's."""
    by_gap = inside[np.lexsort((gaps[inside], step_of[inside]))]
    longest = by_gap[np.append(np.diff(step_of[by_gap]) > 0, True)]
    return int(longest[np.argsort(gaps[longest], kind="stable")[len(longest) // 2]])


def _union(start: np.ndarray, end: np.ndarray, first: float, last: float) -> float:
    """How long at least one of the intervals, which are ordered by start, lies within [first, last]."""
    start, end = np.clip(start, first, last), np.clip(end, first, last)
    covered = np.concatenate(([first], np.maximum.accumulate(end)[:-1]))
    return float(np.maximum(end - np.maximum(start, covered), 0.0).sum())


def _gpu_costs(k: dict, step_of: np.ndarray, trace: Trace) -> tuple[np.ndarray, list[str | None]]:
    """Bytes and flops [n, 2] of each kernel, NaN where not known, and the op that launched it.

    In this order: what its launch declared (the trace's metadata), its bytes as a copy, its op's shapes. An op that
    launches several kernels is counted once, on the longest of them.
    """
    n = len(k["start"])
    costs, op_names = np.full((n, 2), np.nan), [None] * n
    ops = trace.ops
    if len(ops["start"]):
        by_external = np.argsort(ops["external"], kind="stable")
        externals = ops["external"][by_external]
        at = np.minimum(np.searchsorted(externals, k["external"]), len(externals) - 1)
        found = (externals[at] == k["external"]) & (k["external"] > 0)
        longest: dict[int, int] = {}
        for i in np.flatnonzero(found):
            op = by_external[at[i]]
            op_names[i] = trace.names[ops["name"][op]]
            if op not in longest or k["own"][i] > k["own"][longest[op]]:
                longest[op] = i
        for op, i in longest.items():
            if KINDS[k["kind"][i]] == "kernel":
                costs[i] = ops["bytes"][op], ops["flops"][op]
    copies = np.flatnonzero(~np.isnan(k["bytes"]))
    for i in copies:
        twice = "DtoD" in trace.names[k["name"][i]]  # reads and writes the same memory
        costs[i] = k["bytes"][i] * (2 if twice else 1), 0.0
    _apply_declared(k, step_of, trace, costs, op_names)
    return costs, op_names


def _apply_declared(k: dict, step_of: np.ndarray, trace: Trace, costs: np.ndarray, op_names: list) -> None:
    """Costs from the metadata: those of one step's launches in order, matched by kernel name, grid and order."""
    declared: dict[tuple, list[dict]] = defaultdict(list)
    for cost in trace.metadata.get("costs", ()):
        declared[cost["name"], tuple(cost["grid"])].append(cost)
    if not declared:
        return
    seen: dict[tuple, list[int]] = defaultdict(list)
    for i in np.flatnonzero(step_of >= 0):
        key = trace.names[k["name"][i]], (int(k["grid_x"][i]), int(k["grid_y"][i]), int(k["grid_z"][i]))
        if key in declared:
            seen[key + (int(step_of[i]),)].append(i)
    for (name, grid, _), members in seen.items():
        donors = declared[name, grid]
        if len(donors) != len(members):  # another number of launches: only what all of them agree on is known
            if any((d["bytes"], d["flops"]) != (donors[0]["bytes"], donors[0]["flops"]) for d in donors):
                continue
            donors = donors[:1] * len(members)
        for i, donor in zip(members, donors, strict=True):
            costs[i] = (np.nan if donor["bytes"] is None else donor["bytes"]), donor["flops"] or 0.0
            op_names[i] = op_names[i] or donor.get("op")


def first_step_costs(trace: Trace) -> list[dict]:
    """What is known of the kernels of the first step, in order, as metadata["costs"] has it."""
    k = _with_own_times(trace.kernels)
    step_of, _ = _assign_steps(k, trace)
    costs, op_names = _gpu_costs(k, step_of, trace)
    known = []
    for i in np.flatnonzero(step_of == step_of[step_of >= 0].min()) if len(step_of) else ():
        if KINDS[k["kind"][i]] == "kernel":
            n_bytes, flops = (None if np.isnan(x) else int(x) for x in costs[i])
            grid = [int(k[f"grid_{axis}"][i]) for axis in "xyz"]
            cost = {"name": trace.names[k["name"][i]], "grid": grid, "bytes": n_bytes, "flops": flops}
            known.append(cost | {"op": op_names[i]})
    return known


def _row(
    name: str, op: str | None, kind: str, durations: np.ndarray, gaps: np.ndarray, total: float, costs: np.ndarray,
    roof: float | None, peak: float | None, *, overlap_us: float = 0.0, grid=None, block=None, waves=None, blocks=None,
    sms=None, on_cpu: bool = False, wraps_others: bool = False,
) -> Row:  # fmt: skip
    known = ~np.isnan(costs[:, 0])
    time = float(durations[known].sum())
    n_bytes = n_flops = gbps = tflops = intensity = None
    if known.any() and time > 0:
        n_bytes, n_flops = float(np.median(costs[known, 0])), float(np.median(costs[known, 1]))
        gbps = float(costs[known, 0].sum()) / time / 1e3
        if n_flops > 0:
            tflops = float(costs[known, 1].sum()) / time / 1e6
            intensity = n_flops / n_bytes if n_bytes else None
    across_bus = kind == "memcpy" and "DtoD" not in name
    roof_fraction = gbps / roof if gbps is not None and roof and not across_bus else None
    peak_fraction = tflops / peak if tflops is not None and peak else None
    duration, gap = float(np.median(durations)), float(np.median(gaps))
    judged = dict(duration_us=duration, gap_us=gap, roof_fraction=roof_fraction, intensity=intensity)
    if on_cpu:
        found = _cpu_verdict(**judged, wraps_others=wraps_others)
    elif across_bus and gap <= duration:
        found = Verdict(
            roofline.LATENCY, "a copy between GPU and host", "keep the data on the GPU, or overlap the copy"
        )
    else:
        ridge = peak * 1e3 / roof if peak and roof else None
        found = roofline.verdict(
            **judged,
            blocks=blocks,
            sm_count=sms,
            ridge=ridge,
            peak_fraction=peak_fraction,
            overlapped=overlap_us > 0.05,
        )
    name = short_name(name)
    return Row(
        name, op, family(name, op, kind), len(durations), float(durations.sum()), float(durations.sum()) / total,
        duration, gap, overlap_us, grid, block, waves, n_bytes, n_flops, gbps, roof_fraction, tflops, peak_fraction,
        intensity, found.kind, found.reason, found.advice,
    )  # fmt: skip


def _step(trace, rows, steps, step_us, busy_fraction, kernels, total_us, roof, longest_gap_us, before: int) -> Step:
    """`kernels` and `total_us` are of all the steps together. before: the row of what comes after the longest gap."""
    counted = [row for row in rows if row.bytes is not None]
    known = sum(row.total_us for row in counted) / total_us
    n_bytes = sum(row.bytes * row.calls for row in counted) / steps if counted else None
    told = trace.metadata.get("step_bytes")
    if told is not None:
        n_bytes = float(told)
    floor_us = n_bytes / roof / 1e3 if n_bytes and roof else None
    tokens = trace.metadata.get("tokens_per_step")
    found = _step_verdict(rows, busy_fraction, kernels / steps)
    return Step(
        steps=steps,
        step_us=step_us,
        busy_fraction=busy_fraction,
        idle_us=step_us * (1 - busy_fraction),
        kernels=kernels / steps,
        kernel_us=total_us / steps,
        tokens=tokens,
        tokens_per_s=tokens * 1e6 / step_us if tokens and step_us else None,
        bytes=n_bytes,
        known_bytes=known,
        bytes_told=told is not None,
        floor_us=floor_us,
        floor_tokens_per_s=tokens * 1e6 / floor_us if tokens and floor_us else None,
        unprofiled_us=trace.metadata.get("unprofiled_step_us"),
        longest_gap_us=round(float(longest_gap_us), 3),
        longest_gap_before=rows[before].label,
        verdict=found.kind,
        reason=found.reason,
        advice=found.advice,
    )


def _step_verdict(rows: list[Row], busy_fraction: float, kernels: float) -> Verdict:
    """Launch-bound where the device idles longer than it works; otherwise what most of its busy time is."""
    if busy_fraction < 0.5:
        return Verdict(
            roofline.LAUNCH,
            f"the device is idle {1 - busy_fraction:.0%} of the step, between {kernels:.0f} kernels",
            "launch the step as one CUDA graph, or with fewer kernels",
        )
    shares: dict[str, float] = defaultdict(float)
    for row in rows:
        shares[row.verdict] += row.share
    kind = max(shares, key=shares.get)
    largest = next(row for row in rows if row.verdict == kind)
    return Verdict(kind, f"{shares[kind]:.0%} of the busy time, most of it in {largest.label}", largest.advice)


def _roof(trace: Trace, given: float | None, sheet: roofline.Ceiling | None) -> tuple[float | None, str]:
    if given is not None:
        return given, "as given"
    if measured := trace.metadata.get("roof_gbps"):
        return float(measured), "measured in the same run"
    if sheet:
        return sheet.gbps, "from the datasheet, not measured"
    return None, "not known; give it with --roof-gbps"


# ------------------------------------------------------------------------------------------------------------ on a CPU


def _analyse_cpu(trace: Trace, roof_gbps: float | None) -> Report:
    """Ops by their self time: without that of the ops they call."""
    ops, notes = trace.ops, []
    step_of = _within(ops["start"], trace.steps) if trace.steps else np.zeros(len(ops["start"]), dtype=int)
    marked = bool(trace.steps) and bool((step_of >= 0).any())
    if not marked:
        step_of = np.zeros(len(ops["start"]), dtype=int)
    self_us, gaps, is_top, costs = _self_times(ops)
    wraps = np.isnan(costs[:, 0]) & (self_us < 0.8 * ops["dur"])
    roof, roof_source = _roof(trace, roof_gbps, None)
    inside = np.flatnonzero((step_of >= 0) & (self_us > 0))
    if not len(inside):
        raise TraceError(f"{trace.source} has no op that took any time")
    used = np.unique(step_of[inside])
    if marked:
        spans = [trace.steps[s] for s in used]
    else:
        spans = [Span("trace", float(ops["start"].min()), float((ops["start"] + ops["dur"]).max()))]
    end = ops["start"] + ops["dur"]
    length = sum(s.end - s.start for s in spans) or 1.0
    busy = sum(_union(ops["start"][is_top], end[is_top], s.start, s.end) for s in spans)
    groups: dict[int, list[int]] = defaultdict(list)
    for i in inside:
        groups[int(ops["name"][i])].append(i)
    total = float(self_us[inside].sum())
    rows, row_of = [], {}
    for name_id, members in sorted(groups.items(), key=lambda item: -float(self_us[item[1]].sum())):
        m = np.array(members)
        row_of[name_id] = len(rows)
        rows.append(
            _row(
                trace.names[name_id], None, "op", self_us[m], gaps[m], total, costs[m], roof, None,
                on_cpu=True, wraps_others=bool(wraps[m].mean() > 0.5),
            )
        )  # fmt: skip
    shown = spans[(len(spans) - 1) // 2]
    threads: dict[int, int] = {}
    timeline = [
        TimelineEvent(
            round(float(ops["start"][i]) - shown.start, 3), float(ops["dur"][i]), row_of[int(ops["name"][i])],
            threads.setdefault(int(ops["thread"][i]), len(threads)),
        )
        for i in inside
        if is_top[i] and shown.start <= ops["start"][i] < shown.end
    ][:TIMELINE_EVENTS]  # fmt: skip
    longest = _longest_gap(gaps, step_of, inside)
    step = _step(
        trace, rows, len(spans), length / len(spans), busy / length, int(is_top[inside].sum()), total, roof,
        gaps[longest], row_of[int(ops["name"][longest])],
    )  # fmt: skip
    step_times = [round(s.end - s.start, 3) for s in spans]
    device = str(trace.metadata.get("device") or "CPU")
    notes.append("No GPU kernels in this trace: these are CPU ops by their own time, without that of ops they call.")
    return Report(trace.source, "cpu", device, roof, roof_source, None, marked, step, step_times, rows, timeline, notes)


def _self_times(ops: dict) -> tuple[np.ndarray, ...]:
    """(time in the op itself, idle time before it, whether no other op called it, its bytes and flops [n, 2]), for ops
    ordered by start. The cost of an op that calls another of known cost is that one's."""
    costs = np.stack([ops["bytes"], ops["flops"]], axis=1)
    n = len(ops["start"])
    self_us, gaps = ops["dur"].copy(), np.zeros(n)
    is_top = np.zeros(n, dtype=bool)
    order = np.lexsort((-ops["dur"], ops["start"], ops["thread"]))
    stack: list[int] = []
    thread, last_end = None, 0.0
    start, dur = ops["start"], ops["dur"]
    for i in order:
        if ops["thread"][i] != thread:
            thread, stack, last_end = ops["thread"][i], [], start[i]
        while stack and start[stack[-1]] + dur[stack[-1]] <= start[i]:
            stack.pop()
        if stack:
            self_us[stack[-1]] -= dur[i]
            if not np.isnan(costs[i, 0]):
                costs[stack] = np.nan
        else:
            is_top[i] = True
            gaps[i] = max(start[i] - last_end, 0.0)
            last_end = start[i] + dur[i]
        stack.append(i)
    return np.maximum(self_us, 0.0), gaps, is_top, costs


def _cpu_verdict(
    *, duration_us: float, gap_us: float, roof_fraction: float | None, intensity: float | None, wraps_others: bool
) -> Verdict:
    """What can be told on a CPU: too much Python around the op, or in it, or the memory's speed."""
    advice = "call fewer, larger ops; torch.compile"
    if gap_us > duration_us:
        return Verdict(roofline.LAUNCH, f"{gap_us:.1f} us of Python before {duration_us:.1f} us of work", advice)
    if wraps_others:
        return Verdict(roofline.LAUNCH, "its own time is Python and dispatch around the ops that it calls", advice)
    if roof_fraction is None:
        return Verdict(roofline.UNKNOWN, "its bytes, or the roof, are not known", "compare its time with the floor's")
    why = f"{roof_fraction:.0%} of the memory roof"
    if roof_fraction >= roofline.AT_THE_ROOF:
        return Verdict(roofline.BANDWIDTH, why, "read fewer bytes: weights in fewer bits, or a larger batch")
    return Verdict(roofline.LATENCY, why, "more threads, or another kernel")
