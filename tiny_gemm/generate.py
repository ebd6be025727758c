"""Text from a Transformer: prefill, decode against a static KV cache, sampling, stop tokens and strings, streaming.

    stream = Generator(model, tokenizer).stream("The capital of France is", SamplingParams(max_new_tokens=20))
    for piece in stream:
        print(piece.text, end="")
    print(stream.results[0].stats)

On a GPU one step, sampling included, is one CUDA graph, and the host reads token i while step i + 1 already runs: no
step waits for the host. The noise of a sample is a function of (seed, the row's own step, token id) alone: a row gets
the same tokens by itself as in a batch, and the same noise on a CPU as on a GPU.
"""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tiny_gemm.model import KV_CACHES, KVCache, Transformer

MAX_BATCH = 8
MAX_GRAPHS = 16  # captured steps kept: one for each batch size and set of sampling parameters
# splitmix64's constants, as int64
_GOLDEN, _MIX_1, _MIX_2 = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_FIXED_POINT = 2**40  # top-p adds probabilities as integers, so that the sum does not depend on its order


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are picked and when to stop. In this order, as transformers and llama.cpp do: repetition penalty over
    prompt and answer, temperature, top-k, top-p, min-p.

    temperature 0 is greedy. top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off. seed: one for all prompts, or a
    tuple of one a prompt. stop: strings that end the text, which does not contain them. stop_token_ids replaces the
    model's own end tokens; () never stops.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | tuple[int, ...] = 0
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        seeds = self.seed if isinstance(self.seed, tuple) else (self.seed,)
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        ends = () if self.stop_token_ids is None else self.stop_token_ids
        several = {"seed": seeds, "stop": stops, "stop_token_ids": ends}
        rules = {  # type, what each value must fulfil, both in words
            "temperature": (Real, lambda v: 0 <= v < math.inf, "a finite number, 0 (greedy) or more"),
            "top_k": (Integral, lambda v: v >= 0, "an integer, 0 (off) or more"),
            "top_p": (Real, lambda v: 0 < v <= 1, "a number above 0 and at most 1 (off)"),
            "min_p": (Real, lambda v: 0 <= v <= 1, "a number between 0 (off) and 1"),
            "repetition_penalty": (Real, lambda v: 0 < v < math.inf, "a finite number above 0 (1: off)"),
            "seed": (Integral, lambda v: -(2**63) <= v < 2**63, "an integer of 64 bits, or a tuple of them"),
            "max_new_tokens": (Integral, lambda v: v > 0, "an integer above 0"),
            "stop": (str, len, "strings that are not empty"),
            "stop_token_ids": (Integral, lambda v: True, "token ids, or None"),
        }
        for name, (kind, holds, rule) in rules.items():
            values = several.get(name, (getattr(self, name),))
            typed = isinstance(values, Collection) and all(isinstance(v, kind) for v in values)
            if not typed or not all(map(holds, values)):
                raise (ValueError if typed else TypeError)(f"{name}={getattr(self, name)!r} must be {rule}")
        object.__setattr__(self, "stop", tuple(stops))


@dataclass(frozen=True)
class Stats:
    """ttft_s: seconds from the start of iteration to the first token; on a GPU the first call of a kind also compiles
    kernels and captures a graph. tokens_per_s: the row's decode rate after it.
    peak_memory: bytes; of the GPU if the model is on one (what torch has allocated), of the process otherwise."""

    prompt_tokens: int
    new_tokens: int
    ttft_s: float
    tokens_per_s: float
    peak_memory: int


