"""Safetensors files and their index: what is read equals numpy's slices; what is wrong is refused before reading."""
import json
import struct

import ml_dtypes
import numpy as np
import pytest
from hub_files import edit_json, whole, write_raw
from hub_maker import tiny_config, write_hub
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jaxllm.checkpoint import tensorfile
from jaxllm.checkpoint.errors import CheckpointError
from jaxllm.checkpoint.hub import INDEX, HubCheckpoint
from jaxllm.checkpoint.tensorfile import read_header, read_tensor


@pytest.fixture
def sharded(tmp_path):
    write_hub(tmp_path, tiny_config(), shards=3)
    return tmp_path


def test_every_tensor_is_read_bit_for_bit(tmp_path):
    write_hub(tmp_path, tiny_config(), dtype="bfloat16", shards=3, mtp=1)
    hub, expected = HubCheckpoint(tmp_path), {}
    for file in tmp_path.glob("*.safetensors"):
        expected |= load_file(file)
    assert hub.tensors.keys() == expected.keys()
    for name, array in expected.items():
        found = hub.read(name, whole(array.shape))
        assert found.dtype == array.dtype and found.shape == array.shape and found.tobytes() == array.tobytes()


@pytest.mark.parametrize(("worth_a_call", "scratch"), [(4096, 2**23), (1, 2**23), (4096, 300), (4096, 1)])
def test_slices_equal_numpys_whichever_way_they_are_read(tmp_path, monkeypatch, worth_a_call, scratch):
    """Row by row, in blocks of many rows, of two rows, of single rows; the last block ends with the file."""
    monkeypatch.setattr(tensorfile, "WORTH_A_CALL", worth_a_call)
    monkeypatch.setattr(tensorfile, "SCRATCH", scratch)
    matrix = np.random.default_rng(0).standard_normal((37, 33)).astype(ml_dtypes.bfloat16)
    save_file({"m": matrix}, tmp_path / "x.safetensors")
    info = read_header(tmp_path / "x.safetensors")["m"]
    for index in np.s_[3:30, :], np.s_[:, 5:7], np.s_[36:, 32:], np.s_[2:20, 30:33], np.s_[4:4, :], np.s_[:, :]:
        assert read_tensor(info, index).tobytes() == np.ascontiguousarray(matrix[index]).tobytes()


def test_only_the_wanted_bytes_are_read(tmp_path, monkeypatch):
    matrix = np.arange(100 * 4096, dtype=np.float32).reshape(100, 4096)
    save_file({"m": matrix}, tmp_path / "x.safetensors")
    counts, preadv = [], tensorfile.os.preadv
    monkeypatch.setattr(tensorfile.os, "preadv", lambda *args: counts.append(preadv(*args)) or counts[-1])
    info = read_header(tmp_path / "x.safetensors")["m"]
    read_tensor(info, np.s_[10:20, :])
    read_tensor(info, np.s_[:, 1024:2048])
    assert sum(counts) == 10 * 4096 * 4 + 100 * 1024 * 4


def test_scalars_and_vectors(tmp_path):
    arrays = {"scalar": np.array(3, np.float32), "vector": np.arange(9, dtype=np.float16),
              "none": np.zeros((0, 4), np.int32)}
    save_file(arrays, tmp_path / "x.safetensors")
    header = read_header(tmp_path / "x.safetensors")
    assert read_tensor(header["scalar"], ()) == 3
    np.testing.assert_array_equal(read_tensor(header["vector"], np.s_[2:5,]), [2, 3, 4])
    assert read_tensor(header["none"], np.s_[:, :]).shape == (0, 4)


ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
SECOND = {"dtype": "F32", "shape": [3], "data_offsets": [24, 36]}


@pytest.mark.parametrize(("header", "data", "message"), [
    (b"[1, 2]", 0, "expected a JSON object, found list"),
    (b"{'a': 1}", 0, "not valid JSON"),
    (b"\xff\xfe", 0, "not valid JSON"),
    (b"[" * 100_000, 0, "not valid JSON"),
    (b'{"a": 1, "a": 1}', 0, "'a' is given twice"),
    ({"a": 5}, 0, "header entry of 'a' is 5"),
    ({"a": ENTRY | {"shape": [2, -3]}}, 24, "header entry of 'a'"),
    ({"a": ENTRY | {"shape": [True, 6]}}, 24, "header entry of 'a'"),
    ({"a": ENTRY | {"shape": "23"}}, 24, "header entry of 'a'"),
    ({"a": ENTRY | {"data_offsets": [0]}}, 24, "header entry of 'a'"),
    ({"a": {"dtype": "F32", "shape": [6]}}, 24, "header entry of 'a'"),
    ({"a": ENTRY | {"dtype": "F4"}}, 24, "unknown dtype 'F4'; known: F64"),
    ({"a": ENTRY | {"dtype": ["F32"]}}, 24, "unknown dtype"),
    ({"a": ENTRY | {"shape": [2, 4]}}, 24, "which is 32 bytes, but its data_offsets .* span 24"),
    ({"a": ENTRY | {"data_offsets": [0, 20]}}, 24, "which is 24 bytes, but its data_offsets .* span 20"),
    ({"a": ENTRY, "b": SECOND | {"data_offsets": [20, 32]}}, 36, "'b' begins at byte 20 .* overlaps"),
    ({"a": ENTRY, "b": SECOND | {"data_offsets": [28, 40]}}, 40, "'b' begins at byte 28 .* hole"),
    ({"a": ENTRY, "b": ENTRY}, 24, "overlaps"),
    ({"a": ENTRY}, 20, "is truncated: its header describes"),
    ({"a": ENTRY, "b": SECOND}, 24, "is truncated"),
    ({"a": ENTRY}, 28, "has bytes that belong to no tensor"),
    ({}, 1, "has bytes that belong to no tensor"),
])
def test_a_header_that_lies_is_refused(tmp_path, header, data, message):
    file = write_raw(tmp_path / "x.safetensors", header, bytes(data))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("length", [200, 10**6, 2**63, 2**64 - 1])
