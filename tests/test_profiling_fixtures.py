"""Real GPU traces and what is said of them: SmolLM2-135M's decode step on an H200, by Tiny-GEMM and by transformers.

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
pytestmark = pytest.mark.skipif(
    not FIXTURES.exists(), reason="the traces are still to be recorded on a GPU by examples/profile_before_after.py"
)


@pytest.fixture(scope="module")
def ours() -> Report:
    return analyse(read_trace(FIXTURES / "smollm2_step_h200.json.gz"))


@pytest.fixture(scope="module")
def theirs() -> Report:
    return analyse(read_trace(FIXTURES / "transformers_step_h200.json.gz"))


def verdicts(report: Report, name: str) -> set[str]:
    found = {row.verdict for row in report.rows if name in row.label}
    assert found, f"no kernel {name} in {[row.label for row in report.rows]}"
    return found


@pytest.mark.parametrize("name", ["smollm2_step_h200", "transformers_step_h200"])
def test_fixtures_are_small(name):
    assert (FIXTURES / f"{name}.json.gz").stat().st_size < 1_000_000


def test_ours_is_a_graph_of_few_kernels(ours):
    step = ours.step
    assert ours.marked_steps and step.steps == 3
    assert "H200" in ours.device and "measured" in ours.roof_source and 3500 < ours.roof_gbps < 4900
    assert 150 < step.kernels < 230
    assert step.busy_fraction > 0.7
    assert step.verdict == LATENCY
    assert step.known_bytes > 0.9
    assert 80e6 < step.bytes < 150e6  # the INT4 weights, the float16 head, and the KV cache


@pytest.mark.parametrize(
    "name, calls, expected",
    [
        ("_int4_ffn_kernel", LAYERS, LATENCY),
        ("_int4_gemm_kernel", 2 * LAYERS, LATENCY),
        ("_decode_attention_kernel", LAYERS, LATENCY),
        ("_norm_kernel", 2 * LAYERS + 1, LATENCY),
        ("aten::mm", 1, BANDWIDTH),  # the head: 56.6 MB in float16
    ],
)
def test_verdicts_on_ours(ours, name, calls, expected):
    assert verdicts(ours, name) == {expected}
    assert sum(row.calls for row in ours.rows if name in row.label) == calls * ours.step.steps


def test_every_kernel_of_ours_has_declared_its_bytes(ours):
    for row in ours.rows:
        if row.name.startswith("_"):
            assert row.bytes and row.gbps and row.waves, row


def test_transformers_is_launch_bound(theirs):
    step = theirs.step
    assert theirs.marked_steps and step.steps == 3
    assert step.verdict == LAUNCH
    assert step.busy_fraction < 0.5
    assert step.kernels > 800
    assert theirs.share_of(LAUNCH) > 0.5


def test_the_comparison_shows_what_changed(ours, theirs):
    assert theirs.step.step_us > 5 * ours.step.step_us
    assert theirs.step.kernels > 4 * ours.step.kernels
    console = Console(width=100, file=io.StringIO())
    console.print(ours.against(theirs))
    assert "launch-bound" in console.file.getvalue()
