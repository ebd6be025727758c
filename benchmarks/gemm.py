"""The suite `gemm`: y = x @ W.T with W [N, K] in INT4, against 16-bit and INT4 products that exist.

Arms: pytorch (cuBLAS, 16 bit), torch.compile of it (at COMPILED only: each takes seconds to tune), aten-int4
(_weight_int4pack_mm), gemlite-int4 (for group 128, symmetric, in bfloat16 at M in GEMLITE_ROWS only: it tunes itself
for each shape and M, which takes seconds), tiny-gemm-int4.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import (
    BOUNDS,
    Absent,
    Arm,
    Case,
    Options,
    Work,
    compiled,
    left_out,
    needs_gpu,
    relative_error,
)
from benchmarks.presets import RandomWeight, clone, group_size, projections, random_weight
from benchmarks.timing import Machine
from tiny_gemm import ops
from tiny_gemm.quantize_utils import SYMMETRIC_ZERO, Int4Weight
from tiny_gemm.reference import int4_gemm_ref

DECODE_ROWS = (1, 2, 4, 8, 16)
SHAPES = (  # (K, N), group 128: the projections of Llama 3 and Qwen3 models
    (2048, 2048), (2048, 3072), (2048, 16384), (8192, 2048), (4096, 4096), (4096, 6144), (4096, 28672), (14336, 4096),
    (4096, 128256),
)  # fmt: skip
MANY_ROWS = {
    (4096, 4096): (32, 64, 128, 512, 2048),
    (4096, 28672): (64, 128, 512),
    (14336, 4096): (128, 512),
    (2048, 16384): (128, 512),
}
ODD_SHAPES = (  # (K, N), group 32: SmolLM2's and others that no power of two divides
    (576, 192), (576, 1536), (576, 49152), (1536, 576), (2880, 2880), (7392, 4096), (10944, 2048), (18944, 3584),
)  # fmt: skip
COMPILED = {(4096, 4096, 1), (4096, 4096, 8), (2048, 16384, 1)}
GEMLITE_ROWS = (1, 8)
GEMLITE_BOUND = 5e-2
GEMLITE_NOTE = "adds partial sums by bfloat16 atomics, its default: less exact than the others, and not the same twice"


def cases(options: Options, machine: Machine) -> list[Case]:
    rows = options.rows
    plain = functools.partial(_case, machine, dtype=options.dtype)
    if options.models:
        return [
            plain(model, f"{name} {k}x{n}", k, n, m, group_size(model))
            for model in options.models
            for name, (k, n) in projections(model).items()
            for m in rows or DECODE_ROWS
        ]
    if options.quick:
        return [plain(None, f"{k}x{n}", k, n, m, 32) for k, n in ((576, 192), (1024, 1024)) for m in rows or (1, 8)]
    found = [
        plain(None, f"{k}x{n}", k, n, m, 128)
        for k, n in SHAPES
        for m in rows or (*DECODE_ROWS, *MANY_ROWS.get((k, n), ()))
    ]
    found += [plain(None, f"{k}x{n}", k, n, m, 32) for k, n in ODD_SHAPES for m in rows or (1, 8)]
    found += [plain(None, "4096x4096 zeros", 4096, 4096, m, 32, zeros=torch.float32) for m in rows or (1, 8, 128)]
    found += [plain(None, "4096x4096 int zeros", 4096, 4096, m, 128, zeros=torch.int16) for m in rows or (1, 8, 64)]
    if options.dtype == torch.bfloat16:
        found += [_case(machine, None, "4096x4096", 4096, 4096, m, 128, dtype=torch.float16) for m in rows or (1, 8)]
    return found


def _case(machine, model, shape, k, n, m, group, *, dtype, zeros=None) -> Case:
    facts = {"M": m, "K": k, "N": n, "group_size": group, "dtype": str(dtype).removeprefix("torch.")}
    return Case("gemm", model, shape, facts, lambda: _build(machine, k, n, m, group, dtype, zeros))


@dataclass
class Weights:
    """One weight, and its copies in each arm's form, made when first asked for and shared by the cases of a shape."""

    random: RandomWeight
    machine: Machine
    dtype: torch.dtype

    @functools.cached_property
    def int4(self) -> list[Int4Weight]:
        weight = self.random.int4
        return [weight, *(clone(weight) for _ in range(self.machine.copies(weight.nbytes) - 1))]

    @functools.cached_property
    def dense(self) -> list[Tensor]:
        weight = self.random.dense(self.dtype)
        return [weight, *(weight.clone() for _ in range(self.machine.copies(weight.nbytes) - 1))]

    @functools.cached_property
    def aten(self) -> list[tuple[Tensor, Tensor]]:
        packed, scales = aten_weight(self.random)
        again = range(self.machine.copies(packed.nbytes + scales.nbytes) - 1)
        return [(packed, scales), *((packed.clone(), scales.clone()) for _ in again)]

    @functools.cached_property
    def gemlite(self) -> list[Callable[[Tensor], Tensor]]:
        try:
            from gemlite.helper import A16Wn
        except ImportError as e:
            raise Absent(f"gemlite cannot be imported ({e}): pip install gemlite") from e
        w = self.random
        zeros = torch.full_like(w.scales, SYMMETRIC_ZERO) if w.zeros is None else w.zeros
        make = A16Wn(device=str(w.q.device), dtype=self.dtype).from_weights
        copies = self.machine.copies(w.int4.nbytes)
        return [make(w.q, w.scales, zeros, W_nbits=4, group_size=w.int4.group_size) for _ in range(copies)]


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


