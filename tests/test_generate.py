"""Sampling against plain definitions and transformers' own, and the Generator on tiny and scripted models."""

import dataclasses
import math
import random
import re

import numpy as np
import pytest
import torch
from real_model import ANSWER_IDS, PROMPT, smollm2
from tiny_checkpoints import hf_config, write_hf

from tiny_gemm import checkpoint
from tiny_gemm.generate import (
    Generator,
    SamplingParams,
    StopStrings,
    _Slots,
    _splitmix,
    candidates,
    gumbel_noise,
    largest,
    penalize,
    sample,
)
from tiny_gemm.model import KV_CACHES, KVCache, ModelConfig

SHAPE = dict(hidden=96, ffn=160, heads=6, kv_heads=2, head_dim=64)
PROMPTS = ["the cat", "a", "hello world, and the end of it", "whose"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(Transformer, Tokenizer) with random weights."""
    directory = tmp_path_factory.mktemp("tiny")
    write_hf(directory, **SHAPE)
    return checkpoint.load(directory, dtype=torch.float32, progress=False)


class Scripted:
    """A model that says what it is told: row b's logits are 10 at script[b][step], 8 at 60, 0 elsewhere; or NaN."""

    def __init__(self, *script: list):
        self.config = ModelConfig.from_hf(hf_config("llama", **SHAPE))
        self.device, self.dtype, self.script = torch.device("cpu"), torch.float32, script

    def prefill(self, tokens, lengths, cache):
        self.step, self.decoded = 0, 0
        return self._logits()

    def decode(self, tokens, cache):
        self.step, self.decoded = self.step + 1, self.decoded + 1
        return self._logits()

    def _logits(self):
        logits = torch.zeros(len(self.script), self.config.vocab_size)
        logits[:, 60] = 8.0
        for row, script in zip(logits, self.script, strict=True):
            token = script[self.step] if self.step < len(script) else 3
            if token != token:
                row[7] = math.nan
            else:
                row[token] = 10.0
        return logits


def kept(logits, **params):
    """The ids [B] of sets, and log weights spread back over the vocabulary, that candidates leaves."""
    _, weights, ids = candidates(logits, SamplingParams(temperature=params.pop("temperature", 1.0), **params))
    full = torch.full_like(logits, -math.inf).scatter(1, ids.expand_as(weights), weights)
    return [set(row.isfinite().nonzero().flatten().tolist()) for row in full], full


# ----------------------------------------------------------------------------------------------------------- sampling
def test_top_k_keeps_the_k_likeliest():
    logits = torch.randn(3, 100)
    sets, _ = kept(logits, top_k=7)
    assert sets == [set(row.topk(7).indices.tolist()) for row in logits]
    assert all(len(s) == 100 for s in kept(logits, top_k=1000)[0])


@pytest.mark.parametrize("p", [1e-12, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p):
    logits = torch.randn(4, 300) * 2
    for row, ids in zip(logits.double(), kept(logits, top_p=p)[0], strict=True):
        mass, expected = 0.0, set()
        for i in row.argsort(descending=True).tolist():
            expected.add(i)
            mass += row.softmax(0)[i].item()
            if mass >= p:
                break
        assert ids == (expected if p < 1 else set(range(300)))


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1.0])
def test_min_p_keeps_what_is_likely_beside_the_likeliest(p):
    logits = torch.randn(4, 300) * 2
    probabilities = logits.softmax(-1)
    limit = p * probabilities.amax(-1, keepdim=True)
    assert kept(logits, min_p=p)[0] == [
        set(r.nonzero().flatten().tolist()) for r in probabilities >= limit * (1 - 1e-6)
    ]


