"""packed_formats.py: GPTQ, AWQ, compressed-tensors and HQQ checkpoints mean what their formats' descriptions say.

The encoders are written from those descriptions with plain integers and loops, and share nothing with the module. What
the packers of hqq and compressed-tensors write is in fixtures/packed_formats (packed_fixtures.py wrote it).
"""

import json
import random
from pathlib import Path

import pytest
import torch
from packed_fixtures import FIXTURES
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_cli import refused, run
from tiny_checkpoints import hf_config, random_weights, write_tokenizer

from tiny_gemm import checkpoint
from tiny_gemm.checkpoint import CheckpointError, load
from tiny_gemm.generate import Generator, SamplingParams
from tiny_gemm.model import KVCache
from tiny_gemm.packed_formats import PackedFormat, unpack_awq, unpack_compressed_tensors, unpack_gptq, unpack_hqq
from tiny_gemm.quantize_utils import Int4Weight, dequantize, pack

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
CT_WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "actorder": None}
CT_GROUP = {"targets": ["Linear"], "weights": CT_WEIGHTS, "input_activations": None, "output_activations": None}
CT = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": CT_GROUP}}
CT |= {"kv_cache_scheme": None, "ignore": ["lm_head"], "quantization_status": "compressed"}


HQQ_WEIGHTS = {"nbits": 4, "channel_wise": True, "group_size": 32, "optimize": True, "round_zero": True, "axis": 1}
HQQ_WEIGHTS |= {"view_as_float": False}
HQQ_LINEAR = {"weight_quant_params": HQQ_WEIGHTS, "scale_quant_params": None, "zero_quant_params": None}
HQQ = {"quant_method": "hqq", "quant_config": HQQ_LINEAR | {"offload_meta": False}, "skip_modules": ["lm_head"]}


def hqq(linear: dict | None = None, **weights) -> dict:
    """HQQ with other entries in what it says of all linears, and of their weights."""
    return HQQ | {"quant_config": HQQ_LINEAR | {"weight_quant_params": HQQ_WEIGHTS | weights} | (linear or {})}


def ct(group: dict | None = None, **weights) -> dict:
    """CT with other entries in its one config group, and in what that says of the weights."""
    return CT | {"config_groups": {"group_0": CT_GROUP | {"weights": CT_WEIGHTS | weights} | (group or {})}}


CONFIGS = {  # every kind that must come through without loss
    "gptq": GPTQ,
    "gptq sym": GPTQ,
    "gptq per channel": dict(GPTQ, group_size=-1),
    "gptq_v2": dict(GPTQ, checkpoint_format="gptq_v2", is_marlin_format=False, dynamic={"-:.*embed.*": {}}),
    "gptq desc_act": dict(GPTQ, desc_act=True),  # with groups of neighbours all the same (static_groups)
    "gptq scattered": dict(GPTQ, desc_act=True),
    "gptq_v2 scattered sym": dict(GPTQ, desc_act=True, checkpoint_format="gptq_v2"),
    "gptq per channel desc_act": dict(GPTQ, desc_act=True, group_size=-1),
    "awq": AWQ,
    "awq per channel": dict(AWQ, group_size=-1, version="GEMM"),
    "ct": ct(symmetric=False),
    "ct sym": CT,
    "ct per channel": ct(strategy="channel", group_size=None, symmetric=False, actorder="static"),
    "ct sym per channel": ct(strategy="channel", group_size=None),
    "ct scattered": ct(symmetric=False, actorder="group"),
    "hqq": HQQ,
    "hqq sym": HQQ,
    "hqq viewed as float": hqq(view_as_float=True),
    "hqq per channel": hqq(group_size=None),
    "hqq by linear": HQQ | {"quant_config": {"self_attn.q_proj": HQQ_LINEAR, "mlp.up_proj": None}},
}


