"""The plain-torch meaning of every op: the oracle that the kernels and CPU implementations are tested against.

Each function computes in float64, whatever it is given, and returns float64: `op_ref(...)` is what `op(...)` would be
without rounding. Shapes and arguments are those of tiny_gemm.ops.
"""

import torch
from torch import Tensor

from tiny_gemm.quantize_utils import Int4Weight, dequantize

ACTIVATIONS = {
    "gelu": lambda x: torch.nn.functional.gelu(x),
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
}


def int4_gemm_ref(x: Tensor, weight: Int4Weight, bias: Tensor | None = None) -> Tensor:
    """x [..., K] @ W.T + bias -> [..., N]."""
    y = x.double() @ dequantize(weight, torch.float64).T
    return y if bias is None else y + bias.double()


def fused_ffn_ref(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w_gate: Tensor | None = None,
    *,
    activation: str = "gelu",
) -> Tensor:
    """act(x @ w1 + b1) @ w2 + b2, gated (act(x @ w_gate) * (x @ w1 + b1)) @ w2 + b2; w1, w_gate [d, h], w2 [h, n]."""
    act, x = ACTIVATIONS[activation], x.double()
    hidden = x @ w1.double()
    if b1 is not None:
        hidden = hidden + b1.double()
    hidden = act(hidden) if w_gate is None else act(x @ w_gate.double()) * hidden
    y = hidden @ w2.double()
    return y if b2 is None else y + b2.double()


def int4_gated_linear_ref(x: Tensor, w: Int4Weight, w_gate: Int4Weight, *, activation: str = "silu") -> Tensor:
    """act(x @ w_gate.T) * (x @ w.T)."""
    return ACTIVATIONS[activation](int4_gemm_ref(x, w_gate)) * int4_gemm_ref(x, w)


def int4_ffn_ref(
    x: Tensor,
    w1: Int4Weight,
    b1: Tensor | None,
    w2: Int4Weight,
    b2: Tensor | None,
    w_gate: Int4Weight | None = None,
    *,
    activation: str = "gelu",
) -> Tensor:
    """fused_ffn_ref over dequantized weights (an Int4Weight is [out, in], hence the transposes)."""
    dense = lambda w: None if w is None else dequantize(w, torch.float64).T  # noqa: E731
    return fused_ffn_ref(x, dense(w1), b1, dense(w2), b2, dense(w_gate), activation=activation)


def rms_norm_ref(x: Tensor, weight: Tensor, residual: Tensor | None = None, *, eps: float = 1e-6):
    """s = x + residual; s / sqrt(mean(s^2) + eps) * weight; with a residual, (that, s)."""
    s = x.double() if residual is None else x.double() + residual.double()
    y = s * torch.rsqrt(s.square().mean(-1, keepdim=True) + eps) * weight.double()
    return y if residual is None else (y, s)


def layer_norm_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, *, eps: float = 1e-5
):
    """s = x + residual; (s - mean) / sqrt(var + eps) * weight + bias; with a residual, (that, s)."""
    s = x.double() if residual is None else x.double() + residual.double()
    bias = None if bias is None else bias.double()
    y = torch.nn.functional.layer_norm(s, s.shape[-1:], weight.double(), bias, eps)
    return y if residual is None else (y, s)


def philox_uniform(seed: int, offsets: Tensor) -> Tensor:
    """Uniform fp32 numbers in [0, 1): what Triton's tl.rand(seed, offsets) gives, bit for bit.

    offsets: int32 or int64, not negative; any shape. Philox4x32-10 (Salmon et al., SC 2011) with the offset as the low
    two words of the counter and the seed as the key; the first of the four words that come out becomes the float.
    """
    mask = 0xFFFFFFFF
    offsets = offsets.to(torch.int64)
    c0, c1 = offsets & mask, (offsets >> 32) & mask
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        product_0, product_2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps; its 64 bits are those of the product
        c0, c2 = ((product_2 >> 32) & mask) ^ c1 ^ k0, ((product_0 >> 32) & mask) ^ c3 ^ k1
        c1, c3 = product_2 & mask, product_0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    signed = torch.where(c0 >= 2**31, c0 - 2**32, c0)
    return torch.where(signed < 0, -signed - 1, signed).to(torch.float32) * 4.6566127342e-10


def dropout_keep_mask(seed: int, dropout_p: float, batch: int, heads: int, Lq: int, Lk: int, device=None) -> Tensor:
    """Which attention probabilities survive dropout: bool [B, Hq, Lq, Lk], those whose uniform number is >= dropout_p.

    The number of probability (b, h, i, j) is philox_uniform(seed, ((b * Hq + h) * Lq + i) * Lk + j).
    """
    offsets = torch.arange(batch * heads * Lq * Lk, device=device).view(batch, heads, Lq, Lk)
    return philox_uniform(seed, offsets) >= dropout_p


