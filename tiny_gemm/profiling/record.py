"""Records steps under torch.profiler, with warm-up, and writes trace, TensorBoard log, figures and report.

    with tiny_gemm.profiling.profile("out/") as p:
        for batch in batches:
            model(batch)
            p.step()
    rich.print(p.report.table())

What a kernel must move and compute cannot be seen in a trace. Kernels that declare it, by Triton's own
@triton.jit(launch_metadata=...), are asked during the last warm-up step; torch's ops tell their shapes. Both go into
the trace, so that the same report can be had from the file later.
"""

import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path

import torch
from torch.utils._triton import has_triton_package

from tiny_gemm.device import processor
from tiny_gemm.generate import Generator, SamplingParams
from tiny_gemm.model import Transformer
from tiny_gemm.profiling.output import beside, check_replaceable, write_all
from tiny_gemm.profiling.report import Report, analyse, first_step_costs
from tiny_gemm.profiling.trace import add_metadata, read_trace

WARM_UP_STEPS = 3
RECORDED_STEPS = 16
READS = (torch.sum, torch.amax, functools.partial(torch.sum, dim=1))  # kernels that only read, in effect


class profile:  # noqa: N801 - a context manager, as torch.profiler.profile is
    """Profiles the steps inside; call step() after each. Afterwards `report` is a Report, and `directory`, if given,
    has

        trace.json.gz           for ui.perfetto.dev, chrome://tracing and tiny-gemm profile --trace
        report.json             the report
        roofline.*, timeline.*  the figures as SVG and PNG, if matplotlib is there: pip install 'tiny-gemm[profile]'
        tensorboard/            for tensorboard --logdir; scalars, text and figures too, if tensorboard is there

    The first `warmup` steps are not recorded, then at most `steps` are. A directory that an earlier profile wrote is
    replaced once the new one is whole; any other that is not empty is refused (ValueError).
    tokens_per_step, and step_bytes (what a step must read): for tokens/s and the floor. roof_gbps: the memory roof,
    instead of measuring it, which takes 1 GiB of the GPU for a moment. metadata: facts for the trace to carry.
    `missing` tells afterwards what could not be written, for want of which package.
    """

    def __init__(
        self,
        directory: str | Path | None = None,
        *,
        warmup: int = WARM_UP_STEPS,
        steps: int = RECORDED_STEPS,
        tokens_per_step: int | None = None,
        step_bytes: float | None = None,
        roof_gbps: float | None = None,
        metadata: dict | None = None,
    ):
        if warmup < 0 or steps < 1:
            raise ValueError(f"warmup={warmup} must be 0 or more, and steps={steps} 1 or more")
        self.directory = None if directory is None else Path(directory)
        if self.directory is not None:
            check_replaceable(self.directory)
        self.warmup, self.steps = warmup, steps
        facts = {"tokens_per_step": tokens_per_step, "step_bytes": step_bytes, "roof_gbps": roof_gbps}
        self.metadata = {k: v for k, v in facts.items() if v is not None} | (metadata or {})
        self.report: Report | None = None
        self.missing: list[str] = []
        self._hook: ExitStack | None = None
        self._done = 0

    def __enter__(self) -> "profile":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.metadata = {"device": processor(device), "torch": torch.__version__} | self.metadata
        if "roof_gbps" not in self.metadata and (roof := measure_roof(device)):
            self.metadata["roof_gbps"] = roof
        with ExitStack() as undo:
            if self.directory is None:
                work = undo.enter_context(tempfile.TemporaryDirectory(prefix="tiny-gemm-profile-"))
            else:
                work = undo.enter_context(beside(self.directory))
            self._work = Path(work)
            self._profiler = torch.profiler.profile(
                activities=activities(),
                schedule=torch.profiler.schedule(wait=0, warmup=self.warmup, active=self.steps, repeat=1),
                on_trace_ready=torch.profiler.tensorboard_trace_handler(str(self._work / "tensorboard"), use_gzip=True),
                record_shapes=True,
            )
            self._profiler.start()
            self._exit = undo.pop_all()
        self._ask_in_last_warm_up_step()
        return self

    def step(self) -> None:
        """Ends a step."""
        self._done += 1
        self._ask_in_last_warm_up_step()
        self._profiler.step()

    def _ask_in_last_warm_up_step(self) -> None:
        """Declared costs are collected there and nowhere else: asking for them may wait for the GPU."""
        if self._hook is not None:
            self._hook.close()
            self._hook = None
        elif self._done == self.warmup - 1 and "costs" not in self.metadata:
            self._hook = ExitStack()
            self.metadata["costs"] = self._hook.enter_context(declared_costs())

    def __exit__(self, kind, error, traceback) -> None:
        with self._exit:  # an error in here leaves nothing behind, either
            if self._hook is not None:
                self._hook.close()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._profiler.stop()
            if error is not None:
                raise error
            self._finish()

    def _finish(self) -> None:
        recorded = sorted((self._work / "tensorboard").glob("*.pt.trace.json.gz"))
        if not recorded:
            raise ValueError(
                f"profile() recorded nothing: step() was called {self._done} times, and the first {self.warmup} steps "
                "are warm-up; run more steps, or pass warmup=0"
            )
        trace = self._work / "trace.json.gz"
        add_metadata(recorded[-1], trace, self.metadata)
        self.report = analyse(read_trace(trace), name=str(self.directory or "profile"))
        if self.directory is not None:
            self.missing = write_all(self.report, self._work)


def activities() -> list:
    cpu, cuda = torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA
    return [cpu, cuda] if torch.cuda.is_available() else [cpu]