@pytest.mark.parametrize(
    "params",
    [
        dict(temperature=0.7, top_k=20, top_p=0.8, min_p=0.05),
        dict(temperature=1.5, top_p=0.9, min_p=0.1),
        dict(temperature=0.3, top_k=5, top_p=0.6),
        dict(temperature=2.0, top_k=50, min_p=0.2),
    ],
    ids=str,
)
def test_filters_work_in_the_order_of_transformers(params):
    theirs = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(5, 400) * 3
    ids, seen = torch.randint(0, 400, (5, 12)), torch.zeros(5, 400, dtype=torch.bool)
    ours = penalize(logits, seen.scatter(1, ids, True), 1.3)
    expected = theirs.RepetitionPenaltyLogitsProcessor(1.3)(ids, logits)
    assert torch.equal(ours, expected)

    steps = [theirs.TemperatureLogitsWarper(params["temperature"])]
    steps += [theirs.TopKLogitsWarper(params["top_k"])] if "top_k" in params else []
    steps += [theirs.TopPLogitsWarper(params["top_p"])] if "top_p" in params else []
    steps += [theirs.MinPLogitsWarper(params["min_p"])] if "min_p" in params else []
    for step in steps:
        expected = step(ids, expected)
    torch.testing.assert_close(kept(ours, **params)[1].softmax(-1), expected.softmax(-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_distribution(temperature):
    """20000 rows, a seed each: every frequency within 4.5 standard deviations of softmax(logits / temperature)."""
    rows, logits = 20000, torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5])
    params = SamplingParams(temperature=temperature)
    tokens, finite = sample(logits.expand(rows, -1), params, torch.arange(rows), torch.tensor([3]))
    assert finite.all()
    p = (logits.double() / temperature).softmax(0)
    frequencies = torch.bincount(tokens, minlength=5) / rows
    assert ((frequencies - p).abs() < 4.5 * (p * (1 - p) / rows).sqrt()).all()


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [64, 49152, 50000, 128256])
def test_the_largest_logit_is_found_in_parts(vocab):
    logits = torch.randn(8, vocab, device="cuda")
    logits[1, vocab - 1], logits[2, 0] = 100, math.inf
    logits[3, vocab // 2 :] = math.nan
    top, tokens = largest(logits)
    expected, expected_tokens = logits.cpu().max(dim=-1)
    assert torch.equal(top.cpu().nan_to_num(-1.0), expected.nan_to_num(-1.0))
    finite = expected.isfinite()
    assert torch.equal(tokens.cpu()[finite], expected_tokens[finite])


def test_a_tiny_temperature_is_greedy_and_does_not_overflow():
    logits = torch.randn(6, 50) * 100
    args = torch.arange(6), torch.tensor([0])
    tokens, finite = sample(logits, SamplingParams(temperature=1e-30), *args)
    assert finite.all() and torch.equal(tokens, logits.argmax(-1))
    assert torch.equal(tokens, sample(logits, SamplingParams(), *args)[0])


def test_noise_is_gumbel_and_depends_on_seed_step_and_id_only():
    assert int(_splitmix(torch.tensor(0))) == 0xE220A8397B1DCDAF - 2**64  # as published
    assert (
        gumbel_noise(torch.tensor([0]), torch.tensor([0]), torch.arange(100)[None]).max() < 10
    )  # zeros are no weak point
    ids = torch.arange(50000).unsqueeze(0)
    noise = gumbel_noise(torch.tensor([1, 2, 1]), torch.tensor([5]), ids)
    assert noise.isfinite().all() and torch.equal(noise[0], noise[2])
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.std().item() == pytest.approx(math.pi / math.sqrt(6), abs=0.02)
    assert torch.equal(noise[1:2, 40:60], gumbel_noise(torch.tensor([2]), torch.tensor([5]), ids[:, 40:60]))
    other_step = gumbel_noise(torch.tensor([1]), torch.tensor([6]), ids)
    for a, b in ((noise[0], noise[1]), (noise[0], other_step[0]), (noise[0, :-1], noise[0, 1:])):
        assert abs(torch.corrcoef(torch.stack((a, b)))[0, 1]) < 0.02


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}, {"min_p": 0.1}], ids=str
)
def test_logits_that_are_not_finite_are_reported(params):
    logits = torch.randn(4, 30)
    logits[1, 4], logits[2, 5], logits[3, 6] = math.nan, math.inf, -math.inf
    _, finite = sample(logits, SamplingParams(**params), torch.zeros(4, dtype=torch.int64), torch.tensor([0]))
    assert finite.tolist() == [True, False, False, True]


# ---------------------------------------------------------------------------------------------------------- generator
SAMPLED = SamplingParams(temperature=1.0, top_k=50, top_p=0.95, repetition_penalty=1.1, seed=5, max_new_tokens=12)
GREEDY = SamplingParams(max_new_tokens=12)


