"""What kernels are given besides their arguments: facts about the chip, counters, scratch."""

import pytest
import torch

from tiny_gemm import device as device_module
from tiny_gemm.device import INTERPRETED, counters, device_facts, scratch

CPU = torch.device("cpu")


def test_a_cpu_is_the_interpreter():
    assert device_facts(CPU) is device_facts(torch.device("cpu", 0)) is INTERPRETED


def test_counters_are_zero_and_kept():
    first = counters(CPU, 3, "test")
    assert first.dtype == torch.int32 and first.numel() >= 3 and not first.any()
    assert counters(CPU, 100, "test") is first and counters(CPU, 3, "another test") is not first
    more = counters(CPU, first.numel() + 1, "test")
    assert more.numel() > first.numel() and not more.any() and counters(CPU, 3, "test") is more
    assert any(t is first for t in device_module._RETIRED), "a kernel may still be using it"


def test_scratch_of_the_interpreter_is_new_each_time(poisoned):
    x = torch.zeros(1, dtype=torch.bfloat16)
    first, second = scratch(x, 5), scratch(x, 5)
    assert first.dtype == torch.float32 and first.shape == (5,) and first.isnan().all()
    assert first.data_ptr() != second.data_ptr()


@pytest.mark.gpu
def test_facts_of_a_gpu():
    facts = device_facts(torch.device("cuda"))
    assert facts is device_facts(torch.device("cuda", torch.cuda.current_device()))
    assert facts.sm_count > 0 and facts.shared_memory_bytes >= 48 * 1024


@pytest.mark.gpu
def test_every_stream_keeps_its_own():
    x = torch.zeros(1, device="cuda")
    get = lambda: (counters(x.device, 40, "test"), scratch(x, 1000))  # noqa: E731
    here, side = get(), torch.cuda.Stream()
    with torch.cuda.stream(side):
        there = get()
        assert all(a is b for a, b in zip(there, get(), strict=True))
    assert all(a is not b for a, b in zip(here, there, strict=True))
    assert all(a is b for a, b in zip(here, get(), strict=True))
    assert scratch(x, 2**20 + 1) is not scratch(x, 2**20 + 1), "nobody keeps what a large launch needs"


@pytest.mark.gpu
def test_every_launch_in_a_graph_has_its_own():
    x = torch.zeros(1, device="cuda")
    kept = counters(x.device, 40, "test"), scratch(x, 1000)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # the stream that is captured below has been used before
        counters(x.device, 40, "test"), scratch(x, 1000)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = [(counters(x.device, 40, "test"), scratch(x, 1000)) for _ in range(3)]
        captured[0][1].zero_()  # an empty graph is a warning
    for tensors in zip(kept, *captured, strict=True):
        assert len({t.data_ptr() for t in tensors}) == 4
    with pytest.raises(RuntimeError, match="run the op once"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        counters(x.device, 1, "a kind that was never used")
