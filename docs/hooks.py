"""What mkdocs does to the pages of docs/, which are written to read well on a code host too.

- `::: fused_ffn`, a line of its own, becomes the signature and docstring of tiny_gemm.ops.fused_ffn, and
  `::: fused_ffn schema` the schema of its torch op. Both are read from the source, which is not imported.
- PAGES are built from files outside docs/.
- Links to other files of the repository become their paths; a link to what is not there fails the build.
- A <picture> of a light and a dark figure becomes two images, of which the theme shows the one that fits;
  a click opens it by itself, which helps on a phone.
- A list may follow a paragraph without an empty line, and "python no-run" is Python.
"""

import ast
import html
import posixpath
import re
from functools import cache
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
OPS = ROOT / "tiny_gemm" / "ops.py"
PAGES = {  # file of the repository: page of the site
    "docker/README.md": "guide/container.md",
    "CONTRIBUTING.md": "contributing/index.md",
    "CHANGELOG.md": "changelog.md",
}

_FENCES = re.compile(r"^(```.*?^```[^\n]*$)", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)")
_LIST_AFTER_TEXT = re.compile(r"^(?![-*>|#\s]|\d+\. )(.+)\n(?=(?:-|\d+\.) )", re.MULTILINE)
_PICTURE = re.compile(
    r'<picture>\s*<source media="\(prefers-color-scheme: dark\)" srcset="([^"]+)">\s*'
    r'<img src="([^"]+)" alt="([^"]+)">\s*</picture>'
)
_ARGUMENT = re.compile(r"(?<!\n)\n(?!\n)(?=\w+(?:, \w+)*: |Returns |Raises )")
_MARKER = re.compile(r"^::: (\w+)( schema)?$", re.MULTILINE)


def on_files(files, config):
    for file, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / file)))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    source = Path(page.file.abs_src_path)
    parts = _FENCES.split(markdown)
    for i, part in enumerate(parts):
        if part.startswith("```"):
            parts[i] = part.replace("```python no-run", "```python", 1)
        else:
            part = _PICTURE.sub(r"[![\3](\2#only-light)](\2)[![\3](\1#only-dark)](\1)", part)
            part = _LIST_AFTER_TEXT.sub(r"\1\n\n", part)
            part = _LINK.sub(lambda link: _link(link, source, page.file.src_uri), part)
            parts[i] = _MARKER.sub(lambda m: _schema(m[1]) if m[2] else _reference(m[1]), part)
    return "".join(parts)


def _link(link: re.Match, source: Path, page: str) -> str:
    """`link` as it is where its target is a page or a file below docs/, the target's path where it is elsewhere."""
    text, target, anchor = link[1], link[2], link[3] or ""
    file = (source.parent / target).resolve()
    if not file.is_relative_to(ROOT) or not file.exists():
        return link[0]  # mkdocs refuses it
    path = file.relative_to(ROOT).as_posix()
    if path.startswith("docs/") or path in PAGES:
        uri = PAGES.get(path, path.removeprefix("docs/"))
        return f"[{text}]({posixpath.relpath(uri, posixpath.dirname(page) or '.')}{anchor})"
    return text if path in text.replace("`", "") else f"{text} (`{path}`)"


@cache
def _ops() -> tuple[str, dict[str, ast.FunctionDef], dict[str, str]]:
    """(source, public functions by name, schemas of the torch ops by name) of tiny_gemm/ops.py."""
    source = OPS.read_text(encoding="utf-8")
    tree = ast.parse(source)
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    schemas = {s.partition("(")[0]: s for s in strings if re.fullmatch(r"\w+\(Tensor .*\) -> [^\n]*", s)}
    return source, functions, schemas


def _reference(name: str) -> str:
    source, functions, _ = _ops()
    if name not in functions:
        raise PluginError(f"tiny_gemm/ops.py has no function {name}")
    node = functions[name]
    body = node.body[0].lineno - 1
    signature = "\n".join(source.splitlines()[node.lineno - 1 : body])
    docstring = _ARGUMENT.sub("<br>", html.escape(ast.get_docstring(node), quote=False))
    paragraphs = docstring.replace("\n\n", "</p><p>")
    return f"```python\n{signature}\n```\n\n<blockquote><p>{paragraphs}</p></blockquote>\n"


def _schema(name: str) -> str:
    schemas = _ops()[2]
    if name not in schemas:
        raise PluginError(f"tiny_gemm/ops.py registers no op {name}")
    return f"```text\ntorch.ops.tiny_gemm.{schemas[name]}\n```"
