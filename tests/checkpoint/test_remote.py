"""A checkpoint on the hub through a folder of stubs; the hub and its faults are on loopback (tests/hub_server.py)."""
import errno
import hashlib
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import huggingface_hub.constants
import numpy as np
import pytest
from hub_files import ROOT, SMALL, whole
from hub_maker import tiny_config, write_hub
from hub_server import FOREVER, REPO, Fault, connect, serve, wait_until

from jaxllm.checkpoint import CheckpointError, remote, transfer
from jaxllm.checkpoint.hubsource import HubSource
from jaxllm.checkpoint.remote import HubShards
from jaxllm.checkpoint.shards import LocalShards
from jaxllm.checkpoint.tensorfile import read_header

SHARDS = [f"model-{n:05d}-of-00004.safetensors" for n in range(1, 5)]
FIRST = SHARDS[0]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub, with a model in four shards of some 150 kB."""
    write_hub(tmp_path / "repo", tiny_config(**SMALL), shards=4, mtp=1)
    (tmp_path / "repo/tokenizer.json").write_text("{}" * 1000)
    (tmp_path / "repo/README.md").write_text("not needed")
    with serve(tmp_path / "repo") as server:
        connect(monkeypatch, server)
        yield server


@pytest.fixture
def work(tmp_path):
    return tmp_path / "work"


def data_start(file):
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def on_disk(work):
    """The shards of which more than a header is on the disk, as shards or in part."""
    return [file.name for file in work.glob("model-*") if file.stat().st_blocks * 512 > 2 * 4096 + 1024]


@pytest.mark.parametrize("guess", [512, 2**15])
def test_a_folder_of_stubs_opens_like_the_folder_itself(hub, work, monkeypatch, guess):
    """Of every shard its header comes, in two requests if it is longer than the guess, and none of its data stays."""
    monkeypatch.setattr(remote, "GUESS", guess)
    shards, local = HubShards(REPO, None, work), HubSource(hub.folder)
    source = HubSource(shards.folder)
    assert source.params == local.params and source.left_out == local.left_out and source.num_mtp == 1
    for name in SHARDS:
        assert hub.served[name] == max(guess, data_start(hub.folder / name))
        assert (work / name).stat().st_size == (hub.folder / name).stat().st_size
        assert not any((work / name).read_bytes()[data_start(work / name):]) and not shards.is_here(name)
    assert [asked for name, asked in hub.requests if name == FIRST] == [f"bytes=0-{guess - 1}"] + (
        [f"bytes=512-{data_start(work / FIRST) - 1}"] if guess == 512 else [])
    assert (work / "tokenizer.json").read_bytes() == (hub.folder / "tokenizer.json").read_bytes()
    assert {file.name for file in work.iterdir()} == {
        *SHARDS, "config.json", "tokenizer.json", "model.safetensors.index.json", "jaxllm-hub.json"}
    assert on_disk(work) == [] and shards.is_here("config.json")


def test_hashes_are_those_of_the_local_folder(hub, work):
    (hub.folder / "audio_tokenizer").mkdir()
    (hub.folder / "audio_tokenizer/model.safetensors").write_bytes((hub.folder / FIRST).read_bytes())
    shards = HubShards(REPO, None, work)
    assert shards.hashes() == LocalShards(hub.folder).hashes()
    assert shards.identity == {"hub": REPO, "revision": "c" * 40}
    assert HubSource(work).left_out == {"audio_tokenizer/": ["audio_tokenizer/model.safetensors"]}


def test_shards_come_and_go(hub, work):
    shards, local = HubShards(REPO, None, work), HubSource(hub.folder)
    source = HubSource(work)
    for before, name in zip([None, *SHARDS], SHARDS, strict=False):
        shards.acquire(name)
        assert (work / name).read_bytes() == (hub.folder / name).read_bytes() and shards.is_here(name)
        assert sorted(on_disk(work)) == [*([before] if before else []), name]
        for tensor, info in source.hub.tensors.items():
            if info.file.name == name:
                np.testing.assert_array_equal(source.hub.read(tensor, whole(info.shape)),
                                              local.hub.read(tensor, whole(info.shape)), err_msg=tensor)
        if before:
            shards.release(before)
            assert not shards.is_here(before) and read_header(work / before)
    shards.release(SHARDS[-1])
    assert on_disk(work) == []


def test_a_shard_that_is_not_kept_by_lfs(hub, work):
    """Such files are small: it is downloaded at once."""
    hub.plain, name = {SHARDS[3]}, SHARDS[3]
    shards = HubShards(REPO, None, work)
    assert shards.is_here(name) and (work / name).read_bytes() == (hub.folder / name).read_bytes()
    shards.acquire(name)
    shards.release(name)
    assert shards.is_here(name) and shards.hashes() == LocalShards(hub.folder).hashes()


FAULTS = {
    "drops": [Fault(drop=100), Fault(drop=70_000), Fault(drop=0)],
    "drops more often than tries, but goes on": [Fault(times=20, drop=1000)],
    "429": [Fault(status=429, headers=(("Retry-After", "0"),), times=3)],
    "503": [Fault(status=503, times=transfer.TRIES - 1)],
    "a short body": [Fault(short=5000), Fault(short=10)],
    "a flipped bit": [Fault(flip=100_000)],
    "no ranges": [Fault(drop=5000), Fault(whole=True)],
    "all of it": [Fault(status=503), Fault(drop=9), Fault(status=429), Fault(short=80_000), Fault(flip=90_000)],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_faults_that_pass(hub, work, faults):
    hub.break_down("list", *(fault for fault in faults if fault.times < transfer.TRIES))
    shards = HubShards(REPO, None, work)
    hub.break_down(FIRST, *faults)
    shards.acquire(FIRST)
    assert (work / FIRST).read_bytes() == (hub.folder / FIRST).read_bytes()
    assert not hub.faults[FIRST] and not list(work.glob("*.partial"))
    hub.break_down(SHARDS[1], *faults)
    (work / SHARDS[1]).unlink()
    (work / "config.json").unlink()
    hub.break_down("config.json", *(fault for fault in faults if fault.flip is None and not fault.short))
    again = HubShards(REPO, None, work)      # headers and small files through the same faults
    again.acquire(SHARDS[1])
    assert (work / SHARDS[1]).read_bytes() == (hub.folder / SHARDS[1]).read_bytes()
    assert HubSource(work).params == HubSource(hub.folder).params


def test_what_came_before_a_drop_is_not_fetched_again(hub, work):
    shards, size = HubShards(REPO, None, work), (hub.folder / FIRST).stat().st_size
    hub.served.clear()
    hub.break_down(FIRST, Fault(drop=100_000), Fault(short=1000))
    shards.acquire(FIRST)
    assert hub.served[FIRST] == size
    assert [asked for name, asked in hub.requests if name == FIRST][-3:] == [
        f"bytes=0-{size - 1}", f"bytes=100000-{size - 1}", f"bytes={size - 1000}-{size - 1}"]


def test_a_header_costs_no_shard_where_there_are_no_ranges(hub, work, tmp_path):
    repo = transfer.Repo(REPO, "main")
    hub.break_down(FIRST, Fault(whole=True))
    repo.grow(tmp_path / "head", FIRST, 1000)
    assert 1000 <= (tmp_path / "head").stat().st_size <= 2**16 < repo.files[FIRST].size      # one piece from the line


def test_waits_are_what_the_hub_asks_for_or_ever_longer(hub, work, monkeypatch):
    waits = []
    monkeypatch.setattr(transfer.Repo, "_rest", lambda self, seconds: waits.append(seconds))
    monkeypatch.setattr(transfer, "FIRST_WAIT", 1.0)
    hub.break_down("list", Fault(status=429, headers=(("Retry-After", "7"),)),
                   Fault(status=429, headers=(("RateLimit", '"resolvers";r=0;t=55'),)),
                   Fault(status=429, headers=(("Retry-After", "Wed, 21 Oct 2015 07:28:00 GMT"),)),
                   Fault(status=503), Fault(drop=10))
    HubShards(REPO, None, work)
    for wait, least in zip(waits, (7, 55, 4, 8, 16), strict=True):
        assert least <= wait <= 1.25 * least
    hub.break_down("list", Fault(status=429, headers=(("Retry-After", "86400"),)))
    with pytest.raises(CheckpointError, match="status 429, 1 times in a row; check the network, wait [0-9]{5,6} s or"):
        HubShards(REPO, None, work)


@pytest.mark.parametrize("fault", [Fault(FOREVER, status=503), Fault()], ids=["waiting", "downloading"])
def test_what_is_not_wanted_any_more_is_not_fetched_to_its_end(hub, work, monkeypatch, fault):
    """As after Ctrl-C: neither a wait for a busy hub nor a slow shard holds up the end."""
    shards = HubShards(REPO, None, work)
    monkeypatch.setattr(transfer, "FIRST_WAIT", transfer.LONGEST_WAIT / 2)      # longer than that is not waited
    hub.break_down(FIRST, fault)
    hub.pace, before = 0.5, len(hub.requests)
    with ThreadPoolExecutor(1) as thread:
        fetching = thread.submit(shards.acquire, FIRST)
        wait_until(lambda: len(hub.requests) > before)
        shards.stop()
        with pytest.raises(CheckpointError, match=f"{FIRST} of .* was not fetched to its end: the conversion has ende"):
            fetching.result(20)
    assert not shards.is_here(FIRST)


def test_the_disk_it_needs_is_that_of_the_two_largest(hub, work):
    """Less what is there already: an interrupted run that would fit must not be refused."""
    shards = HubShards(REPO, None, work)
    sizes = sorted(file.size for name, file in shards.repo.files.items() if name.endswith(".safetensors"))
    assert 0.8 * sum(sizes[-2:]) < shards.room <= sum(sizes[-2:])      # headers are there
    before = shards.room
    shards.acquire(FIRST)
    assert shards.room <= max(0, before - 0.9 * shards.repo.files[FIRST].size)


@pytest.mark.parametrize(("fault", "message"), [
    (Fault(FOREVER, drop=0), "RemoteProtocolError: .*, 7 times in a row; .*run again with --resume"),
    (Fault(FOREVER, status=429), "status 429, 7 times in a row; .*wait .* s or more and run again with --resume"),
    (Fault(FOREVER, status=503), "status 503, 7 times in a row"),
    (Fault(FOREVER, short=10**9), "the answer ends at once, 7 times in a row"),
    (Fault(FOREVER, whole=True, drop=2000), "RemoteProtocolError: .*, 7 times in a row"),
    (Fault(FOREVER, flip=100_000), "arrived twice with other bytes than the hub states .*[0-9a-f]{64}.*--resume"),
    (Fault(FOREVER, status=404, headers=(("X-Error-Code", "EntryNotFound"),)), "is refused with status 404"),
    (Fault(FOREVER, status=416), "is refused with status 416"),
])
def test_faults_that_stay(hub, work, fault, message):
    shards = HubShards(REPO, "main", work)
    hub.break_down(FIRST, fault)
    with pytest.raises(CheckpointError, match=f"{FIRST} of {REPO} at main on {hub.endpoint} .*{message}") as caught:
        shards.acquire(FIRST)
    assert "\n" not in str(caught.value) and not shards.is_here(FIRST)
    hub.faults.clear()
    HubShards(REPO, "main", work).acquire(FIRST)
    assert (work / FIRST).read_bytes() == (hub.folder / FIRST).read_bytes()


def test_a_header_that_came_damaged(hub, work):
    """Its shard is refused, as the conversion was planned by the header; the next run goes on with the true one."""
    name = SHARDS[1]
    flip = (hub.folder / name).read_bytes().index(b'"pt"') + 1      # in __metadata__, so that it still opens
    hub.break_down(name, Fault(flip=flip))
    shards = HubShards(REPO, None, work)
    with pytest.raises(CheckpointError, match=f"the header of {name} of {REPO} at .* other bytes than now; .*--resume"):
        shards.acquire(name)
    again = HubShards(REPO, None, work)
    again.acquire(name)
    assert (work / name).read_bytes() == (hub.folder / name).read_bytes()


def test_a_header_that_is_none(hub, work):
    (hub.folder / FIRST).write_bytes(b"\xff" * 3000)
    HubShards(REPO, None, work)
    with pytest.raises(CheckpointError, match=f"{work / FIRST} is truncated or not a safetensors file"):
        HubSource(work)


@pytest.mark.parametrize(("repo", "revision", "message"), [
    ("org/other", None, "org/other at main on .*: there is no such folder here and no such repository there, or it is "
                        r"private \(status 404\); check the name, or log in with `hf auth login` or a token in HF_TOK"),
    (REPO, "v9", f"{REPO} at v9 on http.*: there is no such revision; expected a branch, a tag or a commit"),
    ("a/b/c", None, "'a/b/c' is neither a folder nor a hub id: "),
])
def test_what_is_not_on_the_hub(hub, work, repo, revision, message):
    with pytest.raises(CheckpointError, match=message):
        HubShards(repo, revision, work)
    assert not work.exists()


def test_gated_and_forbidden(hub, work):
    hub.break_down("list", Fault(status=403, headers=(("X-Error-Code", "GatedRepo"),)))
    with pytest.raises(CheckpointError, match=rf"{REPO} at main on .* is gated \(status 403\): .* token in HF_TOKEN"):
        HubShards(REPO, None, work)
    hub.break_down("list", Fault(status=403))
    with pytest.raises(CheckpointError, match=rf"{REPO} at main on .*\(status 403\).* a token in HF_TOKEN"):
        HubShards(REPO, None, work)


def test_a_private_repository_and_its_token(hub, work, monkeypatch):
    hub.token = "hf_secret"
    with pytest.raises(CheckpointError, match=r"is private \(status 401\); .* a token in HF_TOKEN"):
        HubShards(REPO, None, work)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    HubShards(REPO, None, work).acquire(FIRST)
    assert hub.leaked == []      # the second host is sent none


def test_no_network(hub, work, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=f"{REPO} at main on http://127.0.0.1:9 .*ConnectError: .*7 times in a"):
        HubShards(REPO, None, work)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set; unset it"):
        HubShards(REPO, None, work)


@pytest.mark.parametrize("answer", [b"<html>log in to the hotel</html>", b"[]", b'{"id": "org/model"}',
                                    b'{"id": "a/b", "sha": "c", "siblings": [{"rfilename": "config.json"}]}'])
def test_something_that_is_no_hub(hub, work, monkeypatch, answer):
    monkeypatch.setattr(type(hub), "listing", lambda self, commit: answer)
    with pytest.raises(CheckpointError, match="the answer is not that of a hub; see HF_ENDPOINT and proxies"):
        HubShards(REPO, None, work)


def test_names_that_lead_outside(hub, work, monkeypatch):
    listing = type(hub).listing
    monkeypatch.setattr(type(hub), "listing", lambda self, commit: listing(self, commit).replace(
        SHARDS[3].encode(), b"../" + SHARDS[3].encode()))
    with pytest.raises(CheckpointError, match="lists '../model-.*', which is not inside the repository"):
        HubShards(REPO, None, work)
    assert os.listdir(work) == ["jaxllm-hub.json"]


def test_the_commit_is_kept(hub, work):
    HubShards(REPO, None, work)
    hub.commits["main"] = "d" * 40      # somebody pushes
    for revision in (None, "main", "c" * 40):
        assert HubShards(REPO, revision, work).commit == "c" * 40
    with pytest.raises(CheckpointError, match=f"was begun with {REPO} at main, not {REPO} at v2; go on with that"):
        HubShards(REPO, "v2", work)
    with pytest.raises(CheckpointError, match=f"was begun with {REPO} at main, not org/other at main"):
        HubShards("org/other", None, work)


def test_a_disk_that_is_full(hub, work, monkeypatch):
    shards, replace = HubShards(REPO, None, work), os.replace

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CheckpointError, match=f"{work / FIRST} cannot be written: No space left on device; .*--resume"):
        shards.acquire(FIRST)
    monkeypatch.setattr(os, "replace", replace)
    hub.served.clear()
    shards.acquire(FIRST)
    assert not hub.served[FIRST]      # what was downloaded was kept


ACQUIRE = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from jaxllm.checkpoint import remote
remote.GUESS = 512
shards = remote.HubShards(sys.argv[1], None, Path(sys.argv[2]))
for name in sys.argv[3:]:
    shards.acquire(name)
"""


