"""Adapted weights: every product that modules ask for, its gradients, and the adapters of a model on any mesh."""
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hub_maker import tiny_config, write_hub
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import check
from test_codec import random_packed

import jaxllm
from jaxllm import linear, lora
from jaxllm.axes import make_mesh, spec
from jaxllm.checkpoint.projections import targets
from jaxllm.codec import DTYPES, unpack
from jaxllm.config import Config
from jaxllm.generate.load import abstract_model
from jaxllm.linear import einsum, matmul, matmul_in_parts
from jaxllm.quant import Adapted, Packed, take

R, SCALE = 3, 1.5
SIZES = dict(b=2, t=4, d=64, n=4, k=4, h=8, v=16, f=64, i=32, m=6)
# The equations of the modules -> (in-dims of the weight, logical names of its dims, of those of x; those of o_proj and
# down_proj sum over dims that the mesh splits)
PRODUCTS = {
    "btd,dnh->btnh": (1, ("embed", "heads", "head_dim"), ("batch", None, None)),
    "btd,dkh->btkh": (1, ("embed", "kv_heads", "head_dim"), ("batch", None, None)),
    "btd,dkv->btkv": (1, ("embed", "kv_heads", "head_dim"), ("batch", None, None)),
    "btnv,nvd->btd": (2, ("heads", "head_dim", "embed"), ("batch", None, "heads", None)),
    "btd,df->btf": (1, ("embed", "mlp"), ("batch", None, None)),
    "btf,fd->btd": (1, ("mlp", "embed"), ("batch", None, "mlp")),
    "md,di->mi": (1, (None, None), (None, None)),
}


FAN_IN = {"DNH": 64, "DKH": 64, "DKV": 64, "NVD": 8 * 16, "DF": 64, "FD": 96, "EDI": 64, "EID": 32}     # of tiny_config


def shape_of(dims):
    return tuple(SIZES[dim] for dim in dims)


def packed(kind, shape, dim=0):
    """(weight with scales for 16 along `dim`, its values)."""
    block = tuple(size // 16 if n == dim else size for n, size in enumerate(shape))
    codes, scale = random_packed(kind, shape, block, dim, 0)
    return Packed(jnp.asarray(codes), jnp.asarray(scale), dim), unpack(codes, scale, dim)


def make(equation, kind=None):
    """(x, an adapted weight, x @ what it stands for in float64, as a function of x, a and b)."""
    x_dims, w_dims = equation.split("->")[0].split(",")
    ins, rng = PRODUCTS[equation][0], np.random.default_rng(0)
    shape, dim = shape_of(w_dims), 1 if ins == 2 else 0
    base, values = packed(kind, shape, dim) if kind else (None, rng.standard_normal(shape, np.float32))
    x = rng.standard_normal(shape_of(x_dims), np.float32)
    a = rng.standard_normal((*shape[:ins], R), np.float32)
    b = rng.standard_normal((R, *shape[ins:]), np.float32)
    weight = Adapted(jnp.asarray(values) if base is None else base, jnp.asarray(a), jnp.asarray(b), SCALE)
    whole = values.astype(np.float64) + SCALE * np.tensordot(a.astype(np.float64), b.astype(np.float64), 1)
    return jnp.asarray(x), weight, np.einsum(equation, x.astype(np.float64), whole)


# ---- products ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", [None, "mxfp4"])
@pytest.mark.parametrize("equation", PRODUCTS)
def test_products(equation, kind):
    x, weight, expected = make(equation, kind)
    check(einsum(equation, x, weight), expected, "float32")
    assert weight.shape == weight.base.shape and weight[...].scale == SCALE


def test_other_products():
    x_MD, weight, expected = make("md,di->mi", "fp8")
    check(matmul(x_MD, weight), expected, "float32")
    check(matmul_in_parts(x_MD[None], weight)[0], expected, "float32")


def test_between_the_two_products_is_what_the_model_computes_in():
    x_MD, weight, expected = make("md,di->mi")
    found = matmul(x_MD.astype(jnp.bfloat16), weight)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=2**-6 * np.abs(expected).max())     # a few roundings, 2^-9
    text = str(jax.make_jaxpr(matmul)(x_MD.astype(jnp.bfloat16), weight))
    assert len(re.findall(r"preferred_element_type=float32", text)) == len(re.findall("dot_general", text)) == 3


