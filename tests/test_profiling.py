"""profiling: traces with known answers, the scanner, costs, verdicts, and a real CPU profile."""

import gzip
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import H200, TraceBuilder

from tiny_gemm import profiling
from tiny_gemm.profiling import TraceError, analyse, output, read_trace, record, roofline, trace, trim
from tiny_gemm.profiling.costs import op_cost
from tiny_gemm.profiling.names import FAMILIES, family, short_name, shorten
from tiny_gemm.profiling.roofline import BANDWIDTH, COMPUTE, LATENCY, LAUNCH, UNKNOWN, verdict

ROOT = Path(__file__).resolve().parent.parent
MUL = "aten::mul", [[64], [64]], ["float", "float"]


def report_of(builder: TraceBuilder, tmp_path: Path, **options):
    return analyse(read_trace(builder.write(tmp_path / "trace.json")), **options)


def rows_of(report) -> dict:
    return {row.name: row for row in report.rows}


# ------------------------------------------------------------------------------------------------------- known answers
def test_gaps_busy_and_idle_on_one_stream(tmp_path):
    b = TraceBuilder()
    b.kernel("a", 100.0, 10.0)
    b.kernel("b", 115.0, 20.0)  # after 5 us
    b.kernel("c", 135.0, 5.0)  # at once
    report = report_of(b, tmp_path)
    rows = rows_of(report)
    assert [rows[n].gap_us for n in "abc"] == [0.0, 5.0, 0.0]
    assert report.step.step_us == 40.0
    assert report.step.busy_fraction == pytest.approx(35 / 40)
    assert report.step.idle_us == pytest.approx(5.0)
    assert rows["b"].share == pytest.approx(20 / 35)
    assert not report.marked_steps and report.step.steps == 1


def test_overlaps_on_several_streams(tmp_path):
    """Busy time is the union; the gap counts from the latest end on any stream."""
    b = TraceBuilder()
    b.kernel("long", 0.0, 100.0, stream=7)
    b.kernel("inside", 10.0, 20.0, stream=8)
    b.kernel("overlapping", 90.0, 20.0, stream=9)
    b.kernel("late", 130.0, 10.0, stream=8)  # 20 us after "overlapping"
    report = report_of(b, tmp_path)
    rows = rows_of(report)
    assert [rows[n].gap_us for n in ("inside", "overlapping", "late")] == [0.0, 0.0, 20.0]
    assert report.step.busy_fraction == pytest.approx(120 / 140)
    assert {e.stream for e in report.timeline} == {7, 8, 9}


def test_dependent_launches_count_from_the_end_of_what_they_wait_for(tmp_path):
    """Programmatic dependent launch, three deep: no time is counted twice, and what was waited for is nobody's work."""
    costs = [{"name": "gemm", "grid": [1, 1, 1], "bytes": 4000, "flops": 8000}]
    b = TraceBuilder(roof_gbps=10.0, costs=costs)
    b.kernel("attention", 100.0, 8.0)
    b.kernel("gemm", 102.0, 8.0)  # waits for 6 us, works for 2
    b.kernel("norm", 107.5, 3.5)  # begins while both run
    b.kernel("done", 109.0, 1.5)  # ends before "norm": all of it was waiting
    b.kernel("late", 112.0, 4.0)
    report = report_of(b, tmp_path)
    rows = rows_of(report)
    assert {n: r.total_us for n, r in rows.items()} == pytest.approx(
        {"attention": 8.0, "gemm": 2.0, "norm": 1.0, "done": 0.0, "late": 4.0}
    )
    assert {n: r.overlap_us for n, r in rows.items()} == pytest.approx(
        {"attention": 0.0, "gemm": 6.0, "norm": 2.5, "done": 1.5, "late": 0.0}
    )
    assert rows["gemm"].gbps == pytest.approx(4000 / 2e-6 / 1e9) and rows["gemm"].tflops == pytest.approx(8e3 / 2e6)
    assert rows["gemm"].gap_us == 0.0 and rows["late"].gap_us == pytest.approx(1.0)
    assert sum(r.share for r in report.rows) == pytest.approx(1.0)
    step = report.step
    assert step.kernel_us == pytest.approx(step.busy_fraction * step.step_us) == pytest.approx(15.0)
    assert "already" in rows["gemm"].advice and "already" not in rows["late"].advice
    assert [(e.start_us, e.duration_us) for e in report.timeline] == [(0, 8), (8, 2), (10, 1), (10.5, 0), (12, 4)]
    assert "-6.0" in output.as_text(report), "a gap below zero is an overlap"


def test_kernels_of_several_streams_really_run_at_once(tmp_path):
    b = TraceBuilder()
    b.kernel("a", 0.0, 10.0, stream=7)
    b.kernel("b", 5.0, 10.0, stream=8)
    b.kernel("c", 9.0, 10.0, stream=7)  # waits for "a" only
    rows = rows_of(report_of(b, tmp_path))
    assert {n: r.total_us for n, r in rows.items()} == pytest.approx({"a": 10.0, "b": 10.0, "c": 9.0})
    assert {n: r.overlap_us for n, r in rows.items()} == pytest.approx({"a": 0.0, "b": 0.0, "c": 1.0})


def test_one_long_wait_among_many_short_ones_is_named(tmp_path):
    """Such as a plan that is made anew each step, which the median gap before its kernel does not show."""
    b = TraceBuilder()
    for s, wait in enumerate((500.0, 700.0, 600.0)):
        b.step(s, 1000.0 * s, 999.0)
        for i in range(10):
            t = 1000.0 * s + 5 * i + (wait if i >= 3 else 0)
            b.kernel("attention" if i % 2 else "other", t, 5.0, launched=1000.0 * s + i)
    report = report_of(b, tmp_path)
    assert rows_of(report)["attention"].gap_us == 0.0
    assert report.step.longest_gap_before == "attention" and report.step.longest_gap_us == pytest.approx(600.0)
    assert "longest wait 600.0 us, 60% of the step, before attention" in output.as_text(report)


