"""INT4 weights for the tests of kernels, and the kinds of zeros that they may have."""

import pytest
import torch

from tiny_gemm.int4_config import Zeros
from tiny_gemm.quantize_utils import LARGEST_ZERO, Int4Weight, pack, quantize, unpack

every_kind_of_zeros = pytest.mark.parametrize("zeros", Zeros, ids=lambda z: z.value)


def quantized(w: torch.Tensor, group_size: int, zeros: Zeros, **options) -> Int4Weight:
    """w [N, K] as an Int4Weight with zeros of a kind."""
    weight = quantize(w, group_size, symmetric=zeros is Zeros.NONE, **options)
    if zeros is not Zeros.INTEGER:
        return weight
    q, scales, real = unpack(weight)
    return pack(q, scales, real.round().clamp(0, LARGEST_ZERO).to(torch.int16), group_size)
