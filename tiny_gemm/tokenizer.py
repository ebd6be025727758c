"""Text to token ids and back, and chat templates, from a GGUF file's metadata or a Hugging Face directory.

Encoding is done by the `tokenizers` library. Decoding is done here, over the bytes that each token stands for: one
table lookup a token, and a stream that joins to exactly what decode gives.

Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) and SentencePiece-style BPE with byte fallback (Llama 2, Mistral) are
read; anything else is a TokenizerError that names it.
"""

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How text is cut before the merges, by tokenizer.ggml.pre (llama.cpp's names); each expression cuts what the last left.
_SPLITS: dict[str, tuple[str, ...]] = {
    "smollm": (r"\p{N}", _GPT2),
    "starcoder": (r"\p{N}", _GPT2),
    "refact": (r"\p{N}", _GPT2),
    "gpt-2": (_GPT2,),
    "gpt2": (_GPT2,),
    "olmo": (_GPT2,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "smaug-bpe": (_LLAMA3,),
    "dbrx": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "stablelm2": (_QWEN2,),
    "tekken": (_TEKKEN,),
}
_IGNORE_MERGES = {"llama-bpe", "llama3", "llama-v3", "tekken"}  # a word that is a token is that token, merges or not
_ADD_BOS = {"llama-bpe", "llama3", "llama-v3", "tekken"}  # unless tokenizer.ggml.add_bos_token says otherwise
_NFC = {"qwen2", "deepseek-r1-qwen"}

# Control tokens that end a turn or a text, whatever the file's own eos is.
_END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# What a template can raise of Python's own.
_TEMPLATE_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
_SPACE = "\u2581"  # SentencePiece's visible space
_MAX_IDS = 2**22  # no sane vocabulary is larger; keeps a corrupt id from being allocated


class TokenizerError(ValueError):
    """A tokenizer description that is broken or of a kind that is not supported."""


class Tokenizer:
    """encode, decode, stream and apply_chat for one model; see from_gguf and from_directory.

    eos_ids: every token that ends generation, the model's own eos first. bos_id: None where the model has none.
    chat_template: Jinja source, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        token_bytes: Sequence[bytes],
        *,
        special_ids: Iterable[int] = (),
        eos_ids: Iterable[int] = (),
        bos_id: int | None = None,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        strip_first_space: bool = False,
    ):
        self.backend = backend
        self.token_bytes = token_bytes  # [vocab] what each token stands for in UTF-8
        self.special_ids = frozenset(special_ids)
        self.eos_ids = tuple(dict.fromkeys(eos_ids))
        self.bos_id = bos_id
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})  # {"bos_token": "<s>", ...}: what chat templates may name
        self.strip_first_space = strip_first_space

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Token ids. add_special puts bos in front where the model wants one; control tokens in the text are parsed."""
        return self.backend.encode(text, add_special_tokens=add_special).ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, continuation: bool = False) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, an id outside the vocabulary is empty.

        continuation=True keeps a SentencePiece model's first space: for ids that go on from other text.
        """
        stream = self.stream(skip_special=skip_special, continuation=continuation)
        return "".join([stream.push(i) for i in ids]) + stream.finish()

    def stream(self, *, skip_special: bool = True, continuation: bool = False) -> "StreamDecoder":
        """A decoder that takes one id at a time; options as decode's."""
        return StreamDecoder(self, skip_special, self.strip_first_space and not continuation)

    def apply_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt for `messages`, [{"role": ..., "content": ...}, ...], as text; encode_chat gives its token ids.

        Further keyword arguments reach the template. ValueError when there is no template or the template refuses.
        """
        if self.chat_template is None:
            raise ValueError("this model has no chat template; give it plain text (--raw) instead")
        import jinja2

        scope: dict[str, Any] = {"tools": None, "documents": None} | self.special_tokens | variables
        try:
            template = _compile_template(self.chat_template)
            return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **scope)
        except (jinja2.TemplateError, *_TEMPLATE_ERRORS) as e:
            raise ValueError(f"the chat template refuses these messages: {e}") from e

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Token ids of apply_chat(messages, **options), in which control tokens are the template's alone: where a
        message itself says <|im_end|>, that is plain text, encoded as < and |im_end|>."""
        mark = uuid4().hex  # stands where such a token is cut
        controls = [t for t in map(self.backend.id_to_token, self.special_ids) if t]

        def cut(text: str) -> str:
            for token in controls:
                text = text.replace(token, token[0] + mark + token[1:])
            return text

        messages = [{k: cut(v) if isinstance(v, str) else v for k, v in m.items()} for m in messages]
        parts = self.apply_chat(messages, **options).split(mark)
        return [i for part in parts for i in self.encode(part, add_special=False)]

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and generation_config.json, which from_directory reads back."""
        directory = Path(directory)
        self.backend.save(str(directory / "tokenizer.json"))
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= self.special_tokens
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        _write_json(directory / "tokenizer_config.json", config)
        _write_json(
            directory / "generation_config.json", {"bos_token_id": self.bos_id, "eos_token_id": list(self.eos_ids)}
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "Tokenizer":
        """From GGUF metadata as plain values: {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": [...], ...}."""
        get = lambda key, default=None: metadata.get(f"tokenizer.ggml.{key}", default)  # noqa: E731
        model, tokens = get("model"), get("tokens")
        if model not in ("gpt2", "llama"):
            raise TokenizerError(f"tokenizer.ggml.model={model!r} is not supported; it must be 'gpt2' or 'llama'")
        if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
            raise TokenizerError("tokenizer.ggml.tokens must be a non-empty list of strings")
        types = get("token_type")
        if types is None:
            types = [BYTE if model == "llama" and _BYTE_TOKEN.fullmatch(t) else NORMAL for t in tokens]
        if not isinstance(types, list) or len(types) != len(tokens):
            raise TokenizerError(f"tokenizer.ggml.token_type must be a list of {len(tokens)} integers, one a token")

        special_tokens, ids = {}, {}
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"), ("eot", "eot")):
            i = get(f"{key}_token_id")
            if i is None:
                continue
            if not isinstance(i, int) or not 0 <= i < len(tokens):
                raise TokenizerError(f"tokenizer.ggml.{key}_token_id={i} must be below the {len(tokens)} tokens")
            ids[name] = i
            if name != "eot":
                special_tokens[f"{name}_token"] = tokens[i]

        space_prefix = bool(get("add_space_prefix", True)) and model == "llama"
        try:
            if model == "gpt2":
                backend = _byte_level(tokens, get("merges"), get("pre"))
            else:
                backend = _sentencepiece(tokens, types, get("scores"), ids.get("unk"), space_prefix)
            control = [
                AddedToken(t, special=True, normalized=False)
                for t, k in zip(tokens, types, strict=True)
                if k == CONTROL
            ]
            user = [
                AddedToken(t, special=False, normalized=False)
                for t, k in zip(tokens, types, strict=True)
                if k == USER_DEFINED
            ]
            backend.add_special_tokens([t for t in control if t.content])
            backend.add_tokens([t for t in user if t.content])
            if get("add_bos_token", model == "llama" or get("pre") in _ADD_BOS) and "bos" in ids:
                bos = tokens[ids["bos"]]
                backend.post_processor = processors.TemplateProcessing(
                    single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, ids["bos"])]
                )
        except TokenizerError:
            raise
        except Exception as e:  # the library raises bare Exception
            raise TokenizerError(f"the GGUF tokenizer is broken: {e}") from e

        unspell = _unspell_byte_level if model == "gpt2" else _unspell_sentencepiece
        literal = (CONTROL, USER_DEFINED, UNKNOWN)
        token_bytes = [t.encode() if k in literal else unspell(t) for t, k in zip(tokens, types, strict=True)]
        template = metadata.get("tokenizer.chat_template")
        return cls(
            backend,
            token_bytes,
            special_ids=(i for i, k in enumerate(types) if k == CONTROL),
            eos_ids=[ids[k] for k in ("eos", "eot") if k in ids]
            + [i for i, t in enumerate(tokens) if t in _END_TOKENS and types[i] in (CONTROL, USER_DEFINED)],
            bos_id=ids.get("bos"),
            chat_template=template if isinstance(template, str) else None,
            special_tokens=special_tokens,
            strip_first_space=space_prefix,
        )

    @classmethod
    def from_directory(cls, path: str | Path) -> "Tokenizer":
        """From tokenizer.json, and where they exist tokenizer_config.json, chat_template.jinja, generation_config.json,
        special_tokens_map.json and config.json (its eos_token_id)."""
        path = Path(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise TokenizerError(f"{file} is missing: a tokenizer is read from tokenizer.json only")
        try:
            text = file.read_text(encoding="utf-8")
            description = json.loads(text)
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as e:  # the library raises bare Exception
            raise TokenizerError(f"{file} is not a tokenizer: {e}") from e
        backend.no_padding()
        backend.no_truncation()
        config = _read_json(path / "special_tokens_map.json") | _read_json(path / "tokenizer_config.json")

        unspell, strip = _decoder_of(description, file)
        added = backend.get_added_tokens_decoder()
        vocab = backend.get_vocab(with_added_tokens=True)
        if (largest := max(vocab.values(), default=-1)) >= _MAX_IDS:
            raise TokenizerError(f"{file}: token id {largest} must be below {_MAX_IDS}")
        token_bytes = [b""] * (largest + 1)
        for token, i in vocab.items():
            token_bytes[i] = token.encode() if i in added else unspell(token)

        special_tokens = {}
        for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"):
            token = config.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                special_tokens[name] = token
        eos_ids = [vocab[special_tokens["eos_token"]]] if special_tokens.get("eos_token") in vocab else []
        for name in ("generation_config.json", "config.json"):
            ids = _read_json(path / name).get("eos_token_id")
            eos_ids += [i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)]
        eos_ids += sorted(i for i, token in added.items() if token.content in _END_TOKENS)
        return cls(
            backend,
            token_bytes,
            special_ids=(i for i, token in added.items() if token.special),
            eos_ids=eos_ids,
            bos_id=vocab.get(special_tokens.get("bos_token", "")),
            chat_template=_chat_template_of(path, config),
            special_tokens=special_tokens,
            strip_first_space=strip,
        )


