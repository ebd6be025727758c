"""Every number and name in the figures, from the code and from what was measured."""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

import torch

from benchmarks import plots, presets, results
from tiny_gemm.device import DeviceFacts
from tiny_gemm.profiling import analyse, read_trace
from tiny_gemm.profiling.trace import Trace
from tiny_gemm.quantize_utils import TILE_N, pack, packed_shapes, unit_k

ROOT = Path(__file__).resolve().parents[2]
TRACES = {"eager": "transformers_step_h100.json.gz", "ours": "smollm2_step_h100.json.gz"}
TRACED_MODEL = "SmolLM2-135M"  # at batch 1
TRACED_LAYERS = presets.PRESETS[TRACED_MODEL]["num_hidden_layers"]
MODEL = "Llama-3.2-1B"
CONTEXT = 512  # tokens
GPU = "nvidia-h200"  # where the figures' times were measured


def size(count: float) -> str:
    """Bytes in decimal units, two or three digits."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            value = count / scale
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{count:.0f} B"


# ---------------------------------------------------------------------------------------------------------------------
# What a decode step reads
# ---------------------------------------------------------------------------------------------------------------------


def step_bytes() -> dict[str, tuple[int, int]]:
    """(bytes in 16 bits, bytes as Tiny-GEMM reads them with INT4 weights) of each part of a step of MODEL, all layers
    together. The head stays in 16 bits; "attention" is the KV cache, which batch 1 reads at CONTEXT tokens."""
    c = presets.model_config(MODEL)
    found = {}
    for name, (k, n) in presets.projections(MODEL).items():
        times = 1 if name == "head" else c.num_layers
        dense = 2 * n * k * times
        found[name] = dense, dense if name == "head" else int4_bytes(n, k, presets.group_size(MODEL)) * times
    kv = 2 * 2 * c.num_kv_heads * c.head_dim * CONTEXT * c.num_layers
    return found | {"attention": (kv, kv)}


def int4_bytes(n: int, k: int, group_size: int) -> int:
    """Of a symmetric packed weight [n, k] with 16-bit scales."""
    return sum(2 * torch.Size(shape).numel() for shape in packed_shapes(n, k, group_size))


# ---------------------------------------------------------------------------------------------------------------------
# What a decode step launches
# ---------------------------------------------------------------------------------------------------------------------


@cache
def trace(which: str) -> Trace:
    return read_trace(ROOT / "tests" / "fixtures" / TRACES[which])


def kernels_per_step(which: str) -> float:
    return analyse(trace(which)).step.kernels


def gpu() -> DeviceFacts:
    """The GPU of the traces, as pick_config sees it."""
    d = trace("ours").devices[0]
    capability = d["computeMajor"], d["computeMinor"]
    return DeviceFacts(d["name"], capability, d["numSms"], d["sharedMemPerBlockOptin"], is_nvidia=True)


def short(gpu_name: str) -> str:
    """Without what the driver says of the memory: NVIDIA H100."""
    return " ".join(gpu_name.split()[:2])


@cache
def launches_per_layer(which: str) -> dict[str, int]:
    """Kernels of one layer by part, of the kind of layer that a traced step has most of.

    A layer is taken from its attention to the next one's. In it the products come in runs: first the output
    projection, last Q, K and V, between them the feed-forward with all that stands inside it; what lies around
    belongs to the two norms (with the residual), and what follows Q, K and V to the next attention.
    """
    counts = Counter(tuple(_parts(layer).items()) for layer in _layers(which))
    return dict(counts.most_common(1)[0][0])


def _layers(which: str) -> list[list[str]]:
    """Of the last step: each layer's kernels as "attention", "product" or "other", in the order of time."""
    report = analyse(trace(which))
    names = {"attention": "attention", "gemm": "product", "int4": "product"}
    kinds = [names.get(report.rows[e.row].family, "other") for e in sorted(report.timeline, key=lambda e: e.start_us)]
    starts = [i for i, kind in enumerate(kinds) if kind == "attention" and (not i or kinds[i - 1] != "attention")]
    return [kinds[a:b] for a, b in zip(starts, starts[1:], strict=False)]


