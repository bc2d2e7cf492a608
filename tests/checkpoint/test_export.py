"""Exporting: every layout comes back as it was released, decoded it has the values of an independent reading, and an
output is whole or absent."""
import errno
import fcntl
import json
import os
import shutil
import signal
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from hub_files import SMALL, edit_json, edit_tensors, listing, run, tree
from hub_maker import tiny_config, write_hub
from make_release import write_release
from packed_files import write_packed
from release_cases import CASES, FUSED, small_config
from release_reader import read_release, read_tensors
from safetensors import safe_open

from jaxllm.checkpoint import CheckpointError, convert, open_source, tensorwriter
from jaxllm.checkpoint.decoded import Decoded
from jaxllm.checkpoint.export import MTP_FILE, STAGE, export
from jaxllm.checkpoint.hub import INDEX, SINGLE
from jaxllm.checkpoint.hubsource import HubSource
from jaxllm.checkpoint.incomplete import LOCK, MARKER
from jaxllm.checkpoint.manifest import MANIFEST, read_manifest
from jaxllm.checkpoint.shards import COPIED

STATED = {"one_kv_head_split": "stacked"}      # its shapes fit two readings
BF16 = ml_dtypes.bfloat16


def converted(folder, reading=None):
    """A conversion of `folder` beside it."""
    out = folder.with_name(f"{folder.name}-converted")
    convert(folder, out, reading=reading, progress=False)
    return out


def assert_same_tensors(first, second):
    first, second = read_tensors(first), read_tensors(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert (value.dtype, value.shape) == (second[name].dtype, second[name].shape), name
        assert value.tobytes() == second[name].tobytes(), name


def read_json(file):
    return json.loads(file.read_text())


@pytest.fixture
def small(hub, tmp_path):
    """A converted float32 model with one MTP block."""
    return converted(hub)


@pytest.fixture
def back(tmp_path):
    return tmp_path / "again" / "hub"      # the folder above it is made too


# ---- round trip --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("case", CASES)
def test_every_release_comes_back(case, tmp_path, back):
    config, options = CASES[case]
    write_release(config, tmp_path / "hub", **options)
    store = converted(tmp_path / "hub", STATED.get(case))
    done = export(store, back, shard_bytes=10**6, progress=False)
    assert_same_tensors(tmp_path / "hub", back)
    assert read_json(back / "config.json") == read_json(tmp_path / "hub/config.json")
    stated, made = (read_json(folder / INDEX)["metadata"] for folder in (tmp_path / "hub", back))
    assert stated.items() <= made.items()
    if config.get("attention_projection_layout") == "fused_qkv" and options.get("qkv") == "plain":
        assert made["tp_size"] == 1      # the tool's plain files leave it out
    again = converted(back, STATED.get(case))
    assert read_manifest(again).files == read_manifest(store).files
    assert tree(again / "params") == tree(store / "params")
    tensors = read_tensors(back)
    assert (done.folder, done.num_tensors, done.nbytes) == (back, len(tensors), made["total_size"])
    assert done.num_files == len(list(back.glob("*.safetensors"))) > 2


@pytest.mark.parametrize(("kind", "reading", "layout", "quantization"), [
    ("int4", None, {}, {}), ("int4", None, {}, {"group_size": 128}), ("int4", "ranks=4", FUSED, {}),
    ("fp8", "stacked", {}, {"weight_block_size": [32, 48]}), ("fp8", "ranks=4", FUSED, {"weight_block_size": [32, 48]}),
    ("mxfp4", "grid", {}, {}),
])
def test_all_matrices_packed_and_other_blocks(kind, reading, layout, quantization, tmp_path, back):
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 256}
    write_packed(tmp_path / "hub", small_config(**sizes, **layout), kind, reading or "grid", mtp=1, everything=True,
                 **quantization)
    export(converted(tmp_path / "hub", reading), back, progress=False)
    assert_same_tensors(tmp_path / "hub", back)
    assert read_json(back / "config.json") == read_json(tmp_path / "hub/config.json")


@pytest.mark.parametrize(("dtype", "fused", "mtp"), [("float32", False, 0), ("bfloat16", True, 2)])
def test_plain_weights_come_back(dtype, fused, mtp, tmp_path, back):
    write_hub(tmp_path / "hub", tiny_config(**SMALL), dtype=dtype, fused=fused, mtp=mtp)
    export(converted(tmp_path / "hub"), back, progress=False)
    assert_same_tensors(tmp_path / "hub", back)


