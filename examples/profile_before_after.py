"""Profiles the decode step of one model in plain transformers and in Tiny-GEMM, and compares them.

    python examples/profile_before_after.py [MODEL.gguf] [OUTDIR] [--steps N] [--context N]

OUTDIR/transformers and OUTDIR/tiny-gemm get trace, report, figures and TensorBoard log; OUTDIR/*_step.json.gz are
their last few steps as small traces, to send to somebody. The peer runs bfloat16 on a GPU and float32 on a CPU, with
its dynamic cache, and fetches each token as a user's program would.
"""

import argparse
import gc
import sys
from pathlib import Path

import torch

from tiny_gemm import checkpoint
from tiny_gemm.doctor import HOW_TO_GET_SMOLLM2, find_smollm2
from tiny_gemm.profiling import Report, profile, profile_decode, trim

QUESTION = "Explain in two sentences why the sky is blue. "


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=find_smollm2(), help="a GGUF file; default: SmolLM2")
    parser.add_argument("directory", nargs="?", type=Path, default=Path("profiles"))
    parser.add_argument("--steps", type=int, default=8, help="steps recorded of each")
    parser.add_argument("--context", type=int, default=512, help="tokens in the KV cache before the first of them")
    arguments = parser.parse_args()
    if arguments.model is None:
        print(f"no model: name one, or get the default with: {HOW_TO_GET_SMOLLM2}", file=sys.stderr)
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"

    model, tokenizer = checkpoint.load(arguments.model, device=device)
    once = tokenizer.encode(QUESTION, add_special=False)
    ids = (once * (arguments.context // len(once) + 1))[: arguments.context]
    ours = profile_decode(model, [ids], arguments.directory / "tiny-gemm", steps=arguments.steps).report
    del model
    gc.collect()
    theirs = profile_transformers(arguments.model, ids, device, arguments.directory / "transformers", arguments.steps)

    for name in ("transformers", "tiny-gemm"):
        small = arguments.directory / f"{name}_step.json.gz"
        trim(arguments.directory / name, small, steps=3)
        print(f"{small}: {small.stat().st_size / 1e3:,.0f} kB")

    from rich.console import Console  # last: what is recorded is then on disk even where rich is not

    console = Console(highlight=False)
    for report in (theirs, ours):
        console.print("\n", report.table(), sep="")
    console.print("transformers -> tiny-gemm", style="bold")
    console.print(ours.against(theirs))
    return 0


@torch.inference_mode()
def profile_transformers(gguf: Path, ids: list[int], device: str, directory: Path, steps: int) -> Report:
    """Greedy decode steps of the same checkpoint, widened to 16 or 32 bits as transformers does."""
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    load = AutoModelForCausalLM.from_pretrained
    model = load(str(gguf.parent), gguf_file=gguf.name, dtype=dtype).to(device).eval()
    weights = {p.data_ptr(): p.nbytes for p in model.parameters()}  # a tied table counts once
    c = model.config
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    cache_bytes = 2 * c.num_hidden_layers * c.num_key_value_heads * head_dim * len(ids) * dtype.itemsize

    out = model(torch.tensor([ids], device=device), use_cache=True)

    def step() -> None:
        nonlocal out
        token = out.logits[:, -1:].argmax(dim=-1)
        token.item()  # generate() looks at every token, too
        out = model(token, past_key_values=out.past_key_values, use_cache=True)

    for _ in range(3):
        step()
    step_bytes = sum(weights.values()) + cache_bytes
    with profile(directory, warmup=1, steps=steps, tokens_per_step=1, step_bytes=step_bytes) as p:
        for _ in range(1 + steps):
            step()
            p.step()
    return p.report


if __name__ == "__main__":
    sys.exit(main())
