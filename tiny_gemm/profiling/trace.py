"""Reads a torch profiler trace (Chrome trace format, gzip or not) of any size in bounded memory.

The file is scanned, never loaded: events are decoded one at a time, and of each only the numbers that a report needs
are kept, in arrays (some 150 bytes a kernel, 60 an op). What is kept: kernels, copies and memsets of the GPU, the calls
that launched them, torch's CPU ops with what op_cost makes of their shapes, the annotations that mark steps, the
devices' properties, and what tiny_gemm wrote into the trace itself (METADATA_KEY).
"""

import gzip
import io
import json
import math
import os
import re
import shutil
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tiny_gemm.profiling.costs import op_cost

METADATA_KEY = "tiny_gemm"
MAX_KERNELS = 3_000_000  # some 450 MB; a trace of that size is recorded by mistake
MAX_OPS = 6_000_000
MAX_VALUE = 64 * 2**20  # characters of one event or of one metadata value
CHUNK = 2**20  # characters read at once
STEP_NAME = re.compile(r"ProfilerStep#\d+$")
GPU_CATEGORIES = {
    "kernel": "kernel",
    "gpu_memcpy": "memcpy",
    "memcpy": "memcpy",
    "gpu_memset": "memset",
    "memset": "memset",
}
OP_CATEGORIES = {"cpu_op", "operator"}
LAUNCH_CATEGORIES = {"cuda_runtime", "cuda_driver", "runtime", "hip_runtime", "mtia_runtime", "privateuse1_runtime"}
KINDS = ("kernel", "memcpy", "memset")


class TraceError(ValueError):
    """The file cannot be read as a trace; the message names it and says why."""


@dataclass(frozen=True)
class Span:
    """An annotated stretch of time, in microseconds."""

    name: str
    start: float
    end: float


@dataclass
class Trace:
    """What was kept. Times are microseconds on the trace's own clock; `names` are indexed by the columns "name".

    kernels: columns start, dur, name, kind (index into KINDS), device, stream, grid_x, grid_y, grid_z, block_x,
    block_y, block_z, registers, shared_memory, correlation, external, graph_node, bytes; ordered by start.
    ops: columns start, dur, name, thread, external, bytes, flops (NaN: not known); ordered by start.
    launches: columns correlation, start; ordered by correlation.
    """

    source: str
    names: list[str]
    kernels: dict[str, np.ndarray]
    ops: dict[str, np.ndarray]
    launches: dict[str, np.ndarray]
    steps: list[Span]
    gpu_steps: list[Span]
    devices: dict[int, dict]
    metadata: dict = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------------------------
# Scanning JSON
# ---------------------------------------------------------------------------------------------------------------------

_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER_GOES_ON = re.compile(r"[0-9.eE+-]*")  # up to the end of the buffer


class _Scanner:
    """Decodes a JSON text value by value from a stream, with a buffer no longer than one value and a chunk."""

    def __init__(self, stream: io.TextIOBase, source: str):
        self.stream, self.source = stream, source
        self.buffer, self.pos, self.dropped, self.values, self.ended = "", 0, 0, 0, False
        self.decode = json.JSONDecoder(strict=False).raw_decode

    def error(self, why: str, at: int | None = None) -> TraceError:
        at = self.dropped + (self.pos if at is None else at)
        return TraceError(
            f"{self.source} is not a readable trace: {why} (character {at:,}, after {self.values:,} events)"
        )

    def more(self) -> bool:
        """Reads on; False at the end of the file."""
        if self.ended:
            return False
        if len(self.buffer) - self.pos > MAX_VALUE:
            raise self.error(f"one value is longer than {MAX_VALUE // 2**20} MiB")
        self.buffer, self.dropped, self.pos = self.buffer[self.pos :], self.dropped + self.pos, 0
        chunk = self.stream.read(max(CHUNK, len(self.buffer)))  # twice as much each time: a long value is not quadratic
        self.ended = not chunk
        self.buffer += chunk
        return not self.ended

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            self.pos = _SPACE.match(self.buffer, self.pos).end()
            if self.pos < len(self.buffer):
                return self.buffer[self.pos]
            if not self.more():
                return ""

    def take(self, characters: str) -> str:
        """Steps over the next character, which must be one of these."""
        found = self.peek()
        if not found:
            raise self.error("it ends too early; the file is incomplete")
        if found not in characters:
            raise self.error(f"{found!r} where {' or '.join(characters)} was expected")
        self.pos += 1
        return found

    def value(self):
        if not self.peek():
            raise self.error("it ends too early; the file is incomplete")
        while True:
            try:
                value, end = self.decode(self.buffer, self.pos)
            except json.JSONDecodeError as e:
                # Unfinished or wrong? What merely stops early is found wrong at its end, but for a string.
                if e.pos >= len(self.buffer) - 16 or e.msg.startswith("Unterminated string"):
                    if self.more():
                        continue
                    raise self.error("it ends too early; the file is incomplete") from None
                raise self.error(e.msg, e.pos) from None
            except RecursionError:
                raise self.error("it is nested too deeply") from None
            if type(value) in (int, float) and _NUMBER_GOES_ON.fullmatch(self.buffer, end) and self.more():
                continue
            self.pos = end
            return value

    def array(self) -> Iterator:
        self.take("[")
        if self.peek() == "]":
            self.pos += 1
            return
        while True:
            yield self.value()
            self.values += 1
            if self.take(",]") == "]":
                return

    def events(self, on_metadata: Callable[[str, object], None]) -> Iterator[dict]:
        """The trace's events; everything else at the top goes to on_metadata."""
        if self.peek() == "[":
            yield from self.array()
            return
        if self.take("{[") and self.peek() == "}":
            return
        while True:
            key = self.value()
            self.take(":")
            if key == "traceEvents":
                yield from self.array()
            else:
                on_metadata(key, self.value())
            if self.take(",}") == "}":
                return


