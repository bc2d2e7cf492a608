"""Strict JAX modes and eight emulated devices, for every test."""
import gc
import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAXLLM_COMPILE_CACHE"] = "off"       # nothing of a run depends on the one before

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
