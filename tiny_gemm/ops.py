"""Tiny-GEMM's ops: torch.ops.tiny_gemm.*, and a Python function for each. Importing this module registers them.

Every op has a schema, checks, a fake implementation (shapes for torch.compile and export), a CPU implementation on
torch's own kernels, and a CUDA implementation on this project's Triton kernels. They are for inference: an input that
requires grad is refused. Low-level torch.library registration is used because custom_op costs 2 to 3 times the CPU time
a call.

Errors name the value and the rule: ValueError (a shape, size or option that breaks it) or TypeError (a dtype).
"""

import math
from functools import cache
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _get_tracing_state, _is_any_autocast_enabled, _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import profiler
from torch.compiler import is_compiling

from tiny_gemm import reference
from tiny_gemm.quantize_utils import SYMMETRIC_ZERO, TILE_N, Int4Weight, check_packed, dequantize, unpack

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CACHE_DTYPES = (*FLOAT_DTYPES, *reference.KV_LARGEST)  # of a KV cache: a float's own, or 8 bits
HEAD_SIZES = (64, 80, 96, 128, 256)

_lib = torch.library.Library("tiny_gemm", "DEF")


def _register(schema: str, *, fake, cpu, cuda) -> None:
    _lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.partition("(")[0]
    _lib.impl(name, _outside_autocast(cpu, "cpu"), "CPU")
    _lib.impl(name, _outside_autocast(cuda, "cuda"), "CUDA")
    torch.library.register_fake(f"tiny_gemm::{name}", fake, lib=_lib)


def _outside_autocast(implementation, device_type: str):
    """Keeps autocast from the torch calls inside an implementation: an op computes in the dtypes that it is given."""

    def call(*args, **kwargs):
        if not torch.is_autocast_enabled(device_type):
            return implementation(*args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return implementation(*args, **kwargs)

    return call


_TENSORS = {Tensor, torch.nn.Parameter}
_TENSORS_OR_NONE = {*_TENSORS, type(None)}


def _is_plain(x: Tensor, *others: Tensor, optional: tuple[Tensor | None, ...] = ()) -> bool:
    """Whether the Python functions below may call an op's CPU or CUDA implementation themselves.

    The dispatcher costs host time: on a CPU a fifth of a small model's decode step (a Python implementation called
    through it takes some 50 us more), on a GPU about as much as a launch. So plain tensors skip it, unless somebody is
    watching: compile, export and other dispatch modes, function transforms, tracing, the profiler, autocast. An input
    that the op would refuse takes the long way too, and is refused there.
    """
    return (
        not is_compiling()
        and type(x) is Tensor
        and (x.is_cuda or x.is_cpu)
        and x.dtype in FLOAT_DTYPES
        and not x.requires_grad
        and not x.is_neg()
        and (not others or _TENSORS.issuperset(map(type, others)))
        and _TENSORS_OR_NONE.issuperset(map(type, optional))
        and not _len_torch_dispatch_stack()
        and not profiler._is_profiler_enabled
        and not _is_any_autocast_enabled()
        and peek_interpreter_stack() is None
        and _get_tracing_state() is None
    )


@cache
def _kernels() -> SimpleNamespace:
    """The modules of kernels. They are imported when the first tensor on a GPU comes: without one, Triton need not be
    there."""
    from tiny_gemm import triton_gemm
    from tiny_gemm.triton_fused_transformer import attention, decode_attention, ffn, norm

    return SimpleNamespace(
        triton_gemm=triton_gemm, attention=attention, decode_attention=decode_attention, ffn=ffn, norm=norm
    )


def _check_tensors(op: str, x: Tensor, others: dict[str, Tensor | None], *, same_dtype: tuple[str, ...] = ()) -> None:
    """What every op asks of its tensors: no grad, one device, x floating point, and x's dtype for same_dtype's."""
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: the input is {x.dtype}, it must be bfloat16, float16 or float32")
    grad, device, dtype = torch.is_grad_enabled(), x.device, x.dtype
    if grad and x.requires_grad:
        raise ValueError(f"{op} is for inference: the input requires grad; call it under torch.no_grad()")
    for name, t in others.items():
        if t is None:
            continue
        if t.device != device:
            raise ValueError(f"{op}: {name} is on {t.device} and the input on {x.device}; they must be on one device")
        if grad and t.requires_grad:
            raise ValueError(f"{op} is for inference: {name} requires grad; call it under torch.no_grad()")
        if t.dtype != dtype and name in same_dtype:
            raise TypeError(f"{op}: {name} is {t.dtype} and the input {x.dtype}; they must have one dtype")


def _check_shape(op: str, name: str, t: Tensor | None, shape: tuple[int, ...]) -> None:
    if t is not None and t.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, it must be {shape}")


# ---------------------------------------------------------------------------------------------------------------------
# int4_gemm
# ---------------------------------------------------------------------------------------------------------------------


def int4_gemm(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """y = x @ W.T + bias with the packed weight W [N, K] dequantized inside the kernel.

    x: [..., K], bfloat16 or float16 (on CPU also float32, which is exact up to float32 rounding). bias: [N], x's dtype.
    Returns [..., N] in x's dtype; sums are float32 and rounded once. Deterministic, and on a GPU a row has the same
    bits alone as in a batch of up to 16. There, many rows (more than 256, 192 in small groups, 64 to 128 with
    real zeros or with any per channel; more than some 768 on Hopper) may take a 16-bit copy of W for as long as the
    call.
    """
    args = x, weight.packed, weight.scales, weight.zeros, bias, weight.group_size, weight.shape[0]
    if _is_plain(x, optional=args[1:5]) and _is_ready(x, x.dim() and x.shape[-1], weight, bias):
        return (_int4_mm_cuda if x.is_cuda else _int4_mm_cpu)(*args)
    return torch.ops.tiny_gemm.int4_gemm(*args)


def linear(x: Tensor, weight: Tensor | Int4Weight, bias: Tensor | None = None) -> Tensor:
    """x @ W.T + bias for a weight of either kind: int4_gemm, or torch's linear for a plain tensor [N, K]."""
    return int4_gemm(x, weight, bias) if isinstance(weight, Int4Weight) else F.linear(x, weight, bias)


def _is_ready(x: Tensor, in_features: int, weight: Int4Weight, bias: Tensor | None) -> bool:
    """Whether nothing is left to check of a weight that checked its parts when it was made, and of its bias. (Checking
    all weights of a small model again is a tenth of its decode step on a CPU.)"""
    scales, zeros, device = weight.scales, weight.zeros, x.device
    return (
        weight.shape[1] == in_features
        and weight.packed.device == device == scales.device
        and not scales.requires_grad
        and (zeros is None or (zeros.device == device and not zeros.requires_grad))
        and (bias is None or (bias.device == device and bias.dtype == x.dtype and not bias.requires_grad))
        and (bias is None or bias.shape == weight.shape[:1])
    )


def _check_int4(op: str, x: Tensor, k: int, name: str, packed, scales, zeros, group_size: int, n: int) -> None:
    """The parts of an Int4Weight [n, k] as separate arguments."""
    _check_tensors(op, x, {f"{name}packed": packed, f"{name}scales": scales, f"{name}zeros": zeros})
    check_packed(packed, scales, zeros, group_size, n, k)


def _check_int4_gemm(x, packed, scales, zeros, bias, group_size, out_features) -> None:
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"int4_gemm: x has shape {tuple(x.shape)}, it must be [..., K] with K > 0")
    _check_int4("int4_gemm", x, x.shape[-1], "", packed, scales, zeros, group_size, out_features)
    _check_tensors("int4_gemm", x, {"bias": bias}, same_dtype=("bias",))
    _check_shape("int4_gemm", "bias", bias, (out_features,))


def _int4_gemm_fake(x, packed, scales, zeros, bias, group_size, out_features):
    _check_int4_gemm(x, packed, scales, zeros, bias, group_size, out_features)
    return x.new_empty((*x.shape[:-1], out_features))


def _int4_gemm_cpu(x, packed, scales, zeros, bias, group_size, out_features):
    _check_int4_gemm(x, packed, scales, zeros, bias, group_size, out_features)
    return _int4_mm_cpu(x, packed, scales, zeros, bias, group_size, out_features)


def _int4_mm_cpu(x, packed, scales, zeros, bias, group_size, out_features):
    rows, k = _rows(x), x.shape[-1]
    if _takes_aten_int4(x, group_size):
        (y,) = _aten_int4_mm(rows, [(packed, scales, zeros)], group_size, out_features)
        y = y if bias is None else y + bias
    else:
        weight = dequantize(Int4Weight(packed, scales, zeros, group_size, (out_features, k)))
        y = F.linear(rows.float(), weight, None if bias is None else bias.float()).to(x.dtype)
    return y if rows is x else y.reshape(*x.shape[:-1], out_features)


ATEN_INT4_ROWS = 64  # with more rows, dequantizing and a float32 GEMM are faster on a CPU than ATen's INT4 kernel

ATEN_INT4_BLOCK = 64  # rows that its order packs together, at most; a last block of fewer is packed in another way


def _takes_aten_int4(x: Tensor, group_size: int) -> bool:
    return x.dtype == torch.bfloat16 and group_size != -1 and x.numel() <= ATEN_INT4_ROWS * x.shape[-1]


def _aten_int4_mm(
    x: Tensor, weights: list[tuple[Tensor, Tensor, Tensor | None]], group_size: int, out_features: int
) -> tuple[Tensor, ...]:
    """x [M, K] bfloat16 @ W.T for each W [N, K] of `weights` (packed, scales, zeros), in one call of ATen's CPU kernel
    (w = (q - 8) * scale + offset, both rounded to bfloat16).

    The kernel has a packed order of its own. The weights' copy in that order is kept as an attribute of the first
    `packed`, and so lives as long as it.
    """
    parts = [t for weight in weights for t in weight if t is not None]
    try:  # a weight that somebody wrote to has another version
        version = sum([t._version for t in parts])
    except RuntimeError:  # tensors made in inference mode have none: those must not be written to
        version = 0
    state = [id(t) for t in parts], version, group_size, x.shape[1]
    copies = parts[0].__dict__.setdefault("_aten_int4", {})  # by number of weights: gate and up, or one alone
    cached = copies.get(len(weights))
    if cached is None or cached[0] != state:
        shape = out_features, x.shape[1]
        packs = [_aten_pack(Int4Weight(*weight, group_size, shape)) for weight in weights]
        integers, scales_and_offsets = torch.cat([p[0] for p in packs]), torch.cat([p[1] for p in packs], dim=1)
        cached = copies[len(weights)] = state, integers, scales_and_offsets, parts[1:]  # which keeps the ids unique
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), cached[1], group_size, cached[2])
    if y.shape[1] == out_features:
        return (y,)
    return tuple(part[:, :out_features].contiguous() for part in y.chunk(len(weights), dim=1))


