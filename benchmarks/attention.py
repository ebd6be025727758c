"""The suite `attention`: decode (one new token against a KV cache) and prefill (causal), grouped-query heads.

Decode arms: tiny-gemm is decode_attention, which rotates q and k and appends to the cache as well, tiny-gemm-int8 and
tiny-gemm-fp8 the same over caches of 8 bits; all others get a rotated q and a cache that holds the new token, and only
attend: tiny-gemm-attend (fused_attention), pytorch (matmul, float32 softmax, matmul; the query heads of a KV head as
rows of one product), sdpa-flash, sdpa-cudnn, and at COMPILED only flex_attention and torch.compile of the eager arm,
which take seconds to compile.
Prefill arms: tiny-gemm is fused_attention. The oracle of a prefill is computed for the first, middle and last 64 rows.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import BOUNDS, Arm, Case, Options, Work, compiled, left_out, needs_gpu, relative_error
from benchmarks.presets import model_config
from benchmarks.timing import Machine
from tiny_gemm import ops
from tiny_gemm.reference import decode_attention_ref, fused_attention_ref, rotate_half

HEADS = ((32, 8, 128), (32, 8, 64))  # query heads, KV heads, head size: Llama 3.1 8B and 3.2 1B
DECODE_LENGTHS = (128, 512, 2048, 8192, 32768)
PREFILL_LENGTHS = (128, 512, 2048, 8192)
CACHES_8_BIT = {"int8": (torch.int8, 3e-2), "fp8": (torch.float8_e4m3fn, 0.1)}  # dtype, what the error may be
COMPILED = {("decode", 1, 128, 2048), ("decode", 8, 128, 2048), ("prefill", 1, 128, 2048)}  # kind, B, D, L
CHECKED_ROWS = 64


def cases(options: Options, machine: Machine) -> list[Case]:
    shapes = [(None, *heads) for heads in (HEADS[1:] if options.quick else HEADS)]
    if options.models:
        configs = [(model, model_config(model)) for model in options.models]
        shapes = [(model, c.num_heads, c.num_kv_heads, c.head_dim) for model, c in configs]
    decode = options.seq_lengths or ((64,) if options.quick else DECODE_LENGTHS)
    prefill = options.seq_lengths or ((96,) if options.quick else PREFILL_LENGTHS)
    batches = options.batch_sizes or ((1, 2) if options.quick else (1, 8))
    if options.mode == "seq_length":
        batches = batches[:1]
    elif options.mode == "batch_size":
        batches = options.batch_sizes or ((1, 2) if options.quick else (1, 2, 4, 8))
        decode, prefill = options.seq_lengths[:1] or ((64,) if options.quick else (512,)), ()
    make = functools.partial(_case, machine, options)
    found = [make("decode", *shape, b, n) for shape in shapes for b in batches for n in decode]
    return found + [make("prefill", *shape, 1, n) for shape in shapes for n in prefill]


def _case(machine: Machine, options: Options, kind: str, model, heads: int, kv_heads: int, d: int, b: int, n: int):
    facts = {"B": b, "L": n, "dtype": options.dtype_name}
    build = _decode if kind == "decode" else _prefill
    with_compile = (kind, b, d, n) in COMPILED
    arguments = machine, heads, kv_heads, d, b, n, options.dtype, with_compile
    return Case("attention", model, f"{kind} {heads}/{kv_heads} D{d}", facts, functools.partial(build, *arguments))


def eager(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None) -> Tensor:
    """q [B, Hq, Lq, D]; k, v [B, Hkv, Lk, D]; hidden: bool, what a row must not see."""
    b, heads, rows, d = q.shape
    grouped = q.reshape(b, k.shape[1], heads // k.shape[1], rows, d)
    scores = grouped.flatten(2, 3) @ k.mT * d**-0.5
    if hidden is not None:
        scores = scores.view(b, k.shape[1], -1, rows, k.shape[2]).masked_fill(hidden, float("-inf")).flatten(2, 3)
    return (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v).view(b, heads, rows, d)


def peers(machine: Machine, calls: Callable, nbytes: int, flops: int, causal: bool, with_compile: bool) -> list[Arm]:
    """calls(function(q, k, v)) -> an arm's calls."""

    def on_gpu(make: Callable[[], Callable]) -> Callable:
        def build() -> list:
            needs_gpu(machine)
            return calls(make())

        return build

    sdpa = functools.partial(F.scaled_dot_product_attention, is_causal=causal, enable_gqa=True)
    only = lambda backend: functools.partial(sdpa_kernel, backend)  # noqa: E731
    arm = functools.partial(Arm, nbytes=nbytes, flops=flops)
    found = [
        arm("sdpa-flash", on_gpu(lambda: sdpa), context=only(SDPBackend.FLASH_ATTENTION)),
        arm("sdpa-cudnn", on_gpu(lambda: sdpa), context=only(SDPBackend.CUDNN_ATTENTION)),
    ]
    rest = left_out(f"at (kind, B, D, L) {sorted(COMPILED)}")
    found += [arm("flex_attention", on_gpu(lambda: _flex(machine, causal)) if with_compile else rest)]
    if not causal:
        found += [arm("torch.compile", on_gpu(lambda: compiled(eager)) if with_compile else rest)]
    return found


