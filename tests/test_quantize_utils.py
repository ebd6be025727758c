"""The INT4 format: what is packed comes back, imports lose nothing, the search never loses, files are whole."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tiny_gemm import quantize_utils as qu
from tiny_gemm.quantize_utils import Int4Weight, dequantize, pack, quantize, unpack

SHAPES = [(1, 128, 128), (16, 256, 64), (17, 576, 32), (5, 96, 32), (7, 100, -1), (49, 7392, 32)]
SHAPE_IDS = [f"{n}x{k}g{g}" for n, k, g in SHAPES]


def random_parts(n, k, group_size, symmetric, dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else k // group_size
    q = torch.randint(0, 16, (n, k), generator=generator, dtype=torch.uint8)
    scales = torch.rand(n, groups, generator=generator).add(0.1).to(dtype)
    zeros = None if symmetric else (torch.rand(n, groups, generator=generator) * 15).to(dtype)
    return q, scales, zeros


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES, ids=SHAPE_IDS)
def test_pack_round_trip_is_exact(n, k, group_size, symmetric, dtype):
    parts = random_parts(n, k, group_size, symmetric, dtype)
    weight = pack(*parts, group_size)
    for before, after in zip(parts, unpack(weight), strict=True):
        assert (before is None and after is None) or (torch.equal(before, after) and before.dtype == after.dtype)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_dequantize_is_the_formula(symmetric):
    q, scales, zeros = random_parts(17, 576, 32, symmetric)
    zero = torch.full_like(scales, 8) if zeros is None else zeros
    expected = (q.double() - zero.double().repeat_interleave(32, 1)) * scales.double().repeat_interleave(32, 1)
    weight = pack(q, scales, zeros, 32)
    assert torch.equal(dequantize(weight, torch.float64), expected)
    assert torch.allclose(dequantize(weight).double(), expected, rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES, ids=SHAPE_IDS)
def test_integer_zeros_stay_integers(tmp_path, n, k, group_size):
    q, scales, _ = random_parts(n, k, group_size, True)
    zeros = torch.randint(0, qu.LARGEST_ZERO + 1, scales.shape, dtype=torch.int16)
    weight = pack(q, scales, zeros, group_size)
    qu.save_packed(tmp_path / "w.safetensors", {"w": qu.concat([weight, weight])})
    both = qu.load_packed(tmp_path / "w.safetensors")[0]["w"]
    assert both.zeros.dtype == torch.int16 and torch.equal(unpack(both)[2], torch.cat([zeros, zeros]))
    assert torch.equal(
        dequantize(both, torch.float64)[n:], dequantize(pack(q, scales, zeros.float(), group_size), torch.float64)
    )


def test_a_file_with_integer_zeros_out_of_range_is_refused(tmp_path):
    weight = pack(*random_parts(16, 64, 32, False), 32)
    zeros = torch.full(weight.zeros.shape, -3, dtype=torch.int16)
    qu.save_packed(tmp_path / "w.safetensors", {"w": Int4Weight(weight.packed, weight.scales, zeros, 32, (16, 64))})
    with pytest.raises(ValueError, match="zeros hold -3; integer zeros must be from 0 to 127"):
        qu.load_packed(tmp_path / "w.safetensors")


def test_packed_order_is_the_documented_one():
    n, k = 33, 256
    q, scales, _ = random_parts(n, k, 128, True)
    packed = pack(q, scales, None, 128).packed
    assert packed.shape == (3, 2, 16, 32) and packed.dtype == torch.int16
    for row, col in [(0, 0), (5, 37), (17, 127), (32, 128), (31, 255)]:
        plane, c = col % 128 // 32, col % 32
        nibble = int(packed[row // 16, col // 128, row % 16, c]) >> (4 * plane) & 15
        assert nibble == int(q[row, col])


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("n", "k", "group_size"), SHAPES, ids=SHAPE_IDS)
def test_quantize_rounds_to_nearest(n, k, group_size, symmetric):
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(1))
    weight = quantize(w, group_size, symmetric=symmetric)
    _, scales, _ = unpack(weight)
    step = scales.float().abs().repeat_interleave(k // scales.shape[1], 1)
    steps_off = (dequantize(weight) - w).abs() / step
    # Half a step, plus what rounding the scale (and zero) to fp16 makes of 8 (15) steps. Symmetric: the side opposite
    # to the largest magnitude ends at 7, so that an almost equal extreme there is a whole step off.
    assert (steps_off > 0.51).float().mean() < (0.05 if symmetric else 1e-9)
    assert steps_off.max() < (1.02 if symmetric else 0.51)


@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "constant", "zero", "one-sided", "tiny"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_search_is_never_worse(kind, symmetric):
    g = torch.Generator().manual_seed(2)
    normal = torch.randn(40, 256, generator=g)
    w = {
        "normal": normal,
        "heavy-tailed": normal**3,
        "constant": torch.full((40, 256), -0.37),
        "zero": torch.zeros(40, 256),
        "one-sided": normal.abs() + 1,
        "tiny": normal * 1e-4,
    }[kind]
    error = lambda weight: (dequantize(weight).double() - w.double()).square().view(40, 4, 64).sum(-1)  # noqa: E731
    plain = error(quantize(w, 64, symmetric=symmetric))
    searched = error(quantize(w, 64, symmetric=symmetric, search=True))
    assert (searched <= plain * (1 + 1e-5) + 1e-12).all()
    if kind in ("normal", "heavy-tailed"):
        assert searched.sum() < 0.98 * plain.sum()
    if kind == "zero":
        assert searched.sum() == 0


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("base", "width"), [(1000.0, 0.05), (1.0, 0.005), (-3.0, 1e-7), (1e-3, 1e-9)])
def test_narrow_groups_far_from_zero_keep_their_place(base, width, scale_dtype):
    """Asymmetric: every weight within a step of the group's range, or, where the stored scales cannot hold so small a
    step, the group within the scale's own rounding of its constant."""
    w = base + width * torch.rand(4, 64, generator=torch.Generator().manual_seed(0))
    error = (dequantize(quantize(w, 64, symmetric=False, scale_dtype=scale_dtype), torch.float64) - w.double()).abs()
    step = (w.amax(-1) - w.amin(-1)) / 15
    finest = 2**-24 if scale_dtype == torch.float16 else torch.finfo(scale_dtype).tiny
    holds_steps = (step > 100 * finest).all()
    rounding = abs(base) * (1e-6 if holds_steps else torch.finfo(scale_dtype).eps)
    assert (error <= 0.55 * step.unsqueeze(-1) + rounding).all()


