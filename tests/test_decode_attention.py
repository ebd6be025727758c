"""decode_attention: one set of cases for the kernel in the interpreter, the CPU implementation, and a GPU."""

import re
from dataclasses import dataclass, replace

import aot
import interpreter
import pytest
import torch
import triton
import triton.language as tl
from conftest import assert_close
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from tiny_gemm import device as device_module
from tiny_gemm import ops
from tiny_gemm.reference import decode_attention_ref, rotate_half
from tiny_gemm.triton_cluster import cluster_adders
from tiny_gemm.triton_fused_transformer import decode_attention as decode
from tiny_gemm.triton_fused_transformer import decode_parts, decode_work
from tiny_gemm.triton_fused_transformer.decode_attention import DecodeAttentionConfig

HALF = [torch.bfloat16, torch.float16]
IMPLEMENTATIONS = {"interpreter": (decode.decode_attention, "cpu"), "cpu": (ops.decode_attention, "cpu")}
IMPLEMENTATIONS["gpu"] = (ops.decode_attention, "cuda")


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    Lmax: int
    lengths: tuple[int, ...]
    D: int = 64
    rotary: int | None = None  # rotary dimensions; None: all of D, 0: no RoPE


CASES = {
    "empty_cache": Case(4, 4, 20, (0,)),
    "9_3_cache_edge": Case(9, 3, 150, (149,)),
    "14_2_ragged": Case(14, 2, 200, (0, 1, 64, 199)),
    "cache_full": Case(4, 2, 70, (70, 69, 100, 2**31 - 1)),
    "negative_length": Case(4, 2, 40, (-3,)),
    "odd_rope": Case(2, 1, 40, (33,), rotary=22),
    "head_80_partial_rope": Case(4, 1, 130, (128, 63), D=80, rotary=40),
    "head_96_no_rope": Case(6, 2, 100, (65, 3), D=96, rotary=0),
    "head_128": Case(8, 1, 300, (257,), D=128),
    "head_256": Case(2, 1, 40, (39, 7), D=256),
}
GPU_CASES = {
    f"{heads}_{kv_heads}_head_{D}_{Lmax}": Case(heads, kv_heads, Lmax, lengths, D=D)
    for D, shapes in {64: 6, 80: 2, 96: 2, 128: 6, 256: 2}.items()
    for heads, kv_heads, Lmax, lengths in [
        (14, 2, 4096, (4095, 0)),
        (9, 3, 2048, (1, 2047, 700, 64)),
        (10, 2, 1000, (0, 1, 63, 64, 65, 500, 998, 999)),
        (32, 8, 8192, (8191, 100)),
        (8, 8, 513, (512,)),
        (16, 1, 777, (400, 776, 777)),
    ][:shapes]
}


@pytest.fixture(
    params=[
        pytest.param("interpreter", marks=pytest.mark.interp),
        "cpu",
        pytest.param("gpu", marks=pytest.mark.gpu),
    ]
)
def implementation(request, poisoned):
    """(decode_attention, device), with outputs and partial results poisoned."""
    return IMPLEMENTATIONS[request.param]


def parametrize_cases(cases):
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


