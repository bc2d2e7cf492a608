"""Strict JAX modes and eight emulated devices, for every test."""
import gc
import os
import tempfile

# Most of the time goes into LLVM's optimisation of programs that run once; XLA's own is as ever. What the caller sets
# comes last and counts: XLA_FLAGS=--xla_backend_optimization_level=3 make test
os.environ["XLA_FLAGS"] = " ".join(["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0",
                                    os.environ.get("XLA_FLAGS", "")])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAXLLM_COMPILE_CACHE"] = "off"       # nothing of a run depends on the one before,
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:      # but its processes have what one of them has compiled
    CACHE = tempfile.TemporaryDirectory()
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": CACHE.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}

import jax  # noqa: E402  (the flags above must be set before JAX starts)
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Each compiled program holds memory mappings, of which Linux lets a process have 65530; the suite needs more."""
    yield
    jax.clear_caches()
    gc.collect()