def kill_at(hub, work, claim, *names):
    """kill -9 a process that acquires `names`, as soon as the claim holds."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HF_ENDPOINT": hub.endpoint}
    process = subprocess.Popen([sys.executable, "-c", ACQUIRE, REPO, str(work), *names], env=env)
    wait_until(claim)
    process.kill()
    assert process.wait() == -signal.SIGKILL


def test_a_killed_download_goes_on(hub, work):
    """The first shard is here, half of the second is: only the rest of that is fetched."""
    second, size = SHARDS[1], (hub.folder / SHARDS[1]).stat().st_size
    hub.pace = 0.3
    partial = work / f"{second}.partial"
    kill_at(hub, work, lambda: partial.exists() and partial.stat().st_size > 0, FIRST, second)
    half = partial.stat().st_size
    assert 0 < half < size
    hub.pace = 0
    wait_until(lambda: not hub.answering)      # it has noticed that nobody listens any more
    hub.served.clear()
    hub.requests.clear()
    shards = HubShards(REPO, None, work)
    assert not shards.is_here(FIRST) and not hub.served.keys() & set(SHARDS)      # not trusted before it is hashed
    shards.acquire(FIRST)
    shards.acquire(second)
    assert hub.requests == [(second, f"bytes={half}-{size - 1}")] and hub.served[second] == size - half
    assert (work / second).read_bytes() == (hub.folder / second).read_bytes()


def test_what_a_kill_left_makes_room(hub, work):
    """Two shards of a killed run that are not needed any more: the first goes when a second new one comes."""
    left = HubShards(REPO, None, work)
    left.acquire(FIRST)
    left.acquire(SHARDS[1])
    shards = HubShards(REPO, None, work)
    for name in SHARDS[2:]:
        shards.acquire(name)
        assert len(on_disk(work)) <= 2 and name in on_disk(work)
    assert sorted(on_disk(work)) == SHARDS[2:]


def test_a_shard_left_by_a_kill_and_damaged_since(hub, work):
    HubShards(REPO, None, work).acquire(FIRST)
    with open(work / FIRST, "r+b") as stream:
        stream.seek(100_000)
        stream.write(b"damaged")
    HubShards(REPO, None, work).acquire(FIRST)
    assert hashlib.sha256((work / FIRST).read_bytes()).digest() == hashlib.sha256(
        (hub.folder / FIRST).read_bytes()).digest()