def test_a_hub_folder_is_exported_as_its_conversion_is(tmp_path, back):
    config, options = CASES["one_kv_head_split"]
    write_release(config, tmp_path / "hub", **options)
    with pytest.raises(CheckpointError, match="several readings of its attention rows fit"):
        export(tmp_path / "hub", back, progress=False)
    export(tmp_path / "hub", back, reading="stacked", progress=False)
    export(converted(tmp_path / "hub", "stacked"), tmp_path / "second", progress=False)
    assert tree(back) == tree(tmp_path / "second")


# ---- decoding and splitting --------------------------------------------------------------------------------------

@pytest.mark.parametrize("weights", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", ["v2_flash", "v25", "v25_plain", "v26_pro", "bfloat16"])
def test_decoded_and_split_has_the_values_of_another_reading(case, weights, tmp_path, back):
    config, options = CASES[case]
    write_release(config, tmp_path / "hub", **options)
    done = export(converted(tmp_path / "hub"), back, weights=weights, layout="split", progress=False)
    expected = read_release(tmp_path / "hub", "plain" if options.get("qkv") == "plain" else None)
    stored, found = read_tensors(tmp_path / "hub"), read_tensors(back)
    assert found.keys() == expected.keys() and done.num_tensors == len(found)
    for name, value in found.items():
        routes = name.endswith((".mlp.gate.weight", "e_score_correction_bias"))
        dtype = stored[name].dtype if routes else np.dtype(BF16 if weights == "bfloat16" else weights)
        assert value.dtype == dtype, name
        np.testing.assert_array_equal(value, expected[name].astype(dtype), err_msg=name)
    assert HubSource(back).reading is None      # nothing is left to be read in another way
    assert "metadata" in read_json(back / INDEX) and "tp_size" not in read_json(back / INDEX)["metadata"]


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_config_of_decoded_weights(key, tmp_path, back):
    """What is stated otherwise is stated once; all else stays, unknown to us or not."""
    config, options = CASES["v25"]
    config = {name: value for name, value in config.items() if name != "torch_dtype"} | {
        key: "bfloat16", "vision_config": {"depth": 28}}
    write_release(config, tmp_path / "hub", **options)
    export(converted(tmp_path / "hub"), back, weights="float32", layout="split", progress=False)
    before, after = read_json(tmp_path / "hub/config.json"), read_json(back / "config.json")
    assert before.pop("quantization_config") and before | {
        key: "float32", "attention_projection_layout": "split"} == after


def test_decoded_and_still_fused(tmp_path, back):
    """The rows stay where they are, and the metadata says where, so that the export is read as its source was."""
    config, options = CASES["v25_plain"]
    write_release(config, tmp_path / "hub", **options)
    export(converted(tmp_path / "hub"), back, weights="float32", progress=False)
    assert read_json(back / INDEX)["metadata"] | {"total_size": 0} == {
        "total_size": 0, "save_format": "float32", "tp_size": 1}
    expected = read_release(tmp_path / "hub", "plain")
    for name, value in read_release(back, "plain").items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    assert HubSource(back).reading == "plain"


def test_int4_is_split_as_it_is(tmp_path, back):
    """Its scales belong to single rows, so rows may be dealt out without decoding."""
    write_packed(tmp_path / "hub", small_config(**FUSED, hidden_size=256, intermediate_size=256), "int4", "ranks=4")
    store = converted(tmp_path / "hub", "ranks=4")
    export(store, back, layout="split", progress=False)
    again, first = HubSource(back), open_source(store)
    assert "model.layers.0.self_attn.k_proj.weight_scale" in again.hub.tensors
    for path in first.params:
        index = tuple(slice(0, size) for size in first.params[path][0])
        assert again.read(path, index).tobytes() == first.read(path, index).tobytes(), path


@pytest.mark.parametrize("case", ["v2_flash", "v26_flash"])
def test_any_slice_of_a_decoded_parameter(case, tmp_path):
    """Also one that begins or ends inside a block of scales, or between the two codes of a byte."""
    config, options = CASES[case]
    write_release(config, tmp_path, **options)
    source, rng = Decoded(HubSource(tmp_path), np.dtype(np.float32)), np.random.default_rng(0)
    for path in ("layers.0.attention.k_DKH", "layers.1.moe.down_EID", "layers.2.moe.gate_EDI", "layers.0.mlp.up_DF"):
        shape = source.params[path][0]
        whole = source.read(path, tuple(slice(0, size) for size in shape))
        assert whole.shape == shape
        for _ in range(20):
            cuts = [sorted(rng.choice(size + 1, 2, replace=False).tolist()) for size in shape]
            index = tuple(slice(*cut) for cut in cuts)
            np.testing.assert_array_equal(source.read(path, index), whole[index], err_msg=f"{path} {index}")
    assert source.describe(path).startswith(f"{path}.codes (of ")
    assert source.describe("norm.scale_D").startswith("norm.scale_D (of ")


# ---- files -------------------------------------------------------------------------------------------------------

def test_shards_are_as_the_releases_have_them(tmp_path, back):
    """Of bounded size, in the order of layers, the six tensors of an expert in a row, MTP on its own; the format is
    what its own library reads."""
    config, options = CASES["v26_flash"]
    write_release(config, tmp_path / "hub", **options)
    limit = 400_000
    export(converted(tmp_path / "hub"), back, shard_bytes=limit, progress=False)
    files = sorted(file.name for file in back.glob("*.safetensors"))
    count = len(files) - 1
    assert files == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)] + [MTP_FILE]
    order = []
    for file in files:
        with safe_open(back / file, "numpy") as found:
            assert found.metadata() == {"format": "pt", "save_format": "mxfp4", "tp_size": "4"}
        start = int.from_bytes((back / file).read_bytes()[:8], "little")
        header = json.loads((back / file).read_bytes()[8:8 + start])
        names = list(header)[1:]
        assert start % 8 == 0 and list(header)[0] == "__metadata__"
        assert [header[name]["data_offsets"][0] for name in names] == sorted(
            header[name]["data_offsets"][0] for name in names)
        assert all(name.startswith("model.mtp.") == (file == MTP_FILE) for name in names)
        size = max(header[name]["data_offsets"][1] for name in names)
        assert size <= limit or len(names) == 1 or file == MTP_FILE
        assert read_json(back / INDEX)["weight_map"].items() >= dict.fromkeys(names, file).items()
        order += names
    assert order[0] == "model.embed_tokens.weight" and order[order.index("model.norm.weight") + 1] == "lm_head.weight"
    expert = "model.layers.1.mlp.experts.2."
    first = order.index(f"{expert}gate_proj.weight")
    assert order[first:first + 6] == [f"{expert}{part}_proj.weight{suffix}" for part in ("gate", "up", "down")
                                      for suffix in ("", "_scale")]
    layers = [int(name.split(".")[2]) for name in order if name.startswith("model.layers.")]
    assert layers == sorted(layers)


