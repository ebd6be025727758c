"""Tiny-GEMM inside other libraries: one module a library, which imports it and registers what it offers there."""