def _aten_pack(weight: Int4Weight) -> tuple[Tensor, Tensor]:
    """(integers uint8 [N, K / 2], scales and offsets bfloat16 [K / group, N, 2]) as ATen wants them, N padded to tiles.

    A few tiles at a time, because the conversion wants int32; in multiples of 32 rows, because it interleaves them.
    """
    n, k = weight.shape
    tiles, step = weight.packed.shape[0], 4
    padded_n = tiles * TILE_N
    integers = torch.empty(padded_n, k // 2, dtype=torch.uint8, device="cpu")
    scales_and_offsets = torch.empty(k // weight.group_size, padded_n, 2, dtype=torch.bfloat16, device="cpu")
    for tile in range(0, tiles, step):
        part, rows = slice(tile, tile + step), slice(tile * TILE_N, min(tile + step, tiles) * TILE_N)
        zeros = None if weight.zeros is None else weight.zeros[part]
        shape = (rows.stop - rows.start, k)
        q, scale, zero = unpack(Int4Weight(weight.packed[part], weight.scales[part], zeros, weight.group_size, shape))
        integers[rows] = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1).view(-1, k // 2)
        scales_and_offsets[:, rows, 0] = scale.T.to(torch.bfloat16)
        offset = torch.zeros_like(scale) if zero is None else (SYMMETRIC_ZERO - zero.float()) * scale.float()
        scales_and_offsets[:, rows, 1] = offset.T.to(torch.bfloat16)
    return integers, scales_and_offsets


def _int4_gemm_cuda(x, packed, scales, zeros, bias, group_size, out_features):
    _check_int4_gemm(x, packed, scales, zeros, bias, group_size, out_features)
    return _int4_mm_cuda(x, packed, scales, zeros, bias, group_size, out_features)


def _int4_mm_cuda(x, packed, scales, zeros, bias, group_size, out_features):
    rows = _rows(x)
    y = _kernels().triton_gemm.int4_gemm(rows, packed, scales, zeros, bias, group_size, out_features)
    return y if rows is x else y.view(*x.shape[:-1], out_features)


def _rows(x: Tensor) -> Tensor:
    """x [..., K] as a matrix: itself where it is one, since a view costs as much host time as an allocation."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


_register(
    "int4_gemm(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? bias, int group_size, int out_features)"
    " -> Tensor",
    fake=_int4_gemm_fake,
    cpu=_int4_gemm_cpu,
    cuda=_int4_gemm_cuda,
)


# ---------------------------------------------------------------------------------------------------------------------
# fused_ffn, int4_ffn
# ---------------------------------------------------------------------------------------------------------------------


def fused_ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w_gate: Tensor | None = None,
    *,
    activation: str = "gelu",
) -> Tensor:
    """act(x @ w1 + b1) @ w2 + b2, or gated (SwiGLU, GeGLU): (act(x @ w_gate) * (x @ w1 + b1)) @ w2 + b2.

    x: [..., d]; w1, w_gate: [d, h]; b1: [h]; w2: [h, n]; b2: [n]; all of one dtype. Weights may have any strides, so
    nn.Linear.weight.t() needs no copy. activation: gelu, gelu_tanh, relu or silu. Returns [..., n].
    On a GPU this is ONE launch for up to 16 rows in bfloat16 or float16; with more rows (prefill), or in float32, it is
    cuBLAS and an elementwise kernel, which are faster there.
    """
    op = torch.ops.tiny_gemm.fused_ffn
    if _is_plain(x, w1, w2, optional=(b1, b2, w_gate)):
        op = _fused_ffn_cuda if x.is_cuda else _fused_ffn_cpu
    return op(x, w1, b1, w2, b2, w_gate, activation=activation)


def _check_activation(op: str, activation: str) -> None:
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"{op}: activation={activation!r} must be one of {', '.join(reference.ACTIVATIONS)}")


def _check_fused_ffn(x, w1, b1, w2, b2, w_gate, activation) -> None:
    op = "fused_ffn"
    _check_activation(op, activation)
    others = {"w1": w1, "b1": b1, "w2": w2, "b2": b2, "w_gate": w_gate}
    _check_tensors(op, x, others, same_dtype=tuple(others))
    if x.dim() == 0 or w1.dim() != 2 or w2.dim() != 2:
        raise ValueError(
            f"{op}: x, w1, w2 have {x.dim()}, {w1.dim()}, {w2.dim()} dimensions, they must be [..., d], [d, h], [h, n]"
        )
    d, h, n = x.shape[-1], w1.shape[1], w2.shape[1]
    if 0 in (d, h, n):
        raise ValueError(f"{op}: d={d}, h={h}, n={n} must all be positive")
    for name, t, shape in (
        ("w1", w1, (d, h)),
        ("w_gate", w_gate, (d, h)),
        ("b1", b1, (h,)),
        ("w2", w2, (h, n)),
        ("b2", b2, (n,)),
    ):
        _check_shape(op, name, t, shape)


def _fused_ffn_fake(x, w1, b1, w2, b2, w_gate=None, *, activation="gelu"):
    _check_fused_ffn(x, w1, b1, w2, b2, w_gate, activation)
    return x.new_empty((*x.shape[:-1], w2.shape[1]))


def _dense_ffn(x, w1, b1, w2, b2, w_gate, activation) -> Tensor:
    act = reference.ACTIVATIONS[activation]
    hidden = F.linear(x, w1.t(), b1)
    hidden = act(hidden) if w_gate is None else act(F.linear(x, w_gate.t())) * hidden
    return F.linear(hidden, w2.t(), b2)


def _fused_ffn_cpu(x, w1, b1, w2, b2, w_gate=None, *, activation="gelu"):
    _check_fused_ffn(x, w1, b1, w2, b2, w_gate, activation)
    return _dense_ffn(x, w1, b1, w2, b2, w_gate, activation)


def _fused_ffn_cuda(x, w1, b1, w2, b2, w_gate=None, *, activation="gelu"):
    _check_fused_ffn(x, w1, b1, w2, b2, w_gate, activation)
    rows, ffn = _rows(x), _kernels().ffn
    if rows.shape[0] > ffn.FUSED_ROWS or x.dtype == torch.float32:
        return _dense_ffn(x, w1, b1, w2, b2, w_gate, activation)
    y = ffn.fused_ffn(rows, w1, b1, w2, b2, w_gate, activation)
    return y if rows is x else y.view(*x.shape[:-1], w2.shape[1])


_register(
    "fused_ffn(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? w_gate=None, *,"
    ' str activation="gelu") -> Tensor',
    fake=_fused_ffn_fake,
    cpu=_fused_ffn_cpu,
    cuda=_fused_ffn_cuda,
)


def int4_gated_linear(x: Tensor, w: Int4Weight, w_gate: Int4Weight, *, activation: str = "silu") -> Tensor:
    """act(x @ w_gate.T) * (x @ w.T): the first half of a gated feed-forward block over packed weights.

    x: [..., K], as int4_gemm takes it; w, w_gate: [N, K], of one group size and symmetry. activation: gelu, gelu_tanh,
    relu or silu. Returns [..., N]. On a GPU this is one launch for up to 16 rows, and may start while the kernel before
    it still runs, which int4_ffn, a cooperative launch, may not: at decode this and int4_gemm are faster than int4_ffn.
    """
    if w_gate.shape != w.shape or w_gate.group_size != w.group_size:
        raise ValueError(f"int4_gated_linear: w_gate must have w's shape and group size, got {w_gate} and {w}")
    args = (
        x, w.packed, w.scales, w.zeros, w_gate.packed, w_gate.scales, w_gate.zeros, w.group_size, w.shape[0]
    )  # fmt: skip
    k = x.dim() and x.shape[-1]
    if (
        _is_plain(x, optional=args[1:7]) and activation in reference.ACTIVATIONS
        and _is_ready(x, k, w, None) and _is_ready(x, k, w_gate, None) and w_gate.symmetric == w.symmetric
    ):  # fmt: skip
        return (_int4_gated_fused if x.is_cuda else _int4_gated_composed)(*args, activation)
    return torch.ops.tiny_gemm.int4_gated_linear(*args, activation=activation)


def _check_int4_gated(
    x, packed, scales, zeros, gate_packed, gate_scales, gate_zeros, group_size, out_features, activation
) -> None:
    op = "int4_gated_linear"
    _check_activation(op, activation)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, it must be [..., K] with K > 0")
    _check_int4(op, x, x.shape[-1], "", packed, scales, zeros, group_size, out_features)
    _check_int4(op, x, x.shape[-1], "gate_", gate_packed, gate_scales, gate_zeros, group_size, out_features)
    if (gate_zeros is None) != (zeros is None):
        raise ValueError(f"{op}: w_gate and w must both be symmetric or both have zeros")


def _int4_gated_fake(x, *args, activation="silu"):
    _check_int4_gated(x, *args, activation)
    return x.new_empty((*x.shape[:-1], args[-1]))


def _int4_gated_cpu(x, *args, activation="silu"):
    _check_int4_gated(x, *args, activation)
    return _int4_gated_composed(x, *args, activation)


def _int4_gated_cuda(x, *args, activation="silu"):
    _check_int4_gated(x, *args, activation)
    return _int4_gated_fused(x, *args, activation)


def _int4_gated_fused(x, *args):
    rows, triton_gemm = _rows(x), _kernels().triton_gemm
    if rows.shape[0] > triton_gemm.DECODE_ROWS:
        return _int4_gated_composed(x, *args)
    y = triton_gemm.int4_gated_linear(rows, *args)
    return y if rows is x else y.view(*x.shape[:-1], y.shape[1])


def _int4_gated_composed(
    x, packed, scales, zeros, gate_packed, gate_scales, gate_zeros, group_size, out_features, activation, bias=None
):
    act = reference.ACTIVATIONS[activation]
    weights = (packed, scales, zeros), (gate_packed, gate_scales, gate_zeros)
    stackable = packed.shape[0] * TILE_N % ATEN_INT4_BLOCK == 0
    if stackable and not x.is_cuda and bias is None and _takes_aten_int4(x, group_size):
        up, gate = _aten_int4_mm(_rows(x), list(weights), group_size, out_features)
        return act(gate).mul_(up).view(*x.shape[:-1], out_features)
    gemm = _int4_mm_cuda if x.is_cuda else _int4_mm_cpu
    y = gemm(x, *weights[0], bias, group_size, out_features)
    return y.mul_(act(gemm(x, *weights[1], None, group_size, out_features)))


_register(
    "int4_gated_linear(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor gate_packed, Tensor gate_scales,"
    ' Tensor? gate_zeros, int group_size, int out_features, *, str activation="silu") -> Tensor',
    fake=_int4_gated_fake,
    cpu=_int4_gated_cpu,
    cuda=_int4_gated_cuda,
)


def int4_ffn(
    x: Tensor,
    w1: Int4Weight,
    b1: Tensor | None,
    w2: Int4Weight,
    b2: Tensor | None,
    w_gate: Int4Weight | None = None,
    *,
    activation: str = "gelu",
) -> Tensor:
    """fused_ffn over packed weights: w1, w_gate [h, d] and w2 [n, h], [out, in] as an Int4Weight always is.

    x: [..., d]; b1: [h]; b2: [n], in x's dtype. w_gate must have w1's group size and symmetry. Returns [..., n].
    On a GPU this is ONE launch for up to 16 rows; with more rows it is int4_gemm twice (three times when gated) with
    the activation between, which is faster there.
    """
    if w_gate is not None and (w_gate.shape != w1.shape or w_gate.group_size != w1.group_size):
        raise ValueError(f"int4_ffn: w_gate must have w1's shape and group size, got {w_gate} and {w1}")
    gate = (None, None, None) if w_gate is None else (w_gate.packed, w_gate.scales, w_gate.zeros)
    args = (
        x, w1.packed, w1.scales, w1.zeros, b1, w2.packed, w2.scales, w2.zeros, b2, *gate,
        w1.group_size, w2.group_size, w1.shape[0], w2.shape[0],
    )  # fmt: skip
    d = x.dim() and x.shape[-1]
    if (
        _is_plain(x, optional=args[1:12]) and activation in reference.ACTIVATIONS
        and _is_ready(x, d, w1, b1) and _is_ready(x, w1.shape[0], w2, b2)
        and (w_gate is None or (_is_ready(x, d, w_gate, None) and w_gate.symmetric == w1.symmetric))
    ):  # fmt: skip
        return (_int4_ffn_fused if x.is_cuda else _int4_ffn_composed)(*args, activation)
    return torch.ops.tiny_gemm.int4_ffn(*args, activation=activation)


def _check_int4_ffn(
    x, w1_packed, w1_scales, w1_zeros, b1, w2_packed, w2_scales, w2_zeros, b2, wg_packed, wg_scales, wg_zeros,
    group_size1, group_size2, hidden, out_features, activation,
) -> None:  # fmt: skip
    op = "int4_ffn"
    _check_activation(op, activation)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, it must be [..., d] with d > 0")
    d = x.shape[-1]
    _check_int4(op, x, d, "w1_", w1_packed, w1_scales, w1_zeros, group_size1, hidden)
    _check_int4(op, x, hidden, "w2_", w2_packed, w2_scales, w2_zeros, group_size2, out_features)
    if wg_packed is not None:
        _check_int4(op, x, d, "wg_", wg_packed, wg_scales, wg_zeros, group_size1, hidden)
        if (wg_zeros is None) != (w1_zeros is None):
            raise ValueError(f"{op}: w_gate and w1 must both be symmetric or both have zeros")
    _check_tensors(op, x, {"b1": b1, "b2": b2}, same_dtype=("b1", "b2"))
    _check_shape(op, "b1", b1, (hidden,))
    _check_shape(op, "b2", b2, (out_features,))


def _int4_ffn_fake(
    x, w1_packed, w1_scales, w1_zeros, b1, w2_packed, w2_scales, w2_zeros, b2, wg_packed, wg_scales, wg_zeros,
    group_size1, group_size2, hidden, out_features, *, activation="gelu",
):  # fmt: skip
    _check_int4_ffn(
        x, w1_packed, w1_scales, w1_zeros, b1, w2_packed, w2_scales, w2_zeros, b2, wg_packed, wg_scales, wg_zeros,
        group_size1, group_size2, hidden, out_features, activation,
    )  # fmt: skip
    return x.new_empty((*x.shape[:-1], out_features))


def _int4_ffn_composed(
    x, w1_packed, w1_scales, w1_zeros, b1, w2_packed, w2_scales, w2_zeros, b2, wg_packed, wg_scales, wg_zeros,
    group_size1, group_size2, hidden, out_features, activation,
):  # fmt: skip
    gemm = _int4_mm_cuda if x.is_cuda else _int4_mm_cpu
    if wg_packed is None:
        h = reference.ACTIVATIONS[activation](gemm(x, w1_packed, w1_scales, w1_zeros, b1, group_size1, hidden))
    else:
        w1, wg = (w1_packed, w1_scales, w1_zeros), (wg_packed, wg_scales, wg_zeros)
        h = _int4_gated_composed(x, *w1, *wg, group_size1, hidden, activation, b1)
    return gemm(h, w2_packed, w2_scales, w2_zeros, b2, group_size2, out_features)


def _int4_ffn_cpu(x, *args, activation="gelu"):
    _check_int4_ffn(x, *args, activation)
    return _int4_ffn_composed(x, *args, activation)


def _int4_ffn_cuda(x, *args, activation="gelu"):
    _check_int4_ffn(x, *args, activation)
    return _int4_ffn_fused(x, *args, activation)


def _int4_ffn_fused(x, *args):
    rows, ffn = _rows(x), _kernels().ffn
    if rows.shape[0] > ffn.FUSED_ROWS:
        return _int4_ffn_composed(x, *args)
    y = ffn.int4_ffn(rows, *args)
    return y if rows is x else y.view(*x.shape[:-1], y.shape[1])


_register(
    "int4_ffn(Tensor x, Tensor w1_packed, Tensor w1_scales, Tensor? w1_zeros, Tensor? b1, Tensor w2_packed,"
    " Tensor w2_scales, Tensor? w2_zeros, Tensor? b2, Tensor? wg_packed, Tensor? wg_scales, Tensor? wg_zeros,"
    ' int group_size1, int group_size2, int hidden, int out_features, *, str activation="gelu") -> Tensor',
    fake=_int4_ffn_fake,
    cpu=_int4_ffn_cpu,
    cuda=_int4_ffn_cuda,
)


# ---------------------------------------------------------------------------------------------------------------------
# rms_norm, layer_norm
# ---------------------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, residual: Tensor | None = None, *, eps: float = 1e-6):
    """y = s / sqrt(mean(s^2) + eps) * weight over the last dimension, where s = x (+ residual).

    x: [..., d]; weight: [d], any floating dtype; residual: x's shape, x's dtype or float32. Returns y in x's dtype;
    with a residual, (y, s) with s in the residual's dtype, which is the next layer's residual. One launch on a GPU.
    """
    return _rms_norm(x, residual, weight, eps)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None, *, eps: float = 1e-5
):
    """y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias over the last dimension, where s = x (+ residual).

    Shapes, dtypes and returns are those of rms_norm; bias: [d] or None.
    """
    return _layer_norm(x, residual, weight, bias, eps)


def _check_norm(op: str, x, weight, bias, residual) -> None:
    _check_tensors(op, x, {"weight": weight, "bias": bias, "residual": residual})
    shape = tuple(x.shape)
    if not shape or shape[-1] == 0:
        raise ValueError(f"{op}: x has shape {shape}, it must be [..., d] with d > 0")
    _check_shape(op, "weight", weight, shape[-1:])
    _check_shape(op, "bias", bias, shape[-1:])
    _check_shape(op, "residual", residual, shape)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{op}: {name} is {t.dtype}, it must be bfloat16, float16 or float32")
    if residual is not None and residual.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"{op}: residual is {residual.dtype}, it must be float32 or the input's {x.dtype}")


def _register_norm(name: str, plain_schema: str, add_schema: str, compute):
    """Registers `name` and `add_name`; returns a function (x, residual or None, weight, bias of a layer norm, eps) that
    calls the one or the other. compute(s float32, weight, bias, eps) -> y float32 is what the norm means on a CPU."""

    def unpack_args(args):  # (weight, eps) or (weight, bias, eps)
        return (args[0], None, args[1]) if len(args) == 2 else args

    def fake(x, *args):
        weight, bias, _ = unpack_args(args)
        _check_norm(name, x, weight, bias, None)
        return x.new_empty(x.shape)

    def add_fake(x, residual, *args):
        weight, bias, _ = unpack_args(args)
        _check_norm(name, x, weight, bias, residual)
        return x.new_empty(x.shape), residual.new_empty(x.shape)

    def cpu(x, *args):
        weight, bias, eps = unpack_args(args)
        _check_norm(name, x, weight, bias, None)
        return compute(x.float(), weight, bias, eps).to(x.dtype).contiguous()

    def add_cpu(x, residual, *args):
        weight, bias, eps = unpack_args(args)
        _check_norm(name, x, weight, bias, residual)
        s = residual.contiguous() + x if residual.dtype == torch.float32 else residual.contiguous().float() + x
        return compute(s, weight, bias, eps).to(x.dtype), s.to(residual.dtype)

    def cuda(x, *args):
        return add_cuda(x, None, *args)[0]

    def add_cuda(x, residual, *args):
        weight, bias, eps = unpack_args(args)
        _check_norm(name, x, weight, bias, residual)
        return _kernels().norm.norm(x, residual, weight, bias, eps, subtract_mean=name == "layer_norm")

    def call(x, residual, *args):
        if _is_plain(x, args[0], optional=(residual, *args[1:-1])):
            op, add_op = (cuda, add_cuda) if x.is_cuda else (cpu, add_cpu)
        else:
            op, add_op = getattr(torch.ops.tiny_gemm, name), getattr(torch.ops.tiny_gemm, f"add_{name}")
        return op(x, *args) if residual is None else add_op(x, residual, *args)

    _register(plain_schema, fake=fake, cpu=cpu, cuda=cuda)
    _register(add_schema, fake=add_fake, cpu=add_cpu, cuda=add_cuda)
    return call


def _rms_norm_cpu(s: Tensor, weight: Tensor, _bias: None, eps: float) -> Tensor:
    """F.rms_norm is composite on a CPU, and slower than this.

    For one row Python does the scalar arithmetic, which saves five torch calls; for more rows torch does it in float64
    too, so that a row's bits do not depend on the batch.
    """
    norm = torch.linalg.vector_norm(s, dim=-1, keepdim=True)
    if norm.numel() == 1:
        rms = math.sqrt(norm.item() ** 2 / s.shape[-1] + eps)
        return (s * weight).mul_(1 / rms if rms else math.inf)
    rms = norm.double().square_().div_(s.shape[-1]).add_(eps).sqrt_()
    return (s * weight).mul_(rms.reciprocal_().float())


_rms_norm = _register_norm(
    "rms_norm",
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    _rms_norm_cpu,
)
_layer_norm = _register_norm(
    "layer_norm",
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor",
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
    lambda s, weight, bias, eps: F.layer_norm(
        s, s.shape[-1:], weight.float(), None if bias is None else bias.float(), eps
    ),
)


# ---------------------------------------------------------------------------------------------------------------------
# fused_attention
# ---------------------------------------------------------------------------------------------------------------------


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(q @ k.T * scale) @ v in one launch, with grouped-query heads and without materialising the scores.

    q: [B, Hq, Lq, D]; k, v: [B, Hkv, Lk, D] with Hq a multiple of Hkv (not repeated); last dimension contiguous, other
    strides free. D: 64, 80, 96, 128 or 256. causal is aligned bottom-right: query i sees keys j <= i + Lk - Lq, as
    decoding against a cache needs; a query that sees no key gives zeros. scale: default D ** -0.5.
    dropout_p: probabilities are dropped and the rest scaled by 1 / (1 - p), as torch does; the mask is
    reference.philox_uniform of (seed, element), the same on every device.
    window: 0, or, with causal, how many of its keys a query sees: the last ones, its own included; the others are not
    read. softcap: 0, or scores become softcap * tanh(score / softcap). sinks: [Hq], bfloat16, float16 or float32, a
    score of each head that joins every row's softmax and that no value belongs to; neither scaled nor capped.
    Returns [B, Hq, Lq, D] in q's dtype, laid out as [B, Lq, Hq, D] so that the output projection needs no copy.
    """
    op = torch.ops.tiny_gemm.fused_attention
    if _is_plain(q, k, v, optional=(sinks,)):
        op = _fused_attention_cuda if q.is_cuda else _fused_attention_cpu
        # What the dispatcher would do with numbers of numpy's and tensors of one element.
        causal, dropout_p, seed = bool(causal), float(dropout_p), int(seed)
        scale = None if scale is None else float(scale)
        window, softcap = int(window), float(softcap)
    more = {"dropout_p": dropout_p, "seed": seed, "window": window, "softcap": softcap, "sinks": sinks}
    return op(q, k, v, causal=causal, scale=scale, **more)


def _check_heads(op: str, q_heads: int, kv_heads: int, head_size: int) -> None:
    if kv_heads == 0 or q_heads == 0 or q_heads % kv_heads:
        raise ValueError(f"{op}: {q_heads} query heads must be a positive multiple of {kv_heads} KV heads")
    if head_size not in HEAD_SIZES:
        raise ValueError(f"{op}: head size {head_size} must be one of {HEAD_SIZES}")


def _check_scores(op: str, q_heads: int, window: int, softcap: float, sinks: Tensor | None) -> None:
    if window < 0:
        raise ValueError(f"{op}: window={window} must be 0 (none) or how many keys a query sees")
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"{op}: softcap={softcap} must be 0 (none) or a finite number above")
    if sinks is not None:
        _check_shape(op, "sinks", sinks, (q_heads,))
        if sinks.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{op}: sinks is {sinks.dtype}, it must be bfloat16, float16 or float32")


def _check_fused_attention(
    q, k, v, *, causal=False, scale=None, dropout_p=0.0, seed=0, window=0, softcap=0.0, sinks=None
) -> None:
    op = "fused_attention"
    _check_tensors(op, q, {"k": k, "v": v, "sinks": sinks}, same_dtype=("k", "v"))
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"{op}: q, k, v have {q.dim()}, {k.dim()}, {v.dim()} dimensions, they must be [B, H, L, D]")
    b, q_heads, _, d = q.shape
    _check_heads(op, q_heads, k.shape[1], d)
    _check_shape(op, "k", k, (b, k.shape[1], k.shape[2], d))
    _check_shape(op, "v", v, tuple(k.shape))
    if 0 in (b, q.shape[2], k.shape[2]):
        raise ValueError(f"{op}: batch {b}, Lq={q.shape[2]}, Lk={k.shape[2]} must be positive")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{op}: dropout_p={dropout_p} must be at least 0 and below 1")
    if window and not causal:
        raise ValueError(f"{op}: window={window} needs causal=True: it counts back from a query's own key")
    _check_scores(op, q_heads, window, softcap, sinks)
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.stride(-1) != 1:
            raise ValueError(f"{op}: {name}'s last dimension has stride {t.stride(-1)}, it must be contiguous")


