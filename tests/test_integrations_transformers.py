"""modules.py and integrations/transformers.py: layers against float64, whole models against transformers' own sdpa.

The models are small and random, and made here: nothing is downloaded.
"""

import copy
import functools
import importlib
import json
import sys

import pytest
import torch
from conftest import TOLERANCES, assert_close
from tiny_checkpoints import write_hf
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import tiny_gemm
from tiny_gemm import Int4Linear, checkpoint, dequantize, ops, quantize_model_

transformers = pytest.importorskip("transformers")
tg = pytest.importorskip("tiny_gemm.integrations.transformers")

# `cache` in transformers 5.23, but older ones know only this name
pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")

VOCABULARY = 256
CONFIGS = {
    "llama": functools.partial(transformers.LlamaConfig, num_attention_heads=2, num_key_value_heads=1),
    "qwen3": functools.partial(transformers.Qwen3Config, num_attention_heads=4, num_key_value_heads=2, head_dim=64),
}


def config_of(family: str, **options):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "max_position_embeddings": 128}
    return CONFIGS[family](vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=None, **sizes, **options)


@functools.cache
def random_model(family: str):
    """Its weights are large enough that attention is far from uniform and that greedy tokens differ."""
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config_of(family, initializer_range=0.15)).eval()


def model_of(family: str, attention: str):
    model = copy.deepcopy(random_model(family))
    model.set_attn_implementation(attention)
    return model


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def fused_calls(monkeypatch):
    """(Lq, Lk, causal) of every call of ops.fused_attention."""
    calls, original = [], ops.fused_attention

    def spy(q, k, v, *, causal, **kwargs):
        calls.append((q.shape[2], k.shape[2], causal))
        return original(q, k, v, causal=causal, **kwargs)

    monkeypatch.setattr(ops, "fused_attention", spy)
    return calls


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))


def left_padded() -> dict[str, torch.Tensor]:
    """Two prompts, of 9 and of 5 tokens."""
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    ids[1, :4] = mask[1, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def assert_same_logits(a: torch.Tensor, b: torch.Tensor) -> None:
    """float32 after two layers: sums in another order, on logits of size 1 and more."""
    assert a.isfinite().all()
    torch.testing.assert_close(a, b, rtol=10 * TOLERANCES[torch.float32], atol=10 * TOLERANCES[torch.float32])


# ---------------------------------------------------------------------------------------------------------------------
# Int4Linear, quantize_model_
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("rows", [(1,), (2, 3)], ids=["M1", "2x3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_int4_linear_is_linear_with_the_dequantized_weight(symmetric, bias, rows, dtype, poisoned):
    torch.manual_seed(0)
    linear = nn.Linear(192, 37, bias=bias).to(dtype)  # no whole tiles of either kind
    layer = Int4Linear.from_linear(linear, group_size=32, symmetric=symmetric, search=True)
    assert layer.symmetric == symmetric and not list(layer.parameters())
    x = torch.randn(*rows, 192, dtype=dtype)
    y = layer(x)
    want = x.double() @ dequantize(layer.int4_weight(), torch.float64).T
    want = want if linear.bias is None else want + linear.bias.double()
    assert y.dtype == dtype and y.shape == (*rows, 37)
    tolerance = 2 * TOLERANCES[dtype]
    torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance * want.square().mean().sqrt().item())


def test_zeros_keep_their_kind_when_they_are_loaded():
    """Integers stay integers, and real zeros are not cut to integers where a layer had some."""
    layer = Int4Linear(64, 16, bias=False, group_size=32, symmetric=False)
    for zeros in (torch.full((1, 1, 16, 2), 7, dtype=torch.int16), torch.full((1, 1, 16, 2), 7.5)) * 2:
        layer.load_state_dict(layer.state_dict() | {"zeros": zeros})
        assert layer.zeros.dtype == zeros.dtype and torch.equal(layer.zeros, zeros)
    with pytest.raises(ValueError, match="zeros hold 128; integer zeros must be from 0 to 127"):
        layer.load_state_dict(layer.state_dict() | {"zeros": torch.full((1, 1, 16, 2), 128, dtype=torch.int16)})


def test_int4_linear_state_dict_fills_a_new_layer():
    layer = Int4Linear.from_linear(nn.Linear(128, 40), group_size=64, symmetric=False)
    new = Int4Linear(128, 40, group_size=64, symmetric=False)
    x = torch.randn(3, 128)
    assert (new(x) == 0).all()
    new.load_state_dict(layer.state_dict())
    assert torch.equal(new(x), layer(x))
    assert set(new.state_dict()) == {"packed", "scales", "zeros", "bias"}


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to(memory_format=torch.channels_last),
        copy.deepcopy,
    ],
    ids=["bfloat16", "half", "double", "channels_last", "deepcopy"],
)
def test_int4_linear_conversions_leave_the_weight_alone(convert):
    layer = Int4Linear.from_linear(nn.Linear(256, 48), group_size=64, symmetric=False)
    before = dequantize(layer.int4_weight())
    converted = convert(copy.deepcopy(layer))
    assert torch.equal(dequantize(converted.int4_weight()), before)
    assert converted.scales.dtype == torch.float16 and converted.zeros.dtype == torch.float32
    bias = convert(nn.Linear(1, 48)).bias
    assert converted.bias.dtype == bias.dtype