def measure_roof(device: torch.device) -> float | None:
    """GB/s of a streaming read of 1 GiB (256 MiB on a CPU): the median run of the fastest of READS. None where the
    device has no room for it. The harness in benchmarks/ takes its roof from here, too."""
    on_gpu = device.type == "cuda"
    try:
        data = torch.ones(2**14 if on_gpu else 2**12, 2**14, dtype=torch.float32, device=device)
    except torch.OutOfMemoryError:
        return None
    n_bytes = data.nbytes
    best = min(statistics.median(_read_times(read, data)) for read in READS)
    del data
    if on_gpu:
        torch.cuda.empty_cache()  # or torch would keep the room
    return round(n_bytes / best / 1e9, 1)


def _read_times(read: Callable, data: torch.Tensor) -> list[float]:
    """Seconds of each run, after a warm-up. On a GPU all runs are queued before the first is waited for: each read is
    far longer than its launch, so that no time of the host's is counted."""
    read(data)
    if not data.is_cuda:
        marks = [time.perf_counter()]
        for _ in range(5):
            read(data)
            marks.append(time.perf_counter())
        return [after - before for before, after in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(21)]
    events[0].record()
    for event in events[1:]:
        read(data)
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(events)]


@contextmanager
def declared_costs() -> Iterator[list[dict]]:
    """Collects what the Triton kernels launched inside declare: name, grid, bytes, flops, in order of launch.

    Nothing is collected while a stream is captured, since a captured launch does not run.
    """
    costs: list[dict] = []

    def note(launch) -> None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        grid = next((arguments[0] for _, arguments in launch.extras), None)  # get() empties extras
        facts = launch.get()
        if grid is not None and "bytes" in facts:
            flops = sum(value for name, value in facts.items() if name.startswith("flops"))
            padded = [*map(int, grid), 1, 1][:3]
            costs.append({"name": facts["name"], "grid": padded, "bytes": int(facts["bytes"]), "flops": int(flops)})

    if not torch.cuda.is_available() or not has_triton_package():  # which imports it, if it is there
        yield costs
        return
    hooks = sys.modules["triton"].knobs.runtime.launch_enter_hook
    hooks.add(note)
    try:
        yield costs
    finally:
        hooks.remove(note)


# ---------------------------------------------------------------------------------------------------------------------
# Decode steps of a model
# ---------------------------------------------------------------------------------------------------------------------


def profile_decode(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    directory: str | Path | None = None,
    *,
    steps: int = RECORDED_STEPS,
    roof_gbps: float | None = None,
) -> profile:
    """Profiles `steps` decode steps of the runtime after `prompts` (token ids), greedy sampling included. On a GPU a
    step is the replay of a CUDA graph, in which no shapes are seen: one step without graph tells the costs first.
    Returns the finished profile, with its `report`."""
    if steps < 1:
        raise ValueError(f"steps={steps} must be 1 or more")
    on_gpu = model.device.type == "cuda"
    new_tokens = 1 + WARM_UP_STEPS + 2 * steps + 2
    params = SamplingParams(max_new_tokens=new_tokens, stop_token_ids=())
    max_length = max(map(len, prompts)) + new_tokens
    if directory is not None:
        check_replaceable(Path(directory))
    facts = {} if not on_gpu else {"costs": _costs_of_a_step(model, prompts, max_length)}
    generator = Generator(model, max_length=max_length)
    tokens = generator.steps(prompts, params)
    for _ in range(1 + WARM_UP_STEPS):  # the first token comes from the prompt
        next(tokens)
    unprofiled_us = _time_steps(tokens, steps) * 1e6
    context = max(map(len, prompts)) + WARM_UP_STEPS + steps
    facts |= {"unprofiled_step_us": round(unprofiled_us, 1), "context": context, "model": model.config.architecture}
    with profile(
        directory,
        warmup=1,
        steps=steps,
        tokens_per_step=len(prompts),
        step_bytes=model.weight_bytes() + _cache_bytes(model, len(prompts), context),
        roof_gbps=roof_gbps,
        metadata=facts,
    ) as p:
        for _ in range(1 + steps):
            next(tokens)
            p.step()
    return p


def _time_steps(tokens: Iterator, steps: int) -> float:
    """Seconds a step. Each token has arrived when next() returns it; waiting for the device as well would count the
    step that the generator has launched ahead."""
    start = time.perf_counter()
    for _ in range(steps):
        next(tokens)
    return (time.perf_counter() - start) / steps


def _cache_bytes(model: Transformer, batch: int, context: int) -> int:
    c = model.config
    return 2 * c.num_layers * batch * c.num_kv_heads * context * c.head_dim * model.dtype.itemsize


def _costs_of_a_step(model: Transformer, prompts, max_length: int) -> list[dict]:
    """Bytes and flops of each kernel of a decode step, in order, from a step that launches each by itself."""
    generator = Generator(model, max_length=max_length, run_ahead=0, cuda_graph=False)
    tokens = generator.steps(prompts, SamplingParams(max_new_tokens=4, stop_token_ids=()))
    for _ in range(2):  # the prompt, and a step that compiles
        next(tokens)
    with tempfile.TemporaryDirectory() as scratch:
        file = os.path.join(scratch, "trace.json")
        with torch.profiler.profile(activities=activities(), record_shapes=True) as profiler:
            with declared_costs() as declared:
                next(tokens)
        profiler.export_chrome_trace(file)
        trace = read_trace(file)
    trace.metadata["costs"] = declared
    return first_step_costs(trace)
