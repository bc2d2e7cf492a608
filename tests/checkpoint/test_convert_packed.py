"""Converting packed layouts: codes and scales bit for bit, also by plain Orbax; and folders that are not on a disk."""
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hub_files import SMALL, assert_same, whole
from hub_maker import tiny_config
from make_release import write_release
from packed_files import write_packed
from release_cases import CASES

from jaxllm.checkpoint import CheckpointError, convert, open_source
from jaxllm.checkpoint.files import Files
from jaxllm.checkpoint.hubsource import HubSource
from jaxllm.checkpoint.incomplete import is_incomplete
from jaxllm.checkpoint.manifest import read_manifest
from jaxllm.checkpoint.store import PARAMS
from jaxllm.checkpoint.verify import verify
from jaxllm.generate.load import load


@pytest.mark.parametrize("case", ["v2_flash", "v25", "v26_pro"])
def test_released_layouts(tmp_path, out, case):
    """Bit for bit as they are read, restored by plain Orbax onto eight devices, and the reading noted."""
    config, options = CASES[case]
    write_release(config, tmp_path / "hub", **options, shards=3)
    done = convert(tmp_path / "hub", out, progress=False)
    assert_same(tmp_path / "hub", out)
    source, hub = open_source(out), HubSource(tmp_path / "hub")
    assert done.num_mtp == 3 and read_manifest(out).plan.reading == hub.reading
    assert any(path.endswith(".scale") for path in source.params)
    mesh = jax.make_mesh((8,), ("expert",))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(out / PARAMS, {
            path: jax.ShapeDtypeStruct(shape, dtype, sharding=spread) for path, (shape, dtype) in hub.params.items()})
    for path, (shape, dtype) in hub.params.items():
        assert restored[path].dtype == dtype
        assert np.asarray(restored[path]).tobytes() == source.read(path, whole(shape)).tobytes(), path
    verify(out, tmp_path / "hub", progress=False)


def test_chunks_at_the_edges_are_padded(tmp_path, out, monkeypatch):
    """A dim that does not halve is cut unevenly, and zarr's last chunk has the size of the others."""
    write_packed(tmp_path / "hub", tiny_config(**SMALL, vocab_size=97), "mxfp4", weight_block_size=[16, 16])
    monkeypatch.setattr("jaxllm.checkpoint.blocks.chunk_shape.__defaults__", (1000,))
    convert(tmp_path / "hub", out, progress=False)
    assert len({path.stat().st_size for path in (out / PARAMS / "embed_WD").glob("[0-9]*")}) == 1
    monkeypatch.undo()
    assert_same(tmp_path / "hub", out)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(out / PARAMS)
    expected = HubSource(tmp_path / "hub").read("embed_WD", whole((97, 64)))
    assert np.asarray(restored["embed_WD"]).tobytes() == expected.tobytes()


def test_an_address_instead_of_a_folder(hub, out, monkeypatch):
    """TensorStore's store in memory stands in for a bucket: the same files, refusals, resumption and checks."""
    place, real = f"memory://{out}", HubSource.read
    convert(hub, out, progress=False)
    files = Files(place)
    monkeypatch.setattr("jaxllm.checkpoint.journal.EVERY_SECONDS", 0)

    def fail(self, path, index):
        if path == "norm.scale_D":
            raise CheckpointError("read failed")
        return real(self, path, index)
    monkeypatch.setattr(HubSource, "read", fail)
    with pytest.raises(CheckpointError, match="read failed"):
        convert(hub, place, progress=False)
    monkeypatch.setattr(HubSource, "read", real)
    assert is_incomplete(place)
    with pytest.raises(CheckpointError, match=f"{place} is a conversion .*that is not finished"):
        open_source(place)
    with pytest.raises(CheckpointError, match="was interrupted: run again with --resume"):
        convert(hub, place, progress=False)
    done = convert(hub, place, resume=True, progress=False)
    assert done.folder == place and not is_incomplete(place)
    assert {name: files.read(name) for name in files.names()} == {
        str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    source = open_source(place)
    assert source.params == open_source(out).params
    assert source.read("embed_WD", (slice(3, 5), slice(0, 9))).tobytes() == open_source(out).read(
        "embed_WD", (slice(3, 5), slice(0, 9))).tobytes()
    verify(place, hub, progress=False)
    with pytest.raises(CheckpointError, match="already holds something"):
        convert(hub, place, progress=False)
    files.write("params/head_DW/0.0", b"")
    files.delete("params/embed_WD/0.0")
    with pytest.raises(CheckpointError, match="embed_WD/0.0 is missing; params/head_DW/0.0 has 0 bytes"):
        verify(place, progress=False)
    with pytest.raises(CheckpointError, match=f"{place}/params/embed_WD is damaged"):
        open_source(place).read("embed_WD", (slice(3, 5), slice(0, 9)))


def test_an_address_that_is_refused_is_left_as_it_was(hub, out):
    place = f"memory://{out}"
    with pytest.raises(ValueError, match="no such file"):
        convert(hub / "absent", place, progress=False)
    assert Files(place).names() == []
    Files(place).write("mine.txt", b"mine")
    with pytest.raises(CheckpointError, match="already holds something .*mine.txt"):
        convert(hub, place, resume=True, progress=False)
    assert Files(place).names() == ["mine.txt"]


def test_loading_from_an_address(tmp_path, out):
    """The small files come along, packed weights stay packed, and the logits are those of the folder."""
    config, options = CASES["v25"]
    write_release(config, tmp_path / "hub", **options)
    for place in (out, f"memory://{out}"):
        convert(tmp_path / "hub", place, progress=False)
    folder, address = (load(place, "expert=2,tensor=2") for place in (out, f"memory://{out}"))
    assert address.config == folder.config and all(
        a.dtype == b.dtype and a.sharding == b.sharding
        for a, b in zip(*(jax.tree.leaves(model.transformer) for model in (address, folder)), strict=True))
    np.testing.assert_array_equal(address.logits([[1, 2, 3]]), folder.logits([[1, 2, 3]]))
    with pytest.raises(ValueError, match="memory://nothing has no config.json: expected the address of a folder"):
        load("memory://nothing")
