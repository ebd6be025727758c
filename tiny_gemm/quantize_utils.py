"""The INT4 weight format: quantize, pack, save. Plain torch; the one place that knows the packed order.

A linear layer's weight W [N, K] (y = x @ W.T) is stored as 4-bit integers q with one scale, and optionally one zero
point, for each group of `group_size` neighbours along K:

    w[n, k] = (q[n, k] - zero[n, k // group_size]) * scale[n, k // group_size]

Symmetric weights have zero = 8 everywhere and store none. Zeros are real numbers, as HQQ's and those of GGUF's Q4_1, or
integers from 0 to LARGEST_ZERO in int16, as GPTQ's and AWQ's. Those of groups cost a GPU less: the INT4 GEMM subtracts
them before the product. All these formats map into this one without loss.

Packed order. Rows are cut into tiles of TILE_N = 16 and columns into units of U = 128 (64 when 128 does not divide K);
a tile's units lie one behind the other, so that a block of the GPU kernel reads one contiguous stream, 16 bytes a
thread:

    packed  int16 [N / 16, K / U, 16, U / 4]            nibble j of column c holds q[n, U * unit + U / 4 * j + c]
    scales        [N / 16, K / group_size / 2, 16, 2]   those of two neighbouring groups lie side by side;
    zeros         [N / 16, K / group_size / 2, 16, 2]   per channel [N / 16, 1, 16, 1]

With this nibble order the four nibbles of a column meet four contiguous slices of x, so the kernel unpacks in registers
and needs no shuffle. Scales come in pairs because a GPU fetches ahead only what it loads 4 bytes and more at a time. N
and K are padded to whole tiles and units with zero weights, and an odd number of groups by one.
"""

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

TILE_N = 16
GROUP_SIZES = (32, 64, 128, -1)  # -1: one group a row (per-channel)
SYMMETRIC_ZERO = 8
LARGEST_ZERO = 127  # of integers
FORMAT_NAME = "tiny-gemm-int4"
FORMAT_VERSION = "2"

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_ZEROS = (*_FLOATS, torch.int16)
_SEARCH_SHRINKS = tuple(1.05 - 0.025 * i for i in range(21))  # candidate scales over the plain one: 1.05 to 0.55
_WEIGHTS_AT_ONCE = 2**22  # what quantize works on at a time: bounds its peak memory to some 80 MiB


def unit_k(k: int) -> int:
    """Columns in one packed unit of a weight with K = k columns: 128, or 64 when 128 does not divide k."""
    return 128 if k % 128 == 0 else 64


