"""The model's mathematics in float64 numpy, for tests: short, slow, one row of a batch at a time, nothing of jaxllm.

Written from the MiMo-V2-Flash report (arXiv 2601.02780), DeepSeek-V3's routing (arXiv 2412.19437, section 2.1) and the
hub's modeling files, all of them in the plainest form: every score at once, every expert for every token. Letters as in
jaxllm/axes.py.
"""
import ml_dtypes
import numpy as np

Array = np.ndarray

# Largest error as a share of the largest value. float32 rounds by 2^-24 = 6e-8, and sums of some hundred terms, exp and
# the maxima that move during softmax take up to 20 times that. bfloat16 rounds by 2^-9; at most 4 roundings follow each
# other in one piece (rotated q and k, softmax weights or hidden values, output), and they do not all add up.
TOLERANCE = {"float32": 2e-6, "bfloat16": 2**-7}
DTYPES = list(TOLERANCE)


def normal(rng: np.random.Generator, *shape: int, dtype: str = "float32", std: float = 1.0) -> Array:
    """Normal numbers as `dtype` holds them, in an array of that dtype."""
    return (std * rng.standard_normal(shape)).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def wide(*arrays: Array | None) -> list:
    """The same values in float64."""
    return [None if x is None else np.asarray(x, np.float64) for x in arrays]


def check(ours: Array, expected: Array, dtype: str) -> None:
    """Dtype, shape and values, the latter to the tolerance of `dtype`."""
    assert ours.dtype == dtype and ours.shape == expected.shape
    limit = TOLERANCE[dtype] * np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(ours, np.float64), expected, rtol=0, atol=limit)


def rms_norm(x_TD: Array, scale_D: Array, epsilon: float) -> Array:
    return x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + epsilon) * scale_D


def rope(x_TNH: Array, position_T: Array, rotary_dim: int, theta: float) -> Array:
    """Dims i and i + rotary_dim/2 of each head as one complex number, turned by position * theta^(-2i/rotary_dim)."""
    half = rotary_dim // 2
    angle_Tr = position_T[:, None] * theta ** (-2 * np.arange(half) / rotary_dim)
    turned = (x_TNH[..., :half] + 1j * x_TNH[..., half:rotary_dim]) * np.exp(1j * angle_Tr)[:, None]
    return np.concatenate([turned.real, turned.imag, x_TNH[..., rotary_dim:]], axis=-1)


def attend(q_TNH: Array, k_SKH: Array, v_SKV: Array, q_pos_T: Array, k_pos_S: Array, window: int | None,
           sink_N: Array | None) -> Array:
    """Output [T, N, V]. Keys at negative positions do not exist; a sink is a softmax column of value zero."""
    (T, N, H), (S, K) = q_TNH.shape, v_SKV.shape[:2]
    k_SNH, v_SNV = (np.repeat(x, N // K, axis=1) for x in (k_SKH, v_SKV))
    behind_TS = q_pos_T[:, None] - k_pos_S[None]
    seen_TS = (k_pos_S >= 0) & (behind_TS >= 0) & (behind_TS < (np.inf if window is None else window))
    score_NTS = np.where(seen_TS, np.einsum("tnh,snh->nts", q_TNH, k_SNH) / np.sqrt(H), -np.inf)
    column_NT1 = np.full((N, T, 1), -np.inf) if sink_N is None else np.tile(sink_N[:, None, None], (1, T, 1))
    score = np.concatenate([score_NTS, column_NT1], axis=-1)
    top = np.maximum(score.max(-1, keepdims=True), -1e300)      # a query that sees nothing at all gets zeros
    weight = np.exp(score - top)
    weight /= np.maximum(weight.sum(-1, keepdims=True), 1e-300)
    return np.einsum("nts,snv->tnv", weight[..., :S], v_SNV)


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def swiglu(x_TD: Array, gate_DF: Array, up_DF: Array, down_FD: Array) -> Array:
    return (silu(x_TD @ gate_DF) * (x_TD @ up_DF)) @ down_FD


def route(x_TD: Array, router_DE: Array, bias_E: Array, num: int, *, normalise: bool = True, scale: float = 1.0,
          num_groups: int = 1, kept_groups: int = 1) -> Array:
    """Weight of every expert for every token, [T, E]; zero where it was not chosen."""
    score_TE = 1 / (1 + np.exp(-x_TD @ router_DE))
    weight_TE = np.zeros_like(score_TE)
    for score_E, weight_E in zip(score_TE, weight_TE, strict=True):
        groups = np.split(np.arange(len(bias_E)), num_groups)
        biased_E = score_E + bias_E
        groups.sort(key=lambda group: -np.sort(biased_E[group])[-2:].sum())
        allowed = np.concatenate(groups[:kept_groups])
        chosen = allowed[np.argsort(-biased_E[allowed])[:num]]
        weight_E[chosen] = score_E[chosen] / (score_E[chosen].sum() + 1e-20 if normalise else 1) * scale
    return weight_TE


def experts(x_TD: Array, weight_TE: Array, gate_EDI: Array, up_EDI: Array, down_EID: Array) -> Array:
    every_ETD = np.stack([swiglu(x_TD, *matrices) for matrices in zip(gate_EDI, up_EDI, down_EID, strict=True)])
    return np.einsum("te,etd->td", weight_TE, every_ETD)
