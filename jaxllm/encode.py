"""Packing matrices: float32 values into codes and scales, on the host. What those mean is in codec.py.

A matrix is [in, out], heads unfolded into rows or columns. How the scale of a block or group is chosen:

    fp8     its largest value becomes 448, the largest of e4m3fn
    mxfp4   a power of two: that of the largest value, so that it comes to lie in [4, 8), as the OCP Microscaling
            specification has it (1.0, section 6.3); but in [7, 8), where e2m1 would cut it to 6, one twice as large,
            with which it becomes 8 and the others are a little coarser
    int4    its largest value becomes 7

Values are rounded to the nearest, ties to even. With a gram (calibrate.py) the error of each row is made up for in the
rows that follow, as GPTQ does (arXiv 2210.17323). docs/quantisation.md says what each choice is worth, and what was
tried and is not here.
"""
import ml_dtypes
import numpy as np

from jaxllm.codec import DTYPES, E2M1, INT4

GROUPS = {"mxfp4": (32,), "int4": (32, 128)}            # kind -> elements of an in-dim that may share a scale
E4M3_MAX, INT4_MAX = np.float32(448), np.float32(7)
MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)     # between the neighbouring magnitudes of e2m1
SMALLEST = np.float32(2.0**-126)    # of scales: the smallest normal number of float32 and of bfloat16
TILE = 2**18                        # numbers that are packed at once, to stay in a core's cache
DAMPING = 0.01                      # is added to a gram's diagonal, times its mean


def fp8_scale(largest: np.ndarray) -> np.ndarray:
    """float32 scales of blocks whose largest magnitudes are given."""
    return np.where(largest == 0, np.float32(1), np.maximum(largest / E4M3_MAX, SMALLEST))


def fp8_codes(w_IO: np.ndarray, scale_BS: np.ndarray) -> np.ndarray:
    """e4m3fn codes [in, out] of finite float32 [in, out], with one scale for each of B x S equal blocks."""
    (rows, columns), (B, S) = w_IO.shape, scale_BS.shape
    codes = np.empty((rows, columns), ml_dtypes.float8_e4m3fn)
    for row, scale_S in zip(range(0, rows, rows // B), scale_BS, strict=True):
        block = slice(row, row + rows // B)
        codes[block] = (w_IO[block].reshape(-1, S, columns // S) / scale_S[:, None]).reshape(-1, columns)
    return codes


def pack(w_IO: np.ndarray, kind: str, group: int, feedback_II: np.ndarray | None = None
         ) -> tuple[np.ndarray, np.ndarray]:
    """(codes uint8 [in / 2, out], scale [in / group, out]) of finite float32 [in, out], as mxfp4 or int4.

    Columns do not depend on each other. feedback: of the matrix's gram, for rounding that makes up for its errors.
    """
    (rows, columns), step = w_IO.shape, group
    if feedback_II is None:
        step *= max(1, TILE // (group * columns))
    else:
        w_IO = w_IO.copy()
    codes = np.empty((rows // 2, columns), np.uint8)
    scale = np.empty((rows // group, columns), DTYPES[kind][1])
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        x_GgO = w_IO[start:stop].reshape(-1, group, columns)
        scale[start // group:stop // group] = found = choose_scale(np.abs(x_GgO).max(1), kind)
        factor = factors(found)[:, None]
        if feedback_II is None:
            nibbles = nearest(x_GgO / factor, kind)
        else:
            nibbles, error = nearest_in_turn(x_GgO[0], factor[0, 0], kind, feedback_II[start:stop, start:stop])
            w_IO[stop:] -= feedback_II[start:stop, stop:].T @ error
        pairs = nibbles.reshape(-1, 2, columns)
        codes[start // 2:stop // 2] = pairs[:, 0] | pairs[:, 1] << 4
    return codes, scale


def choose_scale(largest: np.ndarray, kind: str) -> np.ndarray:
    """Scales, as they are stored, of groups whose largest magnitudes are given."""
    if kind == "int4":
        scale = np.maximum(largest / INT4_MAX, SMALLEST)
        return np.where(largest == 0, np.float32(1), scale).astype(DTYPES[kind][1])
    mantissa, exponent = np.frexp(largest)      # largest = mantissa * 2^exponent, 1/2 <= mantissa < 1
    return np.clip(exponent - 3 + (mantissa > 7 / 8) + 127, 1, 252).astype(np.uint8)      # 6 * 2^126 is no float32


def factors(scale: np.ndarray) -> np.ndarray:
    """The float32 numbers that stored scales of 4-bit groups stand for."""
    return np.ldexp(np.float32(1), scale.astype(np.int32) - 127) if scale.dtype == np.uint8 else \
        scale.astype(np.float32)


def nearest(x: np.ndarray, kind: str) -> np.ndarray:
    """uint8 codes, 0 to 15, of what is nearest to x; x is in units of the scale."""
    if kind == "int4":
        return np.clip(np.rint(x), -INT4_MAX, INT4_MAX).astype(np.int8).view(np.uint8) & 15
    size = np.abs(x)
    code = np.signbit(x).astype(np.uint8) << 3
    for below, midpoint in enumerate(MIDPOINTS):      # what lies on a midpoint gets the even of the codes beside it
        code += size > midpoint if below % 2 == 0 else size >= midpoint
    return code


def feedback(gram_II: np.ndarray) -> np.ndarray:
    """float32 [in, in], upper triangular with a diagonal of ones: how much of row i's error each later row takes on.

    The Cholesky factor of the inverse of the gram, as in GPTQ, section 3.3, each row over its diagonal element.
    """
    gram = gram_II.astype(np.float64)
    gram[np.diag_indices_from(gram)] += DAMPING * np.trace(gram) / len(gram) or 1.0
    upper = np.linalg.cholesky(np.linalg.inv(gram)).T
    return (upper / np.diag(upper)[:, None]).astype(np.float32)


def nearest_in_turn(x_gO: np.ndarray, factor_O: np.ndarray, kind: str, feedback_gg: np.ndarray
                    ) -> tuple[np.ndarray, np.ndarray]:
    """(codes of the rows of one group, each nearest to what it has become by then, and the errors [g, out])."""
    table = E2M1 if kind == "mxfp4" else INT4
    x_gO, codes = x_gO.copy(), np.empty(x_gO.shape, np.uint8)
    for i, row in enumerate(x_gO):
        codes[i] = nearest(row / factor_O, kind)
        row -= table[codes[i]] * factor_O
        x_gO[i + 1:] -= feedback_gg[i, i + 1:, None] * row
    return codes, x_gO
