"""The benchmark harness: how arms are checked and timed, the results' schema, comparison, figures, the front door."""

import functools
import io
import json
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import benchmark_fused_transformer as front_door
from benchmarks import agreement, attention, cases, decode, gemm, plots, presets, report, results, timing
from benchmarks.cases import Absent, Arm, Case, Options, Work, relative_error, run_case
from benchmarks.timing import Machine, Times, interleave

CPU = Machine(torch.device("cpu"), l2_bytes=0, roof_gbps=10.0, roof_tflops=0.1)
SCHEMA = {
    "suite", "model", "shape", "impl", "dtype", "us", "us_p20", "us_p80", "bytes", "floor_us", "gbps", "roof_fraction",
    "max_rel_err", "eager_cpu_us",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# ------------------------------------------------------------------------------------------------------------- timing
def test_times_are_median_and_quintiles():
    assert Times.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Times(3.0, pytest.approx(1.8), pytest.approx(4.2))
    assert Times.of([7.0]) == Times(7.0, 7.0, 7.0)


def test_rounds_interleave_arms_and_begin_with_each_in_turn():
    order, finished = [], []

    def arm(name: str, us: float):
        def start():
            order.append(name)
            assert not finished, "a time may be read only after the device has finished"
            return lambda: us + finished[0]

        return start

    times = interleave([arm("a", 1), arm("b", 2), arm("c", 3)], 3, lambda: finished.append(0.5))
    assert order == list("abcbcacab")
    assert [t.us for t in times] == [1.5, 2.5, 3.5]


def test_copies_exceed_the_cache():
    gpu = Machine(torch.device("cuda", 0), 60_000_000, 4000.0, 700.0)
    assert gpu.copies(2_000_000) == 150
    assert gpu.copies(10**9) == 2
    assert gpu.copies(10) == timing.MAX_COPIES
    assert Machine(torch.device("cuda", 0), 100_000_000, 4000.0, 700.0).copies(2_000_000) == 200, "four times L2"


def test_floor_is_that_of_bytes_or_of_arithmetic():
    assert CPU.floor_us(1_000_000) == pytest.approx(100.0)
    assert CPU.floor_us(1_000, 10**9) == pytest.approx(10_000.0)


def test_a_graph_time_is_divided_by_its_calls(monkeypatch):
    """The GPU's path with graphs that take 7 us a call by a fake clock."""
    captured = []  # how many calls each graph has

    class Event:
        clock = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = Event.clock

        def elapsed_time(self, later):
            return later.at - self.at

    def capture(calls):
        captured.append(len(calls))

        def replay():
            Event.clock += 7e-3 * len(calls)  # milliseconds

        return SimpleNamespace(replay=replay)

    monkeypatch.setattr(timing, "capture", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    start = timing._start_graph([lambda: None] * 3)
    assert captured == [3, 72], "24 times three calls last 500 us"
    assert interleave([start], 2) == [Times(*[pytest.approx(7.0)] * 3)]
    timing._start_graph([lambda: None] * 100)
    assert captured[2:] == [100], "long enough as it is"


def test_inputs_live_as_long_as_the_graph_that_reads_them(monkeypatch):
    monkeypatch.setattr(timing, "capture", lambda calls: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    event = SimpleNamespace(record=lambda: None, elapsed_time=lambda later: 1.0)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    x = torch.ones(1)
    alive = weakref.ref(x)
    start = timing._start_graph([functools.partial(torch.neg, x)])
    del x
    assert alive() is not None
    del start
    assert alive() is None


# -------------------------------------------------------------------------------------------------- checking an arm
def numbers(**arms) -> Case:
    """A case whose oracle is 1, 2, 3; each arm returns what it is given, or raises it."""

    def arm(result):
        def call():
            if isinstance(result, Exception):
                raise result
            return torch.tensor([result])

        return lambda: [call, call]

    def build() -> Work:
        oracle = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
        made = [Arm(name, arm(result), nbytes=1000) for name, result in arms.items()]
        return Work(made, lambda out: relative_error(out, oracle), 1e-2)

    return Case("gemm", None, "numbers", {"M": 1, "K": 1, "N": 3, "group_size": 32, "dtype": "float32"}, build)


def test_what_is_wrong_absent_or_failing_is_a_row_that_says_so():
    good = [1.0, 2.0, 3.0]
    wrong, poisoned = [1.0, 2.0, 3.1], [1.0, math.nan, 3.0]
    rows = run_case(
        numbers(good=good, wrong=wrong, nan=poisoned, absent=Absent("not here"), failing=RuntimeError("boom\nmore")),
        CPU,
    )
    by_impl = {row["impl"]: row for row in rows}
    assert by_impl["good"]["us"] > 0 and "error" not in by_impl["good"]
    assert by_impl["good"]["roof_fraction"] == pytest.approx(0.1 / by_impl["good"]["us"])
    assert by_impl["wrong"]["error"].startswith("refused: max_rel_err 0.027")
    assert by_impl["nan"]["error"].startswith("refused: max_rel_err inf")
    assert by_impl["absent"]["error"] == "absent: not here"
    assert by_impl["failing"]["error"] == "failed: RuntimeError: boom"
    assert all(row["us"] is None for row in rows if row["impl"] != "good")
    assert all(SCHEMA <= row.keys() for row in rows)


def test_a_case_that_cannot_be_built_is_a_row():
    case = Case("norm", None, "none", {"dtype": "float32"}, lambda: 1 / 0)
    (row,) = run_case(case, CPU)
    assert row["error"] == "failed: ZeroDivisionError: division by zero" and SCHEMA <= row.keys()


def test_an_arm_that_fails_only_when_it_is_sampled_fails_alone():
    def sample(us):
        def start():
            if us is None:
                raise ValueError("no prompt")
            return lambda: us

        return lambda: start

    good = lambda: [lambda: torch.ones(1, 4)]  # noqa: E731
    arms = [Arm("fails", good, 8, sample=sample(None)), Arm("works", good, 8, sample=sample(5.0))]
    work = Work(arms, lambda out: relative_error(out, torch.ones(1, 4, dtype=torch.float64)), 1e-2)
    fails, works = run_case(Case("norm", None, "x", {"dtype": "float32"}, lambda: work), CPU)
    assert fails["us"] is None and fails["error"] == "failed: ValueError: no prompt"
    assert works["us"] == 5.0 and works["timing"] == "wall" and "error" not in works


def test_a_pattern_selects_arms():
    rows = run_case(numbers(one=[1.0, 2.0, 3.0], two=[1.0, 2.0, 3.0]), CPU, ["t*"])
    assert [row["impl"] for row in rows] == ["two"]


def test_a_wrong_last_copy_is_found():
    oracle = torch.ones(1, 4, dtype=torch.float64)
    calls = [lambda: torch.ones(1, 4), lambda: torch.zeros(1, 4)]
    work = Work([Arm("half", lambda: calls, 8)], lambda out: relative_error(out, oracle), 1e-2)
    (row,) = run_case(Case("norm", None, "x", {"dtype": "float32"}, lambda: work), CPU)
    assert row["error"].startswith("refused")


def test_error_is_of_the_worst_row():
    oracle = torch.ones(4, 9, dtype=torch.float64)
    out = oracle.clone()
    out[2, 5] += 0.3
    assert relative_error(out, oracle) == pytest.approx(0.1)
    tiny_row = oracle * torch.tensor([[1.0], [1.0], [1.0], [1e-9]])
    assert relative_error(tiny_row + 1e-3, tiny_row) < 2e-3, "a row near zero counts against the average row"


# ------------------------------------------------------------------------------------------------- presets and peers
def test_random_weights_are_exact_in_16_bits():
    for zeros in (None, torch.float32, torch.int16):
        weight = presets.random_weight(48, 192, 32, CPU.device, zeros=zeros)
        exact = weight.dense(torch.float64)
        assert torch.equal(weight.dense(torch.bfloat16).double(), exact)
        assert torch.equal(weight.dense(torch.float16).double(), exact)
        assert 0.3 < exact.square().mean() * 192 < 5, "activations keep their size"


@pytest.mark.parametrize("model", [name for name in presets.PRESETS])
def test_presets_are_models(model):
    config = presets.model_config(model)
    group = presets.group_size(model)
    for k, n in presets.projections(model).values():
        assert k % group == 0 and n > 0
    parameters = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    products = presets.projections(model)
    parameters += products["head"][0] * products["head"][1]
    parameters += config.num_layers * sum(k * n for name, (k, n) in products.items() if name != "head")
    claimed = {"135M": 0.135, "0.6B": 0.6, "1B": 1.24, "1.7B": 1.72, "4B": 4.02, "8B": 8.1}.get(model.split("-")[-1])
    assert claimed is None or parameters / 1e9 == pytest.approx(claimed, rel=0.02)


def test_aten_weights_mean_the_same(monkeypatch):
    """scale and offset of aten's CUDA product, and the order of its nibbles, by undoing them."""
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", lambda q, tiles: (q, tiles), raising=False)
    for k, tiles in ((256, 8), (192, 4), (96, 2)):
        weight = presets.random_weight(16, k, 32, CPU.device, zeros=torch.float32)
        (packed, inner), table = gemm.aten_weight(weight)
        assert inner == tiles and table.shape == (k // 32, 16, 2)
        q = torch.stack((packed >> 4, packed & 15), dim=-1).view(16, k)
        scale, offset = (table[..., i].T.double().repeat_interleave(32, 1) for i in (0, 1))
        assert torch.equal((q.double() - 8) * scale + offset, weight.dense(torch.float64))


def test_a_missing_peer_is_absent(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gemlite", None)
    monkeypatch.setitem(__import__("sys").modules, "gemlite.helper", None)
    weights = gemm.Weights(presets.random_weight(16, 64, 32, CPU.device), CPU, torch.bfloat16)
    with pytest.raises(Absent, match="gemlite cannot be imported"):
        weights.gemlite  # noqa: B018


def test_decode_sweeps_the_headline_of_the_first_model():
    found = decode.cases(Options(), CPU)
    points = {(case.model, case.facts["B"], case.facts["L"]) for case in found}
    assert {("Llama-3.2-1B", b, 512) for b in (1, 2, 4, 8)} <= points
    assert {("Llama-3.2-1B", 1, n) for n in (128, 512, 2048, 8192)} <= points
    assert ("SmolLM2-135M", 1, 512) in points and len(points) == len(found) == 8
    swept = decode.cases(Options(models=("tiny",), mode="seq_length", seq_lengths=(16, 32)), CPU)
    assert [(case.facts["B"], case.facts["L"]) for case in swept] == [(1, 16), (1, 32)]


def test_attention_sweeps_what_the_mode_says():
    points = lambda **options: [  # noqa: E731
        (case.shape.split()[0], case.facts["B"], case.facts["L"])
        for case in attention.cases(Options(models=("tiny",), **options), CPU)
    ]
    assert points(mode="batch_size") == [("decode", b, 512) for b in (1, 2, 4, 8)]
    swept = points(mode="seq_length", seq_lengths=(16, 32))
    assert swept == [("decode", 1, 16), ("decode", 1, 32), ("prefill", 1, 16), ("prefill", 1, 32)]


# -------------------------------------------------------------------------------------------------------------- results
def row(impl="tiny-gemm-int4", us=10.0, spread=0.1, **facts) -> dict:
    facts = {"M": 1, "K": 64, "N": 64, "group_size": 32, "dtype": "bfloat16"} | facts
    case = Case(facts.pop("suite", "gemm"), facts.pop("model", None), facts.pop("shape", "64x64"), facts, lambda: None)
    times = {} if us is None else {"us": us, "us_p20": us - spread / 2, "us_p80": us + spread / 2, "timing": "graph"}
    return case.row(impl, bytes=1000, floor_us=5.0, roof_fraction=None if us is None else 5.0 / us, **times)


def test_results_survive_the_disk(tmp_path):
    environment = results.environment(CPU, git_sha="abc")
    assert {"gpu", "driver", "torch", "triton", "clocks", "git_sha", "date", "roof_gbps"} <= environment.keys()
    assert environment["git_sha"] == "abc" and environment["gpu"].startswith("none; CPU")
    path = tmp_path / "gpu" / "gemm.json"
    results.save(path, environment, [row(us=1.23456789)])
    loaded, (again,) = results.load(path)
    assert loaded == environment and again == row(us=1.23456789) | {
        "us": 1.2346, "us_p20": 1.1846, "us_p80": 1.2846, "roof_fraction": 4.05
    }  # fmt: skip
    assert not list(path.parent.glob("*.part"))
    results.save(path, environment, [row(us=None) | {"max_rel_err": math.inf}])
    assert results.load(path)[1][0]["max_rel_err"] is None, "JSON has no infinity"


REFUSED = {
    "list": "[]",
    "no rows": '{"environment": {}}',
    "rows of another schema": '{"environment": {}, "cases": [{"latency_ms": 1}]}',
    "rows that are none": '{"environment": {}, "cases": {"a": 1}}',
    "no environment": '{"environment": 1, "cases": []}',
    "text": "Dear reader",
    "bytes": b"\xff\xfe\x00",
    "NaN": json.dumps({"environment": {}, "cases": [row(us=math.nan)]}),
    "no time at all": json.dumps({"environment": {}, "cases": [row() | {"us": 0.0}]}),
}


@pytest.mark.parametrize("content", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_result_is_refused(content, tmp_path, capsys):
    path = tmp_path / "gemm.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="not a benchmark result"):
        results.load(path)
    assert front_door.main(["--load", str(path)]) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        pytest.param(["--load", "{tmp}/nowhere.json"], "No such file", id="load"),
        pytest.param(["--load", "{tmp}"], "no results", id="empty"),
        pytest.param(["--compare", "{tmp}/nowhere.json"], "No such file", id="compare"),
        pytest.param(["--plot", "{tmp}"], "no results", id="plot"),
        pytest.param(["--out", "{tmp}/file/out"], "Not a directory", id="out"),
    ],
)
def test_mistakes_are_one_line_before_anything_is_measured(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(front_door, "measure_machine", lambda device: pytest.fail("it has begun to measure"))
    (tmp_path / "file").write_text("")
    assert front_door.main([a.format(tmp=tmp_path) for a in ["--suite", "norm", "--device", "cpu", *arguments]]) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, saved",
    [([], True), (["--mode", "batch_size", "--batch-sizes", "2"], True), (["--batch-sizes", "2"], False),
     (["--dtype", "float16"], False), (["--impl", "tiny*"], False), (["--quick"], False)],
)  # fmt: skip
def test_a_part_does_not_replace_the_whole_result(arguments, saved, tmp_path, monkeypatch, capsys):
    """What is saved of a run on a GPU, without --out."""
    facts = {"gpu": "G 1", "driver": "5", "clocks": None, "torch": "2", "triton": "3", "roof_gbps": 1, "roof_tflops": 1}
    monkeypatch.setattr(front_door, "measure_machine", lambda device: Machine(torch.device("cuda", 0), 1, 4e3, 7e2))
    monkeypatch.setattr(results, "environment", lambda machine, git_sha: facts)
    monkeypatch.setattr(results, "DIRECTORY", tmp_path)
    monkeypatch.setattr(front_door, "run_case", lambda case, *_: [case.row("tiny-gemm", error="absent: no")])
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert front_door.main(["--suite", "norm", "--model", "tiny", "--device", "cpu", *arguments]) == 0
    assert list((tmp_path / "g-1").glob("norm*.json")) != [] if saved else not (tmp_path / "g-1").exists()


def test_a_gpu_has_a_directory():
    assert results.slug({"gpu": "NVIDIA H100 80GB HBM3"}) == "nvidia-h100-80gb-hbm3"


def test_comparison_marks_what_moved_by_more_than_the_noise():
    old = [row(M=m) for m in (1, 2, 3, 4, 5)] + [row(M=7, us=None)]
    new = [
        row(M=1, us=10.19),  # under 2 %
        row(M=2, us=12.0, spread=3.0),  # within the new run's own spread
        row(M=3, us=10.5),
        row(M=4, us=9.0),
        row(M=5, us=None),
        row(M=6),
        row(M=7),
    ]
    changes = results.compare(new, old)
    verdicts = ["same", "same", "slower", "faster", "no longer measured", "now measured"]
    assert [change.verdict for change in changes] == verdicts
    assert changes[2].ratio == pytest.approx(1.05) and changes[4].ratio is None


def test_comparison_says_what_only_one_run_has():
    not_begun = row("case", None, M=8) | {"error": "not reached: interrupted"}
    old = [row(impl, M=m) for m in (1, 2, 8) for impl in ("pytorch", "tiny-gemm-int4")] + [row("gemlite-int4", M=1)]
    new = [row(impl, M=m) for m in (1, 2, 4) for impl in ("pytorch", "tiny-gemm-int4")] + [not_begun]
    new.remove(row("pytorch", M=2))
    assert report.only_in("old", old, new) == [
        "only in the old: gemm gemlite-int4 (1 case)",
        "only in the old: gemm 64x64 M 2 g32: pytorch",
        "only in the old: gemm 64x64 M 8 g32 (not reached: interrupted)",
    ]
    assert report.only_in("new", new, old) == ["only in the new: gemm 64x64 M 4 g32"]
    assert report.only_in("old", old, old) == []
    other_suite = [row(suite="ffn")]
    assert report.only_in("new", other_suite, old) == ["only in the new: the suite ffn (1 case)"]


def test_speedup_is_over_the_best_peer_of_the_same_kind():
    rows = [row("pytorch", 30.0), row("aten-int4", 15.0), row("gemlite-int4", None), row(us=10.0)]
    assert report.speedup(rows) == pytest.approx(1.5)
    wall = row("transformers", 1.0) | {"timing": "wall"}
    assert report.speedup([*rows, wall]) == pytest.approx(1.5)
    over_8_bits = rows[0] | {"impl": "tiny-gemm-int8", "us": 0.1}
    assert report.speedup([*rows, over_8_bits]) == pytest.approx(1.5)
    assert report.speedup(rows[2:]) is None


@pytest.mark.parametrize("width", [40, 200])
def test_a_table_is_whole_and_says_what_it_compares(width):
    rows = [row("pytorch", 30.0), row("aten-int4", 15.0), row("tiny-gemm-int4-generate", 12345.0), row(us=10.0)]
    rows[2]["timing"] = "wall"
    rows += [row("case", None, M=8) | {"error": "not reached: 9 s had passed"}]
    rows[3]["note"] = "a note"
    console = Console(width=width, file=io.StringIO())
    report.show(console, "gemm", rows)
    out = console.file.getvalue()
    line = next(line for line in out.splitlines() if " M 1 g32" in line)
    assert line.split() == [
        "64x64",
        "M",
        "1",
        "g32",
        "30.0",
        "15.0",
        "12,345",
        "10.0",
        "5.00",
        "50%",
        "aten-int4",
        "1.50",
    ]
    assert next(line for line in out.splitlines() if "M 8" in line).split()[4:] == ["not", "reached"]
    words = " ".join(out.split())
    assert "x peer: the time of the fastest peer" in words and "(wall): timed by the wall clock" in words
    assert "tiny-gemm-int4: a note" in words and "1 case not reached: 9 s had passed" in words


def test_agreement_is_of_the_cases_that_both_have(tmp_path, capsys):
    product = functools.partial(row, shape="2048x2048", K=2048, N=2048, group_size=128)
    other = functools.partial(row, shape="4096x4096", K=4096, N=4096, group_size=128)
    attends = {"suite": "attention", "K": None, "N": None, "M": None, "group_size": None, "B": 1}
    step = {"suite": "decode", "model": "Llama-3.2-1B", "shape": "B 1 L 512", "B": 1, "L": 512, "group_size": 128}
    rows = {
        "gemm": [product("aten-int4", 3.9), other("aten-int4", 13.8), product("gemlite-int4", None), product(us=1.0)],
        "attention": [row("sdpa-flash", 9.3, shape="decode 32/8 D128", L=512, **attends)],
        "decode": [row("transformers", 14400.0, **step | {"M": None, "K": None, "N": None})],
    }
    for suite, of_suite in rows.items():
        results.save(tmp_path / f"{suite}.json", results.environment(CPU, git_sha="abc"), of_suite)
    assert agreement.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| aten tinygemm, M = 1 | 2 | 1.50 (1.00 to 2.00) | 4096 × 4096: 13.8 / 6.90 |",
        "| SDPA flash, decode | 1 | 1.00 |  |",
        "| whole step: transformers, dynamic cache | 1 | 1.00 |  |",
    ]
    assert agreement.main([str(tmp_path / "nowhere")]) == 2 and agreement.main([]) == 2


# --------------------------------------------------------------------------------------------------------------- plots
def test_plots_come_from_the_json_alone(tmp_path):
    pytest.importorskip("matplotlib")
    environment = results.environment(CPU, git_sha="abc")
    products = [
        row(impl, us=us * m**0.2, M=m, shape=f"{n}x{n}")
        for m in (1, 8)
        for n in (2048, 4096)
        for impl, us in (("pytorch", 30.0), ("aten-int4", 15.0), ("tiny-gemm-int4", 10.0))
    ]
    results.save(tmp_path / "gemm.json", environment, [*products, row("gemlite-int4", None)])
    points = [(1, 128), (1, 512), (1, 2048), (2, 512), (8, 512)]
    steps = [
        row(impl, us=us + b + n / 100, suite="decode", model="m", shape="", B=b, L=n, M=None)
        for b, n in points
        for impl, us in (("pytorch", 900.0), ("tiny-gemm", 700.0), ("tiny-gemm-int4", 400.0), ("transformers", 9e3))
    ]
    results.save(tmp_path / "decode.json", environment, steps)
    (tmp_path / "gpu_tests.json").write_text("{}")
    drawn, left_out = plots.draw(tmp_path)
    assert left_out == {}
    names = {f"{figure}-{theme}.{kind}" for figure in ("latency", "roof", "speedup") for theme in plots.THEMES
             for kind in ("svg", "png")}  # fmt: skip
    assert {path.name for path in drawn} == names and all(path.stat().st_size > 5000 for path in drawn)
    before = {path: path.read_bytes() for path in drawn if path.suffix == ".svg"}
    plots.draw(tmp_path)
    assert all(path.read_bytes() == content for path, content in before.items()), "the same data, the same file"


def test_a_figure_that_lacks_its_rows_is_left_out_and_says_why(tmp_path, capsys):
    """A sweep that was stopped after its first point; one of the two sweeps alone."""
    pytest.importorskip("matplotlib")
    environment = results.environment(CPU, git_sha="abc")
    one = [row(impl, suite="decode", model="m", shape="", B=1, L=512, M=None) for impl in plots.LINES]
    results.save(tmp_path / "decode.json", environment, [*one, row("case", None, suite="decode") | {"error": "not"}])
    results.save(tmp_path / "gemm.json", environment, [row("pytorch", 20.0), row()])
    assert front_door.main(["--plot", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "no figure 'latency'" in printed.err and "a line needs two" in printed.err
    assert list(json.loads(printed.out)["not_drawn"]) == ["latency"]
    assert not list((tmp_path / "plots").glob("latency*")) and list((tmp_path / "plots").glob("roof*"))
    two = [r | {"B": b} for r in one for b in (1, 2)]
    assert len(plots.latency(two, plots.THEMES["light"]["colours"]).axes) == 1


def test_shapes_are_drawn_from_small_to_large(tmp_path):
    pytest.importorskip("matplotlib")
    shapes = [(4096, 128, "bfloat16"), (64, 32, "bfloat16"), (2048, 128, "bfloat16"), (2048, 128, "float16")]
    rows = [
        row(shape=f"{n}x{n}", K=n, N=n, group_size=group, dtype=dtype, M=m)
        for n, group, dtype in shapes
        for m in (8, 1)
    ]
    axes = plots.roof(rows, plots.THEMES["light"]["colours"]).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "2048 × 2048, g128", "4096 × 4096, g128", "64 × 64, g32", "2048 × 2048, g128 float16"
    ]  # fmt: skip


def test_nothing_to_plot_is_an_error(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="no results"):
        plots.draw(tmp_path)


# ---------------------------------------------------------------------------------------------------------- front door
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--suite", "gemm", "--batch-sizes", "1", "3", "--model", "tiny"], id="gemm"),
        pytest.param(["--suite", "norm"], id="norm"),
        pytest.param(["--suite", "ffn", "--model", "tiny", "--dtype", "float16"], id="ffn"),
        pytest.param(["--suite", "attention", "--seq-lengths", "40", "--batch-sizes", "2"], id="attention"),
        pytest.param(["--suite", "decode", "--seq-lengths", "24", "--batch-sizes", "2"], id="decode"),
        pytest.param(["--suite", "decode", "--mode", "batch_size", "--batch-sizes", "1", "2"], id="sweep"),
    ],
)
def test_a_suite_runs_on_a_cpu(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(front_door, "measure_machine", lambda device: CPU)
    code = front_door.main(["--device", "cpu", "--out", str(tmp_path), *arguments])
    out = capsys.readouterr().out
    assert code == 0, out
    assert "No GPU: these are the CPU implementations" in out
    summary = json.loads(out.splitlines()[-1])
    (path,) = summary["files"]
    environment, rows = results.load(path)
    assert environment == summary["environment"] and environment["driver"] is None
    assert all(SCHEMA <= r.keys() for r in rows)
    ours = [r for r in rows if report.is_ours(r) and "measured only" not in r.get("error", "")]
    assert ours and all(r["us"] > 0 and r["max_rel_err"] < 0.1 for r in ours)
    peers = [r for r in rows if not report.is_ours(r)]
    assert peers and all(r["us"] or r["error"].startswith("absent: ") for r in peers)


def test_what_is_not_reached_is_a_row(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(front_door, "measure_machine", lambda device: CPU)
    assert front_door.main(["--device", "cpu", "--suite", "norm", "--deadline", "1e-9", "--out", str(tmp_path)]) == 0
    _, rows = results.load(tmp_path / "norm.json")
    assert rows and all(r["error"].startswith("not reached: ") for r in rows)


@pytest.mark.parametrize("at, measured", [(0, 0), (1, 1), (3, 3)], ids=["first", "second", "next suite"])
def test_ctrl_c_keeps_what_was_measured(at, measured, tmp_path, capsys, monkeypatch):
    """The interrupted case and those after it become rows; a suite of which nothing was measured is not written."""
    begun = []

    def run_one(case, *_):
        begun.append(case)
        if len(begun) > at:
            raise KeyboardInterrupt
        return [case.row("tiny-gemm", us=2.0, us_p20=1.0, us_p80=3.0, floor_us=1.0, roof_fraction=0.5)]

    monkeypatch.setattr(front_door, "measure_machine", lambda device: CPU)
    monkeypatch.setattr(front_door, "run_case", run_one)
    arguments = ["--device", "cpu", "--suite", "norm", "ffn", "--model", "tiny", "--batch-sizes", "1", "2", "3"]
    assert front_door.main([*arguments, "--out", str(tmp_path)]) == 130
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["interrupted"] and len(summary["files"]) == (measured > 0) and len(begun) == at + 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["norm-tiny.json"] * (measured > 0)
    if measured:
        _, rows = results.load(tmp_path / "norm-tiny.json")
        assert [r["M"] for r in rows] == [1, 2, 3] and [r["us"] for r in rows] == [2.0] * at + [None] * (3 - at)
        assert all(r["error"] == "not reached: interrupted" for r in rows[at:])


def test_a_case_that_cannot_be_built_is_exit_code_1(capsys, monkeypatch):
    monkeypatch.setattr(front_door, "measure_machine", lambda device: CPU)
    arguments = ["--device", "cpu", "--suite", "decode", "--model", "tiny", "--batch-sizes", "1"]
    assert front_door.main([*arguments, "--seq-lengths", "3000"]) == 1
    assert "max_length=3000" in capsys.readouterr().out


def test_an_arm_that_nobody_has_is_a_mistake(capsys, monkeypatch):
    monkeypatch.setattr(front_door, "measure_machine", lambda device: CPU)
    assert front_door.main(["--device", "cpu", "--suite", "norm", "--impl", "nobody"]) == 2
    assert "nobody" in capsys.readouterr().err


def test_a_wrong_arm_of_ours_is_exit_code_1(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(front_door, "measure_machine", lambda device: CPU)
    monkeypatch.setattr(cases, "relative_error", lambda out, oracle: 1.0)
    monkeypatch.setattr("benchmarks.norm.relative_error", lambda out, oracle: 1.0)
    assert front_door.main(["--device", "cpu", "--suite", "norm"]) == 1
    assert "refused: max_rel_err 1" in capsys.readouterr().out


def test_a_directory_with_two_results_of_a_suite_is_the_same_as_itself(tmp_path, capsys):
    """A case that both have is compared with its own, not with that of the other file."""
    environment = results.environment(CPU, git_sha="abc")
    for name, us in (("gemm", 10.0), ("gemm-seq_length", 20.0)):
        results.save(tmp_path / f"{name}.json", environment, [row(us=us)])
    assert front_door.main(["--load", str(tmp_path), "--compare", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["compared"] == {"same": 2}


def test_saved_results_are_shown_and_compared(tmp_path, capsys):
    environment = results.environment(CPU, git_sha="abc")
    for name, us in (("old", 10.0), ("new", 8.0)):
        results.save(tmp_path / name / "gemm.json", environment, [row(us=us), row("pytorch", us=20.0)])
    arguments = ["--load", str(tmp_path / "new"), "--compare", str(tmp_path / "old" / "gemm.json")]
    assert front_door.main(arguments) == 0
    out = capsys.readouterr().out
    assert "0.800" in out and "faster" in out and "2.50" in out
    assert json.loads(out.splitlines()[-1])["compared"] == {"faster": 1, "same": 1} and "only in" not in out
    results.save(tmp_path / "old" / "norm.json", environment, [row(suite="norm")])
    results.save(tmp_path / "new" / "ffn.json", environment, [row(suite="ffn")])
    assert front_door.main(["--load", str(tmp_path / "new"), "--compare", str(tmp_path / "old")]) == 0
    out = capsys.readouterr().out
    assert "only in the old run: the suite norm" in out and "only in the new run: the suite ffn" in out
    assert "old: " in out and "commit abc" in out and "Not of one" not in out


def test_a_comparison_of_two_gpus_says_so(tmp_path, capsys):
    environment = results.environment(CPU, git_sha="abc")
    for name, gpu in (("old", "NVIDIA H100"), ("new", "NVIDIA H200")):
        results.save(tmp_path / name / "gemm.json", environment | {"gpu": gpu}, [row()])
    assert front_door.main(["--load", str(tmp_path / "new"), "--compare", str(tmp_path / "old")]) == 0
    out = capsys.readouterr().out
    assert "old: NVIDIA H100, commit abc" in out and "new: NVIDIA H200, commit abc" in out
    assert "Not of one gpu: NVIDIA H100, NVIDIA H200." in out


@pytest.mark.parametrize("broken", ["nothing", "attention", "a layer", "the position"])
def test_a_wrong_decode_step_is_refused(broken, monkeypatch):
    """The weights are such that the logits depend on what each layer does."""
    work = decode._build(CPU, "SmolLM2-135M", 1, 64, torch.bfloat16, False, False)
    plain = decode.models(CPU, "SmolLM2-135M", torch.bfloat16).plain
    if broken == "attention":
        monkeypatch.setattr(decode.F, "scaled_dot_product_attention", lambda q, *args, **kwargs: torch.zeros_like(q))
    elif broken == "a layer":
        idle = plain.layers[9] | {name: torch.zeros_like(plain.layers[9][name]) for name in RESIDUAL}
        monkeypatch.setattr(plain, "layers", [*plain.layers[:9], idle, *plain.layers[10:]])
    elif broken == "the position":
        step = plain.step
        monkeypatch.setattr(plain, "step", lambda tokens, cache, at, dtype: step(tokens, cache, at - 1, dtype))
    (call,) = next(arm for arm in work.arms if arm.impl == "pytorch").calls()
    error = work.error_of(call())
    assert (error > work.bound) == (broken != "nothing"), error


@pytest.mark.parametrize("length", [64, 8192])
def test_a_lost_token_is_refused(length):
    """The oracle of a decode case tells an attention that forgets the new token, however long the cache is."""
    work = attention._decode(CPU, 8, 2, 64, 1, length, torch.bfloat16, False)
    (call, *_) = next(arm for arm in work.arms if arm.impl == "pytorch").calls()
    assert work.error_of(call()) < work.bound
    q, k, v = call.args
    lost = work.error_of(call.func(q, k[:, :, :-1], v[:, :, :-1]))
    assert lost > max(bound for _, bound in attention.CACHES_8_BIT.values())


RESIDUAL = ("self_attn.o_proj", "mlp.down_proj")


# ----------------------------------------------------------------------------------------------------------- on a GPU
@pytest.mark.gpu
def test_a_gpu_is_timed_by_graphs():
    machine = Machine(torch.device("cuda", 0), 50_000_000, 3000.0, 700.0)
    options = Options(quick=True, batch_sizes=(1,))
    for suite in ("gemm", "norm", "attention"):
        case = front_door.SUITES[suite](options, machine)[0]
        rows = run_case(case, machine, ["tiny-gemm*", "pytorch"])
        for r in rows:
            assert "error" not in r, r
            assert r["timing"] == "graph" and 0.5 < r["us"] < 1000 and r["eager_cpu_us"] > 1 and r["copies"] > 100


@pytest.mark.gpu
def test_a_roof_is_plausible():
    machine = timing.measure_machine(torch.device("cuda", 0))
    assert 100 < machine.roof_gbps < 20_000 and 10 < machine.roof_tflops < 5_000 and machine.l2_bytes > 2**20