@contextmanager
def _scan(path: str | Path) -> Iterator[_Scanner]:
    """A scanner over the file; whatever is wrong with the file, or inside its gzip, becomes a TraceError."""
    path = Path(path)
    if path.is_dir() and (path / "trace.json.gz").exists():  # what profile() wrote
        path = path / "trace.json.gz"
    if not path.exists():
        raise TraceError(f"{path} does not exist")
    if path.is_dir():
        raise TraceError(f"{path} is a directory without a trace.json.gz")
    try:
        with open(path, "rb") as raw:
            zipped = raw.peek(2)[:2] == b"\x1f\x8b"
            with gzip.GzipFile(fileobj=raw) if zipped else raw as binary:
                yield _Scanner(io.TextIOWrapper(binary, encoding="utf-8-sig", errors="replace"), str(path))
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise TraceError(f"{path} is not a readable trace: its gzip data is damaged or cut off ({e})") from None


# ---------------------------------------------------------------------------------------------------------------------
# What is kept
# ---------------------------------------------------------------------------------------------------------------------

_KERNEL_COLUMNS = {
    "start": "d", "dur": "d", "name": "i", "kind": "b", "device": "h", "stream": "q", "grid_x": "q", "grid_y": "q",
    "grid_z": "q", "block_x": "i", "block_y": "i", "block_z": "i", "registers": "i", "shared_memory": "q",
    "correlation": "q", "external": "q", "graph_node": "q", "bytes": "d",
}  # fmt: skip
_OP_COLUMNS = {"start": "d", "dur": "d", "name": "i", "thread": "i", "external": "q", "bytes": "d", "flops": "d"}
_LAUNCH_COLUMNS = {"correlation": "q", "start": "d"}
_NOTHING = float("nan")


class _Columns:
    """Rows of numbers, kept as one array a column."""

    def __init__(self, types: dict[str, str]):
        self.columns = {name: array(code) for name, code in types.items()}
        self.appends = [column.append for column in self.columns.values()]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def add(self, *row) -> None:
        for append, value in zip(self.appends, row, strict=True):
            append(value)

    def sorted(self, by: str) -> dict[str, np.ndarray]:
        columns = {name: np.frombuffer(c, dtype=c.typecode) if len(c) else np.array([], c.typecode)
                   for name, c in self.columns.items()}  # fmt: skip
        order = np.argsort(columns[by], kind="stable")
        return {name: column[order] for name, column in columns.items()}


class _Interned(dict):
    """A number for each thing, in order of appearance."""

    def __missing__(self, key) -> int:
        self[key] = number = len(self)
        return number