def test_a_header_length_beyond_the_file_is_refused(tmp_path, length):
    file = write_raw(tmp_path / "x.safetensors", {"a": ENTRY}, b"", length=length)
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        read_header(file)


def test_a_header_above_the_formats_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorfile, "MAX_HEADER", 10)
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        read_header(write_raw(tmp_path / "x.safetensors", {"a": ENTRY}, bytes(24)))


@pytest.mark.parametrize("keep", [0, 3, 8, 40, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    write_hub(tmp_path, tiny_config())
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="truncated"):
        HubCheckpoint(tmp_path)


def test_a_file_cut_after_opening_is_noticed(tmp_path):
    write_hub(tmp_path, tiny_config())
    hub = HubCheckpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cut after it was opened"):
        hub.read("model.norm.weight", np.s_[:,])
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        hub.read("model.norm.weight", np.s_[:,])


@settings(deadline=None, max_examples=300)      # each example writes a file: time depends on the disk
@given(data=st.data())
def test_no_damaged_byte_breaks_the_parser(tmp_path_factory, data):
    """Whatever is changed in the first bytes, the file is read as consistent or refused: no other error."""
    file = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    write_raw(file, {"__metadata__": {"format": "pt"}, "a": ENTRY, "b": SECOND}, bytes(36))
    content = bytearray(file.read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(content) - 37), min_size=1, max_size=4)):
        content[position] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        for info in read_header(file).values():
            if len(info.shape) <= 2:
                read_tensor(info, whole(info.shape))
    except CheckpointError:
        pass


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"not in the folder \(1: model-00002-of-00003.safetensors\)"):
        HubCheckpoint(sharded)


def test_an_index_that_names_absent_tensors_is_refused(sharded):
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({"ghost": "model-00001-of-00003.safetensors"}))
    with pytest.raises(CheckpointError, match="names tensors that no shard holds .*ghost in model-00001"):
        HubCheckpoint(sharded)


def test_an_index_that_names_the_wrong_shard_is_refused(sharded):
    edit_json(sharded / INDEX,
              lambda index: index["weight_map"].update({"model.norm.weight": "model-00001-of-00003.safetensors"}))
    with pytest.raises(CheckpointError, match="wrong shard .*model.norm.weight: model-0000[23]-.*, not model-00001"):
        HubCheckpoint(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded):
    first = load_file(sharded / "model-00001-of-00003.safetensors")
    save_file(first | load_file(sharded / "model-00002-of-00003.safetensors"),
              sharded / "model-00002-of-00003.safetensors")
    with pytest.raises(CheckpointError, match="both in .*model-00001.* and in .*model-00002.*embed_tokens"):
        HubCheckpoint(sharded)


def test_a_tensor_that_the_index_forgets_is_still_seen(sharded):
    """The table decides about it, as about any other."""
    edit_json(sharded / INDEX, lambda index: index["weight_map"].pop("model.norm.weight"))
    assert "model.norm.weight" in HubCheckpoint(sharded).tensors


@pytest.mark.parametrize("name", ["/etc/x.safetensors", "../x.safetensors", "a/../../x.safetensors", "", "..", 3, None,
                                  "a\\..\\x.safetensors", "x\0.safetensors", "./model.safetensors", "config.json",
                                  "x" * 300 + ".safetensors"])
def test_an_index_cannot_leave_the_folder(tmp_path, name):
    folder = tmp_path / "hub"
    write_hub(folder, tiny_config(), shards=2)
    save_file({"model.norm.weight": np.zeros(64, np.float32)}, tmp_path / "x.safetensors")
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    with pytest.raises(CheckpointError, match="'model.norm.weight' is said to be in .* inside the folder"):
        HubCheckpoint(folder)


def test_links_out_of_the_folder_are_followed(tmp_path):
    """Hub caches are folders of links into a store of blobs."""
    write_hub(tmp_path / "blobs", tiny_config(), shards=2)
    (tmp_path / "hub").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "hub" / file.name).symlink_to(file)
    assert HubCheckpoint(tmp_path / "hub").tensors.keys() == HubCheckpoint(tmp_path / "blobs").tensors.keys()


def test_files_in_a_folder_below_may_be_named(tmp_path):
    write_hub(tmp_path, tiny_config())
    (tmp_path / "parts").mkdir()
    (tmp_path / "model.safetensors").rename(tmp_path / "parts/a.safetensors")
    names = dict.fromkeys(load_file(tmp_path / "parts/a.safetensors"), "parts/a.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": names}))
    assert HubCheckpoint(tmp_path).tensors.keys() == names.keys()


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', "not json",
                                     '{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}'])
def test_a_broken_index_is_refused(sharded, content):
    (sharded / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=INDEX):
        HubCheckpoint(sharded)


def test_a_folder_without_weights_says_what_is_missing(sharded, tmp_path):
    (sharded / INDEX).unlink()
    with pytest.raises(CheckpointError, match="it holds shards .*model-00001-of-00003.safetensors.* index is missing"):
        HubCheckpoint(sharded)
    with pytest.raises(CheckpointError, match="holds neither model.safetensors nor"):
        HubCheckpoint(tmp_path / "nowhere")


def test_a_folder_in_the_place_of_a_file(tmp_path):
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path / "x.safetensors")


def test_header_length_is_little_endian(tmp_path):
    """The independent writer and this reader agree on the first eight bytes."""
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    assert json.loads(content[8:8 + struct.unpack("<Q", content[:8])[0]])["a"]["shape"] == [1]
