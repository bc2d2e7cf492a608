"""What JAX and Flax do that the package leans on: when one of these fails after an upgrade, look here first."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

NAMES = ("data", "expert", "tensor")


@pytest.fixture(autouse=True)
def mesh():
    """2x2x2 in context; the axis types are JAX's default."""
    mesh = jax.make_mesh((2, 2, 2), NAMES)
    with jax.set_mesh(mesh):
        yield mesh


def put(x, *axes) -> jax.Array:
    return jax.device_put(np.asarray(x), P(*axes))


def spec_of(x: jax.Array) -> P:
    return jax.typeof(x).sharding.spec


# --- meshes and explicit sharding

def test_meshes_are_explicit(mesh):
    assert mesh.axis_types == (AxisType.Explicit,) * 3
    assert mesh.abstract_mesh.axis_types == mesh.axis_types


def test_device_put_takes_a_spec_of_the_mesh_in_context(mesh):
    x = put(np.arange(8.0), ("expert", "tensor"))
    assert x.sharding == NamedSharding(mesh, P(("expert", "tensor"))) and x.addressable_shards[0].data.shape == (2,)


def test_abstract_mesh_carries_shardings_through_eval_shape():
    """Of a table of 2 TB: nothing is allocated. Modules on a mesh of 512 devices that are not here."""
    class Module(nnx.Module):
        def __init__(self):
            self.table_WD = nnx.Param(jnp.ones((2**20, 2**19), jnp.float32, out_sharding=P(("expert", "tensor"), None)))

    none, large = AbstractMesh((), ()), AbstractMesh((8, 8, 8), NAMES, axis_types=(AxisType.Explicit,) * 3)
    with jax.sharding.use_abstract_mesh(none), jax.sharding.use_abstract_mesh(large):     # first out of the 2x2x2
        leaf, = jax.tree.leaves(jax.eval_shape(Module))
    assert leaf.shape == (2**20, 2**19) and leaf.sharding.spec == P(("expert", "tensor"), None)
    assert leaf.sharding.shard_shape(leaf.shape) == (2**14, 2**19)


def test_a_contraction_over_a_split_dim_must_say_where_it_goes():
    x_TF, w_FD = put(np.ones((4, 8), np.float32), None, "tensor"), put(np.ones((8, 6), np.float32), "tensor", None)
    with pytest.raises(Exception, match="out_sharding"):
        jnp.einsum("tf,fd->td", x_TF, w_FD)
    out_TD = jnp.einsum("tf,fd->td", x_TF, w_FD, out_sharding=P(None, None))
    assert spec_of(out_TD) == P(None, None) and (out_TD == 8).all()


def test_bfloat16_products_can_accumulate_in_float32():
    """257 ones: bfloat16 counts to 256."""
    ones = jnp.ones((257,), jnp.bfloat16)
    total = jnp.einsum("d,d->", ones, ones, preferred_element_type=jnp.float32)
    assert total.dtype == jnp.float32 and total == 257


def test_gather_from_a_split_vocabulary():
    table_WD = put(np.arange(32, dtype=np.float32).reshape(16, 2), ("expert", "tensor"), None)
    tokens_BT = put(np.array([[0, 15, 3], [7, 8, 8]], np.int32), "data", None)
    with pytest.raises(Exception, match="out_sharding"):
        table_WD[tokens_BT]
    x_BTD = jax.jit(lambda w, t: w.at[t].get(out_sharding=P("data", None, None)))(table_WD, tokens_BT)
    assert spec_of(x_BTD) == P("data", None, None)
    np.testing.assert_array_equal(x_BTD, np.asarray(table_WD)[np.asarray(tokens_BT)])


def test_scatter_drops_what_is_out_of_range():
    """Rows split over data, heads over tensor; slot 4 of 4 does not exist. Negative slots would count from the end."""
    cache_BKSV = put(np.zeros((2, 2, 4, 3), np.float32), "data", "tensor", None, None)
    new_BTKV = put(np.ones((2, 3, 2, 3), np.float32), "data", None, "tensor", None)
    slot_BT, row_B = put(np.array([[3, 4, 4], [4, 0, 1]], np.int32), "data", None), np.arange(2, dtype=np.int32)

    @jax.jit
    def write(cache, slot, new):
        return cache.at[row_B[:, None], :, slot].set(new, mode="drop", out_sharding=P("data", "tensor", None, None))

    out = write(cache_BKSV, slot_BT, new_BTKV)
    assert spec_of(out) == P("data", "tensor", None, None)
    np.testing.assert_array_equal(np.asarray(out)[:, 0, :, 0], [[0, 0, 0, 1], [1, 1, 0, 0]])
    assert np.asarray(write(cache_BKSV, slot_BT - 4, new_BTKV)).sum() > np.asarray(out).sum()


def test_reshape_keeps_a_split_of_the_outer_part():
    heads = put(np.zeros((2, 3, 8, 5), np.float32), "data", None, "tensor", None)
    grouped = jax.lax.reshape(heads, (2, 3, 4, 2, 5), out_sharding=P("data", None, "tensor", None, None))
    assert spec_of(grouped) == P("data", None, "tensor", None, None)


def test_asarray_ignores_out_sharding_for_host_arrays():
    """So host arrays are placed by device_put or make_array_from_callback; the day this fails, jnp.asarray will do."""
    assert spec_of(jnp.asarray(np.ones((4, 4), np.float32), out_sharding=P("data", "tensor"))) != P("data", "tensor")