def read_trace(path: str | Path) -> Trace:
    """Reads a trace; TraceError, a ValueError, says what is wrong with a file that is none."""
    names, threads = _Interned(), _Interned()
    kernels, ops, launches = _Columns(_KERNEL_COLUMNS), _Columns(_OP_COLUMNS), _Columns(_LAUNCH_COLUMNS)
    steps, gpu_steps, devices, metadata = [], [], {}, {}

    def on_metadata(key: str, value) -> None:
        if key == "deviceProperties" and isinstance(value, list):
            for i, device in enumerate(value):
                if isinstance(device, dict) and isinstance(number := device.get("id", i), int):
                    devices[number] = {k: v for k, v in device.items() if k == "name" or isinstance(v, int)}
        elif key == METADATA_KEY:
            try:
                metadata.update(_checked(value))
            except (KeyError, TypeError, ValueError, AttributeError) as e:
                raise scanner.error(f"its {METADATA_KEY!r} entry is malformed ({e!r})") from None

    def on_kernel(kind: str, event: dict, args: dict) -> None:
        grid, block = _three(args.get("grid")), _three(args.get("block"))
        kernels.add(
            *_when(event), names[str(event.get("name"))], KINDS.index(kind),
            _whole(args.get("device")), _whole(args.get("stream")), *grid, *block,
            _whole(args.get("registers per thread")), _whole(args.get("shared memory")),
            _whole(args.get("correlation"), -1), _whole(args.get("External id", args.get("external id")), -1),
            _whole(args.get("graph node id")), float(args.get("bytes") or _NOTHING),
        )  # fmt: skip
        if len(kernels) > MAX_KERNELS:
            raise TraceError(
                f"{path} has more than {MAX_KERNELS:,} kernels: record fewer steps, "
                "with torch.profiler.schedule(wait=1, warmup=1, active=5)"
            )

    def on_op(event: dict, args: dict) -> None:
        cost = op_cost(
            str(event.get("name")), args.get("Input Dims"), args.get("Input type"), args.get("Input Strides")
        )
        ops.add(
            *_when(event), names[str(event.get("name"))],
            threads[event.get("pid"), event.get("tid")], _whole(args.get("External id"), -1),
            *(cost or (_NOTHING, _NOTHING)),
        )  # fmt: skip
        if len(ops) > MAX_OPS:
            raise TraceError(f"{path} has more than {MAX_OPS:,} CPU ops: record fewer steps")

    with _scan(path) as scanner:
        for event in scanner.events(on_metadata):
            if not isinstance(event, dict) or event.get("ph") != "X":
                continue
            category, args = str(event.get("cat", "")).lower(), event.get("args") or {}
            try:
                if category in GPU_CATEGORIES:
                    on_kernel(GPU_CATEGORIES[category], event, args)
                elif category in OP_CATEGORIES:
                    on_op(event, args)
                elif category in LAUNCH_CATEGORIES:
                    if (correlation := _whole(args.get("correlation"), -1)) > 0:
                        launches.add(correlation, _when(event)[0])
                elif STEP_NAME.match(str(event.get("name"))):
                    start, duration = _when(event)
                    span = Span(event["name"], start, start + duration)
                    (gpu_steps if category.startswith("gpu") else steps).append(span)
            except (KeyError, TypeError, AttributeError, OverflowError) as e:
                raise scanner.error(f"an event of category {category!r} is malformed ({e!r})") from None
            except ValueError as e:
                raise e if isinstance(e, TraceError) else scanner.error(f"an event is malformed ({e})") from None
    return Trace(
        str(path), list(names), kernels.sorted("start"), ops.sorted("start"), launches.sorted("correlation"),
        sorted(steps, key=lambda s: s.start), sorted(gpu_steps, key=lambda s: s.start), devices, metadata,
    )  # fmt: skip


def _when(event: dict) -> tuple[float, float]:
    """Start and duration; a negative duration, which some profilers write for what they did not see end, is 0."""
    start, duration = float(event["ts"]), float(event.get("dur", 0))
    if not (math.isfinite(start) and math.isfinite(duration)):
        raise ValueError(f"it begins at {start} and lasts {duration}")
    return start, max(duration, 0.0)


def _checked(metadata: dict) -> dict:
    """What add_metadata wrote, if it still is that: an error where a report could not be made of it."""
    for key in ("roof_gbps", "step_bytes", "tokens_per_step", "unprofiled_step_us"):
        if not 0 <= (metadata.get(key) or 0) < math.inf:
            raise ValueError(f"{key} is {metadata[key]}")
    for cost in metadata.get("costs", ()):
        cost["name"].upper(), cost.get("op")
        if len(cost["grid"]) != 3 or not all(0 <= (cost[key] or 0) < math.inf for key in ("bytes", "flops")):
            raise ValueError(f"{cost} is no cost")
    return metadata


