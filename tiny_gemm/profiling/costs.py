"""Bytes and flops of torch's own ops, from the shapes that the profiler recorded. What is not known stays unknown.

Bytes are the least that the op must move: every input element once (a dimension of stride 0 once in all), every output
element once. Flops count a multiply-add as two, as everywhere; only those of matrix products and attention are given,
because the others are never what limits an op.
"""

from math import prod

_ITEM_BYTES = {
    "float": 4, "double": 8, "c10::bfloat16": 2, "c10::half": 2, "long int": 8, "long": 8, "int": 4, "short": 2,
    "short int": 2, "char": 1, "signed char": 1, "unsigned char": 1, "bool": 1, "c10::float8_e4m3fn": 1,
    "c10::float8_e5m2": 1,
}  # fmt: skip
_UNARY = """abs neg exp exp2 log log2 log1p sqrt rsqrt reciprocal sin cos tanh sigmoid relu gelu silu square erf floor
    ceil round sign bitwise_not logical_not clamp clamp_min clamp_max clone contiguous hardtanh masked_fill tril triu
    _softmax _log_softmax isfinite isnan isinf nan_to_num cumsum""".split()
_BINARY = """add sub mul div pow maximum minimum fmod remainder atan2 bitwise_and bitwise_or bitwise_xor where lerp
    addcmul addcdiv rsub eq ne lt le gt ge logical_and logical_or __lshift__ __rshift__ __and__ __or__ __xor__
    bitwise_left_shift bitwise_right_shift""".split()
_POINTWISE = frozenset(_UNARY + _BINARY)
_BOOLEAN = frozenset("eq ne lt le gt ge logical_and logical_or logical_not isfinite isnan isinf".split())
# Their outputs are smaller than their inputs by the length of what is reduced, and are not counted.
_REDUCTIONS = frozenset("sum mean amax amin max min argmax argmin norm linalg_vector_norm var std prod all any".split())
_FILLS = frozenset(("fill_", "zero_"))


def op_cost(name: str, dims: list | None, types: list | None, strides: list | None) -> tuple[float, float] | None:
    """(bytes, flops) of one call of a torch op from the profiler's "Input Dims", "Input type" and "Input Strides", as
    record_shapes=True writes them; None where they do not tell."""
    if not name.startswith("aten::") or not dims or not types or len(dims) != len(types):
        return None
    strides = strides if strides and len(strides) == len(dims) else [None] * len(dims)
    try:
        return _aten_cost(name.removeprefix("aten::"), dims, [str(t).lower() for t in types], strides)
    except (IndexError, TypeError, KeyError, ValueError):  # shapes of another kind than the op's schema has
        return None


def _aten_cost(op: str, dims: list, types: list[str], strides: list) -> tuple[float, float] | None:
    def item(i: int) -> int:
        return _ITEM_BYTES[types[i]]

    def read(i: int) -> float:
        """Bytes of input i; what is expanded (stride 0) is read once."""
        steps = strides[i] or [1] * len(dims[i])
        return float(prod(d for d, s in zip(dims[i], steps, strict=True) if s != 0) * item(i))

    def is_tensor(i: int) -> bool:
        return i < len(dims) and types[i] in _ITEM_BYTES

    def product(a: int, b: int, output: list[int], inner: int) -> tuple[float, float]:
        return read(a) + read(b) + prod(output) * item(a), 2.0 * prod(output) * inner

    match op:
        case "mm":
            return product(0, 1, [dims[0][0], dims[1][1]], dims[0][1])
        case "bmm":
            return product(0, 1, [dims[0][0], dims[0][1], dims[1][2]], dims[0][2])
        case "addmm":
            total, flops = product(1, 2, [dims[1][0], dims[2][1]], dims[1][1])
            return total + read(0), flops
        case "baddbmm":
            total, flops = product(1, 2, [dims[1][0], dims[1][1], dims[2][2]], dims[1][2])
            return total + read(0), flops
        case "linear":
            total, flops = product(0, 1, [*dims[0][:-1], dims[1][0]], dims[0][-1])
            return total + (read(2) if is_tensor(2) else 0.0), flops
        case "mv":
            return product(0, 1, [dims[0][0]], dims[0][1])
        case "_weight_int4pack_mm_for_cpu":
            n, k = dims[1][0], dims[0][1]
            return read(0) + read(1) + read(3) + dims[0][0] * n * item(0), 2.0 * dims[0][0] * n * k
        case "_weight_int4pack_mm":  # packed int32 [N / 8, K / (16 t), 32, t / 2]
            n, k = 8 * dims[1][0], dims[0][1]
            return read(0) + read(1) + read(3) + dims[0][0] * n * item(0), 2.0 * dims[0][0] * n * k
        case "copy_":
            return read(1) + prod(dims[0]) * item(0), 0.0
        case "embedding":
            row = dims[0][1] * item(0)
            return 2.0 * prod(dims[1]) * row + read(1), 0.0
    if op in _FILLS:
        return float(prod(dims[0]) * item(0)), 0.0
    heads_first = op.startswith("_scaled_dot_product") or op == "_cudnn_attention_forward"  # [B, H, L, D]
    if heads_first or op in ("_flash_attention_forward", "_efficient_attention_forward"):  # [B, L, H, D]
        if len(dims[0]) != 4:  # a ragged batch, whose lengths are in another tensor
            return None
        length = dims[1][2] if heads_first else dims[1][1]  # of keys; causal ones are counted in full
        return read(0) + read(1) + read(2) + prod(dims[0]) * item(0), 4.0 * prod(dims[0]) * length
    if op in _REDUCTIONS:
        return read(0), 0.0
    in_place = op.endswith("_") and not op.endswith("__")
    if (op.removesuffix("_") if in_place else op) in _POINTWISE:
        tensors = [i for i in range(len(dims)) if is_tensor(i)]
        inputs = [i for i in tensors if dims[i]]
        if not inputs:
            return None
        output = dims[0] if in_place else _broadcast([dims[i] for i in inputs])
        written = item(0) if in_place else 1 if op in _BOOLEAN else max(item(i) for i in inputs)
        return sum(map(read, inputs)) + prod(output) * written, 0.0
    return None


def _broadcast(shapes: list[list[int]]) -> list[int]:
    rank = max(map(len, shapes))
    padded = [[1] * (rank - len(s)) + s for s in shapes]
    return [max(column) if min(column) > 0 else 0 for column in zip(*padded, strict=True)]
