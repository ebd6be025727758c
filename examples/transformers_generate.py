"""Hugging Face transformers with Tiny-GEMM's attention and INT4 weights: from_pretrained, generate.

    python examples/transformers_generate.py [DIRECTORY] [--prompt TEXT] [--group-size N] [--save DIRECTORY]

DIRECTORY holds config.json and safetensors in 16 bits; without one SmolLM2 is written to a temporary place first.
--save keeps the quantized model: from_pretrained then reads it with no quantization_config, to the same bits.
"""

import argparse
import sys
import tempfile

import smollm2
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_gemm.integrations.transformers as tg  # importing it registers "tiny_gemm" with transformers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", nargs="?", help="a Hugging Face checkpoint; default: SmolLM2")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument(
        "--group-size",
        type=int,
        choices=(32, 64, 128, -1),
        default=64,
        help="must divide every layer's inputs; SmolLM2 has 576",
    )
    parser.add_argument("--save", metavar="DIRECTORY")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.directory
        if directory is None:
            smollm2.write_directory(directory := temporary)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.bfloat16,
            device_map=device,
            attn_implementation="tiny_gemm",
            quantization_config=tg.TinyGemmConfig(group_size=arguments.group_size),
        )
        tokenizer = AutoTokenizer.from_pretrained(directory)

    inputs = tokenizer(arguments.prompt, return_tensors="pt").to(device)
    output = model.generate(**inputs, max_new_tokens=arguments.tokens, do_sample=False)
    print(tokenizer.decode(output[0], skip_special_tokens=True))
    size = sum(t.nbytes for t in model.state_dict().values())
    print(
        f"\n{size / 1e6:.1f} MB of weights on {device}, {model.config._attn_implementation} attention", file=sys.stderr
    )
    if arguments.save:
        model.save_pretrained(arguments.save)
        tokenizer.save_pretrained(arguments.save)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
