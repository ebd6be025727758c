"""Holds the directions of imports: which module may know which, and who may import what from outside."""

import ast
import graphlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tiny_gemm"

# What each module of ours may import of ours. A new module states its place here. A package counts as one module.
MAY_IMPORT: dict[str, set[str]] = {
    "quantize_utils": set(),
    "device": set(),
    "tokenizer": set(),
    "reference": {"quantize_utils", "device"},
    "launcher": {"device"},
    "triton_parts": {"device"},
    "triton_cluster": {"triton_parts", "device"},
    "int4_config": {"quantize_utils", "device"},
    "int4_unpack": set(),
    "gluon_decode": {"int4_unpack", "triton_parts", "triton_cluster"},
    "gluon_gemm": {"int4_unpack", "triton_parts"},
    "triton_gemm": {
        *("quantize_utils", "device", "launcher", "triton_parts", "triton_cluster", "int4_config", "int4_unpack"),
        *("gluon_decode", "gluon_gemm"),
    },
    "triton_fused_transformer": {
        *("quantize_utils", "device", "launcher", "triton_parts", "triton_cluster", "int4_config", "triton_gemm"),
    },
    "ops": {"quantize_utils", "device", "reference", "triton_gemm", "triton_fused_transformer"},
    "modules": {"quantize_utils", "ops"},
    "integrations": {"quantize_utils", "ops", "modules"},
    "model": {"quantize_utils", "device", "ops"},
    "packed_formats": {"quantize_utils"},
    "checkpoint": {"quantize_utils", "device", "ops", "model", "tokenizer", "packed_formats"},
    "generate": {"quantize_utils", "device", "ops", "model", "tokenizer"},
    "doctor": {"quantize_utils", "reference", "ops"},
    "profiling": {"device", "model", "generate"},
    "cli": {
        *("quantize_utils", "device", "reference", "ops", "model", "tokenizer", "checkpoint", "generate", "doctor"),
        "profiling",
    },
    "__init__": {"quantize_utils", "modules"},
    "__main__": {"cli"},
}
KERNELS = {
    *("launcher", "triton_parts", "triton_cluster", "int4_config", "int4_unpack", "gluon_decode"),
    *("gluon_gemm", "triton_gemm"),
    "triton_fused_transformer",
}
CORE_DEPENDENCIES = {"jinja2", "numpy", "rich", "safetensors", "tokenizers", "torch", "typer"}


@dataclass(frozen=True)
class Import:
    """One import statement: module `importer` (a file) of room `room` imports `name`; deferred: inside a function."""

    importer: Path
    room: str
    name: str
    line: int
    deferred: bool

    def __str__(self) -> str:
        return f"{self.importer.relative_to(ROOT)}:{self.line} imports {self.name}"

    @property
    def top(self) -> str:
        return self.name.split(".")[0]

    @property
    def target(self) -> str | None:
        """The room of ours that is imported, or None for what is not ours and for the package itself."""
        parts = self.name.split(".")
        return parts[1] if parts[0] == "tiny_gemm" and len(parts) > 1 and parts[1] in ROOMS else None


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> list[Import]:
    found = []

    def visit(node: ast.AST, deferred: bool) -> None:
        for child in ast.iter_child_nodes(node):
            inside = deferred or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
                continue
            names = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                module = child.module or ""
                if child.level:  # relative: resolve against the file's package
                    package = ("tiny_gemm", *path.relative_to(PACKAGE).parent.parts)
                    module = ".".join([*package[: len(package) - child.level + 1], *filter(None, [module])])
                # `from tiny_gemm import ops` names a module; `from tiny_gemm.ops import x` does so already
                names = [f"{module}.{alias.name}" if module == "tiny_gemm" else module for alias in child.names]
            found.extend(Import(path, _room(path), name, child.lineno, deferred) for name in dict.fromkeys(names))
            visit(child, inside)

    visit(ast.parse(path.read_text(encoding="utf-8")), deferred=False)
    return found


FILES = sorted(PACKAGE.rglob("*.py"))
ROOMS = {_room(path) for path in FILES}
IMPORTS = [i for path in FILES for i in _imports(path)]


def test_every_module_has_a_stated_place():
    assert ROOMS <= MAY_IMPORT.keys(), "say in MAY_IMPORT what the new module may import"


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_imports_point_one_way(room):
    wrong = [i for i in IMPORTS if i.room == room and i.target not in (None, "__init__", room, *MAY_IMPORT[room])]
    assert not wrong, "\n".join(map(str, wrong))


def test_no_import_cycles():
    """Among files, inside a package too; deferred imports count."""
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in FILES}
    names = {path: name for name, path in modules.items()}
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for i in IMPORTS:
        target = i.name if i.name in modules else i.name.rpartition(".")[0]
        if target in modules and target != names[i.importer]:
            graph[names[i.importer]].add(target)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_only_kernels_import_triton():
    wrong = [i for i in IMPORTS if i.top == "triton" and i.room not in KERNELS]
    assert not wrong, "\n".join(map(str, wrong))


def test_ops_reaches_kernels_only_inside_functions():
    wrong = [i for i in IMPORTS if i.target in KERNELS and i.room not in KERNELS and not i.deferred]
    assert not wrong, "\n".join(map(str, wrong))


def test_optional_packages_are_imported_inside_functions():
    allowed = CORE_DEPENDENCIES | {"tiny_gemm"} | set(sys.stdlib_module_names)
    wrong = [
        i
        for i in IMPORTS
        if not i.deferred
        and i.top not in allowed
        and not (i.top == "triton" and i.room in KERNELS)
        # integrations/<library>.py subclasses what its library has
        and not (i.room == "integrations" and i.top == i.importer.stem)
    ]
    assert not wrong, "\n".join(map(str, wrong))


def test_everything_but_the_kernels_imports_without_triton():
    modules = sorted(ROOMS - KERNELS - {"__init__"})
    code = f"""
import importlib, sys
sys.modules["triton"] = None  # makes `import triton` fail
import tiny_gemm
for name in {modules!r}:
    importlib.import_module(f"tiny_gemm.{{name}}")
"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_readme_tells_what_each_file_is_for():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [room for room in sorted(ROOMS - {"__init__"}) if room not in readme]
    assert not missing, f"README.md's tree lacks {missing}"