def make_inputs(case: Case, dtype, device="cpu", seed=0):
    """q, k, v, k_cache, v_cache, lengths, rope_cos, rope_sin; the caches are NaN from lengths[b] on."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(case.lengths)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    q, k, v = (normal(batch, heads, case.D) for heads in (case.heads, case.kv_heads, case.kv_heads))
    k_cache, v_cache = (normal(batch, case.kv_heads, case.Lmax, case.D) for _ in range(2))
    for b, length in enumerate(case.lengths):
        length = max(length, 0)
        k_cache[b, :, length:] = v_cache[b, :, length:] = float("nan")
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    rotary = case.D if case.rotary is None else case.rotary
    if rotary == 0:
        return q, k, v, k_cache, v_cache, lengths, None, None
    angles = torch.arange(case.Lmax)[:, None] * 10000.0 ** -(torch.arange(rotary // 2) / (rotary // 2))
    return q, k, v, k_cache, v_cache, lengths, angles.cos().to(device), angles.sin().to(device)


def clone_caches(inputs):
    q, k, v, k_cache, v_cache, *rest = inputs
    return (q, k, v, k_cache.clone(), v_cache.clone(), *rest)


def run(decode_attention, inputs, **arguments):
    """The output and the caches that it leaves; `inputs` stay as they are."""
    inputs = clone_caches(inputs)
    return decode_attention(*inputs, **arguments), inputs[3], inputs[4]


def check_against_oracle(decode_attention, inputs, **arguments):
    out, k_cache, v_cache = run(decode_attention, inputs, **arguments)
    oracle, k_oracle, v_oracle = decode_attention_ref(*inputs, **arguments)
    assert out.dtype == inputs[0].dtype
    assert_close(out, oracle)
    assert torch.equal(v_cache.isnan(), v_oracle.isnan()) and torch.equal(k_cache.isnan(), k_oracle.isnan())
    assert torch.equal(v_cache.nan_to_num(), v_oracle.nan_to_num())
    assert_close(k_cache.nan_to_num(), k_oracle.nan_to_num().double())  # RoPE in fp32 may round the other way
    lengths = inputs[5].tolist()
    for b, length in enumerate(max(n, 0) for n in lengths):
        assert torch.equal(k_cache[b, :, :length], inputs[3][b, :, :length]), "what was cached stays as it was"


@parametrize_cases(CASES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_matches_oracle(implementation, case, dtype):
    decode_attention, device = implementation
    check_against_oracle(decode_attention, make_inputs(case, dtype, device))


@pytest.mark.gpu
@parametrize_cases(GPU_CASES)
def test_matches_oracle_on_gpu(poisoned, case):
    check_against_oracle(ops.decode_attention, make_inputs(case, torch.bfloat16, "cuda"))


def test_float32_is_exact(implementation):
    decode_attention, device = implementation
    check_against_oracle(decode_attention, make_inputs(Case(5, 1, 60, (40, 59)), torch.float32, device), scale=0.3)


FEATURES = {  # window, softcap, sinks
    "window": (70, 0.0, False),
    "window_of_one": (1, 0.0, False),
    "window_past_the_cache": (1000, 0.0, False),
    "softcap": (0, 2.0, False),
    "sinks": (0, 0.0, True),
    "all": (100, 5.0, True),
}


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
@pytest.mark.parametrize(
    "case", [Case(14, 2, 150, (0, 69, 149, 150)), Case(4, 2, 300, (290,), D=128)], ids=["ragged", "long"]
)
def test_window_softcap_sinks_and_lse(implementation, case, features):
    decode_attention, device = implementation
    inputs = make_inputs(case, torch.bfloat16, device)
    window, softcap, with_sinks = features
    sinks = torch.linspace(-3, 6, case.heads, device=device) if with_sinks else None
    arguments = {"window": window, "softcap": softcap, "sinks": sinks}
    check_against_oracle(decode_attention, inputs, **arguments)
    lse = torch.full((len(case.lengths), case.heads), float("nan"), device=device)
    assert_close(run(decode_attention, inputs, lse=lse, **arguments)[0], decode_attention_ref(*inputs, **arguments)[0])
    assert (lse - lse_ref(inputs, **arguments)).abs().max() < 2e-2


def lse_ref(inputs, window, softcap, sinks, appended=False):
    """The natural logarithm of the softmax's denominator, [B, Hq]; the cache may have the new token already."""
    q, k, v, k_cache, v_cache, lengths, cos, sin = inputs
    if not appended:
        _, k_cache, _ = decode_attention_ref(*inputs)
    rows = []
    for b, length in enumerate(lengths.tolist()):
        position = min(length, k_cache.shape[2] - 1)
        q_row = rotate_half(q[b].double(), cos[position].double(), sin[position].double())
        begin = max(position + 1 - window, 0) if window else 0
        keys = k_cache[b, :, begin : position + 1].double().repeat_interleave(q.shape[1] // k.shape[1], 0)
        scores = (keys @ q_row[:, :, None])[..., 0] * q.shape[2] ** -0.5
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        rows.append(torch.cat([scores] + ([sinks.double()[:, None]] if sinks is not None else []), -1).logsumexp(-1))
    return torch.stack(rows)


NORM_CASES = {
    "14_2_ragged": Case(14, 2, 100, (0, 64, 99, 100)),
    "head_128": Case(4, 1, 90, (70,), D=128),
    "head_80_partial_rope": Case(4, 1, 60, (58, 3), D=80, rotary=40),
    "odd_rope": Case(2, 1, 40, (33,), rotary=22),
    "no_rope": Case(6, 2, 40, (35, 3), D=96, rotary=0),
}


@parametrize_cases(NORM_CASES)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_norm_of_q_and_k(implementation, case, dtype):
    """In the launch it gives what rms_norm before it gives, but for the order in which squares are added up."""
    decode_attention, device = implementation
    q, k, *rest = make_inputs(case, dtype, device)
    inputs, norms = (q * 5, k * 0.1, *rest), norms_of(case, dtype, device)
    check_against_oracle(decode_attention, inputs, **norms)
    normed = (ops.rms_norm(x, norms[name], eps=1e-3) for x, name in zip(inputs[:2], norms, strict=False))
    assert_close(run(decode_attention, inputs, **norms)[0], run(decode_attention, (*normed, *rest))[0].double())


def norms_of(case: Case, dtype, device):
    q_norm, k_norm = torch.linspace(0.5, 2, case.D, device=device), torch.linspace(-1, 1, case.D, device=device)
    return {"q_norm": q_norm, "k_norm": k_norm.to(dtype), "norm_eps": 1e-3}


def test_views_of_a_qkv_row_and_of_a_layered_cache(implementation):
    decode_attention, device = implementation
    case = Case(6, 2, 50, (20, 49))
    _, _, _, k_cache, v_cache, lengths, cos, sin = make_inputs(case, torch.bfloat16, device)
    qkv = torch.randn(2, 10, case.D, device=device, dtype=torch.bfloat16)
    q, k, v = qkv.split([6, 2, 2], dim=1)
    layers_k, layers_v = (torch.stack([torch.zeros_like(c), c], dim=2) for c in (k_cache, v_cache))  # strided views
    out = decode_attention(q, k, v, layers_k[:, :, 1], layers_v[:, :, 1], lengths, cos, sin)
    expected, k_expected, v_expected = run(
        decode_attention, (q.contiguous(), k.contiguous(), v.contiguous(), k_cache, v_cache, lengths, cos, sin)
    )
    assert torch.equal(out, expected)
    assert torch.equal(layers_k[:, :, 1].nan_to_num(), k_expected.nan_to_num())
    assert torch.equal(layers_v[:, :, 1].nan_to_num(), v_expected.nan_to_num())
    assert (layers_k[:, :, 0] == 0).all() and (layers_v[:, :, 0] == 0).all()


def test_caches_whose_rows_begin_anywhere(implementation):
    """Views one element into their storage, and rows that are further apart than they are long, by an odd number."""
    decode_attention, device = implementation
    q, k, v, k_cache, v_cache, *rest = make_inputs(Case(8, 2, 150, (149, 20), D=128), torch.bfloat16, device)
    expected, k_expected, _ = run(decode_attention, (q, k, v, k_cache, v_cache, *rest))
    for row in (128, 131):
        shifted = [torch.zeros(2 * 2 * 150 * row + 1, dtype=q.dtype, device=device)[1:] for _ in range(2)]
        caches = [t.view(2, 2, 150, row)[..., :128].copy_(c) for t, c in zip(shifted, (k_cache, v_cache), strict=True)]
        assert_close(decode_attention(q, k, v, *caches, *rest), expected.double())
        assert torch.equal(caches[0].nan_to_num(), k_expected.nan_to_num())


@pytest.mark.interp
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_blocks_of_eight_heads_as_on_nvidia(poisoned, monkeypatch, dtype):
    """The interpreter's blocks are AMD's, of 16 heads; NVIDIA's have 8, which stand twice in the product's 16 rows."""
    launcher = decode._launcher

    def of_eight(*arguments):
        found = launcher.__wrapped__(*arguments)
        found.meta["BLOCK_G"] = 8
        return found

    monkeypatch.setattr(decode, "_launcher", of_eight)
    check_against_oracle(decode.decode_attention, make_inputs(Case(14, 2, 150, (0, 69, 149)), dtype))


@pytest.mark.interp
def test_tokens_that_lie_far_apart():
    """Rows 2^24 elements apart, as in a pool of all layers and sequences: tokens of a tile lie more than 2^31 apart."""
    case = Case(2, 1, 200, (199,))
    q, k, v, k_cache, v_cache, *rest = make_inputs(case, torch.bfloat16)
    expected = run(decode.decode_attention, (q, k, v, k_cache, v_cache, *rest))[0]
    far = [torch.empty(200 << 24, dtype=q.dtype).as_strided((1, 1, 200, 64), (1, 1, 2**24, 1)) for _ in range(2)]
    for t, cache in zip(far, (k_cache, v_cache), strict=True):
        t.copy_(cache)  # only these rows are touched
    assert torch.equal(decode.decode_attention(q, k, v, *far, *rest), expected)


def test_row_alone_has_the_bits_of_the_batch(implementation):
    decode_attention, device = implementation
    case = Case(10, 2, 160, (0, 1, 63, 64, 65, 100, 159, 160))
    inputs = make_inputs(case, torch.bfloat16, device)
    together = run(decode_attention, inputs)
    for b in range(len(case.lengths)):
        row = [x[b : b + 1] for x in inputs[:6]] + list(inputs[6:])
        for alone, batch in zip(run(decode_attention, row), together, strict=True):
            assert torch.equal(alone[0].nan_to_num(), batch[b].nan_to_num())


on_kernels = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.interp), pytest.param("cuda", marks=pytest.mark.gpu)]
)


