"""Text from a model in 4 bits, with Tiny-GEMM's own runtime: streamed, and as a batch.

    python examples/generate.py [MODEL] [--tokens N]

MODEL is anything that `tiny-gemm generate` takes: a .gguf file, a Hugging Face directory (16 bits, or 4 bits by GPTQ,
AWQ, compressed-tensors or HQQ), or a directory that `tiny-gemm quantize` wrote; by default SmolLM2.
"""

import argparse
import sys

import smollm2
import torch

from tiny_gemm import checkpoint
from tiny_gemm.generate import Generator, SamplingParams

QUESTION = "Why is the sky blue?"
PROMPTS = ["The capital of France is", "Once upon a time", "Water boils at"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", help="default: SmolLM2")
    parser.add_argument("--tokens", type=int, default=48)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = checkpoint.load(arguments.model or smollm2.gguf(), device=device)
    generator = Generator(model, tokenizer)

    print(f"> {QUESTION}")
    chat = tokenizer.encode_chat([{"role": "user", "content": QUESTION}])
    for piece in generator.stream(chat, SamplingParams(max_new_tokens=arguments.tokens)):
        print(piece.text, end="", flush=True)
    print("\n")

    sampled = SamplingParams(max_new_tokens=arguments.tokens, temperature=0.7, top_p=0.9, seed=1)
    results = generator.generate(PROMPTS, sampled)  # one batch: the weights are read once for all of them
    for prompt, result in zip(PROMPTS, results, strict=True):
        print(f"> {prompt} ...{result.text}\n")
    stats = results[0].stats
    print(f"{stats.tokens_per_s:.1f} tokens/s each on {device}, {model.dtype}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
