"""Tiny checkpoints with random weights, written as other tools write them: GGUF, Hugging Face, transformers.

weights = write_gguf(path, ...)            what the file means: float32 tensors under Hugging Face names
weights = write_hf(directory, ...)         the same for a safetensors directory written without transformers
model = write_transformers(directory, ...) a checkpoint that transformers writes, and its float32 model
"""

import json
from pathlib import Path

import numpy as np
import torch

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCAB = 288
SHAPE = dict(layers=2, hidden=64, ffn=96, heads=4, kv_heads=2, head_dim=64, vocab=VOCAB)


# ---------------------------------------------------------------------------------------------------- tokenizers
def byte_alphabet() -> list[str]:
    """GPT-2's visible character for each of the 256 bytes."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = iter(range(256, 512))
    return [chr(b) if b in visible else chr(next(hidden)) for b in range(256)]


def gpt2_vocabulary(size: int = VOCAB) -> tuple[list[str], list[int], list[str]]:
    """(tokens, token types, merges): three control tokens, the 256 bytes, a few merges, unused filling."""
    merges = ["t h", "th e", "Ġ the", "i n", "e r", "Ġ a", "o n", "Ġ s", "Ã ©", "l l", "Ġ w", "o r", "Ġw or"]
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_alphabet(), *(m.replace(" ", "") for m in merges)]
    types = [3] * 3 + [1] * (len(tokens) - 3)
    filling = [f"[PAD{i}]" for i in range(len(tokens), size)]
    return tokens + filling, types + [5] * len(filling), merges


def sentencepiece_vocabulary(size: int = 320) -> tuple[list[str], list[int], list[float]]:
    """(tokens, token types, scores): Llama 2's arrangement: unk, bos, eos, 256 bytes, pieces by falling score."""
    pieces = [
        "▁t",
        "he",
        "▁the",
        "in",
        "▁a",
        "ll",
        "▁hello",
        "▁he",
        "lo",
        "▁w",
        "or",
        "▁wor",
        "▁world",
        "llo",
        "▁▁",
        "ld",
    ]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyzTHEW.,!'0123456789"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces, *letters]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(pieces) + len(letters))
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces) + len(letters))]
    missing = size - len(tokens)
    return tokens + [f"[PAD{i}]" for i in range(missing)], types + [5] * missing, scores + [-1e4] * missing


