"""checkpoint.py: what a file means, packed directories, peak memory, and every kind of broken file."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from real_model import smollm2_path
from safetensors.torch import load_file, save_file
from tiny_checkpoints import SHAPE, hf_config, random_weights, write_gguf, write_hf

from tiny_gemm import checkpoint
from tiny_gemm.checkpoint import CheckpointError, convert, load
from tiny_gemm.model import KVCache
from tiny_gemm.quantize_utils import Int4Weight, dequantize, quantize

gguf = pytest.importorskip("gguf", reason="needs the gguf package (the extra `gguf`)")

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
LINEAR_KINDS = 7


def tensors_of(path, dtype=torch.float32) -> dict[str, torch.Tensor | Int4Weight]:
    """What a checkpoint's tensors are when read at their most exact."""
    source = checkpoint._open(Path(path))
    checkpoint._check(source, None)
    return {name: source.read(name, dtype) for name in source.shapes}


def logits_of(path, **options) -> torch.Tensor:
    model, _ = load(path, **options)
    cache = KVCache.allocate(model.config, 2, 32, "cpu", model.dtype)
    tokens = torch.tensor([[5, 40, 41, 7, 99, 3], [12, 13, 250, 0, 0, 0]])
    return model.prefill(tokens, torch.tensor([6, 3], dtype=torch.int32), cache)


def same(a: torch.Tensor | Int4Weight, b: torch.Tensor | Int4Weight) -> bool:
    if isinstance(a, Int4Weight) != isinstance(b, Int4Weight):
        return False
    if isinstance(a, Int4Weight):
        parts = zip((a.packed, a.scales, a.zeros), (b.packed, b.scales, b.zeros), strict=True)
        return (a.group_size, a.shape) == (b.group_size, b.shape) and all(
            x is y is None or x.dtype == y.dtype and torch.equal(x, y) for x, y in parts
        )
    return a.dtype == b.dtype and torch.equal(a, b)


# ------------------------------------------------------------------------------------------------ GGUF
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "F16", "BF16", "F32"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])  # Q and K permuted, and not
def test_gguf_means_what_gguf_says(tmp_path, kind, family):
    meaning = write_gguf(tmp_path / "m.gguf", types=kind, embedding=kind, head=kind, family=family)
    tensors = tensors_of(tmp_path / "m.gguf")
    assert tensors.keys() == meaning.keys()
    for name, expected in meaning.items():
        w = tensors[name]
        if expected.ndim == 2 and kind.startswith("Q4"):
            assert isinstance(w, Int4Weight) and w.group_size == 32 and w.scales.dtype == torch.float16, name
            assert w.symmetric == (kind == "Q4_0")
            w = dequantize(w)
        # Q4_1 keeps m as a zero point, m / -d in float32: a rounding, every other type is exact
        torch.testing.assert_close(
            w.float(), torch.from_numpy(expected), rtol=0, atol=2e-7 if kind == "Q4_1" else 0, msg=name
        )