@dataclass(frozen=True, eq=False)
class Int4Weight:
    """A packed INT4 weight of `shape` (N, K), used as y = x @ W.T; the module's docstring gives the layout.

    packed: int16 [N / 16, K / U, 16, U / 4]. scales: fp16, bf16 or fp32 [N / 16, groups / 2, 16, 2]. zeros: like scales
    in shape, any of the same dtypes, or int16 from 0 to LARGEST_ZERO (pack and load_packed see to that; with others a
    GPU's results are wrong), or None for symmetric weights. group_size: 32, 64, 128 or -1 (one group a row). Kernels
    read a weight before the kernel in front of them has ended: after writing into its parts on a GPU, synchronize.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    group_size: int
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        check_packed(self.packed, self.scales, self.zeros, self.group_size, *self.shape)

    @property
    def out_features(self) -> int:
        return self.shape[0]

    @property
    def in_features(self) -> int:
        return self.shape[1]

    @property
    def device(self) -> torch.device:
        return self.packed.device

    @property
    def symmetric(self) -> bool:
        return self.zeros is None

    @property
    def nbytes(self) -> int:
        """Bytes of the packed integers, scales and zeros together."""
        return sum(t.numel() * t.element_size() for t in (self.packed, self.scales, self.zeros) if t is not None)

    @property
    def compression(self) -> float:
        """How many times smaller than the same weight in float32."""
        return 4 * self.shape[0] * self.shape[1] / self.nbytes

    def to(self, device: torch.device | str) -> "Int4Weight":
        zeros = None if self.zeros is None else self.zeros.to(device)
        return Int4Weight(self.packed.to(device), self.scales.to(device), zeros, self.group_size, self.shape)

    def __repr__(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        group = "per-channel" if self.group_size == -1 else f"group {self.group_size}"
        return (
            f"Int4Weight({self.shape[0]} x {self.shape[1]}, {group}, {kind}, {self.nbytes / 2**20:.2f} MiB, "
            f"{self.compression:.2f}x smaller than float32, {self.device})"
        )


def packed_shapes(n: int, k: int, group_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of packed, and of scales and zeros, of a weight [n, k]; ValueError where the group size does not fit k."""
    _check_group_size(k, group_size)
    unit = unit_k(k)
    tiles, units = _ceil_div(n, TILE_N), _ceil_div(k, unit)
    pairs = (1, 1) if group_size == -1 else (_ceil_div(units * unit, 2 * group_size), 2)
    return (tiles, units, TILE_N, unit // 4), (tiles, pairs[0], TILE_N, pairs[1])


def check_packed(packed: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, n: int, k: int) -> None:
    """ValueError unless the parts are those of an Int4Weight [n, k]. Cheap: the ops call it every time."""
    packed_shape, scales_shape = packed_shapes(n, k, group_size)
    _check_tensor("packed", packed, (torch.int16,), packed_shape, n, k)
    _check_tensor("scales", scales, _FLOATS, scales_shape, n, k)
    if zeros is not None:
        _check_tensor("zeros", zeros, _ZEROS, scales_shape, n, k)


def check_integer_zeros(zeros: Tensor | None) -> None:
    """ValueError where zeros of int16 are not from 0 to LARGEST_ZERO. Reads them, so not at every call."""
    if zeros is not None and zeros.dtype == torch.int16:
        for zero in (int(zeros.min()), int(zeros.max())):
            if not 0 <= zero <= LARGEST_ZERO:
                raise ValueError(f"zeros hold {zero}; integer zeros must be from 0 to {LARGEST_ZERO}")


def pack(q: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int) -> Int4Weight:
    """Packs integers q (uint8 [N, K], 0 to 15) with scales and zeros ([N, K / group_size] or, per channel, [N, 1]);
    zeros are floating point, or int16 from 0 to LARGEST_ZERO."""
    if q.dim() != 2 or q.dtype != torch.uint8 or 0 in q.shape:
        raise ValueError(f"q must be a non-empty uint8 matrix [N, K], got {q.dtype} {tuple(q.shape)}")
    n, k = q.shape
    _check_group_size(k, group_size)
    groups = 1 if group_size == -1 else k // group_size
    scales, zeros = scales.contiguous(), None if zeros is None else zeros.contiguous()
    _check_tensor("scales", scales, _FLOATS, (n, groups), n, k)
    if zeros is not None:
        _check_tensor("zeros", zeros, _ZEROS, (n, groups), n, k)
    if int(q.max()) > 15:
        raise ValueError(f"q holds {int(q.max())}, but a 4-bit weight is at most 15")
    check_integer_zeros(zeros)
    unit = unit_k(k)
    tiles, units, cols = _ceil_div(n, TILE_N), _ceil_div(k, unit), unit // 4
    padded_k = units * unit

    if (n, k) != (tiles * TILE_N, padded_k):
        q = torch.nn.functional.pad(q, (0, padded_k - k, 0, tiles * TILE_N - n), value=SYMMETRIC_ZERO)
    planes = q.view(tiles, TILE_N, units, 4, cols).permute(3, 0, 2, 1, 4)  # [4, tiles, units, 16, cols]
    low, high = planes[0] | (planes[1] << 4), planes[2] | (planes[3] << 4)
    packed = torch.stack((low, high), dim=-1).view(torch.int16).squeeze(-1)

    _, (_, pairs, _, pair) = packed_shapes(n, k, group_size)
    to_tiles = lambda t: (  # noqa: E731
        _pad_to(t, tiles * TILE_N, pairs * pair).view(tiles, TILE_N, pairs, pair).transpose(1, 2).contiguous()
    )
    weight = Int4Weight(packed, to_tiles(scales), None if zeros is None else to_tiles(zeros), group_size, (n, k))
    if q.is_cuda:  # kernels read weights before they wait for the kernel before them: these must be in memory by then
        torch.cuda.current_stream(q.device).synchronize()
    return weight


def unpack(weight: Int4Weight) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of pack: (q uint8 [N, K], scales [N, groups], zeros [N, groups] or None)."""
    n, k = weight.shape
    tiles, units, _, cols = weight.packed.shape
    groups = 1 if weight.group_size == -1 else k // weight.group_size
    pairs = weight.packed.contiguous().view(torch.uint8).view(tiles, units, TILE_N, cols, 2)
    low, high = pairs[..., 0], pairs[..., 1]
    planes = torch.stack((low & 15, low >> 4, high & 15, high >> 4), dim=3)  # [tiles, units, 16, 4, cols]
    q = planes.transpose(1, 2).reshape(tiles * TILE_N, units * 4 * cols)[:n, :k]
    from_tiles = lambda t: t.transpose(1, 2).reshape(tiles * TILE_N, -1)[:n, :groups].contiguous()  # noqa: E731
    return q.contiguous(), from_tiles(weight.scales), None if weight.zeros is None else from_tiles(weight.zeros)


def dequantize(weight: Int4Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """W [N, K]; computed in float32 (float64 if that is asked for) and cast once."""
    q, scales, zeros = unpack(weight)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    n, groups = scales.shape
    w = q.view(n, groups, -1).to(compute)
    w -= SYMMETRIC_ZERO if zeros is None else zeros.to(compute).unsqueeze(-1)
    w *= scales.to(compute).unsqueeze(-1)
    return w.view(weight.shape).to(dtype)


def quantize(
    w: Tensor,
    group_size: int = 128,
    *,
    symmetric: bool = True,
    search: bool = False,
    scale_dtype: torch.dtype = torch.float16,
) -> Int4Weight:
    """Quantizes W [N, K] (floating point, finite) to 4 bits, rounding to nearest.

    search=True also tries smaller and slightly larger scales for every group, and a least-squares fit of scale (and
    zero) to the rounded integers, and keeps whatever has the least squared error: never worse than search=False.
    The error is that of the scales as stored in scale_dtype. Zeros are float32: those of a narrow group far from 0
    are large.
    """
    if w.dim() != 2 or not w.is_floating_point() or 0 in w.shape:
        raise ValueError(f"w must be a non-empty floating-point matrix [N, K], got {w.dtype} {tuple(w.shape)}")
    if scale_dtype not in _FLOATS:
        raise TypeError(f"scale_dtype={scale_dtype} must be float16, bfloat16 or float32")
    n, k = w.shape
    _check_group_size(k, group_size)
    groups = 1 if group_size == -1 else k // group_size
    parts = []
    for rows in w.detach().split(max(1, _WEIGHTS_AT_ONCE // k)):
        grouped = rows.float().view(rows.shape[0], groups, -1)
        if not bool(grouped.isfinite().all()):
            raise ValueError("w holds NaN or infinity, which 4-bit integers cannot represent")
        q, scales, zeros = _quantize_groups(grouped, symmetric, search, scale_dtype)
        if not bool(scales.isfinite().all()):
            raise ValueError(f"a scale exceeds {scale_dtype}'s range; use scale_dtype=torch.float32")
        parts.append((q.view(rows.shape[0], k), scales, zeros))
    q, scales, zeros = (torch.cat(p) for p in zip(*parts, strict=True))
    return pack(q, scales, None if symmetric else zeros, group_size)


def from_q4_0(blocks: Tensor) -> Int4Weight:
    """GGUF Q4_0 rows (uint8 [N, K / 32 * 18]: fp16 d, then 16 bytes with elements 0-15 low and 16-31 high; zero 8)."""
    scales, q = _split_gguf_blocks(blocks, 18)
    return pack(q, scales[..., 0].contiguous(), None, 32)


def from_q4_1(blocks: Tensor) -> Int4Weight:
    """GGUF Q4_1 rows (uint8 [N, K / 32 * 20]: fp16 d, fp16 m, then as Q4_0; w = d * q + m).

    The zero point -m / d is kept in float32, which no 16-bit type holds exactly. A block with d = 0 is the constant m:
    it becomes q = 0, zero = 1, scale = -m.
    """
    scales, q = _split_gguf_blocks(blocks, 20)
    d, m = scales[..., 0], scales[..., 1]
    constant = d == 0
    zeros = torch.where(constant, 1.0, -m.float() / d.float().masked_fill(constant, 1.0))
    q.view(*d.shape, 32).masked_fill_(constant.unsqueeze(-1), 0)
    return pack(q, torch.where(constant, -m, d), zeros, 32)


def concat(weights: Iterable[Int4Weight]) -> Int4Weight:
    """Stacks weights along N, as torch.cat does; all must agree in K, group size, symmetry and dtypes."""
    weights = list(weights)
    first = weights[0]
    kind = _kind(first)
    for w in weights[1:]:
        if _kind(w) != kind:
            raise ValueError(f"concat needs one K, group size, symmetry and dtype, got {first} and {w}")
    rows = sum(w.out_features for w in weights)
    shape = (rows, first.in_features)
    if all(w.out_features % TILE_N == 0 for w in weights):
        cat = lambda ts: torch.cat(list(ts))  # noqa: E731
        zeros = None if first.symmetric else cat(w.zeros for w in weights)
        packed, scales = cat(w.packed for w in weights), cat(w.scales for w in weights)
        return Int4Weight(packed, scales, zeros, first.group_size, shape)
    q, scales, zeros = zip(*(unpack(w) for w in weights), strict=True)
    return pack(torch.cat(q), torch.cat(scales), None if first.symmetric else torch.cat(zeros), first.group_size)


def save_packed(
    path: str | Path, tensors: Mapping[str, Tensor | Int4Weight], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes one safetensors file; an Int4Weight `name` becomes name.packed, name.scales and, if any, name.zeros.

    The file is written beside `path` and renamed, so that an interrupted call leaves no half file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    flat: dict[str, Tensor] = {}
    int4: dict[str, dict] = {}
    for name, t in tensors.items():
        if isinstance(t, Int4Weight):
            int4[name] = {"group_size": t.group_size, "shape": list(t.shape)}
            parts = {"packed": t.packed, "scales": t.scales} | ({} if t.zeros is None else {"zeros": t.zeros})
            flat |= {f"{name}.{part}": v.contiguous() for part, v in parts.items()}
        else:
            flat[name] = t.contiguous()
    header = dict(metadata or {}) | {"format": FORMAT_NAME, "format_version": FORMAT_VERSION, "int4": json.dumps(int4)}
    path = Path(path)
    fd, beside = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    os.close(fd)
    try:
        save_file(flat, beside, metadata=header)
        os.replace(beside, path)
    except BaseException as e:
        os.unlink(beside)
        if isinstance(e, SafetensorError):  # what it makes of a full disk, too
            raise OSError(f"{path} could not be written: {e}") from e
        raise


def load_packed(path: str | Path, device: torch.device | str = "cpu"):
    """Reads what save_packed wrote: ({name: Tensor | Int4Weight}, metadata). A file that is not one is a ValueError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device=str(device)) as f:
            metadata = dict(f.metadata() or {})
            int4 = read_header(path, metadata)
            # Cloned: a tensor on the CPU would keep the file mapped, and die with it when somebody truncates the file.
            flat = {name: f.get_tensor(name).clone() for name in f.keys()}  # noqa: SIM118 (a handle is no dict)
        del metadata["int4"]
        tensors: dict[str, Tensor | Int4Weight] = {}
        for name, (group_size, shape) in int4.items():
            parts = [flat.pop(f"{name}.packed"), flat.pop(f"{name}.scales"), flat.pop(f"{name}.zeros", None)]
            tensors[name] = Int4Weight(*parts, group_size, shape)
            check_integer_zeros(parts[2])
    except (SafetensorError, KeyError) as e:
        raise ValueError(f"{path}: not a whole {FORMAT_NAME} file: {type(e).__name__}: {e}") from e
    return tensors | flat, metadata


