"""The Llama family on Tiny-GEMM's ops: ModelConfig, KVCache, Transformer.

One step, for Llama 2/3.x, Mistral, Qwen2.5, Qwen3 and SmolLM2 alike, where x is the residual stream, in float32:

    x = embedding[token]
    every layer:  q, k, v = norm(x) @ wqkv (+ bias); Qwen3: norm of each head of q and k
                  x = x + out(attention(rope(q), rope(k), v))
                  x = x + down(silu(gate(norm(x))) * up(norm(x)))
    logits = head(norm(x)), float32

A linear weight is an Int4Weight or a 16-bit tensor, each as the checkpoint has it. Names are Hugging Face's. Beside an
Int4Weight may stand an input order: its columns then are in another order than the layer's inputs, and column i meets
input order[i]. GPTQ's desc_act and compressed-tensors' actorder need it, whose groups are scattered over K.
"""

import math
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tiny_gemm import ops
from tiny_gemm.quantize_utils import Int4Weight, concat, dequantize

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class ModelConfig:
    """What a checkpoint says about its shape. rope_scaling is Hugging Face's dict (rope_type linear or llama3) or
    {"rope_type": "factors", "factors": (...)}: one divisor for each frequency, which is how GGUF stores llama3."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Mapping | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False
    sliding_window: int | None = None  # how many tokens a query sees, itself included
    sliding_layers: tuple[int, ...] | None = None  # those that have the window; None: all
    activation: str = "silu"
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"architecture {self.architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}"
            )
        if self.activation not in ("silu", "swish"):
            raise ValueError(f"hidden_act={self.activation!r} is not supported; the gated feed-forward needs 'silu'")
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
            "sliding_window",
        ):
            value = getattr(self, name)
            if (type(value) is not int or value < 1) and not (name == "sliding_window" and value is None):
                raise ValueError(f"{name}={value!r} must be a positive integer")
        factors = {k: v for k, v in (self.rope_scaling or {}).items() if k.endswith("factor")}
        for name, value in {"rms_norm_eps": self.rms_norm_eps, "rope_theta": self.rope_theta, **factors}.items():
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise ValueError(f"{name}={value!r} must be a finite number above 0")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim not in ops.HEAD_SIZES:
            raise ValueError(f"head_dim={self.head_dim} is not supported; supported: {ops.HEAD_SIZES}")
        rope_frequencies(self)  # refuses a rope_scaling that it does not know

    def check_cache_length(self, max_length: int) -> None:
        """ValueError unless this model can use a KV cache of max_length positions."""
        if not 1 <= max_length <= self.max_position_embeddings:
            raise ValueError(
                f"max_length={max_length} must be 1 to max_position_embeddings={self.max_position_embeddings}"
            )

    def window(self, layer: int) -> int:
        """How many tokens a query of this layer sees, itself included; 0: all."""
        return (self.sliding_window or 0) if self.sliding_layers is None or layer in self.sliding_layers else 0

    @classmethod
    def from_hf(cls, config: Mapping) -> "ModelConfig":
        """Reads a Hugging Face config.json, of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters)."""
        kind = config.get("model_type")
        if kind not in ARCHITECTURES:
            raise ValueError(f"model_type {kind!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
        if missing := [k for k in _REQUIRED_KEYS if config.get(k) is None]:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        if config.get("mlp_bias"):
            raise ValueError("mlp_bias=true is not supported; gate_proj, up_proj and down_proj must have no bias")
        rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type", "default")
        if nested := [k for k, v in rope.items() if isinstance(v, Mapping)]:
            raise ValueError(
                f"rope_parameters of each layer type ({', '.join(nested)}) are not supported, only one set"
            )
        theta = rope.pop("rope_theta", None)
        theta = config.get("rope_theta") if theta is None else theta
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(f"partial_rotary_factor={rope['partial_rotary_factor']} is not supported, only 1.0")
        wants_window = kind == "mistral" or (kind.startswith("qwen") and config.get("use_sliding_window"))
        window = config.get("sliding_window", 4096) if wants_window else None  # as transformers' classes default
        sliding = _sliding_layers(config) if window else None
        bias = kind == "qwen2" or bool(config.get("attention_bias"))
        eos = config.get("eos_token_id")
        return cls(
            architecture=kind,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
            max_position_embeddings=config.get("max_position_embeddings") or 2048,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=10000.0 if theta is None else theta,
            rope_scaling=None if rope["rope_type"] == "default" else rope,
            qkv_bias=bias,
            output_bias=bias and kind != "qwen2",
            qk_norm=kind == "qwen3",
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            sliding_window=window,
            sliding_layers=sliding,
            activation=config.get("hidden_act", "silu"),
            eos_token_ids=() if eos is None else (eos,) if isinstance(eos, int) else tuple(eos),
            bos_token_id=config.get("bos_token_id"),
        )


def _sliding_layers(config: Mapping) -> tuple[int, ...] | None:
    """Which layers have the window, of a Hugging Face config.json that has one; None: all."""
    count, types = config["num_hidden_layers"], config.get("layer_types")
    if types is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != count or any(t not in known for t in types):
            raise ValueError(f"layer_types={types!r} must name full_attention or sliding_attention for each layer")
        return tuple(i for i, t in enumerate(types) if t == "sliding_attention")
    if config["model_type"] == "mistral":
        return None
    first = config.get("max_window_layers", 28)
    if type(first) is not int:
        raise ValueError(f"max_window_layers={first!r} must be an integer")
    return tuple(range(max(first, 0), count))


_REQUIRED_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Radians a position for each rotated pair, float32 [head_dim / 2], scaled as config.rope_scaling says."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    freqs = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return freqs
    try:
        match scaling.get("rope_type", scaling.get("type")):
            case "default":
                return freqs
            case "linear":
                return freqs / scaling["factor"]
            case "factors":
                return freqs / torch.tensor(scaling["factors"], dtype=torch.float32).expand_as(freqs)
            case "llama3":  # long wavelengths are stretched, short ones kept, those between interpolated
                low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
                turns = scaling["original_max_position_embeddings"] * freqs / (2 * math.pi)
                keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
                return (1 - keep) * freqs / scaling["factor"] + keep * freqs
            case other:
                raise ValueError(f"rope_type={other!r} is not supported; supported: default, linear, llama3, factors")
    except KeyError as e:
        raise ValueError(f"rope_scaling lacks {e}, which its rope_type needs: {dict(scaling)}") from e


KV_CACHES = {"auto": None, "int8": torch.int8, "fp8": torch.float8_e4m3fn}  # None: the model's own dtype


@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, [B, Hkv, max_length, D] each; lengths int32 [B] says on the device how many
    positions of a row are filled. rope_cos, rope_sin: float32 [max_length, D / 2]. scales: None, or of keys and values
    in 8 bits what decode_attention calls kv_scale, of every layer."""

    k: list[Tensor]
    v: list[Tensor]
    lengths: Tensor
    rope_cos: Tensor
    rope_sin: Tensor
    scales: list[Tensor] | None = None

    @classmethod
    def allocate(cls, config: ModelConfig, batch: int, max_length: int, device, dtype: torch.dtype) -> "KVCache":
        """A cache for `batch` rows of up to `max_length` tokens each, prompt and answer together. dtype: the model's,
        int8 or float8_e4m3fn."""
        if batch < 1:
            raise ValueError(f"batch={batch} must be positive")
        if dtype not in ops.CACHE_DTYPES:
            raise TypeError(f"a KV cache of {dtype}: it must be of the model's dtype, int8 or float8_e4m3fn")
        config.check_cache_length(max_length)
        shape = (batch, config.num_kv_heads, max_length)

        def new(dtype: torch.dtype, last: int) -> list[Tensor]:
            return [torch.zeros(*shape, last, device=device, dtype=dtype) for _ in range(config.num_layers)]

        angles = torch.outer(torch.arange(max_length, dtype=torch.float32), rope_frequencies(config))
        lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        scales = new(torch.float32, 2) if dtype.itemsize == 1 else None
        rope = angles.cos().to(device), angles.sin().to(device)
        return cls(new(dtype, config.head_dim), new(dtype, config.head_dim), lengths, *rope, scales)

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    @property
    def max_length(self) -> int:
        return self.rope_cos.shape[0]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.k, *self.v, *(self.scales or ())))

    def rows(self, batch: int) -> "KVCache":
        """A view of the first `batch` rows."""
        k, v = [t[:batch] for t in self.k], [t[:batch] for t in self.v]
        scales = None if self.scales is None else [t[:batch] for t in self.scales]
        return KVCache(k, v, self.lengths[:batch], self.rope_cos, self.rope_sin, scales)

    def fill(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Takes the keys and values of prompts, [B, Hkv, L, D], from position 0 on; returns them as it holds them, in
        v's dtype, so that prefill attends to what decode will see."""
        held = []
        for i, (new, cached) in enumerate(((k, self.k[layer]), (v, self.v[layer]))):
            part = cached[:, :, : new.shape[2]]
            if self.scales is None:
                new = new.to(v.dtype)
                part.copy_(new)
            else:
                codes, scale = ops.quantize_kv(new, cached.dtype)
                part.copy_(codes)
                self.scales[layer][:, :, : new.shape[2], i] = scale
                new = ops.dequantize_kv(codes, scale, v.dtype)
            held.append(new)
        return tuple(held)


@dataclass(frozen=True)
class Matrix:
    """A weight [N, K] and, where its columns are in another order than the inputs, that order: int32 [K], column i of
    `data` meets input order[i]."""

    data: Tensor | Int4Weight
    order: Tensor | None = None

    def inputs(self, x: Tensor) -> Tensor:
        """x [..., K] in the order of the columns."""
        return x if self.order is None else x.index_select(-1, self.order)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.order is None else self.order.nbytes)