def test_gguf_q6_k_and_a_q4_head(tmp_path):
    """llama.cpp's Q4_0 files hold their head in Q6_K, which gguf reads but does not write: raw blocks."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (288, 210), dtype=np.uint8)
    blocks[:, 208:] = rng.uniform(1e-4, 1e-3, (288, 1)).astype(np.float16).view(np.uint8)
    shape = dict(hidden=256, heads=4, head_dim=64, kv_heads=2, ffn=64)
    path = tmp_path / "m.gguf"
    write_gguf(path, head="F32", type_of={"output.weight": "Q4_0"}, **shape)
    assert isinstance(tensors_of(path)["lm_head.weight"], Int4Weight)

    writer = gguf.GGUFWriter(tmp_path / "q6.gguf", "llama")
    reader = gguf.GGUFReader(path)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            writer.add_key_value(field.name, field.contents(), field.types[0], field.types[-1])
    for t in reader.tensors:
        if t.name == "output.weight":
            writer.add_tensor(t.name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q6_K)
        else:
            writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q6_K))
    assert torch.equal(tensors_of(tmp_path / "q6.gguf")["lm_head.weight"], expected)
    assert logits_of(tmp_path / "q6.gguf", dtype=torch.float32).isfinite().all()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_and_safetensors_of_one_model_agree(tmp_path, family, tied):
    write_gguf(tmp_path / "m.gguf", family=family, types="F32", embedding="F32", head=None if tied else "F32")
    write_hf(tmp_path / "hf", family=family, tied=tied, dtype=torch.float32)
    a, b = logits_of(tmp_path / "m.gguf", dtype=torch.float32), logits_of(tmp_path / "hf", dtype=torch.float32)
    assert torch.equal(a, b) and a.isfinite().all()


def test_int4_everywhere_computes_what_its_meaning_computes(tmp_path):
    """Q4_1 layers, a tied Q4_0 embedding: the same logits as the float32 weights that they stand for."""
    meaning = write_gguf(tmp_path / "m.gguf", types="Q4_1", embedding="Q4_0")
    write_hf(tmp_path / "hf")
    save_file({n: torch.from_numpy(w) for n, w in meaning.items()}, tmp_path / "hf" / "model.safetensors")
    expected = logits_of(tmp_path / "hf", dtype=torch.float32)
    torch.testing.assert_close(logits_of(tmp_path / "m.gguf", dtype=torch.float32), expected, rtol=1e-4, atol=1e-4)


def test_gguf_config(tmp_path):
    write_gguf(tmp_path / "m.gguf", family="qwen3", layers=3, metadata={"qwen3.rope.freq_base": 5e5})
    config = load(tmp_path / "m.gguf")[0].config
    assert (config.architecture, config.num_layers, config.hidden_size, config.head_dim) == ("qwen3", 3, 64, 64)
    assert (config.num_heads, config.num_kv_heads, config.vocab_size) == (4, 2, 288)
    assert config.rope_theta == 5e5 and config.rope_scaling is None and config.qk_norm and not config.qkv_bias
    assert config.rms_norm_eps == pytest.approx(1e-5) and config.max_position_embeddings == 256
    assert config.tie_word_embeddings and config.eos_token_ids[0] == 2 and config.bos_token_id == 1


def test_gguf_llama3_rope_factors(tmp_path):
    """llama.cpp's converter writes Llama 3's scaling as one divisor a frequency; safetensors have the recipe."""
    scaling = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    exponents = np.arange(0, 64, 2) / 64
    frequencies = 10000.0**-exponents
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    keep = np.clip((turns - 1.0) / (4.0 - 1.0), 0, 1)
    factors = 1 / ((1 - keep) / 8.0 + keep)
    assert factors[0] == 1 and factors[-1] == 8 and np.any((factors > 1) & (factors < 8))
    write_gguf(tmp_path / "m.gguf", types="F32", embedding="F32", rope_factors=factors.tolist())
    write_hf(tmp_path / "hf", dtype=torch.float32)
    plain = logits_of(tmp_path / "hf", dtype=torch.float32)
    config = hf_config() | {"rope_scaling": {"rope_type": "llama3"} | scaling}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    scaled = logits_of(tmp_path / "hf", dtype=torch.float32)
    torch.testing.assert_close(logits_of(tmp_path / "m.gguf", dtype=torch.float32), scaled, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, scaled, rtol=1e-3, atol=1e-3)
    convert(tmp_path / "m.gguf", tmp_path / "packed", group_size=32)
    assert load(tmp_path / "packed")[0].config.rope_scaling["factors"] == pytest.approx(factors.tolist())


def test_gguf_linear_rope_scaling(tmp_path):
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    write_gguf(tmp_path / "m.gguf", metadata=metadata)
    assert load(tmp_path / "m.gguf")[0].config.rope_scaling == {"rope_type": "linear", "factor": 4.0}


def test_gguf_with_a_sentencepiece_vocabulary(tmp_path):
    write_gguf(tmp_path / "m.gguf", family="mistral", tokenizer="llama")
    model, tokenizer = load(tmp_path)  # the directory that holds it
    assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"
    assert model.config.eos_token_ids == tokenizer.eos_ids == (2,)


def test_smollm_from_the_wheel():
    path = smollm2_path()
    source = checkpoint._open(path)
    config = checkpoint._check(source, None)
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
    assert config.eos_token_ids[0] == 2 and config.tie_word_embeddings and config.rope_theta == 1e5
    kinds = list(source.kinds.values())
    assert (kinds.count("Q4_1"), kinds.count("Q8_0"), kinds.count("F32")) == (210, 1, 61)

    _, tensors = checkpoint.read_gguf_header(path)
    for theirs, ours, heads in (
        ("blk.29.attn_k.weight", "model.layers.29.self_attn.k_proj.weight", 3),
        ("blk.0.ffn_down.weight", "model.layers.0.mlp.down_proj.weight", 0),
    ):
        t = tensors[theirs]
        raw = np.fromfile(path, dtype=np.uint8, count=t.nbytes, offset=t.offset).reshape(t.shape[0], -1)
        w = torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.Q4_1))
        if heads:
            w = w.view(heads, t.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(w.shape)
        rounding = 2.0**-22 * w.abs().max().item()  # of the zero point
        torch.testing.assert_close(dequantize(source.read(ours, torch.float32)), w, rtol=0, atol=rounding)


# ------------------------------------------------------------------------------------------------ safetensors
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_shards_and_one_file_agree(tmp_path, dtype):
    written = write_hf(tmp_path / "one", tied=False, dtype=dtype)
    write_hf(tmp_path / "many", tied=False, dtype=dtype, shards=3)
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert one.keys() == many.keys() == written.keys()
    assert all(same(one[n], w) and same(many[n], w) for n, w in written.items())
    assert torch.equal(logits_of(tmp_path / "one"), logits_of(tmp_path / "many"))


def test_one_file_goes_before_an_index(tmp_path):
    """As transformers has it; a directory may hold both after a download of everything."""
    write_hf(tmp_path, shards=2, seed=1)
    other = write_hf(tmp_path, seed=2)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert all(same(w, other[n]) for n, w in tensors_of(tmp_path).items())


def test_dtypes(tmp_path):
    write_hf(tmp_path, dtype=torch.float16)
    assert load(tmp_path)[0].dtype == checkpoint.default_dtype("cpu", {}) == torch.bfloat16
    assert load(tmp_path, dtype=torch.float32)[0].dtype == torch.float32


@pytest.mark.parametrize(
    ("device", "config", "expected"),
    [
        ("cpu", {"dtype": "float16"}, torch.bfloat16),
        ("cuda", {"dtype": "float16"}, torch.float16),
        ("cuda:1", {"torch_dtype": "float16"}, torch.float16),
        ("cuda", {"dtype": "bfloat16"}, torch.bfloat16),
        ("cuda", {}, torch.bfloat16),
    ],
)
def test_default_dtype_is_the_checkpoints_own_on_a_gpu(device, config, expected):
    assert checkpoint.default_dtype(device, config) == expected


def test_tied_head_stored_twice_and_old_buffers_are_ignored(tmp_path):
    tensors = write_hf(tmp_path, dtype=torch.float32)
    plain = logits_of(tmp_path, dtype=torch.float32)
    extra = {"lm_head.weight": torch.zeros(288, 64), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(tensors | extra, tmp_path / "model.safetensors")
    assert torch.equal(logits_of(tmp_path, dtype=torch.float32), plain)


@pytest.mark.parametrize("source", ["hf", "gguf"])
def test_quantize_on_load(tmp_path, source, monkeypatch):
    if source == "hf":
        write_hf(tmp_path / "m", dtype=torch.float16)
    else:
        (tmp_path / "m").mkdir()
        write_gguf(tmp_path / "m" / "m.gguf", types="F16")
    seen = {}
    monkeypatch.setattr(checkpoint, "Transformer", lambda config, weights, dtype: seen.update(weights))
    exact = tensors_of(tmp_path / "m")
    load(tmp_path / "m", quantize=32)
    linear = [n for n, w in seen.items() if isinstance(w, Int4Weight)]
    assert len(linear) == LINEAR_KINDS * SHAPE["layers"] and all("_proj.weight" in n for n in linear)
    assert all(same(seen[n], quantize(exact[n].float(), 32)) for n in linear)
    others = {n: w.dtype for n, w in seen.items() if n not in linear}
    assert others.pop("model.embed_tokens.weight") == torch.float16
    assert set(others.values()) == {torch.float16 if source == "hf" else torch.float32}  # vectors as stored


def test_group_size_must_divide_k(tmp_path):
    write_hf(tmp_path)
    with pytest.raises(CheckpointError, match=r"K=64 must be a multiple of group_size=128"):
        load(tmp_path, quantize=128)
    with pytest.raises(CheckpointError, match=r"group_size=48 must be one of"):
        convert(tmp_path, tmp_path / "out", group_size=48)
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ convert
@pytest.mark.parametrize("kind", ["hf", "shards", "Q4_0", "Q4_1", "F16"])
def test_converted_directory_loads_back_bit_equal(tmp_path, kind):
    src, dst = tmp_path / "src", tmp_path / "dst"
    if kind in ("hf", "shards"):
        write_hf(src, tied=False, shards=1 + 2 * (kind == "shards"))
    else:
        src.mkdir()
        write_gguf(src / "m.gguf", types=kind, embedding="Q8_0")
    report = convert(src, dst, group_size=32, symmetric=False)
    first = tensors_of(dst)
    quantized = 0 if kind.startswith("Q4") else LINEAR_KINDS * SHAPE["layers"]
    assert report["tensors_quantized"] == quantized and report["tensors"] == len(first)
    assert report["tensors_int4_already"] == LINEAR_KINDS * SHAPE["layers"] - quantized
    assert report["packed_bytes"] == sum(w.nbytes for w in first.values())
    assert report["int4_float32_bytes"] / report["int4_packed_bytes"] > 4
    assert json.loads(json.dumps(report)) == report

    if quantized:
        for name, w in tensors_of(src).items():
            if "_proj.weight" in name:
                w = quantize(w.float(), 32, symmetric=False, search=True)
            elif w.dim() == 2 and w.dtype == torch.float32:  # a Q8_0 table
                w = w.half()
            assert same(first[name], w), name
    else:
        assert torch.equal(logits_of(src), logits_of(dst))  # nothing was lost on the way

    convert(dst, tmp_path / "again", group_size=64)  # packed in, packed out: INT4 weights stay as they are
    second = tensors_of(tmp_path / "again")
    assert first.keys() == second.keys() and all(same(first[n], second[n]) for n in first)
    (_, tokenizer), (_, original) = load(dst), load(src)
    for text in ("the whale, été 42", "<|im_start|>user\n"):
        assert tokenizer.encode(text) == original.encode(text)
    assert tokenizer.chat_template == original.chat_template and tokenizer.eos_ids == original.eos_ids
    assert {p.name for p in tmp_path.iterdir()} == {"src", "dst", "again"}


def test_generation_config_is_copied_and_its_end_tokens_hold(tmp_path):
    write_hf(tmp_path / "src")
    generation = '{"eos_token_id": [7, 2], "temperature": 0.6}'
    (tmp_path / "src" / "generation_config.json").write_text(generation)
    convert(tmp_path / "src", tmp_path / "dst", group_size=32, search=False)
    assert (tmp_path / "dst" / "generation_config.json").read_text() == generation
    for directory in ("src", "dst"):
        model, tokenizer = load(tmp_path / directory)
        assert {2, 7} <= set(tokenizer.eos_ids) == set(model.config.eos_token_ids)


def test_packed_directory_is_readable_by_others(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    convert(tmp_path / "m.gguf", tmp_path / "out", group_size=64)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llama"
    facts = {"quant_method": "tiny_gemm", "bits": 4, "group_size": 32, "symmetric": True}
    assert config["quantization_config"] == facts  # of the weights that were INT4 already
    assert load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].shape == (64,)
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"
    assert os.stat(tmp_path / "out").st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), RuntimeError])
def test_a_failed_conversion_leaves_nothing(tmp_path, monkeypatch, error):
    write_gguf(tmp_path / "m.gguf")

    def fail(path, *args, **kwargs):
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint.quantize_utils, "save_packed", fail)
    with pytest.raises(CheckpointError if isinstance(error, OSError) else error):
        convert(tmp_path / "m.gguf", tmp_path / "out", group_size=32)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


def test_destination_must_be_new(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    (tmp_path / "empty").mkdir()
    convert(tmp_path / "m.gguf", tmp_path / "empty", group_size=32)
    convert(tmp_path / "m.gguf", tmp_path / "a" / "b", group_size=32)
    for taken in ("empty", "m.gguf"):
        with pytest.raises(CheckpointError, match="exists and is not an empty directory"):
            convert(tmp_path / "m.gguf", tmp_path / taken, group_size=32)


# ------------------------------------------------------------------------------------------------ memory, progress
_MEASURE = """
import json, sys
import torch
from tiny_gemm import checkpoint
from tiny_gemm.quantize_utils import quantize

