"""examples/: each runs on a CPU, on tiny checkpoints that are made here, and does what it says.

They run in this process, which has torch and transformers imported already; the server is one of its own.
"""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import byte_alphabet, gpt2_vocabulary, write_gguf, write_hf, write_transformers

from tiny_gemm import checkpoint
from tiny_gemm.model import KVCache

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def example(monkeypatch, capsys):
    """Runs an example with arguments, as a command would, and returns (what it printed, its messages)."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def run(name: str, *arguments) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        assert ended.value.code == 0
        return tuple(capsys.readouterr())

    return run


def test_every_example_is_tested():
    here = Path(__file__).read_text()
    elsewhere = {"demo.py", "smollm2.py"}  # what make demo runs; a module, tested as such
    assert all(f'"{path.name}"' in here for path in EXAMPLES.glob("*.py") if path.name not in elsewhere)


def test_generate(example, tmp_path):
    write_hf(tmp_path / "m")
    out, messages = example("generate.py", tmp_path / "m", "--tokens", 6)
    assert out.startswith("> Why is the sky blue?\n") and out.count("> ") >= 4
    assert "tokens/s each on cpu, torch.bfloat16" in messages


def test_torch_compile(example):
    out, _ = example("torch_compile.py", "--hidden", 128, "--rows", 3)
    assert out.startswith("one graph on cpu, mode 'default': (3, 128), relative difference from eager ")


@pytest.mark.parametrize("kind", ["hugging-face", "gguf"])
def test_quantize_checkpoint(example, tmp_path, kind):
    if kind == "gguf":
        pytest.importorskip("gguf", reason="needs gguf: pip install 'tiny-gemm[gguf]'")
        write_gguf(model := tmp_path / "m.gguf")
    else:
        write_hf(model := tmp_path / "m")
    out, _ = example("quantize_checkpoint.py", model, tmp_path / "packed", "--group-size", 32)
    quantized, already = (0, 14) if kind == "gguf" else (14, 0)
    assert out.startswith(f"{quantized} tensors quantized, {already} had 4 bits already: ")
    assert "read back on cpu: The capital of France is" in out
    assert json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["group_size"] == 32


def test_profile_before_after(example, tmp_path):
    for package in ("gguf", "transformers", "matplotlib", "tensorboard"):
        pytest.importorskip(package, reason=f"needs {package}: pip install 'tiny-gemm[bench,profile]'")
    write_gguf(tmp_path / "m.gguf", hidden=128, ffn=128)
    arguments = (tmp_path / "m.gguf", tmp_path / "out", "--steps", 3, "--context", 16)
    out, _ = example("profile_before_after.py", *arguments)
    assert "transformers -> tiny-gemm" in out
    assert {"transformers_step.json.gz", "tiny-gemm_step.json.gz"} <= {f.name for f in (tmp_path / "out").iterdir()}


def test_smollm2_as_a_directory(tmp_path, monkeypatch):
    """A GGUF written as a Hugging Face directory computes the same; a tiny one stands for SmolLM2."""
    for package in ("gguf", "transformers"):
        pytest.importorskip(package, reason=f"needs {package}: pip install 'tiny-gemm[gguf,hf]'")
    write_gguf(tmp_path / "m.gguf", types="Q8_0")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import smollm2

    monkeypatch.setattr(smollm2, "find_smollm2", lambda: tmp_path / "m.gguf")
    smollm2.write_directory(tmp_path / "m")
    logits = []
    for path in (tmp_path / "m.gguf", tmp_path / "m"):
        model, tokenizer = checkpoint.load(path, dtype=torch.float32)
        assert 2 in tokenizer.eos_ids
        cache = KVCache.allocate(model.config, 1, 8, "cpu", model.dtype)
        logits.append(model.prefill(torch.tensor([[5, 40, 41, 7]]), torch.tensor([4], dtype=torch.int32), cache))
    assert (logits[0] - logits[1]).norm() < 0.02 * logits[0].norm()  # the directory is in bfloat16


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A random model that transformers wrote, whose greedy answers are ASCII characters."""
    pytest.importorskip("transformers", reason="needs transformers: pip install 'tiny-gemm[hf]'")
    path = tmp_path_factory.mktemp("examples") / "m"
    model = write_transformers(path)
    tokens, _, _ = gpt2_vocabulary()
    printable = {token for byte, token in enumerate(byte_alphabet()) if 32 <= byte < 127}
    with torch.no_grad():  # half of the others' logits are positive, so that these are never the largest
        model.lm_head.weight[[i for i, token in enumerate(tokens) if token not in printable]] = 0
    model.to(torch.bfloat16).save_pretrained(path)
    return path


def test_transformers_generate(example, directory, tmp_path):
    import transformers

    arguments = ("--group-size", 32, "--tokens", 12, "--save", tmp_path / "saved")
    out, messages = example("transformers_generate.py", directory, *arguments)
    assert out.startswith("The capital of France is") and "MB of weights on cpu, tiny_gemm attention" in messages
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="tiny_gemm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    ids = again.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
    assert out.strip() == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert len(ids[-12:].unique()) > 3


class Server:
    """examples/serve.py in a process of its own, on a free port of this machine; stopped by Ctrl-C at the end."""

    def __init__(self, model: Path, *options: str):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        command = [sys.executable, EXAMPLES / "serve.py", model, "--host", "127.0.0.1", "--port", str(self.port)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [*command, *options], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def __enter__(self) -> "Server":
        deadline = time.monotonic() + 90
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return self
            except OSError:
                time.sleep(0.1)
        self.process.kill()
        pytest.fail(f"the server does not answer; it said:\n{self.process.communicate()[0]}")

    def __exit__(self, *_) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.said = self.process.communicate(timeout=30)[0]
        finally:
            self.process.kill()


def test_serve(directory):
    for package in ("fastapi", "uvicorn", "openai"):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install 'tiny-gemm[serve]'")
    import openai
    import transformers

    import tiny_gemm.integrations.transformers as tg

    messages = [{"role": "user", "content": "What is gravity?"}]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="tiny_gemm",
        quantization_config=tg.TinyGemmConfig(group_size=32),
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    length = prompt["input_ids"].shape[1]
    ids = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, length:]
    want = tokenizer.decode(ids, skip_special_tokens=True)
    assert len(set(want)) > 3 and want.isascii()

    with Server(directory, "--group-size", "32", "--dtype", "float32") as server:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0, timeout=60)
        request = {"model": str(directory), "messages": messages, "temperature": 0, "max_tokens": 16}
        answer = client.chat.completions.create(**request)
        assert answer.choices[0].message.content == want
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (length, 16)
        chunks = [c.choices[0] for c in client.chat.completions.create(**request, stream=True) if c.choices]
        pieces = [c.delta.content for c in chunks if c.delta.content]
        assert "".join(pieces) == want and len(pieces) > 3
        assert chunks[-1].finish_reason == "length"
    assert server.process.returncode == 0, server.said
    assert "MB of weights on cpu, tiny_gemm attention" in server.said and "Traceback" not in server.said
