"""The suite `decode`: one whole decode step, from token ids to logits, for B rows that attend to L tokens each.

Timed as a CUDA graph of the step (the device's time alone): pytorch (a plain 16-bit implementation with a static cache,
below: the kindest way to run PyTorch, whose eager step waits for the host), tiny-gemm (16-bit weights), tiny-gemm-int4.
Timed by the wall clock, over STEPS greedy tokens, at each model's first case only: transformers (dynamic cache),
transformers-static (static cache, torch.compile in mode reduce-overhead, as its manual advises; for the first model
only, because it takes most of a minute to compile), and the Generator of this project, sampling, graph and host
included: tiny-gemm-generate and tiny-gemm-int4-generate.
The oracle is the plain implementation in float32; all arms have the same weights, which INT4 holds exactly.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import STEP_BOUNDS, Absent, Arm, Case, Options, Work, left_out, needs_gpu, relative_error
from benchmarks.presets import PRESETS, group_size, model_config, random_weight
from benchmarks.timing import Machine, Read, Start
from tiny_gemm.generate import Generator, SamplingParams
from tiny_gemm.model import KVCache, ModelConfig, Transformer
from tiny_gemm.reference import rotate_half

MODELS = ("Llama-3.2-1B", "SmolLM2-135M")
BATCH_SIZES, SEQ_LENGTHS = (1, 2, 4, 8), (128, 512, 2048, 8192)
CONTEXT = 512
STEPS = 32  # tokens of one wall-clock sample


def cases(options: Options, machine: Machine) -> list[Case]:
    models = options.models or (("tiny",) if options.quick else MODELS)
    batches, lengths = options.batch_sizes or BATCH_SIZES, options.seq_lengths or SEQ_LENGTHS
    if options.quick:
        batches, lengths = options.batch_sizes or (1, 2), options.seq_lengths or (48,)
    context = lengths[0] if options.quick or (options.seq_lengths and options.mode != "seq_length") else CONTEXT
    over_batches, over_lengths = [(b, context) for b in batches], [(batches[0], n) for n in lengths]
    if options.mode is not None:
        points = over_batches if options.mode == "batch_size" else over_lengths
        return [_case(machine, model, *point, options) for model in models for point in points]
    if options.batch_sizes or options.seq_lengths:
        points = [(b, n) for b in batches for n in lengths]
        return [
            _case(machine, model, *p, options, wall=p == points[0], with_compile=p == points[0] and model == models[0])
            for model in models
            for p in points
        ]
    base = (batches[0], context)
    found = []
    for model in models:
        found.append(_case(machine, model, *base, options, wall=True, with_compile=model == models[0]))
        if model == models[0]:
            found += [_case(machine, model, *p, options) for p in over_batches + over_lengths if p != base]
    return found


def _case(machine: Machine, model: str, b: int, n: int, options: Options, wall=False, with_compile=False) -> Case:
    facts = {"B": b, "L": n, "group_size": group_size(model), "dtype": options.dtype_name}
    build = functools.partial(_build, machine, model, b, n, options.dtype, wall, with_compile)
    return Case("decode", model, f"B {b} L {n}", facts, build)


@dataclass
class Models:
    """One set of weights in every form. dense: under Hugging Face's names, 16 bit."""

    config: ModelConfig
    dense: dict[str, Tensor]
    fused: Transformer
    int4: Transformer
    plain: "PlainModel"


@functools.lru_cache(maxsize=1)
def models(machine: Machine, model: str, dtype: torch.dtype) -> Models:
    config, group = model_config(model), group_size(model)
    d, h = config.hidden_size, config.intermediate_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (q_rows, d), "self_attn.k_proj": (kv_rows, d), "self_attn.v_proj": (kv_rows, d),
        "self_attn.o_proj": (d, q_rows), "mlp.gate_proj": (h, d), "mlp.up_proj": (h, d), "mlp.down_proj": (d, h),
    }  # fmt: skip
    norms = {"input_layernorm": d, "post_attention_layernorm": d}
    if config.qk_norm:
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    new = lambda *shape: torch.randn(shape, device=machine.device)  # noqa: E731
    dense = {"model.embed_tokens.weight": (0.02 * new(config.vocab_size, d)).to(dtype)}
    dense["model.norm.weight"] = (1 + 0.1 * new(d)).to(dtype)
    if not config.tie_word_embeddings:
        dense["lm_head.weight"] = (0.02 * new(config.vocab_size, d)).to(dtype)
    packed = {}
    for layer in range(config.num_layers):
        for name, size in norms.items():
            dense[f"model.layers.{layer}.{name}.weight"] = (1 + 0.1 * new(size)).to(dtype)
        for name, shape in linears.items():
            # As GPT-2's are initialized: the residual stream keeps its size, and roundings do not add up to a bound
            # that hides mistakes.
            last = name in ("self_attn.o_proj", "mlp.down_proj")
            gain = (2 * config.num_layers) ** -0.5 if last else 1.0
            weight = random_weight(*shape, group, machine.device, gain=gain)
            packed[f"model.layers.{layer}.{name}.weight"] = weight.int4
            dense[f"model.layers.{layer}.{name}.weight"] = weight.dense(dtype)
    fused, int4 = Transformer(config, dict(dense), dtype), Transformer(config, dense | packed, dtype)
    return Models(config, dense, fused, int4, PlainModel(config, dense))