@pytest.mark.parametrize("kv_cache", KV_CACHES)
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_row_of_a_batch_gets_what_it_gets_alone(tiny, params, kv_cache):
    generator = Generator(*tiny, max_length=64, kv_cache=kv_cache)
    alone = [generator.generate(prompt, params)[0] for prompt in PROMPTS]  # the cache then grows to four rows
    together = generator.generate(PROMPTS, params)
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]
    assert [r.text for r in together] == [r.text for r in alone]
    ahead = Generator(*tiny, run_ahead=1, kv_cache=kv_cache).generate(PROMPTS, params)
    assert [r.token_ids for r in ahead] == [r.token_ids for r in alone]


@pytest.mark.parametrize("kv_cache", KV_CACHES)
def test_decoding_is_prefilling_one_token_more(tiny, kv_cache):
    model, tokenizer = tiny
    result = Generator(model, tokenizer, kv_cache=kv_cache).generate(PROMPTS[0], GREEDY)[0]
    ids = tokenizer.encode(PROMPTS[0])
    for token in result.token_ids:
        cache = KVCache.allocate(model.config, 1, 64, "cpu", KV_CACHES[kv_cache] or torch.float32)
        logits = model.prefill(torch.tensor([ids]), torch.tensor([len(ids)], dtype=torch.int32), cache)
        assert int(logits.argmax(-1)) == token
        ids.append(token)


def test_every_step_has_noise_of_its_own(tiny):
    """Flat logits: what is picked is what sample gives for steps 0, 1, 2 and so on."""
    vocab, params = tiny[0].config.vocab_size, SamplingParams(temperature=1.0)
    cache = KVCache.allocate(tiny[0].config, 2, 8, "cpu", torch.float32)
    slots, logits, seeds = _Slots.allocate(cache, vocab), torch.zeros(2, vocab), (3, 4)
    slots.begin(torch.zeros(2, 1, dtype=torch.int64), seeds)
    picked = []
    for step in range(5):
        slots.pick(logits, params)
        picked.append(tuple(slots.tokens.tolist()))
        expected, _ = sample(logits, params, torch.tensor(seeds), torch.tensor([step]))
        assert picked[-1] == tuple(expected.tolist())
    assert len(set(picked)) == 5


def test_padding_is_nothing_that_a_prompt_has_not_said(tiny):
    """The repetition penalty of a short row in a ragged batch is that of the row alone."""
    generator, params = Generator(*tiny, max_length=64), SamplingParams(max_new_tokens=8, repetition_penalty=5.0)
    together = generator.generate(PROMPTS, params)
    for prompt, result in zip(PROMPTS, together, strict=True):
        assert generator.generate(prompt, params)[0].token_ids == result.token_ids


def test_two_streams_of_one_generator_do_not_mix(tiny):
    generator = Generator(*tiny, max_length=64)
    first, second = (generator.stream(p, SamplingParams(max_new_tokens=8, stop_token_ids=())) for p in PROMPTS[:2])
    next(first), next(second)
    with pytest.raises(RuntimeError, match="another generation has begun"):
        list(first)
    assert generator.generate(PROMPTS[1], SamplingParams(max_new_tokens=8, stop_token_ids=()))


def test_calls_within_and_without_inference_mode_share_a_generator(tiny):
    generator, params = Generator(*tiny, max_length=64), SamplingParams(max_new_tokens=4)
    with torch.inference_mode():
        inside = generator.generate(PROMPTS[0], params)
    assert generator.generate(PROMPTS[0], params)[0].token_ids == inside[0].token_ids


def test_the_tokenizers_end_tokens_stop_too(tiny):
    model, tokenizer = tiny
    script = Scripted([10, tokenizer.eos_ids[0], 11])
    script.config = dataclasses.replace(script.config, eos_token_ids=())
    result = Generator(script, tokenizer, max_length=32).generate([1, 2], SamplingParams(max_new_tokens=8))[0]
    assert (result.finish_reason, result.token_ids[-1]) == ("stop", tokenizer.eos_ids[0])


def test_seeds_reproduce(tiny):
    def run(seed, prompts=("the cat",)):
        params = SamplingParams(temperature=1.0, seed=seed, max_new_tokens=10, stop_token_ids=())
        return [r.token_ids for r in Generator(*tiny, max_length=64).generate(list(prompts), params)]

    assert run(1) == run(1) != run(2)
    assert run((1, 2), ["the cat"] * 2) == run(1) + run(2)
    assert run(-(2**63)) != run(2**63 - 1)


