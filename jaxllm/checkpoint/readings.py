"""How the rows of q, k and v lie in a hub file: the readings that are known, which of them a file fits, and the choice.

Read by the wrong one, a file gives fluent nonsense and no error. So a reading is taken only where the shapes of the fp8
scales leave no other, or where the file or the user states it (MODEL.md 4.3, 4.4):

    ranks=N    fused qkv_proj: N times [Q heads | K heads | V heads], blocks of scales counted anew in each
    plain      fused qkv_proj: one [Q; K; V] in one grid of blocks
    stacked    k_proj and v_proj of full layers: one [K; V] a kv head, blocks counted anew in each; v_proj's scale has
               the blocks that k_proj's has not
    grid       k_proj and v_proj, each in its own grid of blocks
"""
import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass

import numpy as np

from jaxllm.checkpoint.errors import CheckpointError
from jaxllm.checkpoint.scales import Labels, grid
from jaxllm.config import Config, LayerSpec

RANKS = re.compile(r"ranks=([1-9]\d{0,5})")
SUFFIX = "_scale_inv"


def count_ranks(reading: str | None, config: Config) -> int:
    """How many times fused rows repeat [Q | K | V]; without a reading as the layout declares, once a full kv head."""
    if reading is None:
        return config.num_key_value_heads
    match = RANKS.fullmatch(reading)
    return int(match[1]) if match else 1


def attention_layers(config: Config, num_mtp: int) -> Iterator[tuple[str, LayerSpec]]:
    """(prefix of its hub tensors, spec) of every attention layer, MTP blocks included."""
    for i, spec in enumerate(config.layers):
        yield f"model.layers.{i}.self_attn", spec
    for k in range(num_mtp):
        yield f"model.mtp.layers.{k}.self_attn", config.mtp_layer


