"""The INT4 product that streams weights through one block an SM, in Gluon: as compiled for Hopper, and on it. The
interpreter knows no Gluon, and no other chip takes it: what the interpreter runs is `_int4_decode_kernel`, whose bits
these are."""

import dataclasses
import re

import aot
import pytest
import torch
from conftest import assert_close
from int4_weights import every_kind_of_zeros, quantized
from test_gluon_gemm import multiply
from test_int4_config import H100
from test_triton_gemm import compile_planned

from tiny_gemm import int4_config, ops, triton_gemm
from tiny_gemm.int4_config import StreamConfig, Zeros
from tiny_gemm.quantize_utils import quantize
from tiny_gemm.reference import int4_gated_linear_ref, int4_gemm_ref


def stream_config(k):
    """For so many columns, of as few warps and blocks as there may be."""
    return StreamConfig(8 if k <= 2048 else 16, cluster=-(-k // 4096))


pytestmark = pytest.mark.skipif(not int4_config.IN_GLUON, reason="the kernel in Gluon was written for Triton 3.6")


@pytest.mark.aot
@pytest.mark.parametrize("m", [8, 16])
@pytest.mark.parametrize(
    ("k", "group_size", "scales", "zeros", "gate", "dtype", "spills"),  # spills: at 8 and at 16 rows, at most
    [
        (4096, 128, "*fp16", None, None, "bf16", (0, 0)),
        (4096, 128, "*bf16", None, ("*bf16", None), "bf16", (0, 0)),
        (2048, 128, "*fp32", None, None, "fp16", (0, 0)),
        (2048, 128, "*fp16", "*i16", ("*fp16", "*i16"), "bf16", (0, 16)),
        (3584, 64, "*fp16", "*i16", None, "bf16", (0, 16)),
        (4096, 64, "*fp16", "*fp16", None, "bf16", (0, 16)),
        (4096, 32, "*fp16", None, None, "bf16", (0, 8)),
        (4096, 32, "*fp16", "*i16", ("*fp16", "*i16"), "bf16", (0, 16)),
        (2048, 32, "*fp16", "*fp16", ("*fp32", "*fp32"), "fp16", (24, 32)),
        (4096, 32, "*fp32", "*fp32", ("*fp32", "*fp32"), "fp16", (16, 32)),
        (4096, 128, "*fp16", "*i16", ("*fp32", "*fp32"), "bf16", (0, 24)),
        (8192, 128, "*fp16", None, None, "bf16", (0, 0)),
        (8192, 128, "*fp16", "*i16", ("*fp16", "*i16"), "bf16", (0, 16)),
        (8192, 32, "*fp32", "*fp32", ("*fp32", "*fp32"), "fp16", (16, 40)),
        (14336, 128, "*bf16", "*bf16", None, "bf16", (0, 16)),
        (28672, 32, "*fp16", "*i16", None, "bf16", (0, 16)),
    ],
    ids=str,
)
def test_no_warp_waits_for_another_but_for_sums(k, group_size, scales, zeros, gate, dtype, spills, m):
    """No barrier of the block stands in a loop around products; x stays in registers; all of shared memory is what the
    kernel planned, as it addresses it by number; blocks of a cluster send each other their sums."""
    from tiny_gemm import gluon_decode

    config = stream_config(k)
    activation, others = None, {"bias_ptr": "*bf16"}
    if gate:
        activation, others = "silu", {"gate_ptr": "*i16", "gate_s_ptr": gate[0], "gate_z_ptr": gate[1]}
    launch = triton_gemm.plan(m, 28672, k, group_size, Zeros.NONE, aot.device_facts("sm_90"), config, activation)
    compiled = compile_planned(launch, "sm_90", 28672, k, scales, zeros, dtype, others)
    aot.check(compiled, vector_loads=False, may_spill=True)
    assert compiled.spills <= spills[m > 8]
    assert compiled.registers <= gluon_decode.REGISTERS and compiled.static_shared_memory == 0

    def size_of(scales, zeros):
        bits = sum({"*fp32": 32, None: 0}.get(part, 16) for part in (scales, zeros))
        return 2048 + 256 // group_size * 16 * bits // 8

    has_real_zeros = any(z not in (None, "*i16") for z in (zeros, gate and gate[1]))
    stage = max(size_of(scales, zeros), size_of(*gate) if gate else 0)
    x_tiles = 1 if m <= 8 else 2
    x_sums = 256 // group_size * 8 * x_tiles if has_real_zeros else 0
    planned = gluon_decode.shared_bytes(stage, config.k_warps, x_tiles, x_sums, config.cluster, 2 if gate else 1)
    assert compiled.shared_memory == planned, "nothing of Triton's own: the barrier at its end is in use to the end"

    lines = compiled.assembly.splitlines()
    products = [i for i, line in enumerate(lines) if " HMMA" in line]
    count = 16 * x_tiles * (2 if gate else 1)  # those before are of the sums of x
    around = [loop for loop in aot.loops(compiled.assembly) if loop[0] < products[-count] < products[-1] < loop[1]]
    loop = lines[slice(*min(around, key=lambda loop: loop[1] - loop[0]))]
    assert sum(" HMMA" in line for line in loop) == count
    found = [line for line in loop if re.search(r" (BAR\.|LDG|MEMBAR)", line)]
    assert all(" LDG.E.U16 " in line for line in found), "the bias alone is read there"
    fetches = [i for i, line in enumerate(loop) if "UBLKCP" in line]
    read = [i for i, line in enumerate(loop) if re.search(r" LDS\.128", line)]
    assert sum(i < fetches[0] for i in read) >= 4, "what was read makes room"
    sends = [i for i, line in enumerate(loop) if re.search(r"\bSTAS\b", line)]
    assert len(sends) == (config.cluster > 1) * (2 if gate else 1), "a thread sends a number of each step"


def multiply_gated(x, weight, gate, config=None):
    parts = weight.packed, weight.scales, weight.zeros, gate.packed, gate.scales, gate.zeros
    return triton_gemm.int4_gated_linear(x, *parts, weight.group_size, weight.shape[0], "silu", config)


KINDS = pytest.mark.parametrize(
    ("dtype", "scale_dtype", "group_size"),
    [
        (torch.bfloat16, torch.float16, 128),
        (torch.bfloat16, torch.bfloat16, 32),
        (torch.float16, torch.float32, 64),
        (torch.float16, torch.float32, 32),
    ],
    ids=lambda v: str(v).removeprefix("torch."),
)


def check_bits(n, k, config, dtype, scale_dtype, group_size, zeros):
    """Those of the kernel in Triton, rows of x from one to all; twice."""
    weight = quantized(torch.randn(n, k, device="cuda"), group_size, zeros, scale_dtype=scale_dtype)
    bias = torch.randn(n, device="cuda", dtype=dtype)
    x = torch.randn(16, k, device="cuda", dtype=dtype)
    assert_close(multiply(x, weight, config, bias), int4_gemm_ref(x, weight, bias))
    whole = multiply(x, weight, config.in_triton, bias)
    for m in (1, 7, 8, 9, 16):
        for _ in range(2):
            assert torch.equal(multiply(x[:m], weight, config, bias), whole[:m]), m


@pytest.mark.gpu
@every_kind_of_zeros
@KINDS
@pytest.mark.parametrize(
    ("n", "k"),
    [(28672, 4096), (18941, 3584), (16 * 133, 3840), (4097, 2048), (100, 1792), (40, 256), (16, 2304)],
    ids=str,
)
def test_bits_are_those_of_the_kernel_in_triton(n, k, dtype, scale_dtype, group_size, zeros, poisoned, hopper):
    """More tiles than blocks and fewer, rows past N, warps without units."""
    check_bits(n, k, stream_config(k), dtype, scale_dtype, group_size, zeros)


@pytest.mark.gpu
@every_kind_of_zeros
@pytest.mark.parametrize(
    ("n", "k", "k_warps", "cluster", "dtype", "scale_dtype", "group_size"),
    [
        (28672, 7168, 16, 2, torch.bfloat16, torch.float16, 128),
        (8177, 8192, 16, 2, torch.float16, torch.float32, 32),
        (8192, 14336, 16, 4, torch.bfloat16, torch.bfloat16, 64),
        (1000, 28672, 16, 7, torch.float16, torch.float32, 32),
        (60, 10752, 16, 3, torch.bfloat16, torch.float16, 128),  # fewer tiles than blocks of a cluster
        (16, 5120, 16, 8, torch.bfloat16, torch.float16, 32),  # and a block without units
        (20001, 4096, 8, 2, torch.bfloat16, torch.float16, 32),
        (130, 3584, 8, 2, torch.bfloat16, torch.float16, 128),
    ],
    ids=str,
)
def test_bits_of_clusters_too(n, k, k_warps, cluster, dtype, scale_dtype, group_size, zeros, poisoned, hopper):
    """More steps than there is room for, and as few as one; as many of each block as of its neighbour, or fewer."""
    check_bits(n, k, StreamConfig(k_warps, cluster), dtype, scale_dtype, group_size, zeros)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("zeros", "gate_zeros"),
    [(zeros, zeros) for zeros in Zeros] + [(Zeros.INTEGER, Zeros.REAL), (Zeros.REAL, Zeros.INTEGER)],
    ids=lambda z: z.value,
)
@KINDS
@pytest.mark.parametrize(("n", "k"), [(14336, 4096), (1100, 3584), (8177, 2048), (33, 1792)], ids=str)
def test_gated_pairs_too(n, k, dtype, scale_dtype, group_size, zeros, gate_zeros, poisoned, hopper):
    """Also where the two weights have scales and zeros of different kinds."""
    config = stream_config(k)
    weight = quantized(torch.randn(n, k, device="cuda"), group_size, zeros, scale_dtype=scale_dtype)
    gate = quantized(torch.randn(n, k, device="cuda") / 16, group_size, gate_zeros, scale_dtype=torch.float16)
    x = torch.randn(16, k, device="cuda", dtype=dtype) / 16
    oracle = int4_gated_linear_ref(x, weight, gate)
    assert_close(multiply_gated(x, weight, gate, config), oracle)
    whole = multiply_gated(x, weight, gate, config.in_triton)
    for m in (1, 8, 11, 16):
        assert torch.equal(multiply_gated(x[:m], weight, gate, config), whole[:m]), m


@pytest.mark.gpu
@every_kind_of_zeros
@pytest.mark.parametrize(
    ("n", "k", "k_warps", "cluster", "group_size"),
    [(28672, 8192, 16, 2, 128), (7777, 7168, 16, 2, 32), (100, 14336, 16, 4, 128), (1100, 4096, 8, 2, 64)],
    ids=str,
)
def test_gated_pairs_of_clusters(n, k, k_warps, cluster, group_size, zeros, poisoned, hopper):
    """The kernel in Triton does not split pairs: here fewer rows of x are compared with all, again and again."""
    config = StreamConfig(k_warps, cluster)
    weight, gate = (quantized(torch.randn(n, k, device="cuda") / 16, group_size, zeros) for _ in range(2))
    x = torch.randn(16, k, device="cuda", dtype=torch.bfloat16) / 16
    whole = multiply_gated(x, weight, gate, config)
    assert_close(whole, int4_gated_linear_ref(x, weight, gate))
    for m in (1, 8, 11, 16) * 10:
        assert torch.equal(multiply_gated(x[:m], weight, gate, config), whole[:m]), m


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.parametrize(("n", "k", "cluster"), [(28672, 4096, 1), (128256, 4096, 2), (4096, 14336, 4)])
def test_the_same_bits_in_a_thousand_replays(n, k, cluster, m, poisoned, hopper):
    """In a graph beside launches on another stream."""
    weight = quantized(torch.randn(n, k, device="cuda"), 128, Zeros.INTEGER)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    assert int4_config.pick_config(m, n, k, 128, Zeros.INTEGER, H100).cluster == cluster
    expected = multiply(x, weight)
    assert_close(expected, int4_gemm_ref(x, weight))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = multiply(x, weight)
    other, differ = torch.cuda.Stream(), torch.zeros((), device="cuda", dtype=torch.int64)
    for i in range(1000):
        y.zero_()
        graph.replay()
        differ += (y != expected).sum()
        if i % 10 == 0:
            with torch.cuda.stream(other):
                multiply(x, weight)
    torch.cuda.synchronize()
    assert differ.item() == 0


@pytest.mark.gpu
def test_rows_of_x_that_are_not_aligned_are_copied(poisoned, hopper):
    weight = quantize(torch.randn(28672, 4096, device="cuda"), 128)
    gate = quantize(torch.randn(28672, 4096, device="cuda"), 128)
    wide = torch.randn(4, 4096 + 12, device="cuda", dtype=torch.bfloat16)
    for x in (wide[:, 3:4099], wide[:, 8:4104], wide[1:2, 1:4097]):
        assert torch.equal(ops.int4_gemm(x, weight), ops.int4_gemm(x.contiguous(), weight))
        assert torch.equal(multiply_gated(x, weight, gate), multiply_gated(x.contiguous(), weight, gate))


@pytest.mark.parametrize(
    ("m", "k", "group_size", "config"),
    [
        (17, 4096, 128, (16,)),
        (1, 4224, 128, (16, 2)),
        (1, 4096, 128, (8,)),
        (1, 8448, 128, (16, 2)),
        (1, 4096, -1, (16,)),
        (1, 4096, 256, (16,)),
    ],
)
def test_shapes_that_it_does_not_take_are_refused(m, k, group_size, config):
    with pytest.raises(ValueError, match=rf"M={m}, K={k}, group_size={group_size}: for StreamConfig"):
        triton_gemm.plan(m, 4096, k, group_size, Zeros.NONE, H100, StreamConfig(*config))


@pytest.mark.parametrize(("k_warps", "cluster"), [(4, 1), (10, 1), (12, 1), (32, 1), (8, 0), (16, 9)])
def test_blocks_that_do_not_exist_are_refused(k_warps, cluster):
    with pytest.raises(ValueError, match=r"k_warps must be 8 or 16, and cluster 1 to 8"):
        StreamConfig(k_warps, cluster)


@pytest.mark.parametrize(("room", "expected"), [((), 33), ((132, 66, 39, 30, 22, 17, 15, 15), 30)])
def test_a_launch_has_as_many_clusters_as_find_room_at_once(room, expected):
    """More would come in a second wave."""
    facts = dataclasses.replace(H100, cluster_room=room)
    launch = triton_gemm.plan(1, 28672, 14336, 128, Zeros.NONE, facts, StreamConfig(16, cluster=4))
    assert launch.grid == (expected, 1, 1) and launch.launcher.cluster == 4
    few = triton_gemm.plan(1, 100, 14336, 128, Zeros.NONE, facts, StreamConfig(16, cluster=4))
    assert few.grid == (7, 1, 1), "no more than there are row tiles"
    none = dataclasses.replace(H100, cluster_room=(132, 66, 0, 0, 0, 0, 0, 0))
    with pytest.raises(ValueError, match=r"has no room for a cluster of 4 blocks"):
        triton_gemm.plan(1, 100, 14336, 128, Zeros.NONE, none, StreamConfig(16, cluster=4))


def test_the_driver_is_asked_for_room_only_where_clusters_stream(monkeypatch):
    asked = []

    def room(device, facts):
        asked.append(device)
        return 132, 66, 39, 30, 22, 17, 15, 15

    monkeypatch.setattr(triton_gemm, "device_facts", lambda _: H100)
    monkeypatch.setattr(triton_gemm, "cluster_room", room)
    monkeypatch.setattr(triton_gemm, "set_up_counters", lambda *_: None)
    monkeypatch.setattr(triton_gemm, "_facts_with_room", triton_gemm._facts_with_room.__wrapped__)

    def grid_of(n, k):
        dtypes = torch.bfloat16, torch.float16, None
        found = triton_gemm._fixed_launch.__wrapped__(1, n, k, k, (None,), dtypes, 128, torch.device("cuda"), None)
        return found.launch.grid

    assert grid_of(28672, 4096) == (132, 1, 1) and grid_of(4096, 4096)[1] > 1 and not asked
    assert grid_of(4096, 14336) == (30, 1, 1) and asked


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "k", "cluster"), [(28672, 3584, 1), (4096, 14336, 4)])
def test_a_scale_that_is_no_number_spoils_its_row_alone(n, k, cluster, poisoned, hopper):
    """Also where warps have no units, whose stages hold what they held."""
    weight = quantize(torch.randn(n, k, device="cuda"), 128)
    weight.scales[0, 0, 3, 0] = float("inf")
    y = multiply(torch.randn(9, k, device="cuda", dtype=torch.bfloat16), weight, StreamConfig(16, cluster))
    spoilt = ~y.isfinite().all(0)
    assert spoilt[3] and spoilt.sum() == 1


def test_rows_of_x_that_are_not_aligned_are_copied_before_the_launch(monkeypatch):
    """The same on a CPU: which x a launch is handed."""
    handed = []
    monkeypatch.setattr(triton_gemm, "_fixed_launch", lambda *_: triton_gemm.Fixed(handed.append, 0, 0, streams=True))
    weight = quantize(torch.randn(32, 256), 128)
    wide = torch.randn(4, 300, dtype=torch.bfloat16)
    for x, copies in (
        (wide[:, 3:259], True),
        (wide[:, 8:264], True),
        (wide[:1, 8:264], False),
        (wide[:1, 1:257], True),
    ):
        multiply(x, weight)
        multiply_gated(x, weight, weight)
        for launch in handed:
            assert torch.equal(launch[0], x) and launch[0].data_ptr() % 16 == 0
            assert (launch[0].data_ptr() != x.data_ptr()) == copies
        assert len(handed) == 2
        handed.clear()
