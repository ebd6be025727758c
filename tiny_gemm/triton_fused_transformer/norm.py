"""RMSNorm and LayerNorm with an optional residual addition, one launch.

    s = x (+ residual)
    RMSNorm    y = s / sqrt(mean(s^2) + eps) * weight                    (Zhang and Sennrich, 2019)
    LayerNorm  y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias    (Ba, Kiros and Hinton, 2016)

One program a row, which it holds in registers; all arithmetic is float32.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiny_gemm.device import DeviceFacts, device_facts, tensor_bytes
from tiny_gemm.launcher import Launcher
from tiny_gemm.triton_parts import pdl_options, wait_for_previous


def _norm_cost(grid, kernel, args) -> dict:
    """Bytes and flops of one launch, for a launch hook."""
    tensors = (t for name, t in args.items() if name.endswith("_ptr"))
    return {"bytes": tensor_bytes(*tensors), "flops32": 5 * args["x_ptr"].numel()}


@triton.jit(launch_metadata=_norm_cost)
def _norm_kernel(
    x_ptr,  # [ROWS, D], rows stride_xm apart
    residual_ptr,  # [ROWS, D] contiguous, or None
    weight_ptr,  # [D]
    bias_ptr,  # [D] or None
    y_ptr,  # [ROWS, D] contiguous
    s_ptr,  # [ROWS, D] contiguous: x + residual; None without one
    D,
    stride_xm,
    eps,
    SUBTRACT_MEAN: tl.constexpr,  # LayerNorm
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_D)
    mask = offs < D
    s = tl.load(x_ptr + row * stride_xm + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_D]
    if residual_ptr is not None:
        s += tl.load(residual_ptr + row * D + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(s_ptr + row * D + offs, s.to(s_ptr.dtype.element_ty), mask=mask)
    if SUBTRACT_MEAN:
        s = tl.where(mask, s - tl.sum(s) / D, 0.0)
    y = s * tl.rsqrt(tl.sum(s * s) / D + eps) * tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * D + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


def pick_num_warps(d: int) -> int:
    """Warps for a row of d elements: 8 or so elements a thread, 16 warps at most."""
    return min(16, max(1, triton.next_power_of_2(d) // 256))


@cache
def _launcher(d: int, subtract_mean: bool, facts: DeviceFacts) -> Launcher:
    return Launcher(
        _norm_kernel,
        SUBTRACT_MEAN=subtract_mean,
        BLOCK_D=triton.next_power_of_2(d),
        num_warps=pick_num_warps(d),
        **pdl_options(facts),
    )


def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, *, subtract_mean: bool
) -> tuple[Tensor, Tensor | None]:
    """(y, s) for x [..., D]; s is None without a residual. See ops.rms_norm and ops.layer_norm."""
    d = x.shape[-1]
    rows = x if x.dim() == 2 else x.reshape(-1, d)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    s = None
    if residual is not None:
        residual = residual.contiguous()
        s = torch.empty_like(residual, memory_format=torch.contiguous_format)
    if rows.shape[0]:
        tensors = rows, residual, weight.contiguous(), None if bias is None else bias.contiguous(), y, s
        launch = _launcher(d, subtract_mean, device_facts(x.device))
        launch((rows.shape[0], 1, 1), tensors, (d, rows.stride(0), float(eps)))
    return y, s
