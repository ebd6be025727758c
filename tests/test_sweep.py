"""The sweeps of configurations: what they try, and what they make of the times."""

import argparse
import json
import time
from dataclasses import replace
from types import SimpleNamespace

import aot
import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks import sweep_decode_attention, sweep_fused_attention, sweep_int4_gemm, sweeps
from benchmarks.attention import CACHES_8_BIT
from benchmarks.sweep_decode_attention import attend, sweep_case
from benchmarks.sweep_fused_attention import lengths_of
from benchmarks.sweep_int4_gemm import best_of, candidates
from benchmarks.sweeps import SweepCase, best_over_batches, heads_of, run_cases, summary
from benchmarks.timing import Machine
from tiny_gemm import int4_config
from tiny_gemm.int4_config import PREFILL_BLOCKS, DecodeConfig, HopperConfig, PrefillConfig, SplitConfig
from tiny_gemm.quantize_utils import unit_k
from tiny_gemm.triton_fused_transformer import attention, decode_attention
from tiny_gemm.triton_fused_transformer.attention import AttentionConfig
from tiny_gemm.triton_fused_transformer.decode_attention import DecodeAttentionConfig, pick_config

A, B, C = DecodeConfig(1, 2, 4, 2, 128), DecodeConfig(2, 2, 4, 3, 128), DecodeConfig(1, 2, 4, 2, 128, splits=2)


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize(("k", "group_size"), [(576, 32), (2048, 128), (14336, 128), (64, 64)])
def test_candidates_can_be_launched(k, group_size, m, gated, quick):
    facts = aot.device_facts("sm_90")
    found = candidates(k, 4096, group_size, m, facts, gated=gated, quick=quick)
    assert found and len(set(found)) == len(found)
    for c in found:
        step = c.warp_units * c.warps * unit_k(k)
        assert step >= 2 * group_size, "two groups or more"
        assert c.max_registers * 32 * c.warps <= 65536
        assert (c.stages - 1) * (1 + gated) * 16 * c.row_tiles * step // 2 < facts.shared_memory_bytes
        steps = -(-k // step)
        assert c.splits == 1 or (not gated and (c.splits - 1) * -(-steps // c.splits) < steps), "each split has a step"
        assert not c.cluster or steps <= c.splits <= 8, "a cluster's splits are of one step"


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("m", [17, 64, 200])
@pytest.mark.parametrize(("k", "n"), [(576, 1536), (4096, 28672), (64, 64)])
def test_candidates_for_many_rows(k, n, m, quick):
    found = candidates(k, n, 32, m, aot.device_facts("sm_86"), quick=quick)
    assert found and len(set(found)) == len(found)
    assert all(c.splits == 1 or 2 * c.splits <= k // 64 for c in found)
    assert all(c.block_m < 2 * max(m, 32) for c in found)
    found = candidates(k, n, 32, m, aot.device_facts("sm_90"), quick=quick)
    kinds = {SplitConfig} if m < 200 else {SplitConfig, PrefillConfig}
    if int4_config.IN_GLUON and m > 32 and k == 4096:
        kinds.add(HopperConfig)
    assert {type(c) for c in found} == kinds
    assert {replace(c, splits=1) for c in found if type(c) is PrefillConfig} == set(PREFILL_BLOCKS if m == 200 else ())


def test_each_kind_of_configuration_is_explained():
    names = sweep_int4_gemm.names_of([A, SplitConfig(64, 64, 1, 4, 3), B])
    assert names == [
        "DecodeConfig: row_tiles, warp_units, warps, stages, max_registers, splits, cluster",
        "SplitConfig: block_n, block_m, splits, num_warps, stages",
    ]


def test_more_than_16_rows_get_no_entry():
    many = SplitConfig(64, 64, 1, 4, 3)
    assert best_of([(64, None, 9.0), (64, many, 5.0)]) == []
    assert best_of([(64, None, 9.0), (64, many, 5.0), (1, None, 9.0), (1, A, 5.0)]) == [(8, A), (16, A)]


def test_the_split_of_k_is_the_same_for_all_rows():
    """C is the fastest for one row, but loses more at 16 than it gains."""
    times = {None: (9, 9, 9), A: (5, 5, 8), B: (6, 6, 6), C: (4, 5, 20)}
    found = [(m, c, us) for c, row in times.items() for m, us in zip((1, 8, 16), row, strict=True)]
    assert best_of(found) == [(8, A), (16, B)]


def test_no_entry_where_the_library_is_as_fast():
    assert best_of([(1, None, 4.0), (1, A, 4.0), (1, C, 5.0)]) == []


def test_a_configuration_that_failed_for_some_rows_is_not_chosen():
    found = [(1, None, 9.0), (8, None, 9.0), (1, C, 1.0), (1, A, 5.0), (8, A, 5.0)]
    assert best_of(found) == [(8, A), (16, A)], "and 16 rows cut K as 8 do, though nobody timed them"
    assert best_of([(1, A, 5.0)]) == [], "nothing to compare with"


@pytest.mark.aot
@pytest.mark.parametrize("zeros", [None, *sweep_int4_gemm.ZEROS.values()], ids=str)
@pytest.mark.parametrize(("config", "m"), [(A, 8), (C, 8), (SplitConfig(64, 64, 2, 4, 3), 64)], ids=str)
def test_a_candidate_compiles(config, m, zeros, monkeypatch):
    """compile_one for a chip that need not be there: Triton's driver says that it is an H100."""
    chip = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", chip)
    monkeypatch.setattr(sweep_int4_gemm, "device_facts", lambda _: aot.device_facts("sm_90"))
    for gated in (False, True) if config.splits == 1 else (False,):
        assert sweep_int4_gemm.compile_one((m, 2048, 2048, 128, zeros, gated, torch.bfloat16, config)) is None


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        pytest.param(sweep_int4_gemm.main, ["--shapes", "2048x2048"], id="int4_gemm"),
        pytest.param(sweep_decode_attention.main, [], id="decode_attention"),
        pytest.param(sweep_fused_attention.main, [], id="fused_attention"),
    ],
)
def test_without_a_gpu_it_says_so(main, arguments, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        main([*arguments, "--out", "t.json"])
    assert capsys.readouterr().err.splitlines()[-1].endswith("error: needs a GPU: torch finds none here")


ATTENTION = {
    "9_3": (3, 512, 64),
    "8_128": (8, 8192, 128),
    "8_80": (8, 100, 80),
    "1_256": (1, 2048, 256),
    "L1": (8, 1, 64),
}


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("itemsize", [1, 2])
@pytest.mark.parametrize(("kv_heads", "length", "head_dim"), ATTENTION.values(), ids=ATTENTION.keys())
def test_attention_candidates_can_be_launched(kv_heads, length, head_dim, itemsize, target, quick):
    facts = aot.device_facts(target)
    found = sweep_decode_attention.candidates(kv_heads, 4, length, head_dim, itemsize, facts, quick=quick)
    assert found[0] == pick_config(kv_heads, 4, length, head_dim, itemsize, facts)
    assert len(found) >= 3 and len(set(found)) == len(found)
    for c in found:
        assert c.num_warps in (2, 4, 8), "what the kernel knows to add up"
        assert 1 <= c.num_splits <= 64
        assert (c.num_splits - 1) * 16 * c.tiles * c.num_warps < length, "each block has a tile"


def test_heads_are_parsed():
    assert heads_of("9x3x64") == (9, 3, 64)
    for wrong in ("9x3", "9x2x64", "8x8x65", "0x0x64", "8x8x32", "a"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not like 32x8x128|must divide"):
            heads_of(wrong)


def test_one_attention_configuration_serves_all_batches():
    """W is the fastest alone, but loses more in the batch of 8 than it gains; X was not timed there."""
    picked, *others = [{"num_splits": n} for n in (1, 2, 3, 4)]
    times = [(picked, (4, 25)), (others[0], (5, 5)), (others[1], (2, 100)), (others[2], (1,))]
    rows = [
        {"config": c, "B": b, "us": us, "picked": c == picked}
        for c, t in times
        for b, us in zip((1, 8), t, strict=False)
    ]
    assert best_over_batches(rows) == {"config": others[0], "picked": picked, "gain": 1.0}
    assert best_over_batches([*rows, {"impl": "sdpa-flash", "B": 1, "us": 1}]) == best_over_batches(rows)
    assert best_over_batches(rows[:2]) == {"config": picked, "picked": picked, "gain": 0.0}
    assert best_over_batches(rows[2:]) is None and best_over_batches([]) is None, "nothing to compare with"


CPU = Machine(torch.device("cpu"), 0, 1.0, 1.0)


def count_calls(calls, machine):
    """In the place of time_us."""
    return len([call() for call in calls])


@pytest.mark.interp
@pytest.mark.parametrize("filled", [39, 0])
@pytest.mark.parametrize("cached", [None, torch.int8, torch.float8_e4m3fn], ids=str)
def test_attention_is_checked_before_it_is_timed(filled, cached, monkeypatch, capsys):
    right, wrong, failed = (DecodeAttentionConfig(n, 2, 1) for n in (2, 1, 3))

    def launch(*inputs, **options):
        config = decode_attention.pick_config()
        if config == failed:
            raise RuntimeError("out of registers\nmore")
        out = real(*inputs, **options)
        if config == wrong:
            inputs[4][:, :, filled] = 0  # v is not appended
        return out

    real = decode_attention.decode_attention
    monkeypatch.setattr(decode_attention, "decode_attention", launch)
    monkeypatch.setattr(sweeps, "time_us", count_calls)
    rows = sweep_case((4, 2, 64), 40, filled, torch.bfloat16, cached, [right, wrong, failed], CPU, 2)
    assert [(row["config"]["num_splits"], row["picked"]) for row in rows] == [(2, True)]
    token = 2 * 64 * 2 if cached is None else 2 * (64 + 4)
    assert rows[0]["floor_us"] == (2 * 2 * 4 * 64 * 2 + 2 * 2 * token * (filled + 1)) / 1e3
    # Of 8 bits, a number halfway between two codes may round either way.
    bound = 1e-2 if cached is None else dict(CACHES_8_BIT.values())[cached]
    assert 0 <= rows[0]["max_rel_err"] < bound and rows[0]["us"] == 2
    said = capsys.readouterr().err
    assert f"{wrong} is wrong by 1" in said and f"{failed}: RuntimeError: out of registers\n" in said
    assert decode_attention.pick_config is pick_config


def test_a_configuration_is_put_in_the_place_of_pick_configs(monkeypatch):
    config = DecodeAttentionConfig(5, 8, 1)
    monkeypatch.setattr(decode_attention, "decode_attention", lambda *_: decode_attention.pick_config(8, 128))
    assert attend(config) == config


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["auto", "int8", "fp8"])
def test_attention_is_swept(cache, tmp_path, capsys):
    out = tmp_path / "times.json"
    arguments = ["--heads", "4x2x64", "--lengths", "100", "--batch-sizes", "1", "2", "--filled", "50", "--quick"]
    arguments += ["--cache", cache]
    assert sweep_decode_attention.main([*arguments, "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out.count("4/2 D64 L 100 filled 50") == 2 and "wrong" not in said.err
    (best,) = json.loads(said.out.splitlines()[-1])["best"]
    assert best["batch_sizes"] == [1, 2] and best["gain"] >= 0
    rows = json.loads(out.read_text())["cases"]
    assert {row["B"] for row in rows if row["picked"]} == {1, 2} and all(
        0 < row["floor_us"] < row["us"] for row in rows
    )
    (picked,) = [row for row in rows if row["picked"] and row["B"] == 1]
    assert picked["heads"] == 4 and picked["D"] == 64 and picked["L"] == 100 and picked["filled"] == 50


def test_lengths_are_parsed():
    assert lengths_of("512") == (512, 512) and lengths_of("256:2048") == (256, 2048)
    for wrong in ("a", "1:2:3", "0", "20:10", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="is not like 512 or 256:2048|at least"):
            lengths_of(wrong)


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_90", "gfx942"])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_prefill_candidates_can_be_launched(head_dim, target, quick):
    facts = aot.device_facts(target)
    found = sweep_fused_attention.candidates(4, 512, head_dim, 2, facts, quick=quick)
    assert found[0] == attention.pick_config(4 * 512, head_dim, 2, False, facts)
    assert len(set(found)) == len(found) <= 12
    block_d = triton.next_power_of_2(head_dim)
    for c in found[1:]:
        assert c.block_m >= 16 * c.num_warps, "each warp has rows of its own"
        assert (c.block_m + 2 * c.block_n * c.num_stages) * block_d * 2 <= facts.shared_memory_bytes


@pytest.mark.interp
@pytest.mark.parametrize(("causal", "pairs"), [(True, 20 * 30 - 20 * 20 // 2), (False, 20 * 30)])
def test_prefill_is_checked_before_it_is_timed(causal, pairs, monkeypatch, capsys):
    right, wrong, failed = (AttentionConfig(16, n, 2, 1) for n in (16, 32, 64))

    def launch(q, k, v, *, causal):
        config = attention.pick_config()
        if config == failed:
            raise RuntimeError("out of shared memory")
        out = real(q, k, v, causal=causal)
        if config == wrong:
            out[:, :, -1] = 0
        return out

    real = attention.fused_attention
    monkeypatch.setattr(attention, "fused_attention", launch)
    monkeypatch.setattr(sweeps, "time_us", count_calls)
    configs = [right, wrong, failed]
    (row,) = sweep_fused_attention.sweep_case((4, 2, 64), (20, 30), causal, torch.bfloat16, configs, CPU, 2)
    assert row["config"]["block_n"] == 16 and row["picked"] and row["us"] == 2
    assert row["tflops"] == 4 * 2 * 4 * 64 * pairs / 2 / 1e6 and 0 < row["max_rel_err"] < 1e-2
    said = capsys.readouterr().err
    assert f"{wrong} is wrong by " in said and f"{failed}: RuntimeError: out of shared memory\n" in said


def test_the_summary_has_the_others_and_the_best():
    row = {"floor_us": 1.0, "picked": False}
    rows = [row | {"us": us, "picked": us == 3, "config": {"block_m": us}} for us in (3, 5, 2)]
    rows.append({"floor_us": 1.0, "us": 4.0, "impl": "sdpa-flash"})
    assert summary(rows) == "floor 1.00 | sdpa-flash 4.00 | now 3.00 (3,) | 2.00 (2,); 3.00 (3,); 5.00 (5,)"
    assert summary(rows[1:]).startswith("floor 1.00 | sdpa-flash 4.00 | now failed | ")
    assert summary(rows[3:]) == "nothing could be timed"


def test_cases_are_swept_until_the_deadline(tmp_path, capsys):
    row = {"floor_us": 1.0, "us": 2.0, "picked": True, "config": {"block_m": 64}}
    case = SweepCase("4/2 D64", {"D": 64}, lambda batch: [row | {"us": float(batch)}])
    args = argparse.Namespace(batch_sizes=[1, 2], deadline=60.0, out=tmp_path / "t.json", dtype="bfloat16")
    run_cases([case], args, CPU, time.time())
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines == [f"4/2 D64 B {b}: floor 1.00 | now {b:.2f} (64,) | {b:.2f} (64,)" for b in (1, 2)]
    (best,) = json.loads(last)["best"]
    assert best == {"D": 64, "batch_sizes": [1, 2], "config": row["config"], "picked": row["config"], "gain": 0.0}
    rows = json.loads(args.out.read_text())["cases"]
    assert [(r["D"], r["B"], r["dtype"], r["us"]) for r in rows] == [(64, 1, "bfloat16", 1), (64, 2, "bfloat16", 2)]

    run_cases([case], args, CPU, time.time() - 61)
    said = capsys.readouterr()
    assert said.err == "4/2 D64 B 1: not reached\n4/2 D64 B 2: not reached\n"
    assert json.loads(said.out)["best"] == []


@pytest.mark.gpu
def test_prefill_is_swept(tmp_path, capsys):
    out = tmp_path / "times.json"
    arguments = ["--heads", "4x2x64", "--lengths", "100", "60:200", "--masks", "causal", "full", "--quick"]
    assert sweep_fused_attention.main([*arguments, "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out.count("4/2 D64 60:200") == 2 and "wrong" not in said.err
    best = json.loads(said.out.splitlines()[-1])["best"]
    assert [(b["Lq"], b["Lk"], b["causal"]) for b in best] == [
        (100, 100, True),
        (100, 100, False),
        (60, 200, True),
        (60, 200, False),
    ]
    rows = json.loads(out.read_text())["cases"]
    assert all(0 < row["floor_us"] < row["us"] for row in rows) and any(row.get("impl") for row in rows)