def fused_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(q @ k.T * scale) @ v for q [B, Hq, Lq, D], k and v [B, Hkv, Lk, D]; head h reads KV head h // (Hq / Hkv).

    causal: query i sees keys j <= i + Lk - Lq; a row that sees none is zero. Dropout zeroes probabilities after the
    softmax and multiplies the others by 1 / (1 - dropout_p). window > 0, with causal: of those only the last `window`.
    softcap > 0: scores become softcap * tanh(score / softcap). sinks [Hq]: a score that joins each row's softmax and
    that no value belongs to.
    """
    batch, heads, Lq, D = q.shape
    Lk = k.shape[2]
    group = heads // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = q @ k.mT * (D**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    i, j = torch.arange(Lq, device=q.device)[:, None], torch.arange(Lk, device=q.device)
    last = i + Lk - Lq
    seen = (j <= last) & (j > last - window if window else True) if causal else torch.ones_like(i + j, dtype=torch.bool)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[None, :, None, None].expand(batch, -1, Lq, 1)), dim=-1)
    probabilities = scores.softmax(-1)[..., :Lk].masked_fill(~seen.any(-1, keepdim=True), 0.0)
    if dropout_p > 0:
        keep = dropout_keep_mask(seed, dropout_p, batch, heads, Lq, Lk, q.device)
        probabilities = torch.where(keep, probabilities / (1 - dropout_p), 0.0)
    return probabilities @ v


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on x [..., D]: dimension i pairs with i + R / 2 (cos, sin [..., R / 2]); dimensions past R pass through."""
    half = cos.shape[-1]
    a, b, rest = x.split_with_sizes((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin), rest), dim=-1)


KV_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # what the largest element of a cached vector becomes
KV_SMALLEST = 2.0**-90  # vectors whose largest element is below it are cached as if it were that


def quantize_kv_ref(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys or values x [..., D] as a cache of 8 bits holds them: (codes [..., D] of `dtype`, scales [...])."""
    scale = x.double().abs().amax(-1).clamp(min=KV_SMALLEST) / KV_LARGEST[dtype]
    codes = (x.double() / scale[..., None]).clamp(-KV_LARGEST[dtype], KV_LARGEST[dtype])
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale


def decode_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    rope_cos: Tensor | None = None,
    rope_sin: Tensor | None = None,
    *,
    kv_scale: Tensor | None = None,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """One new token a sequence: (output [B, Hq, D], k_cache, v_cache), the caches being copies with it appended; and
    kv_scale, likewise, where one is given.

    The token of row b stands at position lengths[b] and sees itself and what the cache holds before it. At
    lengths[b] >= Lmax nothing is appended: q, rotated for position Lmax - 1, sees the Lmax cached tokens.
    kv_scale [B, Hkv, Lmax, 2]: what the codes of a cached key and value are multiplied with, of caches of 8 bits.
    q_norm, k_norm [D]: weights of an RMSNorm of each head, before RoPE. window, softcap and sinks are those of
    fused_attention_ref.
    """
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    kv_scale = None if kv_scale is None else kv_scale.clone()
    Lmax = k_cache.shape[2]
    if q_norm is not None:
        q, k = rms_norm_ref(q, q_norm, eps=norm_eps), rms_norm_ref(k, k_norm, eps=norm_eps)
    outputs = []
    for b, length in enumerate(lengths.clamp(min=0).tolist()):
        q_row, k_row = q[b].double(), k[b].double()
        if rope_cos is not None:
            position = min(length, Lmax - 1)
            cos, sin = rope_cos[position].double(), rope_sin[position].double()
            q_row, k_row = rotate_half(q_row, cos, sin), rotate_half(k_row, cos, sin)
        if length < Lmax and kv_scale is None:
            k_cache[b, :, length] = k_row.to(k_cache.dtype)
            v_cache[b, :, length] = v[b].to(v_cache.dtype)
        elif length < Lmax:
            k_cache[b, :, length], kv_scale[b, :, length, 0] = quantize_kv_ref(k_row, k_cache.dtype)
            v_cache[b, :, length], kv_scale[b, :, length, 1] = quantize_kv_ref(v[b], v_cache.dtype)
        visible = slice(0, min(length + 1, Lmax))
        keys, values = k_cache[b : b + 1, :, visible].double(), v_cache[b : b + 1, :, visible].double()
        if kv_scale is not None:
            keys, values = (t * kv_scale[b, :, visible, i, None].double() for i, t in enumerate((keys, values)))
        more = {"causal": True, "scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
        outputs.append(fused_attention_ref(q_row[None, :, None], keys, values, **more)[0, :, 0])
    return (torch.stack(outputs), k_cache, v_cache, *(() if kv_scale is None else (kv_scale,)))
