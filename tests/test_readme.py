"""What README and pyproject.toml say is true: examples print what they show, commands run, files are in place."""
import contextlib
import fnmatch
import io
import re
import subprocess
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

from jaxllm.axes import make_abstract_mesh
from jaxllm.cli import main, make_parser

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Makes bash hand over the arguments of every jaxllm command as it parses them, also of those that another one starts.
BASH = r"""
jaxllm() { printf '%s\0' "$@" $'\n'; }
srun() { while [[ $1 == -* ]]; do shift; done; "$@"; }
gcloud() { for a in "$@"; do [[ $a == --command=* ]] && eval "${a#--command=}"; done; }
"""


class Block(NamedTuple):
    """A fenced block, and the text block right after it (None if there is none): what it prints."""
    language: str
    body: str
    prints: str | None


def blocks(text):
    fenced = list(re.finditer(r"^```(\w*)\n(.*?)^```\n", text, re.M | re.S))
    assert text.count("```") == 2 * len(fenced)
    following = {fence.start(): fence for fence in fenced}
    for fence in fenced:
        after = following.get(fence.end())
        yield Block(fence[1], fence[2], after[2] if after and after[1] == "text" else None)


BLOCKS = list(blocks(TEXT))


def commands(body):
    """The argument lists of the jaxllm commands in a block."""
    done = subprocess.run(["bash", "-euc", BASH + body], capture_output=True, text=True, check=True)
    return [line.split("\0") for line in done.stdout.split("\0\n\0")[:-1]]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder to run in, with the configs of this repository and nothing else."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXLLM_COMPILE_CACHE", "off")


def lines(text):
    return [line.rstrip() for line in text.rstrip().split("\n")]


def test_every_block_is_of_a_kind_that_is_tested():
    kinds = [block.language for block in BLOCKS]
    assert set(kinds) == {"python", "sh", "text", ""} and kinds.count("python") >= 3 and kinds.count("sh") >= 2
    assert kinds.count("text") == sum(block.prints is not None for block in BLOCKS) >= 2


def test_python_examples(checkout):
    """One after the other, as a reader would type them."""
    names = {}
    for block in (block for block in BLOCKS if block.language == "python"):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block.body, "README.md", "exec"), names)
        if block.prints is not None:
            assert lines(printed.getvalue()) == lines(block.prints)
    # the steps alone write what the sugar writes
    sugar = names["model"].generate(["要保存文档,", "To save a document,"], max_new_tokens=8)
    assert [list(row) for row in zip(*names["written"], strict=True)] == [result.tokens for result in sugar]


def test_commands(checkout, capsys):
    verbs = []
    for block in (block for block in BLOCKS if block.language == "sh"):
        for arguments in commands(block.body):
            verbs.append(arguments[0])
            assert main(arguments) == 0, capsys.readouterr().err
            printed = capsys.readouterr().out
            assert printed.strip()
        if block.prints is not None:
            assert lines(printed) == lines(block.prints)
    assert set(verbs) == {"convert", "verify", "export", "generate", "eval", "usage", "info", "train", "tokenizer",
                          "plan"}


def test_commands_that_are_for_other_machines():
    """They parse, and the meshes of several hosts have the devices that the README speaks of."""
    found = [arguments for block in BLOCKS if block.language == "" and "make" not in block.body
             for arguments in commands(block.body)]
    parsed = [args for args in map(make_parser().parse_args, found) if hasattr(args, "mesh")]
    assert len(found) - len(parsed) == 5 and all(args.distributed for args in parsed)
    assert [make_abstract_mesh(args.mesh).size for args in parsed] == [64, 2 * 8]


def test_make_targets():
    named = set(re.findall(r"(?:^|`)make (\w+)", TEXT, re.M))
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert named == {"demo", "test", "bench"} <= targets


def test_file_map():
    rows = re.findall(r"^\| (`.+?) \|", TEXT[TEXT.index("## What is where"):], re.M)
    named = [name for row in rows for name in re.findall(r"`(.+?)`", row)]
    assert len(named) == len(set(named))
    assert [name for name in named if not (ROOT / name).exists()] == []
    modules = {str(file.relative_to(ROOT)) for file in (ROOT / "jaxllm").rglob("*.py")}
    assert {name for name in named if name.endswith(".py")} == modules


def test_a_wheel_holds_every_file():
    """Files that are no modules come along only if pyproject.toml names them."""
    data = PROJECT["tool"]["setuptools"]["package-data"]
    others = [file for file in (ROOT / "jaxllm").rglob("*")
              if file.is_file() and file.suffix != ".py" and "__pycache__" not in file.parts]
    assert others
    for file in others:
        package = ".".join(file.parent.relative_to(ROOT).parts)
        assert any(fnmatch.fnmatch(file.name, pattern) for pattern in data.get(package, [])), file
    for folder in {file.parent for file in (ROOT / "jaxllm").rglob("*.py")}:
        assert (folder / "__init__.py").exists(), f"setuptools does not find the package {folder}"


def test_every_dependency_is_used():
    """That none is missing is for test_architecture.py."""
    source = "".join(file.read_text() for file in (ROOT / "jaxllm").rglob("*.py"))
    for requirement in PROJECT["project"]["dependencies"]:
        name = re.split("[>=]", requirement)[0].replace("orbax-checkpoint", "orbax").strip()
        assert re.search(rf"^ *(import|from) {name}\b", source, re.M), f"{requirement} is not imported anywhere"


@pytest.mark.parametrize("body", ["jaxllm a 'b c' $'d\\ne' # f", "X=1 jaxllm a 'b c' $'d\\ne'",
                                  "srun --n=1 jaxllm a 'b c' $'d\\ne'",
                                  "gcloud x --command='jaxllm a \"b c\" '\"$'d\\ne'\""])
def test_commands_are_parsed_as_bash_does(body):
    assert commands(body) == [["a", "b c", "d\ne"]]