@dataclass(frozen=True)
class Result:
    """text ends before a stop token or string; token_ids has every token that was picked, those of the stop too."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: Literal["stop", "length", "interrupted"]
    stats: Stats


@dataclass(frozen=True)
class Piece:
    """Text that row `row` of the batch goes on with."""

    row: int
    text: str


Prompt = str | list[int] | tuple[int, ...]


class Generator:
    """Generates with one model; keeps the KV cache and the CUDA graphs from call to call (one call at a time).

    max_length: tokens a row can hold, prompt and answer; default 2048 or what the model allows, if that is less.
    kv_cache: "auto", keys and values in the model's dtype, or "int8" or "fp8" (e4m3): half of the bytes, rounded.
    run_ahead: steps launched before the host reads a token; default 1 on a GPU, 0 on a CPU.
    cuda_graph: False launches every kernel of a step by itself, for profilers and debuggers.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer=None,
        *,
        max_length: int | None = None,
        kv_cache: str = "auto",
        run_ahead: int | None = None,
        cuda_graph: bool = True,
    ):
        config = model.config
        if kv_cache not in KV_CACHES:
            raise ValueError(f"kv_cache={kv_cache!r} must be one of {', '.join(KV_CACHES)}")
        self.model, self.tokenizer = model, tokenizer
        if max_length is None:
            max_length = min(2048, config.max_position_embeddings)
        config.check_cache_length(max_length)
        self.max_length, self.kv_dtype = max_length, KV_CACHES[kv_cache] or model.dtype
        self.run_ahead = int(model.device.type == "cuda") if run_ahead is None else run_ahead
        self.cuda_graph = cuda_graph and model.device.type == "cuda"
        self._turn = 0  # counts calls, so that a stream whose cache another call has taken over can tell
        self._slots: _Slots | None = None
        self._graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self._graph_pool = torch.cuda.graph_pool_handle() if model.device.type == "cuda" else None

    def generate(self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None) -> list[Result]:
        """One Result a prompt. Ctrl-C ends it early: what was generated comes back with finish_reason "interrupted"."""
        stream = self.stream(prompts, params)
        try:
            for _ in stream:
                pass
        except KeyboardInterrupt:
            stream.close()
        return stream.results

    def stream(self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None) -> "Stream":
        """Starts 1 to 8 prompts as one batch; a prompt is text or a list of token ids. Iterate the Stream for Pieces.

        ValueError for an empty prompt, an unknown token id, a batch over 8, a prompt and answer over max_length;
        TypeError for prompts of another type.
        FloatingPointError, while iterating, when the model's logits are NaN or infinite: no token is made up.
        """
        params = params or SamplingParams()
        if not isinstance(prompts, (list, tuple)) or (prompts and not isinstance(prompts[0], (str, list, tuple))):
            prompts = [prompts]  # one prompt, as text or as token ids
        if not 1 <= len(prompts) <= MAX_BATCH:
            raise ValueError(f"{len(prompts)} prompts: a batch holds 1 to {MAX_BATCH}")
        seeds = params.seed if isinstance(params.seed, tuple) else (params.seed,) * len(prompts)
        if len(seeds) != len(prompts):
            raise ValueError(f"seed={seeds} must be one integer, or one for each of the {len(prompts)} prompts")
        if self.tokenizer is None and (params.stop or any(isinstance(p, str) for p in prompts)):
            raise ValueError("text prompts and stop strings need a tokenizer, and this Generator has none")
        ids = [self._check_prompt(i, prompt, params.max_new_tokens) for i, prompt in enumerate(prompts)]
        stops = params.stop_token_ids
        if stops is None:
            stops = {*self.model.config.eos_token_ids, *(self.tokenizer.eos_ids if self.tokenizer else ())}
        # Text goes on from a text prompt; token ids are a chat's, whose answer is a text of its own.
        texts = [isinstance(p, str) for p in prompts]
        decoders = [self.tokenizer.stream(continuation=text) if self.tokenizer else None for text in texts]
        rows = [_Row(len(p), params, frozenset(stops), d) for p, d in zip(ids, decoders, strict=True)]
        return Stream(rows, self._tokens(ids, seeds, params), self.model.device)

    def steps(self, prompts: Sequence[Sequence[int]], params: SamplingParams | None = None) -> Iterator[list[int]]:
        """The tokens that each step picks, a list a step, for 1 to 8 prompts of token ids; the first step is the
        prefill. Text, seeds a row, and stops are stream's; this is for profilers and benchmarks."""
        params = params or SamplingParams()
        if not 1 <= len(prompts) <= MAX_BATCH:
            raise ValueError(f"{len(prompts)} prompts: a batch holds 1 to {MAX_BATCH}")
        ids = [self._check_prompt(i, prompt, params.max_new_tokens) for i, prompt in enumerate(prompts)]
        return self._tokens(ids, (params.seed,) * len(ids), params)

    def _check_prompt(self, row: int, prompt: Prompt, new_tokens: int) -> list[int]:
        is_ids = isinstance(prompt, (list, tuple)) and all(isinstance(i, Integral) for i in prompt)
        if not is_ids and not isinstance(prompt, str):
            raise TypeError(f"prompt {row} is {prompt!r:.60}; it must be text (str) or a list of token ids (int)")
        ids = [int(i) for i in prompt] if is_ids else self.tokenizer.encode(prompt)
        if not prompt or not ids:
            raise ValueError(f"prompt {row} is empty; it must have at least one token")
        vocab = self.model.config.vocab_size
        if not 0 <= min(ids) <= max(ids) < vocab:
            bad = next(i for i in ids if not 0 <= i < vocab)
            raise ValueError(f"prompt {row} has token id {bad}; ids must be 0 to {vocab - 1} (vocab_size={vocab})")
        if len(ids) + new_tokens > self.max_length:
            raise ValueError(
                f"prompt {row} has {len(ids)} tokens, with max_new_tokens={new_tokens} that is "
                f"{len(ids) + new_tokens}; the cache holds max_length={self.max_length}"
            )
        return ids

    def _tokens(self, ids: list[list[int]], seeds: tuple[int, ...], params: SamplingParams) -> Iterator[list[int]]:
        """The batch's tokens, a list a step; -1 where the logits were not finite."""
        self._turn = turn = self._turn + 1
        slots = self._reserve(len(ids))
        step = self._step(slots, params) if params.max_new_tokens > 1 else None  # first: capturing runs on the cache
        width = max(map(len, ids))
        padded = torch.tensor([p + p[-1:] * (width - len(p)) for p in ids], device=self.model.device)
        lengths = torch.tensor([len(p) for p in ids], dtype=torch.int32, device=self.model.device)
        logits = self.model.prefill(padded, lengths, slots.cache)
        slots.begin(padded, seeds)
        slots.pick(logits, params)
        in_flight, launched = deque([slots.post()]), 1
        while in_flight or launched < params.max_new_tokens:
            if turn != self._turn:
                raise RuntimeError("another generation has begun on this Generator, which has one KV cache")
            while launched < params.max_new_tokens and len(in_flight) <= self.run_ahead:
                step()
                in_flight.append(slots.post())
                launched += 1
            yield in_flight.popleft()()

    def _reserve(self, batch: int) -> "_Slots":
        if self._slots is None or self._slots.tokens.shape[0] < batch:
            self._graphs.clear()
            self._slots = None  # freed before the larger one is allocated
            if self._graph_pool is not None:
                self._graph_pool = torch.cuda.graph_pool_handle()  # a pool ends with the last of its graphs
            model = self.model
            with torch.inference_mode(False):  # so that calls within and without inference mode can share them
                cache = KVCache.allocate(model.config, batch, self.max_length, model.device, self.kv_dtype)
                self._slots = _Slots.allocate(cache, model.config.vocab_size)
        return self._slots.rows(batch)

    def _step(self, slots: "_Slots", params: SamplingParams) -> Callable[[], None]:
        """What decodes and samples one token for every row: on a GPU the replay of a graph, captured once."""

        def step() -> None:
            slots.pick(self.model.decode(slots.tokens, slots.cache), params)

        if not self.cuda_graph:
            return step
        key = (slots.tokens.shape[0], *_sampling_key(params))
        if key not in self._graphs:
            with torch.cuda.device(self.model.device):
                slots.cache.lengths.zero_()
                side = torch.cuda.Stream()  # warm-up compiles kernels and fills caches, away from the capture
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    for _ in range(2):
                        step()
                torch.cuda.current_stream().wait_stream(side)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self._graph_pool):
                    step()
            if len(self._graphs) >= MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            self._graphs[key] = graph
        return self._graphs[key].replay


