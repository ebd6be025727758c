"""Checkpoints in, models out: GGUF files, Hugging Face safetensors directories, and packed directories of our own.

    load(path)           a Transformer and its Tokenizer
    convert(src, dst)    quantizes and writes a packed directory: model.safetensors, config.json, tokenizer files

Every source looks alike from the inside: a config in Hugging Face's form, the shapes of its tensors under Hugging
Face's names, and a read function. Shapes are checked against the config before anything is read; then tensors are read
one at a time, so that peak host memory is the packed model and one tensor. Nothing is ever unpickled. Directories that
GPTQ, AWQ, compressed-tensors or HQQ have quantized to 4 bits keep their integers and scales (packed_formats.py).
"""

import json
import math
import os
import re
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor

from tiny_gemm import quantize_utils
from tiny_gemm.model import ModelConfig, Transformer, is_permutation
from tiny_gemm.packed_formats import PackedFormat
from tiny_gemm.quantize_utils import Int4Weight
from tiny_gemm.tokenizer import Tokenizer

Weight = Tensor | Int4Weight

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
QUANT_METHOD = "tiny_gemm"  # quantization_config.quant_method in a packed directory's config.json
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_INT4_KINDS = ("Q4_0", "Q4_1", "INT4")  # kinds that are read as Int4Weight
_COUNTS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim", "max_position_embeddings")
_COUNTS += ("num_attention_heads", "num_key_value_heads")
_MAX_COUNT = 2**24  # no sane count in a config is larger; keeps a corrupt one from being allocated
_ROW_CHUNK_BYTES = 8 << 20  # quantized rows are widened this much at a time
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


class CheckpointError(ValueError):
    """A checkpoint that is missing, broken, or of a kind that is not supported."""


def default_dtype(device: torch.device | str, config: Mapping[str, Any]) -> torch.dtype:
    """What activations and 16-bit weights are where nobody asks for a dtype.

    bfloat16 on a CPU, whose INT4 kernel wants it. On a GPU the checkpoint's own 16-bit type, float16 for GGUF: at the
    same speed it is some 70 times closer to float32 (mean KL) than bfloat16, as long as nothing overflows, and an
    overflow is an error in words, not a wrong token.
    """
    is_float16 = config.get("dtype", config.get("torch_dtype")) == "float16"
    return torch.float16 if is_float16 and torch.device(device).type == "cuda" else torch.bfloat16