def test_int4_linear_moves_to_meta_and_back():
    layer = Int4Linear.from_linear(nn.Linear(128, 16)).to("meta")
    assert {b.device.type for b in layer.buffers()} == {"meta"}
    assert layer(torch.empty(5, 128, device="meta")).shape == (5, 16)
    assert layer.to_empty(device="cpu").packed.device.type == "cpu"


def test_quantize_model_replaces_linears_in_place():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.GELU(), nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 32)))
    twin, x = copy.deepcopy(model), torch.randn(4, 128)
    assert quantize_model_(model, 64, skip=("2.1",), search=True) is model
    assert [type(m) for m in (model[0], model[2][0], model[2][1])] == [Int4Linear, Int4Linear, nn.Linear]
    assert torch.equal(model[0](x), Int4Linear.from_linear(twin[0], 64, search=True)(x))
    assert (model(x) - twin(x)).norm() < 0.2 * twin(x).norm()


def test_quantize_model_skips_whole_parts_of_a_path_and_subclasses():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.head2 = nn.Linear(128, 16), nn.Linear(128, 16)
            self.attention = nn.MultiheadAttention(128, 2)  # its out_proj is a subclass, read by more than forward
            self.shared = self.head2

    model = quantize_model_(Model(), skip=("head",))
    assert type(model.head) is nn.Linear and type(model.head2) is Int4Linear and model.shared is model.head2
    assert not any(isinstance(m, Int4Linear) for m in model.attention.modules())


def test_quantize_model_says_which_layer_it_cannot_take():
    model = nn.Sequential(nn.Linear(128, 64), nn.ModuleDict({"odd": nn.Linear(100, 8)}))
    with pytest.raises(ValueError, match=r"1\.odd: K=100 must be a multiple of group_size=128"):
        quantize_model_(model)
    assert type(model[0]) is nn.Linear, "nothing is replaced where something does not fit"
    model[0].weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"^0: w holds NaN"):
        quantize_model_(model, skip=("odd",))
    with pytest.raises(ValueError, match="group_size=48 must be one of"):
        quantize_model_(model, 48)
    with pytest.raises(ValueError, match="Sequential holds no nn.Linear outside skip"):
        quantize_model_(model, skip=("0", "1"))
    with pytest.raises(ValueError, match="from_linear"):
        quantize_model_(nn.Linear(128, 8))
    with pytest.raises(TypeError, match=r"skip='lm_head' must be several names"):
        quantize_model_(model, skip="lm_head")
    with pytest.raises(ValueError, match="K=100 must be a multiple of group_size=128"):
        Int4Linear.from_linear(nn.Linear(100, 8))