def test_steps_are_those_of_the_launches(tmp_path):
    """The GPU runs late: kernels run long after the step that launched them has ended on the host."""
    b = TraceBuilder()
    for s in range(3):
        b.step(s, 100.0 * s, 90.0)
        for i in range(2):
            b.kernel("k", 1000 + 200 * s + 50 * i, 40.0, launched=100.0 * s + 10 * i)
    b.kernel("stray", 900.0, 1.0, launched=99.0)  # between two steps
    report = report_of(b, tmp_path)
    assert report.marked_steps and report.step.steps == 3
    assert report.step.kernels == 2
    assert report.step.step_us == 200.0
    assert report.step.busy_fraction == pytest.approx(80 / 200)
    assert report.step.verdict == LAUNCH
    assert any("1 kernel" in note for note in report.notes)


def test_cuda_graph_kernels_share_one_launch(tmp_path):
    """A replay is one launch for all its kernels, which have one correlation id, and no op."""
    costs = [{"name": "k", "grid": [4, 1, 1], "bytes": n, "flops": 2 * n} for n in (1000, 3000)]
    b = TraceBuilder(roof_gbps=100.0, costs=costs, step_bytes=5000, tokens_per_step=2)
    for s in range(2):
        b.step(s, 100.0 * s, 90.0)
        b.launch(77 + s, 100.0 * s + 5, "cudaGraphLaunch")
        for i in range(2):
            b.kernel("k", 500.0 + 100 * s + 20 * i, 10.0, correlation=77 + s, grid=(4, 1, 1))
    report = report_of(b, tmp_path)
    (row,) = report.rows
    assert (row.calls, row.grid) == (4, (4, 1, 1))
    assert row.gbps == pytest.approx(8000 / 40 / 1e3)
    assert row.intensity == pytest.approx(2.0)
    assert report.step.step_us == 100.0 and report.step.kernels == 2
    assert report.step.tokens_per_s == pytest.approx(2e6 / 100)
    assert report.step.floor_us == pytest.approx(5000 / 100 / 1e3)
    assert report.step.known_bytes == pytest.approx(1.0)


def test_a_floor_of_some_bytes_only_says_so(tmp_path):
    """A copy of 10 us whose bytes are known and a kernel of 30 us; what is told of the whole step is exact."""

    def report(**facts):
        b = TraceBuilder(roof_gbps=100.0, **facts)
        b.memcpy("Memcpy DtoD (Device -> Device)", 0.0, 10.0, 50_000)
        b.kernel("k", 10.0, 30.0)
        return report_of(b, tmp_path)

    summed, told = report(), report(step_bytes=200_000)
    assert (summed.step.floor_us, told.step.floor_us) == (1.0, 2.0)
    assert "bytes known for 25% of the kernels' time" in output.as_text(summed)
    assert "bytes known" not in output.as_text(told)
    for before, after, words in (
        (summed, told, "before: bytes known for 25%"),
        (told, summed, "after: bytes known for 25%"),
        (told, told, None),
    ):
        text = _printed(after.against(before))
        floor = next(line for line in text.splitlines() if line.startswith("floor"))
        assert words in text if words else "bytes known" not in text
        assert floor.rstrip().endswith("x") is (words is None), "a part and a whole have no ratio"


def test_declared_costs_are_not_spread_over_other_launches(tmp_path):
    """Three launches where two were declared, of different bytes: not known. Of the same bytes: known."""
    for second, known in ((1000, True), (2000, False)):
        costs = [{"name": "k", "grid": [1, 1, 1], "bytes": n, "flops": 0} for n in (1000, second)]
        b = TraceBuilder(costs=costs)
        for i in range(3):
            b.kernel("k", 10.0 * i, 5.0)
        (row,) = report_of(b, tmp_path).rows
        assert (row.bytes == 1000) is known and (row.bytes is None) is not known


def test_shapes_give_bytes_to_the_longest_kernel_of_an_op(tmp_path):
    dims, types = [[1, 4096], [4096, 4096]], ["c10::BFloat16", "c10::BFloat16"]
    b = TraceBuilder()
    b.op("aten::mm", 0.0, 9.0, dims=dims, types=types, external=5)
    b.kernel("void gemm<float>(Params)", 10.0, 20.0, launched=1.0, grid=(256, 1, 1), **{"External id": 5})
    b.kernel("splitKreduce", 31.0, 2.0, launched=2.0, **{"External id": 5})
    report = report_of(b, tmp_path, roof_gbps=4000.0)
    gemm, reduce = rows_of(report)["gemm"], rows_of(report)["splitKreduce"]
    assert gemm.bytes == 2 * (4096 + 4096 * 4096 + 4096) and gemm.flops == 2 * 4096 * 4096
    assert gemm.op == reduce.op == "aten::mm" and reduce.bytes is None
    assert gemm.roof_fraction == pytest.approx(gemm.bytes / 20e-6 / 4e12)
    assert gemm.label == "aten::mm: gemm"


def test_copies_count_what_they_move(tmp_path):
    b = TraceBuilder()
    b.memcpy("Memcpy DtoD (Device -> Device)", 0.0, 10.0, 1_000_000)
    b.memcpy("Memcpy HtoD (Pinned -> Device)", 10.0, 40.0, 1_000_000)
    report = report_of(b, tmp_path, roof_gbps=1000.0)
    rows = rows_of(report)
    assert rows["Memcpy DtoD (Device -> Device)"].roof_fraction == pytest.approx(0.2)
    assert rows["Memcpy HtoD (Pinned -> Device)"].roof_fraction is None  # the bus's speed says nothing of the memory's


def test_waves_from_what_a_block_needs(tmp_path):
    b = TraceBuilder()
    b.kernel("threads", 0.0, 10.0, grid=(132 * 16, 1, 1), block=(128, 1, 1))  # 2048 threads an SM: 16 blocks
    b.kernel("registers", 20.0, 10.0, grid=(132, 2, 1), block=(128, 1, 1), **{"registers per thread": 255})  # 2 blocks
    b.kernel("shared", 40.0, 10.0, grid=(66, 1, 1), block=(128, 1, 1), **{"shared memory": 200_000})  # 1 block
    rows = rows_of(report_of(b, tmp_path))
    assert rows["threads"].waves == pytest.approx(1.0)
    assert rows["registers"].waves == pytest.approx(1.0)
    assert rows["shared"].waves == pytest.approx(0.5)


def test_the_busiest_gpu_is_shown(tmp_path):
    b = TraceBuilder()
    b.kernel("here", 0.0, 10.0)
    b.kernel("there", 5.0, 50.0)
    b.events[-1]["args"]["device"] = 1
    report = report_of(b, tmp_path)
    assert [r.name for r in report.rows] == ["there"] and "GPU 1" in report.notes[0]


