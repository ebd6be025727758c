"""The sweep of decode configurations: what it tries, and what it makes of the times."""

from types import SimpleNamespace

import aot
import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks import sweep_int4_gemm
from benchmarks.sweep_int4_gemm import best_of, candidates, main
from tiny_gemm.quantize_utils import unit_k
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


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        main(["--shapes", "2048x2048", "--out", "t.json"])
    assert "needs a GPU" in capsys.readouterr().err