def test_a_small_model_is_one_file(tmp_path, back):
    write_hub(tmp_path / "hub", tiny_config(**SMALL), fused=True)
    done = export(converted(tmp_path / "hub"), back, progress=False)
    assert {file.name for file in back.iterdir()} == {SINGLE, "config.json"} and done.num_files == 1
    assert HubSource(back).hub.metadata == {"format": "pt", "save_format": "float32", "tp_size": "2"}


def test_small_files_are_copied_verbatim(hub, back):
    for name in set(COPIED) - {"config.json"}:
        (hub / name).write_text(f"{name} \u4e0a\u6d77")
    (hub / "tokenizer.json").rename(hub / "blob")
    (hub / "tokenizer.json").symlink_to(hub / "blob")      # as in a hub cache
    for source, out in ((converted(hub), back), (hub, back.with_name("straight"))):
        export(source, out, progress=False)
        assert {file.name for file in out.iterdir()} == {*COPIED, INDEX, MTP_FILE, "model.safetensors"}
        for name in COPIED:
            assert (out / name).read_bytes() == (hub / name).read_bytes() and not (out / name).is_symlink()


def test_progress_is_shown_or_not(small, tmp_path, capfd):
    export(small, tmp_path / "quiet", progress=False)
    assert capfd.readouterr() == ("", "")
    export(small, tmp_path / "shown")
    shown = capfd.readouterr()
    assert "shown: 100%" in shown.err and shown.out == ""


