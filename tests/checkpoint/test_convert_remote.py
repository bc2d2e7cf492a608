"""Converting from the hub: the same bytes as from a folder, whatever the line does, with two shards on the disk."""
import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from hub_files import ROOT, SMALL
from hub_maker import tiny_config, write_hub
from hub_server import FOREVER, REPO, Fault, connect, serve, wait_until

from jaxllm.checkpoint import CheckpointError, convert, open_source
from jaxllm.checkpoint.incomplete import is_incomplete
from jaxllm.checkpoint.manifest import MANIFEST
from jaxllm.checkpoint.remote import HubShards

SHARDS = [f"model-{n:05d}-of-00006.safetensors" for n in range(1, 7)]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    write_hub(tmp_path / "repo", tiny_config(**SMALL), shards=6, mtp=1)
    (tmp_path / "repo/tokenizer.json").write_text("{}")
    with serve(tmp_path / "repo") as server:
        connect(monkeypatch, server)
        yield server


@pytest.fixture
def local(hub, tmp_path):
    """The conversion of the same folder without the hub."""
    convert(hub.folder, tmp_path / "local", progress=False)
    return tmp_path / "local"


def contents(folder):
    """Every file; of the manifest all but what the source is called."""
    found = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    manifest = json.loads(found.pop(MANIFEST))
    del manifest["plan"]["source"], manifest["sha256"]
    return found | {MANIFEST: manifest}


def test_from_the_hub_as_from_a_folder(hub, local, out, monkeypatch):
    at_once, acquire = [], HubShards.acquire

    def counted(self, name):
        acquire(self, name)
        at_once.append(sum(file.stat().st_blocks * 512 > 20_000 for file in self.folder.glob("model-*")))
    monkeypatch.setattr(HubShards, "acquire", counted)
    convert(REPO, out, revision="main", progress=False)
    assert contents(out) == contents(local) and not is_incomplete(out)
    assert json.loads((out / MANIFEST).read_text())["plan"]["source"] == {"hub": REPO, "revision": "c" * 40}
    assert len(at_once) == len(SHARDS) and max(at_once) == 2
    for name in SHARDS:      # once, and its header before
        size = (hub.folder / name).stat().st_size
        assert size < hub.served[name] < size + 20_000


def test_a_line_that_is_bad_all_the_time(hub, local, out):
    hub.break_down("list", Fault(status=503), Fault(drop=50))
    hub.break_down("config.json", Fault(drop=20), Fault(status=429, headers=(("Retry-After", "0"),)))
    for name in SHARDS:
        hub.break_down(name, Fault(drop=100), Fault(status=503, times=3), Fault(drop=30_000, times=2),
                       Fault(status=429), Fault(short=1000), Fault(flip=60_000))
    convert(REPO, out, progress=False)
    assert contents(out) == contents(local) and not any(hub.faults.values())


@pytest.mark.parametrize(("fault", "message"), [
    (Fault(FOREVER, drop=0), "7 times in a row; .* run again with --resume"),
    (Fault(FOREVER, flip=60_000), "arrived twice with other bytes .*run again with --resume"),
])
def test_a_line_that_breaks_for_good_and_comes_back(hub, local, out, fault, message):
    real = HubShards.acquire

    def acquire(self, name):
        if name == SHARDS[3]:
            hub.break_down(name, fault)
        real(self, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HubShards, "acquire", acquire)
        with pytest.raises(CheckpointError, match=f"{SHARDS[3]} of {REPO} at main .*{message}"):
            convert(REPO, out, progress=False)
    assert is_incomplete(out)
    with pytest.raises(CheckpointError, match="--resume"):
        open_source(out)
    hub.faults.clear()
    hub.served.clear()
    convert(REPO, out, resume=True, progress=False)
    assert contents(out) == contents(local)
    assert not hub.served.keys() & set(SHARDS[:2]) and hub.served[SHARDS[3]]      # what was done is not fetched again


CONVERT = """
import sys
from jaxllm.checkpoint import convert, remote
remote.GUESS = 512
convert(sys.argv[1], sys.argv[2], progress=False)
"""


@pytest.mark.parametrize("number", [1, 4])
def test_a_killed_conversion_goes_on(hub, local, out, number):
    """kill -9 in the middle of the second and of the fifth shard, and somebody pushes to the repository."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HF_ENDPOINT": hub.endpoint}
    hub.pace = 0.2
    process = subprocess.Popen([sys.executable, "-c", CONVERT, REPO, str(out)], env=env)
    partial = out / f"jaxllm-incomplete/source/{SHARDS[number]}.partial"
    wait_until(lambda: partial.exists() and partial.stat().st_size > 0, 60)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    hub.pace, half = 0, partial.stat().st_size
    hub.commits["main"] = "d" * 40
    wait_until(lambda: hub.served[SHARDS[number]] >= half)
    hub.requests.clear()
    with pytest.raises(CheckpointError, match="interrupted: run again with --resume"):
        convert(REPO, out, progress=False)
    convert(REPO, out, resume=True, progress=False)
    assert contents(out) == contents(local)
    fetched = {name: asked for name, asked in hub.requests if name in SHARDS}
    assert fetched[SHARDS[number]].startswith(f"bytes={half}-")
    assert not fetched.keys() & set(SHARDS[:number - 1])


def test_the_disk_must_hold_the_output_and_two_shards(hub, local, out, monkeypatch):
    output = sum(file.stat().st_size for file in local.rglob("*") if file.is_file())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=output + 1000))
    with pytest.raises(CheckpointError, match="needs .* bytes, but .* has .* free; nothing was written"):
        convert(REPO, out, progress=False)
    assert not out.exists()
