"""The persistent compilation cache: where it is, how it is moved or turned off, and that a second start uses it."""
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxllm.generate.compile_cache import use_compile_cache

SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
# One start of a program that generates, as a user would write it; told to count what JAX asks of the cache.
START = """
import json, sys
import jax
import jax.numpy as jnp
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event.rsplit("/", 1)[-1]))
jax.jit(lambda x: x + 1)(jnp.ones(3))      # something compiled before the cache is known
import jaxllm
tokens = jaxllm.load(sys.argv[1]).generate([[1, 2, 3]], max_new_tokens=5)[0].tokens
print(json.dumps({"tokens": tokens, "hits": events.count("cache_hits"), "misses": events.count("cache_misses")}))
"""


@pytest.fixture
def folder_used(monkeypatch, tmp_path):
    """A function: the folder that JAX is told under the given environment. JAX's settings are restored afterwards."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}

    def used(jax_folder=None, **environment):
        jax.config.update("jax_compilation_cache_dir", jax_folder)
        monkeypatch.setenv("HOME", str(tmp_path))
        for name in ("JAXLLM_COMPILE_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        use_compile_cache()
        return jax.config.jax_compilation_cache_dir
    yield used
    for name, value in before.items():
        jax.config.update(name, value)


def test_where_it_is(folder_used, tmp_path):
    assert folder_used() == str(tmp_path / ".cache" / "jaxllm")
    assert folder_used(XDG_CACHE_HOME="/elsewhere") == "/elsewhere/jaxllm"
    assert folder_used(XDG_CACHE_HOME="") == str(tmp_path / ".cache" / "jaxllm")          # as its standard says


def test_how_it_is_moved(folder_used, tmp_path):
    assert folder_used(JAXLLM_COMPILE_CACHE="/mine", XDG_CACHE_HOME="/elsewhere") == "/mine"
    assert folder_used(JAXLLM_COMPILE_CACHE="~/mine") == str(tmp_path / "mine")
    assert folder_used(JAXLLM_COMPILE_CACHE="") == str(tmp_path / ".cache" / "jaxllm")


def test_how_it_is_turned_off(folder_used):
    assert folder_used(JAXLLM_COMPILE_CACHE="off") is None


def test_jax_may_have_its_own(folder_used):
    for environment in ({}, {"JAXLLM_COMPILE_CACHE": "/mine"}, {"JAXLLM_COMPILE_CACHE": "off"}):
        assert folder_used("/of/jax", **environment) == "/of/jax"


def test_small_programs_are_kept_too(folder_used):
    folder_used()
    assert jax.config.jax_persistent_cache_min_compile_time_secs < 1                      # JAX's own choice


def start(model: Path, warnings: str = "error", **environment: str) -> tuple[dict[str, Any], str]:
    """What START printed, and what else went to stderr."""
    mine = {name: value for name, value in os.environ.items()
            if name not in ("JAXLLM_COMPILE_CACHE", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR")}
    run = subprocess.run([sys.executable, "-W", warnings, "-c", START, str(model)], env=mine | environment,
                         capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout), run.stderr


def test_a_second_start_compiles_nothing_that_the_first_kept(tiny_folder, tmp_path):
    """The two large programs take longer to compile than the cache's bound, by far: they are kept. One near the bound
    may be kept by the second start alone, so files may be added, never made again."""
    def files():
        return {file: file.stat().st_mtime_ns for file in (tmp_path / "jaxllm").rglob("*-cache")}
    first, _ = start(tiny_folder, XDG_CACHE_HOME=str(tmp_path))
    kept = files()
    assert first["hits"] == 0 and first["misses"] == len(kept)
    assert {"jit__prefill", "jit__advance"} <= {file.name.split("-")[0] for file in kept}
    second, _ = start(tiny_folder, XDG_CACHE_HOME=str(tmp_path))
    assert second["hits"] == len(kept) and second["tokens"] == first["tokens"]
    assert kept.items() <= files().items()


def test_turned_off_it_writes_nothing(tiny_folder, tmp_path):
    run, _ = start(tiny_folder, XDG_CACHE_HOME=str(tmp_path), HOME=str(tmp_path), JAXLLM_COMPILE_CACHE="off")
    assert run["hits"] == run["misses"] == 0 and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_stops_nobody(tiny_folder, tmp_path):
    """JAX warns once, and names it."""
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "cache"
    run, stderr = start(tiny_folder, warnings="default", JAXLLM_COMPILE_CACHE=str(folder))
    assert len(run["tokens"]) == 5 and stderr.count(str(folder)) == 1