def status(key):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(key))

checkpoint.Transformer = lambda config, weights, dtype: weights
quantize(torch.randn(64, 512), 128)  # loads the library's code
hf, gguf, packed = sys.argv[1:]
measured = {}
for name, work in {
    "convert": lambda: checkpoint.convert(hf, packed, group_size=128, search=False),
    "hf, quantized": lambda: checkpoint.load(hf, quantize=128)[0],
    "packed": lambda: checkpoint.load(packed)[0],
    "gguf": lambda: checkpoint.load(gguf)[0],
}.items():
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = status("VmRSS")
    result = work()
    size = result["packed_bytes"] if name == "convert" else sum(w.nbytes for w in result.values())
    measured[name] = size / 2**20, status("VmHWM") - before
    del result
print(json.dumps(measured))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measures through Linux's /proc")
def test_peak_memory_is_the_packed_model_and_one_tensor(tmp_path):
    """Resident memory, pages of mapped files included; more than 100 MiB are read. The largest tensor has 2^20 values:
    2 MiB in 16 bit, and the few float32 copies that quantizing takes are some 20 MiB."""
    shape = dict(hidden=512, ffn=2048, heads=8, kv_heads=4, head_dim=64)
    hf, gguf_file, packed = tmp_path / "hf", tmp_path / "m.gguf", tmp_path / "packed"
    write_hf(hf, dtype=torch.float16, layers=15, **shape)
    assert (hf / "model.safetensors").stat().st_size > 100 * 2**20
    write_gguf(gguf_file, embedding="Q4_0", layers=5, **shape)

    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}  # what is freed is gone
    command = [sys.executable, "-c", _MEASURE, str(hf), str(gguf_file), str(packed)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 0, run.stderr
    for name, (size, peak) in json.loads(run.stdout).items():
        print(f"{name}: {size:.1f} MiB packed, {peak:.1f} MiB at the peak")
        assert size > 9
        assert peak < size + 30, name


def test_progress_goes_to_stderr_when_asked(tmp_path, capfd):
    write_gguf(tmp_path / "m.gguf")
    load(tmp_path / "m.gguf")
    assert capfd.readouterr() == ("", "")
    load(tmp_path / "m.gguf", progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "Loading m.gguf" in err


# ------------------------------------------------------------------------------------------------ bad input
def by_rule(parameter) -> str:
    return parameter[:40] if isinstance(parameter, str) else "case"


def refuses(rule: str, path, **options):
    with pytest.raises(CheckpointError, match=rule) as caught:
        load(path, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options, rule",
    [
        (dict(metadata={"llama.block_count": None}), "lacks llama.block_count"),
        (dict(metadata={"llama.block_count": 0}), "llama.block_count=0 must be an integer from 1"),
        (dict(metadata={"llama.block_count": 3}), "lacks tensor model.layers.2"),
        (dict(metadata={"llama.block_count": 1}), "no place for, tensor model.layers.1"),
        (dict(metadata={"llama.block_count": 4_000_000_000}), "block_count=4000000000 must be"),
        (dict(metadata={"llama.block_count": "two"}), "block_count=two must be an integer"),
        (dict(metadata={"llama.block_count": 2**23}), "8388608 layers, but only"),
        (dict(metadata={"llama.attention.head_count": [4, 4]}), "must be an integer"),
        (dict(metadata={"llama.attention.head_count_kv": 3}), "num_heads=4 must be a multiple of num_kv_heads=3"),
        (dict(metadata={"llama.embedding_length": 128}), "has shape"),
        (dict(metadata={"llama.rope.dimension_count": 8}), "must equal the head size, 64"),
        (dict(metadata={"llama.rope.freq_base": float("nan")}), "must be a positive number"),
        (dict(metadata={"llama.rope.scaling.type": "yarn"}), "rope.scaling.type='yarn' is not supported"),
        (dict(metadata={"llama.expert_count": 8}), "expert_count=8 is not supported"),
        (dict(metadata={"split.count": 3}), "split GGUF"),
        (dict(metadata={"tokenizer.ggml.pre": "viking"}), "tokenizer.ggml.pre='viking' is not supported"),
        (dict(metadata={"tokenizer.ggml.eos_token_id": 999}), "eos_token_id=999 must be below"),
        (dict(metadata={"general.architecture": "mamba"}), "architecture 'mamba' is not supported; supported: llama"),
        (dict(rope_factors=[1.0] * 5), "rope_freqs.weight .* must be 32 positive numbers"),
        (dict(rope_factors=[0.0] * 32), "rope_freqs.weight .* must be 32 positive numbers"),
        (dict(drop=("blk.1.ffn_up.weight",)), "lacks tensor model.layers.1.mlp.up_proj.weight$"),
        (dict(drop=("token_embd.weight",)), "lacks a token_embd.weight"),
        (dict(drop=("blk.0.attn_k.weight", "blk.1.attn_k.weight")), "and 1 more"),
        (dict(replace={"blk.0.surprise.weight": np.ones(4, np.float32)}), "'blk.0.surprise.weight' has no place"),
        (dict(replace={"blk.00.attn_q.weight": np.ones((256, 64), np.float32)}), "'blk.00.attn_q.weight' has no place"),
        (dict(replace={"blk.0.attn_q.bias": np.ones(64, np.float32)}), "lacks tensor"),
        (
            dict(replace={"blk.0.attn_k.weight": np.ones((64, 64), np.float32)}),
            r"shape \(64, 64\), the config says \(128",
        ),
        (dict(replace={"blk.0.attn_norm.weight": np.ones((8, 8), np.float32)}), r"shape \(8, 8\)"),
        (dict(types="Q5_0"), "is of type Q5_0; supported: Q4_0"),
        (dict(vocab=200), "258 tokens|269 tokens|272 tokens"),
    ],
    ids=by_rule,
)
def test_bad_gguf(tmp_path, options, rule):
    write_gguf(tmp_path / "m.gguf", **options)
    refuses(rule, tmp_path / "m.gguf")


def test_paths_that_are_no_checkpoint(tmp_path):
    refuses("does not exist", tmp_path / "nothing.gguf")
    refuses("holds neither config.json nor a .gguf", tmp_path)
    for name, content, rule in (
        ("empty.gguf", b"", "0 bytes: too short"),
        ("text.gguf", b"version https://git-lfs.github.com/spec/v1\n", "not a GGUF file: it starts with b'vers'"),
        ("v1.gguf", b"GGUF" + (1).to_bytes(4, "little") + bytes(16), "version 1 is not supported"),
        ("be.gguf", b"GGUF" + (3).to_bytes(4, "big") + bytes(16), "little-endian"),
        ("many.gguf", b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 16, "at most"),
        ("none.gguf", b"GGUF" + (3).to_bytes(4, "little") + bytes(16), "architecture None"),
        ("model.bin", b"x", "is a pickle"),
        ("model.pt", b"x", "is a pickle"),
        ("model.safetensors", b"x", "give the directory"),
    ):
        (tmp_path / name).write_bytes(content)
        refuses(rule, tmp_path / name)
    refuses("holds 6 GGUF files, name one", tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(hf_config()))
    refuses("lacks model.safetensors", tmp_path / "m")
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    refuses("pickles only .pytorch_model.bin.", tmp_path / "m")


def test_bad_arguments(tmp_path):
    write_gguf(tmp_path / "m.gguf")
    with pytest.raises(ValueError, match="dtype=torch.int8 must be float32, bfloat16 or float16"):
        load(tmp_path, dtype=torch.int8)
    for device in ("mps", "xpu", "meta", "abacus", "", 1.5, None, torch.device("mps")):
        with pytest.raises(ValueError, match=f"^device='{device}' must be cpu, cuda or cuda:N$"):
            load(tmp_path, device=device)
    for device in ("cuda:99", *(["cuda"] if not torch.cuda.is_available() else [])):
        with pytest.raises(
            ValueError, match=rf"^device='{device}': torch \S+ sees \d+ GPUs; tiny-gemm doctor says why$"
        ):
            load(tmp_path, device=device)
    refuses("group_size=48 must be one of", tmp_path, quantize=48)


def test_gguf_package_missing(tmp_path, monkeypatch):
    write_gguf(tmp_path / "m.gguf")
    monkeypatch.setitem(sys.modules, "gguf", None)
    refuses(r"pip install 'tiny-gemm\[gguf\]'", tmp_path / "m.gguf")


@pytest.mark.parametrize(
    "change, rule",
    [
        ({"model_type": "gpt_neox"}, "model_type 'gpt_neox' is not supported"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "64"}, "."),
        ({"hidden_size": 10**12}, "hidden_size=1000000000000 is out of range"),
        ({"num_hidden_layers": 5}, "lacks tensor model.layers.2"),
        ({"num_hidden_layers": 10**6}, "1000000 layers, but only"),
        ({"vocab_size": 100}, r"shape \(288, 64\), the config says \(100, 64\)"),
        ({"tie_word_embeddings": False}, "lacks tensor lm_head.weight$"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": 7}, "."),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method='gptq' is not supported"),
        ({"quantization_config": "awq"}, "quant_method='awq' is not supported"),
    ],
    ids=by_rule,
)
def test_bad_config(tmp_path, change, rule):
    write_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(hf_config() | change))
    refuses(rule, tmp_path)


