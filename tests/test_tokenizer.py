"""tokenizer.py: ids, text, streams and chat templates, against transformers, against SentencePiece's rule, by hand."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real_model import smollm2_path
from tiny_checkpoints import CHAT_TEMPLATE, gpt2_vocabulary, sentencepiece_vocabulary, write_tokenizer
from tokenizers import pre_tokenizers

from tiny_gemm.checkpoint import read_gguf_header
from tiny_gemm.tokenizer import Tokenizer, TokenizerError

CORPUS = {
    "plain": "The capital of France is",
    "spaces": "  two  leading,   three inside, trailing   ",
    "only-spaces": " " * 37,
    "newlines": "\n\n\n\r\n \n\t\n",
    "digits": "1 12 123 1234 12345.678,90 0x7f 1e-9",
    "contractions": "I'll don't we've THEY'RE it's 'd rock'n'roll",
    "code": "def f(x):\n\treturn {\n        'a': x ** 2,  # comment\n    }\n\n\nif x == \"y\":\n    f(1)\n",
    "accents": "Café déjà vu, naïve coöperation, Ærøskøbing",
    "decomposed": "e\u0301 n\u0303 a\u030a",
    "emoji": "👩‍👩‍👧‍👦 family 🇫🇷🏳️‍🌈 ok 👍🏽!",
    "cjk": "日本語のテキスト、中文字符。한국어 텍스트",
    "rtl": "مرحبا بالعالم שלום עולם",
    "indic": "नमस्ते दुनिया",
    "odd-spaces": "a\u00a0b\u3000c\u2009d\u200be",
    "controls": "\x00\x01\x1b[31m\x7f\u0085",
    "astral": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 \U0010ffff",
    "bom": "\ufeffbyte order mark",
    "special": "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>x<|im_end",
    "long-word": "A" * 300 + "supercalifragilisticexpialidocious",
    "empty": "",
}
NUMERALS = "½ ² Ⅷ 12½ ٣٤ ३ ① 一二三"  # \p{N} beyond 0 to 9: SmolLM2 splits each, transformers' GGUF reader does not
PUBLISHED = pre_tokenizers.Sequence(  # SmolLM2's own tokenizer.json cuts with Digits and then with GPT-2's expression
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)


@pytest.fixture(scope="module")
def smollm_path() -> Path:
    return smollm2_path()


@pytest.fixture(scope="module")
def smollm(smollm_path) -> Tokenizer:
    return Tokenizer.from_gguf(read_gguf_header(smollm_path)[0])


def gpt2_metadata(**changes) -> dict:
    tokens, types, merges = gpt2_vocabulary()
    facts = dict(model="gpt2", pre="smollm", tokens=tokens, token_type=types, merges=merges, eos_token_id=2)
    return {f"tokenizer.ggml.{k}": v for k, v in (facts | changes).items() if v is not None}


def sentencepiece_metadata(**changes) -> dict:
    tokens, types, scores = sentencepiece_vocabulary()
    facts = dict(model="llama", tokens=tokens, token_type=types, scores=scores)
    facts |= dict(bos_token_id=1, eos_token_id=2, unknown_token_id=0)
    return {f"tokenizer.ggml.{k}": v for k, v in (facts | changes).items() if v is not None}


# ------------------------------------------------------------------------------------------------ SmolLM2
def test_smollm_known_ids(smollm):
    assert smollm.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert (smollm.eos_ids[0], smollm.bos_id, smollm.vocab_size) == (2, 1, 49152)
    ids = [504, 3575, 282, 4649, 314, 7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34, 32, 33, 40, 29, 32, 33, 29, 34]
    assert smollm.decode(ids) == "The capital of France is Paris.\n\nThe answer is: 2018-01-2"


@pytest.mark.parametrize("text", [*CORPUS.values(), NUMERALS], ids=[*CORPUS, "numerals"])
def test_smollm_round_trip(smollm, text):
    assert smollm.decode(smollm.encode(text), skip_special=False) == text


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60))
def test_round_trip_of_any_text(text):
    assert BYTE_LEVEL.decode(BYTE_LEVEL.encode(text), skip_special=False) == text


def test_smollm_equals_transformers(smollm, smollm_path):
    """Ids, text and chat; one test, because transformers takes seconds to read a vocabulary from a GGUF."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(smollm_path.parent, gguf_file=smollm_path.name)
    for name, text in CORPUS.items():
        ids = smollm.encode(text)
        assert ids == theirs(text).input_ids, name
        for skip in (False, True):
            decoded = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert smollm.decode(ids, skip_special=skip) == decoded, name

    messages = [{"role": "user", "content": "Hi <there> 👋"}, {"role": "assistant", "content": "x"}] * 2
    text = smollm.apply_chat(messages)
    assert text == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\n") and text.endswith("<|im_start|>assistant\n")
    ids = smollm.encode_chat(messages)
    assert ids.count(1) == 6 and ids.count(2) == 5
    theirs.backend_tokenizer.pre_tokenizer = PUBLISHED
    for name, text in CORPUS.items():
        if name != "special":
            messages = [{"role": r, "content": c} for r in ("user", "assistant") for c in (text, f" \n{text}\n ")]
            expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert smollm.encode_chat(messages) == expected, name