@pytest.mark.parametrize("kind", [None, "int4"])
def test_one_of_a_stack(kind):
    E, D, I = 3, 64, 32      # noqa: E741
    rng = np.random.default_rng(0)
    base, values = packed(kind, (E, D, I), 1) if kind else (None, rng.standard_normal((E, D, I), np.float32))
    a, b = rng.standard_normal((E, D, R), np.float32), rng.standard_normal((E, R, I), np.float32)
    stack = Adapted(jnp.asarray(values) if base is None else base, jnp.asarray(a), jnp.asarray(b), SCALE)
    x = rng.standard_normal((2, D), np.float32)
    check(matmul(jnp.asarray(x), take(stack, jnp.int32(2))),
          x.astype(np.float64) @ (values[2] + SCALE * a[2].astype(np.float64) @ b[2]), "float32")


# ---- gradients ---------------------------------------------------------------------------------------------------

def gradients(product, x, weight, cotangent):
    """Of x, a and b, and the largest float array that waits for them."""
    out, pull = jax.vjp(lambda x, a, b: product(x, Adapted(weight.base, a, b, SCALE)), x, weight.a, weight.b)
    kept = [leaf.size for leaf in jax.tree.leaves(pull) if jnp.issubdtype(leaf.dtype, jnp.floating)
            and leaf.dtype.itemsize > 1]
    return pull(cotangent(out)), max(kept)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize(("equation", "tile"), [
    ("btd,dnh->btnh", None), ("btnv,nvd->btd", None), ("md,di->mi", None), ("md,di->mi", 16 * 32)])
def test_gradients_through_packed_weights(equation, tile, kind, monkeypatch):
    """Those of the decoded weight, of which nothing is kept, neither of a whole one nor of one decoded in pieces."""
    if tile:
        monkeypatch.setattr(linear, "TILE", tile)
    x, weight, expected = make(equation, kind)

    def product(x, w):
        return matmul(x, w) if tile else einsum(equation, x, w)

    def cotangent(out):
        return jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    found, kept = gradients(product, x, weight, cotangent)
    plain = make(equation, kind)[1]
    decoded = Adapted(jnp.asarray(unpack(np.asarray(plain.base.codes), np.asarray(plain.base.scale), plain.base.dim)),
                      weight.a, weight.b, SCALE)
    for ours, theirs in zip(found, gradients(product, x, decoded, cotangent)[0], strict=True):
        check(ours, np.asarray(theirs, np.float64), "float32")
    assert kept <= max(x.size, weight.base.scale.size) < weight.base.codes.size * 2
    shapes = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"f32\[([\d,]+)\]", str(
        jax.make_jaxpr(lambda x: jax.vjp(lambda x: product(x, weight), x)[1](jnp.ones_like(product(x, weight))))(x)))]
    if tile:      # nor is more than a piece decoded for them
        assert max(shapes) < np.prod(weight.shape)


# ---- on a mesh ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("equation", "kind"), [
    *((equation, None) for equation in PRODUCTS if equation != "md,di->mi"),
    ("btd,dkh->btkh", "fp8"), ("btnv,nvd->btd", "mxfp4"), ("btf,fd->btd", "fp8")])
