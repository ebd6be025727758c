"""The documentation tells the truth: its Python runs, its commands and options exist, and the site builds.

A block marked ```python no-run needs a checkpoint or a GPU, or is part of a file, and is not run. The blocks of a page
run one after the other in one namespace, as a reader would type them.
"""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer.main

import benchmark_fused_transformer
from tiny_gemm import cli, ops

ROOT = Path(__file__).resolve().parent.parent
FILES = ["README.md", "CONTRIBUTING.md", "docker/README.md"]
FILES += sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md"))
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in FILES}
PYTHON = {name: re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE) for name, text in PAGES.items()}
COMMANDS = typer.main.get_command(cli.app).commands
SUB_OPS = {"add_rms_norm": "rms_norm", "add_layer_norm": "layer_norm"}  # torch ops that share a Python function


def options(command: str) -> set[str]:
    return {"-h", "--help"} | {o for p in COMMANDS[command].params for o in (*p.opts, *p.secondary_opts) if o[0] == "-"}


def shell_lines(text: str) -> list[list[str]]:
    """The words of each command in a page: its sh blocks, and code in a line that begins as a command does."""
    code = "\n".join(re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)).replace("\\\n", " ").splitlines()
    code += re.findall(r"`((?:tiny-gemm|make|python benchmark_fused_transformer.py) [^`\n]+)`", text)
    return [words for line in code if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", [name for name in FILES if PYTHON[name]])
def test_python_runs(page):
    namespace: dict = {}
    for code in PYTHON[page]:
        exec(compile(code, page, "exec"), namespace)


@pytest.mark.parametrize("page", FILES)
def test_commands_exist(page):
    for words in shell_lines(PAGES[page]):
        start = next((i for i, w in enumerate(words) if "=" not in w), 0)  # after assignments
        start = words.index("|") + 1 if "|" in words else start
        if words[start] == "tiny-gemm":
            arguments = words[start + 1 :]
            command = next((w for w in arguments if not w.startswith("-")), None)
            if command is None:
                assert set(arguments) <= {"--version", "--help", "--traceback"}, words
                continue
            given = {w for w in arguments[arguments.index(command) :] if re.fullmatch(r"--?[a-z][\w-]*", w)}
            assert command in COMMANDS and given <= options(command), f"{words}: {given - options(command)}"
        elif words[0] == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {w for w in words[1:] if "=" not in w} <= set(targets), words
        elif "benchmark_fused_transformer.py" in words:
            given = words[words.index("benchmark_fused_transformer.py") + 1 :]
            benchmark_fused_transformer.parse(given)  # leaves the process where it refuses


def test_the_guide_has_the_options_of_each_command():
    """An option in a section is one of that section's command; those of generate and quantize are all there."""
    for section in PAGES["docs/guide/cli.md"].split("\n## ")[1:]:
        command = section.split("\n")[0]
        if command in COMMANDS:
            named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", section))
            assert named <= options(command), f"{command}: {named - options(command)}"
            if command in ("generate", "quantize"):
                all_long = {o for o in options(command) if o.startswith("--")} - {"--help"}
                assert all_long <= named | {"--json"}, f"{command}: {all_long - named} is not told"


def test_every_op_has_a_reference():
    ops_pages = "".join(text for name, text in PAGES.items() if name.startswith("docs/ops/"))
    names = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    ours = {op for library, _, op in names if library == "tiny_gemm"}
    ours -= {"silu_mul"}  # docs/contributing/add-an-op.md adds it
    assert ours
    missing = [name for name in ours if f"\n::: {name} schema\n" not in ops_pages]
    missing += [name for name in ours if f"\n::: {SUB_OPS.get(name, name)}\n" not in ops_pages]
    assert not missing, f"docs/ops/ lacks {missing}"
    assert all(hasattr(ops, SUB_OPS.get(name, name)) for name in ours)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    if importlib.util.find_spec("material") is None:
        pytest.skip("the site is not built here: that needs mkdocs-material (pip install 'tiny-gemm[docs]')")
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(directory)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    # Not --quiet: what is not logged does not count, and strict mode lets it pass.
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return directory


def test_the_site_needs_no_network(site):
    pages = [p.read_text(encoding="utf-8") for p in site.rglob("*.html")]
    assert len(pages) > len([name for name in FILES if name.startswith("docs/")])
    fetched = r'<(?:script|img|iframe)[^>]+src="https?:[^"]*|<link[^>]+(?:stylesheet|icon|preconnect)[^>]+https?:[^"]*'
    assert not [found for page in pages for found in re.findall(fetched, page)]


def test_the_site_is_whole(site):
    text = re.sub(r"<[^>]+>", "", (site / "ops" / "int4-gemm.html").read_text(encoding="utf-8"))
    assert "def int4_gemm(x: Tensor, weight: Int4Weight" in text and "with the packed weight W [N, K]" in text
    assert "torch.ops.tiny_gemm.int4_gemm(Tensor x, Tensor packed" in text
    for page in site.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        assert "<p>::: " not in html and "<picture" not in html, f"{page} has a marker that was not filled in"
        light, dark = (re.findall(rf'src="([^"]*)-{mode}\.svg#only-{mode}"', html) for mode in ("light", "dark"))
        assert light == dark