def check_turns(monkeypatch, device, pairs, call):
    """call() gives tensors of the same bits, however many blocks do up to six splits of each of `pairs` pairs of a
    sequence and a KV head or whether they are a cluster, and the counters are zero behind it."""
    config = DecodeAttentionConfig(6, num_warps=4 if device == "cuda" else 1, tiles=1)
    monkeypatch.setattr(decode, "pick_config", lambda *_: config)
    results = [call()] if device == "cuda" else []  # on Hopper of clusters
    monkeypatch.setattr(decode, "is_cluster", lambda *_: False)
    for blocks in (6 * pairs, 6 * pairs - 1, 3 * pairs + 3, 2 * pairs, pairs + 3, pairs):
        monkeypatch.setattr(decode, "blocks_of", lambda *_, blocks=blocks: blocks)
        results.append(call())
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert torch.equal(got.nan_to_num(), want.nan_to_num())
    assert (device_module.counters(results[0][0].device, 16) == 0).all()


@on_kernels
@pytest.mark.parametrize("window, softcap", [(0, 0.0), (120, 30.0)])
@pytest.mark.parametrize("D", [64, 128])
def test_blocks_that_take_turns_give_the_same_bits(poisoned, monkeypatch, device, D, window, softcap):
    case = Case(8, 2, 1000, (999, 0, 63, 64, 500), D=D)
    inputs, sinks = make_inputs(case, torch.bfloat16, device), torch.randn(8, device=device)
    arguments = {"window": window, "softcap": softcap, "sinks": sinks}

    def call():
        lse = torch.empty(5, 8, device=device)
        return *run(decode.decode_attention, inputs, lse=lse, **arguments), lse

    check_turns(monkeypatch, device, 2 * 5, call)
    check_against_oracle(decode.decode_attention, inputs, **arguments)