def test_int4_linear_is_for_inference():
    layer = Int4Linear.from_linear(nn.Linear(128, 16))
    with torch.enable_grad(), pytest.raises(ValueError, match="int4_gemm is for inference"):
        layer(torch.randn(2, 128, requires_grad=True))


def test_package_offers_the_modules():
    assert tiny_gemm.Int4Linear is Int4Linear and "quantize_model_" in tiny_gemm.__all__


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


def logits_in_steps(model, inputs: dict, cache, steps: tuple[int, ...]) -> torch.Tensor:
    """Logits of the prompt and of further tokens, fed in chunks of `steps` tokens: [B, prompt + sum(steps), V]."""
    batch, seen = inputs["input_ids"].shape
    mask = inputs.get("attention_mask")
    logits = [model(**inputs, past_key_values=cache).logits]
    further = tokens(batch, sum(steps)).to(inputs["input_ids"].device)
    for step in steps:
        ids, further = further[:, :step], further[:, step:]
        seen += step
        more = {}
        if mask is not None:
            mask = torch.cat((mask, mask.new_ones(batch, step)), dim=1)
            more = {"attention_mask": mask, "position_ids": mask.cumsum(-1)[:, -step:] - 1}
        logits.append(model(input_ids=ids, past_key_values=cache, **more).logits)
    return torch.cat(logits, dim=1)


def cache_of(kind: str, model):
    if kind == "static":
        return transformers.StaticCache(config=model.config, max_cache_len=32)
    return transformers.DynamicCache(config=model.config)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("length", [1, 7], ids=["L1", "L7"])
def test_logits_without_a_cache_are_those_of_sdpa(family, length, poisoned, fused_calls):
    ids = tokens(2, length)
    got = model_of(family, "tiny_gemm")(ids, use_cache=False).logits
    assert fused_calls == [(length, length, length > 1)] * 2
    assert_same_logits(got, model_of(family, "sdpa")(ids, use_cache=False).logits)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "left-padded"])
def test_logits_with_a_cache_are_those_of_sdpa(family, cache, padded, fused_calls):
    """Prefill, two single tokens, a chunk of three against the cache, one more token."""
    inputs = left_padded() if padded else {"input_ids": tokens(2, 9)}
    got, want = (
        logits_in_steps(model, inputs, cache_of(cache, model), (1, 1, 3, 1))
        for model in (model_of(family, "tiny_gemm"), model_of(family, "sdpa"))
    )
    real = left_padded()["attention_mask"].bool() if padded else torch.ones(2, 9, dtype=torch.bool)
    real = torch.nn.functional.pad(real, (0, 6), value=True)  # what a padding token sees is no one's concern
    assert_same_logits(got[real], want[real])
    if padded:
        assert not fused_calls
    else:  # in both layers: the prefill, and with a dynamic cache each single token
        single = {10, 11, 15} if cache == "dynamic" else set()
        assert set(fused_calls) == {(9, 9, True), *((1, n, False) for n in single)}


def test_left_padding_does_not_change_a_prompt():
    model, inputs = model_of("llama", "tiny_gemm"), left_padded()
    alone = model(inputs["input_ids"][1:, 4:]).logits
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    assert_same_logits(model(**inputs, position_ids=positions).logits[1:, 4:], alone)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "left-padded"])
def test_generate_gives_the_greedy_tokens_of_sdpa(family, cache, padded, fused_calls):
    inputs = left_padded() if padded else {"input_ids": tokens(1, 6)}
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    got = model_of(family, "tiny_gemm").generate(**inputs, **options)
    want = model_of(family, "sdpa").generate(**inputs, **options)
    assert torch.equal(got, want)
    assert len(want[0, -12:].unique()) > 3, "a model that repeats itself would hide errors"
    assert bool(fused_calls) != padded


