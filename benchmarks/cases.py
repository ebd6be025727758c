"""What a case is, what an arm is, and how one becomes rows: checked against the oracle, refused or timed.

A case is one problem (shape, dtype); its arms are the implementations that are compared on it. Nothing is allocated
before a case runs. An arm that is absent, fails or is wrong becomes a row with an `error` that begins with "absent: ",
"failed: ", "refused: " or "not reached: ", and the others are timed all the same.

max_rel_err is the largest, over rows of the output (its last dimension), of |out - oracle| / |oracle| in the Euclidean
norm, where |oracle| is that of the row or of an average row, whichever is larger.
"""

import fnmatch
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.timing import Machine, Start, Times, eager_cpu_us, measure, start_of

# An arm whose max_rel_err is above this is refused.
BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 3e-3, torch.float32: 1e-4}
STEP_BOUNDS = {torch.bfloat16: 6e-2, torch.float16: 2e-2, torch.float32: 1e-3}  # of a whole model: dozens of roundings
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OURS = "tiny-gemm"  # what the names of this project's arms begin with


class Absent(Exception):
    """Why an implementation cannot be measured here: not installed, or not made for this dtype or device."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for; empty means each suite's own."""

    models: tuple[str, ...] = ()
    mode: str | None = None
    seq_lengths: tuple[int, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    quick: bool = False

    @property
    def rows(self) -> tuple[int, ...]:
        """M, for the suites that know neither batches nor lengths."""
        return self.batch_sizes or (self.seq_lengths if self.mode == "seq_length" else ())

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass
class Arm:
    """One implementation. calls() makes its copies and returns one call for each; a call's result goes to the oracle.

    nbytes: what one call has to read and write. context: what all its calls run under. sample() instead of being timed
    call by call an arm may time itself: sample() returns what takes one sample, by the wall clock. bound: a peer's own
    instead of the case's, where it is known to round more often than the others; its note then says so.
    """

    impl: str
    calls: Callable[[], Sequence[Callable]]
    nbytes: int
    flops: int = 0
    context: Callable[[], AbstractContextManager] = nullcontext
    sample: Callable[[], Start] | None = None
    note: str | None = None
    bound: float | None = None


@dataclass
class Work:
    """A case that is ready to run. error_of(output) -> max_rel_err."""

    arms: list[Arm]
    error_of: Callable[[object], float]
    bound: float


@dataclass
class Case:
    suite: str
    model: str | None
    shape: str
    facts: dict
    build: Callable[[], Work]

    @property
    def label(self) -> str:
        return " ".join(filter(None, [self.suite, self.model, self.shape]))

    def row(self, impl: str, **measured) -> dict:
        empty = dict.fromkeys(MEASURED)
        return {"suite": self.suite, "model": self.model, "shape": self.shape, "impl": impl} | (
            self.facts | empty | measured
        )


MEASURED = ("us", "us_p20", "us_p80", "bytes", "floor_us", "gbps", "roof_fraction", "max_rel_err", "eager_cpu_us")


def relative_error(out: Tensor, oracle: Tensor) -> float:
    """max_rel_err as this module defines it; infinite where the output is not finite or has another shape."""
    if out.shape != oracle.shape or not bool(out.isfinite().all()):
        return float("inf")
    norm = oracle.norm(dim=-1)
    size = norm.maximum(norm.square().mean().sqrt())
    return float(((out.double() - oracle).norm(dim=-1) / size).max())


def compiled(function: Callable) -> Callable:
    """torch.compile at its best: max-autotune, without its own CUDA graphs, because the harness captures one.

    It starts from nothing: dynamo keeps what it compiled by code object, and refuses after eight shapes.
    """
    import torch._inductor.select_algorithm as select_algorithm

    select_algorithm.PRINT_AUTOTUNE = False  # a table of candidates for each product, on stderr
    torch._dynamo.reset()
    return torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False, fullgraph=True)


def left_out(where: str) -> Callable[[], list]:
    """The calls of an arm that is not measured in this case, because it would take long: a row says so."""

    def calls() -> list:
        raise Absent(f"it takes seconds, and is measured only {where}")

    return calls


def needs_gpu(machine: Machine) -> None:
    if not machine.is_cuda:
        raise Absent("runs on a GPU only")


def run_case(case: Case, machine: Machine, impls: Sequence[str] = ("*",)) -> list[dict]:
    """The rows of a case, one for each arm that `impls` (patterns) names."""
    try:
        work = case.build()
    except Exception as e:
        return [case.row("case", error=_error(e))]
    rows: list[dict] = []
    timed: list[tuple[dict, Start]] = []  # call by call
    sampled: list[tuple[dict, Start]] = []  # arms that time themselves
    for arm in work.arms:
        if not any(fnmatch.fnmatch(arm.impl, pattern) for pattern in impls):
            continue
        row = case.row(arm.impl, bytes=arm.nbytes, floor_us=machine.floor_us(arm.nbytes, arm.flops), note=arm.note)
        rows.append(row)
        try:
            with arm.context():
                calls = arm.calls()
                _check(row, calls, work.error_of, work.bound if arm.bound is None else arm.bound)
                if arm.sample is not None:
                    sampled.append((row, arm.sample()))
                else:
                    if machine.is_cuda:
                        row["eager_cpu_us"] = eager_cpu_us(calls)
                    timed.append((row, start_of(calls, machine)))
        except Exception as e:
            row["error"] = _error(e)
    for group, timing in ((timed, "graph" if machine.is_cuda else "wall"), (sampled, "wall")):
        rounds = {}
        if group is sampled:
            rounds, group = {"max_rounds": 5}, [arm for arm in group if _runs(*arm)]
        try:
            times = measure([start for _, start in group], machine, **rounds)
        except Exception as e:  # such as a kernel that faults only now
            for row, _ in group:
                row["error"] = _error(e)
            continue
        for (row, _), t in zip(group, times, strict=True):
            _fill(row, t, timing)
    return rows


def _runs(row: dict, start: Start) -> bool:
    """Takes one sample. What fails then is the failure of this arm alone."""
    try:
        start()()
    except Exception as e:
        row["error"] = _error(e)
    return "error" not in row


class Refused(Exception):
    """A wrong result, which is not timed."""


def _check(row: dict, calls: Sequence[Callable], error_of: Callable[[object], float], bound: float) -> None:
    """The first and the last copy against the oracle."""
    row["copies"] = len(calls)
    row["max_rel_err"] = error = max(error_of(call()) for call in {id(c): c for c in (calls[0], calls[-1])}.values())
    if not error <= bound:
        raise Refused(f"max_rel_err {error:.2g} is above {bound:.2g}")


def _error(e: Exception) -> str:
    """One line: what kind of row this is, and why."""
    kind = {Absent: "absent", Refused: "refused"}.get(type(e), "failed")
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    message = lines[0] if lines else ""
    return f"{kind}: {message}" if kind != "failed" else f"failed: {type(e).__name__}: {message}"[:300]


def _fill(row: dict, times: Times, timing: str) -> None:
    row |= {"us": times.us, "us_p20": times.p20, "us_p80": times.p80, "timing": timing}
    row |= {"gbps": row["bytes"] / times.us / 1e3, "roof_fraction": row["floor_us"] / times.us}
    if row["suite"] == "decode":
        row["tokens_per_s"] = row["B"] * 1e6 / times.us
