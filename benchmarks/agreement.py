"""How the results of one H100 agree with what was measured on another, another day, by other scripts.

    python -m benchmarks.agreement benchmarks/results/nvidia-h100-80gb-hbm3

prints the table of docs/benchmarks.md. Peers only: their code is the same in both, this project's is not.
"""

import statistics
import sys
from pathlib import Path

from benchmarks import results
from benchmarks.report import number

# Microseconds, medians of CUDA-graph replays over cold weights; torch 2.11.0+cu130, gemlite 0.6, 2026-11-22.
GEMM = {  # (K, N), group 128, bfloat16: aten-int4, gemlite-int4, pytorch (cuBLAS) at M = 1, and the same at M = 8
    (2048, 2048): (3.9, 4.6, 7.1, 5.3, 5.8, 7.1),
    (2048, 16384): (12.0, 13.5, 26.5, 24.9, 32.6, 26.8),
    (8192, 2048): (8.1, 9.1, 16.8, 13.2, 17.2, 16.6),
    (4096, 6144): (9.7, 10.9, 21.3, 21.6, 15.4, 21.6),
    (4096, 4096): (6.9, 8.5, 16.9, 13.4, 13.8, 16.6),
    (4096, 28672): (33.6, 39.3, 83.6, 78.9, 65.0, 88.5),
    (14336, 4096): (18.9, 21.4, 45.5, 41.1, 39.0, 45.9),
    (4096, 128256): (137, 158, 381, 334, 385, 383),
}
GEMM_PEERS = {"aten-int4": "aten tinygemm", "gemlite-int4": "gemlite", "pytorch": "cuBLAS, 16 bit"}
ATTENTION = {  # (B, D, L), one new token, 32 query and 8 KV heads: flash, cuDNN, flex_attention
    (1, 128, 512): (9.3, 8.5, 23.7),
    (1, 128, 2048): (13.9, 10.0, 76.4),
    (1, 128, 8192): (26.7, 19.6, 278),
    (1, 64, 512): (9.5, 6.2, 17.9),
    (1, 64, 2048): (12.2, 7.8, 67.8),
    (8, 128, 512): (14.7, 10.6, 29.0),
    (8, 128, 2048): (32.2, 30.4, 83.4),
    (8, 128, 8192): (99.1, 97.9, None),
}
ATTENTION_PEERS = {"sdpa-flash": "SDPA flash", "sdpa-cudnn": "SDPA cuDNN", "flex_attention": "flex_attention"}
DECODE = {  # a whole step of Llama-3.2-1B, batch 1, 512 tokens of context: (name, time)
    "pytorch": ("whole step: plain PyTorch as one CUDA graph; there gpt-fast", 1570),
    "transformers-static": ("whole step: transformers, static cache and compile", 3360),
    "transformers": ("whole step: transformers, dynamic cache", 14400),
}
NOISE = 0.05  # machines of one kind differ by a few per cent


def pairs(rows: list[dict]) -> dict[str, list[tuple[str, float, float]]]:
    """For each peer what both have: (case, here, there)."""
    here = {results.identity(row): row["us"] for row in rows if row["us"] is not None}

    def look_up(suite: str, impl: str, shape: str, model: str | None = None, group: int | None = None, **sizes: int):
        facts = {"suite": suite, "model": model, "shape": shape, "impl": impl, "group_size": group, "dtype": "bfloat16"}
        return here.get(results.identity(facts | sizes))

    found: dict[str, list[tuple[str, float, float]]] = {}

    def add(peer: str, case: str, us: float | None, there: float | None) -> None:
        if us is not None and there is not None:
            found.setdefault(peer, []).append((case, us, there))

    for i, m in enumerate((1, 8)):
        for j, (impl, name) in enumerate(GEMM_PEERS.items()):
            for (k, n), times in GEMM.items():
                us = look_up("gemm", impl, f"{k}x{n}", group=128, M=m, K=k, N=n)
                add(f"{name}, M = {m}", f"{k} × {n}", us, times[3 * i + j])
    for j, (impl, name) in enumerate(ATTENTION_PEERS.items()):
        for (b, d, n), times in ATTENTION.items():
            us = look_up("attention", impl, f"decode 32/8 D{d}", B=b, L=n)
            add(f"{name}, decode", f"B {b}, D {d}, L {n}", us, times[j])
    for impl, (name, there) in DECODE.items():
        us = look_up("decode", impl, "B 1 L 512", "Llama-3.2-1B", 128, B=1, L=512)
        add(name, "", us, there)
    return found


def table(rows: list[dict]) -> str:
    """Markdown: a line a peer."""
    lines = [f"| peer | cases | here / there | beyond {NOISE:.0%}: here / there, us |", "|---|---|---|---|"]
    for peer, cases in pairs(rows).items():
        ratios = [here / there for _, here, there in cases]
        middle = f"{statistics.median(ratios):.2f}"
        if len(ratios) > 1:
            middle += f" ({min(ratios):.2f} to {max(ratios):.2f})"
        beyond = [
            f"{case}: {number(here)} / {number(there)}".removeprefix(": ")
            for case, here, there in cases
            if abs(here / there - 1) > NOISE
        ]
        lines.append(f"| {peer} | {len(cases)} | {middle} | {'; '.join(beyond)} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    files = [Path(arguments[0]) / f"{suite}.json" for suite in ("gemm", "attention", "decode")]
    try:
        print(table([row for file in files for row in results.load(file)[1]]))
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