# ------------------------------------------------------------------------------------------------------- encoders
class Linear:
    """Random integers q [N][K], zero points [N][groups], and scales [N, groups], as a quantizer would find them.

    order: the seed of a random order in which the columns fill the groups; None leaves them in their places.
    real_zeros: zero points that are no integers.
    """

    def __init__(
        self,
        n: int,
        k: int,
        group_size: int,
        symmetric: bool,
        dtype=torch.float16,
        seed: int = 0,
        order: int | None = None,
        real_zeros: bool = False,
    ):
        rng = random.Random(seed)
        self.n, self.k, self.groups = n, k, 1 if group_size == -1 else k // group_size
        self.group_of = [i // (k // self.groups) for i in range(k)]
        if order is not None:
            random.Random(order).shuffle(self.group_of)
        self.q = [[rng.randrange(16) for _ in range(k)] for _ in range(n)]
        self.zeros = [[8 if symmetric else rng.randrange(1, 16) for _ in range(self.groups)] for _ in range(n)]
        scales = [[rng.uniform(0.1, 0.4) * k**-0.5 for _ in range(self.groups)] for _ in range(n)]
        self.scales = torch.tensor(scales).to(dtype)
        if real_zeros:
            zeros = [[rng.uniform(1, 15) for _ in range(self.groups)] for _ in range(n)]
            self.zeros = torch.tensor(zeros).to(dtype).tolist()

    def by_group(self) -> list[int]:
        """The columns, group by group."""
        return sorted(range(self.k), key=lambda k: self.group_of[k])  # stable

    def meaning(self) -> torch.Tensor:
        """(q - zero) * scale, float64 [N, K]; exact."""
        scales, zeros = self.scales.tolist(), self.zeros
        return torch.tensor(
            [[(self.q[n][k] - zeros[n][g]) * scales[n][g] for k, g in enumerate(self.group_of)] for n in range(self.n)],
            dtype=torch.float64,
        )


def word(nibbles: list[int]) -> int:
    """Up to eight integers in an int32, the first in the lowest bits."""
    value = sum(nibble << (4 * i) for i, nibble in enumerate(nibbles))
    return value - 2**32 if value >= 2**31 else value


def int32(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def encode_gptq(w: Linear, less: int) -> dict[str, torch.Tensor]:
    """less: 1 for the first format, which stores zero - 1; 0 for the second."""
    qweight = [[word([w.q[n][k + i] for i in range(8)]) for n in range(w.n)] for k in range(0, w.k, 8)]
    qzeros = [[word([w.zeros[n + i][g] - less for i in range(8)]) for n in range(0, w.n, 8)] for g in range(w.groups)]
    g_idx = torch.tensor(w.group_of, dtype=torch.int32)
    return {"qweight": int32(qweight), "qzeros": int32(qzeros), "scales": w.scales.T.contiguous(), "g_idx": g_idx}


def encode_awq(w: Linear) -> dict[str, torch.Tensor]:
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    qweight = [[word([w.q[n + i][k] for i in order]) for n in range(0, w.n, 8)] for k in range(w.k)]
    qzeros = [[word([w.zeros[n + i][g] for i in order]) for n in range(0, w.n, 8)] for g in range(w.groups)]
    return {"qweight": int32(qweight), "qzeros": int32(qzeros), "scales": w.scales.T.contiguous()}


def encode_ct(w: Linear, zeros: bool) -> dict[str, torch.Tensor]:
    """The last int32 of a row (of a column, for the zero points) is filled up with zero bits."""
    packed = [[word(row[k : k + 8]) for k in range(0, w.k, 8)] for row in w.q]
    parts = {"weight_packed": int32(packed), "weight_scale": w.scales, "weight_shape": torch.tensor([w.n, w.k])}
    if zeros:
        rows = [
            [word([w.zeros[i][g] for i in range(n, min(n + 8, w.n))]) for g in range(w.groups)]
            for n in range(0, w.n, 8)
        ]
        parts["weight_zero_point"] = int32(rows)
    return parts


def encode_hqq(w: Linear, view_as_float: bool = False) -> dict[str, torch.Tensor]:
    """Every setting is a tensor, and a string those of its characters."""
    size = w.k // w.groups
    rows = [w.q[n][k : k + size] for n in range(w.n) for k in range(0, w.k, size)]
    first, second = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    packed = [[16 * a + b for a, b in zip(*pair, strict=True)] for pair in zip(first, second, strict=True)]
    column = lambda rows: torch.tensor([[x] for row in rows for x in row], dtype=w.scales.dtype)  # noqa: E731
    characters = lambda text: torch.tensor([ord(c) for c in text], dtype=torch.uint8)  # noqa: E731
    parts = {"W_q": torch.tensor(packed, dtype=torch.uint8)}
    if view_as_float:
        parts["W_q"] = parts["W_q"].view(w.scales.dtype)
    parts |= {"scale": column(w.scales.tolist()), "zero": column(w.zeros), "shape": torch.tensor([w.n, w.k])}
    numbers = {"nbits": 4, "group_size": size, "axis": 1}
    parts |= {name: torch.tensor(number, dtype=torch.int32) for name, number in numbers.items()}
    flags = {"view_as_float": view_as_float, "channel_wise": True, "optimize": True, "round_zero": True}
    flags |= {"quant_scale": False, "quant_zero": False, "offload_meta": False}
    flags |= {"encoded_state_dict": True, "stores_quant_config": True}
    parts |= {name: torch.tensor(int(flag), dtype=torch.uint8) for name, flag in flags.items()}
    texts = {"packing": "4bit_u8", "unpack_view_dtype": "torch.uint8", "compute_dtype": str(w.scales.dtype)}
    return parts | {name: characters(text) for name, text in texts.items()}


def encode(kind: str, w: Linear) -> dict[str, torch.Tensor]:
    if kind.startswith("gptq"):
        parts = encode_gptq(w, less=0 if kind.startswith("gptq_v2") else 1)
        return parts if kind != "gptq sym" else {n: t for n, t in parts.items() if n != "g_idx"}
    if kind.startswith("hqq"):
        return encode_hqq(w, view_as_float="float" in kind)
    if kind.startswith("awq"):
        return encode_awq(w)
    parts = encode_ct(w, zeros="sym" not in kind)
    return parts | {"weight_g_idx": torch.tensor(w.group_of)} if "scattered" in kind else parts


def linear_of(kind: str, n: int, k: int, dtype=torch.float16, seed: int = 0, order: int = 1) -> Linear:
    group_size, symmetric = group_size_of(kind), "sym" in kind
    order = order if "scattered" in kind else None
    return Linear(n, k, group_size, symmetric, dtype, seed, order, "hqq" in kind and not symmetric)


def group_size_of(kind: str) -> int:
    return -1 if "per channel" in kind else 32


def in_place(w: torch.Tensor, order: torch.Tensor | None) -> torch.Tensor:
    """w [N, K], whose column i is the layer's column order[i], with every column in its place."""
    if order is None:
        return w
    placed = torch.full_like(w, torch.nan)
    placed[:, order.long()] = w
    return placed


# ------------------------------------------------------------------------------------------------- one linear
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(8, 32), (24, 96), (40, 160)], ids=str)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_linear_means_what_was_encoded(kind, shape, dtype):
    w, form = linear_of(kind, *shape, dtype), PackedFormat.from_config(CONFIGS[kind])
    parts = encode(kind, w)
    order = form.input_order(parts[form.order_part]) if form.order_part in parts else None
    q, scales, zeros, group_size = form.unpack(parts)
    columns = w.by_group()
    assert q.dtype == torch.uint8 and q.tolist() == [[row[k] for k in columns] for row in w.q]
    assert scales.dtype == dtype and torch.equal(scales, w.scales)  # as they came
    assert zeros is None if "sym" in kind else zeros.tolist() == w.zeros
    whole = all(float(zero).is_integer() for row in w.zeros for zero in row)
    assert zeros is None or zeros.dtype == (torch.int16 if whole else dtype)
    assert group_size in ({-1, shape[1]} if group_size_of(kind) in (-1, shape[1]) else {32})
    assert columns == [*range(w.k)] if order is None else order.tolist() == columns and order.dtype == torch.int32
    assert (order is not None) == ("scattered" in kind and w.groups > 1)
    packed = pack(q, scales, zeros, group_size)
    assert torch.equal(in_place(dequantize(packed, torch.float64), order), w.meaning())


