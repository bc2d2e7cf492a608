"""The house itself: which file may import which, what may be imported at all, and how long a file may be."""
import ast
import graphlib
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jaxllm"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 300
# From the top down. A file imports from its own row and from those below, never from above, and never in a circle.
# "" is the package's own __init__: the public names, which only the command line takes from there.
ROWS = [
    {"__main__"}, {"cli"}, {"tpu"}, {"info"}, {""}, {"train"}, {"evaluate", "calibrate", "documents", "usage_count"},
    {"generate"}, {"lora"}, {"checkpoint"}, {"model"}, {"mtp"}, {"attention", "moe", "mlp"}, {"dispatch"},
    {"experts_offloaded"}, {"self_attention", "splash", "cache", "rope", "norm", "experts", "experts_in_turns"},
    {"linear", "gathered", "kernels", "offloaded", "usage"}, {"axes", "quant"},
    {"paths", "config", "config_check", "config_hub", "codec", "encode"},
]
NEVER = {"torch", "transformers", "safetensors"}        # only tests and tools may lean on them
DISTRIBUTIONS = {"orbax-checkpoint": "orbax"}           # where the import has another name than the distribution


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


def imports(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Dotted names of what the source imports, wherever in it; of `from a import b` a.b if that is a module of ours."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = module.split(".")[:len(module.split(".")) - node.level + is_package] if node.level else []
            base = ".".join(up + ([node.module] if node.module else []))
            yield from (f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names)


def row(module: str) -> int:
    """Place in ROWS of a module of ours, by the first name after jaxllm."""
    part = (module + ".").split(".")[1]
    found = [i for i, names in enumerate(ROWS) if part in names]
    assert found, f"{module}: new here; give it a place in ROWS"
    return found[0]


def declared() -> set[str]:
    """Import names of what pyproject.toml says that jaxllm depends on."""
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    names = (requirement.split(">")[0].split("=")[0].split("[")[0].strip() for requirement in requirements)
    return {DISTRIBUTIONS.get(name, name) for name in names}


def faults(source: str, module: str, is_package: bool = False) -> list[str]:
    """What this source may not import as that module."""
    found = []
    for name in imports(source, module, is_package):
        top = name.split(".")[0]
        if top == "jaxllm":
            if row(name) < row(module):
                found.append(f"{module} imports {name}, which stands above it")
        elif top in NEVER:
            found.append(f"{module} imports {name}, which the package must do without")
        elif top not in declared() | sys.stdlib_module_names:
            found.append(f"{module} imports {name}, which pyproject.toml does not list")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports(module):
    file = MODULES[module]
    assert faults(file.read_text(), module, file.name == "__init__.py") == []


def test_no_circles():
    """Files of one row may lean on each other, in one direction. A package's __init__ only gathers names."""
    graph = {module: set(imports(file.read_text(), module)) & set(MODULES) - {module}
             for module, file in MODULES.items() if file.name != "__init__.py"}
    graphlib.TopologicalSorter(graph).prepare()        # CycleError names the circle


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(ROOT)) for file in FILES])
def test_length(file):
    num = len(file.read_text().splitlines())
    assert num <= MAX_LINES, f"{file.name} has {num} lines; a file holds one idea, in at most {MAX_LINES}"


def test_public_names_exist():
    import jaxllm
    assert sorted(jaxllm.__all__) == jaxllm.__all__, "jaxllm.__all__ is kept in order"
    for name in jaxllm.__all__:
        getattr(jaxllm, name)


@pytest.mark.parametrize(("module", "source", "complaint"), [
    ("jaxllm.cache", "from jaxllm.model import Transformer", "above"),
    ("jaxllm.cache", "import jaxllm.model", "above"),
    ("jaxllm.rope", "from jaxllm import attention", "above"),
    ("jaxllm.axes", "def f():\n    from jaxllm.linear import param", "above"),
    ("jaxllm.model", "from .generate.step import prefill", "above"),
    ("jaxllm.checkpoint.load", "from ..generate import step", "above"),
    ("jaxllm.generate.step", "from jaxllm import load", "above"),
    ("jaxllm.model", "import torch.nn as nn", "without"),
    ("jaxllm.checkpoint.hub", "def f():\n    from safetensors.numpy import load_file", "without"),
    ("jaxllm.generate.text", "from transformers import AutoTokenizer", "without"),
    ("jaxllm.model", "import scipy", "pyproject"),
])
def test_bad_imports_are_found(module, source, complaint):
    assert len(found := faults(source, module)) == 1 and complaint in found[0]


@pytest.mark.parametrize(("module", "source"), [
    ("jaxllm.cli", "import jaxllm\nfrom jaxllm import load"),
    ("jaxllm.generate.step", "from jaxllm.model import Transformer\nfrom jaxllm.cache import Cache"),
    ("jaxllm.config", "import jax, os\nfrom jaxllm.config_hub import fold\nfrom orbax import checkpoint"),
    ("jaxllm.checkpoint.load", "from . import store\nfrom .store import PARAMS"),
])
def test_good_imports_are_not(module, source):
    assert faults(source, module) == []


def test_a_module_without_a_place_is_found():
    with pytest.raises(AssertionError, match="jaxllm.helpers.*ROWS"):
        row("jaxllm.helpers.misc")
