"""THE table: which rows of which hub tensors make which of our parameters, both ways.

Hub names are those of MODEL.md 3.4, 4.1 and 4.4; our paths are the attributes of the modules. The generators below
spell out every pair; `Table` joins them, packs what is stored packed, and shows it from either side.
Letters: D model, N query heads, K kv heads, H q/k head, V v head, F dense hidden, E experts, I expert hidden,
W vocabulary, C = 2D the joined halves of an MTP block's input.
"""
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from jaxllm.checkpoint.entry import Entry, ReadParam, Rows
from jaxllm.checkpoint.kinds import Kind
from jaxllm.checkpoint.readings import count_ranks, row_labels
from jaxllm.checkpoint.scales import Scale, codes_entry, scale_leaf
from jaxllm.config import Config, LayerSpec

TOWERS = ("visual.", "audio_encoder.", "speech_embeddings.", "audio_tokenizer.")    # omni parts, not the text model
BUFFERS = re.compile(r"rotary_emb\.inv_freq$")      # computed from the config, stored by some exporters
MTP_NAME = re.compile(r"model\.mtp\.layers\.(\d+)\.")


def vector(path: str, tensor: str, size: int) -> Entry:
    return Entry(path, (size,), (), ((Rows(tensor, 0, size),),), transposed=False)


def matrix(path: str, tensor: str, out_dims: tuple[int, ...], in_dims: tuple[int, ...]) -> Entry:
    return Entry(path, out_dims, in_dims, ((Rows(tensor, 0, math.prod(out_dims)),),))


def table(path: str, tensor: str, rows: int, width: int) -> Entry:
    return Entry(path, (rows,), (width,), ((Rows(tensor, 0, rows),),), transposed=False)


def stack(path: str, tensors: str, count: int, out: int, width: int) -> Entry:
    """`count` matrices, the number of each in the place of {} in `tensors`."""
    matrices = tuple((Rows(tensors.format(e), 0, out),) for e in range(count))
    return Entry(path, (out,), (width,), matrices, stacked=True)


def dense(path: str, tensor: str, D: int, F: int) -> Iterator[Entry]:
    yield matrix(f"{path}.gate_DF", f"{tensor}.gate_proj.weight", (F,), (D,))
    yield matrix(f"{path}.up_DF", f"{tensor}.up_proj.weight", (F,), (D,))
    yield matrix(f"{path}.down_FD", f"{tensor}.down_proj.weight", (D,), (F,))


def moe(path: str, tensor: str, config: Config) -> Iterator[Entry]:
    D, E, I = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size    # noqa: E741
    assert E is not None and I is not None, "a config with MoE layers states both"
    yield matrix(f"{path}.router_DE", f"{tensor}.gate.weight", (E,), (D,))
    yield vector(f"{path}.bias_E", f"{tensor}.gate.e_score_correction_bias", E)
    yield stack(f"{path}.gate_EDI", f"{tensor}.experts.{{}}.gate_proj.weight", E, I, D)
    yield stack(f"{path}.up_EDI", f"{tensor}.experts.{{}}.up_proj.weight", E, I, D)
    yield stack(f"{path}.down_EID", f"{tensor}.experts.{{}}.down_proj.weight", E, D, I)


def attention(path: str, tensor: str, config: Config, spec: LayerSpec, reading: str | None) -> Iterator[Entry]:
    D, N, K, H, V = config.hidden_size, spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.v_head_dim
    heads = {"q_DNH": (N, H), "k_DKH": (K, H), "v_DKV": (K, V)}
    if config.attention_projection_layout == "fused_qkv":
        yield from fused(path, f"{tensor}.qkv_proj.weight", D, heads, count_ranks(reading, config))
    else:
        for ours, hub in zip(heads, ("q_proj", "k_proj", "v_proj"), strict=True):
            yield matrix(f"{path}.{ours}", f"{tensor}.{hub}.weight", heads[ours], (D,))
    yield matrix(f"{path}.o_NVD", f"{tensor}.o_proj.weight", (D,), (N, V))
    if spec.has_sinks:
        yield vector(f"{path}.sink_N", f"{tensor}.attention_sink_bias", N)


