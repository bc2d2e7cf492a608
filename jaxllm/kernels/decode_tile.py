"""A tile of packed numbers becomes bfloat16 or float32 inside a TPU kernel, four codes of a 32-bit word at a time.

What bounds a kernel over 4-bit weights is not reading them but the vector instructions spent on each, so the codes are
brought, as whole words, into bytes that every TPU converts at once: e5m2 and int8. On v6e a conversion from e4m3 takes
seven times as long as one from int8, and the arithmetic on single codes that jaxllm/quant.py does three times as long
as the way here (bundles in compiled kernels of 512 x 1024 numbers: 983, 151; 921, 367).

    mxfp4   the three magnitude bits of e2m1 are the low exponent bits and the high mantissa bit of an e5m2 that is
            2^-14 times as large, also where e2m1 is subnormal
    int4    a nibble in the upper half of a byte is an int8 that is 16 times as large
    fp8     the magnitude bits of e4m3 without the last are an e5m2; with the last bit set the number lies halfway to
            the next e5m2. So it is the mean of two of them, times 2^8

(TPU7x converts e4m3 at once too and would be faster with that, but a kernel is not told what it is compiled for.)
The powers of two go into the scales. Of a pair of 4-bit codes the low nibbles make one array and the high ones another
(jaxllm/codec.py), so a tile of such a weight is decoded into two parts: its even rows and its odd ones. The oracle of
all this is jaxllm/quant.py's `decode`: the numbers are the same, bit for bit, but where 16 or 2^14 takes a scale out
of the range of float32: int4 scales below 2^-122 and exponent bytes above 240 (2^113) are not for this.
"""
import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

FACTORS = {"fp8": 2.0**7, "mxfp4": 2.0**14, "int4": 2.0**-4}      # of what `values` gives, to what the codes stand for


def num_parts(kind: str | None) -> int:
    """How many arrays a tile is decoded into: row r of the tile is in part r mod parts. A plain weight has no kind."""
    return 2 if kind in ("mxfp4", "int4") else 1


def values(codes: jax.Array, kind: str) -> list[jax.Array]:
    """The parts of a tile of codes, [rows of codes, columns], FACTORS[kind] too small; bfloat16, of fp8 float32."""
    words = pltpu.bitcast(codes, jnp.int32)      # a word holds one column of four rows
    if kind == "fp8":
        sign, below = words & _each(0x80), (words >> 1) & _each(0x3F)
        return [_e5m2(sign | below, jnp.float32) + _e5m2(sign | (below + (words & _each(0x01))), jnp.float32)]
    nibbles = (words << 4, words)                # of which the upper four bits of each byte count
    if kind == "mxfp4":
        return [_e5m2((word & _each(0x80)) | ((word >> 3) & _each(0x0E)), jnp.bfloat16) for word in nibbles]
    return [pltpu.bitcast(word & _each(0xF0), jnp.int8).astype(jnp.bfloat16) for word in nibbles]


def factors(scale: jax.Array, kind: str) -> jax.Array:
    """float32 factors of `values` for a tile of stored scales."""
    if kind != "mxfp4":
        return scale.astype(jnp.float32) * FACTORS[kind]
    # 2^(b - 127 + 14); the smallest two, no normal numbers before, become ones
    return pltpu.bitcast((scale.astype(jnp.int32) + 14) << 23, jnp.float32)


def spread_columns(scale: jax.Array, first: jax.Array, columns: int, size: int) -> jax.Array:
    """Scales of blocks of `size` columns [rows, blocks] for each of `columns` from `first` on, float32 [rows, columns].

    A product with ones and zeros: each sum has one term that is not 0, and is exact.
    """
    column = first + jax.lax.broadcasted_iota(jnp.int32, (scale.shape[1], columns), 1)
    block = jax.lax.broadcasted_iota(jnp.int32, (scale.shape[1], columns), 0)
    is_in = (column >= block * size) & (column < (block + 1) * size)
    return jnp.dot(scale, is_in.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST,
                   preferred_element_type=jnp.float32)


def stored_factors(factor: jax.Array, kind: str, dtype: jnp.dtype) -> jax.Array:
    """Factors [groups, columns] as `multiply` wants them: float32, or of 4-bit codes for bfloat16 the same number in
    both halves of an int32, so that a row of words is two rows of bfloat16."""
    if kind == "fp8" or dtype == jnp.float32:
        return factor
    bits = pltpu.bitcast(factor, jnp.int32)      # the lower half is 0: a power of two, or a bfloat16 times one
    return bits | jax.lax.shift_right_logical(bits, 16)


def multiply(part: jax.Array, stored: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """part [rows, columns] times stored factors [groups, columns], each row of which is for as many rows, rounded once.

    A product of a 4-bit code and a bfloat16 is rounded once in bfloat16 arithmetic too; that of an e4m3 needs float32.
    """
    groups, rows = stored.shape[0], part.shape[0] // stored.shape[0]

    def group(index: int) -> jax.Array:
        factor, values = stored[index:index + 1], part[index * rows:(index + 1) * rows]
        if stored.dtype == jnp.float32:
            return (values.astype(jnp.float32) * factor).astype(dtype)
        return values * pltpu.bitcast(jnp.broadcast_to(factor, (rows // 2, factor.shape[1])), jnp.bfloat16)

    return jnp.concatenate([group(index) for index in range(groups)])


def _each(byte: int) -> int:
    """The int32 with this in each of its bytes."""
    return int.from_bytes(bytes([byte] * 4), "little", signed=True)


def _e5m2(words: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return pltpu.bitcast(words, jnp.float8_e5m2).astype(dtype)
