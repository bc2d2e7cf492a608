"""Tokens go to the devices that hold the experts they chose, and what these owe them comes back (GShard, arXiv
2006.16668, but dropless: an exchange takes as many rows as there are).

Experts are whole, each on one place of the mesh, and so is each token. A token goes once to each place that has some of
its experts, and once back: of n places that is on average n * (1 - (1 - 1/n)^A), where to gather all tokens and to add
up over all places sends it n times each way. What everybody chose is gathered first, which is small, so each place
knows by itself what it gets from which other, and where that lies. A place takes its rows in the order of the tokens,
in turns of a bounded number: its memory is that of twice the rows it should get, whatever it gets.

Letters: p the place that sends, q the one that gets, n of them; m the tokens of a place, M = n*m; s the rows of a
place's tokens, as they are sent, r the rows it gets in one turn.
"""
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.axes import mesh_axes
from jaxllm.experts_offloaded import apply_held_experts

PLACES = mesh_axes("whole_experts")
V5E = ("v5e", "TPU v5 lite")      # Google's name of the chip, and JAX's
LEAST_TURN = 1024      # rows: for fewer, no turn is worth reading the experts again


def expected_places(num_experts: int, chosen: int, places: int) -> float:
    """On how many places a token's experts are, on average if all choices are equally likely."""
    here = num_experts // places
    return places * (1 - math.prod((num_experts - here - i) / (num_experts - i) for i in range(chosen)))


def turn_rows(num_tokens: int, num_experts: int, chosen: int, places: int) -> int:
    """Rows that a place takes at once: all that could come, or where those are many, twice what should."""
    expected = num_tokens / places * expected_places(num_experts, chosen, places)
    return min(num_tokens, max(LEAST_TURN, 128 * math.ceil(2 * expected / 128)))


def sends_ragged(chip: str, num: int) -> bool:
    """Whether XLA can exchange as many rows as there are between so many devices: not on v5e above 16, where it says
    "Ragged all-to-all is currently not supported in limited ICI routing settings" (libtpu 0.0.42)."""
    return num <= 16 or chip not in V5E


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slices:
    """Which rows of place p go to q in one turn; the same on every place."""
    sender_pq: jax.Array        # the first of them among those that p sends
    receiver_pq: jax.Array      # and among those that q gets in this turn
    num_pq: jax.Array


def slices(count_pq: jax.Array, turn: jax.Array | int, rows: int) -> Slices:
    """Of turn number `turn`: q takes all that it gets, in the order of p, in turns of so many rows."""
    begin_pq = jnp.cumsum(count_pq, axis=0) - count_pq - turn * rows        # of p's rows, seen from this turn's first
    skipped_pq = jnp.clip(-begin_pq, 0, count_pq)
    return Slices(jnp.cumsum(count_pq, axis=1) - count_pq + skipped_pq, jnp.clip(begin_pq, 0, rows),
                  jnp.clip(begin_pq + count_pq, 0, rows) - jnp.clip(begin_pq, 0, rows))


def exchange(x_sD: jax.Array, out_rD: jax.Array, from_q: jax.Array, num_q: jax.Array, to_q: jax.Array,
             num_p: jax.Array, most: int) -> jax.Array:
    """out_rD with what comes in it: place q gets the num_q rows from_q of x and puts them at to_q; num_p come from p.

    `most`: no more go from any place to any other. As `jax.lax.ragged_all_to_all`, which XLA has for most TPUs: it
    sends these rows and no others. Elsewhere each place sends `most` rows to each.
    """
    def by_padding(x_sD: jax.Array, out_rD: jax.Array, from_q: jax.Array, num_q: jax.Array, to_q: jax.Array,
                   num_p: jax.Array) -> jax.Array:
        row = jnp.arange(most, dtype=jnp.int32)[None, :]
        sent = x_sD.at[from_q[:, None] + row].get(mode="clip")
        got, to_p = (jax.lax.all_to_all(x, PLACES, 0, 0, tiled=True) for x in (sent, to_q))
        to = jnp.where(row < num_p[:, None], to_p[:, None] + row, out_rD.shape[0])
        return out_rD.at[to].set(got, mode="drop")

    def ragged(*inputs: jax.Array) -> jax.Array:
        return jax.lax.ragged_all_to_all(*inputs, axis_name=PLACES)
    mesh = jax.sharding.get_abstract_mesh()
    kind = mesh.abstract_device.device_kind if mesh.abstract_device else ""      # none where shapes alone are asked for
    tpu = ragged if sends_ragged(kind, mesh.size) else by_padding
    return jax.lax.platform_dependent(x_sD, out_rD, from_q, num_q, to_q, num_p, tpu=tpu, default=by_padding)


