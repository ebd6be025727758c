"""INT4 layers for any torch model: Int4Linear, and quantize_model_ which puts it in the place of nn.Linear.

Torch only. For inference: the ops refuse an input that requires grad, so call the model under torch.no_grad().
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

import tiny_gemm.ops  # noqa: F401 (registers the ops)
from tiny_gemm.quantize_utils import SYMMETRIC_ZERO, Int4Weight, check_integer_zeros, packed_shapes, quantize


class Int4Linear(nn.Module):
    """nn.Linear with a packed INT4 weight: y = x @ W.T + bias, x [..., in_features] -> y [..., out_features].

    x is bfloat16 or float16, on a CPU also float32; bias and y have x's dtype. Everything is a buffer, so state_dict,
    load_state_dict and .to() work: packed int16, scales float16, zeros float32 (None when symmetric; integers loaded as
    int16 stay int16), in the packed order that quantize_utils describes, and bias [out_features] or None. A conversion
    of the model's dtype converts the bias only: scales and zeros keep the precision that they were found in.

    A new layer's weight is 0 everywhere, to be loaded into; from_linear makes one from an nn.Linear. Raises ValueError
    where in_features is not a multiple of group_size (32, 64, 128, or -1 for one group a row).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group_size: int = 128,
        symmetric: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group_size = in_features, out_features, group_size
        packed, scales = packed_shapes(out_features, in_features, group_size)
        zeros = None if symmetric else torch.full(scales, SYMMETRIC_ZERO, dtype=torch.float32, device=device)
        self.register_buffer("packed", torch.zeros(packed, dtype=torch.int16, device=device))
        self.register_buffer("scales", torch.zeros(scales, dtype=torch.float16, device=device))
        self.register_buffer("zeros", zeros)
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, group_size: int = 128, *, symmetric: bool = True, search: bool = False
    ) -> "Int4Linear":
        """Quantizes `linear`, which stays as it is; options and errors as for quantize."""
        weight = quantize(linear.weight, group_size, symmetric=symmetric, search=search)
        out_features, in_features = weight.shape
        layer = cls(in_features, out_features, bias=False, group_size=group_size, symmetric=symmetric, device="meta")
        layer.packed, layer.scales, layer.zeros = weight.packed, weight.scales, weight.zeros
        layer.bias = None if linear.bias is None else linear.bias.detach().clone()
        return layer.train(linear.training)

    @property
    def symmetric(self) -> bool:
        return self.zeros is None

    def int4_weight(self) -> Int4Weight:
        """The weight [out_features, in_features]; it shares the layer's buffers."""
        shape = self.out_features, self.in_features
        return Int4Weight(self.packed, self.scales, self.zeros, self.group_size, shape)

    def forward(self, x: Tensor) -> Tensor:
        # Not ops.int4_gemm: to make an Int4Weight first costs what its way around the dispatcher saves.
        args = self.packed, self.scales, self.zeros, self.bias, self.group_size, self.out_features
        return torch.ops.tiny_gemm.int4_gemm(x, *args)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"group_size={self.group_size}, symmetric={self.symmetric}"
        )

    def _apply(self, fn, recurse=True):
        before = {name: getattr(self, name) for name in ("packed", "scales", "zeros")}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if old is not None and new.dtype != old.dtype:
                new = old.to(new.device)
            # .to(memory_format=torch.channels_last) would permute what has four dimensions
            setattr(self, name, None if new is None else new.contiguous())
        _wait_until_written(self.packed)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        zeros = state_dict.get(f"{prefix}zeros")
        if zeros is not None and self.zeros is not None and torch.int16 in (zeros.dtype, self.zeros.dtype):
            if not zeros.is_meta:
                check_integer_zeros(zeros)
            self.zeros = self.zeros.to(zeros.dtype)  # copied into the other kind, integers get slow and others get cut
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        _wait_until_written(self.packed)


def quantize_model_(
    module: nn.Module,
    group_size: int = 128,
    skip: Iterable[str] = ("lm_head",),
    *,
    symmetric: bool = True,
    search: bool = False,
) -> nn.Module:
    """Replaces every nn.Linear inside `module` by an Int4Linear, in place, and returns `module`.

    skip: names that stay as they are, with everything below them: "lm_head", "layers.0", "mlp.down_proj"; each is one
    or more whole parts of a module's dotted path. Subclasses of nn.Linear stay too: their owners may rely on more than
    forward. So does a weight that is not in an nn.Linear, like those of stacked experts. group_size, symmetric,
    search: as for quantize.

    Raises ValueError where a layer's in_features is not a multiple of group_size (then nothing was replaced), where a
    weight holds NaN or infinity, and where there is nothing to quantize.
    """
    if isinstance(module, nn.Linear):
        raise ValueError("an nn.Linear cannot be replaced in place; use Int4Linear.from_linear(linear)")
    linears = find_linears(module, skip, group_size)
    if not linears:
        raise ValueError(f"{type(module).__name__} holds no nn.Linear outside skip={tuple(skip)}")
    replaced: dict[nn.Linear, Int4Linear] = {}
    for name, linear in linears.items():
        if linear not in replaced:  # a layer may be in a model twice
            try:
                replaced[linear] = Int4Linear.from_linear(linear, group_size, symmetric=symmetric, search=search)
            except ValueError as e:
                raise ValueError(f"{name}: {e}") from e
        module.set_submodule(name, replaced[linear])
    return module


def find_linears(module: nn.Module, skip: Iterable[str], group_size: int) -> dict[str, nn.Linear]:
    """The layers that quantize_model_ replaces, by dotted name; ValueError where one does not fit group_size."""
    if isinstance(skip, str):
        raise TypeError(f"skip={skip!r} must be several names, like ({skip!r},)")
    skip = [f".{name}." for name in skip]
    found = {
        name: child
        for name, child in module.named_modules(remove_duplicate=False)
        if type(child) is nn.Linear and not any(s in f".{name}." for s in skip)
    }
    for name, linear in found.items():
        try:
            packed_shapes(linear.out_features, linear.in_features, group_size)
        except ValueError as e:
            raise ValueError(f"{name}: {e}; choose another group_size, or skip this layer") from e
    return found


def _wait_until_written(t: Tensor) -> None:
    """Kernels read weights before they wait for the kernel in front of them: a copy must be in memory by then."""
    if t.is_cuda:
        torch.cuda.current_stream(t.device).synchronize()
