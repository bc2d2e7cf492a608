"""Compiled programs kept on disk between runs (JAX's persistent compilation cache), in the user's cache folder."""
import os
from pathlib import Path

import jax

VARIABLE = "JAXLLM_COMPILE_CACHE"       # a folder, or "off"


def use_compile_cache() -> None:
    """Turns the cache on, unless JAXLLM_COMPILE_CACHE is "off" or JAX has been given a cache folder of its own."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "off" or jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(Path(wanted).expanduser() if wanted else base / "jaxllm"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)    # the smaller programs add up, too