def load(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    quantize: int | None = None,
    progress: bool | None = None,
) -> tuple[Transformer, Tokenizer]:
    """A model and its tokenizer from `path`: a .gguf file, a directory that holds just one, a Hugging Face directory
    (config.json, model.safetensors or its shards, tokenizer.json; 16 bit, or quantized to 4 bits by GPTQ, AWQ,
    compressed-tensors or HQQ), or a directory that convert wrote.

    dtype: of activations and 16-bit weights, by default default_dtype(device, config); float32 is the exact mode.
    quantize: a group size (32, 64, 128, -1 for per-channel) that 16-bit linear weights are quantized to as they are
        read, symmetric and rounded to nearest (convert searches for better scales). Embedding, head, norms and biases
        stay 16 bit; weights that are INT4 in the file stay as they are.
        The model widens an embedding or a head that is INT4 in the file.
    progress: a bar on stderr; None shows one on a terminal only.
    Raises CheckpointError (a ValueError) for a bad checkpoint, ValueError for a bad dtype or device.
    """
    if dtype not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype={dtype} must be float32, bfloat16 or float16")
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError):
        wanted = None
    if wanted is None or wanted.type not in ("cpu", "cuda"):
        raise ValueError(f"device={str(device)!r} must be cpu, cuda or cuda:N")
    if wanted.type == "cuda" and (wanted.index or 0) >= (gpus := torch.cuda.device_count()):
        raise ValueError(
            f"device={str(device)!r}: torch {torch.__version__} sees {gpus} GPUs; tiny-gemm doctor says why"
        )
    with _clear_errors(path):
        source = _open(Path(path))
        config = _check(source, quantize)
        dtype = dtype or default_dtype(device, source.config)
        weights: dict[str, Weight] = {}
        with _reading(source, "Loading", progress) as names:
            for name in names:
                weights[name] = _prepare(source, name, dtype, quantize).to(device)
        return Transformer(config, weights, dtype), source.tokenizer


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    group_size: int = 128,
    symmetric: bool = True,
    search: bool = True,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Writes the checkpoint `src` (anything that load takes) as a packed directory `dst`, which load reads back.

    Linear weights are quantized to group_size (search: with the scale search of quantize_utils.quantize) unless they
    are INT4 already; 16-bit tensors and vectors stay as they are, other tables become float16. The directory is written
    beside `dst` and renamed, so a failure or Ctrl-C leaves nothing. Refuses a destination that is not empty.
    Returns what was done, ready for JSON: sizes in bytes, counts, seconds.
    """
    started = time.perf_counter()
    src, dst = Path(src), Path(dst)
    with _clear_errors(src):
        if dst.is_symlink() or (dst.exists() and (not dst.is_dir() or any(dst.iterdir()))):
            raise CheckpointError(f"{dst} exists and is not an empty directory; convert writes a new one")
        source = _open(src)
        _check(source, group_size)
        weights: dict[str, Weight] = {}
        quantized = 0
        dst.absolute().parent.mkdir(parents=True, exist_ok=True)
        with _directory_beside(dst) as beside:  # before the work, so that a place that cannot be written to costs none
            with _reading(source, "Quantizing", progress) as names:
                for name in names:
                    w = _prepare(source, name, torch.float16, group_size, symmetric=symmetric, search=search)
                    weights[name] = w
                    quantized += isinstance(w, Int4Weight) and source.kinds[name] not in _INT4_KINDS
            int4 = [w for w in weights.values() if isinstance(w, Int4Weight)]
            sizes = sorted({w.group_size for w in int4})
            quantization = {"quant_method": QUANT_METHOD, "bits": 4, "symmetric": all(w.symmetric for w in int4)}
            quantization["group_size"] = sizes[0] if len(sizes) == 1 else sizes
            quantize_utils.save_packed(beside / "model.safetensors", weights)
            config = source.config | {"quantization_config": quantization}
            (beside / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            if source.tokenizer_directory is None:
                source.tokenizer.save(beside)
            else:
                for name in _TOKENIZER_FILES:
                    if (source.tokenizer_directory / name).is_file():
                        shutil.copyfile(source.tokenizer_directory / name, beside / name)
        values = sum(math.prod(w.shape) for w in weights.values())
        packed = sum(w.nbytes for w in weights.values())
        return {
            "source": str(src),
            "destination": str(dst),
            "group_size": group_size,
            "symmetric": symmetric,
            "search": search,
            "tensors": len(weights),
            "tensors_quantized": quantized,
            "tensors_int4_already": len(int4) - quantized,
            "float32_bytes": 4 * values,
            "packed_bytes": packed,
            "compression": 4 * values / packed,
            "int4_float32_bytes": 4 * sum(math.prod(w.shape) for w in int4),
            "int4_packed_bytes": sum(w.nbytes for w in int4),
            "seconds": time.perf_counter() - started,
        }


# -------------------------------------------------------------------------------------------------- one source
@dataclass(frozen=True)
class Source:
    """A checkpoint whose header has been read.

    config: Hugging Face's config.json. shapes, kinds: of each tensor, under Hugging Face's names, as stored.
    read(name, dtype): the tensor; Int4Weight where it is stored so, else at least as exact as `dtype` (a quantized type
    is widened to it, a float type comes as stored). tokenizer_directory: where its files may be copied from.
    """

    path: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    kinds: dict[str, str]
    read: Callable[[str, torch.dtype], Weight]
    tokenizer: Tokenizer
    tokenizer_directory: Path | None


def _open(path: Path) -> Source:
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if path.is_file():
        if path.suffix in PICKLES:
            raise CheckpointError(f"{path} is a pickle, and unpickling runs code: only safetensors and GGUF are read")
        if path.suffix == ".safetensors":
            raise CheckpointError(f"{path}: give the directory, which also holds config.json and tokenizer.json")
        return _open_gguf(path)
    if (path / "config.json").is_file():
        return _open_directory(path)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) > 1:
        raise CheckpointError(f"{path} holds {len(ggufs)} GGUF files, name one: {', '.join(f.name for f in ggufs)}")
    if not ggufs:
        raise CheckpointError(f"{path} holds neither config.json nor a .gguf file")
    return _open_gguf(ggufs[0])


def _check(source: Source, group_size: int | None) -> ModelConfig:
    """Holds names and shapes against the config, and K against the group size, before any tensor is read."""
    if group_size not in (None, *quantize_utils.GROUP_SIZES):
        raise CheckpointError(f"group_size={group_size} must be one of {quantize_utils.GROUP_SIZES} (-1: per-channel)")
    config = _model_config(source.path, source.config)
    if config.num_layers > len(source.shapes):
        raise CheckpointError(f"{source.path}: {config.num_layers} layers, but only {len(source.shapes)} tensors")
    expected = _expected_shapes(config)
    for name, shape in list(expected.items()):
        order = _order_of(name)
        if order in source.shapes and source.kinds.get(name) == "INT4":
            expected[order] = shape[1:]
    missing = [n for n in expected if n not in source.shapes]
    surplus = [n for n in source.shapes if n not in expected]
    for what, names in (("lacks", missing), ("has, and the model has no place for,", surplus)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{source.path} {what} tensor {names[0]}{more}")
    for name, shape in expected.items():
        if source.shapes[name] != shape:
            raise CheckpointError(f"{source.path}: {name} has shape {source.shapes[name]}, the config says {shape}")
        to_quantize = group_size not in (None, -1) and _is_linear(name) and source.kinds[name] not in _INT4_KINDS
        if to_quantize and shape[1] % group_size:
            k = shape[1]
            raise CheckpointError(f"{source.path}: {name}: K={k} must be a multiple of group_size={group_size}")
    return config


def _model_config(path: Path, config: Mapping[str, Any]) -> ModelConfig:
    for key, value in config.items():
        if type(value) is int and value > _MAX_COUNT and key in _COUNTS:
            raise CheckpointError(f"{path}: {key}={value} is out of range, at most {_MAX_COUNT}")
    try:
        return ModelConfig.from_hf(config)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RuntimeError) as e:
        raise CheckpointError(f"{path}: {_one_line(e)}") from e


def _expected_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    d, h, q, kv = c.hidden_size, c.intermediate_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, d), "model.norm.weight": (d,)}
    if not c.tie_word_embeddings:
        shapes["lm_head.weight"] = (c.vocab_size, d)
    layer = {
        "input_layernorm.weight": (d,),
        "self_attn.q_proj.weight": (q, d),
        "self_attn.k_proj.weight": (kv, d),
        "self_attn.v_proj.weight": (kv, d),
        "self_attn.o_proj.weight": (d, q),
        "post_attention_layernorm.weight": (d,),
        "mlp.gate_proj.weight": (h, d),
        "mlp.up_proj.weight": (h, d),
        "mlp.down_proj.weight": (d, h),
    }
    if c.qkv_bias:
        layer |= {"self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
    if c.output_bias:
        layer |= {"self_attn.o_proj.bias": (d,)}
    if c.qk_norm:
        layer |= {"self_attn.q_norm.weight": (c.head_dim,), "self_attn.k_norm.weight": (c.head_dim,)}
    return shapes | {f"model.layers.{i}.{n}": s for i in range(c.num_layers) for n, s in layer.items()}


def _is_linear(name: str) -> bool:
    return name.endswith(".weight") and name.split(".")[-2] in _LINEAR


def _prepare(
    source: Source, name: str, dtype: torch.dtype, group_size: int | None, symmetric: bool = True, search: bool = False
) -> Weight:
    """One tensor as the model is to have it: linear weights INT4 or `dtype`, tables 16 bit, vectors as stored."""
    linear, vector = _is_linear(name), len(source.shapes[name]) == 1
    wanted = dtype if linear or dtype == torch.float32 else torch.float16
    quantize = linear and group_size is not None
    w = source.read(name, torch.float32 if quantize or vector else wanted)
    if isinstance(w, Int4Weight):
        return w
    if quantize:
        try:
            return quantize_utils.quantize(w, group_size, symmetric=symmetric, search=search)
        except ValueError as e:
            raise CheckpointError(f"{source.path}: {name}: {e}") from e
    if linear:
        return w.to(wanted)
    return w if vector or w.dtype.itemsize == 2 else w.to(wanted)


# -------------------------------------------------------------------------------------------------- GGUF
_FLOAT_KINDS = ("BF16", "F16", "F32")  # safetensors has the same names
_GGUF_TYPES = ("Q4_0", "Q4_1", "Q8_0", "Q6_K", "F16", "BF16", "F32")
_GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_GGUF_FIXED = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Keys that change what the layers compute, and that no model of the family sets: {key: the only value accepted}.
_GGUF_NEUTRAL = {
    "expert_count": 0,
    "logit_scale": 1.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "attention.scale": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}


@dataclass(frozen=True)
class _GgufTensor:
    kind: str
    shape: tuple[int, ...]  # [N, K] or [N]
    offset: int
    nbytes: int


def _open_gguf(path: Path) -> Source:
    metadata, tensors = read_gguf_header(path)
    architecture = metadata.get("general.architecture")
    if architecture not in _GGUF_ARCHITECTURES:
        supported = ", ".join(_GGUF_ARCHITECTURES)
        raise CheckpointError(f"{path}: architecture {architecture!r} is not supported; supported: {supported}")
    tokenizer = Tokenizer.from_gguf(metadata)

    names: dict[str, _GgufTensor] = {}
    factors = None
    for theirs, t in tensors.items():
        if t.kind not in _GGUF_TYPES:
            raise CheckpointError(f"{path}: {theirs} is of type {t.kind}; supported: {', '.join(_GGUF_TYPES)}")
        if len(t.shape) == 1 and t.kind not in _FLOAT_KINDS:
            raise CheckpointError(f"{path}: {theirs} is a {t.kind} vector; supported: {', '.join(_FLOAT_KINDS)}")
        if theirs == "rope_freqs.weight":
            factors = _read_gguf_tensor(path, t, torch.float32)
        else:
            names[_gguf_to_hf(path, theirs)] = t
    config = _gguf_config(path, metadata, names, factors, tokenizer)

    heads = {"self_attn.q_proj": config["num_attention_heads"], "self_attn.k_proj": config["num_key_value_heads"]}

    def read(name: str, dtype: torch.dtype) -> Weight:
        permuted = next((n for part, n in heads.items() if part in name), 0) if architecture == "llama" else 0
        return _read_gguf_tensor(path, names[name], dtype, permuted)

    shapes = {n: t.shape for n, t in names.items()}
    return Source(path, config, shapes, {n: t.kind for n, t in names.items()}, read, tokenizer, None)


def _gguf_to_hf(path: Path, name: str) -> str:
    if name in _GGUF_FIXED:
        return _GGUF_FIXED[name]
    parts = name.split(".")
    if (
        len(parts) == 4
        and parts[0] == "blk"
        and re.fullmatch("0|[1-9][0-9]{0,5}", parts[1])
        and parts[2] in _GGUF_LAYER
    ):
        return f"model.layers.{parts[1]}.{_GGUF_LAYER[parts[2]]}.{parts[3]}"
    raise CheckpointError(f"{path}: tensor {name!r} has no place in a model of the Llama family")


def _gguf_config(
    path: Path, metadata: dict[str, Any], names: dict[str, _GgufTensor], factors: Tensor | None, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Hugging Face's config.json for a GGUF."""
    architecture = metadata["general.architecture"]

    def get(key: str, kind: type, default: Any = ...):
        value = metadata.get(f"{architecture}.{key}", default)
        if value is ...:
            raise CheckpointError(f"{path} lacks {architecture}.{key}")
        if kind is float and isinstance(value, int):
            value = float(value)
        limit = {int: _MAX_COUNT, float: sys.float_info.max}.get(kind)
        if value is not default and (not isinstance(value, kind) or limit and not 0 < value <= limit):
            rule = {int: f"an integer from 1 to {_MAX_COUNT}", float: "a positive number", str: "a string"}[kind]
            raise CheckpointError(f"{path}: {architecture}.{key}={str(value)[:40]} must be {rule}")
        return value

    for key, neutral in _GGUF_NEUTRAL.items():
        if (value := metadata.get(f"{architecture}.{key}", neutral)) != neutral:
            raise CheckpointError(f"{path}: {architecture}.{key}={value} is not supported")
    if metadata.get("split.count", 0) not in (0, 1):
        raise CheckpointError(f"{path}: one of {metadata['split.count']} split GGUF files; merge them first")
    embedding = names.get("model.embed_tokens.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{path} lacks a token_embd.weight of two dimensions")
    if tokenizer.vocab_size > embedding.shape[0]:
        raise CheckpointError(f"{path}: {tokenizer.vocab_size} tokens, but an embedding of {embedding.shape[0]} rows")

    hidden, heads = get("embedding_length", int), get("attention.head_count", int)
    head_dim = get("attention.key_length", int, hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (value := get(key, int, head_dim)) != head_dim:
            raise CheckpointError(f"{path}: {architecture}.{key}={value} must equal the head size, {head_dim}")
    window = get("attention.sliding_window", int, None)
    return {
        "model_type": "mistral" if window and architecture == "llama" else architecture,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length", int),
        "dtype": "float16",  # the type of its scales
        "num_hidden_layers": get("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon", float),
        "max_position_embeddings": get("context_length", int),
        "rope_theta": get("rope.freq_base", float, 10000.0),
        "rope_scaling": _gguf_rope_scaling(path, get, factors, head_dim),
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "attention_bias": architecture == "llama" and "model.layers.0.self_attn.q_proj.bias" in names,
        "tie_word_embeddings": "lm_head.weight" not in names,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(tokenizer.eos_ids),
    }


def _gguf_rope_scaling(path: Path, get: Callable, factors: Tensor | None, head_dim: int) -> dict[str, Any] | None:
    kind = get("rope.scaling.type", str, "none")
    if factors is not None:  # Llama 3's scaling, worked out by the converter: a divisor for each frequency
        if kind != "none" or factors.shape != (head_dim // 2,) or not bool((factors.isfinite() & (factors > 0)).all()):
            shape = tuple(factors.shape)
            raise CheckpointError(
                f"{path}: rope_freqs.weight {shape} must be {head_dim // 2} positive numbers, without rope.scaling.type"
            )
        return {"rope_type": "factors", "factors": factors.tolist()}
    if kind == "none":
        return None
    if kind != "linear":
        raise CheckpointError(f"{path}: rope.scaling.type={kind!r} is not supported; supported: none, linear")
    return {"rope_type": "linear", "factor": get("rope.scaling.factor", float)}


def read_gguf_header(path: Path) -> tuple[dict[str, Any], dict[str, _GgufTensor]]:
    """(metadata as plain values, tensors by GGUF name). Every offset is checked against the file's size."""
    try:
        import gguf
    except ImportError as e:
        raise CheckpointError(f"{path}: reading GGUF needs the gguf package: pip install 'tiny-gemm[gguf]'") from e

    class Reader(gguf.GGUFReader):
        """gguf's reader, with bounds (numpy cuts a slice short in silence) and with arrays read at once: it makes numpy
        views of every string of a vocabulary, which takes seconds."""

        def _get(self, offset, dtype, count=1, override_order=None):
            end = int(offset) + np.dtype(dtype).itemsize * int(count)
            if offset < 0 or not offset <= end <= len(self.data):
                raise ValueError(f"truncated: it ends at byte {len(self.data)}, before byte {end}")
            return super()._get(int(offset), dtype, count, override_order)

        def _get_field_parts(self, orig_offs, raw_type):
            if raw_type != gguf.GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            kind = gguf.GGUFValueType(int(self._get(orig_offs, np.uint32)[0]))
            count, start = int(self._get(orig_offs + 4, np.uint64)[0]), orig_offs + 12
            if kind == gguf.GGUFValueType.STRING:
                self._get(start, np.uint64, count)  # each string has at least its length
                values, end = _read_strings(memoryview(self.data), start, count)
            else:
                array = self._get(start, self.gguf_scalar_to_np[kind], count)
                values, end = array.tolist(), start + array.nbytes
            return end - orig_offs, [values], [0], [gguf.GGUFValueType.ARRAY, kind]

    size = path.stat().st_size
    with path.open("rb") as f:
        head = f.read(24)
    if len(head) < 24:
        raise CheckpointError(f"{path} has {size} bytes: too short for a GGUF file")
    magic, version, tensor_count, key_count = struct.unpack("<4sIQQ", head)
    if magic != b"GGUF":
        raise CheckpointError(f"{path} is not a GGUF file: it starts with {magic!r}, not b'GGUF'")
    if version not in (2, 3):
        raise CheckpointError(f"{path}: GGUF version {version} is not supported; supported: 2 and 3, little-endian")
    if max(tensor_count, key_count) > 2**17:
        raise CheckpointError(f"{path}: {tensor_count} tensors and {key_count} keys; at most {2**17} are read")
    try:
        with np.errstate(all="ignore"):
            reader = Reader(path)
        metadata = {
            name: field.parts[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else field.contents()
            for name, field in reader.fields.items()
        }
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError) as e:
        raise CheckpointError(f"{path} is not a whole GGUF file: {_one_line(e)}") from e
    tensors = {
        t.name: _GgufTensor(t.tensor_type.name, tuple(reversed(t.shape.tolist())), t.data_offset, t.n_bytes)
        for t in reader.tensors
    }
    for name, t in tensors.items():
        if not 1 <= len(t.shape) <= 2 or 0 in t.shape:
            raise CheckpointError(f"{path}: {name} has shape {t.shape}; it must have one or two dimensions, none empty")
    return metadata, tensors


def _read_strings(data: memoryview, start: int, count: int) -> tuple[list[str], int]:
    values, length = [], struct.Struct("<Q")
    for _ in range(count):
        if start + 8 > len(data):
            raise ValueError(f"truncated: it ends at byte {len(data)}, before byte {start + 8}")
        end = start + 8 + length.unpack_from(data, start)[0]
        if end > len(data):
            raise ValueError(f"truncated: it ends at byte {len(data)}, before byte {end}")
        values.append(str(data[start + 8 : end], "utf-8"))
        start = end
    return values, start


def _read_gguf_tensor(path: Path, t: _GgufTensor, dtype: torch.dtype, permuted_heads: int = 0) -> Weight:
    """Q4_0 and Q4_1 as Int4Weight, float types as stored, the others widened to `dtype` a few rows at a time.

    permuted_heads: the rows are in llama.cpp's order for interleaved RoPE, (rows / 2, 2) a head; they come back in
    Hugging Face's, (2, rows / 2). Each row is whole in the file, so this moves raw bytes.
    """
    rows = t.shape[0]
    row_bytes = t.nbytes // rows
    with path.open("rb") as f:

        def raw(start: int, stop: int) -> Tensor:  # uint8 [rows, bytes a row]
            f.seek(t.offset + start * row_bytes)
            data = np.fromfile(f, dtype=np.uint8, count=(stop - start) * row_bytes)
            if data.size != (stop - start) * row_bytes:
                raise CheckpointError(f"{path} is truncated: a tensor ends at byte {t.offset + t.nbytes}")
            return torch.from_numpy(data).view(stop - start, row_bytes)

        if t.kind in ("Q8_0", "Q6_K"):
            w = torch.empty(t.shape, dtype=dtype)
            step = max(1, _ROW_CHUNK_BYTES // row_bytes)
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                w[start:stop] = _dequantize_gguf(t.kind, raw(start, stop))
            return _unpermute(w, permuted_heads)
        data = _unpermute(raw(0, rows), permuted_heads)
    if t.kind in ("Q4_0", "Q4_1"):
        return quantize_utils.from_q4_0(data) if t.kind == "Q4_0" else quantize_utils.from_q4_1(data)
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return data.view(kinds[t.kind]).view(t.shape)


def _dequantize_gguf(kind: str, data: Tensor) -> Tensor:
    """Rows of raw blocks, uint8 [rows, bytes], as float32 [rows, K]."""
    if kind == "Q8_0":  # 34 bytes for 32 weights: fp16 d, int8 q; w = d * q
        blocks = data.view(data.shape[0], -1, 34)
        d, q = blocks[..., :2].contiguous().view(torch.float16), blocks[..., 2:].view(torch.int8)
        return (q.float() * d.float()).flatten(1)
    import gguf

    w = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(w).view(data.shape[0], -1)


def _unpermute(rows: Tensor, heads: int) -> Tensor:
    if not heads:
        return rows
    return rows.view(heads, rows.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(rows.shape)


# -------------------------------------------------------------------------------------------------- safetensors


def _open_directory(path: Path) -> Source:
    """A Hugging Face directory or a packed one: model.safetensors, or the shards that its index names."""
    config = _read_json(path / "config.json")
    quantization = config.get("quantization_config")
    if quantization is not None and not isinstance(quantization, dict):
        raise CheckpointError(f"{path}: quant_method={quantization!r} is not supported, it must be in a JSON object")
    ours = quantization is None or quantization.get("quant_method") == QUANT_METHOD
    form = None if ours else PackedFormat.from_config(quantization)
    stored: dict[str, tuple[Path, str, tuple[int, ...]]] = {}  # tensor -> (file, type, shape)
    int4: dict[str, tuple[int, tuple[int, int]]] = {}  # name -> (group size, shape)
    for file in _weight_files(path):
        with _open_safetensors(file) as f:
            metadata = f.metadata() or {}
            if metadata.get("format") == quantize_utils.FORMAT_NAME:
                int4 = quantize_utils.read_header(file, metadata)
            for name in f.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                if name in stored:
                    raise CheckpointError(f"{path}: {name} is in both {stored[name][0].name} and {file.name}")
                part = f.get_slice(name)
                stored[name] = (file, part.get_dtype(), tuple(part.get_shape()))
    if ours and quantization is not None and not int4:
        raise CheckpointError(
            f"{path}: its INT4 weights were saved by transformers (save_pretrained), which reads them; give the "
            "checkpoint that they were quantized from"
        )

    def tensor(name: str) -> Tensor:
        if name not in stored:
            raise CheckpointError(f"{path} lacks tensor {name}")
        with _open_safetensors(stored[name][0]) as f:  # opened anew, so that the pages read before are given back
            return f.get_tensor(name).clone()

    foreign = {} if form is None else _foreign_weights(path, form, stored, tensor)
    parts = {f"{name}.{part}" for name in int4 for part in ("packed", "scales", "zeros")}
    parts |= {name for w in foreign.values() for name in w.parts.values()}
    tied = bool(config.get("tie_word_embeddings"))  # some checkpoints store the head a second time all the same
    if tied:
        foreign.pop("lm_head.weight", None)
    orders = {_order_of(name): w.order for name, w in foreign.items() if w.order is not None}
    shapes: dict[str, tuple[int, ...]] = {name: shape for name, (_, shape) in int4.items()}
    shapes |= {name: w.shape for name, w in foreign.items()}
    kinds = dict.fromkeys(shapes, "INT4")
    our_orders = {_order_of(name): columns for name, (_, (_, columns)) in int4.items()}
    for name, (file, kind, shape) in stored.items():
        if name in parts or name.endswith(".rotary_emb.inv_freq") or name == "lm_head.weight" and tied:
            continue
        if kind not in _FLOAT_KINDS and name not in our_orders:
            raise CheckpointError(f"{file}: {name} is of type {kind}; supported: {', '.join(_FLOAT_KINDS)}")
        shapes[name], kinds[name] = shape, kind
    shapes |= {name: tuple(order.shape) for name, order in orders.items()}
    kinds |= dict.fromkeys(orders, "I32")

    def read(name: str, dtype: torch.dtype) -> Weight:
        if name in orders:
            return orders[name]
        if name in our_orders:
            order, columns = tensor(name), our_orders[name]
            if not is_permutation(order, columns):
                raise CheckpointError(f"{path}: {name} must hold each of 0 to {columns - 1} once, as int32")
            return order
        if kinds.get(name) != "INT4":
            return tensor(name)
        zeros = tensor(f"{name}.zeros") if f"{name}.zeros" in stored else None
        try:
            if name in foreign:
                unpacked = form.unpack({part: tensor(theirs) for part, theirs in foreign[name].parts.items()})
                return quantize_utils.pack(*unpacked)
            quantize_utils.check_integer_zeros(zeros)
            packed, scales = tensor(f"{name}.packed"), tensor(f"{name}.scales")
            return Int4Weight(packed, scales, zeros, *int4[name])
        except ValueError as e:
            raise CheckpointError(f"{path}: {name}: {_one_line(e)}") from e

    biases = [name for name in shapes if f"{name.removesuffix('.bias')}.weight" in foreign]
    if biases:  # AutoGPTQ gave every linear one, of zeros where the model has none
        c = _model_config(path, config)
        wanted = dict.fromkeys(("q_proj", "k_proj", "v_proj"), c.qkv_bias) | {"o_proj": c.output_bias}
        for name in biases:
            if not wanted.get(name.split(".")[-2]) and not bool(tensor(name).any()):
                del shapes[name], kinds[name]
    tokenizer = Tokenizer.from_directory(path)
    config = config | {"eos_token_id": list(tokenizer.eos_ids)}
    return Source(path, config, shapes, kinds, read, tokenizer, path)


@dataclass(frozen=True)
class _ForeignWeight:
    shape: tuple[int, int]  # (N, K)
    parts: dict[str, str]  # what PackedFormat calls it -> the tensor
    order: Tensor | None  # of its inputs, see Transformer


def _order_of(weight: str) -> str:
    """The tensor that says the order in which a weight's columns meet the inputs."""
    return weight.removesuffix("weight") + "input_order"


def _foreign_weights(
    path: Path, form: PackedFormat, stored: Mapping[str, tuple], tensor: Callable[[str], Tensor]
) -> dict[str, _ForeignWeight]:
    """The weights stored in another tool's 4-bit format, under Hugging Face's names, from the headers and, where the
    format needs that, from the small tensors that say a weight's shape and the order of its columns."""
    weights = {}
    needed, optional = form.parts
    for name, (_, _, stored_shape) in stored.items():
        stem = form.linear_of(name)
        if stem is None:
            continue
        if absent := [part for part in needed if f"{stem}.{part}" not in stored]:
            raise CheckpointError(f"{path} lacks tensor {stem}.{absent[0]}, which belongs to {name}")
        if f"{stem}.weight" in stored:
            raise CheckpointError(f"{path} has both {name} and {stem}.weight")
        parts = {part: f"{stem}.{part}" for part in (*needed, *optional) if f"{stem}.{part}" in stored}
        try:
            shape = form.shape(stored_shape, tensor(parts[form.shape_part]) if form.shape_part else None)
            order = form.input_order(tensor(parts[form.order_part])) if form.order_part in parts else None
        except CheckpointError:
            raise
        except ValueError as e:
            raise CheckpointError(f"{path}: {stem}: {e}") from e
        weights[f"{stem}.weight"] = _ForeignWeight(shape, parts, order)
    return weights


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    if not index.is_file():
        pickles = sorted(f.name for f in path.iterdir() if f.suffix in PICKLES)
        if pickles:
            raise CheckpointError(
                f"{path} holds its weights as pickles only ({pickles[0]}), and unpickling runs code: "
                "convert them to safetensors"
            )
        raise CheckpointError(f"{path} lacks model.safetensors and model.safetensors.index.json")
    where = _read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(v, str) for v in where.values()):
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names")
    files = []
    for name in sorted(set(where.values())):
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: {name!r} is not the plain name of a .safetensors file in that directory")
        if not (path / name).is_file():
            raise CheckpointError(f"{index} names {name}, which does not exist")
        files.append(path / name)
    listed = {n: path / f for n, f in where.items()}
    for file in files:
        with _open_safetensors(file) as f:
            held = set(f.keys())
        absent = [n for n, at in listed.items() if at == file and n not in held]
        if absent:
            raise CheckpointError(f"{index} says that {file.name} holds {absent[0]}, which it does not")
    return files


@contextmanager
def _open_safetensors(file: Path):
    try:
        with safetensors.safe_open(file, framework="pt") as f:
            yield f
    except (safetensors.SafetensorError, RuntimeError, KeyError, TypeError) as e:
        raise CheckpointError(f"{file} is not a whole safetensors file: {_one_line(e)}") from e


def _read_json(file: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            names = [k for k, _ in pairs]
            raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is there twice")
        return value

    try:
        value = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{file} is not JSON: {_one_line(e)}") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} must hold a JSON object, not a {type(value).__name__}")
    return value


# -------------------------------------------------------------------------------------------------- around it
@contextmanager
def _clear_errors(path: str | Path) -> Iterator[None]:
    """What the user did wrong leaves as a CheckpointError of one line that names the file."""
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as e:
        raise CheckpointError(f"{path}: {_one_line(e)}") from e
    except OSError as e:
        raise CheckpointError(f"{e.filename or path}: {e.strerror or _one_line(e)}") from e


@contextmanager
def _directory_beside(dst: Path) -> Iterator[Path]:
    """A fresh directory that becomes `dst` when the block ends well, and vanishes when it does not."""
    dst = dst.absolute()
    beside = Path(tempfile.mkdtemp(dir=dst.parent, prefix=f".{dst.name}.", suffix=".part"))
    try:
        yield beside
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(0o777 & ~umask)
        if dst.exists():
            dst.rmdir()  # only an empty directory goes
        beside.rename(dst)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


@contextmanager
def _reading(source: Source, what: str, progress: bool | None) -> Iterator[Iterable[str]]:
    """The tensors' names in layer order, under a bar on stderr that counts their values."""
    names = sorted(source.shapes, key=lambda n: (int(n.split(".")[2]) if ".layers." in n else -1, n))
    if progress is None:
        progress = sys.stderr.isatty()
    if not progress:
        yield names
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=console.is_terminal) as bar:
        task = bar.add_task(f"{what} {source.path.name}", total=sum(math.prod(s) for s in source.shapes.values()))

        def advancing() -> Iterator[str]:
            for name in names:
                yield name
                bar.advance(task, math.prod(source.shapes[name]))

        yield advancing()


def _one_line(e: BaseException) -> str:
    return " ".join(str(e).split()) or type(e).__name__
