"""Parameters onto meshes: the right values, each slice read once, kv heads repeated, NaN and Inf told."""
import math
import re
import warnings

import jax
import ml_dtypes
import numpy as np
import pytest
from hub_files import edit_json, edit_tensors, whole
from hub_maker import tiny_config, write_hub
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.checkpoint import CheckpointError, blocks, convert, load_arrays, open_source
from jaxllm.checkpoint.blocks import bounds, chunk_shape, count_nonfinite, cut_shape, grid, relative

AXES = {"E": "expert", "N": "tensor", "K": "tensor", "W": "tensor", "F": "tensor", "I": "tensor"}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    write_hub(folder, tiny_config(), mtp=1, shards=2)
    return folder


@pytest.fixture(scope="module")
def converted(hub):
    return convert(hub, hub.parent / "converted", progress=False).folder


@pytest.fixture(params=["hub", "converted"])
def source(request):
    return open_source(request.getfixturevalue(request.param))


def targets(source, shape=(2, 2, 2), dtype=None, heads=None, mtp=True) -> dict[str, jax.ShapeDtypeStruct]:
    """What a model on a (data, expert, tensor) mesh of `shape` would want; `heads` widens K of keys and values."""
    mesh = jax.make_mesh(shape, ("data", "expert", "tensor"))
    wanted = {}
    for path, (dims, stored) in source.params.items():
        letters = path.rsplit("_", 1)[-1]
        if heads and letters in ("DKH", "DKV"):
            dims = (dims[0], heads, dims[2])
        spec = PartitionSpec(*(AXES.get(letter) for letter in letters))
        if mtp or not path.startswith("mtp."):
            wanted[path] = jax.ShapeDtypeStruct(dims, dtype or stored, sharding=NamedSharding(mesh, spec))
    return wanted


def stored(source, path) -> np.ndarray:
    return source.read(path, whole(source.params[path][0]))


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2)])
def test_values_and_shardings_on_any_mesh(source, shape):
    wanted = targets(source, shape)
    for path, array in load_arrays(source, wanted).items():
        assert array.sharding == wanted[path].sharding and array.dtype == wanted[path].dtype
        np.testing.assert_array_equal(np.asarray(array), stored(source, path), err_msg=path)
        for shard in array.addressable_shards:
            assert shard.data.shape == wanted[path].sharding.shard_shape(array.shape)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_values_are_cast_on_the_host(tmp_path, dtype):
    write_hub(tmp_path, tiny_config(), dtype="bfloat16")
    source = open_source(tmp_path)
    for path, array in load_arrays(source, targets(source, dtype=np.dtype(dtype))).items():
        assert array.dtype == dtype
        np.testing.assert_array_equal(np.asarray(array), stored(source, path).astype(dtype), err_msg=path)