MEASURED = """
import sys
from jaxllm.checkpoint import blocks, convert
from jaxllm.checkpoint.export import export
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
small, large, out = sys.argv[1:]
blocks.chunk_shape.__defaults__ = (2**21,)
convert(small, out + "-small", progress=False)
convert(large, out, progress=False)
export(out + "-small", out + "-first", progress=False)
before = peak()
export(out, out + "-back", progress=False)
print((peak() - before) // 1024)
"""


def test_memory_does_not_grow_with_the_tensors(hub, tmp_path):
    """Embedding and head of 128 MiB each, in blocks of 2 MiB, raise the peak of a process that has converted them by
    less than 64 MiB: a few blocks for each thread, and what allocators keep. One of them held would raise it by 128."""
    large, W, D = tmp_path / "large", 2**19, 64
    write_hub(large, tiny_config(**SMALL))
    edit_json(large / "config.json", lambda config: config.update(vocab_size=W))

    def grow(tensors):
        for name in ("lm_head.weight", "model.embed_tokens.weight"):
            tensors[name] = np.ones((W, D), np.float32)
    edit_tensors(large, grow)
    done = run(MEASURED, hub, large, tmp_path / "out")
    assert int(done.stdout) < 64, done.stderr
    assert (tmp_path / "out-back" / SINGLE).stat().st_size > 2 * W * D * 4