def _parts(layer: list[str]) -> dict[str, int]:
    runs = [(kind, len(list(group))) for kind, group in groupby(layer)]
    products = [i for i, (kind, _) in enumerate(runs) if kind == "product"]
    out, *ffn, qkv = products
    count = lambda first, last: sum(n for _, n in runs[first:last])  # noqa: E731
    return {
        "attention": count(0, out) + count(qkv + 1, len(runs)),
        "out": runs[out][1],
        "norm 2": count(out + 1, ffn[0]),
        "ffn": count(ffn[0], ffn[-1] + 1),
        "norm 1": count(ffn[-1] + 1, qkv),
        "qkv": runs[qkv][1],
    }


# ---------------------------------------------------------------------------------------------------------------------
# The packed order
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where one weight lies: its int16 counted from the start of the packed tensor, and its nibble there."""

    word: int
    nibble: int  # 0: the lowest four bits

    @property
    def byte(self) -> int:
        return 2 * self.word + self.nibble // 2


@cache
def packed_order(n: int, k: int) -> dict[tuple[int, int], Place]:
    """(row, column) of a weight [n, k] -> its place, found by packing the weights' own numbers, a digit at a time."""
    number = torch.arange(n * k).view(n, k)
    found, digits = None, 0
    while 16**digits < n * k:
        q = (number >> (4 * digits) & 15).to(torch.uint8)
        words = pack(q, torch.ones(n, 1, dtype=torch.float16), None, -1).packed.flatten().int()
        nibbles = torch.stack([words >> (4 * j) & 15 for j in range(4)], dim=1)
        found = nibbles << (4 * digits) if found is None else found | nibbles << (4 * digits)
        digits += 1
    return {divmod(i, k): Place(w, j) for w, row in enumerate(found.tolist()) for j, i in enumerate(row)}


def tile_order(n: int, k: int) -> dict[tuple[int, int], range]:
    """(tile of TILE_N rows, unit of columns) -> the bytes that it takes; ValueError unless they are one stretch."""
    unit, places = unit_k(k), packed_order(n, k)
    bytes_of: dict[tuple[int, int], set[int]] = {}
    for (row, column), place in places.items():
        bytes_of.setdefault((row // TILE_N, column // unit), set()).add(place.byte)
    order = {tile: range(min(b), max(b) + 1) for tile, b in bytes_of.items()}
    if any(len(order[tile]) != len(b) for tile, b in bytes_of.items()):
        raise ValueError("a tile's bytes are not contiguous")
    return order


# ---------------------------------------------------------------------------------------------------------------------
# What was measured
# ---------------------------------------------------------------------------------------------------------------------


@cache
def measured(suite: str, gpu: str = GPU) -> tuple[dict, list[dict]]:
    """(environment, rows with a time) of a GPU's results."""
    environment, rows = results.load(results.DIRECTORY / gpu / f"{suite}.json")
    return environment, [row for row in rows if row["us"] is not None]


def decode_row(impl: str) -> dict:
    """The step of MODEL at batch 1 and CONTEXT tokens, of one implementation."""
    wanted = {"model": MODEL, "B": 1, "L": CONTEXT, "impl": impl}
    return next(row for row in measured("decode")[1] if wanted.items() <= row.items())


def latency_run() -> tuple[dict, list[dict]]:
    """The newest run of the suite decode from which the latency plot can be drawn."""
    runs = [measured("decode", path.parent.name) for path in results.DIRECTORY.glob("*/decode.json")]
    for environment, rows in sorted(runs, key=lambda run: run[0]["date"], reverse=True):
        if all(len({row[x] for row in rows if row["impl"] in plots.LINES}) > 1 for x in ("B", "L")):
            return environment, rows
    raise ValueError(f"{results.DIRECTORY} has no decode.json with several batch sizes and sequence lengths")