def test_sharded(equation, kind):
    """Values and gradients of one device, and the shardings of weight and input."""
    ins, names, x_names = PRODUCTS[equation]
    x, weight, expected = make(equation, kind)
    mesh, w_spec, x_spec = make_mesh("data=2,expert=1,tensor=4"), spec(*names), spec(*x_names)
    out_spec = spec("batch", None, None) if equation.endswith("->btd") else None
    on = Adapted(jax.device_put(weight.base, NamedSharding(mesh, w_spec)),
                 jax.device_put(weight.a, NamedSharding(mesh, P(*w_spec[:ins], None))),
                 jax.device_put(weight.b, NamedSharding(mesh, P(None, *w_spec[ins:]))), SCALE)

    def total(x, a, b, base):
        return jnp.square(einsum(equation, x, Adapted(base, a, b, SCALE), out_spec)).sum()
    with jax.set_mesh(mesh):
        x_on = jax.device_put(x, NamedSharding(mesh, x_spec))
        check(np.asarray(jax.jit(lambda x, w: einsum(equation, x, w, out_spec))(x_on, on)), expected, "float32")
        found = jax.jit(jax.grad(total, (0, 1, 2)))(x_on, on.a, on.b, on.base)
    out_spec = None
    for ours, theirs, like in zip(found, jax.grad(total, (0, 1, 2))(x, weight.a, weight.b, weight.base),
                                  (x_on, on.a, on.b), strict=True):
        check(np.asarray(ours), np.asarray(theirs, np.float64), "float32")
        assert ours.sharding.is_equivalent_to(like.sharding, ours.ndim)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    write_hub(folder, tiny_config(num_hidden_layers=2, hybrid_layer_pattern=[0, 1], moe_layer_freq=[0, 1]))
    return folder


def abstract(folder, mesh, r=R, target_modules="all-linear"):
    config = Config.from_hub(folder)
    return lora.abstract_adapters(abstract_model(config, mesh, jnp.float32),
                                  dict.fromkeys(targets(config, target_modules), r), jnp.dtype("float32"))


def test_adapters_begin_as_pefts_do(folder):
    """The same numbers on every mesh, split as the weights."""
    def begin(mesh):
        leaves = abstract(folder, make_mesh(mesh), 16, ["q_proj", "1.self_attn.o_proj", "down_proj"])
        with jax.set_mesh(make_mesh(mesh)):
            found = jax.jit(lambda: lora.init_adapters(leaves, jax.random.key(0)))()
        assert all(array.sharding == leaves[path].sharding for path, array in found.items())
        return found
    one, many = begin(None), begin("data=2,expert=2,tensor=2")
    assert len(one) == 2 * 5
    for path, array in one.items():
        np.testing.assert_array_equal(array, many[path])
        if path.endswith("lora_b"):
            assert not np.any(array)
        else:
            bound = FAN_IN[path.split(".")[-2].split("_")[1]] ** -0.5
            assert bound * 0.98 < np.abs(array).max() <= bound
    assert many["layers.1.attention.o_NVD.lora_a"].sharding.spec == P("tensor", None, None)
    assert many["layers.1.attention.q_DNH.lora_b"].sharding.spec == P(None, "tensor", None)
    assert many["layers.1.moe.down_EID.lora_a"].sharding.spec == P(("tensor", "expert"), None, None)


def test_the_same_logits_on_a_mesh(folder):
    """Of four devices for two kv heads, two have a copy of another's, and of its part of lora_b."""
    rng, tokens = np.random.default_rng(0), np.arange(16, dtype=np.int32).reshape(2, 8)
    arrays = {path: rng.standard_normal(leaf.shape, np.float32) / 8
              for path, leaf in abstract(folder, make_mesh()).items()}
    found = []
    for mesh in (None, "expert=2,tensor=4"):
        model = jaxllm.load(folder, mesh, dtype="float32")
        plain = model.transformer
        model.transformer = lora.adapt(plain, lora.place(arrays, plain), SCALE)
        found.append(model.logits(tokens))
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=2e-5)      # of logits of 10, as in test_mesh.py
    model.transformer = plain
    assert np.abs(found[1] - model.logits(tokens)).max() > 1
