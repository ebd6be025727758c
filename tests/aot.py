"""Compiles Triton kernels for every target without a GPU and says what came out. Test-only; made for triton 3.6.

    compiled = aot.compile_kernel(_my_kernel, "sm_80", {"x_ptr": "*bf16", "N": "i32"}, {"BLOCK_N": 64}, num_warps=4)
    aot.check(compiled, tensor_cores=True, vector_loads=True)

Registers and SASS come from the cuobjdump and nvdisasm in Triton's own wheel, AMD's counts from the assembly.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tiny_gemm.device import DeviceFacts
from tiny_gemm.launcher import Launcher

KIB = 1024
SHARED_MEMORY_LIMIT = {  # bytes a block may use
    "sm_80": 163 * KIB,
    "sm_86": 99 * KIB,
    "sm_89": 99 * KIB,
    "sm_90": 227 * KIB,
    "sm_100": 227 * KIB,
    "sm_120": 99 * KIB,
    "gfx942": 64 * KIB,
}
TARGETS = tuple(SHARED_MEMORY_LIMIT)

_NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_SASS_PATTERNS = {  # of an opcode with its modifiers
    "LDG.128": r"LDG\.E(\.\w+)*\.128(\.\w+)*",
    "LDGSTS.128": r"LDGSTS\.E(\.\w+)*\.128(\.\w+)*",  # cp.async
    "LDG": r"LDG\..*",
    "LDGSTS": r"LDGSTS\..*",
    "UTMALDG": r"UTMALDG.*",  # bulk tensor copy
    "HMMA": r"HMMA\..*",  # mma.sync
    "HGMMA": r"HGMMA\..*",  # wgmma
    "UTCHMMA": r"UTC\w*MMA.*",  # tcgen05
    "LOP3": r"LOP3.*",
    "ATOM": r"(ATOMG?|ATOMS|REDG?)\..*",
    "LDSM": r"LDSM.*",
    "LDL": r"LDL.*",
    "STL": r"STL.*",
}
_AMD_PATTERNS = {
    "load_b128": r"(global|buffer)_load_(dwordx4|b128)",
    "mfma": r"v_mfma.*",
}
_TENSOR_CORE_INSTRUCTIONS = ("HMMA", "HGMMA", "UTCHMMA", "mfma")
_VECTOR_LOADS = ("LDG.128", "LDGSTS.128", "UTMALDG", "load_b128")


@dataclass(frozen=True)
class Compiled:
    """What one kernel became on one target; sizes in bytes, counts of instructions in the static code."""

    name: str
    target: str
    registers: int
    spills: int  # instructions on local memory (NVIDIA), registers spilled (AMD)
    shared_memory: int
    instructions: dict[str, int] = field(default_factory=dict)
    assembly: str = field(default="", repr=False)
    tensor_memory: int = 0  # columns, on sm_100
    static_shared_memory: int = 0  # beside what Triton plans, which is shared_memory

    def count(self, *names: str) -> int:
        """How many instructions of these kinds there are; the names are the keys of the pattern tables above."""
        return sum(self.instructions.get(name, 0) for name in names)


def device_facts(target: str) -> DeviceFacts:
    """What pick_config would be asked on a large chip of this target."""
    number = target.removeprefix("sm_")
    capability = (9, 4) if target.startswith("gfx") else (int(number[:-1]), int(number[-1]))
    return DeviceFacts(target, capability, 132, SHARED_MEMORY_LIMIT[target], not target.startswith("gfx"))


def compile_kernel(
    kernel: triton.JITFunction,
    target: str,
    signature: Mapping[str, str],
    constants: Mapping[str, object],
    *,
    unaligned: Iterable[str] = (),
    num_warps: int = 4,
    num_stages: int = 3,
    **options,
) -> Compiled:
    """Compiles `kernel` for `target` (one of TARGETS).

    `signature` gives the Triton type of every argument that is not in `constants`, which holds the constexprs (and
    arguments that are None or 1). Pointers and integers count as divisible by 16, as the launcher would find for usual
    shapes, but for those named in `unaligned`.
    """
    index = {name: i for i, name in enumerate(kernel.arg_names)}
    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    aligned = [n for n, t in types.items() if (t.startswith("*") or re.fullmatch(r"[iu]\d+", t)) and n not in unaligned]
    make_source = ASTSource
    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as make_source
    source = make_source(
        fn=kernel,
        signature=types,
        constexprs={(index[name],): value for name, value in constants.items()},
        attrs={(index[name],): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, **options}
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True  # tools that read the binary take half as long
        binary = triton.compile(source, target=_gpu_target(target), options=options)
    inspect = _inspect_amd if target.startswith("gfx") else _inspect_nvidia
    return Compiled(
        kernel.__name__,
        target,
        shared_memory=binary.metadata.shared,
        tensor_memory=getattr(binary.metadata, "tmem_size", 0),
        **inspect(binary),
    )


def compile_launch(
    launcher: Launcher,
    target: str,
    signature: Mapping[str, str | None],
    constants: Mapping[str, object] = MappingProxyType({}),
    **keywords,
) -> Compiled:
    """Compiles what `launcher` launches. Arguments that neither signature nor constants name are None."""
    signature = {name: type_ for name, type_ in signature.items() if type_ is not None}
    known = launcher.meta | constants
    constants = {name: known.get(name) for name in launcher.kernel.arg_names if name not in signature}
    options = {name: known[name] for name in ("num_warps", "maxnreg", "enable_fp_fusion") if name in known}
    return compile_kernel(launcher.kernel, target, signature, constants, **options, **keywords)


def check(compiled: Compiled, *, tensor_cores: bool = True, vector_loads: bool = True, may_spill: bool = False) -> None:
    """Asserts shared memory within the target's limit, no spills, tensor-core instructions and 128-bit loads."""
    # Triton asks the driver for more than 48 KiB only by what it has planned itself.
    limit = 48 * KIB if compiled.static_shared_memory else SHARED_MEMORY_LIMIT[compiled.target]
    shared = compiled.shared_memory + compiled.static_shared_memory
    assert shared <= limit, f"{compiled}: {shared} bytes of shared memory, more than {limit}"
    assert compiled.tensor_memory <= 512, f"{compiled}: more tensor memory than 512 columns"
    assert may_spill or compiled.spills == 0, f"{compiled}: registers spilled"
    assert not tensor_cores or compiled.count(*_TENSOR_CORE_INSTRUCTIONS), f"{compiled}: no tensor-core instruction"
    assert not vector_loads or compiled.count(*_VECTOR_LOADS), f"{compiled}: no 128-bit load"


