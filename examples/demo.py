"""SmolLM2-135M answers a question through Tiny-GEMM; then its speed is measured beside plain PyTorch on this machine.

    python examples/demo.py [--question TEXT] [--tokens N]

The peer is Hugging Face transformers on the same checkpoint, float32 on a CPU and bfloat16 on a GPU, with the same
prompt, number of tokens and threads. It runs in a process of its own, so that our peak memory is ours alone. The two
take turns, so that neither has the quieter machine, and the median of the rounds counts.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from tiny_gemm import checkpoint
from tiny_gemm.cli import keep_memory_small
from tiny_gemm.device import processor
from tiny_gemm.doctor import HOW_TO_GET_SMOLLM2, find_smollm2
from tiny_gemm.generate import Generator, SamplingParams, peak_memory

ROUNDS = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--question", default="Explain in two sentences why the sky is blue.")
    parser.add_argument("--tokens", type=int, default=64, help="tokens a measured round generates")
    arguments = parser.parse_args()
    if not 2 <= arguments.tokens <= 1024:
        parser.error(f"--tokens {arguments.tokens} must be 2 to 1024")
    gguf = find_smollm2()
    if gguf is None:
        print(f"the demo's model is not installed; get it with: {HOW_TO_GET_SMOLLM2}", file=sys.stderr)
        return 2
    keep_memory_small()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = processor(torch.device(device))
    console = Console(highlight=False, soft_wrap=True)

    start = time.perf_counter()
    model, tokenizer = checkpoint.load(gguf, device=device)
    console.print(f"{gguf.name}: loaded in {time.perf_counter() - start:.1f} s on {machine}\n")
    ids = tokenizer.encode_chat([{"role": "user", "content": arguments.question}])
    generator = Generator(model, tokenizer, max_length=len(ids) + max(arguments.tokens, 160))

    console.print(arguments.question, style="bold", markup=False)
    for piece in generator.stream(ids, SamplingParams(max_new_tokens=160)):
        print(piece.text, end="", flush=True)
    print("\n")

    rounds = f"{ROUNDS} rounds of {arguments.tokens} tokens each, in turns"
    console.print(f"Now the same beside transformers: {rounds} ...", style="dim")
    fixed = SamplingParams(max_new_tokens=arguments.tokens, stop_token_ids=())  # goes on past the end of the answer
    ours, theirs = [], []
    with Peer(gguf, device) as peer:
        for i in range(-1, ROUNDS):  # round -1 warms both up
            stats = generator.generate(ids, fixed)[0].stats
            answer = peer.generate(ids, arguments.tokens)
            if i >= 0:
                ours.append({"rate": stats.tokens_per_s, "first_s": stats.ttft_s})
                theirs.append({"rate": (arguments.tokens - 1) / answer["decode_s"], "first_s": answer["first_s"]})

    table = Table("", "decode, tokens/s", "first token", "peak memory", box=None, pad_edge=False)
    our_name = f"Tiny-GEMM, INT4 weights, {str(model.dtype).split('.')[-1]}"
    for name, runs, memory in (
        (our_name, ours, peak_memory(torch.device(device))),
        (f"transformers {peer.version}, {peer.dtype}", theirs, answer["peak_memory"]),
    ):
        rate, first = (median(run[key] for run in runs) for key in ("rate", "first_s"))
        table.add_row(name, f"{rate:.1f}", f"{first:.2f} s", f"{memory / 2**20:.0f} MiB")
    console.print(table)
    ratio = median(run["rate"] for run in ours) / median(run["rate"] for run in theirs)
    console.print(f"{ratio:.2f} times the speed on {machine}, torch {torch.__version__}, medians of {rounds}")
    return 0


class Peer:
    """transformers in a process of its own: one JSON line in, one out, for each round."""

    def __init__(self, gguf: Path, device: str):
        command = [sys.executable, __file__, "--peer", str(gguf), device, str(torch.get_num_threads())]
        quiet = {**os.environ, "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=quiet)
        ready = self._read()
        self.version, self.dtype = ready["version"], ready["dtype"]

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_exception) -> None:
        self.process.stdin.close()  # ends its loop
        self.process.wait()

    def generate(self, ids: list[int], tokens: int) -> dict:
        self.process.stdin.write(json.dumps({"ids": ids, "tokens": tokens}) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("demo: transformers ended early; its own words are above")
        return json.loads(line)


class FirstToken:
    """A transformers streamer that only notes when the first new token came."""

    def __init__(self):
        self.calls, self.time = 0, 0.0

    def put(self, _ids) -> None:
        self.calls += 1
        if self.calls == 2:  # the first call brings the prompt
            self.time = time.perf_counter()

    def end(self) -> None:
        pass


def run_peer(gguf: Path, device: str, threads: int) -> None:
    """The other process."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(str(gguf.parent), gguf_file=gguf.name, dtype=dtype).to(device).eval()
    print(json.dumps({"version": transformers.__version__, "dtype": str(dtype).split(".")[-1]}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        ids, tokens, first = torch.tensor([request["ids"]], device=device), request["tokens"], FirstToken()
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=False,
            streamer=first,
            pad_token_id=2,
        )
        end = time.perf_counter()
        answer = {
            "first_s": first.time - start,
            "decode_s": end - first.time,
            "peak_memory": peak_memory(torch.device(device)),
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["--peer"]:
            sys.exit(run_peer(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])))
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