def test_sliding_windows_are_masked(fused_calls):
    """Within the window nothing is masked, beyond it sdpa takes over."""
    config = transformers.MistralConfig(
        **(config_of("llama").to_dict() | {"model_type": "mistral", "sliding_window": 6, "initializer_range": 0.15})
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    got = {}
    for attention in ("sdpa", "tiny_gemm"):
        model.set_attn_implementation(attention)
        got[attention] = [model(tokens(1, n)).logits for n in (5, 11)]
    for a, b in zip(*got.values(), strict=True):
        assert_same_logits(b, a)
    assert set(fused_calls) == {(5, 5, True)}


def attend(**options):
    q, kv = torch.randn(1, 2, 3, 64), torch.randn(1, 1, 3, 64)
    return tg.tiny_gemm_attention(nn.Identity(), q, kv, kv, None, **options)[0]


def test_attention_that_is_not_causal():
    torch.manual_seed(0)
    q, kv = torch.randn(1, 2, 3, 64), torch.randn(1, 1, 5, 64)
    got, weights = tg.tiny_gemm_attention(nn.Identity(), q, kv, kv, None, scaling=0.3, is_causal=False)
    want = nn.functional.scaled_dot_product_attention(q, kv, kv, scale=0.3, enable_gqa=True).transpose(1, 2)
    assert weights is None and got.is_contiguous()
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 30.0},
        {"s_aux": torch.zeros(2)},
        {"position_bias": torch.zeros(1, 2, 3, 3)},
        {"dropout": 0.1},
        {"output_attentions": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_attention_refuses_what_it_does_not_compute(options):
    with pytest.raises(ValueError, match=f"does not support {next(iter(options))}; use attn_implementation='eager'"):
        attend(**options)
    assert attend(softcap=None, dropout=0.0, output_attentions=False).shape == (1, 3, 2, 64)


# ---------------------------------------------------------------------------------------------------------------------
# Quantizer
# ---------------------------------------------------------------------------------------------------------------------

QUANTIZATIONS = {
    "default": {},
    "asymmetric": {"group_size": 32, "symmetric": False, "modules_to_not_convert": ["layers.0.mlp", "k_proj"]},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for family in CONFIGS:
        random_model(family).save_pretrained(folder / family)
    return folder


def load(path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options).eval()


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_quantize_while_loading_then_save_and_load(family, quantization, dtype, checkpoints, tmp_path):
    options = QUANTIZATIONS[quantization]
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoints / family,
        dtype=dtype,
        quantization_config=tg.TinyGemmConfig(**options),
        output_loading_info=True,
    )
    assert not any(loading.values()), loading
    skip = ["lm_head", *options.get("modules_to_not_convert", [])]
    twin = copy.deepcopy(random_model(family)).to(dtype)
    quantize_model_(twin, options.get("group_size", 128), skip, symmetric=options.get("symmetric", True))
    state, twin_state = model.state_dict(), twin.state_dict()
    assert state.keys() == twin_state.keys() and not any(t.is_meta for t in state.values())
    for name, t in state.items():
        assert t.dtype == twin_state[name].dtype and torch.equal(t, twin_state[name]), name
    assert type(model.lm_head) is nn.Linear and type(model.model.layers[1].mlp.up_proj) is Int4Linear

    x = tokens(2, 5)
    want = model(x).logits
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "tiny_gemm" and saved["group_size"] == options.get("group_size", 128)
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not any(loading.values()), loading
    assert torch.equal(again(x).logits, want)
    assert all(t.dtype == state[name].dtype and torch.equal(t, state[name]) for name, t in again.state_dict().items())
    assert again.hf_quantizer.is_compileable and again.is_quantized


def test_a_saved_model_keeps_its_scales_in_another_dtype(checkpoints, tmp_path):
    config = tg.TinyGemmConfig(group_size=64, symmetric=False)
    model = load(checkpoints / "llama", dtype=torch.float32, quantization_config=config)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, dtype=torch.bfloat16)
    a, b = (m.model.layers[0].self_attn.q_proj.int4_weight() for m in (model, again))
    assert again.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(dequantize(a), dequantize(b))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_tied_weights_and_biases(bias, tmp_path):
    config = config_of("llama", tie_word_embeddings=True, attention_bias=bias, mlp_bias=bias)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    model.save_pretrained(tmp_path / "plain")
    # A list of modules does not undo what always stays.
    config = tg.TinyGemmConfig(modules_to_not_convert=["mlp"])
    model = load(tmp_path / "plain", quantization_config=config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model.model.layers[1].self_attn.o_proj.bias is not None) == bias
    model.save_pretrained(tmp_path / "quantized")
    again, x = load(tmp_path / "quantized"), tokens(1, 4)
    assert torch.equal(again(x).logits, model(x).logits)
    twin = quantize_model_(load(tmp_path / "plain"), skip=("lm_head", "mlp"))
    assert torch.equal(twin(x).logits, model(x).logits)