def _flex(machine: Machine, causal: bool) -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attend = compiled(flex_attention)
    masks: dict[int, object] = {}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = q.shape[2]
        if causal and n not in masks:
            masks[n] = create_block_mask(lambda b, h, i, j: i >= j, None, None, n, n, device=machine.device)
        return attend(q, k, v, block_mask=masks.get(n), enable_gqa=True)

    return call


def decode_inputs(device, heads: int, kv_heads: int, d: int, b: int, n: int, dtype, filled: int | None = None) -> tuple:
    """q, k, v, k_cache, v_cache, lengths, cos, sin: caches of n tokens, of which `filled` (None: n - 1) are there.

    The new token weighs a hundredth or more for one query head of each KV head, however long the cache is: one of
    thousands that weigh alike could be lost unnoticed.
    """
    new = functools.partial(torch.randn, device=device, dtype=dtype)
    q, k, v = new(b, heads, d), new(b, kv_heads, d), new(b, kv_heads, d)
    score = math.log(max(0.01 * (n if filled is None else filled + 1), 5.0))
    ahead = q.unflatten(1, (kv_heads, -1))[:, :, 0].float()  # the first query head of each
    along = (score * d**0.5 - (ahead * k.float()).sum(-1, keepdim=True)) / ahead.square().sum(-1, keepdim=True)
    k = (k.float() + along * ahead).to(dtype)
    k_cache, v_cache = new(b, kv_heads, n, d), new(b, kv_heads, n, d)
    lengths = torch.full((b,), n - 1 if filled is None else filled, dtype=torch.int32, device=device)
    angles = torch.outer(torch.arange(n), 10000.0 ** (-torch.arange(0, d, 2) / d))
    return q, k, v, k_cache, v_cache, lengths, angles.cos().to(device), angles.sin().to(device)


def in_8_bits(inputs: tuple, cached: torch.dtype) -> tuple[tuple, Tensor]:
    """decode_inputs' with caches of that dtype, and kv_scale."""
    pairs = [ops.quantize_kv(cache, cached) for cache in inputs[3:5]]
    return (*inputs[:3], *(codes for codes, _ in pairs), *inputs[5:]), torch.stack([s for _, s in pairs], dim=-1)


def _decode(machine, heads: int, kv_heads: int, d: int, b: int, n: int, dtype, with_compile: bool) -> Work:
    inputs = decode_inputs(machine.device, heads, kv_heads, d, b, n, dtype)
    q, k, v, _, _, lengths, cos, sin = inputs
    oracle, k_cache, v_cache = decode_attention_ref(*inputs)
    rotated = rotate_half(q.double(), cos[-1].double(), sin[-1].double()).to(dtype)[:, :, None]  # [B, Hq, 1, D]
    nbytes = k_cache.nbytes + v_cache.nbytes + 2 * q.nbytes
    again = range(machine.copies(nbytes) - 1)
    caches = [(k_cache, v_cache), *((k_cache.clone(), v_cache.clone()) for _ in again)]
    flops = 4 * b * heads * n * d

    def whole(q, k, v, k_cache, v_cache) -> Tensor:
        return ops.decode_attention(q, k, v, k_cache, v_cache, lengths, cos, sin)

    attend = lambda function: [functools.partial(function, rotated.clone(), *cache) for cache in caches]  # noqa: E731
    arms = [
        Arm("pytorch", lambda: attend(eager), nbytes, flops),
        *peers(machine, attend, nbytes, flops, False, with_compile),
        Arm("tiny-gemm-attend", lambda: attend(ops.fused_attention), nbytes, flops),
        Arm(
            "tiny-gemm",
            lambda: [functools.partial(whole, q.clone(), k.clone(), v.clone(), *cache) for cache in caches],
            nbytes,
            flops,
            note="RoPE and append included",
        ),
        *(_decode_8_bit(machine, inputs, name, flops) for name in CACHES_8_BIT),
    ]
    return Work(arms, lambda out: relative_error(out.view(b, heads, d), oracle), 2 * BOUNDS[dtype])