def write_tokenizer(directory: Path, eos: str = "<|im_end|>") -> None:
    """tokenizer.json and its companions, as a Hugging Face repository has them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, types, merges = gpt2_vocabulary()
    pairs = [tuple(m.split(" ")) for m in merges]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in tokens[:3]])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"eos_token": {"content": eos, "__type": "AddedToken"}, "bos_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


# ---------------------------------------------------------------------------------------------------- weights
def random_weights(
    *, layers, hidden, ffn, heads, kv_heads, head_dim, vocab, tied=True, bias=False, qk_norm=False, seed=0
) -> dict[str, np.ndarray]:
    """float32 tensors under Hugging Face names."""
    rng = np.random.default_rng(seed)
    matrix = lambda n, k: rng.standard_normal((n, k), dtype=np.float32) * np.float32(k**-0.5)  # noqa: E731
    vector = lambda n, mean=1.0: (mean + 0.1 * rng.standard_normal(n)).astype(np.float32)  # noqa: E731
    w = {"model.embed_tokens.weight": matrix(vocab, hidden), "model.norm.weight": vector(hidden)}
    if not tied:
        w["lm_head.weight"] = matrix(vocab, hidden)
    for i in range(layers):
        p = f"model.layers.{i}."
        w[p + "input_layernorm.weight"] = vector(hidden)
        w[p + "post_attention_layernorm.weight"] = vector(hidden)
        for name, n in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            w[f"{p}self_attn.{name}_proj.weight"] = matrix(n * head_dim, hidden)
            if bias:
                w[f"{p}self_attn.{name}_proj.bias"] = vector(n * head_dim, 0.0)
        if qk_norm:
            w[p + "self_attn.q_norm.weight"] = vector(head_dim)
            w[p + "self_attn.k_norm.weight"] = vector(head_dim)
        w[p + "self_attn.o_proj.weight"] = matrix(hidden, heads * head_dim)
        w[p + "mlp.gate_proj.weight"] = matrix(ffn, hidden)
        w[p + "mlp.up_proj.weight"] = matrix(ffn, hidden)
        w[p + "mlp.down_proj.weight"] = matrix(hidden, ffn)
    return w


def family_options(family: str) -> dict:
    return {"llama": {}, "mistral": {}, "qwen2": {"bias": True}, "qwen3": {"qk_norm": True}}[family]


# ---------------------------------------------------------------------------------------------------- GGUF
_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    fixed = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in fixed or name == "lm_head.weight":
        return fixed.get(name, "output.weight")
    _, _, layer, rest = name.split(".", 3)
    stem, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{_GGUF_NAMES[stem]}.{kind}"


def permute(w: np.ndarray, heads: int) -> np.ndarray:
    """The row order in which llama.cpp's converter stores Q and K of the llama architecture."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write_gguf(
    path: Path,
    *,
    family: str = "llama",
    types: str = "Q4_0",
    embedding: str = "Q8_0",
    head: str | None = None,
    type_of: dict[str, str] | None = None,
    tokenizer: str = "gpt2",
    rope_factors: list[float] | None = None,
    metadata: dict | None = None,
    drop: tuple[str, ...] = (),
    replace: dict[str, np.ndarray] | None = None,
    seed: int = 0,
    **shape,
) -> dict[str, np.ndarray]:
    """Writes a GGUF as llama.cpp's tools do and returns what it means: float32 tensors under Hugging Face names.

    types: tensor type of the linear layers; embedding, head: of those (head None: tied); type_of: GGUF name -> type.
    metadata: key -> value (replaces) or None (left out). drop: GGUF tensors left out. replace: GGUF name -> F32 tensor
    (added or instead). shape: overrides of SHAPE.
    """
    import gguf

    shape = SHAPE | ({"vocab": 320} if tokenizer == "llama" else {}) | shape
    weights = random_weights(tied=head is None, seed=seed, **family_options(family), **shape)
    writer = gguf.GGUFWriter(path, "llama" if family == "mistral" else family)
    arch = writer.arch
    facts = {
        f"{arch}.block_count": shape["layers"],
        f"{arch}.context_length": 256,
        f"{arch}.embedding_length": shape["hidden"],
        f"{arch}.feed_forward_length": shape["ffn"],
        f"{arch}.attention.head_count": shape["heads"],
        f"{arch}.attention.head_count_kv": shape["kv_heads"],
        f"{arch}.attention.key_length": shape["head_dim"],
        f"{arch}.attention.value_length": shape["head_dim"],
        f"{arch}.rope.dimension_count": shape["head_dim"],
        f"{arch}.rope.freq_base": 10000.0,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": tokenizer,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    if tokenizer == "gpt2":
        tokens, token_types, merges = gpt2_vocabulary(shape["vocab"])
        facts |= {"tokenizer.ggml.pre": "smollm", "tokenizer.ggml.merges": merges}
        facts |= {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    else:
        tokens, token_types, scores = sentencepiece_vocabulary(shape["vocab"])
        facts |= {"tokenizer.ggml.scores": scores, "tokenizer.ggml.unknown_token_id": 0}
        facts |= {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    facts |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": token_types}
    facts |= metadata or {}
    adders = {str: writer.add_string, bool: writer.add_bool, float: writer.add_float32, int: writer.add_uint32}
    for key, value in facts.items():
        if key in ("general.architecture", "general.alignment"):
            writer.kv_data[0].pop(key, None)
        if value is not None:
            adders.get(type(value), writer.add_array)(key, value)

    meaning = {}
    replace = dict(replace or {})
    for name, w in weights.items():
        theirs = gguf_name(name)
        if theirs in drop:
            continue
        if theirs in replace:
            writer.add_tensor(theirs, replace.pop(theirs))
            continue
        kind = "F32" if w.ndim == 1 else types
        kind = {"model.embed_tokens.weight": embedding, "lm_head.weight": head}.get(name, kind)
        kind = gguf.GGMLQuantizationType[(type_of or {}).get(theirs, kind)]
        stored = gguf.quants.quantize(w, kind)
        meaning[name] = gguf.quants.dequantize(stored, kind).reshape(w.shape)
        if arch == "llama" and ".attn_q." in theirs or arch == "llama" and ".attn_k." in theirs:
            stored = permute(stored, shape["heads" if ".attn_q." in theirs else "kv_heads"])
        writer.add_tensor(theirs, stored, raw_dtype=kind)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(rope_factors, dtype=np.float32))
    for name, w in replace.items():
        writer.add_tensor(name, w)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meaning


# ---------------------------------------------------------------------------------------------------- Hugging Face
def hf_config(family: str = "llama", *, tied: bool = True, **shape) -> dict:
    shape = SHAPE | shape
    return {
        "model_type": family,
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "vocab_size": shape["vocab"],
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["ffn"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["kv_heads"],
        "head_dim": shape["head_dim"],
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 2,
    }


def write_hf(
    directory: Path,
    *,
    family: str = "llama",
    tied: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    shards: int = 1,
    seed: int = 0,
    **shape,
) -> dict[str, torch.Tensor]:
    """Writes config.json, tokenizer and safetensors (one file, or shards and an index); returns the tensors."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    weights = random_weights(tied=tied, seed=seed, **family_options(family), **(SHAPE | shape))
    tensors = {name: torch.from_numpy(w).to(dtype) for name, w in weights.items()}
    (directory / "config.json").write_text(json.dumps(hf_config(family, tied=tied, **shape)))
    write_tokenizer(directory)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return tensors
    where = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({n: t for n, t in tensors.items() if where[n] == file}, directory / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def write_transformers(
    directory: Path,
    family: str = "llama",
    *,
    tied: bool = False,
    rope: dict | None = None,
    dtype: torch.dtype = torch.bfloat16,
    shard_size: str = "5GB",
    seed: int = 0,
    **config,
):
    """A random model that transformers writes with save_pretrained (shard_size "40KB" gives several shards), with a
    tokenizer beside it; returns transformers' float32 model of the weights as written.

    rope: transformers' rope_parameters. config: further entries of its configuration (hidden_size=...).
    """
    import transformers

    options = {k: v for k, v in hf_config(family, tied=tied).items() if k not in ("model_type", "architectures")}
    theta = options.pop("rope_theta")
    options["rope_parameters"] = {"rope_theta": theta, "rope_type": "default"} | (rope or {})
    settings = transformers.AutoConfig.for_model(family, **(options | config))
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 1:  # norms are 1 and biases 0 as transformers starts them: tell them apart
                p += 0.1 * torch.randn_like(p)
            elif "embed" not in name and "lm_head" not in name:
                p.copy_(torch.randn_like(p) * p.shape[1] ** -0.5)
            else:
                p.copy_(torch.randn_like(p) * 0.5)
    model.to(dtype).save_pretrained(directory, max_shard_size=shard_size)
    write_tokenizer(Path(directory))
    # read anew: .to(dtype) rounded the RoPE frequencies too, which no checkpoint does
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
