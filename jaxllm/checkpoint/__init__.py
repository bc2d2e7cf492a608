"""Checkpoints: hub layout read lazily, one table of names both ways, converting by streaming, loading by slices."""
from jaxllm.checkpoint.convert import Converted, convert
from jaxllm.checkpoint.errors import CheckpointError
from jaxllm.checkpoint.load import load_arrays, open_source
from jaxllm.checkpoint.source import Source

__all__ = ["CheckpointError", "Converted", "Source", "convert", "load_arrays", "open_source"]