def _attention_output(q: Tensor) -> Tensor:
    b, heads, length, d = q.shape
    return q.new_empty((b, length, heads, d)).transpose(1, 2)


def _fused_attention_fake(q, k, v, **options):
    _check_fused_attention(q, k, v, **options)
    return _attention_output(q)


def _fused_attention_cpu(
    q, k, v, *, causal=False, scale=None, dropout_p=0.0, seed=0, window=0, softcap=0.0, sinks=None
):
    _check_fused_attention(q, k, v, causal=causal, dropout_p=dropout_p, window=window, softcap=softcap, sinks=sinks)
    b, q_heads, lq, d = q.shape
    kv_heads, lk = k.shape[1:3]
    out = _attention_output(q)
    window = window if window < lk else 0  # then it is no limit
    if dropout_p:
        more = {"dropout_p": dropout_p, "seed": seed, "window": window, "softcap": softcap, "sinks": sinks}
        return out.copy_(reference.fused_attention_ref(q, k, v, causal=causal, scale=scale, **more))
    if window or softcap or sinks is not None:
        return _attend_in_chunks(out, q, k, v, causal, d**-0.5 if scale is None else scale, window, softcap, sinks)
    # The query heads of a group become further rows of one head, so that K and V are not repeated.
    rows = q.reshape(b, kv_heads, q_heads // kv_heads * lq, d)
    mask = None
    if causal and lq > 1:
        mask = torch.ones(lq, lk, dtype=torch.bool, device=q.device).tril(lk - lq).repeat(q_heads // kv_heads, 1)
    y = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
    if mask is not None and lq > lk:
        y = y.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return out.copy_(y.reshape(b, q_heads, lq, d))


_QUERIES_AT_ONCE = 256  # they bound the scores that are in memory


def _attend_in_chunks(out, q, k, v, causal, scale, window, softcap, sinks) -> Tensor:
    """What torch's scaled_dot_product_attention does not compute, in float32: a few queries at a time, their keys."""
    (b, q_heads, lq, d), (kv_heads, lk) = q.shape, k.shape[1:3]
    for i in range(0, lq, _QUERIES_AT_ONCE):
        n = min(_QUERIES_AT_ONCE, lq - i)
        last = i + lk - lq  # the last key that the first of these queries sees, if causal
        begin = max(last + 1 - window, 0) if window else 0
        end = min(max(last + n, 0), lk) if causal else lk
        rows = b, kv_heads, q_heads // kv_heads * n  # a group's heads share a KV head
        scores = (q[:, :, i : i + n].float() * scale).reshape(*rows, d) @ k[:, :, begin:end].float().mT
        scores = scores.view(b, q_heads, n, end - begin)
        if softcap:
            scores.div_(softcap).tanh_().mul_(softcap)
        if causal:
            seen = torch.ones(n, end - begin, dtype=torch.bool, device=q.device).tril(last - begin)
            seen = seen.triu(last - begin - window + 1) if window else seen
            scores.masked_fill_(~seen, -math.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks.float()[:, None, None].expand(b, -1, n, 1)), dim=-1)
        p = scores.softmax(-1)[..., : end - begin]
        if causal:
            p = p.masked_fill(~seen.any(-1, keepdim=True), 0.0)
        out[:, :, i : i + n] = (p.reshape(*rows, end - begin) @ v[:, :, begin:end].float()).view(b, q_heads, n, d)
    return out


def _fused_attention_cuda(q, k, v, **options):
    _check_fused_attention(q, k, v, **options)
    return _kernels().attention.fused_attention(q, k, v, **options)


_register(
    "fused_attention(Tensor q, Tensor k, Tensor v, *, bool causal=False, float? scale=None, float dropout_p=0.0,"
    " int seed=0, int window=0, float softcap=0.0, Tensor? sinks=None) -> Tensor",
    fake=_fused_attention_fake,
    cpu=_fused_attention_cpu,
    cuda=_fused_attention_cuda,
)


# ---------------------------------------------------------------------------------------------------------------------
# decode_attention
# ---------------------------------------------------------------------------------------------------------------------


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None,
    *,
    kv_scale: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """One decode step of attention in one launch: RoPE on q and k, append to the cache, attention over the cache.

    q: [B, Hq, D]; k, v: [B, Hkv, D], the new token's; last dimension contiguous (they may be views of one QKV row).
    k_cache, v_cache: [B, Hkv, Lmax, D], last dimension contiguous, WRITTEN IN PLACE at position lengths[b]; of q's
    dtype, or both int8 or float8_e4m3fn. Those of 8 bits need kv_scale: float32 [B, Hkv, Lmax, 2], last two dimensions
    contiguous, WRITTEN IN PLACE too. A key is kv_scale[..., 0] times what k_cache holds, a value kv_scale[..., 1] times
    what v_cache holds; the largest element of each is held as 127 or 448, as quantize_kv does it. The rows of such
    caches follow each other: dimension Lmax has stride D.
    lengths: int32 [B] on the device: tokens already in the cache, negative ones count as 0. Not advanced here: all
    layers of a step share it.
    rope_cos, rope_sin: float32 [>= Lmax, R / 2], row p for position p, rotate-half pairing (d with d + R / 2) over the
    first R <= D dimensions; None for no RoPE. q_norm, k_norm: [D], the weights of an RMSNorm (with norm_eps) of each
    head of q and of k before RoPE, rounded to q's dtype as rms_norm does; None for none.
    scale: default D ** -0.5.
    window: only the last `window` tokens count, the new one included; 0: all. (Cached values before it must still be
    numbers, as those of a tile are multiplied by 0.) softcap: scores become
    softcap * tanh(score / softcap); 0: they stay. sinks: [Hq], a score for each head that joins the softmax and that no
    value belongs to. lse: float32 [B, Hq], WRITTEN IN PLACE with the natural logarithm of the softmax's denominator.
    A row with lengths[b] >= Lmax is not appended and attends to the Lmax cached tokens: a device cannot raise, so
    callers must check. Returns [B, Hq, D] in q's dtype.
    """
    op = torch.ops.tiny_gemm.decode_attention
    optional = rope_cos, rope_sin, kv_scale, q_norm, k_norm, sinks, lse
    if _is_plain(q, k, v, k_cache, v_cache, lengths, optional=optional):
        op = _decode_attention_cuda if q.is_cuda else _decode_attention_cpu
        scale, window, softcap = None if scale is None else float(scale), int(window), float(softcap)
        norm_eps = float(norm_eps)
    return op(
        q, k, v, k_cache, v_cache, lengths, rope_cos, rope_sin,
        kv_scale=kv_scale, q_norm=q_norm, k_norm=k_norm, norm_eps=norm_eps,
        scale=scale, window=window, softcap=softcap, sinks=sinks, lse=lse,
    )  # fmt: skip


def quantize_kv(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys or values x [..., D] as a cache of 8 bits holds them: (codes [..., D] of `dtype`, float32 scales [...]).

    dtype: int8 or float8_e4m3fn, in which the largest element of each vector becomes 127 or 448; TypeError for another.
    """
    if dtype not in reference.KV_LARGEST:
        raise TypeError(f"quantize_kv: dtype={dtype} must be int8 or float8_e4m3fn")
    x = x.float()
    largest = x.abs().amax(-1).clamp_(min=reference.KV_SMALLEST)
    codes = x * (reference.KV_LARGEST[dtype] / largest).unsqueeze(-1)
    if dtype == torch.int8:
        codes.round_()
    else:
        codes.clamp_(-448.0, 448.0)
    return codes.to(dtype), largest.mul_(1 / reference.KV_LARGEST[dtype])


def dequantize_kv(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What quantize_kv gave, as `dtype`."""
    return codes.float().mul_(scale.unsqueeze(-1)).to(dtype)


def _check_decode_attention(
    q, k, v, k_cache, v_cache, lengths, rope_cos=None, rope_sin=None,
    *, kv_scale=None, q_norm=None, k_norm=None, norm_eps=1e-6, scale=None, window=0, softcap=0.0, sinks=None, lse=None,
) -> None:  # fmt: skip
    op = "decode_attention"
    tensors = {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache, "lengths": lengths, "kv_scale": kv_scale}
    tensors |= {"rope_cos": rope_cos, "rope_sin": rope_sin, "q_norm": q_norm, "k_norm": k_norm}
    tensors |= {"sinks": sinks, "lse": lse}
    in_8_bits = k_cache.dtype in reference.KV_LARGEST
    _check_tensors(op, q, tensors, same_dtype=("k", "v") if in_8_bits else ("k", "v", "k_cache", "v_cache"))
    if q.dim() != 3 or k.dim() != 3 or k_cache.dim() != 4:
        raise ValueError(
            f"{op}: q, k, k_cache have {q.dim()}, {k.dim()}, {k_cache.dim()} dimensions, "
            "they must be [B, Hq, D], [B, Hkv, D], [B, Hkv, Lmax, D]"
        )
    b, q_heads, d = q.shape
    kv_heads, max_length = k_cache.shape[1:3]
    _check_heads(op, q_heads, kv_heads, d)
    if b == 0 or max_length == 0:
        raise ValueError(f"{op}: batch {b} and cache length {max_length} must be positive")
    new, cache = (b, kv_heads, d), (b, kv_heads, max_length, d)
    if not (k.shape == v.shape == new and k_cache.shape == v_cache.shape == cache and lengths.shape == (b,)):
        for name, t, shape in (("k", k, new), ("v", v, new), ("k_cache", k_cache, cache), ("v_cache", v_cache, cache)):
            _check_shape(op, name, t, shape)
        _check_shape(op, "lengths", lengths, (b,))
    if lengths.dtype != torch.int32:
        raise TypeError(f"{op}: lengths is {lengths.dtype}, it must be int32")
    if (rope_cos is None) != (rope_sin is None):
        raise ValueError(f"{op}: rope_cos and rope_sin must both be given or both be None")
    if rope_cos is not None:
        if rope_cos.dtype != torch.float32 or rope_sin.dtype != torch.float32:
            raise TypeError(f"{op}: rope_cos is {rope_cos.dtype}, rope_sin {rope_sin.dtype}; both must be float32")
        if rope_cos.dim() != 2 or rope_cos.shape != rope_sin.shape or rope_cos.shape[0] < max_length:
            raise ValueError(
                f"{op}: rope_cos {tuple(rope_cos.shape)} and rope_sin {tuple(rope_sin.shape)} must have one shape, "
                f"[at least {max_length}, R / 2]"
            )
        if not 0 < 2 * rope_cos.shape[1] <= d:
            raise ValueError(f"{op}: RoPE over {2 * rope_cos.shape[1]} dimensions must be at most the head size {d}")
    _check_qk_norm(op, d, q_norm, k_norm, norm_eps)
    _check_scores(op, q_heads, window, softcap, sinks)
    if lse is not None:
        _check_shape(op, "lse", lse, (b, q_heads))
        if lse.dtype != torch.float32:
            raise TypeError(f"{op}: lse is {lse.dtype}, it must be float32")
    k_strides, v_strides = k_cache.stride(), v_cache.stride()
    if not (q.stride()[-1] == k.stride()[-1] == v.stride()[-1] == k_strides[-1] == v_strides[-1] == 1):
        for name, t in (("q", q), ("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
            if t.stride(-1) != 1:
                raise ValueError(f"{op}: {name}'s last dimension has stride {t.stride(-1)}, it must be contiguous")
    contiguous = {"lengths": lengths, "rope_cos": rope_cos, "rope_sin": rope_sin, "q_norm": q_norm, "k_norm": k_norm}
    for name, t in (contiguous | {"sinks": sinks, "lse": lse}).items():
        if t is not None and not t.is_contiguous():
            raise ValueError(f"{op}: {name} has strides {t.stride()}, it must be contiguous")
    if k_strides != v_strides and any(
        a != b for a, b, n in zip(k_strides, v_strides, k_cache.shape, strict=True) if n > 1
    ):
        raise ValueError(f"{op}: k_cache has strides {k_strides} and v_cache {v_strides}; they must agree")
    if in_8_bits:
        _check_8_bits(op, k_cache, v_cache, kv_scale)
    elif kv_scale is not None:
        raise ValueError(f"{op}: kv_scale is for caches of int8 or float8_e4m3fn, and k_cache is {k_cache.dtype}")


def _check_8_bits(op: str, k_cache: Tensor, v_cache: Tensor, kv_scale: Tensor | None) -> None:
    if v_cache.dtype != k_cache.dtype:
        raise TypeError(f"{op}: v_cache is {v_cache.dtype} and k_cache {k_cache.dtype}; they must have one dtype")
    if kv_scale is None:
        raise ValueError(f"{op}: k_cache is {k_cache.dtype} and kv_scale None; a cache of 8 bits needs its scales")
    _check_shape(op, "kv_scale", kv_scale, (*k_cache.shape[:3], 2))
    if kv_scale.dtype != torch.float32:
        raise TypeError(f"{op}: kv_scale is {kv_scale.dtype}, it must be float32")
    if kv_scale.stride()[2:] != (2, 1):
        raise ValueError(f"{op}: kv_scale has strides {kv_scale.stride()}, the last two must be 2 and 1")
    if k_cache.shape[2] > 1 and k_cache.stride(2) != k_cache.shape[3]:
        strides, d = k_cache.stride(), k_cache.shape[3]
        raise ValueError(
            f"{op}: k_cache has strides {strides}, of a cache of 8 bits the third must be the head size {d}"
        )


def _check_qk_norm(op: str, head_size: int, q_norm: Tensor | None, k_norm: Tensor | None, norm_eps: float) -> None:
    if (q_norm is None) != (k_norm is None):
        raise ValueError(f"{op}: q_norm and k_norm must both be given or both be None")
    if q_norm is None:
        return
    for name, t in (("q_norm", q_norm), ("k_norm", k_norm)):
        _check_shape(op, name, t, (head_size,))
        if t.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{op}: {name} is {t.dtype}, it must be bfloat16, float16 or float32")
    if not 0.0 <= norm_eps < math.inf:
        raise ValueError(f"{op}: norm_eps={norm_eps} must be a finite number, 0 or above")


def _decode_attention_fake(q, *args, **options):
    _check_decode_attention(q, *args, **options)
    return q.new_empty(q.shape)


def _decode_attention_cpu(
    q, k, v, k_cache, v_cache, lengths, rope_cos=None, rope_sin=None,
    *, kv_scale=None, q_norm=None, k_norm=None, norm_eps=1e-6, scale=None, window=0, softcap=0.0, sinks=None, lse=None,
):  # fmt: skip
    options = {"kv_scale": kv_scale, "q_norm": q_norm, "k_norm": k_norm, "norm_eps": norm_eps}
    options |= {"window": window, "softcap": softcap, "sinks": sinks, "lse": lse}
    _check_decode_attention(q, k, v, k_cache, v_cache, lengths, rope_cos, rope_sin, **options)
    if q_norm is not None:
        q, k = (_rms_norm_cpu(x.float(), w, None, norm_eps).to(x.dtype) for x, w in ((q, q_norm), (k, k_norm)))
    tensors = q, k, v, k_cache, v_cache, *(() if kv_scale is None else (kv_scale,))
    rows = [tensors] if len(q) == 1 else zip(*(t.split(1) for t in tensors), strict=True)
    torch_can = not softcap and sinks is None and lse is None
    outputs = []
    for b, (n, row) in enumerate(zip(lengths.tolist(), rows, strict=True)):
        q_row, seen_k, seen_v = _append(max(n, 0), *row, rope_cos=rope_cos, rope_sin=rope_sin, window=window)
        if torch_can:
            grouped = q_row.reshape(1, k.shape[1], -1, q.shape[2])  # a group's query heads share a KV head
            y = F.scaled_dot_product_attention(grouped, seen_k, seen_v, scale=scale).view(1, *q.shape[1:])
        else:
            y = _attend_in_float32(q_row, seen_k, seen_v, scale, softcap, sinks, None if lse is None else lse[b])
        outputs.append(y)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).to(q.dtype)


def _append(length: int, q, k, v, k_cache, v_cache, kv_scale=None, *, rope_cos, rope_sin, window: int):
    """One sequence: k and v [1, Hkv, D] go to position `length`; q [1, Hq, D], rotated, and what it sees of the caches.

    Every torch call here costs some 10 us of a decode step (its code is out of the CPU's caches by then): few of them.
    """
    q_heads, (kv_heads, max_length) = q.shape[1], k_cache.shape[1:3]
    if rope_cos is not None:
        position = min(length, max_length - 1)
        cos, sin = rope_cos.narrow(0, position, 1), rope_sin.narrow(0, position, 1)
        heads = reference.rotate_half(torch.cat((q, k), dim=1).float(), cos, sin)
        q, k = heads.split_with_sizes((q_heads, kv_heads), dim=1)
    end = min(length + 1, max_length)
    begin = max(end - window, 0) if window else 0
    if kv_scale is None:
        if length < max_length:
            k_cache.select(2, length).copy_(k)
            v_cache.select(2, length).copy_(v)
        return q.to(v.dtype), k_cache.narrow(2, begin, end - begin), v_cache.narrow(2, begin, end - begin)
    seen = []
    for i, (new, codes) in enumerate(((k, k_cache), (v, v_cache))):
        scales = kv_scale.select(3, i)
        if length < max_length:
            new_codes, new_scale = quantize_kv(new, codes.dtype)
            codes.select(2, length).copy_(new_codes)
            scales.select(2, length).copy_(new_scale)
        codes, scales = (t.narrow(2, begin, end - begin) for t in (codes, scales))
        seen.append(dequantize_kv(codes, scales, torch.float32))
    return q.float(), *seen


def _attend_in_float32(q, k, v, scale: float | None, softcap: float, sinks, lse) -> Tensor:
    """q [1, Hq, D], k and v [1, Hkv, L, D] -> [1, Hq, D] with what torch's attention has no argument for."""
    _, q_heads, d = q.shape
    grouped = q.float().reshape(k.shape[1], -1, d)
    scores = grouped @ k[0].float().mT * (d**-0.5 if scale is None else scale)  # [Hkv, G, L]
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    total = scores.logsumexp(-1, keepdim=True)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.float().view_as(total))
    if lse is not None:
        lse.copy_(total.view(q_heads))
    return ((scores - total).exp() @ v[0].float()).view(q.shape).to(q.dtype)


def _decode_attention_cuda(*args, **options):
    _check_decode_attention(*args, **options)
    return _kernels().decode_attention.decode_attention(*args, **options)


_register(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths,"
    " Tensor? rope_cos=None, Tensor? rope_sin=None, *, Tensor(c!)? kv_scale=None, Tensor? q_norm=None,"
    " Tensor? k_norm=None, float norm_eps=1e-6, float? scale=None, int window=0, float softcap=0.0,"
    " Tensor? sinks=None, Tensor(d!)? lse=None) -> Tensor",
    fake=_decode_attention_fake,
    cpu=_decode_attention_cpu,
    cuda=_decode_attention_cuda,
)
