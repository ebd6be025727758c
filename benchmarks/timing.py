"""How things are timed.

On a GPU every arm is one CUDA graph of many calls, each on its own copy of the inputs and weights; the copies exceed L2
several times over, so that each call finds its bytes in memory, as in a model. Replays of all arms of a case alternate,
so that a clock that drifts meets all of them. On a CPU calls are timed one by one.
"""

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from tiny_gemm.profiling import measure_roof

ROTATION_BYTES = 300_000_000  # of copies, or four times L2 if that is more
MAX_COPIES = 4096
GRAPH_US = 500.0  # a graph lasts this long at least, so that the cost of starting it does not count

Read = Callable[[], float]  # microseconds a call, once the device has finished
Start = Callable[[], Read]  # one sample


@dataclass(frozen=True)
class Machine:
    """What cases are built for. roof_gbps: a streaming read of 1 GiB; roof_tflops: a large matrix product."""

    device: torch.device
    l2_bytes: int
    roof_gbps: float
    roof_tflops: float

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def copies(self, nbytes: int) -> int:
        """How many copies of `nbytes` exceed L2 several times over; at most MAX_COPIES. On a CPU 2."""
        if not self.is_cuda:
            return 2
        return max(2, min(MAX_COPIES, math.ceil(max(ROTATION_BYTES, 4 * self.l2_bytes) / nbytes)))

    def floor_us(self, nbytes: int, flops: int = 0) -> float:
        return max(nbytes / self.roof_gbps / 1e3, flops / self.roof_tflops / 1e6)


def measure_machine(device: torch.device) -> Machine:
    """Measures the roofs of `device`: 1 GiB read and an 8192 matrix product in bfloat16; on a CPU smaller ones."""
    on_gpu = device.type == "cuda"
    roof = measure_roof(device)
    if roof is None:
        raise MemoryError(f"{device} has no room for the 1 GiB whose reading is the roof")
    side = 8192 if on_gpu else 512
    a, b = torch.randn(2, side, side, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    l2 = torch.cuda.get_device_properties(device).L2_cache_size if on_gpu else 0
    machine = Machine(device, l2, roof, 1.0)
    # A CPU may be busy with something else: the fastest of several, as the roof is what cannot be exceeded.
    us = min(measure([start_of([lambda: a @ b], machine)], machine)[0].us for _ in range(1 if on_gpu else 5))
    return replace(machine, roof_tflops=2 * side**3 / us / 1e6)


@dataclass(frozen=True)
class Times:
    """Microseconds a call: median, 20th and 80th percentile of the rounds."""

    us: float
    p20: float
    p80: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Times":
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        cuts = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), cuts[0], cuts[3])


def interleave(starts: Sequence[Start], rounds: int, finish: Callable[[], None] = lambda: None) -> list[Times]:
    """Samples each arm once a round, a different one first in each round; `finish` waits for the device."""
    reads: list[list[Read]] = [[] for _ in starts]
    for r in range(rounds):
        for i in range(len(starts)):
            arm = (r + i) % len(starts)
            reads[arm].append(starts[arm]())
    finish()
    return [Times.of([read() for read in arm]) for arm in reads]


def measure(starts: Sequence[Start], machine: Machine, *, budget_s: float = 0.8, max_rounds: int = 40) -> list[Times]:
    """Times arms against each other. Rounds: what fits into budget_s, but at least 10 (on a CPU 5)."""
    if not starts:
        return []
    finish = torch.cuda.synchronize if machine.is_cuda else lambda: None
    begin = time.perf_counter()
    interleave(starts, 1, finish)  # warms up, and tells how long a round takes
    rounds = min(max_rounds, max(10 if machine.is_cuda else 5, int(budget_s / (time.perf_counter() - begin))))
    if machine.is_cuda:
        torch.cuda._sleep(10_000_000)  # some 5 ms for the host to run ahead, so that no graph waits to be launched
    return interleave(starts, rounds, finish)


def time_us(calls: Sequence[Callable], machine: Machine) -> float:
    """Microseconds a call, the median of seven rounds: enough to choose by, not to report."""
    return measure([start_of(calls, machine)], machine, max_rounds=7)[0].us


def start_of(calls: Sequence[Callable], machine: Machine) -> Start:
    return _start_graph(calls) if machine.is_cuda else _start_on_cpu(calls)


def _start_graph(calls: Sequence[Callable]) -> Start:
    calls = list(calls)
    start = _replays(capture(calls), calls)
    start()  # the first replay uploads the graph
    read = start()
    torch.cuda.synchronize()
    repeats = math.ceil(GRAPH_US / max(read() * len(calls), 1.0))
    if repeats > 1:
        del start, read  # and the graph with them
        calls *= repeats
        start = _replays(capture(calls), calls)
    return start


def _replays(graph: torch.cuda.CUDAGraph, calls: list[Callable]) -> Start:
    """The graph's replays, which read the memory of the calls' inputs: they must live as long."""

    def start() -> Read:
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        graph.replay()
        after.record()
        return lambda: before.elapsed_time(after) * 1e3 / len(calls)

    return start


def _start_on_cpu(calls: Sequence[Callable]) -> Start:
    def start() -> Read:
        begin = time.perf_counter()
        for call in calls:
            call()
        us = (time.perf_counter() - begin) * 1e6 / len(calls)
        return lambda: us

    return start


def capture(calls: Sequence[Callable]) -> torch.cuda.CUDAGraph:
    """One CUDA graph of all calls, after a warm-up on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        torch.cuda.synchronize()
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        if cached > torch.cuda.mem_get_info()[1] // 4:  # capturing, torch hands none of it back; and this takes long
            torch.cuda.empty_cache()
        graph.capture_begin()
        try:
            for call in calls:
                call()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # which says only that the capture has failed
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(side)
    return graph


def call_us(call: Callable) -> float:
    """Wall time of one call on a GPU, the wait for it included: the better of two."""
    best = math.inf
    for _ in range(2):
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - begin) * 1e6)
    return best


def eager_cpu_us(calls: Sequence[Callable]) -> float:
    """What one eager call costs the host on a GPU: median of five runs of up to 64 calls without a wait in between."""
    runs = []
    count = max(2, min(64, int(20_000 / call_us(calls[0]))))
    for _ in range(5):
        begin = time.perf_counter()
        for i in range(count):
            calls[i % len(calls)]()
        runs.append((time.perf_counter() - begin) * 1e6 / count)
        torch.cuda.synchronize()
    return statistics.median(runs)
