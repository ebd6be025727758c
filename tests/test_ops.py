"""Every op, on CPU and on a GPU: right by a float64 oracle, the same bits again, and at home in torch.

Each op is a Case here; what all ops must do (opcheck, torch.compile, export, CUDA graphs, determinism, the same bits
for a row alone and in a batch) is tested once for all of them. Odd shapes and options of one op are in the test file
of its kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from conftest import assert_close
from torch.utils.flop_counter import FlopCounterMode

from tiny_gemm import ops, reference
from tiny_gemm.quantize_utils import Int4Weight, dequantize, quantize

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.bfloat16, torch.float16]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def int4(n, k, group_size, symmetric, seed=0):
    return quantize(randn(n, k, seed=seed), group_size, symmetric=symmetric)


@dataclass(frozen=True)
class Case:
    """make(rows, dtype) -> (positional, keyword) arguments of `op`; the oracle takes the same. Rows are dimension 0."""

    op: Callable
    oracle: Callable
    make: Callable
    batched: tuple[int | str, ...] = (0,)  # which arguments, by position or name, have a row for each row of the batch
    mutated: tuple[int, ...] = ()


def int4_gemm_case(n, k, group_size, symmetric, with_bias=True):
    def make(rows, dtype):
        bias = randn(n, seed=2, dtype=dtype) if with_bias else None
        return (randn(rows, k, seed=1, dtype=dtype), int4(n, k, group_size, symmetric), bias), {}

    return Case(ops.int4_gemm, reference.int4_gemm_ref, make)


def ffn_case(d, h, n, gated, activation):
    def make(rows, dtype):
        # As nn.Linear.weight.t() is: transposed, not contiguous.
        weight = lambda i, o, seed: (randn(o, i, seed=seed) / i**0.5).to(dtype).t()  # noqa: E731
        gate = weight(d, h, 3) if gated else None
        biases = randn(h, seed=4, dtype=dtype), randn(n, seed=5, dtype=dtype)
        x = randn(rows, d, seed=6, dtype=dtype)
        return (x, weight(d, h, 7), biases[0], weight(h, n, 8), biases[1], gate), {"activation": activation}

    return Case(ops.fused_ffn, reference.fused_ffn_ref, make)


def int4_ffn_case(d, h, n, gated, activation, group_size, symmetric):
    def make(rows, dtype):
        gate = int4(h, d, group_size, symmetric, 3) if gated else None
        w1, w2 = int4(h, d, group_size, symmetric, 4), int4(n, h, group_size, symmetric, 5)
        x = (randn(rows, d, seed=6) / d**0.5).to(dtype)
        return (x, w1, None, w2, None, gate), {"activation": activation}

    return Case(ops.int4_ffn, reference.int4_ffn_ref, make)


def int4_gated_case(k, n, activation, group_size, symmetric):
    def make(rows, dtype):
        w, gate = (int4(n, k, group_size, symmetric, seed) for seed in (3, 4))
        return ((randn(rows, k, seed=6) / k**0.5).to(dtype), w, gate), {"activation": activation}

    return Case(ops.int4_gated_linear, reference.int4_gated_linear_ref, make)


def norm_case(op, oracle, d, with_bias, with_residual):
    def make(rows, dtype):
        x, weight = randn(rows, d, seed=1, dtype=dtype), randn(d, seed=2, dtype=dtype)
        residual = randn(rows, d, seed=3) if with_residual else None
        bias = (randn(d, seed=4, dtype=dtype),) if with_bias else ()
        return (x, weight, *bias, residual), {}

    return Case(op, oracle, make, batched=(0, 3 if with_bias else 2))


def heads_norm_case(op, oracle, with_residual):
    """Norm of each head of a transposed [rows, length, heads, d], as Qwen3 could ask for it."""

    def make(rows, dtype):
        x, residual = (randn(rows, 5, 3, 64, seed=s, dtype=dtype).transpose(1, 2) for s in (1, 2))
        return (x, randn(64, seed=3, dtype=dtype), residual if with_residual else None), {}

    return Case(op, oracle, make, batched=(0, 2))


def attention_case(heads, kv_heads, length, kv_length, d, causal):
    def make(rows, dtype):
        q = randn(rows, heads, length, d, seed=1, dtype=dtype)
        k, v = (randn(rows, kv_heads, kv_length, d, seed=s, dtype=dtype) for s in (2, 3))
        return (q, k, v), {"causal": causal}

    return Case(ops.fused_attention, reference.fused_attention_ref, make, batched=(0, 1, 2))


def decode_case(heads, kv_heads, d, max_length, cached=None, **features):
    """cached: the dtype of a cache of 8 bits."""

    def make(rows, dtype):
        row = randn(rows, heads + 2 * kv_heads, d, seed=1, dtype=dtype)
        q, k, v = row.split((heads, kv_heads, kv_heads), dim=1)
        caches = [randn(rows, kv_heads, max_length, d, seed=s, dtype=dtype) for s in (2, 3)]
        lengths = torch.tensor([(37 * r + max_length // 2) % max_length for r in range(rows)], dtype=torch.int32)
        angles = torch.outer(torch.arange(max_length), 1e4 ** -(torch.arange(d // 2) / (d // 2)))
        options = dict(features)
        if cached is not None:
            caches, scales = zip(*(ops.quantize_kv(cache, cached) for cache in caches), strict=True)
            options["kv_scale"] = torch.stack(scales, dim=-1)
        return (q, k, v, *caches, lengths, angles.cos(), angles.sin()), options

    oracle = lambda *args, **kwargs: reference.decode_attention_ref(*args, **kwargs)[0]  # noqa: E731
    return Case(ops.decode_attention, oracle, make, batched=(0, 1, 2, 3, 4, 5, "kv_scale"), mutated=(3, 4))


CASES = {
    "int4_gemm-g128": int4_gemm_case(192, 256, 128, True),
    "int4_gemm-g32-zeros": int4_gemm_case(49, 576, 32, False),
    "int4_gemm-odd-no-bias": int4_gemm_case(17, 64, 32, True, with_bias=False),
    "fused_ffn-gelu": ffn_case(96, 160, 80, False, "gelu"),
    "fused_ffn-swiglu": ffn_case(64, 96, 64, True, "silu"),
    "int4_ffn-gelu": int4_ffn_case(128, 256, 64, False, "gelu", 64, True),
    "int4_ffn-swiglu": int4_ffn_case(96, 160, 96, True, "silu", 32, False),
    "int4_gated_linear": int4_gated_case(128, 192, "silu", 64, True),
    "int4_gated_linear-zeros": int4_gated_case(96, 50, "gelu_tanh", 32, False),
    "rms_norm": norm_case(ops.rms_norm, reference.rms_norm_ref, 100, False, False),
    "rms_norm-residual": norm_case(ops.rms_norm, reference.rms_norm_ref, 576, False, True),
    "rms_norm-heads": heads_norm_case(ops.rms_norm, reference.rms_norm_ref, with_residual=False),
    "rms_norm-heads-residual": heads_norm_case(ops.rms_norm, reference.rms_norm_ref, with_residual=True),
    "layer_norm": norm_case(ops.layer_norm, reference.layer_norm_ref, 100, True, False),
    "layer_norm-residual": norm_case(ops.layer_norm, reference.layer_norm_ref, 96, True, True),
    "fused_attention": attention_case(9, 3, 37, 41, 64, True),
    "fused_attention-decode": attention_case(14, 2, 1, 100, 80, False),
    "decode_attention": decode_case(9, 3, 64, 200),
    "decode_attention-int8": decode_case(9, 3, 64, 200, torch.int8),
    "decode_attention-fp8": decode_case(4, 2, 128, 70, torch.float8_e4m3fn),
    "decode_attention-norm": decode_case(4, 2, 64, 90, q_norm=randn(64), k_norm=randn(64)),
    "decode_attention-features": decode_case(4, 2, 64, 90, window=50, softcap=4.0, sinks=torch.ones(4)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_device = pytest.mark.parametrize("device", DEVICES)


def to(value, device):
    return value.to(device) if isinstance(value, torch.Tensor | Int4Weight) else value


def arguments(case, rows, dtype, device):
    args, kwargs = case.make(rows, dtype)
    return tuple(to(a, device) for a in args), {name: to(value, device) for name, value in kwargs.items()}


def fresh(case, args):
    """The arguments with what the op writes to copied."""
    return tuple(a.clone() if i in case.mutated else a for i, a in enumerate(args))


def flat(result):
    return result if isinstance(result, tuple) else (result,)


def overload_and_parts(case, args, kwargs):
    """The torch.ops overload and its schema's arguments, caught from the Python function's own call."""
    caught = []

    class Catch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, call_args=(), call_kwargs=None):
            if func.namespace == "tiny_gemm":
                caught.append((func, call_args, call_kwargs or {}))
            return func(*call_args, **(call_kwargs or {}))

    with Catch():
        case.op(*fresh(case, args), **kwargs)
    return caught[0]


@every_device
@pytest.mark.parametrize("rows", [1, 5], ids=["row", "rows"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
@every_case
def test_matches_the_oracle(case, dtype, rows, device, poisoned):
    args, kwargs = arguments(case, rows, dtype, device)
    if device == "cuda" and dtype == torch.float32 and case.op in (ops.int4_gemm, ops.int4_ffn, ops.int4_gated_linear):
        with pytest.raises(TypeError, match="bfloat16 or float16"):
            case.op(*args, **kwargs)
        return
    expected = flat(case.oracle(*args, **kwargs))
    actual = flat(case.op(*fresh(case, args), **kwargs))
    # A fused FFN rounds its hidden activation, ATen's CPU kernel its scales, attention its probabilities: twice once.
    # Over a cache of 8 bits the GPU's probabilities and values are float16, whatever q is.
    in_half = device == "cuda" and dtype == torch.float32 and "kv_scale" in kwargs
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e, dtype=torch.float16 if in_half else None, factor=2.0)
        if a.dtype != torch.float32:
            assert a.dtype == dtype


@every_device
@every_case
def test_opcheck(case, device):
    args, kwargs = arguments(case, 2, torch.bfloat16, device)
    overload, parts, part_kwargs = overload_and_parts(case, args, kwargs)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if any(isinstance(p, torch.Tensor) and p.dtype == torch.float8_e4m3fn for p in parts):
        checks.remove("test_schema")  # it compares tensors with allclose, which knows no float8
    torch.library.opcheck(overload, parts, part_kwargs, test_utils=checks, rtol=2e-2, atol=2e-2)


@every_device
@every_case
def test_compiles_without_a_graph_break(case, device):
    args, kwargs = arguments(case, 2, torch.bfloat16, device)
    torch._dynamo.reset()
    compiled = torch.compile(case.op, fullgraph=True)
    for a, e in zip(
        flat(compiled(*fresh(case, args), **kwargs)), flat(case.op(*fresh(case, args), **kwargs)), strict=True
    ):
        assert torch.equal(a, e)


@every_device
@every_case
def test_exports(case, device):
    args, kwargs = arguments(case, 2, torch.bfloat16, device)
    overload, parts, part_kwargs = overload_and_parts(case, args, kwargs)

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            it = iter(tensors)
            return overload(*(next(it) if isinstance(p, torch.Tensor) else p for p in parts), **part_kwargs)

    tensors = tuple(p for p in parts if isinstance(p, torch.Tensor))
    clones = tuple(t.clone() for t in tensors)
    program = torch.export.export(Module(), clones)
    assert any(node.target is overload or "tiny_gemm" in str(node.target) for node in program.graph.nodes)
    actual = flat(program.module()(*(t.clone() for t in tensors)))
    expected = flat(Module()(*(t.clone() for t in tensors)))
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@every_device
@every_case
def test_same_bits_again(case, device):
    args, kwargs = arguments(case, 3, torch.bfloat16, device)
    first = flat(case.op(*fresh(case, args), **kwargs))
    for _ in range(100 if device == "cuda" else 5):
        for a, e in zip(flat(case.op(*fresh(case, args), **kwargs)), first, strict=True):
            assert torch.equal(a, e)


@every_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_case
def test_a_row_has_the_same_bits_alone_and_in_a_batch_of_8(case, dtype, device):
    products = ops.fused_ffn, ops.fused_attention, ops.int4_ffn, ops.int4_gemm, ops.int4_gated_linear
    if device == "cpu" and case.op in products:
        pytest.skip("on CPU these are MKL and oneDNN calls, which choose their blocking by the number of rows")
    args, kwargs = arguments(case, 8, dtype, device)
    together = flat(case.op(*fresh(case, args), **kwargs))
    for row in (0, 3, 7):
        alone = tuple(
            a[row : row + 1].clone() if i in case.batched and a is not None else a for i, a in enumerate(args)
        )
        options = {name: a[row : row + 1].clone() if name in case.batched else a for name, a in kwargs.items()}
        for a, e in zip(flat(case.op(*alone, **options)), together, strict=True):
            assert torch.equal(a[0], e[row]), f"row {row}"


@pytest.mark.gpu
@every_case
def test_captures_in_a_cuda_graph(case):
    args, kwargs = arguments(case, 4, torch.bfloat16, "cuda")
    expected = flat(case.op(*fresh(case, args), **kwargs))
    static = fresh(case, args)
    side = torch.cuda.Stream()  # warm-up on a side stream, then capture on another: as PyTorch's manual has it
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        case.op(*static, **kwargs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = flat(case.op(*static, **kwargs))
    for _ in range(3):
        for c in captured:
            c.fill_(float("nan"))
        for i in case.mutated:
            static[i].copy_(args[i])
        graph.replay()
        for a, e in zip(captured, expected, strict=True):
            assert torch.equal(a, e)


@every_device
@every_case
def test_no_rows_give_no_rows(case, device):
    if case.op in (ops.fused_attention, ops.decode_attention):
        pytest.skip("attention over no sequences is refused: see test_mistakes")
    args, kwargs = arguments(case, 0, torch.bfloat16, device)
    for result in flat(case.op(*args, **kwargs)):
        assert result.shape[0] == 0


def test_int4_linear_takes_either_weight():
    x, weight = randn(3, 128), randn(16, 128)
    assert torch.equal(ops.linear(x, weight), torch.nn.functional.linear(x, weight))
    assert torch.equal(ops.linear(x, quantize(weight)), ops.int4_gemm(x, quantize(weight)))


def test_writing_to_a_weight_shows():
    """The CPU implementation keeps a copy of a weight in ATen's order; it must not outlive a change."""
    weight, x = int4(16, 64, 32, True), randn(1, 64, dtype=torch.bfloat16)
    before = ops.int4_gemm(x, weight)
    weight.scales.mul_(2)
    assert_close(ops.int4_gemm(x, weight), 2 * before.double(), factor=2)