def test_repetition_penalty_covers_prompt_and_answer():
    def run(*prompt):
        params = SamplingParams(repetition_penalty=2.0, max_new_tokens=3)
        return Generator(Scripted([50] * 3)).generate([prompt], params)[0].token_ids

    assert run(51) == (50, 60, 50)  # 50 falls from 10 to 5, then 60 from 8 to 4
    assert run(51, 50) == (60, 50, 50)
    assert run(60, 51) == (50, 50, 50)


def test_stops_at_a_stop_token():
    result = Generator(Scripted([9, 8, 2, 9])).generate([[5]])[0]  # the config's eos is 2
    assert (result.token_ids, result.finish_reason) == ((9, 8, 2), "stop")
    result = Generator(Scripted([9, 8, 2, 9])).generate([[5]], SamplingParams(stop_token_ids=(8,)))[0]
    assert (result.token_ids, result.finish_reason) == ((9, 8), "stop")
    result = Generator(Scripted([9, 8, 2, 9])).generate([[5]], SamplingParams(stop_token_ids=(), max_new_tokens=4))[0]
    assert (result.token_ids, result.finish_reason) == ((9, 8, 2, 9), "length")


def test_streams_text_without_half_characters(tiny):
    text = "the école of thé"
    ids = tiny[1].encode(text)
    stream = Generator(Scripted(ids), tiny[1]).stream([[5]], SamplingParams(max_new_tokens=len(ids)))
    pieces = [piece.text for piece in stream]
    assert "".join(pieces) == text and len(pieces) > 5 and not any("�" in p for p in pieces)
    assert stream.results[0].text == text and stream.results[0].finish_reason == "length"


@pytest.mark.parametrize(
    "text, stop, expected",
    [
        ("one END two", ("END",), "one "),
        ("one EN END", ("END", "zzz"), "one EN "),
        ("one EN", ("END",), "one EN"),
        ("aab", ("ab",), "a"),
        ("END", ("END",), ""),
        ("one two", "two", "one "),
    ],
    ids=str,
)
def test_a_stop_string_across_tokens_is_never_shown(tiny, text, stop, expected):
    tokenizer = tiny[1]
    ids = [i for character in text for i in tokenizer.encode(character)]  # a token a character
    stream = Generator(Scripted(ids), tokenizer).stream([[5]], SamplingParams(stop=stop, max_new_tokens=len(ids)))
    shown = "".join(piece.text for piece in stream)
    result = stream.results[0]
    assert shown == result.text == expected
    assert result.finish_reason == ("length" if expected == text else "stop")
    assert len(result.token_ids) <= len(ids)


