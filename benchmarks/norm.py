"""The suite `norm`: RMSNorm with a residual, s = x + residual, y = s / rms(s) * weight; both are the output.

Arms: pytorch (the operations that transformers writes out), pytorch-rms_norm (F.rms_norm), torch.compile of the first,
tiny-gemm (one launch).
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import BOUNDS, Arm, Case, Options, Work, compiled, left_out, needs_gpu, relative_error
from benchmarks.presets import PRESETS
from benchmarks.timing import Machine
from tiny_gemm import ops
from tiny_gemm.reference import rms_norm_ref

EPS = 1e-6
COMPILED = {(4096, 1), (4096, 8)}


def cases(options: Options, machine: Machine) -> list[Case]:
    rows = options.rows
    sizes = [(model, PRESETS[model]["hidden_size"]) for model in options.models]
    sizes = sizes or [(None, d) for d in ((576,) if options.quick else (576, 2048, 4096))]
    return [
        Case("norm", model, f"d {d}", _facts(m, d, options), functools.partial(_build, machine, m, d, options.dtype))
        for model, d in sizes
        for m in rows or ((1, 8) if options.quick else (1, 8, 512))
    ]


def _facts(m: int, d: int, options: Options) -> dict:
    return {"M": m, "K": d, "dtype": options.dtype_name}


def eager(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    s = x + residual
    wide = s.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(s.dtype), s


def with_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    s = x + residual
    return F.rms_norm(s, (s.shape[-1],), weight, EPS), s


def fused(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return ops.rms_norm(x, weight, residual, eps=EPS)


def _build(machine: Machine, m: int, d: int, dtype: torch.dtype) -> Work:
    new = functools.partial(torch.randn, device=machine.device, dtype=dtype)
    tensors = new(m, d), new(m, d), new(d)
    oracle = torch.cat(rms_norm_ref(tensors[0], tensors[2], tensors[1], eps=EPS))
    nbytes = (4 * m * d + d) * tensors[0].element_size()
    copies = [tensors, *(tuple(t.clone() for t in tensors) for _ in range(machine.copies(nbytes) - 1))]

    def calls(function) -> list:
        return [functools.partial(function, *copy) for copy in copies]

    def calls_compiled() -> list:
        needs_gpu(machine)
        return calls(compiled(eager))

    arms = [
        Arm("pytorch", lambda: calls(eager), nbytes),
        Arm("pytorch-rms_norm", lambda: calls(with_rms_norm), nbytes),
        Arm("tiny-gemm", lambda: calls(fused), nbytes),
    ]
    compiles = calls_compiled if (d, m) in COMPILED else left_out(f"at (d, M) {sorted(COMPILED)}")
    arms.insert(2, Arm("torch.compile", compiles, nbytes))
    return Work(arms, lambda out: relative_error(torch.cat(out), oracle), BOUNDS[dtype])
