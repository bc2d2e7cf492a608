"""Checkpoints: hub layout read lazily, one table of names both ways, converting by streaming, loading by slices."""
from jaxllm.checkpoint.convert import Converted, convert
from jaxllm.checkpoint.errors import CheckpointError
from jaxllm.checkpoint.export import Exported, export
from jaxllm.checkpoint.load import load_arrays, open_source
from jaxllm.checkpoint.source import Source
from jaxllm.checkpoint.verify import Verified, verify

__all__ = ["CheckpointError", "Converted", "Exported", "Source", "Verified", "convert", "export", "load_arrays",
           "open_source", "verify"]