class Stream:
    """Iterates over Pieces. `results` can be read at any time; after an interruption it has what was generated."""

    def __init__(self, rows: list["_Row"], tokens: Iterator[list[int]], device: torch.device):
        self._rows, self._device = rows, device
        self._pieces = self._run(tokens)

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        """Ends generation; unfinished rows are "interrupted"."""
        self._pieces.close()

    @property
    def results(self) -> list[Result]:
        return [row.result(peak_memory(self._device)) for row in self._rows]

    def _run(self, tokens: Iterator[list[int]]) -> Iterator[Piece]:
        start = time.perf_counter()
        for step, batch in enumerate(tokens):
            seconds = time.perf_counter() - start
            for i, (row, token) in enumerate(zip(self._rows, batch, strict=True)):
                if row.finish_reason is not None:
                    continue  # it goes on in the batch, unread
                if token < 0:
                    raise FloatingPointError(f"the logits of row {i} at step {step} are NaN or infinite")
                if text := row.push(token, seconds):
                    yield Piece(i, text)
            if all(row.finish_reason for row in self._rows):
                return


class _Row:
    """The host's side of one row: its tokens, its text so far, and whether it has ended."""

    def __init__(self, prompt_tokens: int, params: SamplingParams, stop_ids: frozenset[int], decoder):
        self.prompt_tokens, self.max_new_tokens, self.stop_ids = prompt_tokens, params.max_new_tokens, stop_ids
        self.decoder, self.stops = decoder, StopStrings(params.stop)
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self.first_s = self.last_s = 0.0

    def push(self, token: int, seconds: float) -> str:
        """Takes the next token, which came after `seconds`; returns the text that can be shown now."""
        self.ids.append(token)
        self.first_s, self.last_s = self.first_s if len(self.ids) > 1 else seconds, seconds
        text = ""
        if token in self.stop_ids:
            self.finish_reason = "stop"
        elif self.decoder:
            text = self.stops.push(self.decoder.push(token))
        if self.finish_reason is None and not self.stops.found and len(self.ids) == self.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None and self.decoder:
            text += self.stops.push(self.decoder.finish())
        if self.stops.found:
            self.finish_reason = "stop"
        elif self.finish_reason is not None:
            text += self.stops.held
        self.text += text
        return text

    def result(self, peak_memory: int) -> Result:
        rate = (len(self.ids) - 1) / (self.last_s - self.first_s) if self.last_s > self.first_s else 0.0
        text = self.text if self.finish_reason else self.text + self.stops.held
        stats = Stats(self.prompt_tokens, len(self.ids), self.first_s, rate, peak_memory)
        return Result(text, tuple(self.ids), self.finish_reason or "interrupted", stats)


