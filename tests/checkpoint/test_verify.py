"""The manifest of a converted folder, and what `verify` finds: every damaged file, by name."""
import hashlib
import json
import re
import shutil

import pytest
from hub_files import SMALL, edit_json, edit_tensors, interrupt, tree
from hub_maker import tiny_config, write_hub

from jaxllm.checkpoint import CheckpointError, convert
from jaxllm.checkpoint.manifest import MANIFEST, read_manifest
from jaxllm.checkpoint.verify import verify


def sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def made(hub, out):
    (hub / "tokenizer.json").write_text("{}")
    return convert(hub, out, progress=False).folder


def test_the_manifest_tells_every_file_and_what_it_was_made_from(hub, made):
    manifest = read_manifest(made)
    assert {name: (stored.size, stored.sha256) for name, stored in manifest.files.items()} == {
        str(path.relative_to(made)): (path.stat().st_size, sha256(path))
        for path in made.rglob("*") if path.is_file() and path.name != MANIFEST}
    plan = manifest.plan
    assert plan.files == {name: sha256(hub / name) for name in ("config.json", "model.safetensors", "tokenizer.json")}
    assert (plan.source, plan.options, plan.num_mtp) == ({"folder": "hub"}, {"weights": "keep"}, 1)


def test_the_same_source_gives_the_same_bytes(hub, made, tmp_path):
    shutil.copytree(hub, tmp_path / "elsewhere/hub")
    convert(tmp_path / "elsewhere/hub", tmp_path / "again", progress=False)
    assert tree(made) == tree(tmp_path / "again")


def test_shards_and_their_index_are_in_it(tmp_path, out):
    write_hub(tmp_path / "hub", tiny_config(**SMALL), shards=3)
    convert(tmp_path / "hub", out, progress=False)
    assert read_manifest(out).plan.files.keys() == {"config.json", "model.safetensors.index.json", *(
        f"model-{n:05}-of-00003.safetensors" for n in (1, 2, 3))}


def test_a_whole_folder(hub, made, capsys):
    found = verify(made, hub)
    files = [path for path in made.rglob("*") if path.is_file() and path.name != MANIFEST]
    assert (found.num_files, found.nbytes) == (len(files), sum(path.stat().st_size for path in files))
    shown = capsys.readouterr()
    assert "100%" in shown.err and shown.out == ""
    verify(made, progress=False)
    assert capsys.readouterr() == ("", "")


def flip(path) -> None:
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def test_every_fault_is_named(made):
    flip(made / "params/head_DW/0.0")
    flip(made / "tokenizer.json")
    (made / "params/embed_WD/.zarray").unlink()
    chunk = made / "params/layers.1.moe.up_EDI/7.0.0"
    chunk.write_bytes(chunk.read_bytes()[:-3])
    (made / "params/norm.scale_D/1").write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        verify(made, progress=False)
    assert str(caught.value) == (
        f"{made} is not as it was made: params/embed_WD/.zarray is missing; params/head_DW/0.0 is damaged: other bytes "
        "than written; params/layers.1.moe.up_EDI/7.0.0 has 8189 bytes, expected 8192; tokenizer.json is damaged: "
        "other bytes than written; params/norm.scale_D/1 does not belong there; copy these files again, or run jaxllm "
        "convert again with --resume, which makes them again")


def test_any_flipped_bit_is_found(made):
    """In each file that there is."""
    for path in sorted(path for path in made.rglob("*") if path.is_file()):
        before = path.read_bytes()
        flip(path)
        with pytest.raises(CheckpointError, match=re.escape(path.name)):
            verify(made, progress=False)
        path.write_bytes(before)
    verify(made, progress=False)


def test_files_of_the_users_beside_the_parameters_are_none_of_its_business(made):
    (made / "README.md").write_text("mine")
    verify(made, progress=False)


def test_the_source_is_checked_too(hub, made):
    flip(hub / "model.safetensors")
    (hub / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=f"{hub}/model.safetensors is not what it was; {hub}/tokenizer.json is "
                                              "missing; copy"):
        verify(made, hub, progress=False)


def test_a_damaged_manifest_is_told_from_damaged_files(made):
    edit_json(made / MANIFEST, lambda content: content["files"]["config.json"].update(size=1))
    with pytest.raises(CheckpointError, match="manifest.json is damaged: its content has not the checksum"):
        verify(made, progress=False)
    (made / MANIFEST).write_text((made / MANIFEST).read_text()[:100])
    with pytest.raises(CheckpointError, match="manifest.json is not valid JSON"):
        verify(made, progress=False)


def test_a_manifest_of_another_version(made):
    content = json.loads((made / MANIFEST).read_text())
    del content["sha256"]
    content["plan"]["format"] = 99
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    content["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (made / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="manifest.json has the format 99, this jaxllm reads 1; use the version"):
        verify(made, progress=False)


def test_folders_without_a_manifest(hub, made):
    (made / MANIFEST).unlink()
    for folder in (made, hub, hub / "absent"):
        with pytest.raises(CheckpointError, match="has no manifest.json, .*by an older version, or is no converted"):
            verify(folder, progress=False)


def test_an_interrupted_conversion(hub, out, monkeypatch):
    interrupt(hub, out, monkeypatch)
    with pytest.raises(CheckpointError, match="is a conversion .*that is not finished: .*--resume"):
        verify(out, progress=False)


def test_what_was_read_of_a_source_that_changed_is_not_taken(hub, out, monkeypatch):
    """A file that is written to while it is converted, too late for its hash."""
    from jaxllm.checkpoint.hubsource import HubSource

    def read(self, path, index, real=HubSource.read):
        if path == "head_DW":
            with open(hub / "model.safetensors", "r+b") as file:
                file.seek(-1, 2)
                file.write(b"x")
        return real(self, path, index)
    monkeypatch.setattr(HubSource, "read", read)
    with pytest.raises(CheckpointError, match="model.safetensors was changed while it was converted; wait until"):
        convert(hub, out, progress=False)


def test_a_source_that_shrinks(hub, out, monkeypatch):
    """What a read finds missing is said by the reader; nothing is taken for whole."""
    from jaxllm.checkpoint import shards
    real = shards.LocalShards.hashes

    def hashes(self):
        found = real(self)
        edit_tensors(hub, lambda tensors: tensors.pop("lm_head.weight"))
        return found
    monkeypatch.setattr(shards.LocalShards, "hashes", hashes)
    with pytest.raises(CheckpointError, match="model.safetensors was changed while it was converted"):
        convert(hub, out, progress=False)