def test_take_along_axis_keeps_the_batch_split():
    x_BTD = put(np.arange(24, dtype=np.float32).reshape(4, 3, 2), "data", None, None)
    at_B11 = put(np.array([0, 2, 1, 2], np.int32), "data")[:, None, None]
    out = jax.jit(lambda x, at: jnp.take_along_axis(x, at, axis=1))(x_BTD, at_B11)
    assert spec_of(out) == P("data", None, None)
    np.testing.assert_array_equal(out[:, 0, 0], [0, 10, 14, 22])


def test_arrays_come_from_host_callbacks_slice_by_slice(mesh):
    host, asked = np.arange(64).reshape(8, 8), []
    x = jax.make_array_from_callback((8, 8), NamedSharding(mesh, P("data", "tensor")),
                                     lambda index: asked.append(index) or host[index])
    assert {host[index].shape for index in asked} == {(4, 4)}
    np.testing.assert_array_equal(x, host)


def test_remainders_have_the_sign_of_the_divisor():
    """Ring slots of positions before 0."""
    np.testing.assert_array_equal(jnp.array([-1, -5, 7], jnp.int32) % 4, [3, 3, 3])


# --- shard_map

def test_shard_map_takes_specs_from_the_types_and_checks_them():
    x_ED = put(np.arange(8, dtype=np.float32).reshape(4, 2), "expert", None)

    def total(x_eD):
        assert x_eD.shape == (2, 2)
        return jax.lax.psum(x_eD + jax.lax.axis_index("expert").astype(jnp.float32), "expert")

    np.testing.assert_array_equal(jax.jit(jax.shard_map(total, out_specs=P(None, None)))(x_ED), [[5, 7], [9, 11]])
    with pytest.raises(ValueError, match="expert"):      # without the sum devices differ, so P() would be a lie
        jax.shard_map(lambda x_eD: x_eD, out_specs=P())(x_ED)


def test_platform_dependent_inside_shard_map():
    """The CPU's branch runs here; both are checked against the same varying type, hence the pcast."""
    x_D, w_ED = put(np.ones(3, np.float32), None), put(np.ones((4, 3), np.float32), "expert", None)

    def share(x_D, w_eD):
        x_D = jax.lax.pcast(x_D, ("expert", "tensor"), to="varying")
        w_eD = jax.lax.pcast(w_eD, "tensor", to="varying")
        out_D = jax.lax.platform_dependent(x_D, w_eD, cpu=lambda x, w: x * w.sum(0), default=lambda x, w: x * jnp.nan)
        return jax.lax.psum(out_D, ("expert", "tensor"))

    np.testing.assert_array_equal(jax.jit(jax.shard_map(share, out_specs=P(None)))(x_D, w_ED), [8, 8, 8])


def test_ragged_dot_groups():
    """Rows go to experts in order; an expert may have none. Rows past the last group may hold anything."""
    x_RD, w_EDI = np.ones((6, 2), np.float32), np.stack([np.full((2, 1), i, np.float32) for i in (1, 2, 3)])
    run = jax.jit(jax.shard_map(jax.lax.ragged_dot, out_specs=P(None, None)))
    out_RI = run(x_RD, w_EDI, np.array([2, 0, 3], np.int32))
    np.testing.assert_array_equal(out_RI[:5, 0], [2, 2, 6, 6, 6])


# --- modules and caches

class Counting(nnx.Module):
    def __init__(self, size: int):
        self.size, self.scale_D = size, nnx.Param(jnp.ones((size,)))
        self.absent = None
        self.parts = nnx.List([nnx.Param(jnp.zeros(())) for _ in range(2)])

    def __call__(self, x_D: jax.Array) -> jax.Array:
        return x_D * self.scale_D[...] if self.absent is None else x_D


def test_modules_are_pytrees_without_global_flags():
    """jit takes them as they are; numbers and None in them are static, so an equal module compiles nothing new."""
    traces = []

    @jax.jit
    def run(module: Counting, x_D: jax.Array) -> jax.Array:
        traces.append(module.size)
        return module(x_D)

    module = Counting(3)
    assert [leaf.shape for leaf in jax.tree.leaves(module)] == [(), (), (3,)]
    doubled = jax.tree.map(lambda x: 2 * x, module)
    assert isinstance(doubled, Counting) and doubled.size == 3
    np.testing.assert_array_equal(run(module, jnp.arange(3.0)) + run(doubled, jnp.arange(3.0)), [0, 3, 6])
    run(Counting(3), jnp.arange(3.0))
    assert traces == [3]


def test_paths_of_leaves_spell_the_attributes():
    paths = [[getattr(key, "name", getattr(key, "key", getattr(key, "idx", None))) for key in path]
             for path, _ in jax.tree_util.tree_leaves_with_path(Counting(3))]
    assert paths == [["parts", 0, "value"], ["parts", 1, "value"], ["scale_D", "value"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pair:
    k: jax.Array
    v: jax.Array


def test_a_donated_dataclass_is_used_up():
    """Its buffers become those of the result: no copy, no warning (warnings are errors here), no further use."""
    old = Pair(put(np.zeros((4, 4), np.float32), "data", "tensor"), put(np.zeros((4, 2), np.float32), "data", None))
    address = [shard.data.unsafe_buffer_pointer() for shard in old.k.addressable_shards]
    new = jax.jit(lambda pair: jax.tree.map(lambda x: x + 1, pair), donate_argnums=0)(old)
    assert old.k.is_deleted() and old.v.is_deleted() and not new.k.is_deleted()
    assert [shard.data.unsafe_buffer_pointer() for shard in new.k.addressable_shards] == address
    with pytest.raises(RuntimeError, match="deleted"):
        old.k + 1


def test_a_donation_that_cannot_be_is_a_warning():
    with pytest.warns(UserWarning, match="donated"):
        jax.jit(lambda x: x[:1] * 2, donate_argnums=0)(jnp.arange(4.0)).block_until_ready()
