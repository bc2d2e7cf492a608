"""The training loss in float64 numpy, for tests: one document at a time, in the plain pieces of tests/oracle.py.

Sources: MiMo-V2-Flash report (arXiv 2601.02780) for the blocks of multi-token prediction; DeepSeek-V3 (arXiv
2412.19437, equations 17 to 20) for the balance loss.
"""
from collections.abc import Iterator, Mapping

import numpy as np
from oracle import attend, experts, rms_norm, rope, route, swiglu

from jaxllm.config import Config, LayerSpec
from jaxllm.train.batch import Batch

Array = np.ndarray
Params = Mapping[str, Array]      # float64, by path


class Reference:
    """The loss of a batch as a function of the parameters. `chosen`: the choices of experts in the last call, in order.
    """

    def __init__(self, config: Config, batch: Batch, num_mtp: int, mtp_weight: float, balance_weight: float):
        self.config, self.batch, self.num_mtp = config, batch, num_mtp
        self.mtp_weight, self.balance_weight = mtp_weight, balance_weight
        self.chosen: list[Array] = []

    def __call__(self, params: Params) -> float:
        self.chosen = []
        nats, balance = [list[Array]() for _ in range(1 + self.num_mtp)], []
        for row in zip(self.batch.tokens_BT, self.batch.begin_BT, self.batch.counted_BT, strict=True):
            shares: dict[int, list[tuple[Array, Array]]] = {}
            for tokens_T, counted_T in documents(*row):
                x_TD = self.hidden(params, tokens_T, shares)
                states = [rms_norm(x_TD, params["norm.scale_D"], self.config.layernorm_epsilon)]
                states += [self.mtp(params, k, x_TD, tokens_T) for k in range(self.num_mtp)]
                for k, state_TD in enumerate(states):
                    nats[k].append(self.nats(params, state_TD, tokens_T, k + 1)[counted_T[k + 1:]])
            balance += [unbalance(*map(np.concatenate, zip(*layer, strict=True))) for layer in shares.values()]
        mean, *mtp = (np.concatenate(some).mean() for some in nats)
        return mean + self.mtp_weight * np.mean(mtp) + self.balance_weight * np.mean(balance)

    def hidden(self, params: Params, tokens_T: Array, shares: dict[int, list[tuple[Array, Array]]]) -> Array:
        """Hidden states before the final norm; adds to `shares`, by layer, (share of the scores, is chosen), [T, E]."""
        config, x_TD = self.config, params["embed_WD"][tokens_T]
        for i, layer in enumerate(config.layers):
            own = within(params, f"layers.{i}")
            x_TD = x_TD + self.attention(own, layer, x_TD)
            h_TD = rms_norm(x_TD, own["mlp_norm.scale_D"], config.layernorm_epsilon)
            if not layer.is_moe:
                x_TD = x_TD + swiglu(h_TD, *(own[f"mlp.{name}"] for name in ("gate_DF", "up_DF", "down_FD")))
                continue
            router_DE, A = own["moe.router_DE"], config.num_experts_per_tok
            weight_TE = route(h_TD, router_DE, own["moe.bias_E"], A)
            score_TE = 1 / (1 + np.exp(-h_TD @ router_DE))
            self.chosen.append(weight_TE > 0)
            shares.setdefault(i, []).append((score_TE / score_TE.sum(-1, keepdims=True), weight_TE > 0))
            x_TD = x_TD + experts(h_TD, weight_TE, *(own[f"moe.{name}"] for name in ("gate_EDI", "up_EDI", "down_EID")))
        return x_TD

    def mtp(self, params: Params, k: int, hidden_TD: Array, tokens_T: Array) -> Array:
        """What the head reads of block k, at the places that have a token 1 + k places on."""
        own, epsilon = within(params, f"mtp.{k}"), self.config.layernorm_epsilon
        embedded_TD = params["embed_WD"][tokens_T[1 + k:]]
        hidden_TD = rms_norm(hidden_TD[:len(embedded_TD)], own["hidden_norm.scale_D"], epsilon)
        joined_TC = np.concatenate([rms_norm(embedded_TD, own["embed_norm.scale_D"], epsilon), hidden_TD], axis=1)
        x_TD = joined_TC @ own["join_CD"]
        x_TD = x_TD + self.attention(own, self.config.mtp_layer, x_TD)
        h_TD = rms_norm(x_TD, own["mlp_norm.scale_D"], epsilon)
        x_TD = x_TD + swiglu(h_TD, *(own[f"mlp.{name}"] for name in ("gate_DF", "up_DF", "down_FD")))
        return rms_norm(x_TD, own["norm.scale_D"], epsilon)

    def attention(self, own: Params, layer: LayerSpec, x_TD: Array) -> Array:
        h_TD, at_T = rms_norm(x_TD, own["attention_norm.scale_D"], self.config.layernorm_epsilon), np.arange(len(x_TD))
        q, k, v = (np.einsum("td,dnh->tnh", h_TD, own[f"attention.{name}"]) for name in ("q_DNH", "k_DKH", "v_DKV"))
        q, k = (rope(x, at_T, layer.rotary_dim, layer.rope_theta) for x in (q, k))
        out_TNV = attend(q, k, v * self.config.attention_value_scale, at_T, at_T, layer.window,
                         own.get("attention.sink_N"))
        return np.einsum("tnv,nvd->td", out_TNV, own["attention.o_NVD"])

    def nats(self, params: Params, state_TD: Array, tokens_T: Array, ahead: int) -> Array:
        """Cross entropy of each token that is `ahead` places on from another."""
        target_T = tokens_T[ahead:]
        logits_TW = state_TD[:len(target_T)] @ params["head_DW"]
        return np.log(np.exp(logits_TW).sum(-1)) - np.take_along_axis(logits_TW, target_T[:, None], 1)[:, 0]


def documents(tokens_T: Array, begin_T: Array, counted_T: Array) -> Iterator[tuple[Array, Array]]:
    """(tokens, is counted) of each document of a row; padding says that it begins after itself."""
    for begin in np.unique(begin_T[begin_T <= np.arange(len(begin_T))]):
        yield tokens_T[begin_T == begin], counted_T[begin_T == begin]


def unbalance(share_TE: Array, is_chosen_TE: Array) -> float:
    """1 where scores and choices are spread evenly over the experts."""
    E, A = share_TE.shape[1], is_chosen_TE[0].sum()
    return float((share_TE.mean(0) * is_chosen_TE.mean(0)).sum() * E / A)


def within(params: Params, prefix: str) -> Params:
    return {path.removeprefix(f"{prefix}."): value for path, value in params.items() if path.startswith(f"{prefix}.")}