def test_generate_with_both(checkpoints):
    """The attention and the quantizer together, against the same weights under sdpa."""
    options = {"dtype": torch.float32, "quantization_config": tg.TinyGemmConfig()}
    got, want = (
        load(checkpoints / "qwen3", attn_implementation=attention, **options).generate(
            **left_padded(), max_new_tokens=8, do_sample=False
        )
        for attention in ("tiny_gemm", "sdpa")
    )
    assert torch.equal(got, want)


def test_quantizer_errors(tmp_path):
    with pytest.raises(ValueError, match="group_size=100 must be one of"):
        tg.TinyGemmConfig(group_size=100)
    with pytest.raises(ValueError, match="format_version '1', this reads"):
        tg.TinyGemmConfig.from_dict({"format_version": "1"})
    config = config_of("llama")
    config.intermediate_size = 96
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    match = r"model\.layers\.0\.mlp\.down_proj: K=96 must be a multiple of group_size=128"
    with pytest.raises(ValueError, match=match):
        load(tmp_path, quantization_config=tg.TinyGemmConfig())
    skipped = load(tmp_path, quantization_config=tg.TinyGemmConfig(modules_to_not_convert=["down_proj"]))
    assert type(skipped.model.layers[0].mlp.up_proj) is Int4Linear


def test_a_plain_dict_configures_too(tmp_path):
    write_hf(tmp_path)
    model = load(tmp_path, quantization_config={"quant_method": "tiny_gemm", "group_size": 32})
    assert type(model.model.layers[0].mlp.up_proj) is Int4Linear


def test_the_other_kind_of_directory_is_refused_in_words(tmp_path):
    """tiny-gemm quantize and save_pretrained write the same weights under other names."""
    write_hf(tmp_path / "plain")
    checkpoint.convert(tmp_path / "plain", tmp_path / "packed", group_size=32)
    with pytest.raises(ValueError, match="`tiny-gemm quantize` wrote is read by tiny_gemm.checkpoint.load"):
        load(tmp_path / "packed")
    load(tmp_path / "plain", quantization_config=tg.TinyGemmConfig(group_size=32)).save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="were saved by transformers"):
        checkpoint.load(tmp_path / "saved")


def test_without_transformers_the_import_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "tiny_gemm.integrations.transformers")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers 5 or newer: pip install 'tiny-gemm\[hf\]'"):
        importlib.import_module("tiny_gemm.integrations.transformers")


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile
# ---------------------------------------------------------------------------------------------------------------------