def test_stop_strings_do_not_depend_on_how_text_arrives():
    """The text ends before the stop string that is complete first, however it is cut; 500 random cases."""
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choices("abc", k=rng.randint(0, 12)))
        stops = ["".join(rng.choices("abc", k=rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        ends = [(i + len(s), i) for s in stops if (i := text.find(s)) >= 0]
        expected = text[: min(ends)[1]] if ends else text
        stop_strings, shown = StopStrings(tuple(stops)), ""
        while text:
            n = rng.randint(1, len(text))
            shown += stop_strings.push(text[:n])
            assert expected.startswith(shown)
            text = text[n:]
        if not stop_strings.found:
            shown += stop_strings.held
        assert shown == expected and stop_strings.found == bool(ends)


def test_finished_rows_wait_for_the_others():
    model = Scripted([9, 2] + [4] * 8, [7] * 6 + [2], [5] * 10)
    results = Generator(model).generate([[5], [6, 6], [7]], SamplingParams(max_new_tokens=10))
    assert [r.token_ids for r in results] == [(9, 2), (7,) * 6 + (2,), (5,) * 10]
    assert [r.finish_reason for r in results] == ["stop", "stop", "length"]
    assert [r.stats.prompt_tokens for r in results] == [1, 2, 1] and [r.stats.new_tokens for r in results] == [2, 7, 10]
    results = Generator(model).generate([[5], [6, 6], [7]], SamplingParams(max_new_tokens=10, stop_token_ids=(9, 7, 5)))
    assert [len(r.token_ids) for r in results] == [1, 1, 1] and model.decoded == 0


@pytest.mark.parametrize("run_ahead", [0, 1, 3])
def test_runs_ahead_but_never_past_the_limit(run_ahead):
    model = Scripted([9] * 20)
    stream = Generator(model, run_ahead=run_ahead).stream([[5]], SamplingParams(max_new_tokens=6))
    launched = []
    for _ in stream._pieces.gi_frame.f_locals["tokens"]:
        launched.append(model.decoded)
    assert launched == [min(i + run_ahead, 5) for i in range(6)]


def test_an_interruption_keeps_what_was_generated(tiny):
    tokenizer = tiny[1]
    ids = tokenizer.encode("a b c d e f g h")
    stream = Generator(Scripted(ids), tokenizer).stream([[5]])
    shown = next(stream).text + next(stream).text
    stream.close()
    assert list(stream) == []
    result = stream.results[0]
    assert result.finish_reason == "interrupted" and result.text == shown and result.stats.new_tokens >= 2

    class Interrupted(Scripted):
        def decode(self, tokens, cache):
            if self.decoded == 3:
                raise KeyboardInterrupt
            return super().decode(tokens, cache)

    generator = Generator(Interrupted([9] * 20))
    result = generator.generate([[5]])[0]
    assert (result.finish_reason, result.token_ids) == ("interrupted", (9,) * 4)
    assert (
        generator.generate([[5]], SamplingParams(max_new_tokens=2))[0].finish_reason == "length"
    )  # it goes on working
    with pytest.raises(KeyboardInterrupt):
        list(generator.stream([[5]]))


def test_nan_logits_are_an_error_and_no_token():
    stream = Generator(Scripted([9] * 4, [9, 9, math.nan])).stream([[5], [6]])
    with pytest.raises(FloatingPointError, match="the logits of row 1 at step 2 are NaN or infinite"):
        list(stream)
    assert [r.token_ids for r in stream.results] == [(9, 9, 9), (9, 9)]
    ended = Generator(Scripted([9] * 4, [2, math.nan, 9, 9])).generate([[5], [6]], SamplingParams(max_new_tokens=4))
    assert [len(r.token_ids) for r in ended] == [4, 1]  # nobody reads a row that has ended


def test_stats(tiny):
    result = Generator(*tiny).generate("hello", SamplingParams(max_new_tokens=5, stop_token_ids=()))[0]
    stats = result.stats
    assert stats.new_tokens == len(result.token_ids) == 5
    assert stats.prompt_tokens == len(tiny[1].encode("hello"))
    assert stats.ttft_s > 0 and stats.tokens_per_s > 0 and stats.peak_memory > 50e6


# ---------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be a finite number, 0 (greedy) or more"),
        ({"temperature": math.nan}, "temperature=nan must be"),
        ({"temperature": math.inf}, "temperature=inf must be"),
        ({"top_k": -1}, "top_k=-1 must be an integer, 0 (off) or more"),
        ({"top_p": 0.0}, "top_p=0.0 must be a number above 0 and at most 1"),
        ({"top_p": 1.01}, "top_p=1.01 must be"),
        ({"min_p": -0.5}, "min_p=-0.5 must be a number between 0 (off) and 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be a finite number above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be an integer above 0"),
        ({"stop": ("a", "")}, "stop=('a', '') must be strings that are not empty"),
        ({"seed": 2**63}, f"seed={2**63} must be an integer of 64 bits"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_refuses_sampling_values(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SamplingParams(**options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": "hot"}, "temperature='hot' must be a finite number"),
        ({"temperature": None}, "temperature=None must be a finite number"),
        ({"temperature": (0.5,)}, "temperature=(0.5,) must be a finite number"),
        ({"top_k": 1.5}, "top_k=1.5 must be an integer, 0 (off) or more"),
        ({"top_p": "0.9"}, "top_p='0.9' must be a number above 0"),
        ({"min_p": []}, "min_p=[] must be a number between 0"),
        ({"repetition_penalty": "x"}, "repetition_penalty='x' must be a finite number above 0"),
        ({"seed": "x"}, "seed='x' must be an integer of 64 bits, or a tuple of them"),
        ({"seed": 1.5}, "seed=1.5 must be an integer of 64 bits"),
        ({"seed": (1, "x")}, "seed=(1, 'x') must be an integer of 64 bits"),
        ({"max_new_tokens": 2.0}, "max_new_tokens=2.0 must be an integer above 0"),
        ({"stop": 5}, "stop=5 must be strings that are not empty"),
        ({"stop": ("a", 5)}, "stop=('a', 5) must be strings"),
        ({"stop_token_ids": 0}, "stop_token_ids=0 must be token ids, or None"),
        ({"stop_token_ids": "2"}, "stop_token_ids='2' must be token ids, or None"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_refuses_sampling_types(options, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        SamplingParams(**options)


def test_sampling_takes_what_is_a_number():
    params = SamplingParams(temperature=np.float32(1), top_k=np.int64(3), top_p=1, stop=["a", "b"], stop_token_ids=[2])
    assert (params.top_k, params.stop, params.stop_token_ids) == (3, ("a", "b"), [2])


@pytest.mark.parametrize(
    "prompts, params, message",
    [
        ([[5]] * 9, {}, "9 prompts: a batch holds 1 to 8"),
        ([], {}, "0 prompts: a batch holds 1 to 8"),
        ([[]], {}, "prompt 0 is empty; it must have at least one token"),
        (["a", ""], {}, "prompt 1 is empty"),
        ([[5, 288]], {}, "prompt 0 has token id 288; ids must be 0 to 287 (vocab_size=288)"),
        (["a", [2**70]], {}, f"prompt 1 has token id {2**70}; ids must be"),
        ([5, -1], {}, "prompt 0 has token id -1"),
        ([[5]] * 2, {"seed": (1, 2, 3)}, "seed=(1, 2, 3) must be one integer, or one for each of the 2 prompts"),
        (
            [[5], [5] * 30],
            {"max_new_tokens": 35},
            "prompt 1 has 30 tokens, with max_new_tokens=35 that is 65; the cache holds max_length=64",
        ),
    ],
    ids=lambda v: "",
)
def test_refuses_prompts(tiny, prompts, params, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Generator(*tiny, max_length=64).stream(prompts, SamplingParams(**({"max_new_tokens": 4} | params)))


@pytest.mark.parametrize(
    "prompts, message",
    [
        (torch.tensor([1, 2]), "prompt 0 is tensor([1, 2]); it must be text (str) or a list of token ids (int)"),
        (torch.tensor([[1, 2]]), "prompt 0 is tensor([[1, 2]]);"),
        ([torch.tensor([1, 2])], "prompt 0 is [tensor([1, 2])];"),
        (np.array([1, 2]), "prompt 0 is array([1, 2]);"),
        ([1.0, 2.5], "prompt 0 is [1.0, 2.5];"),
        ([[1, 2], [1, 2.5]], "prompt 1 is [1, 2.5];"),
        ([[1, [2]]], "prompt 0 is [1, [2]];"),
        (["a", 5], "prompt 1 is 5;"),
        (["a", None], "prompt 1 is None;"),
        (b"text", "prompt 0 is b'text';"),
        (7, "prompt 0 is 7;"),
        ({"a": 1}, "prompt 0 is {'a': 1};"),
    ],
    ids=str,
)
def test_refuses_prompts_of_another_type(tiny, prompts, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        Generator(*tiny, max_length=256).stream(prompts)


def test_takes_one_prompt_or_many(tiny):
    model, tokenizer = tiny
    generator, params = Generator(model, tokenizer, max_length=64), SamplingParams(max_new_tokens=3)
    ids = tokenizer.encode("the cat")
    expected = generator.generate("the cat", params)[0].token_ids
    for prompts in (ids, tuple(ids), list(np.array(ids)), [ids], (tuple(ids), "the cat"), ["the cat", ids]):
        assert all(r.token_ids == expected for r in generator.generate(prompts, params))


def test_refuses_what_it_cannot_do(tiny):
    with pytest.raises(ValueError, match="max_length=257 must be 1 to max_position_embeddings=256"):
        Generator(*tiny, max_length=257)
    with pytest.raises(ValueError, match="kv_cache='int4' must be one of auto, int8, fp8"):
        Generator(*tiny, kv_cache="int4")
    for prompts, params in (("text", {}), ([[5]], {"stop": "x"})):
        with pytest.raises(ValueError, match="need a tokenizer"):
            Generator(tiny[0]).stream(prompts, SamplingParams(**params))
    full = Generator(*tiny, max_length=8).generate([[5] * 4], SamplingParams(max_new_tokens=4, stop_token_ids=()))
    assert len(full[0].token_ids) == 4  # to the brim


# ---------------------------------------------------------------------------------------------------------------- GPU
GPU_PROMPTS = [
    PROMPT,
    "Water",
    "Once upon a time there was",
    "def main():",
    "1 2 3 4",
    "The",
    "A b c d e f g",
    "Paris is",
]


@pytest.fixture
def gpu():
    return smollm2(torch.bfloat16, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kv_cache", ["int8", "fp8"])
def test_gpu_with_a_cache_of_8_bits_writes_the_same_again(gpu, kv_cache):
    generator = Generator(*gpu, max_length=128, kv_cache=kv_cache)
    first, second = (generator.generate(PROMPT, SamplingParams(max_new_tokens=20))[0].token_ids for _ in range(2))
    assert first == second and first[:4] == tuple(ANSWER_IDS[:4])


@pytest.mark.gpu
def test_gpu_writes_the_reference_ids(gpu):
    generator = Generator(*gpu, max_length=128)
    for _ in range(2):
        assert list(generator.generate(PROMPT, SamplingParams(max_new_tokens=20))[0].token_ids) == ANSWER_IDS
    assert len(generator._graphs) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_a_graph_replays_the_bits_of_the_eager_step(gpu, params, monkeypatch):
    """A ragged batch of eight: the same tokens, and the same bits in the KV cache, twice by graph and once without."""
    runs = []
    for eager in (False, False, True):
        generator = Generator(*gpu, max_length=64)
        if eager:
            step = lambda slots, p: lambda: slots.pick(gpu[0].decode(slots.tokens, slots.cache), p)  # noqa: E731
            monkeypatch.setattr(generator, "_step", step)
        results = generator.generate(GPU_PROMPTS, params)
        torch.cuda.synchronize()
        cache = generator._slots.cache
        runs.append(([r.token_ids for r in results], cache.lengths.clone(), cache.k, cache.v))
    ids, lengths, k, v = runs[0]
    for other_ids, other_lengths, other_k, other_v in runs[1:]:
        assert other_ids == ids and torch.equal(other_lengths, lengths)
        for mine, other in ((k, other_k), (v, other_v)):
            for a, b in zip(mine, other, strict=True):
                for row, length in enumerate(lengths.tolist()):
                    assert torch.equal(a[row, :, :length], b[row, :, :length])


@pytest.mark.gpu
def test_a_row_on_a_gpu_has_the_same_bits_alone_as_in_a_batch(gpu):
    """Decode steps from the same cache; what a prefill computes may depend on the shape of its batch."""
    model, tokenizer = gpu
    ids = [tokenizer.encode(p) for p in GPU_PROMPTS]
    width = max(map(len, ids))
    together = KVCache.allocate(model.config, len(ids), 64, "cuda", model.dtype)
    tokens = torch.tensor([p + [0] * (width - len(p)) for p in ids], device="cuda")
    model.prefill(tokens, torch.tensor([len(p) for p in ids], dtype=torch.int32, device="cuda"), together)
    copies = [t.clone() for t in (*together.k, *together.v, together.lengths)]
    step_tokens = torch.randint(0, model.config.vocab_size, (6, len(ids)), device="cuda")
    batch = [model.decode(t, together) for t in step_tokens]
    for row in range(len(ids)):
        alone = KVCache.allocate(model.config, 1, 64, "cuda", model.dtype)
        for mine, theirs in zip((*alone.k, *alone.v, alone.lengths), copies, strict=True):
            mine.copy_(theirs[row : row + 1])
        for step, t in enumerate(step_tokens):
            assert torch.equal(model.decode(t[row : row + 1], alone)[0], batch[step][row]), f"row {row}, step {step}"


@pytest.mark.gpu
def test_noise_is_the_same_on_a_gpu():
    args = torch.tensor([1, 2**62, -7]), torch.tensor([9]), torch.arange(40000).unsqueeze(0)
    torch.testing.assert_close(gumbel_noise(*(a.cuda() for a in args)).cpu(), gumbel_noise(*args), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_nan_logits_are_reported_from_a_graph(gpu, monkeypatch):
    model, tokenizer = gpu
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda tokens, cache: decode(tokens, cache) * math.nan)
    with pytest.raises(FloatingPointError, match="the logits of row 0 at step 1"):
        list(Generator(model, tokenizer, max_length=64).stream(PROMPT, SamplingParams(max_new_tokens=8)))
