"""Attention of a prefill with a cache, compiled for slices that are not here: a full and a sliding layer of Flash."""
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from jaxllm.attention import attend_cached
from jaxllm.axes import attention_rows, make_mesh, spec
from jaxllm.cache import LayerCache
from jaxllm.tpu.chips import slice_of
from jaxllm.tpu.hlo import parse
from jaxllm.tpu.program import devices_of, owners_of
from jaxllm.tpu.traffic import Traffic, kernel_bytes

N, H, V, WINDOW = 64, 192, 128, 128
KINDS = (None, 4), (WINDOW, 8)          # window and kv heads
OWNERS = *["activations"] * 4, "cache", "activations"       # of the arguments of two_layers


def two_layers(q, new, start, end, caches, sink):
    """What each attends to, and their caches."""
    return [attend_cached(q, *kv, start, end, cache, window, None if window is None else sink)
            for kv, cache, (window, _) in zip(new, caches, KINDS, strict=True)]


def compiled(on: str, B: int, T: int, S: int):
    """The two layers over tensor=4, the rows over what is left."""
    devices = devices_of(slice_of(on))
    mesh = make_mesh({"tensor": 4, "expert": len(devices) // 4}, devices)
    with jax.set_mesh(mesh):
        rows = attention_rows(B)

        def array(*shape, names=(rows, None, "heads", None), dtype=jnp.bfloat16):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec(*names)))

        new = [(array(B, T, K, H), array(B, T, K, V)) for _, K in KINDS]
        caches = [LayerCache(*(array(B, K, *shape, names=(rows, "kv_heads", None, None))
                               for shape in ((H, slots), (slots, V)))) for slots, (_, K) in zip((S, WINDOW), KINDS,
                                                                                               strict=True)]
        position, sink = array(B, names=(rows,), dtype=jnp.int32), array(N, names=("heads",), dtype=jnp.float32)
        return jax.jit(two_layers, donate_argnames="caches").lower(
            array(B, T, N, H), new, position, position, caches, sink).compile()


@pytest.mark.parametrize(("on", "B", "T", "S"), [
    ("v6e:4x4", 1, 2048, 32768), ("v5e:4x4", 8, 300, 16384), ("tpu7x:2x2x2", 1, 2000, 8192)])
def test_prefill(libtpu, on, B, T, S):
    """Splash attention alone has scores: no buffer has the 128 MiB of 16 heads' with 1024 keys, nor half of it. The
    caches are written where they lie and not copied, and each kernel says what it moves."""
    program = compiled(on, B, T, S)
    traffic = Traffic(parse(program.as_text()), owners_of(program, OWNERS))
    assert not traffic.large(2**26)
    assert traffic.by_class()["copies"] == 0
    caches = max(B // 4, 1) * (S * 1 + WINDOW * 2) * (H + V) * 2         # of a device
    assert program.memory_analysis().alias_size_in_bytes >= caches
    kernels = [x for _, x, _ in traffic.module.executed() if x.opcode == "custom-call" and "splash" in x.name]
    of_queries = max(B // 4, 1) * N // 4 * T * (H + V) * 2
    assert len(kernels) == 3 and min(map(kernel_bytes, kernels)) >= of_queries
