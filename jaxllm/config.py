"""The model as its config.json states it: `Config` has the hub's keys, `LayerSpec` is what differs between layers.

Fields are named exactly as in the hub's files and hold resolved values: synonyms joined, absent keys filled in
(`config_hub.fold`), so no reader repeats a default. One key is ours, `sliding_window_counts_query`: whether the
`sliding_window` keys that a query sees include the query's own (true, the hub's reading) or come on top of it (false,
one key more). Letters: D hidden_size, N heads, K kv heads, H head_dim, V v_head_dim, F intermediate_size, E experts,
I moe_intermediate_size, W vocab_size.
"""
import copy
import dataclasses
import functools
import json
import os
import pathlib
from typing import Any

from jaxllm.config_check import ConfigError, check_field, check_together
from jaxllm.config_hub import as_json, fold, read_json

__all__ = ["Config", "ConfigError", "LayerSpec", "ParameterCount"]


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """Everything that differs between layers."""
    num_heads: int
    num_kv_heads: int
    head_dim: int              # of q and k
    v_head_dim: int
    rotary_dim: int            # the first so many of head_dim are rotated
    rope_theta: float
    window: int | None         # keys that a query sees, itself included; None = all before it
    has_sinks: bool
    is_moe: bool


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters of the text model. `total`, `active` and `mtp_block` count matrices only."""
    total: int        # embedding, head, attention, dense MLPs, routers, experts
    active: int       # what one token uses: as total, with num_experts_per_tok experts and without the routers
    routers: int      # within total, not in active
    vectors: int      # norms, sinks, correction biases: in neither total nor active
    mtp_block: int    # one MTP block, not in total


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A MiMo-V2 text model; what constructs is consistent. Hashable; `dataclasses.replace` checks again."""
    model_type: str
    hidden_size: int
    intermediate_size: int                      # dense layers and MTP blocks
    num_hidden_layers: int
    vocab_size: int
    max_position_embeddings: int
    layernorm_epsilon: float
    hybrid_layer_pattern: tuple[int, ...]       # one a layer: 0 full, 1 sliding attention
    moe_layer_freq: tuple[int, ...]             # one a layer: 0 dense, 1 mixture of experts
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    v_head_dim: int
    rope_theta: float
    swa_num_attention_heads: int
    swa_num_key_value_heads: int
    swa_head_dim: int
    swa_v_head_dim: int
    swa_rope_theta: float
    partial_rotary_factor: float = 1.0
    sliding_window: int | None = None           # None only when nothing slides
    sliding_window_counts_query: bool = True
    add_swa_attention_sink_bias: bool = False
    add_full_attention_sink_bias: bool = False
    attention_value_scale: float = 1.0
    attention_projection_layout: str = "split"
    n_routed_experts: int | None = None         # None: no experts at all
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    moe_router_dtype: str | None = None         # how router weights are stored; routing is float32 regardless
    num_nextn_predict_layers: int | None = None  # MTP blocks; None: not stated, the checkpoint's tensors tell
    tie_word_embeddings: bool = False
    dtype: str = "float32"                      # of the stored weights that are not packed
    eos_token_id: int | tuple[int, ...] | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    quantization_config: dict[str, Any] | None = dataclasses.field(default=None, hash=False)
    hub_json: str = dataclasses.field(default="", repr=False, compare=False)    # what was read, for `to_dict`

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, check_field(field, getattr(self, field.name)))
        check_together(self)

    @classmethod
    def from_hub(cls, path: str | os.PathLike[str]) -> "Config":
        """The config of a hub folder, or of a JSON file. ConfigError names the file, the key and what is accepted."""
        path = pathlib.Path(path)
        file = path / "config.json" if path.is_dir() or path.suffix != ".json" else path
        return cls.from_dict(read_json(file), source=str(file))

    @classmethod
    def from_dict(cls, hub: dict[str, Any], source: str = "config") -> "Config":
        """The config that a hub dict states; `source` names it in errors."""
        fields = [field for field in dataclasses.fields(cls) if field.name != "hub_json"]
        required = [field.name for field in fields if field.default is dataclasses.MISSING]
        try:
            hub = as_json(hub)
            return cls(**fold(hub, [field.name for field in fields], required), hub_json=json.dumps(hub))
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The hub dict that was read, ignored keys included; after a change, with every field spelled out in it."""
        hub = json.loads(self.hub_json) if self.hub_json else {}
        if hub and Config.from_dict(hub) == self:
            return hub
        for synonym in ("torch_dtype", "sliding_window_size"):
            hub.pop(synonym, None)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "hub_json":
                hub[field.name] = list(value) if isinstance(value, tuple) else value
                (hub.get("rope_parameters") or {}).pop(field.name, None)    # it would override the flat key
        return copy.deepcopy(hub)

    @functools.cached_property
    def layers(self) -> tuple[LayerSpec, ...]:
        return tuple(self._layer(sliding=bool(slides), is_moe=bool(moe))
                     for slides, moe in zip(self.hybrid_layer_pattern, self.moe_layer_freq, strict=True))

    @functools.cached_property
    def mtp_layer(self) -> LayerSpec:
        """The layer inside an MTP block: always sliding, always dense."""
        if self.sliding_window is None:
            raise ConfigError("config key 'sliding_window' is missing; MTP blocks slide")
        return self._layer(sliding=True, is_moe=False)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The stop ids of config.json; empty if it names none."""
        ids = () if self.eos_token_id is None else self.eos_token_id
        return ids if isinstance(ids, tuple) else (ids,)

    def _layer(self, *, sliding: bool, is_moe: bool) -> LayerSpec:
        swa = "swa_" if sliding else ""
        window = None if not sliding or self.sliding_window is None else \
            self.sliding_window + (not self.sliding_window_counts_query)
        head_dim = getattr(self, f"{swa}head_dim")
        return LayerSpec(
            num_heads=getattr(self, f"{swa}num_attention_heads"),
            num_kv_heads=getattr(self, f"{swa}num_key_value_heads"),
            head_dim=head_dim,
            v_head_dim=getattr(self, f"{swa}v_head_dim"),
            rotary_dim=int(head_dim * self.partial_rotary_factor),
            rope_theta=getattr(self, f"{swa}rope_theta"),
            window=window,
            has_sinks=self.add_swa_attention_sink_bias if sliding else self.add_full_attention_sink_bias,
            is_moe=is_moe,
        )

    def count_parameters(self) -> ParameterCount:
        """Parameters of the text model and of one MTP block, by arithmetic on the config."""
        D, E = self.hidden_size, self.n_routed_experts or 0
        A, expert = self.num_experts_per_tok or 0, 3 * D * (self.moe_intermediate_size or 0)
        dense = 3 * D * self.intermediate_size
        attention = sum(attention_matrices(D, layer) for layer in self.layers)
        num_moe = sum(self.moe_layer_freq)
        everywhere = (self.vocab_size * D * (1 if self.tie_word_embeddings else 2) + attention
                      + dense * (self.num_hidden_layers - num_moe))
        sinks = sum(layer.num_heads for layer in self.layers if layer.has_sinks)
        return ParameterCount(
            total=everywhere + num_moe * E * (expert + D),
            active=everywhere + num_moe * A * expert,
            routers=num_moe * E * D,
            vectors=D * (2 * self.num_hidden_layers + 1) + sinks + num_moe * E,
            mtp_block=2 * D * D + attention_matrices(D, self._layer(sliding=True, is_moe=False)) + dense,
        )


def attention_matrices(D: int, layer: LayerSpec) -> int:
    """Elements of q, k, v and o of one layer on a model of width D."""
    per_head = layer.head_dim + layer.v_head_dim
    return D * per_head * (layer.num_heads + layer.num_kv_heads)
