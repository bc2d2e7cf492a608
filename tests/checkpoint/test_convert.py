"""Converting: bit-identical there and back, restorable by plain Orbax, bounded in memory."""
import os

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hub_files import SMALL, edit_json, edit_tensors, run, whole
from hub_maker import tiny_config, write_hub
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from jaxllm.checkpoint import CheckpointError, convert, load_arrays, open_source
from jaxllm.checkpoint.hubsource import HubSource
from jaxllm.checkpoint.manifest import MANIFEST
from jaxllm.checkpoint.shards import COPIED
from jaxllm.checkpoint.store import PARAMS


@pytest.mark.parametrize(("dtype", "fused", "shards"), [
    ("float32", False, 1), ("bfloat16", False, 3), ("float16", False, 2), ("bfloat16", True, 1), ("float32", True, 4),
])
def test_there_and_back_is_bit_identical(tmp_path, out, dtype, fused, shards):
    write_hub(tmp_path / "hub", tiny_config(**SMALL), dtype=dtype, fused=fused, shards=shards, mtp=2)
    done = convert(tmp_path / "hub", out, progress=False)
    store, table, names = open_source(out), HubSource(tmp_path / "hub").table, set()
    for file in (tmp_path / "hub").glob("*.safetensors"):
        for name, array in load_file(file).items():
            back = table.to_hub(name, store.read)
            assert back.dtype == array.dtype and back.shape == array.shape and back.tobytes() == array.tobytes(), name
            names.add(name)
    assert names == table.shapes.keys()
    assert (done.folder, done.num_arrays, done.num_mtp) == (out, len(store.params), 2)
    assert done.nbytes == sum(file.stat().st_size for file in out.glob("params/*/[0-9]*")) and done.left_out == {}


@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 8, 1)])
def test_plain_orbax_restores_it_onto_any_mesh(hub, out, mesh):
    convert(hub, out, progress=False)
    source, axes = open_source(out), jax.make_mesh(mesh, ("data", "expert", "tensor"))
    names = {"E": "expert", "N": "tensor", "W": "tensor"}
    wanted = {path: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(axes, PartitionSpec(
        *(names.get(letter) for letter in path.rsplit("_", 1)[-1])))) for path, (shape, dtype) in source.params.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(out / PARAMS, wanted)
    ours = load_arrays(source, wanted)
    assert restored.keys() == ours.keys() == source.params.keys()
    for path, array in restored.items():
        assert array.sharding == wanted[path].sharding
        np.testing.assert_array_equal(np.asarray(array), np.asarray(ours[path]), err_msg=path)
        np.testing.assert_array_equal(np.asarray(array), source.read(path, whole(array.shape)), err_msg=path)


def test_plain_orbax_restores_it_without_being_told_shapes(hub, out):
    convert(hub, out, progress=False)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(out / PARAMS)
    expected = load_file(hub / "model.safetensors")["lm_head.weight"].T
    np.testing.assert_array_equal(np.asarray(restored["head_DW"]), expected)


def test_small_files_are_copied_verbatim_and_nothing_else(hub, out):
    for name in set(COPIED) - {"config.json"}:
        (hub / name).write_text(f"{name} \u4e0a\u6d77")
    (hub / "training.json").write_text("{}")
    (hub / "tokenizer.json").rename(hub / "blob")
    (hub / "tokenizer.json").symlink_to(hub / "blob")      # as in a hub cache
    convert(hub, out, progress=False)
    assert {file.name for file in out.iterdir()} == {*COPIED, PARAMS, MANIFEST}
    for name in COPIED:
        assert (out / name).read_bytes() == (hub / name).read_bytes() and not (out / name).is_symlink()
    assert os.listdir(out.parent) == ["out"]      # no temporary folder is left


def test_what_is_left_out_is_shown(hub, out, capsys):
    edit_tensors(hub, lambda tensors: tensors.update({"visual.merger.ln_q.weight": np.zeros(4, np.float32)}))
    (hub / "audio_tokenizer").mkdir()
    save_file({"a": np.zeros(3, np.float32)}, hub / "audio_tokenizer/model.safetensors")
    done = convert(hub, out)
    assert done.left_out == {"visual": ["visual.merger.ln_q.weight"],
                             "audio_tokenizer/": ["audio_tokenizer/model.safetensors"]}
    shown = capsys.readouterr()
    assert "visual (1), audio_tokenizer/ (1)" in shown.err and "100%" in shown.err and shown.out == ""


def test_silent_without_progress(hub, out, capfd):
    convert(hub, out, progress=False)
    open_source(out)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("name", "keep", "message"), [
    ("embed_WD/0.0", None, "embed_WD is damaged .*jaxllm verify tells what else is; .*convert again"),
    ("embed_WD/0.0", -1, "embed_WD is damaged .*jaxllm verify tells what else is; .*convert again"),
    ("embed_WD/.zarray", 20, "embed_WD is damaged .*jaxllm verify tells what else is; .*convert again"),
    ("embed_WD/.zarray", None, "embed_WD is damaged .*jaxllm verify tells what else is; .*convert again"),
    ("_METADATA", None, "_METADATA is missing: .* not a whole copy"),
    ("_METADATA", 20, "_METADATA is not valid JSON"),
    ("_METADATA", 0, "_METADATA is not valid JSON"),
])
def test_a_damaged_store_is_noticed(hub, out, name, keep, message):
    """Files that are absent (None) or cut."""
    convert(hub, out, progress=False)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {path: jax.ShapeDtypeStruct(shape, dtype, sharding=one)
              for path, (shape, dtype) in open_source(out).params.items()}
    file = out / PARAMS / name
    content = file.read_bytes()
    file.unlink()
    if keep is not None:
        file.write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match=message):
        load_arrays(open_source(out), wanted)


def test_zeros_are_stored(hub, out):
    """A chunk of zeros must not look like one that was lost."""
    edit_tensors(hub, lambda tensors: tensors["model.embed_tokens.weight"].fill(0))
    convert(hub, out, progress=False)
    assert not open_source(out).read("embed_WD", whole((96, 64))).any()


MEASURED = """
import sys
from jaxllm.checkpoint import blocks, convert
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
small, large, out = sys.argv[1:]
blocks.chunk_shape.__defaults__ = (2**21,)
convert(small, out + "-small", progress=False)
before = peak()
convert(large, out, progress=False)
print((peak() - before) // 1024)
"""


def test_memory_does_not_grow_with_the_tensors(hub, out, tmp_path):
    """An embedding of 256 MiB in blocks of 2 MiB raises the peak of a process that has converted a small model before
    by less than 48 MiB: a few blocks for each thread, and what allocators keep. The embedding held once would raise it
    by 256."""
    large = tmp_path / "large"
    write_hub(large, tiny_config(**SMALL))
    W, D = 2**20, 64
    edit_json(large / "config.json", lambda config: config.update(vocab_size=W, tie_word_embeddings=True))

    def grow(tensors):
        del tensors["lm_head.weight"]
        tensors["model.embed_tokens.weight"] = np.zeros((W, D), np.float32)
    edit_tensors(large, grow)
    done = run(MEASURED, hub, large, out)
    assert int(done.stdout) < 48, done.stderr