@pytest.mark.parametrize("h", [16, 33, 48, 64, 96, 128, 200])
def test_gated_int4_ffn_of_any_hidden_size_on_a_cpu(h):
    """Gate and up are one ATen call only where ATen's packed order of the two is the one order after the other."""
    up, gate = int4(h, 64, 32, False), int4(h, 64, 32, False, seed=1)
    down = quantize(randn(64, h, seed=2), -1)
    x = randn(2, 64, dtype=torch.bfloat16)
    y = ops.int4_ffn(x, up, None, down, None, gate, activation="silu")
    h_up, h_gate = (torch.nn.functional.linear(x.double(), dequantize(w).double()) for w in (up, gate))
    expected = torch.nn.functional.linear(torch.nn.functional.silu(h_gate) * h_up, dequantize(down).double())
    assert ((y.double() - expected).norm() / expected.norm()).item() < 0.02


def test_the_default_device_does_not_matter():
    weight, x = int4(16, 64, 32, True), randn(1, 64, dtype=torch.bfloat16)
    expected = ops.int4_gemm(x, int4(16, 64, 32, True))
    with torch.device("meta"):
        inside = ops.int4_gemm(x, weight)  # packs the weight for ATen
    assert torch.equal(inside, expected) and torch.equal(ops.int4_gemm(x, weight), expected)