@triton.jit
def _splits_kernel(
    lengths_ptr,
    out_ptr,  # [blocks, 5] int32
    B,
    Lmax,
    KV_HEADS: tl.constexpr,
    STEP: tl.constexpr,
    WINDOW: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    lengths = decode_work.read_lengths(lengths_ptr, B, BLOCK_B)
    found = decode_work.splits_of_block(lengths, Lmax, B, KV_HEADS, STEP, WINDOW, NUM_SPLITS, BLOCK_B)
    for i in tl.static_range(5):
        tl.store(out_ptr + tl.program_id(0) * 5 + i, found[i].to(tl.int32))


@on_kernels
@pytest.mark.parametrize("window", [0, 90])
@pytest.mark.parametrize("batch", [1, 7, 32, 33])
def test_each_split_is_of_one_block(device, batch, window):
    """Also that no fewer turns would do, and that blocks without work know it."""
    kv_heads, step, num_splits, Lmax = 3, 16, 12, 500
    lengths = torch.randint(-5, Lmax + 5, (batch,), generator=torch.Generator().manual_seed(batch), dtype=torch.int32)
    attended = (lengths.clamp(0, Lmax - 1) + 1).tolist()
    begins = [max(n - window, 0) if window else 0 for n in attended]
    splits = [min(-(-n // step) - begin // step, num_splits) for n, begin in zip(attended, begins, strict=True)]
    fewest, most = batch * kv_heads, sum(splits) * kv_heads
    for blocks in sorted({fewest, fewest + 1, (fewest + most) // 2, most - 1, most, most + 9} - set(range(fewest))):
        out = torch.empty(blocks, 5, dtype=torch.int32, device=device)
        block_b = max(32, triton.next_power_of_2(batch))
        _splits_kernel[(blocks,)](
            lengths.to(device), out, batch, Lmax, kv_heads, step, window, num_splits, block_b, num_warps=4
        )
        done = []
        turns = 0
        for b, head, first, apart, length in out.tolist():
            assert length == max(int(lengths[b]), 0)
            mine = [(b, head, split) for split in range(first, splits[b], apart)]
            assert mine or first == num_splits
            done += mine
            turns = max(turns, len(mine))
        assert sorted(done) == [(b, h, s) for b in range(batch) for h in range(kv_heads) for s in range(splits[b])]
        assert turns == 1 or kv_heads * sum(-(-n // (turns - 1)) for n in splits) > blocks


@on_kernels
def test_a_batch_of_more_than_32_in_turns(poisoned, monkeypatch, device):
    config = DecodeAttentionConfig(3, num_warps=4 if device == "cuda" else 1, tiles=1)
    monkeypatch.setattr(decode, "pick_config", lambda *_: config)
    inputs = make_inputs(Case(2, 1, 60, tuple(7 * i % 61 for i in range(35))), torch.bfloat16, device)
    expected = run(decode.decode_attention, inputs)
    check_against_oracle(decode.decode_attention, inputs)
    monkeypatch.setattr(decode, "is_cluster", lambda *_: False)
    monkeypatch.setattr(decode, "blocks_of", lambda *_: 40)
    for got, want in zip(run(decode.decode_attention, inputs), expected, strict=True):
        assert torch.equal(got.nan_to_num(), want.nan_to_num())


@pytest.mark.interp
@pytest.mark.parametrize(
    "case",
    [
        Case(3, 1, 100, (0, 15, 16, 70, 99), D=64),
        Case(14, 2, 100, (90, 31), D=256),  # more partials than the reduction takes at once
    ],
    ids=["small", "large_group"],
)
def test_any_order_of_arrival_gives_the_same_bits(poisoned, monkeypatch, case):
    monkeypatch.setattr(decode, "pick_config", lambda *_: DecodeAttentionConfig(5, num_warps=1, tiles=1))
    inputs = make_inputs(case, torch.bfloat16)
    check_against_oracle(decode.decode_attention, inputs)
    expected = run(decode.decode_attention, inputs)[0]
    for seed in range(4):
        with interpreter.shuffled(seed):
            assert torch.equal(run(decode.decode_attention, inputs)[0], expected)
    with interpreter.threaded():
        assert torch.equal(run(decode.decode_attention, inputs)[0], expected)
    monkeypatch.setattr(decode, "blocks_of", lambda *_: 2 * len(case.lengths) * case.kv_heads)
    for seed in range(2):
        with interpreter.shuffled(seed):
            assert torch.equal(run(decode.decode_attention, inputs)[0], expected)
    assert (device_module.counters(torch.device("cpu"), 16) == 0).all()


def test_steps_follow_one_another(implementation):
    """Three steps with lengths advanced in place between them: each sees the tokens that the ones before appended."""
    decode_attention, device = implementation
    inputs = clone_caches(make_inputs(Case(4, 2, 66, (63, 5)), torch.float16, device))
    lengths = inputs[5]
    for step in range(3):
        q, k, v = make_inputs(Case(4, 2, 66, (63, 5)), torch.float16, device, seed=step)[:3]
        oracle, _, _ = decode_attention_ref(q, k, v, *inputs[3:])
        assert_close(decode_attention(q, k, v, *inputs[3:]), oracle)
        lengths += 1


@pytest.mark.gpu
def test_cuda_graph_replays():
    """1,000 replays give the same bits, and a replay reads the lengths of its own time from the device."""
    case = Case(14, 2, 1024, (900, 3, 511, 64), D=128)
    inputs = make_inputs(case, torch.bfloat16, "cuda")
    lengths = inputs[5]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = ops.decode_attention(*inputs).clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = ops.decode_attention(*inputs)
        for _ in range(1000):
            out.fill_(float("nan"))
            graph.replay()
            assert torch.equal(out, expected)
        for _ in range(80):
            lengths += 1
            oracle, _, _ = decode_attention_ref(*inputs)
            graph.replay()
            assert_close(out, oracle)
    torch.cuda.synchronize()


@triton.jit
def _write_late_kernel(lengths_ptr, length):
    """Lets the next kernel start, and writes the length some 200 us later."""
    gdc_wait()
    gdc_launch_dependents()
    slept = tl.inline_asm_elementwise(
        "nanosleep.u32 200000; mov.u32 $0, $1;", "=r,r", [length], dtype=tl.int32, is_pure=False, pack=1
    )
    tl.store(lengths_ptr, slept)


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["a block a split", "cluster", "turns"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("before, after", [(3, 900), (900, 3), (500, 501), (1023, 1024)])
def test_a_length_written_while_the_kernel_starts_is_seen(monkeypatch, before, after, dtype, way):
    """Under programmatic dependent launch the kernel reads the length before the one that writes it has ended; where
    blocks take splits in turn, that moves the others' too."""
    others = (100, 1024, 0, 700, 1, 333, 64) if way == "turns" else ()
    inputs = make_inputs(Case(8, 2, 1024, (after, *others), D=128), dtype, "cuda")
    expected = run(ops.decode_attention, inputs)
    if way != "cluster":
        monkeypatch.setattr(decode, "is_cluster", lambda *_: False)
    elif dtype == torch.float32 or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("clusters are for 16 and 8 bits, on Hopper")
    else:
        facts = device_module.device_facts(torch.device("cuda", 0))
        assert decode.is_cluster(decode.pick_config(2, 4, 1024, 128, 2, facts), 2, 4, 128, 2, True, True, facts)
    if way == "turns":
        monkeypatch.setattr(decode, "blocks_of", lambda *_: 50)
    lengths = inputs[5]
    for _ in range(3):
        lengths[0] = before
        late = clone_caches(inputs)
        torch.cuda.synchronize()
        _write_late_kernel[(1,)](lengths, after, num_warps=1, launch_pdl=True)
        out = ops.decode_attention(*late)
        for got, want in zip((out, late[3], late[4]), expected, strict=True):
            assert torch.equal(got.nan_to_num(), want.nan_to_num())


@dataclass(frozen=True)
class Clustered:
    splits: int
    warps: int
    tiles: int
    D: int
    group: int
    options: tuple[str, ...] = ()


CLUSTERS = [
    Clustered(8, 4, 1, D=128, group=4, options=("lse",)),
    Clustered(8, 2, 2, D=64, group=4, options=("lse", "sinks", "window")),
    Clustered(16, 4, 2, D=64, group=3),
    Clustered(16, 4, 1, D=128, group=7, options=("norm",)),
    Clustered(16, 8, 1, D=128, group=8, options=("softcap", "lse")),
    Clustered(16, 4, 1, D=64, group=1),  # of fewer columns than threads, each of which several send
    Clustered(7, 8, 1, D=64, group=1, options=("lse",)),
    Clustered(3, 4, 2, D=128, group=1),
    Clustered(2, 1, 2, D=64, group=5),
    Clustered(5, 4, 1, D=80, group=2, options=("lse",)),
    Clustered(6, 4, 2, D=96, group=4),
    Clustered(8, 4, 1, D=256, group=2, options=("lse",)),
    Clustered(16, 2, 1, D=128, group=16),  # more than are added up at once
    Clustered(16, 2, 1, D=64, group=9, options=("sinks",)),
]


@pytest.mark.gpu
@pytest.mark.parametrize("block", CLUSTERS, ids=str)
def test_a_cluster_gives_the_bits_that_memory_gives(poisoned, monkeypatch, block):
    """Splits that meet in shared memory and in L2, and the oracle; sequences that have all splits, one, or some."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("clusters are for Hopper")
    config = DecodeAttentionConfig(block.splits, block.warps, block.tiles)
    monkeypatch.setattr(decode, "pick_config", lambda *_: config)
    step = 16 * block.tiles * block.warps
    Lmax = step * block.splits * 2
    case = Case(
        2 * block.group, 2, Lmax, (Lmax - 1, 0, step - 1, step, 2 * step + 5, Lmax, step * block.splits), block.D
    )
    inputs = make_inputs(case, torch.bfloat16, "cuda")
    arguments = {}
    if "window" in block.options:
        arguments["window"] = 3 * step + 1
    if "softcap" in block.options:
        arguments["softcap"] = 20.0
    if "sinks" in block.options:
        arguments["sinks"] = torch.randn(case.heads, device="cuda")
    if "norm" in block.options:
        arguments |= norms_of(case, torch.bfloat16, "cuda")

    def call():
        lse = torch.empty(len(case.lengths), case.heads, device="cuda") if "lse" in block.options else None
        found = run(decode.decode_attention, inputs, lse=lse, **arguments)
        return [t.nan_to_num() for t in (*found, *([] if lse is None else [lse]))]

    clusters = []
    make = decode.Launcher
    decode._launcher.cache_clear()
    monkeypatch.setattr(decode, "Launcher", lambda *a, **meta: clusters.append(meta.get("cluster")) or make(*a, **meta))
    monkeypatch.setattr(decode, "is_cluster", lambda *_: True)
    results = [call() for _ in range(20)]
    assert clusters == [block.splits]
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(20):
        torch.cuda.synchronize()
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(call())
    torch.cuda.synchronize()
    monkeypatch.setattr(decode, "is_cluster", lambda *_: False)
    expected = call()
    for result in results:
        assert all(torch.equal(got, want) for got, want in zip(result, expected, strict=True))
    check_against_oracle(decode.decode_attention, inputs, **arguments)


@pytest.mark.gpu
def test_a_capture_after_a_cluster(monkeypatch):
    """An op that has run may be captured, also where what ran was a cluster and what is captured counts arrivals."""
    monkeypatch.setattr(device_module, "_CAPTURED", {})
    monkeypatch.setattr(device_module, "_COUNTERS", {})
    on_hopper = torch.cuda.get_device_capability() == (9, 0)
    monkeypatch.setattr(decode, "is_cluster", lambda config, pairs, *_: on_hopper and pairs == 8)
    one, two = (make_inputs(Case(32, 8, 1024, lengths, 128), torch.bfloat16, "cuda") for lengths in ((9,), (1023, 70)))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        decode.decode_attention(*one)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = decode.decode_attention(*two)
        graph.replay()
    torch.cuda.synchronize()
    assert_close(out, decode_attention_ref(*two)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("Lmax, D", [(512, 64), (512, 128), (1024, 64)])
def test_what_follows_a_cluster_waits_for_it(monkeypatch, Lmax, D):
    """A chain of decode steps in a graph, each with the output of the one before as its q, by clusters and not."""
    inputs = make_inputs(Case(32, 8, Lmax, (Lmax - 1,), D=D), torch.bfloat16, "cuda")
    facts = device_module.device_facts(torch.device("cuda", 0))
    config = decode.pick_config(8, 4, Lmax, D, 2, facts)
    if not decode.is_cluster(config, 8, 4, D, 2, True, True, facts):
        pytest.skip("clusters are for Hopper")

    def chain():
        q, *rest = inputs
        for _ in range(20):
            q = decode.decode_attention(q, *rest)
        return q

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        chain()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            out = chain()
        found = []
        for _ in range(50):
            graph.replay()
            found.append(out.clone())
        monkeypatch.setattr(decode, "is_cluster", lambda *_: False)
        expected = chain()
    torch.cuda.synchronize()
    assert all(torch.equal(t, expected) for t in found)


AOT_CASES = [  # target, head size, KV heads, group, length of the cache
    *[(target, 128, 8, 4, 2048) for target in aot.TARGETS],
    *[(target, 64, 3, 3, 512) for target in ("sm_80", "sm_90", "sm_100", "gfx942")],
    *[("sm_90", D, 8, 4, Lmax) for D in (64, 128) for Lmax in (512, 32768)],
    ("sm_80", 128, 8, 4, 32768),
    ("sm_100", 128, 8, 4, 4096),
    ("sm_120", 128, 8, 4, 512),
    ("sm_86", 96, 2, 7, 4096),
    ("sm_86", 128, 1, 32, 8192),
    ("sm_90", 256, 1, 16, 4096),
]


WITH = {  # window, softcap; the optional pointers that are there
    "window_softcap_sinks_and_lse": (1024, 50.0, {"sinks_ptr": "*bf16", "lse_ptr": "*fp32"}),
    "norm": (0, 0.0, {"q_norm_ptr": "*fp32", "k_norm_ptr": "*fp32"}),
}


@pytest.mark.aot
@pytest.mark.parametrize("window, softcap, pointers", WITH.values(), ids=WITH.keys())
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_compiles_with(target, window, softcap, pointers):
    facts = aot.device_facts(target)
    config = decode.pick_config(8, 4, 2048, 128, 2, facts)
    block_b = 32 if facts.is_nvidia else 0  # as blocks_of says
    launcher = decode._launcher(
        config, block_b, False, 128, True, 64, 8, 4, 128, torch.bfloat16, window, softcap, 1e-6, facts
    )
    signature = signature_of(launcher, **NO_POINTERS | pointers)
    aot.check(aot.compile_launch(launcher, target, signature, unaligned=("B", "Lmax")))


NO_POINTERS = dict.fromkeys(("kv_scale_ptr", "lse_ptr", "sinks_ptr", "q_norm_ptr", "k_norm_ptr"))


def signature_of(launcher, **more):
    known = {"lengths_ptr": "*i32", "counter_ptr": "*i32", "B": "i32", "Lmax": "i32", "scale_log2": "fp32"} | more
    known = {name: "*fp32" for name in ("cos_ptr", "sin_ptr", "partial_ptr")} | known
    names = [name for name in launcher.kernel.arg_names if name not in launcher.meta]
    return {name: known.get(name, "i32" if name.startswith("stride_") else "*bf16") for name in names}


@pytest.mark.aot
@pytest.mark.parametrize("target, D, kv_heads, group, Lmax", AOT_CASES)
def test_compiles_for(target, D, kv_heads, group, Lmax):
    facts = aot.device_facts(target)
    config = decode.pick_config(kv_heads, group, Lmax, D, 2, facts)
    launcher = decode._launcher(
        config, 0, False, D, True, D // 2, kv_heads, group, D, torch.bfloat16, 0, 0.0, 0.0, facts
    )
    signature = signature_of(launcher, **NO_POINTERS)
    compiled = aot.compile_launch(launcher, target, signature, unaligned=("B", "Lmax"))
    aot.check(compiled, may_spill=D == 256 or group > 16)
    assert compiled.spills < 1000
    if target.startswith("sm_"):
        main, _, _ = compiled.assembly.rpartition("HMMA")  # from the wait to the last product
        main = main.rpartition("ACQBULK")[2]
        assert "LDSM" not in main and "BAR.SYNC" not in main, "no shared memory, and no warp waits for another"
        check_arrival(compiled.assembly)
        if target == "sm_90" and D <= 128:
            check_loop(compiled.assembly)
        if group <= 8 and D in (64, 128):
            end = compiled.assembly.rpartition("HMMA")[2]
            barriers = [part.count("BAR.SYNC") for part in end.partition("ATOMG")[::2]]
            assert barriers == [2, 1], "the warps meet once and before the arrival, those of the last block not again"


@pytest.mark.aot
@pytest.mark.parametrize("D, group", [(64, 4), (128, 4), (128, 16)])
@pytest.mark.parametrize("unaligned", ["k_cache_ptr", "stride_ch", "stride_qh"])
def test_compiles_for_rows_that_begin_anywhere(D, group, unaligned):
    """Triton takes shared memory to bring what it loads into order; none is declared beside it."""
    facts = aot.device_facts("sm_90")
    config = decode.pick_config(8, group, 2048, D, 2, facts)
    launcher = decode._launcher(config, 0, False, D, False, D // 2, 8, group, D, torch.bfloat16, 0, 0.0, 0.0, facts)
    signature = signature_of(launcher, **NO_POINTERS)
    compiled = aot.compile_launch(launcher, "sm_90", signature, unaligned=("B", "Lmax", unaligned))
    aot.check(compiled, vector_loads=False, may_spill=True)
    assert compiled.static_shared_memory == 0


@pytest.mark.aot
@pytest.mark.parametrize("D, Lmax", [(64, 512), (64, 2048), (64, 8192), (128, 512), (128, 2048), (128, 32768)])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120"])
def test_compiles_for_blocks_that_take_turns(target, D, Lmax):
    facts = aot.device_facts(target)
    config = decode.pick_config(8, 4, Lmax, D, 2, facts)
    launcher = decode._launcher.__wrapped__(
        config, 32, False, D, True, D // 2, 8, 4, D, torch.bfloat16, 0, 0.0, 0.0, facts
    )
    compiled = aot.compile_launch(launcher, target, signature_of(launcher, **NO_POINTERS), unaligned=("B", "Lmax"))
    aot.check(compiled)
    if target == "sm_90":
        check_room(compiled, config, 4, D, 2)
        over_splits = next(body for body in bodies(compiled.assembly) if any("BAR.SYNC" in line for line in body))
        before_meeting = "\n".join(over_splits).partition("BAR.SYNC")[0].rpartition(" BRA ")[2]
        assert before_meeting.count(" LDG.E.128") == 8 * config.tiles * D // 64, "the next split's first tile"
        check_arrival(compiled.assembly)
        launcher.meta.pop("enable_fp_fusion")
        fused = aot.compile_launch(launcher, target, signature_of(launcher, **NO_POINTERS), unaligned=("B", "Lmax"))
        ours, more = (c.assembly.count(" FFMA ") for c in (compiled, fused))
        assert ours < more, "ptxas fuses where it can, which is not in all copies of one piece of code"


@pytest.mark.aot
@pytest.mark.parametrize(
    "Lmax, block_b, pointers", [(1024, 32, {"sinks_ptr": "*bf16"}), (8192, 32, "norm"), (1024, 64, {})]
)
def test_blocks_that_take_more_registers_have_room(Lmax, block_b, pointers):
    facts = aot.device_facts("sm_90")
    config = decode.pick_config(8, 4, Lmax, 64, 2, facts)
    launcher = decode._launcher(config, block_b, False, 64, True, 32, 8, 4, 64, torch.bfloat16, 0, 0.0, 1e-6, facts)
    signature = signature_of(launcher, **NO_POINTERS | (WITH["norm"][2] if pointers == "norm" else pointers))
    compiled = aot.compile_launch(launcher, "sm_90", signature, unaligned=("B", "Lmax"))
    check_room(compiled, config, 4, 64, 2, plain=False)


@pytest.mark.aot
@pytest.mark.parametrize(
    "D, kv_heads, group, Lmax",
    [
        *[(64, 8, 4, 512), (64, 8, 4, 1024), (64, 8, 4, 2048), (128, 8, 4, 512), (128, 8, 4, 1024), (64, 3, 3, 4096)],
        *[(128, 4, 7, 2048), (128, 4, 7, 4096), (96, 8, 4, 512), (256, 4, 2, 1024), (64, 16, 1, 512), (64, 4, 16, 512)],
    ],
)
def test_clusters_send_what_is_waited_for(D, kv_heads, group, Lmax):
    """Bytes that never come would be waited for for ever: how often a thread sends depends on Triton's layouts."""
    facts = aot.device_facts("sm_90")
    config = decode.pick_config(kv_heads, group, Lmax, D, 2, facts)
    assert decode.is_cluster(config, kv_heads, group, D, 2, True, True, facts)
    launcher = decode._launcher(
        config, 0, True, D, True, D // 2, kv_heads, group, D, torch.bfloat16, 0, 0.0, 0.0, facts
    )
    signature = signature_of(launcher, **NO_POINTERS | {"lse_ptr": "*fp32", "partial_ptr": None, "counter_ptr": None})
    compiled = aot.compile_launch(launcher, "sm_90", signature, unaligned=("B", "Lmax"))
    aot.check(compiled, may_spill=D == 256)
    assert launcher.cluster == config.num_splits and launcher.sends == check_sends(compiled, config, group, D, 2)


def check_sends(compiled, config, group, D, itemsize) -> int:
    """A block of a cluster sends what the others wait for, to where they have room for it, and takes no other way. How
    often a thread sends."""
    check_room(compiled, config, group, D, itemsize)
    size, threads = config.num_splits, 32 * config.num_warps
    shape = threads, triton.next_power_of_2(group), triton.next_power_of_2(D)
    sends = len(re.findall(r"\bSTAS\b", compiled.assembly))
    assert sends == decode_parts.sends_of_split(*shape)
    assert cluster_adders(size) * decode_parts._bytes_of_split(*shape, size) == 4 * threads * sends
    words = decode._exchange(config.num_warps, group, D, itemsize) + decode_parts.words_of_splits(size, *shape)
    assert compiled.static_shared_memory == 4 * words
    assert "ATOMG" not in compiled.assembly and "MEMBAR" not in compiled.assembly
    return sends


def check_room(compiled, config, group, D, itemsize, plain=True):
    """As many blocks fit an SM as blocks_of thinks."""
    in_registers = 65536 // (-(-compiled.registers // 8) * 8 * 32 * config.num_warps)
    in_shared = 228 * 1024 // (compiled.shared_memory + compiled.static_shared_memory + 1024)
    assert decode.blocks_per_sm(config, group, D, itemsize, plain) <= min(in_registers, in_shared)


def bodies(sass: str) -> list[list[str]]:
    """The lines of each loop."""
    lines = sass.splitlines()
    return [lines[begin:end] for begin, end in aot.loops(sass)]


def check_loop(sass: str):
    """In the loop over tiles all keys and values are asked for before the first product."""
    body = next(body for body in reversed(bodies(sass)) if any("MMA." in line for line in body))
    assert max(i for i, line in enumerate(body) if " LDG.E.128" in line) < min(
        i for i, line in enumerate(body) if "MMA." in line
    )


def check_arrival(sass: str):
    """Stores of partials, a block barrier, a fence, the counter's atomic; the reads after it do not come from L1."""
    lines = sass.splitlines()
    atomic = next(i for i, line in enumerate(lines) if "ATOMG" in line)
    before = [next(i for i in range(atomic, -1, -1) if word in lines[i]) for word in ("STG", "BAR.SYNC", "MEMBAR")]
    assert before == sorted(before), "the block's stores must be fenced before its arrival"
    loads = [line for line in lines[atomic:] if " LDG." in line]
    assert loads and all("STRONG.GPU" in line for line in loads)


def test_config_has_no_batch_and_fits():
    facts = aot.device_facts("sm_90")
    assert decode.pick_config(8, 4, 2048, 128, 2, facts) == DecodeAttentionConfig(132 // 8, num_warps=4, tiles=2)
    for Lmax in (4096, 8192):
        assert decode.pick_config(8, 4, Lmax, 128, 2, facts) == DecodeAttentionConfig(132 // 8, num_warps=8, tiles=1)
        assert decode.pick_config(8, 4, 2 * Lmax, 64, 2, facts) == DecodeAttentionConfig(132 // 8, num_warps=8, tiles=2)
    assert decode.pick_config(8, 4, 32768, 64, 2, facts).num_splits == 2 * (132 // 8)
    assert decode.pick_config(3, 3, 8192, 128, 2, facts).num_splits == 32, "where heads are few, two tiles each"
    assert decode.pick_config(2, 6, 4096, 128, 2, facts) == DecodeAttentionConfig(16, num_warps=8, tiles=1)
    for Lmax in (4097, 5000, 8191):
        splits = decode.pick_config(4, 7, Lmax, 128, 2, facts).num_splits
        assert -(-Lmax // 128) <= 2 * splits, "no split of three tiles"
    assert decode.pick_config(3, 3, 100, 64, 2, facts).num_splits == 1
    assert decode.pick_config(3, 3, 300, 64, 2, facts).num_splits == 5, "no more splits than the cache has tiles"
    assert decode.pick_config(1000, 1, 4096, 64, 2, facts).num_splits == 1
    assert decode.pick_config(1, 8, 10**6, 128, 2, facts).num_splits == 64, "the last block has to add them up"


def test_clusters_where_they_find_room():
    facts = aot.device_facts("sm_90")

    def cluster(batch, Lmax, D=128, kv_heads=8, itemsize=2, aligned=True, plain=True, facts=facts):
        config = decode.pick_config(kv_heads, 4, Lmax, D, itemsize, facts)
        return decode.is_cluster(config, kv_heads * batch, 4, D, itemsize, aligned, plain, facts)

    assert cluster(1, 512) and cluster(1, 1024) and cluster(1, 512, D=64) and cluster(1, 2048, D=64)
    assert not cluster(1, 128), "one split"
    assert cluster(2, 512) and not cluster(2, 1024), "128 blocks of a small tile, and of a large one"
    assert not cluster(4, 512), "256 blocks, two on an SM: nearly all that have room"
    assert cluster(8, 512, D=64), "256 blocks, six on an SM"
    assert not cluster(8, 512, D=64, plain=False), "registers"
    assert not cluster(1, 2048) and not cluster(1, 8192, D=64), "128 blocks of a large tile"
    assert not cluster(1, 32768, D=64), "32 splits are no cluster"
    assert not cluster(1, 512, itemsize=4) and not cluster(1, 512, aligned=False), "through Triton's shared memory"
    assert cluster(1, 4096, kv_heads=4) and not cluster(1, 4096, kv_heads=4, facts=replace(facts, sm_count=114))
    wide = DecodeAttentionConfig(4, num_warps=1, tiles=1)
    assert not decode.is_cluster(wide, 1, 71, 32, 2, True, True, facts), "a thread would have several heads"
    for target in aot.TARGETS:
        assert target == "sm_90" or not cluster(1, 512, facts=aot.device_facts(target))


def test_blocks_take_turns_only_where_not_all_fit():
    facts = aot.device_facts("sm_90")

    def blocks(batch, Lmax, D=128, itemsize=2, aligned=True, plain=True):
        """(how many, splits)"""
        config = decode.pick_config(8, 4, Lmax, D, itemsize, facts)
        found = decode.blocks_of(config, 8 * batch, 4, D, itemsize, aligned, plain, facts)
        return found, 8 * batch * config.num_splits

    assert blocks(1, 32768) == (128, 128)
    assert blocks(2, 2048) == (256, 256)
    assert blocks(8, 512, D=64) == (512, 512)
    assert blocks(64, 100) == (512, 512)
    assert blocks(4, 2048) == (2 * 132, 512)
    assert blocks(16, 2048) == (2 * 132, 2048)
    assert blocks(64, 2048) == (64 * 8 * 8, 64 * 8 * 16), "two splits each, where a pair would have one block"
    assert blocks(8, 8192, itemsize=1) == (2 * 132, 1024)
    assert blocks(16, 1024, D=64) == (4 * 132, 2048)
    assert blocks(16, 1024, D=64, plain=False) == (2 * 132, 2048), "registers"
    assert blocks(8, 8192, D=64) == (132, 1024), "eight warps of two tiles"
    assert blocks(64, 2048, itemsize=4) == (8192, 8192), "its warps meet through Triton's shared memory"
    assert blocks(64, 2048, aligned=False) == (8192, 8192), "likewise"