def loops(sass: str) -> list[tuple[int, int]]:
    """Of each loop the numbers of its first line and of the jump back to it, in the order of the jumps."""
    lines = sass.splitlines()
    labels = {line.strip().rstrip(":"): i for i, line in enumerate(lines) if line.startswith(".L_")}
    jumps = ((labels[m[1]], i) for i, line in enumerate(lines) if (m := re.search(r" BRA `\((\.L_\w+)\)", line)))
    return [(begin, end) for begin, end in jumps if begin < end]


def _gpu_target(target: str) -> GPUTarget:
    if target.startswith("gfx"):
        return GPUTarget("hip", target, 64)
    return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)


@cache
def _tool(name: str) -> str:
    bundled = _NVIDIA_TOOLS / name
    return str(bundled) if bundled.exists() else name


def _run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout + result.stderr


def _inspect_nvidia(binary) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(binary.asm["cubin"])
        cubin.flush()
        usage = _run(_tool("cuobjdump"), "--dump-resource-usage", cubin.name)
        sass = _run(_tool("nvdisasm"), "--print-code", cubin.name)
    opcodes = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, re.MULTILINE)
    instructions = _count(_SASS_PATTERNS, opcodes)
    reserved = KIB if binary.metadata.target.arch >= 90 else 0  # by the system
    return {
        "static_shared_memory": int(re.search(r"SHARED:(\d+)", usage)[1]) - reserved,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": instructions.get("LDL", 0) + instructions.get("STL", 0),
        "instructions": instructions,
        "assembly": sass,
    }


def _inspect_amd(binary) -> dict:
    assembly = binary.asm["amdgcn"]
    return {
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1]),
        "spills": int(re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)[1]),
        "instructions": _count(_AMD_PATTERNS, re.findall(r"^\s+([a-z]\w*)", assembly, re.MULTILINE)),
        "assembly": assembly,
    }


def _count(patterns: dict[str, str], opcodes: list[str]) -> dict[str, int]:
    counts = {name: 0 for name in patterns}
    for opcode, n in Counter(opcodes).items():
        for name, pattern in patterns.items():
            if re.fullmatch(pattern, opcode):
                counts[name] += n
    return {name: n for name, n in counts.items() if n}