def _decode_8_bit(machine: Machine, inputs: tuple, name: str, flops: int) -> Arm:
    """Held to the oracle of the cache as it was: its error is that of quantization."""
    cached, bound = CACHES_8_BIT[name]
    q, k_cache = inputs[0], inputs[3]
    vectors = 2 * k_cache[..., 0].numel()  # keys and values
    nbytes = vectors * (k_cache.shape[-1] + 4) + 2 * q.nbytes  # a byte an element, a scale each; q and the output

    def calls() -> list[Callable]:
        (q, k, v, k_cache, v_cache, *rest), kv_scale = in_8_bits(inputs, cached)
        copies = [[t.clone() for t in (q, k, v, k_cache, v_cache)] for _ in range(machine.copies(nbytes))]
        return [functools.partial(ops.decode_attention, *c, *rest, kv_scale=kv_scale.clone()) for c in copies]

    note = f"RoPE and append included, cache in 8 bits, held to {bound}"
    return Arm(f"tiny-gemm-{name}", calls, nbytes, flops, note=note, bound=bound)


def prefill_inputs(device, heads: int, kv_heads: int, d: int, b: int, Lq: int, Lk: int, dtype) -> tuple:
    new = functools.partial(torch.randn, device=device, dtype=dtype)
    return new(b, heads, Lq, d), new(b, kv_heads, Lk, d), new(b, kv_heads, Lk, d)


def prefill_oracle(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """(select, oracle): the oracle of the first, middle and last CHECKED_ROWS queries, and what selects theirs of an
    output. As many keys as queries, or more."""
    n, past = q.shape[2], k.shape[2] - q.shape[2]
    starts = sorted({0, max(0, n // 2 - CHECKED_ROWS), max(0, n - CHECKED_ROWS)})
    parts = [slice(start, min(n, start + CHECKED_ROWS)) for start in starts]
    seen = [part.stop + past if causal else k.shape[2] for part in parts]  # keys
    oracle = [
        fused_attention_ref(q[:, :, part], k[:, :, :keys], v[:, :, :keys], causal=causal)
        for part, keys in zip(parts, seen, strict=True)
    ]
    return lambda out: torch.cat([out[:, :, part] for part in parts], dim=2), torch.cat(oracle, dim=2)


def prefill_flops(q: Tensor, k: Tensor, causal: bool) -> int:
    """Of the scores that are needed; causal, those of q's last queries against k need all but a triangle."""
    b, heads, n, d = q.shape
    return 4 * b * heads * (n * k.shape[2] - (n * n // 2 if causal else 0)) * d


def _prefill(machine, heads: int, kv_heads: int, d: int, b: int, n: int, dtype, with_compile: bool) -> Work:
    tensors = q, k, v = prefill_inputs(machine.device, heads, kv_heads, d, b, n, n, dtype)
    select, oracle = prefill_oracle(q, k, v, True)
    nbytes, flops = 2 * q.nbytes + k.nbytes + v.nbytes, prefill_flops(q, k, True)
    copies = [tensors, *(tuple(t.clone() for t in tensors) for _ in range(machine.copies(nbytes) - 1))]
    calls = lambda function: [functools.partial(function, *copy) for copy in copies]  # noqa: E731
    hidden = torch.ones(n, n, dtype=torch.bool, device=machine.device).triu(1)
    arms = [
        Arm("pytorch", lambda: calls(functools.partial(eager, hidden=hidden)), nbytes, flops),
        *peers(machine, calls, nbytes, flops, True, with_compile),
        Arm("tiny-gemm", lambda: calls(functools.partial(ops.fused_attention, causal=True)), nbytes, flops),
    ]
    return Work(arms, lambda out: relative_error(select(out), oracle), 2 * BOUNDS[dtype])
