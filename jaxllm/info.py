"""What `jaxllm info` tells: a model's size, its layers, and what it takes on a mesh, all from its config.json.

The module tree is built abstractly on an abstract mesh, so the numbers are those of the arrays that `load` would make,
and 512 devices need not be there. Nothing is allocated and no weight is read.
"""
import itertools
import math
import os
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxllm.axes import make_abstract_mesh
from jaxllm.cache import TILE, cache_bytes, num_slots
from jaxllm.checkpoint import Source, open_source
from jaxllm.checkpoint.hub import INDEX
from jaxllm.checkpoint.load import refuse_incomplete
from jaxllm.checkpoint.stated import stated_params
from jaxllm.checkpoint.store import StoreSource, is_store
from jaxllm.checkpoint.trained import TrainedSource, is_run
from jaxllm.config import Config, LayerSpec
from jaxllm.gathered import stored
from jaxllm.generate.load import abstract_model, as_stored
from jaxllm.paths import parameters
from jaxllm.quant import Packed

LABEL = 14       # width of the left column
WIDTH = 116      # of a line
KINDS = (        # the first whose ending a parameter's path has
    ("embedding and head", ("embed_WD", "head_DW")),
    ("attention", ("q_DNH", "k_DKH", "v_DKV", "o_NVD")),
    ("dense MLPs", ("gate_DF", "up_DF", "down_FD")),
    ("experts", ("gate_EDI", "up_EDI", "down_EID")),
    ("routers", ("router_DE",)),
    ("norms, sinks, biases", ("",)),
)


def describe(path: str | os.PathLike[str], mesh: str | Mapping[str, int] | None = None) -> str:
    """Several lines about a hub folder, a converted one, or one that holds only a config.json, on `mesh`.

    Errors: ValueError (ConfigError, CheckpointError) naming the file, the key, or what cannot be split over the mesh.
    """
    folder = Path(path)
    refuse_incomplete(folder)
    config = Config.from_hub(folder)
    abstract_mesh = make_abstract_mesh(mesh)
    dtype = jnp.dtype(config.dtype)
    source = held_source(folder)
    params = source.params if source else stated_params(config)
    forms = {path: as_stored(path, stored(leaf), params)
             for path, leaf in parameters(abstract_model(config, abstract_mesh, dtype)).items()}
    arrays = parameters(forms)
    axes = ", ".join(f"{axis}={size}" for axis, size in abstract_mesh.shape.items())
    sections = {
        str(path): [f"{config.model_type}, {config.num_hidden_layers} layers, width {config.hidden_size}, vocabulary "
                    f"{config.vocab_size}, up to {config.max_position_embeddings} tokens"],
        "parameters": _parameters(config),
        "weights": textwrap.wrap(_weights(source, forms), WIDTH - LABEL),
        "layers": [*_layers(config), *_kinds_of_layers(config)],
        "mesh": [f"{axes}; cache and plain weights in {dtype}; routers, sinks and biases in float32"],
        "bytes": device_bytes(arrays),
        "cache": _cache(config, dtype.itemsize, abstract_mesh.shape),
    }
    return "\n".join(_section(label, lines) for label, lines in sections.items())


