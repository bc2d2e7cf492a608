"""Strict JAX modes and eight emulated devices, for every test."""
import gc
import os
import subprocess
import sys
import tempfile

# Most of the time goes into programs that run once: LLVM need not optimise them, nor XLA emit fusions by way of MLIR.
# What the caller sets comes last and counts: XLA_FLAGS=--xla_backend_optimization_level=3 make test
FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
WITHOUT_MLIR = "--xla_cpu_use_fusion_emitters=false"      # takes 40% off; a version of XLA may no longer have it


def is_known(flag: str) -> bool:
    """Whether XLA does not abort a process for it."""
    start = "import jaxlib.xla_client; jaxlib.xla_client.make_cpu_client()"
    return not subprocess.run([sys.executable, "-c", start], env=os.environ | {"XLA_FLAGS": flag},
                              capture_output=True).returncode


os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAXLLM_COMPILE_CACHE"] = "off"       # nothing of a run depends on the one before,
if "PYTEST_XDIST_WORKER" not in os.environ:      # but its processes have what one of them has compiled
    CACHE = tempfile.TemporaryDirectory()
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": CACHE.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
                   "XLA_FLAGS": " ".join([*FLAGS, *filter(is_known, [WITHOUT_MLIR]), os.environ.get("XLA_FLAGS", "")])}

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