def test_another_k_for_the_same_integers():
    """The copy in ATen's order belongs to the whole weight, not to its integers alone."""
    weight = int4(16, 64, 32, True)
    narrow = Int4Weight(weight.packed, weight.scales, None, 32, (16, 32))  # K = 32 is padded to the same unit
    for w, k in ((weight, 64), (narrow, 32), (weight, 64)):
        x = randn(1, k, dtype=torch.bfloat16)
        assert_close(ops.int4_gemm(x, w), reference.int4_gemm_ref(x, w), factor=2)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_does_not_reach_inside(device):
    args = [randn(*s).to(device) for s in ((2, 64), (64, 96), (96,), (96, 32), (32,))]
    expected = ops.fused_ffn(*args)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(ops.fused_ffn(*args), expected)


@every_device
@every_case
def test_the_short_cut_gives_the_ops_result(case, device):
    """Plain tensors skip the dispatcher; through torch.ops the same bits come out."""
    args, kwargs = arguments(case, 2, torch.bfloat16, device)
    overload, parts, part_kwargs = overload_and_parts(case, args, kwargs)
    direct, parts = fresh(case, args), tuple(p.clone() if isinstance(p, torch.Tensor) else p for p in parts)
    for a, e in zip(flat(case.op(*direct, **kwargs)), flat(overload(*parts, **part_kwargs)), strict=True):
        assert torch.equal(a, e)