class Linear:
    """y = x @ W.T (+ bias) over one weight, or over several that share x and could not be fused into one."""

    def __init__(self, weights: list[Matrix], biases: list[Tensor] | None = None):
        fused = _fuse(weights)
        if biases is None:
            biases = [None] * len(fused)
        elif len(fused) == 1:
            biases = [torch.cat(biases)]
        self.parts = list(zip(fused, biases, strict=True))

    def __call__(self, x: Tensor) -> Tensor:
        ys = [ops.linear(weight.inputs(x), weight.data, bias) for weight, bias in self.parts]
        return ys[0] if len(ys) == 1 else torch.cat(ys, dim=-1)


class FeedForward:
    """down(silu(gate(x)) * up(x)): fused where the weights are of one kind, three linears otherwise."""

    def __init__(self, gate: Matrix, up: Matrix, down: Matrix):
        self.gate, self.up, self.down = gate, up, down
        self.fused = _alike([gate, up]) and isinstance(down.data, Tensor) == isinstance(up.data, Tensor)

    def __call__(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate.data, self.up.data, self.down.data
        if self.fused and isinstance(up, Int4Weight):
            h = ops.int4_gated_linear(self.up.inputs(x), up, gate, activation="silu")
        elif self.fused:
            return ops.fused_ffn(x, up.t(), None, down.t(), None, gate.t(), activation="silu")
        else:
            h = F.silu(ops.linear(self.gate.inputs(x), gate)) * ops.linear(self.up.inputs(x), up)
        return ops.linear(self.down.inputs(h), down)


class Head:
    """Logits in float32 whatever the weight: rounded to 16 bits, neighbouring logits tie and the wrong token wins.

    16-bit weights meet float32 activations on a CPU (FBGEMM's float16 kernel) and are summed in float32 on a GPU. The
    kernels always see the same number of rows, so that a row's bits do not depend on the batch.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        self.nbytes = weight.nbytes
        on_cpu = weight.device.type == "cpu"
        if on_cpu and dtype != torch.float32 and "fbgemm" in torch.backends.quantized.supported_engines:
            # Packed in parts, because packing wants float32 and the whole table in float32 would be the memory peak.
            self.packed = [torch.ops.quantized.linear_prepack_fp16(part.float(), None) for part in weight.split(16384)]
            self.multiply, self.pad_rows = self._fbgemm, 1
        elif on_cpu or dtype == torch.float32:
            self.weight = weight.float()
            self.multiply, self.pad_rows = lambda x: F.linear(x.float(), self.weight), 1
        else:
            self.weight = weight
            self.multiply, self.pad_rows = self._cublas, 8

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, d] -> float32 [rows, V]."""
        rows = x.shape[0]
        return self.multiply(F.pad(x, (0, 0, 0, -rows % self.pad_rows)))[:rows]

    def _fbgemm(self, x: Tensor) -> Tensor:
        multiply = torch.ops.quantized.linear_dynamic_fp16  # a row at a time: its kernel for more rows gives other bits
        rows = [torch.cat([multiply(row, part) for part in self.packed], dim=-1) for row in x.float().split(1)]
        return torch.cat(rows)

    def _cublas(self, x: Tensor) -> Tensor:
        return torch.mm(x.to(self.weight.dtype), self.weight.t(), out_dtype=torch.float32)


@dataclass(frozen=True)
class Layer:
    attention_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    out: Linear
    ffn_norm: Tensor
    ffn: FeedForward


class Transformer:
    """A model ready to run on the device that its weights are on. `dtype` is that of activations, 16-bit linear weights
    and, unless it has 8 bits, the KV cache; float32 is the exact mode: all weights, INT4 ones too, are widened to it as
    they are loaded.

    `weights` maps Hugging Face names to tensors [N, K] or Int4Weights, and x.input_order to the input order, int32 [K],
    of the Int4Weight x.weight if it has one. It is emptied, so that each source tensor is freed as soon as it is fused.
    A missing, surplus or mis-shaped tensor is a ValueError that names it.
    """

    def __init__(self, config: ModelConfig, weights: MutableMapping[str, Tensor | Int4Weight], dtype: torch.dtype):
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype={dtype} must be float32, bfloat16 or float16")
        d, h, head = config.hidden_size, config.intermediate_size, config.head_dim
        q_rows, kv_rows = config.num_heads * head, config.num_kv_heads * head
        table_dtype = torch.float32 if dtype == torch.float32 else torch.float16  # of embedding and head

        def take(name: str, *shape: int) -> Tensor | Int4Weight:
            if name not in weights:
                raise ValueError(f"tensor {name} is missing; the model needs it with shape {shape}")
            w = weights.pop(name)
            if tuple(w.shape) != shape:
                raise ValueError(f"tensor {name} has shape {tuple(w.shape)}, the configuration says {shape}")
            return w

        def matrix(name: str, rows: int, columns: int) -> Matrix:
            w = take(f"{name}.weight", rows, columns)
            order = weights.pop(f"{name}.input_order", None)
            if order is not None and not isinstance(w, Int4Weight):
                raise ValueError(f"tensor {name}.input_order belongs to an INT4 weight, but {name}.weight is {w.dtype}")
            if order is not None and not is_permutation(order, columns):
                raise ValueError(f"tensor {name}.input_order must hold each of 0 to {columns - 1} once, as int32")
            return Matrix(w, order)

        def linear(name: str, rows: int, columns: int) -> Matrix:
            w = matrix(name, rows, columns)
            if isinstance(w.data, Tensor):
                return Matrix(w.data.to(dtype))
            return Matrix(_widen(w, dtype)) if dtype == torch.float32 else w

        def table(name: str) -> Tensor:
            w = matrix(name, config.vocab_size, d)
            if isinstance(w.data, Int4Weight):
                return _widen(w, table_dtype)
            return w.data if (w.data.dtype, dtype) == (torch.bfloat16, torch.bfloat16) else w.data.to(table_dtype)

        def layer(name: str) -> Layer:
            parts = [
                (f"{name}.self_attn.{p}_proj", rows) for p, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows))
            ]
            biases = [take(f"{p}.bias", rows).to(dtype) for p, rows in parts] if config.qkv_bias else None
            out_bias = [take(f"{name}.self_attn.o_proj.bias", d).to(dtype)] if config.output_bias else None
            return Layer(
                attention_norm=take(f"{name}.input_layernorm.weight", d).float(),
                qkv=Linear([linear(p, rows, d) for p, rows in parts], biases),
                q_norm=take(f"{name}.self_attn.q_norm.weight", head).float() if config.qk_norm else None,
                k_norm=take(f"{name}.self_attn.k_norm.weight", head).float() if config.qk_norm else None,
                out=Linear([linear(f"{name}.self_attn.o_proj", d, q_rows)], out_bias),
                ffn_norm=take(f"{name}.post_attention_layernorm.weight", d).float(),
                ffn=FeedForward(
                    linear(f"{name}.mlp.gate_proj", h, d),
                    linear(f"{name}.mlp.up_proj", h, d),
                    linear(f"{name}.mlp.down_proj", d, h),
                ),
            )

        self.config, self.dtype = config, dtype
        self.embedding = table("model.embed_tokens")  # [V, d]
        self.device = self.embedding.device
        self.layers = [layer(f"model.layers.{i}") for i in range(config.num_layers)]
        self.norm = take("model.norm.weight", d).float()
        if config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)  # some checkpoints store the tied head a second time
            weights.pop("lm_head.input_order", None)
            head = self.embedding
        else:
            head = table("lm_head")
        self.head = Head(head, dtype)
        if weights:
            raise ValueError(f"the model has no place for {len(weights)} tensors, such as {next(iter(weights))}")

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, lengths: Tensor, cache: KVCache, all_logits: bool = False) -> Tensor:
        """Reads prompts into the cache, which it fills from position 0.

        tokens int64 [B, L], padded on the right with any token; lengths int32 [B], 1 to L. Returns float32 logits
        [B, V] of each row's last token, or of every position, [B, L, V].
        """
        batch, length = tokens.shape
        if batch != cache.batch or length > cache.max_length:
            raise ValueError(f"tokens {batch} x {length} do not fit a cache of {cache.batch} x {cache.max_length}")
        cos, sin = cache.rope_cos[:length], cache.rope_sin[:length]

        def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [B, L, H, D]
            layer, eps = self.layers[i], self.config.rms_norm_eps
            if layer.q_norm is not None:
                q, k = ops.rms_norm(q, layer.q_norm, eps=eps), ops.rms_norm(k, layer.k_norm, eps=eps)
            q, k, v = (t.transpose(1, 2) for t in (rotate(q, cos, sin).to(q.dtype), rotate(k, cos, sin), v))
            k, v = cache.fill(i, k, v)
            return ops.fused_attention(q, k, v, causal=True, window=self.config.window(i)).transpose(1, 2)

        cache.lengths.copy_(lengths)
        x = self._forward(tokens, attend)
        if all_logits:
            return self.head(x.flatten(0, 1)).unflatten(0, (batch, length))
        return self.head(x[torch.arange(batch, device=x.device), lengths.long() - 1])

    @torch.inference_mode()
    def decode(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """One step: the token of each row, int64 [B], stands at position cache.lengths, which this advances.

        Returns float32 logits [B, V]. Everything happens on the device, so a CUDA graph can hold the step. The caller
        keeps lengths below cache.max_length.
        """

        def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [B, H, D]
            layer = self.layers[i]
            return ops.decode_attention(
                q, k, v, cache.k[i], cache.v[i], cache.lengths, cache.rope_cos, cache.rope_sin,
                kv_scale=None if cache.scales is None else cache.scales[i],
                q_norm=layer.q_norm, k_norm=layer.k_norm, norm_eps=self.config.rms_norm_eps,
                window=self.config.window(i),
            )  # fmt: skip

        x = self._forward(tokens, attend)
        cache.lengths.add_(1)
        return self.head(x)

    def _forward(self, tokens: Tensor, attend) -> Tensor:
        """tokens [...] -> the normed last hidden state [..., d]; attend(layer, q, k, v) works on [..., heads, D], and
        norms and rotates q and k first."""
        c, eps = self.config, self.config.rms_norm_eps
        heads = [c.num_heads, c.num_kv_heads, c.num_kv_heads]
        x = F.embedding(tokens, self.embedding)
        residual = x.float()
        x = ops.rms_norm(x, self.layers[0].attention_norm, eps=eps).to(self.dtype)
        next_norms = [layer.attention_norm for layer in self.layers[1:]] + [self.norm]
        for i, layer in enumerate(self.layers):
            qkv = layer.qkv(x).unflatten(-1, (sum(heads), c.head_dim))
            q, k, v = qkv.split_with_sizes(heads, dim=-2)
            x = layer.out(attend(i, q, k, v).flatten(-2))
            x, residual = ops.rms_norm(x, layer.ffn_norm, residual, eps=eps)
            x = layer.ffn(x)
            x, residual = ops.rms_norm(x, next_norms[i], residual, eps=eps)
        return x

    def weight_bytes(self) -> int:
        """Bytes of weights that one decode step reads: layers, norms and head (of an untied embedding only a row)."""
        tensors = [self.norm]
        for layer in self.layers:
            tensors += [layer.attention_norm, layer.ffn_norm, layer.q_norm, layer.k_norm]
            tensors += [t for part in (*layer.qkv.parts, *layer.out.parts) for t in part]
            tensors += [layer.ffn.gate, layer.ffn.up, layer.ffn.down]
        return self.head.nbytes + sum(t.nbytes for t in tensors if t is not None)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x [B, L, H, D] at positions 0 to L - 1: halves (a, b) of a head become (a cos - b sin, b cos + a sin), in
    float32."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [L, 1, D / 2]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _alike(weights: list[Matrix]) -> bool:
    """Whether weights that share their inputs can be stacked, and share a kernel."""

    def kind(w: Tensor | Int4Weight) -> tuple:
        if isinstance(w, Tensor):
            return (w.dtype,)
        return w.group_size, w.scales.dtype, None if w.zeros is None else w.zeros.dtype

    orders = [w.order for w in weights if w.order is not None]
    same_order = not orders or len(orders) == len(weights) and all(torch.equal(orders[0], o) for o in orders)
    return same_order and len({kind(w.data) for w in weights}) == 1


def _fuse(weights: list[Matrix]) -> list[Matrix]:
    """The weights stacked along N if they are alike, otherwise as they are."""
    if len(weights) == 1 or not _alike(weights):
        return weights
    parts = [w.data for w in weights]
    return [Matrix(torch.cat(parts) if isinstance(parts[0], Tensor) else concat(parts), weights[0].order)]


def _widen(weight: Matrix, dtype: torch.dtype) -> Tensor:
    """An Int4Weight as a tensor [N, K], its columns in the order of the inputs."""
    w = dequantize(weight.data, dtype)
    return w if weight.order is None else w.index_select(1, weight.order.argsort())


def is_permutation(order: Tensor, length: int) -> bool:
    """Whether it is an input order: int32, each of 0 to length - 1 once."""
    return (
        order.dtype == torch.int32
        and order.shape == (length,)
        and bool((order.sort().values == torch.arange(length, device=order.device)).all())
    )
