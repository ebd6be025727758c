"""A checkpoint quantized to 4 bits once, written as a packed directory, read back, and asked for a few words.

    python examples/quantize_checkpoint.py [MODEL [DESTINATION]] [--group-size N]

MODEL is a 16-bit Hugging Face directory, a GGUF file, or one that GPTQ, AWQ, compressed-tensors or HQQ have quantized:
what has 4 bits already keeps its integers and scales. By default SmolLM2, into a temporary place. The same as
`tiny-gemm quantize MODEL DESTINATION`.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import smollm2
import torch

from tiny_gemm import checkpoint
from tiny_gemm.generate import Generator, SamplingParams


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, help="default: SmolLM2")
    parser.add_argument("destination", nargs="?", type=Path, help="a directory that is new or empty")
    parser.add_argument(
        "--group-size", type=int, choices=(32, 64, 128, -1), default=64, help="32, 64, 128, or -1 for one group a row"
    )
    arguments = parser.parse_args()
    source = arguments.model or smollm2.gguf()
    with tempfile.TemporaryDirectory() as temporary:
        packed = arguments.destination or Path(temporary) / "packed"
        report = checkpoint.convert(source, packed, group_size=arguments.group_size)
        print(
            f"{report['tensors_quantized']} tensors quantized, {report['tensors_int4_already']} had 4 bits already: "
            f"{report['packed_bytes'] / 1e6:.1f} MB, {report['compression']:.1f} times smaller than float32"
        )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, tokenizer = checkpoint.load(packed, device=device)
        result = Generator(model, tokenizer).generate(["The capital of France is"], SamplingParams(max_new_tokens=16))[
            0
        ]
        print(f"read back on {device}: The capital of France is{result.text}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
