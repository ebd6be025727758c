"""The sweeps of configurations: what they try, and what they make of the times."""

import argparse
import json
from types import SimpleNamespace

import aot
import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks import sweep_decode_attention, sweep_int4_gemm
from benchmarks.sweep_decode_attention import attend, best_over_batches, heads_of, sweep_case
from benchmarks.sweep_int4_gemm import best_of, candidates
from benchmarks.timing import Machine
from tiny_gemm.quantize_utils import unit_k
from tiny_gemm.triton_fused_transformer import decode_attention
from tiny_gemm.triton_fused_transformer.decode_attention import DecodeAttentionConfig, pick_config
from tiny_gemm.triton_gemm import DecodeConfig, units_per_step

A, B, C = DecodeConfig(1, 2, 4, 128), DecodeConfig(2, 2, 4, 128), DecodeConfig(1, 4, 8, 128)


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize(("k", "group_size"), [(576, 32), (2048, 128), (14336, 128), (64, 64)])
def test_candidates_can_be_launched(k, group_size, quick):
    found = candidates(k, group_size, quick=quick)
    assert found and len(set(found)) == len(found)
    for c in found:
        assert c.warp_units >= units_per_step(unit_k(k), group_size), "whole pairs of groups"
        assert c.max_registers * 32 * c.warps <= 65536
        assert not c.prefetch or c.warps * c.warp_units * unit_k(k) < k, "one step leaves nothing to prefetch"


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
@pytest.mark.parametrize("config", [A, C], ids=str)
def test_a_candidate_compiles(config, monkeypatch):
    """compile_one for a chip that need not be there: Triton's driver says that it is an H100."""
    chip = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_active_torch_device=lambda: torch.device("cpu"),
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", chip)
    monkeypatch.setattr(sweep_int4_gemm, "device_facts", lambda _: aot.device_facts("sm_90"))
    assert sweep_int4_gemm.compile_one((8, 2048, 2048, 128, torch.bfloat16, config)) is None


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        pytest.param(sweep_int4_gemm.main, ["--shapes", "2048x2048"], id="int4_gemm"),
        pytest.param(sweep_decode_attention.main, [], id="decode_attention"),
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
    assert best_over_batches(rows[:2]) == {"config": picked, "picked": picked, "gain": 0.0}
    assert best_over_batches(rows[2:]) is None and best_over_batches([]) is None, "nothing to compare with"


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
    monkeypatch.setattr(sweep_decode_attention, "time_us", lambda calls, machine: len([call() for call in calls]))
    machine = Machine(torch.device("cpu"), 0, 1.0, 1.0)
    rows = sweep_case((4, 2, 64), 2, 40, filled, torch.bfloat16, [right, wrong, failed], machine, cached)
    assert [(row["config"]["num_splits"], row["picked"]) for row in rows] == [(2, True)]
    token = 2 * 64 * 2 if cached is None else 2 * (64 + 4)
    assert rows[0]["floor_us"] == (2 * 2 * 4 * 64 * 2 + 2 * 2 * token * (filled + 1)) / 1e3
    assert rows[0]["filled"] == filled and 0 <= rows[0]["max_rel_err"] < 1e-2 and rows[0]["us"] == 2
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