@pytest.mark.parametrize("text", [*CORPUS.values(), NUMERALS], ids=[*CORPUS, "numerals"])
def test_smollm_words_equal_the_published_tokenizer(smollm, text):
    assert smollm.backend.pre_tokenizer.pre_tokenize_str(text) == PUBLISHED.pre_tokenize_str(text)


def test_smollm_saved_and_read_back(smollm, tmp_path):
    transformers = pytest.importorskip("transformers")
    smollm.save(tmp_path)
    again, theirs = Tokenizer.from_directory(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*CORPUS.values(), NUMERALS]:
        ids = smollm.encode(text)
        assert again.encode(text) == ids == theirs(text).input_ids
        assert again.decode(ids) == smollm.decode(ids)
    for name in ("eos_ids", "bos_id", "chat_template", "special_ids", "special_tokens", "vocab_size"):
        assert getattr(again, name) == getattr(smollm, name), name
    assert theirs.eos_token_id == 2


# ------------------------------------------------------------------------------------------------ streams
@pytest.mark.parametrize("text", [*CORPUS.values(), NUMERALS], ids=[*CORPUS, "numerals"])
def test_stream_emits_whole_characters_only(smollm, text):
    ids = smollm.encode(text)
    stream, pieces = smollm.stream(skip_special=False), []
    for i in ids:
        pieces.append(stream.push(i))
        assert text.startswith("".join(pieces)) and "\ufffd" not in pieces[-1]
    assert stream.finish() == "" and "".join(pieces) == text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-1, 330), max_size=30), st.booleans())
def test_stream_of_any_ids_joins_to_decode(ids, skip_special):
    """Also ids that are no valid UTF-8, and ids outside the vocabulary."""
    for tokenizer in (BYTE_LEVEL, SENTENCEPIECE):
        stream = tokenizer.stream(skip_special=skip_special)
        text = "".join([stream.push(i) for i in ids]) + stream.finish()
        assert text == tokenizer.decode(ids, skip_special=skip_special)
        known = [i for i in ids if 0 <= i < tokenizer.vocab_size and not (skip_special and i in tokenizer.special_ids)]
        whole = b"".join(tokenizer.token_bytes[i] for i in known).decode(errors="replace")
        assert text == (whole.removeprefix(" ") if tokenizer is SENTENCEPIECE else whole)


def test_half_a_character_at_the_end_is_replaced_once():
    ids = BYTE_LEVEL.encode("€")
    stream = BYTE_LEVEL.stream()
    assert [stream.push(i) for i in ids[:-1]] == ["", ""] and stream.finish() == "\ufffd"
    assert BYTE_LEVEL.decode([*ids[:-1], *BYTE_LEVEL.encode("a")]) == "\ufffda"