def compiled(function):
    """fullgraph=True raises where the graph breaks; the counter says how many graphs there are."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter), counter


def ops_in(counter) -> list:
    return [node.target for graph in counter.graphs for node in graph.graph.nodes if node.op == "call_function"]


def test_a_quantized_model_compiles_to_one_graph():
    model = quantize_model_(model_of("qwen3", "tiny_gemm"), group_size=64, symmetric=False)
    ids = tokens(2, 7)
    want = model(ids).logits
    run, counter = compiled(lambda ids: model(ids).logits)
    assert_same_logits(run(ids), want)
    assert counter.frame_count == 1
    assert ops_in(counter).count(torch.ops.tiny_gemm.int4_gemm) == 14  # 7 in each of 2 layers
    # transformers 5.17 always builds a mask in a traced graph
    assert ops_in(counter).count(torch.ops.tiny_gemm.fused_attention) in (0, 2)


def test_attention_without_a_mask_compiles_to_the_op():
    q, k, v = torch.randn(1, 2, 3, 64), torch.randn(1, 1, 3, 64), torch.randn(1, 1, 3, 64)
    run, counter = compiled(lambda *qkv: tg.tiny_gemm_attention(None, *qkv, None, scaling=0.2)[0])
    torch.testing.assert_close(run(q, k, v), tg.tiny_gemm_attention(None, q, k, v, None, scaling=0.2)[0])
    assert counter.frame_count == 1 and torch.ops.tiny_gemm.fused_attention in ops_in(counter)


def test_decode_against_a_static_cache_compiles_to_one_graph():
    model = quantize_model_(model_of("llama", "tiny_gemm"))
    caches = [cache_of("static", model) for _ in range(2)]
    for cache in caches:
        model(tokens(1, 6), past_key_values=cache)
    run, counter = compiled(lambda ids, cache: model(ids, past_key_values=cache).logits)
    for ids in tokens(1, 3).split(1, dim=1):
        assert_same_logits(run(ids, caches[0]), model(ids, past_key_values=caches[1]).logits)
    assert counter.frame_count == 1


def test_generate_compiles_the_decode_step(checkpoints):
    """generate() asks the quantizer (is_compileable) and compiles by itself; on a CPU only when told to."""
    options = {"dtype": torch.float32, "attn_implementation": "tiny_gemm"}
    model = load(checkpoints / "llama", quantization_config=tg.TinyGemmConfig(), **options)
    inputs = {"input_ids": tokens(1, 6), "max_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    want = model.generate(**inputs, disable_compile=True)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    # A backend of one's own is also given a mode.
    config = transformers.CompileConfig(fullgraph=True, backend=lambda graph, inputs, mode: counter(graph, inputs))
    config._compile_all_devices = True
    assert torch.equal(model.generate(**inputs, compile_config=config), want)
    assert counter.frame_count == 1


# ---------------------------------------------------------------------------------------------------------------------
# On a GPU, in bfloat16. The yardstick is float32 on the GPU; what sdpa in bfloat16 is off by, ours may be, and as much.
# ---------------------------------------------------------------------------------------------------------------------

LOGIT_ERROR = 0.02  # of the logits' norm: bfloat16 through two layers; a wrong mask, head or column gives 0.3 and more


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.float() - want).norm() / want.norm()).item()


def dequantized(model, device: str):
    """The same model in float32 with every Int4Linear as the nn.Linear that it stands for, under sdpa."""
    twin = copy.deepcopy(model)
    for name, layer in list(twin.named_modules()):
        if isinstance(layer, Int4Linear):
            linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            linear.weight.data = dequantize(layer.int4_weight())
            if layer.bias is not None:
                linear.bias.data = layer.bias
            twin.set_submodule(name, linear)
    twin.set_attn_implementation("sdpa")
    return twin.to(device, torch.float32)


def assert_greedy(reference, prompt: torch.Tensor, sequence: torch.Tensor) -> None:
    """Each generated token is the likeliest to `reference`, or as likely but for rounding."""
    logits = reference(sequence).logits[:, prompt.shape[1] - 1 : -1]
    chosen = logits.gather(-1, sequence[:, prompt.shape[1] :, None])[..., 0]
    assert (logits.amax(-1) - chosen).max() < 5 * LOGIT_ERROR * logits.std()
    assert len(sequence[0, prompt.shape[1] :].unique()) > 3, "a model that repeats itself would hide errors"


@pytest.mark.gpu
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_int4_linear_on_a_gpu(symmetric, poisoned):
    torch.manual_seed(0)
    original = Int4Linear.from_linear(nn.Linear(192, 37), group_size=32, symmetric=symmetric)
    weight, bias = dequantize(original.int4_weight(), torch.float64), original.bias
    for dtype in (torch.bfloat16, torch.float16):
        layer = copy.deepcopy(original).to("cuda", dtype)
        assert layer.scales.dtype == torch.float16 and {b.device.type for b in layer.buffers()} == {"cuda"}
        for rows in ((1,), (2, 3), (40,)):
            x = torch.randn(*rows, 192, dtype=dtype)
            want = x.double() @ weight.T + bias.to(dtype).double()
            assert_close(layer(x.cuda()), want)


@pytest.mark.gpu
@pytest.mark.parametrize("family", CONFIGS)
def test_attention_on_a_gpu(family, poisoned, fused_calls):
    """Prefill and single tokens through the op, a chunk against the cache through sdpa."""
    inputs = {"input_ids": tokens(2, 19).cuda()}
    models = {name: model_of(family, name).to("cuda", torch.bfloat16) for name in ("tiny_gemm", "sdpa")}
    models["float32"] = copy.deepcopy(models["sdpa"]).float()  # the same weights
    logits = {n: logits_in_steps(m, inputs, cache_of("dynamic", m), (1, 1, 3, 1)) for n, m in models.items()}
    assert set(fused_calls) == {(19, 19, True), *((1, n, False) for n in (20, 21, 25))}
    error, peer = (relative_error(logits[name], logits["float32"]) for name in ("tiny_gemm", "sdpa"))
    assert error < LOGIT_ERROR and error < 2 * peer + 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_quantizer_on_a_gpu(quantization, checkpoints, tmp_path):
    """Quantize while loading onto the GPU, generate, save, load: the same bits."""
    options = {"dtype": torch.bfloat16, "device_map": "cuda", "attn_implementation": "tiny_gemm"}
    config = tg.TinyGemmConfig(**QUANTIZATIONS[quantization])
    model = load(checkpoints / "qwen3", quantization_config=config, **options)
    state = model.state_dict()
    assert {t.device.type for t in state.values()} == {"cuda"}
    prompt = tokens(2, 6).cuda()
    generated = model.generate(prompt, max_new_tokens=12, do_sample=False)
    assert_greedy(dequantized(model, "cuda"), prompt, generated)

    model.save_pretrained(tmp_path)
    again = load(tmp_path, **options)
    assert again.state_dict().keys() == state.keys()
    for name, t in again.state_dict().items():
        assert t.dtype == state[name].dtype and torch.equal(t, state[name]), name
    assert torch.equal(again(prompt).logits, model(prompt).logits)


@pytest.mark.gpu
def test_generate_compiles_the_decode_step_into_a_cuda_graph(checkpoints):
    """One graph without a break, and inductor finds nothing in it that a CUDA graph could not hold."""
    options = {"dtype": torch.bfloat16, "device_map": "cuda", "attn_implementation": "tiny_gemm"}
    model = load(checkpoints / "llama", quantization_config=tg.TinyGemmConfig(), **options)
    reference, prompt = dequantized(model, "cuda"), tokens(1, 6).cuda()
    torch._dynamo.reset()
    counters.clear()
    config = transformers.CompileConfig(fullgraph=True, mode="reduce-overhead")
    generated = model.generate(
        prompt, max_new_tokens=12, do_sample=False, cache_implementation="static", compile_config=config
    )
    assert_greedy(reference, prompt, generated)
    assert counters["stats"]["unique_graphs"] >= 1 and not counters["graph_break"]
    assert counters["inductor"]["cudagraph_skips"] == 0
