"""Tiny-GEMM: decode-time transformer inference with fused Triton kernels and packed INT4 weights.

`import tiny_gemm` needs neither a GPU nor Triton, and imports torch only when one of its names is used, so that the
command line answers at once. `import tiny_gemm.ops` registers torch.ops.tiny_gemm.*.
"""

from importlib import import_module

__version__ = "0.1.0"
__all__ = ["Int4Linear", "Int4Weight", "dequantize", "pack", "quantize", "quantize_model_", "unpack"]

_IN_MODULES = {"Int4Linear", "quantize_model_"}  # the other names are in quantize_utils


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"tiny_gemm.{'modules' if name in _IN_MODULES else 'quantize_utils'}"), name)