def local_experts(expert_MA: jax.Array, num_here: int, axes: tuple[str, ...]) -> jax.Array:
    """The numbers of experts among this place's, where they are split along these axes; num_here for all others."""
    local_MA = expert_MA - jax.lax.axis_index(axes) * num_here
    return jnp.where((local_MA >= 0) & (local_MA < num_here), local_MA, num_here)


def apply_spread_experts(x_mD: jax.Array, expert_mA: jax.Array, weight_mA: jax.Array, experts: Any) -> jax.Array:
    """Sum over each token's experts (numbered as in the whole model) by weights, float32 [m, D].

    What comes back from a place is rounded to x's dtype. Inside shard_map, with everything varying along all mesh axes.
    No gradient where there may be more than one turn.
    """
    (m, D), A, e, n = x_mD.shape, expert_mA.shape[1], experts[0].shape[0], jax.lax.axis_size(PLACES)
    me, rows, num_sent = jax.lax.axis_index(PLACES), turn_rows(n * m, n * e, A, n), m * min(A, n)
    expert_MA, weight_MA = (jax.lax.all_gather(x, PLACES, tiled=True) for x in (expert_mA, weight_mA))
    goes_Mn = jnp.any(expert_MA[:, :, None] // e == jnp.arange(n, dtype=jnp.int32)[None, None, :], axis=1)
    count_pq = jnp.sum(goes_Mn.reshape(n, m, n), axis=1, dtype=jnp.int32)
    goes_nm = jax.lax.dynamic_slice_in_dim(goes_Mn, me * m, m, 0).T
    token_s = first_true(goes_nm.reshape(-1))[:num_sent]
    token_s = jnp.where(token_s < n * m, token_s % m, m)
    comes_M = jnp.pad(first_true(goes_Mn[:, me]), (0, -n * m % rows), constant_values=n * m)
    sent_sD = x_mD.at[token_s].get(mode="clip")

    def take_turn(turn: jax.Array, back_sD: jax.Array) -> jax.Array:
        to = slices(count_pq, turn, rows)
        got_rD = exchange(sent_sD, jnp.zeros_like(x_mD, shape=(rows, D)), to.sender_pq[me], to.num_pq[me],
                          to.receiver_pq[me], to.num_pq[:, me], min(m, rows))
        token_r = jax.lax.dynamic_slice_in_dim(comes_M, turn * rows, rows)
        expert_rA = expert_MA.at[token_r].get(mode="fill", fill_value=-1)
        y_rD = apply_held_experts(got_rD, local_experts(expert_rA, e, PLACES), weight_MA.at[token_r].get(mode="clip"),
                             experts)
        return exchange(y_rD.astype(x_mD.dtype), back_sD, to.receiver_pq[:, me], to.num_pq[:, me],
                        to.sender_pq[:, me], to.num_pq[me], min(m, rows))

    back_sD = jnp.zeros_like(sent_sD)
    if rows == n * m:
        back_sD = take_turn(jnp.int32(0), back_sD)
    else:
        num_turns = -(-jnp.max(jnp.sum(count_pq, axis=0)) // rows)
        back_sD = jax.lax.fori_loop(0, num_turns, take_turn, back_sD)
    return jnp.zeros_like(x_mD, jnp.float32).at[token_s].add(back_sD.astype(jnp.float32), mode="drop")


def first_true(is_N: jax.Array) -> jax.Array:
    """int32 [N]: the places that are true, in their order, then N."""
    order_N, num = jnp.argsort(~is_N), is_N.shape[0]
    return jnp.where(is_N[order_N], order_N, num).astype(jnp.int32)
