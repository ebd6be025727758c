"""The suite `ffn`: the gated feed-forward of a model, down(silu(gate(x)) * up(x)).

Arms: pytorch (two cuBLAS products, gate and up as one, with silu and multiplication between), torch.compile of it (at
COMPILED only), tiny-gemm (one launch over the same 16-bit weights), tiny-gemm-int4 (one launch over INT4 weights),
tiny-gemm-int4-pair (two launches over them, which overlap: what the runtime does).
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import BOUNDS, Arm, Case, Options, Work, compiled, left_out, needs_gpu, relative_error
from benchmarks.presets import PRESETS, clone, group_size, random_weight
from benchmarks.timing import Machine
from tiny_gemm import ops
from tiny_gemm.quantize_utils import Int4Weight
from tiny_gemm.reference import int4_ffn_ref

MODELS = ("SmolLM2-135M", "Qwen3-0.6B", "Llama-3.2-1B", "Llama-3.1-8B")
ROWS = (1, 2, 4, 8, 16)
COMPILED = {("Llama-3.2-1B", 1), ("Llama-3.2-1B", 8)}


def cases(options: Options, machine: Machine) -> list[Case]:
    rows = options.rows
    models = options.models or (("tiny", "SmolLM2-135M") if options.quick else MODELS)
    return [_case(machine, model, m, options) for model in models for m in rows or ((1, 8) if options.quick else ROWS)]


def _case(machine: Machine, model: str, m: int, options: Options) -> Case:
    d, h = PRESETS[model]["hidden_size"], PRESETS[model]["intermediate_size"]
    group = group_size(model)
    facts = {"M": m, "K": d, "N": h, "group_size": group, "dtype": options.dtype_name}
    build = functools.partial(_build, machine, d, h, m, group, options.dtype, (model, m) in COMPILED)
    return Case("ffn", model, f"{d}-{h}-{d}", facts, build)


def eager(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def fused(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2)
    return ops.fused_ffn(x, up.t(), None, down.t(), None, gate.t(), activation="silu")


def fused_int4(x: Tensor, gate: Int4Weight, up: Int4Weight, down: Int4Weight) -> Tensor:
    return ops.int4_ffn(x, up, None, down, None, gate, activation="silu")


def paired_int4(x: Tensor, gate: Int4Weight, up: Int4Weight, down: Int4Weight) -> Tensor:
    """What the runtime does: two launches, of which the second starts while the first still runs."""
    return ops.int4_gemm(ops.int4_gated_linear(x, up, gate, activation="silu"), down)


@functools.lru_cache(maxsize=1)
def weights(machine: Machine, d: int, h: int, group: int, dtype: torch.dtype):
    """(INT4 copies (gate, up, down), 16-bit copies (gate and up, down)) of one feed-forward."""
    gate, up, down = (random_weight(n, k, group, machine.device) for n, k in ((h, d), (h, d), (d, h)))
    dense = torch.cat((gate.dense(dtype), up.dense(dtype))), down.dense(dtype)
    int4 = gate.int4, up.int4, down.int4
    again = range(machine.copies(sum(w.nbytes for w in int4)) - 1)
    int4_copies = [int4, *(tuple(clone(w) for w in int4) for _ in again)]
    again = range(machine.copies(sum(w.nbytes for w in dense)) - 1)
    return int4_copies, [dense, *(tuple(w.clone() for w in dense) for _ in again)]


def _build(machine: Machine, d: int, h: int, m: int, group: int, dtype: torch.dtype, with_compile: bool) -> Work:
    int4, dense = weights(machine, d, h, group, dtype)
    x = torch.randn(m, d, device=machine.device, dtype=dtype)
    gate, up, down = int4[0]
    oracle = int4_ffn_ref(x, up, None, down, None, gate, activation="silu")
    activations, flops = 2 * m * d * x.element_size(), 6 * m * d * h
    bytes_of = lambda copy: sum(w.nbytes for w in copy) + activations  # noqa: E731

    def calls(function, copies) -> list:
        return [functools.partial(function, x.clone(), *copy) for copy in copies]

    def calls_compiled() -> list:
        needs_gpu(machine)
        return calls(compiled(eager), dense)

    arms = [
        Arm("pytorch", lambda: calls(eager, dense), bytes_of(dense[0]), flops),
        Arm("tiny-gemm", lambda: calls(fused, dense), bytes_of(dense[0]), flops),
        Arm("tiny-gemm-int4", lambda: calls(fused_int4, int4), bytes_of(int4[0]), flops),
        Arm("tiny-gemm-int4-pair", lambda: calls(paired_int4, int4), bytes_of(int4[0]), flops),
    ]
    compiles = calls_compiled if with_compile else left_out(f"at (model, M) {sorted(COMPILED)}")
    arms.insert(1, Arm("torch.compile", compiles, bytes_of(dense[0]), flops))
    return Work(arms, lambda y: relative_error(y, oracle), BOUNDS[dtype])