class StopStrings:
    """Lets text through up to the stop string that is complete first, holding back an end that may become one."""

    def __init__(self, stops: tuple[str, ...]):
        self.stops, self.held, self.found = stops, "", False

    def push(self, text: str) -> str:
        self.held += text
        hits = [(i + len(s), i) for s in self.stops if (i := self.held.find(s)) >= 0]
        if hits and not self.found:
            self.found = True
            free = min(hits)[1]
        elif self.found:
            free = 0
        else:
            lengths = [n for s in self.stops for n in range(1, len(s)) if self.held.endswith(s[:n])]
            free = len(self.held) - max(lengths, default=0)
        free_text, self.held = self.held[:free], "" if self.found else self.held[free:]
        return free_text


@dataclass(frozen=True)
class _Slots:
    """Device state of a batch, at fixed addresses for the graphs: tokens, picked int64 [B], seeds int64 [B], step int64
    [1], seen bool [B, V] (which tokens the repetition penalty applies to)."""

    cache: KVCache
    tokens: Tensor
    picked: Tensor
    seeds: Tensor
    step: Tensor
    seen: Tensor

    @classmethod
    def allocate(cls, cache: KVCache, vocab_size: int) -> "_Slots":
        new = lambda *shape, dtype=torch.int64: torch.zeros(shape, dtype=dtype, device=cache.lengths.device)  # noqa: E731
        b = cache.batch
        return cls(cache, new(b), new(b), new(b), new(1), new(b, vocab_size, dtype=torch.bool))

    def rows(self, batch: int) -> "_Slots":
        parts = (t[:batch] for t in (self.tokens, self.picked, self.seeds))
        return _Slots(self.cache.rows(batch), *parts, self.step, self.seen[:batch])

    def begin(self, prompts: Tensor, seeds: tuple[int, ...]) -> None:
        self.seeds.copy_(torch.tensor(seeds))
        self.step.zero_()
        self.seen.zero_().scatter_(1, prompts, True)

    @torch.inference_mode()
    def pick(self, logits: Tensor, params: SamplingParams) -> None:
        tokens, finite = sample(logits, params, self.seeds, self.step, self.seen)
        self.tokens.copy_(tokens)
        self.picked.copy_(torch.where(finite, tokens, -1))
        self.step.add_(1)
        if params.repetition_penalty != 1.0:
            self.seen.scatter_(1, tokens.unsqueeze(1), True)

    def post(self) -> Callable[[], list[int]]:
        """Sends the picked tokens to the host; calling the result waits for them and for nothing after them."""
        if not self.picked.is_cuda:
            return self.picked.clone().tolist
        host = torch.empty(self.picked.shape, dtype=torch.int64, pin_memory=True)
        host.copy_(self.picked, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(self.picked.device))

        def wait() -> list[int]:
            arrived.synchronize()
            return host.tolist()

        return wait