class PlainModel:
    """The model in plain PyTorch, one token a row: the peer in 16 bit, the oracle in float32."""

    def __init__(self, config: ModelConfig, weights: dict[str, Tensor]):
        self.config, self.weights = config, weights
        self.layers = [self._layer(f"model.layers.{i}.") for i in range(config.num_layers)]

    def _layer(self, name: str) -> dict[str, Tensor]:
        w = {k.removeprefix(name).removesuffix(".weight"): t for k, t in self.weights.items() if k.startswith(name)}
        w["qkv"] = torch.cat([w.pop(f"self_attn.{p}_proj") for p in "qkv"])
        w["gate_up"] = torch.cat([w.pop("mlp.gate_proj"), w.pop("mlp.up_proj")])
        return w

    def step(self, tokens: Tensor, cache: KVCache, position: int, dtype: torch.dtype) -> Tensor:
        """Logits [B, V] of tokens [B] at `position`, all in `dtype`. The cache is written to if it has that dtype."""
        c = self.config
        heads = (c.num_heads, c.num_kv_heads, c.num_kv_heads)
        norm = lambda x, w: F.rms_norm(x, x.shape[-1:], w.to(dtype), c.rms_norm_eps)  # noqa: E731
        cos, sin = cache.rope_cos[position].to(dtype), cache.rope_sin[position].to(dtype)
        x = F.embedding(tokens, self.weights["model.embed_tokens.weight"]).to(dtype)
        for w, keys, values in zip(self.layers, cache.k, cache.v, strict=True):
            qkv = F.linear(norm(x, w["input_layernorm"]), w["qkv"].to(dtype)).unflatten(-1, (-1, c.head_dim))
            q, k, v = qkv.split(heads, dim=1)
            if c.qk_norm:
                q, k = norm(q, w["self_attn.q_norm"]), norm(k, w["self_attn.k_norm"])
            keys, values = keys.to(dtype), values.to(dtype)
            keys[:, :, position], values[:, :, position] = rotate_half(k, cos, sin), v
            seen = keys[:, :, : position + 1], values[:, :, : position + 1]
            y = F.scaled_dot_product_attention(rotate_half(q, cos, sin)[:, :, None], *seen, enable_gqa=True)
            x = x + F.linear(y.flatten(1), w["self_attn.o_proj"].to(dtype))
            gate, up = F.linear(norm(x, w["post_attention_layernorm"]), w["gate_up"].to(dtype)).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, w["mlp.down_proj"].to(dtype))
        head = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return F.linear(norm(x, self.weights["model.norm.weight"]), head.to(dtype))


