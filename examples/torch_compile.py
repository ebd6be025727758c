"""Tiny-GEMM's ops inside one torch.compile graph: a feed-forward block in INT4, compiled with fullgraph=True.

    python examples/torch_compile.py [--hidden N] [--rows N]

fullgraph=True is an error where the graph would break: the compiler sees each op through its schema and its fake
implementation, fuses what stands around it, and on a GPU can record the whole in a CUDA graph.
"""

import argparse
import sys

import torch

from tiny_gemm import Int4Weight, quantize
from tiny_gemm.ops import int4_gated_linear, int4_gemm, rms_norm


def block(x: torch.Tensor, norm: torch.Tensor, gate: Int4Weight, up: Int4Weight, down: Int4Weight) -> torch.Tensor:
    """x + down(silu(gate(norm(x))) * up(norm(x)))"""
    h = rms_norm(x, norm, eps=1e-6)
    h = int4_gated_linear(h, up, gate, activation="silu")
    return x + int4_gemm(h, down)


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rows", type=int, default=1, help="tokens decoded at a time")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    d, ffn = arguments.hidden, 4 * arguments.hidden
    gate, up, down = (quantize(torch.randn(n, k) * k**-0.5).to(device) for n, k in ((ffn, d), (ffn, d), (d, ffn)))
    norm = torch.ones(d, device=device)
    x = torch.randn(arguments.rows, d, dtype=torch.bfloat16, device=device)

    eager = block(x, norm, gate, up, down)
    mode = "reduce-overhead" if device == "cuda" else "default"  # CUDA graphs
    compiled = torch.compile(block, fullgraph=True, mode=mode)
    for _ in range(3):  # compiled, recorded, replayed
        y = compiled(x, norm, gate, up, down)
    error = ((y - eager).float().norm() / eager.float().norm()).item()
    print(f"one graph on {device}, mode {mode!r}: {tuple(y.shape)}, relative difference from eager {error:.1e}")
    return 0 if error < 1e-2 else 1


if __name__ == "__main__":
    sys.exit(main())