def read_header(path: str | Path, metadata: Mapping[str, str]) -> dict[str, tuple[int, tuple[int, int]]]:
    """{name: (group size, (N, K))} of the Int4Weights in a file that save_packed wrote, from its metadata."""
    if metadata.get("format") != FORMAT_NAME:
        raise ValueError(f"{path}: its format is {metadata.get('format')!r}, not {FORMAT_NAME!r}")
    if (version := metadata.get("format_version")) != FORMAT_VERSION:
        raise ValueError(f"{path}: format version {version!r}, this reads {FORMAT_VERSION!r}: quantize again")
    int4 = {}
    try:
        for name, facts in json.loads(metadata["int4"]).items():
            n, k = map(int, facts["shape"])
            int4[name] = int(facts["group_size"]), (n, k)
    except (KeyError, ValueError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: the header does not describe packed weights: {type(e).__name__}: {e}") from e
    return int4


def _quantize_groups(w: Tensor, symmetric: bool, search: bool, scale_dtype: torch.dtype):
    """w float32 [N, G, g] -> (q uint8 [N, G, g], scales [N, G] in scale_dtype, zeros float32 [N, G])."""
    low, high = w.amin(-1), w.amax(-1)
    eight = torch.full_like(low, SYMMETRIC_ZERO)
    if symmetric:  # the larger side gets the 8 steps, the other 7
        plain = torch.where(high > -low, high, low) / -8
        fit = lambda shrink: (plain * shrink, eight)  # noqa: E731
    else:  # the range [low, high], shrunk around its middle, becomes 0 to 15
        middle, half = (low + high) / 2, (high - low) / 2
        fit = lambda shrink: _affine(half * shrink / 7.5, middle - half * shrink, 0, scale_dtype)  # noqa: E731

    q = best_q = best_scale = best_zero = best_error = None
    for shrink in (1.0, *_SEARCH_SHRINKS) if search else (1.0,):
        for refit in (False, True) if search else (False,):
            scale, zero = _least_squares(w, q, symmetric, scale_dtype) if refit else fit(shrink)
            scale = scale.to(scale_dtype)
            s, z = scale.float().unsqueeze(-1), zero.unsqueeze(-1)
            q = (w / s.masked_fill(s == 0, 1.0) + z).round_().clamp_(0, 15)
            error = ((q - z) * s - w).square_().sum(-1)
            if best_q is None:
                best_q, best_scale, best_zero, best_error = q, scale, zero, error
            else:
                better = error < best_error
                best_q = torch.where(better.unsqueeze(-1), q, best_q)
                best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
                best_error = torch.where(better, error, best_error)
    return best_q.to(torch.uint8), best_scale, best_zero


def _affine(scale: Tensor, at_w: Tensor, at_q: Tensor | float, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale, and the zero with which the stored scale maps integer at_q to weight at_w exactly.

    A group whose stored scale would be 0 is (as good as) the constant c = at_w and becomes scale -c, with which q = 0
    means c; where c is 0 too, everything is 0.
    """
    constant = scale.to(scale_dtype) == 0
    scale = torch.where(constant, -at_w, scale)
    stored = scale.to(scale_dtype).float()
    at_q = torch.where(constant, 0.0, torch.as_tensor(at_q, dtype=torch.float32))
    return scale, torch.where(stored == 0, 1.0, at_q - at_w / stored.masked_fill(stored == 0, 1.0))


def _least_squares(w: Tensor, q: Tensor, symmetric: bool, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero that minimise sum((q - zero) * scale - w)^2 for given integers q [N, G, g]."""
    if symmetric:
        c = q - SYMMETRIC_ZERO
        scale = (w * c).sum(-1) / c.square().sum(-1).clamp_(min=1.0)
        return scale, torch.full_like(scale, SYMMETRIC_ZERO)
    q_mean, w_mean = q.mean(-1), w.mean(-1)
    c = q - q_mean.unsqueeze(-1)
    return _affine((w * c).sum(-1) / c.square().sum(-1).clamp_(min=0.5), w_mean, q_mean, scale_dtype)


def _split_gguf_blocks(blocks: Tensor, block_bytes: int) -> tuple[Tensor, Tensor]:
    """Blocks of 32 weights -> (their leading fp16 numbers [N, K / 32, 1 or 2], q uint8 [N, K])."""
    if blocks.dim() != 2 or blocks.dtype != torch.uint8 or blocks.shape[1] % block_bytes or 0 in blocks.shape:
        raise ValueError(
            f"GGUF blocks must be uint8 [N, K / 32 * {block_bytes}], got {blocks.dtype} {tuple(blocks.shape)}"
        )
    blocks = blocks.view(blocks.shape[0], -1, block_bytes)
    nibbles = blocks[..., -16:]
    q = torch.cat((nibbles & 15, nibbles >> 4), dim=-1)
    return blocks[..., :-16].contiguous().view(torch.float16), q.view(q.shape[0], -1)


def _check_group_size(k: int, group_size: int) -> None:
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size={group_size} must be one of {GROUP_SIZES} (-1: per-channel)")
    if group_size != -1 and k % group_size:
        raise ValueError(f"K={k} must be a multiple of group_size={group_size}")


def _check_tensor(name: str, t: Tensor, dtypes: tuple, shape: tuple[int, ...], n: int, k: int) -> None:
    if t.dtype not in dtypes or t.shape != shape:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name} of a {n} x {k} weight must be {wanted} {shape}, got {t.dtype} {tuple(t.shape)}")
    if not t.is_contiguous():
        raise ValueError(f"{name} of a {n} x {k} weight has strides {t.stride()}, it must be contiguous")


def _kind(w: Int4Weight) -> tuple:
    return w.in_features, w.group_size, w.scales.dtype, None if w.zeros is None else w.zeros.dtype


def _pad_to(t: Tensor, rows: int, cols: int) -> Tensor:
    return torch.nn.functional.pad(t, (0, cols - t.shape[1], 0, rows - t.shape[0]))


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