def _whole(value, default: int = 0) -> int:
    """An integer from what a trace has: a number, digits, or nothing."""
    return default if value is None or value == "" else int(value)


def _three(value) -> tuple[int, int, int]:
    """Grid or block; zeros where there is none."""
    if not isinstance(value, list) or len(value) != 3:
        return 0, 0, 0
    return int(value[0]), int(value[1]), int(value[2])


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def copy_trace(source: str | Path, destination: str | Path) -> None:
    """Copies a trace, gzipped; its text stays as it is."""
    with _scan(source) as scanner, _write_gzip(destination) as out:
        shutil.copyfileobj(scanner.stream, out, CHUNK)


def add_metadata(source: str | Path, destination: str | Path, metadata: dict) -> None:
    """Copies a trace, gzipped, with `metadata` under METADATA_KEY; the events' text stays as it is."""
    with _scan(source) as scanner, _write_gzip(destination) as out:
        scanner.take("{")
        out.write("{" + json.dumps(METADATA_KEY) + ": " + json.dumps(metadata))
        if scanner.peek() != "}":
            out.write(",\n")
        while True:
            out.write(scanner.buffer[scanner.pos :])
            scanner.pos = len(scanner.buffer)
            if not scanner.more():
                return


_KEPT_ARGS = (
    "External id", "correlation", "device", "stream", "grid", "block", "registers per thread", "shared memory",
    "graph node id", "bytes", "est. achieved occupancy %", "Input Dims", "Input type", "Input Strides",
)  # fmt: skip


def trim(source: str | Path, destination: str | Path, steps: int = 3) -> int:
    """Writes the last `steps` marked steps of a trace with what a report needs of them, gzipped; returns the number of
    events. Without marked steps everything is kept."""
    trace = read_trace(source)
    spans = trace.steps[-steps:]
    origin = spans[0].start if spans else 0.0
    kernels, launches = trace.kernels, trace.launches

    def inside(ts: float) -> bool:
        return not spans or spans[0].start <= ts < spans[-1].end

    launched = dict(zip(launches["correlation"].tolist(), launches["start"].tolist(), strict=True))
    is_kept = lambda correlation, ts: inside(launched.get(correlation, ts))  # noqa: E731
    columns = (kernels[c].tolist() for c in ("correlation", "external", "start"))
    kept = [(c, external) for c, external, start in zip(*columns, strict=True) if is_kept(c, start)]
    correlations, externals = {c for c, _ in kept}, {external for _, external in kept}
    on_gpu, written = len(kernels["start"]) > 0, 0
    top = {"schemaVersion": 1, "deviceProperties": list(trace.devices.values()), METADATA_KEY: trace.metadata}
    with _scan(source) as scanner, _write_gzip(destination) as out:
        out.write(json.dumps(top)[:-1] + ', "traceEvents": [\n')
        for event in scanner.events(lambda key, value: None):
            if not isinstance(event, dict) or event.get("ph") != "X" or "ts" not in event:
                continue
            category, args, ts = str(event.get("cat", "")).lower(), event.get("args") or {}, float(event["ts"])
            if category in GPU_CATEGORIES:
                keep = is_kept(_whole(args.get("correlation"), -1), ts)
            elif category in LAUNCH_CATEGORIES:
                keep = _whole(args.get("correlation"), -1) in correlations
            elif category in OP_CATEGORIES:
                keep = inside(ts) and (not on_gpu or _whole(args.get("External id"), -1) in externals)
            else:
                keep = any((s.name, s.start) == (event.get("name"), ts) for s in spans)
            if keep:
                small = {k: event[k] for k in ("ph", "cat", "name", "pid", "tid", "dur") if k in event}
                small |= {"ts": round(ts - origin, 3), "args": {k: args[k] for k in _KEPT_ARGS if k in args}}
                out.write((",\n" if written else "") + json.dumps(small, separators=(",", ":")))
                written += 1
        out.write("\n]}\n")
    return written


@contextmanager
def _write_gzip(destination: str | Path) -> Iterator[io.TextIOBase]:
    """A text file that is gzipped beside its destination and renamed when it is whole."""
    destination = Path(destination)
    handle, beside = tempfile.mkstemp(dir=destination.absolute().parent, prefix=f".{destination.name}.")
    try:
        with os.fdopen(handle, "wb") as raw, gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as zipped:
            with io.TextIOWrapper(zipped, encoding="utf-8") as text:
                yield text
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(beside, 0o666 & ~umask)
        os.replace(beside, destination)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