def within(context):
    def call(f, x):
        with context():
            return f(x)

    return call


WATCHERS = {
    "compile": lambda f, x: torch.compile(f, backend="eager", fullgraph=True)(x),
    "trace": lambda f, x: torch.jit.trace(f, x, check_trace=False)(x),
    "vmap": lambda f, x: torch.vmap(f)(x),
    "autocast": within(lambda: torch.autocast("cpu")),
    "profiler": within(torch.profiler.profile),
    "dispatch-mode": within(lambda: FlopCounterMode(display=False)),
}


@pytest.mark.parametrize("watch", WATCHERS.values(), ids=WATCHERS.keys())
def test_nobody_who_watches_is_bypassed(watch):
    x, add_one_if_plain = randn(3, 64), lambda x: x + int(ops._is_plain(x))
    assert torch.equal(add_one_if_plain(x), x + 1)
    assert torch.equal(watch(add_one_if_plain, x), x)
    assert torch.equal(add_one_if_plain(x), x + 1)


def test_only_plain_tensors_skip_the_dispatcher():
    class Subclass(torch.Tensor):
        pass

    x = randn(3, 64)
    assert ops._is_plain(x, x, torch.nn.Parameter(x), optional=(None, x))
    for other in (x.clone().requires_grad_(), torch.nn.Parameter(x), x.long(), x.to("meta"), x.as_subclass(Subclass)):
        assert not ops._is_plain(other)
    for other in (None, x.as_subclass(Subclass), 1.0):
        assert not ops._is_plain(x, other)
    assert not ops._is_plain(x, optional=(1.0,))