def test_token_types_decide_what_is_special():
    tokens, types, _ = gpt2_vocabulary()
    tokens[-2:], types[-2:] = ["<think>", "<|tool|>"], [4, 3]
    tokenizer = Tokenizer.from_gguf(gpt2_metadata(tokens=tokens, token_type=types))
    ids = tokenizer.encode("a<think>b<|tool|>c<|nothing|>")
    assert {len(tokens) - 2, len(tokens) - 1} < set(ids)
    assert tokenizer.decode(ids) == "a<think>bc<|nothing|>"
    assert tokenizer.decode(ids, skip_special=False) == "a<think>b<|tool|>c<|nothing|>"


# ------------------------------------------------------------------------------------------------ pre-tokenizers
@pytest.mark.parametrize(
    "pre, words",
    [
        ("smollm", ["I", "'ll", "ĠBE", "Ġ", "1", "2", "3", "4", "'", "LL", "Ġx", ".", "ĊĊ"]),
        ("gpt-2", ["I", "'ll", "ĠBE", "Ġ1234", "'", "LL", "Ġx", ".", "ĊĊ"]),
        ("llama-bpe", ["I", "'ll", "ĠBE", "Ġ", "123", "4", "'LL", "Ġx", ".ĊĊ"]),
        ("qwen2", ["I", "'ll", "ĠBE", "Ġ", "1", "2", "3", "4", "'LL", "Ġx", ".ĊĊ"]),
        ("tekken", ["I", "'ll", "ĠBE", "Ġ", "1", "2", "3", "4", "'LL", "Ġx", ".ĊĊ"]),
        ("default", ["I", "'", "ll", "ĠBE", "Ġ", "123", "4", "'", "LL", "Ġx", ".", "ĊĊ"]),
    ],
)
def test_words_of_each_pre(pre, words):
    tokenizer = Tokenizer.from_gguf(gpt2_metadata(pre=pre))
    got = [w for w, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str("I'll BE 1234'LL x.\n\n")]
    assert got == words


def test_llama3_takes_whole_words_without_merges():
    tokens, types, merges = gpt2_vocabulary()
    tokens[-1], types[-1] = "zebra", 1
    assert Tokenizer.from_gguf(gpt2_metadata(tokens=tokens, token_type=types)).encode("zebra") != [len(tokens) - 1]
    llama3 = Tokenizer.from_gguf(gpt2_metadata(pre="llama-bpe", tokens=tokens, token_type=types, bos_token_id=0))
    assert llama3.encode("zebra") == [0, len(tokens) - 1]  # and bos in front unless the file says otherwise
    assert llama3.encode("zebra", add_special=False) == [len(tokens) - 1]


def test_qwen_composes_characters():
    tokenizer = Tokenizer.from_gguf(gpt2_metadata(pre="qwen2"))
    assert tokenizer.encode("e\u0301") == tokenizer.encode("é")


@pytest.mark.parametrize("add_bos", [True, False])
def test_bos_as_the_file_says(add_bos):
    tokenizer = Tokenizer.from_gguf(gpt2_metadata(add_bos_token=add_bos, bos_token_id=1))
    assert tokenizer.encode("a") == [1] * add_bos + tokenizer.encode("a", add_special=False)


def test_end_of_turn_tokens_join_eos():
    assert Tokenizer.from_gguf(gpt2_metadata(eos_token_id=0)).eos_ids == (0, 2)
    assert Tokenizer.from_gguf(gpt2_metadata(eos_token_id=0, eot_token_id=1)).eos_ids == (0, 1, 2)