def fused(path: str, tensor: str, D: int, heads: dict[str, tuple[int, int]], chunks: int) -> Iterator[Entry]:
    """q, k and v out of qkv_proj: `chunks` times [Q heads | K heads | V heads], in natural head order.

    A chunk is what one tensor-parallel rank of the training run held; every layer has as many (MODEL.md 4.4).
    """
    assert all(count % chunks == 0 for count, _ in heads.values())      # `readings` refuses others
    sizes = [count // chunks * width for count, width in heads.values()]
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    for (ours, dims), size, start in zip(heads.items(), sizes, starts, strict=True):
        runs = tuple(Rows(tensor, chunk * sum(sizes) + start, size) for chunk in range(chunks))
        yield Entry(f"{path}.{ours}", dims, (D,), (runs,))


def layer(i: int, config: Config, reading: str | None) -> Iterator[Entry]:
    path, tensor, spec = f"layers.{i}", f"model.layers.{i}", config.layers[i]
    yield vector(f"{path}.attention_norm.scale_D", f"{tensor}.input_layernorm.weight", config.hidden_size)
    yield from attention(f"{path}.attention", f"{tensor}.self_attn", config, spec, reading)
    yield vector(f"{path}.mlp_norm.scale_D", f"{tensor}.post_attention_layernorm.weight", config.hidden_size)
    if spec.is_moe:
        yield from moe(f"{path}.moe", f"{tensor}.mlp", config)
    else:
        yield from dense(f"{path}.mlp", f"{tensor}.mlp", config.hidden_size, config.intermediate_size)


def mtp_block(k: int, config: Config, reading: str | None) -> Iterator[Entry]:
    path, tensor, D = f"mtp.{k}", f"model.mtp.layers.{k}", config.hidden_size
    yield vector(f"{path}.embed_norm.scale_D", f"{tensor}.enorm.weight", D)
    yield vector(f"{path}.hidden_norm.scale_D", f"{tensor}.hnorm.weight", D)
    yield matrix(f"{path}.join_CD", f"{tensor}.eh_proj.weight", (D,), (2 * D,))
    yield vector(f"{path}.attention_norm.scale_D", f"{tensor}.input_layernorm.weight", D)
    yield from attention(f"{path}.attention", f"{tensor}.self_attn", config, config.mtp_layer, reading)
    yield vector(f"{path}.mlp_norm.scale_D", f"{tensor}.pre_mlp_layernorm.weight", D)
    yield from dense(f"{path}.mlp", f"{tensor}.mlp", D, config.intermediate_size)
    yield vector(f"{path}.norm.scale_D", f"{tensor}.final_layernorm.weight", D)


def model(config: Config, num_mtp: int, reading: str | None = None) -> Iterator[Entry]:
    """Every parameter of the model and of `num_mtp` MTP blocks, as if none were packed. `reading`: see readings.py."""
    W, D = config.vocab_size, config.hidden_size
    yield table("embed_WD", "model.embed_tokens.weight", W, D)
    for i in range(config.num_hidden_layers):
        yield from layer(i, config, reading)
    yield vector("norm.scale_D", "model.norm.weight", D)
    if not config.tie_word_embeddings:
        yield matrix("head_DW", "lm_head.weight", (W,), (D,))
    for k in range(num_mtp):
        yield from mtp_block(k, config, reading)


def leaves_of(config: Config, num_mtp: int, kinds: Mapping[str, Kind], reading: str | None
              ) -> tuple[dict[str, Entry | Scale], dict[str, np.dtype]]:
    """Every leaf by path, and of those that are packed the dtype of each hub tensor."""
    parameters = list(model(config, num_mtp, reading))
    labels = {kind.block[0]: row_labels(config, num_mtp, reading, kind.block[0], {
        tensor for entry in parameters if kinds.get(entry.path) == kind for tensor in entry.tensors})
        for kind in set(kinds.values()) if kind.name == "fp8"}
    entries: dict[str, Entry | Scale] = {}
    dtypes: dict[str, np.dtype] = {}
    for entry in parameters:
        kind = kinds.get(entry.path)
        leaves = (entry,) if kind is None else (
            codes_entry(entry, kind), scale_leaf(entry, kind, labels.get(kind.block[0], {})))
        entries |= {leaf.path: leaf for leaf in leaves}
        if kind is not None:
            for leaf, dtype in zip(leaves, (kind.codes, kind.scale), strict=True):
                dtypes |= dict.fromkeys(leaf.tensors, dtype)
    return entries, dtypes


@dataclass(frozen=True)
class Use:
    """Rows [start, start + rows.count) of matrix `number` of `entry` are the hub rows `rows`."""
    entry: Entry
    number: int
    start: int
    rows: Rows


class Table:
    """All leaves of a model, by path and by hub tensor. Needs no files, so that an export can be planned by it too.

    `kinds`: how parameters are stored, those left out plainly; `reading`: how attention rows lie (readings.py).
    `entries`: leaf -> how it lies in the hub's tensors; `shapes`: hub tensor -> its shape; `dtypes`: hub tensor -> its
    dtype, for codes and scales alone; `uses`, `scale_uses`: hub tensor -> what is made of its rows, for all but fp8
    scales, and for those. Errors: CheckpointError for sizes that a kind cannot pack.
    """

    def __init__(self, config: Config, num_mtp: int = 0, kinds: Mapping[str, Kind] | None = None,
                 reading: str | None = None):
        self.entries, self.dtypes = leaves_of(config, num_mtp, kinds or {}, reading)
        self._index()

    def _index(self) -> None:
        """From leaves by path to their uses and shapes by hub tensor."""
        self.uses: dict[str, list[Use]] = {}
        self.scale_uses: dict[str, list[tuple[Scale, int]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for leaf in self.entries.values():
            if isinstance(leaf, Scale):
                for number, tensor, shape in leaf.parts():
                    self.scale_uses.setdefault(tensor, []).append((leaf, number))
                    self.shapes[tensor] = shape
            else:
                for number, runs in enumerate(leaf.matrices):
                    start = 0
                    for run in runs:
                        self.uses.setdefault(run.tensor, []).append(Use(leaf, number, start, run))
                        start += run.count
        self.shapes |= {tensor: self._shape(uses) for tensor, uses in self.uses.items()}

    @staticmethod
    def _shape(uses: list[Use]) -> tuple[int, ...]:
        uses.sort(key=lambda use: use.rows.start)
        end = 0
        for use in uses:      # each row is used once: what makes the table invertible
            assert use.rows.start == end, use
            end += use.rows.count
        in_dims = uses[0].entry.in_dims
        return (end, math.prod(in_dims)) if in_dims else (end,)

    def to_hub(self, tensor: str, read_leaf: ReadParam) -> np.ndarray:
        """The hub tensor, made again from our leaves; of a scale that stands in several places, from the first.

        Errors: CheckpointError where those places differ.
        """
        if tensor in self.uses:
            return np.concatenate([use.entry.write(read_leaf, use.number, range(use.start, use.start + use.rows.count))
                                   for use in self.uses[tensor]])
        out = np.empty(self.shapes[tensor], self.dtypes[tensor])
        is_filled = np.zeros(len(out), bool)
        for scale, number in self.scale_uses[tensor]:
            scale.fill(out, is_filled, tensor, read_leaf, number)
        return out


def count_mtp(names: Iterable[str]) -> int:
    """How many MTP blocks the tensor names speak of; config.json may not say (MODEL.md 1.1)."""
    return len({match[1] for name in names if (match := MTP_NAME.match(name))})


def left_out(names: Iterable[str]) -> dict[str, list[str]]:
    """The tensors that are not taken, by group: towers of omni models, and buffers that the config determines."""
    groups: dict[str, list[str]] = {}
    for name in names:
        tower = next((tower for tower in TOWERS if name.startswith(tower)), None)
        if tower or BUFFERS.search(name):
            groups.setdefault(tower.rstrip(".") if tower else "rotary_emb.inv_freq", []).append(name)
    return groups