def _build(machine: Machine, model: str, b: int, n: int, dtype: torch.dtype, wall: bool, with_compile: bool) -> Work:
    m = models(machine, model, dtype)
    cache = KVCache.allocate(m.config, b, n, machine.device, dtype)
    for t in (*cache.k, *cache.v):
        t.normal_()
    tokens = torch.randint(m.config.vocab_size, (b,), device=machine.device)
    oracle = m.plain.step(tokens, cache, n - 1, torch.float32).double()
    dense_bytes, int4_bytes = (t.weight_bytes() + cache.nbytes for t in (m.fused, m.int4))

    def ours(transformer: Transformer) -> list[Callable]:
        def call() -> Tensor:
            cache.lengths.fill_(n - 1)
            return transformer.decode(tokens, cache)

        return [call]

    arms = [
        Arm("pytorch", lambda: [lambda: m.plain.step(tokens, cache, n - 1, dtype)], dense_bytes),
        Arm("tiny-gemm", lambda: ours(m.fused), dense_bytes),
        Arm("tiny-gemm-int4", lambda: ours(m.int4), int4_bytes),
    ]
    first = None if wall else left_out("in the first case of each model, and in no sweep of lengths or batches")
    theirs = TransformersArm(machine, model, m, cache, tokens)
    arms.append(Arm("transformers", first or theirs.calls, dense_bytes, sample=theirs.start))
    static = TransformersArm(machine, model, m, cache, tokens, static=True)
    calls = static.calls if with_compile else left_out("in the first case of the first model, and in no sweep")
    arms.append(Arm("transformers-static", calls, dense_bytes, sample=static.start))
    for impl, transformer, nbytes in (("tiny-gemm", m.fused, dense_bytes), ("tiny-gemm-int4", m.int4, int4_bytes)):
        calls, start = functools.partial(ours, transformer), functools.partial(_generate, transformer, b, n)
        arms.append(Arm(f"{impl}-generate", first or calls, nbytes, sample=start))
    return Work(arms, lambda out: relative_error(out, oracle), STEP_BOUNDS[dtype])


def _generate(transformer: Transformer, b: int, n: int) -> Start:
    """Samples of the Generator: STEPS tokens a row after a prompt of n - 1, what its own Stats say."""
    if n < 2:
        raise Absent("it needs a prompt of one token before the new one")
    generator = Generator(transformer, max_length=n + STEPS)
    prompts = torch.randint(transformer.config.vocab_size, (b, n - 1)).tolist()
    params = SamplingParams(max_new_tokens=STEPS + 1, stop_token_ids=())

    def start() -> Read:
        us = 1e6 / generator.generate(prompts, params)[0].stats.tokens_per_s
        return lambda: us

    return start


class TransformersArm:
    """transformers with the same weights and the same cached keys and values."""

    def __init__(self, machine: Machine, model: str, m: Models, cache: KVCache, tokens: Tensor, static: bool = False):
        self.machine, self.preset, self.models, self.cache, self.static = machine, PRESETS[model], m, cache, static
        self.tokens = tokens[:, None]

    def calls(self) -> list[Callable]:
        if self.static:
            needs_gpu(self.machine)
        self.forward, config = self._load()
        self.new_cache = self._caches(config)
        return [lambda: self._step(self.tokens, self.new_cache())]

    def start(self) -> Start:
        finish = torch.cuda.synchronize if self.machine.is_cuda else lambda: None

        def start() -> Read:
            cache, tokens = self.new_cache(), self.tokens
            finish()
            begin = time.perf_counter()
            for _ in range(STEPS):
                tokens = self._step(tokens, cache).argmax(-1, keepdim=True)
            finish()
            us = (time.perf_counter() - begin) * 1e6 / STEPS
            return lambda: us

        return start

    def _step(self, tokens: Tensor, cache) -> Tensor:
        return self.forward(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1]

    def _load(self):
        """(forward, configuration)"""
        try:
            import transformers
        except ImportError as e:
            raise Absent(f"transformers cannot be imported ({e})") from e
        m = self.models
        settings = {k: v for k, v in self.preset.items() if k != "model_type"}
        config = transformers.AutoConfig.for_model(self.preset["model_type"], **settings)
        with torch.device(self.machine.device):
            model = transformers.AutoModelForCausalLM.from_config(
                config, dtype=m.fused.dtype, attn_implementation="sdpa"
            )
        weights = {"lm_head.weight": m.dense["model.embed_tokens.weight"]} | m.dense
        model.load_state_dict(weights, assign=True)
        model.eval().requires_grad_(False)
        if not self.static:
            return model.forward, config
        torch._dynamo.reset()
        return torch.compile(model.forward, mode="reduce-overhead", fullgraph=True), config

    def _caches(self, config) -> Callable:
        """What gives a cache that holds the first L - 1 tokens; the static one stays where it is in memory."""
        from transformers import DynamicCache, StaticCache

        n = self.cache.max_length
        static = StaticCache(config=config, max_cache_len=n + STEPS) if self.static else None

        def new_cache():
            cache = DynamicCache(config=config) if static is None else static
            if static is not None and static.layers[0].is_initialized:
                static.reset()
            for i, (k, v) in enumerate(zip(self.cache.k, self.cache.v, strict=True)):
                cache.update(k[:, :, : n - 1], v[:, :, : n - 1], i)
            return cache

        return new_cache