def test_the_profiler_sees_the_ops_on_a_cpu():
    with torch.profiler.profile() as profile:
        ops.int4_gemm(X, W)
    assert any(event.key == "tiny_gemm::int4_gemm" for event in profile.key_averages())


def test_the_ops_by_their_founding_names():
    q, k = randn(1, 4, 3, 64), randn(1, 2, 5, 64)
    out = torch.ops.tiny_gemm.fused_attention(q, k, k, causal=True)
    assert_close(out, reference.fused_attention_ref(q, k, k, causal=True))


@every_device
def test_attention_options_in_torch(device):
    """opcheck and torch.compile with a window, soft capping and sinks; outside of them, a Parameter for sinks."""
    q, k, v = (randn(2, h, 9, 64, seed=h).to(device) for h in (4, 2, 2))
    sinks = torch.nn.Parameter(randn(4).to(device), requires_grad=False)
    options = {"causal": True, "window": 3, "softcap": 5.0, "sinks": sinks.data}
    torch.library.opcheck(torch.ops.tiny_gemm.fused_attention.default, (q, k, v), options, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
    compiled = torch.compile(ops.fused_attention, fullgraph=True)(q, k, v, **options)
    assert torch.equal(compiled, ops.fused_attention(q, k, v, **options | {"sinks": sinks, "window": np.int64(3)}))


X, W = randn(2, 128), quantize(randn(32, 128))
Q, K = randn(1, 4, 3, 64), randn(1, 2, 5, 64)
D3, KV3, CACHE = randn(2, 4, 64), randn(2, 2, 64), randn(2, 2, 16, 64)
CACHE8, SCALES = CACHE.to(torch.int8), torch.ones(2, 2, 16, 2)
LENGTHS = torch.zeros(2, dtype=torch.int32)
DECODE = D3, KV3, KV3, CACHE, CACHE.clone(), LENGTHS
MISTAKES = {
    "grad": (lambda: ops.int4_gemm(X.clone().requires_grad_(), W), ValueError, "requires grad"),
    "grad-weight": (lambda: ops.rms_norm(X, torch.nn.Parameter(randn(128))), ValueError, "weight requires grad"),
    "int-input": (lambda: ops.rms_norm(X.long(), X[0]), TypeError, "torch.int64"),
    "k": (lambda: ops.int4_gemm(X[:, :96], W), ValueError, "K=96 must be a multiple of group_size=128"),
    "packed": (lambda: ops.int4_gemm(randn(2, 256), W), ValueError, "packed of a 32 x 256 weight"),
    "bias": (lambda: ops.int4_gemm(X, W, randn(31)), ValueError, r"bias has shape \(31,\), it must be \(32,\)"),
    "bias-dtype": (lambda: ops.int4_gemm(X, W, randn(32).half()), TypeError, "one dtype"),
    "scalar": (lambda: ops.int4_gemm(torch.tensor(1.0), W), ValueError, r"it must be \[..., K\]"),
    "device": (lambda: ops.int4_gemm(X.to("meta"), W), ValueError, "one device"),
    "activation": (lambda: ops.fused_ffn(X, X.T, None, X, None, activation="tanh"), ValueError, "activation='tanh'"),
    "w2": (lambda: ops.fused_ffn(X, randn(128, 64), None, randn(63, 2), None), ValueError, "w2 has shape"),
    "gate": (lambda: ops.int4_ffn(X, W, None, W, None, quantize(randn(16, 128))), ValueError, "w_gate must have w1's"),
    "gated": (lambda: ops.int4_gated_linear(X, W, quantize(randn(16, 128))), ValueError, "w_gate must have w's shape"),
    "gated-activation": (lambda: ops.int4_gated_linear(X, W, W, activation="tanh"), ValueError, "activation='tanh'"),
    "gated-zeros": (
        lambda: ops.int4_gated_linear(X, W, quantize(randn(32, 128), symmetric=False)),
        ValueError,
        "both be symmetric",
    ),
    "residual": (lambda: ops.rms_norm(X, X[0], X[:1]), ValueError, "residual has shape"),
    "residual-dtype": (lambda: ops.rms_norm(X, X[0], X.half()), TypeError, "residual is torch.float16"),
    "heads": (
        lambda: ops.fused_attention(Q[:, :3], K, K),
        ValueError,
        "3 query heads must be a positive multiple of 2",
    ),
    "head-size": (lambda: ops.fused_attention(Q[..., :48], K[..., :48], K[..., :48]), ValueError, "head size 48"),
    "dropout": (lambda: ops.fused_attention(Q, K, K, dropout_p=1.0), ValueError, "dropout_p=1.0"),
    "attention-window": (lambda: ops.fused_attention(Q, K, K, causal=True, window=-1), ValueError, "window=-1 must be"),
    "attention-window-full": (lambda: ops.fused_attention(Q, K, K, window=4), ValueError, "window=4 needs causal=True"),
    "attention-softcap": (
        lambda: ops.fused_attention(Q, K, K, softcap=-1.0),
        ValueError,
        "softcap=-1.0 must be 0",
    ),
    "attention-softcap-nan": (
        lambda: ops.fused_attention(Q, K, K, softcap=float("nan")),
        ValueError,
        "softcap=nan must be",
    ),
    "attention-sinks": (lambda: ops.fused_attention(Q, K, K, sinks=randn(2)), ValueError, r"sinks has shape \(2,\)"),
    "attention-sinks-device": (
        lambda: ops.fused_attention(Q, K, K, sinks=randn(4).to("meta")),
        ValueError,
        "one device",
    ),
    "attention-sinks-dtype": (
        lambda: ops.fused_attention(Q, K, K, sinks=randn(4).double()),
        TypeError,
        "sinks is torch.float64",
    ),
    "batch": (lambda: ops.fused_attention(Q, K.repeat(2, 1, 1, 1), K), ValueError, "k has shape"),
    "dtypes": (lambda: ops.fused_attention(Q, K.half(), K), TypeError, "k is torch.float16"),
    "no-sequence": (lambda: ops.fused_attention(Q[:0], K[:0], K[:0]), ValueError, "batch 0"),
    "strided": (lambda: ops.fused_attention(Q.mT.contiguous().mT, K, K), ValueError, "must be contiguous"),
    "lengths": (
        lambda: ops.decode_attention(D3, KV3, KV3, CACHE, CACHE.clone(), LENGTHS.long()),
        TypeError,
        "lengths is torch.int64, it must be int32",
    ),
    "rope": (
        lambda: ops.decode_attention(D3, KV3, KV3, CACHE, CACHE.clone(), LENGTHS, randn(8, 32), randn(8, 32)),
        ValueError,
        r"\[at least 16, R / 2\]",
    ),
    "half-rope": (
        lambda: ops.decode_attention(D3, KV3, KV3, CACHE, CACHE.clone(), LENGTHS, randn(16, 32)),
        ValueError,
        "both be given",
    ),
    "packed-strided": (
        lambda: Int4Weight(W.packed.repeat(1, 2, 1, 1)[:, ::2], W.scales, None, 128, (32, 128)),
        ValueError,
        "it must be contiguous",
    ),
    "weight-dtype": (lambda: ops.rms_norm(X, torch.ones(128, dtype=torch.int64)), TypeError, "weight is torch.int64"),
    "cache-strides": (
        lambda: ops.decode_attention(D3, KV3, KV3, CACHE, CACHE.transpose(1, 2).contiguous().transpose(1, 2), LENGTHS),
        ValueError,
        "they must agree",
    ),
    "lengths-strided": (
        lambda: ops.decode_attention(D3, KV3, KV3, CACHE, CACHE.clone(), torch.zeros(4, dtype=torch.int32)[::2]),
        ValueError,
        "lengths has strides",
    ),
    "rope-strided": (
        lambda: ops.decode_attention(D3, KV3, KV3, CACHE, CACHE.clone(), LENGTHS, *[randn(32, 32)[::2]] * 2),
        ValueError,
        "rope_cos has strides",
    ),
    "window": (lambda: ops.decode_attention(*DECODE, window=-1), ValueError, "window=-1"),
    "softcap": (lambda: ops.decode_attention(*DECODE, softcap=float("nan")), ValueError, "softcap=nan"),
    "sinks": (lambda: ops.decode_attention(*DECODE, sinks=torch.ones(3)), ValueError, "sinks has shape"),
    "sinks-dtype": (
        lambda: ops.decode_attention(*DECODE, sinks=torch.ones(D3.shape[1], dtype=torch.int32)),
        TypeError,
        "sinks is torch.int32",
    ),
    "lse": (
        lambda: ops.decode_attention(*DECODE, lse=torch.empty(D3.shape[:2], dtype=torch.float64)),
        TypeError,
        "lse is torch.float64",
    ),
    "cache": (
        lambda: ops.decode_attention(D3, KV3, KV3, CACHE, CACHE[:, :, :8], LENGTHS),
        ValueError,
        "v_cache has shape",
    ),
    "cache-dtype": (
        lambda: ops.decode_attention(D3, KV3, KV3, CACHE.to(torch.uint8), CACHE.to(torch.uint8), LENGTHS),
        TypeError,
        "k_cache is torch.uint8",
    ),
    "caches-dtypes": (
        lambda: ops.decode_attention(D3, KV3, KV3, CACHE8, CACHE8.to(torch.float8_e4m3fn), LENGTHS, kv_scale=SCALES),
        TypeError,
        "v_cache is torch.float8_e4m3fn and k_cache torch.int8",
    ),
    "scales-missing": (
        lambda: ops.decode_attention(D3, KV3, KV3, CACHE8, CACHE8, LENGTHS),
        ValueError,
        "k_cache is torch.int8 and kv_scale None",
    ),
    "scales-of-16-bits": (
        lambda: ops.decode_attention(D3, KV3, KV3, CACHE, CACHE, LENGTHS, kv_scale=SCALES),
        ValueError,
        "kv_scale is for caches of int8 or float8_e4m3fn",
    ),
    "scales-shape": (
        lambda: ops.decode_attention(D3, KV3, KV3, CACHE8, CACHE8, LENGTHS, kv_scale=SCALES[..., 0]),
        ValueError,
        "kv_scale has shape",
    ),
    "scales-dtype": (
        lambda: ops.decode_attention(D3, KV3, KV3, CACHE8, CACHE8, LENGTHS, kv_scale=SCALES.half()),
        TypeError,
        "kv_scale is torch.float16",
    ),
    "scales-strides": (
        lambda: ops.decode_attention(D3, KV3, KV3, CACHE8, CACHE8, LENGTHS, kv_scale=SCALES.mT.contiguous().mT),
        ValueError,
        "kv_scale has strides",
    ),
    "cache-rows": (
        lambda: ops.decode_attention(
            D3, KV3, KV3, *[CACHE8.repeat(1, 1, 2, 1)[:, :, ::2]] * 2, LENGTHS, kv_scale=SCALES
        ),
        ValueError,
        "the third must be the head size 64",
    ),
    "one-norm": (lambda: ops.decode_attention(*DECODE, q_norm=torch.ones(64)), ValueError, "q_norm and k_norm must"),
    "norm-shape": (
        lambda: ops.decode_attention(*DECODE, q_norm=torch.ones(64), k_norm=torch.ones(32)),
        ValueError,
        "k_norm has shape",
    ),
    "norm-dtype": (
        lambda: ops.decode_attention(*DECODE, q_norm=torch.ones(64), k_norm=torch.ones(64).int()),
        TypeError,
        "k_norm is torch.int32",
    ),
    "norm-eps": (
        lambda: ops.decode_attention(*DECODE, q_norm=torch.ones(64), k_norm=torch.ones(64), norm_eps=-1.0),
        ValueError,
        "norm_eps=-1.0 must be",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_name_the_value_and_the_rule(call, error, message):
    with pytest.raises(error, match=message):
        call()


@every_device
@pytest.mark.parametrize("number", [np.float32, np.float64, torch.tensor], ids=["float32", "float64", "tensor"])
def test_numbers_of_other_libraries_are_taken(number, device):
    q, k = randn(1, 4, 3, 64).to(device), randn(1, 2, 5, 64).to(device)
    expected = ops.fused_attention(q, k, k, scale=0.125, dropout_p=0.5, seed=3)
    for _ in range(2):  # a second call launches in another way
        y = ops.fused_attention(q, k, k, scale=number(0.125), dropout_p=number(0.5), seed=np.int64(3))
        assert torch.equal(y, expected)


@every_device
def test_a_tensor_that_is_negated_lazily(device):
    x = randn(2, 128, dtype=torch.bfloat16).to(device)
    weight = quantize(randn(32, 128)).to(device)
    assert torch.equal(ops.int4_gemm(torch._neg_view(x), weight), ops.int4_gemm(-x, weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8, torch.float8_e5m2], ids=str)
def test_other_types_of_a_cache_are_refused_in_words(dtype):
    with pytest.raises(TypeError, match=f"dtype={dtype} must be int8 or float8_e4m3fn"):
        ops.quantize_kv(torch.ones(2, 64), dtype)
