"""Real GPU traces and what is said of them: SmolLM2-135M's decode step on an H100, by Tiny-GEMM and by transformers.

Recorded by examples/profile_before_after.py, three steps each, batch 1, context 512.
"""

import io
from pathlib import Path

import pytest
from rich.console import Console

from tiny_gemm.profiling import Report, analyse, read_trace
from tiny_gemm.profiling.roofline import BANDWIDTH, LATENCY, LAUNCH

FIXTURES = Path(__file__).resolve().parent / "fixtures"
LAYERS = 30


@pytest.fixture(scope="module")
def ours() -> Report:
    return analyse(read_trace(FIXTURES / "smollm2_step_h100.json.gz"))


@pytest.fixture(scope="module")
def theirs() -> Report:
    return analyse(read_trace(FIXTURES / "transformers_step_h100.json.gz"))


def rows_of(report: Report, name: str) -> list:
    found = [row for row in report.rows if name in row.label]
    assert found, f"no kernel {name} in {[row.label for row in report.rows]}"
    return found


@pytest.mark.parametrize("name", ["smollm2_step_h100", "transformers_step_h100"])
def test_fixtures_are_small(name):
    assert (FIXTURES / f"{name}.json.gz").stat().st_size < 1_000_000


def test_ours_is_a_graph_of_few_kernels(ours):
    step = ours.step
    assert ours.marked_steps and step.steps == 3
    assert "H100" in ours.device and "measured" in ours.roof_source and 2900 < ours.roof_gbps < 3350
    assert 150 < step.kernels < 240
    assert step.busy_fraction > 0.9
    assert step.verdict == LATENCY
    assert step.known_bytes > 0.9
    assert 80e6 < step.bytes < 150e6  # the INT4 weights, the float16 head, and the KV cache


@pytest.mark.parametrize(
    "name, calls, expected",
    [
        ("int4_gemm: _int4_decode_kernel", 3 * LAYERS, LATENCY),  # qkv, out, down
        ("int4_gated_linear: _int4_decode_kernel", LAYERS, LATENCY),
        ("_decode_attention_kernel", LAYERS, LATENCY),
        ("_norm_kernel", 2 * LAYERS + 1, LATENCY),
        ("aten::mm", 1, BANDWIDTH),  # the head: 56.6 MB in float16
    ],
)
def test_verdicts_on_ours(ours, name, calls, expected):
    rows = rows_of(ours, name)
    assert {row.verdict for row in rows} == {expected}
    assert sum(row.calls for row in rows) == calls * ours.step.steps


def test_every_kernel_of_ours_has_declared_its_bytes(ours):
    for row in ours.rows:
        if row.name.startswith("_") and not row.op.startswith("aten::"):
            assert row.bytes and row.gbps and row.waves, row


def test_what_waits_for_its_predecessor_is_not_charged_for_it(ours):
    """out and down (one shape of grid) start while the kernel before them runs (programmatic dependent launch), and
    wait longer for it than they take."""
    out_and_down, qkv = sorted(rows_of(ours, "int4_gemm: _int4_decode_kernel"), key=lambda row: -row.calls)
    assert out_and_down.grid == (1, 36, 1) and qkv.grid == (1, 60, 1)
    assert out_and_down.overlap_us > out_and_down.median_us
    assert 2 < out_and_down.median_us < 3 and 2 < qkv.median_us < 3
    (norms,) = rows_of(ours, "add_rms_norm")
    assert norms.median_us < 2 and norms.family == "norm"
    (attention,) = rows_of(ours, "_decode_attention_kernel")
    assert attention.median_us < 4.5
    assert max(ours.rows, key=lambda row: row.total_us).name == "_int4_decode_kernel"
    assert sum(row.share for row in ours.rows) == pytest.approx(1.0)
    step = ours.step
    assert step.kernel_us == pytest.approx(step.busy_fraction * step.step_us, rel=0.02), "one stream: nothing twice"


def test_transformers_is_launch_bound(theirs):
    step = theirs.step
    assert theirs.marked_steps and step.steps == 3
    assert step.verdict == LAUNCH
    assert step.busy_fraction < 0.1
    assert step.kernels > 800
    assert theirs.share_of(LAUNCH) > 0.9


def test_attention_of_transformers_has_its_bytes(theirs):
    """9 query and 3 KV heads of 64 in bfloat16, over 522, 523 and 524 keys."""
    (flash,) = rows_of(theirs, "flash_fprop")
    assert flash.bytes == 2 * 64 * (9 + 2 * 3 * 523 + 9) and flash.flops == 4 * 64 * 9 * 523


def test_the_longest_wait_of_transformers_is_found(theirs):
    """Some 48 ms before the first attention of each step, whose length is new to cuDNN."""
    assert theirs.step.longest_gap_before.startswith("aten::_cudnn_attention_forward")
    assert theirs.step.longest_gap_us > 0.3 * theirs.step.step_us


def test_the_comparison_shows_what_changed(ours, theirs):
    assert theirs.step.step_us > 5 * ours.step.step_us
    assert theirs.step.kernels > 4 * ours.step.kernels
    console = Console(width=100, file=io.StringIO())
    console.print(ours.against(theirs))
    assert "launch-bound" in console.file.getvalue()


@pytest.mark.parametrize("width", [80, 100, 160])
def test_a_kernel_is_a_line(ours, theirs, width):
    for report in (ours, theirs):
        console = Console(width=width, file=io.StringIO())
        console.print(report.table())
        lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
        top = next(i for i, line in enumerate(lines) if line.startswith("kernel ")) + 1
        assert all(line.endswith("-bound") for line in lines[top : top + 15]), "\n".join(lines)
