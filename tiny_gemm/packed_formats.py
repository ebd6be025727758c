"""4-bit weights as other tools store them: GPTQ, AWQ, compressed-tensors' pack-quantized, and HQQ. Plain torch.

    form = PackedFormat.from_config(config["quantization_config"])     or a ValueError that says why not
    q, scales, zeros, group_size = form.unpack(parts)                  the tensors of one linear, ready for pack
    order = form.input_order(parts[form.order_part])                   None, or which input each column of q meets

All are w = (q - zero) * scale with integers from 0 to 15, so they become an Int4Weight without loss: the integers and
the scales as they are, zero points as int16 where all are integers (HQQ's may be), and None where all are 8: symmetric.
The first three store eight nibbles in an int32, nibble i being bits 4 * i to 4 * i + 3, and HQQ two in a byte:

    GPTQ    qweight [K / 8, N]    nibble i of row r is the weight of column 8 * r + i of K
    AWQ     qweight [K, N / 8]    nibble i of column c is the weight of row 8 * c + (0, 2, 4, 6, 1, 3, 5, 7)[i] of N
    compressed-tensors            weight_packed [N, K / 8], nibble i of column c is the weight of column 8 * c + i of K
    HQQ     W_q [groups / 2, g]   the weights as rows of one group each: the high nibbles are the first half of all rows

GPTQ (desc_act) and compressed-tensors (actorder: group) may quantize columns in the order of their activations: g_idx
then says the group of each column, and groups are scattered over K. unpack sorts the columns by group, which makes the
groups contiguous again, and input_order tells where each column came from.

Sources: the packing of qweight and qzeros in AutoGPTQ and GPTQModel (checkpoint_format gptq and gptq_v2), of
WQLinear_GEMM in AutoAWQ, of PackedQuantizationCompressor in compressed-tensors, and of HQQLinear.state_dict in hqq 0.2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiny_gemm.quantize_utils import GROUP_SIZES, LARGEST_ZERO, SYMMETRIC_ZERO

Unpacked = tuple[Tensor, Tensor, Tensor | None, int]  # q uint8 [N, K], scales, zeros [N, groups] or None, group size

METHODS = ("gptq", "awq", "compressed-tensors", "hqq")
# Tensors of one linear, under its name: the one that it is known by, others that it must have, and those that it may.
_PARTS = {
    "gptq": ("qweight", ("qzeros", "scales"), ("g_idx",)),
    "awq": ("qweight", ("qzeros", "scales"), ()),
    "compressed-tensors": ("weight_packed", ("weight_scale", "weight_shape"), ("weight_g_idx",)),
    "hqq": (  # every setting of a layer is a tensor of its own
        "W_q",
        ("scale", "zero", "shape", "nbits", "axis", "group_size", "packing"),
        ("quant_scale", "quant_zero", "channel_wise", "optimize", "round_zero", "view_as_float", "unpack_view_dtype")
        + ("compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config"),
    ),
}
_ORDERS = {"gptq": "g_idx", "compressed-tensors": "weight_g_idx"}  # the tensor that holds each column's group
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the row that each nibble of an int32 holds, of eight
_INTEGERS = (torch.int32, torch.int64)
_SCALES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class PackedFormat:
    """What a quantization_config says. method: one of METHODS. group_size: 32, 64, 128 or -1 (one group a row); None:
    each linear says its own (HQQ).

    zero_offset: what is added to a stored zero point (GPTQ's first format stores one less than it means).
    has_zeros: whether zero points are stored at all. ordered: whether columns were quantized in another order than
    their own (desc_act), so that each linear must state its columns' groups.
    """

    method: str
    group_size: int | None
    zero_offset: int = 0
    has_zeros: bool = True
    ordered: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "PackedFormat":
        """Of config.json's quantization_config; ValueError for anything that would not come through without loss."""
        method = config.get("quant_method")
        if method == "bitsandbytes":
            raise ValueError(
                "quant_method='bitsandbytes' is not supported: nf4 and fp4 take their 16 values from a table, which no "
                "scale and zero point describe, and the rest has 8 bits. Take the 16-bit checkpoint and quantize that"
            )
        if method not in METHODS:
            raise ValueError(
                f"quant_method={method!r} is not supported; supported: tiny_gemm, {', '.join(METHODS)}. "
                "Take the 16-bit checkpoint and quantize that"
            )
        if method == "compressed-tensors":
            return cls._from_compressed_tensors(config)
        if method == "hqq":
            return cls._from_hqq(config)
        _require(method, "bits", config.get("bits"), 4)
        group_size = config.get("group_size")
        _require(method, "group_size", group_size, *GROUP_SIZES)
        if method == "awq":
            layout = next(filter(None, map(config.get, ("version", "checkpoint_format", "format"))), "gemm")
            _require(method, "version", str(layout).lower(), "gemm")
            _require(method, "zero_point", config.get("zero_point", True), True)
            return cls(method, group_size)
        layout = config.get("checkpoint_format") or config.get("format") or "gptq"
        _require(method, "checkpoint_format", layout, "gptq", "gptq_v2")
        _require(method, "is_marlin_format", config.get("is_marlin_format") or False, False)
        dynamic = config.get("dynamic") or {}  # what some layers have of their own; "-:" are those left in 16 bits
        if not isinstance(dynamic, dict) or not all(pattern.startswith("-:") for pattern in dynamic):
            raise ValueError(f"quant_method='gptq' is not supported with dynamic={dynamic!r}: all layers must be alike")
        return cls(method, group_size, zero_offset=int(layout == "gptq"), ordered=bool(config.get("desc_act")))

    @classmethod
    def _from_compressed_tensors(cls, config: Mapping[str, Any]) -> "PackedFormat":
        method = "compressed-tensors"
        _require(method, "format", config.get("format"), "pack-quantized")
        _require(method, "kv_cache_scheme", config.get("kv_cache_scheme") or None, None)
        _require(method, "transform_config", config.get("transform_config") or None, None)
        sparsity = config.get("sparsity_config") or {}
        sparsity = sparsity.get("format") if isinstance(sparsity, dict) else sparsity
        _require(method, "sparsity_config.format", sparsity, None, "dense")
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise ValueError(f"quant_method={method!r} needs config_groups, a JSON object that is not empty")
        found = set()
        for name, group in groups.items():
            weights = group.get("weights") if isinstance(group, dict) else None
            if not isinstance(weights, dict):
                raise ValueError(f"quant_method={method!r}: config_groups.{name} must say what its weights are")
            for key in ("input_activations", "output_activations"):
                _require(method, key, group.get(key), None)
            _require(method, "format", group.get("format"), None, "pack-quantized")
            _require(method, "num_bits", weights.get("num_bits"), 4)
            _require(method, "type", weights.get("type", "int"), "int")
            _require(method, "symmetric", weights.get("symmetric", True), True, False)
            _require(method, "strategy", strategy := weights.get("strategy"), "group", "channel")
            group_size = -1 if strategy == "channel" else weights.get("group_size")
            _require(method, "group_size", group_size, *GROUP_SIZES)
            _require(method, "actorder", order := weights.get("actorder"), None, False, "weight", "static", "group")
            found.add((group_size, not weights.get("symmetric", True), order == "group"))
        if len(found) > 1:
            names = ", ".join(groups)
            raise ValueError(
                f"quant_method={method!r}: config_groups {names} must agree in group_size, symmetric, actorder"
            )
        group_size, has_zeros, ordered = found.pop()
        return cls(method, group_size, has_zeros=has_zeros, ordered=ordered)

    @classmethod
    def _from_hqq(cls, config: Mapping[str, Any]) -> "PackedFormat":
        """quant_config is hqq's settings for all linears, or one such object by a linear's name in its layer."""
        method = "hqq"
        settings = config.get("quant_config")
        if not isinstance(settings, dict) or not settings:
            raise ValueError(f"quant_method={method!r} needs quant_config, a JSON object that is not empty")
        by_linear = {"": settings} if "weight_quant_params" in settings else settings
        for name, of_linear in by_linear.items():
            if of_linear is None:  # this one stays in 16 bits
                continue
            at = f"quant_config.{name}".rstrip(".")
            weights = of_linear.get("weight_quant_params") if isinstance(of_linear, dict) else None
            if not isinstance(weights, dict):
                raise ValueError(f"quant_method={method!r}: {at} must say what its weight_quant_params are")
            _require(method, "nbits", weights.get("nbits"), 4)
            _check_axis(weights.get("axis"))
            _require(method, "group_size", weights.get("group_size"), *GROUP_SIZES[:-1], None)
            _require(method, "channel_wise", weights.get("channel_wise", True), True)
            for key in ("scale_quant_params", "zero_quant_params"):
                _require(method, key, of_linear.get(key), None)
        return cls(method, None)

    def linear_of(self, name: str) -> str | None:
        """The linear whose packed integers the tensor `name` holds, or None: a.b.qweight is those of a.b."""
        stem, _, part = name.rpartition(".")
        return stem if stem and part == _PARTS[self.method][0] else None

    @property
    def parts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(tensors that a linear must have, tensors that it may have)."""
        first, needed, optional = _PARTS[self.method]
        zeros = ("weight_zero_point",) if self.method == "compressed-tensors" and self.has_zeros else ()
        return ((first, *needed, *zeros, *optional), ()) if self.ordered else ((first, *needed, *zeros), optional)

    @property
    def shape_part(self) -> str | None:
        """The tensor that says a linear's shape, where that of its packed integers does not."""
        return "shape" if self.method == "hqq" else None

    @property
    def order_part(self) -> str | None:
        """The tensor of a linear that input_order takes, if there is one."""
        return _ORDERS.get(self.method)

    def shape(self, stored: tuple[int, ...], shape: Tensor | None = None) -> tuple[int, int]:
        """(N, K) of the linear whose packed integers have the shape `stored`; shape: what shape_part names."""
        if len(stored) != 2:
            raise ValueError(f"{_PARTS[self.method][0]} must have two dimensions, got {stored}")
        if shape is not None:
            return _pair({"shape": shape}, "shape")
        rows, cols = stored
        return {"gptq": (cols, 8 * rows), "awq": (8 * cols, rows)}.get(self.method, (rows, 8 * cols))

    def unpack(self, parts: Mapping[str, Tensor]) -> Unpacked:
        """The tensors of one linear, by the names in `parts`; ValueError for one of a wrong shape or type."""
        if self.method == "gptq":
            return unpack_gptq(parts, self.group_size, zero_offset=self.zero_offset)
        if self.method == "awq":
            return unpack_awq(parts, self.group_size)
        if self.method == "hqq":
            return unpack_hqq(parts)
        return unpack_compressed_tensors(parts, self.group_size, has_zeros=self.has_zeros)

    def input_order(self, groups: Tensor) -> Tensor | None:
        """int32 [K]: column i of what unpack returns is column order[i] of the linear's own weight, so that it meets
        input order[i]. None where all columns are in their places. groups: the tensor that order_part names.
        """
        return _input_order(groups, self.order_part, self.group_size)


def unpack_gptq(parts: Mapping[str, Tensor], group_size: int, *, zero_offset: int) -> Unpacked:
    """GPTQ: qweight int32 [K / 8, N], qzeros int32 [groups, N / 8], scales [groups, N]; g_idx int [K] if there.

    qweight holds eight neighbours along K in an int32, qzeros eight along N, the first in the lowest bits. zero_offset:
    1 for checkpoint_format gptq, which stores zero - 1, and 0 for gptq_v2. g_idx[k] is the group of column k, by which
    the columns are sorted.
    """
    qweight = _matrix(parts, "qweight")
    n, k = qweight.shape[1], 8 * qweight.shape[0]
    groups = _groups(k, group_size)
    _expect(parts, "scales", _SCALES, (groups, n))
    _expect(parts, "qzeros", (torch.int32,), (groups, _whole(n, "N") // 8))
    stored = _nibbles(parts["qzeros"]).view(groups, n)
    if zero_offset and bool((stored == 15).any()):
        # Some readers make 16 of it and others 0, some of them with a carry into the next zero.
        raise ValueError("qzeros holds 15, which checkpoint_format='gptq' leaves open (0 or 16); convert it to gptq_v2")
    q = _by_group(_nibbles(qweight).view(k // 8, n, 8).transpose(0, 1).reshape(n, k), parts, "g_idx", group_size)
    return q, *_affine(parts["scales"].T, stored.T + zero_offset), group_size


def unpack_awq(parts: Mapping[str, Tensor], group_size: int) -> Unpacked:
    """AWQ's GEMM layout: qweight int32 [K, N / 8], qzeros int32 [groups, N / 8], scales [groups, N].

    Both hold eight neighbours along N in an int32, from the lowest bits in the order 0, 2, 4, 6, 1, 3, 5, 7.
    """
    qweight = _matrix(parts, "qweight")
    k, n = qweight.shape[0], 8 * qweight.shape[1]
    groups = _groups(k, group_size)
    _expect(parts, "scales", _SCALES, (groups, n))
    _expect(parts, "qzeros", (torch.int32,), (groups, n // 8))
    nibble_of = [_AWQ_ORDER.index(i) for i in range(8)]
    in_order = lambda t: _nibbles(t).view(-1, n // 8, 8)[..., nibble_of].view(-1, n)  # noqa: E731
    return in_order(qweight).T.contiguous(), *_affine(parts["scales"].T, in_order(parts["qzeros"]).T), group_size


def unpack_compressed_tensors(parts: Mapping[str, Tensor], group_size: int, *, has_zeros: bool) -> Unpacked:
    """compressed-tensors' pack-quantized: weight_packed int32 [N, K / 8], weight_scale [N, groups], weight_shape = (N,
    K); weight_zero_point int32 [N / 8, groups] if has_zeros; weight_g_idx int [K] as in GPTQ, if there.

    Integers and zero points are signed, -8 to 7, and stored with 8 added; weight_packed holds eight neighbours along K
    in an int32 and weight_zero_point eight along N, the first in the lowest bits, and both are padded to whole int32s.
    """
    packed = _matrix(parts, "weight_packed")
    n, k = _pair(parts, "weight_shape")
    if n != packed.shape[0] or -(-k // 8) != packed.shape[1]:
        raise ValueError(
            f"weight_packed {tuple(packed.shape)} does not hold weight_shape=({n}, {k}), eight to an int32"
        )
    groups = _groups(k, group_size)
    _expect(parts, "weight_scale", _SCALES, (n, groups))
    q = _by_group(_nibbles(packed)[:, :k].contiguous(), parts, "weight_g_idx", group_size)
    if not has_zeros:
        return q, parts["weight_scale"].contiguous(), None, group_size
    _expect(parts, "weight_zero_point", (torch.int32,), (-(-n // 8), groups))
    zeros = _nibbles(parts["weight_zero_point"].T)[:, :n].T
    return q, *_affine(parts["weight_scale"], zeros), group_size


def unpack_hqq(parts: Mapping[str, Tensor]) -> Unpacked:
    """HQQ with axis 1: W_q uint8 [N * K / g / 2, g], scale and zero [N * K / g, 1]; shape = (N, K), group_size = g,
    nbits = 4, axis = 1 and packing = "4bit_u8" (its characters) are tensors too.

    The weights are cut along K into rows of one group each, and the byte of two weights holds that of the first half of
    all rows in its high nibble. A W_q of a floating-point type is those bytes all the same (view_as_float).
    """
    for name, wanted in (("nbits", 4), ("quant_scale", 0), ("quant_zero", 0), ("channel_wise", 1)):
        if name in parts:
            _require("hqq", name, _number(parts, name), wanted)
    _check_axis(_number(parts, "axis"))
    characters = parts["packing"]
    is_text = characters.dtype in (torch.uint8, *_INTEGERS)
    if not is_text or bool(((characters < 0) | (characters > 127)).any()):
        raise ValueError(f"packing must hold characters, got {characters.dtype} {tuple(characters.shape)}")
    packing = "".join(map(chr, characters.flatten().tolist()))
    _require("hqq", "packing", packing, "4bit_u8")
    (n, k), g = _pair(parts, "shape"), _number(parts, "group_size")
    group_size = -1 if g == k else g
    rows = n * _groups(k, group_size)
    packed = parts["W_q"]
    if packed.dtype in _SCALES:
        packed = packed.contiguous().view(torch.uint8)
    if packed.dtype != torch.uint8 or packed.shape != (rows // 2, g) or rows % 2:
        raise ValueError(
            f"W_q must hold {rows} groups of {g}, two to a byte, got {parts['W_q'].dtype} {tuple(parts['W_q'].shape)}"
        )
    for name in ("scale", "zero"):
        _expect(parts, name, _SCALES, (rows, 1))
    q = torch.cat((packed >> 4, packed & 15)).view(n, k)
    return q, *_affine(parts["scale"].reshape(n, -1), parts["zero"].reshape(n, -1)), group_size


def _nibbles(words: Tensor) -> Tensor:
    """int32 [R, C] -> uint8 [R, 8 * C], the lowest four bits first.

    By bytes, since shifted int32s would take four times the memory; little-endian, as all that PyTorch's wheels run on.
    Flat first: contiguous() leaves a single column's stride as it is, and a view as bytes wants 1.
    """
    pairs = words.contiguous().view(-1).view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).view(words.shape[0], -1)


def _affine(scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points [N, groups] as pack wants them."""
    if bool((zeros == SYMMETRIC_ZERO).all()):
        return scales.contiguous(), None
    if bool(((zeros >= 0) & (zeros <= LARGEST_ZERO) & (zeros == zeros.to(torch.int16))).all()):
        zeros = zeros.to(torch.int16)
    return scales.contiguous(), zeros.contiguous()


def _groups(k: int, group_size: int) -> int:
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size={group_size} must be one of {GROUP_SIZES} (-1: per-channel)")
    if group_size != -1 and k % group_size:
        raise ValueError(f"K={k} must be a multiple of group_size={group_size}")
    return 1 if group_size == -1 else k // group_size


def _whole(size: int, name: str) -> int:
    if size % 8:
        raise ValueError(f"{name}={size} must be a multiple of 8, the integers in an int32")
    return size


def _by_group(q: Tensor, parts: Mapping[str, Tensor], name: str, group_size: int) -> Tensor:
    """q [N, K] with its columns sorted by the groups in parts[name], if those are there."""
    if name not in parts:
        return q
    _expect(parts, name, _INTEGERS, (q.shape[1],))
    order = _input_order(parts[name], name, group_size)
    return q if order is None else q[:, order.long()]


def _input_order(groups: Tensor, name: str, group_size: int) -> Tensor | None:
    """The columns sorted by their group, int32 [K], or None where they are so already; groups: int [K]."""
    if groups.dtype not in _INTEGERS or groups.dim() != 1 or not len(groups):
        raise ValueError(f"{name} must hold an integer for each column, got {groups.dtype} {tuple(groups.shape)}")
    k = len(groups)
    count = _groups(k, group_size)
    size = k // count
    sizes = dict(zip(*(t.tolist() for t in groups.unique(return_counts=True)), strict=True))
    for group in sorted({*sizes, *range(count)}):
        found, wanted = sizes.get(group, 0), size if 0 <= group < count else 0
        if found != wanted:
            raise ValueError(
                f"{name} names group {group} {found} times, but must name each of 0 to {count - 1} {size} times"
            )
    if bool((groups == torch.arange(k) // size).all()):
        return None
    return groups.argsort(stable=True).int()


def _check_axis(axis: Any) -> None:
    if type(axis) is not int or axis != 1:
        raise ValueError(
            f"quant_method='hqq' is not supported with axis={axis!r}; supported: 1. Groups of axis 0 run along N, but "
            "those of an Int4Weight along K: quantize again with axis=1"
        )


def _number(parts: Mapping[str, Tensor], name: str) -> int:
    t = parts[name]
    if t.dtype not in (torch.uint8, *_INTEGERS) or t.numel() != 1:
        raise ValueError(f"{name} must hold one integer, got {t.dtype} {tuple(t.shape)}")
    return int(t)


def _pair(parts: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    _expect(parts, name, _INTEGERS, (2,))
    n, k = parts[name].tolist()
    if min(n, k) < 1:
        raise ValueError(f"{name}=({n}, {k}) must hold two positive integers")
    return n, k


def _matrix(parts: Mapping[str, Tensor], name: str) -> Tensor:
    t = parts[name]
    if t.dtype != torch.int32 or t.dim() != 2 or 0 in t.shape:
        raise ValueError(f"{name} must be a non-empty int32 matrix, got {t.dtype} {tuple(t.shape)}")
    return t


def _expect(parts: Mapping[str, Tensor], name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    t = parts[name]
    if t.dtype not in dtypes or t.shape != shape:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name} must be {wanted} {shape}, got {t.dtype} {tuple(t.shape)}")


def _require(method: str, key: str, value: Any, *supported: Any) -> None:
    # by type too, since 1 == True and 4 == 4.0
    if not any(type(value) is type(s) and value == s for s in supported):
        rule = ", ".join(map(repr, supported))
        raise ValueError(f"quant_method={method!r} is not supported with {key}={value!r}; supported: {rule}")