def test_the_roof_is_measured_given_or_from_the_datasheet_and_says_so(tmp_path):
    for builder, options, roof, words in (
        (TraceBuilder(roof_gbps=4350.0), {}, 4350.0, "measured"),
        (TraceBuilder(roof_gbps=4350.0), {"roof_gbps": 4000.0}, 4000.0, "given"),
        (TraceBuilder(), {}, 4800.0, "not measured"),
        (TraceBuilder({**H200, "name": "Abacus 3000"}), {}, None, "not known"),
        (TraceBuilder(None), {}, None, "not known"),
    ):
        builder.kernel("k", 0.0, 10.0)
        report = report_of(builder, tmp_path, **options)
        assert report.roof_gbps == roof and words in report.roof_source
        assert (report.ridge is None) is (roof is None)
    with pytest.raises(ValueError, match="roof_gbps"):
        report_of(builder, tmp_path, roof_gbps=0.0)


def test_cpu_trace_by_self_time(tmp_path):
    b = TraceBuilder()
    for s in range(2):
        t = 100.0 * s
        b.step(s, t, 80.0)
        b.op("aten::linear", t + 10, 40.0, dims=[[1, 64], [64, 64]], types=["float", "float"])
        b.op("aten::mm", t + 15, 30.0, dims=[[1, 64], [64, 64]], types=["float", "float"])
        b.op("aten::add", t + 60, 10.0, dims=[[64], [64]], types=["float", "float"], thread=2)
    report = report_of(b, tmp_path)
    rows = rows_of(report)
    assert report.processor == "cpu" and report.roof_gbps is None
    assert {n: r.total_us for n, r in rows.items()} == {"aten::linear": 20.0, "aten::mm": 60.0, "aten::add": 20.0}
    assert rows["aten::linear"].bytes is None and rows["aten::mm"].bytes == 4 * (64 + 64 * 64 + 64)
    assert report.step.step_us == 80.0 and report.step.busy_fraction == pytest.approx(50 / 80)


def test_reports_survive_json_and_tables(tmp_path):
    b = TraceBuilder(roof_gbps=4350.0)
    b.kernel("void at::native::elementwise_kernel<128, 2>(int)", 0.0, 2.0, op=MUL)
    b.kernel("[bracketed] name", 5.0, 2.0)  # rich must not take it for markup
    report = report_of(b, tmp_path)
    assert json.loads(json.dumps(report.to_json()))["step"]["kernels"] == 2
    for width in (60, 80, 100, 160):
        text = output.as_text(report, width)
        table = [line for line in text.splitlines() if line.rstrip().endswith("-bound")]
        assert len(table) == 2, "a line a kernel, its verdict at the end"
        assert "[bracketed]" in text and "elementwise_kernel" in text
        assert max(map(len, text.splitlines())) <= width
    assert "before / after" in _printed(report.against(report))


def test_kernels_of_one_name_are_told_apart_by_their_grids(tmp_path):
    b = TraceBuilder()
    for i, grid in enumerate([(1, 36, 1), (1, 60, 1)]):
        b.kernel("_int4_gemm_slice_kernel", 10.0 * i, 5.0, grid=grid)
    b.kernel("_norm_kernel", 30.0, 5.0)
    text = output.as_text(report_of(b, tmp_path), 100)
    assert "_int4_gemm_slice_kernel 1x36x1 " in text and "_norm_kernel  " in text