@pytest.mark.parametrize(
    "content, rule",
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object"),
        ("[" * 100_000, "is not JSON"),
        ('{"model_type": "llama", "model_type": "qwen2"}', "'model_type' is there twice"),
        ("\udcff", "is not JSON"),
    ],
    ids=["empty", "half", "list", "deep", "twice", "bytes"],
)
def test_config_that_is_no_json(tmp_path, content, rule):
    write_hf(tmp_path)
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    refuses(rule, tmp_path)


def test_bad_tensors_in_safetensors(tmp_path):
    tensors = write_hf(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    for changed, rule in (
        ({n: t for n, t in tensors.items() if n != name}, f"lacks tensor {name}"),
        (tensors | {"model.layers.0.mlp.up_proj.bias": torch.zeros(96)}, "no place for, tensor .*up_proj.bias"),
        (tensors | {name: torch.zeros(96, 65)}, r"up_proj.weight has shape \(96, 65\), the config says \(96, 64\)"),
        (tensors | {name: torch.zeros(96, 64, dtype=torch.float8_e4m3fn)}, "is of type F8_E4M3; supported: BF16"),
        (tensors | {name: torch.zeros(96, 64, dtype=torch.int8)}, "is of type I8"),
    ):
        save_file(changed, tmp_path / "model.safetensors")
        refuses(rule, tmp_path)
    save_file(tensors | {name: torch.full((96, 64), float("nan"))}, tmp_path / "model.safetensors")
    refuses("up_proj.weight: w holds NaN or infinity", tmp_path, quantize=32)


def test_bad_indices(tmp_path):
    tensors = write_hf(tmp_path, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    first, shard = next(iter(good["weight_map"].items()))
    outside = tmp_path.parent / "outside.safetensors"
    save_file(tensors, outside)
    for name, rule in (
        ("model-00009-of-00002.safetensors", "names model-00009-of-00002.safetensors, which does not exist"),
        ("../outside.safetensors", "not the plain name"),
        (str(outside), "not the plain name"),
        ("..\\outside.safetensors", "not the plain name"),
        ("", "not the plain name"),
        ("..", "not the plain name"),
        ("pytorch_model.bin", "not the plain name of a .safetensors"),
        (sorted(set(good["weight_map"].values()) - {shard})[0], f"holds {first}, which it does not"),
        (7, "must map tensor names to file names"),
    ):
        index.write_text(json.dumps({"weight_map": good["weight_map"] | {first: name}}))
        refuses(rule, tmp_path)
    for broken in ("{}", '{"weight_map": []}', '{"weight_map": {}}', "nonsense", ""):
        index.write_text(broken)
        refuses("weight_map must map|is not JSON", tmp_path)
    index.write_text(json.dumps(good))
    held = load_file(tmp_path / shard)
    other = sorted(set(good["weight_map"].values()) - {shard})[0]
    save_file(load_file(tmp_path / other) | {first: held[first]}, tmp_path / other)
    refuses(f"{first} is in both", tmp_path)


def test_missing_tokenizer(tmp_path):
    write_hf(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    refuses("tokenizer.json is missing", tmp_path)


def test_bad_packed_directories(tmp_path):
    write_hf(tmp_path / "src")
    convert(tmp_path / "src", tmp_path / "m", group_size=32, search=False)
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    from safetensors import safe_open

    with safe_open(file, "pt") as f:
        header = f.metadata()
    name = "model.layers.1.mlp.up_proj.weight"
    facts = json.loads(header["int4"])
    for t, h, rule in (
        ({n: w for n, w in tensors.items() if n != f"{name}.packed"}, header, f"lacks tensor {name}.packed"),
        (tensors | {f"{name}.scales": torch.zeros(3, 2, 16)}, header, "scales of a 96 x 64 weight must be"),
        (tensors, header | {"format_version": "9"}, "format version '9'"),
        (tensors, header | {"int4": "{"}, "does not describe packed weights"),
        (tensors, header | {"int4": json.dumps(facts | {name: {"shape": [96, 64]}})}, "does not describe"),
        (tensors, header | {"int4": json.dumps(facts | {name: facts[name] | {"shape": [96, 32]}})}, "has shape"),
        (
            tensors,
            header | {"int4": json.dumps({n: f for n, f in facts.items() if n != name})},
            "type I16|no place|lacks",
        ),
    ):
        save_file(t, file, metadata=h)
        refuses(rule, tmp_path / "m")


# ------------------------------------------------------------------------------------------------ damaged files
def survives(path) -> bool:
    """Loads, or refuses in one line; anything else (a crash, a hang, another exception) fails the test."""
    try:
        load(path, dtype=torch.float32)
    except CheckpointError as e:
        assert "\n" not in str(e) and str(e)
        return False
    return True


def offsets(size: int, header: int, count: int) -> list[int]:
    """Places to cut or to damage: all over, most of them in the header."""
    rng = random.Random(0)
    return sorted({rng.randrange(header) for _ in range(count)} | {rng.randrange(size) for _ in range(count // 4)})


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """One layer, the smallest vocabulary that holds the bytes."""
    directory = tmp_path_factory.mktemp("small")
    write_gguf(directory / "m.gguf", layers=1, hidden=32, ffn=32, heads=2, kv_heads=1, vocab=272)
    write_hf(directory / "hf", layers=1, hidden=32, ffn=32, heads=2, kv_heads=1, vocab=272)
    return directory


def test_truncated_gguf(small, tmp_path):
    content = (small / "m.gguf").read_bytes()
    header = checkpoint.read_gguf_header(small / "m.gguf")[1]["token_embd.weight"].offset
    for cut in [*range(0, 64), *offsets(len(content), header, 100), len(content) - 1]:
        (tmp_path / "m.gguf").write_bytes(content[:cut])
        # the last tensor's padding may go
        assert not survives(tmp_path / "m.gguf") or cut > len(content) - 32, cut


def test_damaged_gguf(small, tmp_path):
    content = (small / "m.gguf").read_bytes()
    header = checkpoint.read_gguf_header(small / "m.gguf")[1]["token_embd.weight"].offset
    for at in [*range(0, 48), *range(header - 1000, header, 7), *offsets(len(content), header, 120)]:
        for flip in (0xFF, 1 << (at % 8)) if at < 48 else (1 << (at % 8),):
            damaged = bytearray(content)
            damaged[at] ^= flip
            (tmp_path / "m.gguf").write_bytes(damaged)
            survives(tmp_path / "m.gguf")


@pytest.mark.parametrize("kind", ["hf", "packed"])
def test_damaged_safetensors(small, tmp_path, kind):
    if kind == "packed":
        convert(small / "hf", tmp_path / "m", group_size=32, search=False)
    else:
        (tmp_path / "m").mkdir()
        for file in (small / "hf").iterdir():
            (tmp_path / "m" / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "m" / "model.safetensors"
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for cut in [*range(0, 12), *offsets(len(content), header, 40), len(content) - 1]:
        file.write_bytes(content[:cut])
        assert not survives(tmp_path / "m"), cut
    for at in [*range(0, 12), *offsets(len(content), header, 120)]:
        damaged = bytearray(content)
        damaged[at] ^= 1 << (at % 8)
        file.write_bytes(damaged)
        survives(tmp_path / "m")
    file.write_bytes(content)
    assert survives(tmp_path / "m")


def test_every_json_of_a_directory_damaged(small, tmp_path):
    for file in (small / "hf").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    rng = random.Random(0)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        content = (tmp_path / name).read_bytes()
        for _ in range(60):
            damaged = bytearray(content)
            damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            (tmp_path / name).write_bytes(damaged)
            survives(tmp_path)
        for _ in range(10):
            (tmp_path / name).write_bytes(content[: rng.randrange(len(content) - 1)])
            assert not survives(tmp_path)
        (tmp_path / name).write_bytes(content)
    assert survives(tmp_path)


def test_random_weights_cover_every_tensor_of_every_family():
    """Guards the builder: the shapes that the tests write are those that the model expects."""
    for family, options in (("llama", {}), ("qwen2", {"bias": True}), ("qwen3", {"qk_norm": True})):
        config = checkpoint.ModelConfig.from_hf(hf_config(family, tied=False))
        weights = random_weights(tied=False, **options, **SHAPE)
        assert {n: w.shape for n, w in weights.items()} == checkpoint._expected_shapes(config)
