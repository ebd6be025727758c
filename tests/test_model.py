"""The model against transformers on checkpoints that transformers wrote, and the real SmolLM2 against its reference."""

import re
from dataclasses import replace

import pytest
import torch
from real_model import ANSWER_IDS, PROMPT_IDS, compare, logits_of, real_tokens, smollm2
from tiny_checkpoints import hf_config, random_weights, write_transformers

from tiny_gemm import checkpoint
from tiny_gemm.model import Head, KVCache, ModelConfig, Transformer, rope_frequencies
from tiny_gemm.quantize_utils import Int4Weight, dequantize, quantize

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 5e5,
}
SHAPE = dict(hidden_size=96, intermediate_size=160, num_attention_heads=6, num_key_value_heads=2, head_dim=64)
FAMILIES = {
    "llama-tied": dict(family="llama", tied=True),
    "llama-llama3-rope-sharded": dict(family="llama", rope=LLAMA3, shard_size="100KB"),
    "llama-linear-rope-biases": dict(family="llama", rope={"rope_type": "linear", "factor": 4.0}, attention_bias=True),
    "mistral": dict(family="mistral", sliding_window=None),
    "mistral-window": dict(family="mistral", sliding_window=7),
    "qwen2-window-of-the-second-layer": dict(
        family="qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen2-tied": dict(family="qwen2", tied=True),
    "qwen3": dict(family="qwen3"),
}
WINDOWED = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}
FLOAT32_ROUNDING = 2e-6  # of the largest logit


def lengths_of(*lengths: int) -> torch.Tensor:
    return torch.tensor(lengths, dtype=torch.int32)


def config_of(family: str = "llama", **changes) -> ModelConfig:
    shape = dict(hidden=96, ffn=160, heads=6, kv_heads=2, head_dim=64)
    return replace(ModelConfig.from_hf(hf_config(family, **shape)), **changes)


def weights_of(config: ModelConfig) -> dict[str, torch.Tensor]:
    weights = random_weights(
        layers=config.num_layers,
        hidden=config.hidden_size,
        ffn=config.intermediate_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab=config.vocab_size,
        tied=config.tie_word_embeddings,
        bias=config.qkv_bias,
        qk_norm=config.qk_norm,
    )
    return {name: torch.from_numpy(w) for name, w in weights.items()}


def is_linear(name: str) -> bool:
    return "_proj.weight" in name


