"""fused_attention: one set of cases for the kernel in the interpreter, the CPU implementation, and a GPU."""

from dataclasses import dataclass

import aot
import pytest
import torch
import triton
import triton.language as tl
from conftest import assert_close

from tiny_gemm import ops
from tiny_gemm.device import DeviceFacts
from tiny_gemm.reference import dropout_keep_mask, fused_attention_ref, philox_uniform
from tiny_gemm.triton_fused_transformer import attention

HALF = [torch.bfloat16, torch.float16]
IMPLEMENTATIONS = {"interpreter": (attention.fused_attention, "cpu"), "cpu": (ops.fused_attention, "cpu")}
IMPLEMENTATIONS["gpu"] = (ops.fused_attention, "cuda")


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    Lq: int
    Lk: int
    D: int = 64
    causal: bool = True
    batch: int = 1


CASES = {
    "one_token": Case(4, 4, 1, 1),
    "one_query_of_9_3": Case(9, 3, 1, 50, batch=2),
    "9_3": Case(9, 3, 7, 50, batch=2),
    "14_2_rows_without_keys": Case(14, 2, 130, 70),
    "head_80_full": Case(4, 2, 33, 45, D=80, causal=False),
    "head_96": Case(3, 1, 20, 70, D=96),
    "head_128": Case(8, 2, 40, 133, D=128),
    "head_256": Case(2, 2, 19, 37, D=256),
}
GPU_CASES = {
    f"{heads}_{kv_heads}_head_{D}": Case(heads, kv_heads, Lq, Lk, D=D, causal=causal, batch=2)
    for D, shapes in {64: 5, 80: 2, 96: 2, 128: 5, 256: 2}.items()
    for heads, kv_heads, Lq, Lk, causal in [
        (14, 2, 100, 613, True),
        (9, 3, 257, 1000, False),
        (8, 8, 1, 257, True),
        (10, 2, 129, 64, True),
        (32, 8, 777, 777, True),
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
    """(fused_attention, device), with outputs poisoned."""
    return IMPLEMENTATIONS[request.param]


def parametrize_cases(cases):
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


def make_qkv(case: Case, dtype, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(case.batch, h, n, case.D) for h, n in ((case.heads, case.Lq),) + ((case.kv_heads, case.Lk),) * 2]
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


@parametrize_cases(CASES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_matches_oracle(implementation, case, dtype):
    fused_attention, device = implementation
    q, k, v = make_qkv(case, dtype, device)
    out = fused_attention(q, k, v, causal=case.causal)
    assert out.dtype == dtype
    assert_close(out, fused_attention_ref(q, k, v, causal=case.causal))


@pytest.mark.interp
@pytest.mark.parametrize("blocks", [(64, 128), (128, 64), (16, 16)], ids=str)
def test_any_blocks_match_the_oracle(poisoned, monkeypatch, blocks):
    """Also those of chips larger than the interpreter's; keys that end within the first tile and within a later one."""
    monkeypatch.setattr(attention, "pick_config", lambda *_: attention.AttentionConfig(*blocks, 4, 1))
    for case, window in (Case(14, 2, 40, 21), 0), (Case(9, 3, 90, 300), 0), (Case(5, 1, 90, 300, D=80), 65):
        q, k, v = make_qkv(case, torch.float16)
        options = with_options(case, window, 0.0, torch.float32 if window else None, "cpu")
        assert_close(attention.fused_attention(q, k, v, **options), fused_attention_ref(q, k, v, **options))


@pytest.mark.gpu
@parametrize_cases(GPU_CASES)
def test_matches_oracle_on_gpu(poisoned, case):
    q, k, v = make_qkv(case, torch.bfloat16, "cuda")
    out = ops.fused_attention(q, k, v, causal=case.causal)
    assert_close(out, fused_attention_ref(q, k, v, causal=case.causal))


OPTION_CASES = {  # case, window, softcap, dtype of the sinks
    "window_of_tiles_14_2": (Case(14, 2, 150, 150), 75, 0.0, None),
    "window_chunked_prefill": (Case(8, 2, 19, 300, D=128), 130, 0.0, None),
    "softcap_full_head_80": (Case(4, 2, 33, 45, D=80, causal=False), 0, 5.0, None),
    "sinks_full": (Case(9, 3, 17, 70, causal=False, batch=2), 0, 0.0, torch.float16),
    "all_14_2_head_128": (Case(14, 2, 300, 330, D=128), 40, 2.0, torch.float32),
}
MORE_OPTION_CASES = {
    "window_1": (Case(4, 2, 40, 40), 1, 0.0, None),
    "window_in_a_tile": (Case(10, 2, 45, 45, batch=2), 5, 0.0, None),
    "window_of_all_keys": (Case(2, 2, 30, 50), 50, 0.0, None),
    "window_of_one_token": (Case(4, 2, 1, 500), 200, 0.0, None),
    "window_rows_without_keys": (Case(2, 2, 130, 70), 33, 0.0, torch.float32),
    "sinks_head_80": (Case(4, 2, 33, 45, D=80), 0, 0.0, torch.bfloat16),
    "all_head_80": (Case(4, 1, 270, 600, D=80, batch=2), 140, 2.0, torch.bfloat16),
}


def parametrize_options(cases):
    return pytest.mark.parametrize(("case", "window", "softcap", "sinks"), cases.values(), ids=cases.keys())


def with_options(case, window, softcap, sink_dtype, device):
    """Keyword arguments; sinks from far below to far above the scores."""
    sinks = None if sink_dtype is None else torch.linspace(-30, 8, case.heads).to(device, sink_dtype)
    return {"causal": case.causal, "window": window, "softcap": softcap, "sinks": sinks}


@parametrize_options(OPTION_CASES)
def test_window_softcap_and_sinks(implementation, case, window, softcap, sinks):
    fused_attention, device = implementation
    options = with_options(case, window, softcap, sinks, device)
    q, k, v = make_qkv(case, torch.bfloat16, device)
    q *= 2  # so that a cap bends the scores
    expected = fused_attention_ref(q, k, v, **options)
    if window:  # tiles before all windows are not read
        first = max(case.Lk - case.Lq + 1 - window, 0)
        k[:, :, : first // 64 * 64] = v[:, :, : first // 64 * 64] = float("nan")
    assert_close(fused_attention(q, k, v, **options), expected)


@pytest.mark.parametrize(
    "implementation", [pytest.param("interpreter", marks=pytest.mark.interp), "cpu"], indirect=True
)
@parametrize_options(MORE_OPTION_CASES)
def test_window_softcap_and_sinks_without_a_gpu(implementation, case, window, softcap, sinks):
    test_window_softcap_and_sinks(implementation, case, window, softcap, sinks)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_window_softcap_and_sinks_in_other_dtypes(implementation, dtype):
    fused_attention, device = implementation
    case = Case(6, 2, 21, 70)
    options = with_options(case, 19, 20.0, torch.float32, device)
    q, k, v = make_qkv(case, dtype, device)
    assert_close(fused_attention(q, k, v, **options), fused_attention_ref(q, k, v, **options))


def test_float32_is_exact(implementation):
    fused_attention, device = implementation
    q, k, v = make_qkv(Case(6, 2, 20, 33, D=80), torch.float32, device)
    assert_close(fused_attention(q, k, v, causal=True), fused_attention_ref(q, k, v, causal=True))


def test_row_without_a_visible_key_is_zero(implementation):
    fused_attention, device = implementation
    q, k, v = make_qkv(Case(4, 2, 30, 10), torch.bfloat16, device)
    out = fused_attention(q, k, v, causal=True)
    assert (out[:, :, :20] == 0).all() and (out[:, :, 20:] != 0).any(-1).all()


@pytest.mark.parametrize("scale", [0.5, -0.3, 0.0, -1e-50])  # the last is 0 in float32
def test_scale_and_large_scores(implementation, scale):
    fused_attention, device = implementation
    q, k, v = make_qkv(Case(2, 1, 17, 70), torch.float16, device)
    q = q * 30
    options = {"scale": scale, "causal": True}
    assert_close(fused_attention(q, k, v, **options), fused_attention_ref(q, k, v, **options))


def test_views_of_qkv_rows(implementation):
    """q and k as a QKV projection gives them, v as a slice of a longer cache: the same bits as contiguous tensors."""
    fused_attention, device = implementation
    case = Case(6, 2, 23, 23, batch=2)
    qkv = torch.randn(2, 23, 10, case.D, device=device, dtype=torch.bfloat16)
    q, k, v = qkv.transpose(1, 2).split([6, 2, 2], dim=1)
    cache = torch.full((2, 2, 40, case.D), float("nan"), device=device, dtype=torch.bfloat16)
    cache[:, :, :23] = v
    out = fused_attention(q, k, cache[:, :, :23], causal=True)
    assert torch.equal(out, fused_attention(q.contiguous(), k.contiguous(), v.contiguous(), causal=True))


@pytest.mark.parametrize("dropout_p", [0.1, 0.5])
def test_dropout_matches_oracle(implementation, dropout_p):
    fused_attention, device = implementation
    q, k, v = make_qkv(Case(6, 2, 21, 70, batch=2), torch.float16, device)
    arguments = {"causal": True, "dropout_p": dropout_p, "seed": 2**40 + 17}
    out = fused_attention(q, k, v, **arguments)
    assert_close(out, fused_attention_ref(q, k, v, **arguments))
    assert torch.equal(out, fused_attention(q, k, v, **arguments)), "a seed fixes the mask"
    assert not torch.equal(out, fused_attention(q, k, v, **arguments | {"seed": 18}))


def test_dropout_keeps_the_expectation(implementation):
    """With values of one, an output is the sum of the kept probabilities, scaled by 1 / (1 - p): 1 on average."""
    fused_attention, device = implementation
    q, k, v = make_qkv(Case(4, 2, 32, 64), torch.float16, device)
    out = fused_attention(q * 0, k, torch.ones_like(v), dropout_p=0.25, seed=3)[..., 0].double()
    deviation = (0.25 / 0.75 / 64) ** 0.5  # of one output: a mean of 64 numbers that are 0 or 1 / 0.75
    assert abs(out.mean() - 1) < 4 * deviation / out.numel() ** 0.5
    assert 0.7 * deviation < out.std() < 1.4 * deviation


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_dropout_drops_what_the_mask_says(implementation, causal):
    """With values of an identity matrix an output is the row of probabilities: each is 0 or its own, times 1 / (1 - p),
    and which one it is does not depend on where the kernel runs."""
    fused_attention, device = implementation
    dropout_p, seed, keys = 0.3, 2**35 + 11, 128
    q, k, v = make_qkv(Case(4, 2, 100, keys, D=128, batch=2), torch.float16, device)
    v = torch.eye(keys, device=device, dtype=v.dtype).expand_as(v)
    options = {"causal": causal, "scale": 0.1}  # scores so close that no probability rounds to 0
    out = fused_attention(q, k, v, dropout_p=dropout_p, seed=seed, **options)
    whole = fused_attention_ref(q, k, v, **options)
    keep = dropout_keep_mask(seed, dropout_p, 2, 4, 100, keys, device)
    assert torch.equal(out != 0, keep & (whole > 0))
    assert_close(out, torch.where(keep, whole / (1 - dropout_p), 0.0))
    kept = keep.double()
    for dim, what in ((0, "batches"), (1, "heads"), (2, "rows"), (3, "keys")):
        rates = kept.mean([d for d in range(4) if d != dim])
        bound = 5 * (dropout_p * (1 - dropout_p) * rates.numel() / kept.numel()) ** 0.5
        assert (rates - (1 - dropout_p)).abs().max() < bound, f"the rate differs between {what}"


def test_dropout_mask_statistics():
    keep = dropout_keep_mask(5, 0.3, 2, 4, 64, 128).double()
    assert abs(keep.mean() - 0.7) < 4 * (0.3 * 0.7 / keep.numel()) ** 0.5
    rows = keep.view(-1, 128)
    neighbours = torch.corrcoef(torch.stack([rows[:, :-1].flatten(), rows[:, 1:].flatten()]))[0, 1]
    assert abs(neighbours) < 4 / keep.numel() ** 0.5


@triton.jit
def _rand_kernel(out_ptr, offsets_ptr, seed, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.rand(seed, tl.load(offsets_ptr + i)))


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.interp), pytest.param("cuda", marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("seed", [0, 1, 2**33 + 5, 2**62 + 3, -7])
def test_philox_is_tritons(device, seed):
    offsets = torch.cat([torch.arange(512), torch.randint(2**40, (512,))]).to(device)
    out = torch.empty(1024, device=device)
    _rand_kernel[(1,)](out, offsets, seed, N=1024)
    assert torch.equal(out, philox_uniform(seed, offsets))


AOT_CASES = [
    *[(target, D, 4096, "") for D in (128, 256) for target in aot.TARGETS],
    *[(target, 64, 4096, "") for target in ("sm_80", "sm_90", "sm_100", "gfx942")],
    *[(target, 64, rows, "window softcap sinks") for target in ("sm_90", "sm_100") for rows in (4096, 8192)],
    *[(target, 64, 8192, "") for target in ("sm_90", "sm_100")],
    ("sm_80", 96, 4096, ""),
    ("sm_90", 128, 64, ""),
    ("gfx942", 128, 16, ""),
    ("sm_80", 64, 4096, "dropout"),
    *[(target, D, 4096, "dropout") for D in (128, 256) for target in aot.TARGETS],
    *[(target, 128, 4096, "window softcap sinks") for target in aot.TARGETS],
    ("sm_90", 256, 4096, "window softcap sinks"),
]


@pytest.mark.aot
@pytest.mark.parametrize("target, D, rows, options", AOT_CASES)
def test_compiles_for(target, D, rows, options):
    facts, dropout = aot.device_facts(target), "dropout" in options
    config = attention.pick_config(rows, D, 2, dropout, facts)
    window, softcap = 1024 * ("window" in options), 50.0 * ("softcap" in options)
    launcher = attention._launcher(config, True, window, softcap, dropout, 4, D, facts)
    signature = {"scale_log2": "fp32", "dropout_p": "fp32", "seed": "i32", "Lq": "i32", "Lk": "i32"}
    for name in attention._fused_attention_kernel.arg_names:
        if name.endswith("_ptr"):
            signature[name] = "*bf16"
        elif name.startswith("stride_"):
            signature[name] = "i32"
    signature["sinks_ptr"] = "*bf16" if "sinks" in options else None
    unaligned = "Lq", "Lk", "seed"
    compiled = aot.compile_launch(launcher, target, signature, unaligned=unaligned, num_stages=config.num_stages)
    spills = 32 if D == 256 and dropout else 0  # random numbers beside an output that wide: all of a thread's registers
    aot.check(compiled, may_spill=spills > 0)
    assert compiled.spills <= spills
    if target.startswith("sm_") and facts.has_pdl:
        assert compiled.assembly.index("ACQBULK") < compiled.assembly.index("LDG"), "nothing is read before the wait"


def test_config_is_pure_and_small():
    facts = DeviceFacts("small", (8, 6), 28, 99 * 1024, True)
    config = attention.pick_config(4096, 128, 2, False, facts)
    assert config == attention.pick_config(4096, 128, 2, False, facts)
    assert attention.pick_config(16, 128, 2, False, facts).block_m == 16
    assert attention.pick_config(100_000, 64, 2, False, facts).block_m == 64
    hopper = DeviceFacts("hopper", (9, 0), 132, 227 * 1024, True)
    assert [attention.pick_config(4 * n, 64, 2, False, hopper).block_m for n in (512, 2048)] == [64, 128]