def device_bytes(arrays: Mapping[str, Any]) -> list[str]:
    """A table: bytes of each kind of parameter, in all and on each device.

    `arrays`: dotted path -> an array, or what describes one, with its sharding.
    """
    rows = {kind: [0, 0] for kind, _ in KINDS}
    for path, array in arrays.items():
        parameter = path.removesuffix(".codes").removesuffix(".scale")
        row = rows[kind_of(parameter)]
        row[0] += math.prod(array.shape) * array.dtype.itemsize
        row[1] += math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
    rows = {kind: row for kind, row in rows.items() if row[0]}
    rows["total"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    lines = [f"{'':22}{'in all':>22}{'each device':>22}"]
    return lines + [f"{kind:22}{whole:22,}{part:22,}" for kind, (whole, part) in rows.items()]


def kind_of(path: str) -> str:
    """Of KINDS, that of a parameter."""
    return next(kind for kind, endings in KINDS if path.endswith(endings))


def _section(label: str, lines: Iterable[str]) -> str:
    first, *others = lines
    head = f"{label:{LABEL}}{first}" if len(label) < LABEL else f"{label}\n{'':{LABEL}}{first}"
    return "\n".join([head, *(" " * LABEL + line for line in others)])


def _parameters(config: Config) -> list[str]:
    count = config.count_parameters()
    lines = [f"{'':22}{'matrices':>22}{'and vectors':>22}",
             f"{'total':22}{count.total:22,}{count.total + count.vectors:22,}",
             f"{'active for a token':22}{count.active:22,}{count.active + count.vectors:22,}"]
    if count.routers:
        lines[-1] += f"  leaves out the routers' {count.routers:,}"
    if config.num_nextn_predict_layers:
        lines.append(f"{'each MTP block':22}{count.mtp_block:22,}{'':22}  {config.num_nextn_predict_layers} stated, "
                     "not in the total")
    return lines


def held_source(folder: Path) -> Source | None:
    """What the folder holds beside its config.json. Errors: CheckpointError for weights that are not whole."""
    is_hub = any(folder.glob("*.safetensors")) or (folder / INDEX).exists()
    return open_source(folder) if is_hub or is_store(folder) or is_run(folder) else None


def _weights(source: Source | None, forms: Mapping[str, Any]) -> str:
    """What there is, and in which form each kind of parameter is kept on the device where that is packed."""
    kinds: dict[str, list[str]] = {}
    for path, form in forms.items():
        if isinstance(form, Packed):
            kinds.setdefault(form.kind, []).append(kind_of(path))
    packed = "".join(f"; {', '.join(dict.fromkeys(names))} in {kind}" for kind, names in kinds.items())
    if source is None:
        return f"none in this folder{packed}"
    dtypes = sorted({str(dtype) for _, dtype in source.params.values()})
    nbytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in source.params.values())
    kind = {StoreSource: "converted", TrainedSource: "of a training run"}.get(type(source), "hub layout")
    return (f"{kind}, {len(source.params)} arrays of "
            f"{' and '.join(dtypes)}, {nbytes:,} bytes{packed}")


def _layers(config: Config) -> list[str]:
    """Runs of equal layers, on lines: "0 full dense | 1-4 sliding moe | ..."."""
    runs = []
    for layer, group in itertools.groupby(range(config.num_hidden_layers), lambda i: config.layers[i]):
        first, *others = group
        number = f"{first}-{others[-1]}" if others else f"{first}"
        runs.append(f"{number} {_attention(layer)} {'moe' if layer.is_moe else 'dense'}")
    unbroken = " | ".join(run.replace(" ", "\xa0") for run in runs)      # a run stays on one line
    lines = textwrap.wrap(unbroken, WIDTH - LABEL, break_on_hyphens=False)
    return [line.replace("\xa0", " ") for line in lines]


def _attention(layer: LayerSpec) -> str:
    return "full" if layer.window is None else "sliding"


def _kinds_of_layers(config: Config) -> list[str]:
    """One line for each of full, sliding, dense and moe that the model has."""
    lines = {}
    for layer in config.layers:
        window = "" if layer.window is None else f", window {layer.window}"
        sinks = ", sinks" if layer.has_sinks else ""
        lines[_attention(layer)] = (f"{layer.num_heads} query and {layer.num_kv_heads} kv heads of {layer.head_dim}, "
                                    f"values of {layer.v_head_dim}{window}{sinks}")
        lines["moe" if layer.is_moe else "dense"] = (
            f"{config.n_routed_experts} experts of {config.moe_intermediate_size}, {config.num_experts_per_tok} a token"
            if layer.is_moe else f"hidden {config.intermediate_size}")
    return [f"{kind:8}{lines[kind]}" for kind in ("full", "sliding", "dense", "moe") if kind in lines]


def _cache(config: Config, itemsize: int, mesh: Mapping[str, int]) -> list[str]:
    """Bytes of one sequence's cache: so much for each token, and a part that does not grow."""
    windows = [layer.window for layer in config.layers if layer.window is not None]
    long = TILE * -(-max(windows, default=1) // TILE)      # from here on only the full layers grow, by whole tiles
    tensor, rows = mesh["tensor"], mesh["data"] * mesh["expert"]

    def size(tokens: int) -> int:
        return cache_bytes(config, 1, tokens, itemsize, tensor=tensor)

    a_token = (size(long + TILE) - size(long)) // TILE
    constant = size(long) - long * a_token
    whole = config.max_position_embeddings
    slots = {num_slots(layer, whole) for layer in config.layers if layer.window is not None}
    lines = [("each token", a_token, f"{len(config.layers) - len(windows)} full layers")]
    if windows:
        lines.append(("each sequence", constant, f"{len(windows)} sliding layers of {max(slots)} slots"))
    lines.append((f"at {whole:,} tokens", size(whole), ""))
    share = f"up to 1/{rows} of a batch" if rows > 1 else ""
    return [f"{'one sequence':22}{'in all':>22}{'each device':>22}  {share}".rstrip(),
            *(f"{name:22}{num:22,}{num // tensor:22,}  {note}".rstrip() for name, num, note in lines)]