def gguf_blocks(n, k, leading, seed=3):
    """Random GGUF Q4 blocks with `leading` fp16 numbers each; the numbers are finite."""
    rng = np.random.default_rng(seed)
    blocks = np.empty((n, k // 32, 2 * leading + 16), np.uint8)
    blocks[..., : 2 * leading] = rng.normal(size=(n, k // 32, leading)).astype(np.float16).view(np.uint8)
    blocks[..., 2 * leading :] = rng.integers(0, 256, (n, k // 32, 16))
    return blocks.reshape(n, -1)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
@pytest.mark.parametrize(("n", "k"), [(16, 64), (17, 576), (3, 32)])
def test_gguf_blocks_lose_nothing(kind, n, k):
    gguf = pytest.importorskip("gguf", reason="the oracle is the gguf package's own dequantizer")
    blocks = gguf_blocks(n, k, 1 if kind == "Q4_0" else 2)
    if kind == "Q4_1":
        blocks.reshape(n, -1, 20)[0, 0, :2] = 0  # d = 0: a constant block
    weight = (qu.from_q4_0 if kind == "Q4_0" else qu.from_q4_1)(torch.from_numpy(blocks))
    expected = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    # Q4_0 is exact; Q4_1's zero point -m / d is rounded to float32 once.
    tolerance = 0 if kind == "Q4_0" else 3e-6
    np.testing.assert_allclose(dequantize(weight).numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [(16, 32, 16), (16, 17, 5)], ids=["whole-tiles", "odd"])
def test_concat_stacks_rows(rows):
    parts = [random_parts(n, 192, 64, False, seed=n) for n in rows]
    weights = [pack(*p, 64) for p in parts]
    stacked = qu.concat(weights)
    assert torch.equal(dequantize(stacked), torch.cat([dequantize(w) for w in weights]))


def test_concat_refuses_what_differs():
    a = pack(*random_parts(16, 128, 64, True), 64)
    for b in (
        pack(*random_parts(16, 256, 64, True), 64),
        pack(*random_parts(16, 128, 32, True), 32),
        pack(*random_parts(16, 128, 64, False), 64),
    ):
        with pytest.raises(ValueError, match="concat needs one K"):
            qu.concat([a, b])


def test_eight_times_smaller_and_says_so():
    weight = quantize(torch.randn(256, 4096), 128)
    assert 7.7 < weight.compression < 8
    assert "7.76x smaller than float32" in repr(weight)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_save_and_load_are_bit_equal(tmp_path, symmetric):
    weight = pack(*random_parts(17, 576, 32, symmetric, torch.bfloat16), 32)
    norm = torch.randn(7)
    qu.save_packed(tmp_path / "w.safetensors", {"layer.weight": weight, "norm": norm}, {"made_by": "a test"})
    tensors, metadata = qu.load_packed(tmp_path / "w.safetensors")
    loaded = tensors["layer.weight"]
    assert isinstance(loaded, Int4Weight) and metadata["made_by"] == "a test"
    assert (loaded.group_size, loaded.shape) == (weight.group_size, weight.shape)
    assert torch.equal(loaded.packed, weight.packed) and torch.equal(loaded.scales, weight.scales)
    assert (loaded.zeros is None) if symmetric else torch.equal(loaded.zeros, weight.zeros)
    assert torch.equal(tensors["norm"], norm)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
    maps = Path("/proc/self/maps")
    assert not maps.exists() or "w.safetensors" not in maps.read_text(), "the file is read, and no longer needed"


def test_failed_save_leaves_nothing(tmp_path):
    with pytest.raises(NotImplementedError, match="meta"):  # a tensor without data cannot be written
        qu.save_packed(tmp_path / "w.safetensors", {"a": torch.empty(3, device="meta")})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_os_error(tmp_path):
    """In a process of its own, whose files may not grow past 4 KiB."""
    program = """
import resource, signal, sys, torch
from tiny_gemm.quantize_utils import save_packed
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save_packed(sys.argv[1], {"a": torch.zeros(100000)})
except OSError as e:
    print("OSError", e)
"""
    path = tmp_path / "w.safetensors"
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("OSError") and "w.safetensors" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_value_errors(tmp_path):
    path = tmp_path / "w.safetensors"
    qu.save_packed(path, {"w": pack(*random_parts(16, 64, 32, True), 32)})
    whole = path.read_bytes()
    for size in [0, 4, 8, 20, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="w.safetensors"):
            qu.load_packed(path)
    path.write_bytes(whole.replace(b'"shape\\": [16, 64]', b'"shape\\": [16, 96]'))
    with pytest.raises(ValueError, match="16 x 96"):
        qu.load_packed(path)
    path.write_bytes(whole.replace(b'"tiny-gemm-int4"', b'"tiny-gemm-int5"'))
    with pytest.raises(ValueError, match="tiny-gemm-int5"):
        qu.load_packed(path)


def integer_zeros(largest):
    zeros = torch.tensor([[8], [0], [largest], [5]], dtype=torch.int16)
    return pack(torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 1), zeros, 64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize(torch.randn(4, 100), 64), "K=100 must be a multiple of group_size=64"),
        (lambda: quantize(torch.randn(4, 96), 48), "group_size=48 must be one of"),
        (lambda: quantize(torch.randn(4)), "must be a non-empty floating-point matrix"),
        (lambda: quantize(torch.full((4, 128), float("nan"))), "NaN or infinity"),
        (lambda: quantize(torch.full((4, 128), 1e9)), "exceeds torch.float16's range"),
        (lambda: pack(torch.full((4, 64), 16, dtype=torch.uint8), torch.ones(4, 1), None, 64), "q holds 16"),
        (lambda: pack(torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 2), None, 64), "scales of a 4 x 64 weight"),
        (lambda: integer_zeros(-1), "zeros hold -1; integer zeros must be from 0 to 127"),
        (lambda: integer_zeros(128), "zeros hold 128; integer zeros must be from 0 to 127"),
        (lambda: qu.from_q4_0(torch.zeros(4, 19, dtype=torch.uint8)), "GGUF blocks must be uint8"),
    ],
    ids=["k", "group", "vector", "nan", "range", "nibble", "scales", "negative-zero", "large-zero", "blocks"],
)
def test_mistakes_name_the_value_and_the_rule(call, message):
    with pytest.raises(ValueError, match=message):
        call()