@pytest.mark.parametrize("shape", [(1, 1, 8), (1, 2, 4), (2, 2, 2)])
def test_kv_heads_are_repeated_where_the_model_wants_more(source, shape):
    """8 heads wanted of 2 (full layers) and 4 (sliding): head j of the model is stored head j // repeats."""
    for path, array in load_arrays(source, targets(source, shape, heads=8)).items():
        expected = stored(source, path)
        if path.endswith(("k_DKH", "v_DKV")):
            expected = np.stack([expected[:, j * expected.shape[1] // 8] for j in range(8)], axis=1)
        np.testing.assert_array_equal(np.asarray(array), expected, err_msg=path)


def test_several_copies_of_a_head_on_one_device(source):
    """16 heads wanted of 2 on 4 devices: each holds 4 copies of one head."""
    path = "layers.0.attention.k_DKH"
    array = load_arrays(source, targets(source, (1, 2, 4), heads=16))[path]
    np.testing.assert_array_equal(np.asarray(array), np.repeat(stored(source, path), 8, axis=1))


class Counting:
    """A source that notes what is read of it."""

    def __init__(self, source):
        self.source, self.folder, self.params, self.reads = source, source.folder, source.params, []
        self.describe = source.describe

    def read(self, path, index):
        self.reads.append((path, bounds(index, self.params[path][0])))
        return self.source.read(path, index)


def test_each_slice_is_read_once_for_all_its_devices(source):
    counting = Counting(source)
    load_arrays(counting, targets(source, (2, 2, 2), heads=8))
    assert len(set(counting.reads)) == len(counting.reads)
    elements = sum(math.prod(stop - start for start, stop in cut) for _, cut in counting.reads)
    assert elements == sum(math.prod(shape) for shape, _ in source.params.values())


def test_a_device_reads_its_own_slice_and_no_more(source):
    """What the first device of a 1x4x2 mesh needs, as a process that has only this device would read it."""
    counting, path = Counting(source), "layers.1.moe.gate_EDI"
    first = jax.devices()[0]
    sharding = targets(source, (1, 4, 2))[path].sharding
    index = sharding.devices_indices_map(source.params[path][0])[first]
    alone = jax.ShapeDtypeStruct(cut_shape(index, source.params[path][0]), np.float32,
                                 sharding=jax.sharding.SingleDeviceSharding(first))
    assert alone.shape == (2, 64, 16)
    wanted = targets(source, (1, 4, 2))
    load_arrays(counting, wanted)
    cuts = [bounds(cut, source.params[path][0]) for cut in sharding.devices_indices_map((8, 64, 32)).values()]
    expected = {((expert, expert + 1), *cut[1:]) for cut in cuts for expert in range(*cut[0])}      # one at a time
    assert {cut for at, cut in counting.reads if at == path} == expected and len(expected) == 16


def test_reading_in_small_blocks_changes_nothing(source, monkeypatch):
    """With a limit of 1 KB every larger parameter comes in pieces, none above the limit."""
    expected = {path: np.asarray(array) for path, array in load_arrays(source, targets(source)).items()}
    monkeypatch.setattr(blocks.chunk_shape, "__defaults__", (1024,))
    counting = Counting(source)
    found = load_arrays(counting, targets(source))
    for path, array in expected.items():
        np.testing.assert_array_equal(np.asarray(found[path]), array, err_msg=path)
    assert max(math.prod(stop - start for start, stop in cut) * 4 for _, cut in counting.reads) <= 1024
    assert len(counting.reads) > 500


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_nan_and_inf_are_told_once_for_each_parameter(tmp_path, dtype):
    write_hub(tmp_path / "hub", tiny_config(), dtype=dtype)

    def spoil(tensors):
        tensors["model.layers.1.mlp.experts.3.up_proj.weight"][5, 2] = np.nan
        tensors["model.layers.1.mlp.experts.6.up_proj.weight"][0, :2] = np.inf
        tensors["lm_head.weight"][7, 0] = -np.inf
        norm = tensors["model.norm.weight"]
        norm[0] = ml_dtypes.finfo(norm.dtype).max      # large, but a number
    edit_tensors(tmp_path / "hub", spoil)
    expected = ["head_DW .* has 1 NaN or Inf values, the first at [0, 7]",
                "layers.1.moe.up_EDI .* has 3 NaN or Inf values, the first at [3, 2, 5]"]
    for action in (lambda: convert(tmp_path / "hub", tmp_path / "out", progress=False),
                   lambda: load_all(tmp_path / "hub"), lambda: load_all(tmp_path / "out")):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            action()
        messages = sorted(str(warning.message) for warning in caught)
        assert len(messages) == 2
        for pattern, message in zip(expected, messages, strict=True):
            assert re.match(re.escape(pattern).replace(r"\.\*", ".*"), message), message


def load_all(folder):
    source = open_source(folder)
    return load_arrays(source, targets(source))


def test_the_warning_names_the_hubs_tensor(tmp_path):
    write_hub(tmp_path, tiny_config())
    edit_tensors(tmp_path, lambda tensors: tensors["lm_head.weight"].fill(np.nan))
    with pytest.warns(UserWarning, match=f"head_DW .*{tmp_path}.*lm_head.weight.* has {96 * 64} NaN or Inf"):
        load_all(tmp_path)


def test_what_the_wanted_dtype_cannot_hold_is_told(tmp_path):
    write_hub(tmp_path, tiny_config())
    edit_tensors(tmp_path, lambda tensors: tensors["model.norm.weight"].fill(1e6))
    source = open_source(tmp_path)
    with pytest.warns(UserWarning, match="norm.scale_D .* has 64 NaN or Inf values"):
        load_arrays(source, targets(source, dtype=np.float16))


def test_missing_and_unwanted_parameters_are_one_error(source):
    wanted = targets(source)
    wanted["layers.9.mlp.gate_DF"] = wanted.pop("layers.0.mlp.gate_DF")
    with pytest.raises(CheckpointError, match="missing 1: layers.9.mlp.gate_DF; not wanted 1: layers.0.mlp.gate_DF;"):
        load_arrays(source, wanted)


def test_mtp_blocks_may_be_left(source):
    assert not any(path.startswith("mtp.") for path in load_arrays(source, targets(source, mtp=False)))


@pytest.mark.parametrize(("path", "shape"), [
    ("norm.scale_D", (65,)), ("embed_WD", (64, 96)), ("layers.0.attention.k_DKH", (64, 3, 24)),
    ("layers.0.attention.k_DKH", (64, 1, 24)), ("layers.0.attention.k_DKH", (64, 4, 23)),
    ("layers.0.attention.q_DNH", (64, 16, 24)),      # only kv heads are repeated
])
def test_a_shape_that_the_checkpoint_cannot_give(source, path, shape):
    wanted = targets(source, (1, 1, 1))
    wanted[path] = jax.ShapeDtypeStruct(shape, np.float32, sharding=wanted[path].sharding)
    with pytest.raises(CheckpointError, match=re.escape(f"{path} has shape") + ".*but the model wants"):
        load_arrays(source, wanted)


def test_a_target_without_sharding_or_of_integers(source):
    wanted = targets(source)
    for bad in (jax.ShapeDtypeStruct((64,), np.float32),
                jax.ShapeDtypeStruct((64,), np.int32, sharding=wanted["norm.scale_D"].sharding)):
        with pytest.raises(ValueError, match="norm.scale_D: wanted as"):
            load_arrays(source, wanted | {"norm.scale_D": bad})


def test_a_folder_that_is_no_checkpoint(tmp_path, hub):
    for folder in (tmp_path, tmp_path / "nowhere", hub / "config.json"):
        with pytest.raises(CheckpointError, match="holds no model: expected a hub folder"):
            open_source(folder)


def test_a_hub_folder_without_config(tmp_path):
    write_hub(tmp_path, tiny_config())
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json"):
        open_source(tmp_path)


def test_a_checkpoint_of_another_config(tmp_path):
    write_hub(tmp_path, tiny_config())
    edit_json(tmp_path / "config.json", lambda config: config.update(vocab_size=97))
    with pytest.raises(CheckpointError, match="'lm_head.weight' has shape"):
        open_source(tmp_path)


@settings(deadline=None)
@given(data=st.data())
def test_blocks_cover_a_slice_once_and_stay_below_the_limit(data):
    """For any shape, limit and slice: the blocks are disjoint, fill the slice, and none is above the limit."""
    letters = data.draw(st.sampled_from(["D", "WD", "EDI", "DKH", "NVD"]))
    shape = tuple(data.draw(st.integers(1, 9)) for _ in letters)
    limit = data.draw(st.integers(4, 200))
    index = tuple(slice(start, data.draw(st.integers(start, size)))
                  for size in shape for start in [data.draw(st.integers(0, size))])
    chunk, filled = chunk_shape(f"layers.0.x_{letters}", shape, 4, limit), np.zeros(cut_shape(index, shape), int)
    assert math.prod(chunk) * 4 <= limit
    for block in grid(index, shape, chunk):
        filled[relative(block, index, shape)] += 1
        assert all(s.start // step == (s.stop - 1) // step for s, step in zip(block, chunk, strict=True))
    assert (filled == 1).all()


def test_chunks_of_the_released_models_follow_experts_and_heads():
    """Flash: one expert of 16 MiB a chunk; 16 of 64 heads; 2,384 rows of the embedding. Pro: one expert of 24 MiB."""
    assert chunk_shape("layers.1.moe.gate_EDI", (256, 4096, 2048), 2) == (1, 4096, 2048)
    assert chunk_shape("layers.1.moe.down_EID", (384, 2048, 6144), 2) == (1, 2048, 6144)
    assert chunk_shape("layers.1.attention.q_DNH", (4096, 64, 192), 2) == (4096, 16, 192)
    assert chunk_shape("embed_WD", (152576, 4096), 2) == (2384, 4096)
    assert chunk_shape("layers.0.mlp.down_FD", (16384, 4096), 2) == (4096, 4096)
    assert chunk_shape("layers.1.moe.router_DE", (4096, 256), 4) == (4096, 256)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_counting_what_is_not_finite(dtype):
    values = np.array([[0, -0.0, np.nan], [np.inf, -np.inf, 1], [ml_dtypes.finfo(dtype).max, -1, 5]], dtype)
    assert count_nonfinite(values) == count_nonfinite(values.T) == 3


@pytest.mark.parametrize("index", [np.s_[:,], np.s_[:, :, :], np.s_[::2, :]])
def test_an_index_that_does_not_fit(index):
    with pytest.raises(ValueError, match="expected one slice of step 1 for each dim"):
        bounds(index, (3, 4))