def _printed(renderable) -> str:
    from rich.console import Console

    console = Console(width=100, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()


# ------------------------------------------------------------------------------------------------------------- verdicts
CHIP = {"blocks": 500, "sm_count": 132}
VERDICTS = {
    "gap longer than kernel": (dict(duration_us=3.0, gap_us=20.0, roof_fraction=0.9), LAUNCH, "20.0 us idle"),
    "streams": (dict(duration_us=100.0, gap_us=1.0, roof_fraction=0.85, **CHIP), BANDWIDTH, "85%"),
    "from L2": (dict(duration_us=5.0, gap_us=1.0, roof_fraction=1.4), BANDWIDTH, "L2"),
    "tensor cores": (
        dict(duration_us=900.0, gap_us=1.0, roof_fraction=0.3, intensity=900.0, ridge=227.0, peak_fraction=0.7),
        COMPUTE,
        "70%",
    ),
    "too little work": (
        dict(duration_us=1.5, gap_us=0.7, roof_fraction=0.01, **CHIP | {"blocks": 1}),
        LATENCY,
        "costs",
    ),
    "small grid": (
        dict(duration_us=10.8, gap_us=0.7, roof_fraction=0.04, **CHIP | {"blocks": 96}),
        LATENCY,
        "96 blocks",
    ),
    "short": (dict(duration_us=7.0, gap_us=0.7, roof_fraction=0.3, **CHIP), LATENCY, "7.0 us"),
    "bytes in flight": (
        dict(duration_us=50.0, gap_us=0.7, roof_fraction=0.3, **CHIP),
        LATENCY,
        "flight",
    ),
    "slow product": (
        dict(duration_us=900.0, gap_us=1.0, roof_fraction=0.1, intensity=900.0, ridge=227.0, peak_fraction=0.2),
        LATENCY,
        "20%",
    ),
    "short, but it overlaps": (
        dict(duration_us=2.5, gap_us=0.0, roof_fraction=0.03, overlapped=True),
        LATENCY,
        "overlaps",
    ),
    "unknown bytes": (dict(duration_us=50.0, gap_us=0.7, **CHIP), UNKNOWN, "bytes"),
    "unknown everything": (dict(duration_us=50.0, gap_us=0.0), UNKNOWN, "bytes"),
}


@pytest.mark.parametrize("facts, kind, words", VERDICTS.values(), ids=VERDICTS.keys())
def test_verdict(facts, kind, words):
    found = verdict(**facts)
    assert found.kind == kind and words in found.reason and found.advice


@pytest.mark.parametrize(
    "name, gbps",
    {
        "NVIDIA H200": 4800, "NVIDIA H100 80GB HBM3": 3350, "NVIDIA H100 PCIe": 2000, "NVIDIA A100-SXM4-40GB": 1555,
        "NVIDIA A100-SXM4-80GB": 2039, "NVIDIA L4": 300, "NVIDIA L40S": 864, "NVIDIA GeForce RTX 4090": 1008,
        "Tesla T4": 320, "NVIDIA RTX A4000": None, "NVIDIA RTX A1000": None, "NVIDIA H2000": None,
        "NVIDIA GeForce RTX 4090 Laptop GPU": None, "NVIDIA GeForce RTX 3080 Ti": None, "Something": None,
    }.items(),
)  # fmt: skip
def test_datasheet(name, gbps):
    found = roofline.datasheet(name)
    assert (found and found.gbps) == gbps


# ---------------------------------------------------------------------------------------------------------------- costs
BF16, F32 = "c10::BFloat16", "float"
OP_COSTS = {
    "mm": ("aten::mm", [[2, 8], [8, 16]], [BF16, BF16], None, (2 * (16 + 128 + 32), 2 * 2 * 8 * 16)),
    "addmm": ("aten::addmm", [[16], [2, 8], [8, 16]], [F32] * 3, None, (4 * (16 + 16 + 128 + 32), 2 * 2 * 8 * 16)),
    "bmm": ("aten::bmm", [[3, 2, 8], [3, 8, 4]], [F32] * 2, None, (4 * (48 + 96 + 24), 2 * 3 * 2 * 8 * 4)),
    "linear": ("aten::linear", [[1, 2, 8], [16, 8], []], [F32, F32, ""], None, (4 * (16 + 128 + 32), 2 * 2 * 8 * 16)),
    "add broadcasts": ("aten::add", [[4, 8], [8], []], [BF16, BF16, "Scalar"], None, (2 * (32 + 8 + 32), 0)),
    "expanded input": ("aten::mul", [[4, 8], [4, 8]], [F32] * 2, [[8, 1], [0, 1]], (4 * (32 + 8 + 32), 0)),
    "in place": ("aten::mul_", [[4, 8], [4, 8]], [BF16, F32], None, (32 * 2 + 32 * 4 + 32 * 2, 0)),
    "comparison": ("aten::lt", [[8], [8]], ["long int"] * 2, None, (8 * 16 + 8, 0)),
    "aten's INT4 product": (
        "aten::_weight_int4pack_mm",
        [[1, 4096], [512, 32, 32, 4], [], [32, 4096, 2]],
        [BF16, "int", "Scalar", BF16],
        None,
        (2 * 4096 + 4096 * 4096 / 2 + 2 * 32 * 4096 * 2 + 2 * 4096, 2 * 4096 * 4096),
    ),
    "copy converts": ("aten::copy_", [[8], [8], []], [F32, BF16, "Scalar"], None, (8 * 4 + 8 * 2, 0)),
    "fill": ("aten::fill_", [[8], []], [F32, "Scalar"], None, (32, 0)),
    "reduction": ("aten::mean", [[4, 8], [], [], []], [F32, "", "", ""], None, (128, 0)),
    "attention": (
        "aten::_flash_attention_forward",
        [[1, 1, 4, 64], [1, 100, 2, 64], [1, 100, 2, 64]],
        [BF16] * 3,
        None,
        (2 * (256 + 2 * 12800 + 256), 4 * 256 * 100),
    ),
    "cuDNN's attention": (
        "aten::_cudnn_attention_forward",
        [[1, 4, 1, 64], [1, 2, 100, 64], [1, 2, 100, 64], []],
        [BF16] * 3 + ["Scalar"],
        None,
        (2 * (256 + 2 * 12800 + 256), 4 * 256 * 100),
    ),
    "ragged attention": (
        "aten::_cudnn_attention_forward",
        [[9, 4, 64], [99, 2, 64], [99, 2, 64]],
        [BF16] * 3,
        None,
        None,
    ),
    "unknown op": ("aten::sort", [[8]], [F32], None, None),
    "not torch's": ("tiny_gemm::int4_gemm", [[8]], [F32], None, None),
    "no shapes": ("aten::mm", None, None, None, None),
    "odd type": ("aten::mm", [[2, 8], [8, 16]], ["c10::QInt8"] * 2, None, None),
    "odd shapes": ("aten::mm", [[2], []], [F32] * 2, None, None),
    "list of tensors": ("aten::cat", [[[2, 8], [2, 8]], []], ["TensorList", "Scalar"], None, None),
}


@pytest.mark.parametrize("name, dims, types, strides, expected", OP_COSTS.values(), ids=OP_COSTS.keys())
def test_op_cost(name, dims, types, strides, expected):
    assert op_cost(name, dims, types, strides) == expected


def test_declared_costs_listens_to_launches(monkeypatch):
    """Through Triton's own chain of hooks, which only a launch on a GPU calls."""
    triton = pytest.importorskip("triton")
    capturing = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    chain = triton.knobs.runtime.launch_enter_hook
    before = list(chain.calls)

    def launch(name, **cost):
        facts = triton.compiler.compiler.LazyDict({"name": name})
        facts.add(lambda grid, kernel, args: cost, ((3,), None, {}))
        chain(facts)

    with record.declared_costs() as costs:
        launch("ours", bytes=10, flops16=4, flops32=2)
        launch("silent")
        capturing.append(True)
        launch("captured", bytes=10)
    launch("after", bytes=10)
    assert costs == [{"name": "ours", "grid": [3, 1, 1], "bytes": 10, "flops": 6}]
    assert chain.calls == before


def test_triton_stores_what_the_kernels_declare():
    """Every kernel of ours declares its cost, and in the way that Triton asks for it."""
    pytest.importorskip("triton")
    from tiny_gemm import int4_config, triton_gemm
    from tiny_gemm.triton_fused_transformer import attention, decode_attention, ffn, norm

    modules = [triton_gemm, attention, decode_attention, ffn, norm]
    if int4_config.IN_GLUON:
        from tiny_gemm import gluon_gemm

        modules.append(gluon_gemm)
    kernels = [k for m in modules for k in vars(m).items()]
    ours = {name: kernel for name, kernel in kernels if name.endswith("_kernel")}
    assert len(ours) == (10 if int4_config.IN_GLUON else 9)
    for name, kernel in ours.items():
        declared = getattr(kernel, "launch_metadata", None) or kernel.kwargs["launch_metadata"]
        assert callable(declared), name


def test_declared_costs_of_the_kernels():
    pytest.importorskip("triton")
    from tiny_gemm import quantize, triton_gemm, triton_parts
    from tiny_gemm.triton_fused_transformer import attention, decode_attention, ffn, norm

    x, y = torch.zeros(2, 128, dtype=torch.float16), torch.zeros(2, 64, dtype=torch.float16)
    w = quantize(torch.zeros(64, 128), group_size=32)
    args = dict(x_ptr=x, w_ptr=w.packed, s_ptr=w.scales, z_ptr=None, bias_ptr=None, y_ptr=y, M=2, N=64, K=128)
    assert triton_parts.int4_gemm_cost((1, 4), None, args) == {
        "bytes": 2 * 128 * 2 + 64 * 64 + 64 * 4 * w.scales.element_size() + 2 * 64 * 2,
        "flops16": 2 * 2 * 64 * 128,
    }
    gated = args | dict(gate_ptr=w.packed, gate_s_ptr=w.scales, gate_z_ptr=None)
    assert triton_parts.int4_gemm_cost((1, 4), None, gated) == {
        "bytes": 2 * 128 * 2 + 2 * (64 * 64 + 64 * 4 * w.scales.element_size()) + 2 * 64 * 2,
        "flops16": 2 * 2 * 2 * 64 * 128,
    }
    dense = dict(w_ptr=w.packed, s_ptr=w.scales, z_ptr=None, y_ptr=torch.zeros(64, 128, dtype=torch.float16))
    assert triton_gemm._dequantize_cost((4, 1), None, dense)["bytes"] == 64 * 64 + 64 * 4 * 2 + 64 * 128 * 2
    ffn_args = dict(x_ptr=x, w1_ptr=torch.zeros(128, 256), wg_ptr=None, b1_ptr=None, w2_ptr=torch.zeros(256, 64))
    ffn_args |= dict(b2_ptr=None, hidden_ptr=torch.zeros(9999), y_ptr=y, barrier_ptr=torch.zeros(2), M=2, D=128)
    plain = ffn._ffn_cost((4,), None, ffn_args | dict(H=256, N=64))
    assert plain == {"bytes": 512 + 4 * (128 + 64) * 256 + 256, "flops16": 2 * 2 * 256 * (128 + 64)}
    gated_ffn = ffn._ffn_cost((4,), None, ffn_args | dict(wg_ptr=torch.zeros(128, 256), H=256, N=64))
    assert gated_ffn["flops16"] == 2 * 2 * 256 * (128 + 128 + 64)
    row = torch.zeros(3, 64, dtype=torch.float16)
    norm_args = dict(x_ptr=row, residual_ptr=None, weight_ptr=torch.zeros(64), bias_ptr=None, y_ptr=row, s_ptr=None)
    assert norm._norm_cost((3,), None, norm_args)["bytes"] == 2 * 384 + 256

    q, k = torch.zeros(1, 4, 3, 64, dtype=torch.float16), torch.zeros(1, 2, 5, 64, dtype=torch.float16)
    seen = {True: 3 + 4 + 5, False: 15}  # bottom-right: query i sees i + 3 keys
    for causal in (False, True):
        args = dict(q_ptr=q, k_ptr=k, v_ptr=k, sinks_ptr=None, out_ptr=q, Lq=3, Lk=5, CAUSAL=causal, WINDOW=0, D=64)
        cost = attention._fused_attention_cost((1, 2, 1), None, args)
        assert cost == {"bytes": 2 * 2 * (4 * 3 + 2 * 5) * 64, "flops16": 4 * 4 * seen[causal] * 64}
    more_queries = args | dict(q_ptr=k, k_ptr=q, v_ptr=q, out_ptr=k, Lq=5, Lk=3)
    assert attention._fused_attention_cost((1,), None, more_queries)["flops16"] == 4 * 2 * 6 * 64
    windowed = attention._fused_attention_cost((1,), None, args | dict(WINDOW=2, sinks_ptr=torch.zeros(4)))
    assert windowed == {"bytes": 2 * 2 * (4 * 3 + 2 * 4) * 64 + 16, "flops16": 4 * 4 * (2 + 2 + 2) * 64}
    assert attention._fused_attention_cost((1,), None, more_queries | dict(WINDOW=2))["flops16"] == 4 * 2 * 5 * 64

    lengths = torch.tensor([10, 100, -1], dtype=torch.int32)
    token, cache = torch.zeros(3, 2, 64, dtype=torch.float16), torch.zeros(3, 2, 100, 64, dtype=torch.float16)
    args = dict(q_ptr=torch.zeros(3, 4, 64, dtype=torch.float16), k_ptr=token, v_ptr=token, k_cache_ptr=cache)
    args |= dict(lengths_ptr=lengths, out_ptr=torch.zeros(3, 4, 64, dtype=torch.float16), Lmax=100, ROPE_HALF=32, D=64)
    args |= dict(sinks_ptr=None, lse_ptr=None, WINDOW=0)
    row = 2 * 2 * 64 * 2
    assert decode_attention.decode_attention_cost((1, 2, 3), None, args) == {
        "bytes": 2 * 3 * (4 + 2 + 2 + 4) * 64 + 12 + 3 * 2 * 32 * 4 + 2 * row + 110 * row,
        "flops16": 4 * 4 * (11 + 100 + 1) * 64,
    }
    windowed = decode_attention.decode_attention_cost((1, 2, 3), None, args | dict(WINDOW=30))
    assert windowed["flops16"] == 4 * 4 * (11 + 30 + 1) * 64
    codes, scales = torch.zeros(3, 2, 100, 64, dtype=torch.int8), torch.zeros(3, 2, 100, 2)
    of_8_bits = args | dict(k_cache_ptr=codes, v_cache_ptr=codes, kv_scale_ptr=scales, q_norm_ptr=torch.zeros(64))
    cost = decode_attention.decode_attention_cost((1, 2, 3), None, of_8_bits)
    assert cost["bytes"] == 2 * 3 * (4 + 2 + 2 + 4) * 64 + 12 + 3 * 2 * 32 * 4 + 256 + (2 + 110) * 2 * 2 * (64 + 4)


# -------------------------------------------------------------------------------------------------------------- reading
def test_gzip_directories_and_bare_lists_read_alike(tmp_path):
    b = TraceBuilder(roof_gbps=1.0)
    b.kernel("k", 0.0, 10.0)
    plain, zipped = read_trace(b.write(tmp_path / "a.json")), read_trace(b.write(tmp_path / "trace.json.gz"))
    (tmp_path / "bare.json").write_text(json.dumps(b.events))
    bare, directory = read_trace(tmp_path / "bare.json"), read_trace(tmp_path)
    for other in (zipped, bare, directory):
        assert other.names == plain.names
        assert all(np.array_equal(other.kernels[c], plain.kernels[c], equal_nan=True) for c in plain.kernels)
    assert zipped.metadata == directory.metadata == {"roof_gbps": 1.0} and bare.metadata == {}


def test_older_spellings_are_understood(tmp_path):
    b = TraceBuilder()
    b.kernel("k", 0.0, 10.0)
    b.memcpy("Memcpy DtoH (Device -> Pageable)", 10.0, 5.0, 100)
    b.op("aten::add", 0.0, 1.0)
    for event, category in zip(b.events, ("Kernel", "Memcpy", "Operator"), strict=True):
        event["cat"] = category
    del b.events[0]["args"]["grid"]
    b.events.append({"ph": "f", "cat": "ac2g", "id": 1, "ts": 1})
    b.events.append({"ph": "X", "cat": "Trace", "name": "PyTorch Profiler (0)", "ts": 0, "dur": 5})
    found = read_trace(b.write(tmp_path / "t.json"))
    assert len(found.kernels["start"]) == 2 and len(found.ops["start"]) == 1
    assert [r.grid for r in analyse(found).rows] == [None, None]


DAMAGED = {
    "empty": ("", "ends too early"),
    "not JSON": ("hello", "'h' where"),
    "a number": ("7", "'7' where"),
    "cut in an event": ('{"traceEvents": [{"ph": "X", "na', "ends too early"),
    "cut between events": ('{"traceEvents": [{"ph": "M"},', "ends too early"),
    "cut after events": ('{"traceEvents": [{"ph": "M"}]', "ends too early"),
    "missing comma": ('{"traceEvents": [{"ph": "M"} {"ph": "M"}]' + " " * 99 + "}", "'{' where"),
    "wrong inside": ('{"traceEvents": [{"ph": "M" "x"}]' + " " * 99 + "}", "delimiter"),
    "malformed event": ('{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "k"}]}', "malformed"),
    "malformed time": ('{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "k", "ts": "soon"}]}', "malformed"),
    "malformed args": ('{"traceEvents": [{"ph": "X", "cat": "kernel", "ts": 1, "args": [1]}]}', "malformed"),
    "time is NaN": ('{"traceEvents": [{"ph": "X", "cat": "kernel", "name": "k", "ts": NaN}]}', "malformed"),
    "endless": ('{"traceEvents": [{"ph": "X", "cat": "kernel", "ts": 1, "dur": Infinity}]}', "malformed"),
    "costs of another kind": ('{"tiny_gemm": {"costs": [{}]}, "traceEvents": []}', "'tiny_gemm' entry is malformed"),
    "roof in words": ('{"tiny_gemm": {"roof_gbps": "fast"}, "traceEvents": []}', "'tiny_gemm' entry is malformed"),
    "no facts": ('{"tiny_gemm": 7, "traceEvents": []}', "'tiny_gemm' entry is malformed"),
    "huge number": ('{"traceEvents": [{"ph": "X", "cat": "kernel", "ts": 1, "args": {"stream": 1e99}}]}', "malformed"),
    "nothing inside": ('{"traceEvents": []}', "neither kernels nor CPU ops"),
    "no events at all": ("{}", "neither kernels nor CPU ops"),
    "empty list": ("[]", "neither kernels nor CPU ops"),
    "nested": ('{"traceEvents": [' + "[" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("text, words", DAMAGED.values(), ids=DAMAGED.keys())
@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
def test_damaged_traces_are_refused_clearly(tmp_path, text, words, zipped):
    path = tmp_path / "t.json"
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    with pytest.raises(TraceError, match=words) as error:
        analyse(read_trace(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_damaged_gzip_is_refused_clearly(tmp_path):
    b = TraceBuilder()
    rng = random.Random(0)
    for i in range(200):
        b.kernel(f"kernel_{rng.random()}", 10.0 * i, 5.0)
    whole = b.write(tmp_path / "t.json.gz").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for damaged in (whole[: len(whole) // 2], whole[:-4], bytes(flipped), b"\x1f\x8b", b"\x1f\x8bnonsense"):
        (tmp_path / "d.json.gz").write_bytes(damaged)
        with pytest.raises(TraceError, match="not a readable trace"):
            read_trace(tmp_path / "d.json.gz")


def test_missing_files_are_refused_clearly(tmp_path):
    with pytest.raises(TraceError, match="does not exist"):
        read_trace(tmp_path / "nowhere.json")
    with pytest.raises(TraceError, match="directory without"):
        read_trace(tmp_path)


def test_too_many_kernels_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(trace, "MAX_KERNELS", 10)
    b = TraceBuilder()
    for i in range(11):
        b.kernel("k", 10.0 * i, 5.0)
    with pytest.raises(TraceError, match="more than 10 kernels: record fewer steps"):
        read_trace(b.write(tmp_path / "t.json"))


class Dribble(io.StringIO):
    """A text stream that gives as few characters as it is told, so that every border falls inside something."""

    def __init__(self, text: str, sizes: list[int]):
        super().__init__(text)
        self.sizes = sizes

    def read(self, _size=-1):
        self.sizes.append(self.sizes.pop(0))
        return super().read(self.sizes[-1])


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(
    values=st.lists(JSON_VALUES, max_size=8),
    others=st.dictionaries(st.text().filter(lambda k: k != "traceEvents"), JSON_VALUES, max_size=3),
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    indent=st.none() | st.integers(0, 3),
    ascii=st.booleans(),
)
def test_scanner_agrees_with_json_wherever_the_borders_fall(values, others, sizes, indent, ascii):
    """Strings with braces and quotes, numbers and characters of many bytes across the borders of chunks."""
    text = json.dumps({**others, "traceEvents": values, "after": 12345}, indent=indent, ensure_ascii=ascii)
    seen = {}
    scanner = trace._Scanner(Dribble(text, sizes), "t")
    assert list(scanner.events(seen.__setitem__)) == values
    assert seen == {**others, "after": 12345}


@settings(max_examples=100, deadline=None)
@given(data=st.data(), values=st.lists(JSON_VALUES, min_size=1, max_size=5), size=st.integers(1, 40))
def test_scanner_refuses_every_cut(data, values, size):
    text = json.dumps({"traceEvents": values})
    cut = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(TraceError):
        list(trace._Scanner(Dribble(text[:cut], [size]), "t").events(lambda key, value: None))


def test_characters_of_many_bytes_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(trace, "CHUNK", 7)
    b = TraceBuilder()
    names = [f'kernel_{"äöü€😀" * i}{{["\\' for i in range(20)]
    for i, name in enumerate(names):
        b.kernel(name, 10.0 * i, 5.0)
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"traceEvents": b.events}, ensure_ascii=False), encoding="utf-8")
    assert read_trace(path).names == names


def test_a_big_trace_takes_bounded_memory_and_time(tmp_path):
    """60 MB of events, 70,000 kernels among them, in a process of its own: well below the file's size."""
    kernel = TraceBuilder()
    kernel.kernel("void elementwise_kernel<padding>(float)", 0, 1, launched=0, op=MUL)
    noise = {"ph": "X", "cat": "python_function", "name": "x" * 200, "pid": 1, "tid": 1, "ts": 1, "dur": 1, "args": {}}
    lines = [json.dumps(e) for e in [*kernel.events, noise]]
    path = tmp_path / "big.json"
    with open(path, "w") as file:
        file.write('{"traceEvents": [')
        file.write(",\n".join([",\n".join(lines)] * 70_000))
        file.write("]}")
    assert path.stat().st_size > 55e6
    code = """
import resource, sys, time
from tiny_gemm.profiling import analyse, read_trace
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
base = peak()
report = analyse(read_trace(sys.argv[1]))
print(len(report.timeline), report.step.kernels, peak() - base, time.process_time())
"""
    run = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    events, kernels, kib, seconds = (float(word) for word in run.stdout.split())
    assert kernels == 70_000 and events <= 20_000
    assert kib < 60 * 1024, "the reader keeps some 300 bytes a kernel with its op, and never the text"
    assert seconds < 40  # of processor time; some 8 with the imports


def test_trim_keeps_the_report(tmp_path):
    b = TraceBuilder(roof_gbps=4350.0, step_bytes=1000)
    for s in range(6):
        b.step(s, 1000.0 * s + 5e6, 900.0)
        for i in range(5):
            t = 1000.0 * s + 100 * i + 5e6
            b.kernel("k", t + 300, 40.0, launched=t, grid=(10, 1, 1), op=MUL)
            b.op("aten::detach", t + 50, 1.0)
    source = b.write(tmp_path / "t.json")
    kept = trim(source, tmp_path / "small.json.gz", steps=3)
    assert kept == 3 * (1 + 5 * 3)  # the step; kernel, launch and op of each
    whole, small = analyse(read_trace(source)), analyse(read_trace(tmp_path / "small.json.gz"))
    assert small.step.steps == 3
    for name in ("step_us", "busy_fraction", "kernels", "floor_us", "verdict"):
        assert getattr(small.step, name) == pytest.approx(getattr(whole.step, name)), name
    assert [(r.label, r.bytes, r.verdict) for r in small.rows] == [(r.label, r.bytes, r.verdict) for r in whole.rows]


def test_names():
    assert short_name("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>(int)") == (
        "vectorized_elementwise_kernel"
    )
    assert short_name("_int4_gemm_kernel") == "_int4_gemm_kernel"
    assert short_name("void (anonymous namespace)::softmax_warp<float>(float*)") == "softmax_warp"
    assert short_name("Memcpy HtoD (Pinned -> Device)") == "Memcpy HtoD (Pinned -> Device)"
    assert family("_int4_ffn_kernel", None, "kernel") == "int4"
    assert family("nvjet_tst_64x8", "aten::mm", "kernel") == "gemm"
    assert family("_norm_kernel", "tiny_gemm::add_rms_norm", "kernel") == "norm"
    assert family("fmha_cutlassF", "aten::_efficient_attention_forward", "kernel") == "attention"
    assert family("unheard_of", None, "kernel") in FAMILIES
    assert family("tiny_gemm::rms_norm", None, "op") == "norm"  # in a CPU trace the op is the name
    for op in ("aten::mv", "aten::addmv_", "aten::baddbmm"):  # aten::mv calls aten::addmv_
        assert family(op, None, "op") == "gemm", op
    assert shorten("aten::mm: nvjet_sm90_tst_8x64_64x16_4x1_v_bz_TNN", 20) == "mm: nvjet_…_v_bz_TNN"
    assert [shorten("abcdefgh", n) for n in (8, 7, 6)] == ["abcdefgh", "abc…fgh", "abc…gh"]


# ------------------------------------------------------------------------------------------------------------ recording
@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A small CPU profile, written to disk."""
    directory = tmp_path_factory.mktemp("profiles") / "out"
    x, w = torch.randn(64, 256), torch.randn(256, 256)
    with profiling.profile(
        directory, warmup=1, steps=3, roof_gbps=50.0, tokens_per_step=1, step_bytes=1e6, metadata={"mine": 1}
    ) as p:
        for _ in range(6):  # two more than are recorded
            torch.relu(x @ w).sum()
            p.step()
    return p, directory


def test_profile_records_a_cpu_run(recorded):
    p, directory = recorded
    report = p.report
    assert report.processor == "cpu" and "CPU" in report.device and report.marked_steps
    assert report.step.steps == 3
    mm = rows_of(report)["aten::mm"]
    assert mm.calls == 3 and mm.flops == 2 * 64 * 256 * 256 and 0 < mm.roof_fraction
    assert report.step.floor_us == pytest.approx(1e6 / 50 / 1e3)
    assert oct(directory.stat().st_mode)[-3:] == oct(0o777 & ~_umask())[-3:]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_profile_writes_everything(recorded):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")
    p, directory = recorded
    assert p.missing == []
    assert {f.name for f in directory.iterdir()} == output._CONTENTS
    again = analyse(read_trace(directory / "trace.json.gz"), name=str(directory))
    assert again == p.report
    assert (
        json.loads((directory / "report.json").read_text())["rows"]
        == json.loads(json.dumps(p.report.to_json()))["rows"]
    )
    assert read_trace(directory).metadata["mine"] == 1
    logs = [f.name for f in (directory / "tensorboard").iterdir()]
    assert sum(n.endswith(".pt.trace.json.gz") for n in logs) == 1
    assert sum(n.startswith("events.out.tfevents") for n in logs) == 1
    assert [f.name for f in directory.parent.iterdir()] == ["out"], "nothing is left beside it"


def test_tensorboard_shows_scalars_images_and_text(recorded):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    _, directory = recorded
    events = accumulator.EventAccumulator(str(directory / "tensorboard"), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    assert {"step/time_us", "step/busy_percent", "step/tokens_per_s"} <= set(tags["scalars"])
    assert set(tags["images"]) == {"roofline", "timeline"}
    assert tags["tensors"] == ["report/text_summary"]


def test_profile_replaces_its_own_directory_and_no_other(tmp_path):
    mine, thesis = tmp_path / "mine", tmp_path / "thesis"
    for _ in range(2):
        with profiling.profile(mine, warmup=0, roof_gbps=1.0) as p:
            torch.ones(3).add(1)
            p.step()
    thesis.mkdir()
    (thesis / "report.json").write_text("{}")
    (thesis / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an earlier profile"):
        profiling.profile(thesis)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="not a directory"):
        profiling.profile(tmp_path / "file")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "mine", "thesis"]


def test_an_error_inside_leaves_nothing(tmp_path):
    with pytest.raises(KeyError, match="mine"):
        with profiling.profile(tmp_path / "out", warmup=0, roof_gbps=1.0):
            raise KeyError("mine")
    with pytest.raises(ValueError, match="recorded nothing: step.. was called 1 times"):
        with profiling.profile(tmp_path / "out", warmup=3, roof_gbps=1.0) as p:
            p.step()
    with pytest.raises(ValueError, match="steps=0"):
        profiling.profile(tmp_path / "out", steps=0)
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_and_tensorboard_the_rest_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "is_installed", lambda package: False)
    with profiling.profile(tmp_path / "out", warmup=0, roof_gbps=1.0) as p:
        torch.ones(3).add(1)
        p.step()
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"report.json", "trace.json.gz", "tensorboard"}
    assert len(p.missing) == 2 and all("tiny-gemm[profile]" in line for line in p.missing)


def test_costs_of_a_step_of_a_model(tmp_path):
    """The step without a CUDA graph, which on a CPU has no kernels to tell of."""
    import tiny_checkpoints

    from tiny_gemm import checkpoint

    tiny_checkpoints.write_hf(tmp_path / "hf")
    model, _ = checkpoint.load(tmp_path / "hf", device="cpu")
    assert record._costs_of_a_step(model, [[1, 2, 3]], 16) == []


def test_a_step_is_timed_by_its_tokens_alone(monkeypatch):
    """The generator has launched one step more than it has given tokens of; waiting for that one would count it."""
    clock = [0.0]

    def pass_a_step(*_):
        clock[0] += 0.5
        return clock[0]

    monkeypatch.setattr(record.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.cuda, "synchronize", pass_a_step)
    assert record._time_steps(iter(pass_a_step, None), 4) == 0.5


def test_measure_roof_is_plausible():
    assert 0.1 < profiling.measure_roof(torch.device("cpu")) < 5000


def test_the_roof_of_a_gpu_is_the_median_of_its_fastest_read(monkeypatch):
    """The path of a GPU by a fake clock: a GiB in 250, 300 and 280 us, each with one run that was disturbed."""
    clock, runs, ready = [0.0], {}, []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, later):
            assert ready, "a time may be read only after the device has finished"
            return later.at - self.at

    def read(us):
        def call(data):
            runs[us] = runs.get(us, 0) + 1
            clock[0] += 1e-3 * (us if runs[us] % 7 else 10 * us)  # milliseconds

        return call

    class Data:
        is_cuda, nbytes = True, 2**30

    monkeypatch.setattr(torch, "ones", lambda *shape, dtype, device: Data())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: ready.append(True))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(record, "READS", (read(300.0), read(250.0), read(280.0)))
    assert profiling.measure_roof(torch.device("cuda")) == round(2**30 / 250e-6 / 1e9, 1)


def test_a_negative_duration_and_odd_device_facts_do_no_harm(tmp_path):
    b = TraceBuilder({**H200, "numSms": "many", "id": 0})
    b.kernel("k", 0.0, 10.0)
    b.kernel("unfinished", 20.0, -5.0)
    b.kernel("k", 30.0, 10.0)
    report = report_of(b, tmp_path)
    assert report.step.step_us == 40.0 and report.step.busy_fraction == pytest.approx(0.5)
    assert rows_of(report)["k"].waves is None and rows_of(report)["unfinished"].total_us == 0.0
    b = TraceBuilder({**H200, "id": [0]})
    b.kernel("k", 0.0, 10.0)
    assert report_of(b, tmp_path).device == "unknown GPU"


@pytest.mark.parametrize("draw", ["roofline", "timeline"])
def test_figures_have_what_the_report_has(tmp_path, draw):
    pytest.importorskip("matplotlib")
    from tiny_gemm.profiling import figures

    b = TraceBuilder(roof_gbps=4350.0)
    for i in range(100):
        b.kernel(f"gemm_{i % 12}", 20.0 * i, 15.0, stream=7 + i % 2, op=("aten::mm", [[1, 64], [64, 64]], [BF16] * 2))
    short = TraceBuilder()  # shorter than a pixel, and a few that do nothing but wait
    for i in range(200):
        short.kernel("k", 100.0 * i, 2.0, stream=7 + i % 2)
        short.kernel("waiting", 100.0 * i + 1.0, 1.0, stream=7 + i % 2)
    for report in (report_of(b, tmp_path), report_of(short, tmp_path), _nothing_known(tmp_path)):
        figure = getattr(figures, draw)(report)
        figure.savefig(tmp_path / "f.png", dpi=100)
        assert figure.get_size_inches()[0] * 100 == 800
        assert (tmp_path / "f.png").stat().st_size > 5000


def _nothing_known(tmp_path):
    b = TraceBuilder(None)
    b.kernel("k", 0.0, 0.0)
    return report_of(b, tmp_path)