@pytest.mark.parametrize("case", FAMILIES.values(), ids=FAMILIES.keys())
def test_gives_transformers_logits(case, tmp_path):
    """Prefill of a ragged batch and four decode steps, to float32 rounding; 16-bit weights, float32 activations."""
    transformers = pytest.importorskip("transformers")
    write_transformers(tmp_path, **(SHAPE | case))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model, _ = checkpoint.load(tmp_path, dtype=torch.float32, progress=False)
    if "shard_size" in case:
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1

    torch.manual_seed(1)
    lengths = [70, 1, 33]
    rows = [torch.randint(3, model.config.vocab_size, (n,)).tolist() for n in lengths]
    padded = torch.tensor([r + [7] * (max(lengths) - len(r)) for r in rows])
    cache = KVCache.allocate(model.config, len(rows), 80, "cpu", torch.float32)
    everywhere = model.prefill(padded, lengths_of(*lengths), cache, all_logits=True)
    last = model.prefill(padded, lengths_of(*lengths), cache)

    def expect(row: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return theirs(torch.tensor([row])).logits[0]

    def check(ours: torch.Tensor, expected: torch.Tensor) -> None:
        assert ours.dtype == torch.float32
        assert (ours - expected).abs().max() < FLOAT32_ROUNDING * expected.abs().max()

    for b, row in enumerate(rows):
        check(everywhere[b, : lengths[b]], expect(row))
        check(last[b], expect(row)[-1])
    for _ in range(4):
        tokens = last.argmax(-1)
        last = model.decode(tokens, cache)
        for b, row in enumerate(rows):
            row.append(int(tokens[b]))
            check(last[b], expect(row)[-1])
    assert cache.lengths.tolist() == [n + 4 for n in lengths]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_int4_weights_mean_their_dequantized_weights(family):
    """All weights INT4, then some: q, k, v of unlike kinds and a mixed feed-forward take the unfused way."""
    config = config_of(family)
    weights = weights_of(config)
    tokens = torch.randint(0, config.vocab_size, (1, 9))

    def logits(w: dict, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        model = Transformer(config, dict(w), dtype)
        cache = KVCache.allocate(config, 1, 16, "cpu", dtype)
        first = model.prefill(tokens, lengths_of(9), cache)
        return torch.cat((first, model.decode(tokens[:, 0], cache)))

    def pack(w: dict, which: str, **options) -> dict:
        return {n: quantize(t, 32, **options) if is_linear(n) and re.search(which, n) else t for n, t in w.items()}

    every = pack(weights, ".", symmetric=False)
    some = pack(pack(weights, "[qk]_proj|up"), "v_proj|gate|down", symmetric=False)
    for packed in (every, some):
        dense = {n: dequantize(t) if isinstance(t, Int4Weight) else t for n, t in packed.items()}
        expected = logits(dense)
        assert (logits(packed) - expected).abs().max() < 5e-6 * expected.abs().max()
        for dtype in (torch.bfloat16, torch.float16):
            assert (logits(packed, dtype) - expected).abs().mean() < 0.02 * expected.abs().max()


def test_a_decoded_row_has_the_same_bits_alone_as_in_a_batch():
    config = config_of()
    packed = {n: quantize(t, 32) if is_linear(n) else t for n, t in weights_of(config).items()}
    model = Transformer(config, packed, torch.bfloat16)
    tokens = torch.randint(0, config.vocab_size, (8, 6))
    together = KVCache.allocate(config, 8, 16, "cpu", torch.bfloat16)
    batch = [model.decode(t, together) for t in tokens.T]
    for row in range(8):
        alone = KVCache.allocate(config, 1, 16, "cpu", torch.bfloat16)
        for step, t in enumerate(tokens[row]):
            assert torch.equal(model.decode(t[None], alone)[0], batch[step][row])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("cached", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_a_cache_of_8_bits(family, cached):
    """Near the logits of a whole cache; tokens of prompts and decoded ones, alone or in a batch, are held alike."""
    config = config_of(family, sliding_window=9)
    model = Transformer(config, weights_of(config), torch.float32)
    tokens, lengths = torch.randint(0, config.vocab_size, (3, 16)), lengths_of(12, 16, 5)

    def new(batch: int, dtype: torch.dtype) -> KVCache:
        return KVCache.allocate(config, batch, 20, "cpu", dtype)

    whole, eighth = new(3, torch.float32), new(3, cached)
    assert eighth.nbytes < 0.3 * whole.nbytes
    exact, near = (model.prefill(tokens, lengths, cache, all_logits=True) for cache in (whole, eighth))
    assert 0 < (near - exact)[0, :12].norm() < 0.1 * exact[0, :12].norm()

    stepwise = new(1, cached)
    first = model.prefill(tokens[1:2, :12], lengths_of(12), stepwise, all_logits=True)
    steps = [model.decode(tokens[1:2, i], stepwise) for i in range(12, 16)]
    scale = near[1].abs().max()
    assert (torch.cat((first[0], *steps)) - near[1]).abs().max() < 2e-3 * scale, "a code may be the next one"
    for layer in range(config.num_layers):
        for a, b in ((stepwise.k[layer], eighth.k[layer]), (stepwise.v[layer], eighth.v[layer])):
            assert (a[0, :, :16].float() != b[1, :, :16].float()).float().mean() < 1e-2
        torch.testing.assert_close(stepwise.scales[layer][0, :, :16], eighth.scales[layer][1, :, :16])
    rows = eighth.rows(2)
    assert rows.batch == 2 and rows.scales[0].data_ptr() == eighth.scales[0].data_ptr()


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_the_head_keeps_float32_logits(rows):
    weight, x = torch.randn(1000, 96, dtype=torch.float16), torch.randn(rows, 96, dtype=torch.bfloat16)
    logits = Head(weight, torch.bfloat16)(x)
    expected = x.double() @ weight.double().T
    assert logits.shape == (rows, 1000) and logits.dtype == torch.float32
    assert (logits - expected).abs().max() < 1e-4


def test_an_int4_table_serves_as_embedding_and_head():
    config = config_of(num_layers=1)
    weights = weights_of(config)
    table = quantize(weights["model.embed_tokens.weight"], 32)
    tokens = torch.arange(4)[None]
    logits = []
    for embedding in (table, dequantize(table)):
        model = Transformer(config, weights | {"model.embed_tokens.weight": embedding}, torch.float32)
        logits.append(model.prefill(tokens, lengths_of(4), KVCache.allocate(config, 1, 4, "cpu", torch.float32)))
    assert torch.equal(*logits)


@pytest.mark.parametrize("head_dim", [64, 80])
def test_rope_factors_are_the_llama3_scaling_as_gguf_stores_it(head_dim):
    plain = config_of(head_dim=head_dim, rope_theta=5e5)
    scaled = replace(plain, rope_scaling=LLAMA3)
    factors = (rope_frequencies(plain) / rope_frequencies(scaled)).tolist()
    assert factors[0] == 1.0 and factors[-1] == pytest.approx(8.0) and any(1.1 < f < 7.9 for f in factors)
    by_factors = rope_frequencies(replace(plain, rope_scaling={"rope_type": "factors", "factors": factors}))
    torch.testing.assert_close(by_factors, rope_frequencies(scaled))


# ---------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"mlp_bias": True}, "mlp_bias=true"),
        ({"num_key_value_heads": 4}, "num_heads=6 must be a multiple of num_kv_heads=4"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type='yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope_scaling lacks 'low_freq_factor'"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"num_hidden_layers": 0}, "num_layers=0 must be a positive integer"),
        ({"head_dim": 72}, "head_dim=72 is not supported"),
        ({"rms_norm_eps": None}, "rms_norm_eps=None must be a finite number above 0"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5' must be a finite number above 0"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0 must be a finite number above 0"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "factor=-2 must be a finite number above 0"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        ({"max_position_embeddings": "256"}, "max_position_embeddings='256' must be a positive integer"),
        ({"model_type": "mistral", "sliding_window": "8"}, "sliding_window='8' must be a positive integer"),
        (WINDOWED | {"layer_types": ["sliding_attention"]}, "layer_types=['sliding_attention'] must name"),
        (WINDOWED | {"layer_types": ["sliding_attention", "chunked_attention"]}, "for each layer"),
        (WINDOWED | {"layer_types": 5}, "layer_types=5 must name full_attention or sliding_attention"),
        (WINDOWED | {"max_window_layers": None}, "max_window_layers=None must be an integer"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_refuses_a_config_that_it_does_not_know(change, message):
    config = hf_config("llama", hidden=96, ffn=160, heads=6, kv_heads=2, head_dim=64) | change
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelConfig.from_hf(config)


def test_reads_the_config_of_old_and_new_transformers():
    old = hf_config("qwen2", hidden=256, heads=4) | {"rope_theta": 1e6, "eos_token_id": [2, 5], "head_dim": None}
    new = {k: v for k, v in old.items() if k != "rope_theta"}
    new |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)
    config = ModelConfig.from_hf(old | {"use_sliding_window": False, "sliding_window": 64})
    assert config.sliding_window is None and config.eos_token_ids == (2, 5) and config.qkv_bias
    assert config.rope_theta == 1e6 and config.rope_scaling is None and not config.output_bias
    windowed = old | {"use_sliding_window": True, "sliding_window": 64}
    config = ModelConfig.from_hf(windowed | {"max_window_layers": 1})
    assert config.sliding_window == 64 and config.window(0) == 0 and config.window(1) == 64
    config = ModelConfig.from_hf(windowed | {"max_window_layers": -(10**9)})
    assert config.sliding_layers == (0, 1)
    config = ModelConfig.from_hf(windowed | {"layer_types": ["sliding_attention", "full_attention"]})
    assert config.window(0) == 64 and config.window(1) == 0


def test_names_the_tensor_that_does_not_fit():
    config = config_of()
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=re.escape(f"tensor {name} is missing")):
        Transformer(config, {n: w for n, w in weights_of(config).items() if n != name}, torch.float32)
    with pytest.raises(
        ValueError, match=re.escape(f"tensor {name} has shape (160, 95), the configuration says (160, 96)")
    ):
        Transformer(config, weights_of(config) | {name: torch.zeros(160, 95)}, torch.float32)
    with pytest.raises(ValueError, match="no place for 1 tensors, such as extra.weight"):
        Transformer(config, weights_of(config) | {"extra.weight": torch.zeros(1)}, torch.float32)
    with pytest.raises(ValueError, match="dtype=torch.float64"):
        Transformer(config, weights_of(config), torch.float64)


def test_the_weights_are_taken_from_the_caller():
    weights = weights_of(config := config_of())
    model = Transformer(config, weights, torch.bfloat16)
    assert not weights
    assert model.weight_bytes() > 2 * config.vocab_size * config.hidden_size


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint8, torch.float8_e5m2], ids=str)
def test_refuses_a_cache_of_another_type(dtype):
    with pytest.raises(TypeError, match=f"a KV cache of {dtype}: it must be of the model's dtype, int8 or"):
        KVCache.allocate(config_of(), 1, 16, "cpu", dtype)


def test_refuses_a_cache_that_does_not_fit():
    config = config_of("mistral")
    with pytest.raises(ValueError, match="max_length=300 must be 1 to max_position_embeddings=256"):
        KVCache.allocate(config, 1, 300, "cpu", torch.float32)
    model = Transformer(config, weights_of(config), torch.float32)
    cache = KVCache.allocate(config, 1, 8, "cpu", torch.float32)
    with pytest.raises(ValueError, match="tokens 1 x 9 do not fit a cache of 1 x 8"):
        model.prefill(torch.zeros(1, 9, dtype=torch.int64), lengths_of(9), cache)


# ----------------------------------------------------------------------------------------------------- the real model
def greedy(model: Transformer, prompt: list[int], count: int) -> list[int]:
    cache = KVCache.allocate(model.config, 1, len(prompt) + count, model.device, model.dtype)
    tokens = torch.tensor([prompt], device=model.device)
    logits = model.prefill(tokens, lengths_of(len(prompt)).to(model.device), cache)
    ids = [logits.argmax(-1)]
    for _ in range(count - 1):
        ids.append(model.decode(ids[-1], cache).argmax(-1))
    return torch.cat(ids).tolist()


def test_real_model_in_float32_writes_the_reference_ids():
    model, tokenizer = smollm2(torch.float32)
    assert tokenizer.encode("The capital of France is") == PROMPT_IDS
    assert greedy(model, PROMPT_IDS, 20) == ANSWER_IDS


def test_real_model_on_the_default_path_agrees_with_float32(record_property):
    """512 positions of prose, the last 32 of them decoded step by step."""
    exact, tokenizer = smollm2(torch.float32)
    fast, _ = smollm2(checkpoint.default_dtype("cpu", {}))
    tokens = real_tokens(tokenizer)
    assert len(tokens) == 512
    agreement = compare(logits_of(exact, tokens), logits_of(fast, tokens, decode_last=32))
    record_property("agreement", str(agreement))
    print(agreement)
    assert agreement.top1 >= 0.98 and agreement.mean_kl < 2e-3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("cached, top1, mean_kl", [(torch.int8, 0.97, 3e-3), (torch.float8_e4m3fn, 0.93, 1.5e-2)])
def test_real_model_with_a_cache_of_8_bits(cached, top1, mean_kl, device, record_property):
    """Beside the same model with a cache of its own dtype."""
    model, tokenizer = smollm2(torch.float32 if device == "cpu" else torch.bfloat16, device)
    tokens = real_tokens(tokenizer)
    agreement = compare(logits_of(model, tokens), logits_of(model, tokens, decode_last=32, cached=cached))
    record_property("agreement", str(agreement))
    print(agreement)
    assert agreement.top1 >= top1 and agreement.mean_kl < mean_kl


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_real_model_on_a_gpu(dtype, record_property):
    """Greedy ids equal float32's, and 512 positions agree with it, the last 64 of them decoded step by step."""
    exact, tokenizer = smollm2(torch.float32)
    fast, _ = smollm2(dtype, "cuda")
    assert greedy(fast, PROMPT_IDS, 20) == ANSWER_IDS
    tokens = real_tokens(tokenizer)
    agreement = compare(logits_of(exact, tokens), logits_of(fast, tokens, decode_last=64))
    record_property("agreement", str(agreement))
    print(agreement)
    assert agreement.top1 >= 0.98 and agreement.mean_kl < 2e-3


def test_an_input_order_belongs_to_an_int4_weight():
    config = config_of()
    name, order = "model.layers.0.mlp.up_proj", torch.arange(config.hidden_size, dtype=torch.int32).flip(0)
    weights = weights_of(config) | {f"{name}.input_order": order}
    with pytest.raises(ValueError, match=f"{name}.input_order belongs to an INT4 weight, but {name}.weight is"):
        Transformer(config, dict(weights), torch.float32)
    weights[f"{name}.weight"] = quantize(weights[f"{name}.weight"], 32)
    Transformer(config, dict(weights), torch.float32)
    weights[f"{name}.input_order"] = order.clamp(min=1)
    with pytest.raises(ValueError, match=f"{name}.input_order must hold each of 0 to 95 once, as int32"):
        Transformer(config, weights, torch.bfloat16)
