"""jaxllm: MiMo-V2 in JAX, from a hub checkpoint to text on any device mesh."""
from jaxllm.axes import make_abstract_mesh, make_mesh
from jaxllm.cache import Cache, cache_bytes
from jaxllm.checkpoint import convert, export, verify
from jaxllm.config import Config, ConfigError
from jaxllm.generate.engine import Generation, Model
from jaxllm.generate.load import load
from jaxllm.generate.step import decode, init_cache, prefill
from jaxllm.model import Transformer

__all__ = ["Cache", "Config", "ConfigError", "Generation", "Model", "Transformer", "cache_bytes", "convert", "decode",
           "export", "init_cache", "load", "make_abstract_mesh", "make_mesh", "prefill", "verify"]