@pytest.mark.parametrize("name", ["hqq", "hqq-float16", "hqq-viewed-as-bfloat16", "hqq-per-channel"])
def test_against_what_hqq_packed(name):
    means_what_its_packer_reads(name)


@pytest.mark.parametrize("name", ["ct-symmetric", "ct-asymmetric", "ct-per-channel"])
def test_against_what_compressed_tensors_packed(name):
    means_what_its_packer_reads(name)


def fixture_of(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """(quantization_config, tensors) of a linear in fixtures/packed_formats."""
    file = FIXTURES / f"{name}.safetensors"
    with safe_open(file, "pt") as f:
        return json.loads(f.metadata()["quantization_config"]), load_file(file)


def means_what_its_packer_reads(name: str) -> None:
    quantization, parts = fixture_of(name)
    expected = parts.pop("expected")
    form = PackedFormat.from_config(quantization)
    needed, optional = form.parts
    assert {*needed} <= parts.keys() <= {*needed, *optional}
    packed = pack(*form.unpack(parts))
    assert expected.std() > 0.01 and torch.equal(dequantize(packed), expected)


@pytest.mark.parametrize(
    "name, words", [("hqq-axis-0", "axis=0; supported: 1"), ("hqq-3-bit", "nbits=3; supported: 4")]
)
def test_what_hqq_packed_in_other_ways_is_refused(name, words):
    quantization, parts = fixture_of(name)
    with pytest.raises(ValueError, match=words):
        PackedFormat.from_config(quantization)
    with pytest.raises(ValueError, match=words):
        unpack_hqq(parts)


def test_hand_made_words():
    """The very bits, once: 0x76543210 holds 0 to 7 from the lowest bits up, read in each format's order."""
    words, ones = torch.full((1, 32), 0x76543210, dtype=torch.int32), torch.ones(1, 8).half()
    gptq = {"qweight": words[:, :8].repeat(4, 1), "qzeros": words[:, :1], "scales": ones}
    q, _, zeros, _ = unpack_gptq(gptq, 32, zero_offset=1)
    assert q.tolist() == [[*range(8)] * 4] * 8 and zeros.flatten().tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    awq = {"qweight": words.T.contiguous(), "qzeros": words[:, :1], "scales": ones}
    q, _, zeros, _ = unpack_awq(awq, 32)
    assert q[:, 0].tolist() == q[:, 31].tolist() == zeros.flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    packed = {"weight_packed": words[:, :4], "weight_scale": ones[:, :1], "weight_shape": torch.tensor([1, 32])}
    q, _, zeros, _ = unpack_compressed_tensors(packed, 32, has_zeros=False)
    assert q.tolist() == [[*range(8)] * 4] and zeros is None
    w = Linear(2, 32, 32, symmetric=False)
    parts = encode_hqq(w)
    zeros = unpack_hqq(parts)[2]
    assert zeros.dtype == torch.int16 and zeros.tolist() == w.zeros, "integers, as they were drawn"
    q, _, _, _ = unpack_hqq(parts | {"W_q": torch.full((1, 32), 0x1E, dtype=torch.uint8)})
    assert q.tolist() == [[1] * 32, [14] * 32]  # the high nibbles are the first half of the rows
    scattered = gptq | {"qweight": words[:, :8].repeat(8, 1), "qzeros": words[:, :1].repeat(2, 1)}
    scattered |= {"scales": ones.repeat(2, 1), "g_idx": torch.arange(64).int() % 2}
    q, _, _, _ = unpack_gptq(scattered, 32, zero_offset=1)
    assert q.tolist() == [[0, 2, 4, 6] * 8 + [1, 3, 5, 7] * 8] * 8  # even columns are group 0, odd ones group 1


@pytest.mark.parametrize("shape, group_size", [((1, 64), 32), ((1, 32), -1), ((5, 20), -1), ((13, 9), -1)], ids=str)
def test_compressed_tensors_fills_up_its_last_words(shape, group_size):
    w = Linear(*shape, group_size, symmetric=False)
    q, scales, zeros, _ = unpack_compressed_tensors(encode_ct(w, zeros=True), group_size, has_zeros=True)
    assert q.tolist() == w.q and zeros.tolist() == w.zeros


@pytest.mark.parametrize("strategy", ["group", "channel"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_against_the_packer_of_compressed_tensors(strategy, symmetric):
    reason = "needs the package compressed-tensors, which nothing else here does"
    quantization = pytest.importorskip("compressed_tensors.quantization", reason=reason, exc_type=ImportError)
    theirs = pytest.importorskip("compressed_tensors.compressors.pack_quantized", reason=reason, exc_type=ImportError)
    args = quantization.QuantizationArgs(
        num_bits=4, symmetric=symmetric, strategy=strategy, group_size=32 if strategy == "group" else None
    )
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    w = Linear(40, 96, args.group_size or -1, symmetric, torch.float32)
    state = {"weight": w.meaning().float(), "weight_scale": w.scales}
    state["weight_zero_point"] = torch.tensor(w.zeros, dtype=torch.int8) - 8
    parts = theirs.PackedQuantizationCompressor.compress(state, scheme)
    ours = encode_ct(w, zeros=not symmetric)
    assert parts.keys() == ours.keys() and all(torch.equal(parts[n], t) for n, t in ours.items())
    config = CT | {"config_groups": {"group_0": json.loads(scheme.model_dump_json())}}
    packed = pack(*PackedFormat.from_config(config).unpack(parts))
    expected = theirs.PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
    assert torch.equal(dequantize(packed), expected)


def test_against_the_awq_reader_of_compressed_tensors():
    reason = "needs the package compressed-tensors, which nothing else here does"
    convert = pytest.importorskip("compressed_tensors.entrypoints.convert", reason=reason, exc_type=ImportError)
    parts = encode_awq(w := Linear(24, 96, 32, symmetric=False))
    reader = convert.AutoAWQConverter
    q, zeros = reader.reverse_awq_order(*reader.unpack_awq(parts["qweight"], parts["qzeros"], 4), 4)
    assert (q & 15).T.tolist() == w.q and (zeros & 15).T.tolist() == w.zeros  # theirs are signed until then


# ------------------------------------------------------------------------------------------------- a directory
def write(
    directory: Path,
    kind: str,
    *,
    family: str = "llama",
    biases: bool = False,
    head: bool = False,
    own_orders: bool = False,
) -> dict:
    """Writes a tiny model whose linear layers (and head) are of that kind, the rest float16; returns what it means,
    float32 tensors. biases: one of zeros for every linear, as AutoGPTQ wrote them. own_orders: scattered groups differ
    between linears that share their inputs, which quantizers do not do, since they see the same activations."""
    shape = dict(layers=1, hidden=64, ffn=96, heads=2, kv_heads=1, head_dim=64, vocab=288)
    directory.mkdir(parents=True)
    config = hf_config(family, tied=not head, **shape) | {"dtype": "float16", "quantization_config": CONFIGS[kind]}
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory)
    meaning, stored = {}, {}
    for i, (name, array) in enumerate(random_weights(tied=not head, bias=family == "qwen2", **shape).items()):
        stem = name.removesuffix(".weight")
        if not stem.endswith("_proj") and stem != "lm_head":
            stored[name] = torch.from_numpy(array).half()
            meaning[name] = stored[name].float()
            continue
        w = linear_of(kind, *array.shape, seed=i, order=i if own_orders else 1)
        stored |= {f"{stem}.{part}": t for part, t in encode(kind, w).items()}
        meaning[name] = w.meaning().float()  # exact: 5 bits times the 11 of a float16
        if biases:
            stored.setdefault(f"{stem}.bias", torch.zeros(w.n).half())
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    return meaning


def write_plain(directory: Path, like: Path, meaning: dict[str, torch.Tensor]) -> Path:
    """The same model in float32, with nothing quantized."""
    directory.mkdir()
    config = json.loads((like / "config.json").read_text())
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory)
    save_file(meaning, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def logits_of(path: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    """Of two prompts' last tokens, and of one more each."""
    model, _ = load(path, dtype=dtype, device=device)
    cache = KVCache.allocate(model.config, 2, 32, device, model.dtype)
    tokens = torch.tensor([[5, 40, 41, 7, 99, 3], [12, 13, 250, 0, 0, 0]], device=device)
    first = model.prefill(tokens, torch.tensor([6, 3], dtype=torch.int32, device=device), cache)
    return torch.cat((first, model.decode(torch.tensor([17, 60], device=device), cache))).cpu()


def tensors_of(path: Path) -> dict[str, torch.Tensor | Int4Weight]:
    source = checkpoint._open(path)
    checkpoint._check(source, None)
    return {name: source.read(name, torch.float32) for name in source.shapes}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_directory_computes_what_its_weights_mean(tmp_path, kind):
    meaning = write(tmp_path / "m", kind, head="gptq_v2" in kind)
    tensors = tensors_of(tmp_path / "m")
    orders = {name: tensors.pop(name) for name in list(tensors) if name.endswith("input_order")}
    assert len(orders) == ("scattered" in kind) * (7 + ("gptq_v2" in kind))
    assert tensors.keys() == meaning.keys()
    for name, w in tensors.items():
        assert isinstance(w, Int4Weight) == ("_proj" in name or name == "lm_head.weight"), name
        order = orders.get(name.replace("weight", "input_order"))
        assert torch.equal(in_place(dequantize(w), order) if isinstance(w, Int4Weight) else w.float(), meaning[name])
    expected = logits_of(write_plain(tmp_path / "plain", tmp_path / "m", meaning))
    torch.testing.assert_close(logits_of(tmp_path / "m"), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.01


@pytest.mark.parametrize("own_orders", [False, True], ids=["one-order", "own-orders"])
@pytest.mark.parametrize("kind", ["gptq scattered", "ct scattered"])
def test_inputs_meet_their_columns(tmp_path, kind, own_orders):
    """In bfloat16 the weights stay INT4, so that their inputs must change places; so it is after quantize, too."""
    meaning = write(tmp_path / "m", kind, own_orders=own_orders)
    expected = logits_of(write_plain(tmp_path / "plain", tmp_path / "m", meaning))
    got = logits_of(tmp_path / "m", torch.bfloat16)
    assert (got - expected).norm() < 0.03 * expected.norm()
    model, _ = load(tmp_path / "m")
    layer = model.layers[0]
    assert (len(layer.qkv.parts), layer.ffn.fused) == ((3, False) if own_orders else (1, True))
    assert model.weight_bytes() > load(tmp_path / "plain", quantize=32)[0].weight_bytes()  # the orders are read as well
    result = run("quantize", tmp_path / "m", tmp_path / "packed", "--json")
    assert json.loads(result.stdout)["tensors_int4_already"] == 7
    assert torch.equal(logits_of(tmp_path / "packed", torch.bfloat16), got)
    assert torch.equal(logits_of(tmp_path / "packed"), logits_of(tmp_path / "m"))


@pytest.mark.gpu
def test_inputs_meet_their_columns_on_a_gpu(tmp_path):
    meaning = write(tmp_path / "m", "gptq scattered")
    expected = logits_of(write_plain(tmp_path / "plain", tmp_path / "m", meaning))
    got = logits_of(tmp_path / "m", torch.bfloat16, "cuda")
    assert (got - expected).norm() < 0.03 * expected.norm()
    model, tokenizer = load(tmp_path / "m", device="cuda")
    Generator(model, tokenizer).generate(["the the"], SamplingParams(max_new_tokens=4))  # in a CUDA graph


ORDER = "model.layers.0.mlp.up_proj.input_order"
WRONG_ORDERS = {
    "twice": (torch.zeros(64, dtype=torch.int32), f"{ORDER} must hold each of 0 to 63 once, as int32"),
    "int64": (torch.arange(64), f"{ORDER} must hold each of 0 to 63 once, as int32"),
    "float": (torch.arange(64).half(), f"{ORDER} must hold each of 0 to 63 once, as int32"),
    "short": (torch.arange(63).int(), f"{ORDER} has shape (63,), the config says (64,)"),
}


@pytest.mark.parametrize("order, words", WRONG_ORDERS.values(), ids=WRONG_ORDERS.keys())
def test_wrong_orders_in_a_packed_directory(tmp_path, order, words):
    write(tmp_path / "m", "gptq scattered")
    checkpoint.convert(tmp_path / "m", tmp_path / "packed")
    file = tmp_path / "packed" / "model.safetensors"
    with safe_open(file, "pt") as f:
        metadata = f.metadata()
    save_file(load_file(file) | {ORDER: order}, file, metadata)
    refuses(tmp_path / "packed", words)
    with pytest.raises(checkpoint.CheckpointError, match="input_order"):
        checkpoint.convert(tmp_path / "packed", tmp_path / "again", group_size=32)


def test_an_order_without_an_int4_weight_is_refused(tmp_path):
    meaning = write(tmp_path / "m", "awq")
    plain = write_plain(tmp_path / "plain", tmp_path / "m", meaning)
    save_file(meaning | {ORDER: torch.arange(64).half()}, plain / "model.safetensors")
    refuses(plain, f"no place for, tensor {ORDER}")


def test_a_model_may_be_quantized_in_part(tmp_path):
    """modules_to_not_convert, ignore: what the file holds in 16 bits stays so, and can be quantized on load."""
    meaning = write(tmp_path / "m", "awq")
    file = tmp_path / "m" / "model.safetensors"
    name = "model.layers.0.mlp.down_proj"
    stored = {n: t for n, t in load_file(file).items() if not n.startswith(name)}
    save_file(stored | {f"{name}.weight": meaning[f"{name}.weight"].bfloat16()}, file)
    tensors = tensors_of(tmp_path / "m")
    assert tensors[f"{name}.weight"].dtype == torch.bfloat16
    assert isinstance(tensors[f"{name.replace('down', 'up')}.weight"], Int4Weight)
    assert load(tmp_path / "m", quantize=32)


def test_a_tied_head_stored_a_second_time_is_ignored(tmp_path):
    write(tmp_path / "m", "gptq", head=True)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert "lm_head.weight" not in tensors_of(tmp_path / "m")
    assert logits_of(tmp_path / "m").isfinite().all()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_biases_of_zeros_are_left_out_where_the_model_has_none(tmp_path, family):
    meaning = write(tmp_path / "m", "gptq", family=family, biases=True)
    assert tensors_of(tmp_path / "m").keys() == meaning.keys()  # qwen2's own stay, those of its o_proj go
    file = tmp_path / "m" / "model.safetensors"
    if family == "qwen2":
        save_file(load_file(file) | {"model.layers.0.self_attn.k_proj.bias": torch.zeros(64)}, file)
        assert tensors_of(tmp_path / "m").keys() == meaning.keys()
    name = "model.layers.0.self_attn.o_proj.bias"
    save_file(load_file(file) | {name: torch.ones(64)}, file)
    refuses(tmp_path / "m", f"no place for, tensor {name}")


@pytest.mark.parametrize("kind", ["awq", "hqq"])
def test_quantize_writes_them_as_packed_directories(tmp_path, kind):
    write(tmp_path / "m", kind)
    result = run("quantize", tmp_path / "m", tmp_path / "packed", "--json")
    report = json.loads(result.stdout)
    assert (report["tensors_quantized"], report["tensors_int4_already"]) == (0, 7)
    written = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert written == {"quant_method": "tiny_gemm", "bits": 4, "symmetric": False, "group_size": 32}
    assert torch.equal(logits_of(tmp_path / "packed"), logits_of(tmp_path / "m"))
    (tmp_path / "m" / "config.json").write_text(json.dumps(hf_config() | {"quantization_config": dict(AWQ, bits=3)}))
    refused(run("quantize", tmp_path / "m", tmp_path / "other"), "quant_method='awq' is not supported with bits=3")
    assert not (tmp_path / "other").exists()


# ------------------------------------------------------------------------------------------------- refusals
def refuses(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load(path)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


REFUSED = {
    "3 bits": (dict(GPTQ, bits=3), "bits=3; supported: 4"),
    "8 bits": (dict(AWQ, bits=8), "bits=8; supported: 4"),
    "no bits": ({"quant_method": "gptq"}, "bits=None"),
    "bits in words": (dict(GPTQ, bits="4"), "bits='4'"),
    "bits as a float": (dict(GPTQ, bits=4.0), "bits=4.0"),
    "group of 16": (dict(GPTQ, group_size=16), "group_size=16; supported: 32, 64, 128, -1"),
    "no group size": (dict(AWQ, group_size=None), "group_size=None"),
    "marlin": (dict(GPTQ, checkpoint_format="marlin"), "checkpoint_format='marlin'; supported: 'gptq', 'gptq_v2'"),
    "marlin, older": (dict(GPTQ, is_marlin_format=True), "is_marlin_format=True"),
    "bits by layer": (dict(GPTQ, dynamic={".*": {"bits": 8}}), "dynamic="),
    "gemv": (dict(AWQ, version="gemv"), "version='gemv'; supported: 'gemm'"),
    "llm-awq": (dict({k: v for k, v in AWQ.items() if k != "version"}, format="llm-awq"), "version='llm-awq'"),
    "no zero points": (dict(AWQ, zero_point=False), "zero_point=False"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method='bitsandbytes'"),
    "nf4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        "nf4 and fp4 take their 16 values from a table",
    ),
    "hqq 3 bits": (hqq(nbits=3), "quant_method='hqq' is not supported with nbits=3; supported: 4"),
    "hqq 8 bits": (hqq(nbits=8), "nbits=8; supported: 4"),
    "hqq along N": (hqq(axis=0), "axis=0; supported: 1. Groups of axis 0 run along N"),
    "hqq, no axis": (hqq(axis=None), "axis=None"),
    "hqq by tensor": (hqq(channel_wise=False), "channel_wise=False"),
    "hqq group of 16": (hqq(group_size=16), "group_size=16; supported: 32, 64, 128, None"),
    "hqq, scales in 8 bits": (hqq({"scale_quant_params": {"nbits": 8}}), "scale_quant_params={'nbits': 8}"),
    "hqq, zeros in 8 bits": (hqq({"zero_quant_params": {"nbits": 8}}), "zero_quant_params={'nbits': 8}"),
    "hqq by linear": (
        HQQ | {"quant_config": {"self_attn.q_proj": HQQ_LINEAR, "mlp.up_proj": hqq(nbits=2)["quant_config"]}},
        "nbits=2; supported: 4",
    ),
    "hqq, no settings": (HQQ | {"quant_config": {}}, "needs quant_config"),
    "hqq, no weights": (HQQ | {"quant_config": {"mlp.up_proj": {}}}, "quant_config.mlp.up_proj must say what its"),
    "8 bits, gptq": (dict(GPTQ, bits=8), "bits=8; supported: 4"),
    "3 bits, compressed-tensors": (ct(num_bits=3), "num_bits=3; supported: 4"),
    "fp8": ({"quant_method": "fp8"}, "quant_method='fp8' is not supported; supported: tiny_gemm, gptq, awq"),
    "no method": ({"bits": 4}, "quant_method=None"),
    "a list": ({"quant_method": ["gptq"]}, "quant_method=['gptq']"),
    "no object": ("gptq", "quant_method='gptq'"),
    "float-quantized": (dict(CT, format="float-quantized"), "format='float-quantized'; supported: 'pack-quantized'"),
    "mixed": (ct({"format": "nvfp4-pack-quantized"}), "format='nvfp4-pack-quantized'"),
    "int8": (ct(num_bits=8), "num_bits=8; supported: 4"),
    "fp4": (ct(type="float"), "type='float'; supported: 'int'"),
    "by tensor": (ct(strategy="tensor"), "strategy='tensor'; supported: 'group', 'channel'"),
    "group of 256": (ct(group_size=256), "group_size=256"),
    "activations": (ct({"input_activations": {"num_bits": 8}}), "input_activations="),
    "kv cache": (dict(CT, kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme="),
    "sparse": (dict(CT, sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
    "rotated": (dict(CT, transform_config={"config_groups": {"r1": {}}}), "transform_config="),
    "no groups": (dict(CT, config_groups={}), "needs config_groups"),
    "no weights": (ct({"weights": None}), "config_groups.group_0 must say what its weights are"),
    "two kinds": (
        CT | {"config_groups": CT["config_groups"] | ct(group_size=64)["config_groups"] | {"b": CT_GROUP}},
        "config_groups group_0, b must agree",
    ),
}


@pytest.mark.parametrize("quantization, words", REFUSED.values(), ids=REFUSED.keys())
def test_kinds_that_would_not_come_through(tmp_path, quantization, words):
    (tmp_path / "config.json").write_text(json.dumps(hf_config() | {"quantization_config": quantization}))
    refuses(tmp_path, str(tmp_path), words)


@pytest.mark.parametrize("nonsense", [None, True, 7, 4.0, "x", [], ["x"], {}, {"x": 1}], ids=repr)
@pytest.mark.parametrize("kind", CONFIGS)
def test_nonsense_anywhere_in_a_config_is_refused_or_ignored(kind, nonsense):
    known = PackedFormat.from_config(CONFIGS[kind])

    def variants(value):
        yield nonsense
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from (value | {key: v} for v in variants(inner))

    for config in variants(CONFIGS[kind]):
        if not isinstance(config, dict):
            continue
        try:
            form = PackedFormat.from_config(config)
        except ValueError as e:
            assert "\n" not in str(e)
        else:
            assert (form.method, form.has_zeros) == (known.method, known.has_zeros) or "symmetric" in str(config)


UP = "model.layers.0.mlp.up_proj"  # 96 x 64
DAMAGED = {  # kind, part of UP, what becomes of it (None: it is left out), words
    "no zeros": ("gptq", "qzeros", None, f"lacks tensor {UP}.qzeros"),
    "no scales": ("awq", "scales", None, f"lacks tensor {UP}.scales"),
    "no integers": ("awq", "qweight", None, f"{UP}."),
    "no shape": ("ct", "weight_shape", None, f"lacks tensor {UP}.weight_shape"),
    "no zero points": ("ct", "weight_zero_point", None, f"lacks tensor {UP}.weight_zero_point"),
    "desc_act, no order": ("gptq desc_act", "g_idx", None, f"lacks tensor {UP}.g_idx"),
    "8 bits after all": ("gptq", "qweight", torch.zeros(16, 96).int(), "shape (96, 128), the config says (96, 64)"),
    "other N": ("awq", "qweight", torch.zeros(64, 13).int(), "shape (104, 64), the config says (96, 64)"),
    "three dimensions": ("ct", "weight_packed", torch.zeros(1, 96, 8).int(), "two dimensions, got (1, 96, 8)"),
    "int64": (
        "gptq",
        "qweight",
        torch.zeros(8, 96).long(),
        "must be a non-empty int32 matrix, got torch.int64 (8, 96)",
    ),
    "short scales": (
        "gptq",
        "scales",
        torch.ones(1, 96).half(),
        "scales must be float16 or bfloat16 or float32 (2, 96)",
    ),
    "scales in int": ("awq", "scales", torch.ones(2, 96).int(), "(2, 96), got torch.int32"),
    "short zeros": ("awq", "qzeros", torch.zeros(2, 11).int(), "qzeros must be int32 (2, 12), got torch.int32 (2, 11)"),
    "v1 zero 0 or 16": ("gptq", "qzeros", torch.full((2, 12), -1).int(), "qzeros holds 15"),
    "uneven groups": (
        "gptq desc_act",
        "g_idx",
        (torch.arange(64) % 3 % 2).int(),
        "g_idx names group 0 43 times, but must name each of 0 to 1 32 times",
    ),
    "a group too many": ("gptq", "g_idx", (torch.arange(64) // 32 * 2).int(), "group 1 0 times"),
    "short order": ("gptq scattered", "g_idx", torch.zeros(63).int(), "K=63 must be a multiple of group_size=32"),
    "order for others": ("gptq scattered", "g_idx", (torch.arange(96) % 3).int(), "input_order has shape (96,)"),
    "order in floats": ("gptq", "g_idx", torch.zeros(64), "g_idx must hold an integer for each column"),
    "actorder": ("ct", "weight_g_idx", torch.zeros(64).int(), "weight_g_idx names group 0 64 times"),
    "hqq, no zero points": ("hqq", "zero", None, f"lacks tensor {UP}.zero"),
    "hqq, no axis": ("hqq", "axis", None, f"lacks tensor {UP}.axis"),
    "hqq along N": ("hqq", "axis", torch.tensor(0), "axis=0; supported: 1"),
    "hqq 2 bits": ("hqq by linear", "nbits", torch.tensor(2), "nbits=2; supported: 4"),
    "hqq packing": ("hqq", "packing", torch.tensor([*b"8bit_u8"], dtype=torch.uint8), "packing='8bit_u8'"),
    "hqq, scales in 8 bits": ("hqq", "quant_scale", torch.tensor(1), "quant_scale=1; supported: 0"),
    "hqq packing in floats": ("hqq", "packing", torch.ones(8), "packing must hold characters, got torch.float32"),
    "hqq packing of no characters": ("hqq", "packing", torch.tensor([2**62]), "packing must hold characters"),
    "hqq by tensor": ("hqq", "channel_wise", torch.tensor(0), "channel_wise=0; supported: 1"),
    "hqq, other groups": ("hqq", "group_size", torch.tensor(64), "W_q must hold 96 groups of 64, two to a byte"),
    "hqq across rows": ("hqq", "group_size", torch.tensor(128), "K=64 must be a multiple of group_size=128"),
    "hqq, group of 16": ("hqq", "group_size", torch.tensor(16), "group_size=16 must be one of"),
    "hqq in int32": ("hqq", "W_q", torch.zeros(96, 32).int(), "two to a byte, got torch.int32 (96, 32)"),
    "hqq, short": ("hqq", "W_q", torch.zeros(95, 32, dtype=torch.uint8), "W_q must hold 192 groups of 32"),
    "hqq, short scales": ("hqq", "scale", torch.ones(191, 1).half(), "scale must be float16 or bfloat16 or float32"),
    "hqq, shape of others": ("hqq", "shape", torch.tensor([64, 96]), "shape (64, 96), the config says (96, 64)"),
    "hqq, no shape": ("hqq", "shape", torch.tensor([0, 64]), "shape=(0, 64) must hold two positive integers"),
    "hqq, two numbers": ("hqq", "nbits", torch.tensor([4, 4]), "nbits must hold one integer"),
    "shape of others": ("ct", "weight_shape", torch.tensor([96, 72]), "(96, 8) does not hold weight_shape=(96, 72)"),
    "shape of three": ("ct", "weight_shape", torch.tensor([1, 96, 64]), "weight_shape must be int32 or int64 (2,)"),
    "zeros unpacked": ("ct", "weight_zero_point", torch.zeros(96, 2).char(), "weight_zero_point must be int32 (12, 2)"),
    "zeros unasked": (
        "ct sym",
        "weight_zero_point",
        torch.zeros(12, 2).int(),
        f"{UP}.weight_zero_point is of type I32",
    ),
    "scale unasked": ("ct", "input_scale", torch.ones(1), f"no place for, tensor {UP}.input_scale"),
    "plain as well": ("gptq", "weight", torch.ones(96, 64), f"has both {UP}.qweight and {UP}.weight"),
}


@pytest.mark.parametrize("kind, part, tensor, words", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_tensors(tmp_path, kind, part, tensor, words):
    write(tmp_path / "m", kind)
    file = tmp_path / "m" / "model.safetensors"
    stored = load_file(file)
    stored.pop(f"{UP}.{part}", None)
    save_file(stored | ({} if tensor is None else {f"{UP}.{part}": tensor}), file)
    refuses(tmp_path / "m", words)


def test_hqqs_own_pickle_is_refused(tmp_path):
    """What hqq's save_quantized writes: a configuration that does not mention it, and qmodel.pt."""
    (tmp_path / "config.json").write_text(json.dumps(hf_config()))
    torch.save({"model.layers.0.mlp.up_proj": {"W_q": torch.zeros(96, 32)}}, tmp_path / "qmodel.pt")
    refuses(tmp_path, "pickles only (qmodel.pt), and unpickling runs code: convert them to safetensors")


def test_truncated_file(tmp_path):
    write(tmp_path / "m", "awq")
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refuses(tmp_path / "m", "model.safetensors is not a whole safetensors file")


def test_group_size_must_divide_k():
    w = Linear(8, 96, 32, symmetric=True)
    with pytest.raises(ValueError, match="K=96 must be a multiple of group_size=64"):
        unpack_awq(encode_awq(w), 64)
    with pytest.raises(ValueError, match="group_size=48 must be one of"):
        unpack_gptq(encode_gptq(w, 1), 48, zero_offset=1)
    parts = encode_gptq(w, 1)
    parts |= {"qweight": parts["qweight"][:, :7], "scales": parts["scales"][:, :7].contiguous()}
    with pytest.raises(ValueError, match="N=7 must be a multiple of 8"):
        unpack_gptq(parts, 32, zero_offset=1)
