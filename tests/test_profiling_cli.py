"""tiny-gemm profile: a live CPU profile, traces from elsewhere, and mistakes."""

import gzip
import json
import os
from pathlib import Path

import pytest
import tiny_checkpoints
from test_cli import refused
from traces import TraceBuilder
from typer.testing import CliRunner

from tiny_gemm import cli


def run(*arguments: object):
    return CliRunner().invoke(cli.app, ["profile", *map(str, arguments)], env={"COLUMNS": "300"})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints") / "hf"
    tiny_checkpoints.write_hf(directory)
    return directory


@pytest.fixture
def trace(tmp_path) -> Path:
    b = TraceBuilder()
    for i in range(4):
        b.kernel("slow_kernel", 100.0 * i, 20.0)
    return b.write(tmp_path / "trace.json.gz")


def test_profile_of_a_model(checkpoint, tmp_path):
    out = tmp_path / "out"
    result = run(checkpoint, "--device", "cpu", "--tokens", 3, "--context", 20, "--out", out)
    assert result.exit_code == 0, result.stderr
    for words in ("CPU", "3 steps", "tokens/s under the profiler", "measured in the same run", "tiny_gemm::"):
        assert words in result.stdout, result.stdout
    assert (out / "trace.json.gz").exists()
    metadata = json.loads(run("--trace", out, "--json").stdout)
    assert metadata["step"]["steps"] == 3 and metadata["before"] is None
    assert metadata["rows"] == json.loads((out / "report.json").read_text())["rows"]


def test_profile_json_and_against(checkpoint, trace):
    result = run(checkpoint, "--device", "cpu", "--tokens", 1, "-p", "hello", "--against", trace, "--json")
    report = json.loads(result.stdout)
    assert report["processor"] == "cpu" and report["before"]["processor"] == "gpu"


def test_trace_from_elsewhere(trace, tmp_path):
    result = run("--trace", trace, "--against", trace, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    for words in ("slow_kernel", "launch-bound", "NVIDIA H200", "datasheet, not measured", "before / after"):
        assert words in result.stdout
    assert (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize("zipped", [False, True], ids=["plain", "gzip"])
def test_what_out_holds_of_a_trace_can_be_read_again(trace, tmp_path, zipped):
    source, out = trace, tmp_path / "out"
    if not zipped:
        source = tmp_path / "trace.json"
        source.write_bytes(gzip.decompress(trace.read_bytes()))
    for again in (source, out):  # the second time into the directory that it is read from
        result = run("--trace", again, "--out", out)
        assert result.exit_code == 0, result.stderr
        assert gzip.decompress((out / "trace.json.gz").read_bytes()) == gzip.decompress(trace.read_bytes())
    assert "before / after" in run("--trace", out, "--against", trace).stdout


def test_roof_of_ones_own(trace):
    assert json.loads(run("--trace", trace, "--roof-gbps", 4000, "--json").stdout)["roof_gbps"] == 4000


def test_mistakes_are_one_line(checkpoint, trace, tmp_path):
    refused(run("--trace", tmp_path / "nowhere"), "nowhere", "does not exist")
    refused(run(checkpoint, "--trace", trace), "--trace", "MODEL")
    refused(run("--trace", trace, "--tokens", 3, "--context", 9), "--context, --tokens", "MODEL")
    refused(run("--trace", trace, "--roof-gbps", -1), "roof_gbps=-1")
    refused(run("--trace", trace, "--against", checkpoint), "directory without")
    refused(run(checkpoint, "--device", "cpu", "--tokens", 0), "0", "1 or more")
    refused(run(checkpoint, "--device", "cpu", "--tokens", 99999), "256")
    refused(run(checkpoint, "--device", "cpu", "--context", 0), "--context 0")
    refused(run(checkpoint, "--device", "cpu", "-p", ""), "empty")
    refused(run(tmp_path / "missing"), "missing")
    (tmp_path / "empty.json").write_text('{"traceEvents": []}')
    refused(run("--trace", tmp_path / "empty.json"), "neither kernels nor CPU ops")
    (tmp_path / "cut.json.gz").write_bytes(trace.read_bytes()[:100])
    refused(run("--trace", tmp_path / "cut.json.gz"), "cut off")
    (tmp_path / "text.json").write_text("Dear reader")
    refused(run("--trace", tmp_path / "text.json"), "not a readable trace")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    refused(run("--trace", trace, "--out", tmp_path / "full"), "not an earlier profile")
    assert [f.name for f in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    pipe, writer = os.pipe()
    os.close(writer)
    refused(run("--trace", f"/dev/fd/{pipe}", "--out", tmp_path / "out"), "is a pipe", "--out")
    os.close(pipe)