# ------------------------------------------------------------------------------------------------ SentencePiece
def sentencepiece_oracle(text: str) -> list[int]:
    """SentencePiece's rule: join the best-scored pair of neighbours, leftmost first, until none is a token."""
    tokens, types, scores = sentencepiece_vocabulary()
    ids = {t: i for i, t in enumerate(tokens) if types[i] == 1}
    symbols = list(("▁" + text.replace(" ", "▁")) if text else "")
    while True:
        pairs = [(scores[ids[a + b]], -i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in ids]
        if not pairs:
            break
        at = -max(pairs)[1]
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return [i for s in symbols for i in ([ids[s]] if s in ids else [3 + b for b in s.encode()])]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="helowrdt aéT.\n☃🙂", max_size=40))
def test_sentencepiece_equals_its_rule(text):
    assert SENTENCEPIECE.encode(text, add_special=False) == sentencepiece_oracle(text)
    assert SENTENCEPIECE.decode(SENTENCEPIECE.encode(text)) == text


def test_sentencepiece_by_hand():
    tokens = sentencepiece_vocabulary()[0]
    ids = SENTENCEPIECE.encode("hello world é")
    assert [tokens[i] for i in ids] == ["<s>", "▁hello", "▁world", "▁", "<0xC3>", "<0xA9>"]
    assert SENTENCEPIECE.decode(ids) == "hello world é"
    assert SENTENCEPIECE.decode(ids, continuation=True) == " hello world é"
    assert SENTENCEPIECE.decode(ids[-3:], continuation=True) == " é"
    assert SENTENCEPIECE.eos_ids == (2,)


def test_sentencepiece_without_the_space_prefix():
    tokenizer = Tokenizer.from_gguf(sentencepiece_metadata(add_space_prefix=False, add_bos_token=False))
    assert tokenizer.decode(tokenizer.encode(" hello")) == " hello"
    assert tokenizer.encode("he") == [sentencepiece_vocabulary()[0].index("he")]


def test_sentencepiece_saved_and_read_back(tmp_path):
    SENTENCEPIECE.save(tmp_path)
    again = Tokenizer.from_directory(tmp_path)
    for text in ("hello world é", "  hello", "🙂", "the </s> lo"):
        ids = SENTENCEPIECE.encode(text)
        assert again.encode(text) == ids and again.decode(ids) == SENTENCEPIECE.decode(ids)
        assert again.backend.decode(ids) == SENTENCEPIECE.decode(ids)  # the decoder that other programs will use


