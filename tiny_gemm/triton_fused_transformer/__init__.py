"""The fused transformer kernels: attention (prefill and decode), FFN, norms."""
