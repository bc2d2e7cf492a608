"""The files of a hub folder on this machine: their hashes, and those that the hub left at the download."""
import hashlib
import os
import time

import pytest
from hub_files import edit_json

from jaxllm.checkpoint import CheckpointError
from jaxllm.checkpoint.shards import LocalShards, at_once


def states(hub, name: str, etag: str) -> None:
    """As huggingface_hub notes it beside a download into a folder."""
    record = hub / ".cache/huggingface/download" / f"{name}.metadata"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(f"0123456789abcdef\n{etag}\n1700000000.0\n")


def blob(content: bytes) -> str:
    """git's name for a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def test_hashes(hub):
    found = LocalShards(hub).hashes()
    assert found == {name: hashlib.sha256((hub / name).read_bytes()).hexdigest()
                     for name in ("config.json", "model.safetensors")}


def test_what_the_hub_stated_is_checked(hub):
    content = (hub / "model.safetensors").read_bytes()
    states(hub, "model.safetensors", hashlib.sha256(content).hexdigest())
    states(hub, "config.json", blob((hub / "config.json").read_bytes()))
    LocalShards(hub).hashes()
    (hub / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))      # a flipped bit
    with pytest.raises(CheckpointError, match="model.safetensors is damaged: the hub stated the hash .*download it"):
        LocalShards(hub).hashes()
    (hub / "model.safetensors").write_bytes(content)
    edit_json(hub / "config.json", lambda config: config.update(rope_theta=1.0))
    with pytest.raises(CheckpointError, match="config.json is damaged: the hub stated"):
        LocalShards(hub).hashes()


@pytest.mark.parametrize("flipped", [False, True])
def test_links_into_the_shared_cache_are_checked(hub, tmp_path, flipped):
    content = (hub / "model.safetensors").read_bytes()
    (tmp_path / "blobs").mkdir()
    target = tmp_path / "blobs" / hashlib.sha256(content).hexdigest()
    target.write_bytes(content[:-1] + bytes([content[-1] ^ flipped]))
    (hub / "model.safetensors").unlink()
    (hub / "model.safetensors").symlink_to(os.path.relpath(target, hub))
    if flipped:
        with pytest.raises(CheckpointError, match="model.safetensors is damaged: the hub stated the hash"):
            LocalShards(hub).hashes()
    else:
        LocalShards(hub).hashes()


@pytest.mark.parametrize("note", ["", "one line", '0123\n"W/weak"\n1.0\n'])
def test_notes_that_state_no_hash_are_no_matter(hub, note):
    states(hub, "model.safetensors", "")
    (hub / ".cache/huggingface/download/model.safetensors.metadata").write_text(note)
    assert LocalShards(hub).hashes()


def test_a_file_that_changes_is_noticed(hub):
    shards = LocalShards(hub)
    shards.hashes()
    shards.acquire("model.safetensors")
    os.utime(hub / "model.safetensors", (1, 1))
    for check in (shards.acquire, shards.release):
        with pytest.raises(CheckpointError, match="was changed while it was converted; wait until nothing writes"):
            check("model.safetensors")
    (hub / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors cannot be read: No such file"):
        shards.release("model.safetensors")


def test_the_first_error_ends_it():
    seen = []

    def work(n):
        seen.append(n)
        time.sleep(1e-3)
        if n == 3:
            raise CheckpointError("three")
        return n
    assert at_once(lambda n: n * n, [1, 2, 3]) == [1, 4, 9]
    with pytest.raises(CheckpointError, match="three"):
        at_once(work, list(range(1000)))
    assert len(seen) < 1000