# ------------------------------------------------------------------------------------------------ directories
def test_directory_with_its_companions(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert (tokenizer.eos_ids, tokenizer.bos_id) == ((2, 0), 0)
    assert tokenizer.apply_chat([{"role": "user", "content": "x"}]) == (
        "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(tokenizer.encode("the 👋<|im_end|>")) == "the 👋"


def test_chat_template_in_the_config(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    assert Tokenizer.from_directory(tmp_path).chat_template is None
    for template in (
        CHAT_TEMPLATE,
        [{"name": "tool_use", "template": "?"}, {"name": "default", "template": CHAT_TEMPLATE}],
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        assert Tokenizer.from_directory(tmp_path).chat_template == CHAT_TEMPLATE


# ------------------------------------------------------------------------------------------------ chat templates
def with_template(template: str | None) -> Tokenizer:
    metadata = gpt2_metadata(bos_token_id=0)
    return Tokenizer.from_gguf(metadata | ({} if template is None else {"tokenizer.chat_template": template}))


@pytest.mark.parametrize(
    "template, text",
    [
        ("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}", "<|endoftext|>é<|im_end|>"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "é"}]'),
        ("{%- for m in messages %}\n    {% if true %}\nx\n    {% endif %}\n{% endfor %}", "x\n"),
        ("{% for m in messages %}a{% break %}b{% endfor %}", "a"),
        ("{% generation %}a{% endgeneration %}b", "ab"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% if tools %}t{% else %}n{% endif %}{{ add_generation_prompt }}", "nTrue"),
        ("{{ enable_thinking }}", "no"),
    ],
    ids=["tokens", "tojson", "trim", "break", "generation", "strftime", "defaults", "variables"],
)
def test_chat_template_features(template, text):
    messages = [{"role": "user", "content": "é"}]
    assert with_template(template).apply_chat(messages, enable_thinking="no") == text


@pytest.mark.parametrize("content", [CORPUS["special"], "<|im_end|>", "<<|im_end|>|im_end|>", "<|im_<|im_end|>end|>"])
def test_control_tokens_in_a_message_are_plain_text(content):
    tokenizer = with_template(CHAT_TEMPLATE)
    messages = [
        {"role": "system", "content": content},
        {"role": "user", "content": content},
        {"role": "tool", "content": ""},
    ]
    ids = tokenizer.encode_chat(messages)
    assert [ids.count(i) for i in range(3)] == [0, 4, 3]  # those of the template
    assert tokenizer.decode(ids, skip_special=False) == tokenizer.apply_chat(messages)


@pytest.mark.parametrize(
    "template, rule",
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "Expected an expression"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "not callable|unsafe|safely"),
        ("{{ messages[0].nothing.more }}", "undefined|no attribute"),
        ("{{ 1 // 0 }}", "zero"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
    ids=["none", "raises", "syntax", "class", "mutation", "undefined", "zero", "recursion"],
)
def test_chat_template_refusals(template, rule):
    with pytest.raises(ValueError, match=rule):
        with_template(template).apply_chat([{"role": "user", "content": "x"}])


# ------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    "metadata, rule",
    [
        (gpt2_metadata(model="bert"), "tokenizer.ggml.model='bert' is not supported"),
        (gpt2_metadata(model=None), "tokenizer.ggml.model=None is not supported"),
        (gpt2_metadata(pre="kimi-k2"), "tokenizer.ggml.pre='kimi-k2' is not supported"),
        (gpt2_metadata(pre=None), "tokenizer.ggml.pre=None is not supported"),
        (gpt2_metadata(tokens=[]), "non-empty list of strings"),
        (gpt2_metadata(tokens=[1, 2]), "non-empty list of strings"),
        (gpt2_metadata(token_type=[1]), "token_type must be a list of 288"),
        (gpt2_metadata(merges=["a b c"]), "strings of two tokens each"),
        (gpt2_metadata(merges=["zz qq"]), "broken"),
        (gpt2_metadata(eos_token_id=288), "eos_token_id=288 must be below the 288 tokens"),
        (gpt2_metadata(bos_token_id=-1), "bos_token_id=-1"),
        (sentencepiece_metadata(scores=None), "scores must be a list of 320"),
        (sentencepiece_metadata(scores=["x"] * 320), "broken"),
    ],
)
def test_bad_gguf_tokenizers(metadata, rule):
    with pytest.raises(TokenizerError, match=rule):
        Tokenizer.from_gguf(metadata)


def test_bad_directories(tmp_path):
    with pytest.raises(TokenizerError, match="tokenizer.json is missing"):
        Tokenizer.from_directory(tmp_path)
    write_tokenizer(tmp_path)
    good = (tmp_path / "tokenizer.json").read_text()
    for broken in ("", "{}", "[1]", good[: len(good) // 2], good.replace('"BPE"', '"XYZ"')):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(TokenizerError, match="is not a tokenizer"):
            Tokenizer.from_directory(tmp_path)
    other = json.loads(good) | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(other))
    with pytest.raises(TokenizerError, match="WordPiece"):
        Tokenizer.from_directory(tmp_path)
    large = json.loads(good)
    large["model"]["vocab"]["a"] = 400_000_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(large))
    with pytest.raises(TokenizerError, match="token id 400000000 must be below 4194304"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text(good)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TokenizerError, match="must hold a JSON object"):
        Tokenizer.from_directory(tmp_path)


BYTE_LEVEL = Tokenizer.from_gguf(gpt2_metadata())
SENTENCEPIECE = Tokenizer.from_gguf(sentencepiece_metadata())