class StreamDecoder:
    """Text as ids arrive: push(id) gives the characters that are now whole, finish() whatever is left at the end."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool, strip_first_space: bool):
        self._bytes = tokenizer.token_bytes
        self._skip = tokenizer.special_ids if skip_special else frozenset()
        self._strip = strip_first_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        token_id = int(token_id)
        if token_id in self._skip or not 0 <= token_id < len(self._bytes):
            return ""
        return self._first(self._utf8.decode(self._bytes[token_id]))

    def finish(self) -> str:
        return self._first(self._utf8.decode(b"", final=True))

    def _first(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


def _byte_level(tokens: list[str], merges: Any, pre: Any) -> tokenizers.Tokenizer:
    if pre not in _SPLITS:
        raise TokenizerError(f"tokenizer.ggml.pre={pre!r} is not supported; it must be one of {', '.join(_SPLITS)}")
    if not isinstance(merges, list) or not all(isinstance(m, str) and m.count(" ") == 1 for m in merges):
        raise TokenizerError("tokenizer.ggml.merges must be a list of strings of two tokens each")
    vocab = {t: i for i, t in enumerate(tokens)}
    pairs = [tuple(m.split(" ")) for m in merges]
    backend = tokenizers.Tokenizer(models.BPE(vocab, pairs, ignore_merges=pre in _IGNORE_MERGES))
    if pre in _NFC:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(s), behavior="isolated") for s in _SPLITS[pre]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(
    tokens: list[str], types: list[int], scores: Any, unknown_id: int | None, space_prefix: bool
) -> tokenizers.Tokenizer:
    """SentencePiece joins the neighbours whose union scores highest: BPE whose merges are sorted by score."""
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise TokenizerError(f"tokenizer.ggml.scores must be a list of {len(tokens)} numbers, one a token")
    vocab = {t: i for i, t in enumerate(tokens)}
    merges = []
    for i in sorted(range(len(tokens)), key=lambda i: -scores[i]):
        token = tokens[i]
        if types[i] == NORMAL:
            cuts = [(token[:c], token[c:]) for c in range(1, len(token))]
            merges += sorted(
                (p for p in cuts if p[0] in vocab and p[1] in vocab), key=lambda p: (vocab[p[0]], vocab[p[1]])
            )
    unknown = tokens[unknown_id] if unknown_id is not None else None
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = [normalizers.Prepend(_SPACE)] if space_prefix else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if space_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _decoder_of(description: dict, file: Path):
    """(token -> bytes, whether the first space goes) of a tokenizer.json, from its decoder."""
    decoder = description.get("decoder") or {}
    parts = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    kinds = [p.get("type") for p in parts]
    if "ByteLevel" in kinds:
        return _unspell_byte_level, False
    if "ByteFallback" in kinds:
        return _unspell_sentencepiece, any(p.get("type") == "Strip" and p.get("start", 0) > 0 for p in parts)
    if kinds == ["Metaspace"]:
        return _unspell_sentencepiece, parts[0].get("prepend_scheme", "always") != "never"
    raise TokenizerError(
        f"{file}: its decoder {kinds} is not supported; it must be ByteLevel, ByteFallback or Metaspace"
    )


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of the 256 bytes in visible characters, inverted."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in visible]
    return {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}


def _unspell_byte_level(token: str) -> bytes:
    alphabet = _byte_alphabet()
    try:
        return bytes([alphabet[c] for c in token])
    except KeyError:  # not in the alphabet: it stands for itself
        return token.encode()


def _unspell_sentencepiece(token: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(_SPACE, " ").encode()


def _chat_template_of(path: Path, config: dict) -> str | None:
    file = path / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # [{"name": ..., "template": ...}]
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


@lru_cache(maxsize=8)
def _compile_template(source: str):
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """{% generation %}: marks the assistant's words for training; here its body is plain text."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def _read_json(file: Path) -> dict:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise TokenizerError(f"{file} is not JSON: {e}") from e
    if not isinstance(value, dict):
        raise TokenizerError(f"{file} must hold a JSON object, not a {type(value).__name__}")
    return value


def _write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