# ---- whole or absent ---------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from jaxllm.checkpoint import tensorwriter
from jaxllm.checkpoint.export import export
from jaxllm.checkpoint.store import StoreSource
def die_at(owner, name):
    real = getattr(owner, name)
    def wrapped(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(owner, name, wrapped)
folder, out, left = sys.argv[1], sys.argv[2], int(sys.argv[3])
for owner, name in ((os, "fsync"), (os, "replace"), (tensorwriter, "header"), (StoreSource, "read")):
    die_at(owner, name)
export(folder, out, shard_bytes=10**5, progress=False)
print("left", left)
"""


def test_killed_at_any_moment(small, tmp_path, back):
    """It is not loaded, nor is it a model to programs that do not know the mark; each next export begins again."""
    export(small, tmp_path / "at once", shard_bytes=10**5, progress=False)
    expected, last = tree(tmp_path / "at once"), 10**6
    for folder in (tmp_path / "counted", back):      # both there before, so that the moments are the same
        folder.mkdir(parents=True)
    last -= int(run(KILLED, small, tmp_path / "counted", last).stdout.removeprefix("left"))
    for moment in [*np.linspace(1, last - 30, 5, dtype=int), *range(last - 21, last, 5)]:
        done = run(KILLED, small, back, moment)
        assert done.returncode == -signal.SIGKILL and (back / MARKER).is_dir(), (moment, done.stderr)
        with pytest.raises(CheckpointError, match="is not finished"):
            open_source(back)
        if (back / "config.json").exists():      # the last to come, so all of it is there
            assert expected.items() <= tree(back).items()
    assert (back / "config.json").exists()
    assert run(KILLED, small, back, last).returncode == -signal.SIGKILL      # when the mark has gone
    assert tree(back) == expected


def test_nothing_that_exists_is_touched(small, back):
    """Files of one's own are not, even where an export was interrupted."""
    (back / STAGE).mkdir(parents=True)
    for name in ("mine.txt", "params/mine"):
        (back / name).parent.mkdir(exist_ok=True)
        (back / name).write_text("mine")
        before = listing(back)
        with pytest.raises(CheckpointError, match="interrupted.* or delete it; nothing was changed"):
            export(small, back, progress=False)
        assert listing(back) == before
    shutil.rmtree(back / MARKER)
    with pytest.raises(CheckpointError, match="already holds something .*mine.* nothing was changed"):
        export(small, back, progress=False)
    for folder in (small, small / "config.json"):
        with pytest.raises(CheckpointError, match="already holds something|is a file; expected a folder"):
            export(small, folder, progress=False)


def test_an_interrupted_conversion_is_not_taken_for_an_export(small, back):
    (back / MARKER).mkdir(parents=True)
    (back / LOCK).touch()
    with pytest.raises(CheckpointError, match="a conversion that was interrupted"):
        export(small, back, progress=False)
    assert (back / LOCK).exists()


def test_another_export_into_the_same_folder_is_refused(small, back):
    (back / STAGE).mkdir(parents=True)
    with open(back / LOCK, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="is being filled by another process"):
            export(small, back, progress=False)
    assert (back / STAGE).is_dir()


def test_a_disk_too_small_is_known_before(small, back, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match="hub needs .* bytes, but its disk has 1000 free; nothing was written"):
        export(small, back, progress=False)
    assert not back.parent.exists()


FULL = """
import resource, signal, sys
from jaxllm.checkpoint.export import export
folder, out, limit = sys.argv[1:]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    export(folder, out, shard_bytes=10**5, progress=False)
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [100, 50_000])
def test_a_full_disk_leaves_nothing(small, back, limit):
    """A limit on file size stands in for it: the same failed write, without a disk of one's own."""
    done = run(FULL, small, back, limit)
    assert f"{back} cannot be written" in done.stdout and "File too large" in done.stdout, done.stderr
    assert "free space or choose another place, and run again" in done.stdout
    assert not back.parent.exists()


def test_a_disk_that_fails_at_the_end_leaves_nothing(small, tmp_path, back, monkeypatch):
    """Some find out only when data must go to the disk; an empty folder that was there stays."""
    def fail(fd):
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr(tensorwriter.os, "fsync", fail)
    back.mkdir(parents=True)
    with pytest.raises(CheckpointError, match="cannot be written: .*Input/output error"):
        export(small, back, progress=False)
    assert list(back.iterdir()) == []


# ---- what cannot be exported -------------------------------------------------------------------------------------

def test_fused_fp8_cannot_be_split(tmp_path, back):
    config, options = CASES["v25"]
    write_release(config, tmp_path / "hub", **options)
    with pytest.raises(CheckpointError, match="q, k and v share blocks of scales.*--weights bfloat16 or float32"):
        export(converted(tmp_path / "hub"), back, layout="split", progress=False)
    assert not back.parent.exists()


@pytest.mark.parametrize("options", [{"weights": "fp8"}, {"layout": "fused"}, {"shard_bytes": 0}])
def test_unknown_choices(small, back, options):
    with pytest.raises(ValueError, match="expected one of keep, bfloat16, float32, one of keep, split, and a number"):
        export(small, back, progress=False, **options)


def test_an_address_is_no_place_for_an_export(small):
    with pytest.raises(CheckpointError, match="gs://bucket/hub: an export goes to a folder on this machine"):
        export(small, "gs://bucket/hub", progress=False)


def test_a_folder_that_holds_no_model(tmp_path, back):
    with pytest.raises(CheckpointError, match="holds no model"):
        export(tmp_path, back, progress=False)
    assert not back.exists()


@pytest.mark.parametrize(("name", "message"), [
    (MANIFEST, "has no manifest.json, .*the copy is not whole, or an older version converted it; convert again"),
    ("config.json", "config.json is missing; copy the folder again")])
def test_a_converted_folder_that_lacks_a_file(small, back, name, message):
    (small / name).unlink()
    with pytest.raises(CheckpointError, match=message):
        export(small, back, progress=False)


def test_a_config_of_another_model(small, back):
    edit_json(small / "config.json", lambda config: config.update(vocab_size=100))
    with pytest.raises(CheckpointError, match=r"of another shape than its config.json says \(2: embed_WD, head_DW\)"):
        export(small, back, progress=False)


def test_a_chunk_that_is_lost(small, back):
    (small / "params/norm.scale_D/0").unlink()
    with pytest.raises(CheckpointError, match="norm.scale_D is damaged"):
        export(small, back, progress=False)
    assert not back.parent.exists()


def test_parts_of_a_fused_tensor_that_differ(tmp_path, back):
    """Split projections may each have a dtype of their own; a fused one has one."""
    write_hub(tmp_path / "hub", tiny_config(**SMALL))
    edit_tensors(tmp_path / "hub", lambda tensors: tensors.update({
        name: tensors[name].astype(BF16) for name in tensors if ".k_proj." in name}))
    store = converted(tmp_path / "hub")
    edit_json(store / "config.json", lambda config: config.update(attention_projection_layout="fused_qkv"))
    with pytest.raises(CheckpointError, match="k_DKH is bfloat16, expected float32 as layers.0.attention.q_DNH, since "
                                              "both go into 'model.layers.0.self_attn.qkv_proj.weight'"):
        export(store, back, progress=False)
