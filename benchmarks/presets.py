"""Models with real dimensions, as Hugging Face configurations, and weights for them that are random.

Random weights are integers of 4 bits with scales of 4 significant bits, so that the dequantized weight is exact in
bfloat16 and float16: an INT4 arm and a 16-bit arm of one case compute the same function and share one oracle.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tiny_gemm.model import ModelConfig
from tiny_gemm.quantize_utils import Int4Weight, dequantize, pack


def _llama3(factor: float) -> dict:
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor} | scaling


def _config(kind, hidden, ffn, layers, heads, kv_heads, head, vocab, positions, rope, tied) -> dict:
    return dict(
        model_type=kind,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head,
        vocab_size=vocab,
        max_position_embeddings=positions,
        rms_norm_eps=1e-6 if kind == "qwen3" else 1e-5,
        rope_parameters={"rope_type": "default"} | rope,
        tie_word_embeddings=tied,
    )


_QWEN3 = {"rope_theta": 1e6}

PRESETS: dict[str, dict] = {
    "SmolLM2-135M": _config("llama", 576, 1536, 30, 9, 3, 64, 49152, 8192, {"rope_theta": 1e5}, True),
    "Qwen3-0.6B": _config("qwen3", 1024, 3072, 28, 16, 8, 128, 151936, 40960, _QWEN3, True),
    "Qwen3-1.7B": _config("qwen3", 2048, 6144, 28, 16, 8, 128, 151936, 40960, _QWEN3, True),
    "Qwen3-4B": _config("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, 40960, _QWEN3, True),
    "Qwen3-8B": _config("qwen3", 4096, 12288, 36, 32, 8, 128, 151936, 40960, _QWEN3, False),
    "Llama-3.2-1B": _config("llama", 2048, 8192, 16, 32, 8, 64, 128256, 131072, _llama3(32.0), True),
    "Llama-3.1-8B": _config("llama", 4096, 14336, 32, 32, 8, 128, 128256, 131072, _llama3(8.0), False),
    "tiny": _config("qwen3", 64, 128, 2, 2, 1, 64, 512, 2048, {"rope_theta": 1e4}, True),  # for tests and CPUs
}


def model_config(model: str) -> ModelConfig:
    return ModelConfig.from_hf(PRESETS[model])


def group_size(model: str) -> int:
    """128, or 32 where 128 does not divide the hidden size."""
    return 128 if PRESETS[model]["hidden_size"] % 128 == 0 else 32


def projections(model: str) -> dict[str, tuple[int, int]]:
    """(K, N) of the products of one decode step, fused as the runtime fuses them."""
    c = model_config(model)
    return {
        "qkv": (c.hidden_size, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim),
        "out": (c.num_heads * c.head_dim, c.hidden_size),
        "gate+up": (c.hidden_size, 2 * c.intermediate_size),
        "down": (c.intermediate_size, c.hidden_size),
        "head": (c.hidden_size, c.vocab_size),
    }


@dataclass(frozen=True)
class RandomWeight:
    """One weight [N, K] in every form that an arm wants: q uint8 [N, K], scales and zeros [N, K / group_size]."""

    int4: Int4Weight
    q: Tensor
    scales: Tensor
    zeros: Tensor | None

    def dense(self, dtype: torch.dtype) -> Tensor:
        return dequantize(self.int4, dtype)


def random_weight(
    n: int, k: int, group: int, device: torch.device, *, zeros: torch.dtype | None = None, gain: float = 1.0
) -> RandomWeight:
    """W [n, k] of mean 0 and about variance gain^2 / k; scales float16; zeros, which are integers, of that dtype:
    float32 as tiny_gemm.quantize makes them, int16 as other tools' come. (With a mean, what a model's layers add up to
    is a constant, whatever they do.)"""
    q = torch.randint(1 if zeros is None else 0, 16, (n, k), dtype=torch.uint8, device=device)
    near = 2.0 ** round(-math.log2(5.0 * k**0.5 / gain))
    scales = near * (1 + torch.randint(0, 8, (n, k // group), device=device) / 8)
    scales = scales.to(torch.float16)
    found = None if zeros is None else torch.randint(0, 16, (n, k // group), device=device).to(zeros)
    return RandomWeight(pack(q, scales, found, group), q, scales, found)


def clone(weight: Int4Weight) -> Int4Weight:
    zeros = None if weight.zeros is None else weight.zeros.clone()
    return Int4Weight(weight.packed.clone(), weight.scales.clone(), zeros, weight.group_size, weight.shape)