@functools.lru_cache(maxsize=1)
def weights(machine: Machine, k: int, n: int, group: int, zeros: torch.dtype | None, dtype: torch.dtype) -> Weights:
    return Weights(random_weight(n, k, group, machine.device, zeros=zeros), machine, dtype)


def aten_weight(weight: RandomWeight) -> tuple[Tensor, Tensor]:
    """(packed, scales and offsets bfloat16 [K / group, N, 2]) of aten's INT4 product: w = (q - 8) * scale + offset."""
    n, k = weight.int4.shape
    tiles = next(t for t in (8, 4, 2) if k % (16 * t) == 0)
    bytes_ = (weight.q[:, ::2] << 4) | weight.q[:, 1::2]
    scale = weight.scales.float()
    offset = torch.zeros_like(scale) if weight.zeros is None else (SYMMETRIC_ZERO - weight.zeros) * scale
    packed = torch.ops.aten._convert_weight_to_int4pack(bytes_.contiguous(), tiles)
    return packed, torch.stack((scale, offset), dim=-1).transpose(0, 1).to(torch.bfloat16).contiguous()


def _build(machine: Machine, k: int, n: int, m: int, group: int, dtype: torch.dtype, zeros) -> Work:
    w = weights(machine, k, n, group, zeros, dtype)
    x = torch.randn(m, k, device=machine.device, dtype=dtype)
    oracle = int4_gemm_ref(x, w.random.int4)
    flops, activations = 2 * m * k * n, (m * k + m * n) * x.element_size()
    dense_bytes = n * k * x.element_size() + activations
    int4_bytes = w.random.int4.nbytes + activations
    peer_bytes = n * k // 2 + 4 * n * (k // group) + activations  # their scale and zero of a group: 16 bits each

    def over(copies: Callable[[], list], call: Callable) -> Callable:
        """An arm's calls: call(x, weight) for each copy of the weight, each with an x of its own."""
        return lambda: [functools.partial(call, x.clone(), weight) for weight in copies()]

    def aten() -> list:
        if not machine.is_cuda:
            raise Absent("on a CPU it is what tiny-gemm-int4 runs on")
        if dtype != torch.bfloat16:
            raise Absent("it takes bfloat16 only")
        return w.aten

    def gemlite() -> list:
        needs_gpu(machine)
        return w.gemlite

    def dense_compiled() -> list:
        needs_gpu(machine)
        call = compiled(linear)
        return [functools.partial(call, x.clone(), weight) for weight in w.dense]

    mm = torch.ops.aten._weight_int4pack_mm
    arms = [
        Arm("pytorch", over(lambda: w.dense, linear), dense_bytes, flops),
        Arm("aten-int4", over(aten, lambda x, w: mm(x, w[0], group, w[1])), peer_bytes, flops),
        Arm("tiny-gemm-int4", over(lambda: w.int4, ops.int4_gemm), int4_bytes, flops),
    ]
    usual = group == 128 and dtype == torch.bfloat16 and zeros is None
    tuned, tunes = usual and m in GEMLITE_ROWS, over(gemlite, lambda x, layer: layer(x))
    calls = tunes if tuned else left_out(f"at M {GEMLITE_ROWS} in groups of 128, symmetric, bfloat16")
    arms.insert(2, Arm("gemlite-int4", calls, peer_bytes, flops, note=GEMLITE_NOTE, bound=GEMLITE_BOUND))
    compiles = usual and (k, n, m) in COMPILED
    calls = dense_compiled if compiles else left_out(f"at (K, N, M) {sorted(COMPILED)} in groups of 128, bfloat16")
    arms.insert(1, Arm("torch.compile", calls, dense_bytes, flops))
    return Work(arms, lambda y: relative_error(y, oracle), BOUNDS[dtype])