def row_labels(config: Config, num_mtp: int, reading: str | None, height: int, fp8: Set[str]) -> dict[str, Labels]:
    """Labels of the attention weights among `fp8` (hub names), with blocks of `height` rows, under a reading."""
    labels = {}
    for prefix, spec in attention_layers(config, num_mtp):
        heads, width = spec.num_kv_heads, spec.head_dim + spec.v_head_dim
        qkv, k, v = (f"{prefix}.{name}_proj.weight" for name in ("qkv", "k", "v"))
        if qkv in fp8:
            count = spec.num_heads * spec.head_dim + heads * width
            labels[qkv] = grid(qkv + SUFFIX, count, count // count_ranks(reading, config), height)
        if k in fp8 and v in fp8:
            if reading == "stacked" and spec.window is None:
                labels |= dict(zip((k, v), _stacked(k, v, spec, height), strict=True))
            else:
                labels |= {name: grid(name + SUFFIX, heads * dim, heads * dim, height)
                           for name, dim in ((k, spec.head_dim), (v, spec.v_head_dim))}
    return labels


def _stacked(k: str, v: str, spec: LayerSpec, height: int) -> tuple[Labels, Labels]:
    """Labels of k_proj and v_proj rows, where each head's [K; V] was cut into blocks as one matrix."""
    heads, H, V = spec.num_kv_heads, spec.head_dim, spec.v_head_dim
    of_k, of_both = -(-H // height), -(-(H + V) // height)
    k_scale, v_scale = (k + SUFFIX, heads * of_k), (v + SUFFIX, heads * (of_both - of_k))
    block, head = np.arange(H + V) // height, np.arange(heads)[:, None]
    in_k = head * of_k + block
    in_v = head * (of_both - of_k) + block - of_k
    of_k_rows = Labels((k_scale,), in_k[:, :H].reshape(-1))
    if H % height == 0:      # K fills its blocks, so V begins in one of its own
        return of_k_rows, Labels((v_scale,), in_v[:, H:].reshape(-1))
    rows = np.where(block < of_k, in_k, heads * of_k + in_v)
    return of_k_rows, Labels((k_scale, v_scale), rows[:, H:].reshape(-1))


@dataclass(frozen=True)
class Evidence:
    """What a hub folder, `where`, says of the rows of its attention: its config, the fp8 weights among its tensors, the
    number of rows of every scale, the height of a block, and the number of ranks if its metadata states one."""
    where: str
    config: Config
    num_mtp: int
    fp8: Set[str]
    scale_rows: Mapping[str, int]
    height: int
    tp_size: object = None

    @property
    def is_fused(self) -> bool:
        return self.config.attention_projection_layout == "fused_qkv"

    def choose(self, stated: str | None) -> str | None:
        """The reading to take; `stated` is the user's. None where rows of split projections have no blocks to count.

        Errors: CheckpointError, which lists the readings, if none fits, several do and nothing is stated, or the stated
        one is not known or does not fit.
        """
        self._check_stated(stated)
        if not self._labels("plain"):      # no scales to hold a reading against
            if not self.is_fused and stated:
                raise CheckpointError(f"{self.where}: the reading {stated!r} was stated, but q_proj, k_proj and v_proj "
                                      "are split and have no blocks of scales, so there is one reading: state none")
            return self._candidates(stated)[0] if self.is_fused else None
        options = self._distinct(self._candidates(stated))
        fitting = [option for option in options if not self._misfits(option)] if len(options) > 1 else options
        preferred = options[0] if stated or self.is_fused and self.tp_size is not None else None
        chosen = preferred if preferred in fitting else None
        if chosen is None and len(fitting) == 1 and not stated:
            chosen = fitting[0]
        if chosen is None:
            self._refuse(options, fitting, stated)
        return chosen

    def _candidates(self, stated: str | None) -> list[str]:
        """The readings to try: the one stated by the user, else by the metadata, and those that the layout may have."""
        if not self.is_fused:
            return [*([stated] if stated else []), "grid", "stacked"]
        ranks = None if stated else self._stated_ranks()
        first = [stated] if stated else [_ranks(ranks)] if ranks else []
        return [*first, _ranks(self.config.num_key_value_heads), "plain"]

    def _stated_ranks(self) -> int | None:
        """The tp_size of the file's metadata, a number or, in a safetensors header, its digits."""
        if self.tp_size is None:
            return None
        if not RANKS.fullmatch(f"ranks={self.tp_size}"):
            raise CheckpointError(f"{self.where}: its metadata states tp_size {self.tp_size!r}, expected a whole "
                                  "number above 0; correct it, or state the reading")
        ranks = int(str(self.tp_size))
        if not self._divides(ranks):
            raise CheckpointError(f"{self.where}: its metadata states tp_size {ranks}, which does not divide the heads "
                                  "of every layer; is the config.json the checkpoint's own? If so, state the reading")
        return ranks

    def _divides(self, ranks: int) -> bool:
        return all(count % ranks == 0 for _, spec in attention_layers(self.config, self.num_mtp)
                   for count in (spec.num_heads, spec.num_kv_heads))

    def _check_stated(self, stated: str | None) -> None:
        known = "ranks=N, plain" if self.is_fused else "stacked, grid"
        if stated and stated not in known.split(", ") and not (self.is_fused and RANKS.fullmatch(stated)):
            raise CheckpointError(f"{self.where}: the stated reading {stated!r} is none of "
                                  f"{self.config.attention_projection_layout!r} attention; accepted: {known}")
        if stated and self.is_fused and not self._divides(count_ranks(stated, self.config)):
            raise CheckpointError(f"{self.where}: the stated reading {stated!r} does not divide the heads of every "
                                  "layer; accepted: plain, and ranks=N where it does")

    def _labels(self, reading: str) -> dict[str, Labels]:
        return row_labels(self.config, self.num_mtp, reading, self.height, self.fp8)

    def _distinct(self, readings: list[str]) -> list[str]:
        """Without those that label all rows like one before them."""
        distinct: list[str] = []
        for reading in readings:
            if not any(self._alike(reading, other) for other in distinct):
                distinct.append(reading)
        return distinct

    def _alike(self, first: str, second: str) -> bool:
        if self.is_fused:      # rows lie elsewhere, however they are labelled
            return count_ranks(first, self.config) == count_ranks(second, self.config)
        one, two = self._labels(first), self._labels(second)
        return all(one[name].tensors == two[name].tensors and np.array_equal(one[name].rows, two[name].rows)
                   for name in one)

    def _expected(self, reading: str) -> dict[str, int]:
        """The number of rows of each scale tensor of attention."""
        return {tensor: count for labels in self._labels(reading).values() for tensor, count in labels.tensors}

    def _misfits(self, reading: str) -> list[str]:
        return [tensor for tensor, count in self._expected(reading).items() if self.scale_rows[tensor] != count]

    def _refuse(self, options: list[str], fitting: list[str], stated: str | None) -> None:
        if stated and fitting:
            problem = f"the stated reading {stated!r} does not fit the scales of its attention rows"
        elif fitting:
            problem = "several readings of its attention rows fit; state the one it was written with (--reading)"
        else:
            problem = "no reading of its attention rows fits their scales (is the config.json the checkpoint's own?)"
        listed = "; ".join(f"{option} ({self._describe(option)})" for option in options)
        raise CheckpointError(f"{self.where}: {problem}. Readings: {listed}")

    def _describe(self, reading: str) -> str:
        """Rows expected and found, once for each pair of numbers; those that differ first."""
        pairs: dict[tuple[int, int], str] = {}
        for tensor, count in self._expected(reading).items():
            pairs.setdefault((count, self.scale_rows[tensor]), tensor)
        order = sorted(pairs, key=lambda pair: pair[0] == pair[1])
        return ", ".join(f"{pairs[pair]}: {pair[0]} rows expected, {pair[1]} found" for pair in order)


def _ranks(count: int) -> str:
    return "plain" if count == 1 else f"ranks={count}"
