"""The norm kernel: in the interpreter, as compiled for every target, and on a GPU."""

import pytest
import torch
from conftest import assert_close

from tiny_gemm.reference import layer_norm_ref, rms_norm_ref
from tiny_gemm.triton_fused_transformer import norm

KINDS = ["rms", "rms-residual", "layer", "layer-residual"]


def check(kind, rows, d, dtype, device="cpu"):
    generator = torch.Generator().manual_seed(d)
    randn = lambda *s: torch.randn(*s, generator=generator).to(device)  # noqa: E731
    x = (randn(rows, d + 7) + 3).to(dtype)[:, :d]  # a strided view; off zero, so that the mean matters
    weight, bias = randn(d).to(dtype), randn(d).to(dtype) if "layer" in kind else None
    residual = randn(rows, d) if "residual" in kind else None
    y, s = norm.norm(x, residual, weight, bias, 1e-5, subtract_mean="layer" in kind)
    if "layer" in kind:
        expected = layer_norm_ref(x, weight, bias, residual, eps=1e-5)
    else:
        expected = rms_norm_ref(x, weight, residual, eps=1e-5)
    assert_close(y, expected[0] if residual is not None else expected)
    if residual is None:
        assert s is None
    else:
        assert_close(s, expected[1])


@pytest.mark.interp
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("d", [1, 64, 100, 576])
def test_matches_the_oracle_in_the_interpreter(d, dtype, kind, poisoned):
    check(kind, 3, d, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 8, 300])
def test_matches_the_oracle_on_a_gpu(rows, dtype, kind, poisoned):
    for d in (1, 100, 576, 4096, 18944):
        check(kind, rows, d, dtype, "cuda")


@pytest.mark.aot
@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"])
def test_compiles_for_every_target(target):
    import aot

    signature = {"x_ptr": "*bf16", "residual_ptr": "*fp32", "weight_ptr": "*bf16", "y_ptr": "*bf16", "s_ptr": "*fp32"}
    signature |= {"D": "i32", "stride_xm": "i32", "eps": "fp32"}
    constants = {"bias_ptr": None, "SUBTRACT_MEAN": False, "BLOCK_D": 4096, "PDL": aot.device_facts(target).has_pdl}
    compiled = aot.compile_kernel(norm._norm_kernel, target, signature, constants, num_warps=norm.pick_num_warps(4096))
    aot.check(compiled, tensor_cores=False)