def sample(
    logits: Tensor, params: SamplingParams, seeds: Tensor, step: Tensor, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Picks a token a row: logits float32 [B, V] -> (tokens int64 [B], finite bool [B]).

    finite is False where the logits hold NaN or +inf, and the token then means nothing. seeds int64 [B], step int64
    [1], seen bool [B, V]. No host sync.
    """
    if params.repetition_penalty != 1.0:
        logits = penalize(logits, seen, params.repetition_penalty)
    if params.temperature == 0.0:
        top, tokens = largest(logits)
        return tokens, top.isfinite()
    top, weights, ids = candidates(logits, params)
    winner = (weights + gumbel_noise(seeds, step, ids)).argmax(dim=-1, keepdim=True)
    return ids.expand_as(weights).gather(-1, winner).squeeze(-1), top.isfinite().squeeze(-1)


def largest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(value, index) of the largest of each row [B, V]; on a GPU in two steps, since torch gives a row to one block."""
    batch, vocab = logits.shape
    parts = 64
    if not logits.is_cuda or vocab % parts:
        return logits.max(dim=-1)
    tops, tokens = logits.view(batch, parts, -1).max(dim=-1)  # [B, parts]
    top, part = tops.max(dim=-1, keepdim=True)
    return top.squeeze(-1), torch.add(tokens.gather(-1, part), part, alpha=vocab // parts).squeeze(-1)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes tokens that occurred less likely (penalty over 1), by the rule of the CTRL paper that all runtimes use."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor, Tensor]:
    """Temperature, top-k, top-p, min-p: (top logit [B, 1], log weights [B, C], -inf where cut, ids [B or 1, C])."""
    vocab = logits.shape[-1]
    k = min(params.top_k or vocab, vocab)
    top = logits.amax(dim=-1, keepdim=True)
    weights, ids = logits, torch.arange(vocab, device=logits.device).unsqueeze(0)
    if k < vocab:
        weights, ids = logits.topk(k)
    elif params.top_p < 1.0:
        weights, ids = logits.sort(dim=-1, descending=True, stable=True)
    weights = (weights - top) / params.temperature
    if params.top_p < 1.0:  # a token stays while those before it add up to less than top_p
        mass = (weights.softmax(dim=-1) * _FIXED_POINT).long()
        weights = weights.masked_fill(mass.cumsum(dim=-1) - mass >= max(1, int(params.top_p * _FIXED_POINT)), -math.inf)
    if params.min_p > 0.0:
        weights = weights.masked_fill(weights < math.log(params.min_p), -math.inf)
    return top, weights, ids


def gumbel_noise(seeds: Tensor, step: Tensor, ids: Tensor) -> Tensor:
    """Gumbel noise float32 [B, C] by splitmix64 of (seed [B], step [1], id [B or 1, C]); argmax(log p + noise) ~ p."""
    key = _splitmix(_splitmix(seeds) + step * _GOLDEN).unsqueeze(-1)  # [B, 1]
    uniform = (_shift_right(_splitmix(key + ids * _GOLDEN), 24).float() + 0.5) * 2.0**-40  # (0, 1), fine near 0
    return -torch.log(-torch.log1p(-uniform.clamp(max=1 - 2.0**-24)))


def _splitmix(state: Tensor) -> Tensor:
    """What splitmix64 puts out from `state`, int64."""
    z = state + _GOLDEN
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """A logical shift of int64."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


def _sampling_key(params: SamplingParams) -> tuple:
    """What a graph has baked in; seeds, stops and lengths it has not."""
    return params.temperature, params.top_k, params.top_p, params.min_p, params.repetition_penalty


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU as torch allocates, else the most this process has held of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # Linux; unlike getrusage's figure, this one is not inherited from the parent process
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
